"""Hostile numbers: huge and tiny scales, visible and hidden NaN and infinity, empty rows, long rows."""

import functools
import warnings

import fresh_process
import numpy as np
import pytest
from problems import DTYPES, bits, qkv, sixteen_bits
from tolerances import assert_attention, assert_within

import fastattn
from fastattn import reference

ACTIVATIONS = ("softmax", "relu", "sigmoid", "sparsemax", "entmax15")

# ------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("query_scale", "key_scale"),
    [
        (1e-30, 1),
        (1, 1e-30),
        (1e-30, 1e-30),
        (1e30, 1e-30),
        (1e-30, 1e30),
        (1e-10, 1e12),
        (1e15, 1e15),
        (30, 30),
    ],
)
@pytest.mark.parametrize("value_scale", [1e-30, 1, 1e30])
def test_scales(rng, query_scale, key_scale, value_scale, dtype):
    """Right within the bound, and never outside the values' range, however large the scores."""
    query, key, value = qkv(rng, (2,), 20, 70, dtype=dtype)
    query, key, value = query * dtype(query_scale), key * dtype(key_scale), value * dtype(value_scale)
    out = assert_attention(query, key, value)
    assert_convex(out, value)
    assert_convex(assert_attention(query, key, value, is_causal=True), value)
    assert_convex(assert_attention(query[:, :1], key, value), value)


def assert_convex(out, value):
    """Each channel is between the smallest and the largest value of that channel."""
    room = 16 * np.finfo(out.dtype).eps * np.abs(value).max()
    assert (out >= value.min(axis=-2, keepdims=True) - room).all()
    assert (out <= value.max(axis=-2, keepdims=True) + room).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30, -1e30])
def test_scale_argument(rng, scale, dtype):
    query, key, value = qkv(rng, (2,), 20, 70, dtype=dtype)
    assert_convex(assert_attention(query, key, value, scale=scale), value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(20, 70), (1, 300), (70, 20)])
@pytest.mark.parametrize("level", ["-1e30", "finfo.min", "finfo.max", "1e30", "-1e4", "-1e9"])
def test_rows_at_one_level_are_ordinary(rng, level, shape, dtype):
    """A row whose scores are all near -1e30 (or the lowest float) is an average like any other.

    The scores are negligible beside such a bias, so all weights are equal: code that treats the level as a stand-in for
    minus infinity, or multiplies it by log2(e) first, gives 0 or NaN.
    """
    number = getattr(np.finfo(dtype), level[6:]) if level.startswith("finfo") else float(level)
    query, key, value = qkv(rng, (2,), *shape, dtype=dtype)
    query = query * dtype(1e-20)
    bias = np.full(shape, number, dtype=dtype)
    for arguments in ({}, {"is_causal": True, "query_offset": 2}, {"mask": rng.random(shape) < 0.5}):
        out, weights, lse = fastattn.dot_product_attention(
            query, key, value, bias=bias, **arguments, return_weights=True, return_lse=True
        )
        visible = np.broadcast_to(reference.visible_keys(*shape, **arguments), weights.shape)
        count = visible.sum(-1, keepdims=True)
        expected = visible / np.maximum(count, 1)
        eps = np.finfo(dtype).eps
        assert_within(weights, expected, 8 * eps, "weights")
        assert_within(out, expected @ value.astype(np.float64), 8 * eps * np.abs(value).max(), "output")
        seen = count[..., 0] > 0
        assert_within(lse[seen], np.full(seen.sum(), float(dtype(number))), 4 * eps * abs(number) + 8, "lse")
        assert (lse[~seen] == -np.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_at_different_levels(rng, dtype):
    """Rows of one tile are many orders of magnitude apart; each is normalised by itself."""
    query, key, value = qkv(rng, (2,), 64, 70, dtype=dtype)
    bias = np.zeros((64, 70), dtype=dtype)
    bias += np.linspace(-1, 1, 64)[:, None] ** 3 * dtype(1e6)
    assert_attention(query, key, value, bias=bias)
    bias[::3] = np.finfo(dtype).min
    bias[1::3, ::2] = -np.inf
    assert_attention(query, key, value, bias=bias)


def test_scores_that_grow_along_the_row(rng):
    """Every block has a new maximum, or only the first: the running rescale both ways."""
    query, key, value = qkv(rng, (), 9, 1500)
    slope = np.linspace(-300, 300, 1500, dtype=np.float32)
    for bias in (slope, -slope, 10 * slope, -10 * slope, np.abs(slope)):
        assert_attention(query, key, value, bias=bias)
        assert_attention(query[:1], key, value, bias=bias)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("norm", [fastattn.layer_norm, fastattn.rms_norm])
def test_norms_of_denormal_rows(norm, dtype):
    row = np.array([3.0, -1.0, 0.0, 5.0, -7.0])  # its sum is 0
    expected = row / np.sqrt(np.mean(row * row))
    step = np.finfo(dtype).smallest_subnormal
    got = norm(row.astype(dtype) * step, eps=0)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-14)
    np.testing.assert_array_equal(norm(np.zeros(5, dtype), eps=0), np.zeros(5))
    for eps in (0, 5e-324, 1e-300, 1e-100, 1e-30):
        np.testing.assert_allclose(norm(row.astype(dtype), eps=eps), expected, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormal_values(rng, dtype):
    """Values below the normal range are right to within a few of the smallest steps."""
    step = float(np.finfo(dtype).smallest_subnormal)
    query, key, _ = qkv(rng, (), 5, 3, dtype=dtype)
    value = np.full((3, 4), 1000 * step, dtype=dtype)
    np.testing.assert_allclose(fastattn.dot_product_attention(query, key, value), 1000 * step, atol=4 * step, rtol=0)


# --------------------------------------------------------------------------- NaN and infinity unseen

SHAPE = (40, 90)
OFFSET, ROWS = SHAPE[1] - SHAPE[0], np.arange(SHAPE[0])[:, None]


def hiding_rules(rng):
    """Pairs (arguments, the keys that no query sees with them)."""
    keys = np.arange(SHAPE[1])
    dropped = rng.random(SHAPE[1]) < 0.3
    bias = rng.standard_normal(SHAPE).astype(np.float32)
    bias[:, dropped] = -np.inf
    return {
        "key_lengths": ({"key_lengths": 61}, keys >= 61),
        "key_lengths per batch": ({"key_lengths": np.array([[61], [50]])}, keys >= 61),
        "causal": ({"is_causal": True, "query_offset": 3}, keys > 42),
        "window": ({"window_size": (4, 6), "query_offset": 20}, (keys < 16) | (keys > 65)),
        "chunks": ({"chunk_size": 10, "left_chunks": 1, "query_offset": 20}, (keys < 10) | (keys >= 60)),
        "relative bias": (
            {"window_size": (60, 60), "relative_bias": reference.to_window(bias, OFFSET + ROWS, 60, 60)},
            dropped,
        ),
        "mask of keys": ({"mask": ~dropped}, dropped),
        "mask of pairs": ({"mask": np.broadcast_to(~dropped, SHAPE) & (rng.random(SHAPE) < 0.9)}, dropped),
        "bias": ({"bias": bias}, dropped),
        "all": (
            {
                "mask": ~dropped,
                "key_lengths": 70,
                "is_causal": True,
                "window_size": (30, 0),
                "query_offset": 5,
            },
            dropped | (keys > 44),
        ),
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", list(hiding_rules(np.random.default_rng())))
def test_unseen_keys_and_values(rng, rule, bad, activation):
    """The contents of a key or value that no query sees do not reach a single bit."""
    arguments, unseen = hiding_rules(rng)[rule]
    query, key, value = qkv(rng, (2, 3), *SHAPE)
    call = functools.partial(fastattn.dot_product_attention, activation=activation, return_weights=True, **arguments)
    expected = call(query, key, value)
    key[..., unseen, :] = bad
    value[..., unseen, ::2] = bad
    for num_queries in (SHAPE[0], 1):
        if num_queries == 1:  # the last row alone: other loops, the same rule
            arguments = last_row(arguments)
            call = functools.partial(
                fastattn.dot_product_attention, activation=activation, return_weights=True, **arguments
            )
            clean = np.nan_to_num(key, posinf=0, neginf=0), np.nan_to_num(value, posinf=0, neginf=0)
            query = query[..., -1:, :]
            expected = call(query, *clean)
        for result, clean_result in zip(call(query, key, value), expected, strict=True):
            np.testing.assert_array_equal(result, clean_result)
    assert_attention(query, key, value, activation=activation, **arguments)


def last_row(arguments):
    """The arguments with which the last query row alone sees what it sees among the others."""
    arguments = dict(arguments)
    if "query_offset" in arguments:
        arguments["query_offset"] = arguments["query_offset"] + SHAPE[0] - 1
    for name in ("mask", "bias", "relative_bias"):
        if name in arguments and arguments[name].ndim == 2:
            arguments[name] = arguments[name][-1:]
    return arguments


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rule", ["key_lengths", "causal", "window", "mask of keys", "mask of pairs", "all"])
def test_unseen_bias(rng, rule, bad):
    arguments, _ = hiding_rules(rng)[rule]
    query, key, value = qkv(rng, (2, 3), *SHAPE)
    bias = rng.standard_normal(SHAPE).astype(np.float32)
    expected = assert_attention(query, key, value, bias=bias, **arguments)
    visible = reference.visible_keys(*SHAPE, **arguments)
    bias = np.where(visible, bias, np.float32(bad))
    np.testing.assert_array_equal(fastattn.dot_product_attention(query, key, value, bias=bias, **arguments), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_keys_seen_by_some_rows_only(rng, activation):
    """Causal: a NaN in key 20 reaches the rows that see it and no other, though they share a tile."""
    query, key, value = qkv(rng, (2,), 40, 40)
    clean = fastattn.dot_product_attention(query, key, value, is_causal=True, activation=activation)
    for array in (key, value):
        spoiled = array.copy()
        spoiled[:, 20] = np.nan
        out, weights = fastattn.dot_product_attention(
            query,
            spoiled if array is key else key,
            spoiled if array is value else value,
            is_causal=True,
            activation=activation,
            return_weights=True,
        )
        np.testing.assert_array_equal(out[:, :20], clean[:, :20])
        # Where weights are sparse, values of weight 0 do not count.
        reached = weights[..., 20] > 0 if array is value and activation in reference.SPARSE else np.arange(40) >= 20
        np.testing.assert_array_equal(np.isnan(out).all(-1), np.broadcast_to(reached, out.shape[:-1]))
        np.testing.assert_array_equal(weights[:, np.triu(np.ones((40, 40), dtype=bool), 1)], 0)


def test_nan_in_queries_past_their_length(rng):
    query, key, value = qkv(rng, (2,), 40, 50)
    query[:, 31:] = np.nan
    out, weights, lse = fastattn.dot_product_attention(
        query, key, value, query_lengths=31, return_weights=True, return_lse=True
    )
    assert (out[:, 31:] == 0).all()
    assert (weights[:, 31:] == 0).all()
    assert (lse[:, 31:] == -np.inf).all()
    assert np.isfinite(out).all()


# ----------------------------------------------------------------------------- NaN and infinity seen


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("bad_key", [0, 17, 299])
def test_seen_nan_gives_nan(rng, num_queries, bad_key, activation):
    def call(query, key, value, **arguments):
        return fastattn.dot_product_attention(query, key, value, activation=activation, **arguments)

    query, key, value = qkv(rng, (2,), num_queries, 300)
    bad = key.copy()
    bad[:, bad_key, 3] = np.nan
    assert np.isnan(call(query, bad, value)).all()
    bad = value.copy()
    bad[:, bad_key, 3] = np.nan
    if activation not in reference.SPARSE:  # where values of weight 0 do not count (test_sparse)
        assert np.isnan(call(query, key, bad)[..., 3]).all()
    bad = np.zeros((num_queries, 300), dtype=np.float32)
    bad[:, bad_key] = np.nan
    assert np.isnan(call(query, key, value, bias=bad)).all()
    bad = query.copy()
    bad[:, 0] = np.nan
    out = call(bad, key, value)
    assert np.isnan(out[:, 0]).all()
    assert np.isfinite(out[:, 1:]).all()


@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("bad_key", [0, 17, 299])
def test_seen_infinite_score_gives_nan(rng, num_queries, bad_key):
    query, key, value = qkv(rng, (2,), num_queries, 300)
    bias = np.zeros((num_queries, 300), dtype=np.float32)
    bias[0, bad_key] = np.inf
    out = fastattn.dot_product_attention(query, key, value, bias=bias)
    assert np.isnan(out[:, 0]).all()
    assert np.isfinite(out[:, 1:]).all()
    key[:, bad_key] = np.inf
    assert np.isnan(fastattn.dot_product_attention(np.abs(query), key, value)).all()


def test_nan_rows_have_no_weight_on_unseen_keys(rng):
    query, key, value = qkv(rng, (2,), 20, 30)
    query[:, 4] = np.nan
    _, weights = fastattn.dot_product_attention(query, key, value, is_causal=True, return_weights=True)
    hidden = ~reference.visible_keys(20, 30, is_causal=True)
    assert (weights[:, hidden] == 0).all()
    assert np.isnan(weights[:, 4][:, ~hidden[4]]).all()


# -------------------------------------------------------------------- rows that see nothing, or -inf


@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("sink", [None, -2.5])
@pytest.mark.parametrize("how", ["mask", "bias", "key_lengths", "query_lengths", "offset", "score"])
def test_empty_rows(rng, how, sink, num_queries):
    """Output 0, weights 0, lse -inf or the sink; even if key and value hold NaN."""
    query, key, value = qkv(rng, (2,), num_queries, 70)
    arguments = {
        "mask": {"mask": np.zeros(70, dtype=bool)},
        "bias": {"bias": np.full((num_queries, 70), -np.inf, dtype=np.float32)},
        "key_lengths": {"key_lengths": 0},
        "query_lengths": {"query_lengths": 0},
        "offset": {"is_causal": True, "query_offset": -num_queries},
        "score": {},
    }[how]
    if how == "score":
        query, key = np.abs(query) + 0.1, np.full_like(key, -np.inf)
    elif how != "bias":
        key[...], value[...] = np.nan, np.nan
    if sink is not None:
        arguments["sinks"] = np.float32(sink)
    out, weights, lse = fastattn.dot_product_attention(
        query, key, value, **arguments, return_weights=True, return_lse=True
    )
    assert (out == 0).all()
    assert (weights == 0).all()
    np.testing.assert_array_equal(lse, np.full((2, num_queries), -np.inf if sink is None else sink))


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "sparsemax", "entmax15"])
def test_empty_rows_of_other_activations(rng, activation):
    query, key, value = qkv(rng, (2,), 20, 70)
    out, weights = fastattn.dot_product_attention(
        query, key, value, key_lengths=0, activation=activation, return_weights=True
    )
    assert (out == 0).all()
    assert (weights == 0).all()


def test_empty_rows_among_others(rng):
    mask = rng.random((130, 300)) < 0.5
    mask[rng.random(130) < 0.4] = False
    out = assert_attention(*qkv(rng, (2,), 130, 300), mask=mask)
    assert (out[:, ~mask.any(-1)] == 0).all()


def test_first_blocks_hidden(rng):
    """The running maximum starts at -inf and stays there for whole blocks: no NaN may result."""
    mask = np.zeros((20, 1500), dtype=bool)
    mask[:, 1400:] = True
    mask[3] = False
    arrays = qkv(rng, (2,), 20, 1500)
    assert_attention(*arrays, mask=mask)
    assert_attention(*arrays, bias=np.where(mask, 0, -np.inf).astype(np.float32))


# ----------------------------------------------------------------------------------------- long rows


@pytest.mark.parametrize("num_queries", [1, 3, 20])
def test_error_does_not_grow_with_the_row(rng, num_queries):
    query, key, value = qkv(rng, (), num_queries, 100_000, 16, 8)
    assert_attention(query, key, value)
    assert_attention(query, key, value + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("num_keys", [1, 3, 100, 1000, 4097, 100_000])
def test_equal_weights_on_constant_values(num_keys, num_queries, dtype):
    """Every rounding goes the same way here, so a sum that is not split into blocks would drift."""
    query, key = np.zeros((num_queries, 4), dtype=dtype), np.zeros((num_keys, 4), dtype=dtype)
    value = np.full((num_keys, 3), 0.1, dtype=dtype)
    out, lse = fastattn.dot_product_attention(query, key, value, return_lse=True)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(out, value[0, 0], rtol=4.5 * eps, atol=0)
    np.testing.assert_allclose(lse, np.log(num_keys), rtol=eps, atol=4 * eps)


def test_a_drifting_sum_would_be_found():
    """Plain float32 addition, key after key, fails the test above."""
    total = np.cumsum(np.full(100_000, 0.1, dtype=np.float32), dtype=np.float32)[-1] / np.float32(100_000)
    assert abs(total - np.float32(0.1)) > 4.5 * np.finfo(np.float32).eps * 0.1


def test_seen_infinity_stays_infinity_over_many_keys():
    """Partial sums of spans of keys are merged: infinity must not become inf - inf there."""
    value = np.ones((5000, 16), np.float32)
    value[5] = np.inf
    zeros = np.zeros((5000, 16), np.float32)
    out = fastattn.dot_product_attention(zeros, zeros, value, is_causal=True)
    assert np.isinf(out[5:]).all()
    np.testing.assert_allclose(out[:5], 1)


@pytest.mark.parametrize("option", [{"softcap": 1e300}, {"softcap": 1e-50}, {"scale": 1e39}, {"scale": 1e-39}])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scalars_beyond_the_range_of_the_dtype(option, dtype):
    zeros = np.zeros((2, 2), dtype)
    value = np.array([[1.0], [3.0]], dtype)
    np.testing.assert_array_equal(fastattn.dot_product_attention(zeros, zeros, value, **option), 2)


@pytest.mark.parametrize("scale", [1e4, -2000.0, 1e-7])
def test_large_and_small_scales(rng, scale):
    x = rng.standard_normal((5, 8)).astype(np.float32)
    expected = reference.dot_product_attention(x, x, x, scale=scale)
    np.testing.assert_allclose(fastattn.dot_product_attention(x, x, x, scale=scale), expected, atol=2e-6)
    tiny, huge = np.full((1, 1), 1e30, np.float32), np.array([[0.0], [1e-30]], np.float32)
    np.testing.assert_allclose(
        fastattn.dot_product_attention(tiny, huge, huge, scale=1e10),
        reference.dot_product_attention(tiny, huge, huge, scale=1e10),
        rtol=1e-5,
    )


def test_sizes_beyond_the_address_space():
    """Zero strides make arrays of any size: running out of memory is an error, not a crash."""
    long = np.broadcast_to(np.float16(0), (1, 2**61))
    with pytest.raises(MemoryError):
        fastattn.dot_product_attention(long, long, np.zeros((1, 1), np.float16))
    with pytest.raises(MemoryError):
        fastattn.logsumexp(np.broadcast_to(np.float16(0), (2**64 // 9 - 7,)))


# ------------------------------------------------------------------------- np.errstate and warnings

# Numbers that over- or underflow in conversions or products: the largest and smallest of float64 and float32,
# denormals, and what float16 and bfloat16 cannot represent.
EXTREMES = np.array(
    [1e-300, 1e300, 3e38, -3e38, 1e-30, 1e-39, 5e-324, -1e300, 65504.0, 7e4, 1e-8, -0.0, 1.0, 0.3, 1e-45, 2.0]
)


def extreme(*shape, dtype=np.float64):
    with np.errstate(all="ignore"):
        return np.resize(EXTREMES, shape).astype(dtype)


def call_layer(dtype, context=False, cache=None, **arguments):
    w = extreme(16, 16, dtype=dtype)
    b = extreme(16)
    layer = fastattn.MultiHeadAttention(w, w, w, w, num_heads=2, b_query=b, b_key=b, b_value=b, b_out=b, **arguments)
    x = extreme(2, 5, 16, dtype=dtype)
    if cache is not None:
        cache = fastattn.KVCache(2, 2, 9, 8, dtype=cache)
        layer(x, cache=cache, is_causal=True)
        return layer(x[:, :1], cache=cache)
    return layer(x, x[:, :3] if context else None, return_weights=True, alibi_slopes=extreme(2), sinks=extreme(2))


def within(x, most, dtype):
    """Finite numbers of that dtype, up to a size."""
    most = min(most, float(finfo_of(dtype).max))
    with np.errstate(all="ignore"):
        return np.clip(x, -most, most).astype(dtype)


def call_layer_over_8_bits(dtype):
    w = np.eye(16).astype(dtype)
    cache = fastattn.KVCache(2, 2, 9, 8, dtype=np.int8, center="mean")
    layer = fastattn.MultiHeadAttention(w, w, w, w, num_heads=2, b_out=extreme(16), rotary_base=1e4)
    x = within(extreme(2, 5, 16), 1e18, dtype)
    return layer(x, cache=cache, is_causal=True), layer(x[:, :1], cache=cache)


def call_normed_vjp(dtype):
    layer = fastattn.MultiHeadAttention(*3 * [extreme(16, 16, dtype=dtype)], num_heads=2, q_norm=extreme(8))
    x = extreme(2, 5, 16, dtype=dtype)
    return tuple(layer.vjp(x)[1](x).values())


def call_cache(dtype, cache_dtype, window=None):
    if dtype.name == "bfloat16" and cache_dtype == "float16":
        dtype = np.float64  # these two do not go together
    cache = fastattn.KVCache(2, 2, 6, 8, dtype=cache_dtype, window=window)
    for _ in range(1 if window is None else 3):
        cache.append(extreme(2, 2, 4, 8, dtype=dtype), extreme(2, 2, 4, 8, dtype=dtype), [3, 4])
    return cache.key


def call_quantized(dtype, cached=False):
    """Numbers of any size that float32 has."""
    x = within(extreme(2, 2, 4, 8), 1e38, dtype)
    if cached:
        cache = fastattn.KVCache(2, 2, 6, 8, dtype=np.int8, window=3, center="mean")
        for _ in range(3):
            cache.append(x, x, [3, 4])
        return cache.key, cache.value_scale, cache.key_center
    quantized = fastattn.quantize_kv(x, x, center="mean", block=4)
    return *quantized, *quantized.dequantize()


def call_stream(dtype):
    stream = fastattn.StreamingAttention(
        3, 1, alibi_slopes=extreme(2), sinks=extreme(2), relative_bias=extreme(5, dtype=np.float32)
    )
    x = extreme(2, 9, 8, dtype=dtype)
    bias = extreme(2, 9, 5, dtype=dtype)
    return stream.push(x, x.astype(np.float32) if dtype == np.float16 else x, x, bias), stream.flush()


def call_layer_stream(dtype):
    w, b = extreme(16, 16, dtype=dtype), extreme(16)
    layer = fastattn.MultiHeadAttention(w, w, w, w, num_heads=2, b_query=b, b_out=b, rotary_base=1e4)
    stream = fastattn.StreamingMultiHeadAttention(layer, 3, 1, alibi_slopes=extreme(2), relative_bias=extreme(5))
    return stream.push(extreme(9, 16, dtype=dtype), extreme(2, 9, 5)), stream.flush()


def call_projected(function, dtype):
    q, k, v = extreme(2, 5, 8, dtype=dtype), extreme(2, 7, 8, dtype=dtype), extreme(2, 7, 8, dtype=dtype)
    w = extreme(8, 8, dtype=dtype)
    if function == "additive_attention":
        return fastattn.additive_attention(q, k, v, w[0], w_query=w, w_key=w, b_hidden=extreme(8))
    return fastattn.bilinear_attention(q, k, v, w, w, b_query=extreme(8), b_key=extreme(8))


def call_attention(dtype, function=fastattn.dot_product_attention, arguments=(), queries=5, **keywords):
    q, k, v = extreme(2, queries, 8, dtype=dtype), extreme(2, 7, 8, dtype=dtype), extreme(2, 7, 8, dtype=dtype)
    return function(q, k, v, *arguments, **keywords)


def call_merge(dtype):
    out, lse = extreme(3, 4, dtype=dtype), extreme(3, dtype=np.float32)
    return fastattn.merge_attention([out, out], [lse, extreme(3)])


def call_merge_vjp(dtype):
    out, lse = extreme(3, 4, dtype=dtype), extreme(3, dtype=np.float32)
    d_outs, d_lses = fastattn.merge_attention_vjp(out, [out, out], [lse, extreme(3)], grad_lse=lse)
    return *d_outs, *d_lses


def call_rows_vjp(name, dtype):
    x = extreme(3, 16, dtype=dtype)
    given = x if name == "logsumexp" else getattr(fastattn, name)(x)
    return getattr(fastattn, f"{name}_vjp")(extreme(*np.shape(getattr(fastattn, name)(x)), dtype=dtype), given)


def call_vjp(name, dtype, **more):
    """All gradients of a function of query, key and value, all of one length."""
    x = extreme(2, 7, 16, dtype=dtype)
    learned = ("relative_bias", "sinks", "w_score", "b_hidden", "w_query", "b_query", "log_decay")
    wrt = ("query", "key", "value", *(n for n in more if n in learned))
    return getattr(fastattn, f"{name}_vjp")(x, x, x, x, wrt=wrt, **more)


def call_from(name, dtype):
    w, b = extreme(8, 8, dtype=dtype), extreme(8, dtype=dtype)
    make = fastattn.MultiHeadAttention
    if name == "from_keras":
        layer = make.from_keras([w.reshape(8, 2, 4), b.reshape(2, 4)] * 3 + [w.reshape(2, 4, 8), b])
    elif name == "from_torch":
        state = {"in_proj_weight": extreme(24, 8, dtype=dtype), "in_proj_bias": extreme(24, dtype=dtype),
                 "out_proj.weight": w, "out_proj.bias": b}  # fmt: skip
        layer = make.from_torch(state, num_heads=2)
    elif name == "from_packed":
        layer = make.from_packed(extreme(8, 24, dtype=dtype), extreme(24, dtype=dtype), w, b, num_heads=2)
    elif name == "from_gpt2":
        state = {"h.0.attn.c_attn.weight": extreme(8, 24, dtype=dtype), "h.0.attn.c_proj.weight": w,
                 "h.0.attn.c_proj.bias": b}  # fmt: skip
        layer = make.from_gpt2(state, 0, num_heads=2)
    else:
        at, names = {
            "from_linear": ("", "qkvo"),
            "from_bert": ("encoder.layer.0.attention.", ("self.query", "self.key", "self.value", "output.dense")),
            "from_llama": ("model.layers.0.self_attn.", ("q_proj", "k_proj", "v_proj", "o_proj")),
            "from_qwen": ("model.layers.0.self_attn.", ("q_proj", "k_proj", "v_proj", "o_proj")),
            "from_gemma": ("model.layers.0.self_attn.", ("q_proj", "k_proj", "v_proj", "o_proj")),
            "from_whisper": ("model.encoder.layers.0.self_attn.", ("q_proj", "k_proj", "v_proj", "out_proj")),
            "from_t5": ("encoder.block.0.layer.0.SelfAttention.", "qkvo"),
            "from_distilbert": ("transformer.layer.0.attention.", ("q_lin", "k_lin", "v_lin", "out_lin")),
            "from_vit": (
                "encoder.layer.0.attention.",
                ("attention.query", "attention.key", "attention.value", "output.dense"),
            ),
        }[name]
        state = {f"{at}{part}.{kind}": w if kind == "weight" else b for part in names for kind in ("weight", "bias")}
        more = {}
        if name in ("from_qwen", "from_gemma"):
            state |= {f"{at}{c}_norm.weight": extreme(4, dtype=dtype) for c in "qk"}
            more = {"rotary_base": 1e4}
        if name == "from_t5":
            state[f"{at}relative_attention_bias.weight"] = extreme(8, 2, dtype=dtype)
            more = {"max_length": 3}
        if name == "from_linear":
            layer = make.from_linear(state, *names, num_heads=2)
        else:
            layer = getattr(make, name)(state, 0, num_heads=2, **more)
    return layer(extreme(3, 8)), layer(extreme(3, 8, dtype=np.float32)), layer(extreme(3, 8, dtype=dtype))


# Every kind of call, with x in some dtype.
def call_prepared(dtype):
    keys = fastattn.prepare_additive_keys(extreme(2, 7, 16, dtype=dtype), extreme(16, 8, dtype=dtype))
    return fastattn.additive_attention(
        extreme(2, 5, 8, dtype=dtype), keys, extreme(2, 7, 6, dtype=dtype), extreme(8, dtype=dtype)
    )


def call_projected_context(dtype):
    layer = fastattn.MultiHeadAttention(*[extreme(8, 8, dtype=dtype)] * 4, num_heads=2, b_key=extreme(8))
    return layer(
        extreme(2, 3, 8, dtype=dtype), layer.project_context(extreme(2, 5, 8, dtype=dtype)), return_weights=[1]
    )


def call_packed(dtype):
    layer = fastattn.MultiHeadAttention(*[extreme(8, 8, dtype=dtype)] * 4, num_heads=2, rotary_base=1e4)
    return layer(extreme(9, 8, dtype=dtype), cu_seqlens=[0, 4, 4, 9])


def call_linear(activation, dtype, rows=3):
    linear = fastattn.Linear(extreme(8, 5, dtype=dtype), extreme(5))
    more = extreme(rows, 5)
    return linear(extreme(rows, 8, dtype=dtype), activation=activation, multiply=more, residual=more)


def finite(*shape, dtype):
    """Extreme numbers that float32 can hold too."""
    with np.errstate(all="ignore"):
        x = extreme(*shape, dtype=dtype)
        return np.where(np.isfinite(x.astype(np.float32)), x, x.dtype.type(1))


def call_int8(dtype, rows):
    numbers = np.resize(np.int8([-128, -1, 0, 1, 127]), (8, 5))
    linear = fastattn.Linear(numbers, extreme(5), weight_scale=finite(5, dtype=dtype))
    x = extreme(rows, 8, dtype=np.float32 if dtype == np.float64 else dtype)
    return linear(x, activation="gelu", multiply=extreme(rows, 5), residual=extreme(rows, 5))


def call_quantizing(dtype):
    linear = fastattn.Linear(finite(8, 5, dtype=dtype), dtype="int8")
    return linear.weight, linear.weight_scale


def call_norm(norm, dtype, **more):
    x = extreme(3, 16, dtype=dtype)
    return norm(x, extreme(16), residual=extreme(3, 16), eps=1e-300, return_sum=True, **more)


CALLS = {
    "softmax": lambda t: fastattn.softmax(extreme(3, 16, dtype=t)),
    "softmax along axis 0": lambda t: fastattn.softmax(extreme(16, 3, dtype=t), 0),
    "log_softmax": lambda t: fastattn.log_softmax(extreme(3, 16, dtype=t)),
    "logsumexp": lambda t: fastattn.logsumexp(extreme(3, 16, dtype=t)),
    "dot_product_attention": call_attention,
    "one query": lambda t: call_attention(t, queries=1),
    "slopes and sinks": lambda t: call_attention(t, alibi_slopes=extreme(2), sinks=extreme(2)),
    "biases": lambda t: call_attention(
        t, bias=extreme(5, 7), window_size=(2, 2), relative_bias=extreme(5), softcap=1e-300, scale=1e300
    ),
    "relu": lambda t: call_attention(t, activation="relu", return_weights=True),
    "sigmoid": lambda t: call_attention(t, activation="sigmoid", return_weights=True),
    "sparsemax": lambda t: fastattn.sparsemax(extreme(3, 16, dtype=t)),
    "entmax15": lambda t: fastattn.entmax15(extreme(16, 3, dtype=t), 0),
    "sparsemax of scores": lambda t: call_attention(t, activation="sparsemax", return_weights=True),
    "entmax15 of scores": lambda t: call_attention(t, queries=1, activation="entmax15"),
    "mixed dtypes": lambda t: fastattn.dot_product_attention(
        extreme(5, 8, dtype=t), extreme(7, 8, dtype=np.float32), extreme(7, 8)
    ),
    "lists": lambda t: fastattn.dot_product_attention(*3 * [extreme(5, 8, dtype=t).tolist()]),
    "out=": lambda t: call_attention(t, out=extreme(2, 5, 8, dtype=t)),
    "truncated_attention": lambda t: call_attention(t, fastattn.truncated_attention, (2, 1)),
    "neighborhood_attention": lambda t: fastattn.neighborhood_attention(
        *(extreme(2, 5, 4, dtype=t) for _ in range(3)), 3, relative_bias=extreme(5), sinks=extreme(2), return_lse=True
    ),
    "graph_attention": lambda t: fastattn.graph_attention(
        *(extreme(2, 5, 4, dtype=t) for _ in range(3)),
        ([0, 2, 2, 4, 5, 7], [0, 3, 1, 1, 4, 2, 0]),
        edge_bias=extreme(7),
        edge_key=extreme(7, 4, dtype=t),
        softcap=1e-300,
        return_lse=True,
    ),
    "graph_attention, GATv2": lambda t: fastattn.graph_attention(
        *(extreme(2, 5, 4, dtype=t) for _ in range(3)),
        ([0, 2, 2, 4, 5, 7], [0, 3, 1, 1, 4, 2, 0]),
        w_score=extreme(4, dtype=t),
    ),
    "graph_attention_vjp": lambda t: fastattn.graph_attention_vjp(
        *(extreme(2, 5, 4, dtype=t) for _ in range(4)),
        ([0, 2, 2, 4, 5, 7], [0, 3, 1, 1, 4, 2, 0]),
        wrt=("query", "key", "value", "w_score", "edge_bias", "edge_key"),
        w_score=extreme(4, dtype=t),
        edge_bias=extreme(7),
        edge_key=extreme(7, 4, dtype=t),
        softcap=1e-300,
        grad_lse=extreme(2, 5),
    ),
    "linear_attention": lambda t: fastattn.linear_attention(
        *(extreme(2, 5, 4, dtype=t) for _ in range(3)),
        is_causal=True,
        log_decay=extreme(2, 5, 1, dtype=t),
        return_state=True,
    ),
    "linear_attention, delta rule": lambda t: fastattn.linear_attention(
        *(extreme(2, 5, 4, dtype=t) for _ in range(3)), is_causal=True, beta=extreme(2, 5, dtype=t), feature_map=None
    ),
    "varlen_attention": lambda t: call_attention(
        t, fastattn.varlen_attention, ([0, 2, 5], [0, 3, 7]), sinks=extreme(2), alibi_slopes=extreme(2), return_lse=True
    ),
    "additive_attention": lambda t: call_projected("additive_attention", t),
    "bilinear_attention": lambda t: call_projected("bilinear_attention", t),
    "prepare_additive_keys": call_prepared,
    **{f"Linear, {name}": functools.partial(call_linear, name) for name in ("relu", "gelu", "gelu_tanh", "silu")},
    "Linear, many rows": lambda t: call_linear(None, t, rows=20),
    "Linear, int8": lambda t: call_int8(t, 3),
    "Linear, int8, many rows": lambda t: call_int8(t, 20),
    "Linear, quantized": call_quantizing,
    "Linear, widened": lambda t: fastattn.Linear(extreme(8, 5, dtype=t), extreme(5))(extreme(3, 8)),
    "layer_norm": lambda t: call_norm(fastattn.layer_norm, t, bias=extreme(16)),
    "rms_norm": lambda t: call_norm(fastattn.rms_norm, t, offset=1e300),
    "pack, unpack": lambda t: fastattn.unpack(*fastattn.pack(extreme(2, 5, 4, dtype=t), [3, 5])),
    "merge_attention": call_merge,
    "merge_attention_vjp": call_merge_vjp,
    **{
        f"{name}_vjp": functools.partial(call_rows_vjp, name)
        for name in ("softmax", "log_softmax", "logsumexp", "sparsemax", "entmax15")
    },
    "additive_attention_vjp": lambda t: call_vjp("additive_attention", t, w_score=extreme(16), b_hidden=extreme(16)),
    "bilinear_attention_vjp": lambda t: call_vjp("bilinear_attention", t, w_query=extreme(16, 4), b_query=extreme(4)),
    "linear_attention_vjp": lambda t: call_vjp("linear_attention", t, is_causal=True, log_decay=-abs(extreme(2, 7, 1))),
    "neighborhood_attention_vjp": lambda t: call_vjp("neighborhood_attention", t, kernel_size=3, sinks=extreme(2)),
    "dot_product_attention_vjp": lambda t: call_vjp("dot_product_attention", t, softcap=1e-300, sinks=extreme(2)),
    "truncated_attention_vjp": lambda t: call_vjp("truncated_attention", t, left=2, relative_bias=extreme(3)),
    "varlen_attention_vjp": lambda t: call_vjp("varlen_attention", t, cu_seqlens_q=[0, 2, 7]),
    "self_attention": lambda t: fastattn.self_attention(extreme(5, 8, dtype=t), *3 * [extreme(8, 8, dtype=t)]),
    "self_attention_vjp": lambda t: fastattn.self_attention_vjp(
        *2 * [extreme(5, 8, dtype=t)], *3 * [extreme(8, 8, dtype=t)]
    ),
    "MultiHeadAttention": call_layer,
    "MultiHeadAttention, context": lambda t: call_layer(t, context=True),
    "MultiHeadAttention, projected context": call_projected_context,
    "MultiHeadAttention, packed": call_packed,
    "MultiHeadAttention, rotary": lambda t: call_layer(t, rotary_base=1e4),
    "MultiHeadAttention, norms of heads": lambda t: call_layer(t, q_norm=extreme(8), k_norm=extreme(8), scale=1e-300),
    "MultiHeadAttention.vjp, norms of heads": call_normed_vjp,
    "MultiHeadAttention, float16 cache": lambda t: call_layer(t, cache=np.float16, rotary_base=1e4),
    "MultiHeadAttention, float32 cache": lambda t: call_layer(t, cache=np.float32),
    "MultiHeadAttention, int8 cache": call_layer_over_8_bits,
    **{f"KVCache of {to}": functools.partial(call_cache, cache_dtype=to) for to in ("float32", "float16", "float64")},
    "KVCache, window": lambda t: call_cache(t, "float16", 4),
    "KVCache of int8": lambda t: call_quantized(t, cached=True),
    "quantize_kv, QuantizedKV": call_quantized,
    "from_llama_cpp": lambda t: fastattn.from_llama_cpp(np.full((2, 34), 0x7B, np.uint8)),
    "StreamingAttention": call_stream,
    "StreamingMultiHeadAttention": call_layer_stream,
    "sinusoidal_encoding": lambda t: fastattn.sinusoidal_encoding(9, 300, base=1e300, offset=2**53 - 9, dtype=t),
    "apply_rotary": lambda t: fastattn.apply_rotary(extreme(3, 16, dtype=t), offset=2**40, base=1e-300),
    "alibi_slopes": lambda t: fastattn.alibi_slopes(1000),
    "rotary_frequencies": lambda t: fastattn.rotary_frequencies(
        300, base=1e300, scaling={"rope_type": "linear", "factor": 1e300}
    )[0],
    "relative_position_buckets": lambda t: fastattn.relative_position_buckets(3, 9, max_distance=2**50),
    **{
        name: functools.partial(call_from, name)
        for name in dir(fastattn.MultiHeadAttention)
        if name.startswith("from_")
    },
}


def storage(name):
    return np.dtype(getattr(pytest.importorskip("ml_dtypes"), name) if name == "bfloat16" else name)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CALLS)
def test_no_floating_point_error_or_warning(name, dtype):
    """Internal under- and overflow does not show, whatever the caller's np.errstate, and np.errstate changes no
    result."""
    dtype = storage(dtype)
    with np.errstate(all="ignore"):
        expected = CALLS[name](dtype)
    with np.errstate(all="raise"):
        result = CALLS[name](dtype)
    with np.errstate(all="warn"), warnings.catch_warnings():
        warnings.simplefilter("error")
        CALLS[name](dtype)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (result, expected)), strict=True):
        for c, d in zip(*(x if isinstance(x, tuple) else (x,) for x in (a, b)), strict=True):
            np.testing.assert_array_equal(c.astype(np.float64), d.astype(np.float64))


def test_the_table_of_calls_has_all_functions():
    named = " ".join(CALLS)
    for name in set(fastattn.__all__) - {
        "cpu_info",
        "show_config",
        "get_include",
        "get_num_threads",
        "set_num_threads",
    }:
        assert name in named, name


OUTS = {
    "attention": "fastattn.dot_product_attention(x, x, x, out=np.empty_like(x))",
    "softmax": "fastattn.softmax(x, out=np.empty_like(x))",
    "rotary": "fastattn.apply_rotary(x, out=np.empty_like(x))",
    "lists": "fastattn.dot_product_attention(x.tolist(), x.tolist(), x.tolist(), key_lengths=[2])",
    "Linear": "fastattn.Linear(x[0])(x, activation='gelu', residual=x, out=np.empty_like(x))",
    "layer_norm": "fastattn.layer_norm(x, residual=x, out=np.empty_like(x))",
    "self_attention": "fastattn.self_attention(x, x[0], x[0], x[0], out=np.empty_like(x))",
    "MultiHeadAttention": "fastattn.MultiHeadAttention(x[0], x[0], x[0], num_heads=1)(x, key_lengths=[2], out=1 * x)",
    "KVCache": "fastattn.KVCache(1, 1, 9, 4).append(x[None], x[None], [2])",
    "KVCache of int8": "fastattn.KVCache(1, 1, 9, 4, dtype='i1', center='mean').append(x[None], x[None], [2])",
    "quantize_kv": "fastattn.quantize_kv(x, x, center='mean').dequantize()",
    "StreamingAttention": "fastattn.StreamingAttention(2, sinks=[0.5]).push(x, x, x)",
    "StreamingMultiHeadAttention": "fastattn.StreamingMultiHeadAttention("
    "fastattn.MultiHeadAttention(x[0], x[0], x[0], num_heads=1), 2).push(x)",
}


@pytest.mark.parametrize("name", OUTS)
def test_a_first_call_imports_nothing(name):
    """In particular not numpy.ma: if it is not loaded, there can be no masked array."""
    fresh_process.run(
        f"""
        import sys
        import numpy as np
        import fastattn
        fastattn.KVCache, fastattn.MultiHeadAttention, fastattn.StreamingAttention, fastattn.Linear
        x = np.ones((1, 4, 4))
        before = set(sys.modules)
        {OUTS[name]}
        assert set(sys.modules) == before, set(sys.modules) - before
        """
    )


# ---------------------------------------------------------------- sums and products out of range


def finfo_of(dtype):
    """NumPy's, or for bfloat16 that of ml_dtypes."""
    try:
        return np.finfo(dtype)
    except ValueError:
        import ml_dtypes

        return ml_dtypes.finfo(dtype)


def largest_values(dtype, keys):
    """Values up to the largest finite number: all equal to it, its negative, of either sign, up to it, and ordinary
    ones."""
    largest = finfo_of(dtype).max
    sign = np.where(np.arange(keys) % 2, 1, -1)
    ramp = np.linspace(-1, 1, keys) if keys > 1 else np.ones(1)
    columns = [np.ones(keys), -np.ones(keys), sign, ramp]
    return np.stack([*(np.asarray(c * float(largest), dtype) for c in columns), np.ones(keys, dtype)], axis=-1)


@pytest.mark.parametrize("dtype", [*DTYPES, *sixteen_bits()])
@pytest.mark.parametrize("keys", [1, 2, 7, 300, 5000])
@pytest.mark.parametrize("queries", [1, 3, 9, 40])
def test_a_mean_is_no_larger_than_its_numbers(rng, queries, keys, dtype):
    query, key, _ = qkv(rng, (), queries, keys, 8, dtype=dtype)
    value = largest_values(dtype, keys)
    largest = float(finfo_of(dtype).max)
    eps = float(max(finfo_of(dtype).eps, np.finfo(np.float64 if dtype == np.float64 else np.float32).eps))
    out, weights, lse = fastattn.dot_product_attention(query, key, value, return_weights=True, return_lse=True)
    assert np.isfinite(out.astype(np.float64)).all()
    quarter = reference.dot_product_attention(query, key, value.astype(np.float64) / largest)
    assert_within(out.astype(np.float64) / largest, quarter, 60 * eps, "a share of the largest number")
    # What does not overflow has the same bits as in a call without what does.
    alone = fastattn.dot_product_attention(query, key, value[:, 4:], return_weights=True, return_lse=True)
    assert bits(out[:, 4:]) == bits(alone[0])
    assert bits(weights) == bits(alone[1])
    assert bits(lse) == bits(alone[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_in_one_row_leaves_the_others_alone(rng, dtype):
    """A row has the bits it has alone, whichever rows of its tile overflow; so do infinite and NaN rows."""
    query, key, value = qkv(rng, (), 40, 90, 8, dtype=dtype)
    value[60:] = np.finfo(dtype).max
    value[50:60, 0] = np.finfo(dtype).smallest_subnormal * 3
    value[80, 1] = np.inf
    mask = rng.random((40, 90)) < 0.5
    mask[::3, 60:] = False
    mask[1::3, 80] = False
    out = fastattn.dot_product_attention(query, key, value, mask=mask)
    for i in range(40):
        rows = np.repeat(query[i : i + 1], 40, axis=0)
        assert bits(fastattn.dot_product_attention(rows, key, value, mask=mask[i])[7]) == bits(out[i])
    assert np.isfinite(out[::3]).all() and np.isfinite(out[1::3]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_score_and_relu(rng, dtype):
    x = rng.standard_normal((2, 30, 8)).astype(dtype)
    value = np.full((2, 30, 3), 0.9 * np.finfo(dtype).max, dtype)
    w = rng.standard_normal(8).astype(dtype)
    window = fastattn.truncated_attention(x, x, value, 3, 3)
    outs = [
        fastattn.additive_attention(x, x, value, w),
        fastattn.bilinear_attention(x, x, value, np.eye(8, dtype=dtype)),
        window,
        fastattn.varlen_attention(x, x, value, [0, 10, 30]),
        fastattn.dot_product_attention(x[:, :1], x, value, sinks=[-9.0]),
        fastattn.dot_product_attention(np.ones_like(x), np.ones_like(x) / 8, value, scale=1.0, activation="relu"),
        fastattn.merge_attention([window] * 3, [np.zeros((2, 30), dtype)] * 3)[0],
    ]
    for out in outs:
        np.testing.assert_allclose(out / value[:, : out.shape[-2]], 1, rtol=1e-2)
    stream = fastattn.StreamingAttention(3, 3)
    streamed = np.concatenate([stream.push(x, x, value), stream.flush()], axis=-2)
    assert bits(streamed) == bits(window)
    # Truly infinite results stay, and so does what is infinite in one part.
    with np.errstate(all="ignore"):
        top = np.full((1, 2, 1), np.finfo(dtype).max, dtype)
        assert fastattn.dot_product_attention(x[:1], x[:1, :2] * 0 + 9, top * 0 + np.inf)[0, 0, 0] == np.inf
        merged = fastattn.merge_attention([top] * 3 + [-top], [np.zeros((1, 2), dtype)] * 4)[0]
        assert np.isfinite(merged).all()
        assert fastattn.merge_attention([top, top * 0 - np.inf], [np.zeros((1, 2), dtype)] * 2)[0].max() == -np.inf


def test_a_split_cache_overflows_no_more_than_a_whole_one(rng):
    """Few queries against many keys, which several threads share."""
    query, key, _ = qkv(rng, (2,), 1, 9000, 64)
    value = np.full((2, 9000, 64), 3e38, np.float32)
    outs = [fastattn.dot_product_attention(query, key, value, num_threads=n) for n in (1, 2, 4)]
    np.testing.assert_allclose(outs[0], 3e38, rtol=1e-5)
    assert len({bits(out) for out in outs}) == 1


@pytest.mark.parametrize("shape", [(1, 5, 3), (2, 300, 64), (8, 70, 5), (20, 300, 64)], ids=str)
@pytest.mark.parametrize("query_exponent", range(-36, 38, 8))
@pytest.mark.parametrize("key_exponent", range(-36, 38, 8))
def test_scores_in_range_of_products_that_are_not(rng, shape, query_exponent, key_exponent):
    """The scale brings scores back to a few units: within the bound, wherever query and key are in float32's range."""
    queries, keys, dim = shape
    query = (rng.choice([-1, 1], (queries, dim)) * rng.uniform(0.5, 1, (queries, dim)) * 10.0**query_exponent).astype(
        "f4"
    )
    key = (rng.choice([-1, 1], (keys, dim)) * rng.uniform(0.5, 1, (keys, dim)) * 10.0**key_exponent).astype("f4")
    value = rng.standard_normal((keys, 5), dtype=np.float32)
    scale = 3 * dim**-0.5 * 10.0 ** -(query_exponent + key_exponent)
    assert_attention(query, key, value, scale=scale)
    assert_attention(query, key, value, scale=-scale, softcap=2.0, alibi_slopes=0.1, sinks=0.5)


def test_scores_in_range_by_hand():
    value = np.array([[1.0], [0.0]], np.float32)
    for dtype in (np.float32, *(t for t in sixteen_bits() if t != np.float16)):
        for q, k, scale in ((1e20, 1e20, 1e-40), (1e-25, 1e-25, 1e50), (1e30, 1e-38, 1e8), (1e38, 1e38, 1e-76)):
            query, key = np.array([[q]], dtype), np.array([[k], [0]], dtype)
            score = float(query[0, 0]) * float(key[0, 0]) * scale
            _, weights = fastattn.dot_product_attention(
                query, key, value.astype(dtype), scale=scale, return_weights=True
            )
            np.testing.assert_allclose(weights[0, 0], 1 / (1 + np.exp(-score)), rtol=1e-6)
    # float64, where the products are beyond its own range.
    query, key = np.array([[1e200]]), np.array([[1e200], [0.0]])
    weights = fastattn.dot_product_attention(query, key, np.eye(2), scale=1e-300 * 1e-100 or 5e-324)
    assert np.isfinite(weights).all()
    weights = fastattn.dot_product_attention(query * 1e-50, key * 1e-50, np.eye(2), scale=1e-300)
    np.testing.assert_allclose(weights[0, 0], 1 / (1 + np.exp(-1)), rtol=1e-14)
    weights = fastattn.dot_product_attention(query * 1e100, key * 1e8, np.eye(2), scale=1e-300)
    np.testing.assert_allclose(weights, [[1, 0]], atol=1e-15)
