"""Gradients of attention: every rule, size and dtype against the reference, bits, hostile numbers, errors."""

import functools

import numpy as np
import pytest
from gradient_bounds import NAMES, assert_gradients, gradient_bounds, named, random_gradients, size_of
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import AWKWARD, DTYPES, HEAD_DIMS, RULES, bits, layouts, misaligned, qkv, rules, sixteen_bits, spaced
from test_combinations import calls
from test_hostile import SHAPE, hiding_rules
from tolerances import accumulation_dtype, assert_within

import fastattn
from fastattn import reference

# As in test_combinations; without those that cost the reference most.
SIZES = (0, 1, 2, 5, 15, 16, 17, 31, 33, 63, 65, 100, 129, 150)
FUNCTIONS = ("dot_product_attention", "truncated_attention", "additive_attention", "bilinear_attention")
ACTIVATIONS = ("softmax", "relu", "sigmoid", "sparsemax", "entmax15")


def vjp_of(name):
    return getattr(fastattn, f"{name}_vjp")


def example(rng, name="dot_product_attention", batch=(2, 3), num_queries=20, num_keys=70, head_dim=16, value_dim=12,
            dtype=np.float32, kv_batch=None, hidden=9):  # fmt: skip
    """Arguments of a function by name, without rules; all arrays that its score can have."""
    query, key, value = qkv(rng, batch, num_queries, num_keys, head_dim, value_dim, dtype, kv_batch)
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    more = {
        "additive_attention": {"w_score": normal(hidden), "w_query": normal(head_dim, hidden) / 4,
                               "w_key": normal(head_dim, hidden) / 4, "b_hidden": normal(hidden)},
        "bilinear_attention": {"w_query": normal(head_dim, hidden) / 4, "w_key": normal(head_dim, hidden) / 4,
                               "b_query": normal(hidden), "b_key": normal(hidden)},
        "truncated_attention": {"left": num_keys // 4, "right": 2},
    }  # fmt: skip
    return {"query": query, "key": key, "value": value, **more.get(name, {})}


def all_gradients(call, name="dot_product_attention", grad_out=None, grad_lse=None, **more):
    """By name, without a comparison."""
    if grad_out is None:
        grad_out, grad_lse = random_gradients(name, {n: x for n, x in call.items() if n != "num_threads"})
    if grad_lse is not None:
        more["grad_lse"] = grad_lse
    names = named(name, call)
    return dict(zip(names, vjp_of(name)(grad_out, **call, **more, wrt=names), strict=True))


def assert_same_bits(actual, expected, what):
    assert list(actual) == list(expected), what
    for name, x in actual.items():
        y = expected[name]
        if bits(x) != bits(y):
            count = np.count_nonzero(~((x == y) | (np.isnan(x) & np.isnan(y))))
            raise AssertionError(f"{what}: the gradient of {name} differs in {count} of {y.size} numbers")


# ------------------------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_rules(rng, rule, name, dtype):
    rule = rules(rng, dtype=dtype)[rule]
    if name == "truncated_attention" and {"window_size", "chunk_size"} & set(rule):
        pytest.skip("the function has a window of its own")
    assert_gradients(name, {**example(rng, name, dtype=dtype), **rule})


@pytest.mark.parametrize("dtype", sixteen_bits())
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rule", ["causal", "mask", "bias that hides", "relative bias", "sinks", "softcap", "relu",
                                  "sigmoid", "entmax15 of some keys", "together"])  # fmt: skip
def test_sixteen_bits(rng, rule, name, dtype):
    rule = rules(rng)[rule]
    if name == "truncated_attention" and {"window_size", "chunk_size"} & set(rule):
        pytest.skip("the function has a window of its own")
    rule = {n: x.astype(dtype) if n in NAMES[name] else x for n, x in rule.items()}
    gradients = assert_gradients(name, {**example(rng, name, dtype=dtype), **rule})
    assert all(x.dtype == dtype for x in gradients.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_queries", AWKWARD)
def test_sizes(rng, num_queries, causal, dtype):
    for num_keys in AWKWARD:
        call = example(rng, batch=(2,), num_queries=num_queries, num_keys=num_keys, dtype=dtype)
        assert_gradients("dot_product_attention", {**call, "is_causal": causal})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(rng, head_dim, dtype):
    for value_dim in {head_dim, 5, 64}:
        call = example(rng, batch=(), num_queries=33, num_keys=50, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
        assert_gradients("dot_product_attention", call)


@pytest.mark.parametrize("name", ["additive_attention", "bilinear_attention"])
@pytest.mark.parametrize("hidden", [0, 1, 3, 8, 16, 17, 33, 64])
def test_hidden_units(rng, hidden, name):
    for head_dim in (0, 1, 16, 33):
        call = example(rng, name, (2,), 17, 35, head_dim, hidden=hidden)
        assert_gradients(name, call)
        assert_gradients(name, {**call, "is_causal": True, "activation": "relu"})


@pytest.mark.parametrize("without", [("w_query",), ("w_key",), ("w_query", "w_key"), ("b_hidden",),
                                     ("w_query", "w_key", "b_hidden")])  # fmt: skip
def test_additive_without(rng, without):
    call = example(rng, "additive_attention", kv_batch=(3,))
    if "w_query" in without:
        call["query"] = rng.standard_normal((2, 3, 20, 9), dtype=np.float32)
    if "w_key" in without:
        call["key"] = rng.standard_normal((3, 70, 9), dtype=np.float32)
    assert_gradients("additive_attention", {**call, **dict.fromkeys(without), "scale": 0.7})


@pytest.mark.parametrize("without", [("w_key",), ("b_query",), ("b_key",), ("w_key", "b_key"), ("b_query", "b_key"),
                                     ("w_key", "b_query"), ("w_key", "b_query", "b_key")])  # fmt: skip
def test_bilinear_without(rng, without):
    """Without w_key, and without b_key, those of the query serve both: both uses are in their gradient."""
    call = example(rng, "bilinear_attention", kv_batch=(1, 3))
    assert_gradients("bilinear_attention", {**call, **dict.fromkeys(without), "is_causal": True})


@pytest.mark.parametrize("shape", [(1, 1000), (2, 700), (5, 400), (1000, 1), (1000, 2), (700, 5), (300, 700)])
@pytest.mark.parametrize("rule", ["plain", "causal", "bias", "relu", "entmax15"])
def test_long_and_narrow(rng, rule, shape):
    """Few queries or few keys, and more of either than a block holds."""
    call = example(rng, num_queries=shape[0], num_keys=shape[1], batch=(2,))
    call |= {
        "plain": {},
        "causal": {"is_causal": True, "query_offset": 3},
        "bias": {"bias": rng.standard_normal(shape).astype(np.float32), "sinks": np.float32(1)},
    }.get(rule, {"activation": rule})
    assert_gradients("dot_product_attention", call)


@st.composite
def other_calls(draw, name):
    """The same for a score that has arrays of its own, some of which may be left out."""
    query, key, value, arguments = draw(calls(sizes=(0, 1, 5, 16, 33, 65), largest_dim=20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    hidden = draw(st.integers(0, 20))
    normal = lambda *shape: (rng.standard_normal(shape) / 2).astype(query.dtype)  # noqa: E731
    given = {"query": query, "key": key, "value": value}
    dim = query.shape[-1]
    if name == "bilinear_attention":
        given |= {"w_query": normal(dim, hidden), "w_key": normal(dim, hidden), "b_query": normal(hidden),
                  "b_key": normal(hidden)}  # fmt: skip
    else:
        given |= {"w_score": normal(hidden), "w_query": normal(dim, hidden), "w_key": normal(dim, hidden),
                  "b_hidden": normal(hidden)}  # fmt: skip
    for optional in ("w_key", "b_query", "b_key", "b_hidden"):
        if optional in given and draw(st.booleans()) and (optional != "w_key" or name == "bilinear_attention"):
            del given[optional]
    return {**given, **arguments}


@given(calls(sizes=SIZES, largest_dim=40), st.sampled_from([None, None, None, *sixteen_bits()]))
@settings(max_examples=200)
def test_everything_together(call, narrow):
    query, key, value, arguments = call
    arrays = {"query": query, "key": key, "value": value}
    if narrow is not None:
        arrays = {name: x.astype(narrow) for name, x in arrays.items()}
    assert_gradients("dot_product_attention", {**arrays, **arguments})


@pytest.mark.parametrize("name", ["additive_attention", "bilinear_attention"])
def test_everything_together_of_other_scores(name):
    @given(other_calls(name))
    @settings(max_examples=100)
    def test(call):
        assert_gradients(name, call)

    test()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("batches", [((4,), (2,)), ((4,), (1,)), ((3, 4), (2,)), ((3, 4), (1, 2)), ((1, 6), (1, 3)),
                                     ((2, 4), (2, 4))])  # fmt: skip
def test_shared_heads(rng, batches, name):
    call = example(rng, name, batch=batches[0], kv_batch=batches[1])
    heads = batches[0][-1]
    call |= {"enable_gqa": True, "is_causal": True, "alibi_slopes": rng.random(heads).astype(np.float32)}
    call |= {"bias": rng.standard_normal((heads, 1, 70)).astype(np.float32)}
    assert_gradients(name, call)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [np.float32, sixteen_bits()[0]])
def test_broadcast_axes(rng, dtype, name):
    """Each array lacks some axis, or has it with the size 1: its gradient is a sum over it."""
    call = example(rng, name, dtype=dtype)
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    call["query"], call["key"], call["value"] = call["query"][:, :1], call["key"][0], call["value"][:1]
    call["value"] = np.concatenate([call["value"]] * 2)
    for shape in ((3, 1, 1), (1,), (), (20, 1), (70,), (2, 1, 1, 70), (2, 3, 20, 70), (1, 1, 20, 70)):
        more = {"bias": normal(*shape), "alibi_slopes": normal(2, 1), "sinks": normal()}
        gradients = assert_gradients(name, {**call, **more})
        assert gradients["bias"].shape == shape
        assert gradients["sinks"].shape == ()


@pytest.mark.parametrize("shape", [(16,), (1, 16), (20, 16), (3, 1, 16), (2, 1, 20, 16), (1,), (20, 1), (3, 20, 1), ()])
def test_shapes_of_relative_bias(rng, shape):
    call = {**example(rng), "window_size": (11, 4), "relative_bias": rng.standard_normal(shape)}
    gradients = assert_gradients("dot_product_attention", call)
    assert gradients["relative_bias"].dtype == np.float64, "that of the array, whatever the dtype of the call"


@pytest.mark.parametrize("cuts", [([0, 40], None), ([0, 7, 7, 24, 40], None), ([0, 3, 3, 40], [0, 30, 50, 70]),
                                  ([0, 20, 40], [0, 0, 70]), ([0, 40, 40], [0, 70, 70])])  # fmt: skip
@pytest.mark.parametrize("rule", [{}, {"is_causal": True}, {"window_size": (6, 3), "softcap": 2.0},
                                  {"activation": "relu"}, {"activation": "sparsemax", "scale": 0.4}])  # fmt: skip
@pytest.mark.parametrize("dtype", [*DTYPES, *sixteen_bits()])
def test_varlen(rng, dtype, rule, cuts):
    num_keys = 40 if cuts[1] is None else 70
    call = example(rng, num_queries=40, num_keys=num_keys, batch=(2, 4), kv_batch=(2,), dtype=dtype)
    call |= {"cu_seqlens_q": cuts[0], "cu_seqlens_k": cuts[1], "enable_gqa": True}
    call |= {"alibi_slopes": rng.random(4).astype(dtype), **rule}
    if "activation" not in rule:
        call["sinks"] = rng.standard_normal(4).astype(np.float32)
    assert_gradients("varlen_attention", call)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtypes_of_gradients(rng, name):
    """Each has the dtype of its own array: mixed ones, integers, bools, lists and numbers."""
    call = example(rng, name)
    call["value"] = call["value"].astype(np.float64)
    assert_gradients(name, call)
    call = example(rng, name)
    call["key"] = rng.integers(-2, 3, call["key"].shape)
    call["query"] = rng.random(call["query"].shape) < 0.5
    gradients = assert_gradients(name, {**call, "bias": np.float16(rng.standard_normal((20, 70)))})
    assert gradients["query"].dtype == gradients["key"].dtype == np.float64
    assert gradients["bias"].dtype == np.float16
    call = example(rng, name, batch=())
    grad_out, _ = random_gradients(name, call)
    arrays = {n: x.tolist() if n in ("query", "key", "value") else x for n, x in call.items()}
    d_slopes, d_sinks, d_key = vjp_of(name)(grad_out, **arrays, alibi_slopes=0.5, sinks=1,
                                            wrt=("alibi_slopes", "sinks", "key"))  # fmt: skip
    assert d_slopes.dtype == d_sinks.dtype == d_key.dtype == np.float64
    assert np.shape(d_slopes) == np.shape(d_sinks) == ()
    assert_gradients(name, {**call, "alibi_slopes": np.float64(0.5), "sinks": np.float64(1)})


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, bool, *sixteen_bits()])
def test_dtypes_of_grad_out(rng, dtype):
    call = example(rng)
    grad_out = rng.integers(-3, 4, (2, 3, 20, 12)).astype(dtype)
    grad_lse = rng.integers(-3, 4, (2, 3, 20)).astype(dtype)
    expected = all_gradients(call, grad_out=grad_out.astype(np.float32), grad_lse=grad_lse.astype(np.float32))
    assert_same_bits(all_gradients(call, grad_out=grad_out, grad_lse=grad_lse), expected, "exact numbers")
    assert_gradients("dot_product_attention", call, grad_out=grad_out, grad_lse=grad_lse)


def test_results(rng):
    """A tuple in the order of wrt, an array for a name; a list of names is a tuple of names."""
    call = example(rng)
    grad_out, _ = random_gradients("dot_product_attention", call)
    vjp = functools.partial(fastattn.dot_product_attention_vjp, grad_out, **call)
    default = vjp()
    assert isinstance(default, tuple)
    assert [x.shape for x in default] == [call[n].shape for n in ("query", "key", "value")]
    one = vjp(wrt="key")
    assert isinstance(one, np.ndarray)
    assert bits(one) == bits(default[1])
    assert [bits(x) for x in vjp(wrt=["value", "query"])] == [bits(default[2]), bits(default[0])]
    assert bits(vjp(wrt=("key",))[0]) == bits(one)
    assert vjp(wrt=()) == ()


def test_the_gradient_of_lse_for_a_bias_is_the_weights(rng):
    call = {**example(rng), "bias": rng.standard_normal((20, 70)).astype(np.float32), "is_causal": True}
    call["bias"] = np.broadcast_to(call["bias"], (2, 3, 20, 70)).copy()
    _, weights = fastattn.dot_product_attention(**call, return_weights=True)
    zeros, ones = np.zeros((2, 3, 20, 12), np.float32), np.ones((2, 3, 20), np.float32)
    d_bias = fastattn.dot_product_attention_vjp(zeros, **call, wrt="bias", grad_lse=ones)
    np.testing.assert_allclose(d_bias, weights, rtol=1e-5, atol=1e-7)


def test_the_gradient_of_the_scale(rng):
    """As the contract gives it, against a finite difference."""
    call = example(rng, dtype=np.float64, batch=())
    grad_out = rng.standard_normal((20, 12))
    d_query = fastattn.dot_product_attention_vjp(grad_out, **call, scale=0.3, wrt="query")
    ahead, behind = (fastattn.dot_product_attention(**call, scale=0.3 + s) for s in (1e-6, -1e-6))
    slope = np.vdot(grad_out, ahead - behind) / 2e-6
    np.testing.assert_allclose(np.vdot(call["query"], d_query) / 0.3, slope, rtol=1e-6, atol=1e-7)


def test_the_check_can_fail(rng):
    """A wrong factor, a missing term, and a sum over the wrong heads are outside the bounds."""
    call = example(rng)
    real = reference.dot_product_attention_vjp

    def wrong(change):
        def vjp(*arguments, wrt, **keywords):
            gradients = dict(zip(wrt, real(*arguments, **keywords, wrt=wrt), strict=True))
            change(gradients)
            return tuple(gradients[n].astype(np.float32) for n in wrt)

        return vjp

    assert_gradients("dot_product_attention", call, function=wrong(lambda gradients: None))

    def scale_key(gradients):
        gradients["key"] = gradients["key"] * (1 + 2e-4)

    def drop_a_row(gradients):
        gradients["value"] = gradients["value"] - 1e-4

    for change in (scale_key, drop_a_row):
        with pytest.raises(AssertionError, match="outside the bound"):
            assert_gradients("dot_product_attention", call, function=wrong(change))


# ------------------------------------------------------------------------------------ same bits

KINDS = ("plain", "causal", "window", "chunks", "lengths", "mask", "bias", "relu", "entmax15", "together")


def arguments_of(rng, kind, num_queries, num_keys, dtype=np.float32, batch=(2, 4)):
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    mask = rng.random((num_queries, num_keys)) < 0.7
    lengths = rng.integers(num_keys // 2, num_keys + 1, (*batch[:-1], 1))
    return {
        "causal": {"is_causal": True},
        "window": {"window_size": (40, 10), "relative_bias": normal(batch[-1], 1, 51)},
        "chunks": {"chunk_size": 30, "left_chunks": 2},
        "lengths": {"key_lengths": lengths, "query_lengths": num_queries - 3},
        "mask": {"mask": mask},
        "bias": {"bias": normal(batch[-1], num_queries, num_keys)},
        "relu": {"activation": "relu"},
        "entmax15": {"activation": "entmax15", "is_causal": True},
        "together": {
            "is_causal": True,
            "window_size": (num_keys // 2, None),
            "key_lengths": lengths,
            "mask": mask,
            "bias": normal(batch[-1], 1, num_keys),
            "relative_bias": normal(batch[-1], 1, num_keys // 2 + 1),
            "alibi_slopes": np.linspace(0.1, 0.5, batch[-1]).astype(dtype),
            "sinks": np.linspace(-1, 1, batch[-1]).astype(dtype),
            "softcap": 20.0,
        },
    }.get(kind, {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(200, 333), (3, 1500), (1500, 3)])
def test_threads(rng, shape, kind):
    call = example(rng, batch=(2, 4), num_queries=shape[0], num_keys=shape[1])
    call |= arguments_of(rng, kind, *shape)
    expected = all_gradients({**call, "num_threads": 1})
    for num_threads in (2, 3, 7):
        assert_same_bits(all_gradients({**call, "num_threads": num_threads}), expected, f"{num_threads} threads")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, *sixteen_bits()])
def test_threads_of_one_head(rng, dtype, name):
    """Fewer heads than threads: the sums of one head are split, or are not, but are the same."""
    call = example(rng, name, (), 300, 500, dtype=dtype)
    call |= {"alibi_slopes": dtype(0.1), "sinks": dtype(0.5), "bias": rng.standard_normal(500).astype(dtype)}
    expected = all_gradients({**call, "num_threads": 1}, name)
    for num_threads in (2, 3, 7):
        assert_same_bits(all_gradients({**call, "num_threads": num_threads}, name), expected, f"{num_threads} threads")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kv_batch", [(2, 4), (2, 2), (1, 1), (2,)])
def test_threads_and_shared_keys(rng, kv_batch, name):
    call = example(rng, name, (2, 4), 100, 150, kv_batch=kv_batch)
    call |= {"enable_gqa": True, "bias": np.float32(rng.standard_normal((4, 1, 1)))}
    expected = all_gradients({**call, "num_threads": 1}, name)
    for num_threads in (2, 3):
        assert_same_bits(all_gradients({**call, "num_threads": num_threads}, name), expected, f"{num_threads} threads")


def subsets(names):
    """Each alone, all but each, and all in reverse."""
    return [*((n,) for n in names), *(tuple(m for m in names if m != n) for n in names), tuple(reversed(names))]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, sixteen_bits()[-1]])
def test_which_names_are_asked_for(rng, dtype, kind, name):
    call = example(rng, name, (2, 4), 50, 90, dtype=dtype)
    rule = arguments_of(rng, kind, 50, 90)
    if name == "truncated_attention":
        rule = {n: x for n, x in rule.items() if n not in ("window_size", "chunk_size", "left_chunks", "relative_bias")}
    call |= rule
    grad_out, grad_lse = random_gradients(name, call)
    expected = all_gradients(call, name, grad_out, grad_lse)
    more = {} if grad_lse is None else {"grad_lse": grad_lse}
    for wrt in subsets(tuple(expected)):
        results = vjp_of(name)(grad_out, **call, **more, wrt=wrt)
        for n, x in zip(wrt, results, strict=True):
            assert bits(x) == bits(expected[n]), (n, wrt)


@pytest.mark.parametrize("name", [*FUNCTIONS, "varlen_attention"])
@pytest.mark.parametrize("kind", ["plain", "causal", "window", "lengths", "mask", "bias", "together"])
@pytest.mark.parametrize("shape", [(50, 333), (2, 700), (1, 30)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, *sixteen_bits()])
def test_output_and_lse_change_nothing(rng, dtype, shape, kind, name):
    call = example(rng, name, (2, 4), *shape, dtype=dtype)
    rule = arguments_of(rng, kind, *shape) if shape[0] > 3 or kind != "lengths" else {"key_lengths": 20}
    if name == "truncated_attention":
        rule = {n: x for n, x in rule.items() if n not in ("window_size", "relative_bias")}
    if name == "varlen_attention":
        call |= {"cu_seqlens_q": [0, shape[0] // 2, shape[0]], "cu_seqlens_k": [0, shape[1] // 3, shape[1]]}
        rule = {n: x for n, x in rule.items() if n in ("is_causal", "sinks", "alibi_slopes", "softcap")}
    call |= rule
    out, lse = getattr(fastattn, name)(**call, return_lse=True)
    expected = all_gradients(call, name)
    assert_same_bits(all_gradients(call, name, output=out, lse=lse), expected, "output and lse given")


@pytest.mark.parametrize("name", ["dot_product_attention", "truncated_attention", "additive_attention"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, sixteen_bits()[0]])
@pytest.mark.parametrize("shape", [(35, 70), (1, 70), (17, 5)])
def test_strides(rng, shape, dtype, name):
    call = example(rng, name, (2, 4), *shape, dtype=dtype, hidden=16)
    call |= {
        "bias": rng.standard_normal((2, 4, *shape)).astype(dtype),
        "is_causal": True,
        "w_query": None,
        "w_key": None,
    }
    call = {n: x for n, x in call.items() if x is not None}
    grad_out, grad_lse = random_gradients(name, call)
    out, lse = getattr(fastattn, name)(**call, return_lse=True)
    expected = all_gradients(call, name, grad_out, grad_lse)
    arrays = {n: x for n, x in call.items() if isinstance(x, np.ndarray) and x.ndim >= 2}
    variants = {n: dict(layouts(x)) for n, x in {**arrays, "grad_out": grad_out, "output": out}.items()}
    for layout in variants["query"]:
        changed = {n: of[layout] for n, of in variants.items()}
        grad, output = changed.pop("grad_out"), changed.pop("output")
        actual = all_gradients({**call, **changed}, name, grad, grad_lse)
        assert_same_bits(actual, expected, f"all inputs {layout}")
        actual = all_gradients({**call, **changed}, name, grad, grad_lse, output=output, lse=spaced(lse))
        assert_same_bits(actual, expected, f"all inputs {layout}, output too")
    for n in arrays:
        for layout in ("transposed", "misaligned", "negative strides"):
            actual = all_gradients({**call, n: variants[n][layout]}, name, grad_out, grad_lse)
            assert_same_bits(actual, expected, f"{n} {layout}")


@pytest.mark.parametrize("name", ["additive_attention", "bilinear_attention"])
def test_strides_of_projections(rng, name):
    """Not the same bits, as on the way there, but the same numbers."""
    call = example(rng, name)
    arrays = {n: x for n, x in call.items() if x.ndim >= 2}
    variants = {n: dict(layouts(x)) for n, x in arrays.items()}
    for layout in variants["w_query"]:
        assert_gradients(name, {**call, **{n: of[layout] for n, of in variants.items()}})


def test_strides_of_small_arguments(rng):
    call = example(rng, batch=(2, 4))
    small = {"key_lengths": rng.integers(30, 71, (2, 4)), "query_offset": rng.integers(-5, 40, (2, 4)),
             "alibi_slopes": np.float32(rng.random((2, 4))), "sinks": np.float32(rng.random((2, 4)))}  # fmt: skip
    grad_out, grad_lse = random_gradients("dot_product_attention", call)
    expected = all_gradients({**call, **small, "is_causal": True}, grad_out=grad_out, grad_lse=grad_lse)
    for change in (lambda x: x.T.copy().T, lambda x: x[:, ::-1].copy()[:, ::-1], spaced, misaligned):
        changed = {n: change(x) for n, x in small.items()}
        actual = all_gradients({**call, **changed, "is_causal": True}, grad_out=grad_out, grad_lse=change(grad_lse))
        assert_same_bits(actual, expected, "views")


def test_zero_strides(rng):
    """grad_out of a sum, and inputs that repeat a number: views, whose gradients are those of copies."""
    call = example(rng, batch=(2, 3))
    call |= {"bias": np.float32(rng.standard_normal((20, 70)))}
    views = {"query": call["query"][:, :, :1], "key": call["key"][..., :1], "value": call["value"][:1, :, :1, :1],
             "bias": call["bias"][:, :1]}  # fmt: skip
    views = {n: np.broadcast_to(x, call[n].shape) for n, x in views.items()}
    grad_out = np.broadcast_to(1.0, (2, 3, 20, 12))
    copies = {n: x.copy() for n, x in views.items()}
    assert_same_bits(all_gradients(views, grad_out=grad_out), all_gradients(copies, grad_out=grad_out.copy()), "views")
    assert_gradients("dot_product_attention", call, grad_out=grad_out)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, *sixteen_bits()])
def test_out_in_any_layout(rng, dtype, name):
    call = example(rng, name, (2, 4), 35, 70, dtype=dtype, kv_batch=(4,))
    call |= {"bias": rng.standard_normal((4, 1, 70)).astype(dtype), "sinks": rng.standard_normal(4).astype(dtype)}
    grad_out, grad_lse = random_gradients(name, call)
    expected = all_gradients(call, name, grad_out, grad_lse)
    names = tuple(expected)
    real = accumulation_dtype(np.dtype(dtype))
    wide = vjp_of(name)(grad_out, **call, grad_lse=grad_lse, wrt=names,
                        out=tuple(np.full(x.shape, 7, real) for x in expected.values()))  # fmt: skip
    for n, x in zip(names, wide, strict=True):
        assert x.dtype == real
        assert bits(x.astype(dtype)) == bits(expected[n]), f"{n}: rounded once, from the accumulation dtype"
    for layout in ("transposed", "negative strides", "sequence before heads", "misaligned", "spaced", "wide rows"):
        for kind in (np.dtype(dtype), real):
            outs = tuple(dict(layouts(np.full(x.shape, 7, kind))).get(layout) if x.ndim >= 2 else None
                         for x in expected.values())  # fmt: skip
            results = vjp_of(name)(grad_out, **call, grad_lse=grad_lse, wrt=names, out=outs)
            for n, out, result, own in zip(names, outs, results, wide, strict=True):
                assert out is None or result is out, (n, layout)
                assert bits(result) == bits(own.astype(result.dtype)), (n, layout)


def test_out_of_one_name(rng):
    call = example(rng)
    grad_out, _ = random_gradients("dot_product_attention", call)
    expected = fastattn.dot_product_attention_vjp(grad_out, **call, wrt="key")
    out = np.full(call["key"].shape, 7, np.float32)
    assert fastattn.dot_product_attention_vjp(grad_out, **call, wrt="key", out=out) is out
    assert bits(out) == bits(expected)
    (result,) = fastattn.dot_product_attention_vjp(grad_out, **call, wrt=("key",), out=[out])
    assert result is out


def test_out_leaves_the_gaps_alone(rng):
    call = example(rng, batch=(2, 4), num_queries=35)
    grad_out, _ = random_gradients("dot_product_attention", call)
    expected = fastattn.dot_product_attention_vjp(grad_out, **call)
    large = np.full((2, 40, 6, 30), 7, dtype=np.float32)
    out = large[:, 2:37, 1:5, 3:19].swapaxes(1, 2)
    fastattn.dot_product_attention_vjp(grad_out, **call, out=(out, None, None))
    assert bits(out) == bits(expected[0])
    out[...] = 7
    assert (large == 7).all()


def test_out_beside_an_input_in_one_buffer(rng):
    """Interleaved with inputs and with each other, but without a shared byte: allowed."""
    call = example(rng, batch=(2,), num_keys=20, value_dim=16)
    grad_out, _ = random_gradients("dot_product_attention", call)
    expected = fastattn.dot_product_attention_vjp(grad_out, **call)
    buffer = np.empty((2, 20, 64), dtype=np.float32)
    buffer[..., :16] = call["query"]
    outs = tuple(buffer[..., 16 * i : 16 * i + 16] for i in (1, 2, 3))
    fastattn.dot_product_attention_vjp(grad_out, buffer[..., :16], call["key"], call["value"], out=outs)
    assert [bits(x) for x in outs] == [bits(x) for x in expected]
    np.testing.assert_array_equal(buffer[..., :16], call["query"])


def test_inputs_are_left_alone(rng):
    call = {**example(rng), "bias": np.float32(rng.standard_normal((20, 70)))}
    grad_out, grad_lse = random_gradients("dot_product_attention", call)
    before = {n: x.copy() for n, x in call.items()}
    for x in (*call.values(), grad_out, grad_lse):
        x.flags.writeable = False
    all_gradients(call, grad_out=grad_out, grad_lse=grad_lse)
    assert all(bits(x) == bits(before[n]) for n, x in call.items())


# ------------------------------------------------------------------------------------ batch, rows, padding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(70, 133), (2, 400)])
def test_each_head_alone(rng, shape, kind):
    """Where nothing is shared, the gradients of a head are those of a call with that head alone."""
    call = example(rng, batch=(2, 4), num_queries=shape[0], num_keys=shape[1])
    rule = arguments_of(rng, kind, *shape) if shape[0] > 3 or kind != "lengths" else {"key_lengths": np.array([[99]])}
    grad_out, grad_lse = random_gradients("dot_product_attention", {**call, **rule})
    together = all_gradients({**call, **rule}, grad_out=grad_out, grad_lse=grad_lse)
    for b in range(2):
        for h in range(4):
            own = dict(rule)
            for name in ("bias", "relative_bias", "alibi_slopes", "sinks"):
                if name in own:
                    own[name] = own[name][h]
            if "key_lengths" in own:
                own["key_lengths"] = int(np.broadcast_to(own["key_lengths"], (2, 1))[b, 0])
            alone = all_gradients(
                {n: x[b, h] for n, x in call.items()} | own,
                grad_out=grad_out[b, h],
                grad_lse=None if grad_lse is None else grad_lse[b, h],
            )
            for name in ("query", "key", "value"):
                assert bits(alone[name]) == bits(together[name][b, h]), (name, b, h)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [1e4, 1e30, np.nan, np.inf])
def test_what_other_rows_hold(rng, kind, bad):
    """Every third query with extreme numbers, or gradients: d_query of the others is unaffected. Other heads: all."""
    call = example(rng, batch=(2, 4), num_queries=70, num_keys=133)
    rule = arguments_of(rng, kind, 70, 133)
    grad_out, grad_lse = random_gradients("dot_product_attention", {**call, **rule})
    expected = all_gradients({**call, **rule}, grad_out=grad_out, grad_lse=grad_lse)
    rows = np.arange(70) % 3 != 0
    for spoiled in ("query", "grad_out"):
        query, grad = call["query"].copy(), grad_out.copy()
        (query if spoiled == "query" else grad)[..., ::3, :] *= np.float32(bad)
        actual = all_gradients({**call, **rule, "query": query}, grad_out=grad, grad_lse=grad_lse)
        assert bits(actual["query"][..., rows, :]) == bits(expected["query"][..., rows, :]), spoiled
    other = {n: x.copy() for n, x in call.items()}
    grad = grad_out.copy()
    for x in (*other.values(), grad):
        x[:, ::2] *= np.float32(bad)
    actual = all_gradients({**other, **rule}, grad_out=grad, grad_lse=grad_lse)
    for name in ("query", "key", "value"):
        assert bits(actual[name][:, 1::2]) == bits(expected[name][:, 1::2]), name


@pytest.mark.parametrize("cut", [64, 100, 131])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_rows_alone(rng, causal, cut):
    """d_query of a block of rows is that of a call with these rows alone, at their position."""
    call = example(rng, batch=(2,), num_queries=300, num_keys=300)
    grad_out, _ = random_gradients("dot_product_attention", call)
    whole = fastattn.dot_product_attention_vjp(grad_out, **call, is_causal=causal, wrt="query")
    query = call.pop("query")
    for rows in (slice(0, cut), slice(cut, 300)):
        part = fastattn.dot_product_attention_vjp(
            grad_out[:, rows], query[:, rows], **call, is_causal=causal, query_offset=rows.start, wrt="query"
        )
        assert bits(part) == bits(whole[:, rows])


@pytest.mark.parametrize("length", [50, 64, 129])
def test_prefix_of_a_causal_sequence(rng, length):
    """What comes later changes nothing in d_query of what came before."""
    call = example(rng, batch=(2,), num_queries=300, num_keys=300)
    grad_out, _ = random_gradients("dot_product_attention", call)
    whole = fastattn.dot_product_attention_vjp(grad_out, **call, is_causal=True, wrt="query")
    first = {n: x[:, :length] for n, x in call.items()}
    part = fastattn.dot_product_attention_vjp(grad_out[:, :length], **first, is_causal=True, wrt="query")
    assert bits(part) == bits(whole[:, :length])
    changed = {n: x.copy() for n, x in call.items()}
    for x in changed.values():
        x[:, length:] = 5
    again = fastattn.dot_product_attention_vjp(grad_out, **changed, is_causal=True, wrt="query")
    assert bits(again[:, :length]) == bits(part)


def test_queries_that_do_not_see_a_key(rng):
    """d_key and d_value of the last keys depend on the last queries alone."""
    call = example(rng, batch=(2,), num_queries=200, num_keys=200)
    grad_out, _ = random_gradients("dot_product_attention", call)
    expected = fastattn.dot_product_attention_vjp(grad_out, **call, is_causal=True)
    for bad in (3.0, np.nan):
        query, grad = call["query"].copy(), grad_out.copy()
        query[:, :120] = bad
        grad[:, :120] = bad
        actual = fastattn.dot_product_attention_vjp(grad, query, call["key"], call["value"], is_causal=True)
        assert bits(actual[1][:, 120:]) == bits(expected[1][:, 120:])
        assert bits(actual[2][:, 120:]) == bits(expected[2][:, 120:])


@pytest.mark.parametrize("padding", [1, 16, 64, 300])
@pytest.mark.parametrize("garbage", [0.0, np.nan, np.inf, 1e38])
@pytest.mark.parametrize("num_queries", [1, 50])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_padding(rng, name, num_queries, garbage, padding):
    """Keys and queries past their lengths, and their gradients: exactly 0 there, and no bit differs elsewhere.

    (One query gets no padding: many take other loops, with other bits, on the way there.)
    """
    call = example(rng, name, (2, 3), num_queries, 133)
    call |= {"bias": np.float32(rng.standard_normal((num_queries, 133))), "is_causal": True}
    grad_out, grad_lse = random_gradients(name, call)
    expected = all_gradients(call, name, grad_out, grad_lse)

    def pad(x, *axes, rows=False):
        if rows and num_queries == 1:
            return x
        widths = [(0, padding if a - x.ndim in axes else 0) for a in range(x.ndim)]
        return np.pad(x, widths, constant_values=np.float32(garbage))

    padded = {
        **call,
        "query": pad(call["query"], -2, rows=True),
        "key": pad(call["key"], -2),
        "value": pad(call["value"], -2),
        "bias": pad(pad(call["bias"], -1), -2, rows=True),
        "key_lengths": 133,
        "query_lengths": num_queries,
    }
    actual = all_gradients(padded, name, pad(grad_out, -2, rows=True), pad(grad_lse, -1, rows=True))
    valid = {"query": np.s_[..., :num_queries, :], "key": np.s_[..., :133, :], "value": np.s_[..., :133, :],
             "bias": np.s_[:num_queries, :133]}  # fmt: skip
    for n, x in actual.items():
        inside = x[valid.get(n, ...)].copy()
        assert bits(inside) == bits(expected[n]), n
        if n in valid:
            x[valid[n]] = 0
            assert (x == 0).all(), n


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_padded_batch(rng, name, garbage):
    call = example(rng, name, (3, 2), 50, 50)
    lengths = np.array([[50], [7], [33]])
    call |= {"key_lengths": lengths, "query_lengths": lengths, "is_causal": True}
    grad_out, grad_lse = random_gradients(name, call)
    expected = all_gradients(call, name, grad_out, grad_lse)
    for b, n in enumerate(lengths[:, 0]):
        for x in (call["query"], call["key"], call["value"], grad_out):
            x[b, :, n:] = garbage
        grad_lse[b, :, n:] = garbage
    spoiled = all_gradients(call, name, grad_out, grad_lse)
    assert_same_bits(spoiled, expected, f"padding of {garbage}")
    assert all((spoiled[n][1, :, 7:] == 0).all() for n in ("query", "key", "value"))


def test_varlen_sequences_are_alone(rng):
    """NaN in one sequence reaches no other."""
    call = example(rng, batch=(3,), num_queries=90, num_keys=90)
    call |= {"cu_seqlens_q": [0, 20, 21, 60, 90], "is_causal": True}
    grad_out, grad_lse = random_gradients("varlen_attention", call)
    expected = all_gradients(call, "varlen_attention", grad_out, grad_lse)
    for x in (call["query"], call["key"], call["value"], grad_out):
        x[:, 21:60] = np.nan
    others = np.r_[0:21, 60:90]
    actual = all_gradients(call, "varlen_attention", grad_out, grad_lse)
    for n, x in actual.items():
        assert bits(x[:, others]) == bits(expected[n][:, others]), n
        assert np.isnan(x[:, 21:60]).all(), n


def test_truncated_is_a_window(rng):
    call = {**example(rng), "bias": np.float32(rng.standard_normal((20, 70)))}
    grad_out, grad_lse = random_gradients("dot_product_attention", call)
    expected = all_gradients({**call, "window_size": (13, 4)}, grad_out=grad_out, grad_lse=grad_lse)
    actual = all_gradients({**call, "left": 13, "right": 4}, "truncated_attention", grad_out, grad_lse)
    assert_same_bits(actual, expected, "truncated")


# ------------------------------------------------------------------------------------ what takes part


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", list(hiding_rules(np.random.default_rng())))
def test_unseen_keys_and_values(rng, rule, bad, activation):
    """The contents of a key or value that no query sees reach no bit, and have a gradient of 0."""
    arguments, unseen = hiding_rules(rng)[rule]
    call = {**example(rng, num_queries=SHAPE[0], num_keys=SHAPE[1]), **arguments, "activation": activation}
    grad_out, grad_lse = random_gradients("dot_product_attention", call)
    expected = all_gradients(call, grad_out=grad_out, grad_lse=grad_lse)
    call["key"][..., unseen, :] = bad
    call["value"][..., unseen, ::2] = bad
    actual = all_gradients(call, grad_out=grad_out, grad_lse=grad_lse)
    assert_same_bits(actual, expected, "unseen keys")
    assert (actual["key"][..., unseen, :] == 0).all()
    assert (actual["value"][..., unseen, :] == 0).all()


@pytest.mark.parametrize("name", ["additive_attention", "bilinear_attention"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rule", list(hiding_rules(np.random.default_rng())))
def test_unseen_keys_and_values_of_other_scores(rng, rule, bad, name):
    """Nor do they reach the gradients of the weight matrices."""
    arguments, unseen = hiding_rules(rng)[rule]
    call = {**example(rng, name, num_queries=SHAPE[0], num_keys=SHAPE[1]), **arguments}
    grad_out, grad_lse = random_gradients(name, call)
    expected = all_gradients(call, name, grad_out, grad_lse)
    call["key"][..., unseen, :] = bad
    call["value"][..., unseen, ::2] = bad
    assert_same_bits(all_gradients(call, name, grad_out, grad_lse), expected, "unseen keys")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rule", ["key_lengths", "causal", "window", "mask of keys", "mask of pairs", "all"])
def test_unseen_bias(rng, rule, bad):
    arguments, _ = hiding_rules(rng)[rule]
    call = {**example(rng, num_queries=SHAPE[0], num_keys=SHAPE[1]), **arguments}
    call["bias"] = np.float32(rng.standard_normal(SHAPE))
    expected = all_gradients(call)
    visible = reference.visible_keys(*SHAPE, **{n: x for n, x in arguments.items() if n != "bias"})
    call["bias"] = np.where(visible, call["bias"], np.float32(bad))
    actual = all_gradients(call)
    assert_same_bits(actual, expected, "unseen bias")
    assert (actual["bias"][~visible] == 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("array", ["query", "key", "value", "grad_out"])
def test_nan_goes_where_it_is_seen_and_no_further(rng, array, activation, name):
    """In row 20 of a causal call. Nothing else changes by a bit."""
    call = {**example(rng, name, (2,), 40, 40), "is_causal": True, "activation": activation}
    window = 40
    if name == "truncated_attention":
        window = call["left"] = 9
    grad_out, _ = random_gradients(name, call)
    clean = all_gradients(call, name, grad_out)
    spoiled = {**call, "grad_out": grad_out}
    spoiled[array] = spoiled[array].copy()
    spoiled[array][:, 20] = np.nan
    expected = getattr(reference, f"{name}_vjp")(**spoiled)
    actual = all_gradients(spoiled, name, spoiled.pop("grad_out"))
    for n, theirs in zip(("query", "key", "value"), expected, strict=True):
        np.testing.assert_array_equal(np.isnan(actual[n]), np.isnan(theirs), err_msg=n)
    rows, keys = np.arange(40), np.arange(40)
    alone = rows < 20 if array in ("key", "value") else rows != 20
    alone |= rows > 20 + window
    assert bits(actual["query"][:, alone]) == bits(clean["query"][:, alone])
    unreached = keys > 20 + (window if array in ("key", "value") else 0)
    assert bits(actual["key"][:, unreached]) == bits(clean["key"][:, unreached])
    assert bits(actual["value"][:, unreached]) == bits(clean["value"][:, unreached])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("bad", [0, 17, 299])
def test_seen_nan_gives_nan(rng, num_queries, bad, activation):
    call = {**example(rng, batch=(2,), num_queries=num_queries, num_keys=300), "activation": activation}
    grad_out, _ = random_gradients("dot_product_attention", call)
    call["key"][:, bad, 3] = np.nan
    gradients = all_gradients(call, grad_out=grad_out)
    assert np.isnan(gradients["query"]).all()
    assert np.isnan(gradients["key"][:, bad]).all()
    assert np.isnan(gradients["value"][:, bad]).all()


@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("sink", [None, -2.5])
@pytest.mark.parametrize("how", ["mask", "bias", "key_lengths", "query_lengths", "offset", "score"])
def test_empty_rows(rng, how, sink, num_queries):
    """Nothing goes to keys, values and biases, whatever is stored; grad_lse to the sink."""
    call = example(rng, batch=(2,), num_queries=num_queries)
    grad_out, grad_lse = np.full((2, num_queries, 12), np.nan, np.float32), np.ones((2, num_queries), np.float32)
    call |= {
        "mask": {"mask": np.zeros(70, dtype=bool)},
        "bias": {"bias": np.full((num_queries, 70), -np.inf, dtype=np.float32)},
        "key_lengths": {"key_lengths": 0},
        "query_lengths": {"query_lengths": 0},
        "offset": {"is_causal": True, "query_offset": -num_queries},
        "score": {},
    }[how]
    if how == "score":
        call["query"], call["key"] = np.abs(call["query"]) + np.float32(0.1), np.full_like(call["key"], -np.inf)
    else:
        for n in ("query", "key", "value"):
            call[n][...] = np.nan
    if "bias" not in call:
        call["bias"] = np.zeros((num_queries, 70), np.float32)
    if sink is not None:
        call["sinks"] = np.float32(sink)
    elif how != "query_lengths":
        grad_lse[...] = np.nan
    gradients = all_gradients(call, grad_out=grad_out, grad_lse=grad_lse)
    for n in ("query", "key", "value", "bias"):
        assert (gradients[n] == 0).all(), n
    if sink is not None:
        assert gradients["sinks"] == 2 * num_queries


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_empty_rows_among_others(rng, name, activation):
    call = {**example(rng, name, (2,), 130, 200), "mask": rng.random((130, 200)) < 0.5, "activation": activation}
    call["mask"][rng.random(130) < 0.4] = False
    empty = ~call["mask"].any(-1)
    call["bias"] = np.float32(rng.standard_normal((130, 1)))
    grad_out, grad_lse = random_gradients(name, call)
    clean = all_gradients(call, name, grad_out, grad_lse)
    grad_out[:, empty] = np.nan
    call["query"][:, empty] = np.inf
    if grad_lse is not None:
        grad_lse[:, empty] = np.nan
    gradients = assert_gradients(name, call, grad_out=grad_out, grad_lse=grad_lse)
    assert_same_bits(gradients, clean, "NaN in empty rows")
    assert (gradients["query"][:, empty] == 0).all()
    assert (gradients["bias"][empty] == 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_biases_of_minus_infinity(rng, activation):
    call = {**example(rng), "activation": activation}
    call["bias"] = np.where(rng.random((2, 3, 20, 70)) < 0.5, -np.inf, rng.standard_normal((2, 3, 20, 70)))
    call["bias"] = call["bias"].astype(np.float32)
    gradients = assert_gradients("dot_product_attention", call)
    assert (gradients["bias"][call["bias"] == -np.inf] == 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_biases_behind_block_masks(rng, activation):
    """Where blocks hide what positions show, a bias has gradient 0; every shape of a bias adds up its own way."""
    call = {**example(rng, batch=(3,), num_queries=110, num_keys=300), "activation": activation}
    call |= {"block_mask": rng.random((3, 16, 19)) < 0.3, "block_size": (7, 16), "window_size": (250, 90)}
    for rows in (110, 1):
        biases = {"bias": rng.standard_normal((3, rows, 300)).astype(np.float32),
                  "relative_bias": rng.standard_normal((3, rows, 341)).astype(np.float32)}  # fmt: skip
        assert_gradients("dot_product_attention", {**call, **biases})


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_infinite_scores(rng, activation):
    """The output of a row that sees a score of +inf is NaN, and so is what such a score feeds on the way back."""
    call = {**example(rng, batch=(2,)), "activation": activation, "bias": np.zeros((2, 20, 70), np.float32)}
    call["bias"][1, 4, 33] = np.inf
    where = {"query": (1, 4), "key": (1, 33), "value": (1, 33), "bias": (1, 4, 33)}
    for n, x in all_gradients(call).items():
        expected = np.zeros(x.shape, bool)
        expected[where[n]] = True
        assert (np.isnan(x) == expected).all(), n


def test_scores_of_minus_infinity(rng):
    """Their key gets nothing from that row, and the row nothing from the key."""
    call = example(rng, batch=(2,))
    call["query"][..., 0] = np.abs(call["query"][..., 0]) + 0.1
    clean = {**call, "mask": np.arange(70) != 30}
    grad_out, grad_lse = random_gradients("dot_product_attention", call)
    expected = all_gradients(clean, grad_out=grad_out, grad_lse=grad_lse)
    call["key"][:, 30] = 0
    call["key"][:, 30, 0] = -np.inf
    actual = all_gradients(call, grad_out=grad_out, grad_lse=grad_lse)
    assert (actual["key"][:, 30] == 0).all()
    for n, x in actual.items():
        np.testing.assert_allclose(x, expected[n], rtol=1e-5, atol=1e-6, err_msg=n)


# ------------------------------------------------------------------------------------ no stand-ins


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(20, 70), (1, 300), (70, 20)])
@pytest.mark.parametrize("level", ["-1e30", "finfo.min", "finfo.max", "1e30", "-1e4", "-1e9", "1e9"])
@pytest.mark.parametrize("given", [False, True])
def test_rows_at_one_level_are_ordinary(rng, given, level, shape, dtype):
    """Scores that are negligible beside such a bias: all weights of a row are equal, on the way back too."""
    number = getattr(np.finfo(dtype), level[6:]) if level.startswith("finfo") else float(level)
    call = example(rng, batch=(2,), num_queries=shape[0], num_keys=shape[1], dtype=dtype)
    call["query"] = call["query"] * dtype(1e-20)
    bias = np.full(shape, number, dtype=dtype)
    eps = np.finfo(dtype).eps
    for arguments in ({}, {"is_causal": True, "query_offset": 2}, {"mask": rng.random(shape) < 0.5}):
        own = {**call, **arguments, "bias": bias}
        grad_out, grad_lse = random_gradients("dot_product_attention", call)
        more = {}
        if given:
            out, lse = fastattn.dot_product_attention(**own, return_lse=True)
            more = {"output": out, "lse": lse}
        gradients = all_gradients(own, grad_out=grad_out, grad_lse=grad_lse, **more)
        # The same without a level, in float64; but for the queries' gradients these are all that can be exact.
        level_zero = {**call, **arguments, "bias": np.zeros(shape), "query": 0 * call["query"]}
        names = ("query", "key", "value", "bias")
        expected = reference.dot_product_attention_vjp(grad_out, **level_zero, wrt=names, grad_lse=grad_lse)
        bounds = gradient_bounds("dot_product_attention", grad_out, **level_zero, grad_lse=grad_lse,
                                 dtype=np.dtype(dtype))  # fmt: skip
        for n, theirs in zip(names, expected, strict=True):
            bound = bounds[n] + eps * size_of(theirs)
            if n == "key":
                bound = bound + 1e-18
            assert_within(gradients[n], theirs, bound, f"gradient of {n}, {list(arguments)}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", [-1e4, -1e9, -1e30])
def test_sinks_far_from_the_scores(rng, level, dtype):
    """A sink far above all scores has all the weight, one far below has none."""
    call = example(rng, batch=(2,), dtype=dtype)
    grad_out, grad_lse = random_gradients("dot_product_attention", call)
    above = {**call, "bias": np.full((20, 1), level, dtype), "sinks": dtype(0.5)}
    gradients = all_gradients(above, grad_out=grad_out, grad_lse=grad_lse)
    np.testing.assert_allclose(gradients.pop("sinks"), grad_lse.sum(dtype=np.float64), rtol=1e-5)
    assert all((x == 0).all() for x in gradients.values())
    below = all_gradients({**call, "sinks": dtype(level)}, grad_out=grad_out, grad_lse=grad_lse)
    assert below.pop("sinks") == 0
    assert_same_bits(below, all_gradients(call, grad_out=grad_out, grad_lse=grad_lse), "no sink")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", [-1e4, -1e9, 3e7, 1e9])
def test_sinks_and_scores_at_one_level(rng, level, dtype):
    """A sink has its share of the weight where a log-sum-exp cannot hold the number of keys, too."""
    call = example(rng, batch=(2,), dtype=dtype)
    call["query"] = 0 * call["query"]
    grad_out, grad_lse = random_gradients("dot_product_attention", call)
    bias = np.zeros((20, 70), dtype)
    at_zero, there = ({**call, "bias": bias + dtype(x), "sinks": np.full(2, x, dtype)} for x in (0, level))
    expected = all_gradients(at_zero, grad_out=grad_out, grad_lse=grad_lse)
    for n, x in all_gradients(there, grad_out=grad_out, grad_lse=grad_lse).items():
        np.testing.assert_allclose(x, expected[n], rtol=1e-5, atol=1e-5, err_msg=n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", [-87.5, -110.0, -200.0, 90.0, 200.0, -1000.0, 1000.0, -3000.0])
def test_sums_far_from_one(rng, level, dtype):
    """exp(level) is no ordinary number. Hidden keys and padding must not be exponentiated relative to it."""
    call = example(rng, batch=(2,), num_queries=37, num_keys=53, dtype=dtype)
    call["bias"] = np.full((37, 1), level, dtype)
    for arguments in ({}, {"is_causal": True}, {"mask": rng.random((37, 53)) < 0.4}, {"key_lengths": 41},
                      {"softcap": 3.0}, {"sinks": dtype(level)}):  # fmt: skip
        assert_gradients("dot_product_attention", {**call, **arguments})


@pytest.mark.parametrize("level", [0.0, -1e5, 1e5, -1e9, 3e7, -1e30])
def test_weights_sum_to_one(rng, level):
    """The gradients of the values sum to those of the output, whatever the level of a row's scores."""
    call = example(rng, batch=(), num_queries=70, num_keys=300)
    call["bias"] = np.full((70, 1), level, np.float32)
    call["bias"][::2] = 0
    grad_out = np.ones((70, 12), np.float32)
    for arguments in ({}, {"is_causal": True, "query_offset": 1}):
        d_value = fastattn.dot_product_attention_vjp(grad_out, **call, **arguments, wrt="value")
        np.testing.assert_allclose(d_value.astype(np.float64).sum(axis=0), 70, rtol=16 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_at_different_levels(rng, dtype):
    call = example(rng, batch=(2,), num_queries=64, dtype=dtype)
    bias = np.zeros((64, 70), dtype=dtype)
    bias += np.linspace(-1, 1, 64)[:, None] ** 3 * dtype(1e6)
    assert_gradients("dot_product_attention", {**call, "bias": bias})
    bias[1::3, ::2] = -np.inf
    assert_gradients("dot_product_attention", {**call, "bias": bias})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_scale", [1e-30, 1, 1e10])
@pytest.mark.parametrize(("query_scale", "key_scale"), [(1e-30, 1), (1, 1e-30), (1e20, 1e-20), (1e-10, 1e12), (8, 8)])
def test_scales(rng, query_scale, key_scale, value_scale, dtype):
    call = example(rng, batch=(2,), dtype=dtype)
    for n, scale in (("query", query_scale), ("key", key_scale), ("value", value_scale)):
        call[n] = call[n] * dtype(scale)
    assert_gradients("dot_product_attention", call)
    assert_gradients("dot_product_attention", {**call, "is_causal": True})


@pytest.mark.parametrize("activation", ["softmax", "relu", "sigmoid", "entmax15"])
@pytest.mark.parametrize("softcap", [1e-3, 0.1, 1.0, 1e6])
def test_softcaps(rng, softcap, activation):
    """Scores far beyond the cap, and far below."""
    assert_gradients("dot_product_attention", {**example(rng), "softcap": softcap, "activation": activation})


@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_flat_hidden_units(rng, scale):
    """tanh where it is flat, and where it is straight."""
    call = example(rng, "additive_attention")
    for n in ("w_query", "w_key", "b_hidden"):
        call[n] = call[n] * np.float32(scale)
    assert_gradients("additive_attention", call)


# ------------------------------------------------------------------------------------ long sums


@pytest.mark.parametrize("shape", [(100_000, 3), (3, 100_000), (30_000, 17)])
def test_sums_do_not_drift(shape):
    """Every rounding goes the same way here: a chain that is not split into blocks would lose dozens of eps."""
    num_queries, num_keys = shape
    query, key = np.full((num_queries, 4), 0.1, np.float32), np.zeros((num_keys, 4), np.float32)
    value = np.zeros((num_keys, 2), np.float32)
    value[: num_keys // 2 + 1] = 0.1
    grad_out = np.full((num_queries, 2), 0.1, np.float32)
    call = {"query": query, "key": key, "value": value, "sinks": np.float32(0), "alibi_slopes": np.float32(0)}
    names = ("key", "value", "sinks", "query")
    wide = {n: x.astype(np.float64) for n, x in call.items()}
    # All rows and all keys of a kind are equal: a weight is 1 / (num_keys + 1).
    weight, first = 1 / (num_keys + 1), num_keys // 2 + 1
    d_weight = 2 * float(value[0, 0]) * float(grad_out[0, 0])
    mean = first * weight * d_weight
    d_score = weight * (np.where(np.arange(num_keys) < first, d_weight, 0.0) - mean)
    expected = {
        "key": np.broadcast_to(num_queries * d_score[:, None] * 0.5 * wide["query"][0], key.shape),
        "value": np.full(value.shape, num_queries * weight * float(grad_out[0, 0])),
        "sinks": np.float64(-num_queries * weight * mean),
    }
    unit = 17 * np.finfo(np.float32).eps
    counts = {
        "key": num_queries * weight * (d_weight + mean) * 0.05,
        "value": expected["value"],
        "sinks": -expected["sinks"],
    }
    actual = dict(zip(names, fastattn.dot_product_attention_vjp(grad_out, **call, wrt=names), strict=True))
    for n, theirs in expected.items():
        assert_within(actual[n], theirs, unit * counts[n], f"gradient of {n}")
    assert (actual["query"] == 0).all()


def test_a_broadcast_bias_of_many_rows():
    """Sums over the rows and keys of a bias with neither."""
    rng = np.random.default_rng(0)
    call = example(rng, batch=(2,), num_queries=3000, num_keys=60, head_dim=4, value_dim=4)
    for shape in ((2, 1, 1), (1, 60), (3000, 1)):
        assert_gradients("dot_product_attention", {**call, "bias": np.zeros(shape, np.float32)}, wrt=("bias",))


@pytest.mark.parametrize("batch", [(3000,), (50, 60)])
def test_sums_over_many_heads(batch):
    """What heads share is a sum that does not drift with their number either. Every rounding goes the same way here."""
    heads = np.ones((*batch, 1, 1), np.float32)
    call = {"query": np.ones((2, 1), np.float32), "key": heads * np.full((4, 1), 0.1, np.float32),
            "value": heads * np.arange(4, dtype=np.float32)[:, None]}  # fmt: skip
    call |= {"window_size": 3, "bias": np.zeros((2, 4), np.float32), "relative_bias": np.zeros((2, 7), np.float32)}
    grad_out, grad_lse = np.ones((*batch, 2, 1), np.float32), np.full((*batch, 2), 0.3, np.float32)
    names = ("query", "bias", "relative_bias")
    actual = fastattn.dot_product_attention_vjp(grad_out, **call, grad_lse=grad_lse, wrt=names)
    expected = reference.dot_product_attention_vjp(grad_out, **call, grad_lse=grad_lse, wrt=names)
    bounds = gradient_bounds("dot_product_attention", grad_out, **call, grad_lse=grad_lse, dtype=np.dtype(np.float32))
    for n, x, y in zip(names, actual, expected, strict=True):
        assert_within(x, y, bounds[n] + np.finfo(np.float32).eps * size_of(y), f"gradient of {n}")


# ------------------------------------------------------------------------------------ sizes of zero


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("sizes", [(0, 7, 4, 3), (5, 0, 4, 3), (5, 7, 0, 3), (5, 7, 4, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("batch", [(), (2, 3), (0, 3), (2, 0)])
def test_zero_sizes(rng, batch, sizes, name, activation):
    call = {**example(rng, name, batch, *sizes), "activation": activation}
    call |= {"bias": np.zeros((1, 1), np.float32), "alibi_slopes": np.float32(0.1)}
    gradients = assert_gradients(name, call)
    if not all((*batch, *sizes[:2])):
        assert all((x == 0).all() for x in gradients.values())


# ------------------------------------------------------------------------------------ errors

SENTINEL = 12345.0


def refuse(error, message, name="dot_product_attention", *, grad_out=None, **changes):
    """The error, and nothing written to `out`."""
    rng = np.random.default_rng(0)
    call = example(rng, name, (2, 3), 5, 7, 8, 6)
    grad_out = np.ones((2, 3, 5, 6), np.float32) if grad_out is None else grad_out
    arguments = {**call, **changes}
    with pytest.raises(error, match=message):
        vjp_of(name)(grad_out, **arguments)
    if "out" not in changes and "wrt" not in changes:
        outs = tuple(np.full(call[n].shape, SENTINEL, np.float32) for n in ("query", "key", "value"))
        with pytest.raises(error, match=message):
            vjp_of(name)(grad_out, **arguments, out=outs)
        assert all((x == SENTINEL).all() for x in outs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_names_that_cannot_be_named(name):
    """The message lists those that can."""
    refuse(ValueError, "(?s)wrt.*'scale'.*'query', 'key', 'value'", name, wrt=("query", "scale"))
    refuse(ValueError, "(?s)wrt.*'bias'.*not given.*'query', 'key', 'value'", name, wrt="bias")
    refuse(ValueError, "(?s)wrt.*'key'.*twice", name, wrt=("key", "value", "key"))
    refuse(ValueError, "(?s)'nonsense'.*'value'.*'sinks'", name, wrt="nonsense", sinks=np.float32(1))
    for bad in (None, 1, object(), ("key", 1), (None,), {"key": 1}, b"key", np.array(["key"])):
        refuse(TypeError, "wrt", name, wrt=bad)
    own = NAMES[name][7:]
    assert set(own) <= set(named(name, example(np.random.default_rng(), name)))
    for n in {"w_score", "w_query", "w_key", "b_hidden", "b_query", "b_key"} - set(own):
        refuse(ValueError, f"wrt.*{n}", name, wrt=n)


@pytest.mark.parametrize("n", ["mask", "key_lengths", "query_offset", "cu_seqlens_q", "bias"])
def test_names_of_constants(n):
    query = np.ones((3, 4, 5), np.float32)
    with pytest.raises(ValueError, match=f"(?s)wrt.*'{n}'.*'query', 'key', 'value'"):
        fastattn.varlen_attention_vjp(query, query, query, query, [0, 4], wrt=n)


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (2, 3, 4, 6), (3, 5, 6), (1, 2, 3, 5, 6), (2, 3, 5, 1), (), (1, 1, 1, 1)]
)
def test_shapes_of_grad_out(shape):
    refuse(ValueError, r"(?s)grad_out.*\(2, 3, 5, 6\)", grad_out=np.ones(shape, np.float32))


@pytest.mark.parametrize("bad", ["text", None, object(), 1.0, [[1.0], [1.0, 2.0]], np.ones((2, 3, 5, 6), complex),
                                 np.ones((2, 3, 5, 6), object), np.ma.ones((2, 3, 5, 6)), np.ones((2, 3, 5, 6), ">f4"),
                                 np.ones((2, 3, 5, 6), "M8[s]")], ids=lambda x: type(x).__name__)  # fmt: skip
def test_grad_out_that_is_no_gradient(bad):
    rng = np.random.default_rng(0)
    with pytest.raises((TypeError, ValueError), match="grad_out"):
        fastattn.dot_product_attention_vjp(bad, **example(rng, num_queries=5, num_keys=7, value_dim=6))
    if not isinstance(bad, (float, list)):
        lse = bad[..., 0] if isinstance(bad, np.ndarray) else bad
        if lse is not None:
            refuse((TypeError, ValueError), "grad_lse", grad_lse=lse)


def test_output_and_lse_belong_together():
    out, lse = np.ones((2, 3, 5, 6), np.float32), np.ones((2, 3, 5), np.float32)
    refuse(ValueError, "(?s)output.*lse|lse.*output", output=out)
    refuse(ValueError, "(?s)output.*lse|lse.*output", lse=lse)
    refuse(ValueError, r"(?s)output.*\(2, 3, 5, 6\)", output=out[..., :5], lse=lse)
    refuse(ValueError, r"(?s)output.*\(2, 3, 5, 6\)", output=out[0], lse=lse)
    refuse(ValueError, r"(?s)lse.*\(2, 3, 5\)", output=out, lse=lse[..., :4])
    refuse(ValueError, r"(?s)lse.*\(2, 3, 5\)", output=out, lse=lse[..., None])
    refuse(ValueError, r"(?s)grad_lse.*\(2, 3, 5\)", grad_lse=lse[..., None])
    refuse((TypeError, ValueError), "output", output=out.astype(complex), lse=lse)
    refuse((TypeError, ValueError), "lse", output=out, lse=lse.astype(object))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_only_softmax_has_lse(activation, name):
    out, lse = np.ones((2, 3, 5, 6), np.float32), np.ones((2, 3, 5), np.float32)
    for message, more in (
        ("output|lse", {"output": out, "lse": lse}),
        ("grad_lse", {"grad_lse": lse}),
        ("sinks", {"sinks": np.float32(1)}),
    ):
        refuse(ValueError, message, name, activation=activation, **more)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_there_are_no_weights_and_no_lse(name):
    for n in ("return_weights", "return_lse"):
        refuse(TypeError, n, name, **{n: False})


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((2, 3, 5, 7), np.float32),
        np.zeros((3, 5, 8), np.float32),
        np.zeros((2, 3, 5, 8), np.float64),
        np.zeros((2, 3, 5, 8), np.float16),
        np.zeros((2, 3, 5, 8), np.int32),
        np.zeros((2, 3, 5, 8), ">f4"),
        np.ma.zeros((2, 3, 5, 8), np.float32),
        np.broadcast_to(np.zeros((5, 8), np.float32), (2, 3, 5, 8)),
        np.zeros((2, 3, 5, 8), np.float32).tolist(),
        "out",
    ],
    ids=lambda x: f"{type(x).__name__} {getattr(x, 'dtype', '')} {getattr(x, 'shape', '')}",
)
def test_out_of_the_wrong_kind(out):
    refuse((TypeError, ValueError), "out", wrt="query", out=out)
    refuse((TypeError, ValueError), "out", wrt=("key", "query"), out=(None, out))


def test_out_of_the_wrong_length():
    array = np.zeros((2, 3, 5, 8), np.float32)
    for out in (array, (), (array,), (array, None), (None,) * 4, {"query": array}, iter([array])):
        refuse((TypeError, ValueError), "out", out=out)
    refuse((TypeError, ValueError), "out", wrt="query", out=(array,))


def test_out_overlaps():
    """An input, another gradient, or itself."""
    buffer = np.full(16 * 64, SENTINEL, np.float32)
    place = lambda i: buffer[64 * i : 64 * i + 64].reshape(8, 8)  # noqa: E731
    names = ("grad_out", "query", "key", "value", "bias", "output")
    inputs = {n: place(i) for i, n in enumerate(names)}
    inputs["lse"], inputs["grad_lse"] = (np.ones(8, np.float32) for _ in range(2))
    free = np.zeros((8, 8), np.float32)
    for i, n in enumerate(names):
        for out in (place(i), place(i).T, place(i)[::-1]):
            with pytest.raises(ValueError, match=rf"(?s)out.*\b{n}\b"):
                fastattn.dot_product_attention_vjp(**inputs, wrt=("query", "key"), out=(free, out))
            with pytest.raises(ValueError, match=rf"(?s)out.*\b{n}\b"):  # as a tensor has its memory
                fastattn.dot_product_attention_vjp(
                    **{**inputs, n: memoryview(inputs[n])}, wrt=("query", "key"), out=(free, out)
                )
    outs = place(8), buffer[64 * 8 + 32 : 64 * 8 + 96].reshape(8, 8)
    with pytest.raises(ValueError, match=r"(?s)out\[1\].*out\[0\]"):
        fastattn.dot_product_attention_vjp(**inputs, wrt=("query", "key"), out=outs)
    with pytest.raises(ValueError, match="out"):
        fastattn.dot_product_attention_vjp(
            **inputs, wrt="key", out=np.lib.stride_tricks.as_strided(free, (8, 8), (4, 4))
        )
    assert (buffer == SENTINEL).all()
    assert (free == 0).all()


def test_out_read_only(rng):
    out = np.zeros((2, 3, 5, 8), np.float32)
    out.flags.writeable = False
    refuse((TypeError, ValueError), "out", wrt="query", out=out)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("n", ["num_threads", "window_size", "key_lengths", "softcap", "scale", "mask", "enable_gqa"])
def test_the_rules_have_the_messages_of_the_forward_function(rng, n, name):
    bad = {"num_threads": 0, "window_size": -7, "key_lengths": 99, "softcap": -1.0, "scale": np.inf,
           "mask": np.ones((5, 7)), "enable_gqa": 1}[n]  # fmt: skip
    if name == "truncated_attention" and n == "window_size":
        pytest.skip("the function has a window of its own")
    call = example(rng, name, (2, 3), 5, 7, 8, 6)
    messages = []
    for function, arguments in ((getattr(fastattn, name), ()), (vjp_of(name), (np.ones((2, 3, 5, 6)),))):
        with pytest.raises((TypeError, ValueError)) as caught:
            function(*arguments, **call, **{n: bad})
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]
