"""Layers from Python: calls of Linear and of norms, checked, as plain fa_dense and fa_norm for the drivers
(kernels/drive_dense.c)."""
import mmap

import numpy as np

cimport numpy as cnp
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from fastattn._checks cimport (accumulation, checked_out, checked_threads, common_dtype, converted, empty, flag,
                               floating, real, same_place, shape_of, storage_of)
from fastattn._runtime cimport (FA_DENSE_FEW, FA_DENSE_GELU, FA_DENSE_GELU_TANH, FA_DENSE_NOTHING, FA_DENSE_RELU,
                                FA_DENSE_SILU, FA_F32, FA_F64, FA_I8, fa_dense, fa_dense_activation, fa_dtype, fa_norm,
                                fa_view, kernels_for, run_dense, run_norm)

cnp.import_array()

FEW = FA_DENSE_FEW


# Rows of an array

cdef int64_t count_rows(cnp.ndarray a) noexcept:
    """Of channels: the product of all axes but the last."""
    cdef int64_t rows = 1
    cdef int i
    for i in range(cnp.PyArray_NDIM(a) - 1):
        rows *= cnp.PyArray_DIM(a, i)
    return rows


cdef bint view_rows(cnp.ndarray a, fa_view *view) noexcept:
    """Whether rows are evenly spaced in memory, and the view of them; the dtype is set by the caller."""
    cdef int last = cnp.PyArray_NDIM(a) - 1, i
    cdef Py_ssize_t step = 0
    cdef int64_t count = 1
    for i in range(last - 1, -1, -1):
        if cnp.PyArray_DIM(a, i) == 1:
            continue
        if count == 1:
            step = cnp.PyArray_STRIDE(a, i)
        elif cnp.PyArray_STRIDE(a, i) != step * count:
            return False
        count *= cnp.PyArray_DIM(a, i)
    view.data = <char *> cnp.PyArray_DATA(a)
    view.row = step
    view.col = cnp.PyArray_STRIDE(a, last)
    view.head = 0
    return True


cdef cnp.ndarray placed(cnp.ndarray a, str name, fa_view *view):
    """The array, or a copy whose rows are evenly spaced, and its view."""
    view.dtype = storage_of(a, name)
    if not view_rows(a, view):
        a = np.ascontiguousarray(a)
        view_rows(a, view)
    return a


cdef cnp.ndarray place_operand(object x, str name, tuple shape, fa_view *view):
    """An optional array of the result's shape."""
    if x is None:
        return None
    cdef cnp.ndarray a = floating(x, name)
    if shape_of(a) != shape:
        raise ValueError(f"{name} has shape {shape_of(a)}; it must have the result's, {shape}: it does not broadcast")
    return placed(a, name, view)


cdef tuple scattered_out(cnp.ndarray out, fa_view *view):
    """Where the result is written first: in `out`, or in an array of its own if the rows of `out` are not evenly
    spaced."""
    view.dtype = storage_of(out, "out")
    if view_rows(out, view):
        return out, False
    cdef cnp.ndarray own = empty(shape_of(out), out.dtype)
    view_rows(own, view)
    return own, True


# Linear

cdef dict ACTIVATIONS = {
    None: FA_DENSE_NOTHING,
    "relu": FA_DENSE_RELU,
    "gelu": FA_DENSE_GELU,
    "gelu_tanh": FA_DENSE_GELU_TANH,
    "silu": FA_DENSE_SILU,
}


cdef fa_dense_activation read_activation(object activation) except *:
    try:
        return ACTIVATIONS[activation]
    except (KeyError, TypeError):
        names = ", ".join([repr(name) for name in ACTIVATIONS])
        raise ValueError(f"activation must be one of {names}, not {activation!r}") from None


cdef enum:
    LINE = 64
    HUGE_PAGE = 1 << 21


cdef object huge_pages(object size):
    """Zeros in memory of its own, in pages of 2 MB if the system has them, but for an end that would use little of its
    page; else None. A matrix is read a third faster from them than from pages of 4 KB."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    pages = (size + HUGE_PAGE - 1) // HUGE_PAGE
    if pages * HUGE_PAGE - size > size // 4:
        pages -= 1
    try:
        memory = mmap.mmap(-1, size + 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE
        memory.madvise(mmap.MADV_HUGEPAGE, start, pages * HUGE_PAGE)
    except (OSError, ValueError, OverflowError):
        return None
    return np.frombuffer(memory, np.uint8)[start:start + size]


cdef cnp.ndarray aligned(tuple shape, object dtype):
    """Zeros that begin at a line of the cache."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    bytes_of = huge_pages(size) if size >= HUGE_PAGE else None
    cdef cnp.ndarray memory
    if bytes_of is None:
        memory = empty((size + LINE,), np.dtype(np.uint8), "a packed matrix", True)
        start = -<size_t> cnp.PyArray_DATA(memory) % LINE
        bytes_of = (<object> memory)[start:start + size]
    return bytes_of.view(dtype).reshape(shape)


cdef int pack(cnp.ndarray w, cnp.ndarray panels, int width) except -1:
    """Copies (d_in, d_out) into panels of columns, which are zeros past d_out."""
    cdef int64_t d_in = cnp.PyArray_DIM(w, 0), d_out = cnp.PyArray_DIM(w, 1), p, k, n
    cdef Py_ssize_t size = cnp.PyArray_ITEMSIZE(w), row = cnp.PyArray_STRIDE(w, 0)
    cdef const char *source = <const char *> cnp.PyArray_DATA(w)
    cdef char *to = <char *> cnp.PyArray_DATA(panels)
    if w.dtype == panels.dtype and cnp.PyArray_STRIDE(w, 1) == size:
        for p in range((d_out + width - 1) // width):
            n = width if d_out - p * width >= width else d_out - p * width
            for k in range(d_in):
                memcpy(to + (p * d_in + k) * width * size, source + k * row + p * width * size, n * size)
        return 0
    with np.errstate(all="ignore"):
        for p in range((d_out + width - 1) // width):
            part = (<object> w)[:, p * width:(p + 1) * width]
            (<object> panels)[p, :, :part.shape[1]] = part
    return 0


cdef cnp.ndarray of_columns(object x, int64_t d_out, int64_t columns, object dtype):
    """A number for each column, then zeros."""
    cdef cnp.ndarray padded = aligned((columns,), dtype)
    with np.errstate(all="ignore"):
        (<object> padded)[:d_out] = x
    return padded


cdef class Matrix:
    """A matrix in the panels of the kernels for `wanted`, its bias and, of int8 numbers, the scale of each column.
    Nobody writes to them: calls in several threads may use them."""

    def __init__(self, cnp.ndarray w, bias, wanted, scale=None):
        cdef int width
        self.dtype = wanted
        self.computed = FA_F64 if wanted == np.float64 else FA_F32
        width = kernels_for(self.computed).tuning.panel
        d_in, d_out = shape_of(w)
        count = (d_out + width - 1) // width
        self.panels = aligned((count, d_in, width), wanted)
        pack(w, self.panels, width)
        dtype = np.dtype(accumulation(self.computed))
        if bias is not None:
            self.padded = of_columns(bias, d_out, count * width, dtype)
            self.dense.bias = cnp.PyArray_DATA(self.padded)
        if scale is not None:
            self.scales = of_columns(scale, d_out, count * width, dtype)
            self.dense.scale = cnp.PyArray_DATA(self.scales)
        self.dense.d_in, self.dense.d_out = self.d_in, self.d_out = d_in, d_out
        self.dense.panels = cnp.PyArray_DATA(self.panels)
        self.dense.dtype = FA_I8 if wanted == np.int8 else storage_of(self.panels, "weight")

    @property
    def bias(self):
        """In the dtype of the sums; None: there is none."""
        return None if self.padded is None else (<object> self.padded)[:self.d_out].copy()

    @property
    def nbytes(self):
        """Bytes of all that it keeps."""
        return sum([a.nbytes for a in (self.panels, self.padded, self.scales) if a is not None])

    def unpacked(self):
        """The matrix as it was given, in an array of its own."""
        panels = self.panels
        count, d_in, width = shape_of(self.panels)
        return np.ascontiguousarray(panels.transpose(1, 0, 2).reshape(d_in, count * width)[:, :self.d_out])


def dense_dtypes(cnp.ndarray x, object weight_dtype):
    """The dtype of the result, and that in which the panels of its kernels are stored."""
    result = weight_dtype if x.dtype == weight_dtype else common_dtype([x.dtype, weight_dtype], ("x", "weight"))
    if result == np.float64:
        return result, result
    return result, weight_dtype


cpdef cnp.ndarray dense(Matrix matrix, cnp.ndarray x, object result, activation, multiply, residual, out, num_threads):
    """x times the matrix and what follows; x is checked, and `result` the dtype for it and the weight."""
    cdef fa_dense d = matrix.dense
    cdef tuple shape
    cdef cnp.ndarray m, a, o, own
    cdef bint apart
    cdef list inputs
    cdef int last = cnp.PyArray_NDIM(x) - 1
    d.activation = FA_DENSE_NOTHING if activation is None else read_activation(activation)
    num_threads = checked_threads(num_threads)
    shape = shape_of(x)[:last] + (d.d_out,)
    m = place_operand(multiply, "multiply", shape, &d.multiply)
    a = place_operand(residual, "residual", shape, &d.residual)
    if out is None:
        o = empty(shape, result)
    else:
        inputs, names = [x], ["x"]
        for given, array, name in ((multiply, m, "multiply"), (residual, a, "residual")):
            if array is not None and not (given is out or same_place(out, array)):
                inputs.append(array)
                names.append(name)
        o = checked_out(out, shape, result, inputs, tuple(names))
    x = placed(x, "x", &d.x)
    own, apart = scattered_out(o, &d.out)
    d.rows = count_rows(x)
    run_dense(&d, matrix.computed, num_threads)
    if apart:
        o[...] = own
    return o


# Norms

cdef cnp.ndarray of_channels(object x, str name, int64_t n, object dtype):
    """An optional weight or bias, contiguous, in the dtype of the computation."""
    if x is None:
        return None
    cdef cnp.ndarray a = floating(x, name)
    if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_DIM(a, 0) != n:
        raise ValueError(f"{name} has shape {shape_of(a)}; it must be ({n},), one for each channel of x")
    if a.dtype == dtype and cnp.PyArray_IS_C_CONTIGUOUS(a) and cnp.PyArray_ISALIGNED(a):
        return a
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(converted(a, dtype))


def norm(bint centred, x, weight, bias, eps, offset, residual, return_sum, out, num_threads):
    cdef fa_norm p
    cdef cnp.ndarray a = floating(x, "x"), w, b, r, o, own, s = None
    cdef bint apart, keep = flag(return_sum, "return_sum")
    cdef tuple shape = shape_of(a)
    cdef fa_dtype computed
    cdef list inputs
    memset(&p, 0, sizeof(p))
    if cnp.PyArray_NDIM(a) == 0:
        raise ValueError("x has shape (); it needs an axis of channels, (..., channels)")
    computed = FA_F64 if storage_of(a, "x") == FA_F64 else FA_F32
    p.centred = centred
    p.n = cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1)
    p.rows = count_rows(a)
    p.eps = real(eps, "eps", "a finite number of at least 0")
    if not 0 <= p.eps:
        raise ValueError(f"eps must be a finite number of at least 0, not {eps!r}")
    p.offset = real(offset, "offset", "a finite number")
    num_threads = checked_threads(num_threads)
    dtype = accumulation(computed)
    w = of_channels(weight, "weight", p.n, dtype)
    b = of_channels(bias, "bias", p.n, dtype)
    p.weight = NULL if w is None else cnp.PyArray_DATA(w)
    p.bias = NULL if b is None else cnp.PyArray_DATA(b)
    if residual is not None:
        r = floating(residual, "residual")
        if shape_of(r) != shape:
            raise ValueError(f"residual has shape {shape_of(r)}; it must have x's, {shape}: it does not broadcast")
        storage_of(r, "residual")
    else:
        r = None
    if out is None:
        o = empty(shape, a.dtype)
    else:
        inputs, names = [], []
        for array, name in ((a, "x"), (r, "residual")):
            if array is not None and not same_place(out, array):
                inputs.append(array)
                names.append(name)
        for array, name in ((w, "weight"), (b, "bias")):
            if array is not None:
                inputs.append(array)
                names.append(name)
        o = checked_out(out, shape, a.dtype, inputs, tuple(names))
    if keep:
        s = empty(shape, a.dtype)
        p.sum.dtype = storage_of(s, "x")
        view_rows(s, &p.sum)
    a = placed(a, "x", &p.x)
    if r is not None:
        r = placed(r, "residual", &p.residual)
    own, apart = scattered_out(o, &p.out)
    run_norm(&p, computed, num_threads)
    if apart:
        o[...] = own
    return (o, s) if keep else o
