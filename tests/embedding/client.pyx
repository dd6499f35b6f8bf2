# A Cython client for the tests: calls by the address of a struct, without the GIL, and what the .pxd says of structs.
from libc.stdint cimport int64_t
from libc.stddef cimport size_t

from fastattn cimport cython_attention as fa
from fastattn.cython_attention cimport (FASTATTN_API_VERSION, attention, attention_check, attention_init,
                                        attention_workspace, fastattn_attention_args, fastattn_softmax_args, softmax,
                                        softmax_check, softmax_init)


def call_attention(size_t args, int num_threads, size_t workspace, size_t workspace_size):
    cdef int status
    with nogil:
        status = attention(<const fastattn_attention_args *> args, num_threads, <void *> workspace, workspace_size)
    return status


def call_softmax(size_t args, int num_threads):
    cdef int status
    with nogil:
        status = softmax(<const fastattn_softmax_args *> args, num_threads)
    return status


def workspace(size_t args, int num_threads):
    return attention_workspace(<const fastattn_attention_args *> args, num_threads)


def check(size_t args):
    cdef char[400] message
    status = attention_check(<const fastattn_attention_args *> args, message, sizeof(message))
    return status, message.decode()


def check_softmax(size_t args):
    cdef char[400] message
    status = softmax_check(<const fastattn_softmax_args *> args, message, sizeof(message))
    return status, message.decode()


def flat(str name, size_t out, size_t a, size_t b, size_t c, list sizes, double scale, int num_threads):
    """A flat function of numbers of 4 or 8 bytes."""
    cdef int64_t[9] n
    cdef int status = 1
    for i, size in enumerate(sizes):
        n[i] = size
    if name == "dot_product_attention_f32":
        with nogil:
            status = fa.dot_product_attention_f32(<float *> out, <const float *> a, <const float *> b,
                                                  <const float *> c, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7],
                                                  n[8], scale, num_threads)
    elif name == "dot_product_attention_f64":
        with nogil:
            status = fa.dot_product_attention_f64(<double *> out, <const double *> a, <const double *> b,
                                                  <const double *> c, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7],
                                                  n[8], scale, num_threads)
    elif name == "softmax_f32":
        with nogil:
            status = fa.softmax_f32(<float *> out, <const float *> a, n[0], n[1], num_threads)
    elif name == "softmax_f64":
        with nogil:
            status = fa.softmax_f64(<double *> out, <const double *> a, n[0], n[1], num_threads)
    return status


def about():
    return FASTATTN_API_VERSION, fa.version().decode(), fa.instruction_set().decode(), fa.status_text(-4).decode()


def defaults():
    """The bytes of structs after *_init."""
    cdef fastattn_attention_args a
    cdef fastattn_softmax_args s
    attention_init(&a)
    softmax_init(&s)
    return (<char *> &a)[:sizeof(a)], (<char *> &s)[:sizeof(s)]
