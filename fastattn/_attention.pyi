# What layers call, with unchecked rules.
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

def dot_product_attention(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    some: Mapping[str, Any],
    decode: bool = ...,
    keys_before: Any = ...,
) -> Any: ...
