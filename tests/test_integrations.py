"""fastattn.integrations: functions and gradients in PyTorch, JAX and autograd, each against the package itself.

Values and gradients must have the bits of fastattn's own calls; gradients are also checked by the framework's finite
differences. What needs a framework that is not installed is skipped; `.ci/run` runs all of it.
"""

import importlib
import inspect
import re
import textwrap

import fresh_process
import numpy as np
import pytest
from problems import bits

import fastattn
from fastattn.integrations import _table

HOSTS = {"torch": "PyTorch", "jax": "JAX", "autograd": "autograd"}
ROWS = {row.name: row for row in _table.TABLE}


def arguments(function, names="", dtype=np.float64, **more):
    """A small call of two heads, L=4, S=5: query, key, value, and of `names` what they say."""
    rng = np.random.default_rng(7)
    shapes = {"query": (2, 4, 3), "key": (2, 5, 3), "value": (2, 5, 2), "bias": (2, 1, 5), "relative_bias": (2, 1, 4),
              "alibi_slopes": (2,), "sinks": (2,), "w_score": (6,), "b_hidden": (6,), "w_query": (3, 6),
              "w_key": (3, 6), "b_query": (6,), "b_key": (6,), "log_decay": (2, 5, 3), "beta": (2, 5),
              "state": (2, 3, 2), "edge_bias": (2, 7), "edge_key": (7, 3), "edge_value": (7, 2)}  # fmt: skip
    shapes.update(more.pop("shapes", {}))
    names = "query", "key", "value", *names.split()
    given = {name: rng.standard_normal(shapes[name]).astype(dtype) for name in names}
    return function, {**given, **more}


MASK = np.array([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=bool)


def cases(dtype=np.float64):
    """Calls of every row; each argument that has a gradient is in some of them."""
    dot, additive, bilinear = "dot_product_attention", "additive_attention", "bilinear_attention"
    image = {"query": (2, 3, 4, 3), "key": (2, 3, 4, 3), "value": (2, 3, 4, 2), "relative_bias": (2, 3, 5)}
    every = {
        "plain": arguments(dot, dtype=dtype),
        "causal": arguments(dot, "sinks alibi_slopes", dtype, is_causal=True, softcap=1.5, scale=0.7),
        "bias and mask": arguments(dot, "bias", dtype, mask=MASK),
        "lengths": arguments(dot, "bias", dtype, key_lengths=np.array([5, 2]), query_lengths=3),
        "window": arguments(dot, "relative_bias", dtype, window_size=(2, 1), query_offset=[1, 0]),
        "grouped": arguments(dot, dtype=dtype, enable_gqa=True, shapes={"query": (4, 4, 3)}),
        "broadcast": arguments(dot, dtype=dtype, shapes={"key": (5, 3), "value": (1, 5, 2)}),
        "one head": arguments(dot, dtype=dtype, shapes={"query": (4, 3), "key": (5, 3), "value": (5, 2)}),
        "relu": arguments(dot, "bias", dtype, activation="relu"),
        "sigmoid": arguments(dot, "alibi_slopes", dtype, activation="sigmoid", is_causal=True),
        "additive": arguments(additive, "w_score w_query w_key b_hidden bias", dtype, key_lengths=[[4], [5]][0]),
        "additive, Keras' form": arguments(additive, "w_score", dtype, is_causal=True, shapes={"w_score": (3,)}),
        "bilinear": arguments(bilinear, "w_query w_key b_query b_key sinks", dtype),
        "bilinear, shared": arguments(bilinear, "w_query b_query", dtype, mask=MASK),
        "truncated": arguments("truncated_attention", "relative_bias bias", dtype, left=1, right=2),
        "varlen": arguments("varlen_attention", "alibi_slopes sinks", dtype, is_causal=True, cu_seqlens_q=[0, 1, 4],
                            cu_seqlens_k=np.array([0, 3, 5])),
        "linear": arguments("linear_attention", dtype=dtype, key_lengths=np.array([5, 3])),
        "linear, delta rule": arguments("linear_attention", "log_decay beta state", dtype, is_causal=True,
                                        feature_map=None),
        "graph": arguments("graph_attention", "edge_bias edge_key edge_value", dtype,
                           graph=([0, 2, 2, 5, 7], [1, 4, 0, 0, 3, 4, 2])),
        "graph, GATv2": arguments("graph_attention", "w_score", dtype, shapes={"w_score": (2, 3)},
                                  graph=([0, 2, 2, 5, 7], [1, 4, 0, 0, 3, 4, 2])),
        "image": arguments("neighborhood_attention", "relative_bias sinks", dtype, shapes=image, kernel_size=(2, 3)),
    }  # fmt: skip
    return {name: case for name, case in every.items() if case[0] in ROWS}


CASES = tuple(cases())


def differentiable(function, given):
    """The names of its arguments that have gradients."""
    return tuple(name for name in ROWS[function].differentiable if name in given)


def numpy_gradients(function, given, wrt, weight=None, **flags):
    """Of sum(weight * out), by fastattn itself."""
    out = getattr(fastattn, function)(**given)
    grad_out = np.broadcast_to(out.dtype.type(1), out.shape) if weight is None else weight
    return getattr(fastattn, f"{function}_vjp")(grad_out, **given, wrt=wrt, **flags)


def finite_results(function, given):
    """{"return_lse": True} if there is one, and every row has a finite one: -inf has no finite differences."""
    if "activation" in given or "return_lse" not in ROWS[function].names:
        return {}
    _, lse = getattr(fastattn, function)(**given, return_lse=True)
    return {"return_lse": True} if np.isfinite(lse).all() else {}


def weights_like(array):
    return np.random.default_rng(3).standard_normal(array.shape).astype(array.dtype)


def same(ours, expected):
    ours = np.asarray(ours)
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    assert bits(ours) == bits(expected)


def near(ours, expected):
    """Within some roundings of float32, of numbers about 1 in sums of a few terms."""
    assert np.asarray(ours).dtype == expected.dtype
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


class Spy:
    """Stands for a function of fastattn and counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.function(*args, **kwargs)


@pytest.fixture
def spy(monkeypatch):
    """Watches dot_product_attention and its gradients."""
    vjp = Spy(fastattn.dot_product_attention_vjp)
    monkeypatch.setattr(fastattn, "dot_product_attention_vjp", vjp)
    forward = Spy(fastattn.dot_product_attention)
    monkeypatch.setattr(ROWS["dot_product_attention"], "function", forward)
    return forward, vjp


# -- the table ------------------------------------------------------------------------------------------------


def test_every_function_with_gradients_is_in_the_table():
    named = {"dot_product", "additive", "bilinear", "truncated", "varlen"}
    assert {f"{name}_attention" for name in named} <= set(ROWS)
    for name, row in ROWS.items():
        own = inspect.signature(getattr(fastattn, f"{name}_vjp")).parameters
        without = {f"return_{result}" for result in _table.RETURNED} | set(_table.EIGHT_BITS)
        assert row.names - without <= set(own)


def test_there_is_a_case_for_every_gradient():
    rules = set(ROWS["dot_product_attention"].differentiable)
    for name, row in ROWS.items():
        names = {n for function, given in cases().values() if function == name for n in differentiable(name, given)}
        shared = set() if name.startswith("dot") else rules  # which all functions of the same driver hand on
        assert set(row.differentiable) - shared <= names, name


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_that_the_function_has(case):
    """What the table derives from signatures is what `_vjp` itself lists."""
    function, given = cases()[case]
    with pytest.raises(ValueError, match="wrt") as error:
        numpy_gradients(function, given, "nothing")
    listed = re.findall(r"'(\w+)'", str(error.value).partition("can be named")[2])
    assert set(listed) == set(differentiable(function, given))


def test_they_are_imported_by_name_only():
    fresh_process.run("""
        import sys, fastattn, fastattn.integrations
        assert not {"torch", "jax", "autograd"} & set(sys.modules)
        assert not [name for name in sys.modules if name.startswith("fastattn.integrations.")]
    """)


@pytest.mark.parametrize("host", HOSTS)
def test_a_missing_framework_is_named(host):
    fresh_process.run(f"""
        import sys
        sys.modules["{host}"] = None
        try:
            import fastattn.integrations.{host}
        except ImportError as error:
            assert "needs {HOSTS[host]}: pip install" in str(error) and "fastattn[{host}]" in str(error), error
        else:
            raise AssertionError
    """)


@pytest.fixture(params=HOSTS)
def bridge(request):
    """Each of the modules in turn."""
    pytest.importorskip(request.param, reason=f"fastattn.integrations.{request.param} needs {HOSTS[request.param]}")
    return importlib.import_module(f"fastattn.integrations.{request.param}")


def test_a_bridge_has_the_functions_of_the_table(bridge):
    more = ["attention", "scaled_dot_product_attention"] if bridge.__name__.endswith("torch") else []
    assert bridge.__all__ == [*more, *ROWS]
    for name in ROWS:
        function, own = getattr(bridge, name), inspect.signature(getattr(fastattn, name)).parameters
        assert (function.__name__, function.__module__) == (name, bridge.__name__)
        assert f"fastattn.{name}" in function.__doc__
        shown = inspect.signature(function).parameters
        missing = {"out", "state_out"}
        missing |= {"return_weights", "return_state"} if bridge.__name__.endswith("jax") else set()
        assert list(shown) == [parameter for parameter in own if parameter not in missing]
        assert all(shown[parameter].default == own[parameter].default for parameter in shown)


def test_the_example_of_a_bridge_runs(bridge):
    lines = [line for line in bridge.__doc__.splitlines() if line.startswith("    ")]
    exec(textwrap.dedent("\n".join(lines)), {})


def test_calls_that_do_not_fit_the_signature(bridge):
    x = np.ones((3, 2), dtype=np.float32)
    with pytest.raises(TypeError, match=r"^dot_product_attention\(\): missing a required argument: 'value'$"):
        bridge.dot_product_attention(x, x)
    for wrong in {"out": x}, {"nothing": 1}:
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{next(iter(wrong))}'"):
            bridge.dot_product_attention(x, x, x, **wrong)


# -- PyTorch --------------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="fastattn.integrations.torch needs PyTorch")


def to_torch(torch, function, given, wrt=None):
    """The call with tensors in place of arrays; those in `wrt` require gradients."""
    wrt = differentiable(function, given) if wrt is None else wrt
    tensors = {name: torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    for name in wrt:
        tensors[name].requires_grad_()
    return tensors


def torch_function(name):
    return getattr(importlib.import_module("fastattn.integrations.torch"), name)


@pytest.mark.parametrize("case", CASES)
def test_torch_gradcheck(torch, case):
    """PyTorch's own finite differences, of the output and of the log-sum-exp."""
    function, given = cases()[case]
    names = differentiable(function, given)
    tensors = to_torch(torch, function, given)
    flags = finite_results(function, given)

    def call(*values):
        return torch_function(function)(**tensors | dict(zip(names, values, strict=True)), **flags)

    assert torch.autograd.gradcheck(call, [tensors[name] for name in names])


@pytest.mark.parametrize("case", CASES)
def test_torch_has_the_bits_of_numpy(torch, case):
    function, given = cases(np.float32)[case]
    names = differentiable(function, given)
    tensors = to_torch(torch, function, given)
    out = torch_function(function)(**tensors)
    same(out.detach(), getattr(fastattn, function)(**given))
    weight = weights_like(out.detach().numpy())
    out.backward(torch.from_numpy(weight))
    for name, expected in zip(names, numpy_gradients(function, given, names, weight), strict=True):
        same(tensors[name].grad, expected)


def test_torch_computes_only_gradients_that_are_needed(torch, spy):
    function, given = cases()["causal"]
    tensors = to_torch(torch, function, given, ("key", "sinks"))
    torch_function(function)(**tensors).sum().backward()
    (_, kwargs), = spy[1].calls  # fmt: skip
    assert kwargs["wrt"] == ("key", "sinks")
    assert kwargs["output"] is not None and kwargs["lse"] is not None, "the forward pass is not done again"
    assert len(spy[0].calls) == 1
    assert all((tensors[name].grad is not None) == (name in kwargs["wrt"]) for name in differentiable(function, given))


def test_torch_reads_tensors_where_they_lie(torch, spy):
    query = torch.randn(1, 4, 2, 3).transpose(1, 2).requires_grad_()  # (batch, tokens, heads, channels) in memory
    key, value = torch.randn(1, 2, 3), torch.randn(5, 4).expand(1, 2, 5, 4)
    key = key.expand(5, 2, 3).transpose(0, 1)
    torch_function("dot_product_attention")(query, key, value).sum().backward()
    for _, kwargs in spy[0].calls + spy[1].calls:
        for name, tensor in zip(("query", "key", "value"), (query, key, value), strict=True):
            assert kwargs[name].ctypes.data == tensor.data_ptr()
            assert kwargs[name].strides == tuple(4 * stride for stride in tensor.stride())
    assert spy[1].calls[0][0][0].strides == (0, 0, 0, 0), "the gradient of a sum"


def test_torch_results(torch):
    function, given = cases(np.float32)["plain"]
    attention = torch_function(function)
    for tensors in to_torch(torch, function, given), to_torch(torch, function, given, ()):
        assert isinstance(attention(**tensors), torch.Tensor)
        for flags in {"return_lse": True}, {"return_weights": True}, {"return_lse": True, "return_weights": True}:
            results, expected = attention(**tensors, **flags), fastattn.dot_product_attention(**given, **flags)
            assert isinstance(results, tuple)
            for result, array in zip(results, expected, strict=True):
                same(result.detach(), array)
        out, weights, lse = attention(**tensors, return_weights=True, return_lse=True)
        assert not weights.requires_grad
        assert out.requires_grad == lse.requires_grad == tensors["query"].requires_grad


def test_torch_loss_of_the_log_sum_exp(torch):
    """Alone, and beside weights and the output."""
    function, given = cases(np.float32)["causal"]
    names = differentiable(function, given)
    for flags, of_out in ({}, False), ({"return_weights": True}, True):
        tensors = to_torch(torch, function, given)
        out, *_, lse = torch_function(function)(**tensors, return_lse=True, **flags)
        weight, grad_lse = weights_like(out.detach().numpy()), weights_like(lse.detach().numpy())
        loss = (lse * torch.from_numpy(grad_lse)).sum()
        loss += (out * torch.from_numpy(weight)).sum() if of_out else 0
        loss.backward()
        expected = numpy_gradients(function, given, names, weight if of_out else 0 * weight, grad_lse=grad_lse)
        for name, gradient in zip(names, expected, strict=True):
            same(tensors[name].grad, gradient)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_sixteen_bits(torch, dtype):
    if dtype == "bfloat16":
        number = pytest.importorskip("ml_dtypes").bfloat16
    else:
        number = np.float16
    function, given = cases(number)["causal"]
    names = differentiable(function, given)
    tensors = {name: torch.from_numpy(given[name].astype(np.float32)).to(getattr(torch, dtype)) for name in names}
    out = torch_function(function)(**given | {name: x.requires_grad_() for name, x in tensors.items()})
    assert out.dtype is getattr(torch, dtype)
    np.testing.assert_array_equal(out.detach().float().numpy(), getattr(fastattn, function)(**given).astype(np.float32))
    out.sum().backward()
    for name, expected in zip(names, numpy_gradients(function, given, names), strict=True):
        assert tensors[name].grad.dtype is getattr(torch, dtype)
        np.testing.assert_array_equal(tensors[name].grad.float().numpy(), expected.astype(np.float32))


def test_torch_without_gradients(torch, spy):
    function, given = cases(np.float32)["causal"]
    tensors = to_torch(torch, function, given)
    expected = fastattn.dot_product_attention(**given)
    for mode in torch.no_grad, torch.inference_mode:
        with mode():
            out = torch_function(function)(**tensors)
        assert not out.requires_grad
        same(out, expected)
    assert "return_lse" not in spy[0].calls[0][1]


def test_torch_second_derivatives_are_an_error(torch):
    """Also where the first ones would not need any, which PyTorch's own decorator takes for a constant."""
    query = torch.randn(4, 3, requires_grad=True)
    out = torch_function("dot_product_attention")(query, query, query)
    gradient, = torch.autograd.grad(out.sum(), query, create_graph=True)  # fmt: skip
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        (gradient.square().sum() + query.sum()).backward()
    assert torch.autograd.grad(query.sum(), query)[0].sum() == 12


def test_torch_refuses_other_devices_and_layouts(torch):
    x = torch.randn(4, 3)
    attention = torch_function("dot_product_attention")
    for requires_grad in False, True:
        query = x.clone().requires_grad_(requires_grad)
        with pytest.raises(ValueError, match=r"^key is on the device meta; it must be on the CPU"):
            attention(query, x.to("meta"), x)
        with pytest.raises(ValueError, match=r"^mask is on the device meta"):
            attention(query, x, x, mask=torch.ones(4, 4, dtype=torch.bool, device="meta"))
        with pytest.raises(ValueError, match=r"^value has the layout torch.sparse_coo; it must be dense"):
            attention(query, x, x.to_sparse())


def test_torch_constants(torch):
    """Tensors may stand for them, but no gradient may be wanted."""
    x = torch.randn(4, 3, requires_grad=True)
    attention = torch_function("dot_product_attention")
    out = attention(x, x, x, scale=torch.tensor(0.5), key_lengths=torch.tensor(3), mask=torch.ones(4, 4) > 0)
    same(out.detach(), fastattn.dot_product_attention(*[x.detach().numpy()] * 3, scale=0.5, key_lengths=3))
    out.sum().backward()
    with pytest.raises(
        ValueError, match=r"^scale of dot_product_attention is a constant; those that can have a gradie"
    ):
        attention(x, x, x, scale=torch.tensor(0.5, requires_grad=True))
    with pytest.raises(ValueError, match=r"key has head_dim 2"):
        attention(x, x[:, :2], x)


def test_torch_has_no_gradients_of_eight_bits(torch):
    kv = fastattn.quantize_kv(*np.ones((2, 4, 3), np.float32))
    given = {name: getattr(kv, name) for name in ("key", "value", "key_scale", "value_scale")}
    x = torch.ones(4, 3)
    assert torch_function("dot_product_attention")(x, **given).shape == (4, 3)
    with pytest.raises(ValueError, match="8 bits has no gradients, and query wants one"):
        torch_function("dot_product_attention")(x.requires_grad_(), **given)


def test_torch_notices_what_was_written_in_between(torch):
    x = torch.randn(4, 3)
    query = torch.randn(4, 3, requires_grad=True)
    loss = torch_function("dot_product_attention")(query, x, x).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_torch_agrees_with_its_own_attention(torch):
    """scaled_dot_product_attention in float64, grouped heads and a float mask."""
    made = torch.Generator().manual_seed(1)
    shapes = (2, 4, 9, 8), (2, 2, 11, 8), (2, 2, 11, 8), (4, 9, 11)
    ours = [torch.randn(shape, dtype=torch.float64, generator=made).requires_grad_() for shape in shapes]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    *qkv, bias = ours
    torch_function("dot_product_attention")(*qkv, bias=bias, enable_gqa=True).square().sum().backward()
    *qkv, bias = theirs
    attention = torch.nn.functional.scaled_dot_product_attention
    attention(*qkv, attn_mask=bias[None], enable_gqa=True).square().sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x.grad.numpy(), y.grad.numpy(), rtol=1e-11, atol=1e-12)


@pytest.mark.skipif("linear_attention" not in ROWS, reason="linear_attention has no gradients")
def test_torch_state_of_linear_attention(torch):
    """What one segment hands to the next carries gradients, too."""
    function, given = cases()["linear, delta rule"]
    tensors = to_torch(torch, function, given)
    names = differentiable(function, given)

    def call(*values):
        return torch_function(function)(**tensors | dict(zip(names, values, strict=True)), return_state=True)

    assert torch.autograd.gradcheck(call, [tensors[name] for name in names])


def test_torch_compile(torch):
    """Calls of fastattn are left out of the graph, and the rest is traced."""
    function = torch_function("dot_product_attention")
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)

    def loss(x):
        return function(2 * torch.sin(x), x, x, is_causal=True).square().sum()

    plain = torch.autograd.grad(loss(x), x)[0]
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(x), x)[0]
    torch.testing.assert_close(compiled, plain)


def test_torch_func_grad(torch):
    """The functional form, whose tensors are wrapped."""
    query, key, value = torch.randn(3, 4, 3)
    attention = torch_function("dot_product_attention")
    gradient = torch.func.grad(lambda x: attention(x, key, value).sum())(query)
    same(gradient, numpy_gradients("dot_product_attention", dict(zip(("query", "key", "value"), map(
        torch.Tensor.numpy, (query, key, value)), strict=True)), "query"))  # fmt: skip


# -- JAX ------------------------------------------------------------------------------------------------------


@pytest.fixture
def jax():
    return pytest.importorskip("jax", reason="fastattn.integrations.jax needs JAX")


@pytest.fixture
def float64(jax):
    """JAX with float64, which is off unless asked for."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def jax_function(name):
    return getattr(importlib.import_module("fastattn.integrations.jax"), name)


def jax_call(function, given, **flags):
    """A function of the arguments that have gradients, and these."""
    names = differentiable(function, given)

    def call(*values):
        return jax_function(function)(**given | dict(zip(names, values, strict=True)), **flags)

    return call, [given[name] for name in names]


@pytest.mark.parametrize("case", CASES)
def test_jax_check_grads(jax, float64, case):
    """JAX's own finite differences, of the output and of the log-sum-exp."""
    from jax.test_util import check_grads

    function, given = cases()[case]
    call, values = jax_call(function, given, **finite_results(function, given))
    check_grads(call, values, order=1, modes=["rev"], eps=1e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "jit"])
@pytest.mark.parametrize("case", CASES)
def test_jax_has_the_bits_of_numpy(jax, case, compiled):
    function, given = cases(np.float32)[case]
    call, values = jax_call(function, given)
    expected = getattr(fastattn, function)(**given)
    weight = weights_like(expected)
    gradients = jax.grad(lambda *values: (call(*values) * weight).sum(), argnums=tuple(range(len(values))))
    if compiled:
        call, gradients = jax.jit(call), jax.jit(gradients)
    same(call(*values), expected)
    names = differentiable(function, given)
    for ours, numpys in zip(gradients(*values), numpy_gradients(function, given, names, weight), strict=True):
        same(ours, numpys)


def test_jax_computes_only_gradients_that_are_needed(jax, spy):
    function, given = cases(np.float32)["causal"]
    call, values = jax_call(function, given)
    wrt = differentiable(function, given).index("sinks")
    jax.grad(lambda *values: call(*values).sum(), argnums=wrt)(*values).block_until_ready()
    (_, kwargs), = spy[1].calls  # fmt: skip
    assert kwargs["wrt"] == ("sinks",)
    assert isinstance(kwargs["output"], np.ndarray) and isinstance(kwargs["lse"], np.ndarray)
    assert kwargs["grad_lse"] is None
    assert len(spy[0].calls) == 1


def test_jax_loss_of_the_log_sum_exp(jax):
    function, given = cases(np.float32)["causal"]
    call, values = jax_call(function, given, return_lse=True)
    every, names = tuple(range(len(values))), differentiable(function, given)
    out, lse = fastattn.dot_product_attention(**given, return_lse=True)
    weight, grad_lse = weights_like(out), weights_like(lse)
    ours = jax.grad(lambda *values: (call(*values)[1] * grad_lse).sum(), argnums=every)(*values)
    for x, expected in zip(ours, numpy_gradients(function, given, names, 0 * weight, grad_lse=grad_lse), strict=True):
        same(x, expected)


def axes_of(jax, mapped, count=3):
    """`count` different values of each mapped array, stacked in front."""
    rng = np.random.default_rng(11)

    def several(name, x):
        x = np.asarray(x)
        if x.dtype == bool:
            return rng.random((count, *x.shape)) < 0.7
        if x.dtype.kind == "i":
            return rng.integers(1, x.max() + 1, (count, *x.shape))
        return rng.standard_normal((count, *x.shape)).astype(x.dtype)

    return {name: several(name, x) for name, x in mapped.items()}


MAPPED = {  # a case, and what is mapped in it
    "all": ("plain", "query key value"),
    "query": ("plain", "query"),
    "key of grouped heads": ("grouped", "key"),
    "value without heads": ("broadcast", "value"),
    "one head": ("one head", "query key value"),
    "bias": ("bias and mask", "bias"),
    "mask": ("bias and mask", "mask"),
    "mask and query": ("bias and mask", "query mask"),
    "lengths": ("lengths", "key_lengths"),
    "one length": ("lengths", "query_lengths query"),
    "slopes and sinks": ("causal", "alibi_slopes sinks"),
    "relative bias": ("window", "query relative_bias"),
    "relu": ("relu", "bias query"),
    "matrix": ("additive", "w_query query"),
    "hidden weights": ("additive", "w_score"),
    "not the matrices": ("bilinear", "query key value"),
    "truncated": ("truncated", "query key value bias"),
    "packed lengths": ("varlen", "cu_seqlens_k"),
    "packed": ("varlen", "query key value"),
    "state": ("linear, delta rule", "state beta query"),
    "edges": ("graph", "edge_bias edge_key query"),
    "weights of edges": ("graph, GATv2", "w_score"),
    "pixels": ("image", "query key value"),
    "table of biases": ("image", "relative_bias"),
}


@pytest.mark.parametrize("name", [name for name, (case, _) in MAPPED.items() if case in CASES])
def test_jax_vmap(jax, name):
    """Values and all gradients are those of single calls, whichever arguments are mapped; where rows are projected, to
    the bit only if both calls have more than eight, or neither."""
    case, mapped = MAPPED[name]
    compare = near if "w_query" in cases(np.float32)[case][1] else same
    function, given = cases(np.float32)[case]
    mapped = axes_of(jax, {n: given[n] for n in mapped.split()})
    if "cu_seqlens_k" in mapped:
        mapped["cu_seqlens_k"] = np.array([[0, 3, 5], [0, 1, 5], [0, 4, 5]])
    names = differentiable(function, given)
    weight = weights_like(getattr(fastattn, function)(**given))

    def results(values, others):
        call = {**given, **others, **values}
        gradients = jax.grad(lambda wrt: (jax_function(function)(**call | wrt) * weight).sum())
        return jax_function(function)(**call), gradients({n: call[n] for n in names})

    values = {n: mapped.pop(n) for n in names if n in mapped}
    outs, gradients = jax.vmap(results)(values, mapped)
    for i in range(3):
        single = {**given, **{n: x[i] for n, x in {**values, **mapped}.items()}}
        compare(outs[i], getattr(fastattn, function)(**single))
        for n, expected in zip(names, numpy_gradients(function, single, names, weight), strict=True):
            compare(gradients[n][i], expected)


def test_jax_vmap_is_one_call(jax, spy):
    function, given = cases(np.float32)["bias and mask"]
    query = np.stack([given["query"]] * 3)
    call = jax.vmap(lambda x: jax_function(function)(**given | {"query": x}))
    call(query).block_until_ready()
    assert len(spy[0].calls) == 1
    assert spy[0].calls[0][1]["query"].shape == (3, 2, 4, 3)
    assert spy[0].calls[0][1]["key"].shape == (1, 2, 5, 3), "what is not mapped is not repeated"
    jax.vmap(jax.grad(lambda x: jax_function(function)(**given | {"query": x}).sum()))(query).block_until_ready()
    assert len(spy[1].calls) == 1


def test_jax_vmap_twice_and_over_other_axes(jax):
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 2, 5, 4, 3)).astype(np.float32)  # tokens on axis 1
    attention, causal = jax_function("dot_product_attention"), fastattn.dot_product_attention
    lengths = np.array([2, 5])
    inner = jax.vmap(lambda q, k, v, n: attention(q, k, v, key_lengths=n, is_causal=True), (1, 1, 1, None), 1)
    outs = jax.vmap(inner)(query, key, value, lengths)
    swapped = (x.swapaxes(1, 2) for x in (query, key, value))
    same(outs, np.ascontiguousarray(causal(*swapped, key_lengths=lengths[:, None], is_causal=True).swapaxes(1, 2)))


def test_jax_jacobian(jax, float64):
    """vmap of the way back alone."""
    query, key, value = np.random.default_rng(0).standard_normal((3, 4, 3))
    jacobian = jax.jacrev(lambda x: jax_function("dot_product_attention")(x, key, value))(query)
    for i in np.ndindex(4, 3):
        one = np.zeros((4, 3))
        one[i] = 1
        expected = fastattn.dot_product_attention_vjp(one, query, key, value, wrt="query")
        np.testing.assert_allclose(jacobian[i], expected, rtol=1e-12, atol=1e-15)


def test_jax_dtypes(jax):
    """bfloat16 stays; float64 is JAX's to allow."""
    import jax.numpy as jnp

    attention = jax_function("dot_product_attention")
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(jnp.bfloat16)
    out, lse = attention(jnp.asarray(x), x, x, return_lse=True)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, np.float32)
    np.testing.assert_array_equal(out, fastattn.dot_product_attention(x, x, x))
    assert jax.grad(lambda x: attention(x, x, x).astype(np.float32).sum())(jnp.asarray(x)).dtype == jnp.bfloat16
    mixed = attention(x, x.astype(np.float32), x)
    assert mixed.dtype == np.float32
    whole = np.arange(6).reshape(3, 2)
    out, lse = attention(whole, whole, whole, return_lse=True)
    assert out.dtype == lse.dtype == np.float32
    np.testing.assert_array_equal(out, fastattn.dot_product_attention(whole, whole, whole).astype(np.float32))


def test_jax_float64(jax, float64):
    x = np.random.default_rng(0).standard_normal((4, 3))
    out, lse = jax_function("dot_product_attention")(x, x, x, return_lse=True)
    assert out.dtype == lse.dtype == np.float64
    same(out, fastattn.dot_product_attention(x, x, x))


def test_jax_empty_arrays(jax):
    x, none = np.ones((2, 4, 3), np.float32), np.ones((2, 0, 3), np.float32)
    attention = jax_function("dot_product_attention")
    assert attention(none, x, x).shape == (2, 0, 3)
    assert not attention(x, none, none).any()
    assert attention(x[:0], x[:1], x[:1]).shape == (0, 4, 3)


def test_jax_constants(jax):
    """Lists, numbers and traced scalars; no gradient may be wanted of what has none."""
    x = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    attention = jax_function("dot_product_attention")
    same(attention(x, x, x, key_lengths=[3, 2], window_size=[2, 0]),
         fastattn.dot_product_attention(x, x, x, key_lengths=[3, 2], window_size=[2, 0]))  # fmt: skip
    same(jax.jit(lambda scale: attention(x, x, x, scale=scale, alibi_slopes=0.5))(0.25),
         fastattn.dot_product_attention(x, x, x, scale=0.25, alibi_slopes=0.5))  # fmt: skip
    with pytest.raises(
        ValueError, match=r"^scale of dot_product_attention is a constant; those that can have a gradie"
    ):
        jax.grad(lambda scale: attention(x, x, x, scale=scale).sum())(0.25)
    with pytest.raises(TypeError, match="unexpected keyword argument 'return_weights'"):
        attention(x, x, x, return_weights=True)
    with pytest.raises(ValueError, match="two axes or more"):
        attention(x[0, 0], x, x)
    with pytest.raises(Exception, match="key has head_dim 2"):
        attention(x, x[..., :2], x).block_until_ready()


def test_jax_second_derivatives_are_an_error(jax):
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)

    def loss(x):
        return (jax_function("dot_product_attention")(x, x, x) ** 2).sum()

    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.grad(lambda x: jax.grad(loss)(x).sum())(x)


def test_jax_control_flow(jax):
    """Gradients through a scan whose steps are computed again on the way back."""
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    attention = jax_function("dot_product_attention")

    def step(x, _):
        return attention(x, x, x), None

    def three(step):
        return jax.jit(jax.grad(lambda x: jax.lax.scan(step, x, None, length=3)[0].sum()))(x)

    unrolled = jax.grad(lambda x: step(step(step(x, 0)[0], 0)[0], 0)[0].sum())(x)
    for gradient in three(step), three(jax.checkpoint(step)):
        np.testing.assert_allclose(gradient, unrolled, rtol=1e-5, atol=1e-6)


def test_jax_is_not_called_from_its_callbacks(jax):
    """Which is known to hang: large arrays, many calls that nobody waits for."""
    fresh_process.run("""
        import jax, numpy as np
        from fastattn.integrations.jax import dot_product_attention as attention
        query, key, value = jax.random.normal(jax.random.key(0), (3, 4, 512, 64))
        @jax.jit
        def layers(x):
            for _ in range(3):
                x = attention(x @ key.swapaxes(-1, -2) @ value, key, value)
                x = x + jax.vmap(attention)(x, key, value)
            return x
        for i in range(10):
            last = layers(query + i), attention(query @ np.eye(64, dtype=np.float32), key, value)
        jax.block_until_ready(last)
    """)


# -- autograd -------------------------------------------------------------------------------------------------


@pytest.fixture
def autograd():
    return pytest.importorskip("autograd", reason="fastattn.integrations.autograd needs autograd")


def autograd_call(function, given, **flags):
    """A function of the arguments that have gradients, and these."""
    module = importlib.import_module("fastattn.integrations.autograd")
    names = differentiable(function, given)

    def call(*values):
        return getattr(module, function)(**given | dict(zip(names, values, strict=True)), **flags)

    return call, [given[name] for name in names]


@pytest.mark.parametrize("case", CASES)
def test_autograd_check_grads(autograd, case):
    """autograd's own finite differences, of the output and of the log-sum-exp."""
    from autograd.builtins import tuple as traced_tuple
    from autograd.test_util import check_grads

    function, given = cases()[case]
    flags = finite_results(function, given)
    call, values = autograd_call(function, given, **flags)
    results = (lambda *values: traced_tuple(call(*values))) if flags else call
    check_grads(results, modes=["rev"], order=1)(*values)


@pytest.mark.parametrize("case", CASES)
def test_autograd_has_the_bits_of_numpy(autograd, case):
    function, given = cases(np.float32)[case]
    call, values = autograd_call(function, given)
    names = differentiable(function, given)
    expected = getattr(fastattn, function)(**given)
    same(call(*values), expected)
    weight = weights_like(expected)
    backward, value = autograd.make_vjp(call, tuple(range(len(values))))(*values)
    same(value, expected)
    for ours, numpys in zip(backward(weight), numpy_gradients(function, given, names, weight), strict=True):
        same(ours, numpys + 0)  # as autograd adds it to zeros, which makes 0 of -0


def test_autograd_has_all_gradients_from_one_call(autograd, spy):
    function, given = cases()["causal"]
    call, values = autograd_call(function, given)
    autograd.grad(lambda *values: call(*values).sum(), (0, 2, 4))(*values)
    (_, kwargs), = spy[1].calls  # fmt: skip
    names = differentiable(function, given)
    assert set(kwargs["wrt"]) == {names[0], names[2], names[4]}
    assert kwargs["output"] is not None and len(spy[0].calls) == 1


def test_autograd_results(autograd):
    """Weights are constants, lse is not."""
    function, given = cases()["causal"]
    call, (query, *others) = autograd_call(function, given, return_weights=True, return_lse=True)
    for result, expected in zip(
        call(query, *others), fastattn.dot_product_attention(**given, return_weights=True, return_lse=True), strict=True
    ):
        same(result, expected)

    def loss(query):
        out, weights, lse = call(query, *others)
        return out.sum() + lse.sum() + 0 * weights.sum()

    grad_lse = np.ones((2, 4))
    same(autograd.grad(loss)(query), numpy_gradients(function, given, "query", grad_lse=grad_lse))


def test_autograd_refuses(autograd):
    function, given = cases()["plain"]
    call, (query, *others) = autograd_call(function, given)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        autograd.hessian(lambda query: (call(query, *others) ** 2).sum())(query)
    module = importlib.import_module("fastattn.integrations.autograd")
    with pytest.raises(
        ValueError, match=r"^scale of dot_product_attention is a constant; those that can have a gradie"
    ):
        autograd.grad(lambda scale: module.dot_product_attention(**given, scale=scale).sum())(0.5)
