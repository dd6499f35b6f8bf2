"""Linear, layer_norm and rms_norm: right within derived bounds, and the same bits whatever stands around a row.

The error of a product is at most ``eps * (d_in / 8 + 8)`` times the sum of the absolute values of its terms, and that
of a norm a few eps of the largest number over the deviation, eps being that of the accumulation dtype.
"""

import copy
import pickle
import tracemalloc

import fresh_process
import numpy as np
import pytest
from problems import DTYPES, bits, layouts, misaligned, sixteen_bits, spaced
from tolerances import accumulation_dtype, storage_steps

import fastattn
from fastattn import Linear, layer_norm, reference, rms_norm

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
ALL_DTYPES = (*DTYPES, *sixteen_bits())
# Rows, d_in, d_out: around the sizes of vectors, panels and blocks, with few rows and many.
SHAPES = ((1, 5, 3), (2, 64, 64), (7, 300, 100), (8, 65, 17), (9, 64, 64), (13, 130, 65), (97, 129, 16),
          (200, 1000, 130), (3, 0, 5), (12, 0, 5), (0, 4, 4), (4, 3, 0), (12, 3, 0), (1, 1, 1),
          (33, 1, 200))  # fmt: skip
INFO = fastattn.cpu_info()


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def eps_of(dtype):
    return float(np.finfo(accumulation_dtype(dtype)).eps)


def rounding(y, expected):
    """What storing the result may cost: nothing but for 16 bits."""
    if y.dtype.itemsize > 2:
        return 0
    relative, least = storage_steps(y.dtype)
    return float(relative) * np.abs(expected) + float(least)


def check_product(y, x, weight, bias, activation=None, multiply=None, residual=None):
    """y against the reference, within the bound."""
    expected = reference.Linear(weight, bias)(x, activation=activation, multiply=multiply, residual=residual)
    assert y.shape == expected.shape
    w, v = np.abs(np.float64(weight)), np.abs(np.float64(x))
    size = v @ w + (0 if bias is None else np.abs(np.float64(bias)))
    factor = 1 if multiply is None else np.abs(np.float64(multiply))
    added = 0 if residual is None else np.abs(np.float64(residual))
    # No activation has a slope above 1.2; those with an exponential cost some eps of their own.
    bound = eps_of(y.dtype) * ((1.2 * (len(w) / 8 + 8) + 8) * size * factor + 4 * (np.abs(expected) + added))
    wrong = np.abs(np.float64(y) - expected) > bound + rounding(y, expected) + float(np.finfo(np.float32).tiny) * 16
    assert not wrong.any(), np.argwhere(wrong)[0]


def few_or_many(rows):
    return "few" if rows <= 8 else "many"


# ------------------------------------------------------------------------------------ products: numbers


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_product(rng, shape, dtype, activation):
    rows, d_in, d_out = shape
    x, weight, bias = normal(rng, rows, d_in, dtype=dtype), normal(rng, d_in, d_out, dtype=dtype), normal(rng, d_out)
    multiply, residual = normal(rng, rows, d_out), normal(rng, rows, d_out, dtype=np.float64)
    linear = Linear(weight, bias)
    assert bits(linear.weight) == bits(weight)
    assert (linear.d_in, linear.d_out, linear.dtype) == (d_in, d_out, weight.dtype)
    y = linear(x, activation=activation)
    assert y.dtype == weight.dtype
    check_product(y, x, weight, bias, activation)
    y = linear(x, activation=activation, multiply=multiply, residual=residual, num_threads=2)
    assert y.dtype == weight.dtype
    check_product(y, x, weight, bias, activation, multiply, residual)
    check_product(Linear(weight)(x, residual=residual), x, weight, None, None, None, residual)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("of_weight", ALL_DTYPES)
@pytest.mark.parametrize("of_x", ALL_DTYPES)
def test_mixed_dtypes(rng, of_x, of_weight, rows):
    """They promote as NumPy's do; two 16-bit dtypes do not, and other arguments never count."""
    x, weight = normal(rng, rows, 70, dtype=of_x), normal(rng, 70, 40, dtype=of_weight)
    linear = Linear(weight, normal(rng, 40, dtype=np.float64))
    if np.dtype(of_x) != of_weight and np.dtype(of_x).itemsize == np.dtype(of_weight).itemsize == 2:
        with pytest.raises(TypeError, match=r"(?s)x.*weight|weight.*x"):
            linear(x)
        return
    y = linear(x, residual=normal(rng, rows, 40, dtype=np.float64))
    assert y.dtype == np.result_type(x, weight)
    check_product(linear(x), x, weight, linear.bias)
    assert linear.dtype == of_weight, "the form in float64 is beside it"


def test_16_bits_are_those_of_the_widened_matrix(rng):
    """A matrix stays 16 bits in memory, and each number of it is exact in float32."""
    for dtype in sixteen_bits():
        weight = normal(rng, 300, 70, dtype=dtype)
        for rows in (1, 5, 8, 9, 50):
            x = normal(rng, rows, 300)
            assert bits(Linear(weight)(x)) == bits(Linear(weight.astype(np.float32))(x)), (dtype, rows)


def test_integers_and_lists():
    y = Linear([[1, 2], [3, 4]], [1, 0])([[1, 0], [0, True]])
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, [[2, 2], [4, 4]])


@pytest.mark.parametrize("rows", [1, 4, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_less_accurate_than_numpy_in_the_mean(rng, dtype, rows):
    ours = theirs = 0.0
    for _ in range(40 if rows < 200 else 3):
        x, weight = normal(rng, rows, 700, dtype=dtype), normal(rng, 700, 96, dtype=dtype)
        exact = np.longdouble(x) @ np.longdouble(weight)
        ours += float(np.abs(Linear(weight)(x) - exact).mean())
        theirs += float(np.abs(x @ weight - exact).mean())
    assert ours <= 1.05 * theirs, ours / theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations(dtype, activation):
    """All sizes of an argument. In the tail an error of x counts x^2 times, and what is less than 80 exp(-80), or
    700 exp(-700) in float64, may be 0."""
    x = np.concatenate([np.linspace(-45, 45, 20001), np.geomspace(1e-30, 1e30, 300), -np.geomspace(1e-30, 1e30, 300)])
    x = x.astype(dtype)[:, None]
    y = Linear(np.ones((1, 1), dtype))(x, activation=activation)
    expected = reference.Linear(np.ones((1, 1)))(x, activation=activation)
    condition = 8 + np.where(np.float64(x) < 0, np.float64(x) ** 2, 0)
    if activation == "gelu_tanh":  # its argument has a cube
        condition = 8 + np.where(np.float64(x) < 0, 4 * np.abs(np.float64(x)) + np.float64(x) ** 4, 0)
    bound = eps_of(dtype) * condition * np.abs(expected) + (
        80 * np.exp(-80) if dtype == np.float32 else 700 * np.exp(-700)
    )
    wrong = np.abs(np.float64(y) - expected) > bound
    assert not wrong.any(), x[wrong][:5]


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_limits_at_infinity(dtype, rows):
    linear = Linear(np.ones((1, 1), dtype))
    for x, limits in ((np.inf, [np.inf] * 5), (-np.inf, [-np.inf, 0, 0, 0, 0]), (np.nan, [np.nan] * 5)):
        for activation, limit in zip(ACTIVATIONS, limits, strict=True):
            y = linear(np.full((rows, 1), x, dtype), activation=activation)
            np.testing.assert_array_equal(y.astype(np.float64), np.full((rows, 1), limit), str(activation))


@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_in_its_row(rng, dtype, rows):
    x, weight = normal(rng, rows, 40, dtype=dtype), normal(rng, 40, 70, dtype=dtype)
    expected = Linear(weight)(x)
    for bad in (np.nan, np.inf):
        spoiled = x.copy()
        spoiled[1, 3] = bad
        y = Linear(weight)(spoiled)
        assert not np.isfinite(y[1]).any()
        assert bits(np.delete(y, 1, 0)) == bits(np.delete(expected, 1, 0))
        spoiled = weight.copy()
        spoiled[3, 5] = bad
        y = Linear(spoiled)(x)
        assert not np.isfinite(y[:, 5]).any()
        assert bits(np.delete(y, 5, 1)) == bits(np.delete(expected, 5, 1))


@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_near_the_ends_of_the_range(rng, dtype, rows):
    """Tiny terms keep what denormal sums keep, and large ones are right as long as their sum is in range."""
    finfo = np.finfo(dtype)
    x, weight = normal(rng, rows, 30, dtype=dtype), normal(rng, 30, 20, dtype=dtype)
    tiny = x * dtype(float(finfo.tiny) * 64)
    y = Linear(weight)(tiny)
    terms = np.abs(np.float64(tiny)) @ np.abs(np.float64(weight))
    wrong = np.abs(np.longdouble(y) - np.longdouble(tiny) @ np.longdouble(weight))
    assert (wrong <= 12 * float(finfo.eps) * terms + 30 * float(finfo.smallest_subnormal)).all()
    large = x * dtype(float(finfo.max) / 1e4)
    check_product(Linear(weight)(large), large, weight, None)


# --------------------------------------------------------------------------------- products: same bits


@pytest.mark.parametrize("rows", [2, 8, 9, 14, 60, 300])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_bits_of_a_row_are_its_own(rng, dtype, rows):
    """They depend on the row, and on whether there are more than eight."""
    x, weight, bias = normal(rng, rows, 150, dtype=dtype), normal(rng, 150, 130, dtype=dtype), normal(rng, 130)
    multiply, residual = normal(rng, rows, 130), normal(rng, rows, 130)
    linear = Linear(weight, bias)

    def call(index, **more):
        return linear(x[index], activation="gelu", multiply=multiply[index], residual=residual[index], **more)

    expected = call(slice(None), num_threads=1)
    for threads in (2, 3, 7):
        assert bits(call(slice(None), num_threads=threads)) == bits(expected), threads
    order = rng.permutation(rows)
    assert bits(call(order)) == bits(expected[order])
    for count in {1, 2, 3, 5, 7, 8, 9, 10, 11, 13, 50, rows - 1}:
        if count < rows and few_or_many(count) == few_or_many(rows):
            begin = int(rng.integers(0, rows - count + 1))
            part = slice(begin, begin + count)
            assert bits(call(part)) == bits(expected[part]), count
    if rows % 2 == 0:  # leading axes count together
        folded = (2, rows // 2, -1)
        y = linear(x.reshape(folded), activation="gelu", multiply=multiply.reshape(folded),
                   residual=residual.reshape(folded))  # fmt: skip
        assert bits(y) == bits(expected)
    other = x.copy()
    other[::2] = np.float32(1e4)
    y = linear(other, activation="gelu", multiply=multiply, residual=residual)
    assert bits(y[1::2]) == bits(expected[1::2])


@pytest.mark.parametrize("rows", [4, 30])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_layouts_of_memory(rng, dtype, rows):
    x, weight = normal(rng, 2, rows, 33, dtype=dtype), normal(rng, 33, 50, dtype=dtype)
    multiply, residual = normal(rng, 2, rows, 50), normal(rng, 2, rows, 50, dtype=dtype)
    expected = Linear(weight)(x, activation="silu", multiply=multiply, residual=residual)
    for one, two, three, four in zip(*map(layouts, (x, multiply, residual, expected)), strict=True):
        name = one[0]
        y = Linear(weight)(one[1], activation="silu", multiply=two[1], residual=three[1])
        assert bits(y) == bits(expected), name
        if four[1].flags.writeable:
            out = four[1]
            out[...] = 7
            assert Linear(weight)(x, activation="silu", multiply=multiply, residual=residual, out=out) is out
            assert bits(out) == bits(expected), name
    for name, other in layouts(weight):
        assert bits(Linear(other)(x, activation="silu", multiply=multiply, residual=residual)) == bits(expected), name
    zero = np.broadcast_to(x[:, :1], x.shape)
    assert bits(Linear(weight)(zero)) == bits(Linear(weight)(zero.copy()))


def test_out_leaves_the_gaps_alone(rng):
    x, weight = normal(rng, 2, 9, 16), normal(rng, 16, 20)
    large = np.full((2, 12, 50), 7, np.float32)
    for out in (large[:, 1:10, 3:23], large[::-1, 10:1:-1, 43:3:-2]):
        large[...] = 7
        Linear(weight)(x, out=out)
        assert bits(out) == bits(Linear(weight)(x))
        out[...] = 7
        assert (large == 7).all()


@pytest.mark.parametrize("rows", [4, 30])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("place", [np.array, spaced, misaligned, np.asfortranarray])
def test_out_may_be_residual_or_multiply(rng, place, dtype, rows):
    x, weight = normal(rng, rows, 16, dtype=dtype), normal(rng, 16, 70, dtype=dtype)
    more = {"multiply": normal(rng, rows, 70, dtype=dtype), "residual": normal(rng, rows, 70, dtype=dtype)}
    expected = Linear(weight)(x, activation="relu", **more)
    for name in more:
        out = place(more[name])
        Linear(weight)(x, activation="relu", **{**more, name: out}, out=out, num_threads=2)
        assert bits(out) == bits(expected), name
    out = place(more["residual"])
    Linear(weight)(x, multiply=out, residual=out, out=out)
    assert bits(out) == bits(Linear(weight)(x, multiply=more["residual"], residual=more["residual"]))


def test_one_row(rng):
    x, weight = normal(rng, 40), normal(rng, 40, 30)
    linear, more = Linear(weight), normal(rng, 30)
    y = linear(x, activation="gelu", multiply=more, residual=more)
    assert y.shape == (30,)
    assert bits(y) == bits(linear(x[None], activation="gelu", multiply=more[None], residual=more[None]))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (0, 0, 4)])
def test_no_rows(shape):
    assert Linear(np.ones((4, 3)))(np.ones(shape)).shape == (*shape[:-1], 3)
    for norm in (layer_norm, rms_norm):
        assert norm(np.ones(shape)).shape == shape


@pytest.mark.parametrize("name", [name for name in INFO["runnable"] if name != INFO["selected"]])
def test_on_other_instruction_set(name):
    """The numbers, and the promise of bits."""
    code = """
    import numpy as np
    import fastattn, test_layers
    rng = np.random.default_rng(0)
    for dtype in test_layers.ALL_DTYPES:
        for shape in ((2, 64, 64), (7, 130, 100), (9, 64, 64), (13, 130, 65), (40, 500, 70)):
            for activation in test_layers.ACTIVATIONS:
                test_layers.test_product(rng, shape, dtype, activation)
        for rows in (8, 14, 60):
            test_layers.test_bits_of_a_row_are_its_own(rng, dtype, rows)
        test_layers.test_limits_at_infinity(dtype, 9)
        test_layers.test_norms(rng, dtype, 333)
        test_layers.test_layouts_of_norms(rng, dtype)
    for dtype in test_layers.DTYPES:
        test_layers.test_no_less_accurate_than_numpy_in_the_mean(rng, dtype, 4)
        for activation in test_layers.ACTIVATIONS[1:]:
            test_layers.test_activations(dtype, activation)
    print(fastattn.cpu_info()["selected"])
    """
    assert fresh_process.run(code, FASTATTN_ISA=name).strip() == name


# --------------------------------------------------------------------------------- products: the object


def test_attributes_are_copies(rng):
    weight, bias = normal(rng, 6, 5), normal(rng, 5)
    linear, x = Linear(weight, bias), normal(rng, 3, 6)
    expected = linear(x)
    weight[...], bias[...] = 0, 0
    assert bits(linear(x)) == bits(expected)
    for array in (linear.weight, linear.bias):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert Linear(weight).bias is None
    assert repr(linear) == "Linear(6, 5, bias=True, dtype=float32)"


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", [(6, 5), (0, 3), (3, 0), (100, 200)])
def test_pickles_and_copies(rng, shape, dtype):
    linear, x = Linear(normal(rng, *shape, dtype=dtype), normal(rng, shape[1])), normal(rng, 9, shape[0], dtype=dtype)
    linear(x.astype(np.float64))  # makes the form in float64
    for other in (pickle.loads(pickle.dumps(linear)), copy.copy(linear), copy.deepcopy(linear)):
        assert type(other) is Linear
        assert bits(other(x)) == bits(linear(x))
        assert bits(other.weight) == bits(linear.weight) and other.dtype == linear.dtype
        assert bits(other.bias) == bits(linear.bias) and other.bias.dtype == linear.bias.dtype


def test_memory():
    """No copy of x, nor anything of the size of the result but the result; nor a copy of the matrix in a call."""
    x, linear = np.ones((2000, 500), np.float32), Linear(np.ones((500, 400), np.float16))
    out, room = np.empty((2000, 400), np.float32), 200_000
    for given in (x, np.asfortranarray(x), x[:, ::-1], x[::-2]):
        linear(given, out=out[: len(given)])
        tracemalloc.start()
        linear(given, activation="gelu", residual=out[: len(given)], out=out[: len(given)])
        layer_norm(given, residual=given)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < given.nbytes + room, peak
    tracemalloc.start()
    linear(x, out=out)
    linear(x[:4], out=out[:4])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < room


# --------------------------------------------------------------------------------------- products: errors


def refuse(error, message, function, *arguments, **named):
    with pytest.raises(error, match=message):
        function(*arguments, **named)


def test_bad_matrices():
    w = np.ones((4, 3), np.float32)
    refuse(ValueError, r"weight has shape \(4,\)", Linear, w[:, 0])
    refuse(ValueError, r"weight has shape \(1, 4, 3\)", Linear, w[None])
    refuse(TypeError, "weight.*complex64", Linear, w.astype(np.complex64))
    refuse(ValueError, r"bias has shape \(4,\); it must be \(3,\)", Linear, w, np.ones(4))
    refuse(TypeError, "bias", Linear, w, ["a"] * 3)


@pytest.mark.parametrize("rows", [2, 20])
def test_bad_calls(rows):
    linear, x = Linear(np.ones((4, 3), np.float32)), np.ones((rows, 4), np.float32)
    good = np.full((rows, 3), 7, np.float32)
    wide = np.full((rows, 7), 7, np.float32)
    read_only = good.copy()
    read_only.flags.writeable = False
    for error, message, call in (
        (ValueError, r"x has shape \(\d+, 3\); it must be \(\.\.\., 4\)", {"x": x[:, :3]}),
        (ValueError, r"x has shape \(\)", {"x": 1.0}),
        (TypeError, "x", {"x": None}),
        (ValueError, "activation must be one of None, 'relu'.*not 'tanh'", {"activation": "tanh"}),
        (ValueError, "activation", {"activation": ["relu"]}),
        (ValueError, r"multiply has shape \(3,\).*does not broadcast", {"multiply": good[0]}),
        (ValueError, r"residual has shape \(1, 3\).*does not broadcast", {"residual": good[:1]}),
        (TypeError, "residual.*complex", {"residual": good.astype(complex)}),
        (ValueError, "out", {"out": good[:1]}),
        (TypeError, "out.*float64|float64.*out", {"out": good.astype(np.float64)}),
        (ValueError, "out", {"out": read_only}),
        (ValueError, "(?s)out.*x", {"x": wide[:, :4], "out": wide[:, 3:6]}),
        (ValueError, "(?s)out.*residual", {"residual": wide[:, 1:4], "out": wide[:, 2:5]}),
        (ValueError, "(?s)out.*multiply", {"multiply": wide[:, 1:4], "out": wide[:, 2:5]}),
        (ValueError, "num_threads", {"num_threads": 0}),
    ):
        call = {"x": x, **call}
        refuse(error, message, linear, **call)
        if "out" not in call:
            refuse(error, message, linear, **call, out=good)
        assert (good == 7).all() and (wide == 7).all()


# -------------------------------------------------------------------------------------------------- norms


def check_norm(y, expected, s, weight, bias, eps, centred):
    """Within a few eps of the largest number over the deviation."""
    s = np.float64(s)
    with np.errstate(all="ignore"):
        top = np.abs(s).max(axis=-1, keepdims=True, initial=0)
        unit = np.where(top > 0, top, 1)
        middle = s / unit - (s / unit).mean(axis=-1, keepdims=True) if centred else s / unit
        root = np.hypot(np.sqrt((middle**2).mean(axis=-1, keepdims=True)), np.sqrt(eps) / unit)
        size = np.where(root > 0, np.abs(s) / unit / root + 2 * (np.abs(s).max(axis=-1, keepdims=True) > 0) / root, 0)
    bound = 8 * eps_of(y.dtype) * (size * np.abs(weight) + np.abs(expected) + np.abs(bias))
    wrong = np.abs(np.float64(y) - expected) > bound + rounding(y, expected) + 1e-37
    assert not wrong.any(), np.argwhere(wrong)[0]


@pytest.mark.parametrize("channels", [1, 2, 5, 16, 31, 333, 1000, 5001])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_norms(rng, dtype, channels):
    weight, bias = normal(rng, channels, dtype=np.float64), normal(rng, channels)
    for mean in (0, 10):
        x, residual = normal(rng, 3, 7, channels), normal(rng, 3, 7, channels, dtype=dtype)
        x = (x + mean).astype(dtype)
        s = np.float64(x) + np.float64(residual)
        for eps in (1e-5, 0, 2.0):
            with_sum = {"residual": residual, "eps": eps, "return_sum": True}
            y, total = layer_norm(x, weight, bias, **with_sum)
            assert y.dtype == total.dtype == x.dtype
            check_norm(y, reference.layer_norm(x, weight, bias, residual=residual, eps=eps), s, weight, bias, eps, True)
            y, again = rms_norm(x, weight, offset=1, **with_sum)
            expected = reference.rms_norm(x, weight, residual=residual, eps=eps, offset=1)
            check_norm(y, expected, s, np.abs(weight) + 1, 0, eps, False)
            assert bits(total) == bits(again) == bits((x.astype(accumulation_dtype(x.dtype)) + residual).astype(dtype))
            check_norm(layer_norm(x, eps=eps), reference.layer_norm(x, eps=eps), x, 1, 0, eps, True)
            check_norm(rms_norm(x, eps=eps, offset=5), reference.rms_norm(x, eps=eps), x, 1, 0, eps, False)
            assert bits(layer_norm(x, eps=eps, return_sum=True)[1]) == bits(x)


@pytest.mark.parametrize("power", [-44, -38, -30, -10, 10, 30, 38, -320, -300, -200, 150, 200, 300, 307])
def test_numbers_of_any_size(rng, power):
    """Squares that would leave the range."""
    for dtype in DTYPES:
        if not float(np.finfo(dtype).smallest_subnormal) < 10.0**power < float(np.finfo(dtype).max) / 10:
            continue
        x = (normal(rng, 4, 100, dtype=np.float64).clip(-3, 3) * 10.0**power).astype(dtype)
        for eps in (0, 1e-5):
            check_norm(layer_norm(x, eps=eps), reference.layer_norm(x, eps=eps), x, 1, 0, eps, True)
            check_norm(rms_norm(x, eps=eps), reference.rms_norm(x, eps=eps), x, 1, 0, eps, False)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 16, 100, 1000])
def test_constant_rows(channels, dtype):
    for number in (0, 0.1, -3, 1000):
        x = np.full((2, channels), number, dtype)
        assert (layer_norm(x, eps=0) == 0).all()
        bias = np.arange(channels, dtype=np.float32)
        np.testing.assert_array_equal(layer_norm(x, None, bias, eps=0).astype(np.float32), [bias.astype(dtype)] * 2)
        np.testing.assert_allclose(rms_norm(x, eps=0).astype(np.float64), np.sign(number) * np.ones_like(bias)[None] +
                                   np.zeros((2, 1)), rtol=8 * eps_of(dtype))  # fmt: skip


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_what_is_not_finite_stays_in_its_row(rng, norm):
    x = normal(rng, 5, 40)
    expected = norm(x)
    for bad in (np.nan, np.inf, -np.inf):
        spoiled = x.copy()
        spoiled[2, 7] = bad
        y = norm(spoiled)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(getattr(reference, norm.__name__)(spoiled)))
        assert bits(np.delete(y, 2, 0)) == bits(np.delete(expected, 2, 0))


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_no_channels(norm):
    y, s = norm(np.ones((3, 0), np.float32), return_sum=True)
    assert y.shape == s.shape == (3, 0)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_one_row_of_a_norm(rng, norm):
    x = normal(rng, 40)
    assert bits(norm(x)) == bits(norm(x[None]))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_layouts_of_norms(rng, dtype):
    x, residual = normal(rng, 4, 30, 33, dtype=dtype), normal(rng, 4, 30, 33)
    weight = normal(rng, 33)
    for norm in (layer_norm, rms_norm):
        expected, total = norm(x, weight, residual=residual, return_sum=True, num_threads=1)
        for threads in (2, 3):
            assert bits(norm(x, weight, residual=residual, num_threads=threads)) == bits(expected)
        assert bits(norm(x[2, 5], weight, residual=residual[2, 5])) == bits(expected[2, 5])
        for one, two, three in zip(*map(layouts, (x, residual, expected)), strict=True):
            y, s = norm(one[1], weight, residual=two[1], return_sum=True)
            assert (bits(y), bits(s)) == (bits(expected), bits(total)), one[0]
            if three[1].flags.writeable:
                out = three[1]
                out[...] = 7
                assert norm(x, weight, residual=residual, out=out) is out
                assert bits(out) == bits(expected), one[0]
        for place in (np.array, spaced, misaligned, np.asfortranarray):
            out = place(x)
            y, s = norm(out, weight, residual=residual, return_sum=True, out=out)
            assert y is out
            assert (bits(out), bits(s)) == (bits(expected), bits(total))
            out = place(residual.astype(dtype))
            wanted = norm(x, weight, residual=out.copy())
            norm(x, weight, residual=out, out=out)
            assert bits(out) == bits(wanted)
        for other in (spaced(weight), misaligned(weight), weight[::-1].copy()[::-1]):
            assert bits(norm(x, other, residual=residual)) == bits(expected)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_bad_calls_of_norms(norm):
    x, wide = np.ones((3, 4), np.float32), np.full((3, 9), 7, np.float32)
    good, read_only = np.full((3, 4), 7, np.float32), np.ones((3, 4), np.float32)
    read_only.flags.writeable = False
    for error, message, call in (
        (ValueError, r"x has shape \(\)", {"x": 1.0}),
        (TypeError, "x.*complex", {"x": x.astype(complex)}),
        (ValueError, r"weight has shape \(3,\); it must be \(4,\)", {"weight": np.ones(3)}),
        (ValueError, "weight", {"weight": np.ones((3, 4))}),
        (ValueError, "eps must be a finite number of at least 0, not -1", {"eps": -1}),
        ((ValueError, TypeError), "eps", {"eps": np.nan}),
        ((ValueError, TypeError), "eps", {"eps": None}),
        (ValueError, r"residual has shape \(4,\).*does not broadcast", {"residual": x[0]}),
        (TypeError, "return_sum", {"return_sum": "yes"}),
        (ValueError, "out", {"out": good[:2]}),
        (TypeError, "out", {"out": good.astype(np.float64)}),
        (ValueError, "out", {"out": read_only}),
        (ValueError, "(?s)out.*x", {"x": wide[:, :4], "out": wide[:, 2:6]}),
        (ValueError, "(?s)out.*residual", {"residual": wide[:, :4], "out": wide[:, 2:6]}),
        (ValueError, "(?s)out.*weight", {"weight": wide[1, 2:6], "out": wide[:, 2:6]}),
        (ValueError, "num_threads", {"num_threads": -1}),
    ):
        call = {"x": x, **call}
        refuse(error, message, norm, **call)
        if "out" not in call:
            refuse(error, message, norm, **call, out=good)
        assert (good == 7).all() and (wide == 7).all()
    if norm is layer_norm:
        refuse(ValueError, r"bias has shape \(3,\)", norm, x, bias=np.ones(3))
    else:
        refuse((ValueError, TypeError), "offset", norm, x, offset=np.inf)
