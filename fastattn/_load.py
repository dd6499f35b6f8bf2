"""Loads the OpenMP library with a short spin. Imported before any compiled module.

After a parallel region the threads of GCC's OpenMP library turn for milliseconds, waiting for the next one, and take
the cores from whatever comes between two calls: matrix products of NumPy were measured to take 1.65 times as long.
With a spin of a few microseconds they lose nothing, and a region still starts within 2.5 microseconds. The library
reads its settings once, when it is loaded; what the user has set stands.
"""

import os

SPIN = "10000"  # turns; fewer make a region start slowly, more steal time from others

_short_spin = not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
if _short_spin:
    os.environ["GOMP_SPINCOUNT"] = SPIN
try:
    from fastattn import _runtime  # noqa: F401
finally:
    if _short_spin:
        del os.environ["GOMP_SPINCOUNT"]
