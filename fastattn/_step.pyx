"""A layer's call over a cache in the usual case, where what surrounds attention would take longer than it: tokens of
the layer's own dtype, one after the other in memory, all of which come into a cache that has room for them.

Whatever is unusual, and whatever might be wrong, is left to the general way (`MultiHeadAttention._answered`), whose
results have the same bits; so nothing is refused here, but for rules of attention that it refuses itself. Nothing is
part of the cache before the call has succeeded.
"""
import numpy as np

cimport numpy as cnp
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from fastattn._attention cimport attend
from fastattn._call cimport read_dot_product
from fastattn._checks cimport empty
from fastattn._rules cimport rules_of

from fastattn.projections import project, rounded

cnp.import_array()

cdef extern from *:
    """
    /* Puts a reference where there is one or none, and returns what was there. */
    static PyObject *fa_swap(PyObject **p, PyObject *x) { return __atomic_exchange_n(p, x, __ATOMIC_ACQ_REL); }
    """
    PyObject *fa_swap(PyObject **, PyObject *) noexcept

# Whose columns or lengths count from what is in the cache, and what needs arrays of the caller's.
cdef frozenset UNUSUAL = frozenset(("key_lengths", "query_offset", "query_lengths", "mask", "block_mask", "bias",
                                    "chunk_size", "left_chunks", "out"))

cdef enum:
    MOST_KEPT = 1 << 18         # bytes of projected arrays and heads that a layer keeps


cdef class Scratch:
    """
    What a layer keeps from one step to the next: the arrays of the last one, and views of them, if they are small. A
    call takes them out, so that another one at the same time makes its own; only what the last call gives back stays.

    A copy or a pickle of it is empty.
    """
    cdef PyObject *kept

    def __cinit__(self):
        self.kept = NULL

    def __dealloc__(self):
        self.give(NULL)

    def __reduce__(self):
        return Scratch, ()

    @property
    def nbytes(self):
        """Of the arrays that are kept, if no call has them."""
        cdef Arrays arrays = self.take()
        if arrays is None:
            return 0
        size = arrays.size
        self.keep(arrays)
        return size

    cdef void give(self, PyObject *x) noexcept:
        cdef PyObject *other = fa_swap(&self.kept, x)
        if other != NULL:
            Py_DECREF(<object> other)

    cdef Arrays take(self):
        cdef PyObject *there = fa_swap(&self.kept, NULL)
        if there == NULL:
            return None
        cdef Arrays arrays = <Arrays> there
        Py_DECREF(arrays)
        return arrays

    cdef int keep(self, Arrays arrays) except -1:
        if arrays.size <= MOST_KEPT:
            Py_INCREF(arrays)
            self.give(<PyObject *> arrays)
        return 0


cdef class Arrays:
    """Of one step: what is projected, and the heads of its attention."""
    cdef cnp.ndarray whole          # (rows, columns of query, key and value)
    cdef cnp.ndarray query, key, value, both    # views, by head
    cdef cnp.ndarray heads          # (rows, heads side by side), of the cache's dtype
    cdef cnp.ndarray by_head        # a view
    cdef tuple shape                # of the tokens
    cdef object stored
    cdef size_t size


cdef cnp.ndarray by_head(object rows, tuple axes, object count, object channels):
    return rows.reshape((*axes, count, channels)).swapaxes(-2, -3)


cdef Arrays new_arrays(layer, tuple shape, real, stored):
    cdef Arrays a = Arrays.__new__(Arrays)
    cdef tuple axes = shape[:-1]
    cdef Py_ssize_t rows = 1, n
    for n in axes:
        rows *= n
    query, key = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    whole = empty((rows, query + key + layer.num_kv_heads * layer.value_dim), real)
    a.whole = whole
    a.query = by_head(whole[:, :query], axes, layer.num_heads, layer.head_dim)
    a.key = by_head(whole[:, query:query + key], axes, layer.num_kv_heads, layer.head_dim)
    a.value = by_head(whole[:, query + key:], axes, layer.num_kv_heads, layer.value_dim)
    a.both = by_head(whole[:, :query + key], axes, layer.num_heads + layer.num_kv_heads, layer.head_dim)
    a.heads = empty((rows, layer.num_heads * layer.value_dim), stored)
    a.by_head = by_head(a.heads, axes, layer.num_heads, layer.value_dim)
    a.shape, a.stored = shape, stored
    a.size = whole.nbytes + (<object> a.heads).nbytes
    return a


cdef bint fits(layer, cache, cnp.ndarray x):
    """Whether the cache is one of this layer for these tokens."""
    cdef cnp.ndarray key = cache._key, value = cache._value
    cdef int i, axes = cnp.PyArray_NDIM(x) + 1
    if cnp.PyArray_NDIM(key) != axes:
        return False
    for i in range(axes - 3):
        if cnp.PyArray_DIM(key, i) != cnp.PyArray_DIM(x, i):
            return False
    return (cnp.PyArray_DIM(key, axes - 3) == layer.num_kv_heads and
            cnp.PyArray_DIM(key, axes - 1) == layer.head_dim and
            cnp.PyArray_DIM(value, axes - 1) == layer.value_dim)


cdef object window_of(cache, dict rules):
    """The window of a step over this cache, None without one, or False where it has to be checked."""
    window, given = cache._window, rules.get("window_size")
    if window is None:
        return given
    if given is None:
        return window - 1, None
    left = given[0] if type(given) is tuple and len(given) == 2 else given
    return given if type(left) is int and 0 <= left <= window else False


cdef int place(cnp.ndarray to, cnp.ndarray x, const int64_t *at) except -1:
    """Writes the rows of x, (..., heads, tokens, channels), into each sequence of `to` from token `at` on."""
    cdef int axes = cnp.PyArray_NDIM(to), i
    cdef Py_ssize_t heads = cnp.PyArray_DIM(to, axes - 3), capacity = cnp.PyArray_DIM(to, axes - 2)
    cdef Py_ssize_t tokens = cnp.PyArray_DIM(x, axes - 2), sequences = 1, b, h, t
    cdef Py_ssize_t row = cnp.PyArray_DIM(to, axes - 1) * cnp.PyArray_ITEMSIZE(to)
    cdef Py_ssize_t token_step = cnp.PyArray_STRIDE(x, axes - 2), head_step = cnp.PyArray_STRIDE(x, axes - 3)
    cdef char *target = <char *> cnp.PyArray_DATA(to)
    cdef const char *source = <const char *> cnp.PyArray_DATA(x)
    for i in range(axes - 3):
        sequences *= cnp.PyArray_DIM(to, i)
    for b in range(sequences):
        for h in range(heads):
            for t in range(tokens):
                memcpy(target + ((b * heads + h) * capacity + at[b] + t) * row,
                       source + (b * tokens + t) * token_step + h * head_step, row)
    return 0


cdef const int64_t *numbers(cnp.ndarray a) noexcept:
    return <const int64_t *> cnp.PyArray_DATA(a)


cdef bint are_equal(cnp.ndarray a) noexcept:
    cdef Py_ssize_t i
    for i in range(1, cnp.PyArray_SIZE(a)):
        if numbers(a)[i] != numbers(a)[0]:
            return False
    return True


def step(layer, x, cache, dict rules):
    """The answer of a call with a cache, which is this call's alone; None where that is not the usual case."""
    cdef cnp.ndarray tokens, lengths, dropped, rows, result
    cdef Arrays arrays
    cdef Scratch scratch
    cdef Py_ssize_t length, longest, i
    cdef int axes
    weights = layer._weights
    if not cnp.PyArray_CheckExact(x) or weights.every is None:
        return None
    tokens = x
    axes = cnp.PyArray_NDIM(tokens)
    if (axes < 2 or not cnp.PyArray_IS_C_CONTIGUOUS(tokens) or not cnp.PyArray_ISALIGNED(tokens) or
            (<object> tokens).dtype is not layer.dtype or cnp.PyArray_SIZE(tokens) == 0 or
            cnp.PyArray_DIM(tokens, axes - 1) != layer.d_model or not fits(layer, cache, tokens)):
        return None
    for name, rule in rules.items():
        if rule is not None and (name in UNUSUAL or name == "return_weights" and rule is not False):
            return None
    window = window_of(cache, rules)
    if window is False:
        return None
    length, longest = cnp.PyArray_DIM(tokens, axes - 2), cache._longest
    lengths, dropped = cache._lengths, cache._dropped
    if longest + length > cache._capacity:
        return None
    longest += length

    real, stored = layer._accumulation, cache._dtype
    scratch = layer._scratch
    arrays = scratch.take()
    if arrays is None or arrays.shape != (<object> tokens).shape or arrays.stored is not stored:
        arrays = new_arrays(layer, (<object> tokens).shape, real, stored)
    num_threads, given = rules.get("num_threads"), dict(rules)
    given["window_size"] = window
    given["enable_gqa"] = layer.num_heads != layer.num_kv_heads
    with np.errstate(all="ignore"):
        rows = cnp.PyArray_Cast(tokens, real.num) if (<object> tokens).dtype is not real else tokens
        rows = (<object> rows).reshape(len(arrays.whole), layer.d_model)
        project(rows, weights.every, weights.b_every, arrays.whole)
        if layer.rotary_dim is not None:
            first = lengths + dropped
            if are_equal(first):
                first = numbers(first)[0]
            layer._turn(arrays.both, first, num_threads, False)
        query, key, value = arrays.query, arrays.key, arrays.value
        if stored is not real:
            query, key, value = (a.astype(stored) for a in (query, key, value))
        place(cache._key, key, numbers(lengths))
        place(cache._value, value, numbers(lengths))
        new_lengths = lengths + length
        if not are_equal(lengths):
            given["key_lengths"] = new_lengths
        if weights.out is None:  # the heads are the caller's
            heads = empty((len(rows), layer.d_out), stored)
            into = by_head(heads, (<object> tokens).shape[:-1], layer.num_heads, layer.value_dim)
        else:
            heads, into = arrays.heads, arrays.by_head
        answer = attend(read_dot_product(query, cache._key[..., :longest, :], cache._value[..., :longest, :],
                                         rules_of(given), None, into))
        shape = (*(<object> tokens).shape[:-1], layer.d_out)
        if weights.out is None:
            result = heads.reshape(shape)
        else:
            result = empty(shape, real)
            project(heads if stored is real else heads.astype(real), weights.out, weights.b_out,
                    (<object> result).reshape(len(rows), layer.d_out))
        if (<object> result).dtype is not layer.dtype:
            result = rounded(result, layer.dtype, None)
    new_lengths.flags.writeable = False
    cache._lengths, cache._longest = new_lengths, longest
    scratch.keep(arrays)
    return result if type(answer) is not tuple else (result, *answer[1:])
