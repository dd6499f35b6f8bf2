"""fastattn.integrations.dask: rules over chunks of any sizes, bits, errors, what is computed when, a cluster.

Skipped where Dask, or for the cluster `distributed`, is not installed; `.ci/run` has both.
"""

import doctest
import inspect
import itertools
import operator
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import fresh_process
import numpy as np
import problems
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import bits, qkv, sixteen_bits
from test_combinations import calls
from tolerances import VISIBILITY, accumulation_dtype, assert_within, attention_bounds, largest_seen, result_dtype

import fastattn
from fastattn import reference

dask = pytest.importorskip("dask", reason="Dask is not installed")
da = pytest.importorskip("dask.array", reason="dask.array is not installed")

from fastattn.integrations.dask import KeyValue, dot_product_attention, merge_attention  # noqa: E402

CUT_LIKE_QUERIES_AND_KEYS = "mask", "block_mask", "bias"


@pytest.fixture(autouse=True)
def one_thread():
    """Of Dask, unless a test says otherwise."""
    with dask.config.set(scheduler="synchronous"):
        yield


def lazy(x, *chunks):
    """A Dask array; chunks of the last axes, the others are whole."""
    whole = x.shape[: x.ndim - len(chunks)]
    return da.from_array(x, chunks=(*whole, *chunks))


def sizes(rng, n, most=3, multiple=1):
    """Random chunks of an axis, sometimes empty ones; all begin at a multiple."""
    cuts = sorted(rng.integers(0, n // multiple + 1, rng.integers(0, most)) * multiple)
    return tuple(np.diff([0, *cuts, n]).tolist())


def cut(rng, x, keys=None, rows=None):
    """The array with random chunks, but these along the key axis or the queries' axis."""
    chunks = [sizes(rng, n) for n in x.shape]
    if keys is not None:
        chunks[-2] = keys
    if rows is not None:
        chunks[-2] = rows
    return da.from_array(x, chunks=tuple(chunks))


def same(ours, expected):
    ours = ours.compute() if hasattr(ours, "compute") else ours
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    assert bits(ours) == bits(expected)


def assert_accurate(out, lse, query, key, value, **arguments):
    """Twice the bound of one call, and what merging may add."""
    rules = {name: x for name, x in arguments.items() if name != "num_threads"}
    softmax = rules.get("activation", "softmax") == "softmax"
    expected, weights, *more = reference.dot_product_attention(
        query, key, value, **rules, return_weights=True, return_lse=softmax
    )
    expected_lse = more[0] if softmax else None
    bounds = attention_bounds("dot_product_attention", query, key, value, expected, weights, expected_lse, **rules)
    bound = 2 * bounds[0]
    if softmax:
        eps = np.finfo(accumulation_dtype(result_dtype(query, key, value))).eps
        value = np.asarray(value, np.float64)
        if rules.get("enable_gqa"):
            _, value = reference.repeat_heads(query, key, value)
        seen = {name: x for name, x in rules.items() if name in VISIBILITY}
        visible = np.broadcast_to(reference.visible_keys(query.shape[-2], key.shape[-2], **seen), weights.shape)
        most = largest_seen(np.broadcast_to(value, weights.shape[:-2] + value.shape[-2:]), visible)
        bound = bound + (np.nan_to_num(bounds[2], posinf=0.0)[..., None] + 4 * eps) * most
    assert_within(out, expected, bound, "output")
    if lse is not None:
        assert_within(lse, expected_lse, 2 * bounds[2], "lse")


# Any call, any chunks


@st.composite
def cut_calls(draw):
    """A call with NumPy arrays, and three times the same with Dask's: the key chunks are those of the first."""
    query, key, value, arguments = draw(calls(sizes=(0, 1, 2, 7, 16, 33, 65, 100), largest_dim=20))
    arguments.pop("relative_bias", None)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    softmax = arguments["activation"] == "softmax"
    keys = (key.shape[-2],)
    if softmax and draw(st.booleans()):
        keys = sizes(rng, key.shape[-2], 6, arguments.get("chunk_size", 1))
    rows = [sizes(rng, query.shape[-2]) for _ in range(2)]
    more = {"split_every": draw(st.integers(2, 4)), "return_lse": softmax and draw(st.booleans())}
    several = []
    for number, own in enumerate((rows[0], rows[1], (query.shape[-2],))):
        rules = dict(arguments)
        for name in CUT_LIKE_QUERIES_AND_KEYS:
            if name in rules and draw(st.booleans()):
                rules[name] = cut(rng, rules[name])
        arrays = [cut(rng, query, rows=own), cut(rng, key, keys=keys), cut(rng, value)]
        if number == 1 and key.shape[:-1] == value.shape[:-1]:
            arrays = [arrays[0], KeyValue(*arrays[1:])]
        several.append((arrays, {**rules, **more}))
    return (query, key, value, arguments), keys, several


@given(cut_calls())
@settings(max_examples=80)
def test_any_call_in_any_chunks(call):
    """Within the bound; the bits of one call if the key axis is whole, else those of other chunks along other axes."""
    (query, key, value, arguments), keys, several = call
    with dask.config.set(scheduler="synchronous"):
        results = []
        for (lazy_query, *others), rules in several:
            got = dot_product_attention(lazy_query, *others, **rules)
            got = got if rules["return_lse"] else (got,)
            assert got[0].chunks[-2] == lazy_query.chunks[-2]
            results.append(dask.compute(*got))
            for lazily, x in zip(got, results[-1], strict=True):
                assert x.shape == lazily.shape and x.dtype == lazily.dtype
    with_lse = several[0][1]["return_lse"]
    if len(keys) == 1:
        whole = fastattn.dot_product_attention(query, key, value, **arguments, return_lse=with_lse)
        results.append(whole if with_lse else (whole,))
    else:
        assert_accurate(results[0][0], results[0][1] if with_lse else None, query, key, value, **arguments)
    for mine, other in itertools.pairwise(results):
        for a, b in zip(mine, other, strict=True):
            assert bits(a) == bits(b)


RULES = problems.rules(np.random.default_rng(3), (2, 3), 20, 70)


@pytest.mark.parametrize("name", [name for name in RULES if "relative_bias" not in RULES[name]])
def test_each_rule_in_parts(rng, name):
    """Blocks of queries and of keys that begin and end anywhere: accuracy, and bits whatever the former."""
    rules = RULES[name]
    query, key, value = qkv(rng, (2, 3), 20, 70)
    if rules.get("enable_gqa"):
        key, value = key[:, :1], value[:, :1]
    keys = (63, 7) if "chunk_size" in rules else (13, 40, 17)
    keys = (70,) if rules.get("activation", "softmax") != "softmax" else keys
    softmax = "activation" not in rules
    results = []
    for rows in ((20,), (11, 9), (1, 2, 8, 9)):
        lazy_key = lazy(key, keys, 16)
        got = dot_product_attention(lazy(query, rows, 16), lazy_key, value, split_every=2, return_lse=softmax, **rules)
        results.append(dask.compute(*got) if softmax else (got.compute(),))
    if softmax:
        assert_accurate(*results[0], query, key, value, **rules)
    else:
        results.append((fastattn.dot_product_attention(query, key, value, **rules),))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert bits(a) == bits(b)


# Bits


def test_the_tree_does_not_depend_on_what_a_block_sees(rng):
    """Rows of a band that meets some blocks of keys, in a block that meets all of them, or few."""
    query, key, value = (normal(rng, 160, 8) for _ in range(3))
    several = [
        dot_product_attention(lazy(query, rows, 8), lazy(key, 10, 8), value, window_size=(47, 22), split_every=3)
        for rows in (160, 40, 13, 1)
    ]
    for other in several[1:]:
        same(other, several[0].compute())


def test_zeros_have_one_sign(rng):
    """Parts of which some numbers are -0.0 (on most instruction sets), whether others are merged with them or not."""
    query, key = np.zeros((20, 8), np.float32), np.zeros((20, 8), np.float32)
    value = np.zeros((20, 2), np.float32)
    value[::5] = -1e-45  # the smallest there is: a third of it is 0
    several = [
        dot_product_attention(lazy(query, rows, 8), lazy(key, 5, 8), value, is_causal=True).compute()
        for rows in (20, 5)
    ]
    same(*several)


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def test_few_queries_in_a_chunk_take_the_loops_of_the_whole_call(rng):
    """One query alone takes other loops than many; a chunk of one must not."""
    query, key, value = (normal(rng, 2, n, 64) for n in (40, 700, 700))
    whole = fastattn.dot_product_attention(query, key, value)
    alone = fastattn.dot_product_attention(query[:, :1], key, value)
    assert bits(alone) != bits(whole[:, :1]), "there is nothing to test"
    for rows in (1, 3, 8):
        same(dot_product_attention(lazy(query, rows, 64), key, value), whole)
    few = fastattn.dot_product_attention(query[:, :8], key, value)
    same(dot_product_attention(lazy(query[:, :8], 1, 64), key, value), few)


@pytest.mark.parametrize("dtype", sixteen_bits(), ids=lambda dtype: dtype.__name__)
def test_sixteen_bits(rng, dtype):
    """Whole: the same bits. In parts, which are float32: one rounding at the end."""
    query, key, value = (normal(rng, 2, n, 32, dtype=dtype) for n in (20, 300, 300))
    whole = fastattn.dot_product_attention(query, key, value, sinks=[0.5, 1.0])
    same(dot_product_attention(lazy(query, 5, 32), key, value, sinks=[0.5, 1.0]), whole)
    parts = dot_product_attention(lazy(query, 5, 32), lazy(key, 32, 32), value, return_lse=True, split_every=2)
    assert parts[0].dtype == dtype and parts[1].dtype == np.float32
    wide = fastattn.dot_product_attention(query.astype(np.float32), key, value)
    steps = float(np.finfo(np.float16).eps if dtype == np.float16 else 2.0**-7)
    out = parts[0].compute().astype(np.float32)
    assert np.all(np.abs(out - wide) <= steps / 2 * np.abs(wide) + 1e-5), "one rounding"
    assert_accurate(*dask.compute(*parts), query, key, value)


@pytest.mark.parametrize("kind", ["tokens", "blocks", "channels", "numbers"])
def test_eight_bits(rng, kind):
    query, key, value = (normal(rng, 4, n, 32) for n in (9, 128, 128))
    key, value = (rng.integers(-127, 128, x.shape, dtype=np.int8) for x in (key, value))
    shape = {"tokens": (4, 128, 1), "blocks": (4, 128, 4), "channels": (32,), "numbers": ()}[kind]
    scales = {name: (rng.random(shape) / 50).astype(np.float32) for name in ("key_scale", "value_scale")}
    scales["key_center"] = normal(rng, 4, 1, 32)
    if kind == "numbers":
        scales = {"key_scale": 0.02, "value_scale": 0.01}
    whole = fastattn.dot_product_attention(query, key, value, **scales)
    same(dot_product_attention(lazy(query, 2, 4, 32), lazy(key, 1, 128, 32), value, **scales), whole)
    cut_scales = {name: lazy(x, 2, x.shape[-2], x.shape[-1]) if np.ndim(x) > 2 else x for name, x in scales.items()}
    same(dot_product_attention(lazy(query, 2, 4, 32), lazy(key, 1, 128, 32), value, **cut_scales), whole)
    parts = dot_product_attention(query, lazy(key, 3, 30, 32), value, **cut_scales)
    np.testing.assert_allclose(parts.compute(), whole, rtol=1e-4, atol=1e-5)
    same(dot_product_attention(query, KeyValue(lazy(key, 1, 30, 32), value), **scales), parts.compute())


def test_bits_of_schedulers_and_threads(rng):
    query, key, value = (normal(rng, 4, n, 16) for n in (100, 500, 500))

    def call(**options):
        return dot_product_attention(
            lazy(query, 1, 30, 16), lazy(key, 2, 64, 16), value, is_causal=True, split_every=3, **options
        )

    expected = call().compute(scheduler="synchronous")
    same(call().compute(scheduler="threads", num_workers=4), expected)
    same(call(num_threads=1), expected)
    same(call(num_threads=3).compute(scheduler="threads"), expected)
    assert bits(call().compute()) != bits(fastattn.dot_product_attention(query, key, value, is_causal=True))


@pytest.mark.parametrize("sink", [-np.inf, -3.0, 2.0, 1e4, np.inf, np.nan])
def test_sinks_join_once(rng, sink):
    """Also for rows that see nothing, and whatever the sink."""
    query, key, value = (normal(rng, 2, n, 8) for n in (6, 40, 40))
    rules = {"sinks": [sink, 0.5], "query_lengths": 4}
    out, lse = dask.compute(*dot_product_attention(query, lazy(key, 9, 8), value, return_lse=True, **rules))
    expected = fastattn.dot_product_attention(query, key, value, return_lse=True, **rules)
    np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=1e-6)


def test_what_is_not_seen_does_not_matter(rng):
    """NaN in hidden keys, in blocks that are not read and in some that are; NaN that is seen."""
    query, key, value = (normal(rng, 1, n, 8) for n in (20, 20, 20))
    expected = fastattn.dot_product_attention(query, key, value, is_causal=True)
    key[:, 13:], value[:, 13:] = np.nan, np.inf
    out = dot_product_attention(lazy(query, 7, 8), lazy(key, 4, 8), value, is_causal=True).compute()
    np.testing.assert_allclose(out[:, :13], expected[:, :13], rtol=1e-5, atol=1e-6)
    assert np.isnan(out[:, 13:]).all()


def test_values_up_to_the_largest_number_are_merged(rng):
    query, key = normal(rng, 3, 8), normal(rng, 50, 8)
    value = np.full((50, 2), np.finfo(np.float32).max)
    assert np.isfinite(dot_product_attention(query, lazy(key, 7, 8), value).compute()).all()


# What is computed, when, and by how many tasks


def unreadable(shape, chunks, dtype=np.float32):
    """An array whose blocks cannot be computed."""

    def fail(block):
        raise RuntimeError("was computed")

    empty = da.zeros(shape, chunks=chunks, dtype=dtype)
    return empty.map_blocks(fail, dtype=dtype, meta=np.empty((0,) * len(shape), dtype))


def test_nothing_is_computed_at_the_call():
    x = unreadable((2, 40, 8), (1, 10, 8))
    mask, bias = unreadable((40, 40), (7, 40), bool), unreadable((2, 1, 40), (1, 1, 9))
    block_mask = unreadable((2, 3), (1, 2), bool)
    out, lse = dot_product_attention(
        x, KeyValue(x, x), mask=mask, bias=bias, block_mask=block_mask, block_size=(20, 16), return_lse=True
    )
    assert (out.shape, lse.shape, out.dtype, lse.dtype) == ((2, 40, 8), (2, 40), np.float32, np.float32)
    assert out.chunks == x.chunks and lse.chunks == x.chunks[:-1]
    merged = merge_attention([out, out], [lse, lse])
    for lazily in (out, lse, *merged):
        with pytest.raises(RuntimeError, match="was computed"):
            lazily.compute()


def tasks(x):
    return sum(key[0].startswith("attention-part") for key in x.__dask_graph__() if isinstance(key, tuple))


def test_one_task_for_each_pair_of_blocks_that_see_each_other():
    x = da.zeros((4, 80, 8), chunks=(2, 10, 8))

    def count(**rules):
        return tasks(dot_product_attention(x, x, x, **rules)) / 2

    assert count() == 64
    assert count(is_causal=True) == 36
    assert count(window_size=(10, 0)) == 8 + 7
    assert count(window_size=(9, 0)) == 8 + 7
    assert count(window_size=0) == 8
    assert count(window_size=1) == 8 + 2 * 7
    assert count(chunk_size=10, left_chunks=0) == 8
    assert count(chunk_size=10, left_chunks=2) == 8 + 7 + 6
    assert count(chunk_size=5, left_chunks=1) == 8 + 7
    assert count(chunk_size=5) == 36
    assert count(key_lengths=11) == 16
    assert count(key_lengths=[11, 80, 0, 0]) == (64 + 0) / 2
    assert count(query_lengths=21, query_offset=0) == 24
    assert count(query_lengths=21, query_offset=-21) == 24
    assert count(is_causal=True, query_offset=-21) == 21
    assert count(is_causal=True, query_offset=-80) == 0
    assert count(block_mask=np.eye(8, dtype=bool), block_size=10) == 8
    assert count(block_mask=np.eye(4, dtype=bool), block_size=20) == 16


def test_blocks_of_keys_are_not_joined_or_cut():
    """One query in the batch chunks of the keys, and again in its own."""
    keys = KeyValue(*(da.zeros((8, 100, 4), chunks=(2, 50, 4)) for _ in range(2)))
    out = dot_product_attention(np.zeros((16, 1, 4)), keys, enable_gqa=True)
    assert out.chunks == ((16,), (1,), (4,))
    assert tasks(out) == 8
    uneven = da.zeros((16, 1, 4), chunks=((3, 6, 7), 1, 4))
    assert dot_product_attention(uneven, keys, enable_gqa=True).chunks == uneven.chunks


def test_block_masks_in_other_places_than_chunks(rng):
    """Their entries in a task: those of its blocks, or as few more as where they begin allows."""
    query, key = da.zeros((90, 4), chunks=((32, 58), 4)), da.zeros((90, 4), chunks=((64, 6, 20), 4))
    mask = rng.random((6, 3)) < 0.7
    expected = fastattn.dot_product_attention(*np.zeros((2, 90, 4)), np.eye(90), block_mask=mask, block_size=(16, 32))
    for given_mask in (mask, da.from_array(mask, chunks=2)):
        out = dot_product_attention(query, key, np.eye(90), block_mask=given_mask, block_size=(16, 32))
        np.testing.assert_allclose(out.compute(), expected, rtol=1e-12, atol=1e-13)


def test_threads_of_a_task(monkeypatch):
    """num_threads, else what OpenMP was told, else a share of the CPUs."""
    from fastattn.integrations import dask as module

    monkeypatch.delenv("FASTATTN_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert module._threads() is None
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(fastattn, "get_num_threads", lambda: 12)
    assert module._threads() == 12
    (in_a_pool,) = dask.compute(dask.delayed(module._threads)(), scheduler="threads", num_workers=2)
    assert in_a_pool == max(1, 12 // module.CPU_COUNT)
    with dask.config.set(num_workers=3):
        assert dask.compute(dask.delayed(module._threads)(), scheduler="threads") == (4,)


# KeyValue


def test_key_value(rng):
    key, value = normal(rng, 2, 30, 8), normal(rng, 2, 30, 4, dtype=np.float64)
    keys = KeyValue(lazy(key, 1, 7, 3), lazy(value, 5, 4))
    assert keys.shape == (2, 30, 8) and keys.value_dim == 4
    assert keys.chunks == ((1, 1), (7, 7, 7, 7, 2), (8,))
    assert keys.nbytes == key.nbytes + value.nbytes
    assert (keys.key_dtype, keys.value_dtype) == (np.float32, np.float64)
    assert repr(keys) == "<KeyValue: (2, 30, 8), 10 blocks, 3840 bytes>"
    kept = keys.persist()
    (again,) = dask.persist(keys)
    for pairs in (keys, kept, again):
        assert repr(pairs) == repr(keys) and pairs.nbytes == keys.nbytes
        for ours, expected in zip(pairs.compute(), (key, value), strict=True):
            same(ours, expected)
    assert len(kept.__dask_graph__()) == 10, "blocks, and no way to them"
    query = normal(rng, 2, 3, 8)
    expected = dot_product_attention(query, lazy(key, 7, 8), value).compute()
    for pairs in (keys, kept, again):
        same(dot_product_attention(query, pairs), expected)
    assert dask.is_dask_collection(keys)
    assert dask.base.tokenize(keys) == dask.base.tokenize(KeyValue(lazy(key, 1, 7, 3), lazy(value, 5, 4)))


def test_the_size_of_a_pair_is_that_of_its_arrays():
    """By it the scheduler decides what to move."""
    from dask.sizeof import sizeof

    keys = KeyValue(np.zeros((1000, 8)), np.zeros((1000, 2))).persist()
    (pair,) = keys.__dask_graph__().values()
    assert 80_000 <= sizeof(pair) < 81_000


# merge_attention


def test_merge_attention_has_the_bits_of_the_core(rng):
    outs, lses = normal(rng, 3, 2, 20, 8), normal(rng, 3, 2, 20)
    expected = fastattn.merge_attention(list(outs), list(lses))
    merged = merge_attention([cut(rng, x) for x in outs], [cut(rng, x) for x in lses])
    for ours, theirs in zip(merged, expected, strict=True):
        same(ours, theirs)
    out, _ = merge_attention([outs[0], lazy(outs[1], 6, 8)], list(lses[:2]))
    assert out.chunks == ((2,), (6, 6, 6, 2), (8,))
    same(out, fastattn.merge_attention(list(outs[:2]), list(lses[:2]))[0])


@pytest.mark.parametrize(
    ("outs", "lses", "error", "words"),
    [
        (da.zeros((2, 3, 4)), [np.zeros(3)], TypeError, "outs must be a list"),
        ([np.zeros((3, 4))], np.zeros((1, 3)), TypeError, "lses must be a list"),
        ([np.zeros((3, 4))], [], ValueError, "outs and lses"),
        ([], [], ValueError, "outs and lses"),
        ([np.zeros((3, 4)), np.zeros((2, 4))], [np.zeros(3)] * 2, ValueError, r"outs\[1\]"),
        ([np.zeros((3, 4))], [np.zeros(4)], ValueError, r"lses\[0\]"),
        ([np.zeros(4)], [np.zeros(())], ValueError, r"outs\[0\]"),
        ([np.zeros((3, 4), complex)], [np.zeros(3)], TypeError, r"outs\[0\]"),
    ],
)
def test_errors_of_merge_attention(outs, lses, error, words):
    with pytest.raises(error, match=words):
        merge_attention(outs, lses)


# Errors


def unknown(rows=20):
    x = da.zeros((rows, 8), chunks=(10, 8))
    return x[x[:, 0] == 0]


def test_the_keywords_are_those_of_the_core():
    core = dict(inspect.signature(fastattn.dot_product_attention).parameters)
    ours = dict(inspect.signature(dot_product_attention).parameters)
    for name in ("return_weights", "relative_bias", "out"):
        core.pop(name)
        with pytest.raises(TypeError, match=name):
            dot_product_attention(*[np.zeros((3, 4))] * 3, **{name: None})
    assert set(ours) - set(core) == {"split_every"} and set(core) <= set(ours)
    for name in core:
        assert ours[name].kind == core[name].kind
        if name != "value":
            assert ours[name].default == core[name].default


X = np.zeros((2, 20, 8), np.float32)
LAZY = da.from_array(X, chunks=(1, 10, 8))


@pytest.mark.parametrize(
    ("arguments", "rules", "error", "words"),
    [
        ((X, LAZY), {}, TypeError, "'value'"),
        ((X, KeyValue(X, X), X), {}, TypeError, "value must be left out"),
        ((X, X[:, :19], X), {}, ValueError, "value has 20 rows"),
        ((X, X[..., :7], X), {}, ValueError, "key has head_dim 7"),
        ((X[0, 0], X, X), {}, ValueError, "query has shape"),
        ((X, np.zeros((3, 20, 8)), X), {}, ValueError, "do not broadcast"),
        ((X, LAZY, X.astype(complex)), {}, TypeError, "value has dtype complex"),
        ((LAZY.astype("O"), X, X), {}, TypeError, "query has dtype object"),
        ((LAZY.astype(">f4"), X, X), {}, TypeError, "query has the byte order"),
        ((np.ma.masked_array(X), X, X), {}, TypeError, "query is a masked array"),
        ((X, da.ma.masked_equal(LAZY, 1.0), X), {}, TypeError, "key has blocks of MaskedArray"),
        ((dask.delayed(X), X, X), {}, TypeError, "query is Delayed"),
        ((unknown(), X[0], X[0]), {}, ValueError, r"query.*query\.compute_chunk_sizes\(\)"),
        ((X[0], unknown(), X[0]), {}, ValueError, r"key.*key\.compute_chunk_sizes\(\)"),
        ((X[0], X[0], unknown()), {}, ValueError, r"value.*value\.compute_chunk_sizes\(\)"),
        ((X, LAZY, X), {"mask": LAZY}, TypeError, "mask must be boolean"),
        ((X, LAZY, X), {"mask": da.ones((20, 19), dtype=bool)}, ValueError, "mask has shape"),
        ((X[0], X[0], X[0]), {"mask": unknown() > 0}, ValueError, r"mask\.compute_chunk_sizes"),
        ((X, LAZY, X), {"block_mask": da.ones((2, 2), dtype=bool)}, ValueError, "block_mask has shape"),
        ((X, LAZY, X), {"bias": da.ones((20, 20), dtype=int)}, TypeError, "bias must be floating"),
        ((X, LAZY, X), {"key_lengths": da.ones(2, dtype=int)}, TypeError, "key_lengths must be a number or a NumPy"),
        ((X, LAZY, X), {"sinks": da.ones(2)}, TypeError, "sinks must be a number or a NumPy"),
        ((X, LAZY, X), {"key_lengths": 21}, ValueError, "key_lengths must lie between"),
        ((X, LAZY, X), {"window_size": -2}, ValueError, "window_size"),
        ((X, LAZY, X), {"scale": np.inf}, ValueError, "scale"),
        ((X, LAZY, X), {"softcap": 0}, ValueError, "softcap"),
        ((X, LAZY, X), {"activation": "gelu"}, ValueError, "activation"),
        ((X, LAZY, X), {"activation": "relu"}, ValueError, "activation='relu' needs all keys in one chunk, not in 2"),
        ((X, LAZY, X), {"activation": "sigmoid"}, ValueError, "activation='sigmoid' needs"),
        ((X, LAZY, X), {"activation": "entmax15"}, ValueError, "activation='entmax15' needs"),
        ((X, KeyValue(LAZY, X)), {"activation": "relu"}, ValueError, "activation='relu' needs all keys in one chunk"),
        ((X, LAZY, X), {"activation": "relu", "return_lse": True}, ValueError, "return_lse"),
        ((X, LAZY, X), {"chunk_size": 4}, ValueError, "chunk_size=4 needs key chunks.*one begins at 10"),
        ((X, LAZY, X), {"split_every": 1}, ValueError, "split_every must be an integer of at least 2"),
        ((X, LAZY, X), {"split_every": 2.0}, TypeError, "split_every"),
        ((X, LAZY, X), {"num_threads": 0}, ValueError, "num_threads"),
        ((X, LAZY.astype(np.int8), X.astype(np.int8)), {"key_scale": 0.1}, ValueError, "value_scale is missing"),
        ((X, LAZY, X), {"key_scale": 0.1, "value_scale": 1.0}, TypeError, "for int8 key and value"),
        ((X, LAZY.astype(np.int8), X.astype(np.int8)), {"key_scale": da.ones((2, 9, 1)), "value_scale": 1.0},
         TypeError, "key_scale must be float32"),
        ((X, LAZY, X), {"enable_gqa": 1}, TypeError, "enable_gqa"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_at_the_call(arguments, rules, error, words):
    with pytest.raises(error, match=words):
        dot_product_attention(*arguments, **rules)


@pytest.mark.parametrize(
    ("key", "value", "error", "words"),
    [
        (X, X[:1], ValueError, "all axes but the last must be equal"),
        (X, X[:, :5], ValueError, "all axes but the last must be equal"),
        (X[0, 0], X, ValueError, "key has shape"),
        (X, X[0, 0], ValueError, "value has shape"),
        (X[0], unknown(), ValueError, r"value.*value\.compute_chunk_sizes\(\)"),
    ],
)
def test_errors_of_key_value(key, value, error, words):
    with pytest.raises(error, match=words):
        KeyValue(key, value)


def test_the_core_refuses_dask_arrays():
    """It would compute them whole, in silence; an array of xarray that holds none is as good as ever."""
    x, plain = da.zeros((1, 2, 4, 4)), np.zeros((1, 2, 4, 4))
    calls = [
        operator.methodcaller(name, *[x if i == p else plain for i in range(3)])
        for name in ("dot_product_attention", "linear_attention")
        for p in range(3)
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"(query|key|value) .*fastattn\.integrations\.dask"):
            call(fastattn)
    for call in (
        lambda: fastattn.additive_attention(plain, x, plain, np.ones(4)),
        lambda: fastattn.bilinear_attention(plain, x, plain, np.eye(4)),
        lambda: fastattn.truncated_attention(plain, x, plain, 1),
        lambda: fastattn.varlen_attention(plain[0], x[0], plain[0], [0, 4]),
        lambda: fastattn.graph_attention(plain[0], x[0], plain[0], ([0] * 5, [])),
        lambda: fastattn.neighborhood_attention(plain, x, plain, 1),
        lambda: fastattn.dot_product_attention_vjp(plain, plain, x, plain),
        lambda: fastattn.merge_attention([x], [plain[..., 0]]),
        lambda: fastattn.self_attention(x[0, 0], *np.ones((3, 4, 4))),
        lambda: fastattn.dot_product_attention(plain, plain, plain, bias=x),
        lambda: fastattn.StreamingAttention(1).push(plain, x, plain),
        lambda: fastattn.softmax(x),
    ):
        with pytest.raises(TypeError, match=r"fastattn\.integrations\.dask"):
            call()

    class Holds:
        """As an array of xarray: it has the method, and no graph."""

        def __dask_graph__(self):
            return None

        def __array__(self, dtype=None, copy=None):
            return plain

    same(fastattn.dot_product_attention(plain, Holds(), plain), plain)


def test_the_examples_of_docstrings_run():
    from fastattn.integrations import dask as module

    results = doctest.testmod(module, extraglobs={"np": np, "fastattn": fastattn})
    assert results.failed == 0 and results.attempted > 10


def test_a_missing_dask_is_explained():
    out = fresh_process.run("""
        import sys
        import fastattn
        assert not any(name.split(".")[0] in ("dask", "distributed") for name in sys.modules)
        sys.modules["dask"] = None
        try:
            import fastattn.integrations.dask
        except ImportError as error:
            print(error)
    """)
    assert out == 'fastattn.integrations.dask needs Dask: pip install "fastattn[dask]"\n'


# A cluster: processes on this machine, each with one thread


@pytest.fixture(scope="module")
def cluster():
    """A client of three workers that are processes of their own."""
    distributed = pytest.importorskip("distributed", reason="the tests of a cluster need distributed")
    options = {"n_workers": 3, "threads_per_worker": 1, "dashboard_address": ":0", "memory_limit": "1GB"}
    with distributed.LocalCluster(**options) as local, distributed.Client(local) as client:
        yield client


def numbers(shape, chunks, seed, seconds=0.0):
    """An array of random float32, each block of which its task makes, in `seconds` or more."""

    def block(block_info=None):
        time.sleep(seconds)
        here = block_info[None]
        return np.random.default_rng((seed, *here["chunk-location"])).standard_normal(here["chunk-shape"], np.float32)

    chunks = da.core.normalize_chunks(chunks, shape, dtype=np.float32)
    return da.map_blocks(block, chunks=chunks, dtype=np.float32, meta=np.empty((0,) * len(shape), np.float32))


def test_a_cluster_has_the_bits_of_one_process(cluster, rng):
    query = normal(rng, 8, 20, 32)
    key, value = (numbers((8, 2000, 32), (4, 300, 32), seed) for seed in range(2))

    def calls_of(query):
        out, lse = dot_product_attention(query, key, value, is_causal=True, return_lse=True, split_every=3)
        return out, lse, dot_product_attention(query, KeyValue(key, value), is_causal=True, split_every=3)

    expected = dask.compute(*calls_of(lazy(query, 2, 20, 32)), scheduler="synchronous")
    for ours, theirs in zip(cluster.compute(calls_of(lazy(query, 8, 7, 32)), sync=True), expected, strict=True):
        same(ours, theirs)


def test_a_lost_worker_changes_no_bit(cluster, rng):
    """It is killed while it holds parts of the result, and computes others."""
    query = normal(rng, 4, 3, 16)
    key, value = (numbers((4, 3000, 16), (4, 50, 16), seed, 0.05) for seed in range(2))
    out = dot_product_attention(query, key, value, split_every=4)
    expected = dot_product_attention(
        query, *(numbers((4, 3000, 16), (4, 50, 16), seed) for seed in range(2)), split_every=4
    )
    expected = expected.compute(scheduler="synchronous")

    def holders(dask_scheduler):
        """By worker, the number of parts that it holds."""
        return {
            address: sum("attention" in str(task.key) for task in worker.has_what)
            for address, worker in dask_scheduler.workers.items()
        }

    pids = cluster.run(os.getpid)
    future = cluster.compute(out)
    for _ in range(500):
        held = cluster.run_on_scheduler(holders)
        victim = max(held, key=held.get)
        if sum(held.values()) >= 12:
            break
        time.sleep(0.02)
    assert held[victim] > 0 and not future.done(), "it must have something to lose"
    os.kill(pids[victim], signal.SIGKILL)
    same(future.result(timeout=fresh_process.HANGS), expected)
    cluster.wait_for_workers(3)
    assert pids[victim] not in cluster.run(os.getpid).values()


def moved(cluster):
    """Bytes that workers have sent to each other so far."""
    return sum(cluster.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total).values())


def test_queries_move_to_pairs_that_were_persisted(cluster, rng):
    """Of two arrays that are persisted apart about half has to move.

    Tried again where a worker was so slow that others took over its tasks, and blocks with them.
    """
    for attempt in range(4):
        key, value = (numbers((4, 96_000, 32), (4, 4_000, 32), 10 * attempt + seed) for seed in range(2))
        keys = KeyValue(key, value).persist(scheduler=cluster)
        sys.modules["distributed"].wait(keys)
        places = [len(blocks) for blocks in cluster.has_what().values()]
        query = normal(rng, 4, 2, 32)
        before = moved(cluster)
        out = dot_product_attention(query, keys).compute(scheduler=cluster)
        sent = moved(cluster) - before
        same(dot_product_attention(query, key, value).compute(scheduler="synchronous"), out)
        assert sent >= query.nbytes, "or nothing is counted"
        if 1 < sum(n > 0 for n in places) and sent < keys.nbytes / 20:
            return
    raise AssertionError(f"{sent} bytes of {keys.nbytes} moved, between workers with {places} blocks")


PEAK = "VmHWM:"


def reset_peak():
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak():
    """The largest resident memory of this process since then, in bytes."""
    (line,) = (line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith(PEAK))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks of memory are read from Linux' /proc")
def test_no_worker_holds_all_keys(cluster, rng):
    """A call over more keys and values than a worker has memory for; here a limit on what it may need."""
    query = normal(rng, 8, 16, 64)
    key, value = (numbers((8, 160_000, 64), (8, 2_500, 64), seed) for seed in range(2))
    cluster.run(reset_peak)
    start = cluster.run(peak)
    out = dot_product_attention(query, key, value).compute(scheduler=cluster)
    most = {worker: size - start[worker] for worker, size in cluster.run(peak).items()}
    assert key.nbytes + value.nbytes > 650e6
    assert max(most.values()) < 150e6, most  # blocks of 5 MB each: a few of them, and their random numbers
    assert np.isfinite(out).all()


# The example

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "examples" / "cluster_attention.py"


def run_script(*arguments, without=None):
    """Run the example in a process of its own; `without` hides a package from it."""
    command = [sys.executable, str(SCRIPT), *arguments]
    if without:
        hide = f"import runpy, sys; sys.modules[{without!r}] = None; sys.argv = sys.argv[1:]; "
        command = [sys.executable, "-c", hide + "runpy.run_path(sys.argv[0], run_name='__main__')", *command[1:]]
    environment = fresh_process.environment()
    return subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, timeout=fresh_process.HANGS
    )


def test_the_example_attends_to_more_than_all_workers_hold():
    pytest.importorskip("distributed", reason="the example needs distributed")
    run = run_script("--size", "520MB", "--causal", "--queries", "9")
    assert run.returncode == 0, run.stdout + run.stderr
    found = re.search(r"files of (\d+) MB, 2 workers that may take (\d+) MB together", run.stdout)
    assert int(found[2]) < int(found[1])
    assert "100% Completed" in run.stdout
    assert re.search(r"Queries 0, 4, 8 against all the keys in one call: largest difference \d\.\de-\d\d", run.stdout)


def test_the_example_explains_itself():
    for without in ("dask", "distributed", "fastattn"):
        run = run_script(without=without)
        assert run.returncode == 1 and "Traceback" not in run.stderr
        assert f"package {without} is not installed" in run.stderr and 'pip install ".[dask]"' in run.stderr
    for arguments, status, words in (
        (["--size", "much"], 2, "must be a size"),
        (["--workers", "0"], 2, "at least 1"),
        (["--size", "100MB"], 1, "pass --size 500MB or more"),
    ):
        run = run_script(*arguments)
        assert run.returncode == status and words in run.stderr and "Traceback" not in run.stderr
