"""fastattn.integrations.jax.nn beside jax.nn: every argument, gradients, jit, vmap; and platforms of both modules."""

import functools
import inspect

import fresh_process
import numpy as np
import pytest

import fastattn

jax = pytest.importorskip("jax", reason="fastattn.integrations.jax needs JAX")
import jax.numpy as jnp  # noqa: E402

from fastattn.integrations.jax import _ON_CPU, nn  # noqa: E402
from fastattn.integrations.jax import dot_product_attention as own_function  # noqa: E402

if "return_residual" not in inspect.signature(jax.nn.dot_product_attention).parameters:
    pytest.skip("this JAX has no return_residual to compare with", allow_module_level=True)

TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}  # numbers about 1, sums of up to 40 terms, in float32 on both sides


def arrays(heads=4, kv_heads=2, batch=2, rows=9, columns=12, channels=8, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (batch, rows, heads, channels), *[(batch, columns, kv_heads, channels)] * 2
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


RNG = np.random.default_rng(1)
CALLS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bias": {"bias": RNG.standard_normal((2, 4, 9, 12), dtype=np.float32)},
    "bias of heads": {"bias": RNG.standard_normal((4, 1, 12), dtype=np.float32)},
    "mask": {"mask": RNG.random((2, 1, 9, 12)) < 0.8},
    "mask of keys": {"mask": np.arange(12) < 5, "is_causal": True},
    "query lengths": {"query_seq_lengths": np.array([9, 4], np.int32)},
    "key lengths": {"key_value_seq_lengths": np.array([12, 3], np.int32)},
    "window": {"local_window_size": (3, 1)},
    "one number": {"local_window_size": 5, "is_causal": True},
    "all": {
        "bias": RNG.standard_normal((1, 4, 9, 12), dtype=np.float32), "mask": RNG.random((2, 4, 9, 12)) < 0.9,
        "scale": 0.5, "is_causal": True, "query_seq_lengths": np.array([5, 9], np.int32),
        "key_value_seq_lengths": np.array([12, 9], np.int32), "local_window_size": (8, 4),
    },
}  # fmt: skip


def visible(call, rows=9, columns=12, heads=4, batch=2):
    """(B, T, N): whether a query sees a key. Where none does, jax.nn gives the mean of all values."""
    query, key = np.arange(rows)[:, None], np.arange(columns)
    seen = np.ones((batch, heads, rows, columns), dtype=bool)
    left, right = np.broadcast_to(call.get("local_window_size", columns + rows), 2)
    seen &= (key >= query - left) & (key <= query + right)
    seen &= call.get("mask", True)
    if call.get("is_causal"):
        seen &= key <= query
    for name, at in (("query_seq_lengths", query), ("key_value_seq_lengths", key)):
        if name in call:
            seen &= at < call[name][:, None, None, None]
    return seen.any(-1).swapaxes(1, 2)


def static(call):
    """(arrays, the others) of a call."""
    held = {name: x for name, x in call.items() if isinstance(x, np.ndarray)}
    return held, {name: x for name, x in call.items() if name not in held}


def test_the_signature_is_that_of_jax():
    ours, theirs = (inspect.signature(f.dot_product_attention).parameters for f in (nn, jax.nn))
    assert list(ours) == [name for name in theirs if name != "implementation"]
    assert all((ours[name].default, ours[name].kind) == (theirs[name].default, theirs[name].kind) for name in ours)
    with pytest.raises(TypeError, match="implementation"):
        nn.dot_product_attention(*arrays(), implementation="xla")


@pytest.mark.parametrize("name", CALLS)
def test_values_and_residuals(name):
    call, qkv = CALLS[name], arrays()
    shown = visible(call)
    for f in (lambda f: f, jax.jit):
        held, others = static(call)
        ours, theirs = (
            f(functools.partial(x.dot_product_attention, return_residual=True, **others))(*qkv, **held)
            for x in (nn, jax.nn)
        )
        for own, result in zip(ours, theirs, strict=True):
            assert (own.dtype, own.shape) == (result.dtype, result.shape)
            np.testing.assert_allclose(own[shown], result[shown], **TOLERANCE)
        assert not ours[0][~shown].any() and np.isneginf(ours[1][~shown]).all()
    assert shown.all() or name in ("query lengths", "mask", "all")


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name):
    """Of rows that see a key; the others are constants here."""
    (held, others), qkv = static(CALLS[name]), arrays()
    weight = RNG.standard_normal((2, 9, 4, 8), dtype=np.float32) * visible(CALLS[name])[..., None]
    bias = held.pop("bias", None)
    given = (*qkv, bias) if bias is not None else tuple(qkv)

    def gradients(function):
        def loss(*given):
            return (function(*given, **held, **others) * weight).sum()

        return jax.jit(jax.grad(loss, tuple(range(len(given)))))(*given)

    for ours, theirs in zip(*(gradients(x.dot_product_attention) for x in (nn, jax.nn)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_residual_is_a_constant():
    """As in jax.nn."""
    qkv = arrays()
    for function in nn.dot_product_attention, jax.nn.dot_product_attention:
        gradient = jax.grad(lambda q, f=function: f(q, *qkv[1:], return_residual=True)[1].sum())(qkv[0])
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sixteen_bits(dtype):
    qkv = arrays(dtype=dtype)
    out, residual = nn.dot_product_attention(*qkv, is_causal=True, return_residual=True)
    assert out.dtype == residual.dtype == dtype
    exact = nn.dot_product_attention(*(x.astype(np.float32) for x in qkv), is_causal=True)
    np.testing.assert_allclose(out.astype(np.float32), exact, rtol=0, atol=2 * float(jnp.finfo(dtype).eps) * 4)


def test_one_sequence():
    """Arrays of three axes, and what jax.nn takes beside them."""
    (q, k, v), mask = (x[0] for x in arrays()), RNG.random((1, 4, 9, 12)) < 0.9
    for call in {}, {"mask": mask}, {"mask": mask[0]}, {"key_value_seq_lengths": np.array([5], np.int32)}:
        ours, theirs = (x.dot_product_attention(q, k, v, return_residual=True, **call) for x in (nn, jax.nn))
        for own, result in zip(ours, theirs, strict=True):
            assert own.shape == result.shape
            np.testing.assert_allclose(own, result, **TOLERANCE)


def test_the_value_may_be_wider():
    q, k, v = arrays()
    wide = jnp.concatenate([v, -v], axis=-1)
    out = nn.dot_product_attention(q, k, wide)
    np.testing.assert_array_equal(
        out, jnp.concatenate([nn.dot_product_attention(q, k, v)] * 2, -1) * np.repeat([1, -1], 8)
    )


MAPPED = {
    "all": (0, 0, 0, None),
    "query": (0, None, None, None),
    "keys": (None, 0, 0, None),
    "lengths": (None, None, None, 0),
    "query and lengths": (0, None, None, 0),
    "another axis": (1, 1, 1, None),
}


@pytest.mark.parametrize("name", MAPPED)
def test_vmap(name):
    """Values and gradients are those of single calls."""
    axes, count = MAPPED[name], 3
    rng = np.random.default_rng(2)
    given = [rng.standard_normal(np.insert(x.shape, axis, count) if axis is not None else x.shape).astype(np.float32)
             for x, axis in zip(arrays(), axes, strict=False)]  # fmt: skip
    given.append(np.array([[12, 5], [1, 2], [7, 12]][: count if axes[3] == 0 else 1], np.int32))
    if axes[3] is None:
        given[3] = given[3][0]

    def both(q, k, v, lengths):
        def loss(q, k, v):
            out = nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, is_causal=True)
            return (out**2).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradients

    mapped = jax.jit(jax.vmap(both, axes))(*given)
    for i in range(count):
        single = both(*(x if axis is None else x.take(i, axis) for x, axis in zip(given, axes, strict=True)))
        for ours, expected in zip(mapped, single, strict=True):
            np.testing.assert_array_equal(ours[i], expected)


def test_nothing_is_transposed(monkeypatch):
    """The call gets views of (B, T, N, H) memory, one call under vmap too, and its bits are the function's."""
    row = nn._ROW
    calls, function = [], row.function

    def spy(**given):
        calls.append(given)
        return function(**given)

    monkeypatch.setattr(row, "function", spy)
    qkv = arrays()
    out = nn.dot_product_attention(*qkv, is_causal=True)
    (given,) = calls
    assert [given[name].strides for name in ("query", "key")] == [(1152 // 4 * 4, 32, 128, 4), (768, 32, 64, 4)]
    own = own_function(*(x.swapaxes(1, 2) for x in qkv), is_causal=True, query_offset=0, enable_gqa=True)
    np.testing.assert_array_equal(out, own.swapaxes(1, 2))
    calls.clear()
    jax.vmap(nn.dot_product_attention)(*(x[None].repeat(3, 0) for x in qkv)).block_until_ready()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (5, 9, 8)}, "key has the shape .* as many axes as query"),
        ({"query": (9, 8)}, r"query must have the shape \(B, T, N, H\)"),
        ({"key": (3, 12, 2, 8)}, "key has the shape .* and its batch"),
        ({"key": (2, 12, 2, 7), "value": (2, 12, 2, 7)}, "key has 7 channels, but query 8"),
        ({"key": (2, 12, 3, 8), "value": (2, 12, 3, 8)}, "query has 4 heads, which is no multiple of the 3 of key"),
        ({"value": (2, 11, 2, 8)}, "value has the shape"),
        ({"mask": (1, 2, 4, 9, 12)}, "mask has the shape"),
        ({"query_seq_lengths": (2, 1)}, r"query_seq_lengths must have the shape \(2,\)"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    """Refused where they are traced, in the names of jax.nn."""
    shapes = {"query": (2, 9, 4, 8), "key": (2, 12, 2, 8), "value": (2, 12, 2, 8)} | change
    given = {name: np.ones(shape, bool if name == "mask" else np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        jax.jit(nn.dot_product_attention)(**given)


def test_other_refusals():
    qkv = arrays()
    with pytest.raises(ValueError, match=r"local_window_size must be 0 or more on both sides, not \(-1, 3\)"):
        nn.dot_product_attention(*qkv, local_window_size=(-1, 3))
    with pytest.raises(TypeError, match="key_value_seq_lengths must be integers, not float32"):
        nn.dot_product_attention(*qkv, key_value_seq_lengths=np.ones(2, np.float32))
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        slope = jax.grad(lambda q: (nn.dot_product_attention(q, *qkv[1:]) ** 2).sum())
        jax.grad(lambda q: slope(q).sum())(qkv[0])
    with pytest.raises(TypeError, match="mask must be boolean, not float32; numbers"):
        nn.dot_product_attention(*qkv, mask=np.ones((9, 12), np.float32))
    with pytest.raises(ValueError, match=r"^scale of dot_product_attention is a constant"):
        jax.grad(lambda scale: nn.dot_product_attention(*qkv, scale=scale).sum())(0.5)


@pytest.mark.parametrize("function", [nn.dot_product_attention, own_function], ids=["nn", "own"])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_other_platforms(function, platform):
    x = np.ones((2, 3, 4, 5), np.float32)
    for f in function, jax.vmap(function), jax.grad(lambda *qkv: function(*qkv).sum()):
        given = (x, x, x) if f is not jax.vmap else (x[None],) * 3
        with pytest.raises(
            NotImplementedError, match=f"^fastattn computes on the CPU, not on the platform {platform}: "
        ):
            jax.jit(f).trace(*given).lower(lowering_platforms=(platform,))


def test_arrays_on_other_platforms():
    """As an array of one shows itself: there is none here."""

    class Elsewhere:
        platform = "gpu"

        def devices(self):
            return {self}

    with pytest.raises(NotImplementedError, match="not on the platform gpu: "):
        _ON_CPU.impl(Elsewhere())


def test_in_a_model_that_is_compiled():
    """Layers under scan and checkpoint, as models have them."""
    weights = RNG.standard_normal((3, 32, 96), dtype=np.float32) / 6
    x = RNG.standard_normal((2, 10, 32), dtype=np.float32)

    def loss(function, weights):
        def layer(x, w):
            qkv = (x @ w).reshape(2, 10, 3, 4, 8)
            return x + function(*(qkv[:, :, i] for i in range(3)), is_causal=True).reshape(x.shape), None

        return (jax.lax.scan(jax.checkpoint(layer), x, weights)[0] ** 2).sum()

    ours, theirs = (jax.jit(jax.grad(functools.partial(loss, f.dot_product_attention)))(weights) for f in (nn, jax.nn))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_random_calls():
    """Sizes and rules at random."""
    rng = np.random.default_rng(5)
    for _ in range(5):
        batch, kv_heads, group, rows, columns = (int(n) for n in rng.integers(1, 6, 5))
        heads = kv_heads * group
        q, k, v = arrays(heads, kv_heads, batch, rows, columns)
        call = {"is_causal": bool(rng.integers(2)), "local_window_size": tuple(map(int, rng.integers(0, 4, 2)))}
        if rng.random() < 0.5:
            call["mask"] = rng.random((batch, heads, rows, columns)) < 0.8
        if rng.random() < 0.5:
            call["key_value_seq_lengths"] = rng.integers(1, columns + 1, batch).astype(np.int32)
        shown = visible(call, rows, columns, heads, batch)
        held, others = static(call)
        ours, theirs = (
            jax.jit(functools.partial(x.dot_product_attention, **others))(q, k, v, **held) for x in (nn, jax.nn)
        )
        np.testing.assert_allclose(ours[shown], theirs[shown], **TOLERANCE)


def test_a_missing_jax_is_named():
    fresh_process.run("""
        import sys
        sys.modules["jax"] = None
        try:
            import fastattn.integrations.jax.nn
        except ImportError as error:
            assert "needs JAX: pip install" in str(error) and "fastattn[jax]" in str(error), error
        else:
            raise AssertionError
    """)


def test_the_examples_run():
    import doctest

    assert doctest.testmod(nn).failed == 0
    lines = [line for line in nn.__doc__.splitlines() if line.startswith("    ")]
    exec("\n".join(line[4:] for line in lines), {})
    assert fastattn.__version__
