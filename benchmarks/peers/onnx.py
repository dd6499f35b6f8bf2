"""ONNX Runtime: a graph for each operator that it has."""

import dataclasses
import functools

import numpy as np

import encoder
from suite import baselines

from .variant import Variant, refuse_large, those_that_work


def attention(case, threads):
    from onnx import helper

    heads, head_dim = case.heads, case.head_dim
    query, key, value = case.inputs()
    variant = functools.partial(_graph_variant, threads)

    def attention_operator():
        node = helper.make_node("Attention", list("qkv"), ["o"], is_causal=int(case.is_causal))
        return variant("Attention", [node], {"q": query, "k": key, "v": value}, query.shape)

    def multi_head_attention():
        node = helper.make_node(
            "MultiHeadAttention",
            list("qkv"),
            ["o"],
            domain="com.microsoft",
            num_heads=heads,
            unidirectional=int(case.is_causal),
        )
        arrays = {letter: _packed(array) for letter, array in zip("qkv", case.inputs(), strict=True)}
        read = functools.partial(_unpacked, heads=heads)
        return variant("MultiHeadAttention", [node], arrays, arrays["q"].shape, read)

    def matmul_softmax():
        if case.is_causal:
            raise NotImplementedError("the written-out graph would add an L x S constant")
        scale = helper.make_tensor("scale", helper.np_dtype_to_tensor_dtype(query.dtype), [1], [head_dim**-0.5])
        nodes = [
            helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
            helper.make_node("Mul", ["q", "scale"], ["qs"]),
            helper.make_node("MatMul", ["qs", "kt"], ["s"]),
            helper.make_node("Softmax", ["s"], ["p"], axis=-1),
            helper.make_node("MatMul", ["p", "v"], ["o"]),
        ]
        arrays = {"q": query, "k": key, "v": value}
        return variant("MatMul-Softmax-MatMul", nodes, arrays, query.shape, constants=[scale], opset=17)

    yield from those_that_work(attention_operator, multi_head_attention, matmul_softmax)


def truncated(case, threads):
    from onnx import helper

    if case.right:
        raise NotImplementedError("its only window, GroupQueryAttention's, does not look ahead")
    refuse_large(case, case.seqlen**2)
    arrays = {letter: _packed(array) for letter, array in zip("qkv", case.inputs(), strict=True)}
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "", "", "last", "total"],
        ["o"],
        domain="com.microsoft",
        num_heads=case.heads,
        kv_num_heads=case.heads,
        local_window_size=case.left + 1,
    )
    lengths = {"last": np.full(case.batch, case.seqlen - 1, np.int32), "total": np.array(case.seqlen, np.int32)}
    read = functools.partial(_unpacked, heads=case.heads)
    yield _graph_variant(threads, "GroupQueryAttention", [node], arrays | lengths, arrays["q"].shape, read)


def decode(case, threads):
    from onnx import helper

    query, key, value = case.inputs()
    variant = functools.partial(_graph_variant, threads)

    def attention_operator():
        node = helper.make_node("Attention", list("qkv"), ["o"])
        return variant("Attention, grouped", [node], {"q": query, "k": key, "v": value}, query.shape)

    yield from attention(case.as_rows, threads)
    of_heads = functools.partial(_group_query_attention, case, threads, *case.inputs())
    yield from those_that_work(*[attention_operator] * case.is_grouped, of_heads)


def stored(case, threads):
    if case.storage == "bfloat16":
        raise NotImplementedError("its operators for the CPU have no bfloat16")
    if case.storage == "float16" and not case.is_decode:
        yield from attention(case, threads)
    elif case.storage == "float16":
        yield _group_query_attention(case, threads, *case.inputs())
    elif case.is_decode:
        forms = "PER_TENSOR", "PER_CHANNEL"
        yield from those_that_work(*(functools.partial(_eight_bits, case, threads, form) for form in forms))
    else:
        raise NotImplementedError("many queries over a cache of 8 bits are no call of it")


def _eight_bits(case, threads, form):
    """Over a cache with one scale for all, or one for each channel of each head."""
    query, *plain = case.plain()
    axes = (0, 2) if form == "PER_CHANNEL" else None
    scales = [np.abs(x).max(axis=axes, keepdims=True) / np.float32(127) for x in plain]
    # Only these two are kept as they are: it rounds the last token itself, in the same way.
    key, value = (np.rint(x / scale).astype(np.int8) for x, scale in zip(plain, scales, strict=True))
    rows = query.reshape(case.as_rows.inputs()[0].shape)
    expected = baselines.expected_attention(rows, *(x * s for x, s in zip((key, value), scales, strict=True)))
    settings = {"k_quant_type": form, "v_quant_type": form, "kv_cache_bit_width": 8}
    made = _group_query_attention(case, threads, query, *plain, cache=(key, value), scales=scales, **settings)
    return dataclasses.replace(made, name=form, expected=expected)


def _group_query_attention(case, threads, query, key, value, cache=None, scales=(), **settings):
    """Its cache holds all keys except the last one, which it writes there itself, in place. Rows that share a key head
    are equivalent to heads: all of them see all keys."""
    from onnx import helper

    heads = case.kv_heads * case.as_rows.seqlen_q
    keys, values = cache or (key, value)
    arrays = {
        "q": query.reshape(case.batch, 1, heads * case.head_dim),
        "k": _packed(key[:, :, -1:]),
        "v": _packed(value[:, :, -1:]),
        "keys": keys.copy(),
        "values": values.copy(),
        "last": np.full(case.batch, case.seqlen_k - 1, np.int32),
        "total": np.array(case.seqlen_k, np.int32),
    }
    names = ["q", "k", "v", "keys", "values", "last", "total"]
    if scales:
        names += [""] * 5 + ["k_scale", "v_scale"]
        arrays |= {name: scale.reshape(-1) for name, scale in zip(("k_scale", "v_scale"), scales, strict=True)}
    settings |= {"num_heads": heads, "kv_num_heads": case.kv_heads, "domain": "com.microsoft"}
    node = helper.make_node("GroupQueryAttention", names, ["o", "new_keys", "new_values"], **settings)
    updated = {"new_keys": "keys", "new_values": "values"}
    return _graph_variant(threads, "GroupQueryAttention", [node], arrays, arrays["q"].shape, updated=updated)


def multihead(case, threads):
    from onnx import helper, numpy_helper

    x, w_query, w_key, w_value, _ = case.inputs()
    w_qkv, b_qkv, w_out, b_out = case.packed()

    def variant(name, nodes, **weights):
        output = [helper.make_node("MatMul", ["a", "w_out"], ["p"]), helper.make_node("Add", ["p", "b_out"], ["o"])]
        weights |= {"b_qkv": b_qkv, "w_out": w_out, "b_out": b_out}
        # Constants, so that it may pack them for its matrix products beforehand.
        constants = [numpy_helper.from_array(array, letter) for letter, array in weights.items()]
        return _graph_variant(threads, name, nodes + output, {"x": x}, x.shape, constants=constants)

    settings = {"domain": "com.microsoft", "num_heads": case.heads}

    def attention_operator():
        node = helper.make_node("Attention", ["x", "w_qkv", "b_qkv"], ["a"], **settings)
        return variant("Attention", [node], w_qkv=w_qkv)

    def multi_head_attention():
        weights = {"w_query": w_query, "w_key": w_key, "w_value": w_value}
        nodes = [helper.make_node("MatMul", ["x", w], [letter]) for w, letter in zip(weights, "qkv", strict=True)]
        nodes += [helper.make_node("MultiHeadAttention", [*"qkv", "b_qkv"], ["a"], **settings)]
        return variant("MatMul, MultiHeadAttention", nodes, **weights)

    yield from those_that_work(attention_operator, multi_head_attention)


def minilm(case, threads):
    _, folder, ids, lengths = encoder.inputs(case)
    arrays = {"ids": ids, "lengths": lengths}

    def variant(name, make):
        return _model_variant(threads, name, make(folder, case.seqlen), arrays)

    yield from those_that_work(*(functools.partial(variant, name, make) for name, make in encoder.ONNX.items()))


def _graph_variant(threads, name, nodes, arrays, shape, read=np.asarray, constants=(), opset=23, updated=None):
    """A graph with these inputs, by name, and output "o"; `updated`: outputs that overwrite an input."""
    from onnx import helper

    updated = updated or {}

    def described(name, shape, dtype):
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)

    dtype = next(iter(arrays.values())).dtype
    inputs = [described(letter, array.shape, array.dtype) for letter, array in arrays.items()]
    outputs = [described("o", shape, dtype)]
    outputs += [described(letter, arrays[source].shape, arrays[source].dtype) for letter, source in updated.items()]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, list(constants))
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    return _model_variant(threads, name, model, arrays, read, updated)


def _model_variant(threads, name, model, arrays, read=np.asarray, updated=None):
    """A model with these inputs and one output besides the `updated` ones."""
    import onnxruntime

    updated = updated or {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if any(array.dtype == np.float64 for array in arrays.values()):
        # The optimiser folds the scale into a matrix product that keeps it in float32.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # Bound once: calls look up no names and allocate no output.
    binding = session.io_binding()
    values = {letter: onnxruntime.OrtValue.ortvalue_from_numpy(array) for letter, array in arrays.items()}
    for letter, ort_value in values.items():
        binding.bind_ortvalue_input(letter, ort_value)
    output = model.graph.output[0].name
    binding.bind_output(output)
    for letter, source in updated.items():
        binding.bind_ortvalue_output(letter, values[source])
    session.run_with_iobinding(binding)
    result = binding.get_outputs()[0]
    binding.bind_ortvalue_output(output, result)
    run = session.run_with_iobinding

    def call():
        run(binding)
        return result

    return Variant(name, call, lambda value: read(value.numpy()))


def _packed(array):
    """Heads packed into the last axis: (batch, seqlen, heads * head_dim)."""
    return np.ascontiguousarray(array.swapaxes(1, 2)).reshape(array.shape[0], array.shape[2], -1)


def _unpacked(array, heads):
    return array.reshape(*array.shape[:2], heads, -1).swapaxes(1, 2)


# Name -> (distribution, its implementation of each kind of case).
LIBRARIES = {
    "ONNX Runtime": (
        "onnxruntime",
        {
            "attention": attention,
            "truncated": truncated,
            "decode": decode,
            "stored": stored,
            "multihead": multihead,
            "minilm": minilm,
        },
    ),
}
