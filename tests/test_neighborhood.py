"""neighborhood_attention: against its reference, against dense attention with a mask, and against its relatives."""

import fresh_process
import numpy as np
import pytest
from problems import bits, layouts, sixteen_bits
from tolerances import accumulation_dtype, assert_within, attention_bounds

import fastattn
from fastattn import reference


def images(rng, space, batch=(2,), head_dim=5, value_dim=6, dtype=np.float32, key_batch=None):
    """Query, key and value of standard normal numbers over an image."""
    key_batch = batch if key_batch is None else key_batch
    return (
        rng.standard_normal((*batch, *space, head_dim)).astype(dtype),
        rng.standard_normal((*key_batch, *space, head_dim)).astype(dtype),
        rng.standard_normal((*key_batch, *space, value_dim)).astype(dtype),
    )


def neighborhoods(space, kernel_size, *, dilation=1, stride=1, is_causal=False, edge="clamp"):
    """For each pixel, in a row: the numbers of the pixels of its kernel, which of them it sees, and where the bias of
    each stands in a table; (P, K), (P, K) and, for each axis, (P, K)."""
    axes = len(space)
    settings = [np.broadcast_to(x, axes).tolist() for x in (kernel_size, dilation, stride, is_causal)]
    keys, seen, entries = [], [], []
    for pixel in np.ndindex(*space):
        along = [reference.neighbors(i, n, *s, edge) for i, n, *s in zip(pixel, space, *settings, strict=True)]
        index, visible, distance = (np.meshgrid(*x, indexing="ij") for x in zip(*along, strict=True))
        keys.append(np.ravel_multi_index([x.ravel() for x in index], space))
        seen.append(np.all(visible, axis=0).ravel())
        entries.append([x.ravel() + k - 1 for x, k in zip(distance, settings[0], strict=True)])
    return np.array(keys), np.array(seen), np.moveaxis(np.array(entries), 1, 0)


def dense(space, kernel_size, relative_bias=None, **where):
    """The rules of `dot_product_attention` that say the same of pixels in a row: a mask, and perhaps a bias."""
    keys, seen, entries = neighborhoods(space, kernel_size, **where)
    pixels = np.arange(len(keys))[:, None]
    mask = np.zeros((len(keys), len(keys)), dtype=bool)
    mask[np.broadcast_to(pixels, keys.shape)[seen], keys[seen]] = True
    if relative_bias is None:
        return {"mask": mask}
    axes = len(space)
    table = np.broadcast_to(
        relative_bias, (*relative_bias.shape[:-axes], *(2 * np.broadcast_to(kernel_size, axes) - 1))
    )
    bias = np.zeros((*table.shape[:-axes], *mask.shape))
    where_seen = (np.broadcast_to(pixels, keys.shape)[seen], keys[seen])
    bias[(..., *where_seen)] = table[(..., *(entry[seen] for entry in entries))]
    return {"mask": mask, "bias": bias}


def in_a_row(x, axes):
    return x.reshape(*x.shape[: -axes - 1], int(np.prod(x.shape[-axes - 1 : -1])), x.shape[-1])


WHERE = ("dilation", "stride", "is_causal", "edge", "relative_bias")


def assert_neighborhood(query, key, value, kernel_size, **arguments):
    """The call with and without extra results, against dense attention in float64; returns the output."""
    axes = np.size(kernel_size)
    space = query.shape[-axes - 1 : -1]
    where = {name: x for name, x in arguments.items() if name in WHERE}
    others = {name: x for name, x in arguments.items() if name not in (*WHERE, "num_threads", "out")}
    rules = {**dense(space, kernel_size, **where), **others}
    rows = [in_a_row(x, axes) for x in (query, key, value)]
    with_lse = arguments.get("activation", "softmax") == "softmax"
    expected = reference.dot_product_attention(*rows, **rules, return_weights=True, return_lse=with_lse)
    expected_lse = expected[2] if with_lse else None
    bounds = attention_bounds("dot_product_attention", *rows, *expected[:2], expected_lse, **rules)

    plain = fastattn.neighborhood_attention(query, key, value, kernel_size, **arguments)
    assert_within(in_a_row(plain, axes), expected[0], bounds[0], "output")
    results = fastattn.neighborhood_attention(
        query, key, value, kernel_size, **arguments, return_weights=True, return_lse=with_lse
    )
    assert bits(results[0]) == bits(plain)
    keys, seen, _ = neighborhoods(space, kernel_size, **{n: x for n, x in where.items() if n != "relative_bias"})
    weights = results[1].reshape(*results[1].shape[: -2 * axes], *keys.shape)
    assert results[1].dtype == accumulation_dtype(plain.dtype)
    wanted, bound = (
        np.where(seen, np.take_along_axis(x, np.broadcast_to(keys, (*x.shape[:-2], *keys.shape)), -1), 0.0)
        for x in (expected[1], bounds[1])
    )
    assert_within(weights, wanted, bound, "weights")
    if with_lse:
        lse = results[2].reshape(expected_lse.shape)
        assert results[2].shape == plain.shape[:-1]
        assert_within(lse, expected_lse, bounds[2], "lse")
    return plain


def possible(space, kernel_size, dilation=1, stride=1, edge="clamp", **_):
    axes = len(space)
    kernel_size, dilation, stride = (np.broadcast_to(x, axes) for x in (kernel_size, dilation, stride))
    return np.all(stride <= kernel_size) and (edge == "truncate" or np.all(kernel_size * dilation <= space))


@pytest.mark.parametrize("edge", ["clamp", "truncate"])
@pytest.mark.parametrize("size", [1, 2, 5, 16, 17, 40])
def test_one_dimension(size, edge):
    rng = np.random.default_rng(size)
    for kernel_size in (1, 2, 3, 7, 16):
        for dilation in (1, 2, 3):
            for stride in sorted({1, 2, kernel_size}):
                for is_causal in (False, True):
                    where = {"dilation": dilation, "stride": stride, "is_causal": is_causal, "edge": edge}
                    if possible((size,), kernel_size, **where):
                        assert_neighborhood(*images(rng, (size,)), kernel_size, **where)


@pytest.mark.parametrize("edge", ["clamp", "truncate"])
@pytest.mark.parametrize(
    ("space", "kernel_size"),
    [((9, 10), (3, 3)), ((7, 20), (7, 5)), ((20, 7), (4, 7)), ((3, 33), (2, 3)), ((5, 5), (3, 1)), ((8, 8), (4, 4))],
)
def test_two_dimensions(space, kernel_size, edge):
    rng = np.random.default_rng(1)
    for dilation in (1, 2, (2, 1), (1, 3)):
        for stride in (1, 2, kernel_size):
            for is_causal in (False, True, (True, False)):
                where = {"dilation": dilation, "stride": stride, "is_causal": is_causal, "edge": edge}
                if possible(space, kernel_size, **where):
                    assert_neighborhood(*images(rng, space, (1,)), kernel_size, **where)


@pytest.mark.parametrize("edge", ["clamp", "truncate"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2, (1, 1, 2)])
@pytest.mark.parametrize("is_causal", [False, True, (True, False, False)])
def test_three_dimensions(dilation, stride, is_causal, edge):
    for space in ((6, 7, 8), (8, 4, 6)):
        where = {"dilation": dilation, "stride": stride, "is_causal": is_causal, "edge": edge}
        assert_neighborhood(*images(np.random.default_rng(2), space, (1,)), (3, 2, 3), **where)


def test_the_reference_says_the_same():
    """The plain loop over pixels and dense attention with a mask, all rules together."""
    rng = np.random.default_rng(3)
    arrays = images(rng, (5, 6), (2, 4), 3, 2, key_batch=(2, 2))
    where = {
        "dilation": (1, 2),
        "stride": (2, 1),
        "edge": "truncate",
        "is_causal": (False, True),
        "relative_bias": rng.standard_normal((4, 5, 3)),
    }
    others = {"softcap": 2.0, "sinks": np.arange(4.0), "scale": 0.7, "enable_gqa": True}
    out, weights, lse = reference.neighborhood_attention(
        *arrays, (3, 2), **where, **others, return_weights=True, return_lse=True
    )
    rows = [in_a_row(x, 2) for x in arrays]
    expected = reference.dot_product_attention(*rows, **dense((5, 6), (3, 2), **where), **others, return_lse=True)
    np.testing.assert_allclose(in_a_row(out, 2), expected[0], atol=1e-12)
    np.testing.assert_allclose(lse.reshape(2, 4, 30), expected[1], atol=1e-12)
    assert weights.shape == (2, 4, 5, 6, 3, 2)


RULES = {
    "softcap": {"softcap": 0.5},
    "sinks": {"sinks": np.float32([1.0, -2.0])},
    "relu": {"activation": "relu"},
    "sigmoid": {"activation": "sigmoid"},
    "sparsemax": {"activation": "sparsemax"},
    "entmax15": {"activation": "entmax15", "softcap": 3.0, "scale": 0.7},
    "sparsemax of some": {"activation": "sparsemax", "edge": "truncate", "is_causal": (False, True), "stride": 2},
    "scale": {"scale": -2.0},
    "no scale": {"scale": 0.0},
    "relative bias": {"relative_bias": np.random.default_rng(4).standard_normal((2, 5, 9))},
    "a bias for all": {"relative_bias": np.float32(0.5).reshape(1, 1)},
    "relu of some": {"activation": "relu", "edge": "truncate", "is_causal": (False, True)},
    "together": {
        "softcap": 2.0,
        "sinks": np.float32(0.5),
        "scale": 0.3,
        "edge": "truncate",
        "stride": (1, 3),
        "relative_bias": np.random.default_rng(5).standard_normal((5, 9)).astype(np.float32),
    },
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rules(name, dtype):
    for head_dim, value_dim in ((16, 16), (33, 17)):
        arrays = images(np.random.default_rng(6), (9, 18), (2,), head_dim, value_dim, dtype)
        assert_neighborhood(*arrays, (3, 5), **RULES[name])


@pytest.mark.parametrize("activation", ["softmax", "relu", "sparsemax", "entmax15"])
def test_a_bias_of_minus_infinity_hides(activation):
    rng = np.random.default_rng(7)
    table = rng.standard_normal((2, 5, 5))
    table[0, 2, 3] = table[1, :, 1] = -np.inf
    arrays = images(rng, (6, 7))
    assert_neighborhood(*arrays, (3, 3), relative_bias=table, activation=activation)
    table[0] = -np.inf
    out = assert_neighborhood(*arrays, (3, 3), relative_bias=table, activation=activation)
    assert (out[0] == 0).all()


@pytest.mark.parametrize("head_dim", [0, 1, 2, 15, 16, 31, 64, 65])
@pytest.mark.parametrize("value_dim", [0, 1, 4, 9, 32])
def test_channels(head_dim, value_dim):
    arrays = images(np.random.default_rng(8), (4, 19), (1,), head_dim, value_dim)
    assert_neighborhood(*arrays, (3, 3))


@pytest.mark.parametrize("kernel_size", [(17, 3), (3, 17), (9, 21)])
def test_large_kernels(kernel_size):
    assert_neighborhood(*images(np.random.default_rng(9), (18, 22), (1,)), kernel_size)
    assert_neighborhood(*images(np.random.default_rng(9), (18, 22), (1,)), kernel_size, edge="truncate")


def test_long_rows_and_few_columns():
    rng = np.random.default_rng(10)
    assert_neighborhood(*images(rng, (700,), (1,)), 5)
    assert_neighborhood(*images(rng, (700,), (1,)), 201, edge="truncate")
    assert_neighborhood(*images(rng, (120, 3), (1,)), (9, 3))
    assert_neighborhood(*images(rng, (3, 120), (1,)), (3, 9), dilation=(1, 8))
    assert_neighborhood(*images(rng, (40, 2, 3), (1,)), (7, 1, 2))


def test_storage_of_16_bits():
    rng = np.random.default_rng(11)
    for dtype in sixteen_bits():
        assert_neighborhood(*images(rng, (6, 20), (2,), 17, 33, dtype), (3, 3))
    query, key, value = images(rng, (6, 20))
    mixed = assert_neighborhood(query.astype(np.float16), key, value.astype(np.float64), (3, 3))
    assert mixed.dtype == np.float64
    assert fastattn.neighborhood_attention(*(np.ones((4, 1), int),) * 3, 3).dtype == np.float64


def test_grouped_heads_and_broadcast_batches():
    rng = np.random.default_rng(12)
    arrays = images(rng, (5, 17), (2, 6), 5, 6, key_batch=(2, 3))
    biases = {"relative_bias": rng.standard_normal((6, 5, 5)), "sinks": rng.standard_normal((2, 1))}
    assert_neighborhood(*arrays, (3, 3), enable_gqa=True, **biases)
    query, key, value = images(rng, (5, 17), (6,), key_batch=(1,))
    assert_neighborhood(query, key, value, (3, 3), relative_bias=biases["relative_bias"])
    assert_neighborhood(query[0], key, np.concatenate([value, value]), (3, 3))
    assert_neighborhood(query[None], np.broadcast_to(key, query.shape), value[0], (3, 3))


def test_no_pixels_no_batch():
    for shape in ((2, 0, 5, 4), (0, 3, 5, 4), (2, 3, 0, 4)):
        x = np.ones(shape, np.float32)
        out, weights, lse = fastattn.neighborhood_attention(
            x, x, x, (2, 2), edge="truncate", return_weights=True, return_lse=True
        )
        assert out.shape == shape
        assert weights.shape == (*shape[:-1], 2, 2)
        assert lse.shape == shape[:-1]


# ------------------------------------------------------------------------------------------------ relatives


def test_one_dimension_is_a_window():
    """Odd kernels, truncated: truncated_attention, with its biases and its weights."""
    rng = np.random.default_rng(13)
    arrays = images(rng, (300,), (2,), 16, 16)
    for half in (0, 1, 4, 20):
        table = rng.standard_normal((2, 4 * half + 1)).astype(np.float32)
        near = table[:, None, half : 3 * half + 1]
        ours = fastattn.neighborhood_attention(
            *arrays, 2 * half + 1, edge="truncate", relative_bias=table, return_weights=True, return_lse=True
        )
        theirs = fastattn.truncated_attention(
            *arrays, half, half, query_offset=0, relative_bias=near, return_weights="band", return_lse=True
        )
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_stride_of_a_kernel_is_a_partition_into_windows():
    """Swin's: attention within each window."""
    query, key, value = images(np.random.default_rng(14), (14, 21), (2,), 16, 16)
    cut = [
        x.reshape(2, 2, 7, 3, 7, 16).swapaxes(2, 3).reshape(2, 2, 3, 49, 16) for x in (query, key, value)
    ]  # (heads, rows of windows, columns of windows, pixels, channels)
    expected = fastattn.dot_product_attention(*cut)
    out = fastattn.neighborhood_attention(query, key, value, (7, 7), stride=7)
    ours = out.reshape(2, 2, 7, 3, 7, 16).swapaxes(2, 3).reshape(expected.shape)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_dilation_is_attention_of_each_class():
    arrays = images(np.random.default_rng(15), (14, 31))
    out = fastattn.neighborhood_attention(*arrays, (3, 5), dilation=(2, 3))
    for i in range(2):
        for j in range(3):
            part = tuple(x[:, i::2, j::3] for x in arrays)
            np.testing.assert_allclose(out[:, i::2, j::3], fastattn.neighborhood_attention(*part, (3, 5)), atol=1e-5)


def test_a_kernel_of_all_pixels_is_attention():
    arrays = images(np.random.default_rng(16), (5, 6))
    expected = fastattn.dot_product_attention(*(in_a_row(x, 2) for x in arrays))
    for size in (11, 10**6, 2**62, 10**30):
        out = fastattn.neighborhood_attention(*arrays, (size, size), edge="truncate", stride=1)
        np.testing.assert_allclose(in_a_row(out, 2), expected, atol=1e-5)
    causal = fastattn.neighborhood_attention(arrays[0][:, 0], arrays[1][:, 0], arrays[2][:, 0], 2**62,
                                             edge="truncate", is_causal=True, stride=2**61)  # fmt: skip
    rows = [x[:, 0] for x in arrays]
    np.testing.assert_allclose(causal, fastattn.dot_product_attention(*rows, is_causal=True), atol=1e-5)


def test_other_keys_join_by_merging():
    """NATTEN's additional keys: two calls and merge_attention."""
    rng = np.random.default_rng(17)
    query, key, value = images(rng, (6, 7), (2,), 8, 8)
    extra_key, extra_value = rng.standard_normal((2, 2, 3, 8)).astype(np.float32)
    near, near_lse = fastattn.neighborhood_attention(query, key, value, (3, 3), return_lse=True)
    far, far_lse = fastattn.dot_product_attention(in_a_row(query, 2), extra_key, extra_value, return_lse=True)
    out, _ = fastattn.merge_attention([in_a_row(near, 2), far], [near_lse.reshape(2, 42), far_lse])
    mask = np.concatenate([dense((6, 7), (3, 3))["mask"], np.ones((42, 3), bool)], axis=1)
    keys = np.concatenate([in_a_row(key, 2), extra_key], axis=1)
    values = np.concatenate([in_a_row(value, 2), extra_value], axis=1)
    np.testing.assert_allclose(
        out, fastattn.dot_product_attention(in_a_row(query, 2), keys, values, mask=mask), atol=1e-5
    )


def test_unfold_of_torch():
    torch = pytest.importorskip("torch", reason="PyTorch's unfold as a witness")
    query, key, value = images(np.random.default_rng(18), (9, 11), (2,), 4, 4)
    patches = [
        torch.nn.functional.unfold(torch.from_numpy(np.moveaxis(x, -1, 1)), 3, padding=1).view(2, 4, 9, 99)
        for x in (key, value, np.ones_like(key))
    ]
    scores = torch.einsum("bpc,bckp->bpk", torch.from_numpy(in_a_row(query, 2)), patches[0]) / 2
    scores = scores.masked_fill(patches[2][:, 0].transpose(1, 2) == 0, -torch.inf)
    expected = torch.einsum("bpk,bckp->bpc", scores.softmax(-1), patches[1])
    out = fastattn.neighborhood_attention(query, key, value, (3, 3), edge="truncate")
    np.testing.assert_allclose(in_a_row(out, 2), expected.numpy(), atol=1e-5)


# ------------------------------------------------------------------------------------------------- same bits

CASES = (
    ((23, 37), {"kernel_size": (5, 5)}),
    ((40, 70), {"kernel_size": (3, 7), "stride": (2, 3), "edge": "truncate"}),
    ((200,), {"kernel_size": 9, "dilation": 4}),
    ((8, 9, 20), {"kernel_size": (3, 3, 3), "is_causal": (True, False, False)}),
)


def call(arrays, **arguments):
    return fastattn.neighborhood_attention(*arrays, **arguments, return_weights=True, return_lse=True)


@pytest.mark.parametrize(("space", "arguments"), CASES)
def test_threads_and_batch_change_no_bit(space, arguments):
    arrays = images(np.random.default_rng(19), space, (3, 2), 16, 16)
    expected = call(arrays, **arguments, num_threads=1)
    for num_threads in (2, 3, 7):
        for a, b in zip(expected, call(arrays, **arguments, num_threads=num_threads), strict=True):
            assert bits(a) == bits(b)
    for a, b in zip(expected, call([x[1, 1] for x in arrays], **arguments), strict=True):
        assert bits(a[1, 1]) == bits(b)
    shared = [x if i == 0 else x[:, :1] for i, x in enumerate(arrays)]
    repeated = [x if i == 0 else np.repeat(x[:, :1], 2, axis=1) for i, x in enumerate(arrays)]
    for a, b in zip(call(shared, **arguments), call(repeated, **arguments), strict=True):
        assert bits(a) == bits(b)


@pytest.mark.parametrize(("space", "arguments"), CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_layouts_change_no_bit(space, arguments, dtype):
    arrays = images(np.random.default_rng(20), space, (2,), 16, 16, dtype)
    expected = call(arrays, **arguments)
    for i in range(3):
        for name, same in layouts(arrays[i]):
            changed = [same if j == i else x for j, x in enumerate(arrays)]
            for a, b in zip(expected, call(changed, **arguments), strict=True):
                assert bits(a) == bits(b), name
    behind = [np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, -2)), -2, 0) for x in arrays]
    for _, out in layouts(np.zeros_like(expected[0])):
        if out.flags.writeable:
            call(behind, **arguments, out=out)
            assert bits(out) == bits(expected[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("space", "arguments"), CASES)
def test_what_is_not_seen_does_not_matter(space, arguments, bad):
    """A pixel of NaN or infinities reaches those that see it, and changes no bit of the others."""
    arrays = images(np.random.default_rng(21), space, (1,), 16, 16)
    where = {name: x for name, x in arguments.items() if name != "kernel_size"}
    keys, seen, _ = neighborhoods(space, arguments["kernel_size"], **where)
    before = call(arrays, **arguments)
    for pixel in (0, len(keys) // 2 + 3, len(keys) - 1):
        for which in (1, 2):
            changed = [x.copy() for x in arrays]
            changed[which].reshape(len(keys), -1)[pixel] = bad
            after = call(changed, **arguments)
            sees = np.any((keys == pixel) & seen, axis=1).reshape(space)
            assert bits(before[0][0, ~sees]) == bits(after[0][0, ~sees])
            assert bits(before[2][0, ~sees]) == bits(after[2][0, ~sees])
            if which == 2 or np.isnan(bad):
                assert not np.isfinite(after[0][0, sees]).any()


# --------------------------------------------------------------------------------------------------- hostile


def test_values_near_the_largest_number():
    for dtype in (np.float32, np.float64):
        query, key, value = images(np.random.default_rng(22), (5, 20), (1,), 4, 4, dtype)
        value[...] = np.where(value > 0, 1, -1) * np.finfo(dtype).max
        out = fastattn.neighborhood_attention(query, key, value, (3, 3))
        assert np.isfinite(out).all()
        value[...] = np.finfo(dtype).max
        out = fastattn.neighborhood_attention(query, key, value, (3, 3))
        np.testing.assert_allclose(out, value, rtol=1e-5)
        value[0, 0, 0] = np.inf
        out = fastattn.neighborhood_attention(query, key, value, (3, 3))
        assert np.isinf(out).any() and not np.isnan(out).any()


@pytest.mark.parametrize(("factor", "scale"), [(1e20, 1e-40), (1e-20, 1e40), (1e-10, 1e20), (1e10, 1e-20)])
def test_scales_far_from_one(factor, scale):
    query, key, value = images(np.random.default_rng(23), (5, 20), (1,))
    expected = reference.neighborhood_attention(query, key, value, (3, 3), scale=1.0)
    out = fastattn.neighborhood_attention(
        query * np.float32(factor), key * np.float32(factor), value, (3, 3), scale=scale
    )
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_scores_of_all_sizes():
    rng = np.random.default_rng(24)
    for size in (1e-30, 1e3, 1e10, 1e18):
        query, key, value = images(rng, (5, 20), (1,))
        assert_neighborhood(query * np.float32(size), key, value, (3, 3))
    query, key, value = images(rng, (5, 20), (1,), 1, 1)
    query[...], key[...] = 1, -1e30  # an ordinary row
    out = fastattn.neighborhood_attention(query, key, value, (3, 3))
    np.testing.assert_allclose(out, fastattn.neighborhood_attention(query * 0, key, value, (3, 3)), atol=1e-5)
    key[...] = -np.inf
    out, weights, lse = call((query, key, value), kernel_size=(3, 3))
    assert (out == 0).all() and (weights == 0).all() and (lse == -np.inf).all()
    _, sunk = fastattn.neighborhood_attention(query, key, value, (3, 3), sinks=2.5, return_lse=True)
    assert (sunk == 2.5).all()
    key[...] = np.inf
    assert np.isnan(fastattn.neighborhood_attention(query, key, value, (3, 3))).all()


def test_nothing_outside_the_arrays_is_touched():
    fresh_process.run("""
        import faulthandler; faulthandler.enable()
        import numpy as np
        from test_guard_pages import guarded
        import fastattn
        rng = np.random.default_rng(0)
        for at_end in (True, False):
            def normal(*shape):
                return guarded(rng.standard_normal(shape).astype(np.float32), at_end)
            for space, kernel in (((5,), 3), ((40,), 7), ((3, 17), (3, 3)), ((17, 3), (3, 2)), ((9, 33), (5, 5)),
                                  ((3, 4, 18), (2, 2, 3))):
                for channels in (1, 8, 16, 33):
                    for more in ({}, {"dilation": 1, "stride": 2, "edge": "truncate"},
                                 {"dilation": 2, "edge": "truncate", "is_causal": True}):
                        table = normal(2, *(2 * np.atleast_1d(kernel) - 1))
                        out = fastattn.neighborhood_attention(
                            *(normal(2, *space, channels) for _ in range(3)), kernel, **more, relative_bias=table,
                            sinks=normal(2), out=normal(2, *space, channels), return_weights=True, return_lse=True)
                        assert all(np.isfinite(x).all() for x in out)
    """)


def test_memory_grows_with_the_pixels():
    """A mask of these pixels would take 16 GiB."""
    fresh_process.run("""
        import resource
        import numpy as np
        import fastattn
        x = np.ones((1, 360, 360, 16), np.float32)
        fastattn.neighborhood_attention(x[:, :20, :20], x[:, :20, :20], x[:, :20, :20], (7, 7), num_threads=2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fastattn.neighborhood_attention(x, x, x, (7, 7), num_threads=2)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 2 * x.nbytes / 1024 + 4096, grown
    """)


# -------------------------------------------------------------------------------------------------- arguments


def refuse(error, message, *, shape=(2, 6, 7, 4), kernel_size=(3, 3), **arguments):
    x = np.ones(shape, np.float32)
    out = np.full(shape, 12345.0, np.float32)
    with pytest.raises(error, match=f"(?s){message}"):
        fastattn.neighborhood_attention(x, x, x, kernel_size, **arguments, out=out)
    assert (out == 12345.0).all()


@pytest.mark.parametrize("bad", [0, -1, (3, 0), (), (1, 1, 1, 1), "3", 1.5, None, (3, 1.5), True, np.ones((1, 2), int)])
def test_kernel_size(bad):
    refuse((ValueError, TypeError), "kernel_size", kernel_size=bad)


@pytest.mark.parametrize("name", ["dilation", "stride"])
@pytest.mark.parametrize("bad", [0, -1, (1, 0), (1,), (1, 1, 1), "1", 1.5, None, True])
def test_dilation_and_stride(name, bad):
    refuse((ValueError, TypeError), name, **{name: bad})


def test_causal_axes():
    refuse(ValueError, "is_causal.*3", is_causal=(True, False, True))
    for bad in (1, None, "True", (True, 1)):
        refuse(TypeError, "is_causal", is_causal=bad)


def test_what_does_not_fit():
    refuse(ValueError, "stride.*kernel_size, 3.*4", stride=4)
    refuse(ValueError, "kernel_size 3.*dilation 3.*7 pixels|kernel_size 3.*dilation 3.*6 pixels", dilation=3)
    refuse(ValueError, "kernel_size", kernel_size=(7, 3))
    refuse(ValueError, "query.*kernel_size.*4 axes", shape=(3, 4, 5), kernel_size=(2, 2, 2))
    for bad in ("wrap", "Clamp", ""):
        refuse(ValueError, "edge.*clamp.*truncate", edge=bad)
    for bad in (None, 1, b"clamp"):
        refuse(TypeError, "edge", edge=bad)
    refuse(ValueError, r"relative_bias.*\(3, 3\).*\(2, 5, 5\)", relative_bias=np.ones((3, 3)))
    refuse(TypeError, "relative_bias.*int64", relative_bias=np.ones((5, 5), np.int64))
    refuse(ValueError, "sinks", sinks=np.ones(3))
    refuse(TypeError, "return_weights", return_weights="band")


def test_pixels_that_differ_are_named():
    x, y = np.ones((2, 6, 7, 4), np.float32), np.ones((2, 6, 8, 4), np.float32)
    for arrays in ((x, y, y), (x, y, x), (x, x, y)):
        with pytest.raises(ValueError, match=r"query, key and value.*\(6, 8\)"):
            fastattn.neighborhood_attention(*arrays, (3, 3))
    with pytest.raises(ValueError, match="enable_gqa"):
        fastattn.neighborhood_attention(np.ones((4, 6, 7, 4)), x, x, (3, 3))
    with pytest.raises(ValueError, match="out overlaps relative_bias"):
        memory = np.zeros(2 * 6 * 7 * 4 + 25, np.float32)
        table, out = memory[:25].reshape(5, 5), memory[24:-1].reshape(x.shape)
        fastattn.neighborhood_attention(x, x, x, (3, 3), relative_bias=table, out=out)


def test_no_memory():
    x = np.broadcast_to(np.float32(1), (2**28, 2**28, 1))
    with pytest.raises(MemoryError):
        fastattn.neighborhood_attention(x, x, x, (3, 3), return_weights=True)
    x = np.ones((3, 3, 1), np.float32)
    with pytest.raises(MemoryError):
        fastattn.neighborhood_attention(x, x, x, (2**40, 2**40), edge="truncate", return_weights=True)
