"""The gradients in fastattn.reference: against finite differences of its forward functions, and PyTorch's autograd."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from problems import RULES, qkv, rules
from test_combinations import calls

from fastattn import reference

EVERYWHERE = ("query", "key", "value", "bias", "relative_bias", "alibi_slopes", "sinks")
OWN = {
    "dot_product_attention": (),
    "truncated_attention": (),
    "additive_attention": ("w_score", "w_query", "w_key", "b_hidden"),
    "bilinear_attention": ("w_query", "w_key", "b_query", "b_key"),
}


def in_float64(call):
    """The arguments of a call with all arrays of floats in float64."""
    double = lambda x: x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x  # noqa: E731
    return {name: double(x) for name, x in call.items()}


def loss(name, grad_out, grad_lse, call):
    """What `grad_out` and `grad_lse` are the gradients of."""
    if grad_lse is None:
        return np.sum(grad_out * getattr(reference, name)(**call))
    out, lse = getattr(reference, name)(**call, return_lse=True)
    return np.sum(grad_out * out) + np.sum(np.where(np.isfinite(lse), grad_lse * lse, 0.0))


def assert_differences(name, call, with_lse=True):
    """Every gradient that there is, in a random direction, against a central difference."""
    rng = np.random.default_rng(1)
    call = in_float64(call)
    out = getattr(reference, name)(**call)
    grad_out = rng.standard_normal(out.shape)
    grad_lse = None
    if with_lse and call.get("activation", "softmax") == "softmax":
        grad_lse = rng.standard_normal(out.shape[:-1])
    names = tuple(n for n in (*EVERYWHERE, *OWN.get(name, ())) if call.get(n) is not None)
    gradients = getattr(reference, f"{name}_vjp")(grad_out, **call, wrt=names, grad_lse=grad_lse)
    for array, gradient in zip(names, gradients, strict=True):
        x = np.asarray(call[array])
        assert gradient.shape == x.shape, array
        direction = rng.standard_normal(x.shape)
        slope = np.sum(gradient * direction)
        tolerance = 1e-6 * (1 + np.sum(np.abs(gradient * direction)))
        errors = []
        for step in (1e-6, 1e-7, 1e-8):  # a shorter one, should there be a kink in between
            ahead, behind = (loss(name, grad_out, grad_lse, {**call, array: x + s * direction}) for s in (step, -step))
            errors.append(abs((ahead - behind) / (2 * step) - slope))
            if errors[-1] < tolerance:
                break
        assert min(errors) < tolerance, (array, errors, tolerance)
    return dict(zip(names, gradients, strict=True))


def example(rng, name, batch=(2, 3), num_queries=9, num_keys=14, kv_batch=None):
    """Arguments of a function by name, without rules; all arrays that its score can have."""
    query, key, value = qkv(rng, batch, num_queries, num_keys, 4, 3, np.float64, kv_batch)
    normal = rng.standard_normal
    more = {
        "additive_attention": {"w_score": normal(5), "w_query": normal((4, 5)), "w_key": normal((4, 5)),
                               "b_hidden": normal(5)},
        "bilinear_attention": {"w_query": normal((4, 5)), "w_key": normal((4, 5)), "b_query": normal(5),
                               "b_key": normal(5)},
        "truncated_attention": {"left": 4, "right": 2},
    }  # fmt: skip
    return {"query": query, "key": key, "value": value, **more.get(name, {})}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("rule", RULES)
def test_rules(rng, rule, name):
    rule = rules(rng, num_queries=9, num_keys=14, dtype=np.float64)[rule]
    if name == "truncated_attention" and {"window_size", "chunk_size"} & set(rule):
        pytest.skip("the function has a window of its own")
    assert_differences(name, {**example(rng, name), **rule})


@given(calls(sizes=(0, 1, 2, 5, 13, 22), largest_dim=6))
@settings(max_examples=150)
def test_combinations(call):
    query, key, value, arguments = call
    assert_differences("dot_product_attention", {"query": query, "key": key, "value": value, **arguments})


@pytest.mark.parametrize("without", [("w_query",), ("w_key",), ("w_query", "w_key"), ("b_hidden",),
                                     ("w_query", "w_key", "b_hidden")])  # fmt: skip
def test_additive_without(rng, without):
    call = example(rng, "additive_attention", kv_batch=(3,))
    if "w_query" in without:
        call["query"] = rng.standard_normal((2, 3, 9, 5))
    if "w_key" in without:
        call["key"] = rng.standard_normal((3, 14, 5))
    assert_differences("additive_attention", {**call, **dict.fromkeys(without), "scale": 0.7})


@pytest.mark.parametrize("without", [("w_key",), ("b_query",), ("b_key",), ("w_key", "b_key"), ("b_query", "b_key"),
                                     ("w_key", "b_query"), ("w_key", "b_query", "b_key")])  # fmt: skip
def test_bilinear_without(rng, without):
    """Without w_key, and without b_key, those of the query serve both: both uses are in their gradient."""
    call = example(rng, "bilinear_attention", kv_batch=(1, 3))
    assert_differences("bilinear_attention", {**call, **dict.fromkeys(without), "is_causal": True})


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("batches", [((4,), (2,)), ((3, 4), (2,)), ((3, 4), (3, 1)), ((1, 4), (1, 4))])
def test_shared_heads(rng, batches, name):
    call = example(rng, name, batch=batches[0], kv_batch=batches[1])
    assert_differences(name, {**call, "enable_gqa": True})


@pytest.mark.parametrize("name", OWN)
def test_broadcast_axes(rng, name):
    """Each of the arrays lacks some axis, or has it with the size 1."""
    call = example(rng, name)
    call["query"], call["key"] = call["query"][:, :1], call["key"][0]
    call |= {"bias": rng.standard_normal((3, 1, 1)), "alibi_slopes": rng.random((2, 1)), "sinks": rng.random()}
    gradients = assert_differences(name, call)
    assert gradients["bias"].shape == (3, 1, 1)
    assert gradients["sinks"].shape == ()


@pytest.mark.parametrize("cuts", [([0, 9], [0, 14]), ([0, 3, 3, 9], [0, 6, 10, 14]), ([0, 9, 9], [0, 0, 14])])
@pytest.mark.parametrize("rule", [{}, {"is_causal": True}, {"window_size": (3, 1), "softcap": 2.0},
                                  {"activation": "relu"}])  # fmt: skip
def test_varlen(rng, rule, cuts):
    call = example(rng, "varlen_attention", (4,), kv_batch=(2,))
    call |= {"cu_seqlens_q": cuts[0], "cu_seqlens_k": cuts[1], "enable_gqa": True}
    call |= {"alibi_slopes": rng.random(4), **rule}
    if "activation" not in rule:
        call["sinks"] = rng.standard_normal(4)
    assert_differences("varlen_attention", call)


@pytest.mark.parametrize("name", [*OWN, "varlen_attention"])
def test_forms(rng, name):
    """A tuple of gradients in the order of `wrt`, or one; `out` receives them; the gradient of a sum."""
    call = example(rng, name, (3,), 9, 9)
    if name == "varlen_attention":
        call["cu_seqlens_q"] = [0, 5, 9]
    vjp = functools.partial(getattr(reference, f"{name}_vjp"), np.broadcast_to(1.0, (3, 9, 3)), **call)
    d_query, d_key, d_value = vjp()
    np.testing.assert_array_equal(vjp(wrt="key"), d_key)
    for one, expected in zip(vjp(wrt=("value", "query")), (d_value, d_query), strict=True):
        np.testing.assert_array_equal(one, expected)
    out = np.empty_like(d_key)
    assert vjp(wrt="key", out=out) is out
    np.testing.assert_array_equal(out, d_key)
    results = vjp(wrt=("query", "key"), out=(None, out))
    assert results[1] is out
    np.testing.assert_array_equal(results[0], d_query)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "sparsemax", "entmax15"])
def test_only_softmax_has_lse(rng, activation):
    call = example(rng, "dot_product_attention", ())
    out = reference.dot_product_attention(**call, activation=activation)
    for more in ({"grad_lse": out[..., 0]}, {"output": out, "lse": out[..., 0]}):
        with pytest.raises(ValueError, match="activation"):
            reference.dot_product_attention_vjp(out, **call, activation=activation, **more)


# ------------------------------------------------------------------------------------ what takes part


ACTIVATIONS = ("softmax", "relu", "sigmoid", "sparsemax", "entmax15")


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rule", ["causal", "lengths", "mask", "bias", "window"])
def test_what_takes_no_part(rng, rule, activation, name):
    """NaN and infinity in rows that see nothing and keys that are not seen change no number, and theirs are 0."""
    if name == "truncated_attention" and rule == "window":
        pytest.skip("the function has a window of its own")
    call = example(rng, name)
    unseen_rows, unseen_keys = np.arange(9) >= 6, np.arange(14) >= 8
    call |= {
        "causal": {"is_causal": True, "query_offset": -6},  # rows 0 to 5 see nothing, the others keys 0 to 2
        "lengths": {"query_lengths": 6, "key_lengths": 8},
        "mask": {"mask": ~unseen_keys & ~unseen_rows[:, None]},
        "bias": {"bias": np.where(unseen_keys | unseen_rows[:, None], -np.inf, rng.standard_normal((9, 14)))},
        "window": {"window_size": (2, 3), "query_offset": -11},
    }[rule]
    window = {"window_size": (call["left"], call["right"])} if name == "truncated_attention" else {}
    visible = reference.visible_keys(9, 14, **window, **{n: x for n, x in call.items() if n in (
        "is_causal", "query_offset", "query_lengths", "key_lengths", "mask", "bias", "window_size")})  # fmt: skip
    unseen_rows, unseen_keys = ~visible.any(axis=1), ~visible.any(axis=0)
    assert 0 < unseen_keys.sum() < 14 and 0 < unseen_rows.sum() < 9
    grad_out = rng.standard_normal((2, 3, 9, 3))
    names = tuple(n for n in (*EVERYWHERE, *OWN[name]) if call.get(n) is not None)
    vjp = functools.partial(getattr(reference, f"{name}_vjp"), activation=activation, wrt=names)
    lse = {"grad_lse": rng.standard_normal((2, 3, 9))} if activation == "softmax" else {}
    expected = vjp(grad_out, **call, **lse)
    for bad in (np.nan, np.inf):
        spoiled = {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in call.items()}
        grad = grad_out.copy()
        for x in (grad, spoiled["query"], *lse.values()):
            x[:, :, unseen_rows] = bad
        spoiled["key"][..., unseen_keys, :] = bad
        spoiled["value"][..., unseen_keys, :] = bad
        if "bias" not in call:
            spoiled["bias"] = np.where(visible, 0.0, bad)
        results = dict(zip(names, vjp(grad, **spoiled, **lse), strict=True))
        for n, x in zip(names, expected, strict=True):
            np.testing.assert_allclose(results[n], x, rtol=1e-12, atol=1e-14, err_msg=n)
        assert (results["query"][:, :, unseen_rows] == 0).all()
        assert (results["key"][:, :, unseen_keys] == 0).all()
        assert (results["value"][:, :, unseen_keys] == 0).all()
        if "bias" in call:
            assert (results["bias"][~visible] == 0).all()


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_goes_where_it_is_seen_and_no_further(rng, activation, name):
    if name == "truncated_attention":
        pytest.skip("as for dot products")
    call = example(rng, name, (2,), 12, 12)
    vjp = functools.partial(getattr(reference, f"{name}_vjp"), is_causal=True, activation=activation)
    grad_out = rng.standard_normal((2, 12, 3))
    clean = vjp(grad_out, **call)
    rows = np.arange(12)
    for spoiled_array in ("key", "grad_out", "query"):
        arrays = {**call, "grad_out": grad_out}
        arrays[spoiled_array] = arrays[spoiled_array].copy()
        arrays[spoiled_array][:, 5] = np.nan
        d_query, d_key, d_value = vjp(**arrays)
        reached_rows = rows >= 5 if spoiled_array == "key" else rows == 5
        # Rows that see the key are NaN, and with them all that they see, where weights depend on each other; or the one
        # row, and what it sees.
        reached_keys = rows <= 5
        if spoiled_array == "key":
            reached_keys = rows == 5 if activation in ("relu", "sigmoid") else rows >= 0
        np.testing.assert_array_equal(np.isnan(d_query).any(-1), np.broadcast_to(reached_rows, (2, 12)))
        np.testing.assert_array_equal(d_query[:, ~reached_rows], clean[0][:, ~reached_rows])
        if activation not in reference.SPARSE or spoiled_array != "grad_out":
            np.testing.assert_array_equal(np.isnan(d_key).any(-1), np.broadcast_to(reached_keys, (2, 12)))
            np.testing.assert_array_equal(np.isnan(d_value).any(-1), np.broadcast_to(reached_keys, (2, 12)))
        for x, y in ((d_key, clean[1]), (d_value, clean[2])):
            np.testing.assert_allclose(x[:, ~reached_keys], y[:, ~reached_keys], rtol=1e-12)


@pytest.mark.parametrize("level", [-1e9, -1e30, 1e9, -800.0])
def test_rows_at_one_level(level):
    """All weights are 1 / 8, with a sink at the level 1 / 9, although the log-sum-exp cannot hold log(8)."""
    rng = np.random.default_rng(0)
    query, (key, value, grad_out) = np.zeros((8, 4)), rng.standard_normal((3, 8, 4))
    for sinks, weight in ((None, 1 / 8), (level, 1 / 9)):
        wrt = ("key", "value", "bias") if sinks is None else ("key", "value", "bias", "sinks")
        d_key, d_value, d_bias, *d_sink = reference.dot_product_attention_vjp(
            grad_out, query, key, value, bias=np.full((8, 8), level), sinks=sinks, wrt=wrt
        )
        np.testing.assert_array_equal(d_key, 0)
        np.testing.assert_allclose(d_value, np.broadcast_to(weight * grad_out.sum(0), (8, 4)))
        d_weights = grad_out @ value.T
        mean = weight * d_weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(d_bias, weight * (d_weights - mean), atol=1e-15)
        if d_sink:
            np.testing.assert_allclose(d_sink[0], -weight * mean.sum())


def test_empty_rows_and_sinks():
    """A row that sees nothing gives the gradient of its log-sum-exp to the sink, and that alone."""
    x = np.ones((3, 2))
    grad_out = np.where([[True], [False], [True]], 1.0, np.nan)
    call = dict(mask=np.array([[True], [False], [True]]), sinks=0.5, wrt=("sinks", "key"))
    d_sinks, d_key = reference.dot_product_attention_vjp(grad_out * x, x, x, x, **call, grad_lse=np.array([0, 7.0, 0]))
    without, same = reference.dot_product_attention_vjp(grad_out * x, x, x, x, **call)
    np.testing.assert_allclose(d_sinks, without + 7)
    np.testing.assert_array_equal(d_key, same)
    assert np.isfinite(d_key).all()
    assert reference.dot_product_attention_vjp(x, x, x, x, sinks=-np.inf, wrt="sinks", mask=False) == 0


@pytest.mark.parametrize(("num_queries", "num_keys", "dim"), [(0, 3, 2), (3, 0, 2), (3, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zero_sizes(num_queries, num_keys, dim, activation):
    query, key = np.ones((2, num_queries, dim)), np.ones((2, num_keys, dim))
    gradients = reference.dot_product_attention_vjp(query, query, key, key, activation=activation)
    assert [g.shape for g in gradients] == [query.shape, key.shape, key.shape]
    assert all((g == 0).all() for g in gradients[:2])


# ------------------------------------------------------------------------------------ PyTorch's autograd


def torch_attention(torch, call, visible):
    """The formulas in PyTorch; rows that see nothing are not asked for."""
    query, key, value = call["query"], call["key"], call["value"]
    if "w_score" in call:
        q, k = query @ call["w_query"], key @ call["w_key"] + call["b_hidden"]
        scores = torch.tanh(q[..., :, None, :] + k[..., None, :, :]) @ call["w_score"]
    elif "w_query" in call:
        scores = (query @ call["w_query"] + call["b_query"]) @ (key @ call["w_key"] + call["b_key"]).mT
    else:
        scores = query @ key.mT / query.shape[-1] ** 0.5
    if "softcap" in call:
        scores = call["softcap"] * torch.tanh(scores / call["softcap"])
    if "alibi_slopes" in call:
        rows, columns = (torch.arange(n) for n in scores.shape[-2:])
        distance = (rows[:, None] + len(columns) - len(rows) - columns).abs()
        scores = scores - call["alibi_slopes"][..., None, None] * distance
    if "bias" in call:
        scores = scores + call["bias"]
    scores = scores.masked_fill(~visible, -torch.inf)
    activation = call.get("activation", "softmax")
    if activation == "relu":
        return torch.relu(scores) / visible.sum(-1, keepdim=True) @ value, None
    if activation == "sigmoid":
        return torch.sigmoid(scores) @ value, None
    if "sinks" in call:
        sinks = call["sinks"][..., None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return torch.softmax(scores, dim=-1)[..., : value.shape[-2]] @ value, torch.logsumexp(scores, dim=-1)


@pytest.mark.parametrize("name", ["dot_product_attention", "additive_attention", "bilinear_attention"])
@pytest.mark.parametrize("activation", ["softmax", "relu", "sigmoid"])
@pytest.mark.parametrize("rule", ["plain", "causal", "mask and bias", "everything"])
def test_autograd_of_pytorch(rng, rule, activation, name):
    torch = pytest.importorskip("torch")
    call = example(rng, name)
    if rule in ("causal", "everything"):
        call["is_causal"] = True
    if rule in ("mask and bias", "everything"):
        call["mask"] = rng.random((3, 9, 14)) < 0.7
        call["mask"][..., 0] = True
        call["bias"] = rng.standard_normal((3, 9, 1))
    if rule == "everything":
        call |= {"alibi_slopes": rng.random(3), "softcap": 2.0}
        if activation == "softmax":
            call["sinks"] = rng.standard_normal(3)
    names = tuple(n for n in (*EVERYWHERE, *OWN[name]) if n in call)
    visible = np.broadcast_to(
        reference.visible_keys(9, 14, is_causal=call.get("is_causal", False), mask=call.get("mask")), (2, 3, 9, 14)
    )
    tensors = {n: torch.tensor(x, requires_grad=n in names) if n in names else x for n, x in call.items()}
    out, lse = torch_attention(torch, {**tensors, "activation": activation}, torch.tensor(visible))
    grad_out, grad_lse = rng.standard_normal((2, 3, 9, 3)), rng.standard_normal((2, 3, 9))
    value = (out * torch.tensor(grad_out)).sum()
    if lse is not None:
        value = value + (lse * torch.tensor(grad_lse)).sum()
    expected = torch.autograd.grad(value, [tensors[n] for n in names])
    actual = getattr(reference, f"{name}_vjp")(
        grad_out, **call, activation=activation, wrt=names, grad_lse=None if lse is None else grad_lse
    )
    for n, x, y in zip(names, actual, expected, strict=True):
        np.testing.assert_allclose(x, y.numpy(), rtol=1e-9, atol=1e-10, err_msg=n)
