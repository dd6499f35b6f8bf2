"""OpenVINO, in float32 on the CPU."""

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


def _variants(threads, node, parameters, arrays):
    """A graph that ends in `node`, with these parameters and their arrays."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # The default would be bfloat16 if the CPU has it.
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


# Name -> (distribution, its implementation of each kind of case).
LIBRARIES = {"OpenVINO": ("openvino", {"attention": attention, "decode": decode, "multihead": multihead})}
