# cython: wraparound=True
"""The driver of merge_attention and its gradient: checks the parts of the key axis and distributes their rows over
threads."""
import math

import numpy as np

cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memset

from fastattn._checks cimport accumulation, common_dtype, empty, floating, storage_of, too_few_axes
from fastattn._runtime cimport (Team, Watch, allowed_threads, fa_dtype, fa_kernels, fa_real_size, fa_size_of, gathered,
                                give_workspace, interrupted, join_team, kernels_for, raise_pending, take_workspace)
from fastattn._vjp cimport read_gradient

cnp.import_array()

cdef enum:
    SMALL = 1 << 14        # elements below which threads cost more than they gain


# Address, dtype and byte strides of each part.
cdef class Parts:
    cdef Py_ssize_t parts, rows, value_dim
    cdef fa_dtype dtype                         # to which the parts promote
    cdef object out_shape, result_dtype         # of the result
    cdef const int64_t[::1] shape               # all axes but value's
    cdef const int64_t[::1] out_at, lse_at      # addresses
    cdef const int64_t[::1] out_dtype, lse_dtype
    cdef const int64_t[:, ::1] out_strides      # one axis more than shape: value's
    cdef const int64_t[:, ::1] lse_strides
    cdef list outs, lses


cdef Parts read_parts(object outs, object lses):
    """Checks the parts of the key axis: outs, each (..., L, E), and lses, each (..., L)."""
    cdef Parts p = Parts.__new__(Parts)
    for x, name in ((outs, "outs"), (lses, "lses")):
        if not isinstance(x, (list, tuple)) and not (isinstance(x, np.ndarray) and x.ndim):
            raise TypeError(f"{name} must be a sequence of arrays, one for each part, not {type(x).__name__}")
    if len(outs) != len(lses) or len(outs) == 0:
        raise ValueError(f"outs and lses must have one array for each part, and at least one: they have {len(outs)} "
                         f"and {len(lses)}")
    out_arrays = [floating(x, f"outs[{i}]") for i, x in enumerate(outs)]
    lse_arrays = [floating(x, f"lses[{i}]") for i, x in enumerate(lses)]
    dtype = common_dtype([a.dtype for a in out_arrays], tuple([f"outs[{i}]" for i in range(len(outs))]))
    shape = out_arrays[0].shape
    for i in range(len(out_arrays)):
        if out_arrays[i].ndim < 2:
            raise too_few_axes(f"outs[{i}]", out_arrays[i].shape, "(..., L, E)")
        if out_arrays[i].shape != shape:
            raise ValueError(f"outs[{i}] has shape {out_arrays[i].shape}; all parts must have the same shape "
                             f"(..., L, E), and outs[0] has {shape}")
        if lse_arrays[i].shape != shape[:-1]:
            raise ValueError(f"lses[{i}] has shape {lse_arrays[i].shape}; to fit outs it must be {shape[:-1]}")
    p.out_shape, p.result_dtype = shape, dtype
    p.dtype = storage_of(np.empty(0, dtype), "outs")
    p.parts = len(out_arrays)
    p.value_dim = shape[len(shape) - 1]
    p.rows = math.prod(shape[:-1])
    p.shape = np.array(shape[:-1], np.int64)
    p.out_at = np.array([a.ctypes.data for a in out_arrays], np.int64)
    p.lse_at = np.array([a.ctypes.data for a in lse_arrays], np.int64)
    p.out_strides = np.array([a.strides for a in out_arrays], np.int64)
    p.lse_strides = np.array([a.strides for a in lse_arrays], np.int64)
    p.out_dtype = np.array([<int> storage_of(a, "outs") for a in out_arrays], np.int64)
    p.lse_dtype = np.array([<int> storage_of(a, "lses") for a in lse_arrays], np.int64)
    p.outs, p.lses = out_arrays, lse_arrays
    return p


cdef void empty_part(char *lse, const char *row, Py_ssize_t value_dim, bint is_double) noexcept nogil:
    """FlashAttention marks a part without keys by lse +inf and an output of zeros; here it becomes -inf."""
    cdef Py_ssize_t i
    if (<double *> lse)[0] != INFINITY if is_double else (<float *> lse)[0] != INFINITY:
        return
    for i in range(value_dim):
        if (<const double *> row)[i] != 0 if is_double else (<const float *> row)[i] != 0:
            return
    if is_double:
        (<double *> lse)[0] = -INFINITY
    else:
        (<float *> lse)[0] = -INFINITY


cdef void read_row(Parts p, const fa_kernels *kernels, Py_ssize_t row, const void **pointers, char *lses,
                   char *rows) noexcept nogil:
    """A row of all parts, in the accumulation dtype."""
    cdef Py_ssize_t size = fa_real_size(p.dtype), part, index, rest
    cdef const char *out_part
    cdef const char *lse_part
    cdef int axis
    for part in range(p.parts):
        out_part = <const char *> <uintptr_t> p.out_at[part]
        lse_part = <const char *> <uintptr_t> p.lse_at[part]
        rest = row
        for axis in range(p.shape.shape[0] - 1, -1, -1):
            index = rest % p.shape[axis]
            rest //= p.shape[axis]
            out_part += index * p.out_strides[part, axis]
            lse_part += index * p.lse_strides[part, axis]
        kernels.gather(lses + part * size, lse_part, size, 1, <fa_dtype> p.lse_dtype[part])
        kernels.gather(rows + part * p.value_dim * size, out_part, p.out_strides[part, p.shape.shape[0]], p.value_dim,
                       <fa_dtype> p.out_dtype[part])
        empty_part(lses + part * size, rows + part * p.value_dim * size, p.value_dim, size == 8)
        pointers[part] = rows + part * p.value_dim * size


cdef void merge_rows(Parts p, const fa_kernels *kernels, char *out, char *lse, char *scratch, size_t scratch_size,
                     int threads, Watch *watch) noexcept nogil:
    """scratch of a thread: a pointer, a number and a row for each part, and a row more."""
    cdef Py_ssize_t row, real = fa_real_size(p.dtype)
    cdef char *mine
    cdef char *lses
    cdef char *merged
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for row in prange(p.rows, schedule="static"):
            if interrupted(watch, threadid() == 0):
                continue
            mine = scratch + threadid() * scratch_size
            lses = mine + p.parts * sizeof(void *)
            merged = lses + p.parts * (real + p.value_dim * real)
            read_row(p, kernels, row, <const void **> mine, lses, lses + p.parts * real)
            kernels.merge(merged, lse + row * real, <const void **> mine, lses, p.parts, p.value_dim)
            kernels.scatter(out + row * p.value_dim * fa_size_of(p.dtype), fa_size_of(p.dtype), merged, p.value_dim,
                            p.dtype)


def merge_attention(outs, lses):
    cdef Parts p = read_parts(outs, lses)
    cdef const fa_kernels *kernels = kernels_for(p.dtype)
    cdef Py_ssize_t real = fa_real_size(p.dtype)
    cdef double numbers = <double> p.rows * p.parts * p.value_dim
    cdef int threads = 1 if numbers < SMALL else allowed_threads(None)
    cdef size_t size = (p.parts * (sizeof(void *) + real) + (p.parts + 1) * p.value_dim * real + 63) // 64 * 64
    cdef cnp.ndarray out = empty(p.out_shape, p.result_dtype), lse = empty(p.out_shape[:-1], accumulation(p.dtype))
    cdef char *out_at = cnp.PyArray_BYTES(out)
    cdef char *lse_at = cnp.PyArray_BYTES(lse)
    cdef char *scratch
    cdef Watch watch = Watch(0, 0)
    if p.rows == 0:
        return out, lse
    scratch = <char *> take_workspace(size * threads, 8.0 * threads * (p.parts + 2) * (p.value_dim + 2))
    with nogil:
        merge_rows(p, kernels, out_at, lse_at, scratch, size, threads, &watch)
    give_workspace(scratch)
    if watch.stop:
        raise_pending()
    return out, lse


# The gradients that come in, by their rows, and where those of the parts go: new arrays in C order.
cdef class Back:
    cdef const char *grad_out
    cdef const char *grad_lse                   # or NULL: zeros
    cdef fa_dtype out_dtype, lse_dtype
    cdef const int64_t[::1] out_strides, lse_strides
    cdef const int64_t[::1] outs_at, lses_at    # addresses
    cdef list kept


cdef void back_row(Parts p, Back b, const fa_kernels *kernels, Py_ssize_t row, char *scratch) noexcept nogil:
    """scratch: two pointers, two numbers and two rows for each part, and a row and a number more."""
    cdef Py_ssize_t real = fa_real_size(p.dtype), part, index, rest = row, out_at = 0, lse_at = 0
    cdef const void **outs = <const void **> scratch
    cdef void **grad_outs = <void **> (scratch + p.parts * sizeof(void *))
    cdef char *lses = scratch + 2 * p.parts * sizeof(void *)
    cdef char *grad_lses = lses + p.parts * real
    cdef char *grad_lse = grad_lses + p.parts * real
    cdef char *grad_out = grad_lse + real
    cdef char *rows = grad_out + p.value_dim * real
    cdef fa_dtype dtype
    cdef int axis
    for axis in range(p.shape.shape[0] - 1, -1, -1):
        index = rest % p.shape[axis]
        rest //= p.shape[axis]
        out_at += index * b.out_strides[axis]
        if b.grad_lse != NULL:
            lse_at += index * b.lse_strides[axis]
    kernels.gather(grad_out, b.grad_out + out_at, b.out_strides[p.shape.shape[0]], p.value_dim, b.out_dtype)
    memset(grad_lse, 0, real)
    if b.grad_lse != NULL:
        kernels.gather(grad_lse, b.grad_lse + lse_at, real, 1, b.lse_dtype)
    for part in range(p.parts):
        grad_outs[part] = rows + (p.parts + part) * p.value_dim * real
    read_row(p, kernels, row, outs, lses, rows)
    kernels.merge_back(grad_outs, grad_lses, grad_out, grad_lse, outs, lses, p.parts, p.value_dim)
    for part in range(p.parts):
        dtype = <fa_dtype> p.out_dtype[part]
        kernels.scatter(<char *> <uintptr_t> b.outs_at[part] + row * p.value_dim * fa_size_of(dtype), fa_size_of(dtype),
                        grad_outs[part], p.value_dim, dtype)
        dtype = <fa_dtype> p.lse_dtype[part]
        kernels.scatter(<char *> <uintptr_t> b.lses_at[part] + row * fa_size_of(dtype), fa_size_of(dtype),
                        grad_lses + part * real, 1, dtype)


cdef void back_rows(Parts p, Back b, const fa_kernels *kernels, char *scratch, size_t scratch_size, int threads,
                    Watch *watch) noexcept nogil:
    cdef Py_ssize_t row
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for row in prange(p.rows, schedule="static"):
            if not interrupted(watch, threadid() == 0):
                back_row(p, b, kernels, row, scratch + threadid() * scratch_size)


def merge_attention_vjp(grad_out, outs, lses, grad_lse):
    cdef Parts p = read_parts(outs, lses)
    cdef Back b = Back.__new__(Back)
    cdef const fa_kernels *kernels = kernels_for(p.dtype)
    cdef Py_ssize_t real = fa_real_size(p.dtype)
    cdef double numbers = <double> p.rows * p.parts * p.value_dim
    cdef int threads = 1 if numbers < SMALL else allowed_threads(None)
    cdef size_t size = (2 * p.parts * (sizeof(void *) + real) + (2 * p.parts + 1) * p.value_dim * real + real)
    cdef cnp.ndarray of_out = read_gradient(grad_out, p.out_shape), of_lse
    cdef char *scratch
    cdef Watch watch = Watch(0, 0)
    b.grad_lse = NULL
    b.grad_out, b.out_dtype = cnp.PyArray_BYTES(of_out), storage_of(of_out, "grad_out")
    b.out_strides = np.array((<object> of_out).strides, np.int64)
    b.kept = [of_out]
    if grad_lse is not None:
        of_lse = read_gradient(grad_lse, p.out_shape[:-1], "grad_lse")
        b.grad_lse, b.lse_dtype = cnp.PyArray_BYTES(of_lse), storage_of(of_lse, "grad_lse")
        b.lse_strides = np.array((<object> of_lse).strides, np.int64)
        b.kept.append(of_lse)
    grad_outs = [empty(p.out_shape, a.dtype) for a in p.outs]
    grad_lses = [empty(p.out_shape[:-1], a.dtype) for a in p.lses]
    if p.rows == 0:
        return grad_outs, grad_lses
    b.outs_at = np.array([a.ctypes.data for a in grad_outs], np.int64)
    b.lses_at = np.array([a.ctypes.data for a in grad_lses], np.int64)
    size = (size + 63) // 64 * 64
    scratch = <char *> take_workspace(size * threads, 16.0 * threads * (p.parts + 2) * (p.value_dim + 2))
    with nogil:
        back_rows(p, b, kernels, scratch, size, threads, &watch)
    give_workspace(scratch)
    if watch.stop:
        raise_pending()
    return grad_outs, grad_lses
