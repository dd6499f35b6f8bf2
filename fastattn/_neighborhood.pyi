# What the public module calls: arguments by position, unchecked as they came.
from typing import Any

def neighborhood_attention(*arguments: Any) -> Any: ...
