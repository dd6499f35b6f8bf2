"""merge_attention and varlen_attention: against the reference, and against the whole from the parts."""

import numpy as np
import pytest
from problems import DTYPES, bits, layouts, qkv, sixteen_bits
from tolerances import assert_attention, assert_within, storage_steps

import fastattn
from fastattn import reference

# ------------------------------------------------------------------------------------- merge_attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [(), (1,), (16, 32), (0, 33, 33), (5, 10, 15, 20, 65)])
def test_merged_parts_are_the_whole(rng, cuts, dtype):
    """Wherever the key axis is split, also into empty parts, the merge has the accuracy of one call."""
    query, key, value = qkv(rng, (2, 3), 17, 70, 24, 20, dtype)

    def in_parts(query, key, value, return_weights=False, return_lse=False):
        parts = [
            fastattn.dot_product_attention(query, key[..., a:b, :], value[..., a:b, :], return_lse=True)
            for a, b in zip((0, *cuts), (*cuts, 70), strict=True)
        ]
        out, lse = fastattn.merge_attention(*zip(*parts, strict=True))
        assert out.dtype == lse.dtype == dtype
        if return_weights:
            weights = fastattn.dot_product_attention(query, key, value, return_weights=True)[1]
            return out, weights, lse
        return (out, lse) if return_lse else out

    assert_attention(query, key, value, function=in_parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 10])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 17), (0,), (2, 0)])
def test_merge(rng, shape, count, dtype):
    outs = [rng.standard_normal((*shape, 9)).astype(dtype) for _ in range(count)]
    lses = [(5 * rng.standard_normal(shape)).astype(dtype) for _ in range(count)]
    out, lse = fastattn.merge_attention(outs, lses)
    assert out.dtype == lse.dtype == dtype
    expected_out, expected_lse = reference.merge_attention(outs, lses)
    size = np.max(np.abs(lses), axis=0) if count else 0
    eps = np.finfo(dtype).eps * (2 if dtype is np.float64 else 1)
    assert_within(lse, expected_lse, eps * (4 * size + 4 + np.abs(expected_lse)), "lse")
    largest = np.max(np.abs(outs), axis=0)
    assert_within(out, expected_out, eps * (4 * size + 4)[..., None] * largest, "out")


def test_merge_takes_stacked_arrays(rng):
    outs, lses = rng.standard_normal((4, 3, 5, 6)), rng.standard_normal((4, 3, 5))
    stacked, listed = fastattn.merge_attention(outs, lses), fastattn.merge_attention(list(outs), list(lses))
    for a, b in zip(stacked, listed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_merge_with_empty_rows(rng):
    """A part that saw nothing (lse -inf) does not count; rows that saw nothing anywhere are 0 and -inf."""
    outs = rng.standard_normal((3, 6, 4)).astype(np.float32)
    lses = rng.standard_normal((3, 6)).astype(np.float32)
    lses[0, :4], lses[1, 2:], lses[2, 3] = -np.inf, -np.inf, -np.inf
    outs[lses == -np.inf] = 0
    out, lse = fastattn.merge_attention(outs, lses)
    expected_out, expected_lse = reference.merge_attention(outs, lses)
    np.testing.assert_allclose(out, expected_out, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-6)
    assert (out[3] == 0).all()
    assert lse[3] == -np.inf


@pytest.mark.parametrize("level", [1e30, -1e30, 1e4, -1e4, 88.0, -104.0])
def test_merge_far_from_zero(rng, level):
    outs = rng.standard_normal((2, 6, 4)).astype(np.float32)
    lses = np.full((2, 6), level, dtype=np.float32)
    out, lse = fastattn.merge_attention(outs, lses)
    np.testing.assert_allclose(out, outs.mean(0), atol=1e-6)
    np.testing.assert_allclose(lse, np.float32(level + np.log(2)), rtol=1e-6)
    lses[0] -= np.float32(abs(level) / 2 + 1000)
    np.testing.assert_array_equal(fastattn.merge_attention(outs, lses)[0], outs[1])


def test_merge_nan(rng):
    outs, lses = rng.standard_normal((2, 6, 4)), rng.standard_normal((2, 6))
    lses[0, 1] = np.nan
    outs[1, 2, 3] = np.nan
    out, lse = fastattn.merge_attention(outs, lses)
    assert np.isnan(out[1]).all()
    assert np.isnan(lse[1])
    assert np.isnan(out[2, 3])
    assert np.isfinite(out[[0, 3, 4, 5]]).all()


def test_merge_layouts(rng):
    outs = rng.standard_normal((2, 3, 5, 6)).astype(np.float32)
    lses = rng.standard_normal((2, 3, 5)).astype(np.float32)
    expected = fastattn.merge_attention(outs, lses)
    variants = zip(*(layouts(x) for x in (outs[0], outs[1], lses[0], lses[1])), strict=False)
    for named in variants:
        a, b, c, d = (array for _, array in named)
        for result, same in zip(fastattn.merge_attention([a, b], [c, d]), expected, strict=True):
            np.testing.assert_array_equal(result, same)


# --------------------------------------------------------------------------------- merge_attention_vjp


def parts_and_gradients(rng, count=3, shape=(2, 3, 17), value_dim=9, dtype=np.float64):
    """grad_out, outs, lses, grad_lse."""
    outs = [rng.standard_normal((*shape, value_dim)).astype(dtype) for _ in range(count)]
    lses = [(2 * rng.standard_normal(shape)).astype(dtype) for _ in range(count)]
    return rng.standard_normal((*shape, value_dim)).astype(dtype), outs, lses, rng.standard_normal(shape).astype(dtype)


def assert_merge_gradients(grad_out, outs, lses, grad_lse=None):
    """Every gradient within G5's bound: eps times what the same sums give over absolute values; returns both lists."""
    grad_outs, grad_lses = fastattn.merge_attention_vjp(grad_out, outs, lses, grad_lse=grad_lse)
    expected = reference.merge_attention_vjp(grad_out, outs, lses, grad_lse=grad_lse)
    arrays = [np.asarray(x) for x in (*outs, *lses)]
    dtypes = [np.dtype(np.float64) if x.dtype.kind in "biu" else x.dtype for x in arrays]
    double = np.result_type(*dtypes[: len(outs)]) == np.float64
    eps = 2 * np.finfo(np.float64).eps if double else np.finfo(np.float32).eps
    o, w = (np.stack([np.asarray(x, np.float64) for x in y]) for y in (outs, lses))
    w = np.where((w == np.inf) & np.all(o == 0, axis=-1), -np.inf, w)
    with np.errstate(all="ignore"):
        size = np.nan_to_num(np.max(np.abs(w), axis=0, initial=0, where=np.isfinite(w)))
        shares = np.nan_to_num(reference.softmax(w, 0))
        terms = np.sum(np.abs(np.asarray(grad_out, np.float64) * o), axis=-1)
        extra = 0 if grad_lse is None else np.abs(np.asarray(grad_lse, np.float64))
        of_lses = shares * (terms + np.sum(shares * np.where(w == -np.inf, 0, terms), axis=0) + extra)
        of_outs = shares[..., None] * np.abs(np.asarray(grad_out, np.float64))
    unit = eps * (8 * size + 16)
    for i, grad in enumerate((*grad_outs, *grad_lses)):
        assert grad.dtype == dtypes[i]
        wanted = (*expected[0], *expected[1])[i]
        bound = (*(unit[..., None] * of_outs), *(unit * of_lses))[i]
        half, step = (x / 2 for x in storage_steps(dtypes[i]))
        bound = (
            np.nan_to_num(bound, posinf=0)
            + half * np.nan_to_num(np.abs(wanted), posinf=0)
            + step
            + 1e-37 * (not double)
        )
        assert_within(grad, wanted, bound, f"gradient {i}")
    return grad_outs, grad_lses


def test_reference_of_merge_gradients_has_the_slope_of_merge(rng):
    grad_out, outs, lses, grad_lse = parts_and_gradients(rng, 3, (4,), 3)
    lses[1][2] = lses[0][3] = -np.inf
    grads = reference.merge_attention_vjp(grad_out, outs, lses, grad_lse=grad_lse)
    for of, arrays in enumerate((outs, lses)):
        for part, x in enumerate(arrays):
            for i in np.ndindex(x.shape):
                values = []
                for step in (1e-5, -1e-5):
                    changed = [[y.copy() for y in z] for z in (outs, lses)]
                    changed[of][part][i] += step
                    out, lse = reference.merge_attention(*changed)
                    values.append(np.sum(out * grad_out) + np.sum(lse * grad_lse))
                assert abs((values[0] - values[1]) / 2e-5 - grads[of][part][i]) < 1e-8


@pytest.mark.parametrize("dtype", (*DTYPES, *sixteen_bits()))
@pytest.mark.parametrize("count", [1, 2, 3, 10])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 17), (0,), (2, 0)])
def test_merge_gradients(rng, shape, count, dtype):
    for value_dim in (1, 9, 64, 0, 300):
        *arguments, grad_lse = parts_and_gradients(rng, count, shape, value_dim, dtype)
        grad_outs, grad_lses = assert_merge_gradients(*arguments)
        assert type(grad_outs) is type(grad_lses) is list
        assert_merge_gradients(*arguments, grad_lse)


def test_gradients_through_parts_are_those_of_the_whole(rng):
    """A loss of output and log-sum-exp does not depend on where the parts begin."""
    query, key, value = qkv(rng, (2,), 3, 40, 8, 6, np.float64)
    grad_out, grad_lse = rng.standard_normal((2, 3, 6)), rng.standard_normal((2, 3))
    scores = reference.dot_scores(query, key)
    weights = reference.softmax(scores)
    out = weights @ value
    expected = weights * (grad_out @ value.swapaxes(-1, -2) - np.sum(grad_out * out, -1, keepdims=True))
    expected += weights * grad_lse[..., None]
    cuts = [slice(0, 7), slice(7, 30), slice(30, 40)]
    parts = [(reference.softmax(scores[..., c]) @ value[:, c], reference.logsumexp(scores[..., c])) for c in cuts]
    grads = fastattn.merge_attention_vjp(grad_out, *zip(*parts, strict=True), grad_lse=grad_lse)
    for c, (o, _), of_out, of_lse in zip(cuts, parts, *grads, strict=True):
        p = reference.softmax(scores[..., c])
        grad = p * (of_out @ value[:, c].swapaxes(-1, -2) - np.sum(of_out * o, -1, keepdims=True))
        np.testing.assert_allclose(grad + p * of_lse[..., None], expected[..., c], atol=1e-13)


def test_merge_gradients_of_mixed_dtypes(rng):
    grad_out, outs, lses, grad_lse = parts_and_gradients(rng)
    for dtypes in ((np.float32, np.float64, np.float16), (np.float16, np.float16, np.float32), (np.float16,) * 3):
        some = [x.astype(d) for x, d in zip(outs, dtypes, strict=True)]
        others = [x.astype(d) for x, d in zip(lses, dtypes[::-1], strict=True)]
        for dtype in (np.float16, np.float32, np.float64):
            assert_merge_gradients(grad_out.astype(dtype), some, others, grad_lse.astype(np.float32))
    assert_merge_gradients(grad_out, [np.ones(outs[0].shape, int)] * 2, [np.ones(lses[0].shape, bool)] * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_that_do_not_count_get_zeros(rng, dtype):
    """Whatever is stored in them and, where no part counts, in the gradients; NaN stays in its row."""
    grad_out, outs, lses, grad_lse = parts_and_gradients(rng, 3, (6,), 4, dtype)
    expected = fastattn.merge_attention_vjp(grad_out, outs, lses, grad_lse=grad_lse)
    lses[0][1], outs[0][1] = -np.inf, np.nan
    lses[1][2], outs[1][2] = np.inf, 0
    for part in range(3):
        lses[part][3] = -np.inf
    grad_out[3], grad_lse[3] = np.nan, np.nan
    outs[2][4, 1] = np.nan
    grads = assert_merge_gradients(grad_out, outs, lses, grad_lse)
    for of_out, of_lse, none in zip(*grads, ([1, 3], [2, 3], [3]), strict=True):
        assert (of_out[none] == 0).all()
        assert (of_lse[none] == 0).all()
    for of_out, of_lse, was_out, was_lse in zip(*grads, *expected, strict=True):
        assert np.isfinite(of_out).all(), "shares do not depend on outputs"
        assert np.isnan(of_lse[4])
        for row in (0, 5):
            assert bits(of_out[row]) == bits(was_out[row])
            assert of_lse[row] == was_lse[row]
    grad_out[5, 2] = np.nan
    for of_out, of_lse in zip(*assert_merge_gradients(grad_out, outs, lses, grad_lse), strict=True):
        assert np.isnan(of_out[5, 2])
        assert np.isnan(of_lse[5])
        assert np.isfinite(of_out[[0, 1, 2, 3, 4]]).all()


@pytest.mark.parametrize("level", [1e30, -1e30, -1e9, 88.0, -104.0])
def test_merge_gradients_far_from_zero(rng, level):
    grad_out, outs, lses, grad_lse = parts_and_gradients(rng, 4, (6,), 4, np.float32)
    lses = [np.full(6, level, np.float32)] * 4
    grad_outs, grad_lses = fastattn.merge_attention_vjp(grad_out, outs, lses, grad_lse=grad_lse)
    np.testing.assert_array_equal(grad_outs, [grad_out / 4] * 4)
    np.testing.assert_allclose(np.sum(grad_lses, axis=0), grad_lse, atol=1e-5)


def test_merge_gradients_of_one_part_are_what_came_in(rng):
    grad_out, outs, lses, grad_lse = parts_and_gradients(rng, 1, dtype=np.float32)
    grad_outs, grad_lses = fastattn.merge_attention_vjp(grad_out, outs, lses, grad_lse=grad_lse)
    assert bits(grad_outs[0]) == bits(grad_out)
    np.testing.assert_array_equal(grad_lses[0], grad_lse)


def test_merge_gradients_in_any_layout_on_any_threads(rng):
    grad_out, outs, lses, grad_lse = parts_and_gradients(rng, 2, (3, 50), 60, np.float32)
    expected = fastattn.merge_attention_vjp(grad_out, outs, lses, grad_lse=grad_lse)
    for named in zip(*(layouts(x) for x in (grad_out, *outs, *lses, grad_lse)), strict=False):
        g, a, b, c, d, e = (array for _, array in named)
        for was, now in zip(expected, fastattn.merge_attention_vjp(g, [a, b], [c, d], grad_lse=e), strict=True):
            np.testing.assert_array_equal(now, was)
    stacked = fastattn.merge_attention_vjp(grad_out, np.stack(outs), np.stack(lses), grad_lse=grad_lse)
    before = fastattn.get_num_threads()
    fastattn.set_num_threads(1)
    alone = fastattn.merge_attention_vjp(grad_out, outs, lses, grad_lse=grad_lse)
    fastattn.set_num_threads(before)
    rows = fastattn.merge_attention_vjp(grad_out[1, 7:9], [x[1, 7:9] for x in outs], [x[1, 7:9] for x in lses],
                                        grad_lse=grad_lse[1, 7:9])  # fmt: skip
    for of in range(2):
        np.testing.assert_array_equal(stacked[of], expected[of])
        np.testing.assert_array_equal(alone[of], expected[of])
        np.testing.assert_array_equal(rows[of], [x[1, 7:9] for x in expected[of]])
    one = np.broadcast_to(np.float32(2), grad_out.shape)
    assert bits(fastattn.merge_attention_vjp(one, outs, lses)[1][0]) == bits(
        fastattn.merge_attention_vjp(one.copy(), outs, lses)[1][0]
    )


# ------------------------------------------------------------------------------------ varlen_attention

PACKED = {
    "one": ([0, 40], None),
    "three": ([0, 1, 18, 40], None),
    "empty ones": ([0, 0, 13, 13, 40, 40], None),
    "other keys": ([0, 10, 40], [0, 25, 33]),
    "no keys for some": ([0, 10, 20, 40], [0, 25, 25, 33]),
    "no queries for some": ([0, 40, 40], [0, 3, 33]),
    "many": (list(range(41)), None),
}


def assert_varlen(query, key, value, *cu_seqlens, **arguments):
    """The packed call against the reference, each sequence within the bounds of its own call."""
    expected = reference.varlen_attention(query, key, value, *cu_seqlens, **arguments)
    out = fastattn.varlen_attention(query, key, value, *cu_seqlens, **arguments)
    assert out.dtype == np.result_type(query, key, value)
    tolerance = 1e-5 if out.dtype == np.float32 else 1e-13
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)
    if arguments.get("activation", "softmax") == "softmax":
        again, lse = fastattn.varlen_attention(query, key, value, *cu_seqlens, **arguments, return_lse=True)
        _, expected = reference.varlen_attention(query, key, value, *cu_seqlens, **arguments, return_lse=True)
        np.testing.assert_allclose(again, out, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(lse, expected, rtol=tolerance, atol=tolerance)

    cu_seqlens_q = cu_seqlens[0]
    cu_seqlens_k = cu_seqlens_q if len(cu_seqlens) < 2 or cu_seqlens[1] is None else cu_seqlens[1]
    edges = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True)
    for q0, q1, k0, k1 in edges:
        part = out[..., q0:q1, :]
        # The check wants the weights too, which the packed function does not return.
        assert_attention(
            query[..., q0:q1, :],
            key[..., k0:k1, :],
            value[..., k0:k1, :],
            **arguments,
            function=lambda *args, part=part, **kwargs: (
                (part, *fastattn.dot_product_attention(*args, **kwargs)[1:])
                if kwargs.get("return_weights") or kwargs.get("return_lse")
                else part
            ),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(rng, packed, causal, dtype):
    cu_seqlens_q, cu_seqlens_k = PACKED[packed]
    total_k = (cu_seqlens_k or cu_seqlens_q)[-1]
    query, key, value = qkv(rng, (3,), 40, total_k, 16, 12, dtype)
    assert_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, is_causal=causal)


@pytest.mark.parametrize(
    "arguments",
    [
        {"window_size": 3},
        {"window_size": (5, 0)},
        {"is_causal": True, "window_size": (4, None)},
        {"alibi_slopes": np.float32([0.5, 0.25, 0.125, 1])},
        {"scale": 0.3},
        {"softcap": 2.0},
        {"sinks": np.float32([0.5, -1, 2, 0])},
        {"activation": "relu"},
        {"activation": "sigmoid", "is_causal": True},
    ],
    ids=str,
)
def test_varlen_arguments(rng, arguments):
    query, key, value = qkv(rng, (2, 4), 40, 33)
    assert_varlen(query, key, value, [0, 10, 10, 40], [0, 25, 30, 33], **arguments)


@pytest.mark.parametrize("batch", [(), (1,), (2, 4), (2, 1, 3)])
def test_varlen_batch_axes(rng, batch):
    assert_varlen(*qkv(rng, batch, 40, 40), [0, 7, 30, 40], is_causal=True)


def test_varlen_grouped_heads(rng):
    query, key, value = qkv(rng, (2, 6), 40, 33, kv_batch=(2, 2))
    assert_varlen(query, key, value, [0, 10, 40], [0, 25, 33], enable_gqa=True, is_causal=True)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_varlen_cu_seqlens_dtypes(rng, dtype):
    assert_varlen(*qkv(rng, (2,), 20, 20), np.array([0, 5, 20], dtype=dtype))
    assert_varlen(*qkv(rng, (2,), 20, 20), np.array([20, 5, 0], dtype=dtype)[::-1])


def test_varlen_without_rows(rng):
    query, key, value = qkv(rng, (2,), 0, 0, 8, 6)
    for cu_seqlens in ([0, 0], [0, 0, 0]):
        assert fastattn.varlen_attention(query, key, value, cu_seqlens).shape == (2, 0, 6)


def test_varlen_sequences_do_not_meet(rng):
    """NaN in one sequence stays there."""
    query, key, value = qkv(rng, (2,), 60, 60)
    expected = fastattn.varlen_attention(query, key, value, [0, 13, 30, 60])
    for x in (query, key, value):
        x[:, 13:30] = np.nan
    out = fastattn.varlen_attention(query, key, value, [0, 13, 30, 60])
    np.testing.assert_array_equal(out[:, :13], expected[:, :13])
    np.testing.assert_array_equal(out[:, 30:], expected[:, 30:])
    assert np.isnan(out[:, 13:30]).all()


def test_varlen_out(rng):
    query, key, value = qkv(rng, (3,), 40, 40, 16, 12)
    expected = fastattn.varlen_attention(query, key, value, [0, 13, 40])
    out = np.full((40, 3, 12), 7, dtype=np.float32).swapaxes(0, 1)
    assert fastattn.varlen_attention(query, key, value, [0, 13, 40], out=out) is out
    np.testing.assert_array_equal(out, expected)


def test_varlen_takes_the_layout_of_packed_memory(rng):
    """(total, heads, head_dim) in memory, the usual packing, is passed as a swapped view."""
    query, key, value = (rng.standard_normal((40, 3, 16)).astype(np.float32).swapaxes(0, 1) for _ in range(3))
    assert_varlen(query, key, value, [0, 13, 40], is_causal=True)


def test_out_must_not_overlap_cu_seqlens():
    starts = np.arange(102)
    x = np.ones((100, 1))
    before = starts.copy()
    with pytest.raises(ValueError, match="out overlaps cu_seqlens_q"):
        fastattn.varlen_attention(x, x, x, starts[:101], out=starts[2:].view(np.float64)[:, None])
    np.testing.assert_array_equal(starts, before)


def test_many_short_sequences_and_a_long_one():
    """The work is that of the sequences, not of padding them to the longest."""
    count = 300_000
    starts = np.concatenate([np.arange(count + 1), [2 * count]])
    x = np.ones((8, 2 * count, 1), np.float32)
    out = fastattn.varlen_attention(x, x, x, starts, window_size=0, num_threads=2)
    assert (out == 1).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_part_marked_empty_by_flash_attention(rng, dtype):
    """lse = +inf with an output of zeros is a part without keys; with any other output it stays +inf."""
    outs = [rng.standard_normal((2, 5, 3)).astype(dtype) for _ in range(3)]
    lses = [rng.standard_normal((2, 5)).astype(np.float32) for _ in range(3)]
    outs[1][0], lses[1][0] = 0, np.inf
    outs[2][0, 2], lses[2][0, 2] = -0.0, np.inf
    for k in range(3):
        outs[k][1, 3], lses[k][1, 3] = 0, np.inf
    out, lse = fastattn.merge_attention(outs, lses)
    expected_out, expected_lse = reference.merge_attention(outs, lses)
    eps = 8 * np.finfo(dtype).eps
    np.testing.assert_allclose(out, expected_out, rtol=eps, atol=eps)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)
    np.testing.assert_array_equal(out[0, 2], outs[0][0, 2])
    assert (out[1, 3] == 0).all()
    assert lse[1, 3] == -np.inf
    marked = [np.where(np.isinf(x), -np.inf, x) for x in lses]
    for a, b in zip(fastattn.merge_attention(outs, marked), (out, lse), strict=True):
        np.testing.assert_array_equal(a, b)
    outs[1][0, 0, 1] = 1
    out, lse = fastattn.merge_attention(outs, lses)
    assert np.isnan(out[0, 0]).any()
    assert lse[0, 0] == np.inf
