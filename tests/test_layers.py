"""Linear, layer_norm and rms_norm: right within derived bounds, and the same bits whatever stands around a row.

The error of a product is at most ``eps * (d_in / 8 + 8)`` times the sum of the absolute values of its terms, and that
of a norm a few eps of the largest number over the deviation, eps being that of the accumulation dtype. Of an int8
matrix the terms are those of ``weight * weight_scale``: its numbers are exact, and the scale adds one rounding.
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


def columns_of_int8(rng, d_in, d_out):
    """Numbers from all of int8, -128 too, and scales of either sign and of several sizes."""
    scale = normal(rng, d_out) * np.float32(10) ** rng.integers(-6, 0, d_out).astype(np.float32)
    return rng.integers(-128, 128, (d_in, d_out), dtype=np.int8), scale


def layer_of(rng, d_in, d_out, dtype, bias=None):
    """A Linear that keeps its matrix in `dtype`, the matrix that it stands for, and the dtype of its rows."""
    if dtype != np.int8:
        weight = normal(rng, d_in, d_out, dtype=dtype)
        return Linear(weight, bias), weight, dtype
    weight, scale = columns_of_int8(rng, d_in, d_out)
    return Linear(weight, bias, weight_scale=scale), weight * np.float64(scale), np.float32


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


@pytest.mark.parametrize("dtype", [np.float32, *sixteen_bits()])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_of_int8(rng, shape, dtype):
    """All settings, against the numbers that the matrix stands for."""
    rows, d_in, d_out = shape
    x, bias = normal(rng, rows, d_in, dtype=dtype), normal(rng, d_out, dtype=np.float64)
    weight, scale = columns_of_int8(rng, d_in, d_out)
    multiply, residual = normal(rng, rows, d_out, dtype=np.float64), normal(rng, rows, d_out)
    linear, matrix = Linear(weight, bias, weight_scale=scale), weight * np.float64(scale)
    assert (linear.d_in, linear.d_out, linear.dtype) == (d_in, d_out, np.int8)
    assert bits(linear.weight) == bits(weight) and bits(linear.weight_scale) == bits(scale)
    for activation in ACTIVATIONS:
        y = linear(x, activation=activation)
        assert y.dtype == dtype
        check_product(y, x, matrix, bias, activation)
        y = linear(x, activation=activation, multiply=multiply, residual=residual, num_threads=2)
        assert y.dtype == dtype
        check_product(y, x, matrix, bias, activation, multiply, residual)
    check_product(Linear(weight, weight_scale=scale)(x, residual=residual), x, matrix, None, None, None, residual)
    check_product(Linear(weight, weight_scale=0.37)(x), x, weight * float(np.float32(0.37)), None)


def test_int8_is_that_of_the_widened_matrix(rng):
    """With a scale of 1 all bits are those of the same numbers in float32; a power of two multiplies the sums only."""
    weight = rng.integers(-128, 128, (300, 70), dtype=np.int8)
    power = np.ldexp(np.float32(1), rng.integers(-20, 20, 70)).astype(np.float32)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 50):
        x = normal(rng, rows, 300)
        wide = Linear(weight.astype(np.float32))(x)
        assert bits(Linear(weight, weight_scale=1)(x)) == bits(wide), rows
        assert bits(Linear(weight, weight_scale=power)(x)) == bits(wide * power), rows


def test_each_int8_number_is_exact():
    """All 256, in every place of a vector, few rows and many: one row of ones picks them out."""
    numbers = np.arange(-128, 128, dtype=np.int8)
    weight = np.stack([np.roll(numbers, shift) for shift in range(40)])
    scale = np.float32(0.1) * np.arange(1, 257, dtype=np.float32)
    for x in (np.eye(40, dtype=np.float32), *np.eye(40, dtype=np.float32)[:, None]):
        y = Linear(weight, weight_scale=scale)(x)
        np.testing.assert_array_equal(y, x @ weight.astype(np.float32) * scale)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (40, 30), (700, 300), (0, 3), (3, 0), (200_000, 2)])
def test_quantized_columns(rng, shape, dtype):
    """They are those of the reference, and off by half a scale at most."""
    weight = normal(rng, *shape, dtype=np.float64) * 10.0 ** rng.integers(-3, 3, shape[1])
    weight[rng.random(shape) < 0.1] = 0
    weight = weight.astype(dtype)
    linear = Linear(weight, dtype="int8")
    numbers, scale = reference.columns_of_int8(weight)
    assert (linear.dtype, linear.weight.dtype, linear.weight_scale.dtype) == (np.int8, np.int8, np.float32)
    np.testing.assert_array_equal(linear.weight, numbers)
    np.testing.assert_array_equal(linear.weight_scale, scale)
    wrong = np.abs(linear.weight * scale - np.float64(weight))
    assert (wrong <= scale / 2 * (1 + 1e-12)).all()
    assert linear.weight.min(initial=0) >= -127
    x = normal(rng, 3, shape[0])
    if len(weight) < 1000:
        check_product(linear(x), x, numbers * scale, None)


def test_numbers_between_two_integers_become_even():
    column = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, 63.5, 64.5, -127])
    for weight in (np.float32(column), np.float16(column), column, column * 2.0**60, column * 2.0**-120):
        linear = Linear(weight[:, None], dtype=np.int8)
        np.testing.assert_array_equal(linear.weight[:, 0], [127, 0, 2, 2, 0, -2, 64, 64, -127])


def test_columns_of_any_size():
    """Zeros, numbers that are denormal in float32 and the largest of each dtype."""
    least, most = float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max)
    tiny = np.finfo(np.float32).tiny
    weight = np.array([[0, least, 1e-40, 1e-300, most, most * 126], [0, 0, -1e-40, 0, -most / 4, 1]])
    linear = Linear(weight, dtype=np.int8)
    np.testing.assert_array_equal(linear.weight, [[0, 0, 0, 0, 127, 127], [0, 0, 0, 0, -32, 0]])
    assert linear.weight_scale[0] == 0 and (linear.weight_scale[1:4] == tiny).all()
    assert np.isfinite(linear.weight_scale).all()
    large = Linear(np.float32([[most], [-most]]), dtype=np.int8)
    np.testing.assert_array_equal(large(np.eye(2, dtype=np.float32))[:, 0] > 0, [True, False])


@pytest.mark.parametrize("of_weight", ALL_DTYPES)
@pytest.mark.parametrize("kept", ALL_DTYPES)
def test_dtype_of_what_is_kept(rng, kept, of_weight):
    weight = normal(rng, 70, 40, dtype=of_weight)
    linear, converted = Linear(weight, normal(rng, 40), dtype=kept), weight.astype(kept)
    assert linear.dtype == kept and linear.weight_scale is None
    assert bits(linear.weight) == bits(converted)
    x = normal(rng, 3, 70, dtype=kept)
    assert bits(linear(x)) == bits(Linear(converted, linear.bias)(x))
    integers = Linear(np.int8([[1, -128]]), dtype=kept)
    assert integers.dtype == kept
    np.testing.assert_array_equal(integers.weight.astype(np.float64), [[1, -128]])


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
@pytest.mark.parametrize("dtype", [*ALL_DTYPES, np.int8])
def test_bits_of_a_row_are_its_own(rng, dtype, rows):
    """They depend on the row, and on whether there are more than eight."""
    linear, _, of_x = layer_of(rng, 150, 130, dtype, normal(rng, 130))
    x = normal(rng, rows, 150, dtype=of_x)
    multiply, residual = normal(rng, rows, 130), normal(rng, rows, 130)

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
@pytest.mark.parametrize("dtype", [*ALL_DTYPES, np.int8])
def test_layouts_of_memory(rng, dtype, rows):
    linear, _, of_x = layer_of(rng, 33, 50, dtype)
    x, weight, scale = normal(rng, 2, rows, 33, dtype=of_x), np.array(linear.weight), linear.weight_scale
    multiply, residual = normal(rng, 2, rows, 50), normal(rng, 2, rows, 50, dtype=of_x)
    expected = linear(x, activation="silu", multiply=multiply, residual=residual)
    for one, two, three, four in zip(*map(layouts, (x, multiply, residual, expected)), strict=True):
        name = one[0]
        y = linear(one[1], activation="silu", multiply=two[1], residual=three[1])
        assert bits(y) == bits(expected), name
        if four[1].flags.writeable:
            out = four[1]
            out[...] = 7
            assert linear(x, activation="silu", multiply=multiply, residual=residual, out=out) is out
            assert bits(out) == bits(expected), name
    for name, other in layouts(weight):
        again = Linear(other, weight_scale=scale)
        assert bits(again(x, activation="silu", multiply=multiply, residual=residual)) == bits(expected), name
    zero = np.broadcast_to(x[:, :1], x.shape)
    assert bits(linear(zero)) == bits(linear(zero.copy()))


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
            test_layers.test_bits_of_a_row_are_its_own(rng, np.int8, rows)
        test_layers.test_limits_at_infinity(dtype, 9)
        test_layers.test_norms(rng, dtype, 333)
        test_layers.test_layouts_of_norms(rng, dtype)
    for shape in ((2, 64, 64), (7, 130, 100), (9, 64, 64), (13, 130, 65), (40, 500, 70)):
        test_layers.test_product_of_int8(rng, shape, np.float32)
    test_layers.test_int8_is_that_of_the_widened_matrix(rng)
    test_layers.test_each_int8_number_is_exact()
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
    assert Linear(weight).bias is None and linear.weight_scale is None
    assert repr(linear) == "Linear(6, 5, bias=True, dtype=float32)"


def test_attributes_of_int8_are_copies(rng):
    weight, scale = columns_of_int8(rng, 6, 5)
    linear, x = Linear(weight, weight_scale=scale), normal(rng, 3, 6)
    expected = linear(x)
    weight[...], scale[...] = 0, 0
    assert bits(linear(x)) == bits(expected)
    for array in (linear.weight, linear.weight_scale):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert repr(linear) == "Linear(6, 5, bias=False, dtype=int8)"


def test_bytes_that_are_kept():
    weight, bias = np.ones((300, 1280), np.float32), np.ones(1280, np.float32)
    for dtype, size in (("float64", 8), ("float32", 4), ("float16", 2), ("int8", 1)):
        linear = Linear(weight, bias, dtype=dtype)
        rest = 2 * 1280 * (8 if size == 8 else 4) if size != 8 else 1280 * 12
        rest += 2 * 1280 * 4 if size == 1 else 0
        assert linear.nbytes == weight.size * size + rest, dtype
    linear = Linear(weight)
    linear(np.ones((1, 300)))
    assert linear.nbytes == weight.size * 12, "the form in float64 counts too"


@pytest.mark.parametrize("dtype", [*ALL_DTYPES, np.int8])
@pytest.mark.parametrize("shape", [(6, 5), (0, 3), (3, 0), (100, 200)])
def test_pickles_and_copies(rng, shape, dtype):
    linear, _, of_x = layer_of(rng, *shape, dtype, normal(rng, shape[1]))
    x = normal(rng, 9, shape[0], dtype=of_x)
    if dtype != np.int8:
        linear(x.astype(np.float64))  # makes the form in float64
    for other in (pickle.loads(pickle.dumps(linear)), copy.copy(linear), copy.deepcopy(linear)):
        assert type(other) is Linear
        assert bits(other(x)) == bits(linear(x))
        assert bits(other.weight) == bits(linear.weight) and other.dtype == linear.dtype
        assert bits(other.bias) == bits(linear.bias) and other.bias.dtype == linear.bias.dtype
        if dtype == np.int8:
            assert bits(other.weight_scale) == bits(linear.weight_scale)
        else:
            assert other.weight_scale is None


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
    for small in (linear, Linear(np.ones((500, 400), np.float32), dtype=np.int8)):
        tracemalloc.start()
        small(x, out=out)
        small(x[:4], out=out[:4])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < room
    weight = np.ones((1500, 2000), np.float32)
    tracemalloc.start()
    Linear(weight, dtype=np.int8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * weight.size, "no more than the numbers, unpacked and packed, and a block of them in float64"


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
    refuse(TypeError, "dtype must be float32, float64, float16, ml_dtypes.bfloat16 or int8, not int16",
           Linear, w, dtype=np.int16)  # fmt: skip
    refuse(TypeError, "dtype must be", Linear, w, dtype="no dtype")


def test_bad_int8_matrices():
    w, i = np.ones((4, 3), np.float32), np.ones((4, 3), np.int8)
    refuse(ValueError, "weight is int8 and weight_scale is not given", Linear, i, dtype=np.int8)
    refuse(ValueError, "kept as int8, not as float16: pass weight [*] weight_scale", Linear, i, weight_scale=1,
           dtype=np.float16)  # fmt: skip
    for other in (w, np.ones((4, 3), np.uint8), np.ones((4, 3), int), np.ones((4, 3), bool), [[1, 2, 3]]):
        refuse(TypeError, "weight_scale is for an int8 weight, and weight has dtype", Linear, other, weight_scale=1)
    for scale in (np.ones(4), np.ones((3, 1)), np.ones((1, 3)), np.ones(1), []):
        refuse(ValueError, r"weight_scale has shape .*; it must be \(3,\)", Linear, i, weight_scale=scale)
    refuse(ValueError, r"weight_scale\[1\] is nan", Linear, i, weight_scale=[1, np.nan, np.inf])
    refuse(ValueError, r"weight_scale\[2\] is 1e\+300", Linear, i, weight_scale=[1, 1, 1e300])
    for scale in (np.nan, np.inf, "1", None.__class__, True, 1j, ["a"] * 3, np.ones(3, complex)):
        refuse((TypeError, ValueError), "weight_scale", Linear, i, weight_scale=scale)
    refuse(TypeError, "weight_scale is a masked array", Linear, i, weight_scale=np.ma.masked_equal([1.0, 2, 3], 2))
    refuse(ValueError, r"weight has shape \(3,\)", Linear, i[0], weight_scale=1)
    for bad in (np.nan, np.inf, -np.inf):
        for dtype in ALL_DTYPES:
            spoiled = w.astype(dtype)
            spoiled[2, 1] = bad
            refuse(ValueError, rf"weight\[2, 1\] is {bad}: with dtype int8 all", Linear, spoiled, dtype=np.int8)
    refuse(ValueError, r"weight\[0, 1\] is -1e\+300", Linear, [[1.0, -1e300]], dtype=np.int8)


@pytest.mark.parametrize("rows", [2, 20])
def test_bad_rows_of_int8(rows):
    """There are no sums in float64 of them; and nothing is written to out."""
    linear = Linear(np.ones((4, 3), np.float32), dtype=np.int8)
    out = np.full((rows, 3), 7, np.float32)
    for dtype in (np.float64, int, np.int8, bool, np.uint8):
        x = np.ones((rows, 4), dtype)
        for more in ({}, {"out": out}):
            message = rf"x has dtype {x.dtype}: an int8 weight .* pass x.astype\(numpy.float32\)"
            refuse(TypeError, message, linear, x, **more)
    refuse(TypeError, "x has dtype float64", linear, [[1.0] * 4])
    refuse(TypeError, "x has dtype complex64", linear, np.ones((rows, 4), np.complex64))
    refuse(ValueError, r"x has shape", linear, np.ones((rows, 5), np.float32))
    assert (out == 7).all()


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
