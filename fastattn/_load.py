"""Loads the thread pools, OpenMP's and that of NumPy's BLAS, with a short spin. Imported before anything else.

The threads of both turn for milliseconds after their work is done, waiting for more, and take the cores from whatever
comes next: with GCC's OpenMP library, matrix products of NumPy between two calls were measured to take 1.65 times as
long, and with OpenBLAS (18 ms) attention between two matrix products 1.3 to 3 times. With a spin of some ten
microseconds neither loses anything in a loop of its own. Both libraries read their settings once, when they are loaded,
so NumPy's can be told only where NumPy was not imported before; what the user has set stands.
"""

import os
import sys

SPINS = {}
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
    SPINS["GOMP_SPINCOUNT"] = "10000"  # turns; fewer make a region start slowly, more steal time from others
if "OPENBLAS_THREAD_TIMEOUT" not in os.environ and "numpy" not in sys.modules:
    SPINS["OPENBLAS_THREAD_TIMEOUT"] = "18"  # 2**18 cycles; below 2**17 products of 128 x 128 take twice as long

os.environ.update(SPINS)
try:
    import numpy  # noqa: F401

    from fastattn import _runtime  # noqa: F401
finally:
    for name in SPINS:
        del os.environ[name]
