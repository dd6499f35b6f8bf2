"""The entmax package, on PyTorch: with a full sort, and with one of the largest numbers of a row."""

import functools

from .torch import _torch
from .variant import Variant


def sparse(case, threads):
    import entmax

    x = _torch(threads).from_numpy(case.inputs()[0])
    function = getattr(entmax, case.function)
    yield Variant("full sort", functools.partial(function, x, case.axis))
    yield Variant("k=32", functools.partial(function, x, case.axis, 32))


# Name -> (distribution, how it writes each kind of case).
LIBRARIES = {"entmax": ("entmax", {"sparse": sparse})}
