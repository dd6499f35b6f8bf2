from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEW: int

class Matrix:
    dtype: np.dtype[Any]
    d_in: int
    d_out: int
    def __init__(
        self, w: NDArray[Any], bias: ArrayLike | None, wanted: np.dtype[Any], scale: ArrayLike | None = None
    ) -> None: ...
    @property
    def bias(self) -> NDArray[Any] | None: ...
    @property
    def nbytes(self) -> int: ...
    def unpacked(self) -> NDArray[Any]: ...

def dense_dtypes(x: NDArray[Any], weight_dtype: np.dtype[Any]) -> tuple[np.dtype[Any], np.dtype[Any]]: ...
def dense(
    matrix: Matrix,
    x: NDArray[Any],
    result: np.dtype[Any],
    activation: str | None,
    multiply: ArrayLike | None,
    residual: ArrayLike | None,
    out: NDArray[Any] | None,
    num_threads: int | None,
) -> NDArray[Any]: ...
def norm(
    centred: bool,
    x: ArrayLike,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    offset: float,
    residual: ArrayLike | None,
    return_sum: bool,
    out: NDArray[Any] | None,
    num_threads: int | None,
) -> Any: ...
