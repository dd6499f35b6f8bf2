"""Attention along the edges of a graph: every option against the reference, against a dense mask, three passes of
scipy.sparse and PyTorch Geometric; what must change no bit; graphs that are refused."""

import re
import sys

import fresh_process
import numpy as np
import pytest
from problems import bits, misaligned, spaced
from tolerances import accumulation_dtype, assert_within, result_dtype, storage_steps

import fastattn
from fastattn import graph_attention, reference

SENTINEL = 12345.0


def random_graph(rng, rows, keys, degree, hub=0):
    """(indptr, indices): some rows without an edge, repeated and unsorted indices, one row with `hub` more edges."""
    counts = rng.poisson(degree, rows)
    counts[rng.random(rows) < 0.2] = 0
    counts[rows // 2] += hub
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return indptr, rng.integers(0, keys, indptr[-1])


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def problem(rng, heads=4, rows=9, keys=13, head_dim=16, value_dim=16, dtype=np.float32, degree=5, hub=100):
    """query, key, value with the heads behind the nodes in memory, and a graph."""
    shapes = (rows, heads, head_dim), (keys, heads, head_dim), (keys, heads, value_dim)
    arrays = [normal(rng, *shape, dtype=dtype).swapaxes(0, 1) for shape in shapes]
    return *arrays, random_graph(rng, rows, keys, degree, hub)


def sizes(query, key, graph, *, w_score=None, negative_slope=0.2, edge_key=None, scale=None, softcap=None,
          edge_bias=None, eps):  # fmt: skip
    """For each edge the sum of the absolute values of all that its score adds up (tolerances.py), (..., nnz)."""
    indptr, indices = graph
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    q, k = query[..., rows, :], key[..., indices, :]
    more = 0.0 if edge_key is None else np.asarray(edge_key, np.float64)
    if w_score is None:
        factor = 1 / np.sqrt(max(query.shape[-1], 1)) if scale is None else scale
        size = abs(factor) * np.sum(np.abs(q) * (np.abs(k) + np.abs(more)), axis=-1)
        scores = factor * np.sum(q * (k + more), axis=-1)
    else:
        w = np.asarray(w_score, np.float64)[..., None, :] * (1 if scale is None else scale)
        size = np.sum(np.abs(w) * (np.abs(q) + np.abs(k) + np.abs(more)), axis=-1) * max(1, abs(negative_slope))
        x = q + k + more
        scores = np.sum(w * np.where(x > 0, x, negative_slope * x), axis=-1)
    if softcap is not None:
        closest = np.maximum(np.abs(scores) - eps * size, 0.0)
        slope = 1 - np.tanh(closest / softcap) ** 2
        size = slope * size + np.abs(softcap * np.tanh(scores / softcap))
    return size if edge_bias is None else size + np.nan_to_num(np.abs(np.asarray(edge_bias, np.float64)), posinf=0.0)


def assert_graph_attention(query, key, value, graph, **options):
    """All results against the reference, within the bounds of tolerances.py. Returns them."""
    arrays = [x for x in (query, key, value, *(options.get(n) for n in ("w_score", "edge_key", "edge_value")))
              if x is not None]  # fmt: skip
    dtype = result_dtype(*arrays)
    finfo = np.finfo(accumulation_dtype(dtype))
    factor, tiny = (2 if dtype == np.float64 else 1), float(finfo.smallest_normal)
    eps = factor * float(finfo.eps)
    theory = {name: x for name, x in options.items() if name not in ("out", "num_threads")}
    expected = reference.graph_attention(query, key, value, graph, **theory, return_weights=True, return_lse=True)
    query, key, value64 = (np.asarray(x, np.float64) for x in (query, key, value))
    indptr, indices = graph
    own = {name: x for name, x in theory.items() if name != "edge_value"}
    with np.errstate(all="ignore"):
        edge_size = np.nan_to_num(sizes(query, key, graph, **own, eps=eps), posinf=0.0)
        edge_size = np.broadcast_to(edge_size, expected[1].shape)
        edge_value = np.asarray(theory.get("edge_value", 0.0), np.float64)
        values = np.abs(value64[..., indices, :]) + np.abs(edge_value)
        values = np.nan_to_num(values, nan=0.0, posinf=0.0)
        values = np.broadcast_to(values, (*expected[1].shape, value64.shape[-1]))
        if "edge_bias" in theory:
            hidden = np.broadcast_to(np.asarray(theory["edge_bias"]) == -np.inf, edge_size.shape)
            edge_size, values = np.where(hidden, 0.0, edge_size), np.where(hidden[..., None], 0.0, values)
    rows = len(indptr) - 1
    size, largest = np.zeros((*edge_size.shape[:-1], rows)), np.zeros((*edge_size.shape[:-1], rows, values.shape[-1]))
    for i in range(rows):
        row = slice(indptr[i], indptr[i + 1])
        size[..., i] = np.max(edge_size[..., row], axis=-1, initial=0.0)
        largest[..., i, :] = np.max(values[..., row, :], axis=-2, initial=0.0)
    storage, step = (x / 2 for x in storage_steps(dtype))
    # What edge_value adds rounds once more, and so do the weights of 16-bit values.
    bound = eps * (size[..., None] + 5) * largest + step + tiny
    bound = bound + storage * np.nan_to_num(np.abs(expected[0]), posinf=0.0)
    weight_bound = eps * (4 * np.repeat(size, np.diff(indptr), axis=-1) + 4) + tiny
    lse_bound = eps * (4 * size + 4 + np.nan_to_num(np.abs(expected[2]), posinf=0.0, neginf=0.0))

    plain = graph_attention(query_of(arrays), arrays[1], arrays[2], graph, **options)
    assert isinstance(plain, np.ndarray)
    assert plain.dtype == dtype
    assert_within(plain, expected[0], bound, "output")
    options.pop("out", None)
    results = graph_attention(*arrays[:3], graph, **options, return_weights=True, return_lse=True)
    assert [x.dtype for x in results] == [dtype, finfo.dtype, finfo.dtype]
    assert bits(results[0]) == bits(plain)
    assert_within(results[1], expected[1], weight_bound, "weights")
    assert_within(results[2], expected[2], lse_bound, "lse")
    return results


def query_of(arrays):
    return arrays[0]


# ------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 8, 16, 19])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 8), (8, 8), (32, 32), (5, 7), (33, 20), (64, 1), (1, 65)])
def test_sizes(rng, dtype, heads, head_dim, value_dim):
    query, key, value, graph = problem(rng, heads, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    assert_graph_attention(query, key, value, graph)
    assert_graph_attention(query, key, value, graph, w_score=normal(rng, heads, head_dim, dtype=dtype))


@pytest.mark.parametrize("hub", [0, 1, 63, 64, 65, 127, 128, 129, 5000])
@pytest.mark.parametrize("degree", [0.5, 3, 30])
def test_lengths_of_rows(rng, hub, degree):
    """From short rows that share a block to some that take many."""
    for heads, head_dim in ((1, 16), (4, 8), (8, 1)):
        query, key, value, graph = problem(rng, heads, 40, 50, head_dim, 24, degree=degree, hub=hub)
        assert_graph_attention(query, key, value, graph, edge_bias=normal(rng, len(graph[1])))


def options_of(rng, heads, nnz, head_dim, value_dim, dtype):
    """Every option, alone and together."""
    bias = normal(rng, heads, nnz, dtype=dtype)
    bias[rng.random(bias.shape) < 0.3] = -np.inf
    return {
        "bias": {"edge_bias": bias},
        "bias, all heads": {"edge_bias": bias[0]},
        "key": {"edge_key": normal(rng, heads, nnz, head_dim, dtype=dtype)},
        "key, all heads": {"edge_key": normal(rng, nnz, head_dim, dtype=dtype)},
        "value": {"edge_value": normal(rng, nnz, value_dim, dtype=dtype)},
        "scale": {"scale": -0.3},
        "zero scale": {"scale": 0},
        "softcap": {"softcap": 0.7, "scale": 2.0},
        "slope": {"w_score": normal(rng, heads, head_dim, dtype=dtype), "negative_slope": 1.5, "scale": 0.5},
        "one set of weights": {"w_score": normal(rng, head_dim, dtype=dtype), "negative_slope": 0},
        "all": {
            "w_score": normal(rng, heads, head_dim, dtype=dtype),
            "edge_bias": bias,
            "edge_key": normal(rng, nnz, head_dim, dtype=dtype),
            "edge_value": normal(rng, heads, nnz, value_dim, dtype=dtype),
            "softcap": 3.0,
        },
    }


OPTIONS = tuple(options_of(np.random.default_rng(0), 1, 1, 1, 1, np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("heads", "head_dim", "value_dim"), [(1, 16, 16), (3, 7, 9), (8, 1, 8), (17, 4, 16)])
def test_options(rng, dtype, option, heads, head_dim, value_dim):
    query, key, value, graph = problem(rng, heads, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    options = options_of(rng, heads, len(graph[1]), head_dim, value_dim, dtype)[option]
    assert_graph_attention(query, key, value, graph, **options)


def test_dtypes_mix(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    query, key, value, graph = problem(rng)
    for dtypes in ((np.float64, np.float32, np.float32), (np.float32, np.float16, np.float16), (np.int64,) * 3,
                   (ml_dtypes.bfloat16,) * 3, (ml_dtypes.bfloat16, np.float32, ml_dtypes.bfloat16)):  # fmt: skip
        arrays = [(4 * x).astype(dtype) for x, dtype in zip((query, key, value), dtypes, strict=True)]
        assert_graph_attention(*arrays, graph, edge_bias=np.float64(0.5))


def test_a_list_of_weights_takes_the_dtype_of_the_arrays(rng):
    query, key, value, graph = problem(rng, head_dim=1)
    assert graph_attention(query, key, value, graph, w_score=[1.0]).dtype == np.float32
    assert graph_attention(query, key, value, graph, w_score=np.ones(1)).dtype == np.float64
    assert graph_attention(query, key, value, graph, edge_key=np.ones(1)).dtype == np.float64
    assert graph_attention(query, key, value, graph, edge_bias=np.ones(1)).dtype == np.float32


def test_gat_is_gatv2_with_one_unit(rng):
    """The score as the paper writes it, (a_target . x_i) + (a_source . x_j), as a dense softmax."""
    x = normal(rng, 4, 11, 6, dtype=np.float64)
    a_target, a_source = normal(rng, 4, 6, 1, dtype=np.float64), normal(rng, 4, 6, 1, dtype=np.float64)
    adjacency = rng.random((11, 11)) < 0.4
    scores = x @ a_target + (x @ a_source).swapaxes(-1, -2)
    scores = np.where(scores > 0, scores, 0.2 * scores)
    expected = reference.softmax(scores, mask=adjacency) @ x
    graph = np.concatenate([[0], np.cumsum(adjacency.sum(axis=1))]), np.nonzero(adjacency)[1]
    out = graph_attention(x @ a_target, x @ a_source, x, graph, w_score=[1.0])
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-13)


def test_batch_axes_broadcast(rng):
    query, key, value = normal(rng, 2, 1, 7, 8), normal(rng, 1, 3, 9, 8), normal(rng, 9, 5)
    graph = random_graph(rng, 7, 9, 4)
    out, *_ = assert_graph_attention(query, key, value, graph, w_score=normal(rng, 3, 8))
    assert out.shape == (2, 3, 7, 5)
    assert_graph_attention(query, key, value, graph, edge_bias=normal(rng, 2, 1, len(graph[1])))
    assert_graph_attention(query[0, 0], key[0, 0], value, graph)


def test_shared_keys_in_node_major_memory(rng):
    """Grouped heads: one key and value head for all queries."""
    query, key, value, graph = problem(rng, 6)
    out, *_ = assert_graph_attention(query, key[:1], value[:1], graph)
    whole = graph_attention(query, np.repeat(key[:1], 6, 0), np.repeat(value[:1], 6, 0), graph)
    assert bits(out) == bits(whole)


def test_empty_axes(rng):
    def shape(rows, keys, head_dim, value_dim, graph):
        arrays = normal(rng, 3, rows, head_dim), normal(rng, 3, keys, head_dim), normal(rng, 3, keys, value_dim)
        return assert_graph_attention(*arrays, graph)[0].shape

    none = np.zeros(0, np.int32)
    assert shape(0, 4, 3, 5, ([0], none)) == (3, 0, 5)
    assert shape(4, 0, 3, 5, ([0] * 5, none)) == (3, 4, 5)
    assert shape(2, 4, 0, 5, ([0, 2, 3], [1, 3, 0])) == (3, 2, 5)
    assert shape(2, 4, 3, 0, ([0, 2, 3], [1, 3, 0])) == (3, 2, 0)
    out = graph_attention(np.ones((0, 2, 3)), np.ones((0, 2, 3)), np.ones((0, 2, 3)), ([0, 1, 2], [0, 1]))
    assert out.shape == (0, 2, 3)


# ------------------------------------------------------------------------------------------------ hostile numbers


def test_what_is_not_seen_never_comes_through(rng):
    query, key, value, graph = problem(rng)
    clean = graph_attention(query, key, value, graph)
    for bad in (np.nan, np.inf, -np.inf):
        for name in ("key", "value"):
            arrays = {"key": key.copy(), "value": value.copy()}
            arrays[name][:, 3] = bad
            out = graph_attention(query, arrays["key"], arrays["value"], graph)
            for i in range(query.shape[1]):
                seen = graph[1][graph[0][i] : graph[0][i + 1]]
                if 3 not in seen:
                    assert bits(out[:, i]) == bits(clean[:, i])
                elif name == "value":
                    np.testing.assert_array_equal(out[:, i], np.full_like(out[:, i], bad))
            # Hidden by its bias, an edge is not there at all.
            bias = np.where(graph[1] == 3, -np.inf, 0.0)
            zeros = {**arrays, name: np.where(np.isfinite(arrays[name]), arrays[name], 0)}
            hidden, weights = graph_attention(query, arrays["key"], arrays["value"], graph, edge_bias=bias,
                                              return_weights=True)  # fmt: skip
            assert bits(hidden) == bits(graph_attention(query, zeros["key"], zeros["value"], graph, edge_bias=bias))
            assert (weights[:, graph[1] == 3] == 0).all()


def test_special_scores(rng):
    query, key, value, graph = problem(rng, hub=80)
    bias = np.zeros(len(graph[1]))
    first = graph[0][query.shape[1] // 2]
    for number in (np.inf, np.nan, -np.inf, 1e30, -1e30):
        for edge in (first, first + 70):
            bias[:] = 0
            bias[edge] = number
            assert_graph_attention(query, key, value, graph, edge_bias=bias)
    assert_graph_attention(query, key, value, graph, edge_bias=np.full(len(graph[1]), -1e30, np.float32))
    out, lse = graph_attention(query, key, value, graph, edge_bias=np.float32(-np.inf), return_lse=True)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_values_have_a_finite_mean(rng, dtype):
    largest = np.finfo(dtype).max
    query, key, value, graph = problem(rng, dtype=dtype, hub=200)
    value = np.broadcast_to(largest, value.shape).astype(dtype)
    out = graph_attention(query, key, value, graph)
    filled = np.diff(graph[0]) > 0
    np.testing.assert_allclose(out[:, filled], largest, rtol=4 * np.finfo(dtype).eps)
    value = value.copy()
    value[:, 0] = np.inf
    out, weights = graph_attention(query, key, value, graph, return_weights=True)
    assert not np.isnan(out).any()
    np.testing.assert_allclose(np.add.reduceat(weights, graph[0][:-1][filled], axis=-1), 1, rtol=1e-4)


def test_scales_far_from_one(rng):
    query, key, value, graph = problem(rng)
    for size, scale in ((1e20, 1e-40), (1e-20, 1e38), (1e18, 1e-36)):
        out = graph_attention(query * np.float32(size), key * np.float32(size), value, graph, scale=scale)
        expected = graph_attention(query, key, value, graph, scale=float(np.float32(size)) ** 2 * scale)
        np.testing.assert_allclose(out, expected, atol=2e-5)


def test_long_rows_lose_nothing(rng):
    """The error of a mean does not grow with the number of edges."""
    n = 300_000
    value = (1 + rng.random((5, 4))).astype(np.float32)
    indices = rng.integers(0, 5, n)
    x = normal(rng, 1, 8), normal(rng, 5, 8)
    assert_graph_attention(*x, value, (np.array([0, n]), indices))


# ----------------------------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize(
    ("heads", "head_dim", "value_dim"), [(4, 32, 32), (8, 1, 8), (3, 5, 7), (16, 8, 4), (20, 3, 16)]
)
def test_layouts_threads_and_company_change_no_bit(rng, heads, head_dim, value_dim):
    query, key, value, graph = problem(rng, heads, 300, 200, head_dim, value_dim, degree=8, hub=400)
    options = {"edge_bias": normal(rng, heads, len(graph[1])), "return_weights": True, "return_lse": True}
    expected = graph_attention(query, key, value, graph, **options)

    def check(*arrays, graph=graph, **more):
        results = graph_attention(*arrays, graph, **{**options, **more})
        assert [bits(x) for x in results] == [bits(x) for x in expected]

    for copy in (np.ascontiguousarray, np.asfortranarray, misaligned, spaced, lambda x: x[..., ::-1].copy()[..., ::-1]):
        check(copy(query), copy(key), copy(value))
    for threads in (1, 2, 3):
        check(query, key, value, num_threads=threads)
    check(query, key, value, graph=[x.astype(np.int32) for x in graph])
    check(query, key, value, graph=[np.repeat(x, 3)[::3] for x in graph])
    for h in (0, heads - 1):
        one = graph_attention(query[h], key[h], value[h], graph, **{**options, "edge_bias": options["edge_bias"][h]})
        assert [bits(x) for x in one] == [bits(x[h]) for x in expected]
    rows = slice(100, 180)
    edges = slice(graph[0][rows.start], graph[0][rows.stop])
    part = graph[0][rows.start : rows.stop + 1] - edges.start, graph[1][edges]
    some = graph_attention(query[:, rows], key, value, part, **{**options, "edge_bias": options["edge_bias"][:, edges]})
    whole = expected[0][:, rows], expected[1][:, edges], expected[2][:, rows]
    assert [bits(x) for x in some] == [bits(x) for x in whole]


def test_out(rng):
    query, key, value, graph = problem(rng, 4, 50, 60)
    expected = graph_attention(query, key, value, graph)
    memory = np.full((50, 4, 16), SENTINEL, np.float32)
    out = memory.swapaxes(0, 1)
    assert graph_attention(query, key, value, graph, out=out) is out
    assert bits(out) == bits(expected)
    for view in (np.empty((4, 50, 16), np.float32), np.empty((4, 50, 32), np.float32)[..., ::2]):
        assert bits(graph_attention(query, key, value, graph, out=view)) == bits(expected)
    for array in (query, key[:, :50], value[:, :50]):
        with pytest.raises(ValueError, match="out overlaps"):
            graph_attention(query, key, value, graph, out=array)


# ---------------------------------------------------------------------------------------------- other libraries


def test_dense_mask(rng):
    """A graph without double edges is a mask."""
    sparse = pytest.importorskip("scipy.sparse")
    for kind in (sparse.csr_array, sparse.csr_matrix):
        graph = kind(sparse.random(30, 40, 0.2, "csr", dtype=np.float64, random_state=1))
        query, key, value, _ = problem(rng, 4, 30, 40)
        mask = graph.toarray() != 0
        out, weights, lse = graph_attention(query, key, value, graph, return_weights=True, return_lse=True)
        dense = fastattn.dot_product_attention(query, key, value, mask=mask, return_weights=True, return_lse=True)
        np.testing.assert_allclose(out, dense[0], atol=2e-6)
        np.testing.assert_allclose(weights, dense[1][:, mask], atol=2e-6)
        np.testing.assert_allclose(lse, dense[2], atol=4e-6)
        biased = graph_attention(query, key, value, graph, edge_bias=np.log(graph.data))
        scores = query @ key.swapaxes(-1, -2) / 4
        with np.errstate(divide="ignore"):
            expected = reference.softmax(scores + np.log(graph.toarray()), mask=mask) @ value
        np.testing.assert_allclose(biased, expected, atol=2e-6)


def test_room_for_more_in_scipys_arrays(rng):
    sparse = pytest.importorskip("scipy.sparse")
    graph = sparse.csr_array(np.eye(5))
    query, key, value, _ = problem(rng, 2, 5, 5)
    expected = graph_attention(query, key, value, graph)
    graph.indices = np.concatenate([graph.indices, [99, -1]]).astype(graph.indices.dtype)
    out, weights = graph_attention(query, key, value, graph, return_weights=True)
    assert bits(out) == bits(expected)
    assert weights.shape == (2, 5)


def test_three_passes_of_scipy(rng):
    """Scores, softmax and product as sparse matrices, a head at a time."""
    sparse = pytest.importorskip("scipy.sparse")
    query, key, value, (indptr, indices) = problem(rng, 3, 40, 50, hub=30)
    rows = np.repeat(np.arange(40), np.diff(indptr))
    for h in range(3):
        scores = np.einsum("ed,ed->e", query[h][rows], key[h][indices]) / 4
        weights = np.exp(scores - scores.max())
        weights /= np.bincount(rows, weights, 40)[rows]
        expected = sparse.csr_array((weights, indices, indptr), (40, 50)) @ value[h]
        out = graph_attention(query[h], key[h], value[h], (indptr, indices))
        np.testing.assert_allclose(out, expected, atol=2e-6)


def test_pytorch_geometric(rng):
    torch = pytest.importorskip("torch")
    nn = pytest.importorskip("torch_geometric.nn")
    sparse = pytest.importorskip("scipy.sparse")
    nodes, heads, width = 40, 4, 8
    graph = sparse.random(nodes, nodes, 0.1, "csr", random_state=1)
    rows = np.repeat(np.arange(nodes), np.diff(graph.indptr))
    edges = torch.tensor(np.stack([graph.indices, rows])).long()
    x, features = normal(rng, nodes, 12), normal(rng, graph.nnz, 5)
    torch.manual_seed(0)

    def by_heads(linear, y=x):
        return linear(torch.from_numpy(y)).detach().numpy().reshape(len(y), heads, width).swapaxes(0, 1)

    def check(layer, expected, weights=None):
        with torch.no_grad():
            got = layer(torch.from_numpy(x), edges, torch.from_numpy(features)).numpy()
        np.testing.assert_allclose(expected.swapaxes(0, 1).reshape(nodes, -1), got, atol=2e-6)

    layer = nn.TransformerConv(12, width, heads, edge_dim=5, root_weight=False).eval()
    query, key, value = map(by_heads, (layer.lin_query, layer.lin_key, layer.lin_value))
    edge = by_heads(layer.lin_edge, features)
    check(layer, graph_attention(query, key, value, graph, edge_key=edge, edge_value=edge))

    layer = nn.GATv2Conv(12, width, heads, edge_dim=5, add_self_loops=False, bias=False).eval()
    source, target = by_heads(layer.lin_l), by_heads(layer.lin_r)
    w_score, edge = layer.att.detach().numpy()[0], by_heads(layer.lin_edge, features)
    check(layer, graph_attention(target, source, source, graph, w_score=w_score, edge_key=edge))

    layer = nn.GATConv(12, width, heads, edge_dim=5, add_self_loops=False, bias=False).eval()
    value = by_heads(layer.lin)
    a_source, a_target, a_edge = (a.detach().numpy()[0][..., None] for a in
                                  (layer.att_src, layer.att_dst, layer.att_edge))  # fmt: skip
    edge = by_heads(layer.lin_edge, features) @ a_edge
    check(layer, graph_attention(value @ a_target, value @ a_source, value, graph, w_score=[1.0], edge_key=edge))


def test_parts_of_the_edges_merge(rng):
    query, key, value, (indptr, indices) = problem(rng)
    half = rng.random(len(indices)) < 0.5
    whole = graph_attention(query, key, value, (indptr, indices), return_lse=True)
    biases = (np.where(keep, 0.0, -np.inf) for keep in (half, ~half))
    parts = [graph_attention(query, key, value, (indptr, indices), edge_bias=b, return_lse=True) for b in biases]
    merged = fastattn.merge_attention(*zip(*parts, strict=True))
    for got, expected in zip(merged, whole, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)


# ------------------------------------------------------------------------------------------------- what is refused


def refuse(error, message, graph=None, **changes):
    rng = np.random.default_rng(0)
    query, key, value, good = problem(rng)
    call = {"query": query, "key": key, "value": value, "graph": good if graph is None else graph, **changes}
    out = np.full((4, 9, 16), SENTINEL, np.float32)
    with pytest.raises(error, match=message):
        graph_attention(**call, out=out)
    assert (out == SENTINEL).all()


def test_graphs_that_are_refused():
    good = np.arange(10), np.arange(9)

    def changed(which, at, number):
        arrays = [x.copy() for x in good]
        arrays[which][at] = number
        return tuple(arrays)

    refuse(ValueError, re.escape("indices[4] is 13"), changed(1, 4, 13))
    refuse(ValueError, re.escape("indices[0] is -1"), changed(1, 0, -1))
    refuse(ValueError, re.escape("indptr[3] is 9, indptr[4] is 4"), changed(0, 3, 9))
    refuse(ValueError, "begins with 1", changed(0, 0, 1))
    refuse(ValueError, "ends with 8", changed(0, 9, 8))
    refuse(ValueError, "10", (good[0][:9], good[1]))
    refuse(ValueError, "indices", (good[0], good[1][:5]))
    refuse(ValueError, "one axis", (good[0], good[1][None]))
    refuse(TypeError, "int16", (good[0], good[1].astype(np.int16)))
    refuse(TypeError, "float64", (good[0].astype(float), good[1]))
    refuse(TypeError, "uint64", (good[0], good[1].astype(np.uint64)))
    refuse(TypeError, "3 things", (*good, good[1]))
    refuse(TypeError, "bool", (good[0], good[1] > 0))
    for graph in (np.eye(9), "graph", {}, 3, good[0]):
        refuse(TypeError, "graph must be", graph)
    refuse(TypeError, "csr_array", np.ones((9, 13)))


def test_other_formats_say_tocsr():
    sparse = pytest.importorskip("scipy.sparse")
    graph = sparse.random_array((9, 13), density=0.3)
    for kind in ("coo", "csc", "lil", "dok", "bsr"):
        refuse(TypeError, r"tocsr\(\)", graph.asformat(kind))
    refuse(ValueError, re.escape("(13, 9)"), graph.T.tocsr())
    refuse(ValueError, re.escape("(9, 13)"), sparse.csr_array((9, 12)))


def test_other_arguments_that_are_refused():
    ones = np.ones
    refuse(ValueError, "channels", query=ones((4, 9, 15), np.float32))
    refuse(ValueError, "rows", value=ones((4, 12, 16), np.float32))
    refuse(ValueError, r"swapaxes\(0, 1\)", key=ones((3, 13, 16), np.float32))
    refuse(ValueError, "w_score", w_score=ones(15, np.float32))
    refuse(ValueError, "w_score", w_score=ones((3, 16), np.float32))
    refuse(ValueError, "w_score", w_score=1.0)
    refuse(ValueError, "edge_bias", edge_bias=ones(5))
    refuse(TypeError, "edge_bias", edge_bias=ones(1, int))
    refuse(ValueError, "edge_key", edge_key=ones((5, 16), np.float32))
    refuse(ValueError, "edge_value", edge_value=ones((5, 16), np.float32))
    for bad in (np.nan, np.inf, "1", None, True, [0.2]):
        refuse((ValueError, TypeError), "negative_slope", negative_slope=bad)
    for name in ("return_weights", "return_lse"):
        refuse(TypeError, name, **{name: "band"})


def test_scipy_is_not_imported():
    fresh_process.run(
        "import sys, numpy as np, fastattn\n"
        "x = np.ones((3, 4))\n"
        "fastattn.graph_attention(x, x, x, ([0, 1, 2, 3], [2, 1, 0]))\n"
        "assert not [name for name in sys.modules if name.startswith('scipy')]"
    )


# ---------------------------------------------------------------------------------------------------------- memory


def test_nothing_of_the_size_of_the_edges(rng):
    """200,000 edges of 256 channels would be 205 MB; the call's own memory is that of a row for each thread."""
    code = """
    import resource, numpy as np, fastattn
    nodes, edges = 2000, 200_000
    x = np.ones((nodes, 4, 64), np.float32).swapaxes(0, 1)
    indptr = np.linspace(0, edges, nodes + 1).astype(np.int64)
    indices = np.random.default_rng(0).integers(0, nodes, edges)
    few = indptr // edges, indices[:1]
    fastattn.graph_attention(x, x, x, few, num_threads=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fastattn.graph_attention(x, x, x, (indptr, indices), num_threads=2)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < 8e6, grown
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
            out = array(11, heads, value_dim).swapaxes(0, 1)
            for size in (np.int32, np.int64):
                graph = [guarded(x.astype(size), at_end) for x in (indptr, indices)]
                for options in (
                    {},
                    {"w_score": array(heads, head_dim)},
                    {"edge_bias": array(heads, nnz), "edge_key": array(nnz, head_dim), "softcap": 2.0,
                     "edge_value": array(nnz, value_dim), "return_weights": True, "return_lse": True},
                ):  # fmt: skip
                    nodes = [x.swapaxes(0, 1) for x in (query, key, value)]
                    graph_attention(*nodes, graph, out=out, **options)
                    assert np.isfinite(out).all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect through ctypes")
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_no_access_outside_the_arrays(dtype, at_end):
    fresh_process.run(
        f"import faulthandler; faulthandler.enable()\nimport test_graph; test_graph.walk({dtype!r}, {at_end})"
    )
