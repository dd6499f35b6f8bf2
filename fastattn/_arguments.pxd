# One plain description of an attention problem, for the driver.
from libc.stdint cimport int64_t

from fastattn._runtime cimport (FA_ROW_AXES, FA_ROW_MASK, FA_ROW_OPERANDS, FA_ROW_OUT, FA_ROW_X, fa_axes, fa_dtype,
                                fa_head, fa_problem)

cdef enum:
    MOST_AXES = FA_ROW_AXES

# The arrays of a call whose address changes from head to head.
cdef enum Operand:
    QUERY
    KEY
    VALUE
    MASK
    BIAS
    RELATIVE_BIAS
    OUT
    WEIGHTS
    LSE
    SLOPES
    SINKS
    KEY_LENGTHS
    QUERY_LENGTHS
    OFFSETS
    KEYS_BEFORE
    OPERANDS


cdef struct Layout:
    char *data                    # NULL: not given
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
    cdef bint uneven                      # tiles differ in cost
    cdef bint offset_is_default           # the last query lines up with the last valid key
    # Packed sequences: where each begins in queries and keys, one number more than there are.
    cdef bint packed
    cdef const int64_t[::1] query_starts
    cdef const int64_t[::1] key_starts
    cdef Py_ssize_t sequences
    cdef object num_threads
    cdef object score_weights             # the array that shared.score_weights points to
    cdef list kept                        # keeps the arrays alive that the layouts point to
    cdef readonly object out, weights, lse

    cdef object result(self)
    cdef void locate(self, Py_ssize_t head, Py_ssize_t sequence, fa_head *to) noexcept nogil


cdef tuple checked_sides(object left, object right)
cdef Problem read_dot_product(
    object query, object key, object value, object is_causal, object window_size, object chunk_size,
    object left_chunks, object query_offset, object key_lengths, object query_lengths, object mask, object bias,
    object relative_bias, object alibi_slopes, object scale, object softcap, object sinks, object activation,
    object enable_gqa, object return_weights, object return_lse, object out, object num_threads, bint packed=*,
    object keys_before=*,
)
cdef Problem read_additive(
    object query, object key, object value, object w_score, object w_query, object w_key, object b_hidden,
    object is_causal, object window_size, object chunk_size,
    object left_chunks, object query_offset, object key_lengths, object query_lengths, object mask, object bias,
    object relative_bias, object alibi_slopes, object scale, object softcap, object sinks, object activation,
    object enable_gqa, object return_weights, object return_lse, object out, object num_threads,
)
cdef Problem read_bilinear(
    object query, object key, object value, object w_query, object w_key, object b_query, object b_key,
    object is_causal, object window_size, object chunk_size,
    object left_chunks, object query_offset, object key_lengths, object query_lengths, object mask, object bias,
    object relative_bias, object alibi_slopes, object scale, object softcap, object sinks, object activation,
    object enable_gqa, object return_weights, object return_lse, object out, object num_threads,
)
cdef Problem read_varlen(
    object query, object key, object value, object cu_seqlens_q, object cu_seqlens_k, object is_causal,
    object window_size, object alibi_slopes, object scale, object softcap, object sinks, object activation,
    object enable_gqa, object return_lse, object out, object num_threads,
)


# Rows of one or more axes, for softmax and its relatives: the axes of x split into those of a row and the others,
# neighbours that can be walked as one joined.
cdef enum RowOperand:
    ROW_X = FA_ROW_X
    ROW_MASK = FA_ROW_MASK
    ROW_OUT = FA_ROW_OUT
    ROW_OPERANDS = FA_ROW_OPERANDS


ctypedef fa_axes Axes


cdef class Rows:
    cdef Axes row, batch
    cdef Py_ssize_t length, rows            # numbers in a row; rows
    cdef char *data[<int> ROW_OPERANDS]     # the mask may be NULL
    cdef fa_dtype dtype, out_dtype
    cdef bint aligned                       # x and out: each number at a multiple of its size
    cdef object num_threads
    cdef list kept
    cdef readonly object answer


cdef Rows read_rows(object x, object axis, object mask, object out, object num_threads, bint reduces, object keepdims)


# Rows of pairs that turn by their position. The batch axes are split into those along which positions differ and the
# others, neighbours joined; strides in a mask's place are 0.
cdef class Rotation:
    cdef Axes cells, members                        # along `cells` positions differ, along `members` they do not
    cdef Py_ssize_t cell_count, member_count
    cdef Py_ssize_t length, channels, pairs
    cdef Py_ssize_t row[<int> ROW_OPERANDS]         # byte strides of the last two axes
    cdef Py_ssize_t col[<int> ROW_OPERANDS]
    cdef char *data[<int> ROW_OPERANDS]
    cdef int64_t least, greatest                    # of all positions
    cdef int64_t *positions                         # of all rows of all cells; NULL: least, least + 1, ... of one cell
    cdef double base                                # 0 with frequencies
    cdef const double *frequencies                  # one a pair, or NULL
    cdef double factor                              # of the turned numbers
    cdef bint interleaved
    cdef fa_dtype dtype
    cdef object num_threads
    cdef list kept
    cdef readonly object answer


cdef Rotation read_rotation(object x, object offset, object positions, object base, object frequencies,
                            object attention_factor, object interleaved, object rotary_dim, object out,
                            object num_threads)


# Partial results to merge: address, dtype and byte strides of each part.
cdef class Parts:
    cdef Py_ssize_t parts, rows, value_dim
    cdef fa_dtype dtype                         # of the result
    cdef const int64_t[::1] shape               # all axes but value's
    cdef const int64_t[::1] out_at, lse_at      # addresses
    cdef const int64_t[::1] out_dtype, lse_dtype
    cdef const int64_t[:, ::1] out_strides      # one more than axes in shape: value's axis
    cdef const int64_t[:, ::1] lse_strides
    cdef list kept
    cdef readonly object out, lse


cdef Parts read_parts(object outs, object lses)
