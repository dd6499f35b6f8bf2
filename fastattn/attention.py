"""Attention. The docstrings are the specification; fastattn.reference says the same in float64 NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattn._attention import dot_product_attention as _dot_product_attention
from fastattn._attention import varlen_attention as _varlen_attention
from fastattn._softmax import merge_attention as _merge_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    is_causal: bool = False,
    window_size: int | tuple[int | None, int | None] | None = None,
    query_offset: ArrayLike | None = None,
    key_lengths: ArrayLike | None = None,
    query_lengths: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    activation: str = "softmax",
    enable_gqa: bool = False,
    return_weights: bool = False,
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
        together as `numpy.result_type` says. Leading axes are batch axes and broadcast; by convention axis -3 is the
        head axis. Any strides: pass ``(B, S, H, D)`` memory as ``x.swapaxes(1, 2)``, without a copy.
    is_causal : bool, default False
        A query sees no key behind its own position.
    window_size : int or (int, int), optional
        ``(left, right)``: a query sees the keys from its position - left to its position + right, both inclusive. None
        or -1 on a side: unbounded. An int w: ``(w, w)``.
    query_offset : int or array of int, optional
        Position of query 0 on the key axis; may be negative. Default: the last query lines up with the last valid key,
        as with a cache; 0 lines up the first ones. With 2 queries and 4 keys, causal (x: seen)::

            default (2)    query_offset=0
              x x x .        x . . .
              x x x x        x x . .

    key_lengths, query_lengths : int or array of int, optional
        Valid lengths, for padded batches. Keys past the length are unseen, query rows past it see nothing. An array has
        exactly as many axes as there are batch axes, each of their size or 1: ``lengths[:, None]`` for batch axes
        (B, H).
    mask : array_like of bool, broadcasts to (..., L, S), optional
        **True means attend.**
    bias : array_like of floats, broadcasts to (..., L, S), optional
        Added to the score; -inf hides a key.
    alibi_slopes : array_like, broadcasts over the batch axes, optional
        Adds ``-slope * abs(query position - key position)``; ``(H,)`` is one slope a query head [2]_.
    scale : float, optional
        Factor of the scores; default ``1 / sqrt(D)``.
    softcap : float, optional
        Makes the scaled score ``softcap * tanh(score / softcap)``, before ALiBi and bias.
    sinks : array_like, broadcasts over the batch axes, optional
        One extra logit a query head, in the softmax's denominator only; neither scaled nor capped.
    activation : {'softmax', 'relu', 'sigmoid'}, default 'softmax'
        'relu': weights are ``max(score, 0) / number of visible keys``; 'sigmoid': ``1 / (1 + exp(-score))``.
    enable_gqa : bool, default False
        Query may have g times the heads (axis -3) of key and value; query head h reads key head h // g.
    return_weights : bool, default False
        Also return the weights, (..., L, S). They take the memory that this function otherwise avoids.
    return_lse : bool, default False
        Also return the log-sum-exp of each row's scores, (..., L), natural logarithm, sink included.
    out : ndarray, shape (..., L, E), optional
        Receives the output, of the output's dtype and with any strides; must not overlap an input.
    num_threads : int, optional
        At most so many threads; default `get_num_threads`.

    Returns
    -------
    out : ndarray, shape (..., L, E)
        Of the dtype to which query, key and value promote.
    weights : ndarray, shape (..., L, S)
        Only with `return_weights`; float64 for float64, else float32.
    lse : ndarray, shape (..., L)
        Only with `return_lse`; float64 for float64, else float32.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.
    MemoryError
        If there is no memory for the result or the workspace.

    Notes
    -----
    All rules combine; a key counts only where every rule given allows it. What a query does not see, be it NaN or
    infinite, never reaches its output. A row that sees no key, or only scores of -inf, gives output 0, weights 0 and
    log-sum-exp -inf (the sink, if there is one). Bounds (causal, window, lengths) cost no memory, and what lies outside
    them is skipped. Memory beyond inputs and outputs does not grow with L * S [1]_. The bits of a row do not depend on
    threads, batch, padding, strides or the other rows.

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
    return _dot_product_attention(
        query,
        key,
        value,
        is_causal,
        window_size,
        query_offset,
        key_lengths,
        query_lengths,
        mask,
        bias,
        alibi_slopes,
        scale,
        softcap,
        sinks,
        activation,
        enable_gqa,
        return_weights,
        return_lse,
        out,
        num_threads,
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
    Dot-product attention within each of several sequences that lie packed, without padding, on one axis.

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
    return _varlen_attention(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        is_causal,
        window_size,
        alibi_slopes,
        scale,
        softcap,
        sinks,
        activation,
        enable_gqa,
        return_lse,
        out,
        num_threads,
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
        Their log-sum-exps. A part with -inf saw no key and does not count.

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
