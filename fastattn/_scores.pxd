from fastattn._call cimport Problem
from fastattn._rules cimport Rules

cdef Problem read_additive(object query, object key, object value, object w_score, object w_query, object w_key,
                           object b_hidden, Rules r)
cdef Problem read_bilinear(object query, object key, object value, object w_query, object w_key, object b_query,
                           object b_key, Rules r)
