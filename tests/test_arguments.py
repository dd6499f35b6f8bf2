"""Bad arguments: the kind of error, a message that names the argument, and an `out` that stays untouched.

Most tests here run over a table, `CALLS`: each attention function with a good call. One row gives a new function all of
these tests; errors of only one function are tested in that function's own file.
"""

import inspect
import itertools
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


def good_call(batch=(2, 3), **more):
    """Arguments by name: normal query, key and value with these batch axes, L=5, S=7, D=8, E=6, and `more`."""
    inputs = qkv(np.random.default_rng(0), batch, 5, 7, 8, 6)
    return dict(zip(("query", "key", "value"), inputs, strict=True), **more)


def ones(*shape):
    return np.ones(shape, dtype=np.float32)


CALLS = {
    "dot_product_attention": good_call(),
    "truncated_attention": good_call(left=2, right=1),
    "varlen_attention": good_call((3,), cu_seqlens_q=[0, 5], cu_seqlens_k=[0, 7]),
    "additive_attention": good_call(w_score=ones(4), w_query=ones(8, 4), w_key=ones(8, 4), b_hidden=ones(4)),
    "bilinear_attention": good_call(w_query=ones(8, 4), w_key=ones(8, 4), b_query=ones(4), b_key=ones(4)),
    "linear_attention": good_call(),
    "graph_attention": good_call(graph=([0, 2, 2, 5, 6, 7], [1, 6, 0, 0, 3, 5, 2]), w_score=ones(8)),
    "neighborhood_attention": dict(
        zip(("query", "key", "value"), qkv(np.random.default_rng(0), (2, 3), 7, 7, 8, 6), strict=True), kernel_size=3
    ),
    "self_attention": {"x": arrays()[0], "w_query": ones(8, 4), "w_key": ones(8, 4), "w_value": ones(8, 6)},
    "self_attention_vjp": {
        "grad_out": qkv(np.random.default_rng(1), (2, 3), 5, 5, 8, 6)[2],
        "x": arrays()[0],
        "w_query": ones(8, 4),
        "w_key": ones(8, 4),
        "w_value": ones(8, 6),
        "wrt": "x",
    },
}


def array_names(function):
    """The array arguments of its good call."""
    return [name for name, x in CALLS[function].items() if isinstance(x, np.ndarray)]


# Of functions that have gradients: that of one array, so that there is one result.
WITH_GRADIENTS = [name for name in CALLS if f"{name}_vjp" in fastattn.__all__ and f"{name}_vjp" not in CALLS]
for name in WITH_GRADIENTS:
    grad_out = ones(*getattr(fastattn, name)(**CALLS[name]).shape)
    CALLS[f"{name}_vjp"] = {**CALLS[name], "grad_out": grad_out, "wrt": array_names(name)[0]}
TOKENS = ("query", "key", "value", "x")
# Functions in which query and key have the same width, and nothing projects them.
UNPROJECTED = ("dot_product_attention", "truncated_attention", "varlen_attention", "linear_attention",
               "linear_attention_vjp", "dot_product_attention_vjp", "truncated_attention_vjp",
               "varlen_attention_vjp")  # fmt: skip


def for_each_function(*names, among=CALLS):
    """Runs a test over the functions that take all of these arguments."""
    parameters = {function: inspect.signature(getattr(fastattn, function)).parameters for function in among}
    chosen = [function for function in among if all(name in parameters[function] for name in names)]
    assert chosen, names
    return pytest.mark.parametrize("function", chosen)


def for_each_array(wanted=lambda name: True):
    """Runs a test over every wanted array of every good call."""
    pairs = [(function, name) for function in CALLS for name in array_names(function) if wanted(name)]
    return pytest.mark.parametrize(("function", "name"), pairs)


def for_each_keyword(*names):
    """Runs a test over each of these arguments of every function that takes it."""
    pairs = [(function, name) for name in names for function in CALLS
             if name in inspect.signature(getattr(fastattn, function)).parameters]  # fmt: skip
    return pytest.mark.parametrize(("function", "name"), pairs)


def result_shape(function):
    return getattr(fastattn, function)(**CALLS[function]).shape


def refuse(error, message, *changes, function="dot_product_attention", **arguments):
    """Call with the good arguments, altered by `changes` and `arguments`: require the error, and nothing written."""
    call = {**CALLS[function], **dict(changes), **arguments}
    with pytest.raises(error, match=message):
        getattr(fastattn, function)(**call)
    if "out" not in arguments:
        out = np.full(result_shape(function), SENTINEL, dtype=np.float32)
        with pytest.raises(error, match=message):
            getattr(fastattn, function)(**call, out=out)
        assert (out == SENTINEL).all()


@for_each_function()
def test_the_good_call_is_good(function):
    out = np.full(result_shape(function), SENTINEL, dtype=np.float32)
    assert getattr(fastattn, function)(**CALLS[function], out=out) is out
    assert (out != SENTINEL).all()
    assert np.isfinite(out).all()


def test_every_attention_function_is_in_the_table():
    """The public functions that take an `out` and a `softcap` or a `state`."""
    parameters = {name: inspect.signature(getattr(fastattn, name)).parameters for name in fastattn.__all__}
    of_attention = [name for name, given in parameters.items() if "out" in given and {"softcap", "state"} & set(given)]
    assert set(of_attention) == set(CALLS)


# ----------------------------------------------------------------------------------- arrays and shapes


def foreign(array):
    """The array in every dtype and class that is refused."""
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


@for_each_array()
@pytest.mark.parametrize("kind", FOREIGN)
def test_dtypes(function, name, kind):
    if kind == "longdouble" and np.longdouble == np.float64:
        pytest.skip("longdouble is float64 here")
    refuse(ERRORS, name, (name, foreign(CALLS[function][name])[kind]), function=function)


@for_each_array()
@pytest.mark.parametrize("bad", ["text", object(), {}, [[1.0], [1.0, 2.0]], 1.0, 1j])
def test_things_that_are_no_arrays(function, name, bad):
    refuse(ERRORS, name, (name, bad), function=function)


@for_each_array(lambda name: name in TOKENS)
def test_tokens_that_are_no_matrices(function, name):
    refuse(ERRORS, name, (name, None), function=function)
    refuse(ERRORS, name, (name, [1.0, 2.0]), function=function)
    x = CALLS[function][name]
    refuse(ValueError, name, (name, x[(0,) * (x.ndim - 1)]), function=function)


@for_each_array(lambda name: not name.startswith(("b_", "grad_")))
def test_float16_with_bfloat16(function, name):
    """(Biases and gradients that come in do not affect the dtype of the result, and may have any.)"""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    halves = {other: CALLS[function][other].astype(np.float16) for other in array_names(function)}
    message = "|".join(TOKENS) if name in TOKENS else name
    halves[name] = CALLS[function][name].astype(ml_dtypes.bfloat16)
    refuse(TypeError, message, *halves.items(), function=function)


@for_each_function("query")
def test_shapes(function):
    query, key, value = (CALLS[function][name] for name in ("query", "key", "value"))
    widths = "(?s)query.*key|key.*query" if function in UNPROJECTED else "key|query"
    refuse(ValueError, widths, ("key", key[..., :7]), function=function)
    refuse(ValueError, widths, ("query", query[..., :1]), function=function)
    lengths = "(?s)key.*value|value.*key"
    refuse(ValueError, lengths, ("value", value[..., :6, :]), function=function)
    refuse(ValueError, lengths, ("key", key[..., :1, :]), function=function)
    refuse(ValueError, "query|key|value", ("query", query[..., :2, :, :]), function=function)
    refuse(ValueError, "query|key|value", ("value", np.concatenate([value, value])), function=function)


@for_each_function()
def test_the_message_shows_what_came(function):
    """Shapes, dtypes and numbers are in the message."""
    first = array_names(function)[0]
    refuse(ERRORS, "complex64", (first, CALLS[function][first].astype(np.complex64)), function=function)
    parameters = inspect.signature(getattr(fastattn, function)).parameters
    for name, error, message, bad in (
        ("activation", ValueError, "gelu", "gelu"),
        ("mask", ValueError, re.escape("(5, 6)"), np.ones((5, 6), dtype=bool)),
        ("mask", TypeError, "int64", np.ones((5, 7), dtype=np.int64)),
        ("window_size", ValueError, "-17", (-17, 0)),
        ("key_lengths", ValueError, "9", 9),
        ("chunk_size", ValueError, "-5", -5),
        ("return_weights", ERRORS, "bands", "bands"),
    ):
        if name in parameters and (name != "return_weights" or "window_size" in parameters):
            refuse(error, message, function=function, **{name: bad})


@for_each_function("query", among=UNPROJECTED)
def test_the_message_shows_both_widths(function):
    query, key = CALLS[function]["query"], CALLS[function]["key"]
    refuse(ValueError, r"(?s)\b8\b.*\b4\b|\b4\b.*\b8\b", ("query", query[..., :4]), function=function)
    refuse(ValueError, r"(?s)\b8\b.*\b7\b|\b7\b.*\b8\b", ("key", key[..., :7]), function=function)


def test_the_message_shows_the_width_of_one_query():
    refuse(ValueError, r"(?s)\b8\b.*\b4\b|\b4\b.*\b8\b", ("query", arrays()[0][0, 0, :, :4]))


@for_each_function("enable_gqa")
def test_unequal_heads_name_enable_gqa(function):
    query = CALLS[function]["query"]
    refuse(ValueError, "enable_gqa", ("query", np.concatenate([query, query], axis=-3)), function=function)


@pytest.mark.parametrize(
    ("query_heads", "key_heads", "value_heads"),
    [(5, 2, 2), (4, 3, 3), (2, 4, 4), (4, 2, 4), (4, 2, 1), (4, 0, 0)],
)
def test_group_sizes(query_heads, key_heads, value_heads):
    query, key, value = (np.ones((2, heads, 5, 8), dtype=np.float32) for heads in (query_heads, key_heads, value_heads))
    with pytest.raises(ValueError, match=r"enable_gqa|heads|key|value"):
        fastattn.dot_product_attention(query, key, value, enable_gqa=True)


# ------------------------------------------------------------------------------- which keys are seen


@for_each_function("window_size")
@pytest.mark.parametrize(
    "window",
    [-2, (-2, 0), (0, -2), 1.5, (1.5, 0), "3", (1, 2, 3), (1,), (), object(), float("nan"),
     np.array([[1, 2]]), (None, "a"), 1j],
)  # fmt: skip
def test_window_size(function, window):
    refuse(ERRORS, "window_size", window_size=window, function=function)


@for_each_function("chunk_size")
@pytest.mark.parametrize(
    "bad", [0, -1, -(2**70), 1.5, "2", object(), [1, 2], np.ones(2, dtype=int), True, 1j, float("nan")]
)
def test_chunk_size(function, bad):
    refuse(ValueError if type(bad) is int else TypeError, "chunk_size", chunk_size=bad, function=function)


@for_each_function("left_chunks")
@pytest.mark.parametrize("bad", [-2, -5, -(2**70), 0.5, "2", object(), [1], True, float("inf")])
def test_left_chunks(function, bad):
    refuse(ERRORS, f"(?s)left_chunks.*{bad if type(bad) is int else ''}", chunk_size=2, left_chunks=bad,
           function=function)  # fmt: skip
    refuse(ERRORS, "left_chunks", left_chunks=bad, function=function)


@for_each_function("left_chunks")
@pytest.mark.parametrize("left_chunks", [0, 2, 3, -1])
def test_left_chunks_need_chunks(function, left_chunks):
    refuse(ValueError, "(?s)left_chunks.*chunk_size", left_chunks=left_chunks, function=function)


@for_each_function("query_offset")
@pytest.mark.parametrize("offset", [0.5, "1", object(), np.zeros((2, 3)), [["a"] * 3] * 2, 1j])
def test_query_offset(function, offset):
    refuse(ERRORS, "query_offset", query_offset=offset, function=function)


@for_each_keyword("key_lengths", "query_lengths")
@pytest.mark.parametrize("bad", [-1, 8, 2**31, 2**63, 10**30, 1.0, 2.5, "3", object(), [[1, 1, 1], [1, 1, 9]],
                                 [[-1, 1, 1], [1, 1, 1]], np.ones((2, 3)), [["a"] * 3] * 2])  # fmt: skip
def test_lengths(function, name, bad):
    refuse(ERRORS, name, function=function, **{name: bad})


@for_each_keyword("key_lengths", "query_lengths", "query_offset")
@pytest.mark.parametrize("shape", [(3,), (1,), (1, 2, 3), (2, 3, 1), (2, 2), (3, 2), (2, 3, 1, 1), (4, 3)])
def test_shapes_of_lengths(function, name, shape):
    refuse(ValueError, name, function=function, **{name: np.ones(shape, dtype=np.int64)})


@for_each_function("key_lengths", "query_lengths", "query")
@pytest.mark.parametrize("name", ["key_lengths", "query_lengths"])
def test_lengths_without_the_head_axis(function, name):
    """(B,) with batch axes (B, H) would align with the heads: the message shows what to write."""
    refuse(ValueError, re.escape("lengths[:, None]"), function=function, **{name: np.array([4, 5])})


@pytest.mark.parametrize("name", ["key_lengths", "query_lengths"])
def test_lengths_without_the_head_axis_where_they_would_fit(name):
    query, key, value = (np.ones((3, 3, 5, 8), dtype=np.float32) for _ in range(3))
    with pytest.raises(ValueError, match=re.escape("lengths[:, None]")):
        fastattn.dot_product_attention(query, key, value, **{name: np.array([4, 5, 3])})


@for_each_function("mask")
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, np.int8, object, "U4"])
def test_mask_must_be_boolean(function, dtype):
    refuse(TypeError, "(?s)mask.*bool", mask=np.ones((5, 7), dtype=dtype), function=function)


@for_each_keyword("mask", "bias")
@pytest.mark.parametrize("shape", [(5, 6), (6, 7), (2, 5, 7), (1, 2, 3, 5, 7), (4, 3, 5, 7), (2, 3, 7, 5)])
def test_shapes_of_mask_and_bias(function, name, shape):
    array = np.ones(shape, dtype=bool if name == "mask" else np.float32)
    refuse(ValueError, name, function=function, **{name: array})


@for_each_function("bias")
@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.uint32])
def test_bias_must_be_float(function, dtype):
    refuse(TypeError, "bias", bias=np.ones((5, 7), dtype=dtype), function=function)


# ------------------------------------------------------------------------------------------- a band

WINDOW = {"window_size": (2, 1)}
with_a_window = for_each_function("window_size", "relative_bias")


@with_a_window
def test_relative_bias_and_band_need_a_window(function):
    band = np.zeros(4, dtype=np.float32)
    for arguments in ({}, {"window_size": (3, None)}, {"window_size": (None, 0)}, {"window_size": (-1, -1)},
                      {"is_causal": True}, {"is_causal": True, "window_size": (None, 3)}):  # fmt: skip
        refuse(ValueError, "(?s)relative_bias.*window_size", relative_bias=band, function=function, **arguments)
        if "return_weights" in inspect.signature(getattr(fastattn, function)).parameters:
            refuse(ValueError, "(?s)return_weights.*window_size", return_weights="band", function=function, **arguments)


@with_a_window
@pytest.mark.parametrize(
    "shape", [(3,), (5,), (7,), (5, 7), (6, 4), (2, 5, 4), (1, 2, 3, 5, 4), (4, 3, 5, 4), (2, 3, 4, 5)]
)
def test_shapes_of_relative_bias(function, shape):
    band = np.zeros(shape, dtype=np.float32)
    message = rf"(?s)relative_bias.*{re.escape(str(shape))}"
    refuse(ValueError, message, relative_bias=band, function=function, **WINDOW)


@with_a_window
def test_causal_takes_the_right_side_of_relative_bias_away(function):
    refuse(ValueError, "relative_bias", relative_bias=np.zeros(4), is_causal=True, function=function, **WINDOW)


@with_a_window
def test_the_message_shows_the_shape_that_relative_bias_may_have(function):
    refuse(ValueError, r"\(2, 3, 5, 4\)", relative_bias=np.zeros((5, 7)), function=function, **WINDOW)


@with_a_window
@pytest.mark.parametrize("kind", FOREIGN)
def test_dtypes_of_relative_bias(function, kind):
    if kind == "longdouble" and np.longdouble == np.float64:
        pytest.skip("longdouble is float64 here")
    refuse(ERRORS, "relative_bias", relative_bias=foreign(ones(4))[kind], function=function, **WINDOW)


@with_a_window
@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.uint32])
def test_relative_bias_must_be_float(function, dtype):
    message = f"(?s)relative_bias.*{np.dtype(dtype).name}"
    refuse(TypeError, message, relative_bias=np.ones(4, dtype=dtype), function=function, **WINDOW)


@for_each_function("return_weights")
@pytest.mark.parametrize("bad", ["", "Band", "band ", "bands", "full", "yes", b"band", 1, 0, None, ["band"],
                                 np.array([True])])  # fmt: skip
def test_return_weights(function, bad):
    refuse(ERRORS, "return_weights", return_weights=bad, function=function)
    if "window_size" in inspect.signature(getattr(fastattn, function)).parameters:
        refuse(ERRORS, "return_weights", return_weights=bad, function=function, **WINDOW)


# ------------------------------------------------------------------------------- from scores to output


@for_each_keyword("bias", "alibi_slopes", "sinks")
@pytest.mark.parametrize("kind", [k for k in FOREIGN if "endian" not in k and k != "longdouble"])
def test_dtypes_of_other_arrays(function, name, kind):
    number = np.ones((5, 7) if name == "bias" else 3, dtype=np.float32)
    refuse(ERRORS, name, function=function, **{name: foreign(number)[kind]})


@for_each_keyword("alibi_slopes", "sinks")
@pytest.mark.parametrize("shape", [(2,), (4,), (3, 3), (1, 2, 3), (2, 3, 1), (3, 2)])
def test_shapes_of_slopes_and_sinks(function, name, shape):
    refuse(ValueError, name, function=function, **{name: np.ones(shape, dtype=np.float32)})


@for_each_function("scale")
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, "1", 1j, object(), [1.0, 2.0], np.ones((5, 7))])
def test_scale(function, scale):
    refuse(ERRORS, "scale", scale=scale, function=function)


@for_each_function("softcap")
@pytest.mark.parametrize("softcap", [0, 0.0, -1.0, np.nan, "1", 1j, object(), [1.0, 2.0]])
def test_softcap(function, softcap):
    refuse(ERRORS, "softcap", softcap=softcap, function=function)


@for_each_function("activation")
@pytest.mark.parametrize("activation", ["", "Softmax", "gelu", "tanh", "softmax ", None, 1, b"softmax", ["softmax"]])
def test_activation(function, activation):
    refuse(ERRORS, "activation", activation=activation, function=function)


@for_each_function("activation", "return_lse", "sinks")
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "sparsemax", "entmax15"])
def test_only_softmax_has_lse_and_sinks(function, activation):
    refuse(ValueError, "return_lse", activation=activation, return_lse=True, function=function)
    refuse(ValueError, "sinks", activation=activation, sinks=np.float32(0), function=function)


@for_each_function()
def test_unknown_keywords(function):
    refuse(TypeError, "causal_mask", causal_mask=True, function=function)


def test_options_of_softmax_are_keywords_only():
    with pytest.raises(TypeError):
        fastattn.softmax(np.ones(3), -1, None)


@for_each_function()
def test_options_are_keywords_only(function):
    """One more value than there are positional parameters."""
    parameters = inspect.signature(getattr(fastattn, function)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    values = [CALLS[function][name] for name in positional]
    with pytest.raises(TypeError, match="positional"):
        getattr(fastattn, function)(*values, True)


# ------------------------------------------------------------------------------------------ out=

WRONG_OUTS = {
    "shape": lambda *shape: np.zeros((*shape[:-1], shape[-1] + 1), dtype=np.float32),
    "an axis missing": lambda *shape: np.zeros(shape[:-1], dtype=np.float32),
    "an axis too many": lambda *shape: np.zeros((1, *shape), dtype=np.float32),
    "float64": lambda *shape: np.zeros(shape, dtype=np.float64),
    "int32": lambda *shape: np.zeros(shape, dtype=np.int32),
    "big-endian": lambda *shape: np.zeros(shape, dtype=">f4"),
    "masked": lambda *shape: np.ma.zeros(shape, dtype=np.float32),
    "list": lambda *shape: np.zeros(shape, dtype=np.float32).tolist(),
    "string": lambda *shape: "out",
    "broadcast": lambda *shape: np.broadcast_to(np.zeros(shape[-2:], dtype=np.float32), shape),
}


@for_each_function()
@pytest.mark.parametrize("kind", WRONG_OUTS)
def test_out_of_the_wrong_kind(function, kind):
    refuse(ERRORS, "out", out=WRONG_OUTS[kind](*result_shape(function)), function=function)


@for_each_function()
def test_out_read_only(function):
    out = np.full(result_shape(function), SENTINEL, dtype=np.float32)
    out.flags.writeable = False
    refuse(ERRORS, "out", out=out, function=function)
    assert (out == SENTINEL).all()


@for_each_keyword(*dict.fromkeys(name for function in CALLS for name in array_names(function)), "bias")
def test_out_overlaps_an_array(function, name):
    """Here `out` and all matrices are (8, 8); a vector is part of one. The message names the array."""
    call = {n: ones(*(8,) * min(x.ndim, 2)) if n in array_names(function) else x for n, x in CALLS[function].items()}
    call |= {n: [0, 8] for n in call if n.startswith("cu_seqlens")}
    call |= {n: (np.arange(9), np.arange(8)) for n in call if n == "graph"}
    buffer = ones(72)
    part = buffer[56:64] if name in call and call[name].ndim == 1 else buffer[8:].reshape(8, 8)
    for out in (buffer[:64].reshape(8, 8), buffer[:64].reshape(8, 8).T):
        with pytest.raises(ValueError, match=rf"out.*\b{name}\b"):
            getattr(fastattn, function)(**call | {name: part}, out=out)
    assert (buffer == 1).all()


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


def test_out_lies_beside_an_input():
    """Behind or before it, or between its numbers, in any direction; one number less apart is too little."""
    value = np.ones((8, 8), dtype=np.float32)
    expected = fastattn.dot_product_attention(value, value, value)
    turned = (np.s_[:, :], np.s_[::-1], np.s_[:, ::-1], np.s_[::-1, ::-1])
    for query_at, out_at in (0, 64), (64, 0), (0, 63), (63, 0):
        for how, whole in itertools.product(turned, turned):
            buffer = np.ones(128, dtype=np.float32)
            query, placed = (buffer[at : at + 64].reshape(8, 8)[i] for at, i in ((query_at, how), (out_at, whole)))
            for out in placed, placed.T:
                if 64 in (query_at, out_at):
                    fastattn.dot_product_attention(query, value, value, out=out)
                    np.testing.assert_array_equal(out, expected)
                else:
                    with pytest.raises(ValueError, match="out overlaps query"):
                        fastattn.dot_product_attention(query, value, value, out=out)
                    assert (buffer == 1).all()
    buffer = np.ones((8, 16), dtype=np.float32)
    fastattn.dot_product_attention(buffer[:, 1::2], value, value, out=buffer[:, ::2])
    np.testing.assert_array_equal(buffer[:, ::2], expected)
    fastattn.dot_product_attention(buffer[3:3, :8], value, value, out=buffer[3:3, :8])


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


@for_each_function("num_threads")
@pytest.mark.parametrize("num_threads", [0, -1, -(2**40), 1.5, "2", object()])
def test_num_threads(function, num_threads):
    """A number below one is a ValueError."""
    error = ValueError if num_threads in (0, -1) else ERRORS
    refuse(error, "num_threads", num_threads=num_threads, function=function)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "sparsemax", "entmax15"])
@pytest.mark.parametrize("num_threads", [0, -1, -(2**40), 1.5, "2", object()])
def test_num_threads_of_softmax(name, num_threads):
    with pytest.raises(ERRORS, match="num_threads"):
        getattr(fastattn, name)(np.ones((3, 4), dtype=np.float32), num_threads=num_threads)


def test_many_threads_are_no_harm():
    """More threads than anyone has are an upper limit like any other, also for a call that uses threads."""
    large = [x.repeat(80, axis=-2) for x in arrays()]
    for inputs in (arrays(), large):
        expected = fastattn.dot_product_attention(*inputs, num_threads=1)
        for num_threads in (1000, 2**31 - 1, 2**31, 2**63, 10**30):
            result = fastattn.dot_product_attention(*inputs, num_threads=num_threads)
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**30])
@pytest.mark.parametrize("causal", [False, True])
def test_huge_numbers(size, causal):
    """Windows and offsets that overflow an integer: the right result (all or nothing), or an error."""
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
            assert size >= 2**63  # anything that fits an int64 must work
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

FUNCTIONS = ("softmax", "log_softmax", "logsumexp", "sparsemax", "entmax15")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_dtypes_of_softmax_gradients(name, kind):
    if kind == "longdouble" and np.longdouble == np.float64:
        pytest.skip("longdouble is float64 here")
    good = np.ones((3, 4), dtype=np.float32)
    grad_out = good[:, 0] if name == "logsumexp" else good
    with pytest.raises(ERRORS, match="grad_out"):
        getattr(fastattn, f"{name}_vjp")(foreign(grad_out)[kind], good)
    with pytest.raises(ERRORS, match=r"\bx\b" if name == "logsumexp" else "output"):
        getattr(fastattn, f"{name}_vjp")(grad_out, foreign(good)[kind])


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
        with pytest.raises(ERRORS, match=name):
            fastattn.merge_attention_vjp(out, outs, lses)
    for bad in (out[:, :4], lse, 1.0, out.astype(complex), out.astype(">f4"), np.ma.masked_array(out), None):
        with pytest.raises(ERRORS, match="grad_out"):
            fastattn.merge_attention_vjp(bad, [out], [lse])
    for bad in (lse[:, :4], out, 1.0, lse.astype(complex)):
        with pytest.raises(ERRORS, match="grad_lse"):
            fastattn.merge_attention_vjp(out, [out], [lse], grad_lse=bad)
    with pytest.raises(TypeError):
        fastattn.merge_attention_vjp(out, [out], [lse], lse)


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


def layer_streamed(left=2, right=1, **arguments):
    return fastattn.StreamingMultiHeadAttention(layer(), left, right, **arguments).push(X)


def from_llama(layer=1, num_heads=2, **arguments):
    state = {f"model.layers.1.self_attn.{name}_proj.weight": np.eye(4) for name in "qkvo"}
    return fastattn.MultiHeadAttention.from_llama(state, layer, num_heads=num_heads, **arguments)(X)


def from_gemma(**arguments):
    state = {f"model.layers.1.self_attn.{name}_proj.weight": np.eye(4) for name in "qkvo"}
    return fastattn.MultiHeadAttention.from_gemma(state, 1, **{"num_heads": 2, "rotary_base": 9.0} | arguments)(X)


def from_t5(**arguments):
    at = "decoder.block.0.layer.0.SelfAttention."
    state = {f"{at}{name}.weight": np.eye(4) for name in "qkvo"}
    state[f"{at}relative_attention_bias.weight"] = np.arange(16.0).reshape(8, 2)
    given = {"num_heads": 2, "layer": 0, "max_length": 20, "part": "decoder"}
    return fastattn.MultiHeadAttention.from_t5(state, **given | arguments)(X)


def from_packed(num_heads=4, **arguments):
    return fastattn.MultiHeadAttention.from_packed(np.ones((4, 24)), num_heads=num_heads, **arguments)(X)


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
    *((layer_streamed, name, n) for name, n in (("left", 1), ("right", 2), ("chunk_size", 3), ("num_threads", 2))),
    (lambda n: layer(n)(X), "n", 2),
    (lambda **k: layer(**k)(X), "num_kv_heads", 2),
    (lambda **k: layer(rotary_base=10.0, **k)(X), "rotary_dim", 2),
    (lambda **k: layer()(X, **k), "key_lengths", 2),
    (lambda **k: layer()(X, **k), "query_lengths", 2),
    (lambda **k: layer()(X, **k), "query_offset", 2),
    (lambda n: from_llama(n, 2), "n", 1),
    (lambda n: from_llama(1, n), "n", 2),
    (lambda **k: from_llama(**k), "sliding_window", 2),
    (lambda **k: layer(**k)(X), "window_size", 2),
    (lambda n: layer(window_size=(n, 1))(X), "n", 2),
    *((from_packed, name, n) for name, n in (("num_heads", 2), ("num_kv_heads", 4))),
    *((from_t5, name, n) for name, n in (("layer", 0), ("num_heads", 2), ("max_length", 9), ("max_distance", 9))),
]  # fmt: skip
INTEGER_NAMES = [f"{i} {name}" for i, (_, name, _) in enumerate(INTEGERS)]

REALS = [
    (lambda **k: fastattn.dot_product_attention(X, X, X, **k), "scale", 0.5),
    (lambda **k: fastattn.dot_product_attention(X, X, X, **k), "softcap", 0.5),
    (lambda **k: streamed(**k), "scale", 0.5),
    (lambda **k: streamed(**k), "softcap", 0.5),
    (lambda **k: layer_streamed(**k), "scale", 0.5),
    (lambda **k: fastattn.apply_rotary(X, **k), "base", 100.0),
    (lambda **k: fastattn.sinusoidal_encoding(3, 4, **k), "base", 100.0),
    (lambda **k: layer(**k)(X), "rotary_base", 100.0),
    (lambda **k: layer(q_norm=np.ones(2), **k)(X), "norm_eps", 0.5),
    (lambda **k: layer(**k)(X), "scale", 0.5),
    (lambda **k: layer(**k)(X), "softcap", 0.5),
    *((from_gemma, name, 2.0) for name in ("query_pre_attn_scalar", "attn_logit_softcapping", "rotary_base")),
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
    """Changing an array between two pushes has no effect."""
    numbers = {"scale": np.array(0.5), "softcap": np.array(2.0), "num_threads": np.array(2), "chunk_size": np.array(2)}
    stream, expected = fastattn.StreamingAttention(3, 0, **numbers), streamed(3, 0, scale=0.5, softcap=2, chunk_size=2)
    for number in numbers.values():
        number[...] = 7
    same(stream.push(X, X, X), expected)


@for_each_keyword("is_causal", "enable_gqa", "return_weights", "return_lse")
@pytest.mark.parametrize("number", [0, 1, 2, np.int64(1), np.array(1)], ids=repr)
def test_integers_are_no_flags(function, name, number):
    refuse(TypeError, name, function=function, **{name: number})


# --------------------------------------------------------------------------- messages that show the way


@pytest.mark.parametrize("name", ["dot_product_attention", "additive_attention", "bilinear_attention",
                                  "truncated_attention", "varlen_attention", "merge_attention", "softmax", "sparsemax",
                                  "self_attention", "apply_rotary",
                                  *(f"{name}_vjp" for name in WITH_GRADIENTS)])  # fmt: skip
def test_missing_arguments_are_named(name):
    function = getattr(fastattn, name)
    parameters = inspect.signature(function).parameters
    required = [p.name for p in parameters.values() if p.default is p.empty]
    assert required[0] in ("query", "x", "outs", "grad_out")
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
    """(B, S) of 0 and 1, as from Hugging Face's tokenizers: following the message gives the right result."""
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
    valid = mask.astype(bool)  # lengths make 0 of padding
    by_mask = layer()(tokens, mask=mask[:, None, None, :].astype(bool))
    np.testing.assert_allclose(by_mask[valid], layer()(tokens, key_lengths=mask.astype(int).sum(-1))[valid])
    with pytest.raises(ERRORS, match=re.escape("mask[:, None, :].astype(bool)")):
        fastattn.dot_product_attention(tokens, tokens, tokens, mask=mask)


def test_a_mask_given_as_lengths_shows_how_to_count():
    """The same mask as key_lengths: what the message says gives the right result."""
    x = np.ones((2, 3, 6, 4), np.float32) * np.arange(6, dtype=np.float32)[:, None]
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    with pytest.raises(ValueError, match=r"key_lengths=mask\.sum\(-1\)\[:, None\]$"):
        fastattn.dot_product_attention(x, x, x, key_lengths=mask)
    fastattn.dot_product_attention(x, x, x, key_lengths=mask.sum(-1)[:, None])
    for call in (layer(), lambda *x, **k: fastattn.dot_product_attention(*3 * x, **k)):
        with pytest.raises(ValueError, match=r"key_lengths=mask\.sum\(-1\)$"):
            call(x[:, 0], key_lengths=mask)
        call(x[:, 0], key_lengths=mask.sum(-1))
    for other in (mask[:, :5], mask[:1]):
        with pytest.raises(ValueError, match="key_lengths has shape") as caught:
            fastattn.dot_product_attention(x, x, x, key_lengths=other)
        assert "padding" not in str(caught.value)


def test_heads_given_to_a_layer_show_reshape():
    x = np.ones((2, 6, 2, 2), np.float32)
    with pytest.raises(ValueError, match=re.escape("x.reshape(2, 6, 4)")):
        layer()(x)
    assert layer()(x.reshape(2, 6, 4)).shape == (2, 6, 4)


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
    """Rules are checked before anything is projected, appended or attended to."""

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
