"""Random combinations of all arguments of dot_product_attention at once, against the reference."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import VISIBILITY, assert_attention, sides

import fastattn
from fastattn import reference

# A few lengths of every kind: zero, below and above a vector, more than one tile or block.
LENGTHS = (0, 1, 2, 5, 15, 16, 17, 31, 33, 63, 65, 100, 129, 200, 260, 300)


def broadcastable(draw, shape):
    """A shape that broadcasts to `shape`: some axes of size 1, perhaps without leading ones."""
    sizes = tuple(draw(st.sampled_from([n, n, 1])) for n in shape)
    return sizes[draw(st.integers(0, len(shape))) if draw(st.booleans()) else 0 :]


def lengths(draw, rng, batch, largest):
    """An integer, or an array with exactly the batch axes."""
    if not batch or draw(st.booleans()):
        return draw(st.integers(0, largest))
    shape = tuple(draw(st.sampled_from([n, 1])) for n in batch)
    return rng.integers(0, largest + 1, shape)


@st.composite
def calls(draw, sizes=LENGTHS, largest_dim=80):
    """(query, key, value, keyword arguments); query and key have one head_dim."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    maybe = lambda: draw(st.integers(0, 2)) == 0  # noqa: E731
    dtype = draw(st.sampled_from([np.float32, np.float32, np.float64]))
    num_queries, num_keys = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
    head_dim, value_dim = draw(st.integers(0, largest_dim)), draw(st.integers(0, largest_dim))
    if maybe():
        value_dim = head_dim

    arguments = {}
    batch = draw(st.sampled_from([(), (1,), (4,), (2, 4), (2, 1, 4)]))
    kv_heads = draw(st.sampled_from([1, 2, 4])) if batch and batch[-1] == 4 else None
    if kv_heads is not None and (kv_heads == 2 or maybe()):
        arguments["enable_gqa"] = True
        kv_batch = (*broadcastable(draw, batch[:-1]), kv_heads)
        key_batch = value_batch = kv_batch
    else:
        key_batch, value_batch = broadcastable(draw, batch), broadcastable(draw, batch)
    arrays = [
        (rng.standard_normal(shape) * draw(st.sampled_from([0.2, 1, 1, 3]))).astype(dtype)
        for shape in (
            (*batch, num_queries, head_dim),
            (*key_batch, num_keys, head_dim),
            (*value_batch, num_keys, value_dim),
        )
    ]
    matrix = (*batch, num_queries, num_keys)

    if maybe():
        arguments["is_causal"] = True
    if maybe():
        side = st.one_of(st.none(), st.integers(-1, 40), st.integers(0, 400))
        arguments["window_size"] = draw(st.one_of(st.integers(-1, 200), st.tuples(side, side)))
    if maybe():
        arguments["chunk_size"] = draw(st.one_of(st.integers(1, 20), st.integers(1, 400)))
        if draw(st.booleans()):
            arguments["left_chunks"] = draw(st.one_of(st.none(), st.integers(-1, 10)))
    if maybe():
        arguments["query_offset"] = draw(st.integers(-50, 350))
        if batch and maybe():
            shape = tuple(draw(st.sampled_from([n, 1])) for n in batch)
            arguments["query_offset"] = rng.integers(-50, 350, shape)
    if maybe():
        arguments["key_lengths"] = lengths(draw, rng, batch, num_keys)
    if maybe():
        arguments["query_lengths"] = lengths(draw, rng, batch, num_queries)
    if maybe():
        density = draw(st.sampled_from([0.02, 0.5, 0.9]))
        arguments["mask"] = np.asarray(rng.random(broadcastable(draw, matrix)) < density)
    if maybe():
        block_size = tuple(draw(st.sampled_from([1, 3, 16, 50, 64, 300])) for _ in range(2))
        counts = (-(-num_queries // block_size[0]), -(-num_keys // block_size[1]))
        density = draw(st.sampled_from([0.1, 0.5, 0.9]))
        arguments["block_mask"] = np.asarray(rng.random(broadcastable(draw, (*batch, *counts))) < density)
        arguments["block_size"] = block_size
    if maybe():
        bias = np.asarray(rng.standard_normal(broadcastable(draw, matrix)) * 2).astype(dtype)
        arguments["bias"] = np.where(rng.random(bias.shape) < draw(st.sampled_from([0, 0.3])), -np.inf, bias)
        arguments["bias"] = arguments["bias"].astype(dtype)
    if maybe():
        window = sides(**arguments)
        if window is None:
            window = draw(st.integers(0, 40)), draw(st.integers(0, 40))
            arguments["window_size"] = window
            window = sides(**arguments)
        band = rng.standard_normal(broadcastable(draw, (*batch, num_queries, int(sum(window)) + 1))) * 2
        band = np.where(rng.random(band.shape) < draw(st.sampled_from([0, 0.3])), -np.inf, band)
        arguments["relative_bias"] = band.astype(dtype)
    if maybe():
        slopes = np.asarray(rng.random(broadcastable(draw, batch)))
        arguments["alibi_slopes"] = slopes.astype(dtype)
    if maybe():
        arguments["scale"] = draw(st.sampled_from([0.0, 0.05, 0.3, 1.0, -0.5]))
    if maybe():
        arguments["softcap"] = draw(st.sampled_from([0.5, 5.0, 30.0]))
    arguments["activation"] = draw(st.sampled_from(["softmax"] * 4 + ["relu", "sigmoid", "sparsemax", "entmax15"]))
    if arguments["activation"] == "softmax" and maybe():
        arguments["sinks"] = np.asarray(rng.standard_normal(broadcastable(draw, batch)) * 3).astype(dtype)
    if maybe():
        arguments["num_threads"] = draw(st.integers(1, 4))
    return *arrays, arguments


@given(calls())
@settings(max_examples=400)
def test_everything_together(call):
    *arrays, arguments = call
    assert_attention(*arrays, **arguments)


@given(calls())
@settings(max_examples=100)
def test_numbers_and_masks_say_the_same(call):
    """Causal, window, chunks and lengths written as one boolean mask give the same result."""
    query, key, value, arguments = call
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    rules = {name: x for name, x in arguments.items() if name in VISIBILITY and "bias" not in name}
    by_position = ("alibi_slopes", "relative_bias")
    rest = {name: x for name, x in arguments.items() if name not in rules and name not in by_position}
    expected = fastattn.dot_product_attention(query, key, value, **rules, **rest)
    batch = expected.shape[:-2]
    mask = np.broadcast_to(reference.visible_keys(num_queries, num_keys, **rules), (*batch, num_queries, num_keys))
    result = fastattn.dot_product_attention(query, key, value, mask=mask, **rest)
    tolerance = 1e-3 if expected.dtype == np.float32 else 1e-11
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)
