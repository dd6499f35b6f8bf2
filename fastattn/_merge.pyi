# What the public module calls, with unchecked arguments, by position.
from typing import Any

def merge_attention(*arguments: Any) -> Any: ...
