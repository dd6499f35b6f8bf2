"""prepare_additive_keys: the bits of a call with the keys themselves, and what does not fit."""

import copy
import pickle

import numpy as np
import pytest
from problems import DTYPES, bits, sixteen_bits

import fastattn


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def both(query, key, value, w_score, w_key=None, **rules):
    """The bits of a call, with prepared keys and without."""
    prepared = fastattn.prepare_additive_keys(key, w_key)
    plain = fastattn.additive_attention(query, key, value, w_score, w_key=w_key, **rules)
    fast = fastattn.additive_attention(query, prepared, value, w_score, **rules)
    plain, fast = (answer if isinstance(answer, tuple) else (answer,) for answer in (plain, fast))
    assert [a.dtype for a in plain] == [a.dtype for a in fast]
    return list(map(bits, plain)), list(map(bits, fast))


@pytest.mark.parametrize("dtype", [*DTYPES, *sixteen_bits()])
@pytest.mark.parametrize("keys", [0, 1, 7, 16, 255, 256, 257, 700])
@pytest.mark.parametrize("queries", [1, 9])
def test_bits_of_the_keys_themselves(rng, queries, keys, dtype):
    query, key = normal(rng, 2, 3, queries, 12, dtype=dtype), normal(rng, 2, 3, keys, 20, dtype=dtype)
    value, w_score = normal(rng, 2, 3, keys, 9, dtype=dtype), normal(rng, 30, dtype=dtype)
    w_query, w_key = normal(rng, 12, 30, dtype=dtype), normal(rng, 20, 30, dtype=dtype)
    arguments = {"w_query": w_query, "b_hidden": normal(rng, 30)}
    for rules in (
        {},
        {"key_lengths": max(keys - 3, 0), "return_weights": True, "return_lse": True},
        {"window_size": (20, 2), "activation": "entmax15"},
        {"mask": rng.random((queries, keys)) < 0.5, "scale": 0.3},
    ):
        plain, fast = both(query, key, value, w_score, w_key, **arguments, **rules)
        assert plain == fast


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 3, 8, 64])
def test_wide_keys_and_queries(rng, hidden, dtype):
    """Arguments whose exponentials are out of range take the plain tanh, of the keys themselves."""
    limit = 350 if dtype == np.float64 else 43
    key, query = normal(rng, 600, hidden, dtype=dtype), normal(rng, 5, hidden, dtype=dtype)
    value, w_score = normal(rng, 600, 4, dtype=dtype), normal(rng, hidden, dtype=dtype)
    # No key is wide, but all are large enough to matter beside a wide query.
    key[:, 0] = np.linspace(0, 4, 600) - limit + 1e-3
    query[1, 0] = limit + 1
    plain, fast = both(query, key, value, w_score)
    assert plain == fast
    key[[3, 300, 599], 0] = limit * 3, -limit * 2, np.inf
    plain, fast = both(query, key, value, w_score)
    assert plain == fast
    query[2] = -limit * 3
    plain, fast = both(query, key, value, w_score)
    assert plain == fast
    key[4, 0] = np.nan
    plain, fast = both(query, key, value, w_score, mask=np.arange(600) != 4)
    assert plain == fast
    plain, fast = both(query, key, value, w_score, sinks=1.0)
    assert plain == fast


def test_batch_axes(rng):
    """Keys may lack axes, have some of size 1, be grouped, and lie anywhere."""
    key, value, w_score = normal(rng, 3, 50, 8), normal(rng, 3, 50, 4), normal(rng, 8)
    for query, k, v, rules in (
        (normal(rng, 2, 6, 5, 8), key, value, {"enable_gqa": True}),
        (normal(rng, 2, 6, 1, 8), key, value, {"enable_gqa": True}),
        (normal(rng, 4, 3, 5, 8), key[:1], value, {}),
        (normal(rng, 3, 1, 8), key[0], value[0], {}),
        (normal(rng, 5, 8), key, value, {}),
        (normal(rng, 3, 5, 8), key.swapaxes(-1, -2).copy().swapaxes(-1, -2)[:, ::-1], value, {}),
        (normal(rng, 0, 5, 8), key[:1], value[:1], {}),
    ):
        plain, fast = both(query, k, v, w_score, **rules)
        assert plain == fast


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_no_bit(rng, num_threads):
    key, w_key = normal(rng, 5, 900, 40), normal(rng, 40, 64)
    query, value, w_score = normal(rng, 5, 3, 64), normal(rng, 5, 900, 4), normal(rng, 64)
    prepared = fastattn.prepare_additive_keys(key, w_key, num_threads=num_threads)
    out = fastattn.additive_attention(query, prepared, value, w_score, num_threads=num_threads)
    assert bits(out) == bits(fastattn.additive_attention(query, key, value, w_score, w_key=w_key))


def test_it_keeps_its_own_numbers(rng):
    """What is written to the key afterwards does not reach it; it is read-only, pickles and copies."""
    query, value, w_score = normal(rng, 2, 8), normal(rng, 30, 4), normal(rng, 8)
    key = normal(rng, 30, 8)
    prepared = fastattn.prepare_additive_keys(key)
    np.testing.assert_array_equal(prepared.key, key)
    expected = bits(fastattn.additive_attention(query, key, value, w_score))
    key[...] = 0
    for again in (prepared, pickle.loads(pickle.dumps(prepared)), copy.copy(prepared), copy.deepcopy(prepared)):
        assert bits(fastattn.additive_attention(query, again, value, w_score)) == expected
        assert again.shape == (30, 8) and again.dtype == np.float32 and again.nbytes >= 2 * key.nbytes
        assert repr(again) == "<PreparedKeys: (30, 8), float32>"
        with pytest.raises(ValueError, match="read-only"):
            again.key[...] = 1
    with pytest.raises(AttributeError):
        prepared.key = key
    with pytest.raises(TypeError, match="prepare_additive_keys"):
        type(prepared)()


def test_what_does_not_fit_is_named(rng):
    query, key, value, w_score = normal(rng, 2, 8), normal(rng, 30, 8), normal(rng, 30, 4), normal(rng, 8)
    prepared = fastattn.prepare_additive_keys(key)
    out = np.full((2, 4), 7, np.float32)
    for message, error, arguments in (
        ("w_key", TypeError, {"w_key": normal(rng, 8, 8)}),
        ("w_score", ValueError, {"w_score": normal(rng, 7)}),
        ("prepared in float32.*float64", TypeError, {"query": query.astype(np.float64)}),
        ("value", ValueError, {"value": value[1:]}),
    ):
        given = {"query": query, "key": prepared, "value": value, "w_score": w_score} | arguments
        with pytest.raises(error, match=message):
            fastattn.additive_attention(**given, out=out)
        assert (out == 7).all()
    with pytest.raises(TypeError, match="key"):
        fastattn.additive_attention_vjp(normal(rng, 2, 4), query, prepared, value, w_score)
    with pytest.raises(TypeError, match="key"):
        fastattn.dot_product_attention(query, prepared, value)
    with pytest.raises(ValueError, match="w_key"):
        fastattn.prepare_additive_keys(key, normal(rng, 9, 8))
    with pytest.raises(ValueError, match="key"):
        fastattn.prepare_additive_keys(key[0])
    for bad in (0, 1.5, "1"):
        with pytest.raises((ValueError, TypeError), match="num_threads"):
            fastattn.prepare_additive_keys(key, num_threads=bad)
