"""dot_product_attention against the reference: every awkward size, and every argument alone."""

import functools

import numpy as np
import pytest
from problems import AWKWARD, DTYPES, HEAD_DIMS, qkv, sixteen_bits
from tolerances import assert_attention

import fastattn
from fastattn import reference

# ------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_keys", AWKWARD)
@pytest.mark.parametrize("num_queries", AWKWARD)
def test_sizes(rng, num_queries, num_keys, dtype):
    query, key, value = qkv(rng, (2,), num_queries, num_keys, 24, 20, dtype)
    assert_attention(query, key, value)
    assert_attention(query, key, value, is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(rng, head_dim, dtype):
    assert_attention(*qkv(rng, (2,), 18, 37, head_dim, dtype=dtype))
    assert_attention(*qkv(rng, (2,), 1, 37, head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_dim", HEAD_DIMS)
@pytest.mark.parametrize("head_dim", [1, 40, 64])
def test_value_dim_may_differ(rng, head_dim, value_dim, dtype):
    assert_attention(*qkv(rng, (), 21, 33, head_dim, value_dim, dtype))


@pytest.mark.parametrize("num_keys", [255, 256, 257, 511, 513, 1023, 1025, 2500])
@pytest.mark.parametrize("num_queries", [1, 2, 7, 193])
def test_many_keys(rng, num_queries, num_keys):
    assert_attention(*qkv(rng, (2,), num_queries, num_keys, 32))
    assert_attention(*qkv(rng, (1,), num_queries, num_keys, 9, 65), is_causal=True)


def test_no_keys_gives_zeros(rng):
    query, key, value = qkv(rng, (2, 3), 5, 0, 8, 6)
    out, lse = fastattn.dot_product_attention(query, key, value, return_lse=True)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_no_queries_gives_nothing(rng):
    out, weights = fastattn.dot_product_attention(*qkv(rng, (2, 3), 0, 5, 8, 6), return_weights=True)
    assert out.shape == (2, 3, 0, 6)
    assert weights.shape == (2, 3, 0, 5)


@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 3), (2, 0, 3)])
def test_empty_batch(rng, batch):
    assert fastattn.dot_product_attention(*qkv(rng, batch, 4, 5, 8, 6)).shape == (*batch, 4, 6)


# ------------------------------------------------------------------------------------- batch axes, dtypes


@pytest.mark.parametrize(
    ("query_batch", "key_batch", "value_batch"),
    [
        ((), (), ()),
        ((3,), (3,), (3,)),
        ((3,), (1,), (3,)),
        ((1,), (3,), (1,)),
        ((3,), (), ()),
        ((), (3,), (3,)),
        ((), (), (3,)),
        ((2, 3), (3,), (2, 1)),
        ((2, 1), (1, 3), (3,)),
        ((2, 3, 2), (1, 3, 1), (3, 2)),
        ((2, 1, 3, 2), (2, 2, 1, 2), (1, 2, 3, 1)),
        ((2, 1, 2, 1, 2), (1, 2, 1, 2, 1), (1, 1, 1, 1, 2)),
        ((2, 1, 2, 1, 2), (), (2,)),
    ],
)
@pytest.mark.parametrize("num_queries", [1, 18])
def test_batch_axes_broadcast(rng, query_batch, key_batch, value_batch, num_queries):
    query = rng.standard_normal((*query_batch, num_queries, 12)).astype(np.float32)
    key = rng.standard_normal((*key_batch, 20, 12)).astype(np.float32)
    value = rng.standard_normal((*value_batch, 20, 10)).astype(np.float32)
    assert_attention(query, key, value)


@pytest.mark.parametrize(
    "dtypes",
    [
        (np.float32, np.float64, np.float32),
        (np.float32, np.float32, np.float64),
        (np.float64, np.float32, np.float32),
        (np.int32, np.int32, np.int32),
        (np.int64, np.float32, np.float32),
        (np.float32, np.uint8, np.float32),
        (np.float32, np.float32, bool),
        (bool, bool, bool),
    ],
)
def test_dtypes_promote(rng, dtypes):
    query, key, value = (x * 2 for x in qkv(rng, (2,), 9, 20, 16))
    arrays = [x.astype(dtype) if dtype is not np.uint8 else abs(x).astype(dtype)
              for x, dtype in zip((query, key, value), dtypes, strict=True)]  # fmt: skip
    out = assert_attention(*arrays)
    assert out.dtype == np.float64


@pytest.mark.parametrize("dtype", sixteen_bits())
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (17, 65), (130, 70), (0, 5), (5, 0)])
def test_sixteen_bits(rng, shape, dtype):
    """Storage only: sums, lse and weights are float32."""
    arrays = qkv(rng, (2,), *shape, 48, 31, dtype)
    assert_attention(*arrays)
    assert_attention(*arrays, is_causal=True, window_size=(60, None), softcap=5.0)
    assert_attention(*arrays, bias=rng.standard_normal(shape).astype(np.float32), sinks=np.float32(0.5))
    assert_attention(*arrays, activation="sigmoid")
    wider = assert_attention(arrays[0], *(x.astype(np.float32) for x in arrays[1:]))
    assert wider.dtype == np.float32


def test_nested_lists():
    out = fastattn.dot_product_attention([[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[1], [2]])
    expected = reference.dot_product_attention([[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[1], [2]])
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, expected, rtol=1e-14)


@pytest.mark.parametrize("name", ["bias", "alibi_slopes", "sinks", "scale", "softcap"])
def test_only_query_key_value_decide_the_dtype(rng, name):
    query, key, value = qkv(rng, (3,), 9, 20)
    number = {"bias": np.ones((9, 20)), "alibi_slopes": np.ones(3), "sinks": np.zeros(3)}.get(name, np.float64(0.5))
    out, lse = fastattn.dot_product_attention(query, key, value, return_lse=True, **{name: number})
    assert out.dtype == lse.dtype == np.float32
    query = query.astype(np.float64)
    number = np.float32(number)
    assert_attention(query, key, value, **{name: number})


# --------------------------------------------------------------------------------- which keys are seen


@pytest.mark.parametrize("offset", [None, 0, 1, -1, 5, -5, 40, -40, np.int32(3), np.uint8(3)])
@pytest.mark.parametrize("shape", [(17, 17), (9, 40), (40, 9), (1, 30), (30, 1), (130, 70)])
def test_causal(rng, shape, offset):
    assert_attention(*qkv(rng, (2,), *shape), is_causal=True, query_offset=offset)


def test_causal_is_bottom_right(rng):
    """The last query sees all keys; and the check would notice PyTorch's top-left alignment."""
    query, key, value = qkv(rng, (), 3, 8)
    _, weights = fastattn.dot_product_attention(query, key, value, is_causal=True, return_weights=True)
    np.testing.assert_array_equal(weights != 0, np.tri(3, 8, 5, dtype=bool))
    _, weights = fastattn.dot_product_attention(query, key, value, is_causal=True, query_offset=0, return_weights=True)
    np.testing.assert_array_equal(weights != 0, np.tri(3, 8, dtype=bool))
    top_left = functools.partial(fastattn.dot_product_attention, query_offset=0)
    with pytest.raises(AssertionError, match="output"):
        assert_attention(query, key, value, is_causal=True, function=top_left)


@pytest.mark.parametrize(
    "window",
    [0, 1, 5, 100, -1, (0, 0), (3, 0), (0, 3), (4, 2), (None, 0), (0, None), (-1, 2), (2, -1), (None, None),
     (100, 100), [3, 1], np.int64(4), (np.int32(1), np.uint8(2))],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(33, 33), (9, 40), (40, 9), (1, 30), (200, 200)])
def test_windows(rng, shape, window):
    assert_attention(*qkv(rng, (2,), *shape), window_size=window)


@pytest.mark.parametrize("window", [3, (6, 2), (-1, 3), (70, 0)])
@pytest.mark.parametrize("offset", [0, -4, 11, 60, -60])
def test_windows_with_offsets(rng, window, offset):
    assert_attention(*qkv(rng, (2,), 90, 90), window_size=window, query_offset=offset)
    assert_attention(*qkv(rng, (2,), 90, 90), window_size=window, query_offset=offset, is_causal=True)


def test_window_is_inclusive(rng):
    """And one key more or less would be noticed."""
    for wrong in ((3, 1), (1, 1), (2, 2), (2, 0)):
        function = functools.partial(fastattn.dot_product_attention, window_size=wrong)
        with pytest.raises(AssertionError, match="output"):
            assert_attention(
                *qkv(rng, (), 9, 9),
                window_size=(2, 1),
                function=lambda *args, function=function, window_size, **kwargs: function(*args, **kwargs),
            )
    _, weights = fastattn.dot_product_attention(*qkv(rng, (), 9, 9), window_size=(2, 1), return_weights=True)
    distance = np.arange(9) - np.arange(9)[:, None]
    np.testing.assert_array_equal(weights != 0, (distance >= -2) & (distance <= 1))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.uint64])
@pytest.mark.parametrize("shape", [(3, 2), (3, 1), (1, 2), (1, 1)])
def test_lengths_per_batch(rng, shape, dtype):
    query, key, value = qkv(rng, (3, 2), 20, 40)
    key_lengths = rng.integers(0, 41, shape).astype(dtype)
    query_lengths = rng.integers(0, 21, shape).astype(dtype)
    for causal in (False, True):
        assert_attention(query, key, value, key_lengths=key_lengths, is_causal=causal)
        assert_attention(query, key, value, query_lengths=query_lengths, is_causal=causal)
        assert_attention(query, key, value, key_lengths=key_lengths, query_lengths=query_lengths, is_causal=causal)


@pytest.mark.parametrize("length", [0, 1, 16, 39, 40, np.int16(7)])
@pytest.mark.parametrize("num_queries", [1, 20])
def test_length_for_all(rng, length, num_queries):
    query, key, value = qkv(rng, (3, 2), num_queries, 40)
    for causal in (False, True):
        assert_attention(query, key, value, key_lengths=length, is_causal=causal)
        assert_attention(query, key, value, query_lengths=min(length, num_queries), is_causal=causal)


def test_lengths_of_two_dimensional_input(rng):
    query, key, value = qkv(rng, (), 20, 40)
    assert_attention(query, key, value, key_lengths=11, query_lengths=9, is_causal=True)
    assert_attention(query, key, value, key_lengths=np.array(11), query_offset=np.array(-2), is_causal=True)


@pytest.mark.parametrize("shape", [(3, 2), (3, 1), (1, 2), (1, 1)])
def test_offsets_per_batch(rng, shape):
    offsets = rng.integers(-25, 45, shape)
    arrays = qkv(rng, (3, 2), 20, 40)
    assert_attention(*arrays, query_offset=offsets, is_causal=True)
    assert_attention(*arrays, query_offset=offsets, window_size=(5, 3))


MATRIX_SHAPES = [(3, 2, 20, 70), (1, 2, 20, 70), (3, 1, 20, 70), (2, 20, 70), (20, 70), (20, 1), (1, 70),
                 (70,), (), (3, 1, 1, 70), (3, 2, 20, 1)]  # fmt: skip


@pytest.mark.parametrize("shape", MATRIX_SHAPES)
@pytest.mark.parametrize("density", [0, 0.03, 0.5, 1])
def test_masks(rng, shape, density):
    assert_attention(*qkv(rng, (3, 2), 20, 70), mask=np.asarray(rng.random(shape) < density))


def test_mask_true_means_attend(rng):
    mask = np.eye(6, dtype=bool)
    query, key, value = qkv(rng, (), 6, 6)
    np.testing.assert_allclose(fastattn.dot_product_attention(query, key, value, mask=mask), value, rtol=1e-6)


def test_mask_with_empty_blocks(rng):
    """Whole blocks and whole rows of a mask that are False."""
    mask = np.zeros((130, 700), dtype=bool)
    mask[:40, 600:640] = True
    mask[64:100, :5] = True
    mask[129, 699] = True
    assert_attention(*qkv(rng, (2,), 130, 700), mask=mask)


# ------------------------------------------------------------------------------ from scores to output


@pytest.mark.parametrize("shape", MATRIX_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias(rng, shape, dtype):
    bias = rng.standard_normal(shape).astype(dtype)
    assert_attention(*qkv(rng, (3, 2), 20, 70, dtype=dtype), bias=bias)


@pytest.mark.parametrize("shape", [(20, 70), (70,), (3, 2, 20, 70)])
def test_bias_of_minus_infinity_hides(rng, shape):
    bias = np.where(rng.random(shape) < 0.5, rng.standard_normal(shape), -np.inf).astype(np.float32)
    query, key, value = qkv(rng, (3, 2), 20, 70)
    for activation in ("softmax", "relu", "sigmoid"):
        assert_attention(query, key, value, bias=bias, activation=activation)


@pytest.mark.parametrize("slopes", [0.5, [0.5], [0.25, 0.0625], [[0.1], [0.2], [1.0]], [[1.0, -0.5]] * 3])
@pytest.mark.parametrize("shape", [(30, 30), (7, 70), (70, 7), (1, 50)])
def test_alibi(rng, shape, slopes):
    arrays = qkv(rng, (3, 2), *shape)
    slopes = np.asarray(slopes, dtype=np.float32)
    assert_attention(*arrays, alibi_slopes=slopes)
    assert_attention(*arrays, alibi_slopes=slopes, is_causal=True)
    assert_attention(*arrays, alibi_slopes=slopes, query_offset=3)
    assert_attention(*arrays, alibi_slopes=slopes, key_lengths=5)


@pytest.mark.parametrize("scale", [0, 1, -1, 0.125, 0.3, 10, np.float32(0.7), np.float64(0.7), np.int64(2)])
def test_scale(rng, scale):
    assert_attention(*qkv(rng, (2,), 20, 40), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.01, 0.5, 1, 15, 50.0, 1e4, np.float32(3)])
def test_softcap(rng, softcap, dtype):
    query, key, value = qkv(rng, (2,), 20, 40, dtype=dtype)
    assert_attention(query, key, value, softcap=softcap)
    assert_attention(query * 20, key, value, softcap=softcap)
    assert_attention(query * 1e-3, key, value, softcap=softcap)


def test_softcap_comes_before_bias_and_alibi(rng):
    bias = (10 * rng.standard_normal((20, 40))).astype(np.float32)
    assert_attention(*qkv(rng, (2,), 20, 40), softcap=2.0, bias=bias, alibi_slopes=np.float32([1, 2]))


@pytest.mark.parametrize("sinks", [0.0, [1.0], [-3.0, 2.0], [[0.0], [5.0], [-5.0]], -np.inf, 80.0, -80.0])
@pytest.mark.parametrize("shape", [(20, 70), (1, 70), (70, 20)])
def test_sinks(rng, sinks, shape):
    sinks = np.asarray(sinks, dtype=np.float32)
    arrays = qkv(rng, (3, 2), *shape)
    assert_attention(*arrays, sinks=sinks)
    assert_attention(*arrays, sinks=sinks, is_causal=True, query_offset=0)
    assert_attention(*arrays, sinks=sinks, key_lengths=0)


def test_sinks_are_not_scaled_or_capped(rng):
    assert_attention(*qkv(rng, (2,), 20, 40), sinks=np.float32([9, 4]), softcap=1.5, scale=0.01)


@pytest.mark.parametrize("activation", ["softmax", "relu", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (20, 70), (1, 300), (70, 20), (5, 0)])
def test_activations(rng, activation, dtype, shape):
    arrays = qkv(rng, (2,), *shape, dtype=dtype)
    assert_attention(*arrays, activation=activation)
    assert_attention(*arrays, activation=activation, is_causal=True, query_offset=0)
    assert_attention(*arrays, activation=activation, mask=rng.random(shape) < 0.5)
    assert_attention(*arrays, activation=activation, bias=rng.standard_normal(shape).astype(dtype), softcap=3.0)


def test_relu_divides_by_the_visible_keys(rng):
    query, key, value = np.ones((4, 1)), np.ones((4, 1)), np.arange(1.0, 5)[:, None]
    out = fastattn.dot_product_attention(query, key, value, is_causal=True, activation="relu")
    np.testing.assert_allclose(out[:, 0], [1, 1.5, 2, 2.5])


def test_sigmoid_of_large_scores(rng):
    query, key, value = qkv(rng, (2,), 20, 40)
    assert_attention(query * 100, key, value, activation="sigmoid")


# ----------------------------------------------------------------------------------- grouped heads


@pytest.mark.parametrize("num_queries", [1, 4, 33])
@pytest.mark.parametrize(
    ("query_batch", "kv_batch"),
    [((6,), (2,)), ((6,), (1,)), ((6,), (6,)), ((2, 6), (2, 3)), ((2, 8), (1, 2)), ((8,), (3, 2)),
     ((2, 1, 4), (3, 2))],
)  # fmt: skip
def test_grouped_heads(rng, query_batch, kv_batch, num_queries):
    arrays = qkv(rng, query_batch, num_queries, 40, kv_batch=kv_batch)
    assert_attention(*arrays, enable_gqa=True)
    assert_attention(*arrays, enable_gqa=True, is_causal=True)


@pytest.mark.parametrize("num_queries", [1, 5])
def test_grouped_heads_with_an_argument_for_each_query_head(rng, num_queries):
    arrays = qkv(rng, (2, 6), num_queries, 40, kv_batch=(2, 3))
    per_head = rng.standard_normal(6).astype(np.float32)
    matrix = rng.standard_normal((2, 6, num_queries, 40)).astype(np.float32)
    lengths = rng.integers(0, 41, (2, 6))
    for arguments in (
        {"alibi_slopes": per_head},
        {"sinks": per_head},
        {"bias": matrix},
        {"mask": matrix > 0},
        {"key_lengths": lengths},
        {"query_offset": lengths, "is_causal": True},
    ):
        assert_attention(*arrays, enable_gqa=True, **arguments)


# --------------------------------------------------------------------------------------- results


def test_results_come_in_order(rng):
    query, key, value = qkv(rng, (2, 3), 5, 7, 8, 6)
    shapes = {"out": (2, 3, 5, 6), "weights": (2, 3, 5, 7), "lse": (2, 3, 5)}
    call = functools.partial(fastattn.dot_product_attention, query, key, value)
    assert call().shape == shapes["out"]
    assert [x.shape for x in call(return_weights=True)] == [shapes["out"], shapes["weights"]]
    assert [x.shape for x in call(return_lse=True)] == [shapes["out"], shapes["lse"]]
    assert [x.shape for x in call(return_lse=True, return_weights=True)] == list(shapes.values())


def test_out_is_filled_and_returned(rng):
    query, key, value = qkv(rng, (2, 3), 5, 7, 8, 6)
    expected = fastattn.dot_product_attention(query, key, value)
    out = np.full((2, 3, 5, 6), np.nan, dtype=np.float32)
    assert fastattn.dot_product_attention(query, key, value, out=out) is out
    np.testing.assert_array_equal(out, expected)
    results = fastattn.dot_product_attention(query, key, value, out=out, return_lse=True)
    assert results[0] is out


def test_results_are_new_arrays(rng):
    """No result shares memory with an input, another result, or a later call."""
    query, key, value = qkv(rng, (2,), 5, 7)
    first = fastattn.dot_product_attention(query, key, value, return_weights=True, return_lse=True)
    copies = [x.copy() for x in first]
    second = fastattn.dot_product_attention(-query, key, value, return_weights=True, return_lse=True)
    for a, before, b in zip(first, copies, second, strict=True):
        np.testing.assert_array_equal(a, before)
        assert not np.shares_memory(a, b)
        assert a.flags.writeable


def test_inputs_are_left_alone(rng):
    arguments = {
        "bias": rng.standard_normal((40, 70)).astype(np.float32),
        "mask": rng.random((40, 70)) < 0.5,
        "alibi_slopes": np.float32([1, 2]),
        "sinks": np.float32([1, 2]),
        "key_lengths": np.array([60, 70]),
        "query_offset": np.array([3, 4]),
    }
    query, key, value = qkv(rng, (2,), 40, 70)
    inputs = [query, key, value, *arguments.values()]
    before = [x.copy() for x in inputs]
    fastattn.dot_product_attention(query, key, value, is_causal=True, **arguments)
    for x, y in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_weights_sum_to_one(rng):
    _, weights = fastattn.dot_product_attention(*qkv(rng, (2,), 40, 300), return_weights=True)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_the_check_can_fail(rng):
    """An output a few bounds away, one wrong lse and one wrong weight are all detected."""

    def spoiled(index, error):
        def attention(*args, **kwargs):
            results = reference.dot_product_attention(*args, **kwargs)
            several = isinstance(results, tuple)
            results = [np.asarray(x, dtype=np.float32) for x in (results if several else (results,))]
            if len(results) > index:
                results[index][..., -1] += error
            return tuple(results) if several else results[0]

        return attention

    arrays = qkv(rng, (2,), 17, 33)
    assert_attention(*arrays, function=spoiled(0, 0))
    for index, error, what in [(0, 2e-5, "output"), (1, 2e-5, "weights"), (2, 2e-5, "lse")]:
        with pytest.raises(AssertionError, match=what):
            assert_attention(*arrays, function=spoiled(index, error))
