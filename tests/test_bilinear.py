"""bilinear_attention: its score against the reference and published numbers, and every rule on top of it."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import AWKWARD, DTYPES, RULES, bits, layouts, qkv, rules, sixteen_bits
from test_arguments import arrays, refuse
from test_combinations import calls
from test_hostile import SHAPE, assert_convex, hiding_rules, last_row
from test_memory import MEGABYTE, extra_memory
from test_memory import pytestmark as reads_proc
from tolerances import assert_attention

import fastattn
from fastattn import reference

NAME = "bilinear_attention"
HIDDEN = (0, 1, 2, 3, 15, 16, 17, 64, 65, 129, 300, 1024)
# The arguments besides w_query. D_key equals D_query only if w_key is omitted.
FORMS = {
    "shared": (),
    "shared, bias": ("b_query",),
    "shared, two biases": ("b_query", "b_key"),
    "shared, bias of keys": ("b_key",),
    "two": ("w_key",),
    "two, bias": ("w_key", "b_query"),
    "two, two biases": ("w_key", "b_query", "b_key"),
}

assert_bilinear = functools.partial(assert_attention, name=NAME)


def bilinear(*args, **kwargs):
    return fastattn.bilinear_attention(*args, **kwargs)


def problem(rng, form="two", batch=(), num_queries=17, num_keys=33, hidden=16, value_dim=9, dtype=np.float32, **kv):
    """((query, key, value), the arguments of the score): normal numbers, projections that preserve their size."""
    key_dim = 6 if "w_key" in FORMS[form] else 11
    query, _, value = qkv(rng, batch, num_queries, num_keys, 11, value_dim, dtype, kv.get("kv_batch"))
    key = rng.standard_normal((*value.shape[:-1], key_dim)).astype(dtype)
    shapes = {"w_query": (11, hidden), "w_key": (6, hidden), "b_query": (hidden,), "b_key": (hidden,)}
    weights = {}
    for name in ("w_query", *FORMS[form]):
        # Scores of normal size, whatever the number of hidden units.
        size = max(hidden, 1) ** -0.25 * (shapes[name][0] ** -0.5 if name in ("w_query", "w_key") else 1)
        weights[name] = (size * rng.standard_normal(shapes[name])).astype(dtype)
    return (query, key, value), weights


# ------------------------------------------------------------------------------------- published numbers


def read_scores(query, key, **weights):
    """The scores, from the logarithms of the softmax's weights and the log-sum-exp."""
    _, softmax, lse = bilinear(
        query, key, np.zeros((*key.shape[:-1], 1)), **weights, return_weights=True, return_lse=True
    )
    return np.log(softmax) + lse[..., None]


def test_scores_of_allennlp():
    """allennlp, tests/modules/matrix_attention/bilinear_matrix_attention_test.py: x @ w @ y, plus a bias of 0.1 on
    every score. The second test there puts a 1 after each x and each y, whose row and column of w are biases."""
    query, key = np.array([[[1.0, 1.0], [2.0, 2.0]]]), np.eye(2)[None]
    w = np.array([[-0.3, 0.5], [2.0, -1.0]])
    scores = read_scores(query, key, w_query=w, w_key=np.eye(2), bias=np.full((1, 1), 0.1))
    np.testing.assert_allclose(scores, [[[1.8, -0.4], [3.5, -0.9]]], rtol=1e-12)
    longer, wide = np.array([[-0.3, 0.5, 1.0], [2.0, -1.0, -1.0]]), np.eye(2, 3)
    # The third row of the 3 x 3 matrix is b_query; the 1 after each key is b_key.
    scores = read_scores(
        query, key, w_query=longer, w_key=wide, b_query=[1.0, 0.5, 1.0], b_key=[0, 0, 1.0], bias=np.full((1, 1), 0.1)
    )
    np.testing.assert_allclose(scores, [[[3.8, 1.1], [5.5, 0.6]]], rtol=1e-12)


def test_the_identity_gives_dot_products(rng):
    """At scale 1, not ``1 / sqrt(D)``."""
    query, key, value = qkv(rng, (2,), 17, 33, 8)
    expected = fastattn.dot_product_attention(query, key, value, scale=1)
    np.testing.assert_allclose(bilinear(query, key, value, np.eye(8, dtype=np.float32)), expected, atol=1e-5)


def test_a_shared_projection_is_written_twice(rng):
    (query, key, value), weights = problem(rng, "shared, bias", (2,))
    w, b = weights["w_query"], weights["b_query"]
    call = functools.partial(bilinear, query, key, value, w)
    np.testing.assert_array_equal(call(), call(w))
    np.testing.assert_array_equal(call(b_query=b), call(w, b_query=b, b_key=b))
    np.testing.assert_array_equal(call(b_query=b, b_key=2 * b), call(w, b_query=b, b_key=2 * b))
    np.testing.assert_array_equal(call(b_query=b, b_key=0 * b), call(w, b_query=b))
    # What is added to all keys alike shifts the scores of a row, which changes its lse but not its output.
    lses = [call(*given, b_query=b, return_lse=True)[1] for given in ((), (w,))]
    assert abs(lses[0] - lses[1]).min() > 0.01


# ------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_keys", AWKWARD)
@pytest.mark.parametrize("num_queries", AWKWARD)
def test_sizes(rng, num_queries, num_keys, dtype):
    arrays, weights = problem(rng, "two, two biases", (2,), num_queries, num_keys, 20, dtype=dtype)
    assert_bilinear(*arrays, **weights, is_causal=num_keys % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("form", FORMS)
def test_hidden(rng, form, hidden, dtype):
    (query, key, value), weights = problem(rng, form, (2,), 9, 37, hidden, dtype=dtype)
    assert_bilinear(query, key, value, **weights)
    assert_bilinear(query[:, :1], key, value, **weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, 2, 3, 64, 65, 300])
def test_dims(rng, dim, dtype):
    """D_query and D_key; without channels only the biases remain."""
    (query, key, value), weights = problem(rng, "two, two biases", (2,), dtype=dtype)
    long = rng.standard_normal((2, 33, dim)).astype(dtype)
    w = (rng.standard_normal((dim, 16)) / max(dim, 1) ** 0.5).astype(dtype)
    assert_bilinear(long, key, value, **weights | {"w_query": w})
    assert_bilinear(query, long, value, **weights | {"w_key": w})


@pytest.mark.parametrize("num_keys", [255, 257, 1025, 2500])
@pytest.mark.parametrize("num_queries", [1, 7, 193])
def test_many_keys(rng, num_queries, num_keys):
    arrays, weights = problem(rng, "two", (2,), num_queries, num_keys, 9)
    assert_bilinear(*arrays, **weights, is_causal=num_keys % 2 == 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(5, 0), (0, 7), (0, 0)])
def test_no_rows(rng, shape, form):
    (query, key, value), weights = problem(rng, form, (2, 3), *shape)
    out, rest, lse = bilinear(query, key, value, **weights, return_weights=True, return_lse=True)
    assert out.shape == (2, 3, shape[0], 9)
    assert rest.shape == (2, 3, *shape)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 3)])
def test_empty_batch(rng, batch, form):
    arrays, weights = problem(rng, form, batch, 4, 5)
    assert bilinear(*arrays, **weights).shape == (*batch, 4, 9)


# ------------------------------------------------------------------------------------- batch axes, dtypes


@pytest.mark.parametrize("num_queries", [1, 18])
@pytest.mark.parametrize(
    ("query_batch", "key_batch", "value_batch"),
    [((3,), (1,), (3,)), ((1,), (3,), (1,)), ((3,), (), ()), ((), (3,), (3,)), ((), (), (3,)), ((2, 3), (3,), (2, 1)),
     ((2, 1, 3, 2), (2, 2, 1, 2), (1, 2, 3, 1)), ((2, 1, 2, 1, 2), (), (2,))],
)  # fmt: skip
def test_batch_axes_broadcast(rng, query_batch, key_batch, value_batch, num_queries):
    (query, key, value), weights = problem(rng, "two, two biases", (), num_queries, 20)
    query, key, value = (
        x + rng.standard_normal((*batch, 1, 1)).astype(np.float32)
        for x, batch in ((query, query_batch), (key, key_batch), (value, value_batch))
    )
    assert_bilinear(query, key, value, **weights)


@pytest.mark.parametrize("num_queries", [1, 4, 33])
@pytest.mark.parametrize(("query_batch", "kv_batch"), [((6,), (2,)), ((2, 6), (2, 3)), ((2, 8), (1, 2)), ((6,), (1,))])
def test_grouped_heads(rng, query_batch, kv_batch, num_queries):
    arrays, weights = problem(rng, "two, bias", query_batch, num_queries, 40, kv_batch=kv_batch)
    assert_bilinear(*arrays, **weights, enable_gqa=True)
    slopes = rng.random(query_batch[-1]).astype(np.float32)
    assert_bilinear(*arrays, **weights, enable_gqa=True, is_causal=True, alibi_slopes=slopes, sinks=slopes)


@pytest.mark.parametrize("name", ["query", "key", "value", "w_query", "w_key"])
@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int8, bool])
def test_arrays_and_weights_promote(rng, name, dtype):
    """One of them float64, or an integer: the output is float64. (Biases do not count.)"""
    arrays, weights = problem(rng, "two, two biases", (2,), 9, 20)
    given = dict(zip(("query", "key", "value"), (2 * x for x in arrays), strict=True), **weights)
    given[name] = given[name].astype(dtype)
    assert assert_bilinear(**given).dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bias_dtype", [np.float16, np.float64, np.int64])
@pytest.mark.parametrize("form", ["shared, bias", "two, two biases"])
def test_biases_do_not_decide_the_dtype(rng, form, bias_dtype, dtype):
    """They are rounded to the accumulation dtype, not to that of storage."""
    arrays, weights = problem(rng, form, (2,), 9, 20, dtype=dtype)
    for name in ("b_query", "b_key"):
        if name in weights:
            weights[name] = (2 * rng.standard_normal(16)).astype(bias_dtype)
    out, lse = bilinear(*arrays, **weights, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert_bilinear(*arrays, **weights)


@pytest.mark.parametrize("dtype", sixteen_bits())
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (17, 65), (130, 70), (0, 5), (5, 0)])
def test_sixteen_bits(rng, shape, form, dtype):
    """Storage only: projections, sums, lse and weights are float32."""
    arrays, weights = problem(rng, form, (2,), *shape, 10, dtype=dtype)
    assert_bilinear(*arrays, **weights)
    assert_bilinear(*arrays, **weights, is_causal=True, window_size=(60, None), softcap=2.0, activation="sigmoid")
    wider = assert_bilinear(*arrays, **weights | {"w_query": weights["w_query"].astype(np.float32)})
    assert wider.dtype == np.float32


def test_nested_lists():
    arrays = [[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[1], [2]]
    weights = {"w_query": [[1, 2], [0.5, 1]], "w_key": ((1, 0), (1, 1)), "b_query": [0.25, -1], "b_key": (1, 2)}
    out = bilinear(*arrays, **weights)
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, reference.bilinear_attention(*arrays, **weights), rtol=1e-14)


# --------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("rule", RULES)
def test_rules(rng, rule, num_queries, dtype):
    for form in ("shared", "two, two biases"):
        arrays, weights = problem(rng, form, (2, 3), num_queries, 70, dtype=dtype)
        assert_bilinear(*arrays, **weights, **rules(rng, num_queries=num_queries, dtype=dtype)[rule])


@st.composite
def bilinear_calls(draw):
    """(query, key, value, keyword arguments): as in test_combinations, with any projections."""
    query, key, value, arguments = draw(calls((0, 1, 2, 15, 17, 33, 65, 129), 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dim, hidden = query.shape[-1], draw(st.integers(0, 80))
    shapes = {"w_query": (dim, hidden), "w_key": (dim, hidden), "b_query": (hidden,), "b_key": (hidden,)}
    size = draw(st.sampled_from([0.2, 1, 3])) / max(dim * hidden, 1) ** 0.5
    for name in ("w_query", *FORMS[draw(st.sampled_from(sorted(FORMS)))]):
        arguments[name] = (size * rng.standard_normal(shapes[name])).astype(query.dtype)
    return query, key, value, arguments


@given(bilinear_calls())
@settings(max_examples=150)
def test_everything_together(call):
    *arrays, arguments = call
    assert_bilinear(*arrays, **arguments)


# ----------------------------------------------------------------------------------------- hostile numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "scale"), [(1e-15, 1), (1e15, 1e-30), (1e-15, 1e30), (1e8, 1), (30, -1), (1, 1e30)])
def test_sizes_of_projections(rng, size, scale, form, dtype):
    (query, key, value), weights = problem(rng, form, (2,), 18, 40, dtype=dtype)
    weights = {name: x * dtype(size) for name, x in weights.items()}
    out = assert_bilinear(query, key, value, **weights, scale=scale)
    assert_convex(out, value)
    assert np.isfinite(out).all()
    assert_bilinear(query[:, :1], key, value, **weights, scale=scale)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("rule", list(hiding_rules(np.random.default_rng())))
def test_unseen_keys_and_values(rng, rule, bad, form):
    """The contents of a key or value that no query sees do not reach the output, not even through a projection."""
    arguments, unseen = hiding_rules(rng)[rule]
    (query, key, value), weights = problem(rng, form, (2, 3), *SHAPE)
    key[..., unseen, :] = bad
    value[..., unseen, ::2] = bad
    for _ in range(2):
        assert np.isfinite(assert_bilinear(query, key, value, **weights, **arguments)).all()
        query, arguments = query[..., -1:, :], last_row(arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("activation", ["softmax", "relu", "sigmoid"])
def test_padding_of_nan(rng, activation, bad):
    (query, key, value), weights = problem(rng, "two, two biases", (2,), 20, 50)
    key[:, 31:], value[:, 31:] = bad, np.nan
    query[:, 15:] = bad
    assert_bilinear(query, key, value, **weights, activation=activation, key_lengths=31, query_lengths=15)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_queries", [1, 20])
def test_seen_nan_gives_nan(rng, num_queries, form):
    (query, key, value), weights = problem(rng, form, (2,), num_queries, 300)
    bad = key.copy()
    bad[:, 17, 3] = np.nan
    assert np.isnan(bilinear(query, bad, value, **weights)).all()
    bad = query.copy()
    bad[:, 0, 5] = np.nan
    out = bilinear(bad, key, value, **weights)
    assert np.isnan(out[:, 0]).all()
    assert np.isfinite(out[:, 1:]).all()
    for name in weights:
        bad = weights[name].copy()
        bad[..., 0] = np.nan
        assert np.isnan(bilinear(query, key, value, **weights | {name: bad})).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_keys_seen_by_some_rows_only(rng, bad):
    (query, key, value), weights = problem(rng, "two", (2,), 40, 40)
    key[:, 20] = bad
    out = assert_bilinear(query, key, value, **weights, is_causal=True)
    assert np.isfinite(out[:, :20]).all()
    assert np.isnan(out[:, 20:]).any()


# ---------------------------------------------------------------------------------- the same bits, results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(150, 333), (1, 2500)])
def test_threads(rng, shape, dtype):
    """The threads of this library; the projections are NumPy's products, the same in each call."""
    arrays, weights = problem(rng, "two, two biases", (2, 3), *shape, dtype=dtype)
    for rule in ("causal", "together"):
        call = functools.partial(bilinear, *arrays, **weights, **rules(rng, (2, 3), *shape, dtype)[rule])
        expected = call(num_threads=1)
        for num_threads in (2, 3, 7):
            assert bits(call(num_threads=num_threads)) == bits(expected), f"{num_threads} threads"


def test_strides(rng):
    """Not the same bits, but the same numbers: arrays and weight matrices in any layout."""
    (query, key, value), weights = problem(rng, "two, two biases", (2, 3))
    for named in zip(*(layouts(x) for x in (query, key, value)), strict=True):
        assert_bilinear(*(array for _, array in named), **weights)
    for named in zip(*(layouts(weights[name]) for name in ("w_query", "w_key")), strict=True):
        changed = {name: array for name, (_, array) in zip(("w_query", "w_key"), named, strict=True)}
        changed |= {name: np.repeat(weights[name], 2)[::2] for name in ("b_query", "b_key")}
        assert_bilinear(query, key, value, **changed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 35])
def test_out_in_any_layout(rng, num_queries, dtype):
    arrays, weights = problem(rng, "two, bias", (2, 3), num_queries, 70, dtype=dtype)
    expected, lse = bilinear(*arrays, **weights, return_lse=True)
    for name, out in layouts(np.full_like(expected, 7)):
        if out.flags.writeable:
            result, lse_too = bilinear(*arrays, **weights, out=out, return_lse=True)
            assert result is out, name
            assert bits(out) == bits(expected), name
            assert bits(lse_too) == bits(lse), name


@pytest.mark.parametrize("form", FORMS)
def test_results(rng, form):
    """They are in order, are new arrays, and the inputs are unchanged."""
    arrays, weights = problem(rng, form, (2, 3), 5, 7)
    inputs = [*arrays, *weights.values()]
    before = [x.copy() for x in inputs]
    call = functools.partial(bilinear, *arrays, **weights)
    assert call().shape == (2, 3, 5, 9)
    assert [x.shape for x in call(return_weights=True)] == [(2, 3, 5, 9), (2, 3, 5, 7)]
    assert [x.shape for x in call(return_lse=True)] == [(2, 3, 5, 9), (2, 3, 5)]
    results = call(return_lse=True, return_weights=True)
    assert [x.shape for x in results] == [(2, 3, 5, 9), (2, 3, 5, 7), (2, 3, 5)]
    for x, y in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not any(np.shares_memory(x, y) for x in results for y in inputs)


@reads_proc
@pytest.mark.parametrize("arguments", ["", "normal(32, 32), b_query=normal(32), is_causal=True, num_threads=2"])
def test_memory(arguments):
    """L = S = 8192: the scores would take 256 MiB, the projections take 2."""
    setup = "query, key, value, w = normal(8192, 32), normal(8192, 32), normal(8192, 32), normal(32, 32)"
    extra = extra_memory(setup, f"fastattn.bilinear_attention(query, key, value, w, {arguments})")
    assert extra < 32 * MEGABYTE


# ------------------------------------------------------------------------------------------------ errors

refuse_bilinear = functools.partial(refuse, function=NAME)


@pytest.mark.parametrize("name", ["w_query", "w_key"])
@pytest.mark.parametrize("shape", [(), (4,), (8,), (7, 4), (9, 4), (4, 8), (1, 4), (3, 8, 4), (1, 8, 4)])
def test_shapes_of_projections(name, shape):
    refuse_bilinear(ValueError, name, **{name: np.ones(shape, dtype=np.float32)})


@pytest.mark.parametrize("columns", [0, 1, 3, 5, 8])
def test_projections_to_different_sizes(columns):
    refuse_bilinear(ValueError, r"(?s)w_key.*w_query", w_key=np.ones((8, columns), dtype=np.float32))


def test_a_shared_projection_that_does_not_fit_the_key():
    """Without w_key the key is projected by w_query, whose rows its last axis must have."""
    key = arrays()[1][..., :5]
    for word in ("key", "w_query", "w_key", r"\b5\b", r"\b8\b"):
        refuse_bilinear(ValueError, word, ("key", key), w_key=None, b_query=None, b_key=None)


@pytest.mark.parametrize("name", ["b_query", "b_key"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5,), (8,), (1, 4), (4, 1), (3, 4)])
def test_shapes_of_biases(name, shape):
    refuse_bilinear(ValueError, name, **{name: np.ones(shape, dtype=np.float32)})


def test_the_message_shows_what_came():
    refuse_bilinear(ValueError, r"(?s)\(7, 4\).*\b8\b", w_query=np.ones((7, 4), dtype=np.float32))
    refuse_bilinear(ValueError, r"(?s)\(8, 3\).*\(8, 4\)", w_key=np.ones((8, 3), dtype=np.float32))
    refuse_bilinear(ValueError, r"(?s)\(5,\).*\(4,\)", b_query=np.ones(5, dtype=np.float32))
    refuse_bilinear(TypeError, "complex64", w_query=np.ones((8, 4), dtype=np.complex64))


def test_w_query_is_needed():
    refuse_bilinear(TypeError, "w_query", w_query=None)
    refuse_bilinear(TypeError, "w_query", w_query=None, w_key=None, b_query=None, b_key=None)
    with pytest.raises(TypeError):
        bilinear(*arrays())


def test_sizes_beyond_the_address_space():
    """Zero strides make arrays of any size: running out of memory is an error, not a crash."""
    long, one = np.broadcast_to(np.float16(0), (1, 2**61)), np.zeros((1, 1), np.float16)
    with pytest.raises(MemoryError):
        bilinear(one, one, one, long)
    with pytest.raises(MemoryError):
        bilinear(long, one, one, long.T, one)


# ---------------------------------------------------------------------------------- the checks can fail

BUGS = {
    "no b_query": lambda a: a | {"b_query": None},
    "no b_key": lambda a: a | {"b_key": 0 * a["b_key"]},
    "one bias for both": lambda a: a | {"b_key": a["b_query"]},
    "w_key ignored": lambda a: a | {"w_key": None},
    "projections exchanged": lambda a: a | {"w_query": a["w_key"], "w_key": a["w_query"]},
    "projection transposed": lambda a: a | {"w_query": a["w_query"].T},
    "a tenth of a percent": lambda a: a | {"w_key": a["w_key"] * np.float32(1.001)},
    "scale of dot products": lambda a: a | {"scale": 0.25},
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(rng, bug):
    arrays = qkv(rng, (2,), 17, 33, 16)
    weights = dict(zip(("w_query", "w_key"), rng.standard_normal((2, 16, 16)).astype(np.float32) / 8, strict=True))
    weights |= zip(("b_query", "b_key"), rng.standard_normal((2, 16)).astype(np.float32) / 2, strict=True)

    def wrong(query, key, value, **arguments):
        return bilinear(query, key, value, **BUGS[bug](arguments))

    assert_bilinear(*arrays, **weights)
    # b_key adds the same to all keys of a row: softmax drops it, the log-sum-exp does not.
    with pytest.raises(AssertionError, match=r"output|lse"):
        assert_bilinear(*arrays, **weights, function=wrong)
