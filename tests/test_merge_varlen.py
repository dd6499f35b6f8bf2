"""merge_attention and varlen_attention: against the reference, and against the whole from the parts."""

import numpy as np
import pytest
from problems import DTYPES, layouts, qkv
from tolerances import assert_attention, assert_within

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
