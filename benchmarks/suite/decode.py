"""asv: one and a few queries over a cache, by shapes, dtypes and threads, beside their NumPy baseline."""

import functools

from threadpoolctl import threadpool_limits

import fastattn

from . import baselines
from .cases import DECODE, Decode


# Cached rather than an asv `setup` hook: see attention.py.
@functools.cache
def _call(shape, dtype, threads, implementation):
    case = Decode(*shape, dtype)
    if implementation == "numpy":
        threadpool_limits(threads)
        return functools.partial(baselines.grouped_attention_keys_first, *case.inputs())
    attend = functools.partial(fastattn.dot_product_attention, num_threads=threads, enable_gqa=case.is_grouped)
    return functools.partial(attend, *case.inputs())


class DecodeAttention:
    params = [[case.shape for case in DECODE], ["float32", "float64"], [1, 2], ["fastattn", "numpy"]]
    param_names = ["shape", "dtype", "threads", "implementation"]

    def time_attention(self, shape, dtype, threads, implementation):
        _call(shape, dtype, threads, implementation)()

    time_attention.pretty_name = "A few queries over a cache"
