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
from fastattn._runtime cimport FA_BF16, FA_DOT, FA_F16, FA_F32, FA_F64, FA_RELU, FA_SIGMOID, FA_SOFTMAX, fa_dtype

cnp.import_array()


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

cdef str of_layout(cnp.ndarray query, cnp.ndarray key, cnp.ndarray value):
    """What to say of arrays whose heads do not fit and would, were the axis behind them that of the heads."""
    cdef int axes = cnp.PyArray_NDIM(query)
    if axes < 3 or cnp.PyArray_NDIM(key) != axes or cnp.PyArray_NDIM(value) != axes:
        return ""
    cdef Py_ssize_t heads = cnp.PyArray_DIM(query, axes - 2), shared = cnp.PyArray_DIM(key, axes - 2)
    if (shared == 0 or heads % shared or cnp.PyArray_DIM(value, axes - 2) != shared or
            cnp.PyArray_DIM(key, axes - 3) != cnp.PyArray_DIM(value, axes - 3)):
        return ""
    sizes = "(B, S, H, D)" if axes == 4 else "(S, H, D)" if axes == 3 else "(..., S, H, D)"
    return f"; arrays {sizes}, with the heads behind the tokens, are passed as x.swapaxes({axes - 3}, {axes - 2})"


cdef object bad_heads(cnp.ndarray query, cnp.ndarray key, cnp.ndarray value):
    return ValueError(f"the batch axes of query {shape_of(query)}, key {shape_of(key)} and value {shape_of(value)} do "
                      f"not broadcast{of_layout(query, key, value)}; enable_gqa=True allows a query with a whole "
                      f"multiple of the heads (axis -3) of key and value")


cdef int read_batch(Problem p, cnp.ndarray query, cnp.ndarray key, cnp.ndarray value, bint grouped,
                    Py_ssize_t *group) except -1:
    """Broadcasts the batch axes of query, key and value into p.shape; group: query heads that share a key head."""
    cdef cnp.ndarray array
    cdef int i, axis, from_right, axes = 0
    cdef Py_ssize_t n, size, query_heads, key_heads, value_heads
    cdef tuple arrays = (query, key, value)
    for array in arrays:
        axes = max(axes, cnp.PyArray_NDIM(array) - 2)
    group[0] = 1
    if grouped:
        query_heads = cnp.PyArray_DIM(query, cnp.PyArray_NDIM(query) - 3) if cnp.PyArray_NDIM(query) > 2 else 1
        key_heads = cnp.PyArray_DIM(key, cnp.PyArray_NDIM(key) - 3) if cnp.PyArray_NDIM(key) > 2 else 1
        value_heads = cnp.PyArray_DIM(value, cnp.PyArray_NDIM(value) - 3) if cnp.PyArray_NDIM(value) > 2 else 1
        if key_heads != value_heads:
            raise ValueError(f"enable_gqa needs as many heads (axis -3) in key as in value, not {key_heads} and "
                             f"{value_heads}")
        if query_heads != key_heads and (key_heads == 0 or query_heads % key_heads):
            raise ValueError(f"enable_gqa needs a whole multiple of key's {key_heads} heads (axis -3) in query, "
                             f"not {query_heads}{of_layout(query, key, value)}")
        group[0] = query_heads // key_heads if key_heads else 1
    p.axes = axes
    p.heads = 1
    for from_right in range(1, axes + 1):
        size = 1
        for i in range(3):
            array = arrays[i]
            axis = cnp.PyArray_NDIM(array) - 2 - from_right
            if axis < 0:
                continue
            n = cnp.PyArray_DIM(array, axis)
            if from_right == 1 and i > 0:
                n *= group[0]
            if n != size and n != 1:
                if size != 1:
                    raise bad_heads(query, key, value)
                size = n
        p.shape[axes - from_right] = size
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
    """Notes where an array lies. trailing: how many of its last axes are not batch axes (at most 2). The others are
    known to broadcast to p.shape, where a shared key head counts for its whole group (split_heads sees to that). The
    caller keeps the array alive, in p.kept."""
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
    return 0


cdef int split_heads(Problem p, Py_ssize_t group) except -1:
    """Makes two axes of the head axis, (key heads, group): key and value stand still along the second."""
    cdef int last = p.axes - 1, n, operand
    cdef Py_ssize_t stride
    for n in range(p.operand_count):
        operand = p.operands[n]
        stride = p.layouts[operand].batch[last]
        if operand == KEY or operand == VALUE:
            p.layouts[operand].batch[last + 1] = 0
        else:
            p.layouts[operand].batch[last] = stride * group
            p.layouts[operand].batch[last + 1] = stride
    p.shape[last] //= group
    p.shape[last + 1] = group
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
    p.kept.append(a)
    place(p, operand, a, 2)
    if cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 2) == 1:
        p.layouts[operand].row = 0
    if cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1) == 1:
        p.layouts[operand].col = 0
    return 0


cdef cnp.ndarray read_mask(Problem p, object mask, tuple batch, Py_ssize_t rows, Py_ssize_t cols):
    cdef cnp.ndarray a = as_array(mask, "mask")
    if cnp.PyArray_TYPE(a) != cnp.NPY_BOOL:
        raise TypeError(f"mask must be boolean, True where a query may attend to a key, not of dtype {a.dtype}; "
                        f"numbers that are added to the scores go to bias={of_padding(a, batch, cols)}")
    read_matrix(p, MASK, a, "mask", batch, rows, cols)
    return a


cdef cnp.ndarray read_bias(Problem p, object bias, tuple batch, Py_ssize_t rows, Py_ssize_t cols):
    cdef cnp.ndarray a = as_array(bias, "bias")
    if a.dtype.kind in "biu":
        raise TypeError(f"bias must be floating, not of dtype {a.dtype}; booleans that say "
                        f"which keys count go to mask=")
    storage_of(a, "bias")
    read_matrix(p, BIAS, a, "bias", batch, rows, cols)
    return a


cdef int64_t band_width(Problem p, str what) except -1:
    """left + right + 1 of the window, which `what` needs bounded on both sides."""
    if p.shared.left == INT64_MAX or p.shared.right == INT64_MAX:
        raise ValueError(f"{what} needs window_size=(left, right) with both sides bounded (is_causal bounds the right)")
    return p.shared.left + p.shared.right + 1


cdef cnp.ndarray read_relative_bias(Problem p, object bias, tuple batch, Py_ssize_t rows):
    cdef cnp.ndarray a = as_array(bias, "relative_bias")
    cdef int64_t width = band_width(p, "relative_bias")
    if a.dtype.kind in "biu":
        raise TypeError(f"relative_bias must be floating, not of dtype {a.dtype}")
    storage_of(a, "relative_bias")
    read_matrix(p, RELATIVE_BIAS, a, "relative_bias", batch, rows, width)
    return a


cdef int read_per_head(Problem p, int operand, object x, str name, tuple batch, fa_dtype dtype) except -1:
    """Slopes or sinks: real numbers that broadcast over the batch axes, rounded to the accumulation dtype."""
    cdef cnp.ndarray a = as_array(x, name)
    if a.dtype.kind not in "biu" or not a.dtype.isnative:
        storage_of(a, name)
    broadcastable(a, name, batch, ())
    a = converted(converted(a, accumulation(dtype)), accumulation(FA_F64))
    p.kept.append(a)
    place(p, operand, a, 0)
    return 0


cdef int read_integers(Problem p, int operand, object x, str name, tuple batch, object least, object most,
                       int64_t *scalar) except -1:
    cdef cnp.ndarray a = integers(x, name, batch, least, most, scalar)
    if a is not None:
        p.kept.append(a)
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


cdef int read_arrays(Problem p, list arrays, bint grouped, Py_ssize_t *group) except -1:
    """Query, key and value: shapes that fit, batch axes, addresses."""
    cdef cnp.ndarray query = arrays[0], key = arrays[1], value = arrays[2]
    if cnp.PyArray_NDIM(query) < 2:
        raise too_few_axes("query", query, "(..., L, D)")
    if cnp.PyArray_NDIM(key) < 2:
        raise too_few_axes("key", key, "(..., S, D)")
    if cnp.PyArray_NDIM(value) < 2:
        raise too_few_axes("value", value, "(..., S, E)")
    cdef Py_ssize_t channels = cnp.PyArray_DIM(query, cnp.PyArray_NDIM(query) - 1)
    cdef Py_ssize_t keys = cnp.PyArray_DIM(key, cnp.PyArray_NDIM(key) - 2)
    if cnp.PyArray_DIM(key, cnp.PyArray_NDIM(key) - 1) != channels:
        raise ValueError(f"key has head_dim {key.shape[key.ndim - 1]} (its last axis) and query {channels}: for dot "
                         f"products they must be equal")
    if cnp.PyArray_DIM(value, cnp.PyArray_NDIM(value) - 2) != keys:
        raise ValueError(f"value has {value.shape[value.ndim - 2]} rows (axis -2) and key {keys}: there must be one "
                         f"value for each key")
    read_batch(p, query, key, value, grouped, group)
    place(p, QUERY, query, 2)
    place(p, KEY, key, 2)
    place(p, VALUE, value, 2)
    p.shared.head_dim = channels
    p.shared.value_dim = cnp.PyArray_DIM(value, cnp.PyArray_NDIM(value) - 1)
    p.sizes.queries = p.sizes.query_length = cnp.PyArray_DIM(query, cnp.PyArray_NDIM(query) - 2)
    p.sizes.keys = p.sizes.key_length = keys
    p.longest_query = p.sizes.queries
    p.longest_key = keys
    return 0


cdef int finish(Problem p, Py_ssize_t group) except -1:
    """What the layouts say of the views of a head; before, the head axis is split where it is grouped."""
    cdef int operand
    p.group = group
    if group > 1:
        split_heads(p, group)
    p.sizes.heads = 1
    for operand in range(<int> FA_OPERANDS):
        p.sizes.view[operand].data = NULL  # which locate fills in
        p.sizes.view[operand].row = p.layouts[operand].row
        p.sizes.view[operand].col = p.layouts[operand].col
        p.sizes.view[operand].dtype = p.layouts[operand].dtype
        p.sizes.view[operand].head = 0
    return 0


cdef Problem read_rules(
    Problem p, list arrays, tuple inputs, tuple names, object is_causal, object window_size, object chunk_size,
    object left_chunks, object query_offset, object key_lengths, object query_lengths, object mask, object bias,
    object relative_bias, object alibi_slopes, object scale, object softcap, object sinks, object activation,
    object enable_gqa, object return_weights, object return_lse, object out, object num_threads,
    object keys_before=None,
):
    """What all scores share. arrays: query, key and value, of any dtypes; p.dtype, p.shared.dtype and .score are set. inputs, names: what came, which `out` must not overlap. keys_before: how many keys
    were before the first one, of which chunks count; as query_offset."""
    cdef Py_ssize_t group
    p.shared.band = type(return_weights) is str and return_weights == "band"
    cdef bint with_weights = p.shared.band or weights_flag(return_weights), with_lse = flag(return_lse, "return_lse")
    cdef bint grouped = flag(enable_gqa, "enable_gqa")
    cdef bint no_rules = (key_lengths is None and query_lengths is None and query_offset is None and mask is None and
                          bias is None and relative_bias is None and alibi_slopes is None and sinks is None and
                          keys_before is None)
    read_arrays(p, arrays, grouped, &group)
    read_window(p, window_size, flag(is_causal, "is_causal"))
    read_chunks(p, chunk_size, left_chunks)
    read_activation(p, activation, sinks, with_lse)
    p.num_threads = checked_threads(num_threads)
    if scale is not None:
        p.shared.scale *= real(scale, "scale", "a finite real number or None")
        p.shared.scale = max(-DBL_MAX, min(DBL_MAX, p.shared.scale))
    p.shared.softcap = 0
    if softcap is not None:
        p.shared.softcap = real(softcap, "softcap", "a positive finite number or None", True)

    cdef tuple batch = None if no_rules else batch_shape(p)
    cdef Py_ssize_t rows = p.sizes.queries, cols = p.sizes.keys
    cdef cnp.ndarray mask_array = None, bias_array = None, relative_array = None
    p.kept = arrays
    p.offset_is_default = True
    p.shared.has_slope = p.shared.has_sink = False
    if key_lengths is not None:
        read_integers(p, KEY_LENGTHS, key_lengths, "key_lengths", batch, 0, cols, &p.sizes.key_length)
    if query_lengths is not None:
        read_integers(p, QUERY_LENGTHS, query_lengths, "query_lengths", batch, 0, rows, &p.sizes.query_length)
    if query_offset is not None:
        p.offset_is_default = False
        read_integers(p, OFFSETS, query_offset, "query_offset", batch, None, None, &p.sizes.offset)
    if keys_before is not None:
        read_integers(p, KEYS_BEFORE, keys_before, "keys_before", batch, 0, FAR, &p.sizes.keys_before)
    if mask is not None:
        mask_array = read_mask(p, mask, batch, rows, cols)
    if bias is not None:
        bias_array = read_bias(p, bias, batch, rows, cols)
    if relative_bias is not None:
        relative_array = read_relative_bias(p, relative_bias, batch, rows)
    if alibi_slopes is not None:
        read_per_head(p, SLOPES, alibi_slopes, "alibi_slopes", batch, p.shared.dtype)
        p.shared.has_slope = True
    if sinks is not None:
        read_per_head(p, SINKS, sinks, "sinks", batch, p.shared.dtype)
        p.shared.has_sink = True

    if out is None:
        p.out = new_array(p, rows, p.shared.value_dim)
    else:
        p.out = checked_out(out, (*batch_shape(p), rows, p.shared.value_dim), p.dtype,
                            [*arrays[:3], mask_array, bias_array, relative_array],
                            ("query", "key", "value", "mask", "bias", "relative_bias"))
        refuse_overlap(out, inputs, names)
        refuse_overlap(out, (key_lengths, query_lengths, query_offset, alibi_slopes, sinks),
                       ("key_lengths", "query_lengths", "query_offset", "alibi_slopes", "sinks"))
    place(p, OUT, p.out, 2)
    if with_weights:
        width = band_width(p, "return_weights='band'") if p.shared.band else cols
        p.weights = empty((*batch_shape(p), rows, width), accumulation(p.shared.dtype))
        place(p, WEIGHTS, p.weights, 2)
    if with_lse:
        p.lse = empty((*batch_shape(p), rows), accumulation(p.shared.dtype))
        place(p, LSE, p.lse, 1)
    finish(p, group)
    return p


cdef Problem read_dot_product(
    object query, object key, object value, object is_causal, object window_size, object chunk_size,
    object left_chunks, object query_offset, object key_lengths, object query_lengths, object mask, object bias,
    object relative_bias, object alibi_slopes, object scale, object softcap, object sinks, object activation,
    object enable_gqa, object return_weights, object return_lse, object out, object num_threads, bint packed=False,
    object keys_before=None,
):
    cdef Problem p = new_problem()
    cdef list arrays = [floating(query, "query"), floating(key, "key"), floating(value, "value")]
    cdef cnp.ndarray q
    p.packed = packed
    p.dtype = promoted(arrays, ("query", "key", "value"), &p.shared.dtype)
    p.shared.score = FA_DOT
    q = arrays[0]
    p.shared.scale = 1
    if scale is None and cnp.PyArray_NDIM(q) > 0:
        p.shared.scale = 1.0 / sqrt(<double> max(cnp.PyArray_DIM(q, cnp.PyArray_NDIM(q) - 1), 1))
    return read_rules(
        p, arrays, (query, key, value), ("query", "key", "value"),
        is_causal, window_size, chunk_size, left_chunks, query_offset, key_lengths, query_lengths,
        mask, bias, relative_bias, alibi_slopes, scale, softcap, sinks, activation, enable_gqa, return_weights,
        return_lse, out, num_threads, keys_before)


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


cdef Problem read_varlen(
    object query, object key, object value, object cu_seqlens_q, object cu_seqlens_k, object is_causal,
    object window_size, object alibi_slopes, object scale, object softcap, object sinks, object activation,
    object enable_gqa, object return_lse, object out, object num_threads,
):
    cdef Problem p = read_dot_product(
        query, key, value, is_causal, window_size, None, None, None, None, None, None, None, None, alibi_slopes, scale,
        softcap, sinks, activation, enable_gqa, False, return_lse, out, num_threads, True)
    refuse_overlap(out, (cu_seqlens_q, cu_seqlens_k), ("cu_seqlens_q", "cu_seqlens_k"))
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
