"""The doors for C, C++, Cython, ctypes and Numba: this module only exports what kernels/embed.c computes. Its .pxd and
include/fastattn.h are the reference.
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int64_t

from fastattn._runtime cimport c_interface

cdef extern from "fastattn.h" nogil:
    ctypedef struct fastattn_api:
        const char *(*version)() noexcept nogil
        const char *(*instruction_set)() noexcept nogil
        const char *(*status_text)(int) noexcept nogil
        void (*attention_init)(fastattn_attention_args *, size_t) noexcept nogil
        int (*attention_check)(const fastattn_attention_args *, char *, size_t) noexcept nogil
        size_t (*attention_workspace)(const fastattn_attention_args *, int) noexcept nogil
        int (*attention)(const fastattn_attention_args *, int, void *, size_t) noexcept nogil
        void (*softmax_init)(fastattn_softmax_args *, size_t) noexcept nogil
        int (*softmax_check)(const fastattn_softmax_args *, char *, size_t) noexcept nogil
        int (*softmax)(const fastattn_softmax_args *, int) noexcept nogil
        int (*dot_product_attention_f32)(float *, const float *, const float *, const float *, int64_t, int64_t,
                                         int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double,
                                         int) noexcept nogil
        int (*dot_product_attention_f64)(double *, const double *, const double *, const double *, int64_t, int64_t,
                                         int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double,
                                         int) noexcept nogil
        int (*softmax_f32)(float *, const float *, int64_t, int64_t, int) noexcept nogil
        int (*softmax_f64)(double *, const double *, int64_t, int64_t, int) noexcept nogil

cdef const fastattn_api *api = <const fastattn_api *> c_interface

# For import_fastattn() of fastattn.h.
_C_API = PyCapsule_New(<void *> api, "fastattn._C_API", NULL)


cdef const char *version() noexcept nogil:
    return api.version()


cdef const char *instruction_set() noexcept nogil:
    return api.instruction_set()


cdef const char *status_text(int status) noexcept nogil:
    return api.status_text(status)


cdef void attention_init_sized(fastattn_attention_args *args, size_t size) noexcept nogil:
    api.attention_init(args, size)


cdef int attention_check(const fastattn_attention_args *args, char *message, size_t room) noexcept nogil:
    return api.attention_check(args, message, room)


cdef size_t attention_workspace(const fastattn_attention_args *args, int num_threads) noexcept nogil:
    return api.attention_workspace(args, num_threads)


cdef int attention(const fastattn_attention_args *args, int num_threads, void *workspace,
                   size_t workspace_size) noexcept nogil:
    return api.attention(args, num_threads, workspace, workspace_size)


cdef void softmax_init_sized(fastattn_softmax_args *args, size_t size) noexcept nogil:
    api.softmax_init(args, size)


cdef int softmax_check(const fastattn_softmax_args *args, char *message, size_t room) noexcept nogil:
    return api.softmax_check(args, message, room)


cdef int softmax(const fastattn_softmax_args *args, int num_threads) noexcept nogil:
    return api.softmax(args, num_threads)


cdef int dot_product_attention_f32(float *out, const float *query, const float *key, const float *value, int64_t batch,
                                   int64_t num_heads, int64_t num_kv_heads, int64_t queries, int64_t keys,
                                   int64_t head_dim, int64_t value_dim, int64_t left, int64_t right, double scale,
                                   int num_threads) noexcept nogil:
    return api.dot_product_attention_f32(out, query, key, value, batch, num_heads, num_kv_heads, queries, keys,
                                         head_dim, value_dim, left, right, scale, num_threads)


cdef int softmax_f32(float *out, const float *x, int64_t rows, int64_t n, int num_threads) noexcept nogil:
    return api.softmax_f32(out, x, rows, n, num_threads)


cdef int dot_product_attention_f64(double *out, const double *query, const double *key, const double *value,
                                   int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t queries,
                                   int64_t keys, int64_t head_dim, int64_t value_dim, int64_t left, int64_t right,
                                   double scale, int num_threads) noexcept nogil:
    return api.dot_product_attention_f64(out, query, key, value, batch, num_heads, num_kv_heads, queries, keys,
                                         head_dim, value_dim, left, right, scale, num_threads)


cdef int softmax_f64(double *out, const double *x, int64_t rows, int64_t n, int num_threads) noexcept nogil:
    return api.softmax_f64(out, x, rows, n, num_threads)
