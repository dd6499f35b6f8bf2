"""linear_attention: every rule against the reference, streams cut anywhere, the state as a plain array."""

import copy
import gc
import io
import itertools
import sys
import threading
import time
import tracemalloc
from signal import SIGINT

import fresh_process
import numpy as np
import pytest
from problems import DTYPES, bits, layouts, qkv, sixteen_bits, spaced
from test_guard_pages import guarded, guarded_columns, guarded_rows
from tolerances import assert_linear, assert_within, linear_bounds, recurrence_in

import fastattn
from fastattn import linear_attention, reference

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, uses mprotect")

# Around vectors, slabs, groups of tokens, blocks of keys and panels of features.
SIZES = (
    (1, 1, 1, 1),
    (5, 7, 8, 6),
    (40, 40, 64, 64),
    (30, 70, 33, 70),
    (100, 30, 130, 17),
    (25, 49, 15, 131),
    (3, 3, 64, 64),
    (49, 48, 96, 96),
)
RULES = ("linear", "relu", "identity", "gated", "gated a head", "delta", "gated delta", "delta of elu+1")


def problem(rng, rule, batch=(2, 3), num_queries=40, num_keys=40, head_dim=16, value_dim=16, dtype=np.float32):
    """(query, key, value) and keyword arguments. With the delta rule keys are at most of length 1, lest it explode."""
    query, key, value = qkv(rng, batch, num_queries, num_keys, head_dim, value_dim, dtype)
    arguments = {"feature_map": {"relu": "relu", "linear": "elu+1", "gated": "elu+1"}.get(rule), "is_causal": True}
    if "gated" in rule:
        decays = -0.3 * np.abs(rng.standard_normal((*batch, num_keys, 1 if "head" in rule else head_dim)))
        if num_keys > 3:
            decays[..., num_keys // 2, : head_dim // 2] = -np.inf
            decays[..., num_keys // 3, :] = 0.01
        arguments["log_decay"] = decays.astype(np.float32)
    if "delta" in rule:
        arguments["beta"] = rng.random((*batch, num_keys)).astype(np.float32)
        key = (key / np.sqrt(1 + np.sum(np.square(key, dtype=np.float64), axis=-1, keepdims=True))).astype(dtype)
    if rule == "delta of elu+1":
        arguments["feature_map"] = "elu+1"
        key = (key - dtype(2 + np.log(max(head_dim, 1)))).astype(dtype)
    return (query, key, value), arguments


def random_state(rng, arrays, arguments, dtype=np.float32):
    """A state that fits, with a normaliser as positive features make it."""
    normalised = arguments["feature_map"] is not None and "beta" not in arguments
    shape = (*arrays[1].shape[:-2], arrays[1].shape[-1], arrays[2].shape[-1] + normalised)
    state = rng.standard_normal(shape).astype(dtype)
    if normalised:
        state[..., -1] = np.abs(state[..., -1]) + 1
    return state


def part(arguments, begin, end):
    """Those of the keys [begin, end)."""
    cut = {}
    for name, x in arguments.items():
        cut[name] = x[..., begin:end, :] if name == "log_decay" else x[..., begin:end] if name == "beta" else x
    return cut


# ------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_rules(rng, rule, sizes):
    for dtype in DTYPES:
        arrays, arguments = problem(rng, rule, (2,), *sizes, dtype)
        assert_linear(*arrays, **arguments)
        assert_linear(*arrays, **arguments, state=random_state(rng, arrays, arguments, dtype))
        if "log_decay" not in arguments and "beta" not in arguments:
            assert_linear(*arrays, **{**arguments, "is_causal": False})
            assert_linear(*arrays, feature_map=arguments["feature_map"], normalize=False, scale=-0.7)


@pytest.mark.parametrize("dtype", sixteen_bits())
@pytest.mark.parametrize("rule", RULES)
def test_sixteen_bits(rng, rule, dtype):
    arrays, arguments = problem(rng, rule, dtype=np.float32, num_keys=50)
    narrow = [x.astype(dtype) for x in arrays]
    out, state = assert_linear(*narrow, **arguments)
    assert out.dtype == dtype
    # Numbers are widened as they are: the float32 call has the same sums.
    wide = [x.astype(np.float32) for x in narrow]
    _, expected = linear_attention(*wide, **arguments, return_state=True)
    assert bits(state) == bits(expected)


def test_dtypes_promote(rng):
    query, key, value = qkv(rng, (2,))
    out, state = linear_attention(query.astype(np.float64), key, value, return_state=True)
    assert out.dtype == state.dtype == np.float64
    whole = np.arange(12).reshape(4, 3)
    assert linear_attention(whole, whole, whole).dtype == np.float64
    # What decays and by how much does not decide.
    decay = np.full((2, 33, 1), -0.1)
    assert linear_attention(query, key, value, is_causal=True, log_decay=decay).dtype == np.float32


@pytest.mark.parametrize("sizes", [(0, 5, 8, 8), (5, 0, 8, 8), (5, 9, 0, 4), (5, 9, 4, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("rule", RULES)
def test_axes_of_no_size(rng, rule, sizes):
    arrays, arguments = problem(rng, rule, (2,), *sizes)
    state = random_state(rng, arrays, arguments)
    assert_linear(*arrays, **arguments)
    assert_linear(*arrays, **arguments, state=state)
    if sizes[1] == 0:
        assert bits(linear_attention(*arrays, **arguments, state=state, return_state=True)[1]) == bits(state)
    no_batch = [x[:0] for x in arrays]
    few = {name: x[:0] if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    assert linear_attention(*no_batch, **few).shape == (0, sizes[0], sizes[3])


def test_it_is_a_product_with_a_triangle(rng):
    """What linear attention is without a recurrence, in NumPy."""
    query, key, value = qkv(rng, (2, 3), 30, 30, 8, 5, np.float64)
    scores = np.tril(query @ key.swapaxes(-1, -2))
    out = linear_attention(query, key, value, feature_map=None, is_causal=True, scale=2.0)
    np.testing.assert_allclose(out, 2 * scores @ value, atol=1e-12)
    relu = [np.maximum(x, 0) for x in (query, key)]
    scores = np.tril(relu[0] @ relu[1].swapaxes(-1, -2))
    expected = scores @ value / (scores.sum(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(
        linear_attention(query, key, value, feature_map="relu", is_causal=True, eps=0.5), expected, atol=1e-12
    )
    # A constant decay is ALiBi's: every step back costs as much again.
    steps = np.arange(30)[:, None] - np.arange(30)
    expected = np.tril(query @ key.swapaxes(-1, -2) * np.exp(-0.2 * steps)) @ value
    decay = np.full((30, 1), -0.2)
    out = linear_attention(query, key, value, feature_map=None, is_causal=True, log_decay=decay, scale=1.0)
    np.testing.assert_allclose(out, expected, atol=1e-12)


def test_the_delta_rule_replaces_what_a_key_says(rng):
    """With beta 1 and keys of length 1, the last value of a key is what it is asked for."""
    key = np.eye(4)[[0, 1, 2, 0, 1]]
    value = rng.standard_normal((5, 3))
    out = linear_attention(key, key, value, feature_map=None, is_causal=True, beta=np.ones(5), scale=1.0)
    np.testing.assert_allclose(out, value, atol=1e-15)
    _, state = linear_attention(
        key, key, value, feature_map=None, is_causal=True, beta=np.ones(5), scale=1.0, return_state=True
    )
    np.testing.assert_allclose(state, np.concatenate([value[[3, 4, 2]], np.zeros((1, 3))]), atol=1e-15)


@pytest.mark.parametrize("rule", ["linear", "gated delta"])
@pytest.mark.parametrize("offset", [-50, -3, 0, 7, 29, 30, 31, 300, 2**70, -(2**70)])
def test_offsets(rng, rule, offset):
    arrays, arguments = problem(rng, rule, (2,), 20, 30)
    state = random_state(rng, arrays, arguments)
    clipped = int(np.clip(offset, -1000, 1000))
    expected = reference.linear_attention(*arrays, **arguments, state=state, query_offset=clipped)
    out = linear_attention(*arrays, **arguments, state=state, query_offset=offset)
    np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("group", [1, 2, 5, 40])
@pytest.mark.parametrize("rule", ["linear", "gated", "gated delta"])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_offsets_and_groups(rng, rule, group, causal):
    if not causal and rule != "linear":
        pytest.skip("decays and the delta rule are causal")
    (_, key, value), arguments = problem(rng, rule, (3, 2), 0, 40, 18, 35)
    query = rng.standard_normal((3, 2 * group, 21, 18)).astype(np.float32)
    arguments |= {
        "is_causal": causal,
        "enable_gqa": True,
        "key_lengths": np.array([[40], [0], [13]]),
        "query_lengths": rng.integers(0, 22, (3, 2 * group)),
    }
    out, _ = assert_linear(query, key, value, **arguments)
    for head in np.ndindex(3, 2 * group):
        assert (out[head][arguments["query_lengths"][head] :] == 0).all()
    arguments["query_offset"] = rng.integers(-10, 45, (3, 2 * group))
    assert_linear(query, key, value, **arguments)
    arguments["state"] = random_state(rng, (query, key, value), arguments)
    assert_linear(query, key, value, **arguments)


def test_batch_axes_broadcast(rng):
    query, key, value = qkv(rng, (4, 1, 3), kv_batch=(2, 1))
    _, state = assert_linear(query, key, value[0])
    assert state.shape == (4, 2, 3, 16, 17)
    beta = rng.random((4, 2, 1, 33))
    assert_linear(query, key / 9, value[0], feature_map=None, is_causal=True, beta=beta, log_decay=[[-0.1]])


def test_long_sums(rng):
    """The promised bound over a long sequence, and constant decays no worse than the plain recurrence."""
    arrays = qkv(rng, (), 20_000, 20_000, 4, 3)
    assert_linear(*arrays, is_causal=True, feature_map="relu")
    decay = np.full((20_000, 1), -1e-4, dtype=np.float32)
    arguments = {"is_causal": True, "log_decay": decay, "feature_map": "relu"}
    expected = reference.linear_attention(*arrays, **arguments)
    plain, _ = recurrence_in(np.dtype(np.float32), *arrays, None, **arguments)
    out = linear_attention(*arrays, **arguments)
    assert np.abs(out - expected).max() <= 4 * np.abs(plain - expected).max() + 1e-6


# ------------------------------------------------------------------------------------ feature maps


def test_callables(rng):
    query, key, value = qkv(rng, (2, 3), 9, 12, 8, 5, np.float16)
    seen = []

    def squares(x):
        seen.append((x.shape, x.dtype, x.flags.writeable))
        return np.concatenate([x * x, np.ones_like(x[..., :1])], axis=-1)

    out, state = linear_attention(query, key, value, feature_map=squares, return_state=True)
    assert seen == [((2, 3, 9, 8), np.float32, False), ((2, 3, 12, 8), np.float32, False)]
    assert out.dtype == np.float16
    assert state.shape == (2, 3, 9, 6)
    wide = [x.astype(np.float32) for x in (query, key)]
    expected = linear_attention(*map(squares, wide), value, feature_map=None, normalize=True)
    np.testing.assert_array_equal(out, expected.astype(np.float16))
    pair = linear_attention(query, key, value, feature_map=(lambda x: x[..., :3], lambda x: 2 * x[..., :3]))
    expected = linear_attention(wide[0][..., :3], 2 * wide[1][..., :3], value, feature_map=None, normalize=True)
    np.testing.assert_array_equal(pair, expected.astype(np.float16))
    # A result of another dtype, or that does not lie in order, is read as it is.
    for other in (lambda x: x.astype(np.float64), lambda x: np.asfortranarray(x), lambda x: x[..., ::-1]):
        linear_attention(query, key, value, feature_map=other)


def test_what_callables_must_return(rng):
    query, key, value = qkv(rng, (2,))
    for error, bad in (
        (ValueError, lambda x: x[..., 0]),
        (ValueError, lambda x: x[:1]),
        (ValueError, lambda x: x[..., :-1, :]),
        (ValueError, lambda x: x[None]),
        (ValueError, lambda x: 1.0),
        (TypeError, lambda x: x > 0),
        (TypeError, lambda x: x.astype(np.int64)),
        (TypeError, lambda x: x.astype(complex)),
        (TypeError, lambda x: None),
        (TypeError, lambda x: np.ma.masked_array(x)),
    ):
        out = np.full((2, 17, 16), 7, dtype=np.float32)
        with pytest.raises(error, match="feature_map"):
            linear_attention(query, key, value, feature_map=bad, out=out)
        assert (out == 7).all()
    with pytest.raises(ValueError, match="feature_map"):
        linear_attention(query, key, value, feature_map=(lambda x: x[..., :3], lambda x: x))
    with pytest.raises(ZeroDivisionError):
        linear_attention(query, key, value, feature_map=lambda x: 1 / 0)
    with pytest.raises(ValueError, match="read-only"):
        linear_attention(query, key, value, feature_map=lambda x: np.multiply(x, 2, out=x))


@pytest.mark.parametrize("bad", ["elu", "", "ReLU", 1, True, object(), ("relu", "relu"), (np.exp,), (np.exp, None), {}])
def test_maps_that_are_none(rng, bad):
    with pytest.raises((ValueError, TypeError), match="feature_map"):
        linear_attention(*qkv(rng), feature_map=bad)


# ------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (33, 70), (5, 257), (130, 128)])
def test_a_stream_may_be_cut_anywhere(rng, rule, head_dim, value_dim):
    """Calls that go on with the state have the bits of one call, down to single keys."""
    for dtype in (np.float32, np.float64, np.float16):
        length = 77
        arrays, arguments = problem(rng, rule, (2,), length, length, head_dim, value_dim, dtype)
        expected, last = linear_attention(*arrays, **arguments, return_state=True)
        for ends in ([1, 2, 5, 70], [24, 48], list(range(1, length)), [8, 16, 17, 60], [0, 0, 33]):
            state, outs = None, []
            kept = np.empty_like(last)
            for begin, end in itertools.pairwise([0, *ends, length]):
                now = [x[..., begin:end, :] for x in arrays]
                outs.append(linear_attention(*now, **part(arguments, begin, end), state=state, state_out=kept))
                state = kept
            assert bits(np.concatenate(outs, axis=-2)) == bits(expected), ends
            assert bits(kept) == bits(last), ends


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (48, 200), (33, 70)])
def test_threads_and_batch(rng, rule, head_dim, value_dim):
    for dtype in DTYPES:
        arrays, arguments = problem(rng, rule, (3,), 150, 150, head_dim, value_dim, dtype)
        state = random_state(rng, arrays, arguments, dtype)
        expected = linear_attention(*arrays, **arguments, state=state, return_state=True, num_threads=1)
        for threads in (2, 3, 7):
            results = linear_attention(*arrays, **arguments, state=state, return_state=True, num_threads=threads)
            assert [*map(bits, results)] == [*map(bits, expected)]
        for head, threads in itertools.product(range(3), (1, 2, 4)):
            own = {name: x[head] if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
            results = linear_attention(
                *(x[head] for x in arrays), **own, state=state[head], return_state=True, num_threads=threads
            )
            assert [*map(bits, results)] == [bits(x[head]) for x in expected]
            # The state updated in place by several threads.
            kept = state[head].copy()
            linear_attention(*(x[head] for x in arrays), **own, state=kept, state_out=kept, num_threads=threads)
            assert bits(kept) == bits(expected[1][head])


@pytest.mark.parametrize("rule", ["linear", "gated", "gated delta"])
def test_groups_have_the_bits_of_single_heads(rng, rule):
    for num_keys in (1, 2, 50):
        (_, key, value), arguments = problem(rng, rule, (2, 3), 0, num_keys, 20, 70)
        for group in (2, 4, 7, 120):
            query = rng.standard_normal((2, 3 * group, num_keys, 20)).astype(np.float32)
            out, state = linear_attention(query, key, value, **arguments, enable_gqa=True, return_state=True)
            assert state.shape[:2] == (2, 3)
            for head in (0, 1, group - 1, group, 3 * group - 1):
                of_keys = (slice(None), head // group)
                own = {name: x[of_keys] if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
                alone = linear_attention(query[:, head], key[of_keys], value[of_keys], **own, return_state=True)
                assert bits(alone[0]) == bits(out[:, head])
                assert bits(alone[1]) == bits(state[of_keys])


@pytest.mark.parametrize("rule", ["linear", "gated", "gated delta"])
@pytest.mark.parametrize("num_keys", [3, 60])
def test_layouts(rng, rule, num_keys):
    for dtype in (np.float32, np.float16):
        arrays, arguments = problem(rng, rule, (2, 3), num_keys, num_keys, 33, 70, dtype)
        state = random_state(rng, arrays, arguments)
        arguments |= {"state": state, "return_state": True}
        expected, last = linear_attention(*arrays, **arguments)
        named = dict(zip(("query", "key", "value"), arrays, strict=True), **arguments)
        for name in ("query", "key", "value", "log_decay", "state"):
            for kind, array in layouts(named[name]) if name in named else ():
                results = linear_attention(**{**named, name: array})
                assert [*map(bits, results)] == [bits(expected), bits(last)], (name, kind)
        for kind, array in layouts(expected):
            if array.flags.writeable:
                assert linear_attention(**named, out=array)[0] is array
                assert bits(array) == bits(expected), kind
        for kind, array in layouts(state):
            if array.flags.writeable:
                array[...] = state
                out, same = linear_attention(**{**named, "state": array}, state_out=array)
                assert same is array
                assert [bits(out), bits(array)] == [bits(expected), bits(last)], kind


@pytest.mark.parametrize("rule", RULES)
def test_padding(rng, rule):
    arrays, arguments = problem(rng, rule, (2,), 30, 30)
    shorter = linear_attention(*(x[:, :20] for x in arrays), **part(arguments, 0, 20), return_state=True)
    for x in arrays:
        x[:, 20:] = np.nan
    padded = linear_attention(*arrays, **arguments, key_lengths=20, query_lengths=20, return_state=True)
    assert bits(padded[0][:, :20]) == bits(shorter[0])
    assert (padded[0][:, 20:] == 0).all()
    assert bits(padded[1]) == bits(shorter[1])


# ------------------------------------------------------------------------------------ the state


def test_the_state_is_a_plain_array(rng):
    """It can be saved, copied, sliced, and its beams reordered."""
    query, key, value = qkv(rng, (4, 2), 10, 10)
    whole = linear_attention(query, key, value, is_causal=True)
    first = [x[..., :6, :] for x in (query, key, value)]
    rest = [x[..., 6:, :] for x in (query, key, value)]
    _, state = linear_attention(*first, is_causal=True, return_state=True)
    assert type(state) is np.ndarray
    assert state.flags.c_contiguous
    np.testing.assert_allclose(state[..., -1], reference.FEATURE_MAPS["elu+1"](first[1]).sum(-2), rtol=1e-5)
    file = io.BytesIO()
    np.save(file, state)
    file.seek(0)
    for same in (np.load(file), copy.deepcopy(state), state.tolist()):
        if isinstance(same, list):
            same = np.array(same, dtype=np.float32)
        assert bits(linear_attention(*rest, is_causal=True, state=same)) == bits(whole[..., 6:, :])
    beams = [2, 2, 0, 3]
    out = linear_attention(*(x[beams] for x in rest), is_causal=True, state=state[beams])
    assert bits(out) == bits(whole[beams][..., 6:, :])
    some = linear_attention(*(x[1:3] for x in rest), is_causal=True, state=state[1:3])
    assert bits(some) == bits(whole[1:3, :, 6:])


def test_states_that_do_not_fit(rng):
    query, key, value = qkv(rng, (2, 3), 5, 7, 8, 6)
    out = np.full((2, 3, 5, 6), 7, dtype=np.float32)
    good = np.zeros((2, 3, 8, 7), dtype=np.float32)

    def refuse(error, message, **arguments):
        state_out = arguments.get("state_out")
        before = state_out.copy() if isinstance(state_out, np.ndarray) else None
        with pytest.raises(error, match=message):
            linear_attention(query, key, value, **{"out": out, **arguments})
        assert (out == 7).all()
        if before is not None:
            np.testing.assert_array_equal(state_out, before)

    for shape in ((2, 3, 8, 6), (3, 8, 7), (2, 3, 7, 7), (1, 2, 3, 8, 7), (2, 1, 8, 7), ()):
        refuse(ValueError, "state", state=np.zeros(shape, dtype=np.float32))
        refuse(ValueError, "state_out", state_out=np.zeros(shape, dtype=np.float32))
    for dtype in (np.float64, np.float16, np.int64, bool, complex, object, ">f4"):
        refuse(TypeError, "state", state=good.astype(dtype))
        refuse(TypeError, "state_out", state_out=good.astype(dtype))
    refuse(TypeError, "state", state=np.ma.masked_array(good))
    refuse(TypeError, "state_out", state_out=np.ma.masked_array(good))
    refuse(TypeError, "state_out", state_out=good.tolist())
    read_only = good.copy()
    read_only.flags.writeable = False
    refuse(ValueError, "state_out", state_out=read_only)
    refuse(ValueError, "state_out", state_out=np.lib.stride_tricks.as_strided(good.copy(), good.shape, (0, 0, 28, 4)))
    refuse(TypeError, "return_state", return_state=1)
    # Overlaps.
    buffer = np.zeros(2 * good.size, dtype=np.float32)
    state = buffer[: good.size].reshape(good.shape)
    refuse(ValueError, "state_out overlaps state", state=state, state_out=buffer[1 : good.size + 1].reshape(good.shape))
    refuse(ValueError, "state_out overlaps state", state=state, state_out=state[::-1])
    out_there = buffer[: out.size].reshape(out.shape)
    refuse(ValueError, "out overlaps state", state=state, out=out_there)
    refuse(ValueError, "state_out overlaps out", state_out=state, out=out_there)
    for name, x in (("query", query), ("key", key), ("value", value)):
        flat = np.zeros(1000, dtype=np.float32)
        shared = flat[: x.size].reshape(x.shape)
        with pytest.raises(ValueError, match=f"state_out overlaps {name}"):
            linear_attention(**{"query": query, "key": key, "value": value, name: shared},
                             state_out=flat[: good.size].reshape(good.shape))  # fmt: skip


def test_arguments_that_do_not_go_together(rng):
    arrays = qkv(rng, (2,), 5, 7, 8, 6)
    beta, decay = np.ones((2, 7)), np.zeros((2, 7, 8))
    for message, arguments in (
        ("log_decay needs is_causal", {"log_decay": decay}),
        ("beta needs is_causal", {"beta": beta}),
        ("normalize", {"is_causal": True, "beta": beta, "normalize": True}),
        ("scale", {"scale": 2.0}),
        ("scale", {"scale": 2.0, "feature_map": None, "normalize": True}),
        ("eps", {"eps": -1e-9}),
        ("eps", {"eps": np.nan}),
        ("log_decay", {"is_causal": True, "log_decay": decay[..., :7]}),
        ("log_decay", {"is_causal": True, "log_decay": np.zeros((7,))}),
        ("beta", {"is_causal": True, "beta": beta[..., :5]}),
        ("beta", {"is_causal": True, "beta": np.zeros((3, 7))}),
        ("beta", {"is_causal": True, "beta": np.zeros((2, 7, 1))}),
    ):
        with pytest.raises(ValueError, match=message):
            linear_attention(*arrays, **arguments)
    for message, arguments in (
        ("normalize", {"normalize": 1}),
        ("eps", {"eps": "1"}),
        ("log_decay", {"is_causal": True, "log_decay": decay.astype(complex)}),
        ("beta", {"is_causal": True, "beta": beta.astype(object)}),
    ):
        with pytest.raises(TypeError, match=message):
            linear_attention(*arrays, **arguments)
    query, key, value = qkv(rng, (1, 4), kv_batch=(1, 2))
    with pytest.raises(ValueError, match=r"key_lengths.*group"):
        linear_attention(query, key, value, enable_gqa=True, key_lengths=[[3, 4, 5, 5]])
    linear_attention(query, key, value, enable_gqa=True, key_lengths=[[3, 3, 5, 5]])
    with pytest.raises(ValueError, match="enable_gqa"):
        linear_attention(query, key, value)


def test_a_step_makes_no_array_of_the_states_size(rng):
    query, key, value = qkv(rng, (8,), 1, 1, 128, 128)
    state = np.zeros((8, 128, 129), dtype=np.float32)
    out = np.empty((8, 1, 128), dtype=np.float32)

    def step():
        linear_attention(query, key, value, is_causal=True, state=state, state_out=state, out=out)

    step()
    gc.collect()
    tracemalloc.start()
    try:
        step()
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------------------ hostile numbers


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["key", "value"])
def test_nan_reaches_only_what_sees_it(rng, rule, name):
    arrays, arguments = problem(rng, rule, (2,), 50, 50, 20, 70)
    if "log_decay" in arguments:
        arguments["log_decay"] = np.maximum(arguments["log_decay"], -1)
    expected = linear_attention(*arrays, **arguments)
    arrays[("query", "key", "value").index(name)][0, 31] = np.nan
    out, state = linear_attention(*arrays, **arguments, return_state=True)
    assert bits(out[0, :31]) == bits(expected[0, :31])
    assert bits(out[1]) == bits(expected[1])
    assert np.isnan(out[0, 31:]).all()
    assert np.isnan(state[0]).any()
    assert np.isfinite(state[1]).all()


@pytest.mark.parametrize("rule", ["gated", "gated delta"])
def test_packed_sequences(rng, rule):
    """A decay of -inf at each first key: sequences on one axis that do not know of each other, whatever is in them."""
    arrays, arguments = problem(rng, rule, (2,), 90, 90, 20, 33)
    arguments["log_decay"] = np.maximum(arguments["log_decay"], -1)
    starts = [0, 1, 2, 30, 54, 60, 61, 90]
    arguments["log_decay"][:, starts[:-1]] = -np.inf
    arrays[2][:, 29] = np.nan
    out, state = linear_attention(*arrays, **arguments, return_state=True)
    for begin, end in itertools.pairwise(starts):
        alone = linear_attention(*(x[:, begin:end] for x in arrays), **part(arguments, begin, end), return_state=True)
        assert bits(out[:, begin:end]) == bits(alone[0])
    assert bits(state) == bits(alone[1])
    assert np.isfinite(out[:, 30:]).all()


def test_strong_decays_overflow_nothing(rng):
    """Chunked forms divide by products of decays; the recurrence does not."""
    for dtype in DTYPES:
        arrays = qkv(rng, (2,), 60, 60, 16, 16, dtype)
        for size in (1.0, 50.0, 90.0, 1e4, 1e30):
            assert_linear(*arrays, is_causal=True, log_decay=-size * rng.random((2, 60, 16)))
    # And growth overflows where it must.
    grown = linear_attention(*arrays, feature_map=None, is_causal=True, log_decay=np.full((60, 1), 500.0))
    assert np.isfinite(grown[:, :2]).all()
    assert not np.isfinite(grown[:, 3:]).any()


def test_decays_are_exponentials(rng):
    """One key, then decays alone: the state shows them."""
    for dtype in DTYPES:
        finfo = np.finfo(dtype)
        largest, least = np.log(float(finfo.max)), np.log(float(finfo.smallest_normal))
        logs = np.concatenate([rng.uniform(least, largest, 1000), [0, largest - 1e-3, least + 1e-3, 1e-8]])
        logs = logs.astype(dtype)[:, None, None]
        zero = np.zeros((len(logs), 0, 1), dtype)
        ones = np.ones((len(logs), 1, 1), dtype)
        out, state = linear_attention(
            zero, ones * 0, ones, feature_map=None, is_causal=True, log_decay=logs, state=ones, return_state=True
        )
        assert out.shape == (len(logs), 0, 1)
        expected = np.exp(logs.astype(np.longdouble))
        error = np.abs(state - expected) / expected
        assert error.max() < 6 * finfo.eps


def test_denominators(rng):
    """0 where the denominator is 0; tiny and huge ones divide as they should."""
    query, key, value = qkv(rng, (), 6, 4, 8, 40)
    negative = -np.abs(query)
    assert (linear_attention(negative, key, value, feature_map="relu", eps=0) == 0).all()
    assert (linear_attention(negative, key, value, feature_map="relu") == 0).all()
    assert (linear_attention(query, key[:0], value[:0], eps=0.0, feature_map="relu") == 0).all()
    for size in (1e-40, 1e-38, 1e-30, 1e30, 3e38):
        one = np.float32(size) * np.ones((1, 1), dtype=np.float32)
        out = linear_attention(one, np.ones((1, 1), np.float32), np.full((1, 40), 0.5, np.float32),
                               feature_map=None, normalize=True, eps=0)  # fmt: skip
        np.testing.assert_allclose(out, 0.5, rtol=1e-6)


def test_features_far_from_zero(rng):
    """elu + 1 over the whole range, infinities and NaN."""
    for dtype in DTYPES:
        x = np.concatenate(
            [np.linspace(-120, 20, 5000), [-800, -1e30, -np.inf, 0.0, -0.0, 1e30, np.inf, np.nan, 1e-30]]
        )
        x = x.astype(dtype)[:, None]
        unit = np.ones((1, 1), dtype)
        features = linear_attention(x, unit, unit, feature_map=(lambda x: x, lambda x: x), normalize=False, scale=1.0)
        np.testing.assert_array_equal(features, x)
        # The state of single keys shows their features.
        _, state = linear_attention(
            unit[:0], x[:, :, None], np.ones((len(x), 1, 1), dtype), normalize=False, return_state=True
        )
        expected = reference.FEATURE_MAPS["elu+1"](x.astype(np.float64))
        finfo = np.finfo(dtype)
        bound = 2 * finfo.eps * np.abs(np.nan_to_num(expected, posinf=0)) + float(finfo.smallest_subnormal)
        assert_within(state[..., 0], expected, bound, "features")


# ------------------------------------------------------------------------------------ memory, Ctrl-C


def walk(dtype, at_end):
    """Calls with every array guarded. Runs in a child, which a fault would kill."""
    rng = np.random.default_rng(1)

    def guard(x):
        return guarded(np.ascontiguousarray(x), at_end)

    for rule, sizes in itertools.product(("linear", "gated", "gated a head", "gated delta"), SIZES):
        for num_keys in {1, sizes[1]}:
            arrays, arguments = problem(rng, rule, (2,), sizes[0], num_keys, *sizes[2:], dtype=np.dtype(dtype).type)
            state = guard(random_state(rng, arrays, arguments, dtype))
            out = guard(np.zeros((2, sizes[0], sizes[3]), dtype))
            arguments = {name: guard(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
            linear_attention(*map(guard, arrays), **arguments, state=state, state_out=state, out=out)
            assert np.isfinite(out).all()
            lengths = {"key_lengths": guard(np.array([num_keys, num_keys // 2]))}
            linear_attention(*map(guard, arrays), **arguments, **lengths, state_out=state, out=out)
            own = {name: x[0] if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
            for layout in (guarded_rows, guarded_columns):
                rows = [layout(x[0], at_end) for x in (*arrays, out, state)]
                linear_attention(*rows[:3], **own, out=rows[3], state=rows[4], state_out=rows[4])
                assert np.isfinite(rows[3]).all()


@linux
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_access_outside_the_arrays(dtype, at_end):
    fresh_process.run(
        f"import faulthandler; faulthandler.enable()\nimport test_linear; test_linear.walk({dtype!r}, {at_end})"
    )


@linux
def test_memory_does_not_grow_with_the_length():
    """30 MB of arrays; a state for each key would be 1 GB."""
    fresh_process.run("""
        import numpy as np
        import fastattn
        def peak():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
        x = np.random.default_rng(0).standard_normal((60_000, 64), dtype=np.float32)[None, :, None].swapaxes(1, 2)
        out = np.zeros_like(x)
        decay = np.full((1, 1, 60_000, 1), -0.1, np.float32)
        fastattn.linear_attention(x[..., :300, :], x[..., :300, :], x[..., :300, :], is_causal=True, num_threads=2)
        before = peak()
        for arguments in ({}, {"log_decay": decay}, {"log_decay": decay, "beta": decay[..., 0]}):
            fastattn.linear_attention(x, x, x, is_causal=True, out=out, num_threads=2, **arguments)
        fastattn.linear_attention(x, x, x, out=out)
        assert peak() - before < 4096, (peak(), before)
    """)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_leaves_the_state_as_it_was():
    process = fresh_process.start("""
        import signal
        import numpy as np
        import fastattn
        signal.signal(signal.SIGINT, signal.default_int_handler)
        endless = np.broadcast_to(np.ones((1, 64), dtype=np.float32), (2, 2**30, 64))
        state = np.full((2, 64, 65), 3, dtype=np.float32)
        print("begin", flush=True)
        try:
            fastattn.linear_attention(endless[:, :0], endless, endless, is_causal=True, state=state, state_out=state)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        assert (state == 3).all()
    """)
    watchdog = threading.Timer(20, process.kill)
    watchdog.start()
    try:
        assert process.stdout.readline() == "begin\n", process.stderr.read()
        time.sleep(0.5)
        process.send_signal(SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        returncode, _, stderr = fresh_process.finish(process)
        assert returncode == 0, stderr
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


def test_the_bound_can_fail(rng):
    """A decay that is applied after a key and not before it is outside the bound."""
    arrays, arguments = problem(rng, "gated")
    expected = reference.linear_attention(*arrays, **arguments, return_state=True)
    wrong = {**arguments, "log_decay": np.roll(arguments["log_decay"], -1, axis=-2)}
    bound = linear_bounds(*arrays, None, expected, **arguments)[0]
    with pytest.raises(AssertionError, match="outside the bound"):
        assert_within(fastattn.linear_attention(*arrays, **wrong), expected[0], bound, "output")


def test_spaced_rows_of_everything(rng):
    """Strides of all arrays at once."""
    arrays, arguments = problem(rng, "gated delta", (2, 2), 30, 30, 17, 19)
    expected = linear_attention(*arrays, **arguments)
    apart = {name: spaced(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    assert bits(linear_attention(*map(spaced, arrays), **apart)) == bits(expected)
