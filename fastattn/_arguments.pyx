# cython: wraparound=True
"""Every check of every argument, once; the result is one plain description of the problem, for the drivers.

Messages say which argument, what came, and what is allowed. Nothing here computes attention, and nothing is written to
`out`; projections are NumPy's, and their results are what the description then speaks of. It is compiled because a
small call's time is mostly spent here.
"""
import math
import numbers
import sys

import numpy as np

cimport numpy as cnp
from cpython.exc cimport PyErr_ExceptionMatches, PyErr_Fetch, PyErr_Restore, PyErr_SetObject
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from libc.float cimport DBL_MAX
from libc.math cimport fabs, frexp, isfinite, ldexp, sqrt
from libc.stdint cimport INT64_MAX
from libc.string cimport memcpy

from fastattn._runtime cimport (FA_ADDITIVE, FA_BF16, FA_DOT, FA_F16, FA_F32, FA_F64, FA_RELU, FA_SIGMOID, FA_SOFTMAX,
                                fa_dtype, fa_view)

cnp.import_array()

# Positions and windows beyond this mean "far away" as well as any larger number, and sums of three stay in 64 bits.
cdef int64_t FAR = <int64_t> 1 << 60

# float64 tells all whole numbers up to here apart: where a position is multiplied, and not compared.
cdef int64_t FARTHEST = <int64_t> 1 << 53

cdef double GREATEST_FREQUENCY = 1e290  # times the farthest position it is finite

cdef object float16 = np.dtype(np.float16)
cdef object float32 = np.dtype(np.float32)
cdef object float64 = np.dtype(np.float64)


# With no more queries than this in a head, keys are read in place; packing them would cost more.
cdef enum:
    FEW_QUERIES = 8

# With so many, each head of a group packs its keys for itself: that costs little then.
cdef enum:
    MANY_QUERIES = 128


# Arrays

cpdef bint is_masked(object x) except -1:
    """Whether it is a masked array. Where nobody has loaded numpy.ma there is none, and it stays unloaded."""
    if cnp.PyArray_CheckExact(x):
        return False
    ma = sys.modules.get("numpy.ma")
    return ma is not None and isinstance(x, getattr(ma, "MaskedArray", ()))


cdef cnp.ndarray as_array(object x, str name):
    """An ndarray of what came; no copy where it is one already."""
    if cnp.PyArray_CheckExact(x):
        return x
    if is_masked(x):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored: pass its data, and its mask inverted "
                        f"as mask= where the function takes one (True means attend)")
    try:
        return np.asarray(x)
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"{name} cannot be made into an array: {error}") from error


cpdef cnp.ndarray converted(cnp.ndarray a, object dtype):
    """The array in that dtype; no copy where it has it. What over- or underflows on the way is no affair of the
    caller's np.errstate: every conversion that may do so is made here."""
    if a.dtype is dtype or a.dtype == dtype:
        return a
    with np.errstate(all="ignore"):
        return a.astype(dtype)


cdef object bad_dtype(str name, dtype):
    if dtype.kind in "fcbiu" and not dtype.isnative:
        return TypeError(f"{name} has the byte order of another machine ({dtype.str}): "
                         f"convert it with {name}.astype({name}.dtype.newbyteorder('='))")
    return TypeError(f"{name} has dtype {dtype}: allowed are float32, float64, float16, ml_dtypes.bfloat16, "
                     f"and integers and bools, which become float64")


cdef fa_dtype storage_of(cnp.ndarray a, str name) except *:
    """The storage dtype of a floating array."""
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT32 and cnp.PyArray_ISNOTSWAPPED(a):
        return FA_F32
    if number == cnp.NPY_FLOAT64 and cnp.PyArray_ISNOTSWAPPED(a):
        return FA_F64
    if number == cnp.NPY_FLOAT16 and cnp.PyArray_ISNOTSWAPPED(a):
        return FA_F16
    if a.dtype.name == "bfloat16" and a.dtype.isnative:
        return FA_BF16
    raise bad_dtype(name, a.dtype)


cpdef cnp.ndarray floating(object x, str name):
    """An array of a dtype that the kernels store; integers and bools as float64."""
    cdef cnp.ndarray a = as_array(x, name)
    if cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32 and cnp.PyArray_ISNOTSWAPPED(a):
        return a
    if a.dtype.kind in "biu" and a.dtype.isnative:
        return a.astype(np.float64)
    storage_of(a, name)
    return a


def common_dtype(list arrays, tuple names):
    """What query, key, value and weight matrices promote to."""
    dtypes = {a.dtype for a in arrays}
    if len(dtypes) == 1:
        return dtypes.pop()
    if float16 in dtypes and any(d.name == "bfloat16" for d in dtypes):
        got = ", ".join(f"{name} {a.dtype}" for name, a in zip(names, arrays, strict=True))
        raise TypeError(f"float16 and bfloat16 have no common dtype ({got}): convert one of them")
    return np.result_type(*arrays)


cdef fa_dtype promote(list arrays, tuple names) except *:
    """Converts the arrays, in place in the list, to their common dtype."""
    cdef int i, number = cnp.PyArray_TYPE(arrays[0])
    if number == cnp.NPY_FLOAT32 or number == cnp.NPY_FLOAT64:
        for i in range(1, len(arrays)):
            if cnp.PyArray_TYPE(arrays[i]) != number:
                break
        else:
            return storage_of(arrays[0], names[0])
    dtype = common_dtype(arrays, names)
    for i in range(len(arrays)):
        arrays[i] = converted(arrays[i], dtype)
    return storage_of(arrays[0], names[0])


cdef object accumulation(fa_dtype dtype):
    return float64 if dtype == FA_F64 else float32


cdef tuple shape_of(cnp.ndarray a):
    return (<object> a).shape


# Scalars

cpdef double real(object x, str name, str allowed, bint positive=False) except? -1.0:
    """A finite real number, also of a 0-d array; not of a bool. allowed: what the message says."""
    cdef double value
    if type(x) is not float:
        kind = getattr(x, "dtype", None)
        if (isinstance(x, (bool, np.bool_)) or getattr(x, "ndim", 0) or is_masked(x) or
                not (isinstance(x, (numbers.Real, np.floating, np.integer)) or
                     getattr(kind, "name", None) == "bfloat16" or
                     isinstance(x, np.ndarray) and kind.kind in "fiu")):
            raise TypeError(f"{name} must be {allowed}, not {x!r}")
    try:
        value = float(x)
    except OverflowError:
        value = math.inf
    if not isfinite(value) or positive and value <= 0:
        raise ValueError(f"{name} must be {allowed}, not {x}")
    return value


cpdef object integer(object x, str name, str allowed, object least=None, object most=None):
    """A Python int of an integer, also of a 0-d array; not of a bool. allowed: what the message says; least, most: the
    bounds, where there are any."""
    if type(x) is not int:
        if (isinstance(x, (bool, np.bool_)) or not hasattr(x, "__index__") or getattr(x, "ndim", 0) or
                is_masked(x)):
            raise TypeError(f"{name} must be {allowed}, not {x!r}")
        try:
            x = x.__index__()
        except TypeError:
            raise TypeError(f"{name} must be {allowed}, not {x!r}") from None
    if least is not None and x < least or most is not None and x > most:
        raise ValueError(f"{name} must be {allowed}, not {x}")
    return x


cpdef bint is_one_number(object x) except -1:
    """Whether x, where an integer or an array of them is allowed, is to be read as an integer."""
    return type(x) is int or getattr(x, "ndim", 0) == 0 and (isinstance(x, np.ndarray) or not hasattr(x, "__len__"))


cdef object checked_threads(object num_threads):
    """None, or an int of at least 1."""
    if num_threads is None:
        return None
    return min(integer(num_threads, "num_threads", "an integer of at least 1 or None", 1), 1 << 30)


cdef bint flag(object x, str name) except -1:
    if x is False:
        return False
    if x is True:
        return True
    if isinstance(x, np.bool_):
        return bool(x)
    raise TypeError(f"{name} must be True or False, not {x!r}")


cdef bint weights_flag(object x) except -1:
    if type(x) is str:
        raise ValueError(f"return_weights must be True, False or 'band', not {x!r}")
    return flag(x, "return_weights")


cdef int64_t clipped(object x):
    return max(-FAR, min(FAR, x))


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


cdef int place(Problem p, int operand, cnp.ndarray a, int trailing) except -1:
    """Notes where an array lies. trailing: how many of its last axes are not batch axes (at most 2). The others are
    known to broadcast to p.shape, where a shared key head counts for its whole group (split_heads sees to that). The
    caller keeps the array alive, in p.kept."""
    cdef Layout *layout = &p.layouts[operand]
    cdef int ndim = cnp.PyArray_NDIM(a), i, axis
    layout.data = <char *> cnp.PyArray_DATA(a)
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


cdef cnp.ndarray new_array(Problem p, Py_ssize_t rows, Py_ssize_t cols, fa_dtype dtype, cnp.ndarray like):
    """An array of shape p.shape + (rows, cols), not initialised; `like` has its dtype."""
    cdef cnp.npy_intp dims[MOST_AXES]
    cdef int i
    if dtype == FA_BF16 or p.axes + 2 > 32 or <double> p.heads * rows * cols > 1e15:
        return empty((*batch_shape(p), rows, cols), like.dtype)
    for i in range(p.axes):
        dims[i] = p.shape[i]
    dims[p.axes] = rows
    dims[p.axes + 1] = cols
    return cnp.PyArray_EMPTY(p.axes + 2, dims, cnp.PyArray_TYPE(like), 0)


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
    p.uneven = True
    return a


cdef cnp.ndarray read_bias(Problem p, object bias, tuple batch, Py_ssize_t rows, Py_ssize_t cols):
    cdef cnp.ndarray a = as_array(bias, "bias")
    if a.dtype.kind in "biu":
        raise TypeError(f"bias must be floating, not of dtype {a.dtype}; booleans that say "
                        f"which keys count go to mask=")
    p.shared.bias_dtype = storage_of(a, "bias")
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
    p.shared.relative_bias_dtype = storage_of(a, "relative_bias")
    read_matrix(p, RELATIVE_BIAS, a, "relative_bias", batch, rows, width)
    return a


cdef int read_per_head(Problem p, int operand, object x, str name, tuple batch, fa_dtype dtype) except -1:
    """Slopes or sinks: real numbers that broadcast over the batch axes, rounded to the accumulation dtype."""
    cdef cnp.ndarray a = as_array(x, name)
    if a.dtype.kind not in "biu" or not a.dtype.isnative:
        storage_of(a, name)
    broadcastable(a, name, batch, ())
    a = converted(converted(a, accumulation(dtype)), float64)
    p.kept.append(a)
    place(p, operand, a, 0)
    return 0


cdef cnp.ndarray integers(object x, str name, tuple batch, object least, object most, int64_t *scalar):
    """Lengths or offsets: None of an integer, which goes to `scalar`, or a new int64 array with exactly the batch axes.
    """
    cdef cnp.ndarray a
    allowed = f"an integer or an integer array with {len(batch)} axes, one for each batch axis"
    if is_one_number(x):
        n = integer(x, name, allowed)
        if least is not None and not least <= n <= most:
            raise ValueError(f"{name} must lie between {least} and {most}, not {n}")
        scalar[0] = clipped(n)
        return None
    a = as_array(x, name)
    if a.size == 0 and a is not x:  # an empty list says nothing of its dtype
        a = a.astype(np.int64)
    if a.dtype.kind not in "iu" or not a.dtype.isnative:
        raise TypeError(f"{name} must be {allowed}, not of dtype {a.dtype}")
    shape = shape_of(a)
    if len(shape) != len(batch) or any([have != want and have != 1
                                        for have, want in zip(shape, batch, strict=True)]):
        text = f"{name} has shape {shape}; allowed is {allowed}, each of its size or 1: the batch axes are {batch}"
        if len(shape) < len(batch):
            short = "lengths" if name.endswith("lengths") else name
            index = ", ".join([":"] * len(shape) + ["None"] * (len(batch) - len(shape)))
            text += f"; one number for each of the first axes is {short}[{index}]"
        raise ValueError(text)
    if least is not None and a.size:
        low, high = a.min(), a.max()
        if low < least or high > most:
            raise ValueError(f"{name} must lie between {least} and {most}, not {low if low < least else high}")
    elif a.size:
        if a.dtype.kind == "u":
            a = np.asarray(np.minimum(a, np.uint64(FAR)).astype(np.int64))
        else:
            a = np.asarray(np.clip(a.astype(np.int64), -FAR, FAR))
    return a.astype(np.int64, order="C")


cdef int read_integers(Problem p, int operand, object x, str name, tuple batch, object least, object most,
                       int64_t *scalar) except -1:
    cdef cnp.ndarray a = integers(x, name, batch, least, most, scalar)
    if a is not None:
        p.kept.append(a)
        place(p, operand, a, 0)
        p.uneven = True
    return 0


# out

cdef bint overlaps_itself(cnp.ndarray a):
    """Whether two index tuples may mean the same byte: no, where each stride leaps over all that smaller ones reach."""
    cdef list axes = sorted([(abs(s), n) for s, n in zip((<object> a).strides, shape_of(a), strict=True) if n > 1])
    reach = cnp.PyArray_ITEMSIZE(a)
    for stride, n in axes:
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False


cdef bint overlap(a, b):
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)
    except np.exceptions.TooHardError:
        return True


cdef int refuse_overlap(object out, tuple inputs, tuple names) except -1:
    if out is not None:
        for a, name in zip(inputs, names, strict=True):
            if isinstance(a, np.ndarray) and overlap(out, a):
                raise ValueError(f"out overlaps {name}; it needs memory of its own")
    return 0


cpdef object empty(tuple shape, dtype):
    """numpy.empty, whose error for sizes beyond the address space names nothing."""
    try:
        return np.empty(shape, dtype)
    except ValueError as error:
        raise MemoryError(f"no memory for a result of shape {shape} and dtype {dtype}") from error


cpdef cnp.ndarray checked_out(object out, tuple shape, dtype, list inputs, tuple names, bint same_allowed=False):
    """`out`, or a new array. inputs: arrays that it must not overlap; same_allowed: but may be the first of them."""
    if out is None:
        return empty(shape, dtype)
    if not isinstance(out, np.ndarray) or is_masked(out):
        raise TypeError(f"out must be a NumPy array, not {type(out).__name__}")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; it must have the output's, {shape}")
    if out.dtype != dtype or not out.dtype.isnative:
        raise TypeError(f"out has dtype {out.dtype.str if not out.dtype.isnative else out.dtype}; it must have the "
                        f"output's, {dtype}")
    if not out.flags.writeable:
        raise ValueError("out is read-only; it must be writeable")
    if out.size == 0:
        return out
    if not cnp.PyArray_IS_C_CONTIGUOUS(out) and overlaps_itself(out):
        raise ValueError(f"out overlaps itself (strides {out.strides} for shape {shape}): each element needs its place")
    for i in range(len(inputs)):
        a = inputs[i]
        if same_allowed and i == 0 and (a is out or a.ctypes.data == out.ctypes.data and a.strides == out.strides):
            continue
        refuse_overlap(out, (a,), (names[i],))
    return out


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
        to.query.data = at[<int> QUERY]
        to.key.data = at[<int> KEY]
        to.value.data = at[<int> VALUE]
        to.mask.data = at[<int> MASK]
        to.bias.data = at[<int> BIAS]
        to.relative_bias.data = at[<int> RELATIVE_BIAS]
        to.out.data = at[<int> OUT]
        to.weights.data = at[<int> WEIGHTS]
        to.lse.data = at[<int> LSE]
        to.slope.data = at[<int> SLOPES]
        to.sink.data = at[<int> SINKS]
        if at[<int> KEY_LENGTHS] != NULL:
            to.key_length = (<int64_t *> at[<int> KEY_LENGTHS])[0]
        if at[<int> QUERY_LENGTHS] != NULL:
            to.query_length = (<int64_t *> at[<int> QUERY_LENGTHS])[0]
        if self.packed:
            to.queries = to.query_length = self.query_starts[sequence + 1] - self.query_starts[sequence]
            to.keys = to.key_length = self.key_starts[sequence + 1] - self.key_starts[sequence]
            to.query.data += self.query_starts[sequence] * to.query.row
            to.out.data += self.query_starts[sequence] * to.out.row
            to.key.data += self.key_starts[sequence] * to.key.row
            to.value.data += self.key_starts[sequence] * to.value.row
            if to.lse.data != NULL:
                to.lse.data += self.query_starts[sequence] * to.lse.row
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
        p.layouts[i].row = p.layouts[i].col = 0
    p.operand_count = 0
    p.sequences = 1
    p.packed = False
    p.uneven = False
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


cdef object too_few_axes(str name, cnp.ndarray a, str wanted):
    return ValueError(f"{name} has shape {shape_of(a)}; it needs at least two axes, {wanted}")


cdef int read_arrays(Problem p, list arrays, bint grouped, Py_ssize_t *group) except -1:
    """Query, key and value, of one dtype: shapes that fit, batch axes, addresses."""
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
    """What the layouts say of the strides of a head; then the head axis is split where it is grouped."""
    p.group = group
    if group > 1:
        split_heads(p, group)
    p.sizes.heads = 1
    set_strides(&p.sizes.query, &p.layouts[<int> QUERY])
    set_strides(&p.sizes.key, &p.layouts[<int> KEY])
    set_strides(&p.sizes.value, &p.layouts[<int> VALUE])
    set_strides(&p.sizes.mask, &p.layouts[<int> MASK])
    set_strides(&p.sizes.bias, &p.layouts[<int> BIAS])
    set_strides(&p.sizes.relative_bias, &p.layouts[<int> RELATIVE_BIAS])
    set_strides(&p.sizes.out, &p.layouts[<int> OUT])
    set_strides(&p.sizes.weights, &p.layouts[<int> WEIGHTS])
    set_strides(&p.sizes.lse, &p.layouts[<int> LSE])
    set_strides(&p.sizes.slope, &p.layouts[<int> SLOPES])
    set_strides(&p.sizes.sink, &p.layouts[<int> SINKS])
    if p.shared.left < INT64_MAX or p.shared.right < INT64_MAX or p.shared.chunk:
        p.uneven = True
    return 0


cdef inline Py_ssize_t last_stride(Problem p, int operand) noexcept:
    """Along the last batch axis."""
    return p.layouts[operand].batch[p.axes - 1] if p.layouts[operand].data != NULL else 0


cdef int settle(Problem p) except -1:
    """Whether the queries are few; if they are not many, the heads of a group become rows of one head, so that keys and
    values are read, or packed, once for all of them: unless lengths or offsets differ within the group."""
    cdef Py_ssize_t group = p.group
    p.shared.few = p.shared.score == FA_DOT and p.longest_query <= FEW_QUERIES
    if (group == 1 or p.longest_query >= MANY_QUERIES or p.packed or last_stride(p, KEY_LENGTHS) or
            last_stride(p, QUERY_LENGTHS) or last_stride(p, OFFSETS) or last_stride(p, KEYS_BEFORE)):
        return 0
    p.sizes.query.head = last_stride(p, QUERY)
    p.sizes.mask.head = last_stride(p, MASK)
    p.sizes.bias.head = last_stride(p, BIAS)
    p.sizes.relative_bias.head = last_stride(p, RELATIVE_BIAS)
    p.sizes.out.head = last_stride(p, OUT)
    p.sizes.weights.head = last_stride(p, WEIGHTS)
    p.sizes.lse.head = last_stride(p, LSE)
    p.sizes.slope.head = last_stride(p, SLOPES)
    p.sizes.sink.head = last_stride(p, SINKS)
    p.sizes.heads = group
    p.sizes.queries *= group
    p.longest_query *= group
    p.heads //= group
    p.axes -= 1
    return 0


cdef inline void set_strides(fa_view *view, const Layout *layout) noexcept:
    """The part of a view that is the same for all heads; locate adds the address."""
    view.data = NULL
    view.row = layout.row
    view.col = layout.col
    view.head = 0


cdef Problem read_rules(
    Problem p, list arrays, tuple inputs, tuple names, object is_causal, object window_size, object chunk_size,
    object left_chunks, object query_offset, object key_lengths, object query_lengths, object mask, object bias,
    object relative_bias, object alibi_slopes, object scale, object softcap, object sinks, object activation,
    object enable_gqa, object return_weights, object return_lse, object out, object num_threads,
    object keys_before=None,
):
    """What all scores share. arrays: query and key, of one dtype, and value, of the output's; p.shared.dtype,
    .score_dtype and .score are set. inputs, names: what came, which `out` must not overlap. keys_before: how many keys
    were before the first one, of which chunks count; as query_offset."""
    cdef Py_ssize_t group
    p.shared.band = type(return_weights) is str and return_weights == "band"
    cdef bint with_weights = p.shared.band or weights_flag(return_weights), with_lse = flag(return_lse, "return_lse")
    cdef bint grouped = flag(enable_gqa, "enable_gqa")
    cdef bint no_rules = (key_lengths is None and query_lengths is None and query_offset is None and mask is None and
                          bias is None and relative_bias is None and alibi_slopes is None and sinks is None and
                          keys_before is None)
    p.shared.bias_dtype = FA_F32
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
        p.out = new_array(p, rows, p.shared.value_dim, p.shared.dtype, arrays[2])
    else:
        p.out = checked_out(out, (*batch_shape(p), rows, p.shared.value_dim), arrays[2].dtype,
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
    settle(p)
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
    p.shared.dtype = p.shared.score_dtype = promote(arrays, ("query", "key", "value"))
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


# Scores with weights of their own

cdef list read_weights(tuple given, tuple names, fa_dtype *dtype):
    """Query, key, value and weights, promoted together; a weight that is None stays None."""
    cdef list arrays = [], present = [], present_names = []
    cdef int i
    cdef cnp.ndarray a
    for i in range(len(given)):
        if i < 3 or given[i] is not None:
            present.append(floating(given[i], names[i]))
            present_names.append(names[i])
    dtype[0] = promote(present, tuple(present_names))
    present.reverse()
    for i in range(len(given)):
        arrays.append(None if given[i] is None else present.pop())
    for i in range(2):
        a = arrays[i]
        if cnp.PyArray_NDIM(a) < 2:
            raise too_few_axes(names[i], a, ("(..., L, D_query)", "(..., S, D_key)")[i])
    return arrays


cdef object read_vector(object x, str name, Py_ssize_t size, str why, fa_dtype dtype):
    """A bias of a projection, in the accumulation dtype."""
    cdef cnp.ndarray b = floating(x, name)
    if cnp.PyArray_NDIM(b) != 1 or cnp.PyArray_DIM(b, 0) != size:
        raise ValueError(f"{name} has shape {shape_of(b)}; it must be ({size},), {why}")
    return converted(b, accumulation(dtype))


cdef int check_matrix(cnp.ndarray w, str name, cnp.ndarray x, str x_name, object columns, str why) except -1:
    """Whether x @ w can be taken, and has so many columns; None: any number of them."""
    cdef Py_ssize_t rows = cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1)
    if (cnp.PyArray_NDIM(w) != 2 or cnp.PyArray_DIM(w, 0) != rows or
            columns is not None and cnp.PyArray_DIM(w, 1) != columns):
        allowed = f"({rows}, {'n' if columns is None else columns})"
        raise ValueError(f"{name} has shape {shape_of(w)}; it must be {allowed}: {rows} is {x_name}'s last axis{why}")
    return 0


cdef cnp.ndarray projected(cnp.ndarray x, cnp.ndarray w, cnp.ndarray b, fa_dtype dtype):
    """x @ w + b in the accumulation dtype; without w and b x as it is. The product is NumPy's."""
    if w is None and b is None:
        return x
    try:
        x = converted(x, accumulation(dtype))
        with np.errstate(all="ignore"):
            if w is not None:
                x = np.matmul(x, converted(w, accumulation(dtype)))
            return x if b is None else np.add(x, b)
    except ValueError as error:  # the shapes fit: what is left is a size beyond the address space
        raise MemoryError(f"no memory for the projection of an array of shape {shape_of(x)}") from error


cdef cnp.ndarray normalised(cnp.ndarray w, double *factor):
    """Score weights in float64, the largest between 1/2 and 1, and the power of two that was taken out: with it in the
    scale, where it may wait until the sum is taken, no product over- or underflows."""
    cdef cnp.ndarray a
    try:
        a = cnp.PyArray_FROMANY(w, cnp.NPY_FLOAT64, 1, 1, cnp.NPY_ARRAY_CARRAY | cnp.NPY_ARRAY_ENSURECOPY)
    except ValueError as error:
        raise MemoryError(f"no memory for a copy of w_score, of shape {shape_of(w)}") from error
    cdef double *number = <double *> cnp.PyArray_DATA(a)
    cdef double most = 0
    cdef int exponent = 0
    cdef Py_ssize_t i, n = cnp.PyArray_DIM(a, 0)
    for i in range(n):
        if isfinite(number[i]):
            most = max(most, fabs(number[i]))
    frexp(most, &exponent)
    for i in range(n):
        number[i] = ldexp(number[i], -exponent)
    factor[0] = ldexp(1.0, exponent)
    return a


cdef Problem read_additive(
    object query, object key, object value, object w_score, object w_query, object w_key, object b_hidden,
    object is_causal, object window_size, object chunk_size,
    object left_chunks, object query_offset, object key_lengths, object query_lengths, object mask, object bias,
    object relative_bias, object alibi_slopes, object scale, object softcap, object sinks, object activation,
    object enable_gqa, object return_weights, object return_lse, object out, object num_threads,
):
    cdef Problem p = new_problem()
    cdef list arrays
    cdef tuple names = ("query", "key", "value", "w_score", "w_query", "w_key")
    cdef cnp.ndarray q, k, x, w, b = None
    cdef Py_ssize_t hidden
    cdef int i
    if w_score is None:
        raise TypeError("w_score must be an array of shape (hidden,), not None")
    arrays = read_weights((query, key, value, w_score, w_query, w_key), names, &p.shared.dtype)
    q, k, w = arrays[0], arrays[1], arrays[3]
    if cnp.PyArray_NDIM(w) != 1:
        raise ValueError(f"w_score has shape {shape_of(w)}; it must have one axis, (hidden,)")
    hidden = cnp.PyArray_DIM(w, 0)
    for i in range(2):
        x = arrays[i]
        if arrays[4 + i] is not None:
            check_matrix(arrays[4 + i], names[4 + i], x, names[i], hidden,
                         f", and {hidden} (hidden) the length of w_score")
        elif cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1) != hidden:
            size = cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1)
            raise ValueError(f"{names[i]}'s last axis is {size}; without {names[4 + i]} it must be {hidden} (hidden), "
                             f"the length of w_score; {names[4 + i]}, of shape ({size}, {hidden}), projects it")
    if b_hidden is not None:
        b = read_vector(b_hidden, "b_hidden", hidden, "as long as w_score", p.shared.dtype)
    q, k = projected(q, arrays[4], b, p.shared.dtype), projected(k, arrays[5], None, p.shared.dtype)
    if cnp.PyArray_TYPE(q) != cnp.PyArray_TYPE(k):
        q, k = converted(q, accumulation(p.shared.dtype)), converted(k, accumulation(p.shared.dtype))
    p.shared.score_dtype = storage_of(q, "query")
    p.shared.score = FA_ADDITIVE
    p.score_weights = normalised(w, &p.shared.scale)
    p.shared.score_weights = <const double *> cnp.PyArray_DATA(p.score_weights)
    return read_rules(
        p, [q, k, arrays[2]], (query, key, value, w_score, w_query, w_key, b_hidden), (*names, "b_hidden"),
        is_causal, window_size, chunk_size, left_chunks, query_offset, key_lengths, query_lengths,
        mask, bias, relative_bias, alibi_slopes, scale, softcap, sinks, activation, enable_gqa, return_weights,
        return_lse, out, num_threads)


cdef Problem read_bilinear(
    object query, object key, object value, object w_query, object w_key, object b_query, object b_key,
    object is_causal, object window_size, object chunk_size,
    object left_chunks, object query_offset, object key_lengths, object query_lengths, object mask, object bias,
    object relative_bias, object alibi_slopes, object scale, object softcap, object sinks, object activation,
    object enable_gqa, object return_weights, object return_lse, object out, object num_threads,
):
    cdef Problem p = new_problem()
    cdef list arrays
    cdef tuple names = ("query", "key", "value", "w_query", "w_key")
    cdef cnp.ndarray q, k, q_matrix, k_matrix, q_bias = None, k_bias = None
    if w_query is None:
        raise TypeError("w_query must be a matrix of shape (D_query, n), not None")
    arrays = read_weights((query, key, value, w_query, w_key), names, &p.shared.dtype)
    q, k, q_matrix, k_matrix = arrays[0], arrays[1], arrays[3], arrays[4]
    check_matrix(q_matrix, "w_query", q, "query", None, "")
    columns = cnp.PyArray_DIM(q_matrix, 1)
    if k_matrix is not None:
        check_matrix(k_matrix, "w_key", k, "key", columns, f", and {columns} the number of w_query's columns")
    else:
        check_matrix(q_matrix, "w_query", k, "key", None, ", and without w_key both share w_query")
        k_matrix = q_matrix
    if b_query is not None:
        q_bias = read_vector(b_query, "b_query", columns, "one for each column of w_query", p.shared.dtype)
    if b_key is not None:
        k_bias = read_vector(b_key, "b_key", columns, "one for each column of w_query", p.shared.dtype)
    elif w_key is None:
        k_bias = q_bias
    q, k = projected(q, q_matrix, q_bias, p.shared.dtype), projected(k, k_matrix, k_bias, p.shared.dtype)
    p.shared.score_dtype = storage_of(q, "query")
    p.shared.score = FA_DOT
    p.shared.scale = 1
    return read_rules(
        p, [q, k, arrays[2]], (query, key, value, w_query, w_key, b_query, b_key), (*names, "b_query", "b_key"),
        is_causal, window_size, chunk_size, left_chunks, query_offset, key_lengths, query_lengths,
        mask, bias, relative_bias, alibi_slopes, scale, softcap, sinks, activation, enable_gqa, return_weights,
        return_lse, out, num_threads)


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
    p.uneven = True
    settle(p)
    return p


# Rows

cdef tuple checked_axes(object axis, int ndim):
    """The axes of a row, in ascending order."""
    if axis is None:
        return tuple(range(ndim))
    axes = []
    for one in axis if isinstance(axis, (tuple, list)) else (axis,):
        n = integer(one, "axis", "an integer, a tuple of integers, or None for all axes")
        if ndim == 0 and n in (0, -1):
            continue  # as in NumPy's reductions
        if not -ndim <= n < ndim:
            raise np.exceptions.AxisError(f"axis {n} is out of bounds for x, which has {ndim} axes")
        axes.append(n % ndim)
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis must not name an axis twice: {axis}")
    return tuple(sorted(axes))


cdef void join_axes(Axes *axes) noexcept:
    """Joins each axis to the one after it where all operands allow that; drops axes of one element."""
    cdef int i, k, n = 0
    cdef bint joined
    for i in range(axes.count):
        if axes.shape[i] == 1:
            continue
        joined = n > 0
        for k in range(<int> ROW_OPERANDS):
            if n > 0 and axes.strides[k][n - 1] != axes.strides[k][i] * axes.shape[i]:
                joined = False
        if joined:
            axes.shape[n - 1] *= axes.shape[i]
            for k in range(<int> ROW_OPERANDS):
                axes.strides[k][n - 1] = axes.strides[k][i]
        else:
            axes.shape[n] = axes.shape[i]
            for k in range(<int> ROW_OPERANDS):
                axes.strides[k][n] = axes.strides[k][i]
            n += 1
    axes.count = n


cdef Rows read_rows(object x, object axis, object mask, object out, object num_threads, bint reduces, object keepdims):
    """reduces: the result has one number a row, in the accumulation dtype (logsumexp)."""
    cdef Rows p = Rows.__new__(Rows)
    cdef cnp.ndarray a = floating(x, "x"), m = None, o
    cdef int ndim = cnp.PyArray_NDIM(a), i, k
    cdef tuple axes = checked_axes(axis, ndim)
    cdef Axes *to
    cdef bint keep = flag(keepdims, "keepdims")
    p.num_threads = checked_threads(num_threads)
    p.dtype = p.out_dtype = storage_of(a, "x")
    shape = shape_of(a)
    dtype = a.dtype
    if reduces:
        dtype = accumulation(p.dtype)
        p.out_dtype = FA_F64 if p.dtype == FA_F64 else FA_F32
        shape = tuple([1 if i in axes else n for i, n in enumerate(shape) if keep or i not in axes])
    inputs, names = [a], ("x",)
    p.data[<int> ROW_MASK] = NULL
    if mask is not None:
        m = as_array(mask, "mask")
        if cnp.PyArray_TYPE(m) != cnp.NPY_BOOL:
            raise TypeError(f"mask must be boolean, True where an entry counts, not of dtype {m.dtype}")
        try:
            m = np.broadcast_to(m, shape_of(a))
        except ValueError:
            raise ValueError(f"mask has shape {shape_of(m)}, which does not broadcast to x's, {shape_of(a)}") from None
        inputs, names = [a, m], ("x", "mask")
        p.data[<int> ROW_MASK] = <char *> cnp.PyArray_DATA(m)
    p.answer = o = checked_out(out, shape, dtype, inputs, names, not reduces)
    if reduces and not keep:
        o = np.expand_dims(o, axes)
    p.data[<int> ROW_X] = <char *> cnp.PyArray_DATA(a)
    p.data[<int> ROW_OUT] = <char *> cnp.PyArray_DATA(o)
    p.aligned = cnp.PyArray_ISALIGNED(a) and cnp.PyArray_ISALIGNED(o)
    p.kept = [a, m, o]
    p.row.count = p.batch.count = 0
    p.length = p.rows = 1
    for i in range(ndim):
        to = &p.row if i in axes else &p.batch
        if i in axes:
            p.length *= cnp.PyArray_DIM(a, i)
        else:
            p.rows *= cnp.PyArray_DIM(a, i)
        k = to.count
        to.shape[k] = cnp.PyArray_DIM(a, i)
        to.strides[<int> ROW_X][k] = cnp.PyArray_STRIDE(a, i)
        to.strides[<int> ROW_OUT][k] = cnp.PyArray_STRIDE(o, i)
        to.strides[<int> ROW_MASK][k] = 0 if mask is None else cnp.PyArray_STRIDE(m, i)
        if reduces and i in axes:
            to.strides[<int> ROW_OUT][k] = 0
        to.count += 1
    join_axes(&p.row)
    join_axes(&p.batch)
    return p


# Pairs that turn

cdef void add_axis(Axes *axes, Py_ssize_t size, Py_ssize_t x_stride, Py_ssize_t out_stride) noexcept:
    axes.shape[axes.count] = size
    axes.strides[<int> ROW_X][axes.count] = x_stride
    axes.strides[<int> ROW_OUT][axes.count] = out_stride
    axes.strides[<int> ROW_MASK][axes.count] = 0
    axes.count += 1


cdef void note_position(Rotation p, Py_ssize_t number, int64_t position) noexcept:
    p.positions[number] = position
    p.least, p.greatest = min(p.least, position), max(p.greatest, position)


cdef cnp.ndarray new_positions(Rotation p):
    """Memory for the positions of all rows of all cells."""
    cdef cnp.npy_intp count = p.cell_count * p.length
    cdef cnp.ndarray a = cnp.PyArray_EMPTY(1, &count, cnp.NPY_INT64, 0)
    p.positions = <int64_t *> cnp.PyArray_DATA(a)
    p.least, p.greatest = INT64_MAX, -INT64_MAX
    return a


cdef cnp.ndarray checked_positions(object x, cnp.ndarray of):
    """An int64 array that broadcasts to the rows of an array."""
    cdef cnp.ndarray a = as_array(x, "positions")
    cdef int axes = cnp.PyArray_NDIM(a), skipped = cnp.PyArray_NDIM(of) - 1 - axes, i
    cdef bint fits = skipped >= 0
    for i in range(axes):
        if fits and cnp.PyArray_DIM(a, i) not in (1, cnp.PyArray_DIM(of, i + skipped)):
            fits = False
    if fits and cnp.PyArray_TYPE(a) == cnp.NPY_INT64 and cnp.PyArray_ISNOTSWAPPED(a):
        return a
    rows = shape_of(of)[:cnp.PyArray_NDIM(of) - 1]
    shape = shape_of(a)
    allowed = f"integers that broadcast to {rows}, the shape of x without its last axis"
    if cnp.PyArray_SIZE(a) == 0 and a is not x:  # an empty list says nothing of its dtype
        a = a.astype(np.int64)
    if a.dtype.kind not in "iu" or not a.dtype.isnative:
        raise TypeError(f"positions must be {allowed}, not of dtype {a.dtype}")
    if not fits:
        text = f"positions has shape {shape}; it must be {allowed}"
        if len(rows) == 3 and shape == (rows[0], rows[2]):
            text += "; those of each sequence, for all its heads, are positions[:, None]"
        raise ValueError(text)
    if a.dtype.kind == "u" and cnp.PyArray_ITEMSIZE(a) == 8 and cnp.PyArray_SIZE(a) and a.max() > FARTHEST:
        raise far_position(a.max())
    return a.astype(np.int64)


cdef object far_position(object position):
    return ValueError(f"positions must lie between {-FARTHEST} and {FARTHEST}, not {position}")


cdef list read_positions(Rotation p, cnp.ndarray a, int ndim):
    """Copies what each row's position is, in the order of the cells; a: positions, of an x with ndim axes. Returns the
    memory."""
    cdef Py_ssize_t shape[MOST_AXES]
    cdef Py_ssize_t strides[MOST_AXES]
    cdef Py_ssize_t index[MOST_AXES]
    cdef int axes = 0, axis, skipped = ndim - 1 - cnp.PyArray_NDIM(a), i
    cdef Py_ssize_t cell, row, step
    cdef const char *at = <const char *> cnp.PyArray_DATA(a)
    cdef int64_t position
    cdef cnp.ndarray memory = new_positions(p)
    cdef bint in_order = p.cell_count == 1
    for i in range(cnp.PyArray_NDIM(a) - 1):
        if varies(a, i):
            shape[axes], strides[axes], index[axes] = cnp.PyArray_DIM(a, i), cnp.PyArray_STRIDE(a, i), 0
            axes += 1
    step = 0
    if skipped < ndim - 1 and varies(a, cnp.PyArray_NDIM(a) - 1):
        step = cnp.PyArray_STRIDE(a, cnp.PyArray_NDIM(a) - 1)
    for cell in range(p.cell_count if p.length else 0):
        for row in range(p.length):
            memcpy(&position, at + row * step, 8)
            if not -FARTHEST <= position <= FARTHEST:
                raise far_position(position)
            note_position(p, cell * p.length + row, position)
            if position != p.positions[0] + row:
                in_order = False
        for axis in range(axes - 1, -1, -1):
            index[axis] += 1
            at += strides[axis]
            if index[axis] < shape[axis]:
                break
            at -= index[axis] * strides[axis]
            index[axis] = 0
    if in_order:
        p.positions = NULL
    return [memory]


cdef bint varies(cnp.ndarray a, int axis):
    """Whether the numbers may differ along an axis."""
    return cnp.PyArray_DIM(a, axis) > 1 and cnp.PyArray_STRIDE(a, axis) != 0


cpdef cnp.ndarray checked_frequencies(object x, str name, Py_ssize_t pairs):
    """A float64 array of angles a position, one a pair of channels; perhaps x itself."""
    cdef cnp.ndarray a = floating(x, name)
    cdef Py_ssize_t i
    cdef double angle
    if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_DIM(a, 0) != pairs:
        raise ValueError(f"{name} has shape {shape_of(a)}; it must be ({pairs},), one angle for each pair of the "
                         f"{2 * pairs} channels that turn (rotary_dim, by default all)")
    if cnp.PyArray_TYPE(a) != cnp.NPY_FLOAT64 or not cnp.PyArray_ISCARRAY_RO(a):
        with np.errstate(all="ignore"):
            a = a.astype(np.float64, order="C")
    for i in range(pairs):
        angle = (<double *> cnp.PyArray_DATA(a))[i]
        if not fabs(angle) <= GREATEST_FREQUENCY:
            raise ValueError(f"{name} must hold finite numbers, at most {GREATEST_FREQUENCY:g} in size; number {i} is "
                             f"{angle}")
    return a


cdef Rotation read_rotation(object x, object offset, object positions, object base, object frequencies,
                            object attention_factor, object interleaved, object rotary_dim, object out,
                            object num_threads):
    cdef Rotation p = Rotation.__new__(Rotation)
    cdef cnp.ndarray a = floating(x, "x"), o, offsets = None, places = None, own = None
    cdef int ndim = cnp.PyArray_NDIM(a), i, axis
    cdef Py_ssize_t n, row
    cdef bint cell
    if ndim < 2:
        raise too_few_axes("x", a, "(..., L, D)")
    p.dtype = storage_of(a, "x")
    p.length = cnp.PyArray_DIM(a, ndim - 2)
    p.channels = cnp.PyArray_DIM(a, ndim - 1)
    if rotary_dim is None:
        if p.channels % 2:
            raise ValueError(f"x has an odd number of channels (its last axis), {p.channels}: rotary_dim, even, says "
                             f"how many of them turn")
        p.pairs = p.channels // 2
    else:
        dim = integer(rotary_dim, "rotary_dim", "an even integer or None")
        if not 0 <= dim <= p.channels or dim % 2:
            raise ValueError(f"rotary_dim must be even and lie between 0 and {p.channels}, the number of x's channels "
                             f"(its last axis), not {dim}")
        p.pairs = dim // 2
    p.base = 10000.0
    if not (type(base) is float and <double> base == 10000.0):
        p.base = real(base, "base", "a positive finite number", True)
    p.frequencies = NULL
    if frequencies is not None:
        if p.base != 10000.0:
            raise ValueError(f"base={base} and frequencies do not go together: frequencies are instead of those that "
                             f"follow from a base")
        own = checked_frequencies(frequencies, "frequencies", p.pairs)
        p.frequencies = <const double *> cnp.PyArray_DATA(own)
        p.base = 0
    p.factor = 1
    if not (type(attention_factor) is float and <double> attention_factor == 1):
        p.factor = real(attention_factor, "attention_factor", "a positive finite number", True)
    p.interleaved = flag(interleaved, "interleaved")
    p.num_threads = checked_threads(num_threads)
    p.positions = NULL
    if type(offset) is int and -FARTHEST <= offset <= FARTHEST:
        p.least = offset
    else:
        offsets = integers(offset, "offset", shape_of(a)[:ndim - 2], -FARTHEST, FARTHEST, &p.least)
    if positions is not None:
        if offsets is not None or p.least != 0:
            raise ValueError("offset and positions do not go together: positions say where each row is, offset where "
                             "the first of rows is that follow each other")
        places = checked_positions(positions, a)

    if out is None and p.dtype != FA_BF16 and <double> cnp.PyArray_SIZE(a) < 1e15:
        o = cnp.PyArray_EMPTY(ndim, cnp.PyArray_DIMS(a), cnp.PyArray_TYPE(a), 0)
    else:
        o = checked_out(out, shape_of(a), a.dtype, [a], ("x",), True)
        refuse_overlap(out, (x if a.dtype != getattr(x, "dtype", None) else None, offset, positions, frequencies),
                       ("x", "offset", "positions", "frequencies"))
    p.answer = o
    p.data[<int> ROW_X] = <char *> cnp.PyArray_DATA(a)
    p.data[<int> ROW_OUT] = <char *> cnp.PyArray_DATA(o)
    # A stride along an axis of one element means nothing.
    p.row[<int> ROW_X] = cnp.PyArray_STRIDE(a, ndim - 2) if p.length > 1 else 0
    p.row[<int> ROW_OUT] = cnp.PyArray_STRIDE(o, ndim - 2) if p.length > 1 else 0
    p.col[<int> ROW_X] = cnp.PyArray_STRIDE(a, ndim - 1) if p.channels > 1 else cnp.PyArray_ITEMSIZE(a)
    p.col[<int> ROW_OUT] = cnp.PyArray_STRIDE(o, ndim - 1) if p.channels > 1 else cnp.PyArray_ITEMSIZE(o)
    p.cells.count = p.members.count = 0
    p.cell_count = p.member_count = 1
    for i in range(ndim - 2):
        n = cnp.PyArray_DIM(a, i)
        cell = offsets is not None and cnp.PyArray_DIM(offsets, i) > 1
        if places is not None:
            axis = i - (ndim - 1 - cnp.PyArray_NDIM(places))
            cell = axis >= 0 and varies(places, axis)
        if cell:
            add_axis(&p.cells, n, cnp.PyArray_STRIDE(a, i), cnp.PyArray_STRIDE(o, i))
            p.cell_count *= n
        else:
            add_axis(&p.members, n, cnp.PyArray_STRIDE(a, i), cnp.PyArray_STRIDE(o, i))
            p.member_count *= n
    join_axes(&p.cells)
    join_axes(&p.members)
    p.kept = [a, o, own]
    if places is not None:
        p.kept += read_positions(p, places, ndim)
    elif offsets is not None and p.cell_count > 1:
        p.kept.append(new_positions(p))
        for n in range(p.cell_count):
            for row in range(p.length):
                note_position(p, n * p.length + row, (<int64_t *> cnp.PyArray_DATA(offsets))[n] + row)
    else:
        if offsets is not None and cnp.PyArray_SIZE(offsets):
            p.least = (<int64_t *> cnp.PyArray_DATA(offsets))[0]
        p.greatest = p.least + max(p.length, 1) - 1
    return p


# Parts

cdef Parts read_parts(object outs, object lses):
    """Parts of the key axis: outs, each (..., L, E), and lses, each (..., L)."""
    cdef Parts p = Parts.__new__(Parts)
    for x, name in ((outs, "outs"), (lses, "lses")):
        if not isinstance(x, (list, tuple)) and not (isinstance(x, np.ndarray) and x.ndim):
            raise TypeError(f"{name} must be a sequence of arrays, one for each part, not {type(x).__name__}")
    if len(outs) != len(lses) or len(outs) == 0:
        raise ValueError(f"outs and lses must have one array for each part, and at least one: they have {len(outs)} "
                         f"and {len(lses)}")
    out_arrays = [floating(x, f"outs[{i}]") for i, x in enumerate(outs)]
    lse_arrays = [floating(x, f"lses[{i}]") for i, x in enumerate(lses)]
    dtype = common_dtype(out_arrays, tuple([f"outs[{i}]" for i in range(len(outs))]))
    shape = out_arrays[0].shape
    for i in range(len(out_arrays)):
        if out_arrays[i].ndim < 2:
            raise too_few_axes(f"outs[{i}]", out_arrays[i], "(..., L, E)")
        if out_arrays[i].shape != shape:
            raise ValueError(f"outs[{i}] has shape {out_arrays[i].shape}; all parts must have the same shape "
                             f"(..., L, E), and outs[0] has {shape}")
        if lse_arrays[i].shape != shape[:-1]:
            raise ValueError(f"lses[{i}] has shape {lse_arrays[i].shape}; to fit outs it must be {shape[:-1]}")
    p.out = np.empty(shape, dtype)
    p.dtype = storage_of(p.out, "outs")
    p.lse = np.empty(shape[:-1], accumulation(p.dtype))
    p.parts = len(out_arrays)
    p.rows = p.lse.size
    p.value_dim = shape[len(shape) - 1]
    p.shape = np.array(shape[:-1], np.int64)
    p.out_at = np.array([a.ctypes.data for a in out_arrays], np.int64)
    p.lse_at = np.array([a.ctypes.data for a in lse_arrays], np.int64)
    p.out_strides = np.array([a.strides for a in out_arrays], np.int64)
    p.lse_strides = np.array([a.strides for a in lse_arrays], np.int64)
    p.out_dtype = np.array([<int> storage_of(a, "outs") for a in out_arrays], np.int64)
    p.lse_dtype = np.array([<int> storage_of(a, "lses") for a in lse_arrays], np.int64)
    p.kept = [out_arrays, lse_arrays]
    return p


# Arguments that are not there

cdef extern from *:
    """
    #define FA_VECTORCALL(f) (*(vectorcallfunc *)((char *)(f) + Py_TYPE(f)->tp_vectorcall_offset))
    static vectorcallfunc fa_call_of(PyObject *f) { return FA_VECTORCALL(f); }
    static void fa_set_call(PyObject *f, vectorcallfunc call) { FA_VECTORCALL(f) = call; }
    """
    ctypedef PyObject *(*vectorcallfunc)(PyObject *, PyObject *const *, size_t, PyObject *) noexcept
    vectorcallfunc fa_call_of(object f)
    void fa_set_call(object f, vectorcallfunc call)
    Py_ssize_t PyVectorcall_NARGS(size_t count)

cdef vectorcallfunc plain_call = NULL


cdef PyObject *naming_call(PyObject *f, PyObject *const *arguments, size_t count, PyObject *names) noexcept:
    """The call as it was; only where it fails, what it lacks is looked for."""
    cdef PyObject *result = plain_call(f, arguments, count, names)
    if result == NULL and PyErr_ExceptionMatches(TypeError):
        name_missing(<object> f, PyVectorcall_NARGS(count), () if names == NULL else <object> names)
    return result


cdef void name_missing(object f, Py_ssize_t given, tuple names) noexcept:
    """Sets Python's own error in place of Cython's, if arguments are missing; an unknown keyword goes first."""
    cdef PyObject *kind
    cdef PyObject *value
    cdef PyObject *traceback
    PyErr_Fetch(&kind, &value, &traceback)
    code = f.__code__
    needed = code.co_varnames[given:code.co_argcount - len(f.__defaults__ or ())]
    missing = [repr(name) for name in needed if name not in names]
    unknown = set(names).difference(code.co_varnames[:code.co_argcount + code.co_kwonlyargcount])
    text = None
    if missing and not unknown:
        text = f"{f.__name__}() missing {len(missing)} required positional argument{'s' * (len(missing) > 1)}: "
        text += ", ".join(missing[:-1]) + " and " * (len(missing) > 1) + missing[len(missing) - 1]
    PyErr_Restore(kind, value, traceback)
    if text is not None:
        PyErr_SetObject(TypeError, text)


def names_missing_arguments(f):
    """f, a function that Cython compiled, whose errors now say which arguments are missing, not only how many."""
    global plain_call
    if type(f).__name__ == "cython_function_or_method" and (plain_call == NULL or plain_call == fa_call_of(f)):
        plain_call = fa_call_of(f)
        fa_set_call(f, naming_call)
    return f
