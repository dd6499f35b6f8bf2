"""What a layer holds beside its projections: rules of every call, and norms of heads."""

import copy
import inspect
import pickle

import numpy as np
import pytest
from problems import DTYPES, RULES, bits, rules, sixteen_bits
from test_layer_gradients import assert_gradients
from test_multihead import ROTARY, assert_layer, normal, parameters, without_heads

import fastattn
from fastattn import KVCache, reference
from fastattn._rules import HELD, HELD_RULES

NONE = {"is_causal": False}

# Of (num_heads=3): every rule that a layer may hold, alone and together.
HELD_SETS = {
    "is_causal": {"is_causal": True},
    "window": {"window_size": 4},
    "window of two sides": {"window_size": [3, None]},
    "relative bias": {"window_size": (3, 2), "relative_bias": np.linspace(-2, 2, 18).reshape(3, 1, 6)},
    "shared relative bias": {"window_size": (2, 5), "is_causal": True, "relative_bias": np.float32([0.5, -1, 0])},
    "slopes": {"alibi_slopes": np.array([0.5, 0.25, 0.0])},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": np.float32([0.3, -1, 2])},
    "one sink": {"sinks": 0.5},
    "all": {
        "is_causal": True,
        "window_size": (4, 3),
        "relative_bias": np.linspace(-1, 1, 5).reshape(1, 5),
        "alibi_slopes": [0.1, 0.2, 0.3],
        "scale": 0.7,
        "softcap": 5.0,
        "sinks": [0, 1, -1],
    },
}
COPIES = {
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "pickle, protocol 2": lambda layer: pickle.loads(pickle.dumps(layer, 2)),
}


def layer_of(rng, **held):
    given = parameters(rng, 16, 3, 6)
    return fastattn.MultiHeadAttention(**given, **held), fastattn.MultiHeadAttention(**given)


# ------------------------------------------------------------------------------------------ held rules


@pytest.mark.parametrize("held", HELD_SETS)
def test_held_rules_are_those_of_a_call(rng, held):
    """The same bits, with and without a context and a cache."""
    layer, plain = layer_of(rng, **HELD_SETS[held])
    x, context = normal(rng, 2, 9, 16), normal(rng, 2, 12, 16)
    extras = {"return_weights": True, "return_lse": True}
    for arrays in ((x,), (x, context)):
        for got, want in zip(layer(*arrays, **extras), plain(*arrays, **HELD_SETS[held], **extras), strict=True):
            assert bits(got) == bits(want)
    caches = [KVCache(2, 3, 9, 6) for _ in range(2)]
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        got = layer(x[:, begin:end], cache=caches[0])
        assert bits(got) == bits(plain(x[:, begin:end], cache=caches[1], **HELD_SETS[held]))


@pytest.mark.parametrize("held", HELD_SETS)
def test_held_rules_against_the_reference(rng, held):
    given = parameters(rng, 16, 3, 6) | HELD_SETS[held]
    assert_layer(given, normal(rng, 2, 9, 16))
    assert_layer(given, normal(rng, 2, 5, 16), normal(rng, 2, 12, 16), key_lengths=[12, 7])
    assert_gradients(given | {"softcap": None} if held == "all" else given, normal(rng, 2, 9, 16), rng=rng)


@pytest.mark.parametrize("held", HELD_SETS)
def test_none_in_a_call_is_none(rng, held):
    layer, plain = layer_of(rng, **HELD_SETS[held])
    x = normal(rng, 2, 9, 16)
    none = {name: NONE.get(name) for name in HELD_SETS[held]}
    assert bits(layer(x, **none)) == bits(plain(x))
    assert bits(layer.vjp(x, **none)[0]) == bits(plain(x))
    assert bits(layer(x)) != bits(plain(x))
    assert bits(layer(x, **dict.fromkeys(HELD_RULES, HELD))) == bits(layer(x)), "the default itself may be passed on"


@pytest.mark.parametrize("rule", RULES)
def test_a_call_overrides(rng, rule):
    """Whatever it gives replaces what the layer holds, and nothing else."""
    given = parameters(rng, 16, 3, 5)
    own = without_heads(rules(rng, num_queries=20, num_keys=20)[rule])
    held = {"scale": 0.7, "sinks": [0.3, 1.0, -1.0], "alibi_slopes": [0.1, 0.2, 0.3], "is_causal": True}
    if own.get("activation", "softmax") != "softmax":
        held["sinks"] = None
    if "relative_bias" in own:
        held["is_causal"] = False
    layer, plain = fastattn.MultiHeadAttention(**given, **held), fastattn.MultiHeadAttention(**given)
    x = normal(rng, 2, 20, 16)
    assert bits(layer(x, **own)) == bits(plain(x, **held | own))


def test_held_biases_belong_to_the_held_window(rng):
    """Biases of five distances, of which a window of other sides would take those of other distances."""
    bias = normal(rng, 3, 1, 5)
    layer, _ = layer_of(rng, window_size=(3, 1), relative_bias=bias)
    x = normal(rng, 6, 16)
    expected = layer(x)
    for window in ([3, 1], np.array([3, 1])):
        assert bits(layer(x, window_size=window)) == bits(expected)
    for window in ((4, 0), (1, 3), (2, 1), 2, None, (3, None), (3, -1)):
        with pytest.raises(ValueError, match=r"does not go with the relative_bias that the layer holds.*\(3, 1\)"):
            layer(x, window_size=window)
        with pytest.raises(ValueError, match="does not go with the relative_bias"):
            layer(x[:1], cache=fastattn.KVCache((), 3, 9, layer.head_dim), window_size=window)
        assert layer(x, window_size=window, relative_bias=None).shape == (*x.shape[:1], layer.d_out)
    assert bits(layer(x, window_size=(4, 0), relative_bias=bias)) != bits(expected)
    causal, _ = layer_of(rng, window_size=(4, None), is_causal=True, relative_bias=bias)
    assert bits(causal(x, window_size=(4, 0))) == bits(causal(x)) == bits(causal(x, window_size=4))


@pytest.mark.parametrize("held", HELD_SETS)
@pytest.mark.parametrize("of", COPIES.values(), ids=COPIES)
def test_copies_hold_the_same(rng, of, held):
    norms = {"q_norm": rng.uniform(size=6), "k_norm": rng.uniform(size=6), "norm_eps": 1e-3}
    frequencies = {"rotary_frequencies": ([1.0, 0.3, 0.1], 1.1)}
    layer, _ = layer_of(rng, **HELD_SETS[held], **norms, **frequencies)
    other, x = of(layer), normal(rng, 2, 9, 16)
    assert repr(other) == repr(layer)
    assert bits(other(x)) == bits(layer(x))
    assert bits(other(x.astype(np.float64))) == bits(layer(x.astype(np.float64)))
    for name in (*HELD_RULES, "q_norm", "k_norm", "norm_eps"):
        mine, theirs = getattr(layer, name), getattr(other, name)
        assert type(mine) is type(theirs)
        np.testing.assert_array_equal(theirs, mine)
        with pytest.raises(AttributeError):
            setattr(other, name, mine)
        if isinstance(theirs, np.ndarray) and theirs.ndim:
            with pytest.raises(ValueError, match="read-only"):
                theirs[...] = 0
    assert not other.rotary_frequencies[0].flags.writeable
    parameter = other.parameters()["q_norm"]
    before = bits(other(x))
    parameter[...] = 3
    assert bits(other(x)) != before
    assert not other.q_norm.flags.writeable


def test_attributes(rng):
    layer, plain = layer_of(rng, **HELD_SETS["all"])
    assert (layer.is_causal, layer.window_size, layer.scale, layer.softcap) == (True, (4, 3), 0.7, 5.0)
    assert layer.sinks.tolist() == [0, 1, -1]
    assert layer.relative_bias.shape == (1, 5)
    assert (plain.is_causal, plain.window_size, plain.scale, plain.softcap) == (False, None, None, None)
    assert plain.sinks is plain.relative_bias is plain.alibi_slopes is plain.q_norm is plain.k_norm is None
    assert "is_causal=True, window_size=(4, 3), relative_bias of shape (1, 5), alibi_slopes of shape (3,)" in repr(
        layer
    )
    assert "scale=0.7, softcap=5.0, sinks of shape (3,), float32>" in repr(layer)
    assert "is_causal" not in repr(plain)
    shown = inspect.signature(fastattn.MultiHeadAttention.__call__).parameters
    assert [name for name, p in shown.items() if p.default is HELD] == [n for n in shown if n in HELD_RULES]
    assert repr(shown["scale"].default) == "<held>"


def test_held_arrays_are_the_layers_own(rng):
    held = {"sinks": np.array([0.3, 1.0, 2.0]), "alibi_slopes": np.ones(3), "window_size": [3, 2]}
    held["relative_bias"] = np.zeros((3, 1, 6))
    layer, _ = layer_of(rng, **held)
    x = normal(rng, 9, 16)
    before = bits(layer(x))
    for name in ("sinks", "alibi_slopes", "relative_bias"):
        held[name][...] = 7
    held["window_size"][0] = 0
    assert bits(layer(x)) == before


def test_windows_of_layer_and_cache(rng):
    """Without a window in call or layer, that of the cache; a window that the layer holds must fit the cache."""
    layer, plain = layer_of(rng, window_size=(3, None), is_causal=True)
    x = normal(rng, 2, 9, 16)
    whole = layer(x)
    for window in (4, 6, 9):
        cache = KVCache(2, 3, 9, 6, window=window)
        steps = [layer(x[:, i : i + 3], cache=cache) for i in (0, 3, 6)]
        np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, atol=1e-5)
    cache, other = KVCache(2, 3, 9, 6, window=4), KVCache(2, 3, 9, 6, window=4)
    assert bits(layer(x, cache=cache, window_size=None)) == bits(plain(x, cache=other, is_causal=True))
    with pytest.raises(ValueError, match=r"window_size=\(3, None\) lets a query see 3 keys.*window=2"):
        layer(x, cache=KVCache(2, 3, 9, 6, window=2))


BAD = {
    "scale": (ValueError, "scale must be a finite real number", {"scale": np.nan}),
    "scale, type": (TypeError, "scale must be a finite real number", {"scale": "1"}),
    "softcap": (ValueError, "softcap must be a positive finite number", {"softcap": 0.0}),
    "is_causal": (TypeError, "is_causal must be", {"is_causal": 1}),
    "window": (ValueError, "window_size", {"window_size": -2}),
    "window of three": (ValueError, "window_size must be an integer or a pair", {"window_size": (1, 2, 3)}),
    "sinks": (ValueError, r"sinks has shape \(4,\), which does not broadcast to \(3,\)", {"sinks": np.ones(4)}),
    "sinks of a batch": (ValueError, r"sinks has shape \(2, 3\)", {"sinks": np.ones((2, 3))}),
    "slopes": (TypeError, "alibi_slopes", {"alibi_slopes": "steep"}),
    "relative bias alone": (ValueError, "relative_bias needs window_size", {"relative_bias": np.zeros(3)}),
    "relative bias of queries": (
        ValueError,
        r"relative_bias has shape \(3, 5, 3\)",
        {"relative_bias": np.zeros((3, 5, 3)), "window_size": 1},
    ),
    "q_norm": (ValueError, r"q_norm has shape \(18,\); it must be \(6,\)", {"q_norm": np.ones(18)}),
    "k_norm": (TypeError, "k_norm has dtype complex128", {"k_norm": np.ones(6, complex)}),
    "norm_eps": (ValueError, "norm_eps must be a positive finite number, not 0", {"norm_eps": 0}),
    "norm_eps, type": (TypeError, "norm_eps must be a positive finite number", {"norm_eps": None}),
}


@pytest.mark.parametrize(("error", "message", "wrong"), BAD.values(), ids=BAD)
def test_errors(rng, error, message, wrong):
    with pytest.raises(error, match=message):
        fastattn.MultiHeadAttention(**parameters(rng, 16, 3, 6), **wrong)


def test_zero_axes_are_numbers(rng):
    x, (layer, plain) = normal(rng, 9, 16), layer_of(rng, scale=np.array(0.3), softcap=np.float32(2), window_size=3)
    assert (type(layer.scale), type(layer.softcap)) == (float, float)
    assert bits(layer(x)) == bits(plain(x, scale=0.3, softcap=2.0, window_size=3))
    assert not layer_of(rng, is_causal=np.bool_(False))[0].is_causal
    assert layer_of(rng, is_causal=np.bool_(True))[0].is_causal is True


# -------------------------------------------------------------------------------------- norms of heads


def norms(rng, head_dim=6, which="qk"):
    return {f"{c}_norm": rng.uniform(-2, 2, head_dim) for c in which} | {"norm_eps": 1e-5}


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("rotary", [{}, *ROTARY.values()], ids=["plain", *ROTARY])
@pytest.mark.parametrize("which", ["q", "k", "qk"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(rng, dtype, which, rotary, num_kv_heads):
    given = parameters(rng, num_kv_heads=num_kv_heads, value_dim=5, dtype=dtype, **rotary, **norms(rng, which=which))
    x = normal(rng, 2, 9, 24, dtype=dtype)
    assert_layer(given, x)
    assert_layer(given, x, is_causal=True, key_lengths=[9, 4])
    if not rotary:
        assert_layer(given, x, normal(rng, 2, 12, 24, dtype=dtype))


@pytest.mark.parametrize("which", ["q", "k", "qk"])
@pytest.mark.parametrize("batch", [(2,), ()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_through_norms(rng, dtype, batch, which):
    given = parameters(rng, num_kv_heads=2, dtype=dtype, **norms(rng, which=which))
    context = normal(rng, *batch, 12, 24, dtype=dtype)
    assert_gradients(given, normal(rng, 2, 9, 24, dtype=dtype), context, rng=rng)
    assert_gradients(given | {"rotary_base": 30.0}, normal(rng, 2, 9, 24, dtype=dtype), rng=rng, key_lengths=[9, 4])
    assert_gradients(given, normal(rng, 2, 0, 24, dtype=dtype), rng=rng)


def test_the_formula(rng):
    given = parameters(rng, 8, 2, 4, d_out=None, dtype=np.float64)
    weights = {"q_norm": rng.uniform(1, 2, 4), "k_norm": rng.uniform(1, 2, 4), "norm_eps": 0.01}
    x = normal(rng, 5, 8, dtype=np.float64)
    arrays = [
        (x @ given[f"w_{n}"] + given[f"b_{n}"]).reshape(5, 2, 4).swapaxes(0, 1) for n in ("query", "key", "value")
    ]
    for i, name in enumerate(("q_norm", "k_norm")):
        arrays[i] = weights[name] * arrays[i] / np.sqrt((arrays[i] ** 2).sum(-1, keepdims=True) / 4 + 0.01)
    expected = reference.dot_product_attention(*arrays).swapaxes(0, 1).reshape(5, 8)
    np.testing.assert_allclose(fastattn.MultiHeadAttention(**given, **weights)(x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", sixteen_bits())
def test_norms_of_sixteen_bits(rng, dtype):
    given = parameters(rng, dtype=dtype, **norms(rng))
    assert_layer(given, normal(rng, 2, 9, 24, dtype=dtype))
    assert fastattn.MultiHeadAttention(**given).q_norm.dtype == np.float32


def test_norms_do_not_decide_the_dtype(rng):
    """But a call in float64 uses their digits."""
    given = parameters(rng, biases=False, **norms(rng))
    layer = fastattn.MultiHeadAttention(**given)
    assert layer(normal(rng, 3, 24)).dtype == np.float32
    assert_layer(given, normal(rng, 2, 9, 24, dtype=np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_with_norms(rng, dtype):
    given = parameters(rng, num_kv_heads=2, rotary_base=30.0, dtype=dtype, **norms(rng)) | {"is_causal": True}
    layer, x, cache = (
        fastattn.MultiHeadAttention(**given),
        normal(rng, 2, 9, 24, dtype=dtype),
        KVCache(2, 2, 9, 6, dtype=dtype),
    )
    steps = [layer(x[:, i:j], cache=cache) for i, j in ((0, 4), (4, 5), (5, 9))]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), layer(x), atol=1e-4)


def test_bits_do_not_depend_on_batch_and_padding(rng):
    """From the projections on, which are exact here: a head's norm is its own."""
    given = parameters(rng, num_kv_heads=2, d_out=None, biases=False, **norms(rng))
    given |= {name: np.round(8 * given[name]) / 8 for name in ("w_query", "w_key", "w_value")}
    layer, x = fastattn.MultiHeadAttention(**given), np.round(normal(rng, 3, 20, 24) * 8) / 8
    whole = layer(x, key_lengths=[20, 14, 17])
    assert bits(whole[1, :14]) == bits(layer(x[1, :14]))
    assert bits(whole[2:]) == bits(layer(x[2:], key_lengths=[17]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_heads(rng, dtype):
    """Squares overflow long before numbers do."""
    large = np.sqrt(np.finfo(dtype).max) * 100
    x = normal(rng, 4, 6, dtype=dtype)
    x[1:3] *= large
    layer = fastattn.MultiHeadAttention(*3 * [np.eye(6, dtype=dtype)], num_heads=1, **norms(rng))
    same = np.where(np.arange(4)[:, None] % 3 == 0, x, x / large)
    products = layer._stored.products()
    query = [layer._projected(layer._checked(a, None, None, {}), products)[0] for a in (x, same)]
    np.testing.assert_allclose(query[0], query[1], rtol=1e-4)
    out, backward = layer.vjp(x)
    assert np.isfinite(out[:1]).all()
    assert np.isfinite(backward(np.ones_like(out), wrt="q_norm")["q_norm"]).all()


def test_padding_takes_no_part_in_gradients(rng):
    """NaN there, in x or in the gradient, reaches nothing."""
    given = parameters(rng, num_kv_heads=2, **norms(rng))
    layer, x = fastattn.MultiHeadAttention(**given), normal(rng, 2, 9, 24)
    dirty = x.copy()
    dirty[0, 5:] = np.nan
    grad = normal(rng, 2, 9, 10)
    expected = layer.vjp(x, key_lengths=[5, 9])[1](grad)
    grad[0, 5:] = np.nan
    got = layer.vjp(dirty, key_lengths=[5, 9])[1](grad)
    for name, gradient in expected.items():
        assert bits(got[name]) == bits(gradient), name
    assert not got["x"][0, 5:].any()


def test_names(rng):
    layer = fastattn.MultiHeadAttention(**parameters(rng, **norms(rng)), sinks=np.ones(4))
    x = normal(rng, 2, 9, 24)
    out, backward = layer.vjp(x)
    grad = normal(rng, *out.shape)
    usual = backward(grad)
    assert list(usual)[-2:] == ["q_norm", "k_norm"]
    assert tuple(layer.parameters()) == tuple(usual)[1:]
    for name in ("q_norm", "k_norm", "sinks", "x"):
        alone = backward(grad, wrt=name)
        assert tuple(alone) == (name,)
        assert name == "sinks" or bits(alone[name]) == bits(usual[name])
    with pytest.raises(ValueError, match="wrt names 'alibi_slopes', which was not given"):
        backward(grad, wrt="alibi_slopes")
    with pytest.raises(ValueError, match="wrt names 'sinks', which was not given"):
        layer.vjp(x, sinks=None)[1](grad, wrt="sinks")


def test_a_step_of_training(rng):
    """Writing into `parameters` is seen by the next call."""
    layer = fastattn.MultiHeadAttention(**parameters(rng, dtype=np.float64, **norms(rng)))
    x, target = normal(rng, 2, 9, 24, dtype=np.float64), normal(rng, 2, 9, 10, dtype=np.float64)
    losses = []
    for _ in range(5):
        out, backward = layer.vjp(x)
        losses.append(np.sum((out - target) ** 2))
        gradients = backward(2 * (out - target), wrt=("q_norm", "k_norm"))
        for name, gradient in gradients.items():
            layer.parameters()[name][...] -= 1e-3 * gradient
    assert losses == sorted(losses, reverse=True)
