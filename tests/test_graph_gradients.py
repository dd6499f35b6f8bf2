"""Gradients along the edges of a graph: against the reference, which is checked by finite differences, against PyTorch
Geometric; what gives nothing, what must change no bit, what is refused."""

import functools
import sys

import fresh_process
import numpy as np
import pytest
from problems import bits, misaligned, spaced
from test_graph import normal, random_graph, sizes
from tolerances import accumulation_dtype, assert_within, result_dtype, storage_steps

from fastattn import graph_attention, graph_attention_vjp, reference

EDGES = ("edge_bias", "edge_key", "edge_value")
NAMES = ("query", "key", "value", "w_score", *EDGES)


def rough(rng, *shape, dtype=np.float32):
    """Multiples of 1/32: sums of three of them are exact, so that nobody rounds a hidden unit of leaky ReLU over 0."""
    return (np.round(32 * rng.standard_normal(shape)) / 32).astype(dtype)


def call(rng, option="", heads=4, rows=9, keys=13, head_dim=16, value_dim=16, dtype=np.float32, degree=5, hub=0):
    """(arrays, graph, keywords), grad_out last among the arrays; nodes lie as (nodes, heads, channels)."""
    graph = random_graph(rng, rows, keys, degree, hub)
    nnz = len(graph[1])
    shapes = (rows, heads, head_dim), (keys, heads, head_dim), (keys, heads, value_dim), (rows, heads, value_dim)
    arrays = [rough(rng, *shape, dtype=dtype).swapaxes(0, 1) for shape in shapes]
    options = {
        "": {},
        "units": {"w_score": normal(rng, heads, head_dim, dtype=dtype), "negative_slope": 0.3},
        "softcap": {"softcap": 1.5, "edge_bias": normal(rng, heads, nnz, dtype=dtype)},
        "edges": {"edge_bias": normal(rng, heads, nnz), "edge_key": rough(rng, heads, nnz, head_dim, dtype=dtype),
                  "edge_value": normal(rng, nnz, value_dim, dtype=dtype)},
        "edges of units": {"w_score": normal(rng, head_dim, dtype=dtype), "scale": 0.7, "softcap": 2.0,
                           "edge_key": rough(rng, nnz, head_dim, dtype=dtype)},
        "shared": {"edge_bias": normal(rng, heads, 1), "edge_key": rough(rng, head_dim, dtype=dtype),
                   "edge_value": normal(rng, heads, 1, 1, dtype=dtype)},
        "shared channels": {"edge_key": rough(rng, heads, nnz, 1, dtype=dtype), "edge_value": rough(rng, dtype=dtype)},
        "hidden": {"edge_bias": np.where(rng.random((heads, nnz)) < 0.3, -np.inf, 0.5).astype(np.float32)},
        "hidden of units": {"w_score": normal(rng, heads, head_dim, dtype=dtype),
                            "edge_bias": np.where(rng.random((heads, nnz)) < 0.3, -np.inf, 0.5).astype(np.float32)},
        "lse": {"grad_lse": normal(rng, heads, rows, dtype=dtype)},
    }  # fmt: skip
    return arrays, graph, options[option]


OPTIONS = ("", "units", "softcap", "edges", "edges of units", "shared", "shared channels", "hidden", "hidden of units",
           "lse")  # fmt: skip


def to_nodes(x, nodes, number):
    """Sums over the edges of each node, (..., nnz, n) to (..., number, n)."""
    result = np.zeros((*x.shape[:-2], number, x.shape[-1]))
    np.add.at(np.moveaxis(result, -2, 0), nodes, np.moveaxis(x, -2, 0))
    return result


def bounds(grad_out, query, key, value, graph, *, eps, w_score=None, edge_bias=None, edge_key=None, edge_value=None,
           grad_lse=None, **options):  # fmt: skip
    """The errors that the contract allows: eps times (8 times the size of a row's scores + 16) times the sums of the
    gradients over absolute values."""
    indptr, indices = graph
    counts = np.diff(indptr)
    rows = np.repeat(np.arange(len(counts)), counts)
    given = {"w_score": w_score, "edge_bias": edge_bias, "edge_key": edge_key, "edge_value": edge_value}
    given = {name: x for name, x in given.items() if x is not None}
    weights = reference.graph_attention(query, key, value, graph, **given, **options, return_weights=True)[1]
    batch = weights.shape[:-1]
    own = {name: x for name, x in given.items() if name != "edge_value"}
    arrays = [np.asarray(x, np.float64) for x in (grad_out, query, key, value)]
    g, q, k, v = (np.broadcast_to(x, (*batch, *x.shape[-2:])) for x in arrays)
    with np.errstate(all="ignore"):
        size = np.broadcast_to(sizes(q, k, graph, **own, **options, eps=eps), weights.shape)
        if options.get("softcap"):  # its derivative is that of a raw score
            raw = {name: x for name, x in {**own, **options}.items() if name not in ("softcap", "edge_bias")}
            size = size + sizes(q, k, graph, **raw, eps=eps) / options["softcap"]
        size = np.where(weights > 0, np.nan_to_num(size, posinf=0.0), 0.0)
    absent = np.zeros(1)
    more_key, more_value = (np.abs(np.asarray(given.get(n, absent), np.float64)) for n in ("edge_key", "edge_value"))
    q, k, v, g = (np.abs(x[..., nodes, :]) for x, nodes in ((q, rows), (k, indices), (v, indices), (g, rows)))
    v = v + more_value
    term = np.sum(g * v, axis=-1)
    mean, most = (np.zeros((*batch, len(counts))) for _ in range(2))
    for i in range(len(counts)):
        row = slice(indptr[i], indptr[i + 1])
        mean[..., i] = np.sum(weights[..., row] * term[..., row], axis=-1)
        most[..., i] = np.max(size[..., row], axis=-1, initial=0.0)
    of_lse = np.zeros(mean.shape) if grad_lse is None else np.abs(grad_lse)
    unit = eps * (8 * most + 16)[..., rows, None]
    s = unit * (weights * (term + (mean + of_lse)[..., rows]))[..., None]
    if w_score is None:
        scale = abs(options.get("scale") or 1 / np.sqrt(max(q.shape[-1], 1)))
        of_query, of_key, of_units = s * scale * (k + more_key), s * scale * q, None
    else:
        scale = abs(options.get("scale", 1.0) * max(1, abs(options.get("negative_slope", 0.2))))
        of_query = of_key = s * scale * np.abs(np.asarray(w_score, np.float64))[..., None, :]
        of_units = np.sum(s * scale * (q + k + more_key), axis=-2)
    of_value = unit * weights[..., None] * g
    return {"query": to_nodes(of_query, rows, len(counts)), "key": to_nodes(of_key, indices, key.shape[-2]),
            "value": to_nodes(of_value, indices, key.shape[-2]), "w_score": of_units, "edge_bias": s[..., 0],
            "edge_key": of_key, "edge_value": of_value}  # fmt: skip


def given_names(options):
    return tuple(name for name in NAMES[:3] + tuple(options) if name in NAMES)


def assert_gradients(arrays, graph, options, function=graph_attention_vjp, **more):
    """All gradients against the reference. Returns them."""
    query, key, value, grad_out = arrays
    wrt = given_names(options)
    inputs = dict(zip(NAMES[:3], arrays, strict=False)) | {name: options[name] for name in wrt[3:]}
    dtype = result_dtype(*(x for name, x in inputs.items() if name != "edge_bias"))
    finfo = np.finfo(accumulation_dtype(dtype))
    eps = float(finfo.eps) * (2 if dtype == np.float64 else 1)
    expected = reference.graph_attention_vjp(grad_out, query, key, value, graph, wrt=wrt, **options)
    limits = bounds(grad_out, query, key, value, graph, eps=eps, **options)
    results = function(grad_out, query, key, value, graph, wrt=wrt, **options, **more)
    for name, got, right in zip(wrt, results, expected, strict=True):
        x = np.asarray(inputs[name])
        assert got.shape == x.shape
        assert got.dtype == (np.float64 if x.dtype.kind in "biu" else x.dtype)
        storage, step = (unit / 2 for unit in storage_steps(got.dtype))
        # Weights and their gradients may be rounded to 16 bits; what falls below the smallest number counts as 0.
        limit = reference.sum_to(limits[name], x.shape)
        limit = limit + storage * np.abs(np.nan_to_num(right)) + step + 64 * float(finfo.smallest_normal)
        assert_within(got, right, limit, name)
    return results


# ------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("hub", [0, 100])
def test_reference_against_finite_differences(rng, option, hub):
    arrays, graph, options = call(rng, option, 2, 4, 5, 3, 2, np.float64, 4, hub)
    *inputs, grad_out = arrays
    given = dict(zip(NAMES[:3], inputs, strict=True)) | {n: x for n, x in options.items() if n in NAMES}
    if option == "hidden":
        given["edge_bias"] = given["edge_bias"].astype(np.float64)
    rest = {name: x for name, x in options.items() if name not in NAMES and name != "grad_lse"}
    of_lse = options.get("grad_lse", 0.0)
    # Away from the corner of leaky ReLU.
    given["query"] = given["query"] + 0.01

    def loss(**changed):
        out, lse = reference.graph_attention(graph=graph, **{**given, **changed}, **rest, return_lse=True)
        return np.sum(out * grad_out) + np.sum(of_lse * np.where(np.isinf(lse), 0.0, lse))

    wrt = tuple(given)
    call_of = functools.partial(reference.graph_attention_vjp, grad_out, graph=graph, wrt=wrt, **rest)
    gradients = call_of(**given, **({} if "grad_lse" not in options else {"grad_lse": of_lse}))
    for name, gradient in zip(wrt, gradients, strict=True):
        x = np.asarray(given[name], np.float64)
        for _ in range(4):
            step = 1e-5 * rng.standard_normal(x.shape)
            change = loss(**{name: x + step}) - loss(**{name: x - step})
            expected = 2 * np.sum(gradient * step)
            assert abs(change - expected) < 1e-9 * max(1, np.abs(change) * 1e5), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 8, 16, 19])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 8), (8, 8), (32, 32), (5, 7), (33, 20), (64, 1), (1, 65)])
def test_sizes(rng, dtype, heads, head_dim, value_dim):
    for option in ("", "units"):
        assert_gradients(*call(rng, option, heads, head_dim=head_dim, value_dim=value_dim, dtype=dtype, hub=80))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(("heads", "head_dim", "value_dim"), [(4, 16, 16), (3, 5, 7), (8, 1, 4), (1, 9, 3), (18, 2, 4)])
def test_options(rng, option, dtype, heads, head_dim, value_dim):
    for hub in (0, 90):
        assert_gradients(*call(rng, option, heads, 9, 13, head_dim, value_dim, dtype, 4, hub))


@pytest.mark.parametrize("hub", [0, 1, 63, 64, 65, 127, 128, 129, 5000])
@pytest.mark.parametrize("degree", [0.5, 3, 30])
def test_lengths_of_rows(rng, hub, degree):
    """Short rows that share a block, and some that take many; with 2 keys, columns as long."""
    for keys in (2, 50):
        for option in ("softcap", "units"):
            assert_gradients(*call(rng, option, 3, 40, keys, 8, 8, degree=degree, hub=hub))


def test_bfloat16(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for option in ("", "units", "edges"):
        assert_gradients(*call(rng, option, dtype=ml_dtypes.bfloat16))


def test_batch_axes_broadcast(rng):
    """What is shared gets a sum; the same as that of gradients of copies."""
    graph = random_graph(rng, 9, 13, 4, 70)
    nnz = len(graph[1])
    query, key, value = rough(rng, 2, 1, 9, 8), rough(rng, 3, 13, 8), rough(rng, 2, 3, 13, 4)
    grad_out = normal(rng, 2, 3, 9, 4)
    options = {"edge_bias": normal(rng, 3, nnz), "edge_key": rough(rng, 2, 1, nnz, 8)}
    options["edge_value"] = normal(rng, nnz, 1)
    for more in ({}, {"w_score": normal(rng, 3, 8)}, {"w_score": normal(rng, 8)}, {"w_score": normal(rng, 2, 1, 8)}):
        arrays = [query, key, value, grad_out]
        results = assert_gradients(arrays, graph, {**options, **more})
        # Where heads lie changes no bit, though it decides which are taken together.
        arrays = [np.ascontiguousarray(np.moveaxis(x, -2, 0)) for x in arrays]
        arrays = [np.moveaxis(x, 0, -2) for x in arrays]
        again = assert_gradients(arrays, graph, {**options, **more})
        assert [bits(x) for x in again] == [bits(x) for x in results]
    assert_gradients([query[0, 0], key[0], value, grad_out], graph, {})


def test_shared_key_heads_are_their_copies_summed(rng):
    (query, key, value, grad_out), graph, _ = call(rng, heads=6)
    d_query, d_key, d_value = graph_attention_vjp(grad_out, query, key[:1], value[:1], graph)
    whole = graph_attention_vjp(grad_out, query, np.repeat(key[:1], 6, 0), np.repeat(value[:1], 6, 0), graph)
    assert bits(d_query) == bits(whole[0])
    for got, parts in ((d_key, whole[1]), (d_value, whole[2])):
        total = np.zeros_like(got[0])
        for part in parts:
            total = total + part
        assert bits(got[0]) == bits(total)


def test_integers_lists_and_mixed_dtypes(rng):
    graph = [0, 2, 3], [0, 1, 1]
    x = np.arange(6).reshape(2, 3)
    results = graph_attention_vjp(x, x, x, x, graph)
    assert [r.dtype for r in results] == [np.float64] * 3
    (query, key, value, grad_out), graph, _ = call(rng)
    d_query, d_w = graph_attention_vjp(grad_out, query, key, value, graph, wrt=("query", "w_score"), w_score=[0.5] * 16)
    assert (d_query.dtype, d_w.dtype) == (np.float32, np.float64)
    d_query, d_bias = graph_attention_vjp(grad_out, query, key.astype(float), value, graph, wrt=("query", "edge_bias"),
                                          edge_bias=np.float64(0.5))  # fmt: skip
    assert (d_query.dtype, d_bias.dtype, d_bias.shape) == (np.float32, np.float64, ())


def test_sizes_of_zero(rng):
    def run(rows, keys, head_dim, value_dim, graph, heads=2, **options):
        arrays = [rough(rng, heads, *shape) for shape in
                  ((rows, head_dim), (keys, head_dim), (keys, value_dim), (rows, value_dim))]  # fmt: skip
        return assert_gradients(arrays, graph, options)

    run(0, 5, 3, 4, ([0], []))
    run(3, 0, 3, 4, ([0, 0, 0, 0], np.zeros(0, int)))
    run(3, 5, 3, 4, ([0, 0, 0, 0], np.zeros(0, int)), edge_bias=np.zeros(1), edge_key=np.zeros(3, np.float32))
    run(3, 5, 0, 4, ([0, 1, 2, 3], [1, 2, 1]))
    run(3, 5, 3, 0, ([0, 1, 2, 3], [1, 2, 1]))
    run(3, 5, 3, 4, ([0, 1, 2, 3], [1, 2, 1]), w_score=np.ones(3, np.float32))
    ones = np.ones((0, 2, 3))
    results = graph_attention_vjp(ones, ones, np.ones((1, 2, 3)), ones, ([0, 1, 2], [0, 1]))
    assert [x.shape for x in results] == [(0, 2, 3), (1, 2, 3), (0, 2, 3)]
    assert not results[1].any()


# --------------------------------------------------------------------------------------- what takes part, and what not


@pytest.mark.parametrize("option", ["", "units", "edges", "edges of units"])
def test_nothing_comes_from_what_is_not_seen(rng, option):
    """NaN in a node reaches what its edges lead to, and nothing else."""
    arrays, graph, options = call(rng, option, heads=3, hub=80)
    indptr, indices = graph
    rows = np.repeat(np.arange(9), np.diff(indptr))
    clean = graph_attention_vjp(arrays[3], *arrays[:3], graph, **options)
    i = int(np.argmax(np.diff(indptr) > 0))
    j = int(indices[indptr[i]])
    for place, node in ((0, i), (3, i), (1, j), (2, j)):
        for bad in (np.nan, np.inf):
            changed = [x.copy() for x in arrays]
            changed[place][:, node] = bad
            results = graph_attention_vjp(changed[3], *changed[:3], graph, **options)
            touched_rows = {i} if place in (0, 3) else set(rows[indices == j])
            touched_keys = set(indices[np.isin(rows, list(touched_rows))])
            for result, before, touched in zip(results, clean, (touched_rows, touched_keys, touched_keys), strict=True):
                others = [n for n in range(before.shape[1]) if n not in touched]
                assert bits(result[:, others]) == bits(before[:, others])
                if bad is np.nan and place != 2 and result is not results[2]:
                    assert np.isnan(result[:, list(touched)]).any()


def test_hidden_edges_give_exactly_nothing(rng):
    """An edge with a bias of -inf, for one head of three: as if it were not there, whatever lies at its ends."""
    for option in ("", "units"):
        for hub in (0, 80):
            arrays, (indptr, indices), options = call(rng, option, heads=3, hub=hub)
            rows = np.repeat(np.arange(9), np.diff(indptr))
            bias = np.zeros((3, len(indices)), np.float32)
            bias[1, rows == rows[0]] = -np.inf
            changed = [x.copy() for x in arrays]
            changed[3][1, rows[0]] = np.nan
            changed[0][1, rows[0]] = np.inf
            wrt = ("query", "key", "value", "edge_bias", *([] if option == "" else ["w_score"]))
            more = {"grad_lse": np.where(np.arange(9) == rows[0], np.nan, 0.0) * np.ones((3, 1)), **options}
            more["grad_lse"][[0, 2]] = 0
            function = functools.partial(graph_attention_vjp, graph=(indptr, indices), wrt=wrt, edge_bias=bias, **more)
            results = function(changed[3], *changed[:3])
            zero = [x.copy() for x in arrays]
            zero[3][1, rows[0]] = zero[0][1, rows[0]] = 0
            assert [bits(x) for x in results] == [bits(x) for x in function(zero[3], *zero[:3])]
            assert not results[0][1, rows[0]].any()
            assert not results[3][1, rows == rows[0]].any()
            kept = bias[1] == 0
            part = np.concatenate([[0], np.cumsum(np.bincount(rows[kept], minlength=9))]), indices[kept]
            if option:
                options["w_score"] = options["w_score"][1]
            alone = graph_attention_vjp(zero[3][1], *(x[1] for x in zero[:3]), part, **options)
            if hub == 0:  # else pieces of 64 are others
                assert [bits(x[1]) for x in results[:3]] == [bits(x) for x in alone]


def test_a_score_of_minus_infinity_hides(rng):
    (query, key, value, grad_out), graph, _ = call(rng, heads=2, hub=70)
    query[...] = np.abs(query) + 1
    key[:, 3] = -np.inf
    value[:, 3] = np.nan
    bias = np.where(graph[1] == 3, -np.inf, 0.0)
    zero_key, zero_value = key.copy(), value.copy()
    zero_key[:, 3] = zero_value[:, 3] = 0
    results = graph_attention_vjp(grad_out, query, key, value, graph)
    expected = graph_attention_vjp(grad_out, query, zero_key, zero_value, graph, edge_bias=bias)
    assert [bits(x) for x in results] == [bits(x) for x in expected]
    assert np.isfinite(results[0]).all()


def test_rows_near_a_padding_mask_of_finite_numbers(rng):
    """Scores near -1e9 or -1e30 are ordinary: float32 cannot hold log n beside them."""
    for least in (-1e9, -1e30):
        for hub in (0, 200):
            arrays, graph, _ = call(rng, heads=2, hub=hub)
            arrays[0][...] = 0
            far = graph_attention_vjp(arrays[3], *arrays[:3], graph, edge_bias=np.float32(least))
            near = graph_attention_vjp(arrays[3], *arrays[:3], graph)
            assert [bits(x) for x in far] == [bits(x) for x in near]


def test_scales_far_from_one(rng):
    (query, key, value, grad_out), graph, _ = call(rng)
    for size, scale in ((1e15, 1e-30), (1e-15, 1e29), (1e12, 1e-24)):
        size = np.float32(size)
        results = graph_attention_vjp(grad_out, query * size, key * size, value, graph, scale=scale)
        expected = graph_attention_vjp(grad_out, query, key, value, graph, scale=float(size) ** 2 * scale)
        for got, right, factor in zip(results, expected, (float(size), float(size), 1), strict=True):
            np.testing.assert_allclose(got.astype(float) * factor, right, atol=2e-5)


def test_long_sums_lose_nothing(rng):
    """Neither a row's error grows with its edges nor a column's; nor that of what all edges share."""
    n = 300_000
    x = rough(rng, 1, 8)
    value = (1 + rng.random((5, 4))).astype(np.float32)
    key, indices = rough(rng, 5, 8), rng.integers(0, 5, n)
    options = {"edge_key": rough(rng, 8), "edge_value": np.ones(4, np.float32), "edge_bias": np.zeros(1, np.float32)}
    arrays = [x, key, value, np.ones((1, 4), np.float32)]
    assert_gradients(arrays, (np.array([0, n]), indices), options)
    assert_gradients(arrays, (np.array([0, n]), indices), {"w_score": normal(rng, 8)})
    as_column = np.arange(n + 1), np.zeros(n, int)
    many, grads = rough(rng, n, 8), (1 + rng.random((n, 4))).astype(np.float32)
    of_column = graph_attention_vjp(grads, many, x, value[:1], as_column)
    # One key: its value's gradient is the sum of all that comes in, and scores do not matter.
    np.testing.assert_allclose(of_column[2][0], grads.sum(axis=0, dtype=float), rtol=1e-6)
    assert not of_column[0].any()
    assert not of_column[1].any()


# ----------------------------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize("option", ["edges", "units", "edges of units", "shared"])
@pytest.mark.parametrize(("heads", "head_dim", "value_dim"), [(4, 32, 32), (8, 1, 8), (3, 5, 7), (20, 3, 16)])
def test_layouts_threads_and_company_change_no_bit(rng, option, heads, head_dim, value_dim):
    arrays, graph, options = call(rng, option, heads, 1500, 900, head_dim, value_dim, degree=8, hub=400)
    wrt = given_names(options)
    options["grad_lse"] = normal(rng, heads, 1500)
    expected = dict(zip(wrt, graph_attention_vjp(arrays[3], *arrays[:3], graph, wrt=wrt, **options), strict=True))

    def check(arrays=arrays, graph=graph, wrt=wrt, **more):
        results = graph_attention_vjp(arrays[3], *arrays[:3], graph, wrt=wrt, **{**options, **more})
        assert [bits(x) for x in results] == [bits(expected[name]) for name in wrt]

    for copy in (np.ascontiguousarray, np.asfortranarray, misaligned, spaced, lambda x: x[..., ::-1].copy()[..., ::-1]):
        check([copy(x) for x in arrays])
    for threads in (1, 2, 3):
        check(num_threads=threads)
    check(graph=[x.astype(np.int32) for x in graph])
    check(graph=[np.repeat(x, 3)[::3] for x in graph])
    for name in wrt:
        check(wrt=(name,))
        alone = graph_attention_vjp(arrays[3], *arrays[:3], graph, wrt=name, **options)
        assert bits(alone) == bits(expected[name])
    check(wrt=wrt[::-1])
    forward = {name: x for name, x in options.items() if name != "grad_lse"}
    out, lse = graph_attention(*arrays[:3], graph, return_lse=True, **forward)
    check(output=out, lse=lse)
    for h in (0, heads - 1):
        own = {n: x[h] if np.ndim(x) and x.shape[0] == heads and (n != "edge_key" or x.ndim > 1) else x
               for n, x in options.items()}  # fmt: skip
        one = graph_attention_vjp(arrays[3][h], *(x[h] for x in arrays[:3]), graph, **own)
        assert [bits(x) for x in one] == [bits(expected[name][h]) for name in NAMES[:3]]


def test_out(rng):
    arrays, graph, options = call(rng, "shared", rows=50, keys=60, dtype=np.float16)
    wrt = given_names(options)
    expected = graph_attention_vjp(arrays[3], *arrays[:3], graph, wrt=wrt, **options)
    sums = [np.full(x.shape, np.nan, np.float32) for x in expected]
    spread = [np.full((*x.shape[:-1], 3 * x.shape[-1]), np.nan, x.dtype)[..., ::3] for x in expected]
    results = graph_attention_vjp(arrays[3], *arrays[:3], graph, wrt=wrt, out=tuple(spread), **options)
    for got, into, right in zip(results, spread, expected, strict=True):
        assert got is into
        assert bits(got) == bits(right)
    graph_attention_vjp(arrays[3], *arrays[:3], graph, wrt=wrt, out=[*sums[:-1], None], **options)
    for got, right in zip(sums[:-1], expected, strict=False):
        assert bits(got.astype(right.dtype)) == bits(right)
    memory = np.full((60, 4, 16), np.nan, np.float16)
    into = memory.swapaxes(0, 1)
    assert graph_attention_vjp(arrays[3], *arrays[:3], graph, wrt="key", out=into, **options) is into
    assert bits(into) == bits(expected[1])
    for taken in (arrays[1], arrays[3][:, :0]):
        with pytest.raises(ValueError, match="out"):
            graph_attention_vjp(arrays[3], *arrays[:3], graph, wrt="key", out=taken, **options)


# ---------------------------------------------------------------------------------------------- other libraries


def test_dense_attention_in_pytorch(rng):
    torch = pytest.importorskip("torch")
    sparse = pytest.importorskip("scipy.sparse")
    graph = sparse.random(30, 40, 0.2, "csr", random_state=1)
    arrays = [normal(rng, 3, n, 8, dtype=np.float64) for n in (30, 40, 40)]
    grad_out = normal(rng, 3, 30, 8, dtype=np.float64)
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    scores = tensors[0] @ tensors[1].mT / 8**0.5
    scores = scores.masked_fill(torch.tensor(graph.toarray() == 0), -torch.inf)
    weights = torch.nan_to_num(scores.softmax(dim=-1))
    (weights @ tensors[2] * torch.tensor(grad_out)).sum().backward()
    for got, x in zip(graph_attention_vjp(grad_out, *arrays, graph), tensors, strict=True):
        full = np.nan_to_num(x.grad.numpy())
        np.testing.assert_allclose(got, full, atol=1e-12)


def test_pytorch_geometric(rng):
    torch = pytest.importorskip("torch")
    softmax = pytest.importorskip("torch_geometric.utils").softmax
    (query, key, value, grad_out), (indptr, indices), options = call(rng, "edges of units", rows=40, keys=40, hub=70)
    rows = torch.tensor(np.repeat(np.arange(40), np.diff(indptr)))
    inputs = {"query": query, "key": key, "value": value, **{n: options[n] for n in ("w_score", "edge_key")}}
    t = {name: torch.tensor(x.astype(np.float64), requires_grad=True) for name, x in inputs.items()}
    x = t["query"][:, rows] + t["key"][:, indices] + t["edge_key"]
    raw = 0.7 * (t["w_score"] * torch.nn.functional.leaky_relu(x, 0.2)).sum(dim=-1)
    weights = softmax(2.0 * torch.tanh(raw / 2.0), rows, num_nodes=40, dim=1)
    out = torch.zeros(4, 40, 16, dtype=torch.float64).index_add(1, rows, weights[..., None] * t["value"][:, indices])
    (out * torch.tensor(grad_out.astype(np.float64))).sum().backward()
    results = graph_attention_vjp(grad_out, query, key, value, (indptr, indices), wrt=tuple(inputs), **options)
    for got, name in zip(results, inputs, strict=True):
        right = t[name].grad.numpy()
        np.testing.assert_allclose(got, right, atol=2e-5 * max(1, np.abs(right).max()))


def test_a_step_down_the_gradient_lowers_the_loss(rng):
    (query, key, value, target), graph, _ = call(rng)
    losses = []
    for _ in range(20):
        out, lse = graph_attention(query, key, value, graph, return_lse=True)
        losses.append(np.sum((out - target) ** 2))
        gradients = graph_attention_vjp(2 * (out - target), query, key, value, graph, output=out, lse=lse)
        query, key, value = (x - 0.05 * d for x, d in zip((query, key, value), gradients, strict=True))
    assert (np.diff(losses) < 0).all()


# ------------------------------------------------------------------------------------------------- what is refused


def refuse(error, message, **changes):
    (query, key, value, grad_out), graph, _ = call(np.random.default_rng(0))
    out = np.full((4, 9, 16), 12345.0, np.float32)
    known = {"grad_out": grad_out, "query": query, "key": key, "value": value, "graph": graph, "wrt": "query"}
    with pytest.raises(error, match=message):
        graph_attention_vjp(**{**known, "out": out, **changes})
    assert (out == 12345.0).all()


def test_arguments_that_are_refused():
    ones = np.ones
    refuse(ValueError, "grad_out has shape", grad_out=ones((4, 9, 15), np.float32))
    refuse(ValueError, "grad_out has shape", grad_out=ones((9, 16), np.float32))
    refuse(TypeError, "grad_out", grad_out=ones((4, 9, 16), complex))
    refuse(ValueError, "which was not given; .*'query', 'key', 'value'", wrt="edge_bias", out=None)
    refuse(ValueError, "'scale'", wrt="scale", out=None)
    refuse(ValueError, "twice", wrt=("key", "key"), out=None)
    refuse(TypeError, "wrt", wrt=3, out=None)
    refuse(ValueError, "together", output=ones((4, 9, 16), np.float32))
    refuse(ValueError, "together", lse=ones((4, 9), np.float32))
    refuse(ValueError, "lse has shape", output=ones((4, 9, 16)), lse=ones((4, 8)))
    refuse(ValueError, "grad_lse has shape", grad_lse=ones((4, 1)))
    refuse(ValueError, "indices", graph=(np.arange(10), np.full(9, 13)))
    refuse(ValueError, "out has shape", wrt="key")
    refuse(TypeError, "out", wrt=("query",))
    refuse(TypeError, "return_lse", return_lse=True)


# ---------------------------------------------------------------------------------------------------------- memory


def test_nothing_of_the_size_of_edges_and_channels(rng):
    """200,000 edges of 256 channels would be 205 MB; two numbers an edge and head are 6.4 MB, the graph transposed
    1.6 MB."""
    code = """
    import resource, numpy as np, fastattn
    nodes, edges = 2000, 200_000
    x = np.ones((nodes, 4, 64), np.float32).swapaxes(0, 1)
    indptr = np.linspace(0, edges, nodes + 1).astype(np.int64)
    indices = np.random.default_rng(0).integers(0, nodes, edges)
    few = indptr // edges, indices[:1]
    out = tuple(np.ones_like(x) for _ in range(3))
    fastattn.graph_attention_vjp(x, x, x, x, few, num_threads=2, out=out)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fastattn.graph_attention_vjp(x, x, x, x, (indptr, indices), num_threads=2, out=out)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < 16e6, grown
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("ru_maxrss in KiB")
    fresh_process.run(code)


def walk(dtype, at_end):
    """Calls with every array flush against a forbidden page; runs in a child, which a fault would kill."""
    from test_guard_pages import guarded

    rng = np.random.default_rng(1)
    for heads, head_dim, value_dim in ((1, 1, 1), (1, 16, 16), (3, 5, 7), (4, 8, 8), (8, 1, 8), (16, 3, 4), (17, 1, 3)):
        for hub in (0, 70):
            indptr, indices = random_graph(rng, 11, 13, 4, hub)
            nnz = len(indices)

            def array(*shape):
                return guarded(normal(rng, *shape, dtype=dtype), at_end)

            query, key, value = array(11, heads, head_dim), array(13, heads, head_dim), array(13, heads, value_dim)
            nodes = [x.swapaxes(0, 1) for x in (array(11, heads, value_dim), query, key, value)]
            for size in (np.int32, np.int64):
                graph = [guarded(x.astype(size), at_end) for x in (indptr, indices)]
                for options in (
                    {},
                    {"w_score": array(heads, head_dim), "grad_lse": array(heads, 11)},
                    {"edge_bias": array(heads, nnz), "edge_key": array(nnz, head_dim), "softcap": 2.0,
                     "edge_value": array(nnz, value_dim)},
                    {"edge_key": array(head_dim), "w_score": array(head_dim), "edge_bias": array(heads, 1)},
                ):  # fmt: skip
                    wrt = given_names(options)
                    given = {"query": nodes[1], "key": nodes[2], "value": nodes[3], **options}
                    out = [array(*np.shape(given[name])) for name in wrt]
                    graph_attention_vjp(*nodes, graph, wrt=wrt, out=out, **options)
                    assert all(np.isfinite(x).all() for x in out)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect through ctypes")
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_no_access_outside_the_arrays(dtype, at_end):
    fresh_process.run(
        "import faulthandler; faulthandler.enable()\n"
        f"import test_graph_gradients; test_graph_gradients.walk({dtype!r}, {at_end})"
    )
