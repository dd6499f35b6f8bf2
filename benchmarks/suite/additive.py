"""asv: additive and bilinear attention and their gradients, by shapes, dtypes and threads, beside NumPy baselines."""

import functools

from threadpoolctl import threadpool_limits

import fastattn

from . import baselines
from .cases import ADDITIVE_BACK, ADDITIVE_SHAPES, ADDITIVE_STEPS, BILINEAR_SHAPES, Additive, Bilinear


# Cached rather than an asv `setup` hook: see attention.py.
@functools.cache
def _additive(shape, dtype, is_projected, implementation):
    case = Additive(*shape, dtype, is_projected)
    name, _, threads = implementation.partition(", ")
    # For both: products with projections are NumPy's.
    threadpool_limits(int(threads[0]) if threads else 1)
    if name == "numpy":
        call = functools.partial(baselines.additive_attention, scores=baselines.exponential_scores)
    else:
        call = functools.partial(fastattn.additive_attention, num_threads=int(threads[0]))
    return functools.partial(call, *case.inputs(), **case.projections())


class AdditiveAttention:
    # NumPy's sums and exponentials always use one thread, so it is measured once, as the baseline of both.
    params = [list(ADDITIVE_SHAPES), ["float32", "float64"], ["fastattn, 1 thread", "fastattn, 2 threads", "numpy"]]
    param_names = ["shape", "dtype", "implementation"]

    def time_attention(self, shape, dtype, implementation):
        _additive(shape, dtype, False, implementation)()

    time_attention.pretty_name = "Additive attention"


class ProjectedAdditiveAttention:
    params = [[(1, 8, 128, 128, 64), (1, 8, 512, 512, 64)], *AdditiveAttention.params[1:]]
    param_names = AdditiveAttention.param_names

    def time_attention(self, shape, dtype, implementation):
        _additive(shape, dtype, True, implementation)()

    time_attention.pretty_name = "Additive attention with projections"


@functools.cache
def _way_back(name, implementation):
    case = next(case for case in ADDITIVE_BACK if case.name == name)
    library, _, threads = implementation.partition(", ")
    if library == "numpy":
        threadpool_limits(1)
        return functools.partial(baselines.additive_gradients, case.grad_out(), *case.inputs())
    vjp = functools.partial(fastattn.additive_attention_vjp, wrt=("query", "key", "value", "w_score"))
    return functools.partial(vjp, case.grad_out(), *case.inputs(), num_threads=int(threads[0]))


class AdditiveGradients:
    """With the forward pass, as its output is not given."""

    params = [[case.name for case in ADDITIVE_BACK], AdditiveAttention.params[2]]
    param_names = ["case", "implementation"]

    def time_gradients(self, case, implementation):
        _way_back(case, implementation)()

    time_gradients.pretty_name = "Gradients of additive attention"


@functools.cache
def _step(name, keys):
    query, key, w_score, w_key = next(case for case in ADDITIVE_STEPS if case.name == name).inputs()
    threadpool_limits(1)
    call = functools.partial(fastattn.additive_attention, query, w_score=w_score, value=key, num_threads=1)
    if keys == "prepared":
        return functools.partial(call, key=fastattn.prepare_additive_keys(key, w_key))
    if keys == "projected":
        return functools.partial(call, key=key @ w_key)
    return functools.partial(call, key=key, w_key=w_key)


class AdditiveStep:
    """One query at a time: what it saves to prepare the keys."""

    params = [[case.name for case in ADDITIVE_STEPS], ["prepared", "projected", "neither"]]
    param_names = ["case", "keys"]

    def time_step(self, case, keys):
        _step(case, keys)()

    time_step.pretty_name = "A step over additive keys"


@functools.cache
def _bilinear(shape, dtype, threads, implementation):
    arrays = Bilinear(*shape, dtype).inputs()
    threadpool_limits(threads)
    if implementation == "numpy":
        return functools.partial(baselines.bilinear_attention, *arrays)
    return functools.partial(fastattn.bilinear_attention, *arrays, num_threads=threads)


class BilinearAttention:
    params = [list(BILINEAR_SHAPES), ["float32", "float64"], [1, 2], ["fastattn", "numpy"]]
    param_names = ["shape", "dtype", "threads", "implementation"]

    def time_attention(self, shape, dtype, threads, implementation):
        _bilinear(shape, dtype, threads, implementation)()

    time_attention.pretty_name = "Bilinear attention"
