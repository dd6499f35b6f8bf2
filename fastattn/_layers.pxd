cimport numpy as cnp
from libc.stdint cimport int64_t

from fastattn._runtime cimport fa_dense, fa_dtype


cdef class Matrix:
    cdef fa_dense dense
    cdef fa_dtype computed
    cdef cnp.ndarray panels, padded, scales
    cdef readonly object dtype
    cdef readonly int64_t d_in, d_out


cpdef cnp.ndarray dense(Matrix matrix, cnp.ndarray x, object result, activation, multiply, residual, out, num_threads)
