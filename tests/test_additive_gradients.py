"""Gradients of additive and bilinear attention: arguments of any size, and what goes back through the projections.

Rules, sizes, dtypes and errors, which they have in common with all attention, are in test_gradients.py.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from gradient_bounds import assert_gradients, gradient_bounds, random_gradients
from problems import bits

import fastattn
from fastattn import reference

# Beyond these the product of two exponentials overflows, and beyond twice as much each of them.
FAR = {np.float32: 22.0, np.float64: 176.0}
EVERY = ("query", "key", "value", "w_score")


def unprojected(rng, num_queries=20, num_keys=70, hidden=9, dtype=np.float32, batch=(2,)):
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    return {"query": normal(*batch, num_queries, hidden), "key": normal(*batch, num_keys, hidden),
            "value": normal(*batch, num_keys, 12), "w_score": normal(hidden)}  # fmt: skip


# ----------------------------------------------------------------------------------------- arguments of any size


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0.99, 1.01, 2.01, 50.0])
@pytest.mark.parametrize("which", ["some rows", "some keys", "both", "all"])
def test_far_arguments(rng, which, size, dtype):
    call = unprojected(rng, dtype=dtype)
    far = dtype(FAR[dtype] * size)
    if which in ("some rows", "both"):
        call["query"][:, ::5, 3] = far
    if which in ("some keys", "both"):
        call["key"][:, 1::7, ::2] -= far
    if which == "all":
        call["query"] += far
        call["key"] -= far
    assert_gradients("additive_attention", call)
    assert_gradients("additive_attention", {**call, "is_causal": True, "activation": "sigmoid"})


def test_far_arguments_cancel(rng):
    """a + b is small where neither a nor b is: the gradients are those of the differences."""
    near = unprojected(rng)
    near["query"], near["key"] = (np.round(near[n] * 64) / 64 for n in ("query", "key"))
    far = {**near, "query": near["query"] + np.float32(64), "key": near["key"] - np.float32(64)}
    grad_out, _ = random_gradients("additive_attention", near)
    expected = fastattn.additive_attention_vjp(grad_out, **near, wrt=EVERY)
    actual = fastattn.additive_attention_vjp(grad_out, **far, wrt=EVERY)
    bounds = gradient_bounds("additive_attention", grad_out, **near, dtype=np.dtype(np.float32))
    for name, x, y in zip(EVERY, actual, expected, strict=True):
        assert (np.abs(x - y) <= 2 * bounds[name]).all(), name


@pytest.mark.parametrize("size", [8.0, 15.0, 30.0])
def test_flat_units_keep_their_digits(rng, size):
    """Where tanh is nearly 1 or -1, 1 - tanh ** 2 is tiny, and right to a few eps of itself."""
    call = unprojected(rng, hidden=4)
    for sign in (-1, 1):
        flat = {**call, "query": call["query"] + np.float32(sign * size)}
        grad_out, _ = random_gradients("additive_attention", flat)
        d_query, d_key = fastattn.additive_attention_vjp(grad_out, **flat, wrt=("query", "key"))
        exact = {n: x.astype(np.float64) for n, x in flat.items()}
        signs = np.abs(np.tanh(exact["query"][:, :, None] + exact["key"][:, None]))
        assert signs.min() > 0.9
        theirs = reference.additive_attention_vjp(grad_out, **exact, wrt=("query", "key"))
        # The reference loses digits there: in float64 it still has enough of them for the first size.
        if size == 8:
            for x, y in zip((d_query, d_key), theirs, strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * np.abs(y).max())
        else:
            assert np.isfinite(d_query).all()
            assert (np.abs(d_query) > 0).any()


@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
def test_infinite_arguments(rng, infinity):
    """tanh is 1 or -1 there: a score like others, with derivative 0."""
    call = unprojected(rng)
    call["query"][:, 4, 2] = infinity
    call["key"][:, 5, 3] = infinity
    assert_gradients("additive_attention", call)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_what_is_hidden_changes_no_bit(rng, bad):
    """In the same group of rows, and the same vector of keys."""
    call = unprojected(rng)
    mask = rng.random((20, 70)) < 0.5
    mask[3], mask[:, 10] = False, False
    grad_out, _ = random_gradients("additive_attention", call)
    expected = fastattn.additive_attention_vjp(grad_out, **call, mask=mask, wrt=EVERY)
    for name, place in (("query", 3), ("key", 10), ("value", 10)):
        spoiled = {**call, name: call[name].copy()}
        spoiled[name][:, place] = bad
        actual = fastattn.additive_attention_vjp(grad_out, **spoiled, mask=mask, wrt=EVERY)
        assert [bits(x) for x in actual] == [bits(x) for x in expected], name


def test_a_row_does_not_depend_on_its_neighbours(rng):
    call = unprojected(rng, num_queries=13)
    grad_out, _ = random_gradients("additive_attention", call)
    expected = fastattn.additive_attention_vjp(grad_out, **call, wrt="query")
    call["query"][:, ::2] *= 100
    actual = fastattn.additive_attention_vjp(grad_out, **call, wrt="query")
    assert bits(actual[:, 1::2]) == bits(expected[:, 1::2])


@pytest.mark.parametrize("score", [0.0, np.inf])
def test_weights_without_effect(rng, score):
    call = unprojected(rng)
    call["w_score"][2] = score
    key_lengths = np.array([0])
    gradients = fastattn.additive_attention_vjp(np.ones((2, 20, 12)), **call, key_lengths=key_lengths, wrt=EVERY)
    assert all((x == 0).all() for x in gradients)


# ----------------------------------------------------------------------------------------- through the projections


def projected(rng, num_queries=300, num_keys=70, batch=(3,), dtype=np.float32):
    """Small whole numbers: projections are exact, so that only the way back can differ."""
    whole = lambda *shape: rng.integers(-2, 3, shape).astype(dtype)  # noqa: E731
    return {"query": whole(*batch, num_queries, 6), "key": whole(*batch, num_keys, 5),
            "value": whole(*batch, num_keys, 4), "w_score": whole(8) / 8, "w_query": whole(6, 8) / 8,
            "w_key": whole(5, 8) / 8, "b_hidden": whole(8) / 8}  # fmt: skip


PROJECTED = ("query", "key", "w_query", "w_key", "b_hidden")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("hidden", range(1, 10))
def test_nan_stays_in_its_row(rng, hidden, dtype):
    """Channels that fill up a four, where a vector is shorter, belong to no other row."""
    query, key = (rng.standard_normal((n, hidden)).astype(dtype) for n in (7, 40))
    value, grad_out = (rng.standard_normal((n, 3)).astype(dtype) for n in (40, 7))
    grad_out[5] = np.nan
    mask = np.ones((7, 40), bool)
    mask[5] = np.arange(40) == 3
    d_query, d_key = fastattn.additive_attention_vjp(
        grad_out, query, key, value, np.ones(hidden, dtype), mask=mask, wrt=("query", "key")
    )
    assert np.isnan(d_query[5]).all() and np.isnan(d_key[3]).all()
    assert np.isfinite(np.delete(d_query, 5, 0)).all() and np.isfinite(np.delete(d_key, 3, 0)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_padding_changes_no_bit_of_matrices(rng, bad, dtype):
    call = projected(rng, dtype=dtype)
    grad_out, _ = random_gradients("additive_attention", call)
    expected = fastattn.additive_attention_vjp(grad_out, **call, query_offset=0, wrt=PROJECTED)
    pad = lambda x: np.pad(x, [(0, 0), (0, 40), (0, 0)], constant_values=bad)  # noqa: E731
    padded = {**call, "query": pad(call["query"]), "key": pad(call["key"]), "value": pad(call["value"])}
    actual = fastattn.additive_attention_vjp(
        pad(grad_out), **padded, query_offset=0, query_lengths=300, key_lengths=70, wrt=PROJECTED
    )
    for name, x, y in zip(PROJECTED, actual, expected, strict=True):
        if name in ("query", "key"):
            assert (x[:, y.shape[1] :] == 0).all(), name
            x = x[:, : y.shape[1]]
        assert bits(x) == bits(y), name


@pytest.mark.parametrize("name", ["additive_attention", "bilinear_attention"])
def test_long_sums_over_rows(rng, name):
    """Equal terms, the worst there are for a single chain in float32: 20000 rows give 20000 times what one gives."""
    query, key = (np.broadcast_to(np.float32(0.1), (n, 2)) for n in (20000, 2))
    value, w = np.array([[0.3], [-0.1]], np.float32), np.array([[0.7], [0.1]], np.float32)
    key = key * np.array([[1], [-2]], np.float32)
    call = {"query": query, "key": key, "value": value, "w_query": w, "w_key": w}
    if name == "additive_attention":
        call["w_score"] = np.ones(1, np.float32)
    vjp, names = getattr(fastattn, f"{name}_vjp"), ("w_query", "w_key", "key", "value")
    actual = vjp(np.broadcast_to(np.float32(1), (20000, 1)), **call, wrt=names)
    of_one = vjp(np.ones((1, 1), np.float32), **{**call, "query": query[:1]}, wrt=names)
    for n, x, y in zip(names, actual, of_one, strict=True):
        np.testing.assert_allclose(x, 20000 * y, rtol=16 * np.finfo(np.float32).eps, err_msg=n)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_shared_matrix_has_the_sum(rng, with_bias):
    call = projected(rng)
    call = {**{n: call[n] for n in ("query", "value", "w_query")}, "key": call["query"][:, :70]}
    biases = {"b_query": np.ones(8, np.float32)} if with_bias else {}
    shared = ("w_query", *biases)
    apart = ("w_query", "w_key", *(("b_query", "b_key") if with_bias else ()))
    grad_out, _ = random_gradients("bilinear_attention", call)
    one = fastattn.bilinear_attention_vjp(grad_out, **call, **biases, wrt=shared)
    both = {f"{n[:2]}key": x for n, x in (("w_query", call["w_query"]), *biases.items())}
    two = fastattn.bilinear_attention_vjp(grad_out, **call, **biases, **both, wrt=apart)
    np.testing.assert_allclose(one[0], two[0] + two[1], rtol=1e-5, atol=1e-5)
    if with_bias:
        np.testing.assert_allclose(one[1], two[2] + two[3], rtol=1e-5, atol=1e-5)


def test_only_what_is_named(rng):
    call = projected(rng)
    grad_out, _ = random_gradients("additive_attention", call)
    names = (*PROJECTED, "value", "w_score")
    together = dict(zip(names, fastattn.additive_attention_vjp(grad_out, **call, wrt=names), strict=True))
    for name in names:
        assert bits(fastattn.additive_attention_vjp(grad_out, **call, wrt=name)) == bits(together[name]), name


PRODUCTS = """
import hashlib, numpy as np, fastattn
rng = np.random.default_rng(0)
x, w = rng.standard_normal((2, 500, 96), np.float32), rng.standard_normal((96, 64), np.float32) / 8
names = ("query", "key", "w_query")
for dtype in (np.float32, np.float64):
    call = [a.astype(dtype) for a in (np.ones((2, 500, 96)), x, x, x, w)]
    gradients = fastattn.bilinear_attention_vjp(*call, wrt=names, num_threads=1)
    print(*(hashlib.sha1(a.tobytes()).hexdigest() for a in gradients))
"""


def test_threads_of_blas_change_no_bit():
    found = set()
    for threads in ("1", "2", "4"):
        some = {**os.environ, **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)}
        run = subprocess.run([sys.executable, "-c", PRODUCTS], env=some, capture_output=True, text=True, check=True)
        found.add(run.stdout)
    assert len(found) == 1, found
