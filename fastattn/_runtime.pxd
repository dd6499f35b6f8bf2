# What all drivers share, and the kernels' contract as Cython sees it.
from libc.stdint cimport int64_t

cdef extern from "kernels/contract.h" nogil:
    enum:
        FA_BLOCK
        FA_SPAN
        FA_DECODE_TILE
        FA_ALIGN
        FA_ROW_AXES
        FA_ROW_X
        FA_ROW_GRAD
        FA_ROW_MASK
        FA_ROW_OUT
        FA_ROW_OPERANDS

    ctypedef enum fa_dtype:
        FA_F32
        FA_F64
        FA_F16
        FA_BF16
        FA_I8
        FA_DTYPES

    ctypedef enum fa_score:
        FA_DOT
        FA_ADDITIVE

    ctypedef enum fa_activation:
        FA_SOFTMAX
        FA_RELU
        FA_SIGMOID
        FA_SPARSEMAX
        FA_ENTMAX15

    ctypedef enum fa_row_function:
        FA_ROW_SOFTMAX
        FA_ROW_LOG_SOFTMAX
        FA_ROW_LOGSUMEXP
        FA_ROW_SPARSEMAX
        FA_ROW_ENTMAX15
        FA_ROW_SOFTMAX_BACK
        FA_ROW_LOG_SOFTMAX_BACK
        FA_ROW_LOGSUMEXP_BACK
        FA_ROW_SPARSEMAX_BACK
        FA_ROW_ENTMAX15_BACK

    ctypedef enum fa_feature_map:
        FA_NO_MAP
        FA_ELU_PLUS_1
        FA_RELU_MAP

    ctypedef struct fa_axes:
        int count
        int64_t shape[FA_ROW_AXES]
        Py_ssize_t strides[FA_ROW_OPERANDS][FA_ROW_AXES]

    ctypedef struct fa_columns:
        const char *x
        const char *mask
        const char *grad
        char *out
        Py_ssize_t next[FA_ROW_OPERANDS]
        const fa_axes *row
        int64_t length, rows
        fa_dtype dtype, grad_dtype, out_dtype

    ctypedef struct fa_view:
        char *data
        Py_ssize_t row, col, head
        fa_dtype dtype

    enum:
        FA_QUERY
        FA_KEY
        FA_VALUE
        FA_MASK
        FA_BIAS
        FA_BLOCK_MASK
        FA_RELATIVE_BIAS
        FA_PREPARED
        FA_KEY_SCALE
        FA_VALUE_SCALE
        FA_KEY_CENTER
        FA_OUT
        FA_WEIGHTS
        FA_LSE
        FA_SLOPES
        FA_SINKS
        FA_OPERANDS

    enum:
        FA_EDGE_KEY
        FA_EDGE_VALUE
        FA_UNIT_WEIGHTS
        FA_GRAPH_GRAD_OUT
        FA_GRAPH_GRAD_LSE
        FA_GRAPH_D_QUERY
        FA_GRAPH_D_KEY
        FA_GRAPH_D_VALUE
        FA_GRAPH_D_BIAS
        FA_GRAPH_D_EDGE_KEY
        FA_GRAPH_D_EDGE_VALUE
        FA_GRAPH_D_UNIT_WEIGHTS
        FA_GRAPH_OPERANDS
        FA_GRAPH_GRADIENTS

    ctypedef struct fa_graph:
        fa_view view[<int> FA_GRAPH_OPERANDS]
        const char *indptr
        const char *indices
        Py_ssize_t indptr_step, index_step
        int indptr_size, index_size
        int64_t edges, heads, head_dim, value_dim
        fa_score score
        double slope, scale, softcap

    ctypedef struct fa_graph_gradients:
        void *numbers
        char *hidden
        int adds[<int> FA_GRAPH_GRADIENTS]
        double *totals[<int> FA_GRAPH_GRADIENTS]

    ctypedef enum fa_scales:
        FA_NO_SCALES
        FA_SCALE_TOKENS
        FA_SCALE_CHANNELS
        FA_SCALE_BLOCKS

    ctypedef struct fa_problem:
        int64_t head_dim, value_dim, left, right
        fa_score score
        const double *score_weights
        double scale, softcap
        fa_dtype dtype
        fa_activation activation
        int has_slope, has_sink, has_center
        fa_scales key_scales, value_scales
        int64_t key_each, value_each
        int64_t chunk, left_chunks
        int64_t block_rows, block_columns
        int band, decode, prefetch

    ctypedef struct fa_head:
        fa_view view[<int> FA_OPERANDS]
        int64_t queries, keys, query_length, key_length, offset, keys_before, heads

    enum:
        FA_GRAD_OUT
        FA_GRAD_LSE
        FA_ROW_STATE
        FA_D_QUERY
        FA_D_QUERY_LOST
        FA_D_KEY
        FA_D_VALUE
        FA_D_BIAS
        FA_D_RELATIVE_BIAS
        FA_D_BIAS_LOST
        FA_D_RELATIVE_BIAS_LOST
        FA_D_ROWS
        FA_D_COLUMNS
        FA_D_DIAGONALS
        FA_D_SLOPES
        FA_D_SINKS
        FA_D_SCORE_WEIGHTS
        FA_BACK_OPERANDS
        FA_STATE
        FA_BACK_ROWS
        FA_BACK_SPAN

    ctypedef struct fa_gradients:
        fa_view view[<int> FA_BACK_OPERANDS]

    enum:
        FA_LINEAR_QUERY
        FA_LINEAR_KEY
        FA_LINEAR_VALUE
        FA_LINEAR_LOG_DECAY
        FA_LINEAR_BETA
        FA_LINEAR_OUT
        FA_LINEAR_STATE
        FA_LINEAR_NEW_STATE
        FA_LINEAR_MISSED
        FA_LINEAR_OPERANDS

    ctypedef struct fa_linear:
        int64_t features, value_dim, heads
        fa_feature_map map
        int is_causal, is_normalised, fades, back
        double scale, eps

    ctypedef struct fa_linear_head:
        fa_view view[<int> FA_LINEAR_OPERANDS]
        int64_t column, columns
        int few
        const int64_t *offset
        const int64_t *rows

    ctypedef struct fa_linear_back:
        int64_t features, value_dim, keys, heads, head_rows, query_rows
        const int64_t *offset
        const int64_t *rows
        double eps
        fa_view log_decay
        int64_t chunk
        const void *query
        const void *key
        void *d_query
        void *grad_out
        void *d_normaliser
        void *d_key
        const void *said
        void *z
        void *d_z
        void *kept
        void *anchor
        void *d_log_decay

    enum:
        FA_SPACE
        FA_ALONG_Z
        FA_ALONG_X
        FA_ALONG_Y

    ctypedef struct fa_reach:
        int64_t kernel, dilation, stride
        int causal, clamp

    ctypedef struct fa_neighborhood:
        int64_t head_dim, value_dim
        double scale, softcap
        fa_activation activation
        fa_reach reach[FA_SPACE]
        Py_ssize_t weights_step[FA_SPACE]

    ctypedef struct fa_pixels:
        char *data
        Py_ssize_t space[FA_SPACE]
        Py_ssize_t col, head
        fa_dtype dtype

    ctypedef struct fa_image:
        fa_pixels query, key, value, out, weights, lse, bias, sink
        int64_t pixels[FA_SPACE]
        int64_t heads

    enum:
        FA_NOTES

    ctypedef struct fa_image_back:
        fa_image image
        fa_pixels grad_out, grad_lse, notes, d_query, d_key, d_value
        int add_query, add_key, add_value
        int of_keys, of_scores, of_bias, of_sinks
        char *tables
        int64_t half[FA_SPACE]
        int64_t table_row

    int64_t fa_table_size(const int64_t *half, int64_t table_row, int lanes)

    enum:
        FA_DENSE_FEW

    ctypedef enum fa_dense_activation:
        FA_DENSE_NOTHING
        FA_DENSE_RELU
        FA_DENSE_GELU
        FA_DENSE_GELU_TANH
        FA_DENSE_SILU

    ctypedef struct fa_dense:
        int64_t d_in, d_out, rows
        const void *panels
        fa_dtype dtype
        const void *scale
        const void *bias
        fa_dense_activation activation
        fa_view x, out, multiply, residual

    ctypedef struct fa_norm:
        int64_t n, rows
        int centred
        double eps, offset
        const void *weight
        const void *bias
        fa_view x, out, residual, sum

    ctypedef struct fa_quantize:
        int64_t n, group
        fa_view x
        const float *center
        fa_view to, scales

    ctypedef struct fa_tuning:
        int group_rows, decode_queries, many_queries, least_rows, most_rows, window_rows, keys_a_row, lanes, panel

    ctypedef struct fa_kernels:
        const char *name
        fa_tuning tuning
        size_t (*prepared_size)(const fa_problem *, int64_t) noexcept nogil
        void (*prepare_keys)(const fa_problem *, const fa_head *, int64_t, int64_t, void *, void *) noexcept nogil
        size_t (*tile_workspace)(const fa_problem *, int64_t, int64_t) noexcept nogil
        void (*open_tile)(const fa_problem *, const fa_head *, int64_t, int64_t, void *) noexcept nogil
        void (*visit_keys)(const fa_problem *, const fa_head *, int64_t, int64_t, int64_t, int64_t,
                           void *) noexcept nogil
        size_t (*span_size)(const fa_problem *, int64_t) noexcept nogil
        void (*save_span)(const fa_problem *, int64_t, void *, void *) noexcept nogil
        void (*join_span)(const fa_problem *, const fa_head *, int64_t, void *, const void *) noexcept nogil
        void (*close_tile)(const fa_problem *, const fa_head *, int64_t, int64_t, void *) noexcept nogil
        size_t (*back_workspace)(const fa_problem *, int64_t) noexcept nogil
        void (*back_prepare)(const fa_problem *, const fa_head *, const fa_gradients *, int64_t, int64_t,
                             void *) noexcept nogil
        void (*back_open)(const fa_problem *, int64_t, int64_t, void *) noexcept nogil
        void (*back_visit)(const fa_problem *, const fa_head *, const fa_gradients *, int64_t, int64_t,
                           void *) noexcept nogil
        void (*back_close)(const fa_problem *, const fa_head *, const fa_gradients *, void *) noexcept nogil
        void (*rows)(fa_row_function, const char *, Py_ssize_t, const char *, Py_ssize_t, const char *, Py_ssize_t,
                     char *, Py_ssize_t, int64_t, int64_t) noexcept nogil
        int columns_at_once
        size_t (*columns_workspace)(int64_t length) noexcept nogil
        void (*columns)(fa_row_function, const fa_columns *, void *) noexcept nogil
        void (*gather)(void *, const char *, Py_ssize_t, int64_t, fa_dtype) noexcept nogil
        void (*scatter)(char *, Py_ssize_t, const void *, int64_t, fa_dtype) noexcept nogil
        void (*merge)(void *, void *, const void *const *, const void *, int64_t, int64_t) noexcept nogil
        void (*merge_back)(void *const *, void *, const void *, const void *, const void *const *, void *, int64_t,
                           int64_t) noexcept nogil
        void (*turns)(void *, const double *, int64_t, int64_t, double) noexcept nogil
        void (*rotate)(char *, Py_ssize_t, const char *, Py_ssize_t, const char *, int64_t, int64_t, int64_t, int,
                       int) noexcept nogil
        int linear_columns
        size_t (*linear_workspace)(const fa_linear *, int64_t) noexcept nogil
        void (*linear_open)(const fa_linear *, const fa_linear_head *, void *) noexcept nogil
        void (*linear_keys)(const fa_linear *, const fa_linear_head *, int64_t, int64_t, void *) noexcept nogil
        void (*linear_rows)(const fa_linear *, const fa_linear_head *, int64_t, int64_t, int64_t,
                            void *) noexcept nogil
        void (*linear_close)(const fa_linear *, const fa_linear_head *, void *) noexcept nogil
        void (*linear_map)(fa_feature_map, const fa_view *, const fa_view *, double, int64_t, int64_t, int64_t,
                           int64_t, void *, Py_ssize_t) noexcept nogil
        void (*linear_unmap)(fa_feature_map, const fa_view *, const void *, int64_t, int64_t, int64_t, int64_t,
                             const fa_view *) noexcept nogil
        void (*linear_add)(void *, Py_ssize_t, const void *, Py_ssize_t, double, const void *, int64_t,
                           int64_t) noexcept nogil
        void (*linear_dots)(void *, const void *, const void *, int64_t, int64_t) noexcept nogil
        void (*linear_products)(void *, const void *, const void *, Py_ssize_t, int64_t, int64_t) noexcept nogil
        void (*linear_divide)(const fa_linear_back *) noexcept nogil
        void (*linear_divide_back)(const fa_linear_back *) noexcept nogil
        void (*linear_fade)(const fa_linear_back *) noexcept nogil
        size_t (*edges_workspace)(const fa_graph *graph) noexcept nogil
        void (*edges)(const fa_graph *graph, int64_t begin, int64_t end, void *workspace) noexcept nogil
        size_t (*edges_back_numbers)(const fa_graph *graph) noexcept nogil
        size_t (*edges_back_workspace)(const fa_graph *graph) noexcept nogil
        void (*edges_back_rows)(const fa_graph *, const fa_graph_gradients *, int64_t, int64_t, void *) noexcept nogil
        void (*edges_back_columns)(const fa_graph *, const fa_graph_gradients *, int64_t, int64_t,
                                   void *) noexcept nogil
        size_t (*neighborhood_workspace)(const fa_neighborhood *, const int64_t *, const int64_t *) noexcept nogil
        void (*neighborhood)(const fa_neighborhood *, const fa_image *, const int64_t *, const int64_t *,
                             void *) noexcept nogil
        size_t (*neighborhood_back_workspace)(const fa_neighborhood *, int, const int64_t *,
                                              const int64_t *) noexcept nogil
        void (*neighborhood_back)(const fa_neighborhood *, const fa_image_back *, const int64_t *, const int64_t *,
                                  void *) noexcept nogil
        size_t (*quantize_workspace)(int64_t n) noexcept nogil
        int64_t (*quantize)(const fa_quantize *, int64_t begin, int64_t end, void *workspace) noexcept nogil

    ctypedef struct fa_instruction_set:
        const char *name
        const fa_kernels *kernels[<int> FA_DTYPES]

    int fa_runnable(fa_instruction_set *sets, int room)
    int fa_choose(const char *name)
    const char *fa_chosen()
    const fa_kernels *fa_kernels_for(fa_dtype dtype)
    int fa_cpu_features(const char **names, int room)
    void fa_visible_keys(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, int64_t *begin,
                         int64_t *end)
    int fa_next_range(const fa_problem *problem, const fa_head *head, int64_t row, int64_t rows, int64_t *cursor,
                      int64_t *begin, int64_t *end)


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


cdef extern from "kernels/threads.h" nogil:
    int fa_openmp_version()
    int fa_openmp_threads()
    int fa_affinity()
    double fa_seconds()

    ctypedef struct fa_thread_settings:
        int chosen, environment, openmp_environment, openmp_untouched, quota

    fa_thread_settings fa_threads
    int fa_default_threads()
    int fa_allowed_threads(int wanted)
    int fa_prepare_threads(const char *lock_path)
    int fa_gather(int threads, void **team, int *growing)
    void fa_join_team(void *team, int growing)


cdef extern from "kernels/drive.h" nogil:
    ctypedef struct fa_plan:
        size_t size
        double estimate

    ctypedef struct fa_watch:
        int (*interrupted)(void *of, int is_caller) noexcept nogil
        void *of

    void fa_choose_loops(fa_call *call, const fa_kernels *kernels, int decode)
    int fa_has_work(const fa_call *call)
    int fa_keeps_too_many(const fa_call *call)
    int fa_is_small(const fa_call *call, const fa_kernels *kernels)
    void fa_make_plan(const fa_call *call, const fa_kernels *kernels, int threads, fa_plan *plan)
    void fa_lay_out(const fa_call *call, fa_plan *plan, void *memory)
    int fa_attend(const fa_call *call, const fa_kernels *kernels, const fa_plan *plan, const fa_watch *watch)


cdef extern from "kernels/drive_rows.h" nogil:
    ctypedef struct fa_rows:
        fa_row_function function
        fa_axes row, batch
        int64_t length, rows
        char *data[<int> FA_ROW_OPERANDS]
        fa_dtype dtypes[<int> FA_ROW_OPERANDS]
        fa_dtype real
        int single, aligned

    ctypedef struct fa_rows_plan:
        size_t size

    int fa_rows_are_few(const fa_rows *rows)
    void fa_plan_rows(const fa_rows *rows, const fa_kernels *kernels, int threads, fa_rows_plan *plan)
    int fa_run_rows(const fa_rows *rows, const fa_kernels *kernels, const fa_rows_plan *plan, void *memory,
                    const fa_watch *watch)
    Py_ssize_t fa_size_of(fa_dtype dtype)
    Py_ssize_t fa_real_size(fa_dtype dtype)
    void fa_join_axes(fa_axes *axes)


cdef extern from "kernels/drive_dense.h" nogil:
    ctypedef struct fa_dense_plan:
        size_t size

    ctypedef struct fa_norm_plan:
        size_t size

    int fa_dense_is_small(const fa_dense *dense)
    void fa_plan_dense(const fa_dense *dense, const fa_kernels *kernels, int threads, fa_dense_plan *plan)
    int fa_run_dense(const fa_dense *dense, const fa_kernels *kernels, const fa_dense_plan *plan, void *memory,
                     const fa_watch *watch)
    int fa_norm_is_small(const fa_norm *norm)
    void fa_plan_norm(const fa_norm *norm, const fa_kernels *kernels, int threads, fa_norm_plan *plan)
    int fa_run_norm(const fa_norm *norm, const fa_kernels *kernels, const fa_norm_plan *plan, void *memory,
                    const fa_watch *watch)


# The table of include/fastattn.h, a fastattn_api.
cdef const void *c_interface

# The selected kernels for a storage dtype: those of its accumulation dtype.
cdef const fa_kernels *kernels_for(fa_dtype dtype) noexcept nogil

# How many threads a call with this (checked) num_threads argument may use, whatever the size of its work.
cdef int allowed_threads(object num_threads) except -1

# The threads of a region: `gathered` is called right before it, `join_team` first by each of its threads. `gathered`
# returns fewer threads than wanted if the system allows no more, which would otherwise abort the process.
cdef struct Team:
    int threads
    int growing
    void *pool

cdef Team gathered(int threads) noexcept nogil
cdef void join_team(const Team *team) noexcept nogil

# A block from Python's raw allocator; NULL where there is none. See kernels/allocate.h for how it is made to fail.
cdef void *take_memory(size_t size) noexcept nogil
cdef void give_memory(void *block) noexcept nogil

# Aligned scratch memory, kept between calls so that its pages need not be mapped again. For threads attached to Python:
# with the GIL, where there is one. estimate: about `size`, as a double that cannot overflow.
cdef void *take_workspace(size_t size, double estimate) except NULL
cdef void give_workspace(void *workspace) noexcept

# Ctrl-C in a long call; shared by all its threads, initially zero.
cdef struct Watch:
    int stop
    double last_look

# Whether the call is to stop; every thread checks it now and then, without the GIL. Only the caller's own thread may
# check for signals; if one has raised an exception, the others see it here too, and the call ends with raise_pending.
cdef bint interrupted(Watch *watch, bint caller) noexcept nogil
cdef int raise_pending() except -1

# Carries a checked call out, with the driver that is written in C. decode: as fa_choose_loops has it.
cdef int carry_out(fa_call *call, bint decode, object num_threads) except -1

# The same for softmax and its relatives.
cdef int run_rows(const fa_rows *rows, object num_threads) except -1

# The same for layers; dtype: in which they are computed.
cdef int run_dense(const fa_dense *dense, fa_dtype dtype, object num_threads) except -1
cdef int run_norm(const fa_norm *norm, fa_dtype dtype, object num_threads) except -1
