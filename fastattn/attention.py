"""Attention. The docstrings are the specification; fastattn.reference says the same in float64 NumPy.

This module is compiled by Cython: rebuild after a change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cython.cimports.fastattn._attention import attend
from cython.cimports.fastattn._call import checked_sides, read_dot_product, read_varlen
from cython.cimports.fastattn._rules import rules
from cython.cimports.fastattn._scores import prepare_additive, read_additive, read_bilinear

from fastattn._checks import names_missing_arguments
from fastattn._merge import merge_attention as _merge_attention
from fastattn._rules import readable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from fastattn._scores import PreparedKeys


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    is_causal: bool = False,
    window_size: int | tuple[int | None, int | None] | None = None,
    chunk_size: int | None = None,
    left_chunks: int | None = None,
    query_offset: ArrayLike | None = None,
    key_lengths: ArrayLike | None = None,
    query_lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    block_mask: ArrayLike | None = None,
    block_size: int | tuple[int, int] = 64,
    bias: ArrayLike | None = None,
    relative_bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    activation: str = "softmax",
    enable_gqa: bool = False,
    key_scale: ArrayLike | None = None,
    value_scale: ArrayLike | None = None,
    key_center: ArrayLike | None = None,
    return_weights: bool | str = False,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Dot-product attention, ``softmax(scale * query @ key.T) @ value``, without the matrix of scores in memory.

    Parameters
    ----------
    query : array_like, shape (..., L, D)
    key : array_like, shape (..., S, D)
    value : array_like, shape (..., S, E)
        float32, float64, float16 or bfloat16 (sums in float32); integers and bools become float64. They promote
        together as `numpy.result_type` says, and each is read as it is: a float32 query over a float16 cache makes no
        copy of it. int8 key and value with `key_scale` and `value_scale`. Leading axes are batch axes and broadcast;
        by convention axis -3 is the head axis. Any strides: pass ``(B, S, H, D)`` memory as ``x.swapaxes(1, 2)``,
        without a copy.
    is_causal : bool, default False
        A query sees no key after its own position.
    window_size : int or (int, int), optional
        ``(left, right)``: a query sees the keys from its position - left to its position + right, both inclusive. None
        or -1 on a side: unbounded. An int w: ``(w, w)``.
    chunk_size, left_chunks : int, optional
        The key axis is split into chunks of `chunk_size`, and a query sees all of the chunk that its position is in and
        of the `left_chunks` chunks before it (None or -1: all of them), as in streaming speech recognition.
    query_offset : int or array of int, optional
        Position of query 0 on the key axis; may be negative. Default: the last query lines up with the last valid key,
        as with a cache; 0 lines up the first ones. With 2 queries and 4 keys, causal (x: seen)::

            default (2)    query_offset=0
              x x x .        x . . .
              x x x x        x x . .

    key_lengths, query_lengths : int or array of int, optional
        Valid lengths, for padded batches. Keys past the length are hidden, query rows past it see nothing. An array has
        exactly as many axes as there are batch axes, each of the same size or 1: ``lengths[:, None]`` for batch axes
        (B, H).
    mask : array_like of bool, broadcasts to (..., L, S), optional
        **True means attend.**
    block_mask : array_like of bool, broadcasts to (..., ceil(L / rows), ceil(S / columns)), optional
        **True means attend**, for a whole block of `rows` queries and `columns` keys, counted from row 0 and column 0
        of the arrays, whatever the offset. Blocks that are False are skipped: time follows the number of True ones.
    block_size : int or (int, int), default 64
        ``(rows, columns)`` of a block of `block_mask`; an int n: ``(n, n)``.
    bias : array_like of floats, broadcasts to (..., L, S), optional
        Added to the score; -inf hides a key.
    relative_bias : array_like of floats, broadcasts to (..., L, left + right + 1), optional
        Added to the scores of the keys in the window of `window_size`, which must be bounded on both sides (with
        `is_causal` right counts as 0): entry w of a row belongs to the key at the query's position - left + w.
        ``(heads, 1, left + right + 1)`` is a bias by distance (T5); one that depends on the query too (Shaw,
        Transformer-XL) needs no (L, S) array either. -inf hides a key.
    alibi_slopes : array_like, broadcasts over the batch axes, optional
        Adds ``-slope * abs(query position - key position)``; ``(H,)`` is one slope per query head [2]_.
    scale : float, optional
        Factor of the scores; default ``1 / sqrt(D)``.
    softcap : float, optional
        Makes the scaled score ``softcap * tanh(score / softcap)``, before ALiBi and bias.
    sinks : array_like, broadcasts over the batch axes, optional
        One extra logit per query head, in the softmax's denominator only; neither scaled nor capped.
    activation : {'softmax', 'relu', 'sigmoid', 'sparsemax', 'entmax15'}, default 'softmax'
        'relu': weights are ``max(score, 0) / number of visible keys``; 'sigmoid': ``1 / (1 + exp(-score))``.
        'sparsemax' and 'entmax15': as `sparsemax` and `entmax15` of the visible scores; most weights are exactly 0, and
        values of weight 0 are not looked at, be they NaN. These keep a row of scores, S numbers, for each row of a
        tile. Only softmax has `sinks` and `return_lse`.
    enable_gqa : bool, default False
        Query may have g times the heads (axis -3) of key and value; query head h reads key head h // g.
    key_scale, value_scale : float or array_like, optional
        For int8 key and value (with a query of float32, float16 or bfloat16, whose dtype the output has): the numbers
        that they are multiples of, ``key * key_scale`` and ``value * value_scale``, as `quantize_kv` makes them. Of
        shape (..., S, 1), one for each token and head; (..., 1, D) or (D,), one for each channel; one number; or
        (..., S, n), one for each of n blocks of D / n channels (for values: E). Batch axes broadcast to those of key
        and value. float32, float16 or bfloat16.
    key_center : array_like, shape (..., 1, D) or (D,), optional
        For int8 keys: what was subtracted from them before they were rounded; the keys are
        ``key * key_scale + key_center``. Finite.
    return_weights : bool or 'band', default False
        Also return the weights, (..., L, S). They take the memory that this function otherwise avoids. 'band': only
        those in the window of `window_size`, (..., L, left + right + 1), placed as in `relative_bias`; 0 where the
        window reaches past the keys.
    return_lse : bool, default False
        Also return the log-sum-exp of each row's scores, (..., L), natural logarithm, sink included.
    out : ndarray, shape (..., L, E), optional
        Receives the output, of the output's dtype and with any strides; must not overlap an input.
    num_threads : int, optional
        Upper limit on threads. Default `get_num_threads`.

    Returns
    -------
    out : ndarray, shape (..., L, E)
        Of the dtype to which query, key and value promote.
    weights : ndarray, shape (..., L, S) or (..., L, left + right + 1)
        Only with `return_weights`; float64 for float64, else float32.
    lse : ndarray, shape (..., L)
        Only with `return_lse`; float64 for float64, else float32.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.
    MemoryError
        If there is no memory for the result or the workspace.

    See Also
    --------
    dot_product_attention_vjp : its gradients.
    MultiHeadAttention : with projections, as a layer.

    Notes
    -----
    A 0-d array is accepted wherever a number is.

    All rules combine; a key counts only if every given rule allows it. What a query does not see, even NaN or infinity,
    never reaches its output. A row that sees no key, or only scores of -inf, gives output 0, weights 0 and log-sum-exp
    -inf (the sink, if there is one). Bounds (causal, window, lengths) cost no memory, and keys outside them are
    skipped. Memory beyond inputs and outputs does not grow with L * S [1]_. The bits of a row do not depend on threads,
    batch, padding, strides or the other rows.

    With 16-bit arrays scores and softmax are float32's, and the result is rounded once. Where all three arrays are
    bfloat16 and the CPU multiplies these faster than floats (``cpu_info()["kernels"]["bfloat16"]`` then ends in
    ``avx512_amx`` or ``avx512_bf16``), weights are rounded to bfloat16 for the weighted sum: half a unit of bfloat16,
    times the largest value, more. Log-sum-exps and returned weights keep the accuracy of float32.

    References
    ----------
    .. [1] M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018; T. Dao et al.,
           "FlashAttention", 2022; A. Vaswani et al., "Attention is all you need", 2017, equation 1.
    .. [2] O. Press, N. A. Smith and M. Lewis, "Train short, test long", 2022.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> query = np.array([[1.0, 0.0]])
    >>> key = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> value = np.array([[10.0], [20.0], [30.0]])
    >>> fastattn.dot_product_attention(query, key, value, key_lengths=2)
    array([[15.]])
    >>> out, weights = fastattn.dot_product_attention(query, key, value, scale=100.0, return_weights=True)
    >>> weights.round(3)
    array([[0.5, 0.5, 0. ]])
    """
    return attend(
        read_dot_product(
            query,
            key,
            value,
            rules(
                is_causal=is_causal,
                window_size=window_size,
                chunk_size=chunk_size,
                left_chunks=left_chunks,
                query_offset=query_offset,
                key_lengths=key_lengths,
                query_lengths=query_lengths,
                mask=mask,
                block_mask=block_mask,
                block_size=block_size,
                bias=bias,
                relative_bias=relative_bias,
                alibi_slopes=alibi_slopes,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
                activation=activation,
                enable_gqa=enable_gqa,
                return_weights=return_weights,
                return_lse=return_lse,
                out=out,
                num_threads=num_threads,
            ),
            None,
            None,
            (key_scale, value_scale, key_center),
        )
    )


def additive_attention(
    query: ArrayLike,
    key: ArrayLike | PreparedKeys,
    value: ArrayLike,
    w_score: ArrayLike,
    *,
    w_query: ArrayLike | None = None,
    w_key: ArrayLike | None = None,
    b_hidden: ArrayLike | None = None,
    is_causal: bool = False,
    window_size: int | tuple[int | None, int | None] | None = None,
    chunk_size: int | None = None,
    left_chunks: int | None = None,
    query_offset: ArrayLike | None = None,
    key_lengths: ArrayLike | None = None,
    query_lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    block_mask: ArrayLike | None = None,
    block_size: int | tuple[int, int] = 64,
    bias: ArrayLike | None = None,
    relative_bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    activation: str = "softmax",
    enable_gqa: bool = False,
    return_weights: bool | str = False,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Additive (Bahdanau) attention: the score is ``w_score . tanh(query @ w_query + key @ w_key + b_hidden)``.

    It never allocates an array of shape (L, S, hidden), nor (L, S), and costs two to four times as much as dot
    products.

    Parameters
    ----------
    query : array_like, shape (..., L, D_query)
    key : array_like, shape (..., S, D_key)
    value : array_like, shape (..., S, E)
        As for `dot_product_attention`, but query and key may differ in their last axis. What `prepare_additive_keys`
        returned for a key may take its place; `w_key` is then part of it.
    w_score : array_like, shape (hidden,)
        Weight of each hidden unit in the score. Promotes together with query, key, value and the matrices.
    w_query : array_like, shape (D_query, hidden), optional
    w_key : array_like, shape (D_key, hidden), optional
        Projections. One that is omitted is the identity: that last axis must then be `hidden`. Without both this is the
        form of Keras' ``AdditiveAttention``.
    b_hidden : array_like, shape (hidden,), optional
        Added before the tanh; converted to the accumulation dtype.
    is_causal, window_size, chunk_size, left_chunks, query_offset, key_lengths, query_lengths, mask, block_mask,
    block_size
        As for `dot_product_attention`: which keys a query sees.
    bias, relative_bias, alibi_slopes
        As for `dot_product_attention`: what is added to the scores.
    softcap, sinks, activation
        As for `dot_product_attention`: from scores to weights.
    scale : float, default 1
        Factor of the scores.
    enable_gqa, return_weights, return_lse, out, num_threads
        As for `dot_product_attention`.

    Returns
    -------
    out : ndarray, shape (..., L, E)
        Of the dtype to which the arrays promote.
    weights : ndarray, shape (..., L, S) or (..., L, left + right + 1)
        Only with `return_weights`; float64 for float64, else float32.
    lse : ndarray, shape (..., L)
        Only with `return_lse`; float64 for float64, else float32. Of the complete scores.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.
    MemoryError
        If there is no memory for the result, the projected arrays or the workspace.

    See Also
    --------
    prepare_additive_keys : for keys that many calls look at.
    additive_attention_vjp : its gradients.

    Notes
    -----
    The tanh costs no exponential per pair of query and key: ``tanh(a + b) = 1 - 2 / (1 + exp(2 a) exp(2 b))``, with the
    exponentials computed once per query and once per key, and one division per four hidden units. Arguments too large
    for that (43 in float32, 350 in float64) use a plain tanh, which is several times slower. The error of a score is at
    most ``eps * (hidden + 8) * sum(abs(w_score))``, plus that of the projections.

    The projections are those of `Linear`: from query and key on, the bits of a row do not depend on the batch, threads
    and padding, but for projections of at most 8 rows, counted over all axes but the last, which use other loops.

    References
    ----------
    .. [1] D. Bahdanau, K. Cho and Y. Bengio, "Neural machine translation by jointly learning to align and translate",
           2015, section A.1.2.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> query = np.array([[0.5, -1.0]])
    >>> key = np.array([[3.0, 1.0], [-3.0, 1.0]])
    >>> value = np.array([[10.0], [20.0]])
    >>> out, weights = fastattn.additive_attention(query, key, value, [2.0, 1.0], return_weights=True)
    >>> weights.round(3)
    array([[0.981, 0.019]])
    >>> out.round(2)
    array([[10.19]])

    With projections from 2 and 3 channels to 4 hidden units:

    >>> rng = np.random.default_rng(0)
    >>> w_query, w_key, w_score = rng.normal(size=(2, 4)), rng.normal(size=(3, 4)), rng.normal(size=4)
    >>> fastattn.additive_attention(query, np.eye(3), np.eye(3), w_score, w_query=w_query, w_key=w_key).shape
    (1, 3)
    """
    return attend(
        read_additive(
            query,
            key,
            value,
            w_score,
            w_query,
            w_key,
            b_hidden,
            rules(
                is_causal=is_causal,
                window_size=window_size,
                chunk_size=chunk_size,
                left_chunks=left_chunks,
                query_offset=query_offset,
                key_lengths=key_lengths,
                query_lengths=query_lengths,
                mask=mask,
                block_mask=block_mask,
                block_size=block_size,
                bias=bias,
                relative_bias=relative_bias,
                alibi_slopes=alibi_slopes,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
                activation=activation,
                enable_gqa=enable_gqa,
                return_weights=return_weights,
                return_lse=return_lse,
                out=out,
                num_threads=num_threads,
            ),
        )
    )


def prepare_additive_keys(
    key: ArrayLike,
    w_key: ArrayLike | None = None,
    *,
    num_threads: int | None = None,
) -> PreparedKeys:
    """
    Keys of `additive_attention`, projected and with their exponentials, for calls that look at them again and again.

    A decoder with one query at a step (Bahdanau, Cho and Bengio, 2015) looks at the same annotations at every step, and
    would project them, and compute an exponential of each number, at each.

    Parameters
    ----------
    key : array_like, shape (..., S, D_key)
        float32, float64, float16 or bfloat16; integers and bools become float64.
    w_key : array_like, shape (D_key, hidden), optional
        Projection; without it D_key is `hidden`.
    num_threads : int, optional
        Upper limit on threads. Default `get_num_threads`.

    Returns
    -------
    PreparedKeys
        To be passed to `additive_attention` as `key`. It has ``key`` (the projected keys, read-only), ``shape``,
        ``dtype`` and ``nbytes``, about twice the memory of the projected keys, and can be pickled.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it.
    MemoryError
        If there is no memory for it.

    See Also
    --------
    additive_attention

    Notes
    -----
    Results have the bits of a call with `key` and `w_key` themselves.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> annotations, w_key, w_query, w_score = (rng.normal(size=s) for s in ((7, 6), (6, 4), (5, 4), 4))
    >>> prepared = fastattn.prepare_additive_keys(annotations, w_key)
    >>> prepared
    <PreparedKeys: (7, 4), float64>
    >>> state = rng.normal(size=(1, 5))
    >>> context = fastattn.additive_attention(state, prepared, annotations, w_score, w_query=w_query)
    >>> context.shape
    (1, 6)
    """
    return prepare_additive(key, w_key, num_threads)


def bilinear_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike | None = None,
    *,
    b_query: ArrayLike | None = None,
    b_key: ArrayLike | None = None,
    is_causal: bool = False,
    window_size: int | tuple[int | None, int | None] | None = None,
    chunk_size: int | None = None,
    left_chunks: int | None = None,
    query_offset: ArrayLike | None = None,
    key_lengths: ArrayLike | None = None,
    query_lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    block_mask: ArrayLike | None = None,
    block_size: int | tuple[int, int] = 64,
    bias: ArrayLike | None = None,
    relative_bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    activation: str = "softmax",
    enable_gqa: bool = False,
    return_weights: bool | str = False,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Attention with a bilinear score, ``(query @ w_query + b_query) . (key @ w_key + b_key)``.

    Luong's "general" score ``query @ W . key`` is ``w_query=W, w_key=np.eye(D_key)``, or, without that product,
    ``dot_product_attention(query @ W, key, value, scale=1)``.

    Parameters
    ----------
    query : array_like, shape (..., L, D_query)
    key : array_like, shape (..., S, D_key)
    value : array_like, shape (..., S, E)
        As for `dot_product_attention`, but query and key may differ in their last axis.
    w_query : array_like, shape (D_query, n)
    w_key : array_like, shape (D_key, n), optional
        Projections; they promote together with query, key and value. Without `w_key` the keys share `w_query`.
    b_query, b_key : array_like, shape (n,), optional
        Added to the projections; converted to the accumulation dtype. Without `w_key`, and unless `b_key` is given, the
        keys share `b_query`.
    is_causal, window_size, chunk_size, left_chunks, query_offset, key_lengths, query_lengths, mask, block_mask,
    block_size
        As for `dot_product_attention`: which keys a query sees.
    bias, relative_bias, alibi_slopes
        As for `dot_product_attention`: what is added to the scores.
    softcap, sinks, activation
        As for `dot_product_attention`: from scores to weights.
    scale : float, default 1
        Factor of the scores.
    enable_gqa, return_weights, return_lse, out, num_threads
        As for `dot_product_attention`.

    Returns
    -------
    out : ndarray, shape (..., L, E)
        Of the dtype to which the arrays promote.
    weights : ndarray, shape (..., L, S) or (..., L, left + right + 1)
        Only with `return_weights`; float64 for float64, else float32.
    lse : ndarray, shape (..., L)
        Only with `return_lse`; float64 for float64, else float32. Of the complete scores.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.
    MemoryError
        If there is no memory for the result, the projected arrays or the workspace.

    See Also
    --------
    bilinear_attention_vjp : its gradients.

    Notes
    -----
    The projections are those of `Linear`: from query and key on, the bits of a row do not depend on the batch, threads
    and padding, but for projections of at most 8 rows, counted over all axes but the last, which use other loops.

    References
    ----------
    .. [1] M.-T. Luong, H. Pham and C. D. Manning, "Effective approaches to attention-based neural machine translation",
           2015, equation 8.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> query, key = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0, 5.0], [0.0, -1.0, 5.0]])
    >>> value = np.array([[10.0], [20.0]])
    >>> w_query, w_key = np.array([[2.0], [0.0]]), np.array([[0.0], [1.0], [0.0]])
    >>> out, weights = fastattn.bilinear_attention(query, key, value, w_query, w_key, return_weights=True)
    >>> weights.round(3)
    array([[0.982, 0.018]])
    """
    return attend(
        read_bilinear(
            query,
            key,
            value,
            w_query,
            w_key,
            b_query,
            b_key,
            rules(
                is_causal=is_causal,
                window_size=window_size,
                chunk_size=chunk_size,
                left_chunks=left_chunks,
                query_offset=query_offset,
                key_lengths=key_lengths,
                query_lengths=query_lengths,
                mask=mask,
                block_mask=block_mask,
                block_size=block_size,
                bias=bias,
                relative_bias=relative_bias,
                alibi_slopes=alibi_slopes,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
                activation=activation,
                enable_gqa=enable_gqa,
                return_weights=return_weights,
                return_lse=return_lse,
                out=out,
                num_threads=num_threads,
            ),
        )
    )


def truncated_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    left: int,
    right: int = 0,
    *,
    is_causal: bool = False,
    query_offset: ArrayLike | None = None,
    key_lengths: ArrayLike | None = None,
    query_lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    block_mask: ArrayLike | None = None,
    block_size: int | tuple[int, int] = 64,
    bias: ArrayLike | None = None,
    relative_bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    activation: str = "softmax",
    enable_gqa: bool = False,
    key_scale: ArrayLike | None = None,
    value_scale: ArrayLike | None = None,
    key_center: ArrayLike | None = None,
    return_weights: bool | str = False,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Dot-product attention in which a query sees only `left` keys before its position and `right` after it.

    The cost grows with the length, not with its square: keys outside the window are never read.

    Parameters
    ----------
    query : array_like, shape (..., L, D)
    key : array_like, shape (..., S, D)
    value : array_like, shape (..., S, E)
        As for `dot_product_attention`.
    left, right : int
        Keys seen before and after the query's position, besides the one at it; None or -1: all of them.
    relative_bias : array_like of floats, broadcasts to (..., L, left + right + 1), optional
        Added to the scores of the window, entry w to that of the key at the query's position - left + w.
    return_weights : bool or 'band', default False
        Also return the weights, (..., L, S), or, with 'band', only those of the window, (..., L, left + right + 1).
    is_causal, query_offset, key_lengths, query_lengths, mask, block_mask, block_size, bias, alibi_slopes, scale,
    softcap, sinks, activation
        As for `dot_product_attention`.
    enable_gqa, key_scale, value_scale, key_center, return_lse, out, num_threads
        As for `dot_product_attention`.

    Returns
    -------
    out : ndarray, shape (..., L, E)
    weights : ndarray, shape (..., L, S) or (..., L, left + right + 1)
        Only with `return_weights`.
    lse : ndarray, shape (..., L)
        Only with `return_lse`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.

    See Also
    --------
    truncated_attention_vjp : its gradients.

    References
    ----------
    .. [1] D. Povey et al., "A time-restricted self-attention layer for ASR", 2018.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x, value = np.zeros((4, 2)), np.arange(4.0)[:, None]
    >>> out, weights = fastattn.truncated_attention(x, x, value, 1, 1, return_weights="band")
    >>> out.ravel()
    array([0.5, 1. , 2. , 2.5])
    >>> weights.round(2)
    array([[0.  , 0.5 , 0.5 ],
           [0.33, 0.33, 0.33],
           [0.33, 0.33, 0.33],
           [0.5 , 0.5 , 0.  ]])
    """
    window_size = checked_sides(left, right)  # kept alive here: rules() borrows references
    return attend(
        read_dot_product(
            query,
            key,
            value,
            rules(
                is_causal=is_causal,
                window_size=window_size,
                chunk_size=None,
                left_chunks=None,
                query_offset=query_offset,
                key_lengths=key_lengths,
                query_lengths=query_lengths,
                mask=mask,
                block_mask=block_mask,
                block_size=block_size,
                bias=bias,
                relative_bias=relative_bias,
                alibi_slopes=alibi_slopes,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
                activation=activation,
                enable_gqa=enable_gqa,
                return_weights=return_weights,
                return_lse=return_lse,
                out=out,
                num_threads=num_threads,
            ),
            None,
            None,
            (key_scale, value_scale, key_center),
        )
    )


def varlen_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    is_causal: bool = False,
    window_size: int | tuple[int | None, int | None] | None = None,
    alibi_slopes: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    activation: str = "softmax",
    enable_gqa: bool = False,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Dot-product attention within each of several sequences that are packed, without padding, on one axis.

    Parameters
    ----------
    query : array_like, shape (..., total_q, D)
    key : array_like, shape (..., total_k, D)
    value : array_like, shape (..., total_k, E)
        As for `dot_product_attention`; axis -3, if there is one, is the head axis.
    cu_seqlens_q : array_like of int, shape (sequences + 1,)
        ``[0, n1, n1 + n2, ..., total_q]``: where each sequence's queries begin and end.
    cu_seqlens_k : array_like of int, shape (sequences + 1,), optional
        The same for keys and values; default `cu_seqlens_q`.
    is_causal, window_size, alibi_slopes, scale, softcap, sinks, activation, enable_gqa, return_lse, out, num_threads
        As for `dot_product_attention`. Positions count within each sequence, and the last query of a sequence lines up
        with its last key.

    Returns
    -------
    out : ndarray, shape (..., total_q, E)
    lse : ndarray, shape (..., total_q)
        Only with `return_lse`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.

    See Also
    --------
    varlen_attention_vjp : its gradients.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> value = np.array([[1.0], [3.0], [10.0]])
    >>> fastattn.varlen_attention(np.zeros((3, 2)), np.zeros((3, 2)), value, [0, 2, 3])
    array([[ 2.],
           [ 2.],
           [10.]])
    """
    return attend(
        read_varlen(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            rules(
                is_causal=is_causal,
                window_size=window_size,
                chunk_size=None,
                left_chunks=None,
                query_offset=None,
                key_lengths=None,
                query_lengths=None,
                mask=None,
                block_mask=None,
                block_size=64,
                bias=None,
                relative_bias=None,
                alibi_slopes=alibi_slopes,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
                activation=activation,
                enable_gqa=enable_gqa,
                return_weights=False,
                return_lse=return_lse,
                out=out,
                num_threads=num_threads,
            ),
        )
    )


def merge_attention(
    outs: Sequence[ArrayLike],
    lses: Sequence[ArrayLike],
) -> tuple[NDArray[Any], NDArray[Any]]:
    """
    Merge attention over parts of the key axis into attention over all of it, exactly.

    Parameters
    ----------
    outs : sequence of array_like, each of shape (..., L, E)
        Outputs for disjoint parts of the keys, from the same queries.
    lses : sequence of array_like, each of shape (..., L)
        Their log-sum-exps. A part with -inf saw no key and does not count; nor does one with +inf whose output is
        all 0, which is how FlashAttention marks a part without keys.

    Returns
    -------
    out : ndarray, shape (..., L, E)
        Of the dtype to which the parts promote.
    lse : ndarray, shape (..., L)
        float64 for float64, else float32.

    Raises
    ------
    ValueError, TypeError
        If the parts do not fit together.

    See Also
    --------
    merge_attention_vjp : its gradients.

    Notes
    -----
    ``lse = log(sum(exp(lse_part)))`` and ``out = sum(exp(lse_part - lse) * out_part)``. A sink must go
    into one part only.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> query, key, value = np.ones((1, 4)), np.ones((6, 4)), np.arange(6.0)[:, None]
    >>> halves = slice(2), slice(2, 6)
    >>> parts = [fastattn.dot_product_attention(query, key[i], value[i], return_lse=True) for i in halves]
    >>> out, lse = fastattn.merge_attention(*zip(*parts))
    >>> bool(np.allclose(out, fastattn.dot_product_attention(query, key, value)))
    True
    """
    return _merge_attention(outs, lses)


for _function in (
    dot_product_attention,
    additive_attention,
    prepare_additive_keys,
    bilinear_attention,
    truncated_attention,
    varlen_attention,
    merge_attention,
):
    names_missing_arguments(readable(_function))
