"""asv: dot-product attention over shapes, dtypes, causal or not and threads, beside its NumPy baseline."""

import functools

from threadpoolctl import threadpool_limits

import fastattn

from . import baselines
from .cases import ATTENTION_SHAPES, Attention


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


class CausalAttention:
    params = [[(1, 8, 512, 512, 64), (1, 8, 2048, 2048, 64)], *DotProductAttention.params[1:]]
    param_names = DotProductAttention.param_names

    def time_attention(self, shape, dtype, threads, implementation):
        _call(shape, dtype, True, threads, implementation)()
