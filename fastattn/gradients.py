"""Gradients of attention. The docstrings are the specification; fastattn.reference says the same in float64 NumPy.

Each function `f_vjp` takes the gradient of a loss for what `f` returned, then the arguments of `f`, and returns the
gradients of the loss for the arrays named in `wrt`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattn import _gradients

def dot_product_attention_vjp(grad_out, query, key, value, *, wrt=("query", "key", "value"), output=None, lse=None, grad_lse=None, out=None, **rules):
    return _gradients.dot_product_attention_vjp(grad_out, query, key, value, output, lse, grad_lse, wrt, out, rules)
