"""fastattn.integrations.onnx: ONNX's own node cases, random nodes, and graphs, beside ONNX's reference evaluator."""

import functools
import importlib
import warnings

import fresh_process
import numpy as np
import pytest

import fastattn

onnx = pytest.importorskip("onnx", reason="fastattn.integrations.onnx needs ONNX")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from fastattn.integrations.onnx import operators  # noqa: E402

MODULES = {"Attention": "attention", "LinearAttention": "linear_attention", "Softmax": "softmax",
           "LogSoftmax": "logsoftmax"}  # fmt: skip
COUNTS = {"Attention": 64, "LinearAttention": 14, "Softmax": 7, "LogSoftmax": 7}  # of 1.22; 1.23 has 93 of Attention
newer = pytest.mark.skipif(
    onnx.defs.onnx_opset_version() < 28,
    reason="before 1.23 the evaluator of ONNX has no windows and fails with lengths",
)


@functools.cache
def node_cases():
    """The cases that ONNX's wheel has for the operators, without those of their definitions by other operators."""
    name = "onnx.backend.test.case.node"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {}
        for module in MODULES.values():
            importlib.import_module(f"{name}.{module}")
        for op in MODULES:  # ONNX collects by module, once
            found |= {case.name: case for case in importlib.import_module(name).collect_testcases(op)}
    return [case for case in found.values() if "expanded" not in case.name]


def node(op, inputs, outputs=("Y",), opset=25, **attributes):
    """A model of one node. `inputs`: arrays by name, in order; None is one that is left out."""
    made = helper.make_node(op, [name if x is not None else "" for name, x in inputs.items()], outputs, **attributes)
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name, x in inputs.items() if x is not None
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs if name]
    graph = helper.make_graph([made], "one", tensors, results)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def run(model, inputs, ours=True):
    evaluator = ReferenceEvaluator(model, new_ops=operators if ours else None)
    return evaluator.run(None, {name: x for name, x in inputs.items() if x is not None})


def arrays(dtype=np.float32, batch=2, heads=4, kv_heads=2, rows=5, columns=7, channels=8, width=6):
    rng = np.random.default_rng(0)
    shapes = {"Q": (batch, heads, rows, channels), "K": (batch, kv_heads, columns, channels),
              "V": (batch, kv_heads, columns, width)}  # fmt: skip
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("op", MODULES)
def test_node_cases(op):
    """Shapes and dtypes are the wheel's; numbers within the case's tolerance, or for bfloat16, in which the evaluator
    also adds up, within a rounding of the case in float64."""
    cases = [case for case in node_cases() if [n.op_type for n in case.model.graph.node] == [op]]
    assert len(cases) >= COUNTS[op]
    for case in cases:
        names = [x.name for x in case.model.graph.input]
        for inputs, expected in case.data_sets:
            given = dict(zip(names, inputs, strict=True))
            results = run(case.model, given)
            rtol, atol = case.rtol, case.atol
            if any(x.dtype.name == "bfloat16" for x in inputs):
                rtol = atol = 2.0**-8
                wide = {name: x.astype(np.float64) if x.dtype.kind == "V" else x for name, x in given.items()}
                exact = run(case.model, wide, ours=False)
            else:
                exact = expected
            for result, shown, number in zip(results, expected, exact, strict=True):
                assert (result.dtype, result.shape) == (shown.dtype, shown.shape), case.name
                number, result = (np.asarray(x).astype(np.float64) for x in (number, result))
                np.testing.assert_allclose(result, number, rtol, atol, err_msg=case.name)


def random_node(rng):
    """Attributes, inputs and names of outputs of an Attention node, all rules at random."""
    batch, kv_heads, group, rows, columns, channels, width = rng.integers(1, 5, 7)
    cache = rng.choice(["none", "inside", "outside"])
    past = int(rng.integers(0, 4)) if cache == "inside" else 0
    total = int(columns) + past
    heads = kv_heads * group
    x = {"Q": rng.standard_normal((batch, heads, rows, channels)),
         "K": rng.standard_normal((batch, kv_heads, columns, channels)),
         "V": rng.standard_normal((batch, kv_heads, columns, width))}  # fmt: skip
    attributes = {}
    if rng.random() < 0.5:
        x = {name: a.swapaxes(1, 2).reshape(a.shape[0], a.shape[2], -1) for name, a in x.items()}
        attributes.update(q_num_heads=int(heads), kv_num_heads=int(kv_heads))
    seen = int(rng.integers(1, total + 1)) if rng.random() < 0.3 else total
    shape = [(1, seen), (rows, seen), (heads, rows, seen), (batch, 1, rows, seen)][rng.integers(4)]
    kind = rng.choice(["none", "bool", "float", "int"])
    x["attn_mask"] = {
        "none": None,
        "bool": rng.random(shape) < 0.7,
        "float": rng.standard_normal(shape),
        "int": rng.integers(-3, 3, shape),
    }[kind]
    inside = cache == "inside"
    x["past_key"] = rng.standard_normal((batch, kv_heads, past, channels)) if inside else None
    x["past_value"] = rng.standard_normal((batch, kv_heads, past, width)) if inside else None
    x["nonpad_kv_seqlen"] = rng.integers(0, columns + 1, batch) if cache == "outside" else None
    mode = int(rng.integers(4))
    attributes.update(is_causal=int(rng.integers(2)), qk_matmul_output_mode=mode)
    if rng.random() < 0.5:
        attributes.update(left_window_size=int(rng.integers(-1, 4)), right_window_size=int(rng.integers(-1, 4)))
    if rng.random() < 0.4 and mode != 0:  # there the evaluator returns what is capped
        attributes["softcap"] = 1.5
    if rng.random() < 0.5:
        attributes["scale"] = 0.25  # whose root the evaluator takes in float32
    return x, attributes, ["Y", "present_key", "present_value", "qk"]


@newer
def test_random_nodes():
    """All outputs are the evaluator's own, in float64."""
    rng = np.random.default_rng(1)
    for number in range(300):
        inputs, attributes, outputs = random_node(rng)
        model = node("Attention", inputs, outputs, **attributes)
        # Beside a mask of one row ONNX's evaluator (1.23) knows what is causal for the first query only, and beside one
        # of integers not at all.
        mask, rows = inputs["attn_mask"], inputs["Q"].shape[1 if "q_num_heads" in attributes else 2]
        rowwise = mask if mask is None else np.broadcast_to(mask, (*mask.shape[:-2], rows, mask.shape[-1]))
        rowwise = rowwise.astype(np.float64) if mask is not None and mask.dtype.kind == "i" else rowwise
        spread = inputs | {"attn_mask": rowwise}
        for name, ours, theirs in zip(outputs, run(model, inputs), run(model, spread, ours=False), strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            np.testing.assert_allclose(ours, theirs, 1e-11, 1e-13, err_msg=f"{name} of {number}: {attributes}")


def test_mode_0_is_the_product_itself():
    """As the operator's text and its definition by other operators have it."""
    inputs = arrays(np.float64)
    model = node("Attention", inputs, ["Y", "", "", "qk"], softcap=0.5)
    product = inputs["Q"] @ inputs["K"].repeat(2, axis=1).swapaxes(2, 3) / np.sqrt(8)
    np.testing.assert_allclose(run(model, inputs)[1], product, 1e-12)


def encoder():
    """A block as exporters write it: norm, projections, reshaped heads, Attention, a gate by Softmax; its weights."""
    rng = np.random.default_rng(3)
    width = 16
    weights = {name: rng.standard_normal((width, width)).astype(np.float32) / 4 for name in ("wq", "wk", "wv", "wo")}
    weights |= {"scale": np.ones(width, np.float32), "heads": np.array([0, 0, 4, -1]), "flat": np.array([0, 0, -1])}
    nodes = [helper.make_node("LayerNormalization", ["x", "scale"], ["normed"])]
    for name in "qkv":
        nodes += [helper.make_node("MatMul", ["normed", f"w{name}"], [f"{name}_flat"]),
                  helper.make_node("Reshape", [f"{name}_flat", "heads"], [f"{name}_heads"]),
                  helper.make_node("Transpose", [f"{name}_heads"], [name], perm=[0, 2, 1, 3])]  # fmt: skip
    nodes += [
        helper.make_node("Attention", ["q", "k", "v", "", "", "", "lengths"], ["seen", "", "", "weights"], is_causal=1,
                         qk_matmul_output_mode=3),
        helper.make_node("Attention", ["seen", "k", "v", ""], ["again"]),
        helper.make_node("Transpose", ["again"], ["tokens"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["tokens", "flat"], ["joined"]),
        helper.make_node("MatMul", ["joined", "wo"], ["projected"]),
        helper.make_node("Softmax", ["projected"], ["gate"]),
        helper.make_node("Mul", ["gate", "x"], ["gated"]),
        helper.make_node("LogSoftmax", ["gated"], ["y"], axis=1),
    ]  # fmt: skip
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "encoder",
        [tensor("x", TensorProto.FLOAT, [2, "tokens", width]), tensor("lengths", TensorProto.INT64, [2])],
        [tensor("y", TensorProto.FLOAT, [2, "tokens", width])],
        initializer=[numpy_helper.from_array(x, name) for name, x in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    onnx.checker.check_model(model, full_check=True)
    return model


@newer
def test_a_graph_with_its_intermediate_values():
    model = encoder()
    inputs = {"x": np.random.default_rng(4).standard_normal((2, 6, 16), dtype=np.float32), "lengths": np.array([6, 4])}
    ours = ReferenceEvaluator(model, new_ops=operators).run(None, inputs, intermediate=True)
    # The evaluator hands an output without a name, here the keys, on as the second node's mask.
    assert ours[""] is None
    unnamed = ["seen", "present_key", "present_value", "weights"]
    model.graph.node[10].output[:] = unnamed
    theirs = ReferenceEvaluator(model).run(None, inputs, intermediate=True)
    assert set(unnamed) <= set(theirs)
    for name in set(ours) - {""}:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape), name
        np.testing.assert_allclose(ours[name], theirs[name], 1e-4, 1e-5, err_msg=name)


def test_in_a_function_of_the_model():
    """Where an attribute is the function's."""
    inner = helper.make_node("Attention", ["Q", "K", "V"], ["Y"])
    attribute = inner.attribute.add()
    attribute.name, attribute.type, attribute.ref_attr_name = "is_causal", onnx.AttributeProto.INT, "before"
    imports = [helper.make_opsetid("", 24), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Causal", ["Q", "K", "V"], ["Y"], [inner], imports[:1], ["before"])
    inputs = arrays()
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in inputs.items()]
    call = helper.make_node("Causal", list(inputs), ["Y"], domain="own", before=1)
    graph = helper.make_graph([call], "caller", tensors, [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=imports, functions=[function])
    evaluator = ReferenceEvaluator(model)
    inside = ReferenceEvaluator(function, new_ops=operators)
    (theirs,), (ours,) = evaluator.run(None, inputs), inside.run(None, inputs, attributes={"before": 1})
    np.testing.assert_allclose(ours, theirs, 1e-5, 1e-6)


def test_nothing_is_copied(monkeypatch):
    """Heads in the last axis are a view, and the output is written in its place."""
    inputs = {name: np.ascontiguousarray(x.swapaxes(1, 2)).reshape(2, x.shape[2], -1) for name, x in arrays().items()}
    calls, function = [], fastattn.dot_product_attention

    def spy(*args, **kwargs):
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(fastattn, "dot_product_attention", spy)
    Y, = run(node("Attention", inputs, q_num_heads=4, kv_num_heads=2), inputs)  # fmt: skip
    ((args, kwargs),) = calls
    for given, x in zip(args, inputs.values(), strict=True):
        assert given.ctypes.data == x.ctypes.data
    assert kwargs["out"].ctypes.data == Y.ctypes.data
    heads = [x.reshape(2, x.shape[1], n, -1).swapaxes(1, 2) for x, n in zip(inputs.values(), (4, 2, 2), strict=True)]
    expected = function(*heads, enable_gqa=True)
    np.testing.assert_array_equal(Y, expected.swapaxes(1, 2).reshape(Y.shape))


def test_what_is_hidden_may_be_nan():
    inputs = arrays() | {"attn_mask": np.arange(7) < 4}
    inputs["K"][:, :, 4:] = np.nan
    inputs["V"][:, :, 4:] = np.inf
    assert np.isfinite(run(node("Attention", inputs), inputs)[0]).all()


def test_softmax_precision():
    inputs = arrays()
    for precision in TensorProto.FLOAT, TensorProto.DOUBLE:
        model = node("Attention", inputs, softmax_precision=precision)
        for ours, theirs in zip(run(model, inputs), run(model, inputs, ours=False), strict=True):
            assert ours.dtype == theirs.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, 1e-5, 1e-6)
    model, wide = node("Attention", inputs, softmax_precision=TensorProto.DOUBLE), arrays(np.float32)
    exact = run(node("Attention", wide), {name: x.astype(np.float64) for name, x in wide.items()})[0]
    np.testing.assert_array_equal(run(model, inputs)[0], exact.astype(np.float32))
    half = arrays(np.float16)
    run(node("Attention", half, softmax_precision=TensorProto.FLOAT16), half)
    for given, precision, named in (
        (inputs, TensorProto.FLOAT16, "FLOAT16"),
        (inputs, TensorProto.BFLOAT16, "BFLOAT16"),
        (arrays(np.float64), TensorProto.FLOAT, "FLOAT"),
        (inputs, 77, "77"),
    ):
        with pytest.raises(NotImplementedError, match=rf"^softmax_precision is {named}: "):
            run(node("Attention", given, softmax_precision=precision), given)


PACKED = {"Q": np.ones((1, 2, 6), np.float32), "K": np.ones((1, 3, 4), np.float32), "V": np.ones((1, 3, 4), np.float32)}
MASK = np.ones((5, 7), np.float32)
LINEAR = {name: np.ones((1, 2, 4), np.float32) for name in ("query", "key", "value")}
LINEAR |= {"past_state": None, "decay": None, "beta": None}


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "message"),
    [
        ("Attention", arrays(), {"q_num_heads": 4}, "q_num_heads is 4, but only arrays of three axes"),
        ("Attention", arrays(), {"qk_matmul_output_mode": 4}, "qk_matmul_output_mode must be 0, 1, 2 or 3, not 4"),
        ("Attention", arrays(), {"left_window_size": -2}, "left_window_size must be -1 or more, not -2"),
        ("Attention", arrays(), {"head_gate": 1}, "Attention has the attribute head_gate, which fastattn"),
        ("Attention", arrays(rows=5) | {"attn_mask": MASK, "past_key": MASK}, {}, "past_key and past_value must"),
        ("Attention", arrays() | {"attn_mask": MASK[:3]}, {}, "bias"),
        ("Attention", PACKED, {"q_num_heads": 3}, "kv_num_heads is None, but K has the shape"),
        ("Attention", PACKED, {"q_num_heads": 4, "kv_num_heads": 2}, "q_num_heads is 4, but Q has the shape"),
        ("LinearAttention", LINEAR, {"q_num_heads": 2, "kv_num_heads": 2}, "decay must be given where update_rule"),
        ("LinearAttention", LINEAR, {"q_num_heads": 2, "kv_num_heads": 2, "update_rule": "slow"}, "update_rule must"),
    ],
)  # fmt: skip
def test_refusals(op, inputs, attributes, message):
    model = node(op, inputs, opset=25 if op == "Attention" else 27, **attributes)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        run(model, inputs)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_rows_before_opset_13(op):
    """All axes from `axis` on; by default from axis 1 on."""
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    function = fastattn.softmax if op == "Softmax" else fastattn.log_softmax
    flat = {"x": x}
    np.testing.assert_array_equal(run(node(op, flat, opset=11), flat)[0], function(x, (1, 2)))
    np.testing.assert_array_equal(run(node(op, flat, opset=11, axis=-1), flat)[0], function(x, 2))
    np.testing.assert_array_equal(run(node(op, flat, opset=11, axis=0), flat)[0], function(x, None))
    np.testing.assert_array_equal(run(node(op, flat, opset=13), flat)[0], function(x, -1))


def test_a_missing_onnx_is_named():
    fresh_process.run("""
        import sys
        sys.modules["onnx"] = None
        try:
            import fastattn.integrations.onnx
        except ImportError as error:
            assert "needs ONNX: pip install" in str(error) and "fastattn[onnx]" in str(error), error
        else:
            raise AssertionError
    """)
