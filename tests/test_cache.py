"""KVCache: decoding with it equals attention over everything, ragged or not; windows; errors that change nothing."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import bits, qkv, sixteen_bits

import fastattn
from fastattn.cache import KVCache

DTYPES = (np.float32, np.float64, *sixteen_bits())


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


class Tokens:
    """Brute force: for every sequence a list of all its keys and one of its values."""

    def __init__(self, batch, heads, head_dim, value_dim):
        self.batch = batch
        self.lists = {b: (np.zeros((heads, 0, head_dim)), np.zeros((heads, 0, value_dim))) for b in np.ndindex(batch)}

    def append(self, key, value, lengths):
        for b, n in zip(np.ndindex(self.batch), np.broadcast_to(lengths, self.batch).ravel(), strict=True):
            both = zip(self.lists[b], (key, value), strict=True)
            self.lists[b] = tuple(np.concatenate([old, new[b][:, :n]], axis=1) for old, new in both)

    def crop(self, lengths):
        """As many of all tokens ever appended."""
        for b, n in zip(np.ndindex(self.batch), lengths.ravel(), strict=True):
            self.lists[b] = tuple(x[:, :n] for x in self.lists[b])

    def select(self, indices):
        """Along the first axis."""
        chosen = Tokens((len(indices), *self.batch[1:]), 1, 0, 0)
        chosen.lists = {(i, *rest): self.lists[(indices[i], *rest)] for i, *rest in np.ndindex(chosen.batch)}
        return chosen

    def lengths(self):
        return np.array([key.shape[1] for key, _ in self.lists.values()], np.int64).reshape(*self.batch, 1)

    def check(self, cache):
        """The cache holds each sequence's last tokens; at least as many as it must keep."""
        came = self.lengths()
        np.testing.assert_array_equal(cache.dropped + cache.lengths, came)
        assert cache.lengths.dtype == cache.dropped.dtype == np.int64
        if cache.window is None:
            np.testing.assert_array_equal(cache.lengths, came)
        else:
            assert (cache.lengths >= np.minimum(came, cache.window)).all()
        assert cache.lengths.max(initial=0) == cache.key.shape[-2] == cache.value.shape[-2] <= cache.capacity
        for b, lists in self.lists.items():
            n = cache.lengths[b][0]
            for kept, every in zip((cache.key, cache.value), lists, strict=True):
                np.testing.assert_array_equal(kept[b][:, :n], every[:, every.shape[1] - n :].astype(cache.dtype))


# -------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_decoding_is_causal_attention(rng, batch, dtype):
    """A prompt, then token by token: the rows of one call on everything."""
    query, key, value = qkv(rng, (*batch, 6), 30, 30, 16, 12, dtype, kv_batch=(*batch, 2))
    whole = fastattn.dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    cache = KVCache(batch, 2, 30, 16, 12, dtype=dtype)
    rows, at = [], 0
    for n in (7, 1, 1, 4, *17 * [1]):
        cache.append(key[..., at : at + n, :], value[..., at : at + n, :])
        assert cache.key.shape == (*batch, 2, at + n, 16) and cache.value.shape == (*batch, 2, at + n, 12)
        rows.append(
            fastattn.dot_product_attention(
                query[..., at : at + n, :],
                cache.key,
                cache.value,
                is_causal=True,
                key_lengths=cache.lengths,
                enable_gqa=True,
            )
        )
        at += n
    found = np.concatenate(rows, axis=-2)
    assert found.dtype == whole.dtype == dtype
    tolerance = {8: 1e-13, 4: 1e-5, 2: 2e-2}[np.dtype(dtype).itemsize]
    np.testing.assert_allclose(found.astype(float), whole.astype(float), rtol=tolerance, atol=tolerance)


def test_ragged_decoding(rng):
    """Prompts of different lengths, then one token each: every sequence alone gives the same bits."""
    lengths = np.array([5, 1, 9])
    query, key, value = qkv(rng, (3, 4), 13, 13, 8, kv_batch=(3, 2))
    cache, alone = KVCache(3, 2, 20, 8), [KVCache((), 2, 20, 8) for _ in range(3)]
    cache.append(key[:, :, :9], value[:, :, :9], lengths)
    for b in range(3):
        alone[b].append(key[b, :, : lengths[b]], value[b, :, : lengths[b]])
    for step in range(9, 13):
        new = slice(step, step + 1)
        cache.append(key[:, :, new], value[:, :, new])
        out = fastattn.dot_product_attention(
            query[:, :, new], cache.key, cache.value, is_causal=True, key_lengths=cache.lengths, enable_gqa=True
        )
        np.testing.assert_array_equal(cache.lengths[:, 0], lengths + step - 8)
        for b in range(3):
            alone[b].append(key[b, :, new], value[b, :, new])
            own = fastattn.dot_product_attention(
                query[b, :, new], alone[b].key, alone[b].value, key_lengths=alone[b].lengths, enable_gqa=True
            )
            assert bits(own) == bits(out[b])


def test_ragged_steps_line_up(rng):
    """Steps of several tokens, of which query_lengths says how many count; the last ones line up."""
    query, key, value = qkv(rng, (2, 2), 12, 12, 8)
    cache = KVCache(2, 2, 12, 8)
    cache.append(key[:, :, :8], value[:, :, :8], [8, 3])
    counts = np.array([[2], [4]])
    cache.append(key[:, :, 8:], value[:, :, 8:], counts)
    out = fastattn.dot_product_attention(
        query[:, :, 8:],
        cache.key,
        cache.value,
        is_causal=True,
        key_lengths=cache.lengths,
        query_lengths=counts,
    )
    for b, (there, came) in enumerate(((8, 2), (3, 4))):
        keys, values = (np.concatenate([x[b, :, :there], x[b, :, 8 : 8 + came]], axis=1) for x in (key, value))
        own = fastattn.dot_product_attention(query[b, :, 8 : 8 + came], keys, values, is_causal=True)
        np.testing.assert_allclose(out[b, :, :came], own, rtol=1e-5, atol=1e-6)
        assert not out[b, :, came:].any()


@pytest.mark.parametrize("capacity", [11, 12, 16, 40])
def test_decoding_in_a_window(rng, capacity):
    """A cache that keeps dropping old tokens: the rows of one call with that window."""
    window, steps = 10, 130
    query, key, value = qkv(rng, (2, 3), steps, steps, 8)
    slopes = np.array([0.1, 0.2, 0.3], np.float32)
    rules = {"is_causal": True, "window_size": (window, 0), "alibi_slopes": slopes}
    whole = fastattn.dot_product_attention(query, key, value, **rules)
    cache = KVCache(2, 3, capacity, 8, window=window)
    for at in range(steps):
        new = slice(at, at + 1)
        cache.append(key[:, :, new], value[:, :, new])
        assert (cache.lengths >= min(at + 1, window + 1)).all()  # the query's own, and those it looks back on
        row = fastattn.dot_product_attention(
            query[:, :, new], cache.key, cache.value, key_lengths=cache.lengths, **rules
        )
        np.testing.assert_allclose(row[:, :, 0], whole[:, :, at], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------- what it contains


@given(data=st.data())
@settings(max_examples=80)
def test_brute_force(data):
    """Any appends, ragged or not, with a window or none."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
    capacity = draw(st.integers(1, 20))
    window = draw(st.one_of(st.none(), st.integers(1, capacity)))
    cache = KVCache(batch, 2, capacity, 3, 2, window=window, dtype=draw(st.sampled_from(DTYPES)))
    tokens = Tokens(batch, 2, 3, 2)
    for _ in range(draw(st.integers(1, 12))):
        n = draw(st.integers(0, 5 if draw(st.booleans()) else 30))
        key, value = (normal(rng, *batch, 2, n, dim, dtype=cache.dtype) for dim in (3, 2))
        lengths = rng.integers(0, n + 1, draw(st.sampled_from([batch, (*batch, 1), ()])))
        if draw(st.booleans()):
            lengths = None
        counts = np.broadcast_to(n if lengths is None else lengths.reshape(lengths.shape[: len(batch)]), batch)
        before = cache.lengths, cache.dropped, bits(cache.key), bits(cache.value)
        if window is None and (cache.lengths[..., 0] + counts > capacity).any():
            with pytest.raises(ValueError, match=f"capacity={capacity}"):
                cache.append(key, value, lengths)
            assert (cache.lengths, cache.dropped, bits(cache.key), bits(cache.value)) == before
        else:
            cache.append(key, value, lengths)
            tokens.append(key, value, counts)
        tokens.check(cache)


COPIES = {
    "copy()": KVCache.copy,
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "pickle, protocol 2": lambda cache: pickle.loads(pickle.dumps(cache, 2)),
}


@given(data=st.data())
@settings(max_examples=80)
def test_brute_force_of_new_caches(data):
    """Appends, with copies, crops and selections in between, of caches that have dropped tokens or not."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    window = draw(st.integers(1, 9))
    cache = KVCache(batch, 2, draw(st.integers(window, 12)), 3, 2, window=window, dtype=draw(st.sampled_from(DTYPES)))
    tokens = Tokens(batch, 2, 3, 2)
    for _ in range(draw(st.integers(2, 10))):
        n = draw(st.integers(0, 7))
        key, value = (normal(rng, *batch, 2, n, dim, dtype=cache.dtype) for dim in (3, 2))
        counts = rng.integers(0, n + 1, batch)
        cache.append(key, value, counts)
        tokens.append(key, value, counts)
        what, old = draw(st.sampled_from(["crop", "select", *COPIES])), cache
        if what == "crop":
            least = np.where(cache.dropped > 0, np.minimum(window, cache.lengths), 0)
            lengths = rng.integers(least, cache.lengths + 1)
            cache = cache.crop(lengths if draw(st.booleans()) else lengths[..., 0])
            tokens.crop(old.dropped + lengths)
        elif what == "select" and batch:
            indices = rng.integers(0, batch[0], draw(st.integers(1, 4)))
            cache = cache.select(indices - draw(st.sampled_from([0, batch[0]])))
            tokens = tokens.select(indices)
            batch = tokens.batch
        elif what != "select":
            cache = COPIES[what](cache)
        tokens.check(cache)
        if cache is not old:
            assert (cache.window, cache.capacity, cache.dtype) == (old.window, old.capacity, old.dtype)
            # What is now appended to the old one must not appear in the new one.
            old.append(*(np.full((*old.key.shape[:-2], 1, dim), 99) for dim in (3, 2)))
            tokens.check(cache)


@pytest.mark.parametrize("of", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_have_tokens_of_their_own(rng, of, dtype):
    cache = KVCache(2, 1, 8, 3, 2, dtype=dtype, window=5)
    cache.append(normal(rng, 2, 1, 11, 3, dtype=dtype), normal(rng, 2, 1, 11, 2, dtype=dtype), [11, 4])
    other, key, lengths = of(cache), cache.key.copy(), cache.lengths
    assert type(other) is KVCache
    other.append(np.full((2, 1, 2, 3), 9), np.full((2, 1, 2, 2), 7))
    assert (other.key[0, 0, -2:] == 9).all() and (other.value[0, 0, -2:] == 7).all()
    assert (other.key[1, 0, 4:6] == 9).all() and (other.value[1, 0, 4:6] == 7).all()
    np.testing.assert_array_equal(other.dropped + other.lengths, [[13], [6]])
    assert bits(cache.key) == bits(key) and cache.lengths is lengths
    for x in (other.key, other.value, other.lengths, other.dropped, of(other).lengths):
        assert not x.flags.writeable


def test_pickles_hold_what_is_there(rng):
    """Neither free room nor what was taken back."""
    cache = KVCache(2, 4, 10_000, 16)
    cache.append(normal(rng, 2, 4, 20, 16), normal(rng, 2, 4, 20, 16))
    assert len(pickle.dumps(cache)) < 1.2 * 20 * 2 * 4 * 32 * 4
    assert len(pickle.dumps(cache.crop(1))) < 5000


def test_crop_to_one_number(rng):
    key = normal(rng, 2, 1, 6, 3)
    cache = KVCache(2, 1, 8, 3)
    cache.append(key, key, [6, 4])
    for lengths in (3, np.int8(3), np.array(3), [3, 3], [[3], [3]], np.uint64(3)):
        cropped = cache.crop(lengths)
        np.testing.assert_array_equal(cropped.lengths, [[3], [3]])
        assert bits(cropped.key) == bits(key[:, :, :3])
    assert cache.crop(cache.lengths).lengths.tolist() == [[6], [4]]
    assert cache.crop(0).key.shape == (2, 1, 0, 3)
    one = KVCache((), 1, 8, 3)
    one.append(key[0], key[0])
    assert one.crop(2).lengths.tolist() == [2]


def test_select_is_along_the_first_batch_axis(rng):
    key = normal(rng, 3, 2, 1, 4, 3)
    cache = KVCache((3, 2), 1, 8, 3)
    cache.append(key, 2 * key, [[1, 2], [3, 4], [0, 1]])
    for indices in ([2, 0, 0, -2], np.array([2, 0, 0, 1], np.uint8), [True, False, True], np.zeros(3, bool), []):
        chosen, where = cache.select(indices), np.asarray(indices, None if len(indices) else int)
        np.testing.assert_array_equal(chosen.lengths, cache.lengths[where])
        for b in np.ndindex(chosen.lengths.shape[:2]):
            n = chosen.lengths[b][0]
            np.testing.assert_array_equal(chosen.key[b][:, :n], cache.key[where][b][:, :n])
            np.testing.assert_array_equal(chosen.value[b][:, :n], cache.value[where][b][:, :n])
        chosen.append(np.ones((*chosen.lengths.shape[:2], 1, 1, 3)), np.ones((*chosen.lengths.shape[:2], 1, 1, 3)))
        np.testing.assert_array_equal(chosen.lengths, cache.lengths[where] + 1)


def test_more_than_capacity_at_once(rng):
    key = normal(rng, 2, 1, 50, 3)
    cache = KVCache(2, 1, 8, 3, window=4)
    cache.append(key[:, :, :3], key[:, :, :3])
    cache.append(key[:, :, 3:], key[:, :, 3:], [47, 5])
    np.testing.assert_array_equal(cache.lengths, [[8], [8]])
    np.testing.assert_array_equal(cache.dropped, [[42], [0]])
    np.testing.assert_array_equal(cache.key[0], key[0, :, -8:])
    np.testing.assert_array_equal(cache.key[1], key[1, :, :8])


def test_moves_are_few(rng):
    """With a capacity of twice the window there is a move for every `window` tokens."""
    cache, token, moves = KVCache((), 1, 64, 2, window=32), normal(rng, 1, 1, 2), 0
    for _ in range(1000):
        before = cache.dropped
        cache.append(token, token)
        moves += int((cache.dropped != before).any())
    assert moves <= 1000 / 32


def test_views_are_views(rng):
    key, value = normal(rng, 2, 3, 5, 4), normal(rng, 2, 3, 5, 6)
    cache = KVCache((2,), 3, 10, 4, 6)
    assert cache.key.shape == (2, 3, 0, 4) and cache.value.shape == (2, 3, 0, 6)
    cache.append(key, value)
    first, lengths = cache.key, cache.lengths
    assert np.shares_memory(first, cache.key)
    for x in (cache.key, cache.value, cache.lengths, cache.dropped):
        with pytest.raises(ValueError, match="read-only"):
            x[...] = 0
    cache.append(key, value)
    np.testing.assert_array_equal(first, key)  # views returned before are unchanged
    np.testing.assert_array_equal(lengths, [[5], [5]])
    key[...] = 0
    assert first.all()
    assert cache.nbytes == 2 * 3 * 10 * (4 + 6) * 4


def test_attributes():
    cache = KVCache(2, 3, 10, 4, window=5, dtype=np.float16)
    assert (cache.capacity, cache.window, cache.dtype) == (10, 5, np.float16)
    assert cache.value.shape == (2, 3, 0, 4)
    assert KVCache((), 1, 1, 1).window is None


def test_reset(rng):
    key = normal(rng, 2, 1, 6, 3)
    cache = KVCache(2, 1, 6, 3)
    cache.append(key, key, [6, 2])
    cache.reset()
    assert cache.key.shape == (2, 1, 0, 3)
    np.testing.assert_array_equal(cache.lengths, [[0], [0]])
    cache.append(key, key, [2, 6])
    np.testing.assert_array_equal(cache.key[1], key[1])
    np.testing.assert_array_equal(cache.lengths, [[2], [6]])


def test_nothing_appended(rng):
    cache = KVCache(2, 1, 6, 3)
    cache.append(normal(rng, 2, 1, 0, 3), normal(rng, 2, 1, 0, 3))
    cache.append(normal(rng, 2, 1, 4, 3), normal(rng, 2, 1, 4, 3), 0)
    assert cache.key.shape == (2, 1, 0, 3)
    out = fastattn.dot_product_attention(np.ones((2, 1, 1, 3)), cache.key, cache.value, key_lengths=cache.lengths)
    assert not out.any()


def test_appending_the_cache_to_itself(rng):
    key = normal(rng, 1, 6, 3)
    cache = KVCache((), 1, 8, 3, window=4)
    cache.append(key, key)
    cache.append(cache.key[:, :4], cache.value[:, :4])
    np.testing.assert_array_equal(cache.key, np.concatenate([key[:, 2:], key[:, :4]], axis=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions(rng, dtype):
    """Conversions of the same kind; also from integers and lists."""
    cache = KVCache((), 1, 20, 2, dtype=dtype)
    for given_dtype in (np.float32, np.float64, np.float16, np.int64, np.bool_, ">f8"):
        x = (normal(rng, 1, 1, 2) * 3).astype(given_dtype)
        cache.append(x, x)
        assert bits(cache.key[:, -1:]) == bits(x.astype(dtype))
    cache.append([[[1, 2]]], [[[0.5, 3]]])
    assert cache.value[0, -1].tolist() == [0.5, 3]


# ---------------------------------------------------------------------------------------------- errors


def refuse(error, message, *arguments, **named):
    with pytest.raises(error, match=message):
        KVCache(*arguments, **named)


def test_bad_arguments():
    refuse(TypeError, "batch_shape must be", 2.0, 1, 1, 1)
    refuse(ValueError, "batch_shape must be", (2, -1), 1, 1, 1)
    refuse(ValueError, "num_kv_heads must be an integer of at least 1, not 0", 2, 0, 1, 1)
    refuse(ValueError, "capacity must be", 2, 1, 0, 1)
    refuse(TypeError, "capacity must be", 2, 1, True, 1)
    refuse(ValueError, "head_dim must be", 2, 1, 1, -1)
    refuse(TypeError, "value_dim must be", 2, 1, 1, 1, "4")
    refuse(ValueError, "window must be", 2, 1, 8, 1, window=0)
    refuse(ValueError, "window=9 .* capacity=8", 2, 1, 8, 1, window=9)
    refuse(TypeError, "dtype must be float32", 2, 1, 8, 1, dtype=np.int64)
    refuse(TypeError, "dtype must be float32", 2, 1, 8, 1, dtype=np.complex64)
    refuse(TypeError, "dtype must be float32", 2, 1, 8, 1, dtype=">f4")
    refuse(MemoryError, "no memory for a cache", 2**40, 2**10, 2**20, 2**10)


def full_cache():
    cache = KVCache((2, 2), 3, 8, 4, 5)
    x = np.arange(2 * 2 * 3 * 6, dtype=np.float32).reshape(2, 2, 3, 6, 1)
    cache.append(np.broadcast_to(x, (2, 2, 3, 6, 4)), np.broadcast_to(x, (2, 2, 3, 6, 5)), [[6, 1], [2, 3]])
    return cache


KEY, VALUE = np.ones((2, 2, 3, 2, 4), np.float32), np.ones((2, 2, 3, 2, 5), np.float32)
BAD_TOKENS = {
    "batch": (ValueError, r"key has shape \(2, 3, 2, 4\); it must have \(2, 2, 3, n, 4\)", (KEY[0], VALUE)),
    "broadcast": (ValueError, "key has shape", (KEY[:1], VALUE)),
    "channels": (ValueError, "value has shape", (KEY, KEY)),
    "tokens": (ValueError, "value has 1 tokens .* key 2", (KEY, VALUE[..., :1, :])),
    "complex": (TypeError, "key has dtype complex64", (KEY.astype(np.complex64), VALUE)),
    "object": (TypeError, "value has dtype object", (KEY, VALUE.astype(object))),
    "masked": (TypeError, "key is a masked array", (np.ma.masked_array(KEY), VALUE)),
    "ragged": (TypeError, "key cannot be made into an array", ([[1.0], [1.0, 2.0]], VALUE)),
    "lengths, shape": (ValueError, r"lengths has shape \(2,\)", (KEY, VALUE, [1, 2])),
    "lengths, too large": (ValueError, "lengths must lie between 0 and 2.*not 3", (KEY, VALUE, 3)),
    "lengths, negative": (ValueError, "lengths must lie between 0 and 2.*not -1", (KEY, VALUE, [[0, 1], [-1, 0]])),
    "lengths, dtype": (TypeError, "lengths must be .* not 1.0", (KEY, VALUE, 1.0)),
    "lengths, bool": (TypeError, "lengths must be .* not True", (KEY, VALUE, True)),
    "no room": (
        ValueError,
        r"capacity=8 tokens: 6 are there and 3 came in sequence 0, 0",
        (np.ones((2, 2, 3, 3, 4)), np.ones((2, 2, 3, 3, 5))),
    ),
    "no room in one": (
        ValueError,
        r"capacity=8 tokens: 3 are there and 6 came in sequence 1, 1",
        (np.ones((2, 2, 3, 6, 4)), np.ones((2, 2, 3, 6, 5)), [[0, 0], [0, 6]]),
    ),
}


@pytest.mark.parametrize("error, message, arguments", BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_errors_change_nothing(error, message, arguments):
    cache = full_cache()
    before = bits(cache.key), bits(cache.value), bits(cache.lengths), bits(cache.dropped)
    with pytest.raises(error, match=message):
        cache.append(*arguments)
    assert (bits(cache.key), bits(cache.value), bits(cache.lengths), bits(cache.dropped)) == before
    cache.append(KEY, VALUE, [[2, 0], [1, 2]])
    assert cache.lengths.ravel().tolist() == [8, 1, 3, 5]


@pytest.mark.skipif(len(DTYPES) < 4, reason="needs ml_dtypes")
def test_bfloat16_takes_no_complex_numbers():
    """For NumPy that would be a conversion of the same kind."""
    cache = KVCache((), 1, 4, 2, dtype=DTYPES[-1])
    with pytest.raises(TypeError, match="key has dtype complex64"):
        cache.append(np.ones((1, 1, 2), np.complex64), np.ones((1, 1, 2)))
    if not np.can_cast(DTYPES[-1], np.float16, "same_kind"):
        with pytest.raises(TypeError, match="key has dtype bfloat16"):
            KVCache((), 1, 4, 2, dtype=np.float16).append(*2 * [np.ones((1, 1, 2), DTYPES[-1])])


def rolled_cache():
    """Sequences that have dropped 4 tokens and none; 8 and 3 are there."""
    cache = KVCache(2, 1, 8, 3, window=5)
    x = np.arange(2 * 12 * 3, dtype=np.float32).reshape(2, 1, 12, 3)
    cache.append(x, x, [12, 3])
    return cache


BAD_LIVES = {
    "crop, too many": (ValueError, "lengths must lie between 0 and 3, .* sequence 1, not 5", "crop", 5),
    "crop, negative": (ValueError, "lengths must lie between 0 and 8, .* not -1", "crop", -1),
    "crop, window": (
        ValueError,
        r"lengths leaves 4 of 8 .* sequence 0, fewer than window=5.* 4 before",
        "crop",
        [4, 3],
    ),
    "crop, shape": (ValueError, r"lengths has shape \(1,\)", "crop", [5]),
    "crop, dtype": (TypeError, "lengths must be .* not 2.0", "crop", 2.0),
    "crop, bool": (TypeError, "lengths must be .* not True", "crop", True),
    "crop, masked": (TypeError, "lengths must be .* not masked", "crop", np.ma.masked_array([5, 3])),
    "select, range": (ValueError, r"indices must be integers from -2 to 1, .* not 2", "select", [0, 2]),
    "select, negative": (ValueError, r"indices must be integers from -2 to 1, .* not -3", "select", [-3]),
    "select, axes": (ValueError, r"indices has shape \(1, 2\)", "select", [[0, 1]]),
    "select, a number": (ValueError, r"indices has shape \(\)", "select", 1),
    "select, booleans": (ValueError, r"indices has shape \(3,\); .* 2 booleans", "select", [True, False, True]),
    "select, dtype": (TypeError, "indices must be .* float64", "select", [0.0]),
    "select, ragged": (TypeError, "indices must be", "select", [[0], [0, 1]]),
}


@pytest.mark.parametrize("error, message, method, argument", BAD_LIVES.values(), ids=BAD_LIVES)
def test_errors_of_crop_and_select(error, message, method, argument):
    cache = rolled_cache()
    before = [bits(x) for x in (cache.key, cache.value, cache.lengths, cache.dropped)]
    with pytest.raises(error, match=message):
        getattr(cache, method)(argument)
    assert [bits(x) for x in (cache.key, cache.value, cache.lengths, cache.dropped)] == before


def test_select_needs_a_batch_axis():
    with pytest.raises(ValueError, match=r"first batch axis, and this cache has none: batch_shape=\(\)"):
        KVCache((), 1, 8, 3).select([0])


# ---------------------------------------------------------------------------------------------- 8 bits


class QuantizedTokens:
    """Brute force: for every sequence all its tokens as `quantize_kv` stores each of them, and its center."""

    def __init__(self, batch, cache, center, block):
        self.batch, self.center, self.block = batch, center, block
        self.arrays = {b: None for b in np.ndindex(batch)}
        self.middles = {b: None if center is None else np.zeros_like(cache.key_center[b]) for b in np.ndindex(batch)}
        if center is not None and not isinstance(center, str):
            self.middles = {b: np.broadcast_to(center, cache.key_center.shape)[b] for b in np.ndindex(batch)}

    def append(self, key, value, lengths):
        for b, n in zip(np.ndindex(self.batch), np.broadcast_to(lengths, self.batch).ravel(), strict=True):
            if n == 0:
                continue
            middle = self.middles[b]
            if isinstance(self.center, str) and self.arrays[b] is None:
                middle = self.center
            new = fastattn.quantize_kv(key[b][:, :n], value[b][:, :n], center=middle, block=self.block)
            self.middles[b], old = new.key_center, self.arrays[b]
            self.arrays[b] = new[:4] if old is None else [np.concatenate(x, 1) for x in zip(old, new[:4], strict=True)]

    def crop(self, lengths):
        for b, n in zip(np.ndindex(self.batch), lengths.ravel(), strict=True):
            if self.arrays[b] is not None:
                self.arrays[b] = None if n == 0 else [x[:, :n] for x in self.arrays[b]]
            if n == 0 and isinstance(self.center, str):
                self.middles[b] = np.zeros_like(self.middles[b])

    def select(self, indices):
        chosen = copy.copy(self)
        chosen.batch = (len(indices), *self.batch[1:])
        of = {(i, *rest): (indices[i], *rest) for i, *rest in np.ndindex(chosen.batch)}
        chosen.arrays = {b: self.arrays[of[b]] for b in of}
        chosen.middles = {b: self.middles[of[b]] for b in of}
        return chosen

    def check(self, cache):
        for b, arrays in self.arrays.items():
            n, came = cache.lengths[b][0], 0 if arrays is None else arrays[0].shape[1]
            assert cache.dropped[b][0] + n == came
            if self.center is not None:
                np.testing.assert_array_equal(cache.key_center[b], self.middles[b])
            if came:
                kept = cache.key, cache.value, cache.key_scale, cache.value_scale
                for x, every in zip(kept, arrays, strict=True):
                    assert bits(x[b][:, :n]) == bits(every[:, came - n :]) and x.dtype == every.dtype
        assert (cache.key_center is None) == (self.center is None)


@given(data=st.data())
@settings(max_examples=120)
def test_brute_force_in_8_bits(data):
    """Appends, ragged or not, of any floating dtype, in windows or not, with all that makes a cache of another."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
    capacity = draw(st.integers(1, 12))
    window = draw(st.one_of(st.none(), st.integers(1, capacity)))
    center = draw(st.sampled_from([None, "mean", "array"]))
    center = normal(rng, 2, 1, 8) if center == "array" else center
    block = draw(st.sampled_from([None, 4, 1]))
    cache = KVCache(batch, 2, capacity, 8, 4, window=window, dtype=np.int8, center=center, block=block)
    tokens = QuantizedTokens(batch, cache, center, block)
    for _ in range(draw(st.integers(1, 12))):
        n = draw(st.integers(0, 5 if draw(st.booleans()) else 20))
        dtype = draw(st.sampled_from([*DTYPES]))
        key, value = (normal(rng, *batch, 2, n, dim).astype(dtype) + dtype(1) for dim in (8, 4))
        counts = rng.integers(0, n + 1, batch)
        for b in np.ndindex(batch):
            key[b][:, counts[b] :], value[b][:, counts[b] :] = np.nan, np.inf  # padding
        if window is None and (cache.lengths[..., 0] + counts > capacity).any():
            with pytest.raises(ValueError, match=f"capacity={capacity}"):
                cache.append(key, value, counts)
        else:
            cache.append(key, value, counts)
            tokens.append(key, value, counts)
        tokens.check(cache)
        what, old = draw(st.sampled_from(["nothing", "nothing", "crop", "select", "reset", *COPIES])), cache
        if what == "crop":
            least = np.where(
                cache.dropped > 0, cache.lengths if window is None else np.minimum(window, cache.lengths), 0
            )
            lengths = rng.integers(least, cache.lengths + 1)
            cache = cache.crop(lengths)
            tokens.crop(old.dropped + lengths)
        elif what == "select" and batch and batch[0]:
            indices = rng.integers(0, batch[0], draw(st.integers(1, 4)))
            cache, tokens = cache.select(indices), tokens.select(indices)
            batch = tokens.batch
        elif what in COPIES:
            cache = COPIES[what](cache)
        elif what == "reset":
            cache.reset()
            tokens = QuantizedTokens(batch, cache, center, block)
        tokens.check(cache)
        if cache is not old:
            assert (cache.window, cache.capacity, cache.dtype) == (old.window, old.capacity, np.int8)
            if window is not None:
                old.append(*(np.full((*old.key.shape[:-2], 1, dim), 99.0) for dim in (8, 4)))
                tokens.check(cache)


@pytest.mark.parametrize("block, center", [(None, None), (None, "mean"), (8, "mean"), (8, np.ones(16))])
def test_memory_and_views_in_8_bits(rng, block, center):
    key, value = normal(rng, 2, 3, 5, 16), normal(rng, 2, 3, 5, 24)
    cache = KVCache((2,), 3, 10, 16, 24, dtype=np.int8, block=block, center=center)
    assert cache.key_scale.shape == (2, 3, 0, 2 if block else 1) and cache.dtype == np.int8
    groups = (2 + 3) if block else 2
    assert cache.nbytes == 2 * 3 * (10 * (16 + 24 + 4 * groups) + (0 if center is None else 4 * 16))
    cache.append(key, value)
    views = [
        cache.key,
        cache.value,
        cache.key_scale,
        cache.value_scale,
        *([] if center is None else [cache.key_center]),
    ]
    before = [bits(x) for x in views]
    assert views[3].shape == (2, 3, 5, 3 if block else 1) and views[2].dtype == np.float32
    for x in views:
        with pytest.raises(ValueError, match="read-only"):
            x[...] = 0
    cache.append(key + 5, value)
    assert [bits(x) for x in views] == before and np.shares_memory(views[2], cache.key_scale)
    back = fastattn.QuantizedKV(
        cache.key, cache.value, cache.key_scale, cache.value_scale, cache.key_center
    ).dequantize()
    np.testing.assert_allclose(back[0], np.concatenate([key, key + 5], -2), atol=0.06)
    np.testing.assert_allclose(back[1], np.concatenate([value, value], -2), atol=0.03)


def test_a_cache_of_8_bits_is_a_quarter():
    sizes = {dtype: KVCache(2, 8, 1000, 128, dtype=dtype).nbytes for dtype in (np.float32, np.int8)}
    assert sizes[np.int8] / sizes[np.float32] == (128 + 4) / 512


def test_other_caches_have_no_scales(rng):
    cache = KVCache((), 1, 4, 2)
    assert cache.key_scale is cache.value_scale is cache.key_center is None


def test_the_mean_is_that_of_the_first_tokens(rng):
    """Of each sequence's own; a sequence without tokens takes its next ones."""
    key = normal(rng, 3, 2, 9, 8) + 4
    cache = KVCache(3, 2, 30, 8, dtype=np.int8, center="mean")
    assert not cache.key_center.any()
    cache.append(key, key, [9, 0, 4])
    first = cache.key_center
    for b, n in ((0, 9), (2, 4)):
        np.testing.assert_allclose(first[b], key[b, :, :n].mean(1, keepdims=True), rtol=1e-6)
    assert not first[1].any()
    cache.append(2 * key, key, [3, 5, 0])
    assert bits(cache.key_center[::2]) == bits(first[::2]) and not first[1].any()
    np.testing.assert_allclose(cache.key_center[1], 2 * key[1, :, :5].mean(1, keepdims=True), rtol=1e-6)
    last = cache.key_center
    cache.append(3 * key, key)
    assert cache.key_center is last
    cache.reset()
    assert not cache.key_center.any() and last.all()
    cache.append(3 * key, key)
    np.testing.assert_allclose(cache.key_center, 3 * key.mean(2, keepdims=True), rtol=1e-6)


def test_the_mean_counts_tokens_that_find_no_room(rng):
    key = normal(rng, 2, 50, 4) + 1
    cache = KVCache((), 2, 8, 4, dtype=np.int8, window=4, center="mean")
    cache.append(key, key)
    whole = fastattn.quantize_kv(key, key, center="mean")
    assert bits(cache.key_center) == bits(whole.key_center) and bits(cache.key) == bits(whole.key[:, -8:])


BAD_8_BITS = {
    "nan": (ValueError, r"^key\[1, 0, 2, 1, 3\] is nan: only finite", np.nan, np.float32, {}),
    "inf, float16": (ValueError, r"^key\[1, 0, 2, 1, 3\] is inf", np.inf, np.float16, {}),
    "float64": (ValueError, r"^key\[1, 0, 2, 1, 3\] is 1e\+300: .* float32", 1e300, np.float64, {}),
    "int8": (TypeError, "^key has dtype int8", 3, np.int8, {}),
    "uint8": (TypeError, "^key has dtype uint8", 3, np.uint8, {}),
    "complex": (TypeError, "^key has dtype complex64", 1, np.complex64, {}),
    "object": (TypeError, "^key has dtype object", 1, object, {}),
}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("center", [None, "mean"])
@pytest.mark.parametrize("error, message, number, dtype, options", BAD_8_BITS.values(), ids=BAD_8_BITS)
def test_errors_change_nothing_in_8_bits(error, message, number, dtype, options, center, window):
    cache = KVCache((2, 2), 3, 4, 4, 5, dtype=np.int8, center=center, window=window)
    cache.append(KEY, VALUE, [[2, 1], [0, 2]])
    names = "key", "value", "key_scale", "value_scale", "key_center", "lengths", "dropped"
    before = [bits(getattr(cache, name)) for name in names]
    bad = np.ones((2, 2, 3, 2, 4)).astype(dtype)
    bad[1, 0, 2, 1, 3] = number
    for arguments in ((bad, VALUE), (bad, VALUE, [[0, 0], [2, 0]])):
        with pytest.raises(error, match=message):
            cache.append(*arguments)
        assert [bits(getattr(cache, name)) for name in names] == before
    with pytest.raises(error, match=message.replace("key", "value")):
        cache.append(KEY, np.concatenate([bad, bad[..., :1]], -1))
    assert [bits(getattr(cache, name)) for name in names] == before
    cache.append(KEY, VALUE)
    assert cache.lengths.ravel().tolist() == [4, 3, 2, 4]


def test_appending_a_cache_of_8_bits_to_itself(rng):
    """Its numbers, not its int8."""
    key = normal(rng, 1, 6, 8)
    cache = KVCache((), 1, 8, 8, window=4, dtype=np.int8)
    cache.append(key, key)
    with pytest.raises(TypeError, match="key has dtype int8"):
        cache.append(cache.key, cache.value)


def test_bad_arguments_in_8_bits():
    refuse(ValueError, "block is for dtype=numpy.int8; a cache of float32", 2, 1, 8, 32, block=32)
    refuse(ValueError, "center is for dtype=numpy.int8; a cache of float16", 2, 1, 8, 32, dtype="f2", center="mean")
    refuse(ValueError, "block=32 does not divide head_dim=48", 2, 1, 8, 48, dtype=np.int8, block=32)
    refuse(ValueError, "block=32 does not divide value_dim=16", 2, 1, 8, 32, 16, dtype=np.int8, block=32)
    refuse(TypeError, "block must be", 2, 1, 8, 32, dtype=np.int8, block=True)
    refuse(ValueError, "center must be 'mean'", 2, 1, 8, 32, dtype=np.int8, center="median")
    refuse(
        ValueError, r"center has shape \(31,\); it must be \(2, 1, 1, 32\)", 2, 1, 8, 32, dtype="i1", center=np.ones(31)
    )
    refuse(ValueError, r"center\[1\] is nan", 2, 1, 8, 2, dtype="i1", center=[1, np.nan])
    refuse(
        TypeError,
        "dtype must be float32, float64, float16, ml_dtypes.bfloat16 or int8, not uint8",
        2,
        1,
        8,
        1,
        dtype="u1",
    )
    refuse(MemoryError, "no memory for a cache", 2**40, 2**10, 2**20, 2**10, dtype=np.int8)
