cimport numpy as cnp

from fastattn._call cimport Problem
from fastattn._rules cimport Rules
from fastattn._runtime cimport fa_dtype

cdef Problem read_additive(object query, object key, object value, object w_score, object w_query, object w_key,
                           object b_hidden, Rules r)
cdef Problem read_bilinear(object query, object key, object value, object w_query, object w_key, object b_query,
                           object b_key, Rules r)
cdef tuple projected_back(cnp.ndarray d, cnp.ndarray x, cnp.ndarray w, fa_dtype dtype, object d_x, bint of_w, bint of_b)
