# cython: wraparound=True
"""The driver of graph_attention_vjp: the graph transposed, rows and then columns over threads, sums over a batch.

One of the batch after the other (with the heads that lie together), in ascending order, so that sums over batch axes
are in that order, and what is kept for each edge is kept for one of them. Tasks are cut by rows and edges alone: sums
over all edges are made task by task and added up in order, and their bits depend on nothing else.
"""
import numpy as np

cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memchr, memcpy, memset

from fastattn._checks cimport accumulation, empty, storage_of
from fastattn._graph cimport Call, graph_of, index_at, place, read_inputs, row_of_share, take_heads
from fastattn._runtime cimport (FA_F32, FA_F64, FA_GRAPH_D_BIAS, FA_GRAPH_D_EDGE_KEY, FA_GRAPH_D_EDGE_VALUE,
                                FA_GRAPH_D_KEY, FA_GRAPH_D_QUERY, FA_GRAPH_D_UNIT_WEIGHTS, FA_GRAPH_D_VALUE,
                                FA_GRAPH_GRADIENTS, FA_GRAPH_GRAD_LSE, FA_GRAPH_GRAD_OUT, Team, Watch, allowed_threads,
                                fa_dtype, fa_graph, fa_graph_gradients, fa_kernels, gathered, give_workspace,
                                interrupted, join_team, kernels_for, raise_pending, take_workspace)
from fastattn._vjp cimport Wanted, read_gradient, read_wanted, store

cnp.import_array()

cdef enum:
    SMALL = 1 << 15         # numbers of keys and values below which threads cost more than they bring
    SHARE = 2048            # rows and edges of a task
    MOST_PARTS = 8          # of the columns, when the graph is transposed: each part reads all indices

cdef tuple TARGETS = (("query", <int> FA_GRAPH_D_QUERY), ("key", <int> FA_GRAPH_D_KEY),
                      ("value", <int> FA_GRAPH_D_VALUE), ("w_score", <int> FA_GRAPH_D_UNIT_WEIGHTS),
                      ("edge_bias", <int> FA_GRAPH_D_BIAS),
                      ("edge_key", <int> FA_GRAPH_D_EDGE_KEY), ("edge_value", <int> FA_GRAPH_D_EDGE_VALUE))


cdef class Back:
    """The gradients of a call."""
    cdef Call call
    cdef dict direct            # name -> the array that kernels write
    cdef dict totals            # name -> sums over all edges, float64 (outer, heads, channels)
    cdef fa_graph_gradients gradients
    cdef char *starts           # of the transposed graph
    cdef char *pairs
    cdef int pair_size          # bytes of an index
    cdef Py_ssize_t row_tasks, column_tasks


# Where gradients go

cdef Back read_targets(Call p, Wanted wanted):
    """Places all gradients that are wanted: where they are to go, if they are of the accumulation dtype, else in an
    array of their shape. Those that all edges share become totals."""
    cdef Back b = Back.__new__(Back)
    cdef object real = accumulation(p.dtype), into, full
    cdef fa_dtype real_dtype = FA_F64 if p.dtype == FA_F64 else FA_F32
    cdef Py_ssize_t edges = p.graph.edges, head_dim = p.graph.head_dim, value_dim = p.graph.value_dim
    cdef dict shapes = {"query": (p.rows, head_dim), "key": (p.keys, head_dim), "value": (p.keys, value_dim),
                        "w_score": (1, head_dim), "edge_bias": (edges,), "edge_key": (edges, head_dim),
                        "edge_value": (edges, value_dim)}
    cdef int trailing
    b.call, b.direct, b.totals = p, {}, {}
    for name, operand in TARGETS:
        into = wanted.target(name)
        if into is None:
            continue
        trailing = len(shapes[name])
        shared = edges if into.ndim < trailing else into.shape[into.ndim - trailing]
        if name == "w_score" or (name.startswith("edge_") and (into.ndim < trailing or shared == 1)):
            b.totals[name] = None
            continue
        if into.dtype != real:
            into = empty(into.shape, real, f"the gradient of {name}")
        b.direct[name] = into
        full = np.broadcast_to(into, (*p.batch, *shapes[name]))
        place(p, operand, full, real_dtype, trailing)
    return b


cdef object summed_to(object x, tuple shape):
    """Sums over the axes along which an array of this shape would be broadcast to x."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple([i for i in range(x.ndim) if shape[i] == 1 and x.shape[i] != 1]), keepdims=True)


cdef object added_up(object parts):
    """The sum along the first axis, in ascending order and without an error that would grow with its length."""
    total, lost = np.zeros(parts.shape[1:]), np.zeros(parts.shape[1:])
    for part in parts:
        now = total + part
        there = now - total
        error = (total - (now - there)) + (part - there)
        lost += np.where(np.isfinite(now), error, 0.0)
        total = now
    return total + lost


# The graph, transposed

cdef inline void put_index(char *at, int size, int64_t x) noexcept nogil:
    cdef int32_t short_one = <int32_t> x
    if size == 4:
        memcpy(at, &short_one, 4)
    else:
        memcpy(at, &x, 8)


cdef void count_columns(const fa_graph *graph, int64_t *starts, int64_t begin, int64_t end) noexcept nogil:
    """Counts the edges of each column of a part, two places further on."""
    cdef Py_ssize_t t
    cdef int64_t j
    for t in range(graph.edges):
        j = index_at(graph.indices + t * graph.index_step, graph.index_size)
        if begin <= j < end:
            starts[j + 2] += 1


cdef void fill_columns(const fa_graph *graph, Py_ssize_t rows, int64_t *starts, char *pairs, int size, int64_t begin,
                       int64_t end) noexcept nogil:
    """Row and number of each edge, in ascending order within a column. starts[j + 1] is where column j goes on; in the
    end it is where that ends."""
    cdef Py_ssize_t i, t = 0, last
    cdef int64_t j
    cdef char *at
    for i in range(rows):
        last = index_at(graph.indptr + (i + 1) * graph.indptr_step, graph.indptr_size)
        while t < last:
            j = index_at(graph.indices + t * graph.index_step, graph.index_size)
            if begin <= j < end:
                at = pairs + 2 * size * starts[j + 1]
                put_index(at, size, i)
                put_index(at + size, size, t)
                starts[j + 1] += 1
            t += 1


cdef void transpose(Back b, int threads) noexcept nogil:
    """A counting sort; each part of the columns belongs to one thread."""
    cdef const fa_graph *graph = &b.call.graph
    cdef Py_ssize_t keys = b.call.keys, rows = b.call.rows, part, j
    cdef int parts = min(threads, <int> MOST_PARTS)
    cdef int64_t *starts = <int64_t *> b.starts
    cdef char *pairs = b.pairs
    cdef int size = b.pair_size
    cdef Team team = gathered(parts)
    memset(starts, 0, (keys + 2) * sizeof(int64_t))
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for part in prange(parts, schedule="static", chunksize=1):
            count_columns(graph, starts, part * keys // parts, (part + 1) * keys // parts)
    for j in range(keys):
        starts[j + 2] += starts[j + 1]
    team = gathered(parts)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for part in prange(parts, schedule="static", chunksize=1):
            fill_columns(graph, rows, starts, pairs, size, part * keys // parts, (part + 1) * keys // parts)


# The work

cdef void begin_item(Back b, Py_ssize_t item) noexcept nogil:
    """Which gradients are added to those of earlier ones of the batch."""
    cdef Py_ssize_t index
    cdef int axis, k
    for k in range(<int> FA_GRAPH_GRADIENTS):
        b.gradients.adds[k] = 0
    for axis in range(b.call.axes - 1, -1, -1):
        index = item % b.call.shape[axis]
        item //= b.call.shape[axis]
        for k in range(<int> FA_GRAPH_GRADIENTS):
            if index and b.call.strides[<int> FA_GRAPH_D_QUERY + k][axis] == 0:
                b.gradients.adds[k] = 1


cdef void run_rows(Back b, const fa_graph *graph, const fa_kernels *kernels, Py_ssize_t task,
                   char *scratch) noexcept nogil:
    cdef Py_ssize_t rows = b.call.rows, begin = row_of_share(graph, rows, task * SHARE)
    cdef Py_ssize_t end = rows if task + 1 == b.row_tasks else row_of_share(graph, rows, (task + 1) * SHARE)
    cdef fa_graph_gradients gradients = b.gradients
    cdef int k
    gradients.hidden += task
    cdef int64_t channels
    for k in range(<int> FA_GRAPH_GRADIENTS):
        channels = graph.head_dim
        if k == <int> FA_GRAPH_D_BIAS - <int> FA_GRAPH_D_QUERY:
            channels = 1
        elif k == <int> FA_GRAPH_D_EDGE_VALUE - <int> FA_GRAPH_D_QUERY:
            channels = graph.value_dim
        if gradients.totals[k] != NULL:
            gradients.totals[k] += task * graph.heads * channels
    kernels.edges_back_rows(graph, &gradients, begin, end, scratch)


cdef void run_columns(Back b, const fa_graph *graph, const fa_kernels *kernels, Py_ssize_t task,
                      char *scratch) noexcept nogil:
    cdef Py_ssize_t keys = b.call.keys, begin = row_of_share(graph, keys, task * SHARE)
    cdef Py_ssize_t end = keys if task + 1 == b.column_tasks else row_of_share(graph, keys, (task + 1) * SHARE)
    kernels.edges_back_columns(graph, &b.gradients, begin, end, scratch)


cdef void run_tasks(Back b, const fa_graph *graph, const fa_kernels *kernels, bint columns, int threads, char *scratch,
                    size_t scratch_size, Watch *watch) noexcept nogil:
    cdef Py_ssize_t task, tasks = b.column_tasks if columns else b.row_tasks
    cdef Team team = gathered(<int> min(<Py_ssize_t> threads, tasks))
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for task in prange(tasks, schedule="dynamic", chunksize=1):
            if not interrupted(watch, threadid() == 0):
                if columns:
                    run_columns(b, graph, kernels, task, scratch + threadid() * scratch_size)
                else:
                    run_rows(b, graph, kernels, task, scratch + threadid() * scratch_size)


cdef size_t rounded(size_t size) noexcept nogil:
    return (size + 63) // 64 * 64


cdef int run(Back b) except -1:
    cdef Call p = b.call
    cdef const fa_kernels *kernels = kernels_for(p.dtype)
    cdef fa_graph graph, across
    cdef Py_ssize_t heads = p.graph.heads, edges = p.graph.edges, item
    cdef bint want_columns = "key" in b.direct or "value" in b.direct
    cdef double each = <double> heads * (p.graph.head_dim + p.graph.value_dim + 8)
    cdef double work = 3 * each * p.outer * (edges + p.rows + p.keys)
    cdef size_t numbers = rounded(kernels.edges_back_numbers(&p.graph)), size, flags, starts = 0, pairs = 0
    cdef double *parts_at
    cdef int threads = 1
    cdef Watch watch = Watch(0, 0)
    cdef char *memory
    cdef char *scratch
    b.row_tasks = max(1, (edges + p.rows + SHARE - 1) // SHARE)
    b.column_tasks = max(1, (edges + p.keys + SHARE - 1) // SHARE)
    size = rounded(kernels.edges_back_workspace(&p.graph))
    if work >= SMALL:
        threads = <int> min(<Py_ssize_t> allowed_threads(p.num_threads), max(b.row_tasks, b.column_tasks))
    b.pair_size = 4 if max(edges, p.rows) < 1 << 31 else 8
    if want_columns:
        starts, pairs = rounded((p.keys + 2) * sizeof(int64_t)), rounded(2 * b.pair_size * edges)
    dims = {name: {"edge_bias": 1, "edge_value": p.graph.value_dim}.get(name, p.graph.head_dim) for name in b.totals}
    parts = {name: empty((b.row_tasks, heads, n), np.float64, "partial sums") for name, n in dims.items()}
    for name, n in dims.items():
        b.totals[name] = empty((p.outer, heads, n), np.float64, f"the gradient of {name}")
    for name, operand in TARGETS:
        if name in parts:
            parts_at = <double *> cnp.PyArray_DATA(parts[name])
            b.gradients.totals[<int> operand - <int> FA_GRAPH_D_QUERY] = parts_at
    flags = rounded(b.row_tasks)
    memory = <char *> take_workspace(numbers + flags + starts + pairs + size * threads,
                                     <double> numbers + flags + starts + pairs + <double> size * threads)
    try:
        b.gradients.numbers, b.gradients.hidden = memory, memory + numbers
        b.starts = b.gradients.hidden + flags
        b.pairs = b.starts + starts
        scratch = b.pairs + pairs
        with nogil:
            if want_columns:
                transpose(b, threads)
        for item in range(p.outer):
            with nogil:
                graph = graph_of(p, item)
                begin_item(b, item)
                memset(b.gradients.hidden, 0, b.row_tasks)
                run_tasks(b, &graph, kernels, False, threads, scratch, size, &watch)
                if want_columns:
                    if memchr(b.gradients.hidden, 1, b.row_tasks) != NULL:
                        b.gradients.hidden[0] = 1
                    across = graph
                    across.indptr, across.indptr_step, across.indptr_size = b.starts, 8, 8
                    across.indices, across.index_step, across.index_size = b.pairs, 2 * b.pair_size, b.pair_size
                    run_tasks(b, &across, kernels, True, threads, scratch, size, &watch)
            if watch.stop:
                break
            for name in parts:
                with np.errstate(all="ignore"):
                    b.totals[name][item] = added_up(parts[name])
    finally:
        give_workspace(memory)
    if watch.stop:
        raise_pending()
    return 0


def graph_attention_vjp(grad_out, query, key, value, graph, wrt, w_score, negative_slope, edge_bias, edge_key,
                        edge_value, scale, softcap, output, lse, grad_lse, out, num_threads):
    cdef Call p = read_inputs(query, key, value, graph, w_score, negative_slope, edge_bias, edge_key, edge_value, scale,
                              softcap, num_threads)
    cdef tuple out_shape = (*p.batch, p.rows, p.graph.value_dim), lse_shape = (*p.batch, p.rows)
    cdef cnp.ndarray of_out = read_gradient(grad_out, out_shape), of_lse = None
    cdef Wanted wanted
    cdef Back b
    given = {"query": query, "key": key, "value": value, "w_score": w_score, "edge_bias": edge_bias,
             "edge_key": edge_key, "edge_value": edge_value}
    others = {"grad_out": of_out, **dict(zip(p.names, p.inputs, strict=True))}
    if (output is None) != (lse is None):
        raise ValueError("output and lse must be given together, or neither")
    if output is not None:
        others["output"] = read_gradient(output, out_shape, "output")
        others["lse"] = read_gradient(lse, lse_shape, "lse")
    if grad_lse is not None:
        others["grad_lse"] = of_lse = read_gradient(grad_lse, lse_shape, "grad_lse")
    wanted = read_wanted(wrt, given, out, accumulation(p.dtype), others)
    place(p, FA_GRAPH_GRAD_OUT, of_out, storage_of(of_out, "grad_out"), 2)
    if of_lse is not None:
        place(p, FA_GRAPH_GRAD_LSE, of_lse, storage_of(of_lse, "grad_lse"), 1)
    b = read_targets(p, wanted)
    take_heads(p, True)
    if p.outer == 0 or p.graph.heads == 0:
        for name in wanted.names:
            store(wanted.target(name), 0)
        return wanted.result()
    run(b)
    for name in wanted.names:
        if name in b.direct:
            store(wanted.target(name), b.direct[name])
        else:
            with np.errstate(all="ignore"):
                total = b.totals[name].reshape(*p.batch, b.totals[name].shape[-1])
                if name == "w_score":
                    total *= p.graph.scale
                elif name != "edge_bias":
                    total = total[..., None, :]
                target = wanted.target(name)
                store(target, summed_to(total, target.shape))
    return wanted.result()
