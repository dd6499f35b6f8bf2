# Tokens of caches: as int8, their means, and moved to the front.
from typing import Any

import numpy as np
from numpy.typing import NDArray

def place(
    name: str,
    x: NDArray[Any],
    center: NDArray[np.float32] | None,
    to: NDArray[np.int8],
    scales: NDArray[Any],
    first: NDArray[np.int64] | None = ...,
    count: NDArray[np.int64] | None = ...,
    at: NDArray[np.int64] | None = ...,
) -> None: ...
def mean_of_tokens(
    x: NDArray[Any],
    to: NDArray[np.float32],
    count: NDArray[np.int64] | None = ...,
    chosen: NDArray[np.bool_] | None = ...,
) -> None: ...
def move_tokens(arrays: list[NDArray[Any]], there: NDArray[np.int64], kept: NDArray[np.int64]) -> None: ...
