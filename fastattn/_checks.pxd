# Checks of arguments, each written once.
cimport numpy as cnp
from libc.stdint cimport int64_t

from fastattn._runtime cimport fa_dtype

# Positions and windows are clipped to this: larger ones mean the same, and sums of three stay within 64 bits.
cdef int64_t FAR

# Arrays
cpdef cnp.ndarray as_array(object x, str name, str instead=*)
cpdef cnp.ndarray converted(cnp.ndarray a, object dtype)
cdef fa_dtype storage_of(cnp.ndarray a, str name) except *
cpdef cnp.ndarray floating(object x, str name)
cpdef object common_dtype(list dtypes, tuple names)
cdef object promoted(list arrays, tuple names, fa_dtype *storage)
cdef object accumulation(fa_dtype dtype)
cdef tuple shape_of(cnp.ndarray a)
cdef object too_few_axes(str name, tuple shape, str wanted)

# Numbers
cpdef double real(object x, str name, str allowed, bint positive=*) except? -1.0
cpdef object integer(object x, str name, str allowed, object least=*, object most=*)
cpdef bint is_one_number(object x) except -1
cdef object checked_threads(object num_threads)
cdef bint flag(object x, str name) except -1
cpdef cnp.ndarray integer_array(object x, str name, str allowed, str kinds=*)
cdef cnp.ndarray integers(object x, str name, tuple batch, object least, object most, int64_t *scalar)

# Memory
cdef int refuse_overlap(object out, tuple inputs, tuple names, str called=*) except -1
cdef bint same_place(object out, cnp.ndarray a) except -1
cpdef object empty(tuple shape, dtype, str what=*, bint zero=*)
cpdef cnp.ndarray checked_out(object out, tuple shape, dtype, list inputs, tuple names, bint same_allowed=*,
                              str called=*, str whose=*)
