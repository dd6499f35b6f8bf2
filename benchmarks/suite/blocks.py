"""asv: attention in the True blocks of a pattern, beside its NumPy baseline."""

import functools

from threadpoolctl import threadpool_limits

import fastattn

from . import baselines
from .cases import BLOCKS

CASES = {str(case.seqlen_q): case for case in BLOCKS}


# Cached rather than an asv `setup` hook: see attention.py.
@functools.cache
def _call(seqlen, threads, implementation):
    case = CASES[seqlen]
    if implementation == "numpy":
        threadpool_limits(threads)
        return functools.partial(baselines.block_attention, *case.inputs(), case.pattern(), case.block)
    call = functools.partial(fastattn.dot_product_attention, *case.inputs(), num_threads=threads)
    return functools.partial(call, block_mask=case.pattern(), block_size=case.block)


class BlockMask:
    params = [list(CASES), [1, 2], ["fastattn", "numpy"]]
    param_names = ["seqlen", "threads", "implementation"]

    def time_attention(self, seqlen, threads, implementation):
        _call(seqlen, threads, implementation)()

    time_attention.pretty_name = "Attention in blocks"
