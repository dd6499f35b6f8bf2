"""asv: linear attention by shapes and threads, whole sequences, gradients and single steps, beside NumPy baselines."""

import functools

import numpy as np

import fastattn

from . import baselines
from .cases import LINEAR, LINEAR_STEPS

SEQUENCES = {case.name: case for case in LINEAR}
STEPS = {case.name: case for case in LINEAR_STEPS}


# Cached rather than an asv `setup` hook: see attention.py.
@functools.cache
def _call(name, threads, implementation):
    case = SEQUENCES[name]
    if implementation == "numpy":
        attend = baselines.gated_delta_rule if case.is_delta else baselines.linear_attention
        return functools.partial(attend, *case.inputs(), *case.gates())
    gates = {}
    if case.is_delta:
        log_decay, beta = case.gates()
        gates = {"feature_map": None, "log_decay": log_decay[..., None], "beta": beta}
    return functools.partial(fastattn.linear_attention, *case.inputs(), is_causal=True, num_threads=threads, **gates)


@functools.cache
def _step(name, implementation):
    case = STEPS[name]
    *arrays, state = case.inputs()
    state = state.copy()
    if implementation == "numpy":
        return functools.partial(baselines.linear_step, *arrays, state, case.decay)
    decay = np.full((1, 1), np.log(case.decay), np.float32)
    return functools.partial(
        fastattn.linear_attention,
        *arrays,
        feature_map=None,
        is_causal=True,
        log_decay=decay,
        state=state,
        state_out=state,
        num_threads=1,
    )


class LinearAttention:
    params = [list(SEQUENCES), ["fastattn, 1 thread", "fastattn, 2 threads", "numpy"]]
    param_names = ["case", "implementation"]

    def time_linear(self, case, implementation):
        name, _, threads = implementation.partition(", ")
        _call(case, int(threads[0]) if threads else 1, name)()

    time_linear.pretty_name = "Linear attention"


@functools.cache
def _gradients(name, threads, implementation):
    query, key, value = SEQUENCES[name].inputs()
    arrays = np.ones_like(value), query, key, value
    if implementation == "numpy":
        return functools.partial(baselines.linear_attention_gradients, *arrays)
    return functools.partial(fastattn.linear_attention_vjp, *arrays, is_causal=True, num_threads=threads)


class LinearGradients:
    params = [
        [name for name in SEQUENCES if not SEQUENCES[name].is_delta],
        ["fastattn, 1 thread", "fastattn, 2 threads", "numpy"],
    ]
    param_names = ["case", "implementation"]

    def time_gradients(self, case, implementation):
        name, _, threads = implementation.partition(", ")
        _gradients(case, int(threads[0]) if threads else 1, name)()

    time_gradients.pretty_name = "Gradients of linear attention"


class LinearStep:
    params = [list(STEPS), ["fastattn", "numpy"]]
    param_names = ["case", "implementation"]

    def time_step(self, case, implementation):
        _step(case, implementation)()

    time_step.pretty_name = "A token of linear attention"
