"""asv: products with what follows them, and norms, by shapes, dtypes and threads, beside NumPy's."""

import functools

from threadpoolctl import threadpool_limits

import fastattn

from . import baselines
from .cases import NORMS, PRODUCTS, Norm, Product


# Cached rather than an asv `setup` hook: see attention.py.
@functools.cache
def _product(case, dtype, threads, implementation):
    x, weight, bias = Product(*case.shape, case.activation, dtype).inputs()
    threadpool_limits(threads)
    if implementation == "numpy":
        return functools.partial(baselines.product, x, weight, bias, case.activation)
    linear = fastattn.Linear(weight, bias)
    return functools.partial(linear, x, activation=case.activation, num_threads=threads)


class Products:
    params = [[case.label for case in PRODUCTS], ["float32", "float64"], [1, 2], ["fastattn", "numpy"]]
    param_names = ["shape", "dtype", "threads", "implementation"]

    def time_product(self, shape, dtype, threads, implementation):
        _product(next(case for case in PRODUCTS if case.label == shape), dtype, threads, implementation)()

    time_product.pretty_name = "A product with what follows it"


@functools.cache
def _norm(case, dtype, threads, implementation):
    inputs = Norm(*case.shape, case.function, dtype).inputs()
    if implementation == "numpy":
        return functools.partial(getattr(baselines, case.function), *inputs)
    return functools.partial(getattr(fastattn, case.function), *inputs, num_threads=threads)


class Norms:
    # NumPy's sums always use one thread: measured once, as the baseline of both.
    params = [
        [case.label for case in NORMS],
        ["float32", "float64"],
        ["fastattn, 1 thread", "fastattn, 2 threads", "numpy"],
    ]
    param_names = ["shape", "dtype", "implementation"]

    def time_norm(self, shape, dtype, implementation):
        name, _, threads = implementation.partition(", ")
        case = next(case for case in NORMS if case.label == shape)
        _norm(case, dtype, int(threads[0]) if threads else 1, name)()

    time_norm.pretty_name = "Norms"
