# cython: wraparound=True
"""The driver of merge_attention: checks the parts of the key axis and distributes their rows over threads."""
import numpy as np

cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uintptr_t

from fastattn._checks cimport accumulation, common_dtype, floating, storage_of, too_few_axes
from fastattn._rows cimport real_size, size_of
from fastattn._runtime cimport (Team, Watch, allowed_threads, fa_dtype, fa_kernels, gathered, give_workspace,
                                interrupted, join_team, kernels_for, raise_pending, take_workspace)

cnp.import_array()

cdef enum:
    SMALL = 1 << 14        # elements below which threads cost more than they gain


# Address, dtype and byte strides of each part.
cdef class Parts:
    cdef Py_ssize_t parts, rows, value_dim
    cdef fa_dtype dtype                         # of the result
    cdef const int64_t[::1] shape               # all axes but value's
    cdef const int64_t[::1] out_at, lse_at      # addresses
    cdef const int64_t[::1] out_dtype, lse_dtype
    cdef const int64_t[:, ::1] out_strides      # one axis more than shape: value's
    cdef const int64_t[:, ::1] lse_strides
    cdef list kept
    cdef readonly object out, lse


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
    p.out = np.empty(shape, dtype)
    p.dtype = storage_of(p.out, "outs")
    p.lse = np.empty(shape[:-1], accumulation(p.dtype))
    p.parts = len(out_arrays)
    p.rows = p.lse.size
    p.value_dim = shape[len(shape) - 1]
    p.shape = np.array(shape[:-1], np.int64)
    p.out_at = np.array([a.ctypes.data for a in out_arrays], np.int64)
    p.lse_at = np.array([a.ctypes.data for a in lse_arrays], np.int64)
    p.out_strides = np.array([a.strides for a in out_arrays], np.int64)
    p.lse_strides = np.array([a.strides for a in lse_arrays], np.int64)
    p.out_dtype = np.array([<int> storage_of(a, "outs") for a in out_arrays], np.int64)
    p.lse_dtype = np.array([<int> storage_of(a, "lses") for a in lse_arrays], np.int64)
    p.kept = [out_arrays, lse_arrays]
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


cdef void merge_row(Parts p, const fa_kernels *kernels, Py_ssize_t row, char *out, char *lse,
                    char *scratch) noexcept nogil:
    """scratch: parts pointers, then parts numbers, then parts rows, in the accumulation dtype."""
    cdef Py_ssize_t size = real_size(p.dtype), part, index, rest
    cdef const void **pointers = <const void **> scratch
    cdef char *lses = scratch + p.parts * sizeof(void *)
    cdef char *rows = lses + p.parts * size
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
    kernels.merge(out, lse, pointers, lses, p.parts, p.value_dim)


cdef void merge_rows(Parts p, const fa_kernels *kernels, char *out, char *lse, char *scratch, size_t scratch_size,
                     int threads, Watch *watch) noexcept nogil:
    cdef Py_ssize_t row, real = real_size(p.dtype)
    cdef char *mine
    cdef char *merged
    cdef Team team = gathered(threads)
    with nogil, parallel(num_threads=team.threads):
        join_team(&team)
        for row in prange(p.rows, schedule="static"):
            if interrupted(watch, threadid() == 0):
                continue
            mine = scratch + threadid() * scratch_size
            merged = mine + p.parts * (sizeof(void *) + real + p.value_dim * real)
            merge_row(p, kernels, row, merged, lse + row * real, mine)
            kernels.scatter(out + row * p.value_dim * size_of(p.dtype), size_of(p.dtype), merged, p.value_dim, p.dtype)


def merge_attention(outs, lses):
    cdef Parts p = read_parts(outs, lses)
    cdef const fa_kernels *kernels = kernels_for(p.dtype)
    cdef Py_ssize_t real = real_size(p.dtype)
    cdef double numbers = <double> p.rows * p.parts * p.value_dim
    cdef int threads = 1 if numbers < SMALL else allowed_threads(None)
    cdef size_t size = (p.parts * (sizeof(void *) + real) + (p.parts + 1) * p.value_dim * real + 63) // 64 * 64
    cdef char *out = cnp.PyArray_BYTES(p.out)
    cdef char *lse = cnp.PyArray_BYTES(p.lse)
    cdef char *scratch
    cdef Watch watch = Watch(0, 0)
    if p.rows == 0:
        return p.out, p.lse
    scratch = <char *> take_workspace(size * threads, 8.0 * threads * (p.parts + 2) * (p.value_dim + 2))
    with nogil:
        merge_rows(p, kernels, out, lse, scratch, size, threads, &watch)
    give_workspace(scratch)
    if watch.stop:
        raise_pending()
    return p.out, p.lse
