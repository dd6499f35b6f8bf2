"""Attention over a stream: the results of the offline call, bit for bit, in memory that does not grow with time.

Frames arrive a few at a time, and rows whose look-ahead is complete are returned. Three tapes hold what is still
needed: the waiting queries, and the keys and values that later rows may see.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn._attention import dot_product_attention as attend
from fastattn._call import check
from fastattn._checks import Turn, as_array, common_dtype, converted, floating, integer
from fastattn._rules import StreamRules, refuse_others, takes
from fastattn.attention import dot_product_attention

if TYPE_CHECKING:
    from typing import Self, Unpack

    from numpy.typing import ArrayLike, NDArray

# FA_SPAN of kernels/contract.h: sums over keys are split at multiples of it, counted from the first key of a call. If
# every call's first key is at such a multiple, they are split as in the offline call.
_SPAN = 2048
# Frames processed at a time; the tapes need not hold all of a longer push.
_PIECE = 2048
# The least capacity of a tape, in frames.
_LEAST_CAPACITY = 256

_NAMES = ("query", "key", "value")
# Rules whose values are arrays.
_ARRAYS = {"alibi_slopes", "relative_bias", "sinks"}
_INSTEAD = "pass its data"  # for masked arrays


class _Tape(NamedTuple):
    """
    The latest frames of a stream, (*batch, frames, channels), in one piece of memory.

    Appending returns a new tape. It may share the memory of the old one, but writes only after its end; so the old tape
    is unchanged, and remains valid if an error follows.
    """

    memory: NDArray[np.uint8]
    batch: tuple[int, ...]
    channels: int
    dtype: np.dtype[Any]
    strides: tuple[int, ...]
    room: int  # how many frames before `first` a view may start
    capacity: int  # frames that fit in memory
    first: int  # position of the first frame in memory
    end: int  # position of the next frame

    @classmethod
    def blank(
        cls, batch: tuple[int, ...], channels: int, dtype: np.dtype[Any], room: int, capacity: int, first: int
    ) -> _Tape:
        """A tape without frames; the next frame has position `first`."""
        frame = channels * dtype.itemsize
        strides = [dtype.itemsize, frame]
        stride = capacity * frame
        for size in reversed(batch):
            strides.append(stride)
            stride *= max(size, 1)  # even an empty view must lie within the memory
        memory = np.empty(room * frame + stride, np.uint8)
        return cls(memory, batch, channels, dtype, tuple(reversed(strides)), room, capacity, first, first)

    def view(self, start: int, stop: int) -> NDArray[Any]:
        """
        The frames [start, stop).

        What precedes the first frame in memory is arbitrary: other heads' frames, or unwritten memory. It is there so
        that a call's first key can be where sums are split, and no query may see it. One `room` suffices for all heads,
        since a head's frames are preceded by those of another.
        """
        offset = (self.room + start - self.first) * self.channels * self.dtype.itemsize
        shape = (*self.batch, stop - start, self.channels)
        # Unlike as_strided, this refuses views that reach outside the memory.
        return np.ndarray(shape, self.dtype, self.memory, offset, self.strides)

    def append(self, frames: NDArray[Any], needed: int, room: int = 0) -> _Tape:
        """
        A tape with these frames appended; those before position `needed` may be dropped. A view of it may start `room`
        frames before the first one in memory.
        """
        end = self.end + frames.shape[-2]
        tape = self
        if end > self.first + self.capacity:
            # Twice what is needed: at least as many frames then arrive before the next move as this one copies.
            capacity = max(self.capacity, 2 * (end - needed), _LEAST_CAPACITY)
            tape = _Tape.blank(self.batch, self.channels, self.dtype, room, capacity, needed)
            tape.view(needed, self.end)[...] = self.view(needed, self.end)
        tape.view(self.end, end)[...] = converted(frames, self.dtype)
        return tape._replace(end=end)

    def __reduce__(self) -> Any:
        """For copies and pickles: memory of their own, and only the frames of this one."""
        frames = self.view(self.first, self.end)
        return _filled, (self.batch, self.channels, self.dtype, self.room, self.capacity, self.first, frames)


def _filled(
    batch: tuple[int, ...],
    channels: int,
    dtype: np.dtype[Any],
    room: int,
    capacity: int,
    first: int,
    frames: NDArray[Any],
) -> _Tape:
    """A tape with these frames."""
    tape = _Tape.blank(batch, channels, dtype, room, capacity, first)
    end = first + frames.shape[-2]
    tape.view(first, end)[...] = frames
    return tape._replace(end=end)


class _State(NamedTuple):
    """The state of a stream. A push replaces it as a whole, at its end: an error leaves the old one."""

    shapes: tuple[tuple[int, ...], ...] = ()  # of query, key and value, without the frames' axis
    dtypes: tuple[np.dtype[Any], ...] = ()
    rows: NDArray[Any] | None = None  # an output with no rows
    tapes: tuple[_Tape, ...] = ()
    pushed: int = 0
    returned: int = 0
    flushed: bool = False


def _side(x: Any, name: str) -> int | None:
    """`left` or `right`; None if unbounded."""
    if x is None:
        return None
    n = integer(x, name, "an integer of at least 0, or -1 or None for unbounded", -1)
    return None if n == -1 else n


class StreamingAttention:
    """
    Truncated dot-product self-attention over a stream: frames go in as they arrive, rows come out as soon as they can.

    However the stream is split into pushes, the rows are those of the offline call on all of it, bit for bit:
    ``truncated_attention(query, key, value, left, right, query_offset=0)``, or `dot_product_attention` with
    ``window_size=(left, right)``, `chunk_size` and `left_chunks`. Memory and the cost of a frame do not grow with time.

    Parameters
    ----------
    left : int or None
        Keys that a query sees before its own frame. None or -1: all of them; memory and cost then grow with the stream,
        unless `left_chunks` bounds them.
    right : int or None, default 0
        Keys that a query sees after its own frame: its look-ahead, for which its row has to wait. None or -1: all of
        them, which needs `chunk_size`.
    chunk_size, left_chunks : int, optional
        The stream is split into chunks of `chunk_size` frames, and a query sees all of its own chunk and of the
        `left_chunks` chunks before it (None or -1: all). A key counts only if `left` and `right` allow it too: for
        chunks alone pass ``StreamingAttention(None, None, chunk_size=16, left_chunks=4)``.
    scale, softcap, alibi_slopes, sinks, activation, enable_gqa, num_threads : optional
        As for `dot_product_attention`. `scale` is by default ``1 / sqrt(D)``, `activation` 'softmax', `enable_gqa`
        False.
    relative_bias : array_like of floats, shape (..., 1, left + right + 1) or (left + right + 1,), optional
        Added to the scores of the window: entry w to that of the key w - left frames after the query. It depends on
        the distance only; its leading axes broadcast to the batch axes. Needs `left` and `right`.

    Attributes
    ----------
    pushed, returned, waiting, latency, nbytes : int
        The state of the stream, in frames, and the bytes that it holds; read-only.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it.

    See Also
    --------
    truncated_attention, dot_product_attention

    Notes
    -----
    Offline calls with eight queries or fewer use other loops; a stream agrees with them only up to rounding.

    Arrays are copied, so what was passed may be overwritten. The tapes of queries, keys and values hold twice the
    frames that are needed (all that the next row sees, up to the last frame), and at least 256; when they are full,
    what is needed is moved to new ones, so a frame is copied twice on average. Longer pushes are processed 2048 frames
    at a time.

    An object serves one stream, or one batch of synchronous streams, and one thread at a time: `push`, `flush` and
    `reset` raise a RuntimeError while another of them runs. A copy (``copy.copy``, ``copy.deepcopy``, which any thread
    may make at any time) is an independent stream that continues from the same frame; so is an unpickled one.

    Examples
    --------
    A row sees two frames before it and one after it, so it is returned once the next frame has arrived:

    >>> import numpy as np
    >>> from fastattn.streaming import StreamingAttention
    >>> stream = StreamingAttention(2, 1)
    >>> x, value = np.zeros((5, 4)), np.arange(5.0)[:, None]
    >>> stream.push(x[:1], x[:1], value[:1]).shape
    (0, 1)
    >>> stream.push(x[1:4], x[1:4], value[1:4]).ravel()
    array([0.5, 1. , 1.5])
    >>> stream.push(x[4:], x[4:], value[4:]).ravel()
    array([2.5])
    >>> stream.flush().ravel()
    array([3.])
    >>> stream.pushed, stream.returned, stream.latency
    (5, 5, 1)

    Chunks of three frames, each with one chunk before it:

    >>> stream = StreamingAttention(None, None, chunk_size=3, left_chunks=1)
    >>> x, value = np.zeros((7, 4)), np.arange(7.0)[:, None]
    >>> stream.push(x, x, value).ravel()
    array([1. , 1. , 1. , 2.5, 2.5, 2.5])
    >>> stream.flush().ravel()
    array([4.5])
    """

    @takes(StreamRules, like=dot_product_attention)
    def __init__(self, left: int | None, right: int | None = 0, **rules: Unpack[StreamRules]) -> None:
        refuse_others(rules, StreamRules, "StreamingAttention")
        self._left, self._right = _side(left, "left"), _side(right, "right")
        own: dict[str, Any] = {name: x for name, x in rules.items() if x is not None}
        # Copies, so that changing an array between two pushes has no effect.
        for name in own.keys() & _ARRAYS:
            own[name] = np.array(as_array(own[name], name, _INSTEAD))
        self._rules = {**own, "window_size": (self._left, self._right)}
        self._check_rules()
        self._rules |= {name: x.item() for name, x in own.items() if isinstance(x, np.ndarray) and name not in _ARRAYS}
        chunk_size, left_chunks = self._rules.get("chunk_size"), self._rules.get("left_chunks")
        self._chunk_size = None if chunk_size is None else chunk_size.__index__()
        self._left_chunks = None if left_chunks is None or left_chunks == -1 else left_chunks.__index__()
        if self._right is None and self._chunk_size is None:
            raise ValueError(
                "right=None, an unbounded look-ahead, needs chunk_size: no row would be complete before the stream ends"
            )
        self._turn = Turn("stream")
        self._state = _State()

    def __copy__(self) -> Self:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._turn = Turn("stream")
        # Tapes write after their ends: two streams sharing memory would overwrite each other's frames.
        new._state = self._state._replace(tapes=tuple(copy.copy(tape) for tape in self._state.tapes))
        return new

    @property
    def pushed(self) -> int:
        """Frames pushed so far."""
        return self._state.pushed

    @property
    def returned(self) -> int:
        """Rows returned so far."""
        return self._state.returned

    @property
    def waiting(self) -> int:
        """Rows not returned yet: ``pushed - returned``, what `flush` would return."""
        state = self._state
        return state.pushed - state.returned

    @property
    def latency(self) -> int:
        """
        The most frames that must follow a frame before its row is returned: `right`, or with chunks the smaller of
        `right` and ``chunk_size - 1``.
        """
        sides = [self._right, None if self._chunk_size is None else self._chunk_size - 1]
        return min(side for side in sides if side is not None)

    @property
    def nbytes(self) -> int:
        """Memory that the stream holds, in bytes."""
        return sum(tape.memory.nbytes for tape in self._state.tapes)

    def push(self, query: ArrayLike, key: ArrayLike, value: ArrayLike) -> NDArray[Any]:
        """
        Take in the next frames; return the rows that are complete with them.

        Parameters
        ----------
        query : array_like, shape (..., n, D)
        key : array_like, shape (..., n, D)
        value : array_like, shape (..., n, E)
            The next n frames, also 0 or 1 of them. Dtypes, batch axes and broadcasting are as for
            `dot_product_attention`; all but n must stay as in the first push.

        Returns
        -------
        ndarray, shape (..., rows, E)
            The next rows whose look-ahead is complete, often none: in total ``max(0, pushed - right)`` rows so far, and
            with chunks those of complete chunks too. Of the dtype to which query, key and value promote.

        Raises
        ------
        ValueError, TypeError
            If the frames are not as above or do not match those before, or after `flush`.
        MemoryError
            If there is no memory for the result or the frames.

        Notes
        -----
        After an error, Ctrl-C included, the stream is where it was before.

        Examples
        --------
        >>> import numpy as np
        >>> from fastattn.streaming import StreamingAttention
        >>> stream = StreamingAttention(100, 2)
        >>> frames = np.ones((8, 5, 64), np.float32)
        >>> stream.push(frames, frames, frames).shape
        (8, 3, 64)
        """
        with self._turn:
            return self._pushed(query, key, value)

    def _pushed(self, query: Any, key: Any, value: Any) -> NDArray[Any]:
        state = self._state
        if state.flushed:
            raise ValueError("push after flush(), which ended the stream: reset() begins a new one")
        arrays = tuple(as_array(x, name, _INSTEAD) for x, name in zip((query, key, value), _NAMES, strict=True))
        state = self._checked(state, arrays)
        count, before = arrays[0].shape[-2], state.returned
        out = self._new_rows(state, max(self._complete(state.pushed + count) - before, 0))
        for at in range(0, count, _PIECE):
            query, key, value = (x[..., at : at + _PIECE, :] for x in arrays)
            seen = self._first_seen(state.returned)
            tapes = (
                state.tapes[0].append(query, state.returned),
                state.tapes[1].append(key, seen, _SPAN),
                state.tapes[2].append(value, seen, _SPAN),
            )
            pushed = state.pushed + query.shape[-2]
            complete = max(self._complete(pushed), state.returned)
            rows = out[..., state.returned - before : complete - before, :]
            self._attend(tapes, state.returned, complete, pushed, rows)
            state = state._replace(tapes=tapes, pushed=pushed, returned=complete)
        self._state = state
        return out

    def flush(self) -> NDArray[Any]:
        """
        End the stream; return the rows that were waiting for more frames. They see the frames that there are.

        Returns
        -------
        ndarray, shape (..., rows, E)
            The remaining ``pushed - returned`` rows; none if called again.

        Raises
        ------
        ValueError
            If nothing was ever pushed, not even 0 frames: the shape of a row is then unknown.
        MemoryError
            If there is no memory for the result.

        Examples
        --------
        >>> import numpy as np
        >>> from fastattn.streaming import StreamingAttention
        >>> stream = StreamingAttention(100, 2)
        >>> frames = np.ones((8, 5, 64), np.float32)
        >>> _ = stream.push(frames, frames, frames)
        >>> stream.flush().shape
        (8, 2, 64)
        """
        with self._turn:
            state = self._state
            if state.rows is None:
                raise ValueError("flush before any push: the shape of the rows is not known yet")
            out = self._new_rows(state, self.waiting)
            self._attend(state.tapes, state.returned, state.pushed, state.pushed, out)
            self._state = state._replace(returned=state.pushed, flushed=True)
            return out

    def reset(self) -> None:
        """
        Forget all frames and begin a new stream, whose shapes and dtypes may differ.

        Examples
        --------
        >>> from fastattn.streaming import StreamingAttention
        >>> stream = StreamingAttention(100, 2)
        >>> stream.reset()
        >>> stream.pushed
        0
        """
        with self._turn:
            self._state = _State()

    def _check_rules(self) -> None:
        """Check the rules as far as possible without frames."""
        bias = self._rules.get("relative_bias")
        if bias is not None and bias.ndim > 1 and bias.shape[-2] != 1:
            raise ValueError(
                f"relative_bias has shape {bias.shape}; its axis -2 must be 1, since in a stream it cannot depend on "
                f"the query: (..., 1, left + right + 1)"
            )
        batches: dict[str, tuple[int, ...]]
        batches = {name: self._rules[name].shape for name in ("alibi_slopes", "sinks") if name in self._rules}
        if bias is not None:
            batches["relative_bias"] = bias.shape[:-2]
        try:
            batch = np.broadcast_shapes(*batches.values())
        except ValueError:
            got = ", ".join(f"{name} {shape}" for name, shape in batches.items())
            raise ValueError(f"the batch axes of {got} do not broadcast") from None
        nothing = (*batch, 0, 1)
        check(nothing, nothing, nothing, np.float64, self._rules)

    def _checked(self, state: _State, arrays: tuple[NDArray[Any], ...]) -> _State:
        """Check the frames; return the state, in which the first push records shapes and dtypes."""
        for name, x in zip(_NAMES, arrays, strict=True):
            if x.ndim < 2:
                axes = "(..., n, E)" if name == "value" else "(..., n, D)"
                raise ValueError(f"{name} has shape {x.shape}; it needs at least two axes, {axes}")
        counts = [x.shape[-2] for x in arrays]
        if len(set(counts)) > 1:
            raise ValueError(
                f"query, key and value have {counts[0]}, {counts[1]} and {counts[2]} frames (axis -2): each frame "
                f"brings one of each"
            )
        shapes = tuple((*x.shape[:-2], x.shape[-1]) for x in arrays)
        dtypes = tuple(x.dtype for x in arrays)
        if state.rows is None:
            # In the dtype of the computation, so that no call converts them again.
            checked = [floating(x[..., :0, :], name) for x, name in zip(arrays, _NAMES, strict=True)]
            dtype = common_dtype([x.dtype for x in checked], _NAMES)
            query, key, value = (x.shape for x in checked)
            rows = np.empty(check(query, key, value, dtype, self._rules), dtype)
            tapes = tuple(_Tape.blank(shape[:-1], shape[-1], rows.dtype, 0, 0, 0) for shape in shapes)
            return state._replace(shapes=shapes, dtypes=dtypes, rows=rows, tapes=tapes)
        for name, x, shape, dtype in zip(_NAMES, arrays, state.shapes, state.dtypes, strict=True):
            if (*x.shape[:-2], x.shape[-1]) != shape:
                first = ", ".join(map(str, (*shape[:-1], "n", shape[-1])))
                raise ValueError(
                    f"{name} has shape {x.shape}; the stream began with ({first}), and all but n must stay the same"
                )
            if x.dtype != dtype:
                raise TypeError(f"{name} has dtype {x.dtype}; the stream began with {dtype}, which must stay the same")
        return state

    def _new_rows(self, state: _State, count: int) -> NDArray[Any]:
        assert state.rows is not None
        return np.empty((*state.rows.shape[:-2], count, state.rows.shape[-1]), state.rows.dtype)

    def _complete(self, pushed: int) -> int:
        """How many rows see no frame that is still to come."""
        complete = 0 if self._right is None else max(pushed - self._right, 0)
        if self._chunk_size is not None:
            complete = max(complete, pushed // self._chunk_size * self._chunk_size)
        return complete

    def _first_seen(self, row: int) -> int:
        """The first key that a row, or any after it, may see."""
        first = 0
        if self._left is not None:
            first = max(first, row - self._left)
        if self._chunk_size is not None and self._left_chunks is not None:
            first = max(first, (row // self._chunk_size - self._left_chunks) * self._chunk_size)
        return first

    def _attend(self, tapes: tuple[_Tape, ...], first: int, stop: int, pushed: int, out: NDArray[Any]) -> None:
        """Compute the rows [first, stop) into `out`; frames before `pushed` have arrived."""
        if first == stop:
            return
        query, key, value = tapes
        start = self._first_seen(first) // _SPAN * _SPAN
        rules = {**self._rules, "query_offset": first - start, "out": out}
        # The loops must not depend on how many queries a push completes, so no decode loops for few.
        attend(query.view(first, stop), key.view(start, pushed), value.view(start, pushed), rules, False, start)
