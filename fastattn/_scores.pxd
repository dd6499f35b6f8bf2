cimport numpy as cnp

from fastattn._call cimport Problem
from fastattn._rules cimport Rules
from fastattn._runtime cimport fa_dtype

# The keys of additive scores, projected, and what is computed of them alone.
cdef class PreparedKeys:
    cdef readonly cnp.ndarray key
    cdef readonly object dtype
    cdef cnp.ndarray found
    cdef object __weakref__

cdef PreparedKeys prepare_additive(object key, object w_key, object num_threads)
cdef Problem read_additive(object query, object key, object value, object w_score, object w_query, object w_key,
                           object b_hidden, Rules r)
cdef Problem read_bilinear(object query, object key, object value, object w_query, object w_key, object b_query,
                           object b_key, Rules r)
cdef tuple projected_back(cnp.ndarray d, cnp.ndarray x, cnp.ndarray w, fa_dtype dtype, object d_x, bint of_w, bint of_b)
