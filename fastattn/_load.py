"""Loads the thread pools of OpenMP and of NumPy's BLAS with a short spin. Imported before anything else.

The threads of both spin for milliseconds after their work is done, waiting for more, and take the cores from whatever
runs next: with GCC's OpenMP library, NumPy matrix products between two calls took 1.65 times as long, and with OpenBLAS
(18 ms) attention between two matrix products took 1.3 to 3 times as long. With a spin of about ten microseconds neither
loses anything when called in a loop. Both libraries read their settings once, when they are loaded, so OpenBLAS can
only be set if NumPy has not been imported yet; the user's own settings are kept.
"""

import os
import sys

SPINS = {}
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
    SPINS["GOMP_SPINCOUNT"] = "10000"  # iterations; fewer make a region start slowly, more steal time from others
if "OPENBLAS_THREAD_TIMEOUT" not in os.environ and "numpy" not in sys.modules:
    SPINS["OPENBLAS_THREAD_TIMEOUT"] = "18"  # 2**18 cycles; below 2**17, products of 128 x 128 take twice as long

os.environ.update(SPINS)
try:
    import numpy  # noqa: F401

    from fastattn import _runtime  # noqa: F401
finally:
    for name in SPINS:
        del os.environ[name]
