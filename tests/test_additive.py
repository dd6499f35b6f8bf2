"""additive_attention: its score against the reference and published numbers, and every rule on top of it.

A compiled score may be computed in several ways, depending on the size of the arguments of tanh: from exponentials of
the query and of the key while these stay in range, from their sum otherwise. So the tests cover every such size, and
rows and keys of different sizes side by side: the choice must depend only on the row and the key.
"""

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
from test_same_bits import THREADS, assert_same_bits, results
from tolerances import SCORES, additive_scores_and_sizes, assert_attention, assert_within

import fastattn
from fastattn import reference

NAME = "additive_attention"
HIDDEN = (1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 129, 300, 1024)
# The arguments besides w_score; D_query and D_key differ from each other, and from hidden if there is a projection.
FORMS = {
    "plain": (),
    "bias": ("b_hidden",),
    "query": ("w_query",),
    "key": ("w_key",),
    "both": ("w_query", "w_key"),
    "all": ("w_query", "w_key", "b_hidden"),
}

assert_additive = functools.partial(assert_attention, name=NAME)


def additive(*args, **kwargs):
    return fastattn.additive_attention(*args, **kwargs)


additive_results = functools.partial(results, function=additive)


def problem(rng, form="plain", batch=(), num_queries=17, num_keys=33, hidden=16, value_dim=9, dtype=np.float32, **kv):
    """((query, key, value), the arguments of the score): normal numbers, projections that preserve their size."""
    widths = [11 if "w_query" in FORMS[form] else hidden, 6 if "w_key" in FORMS[form] else hidden]
    query, _, value = qkv(rng, batch, num_queries, num_keys, widths[0], value_dim, dtype, kv.get("kv_batch"))
    key = rng.standard_normal((*value.shape[:-1], widths[1])).astype(dtype)
    shapes = {"w_score": (hidden,), "w_query": (11, hidden), "w_key": (6, hidden), "b_hidden": (hidden,)}
    weights = {}
    for name in ("w_score", *FORMS[form]):
        size = shapes[name][0] ** -0.5 if name in ("w_query", "w_key") else 1
        weights[name] = (size * rng.standard_normal(shapes[name])).astype(dtype)
    return (query, key, value), weights


def score_matrix(query, key, w_score, **weights):
    """The library's scores, read off the weights of relu: ``max(score, 0) / S``, at scale 1 and -1. float64."""
    value = np.zeros((*key.shape[:-1], 1), dtype=key.dtype)
    scores = 0
    for scale in (1, -1):
        _, part = additive(query, key, value, w_score, **weights, scale=scale, activation="relu", return_weights=True)
        scores = scores + scale * key.shape[-2] * part.astype(np.float64)
    return scores


def assert_scores(query, key, **weights):
    """Every score is within its own bound; dividing by the keys in relu adds the 2 times |score|."""
    eps = np.finfo(query.dtype).eps * (2 if query.dtype == np.float64 else 1)
    query64, key64 = query.astype(np.float64), key.astype(np.float64)
    with np.errstate(all="ignore"):
        expected, size = additive_scores_and_sizes(query64, key64, eps, **weights)
    assert_within(score_matrix(query, key, **weights), expected, eps * (size + 2 * np.abs(expected)), "scores")


# ------------------------------------------------------------------------------------- published numbers


def test_scores_of_tensorflow():
    """tensorflow/python/keras/layers/dense_attention_test.py (and Keras 2's additive_attention_test.py),
    AdditiveAttentionTest.test_calculate_scores_multi_dim: sums of 0.5 tanh(1 + 1.5) + 0.6 tanh(1.1 + 1.6) + ..."""
    query = [[[1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3]]]
    key = [[[1.5, 1.6, 1.7, 1.8], [2.5, 2.6, 2.7, 2.8], [3.5, 3.6, 3.7, 3.8]]]
    expected = [[[2.58044532581, 2.59734317449, 2.59964024652], [2.59734317449, 2.59964024652, 2.59995130916]]]
    for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-11)):
        arrays = [np.array(x, dtype=dtype) for x in (query, key, [0.5, 0.6, 0.7, 0.8])]
        np.testing.assert_allclose(score_matrix(*arrays), expected, rtol=tolerance)
    np.testing.assert_allclose(reference.additive_scores(*arrays), expected, rtol=1e-11)


def test_scores_of_tensorflow_in_one_dimension():
    """The same file, test_calculate_scores_one_dim_batch_size_two: 0.5 tanh(1.1 + 1.6) and 0.5 tanh(2.1 + 2.6)."""
    query, key = np.array([[[1.1]], [[2.1]]]), np.array([[[1.6]], [[2.6]]])
    _, lse = additive(query, key, key, [0.5], return_lse=True)
    np.testing.assert_allclose(lse, [[0.49550372683], [0.49991728277]], rtol=1e-10)


@pytest.mark.parametrize(
    ("value", "expected"), [([[1.6], [0.7], [-0.8]], 1.15497245968), ([[0.5], [0.8], [-0.3]], 0.64834251342)]
)
def test_outputs_of_tensorflow(value, expected):
    """The same file, test_multi_dim, test_multi_dim_with_key and test_multi_dim_with_query_mask: the third key is
    masked, and so is the second query."""
    query, key = np.array([[[1.1], [-0.5]]]), np.array([[[1.6], [0.7], [-0.8]]])
    mask = np.array([[True, True, False]])
    out, weights = additive(query, key, np.array([value]), [0.5], mask=mask, return_weights=True)
    np.testing.assert_allclose(out[0, 0], [expected], rtol=1e-10)
    expected = [[[0.50552495521, 0.49447504478, 0], [0.57482427975, 0.42517572025, 0]]]
    np.testing.assert_allclose(weights, expected, rtol=1e-10)
    out = additive(query, key, np.array([value]), [0.5], mask=mask, query_lengths=np.array([1]))
    assert out[0, 1] == 0


def test_outputs_of_keras():
    """Keras 3, keras/src/layers/attention/additive_attention_test.py: test_attention_correctness (to three digits;
    there the last one is truncated, not rounded) and test_attention_with_mask. Without a scale w_score is ones."""
    query, key = np.array([[[1.0, 0.0], [0.0, 1.0]]]), np.array([[[0.0, 1.0], [1.0, 0.0]]])
    value = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    out, weights = additive(query, key, value, np.ones(2), return_weights=True)
    np.testing.assert_allclose(out, [[[1.727, 2.727], [2.272, 3.272]]], atol=1e-3)
    np.testing.assert_allclose(weights, [[[0.636, 0.363], [0.363, 0.636]]], atol=1e-3)
    ones, seen = np.ones((1, 2, 2)), np.array([[True, False]])
    out, weights = additive(query, ones, ones, np.ones(2), mask=seen, query_lengths=np.array([1]), return_weights=True)
    np.testing.assert_array_equal(out, [[[1, 1], [0, 0]]])
    np.testing.assert_array_equal(weights[:, 0], [[1, 0]])


def test_scores_of_allennlp():
    """allennlp, tests/modules/attention/additive_attention_test.py: one query per batch, both projections."""
    query = np.array([[[0.7, -0.8]], [[0.4, 0.9]]])
    key = np.array(
        [
            [[1.0, -1.0, 3.0], [0.5, -0.3, 0.0], [0.2, -1.0, 1.0], [0.7, 0.8, -1.0]],
            [[-2.0, 3.0, -3.0], [0.6, 0.2, 2.0], [0.5, -0.4, -1.0], [0.2, 0.2, 0.0]],
        ]
    )
    weights = {"w_query": [[-0.2, 0.3], [-0.5, 0.5]], "w_key": [[0.0, 1.0], [1.0, 1.0], [1.0, -1.0]]}
    expected = [[[1.975072, -0.04997836, 1.2176098, -0.9205586]], [[-1.4851665, 1.489604, -1.890285, -1.0672251]]]
    np.testing.assert_allclose(score_matrix(query, key, [1.0, -1.0], **weights), expected, atol=2e-7)


# ------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_keys", AWKWARD)
@pytest.mark.parametrize("num_queries", AWKWARD)
def test_sizes(rng, num_queries, num_keys, dtype):
    arrays, weights = problem(rng, "plain", (2,), num_queries, num_keys, 6, dtype=dtype)
    assert_additive(*arrays, **weights, is_causal=num_keys % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("form", FORMS)
def test_hidden(rng, form, hidden, dtype):
    (query, key, value), weights = problem(rng, form, (2,), 9, 37, hidden, dtype=dtype)
    assert_additive(query, key, value, **weights)
    assert_additive(query[:, :1], key, value, **weights)
    assert_scores(query[0], key[0], **weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_dim", [0, 1, 15, 17, 64, 65, 130])
def test_value_dims(rng, value_dim, dtype):
    for num_queries in (1, 18):
        arrays, weights = problem(rng, "plain", (2,), num_queries, 37, 7, value_dim, dtype)
        assert_additive(*arrays, **weights)


@pytest.mark.parametrize("num_keys", [255, 256, 257, 513, 1025, 2500])
@pytest.mark.parametrize("num_queries", [1, 2, 7, 50])
def test_many_keys(rng, num_queries, num_keys):
    arrays, weights = problem(rng, "plain", (2,), num_queries, num_keys, 5)
    assert_additive(*arrays, **weights, is_causal=num_keys % 2 == 0)


def promised_scores_and_sizes(query, key, eps, *, w_score):
    """The size as promised, with no allowance for more hidden units: the sum of the absolute values of all terms,
    ``|w_h| * (1 + (1 - tanh^2) * (|q_h| + |k_h|))``."""
    scores = reference.additive_scores(query, key, w_score)
    size = np.zeros(scores.shape)
    for w, q, k in zip(np.abs(w_score), np.moveaxis(query, -1, 0), np.moveaxis(key, -1, 0), strict=True):
        q, k = q[..., :, None], k[..., None, :]
        size += w * (1 + (np.abs(q) + np.abs(k)) / np.cosh(q + k) ** 2)
    return scores, size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signs", ["positive", "mixed"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_softmax_keeps_the_promise_as_it_is_written(rng, monkeypatch, hidden, signs, dtype):
    """Hidden units cost additions, but roundings partly cancel, and softmax drops what all keys of a row share."""
    monkeypatch.setitem(SCORES, NAME, (promised_scores_and_sizes, ("w_score",)))
    for shape in ((9, 37), (1, 37), (9, 1)):
        arrays, weights = problem(rng, "plain", (2,), *shape, hidden, dtype=dtype)
        if signs == "positive":
            weights["w_score"] = np.abs(weights["w_score"])
        assert_additive(*arrays, **weights)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(5, 0), (0, 7), (0, 0)])
def test_no_rows(rng, shape, form):
    (query, key, value), weights = problem(rng, form, (2, 3), *shape)
    out, rest, lse = additive(query, key, value, **weights, return_weights=True, return_lse=True)
    assert out.shape == (2, 3, shape[0], 9)
    assert rest.shape == (2, 3, *shape)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 3)])
def test_empty_batch(rng, batch, form):
    arrays, weights = problem(rng, form, batch, 4, 5)
    assert additive(*arrays, **weights).shape == (*batch, 4, 9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_queries", [1, 17])
def test_no_hidden_unit_gives_equal_scores(rng, num_queries, form):
    (query, key, value), weights = problem(rng, form, (2,), num_queries, 33, 0)
    out, lse = additive(query, key, value, **weights, return_lse=True)
    np.testing.assert_allclose(out, np.broadcast_to(value.mean(1, keepdims=True), out.shape), atol=1e-6)
    np.testing.assert_allclose(lse, np.log(33), rtol=1e-6)
    assert_additive(query, key, value, **weights, is_causal=True)


def test_no_channels(rng):
    """D_query = 0 or D_key = 0: the projection of nothing is 0, and b_hidden remains."""
    (query, key, value), weights = problem(rng, "all", (2,))
    for empty in ("query", "key", "both"):
        arguments = dict(weights)
        if empty != "key":
            arguments["w_query"] = arguments["w_query"][:0]
        if empty != "query":
            arguments["w_key"] = arguments["w_key"][:0]
        q, k = (x[..., : len(arguments[name])] for x, name in ((query, "w_query"), (key, "w_key")))
        assert_additive(q, k, value, **arguments)


# ------------------------------------------------------------------------------------- batch axes, dtypes


@pytest.mark.parametrize("form", ["plain", "all"])
@pytest.mark.parametrize("num_queries", [1, 18])
@pytest.mark.parametrize(
    ("query_batch", "key_batch", "value_batch"),
    [((3,), (1,), (3,)), ((1,), (3,), (1,)), ((3,), (), ()), ((), (3,), (3,)), ((), (), (3,)), ((2, 3), (3,), (2, 1)),
     ((2, 1, 3, 2), (2, 2, 1, 2), (1, 2, 3, 1)), ((2, 1, 2, 1, 2), (), (2,))],
)  # fmt: skip
def test_batch_axes_broadcast(rng, query_batch, key_batch, value_batch, num_queries, form):
    (query, key, value), weights = problem(rng, form, (), num_queries, 20, 5)
    query, key, value = (
        x + rng.standard_normal((*batch, 1, 1)).astype(np.float32)
        for x, batch in ((query, query_batch), (key, key_batch), (value, value_batch))
    )
    assert_additive(query, key, value, **weights)


@pytest.mark.parametrize("form", ["plain", "all"])
@pytest.mark.parametrize("num_queries", [1, 4, 33])
@pytest.mark.parametrize(("query_batch", "kv_batch"), [((6,), (2,)), ((2, 6), (2, 3)), ((2, 8), (1, 2)), ((6,), (1,))])
def test_grouped_heads(rng, query_batch, kv_batch, num_queries, form):
    arrays, weights = problem(rng, form, query_batch, num_queries, 40, 5, kv_batch=kv_batch)
    assert_additive(*arrays, **weights, enable_gqa=True)
    slopes = rng.random(query_batch[-1]).astype(np.float32)
    assert_additive(*arrays, **weights, enable_gqa=True, is_causal=True, alibi_slopes=slopes, sinks=slopes)


@pytest.mark.parametrize("name", ["query", "key", "value", "w_score", "w_query", "w_key"])
@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int8, bool])
def test_arrays_and_weights_promote(rng, name, dtype):
    """One of them float64, or an integer: the output is float64. (Biases do not count.)"""
    arrays, weights = problem(rng, "all", (2,), 9, 20)
    given = dict(zip(("query", "key", "value"), (2 * x for x in arrays), strict=True), **weights)
    given[name] = given[name].astype(dtype)
    assert assert_additive(**given).dtype == np.float64


@pytest.mark.parametrize("form", ["bias", "all"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bias_dtype", [np.float16, np.float64, np.int64])
def test_b_hidden_does_not_decide_the_dtype(rng, bias_dtype, dtype, form):
    """It is rounded to the accumulation dtype, not to that of storage."""
    arrays, weights = problem(rng, form, (2,), 9, 20, dtype=dtype)
    weights["b_hidden"] = (3 * rng.standard_normal(16)).astype(bias_dtype)
    out, lse = additive(*arrays, **weights, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert_additive(*arrays, **weights)


@pytest.mark.parametrize("dtype", sixteen_bits())
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (17, 65), (130, 70), (0, 5), (5, 0)])
def test_sixteen_bits(rng, shape, form, dtype):
    """Storage only: projections, sums, lse and weights are float32."""
    arrays, weights = problem(rng, form, (2,), *shape, 10, dtype=dtype)
    assert_additive(*arrays, **weights)
    assert_additive(*arrays, **weights, is_causal=True, window_size=(60, None), softcap=2.0, activation="sigmoid")
    wider = assert_additive(*arrays, **weights | {"w_score": weights["w_score"].astype(np.float32)})
    assert wider.dtype == np.float32


def test_nested_lists():
    arrays = [[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[1], [2]]
    weights = {"w_score": [1, 2], "w_query": [[1, 2], [0.5, 1]], "w_key": ((1, 0), (1, 1)), "b_hidden": [0.25, -1]}
    out = additive(*arrays, **weights)
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, reference.additive_attention(*arrays, **weights), rtol=1e-14)


# --------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("form", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("rule", RULES)
def test_rules(rng, rule, num_queries, dtype, form):
    arrays, weights = problem(rng, form, (2, 3), num_queries, 70, 5, dtype=dtype)
    assert_additive(*arrays, **weights, **rules(rng, num_queries=num_queries, dtype=dtype)[rule])


def test_rules_over_several_blocks(rng):
    arrays, weights = problem(rng, "plain", (2, 3), 130, 300, 3)
    for rule, arguments in rules(rng, num_queries=130, num_keys=300).items():
        if rule in ("causal", "window", "mask", "bias that hides", "together"):
            assert_additive(*arrays, **weights, **arguments)


def test_the_scale_is_1_and_comes_before_softcap_and_bias(rng):
    (query, key, value), weights = problem(rng, "plain", (), 5, 9)
    np.testing.assert_array_equal(
        additive(query, key, value, **weights), additive(query, key, value, **weights, scale=1)
    )
    capped = {"scale": 4.0, "softcap": 0.5, "bias": rng.standard_normal((5, 9)).astype(np.float32)}
    assert_additive(query, key, value, **weights, **capped)


SMALL_LENGTHS = (0, 1, 2, 5, 15, 17, 33, 65, 129)


@st.composite
def additive_calls(draw):
    """(query, key, value, keyword arguments): as in test_combinations, with any projections and some very large
    rows."""
    query, key, value, arguments = draw(calls(SMALL_LENGTHS, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    form = FORMS[draw(st.sampled_from(sorted(FORMS)))]
    dim = query.shape[-1]
    hidden = draw(st.integers(0, 24)) if form[:2] == ("w_query", "w_key") else dim
    shapes = {"w_score": (hidden,), "w_query": (dim, hidden), "w_key": (dim, hidden), "b_hidden": (hidden,)}
    for name in ("w_score", *form):
        size = draw(st.sampled_from([1.0, 1.0, 0.2, 5.0]))
        arguments[name] = (size * rng.standard_normal(shapes[name])).astype(query.dtype)
    for x in (query, key):
        far = draw(st.sampled_from([1, 1, 1, 20, 50, 1e4]))
        x *= np.where(rng.random((*x.shape[:-1], 1)) < 0.3, query.dtype.type(far), query.dtype.type(1))
    return query, key, value, arguments


@given(additive_calls())
@settings(max_examples=150)
def test_everything_together(call):
    *arrays, arguments = call
    assert_additive(*arrays, **arguments)


# ----------------------------------------------------------------------------------------- large numbers

# Where the way to compute a score may change: exponentials and their products leave the range of the dtype.
SWITCHES = (5, 10, 21.5, 43, 44.36, 88.7, 350, 354.9, 709.7, 1e4)


def steps_around(number, dtype):
    """The number in that dtype, and the adjacent ones."""
    below, above = (np.nextafter(dtype(number), dtype(to)) for to in (-np.inf, np.inf))
    return np.array([np.nextafter(below, dtype(-np.inf)), below, number, above, np.nextafter(above, dtype(np.inf))])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 5, 33])
@pytest.mark.parametrize("switch", SWITCHES)
def test_around_the_switches(rng, switch, hidden, dtype):
    """Queries and keys on either side of a switch; their sums are small, as large as the switch, and twice that."""
    sides = steps_around(switch, dtype).astype(dtype)
    signs = rng.choice([-1, 1], hidden)
    near = functools.partial(rng.choice, sides)
    mixed, small = [rng.choice([-1, 1], (4, hidden)) * near((4, hidden)), rng.standard_normal((6, hidden))]
    query = np.concatenate([signs * near((10, hidden)), mixed, small]).astype(dtype)
    beside = -signs * near((19, hidden)) + rng.standard_normal((19, hidden))
    key = np.concatenate([-signs * near((10, hidden)), beside, mixed, small]).astype(dtype)
    # One channel is enough.
    query[::2, 1:] = rng.standard_normal((10, hidden - 1))
    key[::3, 1:] = rng.standard_normal((13, hidden - 1))
    w_score = rng.standard_normal(hidden).astype(dtype)
    assert_scores(query, key, w_score=w_score)
    assert_scores(query[:1], key, w_score=w_score)
    value = rng.standard_normal((len(key), 5)).astype(dtype)
    assert_additive(query, key, value, w_score=w_score, is_causal=True, query_offset=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [False, True])
def test_sums_around_the_switches(rng, dtype, half):
    """q + k near a switch while q or k, or neither, is small."""
    sums = np.concatenate([steps_around(s * sign, dtype) for s in SWITCHES for sign in (-1, 1)])
    query = (sums / 2 if half else sums)[:, None].astype(dtype)
    key = np.concatenate([(sums / 2 if half else 0 * sums)[:, None], rng.standard_normal((5, 1)), -query]).astype(dtype)
    assert_scores(query, key, w_score=np.ones(1, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("query_size", "key_size"), [(1e4, 1e4), (1e4, 1), (1, 1e4), (100, 100), (20, 30), (1e-30, 1), (1e-30, 1e-30)]
)
def test_sizes_of_arguments(rng, query_size, key_size, form, dtype):
    """Normal numbers of any size, with keys that cancel queries up to a normal number beside those that do not."""
    (query, key, value), weights = problem(rng, form, (2,), 18, 40, 7, dtype=dtype)
    query, key = query * dtype(query_size), key * dtype(key_size)
    if form in ("plain", "bias"):
        key[:, ::2] += -query[:, :1] - key[:, ::2] + rng.standard_normal(key[:, ::2].shape).astype(dtype)
    assert_convex(assert_additive(query, key, value, **weights), value)
    assert_additive(query[:, :1], key, value, **weights)
    assert_scores(query[0], key[0], **weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_arguments_are_not_lost(dtype):
    """tanh(x) = x for tiny x: the error is one of the weight's size, which bounds only the absolute error."""
    x = np.array([[1e-3], [1e-5], [1e-20], [0.0]], dtype=dtype)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(score_matrix(x, 0 * x, np.ones(1, dtype=dtype)), np.tanh(x + 0 * x.T), atol=8 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e30, 1e-30, 1e37, 1e-37, 1e12, 0.0])
@pytest.mark.parametrize("scale", [None, "inverse", -1.0])
def test_sizes_of_w_score(rng, scale, size, dtype):
    """Also with a scale that brings the scores back into range."""
    (query, key, value), weights = problem(rng, "plain", (2,), 18, 40, 7, dtype=dtype)
    weights["w_score"] *= dtype(size)
    if scale == "inverse":
        scale = 1 / size if size else 1e30
    query[:, ::3] *= 100
    out = assert_additive(query, key, value, **weights, scale=scale)
    assert_convex(out, value)
    assert np.isfinite(out).all()
    assert_additive(query[:, :1], key, value, **weights, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30, -1e30, 0.0])
def test_scales(rng, scale, dtype):
    arrays, weights = problem(rng, "plain", (2,), 18, 40, 7, dtype=dtype)
    assert_convex(assert_additive(*arrays, **weights, scale=scale), arrays[2])


def test_weights_of_very_different_sizes(rng):
    """A weight that is negligible beside another does no harm, nor do zeros."""
    arrays, _ = problem(rng, "plain", (2,), 18, 40, 6)
    for w_score in ([1, 1e-20, 1, -1, 0, 1e-38], [1e20, 1, 1, 1, 1, 1], [0, 0, 0, 2, 0, 0], [1, -1, 1, -1, 1, -1]):
        assert_additive(*arrays, w_score=np.array(w_score, dtype=np.float32))


def test_weights_that_cancel(rng):
    """Two hidden units with opposite weights and equal channels: the score is 0 to within the size of the weights."""
    (query, key, _), _ = problem(rng, "plain", (), 18, 40, 1)
    query, key = np.repeat(query, 2, axis=-1), np.repeat(key, 2, axis=-1)
    assert_scores(query, key, w_score=np.array([1000, -1000], dtype=np.float32))


# ------------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("form", ["plain", "bias"])
@pytest.mark.parametrize("rule", ["all", "causal", "mask"])
def test_infinite_channels(rng, rule, form, num_queries, dtype):
    """tanh of infinity is 1: an infinite query or key has ordinary scores, except for inf - inf, which is NaN."""
    (query, key, value), weights = problem(rng, form, (2, 3), num_queries, 70, 5, dtype=dtype)
    arguments = {} if rule == "all" else rules(rng, num_queries=num_queries, dtype=dtype)[rule]
    for at, sign in ((0, 1), (3, -1)):
        infinite = query.copy()
        infinite[:, :, ::2, at] = sign * np.inf
        assert np.isfinite(assert_additive(infinite, key, value, **weights, **arguments)).all()
        infinite = key.copy()
        infinite[:, :, 5:60:7, at] = sign * np.inf
        assert np.isfinite(assert_additive(query, infinite, value, **weights, **arguments)).all()
    for x in (query, key):
        x[rng.random(x.shape) < 0.02] = np.inf
        x[rng.random(x.shape) < 0.02] = -np.inf
        x[rng.random(x.shape) < 0.02] *= 1000
    assert_additive(query, key, value, **weights, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_minus_infinity(rng, dtype):
    """Only rows that see such a pair are NaN; the others keep every bit."""
    (query, key, value), weights = problem(rng, "plain", (2,), 40, 40, 5, dtype=dtype)
    query[:, 10:, 2] = np.inf
    expected = additive(query, key, value, **weights, is_causal=True)
    assert np.isfinite(expected).all()
    key[:, 20, 2] = -np.inf
    out, lse = additive(query, key, value, **weights, is_causal=True, return_lse=True)
    assert bits(out[:, :20]) == bits(expected[:, :20])
    assert np.isnan(out[:, 20:]).all()
    assert np.isnan(lse[:, 20:]).all()
    assert_additive(query, key, value, **weights, is_causal=True)


def test_infinity_through_a_projection():
    """inf * positive is inf, and its tanh 1; 0 * inf is NaN, as in any product of matrices."""
    query, key, w_score = np.float32([[np.inf, 1.0], [1.0, 2.0]]), np.float32([[0.5], [-3.0]]), np.float32([1.0])
    assert_additive(query, key, key, w_score=w_score, w_query=np.float32([[2.0], [1.0]]))
    out = additive(query, key, key, w_score, w_query=np.float32([[0.0], [1.0]]))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_weight(rng, sign, dtype):
    """Scores are infinite, of the sign of tanh: -inf is a weight of 0, +inf gives NaN, and so does inf * tanh(0)."""
    (query, key, value), weights = problem(rng, "plain", (2,), 17, 33, 5, dtype=dtype)
    weights["w_score"][2] = sign * np.inf
    key[:, :, 2] = np.linspace(-3, 3, 33)
    query[:, :, 2] = np.clip(query[:, :, 2], -2, 2)
    query[:, :6, 2] = -5 * sign
    query[:, 6:9, 2] = 5 * sign
    query[:, 9, 2] = -key[:, 20, 2]
    for num_queries in (17, 1):
        out, lse = additive(query[:, :num_queries], key, value, **weights, return_lse=True)
        assert (out[:, :6] == 0).all()
        assert (lse[:, :6] == -np.inf).all()
        assert np.isnan(out[:, 6:]).all()
        assert np.isnan(lse[:, 6:]).all()
    assert_additive(query[:, :9], key, value, **weights)
    weights["w_score"][2] = np.nan
    assert np.isnan(additive(query, key, value, **weights)).all()


def test_weights_of_a_row_of_nan():
    """NaN, except for keys without weight in any row: hidden ones, and those whose own score is -inf."""
    query, key = np.float32([[1.0]]), np.float32([[1.0], [-3.0], [2.0], [np.nan]])
    _, weights = additive(query, key, key, [np.inf], key_lengths=3, return_weights=True)
    np.testing.assert_array_equal(weights, [[np.nan, 0, np.nan, 0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 44.0, 1e4, 1e38])
@pytest.mark.parametrize("rule", list(hiding_rules(np.random.default_rng())))
def test_unseen_keys_and_values(rng, rule, bad):
    """The contents of a key or value that no query sees do not reach a single bit."""
    arguments, unseen = hiding_rules(rng)[rule]
    (query, key, value), weights = problem(rng, "plain", (2, 3), *SHAPE, 6)
    spoiled = key.copy(), value.copy()
    spoiled[0][..., unseen, :] = bad
    spoiled[1][..., unseen, ::2] = bad
    for _ in range(2):
        expected = additive_results(query, key, value, **weights, **arguments)
        assert_same_bits(additive_results(query, *spoiled, **weights, **arguments), expected, f"unseen {bad}")
        query, arguments = query[..., -1:, :], last_row(arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("activation", ["softmax", "relu", "sigmoid"])
def test_unseen_keys_of_any_form(rng, activation, bad, form):
    (query, key, value), weights = problem(rng, form, (2,), 20, 50, 6)
    key[:, 31:], value[:, 31:] = bad, np.nan
    query[:, 15:] = bad
    assert_additive(query, key, value, **weights, activation=activation, key_lengths=31, query_lengths=15)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_queries", [1, 20])
def test_seen_nan_gives_nan(rng, num_queries, form):
    (query, key, value), weights = problem(rng, form, (2,), num_queries, 300, 6)
    bad = key.copy()
    bad[:, 17, 3] = np.nan
    assert np.isnan(additive(query, bad, value, **weights)).all()
    bad = query.copy()
    bad[:, 0, 5] = np.nan
    out = additive(bad, key, value, **weights)
    assert np.isnan(out[:, 0]).all()
    assert np.isfinite(out[:, 1:]).all()
    for name in weights:
        bad = weights[name].copy()
        bad[..., 0] = np.nan
        assert np.isnan(additive(query, key, value, **weights | {name: bad})).all()


@pytest.mark.parametrize("bad", [np.nan, 44.0, 1e4, 1e38])
def test_keys_seen_by_some_rows_only(rng, bad):
    """Causal: key 20 is NaN or very large, and the rows before it are unaffected, though they share its block."""
    (query, key, value), weights = problem(rng, "plain", (2,), 40, 40, 6)
    clean = additive_results(query, key, value, **weights, is_causal=True)
    key[:, 20, 1:3] = bad
    spoiled = additive_results(query, key, value, **weights, is_causal=True)
    assert_same_bits([x[:, :20] for x in spoiled], [x[:, :20] for x in clean], f"rows before a key of {bad}")
    if np.isnan(bad):
        assert np.isnan(spoiled[0][:, 20:]).all()
    assert_additive(query, key, value, **weights, is_causal=True)


# ------------------------------------------------------------------------------------------- the same bits

# (Without projections: those are NumPy's products, and so are their bits.)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["causal", "window", "mask", "sigmoid", "together"])
@pytest.mark.parametrize("shape", [(150, 333), (1, 2500), (5, 2000)])
def test_threads(rng, shape, rule, dtype):
    arrays, weights = problem(rng, "plain", (2, 3), *shape, 6, dtype=dtype)
    arrays[0][:, 1, ::4] *= 100
    arrays[1][1, :, 7::50] *= 100
    call = functools.partial(additive, *arrays, **weights, **rules(rng, (2, 3), *shape, dtype)[rule])
    expected = call(num_threads=1), *call(num_threads=1, return_weights=True)
    for num_threads in THREADS[1:]:
        same = call(num_threads=num_threads), *call(num_threads=num_threads, return_weights=True)
        assert [bits(x) for x in same] == [bits(x) for x in expected], f"{num_threads} threads"


@pytest.mark.parametrize("form", ["plain", "all"])
def test_again(rng, form):
    arrays, weights = problem(rng, form, (2, 3), 70, 133, 17)
    expected = additive_results(*arrays, **weights)
    for _ in range(3):
        assert_same_bits(additive_results(*arrays, **weights), expected, "a second call")


@pytest.mark.parametrize("shape", [(70, 133), (1, 600)])
@pytest.mark.parametrize("size", [1, 50, 1e4])
def test_each_head_alone(rng, size, shape):
    """Together with heads whose numbers are very large, and alone."""
    (query, key, value), weights = problem(rng, "plain", (2, 4), *shape, 6)
    query[:, ::2] *= np.float32(size)
    key[:, 1] *= np.float32(size)
    together = additive_results(query, key, value, **weights)
    for b, h in np.ndindex(2, 4):
        alone = additive_results(query[b, h], key[b, h], value[b, h], **weights)
        assert_same_bits(alone, [x[b, h] for x in together], f"batch {b}, head {h}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["causal", "window", "mask", "bias", "together"])
@pytest.mark.parametrize("bad", [4.0, 43.5, 360.0, 1e4, 1e30, np.nan, np.inf])
def test_what_other_rows_hold(rng, bad, rule, dtype):
    """Every third query, or every second head, is very large or NaN: the other rows are unaffected."""
    (query, key, value), weights = problem(rng, "plain", (2, 4), 70, 133, 6, dtype=dtype)
    arguments = rules(rng, (2, 4), 70, 133, dtype)[rule]
    expected = additive_results(query, key, value, **weights, **arguments)
    other = query.copy()
    other[..., ::3, 2:] = bad
    rows = np.arange(70) % 3 != 0
    assert_same_bits(
        [x[:, :, rows] for x in additive_results(other, key, value, **weights, **arguments)],
        [x[:, :, rows] for x in expected],
        "other queries",
    )
    other = [x.copy() for x in (query, key, value)]
    for x in other:
        x[:, ::2] *= dtype(bad)
    same = additive_results(*other, **weights, **arguments)
    assert_same_bits([x[:, 1::2] for x in same], [x[:, 1::2] for x in expected], "other heads")


@pytest.mark.parametrize("padding", [1, 15, 64, 300])
@pytest.mark.parametrize("garbage", [0.0, 44.0, 1e4, 1e38, np.nan, np.inf])
@pytest.mark.parametrize("num_queries", [1, 50])
def test_padded_keys(rng, num_queries, garbage, padding):
    (query, key, value), weights = problem(rng, "plain", (2, 3), num_queries, 133, 6)
    for causal in (False, True):
        expected = additive_results(query, key, value, **weights, is_causal=causal)
        longer = [np.full((2, 3, 133 + padding, x.shape[-1]), garbage, dtype=np.float32) for x in (key, value)]
        for x, y in zip(longer, (key, value), strict=True):
            x[..., :133, :] = y
        padded = additive_results(query, *longer, **weights, is_causal=causal, key_lengths=133)
        assert (padded[2][..., 133:] == 0).all()
        padded = (*padded[:2], padded[2][..., :133], padded[3])
        assert_same_bits(padded, expected, f"{padding} keys of {garbage}")


@pytest.mark.parametrize("garbage", [np.nan, 1e4])
def test_padded_batch(rng, garbage):
    (query, key, value), weights = problem(rng, "plain", (3, 2), 50, 50, 6)
    lengths = np.array([[50], [7], [33]])
    arguments = {"key_lengths": lengths, "query_lengths": lengths, "is_causal": True}
    expected = additive_results(query, key, value, **weights, **arguments)
    for b, n in enumerate(lengths[:, 0]):
        for x in (query, key, value):
            x[b, :, n:] = garbage
    assert_same_bits(additive_results(query, key, value, **weights, **arguments), expected, f"padding of {garbage}")


@pytest.mark.parametrize("num_queries", [1, 60])
def test_grouped_heads_are_repeated_heads(rng, num_queries):
    (query, key, value), weights = problem(rng, "plain", (2, 8), num_queries, 133, 6, kv_batch=(2, 2))
    key[:, :, ::20] *= 100
    repeated = [np.repeat(x, 4, axis=-3) for x in (key, value)]
    for arguments in ({}, {"is_causal": True}, {"sinks": np.linspace(-1, 1, 8).astype(np.float32)}):
        assert_same_bits(
            additive_results(query, key, value, **weights, enable_gqa=True, **arguments),
            additive_results(query, *repeated, **weights, **arguments),
            "groups of 4",
        )


@pytest.mark.parametrize("num_queries", [1, 60])
def test_broadcast_axes_are_copies(rng, num_queries):
    (query, key, value), weights = problem(rng, "plain", (3, 4), num_queries, 133, 6, kv_batch=(1, 4))
    views = [np.broadcast_to(x, (3, *x.shape[1:])) for x in (key, value)]
    expected = additive_results(query, *(x.copy() for x in views), **weights)
    assert_same_bits(additive_results(query, key, value, **weights), expected, "broadcast by the call")
    assert_same_bits(additive_results(query, *views, **weights), expected, "strides of zero")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(35, 70, 6), (1, 200, 6), (33, 40, 1), (17, 65, 70)])
def test_strides(rng, shape, dtype):
    num_queries, num_keys, hidden = shape
    (query, key, value), weights = problem(rng, "plain", (2, 3), num_queries, num_keys, hidden, 7, dtype)
    w_score = weights["w_score"]
    key[:, :, 3::17] *= 100
    expected = additive_results(query, key, value, w_score, is_causal=True)
    for named in zip(*(layouts(x) for x in (query, key, value)), strict=True):
        name, changed = named[0][0], [array for _, array in named]
        assert_same_bits(additive_results(*changed, w_score, is_causal=True), expected, f"all inputs {name}")
    for w in (np.repeat(w_score, 2)[::2], w_score[::-1].copy()[::-1], np.stack([w_score, w_score])[1]):
        w.flags.writeable = False
        assert_same_bits(additive_results(query, key, value, w, is_causal=True), expected, "w_score as a view")


def test_strides_of_projections(rng):
    """Not the same bits, but the same numbers: weight matrices, b_hidden and their operands in any layout."""
    (query, key, value), weights = problem(rng, "all", (2, 3), 17, 33)
    for named in zip(*(layouts(x) for x in (query, key, value)), strict=True):
        assert_additive(*(array for _, array in named), **weights)
    matrices = (weights["w_query"], weights["w_key"])
    for named in zip(*(layouts(x) for x in matrices), strict=True):
        changed = {"w_query": named[0][1], "w_key": named[1][1], "b_hidden": weights["b_hidden"][::-1].copy()[::-1]}
        assert_additive(query, key, value, **weights | changed)


@pytest.mark.parametrize("form", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 35])
def test_out_in_any_layout(rng, num_queries, dtype, form):
    arrays, weights = problem(rng, form, (2, 3), num_queries, 70, 6, dtype=dtype)
    expected, lse = additive(*arrays, **weights, return_lse=True)
    for name, out in layouts(np.full_like(expected, 7)):
        if out.flags.writeable:
            result, lse_too = additive(*arrays, **weights, out=out, return_lse=True)
            assert result is out, name
            assert bits(out) == bits(expected), name
            assert bits(lse_too) == bits(lse), name


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("form", FORMS)
def test_results_come_in_order(rng, form):
    arrays, weights = problem(rng, form, (2, 3), 5, 7)
    shapes = {"out": (2, 3, 5, 9), "weights": (2, 3, 5, 7), "lse": (2, 3, 5)}
    call = functools.partial(additive, *arrays, **weights)
    assert call().shape == shapes["out"]
    assert [x.shape for x in call(return_weights=True)] == [shapes["out"], shapes["weights"]]
    assert [x.shape for x in call(return_lse=True)] == [shapes["out"], shapes["lse"]]
    assert [x.shape for x in call(return_lse=True, return_weights=True)] == list(shapes.values())


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_left_alone(rng, form):
    arrays, weights = problem(rng, form, (2,), 40, 70)
    inputs = [*arrays, *weights.values()]
    before = [x.copy() for x in inputs]
    first = additive(*arrays, **weights, return_weights=True, return_lse=True)
    copies = [x.copy() for x in first]
    additive(-arrays[0], *arrays[1:], **weights, return_weights=True, return_lse=True)
    for x, y in zip([*inputs, *first], [*before, *copies], strict=True):
        np.testing.assert_array_equal(x, y)
    assert not any(np.shares_memory(x, y) for x in first for y in inputs)


# ------------------------------------------------------------------------------------------------ memory


@reads_proc
@pytest.mark.parametrize(
    "arguments",
    ["", "is_causal=True, num_threads=2", "w_query=normal(16, 16), w_key=normal(16, 16), b_hidden=normal(16)"],
)
def test_memory(arguments):
    """L = S = 4096: the scores would take 64 MiB, and with hidden units on an axis of their own 1 GiB."""
    setup = "query, key, value = normal(4096, 16), normal(4096, 16), normal(4096, 16)"
    setup += "; fastattn.additive_attention(normal(9, 16), normal(9, 16), normal(9, 16), normal(16))"
    call = f"fastattn.additive_attention(query, key, value, normal(16), return_lse=True, {arguments})"
    assert extra_memory(setup, call) < 16 * MEGABYTE


@reads_proc
@pytest.mark.parametrize("layout", ["normal(64, 100_000).T", "normal(100_000, 64)[::-1, ::-1]"])
def test_no_copy_because_of_strides(layout):
    """A key and a value of 24.4 MiB each; a copy of one would show."""
    setup = f"query, key, value = normal(1, 64), {layout}, {layout}"
    assert extra_memory(setup, "fastattn.additive_attention(query, key, value, normal(64))") < 16 * MEGABYTE


# ------------------------------------------------------------------------------------------------ errors

refuse_additive = functools.partial(refuse, function=NAME)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5,), (8,), (4, 1), (1, 4), (2, 4), (3, 4), (0,)])
def test_shapes_of_w_score(shape):
    refuse_additive(ValueError, "w_score", w_score=np.ones(shape, dtype=np.float32))


@pytest.mark.parametrize("name", ["w_query", "w_key"])
@pytest.mark.parametrize(
    "shape", [(), (4,), (8,), (7, 4), (8, 3), (8, 5), (4, 8), (1, 4), (8, 1), (3, 8, 4), (1, 8, 4)]
)
def test_shapes_of_projections(name, shape):
    refuse_additive(ValueError, name, **{name: np.ones(shape, dtype=np.float32)})


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5,), (8,), (1, 4), (4, 1), (3, 4)])
def test_shapes_of_b_hidden(shape):
    refuse_additive(ValueError, "b_hidden", b_hidden=np.ones(shape, dtype=np.float32))


@pytest.mark.parametrize("name", ["query", "key"])
def test_a_projection_is_missing(name):
    """Without w_query query's last axis must be hidden; the message says both, and what would project it."""
    for word in (name, f"w_{name}", r"\b8\b", r"\b4\b"):
        refuse_additive(ValueError, word, **{f"w_{name}": None})
    none = {"w_query": None, "w_key": None, "b_hidden": None}
    refuse_additive(ValueError, name, (name, arrays()[0][..., :5]), w_score=np.ones(8, dtype=np.float32), **none)


def test_the_message_shows_what_came():
    refuse_additive(ValueError, r"(?s)\(7, 4\).*\(8, 4\)", w_query=np.ones((7, 4), dtype=np.float32))
    refuse_additive(ValueError, r"(?s)\(8, 3\).*\(8, 4\)", w_key=np.ones((8, 3), dtype=np.float32))
    refuse_additive(ValueError, r"(?s)\(5,\).*\(4,\)", b_hidden=np.ones(5, dtype=np.float32))
    refuse_additive(ValueError, r"\(2, 4\)", w_score=np.ones((2, 4), dtype=np.float32))
    refuse_additive(TypeError, "complex64", w_score=np.ones(4, dtype=np.complex64))


def test_w_score_is_needed():
    refuse_additive(TypeError, "w_score", w_score=None)
    with pytest.raises(TypeError):
        additive(*arrays())


def test_out_overlaps_a_weight_that_is_converted():
    weights = np.arange(16).reshape(4, 4)
    x = np.ones((4, 4))
    with pytest.raises(ValueError, match=r"out.*w_query"):
        additive(x, x, x, np.ones(4), w_query=weights, out=weights.view(np.float64))
    np.testing.assert_array_equal(weights, np.arange(16).reshape(4, 4))


def test_sizes_beyond_the_address_space():
    """Zero strides make arrays of any size: running out of memory is an error, not a crash."""
    long, one = np.broadcast_to(np.float16(0), (1, 2**61)), np.zeros((1, 1), np.float16)
    with pytest.raises(MemoryError):
        additive(long, long, one, long[0])
    with pytest.raises(MemoryError):
        additive(one, one, one, long[0], w_query=long, w_key=long)
    with pytest.raises(MemoryError):
        additive(long, one, one, one[0], w_query=long.T)


# ---------------------------------------------------------------------------------- the checks can fail


def planted(change):
    """An additive_attention with its arguments altered: `change` gets all of them by name."""

    def wrong(query, key, value, **arguments):
        return additive(**change(dict(arguments, query=query, key=key, value=value)))

    return wrong


def without(position):
    """1 for every hidden unit but one."""
    return (np.arange(16) != position).astype(np.float32)


BUGS = {
    "no b_hidden": lambda a: a | {"b_hidden": None},
    "projections exchanged": lambda a: a | {"w_query": a["w_key"], "w_key": a["w_query"]},
    "projection transposed": lambda a: a | {"w_key": a["w_key"].T},
    "one hidden unit lost": lambda a: a | {"w_score": a["w_score"] * without(15)},
    "half a percent of a weight": lambda a: a | {"w_score": a["w_score"] * (1 - without(5) / np.float32(200))},
    "scale of dot products": lambda a: a | {"scale": 0.25},
    "query for key": lambda a: a | {"key": a["query"], "query": a["key"]},
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(rng, bug):
    arrays, weights = problem(rng, "bias", (2,), 33, 33)
    for name in ("w_query", "w_key"):
        weights[name] = (rng.standard_normal((16, 16)) / 4).astype(np.float32)
    assert_additive(*arrays, **weights, function=planted(lambda a: a))
    with pytest.raises(AssertionError, match="output"):
        assert_additive(*arrays, **weights, function=planted(BUGS[bug]))


@pytest.mark.parametrize("error", [3e-6, -3e-6])
def test_an_inexact_tanh_is_found(rng, monkeypatch, error):
    """The reference's tanh is off by 3e-6, so that the library's seems to be."""
    (query, key, _), weights = problem(rng, "plain", (), 17, 33)
    exact = reference.additive_scores

    def inexact(query, key, w_score, **arguments):
        return exact(query, key, w_score, **arguments) + error * np.sum(np.abs(w_score))

    assert_scores(query, key, **weights)
    monkeypatch.setattr(reference, "additive_scores", inexact)
    with pytest.raises(AssertionError, match="scores"):
        assert_scores(query, key, **weights)


def test_clamped_arguments_are_found(rng):
    """Queries and keys clipped to 21.5 each: right nearly everywhere, and wrong where they cancel."""
    (query, key, value), weights = problem(rng, "plain", (), 17, 33, 5)
    query[:, 2] = 30
    key[:, 2] -= 30
    clamped = planted(lambda a: a | {name: np.clip(a[name], -21.5, 21.5) for name in ("query", "key")})
    assert_additive(query, key, value, **weights)
    with pytest.raises(AssertionError, match="output"):
        assert_additive(query, key, value, **weights, function=clamped)
