"""Linear attention and its gradients. The docstrings are the specification; fastattn.reference says the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattn import _linear, _linear_gradients
from fastattn._rules import readable

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    Map = Callable[[NDArray[Any]], NDArray[Any]]


@readable
def linear_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    feature_map: str | Map | tuple[Map, Map] | None = "elu+1",
    is_causal: bool = False,
    query_offset: ArrayLike | None = None,
    key_lengths: ArrayLike | None = None,
    query_lengths: ArrayLike | None = None,
    log_decay: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    normalize: bool | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    state: ArrayLike | None = None,
    return_state: bool = False,
    state_out: NDArray[Any] | None = None,
    enable_gqa: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    """
    Linear attention, a recurrence over the keys on a state of fixed size; time and memory are linear in L + S.

    With ``f = feature_map``, a state M (F, E) and, if normalised, z (F,), each key j does, in order::

        M *= exp(log_decay_j)[:, None];  z *= exp(log_decay_j)        # with log_decay
        u = value_j                                                   # or, with beta, the delta rule:
        u = beta_j * (value_j - M.T @ f(key_j))
        M += outer(f(key_j), u);  z += f(key_j)

    and query i reads ``M.T @ f(query_i) / (f(query_i) @ z + eps)`` if normalised (0 where that denominator is 0), else
    ``scale * M.T @ f(query_i)``: with `is_causal` after the keys up to its own position, else after all keys.

    Parameters
    ----------
    query : array_like, shape (..., L, D)
    key : array_like, shape (..., S, D)
    value : array_like, shape (..., S, E)
        As in `dot_product_attention`: dtypes, promotion, broadcasting, any strides.
    feature_map : {'elu+1', 'relu', None}, callable, or pair of callables, default 'elu+1'
        'elu+1': x + 1 above 0, else exp(x) [1]_; None: the identity. A callable, or one for query and one for key, is
        called once for each with an array (..., n, D) of the accumulation dtype, read-only, and returns (..., n, F).
        An exception inside it comes out as it is.
    is_causal : bool, default False
        A query sees no key after its own position; before all keys it sees `state` alone.
    query_offset : int or array of int, optional
        Position of query 0 on the key axis, as in `dot_product_attention`: by default the last query lines up with the
        last valid key.
    key_lengths, query_lengths : int or array of int, optional
        Valid lengths, as in `dot_product_attention`. Query rows past the length give 0. Key lengths must not differ
        within a group of heads.
    log_decay : array_like, broadcasts to (..., S, F) over key's batch axes, optional
        Natural logarithm of the decay: (..., S, 1) is one for each key and head. -inf forgets all that came before,
        NaN too: packed sequences have it at each first key. Above 0 the state grows. Needs `is_causal`.
    beta : array_like, broadcasts to (..., S) over key's batch axes, optional
        Strength of the delta rule [2]_. Needs `is_causal`. Without either, with `log_decay`, `beta`, or both: the rules
        linear, gated, delta and gated delta [3]_ of ONNX LinearAttention (which has ``feature_map=None``).
    normalize : bool, optional
        Default: True, but False with ``feature_map=None`` or `beta`; True with beta is an error.
    scale : float, optional
        Factor of a result that is not normalised; default ``1 / sqrt(D)``.
    eps : float, default 1e-6
        At least 0; added to the denominator.
    state : array_like, optional
        What an earlier call with ``return_state=True`` gave; None: zeros. **One plain array** of the accumulation dtype
        (float64 for float64, else float32), shape (..., F, E) over the call's batch axes (with `enable_gqa`: key's
        heads), or (..., F, E + 1) if normalised, its last column z. `numpy.save`, slice, copy, reorder it as you like.
    return_state : bool, default False
        Also return the state after all valid keys.
    state_out : ndarray, optional
        Receives that state; its shape and dtype. May be the array given as `state`: then a step allocates nothing of
        its size. Must not otherwise overlap anything.
    enable_gqa : bool, default False
        Query may have g times the heads (axis -3) of key and value; query head h reads key head h // g.
    out : ndarray, shape (..., L, E), optional
        Receives the output, of the output's dtype and with any strides; must not overlap an input.
    num_threads : int, optional
        Upper limit on threads. Default `get_num_threads`.

    Returns
    -------
    out : ndarray, shape (..., L, E)
        Of the dtype to which query, key and value promote.
    state : ndarray, shape (..., F, E) or (..., F, E + 1)
        Only with `return_state`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` and `state_out` are untouched.
    MemoryError
        If there is no memory for the result or the workspace.

    See Also
    --------
    linear_attention_vjp : its gradients.
    dot_product_attention : with the softmax; it has windows, masks and biases, of which there is no linear form.

    Notes
    -----
    Causal results are the same bits however the keys are cut: a call that ends after any key and one that goes on with
    its state give what a single call gives, down to single steps. The bits depend neither on threads, batch, padding
    nor strides. NaN in key or value j reaches only rows that see j, and the state.

    All numbers are kept in the accumulation dtype, and each key is added to what is there: the error of a long sum
    without decay grows with the number of keys, as that of the recurrence does.

    A long call that is interrupted (Ctrl-C) leaves `state_out` as it was.

    ALiBi has a linear form: a constant ``log_decay = -slope``.

    References
    ----------
    .. [1] A. Katharopoulos et al., "Transformers are RNNs", 2020, equations 16 to 20.
    .. [2] I. Schlag, K. Irie and J. Schmidhuber, "Linear transformers are secretly fast weight programmers", 2021,
           section 4.2.
    .. [3] S. Yang, J. Kautz and A. Hatamizadeh, "Gated delta networks", 2024, equation 10.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 8, 100, 16))
    >>> whole = fastattn.linear_attention(query, key, value, is_causal=True)

    The same as a stream, key by key, on one array that is updated in place:

    >>> state = np.zeros((8, 16, 17))  # heads, features, channels of value and the normaliser
    >>> for t in range(100):
    ...     now = (slice(None), slice(t, t + 1))
    ...     token = query[now], key[now], value[now]
    ...     out = fastattn.linear_attention(*token, is_causal=True, state=state, state_out=state)
    >>> np.array_equal(out[:, 0], whole[:, -1])
    True
    """
    return _linear.linear_attention(
        query,
        key,
        value,
        feature_map,
        is_causal,
        query_offset,
        key_lengths,
        query_lengths,
        log_decay,
        beta,
        normalize,
        scale,
        eps,
        state,
        return_state,
        state_out,
        enable_gqa,
        out,
        num_threads,
    )


@readable
def linear_attention_vjp(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    wrt: str | tuple[str, ...] = ("query", "key", "value"),
    grad_state: ArrayLike | None = None,
    feature_map: str | None = "elu+1",
    is_causal: bool = False,
    query_offset: ArrayLike | None = None,
    key_lengths: ArrayLike | None = None,
    query_lengths: ArrayLike | None = None,
    log_decay: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    normalize: bool | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    state: ArrayLike | None = None,
    enable_gqa: bool = False,
    out: NDArray[Any] | tuple[NDArray[Any] | None, ...] | None = None,
    num_threads: int | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Gradients of linear attention: from that of a loss for its output to those for its arguments.

    Time and memory are linear in L + S, as those of `linear_attention`: the way back is a recurrence, too. With G the
    gradient of the state M, from the last key to the first, and g_i that of what query i reads::

        G += outer(f(query_i), g_i)                                   # of each query that reads after key j
        d_value_j = G.T @ f(key_j);  d_key_j = f'(key_j) * (G @ u)    # with beta: d_u, and both less what u predicts
        G *= exp(log_decay_j)[:, None]

    Parameters
    ----------
    grad_out : array_like, shape (..., L, E)
        Gradient of the loss for the output, of exactly its shape.
    query, key, value : array_like
        As in `linear_attention`.
    wrt : str or tuple of str, default ('query', 'key', 'value')
        The arguments whose gradients are wanted: 'query', 'key', 'value', and 'log_decay', 'beta' and 'state' if given.
        Nothing else is computed.
    grad_state : array_like, optional
        Gradient for the state that the call returned, if the loss depends on it, of its shape: what is 'state' to the
        segment after this one (see the example).
    feature_map : {'elu+1', 'relu', None}, default 'elu+1'
        A callable is refused: apply it to query and key before the call, with ``feature_map=None`` (and
        ``normalize=True``), and multiply their gradients by its derivative. ReLU's at 0 is 0.
    is_causal, query_offset, key_lengths, query_lengths, log_decay, beta, normalize, scale, eps, state, enable_gqa
        As in `linear_attention`.
    out : ndarray or tuple of ndarray or None, optional
        Receives the gradients: an array, or as many as there are names in `wrt`. Each has the shape of its argument,
        and its dtype or that of sums; any strides. Must not overlap an input or another of them.
    num_threads : int, optional
        Upper limit on threads. Default `get_num_threads`.

    Returns
    -------
    gradients : ndarray, or tuple of ndarray
        In the order of `wrt`; the array alone if `wrt` is a name. Each of the shape and dtype of its argument (float64
        for integers), summed over the axes along which that was broadcast.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.
    MemoryError
        If there is no memory for the results or the workspace.

    See Also
    --------
    linear_attention : the function itself.

    Notes
    -----
    Rows and keys past their lengths, and rows that see neither a key nor a state, have a gradient of exactly 0 and give
    nothing to others, whatever is stored there. A key or value that a query does not see never reaches its gradient. A
    row whose denominator is 0 gives nothing. What is forgotten by a `log_decay` of -inf has no gradient, and neither
    has that -inf.

    The bits depend neither on threads, batch, padding nor strides, nor on the other names in `wrt`. Each number is a
    sum of its terms one by one, as in the forward recurrence: without decay its error grows with their number.

    Memory: features of query and key, as many numbers for their gradients, and the gradients of values, of as many
    heads at a time as there are threads; for `log_decay` a state every 48 keys or more, no larger than these.

    By the delta rule keys must not be longer than they were on the way forward: a recurrence that explodes has
    gradients that explode as well.

    References
    ----------
    .. [1] A. Katharopoulos et al., "Transformers are RNNs", 2020, supplementary A: the causal gradients.
    .. [2] S. Yang et al., "Gated linear attention transformers with hardware-efficient training", 2023, appendix C: the
           gradient of decays as a running sum.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> query, key, value, grad_out = np.random.default_rng(0).standard_normal((4, 8, 100, 16))
    >>> whole = fastattn.linear_attention_vjp(grad_out, query, key, value, is_causal=True)

    The same in two segments: the second one's gradient for its state goes back into the first.

    >>> first, second = (slice(None), slice(60)), (slice(None), slice(60, None))
    >>> rule = {"is_causal": True}
    >>> _, state = fastattn.linear_attention(query[first], key[first], value[first], **rule, return_state=True)
    >>> d_query2, d_key2, d_value2, d_state = fastattn.linear_attention_vjp(
    ...     grad_out[second], query[second], key[second], value[second], **rule, state=state,
    ...     wrt=("query", "key", "value", "state"))
    >>> d_query1, d_key1, d_value1 = fastattn.linear_attention_vjp(
    ...     grad_out[first], query[first], key[first], value[first], **rule, grad_state=d_state)
    >>> np.allclose(np.concatenate([d_key1, d_key2], axis=1), whole[1])
    True
    """
    return _linear_gradients.linear_attention_vjp(
        grad_out,
        query,
        key,
        value,
        wrt,
        grad_state,
        feature_map,
        is_causal,
        query_offset,
        key_lengths,
        query_lengths,
        log_decay,
        beta,
        normalize,
        scale,
        eps,
        state,
        enable_gqa,
        out,
        num_threads,
    )
