# A layer's call over a cache, or to a projected context, in the usual case, and what it keeps for the next one.
from typing import Any

from fastattn._context import ProjectedContext
from fastattn._rules import LayerRules
from fastattn.cache import KVCache
from fastattn.multihead import MultiHeadAttention

class Scratch:
    @property
    def nbytes(self) -> int: ...

def look(layer: MultiHeadAttention, x: Any, context: ProjectedContext, rules: LayerRules) -> Any: ...
def step(layer: MultiHeadAttention, x: Any, cache: KVCache, rules: LayerRules) -> Any: ...
