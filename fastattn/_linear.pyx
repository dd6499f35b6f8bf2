# cython: wraparound=True
"""The driver of linear_attention: a recurrence, checked, and its heads over threads.

A task is a head of keys, with all heads of queries that read it, and some columns of its values: those do not know of
each other, so threads can share a single head. A recurrence has no other parallelism, and no bit depends on this one.
"""
import numpy as np

cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport sqrt
from libc.stdint cimport int64_t
from libc.string cimport memset

from fastattn._call cimport Problem, Shape, batch_shape, lay_out, new_problem, read_integers, read_shapes
from fastattn._checks cimport (accumulation, as_array, checked_out, checked_threads, converted, flag, floating,
                               promoted, real, refuse_overlap, shape_of, storage_of)
from fastattn._runtime cimport (FA_ELU_PLUS_1, FA_KEY_LENGTHS, FA_LINEAR_BETA, FA_LINEAR_KEY, FA_LINEAR_LOG_DECAY,
                                FA_LINEAR_NEW_STATE, FA_LINEAR_OPERANDS, FA_LINEAR_OUT, FA_LINEAR_QUERY,
                                FA_LINEAR_STATE, FA_LINEAR_VALUE, FA_NO_MAP, FA_OFFSETS, FA_QUERY_LENGTHS, FA_RELU_MAP,
                                FA_ROW_AXES, Team, Watch, allowed_threads, fa_kernels, fa_layout, fa_linear,
                                fa_linear_head, fa_view, gathered, give_workspace, interrupted, join_team, kernels_for,
                                raise_pending, take_workspace)

cnp.import_array()

cdef enum:
    SMALL = 1 << 17        # numbers of states read or written below which threads cost more than they bring
    FEW = 8                # keys, and no more, for which a state is updated where it lies
    AT_ONCE = 1 << 22      # numbers of a state read or written between two looks for Ctrl-C


# Arguments

cdef object read_map(Recurrence r, object feature_map):
    """The pair of callables, or None where the kernels know the map."""
    allowed = "'elu+1', 'relu', None, a callable, or a pair of callables (for query, for key)"
    if feature_map is None:
        r.shared.map = FA_NO_MAP
        return None
    if isinstance(feature_map, str):
        if feature_map not in ("elu+1", "relu"):
            raise ValueError(f"feature_map must be {allowed}, not {feature_map!r}")
        r.shared.map = FA_ELU_PLUS_1 if feature_map == "elu+1" else FA_RELU_MAP
        return None
    r.shared.map = FA_NO_MAP
    if callable(feature_map):
        return feature_map, feature_map
    if isinstance(feature_map, (tuple, list)):
        if len(feature_map) != 2:
            raise ValueError(f"feature_map must be {allowed}, not {len(feature_map)} of them")
        if callable(feature_map[0]) and callable(feature_map[1]):
            return tuple(feature_map)
    raise TypeError(f"feature_map must be {allowed}, not {feature_map!r}")


cdef cnp.ndarray mapped(object feature_map, cnp.ndarray a, str name, dtype):
    """What the caller's function makes of an array, which it cannot write to."""
    given = converted(a, dtype).view()
    given.flags.writeable = False
    cdef cnp.ndarray features = as_array(feature_map(given), "the result of feature_map")
    if features.dtype.kind in "biu":
        raise TypeError(f"feature_map must return floating numbers, not {features.dtype} (for {name})")
    storage_of(features, "the result of feature_map")
    shape = shape_of(features)
    if len(shape) != given.ndim or shape[:-1] != given.shape[:-1]:
        raise ValueError(f"feature_map must return an array of shape {(*given.shape[:-1], 'F')} for {name} of shape "
                         f"{given.shape}, with any number F of features; it returned {shape}")
    return features


cdef cnp.ndarray of_keys(object x, str name, tuple shape, int trailing, str what):
    """log_decay or beta: floating, and broadcasts to the batch axes of the keys and the trailing ones, which it has."""
    cdef cnp.ndarray a = floating(x, name)
    have = shape_of(a)
    if len(have) <= len(shape) and all([n in (1, m) for n, m in zip(reversed(have), reversed(shape), strict=False)]):
        return a if len(have) >= trailing else (<object> a)[(None,) * (trailing - len(have))]
    raise ValueError(f"{name} has shape {have}, which does not broadcast to {shape}, {what} over the batch axes of key")


cdef cnp.ndarray read_state(object state, tuple shape, object dtype, bint is_normalised):
    cdef cnp.ndarray a = as_array(state, "state")
    whole = "(..., F, E + 1), the last column the normaliser" if is_normalised else "(..., F, E)"
    if shape_of(a) != shape:
        raise ValueError(f"state has shape {shape_of(a)}; it must be {shape}, {whole} over the batch axes of the call "
                         f"(with enable_gqa key's heads), as return_state=True gives it")
    if a.dtype != dtype or not a.dtype.isnative:
        raise TypeError(f"state has dtype {a.dtype}; it must be {dtype}, the dtype of sums, as return_state=True gives "
                        f"it")
    return a


cdef int refuse_uneven_lengths(Recurrence r) except -1:
    """Query heads that share keys must agree how many there are."""
    cdef Problem p = r.call
    cdef fa_layout *lengths = &p.call.layouts[<int> FA_KEY_LENGTHS]
    if lengths.data == NULL or p.call.group == 1 or lengths.batch[p.call.axes - 1] == 0:
        return 0
    a = p.kept[len(p.kept) - 1]
    groups = a.reshape(*a.shape[:-1], -1, p.call.group)
    if (groups != groups[..., :1]).any():
        raise ValueError("key_lengths must not differ within a group of heads that share a key head (enable_gqa)")
    return 0


cdef Recurrence read_call(object query, object key, object value, object feature_map, object is_causal,
                          object query_offset, object key_lengths, object query_lengths, object log_decay, object beta,
                          object normalize, object scale, object eps, object state, object return_state,
                          object state_out, object enable_gqa, object out, object num_threads, bint named_maps=False):
    """named_maps: a callable is refused."""
    cdef Recurrence r = Recurrence.__new__(Recurrence)
    cdef Problem p = new_problem()
    cdef fa_linear *shared = &r.shared
    cdef Shape[3] shapes
    cdef Py_ssize_t rows, cols, width
    cdef bint with_state = flag(return_state, "return_state"), is_normalised
    cdef int i
    r.call = p
    cdef list arrays = [floating(query, "query"), floating(key, "key"), floating(value, "value")]
    p.dtype = promoted(arrays, ("query", "key", "value"), &p.call.problem.dtype)
    for i in range(3):
        shapes[i].axes = cnp.PyArray_NDIM(arrays[i])
        shapes[i].size = cnp.PyArray_DIMS(arrays[i])
    read_shapes(p.call, shapes[0], shapes[1], shapes[2], flag(enable_gqa, "enable_gqa"))
    rows, cols = p.call.sizes.queries, p.call.sizes.keys
    dtype = accumulation(p.call.problem.dtype)
    shared.features, shared.value_dim, shared.heads = p.call.problem.head_dim, p.call.problem.value_dim, p.call.group
    shared.is_causal = flag(is_causal, "is_causal")
    maps = read_map(r, feature_map)
    if maps is not None and named_maps:
        raise ValueError("feature_map must be 'elu+1', 'relu' or None here, not a callable, whose derivative nobody "
                         "knows: apply it to query and key before the call, with feature_map=None (and normalize=True "
                         "where it normalised), and apply its derivative to their gradients")
    for name, x in (("log_decay", log_decay), ("beta", beta)):
        if x is not None and not shared.is_causal:
            raise ValueError(f"{name} needs is_causal=True: it says what a key does to those before it")
    is_normalised = feature_map is not None and beta is None if normalize is None else flag(normalize, "normalize")
    if is_normalised and beta is not None:
        raise ValueError("normalize=True does not go with beta: the delta rule has no normaliser")
    shared.is_normalised = is_normalised
    shared.scale = 1.0 / sqrt(<double> max(p.call.problem.head_dim, 1))
    if scale is not None:
        shared.scale = real(scale, "scale", "a finite real number or None")
        if is_normalised:
            raise ValueError(f"scale={scale} would cancel in a normalised result: leave it out, or pass "
                             f"normalize=False")
    shared.eps = real(eps, "eps", "a finite real number of at least 0")
    if shared.eps < 0:
        raise ValueError(f"eps must be a finite real number of at least 0, not {eps}")
    p.num_threads = checked_threads(num_threads)

    batch = batch_shape(p.call)
    p.call.offset_is_default = query_offset is None
    if query_lengths is not None:
        read_integers(p, FA_QUERY_LENGTHS, query_lengths, "query_lengths", batch, 0, rows, &p.call.sizes.query_length)
    if query_offset is not None:
        read_integers(p, FA_OFFSETS, query_offset, "query_offset", batch, None, None, &p.call.sizes.offset)
    if key_lengths is not None:
        read_integers(p, FA_KEY_LENGTHS, key_lengths, "key_lengths", batch, 0, cols, &p.call.sizes.key_length)
        refuse_uneven_lengths(r)

    inputs, names = [query, key, value], ["query", "key", "value"]
    if maps is not None:
        arrays[0] = mapped(maps[0], arrays[0], "query", dtype)
        arrays[1] = mapped(maps[1], arrays[1], "key", dtype)
        shared.features = arrays[0].shape[-1]
        if arrays[1].shape[-1] != shared.features:
            raise ValueError(f"feature_map made {shared.features} features of query and {arrays[1].shape[-1]} of key; "
                             f"there must be as many of both")
    key_batch = batch[:-1] + (batch[-1] // p.call.group,) if batch else ()
    r.heads = 1
    for n in key_batch:
        r.heads *= n
    for i in range(<int> FA_LINEAR_OPERANDS):
        r.layouts[i].data = NULL
    for i in range(3):
        lay_out(&r.layouts[(<int> FA_LINEAR_QUERY, <int> FA_LINEAR_KEY, <int> FA_LINEAR_VALUE)[i]], p.call.axes,
                arrays[i],
                2)
        if arrays[i] is not inputs[i]:
            inputs.append(arrays[i])
            names.append(names[i])
    if log_decay is not None:
        a = of_keys(log_decay, "log_decay", (*key_batch, cols, shared.features), 2, "(..., S, F)")
        lay_out(&r.layouts[<int> FA_LINEAR_LOG_DECAY], p.call.axes, a, 2)
        if cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1) == 1:
            r.layouts[<int> FA_LINEAR_LOG_DECAY].col = 0
        inputs.append(a)
        names.append("log_decay")
    if beta is not None:
        a = of_keys(beta, "beta", (*key_batch, cols), 1, "(..., S)")
        lay_out(&r.layouts[<int> FA_LINEAR_BETA], p.call.axes, a, 1)
        if cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1) == 1:
            r.layouts[<int> FA_LINEAR_BETA].row = 0
        inputs.append(a)
        names.append("beta")
    inputs += [key_lengths, query_lengths, query_offset]
    names += ["key_lengths", "query_lengths", "query_offset"]

    width = shared.value_dim + shared.is_normalised
    state_shape = (*key_batch, shared.features, width)
    if state is not None:
        state = read_state(state, state_shape, dtype, is_normalised)
        lay_out(&r.layouts[<int> FA_LINEAR_STATE], p.call.axes, state, 2)
    r.out = checked_out(out, (*batch, rows, shared.value_dim), p.dtype, [], ())
    refuse_overlap(out, (*inputs, state), (*names, "state"))
    lay_out(&r.layouts[<int> FA_LINEAR_OUT], p.call.axes, r.out, 2)
    if state_out is not None:
        r.state = checked_out(state_out, state_shape, dtype, [] if state is None else [state], ("state",), True,
                              "state_out", "the state's")
        refuse_overlap(r.state, (*inputs, out), (*names, "out"), "state_out")
    elif with_state:
        r.state = checked_out(None, state_shape, dtype, [], ())
    r.kept = [arrays, inputs, state]
    return r


# Tasks

cdef int64_t number_at(const fa_layout *layout, int axes, const Py_ssize_t *index, int64_t scalar) noexcept nogil:
    """A length or an offset; scalar: where it is the same for all."""
    cdef const char *at = layout.data
    cdef int i
    if at == NULL:
        return scalar
    for i in range(axes):
        at += index[i] * layout.batch[i]
    return (<const int64_t *> at)[0]


cdef void find_head(Recurrence r, Py_ssize_t head, Py_ssize_t *index) noexcept nogil:
    """Where a head of keys is on each batch axis."""
    cdef int i, last = r.call.call.axes - 1
    cdef Py_ssize_t size
    for i in range(last, -1, -1):
        size = r.call.call.shape[i] // r.shared.heads if i == last else r.call.call.shape[i]
        index[i] = head % size
        head //= size


cdef fa_view placed(const fa_layout *layout, int axes, const Py_ssize_t *index, Py_ssize_t group) noexcept nogil:
    """The matrix of that head, or of the first of a group of heads."""
    cdef fa_view view
    cdef int i
    view.data, view.row, view.col, view.dtype = layout.data, layout.row, layout.col, layout.dtype
    view.head = layout.batch[axes - 1] if axes > 0 else 0
    for i in range(axes if view.data != NULL else 0):
        view.data += index[i] * (group if i == axes - 1 else 1) * layout.batch[i]
    return view


cdef void locate(Recurrence r, Py_ssize_t head, fa_linear_head *to, int64_t *offset, int64_t *rows,
                 int64_t *keys) noexcept nogil:
    """Addresses of a head of keys, and where its queries are; offset and rows: one for each head of queries."""
    cdef Py_ssize_t index[FA_ROW_AXES]
    cdef int operand, axes = r.call.call.axes, last = axes - 1
    cdef Py_ssize_t member, group = r.shared.heads
    find_head(r, head, index)
    for operand in range(<int> FA_LINEAR_OPERANDS):
        if operand == FA_LINEAR_QUERY or operand == FA_LINEAR_OUT:
            to.view[operand] = placed(&r.layouts[operand], axes, index, group)
        else:
            to.view[operand] = placed(&r.layouts[operand], axes, index, 1)
            to.view[operand].head = 0
    to.offset, to.rows = offset, rows
    if last >= 0:
        index[last] *= group
    keys[0] = number_at(&r.call.call.layouts[<int> FA_KEY_LENGTHS], axes, index, r.call.call.sizes.key_length)
    for member in range(group):
        rows[member] = number_at(&r.call.call.layouts[<int> FA_QUERY_LENGTHS], axes, index,
                                 r.call.call.sizes.query_length)
        offset[member] = keys[0] - rows[member]
        if not r.call.call.offset_is_default:
            offset[member] = number_at(&r.call.call.layouts[<int> FA_OFFSETS], axes, index, r.call.call.sizes.offset)
        if last >= 0:
            index[last] += 1


cdef int run_rows(const fa_kernels *kernels, const fa_linear *shared, const fa_linear_head *head, Py_ssize_t member,
                  int64_t begin, int64_t end, int64_t at_once, void *workspace, Watch *watch,
                  bint caller) noexcept nogil:
    while begin < end:
        kernels.linear_rows(shared, head, member, begin, min(end, begin + at_once), workspace)
        begin += at_once
        if watch != NULL and interrupted(watch, caller):
            return 1
    return 0


cdef int walk(const fa_kernels *kernels, const fa_linear *shared, fa_linear_head *head, int64_t keys, void *workspace,
              Watch *watch, bint caller, int64_t chunk=0, size_t size=0) noexcept nogil:
    """All keys and rows of a recurrence that is open; 1 if the call is interrupted. chunk: leave the state of every
    so many keys, and of the last, where the new state goes, each `size` bytes after the one before.
    """
    cdef fa_view *kept = &head.view[<int> FA_LINEAR_NEW_STATE]
    cdef int64_t key = 0, end, at_once = run_length(shared, head.columns)
    cdef Py_ssize_t member
    for member in range(shared.heads if shared.is_causal else 0):
        if run_rows(kernels, shared, head, member, 0, min(head.rows[member], -head.offset[member]), at_once, workspace,
                    watch, caller):
            return 1
    while key < keys:
        end = min(keys, key + at_once)
        if chunk > 0:
            if key % chunk == 0:
                kernels.linear_close(shared, head, workspace)
                kept.data += size
            end = min(end, (key // chunk + 1) * chunk)
        kernels.linear_keys(shared, head, key, end, workspace)
        key = end
        if watch != NULL and interrupted(watch, caller):
            return 1
    if chunk > 0:
        kernels.linear_close(shared, head, workspace)
    for member in range(shared.heads):
        if run_rows(kernels, shared, head, member, max(0, keys - head.offset[member]) if shared.is_causal else 0,
                    head.rows[member], at_once, workspace, watch, caller):
            return 1
    return 0


cdef int64_t run_length(const fa_linear *shared, int64_t columns) noexcept nogil:
    """Keys, or rows, between two looks for Ctrl-C."""
    return max(1, AT_ONCE // max(1, shared.features * (columns + 1) * (1 + shared.heads) * BLOCK)) * BLOCK


cdef int run_task(Recurrence r, const fa_kernels *kernels, Py_ssize_t task, char *workspace, size_t kernel_size,
                  Watch *watch, bint caller) noexcept nogil:
    """watch: NULL in a call that is over at once."""
    cdef fa_linear *shared = &r.shared
    cdef fa_linear_head head
    cdef int64_t *offset = <int64_t *> (workspace + kernel_size)
    cdef int64_t *rows = offset + shared.heads
    cdef char *zeros = <char *> (rows + shared.heads)
    cdef fa_layout *out = &r.layouts[<int> FA_LINEAR_OUT]
    cdef int64_t keys, row
    cdef Py_ssize_t member
    locate(r, task // r.parts, &head, offset, rows, &keys)
    head.column = task % r.parts * r.columns
    head.columns = min(r.columns, shared.value_dim - head.column)
    head.few = keys <= FEW
    kernels.linear_open(shared, &head, workspace)
    if walk(kernels, shared, &head, keys, workspace, watch, caller):
        return 1
    for member in range(shared.heads):
        for row in range(rows[member], r.call.call.sizes.queries):
            kernels.scatter(head.view[<int> FA_LINEAR_OUT].data + member * head.view[<int> FA_LINEAR_OUT].head
                            + row * out.row + head.column * out.col, out.col, zeros, head.columns, out.dtype)
    kernels.linear_close(shared, &head, workspace)
    return 0


cdef void run_parallel(Recurrence r, const fa_kernels *kernels, int threads, char *workspace, size_t size,
                       size_t kernel_size, Watch *watch) noexcept nogil:
    cdef Py_ssize_t task
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for task in prange(r.heads * r.parts, schedule="dynamic", chunksize=1):
            if watch == NULL or not interrupted(watch, threadid() == 0):
                run_task(r, kernels, task, workspace + threadid() * size, kernel_size, watch, threadid() == 0)


cdef int share_out(Recurrence r, const fa_kernels *kernels, int threads) except -1:
    """Cuts heads into columns where there are too few heads for the threads, or they would not come out even."""
    cdef Py_ssize_t width = r.shared.value_dim, unit = kernels.linear_columns
    if r.layouts[<int> FA_LINEAR_BETA].data != NULL:
        unit *= 2  # its passes are wider
    r.parts, r.columns = 1, width
    if threads > 1 and width > unit and (r.heads < threads or r.heads % threads and r.heads < 4 * threads):
        r.parts = (threads + r.heads - 1) // r.heads if r.heads < threads else threads
        r.columns = ((width + r.parts - 1) // r.parts + unit - 1) // unit * unit
        r.parts = (width + r.columns - 1) // r.columns
    return 0


cdef object run(Recurrence r):
    cdef Problem p = r.call
    cdef const fa_kernels *kernels = kernels_for(p.call.problem.dtype)
    cdef double work = 1.0 * r.heads * r.shared.features * (r.shared.value_dim + 1)
    cdef double numbers = work * (p.call.sizes.keys + <double> p.call.sizes.queries * r.shared.heads)
    cdef bint small = numbers < SMALL
    # A few steps, which nobody needs to interrupt: the state may be updated where it lies.
    cdef bint brief = small or p.call.sizes.keys <= FEW and p.call.sizes.queries <= FEW
    cdef int threads = 1 if small else allowed_threads(p.num_threads)
    cdef Watch watch = Watch(0, 0)
    cdef Watch *looked_at = NULL if brief else &watch
    cdef size_t kernel_size, size
    cdef char *workspace
    cdef Py_ssize_t task
    cdef double estimate
    share_out(r, kernels, 1 if brief and r.shared.is_normalised else threads)
    threads = <int> min(<Py_ssize_t> threads, r.heads * r.parts)
    r.target = r.state
    if r.state is not None:
        if not brief:
            # An interrupted call leaves the caller's own state as it was; nor may columns of it change while others
            # still read it.
            r.target = np.empty_like(r.state, order="C", subok=False)
        lay_out(&r.layouts[<int> FA_LINEAR_NEW_STATE], p.call.axes, r.target, 2)
    if r.heads == 0:
        return
    estimate = 8.0 * (r.shared.features + 1.0) * (r.columns + 4096) + 4096.0 * r.columns + 64.0 * r.shared.heads
    if estimate > 1e14:
        raise MemoryError(f"no memory for a state of {r.shared.features} x {r.columns} numbers")
    kernel_size = (kernels.linear_workspace(&r.shared, r.columns) + 63) // 64 * 64
    size = (kernel_size + 16 * r.shared.heads + 8 * r.columns + 63) // 64 * 64
    workspace = <char *> take_workspace(size * max(threads, 1), <double> size * max(threads, 1))
    try:
        for task in range(max(threads, 1)):
            memset(workspace + task * size + kernel_size + 16 * r.shared.heads, 0, 8 * r.columns)
        if small:
            for task in range(r.heads * r.parts):
                run_task(r, kernels, task, workspace, kernel_size, NULL, True)
        elif threads <= 1:
            with nogil:
                for task in range(r.heads * r.parts):
                    if run_task(r, kernels, task, workspace, kernel_size, looked_at, True):
                        break
        else:
            with nogil:
                run_parallel(r, kernels, threads, workspace, size, kernel_size, looked_at)
    finally:
        give_workspace(workspace)
    if watch.stop:
        raise_pending()


def linear_attention(query, key, value, feature_map, is_causal, query_offset, key_lengths, query_lengths, log_decay,
                     beta, normalize, scale, eps, state, return_state, state_out, enable_gqa, out, num_threads):
    cdef Recurrence r = read_call(query, key, value, feature_map, is_causal, query_offset, key_lengths, query_lengths,
                                  log_decay, beta, normalize, scale, eps, state, return_state, state_out, enable_gqa,
                                  out, num_threads)
    run(r)
    if r.target is not r.state:
        r.state[...] = r.target
    return (r.out, r.state) if return_state else r.out
