"""Bad arguments: the kind of error, a message that names the argument, and an `out` that stays untouched."""

import functools
import inspect
import re

import numpy as np
import pytest
from problems import qkv

import fastattn
from fastattn import _call, reference

ERRORS = (ValueError, TypeError)
SENTINEL = 12345.0


def arrays():
    """Batch axes (2, 3), L=5, S=7, D=8, E=6."""
    return qkv(np.random.default_rng(0), (2, 3), 5, 7, 8, 6)


def refuse(error, message, *changes, function="dot_product_attention", **arguments):
    """Call with the good arrays, some replaced, and `arguments`; demand the error, and nothing written."""
    inputs = dict(zip(("query", "key", "value"), arrays(), strict=True))
    for name, value in changes:
        inputs[name] = value
    call = functools.partial(getattr(fastattn, function), *inputs.values(), **arguments)
    with pytest.raises(error, match=message):
        call()
    if "out" not in arguments:
        out = np.full((2, 3, 5, 6), SENTINEL, dtype=np.float32)
        with pytest.raises(error, match=message):
            call(out=out)
        assert (out == SENTINEL).all()


def test_the_good_call_is_good():
    out = np.full((2, 3, 5, 6), SENTINEL, dtype=np.float32)
    fastattn.dot_product_attention(*arrays(), out=out)
    assert (out != SENTINEL).all()


# ----------------------------------------------------------------------------------- arrays and shapes


def foreign(array):
    """The array as every dtype and class that is refused."""
    return {
        "complex64": array.astype(np.complex64),
        "complex128": array.astype(np.complex128),
        "longdouble": array.astype(np.longdouble),
        "object": array.astype(object),
        "string": array.astype("U8"),
        "bytes": array.astype("S8"),
        "datetime": np.zeros(array.shape, dtype="datetime64[s]"),
        "timedelta": np.zeros(array.shape, dtype="timedelta64[s]"),
        "structured": np.zeros(array.shape, dtype=[("a", np.float32)]),
        "big-endian float32": array.astype(">f4"),
        "big-endian float64": array.astype(">f8"),
        "masked": np.ma.masked_array(array, mask=array > 0),
        "masked, nothing hidden": np.ma.masked_array(array),
    }


FOREIGN = tuple(foreign(np.zeros(1)))


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_dtypes(index, kind):
    name = ("query", "key", "value")[index]
    if kind == "longdouble" and np.longdouble == np.float64:
        pytest.skip("longdouble is float64 here")
    refuse(ERRORS, name, (name, foreign(arrays()[index])[kind]))


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [None, "text", object(), {}, [[1.0], [1.0, 2.0]], 1.0, [1.0, 2.0]])
def test_things_that_are_no_matrices(name, bad):
    refuse(ERRORS, name, (name, bad))


def test_float16_with_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    query, key, value = arrays()
    changes = [
        ("query", query.astype(np.float16)),
        ("key", key.astype(ml_dtypes.bfloat16)),
        ("value", value.astype(np.float16)),
    ]
    refuse(ERRORS, "query|key|value", *changes)


def test_shapes():
    query, key, value = arrays()
    refuse(ValueError, "(?s)query.*key|key.*query", ("key", key[..., :7]))
    refuse(ValueError, "(?s)query.*key|key.*query", ("query", query[..., :1]))
    refuse(ValueError, "(?s)key.*value|value.*key", ("value", value[..., :6, :]))
    refuse(ValueError, "(?s)key.*value|value.*key", ("key", key[..., :1, :]))
    refuse(ValueError, "query|key|value", ("query", query[:, :2]))
    refuse(ValueError, "query|key|value", ("value", np.concatenate([value, value])))


def test_the_message_shows_what_came():
    """Shapes, dtypes and numbers stand in the message."""
    query, key, _ = arrays()
    refuse(ValueError, r"(?s)\b8\b.*\b4\b|\b4\b.*\b8\b", ("query", query[0, 0, :, :4]))
    refuse(ValueError, r"(?s)\b8\b.*\b7\b|\b7\b.*\b8\b", ("key", key[..., :7]))
    refuse(ValueError, re.escape("(5, 6)"), mask=np.ones((5, 6), dtype=bool))
    refuse(TypeError, "int64", mask=np.ones((5, 7), dtype=np.int64))
    refuse(ERRORS, "complex64", ("query", query.astype(np.complex64)))
    refuse(ValueError, "-17", window_size=(-17, 0))
    refuse(ValueError, "gelu", activation="gelu")
    refuse(ValueError, "9", key_lengths=9)


def test_unequal_heads_name_enable_gqa():
    query, key, value = qkv(np.random.default_rng(0), (2, 6), 5, 7, kv_batch=(2, 3))
    with pytest.raises(ValueError, match="enable_gqa"):
        fastattn.dot_product_attention(query, key, value)


@pytest.mark.parametrize(
    ("query_heads", "key_heads", "value_heads"),
    [(5, 2, 2), (4, 3, 3), (2, 4, 4), (4, 2, 4), (4, 2, 1), (4, 0, 0)],
)
def test_group_sizes(query_heads, key_heads, value_heads):
    query, key, value = (np.ones((2, heads, 5, 8), dtype=np.float32) for heads in (query_heads, key_heads, value_heads))
    with pytest.raises(ValueError, match=r"enable_gqa|heads|key|value"):
        fastattn.dot_product_attention(query, key, value, enable_gqa=True)


# ------------------------------------------------------------------------------- which keys are seen


@pytest.mark.parametrize(
    "window",
    [-2, (-2, 0), (0, -2), 1.5, (1.5, 0), "3", (1, 2, 3), (1,), (), object(), float("nan"),
     np.array([[1, 2]]), (None, "a"), 1j],
)  # fmt: skip
def test_window_size(window):
    refuse(ERRORS, "window_size", window_size=window)


@pytest.mark.parametrize("offset", [0.5, "1", object(), np.zeros((2, 3)), [["a"] * 3] * 2, 1j])
def test_query_offset(offset):
    refuse(ERRORS, "query_offset", query_offset=offset)


@pytest.mark.parametrize("name", ["key_lengths", "query_lengths"])
@pytest.mark.parametrize("bad", [-1, 8, 2**31, 2**63, 10**30, 1.0, 2.5, "3", object(), [[1, 1, 1], [1, 1, 9]],
                                 [[-1, 1, 1], [1, 1, 1]], np.ones((2, 3)), [["a"] * 3] * 2])  # fmt: skip
def test_lengths(name, bad):
    refuse(ERRORS, name, **{name: bad})


@pytest.mark.parametrize("name", ["key_lengths", "query_lengths", "query_offset"])
@pytest.mark.parametrize("shape", [(3,), (1,), (1, 2, 3), (2, 3, 1), (2, 2), (3, 2), (2, 3, 1, 1), (4, 3)])
def test_shapes_of_lengths(name, shape):
    refuse(ValueError, name, **{name: np.ones(shape, dtype=np.int64)})


@pytest.mark.parametrize("name", ["key_lengths", "query_lengths"])
def test_lengths_without_the_head_axis(name):
    """(B,) with batch axes (B, H) would align with the heads: the message shows what to write."""
    refuse(ValueError, re.escape("lengths[:, None]"), **{name: np.array([4, 5])})
    query, key, value = (np.ones((3, 3, 5, 8), dtype=np.float32) for _ in range(3))
    with pytest.raises(ValueError, match=re.escape("lengths[:, None]")):
        fastattn.dot_product_attention(query, key, value, **{name: np.array([4, 5, 3])})


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, np.int8, object, "U4"])
def test_mask_must_be_boolean(dtype):
    refuse(TypeError, "(?s)mask.*bool", mask=np.ones((5, 7), dtype=dtype))


@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize("shape", [(5, 6), (6, 7), (2, 5, 7), (1, 2, 3, 5, 7), (4, 3, 5, 7), (2, 3, 7, 5)])
def test_shapes_of_mask_and_bias(name, shape):
    refuse(ValueError, name, **{name: np.ones(shape, dtype=bool if name == "mask" else np.float32)})


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.uint32])
def test_bias_must_be_float(dtype):
    refuse(TypeError, "bias", bias=np.ones((5, 7), dtype=dtype))


# ------------------------------------------------------------------------------- from scores to output


@pytest.mark.parametrize("name", ["bias", "alibi_slopes", "sinks"])
@pytest.mark.parametrize("kind", [k for k in FOREIGN if "endian" not in k and k != "longdouble"])
def test_dtypes_of_other_arrays(name, kind):
    number = np.ones((5, 7) if name == "bias" else 3, dtype=np.float32)
    refuse(ERRORS, name, **{name: foreign(number)[kind]})


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
@pytest.mark.parametrize("shape", [(2,), (4,), (3, 3), (1, 2, 3), (2, 3, 1), (3, 2)])
def test_shapes_of_slopes_and_sinks(name, shape):
    refuse(ValueError, name, **{name: np.ones(shape, dtype=np.float32)})


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, "1", 1j, object(), [1.0, 2.0], np.ones((5, 7))])
def test_scale(scale):
    refuse(ERRORS, "scale", scale=scale)


@pytest.mark.parametrize("softcap", [0, 0.0, -1.0, np.nan, "1", 1j, object(), [1.0, 2.0]])
def test_softcap(softcap):
    refuse(ERRORS, "softcap", softcap=softcap)


@pytest.mark.parametrize("activation", ["", "Softmax", "gelu", "softmax ", None, 1, b"softmax", ["softmax"]])
def test_activation(activation):
    refuse(ERRORS, "activation", activation=activation)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_only_softmax_has_lse_and_sinks(activation):
    refuse(ValueError, "return_lse", activation=activation, return_lse=True)
    refuse(ValueError, "sinks", activation=activation, sinks=np.float32(0))


@pytest.mark.parametrize("function", ["dot_product_attention", "varlen_attention"])
def test_unknown_keywords(function):
    with pytest.raises(TypeError, match="causal_mask"):
        getattr(fastattn, function)(*arrays(), causal_mask=True)


def test_options_are_keywords_only():
    with pytest.raises(TypeError):
        fastattn.dot_product_attention(*arrays(), True)
    with pytest.raises(TypeError):
        fastattn.softmax(np.ones(3), -1, None)


# ------------------------------------------------------------------------------------------ out=


WRONG_OUTS = {
    "shape": np.zeros((2, 3, 5, 7), dtype=np.float32),
    "an axis missing": np.zeros((2, 3, 5), dtype=np.float32),
    "an axis too many": np.zeros((1, 2, 3, 5, 6), dtype=np.float32),
    "float64": np.zeros((2, 3, 5, 6), dtype=np.float64),
    "int32": np.zeros((2, 3, 5, 6), dtype=np.int32),
    "big-endian": np.zeros((2, 3, 5, 6), dtype=">f4"),
    "masked": np.ma.zeros((2, 3, 5, 6), dtype=np.float32),
    "list": np.zeros((2, 3, 5, 6), dtype=np.float32).tolist(),
    "string": "out",
    "broadcast": np.broadcast_to(np.zeros((5, 6), dtype=np.float32), (2, 3, 5, 6)),
}


@pytest.mark.parametrize("kind", WRONG_OUTS)
def test_out_of_the_wrong_kind(kind):
    refuse(ERRORS, "out", out=WRONG_OUTS[kind])


def test_out_read_only():
    out = np.full((2, 3, 5, 6), SENTINEL, dtype=np.float32)
    out.flags.writeable = False
    refuse(ERRORS, "out", out=out)
    assert (out == SENTINEL).all()


@pytest.mark.parametrize("name", ["query", "key", "value", "bias"])
def test_out_overlaps_an_input(name):
    query, key, value = (np.ones((2, 3, 8, 8), dtype=np.float32) for _ in range(3))
    inputs = {"query": query, "key": key, "value": value, "bias": np.ones((2, 3, 8, 8), dtype=np.float32)}
    shared = inputs[name]
    before = shared.copy()
    for out in (shared, shared[::-1], shared.swapaxes(-1, -2)):
        with pytest.raises(ValueError, match="out"):
            fastattn.dot_product_attention(**inputs, out=out)
    np.testing.assert_array_equal(shared, before)
    # One row is enough.
    buffer = np.ones((2 * 3 * 8 * 8 + 8,), dtype=np.float32)
    inputs[name] = buffer[8:].reshape(2, 3, 8, 8)
    with pytest.raises(ValueError, match="out"):
        fastattn.dot_product_attention(**inputs, out=buffer[:-8].reshape(2, 3, 8, 8))
    assert (buffer == 1).all()


def test_out_overlaps_a_mask():
    buffer = np.ones((5, 8), dtype=np.float32)
    mask = buffer.view(bool)[:, :5]
    with pytest.raises(ValueError, match="out"):
        fastattn.dot_product_attention(*(np.ones((5, 8), dtype=np.float32) for _ in range(3)), mask=mask, out=buffer)


def test_out_overlaps_itself():
    base = np.full(200, SENTINEL, dtype=np.float32)
    for strides in ((0, 4), (4, 4), (4, 0), (8, 4)):
        out = np.lib.stride_tricks.as_strided(base, (5, 8), strides)
        with pytest.raises(ValueError, match="out"):
            fastattn.dot_product_attention(*(np.ones((5, 8), dtype=np.float32) for _ in range(3)), out=out)
    assert (base == SENTINEL).all()


# ------------------------------------------------------------------------------------ threads, numbers


@pytest.mark.parametrize("num_threads", [0, -1, -(2**40), 1.5, "2", object()])
def test_num_threads(num_threads):
    refuse(ERRORS, "num_threads", num_threads=num_threads)
    x = np.ones((3, 4), dtype=np.float32)
    for name in ("softmax", "log_softmax", "logsumexp"):
        with pytest.raises(ERRORS, match="num_threads"):
            getattr(fastattn, name)(x, num_threads=num_threads)


@pytest.mark.parametrize("num_threads", [0, -1])
def test_num_threads_below_one_is_a_value_error(num_threads):
    refuse(ValueError, "num_threads", num_threads=num_threads)


def test_many_threads_are_no_harm():
    """More threads than anyone has are an upper limit as any other, also of a call that uses threads."""
    large = [x.repeat(80, axis=-2) for x in arrays()]
    for inputs in (arrays(), large):
        expected = fastattn.dot_product_attention(*inputs, num_threads=1)
        for num_threads in (1000, 2**31 - 1, 2**31, 2**63, 10**30):
            result = fastattn.dot_product_attention(*inputs, num_threads=num_threads)
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**30])
@pytest.mark.parametrize("causal", [False, True])
def test_huge_numbers(size, causal):
    """Windows and offsets that overflow an integer: what they say (all or nothing), or a refusal."""
    query, key, value = arrays()
    for arguments in (
        {"window_size": size},
        {"window_size": (size, size)},
        {"window_size": (size, 0)},
        {"window_size": (0, size)},
        {"query_offset": size},
        {"query_offset": -size},
        {"query_offset": size, "window_size": (3, 3)},
        {"query_offset": -size, "window_size": (3, 3)},
        {"query_offset": size, "window_size": (0, size)},
        {"query_offset": -size, "window_size": (size // 2, 0)},
    ):
        expected = reference.dot_product_attention(query, key, value, is_causal=causal, **arguments)
        try:
            result = fastattn.dot_product_attention(query, key, value, is_causal=causal, **arguments)
        except ERRORS as error:
            assert re.search("window_size|query_offset", str(error))
            assert size >= 2**63  # what fits an int64 has an answer
        else:
            np.testing.assert_allclose(result, expected, atol=1e-5)


def test_sizes_that_fit_no_memory():
    """An output of 2**60 bytes: MemoryError, and no crash."""
    query = np.broadcast_to(np.float32(1), (2**40, 4))
    key = np.ones((3, 4), dtype=np.float32)
    value = np.broadcast_to(np.float32(1), (3, 2**18))
    with pytest.raises(MemoryError):
        fastattn.dot_product_attention(query, key, value)
    query = np.broadcast_to(np.float32(1), (2**29, 4))
    with pytest.raises(MemoryError):
        fastattn.dot_product_attention(query, query, query[:, :0], return_weights=True)


# ------------------------------------------------------------------------------------ softmax family

FUNCTIONS = ("softmax", "log_softmax", "logsumexp")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_softmax_dtypes(name, kind):
    if kind == "longdouble" and np.longdouble == np.float64:
        pytest.skip("longdouble is float64 here")
    with pytest.raises(ERRORS, match=r"\bx\b"):
        getattr(fastattn, name)(foreign(np.ones((3, 4), dtype=np.float32))[kind])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("axis", [2, -3, (0, 2), (0, 0), (0, -2), 0.5, "0", 10**30])
def test_softmax_axis(name, axis):
    x = np.ones((3, 4), dtype=np.float32)
    with pytest.raises(ERRORS, match="axis"):
        getattr(fastattn, name)(x, axis)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_softmax_mask_and_out(name):
    function = getattr(fastattn, name)
    x = np.ones((3, 4), dtype=np.float32)
    shape = function(x).shape
    with pytest.raises(TypeError, match=r"(?s)mask.*bool"):
        function(x, mask=np.ones((3, 4)))
    for mask_shape in ((3,), (3, 5), (2, 3, 4)):
        with pytest.raises(ValueError, match="mask"):
            function(x, mask=np.ones(mask_shape, dtype=bool))
    read_only = np.zeros(shape, dtype=np.float32)
    read_only.flags.writeable = False
    for out in (
        np.zeros((*shape, 1), dtype=np.float32),
        np.zeros(shape, dtype=np.float64),
        np.zeros(shape, dtype=np.int64),
        read_only,
        np.broadcast_to(np.float32(0), shape),
        [0.0] * 3,
    ):
        with pytest.raises(ERRORS, match="out"):
            function(x, out=out)


def test_softmax_out_overlaps():
    buffer = np.zeros(40, dtype=np.float32)
    x = buffer[:30].reshape(3, 10)
    for out in (buffer[1:31].reshape(3, 10), x[::-1], buffer[10:].reshape(3, 10)):
        with pytest.raises(ValueError, match="out"):
            fastattn.softmax(x, out=out)
    with pytest.raises(ValueError, match="out"):
        fastattn.softmax(x, mask=buffer.view(bool)[:30].reshape(3, 10), out=x)
    assert (buffer == 0).all()


# ------------------------------------------------------------------------------- varlen and merge


def refuse_varlen(message, cu_seqlens_q, cu_seqlens_k=None, error=ERRORS, **arguments):
    query, key, value = qkv(np.random.default_rng(0), (3,), 5, 7, 8, 6)
    with pytest.raises(error, match=message):
        fastattn.varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, **arguments)
    out = np.full((3, 5, 6), SENTINEL, dtype=np.float32)
    with pytest.raises(error, match=message):
        fastattn.varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, out=out, **arguments)
    assert (out == SENTINEL).all()


BAD_CU_SEQLENS = ["text", 5, 5.0, [], [[0, 5]], [0.0, 5.0], [1, 5], [0, 4], [0, 6], [0, 3, 2, 5], [0, -1, 5],
                  [-1, 5], [0, 2**40, 5], [True, False], None, [0, 10**30]]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_CU_SEQLENS)
def test_cu_seqlens(bad):
    refuse_varlen("cu_seqlens_q", bad, [0, 7])
    if bad is not None:
        bad = [n + 2 if n in (4, 5, 6) else n for n in bad] if isinstance(bad, list) and bad != [[0, 5]] else bad
        refuse_varlen("cu_seqlens_k", [0, 5], bad)


def test_cu_seqlens_that_do_not_match():
    refuse_varlen("cu_seqlens_k", [0, 2, 5], [0, 7])
    refuse_varlen("cu_seqlens_k", [0, 5], [0, 2, 7])
    refuse_varlen("cu_seqlens", [0, 5])  # the keys end at 7


def test_varlen_arguments():
    refuse_varlen("window_size", [0, 5], [0, 7], window_size=-2)
    refuse_varlen("num_threads", [0, 5], [0, 7], num_threads=0)
    refuse_varlen("softcap", [0, 5], [0, 7], softcap=-1)
    refuse_varlen("sinks", [0, 5], [0, 7], sinks=np.ones(2))
    refuse_varlen("return_lse", [0, 5], [0, 7], activation="relu", return_lse=True)
    query, key, value = qkv(np.random.default_rng(0), (6,), 5, 5, 8, 6, kv_batch=(3,))
    with pytest.raises(ValueError, match="enable_gqa"):
        fastattn.varlen_attention(query, key, value, [0, 5])


def test_merge_arguments():
    out, lse = np.ones((3, 5, 6), dtype=np.float32), np.ones((3, 5), dtype=np.float32)
    for outs, lses, name in [
        ([], [], "outs"),
        ([out], [lse, lse], "outs|lses"),
        ([out, out[:, :4]], [lse, lse], "outs|lses"),
        ([out, out], [lse, lse[:, :4]], "lses"),
        ([out, out], [lse, out], "lses"),
        ([out, out.astype(complex)], [lse, lse], "outs"),
        ([out, out], [lse, lse.astype(complex)], "lses"),
        ([out, np.ma.masked_array(out)], [lse, lse], "outs"),
        (5, [lse], "outs"),
        ([out], 5, "lses"),
    ]:
        with pytest.raises(ERRORS, match=name):
            fastattn.merge_attention(outs, lses)


# ------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("number", [0, -1, 1.5, "2", object()])
def test_set_num_threads(number):
    before = fastattn.get_num_threads()
    with pytest.raises(ERRORS, match="num_threads"):
        fastattn.set_num_threads(number)
    assert fastattn.get_num_threads() == before


def test_errors_leave_the_library_working():
    """After all these errors the next call is right."""
    query, key, value = arrays()
    for _ in range(20):
        with pytest.raises(ValueError, match="window_size"):
            fastattn.dot_product_attention(query, key, value, window_size=-7)
    expected = reference.dot_product_attention(query, key, value)
    np.testing.assert_allclose(fastattn.dot_product_attention(query, key, value), expected, atol=1e-5)


def test_arrays_where_integers_are_wanted():
    x = np.ones((2, 2))
    for function in (lambda n: fastattn.softmax(x, num_threads=n), fastattn.set_num_threads):
        with pytest.raises(TypeError, match="num_threads"):
            function(np.array([2, 3]))
    with pytest.raises((TypeError, ValueError), match="sinks"):
        fastattn.dot_product_attention(x, x, x, sinks=np.array(1, ">i4"))


def test_out_must_not_overlap_an_input_that_is_converted():
    x = np.arange(16).reshape(4, 4)
    with pytest.raises(ValueError, match="out overlaps query"):
        fastattn.dot_product_attention(x, x, x, out=x.view(np.float64))


# ------------------------------------------------------------------------- 0-d arrays as numbers

X = np.random.default_rng(5).standard_normal((2, 3, 6, 4)).astype(np.float32)
ATTENTION_INTEGERS = {"window_size": 2, "query_offset": 1, "key_lengths": 4, "query_lengths": 5, "num_threads": 2}


def layer(num_heads=2, **arguments):
    return fastattn.MultiHeadAttention(*3 * [np.eye(4)], num_heads=num_heads, **arguments)


def cached(batch_shape=2, num_kv_heads=3, capacity=9, head_dim=4, value_dim=4, window=5, lengths=3):
    cache = fastattn.KVCache(batch_shape, num_kv_heads, capacity, head_dim, value_dim, window=window)
    cache.append(X, X, lengths)
    return cache.key, cache.lengths


def streamed(left=2, right=1, **arguments):
    stream = fastattn.StreamingAttention(left, right, **arguments)
    return stream.push(X, X, X)


def from_llama(layer, num_heads):
    state = {f"model.layers.1.self_attn.{name}_proj.weight": np.eye(4) for name in "qkvo"}
    return fastattn.MultiHeadAttention.from_llama(state, layer, num_heads=num_heads)(X)


# Everything that takes an integer: (function, the argument's name, an integer).
INTEGERS = [
    *((lambda **k: fastattn.dot_product_attention(X, X, X, **k), name, n) for name, n in ATTENTION_INTEGERS.items()),
    (lambda n: fastattn.dot_product_attention(X, X, X, window_size=(n, 1)), "n", 2),
    (lambda **k: fastattn.dot_product_attention(X, X, X, **k), "chunk_size", 2),
    (lambda n: fastattn.dot_product_attention(X, X, X, chunk_size=2, left_chunks=n), "n", 1),
    (lambda **k: fastattn.truncated_attention(X, X, X, **k), "left", 2),
    (lambda **k: fastattn.truncated_attention(X, X, X, 1, **k), "right", 2),
    (lambda n: fastattn.softmax(X, n), "n", 1),
    (lambda n: fastattn.logsumexp(X, (n, 2)), "n", 1),
    (lambda **k: fastattn.softmax(X, **k), "num_threads", 2),
    (lambda **k: fastattn.apply_rotary(X, **k), "offset", 2),
    (lambda **k: fastattn.apply_rotary(X, **k), "rotary_dim", 2),
    (lambda **k: fastattn.apply_rotary(X, **k), "num_threads", 2),
    (lambda **k: fastattn.sinusoidal_encoding(dim=4, **k), "length", 2),
    (lambda **k: fastattn.sinusoidal_encoding(3, **k), "dim", 2),
    (lambda **k: fastattn.sinusoidal_encoding(3, 4, **k), "offset", 2),
    (fastattn.alibi_slopes, "num_heads", 3),
    (lambda **k: fastattn.relative_position_buckets(key_length=3, **k), "query_length", 2),
    (lambda **k: fastattn.relative_position_buckets(3, **k), "key_length", 2),
    (lambda **k: fastattn.relative_position_buckets(3, 9, **k), "num_buckets", 8),
    (lambda **k: fastattn.relative_position_buckets(3, 9, **k), "max_distance", 50),
    (lambda **k: fastattn.relative_position_buckets(3, 9, **k), "query_offset", 2),
    *((cached, name, n) for name, n in (("batch_shape", 2), ("num_kv_heads", 3), ("capacity", 8), ("head_dim", 4),
                                        ("value_dim", 4), ("window", 2), ("lengths", 2))),
    *((streamed, name, n) for name, n in (("left", 1), ("right", 2), ("chunk_size", 3), ("num_threads", 2))),
    (lambda n: streamed(chunk_size=2, left_chunks=n), "n", 1),
    (lambda n: layer(n)(X), "n", 2),
    (lambda **k: layer(**k)(X), "num_kv_heads", 2),
    (lambda **k: layer(rotary_base=10.0, **k)(X), "rotary_dim", 2),
    (lambda **k: layer()(X, **k), "key_lengths", 2),
    (lambda **k: layer()(X, **k), "query_lengths", 2),
    (lambda **k: layer()(X, **k), "query_offset", 2),
    (lambda n: from_llama(n, 2), "n", 1),
    (lambda n: from_llama(1, n), "n", 2),
]  # fmt: skip
INTEGER_NAMES = [f"{i} {name}" for i, (_, name, _) in enumerate(INTEGERS)]

REALS = [
    (lambda **k: fastattn.dot_product_attention(X, X, X, **k), "scale", 0.5),
    (lambda **k: fastattn.dot_product_attention(X, X, X, **k), "softcap", 0.5),
    (lambda **k: streamed(**k), "scale", 0.5),
    (lambda **k: streamed(**k), "softcap", 0.5),
    (lambda **k: fastattn.apply_rotary(X, **k), "base", 100.0),
    (lambda **k: fastattn.sinusoidal_encoding(3, 4, **k), "base", 100.0),
    (lambda **k: layer(**k)(X), "rotary_base", 100.0),
]
REAL_NAMES = [f"{i} {name}" for i, (_, name, _) in enumerate(REALS)]


def same(a, b):
    for x, y in zip(*(x if isinstance(x, tuple) else (x,) for x in (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", ["int64", "uint8", ">i4"])
@pytest.mark.parametrize(("function", "name", "number"), INTEGERS, ids=INTEGER_NAMES)
def test_integer_arrays_without_axes_are_integers(function, name, number, dtype):
    same(function(**{name: np.array(number, dtype)}), function(**{name: number}))


@pytest.mark.parametrize("bad", [True, np.array(True), np.bool_(True), np.array(2.0), 2.0, np.ma.masked_array(2), "2"],
                         ids=repr)  # fmt: skip
@pytest.mark.parametrize(("function", "name", "number"), INTEGERS, ids=INTEGER_NAMES)
def test_what_is_no_integer_is_refused(function, name, number, bad):
    with pytest.raises(TypeError, match=name if name != "n" else "integer"):
        function(**{name: bad})


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "longdouble", "int64", "bfloat16"])
@pytest.mark.parametrize(("function", "name", "number"), REALS, ids=REAL_NAMES)
def test_real_arrays_without_axes_are_numbers(function, name, number, dtype):
    if dtype == "int64":
        number = 2
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    same(function(**{name: np.array(number, dtype)}), function(**{name: number}))
    same(function(**{name: np.array(number, dtype)[()]}), function(**{name: number}))


@pytest.mark.parametrize("bad", [True, np.array(True), np.array(1j), np.ma.masked_array(2.0), np.array([2.0]), "2"],
                         ids=repr)  # fmt: skip
@pytest.mark.parametrize(("function", "name", "number"), REALS, ids=REAL_NAMES)
def test_what_is_no_real_number_is_refused(function, name, number, bad):
    with pytest.raises(TypeError, match=name):
        function(**{name: bad})


def test_numbers_of_a_stream_are_its_own():
    """An array that changes between two pushes changes nothing."""
    numbers = {"scale": np.array(0.5), "softcap": np.array(2.0), "num_threads": np.array(2), "chunk_size": np.array(2)}
    stream, expected = fastattn.StreamingAttention(3, 0, **numbers), streamed(3, 0, scale=0.5, softcap=2, chunk_size=2)
    for number in numbers.values():
        number[...] = 7
    same(stream.push(X, X, X), expected)


@pytest.mark.parametrize("name", ["is_causal", "enable_gqa", "return_weights", "return_lse"])
@pytest.mark.parametrize("number", [0, 1, np.int64(1), np.array(1)], ids=repr)
def test_integers_are_no_flags(name, number):
    refuse(TypeError, name, **{name: number})


# --------------------------------------------------------------------------- messages that show the way


@pytest.mark.parametrize("name", ["dot_product_attention", "additive_attention", "bilinear_attention",
                                  "truncated_attention", "varlen_attention", "merge_attention", "softmax",
                                  "self_attention", "apply_rotary"])  # fmt: skip
def test_missing_arguments_are_named(name):
    function = getattr(fastattn, name)
    parameters = inspect.signature(function).parameters
    required = [p.name for p in parameters.values() if p.default is p.empty]
    assert required[0] in ("query", "x", "outs")
    for count in range(len(required)):
        missing = ".*".join(f"'{n}'" for n in required[count:])
        with pytest.raises(TypeError, match=rf"^{name}\(\) missing {len(required) - count} required .*{missing}$"):
            function(*[np.ones((2, 2))] * count)
        given = {n: np.ones((2, 2)) for n in required if n != required[count]}
        with pytest.raises(TypeError, match=rf"^{name}\(\) missing 1 required .*'{required[count]}'$"):
            function(**given)
    with pytest.raises(TypeError, match="unheard_of"):
        function(*[np.ones((2, 2))] * len(required), unheard_of=1)


def test_left_of_truncated_attention_is_named():
    with pytest.raises(TypeError, match="left"):
        fastattn.truncated_attention(X, X, X)
    parameter = inspect.signature(fastattn.truncated_attention).parameters
    assert parameter["left"].default is inspect.Parameter.empty
    assert parameter["right"].default == 0


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.float32, bool])
def test_a_mask_of_tokens_and_padding_shows_how_to_pass_it(dtype):
    """(B, S) of 0 and 1, as Hugging Face's tokenizers give it: what the message says is then right."""
    x = np.ones((2, 3, 6, 4), np.float32) * np.arange(6, dtype=np.float32)[:, None]
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]], dtype)
    with pytest.raises(ERRORS, match=re.escape("mask[:, None, None, :].astype(bool)")) as caught:
        fastattn.dot_product_attention(x, x, x, mask=mask)
    assert "key_lengths=mask.sum(-1)" in str(caught.value)
    assert "[:, None]" in str(caught.value)
    same(
        fastattn.dot_product_attention(x, x, x, mask=mask[:, None, None, :].astype(bool)),
        fastattn.dot_product_attention(x, x, x, key_lengths=mask.astype(int).sum(-1)[:, None]),
    )
    tokens = x[:, 0]
    with pytest.raises(ERRORS, match=re.escape("mask[:, None, None, :].astype(bool)")):
        layer()(tokens, mask=mask)
    valid = mask.astype(bool)  # of padding, lengths make 0
    by_mask = layer()(tokens, mask=mask[:, None, None, :].astype(bool))
    np.testing.assert_allclose(by_mask[valid], layer()(tokens, key_lengths=mask.astype(int).sum(-1))[valid])
    with pytest.raises(ERRORS, match=re.escape("mask[:, None, :].astype(bool)")):
        fastattn.dot_product_attention(tokens, tokens, tokens, mask=mask)


def test_other_masks_are_not_taken_for_padding():
    for mask in (np.ones((6, 6), int), np.ones((5, 6), bool), np.ones((2, 1, 1, 5), bool), np.ones(5, bool)):
        with pytest.raises(ERRORS, match="mask") as caught:
            fastattn.dot_product_attention(X, X, X, mask=mask)
        assert "padding" not in str(caught.value)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("enable_gqa", [False, True])
def test_heads_behind_the_tokens_show_swapaxes(kv_heads, enable_gqa):
    query, key = np.ones((2, 5, 4, 8), np.float32), np.ones((2, 7, kv_heads, 8), np.float32)
    with pytest.raises(ValueError, match=re.escape("x.swapaxes(1, 2)")) as caught:
        fastattn.dot_product_attention(query, key, key, enable_gqa=enable_gqa)
    if not enable_gqa:
        assert str(caught.value).index("swapaxes(1, 2)") < str(caught.value).index("enable_gqa")
    query, key = query.swapaxes(1, 2), key.swapaxes(1, 2)
    assert fastattn.dot_product_attention(query, key, key, enable_gqa=True).shape == (2, 4, 5, 8)


@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (5, 7), (3, 64)])
def test_heads_before_the_tokens_do_not_show_swapaxes(queries, keys):
    query, key = np.ones((2, 6, queries, 8), np.float32), np.ones((2, 3, keys, 8), np.float32)
    with pytest.raises(ValueError, match="enable_gqa") as caught:
        fastattn.dot_product_attention(query, key, key)
    assert "swapaxes" not in str(caught.value)


# ------------------------------------------------------------------------------------------ checks alone


SHAPES = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)


def test_a_call_can_be_checked_without_arrays():
    assert _call.check(*SHAPES, np.float32, {"enable_gqa": True, "is_causal": True}) == (2, 4, 5, 6)
    for error, message, rules in (
        (ValueError, "do not broadcast", {}),
        (ValueError, "key_lengths must lie between 0 and 7", {"enable_gqa": True, "key_lengths": 8}),
        (ValueError, "mask has shape", {"enable_gqa": True, "mask": np.ones((5, 6), bool)}),
        (ValueError, "'band' needs window_size", {"enable_gqa": True, "return_weights": "band"}),
        (TypeError, "return_lse must be True or False", {"enable_gqa": True, "return_lse": 1}),
        (ValueError, "scale must be", {"enable_gqa": True, "scale": np.inf}),
        (ValueError, "num_threads must be", {"enable_gqa": True, "num_threads": 0}),
    ):
        with pytest.raises(error, match=message):
            _call.check(*SHAPES, np.float32, rules)


def test_layers_check_without_calling(monkeypatch):
    """What a rule says is known before anything is projected, appended or attended to."""

    def call(*arguments, **others):
        raise AssertionError("no call is to be made")

    monkeypatch.setattr(fastattn.multihead, "attend", call)
    monkeypatch.setattr(fastattn.streaming, "attend", call)
    with pytest.raises(ValueError, match="sinks"):
        fastattn.StreamingAttention(3, sinks=np.ones(2), activation="relu")
    stream = fastattn.StreamingAttention(3, 2, alibi_slopes=np.ones(3))
    with pytest.raises(ValueError, match="alibi_slopes"):
        stream.push(*3 * [np.ones((2, 0, 4), np.float32)])
    assert stream.pushed == 0
    layer = fastattn.MultiHeadAttention(*3 * [np.eye(4)], num_heads=2)
    cache = fastattn.KVCache((), 2, 9, 2)
    with pytest.raises(ValueError, match="softcap"):
        layer(np.ones((3, 4)), cache=cache, softcap=-1)
    assert cache.lengths == 0
