"""Attention and layers over keys and values of 8 bits: what they mean, how far that is from float32 under the bounds
that docstrings state, that calls and their parts have the same bits, and errors of made-up keys."""

import numpy as np
import pytest
from problems import bits, sixteen_bits
from test_layer_calls import STEPS, Long
from test_multihead import CUTS, ROLLING, normal, parameters, steps_over

import fastattn
from fastattn import KVCache, _step, quantize_kv, reference

KINDS = {
    "tokens": {},
    "blocks": {"block": 2},
    "centered": {"center": "mean"},
    "both": {"block": 3, "center": "mean"},
    "a center": {"center": np.linspace(-1, 1, 6)},
}


def eight(*sizes, **options):
    return KVCache(*sizes, dtype=np.int8, **options)


def scales_of(cache):
    return {"key_scale": cache.key_scale, "value_scale": cache.value_scale, "key_center": cache.key_center}


def held_in(cache):
    names = "key", "value", "key_scale", "value_scale", "key_center", "lengths", "dropped"
    return [None if (x := getattr(cache, name)) is None else bits(x) for name in names]


# ---------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype", [np.float32, *sixteen_bits()])
@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("center", [None, "mean"])
def test_decoding_over_a_cache(rng, dtype, block, center):
    """A prompt, then token by token, in any dtype: rows of one call of the reference on what is stored."""
    batch, query = (2,), normal(rng, 2, 6, 30, 16, dtype=dtype)
    key, value = normal(rng, 2, 2, 30, 16, dtype=dtype) + dtype(2), normal(rng, 2, 2, 30, 12, dtype=dtype)
    cache, rows, at = eight(batch, 2, 30, 16, 12, block=block, center=center), [], 0
    for n in (7, 1, 1, 4, *17 * [1]):
        cache.append(key[..., at : at + n, :], value[..., at : at + n, :])
        out = fastattn.dot_product_attention(
            query[..., at : at + n, :],
            cache.key,
            cache.value,
            **scales_of(cache),
            is_causal=True,
            key_lengths=cache.lengths,
            enable_gqa=True,
        )
        assert out.dtype == dtype
        rows.append(out.astype(float))
        at += n
    expected = reference.dot_product_attention(
        query, cache.key, cache.value, **scales_of(cache), is_causal=True, enable_gqa=True
    )
    tolerance = 2e-5 if dtype == np.float32 else 2e-2
    np.testing.assert_allclose(np.concatenate(rows, axis=-2), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_errors_are_within_the_documented_bounds(rng, options):
    """Scores: scale * |query|_1 * key_scale / 2 each; values: value_scale / 2; and what such scores do to weights."""
    query, key, value = normal(rng, 4, 50, 6), 2 * normal(rng, 4, 300, 6) + 3, normal(rng, 4, 300, 6)
    quantized = quantize_kv(key, value, **options)
    out, weights, lse = fastattn.dot_product_attention(
        query, **quantized._asdict(), return_weights=True, return_lse=True
    )
    exact, its_weights, its_lse = reference.dot_product_attention(
        query, key, value, return_weights=True, return_lse=True
    )
    key_scale = np.repeat(quantized.key_scale, 6 // quantized.key_scale.shape[-1], axis=-1)
    off = abs(query) @ key_scale.swapaxes(-1, -2) / 2 / np.sqrt(6)
    rounding = 1e-5
    most = off.max(-1)
    assert (abs(lse - its_lse) <= most + rounding).all()
    # A weight is e^score over a sum of such: each of them is off by a factor of at most e^most.
    assert (abs(weights - its_weights) <= np.expm1(off + most[..., None]) * its_weights + rounding).all()
    share = np.minimum(np.expm1(2 * most), 2)[..., None] * abs(value).max(-2, keepdims=True)
    assert (abs(out - exact) <= share + quantized.value_scale.max() / 2 + rounding).all()


# ------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, *sixteen_bits()])
@pytest.mark.parametrize("kind", STEPS)
def test_a_step_is_a_call(rng, kind, dtype, options, window, ragged):
    """The short way of a step has the bits of the long one, in results and cache."""
    given, rules = STEPS[kind]
    if options.get("block") and given.get("value_dim"):
        options = {**options, "block": 1}
    layer = fastattn.MultiHeadAttention(
        **{name: x.astype(dtype) if isinstance(x, np.ndarray) else x for name, x in parameters(rng, **given).items()}
    )
    sizes = ((3,), layer.num_kv_heads, 17, layer.head_dim, layer.value_dim)
    caches = [eight(*sizes, window=window, **options) for _ in range(2)]
    x = normal(rng, 3, 24, 24).astype(dtype)
    at = 0
    for n in (5, 1, 1, 3, 1, 1, 2, 1, 1, 1) + (1,) * 7 * (window is not None):
        more = {"query_lengths": [5, 2, 0]} if ragged and at == 0 else {}
        tokens = np.ascontiguousarray(x[:, at : at + n])
        out = layer(tokens, cache=caches[0], **rules, **more)
        with Long():
            expected = layer(tokens, cache=caches[1], **rules, **more)
        assert bits(out) == bits(expected) and out.dtype == expected.dtype == dtype
        assert held_in(caches[0]) == held_in(caches[1])
        at += n


def test_steps_are_taken_the_short_way(rng):
    """All but the first, which says what the mean is."""
    layer, x = fastattn.MultiHeadAttention(**parameters(rng, rotary_base=100.0)), normal(rng, 2, 1, 24)
    for options in KINDS.values():
        cache = eight(2, 4, 9, 6, **options)
        first = _step.step(layer, x, cache, {"is_causal": True})
        assert (first is None) == (options.get("center") is not None and isinstance(options["center"], str))
        layer(x, cache=cache)
        for _ in range(3):
            assert _step.step(layer, x, cache, {"is_causal": True}) is not None
        assert cache.lengths.ravel().tolist() == 2 * [4 + (first is not None)]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("rules", [rules for rules, _ in ROLLING.values()], ids=ROLLING)
def test_the_reference_takes_a_rolling_cache_of_8_bits(rng, rules, options):
    """More tokens than fit, fewer, none; columns of weights and biases; layers in float64, whose keys round alike."""
    given = parameters(rng, num_kv_heads=2, dtype=np.float64, rotary_base=100.0)
    if "relative_bias" not in rules:
        rules = {**rules, "bias": np.linspace(-1, 1, 4).reshape(4, 1, 1)}
    caches = [eight(2, 2, 9, 6, window=8, **options) for _ in range(2)]
    for n, counts in ((5, [5, 2]), (3, [0, 3]), (17, [17, 4]), (1, None), (2, 2), (12, [2, 12])):
        x = normal(rng, 2, n, 24, dtype=np.float64)
        ours, theirs = (
            module.MultiHeadAttention(**given)(
                x, cache=cache, query_lengths=counts, is_causal=True, return_weights=True, return_lse=True, **rules
            )
            for module, cache in zip((fastattn, reference), caches, strict=True)
        )
        assert ours[0].dtype == np.float64 and ours[1].dtype == ours[2].dtype == np.float32
        for got, want in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
        assert [x for x in held_in(caches[0])[:2]] == [x for x in held_in(caches[1])[:2]]


@pytest.mark.parametrize("capacity", [8, 9, 16, 30])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("rotary", [{}, {"rotary_base": 30.0}], ids=["plain", "rotary"])
@pytest.mark.parametrize(("rules", "whole"), ROLLING.values(), ids=ROLLING)
def test_a_rolling_cache_is_one_call(rng, rules, whole, rotary, cuts, capacity):
    """However tokens are split, with a center that does not depend on it: one call over a cache with room for all."""
    given = parameters(rng, num_kv_heads=2, value_dim=5, dtype=np.float64, **rotary)
    layer, x = fastattn.MultiHeadAttention(**given), normal(rng, 3, 40, 24, dtype=np.float64)
    center = normal(rng, 2, 1, 6)
    expected, lse = layer(
        x, cache=eight(3, 2, 40, 6, 5, center=center), is_causal=True, return_lse=True, **rules, **whole
    )
    cache = eight(3, 2, capacity, 6, 5, window=8, center=center)
    for start, counts, _, (out, own) in steps_over(layer, cache, x, cuts, return_lse=True, **rules):
        for b, (at, n) in enumerate(zip(start, counts, strict=True)):
            np.testing.assert_allclose(out[b, :n], expected[b, at : at + n], rtol=2e-5, atol=2e-5)
            np.testing.assert_allclose(own[b, :, :n], lse[b, :, at : at + n], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"center": "mean"}, {"block": 2, "center": "mean"}], ids=str)
def test_bits_are_those_of_a_sequence_alone(rng, options):
    """From the projections on, which are exact here; each sequence has a mean of its own."""
    layer, x = fastattn.MultiHeadAttention(*3 * [np.eye(8, dtype=np.float32)], num_heads=2), normal(rng, 3, 40, 8) + 1
    cache = eight(3, 2, 10, 4, window=6, **options)
    alone = [eight((), 2, 10, 4, window=6, **options) for _ in range(3)]
    for start, counts, _, out in steps_over(layer, cache, x, CUTS["ragged"]):
        for b, (at, n) in enumerate(zip(start, counts, strict=True)):
            rows = np.full((len(out[b]), 8), np.nan, np.float32)
            rows[:n] = x[b, at : at + n]
            assert bits(layer(rows, cache=alone[b], query_lengths=int(n), is_causal=True)) == bits(out[b])


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_weights_of_some_heads(rng, options):
    layer = fastattn.MultiHeadAttention(**parameters(rng, num_kv_heads=2))
    x, caches = normal(rng, 2, 9, 24), [eight(2, 2, 20, 6, **options) for _ in range(2)]
    for n in (9, 3):
        out, weights = layer(x[:, :n], cache=caches[0], is_causal=True, return_weights=True)
        same, some = layer(x[:, :n], cache=caches[1], is_causal=True, return_weights=[3, 0])
        assert bits(out) == bits(same) and bits(some) == bits(weights[:, [3, 0]])


def test_near_the_float32_cache(rng):
    """A prompt and steps, keys with a large mean in a channel that hardly turns: errors of 8 bits, smaller with a
    center."""
    given = parameters(rng, rotary_base=1e6, d_out=None)
    given["b_key"] = given["b_key"] + np.float32(12) * (np.arange(24) % 6 == 2).astype(np.float32)
    layer, x, found = fastattn.MultiHeadAttention(**given), normal(rng, 2, 200, 24), {}
    for name in ("float32", "tokens", "centered", "both"):
        cache = KVCache(2, 4, 200, 6) if name == "float32" else eight(2, 4, 200, 6, **KINDS[name])
        parts = [layer(x[:, a:b], cache=cache, is_causal=True) for a, b in ((0, 150), (150, 151), (151, 200))]
        found[name] = np.concatenate(parts, axis=1)
    exact = found.pop("float32")
    errors = {name: np.sqrt(np.mean((out - exact) ** 2) / np.mean(exact**2)) for name, out in found.items()}
    assert 0 < errors["both"] < 1.2 * errors["centered"] < 0.02, errors
    assert errors["centered"] < errors["tokens"] / 1.5 < 0.05, errors


BAD = {
    "nan": (np.nan, r"^the projected key\[1, 0, 1, 0\] is nan: only finite numbers can be quantized"),
    "inf": (np.inf, r"^the projected key\[1, 0, 1, 0\] is (inf|nan)"),
}


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("number, message", BAD.values(), ids=BAD)
def test_what_cannot_be_quantized_is_not_appended(rng, number, message, options, window):
    layer, x = fastattn.MultiHeadAttention(**parameters(rng)), normal(rng, 2, 6, 24)
    cache = eight(2, 4, 7, 6, window=window, **options)
    layer(x[:, :4], cache=cache)
    bad = x[:, :2].copy()
    bad[1, 1] = number
    before = held_in(cache)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            layer(bad, cache=cache)
        assert held_in(cache) == before
        with Long(), pytest.raises(ValueError, match=message):
            layer(bad, cache=cache)
        assert held_in(cache) == before
    layer(bad, cache=cache, query_lengths=[2, 1])  # padding
    assert cache.lengths.ravel().tolist() == [6, 5]


def test_scales_are_the_caches_own_affair(rng):
    """They are no rules of a layer."""
    layer, cache = fastattn.MultiHeadAttention(**parameters(rng)), eight(2, 4, 9, 6)
    for name in ("key_scale", "value_scale", "key_center"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            layer(normal(rng, 2, 3, 24), cache=cache, **{name: 1.0})
    assert not cache.lengths.any()


# ----------------------------------------------------------------------------------------- made-up keys

# Relative rms of the output, total variation of the weights: 4096 tokens, 128 channels, of which 4 have this mean. The
# figures of the table in docs/notebook/27-eight-bits.md, with room for other random numbers.
MADE_UP = {
    "float16": {0: (5e-4, 2e-4), 8: (7e-4, 3e-4), 30: (1.4e-3, 6e-4)},
    "tokens": {0: (1.2e-2, 3.5e-3), 8: (3e-2, 1.1e-2), 30: (9e-2, 3.7e-2)},
    "centered": {0: (1.2e-2, 3.5e-3), 8: (1.2e-2, 3.5e-3), 30: (1.2e-2, 3.5e-3)},
    "blocks": {0: (1e-2, 3e-3), 8: (2e-2, 7e-3), 30: (6e-2, 2.5e-2)},
    "centered blocks": {0: (1e-2, 3e-3), 8: (1e-2, 3e-3), 30: (1e-2, 3e-3)},
}
SCHEMES = {
    "tokens": {},
    "centered": {"center": "mean"},
    "blocks": {"block": 32, "scale_dtype": np.float16},
    "centered blocks": {"block": 32, "center": "mean"},
}


@pytest.mark.parametrize("mean", [0, 8, 30])
def test_errors_of_made_up_keys(rng, mean):
    """A scale for each token is enough if keys are centered, whatever their mean."""
    query, key, value = 1.1 * normal(rng, 32, 128), normal(rng, 4096, 128), normal(rng, 4096, 128)
    key[:, :4] += np.float32(mean) * np.float32([1, -1, 1, -1])
    exact, weights = reference.dot_product_attention(query, key, value, return_weights=True)
    assert 1000 < np.mean(1 / np.sum(weights**2, axis=-1)) < 1500, "keys that count"

    def errors(*arguments, **scales):
        out, its_weights = fastattn.dot_product_attention(query, *arguments, **scales, return_weights=True)
        rms = np.sqrt(np.mean((out - exact) ** 2) / np.mean(exact**2))
        return rms, np.mean(np.sum(abs(its_weights - weights), axis=-1)) / 2

    found = {name: errors(**quantize_kv(key, value, **options)._asdict()) for name, options in SCHEMES.items()}
    found["float16"] = errors(key.astype(np.float16), value.astype(np.float16))
    for name, (rms, variation) in found.items():
        most = MADE_UP[name][mean]
        assert most[0] / 3 < rms < most[0] and most[1] / 3 < variation < most[1], (name, rms, variation)
