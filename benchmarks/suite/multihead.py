"""asv: a layer of multi-head attention by shapes, dtypes and threads, and a step of its training, beside NumPy's."""

import functools

from threadpoolctl import threadpool_limits

import fastattn

from . import baselines
from .cases import CACHED_STEPS, MULTI_HEAD_SHAPES, MultiHead, MultiHeadStep


# Cached rather than an asv `setup` hook: see attention.py.
@functools.cache
def _call(shape, dtype, threads, implementation):
    case = MultiHead(*shape, dtype)
    x, *weights = case.inputs()
    # For both: the matrix products are NumPy's.
    threadpool_limits(threads)
    if implementation == "numpy":
        return functools.partial(baselines.multi_head_attention, x, *case.packed(), case.heads)
    attend = fastattn.MultiHeadAttention(*weights, num_heads=case.heads, **case.biases())
    return functools.partial(attend, x, num_threads=threads)


class MultiHeadAttention:
    params = [list(MULTI_HEAD_SHAPES), ["float32", "float64"], [1, 2], ["fastattn", "numpy"]]
    param_names = ["shape", "dtype", "threads", "implementation"]

    def time_attention(self, shape, dtype, threads, implementation):
        _call(shape, dtype, threads, implementation)()

    time_attention.pretty_name = "A multi-head layer"


@functools.cache
def _step(shape, threads, implementation):
    case = MultiHeadStep(*shape)
    x, *weights = case.inputs()
    threadpool_limits(threads)
    if implementation == "numpy":
        return functools.partial(
            baselines.multi_head_attention_step, x, *case.packed(), case.heads, grad_out=case.grad_out()
        )
    layer = fastattn.MultiHeadAttention(*weights, num_heads=case.heads, **case.biases())
    return lambda: layer.vjp(x, num_threads=threads)[1](case.grad_out())


class MultiHeadAttentionStep:
    params = [list(MULTI_HEAD_SHAPES[:3]), [1, 2], ["fastattn", "numpy"]]
    param_names = ["shape", "threads", "implementation"]

    def time_step(self, shape, threads, implementation):
        _step(shape, threads, implementation)()

    time_step.pretty_name = "A step of training a layer"


@functools.cache
def _cached(name):
    case = next(case for case in CACHED_STEPS if case.name == name)
    token, before, *weights = case.inputs()
    threadpool_limits(1)
    layer = fastattn.MultiHeadAttention(*weights, num_heads=case.heads, rotary_base=1e4)
    cache = fastattn.KVCache(1, case.heads, 2 * case.seqlen_k, case.d_model // case.heads, window=case.seqlen_k)
    layer(before, cache=cache)
    return lambda: layer(token, cache=cache, num_threads=1)


class CachedStep:
    """One token, over a cache that drops the oldest now and then."""

    params = [[case.name for case in CACHED_STEPS]]
    param_names = ["case"]

    def time_step(self, case):
        _cached(case)()

    time_step.pretty_name = "A step of a layer over a cache"
