"""int8 keys and values with scales in attention: exact about what is stored, that is, within the bounds of float32
arrays of the float64 result for ``key * key_scale + key_center`` and ``value * value_scale``.

A scale may belong to a token, a channel, a block of channels or all; decode and prefill treat each differently (who
multiplies: kernels/scales.inc.h). test_quantized.py is about how numbers become int8, test_eight_bits.py about caches
and layers.
"""

import tracemalloc

import numpy as np
import pytest
from problems import RULES, bits, layouts, rules, sixteen_bits
from tolerances import assert_within, attention_bounds

import fastattn
from fastattn import reference

FORMS = ("token", "channel", "number", "blocks")
# One query, some (decode), heads that share keys, and many (prefill); odd sizes, whole vectors, several spans.
SHAPES = {
    "one": (1, 300, 64, 64, 1),
    "one of four heads": (1, 2500, 32, 48, 4),
    "three of two heads": (3, 300, 80, 96, 2),
    "eight of two heads": (8, 600, 64, 32, 2),
    "odd": (2, 77, 20, 12, 1),
    "many": (300, 520, 32, 20, 1),
    "narrow": (1, 5, 8, 8, 1),
}


def integers(rng, *shape):
    """All of int8, -128 included: other programs write it."""
    return rng.integers(-128, 128, shape).astype(np.int8)


def scales(rng, form, like, dtype=np.float32):
    *batch, tokens, channels = like.shape
    shape = {
        "token": (*batch, tokens, 1),
        "channel": (*batch[-1:], 1, channels),
        "number": (),
        "blocks": (*batch, tokens, 4),
    }[form]
    return rng.uniform(0.002, 0.02, shape).astype(dtype) if shape else float(rng.uniform(0.002, 0.02))


def problem(rng, shape, key_form, value_form, center, dtype=np.float32, scale_dtype=np.float32, batch=(2, 2)):
    num_queries, num_keys, head_dim, value_dim, group = SHAPES[shape]
    query = rng.standard_normal((*batch[:-1], batch[-1] * group, num_queries, head_dim)).astype(dtype)
    key, value = integers(rng, *batch, num_keys, head_dim), integers(rng, *batch, num_keys, value_dim)
    stored = {
        "key_scale": scales(rng, key_form, key, scale_dtype),
        "value_scale": scales(rng, value_form, value, scale_dtype),
    }
    if center:
        stored["key_center"] = rng.normal(size=(batch[-1], 1, head_dim)).astype(scale_dtype)
    return (query, key, value), stored


def meant(key, value, stored):
    return (
        reference.dequantized(key, stored["key_scale"], stored.get("key_center")),
        reference.dequantized(value, stored["value_scale"]),
    )


def assert_stored(arrays, stored, **arguments):
    """The results are those for the numbers that are meant."""
    query, key, value = arrays
    wide = meant(key, value, stored)
    returned = {"return_weights": True}
    if arguments.get("activation", "softmax") == "softmax":
        returned["return_lse"] = True
    expected = reference.dot_product_attention(query, *wide, **arguments, **returned)
    actual = fastattn.dot_product_attention(*arrays, **stored, **arguments, **returned)
    assert actual[0].dtype == query.dtype
    narrow = (x.astype(np.float32) for x in wide)
    bounds = attention_bounds("dot_product_attention", query, *narrow, *expected[:2], (*expected, None)[2], **arguments)
    # Twice for the products with scales, which are rounded too; and twice for the centre: a score is the sum of its
    # part and that of the numbers, each of which may be larger than what is meant.
    for what, got, wanted, bound in zip(("out", "weights", "lse"), actual, expected, bounds, strict=False):
        assert_within(got, wanted, 4 * bound, what)
    alone = fastattn.dot_product_attention(*arrays, **stored, **arguments)
    assert bits(alone) == bits(actual[0])
    return alone


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("value_form", FORMS)
@pytest.mark.parametrize("key_form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forms_of_scales(rng, shape, key_form, value_form, center):
    arrays, stored = problem(rng, shape, key_form, value_form, center)
    assert_stored(arrays, stored, enable_gqa=True)
    assert_stored(arrays, stored, enable_gqa=True, is_causal=True, key_lengths=np.array([[3], [5]]))


@pytest.mark.parametrize("dtype", [np.float32, *sixteen_bits()])
@pytest.mark.parametrize("scale_dtype", [np.float32, *sixteen_bits()])
@pytest.mark.parametrize("shape", ["one", "odd", "many"])
def test_dtypes(rng, shape, scale_dtype, dtype):
    for form in FORMS:
        arrays, stored = problem(rng, shape, form, form, True, dtype, scale_dtype)
        out = fastattn.dot_product_attention(*arrays, **stored)
        assert out.dtype == dtype
        same = fastattn.dot_product_attention(arrays[0].astype(np.float32), *arrays[1:], **stored)
        assert bits(out) == bits(same.astype(dtype))


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("num_queries", [2, 20])
@pytest.mark.parametrize("rule", RULES)
def test_rules(rng, rule, num_queries, center):
    chosen = rules(rng, (2, 3), num_queries, 70)[rule]
    for form in FORMS:
        query = rng.standard_normal((2, 3, num_queries, 16)).astype(np.float32)
        key, value = integers(rng, 2, 3, 70, 16), integers(rng, 2, 3, 70, 16)
        stored = {"key_scale": scales(rng, form, key), "value_scale": scales(rng, form, value)}
        if center:
            stored["key_center"] = rng.normal(size=(3, 1, 16)).astype(np.float32)
        assert_stored((query, key, value), stored, **chosen)


@pytest.mark.parametrize("activation", ["softmax", "relu", "sigmoid", "sparsemax", "entmax15"])
@pytest.mark.parametrize("shape", ["one", "three of two heads", "many"])
def test_activations(rng, shape, activation):
    for form in FORMS:
        arrays, stored = problem(rng, shape, form, form, True)
        assert_stored(arrays, stored, enable_gqa=True, activation=activation)


@pytest.mark.parametrize("shape", ["one", "eight of two heads", "many"])
@pytest.mark.parametrize("form", FORMS)
def test_same_bits(rng, form, shape):
    """Whatever the strides, the threads, the batch and the padding."""
    (query, key, value), stored = problem(rng, shape, form, form, True)
    out = fastattn.dot_product_attention(query, key, value, **stored, enable_gqa=True, num_threads=1)
    for (_, a), (_, b) in zip(layouts(key), layouts(value), strict=True):
        same = fastattn.dot_product_attention(query, a, b, **stored, enable_gqa=True, num_threads=3)
        assert bits(same) == bits(out)
    for head in range(key.shape[1]):
        group = query.shape[1] // key.shape[1]
        own = {
            name: x[1:2, head : head + 1] if np.ndim(x) == 4 else x[head : head + 1] if np.ndim(x) == 3 else x
            for name, x in stored.items()
        }
        alone = fastattn.dot_product_attention(
            query[1:2, head * group : (head + 1) * group], key[1:2, head : head + 1], value[1:2, head : head + 1],
            **own, enable_gqa=True,
        )  # fmt: skip
        assert bits(alone) == bits(out[1:2, head * group : (head + 1) * group])
    more = {
        name: np.concatenate([x, np.full_like(x[..., :9, :], np.nan)], -2) if np.ndim(x) == 4 else x
        for name, x in stored.items()
    }
    padded = (np.concatenate([x, integers(rng, *x.shape[:-2], 9, x.shape[-1])], -2) for x in (key, value))
    same = fastattn.dot_product_attention(query, *padded, **more, enable_gqa=True, key_lengths=key.shape[-2])
    assert bits(same) == bits(out)


@pytest.mark.parametrize("num_queries", [1, 40])
@pytest.mark.parametrize("form", ["token", "blocks"])
@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_scales_of_hidden_keys(rng, special, form, num_queries):
    """No NaN or infinity of a key that a query does not see reaches its output; one that it sees does."""
    query = rng.standard_normal((num_queries, 32)).astype(np.float32)
    key, value = integers(rng, 300, 32) | np.int8(1), integers(rng, 300, 32) | np.int8(1)
    stored = {"key_scale": scales(rng, form, key), "value_scale": scales(rng, form, value)}
    seen = rng.random(300) < 0.5
    out = fastattn.dot_product_attention(query, key, value, **stored, mask=seen)
    for name in stored:
        spoilt = {**stored, name: np.where(seen[:, None], stored[name], np.float32(special))}
        assert bits(fastattn.dot_product_attention(query, key, value, **spoilt, mask=seen)) == bits(out)
        spoilt[name][np.flatnonzero(seen)[0]] = np.nan
        assert np.isnan(fastattn.dot_product_attention(query, key, value, **spoilt, mask=seen)).any()


def test_the_center_of_a_row_that_sees_nothing(rng):
    arrays, stored = problem(rng, "odd", "token", "token", True)
    out, lse = fastattn.dot_product_attention(*arrays, **stored, key_lengths=0, return_lse=True)
    assert not out.any()
    assert (lse == -np.inf).all()
    _, lse = fastattn.dot_product_attention(*arrays, **stored, key_lengths=0, sinks=0.1, return_lse=True)
    assert (lse == np.float32(0.1)).all()


def test_truncated_attention(rng):
    arrays, stored = problem(rng, "many", "token", "channel", True)
    out = fastattn.truncated_attention(*arrays, 20, 3, **stored)
    same = fastattn.dot_product_attention(*arrays, **stored, window_size=(20, 3))
    assert bits(out) == bits(same)


def test_memory(rng):
    """Neither a float32 query over a smaller cache nor scales make a copy of it."""
    query = rng.standard_normal((1, 8, 1, 64)).astype(np.float32)
    key, value = integers(rng, 1, 8, 20_000, 64), integers(rng, 1, 8, 20_000, 64)
    stored = {"key_scale": scales(rng, "token", key), "value_scale": scales(rng, "token", value)}
    calls = [lambda: fastattn.dot_product_attention(query, key, value, **stored)]
    for dtype in sixteen_bits():
        narrow = key.astype(dtype), value.astype(dtype)
        calls.append(lambda narrow=narrow: fastattn.dot_product_attention(query, *narrow))
    for call in calls:
        call()
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000


KEY, VALUE, QUERY = np.ones((2, 6, 8), np.int8), np.ones((2, 6, 4), np.int8), np.ones((2, 3, 8), np.float32)


@pytest.mark.parametrize(("error", "words", "arrays", "arguments"), [
    (ValueError, ["value_scale is missing"], {}, {"value_scale": None}),
    (ValueError, ["key_scale is missing"], {}, {"key_scale": None}),
    (ValueError, ["key_scale is missing"], {}, {"key_scale": None, "value_scale": None, "key_center": np.ones(8)}),
    (TypeError, ["for int8", "key has dtype float32"], {"key": KEY.astype(np.float32)}, {}),
    (TypeError, ["for int8", "value has dtype int16"], {"value": VALUE.astype(np.int16)}, {}),
    (TypeError, ["for int8", "key has dtype uint8"], {"key": KEY.astype(np.uint8)}, {}),
    (TypeError, ["query has dtype float64"], {"query": QUERY.astype(np.float64)}, {}),
    (TypeError, ["query has dtype int64"], {"query": QUERY.astype(np.int64)}, {}),
    (TypeError, ["key_scale must be float32"], {}, {"key_scale": np.ones((2, 6, 1))}),
    (ValueError, ["key_scale has shape (2, 5, 1)", "(..., 6, 1)", "(..., 1, 8)", "(..., 6, n)"], {},
     {"key_scale": np.ones((2, 5, 1), np.float32)}),
    (ValueError, ["value_scale has shape (6, 3)"], {}, {"value_scale": np.ones((6, 3), np.float32)}),
    (ValueError, ["batch axes of key_scale (3, 6, 1)"], {}, {"key_scale": np.ones((3, 6, 1), np.float32)}),
    (ValueError, ["key_center has shape (7,)", "(8,)"], {}, {"key_center": np.ones(7, np.float32)}),
    (ValueError, ["key_center must be finite"], {}, {"key_center": np.full(8, np.nan, np.float32)}),
])  # fmt: skip
def test_errors(error, words, arrays, arguments):
    given = {"query": QUERY, "key": KEY, "value": VALUE, **arrays}
    out = np.full((2, 3, 4), 7, np.float32)
    with pytest.raises(error) as caught:
        fastattn.dot_product_attention(**given, **{"key_scale": 1.0, "value_scale": 1.0, **arguments}, out=out)
    assert all(word in str(caught.value) for word in words), caught.value
    assert (out == 7).all()


def test_int8_without_scales_are_integers():
    out = fastattn.dot_product_attention(QUERY, KEY, VALUE)
    assert out.dtype == np.float64


def test_out_must_not_overlap_the_scales():
    scale = np.ones((2, 3, 4), np.float32)
    with pytest.raises(ValueError, match="key_scale"):
        fastattn.dot_product_attention(
            QUERY, KEY[:, :3], VALUE[:, :3], key_scale=scale[..., :1], value_scale=1.0, out=scale
        )
