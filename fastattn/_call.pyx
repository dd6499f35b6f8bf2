# cython: wraparound=True
"""A call of attention, checked: its shapes, rules, views and results as a plain fa_call, for the driver.

Nothing here computes, and nothing is written to `out`. It is compiled because a small call's time is mostly spent here.
"""
import numpy as np

cimport numpy as cnp
from libc.float cimport DBL_MAX
from libc.math cimport sqrt
from libc.stdint cimport INT64_MAX
from libc.string cimport memset

from fastattn._checks cimport (FAR, accumulation, as_array, checked_out, checked_threads, converted, empty, flag,
                               floating, integer, integers, promoted, real, refuse_overlap, shape_of, storage_of,
                               too_few_axes)
from fastattn._rules cimport Rules, given, rules_of
from fastattn._runtime cimport (FA_BF16, FA_BIAS, FA_BLOCK_MASK, FA_CALL_OPERANDS, FA_DOT, FA_ENTMAX15, FA_F16,
                                FA_F32, FA_F64, FA_I8, FA_KEY, FA_KEYS_BEFORE, FA_KEY_CENTER, FA_KEY_LENGTHS,
                                FA_KEY_SCALE, FA_LSE, FA_MASK, FA_OFFSETS, FA_OPERANDS, FA_OUT, FA_PREPARED, FA_QUERY,
                                FA_QUERY_LENGTHS, FA_RELATIVE_BIAS, FA_RELU, FA_ROW_AXES, FA_SCALE_BLOCKS,
                                FA_SCALE_CHANNELS, FA_SCALE_TOKENS, FA_SIGMOID, FA_SINKS, FA_SLOPES, FA_SOFTMAX,
                                FA_SPARSEMAX, FA_VALUE, FA_VALUE_SCALE, FA_WEIGHTS, fa_call, fa_dtype, fa_head,
                                fa_layout, fa_problem, fa_scales, give_memory, take_memory)

cnp.import_array()

# By their numbers (kernels/call.h), for messages.
cdef tuple OPERAND_NAMES = (
    "query", "key", "value", "mask", "bias", "block_mask", "relative_bias", "prepared", "key_scale", "value_scale",
    "key_center", "out", "weights", "lse", "alibi_slopes", "sinks", "key_lengths", "query_lengths", "query_offset",
    "keys_before")


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


cdef int read_window(fa_call *call, object window_size, bint is_causal) except -1:
    call.problem.left = call.problem.right = INT64_MAX
    if window_size is not None:
        if isinstance(window_size, (tuple, list)) or getattr(window_size, "ndim", 0) == 1:
            if len(window_size) != 2:
                raise ValueError(f"window_size must be an integer or a pair (left, right), "
                                 f"not {len(window_size)} numbers: {window_size!r}")
            call.problem.left = window_side(window_size[0])
            call.problem.right = window_side(window_size[1])
        else:
            call.problem.left = call.problem.right = window_side(window_size)
    if is_causal:
        call.problem.right = 0
    return 0


cdef tuple checked_sides(object left, object right):
    """A window_size of truncated_attention's two arguments, which a message is to call by their own names."""
    for name, x in (("left", left), ("right", right)):
        allowed = "an integer of at least 0, or -1 or None for all keys"
        if x is not None:
            integer(x, name, allowed, -1)
    return left, right


cdef int read_chunks(fa_call *call, object chunk_size, object left_chunks) except -1:
    call.problem.chunk = 0
    call.problem.left_chunks = INT64_MAX
    if chunk_size is None:
        if left_chunks is not None:
            raise ValueError(f"left_chunks={left_chunks!r} needs chunk_size, the number of keys in a chunk")
        return 0
    call.problem.chunk = min(integer(chunk_size, "chunk_size", "an integer of at least 1, or None", 1), FAR)
    if left_chunks is not None:
        n = integer(left_chunks, "left_chunks", "an integer of at least 0, or None or -1 for all", -1)
        if n >= 0:
            call.problem.left_chunks = min(n, FAR)
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


cdef int read_batch(fa_call *call, Shape query, Shape key, Shape value) except -1:
    """Broadcasts the batch axes of query, key and value into call.shape; a shared key head counts for its group."""
    cdef Shape[3] all_of_them = [query, key, value]
    cdef int i, axis, axes = max(query.axes, key.axes, value.axes) - 2
    cdef Py_ssize_t n, size
    call.axes = axes
    call.heads = 1
    for axis in range(3, axes + 3):
        size = 1
        for i in range(3):
            n = from_right(all_of_them[i], axis)
            if axis == 3 and i > 0 and all_of_them[i].axes > 2:
                n *= call.group
            if n != size and n != 1:
                if size != 1:
                    raise bad_heads(query, key, value)
                size = n
        call.shape[axes + 2 - axis] = size
        call.heads *= size
    return 0


cdef tuple batch_shape(fa_call *call):
    return tuple([call.shape[i] for i in range(call.axes)])


cdef inline fa_dtype dtype_of(cnp.ndarray a) noexcept:
    """Of an array that has been checked; anything of a mask, or of integers."""
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT32:
        return FA_F32
    if number == cnp.NPY_FLOAT64:
        return FA_F64
    if number == cnp.NPY_FLOAT16:
        return FA_F16
    if number == cnp.NPY_INT8:
        return FA_I8
    # Of NumPy's own dtypes only float16 is a float of 2 bytes; as for masks and integers, kernels do not ask.
    return FA_BF16 if cnp.PyArray_ITEMSIZE(a) == 2 else FA_F32


cdef int lay_out(fa_layout *layout, int axes, cnp.ndarray a, int trailing) except -1:
    """Notes where an array lies. axes: batch axes of the call, to which its own broadcast; trailing: how many of its
    last axes are not batch axes (at most 2)."""
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
    for i in range(axes):
        axis = i - (axes - (ndim - trailing))
        if axis < 0 or cnp.PyArray_DIM(a, axis) == 1:
            layout.batch[i] = 0
        else:
            layout.batch[i] = cnp.PyArray_STRIDE(a, axis)
    return 0


cdef int place(Problem p, int operand, cnp.ndarray a, int trailing) except -1:
    """Notes where an operand lies, and keeps it alive. Its batch axes are known to broadcast to p.call.shape, where a
    shared key head counts for its whole group (split_heads sees to that)."""
    lay_out(&p.call.layouts[operand], p.call.axes, a, trailing)
    p.call.operands[p.call.operand_count] = operand
    p.call.operand_count += 1
    p.kept.append(a)
    return 0


cdef int split_heads(fa_call *call) except -1:
    """Makes two axes of the head axis, (key heads, group): key and value stand still along the second."""
    cdef int last = call.axes - 1, n, operand
    cdef Py_ssize_t stride
    for n in range(call.operand_count):
        operand = call.operands[n]
        stride = call.layouts[operand].batch[last]
        if operand in (FA_KEY, FA_VALUE, FA_PREPARED, FA_KEY_SCALE, FA_VALUE_SCALE, FA_KEY_CENTER):
            call.layouts[operand].batch[last + 1] = 0
        else:
            call.layouts[operand].batch[last] = stride * call.group
            call.layouts[operand].batch[last + 1] = stride
    call.shape[last] //= call.group
    call.shape[last + 1] = call.group
    call.axes += 1
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
        if name == "block_mask":
            what = "(..., ceil(L / rows), ceil(S / columns)) with block_size=(rows, columns)"
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
    """An array of shape p.call.shape + (rows, cols) and the result's dtype, not initialised."""
    cdef cnp.npy_intp dims[FA_ROW_AXES]
    cdef int i
    if p.call.problem.dtype == FA_BF16 or p.call.axes + 2 > 32 or <double> p.call.heads * rows * cols > 1e15:
        return empty((*batch_shape(p.call), rows, cols), p.dtype)
    for i in range(p.call.axes):
        dims[i] = p.call.shape[i]
    dims[p.call.axes] = rows
    dims[p.call.axes + 1] = cols
    return cnp.PyArray_EMPTY(p.call.axes + 2, dims, (<cnp.dtype> p.dtype).type_num, 0)


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
        p.call.layouts[operand].row = 0
    if cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1) == 1:
        p.call.layouts[operand].col = 0
    return 0


cdef int read_mask(Problem p, object mask, tuple batch, Py_ssize_t rows, Py_ssize_t cols) except -1:
    cdef cnp.ndarray a = as_array(mask, "mask")
    if cnp.PyArray_TYPE(a) != cnp.NPY_BOOL:
        raise TypeError(f"mask must be boolean, True where a query may attend to a key, not of dtype {a.dtype}; "
                        f"numbers that are added to the scores go to bias={of_padding(a, batch, cols)}")
    return read_matrix(p, FA_MASK, a, "mask", batch, rows, cols)


cdef int64_t block_side(object x) except -1:
    return min(integer(x, "block_size", "an integer of at least 1, or a pair (rows, columns) of such", 1), FAR)


cdef int read_block_size(fa_call *call, object block_size) except -1:
    """Sides no longer than the axes, where that makes no difference, so that their multiples do not overflow."""
    cdef object rows = block_size, columns = block_size
    if isinstance(block_size, (tuple, list)) or getattr(block_size, "ndim", 0) == 1:
        if len(block_size) != 2:
            raise ValueError(f"block_size must be an integer or a pair (rows, columns), not {len(block_size)} numbers: "
                             f"{block_size!r}")
        rows, columns = block_size
    call.problem.block_rows = min(block_side(rows), max(call.sizes.queries, 1))
    call.problem.block_columns = min(block_side(columns), max(call.sizes.keys, 1))
    return 0


cdef int read_block_mask(Problem p, object block_mask, tuple batch) except -1:
    cdef cnp.ndarray a = as_array(block_mask, "block_mask")
    cdef int64_t rows = p.call.problem.block_rows, columns = p.call.problem.block_columns
    if cnp.PyArray_TYPE(a) != cnp.NPY_BOOL:
        raise TypeError(f"block_mask must be boolean, True where a block counts, not of dtype {a.dtype}")
    return read_matrix(p, FA_BLOCK_MASK, a, "block_mask", batch, (p.call.sizes.queries + rows - 1) // rows,
                       (p.call.sizes.keys + columns - 1) // columns)


cdef int read_bias(Problem p, object bias, tuple batch, Py_ssize_t rows, Py_ssize_t cols) except -1:
    cdef cnp.ndarray a = as_array(bias, "bias")
    if a.dtype.kind in "biu":
        raise TypeError(f"bias must be floating, not of dtype {a.dtype}; booleans that say "
                        f"which keys count go to mask=")
    storage_of(a, "bias")
    return read_matrix(p, FA_BIAS, a, "bias", batch, rows, cols)


cdef int64_t band_width(fa_call *call, str what) except -1:
    """left + right + 1 of the window, which `what` needs bounded on both sides."""
    if call.problem.left == INT64_MAX or call.problem.right == INT64_MAX:
        raise ValueError(f"{what} needs window_size=(left, right) with both sides bounded (is_causal bounds the right)")
    return call.problem.left + call.problem.right + 1


cdef int read_relative_bias(Problem p, object bias, tuple batch, Py_ssize_t rows) except -1:
    cdef cnp.ndarray a = as_array(bias, "relative_bias")
    cdef int64_t width = band_width(p.call, "relative_bias")
    if a.dtype.kind in "biu":
        raise TypeError(f"relative_bias must be floating, not of dtype {a.dtype}")
    storage_of(a, "relative_bias")
    return read_matrix(p, FA_RELATIVE_BIAS, a, "relative_bias", batch, rows, width)


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
        self.call = <fa_call *> take_memory(sizeof(fa_call))
        if self.call == NULL:
            raise MemoryError("no memory for the description of a call")

    def __dealloc__(self):
        give_memory(self.call)

    cdef object result(self):
        if self.weights is None:
            return self.out if self.lse is None else (self.out, self.lse)
        return (self.out, self.weights) if self.lse is None else (self.out, self.weights, self.lse)


cdef Problem new_problem():
    cdef Problem p = Problem.__new__(Problem)
    cdef int i
    for i in range(<int> FA_CALL_OPERANDS):
        p.call.layouts[i].data = NULL
        p.call.layouts[i].dtype = FA_F32
        p.call.layouts[i].row = p.call.layouts[i].col = 0
    memset(&p.call.problem, 0, sizeof(fa_problem))
    memset(&p.call.sizes, 0, sizeof(fa_head))
    p.call.operand_count = 0
    p.call.query_starts = p.call.key_starts = NULL
    p.call.sequences = 1
    p.kept = []
    return p


# As in fa_activation.
cdef dict ACTIVATIONS = {"softmax": FA_SOFTMAX, "relu": FA_RELU, "sigmoid": FA_SIGMOID, "sparsemax": FA_SPARSEMAX,
                         "entmax15": FA_ENTMAX15}


cdef int read_activation(fa_call *call, object activation, object sinks, bint return_lse) except -1:
    if type(activation) is not str or activation not in ACTIVATIONS:
        error = ValueError if type(activation) is str else TypeError
        raise error(f"activation must be 'softmax', 'relu', 'sigmoid', 'sparsemax' or 'entmax15', not {activation!r}")
    call.problem.activation = ACTIVATIONS[activation]
    if call.problem.activation == FA_SOFTMAX:
        return 0
    if return_lse:
        raise ValueError(f"return_lse needs activation='softmax': {activation!r} has no log-sum-exp")
    if sinks is not None:
        raise ValueError(f"sinks needs activation='softmax': {activation!r} has no denominator")
    return 0


cdef int read_shapes(fa_call *call, Shape query, Shape key, Shape value, bint grouped) except -1:
    """Shapes of query, key and value that fit; batch axes."""
    if query.axes < 2:
        raise too_few_axes("query", as_tuple(query), "(..., L, D)")
    if key.axes < 2:
        raise too_few_axes("key", as_tuple(key), "(..., S, D)")
    if value.axes < 2:
        raise too_few_axes("value", as_tuple(value), "(..., S, E)")
    cdef Py_ssize_t channels = from_right(query, 1), keys = from_right(key, 2)
    if from_right(key, 1) != channels:
        raise ValueError(f"key has head_dim {from_right(key, 1)} (its last axis) and query {channels}: they "
                         f"must be equal")
    if from_right(value, 2) != keys:
        raise ValueError(f"value has {from_right(value, 2)} rows (axis -2) and key {keys}: there must be one value for "
                         f"each key")
    call.group = read_group(query, key, value) if grouped else 1
    read_batch(call, query, key, value)
    call.problem.head_dim = channels
    call.problem.value_dim = from_right(value, 1)
    call.sizes.queries = call.sizes.query_length = from_right(query, 2)
    call.sizes.keys = call.sizes.key_length = keys
    call.longest_query = call.sizes.queries
    call.longest_key = keys
    return 0


cdef int fill_views(fa_call *call) except -1:
    """The head axis is split where it is grouped; then the views of a head are what the layouts say."""
    cdef int operand
    if call.group > 1:
        split_heads(call)
    call.sizes.heads = 1
    for operand in range(<int> FA_OPERANDS):
        call.sizes.view[operand].data = NULL  # which locate fills in
        call.sizes.view[operand].row = call.layouts[operand].row
        call.sizes.view[operand].col = call.layouts[operand].col
        call.sizes.view[operand].dtype = call.layouts[operand].dtype
        call.sizes.view[operand].head = 0
    return 0


cdef int read_rules(Problem p, const Rules *r, object keys_before) except -1:
    """What all scores share, once p knows its sizes and its dtype."""
    cdef bint with_lse = flag(<object> r.return_lse, "return_lse")
    cdef tuple batch = None
    cdef Py_ssize_t rows = p.call.sizes.queries, cols = p.call.sizes.keys
    read_window(p.call, <object> r.window_size, flag(<object> r.is_causal, "is_causal"))
    read_chunks(p.call, <object> r.chunk_size, <object> r.left_chunks)
    read_block_size(p.call, <object> r.block_size)
    read_activation(p.call, <object> r.activation, <object> r.sinks, with_lse)
    p.num_threads = checked_threads(<object> r.num_threads)
    if given(r.scale):
        p.call.problem.scale *= real(<object> r.scale, "scale", "a finite real number or None")
        p.call.problem.scale = max(-DBL_MAX, min(DBL_MAX, p.call.problem.scale))
    p.call.problem.softcap = 0
    if given(r.softcap):
        p.call.problem.softcap = real(<object> r.softcap, "softcap", "a positive finite number or None", True)
    p.call.problem.band = type(<object> r.return_weights) is str and <object> r.return_weights == "band"
    if p.call.problem.band:
        band_width(p.call, "return_weights='band'")
    else:
        weights_flag(<object> r.return_weights)

    p.call.offset_is_default = not given(r.query_offset)
    p.call.problem.has_slope, p.call.problem.has_sink = given(r.alibi_slopes), given(r.sinks)
    if not (given(r.key_lengths) or given(r.query_lengths) or given(r.query_offset) or given(r.mask) or
            given(r.block_mask) or given(r.bias) or given(r.relative_bias) or given(r.alibi_slopes) or
            given(r.sinks) or keys_before is not None):
        return 0
    batch = batch_shape(p.call)
    if given(r.key_lengths):
        read_integers(p, FA_KEY_LENGTHS, <object> r.key_lengths, "key_lengths", batch, 0, cols,
                      &p.call.sizes.key_length)
    if given(r.query_lengths):
        read_integers(p, FA_QUERY_LENGTHS, <object> r.query_lengths, "query_lengths", batch, 0, rows,
                      &p.call.sizes.query_length)
    if given(r.query_offset):
        read_integers(p, FA_OFFSETS, <object> r.query_offset, "query_offset", batch, None, None, &p.call.sizes.offset)
    if keys_before is not None:
        read_integers(p, FA_KEYS_BEFORE, keys_before, "keys_before", batch, 0, FAR, &p.call.sizes.keys_before)
    if given(r.mask):
        read_mask(p, <object> r.mask, batch, rows, cols)
    if given(r.block_mask):
        read_block_mask(p, <object> r.block_mask, batch)
    if given(r.bias):
        read_bias(p, <object> r.bias, batch, rows, cols)
    if given(r.relative_bias):
        read_relative_bias(p, <object> r.relative_bias, batch, rows)
    if given(r.alibi_slopes):
        read_per_head(p, FA_SLOPES, <object> r.alibi_slopes, "alibi_slopes", batch, p.call.problem.dtype)
    if given(r.sinks):
        read_per_head(p, FA_SINKS, <object> r.sinks, "sinks", batch, p.call.problem.dtype)
    return 0


cdef int read_results(Problem p, const Rules *r, tuple inputs, tuple names) except -1:
    """Memory for the results. inputs, names: what came, which `out` must not overlap."""
    cdef Py_ssize_t rows = p.call.sizes.queries
    cdef tuple shape
    if p.out is not None:
        pass
    elif not given(r.out):
        p.out = new_array(p, rows, p.call.problem.value_dim)
    else:
        shape = (*batch_shape(p.call), rows, p.call.problem.value_dim)
        p.out = checked_out(<object> r.out, shape, p.dtype, p.kept,
                            tuple([OPERAND_NAMES[p.call.operands[i]] for i in range(p.call.operand_count)]))
        refuse_overlap(p.out, inputs, names)
        refuse_overlap(p.out, (<object> r.alibi_slopes, <object> r.sinks, <object> r.key_lengths,
                               <object> r.query_lengths, <object> r.query_offset),
                       OPERAND_NAMES[<int> FA_SLOPES:<int> FA_KEYS_BEFORE])
    place(p, FA_OUT, p.out, 2)
    if p.call.problem.band or <object> r.return_weights:
        cols = band_width(p.call, "return_weights='band'") if p.call.problem.band else p.call.sizes.keys
        p.weights = empty((*batch_shape(p.call), rows, cols), accumulation(p.call.problem.dtype))
        place(p, FA_WEIGHTS, p.weights, 2)
    if <object> r.return_lse:
        p.lse = empty((*batch_shape(p.call), rows), accumulation(p.call.problem.dtype))
        place(p, FA_LSE, p.lse, 1)
    return 0


cdef Problem read_call(Problem p, cnp.ndarray query, cnp.ndarray key, cnp.ndarray value, tuple inputs, tuple names,
                       const Rules *r, object keys_before):
    """query, key and value, of any dtypes; p.dtype, p.call.problem.dtype, .score and .scale are set.
    keys_before: how many keys were before the first one, of which chunks count; as query_offset."""
    read_shapes(p.call, dims_of(query), dims_of(key), dims_of(value), flag(<object> r.enable_gqa, "enable_gqa"))
    place(p, FA_QUERY, query, 2)
    place(p, FA_KEY, key, 2)
    place(p, FA_VALUE, value, 2)
    if p.quantized is not None:
        read_quantized(p, p.quantized, key, value)
    if p.prepared is not None:
        place(p, FA_PREPARED, p.prepared, 1)
    read_rules(p, r, keys_before)
    read_results(p, r, inputs, names)
    fill_views(p.call)
    return p


# int8 keys and values

cdef bint is_quantized(tuple quantized) noexcept:
    return quantized is not None and not (quantized[0] is None and quantized[1] is None and quantized[2] is None)


cdef cnp.ndarray scale_array(object x, str name, cnp.ndarray of, str whose):
    """A scale or a centre as an array of at least two axes whose batch axes broadcast to those of its matrix."""
    cdef cnp.ndarray a = as_array(x, name)
    cdef int axis, number = cnp.PyArray_TYPE(a)
    if cnp.PyArray_NDIM(a) == 0 and (number == cnp.NPY_FLOAT64 or a.dtype.kind in "iu"):
        a = converted(a, np.float32)
    elif number == cnp.NPY_FLOAT64 or a.dtype.kind in "biu":
        raise TypeError(f"{name} must be float32, float16 or bfloat16, not of dtype {a.dtype}")
    else:
        storage_of(a, name)
    a = widened(a, 2)
    for axis in range(3, cnp.PyArray_NDIM(a) + 1):
        n = cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - axis)
        if n != 1 and n != from_right(dims_of(of), axis):
            raise ValueError(f"the batch axes of {name} {shape_of(a)} do not broadcast to those of {whose} "
                             f"{shape_of(of)}")
    return a


cdef int read_scale(Problem p, int operand, object x, str name, cnp.ndarray of, str whose, fa_scales *form,
                    int64_t *each) except -1:
    cdef cnp.ndarray a = scale_array(x, name, of, whose)
    cdef Py_ssize_t rows = from_right(dims_of(a), 2), n = from_right(dims_of(a), 1)
    cdef Py_ssize_t tokens = from_right(dims_of(of), 2), channels = from_right(dims_of(of), 1)
    place(p, operand, a, 2)
    each[0] = max(channels, 1)
    if rows == 1 and (n == 1 or n == channels):
        form[0] = FA_SCALE_CHANNELS
        if n == 1:
            p.call.layouts[operand].col = 0
    elif rows == tokens and n == 1:
        form[0] = FA_SCALE_TOKENS
    elif rows == tokens and n > 0 and channels % n == 0:
        form[0] = FA_SCALE_BLOCKS
        each[0] = max(channels // n, 1)
    else:
        raise ValueError(f"{name} has shape {shape_of(as_array(x, name))}; for a {whose} of shape {shape_of(of)} it "
                         f"must be (..., {tokens}, 1), one for each token; (..., 1, {channels}) or ({channels},), one "
                         f"for each channel; one number; or (..., {tokens}, n), one for each of n blocks of channels, "
                         f"where {channels} is a multiple of n")
    return 0


cdef int read_center(Problem p, object x, cnp.ndarray key) except -1:
    cdef cnp.ndarray a = scale_array(x, "key_center", key, "key")
    cdef Py_ssize_t channels = from_right(dims_of(key), 1)
    if from_right(dims_of(a), 2) != 1 or from_right(dims_of(a), 1) != channels:
        raise ValueError(f"key_center has shape {shape_of(as_array(x, 'key_center'))}; it must be (..., 1, {channels}) "
                         f"or ({channels},), one number for each channel of a key")
    a = converted(a, np.float32)
    if not np.isfinite(a).all():
        raise ValueError("key_center must be finite: NaN or infinity in it would make every score NaN")
    place(p, FA_KEY_CENTER, a, 2)
    p.call.problem.has_center = 1
    return 0


cdef int read_quantized(Problem p, tuple quantized, cnp.ndarray key, cnp.ndarray value) except -1:
    """quantized: key_scale, value_scale and key_center."""
    read_scale(p, FA_KEY_SCALE, quantized[0], "key_scale", key, "key", &p.call.problem.key_scales,
               &p.call.problem.key_each)
    read_scale(p, FA_VALUE_SCALE, quantized[1], "value_scale", value, "value", &p.call.problem.value_scales,
               &p.call.problem.value_each)
    if quantized[2] is not None:
        read_center(p, quantized[2], key)
    return 0


cdef list quantized_arrays(object query, object key, object value, tuple quantized):
    """The arrays of a call with scales, whose dtypes are checked."""
    cdef cnp.ndarray q = as_array(query, "query"), a
    for name, x, scale in (("key", key, quantized[0]), ("value", value, quantized[1])):
        a = as_array(x, name)
        if scale is None:
            raise ValueError(f"{name}_scale is missing: int8 key and value both need their scales")
        if cnp.PyArray_TYPE(a) != cnp.NPY_INT8:
            raise TypeError(f"key_scale, value_scale and key_center are for int8 key and value: {name} has dtype "
                            f"{a.dtype}")
    if q.dtype.kind in "biu" or storage_of(q, "query") == FA_F64:
        raise TypeError(f"query has dtype {q.dtype}: with int8 key and value it must be float32, float16 or bfloat16")
    return [q, as_array(key, "key"), as_array(value, "value")]


cdef Problem read_dot_product(object query, object key, object value, Rules r, object keys_before=None,
                              cnp.ndarray own=None, tuple quantized=None):
    """own: a layer's array for the output, of the right shape and dtype, in memory that nobody else has.
    quantized: key_scale, value_scale and key_center, each of which may be None."""
    cdef Problem p = new_problem()
    p.out = own
    cdef bint scaled = is_quantized(quantized)
    cdef list arrays
    cdef cnp.ndarray q
    cdef tuple names = ("query", "key", "value"), inputs = (query, key, value) if given(r.out) else None
    if scaled:
        arrays = quantized_arrays(query, key, value, quantized)
        p.dtype = promoted(arrays[:1], ("query",), &p.call.problem.dtype)
        if inputs is not None:
            inputs, names = inputs + quantized, names + ("key_scale", "value_scale", "key_center")
    else:
        arrays = [floating(query, "query"), floating(key, "key"), floating(value, "value")]
        p.dtype = promoted(arrays, names, &p.call.problem.dtype)
    p.call.problem.score = FA_DOT
    q = arrays[0]
    p.call.problem.scale = 1
    if not given(r.scale) and cnp.PyArray_NDIM(q) > 0:
        p.call.problem.scale = 1.0 / sqrt(<double> max(cnp.PyArray_DIM(q, cnp.PyArray_NDIM(q) - 1), 1))
    p.quantized = quantized if scaled else None
    return read_call(p, q, arrays[1], arrays[2], inputs, names, &r, keys_before)


def check(tuple query, tuple key, tuple value, dtype, dict some):
    """What a call with arrays of these shapes, computed in that dtype, and with these rules would refuse, `out` aside.
    Returns the shape of its output."""
    cdef Problem p = new_problem()
    cdef Rules r = rules_of(some)
    cdef Shape[3] shapes
    cdef cnp.npy_intp[3][<int> FA_ROW_AXES] size
    cdef int i, axis
    for i, given_shape in enumerate((query, key, value)):
        shapes[i].axes, shapes[i].size = len(given_shape), size[i]
        for axis in range(shapes[i].axes):
            size[i][axis] = given_shape[axis]
    p.call.problem.dtype = FA_F64 if dtype == np.float64 else FA_F32
    p.call.problem.scale = 1
    read_shapes(p.call, shapes[0], shapes[1], shapes[2], flag(<object> r.enable_gqa, "enable_gqa"))
    read_rules(p, &r, None)
    return (*batch_shape(p.call), p.call.sizes.queries, p.call.problem.value_dim)


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


def starts(x, str name, Py_ssize_t total, str axis):
    """Where packed sequences begin and end, checked, as an array of its own."""
    return np.asarray(read_starts(x, name, total, axis))


cdef Problem read_varlen(object query, object key, object value, object cu_seqlens_q, object cu_seqlens_k, Rules r,
                         cnp.ndarray own=None):
    cdef Problem p = read_dot_product(query, key, value, r, None, own)
    refuse_overlap(<object> r.out, (cu_seqlens_q, cu_seqlens_k), ("cu_seqlens_q", "cu_seqlens_k"))
    cdef const int64_t[::1] query_starts = read_starts(cu_seqlens_q, "cu_seqlens_q", p.call.sizes.queries,
                                                       "query's axis -2")
    cdef const int64_t[::1] key_starts = query_starts
    if cu_seqlens_k is not None:
        key_starts = read_starts(cu_seqlens_k, "cu_seqlens_k", p.call.sizes.keys, "key's axis -2")
    elif p.call.sizes.keys != p.call.sizes.queries:
        raise ValueError(f"cu_seqlens_k is needed where query and key have different total lengths "
                         f"({p.call.sizes.queries} and {p.call.sizes.keys})")
    if key_starts.shape[0] != query_starts.shape[0]:
        raise ValueError(f"cu_seqlens_k has {key_starts.shape[0]} numbers and cu_seqlens_q "
                         f"{query_starts.shape[0]}: both must describe the same sequences")
    p.kept.append((query_starts, key_starts))
    p.call.query_starts, p.call.key_starts = &query_starts[0], &key_starts[0]
    p.call.sequences = query_starts.shape[0] - 1
    cdef Py_ssize_t i
    p.call.longest_query = p.call.longest_key = 0
    for i in range(p.call.sequences):
        p.call.longest_query = max(p.call.longest_query, query_starts[i + 1] - query_starts[i])
        p.call.longest_key = max(p.call.longest_key, key_starts[i + 1] - key_starts[i])
    return p
