"""Matrix products between tokens and heads, and the weights in the forms that they need. Those of the way back are
NumPy's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn._layers import Matrix, dense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def accumulation_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which sums are accumulated."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def rows_of(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """x as (tokens, channels), as BLAS takes it: copied only if it has another dtype or gaps between its channels."""
    channels = x.shape[-1]
    rows = x.reshape(math.prod(x.shape[:-1]), channels)
    if rows.dtype != dtype:
        return rows.astype(dtype, order="C")
    if rows.flags.c_contiguous:
        return rows
    row, channel = rows.strides
    return rows if channel == rows.itemsize and row >= channels * channel else np.ascontiguousarray(rows)


def project(
    x: NDArray[Any], matrix: Matrix, out: NDArray[Any] | None = None, num_threads: int | None = None
) -> NDArray[Any]:
    """x @ w + b in the dtype of its sums, x of any dtype."""
    return dense(matrix, x, accumulation_of(matrix.dtype), None, None, None, out, num_threads)


BLOCK = 256  # tokens of one product: BLAS adds them one after the other


def outer_sum(x: NDArray[Any], d_y: NDArray[Any]) -> NDArray[Any]:
    """The gradient for w of y = x @ w, over all tokens. A product with a 0 is 0, also that with NaN: padding, whose
    gradient is 0, takes no part."""
    total = _sum_of_blocks(x, d_y)
    if np.isfinite(total.sum()):  # or their sum overflows, and the long way has the same result
        return total
    good_x, good_d = np.isfinite(x), np.isfinite(d_y)
    bad = ~(good_x.all(axis=1) & good_d.all(axis=1))
    # How many terms of each sum are not finite, without those that a 0 cancels.
    terms = (~good_x[bad]).astype(x.dtype).T @ (d_y[bad] != 0).astype(x.dtype)
    terms += (x[bad] != 0).astype(x.dtype).T @ (~good_d[bad]).astype(x.dtype)
    return np.where(terms != 0, total, _sum_of_blocks(np.where(good_x, x, 0), np.where(good_d, d_y, 0)))


def _sum_of_blocks(x: NDArray[Any], d_y: NDArray[Any]) -> NDArray[Any]:
    """x^T @ d_y as a balanced tree of sums, so that no error grows with the number of tokens."""
    count, half = len(x), BLOCK
    if count <= BLOCK:
        return np.matmul(x.T, d_y)
    while 2 * half < count:
        half *= 2
    total = _sum_of_blocks(x[:half], d_y[:half])
    return np.add(total, _sum_of_blocks(x[half:], d_y[half:]), out=total)


def sum_of_rows(d_y: NDArray[Any], block: int = 16) -> NDArray[Any]:
    """The gradient for b of y = x @ w + b. In blocks of blocks: NumPy adds rows one after the other, and its errors
    grow with their number."""
    if not len(d_y):
        return np.zeros(d_y.shape[1], d_y.dtype)
    while len(d_y) > 1:
        whole = len(d_y) // block * block
        sums = d_y[:whole].reshape(-1, block, d_y.shape[1]).sum(axis=1)
        d_y = sums if whole == len(d_y) else np.concatenate([sums, d_y[whole:].sum(axis=0, keepdims=True)])
    return d_y[0].copy()


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
        """As `views`, of these arrays themselves, which become read-only."""
        for a in (*inputs, out, b_every, b_out):
            if a is not None:
                a.flags.writeable = False
        return cls.views(n, inputs, out, b_every, b_out)

    @classmethod
    def views(
        cls,
        n: int,
        inputs: tuple[NDArray[Any], ...],
        out: NDArray[Any] | None,
        b_every: NDArray[Any] | None,
        b_out: NDArray[Any] | None,
    ) -> Weights:
        """
        Views of these arrays; n: columns of the query's. inputs: all projections side by side, or those of query and of
        context.
        """
        every = inputs[0] if len(inputs) == 1 else None
        own, other = inputs if every is None else (every[:, :n], every[:, n:])
        b_own, b_other = (None, None) if b_every is None else (b_every[:n], b_every[n:])
        return cls(own, other, every, out, b_own, b_other, b_every, b_out)

    def arrays(self) -> tuple[Any, ...]:
        """The arguments of `sharing` after n: each array in memory once."""
        inputs = (self.query, self.context) if self.every is None else (self.every,)
        return inputs, self.out, self.b_every, self.b_out

    def unlocked(self, n: int) -> tuple[Weights, Weights]:
        """
        These weights, and the same memory to write to. Where memory is read-only itself, as that of a pickle is, it is
        copied for both.
        """
        inputs, *others = self.arrays()
        inputs, others = tuple(map(_own, inputs)), [None if a is None else _own(a) for a in others]
        free = [None if a is None else _writeable(a) for a in others]
        return Weights.sharing(n, inputs, *others), Weights.views(n, tuple(map(_writeable, inputs)), *free)


class Products(NamedTuple):
    """The weights as products read them: packed, with their biases."""

    query: Matrix
    context: Matrix  # of key and value
    out: Matrix | None

    @classmethod
    def of(cls, w: Weights, dtype: np.dtype[Any] | None = None) -> Products:
        """dtype: of the matrices in memory, if it is not that of the weights; 16 bits are widened as they are read."""
        dtype = w.query.dtype if dtype is None else dtype
        out = None if w.out is None else Matrix(w.out, w.b_out, dtype)
        return cls(Matrix(w.query, w.b_query, dtype), Matrix(w.context, w.b_context, dtype), out)

    def unpacked(self) -> Weights:
        """The weights, in arrays of their own."""
        dtype = accumulation_of(self.query.dtype)
        query, context = (m.unpacked().astype(dtype, copy=False) for m in (self.query, self.context))
        out, b_out = None, None
        if self.out is not None:
            out, b_out = self.out.unpacked().astype(dtype, copy=False), self.out.bias
        b_query, b_context = self.query.bias, self.context.bias
        b_every = None if b_query is None or b_context is None else np.concatenate([b_query, b_context])
        inputs = (np.concatenate([query, context], axis=1),) if len(query) == len(context) else (query, context)
        return Weights.sharing(query.shape[1], inputs, out, b_every, b_out)


class Stored:
    """The weights of a layer, which its shallow copies share: packed, until somebody asks for arrays to write to; then
    these, and each call packs them anew."""

    __slots__ = ("_arrays", "_n", "_products")

    def __init__(self, n: int, weights: Weights, dtype: np.dtype[Any] | None = None) -> None:
        """n: columns of the query's. dtype: that in which all matrices were given, if it is not theirs now."""
        self._n = n
        self._arrays: Weights | None = None
        self._products: Products | None = Products.of(weights, dtype)

    def weights(self) -> Weights:
        if self._arrays is not None:
            return self._arrays
        assert self._products is not None, "one of the two"
        return self._products.unpacked()

    def products(self) -> Products:
        products = self._products
        return Products.of(self.weights()) if products is None else products

    def unlocked(self) -> Weights:
        """The arrays that the layer has from now on, to be written to."""
        self._arrays, free = self.weights().unlocked(self._n)
        self._products = None
        return free

    def __reduce__(self) -> Any:
        dtype = None if self._products is None else self._products.query.dtype
        return _stored, (self._n, self.weights().arrays(), dtype)


def _stored(n: int, arrays: tuple[Any, ...], dtype: np.dtype[Any] | None) -> Stored:
    return Stored(n, Weights.sharing(n, *arrays), dtype)


def _own(a: NDArray[Any]) -> NDArray[Any]:
    """The array, or a copy if its memory is read-only."""
    try:
        _writeable(a)
    except ValueError:
        return a.copy()
    return a


def _writeable(a: NDArray[Any]) -> NDArray[Any]:
    """A view through which an array can be written that itself stays read-only."""
    a.flags.writeable = True
    view = a.view()
    a.flags.writeable = False
    return view


def rounded(x: NDArray[Any], dtype: np.dtype[Any], out: NDArray[Any] | None) -> NDArray[Any]:
    """x in that dtype, in `out` if given."""
    with np.errstate(all="ignore"):
        if out is None:
            return x.astype(dtype)
        out[...] = x
        return out
