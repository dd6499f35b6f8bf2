"""OpenVINO on the CPU, in the dtype of its inputs."""

import dataclasses
import functools

import numpy as np

from .variant import Variant


def attention(case, threads):
    from openvino import opset13

    arrays = case.inputs()
    parameters = [opset13.parameter(array.shape, array.dtype) for array in arrays]
    node = opset13.scaled_dot_product_attention(*parameters, causal=case.is_causal)
    return _variants(threads, node, parameters, arrays)


def decode(case, threads):
    return attention(case.as_rows, threads)


def stored(case, threads):
    """Of its own dtypes. Its cache of 8 bits is inside of a model that grows it by a token a call."""
    from openvino import Tensor, Type, opset13

    if case.storage == "int8":
        raise NotImplementedError("it has no attention over int8 that is given")
    kind = {"float16": Type.f16, "bfloat16": Type.bf16}[case.storage]
    query, *others = (np.ascontiguousarray(x) for x in case.inputs())
    arrays = [query.reshape(case.as_rows.inputs()[0].shape), *others]
    parameters = [opset13.parameter(array.shape, kind) for array in arrays]
    node = opset13.convert(opset13.scaled_dot_product_attention(*parameters, causal=False), "f32")
    tensors = [Tensor(array.view(np.uint16), array.shape, kind) for array in arrays]
    for hint in ("f32", {"float16": "f16", "bfloat16": "bf16"}[case.storage]):
        for variant in _variants(threads, node, parameters, tensors, hint):
            # Such a tensor does not keep the memory that it lies over.
            yield dataclasses.replace(variant, call=functools.partial(_while_alive, arrays, variant.call))


def _while_alive(arrays, call):
    return call()


def multihead(case, threads):
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
    return _variants(threads, node, [parameter], [x])


def _variants(threads, node, parameters, arrays, precision="f32"):
    """A graph that ends in `node`, with these parameters and their arrays."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # The default would be bfloat16 if the CPU has it.
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = openvino.Core().compile_model(openvino.Model([node], parameters), "CPU", settings)
    request = compiled.create_infer_request()
    for index, array in enumerate(arrays):
        tensor = array if isinstance(array, openvino.Tensor) else openvino.Tensor(array, shared_memory=True)
        request.set_input_tensor(index, tensor)

    def call():
        request.start_async()
        request.wait()
        return request

    def read(request):
        return np.array(request.get_output_tensor(0).data)

    yield Variant(f"infer in {precision}", lambda: request.infer(share_outputs=True), lambda _: read(request))
    yield Variant(f"start_async in {precision}", call, read)


# Name -> (distribution, its implementation of each kind of case).
LIBRARIES = {
    "OpenVINO": ("openvino", {"attention": attention, "decode": decode, "stored": stored, "multihead": multihead})
}
