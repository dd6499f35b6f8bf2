"""Hostile arguments of every kind, at random, for every public function: a right result or an error that names one.

Each call starts from a good one and replaces some arguments. Allowed are a result, compared with the reference where
that is defined and cheap, and TypeError, ValueError or MemoryError; not allowed are a crash, another exception, a
warning, and an output that was touched by a call that raised. The calls are the same in every run:

    FASTATTN_FUZZ=100000 python -m pytest tests/test_fuzz.py    that many for each function
    FASTATTN_FUZZ=7:300 ...                                     only number 300 of seed 7
"""

import array
import ctypes
import inspect
import math
import os
import random
import warnings

import numpy as np
import pytest
from faults import bits, normal
from test_arguments import CALLS

import fastattn
from fastattn import reference

SENTINEL = 12345.0
ASKED = os.environ.get("FASTATTN_FUZZ", "250")
SEED, EXAMPLES = 0, range(int(ASKED)) if ":" not in ASKED else None
if EXAMPLES is None:
    SEED, only = map(int, ASKED.split(":"))
    EXAMPLES = range(only, only + 1)

X, GRAD = normal(0, 3, 4, 5), normal(1, 3, 4, 5)
Y = fastattn.softmax(X)
ROWS = {
    **{name: {"x": X} for name in ("softmax", "log_softmax", "sparsemax", "entmax15", "logsumexp")},
    **{f"{name}_vjp": {"grad_out": GRAD, "output": Y} for name in ("softmax", "log_softmax", "sparsemax", "entmax15")},
    "logsumexp_vjp": {"grad_out": GRAD[..., 0], "x": X},
    "apply_rotary": {"x": normal(2, 3, 4, 6)},
    "pack": {"x": normal(3, 2, 5, 4), "lengths": [3, 5]},
    "unpack": {"packed": normal(3, 8, 4), "cu_seqlens": [0, 3, 8]},
    "quantize_kv": {"key": X, "value": GRAD, "center": normal(5, 3, 1, 5), "block": 5, "scale_dtype": np.float16},
    "from_llama_cpp": {"blocks": np.arange(68, dtype=np.uint8), "format": "q8_0"},
    "prepare_additive_keys": {"key": normal(3, 2, 5, 4), "w_key": normal(4, 4, 6)},
    "layer_norm": {"x": X, "weight": normal(3, 5), "bias": normal(4, 5), "residual": GRAD, "eps": 1e-3},
    "rms_norm": {"x": X, "weight": normal(3, 5), "residual": GRAD, "eps": 1e-3, "offset": 1.0},
    "merge_attention": {"outs": [X, GRAD], "lses": [X[..., 0], GRAD[..., 0]]},
    "merge_attention_vjp": {"grad_out": X, "outs": [X, GRAD], "lses": [X[..., 0], GRAD[..., 0]]},
    "alibi_slopes": {"num_heads": 4},
    "relative_position_buckets": {"query_length": 4, "key_length": 5},
    "rotary_frequencies": {"dim": 8, "scaling": {"rope_type": "linear", "factor": 2.0}},
    "sinusoidal_encoding": {"length": 4, "dim": 6},
    "set_num_threads": {"num_threads": 2},
}
W = {name: normal(3 + i, 8, 8) for i, name in enumerate(("w_query", "w_key", "w_value", "w_out"))}
LAYER = fastattn.MultiHeadAttention(**W, num_heads=2, rotary_base=1e4)
UNTURNED = fastattn.MultiHeadAttention(**W, num_heads=2)
TOKENS = normal(9, 2, 3, 8)
PRODUCT = fastattn.Linear(normal(32, 8, 5), normal(33, 5))
INT8 = np.clip(normal(36, 8, 5) * 40, -127, 127).astype(np.int8)
PROJECTED = UNTURNED.project_context(TOKENS)
PREPARED = fastattn.prepare_additive_keys(normal(6, 2, 5, 4))


def cache(window=None, **options):
    made = fastattn.KVCache((2,), 2, 9, 4, window=window, **options)
    made.append(normal(10, 2, 2, 4, 4), normal(11, 2, 2, 4, 4))
    return made


def stream():
    made = fastattn.StreamingAttention(3, 1)
    made.push(*[normal(s, 2, 4, 4) for s in range(3)])
    return made


def layer_stream():
    made = fastattn.StreamingMultiHeadAttention(LAYER, 3, 1)
    made.push(TOKENS, normal(30, 2, 3, 5))
    return made


def dequantize(key, value, key_scale, value_scale, key_center=None):
    return fastattn.QuantizedKV(key, value, key_scale, value_scale, key_center).dequantize()


PAIR = {"key": normal(12, 2, 2, 3, 4), "value": normal(13, 2, 2, 3, 4)}
TORCH = {"in_proj_weight": normal(14, 24, 8), "in_proj_bias": normal(15, 24), "out_proj.weight": normal(16, 8, 8),
         "out_proj.bias": normal(17, 8)}  # fmt: skip
LLAMA = {f"layers.1.self_attn.{x}_proj.weight": normal(18, 8, 8) for x in "qkvo"}
BERT = {f"encoder.layer.0.attention.{part}.{what}": normal(19, *[8] * (1 + (what == "weight")))
        for part in ("self.query", "self.key", "self.value", "output.dense")
        for what in ("weight", "bias")}  # fmt: skip
LINEAR = {f"{x}.weight": normal(20, 8, 8) for x in "qkvo"}
NORMED = {**LLAMA, **{f"layers.1.self_attn.{x}_norm.weight": normal(29, 4) for x in "qk"}}
GPT2 = {"h.0.attn.c_attn.weight": normal(30, 8, 24), "h.0.attn.c_attn.bias": normal(31, 24),
        "h.0.attn.c_proj.weight": normal(32, 8, 8)}  # fmt: skip
DISTILBERT = {f"transformer.layer.0.attention.{x}_lin.weight": normal(33, 8, 8) for x in ("q", "k", "v", "out")}
VIT = {f"encoder.layer.0.attention.{part}.weight": normal(34, 8, 8)
       for part in ("attention.query", "attention.key", "attention.value", "output.dense")}  # fmt: skip
WHISPER = {f"decoder.layers.0.encoder_attn.{x}_proj.weight": normal(35, 8, 8) for x in ("q", "k", "v", "out")}
T5 = {f"decoder.block.0.layer.0.SelfAttention.{x}.weight": normal(36, 8, 8) for x in "qkvo"}
T5["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = normal(37, 8, 2)
KERAS = [normal(21, 8, 2, 4), normal(22, 2, 4), normal(23, 8, 2, 4), normal(24, 2, 4), normal(25, 8, 2, 4),
         normal(26, 2, 4), normal(27, 2, 4, 8), normal(28, 8)]  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
FROM = fastattn.MultiHeadAttention

# By name: makes the callable (a method's object is new for each call), and the arguments of a good call.
TARGETS = {name: (lambda name=name: (getattr(fastattn, name), ()), call) for name, call in {**CALLS, **ROWS}.items()}
TARGETS |= {
    "KVCache": (lambda: (fastattn.KVCache, ()), {"batch_shape": (2,), "num_kv_heads": 2, "capacity": 5, "head_dim": 4}),
    "KVCache, int8": (
        lambda: (fastattn.KVCache, ()),
        {
            **{"batch_shape": (2,), "num_kv_heads": 2, "capacity": 5, "head_dim": 4, "dtype": "int8"},
            **{"block": 2, "center": normal(5, 2, 2, 1, 4)},
        },
    ),
    "KVCache.append, int8": (lambda: (lambda c: (c.append, (c,)))(cache(dtype="int8", center="mean")), PAIR),
    "KVCache.append, int8, window": (lambda: (lambda c: (c.append, (c,)))(cache(4, dtype="int8")), PAIR),
    "QuantizedKV": (lambda: (dequantize, ()), fastattn.quantize_kv(X, GRAD, center="mean")._asdict()),
    "KVCache.append": (lambda: (lambda c: (c.append, (c,)))(cache()), PAIR),
    "KVCache.append, window": (lambda: (lambda c: (c.append, (c,)))(cache(4)), PAIR),
    "KVCache.crop": (lambda: (lambda c: (c.crop, (c,)))(cache()), {"lengths": [1, 2]}),
    "KVCache.select": (lambda: (lambda c: (c.select, (c,)))(cache()), {"indices": [1, 0, 1]}),
    "StreamingAttention": (lambda: (fastattn.StreamingAttention, ()), {"left": 3, "right": 1}),
    "StreamingAttention.push": (
        lambda: (lambda s: (s.push, (s,)))(stream()),
        {name: normal(s, 2, 4, 4) for s, name in enumerate(("query", "key", "value"))},
    ),
    "StreamingAttention.push, first": (
        lambda: (lambda s: (s.push, (s,)))(fastattn.StreamingAttention(3, 1)),
        {name: normal(s, 2, 4, 4) for s, name in enumerate(("query", "key", "value"))}
        | {"relative_bias": normal(30, 2, 4, 5)},
    ),
    "StreamingMultiHeadAttention": (
        lambda: (fastattn.StreamingMultiHeadAttention, ()),
        {"layer": LAYER, "left": 3, "right": 1},
    ),
    "StreamingMultiHeadAttention.push": (
        lambda: (lambda s: (s.push, (s,)))(layer_stream()),
        {"x": TOKENS, "relative_bias": normal(31, 2, 3, 5)},
    ),
    "MultiHeadAttention": (lambda: (FROM, ()), {**W, "num_heads": 2}),
    "Linear": (lambda: (fastattn.Linear, ()), {"weight": normal(32, 8, 5), "bias": normal(33, 5)}),
    "Linear, int8": (
        lambda: (fastattn.Linear, ()),
        {"weight": INT8, "bias": normal(33, 5), "weight_scale": normal(37, 5), "dtype": np.int8},
    ),
    "Linear(), int8": (
        lambda: (fastattn.Linear(INT8, weight_scale=0.1), ()),
        {"x": TOKENS, "multiply": normal(34, 2, 3, 5), "residual": normal(35, 2, 3, 5)},
    ),
    "Linear()": (
        lambda: (PRODUCT, ()),
        {"x": TOKENS, "activation": "silu", "multiply": normal(34, 2, 3, 5), "residual": normal(35, 2, 3, 5)},
    ),
    "MultiHeadAttention()": (lambda: (LAYER, ()), {"x": TOKENS}),
    "MultiHeadAttention(), packed": (lambda: (LAYER, ()), {"x": TOKENS[0], "cu_seqlens": [0, 1, len(TOKENS[0])]}),
    "MultiHeadAttention(), projected": (lambda: (UNTURNED, ()), {"x": TOKENS, "context": PROJECTED}),
    "project_context": (lambda: (UNTURNED.project_context, ()), {"context": TOKENS}),
    "additive_attention, prepared": (
        lambda: (fastattn.additive_attention, ()),
        {"query": normal(3, 2, 5, 4), "key": PREPARED, "value": normal(4, 2, 5, 3), "w_score": normal(5, 4)},
    ),
    "MultiHeadAttention.vjp": (lambda: (LAYER.vjp, ()), {"x": TOKENS}),
    "from_torch": (lambda: (FROM.from_torch, ()), {"state": TORCH, "num_heads": 2}),
    "from_linear": (
        lambda: (FROM.from_linear, ()),
        {"state": LINEAR, "query": "q", "key": "k", "value": "v", "out": "o", "num_heads": 2},
    ),
    "from_bert": (lambda: (FROM.from_bert, ()), {"state": BERT, "layer": 0, "num_heads": 2}),
    "from_llama": (
        lambda: (FROM.from_llama, ()),
        {"state": LLAMA, "layer": 1, "num_heads": 2, "rope_parameters": LLAMA3},
    ),
    "from_keras": (lambda: (FROM.from_keras, ()), {"weights": KERAS}),
    "MultiHeadAttention, held rules": (
        lambda: (FROM, ()),
        {
            **W,
            "num_heads": 2,
            "q_norm": normal(38, 4),
            "window_size": (2, 1),
            "relative_bias": normal(39, 2, 1, 4),
            "sinks": normal(40, 2),
            "scale": 0.5,
        },
    ),
    "from_packed": (
        lambda: (FROM.from_packed, ()),
        {
            "w_qkv": GPT2["h.0.attn.c_attn.weight"],
            "b_qkv": GPT2["h.0.attn.c_attn.bias"],
            "w_out": normal(41, 8, 8),
            "num_heads": 2,
            "layout": "interleaved",
        },
    ),
    "from_gpt2": (lambda: (FROM.from_gpt2, ()), {"state": GPT2, "layer": 0, "num_heads": 2}),
    "from_distilbert": (lambda: (FROM.from_distilbert, ()), {"state": DISTILBERT, "layer": 0, "num_heads": 2}),
    "from_vit": (lambda: (FROM.from_vit, ()), {"state": VIT, "layer": 0, "num_heads": 2}),
    "from_whisper": (
        lambda: (FROM.from_whisper, ()),
        {"state": WHISPER, "layer": 0, "num_heads": 2, "part": "cross"},
    ),
    "from_t5": (
        lambda: (FROM.from_t5, ()),
        {"state": T5, "layer": 0, "num_heads": 2, "part": "decoder", "max_length": 9},
    ),
    "from_qwen": (
        lambda: (FROM.from_qwen, ()),
        {"state": NORMED, "layer": 1, "num_heads": 2, "rotary_base": 1e4, "rope_parameters": LLAMA3},
    ),
    "from_gemma": (
        lambda: (FROM.from_gemma, ()),
        {
            "state": NORMED,
            "layer": 1,
            "num_heads": 2,
            "rotary_base": 1e4,
            "query_pre_attn_scalar": 5.0,
            "sliding_window": 3,
        },
    ),
    **{
        f"rotary_frequencies, {kind}": (
            lambda: (fastattn.rotary_frequencies, ()),
            {"dim": 8, "scaling": scaling, "length": 80, "max_positions": 128},
        )
        for kind, scaling in (("yarn", YARN), ("llama3", LLAMA3), ("longrope", LONG))
    },
}
NO_ARGUMENTS = {"cpu_info", "get_include", "get_num_threads", "show_config"}


# ------------------------------------------------------------------------------------- hostile values


class Raises:
    """Every question is answered by an error of its own."""

    def __getattr__(self, name):
        raise AttributeError(name)

    def __index__(self):
        raise ZeroDivisionError("__index__")

    def __float__(self):
        raise ZeroDivisionError("__float__")

    def __len__(self):
        raise ZeroDivisionError("__len__")

    def __array__(self, dtype=None, copy=None):
        raise ZeroDivisionError("__array__")


class LiesAboutItsLength:
    def __len__(self):
        return 2**40

    def __getitem__(self, i):
        if i > 3:
            raise IndexError
        return 1.0


class NoArray:
    def __array__(self, dtype=None, copy=None):
        return "no array"


class Interface:
    """
    An odd __array_interface__. None leads outside of its memory: NumPy believes what it says, and nobody can know.
    """

    def __init__(self, **changes):
        self.__array_interface__ = {"shape": (16,), "typestr": "<f4", "data": bytearray(4096), "version": 3, **changes}


class Sub(np.ndarray):
    pass


def recursive():
    x = [1.0]
    x.append(x)
    return x


SCALARS = (
    None, True, False, math.nan, math.inf, -math.inf, -1, -2, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**62,
    2**63 - 1, 2**63, 2**64, -(2**63), -(2**70), 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320, -3.5, 1j, "text",
    "", "softmax", "band", "clamp", b"bytes", object(), (), [], {}, set(), [None], (None, None), (1, 2),
    (2, -1), [0, 2], (1, 2, 3), [[1], [2, 3]], range(3), slice(2), Ellipsis, NotImplemented, len, int,
    np.float32(math.nan), np.int64(-3), np.int8(2), np.uint64(2**64 - 1), np.bool_(True), np.float16(2),
    np.longdouble(1.5), np.datetime64("2020-01-01"), np.str_("x"), np.array(3), np.array(2.5), np.array(True),
    np.array([]), np.array([], object), np.array([2**63], np.uint64), np.array("x"), np.ma.masked,
    np.dtype("f4"), np.float64, "float32", "f2", ">f4",
    np.zeros((1,) * 40 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 1, np.float32),
)  # fmt: skip


def made_hostile(r):
    """A value that is not derived from a good one."""
    return r.choice((
        lambda: r.choice(SCALARS),
        lambda: r.choice(SCALARS),
        lambda: r.choice(SCALARS),
        recursive,
        Raises,
        NoArray,
        LiesAboutItsLength,
        lambda: Interface(shape=r.choice([(17,), (2**40, 2**40), (-1,), (16, 2), (), (0,), None, "x", (16.0,)])),
        lambda: Interface(typestr=r.choice(["<f8", "<f2", ">f4", "|O", "V4", "", None, "<f3"])),
        lambda: Interface(strides=r.choice([(8,), (0,), (4, 4), None, "x"])),
        lambda: Interface(data=r.choice([None, (), 1.5, "text"])),
        lambda: array.array("f", [1, 2, 3, 4]),
        lambda: (ctypes.c_float * 4)(1, 2, 3, 4),
        lambda: memoryview(b"abcd"),
        lambda: np.float32(r.gauss(0, 1)),
        lambda: r.randint(-9, 9),
        lambda: [r.randint(-2, 9) for _ in range(r.randint(0, 4))],
        lambda: np.array([r.randint(-2, 9) for _ in range(r.randint(0, 4))]),
        lambda: normal(r.randint(0, 99), *[r.randint(0, 8) for _ in range(r.randint(0, 5))]),
        lambda: normal(r.randint(0, 99), *[r.randint(0, 8) for _ in range(r.randint(0, 4))]) > 0,
        lambda: normal(r.randint(0, 99), 5, 7),
        lambda: normal(r.randint(0, 99), 5, 7) > 0,
        lambda: np.array([[3, 4, 5], [1, 0, 7]]),
    ))()  # fmt: skip


def misaligned(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    memory[...] = x
    return memory


def spread(x, step):
    """The same numbers with other strides."""
    memory = np.zeros([n * abs(step) for n in x.shape], x.dtype)
    view = memory[tuple(slice(None, None, step) for _ in x.shape)]
    view[...] = x
    return view


def changed(r, x):
    """Another form of a good array, or one that is wrong."""
    axis = r.randrange(x.ndim) if x.ndim else 0
    return r.choice((
        lambda: misaligned(x),
        lambda: spread(x, 2),
        lambda: spread(x, -1),
        lambda: spread(x, -3),
        lambda: np.asfortranarray(x),
        lambda: x.astype(x.dtype.newbyteorder()),
        lambda: x.view(Sub),
        lambda: np.ma.masked_array(x),
        lambda: np.broadcast_to(x[tuple(slice(0, 1) for _ in x.shape)], x.shape),
        lambda: x.astype(r.choice(["f2", "f4", "f8", "g", "c8", "i1", "u8", "?", "O", "S8", "M8[s]", "V4"])),
        lambda: x.tolist(),
        lambda: tuple(x.tolist()) if x.ndim else x,
        lambda: memoryview(np.ascontiguousarray(x)),
        lambda: Interface(shape=x.shape, typestr=x.dtype.str, data=bytearray(x.tobytes())),
        lambda: Interface(shape=(*x.shape[:-1], 9), typestr=x.dtype.str, data=bytearray(9 * max(x.nbytes, 8))),
        lambda: x[..., :0],
        lambda: x[:0],
        lambda: x.take([], axis) if x.ndim else x,
        lambda: x.repeat(2, axis) if x.ndim else x,
        lambda: x.take([0], axis) if x.ndim else x,
        lambda: x[None],
        lambda: x[..., None],
        lambda: x[0] if x.ndim and len(x) else x,
        lambda: x.ravel(),
        lambda: x.T,
        lambda: x * np.float32(math.nan) if x.dtype.kind == "f" else x,
        lambda: x + np.float32(math.inf) if x.dtype.kind == "f" else x,
        lambda: np.array(x, dtype=x.dtype, ndmin=r.choice([8, 31, 32])),
    ))()  # fmt: skip


def changed_mapping(r, x):
    """A mapping with entries gone, changed or added."""
    y = dict(x)
    for _ in range(r.randint(1, 2)):
        name = r.choice(list(y) or ["name"])
        kind = r.randrange(4)
        if kind == 0:
            y.pop(name, None)
        elif kind == 1:
            y[r.choice([f"{name}x", "bias_k", "", 3, None, ("a",)])] = y.get(name)
        elif kind == 2 and isinstance(y.get(name), np.ndarray):
            y[name] = changed(r, y[name])
        else:
            y[name] = made_hostile(r)
    return y


def hostile(r, good):
    if isinstance(good, np.ndarray) and r.random() < 0.7:
        return changed(r, good)
    if isinstance(good, dict) and r.random() < 0.85:
        return changed_mapping(r, good)
    if isinstance(good, (list, tuple)) and good and r.random() < 0.6:
        y = list(good)
        at = r.randrange(len(y))
        y[at] = hostile(r, y[at]) if r.random() < 0.8 else y[0]
        if r.random() < 0.2:
            del y[at]
        return y
    return made_hostile(r)


# --------------------------------------------------------------------------------------------- outputs


def outputs_for(r, result, arguments):
    """`out` for a call with this result: mostly good, sometimes hostile. Returns it and the arrays to watch."""
    if not isinstance(result, np.ndarray):
        return None
    out = np.full(result.shape, SENTINEL, result.dtype)
    return r.choice((
        lambda: out,
        lambda: out,
        lambda: misaligned(out),
        lambda: spread(out, -1),
        lambda: spread(out, 2),
        lambda: out.astype(out.dtype.newbyteorder()),
        lambda: out[..., :0],
        lambda: out[None],
        lambda: out.astype(np.float64),
        lambda: out.view(Sub),
        lambda: np.lib.stride_tricks.as_strided(out, out.shape, (0,) * out.ndim),
        lambda: np.broadcast_to(out, out.shape),
        lambda: next((x for x in arguments.values() if isinstance(x, np.ndarray) and x.shape == out.shape), out),
        lambda: np.ma.masked_array(out),
        lambda: out.tolist(),
    ))()  # fmt: skip


def names_one(message, names):
    return any(name in message for name in names)


SMALL = 100.0


def is_tame(x):
    """Whether all numbers are finite and small, so that a comparison with the reference means something."""
    if isinstance(x, (list, tuple)):
        return all(map(is_tame, x))
    if isinstance(x, dict):
        return all(map(is_tame, x.values()))
    if isinstance(x, np.ndarray) and x.dtype.kind in "fiub":
        return x.dtype != np.float16 and x.size < 10_000 and bool((abs(np.asarray(x, np.float64)) < SMALL).all())
    return isinstance(x, (bool, int, float, str, type(None))) and (isinstance(x, str) or x is None or abs(x) < SMALL)


def compare(name, result, arguments):
    """With the reference, where it takes the same arguments."""
    function = getattr(reference, name, None)
    given = {key: x for key, x in arguments.items() if key not in ("num_threads", "out")}
    if function is None or not set(given) <= set(inspect.signature(function).parameters) or not is_tame(given):
        return False
    if isinstance(given.get("axis"), list):
        return False  # the reference is NumPy, which wants a tuple
    with np.errstate(all="ignore"):
        expected = function(**given)
    for a, b in zip(*((x if isinstance(x, (tuple, list)) else (x,)) for x in (result, expected)), strict=True):
        if isinstance(a, np.ndarray):
            scale = max(1.0, float(np.abs(b[np.isfinite(b)]).max(initial=0.0))) if np.size(b) else 1.0
            np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=1e-3, atol=2e-4 * scale, equal_nan=True)
    return True


def attempt(name, number):
    """One call. Returns "refused", "right" or "ran"."""
    r = random.Random(f"{SEED} {name} {number}")
    make, good = TARGETS[name]
    function, watched = make()
    parameters = inspect.signature(function).parameters
    names = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    arguments = dict(good)
    for target in r.sample(names, min(len(names), r.choice([1, 1, 1, 2, 3]))):
        arguments[target] = hostile(r, good.get(target))
    if "num_threads" in names and r.random() < 0.5:
        arguments["num_threads"] = r.choice([1, 2, 3])
    arguments.pop("cache", None)
    if "cache" in names and r.random() < 0.5:
        arguments["cache"] = made = cache(r.choice([None, 4]))
        watched = (made,)
    out = None
    if "out" in names and "out" not in arguments and r.random() < 0.5:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = outputs_for(r, function(**arguments), arguments)
        except (TypeError, ValueError, MemoryError):
            out = np.full((2, 3, 5, 6), SENTINEL, np.float32)
        if out is not None:
            arguments["out"] = out
        if name in TARGETS and watched:
            function, watched = make()
            if "cache" in arguments:
                arguments["cache"] = made = cache(4)
                watched = (made,)
    before = bits([*watched]), bits(out)
    given = dict(arguments)
    positional = ()
    kind = r.random()
    if kind < 0.02:
        positional = (next(iter(given.values())),) if given else ()  # the first argument twice
    elif kind < 0.04:
        given[r.choice(["Query", "no_such", "", "self"])] = 1
    elif kind < 0.05 and given:
        del given[next(iter(given))]
    misused = kind < 0.05
    threads = fastattn.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = function(*positional, **given)
    except FileNotFoundError:
        assert isinstance(arguments.get("state"), (str, os.PathLike)), "only paths are looked for"
        return "refused"
    except (TypeError, ValueError, MemoryError) as error:
        text = str(error)
        assert (bits([*watched]), bits(out)) == before, f"touched, and then: {text}"
        assert text or isinstance(error, MemoryError), "an error without a word"
        about = [*names, *map(str, given)]
        if name.startswith("from_"):
            about += ["weight", "bias", "kernel", "looked for", *inspect.signature(FROM).parameters]
        assert misused or isinstance(error, MemoryError) or names_one(text, about), f"no argument is named: {text}"
        return "refused"
    finally:
        fastattn.set_num_threads(threads)
    if name in fastattn.__all__ and out is None and "out" not in arguments and compare(name, result, arguments):
        return "right"
    return "ran"


def test_every_function_is_a_target():
    assert set(fastattn.__all__) - NO_ARGUMENTS <= {name.partition(",")[0] for name in TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_arguments(name):
    found = {"refused": 0, "right": 0, "ran": 0}
    for number in EXAMPLES:
        try:
            found[attempt(name, number)] += 1
        except BaseException as error:
            error.add_note(f"FASTATTN_FUZZ={SEED}:{number} python -m pytest tests/test_fuzz.py -k '{name}'")
            raise
    if len(EXAMPLES) >= 200:
        assert found["refused"] >= 20, found
        assert found["right"] + found["ran"] >= 1, found


def test_weights_from_damaged_files(tmp_path):
    """A .safetensors file with bytes flipped, cut off or added: its numbers, or an error; never a crash."""
    safetensors = pytest.importorskip("safetensors.numpy")
    good = safetensors.save(TORCH)
    path = tmp_path / "weights.safetensors"
    for number in range(len(EXAMPLES) // 2):
        r = random.Random(f"{SEED} file {number}")
        text = bytearray(good)
        kind = r.randrange(4)
        if kind == 0:
            del text[r.randrange(len(text)) :]
        elif kind == 1:
            text += bytes(r.randrange(256) for _ in range(9))
        else:
            for _ in range(r.randint(1, 8)):
                text[r.randrange(8 if kind == 2 else 300)] = r.randrange(256)
        path.write_bytes(text)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                FROM.from_torch(path, num_heads=2)
        except (TypeError, ValueError, MemoryError) as error:
            assert str(error)
