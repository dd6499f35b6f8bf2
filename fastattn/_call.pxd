# One plain description of an attention problem, for the driver.
cimport numpy as cnp
from libc.stdint cimport int64_t

from fastattn._rules cimport Rules
from fastattn._runtime cimport (FA_BIAS, FA_KEY, FA_LSE, FA_MASK, FA_OPERANDS, FA_OUT, FA_QUERY, FA_RELATIVE_BIAS,
                                FA_ROW_AXES, FA_SINKS, FA_SLOPES, FA_VALUE, FA_WEIGHTS, fa_dtype, fa_head, fa_problem)

cdef enum:
    MOST_AXES = FA_ROW_AXES

# The arrays of a call whose address changes from head to head.
cdef enum Operand:
    QUERY = FA_QUERY
    KEY = FA_KEY
    VALUE = FA_VALUE
    MASK = FA_MASK
    BIAS = FA_BIAS
    RELATIVE_BIAS = FA_RELATIVE_BIAS
    OUT = FA_OUT
    WEIGHTS = FA_WEIGHTS
    LSE = FA_LSE
    SLOPES = FA_SLOPES
    SINKS = FA_SINKS
    # Numbers of a head, which kernels get as such.
    KEY_LENGTHS = FA_OPERANDS
    QUERY_LENGTHS
    OFFSETS
    KEYS_BEFORE
    OPERANDS


cdef struct Shape:
    int axes
    const cnp.npy_intp *size


cdef struct Layout:
    char *data                    # NULL: not given
    fa_dtype dtype
    Py_ssize_t row, col           # byte strides of the last two axes
    Py_ssize_t batch[MOST_AXES]   # byte strides of the batch axes, 0 where the operand is broadcast


cdef class Problem:
    cdef fa_problem shared                # what the kernels need to know of all heads
    cdef fa_head sizes                    # the parts of a head that do not change from head to head
    cdef int axes                         # batch axes; with grouped heads the head axis counts as two
    cdef Py_ssize_t shape[MOST_AXES]      # their sizes
    cdef Py_ssize_t heads                 # their product
    cdef Py_ssize_t group                 # query heads that share a key head
    cdef Layout *layouts                  # [OPERANDS]; of its own, because it need not be cleared
    cdef int operands[<int> OPERANDS]     # those that are given
    cdef int operand_count
    cdef int64_t longest_query, longest_key
    cdef bint offset_is_default           # the last query lines up with the last valid key
    # Packed sequences: where each begins in queries and keys, one number more than there are.
    cdef bint packed
    cdef const int64_t[::1] query_starts
    cdef const int64_t[::1] key_starts
    cdef Py_ssize_t sequences
    cdef object num_threads
    cdef object score_weights             # the array that shared.score_weights points to
    cdef object dtype                     # of the result
    cdef list kept                        # keeps the arrays alive that the layouts point to
    cdef readonly object out, weights, lse

    cdef object result(self)
    cdef void locate(self, Py_ssize_t head, Py_ssize_t sequence, fa_head *to) noexcept nogil


cdef Problem new_problem()
cdef Problem read_call(Problem p, cnp.ndarray query, cnp.ndarray key, cnp.ndarray value, tuple inputs, tuple names,
                       const Rules *r, object keys_before)
cdef Problem read_dot_product(object query, object key, object value, Rules r, object keys_before=*, bint packed=*)
cdef Problem read_varlen(object query, object key, object value, object cu_seqlens_q, object cu_seqlens_k, Rules r)
cdef tuple checked_sides(object left, object right)
