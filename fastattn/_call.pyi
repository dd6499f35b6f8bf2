# What layers ask before they begin.
from collections.abc import Mapping
from typing import Any

def check(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], dtype: Any, some: Mapping[str, Any]
) -> tuple[int, ...]: ...
