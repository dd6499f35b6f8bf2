"""asv: attention in a window over windows, lengths and threads, beside its NumPy baseline."""

import functools

from threadpoolctl import threadpool_limits

import fastattn

from . import baselines
from .cases import WINDOWS, in_window


# Cached rather than an asv `setup` hook: see attention.py.
@functools.cache
def _call(window, seqlen, threads, implementation):
    case = in_window(seqlen, window)
    if implementation == "numpy":
        threadpool_limits(threads)
        return functools.partial(baselines.truncated_attention, *case.inputs(), *case.window)
    attend = functools.partial(fastattn.truncated_attention, num_threads=threads)
    return functools.partial(attend, *case.inputs(), *case.window)


class TruncatedAttention:
    # The time per row should be the same at every length.
    params = [list(WINDOWS), [1024, 4096, 65536], [1, 2], ["fastattn", "numpy"]]
    param_names = ["window", "seqlen", "threads", "implementation"]

    def time_attention(self, window, seqlen, threads, implementation):
        _call(window, seqlen, threads, implementation)()

    time_attention.pretty_name = "Attention in a window"
