"""The C interface: what every call promises, and a client of each kind, built here against the installed package.

Most calls are ctypes' (c_interface.py); the extensions in tests/embedding and README's blocks are compiled in a
temporary folder. Programs without Python need static libraries of the kernels, which take a minute to compile:
`.ci/doors` makes them, and names their folder in FASTATTN_DOORS.
"""

import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fresh_process
import numpy as np
import problems
import pytest
from c_interface import (
    ADDITIVE,
    BAD_DTYPE,
    BAD_OVERLAP,
    BAD_POINTER,
    BAD_SIZE,
    BAD_STRUCT,
    BAD_VALUE,
    BAD_WORKSPACE,
    NO_MEMORY,
    OK,
    ROW_FUNCTIONS,
    AttentionArgs,
    SoftmaxArgs,
    View,
    aligned_bytes,
    api,
    attention_args,
    capsule_address,
    empty_results,
    message_of,
    offsets,
    softmax_args,
    view,
    wide,
)

import fastattn
from fastattn import cython_attention

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "embedding"
README = HERE.parent / "README.md"
DTYPES = (*problems.DTYPES, *problems.sixteen_bits())
# batch, heads, key heads, queries, keys, head_dim, value_dim: few rows; tiles for threads; threads share keys.
SHAPES = ((2, 4, 2, 20, 70, 16, 24), (1, 6, 3, 130, 300, 33, 17), (2, 4, 1, 3, 5000, 64, 64))
NOT_IN_C = {"chunk_size", "left_chunks", "block_mask", "block_size", "relative_bias"}


def dtype_name(dtype):
    return np.dtype(dtype).name


# Calls of C and of Python, side by side


def rules_of(rng, shape, dtype):
    """The rules of problems.py that the C interface has, by name; offsets are one for each sequence there."""
    batch, heads, _, queries, keys = shape[:5]
    found = {}
    for name, rules in problems.rules(rng, (batch, heads), queries, keys, dtype).items():
        if rules.get("activation") in ("sparsemax", "entmax15"):
            continue
        kept = {key: rule for key, rule in rules.items() if key not in NOT_IN_C}
        if np.ndim(kept.get("query_offset", 0)):
            kept["query_offset"] = kept["query_offset"][:, :1]
        if kept:
            found[name] = kept
    return {"none": {}, **found}


def arrays_of(rng, shape, dtype):
    batch, heads, kv_heads, queries, keys, head_dim, value_dim = shape
    return tuple(
        rng.standard_normal(size).astype(dtype)
        for size in (
            (batch, heads, queries, head_dim),
            (batch, kv_heads, keys, head_dim),
            (batch, kv_heads, keys, value_dim),
        )
    )


def in_python(arrays, rules, num_threads=1):
    """out, lse (or None), weights."""
    rules = dict(rules)
    with_lse = rules.get("activation", "softmax") == "softmax"
    f = fastattn.dot_product_attention
    if "w_score" in rules:
        arrays, f = (*arrays, rules.pop("w_score")), fastattn.additive_attention
    found = f(*arrays, enable_gqa=True, return_weights=True, return_lse=with_lse, num_threads=num_threads, **rules)
    return (found[0], found[2] if with_lse else None, found[1])


def call_table(args, num_threads, workspace=None):
    """The status of a call through the capsule's table."""
    address, size = (None, 0) if workspace is None else (workspace.ctypes.data, workspace.size)
    return api.attention(args, num_threads, address, size)


def in_c(arrays, rules, num_threads=1, with_workspace=False, call=call_table, results=None):
    out, lse, weights = empty_results(*arrays) if results is None else results
    if rules.get("activation", "softmax") != "softmax":
        lse = None
    args = attention_args(*arrays, out, lse, weights, **rules)
    workspace = aligned_bytes(api.attention_workspace(args, num_threads), 0xA5) if with_workspace else None
    status = call(args, num_threads, workspace)
    assert status == OK, message_of(api.attention_check, args)
    return out, lse, weights


def assert_same_bits(found, expected):
    for name, one, other in zip(("out", "lse", "weights"), found, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.shape == other.shape and one.dtype == other.dtype, name
            assert problems.bits(one) == problems.bits(other), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_bits_of_every_rule(rng, shape, dtype):
    arrays = arrays_of(rng, shape, dtype)
    ways = [(threads, memory) for threads in (1, 2, 0) for memory in (False, True)]
    for n, (name, rules) in enumerate(rules_of(rng, shape, dtype).items()):
        expected = in_python(arrays, rules)
        for threads, memory in (ways[0], ways[1], ways[2 + n % 4]):
            try:
                assert_same_bits(in_c(arrays, rules, threads, memory), expected)
            except AssertionError as error:
                raise AssertionError(f"{name}, {threads} threads, workspace {memory}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_bits_of_random_calls(rng, dtype):
    """Several rules at once, sizes of zero and one among others, biases of another dtype."""
    for n in range(120):
        kv_heads, keys, queries = (int(rng.choice(sizes)) for sizes in ((1, 2, 3), (0, 1, 2, 17, 70), (0, 1, 2, 9, 33)))
        batch, group, head_dim, value_dim = (int(rng.choice((0, 1, 2, 3, 5, 17))) for _ in range(4))
        shape = (batch, kv_heads * group, kv_heads if group else 0, queries, keys, head_dim, value_dim)
        arrays = arrays_of(rng, shape, dtype)
        rules = {}
        for name, some in rules_of(rng, (*shape[:3], max(queries, 4), max(keys, 4)), dtype).items():
            broadcasts = all(np.ndim(rule) == 0 or rule is some.get("window_size") for rule in some.values())
            if rng.random() < 0.15 and broadcasts and "relu" not in name:
                rules.update(some)
        if rng.random() < 0.4:
            rules["key_lengths"] = rng.integers(0, keys + 1, (batch, 1))
        if rng.random() < 0.4:
            rules["query_lengths"] = rng.integers(0, queries + 1, (batch, 1))
        if rng.random() < 0.4:
            rules["query_offset"] = rng.integers(-3 * queries - 1, keys + 9, (batch, 1))
        if rng.random() < 0.4:
            rules["bias"] = rng.standard_normal((queries, keys)).astype(DTYPES[rng.integers(len(DTYPES))])
        if rng.random() < 0.4:
            rules["mask"] = rng.random((batch, 1, 1, keys)) < 0.6
        if rng.random() < 0.3:
            rules["alibi_slopes"] = rng.random(shape[1])
        if rng.random() < 0.3 and "activation" not in rules:
            rules["sinks"] = rng.standard_normal(shape[1])
        if rng.random() < 0.3:
            rules["w_score"] = rng.standard_normal(head_dim).astype(dtype)
        expected = in_python(arrays, rules)
        for threads, memory in ((1, n % 2 == 0), (2, n % 2 == 1)):
            try:
                assert_same_bits(in_c(arrays, rules, threads, memory), expected)
            except AssertionError as error:
                raise AssertionError(f"call {n}: {shape}, {sorted(rules)}, {threads} threads") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_bits_of_additive_scores(rng, dtype):
    arrays = arrays_of(rng, (2, 4, 2, 40, 130, 24, 16), dtype)
    for size in (1, 1e-3, 300):
        rules = {"w_score": (rng.standard_normal(24) * size).astype(dtype)}
        for more in ({}, {"is_causal": True, "sinks": rng.standard_normal(4)}, {"scale": 0.3}, {"activation": "relu"}):
            expected = in_python(arrays, rules | more)
            for threads in (1, 2):
                assert_same_bits(in_c(arrays, rules | more, threads, threads == 2), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_bits_of_every_layout(rng, dtype):
    """Inputs and outputs transposed, with negative strides, gaps, and at odd addresses."""
    for shape in ((2, 4, 2, 20, 70, 16, 24), (1, 2, 1, 2, 70, 5, 1), (2, 2, 2, 140, 90, 8, 8)):
        arrays = arrays_of(rng, shape, dtype)
        rules = {"is_causal": True, "bias": rng.standard_normal((shape[1], *shape[3:5])).astype(dtype),
                 "mask": rng.random((shape[0], shape[1], *shape[3:5])) < 0.8}  # fmt: skip
        expected = in_python(arrays, rules)
        for n, (name, query) in enumerate(problems.layouts(arrays[0])):
            laid = (query, *(list(problems.layouts(array))[n][1] for array in arrays[1:]))
            some = {key: list(problems.layouts(rule))[n][1] if np.ndim(rule) == 4 else rule
                    for key, rule in rules.items()}  # fmt: skip
            results = empty_results(*arrays)
            if name not in ("read-only", "memory-mapped"):
                results = tuple(list(problems.layouts(result))[n][1] for result in results)
            try:
                assert_same_bits(in_c(laid, some, 1 + n % 2, n % 3 == 0, results=results), expected)
            except AssertionError as error:
                raise AssertionError(f"{name}, {shape}") from error


def test_bits_of_broadcast_inputs(rng):
    """A stride of 0 repeats."""
    query, key, value = arrays_of(rng, (3, 4, 4, 20, 30, 16, 8), np.float32)
    arrays = (np.broadcast_to(query[:1, :, :1], query.shape), np.broadcast_to(key[:, :1], key.shape),
              np.broadcast_to(value[..., :1], value.shape))  # fmt: skip
    assert_same_bits(in_c(arrays, {}), in_python(tuple(array.copy() for array in arrays), {}))


def test_numbers_per_head_are_taken_in_the_dtype_of_the_computation(rng):
    """Slopes, sinks and weights of scores that float32 cannot hold, and at addresses that are no multiple of 8."""
    arrays = arrays_of(rng, (2, 3, 3, 9, 40, 8, 8), np.float32)
    numbers = {"alibi_slopes": np.array([0.1, 0.2, 1 / 3]), "sinks": np.array([0.1, 1e-300, 1 / 7])}
    assert_same_bits(in_c(arrays, numbers), in_python(arrays, numbers))
    lengths = {"key_lengths": np.array([[3], [40]]), "query_offset": np.array([[7], [-2]]), "is_causal": True}
    results = empty_results(*arrays)
    args = attention_args(*arrays, *results, **numbers, **lengths)
    held = []
    for name, rule in (numbers | lengths).items():
        if np.ndim(rule):
            held.append(problems.misaligned(rule))
            setattr(args, "query_offsets" if name == "query_offset" else name, held[-1].ctypes.data)
    assert call_table(args, 1) == OK
    assert_same_bits(results, in_python(arrays, numbers | lengths))


def test_only_what_is_asked_for_is_written(rng):
    arrays = arrays_of(rng, (1, 2, 2, 5, 9, 4, 4), np.float32)
    out, lse, weights = empty_results(*arrays)
    assert call_table(attention_args(*arrays, out), 1) == OK
    assert problems.bits(out) == problems.bits(in_python(arrays, {})[0])
    assert (lse == -77).all() and (weights == -77).all()


@pytest.mark.parametrize("keys", [0, 5])
def test_no_keys_give_zeros(rng, keys):
    arrays = arrays_of(rng, (2, 2, 2, 5, keys, 4, 3), np.float32)
    out, lse, weights = in_c(arrays, {"key_lengths": 0})
    assert (out == 0).all() and (lse == -np.inf).all() and (weights == 0).all()


def test_data_of_empty_arrays_may_be_null():
    args = AttentionArgs()
    api.attention_init(args, ctypes.sizeof(args))
    args.queries, args.value_dim, args.head_dim = 2, 3, 4
    query, out = np.ones((2, 4), np.float32), np.ones((2, 3), np.float32)
    args.query, args.out = View(query.ctypes.data, row=16, col=4), View(out.ctypes.data, row=12, col=4)
    assert api.attention(args, 1, None, 0) == OK and (out == 0).all()
    args.queries = 0
    args.query = args.out = View()
    assert api.attention(args, 2, None, 0) == OK
    rows = SoftmaxArgs()
    api.softmax_init(rows, ctypes.sizeof(rows))
    assert api.softmax(rows, 1) == OK
    assert api.softmax_f32(None, None, 0, 5, 1) == api.softmax_f64(None, None, 5, 0, 1) == OK


# Flat functions


@pytest.mark.parametrize("dtype", problems.DTYPES, ids=dtype_name)
def test_flat_functions(rng, dtype):
    short = "f32" if dtype == np.float32 else "f64"
    for batch, heads, kv_heads, queries, keys, head_dim, value_dim in SHAPES:
        arrays = arrays_of(rng, (batch, heads, kv_heads, queries, keys, head_dim, value_dim), dtype)
        for left, right, scale in ((-1, -1, np.nan), (-1, 0, 0.3), (9, 2, np.nan)):
            out = empty_results(*arrays)[0]
            status = getattr(api, f"dot_product_attention_{short}")(
                *(array.ctypes.data for array in (out, *arrays)), batch, heads, kv_heads, queries, keys, head_dim,
                value_dim, left, right, scale, 2)  # fmt: skip
            rules = {"window_size": (left, right), "scale": None if np.isnan(scale) else scale}
            expected = fastattn.dot_product_attention(*arrays, enable_gqa=True, **rules)
            assert status == OK and problems.bits(out) == problems.bits(expected)
    x = rng.standard_normal((40, 700)).astype(dtype)
    out = np.empty_like(x)
    softmax = getattr(api, f"softmax_{short}")
    assert softmax(out.ctypes.data, x.ctypes.data, 40, 700, 2) == OK
    assert problems.bits(out) == problems.bits(fastattn.softmax(x))
    assert softmax(x.ctypes.data, x.ctypes.data, 40, 700, 1) == OK
    assert problems.bits(x) == problems.bits(out)
    assert softmax(None, x.ctypes.data, 40, 700, 1) == BAD_POINTER
    assert softmax(out.ctypes.data, x.ctypes.data, -1, 700, 1) == BAD_SIZE
    assert softmax(out.ctypes.data, x.ctypes.data, 1 << 47, 1 << 47, 1) == BAD_SIZE
    assert softmax(out.ctypes.data, x.ctypes.data, 40, 700, -1) == BAD_VALUE


# Softmax and its relatives


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("function", ROW_FUNCTIONS)
def test_bits_of_rows(rng, function, dtype):
    """Every layout, masks that repeat, few and many rows. logsumexp's numbers are of x's dtype here; in Python those of
    16 bits are float32."""
    for shape in ((3, 17, 33), (2, 300, 70), (1, 1, 40000), (2, 3, 1), (2, 0, 3), (2, 3, 0)):
        x = (rng.standard_normal(shape) * 5).astype(dtype)
        for mask in (None, rng.random(shape[-1]) < 0.7, rng.random((shape[0], 1, 1)) < 0.6):
            if function == "logsumexp":
                expected = fastattn.logsumexp(x, mask=mask).astype(dtype)
            else:
                expected = getattr(fastattn, function)(x, mask=mask)
            whole = None if mask is None else np.broadcast_to(mask, shape)
            for n, (name, laid) in enumerate([("contiguous", x), *problems.layouts(x)]):
                out = np.full_like(expected, -77)
                if 0 < n < 7:
                    out = list(problems.layouts(np.full_like(x, -77)))[n - 1][1]
                    out = out[..., 0] if function == "logsumexp" and shape[-1] else out
                if out.shape != expected.shape:
                    out = np.full_like(expected, -77)
                args = softmax_args(function, laid, out, whole)
                assert api.softmax(args, 1 + n % 2) == OK, message_of(api.softmax_check, args)
                assert problems.bits(out) == problems.bits(expected), (name, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_rows_in_place(rng, dtype):
    x = rng.standard_normal((4, 30, 50)).astype(dtype)
    expected = fastattn.softmax(x)
    for name, laid in [("contiguous", x.copy()), *problems.layouts(x)]:
        if laid.flags.writeable:
            assert api.softmax(softmax_args("softmax", laid, laid), 2) == OK
            assert problems.bits(laid) == problems.bits(expected), name
    long = np.zeros((1, 1, 101), dtype)
    args = softmax_args("softmax", long[..., :100], long[..., 1:])
    assert message_of(api.softmax_check, args) == (BAD_OVERLAP, "out overlaps x; it needs memory of its own")
    assert api.softmax(args, 1) == BAD_OVERLAP


# What is refused


def good_args(rng, **rules):
    arrays = arrays_of(rng, (2, 4, 2, 5, 9, 6, 3), np.float32)
    return attention_args(*arrays, *empty_results(*arrays), **rules)


REFUSED = [
    ("size", 8, BAD_STRUCT, r"size is 8; this library knows structs of \d+ bytes \(fastattn_attention_init sets it\)"),
    ("size", 0, BAD_STRUCT, "size is 0"),
    ("size", ctypes.sizeof(AttentionArgs) - 8, BAD_STRUCT, "size is"),
    ("size", ctypes.sizeof(AttentionArgs) + 8, BAD_STRUCT, "size is"),
    ("dtype", 4, BAD_DTYPE, "dtype is 4; it must be one of those that fastattn.h names, 0 to 3"),
    ("dtype", -1, BAD_DTYPE, "dtype is -1"),
    ("bias_dtype", 9, BAD_DTYPE, "bias_dtype is 9"),
    ("score", 2, BAD_DTYPE, "score is 2; .* 0 to 1"),
    ("activation", 3, BAD_DTYPE, "activation is 3; .* 0 to 2"),
    *((name, -1, BAD_SIZE, rf"{name} is -1; it must be between 0 and 2\*\*48")
      for name in ("batch", "num_heads", "num_kv_heads", "queries", "keys", "head_dim", "value_dim")),
    ("queries", 1 << 60, BAD_SIZE, "queries is 1152921504606846976"),
    ("num_kv_heads", 3, BAD_SIZE, "num_heads is 4; it must be a whole multiple of num_kv_heads, 3"),
    ("key_lengths", [3, 10], BAD_SIZE, r"key_lengths\[1\] is 10; it must be between 0 and keys, 9"),
    ("key_lengths", [-1, 9], BAD_SIZE, r"key_lengths\[0\] is -1"),
    ("query_lengths", [5, 6], BAD_SIZE, r"query_lengths\[1\] is 6; it must be between 0 and queries, 5"),
    ("query_offsets", [0, -(1 << 62)], BAD_SIZE, r"query_offsets\[1\] is -4611686018427387904; .*2\*\*60"),
    *((name, View(None, 1, 1, 4, 4), BAD_POINTER, rf"{name}\.data is NULL; it must point to the first number")
      for name in ("query", "key", "value", "out")),
    ("score", ADDITIVE, BAD_POINTER, "score_weights is NULL; FASTATTN_ADDITIVE needs head_dim of them"),
    ("score_weights", [1.0], BAD_VALUE, "score_weights is given; only FASTATTN_ADDITIVE has them"),
    ("left", -2, BAD_VALUE, "left is -2; it must be at least 0, or -1 for all keys on that side"),
    ("right", -(1 << 63), BAD_VALUE, "right is -9223372036854775808"),
    ("scale", np.inf, BAD_VALUE, "scale is inf; it must be finite, or NaN for the default"),
    ("softcap", -1.0, BAD_VALUE, "softcap is -1; it must be positive and finite, or 0 for none"),
    ("softcap", np.nan, BAD_VALUE, "softcap is nan"),
    ("softcap", np.inf, BAD_VALUE, "softcap is inf"),
    ("activation", 1, BAD_VALUE, "lse needs FASTATTN_SOFTMAX; other activations have no log-sum-exp"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "status", "words"), REFUSED, ids=[f"{r[0]}-{i}" for i, r in enumerate(REFUSED)]
)
def test_refused_before_anything_is_written(rng, field, value, status, words):
    args = good_args(rng)
    if isinstance(value, list):
        held = np.array(value, np.float64 if isinstance(value[0], float) else np.int64)
        value = held.ctypes.data
    setattr(args, field, value)
    found, text = message_of(api.attention_check, args)
    assert found == status and re.match(words, text), (found, text)
    assert api.attention(args, 1, None, 0) == status
    assert api.attention_workspace(args, 1) == 0
    assert all((result == -77).all() for result in args.kept[3:6])
    assert api.status_text(status).endswith(b".")


def test_a_good_call_has_no_message(rng):
    assert message_of(api.attention_check, good_args(rng)) == (OK, "")
    x = np.ones((1, 2, 3), np.float32)
    assert message_of(api.softmax_check, softmax_args("softmax", x, x)) == (OK, "")


def test_every_status_has_a_sentence():
    sentences = {api.status_text(status) for status in range(0, -9, -1)}
    assert len(sentences) == 9 and all(text.endswith(b".") for text in sentences)
    assert api.status_text(1) == api.status_text(-9) == b"No such status."


def test_sinks_need_a_softmax(rng):
    args = good_args(rng, sinks=[0.0] * 4, activation="sigmoid")
    args.lse = View()
    status, text = message_of(api.attention_check, args)
    assert status == BAD_VALUE and text == "sinks needs FASTATTN_SOFTMAX; other activations have no denominator"


def test_strides_that_lead_out_of_memory(rng):
    args = good_args(rng)
    args.key.row = 1 << 61
    status, text = message_of(api.attention_check, args)
    assert status == BAD_SIZE and text == f"key: a stride of {1 << 61} bytes for 9 elements leads out of memory"


def test_refused_rows():
    x, out = np.ones((2, 3, 4), np.float32), np.full((2, 3, 4), -77, np.float32)
    for field, value, status, words in (
        ("size", 1, BAD_STRUCT, "size is 1; .*fastattn_softmax_init"),
        ("dtype", 7, BAD_DTYPE, "dtype is 7"),
        ("function", 3, BAD_DTYPE, "function is 3; .* 0 to 2"),
        ("batch", -1, BAD_SIZE, "batch is -1"),
        ("rows", -2, BAD_SIZE, "rows is -2"),
        ("n", -3, BAD_SIZE, "n is -3"),
        ("x", View(), BAD_POINTER, r"x\.data is NULL"),
        ("out", View(), BAD_POINTER, r"out\.data is NULL"),
        ("out", View(out.ctypes.data, batch=0, row=16, col=4), BAD_OVERLAP, "out overlaps itself"),
        ("mask", view(out, ("batch", "row", "col")), BAD_OVERLAP, "out overlaps mask; it needs memory of its own"),
    ):
        args = softmax_args("softmax", x, out)
        setattr(args, field, value)
        found, text = message_of(api.softmax_check, args)
        assert found == status and re.match(words, text), (field, found, text)
        assert api.softmax(args, 1) == status
        assert (out == -77).all()
    assert api.softmax(softmax_args("softmax", x, out), -1) == BAD_VALUE
    assert (out == -77).all()


def test_threads_below_zero_are_refused(rng):
    args = good_args(rng)
    assert api.attention(args, -1, None, 0) == BAD_VALUE
    assert api.attention_workspace(args, -1) == 0
    assert all((result == -77).all() for result in args.kept[3:6])


def test_null_arguments():
    text = ctypes.create_string_buffer(200)
    for check, init in (
        (api.attention_check, b"fastattn_attention_init"),
        (api.softmax_check, b"fastattn_softmax_init"),
    ):
        assert check(None, text, 200) == BAD_POINTER
        assert text.value == b"args is NULL; it must point to a struct that %s has filled" % init
        assert check(None, None, 0) == check(None, None, 100) == BAD_POINTER
    assert api.attention(None, 1, None, 0) == api.softmax(None, 1) == BAD_POINTER
    assert api.attention_workspace(None, 1) == 0
    api.attention_init(None, 100)
    api.softmax_init(None, 100)


@pytest.mark.parametrize("room", [0, 1, 5, 33, 200])
def test_messages_stay_in_their_room(rng, room):
    args = good_args(rng)
    args.left = -5
    _, whole = message_of(api.attention_check, args)
    buffer = np.full(256, 0x7E, np.uint8)
    assert api.attention_check(args, buffer.ctypes.data, room) == BAD_VALUE
    assert (buffer[room:] == 0x7E).all()
    if room:
        assert buffer[:room].tobytes().split(b"\0")[0].decode() == whole[: room - 1]


def test_structs_of_other_versions_are_filled_to_their_size():
    size = ctypes.sizeof(AttentionArgs)
    for given in (size - 8, size, size + 24):
        memory = np.full(size + 64, 0x5A, np.uint8)
        api.attention_init(ctypes.cast(memory.ctypes.data, ctypes.POINTER(AttentionArgs)), given)
        assert (memory[given:] == 0x5A).all()
        assert memory[:8].view(np.uint64)[0] == given
        assert (memory[size:given] == 0).all()
        args = ctypes.cast(memory.ctypes.data, ctypes.POINTER(AttentionArgs)).contents
        assert (args.batch, args.num_heads, args.left, args.right) == (1, 1, -1, -1)
        assert np.isnan(args.scale)
        assert message_of(api.attention_check, args)[0] == (OK if given == size else BAD_STRUCT)


# Workspace


@pytest.mark.parametrize("threads", [1, 2])
def test_workspace(rng, threads):
    """The size that is asked for is enough, and no byte beyond it is touched; less, or another address, is refused."""
    for shape in SHAPES:
        arrays = arrays_of(rng, shape, np.float32)
        rules = {"is_causal": True, "sinks": rng.standard_normal(shape[1]), "alibi_slopes": rng.random(shape[1])}
        results = empty_results(*arrays)
        args = attention_args(*arrays, *results, **rules)
        size = api.attention_workspace(args, threads)
        memory = aligned_bytes(size + 256, 0x5C)
        assert api.attention(args, threads, memory.ctypes.data + 64, size - 1) == BAD_WORKSPACE
        assert api.attention(args, threads, memory.ctypes.data + 32, size + 64) == BAD_WORKSPACE
        assert all((result == -77).all() for result in results)
        assert api.attention(args, threads, memory.ctypes.data + 64, size) == OK
        assert (memory[:64] == 0x5C).all() and (memory[64 + size :] == 0x5C).all()
        assert_same_bits(results, in_python(arrays, rules))


def test_workspace_does_not_grow_with_queries_times_keys():
    def size(queries, keys):
        args = AttentionArgs()
        api.attention_init(args, ctypes.sizeof(args))
        args.queries, args.keys, args.head_dim, args.value_dim = queries, keys, 64, 64
        args.query = args.key = args.value = View(64, row=256, col=4)
        args.out = View(1 << 40, row=256, col=4)
        return api.attention_workspace(args, 1)

    assert 0 < size(8000, 8000) < 8000 * 8000 / 8
    assert size(1 << 20, 8000) < 2 * size(8000, 8000)


def test_a_workspace_that_there_cannot_be():
    """Rows of 2**46 times the same number are good arguments, but no tile of them fits into memory. Rounding the size
    up, as C's aligned_alloc wants it, does not make it small, and no workspace is large enough."""
    number, out, memory = np.ones(1, np.float32), np.full(1, -77, np.float32), aligned_bytes(64, 0x5C)
    args = AttentionArgs()
    api.attention_init(args, ctypes.sizeof(args))
    args.queries, args.keys, args.head_dim, args.value_dim = 1, 1, 1 << 46, 1
    args.query = args.key = args.value = View(number.ctypes.data)
    args.out = View(out.ctypes.data)
    size = api.attention_workspace(args, 1)
    most = (1 << 8 * ctypes.sizeof(ctypes.c_size_t)) - 1
    assert message_of(api.attention_check, args) == (OK, "")
    assert 1 << 46 < size <= (size + 63) // 64 * 64 <= most
    for room in (64, size, most):
        assert api.attention(args, 1, memory.ctypes.data, room) == BAD_WORKSPACE
    assert api.attention(args, 1, None, 0) == NO_MEMORY
    assert (out == -77).all() and (memory == 0x5C).all()


def test_many_threads_with_a_workspace_each(rng):
    """At once, under every rule, each with its own memory."""
    shape = SHAPES[0]
    arrays = arrays_of(rng, shape, np.float32)
    cases = [rules for rules in rules_of(rng, shape, np.float32).values() for _ in range(4)]
    expected = [in_python(arrays, rules) for rules in cases]
    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(lambda rules: in_c(arrays, rules, 1, True), cases), expected, strict=True):
            assert_same_bits(found, one)


# Overlap


def random_view(rng, buffer, shape):
    """A view of the buffer with random strides, or None where these leave it."""
    strides = [int(rng.integers(-12, 13)) * int(rng.choice((1, 2, 4))) for _ in shape]
    low = sum(min(0, stride * (n - 1)) for stride, n in zip(strides, shape, strict=True))
    high = sum(max(0, stride * (n - 1)) for stride, n in zip(strides, shape, strict=True)) + 4
    if high - low > buffer.size:
        return None
    begin = -low + int(rng.integers(0, min(buffer.size - high + low, 40) + 1))
    return np.ndarray(shape, np.float32, buffer, begin, strides)


def test_overlap_is_judged_as_in_python(rng):
    """Views of one buffer with random strides: arrays that share no byte are accepted however they interleave."""
    buffer = np.zeros(400, np.uint8)
    key = np.ones((1, 1, 2, 3), np.float32)
    verdicts = {}
    for _ in range(4000):
        query, out = (random_view(rng, buffer, (1, 1, int(rng.integers(1, 4)), 3)) for _ in range(2))
        if query is None or out is None or query.shape != out.shape:
            continue
        args = attention_args(query, key, key, out)
        status = api.attention(args, 1, None, 0)
        buffer[:] = 0
        try:
            fastattn.dot_product_attention(query, key, key, out=out)
            refusal = None
        except ValueError as error:
            refusal = str(error).split(";")[0].split(" (")[0]
        buffer[:] = 0
        assert (status == BAD_OVERLAP) == (refusal is not None), (query.strides, out.strides, refusal)
        if refusal is None:
            assert not np.shares_memory(query, out)
            refusal = "interleaved" if np.may_share_memory(query, out) else "apart"
        else:
            assert message_of(api.attention_check, args)[1].startswith(refusal)
            assert refusal == "out overlaps itself" or np.shares_memory(query, out)
        verdicts[refusal] = verdicts.get(refusal, 0) + 1
    assert min(verdicts[v] for v in ("out overlaps itself", "out overlaps query", "interleaved", "apart")) > 10, (
        verdicts
    )


def test_outputs_may_not_overlap_each_other_or_numbers(rng):
    args = good_args(rng, key_lengths=[[3], [4]], sinks=[1.0] * 4)
    results = args.kept[3:6]
    for name, other, words in (
        ("lse", view(results[2][..., 0]), "lse overlaps weights"),
        ("weights", View(results[0].ctypes.data, 720, 180, 36, 4), "out overlaps weights"),
        ("lse", View(results[1].ctypes.data, 80, 20, 0, 0), "lse overlaps itself"),
        ("lse", View(results[1].ctypes.data, 80, 20, 3, 0), "lse overlaps itself"),
        ("out", view(args.kept[0][..., :3]), "out overlaps query"),
        ("out", View(args.key_lengths, 240, 60, 12, 4), "out overlaps key_lengths"),
    ):
        keep = View.from_buffer_copy(getattr(args, name))
        setattr(args, name, other)
        status, text = message_of(api.attention_check, args)
        assert status == BAD_OVERLAP and text.startswith(words), text
        setattr(args, name, keep)
    args.sinks = results[1].ctypes.data
    assert message_of(api.attention_check, args) == (BAD_OVERLAP, "lse overlaps sinks; it needs memory of its own")


# Versions, settings, processes


def test_versions():
    assert api.api_version == 1 and api.size == 8 + ctypes.sizeof(ctypes.c_void_p) * 15
    assert api.version().decode() == fastattn.__version__
    assert api.instruction_set().decode() == fastattn.cpu_info()["selected"]


def test_the_default_is_the_number_of_threads_that_python_has(rng):
    """The workspace shows it: that of two threads is larger."""
    args = attention_args(*(arrays := arrays_of(rng, SHAPES[1], np.float32)), empty_results(*arrays)[0])
    one, two = (api.attention_workspace(args, threads) for threads in (1, 2))
    before = fastattn.get_num_threads()
    try:
        for threads, size in ((1, one), (2, two)):
            fastattn.set_num_threads(threads)
            assert api.attention_workspace(args, 0) == size
    finally:
        fastattn.set_num_threads(before)


FORK = """
    import os
    import numpy as np
    from c_interface import *
    rng = np.random.default_rng(0)
    arrays = tuple(rng.standard_normal((2, 4, 200, 32)).astype(np.float32) for _ in range(3))
    def call():
        out, lse, weights = empty_results(*arrays)
        assert api.attention(attention_args(*arrays, out), 2, None, 0) == OK
        return out.tobytes()
    before = call()
    child = os.fork()
    if child == 0:
        os._exit(0 if call() == before else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert call() == before
    print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_threads_of_its_own():
    assert fresh_process.run(FORK) == "done\n"


ISA = """
    from c_interface import *
    print(api.instruction_set().decode())
"""


def test_the_instruction_set_is_that_of_the_environment():
    assert fresh_process.run(ISA, FASTATTN_ISA="baseline") == "baseline\n"


# Clients that are compiled

SETUP = """
import os
from glob import glob
import fastattn
from Cython.Build import cythonize
from setuptools import Extension, setup

def extension(name, source, **more):
    return Extension(name, [source], extra_compile_args=["-O1", "-Wall", "-Wno-unused-function"],
                     **{"include_dirs": [fastattn.get_include()], **more})

setup(name="clients", ext_modules=cythonize([
    extension("client", "client.pyx"),
    extension("causal", "causal.pyx"),
    extension("rows", "rows.c"),
    extension("extension", "extension.c"),
    extension("newer", "newer.c", include_dirs=["newer"], define_macros=[("PyInit_extension", "PyInit_newer")]),
], language_level=3))
"""


def compiler():
    """What compiles C here, or None."""
    return shutil.which(os.environ.get("CC", "").split(" ")[0] or "cc") or shutil.which("gcc")


needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C compiler")


def readme(language, number=0):
    """A code block of README's part on embedding."""
    text = README.read_text(encoding="utf-8").partition("\n## Embed it\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[number]


@pytest.fixture(scope="session")
def clients(tmp_path_factory):
    """The compiled extensions by name, and the folder where they are."""
    pytest.importorskip("Cython", reason="building a Cython client needs Cython")
    pytest.importorskip("setuptools", reason="building extensions needs setuptools")
    folder = tmp_path_factory.mktemp("clients")
    for name in ("client.pyx", "extension.c"):
        shutil.copy(SOURCES / name, folder)
    shutil.copy(SOURCES / "extension.c", folder / "newer.c")
    (folder / "causal.pyx").write_text(readme("cython"))
    (folder / "rows.c").write_text(readme("c"))
    (folder / "setup.py").write_text(SETUP)
    header = (Path(fastattn.get_include()) / "fastattn.h").read_text()
    assert header.count("#define FASTATTN_API_VERSION 1\n") == 1
    (folder / "newer").mkdir()
    (folder / "newer" / "fastattn.h").write_text(
        header.replace("#define FASTATTN_API_VERSION 1\n", "#define FASTATTN_API_VERSION 7\n")
    )
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env=fresh_process.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fastattn.h" not in done.stderr, done.stderr  # no warning of the header
    sys.path.insert(0, str(folder))
    try:
        yield {name: importlib.import_module(name) for name in ("client", "causal", "rows", "extension")}, folder
    finally:
        sys.path.remove(str(folder))


def caller(function):
    """`call` of in_c by a client's function of addresses."""

    def call(args, num_threads, workspace):
        address, size = (0, 0) if workspace is None else (workspace.ctypes.data, workspace.size)
        return function(ctypes.addressof(args), num_threads, address, size)

    return call


@needs_compiler
def test_the_structs_are_those_of_the_header(clients):
    assert clients[0]["extension"].layout() == offsets(View) + offsets(AttentionArgs) + offsets(SoftmaxArgs)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_cython_client_from_several_threads(rng, clients, dtype):
    """Without the GIL, with and without workspace and threads of the call's own."""
    client = clients[0]["client"]
    for shape in SHAPES[:2]:
        arrays = arrays_of(rng, shape, dtype)
        cases = [*rules_of(rng, shape, dtype).values(), {"w_score": rng.standard_normal(shape[5]).astype(dtype)}]
        jobs = [(rules, threads, memory) for rules in cases for threads, memory in ((1, True), (1, False), (2, True))]
        expected = [in_python(arrays, rules) for rules in cases for _ in range(3)]

        def run(job, arrays=arrays):
            return in_c(arrays, *job, call=caller(client.call_attention))

        with ThreadPoolExecutor(4) as pool:
            for found, one in zip(pool.map(run, jobs), expected, strict=True):
                assert_same_bits(found, one)


@needs_compiler
def test_a_cython_client_reaches_every_function(rng, clients):
    client = clients[0]["client"]
    args = good_args(rng)
    at = ctypes.addressof(args)
    assert client.about() == (1, fastattn.__version__, fastattn.cpu_info()["selected"], api.status_text(-4).decode())
    assert client.workspace(at, 1) == api.attention_workspace(args, 1)
    assert client.check(at) == (OK, "")
    args.left = -7
    assert client.check(at) == message_of(api.attention_check, args)
    attention, softmax = AttentionArgs(), SoftmaxArgs()
    api.attention_init(attention, ctypes.sizeof(attention))
    api.softmax_init(softmax, ctypes.sizeof(softmax))
    assert client.defaults() == (bytes(attention), bytes(softmax))
    for dtype, short in ((np.float32, "f32"), (np.float64, "f64")):
        arrays = arrays_of(rng, (2, 4, 2, 20, 30, 8, 6), dtype)
        out = empty_results(*arrays)[0]
        addresses = [array.ctypes.data for array in (out, *arrays)]
        sizes = [2, 4, 2, 20, 30, 8, 6, -1, 0]
        assert client.flat(f"dot_product_attention_{short}", *addresses, sizes, np.nan, 1) == OK
        assert problems.bits(out) == problems.bits(in_python(arrays, {"is_causal": True})[0])
        x = arrays[0].reshape(-1, 8)
        rows = np.empty_like(x)
        assert client.flat(f"softmax_{short}", rows.ctypes.data, x.ctypes.data, 0, 0, [*x.shape], 0.0, 1) == OK
        assert problems.bits(rows) == problems.bits(fastattn.softmax(x))
        by_struct = np.empty_like(x)[None]
        args = softmax_args("log_softmax", x[None], by_struct)
        assert client.check_softmax(ctypes.addressof(args)) == (OK, "")
        assert client.call_softmax(ctypes.addressof(args), 1) == OK
        assert problems.bits(by_struct[0]) == problems.bits(fastattn.log_softmax(x))


@needs_compiler
def test_a_c_extension_with_the_gil_held(rng, clients):
    """From the thread that holds it, and from one that Python does not know."""
    extension = clients[0]["extension"]
    for shape in SHAPES:
        arrays = arrays_of(rng, shape, np.float32)
        for rules in rules_of(rng, shape, np.float32).values():
            expected = in_python(arrays, rules)
            for function in (extension.call_here, extension.call_from_a_thread_of_its_own):
                for threads, memory in ((1, True), (2, False)):
                    assert_same_bits(in_c(arrays, rules, threads, memory, caller(function)), expected)


@needs_compiler
def test_a_header_that_is_newer_than_the_library_is_refused(clients):
    code = f"import sys; sys.path.insert(0, {str(clients[1])!r}); import newer"
    status, _, error = fresh_process.finish(fresh_process.start(code))
    assert status == 1
    words = f"the installed fastattn {fastattn.__version__} has version 1"
    assert error.rstrip().endswith(f"ImportError: compiled for version 7 of fastattn's C interface; {words}")


@needs_compiler
def test_a_library_without_the_interface_is_refused(clients, tmp_path):
    (tmp_path / "fastattn").mkdir()
    (tmp_path / "fastattn" / "__init__.py").write_text("__version__ = '0.1.0'")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(clients[1])!r}]; import rows"
    status, _, error = fresh_process.finish(fresh_process.start(code))
    assert status == 1
    words = "the installed fastattn is older than 0.2.0, the first version with a C interface"
    assert error.rstrip().endswith(f"ImportError: {words}"), error


@needs_compiler
def test_blocks_of_readme(rng, clients):
    query, key, value = (rng.standard_normal((4, 30, 16)).astype(np.float32) for _ in range(3))
    out = np.zeros_like(query)
    assert clients[0]["causal"].causal(query, key, value, out) == OK
    assert problems.bits(out) == problems.bits(fastattn.dot_product_attention(query, key, value, is_causal=True))
    x = rng.standard_normal(50).astype(np.float32)
    expected = fastattn.softmax(x)
    assert clients[0]["rows"].softmax(x) is None
    assert problems.bits(x) == problems.bits(expected)


@needs_compiler
@pytest.mark.parametrize("with_python", [False, True])
def test_the_header_compiles_without_a_warning(tmp_path, with_python):
    """As C11 and C++17, by whatever compilers there are."""
    import sysconfig

    text = ("#include <Python.h>\n" if with_python else "") + "#include <fastattn.h>\n#include <fastattn.h>\n"
    text += "int use(void);\nint use(void) { fastattn_attention_args a; " + (
        "if (import_fastattn() < 0) return -1; " if with_python else ""
    )
    text += "fastattn_attention_init(&a); return fastattn_attention(&a, 1, NULL, 0); }\n"
    found = 0
    for name, standard, ending in (("gcc", "c11", "c"), ("clang", "c11", "c"), ("g++", "c++17", "cpp"),
                                   ("clang++", "c++17", "cpp")):  # fmt: skip
        if shutil.which(name) is None:
            continue
        source = tmp_path / f"use.{ending}"
        source.write_text(text)
        done = subprocess.run(
            [name, f"-std={standard}", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror",
             f"-I{fastattn.get_include()}", "-isystem", sysconfig.get_path("include"), "-fsyntax-only", str(source)],
            capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        found += 1
    if not found:
        pytest.skip("none of gcc, clang, g++ and clang++ is here")


# Through the capsules of Cython


def test_ctypes_by_name(rng):
    capsule = cython_attention.__pyx_capi__["softmax_f32"]
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
    address = capsule_address(capsule, name(capsule))
    softmax = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2, ctypes.c_int)(address)
    x = rng.standard_normal((3, 40)).astype(np.float32)
    out = np.empty_like(x)
    assert softmax(out.ctypes.data, x.ctypes.data, 3, 40, 1) == OK
    assert problems.bits(out) == problems.bits(fastattn.softmax(x))


def test_numba_without_the_gil(rng):
    """README's block, called by several threads."""
    pytest.importorskip("numba", reason="the test needs numba")
    names = {}
    exec(readme("python"), names)
    arrays = [rng.standard_normal((30, 200)).astype(np.float32) for _ in range(8)]
    expected = [fastattn.softmax(x) for x in arrays]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(names["softmax_in_place"], arrays)) == [OK] * 8
    for x, right in zip(arrays, expected, strict=True):
        assert problems.bits(x) == problems.bits(right)


# Without Python

DOORS = os.environ.get("FASTATTN_DOORS")
needs_libraries = pytest.mark.skipif(
    not DOORS, reason="FASTATTN_DOORS names no folder of static libraries; .ci/doors does"
)
PROGRAMS = [("cc", "serial"), ("cc", "openmp"), ("c++", "serial"), ("c++", "openmp")]


def build_program(folder, source, language, library, counting=()):
    """A program of C or C++ and one of the libraries."""
    standard = ["-x", "c", "-std=gnu11"] if language == "cc" else ["-x", "c++", "-std=c++17"]
    flags = ["-fopenmp"] if library == "openmp" else counting
    target = folder / f"program-{language}-{library}"
    done = subprocess.run(
        [language, *standard, "-O2", "-Wall", "-Wextra", "-Werror", f"-I{DOORS}/include", str(source), "-x", "none",
         f"{DOORS}/libfastattn-{library}.a", *flags, "-lm", "-o", str(target)],
        capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target


def written(folder, jobs):
    """The files of a program: calls, and the bytes of all that they point to; and where each result is there."""
    arrays = [array for args, *_ in jobs for array in args.kept if array is not None]
    memory = np.zeros(sum(array.nbytes + 64 for array in arrays) + 64, np.uint8)
    end, calls, places = 64, b"", []
    for args, threads, with_workspace in jobs:
        copy, moved = AttentionArgs.from_buffer_copy(args), {}
        for array in args.kept:
            if array is not None:
                whole = np.ascontiguousarray(array)
                memory[end : end + whole.nbytes] = np.frombuffer(whole.tobytes(), np.uint8)
                moved[array.ctypes.data] = (end, whole)
                end = -(-(end + whole.nbytes) // 64) * 64
        for name, kind in AttentionArgs._fields_:
            field = getattr(copy, name)
            if kind is View and field.data:
                begin, whole = moved[field.data]
                names = ("batch", "head", "row", "col")
                setattr(copy, name, View(begin, **dict(zip(names, whole.strides, strict=False))))
            elif kind is ctypes.c_void_p and field:
                setattr(copy, name, moved[field][0])
        calls += np.array([threads, with_workspace], np.int64).tobytes() + bytes(copy)
        places.append([None if result is None else moved[result.ctypes.data][0] for result in args.kept[3:6]])
    (folder / "calls").write_bytes(calls)
    (folder / "data").write_bytes(memory.tobytes())
    return places


@needs_libraries
@pytest.mark.parametrize(("language", "library"), PROGRAMS)
def test_programs_without_python(rng, tmp_path, language, library):
    """Each rule in each dtype, from files and back, and no allocation by a thread that has a workspace."""
    jobs, expected = [], []
    for n, dtype in enumerate(DTYPES):
        for shape in (*SHAPES[:2], (1, 4, 1, 3, 2500, 16, 16))[: 3 if n < 2 else 1]:
            arrays = arrays_of(rng, shape, dtype)
            cases = [*rules_of(rng, shape, dtype).values(), {"w_score": rng.standard_normal(shape[5]).astype(dtype)}]
            for rules in cases:
                for threads, memory in ((1, True), (2, len(jobs) % 4 < 2), (0, False)):
                    out, lse, weights = empty_results(*arrays)
                    lse = None if rules.get("activation", "softmax") != "softmax" else lse
                    jobs.append((attention_args(*arrays, out, lse, weights, **rules), threads, memory))
                    expected.append(in_python(arrays, rules))
    places = written(tmp_path, jobs)
    counting = ("-DWRAP_MALLOC", "-Wl,--wrap=malloc")
    program = build_program(tmp_path, SOURCES / "program.c", language, library, counting)
    selected = fastattn.cpu_info()["selected"]
    done = subprocess.run([program, "calls", "data"], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, "FASTATTN_ISA": selected})  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{selected}\n"), done.stderr
    data = (tmp_path / "data").read_bytes()
    for (args, threads, memory), found, right in zip(jobs, places, expected, strict=True):
        for name, place, result in zip(("out", "lse", "weights"), found, right, strict=True):
            if place is not None:
                assert data[place : place + result.nbytes] == problems.bits(result), (name, threads, memory, args.dtype)


@needs_libraries
def test_instruction_sets_of_a_program(tmp_path):
    """FASTATTN_ISA holds; what it does not know, or the CPU cannot run, is ignored."""
    program = build_program(tmp_path, SOURCES / "program.c", "cc", "serial")
    for name in ("calls", "data"):
        (tmp_path / name).write_bytes(b"")
    runnable = fastattn.cpu_info()["runnable"]
    for chosen, used in [(name, name) for name in runnable] + [("sse9", runnable[0]), ("", runnable[0])]:
        done = subprocess.run([program, "calls", "data"], cwd=tmp_path, capture_output=True, text=True, check=True,
                              env={**os.environ, "FASTATTN_ISA": chosen})  # fmt: skip
        assert done.stdout == f"{used}\n"


@needs_libraries
@pytest.mark.parametrize(("language", "library"), PROGRAMS)
def test_the_program_of_readme(tmp_path, language, library):
    (tmp_path / "program.c").write_text(readme("c", 1))
    program = build_program(tmp_path, tmp_path / "program.c", language, library)
    done = subprocess.run([program], cwd=tmp_path, capture_output=True, text=True, check=True)
    x = np.arange(512, dtype=np.float32)[:, None] % 7 * np.ones(64, np.float32)
    out = fastattn.dot_product_attention(x, x, x, window_size=(100, 0))
    assert done.stdout == f"{out[511, 0]:.6f}\n"


PLUGIN = """
#include "threads.h"
int run(void)
{
    void *team;
    int growing;
    const int threads = fa_gather(3, &team, &growing);
#pragma omp parallel num_threads(threads)
    fa_join_team(team, growing);
    return threads;
}
"""


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems may keep what is unloaded")
def test_a_library_that_is_unloaded_before_its_threads_end(tmp_path):
    """As a plug-in of another program, which has the kernels compiled along, and an OpenMP library that stays."""
    kernels = HERE.parent / "fastattn" / "kernels"
    if not kernels.exists():
        pytest.skip("only an unpacked source distribution or a clone has the kernels")
    (tmp_path / "plugin.c").write_text(PLUGIN)
    command = [compiler(), "-std=gnu11", "-fPIC", "-shared", "-fopenmp", f"-I{kernels}", "plugin.c"]
    built = subprocess.run(
        [*command, kernels / "threads.c", "-o", "plugin.so"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if built.returncode:
        pytest.skip(f"no OpenMP: {built.stderr}")
    fresh_process.run(f"""
    import _ctypes, ctypes, threading
    def use():
        plugin = ctypes.CDLL({str(tmp_path / "plugin.so")!r})
        assert plugin.run() >= 1
        with open("/proc/self/maps") as file:
            paths = [line.split()[-1] for line in file if "/libgomp" in line or "/libomp" in line]
        ctypes.CDLL(paths[0])
        _ctypes.dlclose(plugin._handle)
    for _ in range(2):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    """)


def test_the_table_is_wide_enough():
    """What tests compare is what is computed: lse and weights are as wide as the computation."""
    assert [wide(np.dtype(dtype)).name for dtype in DTYPES[:3]] == ["float32", "float64", "float32"]
