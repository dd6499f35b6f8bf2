"""Calls of every family, and what must hold when memory runs out in the middle of one: for test_faults.py.

A case is made anew for each attempt: its inputs, its outputs full of a sentinel, its caches and streams. `survives`
lets the first request for memory fail, then the second, and so on, until a call needs fewer.
"""

import copy
import ctypes
import threading

import numpy as np

import fastattn
from fastattn import KVCache, Linear, MultiHeadAttention, StreamingAttention, StreamingMultiHeadAttention, _runtime
from fastattn._scores import PreparedKeys

SENTINEL = 12345.0
MOST_REQUESTS = 20_000  # of one call; the most that a case here makes is about 1000


class Case:
    """A call, and the arrays or objects that it may change."""

    def __init__(self, call, *changed):
        self.call, self.changed = call, changed

    def state(self):
        return tuple(bits(x) for x in self.changed)


def bits(x):
    """Everything that a result, a cache or a stream holds, comparable."""
    if isinstance(x, KVCache):
        # A failed call of a layer may drop what is beyond the window, and nothing else.
        most = x.window or x.capacity
        ends = [(max(n - most, 0), n) for n in x.lengths.ravel()]
        seen = [y.reshape(len(ends), *y.shape[-3:])[b, :, i:j].tobytes()
                for y in (x.key, x.value, x.key_scale, x.value_scale) if y is not None
                for b, (i, j) in enumerate(ends)]  # fmt: skip
        return seen, (x.lengths + x.dropped).tolist(), bits(x.key_center)
    if isinstance(x, (StreamingAttention, StreamingMultiHeadAttention)):
        return x.pushed, x.returned, x.waiting
    if isinstance(x, PreparedKeys):
        return bits(x.key)
    if isinstance(x, dict):
        return {name: bits(y) for name, y in x.items()}
    if isinstance(x, (tuple, list)):
        return [bits(y) for y in x]
    if isinstance(x, (np.ndarray, np.generic)):
        return x.shape, x.dtype.str, x.tobytes()
    return x


def normal(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def blank(*shape, dtype=np.float32):
    return np.full(shape, SENTINEL, dtype)


def function_case(name, out_shapes, **arguments):
    """A call of a function with `out`, one array or as many as there are gradients; lists become new arrays."""

    def make():
        call = {k: x.copy() if isinstance(x, np.ndarray) else x for k, x in arguments.items()}
        outs = [blank(*shape) for shape in out_shapes]
        if outs:
            call["out"] = tuple(outs) if name.endswith("_vjp") and len(outs) > 1 else outs[0]
        return Case(lambda: getattr(fastattn, name)(**call), *outs)

    return make


def attention_cases():
    q, k, v = normal(0, 2, 3, 5, 8), normal(1, 2, 3, 7, 8), normal(2, 2, 3, 7, 6)
    large, wide = normal(3, 4, 260, 32), normal(4, 2, 3000, 32)
    qkv = {"query": q, "key": k, "value": v}
    rules = {
        "mask": normal(5, 5, 7) > 0,
        "bias": normal(6, 5, 7),
        "alibi_slopes": np.ones(3),
        "sinks": np.ones(3),
        "key_lengths": np.array([[3, 4, 5], [6, 7, 0]]),
        "return_weights": True,
        "return_lse": True,
    }
    halves = {name: x.astype(np.float16) for name, x in qkv.items()}
    band = {"window_size": (2, 1), "relative_bias": normal(7, 5, 4), "return_weights": "band"}
    graph = {"graph": ([0, 2, 2, 5, 6, 7], [1, 6, 0, 0, 3, 5, 2]), "w_score": normal(8, 8)}
    image = {name: normal(seed, 2, 7, 7, 8) for seed, name in enumerate(qkv)}
    packed = {name: x[0] for name, x in qkv.items()}
    packed = {**packed, "cu_seqlens_q": [0, 2, 5], "cu_seqlens_k": [0, 3, 7]}
    additive = {**qkv, "w_score": normal(9, 4), "w_query": normal(10, 8, 4), "w_key": normal(11, 8, 4)}
    bilinear = {**qkv, "w_query": normal(10, 8, 4), "w_key": normal(11, 8, 4), "b_query": normal(12, 4)}
    layer = {"x": q, "w_query": normal(10, 8, 4), "w_key": normal(11, 8, 4), "w_value": normal(12, 8, 6)}
    out, grad = [(2, 3, 5, 6)], normal(13, 2, 3, 5, 6)
    shapes = [x.shape for x in (q, k, v)]
    yield "attention", "dot_product_attention", out, {**qkv, **rules}
    yield "attention in 16 bits", "dot_product_attention", [], halves
    yield "attention in a window", "dot_product_attention", out, {**qkv, **band}
    yield "sparse attention", "dot_product_attention", out, {**qkv, "activation": "entmax15"}
    yield "attention of lists", "dot_product_attention", [], {name: x.tolist() for name, x in qkv.items()}
    yield "attention by threads", "dot_product_attention", [large.shape], {
        "query": large, "key": large, "value": large, "num_threads": 3}  # fmt: skip
    yield "decoding by threads", "dot_product_attention", [(2, 1, 32)], {
        "query": wide[:, :1], "key": wide, "value": wide, "num_threads": 3}  # fmt: skip
    yield "truncated", "truncated_attention", out, {**qkv, "left": 2, "right": 1}
    yield "varlen", "varlen_attention", [out[0][1:]], packed
    yield "additive", "additive_attention", out, additive
    yield "prepared keys", "prepare_additive_keys", [], {"key": k, "w_key": normal(11, 8, 4)}
    yield "prepared keys by threads", "prepare_additive_keys", [], {"key": large, "num_threads": 3}
    yield "bilinear", "bilinear_attention", out, bilinear
    yield "linear", "linear_attention", out, {**qkv, "return_state": True}
    yield "graph", "graph_attention", out, {**qkv, **graph, "return_weights": True}
    yield "neighborhood", "neighborhood_attention", [(2, 7, 7, 8)], {**image, "kernel_size": 3, "return_lse": True}
    yield "self-attention", "self_attention", out, layer
    yield "gradients", "dot_product_attention_vjp", shapes, {**qkv, "grad_out": grad, "is_causal": True}
    yield "gradients of rules", "dot_product_attention_vjp", [], {
        **qkv, "grad_out": grad, "sinks": np.ones(3), "bias": rules["bias"],
        "wrt": ("query", "bias", "sinks")}  # fmt: skip
    yield "gradients in 16 bits", "dot_product_attention_vjp", [], {**halves, "grad_out": grad.astype(np.float16)}
    yield "gradients by threads", "dot_product_attention_vjp", [large.shape] * 3, {
        "grad_out": large, "query": large, "key": large, "value": large, "num_threads": 3}  # fmt: skip
    yield "gradients, truncated", "truncated_attention_vjp", shapes, {**qkv, "grad_out": grad, "left": 2, "right": 1}
    yield "gradients, varlen", "varlen_attention_vjp", [s[1:] for s in shapes], {**packed, "grad_out": grad[0]}
    yield "gradients, additive", "additive_attention_vjp", [], {
        **additive, "grad_out": grad, "wrt": ("query", "key", "value", "w_score", "w_query", "w_key")}  # fmt: skip
    yield "gradients, bilinear", "bilinear_attention_vjp", [], {
        **bilinear, "grad_out": grad, "wrt": ("query", "key", "value", "w_query", "w_key", "b_query")}  # fmt: skip
    yield "gradients, linear", "linear_attention_vjp", shapes, {**qkv, "grad_out": grad, "is_causal": True}
    yield "gradients, graph", "graph_attention_vjp", shapes, {**qkv, **graph, "grad_out": grad}
    yield "gradients, neighborhood", "neighborhood_attention_vjp", [(2, 7, 7, 8)] * 3, {
        **image, "grad_out": image["query"], "kernel_size": 3}  # fmt: skip
    yield "gradients, self-attention", "self_attention_vjp", [], {**layer, "grad_out": grad}


def row_cases():
    x, grad = normal(0, 6, 9, 20), normal(1, 6, 9, 20)
    long = normal(2, 40, 5000)
    for name in ("softmax", "log_softmax", "sparsemax", "entmax15"):
        yield name, name, [x.shape], {"x": x, "axis": 1, "mask": grad > -1}
        y = getattr(fastattn, name)(x)
        yield f"gradients, {name}", f"{name}_vjp", [x.shape], {"grad_out": grad, "output": y}
    yield "logsumexp", "logsumexp", [x.shape[:2]], {"x": x}
    yield "gradients, logsumexp", "logsumexp_vjp", [x.shape], {"grad_out": grad[..., 0], "x": x}
    yield "softmax by threads", "softmax", [long.shape], {"x": long, "num_threads": 3}
    yield "rotary", "apply_rotary", [x.shape], {"x": x, "offset": 3}
    yield "rotary, scattered", "apply_rotary", [x.shape], {"x": x, "positions": np.arange(9)[::-1] * 7}
    yield "pack", "pack", [], {"x": x, "lengths": np.arange(len(x)) % 3}
    yield "unpack", "unpack", [], {"packed": x, "cu_seqlens": [0, 1, len(x)]}
    rows = np.arange(4 * 68, dtype=np.uint8).reshape(4, 68)
    yield "quantize", "quantize_kv", [], {"key": x, "value": grad, "center": "mean", "scale_dtype": np.float16}
    yield "rows of llama.cpp", "from_llama_cpp", [], {"blocks": rows, "format": "q8_0"}
    for name, more in (("layer_norm", {"bias": normal(4, 20)}), ("rms_norm", {"offset": 1.0})):
        rows = {"x": x, "weight": normal(3, 20).astype(np.float64), "residual": grad, **more}
        yield name, name, [x.shape], rows
        yield f"{name} and the sum", name, [], {**rows, "return_sum": True}
        yield f"{name} by threads", name, [long.shape], {"x": long, "num_threads": 3}
    yield "merge", "merge_attention", [], {"outs": [x, grad], "lses": [x[..., 0], grad[..., 0]]}
    yield "gradients, merge", "merge_attention_vjp", [], {
        "grad_out": x, "outs": [x, grad], "lses": [x[..., 0], grad[..., 0]]}  # fmt: skip
    yield "slopes", "alibi_slopes", [], {"num_heads": 12}
    yield "buckets", "relative_position_buckets", [], {"query_length": 7, "key_length": 9}
    yield "frequencies", "rotary_frequencies", [], {"dim": 16, "scaling": {"rope_type": "linear", "factor": 2.0}}
    yield "sinusoidal", "sinusoidal_encoding", [], {"length": 7, "dim": 8}


def takes_its_own_tokens(cache):
    """Appending views of a cache to itself, whose memory moves meanwhile."""
    return Case(lambda: cache.append(cache.key[..., :3, :], cache.value[..., :3, :]), cache)


def layer():
    return MultiHeadAttention(*[normal(s, 8, 8) for s in range(4)], num_heads=2, rotary_base=1e4)


def filled(cache, tokens, shape=(3, 2)):
    cache.append(normal(20, *shape, tokens, 4), normal(21, *shape, tokens, 4))
    return cache


def object_cases():
    x = normal(22, 3, 2, 8)
    unturned = MultiHeadAttention(*[normal(s, 8, 8) for s in range(4)], num_heads=2)
    made, stream_of = layer(), lambda: StreamingAttention(3, 1, chunk_size=2)

    def layer_call(make_cache):
        def make():
            cache = make_cache()
            out = blank(3, 2, 8)
            return Case(lambda: made(x, cache=cache, out=out), cache, out)

        return make

    def step_call(make_cache):
        def make():
            cache, fresh = make_cache(), copy.deepcopy(made)  # without scratch of an earlier step
            return Case(lambda: fresh(x, cache=cache), cache)

        return make

    def method(make_object, name, *arguments):
        def make():
            thing = make_object()
            return Case(lambda: getattr(thing, name)(*arguments), thing)

        return make

    def pushed():
        stream = stream_of()
        stream.push(*[normal(s, 2, 5, 4) for s in range(3)])
        return stream

    def pushed_with_biases():
        stream = StreamingAttention(3, 1, relative_bias=normal(51, 5))
        stream.push(*[normal(s, 2, 5, 4) for s in range(3)], normal(52, 2, 5, 5))
        return stream

    def layer_stream():
        return StreamingMultiHeadAttention(layer(), 3, 1)

    def pushed_layer_stream():
        stream = layer_stream()
        stream.push(x)
        return stream

    frames = [normal(s + 30, 2, 6, 4) for s in range(3)]
    roomy = lambda: filled(KVCache((3,), 2, 20, 4), 5)  # noqa: E731
    tight = lambda: filled(KVCache((3,), 2, 7, 4, window=4), 6)  # noqa: E731
    exact = lambda: filled(KVCache((3,), 2, 4, 4, window=4), 4)  # noqa: E731
    eight = {"dtype": np.int8, "center": "mean"}
    small = lambda: filled(KVCache((3,), 2, 20, 4, **eight), 5)  # noqa: E731
    small_tight = lambda: filled(KVCache((3,), 2, 7, 4, window=4, **eight), 6)  # noqa: E731
    new = normal(40, 3, 2, 3, 4)
    weight, bias, many = normal(54, 8, 40), normal(55, 40), normal(56, 300, 8)

    def product_call(rows, dtype=np.float32, scattered=False, **more):
        def make():
            out = blank(len(rows), 80, dtype=dtype)[:, ::2] if scattered else blank(len(rows), 40, dtype=dtype)
            product = Linear(weight, bias)
            return Case(lambda: product(rows.astype(dtype), out=out, **more), out)

        return make

    yield "product, new", lambda: Case(lambda: Linear(weight, bias).weight)
    yield "product, new of int8", lambda: Case(lambda: Linear(weight, bias, dtype=np.int8).weight_scale)
    yield "product, int8 with scales", lambda: Case(lambda: Linear(np.ones((8, 40), np.int8), weight_scale=0.5)(many))
    yield "product, few rows", product_call(many[:3], activation="silu", residual=many[:3] @ weight)
    yield "product, many rows", product_call(many, multiply=np.asfortranarray(many @ weight), num_threads=3)
    yield "product in float64", product_call(many[:20], np.float64)
    yield "product, scattered", product_call(many[:20], scattered=True, activation="gelu")
    yield "product, of lists", lambda: Case(lambda: Linear(weight.tolist())(many[:9].tolist()))
    yield "layer, new", lambda: Case(lambda: layer().parameters())
    yield "layer", layer_call(lambda: None)
    yield "layer, vjp", lambda: Case(lambda: made.vjp(x)[1](x))
    yield "layer, cache", layer_call(roomy)
    yield "layer, step", step_call(roomy)
    yield "layer, cache of 8 bits", layer_call(small)
    yield "layer, step over 8 bits", step_call(small)
    yield "layer, first tokens in 8 bits", layer_call(lambda: KVCache((3,), 2, 20, 4, **eight))
    yield "layer, cache of 8 bits with a window", layer_call(small_tight)
    yield "layer, packed", lambda: Case(lambda: made(x[0], cu_seqlens=[0, 1, 2]))
    yield "layer, some weights", lambda: Case(lambda: made(x, return_weights=[1]))
    yield "layer, project_context", lambda: Case(lambda: unturned(x, unturned.project_context(x, [1, 2, 0])))
    yield "layer, cache with a window", layer_call(tight)
    yield "layer, cache of a window's size", layer_call(exact)
    yield "cache, new", lambda: Case(lambda: filled(KVCache((3,), 2, 7, 4), 2))
    yield "cache, append", method(roomy, "append", new, new, [1, 2, 3])
    yield "cache, append float64", method(roomy, "append", new.astype(np.float64), new.astype(np.float64))
    yield "cache, append past the window", method(tight, "append", new, new, [1, 2, 3])
    yield "cache, append what the window holds", method(exact, "append", new, new)
    yield "cache, append itself", lambda: takes_its_own_tokens(tight())
    yield "cache of 8 bits, append", method(small, "append", new, new, [1, 2, 3])
    yield "cache of 8 bits, append past the window", method(small_tight, "append", new, new)
    yield "cache of 8 bits, first append", lambda: Case(lambda: filled(KVCache((3,), 2, 7, 4, **eight), 2))
    yield "cache of 8 bits, select", method(small, "select", [2, 0])
    yield "cache of 8 bits, reset", method(small, "reset")
    yield "numbers of 8 bits", lambda: Case(fastattn.quantize_kv(new, new, center="mean").dequantize)
    yield "cache, copy", method(roomy, "copy")
    yield "cache, crop", method(roomy, "crop", [2, 3, 4])
    yield "cache, select", method(roomy, "select", [2, 0])
    yield "cache, reset", method(roomy, "reset")
    yield "stream, first push", method(stream_of, "push", *frames)
    yield "stream, push", method(pushed, "push", *frames)
    yield "stream, flush", method(pushed, "flush")
    yield "stream, push with a bias", method(pushed_with_biases, "push", *frames, normal(53, 2, 6, 5))
    yield "stream of a layer, first push", method(layer_stream, "push", x)
    yield "stream of a layer, push", method(pushed_layer_stream, "push", x)
    yield "stream of a layer, flush", method(pushed_layer_stream, "flush")


CASES = {name: function_case(*rest[:2], **rest[2]) for cases in (attention_cases, row_cases) for name, *rest in cases()}
FUNCTIONS = {rest[0] for cases in (attention_cases, row_cases) for _, *rest in cases()}
CASES.update(object_cases())


# ---------------------------------------------------------------------------------------------- failing


class Compiled:
    """Requests by compiled code: the switch of a debug build."""

    patience = 1  # calls that must succeed in a row

    @staticmethod
    def begin(n):
        _runtime.fail_allocation(n)

    @staticmethod
    def end():
        """Whether the failure came."""
        return _runtime.fail_allocation(0) == 0

    @staticmethod
    def explains(error):
        return isinstance(error, MemoryError)


class Everything:
    """Every request by anyone through Python's allocators, and NumPy's memory of arrays, which the constructor leads
    there. CPython's own test switch says no count: the last attempts must all succeed."""

    patience = 25

    def __init__(self):
        import _testcapi

        self.python = _testcapi
        self.end()
        self.handler = lead_numpy_through_python()

    def begin(self, n):
        self.python.set_nomemory(n, n + 1)

    def end(self):
        self.python.set_nomemory(2**30, 2**30 + 1)

    @staticmethod
    def explains(error):
        """Some functions of NumPy forget to say what failed, which is a SystemError once Python finds out; a lock of
        Python's is a RuntimeError."""
        return isinstance(error, (MemoryError, SystemError)) or "can't allocate lock" in str(error)


def lead_numpy_through_python():
    """Arrays' memory from the raw allocator as it is now, hooks included. Returns what must be kept alive."""

    class Handler(ctypes.Structure):
        """PyDataMem_Handler; its functions and the context are those of PyMemAllocatorEx, in the same order."""

        _fields_ = (("name", ctypes.c_char * 127), ("version", ctypes.c_uint8), ("allocator", ctypes.c_void_p * 5))

    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = ctypes.py_object, ctypes.c_char_p
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
    table = api.PyCapsule_GetPointer(np._core._multiarray_umath._ARRAY_API, None)
    set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(
        ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))[304]
    )
    handler = Handler(b"faults", 1)
    api.PyMem_GetAllocator(0, ctypes.byref(handler.allocator))
    name = ctypes.c_char_p(b"mem_handler")
    capsule = api.PyCapsule_New(ctypes.addressof(handler), name, None)
    set_handler(capsule)
    return handler, name, capsule


def in_new_thread(call):
    """The result of a call in a thread that has no workers yet, so that records of them are made too."""
    results = []

    def work():
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def survives(make, switch, run=lambda call: call()):
    """Returns how many requests a call makes. run: how to carry a call out."""
    first = make()
    before = first.state()
    expected = bits(run(first.call))
    after = first.state()
    successes = 0
    for n in range(MOST_REQUESTS):
        case = make()
        failed = None
        switch.begin(n + 1 if isinstance(switch, Compiled) else n)
        try:
            result = run(case.call)
        except Exception as error:
            failed = error
        finally:
            came = switch.end()
        assert failed is None or switch.explains(failed), f"request {n}: {failed!r}"
        state = case.state()
        if failed is None:
            assert bits(result) == expected, f"request {n}: another result"
            assert state == after, f"request {n}: other outputs"
            successes = 0 if came else successes + 1
            if successes == switch.patience:
                return n + 1 - successes
            continue
        successes = 0
        del failed
        # Each thing is as before or, where a call computes one after the other or fails to hand it over, complete.
        whole = all(s in both for s, *both in zip(state, before, after, strict=True))
        assert whole, f"request {n}: half-written"
        if state == before:
            assert bits(run(case.call)) == expected, f"request {n}: another result afterwards"
            assert case.state() == after, f"request {n}: other outputs afterwards"
    raise AssertionError(f"more than {MOST_REQUESTS} requests")
