/* Attention and softmax for C, C++ and Cython: strided arrays in, strided arrays out. No Python in any call: the GIL is
 * neither needed nor taken, no call looks at signals, keeps state or writes anywhere but to its outputs and workspace,
 * and any number of threads may call at once.
 *
 * Three ways to link:
 *   a C extension   #include <Python.h> first; call import_fastattn() with the GIL before anything else, once in each
 *                   C file: what it finds is the file's own
 *   Cython          from fastattn.cython_attention cimport ...   (imports itself)
 *   no Python       compile the C files of fastattn/kernels along
 */
#ifndef FASTATTN_H
#define FASTATTN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FASTATTN_VERSION "0.2.0"

/* Grows with each field or function that is added; nothing is ever taken away or moved within one ABI. */
#define FASTATTN_API_VERSION 1

typedef enum { FASTATTN_FLOAT32, FASTATTN_FLOAT64, FASTATTN_FLOAT16, FASTATTN_BFLOAT16 } fastattn_dtype;
typedef enum { FASTATTN_DOT_PRODUCT, FASTATTN_ADDITIVE } fastattn_score;
typedef enum { FASTATTN_SOFTMAX, FASTATTN_RELU, FASTATTN_SIGMOID } fastattn_activation;
typedef enum { FASTATTN_ROWS_SOFTMAX, FASTATTN_ROWS_LOG_SOFTMAX, FASTATTN_ROWS_LOGSUMEXP } fastattn_row_function;

/* What a call returns. */
enum {
    FASTATTN_OK = 0,
    FASTATTN_BAD_STRUCT = -1,    /* size: not that of a version that this library knows */
    FASTATTN_BAD_DTYPE = -2,     /* dtype, bias_dtype, score, activation or function: no such one */
    FASTATTN_BAD_SIZE = -3,      /* a size below 0; num_heads no multiple of num_kv_heads; a length outside its axis */
    FASTATTN_BAD_POINTER = -4,   /* NULL where numbers must be */
    FASTATTN_BAD_VALUE = -5,     /* window below -1, scale infinite, softcap or num_threads below 0, rules at odds */
    FASTATTN_BAD_WORKSPACE = -6, /* too small, or not at a multiple of 64 bytes */
    FASTATTN_BAD_OVERLAP = -7,   /* an output overlaps an input, another output or itself */
    FASTATTN_NO_MEMORY = -8
};

/* Where an array lies. Strides in bytes, of any sign; 0 repeats (not in outputs). data NULL: not given. */
typedef struct {
    void *data;
    ptrdiff_t batch, head, row, col;
} fastattn_view;

/* Attention of a batch of heads; what each field means stands in the docstring of dot_product_attention.
 * Begin with fastattn_attention_init, which gives each field its default. */
typedef struct {
    size_t size;          /* sizeof(fastattn_attention_args) */
    fastattn_dtype dtype; /* of query, key, value and out */
    fastattn_score score;
    fastattn_activation activation;
    int64_t batch, num_heads, num_kv_heads; /* 1, 1, 0: as many as num_heads */
    int64_t queries, keys, head_dim, value_dim;
    fastattn_view query, key, value, out;
    fastattn_view lse, weights; /* optional outputs, float64 for float64, else float32; lse has no col */
    fastattn_view mask;         /* optional, a byte a key, nonzero: visible */
    fastattn_view bias;         /* optional */
    fastattn_dtype bias_dtype;
    const int64_t *key_lengths, *query_lengths, *query_offsets; /* [batch], optional */
    const double *alibi_slopes, *sinks;                         /* [num_heads], optional */
    const double *score_weights;                                /* [head_dim], FASTATTN_ADDITIVE */
    int64_t left, right;                                        /* window; -1: unbounded (default). Causal: right = 0 */
    double scale;   /* NaN (default): 1 / sqrt(head_dim), 1 for FASTATTN_ADDITIVE */
    double softcap; /* 0 (default): none */
} fastattn_attention_args;

/* Rows of n numbers each. x and out may be the same. */
typedef struct {
    size_t size;          /* sizeof(fastattn_softmax_args) */
    fastattn_dtype dtype; /* of x and out */
    fastattn_row_function function;
    int64_t batch, rows, n;
    fastattn_view x, out, mask; /* head is not used; FASTATTN_ROWS_LOGSUMEXP: out has no col */
} fastattn_softmax_args;

/* The functions of a process that has Python; in fastattn._C_API. */
typedef struct {
    int32_t api_version;
    size_t size;
    const char *(*version)(void);           /* FASTATTN_VERSION */
    const char *(*instruction_set)(void);   /* "avx512" */
    const char *(*status_text)(int status); /* a sentence; never NULL */
    void (*attention_init)(fastattn_attention_args *args, size_t size);
    int (*attention_check)(const fastattn_attention_args *args, char *message, size_t room);
    size_t (*attention_workspace)(const fastattn_attention_args *args, int num_threads);
    int (*attention)(const fastattn_attention_args *args, int num_threads, void *workspace, size_t workspace_size);
    void (*softmax_init)(fastattn_softmax_args *args, size_t size);
    int (*softmax_check)(const fastattn_softmax_args *args, char *message, size_t room);
    int (*softmax)(const fastattn_softmax_args *args, int num_threads);
    int (*dot_product_attention_f32)(float *out, const float *query, const float *key, const float *value,
                                     int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t queries,
                                     int64_t keys, int64_t head_dim, int64_t value_dim, int64_t left, int64_t right,
                                     double scale, int num_threads);
    int (*dot_product_attention_f64)(double *out, const double *query, const double *key, const double *value,
                                     int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t queries,
                                     int64_t keys, int64_t head_dim, int64_t value_dim, int64_t left, int64_t right,
                                     double scale, int num_threads);
    int (*softmax_f32)(float *out, const float *x, int64_t rows, int64_t n, int num_threads);
    int (*softmax_f64)(double *out, const double *x, int64_t rows, int64_t n, int num_threads);
} fastattn_api;

#if defined(Py_PYTHON_H) && !defined(FASTATTN_NO_CAPSULE)
static const fastattn_api *fastattn_API = NULL;

/* 0, or -1 with ImportError set. */
static inline int import_fastattn(void)
{
    fastattn_API = (const fastattn_api *)PyCapsule_Import("fastattn._C_API", 0);
    if (fastattn_API == NULL) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError))
            PyErr_SetString(PyExc_ImportError,
                            "the installed fastattn is older than 0.2.0, the first version with a C interface");
        return -1;
    }
    if (fastattn_API->api_version < FASTATTN_API_VERSION) {
        PyErr_Format(PyExc_ImportError,
                     "compiled for version %d of fastattn's C interface; the installed fastattn %s has version %d",
                     FASTATTN_API_VERSION, fastattn_API->version(), (int)fastattn_API->api_version);
        fastattn_API = NULL;
        return -1;
    }
    return 0;
}
#define fastattn_version (fastattn_API->version)
#define fastattn_instruction_set (fastattn_API->instruction_set)
#define fastattn_status_text (fastattn_API->status_text)
#define fastattn_attention_init(args) (fastattn_API->attention_init((args), sizeof(fastattn_attention_args)))
#define fastattn_attention_check (fastattn_API->attention_check)
#define fastattn_attention_workspace (fastattn_API->attention_workspace)
#define fastattn_attention (fastattn_API->attention)
#define fastattn_softmax_init(args) (fastattn_API->softmax_init((args), sizeof(fastattn_softmax_args)))
#define fastattn_softmax_check (fastattn_API->softmax_check)
#define fastattn_softmax (fastattn_API->softmax)
#define fastattn_dot_product_attention_f32 (fastattn_API->dot_product_attention_f32)
#define fastattn_dot_product_attention_f64 (fastattn_API->dot_product_attention_f64)
#define fastattn_softmax_f32 (fastattn_API->softmax_f32)
#define fastattn_softmax_f64 (fastattn_API->softmax_f64)
#else
const fastattn_api *fastattn_get_api(void); /* the same table */
const char *fastattn_version(void);
const char *fastattn_instruction_set(void);
const char *fastattn_status_text(int status);
void fastattn_attention_init_sized(fastattn_attention_args *args, size_t size);
#define fastattn_attention_init(args) fastattn_attention_init_sized((args), sizeof(fastattn_attention_args))
int fastattn_attention_check(const fastattn_attention_args *args, char *message, size_t room);
size_t fastattn_attention_workspace(const fastattn_attention_args *args, int num_threads);
int fastattn_attention(const fastattn_attention_args *args, int num_threads, void *workspace, size_t workspace_size);
void fastattn_softmax_init_sized(fastattn_softmax_args *args, size_t size);
#define fastattn_softmax_init(args) fastattn_softmax_init_sized((args), sizeof(fastattn_softmax_args))
int fastattn_softmax_check(const fastattn_softmax_args *args, char *message, size_t room);
int fastattn_softmax(const fastattn_softmax_args *args, int num_threads);
int fastattn_dot_product_attention_f32(float *out, const float *query, const float *key, const float *value,
                                       int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t queries,
                                       int64_t keys, int64_t head_dim, int64_t value_dim, int64_t left, int64_t right,
                                       double scale, int num_threads);
int fastattn_dot_product_attention_f64(double *out, const double *query, const double *key, const double *value,
                                       int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t queries,
                                       int64_t keys, int64_t head_dim, int64_t value_dim, int64_t left, int64_t right,
                                       double scale, int num_threads);
int fastattn_softmax_f32(float *out, const float *x, int64_t rows, int64_t n, int num_threads);
int fastattn_softmax_f64(double *out, const double *x, int64_t rows, int64_t n, int num_threads);
#endif

#ifdef __cplusplus
}
#endif
#endif
