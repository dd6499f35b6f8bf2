"""Keys and values of the tokens so far, for decoding: room for them is made once, and attention reads them in place."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray


def _integer(x: Any, name: str, least: int, allowed: str) -> int:
    if isinstance(x, (bool, np.bool_)) or not hasattr(x, "__index__") or getattr(x, "ndim", 0) != 0:
        raise TypeError(f"{name} must be {allowed}, not {x!r}")
    n: int = x.__index__()
    if n < least:
        raise ValueError(f"{name} must be {allowed}, not {n}")
    return n


def _size(x: Any, name: str, least: int) -> int:
    return _integer(x, name, least, f"an integer of at least {least}")


def _read_only(x: NDArray[Any]) -> NDArray[Any]:
    x.flags.writeable = False
    return x


class KVCache:
    """
    Keys and values of a batch of sequences that grow, for decoding with `dot_product_attention`.

    Parameters
    ----------
    batch_shape : int or tuple of int
        The batch axes before the heads; an int B means ``(B,)``, and ``()`` one sequence.
    num_kv_heads : int
        Heads of key and value (axis -3); queries may have a whole multiple of them, with ``enable_gqa=True``.
    capacity : int
        Tokens for which each sequence has room.
    head_dim : int
        Channels of a key.
    value_dim : int, optional
        Channels of a value; default `head_dim`.
    dtype : dtype_like, default float32
        float32, float64, float16 or ml_dtypes.bfloat16.
    window : int, optional
        With it the cache never fills up: it keeps at least the last `window` tokens of each sequence and lets go of
        others when it needs room. At most `capacity`.

    Attributes
    ----------
    key, value, lengths, dropped : ndarray
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

    Notes
    -----
    Key 0 of `key` is the first one that is still there: all positions (`query_offset`, windows, ALiBi, the columns of a
    mask) count from it. By default the last query lines up with the last valid key, which is right for a causal step
    whatever has gone. Where absolute positions matter, as for rotary encodings, add `dropped`.

    With a window, tokens are moved only when there is no room: then the last `window` of those that are there (fewer
    where the new ones leave less room) go to the front, and the new ones behind them. A capacity of twice the window
    makes that one copy a token, on the average. For steps of n tokens, each of which looks back on `window` others, a
    capacity of ``window + n`` or more is needed; and attention has to be told the window too, since more than the
    window may be there.

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
    ) -> None:
        sizes = batch_shape if isinstance(batch_shape, (tuple, list)) else (batch_shape,)
        allowed = "an integer or a tuple of integers, of at least 0"
        self._batch = tuple(_integer(size, "batch_shape", 0, allowed) for size in sizes)
        heads = _size(num_kv_heads, "num_kv_heads", 1)
        self._capacity = _size(capacity, "capacity", 1)
        key_dim = _size(head_dim, "head_dim", 0)
        dims = key_dim, key_dim if value_dim is None else _size(value_dim, "value_dim", 0)
        self._window = None if window is None else _size(window, "window", 1)
        if self._window is not None and self._window > self._capacity:
            raise ValueError(f"window={self._window} tokens cannot be kept with capacity={self._capacity}")
        self._dtype = np.dtype(dtype)
        if self._dtype.name not in ("float32", "float64", "float16", "bfloat16") or not self._dtype.isnative:
            raise TypeError(f"dtype must be float32, float64, float16 or ml_dtypes.bfloat16, not {self._dtype}")
        self._shapes = [(*self._batch, heads, self._capacity, dim) for dim in dims]
        try:
            # Zeros: what lies past the length of a sequence is in the views, too, and better nothing than anything.
            self._key, self._value = (np.zeros(shape, self._dtype) for shape in self._shapes)
        except ValueError as error:  # sizes beyond the address space
            raise MemoryError(f"no memory for a cache of shapes {self._shapes[0]} and {self._shapes[1]}") from error
        # The same with one batch axis.
        count = math.prod(self._batch)
        self._flat = [x.reshape(count, *x.shape[-3:]) for x in (self._key, self._value)]
        self.reset()

    @property
    def key(self) -> NDArray[Any]:
        """
        The keys, (*batch_shape, num_kv_heads, max(lengths), head_dim): a read-only view.

        Past the length of a sequence it holds anything. Appending to a cache without window leaves a view as it is;
        with a window, what it shows may move.
        """
        return _read_only(self._key[..., : self._longest, :])

    @property
    def value(self) -> NDArray[Any]:
        """The values, (*batch_shape, num_kv_heads, max(lengths), value_dim): a read-only view, as `key`."""
        return _read_only(self._value[..., : self._longest, :])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """
        How many tokens of each sequence are there, int64, (*batch_shape, 1), as `key_lengths` wants it.

        Read-only; appending makes a new one.
        """
        return self._lengths

    @property
    def dropped(self) -> NDArray[np.int64]:
        """How many tokens of each sequence have been let go, as `lengths`; ``dropped + lengths`` have ever come."""
        return self._dropped

    @property
    def capacity(self) -> int:
        """Tokens for which each sequence has room."""
        return self._capacity

    @property
    def window(self) -> int | None:
        """How many of the last tokens are kept at least; None: all."""
        return self._window

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of keys and values."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Memory that the cache holds, in bytes."""
        return self._key.nbytes + self._value.nbytes

    def reset(self) -> None:
        """
        Forget all tokens; the memory stays.

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
        self._settle(zeros, zeros.copy())

    def append(self, key: ArrayLike, value: ArrayLike, lengths: ArrayLike | None = None) -> None:
        """
        Add n tokens to each sequence, behind those that are there.

        Parameters
        ----------
        key : array_like, shape (*batch_shape, num_kv_heads, n, head_dim)
        value : array_like, shape (*batch_shape, num_kv_heads, n, value_dim)
            Converted to the cache's dtype where that is a conversion of the same kind
            (``numpy.can_cast(..., 'same_kind')``: also float64 to float32, or integers).
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
        key, value = self._converted(key, "key", 0), self._converted(value, "value", 1)
        n = key.shape[-2]
        if value.shape[-2] != n:
            raise ValueError(f"value has {value.shape[-2]} tokens (axis -2) and key {n}: each token brings both")
        came = self._counts(lengths, n)
        there = self._lengths.ravel()
        kept, new = self._plan(came)
        moved = np.flatnonzero(kept < there)
        if moved.size:
            # What came might be views of what is about to move.
            own = self._key, self._value
            key, value = (x.copy() if any(np.may_share_memory(x, y) for y in own) else x for x in (key, value))
            for s in moved:
                for flat in self._flat:
                    flat[s, :, : kept[s]] = flat[s, :, there[s] - kept[s] : there[s]]
        first = came - new
        for flat, x in zip(self._flat, (key, value), strict=True):
            x = x.reshape(flat.shape[0], flat.shape[1], n, flat.shape[3])
            if flat.shape[0] and all((a == a[0]).all() for a in (kept, first, new)):
                flat[:, :, kept[0] : kept[0] + new[0]] = x[:, :, first[0] : first[0] + new[0]]
            else:
                # All that count of all sequences at once: sequence b, token i of those that came.
                tokens = np.arange(n)
                b, i = np.nonzero((tokens >= first[:, None]) & (tokens < came[:, None]))
                flat[b, :, kept[b] + i - first[b]] = x[b, :, i]
        shape = self._lengths.shape
        self._settle((kept + new).reshape(shape), self._dropped + (there - kept + first).reshape(shape))

    def _plan(self, came: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many of the tokens that are there stay in each sequence, and how many of those that come go in."""
        there = self._lengths.ravel()
        full = there + came > self._capacity
        if not full.any():
            return there, came
        if self._window is None:
            raise self._no_room(there, came, full)
        # Of more than there is room for the last ones; of the old ones then as many as may be asked for.
        new = np.minimum(came, self._capacity)
        return np.where(full, np.minimum(there, np.minimum(self._window, self._capacity - new)), there), new

    def _longest_after(self, n: int, lengths: ArrayLike | None) -> int:
        """Tokens of the longest sequence, were n tokens appended, of which `lengths` count; errors as in `append`."""
        kept, new = self._plan(self._counts(lengths, n))
        return int((kept + new).max(initial=0))

    def _settle(self, lengths: NDArray[np.int64], dropped: NDArray[np.int64]) -> None:
        self._lengths, self._dropped = _read_only(lengths), _read_only(dropped)
        self._longest = int(lengths.max(initial=0))

    def _converted(self, x: ArrayLike, name: str, which: int) -> NDArray[Any]:
        """A checked array, in the cache's dtype."""
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{name} is a masked array, whose mask would be ignored: pass its data, and lengths=")
        try:
            a = np.asarray(x)
        except MemoryError:
            raise
        except Exception as error:
            raise TypeError(f"{name} cannot be made into an array: {error}") from error
        # NumPy takes complex to bfloat16 for a conversion of the same kind.
        if a.dtype.kind == "c" or not np.can_cast(a.dtype, self._dtype, "same_kind"):
            raise TypeError(
                f"{name} has dtype {a.dtype}, which does not go into a cache of {self._dtype} safely: convert it"
            )
        want = self._shapes[which]
        if a.ndim != len(want) or a.shape[:-2] != want[:-2] or a.shape[-1] != want[-1]:
            allowed = ", ".join(map(str, (*want[:-2], "n", want[-1])))
            raise ValueError(f"{name} has shape {a.shape}; it must have ({allowed}), n the number of tokens")
        return a.astype(self._dtype, copy=False)

    def _counts(self, lengths: Any, n: int) -> NDArray[np.int64]:
        """How many of n tokens count in each sequence, on one batch axis."""
        batch = self._batch
        if lengths is None:
            return np.full(math.prod(batch), n, np.int64)
        allowed = f"an integer or an integer array of shape {batch} or {(*batch, 1)}"
        try:
            a = np.asarray(lengths)
        except ValueError as error:
            raise TypeError(f"lengths must be {allowed}: {error}") from error
        if a.size == 0 and a is not lengths:  # an empty list says nothing of its dtype
            a = a.astype(np.int64)
        if a.dtype.kind not in "iu":
            raise TypeError(f"lengths must be {allowed}, not of dtype {a.dtype}")
        if a.shape not in ((), batch, (*batch, 1)):
            raise ValueError(f"lengths has shape {a.shape}; it must be {allowed}, one for each sequence")
        if a.size and (a.min() < 0 or a.max() > n):
            wrong = a.min() if a.min() < 0 else a.max()
            raise ValueError(f"lengths must lie between 0 and {n}, the number of tokens in key and value, not {wrong}")
        a = a.astype(np.int64)
        return np.full(math.prod(batch), a) if a.ndim == 0 else a.ravel()

    def _no_room(self, there: NDArray[Any], came: NDArray[Any], full: NDArray[Any]) -> ValueError:
        b = int(np.flatnonzero(full)[0])
        where = ""
        if self._batch:
            where = f" in sequence {', '.join(map(str, np.unravel_index(b, self._batch)))}"
        return ValueError(
            f"the cache has capacity={self._capacity} tokens: {there[b]} are there and {came[b]} came{where}. "
            f"reset() empties it; a cache with window= never fills up"
        )
