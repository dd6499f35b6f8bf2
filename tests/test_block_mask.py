"""block_mask: the bits of the dense mask that it stands for, the recipes of docs/patterns.md, what is never read."""

import re
from pathlib import Path

import fresh_process
import numpy as np
import pytest
from problems import bits, qkv
from test_memory import MEGABYTE, extra_memory
from tolerances import assert_attention

import fastattn
from fastattn import reference

PAGE = Path(__file__).parents[1] / "docs" / "patterns.md"


def dense(block_mask, block_size, num_queries, num_keys):
    """The mask (..., L, S) that a block mask stands for, entry by entry."""
    rows, columns = block_size if np.ndim(block_size) else (block_size, block_size)
    shape = (-(-num_queries // rows), -(-num_keys // columns))
    block_mask = np.broadcast_to(block_mask, np.broadcast_shapes(np.shape(block_mask), shape))
    return block_mask[..., np.arange(num_queries)[:, None] // rows, np.arange(num_keys) // columns]


def block_counts(block_size, num_queries, num_keys):
    rows, columns = block_size if np.ndim(block_size) else (block_size, block_size)
    return -(-num_queries // rows), -(-num_keys // columns)


SIZES = [1, 7, 16, 64, 100, 256, 2**62, (3, 50), (64, 1), (1000, 300), np.int64(33), np.array([5, 9])]


@pytest.mark.parametrize("block_size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(1, 1), (1, 5000), (2, 700), (5, 257), (30, 2500), (130, 256), (300, 700)]
)
def test_the_bits_of_a_dense_mask(block_size, num_queries, num_keys):
    rng = np.random.default_rng([num_queries, num_keys])
    query, key, value = qkv(rng, (2, 4), num_queries, num_keys, 16, kv_batch=(2, 2))
    counts = block_counts(block_size, num_queries, num_keys)
    for density in (0.05, 0.5, 0.95):
        for shape in ((2, 4, *counts), (2, 1, *counts), counts, (1, counts[1]), (counts[0], 1), (counts[1],)):
            blocks = rng.random(shape) < density
            mask = dense(blocks, block_size, num_queries, num_keys)
            for more in ({}, {"is_causal": True, "num_threads": 2}, {"window_size": (90, 5), "activation": "relu"}):
                more = {"enable_gqa": True, **more}
                got = fastattn.dot_product_attention(
                    query, key, value, block_mask=blocks, block_size=block_size, **more
                )
                want = fastattn.dot_product_attention(query, key, value, mask=mask, **more)
                assert bits(got) == bits(want), (density, shape, more)


@pytest.mark.parametrize("num_queries", [1, 3, 9, 200])
def test_threads_share_spans_of_keys(num_queries):
    """Blocks cut the keys of a span that threads share: it is one span nonetheless."""
    rng = np.random.default_rng(3)
    query, key, value = qkv(rng, (4,), num_queries, 9000, 16)
    blocks = rng.random((4, num_queries, 180)) < 0.1
    outs = {
        bits(
            fastattn.dot_product_attention(
                query, key, value, block_mask=blocks, block_size=(1, 50), num_threads=threads
            )
        )
        for threads in (1, 2, 3, 4)
    }
    assert len(outs) == 1
    if num_queries > 8:
        return  # many queries take other loops than one
    alone = np.concatenate(
        [
            fastattn.dot_product_attention(
                query[:, [i]], key, value, block_mask=blocks[:, [i]], block_size=(1, 50), query_offset=9000
            )
            for i in range(num_queries)
        ],
        axis=1,
    )
    assert outs == {bits(alone)}


@pytest.mark.parametrize("return_weights", [True, "band"])
@pytest.mark.parametrize("activation", ["softmax", "relu", "sigmoid"])
@pytest.mark.parametrize("num_queries", [2, 150])
def test_weights_of_blocks_that_are_skipped_are_zero(num_queries, activation, return_weights):
    rng = np.random.default_rng(5)
    query, key, value = qkv(rng, (3,), num_queries, 900, 8)
    blocks = rng.random((3, -(-num_queries // 16), 29)) < 0.2
    more = {"activation": activation, "return_weights": return_weights, "window_size": (300, 200)}
    mask = dense(blocks, (16, 32), num_queries, 900)
    got = fastattn.dot_product_attention(query, key, value, block_mask=blocks, block_size=(16, 32), **more)
    want = fastattn.dot_product_attention(query, key, value, mask=mask, **more)
    assert [bits(x) for x in got] == [bits(x) for x in want]


@pytest.mark.parametrize("function", ["truncated", "additive", "bilinear", "layer"])
def test_every_function_takes_it(function):
    rng = np.random.default_rng(7)
    x = rng.standard_normal((2, 150, 16))
    blocks = rng.random((2, 3, 3)) < 0.5
    mask = dense(blocks, 64, 150, 150)
    weights = rng.standard_normal((4, 16, 16))
    layer = fastattn.MultiHeadAttention(*weights, num_heads=4)
    call = {
        "truncated": lambda **rules: fastattn.truncated_attention(x, x, x, 20, 3, **rules),
        "additive": lambda **rules: fastattn.additive_attention(x, x, x, weights[0, 0], **rules),
        "bilinear": lambda **rules: fastattn.bilinear_attention(x, x, x, weights[0], **rules),
        "layer": lambda **rules: layer(x, **{name: rule[:, None] for name, rule in rules.items()}),
    }[function]
    assert bits(call(block_mask=blocks)) == bits(call(mask=mask))


def test_a_cached_layer_counts_the_columns_of_the_cache():
    rng = np.random.default_rng(8)
    x = rng.standard_normal((1, 90, 16))
    layer = fastattn.MultiHeadAttention(*rng.standard_normal((4, 16, 16)), num_heads=4)
    blocks = rng.random((6, 6)) < 0.6
    whole = layer(x, is_causal=True, block_mask=blocks, block_size=16)
    cache = fastattn.KVCache(1, 4, 90, 4, dtype=np.float64)
    parts = []
    for begin in range(0, 90, 16):
        end = min(begin + 16, 90)
        row = blocks[begin // 16 : begin // 16 + 1, : -(-end // 16)]
        parts.append(layer(x[:, begin:end], cache=cache, is_causal=True, block_mask=row, block_size=16))
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-12, atol=1e-12)


def test_offsets_and_lengths_do_not_move_blocks():
    rng = np.random.default_rng(9)
    query, key, value = qkv(rng, (2,), 40, 100, 8)
    blocks = rng.random((5, 10)) < 0.5
    for more in ({"query_offset": 25, "is_causal": True}, {"key_lengths": [70, 100], "query_lengths": [40, 11]}):
        assert_attention(query, key, value, block_mask=blocks, block_size=(8, 10), **more)


def test_what_is_in_false_blocks_does_not_matter():
    rng = np.random.default_rng(11)
    query, key, value = qkv(rng, (2,), 200, 2000, 16)
    columns = rng.random(20) < 0.3
    blocks = np.broadcast_to(columns, (2, 4, 20))
    want = fastattn.dot_product_attention(query, key, value, block_mask=blocks, block_size=(50, 100))
    hidden = ~np.repeat(columns, 100)
    key[:, hidden], value[:, hidden] = np.nan, np.inf
    got = fastattn.dot_product_attention(query, key, value, block_mask=blocks, block_size=(50, 100))
    assert bits(got) == bits(want)


def test_pages_of_false_blocks_may_be_forbidden():
    code = """
        import ctypes, mmap
        import numpy as np
        import fastattn
        page = mmap.PAGESIZE
        rows = 4 * page // (16 * 4)  # whole steps of the kernels, which read what is between two blocks in one
        memory = mmap.mmap(-1, 160 * page)
        key = np.frombuffer(memory, np.float32).reshape(-1, 16)
        key[...] = np.random.default_rng(0).standard_normal(key.shape)
        blocks = np.random.default_rng(1).random((1, 40)) < 0.3
        query = np.ones((200, 16), np.float32)
        for n in (1, 3, 8, 200):
            want = fastattn.dot_product_attention(query[:n], key, key, block_mask=blocks, block_size=(n, rows))
        libc = ctypes.CDLL(None)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for block in np.flatnonzero(~blocks[0]):
            assert libc.mprotect(key.ctypes.data + int(block) * 4 * page, 4 * page, 0) == 0
        for n in (1, 3, 8, 200):
            got = fastattn.dot_product_attention(query[:n], key, key, block_mask=blocks, block_size=(n, rows))
        print(np.array_equal(got, want))
    """
    assert fresh_process.run(code).strip() == "True"


def test_memory_is_the_array_alone():
    """L = S = 8192 in blocks of 64: the mask is 16 KiB, a dense one would be 64 MiB."""
    setup = "x, blocks = normal(8192, 32), rng.random((128, 128)) < 0.1"
    assert extra_memory(setup, "fastattn.dot_product_attention(x, x, x, block_mask=blocks)") < 32 * MEGABYTE


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "block_mask must be boolean.*float64", {"block_mask": np.ones((1, 1))}),
        (ValueError, r"block_mask has shape \(2, 1\).*\(1, 2\).*ceil", {"block_mask": np.ones((2, 1), bool)}),
        (ValueError, r"block_mask has shape \(1, 3\)", {"block_mask": np.ones((1, 3), bool), "block_size": (64, 50)}),
        (ValueError, "block_size must be .*at least 1.*not 0", {"block_size": 0}),
        (ValueError, "block_size.*3 numbers", {"block_size": (1, 2, 3)}),
        (TypeError, "block_size.*2.5", {"block_size": (4, 2.5)}),
        (TypeError, "block_size.*None", {"block_size": None}),
        (TypeError, "block_size.*True", {"block_size": True}),
    ],
)
def test_errors_name_it(error, message, arguments):
    query, key, value = qkv(np.random.default_rng(0), (), 60, 100, 8)
    out = np.full((60, 8), 7, np.float32)
    with pytest.raises(error, match=f"(?s){message}"):
        fastattn.dot_product_attention(query, key, value, out=out, **arguments)
    assert (out == 7).all()


# ----------------------------------------------------------------------------------------------- recipes


def recipes():
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    names = {}
    exec(code, names)
    return names


def test_recipes_against_loops():
    """Each pattern of docs/patterns.md, written out pair by pair from its paper."""
    n, made = 12, recipes()
    rng = np.random.default_rng(0)
    want = {name: np.zeros((n, n), bool) for name in ("window", "longformer", "strided", "fixed", "axial")}
    for i in range(n):
        for j in range(n):
            want["window"][i, j] = j in (i - 1, i, i + 1)
            want["longformer"][i, j] = j in (i - 1, i, i + 1) or 0 in (i, j)
            want["strided"][i, j] = j <= i and (i - j < 4 or (i - j) % 4 == 0)
            want["fixed"][i, j] = j <= i and (j // 4 == i // 4 or j % 4 == 3)
            want["axial"][i, j] = i // 4 == j // 4 or i % 4 == j % 4
    got = {
        "window": made["window"](n),
        "longformer": made["longformer"](n),
        "strided": made["strided"](n, 4),
        "fixed": made["fixed"](n, 4),
        "axial": made["axial"](3, 4),
    }
    for name, pattern in want.items():
        assert np.array_equal(got[name], pattern), name
    random = made["bigbird"](n, rng)
    assert random[made["longformer"](n, 1, (0, n - 1))].all()
    rows = random[1:-1]
    assert (rows.sum(axis=1) <= 3 + 2 + 3).all() and (rows.sum(axis=1) >= 4).all()

    query, key, value = qkv(rng, (2,), n * 16, n * 16, 8)
    for pattern in (*got.values(), random):
        out = fastattn.dot_product_attention(query, key, value, block_mask=pattern, block_size=16)
        want_out = reference.dot_product_attention(query, key, value, mask=dense(pattern, 16, n * 16, n * 16))
        np.testing.assert_allclose(out, want_out, atol=2e-6)
