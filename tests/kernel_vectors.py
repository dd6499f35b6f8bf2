"""Writes cases for kernel_vectors.c to standard output: arrays, what fastattn.reference makes of them, and how far a
result may be from that (tolerances.py).

    python tests/kernel_vectors.py | a_program_of_kernel_vectors.c
"""

import sys

import numpy as np
import tolerances

from fastattn import reference

ATTENTION, SOFTMAX = 1, 2
DTYPES = {np.float32: 0, np.float64: 1, np.float16: 2}  # fa_dtype
SIZES = [  # queries, keys, head_dim, value_dim
    (40, 300, 48, 48),
    (7, 33, 5, 19),
    (130, 257, 64, 64),
    (60, 2100, 20, 24),
    (1, 1, 1, 1),
]
DECODE_SIZES = [(1, 2500, 64, 64), (2, 70, 128, 128), (3, 300, 48, 48), (6, 777, 40, 24), (13, 65, 7, 9)]
ROWS = [(5, 1), (3, 4), (4, 67), (2, 5000)]


def write(operation, dtype, sizes, flags, *arrays):
    header = np.array([operation, DTYPES[dtype], *sizes, *flags], dtype=np.int64)
    for array in (header, *arrays):
        sys.stdout.buffer.write(np.ascontiguousarray(array).tobytes())


def main():
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        for n, (queries, keys, head_dim, value_dim) in enumerate(SIZES + DECODE_SIZES):
            shapes = (queries, head_dim), (keys, head_dim), (keys, value_dim)
            query, key, value = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
            for is_causal in (False, True):
                rules = {"is_causal": is_causal, "query_offset": keys - queries}
                out, weights, lse = reference.dot_product_attention(
                    query, key, value, return_lse=True, return_weights=True, **rules
                )
                bound = tolerances.attention_bounds(
                    "dot_product_attention", query, key, value, out, weights, lse, **rules
                )[0]
                flags = is_causal, n >= len(SIZES)
                sizes = queries, keys, head_dim, value_dim
                write(ATTENTION, dtype, sizes, flags, query, key, value, out, np.broadcast_to(bound, out.shape))
        if dtype == np.float16:  # the driver widens its rows
            continue
        for rows, n in ROWS:
            x = 3 * rng.standard_normal((rows, n)).astype(dtype)
            eps, size = np.finfo(dtype).eps, np.max(np.abs(x), axis=-1, keepdims=True).astype(np.float64)
            bound = np.broadcast_to((2 if dtype == np.float64 else 1) * eps * (4 * size + 4), x.shape)
            write(SOFTMAX, dtype, (rows, n, 0, 0), (0, 0), x, reference.softmax(x), bound)


if __name__ == "__main__":
    main()
