"""The C interface (fastattn/include/fastattn.h) seen from Python: its structs for ctypes, its table of functions, and
calls of either driven by NumPy arrays, so that tests can compare them with the Python functions bit for bit."""

import ctypes

import numpy as np

import fastattn

FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(4)
DOT_PRODUCT, ADDITIVE = range(2)
ACTIVATIONS = ("softmax", "relu", "sigmoid")
ROW_FUNCTIONS = ("softmax", "log_softmax", "logsumexp")
OK, BAD_STRUCT, BAD_DTYPE, BAD_SIZE, BAD_POINTER, BAD_VALUE, BAD_WORKSPACE, BAD_OVERLAP, NO_MEMORY = range(0, -9, -1)


class View(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_ssize_t) for name in ("batch", "head", "row", "col")),
    )


class AttentionArgs(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        *((name, ctypes.c_int) for name in ("dtype", "score", "activation")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "num_heads", "num_kv_heads", "queries", "keys", "head_dim", "value_dim")
        ),
        *((name, View) for name in ("query", "key", "value", "out", "lse", "weights", "mask", "bias")),
        ("bias_dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("key_lengths", "query_lengths", "query_offsets")),
        *((name, ctypes.c_void_p) for name in ("alibi_slopes", "sinks", "score_weights")),
        *((name, ctypes.c_int64) for name in ("left", "right")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
    )


class SoftmaxArgs(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("dtype", ctypes.c_int),
        ("function", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("batch", "rows", "n")),
        *((name, View) for name in ("x", "out", "mask")),
    )


def offsets(struct):
    """The size of a struct and where its fields begin, in order."""
    return [ctypes.sizeof(struct), *(getattr(struct, field[0]).offset for field in struct._fields_)]


_args, _softmax, _text = ctypes.POINTER(AttentionArgs), ctypes.POINTER(SoftmaxArgs), ctypes.c_char_p
_pointer, _n, _int, _size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_size_t
_flat = ctypes.CFUNCTYPE(_int, *[_pointer] * 4, *[_n] * 9, ctypes.c_double, _int)
_flat_softmax = ctypes.CFUNCTYPE(_int, _pointer, _pointer, _n, _n, _int)


class Api(ctypes.Structure):
    _fields_ = (
        ("api_version", ctypes.c_int32),
        ("size", _size),
        ("version", ctypes.CFUNCTYPE(_text)),
        ("instruction_set", ctypes.CFUNCTYPE(_text)),
        ("status_text", ctypes.CFUNCTYPE(_text, _int)),
        ("attention_init", ctypes.CFUNCTYPE(None, _args, _size)),
        ("attention_check", ctypes.CFUNCTYPE(_int, _args, _pointer, _size)),
        ("attention_workspace", ctypes.CFUNCTYPE(_size, _args, _int)),
        ("attention", ctypes.CFUNCTYPE(_int, _args, _int, _pointer, _size)),
        ("softmax_init", ctypes.CFUNCTYPE(None, _softmax, _size)),
        ("softmax_check", ctypes.CFUNCTYPE(_int, _softmax, _pointer, _size)),
        ("softmax", ctypes.CFUNCTYPE(_int, _softmax, _int)),
        ("dot_product_attention_f32", _flat),
        ("dot_product_attention_f64", _flat),
        ("softmax_f32", _flat_softmax),
        ("softmax_f64", _flat_softmax),
    )


def capsule_address(capsule, name):
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return address(capsule, name)


api = ctypes.cast(capsule_address(fastattn._C_API, b"fastattn._C_API"), ctypes.POINTER(Api)).contents


def dtype_of(array):
    return {"float32": FLOAT32, "float64": FLOAT64, "float16": FLOAT16, "bfloat16": BFLOAT16}[array.dtype.name]


def wide(dtype):
    """The dtype of lse and weights, and of what is computed."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def view(array, names=("batch", "head", "row", "col")):
    return View(array.ctypes.data, **dict(zip(names, array.strides, strict=False)))


def attention_args(query, key, value, out, lse=None, weights=None, **rules):
    """Args of arrays (batch, heads, rows, columns) and of rules named as in dot_product_attention. They point into the
    arrays, those made here included, which are kept alive in args.kept."""
    args, kept = AttentionArgs(), [query, key, value, out, lse, weights]
    api.attention_init(args, ctypes.sizeof(args))
    args.dtype = dtype_of(query)
    args.batch, args.num_heads, args.queries, args.head_dim = query.shape
    args.num_kv_heads, args.keys, args.value_dim = key.shape[1], key.shape[2], value.shape[3]
    for name, array in (("query", query), ("key", key), ("value", value), ("out", out), ("weights", weights)):
        if array is not None:
            setattr(args, name, view(array))
    if lse is not None:
        args.lse = view(lse)
    whole = (args.batch, args.num_heads, args.queries, args.keys)
    for name, rule in rules.items():
        if name in ("mask", "bias"):
            kept.append(np.broadcast_to(rule, whole))
            setattr(args, name, view(kept[-1]))
            if name == "bias":
                args.bias_dtype = dtype_of(rule)
        elif name in ("key_lengths", "query_lengths", "query_offset"):
            kept.append(np.ascontiguousarray(np.broadcast_to(rule, (args.batch, 1)), dtype=np.int64))
            setattr(args, "query_offsets" if name == "query_offset" else name, kept[-1].ctypes.data)
        elif name in ("alibi_slopes", "sinks", "w_score"):
            size = args.head_dim if name == "w_score" else args.num_heads
            kept.append(np.ascontiguousarray(np.broadcast_to(rule, size), dtype=np.float64))
            setattr(args, "score_weights" if name == "w_score" else name, kept[-1].ctypes.data)
            if name == "w_score":
                args.score = ADDITIVE
        elif name == "window_size":
            args.left, args.right = (-1 if side is None else side for side in rule)
        elif name == "activation":
            args.activation = ACTIVATIONS.index(rule)
        elif name != "is_causal":
            setattr(args, name, rule)  # scale, softcap
    if rules.get("is_causal"):
        args.right = 0
    args.kept = kept
    return args


def empty_results(query, key, value):
    """Memory for out, lse and weights, full of a number that no test expects."""
    batch, heads, queries = query.shape[:3]
    real = wide(query.dtype)
    return (
        np.full((batch, heads, queries, value.shape[3]), -77, query.dtype),
        np.full((batch, heads, queries), -77, real),
        np.full((batch, heads, queries, key.shape[2]), -77, real),
    )


def aligned_bytes(size, fill=0):
    """An array of bytes at a multiple of 64."""
    memory = np.full(size + 64, fill, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size]


def message_of(check, args, room=400):
    """The status and the words of a check."""
    text = ctypes.create_string_buffer(room)
    return check(args, text, room), text.value.decode()


def softmax_args(function, x, out, mask=None):
    """Args of arrays (batch, rows, n)."""
    args, names = SoftmaxArgs(), ("batch", "row", "col")
    api.softmax_init(args, ctypes.sizeof(args))
    args.dtype, args.function = dtype_of(x), ROW_FUNCTIONS.index(function)
    args.batch, args.rows, args.n = x.shape
    args.x, args.out = view(x, names), view(out, names)
    if mask is not None:
        args.mask = view(mask, names)
    args.kept = (x, out, mask)
    return args
