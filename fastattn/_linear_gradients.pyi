# What the public module calls: arguments by position, unchecked as they came.
from typing import Any

def linear_attention_vjp(*arguments: Any) -> Any: ...
