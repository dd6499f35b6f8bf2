"""asv: how much memory a call takes beyond its inputs and output, and in total."""

import ctypes
import functools
import resource
import sys
from pathlib import Path

import fastattn

from . import baselines
from .cases import Additive, Attention, Bilinear, in_window


def _resident():
    """Resident bytes of this process, now and at their peak."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    status = Path("/proc/self/status")
    if not status.exists():
        return peak, peak
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def _give_back():
    """Gives freed memory that the C library keeps back to the system: a result placed there would not raise the
    peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim:
        trim(0)


def extra_memory(call, result_bytes=0):
    """Bytes by which `call()` raises the peak memory of this process, not counting its result.

    The first call counts, with whatever it allocates and keeps: a cached workspace is memory too.
    """
    _give_back()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # resets the peak to what is resident now
    before, _ = _resident()
    result = call()
    _, peak = _resident()
    del result
    return max(0, peak - before - result_bytes)


IMPLEMENTATIONS = {
    "fastattn": fastattn.dot_product_attention,
    "numpy": baselines.dot_product_attention,
}
SEQLENS = [1024, 4096, 8192]


def _call(seqlen, implementation):
    case = Attention(1, 1, seqlen, seqlen, 64)
    arrays = case.inputs()
    return functools.partial(IMPLEMENTATIONS[implementation], *arrays), arrays[0].nbytes


class Memory:
    params = [SEQLENS, list(IMPLEMENTATIONS)]
    param_names = ["seqlen", "implementation"]

    def peakmem_attention(self, seqlen, implementation):
        call, _ = _call(seqlen, implementation)
        call()

    def track_extra_memory(self, seqlen, implementation):
        return extra_memory(*_call(seqlen, implementation))

    peakmem_attention.pretty_name = "Peak memory of attention"
    track_extra_memory.pretty_name = "Extra memory of attention"
    track_extra_memory.unit = "bytes"


def _other_call(kind, seqlen, implementation):
    """The same for another kind of attention, given by the name of its function."""
    module = {"fastattn": fastattn, "numpy": baselines}[implementation]
    arrays = {"additive_attention": Additive, "bilinear_attention": Bilinear}[kind](1, 1, seqlen, seqlen, 64).inputs()
    return functools.partial(getattr(module, kind), *arrays), arrays[0].nbytes


class OtherKindsMemory:
    params = [["additive_attention", "bilinear_attention"], [1024, 4096], list(IMPLEMENTATIONS)]
    param_names = ["kind", *Memory.param_names]

    def peakmem_attention(self, kind, seqlen, implementation):
        call, _ = _other_call(kind, seqlen, implementation)
        call()

    def track_extra_memory(self, kind, seqlen, implementation):
        return extra_memory(*_other_call(kind, seqlen, implementation))

    peakmem_attention.pretty_name = "Peak memory of additive and bilinear attention"
    track_extra_memory.pretty_name = "Extra memory of additive and bilinear attention"
    track_extra_memory.unit = "bytes"


def _window_call(seqlen, implementation):
    case = in_window(seqlen, (64, 64))
    module = {"fastattn": fastattn, "numpy": baselines}[implementation]
    return functools.partial(module.truncated_attention, *case.inputs(), *case.window), case.nbytes


class WindowMemory:
    params = [[1024, 65536], list(IMPLEMENTATIONS)]
    param_names = Memory.param_names

    def peakmem_attention(self, seqlen, implementation):
        call, _ = _window_call(seqlen, implementation)
        call()

    def track_extra_memory(self, seqlen, implementation):
        return extra_memory(*_window_call(seqlen, implementation))

    peakmem_attention.pretty_name = "Peak memory of attention in a window"
    track_extra_memory.pretty_name = "Extra memory of attention in a window"
    track_extra_memory.unit = "bytes"
