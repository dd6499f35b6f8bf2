# What the public module calls: arguments by position, unchecked as they came.
from typing import Any

def graph_attention_vjp(*arguments: Any) -> Any: ...
