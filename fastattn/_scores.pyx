# cython: wraparound=True
"""Scores with weights of their own, additive and bilinear: checks the weights, projects query and key, and takes
gradients of what was projected back to query, key and weights.

The call then proceeds with what was projected. Products on the way back are NumPy's.
"""
import math

import numpy as np

cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport fabs, frexp, isfinite, ldexp

from libc.stdint cimport uintptr_t

from fastattn._call cimport Problem, lay_out, new_problem, read_call
from fastattn._checks cimport (accumulation, checked_threads, converted, empty, floating, promoted, shape_of,
                               too_few_axes)
from fastattn._layers cimport Matrix, dense
from fastattn._rules cimport Rules
from fastattn._runtime cimport (FA_ADDITIVE, FA_ALIGN, FA_BLOCK, FA_DOT, FA_F64, FA_KEY, Team, Watch, allowed_threads,
                                fa_call, fa_dtype, fa_head, fa_kernels, fa_locate, gathered, give_workspace,
                                interrupted, join_team, kernels_for, raise_pending, take_workspace)

cnp.import_array()


cdef list read_weights(Problem p, tuple given, tuple names):
    """Query, key, value and weights as arrays; sets the dtype of the result, to which they promote. A weight that is
    None stays None."""
    cdef list arrays = [], present = [], present_names = []
    cdef int i
    cdef cnp.ndarray a
    for i in range(len(given)):
        if i < 3 or given[i] is not None:
            present.append(floating(given[i], names[i]))
            present_names.append(names[i])
    p.dtype = promoted(present, tuple(present_names), &p.call.problem.dtype)
    present.reverse()
    for i in range(len(given)):
        arrays.append(None if given[i] is None else present.pop())
    for i in range(2):
        a = arrays[i]
        if cnp.PyArray_NDIM(a) < 2:
            raise too_few_axes(names[i], shape_of(a), ("(..., L, D_query)", "(..., S, D_key)")[i])
    return arrays


cdef object read_vector(object x, str name, Py_ssize_t size, str why, fa_dtype dtype):
    """A bias of a projection, in the accumulation dtype."""
    cdef cnp.ndarray b = floating(x, name)
    if cnp.PyArray_NDIM(b) != 1 or cnp.PyArray_DIM(b, 0) != size:
        raise ValueError(f"{name} has shape {shape_of(b)}; it must be ({size},), {why}")
    return converted(b, accumulation(dtype))


cdef int check_matrix(cnp.ndarray w, str name, cnp.ndarray x, str x_name, object columns, str why) except -1:
    """Checks that x @ w is possible and has this many columns; None: any number."""
    cdef Py_ssize_t rows = cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1)
    if (cnp.PyArray_NDIM(w) != 2 or cnp.PyArray_DIM(w, 0) != rows or
            columns is not None and cnp.PyArray_DIM(w, 1) != columns):
        allowed = f"({rows}, {'n' if columns is None else columns})"
        raise ValueError(f"{name} has shape {shape_of(w)}; it must be {allowed}: {rows} is {x_name}'s last axis{why}")
    return 0


cdef cnp.ndarray projected(cnp.ndarray x, cnp.ndarray w, cnp.ndarray b, fa_dtype dtype, object num_threads):
    """x @ w + b in the accumulation dtype; without w and b, x itself."""
    if w is None and b is None:
        return x
    cdef object real = accumulation(dtype)
    if w is not None:
        return dense(Matrix(w, b, real), x, real, None, None, None, None, num_threads)
    with np.errstate(all="ignore"):
        return np.add(converted(x, real), b, out=empty(shape_of(x), real, "the projection"))


cdef enum:
    ROWS_AT_ONCE = 128          # of products on the way back

cdef int add_up(cnp.ndarray total, cnp.ndarray lost, object part) except -1:
    """total += part; lost, unless None: += what rounding takes from it."""
    if lost is None:
        np.add(total, part, out=total)
        return 0
    cdef object t = total + part, back = t - total
    lost += (total - (t - back)) + (part - back)
    total[...] = t
    return 0


cdef tuple projected_back(cnp.ndarray d, cnp.ndarray x, cnp.ndarray w, fa_dtype dtype, object d_x, bint of_w,
                          bint of_b):
    """From d, the gradient of `projected`, to those of w and b in float64; None where not wanted. That of x goes into
    d_x, unless it is None.

    Rows are taken by position, all batches of one before the next, in products of ROWS_AT_ONCE rows, filled up with
    zeros: so no product's shape depends on their number, rows behind the others change nothing, and no error grows. A
    row of zeros in d takes no part, whatever x and w hold.
    """
    cdef Py_ssize_t channels = shape_of(x)[-1], hidden = shape_of(d)[-1], length = shape_of(d)[-2]
    cdef Py_ssize_t batch = math.prod(shape_of(d)[:-2]), step, i, at, n
    cdef object real = accumulation(dtype), exact = accumulation(FA_F64)
    cdef cnp.ndarray d_w = None, w_lost = None, d_b = None, b_lost = None
    if of_w:
        d_w = empty((channels, hidden), exact, "a gradient", True)
        w_lost = empty((channels, hidden), exact, "a gradient", True) if dtype == FA_F64 else None
    if of_b:
        d_b = empty((hidden,), exact, "a gradient", True)
        b_lost = empty((hidden,), exact, "a gradient", True) if dtype == FA_F64 else None
    if w is None and d_x is not None:
        np.copyto(d_x, d, casting="unsafe")
        d_x = None
    cdef object turned = None if w is None or d_x is None else np.ascontiguousarray(converted(w, real).T)
    cdef object some_x = empty((<int> ROWS_AT_ONCE, channels), real)
    cdef object some_d = empty((<int> ROWS_AT_ONCE, hidden), real)
    # Positions whose rows are whole products.
    step = <int> ROWS_AT_ONCE // math.gcd(max(batch, 1), <int> ROWS_AT_ONCE)
    step *= max(1, 8 * <int> ROWS_AT_ONCE // (step * max(batch, 1)))
    for i in range(0, length if batch and (of_w or of_b or d_x is not None) else 0, step):
        rows_d = np.moveaxis(d[..., i:i + step, :], -2, 0)
        shape = rows_d.shape[:-1]
        rows_d = rows_d.reshape(math.prod(shape), hidden)
        rows_x = np.moveaxis(x[..., i:i + step, :], -2, 0).reshape(len(rows_d), channels) if of_w else None
        rows_d_x = None if d_x is None else empty((len(rows_d), channels), real, "a gradient")
        for at in range(0, len(rows_d), <int> ROWS_AT_ONCE):
            n = min(<Py_ssize_t> ROWS_AT_ONCE, len(rows_d) - at)
            some_d[:n] = rows_d[at:at + n]
            some_d[n:] = 0
            idle = ~some_d.any(axis=1)
            if of_w:
                some_x[:n] = rows_x[at:at + n]
                some_x[idle] = 0
                add_up(d_w, w_lost, np.matmul(some_x.T, some_d))
            if of_b:
                add_up(d_b, b_lost, np.add.reduce(some_d, axis=0, dtype=np.float64))
            if d_x is not None:
                product = np.matmul(some_d, turned)
                product[idle] = 0
                rows_d_x[at:at + n] = product[:n]
        if d_x is not None:
            np.copyto(np.moveaxis(d_x[..., i:i + step, :], -2, 0), rows_d_x.reshape(*shape, channels),
                      casting="unsafe")
    for total, lost in ((d_w, w_lost), (d_b, b_lost)):
        if lost is not None:
            total += lost
    return d_w, d_b


cdef cnp.ndarray normalised(cnp.ndarray w, double *factor):
    """Score weights in float64, scaled by a power of two so that the largest is between 1/2 and 1; `factor` undoes it.
    As part of the scale, which may be applied after the sum, it keeps products from over- or underflowing."""
    cdef cnp.ndarray a = empty(shape_of(w), accumulation(FA_F64), "a copy of w_score")
    cnp.PyArray_CopyInto(a, w)
    cdef double *number = <double *> cnp.PyArray_DATA(a)
    cdef double most = 0
    cdef int exponent = 0
    cdef Py_ssize_t i, n = cnp.PyArray_DIM(a, 0)
    for i in range(n):
        if isfinite(number[i]):
            most = max(most, fabs(number[i]))
    frexp(most, &exponent)
    for i in range(n):
        number[i] = ldexp(number[i], -exponent)
    factor[0] = ldexp(1.0, exponent)
    return a


cdef enum:
    FEW_KEYS = 1 << 15          # numbers of keys below which threads cost more than they bring


cdef class PreparedKeys:
    """
    What `prepare_additive_keys` returns, and `additive_attention` takes as its `key`.

    Attributes
    ----------
    key : ndarray, shape (..., S, hidden)
        The projected keys, read-only.
    shape : tuple
        Of `key`.
    dtype : numpy.dtype
        To which key and w_key promote.
    nbytes : int
        Memory that it holds, in bytes.

    Notes
    -----
    It can be pickled; what is computed of the keys is computed anew then, as other CPUs want it.
    """

    def __init__(self):
        raise TypeError("PreparedKeys are made by fastattn.prepare_additive_keys")

    def __repr__(self):
        return f"<PreparedKeys: {self.shape}, {self.dtype}>"

    def __reduce__(self):
        return prepared_again, (np.array(self.key), self.dtype)

    @property
    def shape(self):
        """(..., S, hidden)"""
        return shape_of(self.key)

    @property
    def nbytes(self):
        """Memory that it holds, in bytes."""
        return (<object> self.key).nbytes + (<object> self.found).nbytes


def prepared_again(cnp.ndarray key not None, dtype):
    """From a pickle."""
    return prepared(key, dtype, FA_F64 if key.dtype == np.float64 else kernels_dtype(dtype), None)


cdef fa_dtype kernels_dtype(object dtype) except *:
    cdef fa_dtype storage
    promoted([np.empty(0, dtype)], ("key",), &storage)
    return storage


cdef void prepare_all(const fa_call *call, const fa_kernels *kernels, int threads, Py_ssize_t blocks, char *found,
                      size_t size, char *scratch, size_t scratch_size, Watch *watch) noexcept nogil:
    cdef Py_ssize_t task
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for task in prange(call.heads * blocks, schedule="dynamic", chunksize=1):
            if not interrupted(watch, threadid() == 0):
                prepare_block(call, kernels, task // blocks, task % blocks * <Py_ssize_t> FA_BLOCK, found, size,
                              scratch + threadid() * scratch_size)


cdef void prepare_block(const fa_call *call, const fa_kernels *kernels, Py_ssize_t n, Py_ssize_t begin, char *found,
                        size_t size, char *scratch) noexcept nogil:
    cdef fa_head head
    fa_locate(call, n, 0, &head)
    kernels.prepare_keys(&call.problem, &head, begin, min(begin + <Py_ssize_t> FA_BLOCK, head.keys), found + n * size,
                         scratch)


cdef PreparedKeys prepared(cnp.ndarray key, object dtype, fa_dtype storage, object num_threads):
    """Of projected keys, which become its own."""
    cdef PreparedKeys self = PreparedKeys.__new__(PreparedKeys)
    cdef Problem p = new_problem()
    cdef const fa_kernels *kernels = kernels_for(storage)
    cdef int ndim = cnp.PyArray_NDIM(key), i, threads
    cdef Py_ssize_t keys = cnp.PyArray_DIM(key, ndim - 2), blocks = (keys + FA_BLOCK - 1) // <Py_ssize_t> FA_BLOCK, n
    cdef Watch watch = Watch(0, 0)
    cdef size_t size, scratch_size, skip
    cdef cnp.ndarray room
    cdef char *scratch
    cdef char *found
    p.call.problem.score, p.call.problem.dtype = FA_ADDITIVE, storage
    p.call.problem.head_dim = cnp.PyArray_DIM(key, ndim - 1)
    p.call.problem.value_dim = 1
    p.call.axes, p.call.heads = ndim - 2, 1
    for i in range(ndim - 2):
        p.call.shape[i] = cnp.PyArray_DIM(key, i)
        p.call.heads *= p.call.shape[i]
    lay_out(&p.call.layouts[<int> FA_KEY], ndim - 2, key, 2)
    p.call.operands[0], p.call.operand_count = FA_KEY, 1
    p.call.sizes.keys = p.call.sizes.key_length = keys
    p.call.sizes.queries = p.call.sizes.heads = 1
    p.call.sizes.view[<int> FA_KEY].row = p.call.layouts[<int> FA_KEY].row
    p.call.sizes.view[<int> FA_KEY].col = p.call.layouts[<int> FA_KEY].col
    p.call.sizes.view[<int> FA_KEY].dtype = p.call.layouts[<int> FA_KEY].dtype

    size = kernels.prepared_size(&p.call.problem, keys)
    room = empty((p.call.heads * size + <int> FA_ALIGN,), np.dtype(np.uint8), "the prepared keys")
    skip = (FA_ALIGN - <uintptr_t> cnp.PyArray_DATA(room) % <uintptr_t> FA_ALIGN) % <uintptr_t> FA_ALIGN
    self.found = (<object> room)[skip:skip + p.call.heads * size].reshape((*shape_of(key)[:ndim - 2], size))
    found = <char *> cnp.PyArray_DATA(self.found)
    threads = 1 if cnp.PyArray_SIZE(key) < FEW_KEYS else allowed_threads(num_threads)
    threads = <int> min(<Py_ssize_t> threads, max(1, p.call.heads * blocks))
    scratch_size = kernels.tile_workspace(&p.call.problem, 1, keys)
    scratch = <char *> take_workspace(scratch_size * threads, <double> scratch_size * threads)
    try:
        if threads == 1:
            for n in range(p.call.heads * blocks):
                prepare_block(p.call, kernels, n // blocks, n % blocks * <Py_ssize_t> FA_BLOCK, found, size, scratch)
        else:
            with nogil:
                prepare_all(p.call, kernels, threads, blocks, found, size, scratch, scratch_size, &watch)
    finally:
        give_workspace(scratch)
    if watch.stop:
        raise_pending()
    (<object> key).flags.writeable = False
    self.key, self.dtype = key, dtype
    return self


cdef PreparedKeys prepare_additive(object key, object w_key, object num_threads):
    cdef fa_dtype storage
    cdef cnp.ndarray k = floating(key, "key"), w = None, y
    cdef list arrays = [k]
    num_threads = checked_threads(num_threads)
    if w_key is not None:
        w = floating(w_key, "w_key")
        arrays.append(w)
    dtype = promoted(arrays, ("key", "w_key"), &storage)
    if cnp.PyArray_NDIM(k) < 2:
        raise too_few_axes("key", shape_of(k), "(..., S, D_key)")
    if w is not None:
        check_matrix(w, "w_key", k, "key", None, "")
    y = projected(k, w, None, storage, num_threads)
    return prepared(np.array(y, order="C") if w is None else y, dtype, storage, num_threads)


cdef Problem read_additive(object query, object key, object value, object w_score, object w_query, object w_key,
                           object b_hidden, Rules r):
    cdef Problem p = new_problem()
    cdef list arrays
    cdef tuple names = ("query", "key", "value", "w_score", "w_query", "w_key")
    cdef cnp.ndarray q, k, x, w, b = None
    cdef Py_ssize_t hidden
    cdef int i
    cdef PreparedKeys ready = key if isinstance(key, PreparedKeys) else None
    if w_score is None:
        raise TypeError("w_score must be an array of shape (hidden,), not None")
    if ready is not None and w_key is not None:
        raise TypeError("w_key is part of the prepared keys (fastattn.prepare_additive_keys); it must be None here")
    # Of prepared keys only the dtype counts there: their numbers are of the accumulation dtype.
    sample = key if ready is None else np.empty((0, 0), ready.dtype)
    arrays = read_weights(p, (query, sample, value, w_score, w_query, w_key), names)
    if ready is not None:
        if accumulation(p.call.problem.dtype) != accumulation(kernels_dtype(ready.dtype)):
            raise TypeError(f"key was prepared in {ready.dtype}, and the other arrays need {p.dtype}: prepare "
                            f"key.astype({p.dtype}), or convert the others")
        arrays[1], p.prepared = ready.key, ready.found
    q, k, w = arrays[0], arrays[1], arrays[3]
    if cnp.PyArray_NDIM(w) != 1:
        raise ValueError(f"w_score has shape {shape_of(w)}; it must have one axis, (hidden,)")
    hidden = cnp.PyArray_DIM(w, 0)
    for i in range(2):
        x = arrays[i]
        if arrays[4 + i] is not None:
            check_matrix(arrays[4 + i], names[4 + i], x, names[i], hidden,
                         f", and {hidden} (hidden) the length of w_score")
        elif cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1) != hidden:
            size = cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1)
            raise ValueError(f"{names[i]}'s last axis is {size}; without {names[4 + i]} it must be {hidden} (hidden), "
                             f"the length of w_score; {names[4 + i]}, of shape ({size}, {hidden}), projects it")
    if b_hidden is not None:
        b = read_vector(b_hidden, "b_hidden", hidden, "as long as w_score", p.call.problem.dtype)
    threads = checked_threads(<object> r.num_threads)
    q = projected(q, arrays[4], b, p.call.problem.dtype, threads)
    k = projected(k, arrays[5], None, p.call.problem.dtype, threads)
    p.call.problem.score = FA_ADDITIVE
    p.score_weights = normalised(w, &p.call.problem.scale)
    p.call.problem.score_weights = <const double *> cnp.PyArray_DATA(p.score_weights)
    return read_call(p, q, k, arrays[2], (query, key, value, w_score, w_query, w_key, b_hidden),
                     (*names, "b_hidden"), &r, None)


cdef Problem read_bilinear(object query, object key, object value, object w_query, object w_key, object b_query,
                           object b_key, Rules r):
    cdef Problem p = new_problem()
    cdef list arrays
    cdef tuple names = ("query", "key", "value", "w_query", "w_key")
    cdef cnp.ndarray q, k, q_matrix, k_matrix, q_bias = None, k_bias = None
    if w_query is None:
        raise TypeError("w_query must be a matrix of shape (D_query, n), not None")
    arrays = read_weights(p, (query, key, value, w_query, w_key), names)
    q, k, q_matrix, k_matrix = arrays[0], arrays[1], arrays[3], arrays[4]
    check_matrix(q_matrix, "w_query", q, "query", None, "")
    columns = cnp.PyArray_DIM(q_matrix, 1)
    if k_matrix is not None:
        check_matrix(k_matrix, "w_key", k, "key", columns, f", and {columns} the number of w_query's columns")
    else:
        check_matrix(q_matrix, "w_query", k, "key", None, ", and without w_key both share w_query")
        k_matrix = q_matrix
    if b_query is not None:
        q_bias = read_vector(b_query, "b_query", columns, "one for each column of w_query", p.call.problem.dtype)
    if b_key is not None:
        k_bias = read_vector(b_key, "b_key", columns, "one for each column of w_query", p.call.problem.dtype)
    elif w_key is None:
        k_bias = q_bias
    threads = checked_threads(<object> r.num_threads)
    q = projected(q, q_matrix, q_bias, p.call.problem.dtype, threads)
    k = projected(k, k_matrix, k_bias, p.call.problem.dtype, threads)
    p.call.problem.score = FA_DOT
    p.call.problem.scale = 1
    return read_call(p, q, k, arrays[2], (query, key, value, w_query, w_key, b_query, b_key),
                     (*names, "b_query", "b_key"), &r, None)
