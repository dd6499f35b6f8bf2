# What layers call before they start: checks, and returns the shape of the output.
from collections.abc import Mapping
from typing import Any

def check(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], dtype: Any, some: Mapping[str, Any]
) -> tuple[int, ...]: ...
