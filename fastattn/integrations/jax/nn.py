"""`dot_product_attention` with the arguments of `jax.nn`, for programs that run on CPUs.

    import jax
    from fastattn.integrations.jax import nn

    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 512, 8, 64))  # (batch, tokens, heads, channels)
    out = jax.jit(nn.dot_product_attention, static_argnames="is_causal")(query, key, value, is_causal=True)

Arguments are read where JAX puts them for a callback: nothing is transposed or repeated. JAX copies results.

A callback costs some 0.3 ms: with 8 heads of 64 channels a call pays from 128 to 256 tokens on. Of 16 tokens it takes 3
to 5 times as long as `jax.nn`, of 256 tokens 0.5 to 0.7 of the time, of 1024 a quarter, causal less than a fifth, with
gradients or without (two cores with AVX-512; docs/notebook/31-in-other-programs.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

try:
    import jax
except ImportError as error:
    raise ImportError('fastattn.integrations.jax.nn needs JAX: pip install "fastattn[jax]"') from error
import jax.numpy as jnp

from fastattn.integrations._table import Row
from fastattn.integrations.jax import _call

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jax.typing import ArrayLike
    from numpy.typing import NDArray

_TOKENS_FIRST = ("query", "key", "value", "out", "grad_out")
_HEADS_LAST = ("lse", "grad_lse")


def _swapped(name: str, x: Any) -> Any:
    """A view with the heads where fastattn has them, or the way back; one length of a sequence is for all its heads."""
    if name in _TOKENS_FIRST:
        return x.swapaxes(-3, -2)
    return x.swapaxes(-2, -1) if name in _HEADS_LAST else x


class _TokensFirst(Row):
    """`fastattn.dot_product_attention` of arrays (..., T, N, H), with lengths (...)."""

    def __init__(self) -> None:
        super().__init__("dot_product_attention")
        self.batched = {
            **dict.fromkeys((*_TOKENS_FIRST, "bias", "mask"), 3),
            **dict.fromkeys(_HEADS_LAST, 2),
            **dict.fromkeys(("query_lengths", "key_lengths"), 0),
        }

    def _inner(self, given: Mapping[str, Any]) -> dict[str, Any]:
        lengths = {name: given[name][..., None] for name in ("query_lengths", "key_lengths") if name in given}
        return {name: _swapped(name, x) for name, x in given.items()} | lengths

    def result_shapes(
        self, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        return {"out": (*query[:-1], value[-1]), "lse": query[:-1]}

    def forward(self, given: Mapping[str, Any]) -> tuple[NDArray[Any], ...]:
        names = self.results(given)
        return tuple(_swapped(name, x) for name, x in zip(names, super().forward(self._inner(given)), strict=True))

    def backward(
        self, wrt: Iterable[str], given: Mapping[str, Any], results: Sequence[Any], gradients: Sequence[Any]
    ) -> tuple[NDArray[Any], ...]:
        wrt, names = tuple(wrt), self.results(given)
        results, gradients = (
            [x if x is None else _swapped(name, x) for name, x in zip(names, group, strict=True)]
            for group in (results, gradients)
        )
        found = super().backward(wrt, self._inner(given), results, gradients)
        return tuple(_swapped(name, x) for name, x in zip(wrt, found, strict=True))


_ROW = _TokensFirst()


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
) -> Any:
    """
    `jax.nn.dot_product_attention` on CPUs, by `fastattn.dot_product_attention`.

    Parameters
    ----------
    query : array_like, shape (B, T, N, H) or (T, N, H)
    key : array_like, shape (B, S, K, H) or (S, K, H)
    value : array_like, shape (B, S, K, E) or (S, K, E)
        float32, float64, float16 or bfloat16. N is a multiple of K: query head n reads key head ``n // (N // K)``.
    bias : array_like of floats, broadcasts to (B, N, T, S) or (N, T, S), optional
        Added to the scores.
    mask : array_like of bool, broadcasts to (B, N, T, S) or (N, T, S), optional
        **True means attend.**
    scale : float, optional
        Factor of the scores; default ``1 / sqrt(H)``.
    is_causal : bool, default False
        Query t sees the keys 0 to t, also where S differs from T.
    query_seq_lengths, key_value_seq_lengths : array_like of int, shape (B,), optional
        Valid lengths. Outputs of queries past theirs are 0.
    local_window_size : int or (int, int), optional
        ``(left, right)``: query t sees the keys t - left to t + right; an int w: ``(w, w)``. At least 0.
    return_residual : bool, default False
        Also return the log-sum-exp of each row of scores. As in `jax.nn` it is a constant for gradients; that of
        ``fastattn.integrations.jax.dot_product_attention(..., return_lse=True)`` is not.

    Returns
    -------
    out : jax.Array, shape (B, T, N, E) or (T, N, E)
    residual : jax.Array, shape (B, T, N) or (T, N)
        Only with `return_residual`; of key's dtype.

    Raises
    ------
    ValueError, TypeError
        If a shape or a window is not as above; the message names the argument.
    NotImplementedError
        For arrays and programs of other platforms than the CPU, and for second derivatives.

    See Also
    --------
    fastattn.integrations.jax.dot_product_attention : with all rules of fastattn and its conventions.

    Notes
    -----
    It pays from 128 to 256 tokens on, with 8 heads of 64 channels; below, `jax.nn` is faster.

    One difference in numbers: a query that sees no key gives 0 (and the residual -inf), where `jax.nn` gives the mean
    of all values. There is no argument `implementation`.

    `scale`, masks and lengths have no gradient; those of query, key, value and bias are exact, and no (T, S) array is
    made for them.

    Examples
    --------
    >>> import jax
    >>> from fastattn.integrations.jax import nn
    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 100, 8, 16))
    >>> ours = nn.dot_product_attention(query, key, value, is_causal=True)
    >>> theirs = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    >>> bool(abs(ours - theirs).max() < 1e-5)
    True
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    _check_shapes(query.shape, key.shape, value.shape)
    given: dict[str, Any] = {"query": query, "key": key, "value": value, "scale": scale, "is_causal": is_causal}
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None:
            given[name] = _without_batch(name, jnp.asarray(x), query.ndim)
    for name, own, x in (
        ("query_seq_lengths", "query_lengths", query_seq_lengths),
        ("key_value_seq_lengths", "key_lengths", key_value_seq_lengths),
    ):
        if x is not None:
            given[own] = _lengths(name, jnp.asarray(x), query.shape)
    if local_window_size is not None:
        given["window_size"] = _window(local_window_size)
    results = _call(_ROW, given | {"query_offset": 0, "enable_gqa": True, "return_lse": bool(return_residual)})
    if return_residual:
        out, lse = results
        return out, jax.lax.stop_gradient(lse.astype(key.dtype))
    return results


def _check_shapes(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> None:
    if len(query) not in (3, 4):
        raise ValueError(f"query must have the shape (B, T, N, H) or (T, N, H), not {query}")
    for name, shape in (("key", key), ("value", value)):
        if len(shape) != len(query) or shape[:-3] != query[:-3]:
            raise ValueError(
                f"{name} has the shape {shape}: it must have as many axes as query, {query}, and its batch"
            )
    if value[:-1] != key[:-1]:
        raise ValueError(f"value has the shape {value}, but key {key}: sequences and heads must be the same")
    if key[-1] != query[-1]:
        raise ValueError(f"key has {key[-1]} channels, but query {query[-1]}")
    if query[-2] % key[-2] if key[-2] else query[-2]:
        raise ValueError(f"query has {query[-2]} heads, which is no multiple of the {key[-2]} of key")


def _without_batch(name: str, x: jax.Array, ndim: int) -> jax.Array:
    """A bias or mask for a query of `ndim` axes; `jax.nn` takes a batch of one for a single sequence, too."""
    if name == "mask" and x.dtype != bool:
        raise TypeError(f"mask must be boolean, not {x.dtype}; numbers that are added to the scores are bias")
    if x.ndim <= ndim:
        return x
    if ndim == 4 or x.ndim > 4 or x.shape[0] != 1:
        raise ValueError(f"{name} has the shape {x.shape}: more axes than scores have")
    return x[0]


def _lengths(name: str, x: jax.Array, query: tuple[int, ...]) -> jax.Array:
    size = query[0] if len(query) == 4 else 1
    if x.shape != (size,):
        raise ValueError(f"{name} must have the shape ({size},), one length for each sequence, not {x.shape}")
    if not np.issubdtype(x.dtype, np.integer):
        raise TypeError(f"{name} must be integers, not {x.dtype}")
    return x if len(query) == 4 else x[0]


def _window(window: int | tuple[int, int]) -> tuple[int, int]:
    left, right = window if isinstance(window, (tuple, list)) else (window, window)
    if left < 0 or right < 0:
        raise ValueError(f"local_window_size must be 0 or more on both sides, not {window}")
    return int(left), int(right)


__all__ = ["dot_product_attention"]
