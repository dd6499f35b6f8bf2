"""Gradients of softmax and its relatives: against the reference, and that against differences and torch's autograd."""

import numpy as np
import pytest
from problems import AWKWARD, DTYPES, bits, layouts, misaligned, sixteen_bits
from tolerances import accumulation_dtype, assert_within, result_dtype, storage_steps

import fastattn
from fastattn import reference

# Those whose gradient comes from what they returned.
FROM_OUTPUT = ("softmax", "log_softmax", "sparsemax", "entmax15")
FUNCTIONS = (*FROM_OUTPUT, "logsumexp")
ALL_DTYPES = (*DTYPES, *sixteen_bits())


def vjp(name):
    return getattr(fastattn, f"{name}_vjp")


def given(name, x, axis=-1, mask=None):
    """What the gradient is computed from besides grad_out: what the function returned, or x."""
    return x if name == "logsumexp" else getattr(fastattn, name)(x, axis, mask=mask)


def grad_for(rng, name, x, axis=-1, dtype=None):
    """A gradient of the shape of the function's result."""
    shape = reference.logsumexp(x, axis).shape if name == "logsumexp" else x.shape
    return rng.standard_normal(shape).astype(x.dtype if dtype is None else dtype)


def bounds(name, grad_out, output, axis, mask, keepdims=False):
    """How far each gradient may be off: eps times 8 size + 16 times what the same sums give over absolute values.

    From what a function returned there are no scores, so size is 0; log_softmax exponentiates it, and logsumexp x minus
    its log-sum-exp, whose errors count relative to the exponential.
    """
    dtype = result_dtype(output)
    eps = np.finfo(accumulation_dtype(dtype)).eps * (2 if dtype == np.float64 else 1)
    output = np.asarray(output, dtype=np.float64)
    visible = np.broadcast_to(True if mask is None else mask, output.shape)
    grad = np.asarray(grad_out, dtype=np.float64)
    size = 0.0
    with np.errstate(all="ignore"):
        if name == "logsumexp":
            size = np.where(visible & np.isfinite(output), np.abs(output), 0.0)
            size = np.max(size, axis=axis, keepdims=True, initial=0.0)
            bound = np.abs(reference.logsumexp_vjp(grad, output, axis, keepdims=keepdims, mask=mask))
        elif name == "log_softmax":
            grad = np.where(visible & (output != -np.inf), np.abs(grad), 0.0)
            bound = grad + np.exp(output) * np.sum(grad, axis=axis, keepdims=True)
        else:
            weights = np.where(visible, output, 0.0)
            if name != "softmax":
                weights = np.sqrt(weights) if name == "entmax15" else (weights != 0).astype(float)
            grad = np.where(weights != 0, np.abs(grad), 0.0)
            total = 1.0 if name == "softmax" else np.sum(weights, axis=axis, keepdims=True)
            bound = weights * (grad + np.sum(weights * grad, axis=axis, keepdims=True) / total)
        return eps * (8 * size + 16) * np.nan_to_num(bound, nan=0.0, posinf=0.0)


def assert_gradient(name, grad_out, output, axis=-1, *, mask=None, **arguments):
    """One gradient against the reference; returns it."""
    actual = vjp(name)(grad_out, output, axis, mask=mask, **arguments)
    keepdims = {n: x for n, x in arguments.items() if n == "keepdims"}
    expected = getattr(reference, f"{name}_vjp")(grad_out, output, axis, mask=mask, **keepdims)
    dtype = result_dtype(output)
    assert actual.dtype == dtype or actual is arguments.get("out")
    storage, step = (x / 2 for x in storage_steps(np.dtype(dtype)))
    tiny = float(np.finfo(accumulation_dtype(dtype)).smallest_normal)
    bound = bounds(name, grad_out, output, axis, mask, **keepdims)
    bound = bound + storage * np.nan_to_num(np.abs(expected), posinf=0.0) + step + tiny
    assert_within(actual, expected, bound, f"gradient of {name}")
    return actual


# ---------------------------------------------------------------- the reference


def differences(f, x, step=1e-5):
    """The gradient of f at x, by central differences."""
    x = x.astype(np.float64)
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        grad[i] = (f(up) - f(down)) / (2 * step)
    return grad


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("axis", [-1, 0, (0, 2), None])
@pytest.mark.parametrize("masked", [False, True])
def test_reference_has_the_slope_of_its_function(rng, name, axis, masked):
    x = rng.standard_normal((3, 4, 5))
    mask = rng.random(x.shape) < 0.7 if masked else None
    function = getattr(reference, name)
    output = x if name == "logsumexp" else function(x, axis, mask=mask)
    grad_out = rng.standard_normal(function(x, axis).shape)

    def loss(x):
        result = function(x, axis, mask=mask)
        return np.sum(np.where(np.isfinite(result), result, 0.0) * grad_out)

    grad = getattr(reference, f"{name}_vjp")(grad_out, output, axis, mask=mask)
    np.testing.assert_allclose(grad, differences(loss, x), atol=1e-8)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_as_torch_has_it(rng, name):
    torch = pytest.importorskip("torch")
    x = rng.standard_normal((4, 37))
    grad_out = grad_for(rng, name, x)
    tensor = torch.tensor(x, requires_grad=True)
    getattr(torch, name)(tensor, -1).backward(torch.tensor(grad_out))
    np.testing.assert_allclose(vjp(name)(grad_out, given(name, x)), tensor.grad.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_rows_of_a_sparse_gradient_sum_to_zero(rng, name):
    """Adding a number to a row changes nothing."""
    x = rng.standard_normal((20, 50))
    grad = vjp(name)(rng.standard_normal(x.shape), given(name, x))
    np.testing.assert_allclose(grad.sum(-1), 0, atol=1e-14)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("length", [*AWKWARD, 1000, 5000])
def test_lengths(rng, name, length, dtype):
    x = (3 * rng.standard_normal((5, length))).astype(dtype)
    assert_gradient(name, grad_for(rng, name, x), given(name, x))
    mask = rng.random((5, length)) < 0.5
    assert_gradient(name, grad_for(rng, name, x), given(name, x, mask=mask), mask=mask)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("axis", [-1, 0, 1, -3, None, (0, 1), (0, 2), (2, 1), (0, 1, 2)])
def test_axes(rng, name, axis, dtype):
    x = rng.standard_normal((7, 18, 45)).astype(dtype)
    grad_out = grad_for(rng, name, x, axis)
    grad = assert_gradient(name, grad_out, given(name, x, axis), axis)
    if name == "logsumexp":
        kept = grad_out.reshape(reference.logsumexp(x, axis, keepdims=True).shape)
        assert bits(vjp(name)(kept, x, axis, keepdims=True)) == bits(grad)
    mask = rng.random((18, 1)) < 0.6
    assert_gradient(name, grad_out, given(name, x, axis, mask), axis, mask=mask)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (2, 0, 3), (1, 1)])
@pytest.mark.parametrize("axis", [-1, 0, None])
def test_empty_and_small(rng, name, shape, axis):
    x = rng.standard_normal(shape).astype(np.float32)
    grad = assert_gradient(name, grad_for(rng, name, x, axis), given(name, x, axis), axis)
    assert grad.shape == shape


@pytest.mark.parametrize("name", FUNCTIONS)
def test_integers_become_float64(rng, name):
    x = rng.integers(0, 2, (3, 5))
    for grad_out in (np.ones(5, int)[:3] if name == "logsumexp" else np.ones((3, 5), int), None):
        grad_out = grad_for(rng, name, x, dtype=np.float32) if grad_out is None else grad_out
        assert assert_gradient(name, grad_out, x).dtype == np.float64


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("axis", [-1, 0])
def test_mixed_dtypes(rng, name, axis):
    """The gradient has the dtype of what was returned, or of out, whatever that of grad_out is."""
    x = rng.standard_normal((40, 70))
    for dtype in ALL_DTYPES:
        output = given(name, x.astype(dtype), axis)
        for other in ALL_DTYPES:
            grad_out = grad_for(rng, name, x, axis, other)
            grad = assert_gradient(name, grad_out, output, axis)
            wide = np.empty(x.shape, accumulation_dtype(grad.dtype))
            assert vjp(name)(grad_out, output, axis, out=wide) is wide
            assert bits(wide.astype(grad.dtype)) == bits(grad)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_long_rows_stay_accurate(rng, name):
    """No error grows with the length: equal terms, of which float32 would lose most in a plain sum."""
    x = np.zeros((2, 1_000_003), dtype=np.float32)
    output = given(name, x)
    grad_out = np.full((2,), 0.1, np.float32) if name == "logsumexp" else np.full_like(x, 0.1)
    assert_gradient(name, grad_out, output)
    if name != "logsumexp":
        assert_gradient(name, grad_out + rng.standard_normal(x.shape).astype(np.float32), output)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
def test_scales_of_the_gradient(rng, name, scale):
    x = rng.standard_normal((6, 130)).astype(np.float32)
    assert_gradient(name, grad_for(rng, name, x) * np.float32(scale), given(name, x))


@pytest.mark.parametrize("level", [1e30, -1e30, -1e9, 1e4, -104.0])
def test_rows_far_from_zero_are_ordinary(rng, level):
    """Weights sum to 1 although float32 cannot hold the logarithm of their number beside the level."""
    x = np.full((3, 50), level, dtype=np.float32)
    grad_out = rng.standard_normal(3).astype(np.float32)
    grad = fastattn.logsumexp_vjp(grad_out, x)
    np.testing.assert_allclose(grad, np.broadcast_to(grad_out[:, None] / 50, grad.shape), rtol=1e-6)


def test_gradients_of_log_softmax_where_softmax_underflows():
    output = fastattn.log_softmax(np.array([0.0, -200.0, -1000.0], np.float32))
    np.testing.assert_array_equal(fastattn.log_softmax_vjp(np.float32([1, 2, 3]), output), [-5, 2, 3])


# ---------------------------------------------------------------- what takes part


def hostile(rng, name, axis, dtype):
    """x with hidden NaN and infinities, visible -inf, rows of nothing; its mask; what is surely no part of a row."""
    x = (2 * rng.standard_normal((20, 70))).astype(dtype)
    mask = rng.random(x.shape) < 0.6
    x[rng.random(x.shape) < 0.1] = -np.inf
    rows, mask_rows = (x, mask) if axis == -1 else (x.T, mask.T)
    mask_rows[3] = False
    rows[4] = -np.inf
    x[~mask & (rng.random(x.shape) < 0.5)] = np.nan
    x[~mask & (rng.random(x.shape) < 0.2)] = np.inf
    return x, mask, ~mask | (x == -np.inf)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("axis", [-1, 0])
def test_what_does_not_count_gets_zero(rng, name, axis, dtype):
    """Whatever is stored there, and in grad_out; NaN in one row reaches no other."""
    x, mask, hidden = hostile(rng, name, axis, dtype)
    output = given(name, x, axis, mask)
    clean = grad_for(rng, name, x, axis)
    grad_out = clean.copy()
    if name == "logsumexp":
        grad_out[3], grad_out[4] = np.nan, np.inf
    else:
        grad_out[hidden] = np.where(rng.random(np.count_nonzero(hidden)) < 0.5, np.nan, np.inf).astype(dtype)
    grad = assert_gradient(name, grad_out, output, axis, mask=mask)
    assert (grad[hidden] == 0).all()
    assert np.isfinite(grad.astype(np.float64)).all()
    assert bits(vjp(name)(clean, output, axis, mask=mask)) == bits(grad)
    if name != "logsumexp":
        # What was returned says enough.
        assert bits(vjp(name)(grad_out, output, axis)) == bits(grad)
        # Nor does it matter what is stored in hidden places.
        output[~mask] = np.nan
        assert bits(vjp(name)(grad_out, output, axis, mask=mask)) == bits(grad)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_counts_spreads_in_its_row_alone(rng, name, axis, bad):
    x = rng.standard_normal((40, 70)).astype(np.float32)
    mask = rng.random(x.shape) < 0.8
    output = given(name, x, axis, mask)
    grad_out = grad_for(rng, name, x, axis)
    expected = vjp(name)(grad_out, output, axis, mask=mask)
    row = 7
    along = (lambda a: a) if axis == -1 else (lambda a: a.T)
    counts = along(mask)[row] & (True if name == "logsumexp" else np.isfinite(along(output)[row]))
    if name in ("sparsemax", "entmax15", "softmax"):
        counts &= along(output)[row] != 0
    (grad_out if name == "logsumexp" else along(grad_out)[row])[row if name == "logsumexp" else counts.argmax()] = bad
    grad = assert_gradient(name, grad_out, output, axis, mask=mask)
    assert not np.isfinite(along(grad)[row][counts]).any()
    assert (along(grad)[row][~counts] == 0).all()
    others = np.arange(len(along(grad))) != row
    assert bits(along(grad)[others]) == bits(along(expected)[others])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_in_x(rng, name, axis, bad):
    x = rng.standard_normal((40, 70)).astype(np.float32)
    (x if axis == -1 else x.T)[7, 5:9] = bad, 1, -np.inf, 2
    mask = rng.random(x.shape) < 0.8
    (mask if axis == -1 else mask.T)[7, 5:8] = True
    with np.errstate(all="ignore"):
        output = given(name, x, axis, mask)
    grad = assert_gradient(name, grad_for(rng, name, x, axis), output, axis, mask=mask)
    row = (grad if axis == -1 else grad.T)[7]
    assert np.isnan(row[5])
    assert (row[~(mask if axis == -1 else mask.T)[7]] == 0).all()
    assert np.count_nonzero(~np.isfinite(grad)) <= row.size


# ---------------------------------------------------------------- same bits


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("axis", [-1, 0, (0, 2)])
def test_layouts(rng, name, dtype, axis):
    x = rng.standard_normal((4, 19, 43)).astype(dtype)
    mask = rng.random(x.shape) < 0.7
    output, grad_out = given(name, x, axis, mask), grad_for(rng, name, x, axis)
    expected = bits(vjp(name)(grad_out, output, axis, mask=mask))
    for layout, other in layouts(output):
        assert bits(vjp(name)(grad_out, other, axis, mask=mask)) == expected, layout
    for layout, other in layouts(mask):
        assert bits(vjp(name)(grad_out, output, axis, mask=other)) == expected, layout
    if grad_out.ndim > 1:
        for layout, other in layouts(grad_out):
            assert bits(vjp(name)(other, output, axis, mask=mask)) == expected, layout
    for layout, other in layouts(np.zeros_like(x)):
        if other.flags.writeable:
            assert bits(vjp(name)(grad_out, output, axis, mask=mask, out=other)) == expected, layout


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_without_strides(rng, name):
    """A gradient of a sum, which has one number in memory."""
    x = rng.standard_normal((30, 200)).astype(np.float32)
    for axis in (-1, 0):
        one = np.broadcast_to(np.float32(1.5), grad_for(rng, name, x, axis).shape)
        output = given(name, x, axis)
        assert bits(vjp(name)(one, output, axis)) == bits(vjp(name)(one.copy(), output, axis))


def along(x, axis):
    """The rows along one or more axes, contiguous: (..., elements)."""
    axes = [a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))]
    others = [a for a in range(x.ndim) if a not in axes]
    shape = (*(x.shape[a] for a in others), np.prod([x.shape[a] for a in axes], dtype=int))
    return np.ascontiguousarray(x.transpose(*others, *sorted(axes))).reshape(shape)


COLUMNS = [
    ((7, 5), 0),
    ((300, 70), 0),
    ((129, 64), 0),
    ((1030, 130), 0),
    ((9000, 40), 0),
    ((3, 40, 50), 1),
    ((40, 3, 70), (0, 1)),
    ((60, 40, 5), (0, 2)),
    ((2, 3, 4, 5, 60), (1, 3)),
]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, np.float16])
@pytest.mark.parametrize(("shape", "axis"), COLUMNS, ids=str)
def test_other_axes_have_the_bits_of_the_last(rng, name, shape, axis, dtype):
    x = (2 * rng.standard_normal(shape)).astype(dtype)
    for output in (given(name, x, axis), given(name, x, axis)[::-1, ..., ::-1], given(name, x, axis)[..., ::2]):
        grad_out = grad_for(rng, name, output, axis)
        rows = along(output, axis)
        for mask in (None, rng.random(output.shape) < 0.5, rng.random(output.shape[-1:]) < 0.5):
            grad = vjp(name)(grad_out, output, axis, mask=mask)
            rows_mask = None if mask is None else along(np.broadcast_to(mask, output.shape), axis)
            rows_grad = grad_out if name == "logsumexp" else along(grad_out, axis)
            assert bits(along(grad, axis)) == bits(vjp(name)(rows_grad, rows, mask=rows_mask))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("axis", [-1, 0])
def test_threads_and_other_rows_change_no_bit(rng, name, axis):
    x = rng.standard_normal((301, 503)).astype(np.float32)
    output, grad_out = given(name, x, axis), grad_for(rng, name, x, axis)
    expected = vjp(name)(grad_out, output, axis, num_threads=1)
    for num_threads in (2, 3, 7):
        assert bits(vjp(name)(grad_out, output, axis, num_threads=num_threads)) == bits(expected)
    if axis == -1:
        assert bits(vjp(name)(grad_out[100:103], output[100:103])) == bits(expected[100:103])


# ---------------------------------------------------------------- out


@pytest.mark.parametrize("name", FROM_OUTPUT)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("axis", [-1, 0, None])
def test_out_may_be_what_came_in(rng, name, dtype, axis):
    x = rng.standard_normal((70, 140)).astype(dtype)
    output, grad_out = given(name, x, axis), grad_for(rng, name, x)
    expected = bits(vjp(name)(grad_out, output, axis))
    for place in (np.array, misaligned, np.asfortranarray):
        g, y = place(grad_out), place(output)
        assert vjp(name)(g, y, axis, out=g) is g
        assert (bits(g), bits(y)) == (expected, bits(output))
        g = place(grad_out)
        assert vjp(name)(g, y, axis, out=y) is y
        assert (bits(g), bits(y)) == (bits(grad_out), expected)
    assert bits(vjp(name)(g, g, axis, out=g)) == bits(vjp(name)(grad_out, grad_out, axis)), "both at once"


def test_out_must_not_overlap_otherwise(rng):
    buffer = rng.random(60).astype(np.float32)
    before = buffer.copy()
    a, shifted, other = buffer[:30].reshape(3, 10), buffer[1:31].reshape(3, 10), np.ones((3, 10), np.float32)
    for name in FROM_OUTPUT:
        for out in (shifted, a[::-1]):
            with pytest.raises(ValueError, match="out overlaps grad_out"):
                vjp(name)(a, other, out=out)
            with pytest.raises(ValueError, match="out overlaps output"):
                vjp(name)(other, a, out=out)
            with pytest.raises(ValueError, match="out overlaps"):
                vjp(name)(a, out, out=out)
        with pytest.raises(ValueError, match="out overlaps mask"):
            vjp(name)(other, other, mask=buffer.view(bool)[:30].reshape(3, 10), out=a)
    with pytest.raises(ValueError, match="out overlaps x"):
        fastattn.logsumexp_vjp(other[:, 0], a, out=a)
    with pytest.raises(ValueError, match="out overlaps grad_out"):
        fastattn.logsumexp_vjp(a[:, 0], other, out=a)
    np.testing.assert_array_equal(buffer, before)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_left_alone(rng, name):
    x = rng.standard_normal((9, 33)).astype(np.float32)
    output, grad_out = given(name, x), grad_for(rng, name, x)
    before = output.copy(), grad_out.copy()
    vjp(name)(grad_out, output)
    np.testing.assert_array_equal(output, before[0])
    np.testing.assert_array_equal(grad_out, before[1])


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors(name):
    what = "x" if name == "logsumexp" else "output"
    output = np.ones((3, 4), np.float32)
    grad_out = output[:, 0] if name == "logsumexp" else output
    function = vjp(name)
    for bad in (np.ones((3, 4, 1)), np.ones((4, 3)), 1.0, np.ones((1, 4))):
        with pytest.raises(ValueError, match=r"grad_out has shape .*; it must have that of the result"):
            function(bad, output)
    for bad in (grad_out.astype(complex), grad_out.astype(">f4"), np.ma.masked_array(grad_out), None, "text"):
        with pytest.raises(TypeError, match="grad_out"):
            function(bad, output)
    for bad in (output.astype(complex), np.ma.masked_array(output), None, "text"):
        with pytest.raises(TypeError, match=rf"\b{what}\b"):
            function(grad_out, bad)
    for axis in (2, (0, 0), 0.5):
        with pytest.raises((ValueError, TypeError), match="axis"):
            function(grad_out, output, axis)
    with pytest.raises(TypeError, match=r"(?s)mask.*bool"):
        function(grad_out, output, mask=np.ones((3, 4)))
    with pytest.raises(ValueError, match=rf"mask.*{what}'s"):
        function(grad_out, output, mask=np.ones((3, 5), bool))
    for out in (np.zeros((3, 4), np.float64), np.zeros((4, 3), np.float32), [0.0], np.zeros((3, 4), np.float16)):
        with pytest.raises((ValueError, TypeError), match="out"):
            function(grad_out, output, out=out)
    with pytest.raises(ValueError, match="num_threads"):
        function(grad_out, output, num_threads=0)
    with pytest.raises(TypeError):
        function(grad_out, output, -1, None)
    if name == "logsumexp":
        with pytest.raises(TypeError, match="keepdims"):
            function(grad_out, output, keepdims=1)
        with pytest.raises(ValueError, match="grad_out"):
            function(grad_out, output, keepdims=True)
