"""fastattn.integrations.torch: attention in PyTorch's graphs, and in place of PyTorch's own.

Against torch.nn.functional.scaled_dot_product_attention in float64, and bit by bit against fastattn itself, as a plain
call and through the operator. The other functions of the module are in test_integrations.py. Skipped without PyTorch.
"""

import numpy as np
import pytest
from problems import bits

import fastattn

torch = pytest.importorskip("torch", reason="fastattn.integrations.torch needs PyTorch")

from fastattn.integrations import _table  # noqa: E402
from fastattn.integrations import torch as bridge  # noqa: E402
from fastattn.integrations.torch import attention, scaled_dot_product_attention  # noqa: E402

own = torch.nn.functional.scaled_dot_product_attention
FLOATS = torch.float32, torch.float64, torch.float16, torch.bfloat16


def randn(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(batch=(2, 6), heads=None, dtype=torch.float64):
    """query, key and value: L = 5, S = 7, D = 8, E = 4; heads: of key and value, if not the query's."""
    shared = batch if heads is None else (*batch[:-1], heads)
    return (
        randn(*batch, 5, 8, dtype=dtype),
        randn(*shared, 7, 8, dtype=dtype, seed=2),
        randn(*shared, 7, 4, dtype=dtype, seed=3),
    )


def numpy(x):
    """The numbers of a tensor, those of bfloat16 as float32."""
    x = x.detach()
    return (x.float() if x.dtype is torch.bfloat16 else x).numpy()


def near(ours, expected):
    assert ours.dtype is expected.dtype and ours.shape == expected.shape
    np.testing.assert_allclose(numpy(ours), numpy(expected), rtol=1e-12, atol=1e-13)


def same(ours, expected):
    """Bit by bit; expected: an array or a tensor."""
    expected = numpy(expected) if torch.is_tensor(expected) else expected
    ours = numpy(ours)
    assert ours.shape == expected.shape
    assert bits(ours) == bits(expected.astype(ours.dtype))


@pytest.fixture
def calls(monkeypatch):
    """The keywords of each call of fastattn.dot_product_attention, positional ones by their names."""
    seen, function = [], bridge._ROW.function

    def spy(*args, **kwargs):
        seen.append({**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs})
        return function(*args, **kwargs)

    monkeypatch.setattr(bridge._ROW, "function", spy)
    monkeypatch.setattr(bridge._ROWS["bhsd"], "function", spy)
    return seen


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -- PyTorch's conventions ------------------------------------------------------------------------------------

HIDDEN = torch.rand(5, 7, generator=torch.Generator().manual_seed(4)) < 0.6
HIDDEN[2] = False  # a row that sees nothing
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bools": {"attn_mask": HIDDEN},
    "bools of each head": {"attn_mask": torch.stack([HIDDEN.roll(i, 0) for i in range(6)])},
    "floats": {"attn_mask": randn(2, 1, 5, 7, seed=5)},
    "floats of each key": {"attn_mask": randn(7, seed=5)[None]},
    "minus infinity": {"attn_mask": torch.zeros(5, 7).double().masked_fill(~HIDDEN, -torch.inf)},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("heads", [6, 3, 1])
def test_like_pytorchs(name, heads):
    qkv = problem(heads=heads)
    grouped = {} if heads == 6 else {"enable_gqa": True}
    ours, expected = (f(*qkv, **MASKS[name], **grouped) for f in (scaled_dot_product_attention, own))
    near(ours, expected)


@pytest.mark.parametrize("name", [name for name in MASKS if name != "bools of each head"])
def test_memory_like_pytorchs(name):
    """Where values are as wide as keys and masks have two or four axes; models may rely on it."""
    query, key, _ = problem()
    for x in query, query.transpose(1, 2).contiguous().transpose(1, 2):
        ours, expected = (f(x, key, key, **MASKS[name]) for f in (scaled_dot_product_attention, own))
        assert ours.stride() == expected.stride()


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3), (0, 3)])
@pytest.mark.parametrize("name", ["none", "causal", "bools"])
def test_any_number_of_axes(batch, name):
    qkv = problem(batch)
    near(scaled_dot_product_attention(*qkv, **MASKS[name]), own(*qkv, **MASKS[name]))


def test_batch_axes_broadcast():
    query, key, value = randn(2, 1, 5, 8), randn(1, 3, 7, 8), randn(3, 7, 4)
    near(scaled_dot_product_attention(query, key, value), own(query, key.expand(2, 3, 7, 8), value.expand(2, 3, 7, 4)))


@pytest.mark.parametrize("length", [1, 2])
def test_causal_lines_up_the_first_ones(length):
    qkv = randn(1, 2, length, 8), randn(1, 2, 7, 8), randn(1, 2, 7, 8)
    near(scaled_dot_product_attention(*qkv, is_causal=True), own(*qkv, is_causal=True))


def test_a_mask_and_causal_both_count():
    qkv = problem()
    both = HIDDEN & torch.ones(5, 7, dtype=torch.bool).tril()
    out = scaled_dot_product_attention(*qkv, attn_mask=HIDDEN, is_causal=True)
    near(out, own(*qkv, attn_mask=both))
    assert not out[:, :, 2].any(), "a row that sees nothing is 0"


def test_sizes_of_zero():
    for rows, keys in (0, 7), (5, 0), (0, 0):
        qkv = randn(2, 3, rows, 8), randn(2, 3, keys, 8), randn(2, 3, keys, 4)
        out = scaled_dot_product_attention(*qkv)
        assert out.shape == (2, 3, rows, 4) and not out.any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype):
    pytest.importorskip("ml_dtypes")
    qkv = problem(dtype=dtype)
    mask = randn(5, 7, dtype=dtype)
    out = scaled_dot_product_attention(*qkv, attn_mask=mask)
    assert out.dtype is dtype
    near32 = own(*(x.float() for x in qkv), attn_mask=mask.float())
    np.testing.assert_allclose(numpy(out), near32, atol=4 * torch.finfo(dtype).eps + 1e-6)
    same(scaled_dot_product_attention(*qkv), attention(*qkv))


def test_autocast():
    """Mixed dtypes are usual there: a projection gives bfloat16, rotary positions float32."""
    pytest.importorskip("ml_dtypes")
    query, key, value = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for qkv in (query, key, value), (query, key.bfloat16(), value), problem():
            ours, expected = scaled_dot_product_attention(*qkv), own(*qkv)
            assert ours.dtype is expected.dtype
            np.testing.assert_allclose(numpy(ours), numpy(expected), atol=0.04)


def test_in_place_of_pytorchs(monkeypatch):
    """In a model that knows nothing of it."""
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    x, padded = randn(2, 7, 16), torch.arange(7) >= torch.tensor([[7], [4]])
    results = []
    for function in own, scaled_dot_product_attention:
        used = []
        monkeypatch.setattr(
            torch.nn.functional, "scaled_dot_product_attention", lambda *a, f=function, u=used: u.append(1) or f(*a)
        )
        layer.zero_grad()
        out = layer(x, src_key_padding_mask=padded)
        out[~padded].square().sum().backward()
        results.append([out[~padded], *(p.grad for p in layer.parameters())])
        assert used
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(numpy(ours), numpy(expected), rtol=1e-9, atol=1e-11)


def test_refused():
    query, key, value = problem()
    call = scaled_dot_product_attention
    with pytest.raises(ValueError, match=r"^dropout_p must be 0.*0\.1"):
        call(query, key, value, dropout_p=0.1)
    with pytest.raises(TypeError, match=r"must be of one dtype.*query torch.float64, key torch.float32"):
        call(query, key.float(), value)
    with pytest.raises(TypeError, match=r"must be of one dtype.*int64"):
        call(query.long(), key.long(), value.long())
    with pytest.raises(TypeError, match=r"^attn_mask must be a torch.Tensor, not list"):
        call(query, key, value, attn_mask=HIDDEN.tolist())
    with pytest.raises(TypeError, match=r"^key must be a torch.Tensor, not ndarray"):
        attention(query, key.numpy(), value)
    with pytest.raises(ValueError, match=r"^attn_mask has shape \(5, 6\)"):
        call(query, key, value, attn_mask=HIDDEN[:, :6])
    with pytest.raises(TypeError, match=r"^attn_mask must be"):
        call(query, key, value, attn_mask=HIDDEN.long())
    with pytest.raises(ValueError, match="enable_gqa"):
        call(query, key[:, :3], value[:, :3])
    for wrong, message in (
        (key.to("meta"), "is on the device meta"),
        (key.to_sparse(), "has the layout torch.sparse_coo"),
    ):
        for requires_grad in False, True:
            with pytest.raises(ValueError, match=rf"^key {message}"):
                call(query.detach().requires_grad_(requires_grad), wrong, value)
    with pytest.raises(ValueError, match=r"^attn_mask is on the device meta"):
        call(query, key, value, attn_mask=HIDDEN.to("meta"))
    with pytest.raises(ValueError, match=r"^out_layout must be 'bhsd' or 'bshd', not 'bsd'"):
        attention(query, key, value, out_layout="bsd")
    for name in "out", "nothing":
        with pytest.raises(TypeError, match=rf"^attention\(\) got an unexpected keyword argument '{name}'"):
            attention(query, key, value, **{name: None})


# -- fastattn's own, straight and through the operator --------------------------------------------------------

BAND = randn(6, 1, 4, seed=7)
CALLS = {
    "plain": {},
    "causal": {"is_causal": True, "softcap": 1.5, "sinks": randn(6, seed=8)},
    "window": {"window_size": (2, None), "query_offset": 1, "alibi_slopes": randn(6, seed=9)},
    "band": {"window_size": (2, 1), "relative_bias": BAND, "return_weights": "band"},
    "one number": {"window_size": 3, "key_lengths": 5, "query_lengths": 4},
    "lengths": {"key_lengths": torch.tensor([[5], [2]]), "query_offset": np.array([[0], [1]])},
    "chunks": {"chunk_size": 2, "left_chunks": 1, "return_lse": True},
    "blocks": {"block_mask": torch.tensor([[True, False], [True, True]]), "block_size": (3, 4)},
    "mask and bias": {"mask": HIDDEN, "bias": randn(2, 1, 5, 7, seed=5), "scale": 0.7},
    "results": {"return_weights": True, "return_lse": True},
    "relu": {"activation": "relu"},
    "sparse": {"activation": "entmax15"},
    "threads": {"num_threads": 1},
}


def as_arrays(rules):
    return {name: x.numpy() if torch.is_tensor(x) else x for name, x in rules.items()}


@pytest.mark.parametrize("layout", [None, "bhsd", "bshd"])
@pytest.mark.parametrize("name", CALLS)
def test_bits_of_fastattn(name, layout, fresh_compiler):
    """As a plain call, through the operator, and in a compiled graph."""
    rules, qkv = CALLS[name], problem()
    expected = fastattn.dot_product_attention(*(x.numpy() for x in qkv), **as_arrays(rules))
    expected = expected if isinstance(expected, tuple) else (expected,)
    compiled = torch.compile(lambda *qkv: attention(*qkv, out_layout=layout, **rules), backend="eager", fullgraph=True)
    for call in (
        lambda: attention(*qkv, out_layout=layout, **rules),
        lambda: bridge._through_operator(*qkv, layout or "bhsd", dict(rules)),
        lambda: compiled(*qkv),
    ):
        results = call()
        results = results if isinstance(results, tuple) else (results,)
        assert len(results) == len(expected)
        for ours, array in zip(results, expected, strict=True):
            same(ours, array)
        assert (results[0].transpose(1, 2) if layout == "bshd" else results[0]).is_contiguous()


@pytest.mark.parametrize("batch, length", [((2, 300), 5), ((6,), 40), ((2, 1, 6), 1), ((2, 1), 5)])
def test_layouts_of_all_sizes(batch, length):
    query, key, value = randn(*batch, length, 8), randn(*batch, 7, 8), randn(*batch, 7, 12)
    out = attention(query, key, value, out_layout="bshd", return_lse=True)
    for ours, array in zip(
        out, fastattn.dot_product_attention(*map(numpy, (query, key, value)), return_lse=True), strict=True
    ):
        same(ours, array)
    assert out[0].transpose(-2, -3).is_contiguous()


def test_heads_behind_of_mixed_dtypes():
    query, key, value = problem((2, 300))
    for mixed in (query, key.half(), value.float()), (query.half(), key.half(), value.float()), (query.long(),) * 3:
        expected = fastattn.dot_product_attention(*map(numpy, mixed))
        for layout in bridge._LAYOUTS:
            for call in attention, lambda *qkv, out_layout: bridge._through_operator(*qkv, out_layout, {}):
                out = call(*mixed, out_layout=layout)
                assert numpy(out).dtype == expected.dtype
                same(out, expected)


def test_dtypes_that_do_not_go_together():
    pytest.importorskip("ml_dtypes")
    query, key, value = problem((2, 300))
    for layout in bridge._LAYOUTS:
        with pytest.raises(TypeError, match=r"float16 and .*bfloat16|bfloat16 and .*float16"):
            attention(query.half(), key.bfloat16(), value.half(), out_layout=layout)
        same(attention(query, key.float(), value, out_layout=layout, key_scale=None),
             fastattn.dot_product_attention(numpy(query), numpy(key.float()), numpy(value)))  # fmt: skip


def test_eight_bits():
    query, key, value = (numpy(x) for x in problem((2, 300), dtype=torch.float32))
    kv = fastattn.quantize_kv(key, value)
    rules = {"key_scale": torch.from_numpy(kv.key_scale), "value_scale": torch.from_numpy(kv.value_scale)}
    qkv = torch.from_numpy(query), torch.from_numpy(kv.key), torch.from_numpy(kv.value)
    expected = fastattn.dot_product_attention(query, kv.key, kv.value, **as_arrays(rules))
    for layout in bridge._LAYOUTS:
        same(attention(*qkv, out_layout=layout, **rules), expected)
        same(bridge._through_operator(*qkv, layout, rules), expected)
    with pytest.raises(ValueError, match="8 bits has no gradients, and query wants one"):
        attention(qkv[0].requires_grad_(), *qkv[1:], **rules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_copied(calls, dtype):
    """Transposed, repeated and stepped tensors are read where they lie; the output is the array that was written."""
    pytest.importorskip("ml_dtypes")
    query = randn(2, 5, 300, 8, dtype=dtype).transpose(1, 2)
    key, value = randn(1, 1, 7, 8, dtype=dtype).expand(2, 300, 7, 8), randn(2, 300, 7, 16, dtype=dtype)[..., ::2]
    for gradients in False, True:
        query = query.detach().requires_grad_(gradients)
        out = attention(query, key, value, out_layout="bshd")
        given = calls.pop()
        for name, x in ("query", query), ("key", key), ("value", value), ("out", out):
            assert given[name].ctypes.data == x.data_ptr()
            assert given[name].strides == tuple(x.element_size() * stride for stride in x.stride())
    scaled_dot_product_attention(query.detach(), key, value)
    assert calls.pop()["query"].ctypes.data == query.data_ptr()


def test_threads(calls):
    """A process that told PyTorch to use one thread means it."""
    before, qkv = torch.get_num_threads(), problem()
    try:
        for number in 1, 2:
            torch.set_num_threads(number)
            scaled_dot_product_attention(*qkv)
            bridge._through_operator(*qkv, "bhsd", {})
            attention(qkv[0].clone().requires_grad_(), *qkv[1:])
            for _ in range(3):
                assert calls.pop()["num_threads"] == min(number, fastattn.get_num_threads())
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
    attention(*qkv, num_threads=3)
    assert calls.pop()["num_threads"] == 3


def test_plain_calls_are_straight(monkeypatch):
    qkv = problem()
    monkeypatch.setattr(bridge, "_through_operator", None)
    for context in torch.no_grad, torch.inference_mode, torch.enable_grad:
        with context():
            scaled_dot_product_attention(*qkv, attn_mask=HIDDEN)
            attention(torch.nn.Parameter(qkv[0], requires_grad=context is torch.enable_grad), *qkv[1:])


# -- gradients ------------------------------------------------------------------------------------------------

DIFFERENTIABLE = {
    "plain": {},
    "causal": {"is_causal": True, "softcap": 1.5, "sinks": randn(6, seed=8)},
    "band": {"window_size": (2, 1), "relative_bias": BAND, "query_offset": 0},
    "bias": {"bias": randn(2, 1, 5, 7, seed=5), "mask": HIDDEN},
    "slopes": {"alibi_slopes": randn(6, seed=9), "key_lengths": torch.tensor([[5], [2]])},
    "sigmoid": {"activation": "sigmoid"},
}


def with_gradients(rules):
    """query, key, value and the float tensors of the rules, all of which want gradients; the names; the rules."""
    qkv = dict(zip(("query", "key", "value"), problem(), strict=True))
    tensors = {n: x for n, x in {**qkv, **rules}.items() if torch.is_tensor(x) and x.is_floating_point()}
    tensors = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    return {**qkv, **rules, **tensors}, tuple(tensors)


@pytest.mark.parametrize("way", ["straight", "operator"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_fastattn(name, way):
    """Bit by bit, and by PyTorch's finite differences."""
    given, names = with_gradients(DIFFERENTIABLE[name])
    weight = randn(2, 6, 5, 4, seed=11)

    def call(*tensors):
        query, key, value, *rules = (given | dict(zip(names, tensors, strict=True))).items()
        if way == "straight":
            return attention(query[1], key[1], value[1], out_layout="bshd", **dict(rules))
        return bridge._through_operator(query[1], key[1], value[1], "bshd", dict(rules))

    tensors = [given[n] for n in names]
    out = call(*tensors)
    gradients = torch.autograd.grad(out, tensors, weight)
    arrays = {n: numpy(x) if torch.is_tensor(x) else x for n, x in given.items()}
    same(out, fastattn.dot_product_attention(**arrays))
    expected = fastattn.dot_product_attention_vjp(numpy(weight), **arrays, wrt=names)
    for ours, array in zip(gradients, expected, strict=True):
        same(ours, array)
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


def test_gradients_like_pytorchs():
    for rules in MASKS.values():
        results = []
        for function in scaled_dot_product_attention, own:
            qkv = [x.clone().requires_grad_() for x in problem(heads=3)]
            mask = rules.get("attn_mask")
            if mask is not None and mask.is_floating_point() and torch.isfinite(mask).all():
                qkv.append(mask.clone().requires_grad_())
            function(*qkv, **{n: x for n, x in rules.items() if n != "attn_mask" or len(qkv) == 3},
                     enable_gqa=True).square().sum().backward()  # fmt: skip
            results.append([x.grad for x in qkv])
        for ours, expected in zip(*results, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("way", ["straight", "operator"])
def test_weights_are_constants_and_sums_are_not(way):
    query, key, value = (x.requires_grad_() for x in problem())
    rules = {"return_weights": True, "return_lse": True}
    call = attention if way == "straight" else lambda *qkv, **rules: bridge._through_operator(*qkv, "bhsd", rules)
    out, weights, lse = call(query, key, value, **rules)
    assert out.requires_grad and lse.requires_grad and not weights.requires_grad
    (gradient,) = torch.autograd.grad(lse.square().sum(), query, retain_graph=True)
    scores = (query @ key.mT / 8**0.5).logsumexp(-1)
    near(gradient, torch.autograd.grad(scores.square().sum(), query)[0])
    assert torch.autograd.grad(out.sum(), key)[0].shape == key.shape


@pytest.mark.parametrize("way", ["straight", "operator", "compiled"])
def test_second_derivatives_are_refused(way, fresh_compiler):
    query, key, value = (x.requires_grad_() for x in problem())
    call = {"straight": attention, "operator": lambda *qkv: bridge._through_operator(*qkv, "bhsd", {}),
            "compiled": torch.compile(attention, backend="eager", fullgraph=True)}[way]  # fmt: skip
    (gradient,) = torch.autograd.grad(call(query, key, value).sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        gradient.sum().backward()


def test_constants_have_no_gradients():
    query, key, value = problem()
    for way in attention, lambda *qkv, **rules: bridge._through_operator(*qkv, "bhsd", rules):
        with pytest.raises(ValueError, match=r"^mask of dot_product_attention is a constant"):
            way(query, key, value, mask=torch.ones(5, 7, requires_grad=True))


# -- graphs ---------------------------------------------------------------------------------------------------


def flat(**rules):
    """The arguments of the operator."""
    qkv = dict(zip(("query", "key", "value"), problem(), strict=True))
    plain = {"is_causal": False, "enable_gqa": False, "activation": "softmax", "return_weights": ""}
    plain |= {"return_lse": False, "out_layout": "bhsd"}
    return tuple({**qkv, **plain, **rules}.get(name) for name in bridge._NAMES)


@pytest.mark.parametrize("rules", [
    {"return_lse": True, "bias": randn(2, 1, 5, 7, seed=5)},
    {"is_causal": True, "out_layout": "bshd", "return_lse": True, "sinks": randn(6, seed=8)},
    {"window_size": [2, -1], "return_weights": "all", "query_offset": torch.tensor(1), "mask": HIDDEN},
    {"window_size": [2, 1], "return_weights": "band", "activation": "sigmoid"},
], ids=["bias", "causal", "window", "band"])  # fmt: skip
def test_opcheck(rules):
    differentiable = "softmax" not in rules.get("activation", "softmax") or rules.get("return_lse")
    given = [x.requires_grad_(bool(differentiable)) if torch.is_tensor(x) and x.is_floating_point() else x
             for x in flat(**{n: x.clone() if torch.is_tensor(x) else x for n, x in rules.items()})]  # fmt: skip
    torch.library.opcheck(torch.ops.fastattn.attention.default, tuple(given))


@pytest.mark.parametrize("name", ["none", "causal", "bools", "floats"])
def test_compiled_with_gradients(name, fresh_compiler):
    """In one graph for all lengths."""
    rules = {n: x for n, x in MASKS[name].items() if n != "attn_mask"}
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *given: (scaled_dot_product_attention(*given, **rules, enable_gqa=True) * 2).sin(),
        fullgraph=True, dynamic=True, backend=graphs,
    )  # fmt: skip
    count = 0
    for keys in 7, 6, 4:
        results = []
        for function in compiled, lambda *given: (own(*given, **rules, enable_gqa=True) * 2).sin():
            query, key, value = problem(heads=3)
            given = [query[:, :, : keys - 2], key[:, :, :keys], value[:, :, :keys]]
            if "attn_mask" in MASKS[name]:
                given.append(MASKS[name]["attn_mask"].expand(2, 1, 5, 7)[..., : keys - 2, :keys])
            given = [x.clone().requires_grad_() if x.is_floating_point() else x.clone() for x in given]
            out = function(*given)
            out.square().sum().backward()
            results.append([out, *(x.grad for x in given if x.requires_grad)])
        count = count or graphs.frame_count
        for ours, expected in zip(*results, strict=True):
            np.testing.assert_allclose(numpy(ours), numpy(expected), rtol=1e-9, atol=1e-10)
    assert graphs.frame_count == count, "no other graph for another length"


class Model(torch.nn.Module):
    def forward(self, query, key, value):
        return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    rows, keys = torch.export.Dim("rows"), torch.export.Dim("keys")
    shapes = {"query": {2: rows}, "key": {2: keys}, "value": {2: keys}}
    program = torch.export.export(Model(), problem(), dynamic_shapes=shapes, strict=strict).module()
    for query, key, value in problem(), [x[:, :, :3] for x in problem()]:
        same(program(query, key, value), Model()(query, key, value))


def test_traced():
    module = torch.jit.trace(Model(), problem(), check_trace=False)
    other = tuple(x + 1 for x in problem())
    same(module(*other), Model()(*other))


@pytest.mark.parametrize("layout", bridge._LAYOUTS)
def test_meta_tensors(layout):
    qkv = problem(heads=3)
    expected = attention(*qkv, enable_gqa=True, return_weights=True, return_lse=True, out_layout=layout)
    found = attention(*(x.to("meta") for x in qkv), enable_gqa=True, return_weights=True, return_lse=True,
                      out_layout=layout)  # fmt: skip
    for x, y in zip(found, expected, strict=True):
        assert x.is_meta and (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
    with pytest.raises(ValueError, match=r"the batch axes of .*enable_gqa"):
        attention(*(x.to("meta") for x in qkv))


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        qkv = [mode.from_tensor(x) for x in problem()]
        assert scaled_dot_product_attention(*qkv).shape == (2, 6, 5, 4)


def test_transforms():
    """vmap, grad, and one of the other."""
    query, key, value = problem()
    near(torch.vmap(lambda q, k: attention(q, k, value[0]))(query, key), attention(query, key, value[:1]))

    def loss(query, key=key, value=value):
        return (scaled_dot_product_attention(query, key, value, is_causal=True) ** 2).sum()

    wanted = query.clone().requires_grad_()
    loss(wanted).backward()
    near(torch.func.grad(loss)(query), wanted.grad)
    near(torch.vmap(torch.func.grad(loss))(query, key, value), wanted.grad)


def test_watchers_see_the_operator():
    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen += (str(function),)
            return function(*args, **kwargs or {})

    with Names() as names:
        scaled_dot_product_attention(*problem())
    assert "fastattn.attention.default" in names.seen


def test_docstrings():
    import doctest

    for function in attention, scaled_dot_product_attention:
        (example,) = doctest.DocTestFinder().find(function, function.__name__)
        assert doctest.DocTestRunner().run(example).attempted, "there is an example"
        assert not doctest.DocTestRunner().run(example).failed


def test_the_operators_arguments_are_those_of_fastattn():
    """A rule that is added to dot_product_attention is to be added here."""
    assert bridge._RULES == _table.Row("dot_product_attention").names - {"query", "key", "value"}
