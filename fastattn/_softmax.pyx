"""The driver of softmax, its relatives and their gradients: checks arguments and distributes rows over threads.

Contiguous rows are read and written in place. If rows are strided but lie side by side, many are processed at once, so
that whole cache lines are used; other rows are copied through scratch. The bits of a row are the same each way.
"""
import numpy as np

cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport int64_t

from fastattn._checks cimport (accumulation, as_array, checked_out, checked_threads, flag, floating, integer, shape_of,
                               storage_of)
from fastattn._rows cimport (MOST_AXES, ROW_GRAD, ROW_MASK, ROW_OPERANDS, ROW_OUT, ROW_X, Axes, join_axes, real_size,
                             size_of)
from fastattn._runtime cimport (FA_F32, FA_F64, FA_ROW_ENTMAX15, FA_ROW_ENTMAX15_BACK, FA_ROW_LOG_SOFTMAX,
                                FA_ROW_LOG_SOFTMAX_BACK, FA_ROW_LOGSUMEXP, FA_ROW_LOGSUMEXP_BACK, FA_ROW_SOFTMAX,
                                FA_ROW_SOFTMAX_BACK, FA_ROW_SPARSEMAX, FA_ROW_SPARSEMAX_BACK, Team, Watch,
                                allowed_threads, fa_axes, fa_columns, fa_dtype, fa_kernels, fa_row_function, gathered,
                                give_workspace, interrupted, join_team, kernels_for, raise_pending, take_workspace)
from fastattn._vjp cimport read_gradient

cnp.import_array()

cdef enum:
    SMALL = 1 << 14        # elements below which threads cost more than they gain
    CHUNK = 1 << 15        # elements that a thread processes at a time, at least one row
    LINE = 64              # bytes of a cache line


# Rows of one or more axes: the axes of x split into those of a row and the others, merging adjacent axes where strides
# allow.
cdef class Rows:
    cdef fa_row_function function
    cdef Axes row, batch
    cdef Py_ssize_t length, rows            # elements per row; number of rows
    cdef char *data[<int> ROW_OPERANDS]     # the mask and the gradient may be NULL
    cdef fa_dtype dtypes[<int> ROW_OPERANDS]
    cdef fa_dtype real                      # the accumulation dtype
    cdef int single                         # the operand with one element per row, or -1
    cdef bint aligned                       # all but the mask: elements at multiples of their size
    cdef object num_threads
    cdef list kept
    cdef readonly object answer


cdef tuple checked_axes(object axis, int ndim, str name):
    """The axes of a row, in ascending order."""
    if axis is None:
        return tuple(range(ndim))
    axes = []
    for one in axis if isinstance(axis, (tuple, list)) else (axis,):
        n = integer(one, "axis", "an integer, a tuple of integers, or None for all axes")
        if ndim == 0 and n in (0, -1):
            continue  # as in NumPy's reductions
        if not -ndim <= n < ndim:
            raise np.exceptions.AxisError(f"axis {n} is out of bounds for {name}, which has {ndim} axes")
        axes.append(n % ndim)
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis must not name an axis twice: {axis}")
    return tuple(sorted(axes))


cdef bint same_place(object out, cnp.ndarray a):
    """Whether out is an array, element for element."""
    return out is a or (isinstance(out, np.ndarray) and out.shape == shape_of(a) and out.dtype == a.dtype and
                        out.ctypes.data == a.ctypes.data and out.strides == (<object> a).strides)


cdef Rows read_rows(fa_row_function function, object x, object axis, object mask, object out, object num_threads,
                    object keepdims=False, object grad_out=None):
    """grad_out: only for gradients; x is then what the function returned, or, for logsumexp, what it was given."""
    cdef Rows p = Rows.__new__(Rows)
    cdef bint back = function >= FA_ROW_SOFTMAX_BACK
    cdef str name = "output" if back and function != FA_ROW_LOGSUMEXP_BACK else "x"
    cdef cnp.ndarray a = floating(x, name), g = None, m = None, o
    cdef int ndim = cnp.PyArray_NDIM(a), i, k, n
    cdef tuple axes = checked_axes(axis, ndim, name)
    cdef Axes *to
    cdef bint keep = flag(keepdims, "keepdims")
    cdef list operands = [None] * <int> ROW_OPERANDS
    p.function = function
    p.num_threads = checked_threads(num_threads)
    p.dtypes[<int> ROW_X] = storage_of(a, name)
    p.real = FA_F64 if p.dtypes[<int> ROW_X] == FA_F64 else FA_F32
    p.single = -1
    shape = row_shape = shape_of(a)
    dtype, same_allowed = a.dtype, not back
    if function == FA_ROW_LOGSUMEXP or function == FA_ROW_LOGSUMEXP_BACK:
        row_shape = tuple([1 if i in axes else shape[i] for i in range(ndim) if keep or i not in axes])
    inputs, names = [a], [name]
    if mask is not None:
        m = as_array(mask, "mask")
        if cnp.PyArray_TYPE(m) != cnp.NPY_BOOL:
            raise TypeError(f"mask must be boolean, True where an entry counts, not of dtype {m.dtype}")
        try:
            m = np.broadcast_to(m, shape)
        except ValueError:
            raise ValueError(f"mask has shape {shape_of(m)}, which does not broadcast to {name}'s, "
                             f"{shape}") from None
        inputs.append(m)
        names.append("mask")
    if back:
        g = read_gradient(grad_out, row_shape)
        p.dtypes[<int> ROW_GRAD] = storage_of(g, "grad_out")
        # Each element is read before its place is written: out may be one of them, but not shifted.
        if function == FA_ROW_LOGSUMEXP_BACK or not same_place(out, g):
            inputs.append(g)
            names.append("grad_out")
        if function != FA_ROW_LOGSUMEXP_BACK and same_place(out, a):
            inputs, names = inputs[1:], names[1:]
        if isinstance(out, np.ndarray) and out.dtype == accumulation(p.real):
            dtype = out.dtype
    elif function == FA_ROW_LOGSUMEXP:
        shape, dtype, same_allowed = row_shape, accumulation(p.real), False
    p.answer = o = checked_out(out, shape, dtype, inputs, tuple(names), same_allowed)
    p.dtypes[<int> ROW_OUT] = storage_of(o, "out")
    if function == FA_ROW_LOGSUMEXP:
        p.single = ROW_OUT
        o = o if keep else np.expand_dims(o, axes)
    if function == FA_ROW_LOGSUMEXP_BACK:
        p.single = ROW_GRAD
        g = g if keep else np.expand_dims(g, axes)
    operands[<int> ROW_X], operands[<int> ROW_GRAD], operands[<int> ROW_MASK], operands[<int> ROW_OUT] = a, g, m, o
    p.kept = operands
    p.aligned = True
    for k in range(<int> ROW_OPERANDS):
        p.data[k] = NULL if operands[k] is None else <char *> cnp.PyArray_DATA(operands[k])
        if k != ROW_MASK and operands[k] is not None and not cnp.PyArray_ISALIGNED(operands[k]):
            p.aligned = False
    p.row.count = p.batch.count = 0
    p.length = p.rows = 1
    for i in range(ndim):
        to = &p.row if i in axes else &p.batch
        if i in axes:
            p.length *= cnp.PyArray_DIM(a, i)
        else:
            p.rows *= cnp.PyArray_DIM(a, i)
        n = to.count
        to.shape[n] = cnp.PyArray_DIM(a, i)
        for k in range(<int> ROW_OPERANDS):
            to.strides[k][n] = 0
            if operands[k] is not None and not (k == p.single and i in axes):
                to.strides[k][n] = cnp.PyArray_STRIDE(operands[k], i)
        to.count += 1
    join_axes(&p.row)
    join_axes(&p.batch)
    return p


cdef void copy_row(Rows p, const fa_kernels *kernels, int which, char *memory, char *scratch) noexcept nogil:
    """Copies a row with any strides to contiguous scratch or, for ROW_OUT, from it; innermost axis first."""
    cdef Py_ssize_t index[MOST_AXES]
    cdef int axis, last = p.row.count - 1
    cdef Py_ssize_t inner = p.row.shape[last] if last >= 0 else 1, done = 0, i
    cdef Py_ssize_t stride = p.row.strides[which][last] if last >= 0 else 0
    cdef Py_ssize_t size = 1 if which == ROW_MASK else real_size(p.real)
    cdef Py_ssize_t length = 1 if which == p.single else p.length
    if which == p.single:
        inner, last = 1, -1
    for axis in range(last):
        index[axis] = 0
    while done < length:
        if which == ROW_OUT:
            kernels.scatter(memory, stride, scratch + done * size, inner, p.dtypes[which])
        elif which == ROW_MASK:
            for i in range(inner):
                scratch[done + i] = memory[i * stride]
        else:
            kernels.gather(scratch + done * size, memory, stride, inner, p.dtypes[which])
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


cdef bint in_place(Rows p, int which) noexcept nogil:
    """Whether the kernels can read or write the rows of an operand in place, or have nothing to read."""
    cdef int last = p.row.count - 1
    if p.data[which] == NULL:
        return True
    if which == ROW_MASK:
        return last < 0 or last == 0 and p.row.strides[which][0] == 1
    if not p.aligned or p.dtypes[which] != p.real:
        return False
    return which == p.single or last < 0 or last == 0 and p.row.strides[which][0] == real_size(p.real)


cdef bint all_in_place(Rows p) noexcept nogil:
    cdef int k
    for k in range(<int> ROW_OPERANDS):
        if not in_place(p, k):
            return False
    return True


cdef Py_ssize_t scratch_at(Rows p, int which) noexcept nogil:
    """Where the row of an operand is in scratch; after the last one: the size of scratch."""
    cdef Py_ssize_t at = 0
    cdef int k
    for k in range(which):
        if not in_place(p, k):
            at += (max(p.length, 1) * (1 if k == ROW_MASK else real_size(p.real)) + 63) // 64 * 64
    return at


cdef int run_rows(Rows p, const fa_kernels *kernels, Py_ssize_t begin, Py_ssize_t end, char *scratch, Watch *watch,
                  bint caller) noexcept nogil:
    """Rows [begin, end); scratch: a row of each operand that is not read or written in place."""
    cdef Py_ssize_t rest = begin, r = begin, looked = begin, run
    cdef Py_ssize_t index[MOST_AXES]
    cdef char *at[<int> ROW_OPERANDS]
    cdef char *row[<int> ROW_OPERANDS]      # here or in scratch
    cdef Py_ssize_t step[<int> ROW_OPERANDS]
    cdef bint here[<int> ROW_OPERANDS]
    cdef int axis, k, inner = p.batch.count - 1
    cdef bint all_here = all_in_place(p)
    for k in range(<int> ROW_OPERANDS):
        at[k] = p.data[k]
        here[k] = in_place(p, k)
        row[k] = scratch + scratch_at(p, k)
        step[k] = p.batch.strides[k][inner] if all_here and inner >= 0 else 0
    for axis in range(inner, -1, -1):
        index[axis] = rest % p.batch.shape[axis]
        rest //= p.batch.shape[axis]
        for k in range(<int> ROW_OPERANDS):
            at[k] += index[axis] * p.batch.strides[k][axis]
    while r < end:
        run = 1
        if all_here and inner >= 0:
            # All rows up to the end of the innermost batch axis at once.
            run = min(end - r, p.batch.shape[inner] - index[inner])
            run = max(1, min(run, CHUNK // max(p.length, 1)))
        for k in range(<int> ROW_OPERANDS):
            if here[k]:
                row[k] = at[k]
            elif k != ROW_OUT:
                copy_row(p, kernels, k, at[k], row[k])
        kernels.rows(p.function, row[<int> ROW_X], step[<int> ROW_X], row[<int> ROW_GRAD], step[<int> ROW_GRAD],
                     row[<int> ROW_MASK], step[<int> ROW_MASK], row[<int> ROW_OUT], step[<int> ROW_OUT], p.length, run)
        if not here[<int> ROW_OUT]:
            copy_row(p, kernels, ROW_OUT, at[<int> ROW_OUT], row[<int> ROW_OUT])
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


cdef void run_parallel(Rows p, const fa_kernels *kernels, Py_ssize_t chunk, int threads, char *scratch,
                       size_t scratch_size, Watch *watch) noexcept nogil:
    cdef Py_ssize_t c, chunks = (p.rows + chunk - 1) // chunk
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for c in prange(chunks, schedule="dynamic", chunksize=1):
            if not interrupted(watch, threadid() == 0):
                run_rows(p, kernels, c * chunk, min(p.rows, (c + 1) * chunk), scratch + threadid() * scratch_size,
                         watch, threadid() == 0)


# Rows side by side

cdef double bytes_touched(Rows p, Py_ssize_t stride, int which, Py_ssize_t run) noexcept:
    """Memory traffic in bytes per element of an operand along an axis with this stride and `run` elements."""
    cdef Py_ssize_t size = 1 if which == ROW_MASK else size_of(p.dtypes[which])
    return min(<double> LINE, max(<double> abs(stride), min(<double> size, <double> LINE / max(run, 1))))


cdef int axis_of_columns(Rows p, Py_ssize_t least) noexcept:
    """The batch axis along which to process rows side by side, or -1 to process them one by one. least: minimum number
    of rows; fewer leave most lanes empty."""
    cdef int axis, k, best = -1, last = p.row.count - 1
    cdef double along_row = 0, along_axis = 0, cost
    if last < 0 or all_in_place(p):
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
        if p.data[k] != NULL and k != p.single:
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
    first.x, first.grad = p.data[<int> ROW_X], p.data[<int> ROW_GRAD]
    first.mask, first.out = p.data[<int> ROW_MASK], p.data[<int> ROW_OUT]
    first.row = &p.row
    first.length, first.rows = p.length, kernels.columns_at_once
    first.dtype, first.grad_dtype = p.dtypes[<int> ROW_X], p.dtypes[<int> ROW_GRAD]
    first.out_dtype = p.dtypes[<int> ROW_OUT]
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
    if c.grad != NULL:
        c.grad += row * c.next[<int> ROW_GRAD]
    if c.mask != NULL:
        c.mask += row * c.next[<int> ROW_MASK]
    for axis in range(columns.others.count - 1, -1, -1):
        index = rest % columns.others.shape[axis]
        rest //= columns.others.shape[axis]
        c.x += index * columns.others.strides[<int> ROW_X][axis]
        c.out += index * columns.others.strides[<int> ROW_OUT][axis]
        if c.grad != NULL:
            c.grad += index * columns.others.strides[<int> ROW_GRAD][axis]
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


cdef int run_by_columns(Rows p, int axis, const fa_kernels *kernels, bint small, int threads) except -1:
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
                run_columns(&columns, kernels, p.function, task, scratch)
        else:
            with nogil:
                run_columns_parallel(&columns, kernels, p.function, chunk, threads, scratch, size, &watch)
    finally:
        give_workspace(scratch)
    if watch.stop:
        raise_pending()
    return 0


cdef object run(Rows p):
    cdef const fa_kernels *kernels = kernels_for(p.dtypes[<int> ROW_X])
    cdef double numbers = <double> p.rows * (p.length + 64)
    cdef Watch watch = Watch(0, 0)
    cdef bint small = numbers < SMALL
    cdef int threads = 1 if small else allowed_threads(p.num_threads)
    cdef Py_ssize_t chunk = max(1, CHUNK // max(p.length, 1))
    cdef size_t size
    cdef char *scratch
    cdef int axis = axis_of_columns(p, kernels.columns_at_once // 2)
    if axis >= 0 and p.rows and p.length:
        run_by_columns(p, axis, kernels, small, threads)
        return p.answer
    if p.rows and (p.length or p.function == FA_ROW_LOGSUMEXP):
        size = max(64, scratch_at(p, ROW_OPERANDS))
        threads = <int> min(<Py_ssize_t> threads, (p.rows + chunk - 1) // chunk)
        scratch = <char *> take_workspace(size * threads, <double> size * threads)
        try:
            if small:
                run_rows(p, kernels, 0, p.rows, scratch, NULL, True)
            elif threads <= 1:
                with nogil:
                    run_rows(p, kernels, 0, p.rows, scratch, &watch, True)
            else:
                with nogil:
                    run_parallel(p, kernels, chunk, threads, scratch, size, &watch)
        finally:
            give_workspace(scratch)
        if watch.stop:
            raise_pending()
    return p.answer


def softmax(x, axis, mask, out, num_threads):
    return run(read_rows(FA_ROW_SOFTMAX, x, axis, mask, out, num_threads))


def log_softmax(x, axis, mask, out, num_threads):
    return run(read_rows(FA_ROW_LOG_SOFTMAX, x, axis, mask, out, num_threads))


def logsumexp(x, axis, keepdims, mask, out, num_threads):
    answer = run(read_rows(FA_ROW_LOGSUMEXP, x, axis, mask, out, num_threads, keepdims))
    return answer[()] if out is None else answer


def sparsemax(x, axis, mask, out, num_threads):
    return run(read_rows(FA_ROW_SPARSEMAX, x, axis, mask, out, num_threads))


def entmax15(x, axis, mask, out, num_threads):
    return run(read_rows(FA_ROW_ENTMAX15, x, axis, mask, out, num_threads))


def softmax_vjp(grad_out, output, axis, mask, out, num_threads):
    return run(read_rows(FA_ROW_SOFTMAX_BACK, output, axis, mask, out, num_threads, False, grad_out))


def log_softmax_vjp(grad_out, output, axis, mask, out, num_threads):
    return run(read_rows(FA_ROW_LOG_SOFTMAX_BACK, output, axis, mask, out, num_threads, False, grad_out))


def logsumexp_vjp(grad_out, x, axis, keepdims, mask, out, num_threads):
    return run(read_rows(FA_ROW_LOGSUMEXP_BACK, x, axis, mask, out, num_threads, keepdims, grad_out))


def sparsemax_vjp(grad_out, output, axis, mask, out, num_threads):
    return run(read_rows(FA_ROW_SPARSEMAX_BACK, output, axis, mask, out, num_threads, False, grad_out))


def entmax15_vjp(grad_out, output, axis, mask, out, num_threads):
    return run(read_rows(FA_ROW_ENTMAX15_BACK, output, axis, mask, out, num_threads, False, grad_out))
