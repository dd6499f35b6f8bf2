"""asv: rotary positions by shapes, dtypes and threads, beside their NumPy baseline."""

import functools

import fastattn

from . import baselines
from .cases import ROTARY_SHAPES, Rotary


# Cached rather than an asv `setup` hook: see attention.py.
@functools.cache
def _call(shape, dtype, threads, implementation):
    (x,) = Rotary(*shape, dtype).inputs()
    if implementation == "numpy":
        return functools.partial(baselines.apply_rotary, x, *baselines.rotary_tables(*shape[-2:], dtype))
    return functools.partial(fastattn.apply_rotary, x, num_threads=threads)


class ApplyRotary:
    # NumPy's sums and products of arrays always use one thread: measured once, as the baseline of both.
    params = [list(ROTARY_SHAPES), ["float32", "float64"], ["fastattn, 1 thread", "fastattn, 2 threads", "numpy"]]
    param_names = ["shape", "dtype", "implementation"]

    def time_rotary(self, shape, dtype, implementation):
        name, _, threads = implementation.partition(", ")
        _call(shape, dtype, int(threads[0]) if threads else 1, name)()

    time_rotary.pretty_name = "Rotary positions"
