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
    own: NDArray[Any] | None = ...,
    quantized: tuple[Any, ...] | None = ...,
    queries: int | None = ...,
) -> Any: ...
def varlen_attention(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    some: Mapping[str, Any],
    own: NDArray[Any] | None = ...,
) -> Any: ...
