# cython: wraparound=True
"""A call of attention, checked: its shapes, rules, views and results as one plain description, for the driver.

Nothing here computes, and nothing is written to `out`. It is compiled because a small call's time is mostly spent here.
"""
import numpy as np

cimport numpy as cnp
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.float cimport DBL_MAX
from libc.math cimport sqrt
from libc.stdint cimport INT64_MAX

from fastattn._checks cimport (FAR, accumulation, as_array, checked_out, checked_threads, converted, empty, flag,
                               floating, integer, integers, promoted, real, refuse_overlap, shape_of, storage_of,
                               too_few_axes)
from fastattn._rules cimport Rules, given, rules_of
from fastattn._runtime cimport FA_BF16, FA_DOT, FA_F16, FA_F32, FA_F64, FA_RELU, FA_SIGMOID, FA_SOFTMAX, fa_dtype

cnp.import_array()

# As in `Operand`, for messages.
cdef tuple OPERAND_NAMES = (
    "query", "key", "value", "mask", "bias", "relative_bias", "out", "weights", "lse", "alibi_slopes", "sinks",
    "key_lengths", "query_lengths", "query_offset", "keys_before")


# Rules

cdef bint weights_flag(object x) except -1:
    if type(x) is str:
        raise ValueError(f"return_weights must be True, False or 'band', not {x!r}")
    return flag(x, "return_weights")


cdef int64_t window_side(object x) except? -2:
    allowed = "an integer w, or a pair (left, right), of integers that are at least 0, or -1 or None for unbounded"
    if x is None:
        return INT64_MAX
    n = integer(x, "window_size", allowed, -1)
    return INT64_MAX if n == -1 or n >= FAR else n


cdef int read_window(Problem p, object window_size, bint is_causal) except -1:
    p.shared.left = p.shared.right = INT64_MAX
    if window_size is not None:
        if isinstance(window_size, (tuple, list)) or getattr(window_size, "ndim", 0) == 1:
            if len(window_size) != 2:
                raise ValueError(f"window_size must be an integer or a pair (left, right), "
                                 f"not {len(window_size)} numbers: {window_size!r}")
            p.shared.left = window_side(window_size[0])
            p.shared.right = window_side(window_size[1])
        else:
            p.shared.left = p.shared.right = window_side(window_size)
    if is_causal:
        p.shared.right = 0
    return 0


cdef tuple checked_sides(object left, object right):
    """A window_size of truncated_attention's two arguments, which a message is to call by their own names."""
    for name, x in (("left", left), ("right", right)):
        allowed = "an integer of at least 0, or -1 or None for all keys"
        if x is not None:
            integer(x, name, allowed, -1)
    return left, right


cdef int read_chunks(Problem p, object chunk_size, object left_chunks) except -1:
    p.shared.chunk = 0
    p.shared.left_chunks = INT64_MAX
    if chunk_size is None:
        if left_chunks is not None:
            raise ValueError(f"left_chunks={left_chunks!r} needs chunk_size, the number of keys in a chunk")
        return 0
    p.shared.chunk = min(integer(chunk_size, "chunk_size", "an integer of at least 1, or None", 1), FAR)
    if left_chunks is not None:
        n = integer(left_chunks, "left_chunks", "an integer of at least 0, or None or -1 for all", -1)
        if n >= 0:
            p.shared.left_chunks = min(n, FAR)
    return 0


# Batch axes

cdef inline Shape dims_of(cnp.ndarray a) noexcept:
    cdef Shape s
    s.axes, s.size = cnp.PyArray_NDIM(a), cnp.PyArray_DIMS(a)
    return s


cdef tuple as_tuple(Shape s):
    return tuple([s.size[i] for i in range(s.axes)])


cdef inline Py_ssize_t from_right(Shape s, int axis) noexcept:
    """Size of an axis, of which 1 is the last one; 1 where there is none."""
    return s.size[s.axes - axis] if axis <= s.axes else 1


cdef str of_layout(Shape query, Shape key, Shape value):
    """What to say of arrays whose heads do not fit and would, were the axis behind them that of the heads."""
    cdef int axes = query.axes
    if axes < 3 or key.axes != axes or value.axes != axes:
        return ""
    cdef Py_ssize_t heads = query.size[axes - 2], shared = key.size[axes - 2]
    if (shared == 0 or heads % shared or value.size[axes - 2] != shared or
            key.size[axes - 3] != value.size[axes - 3]):
        return ""
    layout = "(B, S, H, D)" if axes == 4 else "(S, H, D)" if axes == 3 else "(..., S, H, D)"
    return f"; arrays {layout}, with the heads behind the tokens, are passed as x.swapaxes({axes - 3}, {axes - 2})"


cdef object bad_heads(Shape query, Shape key, Shape value):
    return ValueError(f"the batch axes of query {as_tuple(query)}, key {as_tuple(key)} and value {as_tuple(value)} do "
                      f"not broadcast{of_layout(query, key, value)}; enable_gqa=True allows a query with a whole "
                      f"multiple of the heads (axis -3) of key and value")


cdef Py_ssize_t read_group(Shape query, Shape key, Shape value) except -1:
    """Query heads that share a key head."""
    cdef Py_ssize_t heads = from_right(query, 3), shared = from_right(key, 3), value_heads = from_right(value, 3)
    if shared != value_heads:
        raise ValueError(f"enable_gqa needs as many heads (axis -3) in key as in value, not {shared} and {value_heads}")
    if heads != shared and (shared == 0 or heads % shared):
        raise ValueError(f"enable_gqa needs a whole multiple of key's {shared} heads (axis -3) in query, not "
                         f"{heads}{of_layout(query, key, value)}")
    return heads // shared if shared else 1


cdef int read_batch(Problem p, Shape query, Shape key, Shape value) except -1:
    """Broadcasts the batch axes of query, key and value into p.shape; a shared key head counts for its whole group."""
    cdef Shape[3] all_of_them = [query, key, value]
    cdef int i, axis, axes = max(query.axes, key.axes, value.axes) - 2
    cdef Py_ssize_t n, size
    p.axes = axes
    p.heads = 1
    for axis in range(3, axes + 3):
        size = 1
        for i in range(3):
            n = from_right(all_of_them[i], axis)
            if axis == 3 and i > 0 and all_of_them[i].axes > 2:
                n *= p.group
            if n != size and n != 1:
                if size != 1:
                    raise bad_heads(query, key, value)
                size = n
        p.shape[axes + 2 - axis] = size
        p.heads *= size
    return 0


cdef tuple batch_shape(Problem p):
    return tuple([p.shape[i] for i in range(p.axes)])


cdef inline fa_dtype dtype_of(cnp.ndarray a) noexcept:
    """Of an array that has been checked; anything of a mask, or of integers."""
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT32:
        return FA_F32
    if number == cnp.NPY_FLOAT64:
        return FA_F64
    return FA_F16 if number == cnp.NPY_FLOAT16 else FA_BF16


cdef int place(Problem p, int operand, cnp.ndarray a, int trailing) except -1:
    """Notes where an array lies, and keeps it alive. trailing: how many of its last axes are not batch axes (at most
    2). The others are known to broadcast to p.shape, where a shared key head counts for its whole group (split_heads
    sees to that)."""
    cdef Layout *layout = &p.layouts[operand]
    cdef int ndim = cnp.PyArray_NDIM(a), i, axis
    layout.data = <char *> cnp.PyArray_DATA(a)
    layout.dtype = dtype_of(a)
    layout.row = layout.col = 0
    if trailing == 2:
        # A stride along an axis of one element means nothing; an address must not be made of it.
        if cnp.PyArray_DIM(a, ndim - 2) > 1:
            layout.row = cnp.PyArray_STRIDE(a, ndim - 2)
        layout.col = cnp.PyArray_STRIDE(a, ndim - 1)
        if cnp.PyArray_DIM(a, ndim - 1) <= 1:
            layout.col = cnp.PyArray_ITEMSIZE(a)
    elif trailing == 1:
        layout.row = cnp.PyArray_STRIDE(a, ndim - 1)
    for i in range(p.axes):
        axis = i - (p.axes - (ndim - trailing))
        if axis < 0 or cnp.PyArray_DIM(a, axis) == 1:
            layout.batch[i] = 0
        else:
            layout.batch[i] = cnp.PyArray_STRIDE(a, axis)
    p.operands[p.operand_count] = operand
    p.operand_count += 1
    p.kept.append(a)
    return 0


cdef int split_heads(Problem p) except -1:
    """Makes two axes of the head axis, (key heads, group): key and value stand still along the second."""
    cdef int last = p.axes - 1, n, operand
    cdef Py_ssize_t stride
    for n in range(p.operand_count):
        operand = p.operands[n]
        stride = p.layouts[operand].batch[last]
        if operand == KEY or operand == VALUE:
            p.layouts[operand].batch[last + 1] = 0
        else:
            p.layouts[operand].batch[last] = stride * p.group
            p.layouts[operand].batch[last + 1] = stride
    p.shape[last] //= p.group
    p.shape[last + 1] = p.group
    p.axes += 1
    return 0


cdef int broadcastable(cnp.ndarray a, str name, tuple batch, tuple trailing) except -1:
    """Raises where the array does not broadcast to batch + trailing."""
    whole = batch + trailing
    shape = shape_of(a)
    if len(shape) <= len(whole):
        for have, want in zip(reversed(shape), reversed(whole), strict=False):
            if have != want and have != 1:
                break
        else:
            return 0
    what = "the batch axes"
    if name == "mask":
        what = f"(..., L, S){of_padding(a, batch, trailing[1])}"
    elif trailing:
        what = "(..., L, left + right + 1)" if name == "relative_bias" else "(..., L, S)"
    raise ValueError(f"{name} has shape {shape}, which does not broadcast to {whole}, {what}")


cdef str of_padding(cnp.ndarray mask, tuple batch, Py_ssize_t keys):
    """What to say of a mask that looks like Hugging Face's, (B, S) with 1 for a token and 0 for padding."""
    if len(batch) == 0 or shape_of(mask) != (batch[0], keys):
        return ""
    axes = ", ".join([":"] + ["None"] * len(batch) + [":"])
    return (f". If it says which keys of each sequence are no padding, (B, S), pass mask[{axes}].astype(bool); or, "
            f"for padding on the right, key_lengths=mask.sum(-1), with an axis for the heads, [:, None], where lengths "
            f"have one")


cdef cnp.ndarray new_array(Problem p, Py_ssize_t rows, Py_ssize_t cols):
    """An array of shape p.shape + (rows, cols) and the result's dtype, not initialised."""
    cdef cnp.npy_intp dims[MOST_AXES]
    cdef int i
    if p.shared.dtype == FA_BF16 or p.axes + 2 > 32 or <double> p.heads * rows * cols > 1e15:
        return empty((*batch_shape(p), rows, cols), p.dtype)
    for i in range(p.axes):
        dims[i] = p.shape[i]
    dims[p.axes] = rows
    dims[p.axes + 1] = cols
    return cnp.PyArray_EMPTY(p.axes + 2, dims, (<cnp.dtype> p.dtype).type_num, 0)


cdef cnp.ndarray widened(cnp.ndarray a, int ndim):
    """At least ndim axes, without a copy."""
    if cnp.PyArray_NDIM(a) >= ndim:
        return a
    return (<object> a)[(None,) * (ndim - cnp.PyArray_NDIM(a))]


cdef int read_matrix(Problem p, int operand, cnp.ndarray a, str name, tuple batch, Py_ssize_t rows,
                     Py_ssize_t cols) except -1:
    """A mask or a bias: broadcasts to (..., L, S)."""
    broadcastable(a, name, batch, (rows, cols))
    a = widened(a, 2)
    place(p, operand, a, 2)
    if cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 2) == 1:
        p.layouts[operand].row = 0
    if cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1) == 1:
        p.layouts[operand].col = 0
    return 0


cdef int read_mask(Problem p, object mask, tuple batch, Py_ssize_t rows, Py_ssize_t cols) except -1:
    cdef cnp.ndarray a = as_array(mask, "mask")
    if cnp.PyArray_TYPE(a) != cnp.NPY_BOOL:
        raise TypeError(f"mask must be boolean, True where a query may attend to a key, not of dtype {a.dtype}; "
                        f"numbers that are added to the scores go to bias={of_padding(a, batch, cols)}")
    return read_matrix(p, MASK, a, "mask", batch, rows, cols)


cdef int read_bias(Problem p, object bias, tuple batch, Py_ssize_t rows, Py_ssize_t cols) except -1:
    cdef cnp.ndarray a = as_array(bias, "bias")
    if a.dtype.kind in "biu":
        raise TypeError(f"bias must be floating, not of dtype {a.dtype}; booleans that say "
                        f"which keys count go to mask=")
    storage_of(a, "bias")
    return read_matrix(p, BIAS, a, "bias", batch, rows, cols)


cdef int64_t band_width(Problem p, str what) except -1:
    """left + right + 1 of the window, which `what` needs bounded on both sides."""
    if p.shared.left == INT64_MAX or p.shared.right == INT64_MAX:
        raise ValueError(f"{what} needs window_size=(left, right) with both sides bounded (is_causal bounds the right)")
    return p.shared.left + p.shared.right + 1


cdef int read_relative_bias(Problem p, object bias, tuple batch, Py_ssize_t rows) except -1:
    cdef cnp.ndarray a = as_array(bias, "relative_bias")
    cdef int64_t width = band_width(p, "relative_bias")
    if a.dtype.kind in "biu":
        raise TypeError(f"relative_bias must be floating, not of dtype {a.dtype}")
    storage_of(a, "relative_bias")
    return read_matrix(p, RELATIVE_BIAS, a, "relative_bias", batch, rows, width)


cdef int read_per_head(Problem p, int operand, object x, str name, tuple batch, fa_dtype dtype) except -1:
    """Slopes or sinks: real numbers that broadcast over the batch axes, rounded to the accumulation dtype."""
    cdef cnp.ndarray a = as_array(x, name)
    if a.dtype.kind not in "biu" or not a.dtype.isnative:
        storage_of(a, name)
    broadcastable(a, name, batch, ())
    a = converted(converted(a, accumulation(dtype)), accumulation(FA_F64))
    place(p, operand, a, 0)
    return 0


cdef int read_integers(Problem p, int operand, object x, str name, tuple batch, object least, object most,
                       int64_t *scalar) except -1:
    cdef cnp.ndarray a = integers(x, name, batch, least, most, scalar)
    if a is not None:
        place(p, operand, a, 0)
    return 0


# The problem

cdef class Problem:
    """One call, checked."""

    def __cinit__(self):
        self.layouts = <Layout *> PyMem_Malloc(<int> OPERANDS * sizeof(Layout))
        if self.layouts == NULL:
            raise MemoryError("no memory for the description of a call")

    def __dealloc__(self):
        PyMem_Free(self.layouts)

    cdef object result(self):
        if self.weights is None:
            return self.out if self.lse is None else (self.out, self.lse)
        return (self.out, self.weights) if self.lse is None else (self.out, self.weights, self.lse)

    cdef void locate(self, Py_ssize_t head, Py_ssize_t sequence, fa_head *to) noexcept nogil:
        """Addresses and numbers of one head of one sequence."""
        cdef Py_ssize_t index[MOST_AXES]
        cdef char *at[<int> OPERANDS]
        cdef int i, n, operand
        cdef Layout *layout
        for i in range(self.axes - 1, -1, -1):
            index[i] = head % self.shape[i]
            head //= self.shape[i]
        for operand in range(<int> OPERANDS):
            at[operand] = NULL
        for n in range(self.operand_count):
            operand = self.operands[n]
            layout = &self.layouts[operand]
            at[operand] = layout.data
            for i in range(self.axes):
                at[operand] += index[i] * layout.batch[i]
        to[0] = self.sizes
        for operand in range(<int> FA_OPERANDS):
            to.view[operand].data = at[operand]
        if at[<int> KEY_LENGTHS] != NULL:
            to.key_length = (<int64_t *> at[<int> KEY_LENGTHS])[0]
        if at[<int> QUERY_LENGTHS] != NULL:
            to.query_length = (<int64_t *> at[<int> QUERY_LENGTHS])[0]
        if self.packed:
            to.queries = to.query_length = self.query_starts[sequence + 1] - self.query_starts[sequence]
            to.keys = to.key_length = self.key_starts[sequence + 1] - self.key_starts[sequence]
            for operand in range(<int> FA_OPERANDS):
                if operand == KEY or operand == VALUE:
                    to.view[operand].data += self.key_starts[sequence] * to.view[operand].row
                elif (operand == QUERY or operand == OUT or operand == LSE) and at[operand] != NULL:
                    to.view[operand].data += self.query_starts[sequence] * to.view[operand].row
        if at[<int> OFFSETS] != NULL:
            to.offset = (<int64_t *> at[<int> OFFSETS])[0]
        elif self.offset_is_default:
            to.offset = to.key_length - to.query_length
        if at[<int> KEYS_BEFORE] != NULL:
            to.keys_before = (<int64_t *> at[<int> KEYS_BEFORE])[0]
        to.query_length *= to.heads


cdef Problem new_problem():
    cdef Problem p = Problem.__new__(Problem)
    cdef int i
    for i in range(<int> OPERANDS):
        p.layouts[i].data = NULL
        p.layouts[i].dtype = FA_F32
        p.layouts[i].row = p.layouts[i].col = 0
    p.operand_count = 0
    p.kept = []
    p.sequences = 1
    p.packed = False
    return p


cdef int read_activation(Problem p, object activation, object sinks, bint return_lse) except -1:
    if type(activation) is not str:
        raise TypeError(f"activation must be 'softmax', 'relu' or 'sigmoid', not {activation!r}")
    if activation == "softmax":
        p.shared.activation = FA_SOFTMAX
        return 0
    if activation == "relu":
        p.shared.activation = FA_RELU
    elif activation == "sigmoid":
        p.shared.activation = FA_SIGMOID
    else:
        raise ValueError(f"activation must be 'softmax', 'relu' or 'sigmoid', not {activation!r}")
    if return_lse:
        raise ValueError(f"return_lse needs activation='softmax': {activation!r} has no log-sum-exp")
    if sinks is not None:
        raise ValueError(f"sinks needs activation='softmax': {activation!r} has no denominator")
    return 0


cdef int read_shapes(Problem p, Shape query, Shape key, Shape value, bint grouped) except -1:
    """Shapes of query, key and value that fit; batch axes."""
    if query.axes < 2:
        raise too_few_axes("query", as_tuple(query), "(..., L, D)")
    if key.axes < 2:
        raise too_few_axes("key", as_tuple(key), "(..., S, D)")
    if value.axes < 2:
        raise too_few_axes("value", as_tuple(value), "(..., S, E)")
    cdef Py_ssize_t channels = from_right(query, 1), keys = from_right(key, 2)
    if from_right(key, 1) != channels:
        raise ValueError(f"key has head_dim {from_right(key, 1)} (its last axis) and query {channels}: for dot "
                         f"products they must be equal")
    if from_right(value, 2) != keys:
        raise ValueError(f"value has {from_right(value, 2)} rows (axis -2) and key {keys}: there must be one value for "
                         f"each key")
    p.group = read_group(query, key, value) if grouped else 1
    read_batch(p, query, key, value)
    p.shared.head_dim = channels
    p.shared.value_dim = from_right(value, 1)
    p.sizes.queries = p.sizes.query_length = from_right(query, 2)
    p.sizes.keys = p.sizes.key_length = keys
    p.longest_query = p.sizes.queries
    p.longest_key = keys
    return 0


cdef int fill_views(Problem p) except -1:
    """The head axis is split where it is grouped; then the views of a head are what the layouts say."""
    cdef int operand
    if p.group > 1:
        split_heads(p)
    p.sizes.heads = 1
    for operand in range(<int> FA_OPERANDS):
        p.sizes.view[operand].data = NULL  # which locate fills in
        p.sizes.view[operand].row = p.layouts[operand].row
        p.sizes.view[operand].col = p.layouts[operand].col
        p.sizes.view[operand].dtype = p.layouts[operand].dtype
        p.sizes.view[operand].head = 0
    return 0


cdef int read_rules(Problem p, const Rules *r, object keys_before) except -1:
    """What all scores share, once p knows its sizes and its dtype."""
    cdef bint with_lse = flag(<object> r.return_lse, "return_lse")
    cdef tuple batch = None
    cdef Py_ssize_t rows = p.sizes.queries, cols = p.sizes.keys
    read_window(p, <object> r.window_size, flag(<object> r.is_causal, "is_causal"))
    read_chunks(p, <object> r.chunk_size, <object> r.left_chunks)
    read_activation(p, <object> r.activation, <object> r.sinks, with_lse)
    p.num_threads = checked_threads(<object> r.num_threads)
    if given(r.scale):
        p.shared.scale *= real(<object> r.scale, "scale", "a finite real number or None")
        p.shared.scale = max(-DBL_MAX, min(DBL_MAX, p.shared.scale))
    p.shared.softcap = 0
    if given(r.softcap):
        p.shared.softcap = real(<object> r.softcap, "softcap", "a positive finite number or None", True)
    p.shared.band = type(<object> r.return_weights) is str and <object> r.return_weights == "band"
    if p.shared.band:
        band_width(p, "return_weights='band'")
    else:
        weights_flag(<object> r.return_weights)

    p.offset_is_default = not given(r.query_offset)
    p.shared.has_slope, p.shared.has_sink = given(r.alibi_slopes), given(r.sinks)
    if not (given(r.key_lengths) or given(r.query_lengths) or given(r.query_offset) or given(r.mask) or given(r.bias) or
            given(r.relative_bias) or given(r.alibi_slopes) or given(r.sinks) or keys_before is not None):
        return 0
    batch = batch_shape(p)
    if given(r.key_lengths):
        read_integers(p, KEY_LENGTHS, <object> r.key_lengths, "key_lengths", batch, 0, cols, &p.sizes.key_length)
    if given(r.query_lengths):
        read_integers(p, QUERY_LENGTHS, <object> r.query_lengths, "query_lengths", batch, 0, rows,
                      &p.sizes.query_length)
    if given(r.query_offset):
        read_integers(p, OFFSETS, <object> r.query_offset, "query_offset", batch, None, None, &p.sizes.offset)
    if keys_before is not None:
        read_integers(p, KEYS_BEFORE, keys_before, "keys_before", batch, 0, FAR, &p.sizes.keys_before)
    if given(r.mask):
        read_mask(p, <object> r.mask, batch, rows, cols)
    if given(r.bias):
        read_bias(p, <object> r.bias, batch, rows, cols)
    if given(r.relative_bias):
        read_relative_bias(p, <object> r.relative_bias, batch, rows)
    if given(r.alibi_slopes):
        read_per_head(p, SLOPES, <object> r.alibi_slopes, "alibi_slopes", batch, p.shared.dtype)
    if given(r.sinks):
        read_per_head(p, SINKS, <object> r.sinks, "sinks", batch, p.shared.dtype)
    return 0


cdef int read_results(Problem p, const Rules *r, tuple inputs, tuple names) except -1:
    """Memory for the results. inputs, names: what came, which `out` must not overlap."""
    cdef Py_ssize_t rows = p.sizes.queries
    cdef tuple shape
    if not given(r.out):
        p.out = new_array(p, rows, p.shared.value_dim)
    else:
        shape = (*batch_shape(p), rows, p.shared.value_dim)
        p.out = checked_out(<object> r.out, shape, p.dtype, p.kept,
                            tuple([OPERAND_NAMES[p.operands[i]] for i in range(p.operand_count)]))
        refuse_overlap(p.out, inputs, names)
        refuse_overlap(p.out, (<object> r.alibi_slopes, <object> r.sinks, <object> r.key_lengths,
                               <object> r.query_lengths, <object> r.query_offset),
                       OPERAND_NAMES[<int> SLOPES:<int> KEYS_BEFORE])
    place(p, OUT, p.out, 2)
    if p.shared.band or <object> r.return_weights:
        cols = band_width(p, "return_weights='band'") if p.shared.band else p.sizes.keys
        p.weights = empty((*batch_shape(p), rows, cols), accumulation(p.shared.dtype))
        place(p, WEIGHTS, p.weights, 2)
    if <object> r.return_lse:
        p.lse = empty((*batch_shape(p), rows), accumulation(p.shared.dtype))
        place(p, LSE, p.lse, 1)
    return 0


cdef Problem read_call(Problem p, cnp.ndarray query, cnp.ndarray key, cnp.ndarray value, tuple inputs, tuple names,
                       const Rules *r, object keys_before):
    """query, key and value, of any dtypes; p.dtype, p.shared.dtype, .score and .scale are set.
    keys_before: how many keys were before the first one, of which chunks count; as query_offset."""
    read_shapes(p, dims_of(query), dims_of(key), dims_of(value), flag(<object> r.enable_gqa, "enable_gqa"))
    place(p, QUERY, query, 2)
    place(p, KEY, key, 2)
    place(p, VALUE, value, 2)
    read_rules(p, r, keys_before)
    read_results(p, r, inputs, names)
    fill_views(p)
    return p


cdef Problem read_dot_product(object query, object key, object value, Rules r, object keys_before=None,
                              bint packed=False):
    cdef Problem p = new_problem()
    cdef list arrays = [floating(query, "query"), floating(key, "key"), floating(value, "value")]
    cdef cnp.ndarray q
    p.packed = packed
    p.dtype = promoted(arrays, ("query", "key", "value"), &p.shared.dtype)
    p.shared.score = FA_DOT
    q = arrays[0]
    p.shared.scale = 1
    if not given(r.scale) and cnp.PyArray_NDIM(q) > 0:
        p.shared.scale = 1.0 / sqrt(<double> max(cnp.PyArray_DIM(q, cnp.PyArray_NDIM(q) - 1), 1))
    return read_call(p, q, arrays[1], arrays[2], (query, key, value) if given(r.out) else None,
                     ("query", "key", "value"), &r, keys_before)


def check(tuple query, tuple key, tuple value, dtype, dict some):
    """What a call with arrays of these shapes, computed in that dtype, and with these rules would refuse, `out` aside.
    Returns the shape of its output."""
    cdef Problem p = new_problem()
    cdef Rules r = rules_of(some)
    cdef Shape[3] shapes
    cdef cnp.npy_intp[3][<int> MOST_AXES] size
    cdef int i, axis
    for i, given_shape in enumerate((query, key, value)):
        shapes[i].axes, shapes[i].size = len(given_shape), size[i]
        for axis in range(shapes[i].axes):
            size[i][axis] = given_shape[axis]
    p.shared.dtype = FA_F64 if dtype == np.float64 else FA_F32
    p.shared.scale = 1
    read_shapes(p, shapes[0], shapes[1], shapes[2], flag(<object> r.enable_gqa, "enable_gqa"))
    read_rules(p, &r, None)
    return (*batch_shape(p), p.sizes.queries, p.shared.value_dim)


# Packed sequences

cdef const int64_t[::1] read_starts(object x, str name, Py_ssize_t total, str axis):
    cdef cnp.ndarray a = as_array(x, name)
    allowed = f"a one-dimensional integer array [0, n1, n1 + n2, ..., {total}] that never falls"
    if a.dtype.kind not in "iu" or not a.dtype.isnative:
        raise TypeError(f"{name} must be {allowed}, not of dtype {a.dtype}")
    if cnp.PyArray_NDIM(a) != 1 or a.size < 1:
        raise ValueError(f"{name} has shape {shape_of(a)}; it must be {allowed}")
    a = np.array(a, dtype=np.int64)  # of our own: nobody can change it after the check
    if a[0] != 0 or a[a.size - 1] != total or np.any(a[1:] < a[:-1]):
        raise ValueError(f"{name} must be {allowed} (the last number is the size of {axis}): it is "
                         f"{np.array2string(a, threshold=8)}")
    return a


cdef Problem read_varlen(object query, object key, object value, object cu_seqlens_q, object cu_seqlens_k, Rules r):
    cdef Problem p = read_dot_product(query, key, value, r, None, True)
    refuse_overlap(<object> r.out, (cu_seqlens_q, cu_seqlens_k), ("cu_seqlens_q", "cu_seqlens_k"))
    p.query_starts = read_starts(cu_seqlens_q, "cu_seqlens_q", p.sizes.queries, "query's axis -2")
    if cu_seqlens_k is None:
        if p.sizes.keys != p.sizes.queries:
            raise ValueError(f"cu_seqlens_k is needed where query and key have different total lengths "
                             f"({p.sizes.queries} and {p.sizes.keys})")
        p.key_starts = p.query_starts
    else:
        p.key_starts = read_starts(cu_seqlens_k, "cu_seqlens_k", p.sizes.keys, "key's axis -2")
    if p.key_starts.shape[0] != p.query_starts.shape[0]:
        raise ValueError(f"cu_seqlens_k has {p.key_starts.shape[0]} numbers and cu_seqlens_q "
                         f"{p.query_starts.shape[0]}: both must describe the same sequences")
    p.sequences = p.query_starts.shape[0] - 1
    cdef Py_ssize_t i
    p.longest_query = p.longest_key = 0
    for i in range(p.sequences):
        p.longest_query = max(p.longest_query, p.query_starts[i + 1] - p.query_starts[i])
        p.longest_key = max(p.longest_key, p.key_starts[i + 1] - p.key_starts[i])
    return p
