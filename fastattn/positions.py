"""Positions of tokens: added encodings, rotations, slopes and buckets. fastattn.reference is the same in NumPy.

A learned table of absolute positions needs no function; it is an array that is added: ``x + table[: x.shape[-2]]``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn import _positions
from fastattn._checks import empty, integer, real, storage_dtype
from fastattn._frequencies import scaled_frequencies

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, DTypeLike, NDArray

_FARTHEST = 1 << 53  # float64 represents all integers up to here


def _integer(x: Any, name: str, least: int, most: int = _FARTHEST) -> int:
    return integer(x, name, f"an integer from {least} to {most}", least, most)


def sinusoidal_encoding(
    length: int,
    dim: int,
    *,
    base: float = 10000.0,
    layout: str = "interleaved",
    offset: int = 0,
    dtype: DTypeLike = np.float64,
) -> NDArray[Any]:
    """
    Sines and cosines of the position, to be added to the embeddings of tokens.

    Pair i of channels turns by ``base ** (-2 * i / dim)`` radians per position (Vaswani et al. 2017, "Attention is all
    you need", section 3.5).

    Parameters
    ----------
    length : int
        Number of positions L, at least 0.
    dim : int
        Number of channels, at least 0. If it is odd, the last cosine is omitted.
    base : float, default 10000
        Positive. The slowest pair takes a little less than ``2 * pi * base`` positions for a full turn.
    layout : {"interleaved", "split"}
        "interleaved", as in the paper: sines in channels 0, 2, 4, ..., cosines in channels 1, 3, 5, ...; "split", as in
        tensor2tensor: all sines, then all cosines. The angles are the same.
    offset : int, default 0
        Position of row 0; may be negative.
    dtype : dtype_like, default float64
        float64, float32, float16 or ml_dtypes.bfloat16; computed in float64 and rounded once.

    Returns
    -------
    ndarray, shape (length, dim)

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it.

    See Also
    --------
    apply_rotary

    Notes
    -----
    tensor2tensor's own function spaces its angles a little differently, with ``dim / 2 - 1`` where the paper has
    ``dim / 2``.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn.positions import sinusoidal_encoding
    >>> sinusoidal_encoding(3, 4).round(4)
    array([[ 0.    ,  1.    ,  0.    ,  1.    ],
           [ 0.8415,  0.5403,  0.01  ,  1.    ],
           [ 0.9093, -0.4161,  0.02  ,  0.9998]])
    >>> sinusoidal_encoding(3, 4, layout="split").round(4)
    array([[ 0.    ,  0.    ,  1.    ,  1.    ],
           [ 0.8415,  0.01  ,  0.5403,  1.    ],
           [ 0.9093,  0.02  , -0.4161,  0.9998]])

    Both this and a learned table are added to embeddings (..., L, dim):

    >>> embeddings = np.ones((2, 3, 4))
    >>> (embeddings + sinusoidal_encoding(3, 4)).shape
    (2, 3, 4)
    >>> learned = np.zeros((512, 4))
    >>> (embeddings + learned[:3]).shape
    (2, 3, 4)
    """
    length, dim = _integer(length, "length", 0), _integer(dim, "dim", 0)
    base, offset = real(base, "base", "a positive finite number", True), _integer(offset, "offset", -_FARTHEST)
    if not isinstance(layout, str) or layout not in ("interleaved", "split"):
        raise ValueError(f"layout must be 'interleaved' or 'split', not {layout!r}")
    table = empty((length, dim), storage_dtype(dtype), "a table")
    sines = (dim + 1) // 2
    speed = np.array([base ** (-2 * i / dim) for i in range(sines)])
    with np.errstate(all="ignore"):
        angle = np.arange(offset, offset + length, dtype=np.float64)[:, None] * speed
        if layout == "interleaved":
            table[:, 0::2], table[:, 1::2] = np.sin(angle), np.cos(angle[:, : dim // 2])
        else:
            table[:, :sines], table[:, sines:] = np.sin(angle), np.cos(angle[:, : dim // 2])
    return table


def apply_rotary(
    x: ArrayLike,
    *,
    offset: int | ArrayLike = 0,
    positions: ArrayLike | None = None,
    base: float = 10000.0,
    frequencies: ArrayLike | None = None,
    attention_factor: float = 1.0,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    inverse: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """
    Rotate pairs of channels by their position, so that dot products depend on distances (rotary encoding, RoPE).

    Pair i of a row at position p is rotated by the angle ``p * frequencies[i]``, by default ``p * base ** (-2 * i /
    rotary_dim)``: (a, b) becomes ``(a * cos - b * sin, b * cos + a * sin)`` (Su et al. 2021, "RoFormer", equation 34),
    times `attention_factor`. Queries and keys are rotated, values are not.

    Parameters
    ----------
    x : array_like, shape (..., L, D)
        float32, float64, float16 or bfloat16; integers and bools become float64. Any strides.
    offset : int or array_like of int, default 0
        Position of row 0; row i has position ``offset + i``. May be negative. An array has exactly as many axes as x
        has batch axes, each of its size or 1: for x (B, H, L, D) and one offset per sequence, ``offset[:, None]``.
    positions : array_like of int, optional
        Instead of an offset, the position of each row, in any order, as for packed sequences and trees: broadcasts to
        (..., L), x's shape without its last axis. For x (B, H, L, D) and positions (B, L), which are the same for all
        heads, ``positions[:, None]``. From -2**53 to 2**53.
    base : float, default 10000
        Positive.
    frequencies : array_like, shape (rotary_dim / 2,), optional
        Instead of a base, the angle of each pair in radians per position, as returned by `rotary_frequencies`; finite.
    attention_factor : float, default 1
        Positive. Both channels of a rotated pair are multiplied by it; channels that are not rotated are not.
    interleaved : bool, default False
        False: channel i is paired with channel ``i + rotary_dim / 2`` (GPT-NeoX, and LLaMA as in Hugging Face); True:
        channel 2 i with channel 2 i + 1 (RoFormer, GPT-J, and LLaMA as published).
    rotary_dim : int, optional
        Only the first `rotary_dim` channels are rotated, the others are copied; even, at most D. Default D.
    inverse : bool, default False
        Rotate back: by the opposite angles, ``(a * cos + b * sin, b * cos - a * sin)``, times `attention_factor` as
        well. That is the transpose: it turns the gradient of a loss for the result into that for `x`. For a factor of
        1 it is also the inverse, and otherwise that times ``attention_factor ** 2``.
    out : ndarray, optional
        Receives the result; shape and dtype of the result. May be `x` itself, but must not overlap it otherwise.
    num_threads : int, optional
        Upper limit on threads. Default `get_num_threads`.

    Returns
    -------
    ndarray
        x's shape and dtype (float64 for integers and bools).

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; `out` is untouched then.

    See Also
    --------
    rotary_frequencies : the frequencies of models whose context was extended.
    sinusoidal_encoding

    Notes
    -----
    Angles are computed in float64, so that those of large positions are right; cosines and sines are then rounded to
    float32, or float64 for float64, in which the rotation is done. The tables of the last few calls are cached, at most
    16 MiB in all; no bit of a result depends on that.

    A frequency of 0 leaves the finite numbers of a pair unchanged. So for models with several positions (time, height
    and width of an image patch, M-RoPE) make one call for each, with the frequencies of the pairs of the others set to
    0.

    Examples
    --------
    One radian per position, for the only pair of channels:

    >>> import numpy as np
    >>> from fastattn.positions import apply_rotary
    >>> apply_rotary([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]).round(4)
    array([[ 1.    ,  0.    ],
           [ 0.5403,  0.8415],
           [-0.4161,  0.9093]])

    Only the distance between two positions matters:

    >>> rng = np.random.default_rng(0)
    >>> query, key = rng.normal(size=(2, 1, 8))
    >>> near = apply_rotary(query, offset=7) @ apply_rotary(key, offset=4).T
    >>> far = apply_rotary(query, offset=107) @ apply_rotary(key, offset=104).T
    >>> bool(np.isclose(near, far)[0, 0])
    True

    In place, for a batch of 2 sequences with 4 heads, the second of which continues at position 12:

    >>> x = rng.normal(size=(2, 4, 3, 8)).astype(np.float32)
    >>> apply_rotary(x, offset=[[0], [12]], out=x) is x
    True

    Back again, which is also how a gradient goes:

    >>> turned = apply_rotary(query, offset=7)
    >>> bool(np.allclose(apply_rotary(turned, offset=7, inverse=True), query))
    True

    Two sequences of 3 and 2 tokens, packed:

    >>> x = rng.normal(size=(4, 5, 8))
    >>> packed = apply_rotary(x, positions=[0, 1, 2, 0, 1])
    >>> bool((packed[:, 3:] == apply_rotary(x[:, 3:])).all())
    True

    Four pairs: the first is rotated by time, 7, 7, ..., the others by height, 0, 1, ...:

    >>> frequencies = 10000.0 ** (-np.arange(4) / 4)
    >>> of_time = np.array([True, False, False, False])
    >>> turned = apply_rotary(x, positions=7, frequencies=np.where(of_time, frequencies, 0))
    >>> turned = apply_rotary(turned, positions=np.arange(5), frequencies=np.where(of_time, 0, frequencies))
    """
    return _positions.apply_rotary(
        x, offset, positions, base, frequencies, attention_factor, interleaved, rotary_dim, inverse, out, num_threads
    )


def rotary_frequencies(
    dim: int,
    *,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    length: int | None = None,
    max_positions: int | None = None,
) -> tuple[NDArray[np.float64], float]:
    """
    Frequencies of rotary encoding, including those of models whose context was extended.

    Without `scaling` frequency i is ``base ** (-2 * i / dim)`` radians per position; with it, what Hugging Face's
    Transformers computes from the same dict.

    Parameters
    ----------
    dim : int
        Channels of a head, even. A ``partial_rotary_factor`` in the dict says what fraction of them is rotated.
    base : float, default 10000
        Positive. A ``rope_theta`` in the dict takes precedence.
    scaling : mapping, optional
        The dict that model files call ``rope_scaling`` or ``rope_parameters``. Its ``rope_type`` (in older files
        ``type``) is one of

        - ``"default"``: no scaling;
        - ``"linear"``: all frequencies divided by ``factor``;
        - ``"dynamic"``: beyond the original length, a larger base that grows with `length`; needs ``factor``;
        - ``"llama3"``: slow pairs divided by ``factor``, fast ones unchanged, a smooth transition between; also needs
          ``low_freq_factor`` and ``high_freq_factor``;
        - ``"yarn"`` [1]_: similar, with another transition and an attention factor; needs ``factor``, may have
          ``attention_factor``, ``beta_fast``, ``beta_slow``, ``mscale``, ``mscale_all_dim`` and ``truncate``;
        - ``"longrope"`` (``"su"``) [2]_: each frequency divided by its own number, of ``long_factor`` where `length` is
          greater than the original length, else of ``short_factor``; may have ``factor`` and ``attention_factor``.

        The original length, that of the context in pretraining, is ``original_max_position_embeddings``.
    length : int, optional
        Tokens of the sequence, the greatest position plus 1. Needed for "dynamic"; without it "longrope" uses the short
        factors; the others do not depend on it.
    max_positions : int, optional
        The model's ``max_position_embeddings``. Used as the original length if the dict does not give that; divided by
        the original length it is the ``factor`` that the dict of "yarn" or "longrope" may lack.

    Returns
    -------
    frequencies : ndarray of float64, shape (rotary_dim / 2,)
        rotary_dim is `dim`, or the part of it that is rotated.
    attention_factor : float
        1 except for "yarn" and "longrope".

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above, a key is missing, or a type or a key is unknown; the message names it.

    See Also
    --------
    apply_rotary

    Notes
    -----
    The frequencies of "dynamic" and "longrope" are for one length. Keys rotated with those of another length do not
    match: when a cached sequence grows past the original length, its keys would have to be rotated again.

    References
    ----------
    .. [1] B. Peng et al., "YaRN: Efficient context window extension of large language models", 2023, section 3.
    .. [2] Y. Ding et al., "LongRoPE: Extending LLM context window beyond 2 million tokens", 2024, section 3.

    Examples
    --------
    >>> from fastattn.positions import rotary_frequencies
    >>> rotary_frequencies(8)
    (array([1.   , 0.1  , 0.01 , 0.001]), 1.0)
    >>> llama = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    ...          "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    >>> frequencies, attention_factor = rotary_frequencies(128, scaling=llama)
    >>> (frequencies / rotary_frequencies(128, base=500000.0)[0])[[0, 28, 30, 33, 35, 63]].round(4)
    array([1.    , 1.    , 0.6437, 0.2714, 0.125 , 0.125 ])

    They can be passed straight to `apply_rotary`:

    >>> import numpy as np
    >>> from fastattn.positions import apply_rotary
    >>> query = np.ones((3, 128))
    >>> apply_rotary(query, frequencies=frequencies, attention_factor=attention_factor).shape
    (3, 128)
    """
    return scaled_frequencies(dim, base, scaling, "scaling", length, max_positions)


def alibi_slopes(num_heads: int) -> NDArray[np.float64]:
    """
    Slopes of ALiBi, one per head, for ``alibi_slopes=`` of the attention functions.

    For a power of two H the slope of head h = 0, 1, ... is ``2 ** (-8 * (h + 1) / H)``. For other numbers: the slopes
    of the largest power of two below, then every other slope of twice that power, starting with the first (Press, Smith
    and Lewis 2022, "Train short, test long", section 3, and the authors' code).

    Parameters
    ----------
    num_heads : int
        At least 1.

    Returns
    -------
    ndarray of float64, shape (num_heads,)

    Raises
    ------
    ValueError, TypeError
        If `num_heads` is not an integer of at least 1.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> from fastattn.positions import alibi_slopes
    >>> 1 / alibi_slopes(8)
    array([  2.,   4.,   8.,  16.,  32.,  64., 128., 256.])
    >>> alibi_slopes(3)
    array([0.0625    , 0.00390625, 0.25      ])
    >>> query, key, value = np.random.default_rng(0).normal(size=(3, 8, 10, 16))
    >>> fastattn.dot_product_attention(query, key, value, is_causal=True, alibi_slopes=alibi_slopes(8)).shape
    (8, 10, 16)
    """
    count = _integer(num_heads, "num_heads", 1, 1 << 30)
    whole = 1 << count.bit_length() - 1
    slopes = 2.0 ** (-8.0 * np.arange(1, whole + 1) / whole)
    if whole == count:
        return slopes
    others = 2.0 ** (-4.0 * np.arange(1, 2 * (count - whole), 2) / whole)
    return np.concatenate([slopes, others])


def relative_position_buckets(
    query_length: int,
    key_length: int,
    *,
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
    query_offset: int | None = None,
) -> NDArray[np.int64]:
    """
    Buckets of the distance from query to key, which a learned table turns into a bias (T5).

    Half of the buckets hold one distance each, from 0 on; the others hold distances up to `max_distance` in ranges
    whose size grows in proportion, and the last one all beyond (Raffel et al. 2020, "Exploring the limits of transfer
    learning with a unified text-to-text transformer", section 2.1).

    Parameters
    ----------
    query_length, key_length : int
        Numbers of queries L and of keys S, at least 0.
    num_buckets : int, default 32
        Rows of the table; at least 4, or 2 if `bidirectional` is False.
    max_distance : int, default 128
        Larger than the number of distances that have a bucket of their own: a quarter of `num_buckets`, or half of it
        if `bidirectional` is False.
    bidirectional : bool, default True
        True (encoders): keys after the query's position use the second half of the buckets. False (decoders): they are
        in bucket 0.
    query_offset : int, optional
        Position of query 0 on the key axis. Default: the last query lines up with the last key, ``S - L``.

    Returns
    -------
    ndarray of int64, shape (L, S)
        Numbers from 0 to ``num_buckets - 1``, the same as in T5 and Hugging Face.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> from fastattn.positions import relative_position_buckets
    >>> relative_position_buckets(3, 3)
    array([[ 0, 17, 18],
           [ 1,  0, 17],
           [ 2,  1,  0]])

    A learned table has a row for each bucket and a column for each head:

    >>> rng = np.random.default_rng(0)
    >>> table = rng.normal(size=(32, 4))
    >>> query, key, value = rng.normal(size=(3, 4, 20, 8))
    >>> bias = np.moveaxis(table[relative_position_buckets(20, 20)], -1, 0)
    >>> bias.shape
    (4, 20, 20)
    >>> out = fastattn.dot_product_attention(query, key, value, bias=bias, scale=1.0)

    With a window the buckets of the distances in it suffice, and no L x S array is needed: those of one query, with
    `left` keys before it and `right` after.

    >>> left, right = 15, 4
    >>> buckets = relative_position_buckets(1, left + right + 1, query_offset=left)
    >>> relative_bias = np.moveaxis(table[buckets], -1, 0)
    >>> relative_bias.shape
    (4, 1, 20)
    >>> near = fastattn.dot_product_attention(
    ...     query, key, value, window_size=(left, right), relative_bias=relative_bias, scale=1.0
    ... )
    >>> same = fastattn.dot_product_attention(query, key, value, window_size=(left, right), bias=bias, scale=1.0)
    >>> np.allclose(near, same)
    True
    """
    rows, cols = _integer(query_length, "query_length", 0), _integer(key_length, "key_length", 0)
    if not isinstance(bidirectional, (bool, np.bool_)):
        raise TypeError(f"bidirectional must be True or False, not {bidirectional!r}")
    buckets = _integer(num_buckets, "num_buckets", 4 if bidirectional else 2, 1 << 30)
    side = buckets // 2 if bidirectional else buckets
    exact = side // 2
    most = _integer(max_distance, "max_distance", exact + 1)
    first = cols - rows if query_offset is None else _integer(query_offset, "query_offset", -_FARTHEST)
    result = empty((rows, cols), np.int64, "buckets")
    # One bucket for each distance, key position - query position, starting with that of the last query and the first
    # key.
    distance = np.arange(rows + cols) - (first + rows - 1)
    size = abs(distance) if bidirectional else np.maximum(-distance, 0)
    # In float32, as in T5: rounding decides at the edges of buckets.
    share = np.log(np.maximum(size, exact) / np.float32(exact), dtype=np.float32) / np.float32(math.log(most / exact))
    large = np.minimum(exact + (share * np.float32(side - exact)).astype(np.int64), side - 1)
    bucket = np.where(size < exact, size, large)
    if bidirectional:
        bucket += side * (distance > 0)
    for i in range(rows):
        result[i] = bucket[rows - 1 - i : rows - 1 - i + cols]
    return result
