"""NumPy's matrix products between tokens and heads, and the weights in the form that they need."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn._checks import empty

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def accumulation_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which sums are accumulated."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def rows_of(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """x as (tokens, channels) for BLAS: copied only if it has another dtype or gaps between its channels."""
    channels = x.shape[-1]
    rows = x.reshape(math.prod(x.shape[:-1]), channels)
    if rows.dtype != dtype:
        return rows.astype(dtype, order="C")
    if rows.flags.c_contiguous:
        return rows
    row, channel = rows.strides
    return rows if channel == rows.itemsize and row >= channels * channel else np.ascontiguousarray(rows)


def project(
    x: NDArray[Any], w: NDArray[Any], b: NDArray[Any] | None = None, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """x @ w + b: one product over all tokens and one pass over its result."""
    y = np.matmul(x, w, out=empty((len(x), w.shape[1]), x.dtype, "a product") if out is None else out)
    return y if b is None else np.add(y, b, out=y)


class Weights(NamedTuple):
    """
    The weights in one dtype, in C order, side by side if they multiply the same input.

    BLAS accepts columns of a wider matrix, so the parts of a combined matrix are views.
    """

    query: NDArray[Any]
    context: NDArray[Any]  # of key and value
    every: NDArray[Any] | None  # of query, key and value; None if x and context differ in their channels
    out: NDArray[Any] | None
    b_query: NDArray[Any] | None
    b_context: NDArray[Any] | None
    b_every: NDArray[Any] | None
    b_out: NDArray[Any] | None

    @classmethod
    def of(
        cls,
        query: NDArray[Any],
        context: Sequence[NDArray[Any]],
        out: NDArray[Any] | None,
        b_every: NDArray[Any] | None,
        b_out: NDArray[Any] | None,
        dtype: np.dtype[Any],
    ) -> Weights:
        def one(*parts: NDArray[Any]) -> NDArray[Any]:
            whole = np.empty((len(parts[0]), sum(part.shape[1] for part in parts)), dtype)
            np.concatenate(parts, axis=1, out=whole, casting="same_kind")
            return whole

        with np.errstate(all="ignore"):
            same = len(query) == len(context[0])
            inputs = (one(query, *context),) if same else (one(query), one(*context))
            b_every, b_out = (None if b is None else b.astype(dtype) for b in (b_every, b_out))
            return cls.sharing(query.shape[1], inputs, None if out is None else one(out), b_every, b_out)

    @classmethod
    def sharing(
        cls,
        n: int,
        inputs: tuple[NDArray[Any], ...],
        out: NDArray[Any] | None,
        b_every: NDArray[Any] | None,
        b_out: NDArray[Any] | None,
    ) -> Weights:
        """
        Views of these arrays, which become read-only; n: columns of the query's. inputs: all projections side by side,
        or those of query and of context.
        """
        for a in (*inputs, out, b_every, b_out):
            if a is not None:
                a.flags.writeable = False
        every = inputs[0] if len(inputs) == 1 else None
        own, other = inputs if every is None else (every[:, :n], every[:, n:])
        b_own, b_other = (None, None) if b_every is None else (b_every[:n], b_every[n:])
        return cls(own, other, every, out, b_own, b_other, b_every, b_out)

    def arrays(self) -> tuple[Any, ...]:
        """The arguments of `sharing` after n: each array in memory once."""
        inputs = (self.query, self.context) if self.every is None else (self.every,)
        return inputs, self.out, self.b_every, self.b_out


def rounded(x: NDArray[Any], dtype: np.dtype[Any], out: NDArray[Any] | None) -> NDArray[Any]:
    """x in that dtype, in `out` if given."""
    with np.errstate(all="ignore"):
        if out is None:
            return x.astype(dtype)
        out[...] = x
        return out
