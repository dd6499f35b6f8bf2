"""Windows, bands, chunks and biases by distance: the rules that depend on a query's position, and truncated_attention.

Besides the reference there is a brute-force version here, key by key with Python integers: positions may be far beyond
what float64 can represent.
"""

import functools
import itertools

import numpy as np
import pytest
from problems import AWKWARD, DTYPES, RULES, bits, layouts, qkv, rules, sixteen_bits
from test_arguments import ERRORS, refuse
from test_same_bits import THREADS, assert_same_bits, results
from tolerances import assert_attention, assert_within

import fastattn
from fastattn import reference

FAR = 10**18
WINDOWS = ((0, 0), (0, 5), (7, 0), (3, 2), (40, 25), (300, 300))
# The functions that take all these rules, with the arguments of their scores.
SCORES = {
    "dot_product_attention": {},
    "additive_attention": {"w_score": np.linspace(-1, 1, 12, dtype=np.float32)},
    "bilinear_attention": {"w_query": np.eye(12, 5, dtype=np.float32)},
}


def attend(*arrays, **arguments):
    return fastattn.dot_product_attention(*arrays, **arguments)


def truncated(*arrays, window_size, **arguments):
    """truncated_attention with the window given as in the other functions."""
    return fastattn.truncated_attention(*arrays, *window_size, **arguments)


assert_truncated = functools.partial(assert_attention, function=truncated)


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def default_offset(query, key):
    return key.shape[-2] - query.shape[-2]


def visible_by_hand(shape, offset, *, left=None, right=None, chunk_size=None, left_chunks=None):
    """Which keys are visible, (L, S) = `shape`, with integers of any size."""
    seen = np.zeros(shape, dtype=bool)
    for i, j in itertools.product(*map(range, shape)):
        position = offset + i
        seen[i, j] = (
            (left is None or position - left <= j)
            and (right is None or j <= position + right)
            and (chunk_size is None or j // chunk_size <= position // chunk_size)
            and (left_chunks is None or position // chunk_size - left_chunks <= j // chunk_size)
        )
    return seen


def by_hand(query, key, value, seen, extra=None):
    """Output, weights and lse in float64, row by row over the keys that each sees; extra (L, S) is added to scores."""
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    weights, lse = np.zeros(seen.shape), np.full(seen.shape[:-1], -np.inf)
    for i, row in enumerate(seen):
        keys = np.flatnonzero(row)
        if keys.size:
            scores = key[keys].astype(np.float64) @ query[i].astype(np.float64) / query.shape[-1] ** 0.5
            scores = scores if extra is None else scores + extra[i, keys]
            lse[i] = np.logaddexp.reduce(scores)
            weights[i, keys] = np.exp(scores - lse[i])
            out[i] = weights[i, keys] @ value[keys].astype(np.float64)
    return out, weights, lse


def assert_like_hand(arrays, seen, extra=None, **arguments):
    expected = by_hand(*arrays, seen, extra)
    results = attend(*arrays, **arguments, return_weights=True, return_lse=True)
    for actual, wanted, what in zip(results, expected, ("output", "weights", "lse"), strict=True):
        assert_within(actual, wanted, 1e-12 if actual.dtype == np.float64 else 2e-5, what)
    return expected[1]


def assert_band_is_part_of_weights(arrays, window, function=fastattn.dot_product_attention, **arguments):
    """The weights in the window are, bit for bit, those of the whole matrix; so are the other results."""
    left, right = window if np.ndim(window) else (window, window)
    right = 0 if arguments.get("is_causal") else right
    call = functools.partial(function, *arrays, window_size=window, **arguments)
    out, weights = call(return_weights=True)
    same, band = call(return_weights="band")
    assert bits(same) == bits(out)
    assert band.dtype == weights.dtype
    assert band.shape == (*weights.shape[:-1], left + right + 1)
    position = reference.query_positions(
        *weights.shape[-2:], *(arguments.get(name) for name in ("query_offset", "query_lengths", "key_lengths"))
    )
    expected = reference.to_window(weights, position, left, right).astype(weights.dtype)
    np.testing.assert_array_equal(band, expected)
    return band


# ------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [None, 0, 4, -9, 60, FAR, -FAR])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (4, 19), (17, 17), (33, 9), (7, 300)])
def test_by_hand(rng, shape, offset, dtype):
    arrays = qkv(rng, (), *shape, 12, 5, dtype)
    start = default_offset(*arrays[:2]) if offset is None else offset
    for left, right in (*WINDOWS, (FAR, FAR), (FAR, 0), (0, FAR), (FAR - 2, 1), (None, 3), (3, None)):
        seen = visible_by_hand(shape, start, left=left, right=right)
        window = {"window_size": (left, right), "query_offset": offset}
        weights = assert_like_hand(arrays, seen, **window)
        if None not in (left, right) and left + right < 1000:
            _, band = attend(*arrays, **window, return_weights="band")
            expected = np.zeros((shape[0], left + right + 1))
            for i, w in itertools.product(range(shape[0]), range(left + right + 1)):
                j = start + i - left + w
                expected[i, w] = weights[i, j] if 0 <= j < shape[1] else 0
            assert_within(band, expected, 2e-5, "band")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_keys", AWKWARD)
@pytest.mark.parametrize("num_queries", AWKWARD)
def test_sizes(rng, num_queries, num_keys, dtype):
    arrays = qkv(rng, (2,), num_queries, num_keys, 24, 20, dtype)
    for window in ((2, 1), (70, 0)):
        assert_truncated(*arrays, window_size=window)
        band = normal(rng, num_queries, sum(window) + 1, dtype=dtype)
        assert_truncated(*arrays, window_size=window, relative_bias=band)
    assert_attention(*arrays, chunk_size=13, left_chunks=1)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", sixteen_bits())
def test_sixteen_bits(rng, dtype, window):
    for shape in ((1, 300), (3, 70), (130, 70)):
        arrays = qkv(rng, (2,), *shape, 48, 31, dtype)
        band = normal(rng, 2, 1, sum(window) + 1, dtype=dtype)
        assert_truncated(*arrays, window_size=window, relative_bias=band)
        _, weights = truncated(*arrays, window_size=window, return_weights="band")
        assert weights.dtype == np.float32


def test_truncated_is_a_window(rng):
    """Each argument is passed on correctly, and the bits are those of dot_product_attention."""
    arrays = qkv(rng, (2, 3), 20, 70)
    for rule, arguments in rules(rng).items():
        arguments = {name: x for name, x in arguments.items() if name not in ("chunk_size", "left_chunks")}
        if rule == "together":
            arguments["window_size"] = (35, 9)
        window = arguments.pop("window_size", (9, 4))
        expected = attend(*arrays, window_size=window, **arguments)
        assert bits(truncated(*arrays, window_size=window, **arguments)) == bits(expected), rule
        theirs = reference.dot_product_attention(*arrays, window_size=window, **arguments)
        assert bits(reference.truncated_attention(*arrays, *window, **arguments)) == bits(theirs), rule
    np.testing.assert_array_equal(
        fastattn.truncated_attention(*arrays, 5), attend(*arrays, window_size=(5, 0)), "right is 0 by default"
    )
    for left, right in ((None, 2), (-1, 2), (2, None), (2, -1), (None, None)):
        expected = attend(*arrays, window_size=(left, right))
        np.testing.assert_array_equal(fastattn.truncated_attention(*arrays, left, right), expected)
    out = np.empty_like(expected)
    result, weights, lse = fastattn.truncated_attention(
        *arrays, 3, right=1, out=out, return_weights="band", return_lse=True, num_threads=2
    )
    assert result is out
    assert (weights.shape, lse.shape) == ((2, 3, 20, 5), (2, 3, 20))


@pytest.mark.parametrize("shape", [(3, 2), (3, 1), (1, 2), (1, 1)])
@pytest.mark.parametrize("window", [(3, 2), (40, 0)])
def test_lengths_and_offsets_per_batch(rng, shape, window):
    arrays = qkv(rng, (3, 2), 20, 40)
    lengths = {"key_lengths": rng.integers(0, 41, shape), "query_lengths": rng.integers(0, 21, shape)}
    offsets = np.where(rng.random(shape) < 0.3, rng.choice([FAR, -FAR]), rng.integers(-25, 45, shape))
    band = normal(rng, 2, 20, sum(window) + 1)
    for arguments in ({}, lengths, {"query_offset": offsets}, {**lengths, "query_offset": offsets}):
        assert_truncated(*arrays, window_size=window, relative_bias=band, **arguments)
        assert_attention(*arrays, chunk_size=6, left_chunks=1, **arguments)


@pytest.mark.parametrize("num_queries", [1, 4, 33])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 1), (3, 3)])
def test_grouped_heads(rng, heads, kv_heads, num_queries):
    arrays = qkv(rng, (2, heads), num_queries, 50, kv_batch=(2, kv_heads))
    for shape in ((heads, 1, 24), (2, heads, num_queries, 24), (2, 1, num_queries, 1), (24,)):
        arguments = {"window_size": (20, 3), "relative_bias": normal(rng, *shape), "enable_gqa": True}
        assert_attention(*arrays, **arguments)
        assert_attention(*arrays, **arguments, query_offset=rng.integers(-5, 50, (2, heads)))
        assert_attention(*arrays, **arguments, chunk_size=8, left_chunks=1, sinks=normal(rng, heads))


@pytest.mark.parametrize("arguments", [
    {"softcap": 1.5}, {"scale": -2.0}, {"scale": 1e-8}, {"activation": "relu"}, {"activation": "sigmoid"},
    {"sinks": np.float32(-1)}, {"alibi_slopes": np.float32([0.5, 2.0])}, {"is_causal": True},
    {"is_causal": True, "softcap": 3.0, "sinks": np.float32([1, 2]), "alibi_slopes": np.float32(0.1), "scale": 0.3},
], ids=lambda arguments: ", ".join(arguments))  # fmt: skip
@pytest.mark.parametrize("num_queries", [1, 3, 40])
def test_from_scores_to_weights(rng, num_queries, arguments):
    arrays = qkv(rng, (2,), num_queries, 60)
    band = normal(rng, 2, num_queries, 16)
    window = (15, 4) if arguments.get("is_causal") else (11, 4)
    assert_attention(*arrays, window_size=window, relative_bias=band, **arguments)
    assert_attention(*arrays, window_size=window, relative_bias=band, chunk_size=7, left_chunks=1, **arguments)
    assert_attention(*arrays, window_size=window, bias=normal(rng, 60), mask=rng.random(60) < 0.7, **arguments)


@pytest.mark.parametrize("name", SCORES)
def test_every_function_has_the_rules(rng, name):
    for num_queries in (1, 20):
        arrays = qkv(rng, (2, 3), num_queries, 70, 12)
        for rule, arguments in rules(rng, num_queries=num_queries).items():
            if rule in ("window", "chunks", "some chunks", "together") or "relative" in rule:
                assert_attention(*arrays, name=name, **SCORES[name], **arguments)


# --------------------------------------------------------------------------------------------- the band


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 70), (4, 70), (20, 20), (70, 20), (130, 700)])
@pytest.mark.parametrize("window", WINDOWS)
def test_band_is_part_of_the_weights(rng, window, shape, dtype):
    arrays = qkv(rng, (2,), *shape, dtype=dtype)
    offsets = np.array([-7, shape[1] - 3])
    mask = rng.random(shape) < 0.5
    for arguments in ({}, {"query_offset": offsets}, {"mask": mask, "is_causal": True}, {"activation": "relu"}):
        band = assert_band_is_part_of_weights(arrays, window, **arguments)
        if not arguments and shape[0] <= shape[1]:
            np.testing.assert_allclose(band.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_band_under_every_rule(rng, rule):
    for num_queries in (1, 20):
        arguments = rules(rng, num_queries=num_queries)[rule]
        window = arguments.pop("window_size", (11, 4))
        if None in window:
            arguments.pop("relative_bias", None)
        window = tuple(20 if side is None else side for side in window)
        assert_band_is_part_of_weights(qkv(rng, (2, 3), num_queries, 70), window, **arguments)


@pytest.mark.parametrize("name", SCORES)
def test_band_of_every_function(rng, name):
    function = functools.partial(getattr(fastattn, name), **SCORES[name])
    for window in WINDOWS:
        assert_band_is_part_of_weights(qkv(rng, (2,), 33, 50, 12), window, function=function)


def test_band_where_nothing_is_seen(rng):
    """All zeros, not what was in memory before: it is reused from other arrays."""
    for num_queries, offset in itertools.product((1, 5, 40), (FAR, -FAR, 2**62, -(2**62), 100, -300)):
        arrays = qkv(rng, (2,), num_queries, 30)
        garbage = [np.full((2, num_queries, 21), np.nan, dtype=np.float32) for _ in range(20)]
        del garbage
        out, band, lse = attend(
            *arrays, window_size=(13, 7), query_offset=offset, return_weights="band", return_lse=True
        )
        assert (out == 0).all()
        assert band.shape == (2, num_queries, 21)
        assert (band == 0).all()
        assert (lse == -np.inf).all()


def test_band_of_empty_axes(rng):
    for shape in ((0, 5), (5, 0), (0, 0)):
        _, band = attend(*qkv(rng, (2,), *shape), window_size=(3, 2), return_weights="band")
        assert band.shape == (2, shape[0], 6)
        assert (band == 0).all()


def test_band_with_one_entry(rng):
    """A window of one key: every weight is 1."""
    query, key, value = qkv(rng, (2,), 30, 30)
    out, band = attend(query, key, value, window_size=0, return_weights="band")
    np.testing.assert_array_equal(band, np.ones((2, 30, 1)))
    np.testing.assert_array_equal(out, value)
    bias = normal(rng, 2, 30, 1)
    np.testing.assert_array_equal(attend(query, key, value, window_size=0, relative_bias=bias), value)


def test_band_too_large_for_memory(rng):
    with pytest.raises(MemoryError):
        attend(*qkv(rng, (), 3, 5), window_size=(FAR, FAR), return_weights="band")
    with pytest.raises(MemoryError):
        attend(*qkv(rng, (), 3, 5), window_size=2**59, is_causal=True, return_weights="band")


# ------------------------------------------------------------------------------------------- chunks


def test_chunks_drawn():
    """Chunks of 2 on 6 keys, queries at 1 to 5: the whole chunk, and one before it."""
    query, key, value = np.zeros((5, 1)), np.zeros((6, 1)), np.zeros((6, 1))
    _, weights = attend(query, key, value, chunk_size=2, left_chunks=1, return_weights=True)
    drawn = ["xx....", "xxxx..", "xxxx..", "..xxxx", "..xxxx"]
    assert ["".join("x" if w else "." for w in row) for row in weights] == drawn
    _, weights = attend(query, key, value, chunk_size=2, return_weights=True, query_offset=-2)
    drawn = ["......", "......", "xx....", "xx....", "xxxx.."]
    assert ["".join("x" if w else "." for w in row) for row in weights] == drawn


@pytest.mark.parametrize("offset", [None, 0, 3, -1, -7, -40, 33, FAR, -FAR])
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 16, 64, 1000, FAR])
def test_chunks_by_hand(rng, chunk_size, offset):
    for shape in ((1, 40), (3, 17), (20, 33)):
        arrays = qkv(rng, (), *shape, 8, 5, np.float64)
        start = default_offset(*arrays[:2]) if offset is None else offset
        for left_chunks in (None, 0, 1, 3, FAR // chunk_size):
            chunks = {"chunk_size": chunk_size, "left_chunks": left_chunks}
            seen = visible_by_hand(shape, start, **chunks)
            assert_like_hand(arrays, seen, **chunks, query_offset=offset)
            seen &= visible_by_hand(shape, start, left=6, right=2)
            assert_like_hand(arrays, seen, **chunks, window_size=(6, 2), query_offset=offset)


@pytest.mark.parametrize("num_queries", [1, 4, 50])
@pytest.mark.parametrize(
    ("chunk_size", "left_chunks"), [(1, 0), (1, 5), (7, 2), (64, 0), (256, 1), (255, -1), (5, 10**30)]
)
def test_chunks_over_several_blocks(rng, num_queries, chunk_size, left_chunks):
    arrays = qkv(rng, (2,), num_queries, 700)
    chunks = {"chunk_size": chunk_size, "left_chunks": left_chunks}
    assert_attention(*arrays, **chunks)
    assert_attention(*arrays, **chunks, query_offset=np.array([0, 330]), is_causal=True)
    assert_attention(*arrays, **chunks, key_lengths=611, mask=rng.random(700) < 0.3)


def test_chunks_that_say_nothing(rng):
    """A chunk as large as the keys, or all chunks before it, changes no bit."""
    for num_queries in (1, 30):
        arrays = qkv(rng, (2,), num_queries, 90)
        expected = results(*arrays)
        for chunk_size in (90, 1000, 2**62, 2**63, 10**30):
            assert_same_bits(results(*arrays, chunk_size=chunk_size), expected, f"chunks of {chunk_size}")
        causal = results(*arrays, is_causal=True)
        for left_chunks in (None, -1, 90, 2**63):
            one = results(*arrays, chunk_size=1, left_chunks=left_chunks)
            assert_same_bits(one, causal, "chunks of one key are causal")
        assert_same_bits(
            results(*arrays, chunk_size=np.int64(1), left_chunks=np.uint8(3)),
            results(*arrays, window_size=(3, 0)),
            "chunks of one key are a window",
        )


# ------------------------------------------------------------------------------------------ relative bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [
    (3, 2, 20, 13), (1, 2, 20, 13), (3, 1, 20, 13), (2, 20, 13), (20, 13), (20, 1), (1, 13), (13,), (1,), (),
    (2, 1, 13), (3, 1, 1, 13), (3, 2, 20, 1),
])  # fmt: skip
def test_shapes(rng, shape, dtype):
    arrays = qkv(rng, (3, 2), 20, 30, dtype=dtype)
    band = np.asarray(rng.standard_normal(shape)).astype(dtype)
    for offset in (None, -4, 21):
        assert_truncated(*arrays, window_size=(8, 4), relative_bias=band, query_offset=offset)
    assert_attention(*arrays, window_size=(12, 5), is_causal=True, relative_bias=band)


@pytest.mark.parametrize("offset", [None, 0, -6, 25, FAR, -FAR])
@pytest.mark.parametrize("window", [(0, 0), (4, 2), (0, 9), (9, 0), (70, 30)])
def test_relative_bias_by_hand(rng, window, offset):
    for shape in ((1, 30), (4, 30), (17, 17), (25, 8)):
        arrays = qkv(rng, (), *shape, 8, 5, np.float64)
        start = default_offset(*arrays[:2]) if offset is None else offset
        band = 3 * normal(rng, shape[0], sum(window) + 1, dtype=np.float64)
        extra = np.zeros(shape)
        for i, j in itertools.product(*map(range, shape)):
            w = j - (start + i) + window[0]
            extra[i, j] = band[i, w] if 0 <= w < band.shape[1] else np.nan
        seen = visible_by_hand(shape, start, left=window[0], right=window[1])
        assert_like_hand(arrays, seen, extra, window_size=window, relative_bias=band, query_offset=offset)


@pytest.mark.parametrize("causal", [False, True])
def test_relative_bias_without_end(rng, causal):
    """A window too large for memory, and a bias for it that takes none."""
    arrays = qkv(rng, (2,), 9, 40, dtype=np.float64)
    expected = attend(*arrays, is_causal=causal, return_lse=True)
    width = FAR + 1 if causal else 2 * FAR + 1
    for band in (np.float64(0.5), np.full(1, 0.5), np.broadcast_to(np.float16(0.5), width)):
        out, lse = attend(*arrays, window_size=FAR, is_causal=causal, relative_bias=band, return_lse=True)
        assert_within(out, expected[0], 1e-13, "output")
        assert_within(lse, expected[1] + 0.5, 1e-13, "lse")


def test_bias_of_t5(rng):
    """A number per head and bucket of distances, (heads, 1, W), against the equivalent (heads, L, S) array."""
    heads, length, left, right = 4, 60, 59, 59
    arrays = qkv(rng, (2, heads), length, length)
    distance = np.arange(-left, right + 1)
    near = np.abs(distance) < 8
    far = 8 + (np.log(np.maximum(np.abs(distance), 1) / 8) / np.log(16) * 8).astype(int)
    buckets = np.where(distance > 0, 16, 0) + np.where(near, np.abs(distance), np.minimum(far, 15))
    table = normal(rng, 32, heads)
    band = table[buckets].T[:, None]
    bias = table[buckets[np.arange(length) - np.arange(length)[:, None] + left]].transpose(2, 0, 1)
    result = assert_attention(*arrays, window_size=(left, right), relative_bias=band)
    np.testing.assert_allclose(result, attend(*arrays, bias=bias), rtol=1e-5, atol=1e-6)


def test_bias_of_shaw(rng):
    """An embedding per distance, multiplied by the query: in effect every row has its own keys."""
    heads, length, left, right, dim = 3, 40, 6, 4, 16
    query, key, value = qkv(rng, (2, heads), length, length, dim, dtype=np.float64)
    table = normal(rng, left + right + 1, dim, dtype=np.float64)
    scale = dim**-0.5
    result = fastattn.truncated_attention(query, key, value, left, right, relative_bias=scale * query @ table.T)
    for i in range(length):
        keys = range(max(0, i - left), min(length, i + right + 1))
        moved = key[..., keys, :] + table[[j - i + left for j in keys]]
        expected = attend(query[..., i : i + 1, :], moved, value[..., keys, :])
        np.testing.assert_allclose(result[..., i : i + 1, :], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, *sixteen_bits()[1:]])
def test_dtypes_of_relative_bias(rng, dtype):
    """It does not affect the dtype of the output; 16 bits are read in place."""
    band = normal(rng, 2, 9, 8, dtype=dtype)
    for arrays_dtype in (np.float32, np.float64, np.float16):
        for num_queries in (1, 9):
            arrays = qkv(rng, (2,), num_queries, 20, dtype=arrays_dtype)
            out = assert_truncated(*arrays, window_size=(5, 2), relative_bias=band[:, :num_queries])
            assert out.dtype == arrays_dtype
    arrays = qkv(rng, (2,), 9, 20)
    wide = attend(*arrays, window_size=(5, 2), relative_bias=band.astype(np.float32))
    np.testing.assert_array_equal(attend(*arrays, window_size=(5, 2), relative_bias=band), wide)
    np.testing.assert_array_equal(attend(*arrays, window_size=(5, 2), relative_bias=band.tolist()), wide)


@pytest.mark.parametrize("dtype", [np.float16, *DTYPES])
@pytest.mark.parametrize("num_queries", [1, 3, 35])
def test_strides_of_relative_bias(rng, num_queries, dtype):
    arrays = qkv(rng, (2, 4), num_queries, 70, 24)
    band = normal(rng, 2, 4, num_queries, 32, dtype=dtype)
    call = functools.partial(results, *arrays, window_size=(20, 11))
    expected = call(relative_bias=band)
    for name, view in layouts(band):
        assert_same_bits(call(relative_bias=view), expected, name)
    wide = np.broadcast_to(band[:1, :1, :1, :1], band.shape)
    assert_same_bits(call(relative_bias=wide), call(relative_bias=wide.copy()), "strides of zero")
    rows = np.broadcast_to(band[:, :, :1], band.shape)
    assert_same_bits(call(relative_bias=rows), call(relative_bias=rows.copy()), "one row for all")
    assert_same_bits(call(relative_bias=band[:, :, :1]), call(relative_bias=rows.copy()), "one row, broadcast")
    # Toeplitz: a bias by key position, as a window that slides over one row of numbers.
    line = normal(rng, 200, dtype=dtype)
    for step in (1, -1, 0):
        slid = np.lib.stride_tricks.as_strided(line[100:], band.shape, (0, 0, step * line.itemsize, line.itemsize))
        assert_same_bits(call(relative_bias=slid), call(relative_bias=slid.copy()), "overlapping rows")


def test_it_is_the_bias_of_the_same_keys(rng):
    """(L, S) and (L, W) are equivalent, and both together add up."""
    for num_queries in (1, 4, 40):
        arrays = qkv(rng, (2,), num_queries, 90)
        position = np.arange(num_queries)[:, None] + 90 - num_queries
        bias = np.where(rng.random((num_queries, 90)) < 0.2, -np.inf, normal(rng, num_queries, 90)).astype(np.float32)
        band = reference.to_window(bias, position, 30, 9).astype(np.float32)
        expected = results(*arrays, window_size=(30, 9), bias=bias)
        assert_same_bits(results(*arrays, window_size=(30, 9), relative_bias=band), expected, "relative bias")
        assert_truncated(*arrays, window_size=(30, 9), relative_bias=band, bias=bias)
        assert_truncated(*arrays, window_size=(30, 9), relative_bias=band, bias=np.full(90, -np.inf, np.float32))


# ---------------------------------------------------------------------------------- hidden, NaN and infinity


@pytest.mark.parametrize("activation", ["softmax", "relu", "sigmoid"])
@pytest.mark.parametrize("num_queries", [1, 4, 40])
def test_minus_infinity_hides(rng, num_queries, activation):
    """Hidden entries may be NaN, in key, value, and the other bias."""
    query, key, value = qkv(rng, (2,), num_queries, 60)
    band = normal(rng, num_queries, 16)
    band[rng.random(band.shape) < 0.4] = -np.inf
    band[:, 7] = -np.inf
    band[::3] = -np.inf
    arguments = {"window_size": (11, 4), "relative_bias": band, "activation": activation}
    expected = assert_attention(query, key, value, **arguments)
    assert (expected[:, ::3] == 0).all()
    position = np.arange(num_queries)[:, None] + 60 - num_queries
    hidden = reference.from_window(band, position, 11, 4, 60) == -np.inf
    for bad in (np.nan, np.inf):
        bias = np.where(hidden, np.float32(bad), np.float32(0))
        np.testing.assert_array_equal(attend(query, key, value, bias=bias, **arguments), expected)
    unseen = ~reference.visible_keys(num_queries, 60, window_size=(11, 4), relative_bias=band).any(0)
    assert unseen.any()
    key[:, unseen], value[:, unseen] = np.nan, np.inf
    np.testing.assert_array_equal(attend(query, key, value, **arguments), expected)


@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("sink", [None, -2.5])
def test_rows_of_minus_infinity(rng, num_queries, sink):
    query, key, value = qkv(rng, (2,), num_queries, 70)
    key[...], value[...] = np.nan, np.nan
    sinks = {} if sink is None else {"sinks": np.float32(sink)}
    for band_weights, entries in ((True, 70), ("band", 16)):
        out, weights, lse = attend(
            query, key, value, window_size=(11, 4), relative_bias=np.float32(-np.inf), **sinks,
            return_weights=band_weights, return_lse=True,
        )  # fmt: skip
        assert weights.shape == (2, num_queries, entries)
        assert (out == 0).all()
        assert (weights == 0).all()
        np.testing.assert_array_equal(lse, np.full((2, num_queries), -np.inf if sink is None else sink))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rule", ["past the keys", "lengths", "mask", "bias", "chunks"])
@pytest.mark.parametrize("num_queries", [1, 4, 40])
def test_entries_that_are_not_seen(rng, num_queries, rule, bad):
    """NaN or infinity in a relative bias changes no bit if its key does not exist or is hidden otherwise."""
    arrays = qkv(rng, (2,), num_queries, 60)
    mask = rng.random((num_queries, 60)) < 0.5
    arguments = {
        "past the keys": {"query_offset": 45 - num_queries},
        "lengths": {"key_lengths": 51, "query_lengths": max(num_queries - 3, 1)},
        "mask": {"mask": mask},
        "bias": {"bias": np.where(mask, 0, -np.inf).astype(np.float32)},
        "chunks": {"chunk_size": 9, "left_chunks": 1},
    }[rule]
    window = (30, 28)
    band = normal(rng, num_queries, sum(window) + 1)
    call = functools.partial(results, *arrays, window_size=window, **arguments)
    expected = call(relative_bias=band)
    position = reference.query_positions(
        num_queries, 60, *(arguments.get(name) for name in ("query_offset", "query_lengths", "key_lengths"))
    )
    visible = reference.visible_keys(num_queries, 60, window_size=window, **arguments)
    unseen = reference.to_window(visible, position, *window).astype(bool) == 0
    assert unseen.any()
    assert_same_bits(call(relative_bias=np.where(unseen, np.float32(bad), band)), expected, f"{bad} in unseen entries")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("activation", ["softmax", "relu", "sigmoid"])
def test_entries_that_are_seen(rng, activation, num_queries, bad):
    arrays = qkv(rng, (2,), num_queries, 60)
    band = normal(rng, num_queries, 16)
    band[0, 3] = bad
    arguments = {"window_size": (11, 4), "relative_bias": band, "activation": activation, "query_offset": 20}
    out, weights = attend(*arrays, **arguments, return_weights="band")
    assert np.isnan(out[:, 0]).all()
    assert np.isfinite(out[:, 1:]).all()
    assert np.isnan(weights[:, 0, 3]).all()
    assert np.isfinite(weights[:, 1:]).all()
    assert_attention(*arrays, **arguments)


@pytest.mark.parametrize("number", [1e30, -1e30, np.finfo(np.float32).min, np.finfo(np.float32).max])
@pytest.mark.parametrize("num_queries", [1, 20])
def test_no_number_is_minus_infinity(rng, num_queries, number):
    query, key, value = qkv(rng, (2,), num_queries, 60)
    query *= np.float32(1e-20)
    arguments = {"window_size": (11, 4), "query_offset": 20}
    expected = np.mean(value[:, 9:25], axis=-2)
    out, lse = attend(query, key, value, relative_bias=np.float32(number), return_lse=True, **arguments)
    np.testing.assert_allclose(out[:, 0], expected, atol=1e-5)
    np.testing.assert_allclose(lse, np.float32(number), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("num_queries", [1, 4, 33])
def test_keys_outside_of_the_window(rng, num_queries, bad):
    query, key, value = qkv(rng, (2,), num_queries, 900)
    for arguments in (
        {"window_size": (60, 31), "query_offset": 450},
        {"chunk_size": 100, "left_chunks": 1, "query_offset": 450},
        {"window_size": (60, 31), "query_offset": np.array([450, 470]), "return_weights": "band"},
    ):
        shared = {name: x for name, x in arguments.items() if name != "return_weights"}
        unseen = ~reference.visible_keys(num_queries, 900, **shared).any(-2)
        unseen = np.broadcast_to(unseen, (2, 900))
        expected = attend(query, key, value, **arguments)
        spoiled = [x.copy() for x in (key, value)]
        for x in spoiled:
            x[unseen] = bad
        actual = attend(query, *spoiled, **arguments)
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (actual, expected)), strict=True):
            assert bits(a) == bits(b)


# ------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCORES)
def test_threads(rng, name, dtype):
    """Output, lse and band are those of one thread."""
    arrays = qkv(rng, (2, 4), 300, 1000, 12, dtype=dtype)
    band = normal(rng, 4, 300, 61, dtype=dtype)
    for arguments in ({"window_size": (40, 20)}, {"window_size": (60, 0), "chunk_size": 50, "is_causal": True}):
        call = functools.partial(
            getattr(fastattn, name), *arrays, **SCORES[name], **arguments, relative_bias=band, return_lse=True
        )
        for weights in (False, True, "band"):
            expected = call(return_weights=weights, num_threads=1)
            for num_threads in THREADS[1:]:
                same = call(return_weights=weights, num_threads=num_threads)
                assert [bits(x) for x in same] == [bits(x) for x in expected]


@pytest.mark.parametrize("window", [(40, 20), (0, 0), (1000, 3)])
def test_other_keys_do_not_matter(rng, window):
    """A row has the same bits if the keys outside its window do not exist, or are many more."""
    query, key, value = qkv(rng, (2,), 70, 300, 24)
    band = normal(rng, 70, sum(window) + 1)
    expected = results(query, key, value, window_size=window, relative_bias=band, query_offset=100)
    more = [np.concatenate([x, np.full_like(x, np.nan)], axis=-2) for x in (key, value)]
    padded = results(query, *more, window_size=window, relative_bias=band, query_offset=100, key_lengths=300)
    for a, b in zip((padded[0], padded[1], padded[3]), (expected[0], expected[1], expected[3]), strict=True):
        assert bits(a) == bits(b)
    for start in (5, 31, 61):  # rows from `start` on, in a separate call
        own = results(
            query[:, start:], key, value, window_size=window, relative_bias=band[start:], query_offset=100 + start
        )
        assert_same_bits(own, [x[:, start:] for x in expected], f"rows from {start} on")


# -------------------------------------------------------------------------------------- bad arguments

WINDOW = {"window_size": (2, 1)}


def test_a_band_needs_two_sides():
    band = np.zeros(4, dtype=np.float32)
    refuse(ValueError, "relative_bias", function="truncated_attention", left=None, relative_bias=band)
    refuse(ValueError, "return_weights", function="truncated_attention", left=3, right=-1, return_weights="band")


def test_causal_takes_the_right_side_away():
    """Of a window (2, 1) three entries remain."""
    arrays = [np.ones((5, 2))] * 3
    assert attend(*arrays, relative_bias=np.zeros(3), is_causal=True, **WINDOW).shape == (5, 2)
    _, band = attend(*arrays, is_causal=True, **WINDOW, return_weights="band")
    assert band.shape == (5, 3)


@pytest.mark.parametrize("bad", [-2, 1.5, "3", (1, 2), object(), [1], float("nan")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_sides_of_truncated(side, bad):
    """The message names what the caller wrote."""
    refuse(ERRORS, rf"\b{side}\b", function="truncated_attention", **{"left": 2, "right": 1, side: bad})


def test_truncated_has_no_other_window():
    for name in ("window_size", "chunk_size", "left_chunks"):
        with pytest.raises(TypeError, match=name):
            fastattn.truncated_attention(*[np.ones((5, 2))] * 3, 2, **{name: 2})
    with pytest.raises(TypeError):
        fastattn.truncated_attention(*[np.ones((5, 2))] * 3)
    with pytest.raises(TypeError):
        fastattn.truncated_attention(*[np.ones((5, 2))] * 3, 2, 1, True)


def test_out_overlaps_relative_bias():
    buffer = np.ones((5, 8), dtype=np.float32)
    arrays = [np.ones((5, 8), dtype=np.float32) for _ in range(3)]
    for band in (buffer[:, :4], buffer[:1, 4:], buffer.ravel()[36:]):
        with pytest.raises(ValueError, match=r"(?s)out.*relative_bias"):
            attend(*arrays, relative_bias=band, out=buffer, **WINDOW)
    assert (buffer == 1).all()


def assert_huge(rng, size, window_size=(None, None), query_offset=None, **chunks):
    """Huge numbers give the right result, or an error that names them."""
    arrays = qkv(rng, (), 5, 7)
    left, right = window_size
    offset = 2 if query_offset is None else query_offset
    seen = visible_by_hand((5, 7), offset, left=left, right=right, **chunks)
    try:
        assert_like_hand(arrays, seen, window_size=window_size, query_offset=query_offset, **chunks)
    except ERRORS as error:
        assert any(name in str(error) for name in ("window_size", "query_offset", *chunks))
        assert size >= 2**63  # anything that fits an int64 must work


@pytest.mark.parametrize("size", [2**31, 2**59, 2**60, 2**62, 2**63 - 1, 2**63, 10**30])
def test_huge_numbers(rng, size):
    assert_huge(rng, size, chunk_size=size)
    assert_huge(rng, size, chunk_size=size, left_chunks=size)
    assert_huge(rng, size, chunk_size=size, query_offset=-size)
    assert_huge(rng, size, chunk_size=1, left_chunks=size, query_offset=-size)
    assert_huge(rng, size, chunk_size=3, left_chunks=2, query_offset=size)
    assert_huge(rng, size, window_size=(size - 1, 0), query_offset=-size)


@pytest.mark.parametrize("size", [2**31, 2**58, 2**59])
def test_huge_numbers_beside_each_other(rng, size):
    """Only the difference of the two counts; beyond 2**60 all are equally far away."""
    assert_huge(rng, size, chunk_size=3, window_size=(size, size), query_offset=size)
    assert_huge(rng, size, window_size=(size, 0), query_offset=2 * size)
    assert_huge(rng, size, window_size=(0, 2 * size), query_offset=-size)
    assert_huge(rng, size, window_size=(0, size), query_offset=-2 * size)
    assert_huge(rng, size, chunk_size=size, left_chunks=1, query_offset=2 * size)
    assert_huge(rng, size, chunk_size=1, left_chunks=size, query_offset=2 * size)


# ---------------------------------------------------------------------------------- the checks can fail


def planted(change):
    """A dot_product_attention with its rules altered: `change` gets them by name."""

    def wrong(query, key, value, **arguments):
        return attend(query, key, value, **change(dict(arguments)))

    return wrong


def shifted(arguments):
    """The window is one key further right, and its bias with it."""
    left, right = arguments["window_size"]
    return arguments | {"window_size": (left - 1, right + 1)}


BUGS = {
    "bias one entry off": lambda a: a | {"relative_bias": np.roll(a["relative_bias"], 1, axis=-1)},
    "bias reversed": lambda a: a | {"relative_bias": a["relative_bias"][..., ::-1]},
    "bias of the row before": lambda a: a | {"relative_bias": np.roll(a["relative_bias"], 1, axis=-2)},
    "bias of the other head": lambda a: a | {"relative_bias": a["relative_bias"][::-1]},
    "no bias": lambda a: a | {"relative_bias": None},
    "window one key off": shifted,
    "chunks a key longer": lambda a: a | {"chunk_size": a["chunk_size"] + 1},
    "a chunk less": lambda a: a | {"left_chunks": a["left_chunks"] - 1},
    "a chunk more": lambda a: a | {"left_chunks": a["left_chunks"] + 1},
    "no chunks": lambda a: a | {"chunk_size": None, "left_chunks": None},
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(rng, bug):
    arrays = qkv(rng, (2,), 20, 60)
    arguments = {"window_size": (11, 4), "relative_bias": normal(rng, 2, 20, 16), "chunk_size": 5, "left_chunks": 1}
    assert_attention(*arrays, **arguments, function=planted(lambda a: a))
    with pytest.raises(AssertionError, match="output"):
        assert_attention(*arrays, **arguments, function=planted(BUGS[bug]))


def test_a_band_in_the_wrong_place_is_found(rng):
    def wrong(*arrays, return_weights=False, **arguments):
        result = attend(*arrays, return_weights=return_weights, **arguments)
        return (result[0], np.roll(result[1], 1, axis=-1)) if return_weights == "band" else result

    with pytest.raises(AssertionError, match="band"):
        assert_attention(*qkv(rng, (2,), 20, 60), window_size=(11, 4), function=wrong)
