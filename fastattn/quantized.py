"""Keys and values in 8 bits: a quarter of the memory, and of what a query over a long cache has to read.

The docstrings are the specification; fastattn.reference is the same in NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn._checks import as_array, empty, floating, integer
from fastattn._quantize import mean_of_tokens, place

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

_BLOCK = 32  # numbers of a block in llama.cpp's formats
_BYTES = {"q8_0": 34, "q4_0": 18}  # of a block, of which the first two are its scale


class QuantizedKV(NamedTuple):
    """
    Keys and values as int8, and what makes numbers of them: a named tuple.

    Its fields are arguments of `dot_product_attention`, which reads the int8 numbers where they lie:
    ``dot_product_attention(query, **quantized._asdict())``.

    Parameters
    ----------
    key : ndarray of int8, shape (..., S, D)
        The keys are ``key * key_scale + key_center``.
    value : ndarray of int8, shape (..., S, E)
        The values are ``value * value_scale``.
    key_scale, value_scale : ndarray or float
        float32, float16 or bfloat16: (..., S, 1), one for each token; (..., 1, D) or (D,), one for each channel (for
        values E); a number, one for all; (..., S, n), n dividing D (or E), one for each block of D / n channels.
    key_center : ndarray, shape (..., 1, D) or (D,), optional
        None: zeros.

    Attributes
    ----------
    nbytes : int
        Of all its arrays.

    See Also
    --------
    quantize_kv : makes one.
    from_llama_cpp : reads numbers and scales of llama.cpp.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> quantized = fastattn.QuantizedKV(np.int8([[-3, 5]]), np.int8([[100]]), 0.5, np.float32([[0.25]]))
    >>> quantized.dequantize()
    (array([[-1.5,  2.5]], dtype=float32), array([[25.]], dtype=float32))
    """

    key: NDArray[np.int8]
    value: NDArray[np.int8]
    key_scale: Any
    value_scale: Any
    key_center: Any = None

    @property
    def nbytes(self) -> int:
        """Of all its arrays, in bytes."""
        return sum(np.asarray(a).nbytes for a in self if a is not None)

    def dequantize(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """
        The numbers that attention computes with.

        Returns
        -------
        key, value : ndarray of float32

        Raises
        ------
        ValueError, TypeError
            If a scale or the center does not fit its numbers, or these are not int8.
        MemoryError
            If there is no memory for them.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> key, value = np.int8([[2, 4]]), np.int8([[1, 1]])
        >>> quantized = fastattn.QuantizedKV(key, value, 1.0, np.float32([[3, 7]]), [[10, 20]])
        >>> quantized.dequantize()[0]
        array([[12., 24.]], dtype=float32)
        """
        with np.errstate(all="ignore"):
            key = _times(self.key, self.key_scale, "key")
            if self.key_center is not None:
                center = floating(self.key_center, "key_center")
                _check_center(center, "key_center", key.shape)
                key += center.astype(np.float32, copy=False)
            return key, _times(self.value, self.value_scale, "value")


def _times(x: Any, scale: Any, name: str) -> NDArray[np.float32]:
    """int8 numbers times their scales."""
    numbers, s = as_array(x, name, "pass its data"), floating(scale, f"{name}_scale")
    if numbers.dtype != np.int8:
        raise TypeError(f"{name} has dtype {numbers.dtype}; it must be int8, as quantize_kv makes it")
    channels = numbers.shape[-1] if numbers.ndim else 0
    groups = s.shape[-1] if s.ndim > 1 else 1
    result: NDArray[np.float32] = empty(numbers.shape, np.dtype(np.float32), f"the {name}s")
    grouped, to, s = numbers, result, s.astype(np.float32, copy=False)
    if groups not in (1, channels) and groups and channels % groups == 0:
        grouped = numbers.reshape(*numbers.shape[:-1], groups, channels // groups)
        to, s = result.reshape(grouped.shape), s[..., None]
    try:
        np.multiply(grouped, s, out=to, dtype=np.float32)
    except ValueError:
        raise ValueError(
            f"{name}_scale has shape {np.shape(scale)}, and {name} {numbers.shape}; it must be (..., S, 1), (..., 1, "
            f"D), (D,), a number, or (..., S, n) with n dividing D: S tokens, D channels"
        ) from None
    return result


def _check_center(center: NDArray[Any], name: str, shape: tuple[int, ...]) -> None:
    """Check that it has one number for each channel of keys of this shape, for all tokens."""
    batch = center.shape[:-2]
    fits = center.shape[-1:] == shape[-1:] and (center.ndim == 1 or center.shape[-2] == 1)
    fits = fits and len(batch) <= len(shape) - 2
    if not fits or any(n not in (1, m) for n, m in zip(batch[::-1], shape[-3::-1], strict=False)):
        allowed = ", ".join(map(str, (*shape[:-2], 1, shape[-1])))
        raise ValueError(
            f"{name} has shape {center.shape}; it must be ({allowed}), or less that broadcasts to it, such as "
            f"({shape[-1]},): a number for each channel"
        )


def read_center(center: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A center that a caller passes for keys of this shape: a checked copy, in float32."""
    a = floating(center, "center")
    _check_center(a, "center", shape)
    with np.errstate(all="ignore"):
        own = np.array(a, np.float32)
    if not np.isfinite(own).all():
        at = np.unravel_index(int(np.argmin(np.isfinite(own))), own.shape)
        raise ValueError(f"center[{', '.join(map(str, at))}] is {a[at]}: it must be finite in float32")
    return own


def read_tokens(x: Any, name: str, instead: str) -> NDArray[Any]:
    """An array that is to be quantized."""
    a = as_array(x, name, instead)
    if a.dtype.kind in "iu" and a.dtype.itemsize == 1:
        raise TypeError(
            f"{name} has dtype {a.dtype}, as what is quantized already: give the numbers themselves, float32, float64, "
            f"float16 or ml_dtypes.bfloat16"
        )
    return floating(a, name)


def check_block(block: Any, dims: tuple[tuple[int, str], ...]) -> int | None:
    """The number of channels that share a scale; dims: of keys and of values, and their names."""
    if block is None:
        return None
    n = integer(block, "block", "an integer of at least 1, or None: one scale for each token", 1)
    for dim, name in dims:
        if dim % n:
            raise ValueError(f"block={n} does not divide {name}={dim}: each block of channels has its scale")
    return n


def scales_shape(shape: tuple[int, ...], block: int | None) -> tuple[int, ...]:
    """Of tokens with this shape."""
    return (*shape[:-1], 1 if block is None else max(shape[-1] // block, 1))


def quantize_kv(
    key: ArrayLike,
    value: ArrayLike,
    *,
    center: ArrayLike | str | None = None,
    block: int | None = None,
    dtype: DTypeLike = np.int8,
    scale_dtype: DTypeLike = np.float32,
) -> QuantizedKV:
    """
    Keys and values in 8 bits, for `dot_product_attention` with its `key_scale` and `value_scale`.

    Each token of each head gets a scale, or each block of its channels: the largest magnitude over 127. The numbers are
    int8 multiples of it, symmetric around 0, from -127 to 127, rounded half to even.

    Parameters
    ----------
    key : array_like, shape (..., S, D)
    value : array_like, shape (..., S, E)
        float32, float64, float16 or bfloat16, finite; numbers are taken in float32. Integers of more than 8 bits and
        bools become numbers.
    center : "mean" or array_like, shape (..., 1, D) or (D,), optional
        Taken off the keys before they are rounded, and added again as `key_center`: "mean" is the mean over the S
        tokens of each sequence and head. Keys of many models have channels whose mean is large beside what differs
        from token to token; with it, they do not use up the range of the others. Default: nothing.
    block : int, optional
        So many channels share a scale; it divides D and E. Default: all channels of a token.
    dtype : dtype_like, default int8
        There is no other yet.
    scale_dtype : dtype_like, default float32
        Of the scales: float32, float16 or ml_dtypes.bfloat16.

    Returns
    -------
    QuantizedKV
        ``key, value, key_scale, value_scale, key_center``: scales are (..., S, 1), or (..., S, D / block) and (..., S,
        E / block); `key_center` is float32, (..., 1, D) or as `center` was given, None without one.

    Raises
    ------
    ValueError
        If a number is NaN or infinite, in float32; if float16 is too small for a scale; if shapes do not fit. The
        message names the array and the place.
    TypeError
        If a dtype is none of those.
    MemoryError
        If there is no memory for the result; nothing else of its size is made.

    See Also
    --------
    KVCache : with ``dtype=numpy.int8`` it quantizes what is appended.

    Notes
    -----
    Each number is off by at most half its scale, ``abs(key - (key * key_scale + key_center)) <= key_scale / 2``, apart
    from the rounding of float32; the scale itself is rounded to `scale_dtype` before it divides. So a score is off by
    at most ``scale * sum(abs(query)) * key_scale / 2``, and an output by at most the largest ``value_scale / 2`` of the
    values that it sees, besides what its weights owe to the scores. A group of zeros is exact, with a scale of 0.

    At 128 channels these are 8.25 bits a number, with ``block=32`` 9, or 8.5 with float16 scales. On made-up keys and
    on those of models, a scale for each token with ``center="mean"`` is as good as blocks of 32.

    References
    ----------
    .. [1] Z. Liu et al., "KIVI: a tuning-free asymmetric 2bit quantization for KV cache", ICML 2024: why keys have
       large channels and values do not.
    .. [2] J. Zhang et al., "SageAttention: accurate 8-bit attention for plug-and-play inference acceleration", ICLR
       2025: subtracts the mean of the keys, which the softmax cancels.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 2, 100, 64), dtype=np.float32)
    >>> quantized = fastattn.quantize_kv(key, value, center="mean")
    >>> quantized.key.dtype, quantized.key_scale.shape, quantized.key_center.shape
    (dtype('int8'), (2, 100, 1), (2, 1, 64))
    >>> print(f"{quantized.nbytes / (key.nbytes + value.nbytes):.3f} of the memory")
    0.271 of the memory
    >>> back, _ = quantized.dequantize()
    >>> bool((abs(back - key) <= 0.5001 * quantized.key_scale).all())
    True
    """
    keys, values = (read_tokens(x, name, "pass its data") for x, name in ((key, "key"), (value, "value")))
    for a, name, channels in ((keys, "key", "D"), (values, "value", "E")):
        if a.ndim < 2:
            raise ValueError(f"{name} has shape {a.shape}; it must be (..., S, {channels}): tokens, channels")
    if keys.shape[-2] != values.shape[-2]:
        raise ValueError(
            f"value has {values.shape[-2]} tokens (axis -2) and key {keys.shape[-2]}: each token brings both"
        )
    n = check_block(block, ((keys.shape[-1], "the channels of key, D"), (values.shape[-1], "the channels of value, E")))
    _check_int8(dtype)
    scales = _scale_dtype(scale_dtype)
    middle = None
    if isinstance(center, str):
        if center != "mean":
            raise ValueError(f"center must be 'mean', an array of shape (..., 1, D), or None, not {center!r}")
        middle = np.zeros((*keys.shape[:-2], 1, keys.shape[-1]), np.float32)
        mean_of_tokens(keys, middle)
    elif center is not None:
        middle = read_center(center, keys.shape)
    everywhere = None if middle is None else np.broadcast_to(middle, (*keys.shape[:-2], 1, keys.shape[-1]))
    made = []
    for a, name, less in ((keys, "key", everywhere), (values, "value", None)):
        to = empty(a.shape, np.dtype(np.int8), f"the quantized {name}s")
        its_scales = empty(scales_shape(a.shape, n), scales, f"the scales of the {name}s")
        place(name, a, less, to, its_scales)
        made.append((to, its_scales))
    (to_key, key_scale), (to_value, value_scale) = made
    return QuantizedKV(to_key, to_value, key_scale, value_scale, middle)


def _check_int8(dtype: Any) -> None:
    try:
        is_int8 = np.dtype(dtype) == np.int8
    except TypeError as error:
        raise TypeError(f"dtype must be numpy.int8: {error}") from error
    if not is_int8:
        raise TypeError(f"dtype must be numpy.int8, not {np.dtype(dtype)}")


def _scale_dtype(scale_dtype: Any) -> np.dtype[Any]:
    allowed = "scale_dtype must be float32, float16 or ml_dtypes.bfloat16"
    try:
        dtype = np.dtype(scale_dtype)
    except TypeError as error:
        raise TypeError(f"{allowed}: {error}") from error
    if dtype.name not in ("float32", "float16", "bfloat16") or not dtype.isnative:
        raise TypeError(f"{allowed}, not {dtype}")
    return dtype


def from_llama_cpp(blocks: ArrayLike, format: str | None = None) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """
    Numbers and scales of rows in llama.cpp's formats q8_0 and q4_0, as its caches and GGUF files hold them.

    Both cut a row into blocks of 32 numbers, each with a float16 scale in front. q8_0 has 34 bytes a block: int8
    numbers follow the scale. q4_0 has 18, with two numbers in a byte: the first 16 of a block in the low halves, the
    others in the high ones, each with 8 added. Numbers of q4_0 become int8 too.

    Parameters
    ----------
    blocks : array_like of uint8, shape (..., bytes)
        Rows of whole blocks. A cache whose keys lie token by token, ``heads * (D / 32)`` blocks each, is first made to
        ``blocks.reshape(tokens, heads, -1).swapaxes(0, 1)``.
    format : {"q8_0", "q4_0"}, optional
        Default: the one whose blocks fill a row; needed if both do, as in 306 bytes.

    Returns
    -------
    numbers : ndarray of int8, shape (..., D)
        From -128 to 127, of q4_0 from -8 to 7.
    scales : ndarray of float16, shape (..., D / 32)
        ``numbers.reshape(..., D / 32, 32) * scales[..., None]`` are the values. They may be negative.

    Raises
    ------
    ValueError
        If a row does not hold whole blocks, or `format` is none of those.
    TypeError
        If `blocks` are not bytes.
    MemoryError
        If there is no memory for the result.

    See Also
    --------
    QuantizedKV : takes those of keys and of values.

    Notes
    -----
    The keys of llama.cpp's caches are rotated by their positions already, where the model does that. Since April 2026
    it also multiplies queries, keys and values by an orthonormal Hadamard matrix before it stores them in 8 or 4 bits
    [2]_, by default for heads of a multiple of 64 channels: then multiply the query too, and the output once more.

    References
    ----------
    .. [1] ggml, https://github.com/ggml-org/ggml: ``block_q8_0`` and ``block_q4_0`` in src/ggml-common.h.
    .. [2] https://github.com/ggml-org/llama.cpp/pull/21038.

    Examples
    --------
    A row of one block: its scale is 0.5, its numbers 0, 1, 2 ...

    >>> import numpy as np
    >>> import fastattn
    >>> block = np.concatenate([np.float16([0.5]).view(np.uint8), np.arange(32, dtype=np.uint8)])
    >>> numbers, scales = fastattn.from_llama_cpp(block)
    >>> numbers[:4], scales
    (array([0, 1, 2, 3], dtype=int8), array([0.5], dtype=float16))

    Two calls make the arguments of attention, here one head of 7 keys and values of 64 numbers, two blocks each:

    >>> rows = np.tile(block, (2, 7, 2))
    >>> (key, key_scale), (value, value_scale) = map(fastattn.from_llama_cpp, rows)
    >>> fastattn.QuantizedKV(key, value, key_scale, value_scale).dequantize()[1].shape
    (7, 64)
    """
    a = as_array(blocks, "blocks", "pass its data")
    if a.dtype != np.uint8:
        raise TypeError(f"blocks has dtype {a.dtype}; it must be uint8, the bytes of rows: x.view(numpy.uint8)")
    if a.ndim < 1:
        raise ValueError("blocks has no axes; it must be (..., bytes): rows of whole blocks")
    sizes = " or ".join(f"{size} bytes ({name})" for name, size in _BYTES.items())
    if format is None:
        fitting = [name for name, size in _BYTES.items() if a.shape[-1] % size == 0]
        if len(fitting) != 1:
            which = "whole blocks of both formats: say format=" if fitting else "no whole blocks of"
            raise ValueError(f"a row of blocks has {a.shape[-1]} bytes, {which} {sizes}")
        format = fitting[0]
    elif not isinstance(format, str) or format not in _BYTES:
        raise ValueError(f"format must be 'q8_0' or 'q4_0', not {format!r}")
    if a.shape[-1] % _BYTES[format]:
        raise ValueError(f"a row of blocks has {a.shape[-1]} bytes, no whole blocks of {_BYTES[format]} ({format})")
    count = a.shape[-1] // _BYTES[format]
    each = a.reshape(*a.shape[:-1], count, _BYTES[format])
    scales: NDArray[np.float16] = empty(each.shape[:-1], np.dtype(np.float16), "the scales")
    scales[...] = np.ascontiguousarray(each[..., :2]).view("<f2")[..., 0]
    numbers: NDArray[np.int8] = empty((*each.shape[:-1], _BLOCK), np.dtype(np.int8), "the numbers")
    if format == "q8_0":
        numbers[...] = each[..., 2:].view(np.int8)
    else:
        half = _BLOCK // 2
        np.bitwise_and(each[..., 2:], 15, out=numbers[..., :half].view(np.uint8))
        np.right_shift(each[..., 2:], 4, out=numbers[..., half:].view(np.uint8))
        numbers -= 8
    return numbers.reshape(*a.shape[:-1], count * _BLOCK), scales
