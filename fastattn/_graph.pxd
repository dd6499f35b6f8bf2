# A call of attention along edges, as its driver and that of its gradients see it.
from libc.stdint cimport int32_t, int64_t

cimport numpy as cnp

from fastattn._runtime cimport FA_GRAPH_OPERANDS, fa_dtype, fa_graph

cdef enum:
    MOST_AXES = 64
    OPERANDS = FA_GRAPH_OPERANDS


cdef class Call:
    cdef fa_graph graph                             # of the first of the batch; heads that are taken together
    cdef Py_ssize_t strides[OPERANDS][MOST_AXES]    # along the batch axes that are walked
    cdef Py_ssize_t shape[MOST_AXES]
    cdef int axes
    cdef Py_ssize_t outer                           # the product of shape
    cdef Py_ssize_t rows, keys
    cdef fa_dtype dtype                             # to which the arrays promote
    cdef object result_dtype                        # the same
    cdef tuple batch
    cdef object num_threads
    cdef list inputs, names                         # what nothing may overlap that is written
    cdef list kept
    cdef readonly object answer


cdef Call read_inputs(object query, object key, object value, object graph, object w_score, object negative_slope,
                      object edge_bias, object edge_key, object edge_value, object scale, object softcap,
                      object num_threads)
cdef int place(Call p, int operand, cnp.ndarray a, fa_dtype dtype, int trailing) except -1
cdef void take_heads(Call p, bint only_last) noexcept
cdef fa_graph graph_of(Call p, Py_ssize_t item) noexcept nogil
cdef Py_ssize_t row_of_share(const fa_graph *graph, Py_ssize_t rows, int64_t share) noexcept nogil
cdef int64_t index_at(const char *at, int size) noexcept nogil
