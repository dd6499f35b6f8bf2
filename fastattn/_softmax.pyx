"""Softmax, its relatives and their gradients from Python: a call, checked, as plain fa_rows for the driver
(kernels/drive_rows.c)."""
import numpy as np

cimport numpy as cnp
from fastattn._checks cimport (accumulation, as_array, checked_out, checked_threads, flag, floating, integer,
                               same_place, shape_of, storage_of)
from fastattn._rows cimport ROW_GRAD, ROW_MASK, ROW_OPERANDS, ROW_OUT, ROW_X
from fastattn._runtime cimport (FA_F32, FA_F64, FA_ROW_ENTMAX15, FA_ROW_ENTMAX15_BACK, FA_ROW_LOG_SOFTMAX,
                                FA_ROW_LOG_SOFTMAX_BACK, FA_ROW_LOGSUMEXP, FA_ROW_LOGSUMEXP_BACK, FA_ROW_SOFTMAX,
                                FA_ROW_SOFTMAX_BACK, FA_ROW_SPARSEMAX, FA_ROW_SPARSEMAX_BACK, fa_axes, fa_join_axes,
                                fa_row_function, fa_rows, run_rows)
from fastattn._vjp cimport read_gradient

cnp.import_array()


cdef class Rows:
    """One call, checked."""

    cdef fa_rows rows
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


cdef Rows read_rows(fa_row_function function, object x, object axis, object mask, object out, object num_threads,
                    object keepdims=False, object grad_out=None):
    """grad_out: only for gradients; x is then what the function returned, or, for logsumexp, what it was given."""
    cdef Rows p = Rows.__new__(Rows)
    cdef fa_rows *r = &p.rows
    cdef bint back = function >= FA_ROW_SOFTMAX_BACK
    cdef str name = "output" if back and function != FA_ROW_LOGSUMEXP_BACK else "x"
    cdef cnp.ndarray a = floating(x, name), g = None, m = None, o
    cdef int ndim = cnp.PyArray_NDIM(a), i, k, n
    cdef tuple axes = checked_axes(axis, ndim, name)
    cdef fa_axes *to
    cdef bint keep = flag(keepdims, "keepdims")
    cdef list operands = [None] * <int> ROW_OPERANDS
    r.function = function
    p.num_threads = checked_threads(num_threads)
    r.dtypes[<int> ROW_X] = storage_of(a, name)
    r.real = FA_F64 if r.dtypes[<int> ROW_X] == FA_F64 else FA_F32
    r.single = -1
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
        r.dtypes[<int> ROW_GRAD] = storage_of(g, "grad_out")
        # Each element is read before its place is written: out may be one of them, but not shifted.
        if function == FA_ROW_LOGSUMEXP_BACK or not same_place(out, g):
            inputs.append(g)
            names.append("grad_out")
        if function != FA_ROW_LOGSUMEXP_BACK and same_place(out, a):
            inputs, names = inputs[1:], names[1:]
        if isinstance(out, np.ndarray) and out.dtype == accumulation(r.real):
            dtype = out.dtype
    elif function == FA_ROW_LOGSUMEXP:
        shape, dtype, same_allowed = row_shape, accumulation(r.real), False
    p.answer = o = checked_out(out, shape, dtype, inputs, tuple(names), same_allowed)
    r.dtypes[<int> ROW_OUT] = storage_of(o, "out")
    if function == FA_ROW_LOGSUMEXP:
        r.single = ROW_OUT
        o = o if keep else np.expand_dims(o, axes)
    if function == FA_ROW_LOGSUMEXP_BACK:
        r.single = ROW_GRAD
        g = g if keep else np.expand_dims(g, axes)
    operands[<int> ROW_X], operands[<int> ROW_GRAD], operands[<int> ROW_MASK], operands[<int> ROW_OUT] = a, g, m, o
    p.kept = operands
    r.aligned = True
    for k in range(<int> ROW_OPERANDS):
        r.data[k] = NULL if operands[k] is None else <char *> cnp.PyArray_DATA(operands[k])
        if k != ROW_MASK and operands[k] is not None and not cnp.PyArray_ISALIGNED(operands[k]):
            r.aligned = False
    r.row.count = r.batch.count = 0
    r.length = r.rows = 1
    for i in range(ndim):
        to = &r.row if i in axes else &r.batch
        if i in axes:
            r.length *= cnp.PyArray_DIM(a, i)
        else:
            r.rows *= cnp.PyArray_DIM(a, i)
        n = to.count
        to.shape[n] = cnp.PyArray_DIM(a, i)
        for k in range(<int> ROW_OPERANDS):
            to.strides[k][n] = 0
            if operands[k] is not None and not (k == r.single and i in axes):
                to.strides[k][n] = cnp.PyArray_STRIDE(operands[k], i)
        to.count += 1
    fa_join_axes(&r.row)
    fa_join_axes(&r.batch)
    return p


cdef object run(Rows p):
    run_rows(&p.rows, p.num_threads)
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
