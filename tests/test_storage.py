"""float16 and bfloat16 storage: all 65,536 numbers, read and written, and every tie between two of them.

The calls are such that only the conversion can go wrong: a weighted sum over one key, a ReLU of a bias, the part of a
row that `apply_rotary` copies. Expected is what NumPy and ml_dtypes give for the same numbers: round to nearest, ties
to even.
"""

import fresh_process
import numpy as np
import pytest
from problems import sixteen_bits

import fastattn
from fastattn.positions import apply_rotary

info = fastattn.cpu_info()


def patterns(dtype):
    """All numbers of a 16-bit dtype, in the order of their bits."""
    return np.arange(2**16, dtype=np.uint16).view(dtype)


def widened(x):
    """The same numbers in float32, which represents all of them."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return x.astype(np.float32)


def finite(dtype):
    """Its finite numbers, including both zeros."""
    x = patterns(dtype)
    return x[np.isfinite(widened(x))]


def awkward(dtype):
    """
    Non-negative float32 numbers that are hard to round: each number of the dtype, each tie between neighbours with the
    adjacent float32 numbers, subnormal ones of both dtypes, and numbers that only just overflow or do not.
    """
    x = finite(dtype)
    x = widened(x[~np.signbit(x)]).astype(np.float64)
    # Above the largest number, rounding works as if there were one more.
    ties = ((x + np.append(x[1:], 2 * x[-1] - x[-2])) / 2).astype(np.float32)
    up, down = np.float32(np.inf), np.float32(0)
    x = x.astype(np.float32)
    return np.concatenate([
        x,
        ties,
        *(np.nextafter(y, toward) for y in (x, ties) for toward in (down, up)),
        np.finfo(np.float32).smallest_subnormal * np.arange(4, dtype=np.float32),
        np.array([65504, 65519.996, 65520, 65536, 1e5, 1e38, np.finfo(np.float32).max], dtype=np.float32),
    ])  # fmt: skip


def narrowed(x, dtype):
    """Float32 numbers converted by the dtype's own library."""
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(dtype)


def same(actual, expected, what):
    """The same bits, except that any NaN matches a NaN."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    itemsize = actual.dtype.itemsize
    got, wanted = (np.ascontiguousarray(x).view(f"u{itemsize}") for x in (actual, expected))
    wrong = (got != wanted) & ~(np.isnan(widened(actual)) & np.isnan(widened(expected)))
    if wrong.any():
        first = tuple(np.argwhere(wrong)[0].tolist())
        raise AssertionError(
            f"{what}: {np.count_nonzero(wrong)} of {wrong.size}; the first, at {first}, is {float(actual[first])!r}"
            f" ({got[first]:#x}) instead of {float(expected[first])!r} ({wanted[first]:#x})"
        )


def without_minus_zero(x):
    """A weighted sum of nothing but zeros is +0."""
    return np.where(x == 0, np.zeros((), x.dtype), x)


# Rows of values and results: a vector and a few numbers long, so that loops and their remainders are both used.
SIGNS = np.array([1, -1, -1] * 7)


def check_narrowing(dtype):
    """The weight of the only key, max(bias, 0), times 1 and -1: any float32 becomes an output."""
    x = awkward(dtype)
    # + 0: the sum of a product is +0 where that is -0; underflow keeps its sign.
    expected = narrowed(x[:, None] * SIGNS.astype(np.float32) + np.float32(0), dtype)
    key, value = np.zeros((1, 1), dtype), SIGNS.astype(dtype)[None]
    for heads in (1, x.size):  # many queries in one head, or one in each of many
        shape = (heads, x.size // heads, -1)
        wide = np.zeros((x.size, 2 * SIGNS.size), dtype)
        for out in (None, np.zeros(expected.shape, dtype), wide[:, ::2]):
            result = fastattn.dot_product_attention(
                np.zeros((*shape[:2], 1), dtype), key, value, bias=x.reshape(shape), activation="relu", scale=1.0,
                out=None if out is None else out.reshape(shape),
            )  # fmt: skip
            same(result.reshape(expected.shape), expected, f"to {np.dtype(dtype)}, {heads} heads")
            assert out is None or np.shares_memory(result, out)
        assert not wide[:, 1::2].any()


def check_there_and_back(dtype):
    """The channels that apply_rotary does not rotate are copied, whatever they are."""
    x = np.concatenate([np.zeros((16, 2), dtype), patterns(dtype).reshape(16, -1)], axis=-1)
    for source in (x, np.asfortranarray(x), x[:, ::-1].copy()[:, ::-1]):
        for out in (None, np.empty(x.shape, dtype), np.empty(x.shape, dtype, order="F")):
            result = apply_rotary(source, rotary_dim=2, out=out)
            same(result[:, 2:], x[:, 2:], f"{np.dtype(dtype)} there and back")
    # In place.
    apply_rotary(x, rotary_dim=2, out=x)
    same(x[:, 2:].ravel(), patterns(dtype), f"{np.dtype(dtype)} in place")


def check_widening(dtype):
    """One of two merged parts has all the weight; it is read in 16 bits and written in 32."""
    x = patterns(dtype).reshape(64, -1)
    lse = np.zeros(64, np.float32)
    for source in (x, np.asfortranarray(x), x[:, ::-1].copy()[:, ::-1]):
        out, merged = fastattn.merge_attention([source, np.ones(x.shape, np.float32)], [lse, lse - np.inf])
        same(out, without_minus_zero(widened(x)), f"from {np.dtype(dtype)}")
        same(merged, lse, "lse")
    # A bias may have its own dtype: the log-sum-exp of the only score is that score.
    x = finite(dtype)
    _, lse = fastattn.dot_product_attention(
        np.zeros((x.size, 1), np.float32), *np.zeros((2, 1, 1), np.float32), bias=x[:, None], return_lse=True
    )
    same(lse, without_minus_zero(widened(x)), f"from a bias in {np.dtype(dtype)}")


def check_attention(dtype):
    """Each query sees one key: its score times 1 is the log-sum-exp, its value the output."""
    x = finite(dtype)
    one = np.ones_like(x)
    values = np.where(SIGNS > 0, x[:, None], -x[:, None])
    for heads in (1, x.size):  # many keys, of which a window leaves one visible, or one in each of many heads
        shape = (heads, x.size // heads, -1)
        for query, key in ((one, x), (x, one)):
            out, lse = fastattn.dot_product_attention(
                *(y.reshape(shape) for y in (query, key, values)),
                window_size=0, scale=1.0, bias=np.zeros(1, np.float32),  # keeps scores in nats
                return_lse=True,
            )  # fmt: skip
            same(lse.ravel(), without_minus_zero(widened(x)), f"scores of {np.dtype(dtype)}, {heads} heads")
            same(out.reshape(values.shape), without_minus_zero(values), f"values of {np.dtype(dtype)}, {heads} heads")
    for special in (np.inf, -np.inf, np.nan):
        value = np.full((1, SIGNS.size), special).astype(dtype)
        same(fastattn.dot_product_attention(one[:1, None], one[:1, None], value), value, "not finite")


def check_decode(dtype):
    """Four equal keys and values of whole vectors, which decode widens in registers: a score is the output where values
    are 1, times a ReLU; a value the mean of four."""
    x = patterns(dtype)
    rows = np.repeat(np.where(np.isfinite(widened(x)), x, dtype(0)).reshape(-1, 1, 64), 4, axis=1)
    ones = np.ones((4, 64), dtype)
    for sign in (1, -1):
        chosen = sign * np.eye(64, dtype=np.float32)[:, None, None]
        scores = fastattn.dot_product_attention(chosen, rows, ones, activation="relu", scale=1.0)
        expected = np.maximum(sign * widened(rows[:, 0]).T, 0)[:, :, None, None]
        same(scores, np.broadcast_to(expected, scores.shape), f"keys of {np.dtype(dtype)}, times {sign}")
    values = np.repeat(x.reshape(-1, 1, 64), 4, axis=1)
    out = fastattn.dot_product_attention(np.zeros((1, 64), np.float32), ones, values)
    same(out, without_minus_zero(widened(x.reshape(-1, 1, 64))), f"values of {np.dtype(dtype)}")


EACH = check_narrowing, check_there_and_back, check_widening, check_attention, check_decode
CHECKS = {check.__name__.removeprefix("check_"): check for check in EACH}


def check_all():
    """In a child whose instruction set is forced."""
    for dtype in sixteen_bits():
        for check in CHECKS.values():
            check(dtype)


@pytest.mark.parametrize("dtype", sixteen_bits())
@pytest.mark.parametrize("check", CHECKS)
def test_every_number(check, dtype):
    CHECKS[check](dtype)


@pytest.mark.parametrize("name", info["runnable"])
def test_every_number_on_every_instruction_set(name):
    code = """
    import fastattn, test_storage
    test_storage.check_all()
    print(fastattn.cpu_info()["selected"])
    """
    assert fresh_process.run(code, FASTATTN_ISA=name).strip() == name


@pytest.mark.parametrize("dtype", sixteen_bits())
def test_half_up_would_be_seen(dtype):
    """Checks the inputs: they round to all numbers of the dtype, and for every second tie rounding half up differs."""
    x = awkward(dtype)
    infinity = int(np.array(np.inf).astype(dtype).view(np.uint16))
    assert set(narrowed(x, dtype).view(np.uint16).tolist()) == set(range(infinity + 1))
    ties, below = x[infinity : 2 * infinity], np.arange(infinity)
    same(narrowed(ties, dtype).view(np.uint16), (below + below % 2).astype(np.uint16), "to even")
