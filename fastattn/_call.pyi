# What layers call before they start: checks, and returns the shape of the output.
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

def check(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], dtype: Any, some: Mapping[str, Any]
) -> tuple[int, ...]: ...
def starts(x: Any, name: str, total: int, axis: str) -> NDArray[np.int64]: ...
