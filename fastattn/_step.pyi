# A layer's call over a cache in the usual case, and what it keeps for the next one.
from typing import Any

from fastattn._rules import LayerRules
from fastattn.cache import KVCache
from fastattn.multihead import MultiHeadAttention

class Scratch:
    @property
    def nbytes(self) -> int: ...

def step(layer: MultiHeadAttention, x: Any, cache: KVCache, rules: LayerRules) -> Any: ...
