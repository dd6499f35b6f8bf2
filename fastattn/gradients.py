"""Gradients of attention. The docstrings are the specification; fastattn.reference says the same in float64 NumPy.

Each function `f_vjp` takes the gradient of a loss for what `f` returned, then the arguments of `f`, and returns the
gradients of the loss for the arrays named in `wrt`.
"""

from __future__ import annotations
