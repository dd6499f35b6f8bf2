"""The libraries that fastattn is measured against, each at its best.

One module per library; its `LIBRARIES` says how that library implements each kind of case. Every library gets its
inputs beforehand in its own format and preferred layout. If it has several implementations (`Variant`), all are tried
on each case, and the fastest with the right answer counts.
"""

import importlib.metadata
import os

import numpy as np

import encoder
import measure
from suite import baselines

from . import entmax, fastattn, jax, numpy, onnx, openvino, torch
from .fastattn import PRODUCTS_AND_ATTENTION
from .variant import Variant, of_tokens

__all__ = ["PRODUCTS_AND_ATTENTION", "Variant"]

LIBRARIES = {
    name: library
    for module in (fastattn, numpy, torch, entmax, onnx, openvino, jax)
    for name, library in module.LIBRARIES.items()
}
# The libraries that "beats the best peer" refers to; NumPy and SciPy are baselines.
PEERS = ("PyTorch", "ONNX Runtime", "OpenVINO", "JAX")
# Libraries that write out additive attention.
COMPILED = ("PyTorch compiled", "PyTorch compiled, exp")
TRUNCATED_PEERS = ("NumPy, best band", "PyTorch, masked", "PyTorch, flex", "ONNX Runtime", "JAX")
GRAPH_PEERS = ("NumPy", "SciPy", "PyTorch, sparse", "PyTorch Geometric")
BLOCKS_PEERS = ("NumPy", "PyTorch, masked", "PyTorch, flex")
NEIGHBORHOOD_PEERS = ("NumPy", "PyTorch, gather", "PyTorch, masked", "PyTorch, flex")
ADDITIVE_PEERS = ("NumPy, textbook", "NumPy, best", "PyTorch", "PyTorch, Keras form", *COMPILED)
# Errors allowed before a library is timed, for values near 1: several times those of real float32 and float64, and far
# below those of hidden bfloat16 arithmetic.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
# Half a unit of the dtype for each of three roundings: of scores, of weights, of the result. int8 stands for the
# numbers that are stored, so it has float32's.
STORED_TOLERANCE = {"float16": 1.5 * 2**-10, "bfloat16": 1.5 * 2**-7, "int8": 2e-5}
# Embeddings have norm 1 and elements of about 1/20.
EMBEDDING_TOLERANCE = 1e-5


def thread_environment(threads):
    """What must be set before any library is imported, so that each uses exactly `threads` threads."""
    names = ("OMP", "OPENBLAS", "MKL", "BLIS", "VECLIB_MAXIMUM", "NUMEXPR", "FASTATTN")
    settings = {f"{name}_NUM_THREADS": str(threads) for name in names}
    # fastattn sets this itself if imported before NumPy, which is not the case here (fastattn/_load.py).
    settings["OPENBLAS_THREAD_TIMEOUT"] = "18"
    # XLA and TBB use one thread per CPU that they may run on: affinity decides, this only helps.
    settings["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}"
    settings["JAX_PLATFORMS"] = "cpu"
    settings["TF_CPP_MIN_LOG_LEVEL"] = "3"
    # Otherwise torch.compile would leave a pool of processes behind.
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
    """The fastest correct candidate of each library that is installed, has the function, and is in `names`.

    `notes` receives the variant chosen, or the reason why a library is left out.
    """
    expected = None
    for name, (_, makers) in LIBRARIES.items():
        make = makers.get(case.kind)
        if make is None or name not in names:
            continue
        if expected is None:
            expected = expected_answer(case)
        try:
            variants = list(make(case, threads))
        except ModuleNotFoundError:
            continue
        except Exception as error:
            notes[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        right = [variant for variant in variants if check(variant, expected, case, name, notes)]
        if not right:
            continue
        best = right[0]
        if len(right) > 1:
            best = min(right, key=lambda variant: _quick_seconds(variant.call))
        if best.name:
            notes[name] = best.name
        yield measure.Candidate(name, best.call)


def expected_answer(case):
    if case.kind == "attention":
        return baselines.expected_attention(*case.inputs(), case.is_causal)
    if case.kind == "attentionback":
        arguments = case.grad_out(), *case.inputs(), case.visible(), case.rules.get("bias")
        return of_tokens(baselines.expected_attention_gradients(*arguments))
    if case.kind == "additive":
        return baselines.expected_additive_attention(*case.inputs(), **case.projections())
    if case.kind == "additiveback":
        return of_tokens(baselines.expected_additive_gradients(case.grad_out(), *case.inputs()))
    if case.kind == "truncated":
        return baselines.expected_truncated_attention(*case.inputs(), *case.window)
    if case.kind == "decode":
        return baselines.expected_attention(*case.as_rows.inputs())
    if case.kind == "stored":
        query, key, value = case.read_back()
        return baselines.expected_attention(query.reshape(case.as_rows.shape[:3] + query.shape[-1:]), key, value)
    if case.kind == "multihead":
        return baselines.expected_multi_head_attention(case.inputs()[0], *case.packed(), heads=case.heads)
    if case.kind == "multiheadstep":
        return baselines.expected_multi_head_attention_step(
            case.inputs()[0], *case.packed(), heads=case.heads, grad_out=case.grad_out()
        )
    if case.kind == "rotary":
        return baselines.expected_rotary(*case.inputs())
    if case.kind == "linear" and case.is_delta:
        return baselines.expected_gated_delta_rule(*case.inputs(), *case.gates())
    if case.kind == "linear":
        return baselines.expected_linear_attention(*case.inputs())
    if case.kind == "linearstep":
        return baselines.linear_step(*(array.astype(np.float64) for array in case.inputs()), case.decay)
    if case.kind == "graph":
        return baselines.expected_graph_attention(*case.inputs(), case.structure, case.rows(), case.w_score())
    if case.kind == "graphback":
        return baselines.expected_graph_gradients(
            case.grad_out(), *case.inputs(), case.structure, case.rows(), case.w_score()
        )
    if case.kind == "blocks":
        return baselines.expected_block_attention(*case.inputs(), case.pattern(), case.block)
    if case.kind == "neighborhood":
        return baselines.expected_neighborhood_attention(*(x[0] for x in case.in_a_row()), case.seen())
    if case.kind == "minilm":
        return encoder.expected(case)
    if case.kind == "sparse":
        return baselines.sparse(case.inputs()[0].astype(np.float64), case.function, case.axis)
    if case.kind == "softmaxback":
        return baselines.softmax_back(*(array.astype(np.float64) for array in case.inputs()), case.axis)
    return baselines.softmax(case.inputs()[0].astype(np.float64), case.axis)


def check(variant, expected, case, name, notes):
    if variant.expected is not None:
        expected = variant.expected
    try:
        got = variant.read(variant.call())
    except Exception as error:
        notes[name] = f"{variant.name} {type(error).__name__}: {error}".strip().splitlines()[0][:200]
        return False
    if case.kind in ("decode", "stored", "neighborhood"):  # groups are rows, or pixels tokens, in some results
        got = got.reshape(expected.shape)
    error = np.abs(got - expected).max() if got.shape == expected.shape else np.inf
    allowed = variant.allowed or _tolerance(case)
    if error <= allowed:
        return True
    notes[name] = f"{variant.name} left out: error {error:.1e}, allowed {allowed:.0e}".strip()
    return False


def _tolerance(case):
    if case.kind == "minilm":
        return EMBEDDING_TOLERANCE
    return STORED_TOLERANCE[case.storage] if case.kind == "stored" else TOLERANCE[case.dtype]


def _quick_seconds(call):
    measure.wait_until_idle()
    number, each = measure.calibrate(call)
    if each > measure.LONG_SECONDS:
        return each
    return min(measure.seconds(call, number) for _ in range(3))
