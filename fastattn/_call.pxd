# A call of attention as plain C (fa_call), and its owner.
cimport numpy as cnp
from libc.stdint cimport int64_t

from fastattn._rules cimport Rules
from fastattn._runtime cimport fa_call, fa_dtype, fa_layout

cdef struct Shape:
    int axes
    const cnp.npy_intp *size


# A call, and what it needs of Python: the arrays that it points to, and its results.
cdef class Problem:
    cdef fa_call *call                    # of its own
    cdef object num_threads
    cdef object score_weights             # the array that call.problem.score_weights points to
    cdef object prepared                  # of the keys, or None: as (..., bytes), with the batch axes of key
    cdef tuple quantized                  # key_scale, value_scale and key_center of int8 keys and values, or None
    cdef object dtype                     # of the result
    cdef list kept                        # keeps the arrays alive that the call points to
    cdef readonly object out, weights, lse

    cdef object result(self)


cdef Problem new_problem()
cdef int read_shapes(fa_call *call, Shape query, Shape key, Shape value, bint grouped) except -1
cdef int read_integers(Problem p, int operand, object x, str name, tuple batch, object least, object most,
                       int64_t *scalar) except -1
cdef int lay_out(fa_layout *layout, int axes, cnp.ndarray a, int trailing) except -1
cdef tuple batch_shape(fa_call *call)
cdef int read_activation(fa_call *call, object activation, object sinks, bint return_lse) except -1
cdef Problem read_call(Problem p, cnp.ndarray query, cnp.ndarray key, cnp.ndarray value, tuple inputs, tuple names,
                       const Rules *r, object keys_before)
cdef Problem read_dot_product(object query, object key, object value, Rules r, object keys_before=*,
                              cnp.ndarray own=*, tuple quantized=*)
cdef Problem read_varlen(object query, object key, object value, object cu_seqlens_q, object cu_seqlens_k, Rules r,
                         cnp.ndarray own=*)
cdef tuple checked_sides(object left, object right)
