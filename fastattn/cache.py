"""Keys and values of the tokens so far, for decoding: allocated once, and read in place by attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn._checks import Turn, as_array, converted, empty, integer, integer_array, is_one_number, storage_dtype
from fastattn._quantize import mean_of_tokens, move_tokens, place
from fastattn.quantized import check_block, read_center, read_tokens, scales_shape

if TYPE_CHECKING:
    from typing import Self

    from numpy.typing import ArrayLike, DTypeLike, NDArray


def _size(x: Any, name: str, least: int) -> int:
    return integer(x, name, f"an integer of at least {least}", least)


def _read_only(x: NDArray[Any]) -> NDArray[Any]:
    x.flags.writeable = False
    return x


def _place(
    to: NDArray[Any], at: NDArray[np.int64], x: NDArray[Any], first: NDArray[np.int64], count: NDArray[np.int64]
) -> None:
    """
    Write `count` tokens of x, from `first` on, into each sequence of `to`, from token `at` on.

    `at`, `first` and `count` have one batch axis, like `to`.
    """
    sequences, heads, _, channels = to.shape
    n = x.shape[-2]
    x = x.reshape(sequences, heads, n, channels)
    if sequences and all((a == a[0]).all() for a in (at, first, count)):
        to[:, :, at[0] : at[0] + count[0]] = x[:, :, first[0] : first[0] + count[0]]
    else:
        # All valid tokens of all sequences at once: sequence b, token i of x.
        tokens = np.arange(n)
        b, i = np.nonzero((tokens >= first[:, None]) & (tokens < (first + count)[:, None]))
        to[b, :, at[b] + i - first[b]] = x[b, :, i]


class _Tokens(NamedTuple):
    """New tokens, as they are stored."""

    parts: list[NDArray[Any]]  # for each array of a cache, in its order
    center: NDArray[np.float32] | None  # of the keys, with these tokens


class _Step(NamedTuple):
    """What a layer's queries attend to in a step: the tokens already there, followed by the new ones."""

    key: NDArray[Any]
    value: NDArray[Any]
    scales: tuple[Any, Any, Any] | None  # key_scale, value_scale and key_center of int8
    lengths: NDArray[np.int64]  # of key and value
    dropped: NDArray[np.int64]  # tokens before them
    in_place: bool  # key and value are views of the cache, whose length does not include the new tokens yet
    new: _Tokens


class KVCache:
    """
    Keys and values of a batch of growing sequences, for decoding with `dot_product_attention`.

    Parameters
    ----------
    batch_shape : int or tuple of int
        The batch axes before the heads; an int B means ``(B,)``, ``()`` a single sequence.
    num_kv_heads : int
        Heads of key and value (axis -3); queries may have a whole multiple of them, with ``enable_gqa=True``.
    capacity : int
        Tokens for which each sequence has room.
    head_dim : int
        Channels of a key.
    value_dim : int, optional
        Channels of a value; default `head_dim`.
    dtype : dtype_like, default float32
        float32, float64, float16, ml_dtypes.bfloat16 or int8. In an int8 cache each token of each head has a scale,
        float32; what is appended is quantized, as by `quantize_kv`.
    window : int, optional
        If given, the cache never fills up: it keeps at least the last `window` tokens of each sequence and drops others
        when it needs room. At most `capacity`.
    block : int, optional
        Of an int8 cache: so many channels share a scale; divides `head_dim` and `value_dim`. Default: all of a token.
    center : "mean" or array_like, shape (*batch_shape, num_kv_heads, 1, head_dim), optional
        Of an int8 cache: taken off the keys before they are rounded; an array that broadcasts to that shape, or "mean":
        the mean over the tokens with which a sequence begins, those of its first `append` or of the first call of a
        layer. It stays the same then, until `reset`. Default: nothing.

    Attributes
    ----------
    key, value, key_scale, value_scale, key_center, lengths, dropped : ndarray
        What is in the cache; read-only.
    capacity : int
    window : int or None
    dtype : numpy.dtype
    nbytes : int
        Memory that it holds, in bytes.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it.
    MemoryError
        If there is no memory for it.

    See Also
    --------
    dot_product_attention
    MultiHeadAttention : takes a cache, and handles windows and positions.

    Notes
    -----
    Key 0 of `key` is the first one that is still there: all positions (`query_offset`, windows, chunks, ALiBi, the
    columns of a mask) count from it. By default the last query lines up with the last valid key, which is right for a
    causal step whatever has been dropped. Where absolute positions matter, as for rotary encodings, add `dropped`.

    With a window, tokens are moved only when there is no room: then the last `window` of those that are there (fewer if
    the new ones leave less room) move to the front, and the new ones follow them. With a capacity of twice the window
    that is one copy per token on average. Steps of n tokens, each of which looks back on `window` others, need a
    capacity of ``window + n`` or more; and the window must be passed to attention too, since the cache may hold more.
    `MultiHeadAttention` handles all that: its queries attend to what is there and to the new tokens before anything is
    dropped, whatever the capacity, in the window of the cache.

    Padding comes after the tokens of a sequence, and `lengths` says where it begins. Prompts that are padded on the
    left, or on both sides, are turned into such before they are embedded. With a mask (B, L) that is True for tokens:
    ``ids = numpy.take_along_axis(ids, numpy.argsort(~mask, axis=1, kind="stable"), axis=1)`` and ``lengths =
    mask.sum(axis=1)``. A sequence that has ended appends nothing more: its length in a step is 0.

    `copy`, `crop` and `select` return new caches, for rollback and for beams. So do ``copy.copy`` and
    ``copy.deepcopy``, and a cache can be pickled: only the tokens that are there, not the free room.

    Any number of threads may read a cache, attend to it or copy it at once. One at a time may change it, by `append`,
    `reset` or a call of a layer: a second one gets a RuntimeError, and so does a copy that was overtaken by a change.
    Who reads meanwhile sees the tokens before it; with a window, which moves tokens, nobody may.

    Examples
    --------
    Two sequences, 4 query heads on 2 key heads, a prompt of 3 and of 2 tokens, then one token each:

    >>> import numpy as np
    >>> import fastattn
    >>> from fastattn.cache import KVCache
    >>> rng = np.random.default_rng(0)
    >>> cache = KVCache(2, 2, 100, 8)
    >>> cache.append(rng.normal(size=(2, 2, 3, 8)), rng.normal(size=(2, 2, 3, 8)), lengths=[3, 2])
    >>> cache.append(rng.normal(size=(2, 2, 1, 8)), rng.normal(size=(2, 2, 1, 8)))
    >>> cache.key.shape
    (2, 2, 4, 8)
    >>> cache.lengths
    array([[4],
           [3]])
    >>> query = rng.normal(size=(2, 4, 1, 8)).astype(np.float32)
    >>> out = fastattn.dot_product_attention(
    ...     query, cache.key, cache.value, is_causal=True, key_lengths=cache.lengths, enable_gqa=True
    ... )
    >>> out.shape
    (2, 4, 1, 8)
    """

    _lengths: NDArray[np.int64]
    _dropped: NDArray[np.int64]

    def __init__(
        self,
        batch_shape: int | tuple[int, ...],
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        dtype: DTypeLike = np.float32,
        window: int | None = None,
        block: int | None = None,
        center: ArrayLike | str | None = None,
    ) -> None:
        sizes = batch_shape if isinstance(batch_shape, (tuple, list)) else (batch_shape,)
        allowed = "an integer or a tuple of integers, of at least 0"
        self._batch = tuple(integer(size, "batch_shape", allowed, 0) for size in sizes)
        heads = _size(num_kv_heads, "num_kv_heads", 1)
        self._capacity = _size(capacity, "capacity", 1)
        key_dim = _size(head_dim, "head_dim", 0)
        dims = key_dim, key_dim if value_dim is None else _size(value_dim, "value_dim", 0)
        self._window = None if window is None else _size(window, "window", 1)
        if self._window is not None and self._window > self._capacity:
            raise ValueError(f"window={self._window} tokens cannot be kept with capacity={self._capacity}")
        self._dtype = storage_dtype(dtype, ("int8",))
        self._quantized = self._dtype == np.int8
        self._computed = np.dtype(np.float32) if self._quantized else self._dtype  # in which a layer attends
        self._shapes = [(*self._batch, heads, self._capacity, dim) for dim in dims]
        self._center: NDArray[np.float32] | None = None
        self._is_mean = False
        if self._quantized:
            self._block = check_block(block, ((dims[0], "head_dim"), (dims[1], "value_dim")))
            self._shapes += [scales_shape(shape, self._block) for shape in self._shapes]
            self._take_center(center)
        else:
            for name, x in (("block", block), ("center", center)):
                if x is not None:
                    raise ValueError(f"{name} is for dtype=numpy.int8; a cache of {self._dtype} rounds nothing else")
        self._make_room()
        self.reset()

    def _take_center(self, center: Any) -> None:
        shape = (*self._shapes[0][:-2], 1, self._shapes[0][-1])
        if isinstance(center, str):
            if center != "mean":
                raise ValueError(f"center must be 'mean', an array that broadcasts to {shape}, or None, not {center!r}")
            self._is_mean = True
            self._center = _read_only(np.zeros(shape, np.float32))
        elif center is not None:
            self._center = _read_only(np.broadcast_to(read_center(center, shape), shape).copy())

    def _make_room(self) -> None:
        self._turn = Turn("cache")
        # Zeros, because the views include what is past the length of a sequence.
        self._key, self._value = (empty(shape, self._dtype, "a cache", True) for shape in self._shapes[:2])
        if self._quantized:
            scales = (empty(shape, np.dtype(np.float32), "a cache", True) for shape in self._shapes[2:])
            self._key_scale, self._value_scale = scales

    def _arrays(self) -> list[NDArray[Any]]:
        """All that hold something for each token."""
        return [self._key, self._value, *([self._key_scale, self._value_scale] if self._quantized else ())]

    def _flat(self) -> list[NDArray[Any]]:
        """The same with one batch axis. Not stored: in a copy of the cache such a view would become a separate
        array."""
        count = math.prod(self._batch)
        return [a.reshape(count, *a.shape[-3:]) for a in self._arrays()]

    def __getstate__(self) -> dict[str, Any]:
        seen = self._turn.begin_reading()
        names = ("_key", "_value", "_key_scale", "_value_scale") if self._quantized else ("_key", "_value")
        state = {**self.__dict__, **{name: getattr(self, name)[..., : self._longest, :].copy() for name in names}}
        self._turn.end_reading(seen)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        parts = self._arrays()
        self._make_room()
        for to, x in zip(self._arrays(), parts, strict=True):
            to[..., : self._longest, :] = x
        if self._center is not None:
            _read_only(self._center)
        self._settle(self._lengths, self._dropped, self._center)

    @property
    def key(self) -> NDArray[Any]:
        """
        The keys, (*batch_shape, num_kv_heads, max(lengths), head_dim): a read-only view.

        Past the length of a sequence its contents are arbitrary. Appending to a cache without a window leaves a view as
        it is; with a window, its contents may move.
        """
        return _read_only(self._key[..., : self._longest, :])

    @property
    def value(self) -> NDArray[Any]:
        """The values, (*batch_shape, num_kv_heads, max(lengths), value_dim): a read-only view, like `key`."""
        return _read_only(self._value[..., : self._longest, :])

    @property
    def key_scale(self) -> NDArray[np.float32] | None:
        """
        Of an int8 cache: the keys are ``key * key_scale + key_center``; else None.

        (*batch_shape, num_kv_heads, max(lengths), 1), or with as many numbers in the end as a key has blocks: a
        read-only view, like `key`. As arguments of `dot_product_attention`, this one and the next two are right for a
        cache of any dtype.
        """
        return _read_only(self._key_scale[..., : self._longest, :]) if self._quantized else None

    @property
    def value_scale(self) -> NDArray[np.float32] | None:
        """Of an int8 cache: the values are ``value * value_scale``; else None. A read-only view, like `key_scale`."""
        return _read_only(self._value_scale[..., : self._longest, :]) if self._quantized else None

    @property
    def key_center(self) -> NDArray[np.float32] | None:
        """
        Of an int8 cache with a `center`: what is added to its keys; else None.

        (*batch_shape, num_kv_heads, 1, head_dim), read-only. A mean is zeros as long as a sequence has no
        tokens; the next ones make a new array.
        """
        return self._center

    @property
    def lengths(self) -> NDArray[np.int64]:
        """
        How many tokens of each sequence are there, int64, (*batch_shape, 1), in the form that `key_lengths` takes.

        Read-only; appending makes a new one.
        """
        return self._lengths

    @property
    def dropped(self) -> NDArray[np.int64]:
        """How many tokens of each sequence have been dropped, shaped like `lengths`; ``dropped + lengths`` were ever
        appended."""
        return self._dropped

    @property
    def capacity(self) -> int:
        """Tokens for which each sequence has room."""
        return self._capacity

    @property
    def window(self) -> int | None:
        """How many of the last tokens are always kept; None: all."""
        return self._window

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of keys and values."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Memory that the cache holds, in bytes."""
        return sum(a.nbytes for a in self._arrays()) + (0 if self._center is None else self._center.nbytes)

    def reset(self) -> None:
        """
        Forget all tokens, and the mean of keys; the memory stays.

        Examples
        --------
        >>> from fastattn.cache import KVCache
        >>> cache = KVCache((), 1, 10, 4)
        >>> cache.append([[[1, 2, 3, 4]]], [[[1, 2, 3, 4]]])
        >>> cache.reset()
        >>> cache.lengths
        array([0])
        """
        zeros = np.zeros((*self._batch, 1), np.int64)
        with self._turn:
            center = self._center
            if self._is_mean and center is not None:
                center = _read_only(np.zeros_like(center))
            self._settle(zeros, zeros.copy(), center)

    def append(self, key: ArrayLike, value: ArrayLike, lengths: ArrayLike | None = None) -> None:
        """
        Append n tokens to each sequence.

        Parameters
        ----------
        key : array_like, shape (*batch_shape, num_kv_heads, n, head_dim)
        value : array_like, shape (*batch_shape, num_kv_heads, n, value_dim)
            Converted to the cache's dtype if that is a conversion of the same kind (``numpy.can_cast(...,
            'same_kind')``: also float64 to float32, or integers).
        lengths : int or array_like of int, shape batch_shape or (*batch_shape, 1), optional
            How many of the n tokens count in each sequence, 0 to n: the first ones; default all.

        Raises
        ------
        ValueError
            If shapes do not fit; if `lengths` are not between 0 and n; without a window, if a sequence has no room.
        TypeError
            If a dtype does not fit.

        Notes
        -----
        After an error the cache is as it was before.

        Examples
        --------
        A window of 2 tokens in a cache for 3: the fourth token finds no room, so the last two move to the front.

        >>> import numpy as np
        >>> from fastattn.cache import KVCache
        >>> cache = KVCache((), 1, 3, 1, window=2)
        >>> for token in range(4):
        ...     cache.append([[[token]]], [[[token]]])
        >>> cache.key.ravel()
        array([1., 2., 3.], dtype=float32)
        >>> cache.dropped
        array([1])
        """
        with self._turn:
            self._append(key, value, lengths)

    def _append(self, key: ArrayLike, value: ArrayLike, lengths: ArrayLike | None) -> None:
        arrays = [self._checked(x, name, which) for which, (x, name) in enumerate(((key, "key"), (value, "value")))]
        n = arrays[0].shape[-2]
        if arrays[1].shape[-2] != n:
            raise ValueError(f"value has {arrays[1].shape[-2]} tokens (axis -2) and key {n}: each token brings both")
        came = self._counts(lengths, n)
        # If more tokens come than there is room for, the last ones; then as many of the old ones as fit.
        new = np.minimum(came, self._capacity)
        kept = np.minimum(self._beside(came), self._capacity - new)
        tokens = self._stored(arrays, came - new, came)
        if (kept < self._lengths.ravel()).any():
            # The new tokens may be views of memory that is about to move.
            own = self._arrays()
            parts = [x.copy() if any(np.may_share_memory(x, y) for y in own) else x for x in tokens.parts]
            tokens = tokens._replace(parts=parts)
        self._add(tokens, came, new, kept)

    def _add(self, tokens: _Tokens, came: NDArray[np.int64], new: NDArray[np.int64], kept: NDArray[np.int64]) -> None:
        """Put the last `new` of `came` tokens behind the last `kept` of those that are there."""
        self._let_go(kept)
        for flat, x in zip(self._flat(), tokens.parts, strict=True):
            _place(flat, kept, x, came - new, new)
        shape = self._lengths.shape
        self._settle((kept + new).reshape(shape), self._dropped + (came - new).reshape(shape), tokens.center)

    def copy(self) -> Self:
        """
        An independent cache with the same tokens, lengths and capacity.

        Returns
        -------
        KVCache

        Raises
        ------
        MemoryError
            If there is no memory for it.

        Examples
        --------
        Two continuations of the same prompt:

        >>> from fastattn.cache import KVCache
        >>> cache = KVCache((), 1, 10, 1)
        >>> cache.append([[[1], [2]]], [[[1], [2]]])
        >>> other = cache.copy()
        >>> other.append([[[7]]], [[[7]]])
        >>> cache.key.ravel(), other.key.ravel()
        (array([1., 2.], dtype=float32), array([1., 2., 7.], dtype=float32))
        """
        return self._derived(self._batch, range(math.prod(self._batch)), self._lengths, self._dropped)

    def crop(self, lengths: ArrayLike) -> Self:
        """
        An independent cache with only the first `lengths` of the tokens that are there: it takes back those after them.

        Parameters
        ----------
        lengths : int or array_like of int, shape batch_shape or (*batch_shape, 1)
            How many tokens each sequence is to have, 0 to those that are there: ``cache.lengths - 2`` takes back two.

        Returns
        -------
        KVCache
            Of the same capacity and window; ``dropped`` is unchanged, so positions continue from what is left.

        Raises
        ------
        ValueError
            If `lengths` do not fit; if a sequence that has dropped tokens would keep fewer than `window`: the next
            token would look back on dropped ones.
        TypeError
            If `lengths` are not integers.
        MemoryError
            If there is no memory for it.

        Examples
        --------
        Speculative decoding: four drafted tokens, of which the first sequence accepts one and the second three.

        >>> import numpy as np
        >>> from fastattn.cache import KVCache
        >>> cache = KVCache(2, 1, 10, 1)
        >>> cache.append(np.ones((2, 1, 5, 1)), np.ones((2, 1, 5, 1)))
        >>> cache.append(np.full((2, 1, 4, 1), 9), np.full((2, 1, 4, 1), 9))
        >>> cache = cache.crop(cache.lengths - [[3], [1]])
        >>> cache.lengths.ravel()
        array([6, 8])
        """
        there, dropped = self._lengths.ravel(), self._dropped.ravel()
        keep = self._counts(lengths, there)
        if self._window is not None:
            short = np.flatnonzero((dropped > 0) & (keep < self._window) & (keep < there))
            if short.size:
                b = int(short[0])
                raise ValueError(
                    f"lengths leaves {keep[b]} of {there[b]} tokens{self._where(b)}, fewer than window={self._window}, "
                    f"and the {dropped[b]} before them have been dropped: at least {self._window} must stay"
                )
        return self._derived(self._batch, range(len(keep)), keep.reshape(self._lengths.shape), self._dropped)

    def select(self, indices: ArrayLike) -> Self:
        """
        An independent cache with the chosen sequences, in that order: for beams, and to drop finished ones.

        Parameters
        ----------
        indices : array_like of int, shape (n,), or of bool, shape (batch_shape[0],)
            Which entries of the first batch axis, as in ``x[indices]``: each any number of times, negative numbers from
            the end. Booleans say which ones to keep.

        Returns
        -------
        KVCache
            Of batch_shape (n, *batch_shape[1:]), the same capacity and window.

        Raises
        ------
        ValueError
            If `indices` do not fit, or if there is no batch axis, ``batch_shape=()``.
        TypeError
            If `indices` are neither integers nor booleans.
        MemoryError
            If there is no memory for it.

        Examples
        --------
        Beam 2 wins twice; then only the second of the two continues.

        >>> import numpy as np
        >>> from fastattn.cache import KVCache
        >>> cache = KVCache(3, 1, 10, 1)
        >>> cache.append([[[[10]]], [[[11]]], [[[12]]]], np.zeros((3, 1, 1, 1)))
        >>> beams = cache.select([2, 2])
        >>> beams.key.ravel()
        array([12., 12.], dtype=float32)
        >>> finished = np.array([True, False])
        >>> beams.select(~finished).lengths
        array([[1]])
        """
        if not self._batch:
            raise ValueError("select chooses along the first batch axis, and this cache has none: batch_shape=()")
        chosen = self._indices(indices)
        inner = math.prod(self._batch[1:])
        sources = (chosen[:, None] * inner + np.arange(inner)).ravel()
        batch = (len(chosen), *self._batch[1:])
        return self._derived(batch, sources, self._lengths[chosen], self._dropped[chosen])

    def _derived(self, batch: tuple[int, ...], sources: Any, lengths: Any, dropped: Any) -> Self:
        """A cache of the same kind; its sequence s holds the first `lengths` tokens of this one's sequence
        sources[s]."""
        seen = self._turn.begin_reading()
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._batch = batch
        new._shapes = [(*batch, *shape[-3:]) for shape in self._shapes]
        new._make_room()
        for to, of in zip(new._flat(), self._flat(), strict=True):
            for s, (source, n) in enumerate(zip(sources, lengths.ravel(), strict=True)):
                to[s, :, :n] = of[source, :, :n]
        if self._center is not None:
            flat = self._center.reshape(math.prod(self._batch), *self._center.shape[-3:])[list(sources)]
            if self._is_mean:
                flat[(lengths + dropped).ravel() == 0] = 0
            new._center = _read_only(flat.reshape(*batch, *flat.shape[1:]))
        new._settle(lengths, dropped, new._center)
        self._turn.end_reading(seen)
        return new

    def _beside(self, came: NDArray[np.int64], every: bool = False) -> NDArray[np.int64]:
        """
        How many of the tokens that are there are kept beside the new ones: all; with a window only that many if there
        is no room for all, unless `every`.
        """
        there = self._lengths.ravel()
        full = there + came > self._capacity
        if self._window is None:
            if full.any():
                raise self._no_room(there, came, full)
            return there
        return there if every else np.where(full, np.minimum(there, self._window), there)

    def _let_go(self, kept: NDArray[np.int64]) -> None:
        """Keep only the last `kept` tokens of each sequence."""
        there, shape = self._lengths.ravel(), self._lengths.shape
        if not (kept < there).any():
            return
        # All that needs memory comes first: tokens and their number change together.
        counts = self._counted(kept.reshape(shape).copy(), self._dropped + (there - kept).reshape(shape))
        move_tokens(self._arrays(), there, counts[0])
        self._lengths, self._dropped, self._longest, self._awaits_mean = counts

    def _begin_step(
        self, key: NDArray[Any], value: NDArray[Any], came: NDArray[np.int64], old: NDArray[np.int64]
    ) -> _Step:
        """
        What a layer's queries attend to when `came` tokens come: `old` of those that are there, as from `_beside`,
        followed by the new ones. They are written to the cache if it has room, but are part of it only after
        `_end_step`.
        """
        there, shape, nothing = self._lengths.ravel(), self._lengths.shape, np.zeros_like(came)
        new = self._stored([key, value], nothing, came, "the projected ")
        lengths = old + came
        dropped = self._dropped + (there - old).reshape(shape)
        in_place = bool((lengths <= self._capacity).all())
        parts: list[NDArray[Any]]
        if in_place:
            self._let_go(old)
            for flat, x in zip(self._flat(), new.parts, strict=True):
                _place(flat, old, x, nothing, came)
            parts = self._arrays()
        elif old.any():
            parts = []
            for flat, x in zip(self._flat(), new.parts, strict=True):
                both = np.zeros((*flat.shape[:2], lengths.max(), flat.shape[3]), flat.dtype)
                _place(both, nothing, flat, there - old, old)
                _place(both, old, x, nothing, came)
                parts.append(both.reshape(*self._batch, *both.shape[1:]))
        else:
            parts = new.parts
        longest = int(lengths.max(initial=0))
        key, value, *others = (x[..., :longest, :] for x in parts)
        scales = (others[0], others[1], new.center) if others else None
        return _Step(key, value, scales, lengths.reshape(shape), dropped, in_place, new)

    def _end_step(self, step: _Step, came: NDArray[np.int64]) -> None:
        """Make the tokens of `_begin_step` part of the cache."""
        if step.in_place:
            self._settle(step.lengths, step.dropped, step.new.center)
        else:
            new = np.minimum(came, self._capacity)
            self._add(step.new, came, new, np.minimum(self._beside(came), self._capacity - new))

    def _settle(
        self, lengths: NDArray[np.int64], dropped: NDArray[np.int64], center: NDArray[np.float32] | None
    ) -> None:
        counts = self._counted(lengths, dropped)  # first: it may find no memory
        self._lengths, self._dropped, self._longest, self._awaits_mean = counts
        self._center = center

    def _counted(
        self, lengths: NDArray[np.int64], dropped: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], int, bool]:
        """Both read-only, the most tokens of a sequence, and whether some sequence has yet to be given a mean."""
        awaits_mean = self._is_mean and not (lengths + dropped).all()
        return _read_only(lengths), _read_only(dropped), int(lengths.max(initial=0)), awaits_mean

    def _checked(self, x: ArrayLike, name: str, which: int) -> NDArray[Any]:
        """A key or value array."""
        instead = "pass its data, and lengths="
        a = read_tokens(x, name, instead) if self._quantized else as_array(x, name, instead)
        # For NumPy, complex to bfloat16 is a conversion of the same kind.
        if not self._quantized and (a.dtype.kind == "c" or not np.can_cast(a.dtype, self._dtype, "same_kind")):
            raise TypeError(
                f"{name} has dtype {a.dtype}, which does not go into a cache of {self._dtype} safely: convert it"
            )
        want = self._shapes[which]
        if a.ndim != len(want) or a.shape[:-2] != want[:-2] or a.shape[-1] != want[-1]:
            allowed = ", ".join(map(str, (*want[:-2], "n", want[-1])))
            raise ValueError(f"{name} has shape {a.shape}; it must have ({allowed}), n the number of tokens")
        return a

    def _stored(
        self, arrays: list[NDArray[Any]], first: NDArray[np.int64], end: NDArray[np.int64], what: str = ""
    ) -> _Tokens:
        """The tokens of checked arrays, keys and values, as the cache stores them; those in 8 bits only from `first` to
        before `end` in each sequence, others may be anything. what: before their names in errors."""
        if not self._quantized:
            return _Tokens([converted(x, self._dtype) for x in arrays], None)
        center = self._center
        if self._awaits_mean and center is not None:
            begins = ((self._lengths + self._dropped).ravel() == 0) & (end > 0)
            if begins.any():
                center = center.copy()
                mean_of_tokens(arrays[0], center, end, begins)
                _read_only(center)
        shapes = [x.shape for x in arrays]
        shapes += [scales_shape(shape, self._block) for shape in shapes]
        key, value = (empty(shape, self._dtype, "new tokens", True) for shape in shapes[:2])
        key_scale, value_scale = (empty(shape, np.dtype(np.float32), "new tokens", True) for shape in shapes[2:])
        place(f"{what}key", arrays[0], center, key, key_scale, first, end - first, first)
        place(f"{what}value", arrays[1], None, value, value_scale, first, end - first, first)
        return _Tokens([key, value, key_scale, value_scale], center)

    def _counts(self, lengths: Any, most: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """
        `lengths`, checked, on one batch axis: at most `most`, the number of new tokens or, as an array, of those that
        are there. None: all of them.
        """
        batch = self._batch
        count = math.prod(batch)
        if lengths is None:
            return np.full(count, most, np.int64)
        allowed = f"an integer or an integer array of shape {batch} or {(*batch, 1)}"
        number = is_one_number(lengths)
        a = integer_array(integer(lengths, "lengths", allowed) if number else lengths, "lengths", allowed)
        if a.shape not in ((), batch, (*batch, 1)):
            raise ValueError(f"lengths has shape {a.shape}; it must be {allowed}, one for each sequence")
        flat = a.ravel()
        wrong = np.flatnonzero((flat < 0) | (flat > most))
        if wrong.size:
            b = int(wrong[0])
            if isinstance(most, int):
                limit = f"{most}, the number of tokens in key and value"
            else:
                limit = f"{most[b]}, the number of tokens that are there{self._where(b)}"
            raise ValueError(f"lengths must lie between 0 and {limit}, not {flat[b if a.ndim else 0]}")
        return np.full(count, a, np.int64) if a.ndim == 0 else flat.astype(np.int64)

    def _indices(self, indices: Any) -> NDArray[np.int64]:
        """Entries of the first batch axis as non-negative integers."""
        size = self._batch[0]
        allowed = f"integers from {-size} to {size - 1}, or {size} booleans, on one axis"
        a = integer_array(indices, "indices", allowed, "biu")
        if a.ndim != 1 or (a.dtype.kind == "b" and len(a) != size):
            raise ValueError(f"indices has shape {a.shape}; it must be {allowed}: batch_shape is {self._batch}")
        if a.dtype.kind == "b":
            return np.flatnonzero(a)
        wrong = np.flatnonzero((a < -size) | (a >= size))
        if wrong.size:
            raise ValueError(f"indices must be {allowed}, not {a[wrong[0]]}: batch_shape is {self._batch}")
        a = a.astype(np.int64)
        return np.where(a < 0, a + size, a)

    def _where(self, b: int) -> str:
        """For errors: which sequence b is."""
        return f" in sequence {', '.join(map(str, np.unravel_index(b, self._batch)))}" if self._batch else ""

    def _no_room(self, there: NDArray[Any], came: NDArray[Any], full: NDArray[Any]) -> ValueError:
        b = int(np.flatnonzero(full)[0])
        return ValueError(
            f"the cache has capacity={self._capacity} tokens: {there[b]} are there and {came[b]} came{self._where(b)}. "
            f"reset() empties it; a cache with window= never fills up"
        )
