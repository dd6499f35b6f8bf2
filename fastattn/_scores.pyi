# What the keys of additive scores become before calls.
from typing import Any

import numpy as np
from numpy.typing import NDArray

class PreparedKeys:
    @property
    def key(self) -> NDArray[Any]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def nbytes(self) -> int: ...
