# cython: wraparound=True
"""The driver of graph_attention: a call, checked, and the rows of its graph over threads.

Heads whose rows lie together in a node are taken together; along the other batch axes, and along rows, the work is cut
into tasks of about as many edges each.
"""
import numpy as np

cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.float cimport DBL_MAX
from libc.math cimport sqrt
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy

from fastattn._checks cimport (accumulation, as_array, checked_out, checked_threads, converted, empty, flag, floating,
                               integer_array, promoted, real, shape_of, storage_of, too_few_axes)
from fastattn._runtime cimport (FA_ADDITIVE, FA_BIAS, FA_DOT, FA_EDGE_KEY, FA_EDGE_VALUE, FA_F32, FA_F64, FA_KEY,
                                FA_LSE, FA_OUT, FA_QUERY, FA_UNIT_WEIGHTS, FA_VALUE, FA_WEIGHTS, Team, Watch,
                                allowed_threads, fa_dtype, fa_graph, fa_kernels, gathered, give_workspace, interrupted,
                                join_team, kernels_for, raise_pending, take_workspace)

cnp.import_array()

cdef enum:
    SMALL = 1 << 15         # numbers of keys and values below which threads cost more than they bring
    CHUNK = 1 << 18         # the same, of a task


# The graph

cdef object no_graph(object graph):
    what = f"{type(graph).__module__}.{type(graph).__name__}"
    instead = ""
    if hasattr(graph, "tocsr"):
        instead = ": pass graph.tocsr()"
    elif isinstance(graph, np.ndarray):
        instead = (": pass scipy.sparse.csr_array(graph), or scipy.sparse.coo_array((data, (targets, sources)), "
                   "shape).tocsr() of a list of edges")
    return TypeError(f"graph must be a SciPy CSR array or matrix, or a pair (indptr, indices), not a {what}{instead}")


cdef cnp.ndarray index_array(object x, str name):
    allowed = "an array of int32 or int64 with one axis"
    cdef cnp.ndarray a = integer_array(x, name, allowed, "i")
    if cnp.PyArray_ITEMSIZE(a) not in (4, 8):
        raise TypeError(f"{name} must be {allowed}, not of dtype {a.dtype}")
    if cnp.PyArray_NDIM(a) != 1:
        raise ValueError(f"{name} must be {allowed}, not of shape {shape_of(a)}")
    return a


cdef int64_t index_at(const char *at, int size) noexcept nogil:
    cdef int32_t short_one
    cdef int64_t long_one
    if size == 4:
        memcpy(&short_one, at, 4)
        return short_one
    memcpy(&long_one, at, 8)
    return long_one


cdef Py_ssize_t first_fall(const fa_graph *graph, Py_ssize_t rows) noexcept nogil:
    """The first row that ends before it begins; -1: none."""
    cdef Py_ssize_t i
    cdef int64_t before = 0, now
    for i in range(rows):
        now = index_at(graph.indptr + (i + 1) * graph.indptr_step, graph.indptr_size)
        if now < before:
            return i
        before = now
    return -1


cdef Py_ssize_t first_outside(const fa_graph *graph, int64_t keys) noexcept nogil:
    """The first edge whose key there is not; -1: none."""
    cdef Py_ssize_t t
    cdef int64_t j
    for t in range(graph.edges):
        j = index_at(graph.indices + t * graph.index_step, graph.index_size)
        if j < 0 or j >= keys:
            return t
    return -1


cdef tuple read_structure(Call p, object graph):
    """Places indptr and indices, of which everything is checked; returns them."""
    cdef cnp.ndarray indptr, indices
    cdef Py_ssize_t bad
    cdef bint is_pair = isinstance(graph, (tuple, list))
    if is_pair:
        if len(graph) != 2:
            raise TypeError(f"graph must be a SciPy CSR array or matrix, or a pair (indptr, indices), not {len(graph)} "
                            f"things")
        first, second = graph
    else:
        if getattr(graph, "format", None) != "csr" or not hasattr(graph, "indptr") or not hasattr(graph, "indices"):
            raise no_graph(graph)
        shape = tuple(graph.shape)
        if shape != (p.rows, p.keys):
            raise ValueError(f"graph has shape {shape}; query and key have {p.rows} and {p.keys} rows, so that it must "
                             f"be {(p.rows, p.keys)}")
        first, second = graph.indptr, graph.indices
    indptr, indices = index_array(first, "graph's indptr"), index_array(second, "graph's indices")
    if cnp.PyArray_DIM(indptr, 0) != p.rows + 1:
        raise ValueError(f"graph's indptr has {cnp.PyArray_DIM(indptr, 0)} entries; it must have one more than query "
                         f"has rows, {p.rows + 1}")
    p.graph.indptr = <const char *> cnp.PyArray_DATA(indptr)
    p.graph.indptr_step = cnp.PyArray_STRIDE(indptr, 0)
    p.graph.indptr_size = <int> cnp.PyArray_ITEMSIZE(indptr)
    first, last = int(indptr[0]), int(indptr[p.rows])
    if not is_pair and 0 <= last < cnp.PyArray_DIM(indices, 0):
        indices = indices[:last]  # SciPy's arrays may have room for more
    p.graph.indices = <const char *> cnp.PyArray_DATA(indices)
    p.graph.index_step = cnp.PyArray_STRIDE(indices, 0)
    p.graph.index_size = <int> cnp.PyArray_ITEMSIZE(indices)
    p.graph.edges = cnp.PyArray_DIM(indices, 0)
    if first != 0 or last != p.graph.edges:
        raise ValueError(f"graph's indptr must begin with 0 and end with the number of indices, {p.graph.edges}: it "
                         f"begins with {first} and ends with {last}")
    with nogil:
        bad = first_fall(&p.graph, p.rows)
    if bad >= 0:
        raise ValueError(f"graph's indptr must not fall: indptr[{bad}] is {indptr[bad]}, indptr[{bad + 1}] is "
                         f"{indptr[bad + 1]}")
    with nogil:
        bad = first_outside(&p.graph, p.keys)
    if bad >= 0:
        raise ValueError(f"graph's indices must be at least 0 and below {p.keys}, the number of rows of key: "
                         f"indices[{bad}] is {indices[bad]}")
    p.kept += [indptr, indices]
    return indptr, indices


# The other arguments

cdef tuple batch_of(list arrays):
    """What the axes before the last two of query, key and value broadcast to."""
    query, key, value = [shape_of(a) for a in arrays]
    try:
        return np.broadcast_shapes(query[:-2], key[:-2], value[:-2])
    except ValueError:
        raise ValueError(f"the batch axes of query {query}, key {key} and value {value} do not broadcast; arrays "
                         f"(nodes, heads, channels) are passed as x.swapaxes(0, 1)") from None


cdef cnp.ndarray broadcast(cnp.ndarray a, str name, tuple shape, str what):
    try:
        return np.broadcast_to(a, shape)
    except ValueError:
        raise ValueError(f"{name} has shape {shape_of(a)}, which does not broadcast to {shape}, {what}") from None


cdef int place(Call p, int operand, cnp.ndarray a, fa_dtype dtype, int trailing) except -1:
    """Notes where an array lies that has all batch axes. trailing: 2, a row and its channels; 1, a row; 0, neither."""
    cdef int i, ndim = cnp.PyArray_NDIM(a)
    p.graph.view[operand].data = <char *> cnp.PyArray_DATA(a)
    p.graph.view[operand].dtype = dtype
    p.graph.view[operand].row = p.graph.view[operand].head = 0
    p.graph.view[operand].col = cnp.PyArray_ITEMSIZE(a)
    if trailing == 2:
        p.graph.view[operand].col = cnp.PyArray_STRIDE(a, ndim - 1)
    if trailing and cnp.PyArray_DIM(a, ndim - trailing) > 1:
        p.graph.view[operand].row = cnp.PyArray_STRIDE(a, ndim - trailing)
    for i in range(ndim - trailing):
        p.strides[operand][i] = 0 if cnp.PyArray_DIM(a, i) == 1 else cnp.PyArray_STRIDE(a, i)
    p.kept.append(a)
    return 0


cdef cnp.ndarray float_array(object x, str name):
    cdef cnp.ndarray a = as_array(x, name)
    if a.dtype.kind in "biu":
        raise TypeError(f"{name} must be floating, not of dtype {a.dtype}")
    storage_of(a, name)
    return a


cdef inline Py_ssize_t size_of_step(Py_ssize_t stride) noexcept:
    """abs, which Cython calls as Python's function, and whose errors could not be passed on."""
    return -stride if stride < 0 else stride


cdef void take_heads(Call p, bint only_last) noexcept:
    """Makes the heads whose rows lie together in a node those that kernels take together: the batch axis along which
    key and value move least, and less than from node to node. only_last: that with more than one entry, or none; what
    is summed over the batch is then in ascending order, whatever the strides."""
    cdef int axis, i, best = -1, first = 0
    cdef Py_ssize_t step, least = 0, key = size_of_step(p.graph.view[<int> FA_KEY].row)
    cdef Py_ssize_t value = size_of_step(p.graph.view[<int> FA_VALUE].row)
    for axis in range(p.axes if only_last else 0):
        if p.shape[axis] > 1:
            first = axis
    for axis in range(first, p.axes):
        if (p.shape[axis] > 1 and size_of_step(p.strides[<int> FA_KEY][axis]) < key and
                size_of_step(p.strides[<int> FA_VALUE][axis]) < value):
            step = size_of_step(p.strides[<int> FA_KEY][axis]) + size_of_step(p.strides[<int> FA_VALUE][axis])
            if best < 0 or step < least:
                best, least = axis, step
    p.graph.heads = 1
    if best >= 0:
        p.graph.heads = p.shape[best]
        for i in range(OPERANDS):
            p.graph.view[i].head = p.strides[i][best]
            for axis in range(best, p.axes - 1):
                p.strides[i][axis] = p.strides[i][axis + 1]
        for axis in range(best, p.axes - 1):
            p.shape[axis] = p.shape[axis + 1]
        p.axes -= 1
    p.outer = 1
    for axis in range(p.axes):
        p.outer *= p.shape[axis]


cdef Call read_inputs(object query, object key, object value, object graph, object w_score, object negative_slope,
                      object edge_bias, object edge_key, object edge_value, object scale, object softcap,
                      object num_threads):
    """All but what is written; `take_heads` follows when that is placed, too."""
    cdef Call p = Call.__new__(Call)
    cdef cnp.ndarray q = floating(query, "query"), k = floating(key, "key"), v = floating(value, "value")
    cdef cnp.ndarray w = None, bias = None, more_key = None, more_value = None, indptr, indices
    cdef Py_ssize_t head_dim, value_dim
    cdef int i
    cdef double factor = 1
    p.kept = []
    p.num_threads = checked_threads(num_threads)
    for one, name, wanted in ((q, "query", "(..., L, D)"), (k, "key", "(..., S, D)"), (v, "value", "(..., S, E)")):
        if cnp.PyArray_NDIM(one) < 2:
            raise too_few_axes(name, shape_of(one), wanted)
    head_dim, value_dim = shape_of(q)[-1], shape_of(v)[-1]
    p.rows, p.keys = shape_of(q)[-2], shape_of(k)[-2]
    if shape_of(k)[-1] != head_dim:
        raise ValueError(f"query and key must have as many channels as each other (the last axis), not {head_dim} and "
                         f"{shape_of(k)[-1]}: their shapes are {shape_of(q)} and {shape_of(k)}")
    if shape_of(v)[-2] != p.keys:
        raise ValueError(f"key and value must have as many rows as each other (axis -2), not {p.keys} and "
                         f"{shape_of(v)[-2]}: their shapes are {shape_of(k)} and {shape_of(v)}")
    p.batch = batch = batch_of([q, k, v])
    if len(batch) > MOST_AXES - 2:
        raise ValueError(f"query, key and value may have {MOST_AXES - 2} batch axes, not {len(batch)}")

    if softcap is not None:
        p.graph.softcap = real(softcap, "softcap", "a positive finite number or None", True)
    if scale is not None:
        factor = real(scale, "scale", "a finite real number or None")
    p.graph.slope = real(negative_slope, "negative_slope", "a finite real number")
    p.graph.head_dim, p.graph.value_dim = head_dim, value_dim
    p.graph.score = FA_DOT if w_score is None else FA_ADDITIVE
    p.graph.scale = factor
    if w_score is None and scale is None:
        p.graph.scale = 1 / sqrt(<double> max(head_dim, 1))

    arrays, names = [q, k, v], ["query", "key", "value"]
    if w_score is not None:
        w = floating(w_score, "w_score")
        if cnp.PyArray_NDIM(w) == 0 or shape_of(w)[-1] != head_dim:
            raise ValueError(f"w_score has shape {shape_of(w)}; its last axis must have as many entries as query and "
                             f"key have channels, {head_dim}")
        if hasattr(w_score, "dtype"):  # a list takes the dtype of the others, as Python's numbers do
            arrays.append(w)
            names.append("w_score")
    if edge_key is not None:
        more_key = floating(edge_key, "edge_key")
        arrays.append(more_key)
        names.append("edge_key")
    if edge_value is not None:
        more_value = floating(edge_value, "edge_value")
        arrays.append(more_value)
        names.append("edge_value")
    p.result_dtype = promoted(arrays, tuple(names), &p.dtype)
    if edge_bias is not None:
        bias = float_array(edge_bias, "edge_bias")

    indptr, indices = read_structure(p, graph)
    edges = p.graph.edges
    p.inputs, p.names = [*arrays, indptr, indices], [*names, "graph's indptr", "graph's indices"]
    place(p, FA_QUERY, np.broadcast_to(q, (*batch, p.rows, head_dim)), storage_of(q, "query"), 2)
    place(p, FA_KEY, np.broadcast_to(k, (*batch, p.keys, head_dim)), storage_of(k, "key"), 2)
    place(p, FA_VALUE, np.broadcast_to(v, (*batch, p.keys, value_dim)), storage_of(v, "value"), 2)
    if w is not None:
        broadcast(w, "w_score", (*batch, head_dim), "(..., D) over the batch axes")
        with np.errstate(all="ignore"):
            w = converted(converted(w, np.float64) * max(-DBL_MAX, min(DBL_MAX, factor)), accumulation(p.dtype))
        place(p, FA_UNIT_WEIGHTS, np.broadcast_to(w, (*batch, head_dim))[..., None, :],
              FA_F64 if p.dtype == FA_F64 else FA_F32, 2)
    if bias is not None:
        p.inputs.append(bias)
        p.names.append("edge_bias")
        bias = broadcast(bias, "edge_bias", (*batch, edges), "(..., nnz), a number for each edge")
        place(p, FA_BIAS, bias, storage_of(bias, "edge_bias"), 1)
    if more_key is not None:
        more_key = broadcast(more_key, "edge_key", (*batch, edges, head_dim), "(..., nnz, D), a row for each edge")
        place(p, FA_EDGE_KEY, more_key, storage_of(more_key, "edge_key"), 2)
    if more_value is not None:
        more_value = broadcast(more_value, "edge_value", (*batch, edges, value_dim), "(..., nnz, E), a row for each "
                               "edge")
        place(p, FA_EDGE_VALUE, more_value, storage_of(more_value, "edge_value"), 2)
    p.axes = len(batch)
    for i in range(p.axes):
        p.shape[i] = batch[i]
    return p


cdef Call read_call(object query, object key, object value, object graph, object w_score, object negative_slope,
                    object edge_bias, object edge_key, object edge_value, object scale, object softcap,
                    object return_weights, object return_lse, object out, object num_threads):
    cdef bint want_weights = flag(return_weights, "return_weights"), want_lse = flag(return_lse, "return_lse")
    cdef Call p = read_inputs(query, key, value, graph, w_score, negative_slope, edge_bias, edge_key, edge_value, scale,
                              softcap, num_threads)
    cdef cnp.ndarray o = checked_out(out, (*p.batch, p.rows, p.graph.value_dim), p.result_dtype, p.inputs,
                                     tuple(p.names))
    cdef cnp.ndarray weights, lse
    cdef fa_dtype real_dtype = FA_F64 if p.dtype == FA_F64 else FA_F32
    answer = [o]
    place(p, FA_OUT, o, p.dtype, 2)
    if want_weights:
        weights = empty((*p.batch, p.graph.edges), accumulation(p.dtype), "the weights")
        place(p, FA_WEIGHTS, weights, real_dtype, 1)
        answer.append(weights)
    if want_lse:
        lse = empty((*p.batch, p.rows), accumulation(p.dtype), "the log-sum-exp")
        place(p, FA_LSE, lse, real_dtype, 1)
        answer.append(lse)
    p.answer = tuple(answer) if len(answer) > 1 else o
    take_heads(p, False)
    return p


# The work

cdef Py_ssize_t row_of_share(const fa_graph *graph, Py_ssize_t rows, int64_t share) noexcept nogil:
    """The first row that has at least so much before it, in rows and edges."""
    cdef Py_ssize_t low = 0, high = rows, middle
    while low < high:
        middle = (low + high) // 2
        if middle + index_at(graph.indptr + middle * graph.indptr_step, graph.indptr_size) < share:
            low = middle + 1
        else:
            high = middle
    return low


cdef fa_graph graph_of(Call p, Py_ssize_t item) noexcept nogil:
    """What one of the batch has to do with."""
    cdef fa_graph graph = p.graph
    cdef Py_ssize_t index
    cdef int axis, k
    for axis in range(p.axes - 1, -1, -1):
        index = item % p.shape[axis]
        item //= p.shape[axis]
        for k in range(OPERANDS):
            if graph.view[k].data != NULL:
                graph.view[k].data += index * p.strides[k][axis]
    return graph


cdef void run_task(Call p, const fa_kernels *kernels, Py_ssize_t task, Py_ssize_t tasks, int64_t share,
                   char *scratch) noexcept nogil:
    """A share of the rows and edges of one of the batch."""
    cdef fa_graph graph = graph_of(p, task // tasks)
    cdef Py_ssize_t part = task % tasks
    cdef Py_ssize_t begin = row_of_share(&graph, p.rows, part * share)
    cdef Py_ssize_t end = p.rows if part + 1 == tasks else row_of_share(&graph, p.rows, (part + 1) * share)
    kernels.edges(&graph, begin, end, scratch)


cdef void run_parallel(Call p, const fa_kernels *kernels, Py_ssize_t tasks, int64_t share, int threads, char *scratch,
                       size_t scratch_size, Watch *watch) noexcept nogil:
    cdef Py_ssize_t task
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for task in prange(p.outer * tasks, schedule="dynamic", chunksize=1):
            if not interrupted(watch, threadid() == 0):
                run_task(p, kernels, task, tasks, share, scratch + threadid() * scratch_size)


def graph_attention(query, key, value, graph, w_score, negative_slope, edge_bias, edge_key, edge_value, scale, softcap,
                    return_weights, return_lse, out, num_threads):
    cdef Call p = read_call(query, key, value, graph, w_score, negative_slope, edge_bias, edge_key, edge_value, scale,
                            softcap, return_weights, return_lse, out, num_threads)
    cdef const fa_kernels *kernels = kernels_for(p.dtype)
    cdef double each = <double> p.graph.heads * (p.graph.head_dim + p.graph.value_dim + 8)
    cdef double all_of_it = each * p.outer * (p.graph.edges + p.rows)
    cdef int64_t share = max(1, <int64_t> (CHUNK / max(each, 1)))
    cdef Py_ssize_t tasks = max(1, (p.graph.edges + p.rows + share - 1) // share)
    cdef size_t size = (kernels.edges_workspace(&p.graph) + 63) // 64 * 64
    cdef int threads = 1
    cdef Watch watch = Watch(0, 0)
    cdef char *scratch
    if p.rows == 0 or p.outer == 0 or p.graph.heads == 0:
        return p.answer
    if all_of_it >= SMALL:
        threads = <int> min(<Py_ssize_t> allowed_threads(p.num_threads), p.outer * tasks)
    scratch = <char *> take_workspace(size * threads, <double> size * threads)
    try:
        if all_of_it < SMALL:
            for task in range(p.outer * tasks):
                run_task(p, kernels, task, tasks, share, scratch)
        else:
            with nogil:
                run_parallel(p, kernels, tasks, share, threads, scratch, size, &watch)
    finally:
        give_workspace(scratch)
    if watch.stop:
        raise_pending()
    return p.answer
