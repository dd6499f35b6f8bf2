"""asv: attention of pixels to the pixels around them and its gradients, beside their NumPy baselines."""

import functools

from threadpoolctl import threadpool_limits

import fastattn

from . import baselines
from .cases import NEIGHBORHOOD_SPACES, Neighborhood

CASES = {"x".join(map(str, space)): Neighborhood(4, space, kernel, 32) for space, kernel in NEIGHBORHOOD_SPACES}
# What else a kernel may do, on the first of them.
FORMS = {"windows": {"stride": 7}, "dilated": {"dilation": 4}, "truncated": {"edge": "truncate"}}


# Cached rather than an asv `setup` hook: see attention.py.
@functools.cache
def _call(name, threads, implementation):
    case = CASES[name]
    if implementation == "numpy":
        threadpool_limits(threads)
        arrays = (x[0] for x in case.in_a_row())
        return functools.partial(baselines.neighborhood_attention, *arrays, case.seen())
    return functools.partial(fastattn.neighborhood_attention, *case.inputs(), case.kernel_size, num_threads=threads)


@functools.cache
def _call_back(name, threads, implementation):
    """The gradients for query, key and value; the way forward is not in it."""
    case = CASES[name]
    query, key, value = case.inputs() if implementation == "fastattn" else (x[0] for x in case.in_a_row())
    arrays = (value, query, key, value)
    if implementation == "numpy":
        threadpool_limits(threads)
        return functools.partial(baselines.neighborhood_attention_vjp, *arrays, case.seen())
    return functools.partial(fastattn.neighborhood_attention_vjp, *arrays, case.kernel_size, num_threads=threads)


class NeighborhoodAttention:
    params = [list(CASES), [1, 2], ["fastattn", "numpy"]]
    param_names = ["space", "threads", "implementation"]

    def time_attention(self, space, threads, implementation):
        _call(space, threads, implementation)()

    time_attention.pretty_name = "Pixels and their neighbourhoods"


class NeighborhoodGradients:
    params = [list(CASES), [1, 2], ["fastattn", "numpy"]]
    param_names = ["space", "threads", "implementation"]

    def time_gradients(self, space, threads, implementation):
        _call_back(space, threads, implementation)()

    time_gradients.pretty_name = "Gradients of neighbourhoods"


class NeighborhoodForms:
    params = [list(FORMS), [1, 2]]
    param_names = ["form", "threads"]

    def time_attention(self, form, threads):
        case = CASES["56x56"]
        fastattn.neighborhood_attention(*case.inputs(), case.kernel_size, num_threads=threads, **FORMS[form])

    time_attention.pretty_name = "Forms of neighbourhoods"
