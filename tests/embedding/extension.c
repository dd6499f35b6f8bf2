/* A C extension for the tests: calls through the table that import_fastattn() finds, from this thread or from one that
 * Python does not know, with the GIL held; and the layout of the header's structs. */
#include <Python.h>
#include <fastattn.h>
#include <pthread.h>
#include <stddef.h>

typedef struct {
    const fastattn_attention_args *args;
    int num_threads, status;
    void *workspace;
    size_t workspace_size;
} call;

static void *carry_out(void *data)
{
    call *c = data;
    c->status = fastattn_attention(c->args, c->num_threads, c->workspace, c->workspace_size);
    return NULL;
}

static int read_call(PyObject *arguments, call *c)
{
    unsigned long long args, workspace, size;
    if (!PyArg_ParseTuple(arguments, "KiKK", &args, &c->num_threads, &workspace, &size))
        return -1;
    c->args = (const fastattn_attention_args *)(uintptr_t)args;
    c->workspace = (void *)(uintptr_t)workspace;
    c->workspace_size = (size_t)size;
    return 0;
}

static PyObject *call_here(PyObject *module, PyObject *arguments)
{
    call c;
    (void)module;
    if (read_call(arguments, &c) < 0)
        return NULL;
    carry_out(&c);
    return PyLong_FromLong(c.status);
}

static PyObject *call_from_a_thread_of_its_own(PyObject *module, PyObject *arguments)
{
    call c;
    pthread_t thread;
    (void)module;
    if (read_call(arguments, &c) < 0)
        return NULL;
    if (pthread_create(&thread, NULL, carry_out, &c) != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    pthread_join(thread, NULL); /* with the GIL held: a call that needs it would wait forever */
    return PyLong_FromLong(c.status);
}

#define AT(field) offsetof(fastattn_attention_args, field)
#define ROWS_AT(field) offsetof(fastattn_softmax_args, field)
static PyObject *layout(PyObject *module, PyObject *nothing)
{
    const size_t numbers[] = {
        sizeof(fastattn_view),
        offsetof(fastattn_view, data),
        offsetof(fastattn_view, batch),
        offsetof(fastattn_view, head),
        offsetof(fastattn_view, row),
        offsetof(fastattn_view, col),
        sizeof(fastattn_attention_args),
        AT(size),
        AT(dtype),
        AT(score),
        AT(activation),
        AT(batch),
        AT(num_heads),
        AT(num_kv_heads),
        AT(queries),
        AT(keys),
        AT(head_dim),
        AT(value_dim),
        AT(query),
        AT(key),
        AT(value),
        AT(out),
        AT(lse),
        AT(weights),
        AT(mask),
        AT(bias),
        AT(bias_dtype),
        AT(key_lengths),
        AT(query_lengths),
        AT(query_offsets),
        AT(alibi_slopes),
        AT(sinks),
        AT(score_weights),
        AT(left),
        AT(right),
        AT(scale),
        AT(softcap),
        sizeof(fastattn_softmax_args),
        ROWS_AT(size),
        ROWS_AT(dtype),
        ROWS_AT(function),
        ROWS_AT(batch),
        ROWS_AT(rows),
        ROWS_AT(n),
        ROWS_AT(x),
        ROWS_AT(out),
        ROWS_AT(mask),
    };
    PyObject *list = PyList_New(0);
    (void)module;
    (void)nothing;
    for (size_t i = 0; list && i < sizeof numbers / sizeof *numbers; i++) {
        PyObject *number = PyLong_FromSize_t(numbers[i]);
        if (!number || PyList_Append(list, number) < 0)
            Py_CLEAR(list);
        Py_XDECREF(number);
    }
    return list;
}

static PyMethodDef functions[] = {
    {"call_here", call_here, METH_VARARGS, NULL},
    {"call_from_a_thread_of_its_own", call_from_a_thread_of_its_own, METH_VARARGS, NULL},
    {"layout", layout, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "extension", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_extension(void)
{
    if (import_fastattn() < 0)
        return NULL;
    return PyModule_Create(&definition);
}
