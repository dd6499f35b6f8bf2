"""Attention over a stream: the results of the offline call, bit for bit, in memory that does not grow with time.

Frames arrive a few at a time, and rows whose look-ahead is complete are returned. Tapes hold what is still needed: the
waiting queries, with their relative biases if they bring any, and the keys and values that later rows may see. A layer
over a stream puts its projections before and after that.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastattn._attention import dot_product_attention as attend
from fastattn._call import check
from fastattn._checks import Turn, as_array, common_dtype, converted, empty, floating, integer
from fastattn._rules import HELD_RULES, StreamingLayerRules, StreamRules, refuse_others, takes
from fastattn.attention import dot_product_attention
from fastattn.multihead import MultiHeadAttention

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self, Unpack

    from numpy.typing import ArrayLike, NDArray

    from fastattn.multihead import _Call
    from fastattn.projections import Products

# FA_SPAN of kernels/contract.h: sums over keys are split at multiples of it, counted from the first key of a call. If
# every call's first key is at such a multiple, they are split as in the offline call.
_SPAN = 2048
# Frames processed at a time; the tapes need not hold all of a longer push.
_PIECE = 2048
# The least capacity of a tape, in frames.
_LEAST_CAPACITY = 256

# Products of so many rows or fewer, counted over all batch axes, may use other loops than those of more. A layer's
# products must not depend on how many frames a push brings, so they never have so few.
_FEW_ROWS = 8

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

    frames: tuple[tuple[str, tuple[int, ...], np.dtype[Any]], ...] = ()  # what is pushed; shapes are without n
    rows: NDArray[Any] | None = None  # attention's output with no rows
    tapes: tuple[_Tape, ...] = ()  # of query, key, value and, if each push brings one, the relative bias
    pushed: int = 0
    returned: int = 0
    flushed: bool = False


def _side(x: Any, name: str) -> int | None:
    """`left` or `right`; None if unbounded."""
    if x is None:
        return None
    n = integer(x, name, "an integer of at least 0, or -1 or None for unbounded", -1)
    return None if n == -1 else n


def _check_as_begun(state: _State, pushed: Mapping[str, NDArray[Any]]) -> None:
    """Check that the frames are like those of the first push."""
    if [name for name, *_ in state.frames] != list(pushed):
        if "relative_bias" in pushed:
            raise ValueError(
                "relative_bias came, but the stream began without one: it comes with each push or with none"
            )
        raise ValueError("relative_bias is missing: the stream began with one, so each push must bring it")
    for (name, shape, dtype), x in zip(state.frames, pushed.values(), strict=True):
        if (*x.shape[:-2], x.shape[-1]) != shape:
            first = ", ".join(map(str, (*shape[:-1], "n", shape[-1])))
            raise ValueError(
                f"{name} has shape {x.shape}; the stream began with ({first}), and all but n must stay the same"
            )
        if x.dtype != dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; the stream began with {dtype}, which must stay the same")


def _no_few_rows(x: NDArray[Any]) -> NDArray[Any]:
    """x (..., n, channels), with zeros after its frames if a product of so few rows might use other loops."""
    batch, count = math.prod(x.shape[:-2]), x.shape[-2]
    if not 0 < batch * count <= _FEW_ROWS:
        return x
    more = empty((*x.shape[:-2], _FEW_ROWS // batch + 1, x.shape[-1]), x.dtype, "frames", True)
    more[..., :count, :] = x
    return more


class _Stream:
    """What streams have in common: when rows are complete, the tapes, and how a state follows another."""

    def __init__(self, left: int | None, right: int | None, rules: Mapping[str, Any], heads: int | None = None) -> None:
        self._left, self._right = _side(left, "left"), _side(right, "right")
        own: dict[str, Any] = {name: x for name, x in rules.items() if x is not None}
        # Copies, so that changing an array between two pushes has no effect.
        for name in own.keys() & _ARRAYS:
            own[name] = np.array(as_array(own[name], name, _INSTEAD))
        self._rules = {**own, "window_size": (self._left, self._right)}
        self._check_rules(heads)
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

    def __repr__(self) -> str:
        chunks = "" if self._chunk_size is None else f", chunk_size={self._chunk_size}"
        return (
            f"<{type(self).__name__}: left={self._left}, right={self._right}{chunks}, latency={self.latency}, "
            f"pushed={self.pushed}, returned={self.returned}>"
        )

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

    def flush(self) -> NDArray[Any]:
        """
        End the stream; return the rows that were waiting for more frames. They see the frames that there are.

        Returns
        -------
        ndarray, shape (..., rows, E) or (..., rows, d_out)
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
            rows = self._new_rows(state, state.pushed - state.returned)
            self._attend(state.tapes, state.returned, state.pushed, state.pushed, rows)
            out = self._output(state, rows)
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

    def _check_rules(self, heads: int | None) -> None:
        """Check the rules as far as possible without frames; heads: the last batch axis, if it is known."""
        bias = self._rules.get("relative_bias")
        if bias is not None and bias.ndim > 1 and bias.shape[-2] != 1:
            raise ValueError(
                f"relative_bias has shape {bias.shape}; its axis -2 must be 1, (..., 1, left + right + 1): one that "
                f"depends on the query comes with each push"
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
        if heads is not None:
            batch = (*batch[:-1], heads)
        nothing = (*batch, 0, 1)
        check(nothing, nothing, nothing, np.float64, self._rules)

    def _open(self) -> _State:
        """The state, if more frames may come."""
        if self._state.flushed:
            raise ValueError("push after flush(), which ended the stream: reset() begins a new one")
        return self._state

    def _begun(
        self, state: _State, pushed: Mapping[str, NDArray[Any]], attended: Sequence[NDArray[Any]], bias: Any
    ) -> _State:
        """
        The state with what its first push records, or as it is if the frames are like those before.

        pushed: the frames, by name. attended: the query, key and value that follow from them; of the first push, only
        dtypes and shapes without the frames count. bias: the relative bias that came, or None.
        """
        if state.rows is not None:
            _check_as_begun(state, pushed)
            return state
        # In the dtype of the computation, so that no call converts them again.
        checked = [floating(x[..., :0, :], name) for x, name in zip(attended, _NAMES, strict=True)]
        dtype = common_dtype([x.dtype for x in checked], _NAMES)
        query, key, value = (x.shape for x in checked)
        kinds: list[tuple[tuple[int, ...], Any]] = [(x.shape, dtype) for x in checked]
        rules = self._rules
        if bias is not None:
            all_rows = [(*x.shape[:-2], bias.shape[-2], x.shape[-1]) for x in checked]
            check(all_rows[0], all_rows[1], all_rows[2], dtype, {**rules, "relative_bias": bias})
            total = self._with_constant(bias[..., :0, :])
            kinds.append((total.shape, total.dtype))
            rules = {**rules, "relative_bias": total}
        rows = np.empty(check(query, key, value, dtype, rules), dtype)
        tapes = tuple(_Tape.blank(shape[:-2], shape[-1], kind, 0, 0, 0) for shape, kind in kinds)
        frames = tuple((name, (*x.shape[:-2], x.shape[-1]), x.dtype) for name, x in pushed.items())
        return state._replace(frames=frames, rows=rows, tapes=tapes)

    def _checked_bias(self, bias: Any, count: int) -> NDArray[Any]:
        """The relative bias that came with so many frames."""
        a = as_array(bias, "relative_bias", _INSTEAD)
        if self._left is None or self._right is None:
            raise ValueError(
                f"relative_bias has an entry for each key of a window: it needs left and right to be bounded, not "
                f"left={self._left} and right={self._right}"
            )
        width = self._left + self._right + 1
        if a.ndim < 2 or a.shape[-2:] != (count, width):
            raise ValueError(
                f"relative_bias has shape {a.shape}; with {count} frames it must be (..., {count}, {width}), one row "
                f"for each query and one entry for each key of the window"
            )
        return a

    def _with_constant(self, bias: NDArray[Any]) -> NDArray[Any]:
        """The relative bias that came and the one that all queries have."""
        constant = self._rules.get("relative_bias")
        if constant is None:
            return bias
        common_dtype([bias.dtype, constant.dtype], ("relative_bias", "the stream's own relative_bias"))
        try:
            with np.errstate(all="ignore"):
                return constant + bias
        except ValueError:
            raise ValueError(
                f"relative_bias has shape {bias.shape} and that of the stream itself {constant.shape}: their batch "
                f"axes do not broadcast"
            ) from None

    def _advance(
        self, state: _State, count: int, frames: Callable[[int, int], Sequence[NDArray[Any]]]
    ) -> tuple[_State, NDArray[Any]]:
        """
        The state after `count` more frames, and attention's rows that are complete with them.

        frames(at, end): query, key, value and, if there is one, the relative bias of these frames of the push.
        """
        before = state.returned
        out = self._new_rows(state, max(self._complete(state.pushed + count) - before, 0))
        for at in range(0, count, _PIECE):
            end = min(at + _PIECE, count)
            seen = self._first_seen(state.returned)
            # Of rows that wait, and of what they see, whose calls begin where sums are split.
            needed = (state.returned, 0), (seen, _SPAN), (seen, _SPAN), (state.returned, 0)
            tapes = tuple(
                tape.append(x, first, room)
                for tape, x, (first, room) in zip(state.tapes, frames(at, end), needed, strict=False)
            )
            pushed = state.pushed + end - at
            complete = max(self._complete(pushed), state.returned)
            rows = out[..., state.returned - before : complete - before, :]
            self._attend(tapes, state.returned, complete, pushed, rows)
            state = state._replace(tapes=tapes, pushed=pushed, returned=complete)
        return state, out

    def _output(self, state: _State, rows: NDArray[Any]) -> NDArray[Any]:
        """What `flush` returns for these rows of attention."""
        return rows

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
        query, key, value, *bias = tapes
        start = self._first_seen(first) // _SPAN * _SPAN
        rules = {**self._rules, "query_offset": first - start, "out": out}
        if bias:
            rules["relative_bias"] = bias[0].view(first, stop)
        # The loops must not depend on how many queries a push completes, so no decode loops for few.
        attend(query.view(first, stop), key.view(start, pushed), value.view(start, pushed), rules, False, start)


class StreamingAttention(_Stream):
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
        the distance only; its leading axes broadcast to the batch axes. Needs `left` and `right`. One that depends on
        the query too comes with each `push`.

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
    StreamingMultiHeadAttention : with projections, for a whole layer.
    truncated_attention, dot_product_attention

    Notes
    -----
    Offline calls with eight queries or fewer use other loops; a stream agrees with them only up to rounding.

    Arrays are copied, so what was passed may be overwritten. The tapes of queries, keys and values, and of the relative
    biases that come with them, hold twice the frames that are needed (all that the next row sees, up to the last
    frame), and at least 256; when they are full, what is needed is moved to new ones, so a frame is copied twice on
    average. Longer pushes are processed 2048 frames at a time.

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
        super().__init__(left, right, rules)

    def push(
        self, query: ArrayLike, key: ArrayLike, value: ArrayLike, relative_bias: ArrayLike | None = None
    ) -> NDArray[Any]:
        """
        Take in the next frames; return the rows that are complete with them.

        Parameters
        ----------
        query : array_like, shape (..., n, D)
        key : array_like, shape (..., n, D)
        value : array_like, shape (..., n, E)
            The next n frames, also 0 or 1 of them. Dtypes, batch axes and broadcasting are as for
            `dot_product_attention`; all but n must stay as in the first push.
        relative_bias : array_like of floats, shape (..., n, left + right + 1), optional
            Added to the scores of each query's own window, placed as that of the stream itself, and to that if there is
            one: as offline with ``relative_bias=constant + relative_bias``. For positions that depend on the query, as
            in Transformer-XL and conformers. It comes with each push or with none, and needs `left` and `right`; its
            leading axes broadcast to the batch axes.

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

        References
        ----------
        .. [1] Z. Dai et al., "Transformer-XL: Attentive language models beyond a fixed-length context", 2019, section
               3.3.

        Examples
        --------
        >>> import numpy as np
        >>> from fastattn.streaming import StreamingAttention
        >>> stream = StreamingAttention(100, 2)
        >>> frames = np.ones((8, 5, 64), np.float32)
        >>> stream.push(frames, frames, frames).shape
        (8, 3, 64)

        Relative positions as in Transformer-XL [1]_: each query, with a bias of its own for contents (u) and for
        positions (v), has scores with the keys and with the embeddings of the distances. Row w of `positions` is that
        of the key w - left frames after the query, so there is nothing to shift.

        >>> rng = np.random.default_rng(0)
        >>> left, right = 6, 2
        >>> query, key, value = rng.normal(size=(3, 8, 20, 64))
        >>> u, v = rng.normal(size=(2, 8, 1, 64))
        >>> positions = rng.normal(size=(8, left + right + 1, 64))
        >>> bias = (query + v) @ positions.swapaxes(-1, -2) / np.sqrt(64)
        >>> stream = StreamingAttention(left, right)
        >>> stream.push(query + u, key, value, bias).shape
        (8, 18, 64)
        """
        with self._turn:
            return self._pushed(query, key, value, relative_bias)

    def _pushed(self, query: Any, key: Any, value: Any, relative_bias: Any) -> NDArray[Any]:
        state = self._open()
        arrays = {name: as_array(x, name, _INSTEAD) for name, x in zip(_NAMES, (query, key, value), strict=True)}
        attended = tuple(arrays.values())
        for name, x in arrays.items():
            if x.ndim < 2:
                axes = "(..., n, E)" if name == "value" else "(..., n, D)"
                raise ValueError(f"{name} has shape {x.shape}; it needs at least two axes, {axes}")
        counts = [x.shape[-2] for x in attended]
        if len(set(counts)) > 1:
            raise ValueError(
                f"query, key and value have {counts[0]}, {counts[1]} and {counts[2]} frames (axis -2): each frame "
                f"brings one of each"
            )
        bias = None
        if relative_bias is not None:
            bias = arrays["relative_bias"] = self._checked_bias(relative_bias, counts[0])
        state = self._begun(state, arrays, attended, bias)

        def frames(at: int, end: int) -> list[NDArray[Any]]:
            parts = [x[..., at:end, :] for x in attended]
            return parts if bias is None else [*parts, self._with_constant(bias[..., at:end, :])]

        self._state, rows = self._advance(state, counts[0], frames)
        return rows


class StreamingMultiHeadAttention(_Stream):
    """
    A layer over a stream: frames go in as they arrive, and are projected, attended to and projected back.

    However the stream is split into pushes, the rows are those of the layer on all of it, ``layer(x,
    window_size=(left, right))``, with `chunk_size` and `left_chunks`. Rotary positions continue over pushes. Memory and
    the cost of a frame do not grow with time.

    Parameters
    ----------
    layer : MultiHeadAttention
        For self-attention: ``d_context == d_model``. It is not copied: what is written into its parameters counts from
        the next push on. One that holds ``is_causal=True`` needs ``right=0``; one that holds a `relative_bias`, its
        window, unless another bias or None is given.
    left : int or None
    right : int or None, default 0
    chunk_size, left_chunks : int, optional
        What a frame sees, as for `StreamingAttention`.
    scale, softcap, alibi_slopes, sinks, activation, num_threads : optional
        As for a call of the layer; what it holds is the default (``<held>``); None is none.
    relative_bias : array_like of floats, shape (num_heads, 1, left + right + 1) or (left + right + 1,), optional
        As for `StreamingAttention`. One that depends on the query too comes with each `push`.

    Attributes
    ----------
    layer : MultiHeadAttention
    pushed, returned, waiting, latency, nbytes : int
        As those of `StreamingAttention`; read-only. In a stack of layers the latencies add up, but for chunks of one
        size: a row of a chunk that is complete waits for nothing more.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it.

    See Also
    --------
    StreamingAttention : without projections, and more about streams.
    MultiHeadAttention

    Notes
    -----
    The bits of a row do not depend on how the stream is split, and are those of an offline call; but offline calls with
    eight rows or fewer use other loops.

    An object serves one stream, or one batch of synchronous streams, and one thread at a time, as a
    `StreamingAttention` does. Copies and pickles continue from the same frame; ``copy.copy`` shares the layer.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> layer = fastattn.MultiHeadAttention(*rng.normal(size=(4, 32, 32)) / 6, num_heads=4, rotary_base=1e4)
    >>> stream = fastattn.StreamingMultiHeadAttention(layer, 20, 2)
    >>> x = rng.normal(size=(100, 32))
    >>> rows = [stream.push(x[i : i + 10]) for i in range(0, 100, 10)]
    >>> rows[0].shape
    (8, 32)
    >>> rows.append(stream.flush())
    >>> bool(np.allclose(np.concatenate(rows), layer(x, window_size=(20, 2))))
    True
    """

    @takes(StreamingLayerRules, like=dot_product_attention, held=HELD_RULES)
    def __init__(
        self, layer: MultiHeadAttention, left: int | None, right: int | None = 0, **rules: Unpack[StreamingLayerRules]
    ) -> None:
        refuse_others(rules, StreamingLayerRules, "StreamingMultiHeadAttention")
        if not isinstance(layer, MultiHeadAttention):
            raise TypeError(f"layer must be a fastattn.MultiHeadAttention, not {type(layer).__name__}")
        if layer.d_model != layer.d_context:
            raise ValueError(
                f"layer attends from {layer.d_model} channels to a context of {layer.d_context}: in a stream, frames "
                f"attend to each other"
            )
        self._layer = layer
        every = layer._with_held({**rules, "window_size": (left, right)})
        held: Any = {name: x for name, x in every.items() if name in StreamingLayerRules.__annotations__}
        super().__init__(left, right, {**held, "enable_gqa": layer.num_heads != layer.num_kv_heads}, layer.num_heads)
        if layer.is_causal and self._right != 0:
            raise ValueError(
                f"right must be 0, not {self._right}: the layer holds is_causal=True, so no frame sees those after it"
            )

    @property
    def layer(self) -> MultiHeadAttention:
        """The layer, as given."""
        return self._layer

    def push(self, x: ArrayLike, relative_bias: ArrayLike | None = None) -> NDArray[Any]:
        """
        Take in the next frames; return the rows that are complete with them.

        Parameters
        ----------
        x : array_like, shape (..., n, d_model)
            The next n frames, also 0 or 1 of them; float32, float64, float16 or bfloat16, integers and bools become
            float64. All but n, and the dtype, must stay as in the first push.
        relative_bias : array_like of floats, shape (..., num_heads, n, left + right + 1), optional
            Added to the scores of each query's own window, as for `StreamingAttention.push`: it comes with each push or
            with none.

        Returns
        -------
        ndarray, shape (..., rows, d_out)
            The next rows whose look-ahead is complete, often none. Of the dtype to which x and the weight matrices
            promote.

        Raises
        ------
        ValueError, TypeError
            If the frames are not as above or do not match those before, or after `flush`.
        MemoryError
            If there is no memory for the result, the projected arrays or the frames.

        Notes
        -----
        After an error, Ctrl-C included, the stream is where it was before.

        For relative positions as in Transformer-XL, the bias for contents belongs to the layer's `b_query`, and
        `relative_bias` is a projection of x: the score of a distance with a query is one with x, ``(x @ w_query +
        b_query + v) @ r = x @ (w_query @ r) + (b_query + v) @ r``.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> layer = fastattn.MultiHeadAttention(np.eye(4), np.eye(4), np.eye(4), num_heads=2)
        >>> stream = fastattn.StreamingMultiHeadAttention(layer, 5, 1)
        >>> stream.push(np.ones((3, 4)), relative_bias=np.zeros((2, 3, 7))).shape
        (2, 4)
        """
        with self._turn, np.errstate(all="ignore"):
            return self._pushed(x, relative_bias)

    def _pushed(self, x: Any, relative_bias: Any) -> NDArray[Any]:
        state, layer = self._open(), self._layer
        pushed = {"x": as_array(x, "x", _INSTEAD)}
        call = layer._checked(pushed["x"], None, None, self._own_rules(), packed=True)
        tokens, count, begin, bias = call.tokens, call.length, state.pushed, None
        if relative_bias is not None:
            bias = pushed["relative_bias"] = self._checked_bias(relative_bias, count)
        products = layer._products_in(call.accumulation)

        def attended(at: int, end: int) -> Sequence[NDArray[Any]]:
            return self._projected(call._replace(tokens=tokens[..., at:end, :]), products, begin + at)

        def frames(at: int, end: int) -> Sequence[NDArray[Any]]:
            parts = attended(at, end)
            return parts if bias is None else (*parts, self._with_constant(bias[..., at:end, :]))

        state = self._begun(state, pushed, attended(0, 0) if state.rows is None else (), bias)
        state, rows = self._advance(state, count, frames)
        out = self._joined(call, products, rows)
        self._state = state
        return out

    def _own_rules(self) -> Any:
        """Those that count for products and norms."""
        return {"num_threads": self._rules.get("num_threads")}

    def _projected(self, call: _Call, products: Products, position: int) -> Sequence[NDArray[Any]]:
        """Query, key and value of a call's frames, of which the first has that position."""
        count, tokens = call.tokens.shape[-2], _no_few_rows(call.tokens)
        *parts, both = self._layer._projected(call._replace(tokens=tokens, length=tokens.shape[-2]), products)
        if both is not None:
            self._layer._turn(both, position, self._rules.get("num_threads"), False)
        return parts if tokens is call.tokens else [heads[..., :count, :] for heads in parts]

    def _new_rows(self, state: _State, count: int) -> NDArray[Any]:
        """By heads, which are side by side in memory, as the output's projection reads them."""
        assert state.rows is not None
        *batch, heads, _, channels = state.rows.shape
        return empty((*batch, count, heads, channels), state.rows.dtype).swapaxes(-2, -3)

    def _joined(self, call: _Call, products: Products, rows: NDArray[Any]) -> NDArray[Any]:
        """From heads to frames."""
        *batch, heads, count, channels = rows.shape
        side_by_side = rows.swapaxes(-2, -3).reshape(*batch, count, heads * channels)
        more = _no_few_rows(side_by_side)
        out = self._layer._joined(call._replace(length=more.shape[-2]), products, more)
        return out if more is side_by_side else out[..., :count, :].copy()

    def _output(self, state: _State, rows: NDArray[Any]) -> NDArray[Any]:
        _, (*batch, channels), dtype = state.frames[0]
        call = self._layer._checked(np.empty((*batch, 0, channels), dtype), None, None, self._own_rules(), packed=True)
        with np.errstate(all="ignore"):
            return self._joined(call, self._layer._products_in(call.accumulation), rows)
