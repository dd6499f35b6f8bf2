"""Calls of MultiHeadAttention that leave something out: padding of packed sequences, a context that is projected once,
the weights of other heads, and what surrounds attention in a step over a cache. All have the bits of the long way."""

import copy
import pickle
import threading

import numpy as np
import pytest
from problems import DTYPES, bits, sixteen_bits
from test_multihead import normal, parameters

import fastattn
from fastattn import KVCache, _step, reference

# ------------------------------------------------------------------------------------- packed sequences

LENGTHS = (13, 0, 40, 9, 1, 27)
RULES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window_size": (3, 2)},
    "chunks": {"chunk_size": 5, "left_chunks": 1},
    "slopes": {"alibi_slopes": np.linspace(0.1, 0.4, 4)},
    "sinks": {"sinks": np.linspace(-1, 1, 4), "scale": 0.3, "softcap": 20.0},
    "relative bias": {"window_size": (4, 4), "relative_bias": np.linspace(-1, 1, 36).reshape(4, 1, 9)},
    "activation": {"activation": "sigmoid"},
}
LAYERS = {
    "plain": {},
    "rotary": {"rotary_base": 100.0},
    "grouped": {"num_kv_heads": 2, "value_dim": 5},
    "without w_out": {"d_out": None},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2), (1, 4), (2, 0, 3), (0, 4, 2)])
def test_pack_and_unpack(rng, shape, dtype):
    x = normal(rng, *shape, dtype=dtype)
    lengths = rng.integers(0, shape[1] + 1, shape[0])
    packed, cu_seqlens = fastattn.pack(x, lengths)
    expected = reference.pack(x, lengths)
    assert bits(packed) == bits(expected[0]) and packed.dtype == dtype
    np.testing.assert_array_equal(cu_seqlens, expected[1])
    assert cu_seqlens.dtype == np.int64
    assert packed.flags.c_contiguous and not np.shares_memory(packed, x)
    for length in (None, shape[1], shape[1] + 3):
        padded = fastattn.unpack(packed, cu_seqlens, length)
        assert bits(padded) == bits(reference.unpack(packed, cu_seqlens, length)) and padded.dtype == dtype
    valid = np.arange(shape[1]) < lengths[:, None]
    np.testing.assert_array_equal(fastattn.unpack(packed, cu_seqlens, shape[1])[valid], x[valid])


def test_pack_takes_any_layout_and_dtype(rng):
    x = normal(rng, 5, 4, 3).transpose(1, 0, 2)[:, ::-1]
    packed, cu_seqlens = fastattn.pack(x, np.array([2, 5, 0, 1], np.uint8))
    assert bits(packed) == bits(reference.pack(x, [2, 5, 0, 1])[0])
    assert fastattn.unpack(packed[::-1], cu_seqlens.tolist()).shape == (4, 5, 3)
    for dtype in (bool, np.int32, np.complex64, "U3"):
        words = np.array([[1, 0], [1, 1]]).astype(dtype)
        tokens, starts = fastattn.pack(words, [1, 2])
        assert tokens.dtype == words.dtype
        np.testing.assert_array_equal(fastattn.unpack(tokens, starts)[1], words[1])


@pytest.mark.parametrize("dtype", [*DTYPES, *sixteen_bits()])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences_are_as_each_alone(rng, kind, rule, dtype):
    """To the bit, where no sequence has so few tokens that alone it takes the loops for few queries."""
    layer = fastattn.MultiHeadAttention(**parameters(rng, dtype=np.float32, **LAYERS[kind]))
    x = normal(rng, len(LENGTHS), 40, 24).astype(dtype)
    packed, cu_seqlens = fastattn.pack(x, LENGTHS)
    out = fastattn.unpack(layer(packed, cu_seqlens=cu_seqlens, **RULES[rule]), cu_seqlens)
    for b, n in enumerate(LENGTHS):
        alone = layer(x[b, :n], **RULES[rule])
        assert out.dtype == alone.dtype
        if n > 8:
            assert bits(out[b, :n]) == bits(alone), n
        else:
            np.testing.assert_allclose(out[b, :n].astype(float), alone.astype(float), rtol=1e-2, atol=1e-2)
        assert not out[b, n:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_cross_attention(rng, dtype):
    layer = fastattn.MultiHeadAttention(**parameters(rng, d_context=9, dtype=dtype))
    x, context = normal(rng, 6, 40, 24, dtype=dtype), normal(rng, 6, 30, 9, dtype=dtype)
    there = (30, 7, 11, 0, 12, 28)
    (tokens, cu_seqlens), (other, cu_context) = fastattn.pack(x, LENGTHS), fastattn.pack(context, there)
    out, lse = layer(tokens, other, cu_seqlens=cu_seqlens, cu_seqlens_context=cu_context, return_lse=True)
    for b, (n, m) in enumerate(zip(LENGTHS, there, strict=True)):
        alone, alone_lse = layer(x[b, :n], context[b, :m], return_lse=True)
        if n > 8:
            assert bits(out[cu_seqlens[b] : cu_seqlens[b + 1]]) == bits(alone)
            assert bits(lse[:, cu_seqlens[b] : cu_seqlens[b + 1]]) == bits(alone_lse)


def test_packed_against_the_reference(rng):
    given = parameters(rng, d_context=9, dtype=np.float64)
    x, context = normal(rng, 23, 24, dtype=np.float64), normal(rng, 11, 9, dtype=np.float64)
    arguments = {"cu_seqlens": [0, 5, 5, 23], "cu_seqlens_context": [0, 1, 3, 11]}
    np.testing.assert_allclose(
        fastattn.MultiHeadAttention(**given)(x, context, **arguments),
        reference.MultiHeadAttention(**given)(x, context, **arguments),
        rtol=1e-11,
        atol=1e-11,
    )
    given = parameters(rng, rotary_base=100.0, dtype=np.float64)
    x, cu_seqlens = normal(rng, 23, 24, dtype=np.float64), [0, 5, 5, 21, 23]
    arguments = {"cu_seqlens": cu_seqlens, "is_causal": True, "return_lse": True}
    ours = fastattn.MultiHeadAttention(**given)(x, **arguments)
    for a, b in zip(ours, reference.MultiHeadAttention(**given)(x, **arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_packed_into_out(rng):
    for d_out in (10, None):
        layer = fastattn.MultiHeadAttention(**parameters(rng, d_out=d_out))
        x = normal(rng, 20, 24)
        out = np.full((20, layer.d_out), np.nan, np.float32)
        assert layer(x, cu_seqlens=[0, 9, 20], out=out) is out
        assert bits(out) == bits(layer(x, cu_seqlens=[0, 9, 20]))
    assert layer(np.ones((0, 24), np.float32), cu_seqlens=[0]).shape == (0, 24)
    assert layer(np.ones((0, 24), np.float32), cu_seqlens=[0, 0, 0]).shape == (0, 24)


REFUSED = {
    "mask": np.ones((20, 20), bool),
    "block_mask": np.ones((1, 1), bool),
    "bias": np.zeros((20, 20), np.float32),
    "key_lengths": 20,
    "query_lengths": 20,
    "query_offset": 0,
    "return_weights": True,
    "cache": KVCache((), 4, 30, 6),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_goes_with_no_packed_sequences_is_named(rng, name):
    layer = fastattn.MultiHeadAttention(**parameters(rng))
    with pytest.raises(ValueError, match=f"^{name} and cu_seqlens do not go together"):
        layer(normal(rng, 20, 24), cu_seqlens=[0, 20], **{name: REFUSED[name]})


def test_wrong_packed_sequences(rng):
    layer = fastattn.MultiHeadAttention(**parameters(rng, d_context=9))
    same = fastattn.MultiHeadAttention(**parameters(rng))
    x, context = normal(rng, 20, 24), normal(rng, 11, 9)
    for bad in ([0, 9], [1, 20], [0, 12, 9, 20], [[0, 20]], [0.0, 20.0], [], "0", None):
        with pytest.raises((ValueError, TypeError), match="cu_seqlens"):
            layer(x, context, cu_seqlens=bad, cu_seqlens_context=[0, 11])
        with pytest.raises((ValueError, TypeError), match="cu_seqlens_context"):
            layer(x, context, cu_seqlens=[0, 20], cu_seqlens_context=bad)
    with pytest.raises(ValueError, match="cu_seqlens_context has 3 numbers"):
        layer(x, context, cu_seqlens=[0, 20], cu_seqlens_context=[0, 5, 11])
    with pytest.raises(ValueError, match="context and cu_seqlens_context go together"):
        same(x, cu_seqlens=[0, 20], cu_seqlens_context=[0, 20])
    with pytest.raises(ValueError, match=r"^x has shape \(1, 20, 24\)"):
        same(x[None], cu_seqlens=[0, 20])
    with pytest.raises(ValueError, match="relative_bias"):
        same(x, cu_seqlens=[0, 20], window_size=(1, 1), relative_bias=np.zeros((20, 3)))
    with pytest.raises(ValueError, match="projected context"):
        layer(x, layer.project_context(context), cu_seqlens=[0, 20])


def test_wrong_lengths_for_pack():
    x = np.ones((2, 3, 4))
    for bad in ([1], [1, 4], [-1, 1], [1.0, 2.0], 2, [[1, 2]], None):
        with pytest.raises((ValueError, TypeError), match="lengths"):
            fastattn.pack(x, bad)
    with pytest.raises(ValueError, match="x has shape"):
        fastattn.pack(x[0, 0], [1])
    with pytest.raises(ValueError, match="length must be an integer of at least 2"):
        fastattn.unpack(np.ones(4), [0, 2, 4], 1)
    with pytest.raises(ValueError, match="cu_seqlens"):
        fastattn.unpack(np.ones(4), [0, 2, 3])
    with pytest.raises(ValueError, match="packed"):
        fastattn.unpack(1.0, [0])


# ------------------------------------------------------------------------------------ a projected context


@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("dtype", [*DTYPES, *sixteen_bits()])
@pytest.mark.parametrize("kind", [{}, {"num_kv_heads": 2, "value_dim": 5}, {"d_context": 9}, {"d_out": None}])
def test_a_projected_context_is_the_context(rng, kind, dtype, length):
    layer = fastattn.MultiHeadAttention(**{**parameters(rng, **kind), "w_query": normal(rng, 24, 24).astype(dtype)})
    x, context = normal(rng, 3, length, 24).astype(dtype), normal(rng, 3, 50, layer.d_context).astype(dtype)
    lengths = [50, 0, 31]
    expected = layer(x, context, key_lengths=lengths, return_lse=True)
    for of in (lengths, np.array(lengths, np.int16), None):
        projected = layer.project_context(context, of)
        rules = {"key_lengths": lengths} if of is None else {}
        answer = layer(x, context=projected, return_lse=True, **rules)
        assert [bits(a) for a in answer] == [bits(a) for a in expected]
        assert answer[0].dtype == expected[0].dtype
    assert projected.key.shape == (3, layer.num_kv_heads, 50, layer.head_dim)
    assert projected.value.shape == (3, layer.num_kv_heads, 50, layer.value_dim)
    assert projected.key.flags.c_contiguous and projected.value.flags.c_contiguous
    assert projected.nbytes == projected.key.nbytes + projected.value.nbytes
    with pytest.raises(ValueError, match="read-only"):
        projected.key[...] = 0


@pytest.mark.parametrize("dtype", [*DTYPES, *sixteen_bits()])
@pytest.mark.parametrize("of", [None, [50, 0, 31], 20])
@pytest.mark.parametrize("kind", [{}, {"num_kv_heads": 2, "value_dim": 5}, {"d_context": 9, "biases": False}])
def test_a_look_at_a_context_is_a_call(rng, kind, of, dtype):
    """The usual call is taken the short way; all have the bits of the context itself."""
    given = parameters(rng, **kind)
    layer = fastattn.MultiHeadAttention(**{n: x.astype(dtype) if hasattr(x, "dtype") else x for n, x in given.items()})
    context = normal(rng, 3, 50, layer.d_context).astype(dtype)
    projected = layer.project_context(context, of)
    for length, rules in (
        (1, {}),
        (1, {"scale": 0.3, "num_threads": 1}),
        (4, {"sinks": np.ones(4)}),
        (1, {"softcap": 3.0}),
    ):
        x = normal(rng, 3, length, 24).astype(dtype)
        out = _step.look(layer, x, projected, {**rules})
        assert (out is None) == (of == 20), "one length for all goes the long way"
        expected = layer(x, context, key_lengths=of, **rules)
        assert bits(layer(x, projected, **rules)) == bits(expected)
        assert out is None or (bits(out) == bits(expected) and out.dtype == expected.dtype)
    assert _step.look(layer, x, projected, {"key_lengths": 3}) is None
    assert _step.look(layer, x[:2], projected, {}) is None
    assert 0 < layer._scratch.nbytes or of == 20


def test_a_projected_context_broadcasts(rng):
    """Beams share the context of their sentence."""
    layer = fastattn.MultiHeadAttention(**parameters(rng))
    x, context = normal(rng, 2, 5, 1, 24), normal(rng, 2, 1, 30, 24)
    lengths = np.array([[30], [11]])
    expected = layer(x, context, key_lengths=lengths)
    assert bits(layer(x, layer.project_context(context, lengths))) == bits(expected)
    one = layer.project_context(context[0, 0], 11)
    assert one.lengths == 11
    assert bits(layer(x[0], one)) == bits(layer(x[0], context[0, 0], key_lengths=11))
    rows = layer.project_context(context[:, 0], lengths[:, 0])
    assert bits(layer(x[0, :2], rows)) == bits(layer(x[0, :2], context[:, 0], key_lengths=lengths[:, 0]))


def test_a_projected_context_pickles_and_copies(rng):
    layer = fastattn.MultiHeadAttention(**parameters(rng))
    x, context = normal(rng, 2, 1, 24), normal(rng, 2, 30, 24)
    projected = layer.project_context(context, [30, 7])
    expected = bits(layer(x, projected))
    for again in (pickle.loads(pickle.dumps(projected)), copy.copy(projected), copy.deepcopy(projected)):
        for same in (layer, pickle.loads(pickle.dumps(layer)), copy.copy(layer), copy.deepcopy(layer)):
            assert bits(same(x, again)) == expected
        assert not again.key.flags.writeable and not again.lengths.flags.writeable
    assert repr(projected) == "<ProjectedContext: key (2, 4, 30, 6), value (2, 4, 30, 6), with lengths, float32>"


def test_projected_contexts_that_do_not_fit(rng):
    given = parameters(rng)
    layer, other = fastattn.MultiHeadAttention(**given), fastattn.MultiHeadAttention(**given)
    x, context = normal(rng, 2, 3, 24), normal(rng, 2, 30, 24)
    projected = layer.project_context(context, 20)
    with pytest.raises(ValueError, match="another layer has projected"):
        other(x, projected)
    with pytest.raises(ValueError, match="key_lengths"):
        layer(x, projected, key_lengths=10)
    with pytest.raises(ValueError, match="cache"):
        layer(x, projected, cache=KVCache(2, 4, 50, 6))
    with pytest.raises(ValueError, match="do not broadcast"):
        layer(normal(rng, 3, 3, 24), projected)
    with pytest.raises(TypeError, match="vjp"):
        layer.vjp(x, projected)
    for bad in (31, -1, [1, 2, 3], 1.0, "1"):
        with pytest.raises((ValueError, TypeError), match="context_lengths"):
            layer.project_context(context, bad)
    with pytest.raises(ValueError, match="context has shape"):
        layer.project_context(x[..., :9])
    with pytest.raises(ValueError, match="rotary_base"):
        fastattn.MultiHeadAttention(**parameters(rng, rotary_base=10.0)).project_context(context)


# --------------------------------------------------------------------------------- weights of some heads


@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("heads", [[2], [-1, 0], [1, 1, 3], [], (0, 1, 2, 3), np.array([3, -4], np.int8), range(2)])
@pytest.mark.parametrize("kind", [{}, {"num_kv_heads": 2}, {"rotary_base": 100.0}])
def test_weights_of_some_heads(rng, kind, heads, length):
    layer = fastattn.MultiHeadAttention(**parameters(rng, **kind))
    x = normal(rng, 2, length, 24)
    for rules in (
        {},
        {"mask": rng.random((2, 4, length, length)) < 0.7, "alibi_slopes": np.linspace(0, 1, 4)},
        {"bias": normal(rng, 4, length, length), "sinks": np.linspace(-1, 1, 4), "key_lengths": [length, 1]},
        {"window_size": (2, 2), "relative_bias": normal(rng, 4, 1, 5), "return_lse": True},
        {"mask": rng.random((1, length, length)) < 0.7, "activation": "entmax15"},
    ):
        out, weights, *rest = layer(x, return_weights=True, **rules)
        answer = layer(x, return_weights=heads, **rules)
        assert [bits(a) for a in answer] == [bits(out), bits(weights[:, list(heads)]), *map(bits, rest)]


def test_weights_of_some_heads_of_a_cache_and_a_context(rng):
    layer = fastattn.MultiHeadAttention(**parameters(rng))
    x, context = normal(rng, 2, 1, 24), normal(rng, 2, 300, 24)
    caches = [KVCache(2, 4, 400, 6, window=350) for _ in range(2)]
    for cache in caches:
        layer(context, cache=cache)
    for _ in range(2):
        weights = layer(x, cache=caches[0], return_weights=True)[1]
        some = layer(x, cache=caches[1], return_weights=[3, 1])[1]
        assert bits(some) == bits(weights[:, [3, 1]])
    projected = layer.project_context(context)
    assert bits(layer(x, projected, return_weights=[0])[1]) == bits(layer(x, context, return_weights=True)[1][:, :1])


def test_heads_that_are_none(rng):
    layer = fastattn.MultiHeadAttention(**parameters(rng))
    x = normal(rng, 5, 24)
    for bad in ([4], [-5], [0.5], [[0]], [True], np.array([0.0]), "all", 1, None):
        with pytest.raises((ValueError, TypeError), match="return_weights"):
            layer(x, return_weights=bad)


def test_weights_of_some_heads_against_the_reference(rng):
    given = parameters(rng, dtype=np.float64)
    x = normal(rng, 2, 9, 24, dtype=np.float64)
    ours = fastattn.MultiHeadAttention(**given)(x, return_weights=[2, -1])
    for a, b in zip(ours, reference.MultiHeadAttention(**given)(x, return_weights=[2, -1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


# -------------------------------------------------------------------------------------- a step over a cache

STEPS = {
    "plain": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "rotary": ({"rotary_base": 100.0}, {"is_causal": True}),
    "interleaved": ({"rotary_base": 100.0, "rotary_interleaved": True, "rotary_dim": 4}, {}),
    "frequencies": ({"rotary_frequencies": (np.array([1.0, 0.1, 0.01]), 1.2)}, {}),
    "nothing turns": ({"rotary_base": 100.0, "rotary_dim": 0}, {}),
    "grouped": ({"num_kv_heads": 2, "value_dim": 5}, {"is_causal": True, "window_size": 3}),
    "one key head": ({"num_kv_heads": 1, "biases": False}, {"window_size": (2, None), "num_threads": 1}),
    "without w_out": ({"d_out": None}, {"softcap": 5.0, "scale": 0.2}),
    "slopes": ({}, {"alibi_slopes": np.linspace(0, 1, 4), "sinks": np.linspace(-1, 1, 4)}),
    "relative bias": (
        {},
        {"is_causal": True, "window_size": (3, 0), "relative_bias": np.linspace(-1, 1, 16).reshape(4, 1, 4)},
    ),
    "activation": ({}, {"activation": "entmax15"}),
}


class Long:
    """The general way: no call is usual."""

    def __enter__(self):
        self.usual = fastattn.multihead.step
        fastattn.multihead.step = lambda *_: None

    def __exit__(self, *_):
        fastattn.multihead.step = self.usual


def same_caches(a, b):
    assert bits(a.key) == bits(b.key) and bits(a.value) == bits(b.value)
    np.testing.assert_array_equal(a.lengths, b.lengths)
    np.testing.assert_array_equal(a.dropped, b.dropped)
    assert a.lengths.dtype == np.int64 and not a.lengths.flags.writeable


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("stored", ["same", np.float16])
@pytest.mark.parametrize("dtype", [*DTYPES, *sixteen_bits()])
@pytest.mark.parametrize("kind", STEPS)
def test_a_step_is_a_call(rng, kind, dtype, stored, window, ragged):
    given, rules = STEPS[kind]
    layer = fastattn.MultiHeadAttention(
        **{name: x.astype(dtype) if isinstance(x, np.ndarray) else x for name, x in parameters(rng, **given).items()}
    )
    sizes = ((3,), layer.num_kv_heads, 17, layer.head_dim, layer.value_dim)
    caches = [KVCache(*sizes, dtype=dtype if stored == "same" else stored, window=window) for _ in range(2)]
    x = normal(rng, 3, 24, 24).astype(dtype)
    at = 0
    for n in (5, 1, 1, 3, 1, 1, 2, 1, 1, 1) + (1,) * 7 * (window is not None):
        more = {"query_lengths": [5, 2, 0]} if ragged and at == 0 else {}
        tokens = np.ascontiguousarray(x[:, at : at + n])
        out = layer(tokens, cache=caches[0], **rules, **more)
        with Long():
            expected = layer(tokens, cache=caches[1], **rules, **more)
        assert bits(out) == bits(expected) and out.dtype == expected.dtype and out.flags.writeable
        assert out.shape == expected.shape
        same_caches(*caches)
        at += n


@pytest.mark.parametrize("dtype", [np.float32, *sixteen_bits()])
def test_a_cache_with_more_digits_than_its_layer(rng, dtype):
    """Heads in float64 go through products in float32."""
    given = {name: x.astype(dtype) if isinstance(x, np.ndarray) else x for name, x in parameters(rng).items()}
    layer, plain = fastattn.MultiHeadAttention(**given), reference.MultiHeadAttention(**given)
    caches = [KVCache((), 4, 30, 6, dtype=np.float64) for _ in range(2)]
    for n in (1, 2, 3, 8, 9):
        x = normal(rng, n, 24).astype(dtype)
        out, expected = layer(x, cache=caches[0]), plain(x, cache=caches[1])
        tolerance = (2e-5 if dtype == np.float32 else 2e-2) * np.abs(expected).max()
        np.testing.assert_allclose(out.astype(np.float64), expected, rtol=0, atol=tolerance)


def test_a_step_is_what_it_is_called():
    """The usual call is taken the short way; one with anything else is not."""
    rng = np.random.default_rng(0)
    layer = fastattn.MultiHeadAttention(**parameters(rng))
    x = normal(rng, 2, 1, 24)
    cache = KVCache(2, 4, 9, 6)
    for rules in ({}, {"is_causal": True, "window_size": 3, "scale": 1.0, "num_threads": 2}):
        assert _step.step(layer, x, cache, rules) is not None
    assert cache.lengths.ravel().tolist() == [2, 2]
    other = KVCache(2, 4, 9, 6, window=4)
    assert _step.step(layer, x, other, {"window_size": (9, 0)}) is None
    for rules in ({"mask": None}, {"query_lengths": 1}, {"return_weights": False}, {"unheard_of": 1}):
        assert _step.step(layer, x, cache, rules) is None
    for tokens in (
        x.tolist(),
        x.astype(float),
        x[:, :0],
        x[..., ::-1],
        x[0],
        normal(rng, 3, 1, 24),
        normal(rng, 2, 1, 23),
    ):
        assert _step.step(layer, tokens, cache, {}) is None
    assert _step.step(layer, x, None, {}) is None
    assert _step.step(layer, normal(rng, 2, 8, 24), cache, {}) is None, "no room"
    assert cache.lengths.ravel().tolist() == [2, 2]


@pytest.mark.parametrize("bad", [{"scale": np.nan}, {"window_size": -2}, {"activation": "none"}, {"num_threads": 0},
                                 {"sinks": np.ones(3)}, {"softcap": -1.0}, {"is_causal": 1}])  # fmt: skip
def test_a_step_with_a_wrong_rule_appends_nothing(rng, bad):
    layer = fastattn.MultiHeadAttention(**parameters(rng, rotary_base=100.0))
    cache = KVCache(1, 4, 9, 6)
    x = normal(rng, 1, 1, 24)
    layer(x, cache=cache)
    before = bits(cache.key), cache.lengths
    errors = []
    for way in (False, True):
        with pytest.raises((ValueError, TypeError)) as caught:
            if way:
                with Long():
                    layer(x, cache=cache, **bad)
            else:
                layer(x, cache=cache, **bad)
        errors.append((type(caught.value), str(caught.value)))
        assert (bits(cache.key), cache.lengths) == before
    assert errors[0] == errors[1]


def test_results_of_steps_are_new_arrays(rng):
    """What a step returned is not what the next one writes to."""
    for d_out in (10, None):
        layer = fastattn.MultiHeadAttention(**parameters(rng, d_out=d_out))
        cache = KVCache(2, 4, 30, 6)
        outs = [layer(normal(rng, 2, 1, 24), cache=cache) for _ in range(5)]
        kept = [out.copy() for out in outs]
        for _ in range(5):
            layer(normal(rng, 2, 1, 24), cache=cache)
        assert list(map(bits, outs)) == list(map(bits, kept))
        assert 0 < layer._scratch.nbytes <= 1 << 18
        large = KVCache(2, 4, 5000, 6)
        layer(normal(rng, 2, 4000, 24), cache=large)
        assert layer._scratch.nbytes <= 1 << 18, "small arrays only"
        assert pickle.loads(pickle.dumps(layer))._scratch.nbytes == 0


def test_written_parameters_are_used_by_the_next_step(rng):
    layer = fastattn.MultiHeadAttention(**parameters(rng))
    caches = [KVCache(1, 4, 9, 6) for _ in range(2)]
    x = normal(rng, 1, 1, 24)
    layer(x, cache=caches[0])
    layer.parameters()["w_out"][...] *= 2
    out = layer(x, cache=caches[0])
    layer(x, cache=caches[1])
    with Long():
        assert bits(layer(x, cache=caches[1])) == bits(out)


def test_steps_of_many_threads(rng):
    """One layer, a cache for each thread: everybody has arrays of their own."""
    layer = fastattn.MultiHeadAttention(**parameters(rng, rotary_base=100.0))
    tokens = normal(rng, 4, 40, 1, 1, 24)
    expected, results = [], [None] * 4

    def decode(own):
        cache = KVCache(1, 4, 50, 6)
        return [bits(layer(x, cache=cache)) for x in own]

    expected = [decode(own) for own in tokens]

    def work(n):
        results[n] = [decode(tokens[n]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        assert all(result == expected[n] for result in results[n])
