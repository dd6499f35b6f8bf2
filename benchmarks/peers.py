"""The libraries that fastattn is measured beside, each at its best.

Every library gets its inputs beforehand in its own format and favourite layout, and where it has several ways
to write the same thing, all of them are tried on each case and the fastest right one counts. A `Variant` is
such a way: `call` is timed, `read` turns what it returns into a (..., L, E) NumPy array, and `expected` is the right
answer where it is not the case's own.
"""

import contextlib
import functools
import importlib.metadata
import os
from dataclasses import dataclass

import numpy as np

import encoder
import fastattn
import measure
from suite import baselines

# Errors allowed before a library is timed, of values near 1: several times what honest float32 and float64
# need, and far below what bfloat16 arithmetic in disguise would give.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
# Embeddings are of length 1, their numbers of a twentieth.
EMBEDDING_TOLERANCE = 1e-5
# Where the formula of additive attention makes an array of (L, S, hidden), or what masks a window one of (L, S), it is
# left out above this size.
LARGEST_ARRAY = 2**30


@dataclass(frozen=True)
class Variant:
    name: str
    call: object
    read: object = np.asarray
    expected: object = None


def _fastattn_attention(case, threads):
    # No num_threads: the environment says how many, as it does to the others.
    call = functools.partial(fastattn.dot_product_attention, *case.inputs())
    yield Variant("", functools.partial(call, is_causal=True) if case.is_causal else call)


def _numpy_attention(case, threads):
    yield Variant("", functools.partial(baselines.dot_product_attention, *case.inputs(), case.is_causal))


def _torch_attention(case, threads):
    torch = _torch(threads)
    query, key, value = map(torch.from_numpy, case.inputs())
    attend = torch.nn.functional.scaled_dot_product_attention
    yield Variant("", lambda: attend(query, key, value, is_causal=case.is_causal))


# Keeps what it has entered: PyTorch leaves inference mode when the object that entered it is collected.
_for_good = contextlib.ExitStack()


@functools.cache
def _torch(threads):
    import torch

    torch.set_num_threads(threads)
    # Entered for good: as a `with` around each call it would cost a microsecond.
    _for_good.enter_context(torch.inference_mode())
    return torch


def _onnx_attention(case, threads):
    from onnx import helper

    heads, head_dim = case.heads, case.head_dim
    query, key, value = case.inputs()
    variant = functools.partial(_onnx_variant, threads)

    def attention():
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

    yield from _those_that_work(attention, multi_head_attention, matmul_softmax)


def _onnx_variant(threads, name, nodes, arrays, shape, read=np.asarray, constants=(), opset=23, updated=None):
    """A graph with these inputs, by name, and output "o"; `updated` are outputs that overwrite an input."""
    from onnx import helper

    updated = updated or {}

    def described(name, shape, dtype):
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)

    dtype = next(iter(arrays.values())).dtype
    inputs = [described(letter, array.shape, array.dtype) for letter, array in arrays.items()]
    outputs = [described("o", shape, dtype)]
    outputs += [described(letter, arrays[source].shape, dtype) for letter, source in updated.items()]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, list(constants))
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    return _onnx_model_variant(threads, name, model, arrays, read, updated)


def _onnx_model_variant(threads, name, model, arrays, read=np.asarray, updated=None):
    """A model with these inputs and one output beside those that are `updated`."""
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
    # Bound once: no look-up of names and no new output in each call.
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


def _openvino_attention(case, threads):
    from openvino import opset13

    arrays = case.inputs()
    parameters = [opset13.parameter(array.shape, array.dtype) for array in arrays]
    node = opset13.scaled_dot_product_attention(*parameters, causal=case.is_causal)
    return _openvino_variants(threads, node, parameters, arrays)


def _openvino_variants(threads, node, parameters, arrays):
    """A graph that ends in `node`, of these parameters and their arrays."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # The default would be bfloat16 where the CPU has it.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(openvino.Model([node], parameters), "CPU", settings)
    request = compiled.create_infer_request()
    for index, array in enumerate(arrays):
        request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))

    def call():
        request.start_async()
        request.wait()
        return request

    def read(request):
        return np.array(request.get_output_tensor(0).data)

    yield Variant("infer", lambda: request.infer(share_outputs=True), lambda _: read(request))
    yield Variant("start_async", call, read)


def _jax_attention(case, threads):
    import jax

    for name, attend in (("dot_product_attention", jax.nn.dot_product_attention), ("einsums", _jax_einsums)):
        yield _jax_variant(name, functools.partial(attend, is_causal=case.is_causal), case)


def _jax_einsums(query, key, value, is_causal=False):
    import jax
    from jax import numpy as jnp

    scores = jnp.einsum("blhd,bshd->bhls", query * query.shape[-1] ** -0.5, key)
    if is_causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhls,bshd->blhd", jax.nn.softmax(scores), value)


def _jax_variant(name, function, case):
    def read(output):
        return np.asarray(output).swapaxes(1, 2)

    # JAX's own layout: (batch, seqlen, heads, head_dim).
    return _jax_compiled(name, function, [np.ascontiguousarray(x.swapaxes(1, 2)) for x in case.inputs()], read)


def _jax_compiled(name, function, arrays, read=np.asarray):
    import jax

    jax.config.update("jax_enable_x64", True)
    arrays = [jax.device_put(array) for array in arrays]
    compiled = jax.jit(function).lower(*arrays).compile()
    return Variant(name, lambda: compiled(*arrays).block_until_ready(), read)


def _fastattn_truncated(case, threads):
    yield Variant("", functools.partial(fastattn.truncated_attention, *case.inputs(), *case.window))


def _numpy_truncated(case, threads):
    arguments = *case.inputs(), *case.window
    for rows in (8, 16, 32, 64, 128, 256):
        yield Variant(f"blocks of {rows}", functools.partial(baselines.truncated_attention, *arguments, rows=rows))
    if sum(case.window) <= 32:  # wider they are far behind
        yield Variant("a window a row, einsum", functools.partial(baselines.truncated_by_row, *arguments))
        yield Variant("a sum a distance", functools.partial(baselines.truncated_by_distance, *arguments))


def _torch_masked_truncated(case, threads):
    _refuse_large(case, case.seqlen**2)
    torch = _torch(threads)
    query, key, value = map(torch.from_numpy, case.inputs())
    attend = torch.nn.functional.scaled_dot_product_attention
    visible = torch.ones(case.seqlen, case.seqlen, dtype=torch.bool).tril(case.right).triu(-case.left)
    yield Variant("boolean mask", lambda: attend(query, key, value, attn_mask=visible))
    bias = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
    yield Variant("float mask", lambda: attend(query, key, value, attn_mask=bias))


def _torch_flex_truncated(case, threads):
    """torch.compile's attention that skips blocks of hidden scores."""
    torch = _torch(threads)
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    query, key, value = map(torch.from_numpy, case.inputs())
    # It compiles anew for each window and length.
    torch._dynamo.config.recompile_limit = 256
    left, right = case.window

    def visible(batch, head, row, column):
        return (row - column <= left) & (column - row <= right)

    # Smaller blocks hide less and cost more calls; each size takes up to ten seconds to compile.
    for size in (16, 32) if left + right < 64 else (32, 64):
        # What create_block_mask finds out with an array of L x S: which blocks are seen in part, and which wholly.
        count = -(-case.seqlen // size)
        apart = torch.arange(count) - torch.arange(count)[:, None]
        nearest = (apart.abs() - 1).clamp(min=0) * size + (apart != 0)
        seen = nearest <= torch.where(apart < 0, left, right)
        whole = (apart * size + size - 1 <= right) & (size - 1 - apart * size <= left)
        whole[:, -1] &= case.seqlen % size == 0
        lists = [_ordered(blocks[None, None]) for blocks in (seen & ~whole, whole)]
        mask = BlockMask.from_kv_blocks(
            *lists[0], *lists[1], BLOCK_SIZE=size, mask_mod=visible, seq_lengths=(case.seqlen, case.seqlen)
        )
        attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        yield Variant(f"blocks of {size}", functools.partial(attend, query, key, value, block_mask=mask))


def _ordered(blocks):
    """How many are set in each row, and which: those that are set come first."""
    return blocks.sum(-1).int(), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


def _onnx_truncated(case, threads):
    from onnx import helper

    if case.right:
        raise NotImplementedError("its only window, GroupQueryAttention's, does not look ahead")
    _refuse_large(case, case.seqlen**2)
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
    yield _onnx_variant(threads, "GroupQueryAttention", [node], arrays | lengths, arrays["q"].shape, read)


def _jax_truncated(case, threads):
    import jax

    _refuse_large(case, case.seqlen**2)
    attend = functools.partial(jax.nn.dot_product_attention, local_window_size=case.window)
    yield _jax_variant("dot_product_attention", attend, case)


def _fastattn_decode(case, threads):
    call = functools.partial(fastattn.dot_product_attention, *case.inputs(), enable_gqa=case.is_grouped)
    yield Variant("", call)


def _numpy_decode(case, threads):
    yield Variant("query @ key.T", functools.partial(baselines.grouped_attention, *case.inputs()))
    yield Variant("key @ query.T", functools.partial(baselines.grouped_attention_keys_first, *case.inputs()))


def _torch_decode(case, threads):
    torch = _torch(threads)
    attend = torch.nn.functional.scaled_dot_product_attention
    query, key, value = map(torch.from_numpy, case.inputs())
    rows = torch.from_numpy(case.as_rows.inputs()[0])
    scale = case.head_dim**-0.5
    yield Variant(
        "enable_gqa" if case.is_grouped else "", lambda: attend(query, key, value, enable_gqa=case.is_grouped)
    )
    if case.is_grouped:
        yield Variant("groups as rows", lambda: attend(rows, key, value))
    yield Variant("matrix products", lambda: torch.softmax((rows * scale) @ key.mT, -1) @ value)


def _onnx_decode(case, threads):
    from onnx import helper

    batch, kv_heads = case.batch, case.kv_heads
    query, key, value = case.inputs()
    variant = functools.partial(_onnx_variant, threads)

    def attention():
        node = helper.make_node("Attention", list("qkv"), ["o"])
        return variant("Attention, grouped", [node], {"q": query, "k": key, "v": value}, query.shape)

    def group_query_attention():
        # Its cache holds all keys but the last one, which it puts there itself, in place. Rows that share a key head
        # are as good as heads: all of them see all keys.
        heads = kv_heads * case.as_rows.seqlen_q
        node = helper.make_node(
            "GroupQueryAttention",
            ["q", "k", "v", "keys", "values", "last", "total"],
            ["o", "new_keys", "new_values"],
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=kv_heads,
        )
        arrays = {
            "q": query.reshape(batch, 1, heads * case.head_dim),
            "k": _packed(key[:, :, -1:]),
            "v": _packed(value[:, :, -1:]),
            "keys": key.copy(),
            "values": value.copy(),
            "last": np.full(batch, case.seqlen_k - 1, np.int32),
            "total": np.array(case.seqlen_k, np.int32),
        }
        updated = {"new_keys": "keys", "new_values": "values"}
        return variant("GroupQueryAttention", [node], arrays, arrays["q"].shape, updated=updated)

    yield from _onnx_attention(case.as_rows, threads)
    yield from _those_that_work(*[attention] * case.is_grouped, group_query_attention)


def _openvino_decode(case, threads):
    return _openvino_attention(case.as_rows, threads)


def _jax_decode(case, threads):
    import jax

    if case.is_grouped:
        yield _jax_variant("dot_product_attention, grouped", jax.nn.dot_product_attention, case)
    yield from _jax_attention(case.as_rows, threads)


def _fastattn_multihead(case, threads):
    x, *weights = case.inputs()
    attend = fastattn.MultiHeadAttention(*weights, num_heads=case.heads, **case.biases())
    yield Variant("", functools.partial(attend, x))


def _products_and_attention(case, threads):
    """What a layer cannot do without, into arrays that are there already and without biases."""
    x, *weights, w_out = case.inputs()
    w_qkv = case.packed()[0]
    zeros = np.zeros(3 * case.d_model), np.zeros(case.d_model)
    expected = baselines.expected_multi_head_attention(x, w_qkv, zeros[0], w_out, zeros[1], heads=case.heads)
    rows = x.reshape(-1, case.d_model)
    attended, output = np.empty_like(rows), np.empty_like(rows)

    def variant(name, weights, projected, parts):
        query, key, value, out = (
            part.reshape(case.batch, case.seqlen, case.heads, -1).swapaxes(1, 2) for part in (*parts, attended)
        )

        def call():
            for weight, result in zip(weights, projected, strict=True):
                np.matmul(rows, weight, out=result)
            fastattn.dot_product_attention(query, key, value, out=out)
            np.matmul(attended, w_out, out=output)
            return output

        return Variant(name, call, lambda output: output.reshape(x.shape), expected)

    parts = [np.empty_like(rows) for _ in weights]
    yield variant("three products", weights, parts, parts)
    whole = np.empty((len(rows), 3 * case.d_model), x.dtype)
    yield variant("one product", [w_qkv], [whole], np.split(whole, 3, axis=1))


def _numpy_multihead(case, threads):
    x = case.inputs()[0]
    yield Variant("", functools.partial(baselines.multi_head_attention, x, *case.packed(), case.heads))


def _torch_multihead(case, threads):
    torch = _torch(threads)
    functional = torch.nn.functional
    x = torch.from_numpy(case.inputs()[0])
    w_qkv, b_qkv, w_out, b_out = map(torch.from_numpy, case.packed())
    # Its weights multiply from the left.
    w_qkv, w_out = w_qkv.T.contiguous(), w_out.T.contiguous()
    layer = torch.nn.MultiheadAttention(case.d_model, case.heads, batch_first=True, dtype=x.dtype).eval()
    names = "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"
    layer.load_state_dict(dict(zip(names, (w_qkv, b_qkv, w_out, b_out), strict=True)))

    def written_out():
        projected = functional.linear(x, w_qkv, b_qkv).unflatten(-1, (3, case.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return functional.linear(attended.transpose(1, 2).flatten(2), w_out, b_out)

    yield Variant("nn.MultiheadAttention", lambda: layer(x, x, x, need_weights=False)[0])
    yield Variant("linear, scaled_dot_product_attention", written_out)


def _onnx_multihead(case, threads):
    from onnx import helper, numpy_helper

    x, w_query, w_key, w_value, _ = case.inputs()
    w_qkv, b_qkv, w_out, b_out = case.packed()

    def variant(name, nodes, **weights):
        behind = [helper.make_node("MatMul", ["a", "w_out"], ["p"]), helper.make_node("Add", ["p", "b_out"], ["o"])]
        weights |= {"b_qkv": b_qkv, "w_out": w_out, "b_out": b_out}
        # Constants, which it may pack for its matrix products beforehand.
        constants = [numpy_helper.from_array(array, letter) for letter, array in weights.items()]
        return _onnx_variant(threads, name, nodes + behind, {"x": x}, x.shape, constants=constants)

    settings = {"domain": "com.microsoft", "num_heads": case.heads}

    def attention():
        node = helper.make_node("Attention", ["x", "w_qkv", "b_qkv"], ["a"], **settings)
        return variant("Attention", [node], w_qkv=w_qkv)

    def multi_head_attention():
        weights = {"w_query": w_query, "w_key": w_key, "w_value": w_value}
        nodes = [helper.make_node("MatMul", ["x", w], [letter]) for w, letter in zip(weights, "qkv", strict=True)]
        nodes += [helper.make_node("MultiHeadAttention", [*"qkv", "b_qkv"], ["a"], **settings)]
        return variant("MatMul, MultiHeadAttention", nodes, **weights)

    yield from _those_that_work(attention, multi_head_attention)


def _openvino_multihead(case, threads):
    from openvino import opset13

    x = case.inputs()[0]
    w_qkv, b_qkv, w_out, b_out = map(opset13.constant, case.packed())
    parameter = opset13.parameter(x.shape, x.dtype)
    projected = opset13.add(opset13.matmul(parameter, w_qkv, False, False), b_qkv)
    heads = opset13.reshape(projected, [*x.shape[:2], 3, case.heads, -1], False)
    heads = opset13.transpose(heads, [2, 0, 3, 1, 4])
    parts = [opset13.gather(heads, opset13.constant(index), opset13.constant(0)) for index in range(3)]
    attended = opset13.scaled_dot_product_attention(*parts)
    rows = opset13.reshape(opset13.transpose(attended, [0, 2, 1, 3]), x.shape, False)
    node = opset13.add(opset13.matmul(rows, w_out, False, False), b_out)
    return _openvino_variants(threads, node, [parameter], [x])


def _jax_multihead(case, threads):
    import jax

    arrays = case.inputs()[0], *case.packed()
    for name, attend in (("dot_product_attention", jax.nn.dot_product_attention), ("einsums", _jax_einsums)):

        def layer(x, w_qkv, b_qkv, w_out, b_out, attend=attend):
            projected = (x @ w_qkv + b_qkv).reshape(*x.shape[:2], 3, case.heads, -1)
            attended = attend(*(projected[:, :, index] for index in range(3)))
            return attended.reshape(x.shape) @ w_out + b_out

        yield _jax_compiled(name, layer, arrays)


def _fastattn_rotary(case, threads):
    yield Variant("", functools.partial(fastattn.apply_rotary, *case.inputs()))


def _fastattn_rotary_out(case, threads):
    (x,) = case.inputs()
    yield Variant("", functools.partial(fastattn.apply_rotary, x, out=np.empty_like(x)))


def _numpy_rotary(case, threads):
    (x,) = case.inputs()
    yield Variant("", functools.partial(baselines.apply_rotary, x, *baselines.rotary_tables(*x.shape[-2:], x.dtype)))


def _torch_rotary(case, threads):
    torch = _torch(threads)
    (array,) = case.inputs()
    x = torch.from_numpy(array)
    # As wide as x, each half of the channels with the same angles.
    tables = map(torch.from_numpy, baselines.rotary_tables(*array.shape[-2:], array.dtype))
    cosines, sines = (torch.cat([table, table], -1) for table in tables)

    def rotate_half(x):
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)

    yield Variant("", lambda: x * cosines + rotate_half(x) * sines)


def _fastattn_minilm(case, threads):
    batch, *_ = _minilm_inputs(case)
    yield Variant("", functools.partial(_minilm().encode_tokens, batch))


def _numpy_minilm(case, threads):
    batch, *_ = _minilm_inputs(case)
    model = encoder.load_example().MiniLM(attention=encoder.load_example().numpy_attention)
    yield Variant("", functools.partial(model.encode_tokens, batch))


def _torch_minilm(case, threads):
    torch = _torch(threads)
    _, folder, *arrays = _minilm_inputs(case)
    ids, lengths = map(torch.from_numpy, arrays)
    for name, make in encoder.PYTORCH.items():
        yield Variant(name, functools.partial(make(folder), ids, lengths))


def _onnx_minilm(case, threads):
    _, folder, ids, lengths = _minilm_inputs(case)
    arrays = {"ids": ids, "lengths": lengths}

    def variant(name, make):
        return _onnx_model_variant(threads, name, make(folder, case.seqlen), arrays)

    yield from _those_that_work(*(functools.partial(variant, name, make) for name, make in encoder.ONNX.items()))


@functools.cache
def _minilm():
    return encoder.load_example().MiniLM()


@functools.cache
def _minilm_inputs(case):
    """The case's sentences as lists of token numbers; the model's folder; the lists padded, and their lengths."""
    minilm = encoder.load_example()
    batch = _minilm().tokenize(encoder.SENTENCES[: case.batch])
    return batch, minilm.find_model(), *minilm.pad(batch)


def _expected_embeddings(case):
    """All of it in float64."""
    batch, *_ = _minilm_inputs(case)
    return encoder.load_example().MiniLM(dtype=np.float64, attention=encoder.reference_attention).encode_tokens(batch)


def _fastattn_additive(case, threads):
    yield Variant("", functools.partial(fastattn.additive_attention, *case.inputs(), **case.projections()))


def _numpy_additive(case, threads, ways):
    call = functools.partial(baselines.additive_attention, *case.inputs(), **case.projections())
    for name, scores in ways.items():
        yield Variant(name, functools.partial(call, scores=scores))


def _numpy_textbook_additive(case, threads):
    _refuse_large(case, case.triples // (case.batch * case.heads))  # a head at a time
    return _numpy_additive(case, threads, {"": baselines.textbook_scores})


def _numpy_best_additive(case, threads):
    ways = {
        "tanh in place": baselines.tanh_scores,
        "exponentials in place": baselines.exponential_scores,
        "exponentials, channels in pairs": baselines.paired_scores,
    }
    return _numpy_additive(case, threads, ways)


def _refuse_large(case, count):
    nbytes = count * np.dtype(case.dtype).itemsize
    if nbytes > LARGEST_ARRAY:
        raise NotImplementedError(f"the formula's array would take {nbytes / 2**30:.1f} GiB")


def _torch_additive(case, threads, ways, is_compiled=False):
    """`ways` make scores of query, key and w_score; those in _KEYS_LAST take the key with its last axes swapped."""
    torch = _torch(threads)
    query, key, value, w_score = map(torch.from_numpy, case.inputs())
    projections = {name: torch.from_numpy(array) for name, array in case.projections().items()}
    key_last = key.mT.contiguous()
    if is_compiled:
        # One function is compiled for every case, and after 8 of them PyTorch would refuse to go on.
        torch._dynamo.config.recompile_limit = 256
    for name, make_scores in ways.items():
        is_key_last = make_scores in _KEYS_LAST

        def attend(query, key, value, w_score, w_query=None, w_key=None, make_scores=make_scores, swap=is_key_last):
            if w_query is not None:
                query, key = query @ w_query, w_key.mT @ key if swap else key @ w_key
            return torch.softmax(make_scores(torch, query, key, w_score), -1) @ value

        if is_compiled:
            attend = torch.compile(attend, dynamic=False, fullgraph=True)
        arrays = query, key_last if is_key_last else key, value, w_score
        yield Variant(name, functools.partial(attend, *arrays, **projections))


def _tanh_matmul(torch, query, key, w_score):
    return torch.tanh(query[..., :, None, :] + key[..., None, :, :]) @ w_score


def _tanh_sum(torch, query, key, w_score):
    """As Keras's AdditiveAttention writes it."""
    return torch.sum(w_score * torch.tanh(query[..., :, None, :] + key[..., None, :, :]), -1)


def _tanh_sum_keys_last(torch, query, key, w_score):
    return torch.sum(w_score[:, None] * torch.tanh(query[..., None] + key[..., None, :, :]), -2)


def _exponentials(torch, query, key, w_score):
    a, b = torch.exp(2 * query)[..., :, None, :], torch.exp(2 * key)[..., None, :, :]
    return torch.sum(w_score * (1 - 2 / (1 + a * b)), -1)


def _exponentials_keys_last(torch, query, key, w_score):
    a, b = torch.exp(2 * query)[..., None], torch.exp(2 * key)[..., None, :, :]
    return torch.sum(w_score[:, None] * (1 - 2 / (1 + a * b)), -2)


_KEYS_LAST = (_tanh_sum_keys_last, _exponentials_keys_last)


def _torch_eager_additive(case, threads):
    _refuse_large(case, case.triples)
    return _torch_additive(case, threads, {"": _tanh_matmul})


def _torch_keras_additive(case, threads):
    _refuse_large(case, case.triples)
    return _torch_additive(case, threads, {"": _tanh_sum})


def _torch_compiled_additive(case, threads):
    # PyTorch makes the same loops of Keras's sum as of the matrix product.
    ways = {"keys as rows": _tanh_matmul, "keys last": _tanh_sum_keys_last}
    return _torch_additive(case, threads, ways, is_compiled=True)


def _torch_compiled_exp_additive(case, threads):
    ways = {"keys as rows": _exponentials, "keys last": _exponentials_keys_last}
    return _torch_additive(case, threads, ways, is_compiled=True)


def _fastattn_softmax(case, threads):
    yield Variant("", functools.partial(fastattn.softmax, *case.inputs(), axis=case.axis))


def _fastattn_softmax_out(case, threads):
    (x,) = case.inputs()
    yield Variant("", functools.partial(fastattn.softmax, x, axis=case.axis, out=np.empty_like(x)))


def _numpy_softmax(case, threads):
    yield Variant("", functools.partial(baselines.softmax, *case.inputs(), case.axis))


def _scipy_softmax(case, threads):
    from scipy.special import softmax

    yield Variant("", functools.partial(softmax, *case.inputs(), axis=case.axis))


def _torch_softmax(case, threads):
    x = _torch(threads).from_numpy(case.inputs()[0])
    yield Variant("", lambda: x.softmax(case.axis))


def _those_that_work(*makers):
    """The variants of a library that it can build; its complaint if it can build none."""
    complaints = []
    for make in makers:
        try:
            made = make()
        except Exception as error:  # whatever a library throws at an operator it does not know
            complaints.append(error)
        else:
            yield made
    if len(complaints) == len(makers):
        raise complaints[0]


# fastattn's layer is measured against it too: it is no peer.
PRODUCTS_AND_ATTENTION = "products and attention"

# Name -> (distribution, how it does each kind of case).
LIBRARIES = {
    "fastattn": (
        "fastattn",
        {
            "attention": _fastattn_attention,
            "softmax": _fastattn_softmax,
            "additive": _fastattn_additive,
            "truncated": _fastattn_truncated,
            "decode": _fastattn_decode,
            "multihead": _fastattn_multihead,
            "rotary": _fastattn_rotary,
            "minilm": _fastattn_minilm,
        },
    ),
    "fastattn out=": ("fastattn", {"softmax": _fastattn_softmax_out, "rotary": _fastattn_rotary_out}),
    PRODUCTS_AND_ATTENTION: ("fastattn", {"multihead": _products_and_attention}),
    "NumPy": (
        "numpy",
        {
            "attention": _numpy_attention,
            "softmax": _numpy_softmax,
            "decode": _numpy_decode,
            "multihead": _numpy_multihead,
            "rotary": _numpy_rotary,
            "minilm": _numpy_minilm,
        },
    ),
    "NumPy, textbook": ("numpy", {"additive": _numpy_textbook_additive}),
    "NumPy, best": ("numpy", {"additive": _numpy_best_additive}),
    "NumPy, best band": ("numpy", {"truncated": _numpy_truncated}),
    "SciPy": ("scipy", {"softmax": _scipy_softmax}),
    "PyTorch": (
        "torch",
        {
            "attention": _torch_attention,
            "softmax": _torch_softmax,
            "additive": _torch_eager_additive,
            "decode": _torch_decode,
            "multihead": _torch_multihead,
            "rotary": _torch_rotary,
            "minilm": _torch_minilm,
        },
    ),
    "PyTorch, masked": ("torch", {"truncated": _torch_masked_truncated}),
    "PyTorch, flex": ("torch", {"truncated": _torch_flex_truncated}),
    "PyTorch, Keras form": ("torch", {"additive": _torch_keras_additive}),
    "PyTorch compiled": ("torch", {"additive": _torch_compiled_additive}),
    "PyTorch compiled, exp": ("torch", {"additive": _torch_compiled_exp_additive}),
    "ONNX Runtime": (
        "onnxruntime",
        {
            "attention": _onnx_attention,
            "truncated": _onnx_truncated,
            "decode": _onnx_decode,
            "multihead": _onnx_multihead,
            "minilm": _onnx_minilm,
        },
    ),
    "OpenVINO": (
        "openvino",
        {"attention": _openvino_attention, "decode": _openvino_decode, "multihead": _openvino_multihead},
    ),
    "JAX": (
        "jax",
        {
            "attention": _jax_attention,
            "truncated": _jax_truncated,
            "decode": _jax_decode,
            "multihead": _jax_multihead,
        },
    ),
}
# Against these a goal "beats the best peer" counts; NumPy and SciPy are baselines.
PEERS = ("PyTorch", "ONNX Runtime", "OpenVINO", "JAX")
# Those who write additive attention out.
COMPILED = ("PyTorch compiled", "PyTorch compiled, exp")
TRUNCATED_PEERS = ("NumPy, best band", "PyTorch, masked", "PyTorch, flex", "ONNX Runtime", "JAX")
ADDITIVE_PEERS = ("NumPy, textbook", "NumPy, best", "PyTorch", "PyTorch, Keras form", *COMPILED)


def thread_environment(threads):
    """What must be set before any library is imported, so that each uses exactly `threads` threads."""
    names = ("OMP", "OPENBLAS", "MKL", "BLIS", "VECLIB_MAXIMUM", "NUMEXPR", "FASTATTN")
    settings = {f"{name}_NUM_THREADS": str(threads) for name in names}
    # What fastattn sets by itself where it is imported before NumPy, as it is not here (fastattn/_load.py).
    settings["OPENBLAS_THREAD_TIMEOUT"] = "18"
    # XLA and TBB take one thread for each CPU they may run on: the affinity decides, and this only helps.
    settings["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}"
    settings["JAX_PLATFORMS"] = "cpu"
    settings["TF_CPP_MIN_LOG_LEVEL"] = "3"
    # torch.compile would leave a pool of processes behind.
    settings["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    return {**os.environ, **settings}


def versions():
    found = {}
    for distribution, *_ in LIBRARIES.values():
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def candidates(case, threads, names, notes):
    """A right and fast candidate for each library that is installed, has the function, and is among `names`.

    `notes` receives the variant chosen and the reason why a library is left out.
    """
    expected = None
    for name, (_, makers) in LIBRARIES.items():
        make = makers.get(case.kind)
        if make is None or name not in names:
            continue
        if expected is None:
            expected = _expected(case)
        try:
            variants = list(make(case, threads))
        except ModuleNotFoundError:
            continue
        except Exception as error:
            notes[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        right = [variant for variant in variants if _check(variant, expected, case, name, notes)]
        if not right:
            continue
        best = right[0]
        if len(right) > 1:
            best = min(right, key=lambda variant: _quick_seconds(variant.call))
        if best.name:
            notes[name] = best.name
        yield measure.Candidate(name, best.call)


def _expected(case):
    if case.kind == "attention":
        return baselines.expected_attention(*case.inputs(), case.is_causal)
    if case.kind == "additive":
        return baselines.expected_additive_attention(*case.inputs(), **case.projections())
    if case.kind == "truncated":
        return baselines.expected_truncated_attention(*case.inputs(), *case.window)
    if case.kind == "decode":
        return baselines.expected_attention(*case.as_rows.inputs())
    if case.kind == "multihead":
        return baselines.expected_multi_head_attention(case.inputs()[0], *case.packed(), heads=case.heads)
    if case.kind == "rotary":
        return baselines.expected_rotary(*case.inputs())
    if case.kind == "minilm":
        return _expected_embeddings(case)
    return baselines.softmax(case.inputs()[0].astype(np.float64), case.axis)


def _check(variant, expected, case, name, notes):
    if variant.expected is not None:
        expected = variant.expected
    try:
        got = variant.read(variant.call())
    except Exception as error:
        notes[name] = f"{variant.name} {type(error).__name__}: {error}".strip().splitlines()[0][:200]
        return False
    if case.kind == "decode":  # groups stand as rows in what is expected, and in some libraries' answers
        got = got.reshape(expected.shape)
    error = np.abs(got - expected).max() if got.shape == expected.shape else np.inf
    allowed = EMBEDDING_TOLERANCE if case.kind == "minilm" else TOLERANCE[case.dtype]
    if error <= allowed:
        return True
    notes[name] = f"{variant.name} left out: error {error:.1e}, allowed {allowed:.0e}".strip()
    return False


def _quick_seconds(call):
    measure.wait_until_idle()
    number, each = measure.calibrate(call)
    if each > measure.LONG_SECONDS:
        return each
    return min(measure.seconds(call, number) for _ in range(3))
