"""Attention with its projections: from tokens to queries, keys and values, and from the heads back to tokens."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from fastattn import _configuration, _weights
from fastattn._attention import dot_product_attention as attend
from fastattn._attention import varlen_attention as attend_packed
from fastattn._call import check, starts
from fastattn._checks import (
    as_array,
    checked_out,
    common_dtype,
    empty,
    floating,
    integer,
    integer_array,
    is_one_number,
    of_mask,
    real,
)
from fastattn._context import ProjectedContext
from fastattn._layers import Matrix, dense
from fastattn._positions import checked_frequencies
from fastattn._rules import (
    HELD,
    HELD_RULES,
    LayerGradientRules,
    LayerOptions,
    LayerRules,
    refuse_others,
    takes,
)
from fastattn._step import Scratch, look, step
from fastattn._vjp import read_gradient, read_names, read_wanted, store
from fastattn.attention import dot_product_attention
from fastattn.cache import KVCache
from fastattn.gradients import dot_product_attention_vjp
from fastattn.layers import rms_norm
from fastattn.positions import apply_rotary
from fastattn.projections import (
    FLOAT64,
    Products,
    Stored,
    Weights,
    accumulation_of,
    outer_sum,
    project,
    rounded,
    rows_of,
    sum_of_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike
    from typing import Self, Unpack

    from numpy.typing import ArrayLike, NDArray

    from fastattn._rules import GradientRules, Rules

    State = Mapping[str, Any] | str | PathLike[str]

# What is added to scores or to their softmax, and has a gradient; for a layer only where it is named.
ADDED = "bias", "relative_bias", "alibi_slopes", "sinks"
QUERY_KEY_VALUE = "query", "key", "value"
# Where arrays of rules have an axis for the heads.
OF_HEADS = {"mask": -3, "block_mask": -3, "bias": -3, "relative_bias": -3, "alibi_slopes": -1, "sinks": -1}
# What a call with packed sequences does not take, and what to do instead.
NOT_PACKED = {
    "mask": "columns of packed sequences are not theirs; pad them (fastattn.unpack)",
    "block_mask": "columns of packed sequences are not theirs; pad them (fastattn.unpack)",
    "bias": "columns of packed sequences are not theirs; pad them (fastattn.unpack), or give a relative_bias",
    "key_lengths": "cu_seqlens says how long the sequences are",
    "query_lengths": "cu_seqlens says how long the sequences are",
    "query_offset": "the last row of a sequence lines up with the last that it may see",
    "return_weights": "rows of different sequences have different numbers of weights; pad them (fastattn.unpack)",
}
NORMS = {"query": "q_norm", "key": "k_norm"}


# Checks


def _matrix(w: Any, name: str, rows: int | None, why: str) -> NDArray[Any]:
    a = floating(w, name)
    if a.ndim != 2 or (rows is not None and a.shape[0] != rows):
        raise ValueError(f"{name} has shape {a.shape}; it must be ({'channels' if rows is None else rows}, n){why}")
    return a


def _split(columns: int, name: str, heads: int, of: str) -> int:
    """Columns of a head."""
    if columns % heads:
        raise ValueError(f"{name} has {columns} columns, which {of}={heads} does not divide")
    return columns // heads


def _vector(b: Any, name: str, size: int, of: str) -> NDArray[np.float64]:
    """A bias, zeros where there is none."""
    if b is None:
        return np.zeros(size)
    a = floating(b, name)
    if a.shape != (size,):
        raise ValueError(f"{name} has shape {a.shape}; it must be ({size},), one for each column of {of}")
    return a.astype(FLOAT64)


def _tokens(x: Any, name: str, axes: str, weight: str, rows: int) -> NDArray[Any]:
    a = floating(x, name)
    if a.ndim < 2 or a.shape[-1] != rows:
        text = f"{name} has shape {a.shape}; it must be (..., {axes}, {rows}): {weight} has {rows} rows"
        if a.ndim > 2 and a.shape[-2] * a.shape[-1] == rows:
            text += f". Heads stand side by side here, {name}.reshape({', '.join(map(str, a.shape[:-2]))}, {rows})"
        raise ValueError(text)
    return a


def _heads(x: Any, name: str) -> int:
    return integer(x, name, "an integer of at least 1", 1)


def _heads_of_weights(x: Any, num_heads: int) -> NDArray[np.int64] | None:
    """The heads that return_weights names; None where it is a flag, or wrong in another way."""
    if not isinstance(x, (list, tuple, range)) and not (isinstance(x, np.ndarray) and x.ndim):
        return None
    allowed = f"True, False, 'band', or a sequence of heads, integers from {-num_heads} to {num_heads - 1}"
    a = integer_array(x, "return_weights", allowed)
    if a.ndim != 1:
        raise ValueError(f"return_weights has shape {a.shape}; it must be {allowed}")
    wrong = np.flatnonzero((a < -num_heads) | (a >= num_heads))
    if wrong.size:
        raise ValueError(f"return_weights must be {allowed}, not {a[wrong[0]]}")
    return np.where(a < 0, a + num_heads, a).astype(np.int64)


def _per_sequence(x: Any, name: str, batch: tuple[int, ...], most: int | None = None) -> Any:
    """Check lengths (0 to most) or offsets of sequences; arrays get one more axis, for the heads."""
    if x is None:
        return None
    allowed = f"an integer or an integer array with {len(batch)} axes, one for each batch axis of x"
    if is_one_number(x):
        n = integer(x, name, allowed)
        if most is not None and not 0 <= n <= most:
            raise ValueError(f"{name} must lie between 0 and {most}, not {n}")
        return n
    a = integer_array(x, name, allowed)
    if a.ndim != len(batch) or any(have not in (1, want) for have, want in zip(a.shape, batch, strict=True)):
        raise ValueError(
            f"{name} has shape {a.shape}; allowed is {allowed}, each of its size or 1: the batch axes are {batch}. "
            f"The heads have no axis here{of_mask(name, a.shape, batch, most, False)}"
        )
    if most is not None and a.size and not (0 <= a.min() and a.max() <= most):
        raise ValueError(f"{name} must lie between 0 and {most}, not {a.min() if a.min() < 0 else a.max()}")
    return a[..., None]


def _check_out(
    out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: dict[str, Any], rules: LayerRules
) -> None:
    """Check that the result fits in `out`, and that `out` overlaps neither an input nor an array of a rule."""
    inputs = {**inputs, **{name: x for name, x in rules.items() if isinstance(x, np.ndarray) and name != "out"}}
    checked_out(out, shape, dtype, list(inputs.values()), tuple(inputs))


@takes(LayerRules, like=dot_product_attention)
def self_attention(
    x: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    w_value: ArrayLike,
    **rules: Unpack[LayerRules],
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    Self-attention in its textbook form, ``softmax(Q K^T / sqrt(d_k)) V``, where Q, K and V are x times a matrix each.

    Parameters
    ----------
    x : array_like, shape (..., L, d_model)
        A sequence of L tokens, or a batch of them: float32, float64, float16 or bfloat16; integers and bools become
        float64.
    w_query, w_key : array_like, shape (d_model, d_k)
    w_value : array_like, shape (d_model, d_v)
        The matrices W^Q, W^K and W^V, on the right of x; they promote together with x as `numpy.result_type` says.
    is_causal, window_size, chunk_size, left_chunks, query_offset, key_lengths, query_lengths, mask, block_mask,
    block_size
        As for `dot_product_attention`: which keys a query sees. Here L and S are both the length of x, and
        `query_lengths` defaults to `key_lengths`: for a padded batch ``key_lengths=lengths`` is enough.
    bias, relative_bias, alibi_slopes
        As for `dot_product_attention`: what is added to the scores.
    scale, softcap, sinks, activation
        As for `dot_product_attention`: from scores to weights. `scale` is by default ``1 / sqrt(d_k)``.
    return_weights, return_lse, out, num_threads
        As for `dot_product_attention`.

    Returns
    -------
    out : ndarray, shape (..., L, d_v)
        Of the dtype to which x and the matrices promote. Rows past the length of a sequence are 0.
    weights : ndarray, shape (..., L, L) or (..., L, left + right + 1)
        Only with `return_weights`; float64 for float64, else float32.
    lse : ndarray, shape (..., L)
        Only with `return_lse`; float64 for float64, else float32.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.
    MemoryError
        If there is no memory for the result, the projected arrays or the workspace.

    See Also
    --------
    MultiHeadAttention : with heads, biases and an output projection, and for weights that are reused.
    self_attention_vjp : its gradients.

    Notes
    -----
    The projections are those of `Linear`: from the tokens on, the bits of a row do not depend on the batch, threads and
    padding, but calls of at most 8 rows, counted over all axes but the last, use other loops. 16-bit arrays are
    projected, and attended to, in float32; only the output is rounded.

    The matrices are packed in each call: `MultiHeadAttention` keeps them so.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", 2017, section 3.2.1, equation 1.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # three tokens
    >>> w_query, w_key = np.array([[4.0], [0.0]]), np.array([[0.0], [1.0]])
    >>> out, weights = fastattn.self_attention(x, w_query, w_key, np.eye(2), return_weights=True)
    >>> weights.round(3)
    array([[0.009, 0.495, 0.495],
           [0.333, 0.333, 0.333],
           [0.009, 0.495, 0.495]])
    >>> out.round(3)
    array([[0.505, 0.991],
           [0.667, 0.667],
           [0.505, 0.991]])
    """
    refuse_others(rules, LayerRules, "self_attention")
    tokens, matrices, dtype = _tokens_and_matrices(x, w_query, w_key, w_value)
    accumulation = accumulation_of(dtype)
    out = rules.get("out")
    if out is not None:
        _check_out(
            out,
            (*tokens.shape[:-1], matrices[2].shape[1]),
            dtype,
            {"x": x, "w_query": w_query, "w_key": w_key, "w_value": w_value},
            rules,
        )
    if rules.get("query_lengths") is None:
        rules["query_lengths"] = rules.get("key_lengths")
    if dtype != accumulation:
        rules["out"] = None
    _, _, (query, key, value) = _three(tokens, matrices, accumulation, rules.get("num_threads"))
    answer = dot_product_attention(query, key, value, **rules)
    if dtype == accumulation:
        return answer
    if isinstance(answer, tuple):
        return (rounded(answer[0], dtype, out), *answer[1:])
    return rounded(answer, dtype, out)


def _tokens_and_matrices(
    x: Any, w_query: Any, w_key: Any, w_value: Any
) -> tuple[NDArray[Any], list[NDArray[Any]], np.dtype[Any]]:
    """What self-attention is given, checked, and the dtype to which it promotes."""
    names = "w_query", "w_key", "w_value"
    tokens = floating(x, "x")
    if tokens.ndim < 2:
        raise ValueError(f"x has shape {tokens.shape}; it needs at least two axes, (..., L, d_model)")
    rows = tokens.shape[-1]
    matrices = [
        _matrix(w, name, rows, f": {rows} is x's last axis")
        for w, name in zip((w_query, w_key, w_value), names, strict=True)
    ]
    if matrices[0].shape[1] != matrices[1].shape[1]:
        raise ValueError(
            f"w_key has {matrices[1].shape[1]} columns and w_query {matrices[0].shape[1]}: for dot products they must "
            f"be equal"
        )
    return tokens, matrices, common_dtype([a.dtype for a in (tokens, *matrices)], ("x", *names))


def _three(
    tokens: NDArray[Any], matrices: list[NDArray[Any]], dtype: np.dtype[Any], num_threads: int | None
) -> tuple[NDArray[Any], list[NDArray[Any]], list[NDArray[Any]]]:
    """Tokens as rows, matrices in the dtype of their products, and query, key and value."""
    with np.errstate(all="ignore"):
        flat = rows_of(tokens, dtype)
        matrices = [w.astype(dtype, copy=False) for w in matrices]
        products = [project(flat, Matrix(w, None, dtype), None, num_threads) for w in matrices]
        return flat, matrices, [y.reshape(*tokens.shape[:-1], y.shape[1]) for y in products]


@takes(LayerGradientRules, like=dot_product_attention)
def self_attention_vjp(
    grad_out: ArrayLike,
    x: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    w_value: ArrayLike,
    *,
    wrt: str | Sequence[str] = ("x", "w_query", "w_key", "w_value"),
    output: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    out: NDArray[Any] | Sequence[NDArray[Any] | None] | None = None,
    **rules: Unpack[LayerGradientRules],
) -> NDArray[Any] | tuple[NDArray[Any], ...]:
    """
    The gradients of a loss through `self_attention`.

    Parameters
    ----------
    grad_out : array_like, shape (..., L, d_v)
        The gradient of the loss for what `self_attention` returned: float32, float64, float16 or bfloat16; integers and
        bools become float64.
    x, w_query, w_key, w_value : array_like
        As for `self_attention`, and so are all arguments that are not named below.
    wrt : str or tuple of str, default ("x", "w_query", "w_key", "w_value")
        Whose gradients are returned: of these, and of "bias", "relative_bias", "alibi_slopes" and "sinks" those that
        are given. Only they are computed.
    output, lse : array_like, optional
        What `self_attention` returned with the same arguments and ``return_lse=True``; both or neither. Attention is
        done again without them. They change no bit. Only for softmax.
    grad_lse : array_like, shape (..., L), optional
        The gradient of the loss for the log-sum-exp, if it was used too. Only for softmax.
    out : ndarray, or tuple of (ndarray or None), optional
        Receives the gradients: one array if `wrt` is a name, else a tuple as long as `wrt`. Each of the gradient's
        shape, and of its dtype or of the accumulation dtype; none may overlap an input or another.
    is_causal, window_size, chunk_size, left_chunks, query_offset, key_lengths, query_lengths, mask, block_mask
        As for `self_attention`: which keys a query sees.
    block_size, bias, relative_bias, alibi_slopes, scale, softcap, sinks, activation, num_threads
        As for `self_attention`.

    Returns
    -------
    ndarray, or tuple of ndarray
        A gradient for each name in `wrt`, of the shape and dtype of its array (float64 for integers). That of x is the
        sum of its three uses.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it, and `out` is untouched.
    MemoryError
        If there is no memory for the results, the projected arrays or the workspace.

    See Also
    --------
    dot_product_attention_vjp : attention alone, and what is promised of it.
    MultiHeadAttention.vjp

    Notes
    -----
    With Q = x W^Q, and with dQ, dK and dV as `dot_product_attention_vjp` returns them, ``dW^Q = x^T dQ`` (also for K
    and V) and ``dx = dQ W^Q^T + dK W^K^T + dV W^V^T``. The products are NumPy's; those with x^T are split into blocks
    of tokens, so that no error grows with their number. Padding takes no part, whatever x is there.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", 2017, section 3.2.1, equation 1.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> w_query, w_key = np.array([[4.0], [0.0]]), np.array([[0.0], [1.0]])
    >>> grad_out = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])  # the loss is the first number
    >>> fastattn.self_attention_vjp(grad_out, x, w_query, w_key, np.eye(2), wrt="w_key").round(3)
    array([[ 1.   ],
           [-0.018]])
    """
    refuse_others(rules, LayerGradientRules, "self_attention_vjp")
    tokens, matrices, dtype = _tokens_and_matrices(x, w_query, w_key, w_value)
    real = accumulation_of(dtype)
    shape = (*tokens.shape[:-1], matrices[2].shape[1])
    grad = read_gradient(grad_out, shape)
    given: dict[str, Any] = {"x": x, "w_query": w_query, "w_key": w_key, "w_value": w_value}
    given |= {name: rules.get(name) for name in ADDED}
    others: dict[str, Any] = {"grad_out": grad_out, "output": output, "lse": lse, "grad_lse": grad_lse}
    others |= {name: a for name, a in rules.items() if isinstance(a, np.ndarray) and name not in given}
    wanted = read_wanted(wrt, given, out, real, others)
    if rules.get("query_lengths") is None:
        rules["query_lengths"] = rules.get("key_lengths")

    flat, matrices, attended = _three(tokens, matrices, real, rules.get("num_threads"))
    if dtype != real and rules.get("activation", "softmax") == "softmax":
        # Attention is in float32, but what the forward call returned was rounded.
        with np.errstate(all="ignore"):
            if output is None and lse is None:
                answer: Any = dot_product_attention(*attended, return_lse=True, **rules)
                output, lse = answer[0].astype(dtype), answer[1]
            output = None if output is None else floating(output, "output").astype(real)
    used = [name for name in ("query", "key", "value") if "x" in wanted.names or f"w_{name}" in wanted.names]
    added = [name for name in ADDED if name in wanted.names]
    answer = dot_product_attention_vjp(
        grad,
        *attended,
        wrt=(*used, *added),
        output=output,
        lse=lse,
        grad_lse=grad_lse,
        out=(*[None] * len(used), *map(wanted.target, added)),
        **rules,
    )
    with np.errstate(all="ignore"):
        d_x = None
        for name, w, d in zip(("query", "key", "value"), matrices, _by_name(used, answer), strict=True):
            if d is None:
                continue
            d = d.reshape(len(flat), w.shape[1])
            if f"w_{name}" in wanted.names:
                store(wanted.target(f"w_{name}"), outer_sum(flat, d))
            if "x" in wanted.names:
                part = np.matmul(d, w.T)
                d_x = part if d_x is None else np.add(d_x, part, out=d_x)
        if d_x is not None:
            store(wanted.target("x"), d_x.reshape(tokens.shape))
    return wanted.result()


def _by_name(names: Sequence[str], arrays: Sequence[Any]) -> list[Any]:
    """Of query, key and value, None where there is none."""
    found = dict(zip(names, arrays, strict=False))
    return [found.get(name) for name in ("query", "key", "value")]


class _Call(NamedTuple):
    """A call of a layer, checked."""

    tokens: NDArray[Any]
    context: NDArray[Any] | None  # None if it is x
    batch: tuple[int, ...]
    length: int
    num_keys: int
    dtype: np.dtype[Any]  # of the output
    accumulation: np.dtype[Any]  # the dtype of its sums and of the products
    out: NDArray[Any] | None
    rules: Rules  # for attention; lengths and offsets have an axis for the heads
    projected: ProjectedContext | None = None  # instead of context
    starts: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None  # of packed sequences, in x and in context
    weights_of: NDArray[np.int64] | None = None  # heads, if weights of some are returned


class MultiHeadAttention:
    """
    Multi-head attention with its projections: self-attention, cross-attention, and steps that extend a cache.

    ``layer(x)`` is ``concat(head_1, ..., head_h) @ w_out + b_out`` with ``head_i = attention(x @ W_i^Q, c @ W_i^K, c @
    W_i^V)``, where c is `context`, or x again [1]_. Existing weights are loaded by `from_torch`, `from_keras`,
    `from_linear` and `from_packed`, those of models with Hugging Face's names by `from_bert`, `from_distilbert`,
    `from_gemma`, `from_gpt2`, `from_llama`, `from_qwen`, `from_t5`, `from_vit` and `from_whisper`.

    Parameters
    ----------
    w_query : array_like, shape (d_model, num_heads * head_dim)
    w_key : array_like, shape (d_context, num_kv_heads * head_dim)
    w_value : array_like, shape (d_context, num_kv_heads * value_dim)
        Projections, applied from the right, ``x @ w_query``; a head's columns are adjacent. float32, float64, float16
        or bfloat16; integers and bools become float64. They are copied. Self-attention needs ``d_context == d_model``.
    w_out : array_like, shape (num_heads * value_dim, d_out), optional
        Output projection. Without it the heads are returned side by side.
    num_heads : int
    num_kv_heads : int, optional
        Heads of key and value, default `num_heads`. If there are fewer, query head h reads key head ``h // (num_heads
        // num_kv_heads)`` (grouped-query attention [2]_).
    b_query, b_key, b_value, b_out : array_like, optional
        Added to the projections, one number per column; converted to the accumulation dtype.
    rotary_base : float, optional
        If given, query and key are rotated by their positions, as `apply_rotary` does with this base.
    rotary_frequencies : pair (frequencies, attention_factor), optional
        Instead of a base, what the function `rotary_frequencies` returns: an angle per position for each rotated pair
        of channels, and the factor of both channels.
    rotary_interleaved : bool, default False
        As `interleaved` of `apply_rotary`. False pairs the halves of a head, as Hugging Face does; True pairs
        neighbours, as in Meta's own files of LLaMA, and in GGUF files, whose converter permutes the rows of LLaMA's
        query and key to that order.
    rotary_dim : int, optional
        As `rotary_dim` of `apply_rotary`. Default: all of `head_dim`.
    q_norm, k_norm : array_like, shape (head_dim,), optional
        Each head of query, or of key, becomes ``x / sqrt(mean(x**2) + norm_eps) * q_norm`` before it is rotated
        (Qwen3 [3]_). Stored as biases are.
    norm_eps : float, default 1e-6
        Positive.
    is_causal, window_size, relative_bias, alibi_slopes, scale, softcap, sinks : optional
        Rules that belong to the model, as for `dot_product_attention`; the layer has copies. They hold for every call
        that does not give them itself: None, or False, in a call means none. `alibi_slopes` and `sinks` broadcast to
        (num_heads,), `relative_bias` to (num_heads, 1, left + right + 1), with a `window_size`.

    Attributes
    ----------
    w_query, w_key, w_value, w_out, b_query, b_key, b_value, b_out : ndarray or None
        The layer's own copies, in the dtype in which they are multiplied; read-only, also after unpickling:
        `parameters` returns them to be written to.
    num_heads, num_kv_heads, head_dim, value_dim, d_model, d_context, d_out : int
    rotary_base, rotary_frequencies, rotary_dim : as given, or None where nothing is rotated
    q_norm, k_norm : ndarray or None
        As weights: read-only copies.
    norm_eps : float
    is_causal, window_size, relative_bias, alibi_slopes, scale, softcap, sinks
        The rules that the layer holds, read-only; None, or False, where it holds none.
    dtype : numpy.dtype
        The dtype to which the weight matrices promote.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it.
    MemoryError
        If there is no memory for the copies.

    See Also
    --------
    MultiHeadAttention.vjp, MultiHeadAttention.parameters : to train the layer.
    self_attention : one head, the textbook form.
    dot_product_attention : attention alone, and the meaning of every rule.
    KVCache

    Notes
    -----
    The matrices are packed as those of `Linear`, that of query, and those of key and value together; after
    `parameters`, whose arrays may be written to, each call packs them. Projections are written side by side, the heads
    are views of them, and attention writes its output where the last product reads it: nothing is copied in between.

    16-bit weights stay 16 bits in memory. Weights that x promotes to another accumulation dtype are converted and
    packed in each call: give them the dtype of x.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention is all you need", 2017, section 3.2.2.
    .. [2] J. Ainslie et al., "GQA: Training generalized multi-query transformer models from multi-head checkpoints",
           2023, section 2.2.
    .. [3] A. Yang et al., "Qwen3 technical report", 2025, section 2; the norm is that of B. Zhang and R. Sennrich,
           "Root mean square layer normalization", 2019.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> w_query, w_key, w_value, w_out = rng.normal(size=(4, 32, 32)).astype(np.float32)
    >>> layer = fastattn.MultiHeadAttention(w_query, w_key, w_value, w_out, num_heads=4)
    >>> x = rng.normal(size=(2, 10, 32)).astype(np.float32)
    >>> layer(x).shape
    (2, 10, 32)
    >>> context = rng.normal(size=(2, 50, 32)).astype(np.float32)
    >>> out, weights = layer(x, context, key_lengths=[50, 31], return_weights=True)
    >>> weights.shape
    (2, 4, 10, 50)

    A prompt of 9 tokens and a step of one, with a cache, give the same last row as all 10 together:

    >>> cache = fastattn.KVCache(2, 4, 100, 8)
    >>> _ = layer(x[:, :9], cache=cache, is_causal=True)
    >>> step = layer(x[:, 9:], cache=cache)
    >>> bool(np.allclose(step, layer(x, is_causal=True)[:, 9:], atol=1e-4))
    True

    Rules of the model can stay with the layer; a call may still have its own:

    >>> decoder = fastattn.MultiHeadAttention(w_query, w_key, w_value, w_out, num_heads=4, is_causal=True)
    >>> bool(np.array_equal(decoder(x), layer(x, is_causal=True)))
    True
    >>> bool(np.array_equal(decoder(x, is_causal=False), layer(x)))
    True
    """

    # Of a table of relative biases, which says nothing of greater distances: the most tokens (T5).
    _longest: int | None = None

    def __init__(
        self,
        w_query: ArrayLike,
        w_key: ArrayLike,
        w_value: ArrayLike,
        w_out: ArrayLike | None = None,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        b_query: ArrayLike | None = None,
        b_key: ArrayLike | None = None,
        b_value: ArrayLike | None = None,
        b_out: ArrayLike | None = None,
        rotary_base: float | None = None,
        rotary_frequencies: tuple[ArrayLike, float] | None = None,
        rotary_interleaved: bool = False,
        rotary_dim: int | None = None,
        q_norm: ArrayLike | None = None,
        k_norm: ArrayLike | None = None,
        norm_eps: float = 1e-6,
        is_causal: bool = False,
        window_size: int | tuple[int | None, int | None] | None = None,
        relative_bias: ArrayLike | None = None,
        alibi_slopes: ArrayLike | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: ArrayLike | None = None,
    ) -> None:
        self.num_heads = _heads(num_heads, "num_heads")
        self.num_kv_heads = self.num_heads if num_kv_heads is None else _heads(num_kv_heads, "num_kv_heads")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a whole multiple of num_kv_heads={self.num_kv_heads}")
        query = _matrix(w_query, "w_query", None, "")
        key = _matrix(w_key, "w_key", None, "")
        value = _matrix(w_value, "w_value", len(key), f": {len(key)} rows as w_key has, since both project the same")
        self.d_model, self.d_context = len(query), len(key)
        of = "num_heads" if num_kv_heads is None else "num_kv_heads"
        self.head_dim = _split(query.shape[1], "w_query", self.num_heads, "num_heads")
        self.value_dim = _split(value.shape[1], "w_value", self.num_kv_heads, of)
        if key.shape[1] != self.num_kv_heads * self.head_dim:
            text = (
                f"w_key has {key.shape[1]} columns; it must have {self.num_kv_heads * self.head_dim}, {of}="
                f"{self.num_kv_heads} heads of {self.head_dim} channels as w_query has them"
            )
            if num_kv_heads is None:
                text += ". Fewer heads of key and value are given as num_kv_heads"
            raise ValueError(text)
        matrices = {"w_query": query, "w_key": key, "w_value": value}
        if w_out is not None:
            width = self.num_heads * self.value_dim
            why = f": {width} is num_heads={self.num_heads} times the {self.value_dim} channels of a value head"
            matrices["w_out"] = _matrix(w_out, "w_out", width, why)
        elif b_out is not None:
            raise ValueError("b_out is added to the output projection: it needs w_out")
        self.dtype = common_dtype([w.dtype for w in matrices.values()], tuple(matrices))
        out = matrices.get("w_out")
        self.d_out = self.num_heads * self.value_dim if out is None else out.shape[1]

        biases = [
            _vector(b, name, w.shape[1], f"w{name[1:]}")
            for b, name, w in ((b_query, "b_query", query), (b_key, "b_key", key), (b_value, "b_value", value))
        ]
        # In float64, as given: for a call in float64 those in the accumulation dtype would have lost digits.
        self._b_every = None if b_query is b_key is b_value is None else np.concatenate(biases)
        self._b_out = None if out is None or b_out is None else _vector(b_out, "b_out", out.shape[1], "w_out")
        self._has_bias = b_query is not None, b_key is not None, b_value is not None
        self._accumulation = accumulation_of(self.dtype)
        weights = Weights.of(query, (key, value), out, self._b_every, self._b_out, self._accumulation)
        self._stored = Stored(query.shape[1], weights, self.dtype)
        self._scratch = Scratch()
        self._mark = os.urandom(16)  # shared with copies, and with what this layer has projected

        if rotary_base is not None and rotary_frequencies is not None:
            raise ValueError(
                "rotary_base and rotary_frequencies do not go together: the frequencies are instead of those that "
                "follow from a base"
            )
        self.rotary_base = _rotary_base(rotary_base)
        rotates = rotary_base is not None or rotary_frequencies is not None
        self.rotary_dim = _rotary_dim(rotary_dim, self.head_dim, rotates)
        self.rotary_frequencies = _rotary_frequencies(rotary_frequencies, self.rotary_dim)
        if not isinstance(rotary_interleaved, (bool, np.bool_)):
            raise TypeError(f"rotary_interleaved must be True or False, not {rotary_interleaved!r}")
        self.rotary_interleaved = bool(rotary_interleaved)

        norms = {"q_norm": q_norm, "k_norm": k_norm}
        # As biases: what was given, and the layer's own.
        self._norms_given = {
            name: _vector(w, name, self.head_dim, "a head") for name, w in norms.items() if w is not None
        }
        with np.errstate(all="ignore"):
            self._norms = {name: w.astype(self._accumulation) for name, w in self._norms_given.items()}
        self._norm_eps = real(norm_eps, "norm_eps", "a positive finite number", True)
        self._held = self._checked_held(
            {
                "is_causal": is_causal,
                "window_size": window_size,
                "relative_bias": relative_bias,
                "alibi_slopes": alibi_slopes,
                "scale": scale,
                "softcap": softcap,
                "sinks": sinks,
            }
        )
        self._lock()

    def _checked_held(self, rules: dict[str, Any]) -> dict[str, Any]:
        """The rules that the layer is to hold, as a call takes them; arrays are copies."""
        held = {name: x for name, x in rules.items() if x is not None and x is not False}
        if not held:
            return held
        for name in ADDED:
            if name in held:
                held[name] = as_array(held[name], name).copy()
        check(
            (self.num_heads, 1, self.head_dim),
            (self.num_kv_heads, 1, self.head_dim),
            (self.num_kv_heads, 1, self.value_dim),
            self.dtype,
            {**held, "enable_gqa": True},
        )
        for name in ("scale", "softcap"):
            if name in held:
                held[name] = float(held[name])
        if "window_size" in held:
            pair = held["window_size"]
            if np.ndim(pair):
                held["window_size"] = tuple(None if n is None else int(n) for n in pair)
            else:
                held["window_size"] = int(pair)
        if not held.get("is_causal", True):
            del held["is_causal"]
        return held

    def _lock(self) -> None:
        """Makes the layer's own arrays read-only, which pickles forget; weights are so where they are made."""
        arrays = [*self._norms.values(), *self._norms_given.values(), *self._held.values()]
        arrays += () if self.rotary_frequencies is None else self.rotary_frequencies
        for a in arrays:
            if isinstance(a, np.ndarray):
                a.flags.writeable = False

    @classmethod
    def from_torch(cls, state: State, *, num_heads: int, prefix: str = "") -> Self:
        """
        From the state dict of PyTorch's ``nn.MultiheadAttention``.

        Parameters
        ----------
        state : mapping from names to arrays, or path
            Arrays or torch tensors: ``in_proj_weight`` or, where `kdim` and `vdim` were given, ``q_proj_weight``,
            ``k_proj_weight`` and ``v_proj_weight``; ``out_proj.weight``; the biases ``in_proj_bias`` and
            ``out_proj.bias`` if there are any. A path is that of a ``.safetensors`` file, of the ``.index.json`` of
            several, or of a folder that holds ``model.safetensors.index.json`` or ``model.safetensors``; it needs the
            package safetensors, and only these arrays are read.
        num_heads : int
        prefix : str, default ""
            Prefix of the names, such as ``"layers.0.self_attn."``.

        Returns
        -------
        MultiHeadAttention

        Raises
        ------
        ValueError, TypeError
            If names are missing (the message lists what was looked for and what is there), if shapes do not fit, if
            `kdim` and `vdim` differ, or if there is a ``bias_k`` (add_bias_kv), which is not supported.
        ImportError
            If the package that reads the file is missing.

        Notes
        -----
        In PyTorch, a boolean mask is True where a query may *not* attend, `is_causal` aligns the first query with the
        first key, and weights are averaged over the heads.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> rng = np.random.default_rng(0)
        >>> state = {"in_proj_weight": rng.normal(size=(24, 8)), "out_proj.weight": rng.normal(size=(8, 8))}
        >>> fastattn.MultiHeadAttention.from_torch(state, num_heads=2)
        <MultiHeadAttention: 8 -> 2 heads of 4 -> 8, num_kv_heads=2, value_dim=4, float64>
        """
        return cls(num_heads=num_heads, **_weights.from_torch(state, prefix))

    @classmethod
    @takes(LayerOptions, like=__init__)
    def from_linear(
        cls,
        state: State,
        query: str,
        key: str,
        value: str,
        out: str | None = None,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **options: Unpack[LayerOptions],
    ) -> Self:
        """
        From the state dict of a model whose projections are PyTorch's ``nn.Linear``.

        Parameters
        ----------
        state : mapping from names to arrays, or path
            As for `from_torch`.
        query, key, value, out : str
            Names of the layers, without ``.weight``, which must exist; ``.bias`` may.
        num_heads, num_kv_heads : int
            As for `MultiHeadAttention`.
        prefix : str, default ""
            Prefix of all names.
        rotary_base, rotary_frequencies, rotary_interleaved, rotary_dim, q_norm, k_norm, norm_eps, is_causal,
        window_size, relative_bias, alibi_slopes, scale, softcap, sinks : optional
            As for `MultiHeadAttention`.

        Returns
        -------
        MultiHeadAttention

        Raises
        ------
        ValueError, TypeError, ImportError
            As for `from_torch`.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> state = {f"attn.{name}.weight": np.eye(6) for name in ("q", "k", "v", "out")}
        >>> fastattn.MultiHeadAttention.from_linear(state, "q", "k", "v", "out", num_heads=3, prefix="attn.")
        <MultiHeadAttention: 6 -> 3 heads of 2 -> 6, num_kv_heads=3, value_dim=2, float64>
        """
        refuse_others(options, LayerOptions, "MultiHeadAttention.from_linear")
        return cls(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            **_weights.from_linear(state, query, key, value, out, prefix),
            **options,
        )

    @classmethod
    @takes(LayerOptions, like=__init__)
    def from_packed(
        cls,
        w_qkv: ArrayLike,
        b_qkv: ArrayLike | None = None,
        w_out: ArrayLike | None = None,
        b_out: ArrayLike | None = None,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        layout: str = "qkv",
        transposed: bool = False,
        **options: Unpack[LayerOptions],
    ) -> Self:
        """
        From one matrix for query, key and value.

        Parameters
        ----------
        w_qkv : array_like, shape (d_model, (num_heads + 2 * num_kv_heads) * head_dim)
        b_qkv : array_like, shape ((num_heads + 2 * num_kv_heads) * head_dim,), optional
            Arrays or torch tensors.
        w_out : array_like, shape (num_heads * head_dim, d_out), optional
        b_out : array_like, shape (d_out,), optional
        num_heads, num_kv_heads : int
            As for `MultiHeadAttention`.
        layout : {'qkv', 'interleaved'}, default 'qkv'
            Of the columns: ``'qkv'`` has all heads of query, then all of key, then all of value (GPT-2's ``c_attn``,
            ``qkv`` of timm, Swin and CLIP, ``in_proj_weight`` of PyTorch, Phi-3); ``'interleaved'`` has for each head
            of key its heads of query, itself and its head of value: (num_heads, 3, head_dim) in GPT-NeoX and BLOOM,
            (num_kv_heads, group + 2, head_dim) with grouped heads (Falcon 40B, InternLM2).
        transposed : bool, default False
            Whether `w_qkv` and `w_out` are (out, in), as PyTorch's ``nn.Linear`` stores them; those of GPT-2 are not.
        rotary_base, rotary_frequencies, rotary_interleaved, rotary_dim, q_norm, k_norm, norm_eps, is_causal,
        window_size, relative_bias, alibi_slopes, scale, softcap, sinks : optional
            As for `MultiHeadAttention`.

        Returns
        -------
        MultiHeadAttention

        Raises
        ------
        ValueError, TypeError
            If an argument is not as above; the message names it.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> rng = np.random.default_rng(0)
        >>> w_qkv, w_out = rng.normal(size=(24, 8)), rng.normal(size=(8, 8))  # of two nn.Linear
        >>> fastattn.MultiHeadAttention.from_packed(w_qkv, w_out=w_out, num_heads=2, transposed=True)
        <MultiHeadAttention: 8 -> 2 heads of 4 -> 8, num_kv_heads=2, value_dim=4, float64>
        """
        refuse_others(options, LayerOptions, "MultiHeadAttention.from_packed")
        arguments = _weights.from_packed(w_qkv, b_qkv, num_heads, num_kv_heads, layout, transposed)
        if w_out is not None:
            w_out = _weights.array_of(w_out, "w_out")
            arguments["w_out"] = w_out.T if transposed else w_out
        if b_out is not None:
            arguments["b_out"] = _weights.array_of(b_out, "b_out")
        return cls(**arguments, **options)

    @classmethod
    def from_bert(cls, state: State, layer: int, *, num_heads: int, prefix: str = "") -> Self:
        """
        From the weights of a layer of BERT with Hugging Face's names (also RoBERTa and MiniLM).

        Parameters
        ----------
        state : mapping from names to arrays, or path
            As for `from_torch`. It must hold ``encoder.layer.{layer}.attention.self.query.weight``, ``key`` and
            ``value`` alike, and ``encoder.layer.{layer}.attention.output.dense.weight``; their biases are read if
            there. The norm after attention is not part of the layer.
        layer : int
            From 0 on.
        num_heads : int
            ``num_attention_heads`` of the model's config.json.
        prefix : str, default ""
            Prefix of the names. If not given, and the names have exactly one other prefix (such as ``"bert."``), that
            is used.

        Returns
        -------
        MultiHeadAttention

        Raises
        ------
        ValueError, TypeError, ImportError
            As for `from_torch`; also if there are other attention weights (such as ``distance_embedding``), without
            which the results would be wrong.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> at, parts = "bert.encoder.layer.0.attention", ("self.query", "self.key", "self.value", "output.dense")
        >>> state = {f"{at}.{part}.weight": np.eye(8, dtype=np.float32) for part in parts}
        >>> fastattn.MultiHeadAttention.from_bert(state, 0, num_heads=2)
        <MultiHeadAttention: 8 -> 2 heads of 4 -> 8, num_kv_heads=2, value_dim=4, float32>
        """
        return cls(num_heads=num_heads, **_weights.from_bert(state, layer, prefix))

    @classmethod
    def from_distilbert(cls, state: State, layer: int, *, num_heads: int, prefix: str = "") -> Self:
        """
        From the weights of a layer of DistilBERT with Hugging Face's names.

        Parameters
        ----------
        state : mapping from names to arrays, or path
            As for `from_torch`. It must hold ``transformer.layer.{layer}.attention.q_lin.weight``, ``k_lin``, ``v_lin``
            and ``out_lin`` alike; their biases are read if there.
        layer : int
            From 0 on.
        num_heads : int
            ``n_heads`` of the model's config.json.
        prefix : str, default ""
            Prefix of the names. If not given, and the names have exactly one other prefix (such as
            ``"distilbert."``), that is used.

        Returns
        -------
        MultiHeadAttention

        Raises
        ------
        ValueError, TypeError, ImportError
            As for `from_bert`.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> at, parts = "distilbert.transformer.layer.0.attention", ("q_lin", "k_lin", "v_lin", "out_lin")
        >>> state = {f"{at}.{part}.weight": np.eye(8, dtype=np.float32) for part in parts}
        >>> fastattn.MultiHeadAttention.from_distilbert(state, 0, num_heads=2)
        <MultiHeadAttention: 8 -> 2 heads of 4 -> 8, num_kv_heads=2, value_dim=4, float32>
        """
        return cls(num_heads=num_heads, **_weights.from_distilbert(state, layer, prefix))

    @classmethod
    def from_vit(cls, state: State, layer: int, *, num_heads: int, prefix: str = "") -> Self:
        """
        From the weights of a layer of ViT with Hugging Face's names (also DeiT and DINOv2).

        Parameters
        ----------
        state : mapping from names to arrays, or path
            As for `from_torch`. It must hold ``encoder.layer.{layer}.attention.attention.query.weight``, ``key`` and
            ``value`` alike, and ``encoder.layer.{layer}.attention.output.dense.weight``, as files do; or, as modules of
            Transformers 5 do, ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` in ``layers.{layer}.attention``. Their
            biases are read if there.
        layer : int
            From 0 on.
        num_heads : int
            ``num_attention_heads`` of the model's config.json.
        prefix : str, default ""
            Prefix of the names. If not given, and the names have exactly one other prefix (such as ``"vit."``), that
            is used.

        Returns
        -------
        MultiHeadAttention

        Raises
        ------
        ValueError, TypeError, ImportError
            As for `from_bert`; also for BEiT, whose table of relative positions is refused.

        Notes
        -----
        The weights of timm's models, ``blocks.{layer}.attn.qkv`` and ``proj``, are loaded by `from_packed` with
        ``transposed=True``.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> at, parts = "vit.encoder.layer.0.attention", ("attention.query", "attention.key", "attention.value")
        >>> state = {f"{at}.{part}.weight": np.eye(8, dtype=np.float32) for part in (*parts, "output.dense")}
        >>> fastattn.MultiHeadAttention.from_vit(state, 0, num_heads=2)
        <MultiHeadAttention: 8 -> 2 heads of 4 -> 8, num_kv_heads=2, value_dim=4, float32>
        """
        return cls(num_heads=num_heads, **_weights.from_vit(state, layer, prefix))

    @classmethod
    def from_gpt2(
        cls, state: State, layer: int, *, num_heads: int, scale: float | None = None, prefix: str = ""
    ) -> Self:
        """
        From the weights of a layer of GPT-2 with Hugging Face's names.

        Parameters
        ----------
        state : mapping from names to arrays, or path
            As for `from_torch`. It must hold ``h.{layer}.attn.c_attn.weight`` (d_model, 3 * d_model) and
            ``h.{layer}.attn.c_proj.weight``; their biases are read if there.
        layer : int
            From 0 on.
        num_heads : int
            ``n_head`` of the model's config.json.
        scale : float, optional
            Default ``1 / sqrt(head_dim)``. A model with ``scale_attn_by_inverse_layer_idx`` has ``1 / sqrt(head_dim) /
            (layer + 1)``, one without ``scale_attn_weights`` 1.
        prefix : str, default ""
            Prefix of the names. If not given, and the names have exactly one other prefix (such as
            ``"transformer."``), that is used.

        Returns
        -------
        MultiHeadAttention
            It holds ``is_causal=True``.

        Raises
        ------
        ValueError, TypeError, ImportError
            As for `from_bert`.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> sizes = {"c_attn": 24, "c_proj": 8}
        >>> state = {f"transformer.h.0.attn.{name}.weight": np.ones((8, n), np.float32) for name, n in sizes.items()}
        >>> fastattn.MultiHeadAttention.from_gpt2(state, 0, num_heads=2)
        <MultiHeadAttention: 8 -> 2 heads of 4 -> 8, num_kv_heads=2, value_dim=4, is_causal=True, float32>
        """
        return cls(scale=scale, **_weights.from_gpt2(state, layer, num_heads, prefix))

    @classmethod
    def from_whisper(
        cls, state: State, layer: int, *, num_heads: int, part: str = "encoder", prefix: str = "model."
    ) -> Self:
        """
        From the weights of a layer of Whisper with Hugging Face's names (also BART and Marian).

        Parameters
        ----------
        state : mapping from names to arrays, or path
            As for `from_torch`. It must hold ``encoder.layers.{layer}.self_attn.q_proj.weight``, or the like in
            ``decoder.layers.{layer}.self_attn`` or ``decoder.layers.{layer}.encoder_attn``, and ``k_proj``, ``v_proj``
            and ``out_proj`` beside it; their biases are read if there (Whisper's keys have none).
        layer : int
            From 0 on, in the encoder or in the decoder.
        num_heads : int
            ``encoder_attention_heads`` or ``decoder_attention_heads`` of the model's config.json.
        part : {'encoder', 'decoder', 'cross'}, default 'encoder'
            Self-attention of the encoder or of the decoder, or the decoder's cross-attention, whose `context` is what
            the encoder returns.
        prefix : str, default "model."
            Prefix of the names. If not given, and the names have exactly one other prefix, that is used.

        Returns
        -------
        MultiHeadAttention
            That of the decoder's self-attention holds ``is_causal=True``.

        Raises
        ------
        ValueError, TypeError, ImportError
            As for `from_bert`.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> at, parts = "model.decoder.layers.0.encoder_attn", ("q_proj", "k_proj", "v_proj", "out_proj")
        >>> state = {f"{at}.{part}.weight": np.eye(8, dtype=np.float32) for part in parts}
        >>> cross = fastattn.MultiHeadAttention.from_whisper(state, 0, num_heads=2, part="cross")
        >>> cross(np.ones((5, 8), np.float32), np.ones((1500, 8), np.float32)).shape
        (5, 8)
        """
        return cls(num_heads=num_heads, **_weights.from_whisper(state, layer, part, prefix))

    @classmethod
    def from_t5(
        cls,
        state: State,
        layer: int,
        *,
        num_heads: int,
        max_length: int | None = None,
        max_distance: int = 128,
        part: str = "encoder",
        prefix: str = "",
    ) -> Self:
        """
        From the weights of a layer of T5 with Hugging Face's names (also mT5, UMT5, Flan-T5, ByT5).

        Parameters
        ----------
        state : mapping from names to arrays, or path
            As for `from_torch`. It must hold ``encoder.block.{layer}.layer.0.SelfAttention.q.weight``, or the like in
            ``decoder.block.{layer}.layer.0.SelfAttention`` or ``decoder.block.{layer}.layer.1.EncDecAttention``, and
            ``k``, ``v`` and ``o`` beside it; for self-attention also ``relative_attention_bias.weight`` (buckets,
            heads), there or in block 0.
        layer : int
            From 0 on, in the encoder or in the decoder.
        num_heads : int
            ``num_heads`` of the model's config.json.
        max_length : int
            The most tokens of a sequence, those in a cache included; needed for self-attention. The layer holds
            ``num_heads * (2 * max_length - 1)`` biases, half of them for a decoder; more tokens are a ValueError.
        max_distance : int, default 128
            ``relative_attention_max_distance``.
        part : {'encoder', 'decoder', 'cross'}, default 'encoder'
            Self-attention of the encoder or of the decoder, or the decoder's cross-attention, whose `context` is what
            the encoder returns.
        prefix : str, default ""
            Prefix of the names. If not given, and the names have exactly one other prefix, that is used.

        Returns
        -------
        MultiHeadAttention
            It holds ``scale=1.0`` and, for self-attention, `relative_bias` and ``window_size=(max_length - 1,
            max_length - 1)``; the decoder's ``(max_length - 1, 0)`` and ``is_causal=True``.

        Raises
        ------
        ValueError, TypeError, ImportError
            As for `from_bert`.

        See Also
        --------
        relative_position_buckets : which bias belongs to which distance.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> at = "encoder.block.0.layer.0.SelfAttention"
        >>> state = {f"{at}.{name}.weight": np.eye(8, dtype=np.float32) for name in "qkvo"}
        >>> state[f"{at}.relative_attention_bias.weight"] = np.zeros((32, 2), np.float32)
        >>> layer = fastattn.MultiHeadAttention.from_t5(state, 0, num_heads=2, max_length=100)
        >>> layer.relative_bias.shape, layer.window_size, layer.scale
        ((2, 1, 199), (99, 99), 1.0)
        """
        made = cls(
            num_heads=num_heads, **_weights.from_t5(state, layer, num_heads, max_length, max_distance, part, prefix)
        )
        if made.relative_bias is not None:
            made._longest = int(cast("int", max_length))
        return made

    @classmethod
    def from_llama(
        cls,
        state: State,
        layer: int,
        *,
        num_heads: int,
        config: Mapping[str, Any] | None = None,
        num_kv_heads: int | None = None,
        rotary_base: float | None = None,
        rope_parameters: Mapping[str, Any] | None = None,
        max_positions: int | None = None,
        sliding_window: int | None = None,
        prefix: str = "model.",
    ) -> Self:
        """
        From the weights of a layer of LLaMA with Hugging Face's names (also Mistral, Qwen2 and gpt-oss).

        Parameters
        ----------
        state : mapping from names to arrays, or path
            As for `from_torch`. It must hold ``layers.{layer}.self_attn.q_proj.weight``, ``k_proj``, ``v_proj`` and
            ``o_proj`` alike; their biases, and ``sinks``, are read if there.
        layer : int
            From 0 on.
        num_heads : int
            ``num_attention_heads`` of the model's config.json.
        config : mapping, optional
            The dict of the model's config.json: what it says of this layer is the default of the arguments below. One
            of another ``model_type``, or that asks for what the layer cannot do, is an error.
        num_kv_heads : int, optional
            ``num_key_value_heads``. Default: as follows from the size of ``k_proj``.
        rotary_base : float, optional
            ``rope_theta``; default 10000. Channels are paired across the halves of a head, as in Hugging Face.
        rope_parameters : mapping, optional
            The dict of that name in config.json (in older files ``rope_scaling``), as `scaling` of
            `rotary_frequencies`. Its ``rope_theta`` takes precedence over `rotary_base`; with a
            ``partial_rotary_factor`` only the first part of each head is rotated.
        max_positions : int, optional
            ``max_position_embeddings``, which some dicts need.
        sliding_window : int, optional
            ``sliding_window``, for layers that have one (Mistral 7B; every second one in gpt-oss). A query sees so many
            keys, its own included.
        prefix : str, default "model."
            Prefix of the names. If not given, and the names have exactly one other prefix, that is used.

        Returns
        -------
        MultiHeadAttention
            It holds ``is_causal=True``, and the window and the sinks.

        Raises
        ------
        ValueError, TypeError, ImportError
            As for `from_torch`; also if there are other attention weights (such as ``q_norm``, or of quantization),
            without which the results would be wrong; and if `rope_parameters` has something unknown, or frequencies
            that change with the length of the sequence ("dynamic", "longrope").

        Notes
        -----
        For frequencies that change with the length, `rotary_frequencies` returns those of one length, and `from_linear`
        takes them.

        GGUF files have the rows of LLaMA's query and key in another order, in which the channels of a pair are
        neighbours: such weights are loaded by `from_linear` with ``rotary_interleaved=True``.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> at, rows = "model.layers.0.self_attn", {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8}
        >>> state = {f"{at}.{name}.weight": np.ones((n, 8), np.float32) for name, n in rows.items()}
        >>> fastattn.MultiHeadAttention.from_llama(state, 0, num_heads=4)
        <MultiHeadAttention: 8 -> 4 heads of 2 -> 8, num_kv_heads=2, value_dim=2, rotary_base=10000, is_causal=True,
        float32>

        With the dict of a model with an extended context:

        >>> yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
        >>> layer = fastattn.MultiHeadAttention.from_llama(state, 0, num_heads=4, rope_parameters=yarn)
        >>> frequencies, attention_factor = layer.rotary_frequencies
        >>> round(attention_factor, 4)
        1.1386
        """
        num_heads = _heads(num_heads, "num_heads")
        given = _configuration.merged(
            "from_llama",
            config,
            layer,
            num_heads,
            num_kv_heads=num_kv_heads,
            rope_parameters=rope_parameters,
            max_positions=max_positions,
            sliding_window=sliding_window,
        )
        base = 10000.0 if rotary_base is None else rotary_base
        return cls(
            num_heads=num_heads,
            **_weights.from_llama(state, layer, num_heads, prefix=prefix, rotary_base=base, **given),
        )

    @classmethod
    def from_qwen(
        cls,
        state: State,
        layer: int,
        *,
        num_heads: int,
        config: Mapping[str, Any] | None = None,
        num_kv_heads: int | None = None,
        rotary_base: float | None = None,
        rope_parameters: Mapping[str, Any] | None = None,
        max_positions: int | None = None,
        norm_eps: float | None = None,
        sliding_window: int | None = None,
        prefix: str = "model.",
    ) -> Self:
        """
        From the weights of a layer of Qwen2 or Qwen3 with Hugging Face's names.

        Parameters
        ----------
        state : mapping from names to arrays, or path
            As for `from_torch`. It must hold ``layers.{layer}.self_attn.q_proj.weight``, ``k_proj``, ``v_proj`` and
            ``o_proj`` alike; their biases, and ``q_norm.weight`` and ``k_norm.weight``, are read if there.
        layer : int
            From 0 on.
        num_heads : int
            ``num_attention_heads`` of the model's config.json.
        config : mapping, optional
            The dict of the model's config.json: what it says of this layer is the default of the arguments below. One
            of another ``model_type``, or that asks for what the layer cannot do, is an error.
        num_kv_heads : int, optional
            ``num_key_value_heads``. Default: as follows from the size of ``k_proj``.
        rotary_base : float
            ``rope_theta``; it may also be in `rope_parameters`. Channels are paired across the halves of a head.
        rope_parameters : mapping, optional
            The dict of that name in config.json (in older files ``rope_scaling``), as `scaling` of
            `rotary_frequencies`. Its ``rope_theta`` takes precedence over `rotary_base`; with a
            ``partial_rotary_factor`` only the first part of each head is rotated.
        max_positions : int, optional
            ``max_position_embeddings``, which some dicts need.
        norm_eps : float, optional
            ``rms_norm_eps``; default 1e-6.
        sliding_window : int, optional
            ``sliding_window`` for a layer that has one (``layer_types``; nearly none has).
        prefix : str, default "model."
            Prefix of the names. If not given, and the names have exactly one other prefix, that is used.

        Returns
        -------
        MultiHeadAttention
            It holds ``is_causal=True``, and the window.

        Raises
        ------
        ValueError, TypeError, ImportError
            As for `from_bert`; and if `rope_parameters` has something unknown, or
            frequencies that change with the length of the sequence; and if half of ``q_proj`` are gates (Qwen3-Next).

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> at, rows = "model.layers.0.self_attn", {"q_proj": 16, "k_proj": 4, "v_proj": 4}
        >>> state = {f"{at}.{name}.weight": np.ones((n, 8), np.float32) for name, n in rows.items()}
        >>> state |= {f"{at}.o_proj.weight": np.ones((8, 16), np.float32)}
        >>> state |= {f"{at}.{name}.weight": np.ones(4, np.float32) for name in ("q_norm", "k_norm")}
        >>> layer = fastattn.MultiHeadAttention.from_qwen(state, 0, num_heads=4, rotary_base=1e6)
        >>> layer.num_kv_heads, layer.q_norm.shape, layer.is_causal
        (1, (4,), True)
        """
        num_heads = _heads(num_heads, "num_heads")
        given = _configuration.merged(
            "from_qwen",
            config,
            layer,
            num_heads,
            num_kv_heads=num_kv_heads,
            rope_parameters=rope_parameters,
            max_positions=max_positions,
            sliding_window=sliding_window,
            norm_eps=norm_eps,
        )
        eps = given.pop("norm_eps")
        arguments = _weights.from_qwen(state, layer, num_heads, prefix=prefix, rotary_base=rotary_base, **given)
        return cls(num_heads=num_heads, norm_eps=1e-6 if eps is None else eps, **arguments)

    @classmethod
    def from_gemma(
        cls,
        state: State,
        layer: int,
        *,
        num_heads: int,
        config: Mapping[str, Any] | None = None,
        num_kv_heads: int | None = None,
        query_pre_attn_scalar: float | None = None,
        sliding_window: int | None = None,
        attn_logit_softcapping: float | None = None,
        rotary_base: float | None = None,
        rope_parameters: Mapping[str, Any] | None = None,
        max_positions: int | None = None,
        norm_eps: float | None = None,
        prefix: str = "model.",
    ) -> Self:
        """
        From the weights of a layer of Gemma, Gemma 2 or Gemma 3 with Hugging Face's names.

        Parameters
        ----------
        state : mapping from names to arrays, or path
            As for `from_torch`. It must hold ``layers.{layer}.self_attn.q_proj.weight``, ``k_proj``, ``v_proj`` and
            ``o_proj`` alike; their biases, and ``q_norm.weight`` and ``k_norm.weight``, to which 1 is added, are read
            if there.
        layer : int
            From 0 on.
        num_heads : int
            ``num_attention_heads`` of the model's config.json.
        config : mapping, optional
            The dict of the model's config.json: what it says of this layer is the default of the arguments below. One
            of another ``model_type``, or that asks for what the layer cannot do, is an error.
        num_kv_heads : int, optional
            ``num_key_value_heads``. Default: as follows from the size of ``k_proj``.
        query_pre_attn_scalar : float, optional
            That of config.json, which Gemma 2 and 3 have: the layer's `scale` is ``query_pre_attn_scalar ** -0.5``.
            Default: ``1 / sqrt(head_dim)``, as in Gemma.
        sliding_window : int, optional
            ``sliding_window``, for layers that have one: in Gemma 2 those of even number, in Gemma 3 all but every
            sixth (``layer_types``). None for the others. A query sees so many keys, its own included.
        attn_logit_softcapping : float, optional
            That of config.json, which Gemma 2 has; the layer's `softcap`.
        rotary_base : float
            ``rope_theta``, in Gemma 3 ``rope_local_base_freq`` for layers with a window; it may also be in
            `rope_parameters`. Channels are paired across the halves of a head.
        rope_parameters : mapping, optional
            The dict of that name in config.json (in older files ``rope_scaling``), as `scaling` of
            `rotary_frequencies`. Its ``rope_theta`` takes precedence over `rotary_base`; with a
            ``partial_rotary_factor`` only the first part of each head is rotated. Gemma 3 has one for
            each kind of layer: give the one of this layer, ``config["rope_parameters"][config["layer_types"][layer]]``,
            or in older files ``rope_scaling`` for the layers without a window alone.
        max_positions : int, optional
            ``max_position_embeddings``, which some dicts need.
        norm_eps : float, optional
            ``rms_norm_eps``; default 1e-6.
        prefix : str, default "model."
            Prefix of the names. If not given, and the names have exactly one other prefix, that is used.

        Returns
        -------
        MultiHeadAttention
            It holds ``is_causal=True``, and the scale, window and soft cap.

        Raises
        ------
        ValueError, TypeError, ImportError
            As for `from_bert`; and if `rope_parameters` has something unknown, or
            frequencies that change with the length of the sequence; and for Gemma 3n and 4, whose values are normed.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> at, rows = "model.layers.0.self_attn", {"q_proj": 16, "k_proj": 4, "v_proj": 4}
        >>> state = {f"{at}.{name}.weight": np.ones((n, 8), np.float32) for name, n in rows.items()}
        >>> state |= {f"{at}.o_proj.weight": np.ones((8, 16), np.float32)}
        >>> state |= {f"{at}.{name}.weight": np.zeros(4, np.float32) for name in ("q_norm", "k_norm")}
        >>> layer = fastattn.MultiHeadAttention.from_gemma(
        ...     state, 0, num_heads=4, query_pre_attn_scalar=256, sliding_window=512, rotary_base=1e4
        ... )
        >>> layer.q_norm, layer.scale, layer.window_size
        (array([1., 1., 1., 1.], dtype=float32), 0.0625, (511, None))
        """
        num_heads = _heads(num_heads, "num_heads")
        given = _configuration.merged(
            "from_gemma",
            config,
            layer,
            num_heads,
            num_kv_heads=num_kv_heads,
            rope_parameters=rope_parameters,
            max_positions=max_positions,
            sliding_window=sliding_window,
            norm_eps=norm_eps,
            query_pre_attn_scalar=query_pre_attn_scalar,
            attn_logit_softcapping=attn_logit_softcapping,
        )
        eps = given.pop("norm_eps")
        arguments = _weights.from_gemma(state, layer, num_heads, prefix=prefix, rotary_base=rotary_base, **given)
        return cls(num_heads=num_heads, norm_eps=1e-6 if eps is None else eps, **arguments)

    @classmethod
    def from_keras(cls, weights: Sequence[Any] | Mapping[str, Any], *, prefix: str = "") -> Self:
        """
        From the weights of Keras' ``MultiHeadAttention`` or ``GroupQueryAttention``.

        Parameters
        ----------
        weights : list of arrays, or mapping from names to arrays
            What ``layer.get_weights()`` returns: kernels of query, key, value (d_model, heads, channels) and output
            (heads, channels, d_out), each followed by its bias, or none of them. Or the same by name: ``query/kernel``,
            ``query/bias``, ``key/kernel``, ..., ``attention_output/bias``.
        prefix : str, default ""
            Prefix of the names. If not given, and the names have exactly one other prefix, that is used.

        Returns
        -------
        MultiHeadAttention
            The number of heads follows from the shapes.

        Raises
        ------
        ValueError, TypeError
            If names are missing, or shapes do not fit.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> weights = [np.ones((8, 2, 4)), np.ones((8, 2, 4)), np.ones((8, 2, 3)), np.ones((2, 3, 8))]
        >>> fastattn.MultiHeadAttention.from_keras(weights)
        <MultiHeadAttention: 8 -> 2 heads of 4 -> 8, num_kv_heads=2, value_dim=3, float64>
        """
        return cls(**_weights.from_keras(weights, prefix))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock()

    def __repr__(self) -> str:
        rotary = "" if self.rotary_base is None else f", rotary_base={self.rotary_base:g}"
        if self.rotary_frequencies is not None:
            frequencies, attention_factor = self.rotary_frequencies
            rotary = f", rotary_frequencies=({len(frequencies)} angles, {attention_factor:g})"
        norms = "".join(f", {name}" for name in self._norms) + (f", norm_eps={self.norm_eps:g}" if self._norms else "")
        rules = "".join(
            f", {name} of shape {x.shape}" if isinstance(x, np.ndarray) else f", {name}={x!r}"
            for name, x in self._held.items()
        )
        return (
            f"<MultiHeadAttention: {self.d_model} -> {self.num_heads} heads of {self.head_dim} -> {self.d_out}, "
            f"num_kv_heads={self.num_kv_heads}, value_dim={self.value_dim}{rotary}{norms}{rules}, {self.dtype}>"
        )

    @property
    def _weights(self) -> Weights:
        """As arrays, which are made for this if the layer has them only packed."""
        return self._stored.weights()

    @property
    def w_query(self) -> NDArray[Any]:
        """Of shape (d_model, num_heads * head_dim)."""
        return self._named(self._weights)["w_query"]

    @property
    def w_key(self) -> NDArray[Any]:
        """Of shape (d_context, num_kv_heads * head_dim)."""
        return self._named(self._weights)["w_key"]

    @property
    def w_value(self) -> NDArray[Any]:
        """Of shape (d_context, num_kv_heads * value_dim)."""
        return self._named(self._weights)["w_value"]

    @property
    def w_out(self) -> NDArray[Any] | None:
        """Of shape (num_heads * value_dim, d_out)."""
        return self._weights.out

    @property
    def b_query(self) -> NDArray[Any] | None:
        """Of shape (num_heads * head_dim,)."""
        return self._named(self._weights).get("b_query")

    @property
    def b_key(self) -> NDArray[Any] | None:
        """Of shape (num_kv_heads * head_dim,)."""
        return self._named(self._weights).get("b_key")

    @property
    def b_value(self) -> NDArray[Any] | None:
        """Of shape (num_kv_heads * value_dim,)."""
        return self._named(self._weights).get("b_value")

    @property
    def b_out(self) -> NDArray[Any] | None:
        """Of shape (d_out,)."""
        return self._weights.b_out

    @property
    def q_norm(self) -> NDArray[Any] | None:
        """Of shape (head_dim,)."""
        return self._norms.get("q_norm")

    @property
    def k_norm(self) -> NDArray[Any] | None:
        """Of shape (head_dim,)."""
        return self._norms.get("k_norm")

    @property
    def norm_eps(self) -> float:
        """Added to the mean of squares, by `q_norm` and `k_norm`."""
        return self._norm_eps

    @property
    def is_causal(self) -> bool:
        """Whether calls are causal that do not say."""
        return bool(self._held.get("is_causal", False))

    @property
    def window_size(self) -> int | tuple[int | None, int | None] | None:
        """The window of calls that do not give one."""
        return cast("int | tuple[int | None, int | None] | None", self._held.get("window_size"))

    @property
    def relative_bias(self) -> NDArray[Any] | None:
        """Of calls that do not give one; it broadcasts to (num_heads, 1, left + right + 1)."""
        return self._held.get("relative_bias")

    @property
    def alibi_slopes(self) -> NDArray[Any] | None:
        """Of calls that do not give them; they broadcast to (num_heads,)."""
        return self._held.get("alibi_slopes")

    @property
    def scale(self) -> float | None:
        """Of calls that do not give one; None: ``1 / sqrt(head_dim)``."""
        return self._held.get("scale")

    @property
    def softcap(self) -> float | None:
        """Of calls that do not give one."""
        return self._held.get("softcap")

    @property
    def sinks(self) -> NDArray[Any] | None:
        """Of calls that do not give them; they broadcast to (num_heads,)."""
        return self._held.get("sinks")

    def _named(self, weights: Weights) -> dict[str, NDArray[Any]]:
        """Those that the layer has, by the names of its arguments."""
        n, of_keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        named = {"w_query": weights.query, "w_key": weights.context[:, :of_keys]}
        named["w_value"] = weights.context[:, of_keys:]
        if weights.out is not None:
            named["w_out"] = weights.out
        if weights.b_every is not None:
            parts = weights.b_every[:n], weights.b_every[n : n + of_keys], weights.b_every[n + of_keys :]
            for name, part, there in zip(("b_query", "b_key", "b_value"), parts, self._has_bias, strict=True):
                if there:
                    named[name] = part
        if weights.b_out is not None:
            named["b_out"] = weights.b_out
        return named

    def parameters(self) -> dict[str, NDArray[Any]]:
        """
        The layer's own arrays, to be written to: the next call uses what is written.

        Returns
        -------
        dict from str to ndarray
            ``w_query``, ``w_key``, ``w_value``, and ``w_out``, ``b_query``, ``b_key``, ``b_value``, ``b_out``,
            ``q_norm`` and ``k_norm`` where the layer has them: the names and shapes of its arguments, in the dtype in
            which they are multiplied (float32 for 16-bit weights). Those that multiply the same input are columns of
            one array in memory.

        Raises
        ------
        MemoryError
            After unpickling the memory of weights may be read-only; it is copied then.

        See Also
        --------
        vjp : gradients by the same names.

        Notes
        -----
        Write into the arrays, as in ``parameters["w_query"] -= step`` or ``parameters["w_query"][...] = new``. The dict
        is a new one at each call: an array put into it in place of another never reaches the layer.

        The arrays of rules that the layer holds are not among them: `sinks` or biases that are trained are given in
        each call, where they take the place of the layer's.

        `copy.copy` of a layer shares its memory, as that of a list shares its items; `copy.deepcopy` does not. No other
        thread may be in a call of the layer while it is written to.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> layer = fastattn.MultiHeadAttention(np.eye(4), np.eye(4), np.eye(4), num_heads=2, b_value=np.zeros(4))
        >>> parameters = layer.parameters()
        >>> {name: array.shape for name, array in parameters.items()}
        {'w_query': (4, 4), 'w_key': (4, 4), 'w_value': (4, 4), 'b_value': (4,)}
        >>> parameters["b_value"] += 1
        >>> layer(np.zeros((1, 4)))
        array([[1., 1., 1., 1.]])
        """
        free = self._stored.unlocked()
        unlocked = {name: _unlocked(w) for name, w in self._norms.items()}
        self._norms = {name: w for name, (w, _) in unlocked.items()}
        return self._named(free) | {name: view for name, (_, view) in unlocked.items()}

    @takes(LayerRules, like=dot_product_attention, held=HELD_RULES)
    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | ProjectedContext | None = None,
        *,
        cache: KVCache | None = None,
        cu_seqlens: ArrayLike | None = None,
        cu_seqlens_context: ArrayLike | None = None,
        **rules: Unpack[LayerRules],
    ) -> NDArray[Any] | tuple[NDArray[Any], ...]:
        """
        Attend from x to itself, to `context`, or to what is in the cache.

        Parameters
        ----------
        x : array_like, shape (..., L, d_model)
            The tokens that attend: a sequence of L, or a batch of them.
        context : array_like, shape (..., S, d_context), or ProjectedContext, optional
            The tokens attended to (cross-attention); its batch axes and those of x broadcast. Default: x. What
            `project_context` returned for a context takes its place, with the same results.
        cache : KVCache, optional
            x attends to the keys and values that are there and to those of x, which are appended. Its batch_shape must
            be the batch axes of x; `query_lengths` says how many rows of x count in each sequence. `context`,
            `key_lengths` and `query_offset` are not allowed with it: the cache knows them.
        cu_seqlens : array_like of int, shape (sequences + 1,), optional
            x is (total, d_model), sequences that are packed one after the other, as by `pack`: ``[0, n1, n1 + n2, ...,
            total]`` says where each begins and ends. Each attends to itself alone, and positions begin again in it,
            those of rotary encoding too. Refused with it are `cache`, `query_offset`, `key_lengths`, `query_lengths`,
            `mask`, `block_mask`, `bias` and `return_weights`; a `relative_bias` must be the same for all rows,
            (num_heads, 1, left + right + 1).
        cu_seqlens_context : array_like of int, shape (sequences + 1,), optional
            The same for `context`, (total, d_context): each sequence of x attends to that of context.
        is_causal, window_size, chunk_size, left_chunks : optional
            As for `dot_product_attention`. With a cache of ``window=w``, which drops old tokens, the default is
            ``window_size=(w - 1, None)``, unless there is a chunk rule; neither may let a query see more than w keys
            before its own.
        query_offset, key_lengths, query_lengths : int or array of int, optional
            As for `dot_product_attention`, but with the batch axes of x and none for the heads: ``(B,)`` for x (B, L,
            d_model). If x attends to itself, without a cache, `query_lengths` defaults to `key_lengths`: for a padded
            batch ``key_lengths=lengths`` is enough.
        mask, block_mask, block_size, bias, relative_bias : array_like, optional
            As for `dot_product_attention`; they broadcast to (..., num_heads, L, S), `block_mask` to (..., num_heads,
            ceil(L / rows), ceil(S / columns)), `relative_bias` to (..., num_heads, L, left + right + 1). S is the
            length of x or of `context`. With a cache, columns are the tokens that were there before the call, followed
            in each sequence by the new ones: S is ``max(cache.lengths + query_lengths)``, even if some are then
            dropped. A mask per sequence, not per head, is ``mask[:, None]``.
        alibi_slopes, sinks : array_like, optional
            As for `dot_product_attention`; ``(num_heads,)`` or broadcasting to (..., num_heads).
        scale, softcap, activation, num_threads : optional
            As for `dot_product_attention`. `scale` is by default ``1 / sqrt(head_dim)``. Of `is_causal`, `window_size`,
            `relative_bias`, `alibi_slopes`, `scale`, `softcap` and `sinks`, what the layer holds is the default
            (``<held>``); None or False is none. Another window than the layer's needs another `relative_bias` than
            the layer's, or None.
        return_weights : bool, "band" or sequence of int, default False
            As for `dot_product_attention`, for each head; or the numbers of those heads whose weights are wanted, in
            any order and as NumPy counts, -1 for the last one. Those of the others are not computed.
        return_lse : bool, default False
            As for `dot_product_attention`, for each head.
        out : ndarray, shape (..., L, d_out), optional
            Receives the output, of the output's dtype; must not overlap an input.

        Returns
        -------
        out : ndarray, shape (..., L, d_out)
            Of the dtype to which x, `context` and the weight matrices promote.
        weights : ndarray, shape (..., num_heads, L, S) or (..., num_heads, L, left + right + 1)
            Only with `return_weights`; (..., len(heads), L, S) for a sequence of heads. float64 if attention is in
            float64, else float32.
        lse : ndarray, shape (..., num_heads, L)
            Only with `return_lse`; of the same dtype.

        Raises
        ------
        ValueError, TypeError
            If an argument is not as above; the message names it, `out` is untouched and nothing is appended.
        MemoryError
            If there is no memory for the result, the projected arrays or the workspace. Nothing is appended then, nor
            if Ctrl-C ends a call (but tokens beyond the window of the cache may have been dropped).

        Notes
        -----
        A row of x that sees no key, such as one past the length of a sequence, has weights 0 and a log-sum-exp of -inf;
        its heads give 0, so its output is `b_out`, or 0 without it.

        Rotary encoding puts key j at position j and query i at ``query_offset + i``; with a cache, row i of x at
        ``cache.dropped + cache.lengths + i``, with the lengths before the call. With a cache, chunks too are counted
        from the first token ever appended. So, except for rounding, results do not depend on how tokens were split into
        calls, as long as no rule lets a query see past the tokens of its call.

        With a cache that has a window, queries attend to all new tokens before any is dropped: if there is no room for
        them beside those in the window, the call takes temporary memory for both.

        16-bit arrays are projected, and attended to, in float32; only the output is rounded. With a cache, attention is
        in the cache's dtype: query, key and value are rounded to it, and so is the output of the heads. Everything else
        is in the accumulation dtype, float64 for float64 and otherwise float32. With an int8 cache, keys and values are
        quantized before anything attends to them, those of x too, and attention is in float32.

        The projections are those of `Linear`: from the tokens on, the bits of a row do not depend on the batch, threads
        and padding, but calls of at most 8 rows of x or of `context`, counted over all axes but the last, use other
        loops.

        A layer keeps the projected arrays of its last step over a cache, up to 256 KiB, for the next one; threads that
        are in calls at the same time have arrays of their own, and results are always new ones.

        Examples
        --------
        Two sentences of 2 and 3 tokens, packed, and as each alone:

        >>> import numpy as np
        >>> import fastattn
        >>> rng = np.random.default_rng(0)
        >>> layer = fastattn.MultiHeadAttention(*rng.normal(size=(4, 8, 8)), num_heads=2, rotary_base=1e4)
        >>> x = rng.normal(size=(2, 3, 8))
        >>> packed, cu_seqlens = fastattn.pack(x, [2, 3])
        >>> out = fastattn.unpack(layer(packed, cu_seqlens=cu_seqlens), cu_seqlens)
        >>> bool(np.allclose(out[0, :2], layer(x[0, :2])) and np.allclose(out[1], layer(x[1])))
        True
        """
        rules = self._with_held(rules)
        if cu_seqlens is None and cu_seqlens_context is None:
            answer = None
            if cache is not None and context is None:
                answer = step(self, x, cache, rules)
            elif cache is None and isinstance(context, ProjectedContext):
                answer = look(self, x, context, rules)
            if answer is not None:
                return answer
        refuse_others(rules, LayerRules, "MultiHeadAttention.__call__")
        if cu_seqlens is not None or cu_seqlens_context is not None:
            return self._packed(x, context, cache, cu_seqlens, cu_seqlens_context, rules)
        if isinstance(cache, KVCache):
            with cache._turn:
                return self._answered(x, context, cache, rules)
        return self._answered(x, context, cache, rules)

    def _answered(self, x: Any, context: Any, cache: Any, rules: LayerRules) -> NDArray[Any] | tuple[NDArray[Any], ...]:
        """A call; a cache is this call's alone."""
        return self._carried_out(self._checked(x, context, cache, rules), cache)

    def _packed(
        self, x: Any, context: Any, cache: Any, cu_seqlens: Any, cu_seqlens_context: Any, rules: LayerRules
    ) -> NDArray[Any] | tuple[NDArray[Any], ...]:
        """A call with packed sequences."""
        given = {**rules, "cache": cache}
        if isinstance(context, ProjectedContext):
            given["a projected context"] = context
        for name in (*NOT_PACKED, "cache", "a projected context"):
            if given.get(name) is not None and (name != "return_weights" or given[name] is not False):
                raise ValueError(
                    f"{name} and cu_seqlens do not go together: {NOT_PACKED.get(name, 'pass each by itself')}"
                )
        if cu_seqlens is None:
            raise ValueError("cu_seqlens_context needs cu_seqlens, which says where the sequences of x begin and end")
        if (cu_seqlens_context is None) != (context is None):
            raise ValueError(
                "context and cu_seqlens_context go together: it says where sequences of context begin and end"
            )
        call = self._checked(x, context, None, rules, packed=True)
        for a, name in ((call.tokens, "x"), (call.context, "context")):
            if a is not None and a.ndim != 2:
                raise ValueError(f"{name} has shape {a.shape}; with cu_seqlens it must be (total, {a.shape[-1]})")
        if rules.get("relative_bias") is not None:
            rules["relative_bias"] = bias = as_array(rules["relative_bias"], "relative_bias")
            if bias.ndim > 1 and bias.shape[-2] != 1:
                raise ValueError(
                    f"relative_bias has shape {bias.shape}; with cu_seqlens it must be the same for all rows, "
                    f"(num_heads, 1, left + right + 1)"
                )
        own = other = starts(cu_seqlens, "cu_seqlens", call.length, "x's axis -2")
        if call.context is not None:
            other = starts(cu_seqlens_context, "cu_seqlens_context", call.num_keys, "context's axis -2")
            if len(own) != len(other):
                raise ValueError(
                    f"cu_seqlens_context has {len(other)} numbers and cu_seqlens {len(own)}: both must describe "
                    f"the same sequences"
                )
        if self._longest is not None:
            self._check_longest(int(np.diff(other).max(initial=0)), rules)
        return self._carried_out(call._replace(starts=(own, other)), None)

    def _carried_out(self, call: _Call, cache: Any) -> NDArray[Any] | tuple[NDArray[Any], ...]:
        """What a checked call answers."""
        came: Any = None
        step: Any = None
        if cache is not None:
            came, old = self._checked_step(call, cache)
        products = self._products_in(call.accumulation)
        with np.errstate(all="ignore"):
            query, new_key, new_value, both = self._projected(call, products)
            if self.rotary_dim is not None:
                self._rotate(call, cache, query, new_key, both)
            key, value = new_key, new_value
            if cache is not None:
                step = cache._begin_step(new_key, new_value, came, old)
                query = query.astype(cache._computed, copy=False)
                key, value, call.rules["key_lengths"] = step.key, step.value, step.lengths
            heads, rest = self._attended(call, products, query, key, value, step)
            result = self._joined(call, products, heads)
            if cache is not None:
                cache._end_step(step, came)
        return (result, *rest) if rest else result

    def project_context(self, context: ArrayLike, context_lengths: int | ArrayLike | None = None) -> ProjectedContext:
        """
        The keys and values of a context, for calls that look at it again and again.

        A decoder that attends at every step to what an encoder has read spends most of its time projecting it, unless
        that is done once: ``layer(x, projected)`` is ``layer(x, context)``.

        Parameters
        ----------
        context : array_like, shape (..., S, d_context)
            The tokens attended to.
        context_lengths : int or array_like of int, optional
            How many of the S tokens count, an integer or one for each sequence, (B,) for context (B, S, d_context).
            Calls then take no `key_lengths`. Default: all, or those that a call says.

        Returns
        -------
        ProjectedContext
            To be passed to calls of this layer, or of a copy of it, as `context`. It has ``key``, ``value`` (both
            read-only, and of the shapes that `dot_product_attention` takes), ``lengths``, ``dtype`` and ``nbytes``, and
            can be pickled.

        Raises
        ------
        ValueError, TypeError
            If an argument is not as above, or if the layer rotates queries and keys, whose positions have no common
            origin with those of a context.
        MemoryError
            If there is no memory for it.

        Notes
        -----
        Its batch axes and those of x broadcast: beams (B, beams, L, d_model) look at a context (B, 1, S, d_context)
        that is there once. What is written to `parameters` afterwards does not reach it.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> rng = np.random.default_rng(0)
        >>> layer = fastattn.MultiHeadAttention(*rng.normal(size=(4, 8, 8)), num_heads=2)
        >>> x, context = rng.normal(size=(3, 1, 8)), rng.normal(size=(3, 50, 8))
        >>> projected = layer.project_context(context, context_lengths=[50, 20, 30])
        >>> projected
        <ProjectedContext: key (3, 2, 50, 4), value (3, 2, 50, 4), with lengths, float64>
        >>> out = layer(x, projected)
        >>> bool((out == layer(x, context, key_lengths=[50, 20, 30])).all())
        True
        """
        if self.rotary_dim is not None:
            given = "rotary_base" if self.rotary_frequencies is None else "rotary_frequencies"
            raise ValueError(
                f"context and {given} do not go together: positions in x and in context have no common origin"
            )
        tokens = _tokens(context, "context", "S", "w_key", self.d_context)
        axes, dtype = tokens.shape[:-1], common_dtype([tokens.dtype, self.dtype], ("context", "the weights"))
        lengths = _per_sequence(context_lengths, "context_lengths", axes[:-1], axes[-1])
        if isinstance(lengths, np.ndarray):
            lengths = np.array(lengths[..., 0], np.int64)
        accumulation = accumulation_of(dtype)
        of_keys, products = self.num_kv_heads * self.head_dim, self._products_in(accumulation)
        with np.errstate(all="ignore"):
            whole = project(tokens.reshape(math.prod(axes), self.d_context), products.context)
        key, value = (
            np.array(_by_head(part, axes, self.num_kv_heads, channels), order="C")
            for part, channels in ((whole[:, :of_keys], self.head_dim), (whole[:, of_keys:], self.value_dim))
        )
        if "k_norm" in self._norms:
            rms_norm(key, self._norm("k_norm", accumulation), eps=self.norm_eps, out=key)
        return ProjectedContext(key, value, lengths, dtype, self._mark)

    @takes(LayerGradientRules, like=dot_product_attention, held=HELD_RULES)
    def vjp(
        self,
        x: ArrayLike,
        context: ArrayLike | None = None,
        **rules: Unpack[LayerGradientRules],
    ) -> tuple[NDArray[Any], Callable[..., dict[str, NDArray[Any]]]]:
        """
        A call, and the function that takes the gradient of a loss for its output back to all that led there.

        Parameters
        ----------
        x, context : array_like
            As for a call.
        is_causal, window_size, chunk_size, left_chunks, query_offset, key_lengths, query_lengths, mask, block_mask
            As for a call.
        block_size, bias, relative_bias, alibi_slopes, scale, softcap, sinks, activation, num_threads
            As for a call; `num_threads` also bounds the threads of the way back.

        Returns
        -------
        out : ndarray, shape (..., L, d_out)
            What ``layer(x, context, ...)`` returns, to the bit.
        backward : callable
            ``backward(grad_out, wrt=None)`` takes the gradient of the loss for `out`, of its shape, and returns a dict
            from names to gradients: "x"; "context" if given; "w_query", "w_key", "w_value", "w_out", "b_query",
            "b_key", "b_value", "b_out", "q_norm" and "k_norm", those that the layer has; and, only if they are named in
            `wrt`, "bias", "relative_bias", "alibi_slopes" and "sinks", those that were given or that the layer holds.
            wrt: a name or a tuple of names; only their gradients are computed, and no bit of them depends on the
            others; ``tuple(layer.parameters())`` leaves out those of x and `context`. It may be called more than once.

        Raises
        ------
        ValueError, TypeError
            If an argument is not as above; the message names it. Also from `backward`.
        MemoryError
            If there is no memory for the results, the projected arrays or the workspace.

        See Also
        --------
        parameters : the layer's own arrays by the same names, to be written to.
        dot_product_attention_vjp : attention alone, and what is promised of its gradients.

        Notes
        -----
        A gradient has the shape and dtype of its array (float64 for integers); those of weights have that of the
        layer's own arrays, which is float32 for 16 bits. Without a context the gradient of x is the sum of its uses as
        query, key and value. Rotated queries and keys are turned back.

        Rows of x past `query_lengths` are padding: what stands there, in x and in `grad_out`, gives nothing to any
        gradient, not even to that of `b_out`, and their own gradient is 0. A hidden token of x or `context`, which
        nobody sees, gives nothing either, be it NaN.

        `backward` keeps the projected arrays, a copy of x and `context`, and the output of the heads. It reads the
        weights, and the arrays of rules such as a mask, when it is called: change them afterwards.

        Matrix products are NumPy's. Those that sum over tokens are split into blocks, so that no error grows with the
        number of tokens; the promise of same bits for all batches and threads only holds for attention between them.

        Examples
        --------
        A step of gradient descent:

        >>> import numpy as np
        >>> import fastattn
        >>> rng = np.random.default_rng(0)
        >>> layer = fastattn.MultiHeadAttention(*rng.normal(size=(4, 8, 8)) / 3, num_heads=2, b_out=np.zeros(8))
        >>> x, target = rng.normal(size=(2, 3, 5, 8))
        >>> out, backward = layer.vjp(x, is_causal=True)
        >>> gradients = backward(2 * (out - target))  # of the sum of squares
        >>> sorted(gradients)
        ['b_out', 'w_key', 'w_out', 'w_query', 'w_value', 'x']
        >>> before = np.sum((out - target) ** 2)
        >>> for name, array in layer.parameters().items():
        ...     array -= 0.002 * gradients[name]
        >>> bool(np.sum((layer(x, is_causal=True) - target) ** 2) < before)
        True
        """
        if "wrt" in rules:
            raise TypeError("MultiHeadAttention.vjp() takes no wrt: the function that it returns does, after grad_out")
        refuse_others(rules, LayerGradientRules, "MultiHeadAttention.vjp")
        if isinstance(context, ProjectedContext):
            raise TypeError(
                "MultiHeadAttention.vjp() takes the context itself, whose gradient it gives: not a projected one"
            )
        call = self._checked(x, context, None, {**self._with_held(rules)})
        weights = self._weights_in(call.accumulation)
        products = self._products_in(call.accumulation)
        dtypes = {"x": call.tokens.dtype, "context": None if call.context is None else call.context.dtype}
        with np.errstate(all="ignore"):
            # Copies: a residual connection, x += out, may come before the way back.
            call = call._replace(
                tokens=np.array(call.tokens, call.accumulation, order="C"),
                context=None if call.context is None else np.array(call.context, call.accumulation, order="C"),
            )
            raw: dict[str, NDArray[Any]] = {}
            query, key, value, both = self._projected(call, products, raw)
            if self.rotary_dim is not None:
                self._rotate(call, None, query, key, both)
            asked = call
            activation = call.rules.get("activation", "softmax")
            if isinstance(activation, str) and activation == "softmax":
                asked = call._replace(rules={**call.rules, "return_lse": True})
            heads, rest = self._attended(asked, products, query, key, value, None)
            out = self._joined(call, products, heads)
        lse = rest[0] if rest else None

        def backward(grad_out: ArrayLike, wrt: str | Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
            """The gradients for the arrays named in `wrt`, by name; see `MultiHeadAttention.vjp`."""
            return self._back(call, weights, (query, key, value), raw, heads, lse, dtypes, grad_out, wrt)

        return (heads.copy() if out is heads else out), backward

    def _back(
        self,
        call: _Call,
        weights: Weights,
        attended: tuple[NDArray[Any], ...],
        raw: dict[str, NDArray[Any]],
        heads: NDArray[Any],
        lse: NDArray[Any] | None,
        dtypes: dict[str, Any],
        grad_out: Any,
        wrt: Any,
    ) -> dict[str, NDArray[Any]]:
        """The gradients of a call."""
        named = self._named(self._weights) | self._norms
        given: dict[str, Any] = {"x": call.tokens, "context": call.context}
        given |= {f"{kind}_{name}": named.get(f"{kind}_{name}") for kind in "wb" for name in (*QUERY_KEY_VALUE, "out")}
        given |= {name: named.get(name) for name in NORMS.values()}
        usual = tuple(name for name, a in given.items() if a is not None)
        given |= {name: call.rules.get(name) for name in ADDED}
        names = read_names(usual if wrt is None else wrt, given)
        grad = read_gradient(grad_out, (*call.batch, call.length, self.d_out))
        gradients: dict[str, NDArray[Any]] = {}
        with np.errstate(all="ignore"):
            grad = _without_padding(call, rows_of(grad, call.accumulation))
            if "w_out" in names:
                gradients["w_out"] = outer_sum(heads.reshape(len(grad), heads.shape[-1]), grad)
            if "b_out" in names:
                gradients["b_out"] = sum_of_rows(grad)
            if set(names) - gradients.keys():
                d_heads = grad if weights.out is None else np.matmul(grad, weights.out.T)
                self._back_from_heads(call, weights, attended, raw, heads, lse, d_heads, names, gradients)
            return {
                name: d if name in ADDED else d.astype(dtypes.get(name) or self._accumulation, copy=False)
                for name, d in ((name, gradients[name]) for name in names)
            }

    def _back_from_heads(
        self,
        call: _Call,
        weights: Weights,
        attended: tuple[NDArray[Any], ...],
        raw: dict[str, NDArray[Any]],
        heads: NDArray[Any],
        lse: NDArray[Any] | None,
        d_heads: NDArray[Any],
        names: tuple[str, ...],
        gradients: dict[str, NDArray[Any]],
    ) -> None:
        """Add the gradients of everything before the output projection; d_heads: that of the heads, side by side; raw:
        queries and keys before their norms."""
        other = "x" if call.context is None else "context"
        sources = dict(zip(QUERY_KEY_VALUE, ("x", other, other), strict=True))
        used = [name for name, x in sources.items() if {x, f"w_{name}", f"b_{name}", NORMS.get(name)} & set(names)]
        added = [name for name in ADDED if name in names]

        # The gradients of query, key and value, side by side where their weights are.
        tokens = rows_of(call.tokens, call.accumulation)
        context = tokens if call.context is None else rows_of(call.context, call.accumulation)
        axes = call.tokens.shape[:-1]
        other_axes = axes if call.context is None else call.context.shape[:-1]
        n, of_keys = weights.query.shape[1], self.num_kv_heads * self.head_dim
        if call.context is None:
            whole = empty((len(tokens), n + weights.context.shape[1]), call.accumulation)
            d_query, d_context = whole[:, :n], whole[:, n:]
        else:
            d_query = empty((len(tokens), n), call.accumulation)
            d_context = empty((len(context), weights.context.shape[1]), call.accumulation)
        targets = dict(zip(QUERY_KEY_VALUE, self._heads(d_query, d_context, axes, other_axes), strict=True))

        shape, rules = (*call.batch, call.length), cast("GradientRules", call.rules)
        answer = dot_product_attention_vjp(
            _by_head(d_heads, shape, self.num_heads, self.value_dim),
            *attended,
            wrt=(*used, *added),
            output=None if lse is None else _by_head(heads, shape, self.num_heads, self.value_dim),
            lse=lse,
            out=(*(targets[name] for name in used), *[None] * len(added)),
            **rules,
        )
        gradients.update(zip(added, answer[len(used) :], strict=True))
        if self.rotary_dim is not None:
            # A layer that rotates has no context.
            together = self._query_and_key(whole, axes) if {"query", "key"} <= set(used) else None
            turned = {name: targets[name] for name in used}
            self._rotate(call, None, turned.get("query"), turned.get("key"), together, back=True)
        for name in used:
            if name in raw:
                weight = self._norm(NORMS[name], call.accumulation)
                gradients[NORMS[name]] = _rms_norm_vjp(targets[name], raw[name], weight, self.norm_eps)

        flat = dict(zip(QUERY_KEY_VALUE, (d_query, d_context[:, :of_keys], d_context[:, of_keys:]), strict=True))
        for name in used:
            if f"w_{name}" in names:
                gradients[f"w_{name}"] = outer_sum(tokens if name == "query" else context, flat[name])
            if f"b_{name}" in names:
                gradients[f"b_{name}"] = sum_of_rows(flat[name])
        if "x" in names:
            if call.context is None:
                assert weights.every is not None
                d_x = np.matmul(whole, weights.every.T)
            else:
                d_x = np.matmul(d_query, weights.query.T)
            gradients["x"] = d_x.reshape(call.tokens.shape)
        if call.context is not None and "context" in names:
            gradients["context"] = np.matmul(d_context, weights.context.T).reshape(call.context.shape)

    def _with_held(self, rules: Any) -> Any:
        """The rules of a call, and what the layer holds where the call has none."""
        if not self._held and all(a is not HELD for a in rules.values()):
            return rules
        rules = {**self._held, **{name: a for name, a in rules.items() if a is not HELD}}
        bias, window = self._held.get("relative_bias"), self._held.get("window_size")
        if bias is not None and rules["relative_bias"] is bias and rules["window_size"] is not window:
            given = _sides(rules["window_size"], rules.get("is_causal"))
            if given != _sides(window, self.is_causal):
                raise ValueError(
                    f"window_size={rules['window_size']!r} does not go with the relative_bias that the layer holds, "
                    f"which is for window_size={window!r}: give a relative_bias too, or None for none"
                )
        return rules

    def _checked(self, x: Any, context: Any, cache: Any, rules: LayerRules, packed: bool = False) -> _Call:
        """Check the arguments; rules include those that the layer holds."""
        tokens = _tokens(x, "x", "L", "w_query", self.d_model)
        other = None
        batch, length = tokens.shape[:-2], tokens.shape[-2]
        num_keys = length
        projected = context if isinstance(context, ProjectedContext) else None
        if context is not None:
            if self.rotary_dim is not None:
                given = "rotary_base" if self.rotary_frequencies is None else "rotary_frequencies"
                raise ValueError(
                    f"context and {given} do not go together: positions in x and in context have no common origin"
                )
            if cache is not None:
                raise ValueError("context and cache do not go together: a cache grows by the keys of x itself")
            if projected is None:
                other = _tokens(context, "context", "S", "w_key", self.d_context)
                of_context, num_keys = other.shape[:-2], other.shape[-2]
            else:
                if projected._of != self._mark:
                    raise ValueError(
                        f"context is {projected!r}, which another layer has projected: each layer projects it itself"
                    )
                of_context, num_keys = projected.key.shape[:-3], projected.key.shape[-2]
            if of_context != batch:
                try:
                    batch = np.broadcast_shapes(batch, of_context)
                except ValueError as error:
                    had = f"shape {other.shape}" if other is not None else f"the batch axes {of_context}"
                    raise ValueError(
                        f"context has {had} and x {tokens.shape}: their batch axes do not broadcast"
                    ) from error
        elif self.d_model != self.d_context:
            raise ValueError(
                f"w_query has {self.d_model} rows and w_key {self.d_context}: this layer needs a context, "
                f"(..., S, {self.d_context})"
            )
        if self._longest is not None and cache is None and not packed:
            self._check_longest(num_keys, rules)
        dtype, others = self.dtype, projected or (tokens if other is None else other)
        if not (tokens.dtype == dtype == others.dtype):
            dtype = common_dtype([tokens.dtype, others.dtype, dtype], ("x", "context", "the weights"))
        key_lengths, query_lengths, query_offset = (
            rules.get(name) for name in ("key_lengths", "query_lengths", "query_offset")
        )
        if cache is not None and key_lengths is not None:
            raise ValueError("key_lengths and cache do not go together: the cache knows its lengths")
        if cache is not None and query_offset is not None:
            raise ValueError("query_offset and cache do not go together: the rows of x follow what is in the cache")
        if projected is not None and projected.lengths is not None:
            if key_lengths is not None:
                raise ValueError(
                    "key_lengths and a context projected with context_lengths do not go together: it knows them"
                )
            key_lengths = projected.lengths
            if not isinstance(key_lengths, int):
                key_lengths = key_lengths.reshape((1,) * (len(batch) - key_lengths.ndim) + key_lengths.shape)
        keys_valid = rows_valid = _per_sequence(key_lengths, "key_lengths", batch, num_keys)
        if query_lengths is not None or context is not None or cache is not None:
            rows_valid = _per_sequence(query_lengths, "query_lengths", batch, length)
        offset = _per_sequence(query_offset, "query_offset", batch)
        out = rules.get("out")
        if out is not None:
            _check_out(out, (*batch, length, self.d_out), dtype, {"x": x, "context": context}, rules)
        weights_of = _heads_of_weights(rules.get("return_weights"), self.num_heads)
        every: Rules = {
            **rules,
            "enable_gqa": self.num_heads != self.num_kv_heads,
            "key_lengths": keys_valid,
            "query_lengths": rows_valid,
            "query_offset": offset,
        }
        if weights_of is not None:
            every["return_weights"] = False
        return _Call(
            tokens,
            other,
            batch,
            length,
            num_keys,
            dtype,
            accumulation_of(dtype),
            out,
            every,
            projected,
            None,
            weights_of,
        )

    def _checked_step(self, call: _Call, cache: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many tokens come into each sequence of a cache, and how many of those there are kept beside them. Checks
        the rules too: nothing may be appended if one is wrong."""
        rules = call.rules
        came = self._came(cache, call.batch, call.length, rules["query_lengths"])
        if cache.window is not None and rules.get("window_size") is None and rules.get("chunk_size") is None:
            rules["window_size"] = cache.window - 1, None
        # The columns of a matrix are all tokens that are there.
        columns = any(rules.get(name) is not None for name in ("mask", "block_mask", "bias"))
        columns = columns or call.weights_of is not None
        old = cache._beside(came, columns or rules.get("return_weights", False) not in (False, "band"))
        num_keys = int((old + came).max(initial=0))
        if self._longest is not None:
            self._check_longest(int((cache.dropped + cache.lengths + came).max(initial=0)), rules)
        check(
            (*call.batch, self.num_heads, call.length, self.head_dim),
            (*call.batch, self.num_kv_heads, num_keys, self.head_dim),
            (*call.batch, self.num_kv_heads, num_keys, self.value_dim),
            cache._computed,
            rules,
        )
        if cache.window is not None:
            _check_reach(cache.window, rules)
        return came, old

    def _check_longest(self, num_keys: int, rules: Any) -> None:
        """Check that the relative biases that the layer holds reach over all keys, where a call uses them."""
        longest = self._longest or 0
        if num_keys > longest and rules.get("relative_bias") is self._held.get("relative_bias"):
            raise ValueError(
                f"there are {num_keys} keys; this layer holds the relative biases of sequences of up to "
                f"max_length={longest} tokens, and would ignore keys further away: load it with a larger max_length"
            )

    def _norm(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The weight of a norm in the dtype of a call's products."""
        weight = self._norms[name]
        if dtype == weight.dtype:
            return weight
        with_digits = _digits(self._norms_given[name], weight)
        assert with_digits is not None
        return with_digits.astype(dtype)

    def _weights_in(self, dtype: np.dtype[Any]) -> Weights:
        """The weights in the dtype of a call's products."""
        weights = self._weights
        if dtype == self._accumulation:
            return weights
        b_every, b_out = _digits(self._b_every, weights.b_every), _digits(self._b_out, weights.b_out)
        return Weights.of(self.w_query, (self.w_key, self.w_value), self.w_out, b_every, b_out, dtype)

    def _products_in(self, dtype: np.dtype[Any]) -> Products:
        """The same, packed."""
        return self._stored.products() if dtype == self._accumulation else Products.of(self._weights_in(dtype))

    def _projected(
        self, call: _Call, products: Products, raw: dict[str, NDArray[Any]] | None = None
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """From tokens to heads: query, key and value; and, to rotate them together, query and key as one array. raw:
        receives copies of queries and keys before their norms, if they have norms."""
        accumulation, num_threads = call.accumulation, call.rules.get("num_threads")
        of_query, axes, both = products.query.d_out, call.tokens.shape[:-1], None
        rows = math.prod(axes)
        tokens = call.tokens.reshape(rows, self.d_model)
        context, other_axes = tokens, axes
        if call.context is None and call.projected is None:
            whole = empty((rows, of_query + products.context.d_out), accumulation)
            query, other = whole[:, :of_query], whole[:, of_query:]
            if self.rotary_dim is not None:
                both = self._query_and_key(whole, axes)
        else:
            query = empty((rows, of_query), accumulation)
            if call.context is not None:
                other_axes = call.context.shape[:-1]
                context = call.context.reshape(math.prod(other_axes), self.d_context)
                other = empty((len(context), products.context.d_out), accumulation)
        project(tokens, products.query, query, num_threads)
        if call.projected is None:
            project(context, products.context, other, num_threads)
            every = self._heads(query, other, axes, other_axes)
        else:
            every = (
                _by_head(query, axes, self.num_heads, self.head_dim),
                call.projected.key,
                call.projected.value,
            )
        if self._norms:
            for which, heads in zip(QUERY_KEY_VALUE[:2], every, strict=False):
                if NORMS[which] in self._norms and not (which == "key" and call.projected is not None):
                    if raw is not None:
                        raw[which] = heads.copy()
                    weight = self._norm(NORMS[which], accumulation)
                    rms_norm(heads, weight, eps=self.norm_eps, out=heads, num_threads=num_threads)
        return (*every, both)

    def _heads(
        self, query: NDArray[Any], context: NDArray[Any], axes: tuple[int, ...], other_axes: tuple[int, ...]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Query, key and value of attention, as views; context: rows of key and value side by side."""
        of_keys = self.num_kv_heads * self.head_dim
        return (
            _by_head(query, axes, self.num_heads, self.head_dim),
            _by_head(context[:, :of_keys], other_axes, self.num_kv_heads, self.head_dim),
            _by_head(context[:, of_keys:], other_axes, self.num_kv_heads, self.value_dim),
        )

    def _query_and_key(self, whole: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
        heads = self.num_heads + self.num_kv_heads
        return _by_head(whole[:, : heads * self.head_dim], axes, heads, self.head_dim)

    def _rotate(
        self,
        call: _Call,
        cache: KVCache | None,
        query: NDArray[Any] | None,
        key: NDArray[Any] | None,
        both: NDArray[Any] | None,
        back: bool = False,
    ) -> None:
        """Rotate queries and keys by their positions, in place; together if they have the same positions. back: rotate
        gradients, the other way; of those that are there."""
        rules = call.rules
        rows_valid: Any = rules["query_lengths"]
        keys_valid: Any = rules["key_lengths"]
        first: Any = rules["query_offset"]
        if call.starts is not None:
            # A layer that rotates has no context.
            begins = call.starts[0]
            positions = np.arange(call.length) - np.repeat(begins[:-1], np.diff(begins))
            assert both is not None
            self._turn(both, 0, rules.get("num_threads"), back, positions)
            return
        if cache is not None:
            first = cache.dropped + cache.lengths
        elif first is None and rows_valid is keys_valid:
            first = 0
        elif first is None:
            first = call.num_keys if keys_valid is None else keys_valid
            first = first - (call.length if rows_valid is None else rows_valid)
        if both is not None and (cache is not None or (type(first) is int and first == 0)):
            self._turn(both, first, rules.get("num_threads"), back)
        else:
            if query is not None:
                self._turn(query, first, rules.get("num_threads"), back)
            if key is not None:
                self._turn(key, 0, rules.get("num_threads"), back)

    def _attended(
        self, call: _Call, products: Products, query: NDArray[Any], key: NDArray[Any], value: NDArray[Any], step: Any
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...]]:
        """Attention, written with the heads side by side; and whatever else the call returns."""
        shape = (*call.batch, call.length, self.num_heads * self.value_dim)
        heads = call.out
        if heads is None or products.out is not None or query.dtype != call.dtype:
            heads = empty(shape, query.dtype)
        by_head = _by_head(heads, shape[:-1], self.num_heads, self.value_dim)
        before = None if step is None or call.rules.get("chunk_size") is None else step.dropped
        scales = None if step is None else step.scales
        rules = {**call.rules, "out": None}
        if call.starts is not None:
            answer = attend_packed(query, key, value, *call.starts, rules, by_head)
        else:
            answer = attend(query, key, value, rules, keys_before=before, own=by_head, quantized=scales)
        rest = answer[1:] if isinstance(answer, tuple) else ()
        if call.weights_of is not None:
            rest = (self._weights_of(call, query, key, before, scales), *rest)
        return heads, rest

    def _weights_of(
        self, call: _Call, query: NDArray[Any], key: NDArray[Any], before: Any, scales: Any
    ) -> NDArray[Any]:
        """The weights of some heads, which are attended to once more, to values without channels."""
        heads: Any = call.weights_of
        rules: dict[str, Any] = {
            **call.rules,
            "out": None,
            "enable_gqa": False,
            "return_weights": True,
            "return_lse": False,
        }
        for name, axis in OF_HEADS.items():
            a = rules.get(name)
            if a is not None and np.ndim(a) >= -axis and np.shape(a)[axis] != 1:
                rules[name] = np.take(a, heads, axis)
        of_keys = heads // (self.num_heads // self.num_kv_heads)
        key = key[..., of_keys, :, :]
        nothing = empty((*key.shape[:-1], 0), key.dtype)
        if scales is not None:
            key_scale, _, center = scales
            scales = key_scale[..., of_keys, :, :], 1.0, None if center is None else center[..., of_keys, :, :]
        return attend(query[..., heads, :, :], key, nothing, rules, keys_before=before, quantized=scales)[1]

    def _joined(self, call: _Call, products: Products, heads: NDArray[Any]) -> NDArray[Any]:
        """From heads to tokens."""
        dtype, out = call.dtype, call.out
        if products.out is None:
            return heads if heads.dtype == dtype else rounded(heads, dtype, out)
        result = empty((*call.batch, call.length, self.d_out), dtype) if out is None else out
        return dense(products.out, heads, dtype, None, None, None, result, call.rules.get("num_threads"))

    def _turn(
        self, heads: NDArray[Any], offset: Any, num_threads: int | None, back: bool, positions: Any = None
    ) -> None:
        """Rotate queries or keys by their positions, in place; back: gradients, the other way."""
        base = 10000.0 if self.rotary_base is None else self.rotary_base
        frequencies, attention_factor = self.rotary_frequencies or (None, 1.0)
        apply_rotary(
            heads,
            offset=offset,
            positions=positions,
            base=base,
            frequencies=frequencies,
            attention_factor=attention_factor,
            interleaved=self.rotary_interleaved,
            rotary_dim=self.rotary_dim,
            inverse=back,
            out=heads,
            num_threads=num_threads,
        )

    def _came(self, cache: Any, batch: tuple[int, ...], length: int, query_lengths: Any) -> NDArray[np.int64]:
        """Check that the cache fits; return how many rows of x count in each sequence, on one batch axis."""
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a fastattn.KVCache, not {type(cache).__name__}")
        sizes = self.num_kv_heads, self.head_dim, self.value_dim
        have = cache.key.shape[:-2], cache.key.shape[-1], cache.value.shape[-1]
        if have != ((*batch, sizes[0]), *sizes[1:]):
            raise ValueError(
                f"cache has batch_shape={have[0][:-1]}, num_kv_heads={have[0][-1]}, head_dim={have[1]} and "
                f"value_dim={have[2]}; for this layer and the batch axes of x it must have batch_shape={batch}, "
                f"num_kv_heads={sizes[0]}, head_dim={sizes[1]} and value_dim={sizes[2]}"
            )
        if isinstance(query_lengths, np.ndarray):
            query_lengths = np.broadcast_to(query_lengths, (*batch, 1))
        return cache._counts(query_lengths, length)


def _by_head(flat: NDArray[Any], axes: tuple[int, ...], count: int, channels: int) -> NDArray[Any]:
    """Rows whose heads are side by side, as (..., heads, rows, channels)."""
    return flat.reshape(*axes, count, channels).swapaxes(-2, -3)


def _unlocked(a: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """A read-only array, or a copy if its memory is read-only itself, and a view through which it can be written to."""
    try:
        a.flags.writeable = True
    except ValueError:
        a = a.copy()
    view = a.view()
    a.flags.writeable = False
    return a, view


def _inverse_rms(x: NDArray[Any], eps: float) -> NDArray[Any]:
    """1 / sqrt(mean(x**2) + eps) over the last axis, which stays."""
    mean = np.einsum("...c,...c->...", x, x)[..., None] / x.shape[-1]
    if np.isfinite(mean).all():
        return 1 / np.sqrt(mean + eps)
    # Squares overflow long before numbers do.
    largest = np.max(np.abs(x), axis=-1, keepdims=True)
    small = x / largest
    long_way = 1 / largest / np.sqrt(np.mean(small * small, axis=-1, keepdims=True))
    return np.where(np.isfinite(mean) | ~np.isfinite(largest), 1 / np.sqrt(mean + eps), long_way)


def _rms_norm_vjp(d_y: NDArray[Any], x: NDArray[Any], weight: NDArray[Any], eps: float) -> NDArray[Any]:
    """The way back: d_y becomes the gradient for x, and that for the weight is returned. A row whose gradient is 0
    takes no part, whatever it is, as in `outer_sum`."""
    inverse, used = _inverse_rms(x, eps), d_y != 0
    unit = x * inverse
    product = np.where(used, d_y * unit, 0)
    d_x = (d_y * weight - unit * np.mean(product * weight, axis=-1, keepdims=True)) * inverse
    d_y[...] = np.where(used.any(axis=-1, keepdims=True), d_x, 0)
    return sum_of_rows(product.reshape(-1, x.shape[-1]))


def _without_padding(call: _Call, grad: NDArray[Any]) -> NDArray[Any]:
    """The gradient of the output, 0 in the rows past the lengths, whatever is stored there."""
    lengths: Any = call.rules["query_lengths"]
    if lengths is None:
        return grad
    valid = np.broadcast_to(np.arange(call.length) < lengths, (*call.batch, call.length))
    return grad if valid.all() else np.where(valid.reshape(-1, 1), grad, grad.dtype.type(0))


def _digits(given: NDArray[Any] | None, now: NDArray[Any] | None) -> NDArray[Any] | None:
    """A bias as given, which may have more digits than the layer's own, where no other number was written since."""
    if given is None or now is None:
        return now
    with np.errstate(all="ignore"):
        return np.where(given.astype(now.dtype) == now, given, now)


def _sides(window_size: Any, is_causal: Any) -> Any:
    """A window in a form that can be compared; what is none is left as it is."""
    pair = isinstance(window_size, (tuple, list)) or getattr(window_size, "ndim", 0) == 1
    sides = list(window_size) if pair else [window_size, window_size]
    if is_causal is not None and is_one_number(is_causal) and is_causal:
        sides[1:] = [0]
    return [None if n is None or (is_one_number(n) and n == -1) else n for n in sides]


def _check_reach(window: int, given: Rules) -> None:
    """Check that a cache with this window keeps all that a query may see by these (valid) rules."""
    window_size: Any = given.get("window_size")
    chunk_size: Any = given.get("chunk_size")
    left_chunks: Any = given.get("left_chunks")

    def bounded(n: Any) -> int | None:
        return None if n is None or n == -1 else int(n)

    pair = isinstance(window_size, (tuple, list)) or getattr(window_size, "ndim", 0) == 1
    rules, reaches = [], []
    if window_size is not None:
        rules.append(f"window_size={window_size}")
        reaches.append(bounded(window_size[0] if pair else window_size))
    if chunk_size is not None:
        rules.append(f"chunk_size={chunk_size} with left_chunks={left_chunks}")
        before = bounded(left_chunks)
        reaches.append(None if before is None else (before + 1) * int(chunk_size) - 1)
    reach = min((n for n in reaches if n is not None), default=None)
    if reach is None or reach > window:
        raise ValueError(
            f"{' and '.join(rules)} lets a query see {'all' if reach is None else reach} keys before its own, which is "
            f"further back than the cache keeps: window={window}. A larger window keeps more; the left side of "
            f"window_size, and left_chunks, say how far a query looks back"
        )


def _rotary_base(x: Any) -> float | None:
    if x is None:
        return None
    return real(x, "rotary_base", "a positive finite number or None", True)


def _rotary_dim(x: Any, head_dim: int, rotates: bool) -> int | None:
    if not rotates:
        if x is not None:
            raise ValueError("rotary_dim needs rotary_base or rotary_frequencies: without them nothing is rotated")
        return None
    if x is None:
        if head_dim % 2:
            raise ValueError(f"rotary encoding turns pairs of channels: head_dim={head_dim} is odd, give rotary_dim")
        return head_dim
    allowed = f"an even integer from 0 to head_dim={head_dim}"
    n = integer(x, "rotary_dim", allowed, 0, head_dim)
    if n % 2:
        raise ValueError(f"rotary_dim must be {allowed}, not {n}")
    return n


def _rotary_frequencies(x: Any, rotary_dim: int | None) -> tuple[NDArray[np.float64], float] | None:
    """The layer's own copy of the pair."""
    if x is None:
        return None
    assert rotary_dim is not None
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise TypeError(
            f"rotary_frequencies must be a pair (frequencies, attention_factor), as fastattn.rotary_frequencies "
            f"returns it, not {type(x).__name__ if not isinstance(x, (tuple, list)) else f'{len(x)} things'}"
        )
    frequencies = checked_frequencies(x[0], "rotary_frequencies[0]", rotary_dim // 2).copy()
    attention_factor = real(x[1], "rotary_frequencies[1]", "a positive finite number", True)
    frequencies.flags.writeable = False
    return frequencies, attention_factor
