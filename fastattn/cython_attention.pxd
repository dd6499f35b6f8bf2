# Attention and softmax for Cython, without Python in a call: strided arrays in, strided arrays out. What the fields of
# the structs mean and what each function promises stands in include/fastattn.h; to compile, add fastattn.get_include()
# to include_dirs.
from libc.stdint cimport int64_t

cdef extern from "fastattn.h" nogil:
    ctypedef enum fastattn_dtype:
        FASTATTN_FLOAT32
        FASTATTN_FLOAT64
        FASTATTN_FLOAT16
        FASTATTN_BFLOAT16

    ctypedef enum fastattn_score:
        FASTATTN_DOT_PRODUCT
        FASTATTN_ADDITIVE

    ctypedef enum fastattn_activation:
        FASTATTN_SOFTMAX
        FASTATTN_RELU
        FASTATTN_SIGMOID

    ctypedef enum fastattn_row_function:
        FASTATTN_ROWS_SOFTMAX
        FASTATTN_ROWS_LOG_SOFTMAX
        FASTATTN_ROWS_LOGSUMEXP

    enum:
        FASTATTN_API_VERSION
        FASTATTN_OK
        FASTATTN_BAD_STRUCT
        FASTATTN_BAD_DTYPE
        FASTATTN_BAD_SIZE
        FASTATTN_BAD_POINTER
        FASTATTN_BAD_VALUE
        FASTATTN_BAD_WORKSPACE
        FASTATTN_BAD_OVERLAP
        FASTATTN_NO_MEMORY

    ctypedef struct fastattn_view:
        void *data
        Py_ssize_t batch, head, row, col

    ctypedef struct fastattn_attention_args:
        size_t size
        fastattn_dtype dtype
        fastattn_score score
        fastattn_activation activation
        int64_t batch, num_heads, num_kv_heads
        int64_t queries, keys, head_dim, value_dim
        fastattn_view query, key, value, out
        fastattn_view lse, weights
        fastattn_view mask
        fastattn_view bias
        fastattn_dtype bias_dtype
        const int64_t *key_lengths
        const int64_t *query_lengths
        const int64_t *query_offsets
        const double *alibi_slopes
        const double *sinks
        const double *score_weights
        int64_t left, right
        double scale
        double softcap

    ctypedef struct fastattn_softmax_args:
        size_t size
        fastattn_dtype dtype
        fastattn_row_function function
        int64_t batch, rows, n
        fastattn_view x, out, mask


cdef const char *version() noexcept nogil
cdef const char *instruction_set() noexcept nogil
cdef const char *status_text(int status) noexcept nogil

cdef void attention_init_sized(fastattn_attention_args *args, size_t size) noexcept nogil
cdef int attention_check(const fastattn_attention_args *args, char *message, size_t room) noexcept nogil
cdef size_t attention_workspace(const fastattn_attention_args *args, int num_threads) noexcept nogil
cdef int attention(const fastattn_attention_args *args, int num_threads, void *workspace,
                   size_t workspace_size) noexcept nogil

cdef void softmax_init_sized(fastattn_softmax_args *args, size_t size) noexcept nogil
cdef int softmax_check(const fastattn_softmax_args *args, char *message, size_t room) noexcept nogil
cdef int softmax(const fastattn_softmax_args *args, int num_threads) noexcept nogil

cdef int dot_product_attention_f32(float *out, const float *query, const float *key, const float *value, int64_t batch,
                                   int64_t num_heads, int64_t num_kv_heads, int64_t queries, int64_t keys,
                                   int64_t head_dim, int64_t value_dim, int64_t left, int64_t right, double scale,
                                   int num_threads) noexcept nogil
cdef int dot_product_attention_f64(double *out, const double *query, const double *key, const double *value,
                                   int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t queries,
                                   int64_t keys, int64_t head_dim, int64_t value_dim, int64_t left, int64_t right,
                                   double scale, int num_threads) noexcept nogil
cdef int softmax_f32(float *out, const float *x, int64_t rows, int64_t n, int num_threads) noexcept nogil
cdef int softmax_f64(double *out, const double *x, int64_t rows, int64_t n, int num_threads) noexcept nogil


# Compiled into the client, whose structs may be of an older version than the library's.
cdef inline void attention_init(fastattn_attention_args *args) noexcept nogil:
    attention_init_sized(args, sizeof(fastattn_attention_args))


cdef inline void softmax_init(fastattn_softmax_args *args) noexcept nogil:
    softmax_init_sized(args, sizeof(fastattn_softmax_args))
