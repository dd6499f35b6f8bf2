"""Attention of pixels to the pixels around them, and the way back. The docstrings are the specification.

fastattn.reference says the same in float64 NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattn import _neighborhood
from fastattn._rules import readable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray


@readable
def neighborhood_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    edge: str = "clamp",
    relative_bias: ArrayLike | None = None,
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
    Attention of each pixel of an image, a volume or a sequence to the pixels around it.

    Parameters
    ----------
    query : array_like, shape (..., *space, D)
    key : array_like, shape (..., *space, D)
    value : array_like, shape (..., *space, E)
        `space` is one, two or three axes, as many as `kernel_size` has entries, the same in all three arrays. float32,
        float64, float16 or bfloat16 (sums in float32); integers and bools become float64. They promote together as
        `numpy.result_type` says. Leading axes are batch axes and broadcast; the heads stand right before space. Any
        strides: pass ``(B, X, Y, H, D)`` memory as ``numpy.moveaxis(x, -2, 1)``, without a copy.
    kernel_size : int or sequence of int
        Pixels that a query sees along each axis; an int: one axis. The neighbourhood is the product over the axes.
    dilation : int or sequence of int, default 1
        A query sees pixels that are a multiple of so many apart from it: those of its residue class. An int: for all
        axes, as with all that follows. With edge='clamp', ``kernel_size * dilation`` must fit in each axis.
    stride : int or sequence of int, default 1
        So many queries side by side see the same pixels: those of the one in their middle, number ``stride // 2`` (the
        last where the axis is causal), or of the last pixel there is. At most `kernel_size`; equal to it, it is Swin's
        partition into windows [2]_.
    is_causal : bool or sequence of bool, default False
        Along such an axis a query sees its own pixel and ``kernel_size - 1`` before it, as far as there are any, and
        nothing after it.
    edge : {'clamp', 'truncate'}, default 'clamp'
        What a query near an edge sees, ``kernel_size=3`` (x: seen)::

                      clamp        truncate
            pixel 0   x x x . .    x x . . .
            pixel 1   x x x . .    x x x . .
            pixel 4   . . x x x    . . . x x

        'clamp' moves the kernel inwards, so that all queries see equally many (NATTEN [1]_); 'truncate' leaves out what
        lies outside, as a convolution with padding does. In general the kernel begins ``kernel_size // 2`` before the
        query. Causal axes are always truncated.
    relative_bias : array_like of floats, broadcasts to (..., 2 * k - 1, ...), optional
        A table of biases, one axis for each axis of space, ``(heads, 2 * k - 1, 2 * k - 1)`` one a head: entry
        ``(key - query) / dilation + k - 1`` along each axis is added to the score; -inf hides a key. (Swin's tables
        count query - key: reverse them along these axes.)
    scale : float, optional
        Factor of the scores; default ``1 / sqrt(D)``.
    softcap : float, optional
        Makes the scaled score ``softcap * tanh(score / softcap)``, before the bias.
    sinks : array_like, broadcasts over the batch axes, optional
        One extra logit a head, in the softmax's denominator only; neither scaled nor capped.
    activation : {'softmax', 'relu', 'sigmoid', 'sparsemax', 'entmax15'}, default 'softmax'
        'relu': weights are ``max(score, 0) / number of visible keys``; 'sigmoid': ``1 / (1 + exp(-score))``.
    enable_gqa : bool, default False
        Query may have g times the heads of key and value; query head h reads key head h // g.
    return_weights : bool, default False
        Also return the weights, in the order of the keys from the first of the kernel; 0 for those left out.
    return_lse : bool, default False
        Also return the log-sum-exp of each query's scores, natural logarithm, sink included.
    out : ndarray, shape (..., *space, E), optional
        Receives the output, of the output's dtype and with any strides; must not overlap an input.
    num_threads : int, optional
        Upper limit on threads. Default `get_num_threads`.

    Returns
    -------
    out : ndarray, shape (..., *space, E)
        Of the dtype to which query, key and value promote.
    weights : ndarray, shape (..., *space, *kernel_size)
        Only with `return_weights`; float64 for float64, else float32.
    lse : ndarray, shape (..., *space)
        Only with `return_lse`; float64 for float64, else float32.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.
    MemoryError
        If there is no memory for the result or the workspace.

    See Also
    --------
    neighborhood_attention_vjp : its gradients.
    truncated_attention : what this is in one dimension, for windows of any size; merge_attention : to add other keys.

    Notes
    -----
    What a query does not see, be it NaN or infinite, never reaches its output. Time grows with pixels times the size of
    the kernel, memory beyond inputs and outputs with the pixels. The bits of a row do not depend on threads, batch,
    strides or the other pixels.

    References
    ----------
    .. [1] A. Hassani et al., "Neighborhood attention transformer", 2023, equations 2 to 4; with dilation: A. Hassani
           and H. Shi, "Dilated neighborhood attention transformer", 2022.
    .. [2] Z. Liu et al., "Swin transformer", 2021.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> value = np.arange(5.0)[:, None]
    >>> query = np.zeros((5, 1))  # equal scores: means of the pixels seen
    >>> fastattn.neighborhood_attention(query, query, value, 3)[:, 0]
    array([1., 1., 2., 3., 3.])
    >>> fastattn.neighborhood_attention(query, query, value, 3, edge="truncate")[:, 0]
    array([0.5, 1. , 2. , 3. , 3.5])
    >>> image = np.random.default_rng(0).standard_normal((4, 56, 56, 32), dtype=np.float32)  # 4 heads
    >>> fastattn.neighborhood_attention(image, image, image, (7, 7)).shape
    (4, 56, 56, 32)
    """
    return _neighborhood.neighborhood_attention(
        query,
        key,
        value,
        kernel_size,
        dilation,
        stride,
        is_causal,
        edge,
        relative_bias,
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


@readable
def neighborhood_attention_vjp(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    edge: str = "clamp",
    relative_bias: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    activation: str = "softmax",
    enable_gqa: bool = False,
    wrt: str | tuple[str, ...] = ("query", "key", "value"),
    output: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    out: NDArray[Any] | Sequence[NDArray[Any] | None] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Gradients of `neighborhood_attention`: from that of a loss for its output to those for its arguments.

    Parameters
    ----------
    grad_out : array_like, shape (..., *space, E)
        Gradient of the loss for the output, whose shape it has. float32, float64, float16 or bfloat16; integers and
        bools become float64. Any strides: ``numpy.broadcast_to(1.0, out.shape)`` is the gradient of ``out.sum()``.
    query, key, value, kernel_size, dilation, stride, is_causal, edge, relative_bias
    scale, softcap, sinks, activation, enable_gqa
        As in the call of `neighborhood_attention`.
    wrt : str or tuple of str, default ("query", "key", "value")
        For which arguments gradients are wanted: 'query', 'key', 'value', and those given of 'relative_bias' and
        'sinks'. Only these are computed.
    output, lse : array_like, optional
        What ``neighborhood_attention(..., return_lse=True)`` returned: both or neither, and only for softmax. They are
        accepted as in the other functions, but save nothing here: a query's few weights are all made again at once.
    grad_lse : array_like, shape (..., *space), optional
        Gradient of the loss for the log-sum-exp, if the loss used it too. Only for softmax.
    out : ndarray, or tuple of ndarray or None, optional
        Receives the gradients, in the order of `wrt`. Each of the gradient's shape and of its dtype or the accumulation
        dtype (float64 for float64, else float32); any strides; must not overlap an input or another of them.
    num_threads : int, optional
        Upper limit on threads. Default `get_num_threads`.

    Returns
    -------
    ndarray, or tuple of ndarray
        The gradients in the order of `wrt`; of a single name (a string), the array itself. Each has the shape and dtype
        of its argument, float64 for integers and bools. Where an argument was broadcast, or shared by the heads of a
        group, its gradient is the sum.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.
    MemoryError
        If there is no memory for the result or the workspace.

    See Also
    --------
    neighborhood_attention : the function itself.

    Notes
    -----
    With ``p`` the weight of a pair, ``dp = grad_out . value`` of its query and value, and m the mean of dp by weight,
    the gradient of a score is ``p * (dp - m + grad_lse)`` for softmax, ``(dp - m) * (p > 0)`` for sparsemax and
    ``sqrt(p) * (dp - m)`` for entmax15 [2]_ (m: by the factor before the bracket), ``dp / number of visible keys`` of
    positive scores for relu (0 has derivative 0), ``p * (1 - p) * dp`` for the sigmoid; times ``1 - tanh(score /
    softcap) ** 2`` before the softcap. Queries and keys get sums of it, times the scale, values get sums of p *
    grad_out [1]_.

    A pair that does not take part (hidden, or of a score of -inf) gives exactly 0, whatever is stored there. Kernels,
    scale and softcap have no gradient. Memory beyond inputs and gradients grows with the pixels. No bit depends on the
    number of threads, on strides, on `out`, or on the other names in `wrt`; and a row of the gradient of query, key or
    value on the pixels that it sees, or that see it, alone.

    References
    ----------
    .. [1] T. Dao et al., "FlashAttention: fast and memory-efficient exact attention with IO-awareness", 2022, appendix
           B.2, for neighbourhoods.
    .. [2] B. Peters, V. Niculae and A. Martins, "Sparse sequence-to-sequence models", 2019, proposition 2.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> value = np.arange(5.0)[:, None]
    >>> query = np.zeros((5, 1))  # equal scores: each weight is a third
    >>> grad_out = np.ones((5, 1))  # of the sum of the output
    >>> 3 * fastattn.neighborhood_attention_vjp(grad_out, query, query, value, 3, wrt="value")[:, 0]
    array([2., 3., 5., 3., 2.])
    >>> image = np.random.default_rng(0).standard_normal((4, 56, 56, 32), dtype=np.float32)  # 4 heads
    >>> d_query, d_key, d_value = fastattn.neighborhood_attention_vjp(image, image, image, image, (7, 7))
    >>> d_key.shape
    (4, 56, 56, 32)
    """
    return _neighborhood.neighborhood_attention_vjp(
        grad_out,
        query,
        key,
        value,
        kernel_size,
        dilation,
        stride,
        is_causal,
        edge,
        relative_bias,
        scale,
        softcap,
        sinks,
        activation,
        enable_gqa,
        wrt,
        output,
        lse,
        grad_lse,
        out,
        num_threads,
    )
