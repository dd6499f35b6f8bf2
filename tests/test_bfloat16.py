"""Prefill of bfloat16, whose products some CPUs take in pairs: instruction sets `avx512_amx` and `avx512_bf16`, where
`avx512` widens.

The tests run on the set in use, and again in children on the others of these. What only the pairs do is promised to
nobody, but what they must not do is: change a bit because of a key that a row does not see, lose numbers that the
instructions take for zeros, make a mean larger than its numbers, or cost the log-sum-exp its float32 digits.
"""

import fresh_process
import numpy as np
import pytest
import tolerances
from problems import bits, layouts, qkv, rules
from tolerances import assert_attention

import fastattn
from fastattn import reference

bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
attention = fastattn.dot_product_attention
RUNNABLE = fastattn.cpu_info()["runnable"]
PAIRS = {"avx512_amx": "kernels_bf16_avx512_amx", "avx512_bf16": "kernels_bf16_avx512_bf16"}
WIDENING = {"avx512": "kernels_f32_avx512"}
# More than decode takes. Sizes around those of pairs, tiles, vectors, panels, blocks and spans.
QUERIES = 40
SIZES = ((9, 1, 16, 16), (16, 31, 33, 16), (31, 33, 63, 80), (33, 65, 95, 144),
         (13, 17, 17, 33), (40, 255, 64, 64), (41, 257, 65, 80), (200, 300, 128, 96),
         (17, 2300, 31, 48), (20, 70, 300, 16), (20, 70, 520, 24), (20, 70, 8, 64), (20, 70, 64, 8))  # fmt: skip


def some(*shape, seed=3, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(bfloat16)


def problem(queries=QUERIES, keys=300, head_dim=32, value_dim=48):
    return some(queries, head_dim, seed=1), some(keys, head_dim, seed=2), some(keys, value_dim, seed=3)


def check_sizes():
    for queries, keys, head_dim, value_dim in SIZES:
        arrays = qkv(np.random.default_rng(queries), (2,), queries, keys, head_dim, value_dim, bfloat16)
        assert_attention(*arrays)
        assert_attention(*arrays, is_causal=True)


def check_rules():
    rng = np.random.default_rng(8)
    arrays = qkv(rng, (2, 3), QUERIES, 300, 32, 48, bfloat16)
    for rule in rules(rng, (2, 3), QUERIES, 300).values():
        assert_attention(*arrays, **rule)
    query, key, value = qkv(rng, (2, 4), QUERIES, 300, 32, 48, bfloat16, kv_batch=(2, 2))
    assert_attention(query, key, value, enable_gqa=True, is_causal=True)
    for scale in (0.0, 1e-5, 900.0, 1e-8, 1e4):
        assert_attention(*problem(), scale=scale)


def check_same_bits():
    arrays = problem(QUERIES, 2500, 64, 64)
    expected = attention(*arrays, return_lse=True)
    for threads in (1, 2, 3):
        for a, b in zip(attention(*arrays, return_lse=True, num_threads=threads), expected, strict=True):
            assert bits(a) == bits(b)
    batch = [np.broadcast_to(x, (3, *x.shape)) for x in arrays]
    assert bits(attention(*batch)[1]) == bits(expected[0])
    assert bits(attention(arrays[0][7:33], *arrays[1:])) == bits(expected[0][7:33])
    for views in zip(*map(layouts, arrays), strict=True):
        assert bits(attention(*(view for _, view in views))) == bits(expected[0]), views[0][0]


def check_workspace():
    """What a call of float32 left in the memory of packed values changes no bit."""
    for keys in (1, 17, 33, 250):
        arrays, found = problem(QUERIES, keys, 64, 64), set()
        for left in (0.0, np.nan):
            every_second = [np.full((300, 128), left, dtype=np.float32)[:, ::2] for _ in range(3)]
            attention(*every_second, num_threads=1)
            found.add(bits(attention(*arrays, num_threads=1)))
        assert len(found) == 1, keys


STRANGE = (np.nan, np.inf, -np.inf, 3e38, 1e30, 1e18, 1e-28, 1e-38, 1e-40)


def check_unseen():
    """Numbers for which rows are computed again change no bit of a row that does not see them."""
    query, key, value = problem()
    mask = np.random.default_rng(4).random((QUERIES, 300)) < 0.9
    mask[:, [5, 130, 131, 255]] = False
    mask[3] = True
    for rule in ({"mask": mask}, {"mask": mask, "window_size": (50, 20)}):
        expected = attention(query, key, value, **rule, return_weights=True, return_lse=True)
        for number in STRANGE:
            k, v = key.copy(), value.copy()
            k[[5, 131], 3], v[[130, 131, 255], 7] = number, number
            results = attention(query, k, v, **rule, return_weights=True, return_lse=True)
            for a, b in zip(results, expected, strict=True):
                assert bits(np.delete(a, 3, 0)) == bits(np.delete(b, 3, 0)), number
    q = query.copy()
    q[3, 0] = np.nan
    assert bits(np.delete(attention(q, key, value), 3, 0)) == bits(np.delete(attention(query, key, value), 3, 0))


def check_seen():
    """Numbers that the instruction takes for zeros, and those whose products overflow before they are scaled, or whose
    sums do."""
    query, key, value = problem()
    for number in STRANGE:
        for of_key, of_value in ((True, False), (False, True)):
            k, v = key.copy(), value.copy()
            if of_key:
                k[100, 3] = number
            if of_value:
                v[100, 7] = number
            with np.errstate(all="ignore"):
                assert_attention(query, k, v, is_causal=True)
    for exponent in (-126, -120, -100, -91, -90, -89, 0, 90, 99, 100, 120):
        tiny = np.ldexp(some(300, 48).astype(np.float64), exponent).astype(bfloat16)
        with np.errstate(all="ignore"):
            assert_attention(query, key, tiny)
    # The unscaled products overflow, and cancel or not.
    q, k = some(QUERIES, 32), some(300, 32, seed=5)
    q[:, :2], k[::3, 0], k[::3, 1] = 4.0, 3e38, -3e38
    with np.errstate(all="ignore"):
        assert_attention(q, k, value, scale=1e-4)
    q[:], k[:] = 0, 0
    q[:, 0], k[:, 0] = 2.0**100, np.ldexp(np.arange(300) / 8, -100).astype(bfloat16)
    assert_attention(q, k, value)
    q[:, 0], k[:, 0] = 2.0**127, np.ldexp(np.arange(300) / 512, -128).astype(bfloat16)  # denormal keys
    assert_attention(q, k, value, scale=1.0)


def check_mean():
    """A mean of equal numbers is that number: weights are divided by their own sum, not by that of unrounded ones."""
    query, key, _ = problem(400, 2500, 64)
    for number in (1.0, 1.9921875, 255 * 2.0**92, float(np.float32(3.3895314e38)), 2.0**-89, 2.0**-100):
        value = np.full((2500, 16), number, dtype=bfloat16)
        np.testing.assert_array_equal(attention(query, key, value).astype(np.float64), value[:400].astype(np.float64))
    # All weights but one are rounded up, or down, by nearly half a unit.
    ones = np.ones((QUERIES, 16), dtype=bfloat16)
    key, value = np.full((300, 16), -1, dtype=bfloat16), np.full((300, 16), 1.9921875, dtype=bfloat16)
    key[7] = 0
    for weight in (0.5 + 0.51 / 256, 0.5 + 0.49 / 256):
        np.testing.assert_array_equal(attention(ones, key, value, scale=-np.log(weight) / 16), value[:QUERIES])


def shares_of_bounds(function=attention):
    """The largest errors, of outputs, weights and log-sum-exps, as shares of their bounds."""
    arrays = problem(400, 700, 64, 64)
    expected = reference.dot_product_attention(*arrays, return_weights=True, return_lse=True)
    bounds = tolerances.attention_bounds("dot_product_attention", *arrays, *expected)
    results = function(*arrays, return_weights=True, return_lse=True)
    return [np.max(np.abs(np.asarray(a, dtype=np.float64) - b) / c)
            for a, b, c in zip(results, expected, bounds, strict=True)]  # fmt: skip


def check_sharp():
    """Rounded weights are seen in outputs only, and there they are well within what they may cost."""
    out, weights, lse = shares_of_bounds()
    assert out < 0.2
    assert weights < 0.05
    assert lse < 0.2


CHECKS = {check.__name__.removeprefix("check_"): check
          for check in (check_sizes, check_rules, check_same_bits, check_workspace, check_unseen, check_seen,
                        check_mean, check_sharp)}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_in_use(name):
    CHECKS[name]()


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("instruction_set", PAIRS | WIDENING)
def test_forced(instruction_set, name):
    if instruction_set not in RUNNABLE:
        pytest.skip(f"this CPU or build has no {instruction_set}")
    if instruction_set == fastattn.cpu_info()["selected"]:
        pytest.skip(f"{instruction_set} is in use: test_in_use")
    code = f"""
    import fastattn, test_bfloat16
    test_bfloat16.CHECKS[{name!r}]()
    print(fastattn.cpu_info()["kernels"]["bfloat16"])
    """
    expected = (PAIRS | WIDENING)[instruction_set]
    assert fresh_process.run(code, FASTATTN_ISA=instruction_set).strip() == expected


def show():
    print(attention(*problem()).tobytes().hex(), attention(*(x.astype(np.float32) for x in problem())).tobytes().hex())


@pytest.mark.parametrize("instruction_set", PAIRS)
def test_what_is_named_is_what_runs(instruction_set):
    """The sets give different bits for bfloat16, and the same for float32."""
    if instruction_set not in RUNNABLE:
        pytest.skip(f"this CPU or build has no {instruction_set}")
    pairs, widened = (fresh_process.run("import test_bfloat16; test_bfloat16.show()", FASTATTN_ISA=name).split()
                      for name in (instruction_set, *WIDENING))  # fmt: skip
    assert pairs[0] != widened[0]
    assert pairs[1] == widened[1]


@pytest.mark.parametrize("what", ["weights by their unrounded sum", "scores of bfloat16"])
def test_a_bug_would_be_seen(what):
    """Outputs whose weights do not sum to 1, and a log-sum-exp of rounded scores, are beyond what `check_sharp` and
    `check_mean` allow."""

    def wrong(query, key, value, **extra):
        out, weights, lse = attention(query, key, value, return_weights=True, return_lse=True)
        if what.startswith("weights"):
            rounded = weights.astype(bfloat16).astype(np.float64) * (1 + 2.0**-8)
            return (rounded @ value.astype(np.float64)).astype(bfloat16), weights, lse
        return out, weights.astype(bfloat16).astype(np.float32), lse.astype(bfloat16).astype(np.float32)

    if what.startswith("weights"):
        query, key, _ = problem(400, 700, 64)
        value = np.full((700, 16), 1.9921875, dtype=bfloat16)
        assert np.any(wrong(query, key, value)[0].astype(np.float64) > 1.9921875)
    else:
        _, weights, lse = shares_of_bounds(wrong)
        assert weights > 1
        assert lse > 1
