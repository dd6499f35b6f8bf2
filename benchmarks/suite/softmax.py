"""asv: softmax along an axis and its gradient, by shapes, dtypes and threads, beside their NumPy baselines."""

import functools

import fastattn

from . import baselines, cases


# Cached rather than an asv `setup` hook: see attention.py.
@functools.cache
def _call(shape, axis, dtype, threads, implementation):
    (x,) = cases.Softmax(shape, dtype).inputs()
    if implementation == "numpy":
        return functools.partial(baselines.softmax, x, axis)
    return functools.partial(fastattn.softmax, x, axis, num_threads=threads)


class Softmax:
    # NumPy's softmax always uses one thread, so it is measured once, as the baseline of both.
    params = [
        sorted({(case.shape, case.axis) for case in cases.SOFTMAX if case.nbytes <= 2**26}),
        ["float32", "float64"],
        ["fastattn, 1 thread", "fastattn, 2 threads", "numpy"],
    ]
    param_names = ["shape and axis", "dtype", "implementation"]

    def time_softmax(self, shape_and_axis, dtype, implementation):
        name, _, threads = implementation.partition(", ")
        _call(*shape_and_axis, dtype, int(threads[0]) if threads else 1, name)()

    time_softmax.pretty_name = "Softmax"


@functools.cache
def _back(shape, axis, dtype, threads, implementation):
    inputs = cases.SoftmaxBack(shape, dtype, axis).inputs()
    if implementation == "numpy":
        return functools.partial(baselines.softmax_back, *inputs, axis)
    return functools.partial(fastattn.softmax_vjp, *inputs, axis, num_threads=threads)


class SoftmaxBack:
    params = [
        sorted((case.shape, case.axis) for case in cases.SOFTMAX_BACK),
        ["float32", "float64"],
        ["fastattn, 1 thread", "fastattn, 2 threads", "numpy"],
    ]
    param_names = ["shape and axis", "dtype", "implementation"]

    def time_softmax_vjp(self, shape_and_axis, dtype, implementation):
        name, _, threads = implementation.partition(", ")
        _back(*shape_and_axis, dtype, int(threads[0]) if threads else 1, name)()

    time_softmax_vjp.pretty_name = "Gradient of softmax"
