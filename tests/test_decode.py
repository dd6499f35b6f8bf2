"""Few queries against many keys, as when a model generates tokens one by one.

One to eight queries use decode loops, which read keys in place; the heads of a group are processed together, unless
there are 128 queries or more; and several threads share the keys of a head, split at multiples of 2048. Nine queries
and more, which use the prefill loops, are tested beside them.
"""

import functools
import tracemalloc

import numpy as np
import pytest
from problems import DTYPES, HEAD_DIMS, RULES, bits, layouts, qkv, rules, sixteen_bits
from test_hostile import assert_convex
from test_same_bits import NAMES, assert_same_bits, results
from tolerances import assert_attention, assert_within

import fastattn
from fastattn import reference

QUERIES = (1, 2, 3, 4, 5, 8, 9)
# Around the ends of blocks of 256 keys, and of spans of 2048.
KEYS = (0, 1, 255, 256, 257, 2047, 2048, 2049, 5000, 10_000)
GROUPS = (1, 2, 3, 7, 8, 12, 32)
THREADS = (2, 5)
SPAN = 2048


def attend(*arrays, **arguments):
    return fastattn.dot_product_attention(*arrays, **arguments)


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def grouped(rng, group, num_queries=1, num_keys=300, head_dim=40, value_dim=24, dtype=np.float32, kv_heads=2, batch=2):
    return qkv(
        rng, (batch, kv_heads * group), num_queries, num_keys, head_dim, value_dim, dtype, kv_batch=(batch, kv_heads)
    )


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("dtype", [*DTYPES, *sixteen_bits()])
@pytest.mark.parametrize("num_keys", KEYS)
@pytest.mark.parametrize("num_queries", QUERIES)
def test_sizes(rng, num_queries, num_keys, dtype):
    arrays = qkv(rng, (2,), num_queries, num_keys, 24, 20, dtype)
    assert_attention(*arrays)
    assert_attention(*arrays, is_causal=True, num_threads=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hundred", [0, 100, 200])
def test_every_head_dim(rng, hundred, dtype):
    """Whole vectors of channels, with every possible remainder."""
    for head_dim in range(hundred, hundred + 101):
        for num_queries in (1, 3):
            query, key, value = qkv(rng, (), num_queries, 37, head_dim, 5, dtype)
            expected, lse = reference.dot_product_attention(query, key, value, return_lse=True)
            actual = attend(query, key, value, return_lse=True)
            tolerance = 64 * np.finfo(dtype).eps
            assert_within(actual[0], expected, tolerance, f"head_dim {head_dim}, output")
            assert_within(actual[1], lse, tolerance, f"head_dim {head_dim}, lse")


@pytest.mark.parametrize("dtype", [*DTYPES, *sixteen_bits()])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(rng, head_dim, dtype):
    for num_queries in (1, 4):
        assert_attention(*qkv(rng, (2,), num_queries, 270, head_dim, 9, dtype))


@pytest.mark.parametrize("value_dim", HEAD_DIMS)
@pytest.mark.parametrize("num_queries", [1, 4])
def test_value_dims(rng, num_queries, value_dim):
    for dtype in (*DTYPES, *sixteen_bits()):
        assert_attention(*qkv(rng, (2,), num_queries, 270, 24, value_dim, dtype))


def test_no_channels(rng):
    """All scores are 0."""
    for num_queries in QUERIES:
        query, key, value = qkv(rng, (2,), num_queries, 3000, 0, 7)
        expected = np.broadcast_to(value.mean(-2, keepdims=True, dtype=np.float64), (2, num_queries, 7))
        for num_threads in (1, 2):
            np.testing.assert_allclose(attend(query, key, value, num_threads=num_threads), expected, atol=1e-6)
        assert_attention(query, key, value, softcap=2.0, bias=normal(rng, 3000))


def test_no_rows(rng):
    for num_queries in (0, 1, 4):
        arrays = qkv(rng, (2, 4), num_queries, 0, 8, 6, kv_batch=(2, 2))
        for sinks, lse_of_nothing in (({}, -np.inf), ({"sinks": np.float32(1.5)}, 1.5)):
            out, lse = attend(*arrays, enable_gqa=True, return_lse=True, **sinks)
            assert out.shape == (2, 4, num_queries, 6)
            assert (out == 0).all()
            assert (lse == lse_of_nothing).all()


# ------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("num_queries", QUERIES)
@pytest.mark.parametrize("rule", RULES)
def test_rules(rng, rule, num_queries):
    for dtype in DTYPES:
        for num_keys in (70, 300):
            arrays = qkv(rng, (2, 3), num_queries, num_keys, dtype=dtype)
            assert_attention(*arrays, **rules(rng, (2, 3), num_queries, num_keys, dtype)[rule])


@pytest.mark.parametrize("dtype", [np.float32, *sixteen_bits()])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_rules_over_several_spans(rng, rule, num_queries, dtype):
    arrays = qkv(rng, (1, 2), num_queries, 5000, 16, 8, dtype)
    arguments = rules(rng, (1, 2), num_queries, 5000, np.float32)[rule]
    assert_attention(*arrays, **arguments, num_threads=2)


@pytest.mark.parametrize("window", [(0, 0), (300, 5), (2047, 0), (2048, 0), (3000, 2000), (9999, 9999)])
@pytest.mark.parametrize("offset", [None, 0, 2047, 2048, 2049, 4000, -3, 10**18, -(10**18)])
def test_windows_over_several_spans(rng, offset, window):
    """A window may begin and end anywhere in a span, and skip whole spans."""
    for num_queries in (1, 4):
        arrays = qkv(rng, (), num_queries, 5000, 8, 5)
        call = functools.partial(attend, *arrays, window_size=window, query_offset=offset, return_lse=True)
        expected = reference.dot_product_attention(*arrays, window_size=window, query_offset=offset, return_lse=True)
        for num_threads in (1, 2):
            for actual, wanted in zip(call(num_threads=num_threads), expected, strict=True):
                assert_within(actual, wanted, 2e-5, "output or lse")


def test_masks_that_hide_spans(rng):
    """Fully hidden spans, at the beginning, in the middle and at the end."""
    query, key, value = qkv(rng, (2,), 1, 4 * SPAN + 100, 16, 8)
    for spans in ((0,), (1,), (2, 3, 4), (0, 1, 2, 3), (0, 2, 4), range(5)):
        mask = rng.random(4 * SPAN + 100) < 0.5
        for span in spans:
            mask[span * SPAN : (span + 1) * SPAN] = False
        bias = np.where(mask, 0, -np.inf).astype(np.float32)
        for arguments in ({"mask": mask}, {"bias": bias}, {"mask": mask, "activation": "relu"}):
            expected = assert_attention(query, key, value, **arguments, num_threads=1)
            assert bits(attend(query, key, value, **arguments, num_threads=2)) == bits(expected)
            spoiled = [np.where(mask[:, None], x, np.float32(np.nan)) for x in (key, value)]
            for num_threads in (1, 2):
                same = attend(query, *spoiled, **arguments, num_threads=num_threads)
                np.testing.assert_array_equal(same, expected)


@pytest.mark.parametrize("name", ["additive_attention", "bilinear_attention"])
@pytest.mark.parametrize("num_queries", [1, 4])
def test_other_scores(rng, name, num_queries):
    weights = {"w_score": normal(rng, 12)} if name[0] == "a" else {"w_query": normal(rng, 12, 7) / 4}
    for num_keys in (257, 2049):
        arrays = qkv(rng, (1, 6), num_queries, num_keys, 12, 9, kv_batch=(1, 2))
        arguments = rules(rng, (1, 6), num_queries, num_keys)
        for rule in ("together", "relative bias that hides", "sinks"):
            assert_attention(*arrays, name=name, enable_gqa=True, **weights, **arguments[rule], num_threads=2)


@pytest.mark.parametrize("num_queries", [1, 4, 8])
def test_packed_sequences(rng, num_queries):
    """None with more than eight queries: the same loop, each sequence with keys of its own."""
    cuts_q = np.arange(6) * num_queries
    cuts_q[3] -= 1
    cuts_k = np.array([0, 5, 300, 300, 2700, 5000])
    arrays = [normal(rng, heads, n, 24) for heads, n in ((4, cuts_q[-1]), (2, 5000), (2, 5000))]
    for arguments in ({}, {"is_causal": True}, {"window_size": (250, 3)}, {"sinks": normal(rng, 4)}):
        call = functools.partial(
            fastattn.varlen_attention, *arrays, cuts_q, cuts_k, enable_gqa=True, return_lse=True, **arguments
        )
        expected = reference.varlen_attention(*arrays, cuts_q, cuts_k, enable_gqa=True, return_lse=True, **arguments)
        first = call(num_threads=1)
        for actual, wanted in zip(first, expected, strict=True):
            assert_within(actual, wanted, 2e-5, "output or lse")
        for num_threads in THREADS:
            assert [bits(x) for x in call(num_threads=num_threads)] == [bits(x) for x in first]


# ------------------------------------------------------------------------------------------ groups


@pytest.mark.parametrize("dtype", [*DTYPES, *sixteen_bits()])
@pytest.mark.parametrize("group", GROUPS)
def test_groups(rng, group, dtype):
    for num_queries in (1, 2):
        arrays = grouped(rng, group, num_queries, dtype=dtype)
        assert_attention(*arrays, enable_gqa=True)
        lengths = rng.integers(100, 301, (2, 1))
        assert_attention(*arrays, enable_gqa=True, key_lengths=lengths, is_causal=True, window_size=(90, None))


@pytest.mark.parametrize("num_queries", [1, 3, 11])
@pytest.mark.parametrize("group", GROUPS)
def test_an_argument_for_each_query_head(rng, group, num_queries):
    """What differs between the heads of a group must not be taken from its first head."""
    arrays = grouped(rng, group, num_queries)
    heads = 2 * group
    band = {"window_size": (200, 5), "query_offset": 260}
    for arguments in (
        {"alibi_slopes": normal(rng, heads) / 50},
        {"alibi_slopes": normal(rng, 2, heads) / 50},
        {"sinks": 3 * normal(rng, heads)},
        {"sinks": 3 * normal(rng, 2, 1)},
        {"bias": normal(rng, heads, 1, 300)},
        {"bias": normal(rng, 2, heads, num_queries, 300), "mask": rng.random((heads, 1, 300)) < 0.7},
        {"mask": rng.random((2, heads, num_queries, 300)) < 0.7},
        {"mask": rng.random((2, 1, 1, 300)) < 0.7},
        {"relative_bias": normal(rng, heads, 1, 206), **band},
        {"relative_bias": normal(rng, 2, heads, num_queries, 206), **band, "activation": "sigmoid"},
        {"relative_bias": normal(rng, 206), **band, "sinks": normal(rng, heads), "softcap": 4.0},
        {"alibi_slopes": np.float32(0.01), "query_offset": 310, "window_size": (150, 20), "activation": "relu"},
        {"query_lengths": num_queries - 1, "sinks": normal(rng, heads)},
    ):
        assert_attention(*arrays, enable_gqa=True, **arguments)


@pytest.mark.parametrize("num_queries", [1, 3, 10])
@pytest.mark.parametrize("group", [2, 3, 8])
def test_lengths_and_offsets_that_differ_within_a_group(rng, group, num_queries):
    arrays = grouped(rng, group, num_queries)
    heads = 2 * group
    for shape in ((2, heads), (1, heads), (2, 1), (1, 1)):
        key_lengths, offsets = rng.integers(0, 301, shape), rng.integers(-20, 320, shape)
        query_lengths = rng.integers(0, num_queries + 1, shape)
        for arguments in (
            {"key_lengths": key_lengths},
            {"key_lengths": key_lengths, "is_causal": True, "window_size": (60, 0)},
            {"query_offset": offsets, "is_causal": True, "chunk_size": 50, "left_chunks": 1},
            {"query_lengths": query_lengths, "sinks": normal(rng, heads)},
            {"query_lengths": query_lengths, "key_lengths": key_lengths, "is_causal": True},
            {"query_offset": offsets, "window_size": (30, 30), "relative_bias": normal(rng, heads, 1, 61)},
            {"query_offset": offsets, "alibi_slopes": normal(rng, heads) / 50},
        ):
            assert_attention(*arrays, enable_gqa=True, **arguments)


def test_strides_of_zero_within_a_group(rng):
    """Heads that share memory, and broadcast lengths: the same answer."""
    query, key, value = grouped(rng, 6)
    expected = results(query, key, value, enable_gqa=True, key_lengths=np.full((2, 12), 250))
    view = np.broadcast_to(np.array([[250]]), (2, 12))
    assert_same_bits(results(query, key, value, enable_gqa=True, key_lengths=view), expected, "lengths")
    assert_same_bits(results(query, key, value, enable_gqa=True, key_lengths=250), expected, "one length")
    one = np.broadcast_to(query[:, :1], query.shape)
    same = results(one, key, value, enable_gqa=True)
    assert_same_bits(same, results(one.copy(), key, value, enable_gqa=True), "one query for all heads")


def test_batch_axes_of_groups_broadcast(rng):
    for query_batch, kv_batch in (((6,), (2,)), ((2, 6), (3,)), ((2, 1, 6), (4, 2)), ((1, 6), (3, 1)), ((6,), (1,))):
        for num_queries in (1, 2):
            assert_attention(*qkv(rng, query_batch, num_queries, 270, kv_batch=kv_batch), enable_gqa=True)


@pytest.mark.parametrize("num_queries", [1, 2, 3, 8, 9, 70])
@pytest.mark.parametrize("group", [2, 5])
def test_rows_of_a_group_anywhere_in_memory(rng, group, num_queries):
    """Queries and outputs ordered by token or by head, masks and biases per row: a row of a tile is a query of a
    head."""
    arrays = grouped(rng, group, num_queries)
    batch = (2, 2 * group)
    rows = (*batch, num_queries)
    band = {"window_size": (200, 5), "query_offset": 270}
    for arguments in (
        {"is_causal": True, "key_lengths": np.array([[300], [211]])},
        {"mask": rng.random((*rows, 300)) < 0.7, "bias": normal(rng, *rows, 300), "alibi_slopes": normal(rng, *batch)},
        {"relative_bias": normal(rng, *rows, 206), "sinks": normal(rng, *batch), **band},
        {"chunk_size": 2, "left_chunks": 40, "query_lengths": np.array([[num_queries], [num_queries // 2]])},
    ):
        expected = results(*arrays, enable_gqa=True, **arguments)
        assert_attention(*arrays, enable_gqa=True, **arguments)
        by_tokens = [np.ascontiguousarray(np.swapaxes(x, 1, 2)).swapaxes(1, 2) for x in arrays]
        assert_same_bits(results(*by_tokens, enable_gqa=True, **arguments), expected, "by tokens")
        backwards = [np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1] for x in arrays]
        assert_same_bits(results(*backwards, enable_gqa=True, **arguments), expected, "backwards")
        out = np.full((2, num_queries, 2 * group, 24), np.nan, dtype=np.float32).swapaxes(1, 2)
        attend(*arrays, enable_gqa=True, out=out, **arguments)
        assert bits(np.ascontiguousarray(out)) == bits(expected[-1])


# -------------------------------------------------------------------------------------------- bits


def assert_threads_do_not_matter(call, what):
    expected = call(num_threads=1)
    for num_threads in THREADS:
        assert_same_bits(call(num_threads=num_threads), expected, f"{what}, {num_threads} threads")


@pytest.mark.parametrize("dtype", [*DTYPES, *sixteen_bits()])
@pytest.mark.parametrize("num_keys", [SPAN, SPAN + 1, 5000, 20_000])
@pytest.mark.parametrize("num_queries", QUERIES)
def test_threads(rng, num_queries, num_keys, dtype):
    for batch in ((), (3,)):
        arrays = qkv(rng, batch, num_queries, num_keys, 40, 24, dtype)
        assert_threads_do_not_matter(functools.partial(results, *arrays), batch)


@pytest.mark.parametrize("num_queries", [1, 4])
@pytest.mark.parametrize("rule", RULES)
def test_threads_under_rules(rng, rule, num_queries):
    arguments = rules(rng, (1, 2), num_queries, 9000)[rule]
    arrays = qkv(rng, (1, 2), num_queries, 9000, 40, 24)
    if arguments.get("activation", "softmax") == "softmax":
        assert_threads_do_not_matter(functools.partial(results, *arrays, **arguments), rule)
    else:
        expected = attend(*arrays, **arguments, return_weights=True, num_threads=1)
        for num_threads in THREADS:
            same = attend(*arrays, **arguments, return_weights=True, num_threads=num_threads)
            assert [bits(x) for x in same] == [bits(x) for x in expected]


@pytest.mark.parametrize("num_queries", [1, 3, 9])
@pytest.mark.parametrize("group", [1, 2, 7, 12])
def test_threads_on_groups(rng, group, num_queries):
    for num_keys in (3000, 9000):
        arrays = grouped(rng, group, num_queries, num_keys, batch=1)
        lengths = np.array([[num_keys - 30]])
        for arguments in ({}, {"key_lengths": lengths, "is_causal": True}, {"sinks": normal(rng, 2 * group)}):
            call = functools.partial(results, *arrays, enable_gqa=True, **arguments)
            assert_threads_do_not_matter(call, f"groups of {group}")


def test_band_on_threads(rng):
    arrays = qkv(rng, (2,), 3, 9000)
    arguments = {"window_size": (5000, 10), "relative_bias": normal(rng, 3, 5011), "query_offset": np.array([8990, 30])}
    call = functools.partial(attend, *arrays, **arguments, return_weights="band", return_lse=True)
    expected = call(num_threads=1)
    for num_threads in THREADS:
        assert [bits(x) for x in call(num_threads=num_threads)] == [bits(x) for x in expected]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_keys", [257, 2500])
@pytest.mark.parametrize(
    "group, num_queries", [*((group, 1) for group in GROUPS), (3, 2), (7, 3), (2, 8), (3, 9), (2, 127), (2, 128)]
)
def test_alone_in_a_group_and_in_a_batch(rng, group, num_queries, num_keys, dtype):
    """A head has the same bits whatever is computed with it."""
    query, key, value = grouped(rng, group, num_queries, num_keys, dtype=dtype)
    heads = 2 * group
    per_head = {
        "bias": normal(rng, 2, heads, num_queries, num_keys, dtype=dtype),
        "relative_bias": normal(rng, 2, heads, num_queries, num_keys // 2 + 11, dtype=dtype),
        "sinks": normal(rng, 2, heads, dtype=dtype),
        "alibi_slopes": normal(rng, 2, heads, dtype=dtype) / 100,
    }
    shared = {"window_size": (num_keys // 2, 10), "is_causal": False, "softcap": 9.0}
    plain = results(query, key, value, enable_gqa=True)
    ruled = results(query, key, value, enable_gqa=True, **shared, **per_head)
    repeated = [np.repeat(x, group, axis=1) for x in (key, value)]
    assert_same_bits(results(query, *repeated), plain, "repeated heads")
    assert_same_bits(results(query, *repeated, **shared, **per_head), ruled, "repeated heads, with rules")
    for b, h in ((0, 0), (0, heads - 1), (1, heads // 2)):
        arrays = query[b, h], key[b, h // group], value[b, h // group]
        assert_same_bits(results(*arrays), [x[b, h] for x in plain], f"batch {b}, head {h}")
        own = {name: x[b, h] for name, x in per_head.items()}
        assert_same_bits(results(*arrays, **shared, **own), [x[b, h] for x in ruled], f"batch {b}, head {h}, rules")
    # A few heads of the group.
    some = slice(0, max(group // 2, 1))
    part = results(query[:, some], key[:, :1], value[:, :1], enable_gqa=True)
    assert_same_bits(part, [x[:, some] for x in plain], "some heads of a group")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("num_queries", [1, 3, 10])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_what_other_heads_hold(rng, group, num_queries, bad):
    query, key, value = grouped(rng, group, num_queries)
    expected = results(query, key, value, enable_gqa=True)
    other = query.copy()
    other[:, ::2] *= np.float32(bad)
    kept = [x[:, 1::2] for x in expected]
    assert_same_bits([x[:, 1::2] for x in results(other, key, value, enable_gqa=True)], kept, "other heads")


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("padding", [1, 16, 300, 3000])
def test_padding(rng, padding, garbage):
    for num_queries, group, num_keys in ((1, 1, 133), (1, 4, 2047), (3, 1, 2049), (4, 2, 256)):
        query, key, value = grouped(rng, group, num_queries, num_keys)
        tail = [np.full((2, 2, padding, x.shape[-1]), garbage, dtype=np.float32) for x in (key, value)]
        padded = [np.concatenate(pair, axis=-2) for pair in zip((key, value), tail, strict=True)]
        for causal in (False, True):
            for lengths in (num_keys, np.full((2, 1), num_keys)):
                expected = results(query, key, value, enable_gqa=True, is_causal=causal)
                out, lse, weights, plain = results(
                    query, *padded, enable_gqa=True, is_causal=causal, key_lengths=lengths
                )
                assert (weights[..., num_keys:] == 0).all()
                same = out, lse, weights[..., :num_keys], plain
                assert_same_bits(same, expected, f"{padding} keys of {garbage}")


@pytest.mark.parametrize("dtype", [*DTYPES, *sixteen_bits()])
@pytest.mark.parametrize("shape", [(1, 300, 24), (2, 300, 24), (4, 70, 1), (3, 65, 130), (1, 257, 33)])
def test_strides(rng, shape, dtype):
    arrays = qkv(rng, (2, 4), *shape, dtype=dtype)
    mask = rng.random((2, 4, *shape[:2])) < 0.8
    expected = results(*arrays, mask=mask, is_causal=True)
    for named in zip(*(layouts(x) for x in (*arrays, mask)), strict=True):
        views = [view for _, view in named]
        assert_same_bits(results(*views[:3], mask=views[3], is_causal=True), expected, f"all {named[0][0]}")
        for k in range(3):
            mixed = [views[k] if i == k else x for i, x in enumerate(arrays)]
            assert_same_bits(results(*mixed, mask=mask, is_causal=True), expected, f"array {k} {named[0][0]}")


@pytest.mark.parametrize("group", [2, 8])
def test_strides_of_groups(rng, group):
    """The heads of a group are anywhere in memory: rows far apart, in any order, or the same row."""
    arrays = grouped(rng, group)
    heads = 2 * group
    arguments = {"bias": normal(rng, 2, heads, 1, 300), "mask": rng.random((2, heads, 1, 300)) < 0.8,
                 "alibi_slopes": normal(rng, 2, heads) / 50, "sinks": normal(rng, 2, heads)}  # fmt: skip
    expected = results(*arrays, enable_gqa=True, **arguments)
    for named in zip(*(layouts(x) for x in (*arrays, arguments["bias"], arguments["mask"])), strict=True):
        views = [view for _, view in named]
        changed = arguments | {"bias": views[3], "mask": views[4]}
        assert_same_bits(results(*views[:3], enable_gqa=True, **changed), expected, f"all {named[0][0]}")
    for change in (lambda x: x.T.copy().T, lambda x: x[:, ::-1].copy()[:, ::-1]):
        changed = arguments | {name: change(arguments[name]) for name in ("alibi_slopes", "sinks")}
        assert_same_bits(results(*arrays, enable_gqa=True, **changed), expected, "slopes and sinks")


@pytest.mark.parametrize("dtype", [*DTYPES, *sixteen_bits()])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_out_in_any_layout(rng, num_queries, dtype):
    for num_keys, num_threads in ((70, 1), (5000, 2)):
        arrays = grouped(rng, 4, num_queries, num_keys, dtype=dtype)
        expected, lse = attend(*arrays, enable_gqa=True, return_lse=True, num_threads=1)
        for name, out in layouts(np.full_like(expected, 7)):
            if out.flags.writeable:
                result, lse_too = attend(*arrays, enable_gqa=True, return_lse=True, out=out, num_threads=num_threads)
                assert result is out, name
                assert bits(out) == bits(expected), name
                assert bits(lse_too) == bits(lse), name
    large = np.full((2, 9, num_queries + 2, 30), 7, dtype=dtype)
    out = large[:, :8, 1:-1, 3:27]
    attend(*arrays, enable_gqa=True, out=out)
    assert bits(out) == bits(expected)
    out[...] = 7
    assert (large == 7).all(), "the gaps"


def test_again(rng):
    arrays = qkv(rng, (), 1, 20_000, 64)
    expected = results(*arrays, num_threads=2)
    for _ in range(10):
        assert_same_bits(results(*arrays, num_threads=2), expected, "a second call")


# ----------------------------------------------------------------------------------------- hostile numbers


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("num_queries", [1, 2, 4])
def test_unseen_keys_and_values(rng, num_queries, bad):
    query, key, value = grouped(rng, 3, num_queries, 3000)
    keys = np.arange(3000)
    dropped = rng.random(3000) < 0.3
    for arguments, unseen in (
        ({"key_lengths": 2500}, keys >= 2500),
        ({"key_lengths": np.array([[2500], [2048]])}, keys >= 2500),
        ({"is_causal": True, "query_offset": 2100}, keys > 2100 + num_queries - 1),
        ({"window_size": (300, 6), "query_offset": 2100}, (keys < 1800) | (keys > 2106 + num_queries - 1)),
        ({"chunk_size": 1000, "left_chunks": 0}, keys < 2000),
        ({"mask": ~dropped}, dropped),
        ({"bias": np.where(dropped, -np.inf, 0).astype(np.float32)}, dropped),
    ):
        expected = results(query, key, value, enable_gqa=True, **arguments)
        spoiled = [x.copy() for x in (key, value)]
        for x in spoiled:
            x[..., unseen, :] = bad
        actual = results(query, *spoiled, enable_gqa=True, **arguments)
        for name, a, b in zip(NAMES, actual, expected, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
        for num_threads in (1, 2):
            same = attend(query, *spoiled, enable_gqa=True, **arguments, num_threads=num_threads)
            np.testing.assert_array_equal(same, expected[3])


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("bad_key", [0, 255, 2048, 4999])
def test_seen_nan_and_infinity(rng, bad_key, num_threads):
    query, key, value = grouped(rng, 3, num_keys=5000)
    call = functools.partial(attend, enable_gqa=True, num_threads=num_threads)
    for bad in (np.nan, np.inf):
        spoiled = value.copy()
        spoiled[:, 0, bad_key, 3] = bad
        out = call(query, key, spoiled)
        np.testing.assert_array_equal(out[:, :3, :, 3], np.full((2, 3, 1), bad))
        assert np.isfinite(np.delete(out, 3, axis=-1)).all()
        assert np.isfinite(out[:, 3:]).all()
    spoiled = key.copy()
    spoiled[:, 1, bad_key] = np.nan
    out, lse = call(query, spoiled, value, return_lse=True)
    assert np.isnan(out[:, 3:]).all()
    assert np.isnan(lse[:, 3:]).all()
    assert np.isfinite(out[:, :3]).all()
    spoiled = query.copy()
    spoiled[:, 2] = np.nan
    out = call(spoiled, key, value)
    assert np.isnan(out[:, 2]).all()
    assert np.isfinite(np.delete(out, 2, axis=1)).all()
    bias = np.zeros((6, 1, 5000), dtype=np.float32)
    bias[4, 0, bad_key] = np.inf
    out = call(query, key, value, bias=bias)
    assert np.isnan(out[:, 4]).all()
    assert np.isfinite(np.delete(out, 4, axis=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("query_scale", "key_scale"), [(1e-30, 1), (1, 1e-30), (1e30, 1e-30), (1e-10, 1e12), (1e15, 1e15), (30, 30)]
)
@pytest.mark.parametrize("num_queries", [1, 4])
def test_scales(rng, num_queries, query_scale, key_scale, dtype):
    query, key, value = qkv(rng, (2,), num_queries, 2500, 24, dtype=dtype)
    query, key = query * dtype(query_scale), key * dtype(key_scale)
    for value_scale in (1e-30, 1e30):
        scaled = value * dtype(value_scale)
        assert_convex(assert_attention(query, key, scaled, num_threads=2), scaled)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30, -1e30, 0])
def test_scale_argument(rng, scale):
    for num_queries in (1, 4):
        query, key, value = qkv(rng, (2,), num_queries, 2500, 24)
        assert_convex(assert_attention(query, key, value, scale=scale, num_threads=2), value)


@pytest.mark.parametrize("level", [-1e30, 1e30, float(np.finfo(np.float32).min), -1e4])
def test_rows_at_one_level_are_ordinary(rng, level):
    """Also when spans are merged: their maxima are ordinary numbers, not stand-ins for minus infinity."""
    query, key, value = qkv(rng, (2,), 1, 5000)
    expected = np.mean(value, axis=-2, keepdims=True, dtype=np.float64)
    for num_threads in (1, 2):
        out, lse = attend(
            query * np.float32(1e-20), key, value, bias=np.full(5000, level, dtype=np.float32), return_lse=True,
            num_threads=num_threads,
        )  # fmt: skip
        np.testing.assert_allclose(out, expected, atol=2e-6)
        np.testing.assert_allclose(lse, np.float32(level), rtol=1e-6, atol=10)


def test_spans_at_different_levels(rng):
    """Every span has a new maximum, or only the first, or one in the middle dominates."""
    query, key, value = qkv(rng, (2,), 1, 9000)
    slope = np.linspace(-400, 400, 9000, dtype=np.float32)
    peak = -np.abs(np.arange(9000, dtype=np.float32) - 4500)
    for bias in (slope, -slope, 100 * slope, peak, np.float32(1e30) * np.sign(slope)):
        expected = assert_attention(query, key, value, bias=bias, num_threads=1)
        assert bits(attend(query, key, value, bias=bias, num_threads=2)) == bits(expected)


def test_errors_do_not_grow_with_the_keys(rng):
    for group, dtype in ((1, np.float32), (4, np.float32), (1, np.float64)):
        arrays = grouped(rng, group, 1, 60_000, 16, 8, dtype, kv_heads=1, batch=1)
        assert_attention(*arrays, enable_gqa=True, num_threads=2)
        assert_attention(*arrays[:2], arrays[2] + dtype(1), enable_gqa=True, num_threads=2)


# ---------------------------------------------------------------------------------- the checks can fail


def test_a_planted_bug_is_found(rng):
    """The first head's slope or sink for the whole group, and a span that is lost."""
    arrays = grouped(rng, 3, num_keys=2500)
    for name in ("alibi_slopes", "sinks"):
        numbers = np.linspace(0.01, 2, 6, dtype=np.float32)

        def first_of_group(*arrays, name=name, **arguments):
            arguments[name] = np.repeat(arguments[name][::3], 3)
            return attend(*arrays, **arguments)

        with pytest.raises(AssertionError, match="output"):
            assert_attention(*arrays, enable_gqa=True, **{name: numbers}, function=first_of_group)

    def without_last_span(query, key, value, **arguments):
        return attend(query, key[..., :SPAN, :], value[..., :SPAN, :], **arguments)

    with pytest.raises(AssertionError, match="output"):
        assert_attention(*arrays, enable_gqa=True, function=without_last_span)


# ---------------------------------------------------------------- caches of another dtype


@pytest.mark.parametrize("query_dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [*sixteen_bits(), np.float32], ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "value_dim"), [(1, 700, 64, 64), (1, 37, 24, 9), (3, 300, 64, 40), (9, 300, 33, 64)]
)
def test_a_cache_of_another_dtype_is_read_where_it_lies(
    rng, queries, keys, head_dim, value_dim, query_dtype, cache_dtype
):
    """The bits are those of a cache converted beforehand, whatever its layout, also with rules and grouped heads."""
    query = rng.standard_normal((2, 4, queries, head_dim)).astype(query_dtype)
    key = rng.standard_normal((2, 2, keys, head_dim)).astype(cache_dtype)
    value = rng.standard_normal((2, 2, keys, value_dim)).astype(cache_dtype)
    more = {"enable_gqa": True, "is_causal": True, "window_size": (keys // 2, 0), "return_lse": True}
    placed = {
        "plain": (key, value),
        "backwards": (key[:, :, ::-1][:, :, ::-1], value[..., ::-1][..., ::-1]),
        "tokens first": tuple(np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (key, value)),
        "with gaps": tuple(np.concatenate([x, x], axis=-1)[..., : x.shape[-1]] for x in (key, value)),
    }
    expected = fastattn.dot_product_attention(query, key.astype(query_dtype), value.astype(query_dtype), **more)
    for name, (k, v) in placed.items():
        out, lse = fastattn.dot_product_attention(query, k, v, **more)
        assert out.dtype == query_dtype
        assert bits(out) == bits(expected[0]), name
        assert bits(lse) == bits(expected[1]), name
    only = fastattn.dot_product_attention(query, key, value.astype(query_dtype), **more)
    assert bits(only[0]) == bits(expected[0])


def test_a_cache_of_another_dtype_is_not_copied(rng):
    key = rng.standard_normal((1, 4, 20_000, 64)).astype(np.float16)
    query = rng.standard_normal((1, 4, 1, 64), dtype=np.float32)
    fastattn.dot_product_attention(query, key, key)
    tracemalloc.start()
    try:
        fastattn.dot_product_attention(query, key, key)
        assert tracemalloc.get_traced_memory()[1] < key.nbytes / 50
    finally:
        tracemalloc.stop()
