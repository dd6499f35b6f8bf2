"""Errors of softmax, log_softmax and logsumexp beside those of SciPy and, if installed, PyTorch.

    python benchmarks/accuracy.py               every length, a line for each kind of numbers
    python benchmarks/accuracy.py --worst       only where fastattn is worse than it may be

An error is the largest relative error over many rows, in eps of the dtype, against the same formula in long double.
Allowed is 1.3 times the smaller error of the others, or 2 eps more, whichever is larger.
"""

import argparse
import sys

import numpy as np
from scipy import special

import fastattn

try:
    import torch
except ImportError:
    torch = None

LENGTHS = (7, 100, 128, 1000, 2000, 4096, 50257)
NUMBERS = 40_000  # at least, per case
FUNCTIONS = ("softmax", "log_softmax", "logsumexp")


def kinds(rng, rows, length):
    """Name and rows of numbers."""
    shape = rows, length
    yield "whole numbers 0 and 1", rng.integers(0, 2, shape)
    yield "whole numbers to 30", rng.integers(0, 31, shape)
    yield "halves to 100", rng.integers(0, 201, shape) / 2
    for scale in (0.01, 1, 10, 100):
        yield f"normal times {scale}", rng.standard_normal(shape) * scale
    yield "normal plus 1000", rng.standard_normal(shape) + 1000
    yield "constant", np.full(shape, 3.3)
    for name, rest in (("zeros", np.zeros(shape)), ("normal numbers", rng.standard_normal(shape))):
        rest = rest.copy()
        rest[:, 0] = 20 if name == "zeros" else 90
        yield f"one large entry beside {name}", rest


def exact(x):
    """The three functions in long double, whose own errors are negligible here."""
    x = x.astype(np.longdouble)
    largest = x.max(-1, keepdims=True)
    distance = x - largest
    exponentials = np.exp(distance)
    maxima = np.sum(distance == 0, -1, keepdims=True)
    others = np.sort(np.where(distance == 0, 0, exponentials), -1).sum(-1, keepdims=True)
    log_sum = np.log(maxima.astype(np.longdouble)) + np.log1p(others / maxima)
    return {
        "softmax": exponentials / (maxima + others),
        "log_softmax": distance - log_sum,
        "logsumexp": (largest + log_sum)[..., 0],
    }


def error(result, expected, finfo):
    """The largest relative error in eps; absolute below the precision of denormals."""
    floor = 2 * finfo.smallest_subnormal / finfo.eps
    size = np.maximum(abs(expected), floor)
    return float(np.max(abs(result.astype(np.longdouble) - expected) / size) / finfo.eps)


def candidates(x, function):
    yield "fastattn", getattr(fastattn, function)(x, axis=-1)
    yield "SciPy", getattr(special, function)(x, axis=-1)
    if torch is not None:
        yield "PyTorch", getattr(torch, function)(torch.from_numpy(x), -1).numpy()


def measure():
    """Dtype, length, kind, function and the error of each library."""
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        for length in LENGTHS:
            for kind, numbers in kinds(rng, max(4, NUMBERS // length), length):
                x = numbers.astype(dtype)
                expected = exact(x)
                for function in FUNCTIONS:
                    errors = {
                        name: error(y, expected[function], np.finfo(dtype)) for name, y in candidates(x, function)
                    }
                    yield dtype.__name__, length, kind, function, errors


def allowed(errors):
    best = min(x for name, x in errors.items() if name != "fastattn")
    return max(1.3 * best, best + 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worst", action="store_true", help="only where fastattn is worse than it may be")
    options = parser.parse_args()
    worse, count = 0, 0
    names = ["fastattn", "SciPy"] + (["PyTorch"] if torch is not None else [])
    print(f"| dtype | numbers in a row | of what | function | {' | '.join(names)} |")
    print("|---|---:|---|---|" + "---:|" * len(names))
    for dtype, length, kind, function, errors in measure():
        is_worse = errors["fastattn"] > allowed(errors)
        worse, count = worse + is_worse, count + 1
        if is_worse or not options.worst:
            numbers = " | ".join(f"{errors[name]:.1f}" for name in names)
            print(f"| {dtype} | {length} | {kind} | {function} | {numbers} |{' <--' if is_worse else ''}")
    print(f"\n{worse} of {count} are worse than 1.3 times the better of the others and 2 eps more.")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
