"""The driver of softmax and its relatives: checks arguments and distributes rows over threads.

Contiguous rows are read and written in place. If rows are strided but lie side by side, many are processed at once, so
that whole cache lines are used; other rows are copied through scratch. The bits of a row are the same each way.
"""
import numpy as np

cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport int64_t

from fastattn._checks cimport (accumulation, as_array, checked_out, checked_threads, flag, floating, integer, shape_of,
                               storage_of)
from fastattn._rows cimport (MOST_AXES, ROW_MASK, ROW_OPERANDS, ROW_OUT, ROW_X, Axes, join_axes, real_size, size_of)
from fastattn._runtime cimport (FA_F32, FA_F64, FA_ROW_ENTMAX15, FA_ROW_LOG_SOFTMAX, FA_ROW_LOGSUMEXP, FA_ROW_SOFTMAX,
                                FA_ROW_SPARSEMAX, Team, Watch, allowed_threads, fa_axes, fa_columns, fa_dtype,
                                fa_kernels, fa_row_function, gathered, give_workspace, interrupted, join_team,
                                kernels_for, raise_pending, take_workspace)

cnp.import_array()

cdef enum:
    SMALL = 1 << 14        # elements below which threads cost more than they gain
    CHUNK = 1 << 15        # elements that a thread processes at a time, at least one row
    LINE = 64              # bytes of a cache line


# Rows of one or more axes: the axes of x split into those of a row and the others, merging adjacent axes where strides
# allow.
cdef class Rows:
    cdef Axes row, batch
    cdef Py_ssize_t length, rows            # elements per row; number of rows
    cdef char *data[<int> ROW_OPERANDS]     # the mask may be NULL
    cdef fa_dtype dtype, out_dtype
    cdef bint aligned                       # x and out: elements at multiples of their size
    cdef object num_threads
    cdef list kept
    cdef readonly object answer


cdef tuple checked_axes(object axis, int ndim):
    """The axes of a row, in ascending order."""
    if axis is None:
        return tuple(range(ndim))
    axes = []
    for one in axis if isinstance(axis, (tuple, list)) else (axis,):
        n = integer(one, "axis", "an integer, a tuple of integers, or None for all axes")
        if ndim == 0 and n in (0, -1):
            continue  # as in NumPy's reductions
        if not -ndim <= n < ndim:
            raise np.exceptions.AxisError(f"axis {n} is out of bounds for x, which has {ndim} axes")
        axes.append(n % ndim)
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis must not name an axis twice: {axis}")
    return tuple(sorted(axes))


cdef Rows read_rows(object x, object axis, object mask, object out, object num_threads, bint reduces, object keepdims):
    """reduces: the result has one element per row, in the accumulation dtype (logsumexp)."""
    cdef Rows p = Rows.__new__(Rows)
    cdef cnp.ndarray a = floating(x, "x"), m = None, o
    cdef int ndim = cnp.PyArray_NDIM(a), i, k
    cdef tuple axes = checked_axes(axis, ndim)
    cdef Axes *to
    cdef bint keep = flag(keepdims, "keepdims")
    p.num_threads = checked_threads(num_threads)
    p.dtype = p.out_dtype = storage_of(a, "x")
    shape = shape_of(a)
    dtype = a.dtype
    if reduces:
        dtype = accumulation(p.dtype)
        p.out_dtype = FA_F64 if p.dtype == FA_F64 else FA_F32
        shape = tuple([1 if i in axes else n for i, n in enumerate(shape) if keep or i not in axes])
    inputs, names = [a], ("x",)
    p.data[<int> ROW_MASK] = NULL
    if mask is not None:
        m = as_array(mask, "mask")
        if cnp.PyArray_TYPE(m) != cnp.NPY_BOOL:
            raise TypeError(f"mask must be boolean, True where an entry counts, not of dtype {m.dtype}")
        try:
            m = np.broadcast_to(m, shape_of(a))
        except ValueError:
            raise ValueError(f"mask has shape {shape_of(m)}, which does not broadcast to x's, {shape_of(a)}") from None
        inputs, names = [a, m], ("x", "mask")
        p.data[<int> ROW_MASK] = <char *> cnp.PyArray_DATA(m)
    p.answer = o = checked_out(out, shape, dtype, inputs, names, not reduces)
    if reduces and not keep:
        o = np.expand_dims(o, axes)
    p.data[<int> ROW_X] = <char *> cnp.PyArray_DATA(a)
    p.data[<int> ROW_OUT] = <char *> cnp.PyArray_DATA(o)
    p.aligned = cnp.PyArray_ISALIGNED(a) and cnp.PyArray_ISALIGNED(o)
    p.kept = [a, m, o]
    p.row.count = p.batch.count = 0
    p.length = p.rows = 1
    for i in range(ndim):
        to = &p.row if i in axes else &p.batch
        if i in axes:
            p.length *= cnp.PyArray_DIM(a, i)
        else:
            p.rows *= cnp.PyArray_DIM(a, i)
        k = to.count
        to.shape[k] = cnp.PyArray_DIM(a, i)
        to.strides[<int> ROW_X][k] = cnp.PyArray_STRIDE(a, i)
        to.strides[<int> ROW_OUT][k] = cnp.PyArray_STRIDE(o, i)
        to.strides[<int> ROW_MASK][k] = 0 if mask is None else cnp.PyArray_STRIDE(m, i)
        if reduces and i in axes:
            to.strides[<int> ROW_OUT][k] = 0
        to.count += 1
    join_axes(&p.row)
    join_axes(&p.batch)
    return p


cdef void copy_row(Rows p, const fa_kernels *kernels, int which, char *memory, char *scratch, fa_dtype dtype,
                   Py_ssize_t scratch_size) noexcept nogil:
    """Copies a row with any strides to contiguous scratch or, for ROW_OUT, from it; innermost axis first."""
    cdef Py_ssize_t index[MOST_AXES]
    cdef int axis, last = p.row.count - 1
    cdef Py_ssize_t inner = p.row.shape[last] if last >= 0 else 1, done = 0, i
    cdef Py_ssize_t stride = p.row.strides[which][last] if last >= 0 else 0
    for axis in range(last):
        index[axis] = 0
    while done < p.length:
        if which == ROW_X:
            kernels.gather(scratch + done * scratch_size, memory, stride, inner, dtype)
        elif which == ROW_OUT:
            kernels.scatter(memory, stride, scratch + done * scratch_size, inner, dtype)
        else:
            for i in range(inner):
                scratch[done + i] = memory[i * stride]
        done += inner
        axis = last - 1
        while axis >= 0:
            index[axis] += 1
            memory += p.row.strides[which][axis]
            if index[axis] < p.row.shape[axis]:
                break
            memory -= index[axis] * p.row.strides[which][axis]
            index[axis] = 0
            axis -= 1


cdef bint in_place(Rows p, int which, fa_row_function function) noexcept nogil:
    """Whether the kernels can read or write the rows of an operand in place."""
    cdef int last = p.row.count - 1
    cdef Py_ssize_t size = real_size(p.dtype)
    if which == ROW_MASK:
        return p.data[which] == NULL or last < 0 or last == 0 and p.row.strides[which][0] == 1
    if last > 0 or not p.aligned or (p.dtype != FA_F64 and p.dtype != FA_F32):
        return False
    return last < 0 or p.row.strides[which][0] == size or which == ROW_OUT and function == FA_ROW_LOGSUMEXP


cdef int run_rows(Rows p, const fa_kernels *kernels, fa_row_function function, Py_ssize_t begin, Py_ssize_t end,
                  char *scratch, Watch *watch, bint caller) noexcept nogil:
    """Rows [begin, end); scratch: two rows in the accumulation dtype and one of bytes, unless all is in place."""
    cdef Py_ssize_t size = real_size(p.dtype), rest = begin, r = begin, looked = begin, run
    cdef fa_dtype real = FA_F64 if p.dtype == FA_F64 else FA_F32
    cdef Py_ssize_t index[MOST_AXES]
    cdef char *at[<int> ROW_OPERANDS]
    cdef char *x
    cdef char *y
    cdef char *mask
    cdef int axis, k, inner = p.batch.count - 1
    cdef bint x_in_place = in_place(p, ROW_X, function), y_in_place = in_place(p, ROW_OUT, function)
    cdef bint mask_in_place = in_place(p, ROW_MASK, function)
    for k in range(<int> ROW_OPERANDS):
        at[k] = p.data[k]
    for axis in range(inner, -1, -1):
        index[axis] = rest % p.batch.shape[axis]
        rest //= p.batch.shape[axis]
        for k in range(<int> ROW_OPERANDS):
            at[k] += index[axis] * p.batch.strides[k][axis]
    while r < end:
        run = 1
        if x_in_place and y_in_place and mask_in_place:
            # All rows up to the end of the innermost batch axis at once.
            if inner >= 0:
                run = min(end - r, p.batch.shape[inner] - index[inner])
                run = max(1, min(run, CHUNK // max(p.length, 1)))
                kernels.rows(function, at[<int> ROW_X], p.batch.strides[<int> ROW_X][inner], at[<int> ROW_MASK],
                             p.batch.strides[<int> ROW_MASK][inner], at[<int> ROW_OUT],
                             p.batch.strides[<int> ROW_OUT][inner], p.length, run)
            else:
                kernels.rows(function, at[<int> ROW_X], 0, at[<int> ROW_MASK], 0, at[<int> ROW_OUT], 0, p.length, 1)
        else:
            x, y, mask = at[<int> ROW_X], at[<int> ROW_OUT], at[<int> ROW_MASK]
            if not x_in_place:
                x = scratch
                copy_row(p, kernels, ROW_X, at[<int> ROW_X], x, p.dtype, size)
            if not mask_in_place:
                mask = scratch + 2 * size * p.length
                copy_row(p, kernels, ROW_MASK, at[<int> ROW_MASK], mask, real, 1)
            if not y_in_place:
                y = scratch + size * p.length
            kernels.rows(function, x, 0, mask, 0, y, 0, p.length, 1)
            if not y_in_place:
                if function == FA_ROW_LOGSUMEXP:
                    kernels.scatter(at[<int> ROW_OUT], size, y, 1, p.out_dtype)
                else:
                    copy_row(p, kernels, ROW_OUT, at[<int> ROW_OUT], y, p.dtype, size)
        r += run
        axis = inner
        while axis >= 0:
            index[axis] += run
            for k in range(<int> ROW_OPERANDS):
                at[k] += run * p.batch.strides[k][axis]
            if index[axis] < p.batch.shape[axis]:
                break
            for k in range(<int> ROW_OPERANDS):
                at[k] -= index[axis] * p.batch.strides[k][axis]
            index[axis] = 0
            run = 1
            axis -= 1
        if watch != NULL and (r - looked) * (p.length + 64) > CHUNK:
            looked = r
            if interrupted(watch, caller):
                return 1
    return 0


cdef void run_parallel(Rows p, const fa_kernels *kernels, fa_row_function function, Py_ssize_t chunk, int threads,
                       char *scratch, size_t scratch_size, Watch *watch) noexcept nogil:
    cdef Py_ssize_t c, chunks = (p.rows + chunk - 1) // chunk
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for c in prange(chunks, schedule="dynamic", chunksize=1):
            if not interrupted(watch, threadid() == 0):
                run_rows(p, kernels, function, c * chunk, min(p.rows, (c + 1) * chunk),
                         scratch + threadid() * scratch_size, watch, threadid() == 0)


# Rows side by side

cdef double bytes_touched(Rows p, Py_ssize_t stride, int which, Py_ssize_t run) noexcept:
    """Memory traffic in bytes per element of an operand along an axis with this stride and `run` elements."""
    cdef Py_ssize_t size = 1 if which == ROW_MASK else size_of(p.dtype)
    return min(<double> LINE, max(<double> abs(stride), min(<double> size, <double> LINE / max(run, 1))))


cdef int axis_of_columns(Rows p, fa_row_function function, Py_ssize_t least) noexcept:
    """The batch axis along which to process rows side by side, or -1 to process them one by one. least: minimum number
    of rows; fewer leave most lanes empty."""
    cdef int axis, k, best = -1, last = p.row.count - 1
    cdef double along_row = 0, along_axis = 0, cost
    if last < 0 or (in_place(p, ROW_X, function) and in_place(p, ROW_OUT, function) and
                    in_place(p, ROW_MASK, function)):
        return -1
    for axis in range(p.batch.count):
        if p.batch.shape[axis] < least:
            continue
        cost = 0
        for k in range(<int> ROW_OPERANDS):
            if p.data[k] != NULL:
                cost += bytes_touched(p, p.batch.strides[k][axis], k, p.batch.shape[axis])
        if best < 0 or cost < along_axis:
            best, along_axis = axis, cost
    for k in range(<int> ROW_OPERANDS):
        if p.data[k] != NULL and not (k == ROW_OUT and function == FA_ROW_LOGSUMEXP):
            cost = bytes_touched(p, p.row.strides[k][last], k, p.row.shape[last])
            # Short runs cost a call each.
            along_row += max(cost, min(<double> LINE, <double> LINE / p.row.shape[last]))
    return best if best >= 0 and along_axis <= along_row else -1


cdef struct Columns:
    fa_columns first        # the first rows; `rows` is the most processed at once
    int64_t count           # number of rows side by side
    fa_axes others          # the other batch axes
    Py_ssize_t tasks


cdef Columns columns_along(Rows p, int axis, const fa_kernels *kernels) noexcept:
    cdef Columns columns
    cdef int k, i, n = 0
    cdef fa_columns *first = &columns.first
    first.x, first.mask, first.out = p.data[<int> ROW_X], p.data[<int> ROW_MASK], p.data[<int> ROW_OUT]
    first.row = &p.row
    first.length, first.rows = p.length, kernels.columns_at_once
    first.dtype, first.out_dtype = p.dtype, p.out_dtype
    columns.count = p.batch.shape[axis]
    columns.tasks = (columns.count + first.rows - 1) // first.rows
    for k in range(<int> ROW_OPERANDS):
        first.next[k] = p.batch.strides[k][axis]
    for i in range(p.batch.count):
        if i == axis:
            continue
        columns.others.shape[n] = p.batch.shape[i]
        for k in range(<int> ROW_OPERANDS):
            columns.others.strides[k][n] = p.batch.strides[k][i]
        columns.tasks *= p.batch.shape[i]
        n += 1
    columns.others.count = n
    return columns


cdef int run_columns(const Columns *columns, const fa_kernels *kernels, fa_row_function function, Py_ssize_t task,
                     void *scratch) noexcept nogil:
    """One task: up to columns_at_once rows side by side."""
    cdef fa_columns c = columns.first
    cdef Py_ssize_t groups = (columns.count + c.rows - 1) // c.rows, rest = task // groups, index
    cdef int64_t row = task % groups * c.rows
    cdef int axis
    c.rows = min(c.rows, columns.count - row)
    c.x += row * c.next[<int> ROW_X]
    c.out += row * c.next[<int> ROW_OUT]
    if c.mask != NULL:
        c.mask += row * c.next[<int> ROW_MASK]
    for axis in range(columns.others.count - 1, -1, -1):
        index = rest % columns.others.shape[axis]
        rest //= columns.others.shape[axis]
        c.x += index * columns.others.strides[<int> ROW_X][axis]
        c.out += index * columns.others.strides[<int> ROW_OUT][axis]
        if c.mask != NULL:
            c.mask += index * columns.others.strides[<int> ROW_MASK][axis]
    kernels.columns(function, &c, scratch)
    return 0


cdef void run_columns_parallel(const Columns *columns, const fa_kernels *kernels, fa_row_function function,
                               Py_ssize_t chunk, int threads, char *scratch, size_t scratch_size,
                               Watch *watch) noexcept nogil:
    cdef Py_ssize_t task
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for task in prange(columns.tasks, schedule="dynamic", chunksize=chunk):
            if not interrupted(watch, threadid() == 0):
                run_columns(columns, kernels, function, task, scratch + threadid() * scratch_size)


cdef int run_by_columns(Rows p, fa_row_function function, int axis, const fa_kernels *kernels, bint small,
                        int threads) except -1:
    """Processes all rows, side by side along a batch axis."""
    cdef Columns columns = columns_along(p, axis, kernels)
    cdef Py_ssize_t chunk = max(1, CHUNK // max(p.length * columns.first.rows, 1))
    cdef size_t size = (kernels.columns_workspace(p.length) + 63) // 64 * 64
    cdef Watch watch = Watch(0, 0)
    cdef char *scratch
    cdef Py_ssize_t task
    threads = <int> min(<Py_ssize_t> threads, (columns.tasks + chunk - 1) // chunk)
    scratch = <char *> take_workspace(size * threads, <double> size * threads)
    try:
        if small:
            for task in range(columns.tasks):
                run_columns(&columns, kernels, function, task, scratch)
        else:
            with nogil:
                run_columns_parallel(&columns, kernels, function, chunk, threads, scratch, size, &watch)
    finally:
        give_workspace(scratch)
    if watch.stop:
        raise_pending()
    return 0


cdef object run(Rows p, fa_row_function function):
    cdef const fa_kernels *kernels = kernels_for(p.dtype)
    cdef double numbers = <double> p.rows * (p.length + 64)
    cdef Watch watch = Watch(0, 0)
    cdef bint small = numbers < SMALL
    cdef int threads = 1 if small else allowed_threads(p.num_threads)
    cdef Py_ssize_t chunk = max(1, CHUNK // max(p.length, 1))
    cdef size_t size = 64
    cdef char *scratch
    cdef int axis = axis_of_columns(p, function, kernels.columns_at_once // 2)
    if axis >= 0 and p.rows and p.length:
        run_by_columns(p, function, axis, kernels, small, threads)
        return p.answer
    if not (in_place(p, ROW_X, function) and in_place(p, ROW_OUT, function) and in_place(p, ROW_MASK, function)):
        size = ((2 * p.length + 1) * (real_size(p.dtype)) + p.length + 63) // 64 * 64
    if p.rows and (p.length or function == FA_ROW_LOGSUMEXP):
        threads = <int> min(<Py_ssize_t> threads, (p.rows + chunk - 1) // chunk)
        scratch = <char *> take_workspace(size * threads, 24.0 * threads * (p.length + 64))
        try:
            if small:
                run_rows(p, kernels, function, 0, p.rows, scratch, NULL, True)
            elif threads <= 1:
                with nogil:
                    run_rows(p, kernels, function, 0, p.rows, scratch, &watch, True)
            else:
                with nogil:
                    run_parallel(p, kernels, function, chunk, threads, scratch, size, &watch)
        finally:
            give_workspace(scratch)
        if watch.stop:
            raise_pending()
    return p.answer


def softmax(x, axis, mask, out, num_threads):
    return run(read_rows(x, axis, mask, out, num_threads, False, False), FA_ROW_SOFTMAX)


def log_softmax(x, axis, mask, out, num_threads):
    return run(read_rows(x, axis, mask, out, num_threads, False, False), FA_ROW_LOG_SOFTMAX)


def logsumexp(x, axis, keepdims, mask, out, num_threads):
    answer = run(read_rows(x, axis, mask, out, num_threads, True, keepdims), FA_ROW_LOGSUMEXP)
    return answer[()] if out is None else answer


def sparsemax(x, axis, mask, out, num_threads):
    return run(read_rows(x, axis, mask, out, num_threads, False, False), FA_ROW_SPARSEMAX)


def entmax15(x, axis, mask, out, num_threads):
    return run(read_rows(x, axis, mask, out, num_threads, False, False), FA_ROW_ENTMAX15)
