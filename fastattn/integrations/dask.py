"""Attention over Dask arrays: more keys and values than one machine holds, on a cluster or in threads.

    import dask.array as da
    from fastattn.integrations.dask import KeyValue, dot_product_attention

    key, value = (da.random.standard_normal((8, 1_000_000, 64), chunks=(8, 100_000, 64)) for _ in range(2))
    keys = KeyValue(key, value).persist()  # both parts of a block on the same worker, and they stay there
    query = da.random.standard_normal((8, 16, 64))
    out = dot_product_attention(query, keys).compute()

Nothing is computed at a call: it makes one task for each block of queries and block of keys of which one sees the
other, and tasks that merge what these return, as a tree. A task reads its blocks in place, without a copy, and makes a
result for the rows of its queries; between workers go blocks that do not lie where they are needed, and results. What
depends on the places of blocks, and when a cluster pays: docs/scale.md.

All workers need fastattn. If they choose the same instruction set (`fastattn.cpu_info()`), bits depend on nothing but
the arguments, the chunks of the key axis and `split_every`.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import operator
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

try:
    import dask
    import dask.array as da
except ImportError as error:
    raise ImportError('fastattn.integrations.dask needs Dask: pip install "fastattn[dask]"') from error
from dask.base import DaskMethodsMixin, tokenize
from dask.highlevelgraph import HighLevelGraph
from dask.system import CPU_COUNT

import fastattn
from fastattn._attention import dot_product_attention as _attend
from fastattn._call import check
from fastattn._checks import integer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    Chunks = tuple[tuple[int, ...], ...]
    Block = tuple[int, ...]

__all__ = ["KeyValue", "dot_product_attention", "merge_attention"]

_FAR = 1 << 60  # as far as positions count

# Rules that are few numbers, and needed when the graph is made.
_NUMPY_ONLY = "query_offset", "key_lengths", "query_lengths", "alibi_slopes", "sinks"

# Rules that mean the same for every task.
_ALIKE = ("is_causal", "window_size", "chunk_size", "left_chunks", "scale", "softcap", "activation", "enable_gqa",
          "num_threads")  # fmt: skip


# Arrays


def _is_lazy(x: Any) -> bool:
    return hasattr(x, "__dask_graph__") and x.__dask_graph__() is not None


def _array(x: Any, name: str) -> da.Array:
    """A Dask array; NumPy arrays are one block, other arrays that say their shape and dtype are cut as Dask does."""
    if isinstance(x, da.Array):
        if any(math.isnan(n) for n in x.shape):
            raise ValueError(
                f"{name} has unknown chunk sizes (shape {x.shape}), on which the tasks depend: "
                f"call {name}.compute_chunk_sizes() first"
            )
        if not isinstance(x._meta, np.ndarray) or isinstance(x._meta, np.ma.MaskedArray):
            raise TypeError(f"{name} has blocks of {type(x._meta).__name__}; they must be plain NumPy arrays")
        return _recut(x, tuple(_chunks(_bounds(sizes)) for sizes in x.chunks))  # without empty chunks
    if _is_lazy(x):
        raise TypeError(f"{name} is {type(x).__name__}; pass the Dask array that it holds")
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored: pass its data")
    of_numpy = isinstance(x, (np.ndarray, np.generic))
    try:
        if not of_numpy and all(hasattr(x, attribute) for attribute in ("shape", "dtype", "ndim", "__getitem__")):
            return da.from_array(x)
        return da.from_array(np.asarray(x), chunks=-1)
    except Exception as error:
        raise TypeError(f"{name} cannot be made into an array: {error}") from error


def _stand_in(x: Any, dtype: Any = None) -> Any:
    """An array of the shape and dtype of a Dask array that takes no memory, for checks; anything else as it is."""
    return np.broadcast_to(np.zeros((), dtype or x.dtype), x.shape) if isinstance(x, da.Array) else x


def _bounds(chunks: Sequence[int]) -> list[int]:
    """Where chunks begin, and the last one ends."""
    return [0, *itertools.accumulate(chunks)]


def _chunks(bounds: Iterable[int]) -> tuple[int, ...]:
    """The chunks between these numbers, in any order and perhaps repeated."""
    return tuple(stop - start for start, stop in itertools.pairwise(sorted(set(bounds)))) or (0,)


def _inside(chunks: Sequence[int], finer: Sequence[int]) -> list[tuple[int, slice]]:
    """For each of the finer chunks, in which chunk it is, and where in it."""
    found, starts = [], _bounds(chunks)
    for start, stop in itertools.pairwise(_bounds(finer)):
        at = bisect.bisect_right(starts, start, hi=len(chunks)) - 1
        found.append((at, slice(start - starts[at], stop - starts[at])))
    return found


def _recut(x: da.Array, chunks: Chunks) -> da.Array:
    return x if x.chunks == chunks else x.rechunk(chunks, method="tasks")


def _blocks(chunks: Chunks) -> Iterator[Block]:
    return itertools.product(*(range(len(sizes)) for sizes in chunks))


class _Pair:
    """A block of keys and its values: what a task of `KeyValue` returns, so that both are in one place."""

    def __init__(self, key: NDArray[Any], value: NDArray[Any]) -> None:
        self.key, self.value = key, value

    def __sizeof__(self) -> int:
        """By this the scheduler knows that moving it is dear."""
        return object.__sizeof__(self) + self.key.nbytes + self.value.nbytes


class KeyValue(DaskMethodsMixin):
    """
    Keys and values whose blocks lie together: a block of both is what one task returns.

    Of two arrays that are persisted apart, the blocks of keys lie on other workers than their values, and one of the
    two has to move for every task. Here a query moves to them. Takes the place of `key` in `dot_product_attention`, and
    changes no bit.

    Parameters
    ----------
    key : array_like or dask array, shape (..., S, D)
    value : array_like or dask array, shape (..., S, E)
        Value is cut like key. All axes but the last are equal.

    Attributes
    ----------
    shape : tuple of int
        That of key.
    chunks : tuple of tuple of int
        Those of key; the last axis is one chunk.
    nbytes : int
        Of key and value together.
    key_dtype, value_dtype : numpy.dtype
    value_dim : int
        E.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it.

    Notes
    -----
    It is a Dask collection: ``persist`` keeps the blocks in the memory of the workers, `distributed.wait` and
    `distributed.progress` take it, and ``compute`` returns the pair of NumPy arrays. Persist only what fits: blocks
    that are not persisted are made again for each call, and dropped.

    Examples
    --------
    >>> import dask.array as da
    >>> from fastattn.integrations.dask import KeyValue, dot_product_attention
    >>> key, value = (da.ones((2, 1000, 8), chunks=(2, 100, 8)) for _ in range(2))
    >>> keys = KeyValue(key, value).persist()
    >>> keys
    <KeyValue: (2, 1000, 8), 10 blocks, 256000 bytes>
    >>> query = np.ones((2, 3, 8))
    >>> dot_product_attention(query, keys).compute().shape
    (2, 3, 8)
    """

    def __init__(self, key: ArrayLike | da.Array, value: ArrayLike | da.Array) -> None:
        keys, values = _keys_and_values(key, value)
        if keys.ndim < 2 or values.ndim < 2:
            name, x = ("key", keys) if keys.ndim < 2 else ("value", values)
            raise ValueError(f"{name} has shape {x.shape}; it needs at least two axes, (..., S, channels)")
        if keys.shape[:-1] != values.shape[:-1]:
            raise ValueError(
                f"key has shape {keys.shape} and value {values.shape}: all axes but the last must be equal"
            )
        self._pairs = _paired(keys, _recut(values, (*keys.chunks[:-1], (values.shape[-1],))))
        self.chunks: Chunks = keys.chunks
        self.shape: tuple[int, ...] = keys.shape
        self.value_dim: int = values.shape[-1]
        self.key_dtype, self.value_dtype = keys.dtype, values.dtype

    @property
    def nbytes(self) -> int:
        """The size of all keys and values, in bytes."""
        rows = math.prod(self.shape[:-1])
        return rows * (self.shape[-1] * self.key_dtype.itemsize + self.value_dim * self.value_dtype.itemsize)

    def __repr__(self) -> str:
        blocks = math.prod(len(sizes) for sizes in self.chunks)
        return f"<KeyValue: {self.shape}, {blocks} block{'s' * (blocks != 1)}, {self.nbytes} bytes>"

    # The protocol of Dask's collections: that of the array of pairs.

    def __dask_graph__(self) -> Any:
        return self._pairs.__dask_graph__()

    def __dask_keys__(self) -> list[Any]:
        return self._pairs.__dask_keys__()

    def __dask_layers__(self) -> tuple[str, ...]:
        return self._pairs.__dask_layers__()

    def __dask_tokenize__(self) -> Any:
        return self._pairs.name

    @staticmethod
    def __dask_optimize__(dsk: Any, keys: Any, **options: Any) -> Any:
        return da.Array.__dask_optimize__(dsk, keys, **options)

    __dask_scheduler__ = staticmethod(dask.threaded.get)

    def __dask_postcompute__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _joined, (self.chunks, self.value_dim, self.key_dtype, self.value_dtype)

    def __dask_postpersist__(self) -> tuple[Callable[..., KeyValue], tuple[Any, ...]]:
        rebuild, arguments = self._pairs.__dask_postpersist__()
        return self._rebuilt, (rebuild, arguments)

    def _rebuilt(self, graph: Any, rebuild: Any, arguments: tuple[Any, ...], **options: Any) -> KeyValue:
        new = object.__new__(KeyValue)
        new.__dict__.update(self.__dict__, _pairs=rebuild(graph, *arguments, **options))
        return new


def _paired(key: da.Array, value: da.Array) -> da.Array:
    """An array whose blocks are pairs of those of key and value; its last two axes are their channels.

    It is blockwise, so that Dask reads both blocks of a pair in the same task where it reads them from a file."""
    rows = tuple(range(max(key.ndim, value.ndim) - 1))
    channels = len(rows), len(rows) + 1
    of_key, of_value = ((*rows[len(rows) - x.ndim + 1 :], c) for x, c in zip((key, value), channels, strict=True))
    meta = np.empty((0,) * (len(rows) + 2))
    return da.blockwise(
        _Pair, (*rows, *channels), key, of_key, value, of_value, name=f"key-value-{tokenize(key.name, value.name)}",
        dtype=meta.dtype, meta=meta, align_arrays=False,
    )  # fmt: skip


def _joined(
    nested: Any, chunks: Chunks, value_dim: int, key_dtype: Any, value_dtype: Any
) -> tuple[NDArray[Any], NDArray[Any]]:
    """All keys and values of a KeyValue."""
    shape = tuple(map(sum, chunks))
    keys, values = np.empty(shape, key_dtype), np.empty((*shape[:-1], value_dim), value_dtype)
    bounds = [_bounds(sizes) for sizes in chunks[:-1]]
    for at in _blocks(chunks[:-1]):
        pair = functools.reduce(operator.getitem, (*at, 0, 0), nested)
        place = tuple(slice(b[i], b[i + 1]) for b, i in zip(bounds, at, strict=True))
        keys[place], values[place] = pair.key, pair.value
    return keys, values


def _keys_and_values(key: Any, value: Any) -> tuple[da.Array, da.Array]:
    """With the last axis in one chunk, and the key axes cut alike: as key is, or as value if key is no Dask array."""
    keys, values = _array(key, "key"), _array(value, "value")
    if keys.ndim < 2 or values.ndim < 2 or keys.shape[-2] != values.shape[-2]:
        return keys, values  # which is refused with all the rest
    rows = (keys if isinstance(key, da.Array) or not isinstance(value, da.Array) else values).chunks[-2]
    keys, values = (_recut(x, (*x.chunks[:-2], rows, (x.shape[-1],))) for x in (keys, values))
    return keys, values


# Tasks


def _threads() -> int | None:
    """How many threads a task takes, if the call does not say: its share of the CPUs. None: what the core chooses."""
    if os.environ.get("OMP_NUM_THREADS") or os.environ.get("FASTATTN_NUM_THREADS"):
        return None
    beside = 1
    if threading.current_thread() is not threading.main_thread():
        beside = dask.config.get("num_workers", None) or CPU_COUNT
        distributed = sys.modules.get("distributed")
        if distributed is not None:
            try:
                beside = distributed.get_worker().state.nthreads
            except ValueError:  # not on a worker
                pass
    return max(1, fastattn.get_num_threads() // beside)


class _Attend:
    """
    The task for a block of queries and a block of keys.

    rules: of all tasks; own: of this one; names: of the rules that come as blocks; queries: of the whole call; real:
    the dtype of parts that are to be merged, or None; within: which part of the pair counts, or None for all.
    """

    def __init__(
        self,
        rules: Mapping[str, Any],
        own: Mapping[str, Any],
        names: tuple[str, ...],
        queries: int,
        real: Any,
        within: tuple[slice, ...] | None,
    ) -> None:
        self.rules, self.own, self.names = rules, own, names
        self.queries, self.real, self.within = queries, real, within

    def __call__(self, query: NDArray[Any], pair: _Pair, *more: NDArray[Any]) -> Any:
        key, value = pair.key, pair.value
        if self.within is not None:
            key, value = key[self.within], value[self.within]
        rules = {**self.rules, **self.own, **dict(zip(self.names, more, strict=True))}
        scales = tuple(rules.pop(name, None) for name in ("key_scale", "value_scale", "key_center"))
        if rules["num_threads"] is None:
            rules["num_threads"] = _threads()
        if self.real is not None and query.dtype.itemsize == 2 and query.dtype.kind not in "iu":
            query = query.astype(self.real)
        return _attend(query, key, value, rules, True, None, None, scales, self.queries)


def _merge(parts: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[NDArray[Any], NDArray[Any]]:
    outs, lses = zip(*parts, strict=True)
    return fastattn.merge_attention(outs, lses)


class _Finish:
    """
    The last task for a block of queries: merges, adds the sinks, rounds.

    shape: of its output, with value's axis; without parts it is zeros. sinks: broadcast to the batch axes, or None.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, real: Any, sinks: NDArray[Any] | None, with_lse: bool
    ) -> None:
        self.shape, self.dtype, self.real, self.sinks, self.with_lse = shape, dtype, real, sinks, with_lse

    def __call__(self, parts: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> Any:
        empty = np.zeros(self.shape, self.real), np.full(self.shape[:-1], -np.inf, self.real)
        # A single part is merged too: that makes -0.0 zero, whatever else the block sees.
        out, lse = _merge(parts) if parts else empty
        if self.sinks is not None:
            sinks = np.broadcast_to(self.sinks[..., None].astype(self.real), self.shape[:-1])
            all_of_it = np.isposinf(sinks)  # for the merge that would be a part without keys
            merged, total = _merge([(out, lse), (empty[0], sinks)])
            none = (all_of_it | np.isneginf(lse))[..., None]  # of the output; what is NaN without the sink remains so
            with np.errstate(all="ignore"):
                out, lse = np.where(none, out * 0 + 0, merged), np.where(all_of_it, sinks, total)
        with np.errstate(all="ignore"):
            out = out.astype(self.dtype, copy=False)
        return (out, lse) if self.with_lse else out


# The graph of a call


class _Operand(NamedTuple):
    """An array of a call whose blocks go to its tasks."""

    array: da.Array
    axes: tuple[int | None, ...]  # for each axis of it: by which index of a task its blocks are found; None: the first

    def at(self, task: Block) -> tuple[Any, ...]:
        return (self.array.name, *(0 if axis is None else task[axis] for axis in self.axes))


def _operand(x: da.Array, batch: Chunks, trailing: Sequence[tuple[int | None, tuple[int, ...]]]) -> _Operand:
    """Cuts an array. batch: chunks of the batch axes; trailing: for its other axes the index of a task, and chunks."""
    lead = x.ndim - len(trailing)
    first = len(batch) - lead
    own = range(lead)
    axes = [None if x.shape[a] == 1 else first + a for a in own]
    chunks = [(1,) if x.shape[a] == 1 else batch[first + a] for a in own]
    axes += [index for index, _ in trailing]
    chunks += [sizes for _, sizes in trailing]
    return _Operand(_recut(x, tuple(chunks)), tuple(axes))


def _picked(graph: HighLevelGraph, inner: str, number: int, name: str, chunks: Chunks, dtype: Any) -> da.Array:
    """One of the results of tasks that return (out, lse) for the rows of all batch blocks and blocks of queries."""
    rows = len(chunks) - 1 + number
    picked = {(name, *at): (operator.itemgetter(number), (inner, *at[:rows])) for at in _blocks(chunks)}
    layers = HighLevelGraph({**graph.layers, name: picked}, {**graph.dependencies, name: {inner}})
    return da.Array(layers, name, chunks, dtype=dtype)


def _widened(x: da.Array, ndim: int) -> da.Array:
    return x if x.ndim >= ndim else x[(None,) * (ndim - x.ndim)]


def _side(x: Any) -> int | None:
    return None if x is None or x == -1 or x >= _FAR else int(x)


class _Sight:
    """Which keys the blocks of queries may see, by the rules that are numbers."""

    def __init__(self, batch: tuple[int, ...], queries: int, keys: int, rules: Mapping[str, Any]) -> None:
        def read(name: str, default: Any) -> NDArray[np.int64]:
            x = np.asarray(default if rules[name] is None else rules[name])
            x = np.minimum(x, _FAR).astype(np.int64) if x.dtype.kind == "u" else np.clip(x, -_FAR, _FAR)
            return (x if x.ndim else np.broadcast_to(x, (1,) * len(batch))).astype(np.int64)

        self.key_lengths, self.query_lengths = read("key_lengths", keys), read("query_lengths", queries)
        self.offset = read("query_offset", self.key_lengths - self.query_lengths)
        window = rules["window_size"]
        pair = isinstance(window, (tuple, list)) or getattr(window, "ndim", 0) == 1
        self.left, self.right = map(_side, window if pair else (window, window))
        if rules["is_causal"]:
            self.right = 0
        chunk, before = rules["chunk_size"], rules["left_chunks"]
        self.chunk = None if chunk is None else min(int(chunk), _FAR)
        self.before = None if before is None or before == -1 else min(int(before), _FAR)

    def own(self, place: tuple[slice, ...], rows: tuple[int, int], cols: tuple[int, int]) -> dict[str, Any]:
        """Lengths and offset as a task has them, whose blocks begin and end there."""
        (i, i_end), (j, j_end) = rows, cols
        return {
            "query_offset": _part(self.offset, place) + (i - j),
            "query_lengths": np.clip(_part(self.query_lengths, place) - i, 0, i_end - i),
            "key_lengths": np.clip(_part(self.key_lengths, place) - j, 0, j_end - j),
        }

    def seen(self, place: tuple[slice, ...], rows: tuple[int, int], cols: NDArray[np.int64]) -> NDArray[np.bool_]:
        """For each block of keys, whose bounds are cols, whether a query of these rows may see any of it."""
        parts = [_part(x, place) for x in (self.offset, self.query_lengths, self.key_lengths)]
        offset, query_lengths, stop = np.unique([x.ravel() for x in np.broadcast_arrays(*parts)], axis=1)
        first, last = rows[0] + offset, np.minimum(rows[1], query_lengths) - 1 + offset  # positions
        start = np.zeros_like(stop)
        if self.left is not None:
            start = np.maximum(start, first - self.left)
        if self.right is not None:
            stop = np.minimum(stop, last + self.right + 1)
        if self.chunk is not None:
            stop = np.minimum(stop, (last // self.chunk + 1) * self.chunk)
            if self.before is not None:
                start = np.maximum(start, (first // self.chunk - min(self.before, _FAR // self.chunk)) * self.chunk)
        start, stop = start[:, None], np.where(first <= last, stop, 0)[:, None]
        return np.any((start < cols[1:]) & (stop > cols[:-1]) & (start < stop), axis=0) & (cols[1:] > cols[:-1])


def _part(x: NDArray[Any], place: tuple[slice, ...]) -> NDArray[Any]:
    """Of an array that broadcasts over the batch axes, what belongs to this place."""
    place = place[len(place) - x.ndim :]
    return x[tuple(slice(None) if n == 1 else at for n, at in zip(x.shape, place, strict=True))]


def _spread(size: int, chunks: Sequence[int]) -> tuple[list[int], tuple[int, ...], list[int]]:
    """
    How the axis of a block mask is cut where chunks need not begin where its blocks do.

    size: rows (or columns) of a block. Returns which entries are needed, one after the other, the chunks of these, and
    the size of a block in each: the largest with which all begin where a chunk does.
    """
    entries: list[int] = []
    counts, sizes = [], []
    for start, stop in itertools.pairwise(_bounds(chunks)):
        n = max(stop - start, 1)
        inside = start // size == (start + n - 1) // size
        each = n if inside else math.gcd(size, start)
        mine = [(start + at) // size for at in range(0, stop - start, each)]
        entries += mine
        counts.append(len(mine))
        sizes.append(each)
    return entries, tuple(counts), sizes


def dot_product_attention(
    query: ArrayLike | da.Array,
    key: ArrayLike | da.Array | KeyValue,
    value: ArrayLike | da.Array | None = None,
    *,
    is_causal: bool = False,
    window_size: int | tuple[int | None, int | None] | None = None,
    chunk_size: int | None = None,
    left_chunks: int | None = None,
    query_offset: ArrayLike | None = None,
    key_lengths: ArrayLike | None = None,
    query_lengths: ArrayLike | None = None,
    mask: ArrayLike | da.Array | None = None,
    block_mask: ArrayLike | da.Array | None = None,
    block_size: int | tuple[int, int] = 64,
    bias: ArrayLike | da.Array | None = None,
    alibi_slopes: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    activation: str = "softmax",
    enable_gqa: bool = False,
    key_scale: ArrayLike | da.Array | None = None,
    value_scale: ArrayLike | da.Array | None = None,
    key_center: ArrayLike | da.Array | None = None,
    return_lse: bool = False,
    split_every: int = 8,
    num_threads: int | None = None,
) -> da.Array | tuple[da.Array, da.Array]:
    """
    Dot-product attention of Dask arrays, exact and lazy; `fastattn.dot_product_attention` says what the rules mean.

    Parameters
    ----------
    query : array_like or dask array, shape (..., L, D)
    key : array_like, dask array or KeyValue, shape (..., S, D)
    value : array_like or dask array, shape (..., S, E)
        Of any dtypes that fastattn takes, in chunks of any sizes on all axes but the last, which becomes one chunk.
        Arrays of NumPy are one chunk; if only value is a Dask array, key is cut like it. Where batch axes are cut in
        different places, arrays are cut in all of these (with `enable_gqa` between whole groups of heads); blocks of
        keys are never joined. With a `KeyValue`, value is left out.
    is_causal, window_size, chunk_size, left_chunks, query_offset, key_lengths, query_lengths
        Which keys a query sees. For blocks of keys that no query of a block sees by these there is no task.
        `chunk_size` needs key chunks that begin at its multiples. Numbers or NumPy arrays.
    mask, block_mask, bias : array_like or dask array, optional
        Cut like queries and keys.
    block_size : int or (int, int), default 64
        Of `block_mask`. Chunks need not begin where blocks do, but tasks take less memory if they do.
    alibi_slopes, sinks : array_like, optional
        Numbers or NumPy arrays.
    scale, softcap, enable_gqa
        As for `fastattn.dot_product_attention`.
    activation : {'softmax', 'relu', 'sigmoid', 'sparsemax', 'entmax15'}, default 'softmax'
        All but 'softmax' need the key axis in one chunk.
    key_scale, value_scale, key_center : float, array_like or dask array, optional
        For int8 key and value; cut like these.
    return_lse : bool, default False
        Also return the log-sum-exp of each row's scores, sink included.
    split_every : int, default 8
        How many parts a task merges.
    num_threads : int, optional
        Threads of a task. Default: what OMP_NUM_THREADS says (Dask's nannies set it to 1), else the CPUs, divided by
        the threads of a worker.

    Returns
    -------
    out : dask array, shape (..., L, E)
        In the chunks of query; along batch axes that query does not have, in those of key.
    lse : dask array, shape (..., L)
        Only with `return_lse`; float64 for float64, else float32.

    Raises
    ------
    ValueError, TypeError
        At the call, from shapes and dtypes, if an argument is not as above or a chunk size is unknown; the message
        names it. ``relative_bias``, ``return_weights`` and ``out`` are no arguments here.

    See Also
    --------
    KeyValue : keys and values that stay where they are, for many queries.

    Notes
    -----
    With the key axis in one chunk, the bits are those of the call with NumPy arrays, whatever the other chunks. With
    more, each task gives the output and the log-sum-exp of a part of the keys, in float32 or float64, and
    `fastattn.merge_attention` joins `split_every` of these at a time, in the order of keys [1]_; sinks join last, and
    16-bit results are rounded once. Then the bits depend on the chunks of the key axis and `split_every`, and on
    nothing else, be it the scheduler, a lost worker or other axes' chunks. The error is within twice that of
    `fastattn.dot_product_attention`, and ``eps * (4 * size + 8 + abs(lse)) * max(abs(value))`` more, where size is the
    largest sum of the absolute values that a score of the row adds up.

    A task holds its blocks and a result for its rows; no memory grows with L * S.

    References
    ----------
    .. [1] M. N. Rabe and C. Staats, "Self-attention does not need O(n^2) memory", 2021.

    Examples
    --------
    >>> import dask.array as da
    >>> from fastattn.integrations.dask import dot_product_attention
    >>> x = da.random.default_rng(0).standard_normal((4, 1000, 16), chunks=(4, 250, 16))
    >>> out = dot_product_attention(x, x, x, is_causal=True)
    >>> out.shape, out.numblocks
    ((4, 1000, 16), (1, 4, 1))
    >>> plain = fastattn.dot_product_attention(x.compute(), x.compute(), x.compute(), is_causal=True)
    >>> bool(np.allclose(out.compute(), plain))
    True
    """
    rules = {
        "is_causal": is_causal, "window_size": window_size, "chunk_size": chunk_size, "left_chunks": left_chunks,
        "query_offset": query_offset, "key_lengths": key_lengths, "query_lengths": query_lengths, "mask": mask,
        "block_mask": block_mask, "block_size": block_size, "bias": bias, "alibi_slopes": alibi_slopes, "scale": scale,
        "softcap": softcap, "sinks": sinks, "activation": activation, "enable_gqa": enable_gqa,
        "return_lse": return_lse, "num_threads": num_threads,
    }  # fmt: skip
    scales = {"key_scale": key_scale, "value_scale": value_scale, "key_center": key_center}
    return _Call(query, key, value, rules, scales, split_every).results()


class _Call:
    """One call: its arguments, checked, then cut; its graph."""

    def __init__(
        self, query: Any, key: Any, value: Any, rules: dict[str, Any], scales: dict[str, Any], split_every: Any
    ) -> None:
        self.split_every = integer(split_every, "split_every", "an integer of at least 2", 2)
        self.pairs = key if isinstance(key, KeyValue) else None
        if (self.pairs is None) == (value is None):
            missing = "dot_product_attention() missing 1 required positional argument: 'value' (or a KeyValue as key)"
            raise TypeError(
                missing if value is None else "value must be left out where key is a KeyValue, which holds it"
            )
        self.query = _array(query, "query")
        self.query_chunks: Chunks = query.chunks if isinstance(query, da.Array) else self.query.chunks
        if self.pairs is None:
            self.key, self.value = _keys_and_values(key, value)
        else:
            self.key, self.value = self._without_data(self.pairs)
        for name in _NUMPY_ONLY:
            if _is_lazy(rules[name]):
                raise TypeError(f"{name} must be a number or a NumPy array, not {type(rules[name]).__name__} of Dask")
        self.plain_block_mask = not isinstance(rules["block_mask"], da.Array)
        for name in ("mask", "block_mask", "bias"):
            if rules[name] is not None:
                rules[name] = _array(rules[name], name)
        for name, x in scales.items():
            if x is not None and (isinstance(x, da.Array) or np.ndim(x)):
                scales[name] = _array(x, name)
        self.rules, self.scales = rules, scales
        self._check()
        self._cut()

    @staticmethod
    def _without_data(pairs: KeyValue) -> tuple[da.Array, da.Array]:
        """Arrays of the shapes, chunks and dtypes of the pairs, of which no block is ever used."""
        key = da.zeros(pairs.shape, dtype=pairs.key_dtype, chunks=pairs.chunks)
        chunks = (*pairs.chunks[:-1], (pairs.value_dim,))
        return key, da.zeros((*pairs.shape[:-1], pairs.value_dim), dtype=pairs.value_dtype, chunks=chunks)

    def _check(self) -> None:
        """Raises what the call on NumPy arrays would, from shapes and dtypes, and what only Dask arrays cannot have."""
        arrays = self.query, self.key, self.value
        given = {name: _stand_in(x) for name, x in self.rules.items()}
        out_shape = check(self.query.shape, self.key.shape, self.value.shape, np.float32, given)
        self.batch, self.queries, self.keys = out_shape[:-2], out_shape[-2], self.key.shape[-2]
        # A call without queries checks dtypes and scales. Integers become float64: a copy of all of them takes memory.
        scaled = any(x is not None for x in self.scales.values())
        query, key, value = (
            _stand_in(x, np.float64 if x.dtype.kind in "biu" and x.dtype.isnative and not scaled else None)
            for x in arrays
        )
        more: dict[str, Any] = {name: _stand_in(x) for name, x in self.scales.items()}
        more["enable_gqa"] = self.rules["enable_gqa"]
        out: Any = fastattn.dot_product_attention(query[..., :0, :], key, value, **more)
        self.dtype = out.dtype
        self.real = np.dtype(np.float64 if self.dtype == np.float64 else np.float32)

        key_chunks = self.key.chunks[-2]
        activation, chunk_size = self.rules["activation"], self.rules["chunk_size"]
        if activation != "softmax" and len(key_chunks) > 1:
            raise ValueError(
                f"activation={activation!r} needs all keys in one chunk, not in {len(key_chunks)}: parts of its rows "
                f"cannot be merged; rechunk key and value with {{-2: -1}}"
            )
        if chunk_size is not None:
            wrong = [start for start in _bounds(key_chunks)[:-1] if start % int(chunk_size)]
            if wrong:
                raise ValueError(
                    f"chunk_size={chunk_size} needs key chunks that begin at its multiples, and one begins at "
                    f"{wrong[0]}: rechunk key and value with {{-2: a multiple of {chunk_size}}}"
                )

    def _cut(self) -> None:
        """Cuts all arrays so that a task finds one block of each."""
        n = len(self.batch)
        last = n - 1
        heads, shared = (x.shape[-3] if x.ndim > 2 else 1 for x in (self.query, self.key))
        group = heads // shared if self.rules["enable_gqa"] and shared > 1 else 1
        batch: list[tuple[int, ...]] = []
        for axis, size in enumerate(self.batch):
            bounds = {0, size}
            for x, step in ((self.query, 1), (self.key, group), (self.value, group)):
                step = step if axis == last else 1
                own = x.chunks[: x.ndim - 2][axis - n] if n - axis <= x.ndim - 2 else (1,)
                if sum(own) * step == size:
                    bounds.update(start * step for start in _bounds(own))
            if axis == last:
                bounds = {start for start in bounds if start % group == 0}
            batch.append(_chunks(bounds))
        self.batch_chunks = tuple(batch)
        self.kv_chunks = self.batch_chunks
        if group > 1:
            self.kv_chunks = (*self.batch_chunks[:-1], tuple(size // group for size in self.batch_chunks[-1]))
        self.rows, self.cols = self.query.chunks[-2], self.key.chunks[-2]

        def channels(x: da.Array) -> tuple[None, tuple[int, ...]]:
            return None, (x.shape[-1],)

        # Of a KeyValue, by axis: in which block the keys of a task are, and where; None for an axis that broadcasts.
        self.where: list[list[tuple[int, slice]] | None] = []
        if self.pairs is not None:
            lead = len(self.pairs.shape) - 2
            for size, own, finer in zip(self.pairs.shape, self.pairs.chunks, self.kv_chunks[n - lead :], strict=False):
                self.where.append(None if size == 1 else _inside(own, finer))

        rows, cols = (n, self.rows), (n + 1, self.cols)
        self.operands = {"query": _operand(self.query, self.batch_chunks, [rows, channels(self.query)])}
        if self.pairs is None:
            key, value = (_operand(x, self.kv_chunks, [cols, channels(x)]).array for x in (self.key, self.value))
            self.operands["pairs"] = _operand(
                _paired(key, value), self.kv_chunks, [cols, channels(key), channels(value)]
            )
        for name in ("mask", "bias"):
            x = self.rules.pop(name)
            if x is not None:
                x = _widened(x, 2)
                trailing = [
                    cut if size != 1 else (None, (1,)) for size, cut in zip(x.shape[-2:], (rows, cols), strict=True)
                ]
                self.operands[name] = _operand(x, self.batch_chunks, trailing)
        for name, x in self.scales.items():
            if isinstance(x, da.Array):
                x = _widened(x, 2)
                row = cols if x.shape[-2] != 1 else (None, (1,))
                self.operands[name] = _operand(x, self.kv_chunks, [row, channels(x)])
        self._cut_block_mask()

    def _cut_block_mask(self) -> None:
        mask, size = self.rules.pop("block_mask"), self.rules.pop("block_size")
        self.block_sizes: tuple[list[int], list[int]] | None = None
        self.true_blocks: NDArray[np.bool_] | None = None
        if mask is None:
            return
        pair = isinstance(size, (tuple, list)) or getattr(size, "ndim", 0) == 1
        sides = [int(side) for side in (size if pair else (size, size))]
        mask = _widened(mask, 2)
        if self.plain_block_mask:
            self.true_blocks = mask.compute(scheduler="sync")
        trailing: list[tuple[int | None, tuple[int, ...]]] = []
        sizes = []
        for axis, (side, chunks) in enumerate(zip(sides, (self.rows, self.cols), strict=True), mask.ndim - 2):
            entries, counts, each = _spread(side, chunks)
            sizes.append(each)
            if mask.shape[axis] == 1:
                trailing.append((None, (1,)))
                continue
            if entries != list(range(mask.shape[axis])):
                mask = da.take(mask, entries, axis=axis)
            trailing.append((len(self.batch) + axis - mask.ndim + 2, counts))
        self.block_sizes, self.sides = (sizes[0], sizes[1]), sides
        self.operands["block_mask"] = _operand(mask, self.batch_chunks, trailing)

    def _is_false(self, place: tuple[slice, ...], rows: tuple[int, int], cols: tuple[int, int]) -> bool:
        """Whether a NumPy block mask hides all that is there."""
        if self.true_blocks is None:
            return False
        within = (
            slice(start // side, -(-stop // side)) for side, (start, stop) in zip(self.sides, (rows, cols), strict=True)
        )
        return not _part(self.true_blocks, (*place, *within)).any()

    def results(self) -> da.Array | tuple[da.Array, da.Array]:
        rules = self.rules
        self.sight = _Sight(self.batch, self.queries, self.keys, rules)
        self.whole, with_lse = len(self.cols) == 1, bool(rules["return_lse"])
        self.alike = {name: rules[name] for name in _ALIKE}
        self.alike |= {name: x for name, x in self.scales.items() if x is not None and not isinstance(x, da.Array)}
        self.alike["return_lse"] = with_lse or not self.whole
        self.names = tuple(name for name in self.operands if name not in ("query", "pairs"))
        per_head = {name: np.array(rules[name]) for name in ("alibi_slopes", "sinks") if rules[name] is not None}
        sight = self.sight.offset, self.sight.key_lengths, self.sight.query_lengths
        arrays = [(name, x.array.name) for name, x in self.operands.items()]
        self.token = tokenize(
            arrays, self.pairs, sight, self.alike, per_head, self.block_sizes, self.split_every, self.batch_chunks
        )
        name = f"dot-product-attention-{self.token}"
        inner = f"attention-{self.token}" if with_lse else name

        dsk: dict[Any, Any] = {}
        bounds = [_bounds(sizes) for sizes in self.batch_chunks]
        for at in _blocks(self.batch_chunks):
            place = tuple(slice(b[t], b[t + 1]) for b, t in zip(bounds, at, strict=True))
            mine = {name: _part(x, place) for name, x in per_head.items()}
            sinks = None if self.whole else mine.pop("sinks", None)
            for i, rows in enumerate(itertools.pairwise(_bounds(self.rows))):
                end = (inner, *at, i) if with_lse else (inner, *at, i, 0)
                nodes = self._parts(dsk, at, place, i, rows, mine)
                if self.whole and nodes:
                    dsk[end] = dsk.pop(nodes[0])
                    continue
                level = 0
                while any(j >= self.split_every for j in nodes):
                    level += 1
                    nodes = self._merged(dsk, nodes, (f"attention-merge-{self.token}", level, *at, i))
                shape = (*(s.stop - s.start for s in place), rows[1] - rows[0], self.value.shape[-1])
                if self.whole:  # and there is nothing to see
                    sinks = mine.get("sinks")
                dsk[end] = (_Finish(shape, self.dtype, self.real, sinks, with_lse), list(nodes.values()))

        sources = [x.array for x in self.operands.values()] + ([] if self.pairs is None else [self.pairs])
        graph = HighLevelGraph.from_collections(inner, dsk, dependencies=sources)
        chunks = (*self.batch_chunks, self.rows, (self.value.shape[-1],))
        if not with_lse:
            return self._as_query(da.Array(graph, name, chunks, dtype=self.dtype))
        out = _picked(graph, inner, 0, name, chunks, self.dtype)
        lse = _picked(graph, inner, 1, f"attention-lse-{self.token}", chunks[:-1], self.real)
        return self._as_query(out), self._as_query(lse)

    def _parts(
        self,
        dsk: dict[Any, Any],
        at: Block,
        place: tuple[slice, ...],
        i: int,
        rows: tuple[int, int],
        mine: dict[str, Any],
    ) -> dict[int, Any]:
        """Adds the tasks for a block of queries: their keys, by the number of the block of keys."""
        nodes: dict[int, Any] = {}
        bounds = np.array(_bounds(self.cols))
        lengths = [name for name in ("query_lengths", "key_lengths") if self.rules[name] is not None]
        real = None if self.whole else self.real
        for j in np.flatnonzero(self.sight.seen(place, rows, bounds)).tolist():
            cols = int(bounds[j]), int(bounds[j + 1])
            if self._is_false(place, rows, cols):
                continue
            moved = self.sight.own(place, rows, cols)
            own = {name: moved[name] for name in ("query_offset", *lengths)} | mine
            if self.block_sizes is not None:
                own["block_size"] = self.block_sizes[0][i], self.block_sizes[1][j]
            task = (*at, i, j)
            pair, within = self._key_value(task)
            run = _Attend(self.alike, own, self.names, self.queries, real, within)
            others = (self.operands[name].at(task) for name in self.names)
            nodes[j] = (f"attention-part-{self.token}", *task)
            dsk[nodes[j]] = (run, self.operands["query"].at(task), pair, *others)
        return nodes

    def _merged(self, dsk: dict[Any, Any], nodes: dict[int, Any], name: tuple[Any, ...]) -> dict[int, Any]:
        """One level of the tree; parts stand at their places in it, whichever others there are."""
        above: dict[int, Any] = {}
        for to, group in itertools.groupby(nodes.items(), lambda node: node[0] // self.split_every):
            members = [key for _, key in group]
            above[to] = members[0]
            if len(members) > 1:
                above[to] = (*name, to)
                dsk[above[to]] = (_merge, members)
        return above

    def _key_value(self, task: Block) -> tuple[tuple[Any, ...], tuple[slice, ...] | None]:
        """Where the keys and values of a task are, and which part of a block counts."""
        if self.pairs is None:
            return self.operands["pairs"].at(task), None
        n = len(self.batch)
        lead = len(self.pairs.shape) - 2
        found = [where[task[n - lead + axis]] if where else (0, slice(None)) for axis, where in enumerate(self.where)]
        blocks, within = zip(*found, strict=True) if found else ((), ())
        return (self.pairs._pairs.name, *blocks, task[n + 1], 0, 0), within

    def _as_query(self, x: da.Array) -> da.Array:
        """In the chunks of query, which may have been cut finer or joined to groups of heads."""
        lead, n = self.query.ndim - 2, len(self.batch)
        chunks = list(x.chunks)
        chunks[n] = self.query_chunks[-2]
        for axis in range(lead):
            to = n - lead + axis
            if self.query.shape[axis] == self.batch[to]:
                chunks[to] = self.query_chunks[axis]
        return _recut(x, tuple(chunks))


def merge_attention(
    outs: Sequence[ArrayLike | da.Array], lses: Sequence[ArrayLike | da.Array]
) -> tuple[da.Array, da.Array]:
    """
    Merge attention over parts of the keys, exactly: `fastattn.merge_attention` for Dask arrays.

    Parameters
    ----------
    outs : sequence of array_like or dask arrays, each of shape (..., L, E)
        The outputs for each part.
    lses : sequence of array_like or dask arrays, each of shape (..., L)
        Their log-sum-exps.

    Returns
    -------
    out : dask array, shape (..., L, E)
        In the chunks of the first output.
    lse : dask array, shape (..., L)

    Raises
    ------
    ValueError, TypeError
        At the call, if an argument is not as above; the message names it.

    Examples
    --------
    >>> import dask.array as da
    >>> from fastattn.integrations.dask import dot_product_attention, merge_attention
    >>> x = da.random.default_rng(0).standard_normal((100, 8), chunks=(50, 8))
    >>> parts = [dot_product_attention(x, y, y, return_lse=True) for y in (x[:30], x[30:])]
    >>> out, lse = merge_attention(*zip(*parts))
    >>> bool(da.allclose(out, dot_product_attention(x, x, x)).compute())
    True
    """
    for x, name in ((outs, "outs"), (lses, "lses")):
        if not isinstance(x, (list, tuple)):
            raise TypeError(f"{name} must be a list or a tuple of arrays, one for each part, not {type(x).__name__}")
    of_out = [_array(x, f"outs[{p}]") for p, x in enumerate(outs)]
    of_lse = [_array(x, f"lses[{p}]") for p, x in enumerate(lses)]
    shapes = [x.shape for x in of_out], [x.shape for x in of_lse]
    fit = all(x == shapes[0][0] for x in shapes[0]) and all(x == shapes[0][0][:-1] for x in shapes[1])
    # The core checks all of it; where shapes fit, without rows, so that it computes nothing.
    stand_ins = [[_stand_in(x, np.float64 if x.dtype.kind in "biu" else None) for x in xs] for xs in (of_out, of_lse)]
    if fit and len(shapes[0]) == len(shapes[1]) > 0 and len(shapes[0][0]) > 1:
        stand_ins = [[x[..., :0, :] for x in stand_ins[0]], [x[..., :0] for x in stand_ins[1]]]
    dtypes = [x.dtype for x in fastattn.merge_attention(*stand_ins)]

    first = next((x for x, given in zip(of_out, outs, strict=True) if isinstance(given, da.Array)), of_out[0])
    chunks = (*first.chunks[:-1], (first.shape[-1],))
    of_out, of_lse = [_recut(x, chunks) for x in of_out], [_recut(x, chunks[:-1]) for x in of_lse]
    token = tokenize([x.name for x in (*of_out, *of_lse)])
    inner = f"attention-merge-{token}"
    dsk = {
        (inner, *at): (fastattn.merge_attention, [(x.name, *at, 0) for x in of_out], [(x.name, *at) for x in of_lse])
        for at in _blocks(chunks[:-1])
    }
    graph = HighLevelGraph.from_collections(inner, dsk, dependencies=[*of_out, *of_lse])
    names = f"merge-attention-{token}", f"merge-attention-lse-{token}"
    out, lse = (
        _picked(graph, inner, number, name, sizes, dtype)
        for number, (name, sizes, dtype) in enumerate(zip(names, (chunks, chunks[:-1]), dtypes, strict=True))
    )
    return out, lse
