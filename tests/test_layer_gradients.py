"""The way back through layers: MultiHeadAttention.vjp, its parameters, and self_attention_vjp.

The reference is checked against finite differences, and the library against the reference within bounds that are the
same sums over absolute values (`bounds`).
"""

import copy
import inspect
import pickle

import numpy as np
import pytest
from problems import DTYPES, RULES, bits, layouts, rules, sixteen_bits
from test_multihead import ROTARY, held_by, normal, normed, parameters, turned, without_heads
from tolerances import absolute, accumulation_dtype, assert_within, result_dtype, storage_steps

import fastattn
from fastattn import multihead, projections, reference

MATRICES = ("w_query", "w_key", "w_value", "w_out")
NAMES = (*MATRICES, "b_query", "b_key", "b_value", "b_out")
ADDED = ("bias", "relative_bias", "alibi_slopes", "sinks")
# Without gradients of their own in a plain sense: weights of 0 are cut off.
SPARSE = ("sparsemax", "entmax15 of some keys")
SMOOTH = tuple(rule for rule in RULES if rule not in SPARSE)


# ---------------------------------------------------------------------------------------------- the bounds


def bounds(given, x, context, grad_out, weights, dtype, *, scale=None, softcap=None, activation="softmax", **arguments):
    """How far each gradient of a layer may be from the reference's.

    All absolute values are added up along the same ways, there and back: for a row with scores of size s an eps of them
    counts 8 s + 16 times, as in attention alone (a weight is off by its score's error, and its gradient is a difference
    that may cancel), and 8 times more for each of the four projections on the way.
    """
    eps = float(np.finfo(accumulation_dtype(dtype)).eps) * (2 if dtype == np.float64 else 1)
    num_heads, kv_heads = given["num_heads"], given["num_kv_heads"] or given["num_heads"]
    rotary = [given.get(name) for name in ("rotary_base", "rotary_frequencies", "rotary_interleaved", "rotary_dim")]
    itself = context is None
    x, context = (np.asarray(a, np.float64) for a in (x, x if itself else context))
    raw_query = reference.split_heads(reference.project(x, given["w_query"], given.get("b_query")), num_heads)
    raw_key = reference.split_heads(reference.project(context, given["w_key"], given.get("b_key")), kv_heads)
    x, context = np.abs(x), np.abs(context)
    w = {name: None if given.get(name) is None else np.abs(np.asarray(given[name], np.float64)) for name in NAMES}

    query = reference.split_heads(absolute(x, w["w_query"], w["b_query"]), num_heads)
    key = reference.split_heads(absolute(context, w["w_key"], w["b_key"]), kv_heads)
    value = reference.split_heads(absolute(context, w["w_value"], w["b_value"]), kv_heads)
    raw_sizes, norm_eps = (query, key), given.get("norm_eps", 1e-6)
    query, key = (
        normed(raw, size, given.get(name), norm_eps)[1]
        for raw, size, name in ((raw_query, query, "q_norm"), (raw_key, key, "k_norm"))
    )
    query, key = turned(query, *rotary), turned(key, *rotary)
    all_keys, all_values = reference.repeat_heads(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else abs(scale)
    size = scale * query @ all_keys.swapaxes(-1, -2)
    largest = np.max(np.broadcast_to(size, weights.shape), axis=-1, keepdims=True, initial=0.0)
    for name in ("bias", "relative_bias"):
        if arguments.get(name) is not None:
            there = np.abs(np.nan_to_num(arguments[name], neginf=0.0))
            largest = largest + np.max(there, axis=-1, keepdims=True, initial=0.0)
    if arguments.get("alibi_slopes") is not None:
        largest = largest + np.abs(reference.per_row(arguments["alibi_slopes"])) * 2 * max(weights.shape[-2:])
    times = eps * (8 * largest + 16 + 4 * 8)

    grad = np.abs(np.asarray(grad_out, np.float64))
    d_heads = reference.split_heads(grad if w["w_out"] is None else grad @ w["w_out"].T, num_heads)
    d_weights = d_heads @ all_values.swapaxes(-1, -2)
    slope = weights
    if activation == "relu":  # one share for each visible key, at most for one alone
        slope = np.where(weights != 0, 1.0, 0.0)
    if activation == "softmax":
        d_weights = d_weights + np.sum(weights * d_weights, axis=-1, keepdims=True)
    d_score = times * slope * d_weights
    d_query = scale * d_score @ all_keys
    d_key = scale * d_score.swapaxes(-1, -2) @ query
    d_value = (times * weights).swapaxes(-1, -2) @ d_heads
    d_key, d_value = (
        d.reshape(*d.shape[:-3], kv_heads, num_heads // kv_heads, *d.shape[-2:]).sum(axis=-3) for d in (d_key, d_value)
    )
    # Of broadcast batch axes: the sum, over a batch axis of x or of context that the other lacks.
    d_query, d_key, d_value = (
        summed(turned(d, *rotary) if turns else d, a.shape)
        for d, a, turns in ((d_query, query, True), (d_key, key, True), (d_value, value, False))
    )
    d_query, d_q_norm = before_norm(d_query, raw_query, raw_sizes[0], given.get("q_norm"), norm_eps)
    d_key, d_k_norm = before_norm(d_key, raw_key, raw_sizes[1], given.get("k_norm"), norm_eps)
    d_query, d_key, d_value = map(reference.join_heads, (d_query, d_key, d_value))
    limits = {"w_query": absolute_sum(x, d_query), "w_key": absolute_sum(context, d_key)}
    limits |= {"q_norm": d_q_norm, "k_norm": d_k_norm}
    limits["w_value"] = absolute_sum(context, d_value)
    for name, d in (("b_query", d_query), ("b_key", d_key), ("b_value", d_value)):
        limits[name] = d.reshape(-1, d.shape[-1]).sum(0)
    limits["x"] = d_query @ w["w_query"].T
    limits["context"] = d_key @ w["w_key"].T + d_value @ w["w_value"].T
    if itself:
        limits["x"] = limits["x"] + limits.pop("context")
    heads = (times * weights) @ all_values
    limits["w_out"] = absolute_sum(reference.join_heads(np.broadcast_to(heads, d_heads.shape)), grad)
    limits["b_out"] = 8 * eps * grad.reshape(-1, grad.shape[-1]).sum(0)
    d_score = np.broadcast_to(d_score, weights.shape)
    for name in ADDED:
        if arguments.get(name) is not None:
            limits[name] = np.full(np.shape(arguments[name]), d_score.sum() * max(weights.shape[-2:]))
    return limits


def before_norm(d, raw, size, weight, eps):
    """How far the gradients of heads before their norm, and of its weight, may be off, where those after it are off by
    d; d also holds many times eps of their absolute values, which the size of a head over its root multiplies."""
    if weight is None:
        return d, None
    root = np.sqrt(np.mean(raw * raw, axis=-1, keepdims=True) + eps)
    size, weight = size / root, np.abs(np.asarray(weight, np.float64))
    before = (d * weight + size * np.mean(size * d * weight, axis=-1, keepdims=True)) / root
    return before * np.max(1 + size, axis=-1, keepdims=True, initial=1), (d * size).reshape(-1, d.shape[-1]).sum(0)


def summed(a, shape):
    """The sum over the axes that `shape` lacks, or in which it is 1."""
    a = a.sum(axis=tuple(range(a.ndim - len(shape))))
    return a.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True).reshape(shape)


def absolute_sum(x, d_y):
    return x.reshape(-1, x.shape[-1]).T @ d_y.reshape(-1, d_y.shape[-1])


def assert_gradients(given, x, context=None, *, rng, layer=None, **arguments):
    """Call backward with a random gradient, and compare all that it returns with the reference. Returns them."""
    layer = layer or fastattn.MultiHeadAttention(**given)
    theory = reference.MultiHeadAttention(**given)
    out, backward = layer.vjp(x, context, **arguments)
    assert bits(out) == bits(layer(x, context, **arguments))
    assert out.dtype == layer(x, context, **arguments).dtype
    grad = normal(rng, *out.shape).astype(out.dtype)
    rest = {name: a for name, a in arguments.items() if name != "num_threads"}
    expected_out, theirs = theory.vjp(x, context, **rest)
    _, weights = theory(x, context, **rest, return_weights=True)
    np.testing.assert_array_equal(expected_out, theory(x, context, **rest))

    own = (*NAMES, "q_norm", "k_norm")
    names = ("x", *(["context"] if context is not None else []), *(n for n in own if given.get(n) is not None))
    usual = backward(grad)
    assert tuple(usual) == names
    held = held_by(given, rest)
    names += tuple(name for name in ADDED if name in arguments or name in held)
    got, expected = backward(grad, wrt=names), theirs(grad, wrt=names)
    assert tuple(got) == names
    dtype = result_dtype(x, *([] if context is None else [context]), *(given[w] for w in MATRICES if w in given))
    limits = bounds(given, x, context, grad, weights, dtype, **rest, **held)
    arrays = {"x": np.asarray(x), "context": context, **held, **arguments, **layer.parameters()}
    for name in names:
        array = np.asarray(arrays[name])
        kind = np.dtype(np.float64) if array.dtype.kind in "iub" else array.dtype
        assert got[name].dtype == kind, name
        assert got[name].shape == array.shape, name
        storage, step = storage_steps(kind)
        assert_within(got[name], expected[name], limits[name] + storage * np.abs(expected[name]) + step, name)
        if name in usual:
            assert bits(usual[name]) == bits(got[name]), name
    return got


# --------------------------------------------------------------------------------- the reference is right


NORMS = np.array([1.0, 0.5, -0.7, 2.0, 0.0, 1.3]), np.array([0.9, 1.1, 0.4, 1.0, -1.0, 0.6])
LAYERS = {
    "plain": {},
    "no output projection": {"d_out": None},
    "no biases": {"biases": False},
    "groups": {"num_kv_heads": 2, "value_dim": 5},
    "rotary": {"rotary_base": 30.0},
    "rotary groups": {"num_kv_heads": 1, "rotary_frequencies": ([0.3, 0.1], 1.3), "rotary_dim": 4},
    "norms of heads": {"num_kv_heads": 2, "q_norm": NORMS[0], "k_norm": NORMS[1], "rotary_base": 30.0},
    "one norm": {"q_norm": NORMS[0], "norm_eps": 0.3, "value_dim": 5},
}


@pytest.mark.parametrize("rule", SMOOTH)
@pytest.mark.parametrize("kind", LAYERS)
def test_reference_against_finite_differences(rng, kind, rule):
    arguments = without_heads(rules(rng, (2, 4), 7, 7, dtype=np.float64)[rule])
    given = parameters(rng, 8, 4, 6, dtype=np.float64, **LAYERS[kind])
    check_differences(rng, given, normal(rng, 2, 7, 8, dtype=np.float64), None, arguments)


@pytest.mark.parametrize(("batch", "other"), [((), ()), ((2,), (1,)), ((2,), ()), ((3,), (2, 1)), ((), (2,))])
def test_reference_of_a_context(rng, batch, other):
    given = parameters(rng, 8, 4, 6, d_context=5, dtype=np.float64)
    x, context = normal(rng, *batch, 4, 8, dtype=np.float64), normal(rng, *other, 6, 5, dtype=np.float64)
    check_differences(rng, given, x, context, {"bias": normal(rng, 4, 1, 6, dtype=np.float64)})


def check_differences(rng, given, x, context, arguments):
    """Along a random direction in all entries of an array; padding has no gradient, so none comes in there."""
    layer = reference.MultiHeadAttention(**given)
    out, backward = layer.vjp(x, context, **arguments)
    lengths = arguments.get("query_lengths", arguments.get("key_lengths") if context is None else None)
    grad = rng.standard_normal(out.shape)
    if lengths is not None:
        grad *= (np.arange(out.shape[-2]) < np.asarray(lengths)[..., None])[..., None]
    given_too = {name: arguments[name] for name in ADDED if name in arguments}
    arrays = {"x": x, **({} if context is None else {"context": context}), **layer.parameters(), **given_too}
    gradients = backward(grad, wrt=tuple(arrays))
    assert gradients.keys() == arrays.keys()
    for name, array in arrays.items():
        assert gradients[name].shape == array.shape
        start, step = array.copy(), 1e-5
        direction = rng.standard_normal(array.shape)
        losses = []
        for sign in (1, -1):
            array[...] = start + sign * step * direction
            losses.append(np.sum(layer(x, context, **arguments) * grad))
        array[...] = start
        expected = (losses[0] - losses[1]) / (2 * step)
        size = np.abs(gradients[name] * direction).sum()
        assert abs(np.sum(gradients[name] * direction) - expected) <= 1e-6 * (1 + size), name


@pytest.mark.parametrize("rule", SMOOTH)
def test_reference_of_self_attention(rng, rule):
    """It is a layer of one head; batch axes are then heads' axes too."""
    arguments = rules(rng, (2, 3), 7, 7, dtype=np.float64)[rule]
    x, (w_query, w_key, w_value) = normal(rng, 2, 3, 7, 8, dtype=np.float64), three(rng, dtype=np.float64)
    softmax = arguments.get("activation", "softmax") == "softmax"
    arrays = {"x": x, "w_query": w_query, "w_key": w_key, "w_value": w_value}
    arrays |= {name: arguments[name] for name in ADDED if name in arguments}

    def call():
        answer = reference.self_attention(x, w_query, w_key, w_value, return_lse=softmax, **arguments)
        return answer if softmax else (answer, np.zeros(answer.shape[:-1]))

    out, lse = call()
    grad, grad_lse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    lengths = arguments.get("query_lengths", arguments.get("key_lengths"))
    if lengths is not None:
        grad_lse *= np.arange(7) < np.asarray(lengths)[..., None]
    also = {"grad_lse": grad_lse} if softmax else {}
    gradients = reference.self_attention_vjp(grad, x, w_query, w_key, w_value, wrt=tuple(arrays), **also, **arguments)
    for gradient, (name, array) in zip(gradients, arrays.items(), strict=True):
        start, step, losses = array.copy(), 1e-5, []
        direction = rng.standard_normal(array.shape)
        for sign in (1, -1):
            array[...] = start + sign * step * direction
            out, lse = call()
            losses.append(np.sum(out * grad) + np.sum(np.where(lse == -np.inf, 0, lse) * grad_lse))
        array[...] = start
        expected = (losses[0] - losses[1]) / (2 * step)
        assert abs(np.sum(gradient * direction) - expected) <= 1e-6 * (1 + np.abs(gradient * direction).sum()), name


# ------------------------------------------------------------------------------------- the layer is right


def test_signatures_are_those_of_the_reference():
    ours = inspect.signature(fastattn.MultiHeadAttention.vjp).parameters
    theirs = inspect.signature(reference.MultiHeadAttention.vjp).parameters
    assert {(p.name, p.kind, repr(p.default)) for p in ours.values()} == {
        (p.name, p.kind, repr(p.default)) for p in theirs.values()
    }
    call = inspect.signature(fastattn.MultiHeadAttention.__call__).parameters
    forward_only = {"cache", "cu_seqlens", "cu_seqlens_context", "return_weights", "return_lse", "out"}
    assert set(call) - set(ours) == forward_only


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 24), (1, 24), (0, 24), (2, 7, 24), (2, 3, 17, 24), (0, 5, 24), (2, 1, 24)])
@pytest.mark.parametrize("kind", LAYERS)
def test_self(rng, kind, shape, dtype):
    assert_gradients(parameters(rng, dtype=dtype, **LAYERS[kind]), normal(rng, *shape, dtype=dtype), rng=rng)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_context", [24, 9])
@pytest.mark.parametrize(
    ("batch", "other"), [((), ()), ((2,), (2,)), ((2, 3), (2, 3)), ((2,), (1,)), ((2,), ()), ((3,), (2, 1)), ((), (2,))]
)
def test_cross(rng, batch, other, d_context, dtype):
    given = parameters(rng, d_context=d_context, dtype=dtype, num_kv_heads=2)
    x, context = normal(rng, *batch, 5, 24, dtype=dtype), normal(rng, *other, 19, d_context, dtype=dtype)
    assert_gradients(given, x, context, rng=rng)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_kv_heads", [3, 1])
@pytest.mark.parametrize("rule", SMOOTH)
def test_rules(rng, rule, num_kv_heads, dtype):
    given = parameters(rng, 16, 3, 5, num_kv_heads=num_kv_heads, dtype=dtype)
    arguments = without_heads(rules(rng, num_queries=20, num_keys=20, dtype=dtype)[rule])
    assert_gradients(given, normal(rng, 2, 20, 16, dtype=dtype), rng=rng, **arguments)
    arguments = without_heads(rules(rng, num_queries=6, num_keys=31, dtype=dtype)[rule])
    assert_gradients(given, *(normal(rng, 2, n, 16, dtype=dtype) for n in (6, 31)), rng=rng, **arguments)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(rng, dtype, rotary, num_kv_heads):
    given = parameters(rng, num_kv_heads=num_kv_heads, value_dim=5, dtype=dtype, **ROTARY[rotary])
    x = normal(rng, 2, 9, 24, dtype=dtype)
    lengths = {"key_lengths": np.array([9, 4]), "query_lengths": np.array([7, 4])}
    for arguments in ({}, {"is_causal": True}, {"query_offset": [-2, 5]}, {"key_lengths": 6}, lengths):
        assert_gradients(given, x, rng=rng, **arguments)


@pytest.mark.parametrize("name", ["x", "context", *MATRICES])
@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_promotion(rng, name, dtype):
    """One of them float64, or an integer: everything is in float64, and each gradient has the dtype of its array."""
    given = parameters(rng)
    arrays = {"x": normal(rng, 2, 5, 24), "context": normal(rng, 2, 8, 24)}
    owner = arrays if name in arrays else given
    owner[name] = (2 * owner[name]).astype(dtype)
    assert_gradients(given, **arrays, rng=rng)


@pytest.mark.parametrize("dtype", sixteen_bits())
@pytest.mark.parametrize("d_out", [None, 10])
def test_sixteen_bits(rng, d_out, dtype):
    """Weights are in float32, and so are their gradients; that of x is rounded once."""
    got = assert_gradients(parameters(rng, d_out=d_out, dtype=dtype), normal(rng, 2, 9, 24, dtype=dtype), rng=rng)
    assert got["x"].dtype == dtype
    assert got["w_query"].dtype == np.float32


def test_layouts(rng):
    given, x, context = parameters(rng), normal(rng, 2, 9, 24), normal(rng, 2, 7, 24)
    layer = fastattn.MultiHeadAttention(**given)
    grad = normal(rng, 2, 9, 10)
    for arrays in ((x,), (x, context)):
        plain = layer.vjp(*arrays)[1](grad)
        for i, array in enumerate(arrays):
            for name, same in layouts(array):
                got = layer.vjp(*arrays[:i], same, *arrays[i + 1 :])[1](grad)
                assert all(bits(got[n]) == bits(plain[n]) for n in plain), name
        for name, same in layouts(grad):
            got = layer.vjp(*arrays)[1](same)
            assert all(bits(got[n]) == bits(plain[n]) for n in plain), name
    ones = layer.vjp(x)[1](np.broadcast_to(np.float32(1), grad.shape))
    same = layer.vjp(x)[1](np.ones_like(grad))
    assert all(bits(ones[n]) == bits(same[n]) for n in same)


def test_names(rng):
    layer = fastattn.MultiHeadAttention(**parameters(rng, num_kv_heads=2, rotary_base=100.0))
    x, sinks = normal(rng, 2, 9, 24), normal(rng, 4)
    bias = normal(rng, 9, 9)
    out, backward = layer.vjp(x, is_causal=True, sinks=sinks, bias=bias)
    grad = normal(rng, *out.shape)
    every = backward(grad, ("x", *NAMES, "sinks", "bias"))
    for name, gradient in every.items():
        alone = backward(grad, wrt=name)
        assert tuple(alone) == (name,)
        assert bits(alone[name]) == bits(gradient), name
    for names in (("w_key", "x"), ["b_value", "b_key"], ("bias", "w_out"), ()):
        some = backward(grad, names)
        assert tuple(some) == tuple(names)
        assert all(bits(some[name]) == bits(every[name]) for name in names)
    for wrt, words in (
        ("context", "'context', which was not given; those that can be named are 'x', 'w_query', 'w_key', 'w_value', "
         "'w_out', 'b_query', 'b_key', 'b_value', 'b_out', 'bias', 'sinks'"),
        (("x", "scale"), "wrt names 'scale'; those"),
        (("x", "x"), "twice"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            backward(grad, wrt)
    for wrt, got in ((3, "int"), (layer.parameters(), "dict"), (("x", x), "tuple with ndarray")):
        with pytest.raises(TypeError, match=f"wrt must be a name or a tuple of names, of 'x', .*, not {got}$"):
            backward(grad, wrt)
    with pytest.raises(TypeError, match="takes no wrt: the function that it returns does"):
        layer.vjp(x, wrt="x")
    with pytest.raises(ValueError, match=r"grad_out has shape \(2, 9, 9\); it must have that of the result"):
        backward(grad[..., 1:])
    with pytest.raises(TypeError, match="grad_out has dtype complex64"):
        backward(grad * 1j)


def test_the_layer_refuses_what_it_does_not_take(rng):
    layer, x = fastattn.MultiHeadAttention(**parameters(rng)), normal(rng, 2, 9, 24)
    cache = fastattn.KVCache(2, 4, 20, 6)
    for other in ({"cache": cache}, {"return_lse": True}, {"return_weights": True}, {"out": x}, {"enable_gqa": True}):
        with pytest.raises(TypeError, match=rf"vjp\(\) got an unexpected keyword argument '{next(iter(other))}'"):
            layer.vjp(x, **other)
    for wrong in ({"key_lengths": 10}, {"activation": "tanh"}, {"bias": x}, {"num_threads": 0}):
        with pytest.raises((ValueError, TypeError)) as ours:
            layer(x, **wrong)
        with pytest.raises(ours.type) as theirs:
            layer.vjp(x, **wrong)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("d_out", [None, 24])
def test_a_residual_connection_in_place(rng, d_out):
    """What happens to x and to the output before the way back changes nothing."""
    layer = fastattn.MultiHeadAttention(**parameters(rng, d_out=d_out))
    x, context, grad = normal(rng, 2, 9, 24), normal(rng, 2, 7, 24), normal(rng, 2, 9, 24)
    for arrays in ((x,), (x, context)):
        expected = layer.vjp(*arrays)[1](grad)
        mine = [array.copy() for array in arrays]
        out, backward = layer.vjp(*mine)
        mine[0] += out
        out += mine[0]
        for array in mine:
            array *= 2
        for _ in range(2):
            got = backward(grad)
            assert all(bits(got[n]) == bits(expected[n]) for n in expected)
        got["b_query"][...] = 7  # and results are the caller's
        assert bits(backward(grad)["b_query"]) == bits(expected["b_query"])


def test_one_token(rng):
    """No gradient is a view of the one that came in."""
    layer, grad = fastattn.MultiHeadAttention(**parameters(rng, d_out=None)), normal(rng, 1, 24)
    got = layer.vjp(normal(rng, 1, 24))[1](grad)
    assert not any(np.shares_memory(gradient, grad) for gradient in got.values())
    layer = fastattn.MultiHeadAttention(**parameters(rng))
    grad = normal(rng, 1, 10)
    got = layer.vjp(normal(rng, 1, 24))[1](grad)
    assert not any(np.shares_memory(gradient, grad) for gradient in got.values())


def not_turned_back(layer, monkeypatch):
    turn = layer._turn
    monkeypatch.setattr(layer, "_turn", lambda heads, offset, threads, back: turn(heads, offset, threads, False))


def two_uses(layer, monkeypatch):
    """The gradient of x misses that of the value."""

    def without_value(weights):
        every = weights.every.copy()
        every[:, -layer.num_kv_heads * layer.value_dim :] = 0
        return weights._replace(every=every)

    back = layer._back_from_heads
    monkeypatch.setattr(
        layer, "_back_from_heads", lambda call, weights, *rest: back(call, without_value(weights), *rest)
    )


def biases_of_one_block(layer, monkeypatch):
    monkeypatch.setattr(multihead, "sum_of_rows", lambda d_y: d_y[:16].sum(axis=0))


@pytest.mark.parametrize("wrong", [not_turned_back, two_uses, biases_of_one_block])
def test_wrong_ways_back_are_found_out(rng, wrong, monkeypatch):
    given, x = parameters(rng, rotary_base=30.0, dtype=np.float64), normal(rng, 2, 9, 24, dtype=np.float64)
    layer = fastattn.MultiHeadAttention(**given)
    assert_gradients(given, x, rng=rng, layer=layer)
    wrong(layer, monkeypatch)
    with pytest.raises(AssertionError, match="outside the bound"):
        assert_gradients(given, x, rng=rng, layer=layer)


# ------------------------------------------------------------------------------------------ what takes part


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rule", [{}, {"is_causal": True}, {"window_size": (1, 1)}], ids=str)
def test_padding_takes_no_part(rng, rule, kind):
    """Neither by what x and grad_out hold there nor by its number; and its own gradient is 0."""
    layer, x = fastattn.MultiHeadAttention(**parameters(rng, **LAYERS[kind])), normal(rng, 3, 6, 24)
    lengths = [6, 3, 0]
    out, backward = layer.vjp(x, key_lengths=lengths, **rule)
    grad = normal(rng, *out.shape)
    plain = backward(grad)
    for bad in (np.nan, np.inf, 0):
        worse, worse_grad = x.copy(), grad.copy()
        for b, n in enumerate(lengths):
            worse[b, n:] = worse_grad[b, n:] = bad
        got = layer.vjp(worse, key_lengths=lengths, **rule)[1](worse_grad)
        for name in plain:
            np.testing.assert_array_equal(got[name], plain[name], err_msg=name)
        for b, n in enumerate(lengths):
            assert not got["x"][b, n:].any()
    parts = [layer.vjp(x[b, :n], **rule)[1](grad[b, :n]) for b, n in enumerate(lengths[:2])]
    for name in plain.keys() - {"x"}:
        np.testing.assert_allclose(plain[name], parts[0][name] + parts[1][name], rtol=1e-4, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(plain["x"][1, :3], parts[1]["x"], rtol=1e-4, atol=1e-5)


def test_padding_of_a_context(rng):
    layer = fastattn.MultiHeadAttention(**parameters(rng))
    x, context, grad = normal(rng, 2, 6, 24), normal(rng, 2, 8, 24), normal(rng, 2, 6, 10)
    rule = {"key_lengths": [5, 0], "query_lengths": [4, 6]}
    plain = layer.vjp(x, context, **rule)[1](grad)
    x[0, 4:] = context[0, 5:] = context[1] = grad[0, 4:] = np.nan
    got = layer.vjp(x, context, **rule)[1](grad)
    for name in plain:
        np.testing.assert_array_equal(got[name], plain[name], err_msg=name)
    assert not got["context"][0, 5:].any() and not got["context"][1].any() and not got["x"][0, 4:].any()
    # Rows that see no key are ordinary rows of the last product.
    assert got["b_out"] == pytest.approx(np.float64(grad[0, :4]).sum(0) + np.float64(grad[1]).sum(0), rel=1e-5)


def test_tokens_that_nobody_sees_take_no_part(rng):
    layer = fastattn.MultiHeadAttention(**parameters(rng))
    x, context, grad = normal(rng, 2, 6, 24), normal(rng, 2, 8, 24), normal(rng, 2, 6, 10)
    mask = np.ones((2, 1, 1, 8), bool)
    mask[0, ..., 3] = mask[1, ..., 5:] = False
    plain = layer.vjp(x, context, mask=mask)[1](grad)
    context[0, 3] = np.nan
    context[1, 5:] = np.inf
    got = layer.vjp(x, context, mask=mask)[1](grad)
    for name in plain:
        np.testing.assert_array_equal(got[name], plain[name], err_msg=name)
    # A head that does see it has NaN in its own weights only.
    heads = np.broadcast_to(mask, (2, 4, 1, 8)).copy()
    heads[0, 2, ..., 3] = True
    got = layer.vjp(x, context, mask=heads)[1](grad)
    for name in ("w_key", "w_value", "b_key"):
        of_head = np.isnan(got[name].reshape(*got[name].shape[:-1], 4, 6)).reshape(-1, 4, 6).any(axis=(0, 2))
        assert of_head.tolist() == [False, False, True, False], name


def test_nan_in_what_takes_part_is_seen(rng):
    layer, x, grad = fastattn.MultiHeadAttention(**parameters(rng)), normal(rng, 2, 6, 24), normal(rng, 2, 6, 10)
    x[1, 2] = np.nan
    got = layer.vjp(x)[1](grad)
    assert np.isfinite(got["x"][0]).all() and np.isnan(got["x"][1]).all()
    assert all(np.isnan(got[name]).all() for name in MATRICES)


# ------------------------------------------------------------------------------------------ long sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 255, 256, 257, 513, 30000])
@pytest.mark.parametrize("kind", ["equal", "positive", "normal"])
def test_sums_over_tokens(rng, kind, count, dtype):
    """Within 8 eps of the same sums over absolute values, however many terms there are; equal terms, which BLAS rounds
    alike, within 32."""
    x, d_y = normal(rng, count, 7, dtype=dtype), normal(rng, count, 5, dtype=dtype)
    if kind == "positive":
        x, d_y = np.abs(x), np.abs(d_y)
    if kind == "equal":
        x[...], d_y[...] = 1 / 3, 0.7
    wide = np.longdouble
    limit = (32 if kind == "equal" else 8) * np.finfo(dtype).eps
    error = np.abs(projections.outer_sum(x, d_y) - x.T.astype(wide) @ d_y.astype(wide))
    assert (error <= limit * (np.abs(x.T).astype(wide) @ np.abs(d_y).astype(wide))).all()
    error = np.abs(projections.sum_of_rows(d_y) - d_y.astype(wide).sum(axis=0))
    assert (error <= limit * np.abs(d_y).astype(wide).sum(axis=0)).all()
    assert projections.sum_of_rows(d_y).dtype == projections.outer_sum(x, d_y).dtype == dtype


def test_zero_wins_over_nan_in_sums(rng):
    x, d_y = normal(rng, 300, 4), normal(rng, 300, 3)
    d_y[7], d_y[8, 1] = 0, 0
    expected = projections.outer_sum(x, d_y)
    x[7], x[8] = np.nan, np.inf
    with np.errstate(all="ignore"):
        got = projections.outer_sum(x, d_y)
        np.testing.assert_allclose(got[:, 1], expected[:, 1], rtol=1e-5, atol=1e-4)
        assert not np.isfinite(got[:, [0, 2]]).any()
        np.testing.assert_allclose(projections.outer_sum(d_y, x)[1], got[:, 1], rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(np.isfinite(reference.outer_sum(x, d_y)), np.isfinite(got))


# ---------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("d_context", [24, 9])
@pytest.mark.parametrize("dtype", (*DTYPES, *sixteen_bits()))
def test_what_is_written_the_next_call_uses(rng, dtype, d_context):
    given = parameters(rng, num_kv_heads=2, value_dim=5, d_context=d_context, dtype=dtype)
    other = parameters(rng, num_kv_heads=2, value_dim=5, d_context=d_context, dtype=dtype)
    layer, wanted = fastattn.MultiHeadAttention(**given), fastattn.MultiHeadAttention(**other)
    x, context = normal(rng, 2, 9, 24, dtype=dtype), normal(rng, 2, 7, d_context, dtype=dtype)
    mine = layer.parameters()
    assert tuple(mine) == NAMES
    for name, array in mine.items():
        assert array.flags.writeable
        assert array.dtype == accumulation_dtype(np.dtype(dtype))
        np.testing.assert_array_equal(array, given[name].astype(array.dtype))
        array[...] = other[name]
    assert bits(layer(x, context)) == bits(wanted(x, context))
    # A call in float64 takes what was written too: in the layer's dtype.
    np.testing.assert_allclose(
        layer(x.astype(np.float64), context), wanted(x.astype(np.float64), context), rtol=1e-5, atol=1e-6
    )
    for name, array in layer.parameters().items():
        assert np.shares_memory(array, mine[name]), name
        attribute = getattr(layer, name)
        assert bits(attribute) == bits(array)
        with pytest.raises(ValueError, match="read-only"):
            attribute[...] = 0


def test_names_of_parameters_are_those_that_the_layer_has(rng):
    given = parameters(rng, biases=False, d_out=None)
    assert tuple(fastattn.MultiHeadAttention(**given).parameters()) == MATRICES[:3]
    given["b_key"] = normal(rng, 24)
    for module in (fastattn, reference):
        layer = module.MultiHeadAttention(**given)
        assert tuple(layer.parameters()) == (*MATRICES[:3], "b_key")
        assert set(layer.vjp(np.ones((2, 24)))[1](np.ones((2, 24)))) == {"x", *layer.parameters()}


def test_digits_of_biases(rng):
    """Beside float32 weights a call in float64 has the biases as given, but for the numbers written since."""
    given = parameters(rng)
    given |= {name: normal(rng, *given[name].shape, dtype=np.float64) for name in NAMES[4:]}
    x = normal(rng, 2, 9, 24, dtype=np.float64)
    layer = fastattn.MultiHeadAttention(**given)
    before = layer(x)
    mine = layer.parameters()
    assert bits(layer(x)) == bits(before)
    mine["b_out"][3] = 2.5
    given["b_out"][3] = 2.5
    assert bits(layer(x)) == bits(fastattn.MultiHeadAttention(**given)(x))
    mine["b_value"] += 1
    assert_within(
        layer(x), reference.MultiHeadAttention(**given | {"b_value": given["b_value"] + 1})(x), 1e-5, "with a change"
    )


def test_parameters_of_copies(rng):
    """A pickle's memory may be read-only; a shallow copy shares memory, a deep one does not."""
    given, x = parameters(rng, num_kv_heads=2), normal(rng, 2, 9, 24)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        layer = fastattn.MultiHeadAttention(**given)
        other = pickle.loads(pickle.dumps(layer, protocol))
        before = bits(layer(x))
        mine = other.parameters()
        for array in mine.values():
            array *= 2
        assert all(np.shares_memory(array, mine[name]) for name, array in other.parameters().items())
        double = fastattn.MultiHeadAttention(**given | {name: 2 * given[name] for name in NAMES})
        assert bits(other(x)) == bits(double(x))
        assert bits(layer(x)) == before
        again = pickle.loads(pickle.dumps(other, protocol))
        assert bits(again(x)) == bits(double(x))
        assert len(pickle.dumps(other, protocol)) < 1.1 * len(pickle.dumps(layer, protocol))
    deep, shallow = copy.deepcopy(layer), copy.copy(layer)
    layer.parameters()["b_out"] += 1
    assert bits(deep(x)) == before != bits(layer(x)) == bits(shallow(x))
    for array in shallow.parameters().values():
        array *= 2
    assert bits(shallow(x)) == bits(layer(x)) != bits(deep(x))


def test_training_lowers_the_loss(rng):
    """Gradient descent by the dicts of both, as in the docstring."""
    layer = fastattn.MultiHeadAttention(**parameters(rng, d_out=24, rotary_base=100.0, num_kv_heads=2))
    x, target = normal(rng, 4, 12, 24), normal(rng, 4, 12, 24)
    lengths = np.array([12, 9, 5, 2])
    valid = (np.arange(12) < lengths[:, None])[..., None]
    losses = []
    for _ in range(60):
        out, backward = layer.vjp(x, key_lengths=lengths)
        losses.append(np.sum(valid * (out - target) ** 2))
        gradients = backward(2 * (out - target))
        for name, array in layer.parameters().items():
            array -= 2e-3 * gradients[name]
    assert losses[-1] < 0.3 * losses[0]


# ------------------------------------------------------------------------------------------ self_attention


def three(rng, d_model=8, d_k=6, d_v=5, dtype=np.float32):
    return [(normal(rng, d_model, n) / d_model**0.5).astype(dtype) for n in (d_k, d_k, d_v)]


def assert_self_attention(rng, x, w_query, w_key, w_value, **arguments):
    """Compare with the reference, and with and without what the forward call returned. Returns the gradients."""
    arrays = {"x": x, "w_query": w_query, "w_key": w_key, "w_value": w_value}
    arrays |= {name: arguments[name] for name in ADDED if name in arguments}
    names = tuple(arrays)
    softmax = arguments.get("activation", "softmax") == "softmax"
    answer = fastattn.self_attention(x, w_query, w_key, w_value, return_lse=softmax, **arguments)
    output, lse = answer if softmax else (answer, None)
    grad = normal(rng, *output.shape).astype(output.dtype)
    also = {"grad_lse": normal(rng, *output.shape[:-1])} if softmax else {}
    lengths = arguments.get("query_lengths", arguments.get("key_lengths"))
    if softmax and lengths is not None:
        also["grad_lse"] *= np.arange(output.shape[-2]) < np.asarray(lengths)[..., None]
    call = (grad, x, w_query, w_key, w_value)
    got = fastattn.self_attention_vjp(*call, wrt=names, **also, **arguments)
    expected = reference.self_attention_vjp(*call, wrt=names, **also, **arguments)
    assert isinstance(got, tuple)
    eps = float(np.finfo(accumulation_dtype(output.dtype)).eps)
    for name, mine, theirs in zip(names, got, expected, strict=True):
        array = np.asarray(arrays[name])
        kind = np.dtype(np.float64) if array.dtype.kind in "iub" else array.dtype
        assert (mine.shape, mine.dtype) == (array.shape, kind), name
        storage, step = storage_steps(kind)
        rounds = storage_steps(output.dtype)[0] * 4 if output.dtype.itemsize == 2 else 0
        size = np.abs(theirs).max(initial=0) + np.abs(np.asarray(grad, float)).max(initial=0) * max(1, x.shape[-2])
        assert_within(mine, theirs, (500 * eps + rounds) * size + storage * np.abs(theirs) + step, name)
        alone = fastattn.self_attention_vjp(*call, wrt=name, **also, **arguments)
        assert bits(alone) == bits(mine), name
    if softmax:
        kept = fastattn.self_attention_vjp(*call, wrt=names, output=output, lse=lse, **also, **arguments)
        assert all(bits(a) == bits(b) for a, b in zip(kept, got, strict=True))
    outs = tuple(np.full(mine.shape, 9, mine.dtype) for mine in got)
    same = fastattn.self_attention_vjp(*call, wrt=names, out=outs, **also, **arguments)
    assert all(a is b for a, b in zip(same, outs, strict=True))
    assert all(bits(a) == bits(b) for a, b in zip(same, got, strict=True))
    return got


@pytest.mark.parametrize("dtype", (*DTYPES, *sixteen_bits()))
@pytest.mark.parametrize("shape", [(7, 8), (1, 8), (0, 8), (2, 7, 8), (2, 3, 9, 8), (0, 5, 8)])
def test_self_attention(rng, shape, dtype):
    assert_self_attention(rng, normal(rng, *shape, dtype=dtype), *three(rng, dtype=dtype))


@pytest.mark.parametrize("rule", SMOOTH)
def test_self_attention_rules(rng, rule):
    arguments = rules(rng, (2, 3), 20, 20)[rule]
    assert_self_attention(rng, normal(rng, 2, 3, 20, 8), *three(rng), **arguments)


def test_self_attention_defaults_and_lists(rng):
    grad, weights = [[1, 0], [0, 1]], ([[1], [0]], [[0], [1]], [[1, 0], [0, 1]])
    got = fastattn.self_attention_vjp(grad, np.eye(2), *weights)
    assert len(got) == 4 and all(d.dtype == np.float64 for d in got)
    for mine, theirs in zip(got, reference.self_attention_vjp(grad, np.eye(2), *weights), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)


def test_self_attention_of_a_padded_batch(rng):
    x, weights = normal(rng, 3, 6, 8), three(rng)
    grad = normal(rng, 3, 6, 5)
    plain = fastattn.self_attention_vjp(grad, x, *weights, key_lengths=[6, 3, 0], is_causal=True)
    for b, n in enumerate((6, 3, 0)):
        x[b, n:] = grad[b, n:] = np.nan
        assert not plain[0][b, n:].any()
    got = fastattn.self_attention_vjp(grad, x, *weights, key_lengths=[6, 3, 0], is_causal=True)
    for mine, theirs in zip(got, plain, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_self_attention_errors(rng):
    x, weights = normal(rng, 2, 9, 8), three(rng)
    grad = normal(rng, 2, 9, 5)

    def refuse(error, message, *arrays, **arguments):
        with pytest.raises(error, match=message):
            fastattn.self_attention_vjp(*arrays, **arguments)

    refuse(ValueError, r"grad_out has shape \(2, 9, 4\)", grad[..., 1:], x, *weights)
    refuse(ValueError, r"w_query has shape \(7, 6\); it must be \(8, n\)", grad, x, weights[0][1:], *weights[1:])
    refuse(ValueError, "wrt names 'bias', which was not given", grad, x, *weights, wrt="bias")
    refuse(ValueError, "wrt names 'query'; those that can be named are 'x', 'w_query'", grad, x, *weights, wrt="query")
    refuse(ValueError, "key_lengths has shape", grad, x, *weights, key_lengths=[[1], [2]])
    refuse(TypeError, r"got an unexpected keyword argument 'return_lse'", grad, x, *weights, return_lse=True)
    refuse(TypeError, "out must be a tuple of 4 arrays", grad, x, *weights, out=x)
    refuse(ValueError, r"out\[1\] overlaps x", grad, x, *weights, wrt=("x", "w_key"), out=(None, x[0, :8, :6]))
    refuse(ValueError, "out overlaps grad_out", grad, x, *weights, wrt="w_value", out=grad[0, :8])
    out = np.full((2, 9, 8), 7, np.float32)
    refuse(ValueError, "mask has shape", grad, x, *weights, wrt="x", out=out, mask=np.ones((3, 9), bool))
    assert (out == 7).all()


# ------------------------------------------------------------------------------------------------ PyTorch


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_like_torch(rng, cross, bias):
    """nn.MultiheadAttention and autograd, in float64."""
    torch = pytest.importorskip("torch")
    module = torch.nn.MultiheadAttention(12, 3, bias=bias, batch_first=True, dtype=torch.float64)
    if bias:
        torch.nn.init.normal_(module.in_proj_bias)
        torch.nn.init.normal_(module.out_proj.bias)
    layer = fastattn.MultiHeadAttention.from_torch(
        {name: array.detach() for name, array in module.state_dict().items()}, num_heads=3
    )
    x = normal(rng, 2, 9, 12, dtype=np.float64)
    context = normal(rng, 2, 7, 12, dtype=np.float64) if cross else None
    lengths, grad = np.array([6, 4]), normal(rng, 2, 9, 12, dtype=np.float64)
    out, backward = layer.vjp(x, context, key_lengths=lengths, query_lengths=9)
    ours = backward(grad)

    there = torch.tensor(x, requires_grad=True)
    other = torch.tensor(context, requires_grad=True) if cross else there
    padding = torch.from_numpy(np.arange(other.shape[1]) >= lengths[:, None])
    theirs, _ = module(there, other, other, key_padding_mask=padding)
    np.testing.assert_allclose(out, theirs.detach(), rtol=1e-10, atol=1e-12)
    theirs.backward(torch.from_numpy(grad))
    expected = {"x": there.grad, "w_out": module.out_proj.weight.grad.T}
    if cross:
        expected["context"] = other.grad
    for i, name in enumerate(("query", "key", "value")):
        expected[f"w_{name}"] = module.in_proj_weight.grad[12 * i : 12 * (i + 1)].T
        if bias:
            expected[f"b_{name}"] = module.in_proj_bias.grad[12 * i : 12 * (i + 1)]
    if bias:
        expected["b_out"] = module.out_proj.bias.grad
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(ours[name], gradient, rtol=1e-9, atol=1e-11, err_msg=name)
