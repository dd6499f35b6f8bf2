"""sparsemax and entmax15, of rows and as activations: values, exact zeros, invariances, hostile numbers, peers."""

import functools
import itertools

import numpy as np
import pytest
from problems import AWKWARD, DTYPES, bits, layouts, qkv, rules, sixteen_bits
from tolerances import accumulation_dtype, assert_attention, assert_within, result_dtype, storage_steps

import fastattn
from fastattn import reference

NAMES = ("sparsemax", "entmax15")
each = pytest.mark.parametrize("name", NAMES)


def assert_rows(name, x, axis=-1, *, mask=None, **arguments):
    """A function of rows against the reference: ``eps * (4 * max size + 4)`` for each weight."""
    dtype = result_dtype(x)
    eps = float(np.finfo(accumulation_dtype(dtype)).eps) * (2 if dtype == np.float64 else 1)
    x64 = np.asarray(x, dtype=np.float64)
    counts = np.isfinite(x64) if mask is None else np.isfinite(x64) & mask
    size = np.max(np.where(counts, np.abs(x64), 0.0), axis=axis, keepdims=True, initial=0.0)
    expected = getattr(reference, name)(x, axis, mask=mask)
    storage, step = (unit / 2 for unit in storage_steps(dtype))
    bound = eps * (4 * size + 4) + storage * np.nan_to_num(expected) + step
    actual = getattr(fastattn, name)(x, axis, mask=mask, **arguments)
    assert actual.dtype == dtype
    assert_within(actual, expected, bound, name)
    return actual


# ---------------------------------------------------------------- rows


@each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [*AWKWARD, 1000, 5000, 20_000])
def test_lengths_and_scales(rng, name, length, dtype):
    for scale in (1e-3, 0.3, 3, 1e30):
        x = (scale * rng.standard_normal((5, length))).astype(dtype)
        weights = assert_rows(name, x)
        if length:
            np.testing.assert_allclose(weights.sum(-1, dtype=np.float64), 1, rtol=8 * np.finfo(dtype).eps)


@each
@pytest.mark.parametrize("axis", [-1, 0, 1, 2, None, (0, 1), (0, 2), (2, 1), (0, 1, 2)])
def test_axes_and_masks(rng, name, axis):
    x = rng.standard_normal((7, 18, 5)).astype(np.float32)
    assert_rows(name, x, axis)
    for shape in ((7, 18, 5), (18, 1), (5,)):
        assert_rows(name, x, axis, mask=rng.random(shape) < 0.6)


@each
@pytest.mark.parametrize("dtype", sixteen_bits())
def test_sixteen_bits(rng, name, dtype):
    x = (3 * rng.standard_normal((33, 130))).astype(dtype)
    assert_rows(name, x)
    assert_rows(name, x, 0, mask=rng.random((33, 130)) < 0.5)


def test_known_values():
    x = np.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(fastattn.sparsemax(x), [0, 0.25, 0.75])
    np.testing.assert_array_equal(fastattn.sparsemax([3.0, 1.0, 2.0]), [1, 0, 0])
    np.testing.assert_array_equal(fastattn.entmax15([3.0, 1.0, -1.0]), [1, 0, 0])
    # z = -1/2 and 0: (z - t)**2 = p and 1 - p.
    p = fastattn.entmax15([0.0, 1.0])
    np.testing.assert_allclose(np.sqrt(p[1]) - np.sqrt(p[0]), 0.5)
    assert fastattn.sparsemax([1, 2]).dtype == np.float64


@each
@pytest.mark.parametrize("length", [1, 7, 4096, 100_000])
def test_equal_numbers_share(name, length):
    for value in (0, -7.3, np.finfo(np.float32).max, np.finfo(np.float32).min):
        weights = getattr(fastattn, name)(np.full((2, length), value, np.float32))
        np.testing.assert_allclose(weights, 1 / length, rtol=4e-7)


@each
def test_exact_zeros(rng, name):
    """What lies 1 (or 2) below the largest has no weight, and most has none."""
    x = (2 * rng.standard_normal((50, 1000))).astype(np.float32)
    weights = getattr(fastattn, name)(x)
    below = x <= x.max(-1, keepdims=True) - {"sparsemax": 1, "entmax15": 2}[name]
    assert (weights[below] == 0).all()
    assert np.mean(weights > 0) < 0.05
    assert (weights > 0).any(-1).all()


@each
def test_thresholds_that_many_steps_lead_to(name):
    """Numbers of which each step leaves out a few: every support there can be."""
    for dtype in DTYPES:
        x = -np.geomspace(1e-6, 4, 300).astype(dtype)
        assert_rows(name, np.stack([x * scale for scale in (0.01, 0.1, 0.5, 1, 3)]))
        assert_rows(name, np.linspace(0, -3, 4097).astype(dtype)[None])


@each
@pytest.mark.parametrize("length", [5, 70, 6000])
@pytest.mark.parametrize("axis", [0, 1])
def test_hidden_and_hostile(rng, name, length, axis):
    function = getattr(fastattn, name)
    x = rng.standard_normal((9, length)).astype(np.float32)
    mask = rng.random(x.shape) < 0.6
    mask[4] = False
    mask[:, 0] = np.arange(9) != 4
    x[~mask] = np.nan
    x[1, 1], mask[1, 1] = np.nan, True
    x[2, 2], mask[2, 2] = np.inf, True
    x[3, mask[3]] = -np.inf
    x[5, 3] = -np.inf
    mask[7], x[7] = True, np.inf
    given, hidden = (x, mask) if axis else (np.ascontiguousarray(x.T), np.ascontiguousarray(mask.T))
    weights = function(given, axis, mask=hidden)
    weights = weights if axis else weights.T
    assert np.isnan(weights[[1, 2, 7]][mask[[1, 2, 7]]]).all()
    assert (weights[~mask] == 0).all()
    assert (weights[[3, 4]] == 0).all()
    np.testing.assert_allclose(weights[[0, 5, 6, 8]].sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights, reference.__dict__[name](x, mask=mask), atol=1e-5)


@each
@pytest.mark.parametrize("dtype", [*DTYPES, np.float16])
@pytest.mark.parametrize(
    ("shape", "axis"), [((300, 70), 0), ((129, 64), 0), ((9000, 40), 0), ((6, 40, 50), (0, 1)), ((60, 40, 5), (0, 2))]
)
def test_other_axes_have_the_bits_of_the_last(rng, name, shape, axis, dtype):
    function = getattr(fastattn, name)
    axes = axis if isinstance(axis, tuple) else (axis,)
    others = [a for a in range(len(shape)) if a not in axes]

    def along(x):
        return np.ascontiguousarray(x.transpose(*others, *axes)).reshape(*(shape[a] for a in others), -1)

    for scale in (0.05, 2):
        x = (scale * rng.standard_normal(shape)).astype(dtype)
        mask = rng.random(shape) < 0.5
        assert bits(along(function(x, axis))) == bits(function(along(x)))
        assert bits(along(function(x, axis, mask=mask))) == bits(function(along(x), mask=along(mask)))
        x[rng.random(shape) < 0.01] = -np.inf
        x[rng.random(shape) < 0.0005] = np.nan
        np.testing.assert_array_equal(along(function(x, axis, mask=mask)), function(along(x), mask=along(mask)))


@each
def test_layouts_out_and_threads(rng, name):
    function = getattr(fastattn, name)
    x = rng.standard_normal((4, 19, 230)).astype(np.float32)
    expected = function(x)
    for layout, other in layouts(x):
        np.testing.assert_array_equal(function(other), expected, err_msg=layout)
    y, out = x.copy(), np.full_like(x, 7)
    assert function(y, out=y) is y
    assert function(x, out=out) is out
    assert bits(y) == bits(out) == bits(expected)
    x = rng.standard_normal((301, 2003)).astype(np.float32)
    expected = function(x, num_threads=1)
    for num_threads in (2, 3, 7):
        assert bits(function(x, num_threads=num_threads)) == bits(expected)
    assert bits(function(x[100:103])) == bits(expected[100:103])


@each
def test_hidden_entries_and_padding_change_no_bit(rng, name):
    function = getattr(fastattn, name)
    x = rng.standard_normal((8, 500)).astype(np.float32)
    mask = rng.random(x.shape) < 0.7
    expected = function(x, mask=mask)
    other = np.where(mask, x, rng.choice([np.nan, np.inf, 1e30], x.shape)).astype(np.float32)
    assert bits(function(other, mask=mask)) == bits(expected)
    padded = np.concatenate([x, np.full((8, 77), 9, np.float32)], -1)
    visible = np.concatenate([mask, np.zeros((8, 77), bool)], -1)
    assert bits(function(padded, mask=visible)[:, :500]) == bits(expected)


@each
def test_as_the_entmax_package(rng, name):
    torch = pytest.importorskip("torch")
    entmax = pytest.importorskip("entmax")
    x = 2 * rng.standard_normal((40, 300))
    theirs = getattr(entmax, name)(torch.from_numpy(x), dim=-1).numpy()
    np.testing.assert_allclose(getattr(fastattn, name)(x), theirs, atol=1e-7)


# ---------------------------------------------------------------- attention

COMMON = {rule: x for rule, x in rules(np.random.default_rng(1)).items() if "activation" not in x and rule != "sinks"}


@each
@pytest.mark.parametrize("rule", COMMON)
def test_every_rule(rng, name, rule):
    some = {key: x for key, x in COMMON[rule].items() if key != "sinks"}
    for dtype, scale in ((np.float32, 4), (np.float64, 0.3), (np.float16, 2)):
        query, key, value = qkv(rng, (2, 3), 20, 70, dtype=dtype)
        assert_attention((scale * query).astype(dtype), key, value, activation=name, **some)


@each
@pytest.mark.parametrize("num_queries", [1, 5, 9, 40, 150])
@pytest.mark.parametrize("num_keys", [1, 17, 300, 2300])
def test_sizes(rng, name, num_queries, num_keys):
    """One query, several groups, several spans; few weights and many."""
    for scale, head_dim, value_dim in ((4, 16, 24), (0.02, 17, 64)):
        query, key, value = qkv(rng, (2,), num_queries, num_keys, head_dim, value_dim)
        query = query * np.float32(scale)
        assert_attention(query, key, value, activation=name)
        assert_attention(query, key, value, activation=name, window_size=(200, 100), is_causal=num_queries % 2 == 0)


@each
@pytest.mark.parametrize("num_queries", [1, 100])
def test_layers_of_values(rng, name, num_queries):
    """Values that are read in place, copied row by row, and copied as a whole, in every storage dtype: the same."""
    for scale in (4, 0.02):
        query, key, value = qkv(rng, (2,), num_queries, 600, 16, 64)
        query = query * np.float32(scale)
        expected = fastattn.dot_product_attention(query, key, value, activation=name)
        for layout, other in layouts(value):
            out = fastattn.dot_product_attention(query, key, other, activation=name)
            assert bits(out) == bits(expected), layout
        assert_attention(query, key, value.astype(np.float16), activation=name)
        out = np.full((2, num_queries, 128), 7, np.float32)[..., ::2]
        assert fastattn.dot_product_attention(query, key, value, activation=name, out=out) is out
        assert bits(out) == bits(expected)


@each
@pytest.mark.parametrize("scale", [4, 0.3, 0.01])
@pytest.mark.parametrize("num_queries", [1, 4, 20, 200])
def test_same_bits(rng, name, scale, num_queries):
    """Threads, which share the keys where queries are few; hidden keys, whatever they hold; and padding."""
    attend = functools.partial(fastattn.dot_product_attention, activation=name, return_weights=True)
    query, key, value = qkv(rng, (2, 2), num_queries, 5000 if num_queries < 9 else 700, 32, 48)
    query = query * np.float32(scale)
    num_keys = key.shape[-2]
    mask = rng.random((num_queries, num_keys)) < 0.8
    mask[:, ::37] = False
    expected = attend(query, key, value, mask=mask, num_threads=1)
    for num_threads in (2, 3):
        assert [*map(bits, attend(query, key, value, mask=mask, num_threads=num_threads))] == [*map(bits, expected)]
    one = attend(query[1, 1], key[1, 1], value[1, 1], mask=mask, num_threads=1)
    assert [*map(bits, one)] == [bits(x[1, 1]) for x in expected]
    hidden = np.arange(num_keys) % 37 == 0
    key[..., hidden, :], value[..., hidden, :] = np.nan, np.inf
    assert [*map(bits, attend(query, key, value, mask=mask))] == [*map(bits, expected)]
    if num_queries >= 20:  # the other rows, and with them the way in which values are added up
        other = query * np.where(np.arange(num_queries) % 5 == 0, 1, 1e-3).astype(np.float32)[:, None]
        for ours, theirs in zip(attend(other, key, value, mask=mask), expected, strict=True):
            assert bits(ours[..., ::5, :]) == bits(theirs[..., ::5, :])
    key, value = (np.concatenate([x, np.full_like(x[..., :300, :], np.nan)], -2) for x in (key, value))
    padded = np.concatenate([mask, np.ones((num_queries, 300), bool)], -1)
    out, weights = attend(query, key, value, mask=padded, key_lengths=num_keys)
    assert bits(out) == bits(expected[0])
    assert bits(weights[..., :num_keys]) == bits(expected[1])


@each
def test_values_of_weight_zero_do_not_count(rng, name):
    """Nor do they turn a dense sum into NaN; a value with a weight does."""
    for num_queries in (1, 60):
        for scale in (4, 0.05):
            query, key, value = qkv(rng, (), num_queries, 600, 16, 32)
            query = query * np.float32(scale)
            out, weights = fastattn.dot_product_attention(query, key, value, activation=name, return_weights=True)
            unused = (weights == 0).all(0)
            assert unused.any() or scale < 1
            value[unused] = np.nan
            assert bits(fastattn.dot_product_attention(query, key, value, activation=name)) == bits(out)
            used = np.argmax(weights[0])
            value[used, 3] = np.nan
            assert_attention(query, key, value, activation=name)
            again = fastattn.dot_product_attention(query, key, value, activation=name)
            np.testing.assert_array_equal(np.isnan(again).any(-1), weights[:, used] > 0)
            assert not np.isnan(np.delete(again, 3, -1)).any()


@each
@pytest.mark.parametrize("num_queries", [1, 30])
def test_hostile_scores(rng, name, num_queries):
    query, key, value = qkv(rng, (2,), num_queries, 300, 16)
    for bad in (np.nan, np.inf):
        bias = np.zeros((num_queries, 300), np.float32)
        bias[0, 7], bias[0, 9] = bad, -np.inf
        out, weights = fastattn.dot_product_attention(
            query, key, value, bias=bias, activation=name, return_weights=True
        )
        assert np.isnan(out[:, 0]).all()
        assert (weights[:, 0, 9] == 0).all()
        assert np.isnan(np.delete(weights[:, 0], 9, -1)).all()
        assert np.isfinite(out[:, 1:]).all()
        bias[0, 7] = -np.inf
        assert_attention(query, key, value, bias=bias, activation=name)
    for rule in ({"key_lengths": 0}, {"bias": np.full(300, -np.inf, np.float32)}, {"mask": np.zeros(300, bool)}):
        out, weights = fastattn.dot_product_attention(
            query, key, value * np.nan, activation=name, return_weights=True, **rule
        )
        assert (out == 0).all()
        assert (weights == 0).all()
    for scale in (1e-30, 1e8, -1e30):
        assert_attention(query, key, value, scale=scale, activation=name)


@each
def test_large_values_stay_within_their_range(name):
    most = np.finfo(np.float32).max
    for num_queries in (1, 20):
        x = np.zeros((num_queries, 8), np.float32)
        value = np.full((3000, 16), most, np.float32)
        out = fastattn.dot_product_attention(x, np.zeros((3000, 8), np.float32), value, activation=name)
        assert np.isfinite(out).all()
        np.testing.assert_allclose(out, most, rtol=1e-6)


@each
def test_all_kinds_of_attention(rng, name):
    query, key, value = qkv(rng, (2, 3), 30, 90, 16)
    query = 3 * query
    w_score, w_query = (rng.standard_normal(shape).astype(np.float32) for shape in (16, (16, 16)))
    assert_attention(query, key, value, name="additive_attention", w_score=2 * w_score, activation=name)
    assert_attention(query, key, value, name="bilinear_attention", w_query=w_query / 4, activation=name)
    cuts = [0, 11, 30, 90]
    ours = fastattn.varlen_attention(key, key, value, cuts, activation=name, is_causal=True)
    for begin, end in itertools.pairwise(cuts):
        part = slice(begin, end)
        expected = reference.dot_product_attention(
            key[..., part, :], key[..., part, :], value[..., part, :], activation=name, is_causal=True
        )
        np.testing.assert_allclose(ours[..., part, :], expected, atol=1e-4)
    whole = fastattn.truncated_attention(key, key, value, 20, 3, activation=name)
    np.testing.assert_allclose(whole, reference.truncated_attention(key, key, value, 20, 3, activation=name), atol=1e-4)
    stream = fastattn.StreamingAttention(20, 3, activation=name)
    rows = [stream.push(*(x[..., i : i + 9, :] for x in (key, key, value))) for i in range(0, 90, 9)]
    assert bits(np.concatenate([*rows, stream.flush()], -2)) == bits(whole)
    grouped = fastattn.dot_product_attention(query, key[:, :1], value[:, :1], enable_gqa=True, activation=name)
    expected = reference.dot_product_attention(query, key[:, :1], value[:, :1], enable_gqa=True, activation=name)
    np.testing.assert_allclose(grouped, expected, atol=1e-4)
    eye = np.eye(16, dtype=np.float32)
    layer = fastattn.MultiHeadAttention(eye, eye, eye, num_heads=2)
    theirs = reference.MultiHeadAttention(eye, eye, eye, num_heads=2)
    np.testing.assert_allclose(layer(key[0], activation=name), theirs(key[0], activation=name), atol=1e-4)


@each
def test_no_log_sum_exp_and_no_sinks(rng, name):
    arrays = qkv(rng)
    with pytest.raises(ValueError, match=rf"return_lse.*'{name}'"):
        fastattn.dot_product_attention(*arrays, activation=name, return_lse=True)
    with pytest.raises(ValueError, match=rf"sinks.*'{name}'"):
        fastattn.dot_product_attention(*arrays, activation=name, sinks=0.0)
    with pytest.raises(ValueError, match="'sparsemax' or 'entmax15', not 'entmax'"):
        fastattn.dot_product_attention(*arrays, activation="entmax")


def test_more_keys_than_memory_has_scores_for():
    key = np.broadcast_to(np.ones((1, 4), np.float32), (2**45, 4))
    with pytest.raises(MemoryError):
        fastattn.dot_product_attention(key[:1], key, key, activation="sparsemax")
