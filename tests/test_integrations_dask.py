"""fastattn.integrations.dask: rules over chunks of any sizes, bits, errors, what is computed when; and a cluster of processes.

Skipped where Dask, or for the cluster `distributed`, is not installed; `.ci/run` has both.
"""

import inspect
import itertools
import operator

import fresh_process
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import bits, sixteen_bits
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
