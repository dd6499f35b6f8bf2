"""linear_attention_vjp: every rule against the reference, the reference against differences; bits, memory, errors."""

import itertools
import sys

import fresh_process
import numpy as np
import pytest
from problems import DTYPES, bits, layouts, qkv, sixteen_bits, spaced
from test_guard_pages import guarded, guarded_columns, guarded_rows
from test_linear import RULES, SIZES, problem, random_state
from tolerances import assert_linear_gradients, assert_within, linear_gradient_bounds

from fastattn import linear_attention, linear_attention_vjp, reference

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, uses mprotect")
NAMES = ("query", "key", "value", "log_decay", "beta", "state")


def call(rng, rule, *sizes, with_state=True, dtype=np.float32, **more):
    """(grad_out, query, key, value) and keyword arguments, with a state and its gradient."""
    arrays, arguments = problem(rng, rule, *sizes, dtype=dtype, **more)
    query, key, value = arrays
    batch = np.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    grad_out = rng.standard_normal((*batch, query.shape[-2], value.shape[-1])).astype(dtype)
    if with_state:
        arguments["state"] = random_state(rng, arrays, arguments, dtype)
        arguments["grad_state"] = rng.standard_normal(arguments["state"].shape).astype(dtype)
    return (grad_out, *arrays), arguments


def given(arrays, arguments):
    """The arguments that have a gradient, by name."""
    named = dict(zip(("query", "key", "value"), arrays[1:], strict=True), **arguments)
    return {name: named[name] for name in NAMES if named.get(name) is not None}


def all_gradients(arrays, arguments, **more):
    names = tuple(given(arrays, arguments))
    return dict(zip(names, linear_attention_vjp(*arrays, **arguments, wrt=names, **more), strict=True))


# ------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_rules(rng, rule, sizes):
    for dtype in DTYPES:
        for with_state in (False, True):
            arrays, arguments = call(rng, rule, (2,), *sizes, with_state=with_state, dtype=dtype)
            assert_linear_gradients(*arrays, **arguments)
            if "log_decay" not in arguments and "beta" not in arguments:
                assert_linear_gradients(*arrays, **{**arguments, "is_causal": False})
        if "log_decay" not in arguments and "beta" not in arguments:
            rules = {"feature_map": arguments["feature_map"], "normalize": False, "scale": -0.7}
            assert_linear_gradients(*arrays, **rules)


@pytest.mark.parametrize("rule", ["linear", "gated", "gated a head", "delta", "gated delta"])
def test_more_keys_than_a_chunk(rng, rule):
    for head_dim, value_dim in ((8, 8), (40, 70)):
        arrays, arguments = call(rng, rule, (2,), 200, 245, head_dim, value_dim)
        assert_linear_gradients(*arrays, **arguments)


def differences(function, x, step=1e-6):
    """The gradient of a number by central differences."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        near = x.copy()
        near[i] += step
        above = function(near)
        near[i] -= 2 * step
        gradient[i] = (above - function(near)) / (2 * step)
    return gradient


@pytest.mark.parametrize("offset", [None, -2, 3])
@pytest.mark.parametrize("rule", ["linear", "identity", "gated", "gated a head", "delta", "gated delta", "all"])
def test_the_reference_against_differences(rng, rule, offset):
    heads = 4 if rule == "gated" else 2
    query, key, value = qkv(rng, (2, heads), 5, 6, 3, 2, np.float64, (1, 2))
    value = rng.standard_normal((2, 2, 6, 2))
    arguments = {"is_causal": rule != "all", "query_offset": offset, "enable_gqa": True}
    arguments["feature_map"] = None if "delta" in rule or rule == "identity" else "elu+1"
    if "gated" in rule:
        arguments["log_decay"] = -rng.random((2, 6, 1 if "head" in rule else 3))
    if "delta" in rule:
        arguments["beta"] = rng.random((2, 2, 6))
    arguments["state"] = rng.random((2, 2, 3, 2 + (arguments["feature_map"] is not None)))
    arguments |= {"key_lengths": np.array([[4], [6]]), "query_lengths": np.array([[5], [3]])}
    grads = [rng.standard_normal(s) for s in ((2, heads, 5, 2), arguments["state"].shape)]
    names = given((None, query, key, value), arguments)
    call = {**arguments, "query": query, "key": key, "value": value}

    def loss(name, x):
        results = reference.linear_attention(**{**call, name: x}, return_state=True)
        return sum(np.vdot(grad, result) for grad, result in zip(grads, results, strict=True))

    found = reference.linear_attention_vjp(grads[0], **call, grad_state=grads[1], wrt=tuple(names))
    for (name, x), gradient in zip(names.items(), found, strict=True):
        np.testing.assert_allclose(gradient, differences(lambda x, name=name: loss(name, x), x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_gradients_of_pytorch(rng, normalised):
    torch = pytest.importorskip("torch")
    arrays = [rng.standard_normal((2, 3, 40, n)) for n in (5, 8, 8, 5)]
    grad_out, *tensors = (torch.tensor(x, requires_grad=True) for x in arrays)
    query, key = (torch.nn.functional.elu(x) + 1 for x in tensors[:2])
    scores = torch.tril(query @ key.transpose(-1, -2))
    if normalised:
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-6)
    (scores @ tensors[2]).backward(grad_out)
    found = linear_attention_vjp(
        *arrays, is_causal=True, normalize=normalised, scale=None if normalised else 1.0, num_threads=1
    )
    for gradient, x in zip(found, tensors, strict=True):
        np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", sixteen_bits())
@pytest.mark.parametrize("rule", RULES)
def test_sixteen_bits(rng, rule, dtype):
    arrays, arguments = call(rng, rule, (2,), 40, 50, 16, 16)
    narrow = [x.astype(dtype) for x in arrays]
    assert_linear_gradients(*narrow, **arguments)
    # Numbers are widened as they are, and gradients rounded once.
    wide = all_gradients([x.astype(np.float32) for x in narrow], arguments)
    for name, gradient in all_gradients(narrow, arguments).items():
        assert bits(gradient) == bits(wide[name].astype(gradient.dtype)), name


def test_dtypes(rng):
    """Gradients have the dtype of their array; integers are float64."""
    whole = [rng.integers(-3, 4, (4, 6)) for _ in range(4)]
    for gradient in assert_linear_gradients(*whole).values():
        assert gradient.dtype == np.float64
    arrays, arguments = call(rng, "gated delta", (2,), 20, 20, 8, 8)
    mixed = [arrays[0].astype(np.float16), arrays[1].astype(np.float64), *arrays[2:]]
    arguments = {n: x.astype(np.float64) if isinstance(x, np.ndarray) else x for n, x in arguments.items()}
    found = assert_linear_gradients(*mixed, **arguments)
    assert found["key"].dtype == np.float32
    assert found["beta"].dtype == np.float64


@pytest.mark.parametrize("sizes", [(0, 5, 8, 8), (5, 0, 8, 8), (5, 9, 0, 4), (5, 9, 4, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("rule", RULES)
def test_axes_of_no_size(rng, rule, sizes):
    for with_state in (False, True):
        arrays, arguments = call(rng, rule, (2,), *sizes, with_state=with_state)
        found = assert_linear_gradients(*arrays, **arguments)
        if sizes[1] == 0 and not with_state:
            assert not found["query"].any()
    none = {name: x[:0] if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    for name, gradient in all_gradients([x[:0] for x in arrays], none).items():
        assert gradient.shape == given([x[:0] for x in arrays], none)[name].shape
    shared = all_gradients([arrays[0][:0], arrays[1][:0], arrays[2][:1], arrays[3][:0]], none)
    assert not shared["key"].any()


@pytest.mark.parametrize("rule", ["linear", "identity", "gated", "gated delta"])
@pytest.mark.parametrize("offset", [-50, -3, 0, 7, 10, 29, 30, 300, 2**70, -(2**70)])
def test_offsets(rng, rule, offset):
    clipped = int(np.clip(offset, -1000, 1000))
    for with_state in (True, False):
        arrays, arguments = call(rng, rule, (2,), 20, 30, 12, 10, with_state=with_state)
        found = assert_linear_gradients(*arrays, **arguments, query_offset=clipped)
        same = all_gradients(arrays, arguments, query_offset=offset)
        assert all(bits(same[name]) == bits(found[name]) for name in same)


@pytest.mark.parametrize("group", [1, 2, 5])
@pytest.mark.parametrize("rule", ["linear", "gated", "gated a head", "delta", "gated delta"])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_offsets_and_groups(rng, rule, group, causal):
    if not causal and rule != "linear":
        pytest.skip("decays and the delta rule are causal")
    arrays, arguments = call(rng, rule, (3, 2), 0, 60, 18, 35)
    arrays = list(arrays)
    arrays[1] = rng.standard_normal((3, 2 * group, 21, 18)).astype(np.float32)
    arrays[0] = rng.standard_normal((3, 2 * group, 21, 35)).astype(np.float32)
    arguments |= {
        "is_causal": causal,
        "enable_gqa": True,
        "key_lengths": np.array([[60], [0], [53]]),
        "query_lengths": rng.integers(0, 22, (3, 2 * group)),
    }
    assert_linear_gradients(*arrays, **arguments)
    offsets = rng.integers(-8, 60, (3, 2 * group))
    assert_linear_gradients(*arrays, **arguments, query_offset=offsets)


@pytest.mark.parametrize("rule", ["linear", "gated", "gated delta"])
def test_what_was_broadcast_is_summed(rng, rule):
    arrays, arguments = call(rng, rule, (3, 2), 20, 25, 9, 7)
    shapes = {"query": (1, 2, 20, 9), "key": (25, 9), "value": (3, 1, 25, 7), "beta": (2, 1), "log_decay": (1, 9)}
    for decay in ((1, 9), (25, 1), (2, 1, 1), (3, 1, 25, 9), (1, 1)):
        named = dict(zip(("grad_out", "query", "key", "value"), arrays, strict=True), **arguments)
        for name, shape in {**shapes, "log_decay": decay}.items():
            if name in named:
                short = (1,) * (named[name].ndim - len(shape)) + shape
                cut = tuple(slice(0, 1) if n == 1 else slice(None) for n in short)
                named[name] = named[name][cut].reshape(shape)
        if "log_decay" in named:
            named["log_decay"] = np.maximum(named["log_decay"], -1)
        found = assert_linear_gradients(**named)
        for threads in (1, 2):
            again = linear_attention_vjp(**named, wrt=tuple(found), num_threads=threads)
            assert all(bits(a) == bits(found[name]) for name, a in zip(found, again, strict=True))
        if "log_decay" not in named:
            break


def test_segments(rng):
    """Truncated back-propagation without the truncation."""
    for rule in RULES:
        arrays, arguments = call(rng, rule, (2,), 60, 60, 8, 6, dtype=np.float64)
        whole = all_gradients(arrays, arguments)
        cut = {}
        for begin, end in ((0, 23), (23, 60)):
            some = {"log_decay": (slice(None), slice(begin, end)), "beta": (slice(None), slice(begin, end))}
            rules = {
                n: x[some[n]] if n in some else x for n, x in arguments.items() if n not in ("grad_state", "state")
            }
            cut[begin] = [x[:, begin:end] for x in arrays], rules
        _, middle = linear_attention(*cut[0][0][1:], **cut[0][1], state=arguments["state"], return_state=True)
        last = all_gradients(cut[23][0], {**cut[23][1], "state": middle, "grad_state": arguments["grad_state"]})
        first = all_gradients(cut[0][0], {**cut[0][1], "state": arguments["state"], "grad_state": last.pop("state")})
        np.testing.assert_allclose(first.pop("state"), whole.pop("state"), rtol=1e-9, atol=1e-9)
        for name, gradient in whole.items():
            both = np.concatenate([first[name], last[name]], axis=1)
            np.testing.assert_allclose(both, gradient, rtol=1e-9, atol=1e-9, err_msg=f"{rule} {name}")


def test_a_map_of_ones_own(rng):
    """What the error says: the map before the call, its derivative after it."""
    grad_out, query, key, value = (rng.standard_normal((2, 20, 5)) for _ in range(4))
    with pytest.raises(ValueError, match=r"feature_map.*before the call"):
        linear_attention_vjp(grad_out, query, key, value, feature_map=np.tanh)
    with pytest.raises(ValueError, match=r"feature_map.*before the call"):
        linear_attention_vjp(grad_out, query, key, value, feature_map=(np.tanh, np.exp))
    with pytest.raises(TypeError, match="feature_map"):
        linear_attention_vjp(grad_out, query, key, value, feature_map=3)
    rules = {"feature_map": None, "normalize": True, "is_causal": True}
    d_features = linear_attention_vjp(grad_out, np.exp(query), np.exp(key), value, **rules, wrt="query")
    expected = differences(
        lambda x: np.vdot(grad_out, reference.linear_attention(np.exp(x), np.exp(key), value, **rules)), query
    )
    np.testing.assert_allclose(d_features * np.exp(query), expected, atol=1e-7)


# ------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("rule", ["linear", "identity", "gated", "gated a head", "delta", "gated delta"])
@pytest.mark.parametrize("heads", [1, 2, 3, 5])
def test_threads_and_names_change_no_bit(rng, rule, heads):
    arrays, arguments = call(rng, rule, (heads,), 130, 150, 70, 150)
    expected = all_gradients(arrays, arguments, num_threads=1)
    for threads in (2, 3, 7):
        found = all_gradients(arrays, arguments, num_threads=threads)
        assert all(bits(found[name]) == bits(expected[name]) for name in expected), threads
    for name in expected:
        alone = linear_attention_vjp(*arrays, **arguments, wrt=name)
        assert bits(alone) == bits(expected[name]), name
    for i in range(heads):
        own = {name: x[i] if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
        for name, gradient in all_gradients([x[i] for x in arrays], own).items():
            assert bits(gradient) == bits(expected[name][i]), name


@pytest.mark.parametrize("rule", ["linear", "gated a head", "gated delta"])
def test_layouts_change_no_bit(rng, rule):
    arrays, arguments = call(rng, rule, (2, 2), 30, 40, 17, 19)
    expected = all_gradients(arrays, arguments)
    for i in range(4):
        for layout, x in layouts(arrays[i]):
            found = all_gradients([*arrays[:i], x, *arrays[i + 1 :]], arguments)
            assert all(bits(found[name]) == bits(expected[name]) for name in expected), layout
    apart = {name: spaced(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    found = all_gradients([spaced(x) for x in arrays], apart)
    assert all(bits(found[name]) == bits(expected[name]) for name in expected)
    ones = np.broadcast_to(np.float32(1), arrays[0].shape)
    assert bits(linear_attention_vjp(ones, *arrays[1:], **arguments)[1]) == bits(
        linear_attention_vjp(ones.copy(), *arrays[1:], **arguments)[1]
    )


@pytest.mark.parametrize("rule", ["linear", "gated", "gated delta"])
def test_out(rng, rule):
    arrays, arguments = call(rng, rule, (2,), 30, 40, 17, 19)
    expected = all_gradients(arrays, arguments)
    names = tuple(expected)
    for make in (np.full_like, lambda x, n: spaced(np.full_like(x, n)), lambda x, n: np.full_like(x, n, order="F")):
        out = tuple(make(x, 7) for x in expected.values())
        found = linear_attention_vjp(*arrays, **arguments, wrt=names, out=out)
        for name, a, to in zip(names, found, out, strict=True):
            assert a is to
            assert bits(a) == bits(expected[name])
    halves = [x.astype(np.float16) for x in arrays]
    out = (None, np.zeros(arrays[2].shape, np.float32), None)
    found = linear_attention_vjp(*halves, **arguments, out=out)
    assert found[1] is out[1]
    assert found[0].dtype == np.float16
    np.testing.assert_array_equal(found[1].astype(np.float16), linear_attention_vjp(*halves, **arguments)[1])


@pytest.mark.parametrize("rule", RULES)
def test_padding_changes_nothing(rng, rule):
    """Whatever is stored past the lengths, in grad_out too; and there gradients are exactly 0."""
    arrays, arguments = call(rng, rule, (2,), 50, 60, 20, 33)
    lengths = {"query_lengths": 31, "key_lengths": 41}
    short = {name: x[:, :41] if name in ("log_decay", "beta") else x for name, x in arguments.items()}
    expected = all_gradients([arrays[0][:, :31], arrays[1][:, :31], *(x[:, :41] for x in arrays[2:])], short)
    for i, end in enumerate((31, 31, 41, 41)):
        arrays[i][:, end:] = np.nan
    for name in {"log_decay", "beta"} & set(arguments):
        arguments[name][:, 41:] = np.nan
    found = all_gradients(arrays, {**arguments, **lengths})
    for name, gradient in found.items():
        end = {"query": 31, "state": 20}.get(name, 41)
        assert bits(gradient[:, :end]) == bits(expected[name]), name
        assert not gradient[:, end:].any(), name


# ------------------------------------------------------------------------------------ hostile numbers


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_out"])
def test_nan_reaches_only_what_it_feeds(rng, rule, name):
    arrays, arguments = call(rng, rule, (2,), 80, 80, 20, 36, with_state=False)
    if "log_decay" in arguments:
        arguments["log_decay"] = np.maximum(arguments["log_decay"], -1)
    expected = all_gradients(arrays, arguments)
    arrays[("grad_out", "query", "key", "value").index(name)][0, 51] = np.nan
    found = all_gradients(arrays, arguments)
    for gradient in found:
        assert bits(found[gradient][1]) == bits(expected[gradient][1])
    if name in ("key", "value"):
        assert bits(found["query"][0, :51]) == bits(expected["query"][0, :51])
        assert np.isnan(found["query"][0, 51:]).all()
    else:
        assert bits(found["query"][0, :51]) == bits(expected["query"][0, :51])
        assert bits(found["query"][0, 52:]) == bits(expected["query"][0, 52:])
        for after in ("key", "value"):
            assert bits(found[after][0, 52:]) == bits(expected[after][0, 52:])
            assert np.isnan(found[after][0, :52]).all()


@pytest.mark.parametrize("rule", ["gated", "gated delta"])
def test_packed_sequences(rng, rule):
    """A decay of -inf at each first key: sequences that do not know of each other, whatever is in them."""
    arrays, arguments = call(rng, rule, (2,), 90, 90, 20, 33, with_state=False)
    decay = arguments["log_decay"] = np.maximum(arguments["log_decay"], -1)
    starts = [0, 1, 2, 30, 54, 60, 61, 90]
    decay[:, starts[:-1]] = -np.inf
    arrays[3][:, 29] = np.nan
    found = all_gradients(arrays, arguments)
    for begin, end in itertools.pairwise(starts):
        own = {n: x[:, begin:end] if isinstance(x, np.ndarray) else x for n, x in arguments.items()}
        alone = all_gradients([x[:, begin:end] for x in arrays], own)
        for name in ("query", "key", "value"):
            assert bits(found[name][:, begin:end]) == bits(alone[name]), name
    assert not found["log_decay"][:, starts[:-1]].any()
    assert np.isfinite(found["key"][:, 30:]).all()


def test_rows_that_see_nothing(rng):
    """Before all keys and without a state: exactly 0, and nothing to anyone, whatever grad_out says."""
    for rule in RULES:
        arrays, arguments = call(rng, rule, (2,), 30, 20, 9, 11, with_state=False)
        expected = all_gradients(arrays, arguments, query_offset=-12)
        arrays[0][:, :12] = np.nan
        arrays[1][:, :12] = np.nan
        found = all_gradients(arrays, arguments, query_offset=-12)
        assert not found["query"][:, :12].any(), rule
        assert all(bits(found[name]) == bits(expected[name]) for name in found), rule
        none = {n: x[:, :0] if isinstance(x, np.ndarray) else x for n, x in arguments.items()}
        empty = [*arrays[:2], arrays[2][:, :0], arrays[3][:, :0]]
        assert not all_gradients(empty, none)["query"].any(), rule


def test_denominators_of_zero(rng):
    grad_out, query, key, value = qkv(rng, (), 6, 6, 8, 8) + qkv(rng, (), 6, 6, 8, 8)[:1]
    query[2] = -np.abs(query[2])
    grad_out[2] = np.nan
    rules = {"feature_map": "relu", "eps": 0.0}
    d_query, d_key, d_value = linear_attention_vjp(grad_out, query, key, value, **rules)
    assert not d_query[2].any()
    grad_out[2] = 0
    expected = reference.linear_attention_vjp(grad_out, query, key, value, **rules)
    for gradient, x in zip((d_query, d_key, d_value), expected, strict=True):
        np.testing.assert_allclose(gradient, x, atol=1e-5)


def test_strong_decays_overflow_nothing(rng):
    for dtype in DTYPES:
        arrays, _ = call(rng, "linear", (2,), 60, 60, 16, 16, dtype=dtype)
        for size in (1.0, 50.0, 90.0, 1e4, 1e30):
            assert_linear_gradients(*arrays, is_causal=True, log_decay=-size * rng.random((2, 60, 16)))


def test_errors_do_not_grow_with_the_length(rng):
    """What decays is a sum over chunks, not over all keys after it."""
    arrays, arguments = call(rng, "gated a head", (1,), 3000, 3000, 8, 8)
    arguments["log_decay"] = np.full((1, 3000, 1), -0.5, np.float32)
    expected = all_gradients([x.astype(np.float64) for x in arrays], {
        n: x.astype(np.float64) if isinstance(x, np.ndarray) else x for n, x in arguments.items()})  # fmt: skip
    for name, gradient in all_gradients(arrays, arguments).items():
        error = np.abs(gradient - expected[name]).max() / np.abs(expected[name]).max()
        assert error < 64 * np.finfo(np.float32).eps, name


def test_the_bound_can_fail(rng):
    arrays, arguments = call(rng, "gated", (2,), 40, 40, 16, 16)
    names = tuple(given(arrays, arguments))
    expected = reference.linear_attention_vjp(*arrays, **arguments, wrt=names)
    expected = dict(zip(names, expected, strict=True))
    bounds = linear_gradient_bounds(arrays[0], arrays[1:], expected, **arguments)
    wrong = {**arguments, "log_decay": np.roll(arguments["log_decay"], -1, axis=-2)}
    for name, gradient in all_gradients(arrays, wrong).items():
        with pytest.raises(AssertionError, match=r"bound|NaN"):
            assert_within(gradient, expected[name], bounds[name], name)


# ------------------------------------------------------------------------------------ arguments


def test_bad_arguments(rng):
    arrays, arguments = call(rng, "gated delta", (2,), 5, 7, 8, 6)

    def refuse(error, message, grad_out=arrays[0], **changes):
        out = tuple(np.full(x.shape, 5, np.float32) for x in arrays[1:])
        with pytest.raises(error, match=message):
            linear_attention_vjp(grad_out, *arrays[1:], **{**arguments, "out": out, **changes})
        assert all((x == 5).all() for x in out)

    refuse(ValueError, "grad_out has shape", arrays[0][:, :4])
    refuse(TypeError, "grad_out", arrays[0].astype(complex))
    refuse(ValueError, "grad_state has shape", grad_state=arguments["state"][..., :5])
    refuse(TypeError, "grad_state", grad_state=arguments["state"].astype(complex))
    refuse(ValueError, "wrt names 'scale'", wrt=("query", "key", "scale"))
    refuse(ValueError, "'log_decay', which was not given", wrt=("query", "key", "log_decay"), log_decay=None)
    refuse(ValueError, "'state', which was not given", wrt="state", state=None, grad_state=None)
    refuse(ValueError, "twice", wrt=("query", "key", "query"))
    refuse(TypeError, "wrt", wrt=3)
    refuse(ValueError, "out has 1 arrays", out=(np.zeros(3),))
    refuse(ValueError, "overlaps query", out=(arrays[1], None, None))
    refuse(ValueError, "overlaps state", wrt="state", out=arguments["state"])
    refuse(ValueError, "beta needs is_causal", is_causal=False, log_decay=None)
    with pytest.raises(TypeError):
        linear_attention_vjp(*arrays, return_state=True)


# ------------------------------------------------------------------------------------ memory, Ctrl-C


def walk(dtype, at_end):
    """Calls with every array guarded. Runs in a child, which a fault would kill."""
    rng = np.random.default_rng(1)

    def guard(x):
        return guarded(np.ascontiguousarray(x), at_end)

    for rule, sizes in itertools.product(("linear", "gated", "gated a head", "gated delta"), SIZES):
        arrays, arguments = call(rng, rule, (2,), *sizes, dtype=np.dtype(dtype).type)
        expected = all_gradients(arrays, arguments)
        names = tuple(expected)
        arguments = {name: guard(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
        out = tuple(guard(np.zeros_like(x)) for x in expected.values())
        linear_attention_vjp(*map(guard, arrays), **arguments, wrt=names, out=out)
        assert all(bits(x) == bits(expected[name]) for name, x in zip(names, out, strict=True))
        lengths = {"key_lengths": guard(np.array([sizes[1], sizes[1] // 2]))}
        linear_attention_vjp(*map(guard, arrays), **arguments, **lengths, wrt=names, out=out)
        own = {name: x[0] if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
        for layout in (guarded_rows, guarded_columns):
            rows = [layout(x[0], at_end) for x in (*arrays, *(np.zeros_like(x) for x in arrays[1:]))]
            linear_attention_vjp(*rows[:4], **own, out=tuple(rows[4:]))
            assert all(bits(x) == bits(expected[name][0]) for name, x in zip(names, rows[4:], strict=False))


@linux
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_access_outside_the_arrays(dtype, at_end):
    fresh_process.run(
        "import faulthandler; faulthandler.enable()\n"
        f"import test_linear_gradients; test_linear_gradients.walk({dtype!r}, {at_end})"
    )


@linux
def test_memory_does_not_hold_states():
    """At 16384 keys: a state for each would be 268 MB."""
    fresh_process.run("""
        import numpy as np
        import fastattn
        def peak():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
        rng = np.random.default_rng(0)
        x = rng.standard_normal((1, 16384, 64), dtype=np.float32) / 8
        decay, beta = np.full((1, 16384, 64), -0.1, np.float32), np.full((1, 16384), 0.1, np.float32)
        out = tuple(np.ones_like(x) for _ in range(3))
        short = (slice(None), slice(300))
        fastattn.linear_attention_vjp(*(x[short],) * 4, is_causal=True, num_threads=2)
        before = peak()
        fastattn.linear_attention_vjp(x, x, x, x, is_causal=True, out=out, num_threads=2)
        assert peak() - before < 40 * 1024, (peak(), before)
        fastattn.linear_attention_vjp(x, x, x, x, is_causal=True, out=out, num_threads=2, feature_map=None,
                                      log_decay=decay, beta=beta)
        assert peak() - before < 64 * 1024, (peak(), before)
    """)
