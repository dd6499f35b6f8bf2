"""StreamingAttention: the offline call's bits however the stream is split, constant memory, errors without side
effects."""

import copy
import pathlib
import pickle
import re
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import bits, qkv, sixteen_bits

import fastattn
from fastattn import reference, streaming
from fastattn.streaming import StreamingAttention

# Settings of `left`, `right` and chunks, by name.
SHAPES = {
    "causal": (30, 0),
    "nothing but itself": (0, 0),
    "look-ahead": (20, 5),
    "all before": (None, 2),
    "far": (2500, 40),
    "only ahead": (0, 70),
    "chunks of 1": (None, None, 1, 2),
    "chunks of 3": (None, None, 3, 0),
    "chunks of 16": (None, None, 16, 2),
    "chunks of 17": (None, None, 17, 2),
    "chunks of 100": (None, None, 100, 0),
    "chunks of 1000": (None, None, 1000, 2),
    "chunks of 1000, alone": (None, None, 1000, 0),
    "chunks of 1000, all before": (None, None, 1000, None),
    "chunks in a window": (50, None, 100, 5),
    "chunks in a wide window": (150, 7, 100, 1),
    "chunks of 16 in a window": (40, 3, 16, 3),
    "one chunk": (None, None, 10**9, 10**9),
}


def rules_of(left, right, chunk_size=None, left_chunks=None):
    return {"window_size": (left, right), "chunk_size": chunk_size, "left_chunks": left_chunks}


def stream_of(left, right, chunk_size=None, left_chunks=None, **arguments):
    return StreamingAttention(left, right, chunk_size=chunk_size, left_chunks=left_chunks, **arguments)


def complete_rows(pushed, left, right, chunk_size=None, left_chunks=None):
    """How many rows see no frame that is still to come, computed from the rules."""
    ends = [
        min(
            np.inf if right is None else row + right,
            np.inf if chunk_size is None else row // chunk_size * chunk_size + chunk_size - 1,
        )
        for row in range(pushed)
    ]
    return sum(end < pushed for end in ends)


def sees_key(row, key, left, right, chunk_size=None, left_chunks=None):
    before = 0 if chunk_size is None else row // chunk_size - key // chunk_size
    return (
        (left is None or row - left <= key)
        and (right is None or key <= row + right)
        and before >= 0
        and (left_chunks is None or before <= left_chunks)
    )


def run(stream, arrays, pieces):
    """All rows, from pushes of these sizes, repeated until no frames are left, and a flush."""
    total, at, rows, turn = arrays[0].shape[-2], 0, [], 0
    while at < total:
        end = at + pieces[turn % len(pieces)]
        rows.append(stream.push(*(x[..., at:end, :] for x in arrays)))
        at, turn = min(end, total), turn + 1
        assert stream.pushed == at
        assert stream.returned == sum(x.shape[-2] for x in rows)
    rows.append(stream.flush())
    return np.concatenate(rows, axis=-2)


def offline(arrays, *shape, **arguments):
    return fastattn.dot_product_attention(*arrays, **rules_of(*shape), query_offset=0, **arguments)


# --------------------------------------------------------------------------------------- the same bits

COPIES = {
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda stream: pickle.loads(pickle.dumps(stream)),
    "pickle, protocol 2": lambda stream: pickle.loads(pickle.dumps(stream, 2)),
}


@pytest.mark.parametrize("of", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("shape", [(30, 4), (None, 2), (None, None, 16, 2), (None, None, 1000, 1)], ids=str)
def test_copies_go_on_alone(rng, shape, of):
    """From the same frame, each with its own frames, interleaved: each has the bits of its own offline call."""
    one, other = (qkv(rng, (2,), 700, 700, 3, 2) for _ in range(2))
    for begun in (0, 1, 400):
        for x, y in zip(one, other, strict=True):
            y[..., :begun, :] = x[..., :begun, :]
        stream = stream_of(*shape)
        rows = stream.push(*(x[..., :begun, :] for x in one))
        streams = [(stream, one, [rows]), (of(stream), other, [rows])]
        for at in range(begun, 700, 50):
            for each, arrays, found in streams:
                found.append(each.push(*(x[..., at : min(at + 50, 700), :] for x in arrays)))
        for each, arrays, found in streams:
            assert bits(np.concatenate([*found, each.flush()], axis=-2)) == bits(offline(arrays, *shape))


@pytest.mark.parametrize("of", COPIES.values(), ids=COPIES)
def test_copies_before_the_first_frame_and_after_the_last(rng, of):
    arrays, slopes = qkv(rng, (2,), 50, 50, 3, 2), np.array([0.1, 0.2], np.float32)
    stream = StreamingAttention(9, 2, alibi_slopes=slopes)
    expected = offline(arrays, 9, 2, alibi_slopes=slopes)
    assert bits(run(of(stream), arrays, [50])) == bits(expected)
    assert stream.pushed == 0
    run(stream, arrays, [50])
    other = of(stream)
    with pytest.raises(ValueError, match="after flush"):
        other.push(*arrays)
    other.reset()
    assert bits(run(other, arrays, [7])) == bits(expected)


def test_pickles_hold_the_frames_that_are_there(rng):
    """Not of unwritten memory."""
    stream, frames = StreamingAttention(3, 0), rng.standard_normal((4, 8)).astype(np.float32)
    stream.push(frames, frames, frames)
    assert stream.nbytes > 3 * 256 * 8 * 4 > 5000 > len(pickle.dumps(stream))


@pytest.mark.parametrize("pieces", [[1], [0, 50], [64], [1, 700, 2, 5, 0, 3000], [10_000]], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bits(rng, shape, pieces):
    """Across moves of the tapes and multiples of 2048."""
    frames = 700 if pieces == [1] else 4700
    arrays = qkv(rng, (2,), frames, frames, 3, 2)
    assert bits(run(stream_of(*shape), arrays, pieces)) == bits(offline(arrays, *shape))


@pytest.mark.parametrize("shape", [(150, 7, 100, 1), (150, 99, 100, 1), (350, 40, 100, 3)], ids=str)
def test_bits_where_the_window_ends_within_a_chunk(rng, shape):
    """Rows that start anywhere in a chunk, whose keys start at the chunk's edge and end before its end."""
    arrays = qkv(rng, (), 2700, 2700, 3, 2)
    assert bits(run(stream_of(*shape), arrays, [7])) == bits(offline(arrays, *shape))


@given(data=st.data())
@settings(max_examples=60)
def test_bits_of_any_stream(data):
    """Any shape, any splits, any rules."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    sides = st.one_of(st.none(), st.integers(0, 50), st.sampled_from([255, 256, 2047, 2048, 2100]))
    left, right = draw(sides), draw(sides)
    chunk_size = draw(st.one_of(st.none(), st.integers(1, 40), st.integers(90, 1000), st.just(2048)))
    if chunk_size is None:
        right = right or 0
    left_chunks = None if chunk_size is None else draw(st.one_of(st.none(), st.integers(0, 6)))
    shape = left, right, chunk_size, left_chunks
    batch, kv_batch, grouped = draw(
        st.sampled_from([((), (), False), ((2,), (1,), False), ((4,), (2,), True), ((2, 2), (2,), False)])
    )
    dtypes = st.sampled_from([np.float32, np.float64, *sixteen_bits()])
    frames = draw(st.one_of(st.integers(9, 300), st.integers(1800, 5000)))
    arrays = qkv(rng, batch, frames, frames, draw(st.integers(0, 9)), draw(st.integers(1, 9)), draw(dtypes), kv_batch)
    rules = {
        "scale": 0.3,
        "softcap": 2.0,
        "alibi_slopes": rng.random(batch).astype(np.float32),
        "sinks": rng.standard_normal(batch).astype(np.float32),
        "activation": draw(st.sampled_from(["relu", "sigmoid"])),
    }
    if left is not None and right is not None:
        rules["relative_bias"] = rng.standard_normal((*batch, 1, left + right + 1)).astype(np.float32)
    names = draw(st.sets(st.sampled_from(sorted(rules))))
    if "activation" in names:
        names.discard("sinks")
    arguments, of_calls, pushed = {name: rules[name] for name in names}, {}, arrays
    if left is not None and right is not None and draw(st.booleans()):
        bias_dtype = draw(st.sampled_from([np.float32, np.float64, np.float16]))
        axes = draw(st.sampled_from([batch, (1,) * len(batch), ()]))
        bias = rng.standard_normal((*axes, frames, left + right + 1), np.float32).astype(bias_dtype)
        of_calls, pushed = {"relative_bias": arguments.get("relative_bias", 0) + bias}, (*arrays, bias)
    pieces = draw(st.lists(st.one_of(st.integers(1, 9), st.integers(10, 3000)), min_size=1, max_size=5))
    if frames > 1000:
        pieces.append(500)
    whole = offline(arrays, *shape, **{**arguments, **of_calls}, enable_gqa=grouped)
    assert bits(run(stream_of(*shape, **arguments, enable_gqa=grouped), pushed, pieces)) == bits(whole)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, *sixteen_bits()])
def test_dtypes(rng, dtype):
    arrays = qkv(rng, (2,), 700, 700, 16, dtype=dtype)
    rows = run(StreamingAttention(100, 3), arrays, [1, 30])
    assert rows.dtype == dtype
    assert bits(rows) == bits(offline(arrays, 100, 3))


def test_dtypes_that_promote(rng):
    query, key, _ = qkv(rng, (), 400, 400, 8)
    arrays = query.astype(np.float16), key, rng.integers(-9, 9, (400, 3))
    rows = run(StreamingAttention(50, 3), arrays, [1, 30])
    assert rows.dtype == np.float64
    assert bits(rows) == bits(offline(arrays, 50, 3))


def test_grouped_heads_frame_by_frame(rng):
    """A single query processes the heads of a group together; the bits are those of many."""
    arrays = qkv(rng, (2, 6), 400, 400, 16, 12, kv_batch=(1, 2))
    arguments = {
        "alibi_slopes": np.linspace(0.1, 0.5, 6).astype(np.float32),
        "sinks": np.linspace(-1, 1, 6).astype(np.float32),
        "relative_bias": rng.standard_normal((6, 1, 104)).astype(np.float32),
        "enable_gqa": True,
    }
    assert bits(run(StreamingAttention(100, 3, **arguments), arrays, [1])) == bits(offline(arrays, 100, 3, **arguments))


# ------------------------------------------------------------------- relative biases that come with each push

BANDS = {name: shape for name, shape in SHAPES.items() if None not in shape[:2]}


def banded(rng, frames, left, right, batch=(2,), dtype=np.float32, heads=None):
    """Query, key, value and a relative bias of each query."""
    bias = rng.standard_normal((*(batch if heads is None else heads), frames, left + right + 1)).astype(dtype)
    return (*qkv(rng, batch, frames, frames, 3, 2, dtype), bias)


@pytest.mark.parametrize("pieces", [[1], [64, 0], [1, 700, 2, 5, 0, 3000], [10_000]], ids=str)
@pytest.mark.parametrize("shape", BANDS.values(), ids=BANDS)
def test_bits_with_a_bias_of_each_query(rng, shape, pieces):
    *arrays, bias = banded(rng, 600 if pieces == [1] else 2600, *shape[:2])
    whole = offline(arrays, *shape, relative_bias=bias)
    assert bits(run(stream_of(*shape), (*arrays, bias), pieces)) == bits(whole)
    assert shape == (0, 0) or bits(whole) != bits(offline(arrays, *shape))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, *sixteen_bits()])
def test_a_bias_keeps_its_dtype(rng, dtype):
    """As offline: that of 16-bit frames is not rounded to 16 bits first."""
    for of_frames in (np.float32, *sixteen_bits()):
        *arrays, bias = banded(rng, 300, 20, 3)
        arrays, bias = [x.astype(of_frames) for x in arrays], bias.astype(dtype)
        rows = run(StreamingAttention(20, 3), (*arrays, bias), [7])
        assert rows.dtype == of_frames
        assert bits(rows) == bits(offline(arrays, 20, 3, relative_bias=bias))


@pytest.mark.parametrize("constant", [(24,), (1, 24), (4, 1, 24), (2, 1, 1, 24)], ids=str)
def test_both_biases(rng, constant):
    """That of the stream and those of queries: their sum, as NumPy adds them."""
    *arrays, bias = banded(rng, 300, 20, 3, (2, 4), heads=(4,))
    own = rng.standard_normal(constant).astype(np.float32)
    whole = offline(arrays, 20, 3, relative_bias=own + bias)
    assert bits(run(StreamingAttention(20, 3, relative_bias=own), (*arrays, bias), [1, 30])) == bits(whole)


def test_a_bias_of_grouped_heads(rng):
    arrays = qkv(rng, (2, 6), 400, 400, 16, 12, kv_batch=(1, 2))
    bias = rng.standard_normal((6, 400, 104)).astype(np.float32)
    whole = offline(arrays, 100, 3, relative_bias=bias, enable_gqa=True)
    assert bits(run(StreamingAttention(100, 3, enable_gqa=True), (*arrays, bias), [1])) == bits(whole)


def test_transformer_xl(rng):
    """Scores (q + u) k_j + (q + v) r_{i - j}, in float64 and without bands: each pair of frames by itself."""
    left, right, frames = 6, 2, 40
    query, key, value = rng.standard_normal((3, 4, frames, 8))
    u, v = rng.standard_normal((2, 4, 1, 8))
    positions = rng.standard_normal((4, left + right + 1, 8))  # of the distances -left ... right
    scores = np.full((4, frames, frames), -np.inf)
    for i in range(frames):
        for j in range(max(0, i - left), min(frames, i + right + 1)):
            content = ((query + u)[:, i] * key[:, j]).sum(-1)
            scores[:, i, j] = content + ((query + v)[:, i] * positions[:, j - i + left]).sum(-1)
    weights = np.exp(scores / np.sqrt(8))
    weights /= weights.sum(-1, keepdims=True)
    bias = (query + v) @ positions.swapaxes(-1, -2) / np.sqrt(8)
    rows = run(StreamingAttention(left, right), (query + u, key, value, bias), [3])
    np.testing.assert_allclose(rows, weights @ value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("of", COPIES.values(), ids=COPIES)
def test_copies_have_biases_of_their_own(rng, of):
    one, other = (banded(rng, 700, 30, 40) for _ in range(2))
    for begun in (0, 1, 400):
        for x, y in zip(one, other, strict=True):
            y[..., :begun, :] = x[..., :begun, :]
        stream = StreamingAttention(30, 40)
        rows = stream.push(*(x[..., :begun, :] for x in one))
        streams = [(stream, one, [rows]), (of(stream), other, [rows])]
        for at in range(begun, 700, 50):
            for each, arrays, found in streams:
                found.append(each.push(*(x[..., at : min(at + 50, 700), :] for x in arrays)))
        for each, (*arrays, bias), found in streams:
            whole = offline(arrays, 30, 40, relative_bias=bias)
            assert bits(np.concatenate([*found, each.flush()], axis=-2)) == bits(whole)


def test_memory_of_biases_is_constant(rng):
    arrays, stream, held = banded(rng, 10, 30, 4), StreamingAttention(30, 4), []
    for _ in range(2000):
        stream.push(*arrays)
        held.append(stream.nbytes)
    assert held[-1] == max(held) == max(held[:200])


def test_biases_may_be_overwritten(rng):
    *arrays, bias = banded(rng, 60, 9, 8)
    whole, stream, rows = offline(arrays, 9, 8, relative_bias=bias), StreamingAttention(9, 8), []
    for at in range(0, 60, 5):
        part = bias[:, at : at + 5].copy()
        rows.append(stream.push(*(x[:, at : at + 5] for x in arrays), relative_bias=part))
        part[...] = np.nan
    assert bits(np.concatenate([*rows, stream.flush()], axis=-2)) == bits(whole)


BAD_BIASES = {
    "rows": (ValueError, r"relative_bias has shape \(2, 2, 12\); with 3 frames it must be", lambda b: b[:, :2]),
    "one row": (ValueError, r"relative_bias has shape \(2, 1, 12\); with 3 frames", lambda b: b[:, :1]),
    "width": (ValueError, r"must be \(..., 3, 12\), one row for each query", lambda b: b[..., :11]),
    "one axis": (ValueError, r"relative_bias has shape \(12,\)", lambda b: b[0, 0]),
    "batch": (ValueError, r"relative_bias has shape \(1, 3, 12\); the stream began with \(2, n, 12\)", lambda b: b[:1]),
    "dtype": (TypeError, "relative_bias has dtype float64; the stream began with float32", lambda b: b.astype(float)),
    "masked": (TypeError, "relative_bias is a masked array", np.ma.masked_array),
    "none": (ValueError, "relative_bias is missing: the stream began with one", lambda b: None),
}


@pytest.mark.parametrize("error, message, change", BAD_BIASES.values(), ids=BAD_BIASES)
def test_bad_biases_leave_the_stream_alone(rng, error, message, change):
    *arrays, bias = banded(rng, 30, 9, 2)
    stream, rows = StreamingAttention(9, 2), []
    for at in range(0, 30, 3):
        part = [x[:, at : at + 3] for x in arrays]
        rows.append(stream.push(*part, bias[:, at : at + 3]))
        before = stream.pushed, stream.returned
        with pytest.raises(error, match=message):
            stream.push(*part, change(bias[:, at : at + 3]))
        assert (stream.pushed, stream.returned) == before
    rows.append(stream.flush())
    assert bits(np.concatenate(rows, axis=-2)) == bits(offline(arrays, 9, 2, relative_bias=bias))


def test_bad_biases_of_the_first_push(rng):
    *arrays, bias = banded(rng, 12, 9, 2, (3,))
    for stream, error, message, bad in (
        (StreamingAttention(9, 2), TypeError, "relative_bias must be floating, not of dtype int", bias.astype(int)),
        (StreamingAttention(9, 2), ValueError, r"relative_bias has shape \(2, 12, 12\), which does not", bias[:2]),
        (StreamingAttention(None, 2), ValueError, "needs left and right to be bounded, not left=None", bias),
        (
            StreamingAttention(9, 2, relative_bias=np.zeros((2, 1, 12))),
            ValueError,
            r"that of the stream itself \(2, 1, 12\): their batch axes do not broadcast",
            bias,
        ),
    ):
        with pytest.raises(error, match=message):
            stream.push(*arrays, bad)
        assert stream.pushed == stream.nbytes == 0
    stream = StreamingAttention(9, 2)
    stream.push(*arrays)
    with pytest.raises(ValueError, match="relative_bias came, but the stream began without one"):
        stream.push(*arrays, bias)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads(rng, num_threads):
    arrays = qkv(rng, (4,), 3000, 3000, 32)
    stream = StreamingAttention(500, 20, num_threads=num_threads)
    assert bits(run(stream, arrays, [1000, 3])) == bits(offline(arrays, 500, 20))


def test_layouts(rng):
    """(frames, heads, channels) in memory, and arrays that are overwritten after each push."""
    arrays = [x.swapaxes(0, 1) for x in rng.standard_normal((3, 600, 4, 16)).astype(np.float32)]
    stream, buffers, rows = StreamingAttention(90, 4), np.empty((3, 20, 4, 16), np.float32), []
    for at in range(0, 600, 20):
        for buffer, x in zip(buffers, arrays, strict=True):
            buffer.swapaxes(0, 1)[...] = x[:, at : at + 20]
        rows.append(stream.push(*buffers.swapaxes(1, 2)))
        buffers[...] = np.nan
    rows.append(stream.flush())
    assert bits(np.concatenate(rows, axis=-2)) == bits(offline(arrays, 90, 4))


def test_truncated_attention(rng):
    arrays = qkv(rng, (2,), 500, 500, 8)
    whole = fastattn.truncated_attention(*arrays, 60, 9, query_offset=0)
    assert bits(run(StreamingAttention(60, 9), arrays, [11])) == bits(whole)


def test_a_few_rows_agree_to_rounding(rng):
    arrays = qkv(rng, (2,), 3, 3, 64)
    rows = run(StreamingAttention(9, 1), arrays, [1])
    np.testing.assert_allclose(rows, offline(arrays, 9, 1), rtol=1e-5, atol=1e-6)


def test_reference(rng):
    """Not only consistent: right."""
    arrays = qkv(rng, (2,), 300, 300, 8, dtype=np.float64)
    for shape in ((20, 3), (None, None, 16, 1), (30, None, 50, 1)):
        whole = reference.dot_product_attention(*arrays, **rules_of(*shape), query_offset=0)
        np.testing.assert_allclose(run(stream_of(*shape), arrays, [7]), whole, rtol=1e-12, atol=1e-13)


def test_spans_are_the_kernels():
    header = (pathlib.Path(fastattn.__file__).parent / "kernels" / "contract.h").read_text()
    assert int(re.search(r"FA_SPAN = (\d+)", header)[1]) == streaming._SPAN


# ------------------------------------------------------------------------------------- what comes when


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_come_as_soon_as_they_can(rng, shape):
    arrays = qkv(rng, (), 130, 130, 2)
    stream = stream_of(*shape)
    for at in range(130):
        stream.push(*(x[at : at + 1] for x in arrays))
        assert stream.returned == complete_rows(at + 1, *shape)
        assert stream.waiting == stream.pushed - stream.returned <= stream.latency
    assert stream.flush().shape == (130 - complete_rows(130, *shape), 2)
    assert (stream.pushed, stream.returned, stream.waiting) == (130, 130, 0)


@pytest.mark.parametrize("right", [0, 1, 7])
def test_number_of_rows(rng, right):
    arrays = qkv(rng, (2,), 20, 20, 4, 3)
    stream = StreamingAttention(5, right)
    assert stream.latency == right
    assert stream.push(*(x[:, :4] for x in arrays)).shape == (2, max(0, 4 - right), 3)
    assert stream.push(*(x[:, 4:] for x in arrays)).shape == (2, 20 - right - max(0, 4 - right), 3)
    assert stream.flush().shape == (2, right, 3)


def test_latency():
    assert StreamingAttention(5, 3).latency == 3
    assert StreamingAttention(None, None, chunk_size=16).latency == 15
    assert StreamingAttention(None, 4, chunk_size=16).latency == 4
    assert StreamingAttention(None, 40, chunk_size=16).latency == 15


def test_no_frames(rng):
    query, key, value = qkv(rng, (2,), 6, 6, 4, 3, dtype=np.float64)
    nothing = query[:, :0], key[:, :0], value[:, :0]
    stream = StreamingAttention(5, 2)
    first = stream.push(*nothing)
    assert first.shape == (2, 0, 3) and first.dtype == np.float64
    assert stream.push(query, key, value).shape == (2, 4, 3)
    assert stream.push(*nothing).shape == (2, 0, 3)
    assert stream.flush().shape == (2, 2, 3)


def test_a_stream_of_nothing(rng):
    stream = StreamingAttention(5, 2)
    stream.push(*(x[:0] for x in qkv(rng, (), 1, 1, 4, 3)))
    assert stream.flush().shape == (0, 3)


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_no_batch(rng, batch):
    arrays = qkv(rng, batch, 600, 600, 4, 3)
    assert run(StreamingAttention(5, 2), arrays, [50, 1]).shape == (*batch, 600, 3)


def test_one_frame_and_less_than_the_look_ahead(rng):
    arrays = qkv(rng, (), 1, 1, 4)
    stream = StreamingAttention(100, 100)
    assert stream.push(*arrays).shape == (0, 4)
    np.testing.assert_array_equal(stream.flush(), arrays[2])


def test_flush_and_reset(rng):
    arrays = qkv(rng, (2,), 50, 50, 4)
    stream = StreamingAttention(9, 4)
    rows = run(stream, arrays, [7])
    with pytest.raises(ValueError, match=r"push after flush.*reset\(\)"):
        stream.push(*arrays)
    assert stream.flush().shape == (2, 0, 4)
    stream.reset()
    assert (stream.pushed, stream.returned, stream.waiting, stream.nbytes) == (0, 0, 0, 0)
    assert bits(run(stream, arrays, [5])) == bits(rows)
    stream.reset()  # then something different
    other = qkv(rng, (), 50, 50, 3, 2, dtype=np.float64)
    assert bits(run(stream, other, [5])) == bits(offline(other, 9, 4))


def test_flush_before_any_push():
    stream = StreamingAttention(9, 4)
    with pytest.raises(ValueError, match="flush before any push"):
        stream.flush()
    stream.push(np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 2)))


def test_arguments_are_copied(rng):
    arrays = qkv(rng, (3,), 60, 60, 4)
    arguments = {"alibi_slopes": np.array([0.1, 0.2, 0.3]), "sinks": np.zeros(3), "relative_bias": np.ones((3, 1, 12))}
    whole = offline(arrays, 9, 2, **arguments)
    stream = StreamingAttention(9, 2, **arguments)
    for x in arguments.values():
        x[...] = np.nan
    assert bits(run(stream, arrays, [5])) == bits(whole)


# ------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(20, 3), (None, None, 16, 1), (None, None, 50, 1), (400, 0)], ids=str)
def test_what_is_not_finite(rng, shape, bad):
    """A bad frame affects only the rows that see it."""
    arrays = qkv(rng, (2,), 2500, 2500, 4)
    spoiled = [x.copy() for x in arrays]
    for x in spoiled[1:]:
        x[:, 2040] = bad
    good, rows = run(stream_of(*shape), arrays, [1, 90]), run(stream_of(*shape), spoiled, [1, 90])
    sees = np.array([sees_key(row, 2040, *shape) for row in range(2500)])
    assert sees.any() and not sees.all()
    assert bits(rows[:, ~sees]) == bits(good[:, ~sees])
    assert not np.isfinite(rows[:, sees]).any()


def test_what_the_tapes_have_in_front_is_never_seen(rng, monkeypatch):
    """Unwritten memory may hold anything."""
    arrays = qkv(rng, (2,), 2600, 2600, 4)
    empty = np.empty

    def poisoned(shape, dtype=float):
        array = empty(shape, dtype)
        if array.dtype == np.uint8:
            array.view(np.uint8)[...] = 255  # all ones: NaN
        return array

    monkeypatch.setattr(streaming.np, "empty", poisoned)
    for shape in ((20, 3), (2100, 0), (None, None, 16, 1), (None, None, 50, 3)):
        rows = run(stream_of(*shape), arrays, [1, 90])
        assert bits(rows) == bits(offline(arrays, *shape))


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("pieces", [[10], [3, 50], [5000]], ids=str)
@pytest.mark.parametrize("shape", [(100, 4), (None, None, 100, 2), (None, None, 3, 5)], ids=str)
def test_memory_is_constant(rng, shape, pieces):
    """20000 frames need no more than the first 10000."""
    frames = rng.standard_normal((5000, 2)).astype(np.float32)
    stream = stream_of(*shape)
    largest = []
    tracemalloc.start()
    try:
        for _ in range(8):
            tracemalloc.reset_peak()
            at, turn = 0, 0
            while at < 2500:
                x = frames[: pieces[turn % len(pieces)]]
                stream.push(x, x, x)
                at, turn = at + len(x), turn + 1
            largest.append((stream.nbytes, tracemalloc.get_traced_memory()[1]))
    finally:
        tracemalloc.stop()
    nbytes, peaks = zip(*largest, strict=True)
    assert max(nbytes[4:]) < 1.1 * max(nbytes[:4])
    assert max(peaks[4:]) < 1.1 * max(peaks[:4]) + 10_000


def test_memory_beside_the_frames_that_are_needed():
    """The room before the tapes is allocated once, not per head."""
    stream, frames = StreamingAttention(100), np.zeros((16, 10, 32), np.float32)
    for _ in range(300):
        stream.push(frames, frames, frames)
    frame = 16 * 32 * 4
    assert stream.nbytes <= 3 * 256 * frame + 2 * 2048 * frame / 16


def test_copies_are_few(rng, monkeypatch):
    """Moves of a tape, in a stream of single frames: each copies no more frames than have arrived since the last."""
    moved = []
    blank = streaming._Tape.blank

    def counted(batch, channels, dtype, room, capacity, first):
        if capacity:
            moved.append(capacity)
        return blank(batch, channels, dtype, room, capacity, first)

    monkeypatch.setattr(streaming._Tape, "blank", counted)
    stream, frames = StreamingAttention(1000, 10), np.zeros((1, 1), np.float32)
    for _ in range(6_000):
        stream.push(frames, frames, frames)
    assert sum(moved) / 2 <= 3 * 6_000  # half of a tape is copied, and there are three


# ---------------------------------------------------------------------------------------------- errors


def refuse(error, message, *arguments, **named):
    with pytest.raises(error, match=message):
        StreamingAttention(*arguments, **named)


def test_bad_arguments():
    refuse(ValueError, "left must be an integer of at least 0", -2)
    refuse(TypeError, "left must be", 2.5)
    refuse(TypeError, "left must be", True)
    refuse(ValueError, "right must be", 2, -3)
    refuse(TypeError, "right must be", 2, "3")
    refuse(ValueError, "right=None.*needs chunk_size", 2, None)
    refuse(ValueError, "right=None.*needs chunk_size", 2, -1)
    refuse(ValueError, "chunk_size must be", None, None, chunk_size=0)
    refuse(TypeError, "chunk_size must be", None, None, chunk_size=2.0)
    refuse(ValueError, "left_chunks=2 needs chunk_size", 5, 0, left_chunks=2)
    refuse(ValueError, "left_chunks must be", None, None, chunk_size=4, left_chunks=-2)
    refuse(TypeError, "scale must be", 5, scale="1")
    refuse(ValueError, "softcap must be", 5, softcap=0.0)
    refuse(ValueError, "activation must be", 5, activation="tanh")
    refuse(ValueError, "sinks needs activation='softmax'", 5, activation="relu", sinks=1.0)
    refuse(TypeError, "enable_gqa must be", 5, enable_gqa=1)
    refuse(ValueError, "num_threads", 5, num_threads=0)
    refuse(TypeError, "alibi_slopes", 5, alibi_slopes="steep")
    refuse(TypeError, "sinks is a masked array", 5, sinks=np.ma.masked_array([1.0], [True]))
    refuse(TypeError, "relative_bias must be floating", 5, relative_bias=np.ones(6, int))
    refuse(ValueError, r"relative_bias has shape \(5,\)", 5, relative_bias=np.ones(5))
    refuse(ValueError, "its axis -2 must be 1", 5, relative_bias=np.ones((3, 6)))
    refuse(ValueError, "relative_bias needs window_size", None, relative_bias=np.ones(5))
    refuse(ValueError, "alibi_slopes .* sinks .* do not broadcast", 5, alibi_slopes=np.ones(2), sinks=np.ones(3))


def test_minus_one_is_unbounded(rng):
    arrays = qkv(rng, (), 100, 100, 4)
    stream = StreamingAttention(-1, -1, chunk_size=16, left_chunks=-1)
    assert bits(run(stream, arrays, [7])) == bits(offline(arrays, None, None, 16))


def spoil(**changes):
    """Query, key and value of 3 frames for the stream below, some of them changed."""
    frames = dict(zip(("query", "key", "value"), qkv(np.random.default_rng(1), (2,), 3, 3, 4, 5), strict=True))
    return {name: changes.get(name, lambda x: x)(x) for name, x in frames.items()}


BAD_FRAMES = {
    "dtype": (TypeError, "key has dtype float64; the stream began with float32", {"key": lambda x: x.astype(float)}),
    "object": (TypeError, "value has dtype object", {"value": lambda x: x.astype(object)}),
    "masked": (TypeError, "query is a masked array", {"query": np.ma.masked_array}),
    "batch": (
        ValueError,
        r"value has shape \(1, 3, 5\); the stream began with \(2, n, 5\)",
        {"value": lambda x: x[:1]},
    ),
    "channels": (ValueError, r"key has shape \(2, 3, 3\)", {"key": lambda x: x[..., :3]}),
    "frames": (ValueError, "have 3, 2 and 3 frames", {"key": lambda x: x[:, :2]}),
    "one axis": (ValueError, r"query has shape \(3,\); it needs at least two axes", {"query": lambda x: x[0, :, 0]}),
    "ragged": (TypeError, "query cannot be made into an array", {"query": lambda x: [[1.0], [1.0, 2.0]]}),
}


@pytest.mark.parametrize("error, message, changes", BAD_FRAMES.values(), ids=BAD_FRAMES)
def test_errors_leave_the_stream_alone(rng, error, message, changes):
    arrays = qkv(rng, (2,), 60, 60, 4, 5)
    stream, rows = StreamingAttention(9, 2), []
    for at in range(0, 60, 4):
        rows.append(stream.push(*(x[:, at : at + 4] for x in arrays)))
        before = stream.pushed, stream.returned
        with pytest.raises(error, match=message):
            stream.push(**spoil(**changes))
        assert (stream.pushed, stream.returned) == before
    rows.append(stream.flush())
    assert bits(np.concatenate(rows, axis=-2)) == bits(offline(arrays, 9, 2))


def test_errors_of_the_first_push(rng):
    """Only the first push fixes shapes and dtypes; after an error, any may still begin the stream."""
    arrays = qkv(rng, (2,), 12, 12, 4)
    stream = StreamingAttention(9, 2, alibi_slopes=np.ones(2, np.float32))
    for error, message, bad in (
        (ValueError, "alibi_slopes has shape", qkv(rng, (3,), 12, 12, 4)),
        (ValueError, "key has head_dim 3", (arrays[0], arrays[1][..., :3], arrays[2])),
        (TypeError, "value has dtype complex128", (*arrays[:2], arrays[2].astype(complex))),
        (TypeError, "byte order", [x.astype(">f4") for x in arrays]),
        (ValueError, "do not broadcast", (arrays[0], *qkv(rng, (3,), 12, 12, 4)[1:])),
    ):
        with pytest.raises(error, match=message):
            stream.push(*bad)
        assert stream.pushed == stream.nbytes == 0
    assert bits(run(stream, arrays, [3])) == bits(offline(arrays, 9, 2, alibi_slopes=np.ones(2, np.float32)))


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_interrupted_pushes(rng, monkeypatch, fails_at):
    """A push of many pieces that fails in the middle can be repeated, although tapes had moved."""
    arrays = qkv(rng, (2,), 9000, 9000, 2)
    stream = StreamingAttention(300, 20)
    rows = [stream.push(*(x[:, :700] for x in arrays))]
    before = stream.pushed, stream.returned, stream.nbytes
    call, calls = streaming.attend, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > fails_at:
            raise KeyboardInterrupt
        return call(*arguments)

    monkeypatch.setattr(streaming, "attend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.push(*(x[:, 700:] * 2 for x in arrays))
    monkeypatch.undo()
    assert (stream.pushed, stream.returned, stream.nbytes) == before
    rows += [stream.push(*(x[:, 700:] for x in arrays)), stream.flush()]
    assert bits(np.concatenate(rows, axis=-2)) == bits(offline(arrays, 300, 20))


def test_streams_in_threads(rng):
    """Each thread its own stream."""
    arrays = qkv(rng, (2,), 1500, 1500, 8)
    whole, found = bits(offline(arrays, 90, 5)), {}

    def work(n):
        found[n] = bits(run(StreamingAttention(90, 5), arrays, [n]))

    threads = [threading.Thread(target=work, args=(n,)) for n in (5, 17, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [whole] * 3


# ------------------------------------------------------------------------------------------------- layers

LAYERS = {
    "plain": {},
    "rotary": {"rotary_base": 100.0},
    "rotary, interleaved, in part": {"rotary_base": 100.0, "rotary_interleaved": True, "rotary_dim": 4},
    "frequencies": {"rotary_frequencies": (np.array([1.0, 0.1, 0.01]), 1.2)},
    "grouped": {"num_kv_heads": 2, "rotary_base": 100.0},
    "no output projection": {"w_out": None, "b_out": None},
}
MANY = {name: shape for name, shape in SHAPES.items() if name in ("causal", "look-ahead", "far", "only ahead",
        "chunks of 3", "chunks of 17", "chunks in a wide window", "chunks of 1000, all before")}  # fmt: skip


def layer_of(rng, dtype=np.float32, **changes):
    """24 channels, 4 heads of 6 and values of 5 channels, 10 channels out."""
    kv = changes.get("num_kv_heads", 4)
    shapes = {"w_query": (24, 24), "w_key": (24, 6 * kv), "w_value": (24, 5 * kv), "w_out": (20, 10)}
    shapes |= {"b_query": (24,), "b_value": (5 * kv,), "b_out": (10,)}
    given = {name: (rng.standard_normal(shape) / 5).astype(dtype) for name, shape in shapes.items()}
    return fastattn.MultiHeadAttention(**{**given, "num_heads": 4, **changes})


def layer_stream(layer, left, right, chunk_size=None, left_chunks=None, **arguments):
    return fastattn.StreamingMultiHeadAttention(
        layer, left, right, chunk_size=chunk_size, left_chunks=left_chunks, **arguments
    )


@pytest.mark.parametrize("pieces", [[1], [0, 50], [1, 700, 2, 5, 0, 3000], [10_000]], ids=str)
@pytest.mark.parametrize("shape", MANY.values(), ids=MANY)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_bits_of_a_layer(rng, batch, shape, pieces):
    layer = layer_of(rng, rotary_base=100.0)
    x = rng.standard_normal((*batch, 500 if pieces == [1] else 4700, 24)).astype(np.float32)
    rows = run(layer_stream(layer, *shape), (x,), pieces)
    assert bits(rows) == bits(layer(x, **rules_of(*shape)))


@pytest.mark.parametrize("changes", LAYERS.values(), ids=LAYERS)
def test_layers(rng, changes):
    layer = layer_of(rng, **changes)
    x = rng.standard_normal((2, 300, 24)).astype(np.float32)
    for shape in ((20, 5), (None, None, 16, 2)):
        rows = run(layer_stream(layer, *shape), (x,), [1, 9, 40])
        assert bits(rows) == bits(layer(x, **rules_of(*shape)))


def test_rules_of_a_layer(rng):
    rules = {
        "scale": 0.3,
        "softcap": 2.0,
        "alibi_slopes": np.linspace(0.1, 0.5, 4).astype(np.float32),
        "sinks": rng.standard_normal(4).astype(np.float32),
        "relative_bias": rng.standard_normal((4, 1, 26)).astype(np.float32),
    }
    layer, x = layer_of(rng, num_kv_heads=2), rng.standard_normal((3, 300, 24)).astype(np.float32)
    whole = layer(x, window_size=(20, 5), **rules)
    assert bits(run(layer_stream(layer, 20, 5, **rules, num_threads=2), (x,), [1, 30])) == bits(whole)
    sparse = {"activation": "sparsemax"}
    whole = layer(x, window_size=(20, 5), **sparse)
    assert bits(run(layer_stream(layer, 20, 5, **sparse), (x,), [1, 30])) == bits(whole)


def test_a_layer_with_a_bias_of_each_query(rng):
    """In small pushes, and in one that is processed in pieces."""
    for frames, size in ((300, 7), (2300, 2300)):
        layer, x = layer_of(rng), rng.standard_normal((2, frames, 24)).astype(np.float32)
        bias, own = (rng.standard_normal((4, n, 26)).astype(np.float32) for n in (frames, 1))
        stream, rows = layer_stream(layer, 20, 5, relative_bias=own), []
        for at in range(0, frames, size):
            rows.append(stream.push(x[:, at : at + size], bias[:, at : at + size]))
        whole = layer(x, window_size=(20, 5), relative_bias=own + bias)
        assert bits(np.concatenate([*rows, stream.flush()], axis=-2)) == bits(whole)


@pytest.mark.parametrize("dtype", [*sixteen_bits(), np.int64])
def test_dtypes_of_frames(rng, dtype):
    """Sixteen bits are projected and attended to in float32; integers are float64."""
    layer = layer_of(rng, np.float32 if dtype == np.int64 else dtype)
    x = (3 * rng.standard_normal((2, 100, 24))).astype(dtype)
    rows, whole = run(layer_stream(layer, 20, 5), (x,), [1, 9]), layer(x, window_size=(20, 5))
    assert rows.dtype == whole.dtype == (np.float64 if dtype == np.int64 else dtype)
    assert bits(rows) == bits(whole)


def test_the_latency_of_a_layer(rng):
    layer, x = layer_of(rng), rng.standard_normal((130, 24))
    for shape in MANY.values():
        stream, done = layer_stream(layer, *shape), 0
        assert stream.layer is layer
        assert stream.latency == stream_of(*shape).latency
        for at in range(130):
            done += len(stream.push(x[at : at + 1]))
            assert stream.returned == done == complete_rows(at + 1, *shape)
            assert stream.waiting == at + 1 - done <= stream.latency
        assert len(stream.flush()) == 130 - done


@pytest.mark.parametrize("batch", [(), (2,), (0,)], ids=str)
def test_a_layer_and_no_frames(rng, batch):
    layer, x = layer_of(rng), rng.standard_normal((*batch, 6, 24)).astype(np.float32)
    stream = layer_stream(layer, 5, 2)
    with pytest.raises(ValueError, match="flush before any push"):
        stream.flush()
    first = stream.push(x[..., :0, :])
    assert first.shape == (*batch, 0, 10) and first.dtype == np.float32
    assert stream.push(x).shape == (*batch, 4, 10)
    assert stream.push(x[..., :0, :]).shape == (*batch, 0, 10)
    assert stream.flush().shape == (*batch, 2, 10)
    assert stream.flush().shape == (*batch, 0, 10)
    with pytest.raises(ValueError, match=r"push after flush.*reset\(\)"):
        stream.push(x)
    stream.reset()
    assert stream.push(x.astype(float)).dtype == np.float64


@pytest.mark.parametrize("of", COPIES.values(), ids=COPIES)
def test_copies_of_a_layer_s_stream(rng, of):
    layer = layer_of(rng, rotary_base=100.0)
    one, other = rng.standard_normal((2, 400, 24)).astype(np.float32)
    for begun in (0, 1, 300):
        other[:begun] = one[:begun]
        stream = layer_stream(layer, 30, 4)
        rows = stream.push(one[:begun])
        streams = [(stream, one, [rows]), (of(stream), other, [rows])]
        for at in range(begun, 400, 50):
            for each, x, found in streams:
                found.append(each.push(x[at : min(at + 50, 400)]))
        for each, x, found in streams:
            assert bits(np.concatenate([*found, each.flush()])) == bits(layer(x, window_size=(30, 4)))
    assert (of(stream).layer is layer) == (of is copy.copy)


def test_memory_of_a_layer_s_stream(rng):
    """Constant over pushes, and beside its rows a long push needs no more than a piece of it."""
    layer = layer_of(rng)
    stream, x = layer_stream(layer, 100, 4), rng.standard_normal((40_000, 24)).astype(np.float32)
    stream.push(x[:3000])
    held = stream.nbytes
    for at in range(3000, 9000, 100):
        stream.push(x[at : at + 100])
    assert stream.nbytes == held
    tracemalloc.start()
    try:
        rows = stream.push(x)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3.1 * rows.nbytes + 8 * 2048 * 24 * 4 * 3 + held  # heads have twice the channels of a row


def test_threads_of_a_layers_products(rng, monkeypatch):
    seen = []
    project = fastattn.multihead.project
    monkeypatch.setattr(fastattn.multihead, "project", lambda *a: seen.append(a[3]) or project(*a))
    stream = layer_stream(layer_of(rng), 3, 1, num_threads=1)
    stream.push(rng.standard_normal((40, 24)).astype(np.float32))
    assert seen and set(seen) == {1}


def test_a_causal_layer_looks_not_ahead(rng):
    layer = layer_of(rng, is_causal=True)
    x = rng.standard_normal((40, 24)).astype(np.float32)
    assert bits(run(layer_stream(layer, 5, 0), (x,), [1, 9])) == bits(layer(x, window_size=(5, 2)))
    for right, more in ((2, {}), (None, {"chunk_size": 4, "left_chunks": 1})):
        with pytest.raises(ValueError, match=f"right must be 0, not {right}: the layer holds is_causal=True"):
            layer_stream(layer, 5, right, **more)


def test_held_biases_belong_to_the_held_window(rng):
    bias = rng.standard_normal((4, 1, 8)).astype(np.float32)
    layer = layer_of(rng, window_size=(5, 2), relative_bias=bias)
    x = rng.standard_normal((40, 24)).astype(np.float32)
    assert bits(run(layer_stream(layer, 5, 2), (x,), [1, 9])) == bits(layer(x))
    with pytest.raises(ValueError, match="does not go with the relative_bias that the layer holds"):
        layer_stream(layer, 6, 1)
    assert bits(run(layer_stream(layer, 6, 1, relative_bias=None), (x,), [9])) == bits(
        layer(x, window_size=(6, 1), relative_bias=None)
    )


def test_bad_layers(rng):
    layer = layer_of(rng)
    for error, message, arguments in (
        (TypeError, "layer must be a fastattn.MultiHeadAttention, not ndarray", {"layer": np.eye(4)}),
        (ValueError, "a context of 3: in a stream", {"layer": layer_of(rng, w_key=np.ones((3, 24)),
                                                                      w_value=np.ones((3, 20)), b_value=None)}),
        (ValueError, "left must be an integer", {"left": -2}),
        (ValueError, "right=None.*needs chunk_size", {"right": None}),
        (ValueError, r"alibi_slopes has shape \(3,\)", {"alibi_slopes": np.ones(3)}),
        (ValueError, r"relative_bias has shape \(3, 1, 12\)", {"relative_bias": np.ones((3, 1, 12))}),
        (TypeError, "unexpected keyword argument 'enable_gqa'", {"enable_gqa": True}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            fastattn.StreamingMultiHeadAttention(**{"layer": layer, "left": 9, "right": 2, **arguments})


BAD_TOKENS = {
    "channels": (ValueError, r"x has shape \(2, 3, 23\); it must be \(..., L, 24\)", lambda x: x[..., :23]),
    "one axis": (ValueError, r"x has shape \(24,\)", lambda x: x[0, 0]),
    "batch": (ValueError, r"x has shape \(1, 3, 24\); the stream began with \(2, n, 24\)", lambda x: x[:1]),
    "dtype": (TypeError, "x has dtype float64; the stream began with float32", lambda x: x.astype(float)),
    "complex": (TypeError, "x has dtype complex64", lambda x: x.astype(np.complex64)),
    "masked": (TypeError, "x is a masked array", np.ma.masked_array),
}


@pytest.mark.parametrize("error, message, change", BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_bad_frames_leave_a_layer_s_stream_alone(rng, error, message, change):
    layer, x = layer_of(rng, rotary_base=100.0), rng.standard_normal((2, 60, 24)).astype(np.float32)
    stream, rows = layer_stream(layer, 9, 2), []
    for at in range(0, 60, 3):
        rows.append(stream.push(x[:, at : at + 3]))
        before = stream.pushed, stream.returned
        with pytest.raises(error, match=message):
            stream.push(change(x[:, at : at + 3]))
        with pytest.raises(ValueError, match="relative_bias came, but the stream began without one"):
            stream.push(x[:, at : at + 3], np.zeros((4, 3, 12)))
        assert (stream.pushed, stream.returned) == before
    assert bits(np.concatenate([*rows, stream.flush()], axis=-2)) == bits(layer(x, window_size=(9, 2)))


@pytest.mark.parametrize("name", ["project", "apply_rotary", "attend"])
@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_interrupted_pushes_of_a_layer(rng, monkeypatch, name, fails_at):
    """Wherever a push or a flush ends too early, it can be repeated: also in the last product, after attention."""
    layer, x = layer_of(rng, rotary_base=100.0), rng.standard_normal((2, 5000, 24)).astype(np.float32)
    module = streaming if name == "attend" else fastattn.multihead
    stream, call, rows = layer_stream(layer, 300, 20), getattr(module, name), []
    for step in (lambda: stream.push(x[:, :700]), lambda: stream.push(x[:, 700:]), stream.flush):
        before, calls = (stream.pushed, stream.returned, stream.nbytes), []

        def interrupted(*arguments, calls=calls, **others):
            calls.append(1)
            if len(calls) > fails_at:
                raise KeyboardInterrupt
            return call(*arguments, **others)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            try:
                rows.append(step())
                continue  # it had so many calls or fewer
            except KeyboardInterrupt:
                assert (stream.pushed, stream.returned, stream.nbytes) == before
        rows.append(step())
    assert bits(np.concatenate(rows, axis=-2)) == bits(layer(x, window_size=(300, 20)))


def test_a_stack_of_layers(rng):
    """Latencies add up; with chunks of one size they do not."""
    layers = [layer_of(rng, w_out=rng.standard_normal((20, 24)).astype(np.float32), b_out=None) for _ in range(3)]
    x = rng.standard_normal((200, 24)).astype(np.float32)
    for shape, latency in (((20, 2), 6), ((None, None, 8, 2), 7)):
        streams, done, expected = [layer_stream(layer, *shape) for layer in layers], [], x
        for layer in layers:
            expected = layer(expected, **rules_of(*shape))
        for at in range(200):
            rows = x[at : at + 1]
            for stream in streams:
                rows = stream.push(rows)
            done.append(rows)
            assert at + 1 - sum(map(len, done)) <= latency
        for n in range(3):
            rows = streams[n].flush()
            for stream in streams[n + 1 :]:
                rows = stream.push(rows)
            done.append(rows)
        assert bits(np.concatenate(done)) == bits(expected)


def test_a_stream_says_where_it_is(rng):
    stream = fastattn.StreamingMultiHeadAttention(layer_of(rng), 20, 5)
    stream.push(rng.standard_normal((9, 24)).astype(np.float32))
    assert repr(stream) == "<StreamingMultiHeadAttention: left=20, right=5, latency=5, pushed=9, returned=4>"
    chunks = fastattn.StreamingAttention(None, None, chunk_size=16, left_chunks=2)
    assert repr(chunks).startswith("<StreamingAttention: left=None, right=None, chunk_size=16, latency=15, pushed=0")
