"""softmax, log_softmax and logsumexp against the reference and scipy: axes, dtypes, masks, extremes."""

import numpy as np
import pytest
from problems import AWKWARD, DTYPES, layouts, sixteen_bits
from scipy import special
from tolerances import assert_softmax, assert_within

import fastattn
from fastattn import reference

FUNCTIONS = ("softmax", "log_softmax", "logsumexp")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [*AWKWARD, 1000, 5000])
def test_lengths(rng, length, dtype):
    assert_softmax(rng.standard_normal((5, length)).astype(dtype) * 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [-1, 0, 1, 2, -3, None, (0, 1), (0, 2), (2, 1), (0, 1, 2), (-1,)])
def test_axes(rng, axis, dtype):
    x = rng.standard_normal((7, 18, 5)).astype(dtype)
    assert_softmax(x, axis)
    for name in FUNCTIONS:
        ours = getattr(fastattn, name)(x, axis=axis)
        np.testing.assert_allclose(ours, getattr(special, name)(x, axis=axis), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ndim", [1, 2, 3, 4, 5, 6])
def test_number_of_axes(rng, ndim):
    assert_softmax(rng.standard_normal((2, 3, 2, 3, 2, 19)[-ndim:]).astype(np.float32))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 3), (0, 0)])
@pytest.mark.parametrize("axis", [-1, 0, None])
def test_empty(shape, axis):
    assert_softmax(np.empty(shape, dtype=np.float32), axis)


def test_one_row_logsumexp_value(rng):
    x = rng.standard_normal(100)
    assert abs(fastattn.logsumexp(x) - special.logsumexp(x)) < 1e-13
    assert abs(fastattn.logsumexp(x.reshape(10, 10), axis=None) - special.logsumexp(x)) < 1e-13


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.int32, np.int64, np.uint64])
def test_integers_become_float64(rng, dtype):
    x = rng.integers(0, 2 if dtype is bool else 100, (4, 37)).astype(dtype)
    assert fastattn.softmax(x).dtype == np.float64
    assert_softmax(x)


@pytest.mark.parametrize("dtype", sixteen_bits())
@pytest.mark.parametrize("axis", [-1, 0, None])
def test_sixteen_bits(rng, axis, dtype):
    x = (4 * rng.standard_normal((33, 130))).astype(dtype)
    assert_softmax(x, axis)
    assert_softmax(x, axis, mask=rng.random((33, 130)) < 0.5)


def test_array_likes():
    assert_softmax([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]])
    assert_softmax([1, 2, 3])


@pytest.mark.parametrize("mask_shape", [(6, 4, 33), (4, 33), (33,), (6, 1, 1), (4, 1), (1, 1, 33)])
@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2), None])
def test_masks(rng, mask_shape, axis):
    x = rng.standard_normal((6, 4, 33)).astype(np.float32)
    mask = rng.random(mask_shape) < 0.6
    assert_softmax(x, axis, mask=mask)


def test_hidden_rows_and_entries(rng):
    x = rng.standard_normal((5, 40)).astype(np.float32)
    mask = rng.random((5, 40)) < 0.5
    mask[2] = False
    x[~mask] = np.nan
    x[2, ::2] = np.inf
    weights, logs, sums = (getattr(fastattn, name)(x, mask=mask) for name in FUNCTIONS)
    assert (weights[~mask] == 0).all()
    assert (weights[2] == 0).all()
    assert (logs[~mask] == -np.inf).all()
    assert sums[2] == -np.inf
    assert np.isfinite(weights).all()
    assert_softmax(x, mask=mask)


def test_all_true_mask_changes_nothing(rng):
    x = rng.standard_normal((5, 77)).astype(np.float32)
    for name in FUNCTIONS:
        function = getattr(fastattn, name)
        np.testing.assert_allclose(function(x, mask=np.ones(77, dtype=bool)), function(x), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e2, 1e4, 1e30])
def test_scales(rng, scale, dtype):
    x = (rng.standard_normal((6, 130)) * scale).astype(dtype)
    assert_softmax(x)
    assert np.isfinite(fastattn.softmax(x)).all()
    np.testing.assert_allclose(fastattn.softmax(x).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["min", "max"])
def test_largest_numbers_are_ordinary(dtype, name):
    """A row of the most negative (or largest) numbers is uniform: no exponent and no product overflows."""
    x = np.full((3, 50), getattr(np.finfo(dtype), name), dtype=dtype)
    weights = fastattn.softmax(x)
    np.testing.assert_allclose(weights, 1 / 50, rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_allclose(fastattn.logsumexp(x), x[:, 0], rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_do_not_matter(rng, dtype):
    """Adding a number that changes no difference changes no weight."""
    x = rng.integers(-8, 8, (4, 100)).astype(dtype)
    for offset in (1024, -1024, 2**20, -(2**20)):
        np.testing.assert_allclose(fastattn.softmax(x + dtype(offset)), fastattn.softmax(x), rtol=1e-6)


def test_nan_and_infinities(rng):
    x = rng.standard_normal((4, 70)).astype(np.float32)
    x[0, 3] = np.nan
    x[1, 5] = -np.inf
    x[2, 68] = np.inf
    weights = fastattn.softmax(x)
    assert np.isnan(weights[0]).all()
    assert weights[1, 5] == 0
    assert np.isfinite(weights[[1, 3]]).all()
    assert np.isnan(weights[2, 68])
    assert np.isnan(fastattn.logsumexp(x)[0])
    assert fastattn.log_softmax(x)[1, 5] == -np.inf
    assert_softmax(x[[1, 3]])
    assert fastattn.logsumexp(np.full((1, 9), -np.inf))[0] == -np.inf


def test_log_softmax_where_softmax_underflows():
    x = np.array([[0.0, -200.0, -1000.0]], dtype=np.float32)
    np.testing.assert_allclose(fastattn.log_softmax(x), x, rtol=1e-6)


def test_long_rows_stay_accurate(rng):
    assert_softmax(rng.standard_normal((2, 100_000)).astype(np.float32))
    weights = fastattn.softmax(np.zeros((1, 100_000), dtype=np.float32))
    np.testing.assert_allclose(weights, 1e-5, rtol=8 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [-1, 0, (0, 2)])
def test_layouts(rng, dtype, axis):
    x = rng.standard_normal((4, 19, 23)).astype(dtype)
    mask = rng.random((4, 19, 23)) < 0.7
    expected = {name: getattr(fastattn, name)(x, axis, mask=mask) for name in FUNCTIONS}
    for (layout, other), (_, other_mask) in zip(layouts(x), layouts(mask), strict=True):
        assert_softmax(other, axis, mask=other_mask)
        for name in FUNCTIONS:
            result = getattr(fastattn, name)(other, axis, mask=other_mask)
            np.testing.assert_array_equal(result, expected[name], err_msg=f"{name}, {layout}")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("axis", [-1, 0, None])
def test_out(rng, name, axis):
    function = getattr(fastattn, name)
    x = rng.standard_normal((6, 21)).astype(np.float32)
    expected = function(x, axis)
    out = np.full_like(expected, 7)
    assert function(x, axis, out=out) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("shape", [(50, 40), (40,), (3, 4, 129)])
def test_softmax_in_place(rng, shape):
    x = rng.standard_normal(shape).astype(np.float32)
    expected = fastattn.softmax(x)
    assert fastattn.softmax(x, out=x) is x
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_threads_do_not_change_bits(rng, name):
    x = rng.standard_normal((301, 2003)).astype(np.float32)
    function = getattr(fastattn, name)
    expected = function(x, num_threads=1)
    for num_threads in (2, 3, 7):
        np.testing.assert_array_equal(function(x, num_threads=num_threads), expected)
    np.testing.assert_array_equal(function(x[100:103]), expected[100:103])


def test_input_is_left_alone(rng):
    x = rng.standard_normal((9, 33)).astype(np.float32)
    before = x.copy()
    for name in FUNCTIONS:
        getattr(fastattn, name)(x)
    np.testing.assert_array_equal(x, before)


def test_the_check_can_fail(rng):
    """A softmax that is off by a few times the bound, or that sums along the wrong axis, is found out."""

    class Perturbed:
        log_softmax, logsumexp = reference.log_softmax, reference.logsumexp

        @staticmethod
        def softmax(x, axis, mask=None):
            return (reference.softmax(x, axis, mask=mask) * (1 + 1e-4)).astype(np.float32)

    class WrongAxis(Perturbed):
        @staticmethod
        def softmax(x, axis, mask=None):
            return reference.softmax(x, 0, mask=mask).astype(np.float32)

    x = rng.standard_normal((20, 20)).astype(np.float32)
    for wrong in (Perturbed, WrongAxis):
        with pytest.raises(AssertionError, match="softmax"):
            assert_softmax(x, functions=wrong)
    with pytest.raises(AssertionError):
        assert_within(np.array([np.nan]), np.array([1.0]), 1e9, "NaN")
    with pytest.raises(AssertionError):
        assert_within(np.array([1.0]), np.array([-np.inf]), 1e9, "infinity")


@pytest.mark.parametrize("length", [2047, 2048, 2049, 2055, 2063, 4097, 6150])
def test_rows_about_the_length_of_a_run(rng, length):
    """Sums are cut into runs: what is left over behind the last whole vector counts once, also in place."""
    x = rng.standard_normal((3, length)).astype(np.float32)
    expected = reference.softmax(x)
    np.testing.assert_allclose(fastattn.softmax(x), expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(fastattn.logsumexp(x), reference.logsumexp(x), rtol=1e-6)
    np.testing.assert_allclose(fastattn.log_softmax(x), reference.log_softmax(x), rtol=1e-5)
    fastattn.softmax(x, out=x)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-9)


def test_infinity_dominates_a_sum():
    assert fastattn.logsumexp(np.array([np.inf, 0.0])) == np.inf
    assert np.isnan(fastattn.logsumexp(np.array([np.inf, np.nan])))
    np.testing.assert_array_equal(fastattn.log_softmax(np.array([np.inf, 0.0])), [np.nan, -np.inf])
