"""MultiHeadAttention and self_attention: against the reference, against PyTorch if installed, and step by step."""

import copy
import inspect
import math
import pickle
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPES, RULES, bits, layouts, rules, sixteen_bits
from tolerances import (
    SCORES,
    absolute,
    accumulation_dtype,
    assert_within,
    attention_bounds,
    largest_seen,
    result_dtype,
    storage_steps,
)

import fastattn
from fastattn import KVCache, reference
from fastattn._rules import HELD_RULES

MATRICES = ("w_query", "w_key", "w_value", "w_out")
BIASES = ("b_query", "b_key", "b_value", "b_out")


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def parameters(
    rng, d_model=24, num_heads=4, head_dim=6, *, num_kv_heads=None, value_dim=None, d_context=None, d_out=10,
    biases=True, dtype=np.float32, **rotary,
):  # fmt: skip
    """The arguments of a layer: normal numbers, projections that preserve their size."""
    kv_heads = num_kv_heads or num_heads
    value_dim, d_context = value_dim or head_dim, d_context or d_model
    shapes = {
        "w_query": (d_model, num_heads * head_dim),
        "w_key": (d_context, kv_heads * head_dim),
        "w_value": (d_context, kv_heads * value_dim),
        "w_out": (num_heads * value_dim, d_out),
    }
    if d_out is None:
        del shapes["w_out"]
    weights = {name: normal(rng, *shape) / shape[0] ** 0.5 for name, shape in shapes.items()}
    if biases:
        weights |= {f"b{name[1:]}": normal(rng, shape[1]) for name, shape in shapes.items()}
    weights = {name: w.astype(dtype) for name, w in weights.items()}
    return weights | {"num_heads": num_heads, "num_kv_heads": num_kv_heads} | rotary


def without_heads(arguments):
    """Rules for batch axes (B, heads), with lengths and offsets for (B,)."""
    per_sequence = ("query_offset", "key_lengths", "query_lengths")
    return {name: x[..., 0] if name in per_sequence and np.ndim(x) else x for name, x in arguments.items()}


# ---------------------------------------------------------------------------------------------- the bounds


def projected_scores_and_sizes(query, key, eps, *, query_size, key_size, scale=None):
    """As `bilinear_scores_and_sizes`: absolute values of all terms, through both projections and their product."""
    size = reference.dot_scores(query_size, key_size, None if scale is None else abs(float(scale)))
    return reference.dot_scores(query, key, scale), size


SCORES["projected"] = projected_scores_and_sizes, ("query_size", "key_size", "scale")


def turned(size, rotary_base, rotary_frequencies, rotary_interleaved, rotary_dim):
    """Sizes after a rotation, which adds both channels of a pair, with roundings for the sine, the product and the
    sum."""
    if rotary_base is None and rotary_frequencies is None:
        return size
    factor = 1 if rotary_frequencies is None else rotary_frequencies[1]
    dim = size.shape[-1] if rotary_dim is None else rotary_dim
    first, second = slice(0, dim // 2), slice(dim // 2, dim)
    if rotary_interleaved:
        first, second = slice(0, dim, 2), slice(1, dim, 2)
    result = size.copy()
    result[..., first] = result[..., second] = 2 * factor * (size[..., first] + size[..., second])
    return result


def normed(raw, size, weight, eps):
    """The heads after their norm, and the size of their terms: an error of a channel also goes, as a part of the root,
    into all others; the mean of squares, the root and two products round."""
    if weight is None:
        return raw, size
    root = np.sqrt(np.mean(raw * raw, axis=-1, keepdims=True) + eps)
    unit, weight = raw / root, np.asarray(weight, np.float64)
    passed = (size + np.abs(unit) * np.mean(np.abs(unit) * size, axis=-1, keepdims=True)) / root
    return unit * weight, np.abs(weight) * (passed + (raw.shape[-1] / 2 + 8) * np.abs(unit))


def bounds(given, x, context, heads, out, weights, lse, dtype, **arguments):
    """The bounds for (out, weights, lse) of a layer: the promise of attention, carried through the projections.

    A projection is off by an eps of the absolute values of its terms. For query and key that goes into the size of the
    scores. The error of a value is passed on unchanged, and the error of attention is proportional to the largest
    value. The last product multiplies the errors of the heads by its absolute values, and adds its own.
    """
    eps = float(np.finfo(accumulation_dtype(dtype)).eps) * (2 if dtype == np.float64 else 1)
    num_heads, kv_heads = given["num_heads"], given["num_kv_heads"] or given["num_heads"]
    rotary = [given.get(name) for name in ("rotary_base", "rotary_frequencies", "rotary_interleaved", "rotary_dim")]

    def split(function, x, which, count):
        return reference.split_heads(function(x, given[f"w_{which}"], given.get(f"b_{which}")), count)

    if context is None:
        arguments.setdefault("query_lengths", arguments.get("key_lengths"))
    x, context = (np.asarray(a, dtype=np.float64) for a in (x, x if context is None else context))
    arrays = []
    for function in (reference.project, absolute):
        q, k, v = split(function, x, "query", num_heads), split(function, context, "key", kv_heads), None
        v = split(function, context, "value", kv_heads)
        arrays.append((q, *reference.repeat_heads(q, k, v)))
    (query, key, _), (query_size, key_size, value_size) = arrays
    norm_eps = given.get("norm_eps", 1e-6)
    query, query_size = normed(query, query_size, given.get("q_norm"), norm_eps)
    key, key_size = normed(key, key_size, given.get("k_norm"), norm_eps)
    for name in ("query_offset", "key_lengths", "query_lengths"):
        if np.ndim(arguments.get(name)):
            arguments[name] = np.asarray(arguments[name])[..., None]
    arguments |= {"query_size": turned(query_size, *rotary), "key_size": turned(key_size, *rotary)}
    if rotary[:2] != [None, None] and arguments.get("softcap") is not None:
        raise NotImplementedError("the slope of the cap would need the rotated scores")
    kind = accumulation_dtype(dtype)
    head_bound, weight_bound, lse_bound = attention_bounds(
        "projected", query.astype(kind), key.astype(kind), value_size.astype(kind), heads, weights, lse, **arguments
    )
    seen = largest_seen(np.broadcast_to(value_size, (*weights.shape[:-2], *value_size.shape[-2:])), weights != 0)
    head_bound = head_bound + eps * seen * np.sum(weights, axis=-1, keepdims=True)
    bound, size = reference.join_heads(head_bound), reference.join_heads(np.abs(heads))
    if "w_out" in given:
        bound = absolute(bound, given["w_out"]) + eps * absolute(size, given["w_out"], given.get("b_out"))
    storage, step = (x / 2 for x in storage_steps(dtype))
    return bound + storage * np.abs(out) + step, weight_bound, lse_bound


def held_by(given, rules):
    """The rules that a layer holds and that these are not."""
    return {name: given[name] for name in HELD_RULES if name in given and name not in rules}


def assert_layer(given, x, context=None, *, layer=None, **arguments):
    """Call a layer with and without its extra results; compare everything with the reference. Returns the output.

    layer: replaces the library's, so that a test can show that a wrong one is detected.
    """
    layer = layer or fastattn.MultiHeadAttention(**given)
    theory = reference.MultiHeadAttention(**given)
    heads_only = {name: w for name, w in given.items() if name not in ("w_out", "b_out")}
    rest = {name: a for name, a in arguments.items() if name not in ("out", "num_threads")}
    with_lse = arguments.get("activation", "softmax") == "softmax"
    extras = {"return_weights": True, "return_lse": with_lse}
    expected = theory(x, context, **rest, **extras)
    heads = reference.MultiHeadAttention(**heads_only)(x, context, **rest)
    heads = reference.split_heads(heads, given["num_heads"])
    lse = expected[2] if with_lse else None
    dtype = result_dtype(x, *([] if context is None else [context]), *(given[w] for w in MATRICES if w in given))
    limits = bounds(given, x, context, heads, *expected[:2], lse, dtype, **held_by(given, rest), **rest)

    plain = layer(x, context, **arguments)
    assert isinstance(plain, np.ndarray)
    assert plain.dtype == dtype
    assert_within(plain, expected[0], limits[0], "output")
    results = layer(x, context, **arguments, **extras)
    assert len(results) == 2 + with_lse
    for got, want, limit, what in zip(results, expected, limits, ("output", "weights", "lse"), strict=False):
        assert_within(got, want, limit, f"{what} beside others")
        assert got.dtype == (dtype if what == "output" else accumulation_dtype(dtype))
    return plain


# ------------------------------------------------------------------------------------ what it is, by hand


def test_the_formula(rng):
    """Written out with einsum, one index each: tokens l and s, channels d and e, heads h, output channels n."""
    x, context = normal(rng, 2, 5, 8, dtype=np.float64), normal(rng, 2, 7, 6, dtype=np.float64)
    w_query, w_key, w_value = (normal(rng, n, 3, m, dtype=np.float64) for n, m in ((8, 4), (6, 4), (6, 5)))
    w_out = normal(rng, 3, 5, 9, dtype=np.float64)
    b_query, b_key, b_value, b_out = (normal(rng, *shape, dtype=np.float64) for shape in ((3, 4), (3, 4), (3, 5), (9,)))
    query = np.einsum("blc,chd->bhld", x, w_query) + b_query[:, None]
    key = np.einsum("bsc,chd->bhsd", context, w_key) + b_key[:, None]
    value = np.einsum("bsc,che->bhse", context, w_value) + b_value[:, None]
    weights = np.exp(np.einsum("bhld,bhsd->bhls", query, key) / 2)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhls,bhse,hen->bln", weights, value, w_out) + b_out
    layer = fastattn.MultiHeadAttention(
        w_query.reshape(8, 12), w_key.reshape(6, 12), w_value.reshape(6, 15), w_out.reshape(15, 9), num_heads=3,
        b_query=b_query.ravel(), b_key=b_key.ravel(), b_value=b_value.ravel(), b_out=b_out,
    )  # fmt: skip
    out, got = layer(x, context, return_weights=True)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got, weights, rtol=1e-12)


def test_signatures_are_those_of_the_reference():
    ours = inspect.signature(fastattn.MultiHeadAttention.__call__).parameters
    theirs = inspect.signature(reference.MultiHeadAttention.__call__).parameters
    ours, theirs = ([(p.kind, p.name, repr(p.default)) for p in each.values()] for each in (ours, theirs))
    assert ours[:3] == theirs[:3]
    assert {name: default for _, name, default in ours} == {name: default for _, name, default in theirs}


def test_attributes(rng):
    given = parameters(rng, 24, 4, 6, num_kv_heads=2, value_dim=5, d_context=20, d_out=7)
    layer = fastattn.MultiHeadAttention(**given)
    for name in (*MATRICES, *BIASES):
        np.testing.assert_array_equal(getattr(layer, name), given[name])
        assert not getattr(layer, name).flags.writeable
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.value_dim) == (4, 2, 6, 5)
    assert (layer.d_model, layer.d_context, layer.d_out, layer.dtype) == (24, 20, 7, np.float32)
    bare = fastattn.MultiHeadAttention(*(given[name] for name in MATRICES[:3]), num_heads=4, num_kv_heads=2)
    assert (bare.w_out, bare.b_query, bare.b_key, bare.b_value, bare.b_out) == 5 * (None,)
    assert bare.d_out == 20
    one = fastattn.MultiHeadAttention(**{**parameters(rng), "b_query": None, "b_value": None})
    assert one.b_query is one.b_value is None and one.b_key.shape == (24,)


def test_weights_are_copied(rng):
    given = parameters(rng)
    layer, x = fastattn.MultiHeadAttention(**given), normal(rng, 3, 24)
    before = layer(x)
    for name in (*MATRICES, *BIASES):
        given[name][...] = 0
    assert bits(layer(x)) == bits(before)


@pytest.mark.parametrize("dtype", sixteen_bits())
def test_weights_of_16_bits_stay_so(rng, dtype):
    """In memory; products widen them as they read, to the bits of the same numbers in float32."""
    given = parameters(rng, 96, 4, 24, d_out=96, dtype=np.float32)
    given = {name: x.astype(dtype) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    same = {name: x.astype(np.float32) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    sizes = []
    for arguments in (given, same):
        fastattn.MultiHeadAttention(**arguments)
        tracemalloc.start()
        layer = fastattn.MultiHeadAttention(**arguments)
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert sizes[0] < 0.6 * sizes[1]
    x = normal(rng, 2, 20, 96).astype(np.float32)
    narrow, wide = fastattn.MultiHeadAttention(**given), layer
    for tokens in (x, x[:1, :5]):
        assert bits(narrow(tokens)) == bits(wide(tokens))
    again = pickle.loads(pickle.dumps(narrow))
    assert bits(again(x)) == bits(narrow(x))
    narrow.parameters()["w_out"][...] *= 2
    assert bits(narrow(x)) != bits(wide(x))


COPIES = {
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "pickle, protocol 2": lambda layer: pickle.loads(pickle.dumps(layer, 2)),
}


@pytest.mark.parametrize("of", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("d_context", [24, 9])
@pytest.mark.parametrize("rotary", [{}, {"rotary_base": 30.0, "rotary_dim": 4}], ids=["plain", "rotary"])
def test_copies(rng, of, d_context, rotary):
    """The same bits, from read-only weights."""
    given = parameters(rng, num_kv_heads=2, value_dim=5, d_context=d_context, **rotary)
    layer = fastattn.MultiHeadAttention(**given)
    other = of(layer)
    assert repr(other) == repr(layer)
    x = normal(rng, 2, 9, 24)
    context = () if d_context == 24 or rotary else (normal(rng, 2, 7, 9),)
    if context or d_context == 24:
        assert bits(other(x, *context)) == bits(layer(x, *context))
        # A call in float64 uses the biases as given.
        assert bits(other(x.astype(np.float64), *context)) == bits(layer(x.astype(np.float64), *context))
    for name in (*MATRICES, *BIASES):
        assert bits(getattr(other, name)) == bits(getattr(layer, name))
        with pytest.raises(ValueError, match="read-only"):
            getattr(other, name)[...] = 0


def test_a_pickle_is_as_large_as_the_weights(rng):
    for d_context in (96, 48):
        given = parameters(rng, 96, 4, 24, d_context=d_context, d_out=96)
        size = sum(given[name].nbytes for name in MATRICES)
        assert size < len(pickle.dumps(fastattn.MultiHeadAttention(**given))) < 1.05 * size


def test_nothing_is_moved(rng):
    """Memory of a call: the product for q, k and v, the heads, the result, and little else."""
    layer = fastattn.MultiHeadAttention(**parameters(rng, 256, 8, 32, d_out=256))
    x = normal(rng, 2, 500, 256)
    layer(x, num_threads=1)
    tracemalloc.start()
    layer(x, num_threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5.1 * x.nbytes


# ---------------------------------------------------------------------------------------- shapes and dtypes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 24), (1, 24), (0, 24), (2, 7, 24), (2, 3, 17, 24), (0, 5, 24), (2, 1, 24)])
@pytest.mark.parametrize("biases", [True, False])
def test_self(rng, shape, biases, dtype):
    assert_layer(parameters(rng, biases=biases, dtype=dtype), normal(rng, *shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_context", [24, 9])
@pytest.mark.parametrize(
    ("batch", "other"), [((), ()), ((2,), (2,)), ((2, 3), (2, 3)), ((2,), (1,)), ((2,), ()), ((3,), (2, 1)), ((), (2,))]
)
def test_cross(rng, batch, other, d_context, dtype):
    given = parameters(rng, d_context=d_context, dtype=dtype)
    assert_layer(given, normal(rng, *batch, 5, 24, dtype=dtype), normal(rng, *other, 19, d_context, dtype=dtype))


@pytest.mark.parametrize("d_out", [None, 1, 24])
@pytest.mark.parametrize("value_dim", [1, 6, 11])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, None])
def test_grouped_heads_and_value_dims(rng, num_kv_heads, value_dim, d_out):
    given = parameters(rng, num_kv_heads=num_kv_heads, value_dim=value_dim, d_out=d_out)
    assert_layer(given, normal(rng, 2, 9, 24), is_causal=True)
    assert_layer(given, normal(rng, 2, 1, 24), normal(rng, 2, 9, 24))


@pytest.mark.parametrize(("length", "keys"), [(5, 0), (0, 5), (0, 0)])
def test_no_rows(rng, length, keys):
    given = parameters(rng)
    out, weights, lse = fastattn.MultiHeadAttention(**given)(
        normal(rng, 2, length, 24), normal(rng, 2, keys, 24), return_weights=True, return_lse=True
    )
    assert weights.shape == (2, 4, length, keys) and (lse == -np.inf).all()
    np.testing.assert_array_equal(out, np.broadcast_to(given["b_out"], (2, length, 10)))


def test_no_channels(rng):
    given = parameters(rng, 0, 2, 3, biases=True)
    assert_layer(given, np.zeros((2, 5, 0), np.float32))


@pytest.mark.parametrize("dtype", [np.float64, np.int64, bool])
@pytest.mark.parametrize("name", ["x", "context", *MATRICES])
def test_promotion(rng, name, dtype):
    """One of them float64, or an integer: the output is float64. (Biases do not count.)"""
    given = parameters(rng)
    arrays = {"x": normal(rng, 2, 5, 24), "context": normal(rng, 2, 8, 24)}
    owner = arrays if name in arrays else given
    owner[name] = (2 * owner[name]).astype(dtype)
    assert assert_layer(given, **arrays).dtype == np.float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [np.float16, np.float64, np.int64])
def test_biases_do_not_decide_the_dtype(rng, bias_dtype, dtype):
    given = parameters(rng, dtype=np.float32)
    given |= {name: (3 * normal(rng, *given[name].shape)).astype(bias_dtype) for name in BIASES}
    assert assert_layer(given, normal(rng, 2, 5, 24, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", sixteen_bits())
@pytest.mark.parametrize("d_out", [None, 10])
def test_sixteen_bits(rng, d_out, dtype):
    """Storage only: everything up to the output is in float32."""
    given, x = parameters(rng, d_out=d_out, dtype=dtype), normal(rng, 2, 9, 24, dtype=dtype)
    out = np.full((2, 9, d_out or 24), 9, dtype)
    assert bits(assert_layer(given, x, out=out)) == bits(assert_layer(given, x))
    assert assert_layer(given, x.astype(np.float32)).dtype == np.float32
    out, lse = fastattn.MultiHeadAttention(**given)(x, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, np.float32)


@pytest.mark.parametrize("d_out", [None, 10])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(rng, dtype, d_out):
    given, x, context = parameters(rng, d_out=d_out, dtype=dtype), normal(rng, 2, 9, 24), normal(rng, 2, 7, 24)
    layer = fastattn.MultiHeadAttention(**given)
    x, context = x.astype(dtype), context.astype(dtype)
    plain, cross = layer(x), layer(x, context)
    for name, same in layouts(x):
        assert bits(layer(same)) == bits(plain), name
    for name, same in layouts(context):
        assert bits(layer(x, same)) == bits(cross), name
    wide = np.broadcast_to(x[:1], (3, 9, 24))
    np.testing.assert_allclose(layer(wide), np.broadcast_to(plain[:1], wide.shape[:2] + plain.shape[2:]), rtol=1e-4)
    for name, w in given.items():
        if np.ndim(w) == 2:
            for layout, same in layouts(w):
                other = fastattn.MultiHeadAttention(**given | {name: same})
                assert bits(other(x)) == bits(plain), (name, layout)


@pytest.mark.parametrize("d_out", [None, 10])
def test_out(rng, d_out):
    layer, x = fastattn.MultiHeadAttention(**parameters(rng, d_out=d_out)), normal(rng, 2, 9, 24)
    plain = layer(x)
    for name, out in layouts(np.full(plain.shape, 7, np.float32)):
        if not out.flags.writeable:
            continue
        assert layer(x, out=out) is out, name
        assert bits(out) == bits(plain), name
        assert layer(x, out=out, return_lse=True)[0] is out
    whole = np.zeros((2, 9, 2 * plain.shape[-1]), np.float32)
    layer(x, out=whole[..., ::2])
    assert not whole[..., 1::2].any()
    assert bits(whole[..., ::2]) == bits(plain)


# --------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_kv_heads", [3, 1])
@pytest.mark.parametrize("rule", RULES)
def test_rules(rng, rule, num_kv_heads, dtype):
    given = parameters(rng, 16, 3, 5, num_kv_heads=num_kv_heads, dtype=dtype)
    arguments = without_heads(rules(rng, num_queries=20, num_keys=20, dtype=dtype)[rule])
    assert_layer(given, normal(rng, 2, 20, 16, dtype=dtype), **arguments)
    arguments = without_heads(rules(rng, num_queries=6, num_keys=31, dtype=dtype)[rule])
    assert_layer(given, *(normal(rng, 2, n, 16, dtype=dtype) for n in (6, 31)), **arguments)


@st.composite
def layer_calls(draw):
    """(parameters, x, context or None, rules): any combination."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype, batch = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    num_kv_heads, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 3), (3, 1)]))
    num_heads, length = num_kv_heads * group, draw(st.sampled_from([1, 2, 5, 17, 40]))
    sizes = {name: draw(st.sampled_from([1, 3, 8, 16])) for name in ("d_model", "value_dim", "d_out")}
    rotary = {}
    if draw(st.booleans()):
        rotary = {"rotary_interleaved": draw(st.booleans()), "rotary_dim": draw(st.sampled_from([4, 6]))}
        if draw(st.booleans()):
            rotary["rotary_base"] = 100.0
        else:
            rotary["rotary_frequencies"] = rng.uniform(0, 1, rotary["rotary_dim"] // 2), 1.1
    given = parameters(
        rng, num_heads=num_heads, num_kv_heads=num_kv_heads, biases=draw(st.booleans()), dtype=dtype, **sizes, **rotary
    )
    x, context, keys = normal(rng, *batch, length, sizes["d_model"], dtype=dtype), None, length
    if not rotary and draw(st.booleans()):
        keys = draw(st.sampled_from([1, 7, 33]))
        context = normal(rng, *batch, keys, sizes["d_model"], dtype=dtype)
    possible = {
        "is_causal": True,
        "window_size": (draw(st.integers(0, keys)), draw(st.integers(0, 3))),
        "chunk_size": draw(st.integers(1, keys + 1)),
        "query_offset": rng.integers(-3, keys + 3, batch),
        "key_lengths": rng.integers(0, keys + 1, batch),
        "query_lengths": rng.integers(0, length + 1, batch),
        "mask": rng.random((*batch, num_heads, length, keys)) < 0.7,
        "bias": normal(rng, num_heads, 1, keys),
        "alibi_slopes": rng.random(num_heads).astype(dtype),
        "sinks": normal(rng, num_heads),
        "scale": 0.4,
        "softcap": 2.0,
    }
    names = draw(st.sets(st.sampled_from(sorted(set(possible) - ({"softcap"} if rotary else set())))))
    for name in draw(st.sets(st.sampled_from(["q_norm", "k_norm"]))):
        given[name] = rng.uniform(-2, 2, 6)
    # Some of them belong to the layer.
    held = draw(st.sets(st.sampled_from(HELD_RULES))) & names
    given |= {name: possible[name] for name in held}
    return given, x, context, {name: possible[name] for name in sorted(names - held)}


@given(layer_calls())
@settings(max_examples=120, deadline=None)
def test_everything_together(call):
    given, x, context, arguments = call
    assert_layer(given, x, context, **arguments)


def test_masks_broadcast(rng):
    """A mask per sequence is mask[:, None]; one per head has no batch axis."""
    layer, x = fastattn.MultiHeadAttention(**parameters(rng)), normal(rng, 2, 9, 24)
    mask = rng.random((2, 9, 9)) < 0.5
    both = layer(x, mask=mask[:, None])
    for b in range(2):
        np.testing.assert_allclose(both[b], layer(x[b], mask=mask[b]), rtol=1e-5, atol=1e-5)


def test_padding_is_not_seen(rng):
    """NaN and infinity past the lengths reach no other row; rows without keys give b_out."""
    given = parameters(rng)
    layer, x = fastattn.MultiHeadAttention(**given), normal(rng, 2, 9, 24)
    lengths = np.array([5, 9])
    clean = layer(x, key_lengths=lengths, query_lengths=lengths, is_causal=True)
    x[0, 5:] = np.nan
    x[0, 6:, 3] = np.inf
    out = layer(x, key_lengths=lengths, query_lengths=lengths, is_causal=True)
    assert bits(out[0, :5]) == bits(clean[0, :5]) and bits(out[1]) == bits(clean[1])
    np.testing.assert_array_equal(out[0, 5:], np.broadcast_to(given["b_out"], (4, 10)))
    assert np.isnan(layer(x)[0]).all()


@pytest.mark.parametrize("rotary", [{}, {"rotary_base": 30.0}], ids=["plain", "rotary"])
@pytest.mark.parametrize(
    "rules", [{}, {"is_causal": True}, {"is_causal": True, "window_size": (2, 0)}, {"chunk_size": 2}], ids=str
)
def test_lengths_of_keys_are_enough_in_a_padded_batch(rng, rules, rotary):
    """Right-padded sequences: valid rows as each sequence alone; the others see nothing."""
    given = parameters(rng, num_kv_heads=2, dtype=np.float64, **rotary)
    layer, x, lengths = fastattn.MultiHeadAttention(**given), normal(rng, 3, 6, 24, dtype=np.float64), [6, 3, 0]
    clean = layer(x, key_lengths=lengths, query_offset=0, **rules)
    x[1, 3:] = x[2] = np.nan
    out, weights, lse = layer(x, key_lengths=lengths, return_weights=True, return_lse=True, **rules)
    for b, n in enumerate(lengths):
        alone = layer(x[b, :n], return_weights=True, return_lse=True, **rules)
        for got, want in ((out[b, :n], alone[0]), (weights[b, :, :n, :n], alone[1]), (lse[b, :, :n], alone[2])):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(out[b, n:], np.broadcast_to(given["b_out"], (6 - n, 10)))
        assert not weights[b, :, n:].any() and not weights[b, ..., n:].any()
        assert (lse[b, :, n:] == -np.inf).all()
    assert bits(out) == bits(clean)
    bare = fastattn.MultiHeadAttention(**{**given, "b_out": None})
    assert not bare(x, key_lengths=lengths, **rules)[1, 3:].any()
    assert_layer(given, np.nan_to_num(x), key_lengths=np.array(lengths), **rules)


def test_lengths_of_keys_say_nothing_of_rows_elsewhere(rng):
    """With a context; and with the lengths of both."""
    given = parameters(rng)
    layer, x, context = fastattn.MultiHeadAttention(**given), normal(rng, 2, 6, 24), normal(rng, 2, 8, 24)
    out = layer(x, context, key_lengths=[6, 3])
    for b, n in enumerate((6, 3)):
        np.testing.assert_allclose(out[b], layer(x[b], context[b, :n]), rtol=1e-5, atol=1e-5)
    out = layer(x, key_lengths=[6, 3], query_lengths=6)
    np.testing.assert_allclose(out[1], layer(x[1], x[1, :3]), rtol=1e-5, atol=1e-5)


def test_band(rng):
    layer, x = fastattn.MultiHeadAttention(**parameters(rng)), normal(rng, 2, 9, 24)
    _, band = layer(x, window_size=(2, 1), return_weights="band")
    _, weights = layer(x, window_size=(2, 1), return_weights=True)
    assert band.shape == (2, 4, 9, 4)
    np.testing.assert_array_equal(band[:, :, 4], weights[:, :, 4, 2:6])


def test_threads_at_once(rng):
    """A layer has no state: calls may run side by side."""
    layer, xs = fastattn.MultiHeadAttention(**parameters(rng)), normal(rng, 4, 2, 30, 24)
    expected, got = [bits(layer(x)) for x in xs], {}

    def work(i):
        got[i] = {bits(layer(xs[i])) for _ in range(50)}

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: {expected[i]} for i in range(4)}


# ------------------------------------------------------------------------------------------------- rotary

ROTARY = {
    "halves": {"rotary_base": 10000.0},
    "pairs": {"rotary_base": 500.0, "rotary_interleaved": True},
    "some": {"rotary_base": 10000.0, "rotary_dim": 4},
    "none": {"rotary_base": 10000.0, "rotary_dim": 0},
    "frequencies": {"rotary_frequencies": ([1.0, 0.3, -0.01], 1.2)},
    "some frequencies": {"rotary_frequencies": (np.array([2, 1]), 0.8), "rotary_dim": 4, "rotary_interleaved": True},
}


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(rng, dtype, rotary, num_kv_heads):
    given = parameters(rng, num_kv_heads=num_kv_heads, value_dim=5, dtype=dtype, **ROTARY[rotary])
    x = normal(rng, 2, 9, 24, dtype=dtype)
    lengths = {"key_lengths": np.array([9, 4]), "query_lengths": np.array([7, 4])}
    for arguments in (
        {},
        {"is_causal": True},
        {"query_offset": 3},
        {"query_offset": [-2, 5]},
        {"key_lengths": 6},
        lengths,
    ):
        assert_layer(given, x, **arguments)


def test_rotary_frequencies_of_a_base_are_that_base(rng):
    x = normal(rng, 2, 9, 24)
    base, frequencies = (
        fastattn.MultiHeadAttention(**given)
        for given in (
            parameters(np.random.default_rng(3), rotary_base=50.0),
            parameters(np.random.default_rng(3), rotary_frequencies=fastattn.rotary_frequencies(6, base=50.0)),
        )
    )
    for arguments in ({"is_causal": True}, {"query_offset": [-2, 5]}):
        assert bits(frequencies(x, **arguments)) == bits(base(x, **arguments))
    assert "rotary_frequencies=(3 angles, 1)" in repr(frequencies)


def test_rotary_frequencies_are_the_layers_own(rng):
    mine, x = np.array([1.0, 0.5, 0.25]), normal(rng, 2, 9, 24)
    layer = fastattn.MultiHeadAttention(**parameters(rng, rotary_frequencies=(mine, 1.5)))
    before = bits(layer(x, is_causal=True))
    mine[:] = 0
    assert bits(layer(x, is_causal=True)) == before
    own, attention_factor = layer.rotary_frequencies
    assert (own.tolist(), attention_factor, own.flags.writeable) == ([1.0, 0.5, 0.25], 1.5, False)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)):
        assert bits(other(x, is_causal=True)) == before
        assert repr(other) == repr(layer)


def test_rotary_knows_distances_only(rng):
    """Shifting queries and keys together changes nothing; shifting only queries does."""
    layer, x = fastattn.MultiHeadAttention(**parameters(rng, rotary_base=10.0)), normal(rng, 9, 24)
    assert not np.allclose(layer(x), layer(x, query_offset=3))
    assert bits(layer(x)) == bits(layer(x, query_offset=0))
    before = x.copy()
    layer(x)
    np.testing.assert_array_equal(x, before)


# -------------------------------------------------------------------------------------------------- cache


def steps_of(total, *first):
    return [*first, *[1] * (total - sum(first))]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("rotary", [{}, *ROTARY.values()], ids=["plain", *ROTARY])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_steps_are_the_whole(rng, batch, rotary, num_kv_heads, causal):
    """A prompt, then steps of one token, causal or not: the rows of one causal call."""
    given = parameters(rng, num_kv_heads=num_kv_heads, value_dim=5, dtype=np.float64, **rotary)
    layer, x = fastattn.MultiHeadAttention(**given), normal(rng, *batch, 14, 24, dtype=np.float64)
    whole, weights = layer(x, is_causal=True, return_weights=True)
    cache, at = KVCache(batch, num_kv_heads, 14, 6, 5, dtype=np.float64), 0
    for n in steps_of(14, 5, 4):
        new = slice(at, at + n)
        out, part = layer(x[..., new, :], cache=cache, is_causal=causal or n > 1, return_weights=True)
        at += n
        np.testing.assert_allclose(out, whole[..., new, :], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(part, weights[..., new, :at], rtol=1e-12, atol=1e-12)
    assert (cache.lengths == 14).all()


def test_the_reference_takes_a_cache(rng):
    given = parameters(rng, num_kv_heads=2, dtype=np.float64, rotary_base=100.0)
    caches = [KVCache(2, 2, 20, 6, dtype=np.float64) for _ in range(2)]
    for n, counts in ((5, [5, 2]), (3, [0, 3]), (1, None)):
        x = normal(rng, 2, n, 24, dtype=np.float64)
        ours, theirs = (
            module.MultiHeadAttention(**given)(x, cache=cache, query_lengths=counts, is_causal=True)
            for module, cache in zip((fastattn, reference), caches, strict=True)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rotary", [{}, *ROTARY.values()], ids=["plain", *ROTARY])
def test_ragged_steps(rng, rotary):
    """Prompts of different lengths, steps in which some sequences have no token: as each sequence alone."""
    given = parameters(rng, num_kv_heads=2, dtype=np.float64, **rotary)
    layer, x = fastattn.MultiHeadAttention(**given), normal(rng, 3, 12, 24, dtype=np.float64)
    wholes = [layer(x[b], is_causal=True) for b in range(3)]
    cache, there = KVCache(3, 2, 12, 6, dtype=np.float64), np.zeros(3, np.int64)
    for counts in ([5, 1, 0], [3, 4, 2], [1, 1, 1], [1, 0, 1], [2, 6, 8]):
        counts = np.array(counts)
        n = counts.max()
        step = np.full((3, n, 24), np.nan)
        for b in range(3):
            step[b, : counts[b]] = x[b, there[b] : there[b] + counts[b]]
        out = layer(step, cache=cache, query_lengths=counts, is_causal=True)
        for b in range(3):
            np.testing.assert_allclose(
                out[b, : counts[b]], wholes[b][there[b] : there[b] + counts[b]], rtol=1e-12, atol=1e-12
            )
            np.testing.assert_array_equal(out[b, counts[b] :], np.broadcast_to(given["b_out"], (n - counts[b], 10)))
        there += counts
    np.testing.assert_array_equal(cache.lengths[:, 0], there)


PADDINGS = {"left": (0, 0, 0, 0), "right": (9, 9, 9, 9), "both": (3, 1, 2, 0), "mixed": (0, 9, 4, 9)}


@pytest.mark.parametrize("sides", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize(
    ("window", "rules"),
    [(None, {}), (6, {}), (8, {"chunk_size": 4, "left_chunks": 1})],
    ids=["all", "window", "chunks"],
)
def test_padded_prompts(rng, window, rules, sides):
    """Padding anywhere, brought to the end as the guide says; sequences that end early, by a length of 0 and by leaving
    the batch; one that gets a second prompt while others decode. Each is as alone."""
    given = parameters(rng, num_kv_heads=2, dtype=np.float64, rotary_base=30.0)
    layer, table = fastattn.MultiHeadAttention(**given), normal(rng, 40, 24, dtype=np.float64)
    counts = np.array([9, 2, 7, 11])
    texts = [list(rng.integers(1, 40, n)) for n in counts]
    ids = np.zeros((4, 11), int)
    for b, text in enumerate(texts):
        free = 11 - len(text)
        after = min(sides[b], free)
        ids[b, free - after : 11 - after] = text
    mask = ids != 0
    ids = np.take_along_axis(ids, np.argsort(~mask, axis=1, kind="stable"), axis=1)
    lengths, cache = mask.sum(axis=1), KVCache(4, 2, 60 if window is None else 10, 6, dtype=np.float64, window=window)
    out = layer(table[ids], cache=cache, query_lengths=lengths, is_causal=True, **rules)
    found = [list(out[b, : counts[b]]) for b in range(4)]

    alive = np.arange(4)
    for step in range(14):
        came = np.ones(len(alive), int)
        came[alive == 1] = step < 4  # it ends, and stays
        came[alive == 2] = (1, 5, 0)[step % 3]  # as in serving: more text comes for a sequence that waits
        if step == 7:  # another ends, and leaves
            cache, came, alive = cache.select(alive != 3), came[alive != 3], alive[alive != 3]
        ids = np.zeros((len(alive), came.max()), int)
        for row, b in enumerate(alive):
            ids[row, : came[row]] = new = rng.integers(1, 40, came[row])
            texts[b].extend(new)
        out = layer(table[ids], cache=cache, query_lengths=came, is_causal=True, **rules)
        for row, b in enumerate(alive):
            found[b].extend(out[row, : came[row]])
    bound = rules or ({} if window is None else {"window_size": (window - 1, 0)})
    for b in range(4):
        alone = layer(table[texts[b]], is_causal=True, **bound)
        np.testing.assert_allclose(found[b], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rotary", [{}, {"rotary_base": 30.0}], ids=["plain", "rotary"])
@pytest.mark.parametrize("capacity", [8, 9, 20])
def test_steps_in_a_window(rng, capacity, rotary):
    """A cache that drops old tokens: the rows of one call with that window, including positions."""
    given = parameters(rng, num_kv_heads=2, dtype=np.float64, **rotary)
    layer, x = fastattn.MultiHeadAttention(**given), normal(rng, 2, 60, 24, dtype=np.float64)
    arguments = {"is_causal": True, "window_size": (7, 0), "alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4])}
    whole = layer(x, **arguments)
    cache, at = KVCache(2, 2, capacity, 6, dtype=np.float64, window=7), 0
    for n in steps_of(60, 1, 1):
        out = layer(x[:, at : at + n], cache=cache, **arguments)
        np.testing.assert_allclose(out, whole[:, at : at + n], rtol=1e-12, atol=1e-12)
        at += n
    assert cache.dropped.all()


# Rules of a call with a cache of window=8, and the equivalent rules without it.
ROLLING = {
    "nothing": ({}, {"window_size": (7, 0)}),
    "a window": ({"window_size": (8, 0)}, {}),
    "a narrow window": ({"window_size": 3}, {}),
    "chunks": ({"chunk_size": 4, "left_chunks": 1}, {}),
    "a chunk": ({"chunk_size": 9, "left_chunks": 0}, {}),
    "chunks in a window": ({"chunk_size": 3, "window_size": (5, None)}, {}),
    "relative bias": ({"relative_bias": np.linspace(-1, 1, 32).reshape(4, 1, 8)}, {"window_size": (7, 0)}),
    "alibi": ({"alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4]), "sinks": np.arange(4.0)}, {"window_size": (7, 0)}),
}


def steps_over(layer, cache, x, cuts, **rules):
    """For each call (start of each sequence, how many rows, first token that it saw, its results): `cuts` holds the row
    counts of each call, one number or one per sequence. Rows that do not count are NaN."""
    there = np.zeros(len(x), np.int64)
    for counts in cuts:
        counts = np.broadcast_to(counts, len(x))
        step = np.full((len(x), counts.max(), x.shape[-1]), np.nan, x.dtype)
        for b, n in enumerate(counts):
            step[b, :n] = x[b, there[b] : there[b] + n]
        first = cache.dropped[:, 0]
        mine = {name: rule(there, counts, first) if callable(rule) else rule for name, rule in rules.items()}
        yield there.copy(), counts, first, layer(step, cache=cache, query_lengths=counts, is_causal=True, **mine)
        there += counts
        np.testing.assert_array_equal((cache.dropped + cache.lengths)[:, 0], there)
        assert (cache.lengths[:, 0] >= np.minimum(there, cache.window)).all()


CUTS = {
    "one by one": [1] * 40,
    "all at once": [40],
    "pieces": [3, 20, 1, 16],
    "ragged": [[5, 0, 12], [3, 14, 1], [1, 1, 1], [1, 0, 1], [2, 6, 1], [1, 1, 1], [20, 1, 0], [1, 1, 22], [6, 16, 1]],
}


@pytest.mark.parametrize("rotary", [{}, {"rotary_base": 30.0}], ids=["plain", "rotary"])
@pytest.mark.parametrize("capacity", [8, 9, 16, 30])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(("rules", "whole"), ROLLING.values(), ids=ROLLING)
def test_a_rolling_cache_is_one_call(rng, rules, whole, cuts, capacity, rotary):
    """However tokens are split, more of them than fit or fewer: each sequence's rows of one call without a cache."""
    given = parameters(rng, num_kv_heads=2, value_dim=5, dtype=np.float64, **rotary)
    layer, x = fastattn.MultiHeadAttention(**given), normal(rng, 3, 40, 24, dtype=np.float64)
    expected, lse = layer(x, is_causal=True, return_lse=True, **rules, **whole)
    cache = KVCache(3, 2, capacity, 6, 5, dtype=np.float64, window=8)
    for start, counts, _, (out, own) in steps_over(layer, cache, x, cuts, return_lse=True, **rules):
        for b, (at, n) in enumerate(zip(start, counts, strict=True)):
            np.testing.assert_allclose(out[b, :n], expected[b, at : at + n], rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(own[b, :, :n], lse[b, :, at : at + n], rtol=1e-12, atol=1e-12)
            np.testing.assert_array_equal(out[b, n:], np.broadcast_to(given["b_out"], (len(out[b]) - n, 10)))


@pytest.mark.parametrize("capacity", [8, 16])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_columns_over_a_rolling_cache(rng, cuts, capacity):
    """Columns of masks, biases and weights: the tokens there before the call, then the new ones."""
    given = parameters(rng, num_kv_heads=2, dtype=np.float64, rotary_base=30.0)
    layer, x = fastattn.MultiHeadAttention(**given), normal(rng, 3, 40, 24, dtype=np.float64)
    whole = {"mask": rng.random((3, 4, 40, 40)) < 0.7, "bias": normal(rng, 3, 4, 40, 40, dtype=np.float64)}
    rules = {"is_causal": True, "window_size": (7, 0)}
    expected, weights = layer(x, return_weights=True, **rules, **whole)

    def part_of(matrix):
        def part(there, counts, first):
            part = np.zeros((3, 4, counts.max(), (there - first + counts).max()), matrix.dtype)
            for b, n in enumerate(counts):
                seen = matrix[b, :, there[b] : there[b] + n, first[b] : there[b] + n]
                part[b, :, :n, : seen.shape[-1]] = seen
            return part

        return part

    matrices = {name: part_of(matrix) for name, matrix in whole.items()}
    cache = KVCache(3, 2, capacity, 6, dtype=np.float64, window=8)
    for start, counts, first, (out, own) in steps_over(layer, cache, x, cuts, return_weights=True, **matrices):
        np.testing.assert_allclose(own, part_of(weights)(start, counts, first), rtol=1e-12, atol=1e-12)
        for b, (at, n) in enumerate(zip(start, counts, strict=True)):
            np.testing.assert_allclose(out[b, :n], expected[b, at : at + n], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rules", [rules for rules, _ in ROLLING.values()], ids=ROLLING)
def test_the_reference_takes_a_rolling_cache(rng, rules):
    given = parameters(rng, num_kv_heads=2, dtype=np.float64, rotary_base=100.0)
    if "relative_bias" not in rules:
        rules = {**rules, "bias": np.linspace(-1, 1, 4).reshape(4, 1, 1)}
    caches = [KVCache(2, 2, 9, 6, dtype=np.float64, window=8) for _ in range(2)]
    for n, counts in ((5, [5, 2]), (3, [0, 3]), (17, [17, 4]), (1, None), (2, 2), (12, [2, 12])):
        x = normal(rng, 2, n, 24, dtype=np.float64)
        ours, theirs = (
            module.MultiHeadAttention(**given)(
                x, cache=cache, query_lengths=counts, is_causal=True, return_weights=True, return_lse=True, **rules
            )
            for module, cache in zip((fastattn, reference), caches, strict=True)
        )
        for got, want in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_whole_chunks_over_a_rolling_cache(rng):
    """Rows that look ahead to the end of their chunk, chunk by chunk."""
    layer = fastattn.MultiHeadAttention(**parameters(rng, dtype=np.float64))
    x, rules = normal(rng, 2, 35, 24, dtype=np.float64), {"chunk_size": 5, "left_chunks": 1}
    whole = layer(x, query_offset=0, **rules)
    for capacity in (9, 14, 15):
        cache = KVCache(2, 4, capacity, 6, dtype=np.float64, window=9)
        for at, n in ((0, 10), (10, 5), (15, 15), (30, 5)):
            out = layer(x[:, at : at + n], cache=cache, **rules)
            np.testing.assert_allclose(out, whole[:, at : at + n], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rules", [{}, {"chunk_size": 3, "left_chunks": 1}], ids=str)
def test_bits_over_a_rolling_cache_are_those_of_a_sequence_alone(rng, rules):
    """From the projections on, which are exact here; whatever other sequences drop."""
    layer, x = fastattn.MultiHeadAttention(*3 * [np.eye(8, dtype=np.float32)], num_heads=2), normal(rng, 3, 40, 8)
    cache, alone = KVCache(3, 2, 10, 4, window=6), [KVCache((), 2, 10, 4, window=6) for _ in range(3)]
    for start, counts, _, out in steps_over(layer, cache, x, CUTS["ragged"], **rules):
        for b, (at, n) in enumerate(zip(start, counts, strict=True)):
            # As many rows as the batch has: few queries use other loops.
            rows = np.full((len(out[b]), 8), np.nan, np.float32)
            rows[:n] = x[b, at : at + n]
            own = layer(rows, cache=alone[b], query_lengths=int(n), is_causal=True, **rules)
            assert bits(own) == bits(out[b])


BAD_REACHES = {
    "window": ({"window_size": (9, 0)}, r"window_size=\(9, 0\) lets a query see 9 keys .* window=8"),
    "both sides": ({"window_size": 9}, "window_size=9 lets a query see 9 keys .* window=8"),
    "unbounded": ({"window_size": (None, 0)}, r"window_size=\(None, 0\) lets a query see all keys .* window=8"),
    "minus one": ({"window_size": np.array([-1, 0])}, "see all keys .* window=8"),
    "chunks": ({"chunk_size": 5, "left_chunks": 1}, "chunk_size=5 with left_chunks=1 .* 9 keys .* window=8"),
    "a chunk": ({"chunk_size": 10, "left_chunks": 0}, "chunk_size=10 with left_chunks=0 .* 9 keys .* window=8"),
    "all chunks": ({"chunk_size": 2}, "chunk_size=2 with left_chunks=None .* all keys .* window=8"),
    "chunks in a window": (
        {"chunk_size": 5, "left_chunks": -1, "window_size": (10, 0)},
        r"window_size=\(10, 0\) and chunk_size=5 with left_chunks=-1 .* 10 keys .* window=8",
    ),
}


@pytest.mark.parametrize(("rules", "message"), BAD_REACHES.values(), ids=BAD_REACHES)
def test_rules_reach_no_further_than_the_cache(rng, rules, message):
    """Also before anything is dropped. Without a window there is nothing that they could miss."""
    layer, cache = fastattn.MultiHeadAttention(**parameters(rng)), KVCache(2, 4, 12, 6, window=8)
    for n in (3, 20):
        before = snapshot(cache)
        with pytest.raises(ValueError, match=message):
            layer(normal(rng, 2, 2, 24), cache=cache, is_causal=True, **rules)
        assert snapshot(cache) == before
        layer(normal(rng, 2, n, 24), cache=cache, is_causal=True)
    layer(normal(rng, 2, 2, 24), cache=KVCache(2, 4, 12, 6), is_causal=True, **rules)


@pytest.mark.parametrize("capacity", [8, 12, 60])
@pytest.mark.parametrize("n", [1, 4, 30])
def test_an_interrupted_call_appends_nothing(rng, monkeypatch, n, capacity):
    layer = fastattn.MultiHeadAttention(**parameters(rng, dtype=np.float64, rotary_base=30.0))
    x, cache = normal(rng, 2, 20 + n, 24, dtype=np.float64), KVCache(2, 4, capacity, 6, dtype=np.float64, window=8)
    whole = layer(x, is_causal=True, window_size=(7, 0))
    layer(x[:, :20], cache=cache, is_causal=True)
    attend, calls = fastattn.multihead.attend, []

    def interrupted(*arguments, **others):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return attend(*arguments, **others)

    monkeypatch.setattr(fastattn.multihead, "attend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer(x[:, 20:], cache=cache, is_causal=True)
    assert (cache.dropped + cache.lengths == 20).all() and (cache.lengths >= 8).all()
    out = layer(x[:, 20:], cache=cache, is_causal=True)
    np.testing.assert_allclose(out, whole[:, 20:], rtol=1e-12, atol=1e-12)


def test_memory_of_a_step_that_fits(rng):
    """Old and new tokens are copied only if they do not fit; with an empty cache not even then."""
    layer = fastattn.MultiHeadAttention(*3 * [np.eye(64, dtype=np.float32)], num_heads=1)
    x = normal(rng, 1, 4096, 64)
    for capacity, old, room in ((8192, 4096, 0), (4096, 0, 0), (4096, 4096, 2 * 2**20)):
        cache = KVCache(1, 1, capacity, 64, window=2048)
        layer(x[:, :old], cache=cache, is_causal=True)
        tracemalloc.start()
        layer(x[:, :2], cache=cache, is_causal=True)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < room + 2**17


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("rotary", [{}, {"rotary_base": 30.0}], ids=["plain", "rotary"])
def test_rollback_is_never_having_appended(rng, window, rotary):
    """Draft tokens, some of which each sequence takes back: positions, windows and so on continue as without them."""
    given = parameters(rng, num_kv_heads=2, dtype=np.float64, **rotary)
    layer, x = fastattn.MultiHeadAttention(**given), normal(rng, 2, 30, 24, dtype=np.float64)
    slopes = np.array([0.1, 0.2, 0.3, 0.4])
    whole = layer(x, is_causal=True, alibi_slopes=slopes, window_size=None if window is None else (window - 1, 0))
    cache, at = KVCache(2, 2, 40 if window is None else 14, 6, dtype=np.float64, window=window), np.zeros(2, int)
    while at.min() < 27:
        # Of three tokens the first zero to three are right, a different number in each of two sequences.
        right = np.minimum(rng.integers(0, 4, 2), 29 - at)
        draft = normal(rng, 2, 4, 24, dtype=np.float64)
        for b in range(2):
            draft[b, : right[b] + 1] = x[b, at[b] : at[b] + right[b] + 1]
        out = layer(draft, cache=cache, is_causal=True, alibi_slopes=slopes)
        for b in range(2):
            rows = slice(at[b], at[b] + right[b] + 1)
            np.testing.assert_allclose(out[b, : right[b] + 1], whole[b, rows], rtol=1e-12, atol=1e-12)
        cache = cache.crop(cache.lengths - 4 + (right + 1)[:, None])
        at = np.minimum(at + right + 1, 28)
        cache = cache.crop(cache.lengths - (cache.dropped + cache.lengths - at[:, None]))
    assert window is None or cache.dropped.any()


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("of", COPIES.values(), ids=COPIES)
def test_beams(rng, window, of):
    """Beams that fork, swap and end, with caches that are selected and copied: each as its tokens alone."""
    given = parameters(rng, num_kv_heads=2, dtype=np.float64, rotary_base=30.0)
    layer, tokens = of(fastattn.MultiHeadAttention(**given)), normal(rng, 1, 0, 24, dtype=np.float64)
    cache = KVCache(1, 2, 40 if window is None else 11, 6, dtype=np.float64, window=window)
    for chosen in ([0], [0, 0, 0], [2, 0, 0, 1], *12 * [[1, 0, 3, 2]], [3, 1], [True, False], [0, 0]):
        cache = of(cache.select(chosen))
        new = normal(rng, cache.lengths.shape[0], 2, 24, dtype=np.float64)
        tokens = np.concatenate([tokens[np.asarray(chosen)], new], axis=1)
        out = layer(new, cache=cache, is_causal=True)
        whole = layer(tokens, is_causal=True, window_size=None if window is None else (window - 1, 0))
        np.testing.assert_allclose(out, whole[:, -2:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", sixteen_bits())
@pytest.mark.parametrize("d_out", [None, 10])
def test_a_cache_of_other_dtype(rng, d_out, dtype):
    """Attention is in the cache's dtype, the output in that of the layer."""
    given, x = parameters(rng, d_out=d_out), normal(rng, 2, 9, 24)
    layer = fastattn.MultiHeadAttention(**given)
    whole = layer(x, is_causal=True)
    for cache_dtype in (dtype, np.float64):
        cache = KVCache(2, 4, 9, 6, dtype=cache_dtype)
        out, lse = layer(x, cache=cache, is_causal=True, return_lse=True, out=np.empty_like(whole))
        assert (out.dtype, lse.dtype) == (np.float32, np.float64 if cache_dtype == np.float64 else np.float32)
        # Query, key, value and heads are rounded once each; scores here are at most a few units.
        step = max(storage_steps(np.dtype(cache_dtype))[0], float(np.finfo(np.float32).eps))
        np.testing.assert_allclose(out, whole, rtol=0, atol=16 * step * np.abs(whole).max())


def snapshot(cache):
    return [bits(a) for a in (cache.key, cache.value, cache.lengths, cache.dropped)]


BAD_STEPS = {
    "mask": (ValueError, r"mask has shape \(3, 5\)", {"mask": np.ones((3, 5), bool)}),
    "mask, dtype": (TypeError, "mask must be boolean", {"mask": np.ones((3, 9))}),
    "bias": (ValueError, "bias has shape", {"bias": np.ones((4, 3, 5), np.float32)}),
    "window": (ValueError, "window_size", {"window_size": -3}),
    "band": (ValueError, "return_weights='band' needs window_size", {"return_weights": "band"}),
    "lse": (ValueError, "return_lse needs", {"return_lse": True, "activation": "relu"}),
    "scale": (TypeError, "scale must be", {"scale": "1"}),
    "sinks": (ValueError, "sinks has shape", {"sinks": np.ones(3)}),
    "threads": (ValueError, "num_threads", {"num_threads": 0}),
    "lengths": (ValueError, "query_lengths must lie between 0 and 3, not 4", {"query_lengths": [4, 0]}),
    "key_lengths": (ValueError, "key_lengths and cache do not go together", {"key_lengths": 2}),
    "query_offset": (ValueError, "query_offset and cache do not go together", {"query_offset": 2}),
    "context": (ValueError, "context and cache do not go together", {"context": np.ones((2, 3, 24), np.float32)}),
    "out": (ValueError, r"out has shape \(2, 3, 9\)", {"out": np.ones((2, 3, 9), np.float32)}),
    "out, dtype": (TypeError, "out has dtype float64", {"out": np.ones((2, 3, 10))}),
}


@pytest.mark.parametrize(("error", "message", "arguments"), BAD_STEPS.values(), ids=BAD_STEPS)
@pytest.mark.parametrize("window", [None, 4])
def test_errors_append_nothing(rng, window, error, message, arguments):
    layer, cache = fastattn.MultiHeadAttention(**parameters(rng)), KVCache(2, 4, 9, 6, window=window)
    layer(normal(rng, 2, 6, 24), cache=cache)
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        layer(normal(rng, 2, 3, 24), cache=cache, **arguments)
    assert snapshot(cache) == before


def test_caches_that_do_not_fit(rng):
    layer, x = fastattn.MultiHeadAttention(**parameters(rng)), normal(rng, 2, 6, 24)
    for shape in ((3, 4, 9, 6), ((), 4, 9, 6), (2, 2, 9, 6), (2, 4, 9, 5), (2, 4, 9, 6, 7)):
        with pytest.raises(ValueError, match=r"cache has batch_shape=.* must have batch_shape=\(2,\), num_kv_heads=4"):
            layer(x, cache=KVCache(*shape))
    with pytest.raises(TypeError, match=r"cache must be a fastattn.KVCache, not dict"):
        layer(x, cache={})
    cache = KVCache(2, 4, 5, 6)
    with pytest.raises(ValueError, match="capacity=5"):
        layer(x, cache=cache)
    assert not cache.lengths.any()
    layer(x, cache=cache, query_lengths=[5, 3])
    np.testing.assert_array_equal(cache.lengths, [[5], [3]])


# ---------------------------------------------------------------------------------- wrong ones are found out

WRONG = {
    "a weight": lambda given: given | {"w_value": given["w_value"] * np.float32(1.01)},
    "no bias": lambda given: given | {"b_query": None},
    "no last bias": lambda given: given | {"b_out": None},
    "heads of keys swapped": lambda given: given | {"w_key": np.roll(given["w_key"], 6, axis=1)},
    "other pairs": lambda given: given | {"rotary_interleaved": True},
    "another base": lambda given: given | {"rotary_base": 110.0},
    "other frequencies": lambda given: given | {"rotary_base": None, "rotary_frequencies": ([1.0, 0.2, 0.05], 1.0)},
    "a norm of heads": lambda given: given | {"q_norm": np.ones(6, np.float32)},
    "another scale": lambda given: given | {"scale": 0.41},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_layers_are_found_out(rng, wrong):
    given, x = parameters(rng, num_kv_heads=2, rotary_base=100.0), normal(rng, 2, 30, 24)
    assert_layer(given, x)
    with pytest.raises(AssertionError, match="output"):
        assert_layer(given, x, layer=fastattn.MultiHeadAttention(**wrong(given)))
    with pytest.raises(AssertionError, match="output"):
        assert_layer(
            given, x, layer=lambda *arrays, **rest: fastattn.MultiHeadAttention(**given)(*arrays, is_causal=True)
        )


# ------------------------------------------------------------------------------------------------- errors

BAD_PARAMETERS = {
    "num_heads": (ValueError, "num_heads must be an integer of at least 1, not 0", {"num_heads": 0}),
    "num_heads, type": (TypeError, "num_heads must be an integer", {"num_heads": 4.0}),
    "num_heads, parts": (ValueError, "w_query has 24 columns, which num_heads=5 does not divide", {"num_heads": 5}),
    "groups": (ValueError, "num_heads=4 is not a whole multiple of num_kv_heads=3", {"num_kv_heads": 3}),
    "w_key": (ValueError, "w_key has 12 columns; it must have 24.*num_kv_heads", {"w_key": np.ones((24, 12))}),
    "w_value": (ValueError, r"w_value has shape \(20, 24\); it must be \(24, n\)", {"w_value": np.ones((20, 24))}),
    "value columns": (ValueError, "w_value has 25 columns", {"w_value": np.ones((24, 25))}),
    "w_out": (ValueError, r"w_out has shape \(20, 10\); it must be \(24, n\)", {"w_out": np.ones((20, 10))}),
    "w_query": (ValueError, r"w_query has shape \(24,\)", {"w_query": np.ones(24)}),
    "b_query": (ValueError, r"b_query has shape \(6,\); it must be \(24,\)", {"b_query": np.ones(6)}),
    "b_out": (ValueError, "b_out is added to the output projection: it needs w_out", {"w_out": None}),
    "complex": (TypeError, "w_key has dtype complex64", {"w_key": np.ones((24, 24), np.complex64)}),
    "masked": (TypeError, "w_key is a masked array", {"w_key": np.ma.masked_array(np.ones((24, 24)))}),
    "order": (TypeError, "w_key has the byte order", {"w_key": np.ones((24, 24), ">f4")}),
    "rotary_base": (ValueError, "rotary_base must be a positive finite number", {"rotary_base": -1}),
    "rotary_base, type": (TypeError, "rotary_base must be a positive finite number", {"rotary_base": "1"}),
    "rotary_dim": (
        ValueError,
        "rotary_dim must be an even integer from 0 to head_dim=6, not 8",
        {"rotary_base": 1, "rotary_dim": 8},
    ),
    "rotary_dim, odd": (ValueError, "rotary_dim must be an even", {"rotary_base": 1, "rotary_dim": 3}),
    "both": (
        ValueError,
        "rotary_base and rotary_frequencies do not go together",
        {"rotary_base": 10.0, "rotary_frequencies": ([1.0, 1.0, 1.0], 1.0)},
    ),
    "frequencies alone": (
        TypeError,
        "rotary_frequencies must be a pair .*not ndarray",
        {"rotary_frequencies": np.ones(3)},
    ),
    "frequencies, three": (TypeError, "must be a pair .*not 3 things", {"rotary_frequencies": [1.0, 1.0, 1.0]}),
    "frequencies, count": (
        ValueError,
        r"rotary_frequencies\[0\] has shape \(2,\); it must be \(3,\).*rotary_dim",
        {"rotary_frequencies": ([1.0, 1.0], 1.0)},
    ),
    "frequencies, dtype": (TypeError, r"rotary_frequencies\[0\]", {"rotary_frequencies": ([1j, 1.0, 1.0], 1.0)}),
    "frequencies, NaN": (
        ValueError,
        r"rotary_frequencies\[0\] must hold finite",
        {"rotary_frequencies": ([math.nan, 1.0, 1.0], 1.0)},
    ),
    "attention factor": (
        ValueError,
        r"rotary_frequencies\[1\] must be a positive finite number, not 0",
        {"rotary_frequencies": ([1.0, 1.0, 1.0], 0)},
    ),
    "attention factor, type": (TypeError, r"rotary_frequencies\[1\]", {"rotary_frequencies": ([1.0] * 3, None)}),
    "rotary_dim alone": (ValueError, "rotary_dim needs rotary_base", {"rotary_dim": 2}),
    "interleaved": (TypeError, "rotary_interleaved must be True or False", {"rotary_interleaved": 2}),
}


@pytest.mark.parametrize(("error", "message", "wrong"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS)
def test_bad_parameters(rng, error, message, wrong):
    with pytest.raises(error, match=message):
        fastattn.MultiHeadAttention(**parameters(rng) | wrong)


@pytest.mark.skipif(len(sixteen_bits()) < 2, reason="needs ml_dtypes")
def test_mixed_sixteen_bits(rng):
    float16, bfloat16 = sixteen_bits()
    given = parameters(rng, dtype=float16)
    with pytest.raises(TypeError, match=r"float16 and bfloat16 .*x bfloat16"):
        fastattn.MultiHeadAttention(**given)(normal(rng, 5, 24, dtype=bfloat16))
    with pytest.raises(TypeError, match=r"float16 and bfloat16 .*w_key bfloat16"):
        fastattn.MultiHeadAttention(**given | {"w_key": given["w_key"].astype(bfloat16)})


X = np.ones((2, 9, 24), np.float32)
BAD_CALLS = {
    "x": (ValueError, r"x has shape \(2, 9, 23\); it must be \(..., L, 24\): w_query has 24 rows", (X[..., 1:],), {}),
    "x, axes": (ValueError, r"x has shape \(24,\)", (X[0, 0],), {}),
    "x, dtype": (TypeError, "x has dtype complex128", (X.astype(complex),), {}),
    "context": (ValueError, r"context has shape \(2, 9, 2\); it must be \(..., S, 24\)", (X, X[..., :2]), {}),
    "batch": (ValueError, "context has shape .* do not broadcast", (X, np.ones((3, 9, 24))), {}),
    "lengths, heads": (
        ValueError,
        r"key_lengths has shape \(2, 1\).*batch axes are \(2,\).*no axis",
        (X,),
        {"key_lengths": np.ones((2, 1), int)},
    ),
    "lengths, size": (ValueError, r"query_lengths has shape \(3,\)", (X,), {"query_lengths": [1, 2, 3]}),
    "lengths, most": (ValueError, "key_lengths must lie between 0 and 9, not 10", (X,), {"key_lengths": 10}),
    "lengths, least": (ValueError, "key_lengths must lie between 0 and 9, not -1", (X,), {"key_lengths": [3, -1]}),
    "lengths, dtype": (TypeError, "key_lengths must be an integer or .* float64", (X,), {"key_lengths": [3.0, 1.0]}),
    "lengths, bool": (TypeError, "key_lengths must be", (X,), {"key_lengths": True}),
    "lengths, masked": (TypeError, "key_lengths must be", (X,), {"key_lengths": np.ma.masked_array([1, 2])}),
    "lengths, ragged": (TypeError, "key_lengths must be", (X,), {"key_lengths": [[1], [1, 2]]}),
    "offset": (TypeError, "query_offset must be", (X,), {"query_offset": 1.5}),
    "mask": (
        ValueError,
        r"mask has shape \(2, 9, 9\), which does not broadcast to \(2, 4, 9, 9\)",
        (X,),
        {"mask": np.ones((2, 9, 9), bool)},
    ),
    "slopes": (ValueError, "alibi_slopes has shape", (X,), {"alibi_slopes": np.ones(3)}),
    "sinks": (ValueError, "sinks needs activation='softmax'", (X,), {"sinks": np.ones(4), "activation": "relu"}),
}


@pytest.mark.parametrize("d_out", [None, 10])
@pytest.mark.parametrize(("error", "message", "arrays", "wrong"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(rng, error, message, arrays, wrong, d_out):
    out = np.full((2, 9, d_out or 24), 7, np.float32)
    if any(a.dtype != np.float32 for a in arrays):
        out = None
    with pytest.raises(error, match=message):
        fastattn.MultiHeadAttention(**parameters(rng, d_out=d_out))(*arrays, **wrong, out=out)
    assert out is None or (out == 7).all()


@pytest.mark.parametrize("d_out", [None, 24])
def test_bad_out(rng, d_out):
    layer = fastattn.MultiHeadAttention(**parameters(rng, d_out=d_out))
    x, bias = np.ones((2, 9, 24), np.float32), np.ones((2, 4, 9, 9), np.float32)
    good = np.empty_like(x)

    def refuse(error, message, out, **arguments):
        with pytest.raises(error, match=message):
            layer(x, out=out, **arguments)

    refuse(TypeError, "out must be a NumPy array, not list", [1.0])
    refuse(ValueError, "out has shape", good[:1])
    refuse(TypeError, "out has dtype float64", good.astype(float))
    refuse(TypeError, "out has dtype >f4", good.astype(">f4"))
    refuse(ValueError, "out overlaps itself", np.lib.stride_tricks.as_strided(good, strides=(0, 96, 4)))
    refuse(ValueError, "out overlaps x", x)
    refuse(ValueError, "out overlaps x", x[:, ::-1])
    refuse(ValueError, "out overlaps bias", bias.ravel()[: good.size].reshape(good.shape), bias=bias)
    with pytest.raises(ValueError, match="out overlaps context"):
        layer(x.copy(), x, out=x)
    good.flags.writeable = False
    refuse(ValueError, "out is read-only", good)
    assert (x == 1).all() and (bias == 1).all()


def test_context_is_needed(rng):
    layer = fastattn.MultiHeadAttention(**parameters(rng, d_context=9))
    with pytest.raises(ValueError, match="w_query has 24 rows and w_key 9: this layer needs a context"):
        layer(normal(rng, 2, 9, 24))
    layer = fastattn.MultiHeadAttention(**parameters(rng, rotary_base=10.0))
    with pytest.raises(ValueError, match="context and rotary_base do not go together"):
        layer(normal(rng, 2, 9, 24), normal(rng, 2, 9, 24))
    layer = fastattn.MultiHeadAttention(**parameters(rng, rotary_frequencies=([1.0, 1.0, 1.0], 1.0)))
    with pytest.raises(ValueError, match="context and rotary_frequencies do not go together"):
        layer(normal(rng, 2, 9, 24), normal(rng, 2, 9, 24))
    with pytest.raises(ValueError, match="head_dim=5 is odd, give rotary_dim"):
        fastattn.MultiHeadAttention(**parameters(rng, head_dim=5, rotary_base=10.0))


# ----------------------------------------------------------------------------------------- self_attention


def assert_self_attention(x, w_query, w_key, w_value, **arguments):
    """Like one head of a layer without output projection, whose bounds hold here too; the head has no axis."""
    given = {"w_query": w_query, "w_key": w_key, "w_value": w_value, "num_heads": 1, "num_kv_heads": None}
    with_lse = arguments.get("activation", "softmax") == "softmax"
    extras = {"return_weights": True, "return_lse": with_lse}
    expected = reference.self_attention(x, w_query, w_key, w_value, **arguments, **extras)
    dtype = result_dtype(x, w_query, w_key, w_value)
    # Batch axes as heads: one head each.
    per_row = ("mask", "bias", "relative_bias")
    rules = {n: np.asarray(a)[..., None, :, :] if n in per_row and np.ndim(a) > 2 else a for n, a in arguments.items()}
    rules |= {n: np.asarray(rules[n])[..., None] for n in ("alibi_slopes", "sinks") if np.ndim(rules.get(n))}
    parts = [e[..., None, :, :] for e in expected[:2]] + [expected[2][..., None, :] if with_lse else None]
    limits = bounds(given, x, None, parts[0], expected[0], *parts[1:], dtype, **rules)

    plain = fastattn.self_attention(x, w_query, w_key, w_value, **arguments)
    assert plain.dtype == dtype
    assert_within(plain, expected[0], limits[0], "output")
    results = fastattn.self_attention(x, w_query, w_key, w_value, **arguments, **extras)
    assert_within(results[0], expected[0], limits[0], "output beside others")
    assert_within(results[1], expected[1], np.squeeze(limits[1], axis=-3), "weights")
    assert results[1].dtype == accumulation_dtype(dtype)
    if with_lse:
        assert_within(results[2], expected[2], np.squeeze(limits[2], axis=-2), "lse")
    return plain


def three(rng, d_model=12, d_k=6, d_v=5, dtype=np.float32):
    return [(normal(rng, d_model, n) / max(d_model, 1) ** 0.5).astype(dtype) for n in (d_k, d_k, d_v)]


@pytest.mark.parametrize("dtype", (*DTYPES, *sixteen_bits()))
@pytest.mark.parametrize("shape", [(7, 12), (1, 12), (0, 12), (2, 7, 12), (2, 3, 9, 12), (0, 5, 12)])
def test_self_attention(rng, shape, dtype):
    x = normal(rng, *shape, dtype=dtype)
    weights = three(rng, dtype=dtype)
    plain = assert_self_attention(x, *weights)
    out = np.empty_like(plain)
    assert fastattn.self_attention(x, *weights, out=out) is out
    assert bits(out) == bits(plain)


@pytest.mark.parametrize("rule", RULES)
def test_self_attention_rules(rng, rule):
    arguments = rules(rng, (2, 3), 20, 20)[rule]
    assert_self_attention(normal(rng, 2, 3, 20, 12), *three(rng), **arguments)


def test_self_attention_of_a_padded_batch(rng):
    """Key lengths are enough: valid rows as each sequence alone, the rest 0."""
    x, weights = normal(rng, 3, 6, 12), three(rng)
    x[1, 3:] = np.nan
    for rule in ({}, {"is_causal": True}, {"window_size": (1, 1)}):
        out, lse = fastattn.self_attention(x, *weights, key_lengths=[6, 3, 0], return_lse=True, **rule)
        for b, n in enumerate((6, 3, 0)):
            alone = fastattn.self_attention(x[b, :n], *weights, **rule)
            np.testing.assert_allclose(out[b, :n], alone, rtol=1e-5, atol=1e-6)
            assert not out[b, n:].any() and (lse[b, n:] == -np.inf).all()
    every = fastattn.self_attention(x, *weights, key_lengths=3, query_lengths=6)
    assert every[0].all()


def test_self_attention_is_one_head(rng):
    x, weights = normal(rng, 2, 9, 12), three(rng)
    layer = fastattn.MultiHeadAttention(*weights, num_heads=1)
    np.testing.assert_allclose(fastattn.self_attention(x, *weights), layer(x), rtol=1e-5, atol=1e-6)


def test_self_attention_takes_lists():
    out = fastattn.self_attention([[1, 0], [0, 1]], [[1], [0]], [[0], [1]], [[1, 0], [0, 1]])
    np.testing.assert_allclose(out, reference.self_attention(np.eye(2), [[1], [0]], [[0], [1]], np.eye(2)))


def test_self_attention_errors(rng):
    x, (w_query, w_key, w_value) = normal(rng, 2, 9, 12), three(rng)

    def refuse(error, message, *arrays, **arguments):
        with pytest.raises(error, match=message):
            fastattn.self_attention(*arrays, **arguments)

    refuse(ValueError, r"x has shape \(12,\)", x[0, 0], w_query, w_key, w_value)
    refuse(ValueError, r"w_query has shape \(11, 6\); it must be \(12, n\)", x, w_query[1:], w_key, w_value)
    refuse(ValueError, "w_key has 5 columns and w_query 6", x, w_query, w_key[:, 1:], w_value)
    refuse(ValueError, "mask has shape", x, w_query, w_key, w_value, mask=np.ones((3, 9), bool))
    refuse(ValueError, "key_lengths has shape", x, w_query, w_key, w_value, key_lengths=[[1], [2]])
    refuse(TypeError, "w_value has dtype complex64", x, w_query, w_key, w_value * 1j)
    refuse(ValueError, "out has shape", x, w_query, w_key, w_value, out=x)
    refuse(ValueError, "out overlaps x", x, w_query, w_key, w_value, out=x[..., :5])


# ------------------------------------------------------------------------------------------------ PyTorch


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 128, 96, 12), (3, 17, 40, 5)])
def test_like_torch(rng, shape, bias):
    """nn.MultiheadAttention with the same weights; masks there are True where a query may not attend."""
    torch = pytest.importorskip("torch")
    batch, length, d_model, num_heads = shape
    module = torch.nn.MultiheadAttention(d_model, num_heads, bias=bias, batch_first=True).eval()
    if bias:
        torch.nn.init.normal_(module.in_proj_bias)
        torch.nn.init.normal_(module.out_proj.bias)
    layer = fastattn.MultiHeadAttention.from_torch(module.state_dict(), num_heads=num_heads)
    x, context = normal(rng, batch, length, d_model), normal(rng, batch, length + 3, d_model)
    lengths = rng.integers(1, length + 4, batch)
    mask = rng.random((length, length)) < 0.6
    mask[:, 0] = True

    def theirs(query, key, **arguments):
        arguments = {name: torch.from_numpy(np.asarray(a)) for name, a in arguments.items()}
        query, key = torch.from_numpy(query), torch.from_numpy(key)
        with torch.inference_mode():
            out, weights = module(query, key, key, average_attn_weights=False, **arguments)
        return out.numpy(), weights.numpy()

    padding = np.arange(length + 3) >= lengths[:, None]
    for ours, other in (
        (layer(x, return_weights=True), theirs(x, x)),
        (layer(x, context, return_weights=True), theirs(x, context)),
        (layer(x, mask=mask, return_weights=True), theirs(x, x, attn_mask=~mask)),
        (layer(x, context, key_lengths=lengths, return_weights=True), theirs(x, context, key_padding_mask=padding)),
    ):
        # Both are within the bound of the reference, as test_self and test_cross check for ours.
        np.testing.assert_allclose(ours[0], other[0], rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(ours[1], other[1], rtol=1e-4, atol=2e-6)
