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
    """Adding a constant that changes no difference changes no weight."""
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
    """A softmax that is off by a few times the bound, or that sums along the wrong axis, is detected."""

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
    """Sums are split into blocks: what remains after the last whole vector counts once, also in place."""
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


# ---------------------------------------------------------------- accuracy


def exactly(x):
    """The three functions along the last axis in long double, and the maximum."""
    x = x.astype(np.longdouble)
    largest = x.max(-1, keepdims=True)
    distance = x - largest
    maxima = np.sum(distance == 0, -1, keepdims=True)
    others = np.sum(np.sort(np.where(distance == 0, 0, np.exp(distance)), -1), -1, keepdims=True)
    log_sum = np.log(maxima.astype(np.longdouble)) + np.log1p(others / maxima)
    return np.exp(distance) / (maxima + others), distance - log_sum, (largest + log_sum)[..., 0]


def exact_distances(rng, kind, shape):
    """Numbers whose differences from the largest are exact: the remaining error is the functions' own."""
    if kind == "zeros and ones":
        return rng.integers(0, 2, shape)
    if kind == "whole":
        return rng.integers(0, 31, shape)
    if kind == "halves":
        return rng.integers(0, 201, shape) / 2
    x = np.full(shape, 3.25)
    if kind == "one large":
        x[:, -1] += 20
    return x


@pytest.mark.parametrize("kind", ["zeros and ones", "whole", "halves", "one large", "constant"])
@pytest.mark.parametrize("length", [7, 100, 2000, 50257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_a_good_library(rng, dtype, length, kind):
    """
    A few eps, for rows of any length. An exponential is within 1 eps, a tree of eight additions adds 1.5, the sum of
    the trees half an eps and that of the lanes at most 2, quotient and product half an eps each: 6 in the worst case,
    and never half of that over 10,000 numbers.
    """
    x = exact_distances(rng, kind, (max(3, 10_000 // length), length)).astype(dtype)
    finfo = np.finfo(dtype)
    floor = finfo.smallest_subnormal / finfo.eps
    for name, expected in zip(FUNCTIONS, exactly(x), strict=True):
        error = abs(getattr(fastattn, name)(x, axis=-1) - expected) / np.maximum(abs(expected), floor)
        assert error.max() <= 3 * finfo.eps, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_entry_does_not_swallow_the_others(dtype):
    """log_softmax of an entry far above the others is minus the contribution of these, however small."""
    finfo = np.finfo(dtype)
    for distance in (20, 60, 80, *((300, 700) if dtype == np.float64 else ())):
        x = np.array([0, -distance, -distance], dtype)
        np.testing.assert_allclose(
            fastattn.log_softmax(x)[0], -np.log1p(2 * np.exp(-float(distance))), rtol=3 * finfo.eps
        )
        np.testing.assert_allclose(fastattn.logsumexp(x), np.log1p(2 * np.exp(-float(distance))), rtol=3 * finfo.eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [2, 16, 100, 1000])
def test_denormal_weights(dtype, length):
    """Weights below the normal range are rounded once more, but not flushed to 0."""
    finfo = np.finfo(dtype)
    lowest = int(np.log(float(finfo.smallest_subnormal))) if dtype == np.float32 else -744
    x = np.zeros(length, dtype)
    x[1:] = np.linspace(np.log(finfo.smallest_normal) + 3, lowest - 5, length - 1)
    weights = fastattn.softmax(x)
    expected = exactly(x)[0]
    assert (abs(weights - expected) <= finfo.smallest_subnormal + 700 * finfo.eps * expected).all()
    assert weights[-1] in (0, expected[-1]) or length == 2


# ---------------------------------------------------------------- rows side by side


def along(x, axis):
    """The rows along one or more axes, contiguous: (rows, elements)."""
    axes = [a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))]
    others = [a for a in range(x.ndim) if a not in axes]
    return np.ascontiguousarray(x.transpose(*others, *sorted(axes))).reshape(
        *(x.shape[a] for a in others), np.prod([x.shape[a] for a in axes], dtype=int)
    )


def assert_bits_of_contiguous_rows(x, axis, mask=None):
    rows = along(x, axis)
    rows_mask = None if mask is None else along(np.broadcast_to(mask, x.shape), axis)
    for name in FUNCTIONS:
        function = getattr(fastattn, name)
        y = function(x, axis=axis, mask=mask)
        expected = function(rows, axis=-1, mask=rows_mask)
        y = y if name == "logsumexp" else along(y, axis)
        known = ~np.isnan(y)
        assert (known == ~np.isnan(expected)).all()
        assert y[known].tobytes() == expected[known].tobytes(), name


COLUMNS = [
    ((7, 5), 0),
    ((300, 70), 0),
    ((1, 70), 0),
    ((129, 64), 0),
    ((1030, 130), 0),
    ((9000, 40), 0),
    ((9000, 5), 0),
    ((3, 40, 50), 1),
    ((6, 40, 50), (0, 1)),
    ((40, 3, 70), (0, 1)),
    ((60, 40, 5), (0, 2)),
    ((2, 3, 4, 5, 60), (1, 3)),
]


@pytest.mark.parametrize("dtype", [*DTYPES, np.float16])
@pytest.mark.parametrize(("shape", "axis"), COLUMNS, ids=str)
def test_other_axes_have_the_bits_of_the_last(rng, shape, axis, dtype):
    x = (4 * rng.standard_normal(shape)).astype(dtype)
    for view in (x, x[::-1], x[..., ::-1], x[..., ::2]):
        assert_bits_of_contiguous_rows(view, axis)
        assert_bits_of_contiguous_rows(view, axis, rng.random(view.shape) < 0.5)
        assert_bits_of_contiguous_rows(view, axis, rng.random(view.shape[-1:]) < 0.5)
    x[rng.random(shape) < 0.01] = -np.inf
    x[rng.random(shape) < 0.001] = np.nan
    x[rng.random(shape) < 0.001] = np.inf
    assert_bits_of_contiguous_rows(x, axis)
    assert_bits_of_contiguous_rows(x, axis, rng.random(shape) < 0.5)


@pytest.mark.parametrize("dtype", [*DTYPES, np.float16])
@pytest.mark.parametrize("shape", [(130, 70), (9000, 40)])
def test_other_axes_into_out(rng, shape, dtype):
    """Any strides of out, and x itself; the same bits on any number of threads."""
    x = rng.standard_normal(shape).astype(dtype)
    for name in FUNCTIONS[:2]:
        function = getattr(fastattn, name)
        expected = function(x, axis=0)
        columns = np.empty(shape[::-1], dtype).T
        gaps = np.full((shape[0], 2 * shape[1]), 7, dtype)
        for out in (np.empty(shape, dtype), columns, gaps[:, ::2]):
            assert function(x, axis=0, out=out) is out
            assert out.tobytes() == expected.tobytes()
            assert function(x, axis=0, num_threads=1).tobytes() == expected.tobytes()
        assert (gaps[:, 1::2] == 7).all()
        assert function(x, axis=-1, out=columns).tobytes() == function(x, axis=-1).tobytes()
        y = x.copy()
        assert function(y, axis=0, out=y).tobytes() == expected.tobytes()
        misaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(dtype).reshape(shape)
        misaligned[...] = x
        assert function(misaligned, axis=0).tobytes() == expected.tobytes()
