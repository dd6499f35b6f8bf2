"""asv: dot-product attention and its gradients over shapes, dtypes, rules and threads, beside NumPy baselines."""

import functools

from threadpoolctl import threadpool_limits

import fastattn

from . import baselines
from .cases import ATTENTION_BACK, ATTENTION_SHAPES, Attention


# No asv `setup` hook: with one, asv times a single call per sample, which is noise at microseconds. Here the first call
# makes the inputs, and asv's warm-up discards that call (except with --quick).
@functools.cache
def _call(shape, dtype, is_causal, threads, implementation):
    arrays = Attention(*shape, dtype, is_causal).inputs()
    if implementation == "numpy":
        threadpool_limits(threads)
        return functools.partial(baselines.dot_product_attention, *arrays, is_causal)
    attend = functools.partial(fastattn.dot_product_attention, num_threads=threads)
    return functools.partial(attend, *arrays, is_causal=is_causal)


class DotProductAttention:
    params = [list(ATTENTION_SHAPES), ["float32", "float64"], [1, 2], ["fastattn", "numpy"]]
    param_names = ["shape", "dtype", "threads", "implementation"]

    def time_attention(self, shape, dtype, threads, implementation):
        _call(shape, dtype, False, threads, implementation)()

    time_attention.pretty_name = "Dot-product attention"


class CausalAttention:
    params = [[(1, 8, 512, 512, 64), (1, 8, 2048, 2048, 64)], *DotProductAttention.params[1:]]
    param_names = DotProductAttention.param_names

    def time_attention(self, shape, dtype, threads, implementation):
        _call(shape, dtype, True, threads, implementation)()

    time_attention.pretty_name = "Causal attention"


@functools.cache
def _way_back(name, threads, implementation):
    case = next(case for case in ATTENTION_BACK if case.name == name)
    if implementation == "numpy":
        threadpool_limits(threads)
        arguments = case.grad_out(), *case.inputs(), case.visible(), case.rules.get("bias")
        return functools.partial(baselines.attention_gradients, *arguments)
    output, lse = fastattn.dot_product_attention(*case.inputs(), return_lse=True, **case.rules)
    names = ("query", "key", "value", *(name for name in case.rules if name == "bias"))
    vjp = functools.partial(fastattn.dot_product_attention_vjp, wrt=names, num_threads=threads, **case.rules)
    return functools.partial(vjp, case.grad_out(), *case.inputs(), output=output, lse=lse)


class AttentionGradients:
    """The way back alone; NumPy's includes the weights."""

    params = [[case.name for case in ATTENTION_BACK], [1, 2], ["fastattn", "numpy"]]
    param_names = ["case", "threads", "implementation"]

    def time_gradients(self, case, threads, implementation):
        _way_back(case, threads, implementation)()

    time_gradients.pretty_name = "Gradients of attention"
