"""Gradients of attention. The docstrings are the specification; fastattn.reference says the same in float64 NumPy.

A function `f_vjp` (vector-Jacobian product) takes the gradient of a loss for what `f` returned, then the arguments of
`f`, and returns the gradients of the loss for the arrays named in `wrt`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattn import _gradients
from fastattn._merge import merge_attention_vjp as _merge_attention_vjp
from fastattn._rules import GradientRules, TruncatedGradientRules, VarlenGradientRules, refuse_others, takes
from fastattn.attention import (
    additive_attention,
    bilinear_attention,
    dot_product_attention,
    truncated_attention,
    varlen_attention,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from numpy.typing import ArrayLike, NDArray


@takes(GradientRules, like=dot_product_attention)
def dot_product_attention_vjp(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    wrt: str | tuple[str, ...] = ("query", "key", "value"),
    output: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    out: NDArray[Any] | tuple[NDArray[Any] | None, ...] | None = None,
    **rules: Unpack[GradientRules],
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Gradients of a loss for the arrays given to `dot_product_attention`, from its gradient for the output.

    The name is short for vector-Jacobian product. Memory grows with L + S, as on the way there.

    Parameters
    ----------
    grad_out : array_like, shape (..., L, E)
        The gradient of the loss for the output, exactly of its shape; float32, float64, float16 or bfloat16 (integers
        and bools become float64), with any strides: ``np.broadcast_to(1.0, shape)`` is the gradient of a sum.
    query, key, value : array_like
        As given to `dot_product_attention`.
    wrt : str or tuple of str, default ('query', 'key', 'value')
        The arrays whose gradients are wanted, by name; also 'bias', 'relative_bias', 'alibi_slopes' and 'sinks', if
        given. Only these are computed.
    output : array_like, shape (..., L, E), optional
    lse : array_like, shape (..., L), optional
        What the forward call with the same arguments returned; both or neither. Without them the forward pass is done
        again; the bits are the same. Only for softmax, as is `grad_lse`.
    grad_lse : array_like, shape (..., L), optional
        The gradient of the loss for the log-sum-exp, where the loss used it.
    out : ndarray, or tuple of ndarray or None, optional
        Receives the gradients: an array where `wrt` is one name, else as many as names. Each of the gradient's shape,
        and of its dtype or the accumulation dtype (float64 for float64, else float32); any strides; overwritten. Must
        not overlap an input or each other.
    is_causal, window_size, chunk_size, left_chunks, query_offset, key_lengths, query_lengths, mask, block_mask,
    block_size, bias, relative_bias, alibi_slopes, scale, softcap, sinks, activation, enable_gqa, num_threads
        As given to `dot_product_attention`.

    Returns
    -------
    gradients : tuple of ndarray, or ndarray
        In the order of `wrt`; where that is one name, the gradient alone. Each has the shape and dtype of its array
        (float64 for integers and bools), and is a sum where that was broadcast: over batch axes, over the heads that
        share a key, over the rows or keys of a bias.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.
    MemoryError
        If there is no memory for the result or the workspace.

    See Also
    --------
    fastattn.integrations : the same for PyTorch, JAX and autograd.

    Notes
    -----
    With weights ``P``, ``dP = grad_out @ value.T`` and ``delta = sum(grad_out * output, axis=-1)`` the gradient of a
    score is ``dS = P * (dP - delta)``, and those of query, key and value are ``scale * dS @ key``,
    ``scale * dS.T @ query`` and ``P.T @ grad_out`` [1]_. The weights are computed again from the log-sum-exp, block by
    block.

    What takes no part has gradient 0, whatever is stored there: rows and keys past their lengths, hidden keys, a bias
    of -inf, scores of -inf. A row that sees nothing gives nothing, even if `grad_out` is NaN. The derivative of ReLU at
    0 is 0. The gradient of `scale` is ``np.vdot(query, d_query) / scale``.

    The bits of a gradient do not depend on threads, strides, padding, `out`, `wrt` or whether `output` was given. A row
    of ``d_query`` depends on its own row and the keys that it sees, one of ``d_key`` and ``d_value`` on the queries
    that see it.

    References
    ----------
    .. [1] T. Dao et al., "FlashAttention", 2022, appendix B.2.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 8, 100, 64))
    >>> out, lse = fastattn.dot_product_attention(query, key, value, is_causal=True, return_lse=True)
    >>> grad_out = 2 * out / out.size  # of the loss np.mean(out**2)
    >>> d_query, d_key, d_value = fastattn.dot_product_attention_vjp(
    ...     grad_out, query, key, value, is_causal=True, output=out, lse=lse
    ... )
    >>> d_query.shape
    (8, 100, 64)

    A bias for each head and key, which all queries share:

    >>> bias = np.zeros((8, 1, 100))
    >>> fastattn.dot_product_attention_vjp(grad_out, query, key, value, bias=bias, wrt="bias").shape
    (8, 1, 100)
    """
    refuse_others(rules, GradientRules, "dot_product_attention_vjp")
    return _gradients.dot_product_attention_vjp(
        grad_out, query, key, value, output, lse, grad_lse, wrt, out, dict(rules)
    )


@takes(GradientRules, like=additive_attention)
def additive_attention_vjp(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    w_score: ArrayLike,
    *,
    w_query: ArrayLike | None = None,
    w_key: ArrayLike | None = None,
    b_hidden: ArrayLike | None = None,
    wrt: str | tuple[str, ...] = ("query", "key", "value"),
    output: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    out: NDArray[Any] | tuple[NDArray[Any] | None, ...] | None = None,
    **rules: Unpack[GradientRules],
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Gradients of a loss for the arrays given to `additive_attention`, from its gradient for the output.

    It never allocates an array of shape (L, S, hidden), nor (L, S).

    Parameters
    ----------
    grad_out : array_like, shape (..., L, E)
        The gradient of the loss for the output.
    query, key, value, w_score, w_query, w_key, b_hidden
        As given to `additive_attention`.
    wrt : str or tuple of str, default ('query', 'key', 'value')
        Also 'w_score', and 'w_query', 'w_key', 'b_hidden', 'bias', 'relative_bias', 'alibi_slopes' and 'sinks', if
        given.
    output, lse, grad_lse, out
        As for `dot_product_attention_vjp`.
    is_causal, window_size, chunk_size, left_chunks, query_offset, key_lengths, query_lengths, mask, block_mask,
    block_size, bias, relative_bias, alibi_slopes, scale, softcap, sinks, activation, enable_gqa, num_threads
        As given to `additive_attention`.

    Returns
    -------
    gradients : tuple of ndarray, or ndarray
        As from `dot_product_attention_vjp`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.
    MemoryError
        If there is no memory for the gradients, the projected arrays or the workspace.

    Notes
    -----
    With ``dS`` the gradient of a scaled score and ``t = tanh(q + k)`` of projected queries and keys, those of w_score,
    q and k are ``scale * sum(dS * t)``, over all queries and keys, and ``scale * sum(dS * w_score * (1 - t**2))``, over
    keys and over queries. As on the way there, no tanh costs an exponential.

    Those of w_query, b_hidden and query are ``query.T @ dq``, ``sum(dq)`` and ``dq @ w_query.T``: products of NumPy,
    always of 128 rows, blocks of which are added in float64. Nothing of a row without effect, be it NaN, reaches them.
    The promise that bits do not depend on threads and padding holds for these products as far as NumPy's BLAS keeps the
    order of their sums.

    The gradient of `scale` is ``np.vdot(w_score, d_w_score) / scale``.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> query = np.array([[0.5, -1.0]])
    >>> key = np.array([[3.0, 1.0], [-3.0, 1.0]])
    >>> value = np.array([[10.0], [20.0]])
    >>> d_query, d_w_score = fastattn.additive_attention_vjp(
    ...     [[1.0]], query, key, value, [2.0, 1.0], wrt=("query", "w_score")
    ... )
    >>> d_query.round(4)
    array([[0.0083, 0.    ]])
    >>> d_w_score.round(3)
    array([-0.361,  0.   ])
    """
    refuse_others(rules, GradientRules, "additive_attention_vjp")
    return _gradients.additive_attention_vjp(
        grad_out, query, key, value, w_score, w_query, w_key, b_hidden, output, lse, grad_lse, wrt, out, dict(rules)
    )


@takes(GradientRules, like=bilinear_attention)
def bilinear_attention_vjp(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike | None = None,
    *,
    b_query: ArrayLike | None = None,
    b_key: ArrayLike | None = None,
    wrt: str | tuple[str, ...] = ("query", "key", "value"),
    output: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    out: NDArray[Any] | tuple[NDArray[Any] | None, ...] | None = None,
    **rules: Unpack[GradientRules],
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Gradients of a loss for the arrays given to `bilinear_attention`, from its gradient for the output.

    Parameters
    ----------
    grad_out : array_like, shape (..., L, E)
        The gradient of the loss for the output.
    query, key, value, w_query, w_key, b_query, b_key
        As given to `bilinear_attention`. Without `w_key` the gradient of the shared matrix is the sum of both uses, and
        so is that of a shared `b_query`.
    wrt : str or tuple of str, default ('query', 'key', 'value')
        Also 'w_query', and 'w_key', 'b_query', 'b_key', 'bias', 'relative_bias', 'alibi_slopes' and 'sinks', if given.
    output, lse, grad_lse, out
        As for `dot_product_attention_vjp`.
    is_causal, window_size, chunk_size, left_chunks, query_offset, key_lengths, query_lengths, mask, block_mask,
    block_size, bias, relative_bias, alibi_slopes, scale, softcap, sinks, activation, enable_gqa, num_threads
        As given to `bilinear_attention`.

    Returns
    -------
    gradients : tuple of ndarray, or ndarray
        As from `dot_product_attention_vjp`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.
    MemoryError
        If there is no memory for the gradients, the projected arrays or the workspace.

    Notes
    -----
    The gradients of the projected arrays are those of dot products; for the way back through the projections, and what
    is promised of it, see `additive_attention_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x, value = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0], [2.0]])
    >>> w_query = np.array([[1.0], [0.5]])
    >>> fastattn.bilinear_attention_vjp(np.ones((2, 1)), x, x, value, w_query, wrt="w_query").round(3)
    array([[-0.476],
           [ 0.235]])
    """
    refuse_others(rules, GradientRules, "bilinear_attention_vjp")
    return _gradients.bilinear_attention_vjp(
        grad_out, query, key, value, w_query, w_key, b_query, b_key, output, lse, grad_lse, wrt, out, dict(rules)
    )


@takes(TruncatedGradientRules, like=truncated_attention)
def truncated_attention_vjp(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    left: int,
    right: int = 0,
    *,
    wrt: str | tuple[str, ...] = ("query", "key", "value"),
    output: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    out: NDArray[Any] | tuple[NDArray[Any] | None, ...] | None = None,
    **rules: Unpack[TruncatedGradientRules],
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Gradients of a loss for the arrays given to `truncated_attention`, from its gradient for the output.

    The cost grows with the length, not with its square.

    Parameters
    ----------
    grad_out : array_like, shape (..., L, E)
        The gradient of the loss for the output.
    query, key, value, left, right
        As given to `truncated_attention`.
    wrt, output, lse, grad_lse, out
        As for `dot_product_attention_vjp`.
    is_causal, query_offset, key_lengths, query_lengths, mask, block_mask, block_size, bias, relative_bias,
    alibi_slopes, scale, softcap, sinks, activation, enable_gqa, num_threads
        As given to `truncated_attention`.

    Returns
    -------
    gradients : tuple of ndarray, or ndarray
        As from `dot_product_attention_vjp`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x, value = np.zeros((4, 2)), np.arange(4.0)[:, None]
    >>> fastattn.truncated_attention_vjp(np.ones((4, 1)), x, x, value, 1, wrt="value").ravel()
    array([1.5, 1. , 1. , 0.5])
    """
    refuse_others(rules, TruncatedGradientRules, "truncated_attention_vjp")
    return _gradients.truncated_attention_vjp(
        grad_out, query, key, value, left, right, output, lse, grad_lse, wrt, out, dict(rules)
    )


@takes(VarlenGradientRules, like=varlen_attention)
def varlen_attention_vjp(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    wrt: str | tuple[str, ...] = ("query", "key", "value"),
    output: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    out: NDArray[Any] | tuple[NDArray[Any] | None, ...] | None = None,
    **rules: Unpack[VarlenGradientRules],
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Gradients of a loss for the arrays given to `varlen_attention`, from its gradient for the output.

    Parameters
    ----------
    grad_out : array_like, shape (..., total_q, E)
        The gradient of the loss for the output.
    query, key, value, cu_seqlens_q, cu_seqlens_k
        As given to `varlen_attention`.
    wrt : str or tuple of str, default ('query', 'key', 'value')
        Also 'alibi_slopes' and 'sinks', if given.
    output, lse, grad_lse, out
        As for `dot_product_attention_vjp`.
    is_causal, window_size, alibi_slopes, scale, softcap, sinks, activation, enable_gqa, num_threads
        As given to `varlen_attention`.

    Returns
    -------
    gradients : tuple of ndarray, or ndarray
        As from `dot_product_attention_vjp`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x, value = np.zeros((3, 2)), np.array([[1.0], [3.0], [10.0]])
    >>> fastattn.varlen_attention_vjp(np.ones((3, 1)), x, x, value, [0, 2, 3], wrt="value").ravel()
    array([1., 1., 1.])
    """
    refuse_others(rules, VarlenGradientRules, "varlen_attention_vjp")
    return _gradients.varlen_attention_vjp(
        grad_out, query, key, value, cu_seqlens_q, cu_seqlens_k, output, lse, grad_lse, wrt, out, dict(rules)
    )


def merge_attention_vjp(
    grad_out: ArrayLike,
    outs: Sequence[ArrayLike],
    lses: Sequence[ArrayLike],
    *,
    grad_lse: ArrayLike | None = None,
) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """
    Gradients of `merge_attention` for the outputs and log-sum-exps of its parts.

    Parameters
    ----------
    grad_out : array_like, shape (..., L, E)
        Gradient of a loss for the merged output; float32, float64, float16 or bfloat16, any strides. A loss that uses
        the log-sum-exp alone has ``np.broadcast_to(0.0, outs[0].shape)``.
    outs, lses : sequence of array_like
        As for `merge_attention`.
    grad_lse : array_like, shape (..., L), optional
        Gradient for the merged log-sum-exp, if the loss uses it.

    Returns
    -------
    grad_outs, grad_lses : list of ndarray
        One for each part, of its own shape and dtype (float64 for integers and bools).

    Raises
    ------
    ValueError, TypeError
        If the parts do not fit together, or a gradient does not fit them.

    See Also
    --------
    merge_attention

    Notes
    -----
    With the share ``s = exp(lse_part - lse)`` of a part, its output has the gradient ``s * grad_out`` and its
    log-sum-exp ``s * (sum(grad_out * (out_part - out)) + grad_lse)``. A part that does not count in a row (lse -inf, or
    +inf beside an output of zeros) gets exact zeros there, whatever is stored in it and in the gradients. Sums are
    float64 if the parts promote to that, else float32; each gradient is rounded once.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> outs, lses = [np.array([[1.0]]), np.array([[4.0]])], [np.log([1.0]), np.log([2.0])]
    >>> grad_outs, grad_lses = fastattn.merge_attention_vjp([[3.0]], outs, lses)
    >>> [float(g[0, 0].round(6)) for g in grad_outs], [float(g[0].round(6)) for g in grad_lses]
    ([1.0, 2.0], [-2.0, 2.0])
    """
    return _merge_attention_vjp(grad_out, outs, lses, grad_lse)
