# What Python modules call. apply_rotary takes unchecked arguments, by position.
from typing import Any

from numpy.typing import NDArray

def apply_rotary(*arguments: Any) -> Any: ...
def checked_frequencies(x: Any, name: str, pairs: int) -> NDArray[Any]: ...
