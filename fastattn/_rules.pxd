# The keywords of attention: which keys a query sees, how scores become weights, what a call returns and how it runs.
# The only list of them below the public functions; the code that checks them takes a pointer to it.
from cpython.object cimport PyObject


# Borrowed references: whoever fills it keeps the objects alive.
cdef struct Rules:
    PyObject *is_causal
    PyObject *window_size
    PyObject *chunk_size
    PyObject *left_chunks
    PyObject *query_offset
    PyObject *key_lengths
    PyObject *query_lengths
    PyObject *mask
    PyObject *block_mask
    PyObject *block_size
    PyObject *bias
    PyObject *relative_bias
    PyObject *alibi_slopes
    PyObject *scale
    PyObject *softcap
    PyObject *sinks
    PyObject *activation
    PyObject *enable_gqa
    PyObject *return_weights
    PyObject *return_lse
    PyObject *out
    PyObject *num_threads


cdef inline bint given(PyObject *x) noexcept:
    return x != <PyObject *> None


cdef inline Rules rules(
    object is_causal, object window_size, object chunk_size, object left_chunks, object query_offset, object
    key_lengths, object query_lengths, object mask, object block_mask, object block_size, object bias, object
    relative_bias, object alibi_slopes, object scale, object softcap, object sinks, object activation, object
    enable_gqa, object return_weights, object return_lse, object out, object num_threads,
) noexcept:
    cdef Rules r
    r.is_causal = <PyObject *> is_causal
    r.window_size = <PyObject *> window_size
    r.chunk_size = <PyObject *> chunk_size
    r.left_chunks = <PyObject *> left_chunks
    r.query_offset = <PyObject *> query_offset
    r.key_lengths = <PyObject *> key_lengths
    r.query_lengths = <PyObject *> query_lengths
    r.mask = <PyObject *> mask
    r.block_mask = <PyObject *> block_mask
    r.block_size = <PyObject *> block_size
    r.bias = <PyObject *> bias
    r.relative_bias = <PyObject *> relative_bias
    r.alibi_slopes = <PyObject *> alibi_slopes
    r.scale = <PyObject *> scale
    r.softcap = <PyObject *> softcap
    r.sinks = <PyObject *> sinks
    r.activation = <PyObject *> activation
    r.enable_gqa = <PyObject *> enable_gqa
    r.return_weights = <PyObject *> return_weights
    r.return_lse = <PyObject *> return_lse
    r.out = <PyObject *> out
    r.num_threads = <PyObject *> num_threads
    return r


cdef inline Rules rules_of(dict some):
    """From a dict, which keeps them alive; missing ones have their defaults."""
    return rules(
        is_causal=some.get("is_causal", False),
        window_size=some.get("window_size", None),
        chunk_size=some.get("chunk_size", None),
        left_chunks=some.get("left_chunks", None),
        query_offset=some.get("query_offset", None),
        key_lengths=some.get("key_lengths", None),
        query_lengths=some.get("query_lengths", None),
        mask=some.get("mask", None),
        block_mask=some.get("block_mask", None),
        block_size=some.get("block_size", 64),
        bias=some.get("bias", None),
        relative_bias=some.get("relative_bias", None),
        alibi_slopes=some.get("alibi_slopes", None),
        scale=some.get("scale", None),
        softcap=some.get("softcap", None),
        sinks=some.get("sinks", None),
        activation=some.get("activation", "softmax"),
        enable_gqa=some.get("enable_gqa", False),
        return_weights=some.get("return_weights", False),
        return_lse=some.get("return_lse", False),
        out=some.get("out", None),
        num_threads=some.get("num_threads", None),
    )
