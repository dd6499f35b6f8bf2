# A call of attention as plain C (fa_call), and its owner.
cimport numpy as cnp
from libc.stdint cimport int64_t

from fastattn._rules cimport Rules
from fastattn._runtime cimport FA_OPERANDS, FA_ROW_AXES, fa_dtype, fa_gradients, fa_head, fa_problem

cdef extern from "kernels/call.h" nogil:
    enum:
        FA_KEY_LENGTHS
        FA_QUERY_LENGTHS
        FA_OFFSETS
        FA_KEYS_BEFORE
        FA_CALL_OPERANDS

    ctypedef struct fa_layout:
        char *data
        fa_dtype dtype
        Py_ssize_t row, col
        Py_ssize_t batch[FA_ROW_AXES]

    ctypedef struct fa_call:
        fa_problem problem
        fa_head sizes
        int axes
        int64_t shape[FA_ROW_AXES]
        int64_t heads, group
        fa_layout layouts[<int> FA_CALL_OPERANDS]
        int operands[<int> FA_CALL_OPERANDS]
        int operand_count
        int64_t longest_query, longest_key
        int offset_is_default
        const int64_t *query_starts
        const int64_t *key_starts
        int64_t sequences

    int64_t fa_queries_of(const fa_call *call, int64_t sequence)
    void fa_locate(const fa_call *call, int64_t head, int64_t sequence, fa_head *to)
    void fa_locate_gradients(const fa_call *call, const fa_layout *layouts, int64_t head, int64_t sequence,
                             fa_gradients *to)


cdef struct Shape:
    int axes
    const cnp.npy_intp *size


# A call, and what it needs of Python: the arrays that it points to, and its results.
cdef class Problem:
    cdef fa_call *call                    # of its own
    cdef object num_threads
    cdef object score_weights             # the array that call.problem.score_weights points to
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
cdef Problem read_dot_product(object query, object key, object value, Rules r, object keys_before=*)
cdef Problem read_varlen(object query, object key, object value, object cu_seqlens_q, object cu_seqlens_k, Rules r)
cdef tuple checked_sides(object left, object right)
