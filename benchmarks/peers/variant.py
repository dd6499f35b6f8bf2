"""One implementation of a case in a library, and what the libraries' modules share."""

from dataclasses import dataclass

import numpy as np

# A variant that makes an array of (L, S, hidden) for additive attention, or of (L, S) to mask a window, is skipped
# above this size.
LARGEST_ARRAY = 2**30


@dataclass(frozen=True)
class Variant:
    """`call` is timed; `read` turns what it returns into a (..., L, E) NumPy array.

    `expected` is the right answer if it is not the case's own, and `allowed` the error if it is not the case's.
    """

    name: str
    call: object
    read: object = np.asarray
    expected: object = None
    allowed: float = 0.0


def of_tokens(gradients):
    """Those of query, key and value in one array; w_score's is a sum over all of them, and has errors of its size."""
    return np.concatenate([np.asarray(x).ravel() for x in gradients[:3]])


def refuse_large(case, count):
    nbytes = count * np.dtype(case.dtype).itemsize
    if nbytes > LARGEST_ARRAY:
        raise NotImplementedError(f"the formula's array would take {nbytes / 2**30:.1f} GiB")


def those_that_work(*makers):
    """The variants that a library can build, or its error if it can build none."""
    complaints = []
    for make in makers:
        try:
            made = make()
        except Exception as error:  # whatever a library raises for an operator it does not know
            complaints.append(error)
        else:
            yield made
    if len(complaints) == len(makers):
        raise complaints[0]
