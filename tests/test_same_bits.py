"""What must not change a bit: threads, batch, other rows, padding, memory layout, out=."""

import functools

import numpy as np
import pytest
from problems import DTYPES, bits, layouts, misaligned, qkv, spaced

import fastattn

THREADS = (1, 2, 3, 7)


def results(*arrays, function=fastattn.dot_product_attention, **arguments):
    """Output, lse, weights, and the output of a call that returns neither."""
    out, weights, lse = function(*arrays, **arguments, return_weights=True, return_lse=True)
    return out, lse, weights, function(*arrays, **arguments)


NAMES = ("output beside weights", "lse", "weights", "output")


def assert_same_bits(actual, expected, what):
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        if bits(a) != bits(b):
            count = np.count_nonzero(~((a == b) | (np.isnan(a) & np.isnan(b))))
            raise AssertionError(f"{what}: {name} differs in {count} of {a.size} numbers")


def arguments_of(rng, num_queries, num_keys, dtype=np.float32, batch=(2, 4)):
    """Keyword arguments by name: each rule alone and many together."""
    bias = rng.standard_normal((*batch[-1:], num_queries, num_keys)).astype(dtype)
    band = rng.standard_normal((*batch[-1:], num_queries, 51)).astype(dtype)
    mask = rng.random((num_queries, num_keys)) < 0.7
    lengths = rng.integers(num_keys // 2, num_keys + 1, (*batch[:-1], 1))
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "window": {"window_size": (40, 10)},
        "chunks": {"chunk_size": 30, "left_chunks": 2},
        "relative bias": {"window_size": (40, 10), "relative_bias": band},
        "mask": {"mask": mask},
        "bias": {"bias": bias},
        "together": {
            "is_causal": True,
            "window_size": (num_keys // 2, None),
            "key_lengths": lengths,
            "mask": mask,
            "bias": bias,
            "chunk_size": num_keys // 5 + 1,
            "left_chunks": 2,
            "relative_bias": rng.standard_normal((*batch[-1:], 1, num_keys // 2 + 1)).astype(dtype),
            "alibi_slopes": np.linspace(0.1, 0.5, batch[-1]).astype(dtype),
            "sinks": np.linspace(-1, 1, batch[-1]).astype(dtype),
            "softcap": 20.0,
        },
    }


KINDS = ("plain", "causal", "window", "chunks", "relative bias", "mask", "bias", "together")


# ------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 333), (1, 2500), (5, 4000)])
def test_threads(rng, shape, dtype, kind):
    arrays = qkv(rng, (2, 4), *shape, 48, dtype=dtype)
    arguments = arguments_of(rng, *shape, dtype)[kind]
    expected = results(*arrays, **arguments, num_threads=1)
    for num_threads in THREADS[1:]:
        assert_same_bits(results(*arrays, **arguments, num_threads=num_threads), expected, f"{num_threads} threads")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, (1, 1), (100, 50), (700, 0)])
def test_tiles(rng, window, dtype):
    """Their size depends on the number of threads; here some straddle the end of a span of keys."""
    q, k, v = qkv(rng, (2,), 2500, 2500, 24, dtype=dtype)
    expected = fastattn.dot_product_attention(q, k, v, window_size=window, return_lse=True, num_threads=1)
    for threads in THREADS[1:]:
        actual = fastattn.dot_product_attention(q, k, v, window_size=window, return_lse=True, num_threads=threads)
        assert [bits(x) for x in actual] == [bits(x) for x in expected], threads


@pytest.mark.parametrize("num_queries", [1, 2, 16])
def test_threads_on_one_head_with_a_long_row(rng, num_queries):
    """With fewer rows than threads, only the keys can be split."""
    arrays = qkv(rng, (), num_queries, 30_001, 32)
    expected = results(*arrays, num_threads=1)
    for num_threads in THREADS[1:]:
        assert_same_bits(results(*arrays, num_threads=num_threads), expected, f"{num_threads} threads")


def test_again(rng):
    arrays = qkv(rng, (2, 4), 200, 333, 48)
    expected = results(*arrays)
    for _ in range(5):
        assert_same_bits(results(*arrays), expected, "a second call")


# ------------------------------------------------------------------------------- batch, heads, rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(70, 133), (1, 1100)])
def test_each_head_alone(rng, shape, kind):
    query, key, value = qkv(rng, (2, 4), *shape, 40)
    arguments = arguments_of(rng, *shape)[kind]
    together = results(query, key, value, **arguments)
    for b in range(2):
        for h in range(4):
            own = dict(arguments)
            for name in ("bias", "relative_bias", "alibi_slopes", "sinks"):
                if name in own:
                    own[name] = own[name][h]
            if "key_lengths" in own:
                own["key_lengths"] = int(own["key_lengths"][b, 0])
            alone = results(query[b, h], key[b, h], value[b, h], **own)
            assert_same_bits(alone, [x[b, h] for x in together], f"batch {b}, head {h}")


@pytest.mark.parametrize("num_queries", [1, 3, 60])
@pytest.mark.parametrize("group", [2, 4])
def test_grouped_heads_are_repeated_heads(rng, group, num_queries):
    query, key, value = qkv(rng, (2, 8), num_queries, 333, 40, kv_batch=(2, 8 // group))
    repeated = [np.repeat(x, group, axis=-3) for x in (key, value)]
    for arguments in ({}, {"is_causal": True}, {"sinks": np.linspace(-1, 1, 8).astype(np.float32)}):
        assert_same_bits(
            results(query, key, value, enable_gqa=True, **arguments),
            results(query, *repeated, **arguments),
            f"groups of {group}",
        )


@pytest.mark.parametrize("num_queries", [1, 60])
def test_broadcast_axes_are_copies(rng, num_queries):
    query, key, value = qkv(rng, (3, 4), num_queries, 333, 40, kv_batch=(4,))
    key, value = key[:1], value[:1]
    expected = results(query, *(np.broadcast_to(x, (3, 4, *x.shape[-2:])).copy() for x in (key, value)))
    assert_same_bits(results(query, key, value), expected, "broadcast by the call")
    views = [np.broadcast_to(x, (3, 4, *x.shape[-2:])) for x in (key, value)]
    assert_same_bits(results(query, *views), expected, "strides of zero")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [1e4, 1e30, np.nan, np.inf])
def test_what_other_rows_hold(rng, kind, bad):
    """Every third query, or every second head, holds extreme numbers: the other rows are unaffected."""
    query, key, value = qkv(rng, (2, 4), 70, 133, 40)
    arguments = arguments_of(rng, 70, 133)[kind]
    expected = results(query, key, value, **arguments)
    other = query.copy()
    other[..., ::3, :] *= np.float32(bad)
    rows = np.arange(70) % 3 != 0
    assert_same_bits(
        [x[..., rows, :] if x.ndim == 4 else x[..., rows] for x in results(other, key, value, **arguments)],
        [x[..., rows, :] if x.ndim == 4 else x[..., rows] for x in expected],
        "other queries",
    )
    other = [x.copy() for x in (query, key, value)]
    for x in other:
        x[:, ::2] *= np.float32(bad)
    assert_same_bits([x[:, 1::2] for x in results(*other, **arguments)], [x[:, 1::2] for x in expected], "other heads")


# ------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("padding", [1, 15, 16, 64, 300])
@pytest.mark.parametrize("garbage", [0.0, np.nan, np.inf, 1e38])
@pytest.mark.parametrize("num_queries", [1, 50])
@pytest.mark.parametrize("causal", [False, True])
def test_padded_keys(rng, num_queries, garbage, padding, causal):
    query, key, value = qkv(rng, (2, 3), num_queries, 133, 24)
    bias = rng.standard_normal((num_queries, 133)).astype(np.float32)
    expected = results(query, key, value, bias=bias, is_causal=causal)

    def pad(x, axis):
        widths = [(0, padding if a == axis else 0) for a in range(x.ndim)]
        return np.pad(x, widths, constant_values=np.float32(garbage))

    padded = results(query, pad(key, 2), pad(value, 2), bias=pad(bias, 1), is_causal=causal, key_lengths=133)
    assert (padded[2][..., 133:] == 0).all()
    padded = (*padded[:2], padded[2][..., :133], padded[3])
    assert_same_bits(padded, expected, f"{padding} keys of {garbage}")


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_padded_batch(rng, garbage):
    """A batch of unequal lengths: the padding of keys and queries affects nothing."""
    query, key, value = qkv(rng, (3, 2), 50, 50, 24)
    lengths = np.array([[50], [7], [33]])
    expected = results(query, key, value, key_lengths=lengths, query_lengths=lengths, is_causal=True)
    for b, n in enumerate(lengths[:, 0]):
        for x in (query, key, value):
            x[b, :, n:] = garbage
    spoiled = results(query, key, value, key_lengths=lengths, query_lengths=lengths, is_causal=True)
    assert_same_bits(spoiled, expected, f"padding of {garbage}")
    assert (spoiled[0][1, :, 7:] == 0).all()


# ---------------------------------------------------------------------------------- layout of memory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(35, 70, 24), (1, 300, 24), (33, 40, 1), (17, 65, 130)])
def test_strides(rng, shape, dtype):
    query, key, value = qkv(rng, (2, 4), *shape, dtype=dtype)
    bias = rng.standard_normal((2, 4, *shape[:2])).astype(dtype)
    mask = rng.random((2, 4, *shape[:2])) < 0.8
    expected = results(query, key, value, bias=bias, mask=mask, is_causal=True)
    variants = zip(*(layouts(x) for x in (query, key, value, bias, mask)), strict=True)
    for named in variants:
        name, arrays = named[0][0], [array for _, array in named]
        same = results(*arrays[:3], bias=arrays[3], mask=arrays[4], is_causal=True)
        assert_same_bits(same, expected, f"all inputs {name}")
        if name in ("transposed", "misaligned", "negative strides"):
            for k, x in enumerate(("query", "key", "value")):
                mixed = [query, key, value]
                mixed[k] = arrays[k]
                same = results(*mixed, bias=bias, mask=mask, is_causal=True)
                assert_same_bits(same, expected, f"{x} {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 2, 4, 50, 300])
def test_where_in_a_line_of_the_cache_arrays_begin(rng, num_queries, dtype):
    arrays = qkv(rng, (2,), num_queries, 700, 64, dtype=dtype)
    expected = None
    for offset in (0, 8, 16, 32):
        moved = []
        for x in arrays:
            room = np.empty(x.nbytes + 128, np.uint8)
            begin = -room.ctypes.data % 64 + offset
            moved.append(room[begin : begin + x.nbytes].view(dtype).reshape(x.shape))
            moved[-1][...] = x
        actual = results(*moved)
        expected = expected or actual
        assert_same_bits(actual, expected, f"arrays that begin {offset} bytes after a line")


def test_strides_of_small_arguments(rng):
    """Lengths, offsets, slopes and sinks may be views as well."""
    arrays = qkv(rng, (2, 4), 35, 70)
    lengths, offsets = rng.integers(30, 71, (2, 4)), rng.integers(-5, 40, (2, 4))
    slopes, sinks = (rng.standard_normal((2, 4)).astype(np.float32) for _ in range(2))
    names = ("key_lengths", "query_offset", "alibi_slopes", "sinks")
    plain = dict(zip(names, (lengths, offsets, slopes, sinks), strict=True))
    expected = results(*arrays, is_causal=True, **plain)
    for change in (lambda x: x.T.copy().T, lambda x: x[:, ::-1].copy()[:, ::-1], spaced, misaligned):
        changed = {name: change(x) for name, x in plain.items()}
        assert_same_bits(results(*arrays, is_causal=True, **changed), expected, "views")


def test_zero_strides_along_rows_and_channels(rng):
    query, key, value = qkv(rng, (2,), 35, 70, 24)
    views = [
        np.broadcast_to(query[:, :1], query.shape),
        np.broadcast_to(key[..., :1], key.shape),
        np.broadcast_to(value[:, :1, :1], value.shape),
    ]
    bias = np.broadcast_to(rng.standard_normal((35, 1)).astype(np.float32), (35, 70))
    expected = results(*(x.copy() for x in views), bias=bias.copy())
    assert_same_bits(results(*views, bias=bias), expected, "strides of zero")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(35, 70), (1, 70)])
def test_out_in_any_layout(rng, shape, dtype):
    arrays = qkv(rng, (2, 4), *shape, 24, 20, dtype=dtype)
    expected, lse = fastattn.dot_product_attention(*arrays, return_lse=True)
    for name, out in layouts(np.full_like(expected, 7)):
        if not out.flags.writeable:
            continue
        result, lse_too = fastattn.dot_product_attention(*arrays, out=out, return_lse=True)
        assert result is out, name
        assert bits(out) == bits(expected), name
        assert bits(lse_too) == bits(lse), name


def test_out_leaves_the_gaps_alone(rng):
    """An out= that is part of a larger array: only that part is written."""
    arrays = qkv(rng, (2, 4), 35, 70, 24)
    expected = fastattn.dot_product_attention(*arrays)
    large = np.full((2, 40, 6, 30), 7, dtype=np.float32)
    out = large[:, 2:37, 1:5, 3:27].swapaxes(1, 2)
    fastattn.dot_product_attention(*arrays, out=out)
    assert bits(out) == bits(expected)
    out[...] = 7
    assert (large == 7).all()


def test_out_beside_an_input_in_one_buffer(rng):
    """Interleaved with an input, but without a shared byte: allowed."""
    query, key, value = qkv(rng, (2,), 35, 70, 24)
    expected = fastattn.dot_product_attention(query, key, value)
    buffer = np.empty((2, 35, 48), dtype=np.float32)
    buffer[..., :24] = query
    out = fastattn.dot_product_attention(buffer[..., :24], key, value, out=buffer[..., 24:])
    assert bits(out) == bits(expected)
    np.testing.assert_array_equal(buffer[..., :24], query)


def test_threads_and_layout_together(rng):
    query, key, value = qkv(rng, (2, 4), 200, 333, 48)
    expected = results(query, key, value, is_causal=True, num_threads=1)
    swapped = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (query, key, value)]
    for num_threads in THREADS:
        same = results(*swapped, is_causal=True, num_threads=num_threads)
        assert_same_bits(same, expected, f"sequence before heads, {num_threads} threads")


def test_the_check_can_fail(rng):
    arrays = qkv(rng, (2, 4), 20, 33)
    expected = results(*arrays)
    changed = [x.copy() for x in expected]
    changed[3][1, 2, 3, 4] = np.nextafter(changed[3][1, 2, 3, 4], np.float32(np.inf))
    with pytest.raises(AssertionError, match="output differs in 1 of"):
        assert_same_bits(changed, expected, "one bit")


def test_varlen(rng):
    query, key, value = qkv(rng, (4,), 300, 300, 32)
    call = functools.partial(
        fastattn.varlen_attention, query, key, value, [0, 10, 10, 150, 300], is_causal=True, return_lse=True
    )
    expected = call(num_threads=1)
    for num_threads in THREADS:
        assert [bits(x) for x in call(num_threads=num_threads)] == [bits(x) for x in expected]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_unseen_values_that_are_not_finite(rng, dtype, garbage):
    """Values that are not finite take a separate path, which must add in the same order."""
    query, key, value = (rng.standard_normal((1, 300, 48)).astype(dtype) for _ in range(3))
    mask = rng.random((300, 300)) < 0.5
    mask[:, 77] = False
    expected = fastattn.dot_product_attention(query, key, value, mask=mask)
    value[:, 77] = garbage
    key[:, 77] = garbage
    np.testing.assert_array_equal(fastattn.dot_product_attention(query, key, value, mask=mask), expected)


# ---------------------------------------------------------------------------------- from the tokens on


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def projected_calls(rng, dtype):
    """By name: a call of (x, lengths, ...) that begins with products."""
    w = [(normal(rng, 24, 24) / 5).astype(dtype) for _ in range(4)]
    layer = fastattn.MultiHeadAttention(*w, num_heads=4, b_query=normal(rng, 24), rotary_base=1e4)
    w_score = normal(rng, 24, dtype=dtype)

    def of_layer(x, lengths, **more):
        return layer(x, key_lengths=lengths, query_lengths=lengths, is_causal=True, **more)

    def scored(function, *first, **matrices):
        return lambda x, lengths, **more: getattr(fastattn, function)(
            x, x, x, *first, **matrices, key_lengths=lengths, query_lengths=lengths, **more
        )

    return {
        "MultiHeadAttention": of_layer,
        "self_attention": lambda x, lengths, **more: fastattn.self_attention(
            x, *w[:3], key_lengths=lengths, query_lengths=lengths, **more
        ),
        "additive_attention": scored("additive_attention", w_score, w_query=w[0], w_key=w[1]),
        "bilinear_attention": scored("bilinear_attention", w[0], w[1]),
    }


@pytest.mark.parametrize("dtype", [*DTYPES, np.float16])
@pytest.mark.parametrize("name", ["MultiHeadAttention", "self_attention", "additive_attention", "bilinear_attention"])
def test_rows_of_projected_tokens(rng, name, dtype):
    """Padded or cut, alone or in a batch, on any threads: from the tokens on, with more than eight of them a call."""
    call = projected_calls(rng, dtype)[name]
    x, lengths = normal(rng, 3, 70, 24, dtype=dtype), np.array([70, 9, 33])
    expected = call(x, lengths, num_threads=1)
    for num_threads in THREADS[1:]:
        assert bits(call(x, lengths, num_threads=num_threads)) == bits(expected), num_threads
    spoiled = x.copy()
    for b, n in enumerate(lengths):
        spoiled[b, n:] = np.nan
    padded = call(spoiled, lengths)
    for b, n in enumerate(lengths):
        assert bits(padded[b, :n]) == bits(expected[b, :n]), "what padding holds"
        alone = call(x[b, :n], int(n))
        assert bits(alone) == bits(expected[b, :n]), f"sequence {b} without padding and batch"
        assert bits(call(x[b], int(n))[:n]) == bits(alone), f"sequence {b} alone"
    for layout, other in layouts(x):
        assert bits(call(other, lengths)) == bits(expected), layout
