# cython: wraparound=True
"""A layer's call over a cache, or to a context that is projected already, in the usual case, where what surrounds
attention would take longer than it: tokens of the layer's own dtype, one after the other in memory, all of which come
into a cache that has room for them.

Whatever is unusual, and whatever might be wrong, is left to the general way (`MultiHeadAttention._answered`), whose
results have the same bits; so nothing is refused here, but for rules of attention that it refuses itself. Nothing is
part of the cache before the call has succeeded.
"""
import numpy as np

cimport numpy as cnp
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.math cimport pow
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from fastattn._attention cimport attend
from fastattn._call cimport read_dot_product
from fastattn._checks cimport empty, shape_of
from fastattn._layers cimport dense
from fastattn._quantize cimport place_int8
from fastattn._rules cimport rules_of
from fastattn._runtime cimport FA_F32, FA_F64, FA_ROW_AXES, fa_kernels, kernels_for

from fastattn.cache import KVCache
from fastattn._layers import norm
from fastattn.projections import rounded

cnp.import_array()

cdef extern from *:
    """
    /* Puts a reference where there is one or none, and returns what was there. */
    static PyObject *fa_swap(PyObject **p, PyObject *x) { return __atomic_exchange_n(p, x, __ATOMIC_ACQ_REL); }
    """
    PyObject *fa_swap(PyObject **, PyObject *) noexcept

cdef extern from *:  # of NumPy, without a reference to the last argument
    object new_view "PyArray_New"(void *subtype, int axes, const cnp.npy_intp *shape, int type_num,
                                  const cnp.npy_intp *strides, void *data, int itemsize, int flags, PyObject *of)

# Not those with columns, lengths or positions, which count from what is in the cache, nor those with results of their
# own.
cdef frozenset USUAL = frozenset(("is_causal", "window_size", "relative_bias", "alibi_slopes", "scale", "softcap",
                                  "sinks", "activation", "num_threads"))

cdef enum:
    MOST_KEPT = 1 << 18         # bytes of projected arrays and heads that a layer keeps
    FEW_TOKENS = 64             # of all sequences, that are rotated here: each position has its own angles


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
    cdef cnp.ndarray of_query, of_context   # views: those of the query, and the others
    cdef cnp.ndarray query, key, value, both    # views, by head
    cdef cnp.ndarray heads          # (rows, heads side by side), of the cache's dtype
    cdef cnp.ndarray by_head        # a view
    cdef double[::1] speeds         # radians per position of each pair that rotates, or None
    cdef double factor              # of rotated channels
    cdef cnp.ndarray turns          # memory for cosines and sines
    cdef tuple shape                # of the tokens
    cdef bint looks                 # to a context: only the query is projected
    cdef object stored
    cdef size_t size


cdef cnp.ndarray by_head(object rows, tuple axes, object count, object channels):
    return rows.reshape((*axes, count, channels)).swapaxes(-2, -3)


cdef tuple speeds_of(layer):
    """As the tables of `apply_rotary` have them."""
    cdef Py_ssize_t pairs = layer.rotary_dim // 2, i
    cdef double base = 10000.0 if layer.rotary_base is None else layer.rotary_base
    if layer.rotary_frequencies is not None:
        frequencies, factor = layer.rotary_frequencies
        return np.array(frequencies, np.float64), factor
    speeds = empty((pairs,), np.dtype(np.float64))
    cdef double[::1] speed = speeds
    for i in range(pairs):
        speed[i] = pow(base, -<double> i / <double> pairs)
    return speeds, 1.0


cdef Arrays new_arrays(layer, tuple shape, real, stored):
    cdef Arrays a = Arrays.__new__(Arrays)
    cdef tuple axes = shape[:-1]
    cdef Py_ssize_t rows = 1, n
    for n in axes:
        rows *= n
    query, key = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    whole = empty((rows, query + key + layer.num_kv_heads * layer.value_dim), real)
    a.whole = whole
    a.of_query, a.of_context = whole[:, :query], whole[:, query:]
    a.query = by_head(whole[:, :query], axes, layer.num_heads, layer.head_dim)
    a.key = by_head(whole[:, query:query + key], axes, layer.num_kv_heads, layer.head_dim)
    a.value = by_head(whole[:, query + key:], axes, layer.num_kv_heads, layer.value_dim)
    a.both = by_head(whole[:, :query + key], axes, layer.num_heads + layer.num_kv_heads, layer.head_dim)
    a.heads = empty((rows, layer.num_heads * layer.value_dim), stored)
    a.by_head = by_head(a.heads, axes, layer.num_heads, layer.value_dim)
    a.speeds = None
    if layer.rotary_dim is not None and rows <= FEW_TOKENS:
        a.speeds, a.factor = speeds_of(layer)
        a.turns = empty((max(layer.rotary_dim, 1),), real)
    a.shape, a.stored = shape, stored
    a.size = whole.nbytes + (<object> a.heads).nbytes
    return a


cdef Arrays new_arrays_of_query(layer, tuple shape, real):
    cdef Arrays a = Arrays.__new__(Arrays)
    cdef tuple axes = shape[:-1]
    cdef Py_ssize_t rows = 1, n
    for n in axes:
        rows *= n
    a.whole = empty((rows, layer.num_heads * layer.head_dim), real)
    a.query = by_head(a.whole, axes, layer.num_heads, layer.head_dim)
    a.heads = empty((rows, layer.num_heads * layer.value_dim), real)
    a.by_head = by_head(a.heads, axes, layer.num_heads, layer.value_dim)
    a.shape, a.stored, a.looks = shape, real, True
    a.size = (<object> a.whole).nbytes + (<object> a.heads).nbytes
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
    cdef Py_ssize_t tokens = cnp.PyArray_DIM(x, axes - 2), sequences = 1, b, h, t, rest
    cdef Py_ssize_t row = cnp.PyArray_DIM(to, axes - 1) * cnp.PyArray_ITEMSIZE(to)
    cdef Py_ssize_t token_step = cnp.PyArray_STRIDE(x, axes - 2), head_step = cnp.PyArray_STRIDE(x, axes - 3)
    cdef char *target = <char *> cnp.PyArray_DATA(to)
    cdef const char *source
    for i in range(axes - 3):
        sequences *= cnp.PyArray_DIM(to, i)
    for b in range(sequences):
        source, rest = <const char *> cnp.PyArray_DATA(x), b
        for i in range(axes - 4, -1, -1):
            source += rest % cnp.PyArray_DIM(x, i) * cnp.PyArray_STRIDE(x, i)
            rest //= cnp.PyArray_DIM(x, i)
        for h in range(heads):
            for t in range(tokens):
                memcpy(target + ((b * heads + h) * capacity + at[b] + t) * row, source + h * head_step + t * token_step,
                       row)
    return 0


cdef const int64_t *numbers(cnp.ndarray a) noexcept:
    return <const int64_t *> cnp.PyArray_DATA(a)


cdef bint are_equal(cnp.ndarray a) noexcept:
    cdef Py_ssize_t i
    for i in range(1, cnp.PyArray_SIZE(a)):
        if numbers(a)[i] != numbers(a)[0]:
            return False
    return True


cdef int turn(layer, Arrays arrays, cnp.ndarray lengths, cnp.ndarray dropped, object num_threads) except -1:
    """Rotates query and key, in place."""
    cdef const fa_kernels *kernels
    cdef int axes = cnp.PyArray_NDIM(arrays.both)
    cdef Py_ssize_t heads = cnp.PyArray_DIM(arrays.both, axes - 3), tokens = cnp.PyArray_DIM(arrays.both, axes - 2)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(arrays.both, axes - 1), row, b, t, _h
    cdef bint interleaved
    cdef char *x
    if arrays.speeds is None:
        first = lengths + dropped
        layer._turn(arrays.both, first if not are_equal(first) else numbers(first)[0], num_threads, False)
        return 0
    if arrays.speeds.shape[0] == 0:
        return 0
    interleaved = layer.rotary_interleaved
    kernels = kernels_for(FA_F64 if cnp.PyArray_TYPE(arrays.both) == cnp.NPY_FLOAT64 else FA_F32)
    row = cnp.PyArray_STRIDE(arrays.whole, 0)
    x = <char *> cnp.PyArray_DATA(arrays.whole)
    for b in range(cnp.PyArray_SIZE(lengths)):
        for t in range(tokens):
            kernels.turns(cnp.PyArray_DATA(arrays.turns), &arrays.speeds[0], arrays.speeds.shape[0],
                          numbers(lengths)[b] + numbers(dropped)[b] + t, arrays.factor)
            for _h in range(heads):
                kernels.rotate(x, 0, x, 0, <char *> cnp.PyArray_DATA(arrays.turns), channels, arrays.speeds.shape[0],
                               1, interleaved, False)
                x += channels * cnp.PyArray_ITEMSIZE(arrays.whole)
            x += row - heads * channels * cnp.PyArray_ITEMSIZE(arrays.whole)
    return 0


cdef cnp.ndarray longer(cnp.ndarray lengths, Py_ssize_t tokens):
    """Read-only."""
    cdef cnp.ndarray a = cnp.PyArray_EMPTY(cnp.PyArray_NDIM(lengths), cnp.PyArray_DIMS(lengths), cnp.NPY_INT64, 0)
    cdef Py_ssize_t i
    for i in range(cnp.PyArray_SIZE(a)):
        (<int64_t *> cnp.PyArray_DATA(a))[i] = numbers(lengths)[i] + tokens
    cnp.PyArray_CLEARFLAGS(a, cnp.NPY_ARRAY_WRITEABLE)
    return a


cdef cnp.ndarray first_tokens(cnp.ndarray a, Py_ssize_t tokens):
    """a[..., :tokens, :]"""
    cdef int axes = cnp.PyArray_NDIM(a), i
    cdef cnp.npy_intp[<int> FA_ROW_AXES] shape
    for i in range(axes):
        shape[i] = cnp.PyArray_DIM(a, i)
    shape[axes - 2] = tokens
    cdef cnp.ndarray view = new_view(<void *> np.ndarray, axes, shape, cnp.PyArray_TYPE(a), cnp.PyArray_STRIDES(a),
                                     cnp.PyArray_DATA(a), 0, cnp.NPY_ARRAY_ALIGNED, NULL)
    cnp.set_array_base(view, a)
    return view


cdef cnp.ndarray result_like(cnp.ndarray x, Py_ssize_t channels, object dtype):
    """An array of the shape of x, but for the last axis."""
    cdef cnp.npy_intp[<int> FA_ROW_AXES] shape
    cdef int axes = cnp.PyArray_NDIM(x), i
    for i in range(axes - 1):
        shape[i] = cnp.PyArray_DIM(x, i)
    shape[axes - 1] = channels
    return cnp.PyArray_EMPTY(axes, shape, (<cnp.dtype> dtype).type_num, 0)


cdef bint is_usual(layer, x, dict rules):
    cdef cnp.ndarray tokens
    cdef int axes
    if not cnp.PyArray_CheckExact(x):
        return False
    tokens = x
    axes = cnp.PyArray_NDIM(tokens)
    if (axes < 2 or not cnp.PyArray_IS_C_CONTIGUOUS(tokens) or not cnp.PyArray_ISALIGNED(tokens) or
            tokens.dtype is not layer.dtype or layer._longest is not None or cnp.PyArray_SIZE(tokens) == 0 or
            cnp.PyArray_DIM(tokens, axes - 1) != layer.d_model):
        return False
    for name in rules:
        if name not in USUAL:
            return False
    return True


cdef int normalise(layer, str name, cnp.ndarray heads, object num_threads) except -1:
    """The RMS norm of queries or keys, in place, if the layer has one."""
    weight = layer._norms.get(name)
    if weight is not None:
        norm(False, heads, weight, None, layer._norm_eps, 0.0, None, False, heads, num_threads)
    return 0


def look(layer, x, context, dict rules):
    """The answer of a call with a projected context; None where that is not the usual case."""
    cdef cnp.ndarray tokens, result
    cdef Arrays arrays
    cdef Scratch scratch
    if not is_usual(layer, x, rules):
        return None
    tokens = x
    real, lengths, shape = layer._accumulation, context._lengths, shape_of(tokens)
    query_matrix, _, out_matrix = layer._stored.products()
    if (context._of != layer._mark or context._dtype is not layer.dtype or out_matrix is None or
            shape[:-2] != shape_of(context._key)[:-3] or
            lengths is not None and (type(lengths) is int or shape_of(lengths) != shape[:-2])):
        return None
    scratch, num_threads = layer._scratch, rules.get("num_threads")
    arrays = scratch.take()
    if arrays is None or not arrays.looks or arrays.shape != shape:
        arrays = new_arrays_of_query(layer, shape, real)
    rules["enable_gqa"] = layer.num_heads != layer.num_kv_heads
    if lengths is not None:
        rules["key_lengths"] = lengths[..., None]
    rows = (<object> tokens).reshape(cnp.PyArray_DIM(arrays.whole, 0), -1)
    dense(query_matrix, rows, real, None, None, None, arrays.whole, num_threads)
    normalise(layer, "q_norm", arrays.query, num_threads)
    attend(read_dot_product(arrays.query, context._key, context._value, rules_of(rules), None, arrays.by_head))
    result = result_like(tokens, layer.d_out, layer.dtype)
    dense(out_matrix, arrays.heads, layer.dtype, None, None, None,
          (<object> result).reshape(cnp.PyArray_DIM(arrays.whole, 0), -1), num_threads)
    scratch.keep(arrays)
    return result


def step(layer, x, cache, dict rules):
    """The answer of a call with a cache; None where that is not the usual case."""
    cdef cnp.ndarray tokens
    if layer.d_model != layer.d_context or not isinstance(cache, KVCache) or not is_usual(layer, x, rules):
        return None
    tokens = x
    with cache._turn:
        return answer(layer, tokens, cache, rules) if fits(layer, cache, tokens) else None


cdef cnp.ndarray answer(layer, cnp.ndarray tokens, cache, dict rules):
    """The same of tokens that fit in a cache which is this call's alone."""
    cdef cnp.ndarray lengths = cache._lengths, dropped = cache._dropped, new_lengths, result
    cdef Py_ssize_t came = cnp.PyArray_DIM(tokens, cnp.PyArray_NDIM(tokens) - 2), longest = cache._longest + came
    cdef Arrays arrays
    cdef Scratch scratch = layer._scratch
    cdef tuple scales = None
    real, stored, window = layer._accumulation, cache._computed, window_of(cache, rules)
    query_matrix, context_matrix, out_matrix = layer._stored.products()
    num_threads = rules.get("num_threads")
    if window is False or longest > cache._capacity or cache._awaits_mean:
        return None
    arrays = scratch.take()
    if arrays is None or arrays.looks or arrays.shape != shape_of(tokens) or arrays.stored is not stored:
        arrays = new_arrays(layer, shape_of(tokens), real, stored)
    new_lengths = longer(lengths, came)
    rules["window_size"] = window
    rules["enable_gqa"] = layer.num_heads != layer.num_kv_heads
    if not are_equal(lengths):
        rules["key_lengths"] = new_lengths
    rows = (<object> tokens).reshape(cnp.PyArray_DIM(arrays.whole, 0), -1)
    dense(query_matrix, rows, real, None, None, None, arrays.of_query, num_threads)
    dense(context_matrix, rows, real, None, None, None, arrays.of_context, num_threads)
    normalise(layer, "q_norm", arrays.query, num_threads)
    normalise(layer, "k_norm", arrays.key, num_threads)
    if layer.rotary_dim is not None:
        turn(layer, arrays, lengths, dropped, num_threads)
    query, key, value = arrays.query, arrays.key, arrays.value
    if stored is not real:
        with np.errstate(all="ignore"):
            query = query.astype(stored)
            if not cache._quantized:
                key, value = key.astype(stored), value.astype(stored)
    if cache._quantized:
        place_int8("the projected key", key, cache._center, cache._key, cache._key_scale, NULL, NULL, numbers(lengths))
        place_int8("the projected value", value, None, cache._value, cache._value_scale, NULL, NULL, numbers(lengths))
        scales = (first_tokens(cache._key_scale, longest), first_tokens(cache._value_scale, longest), cache._center)
    else:
        place(cache._key, key, numbers(lengths))
        place(cache._value, value, numbers(lengths))
    heads, into = arrays.heads, arrays.by_head
    if out_matrix is None:  # the heads are the caller's
        heads = empty((len(rows), layer.d_out), stored)
        into = by_head(heads, shape_of(tokens)[:-1], layer.num_heads, layer.value_dim)
    attend(read_dot_product(query, first_tokens(cache._key, longest), first_tokens(cache._value, longest),
                            rules_of(rules), None, into, scales))
    if out_matrix is None:
        result = heads.reshape((*shape_of(tokens)[:-1], layer.d_out))
        if stored is not layer.dtype:
            result = rounded(result, layer.dtype, None)
    else:
        result = result_like(tokens, layer.d_out, layer.dtype)
        dense(out_matrix, heads, layer.dtype, None, None, None, (<object> result).reshape(len(rows), -1), num_threads)
    cache._lengths, cache._longest = new_lengths, longest
    scratch.keep(arrays)
    return result
