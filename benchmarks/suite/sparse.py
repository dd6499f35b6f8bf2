"""asv: sparsemax and entmax15, of rows beside their NumPy baseline, and as attention's activation beside softmax."""

import functools

import fastattn

from . import baselines, cases


# Cached rather than an asv `setup` hook: see attention.py.
@functools.cache
def _rows(sizes, function, threads, implementation):
    (x,) = cases.Sparse(sizes, function=function).inputs()
    if implementation == "numpy":
        return functools.partial(baselines.sparse, x, function)
    return functools.partial(getattr(fastattn, function), x, num_threads=threads)


@functools.cache
def _attention(shape, activation, threads):
    arrays = cases.Attention(*shape).inputs()
    return functools.partial(fastattn.dot_product_attention, *arrays, activation=activation, num_threads=threads)


class Rows:
    params = [
        sorted({case.sizes for case in cases.SPARSE}),
        ["sparsemax", "entmax15"],
        ["fastattn, 1 thread", "fastattn, 2 threads", "numpy"],
    ]
    param_names = ["shape", "function", "implementation"]

    def time_rows(self, sizes, function, implementation):
        name, _, threads = implementation.partition(", ")
        _rows(sizes, function, int(threads[0]) if threads else 1, name)()

    time_rows.pretty_name = "Sparsemax and entmax15"


class Attention:
    params = [
        [(1, 12, 128, 128, 64), (1, 8, 512, 512, 64), (1, 8, 2048, 2048, 64), (1, 8, 1, 8192, 64)],
        ["softmax", "sparsemax", "entmax15"],
        [1, 2],
    ]
    param_names = ["B, H, L, S, D", "activation", "threads"]

    def time_attention(self, shape, activation, threads):
        _attention(shape, activation, threads)()

    time_attention.pretty_name = "Attention with sparse weights"
