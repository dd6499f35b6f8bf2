"""One way to write a case in a library, and what the libraries' modules share."""

from dataclasses import dataclass

import numpy as np

# Where the formula of additive attention makes an array of (L, S, hidden), or what masks a window one of (L, S), it is
# left out above this size.
LARGEST_ARRAY = 2**30


@dataclass(frozen=True)
class Variant:
    """`call` is timed; `read` turns what it returns into a (..., L, E) NumPy array.

    `expected` is the right answer where it is not the case's own.
    """

    name: str
    call: object
    read: object = np.asarray
    expected: object = None


def refuse_large(case, count):
    nbytes = count * np.dtype(case.dtype).itemsize
    if nbytes > LARGEST_ARRAY:
        raise NotImplementedError(f"the formula's array would take {nbytes / 2**30:.1f} GiB")


def those_that_work(*makers):
    """The variants of a library that it can build; its complaint if it can build none."""
    complaints = []
    for make in makers:
        try:
            made = make()
        except Exception as error:  # whatever a library throws at an operator it does not know
            complaints.append(error)
        else:
            yield made
    if len(complaints) == len(makers):
        raise complaints[0]
