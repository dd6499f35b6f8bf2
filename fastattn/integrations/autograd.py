"""Attention as primitives of HIPS autograd.

    import autograd, autograd.numpy as np
    from fastattn.integrations.autograd import dot_product_attention

    query, key, value = np.random.standard_normal((3, 8, 512, 64))
    gradient = autograd.grad(lambda query: np.sum(dot_product_attention(query, key, value, is_causal=True) ** 2))(query)

The functions are those of fastattn, for the arrays of autograd.numpy, which are NumPy's. All gradients that autograd
asks for come from one call; `lse` may be part of the loss. Second derivatives are an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from autograd.extend import defvjp_argnums, primitive
    from autograd.tracer import isbox
except ImportError as error:
    raise ImportError('fastattn.integrations.autograd needs autograd: pip install "fastattn[autograd]"') from error

from fastattn.integrations._table import NO_SECOND, TABLE, Row

if TYPE_CHECKING:
    from collections.abc import Callable

    def __getattr__(name: str) -> Callable[..., Any]: ...


# What autograd differentiates are positional arguments: the arrays of a call, one for each of `names`.


@primitive
def _forward(*arrays: Any, row: Row, names: tuple[str, ...], constants: dict[str, Any]) -> Any:
    return row.forward(constants | dict(zip(names, arrays, strict=True)))


@primitive
def _backward(
    gradients: Any,
    results: Any,
    *arrays: Any,
    row: Row,
    names: tuple[str, ...],
    constants: dict[str, Any],
    wrt: tuple[str, ...],
) -> Any:
    # autograd has zeros for what the caller did not ask for.
    asked_for = [name == "out" or constants.get(f"return_{name}") for name in row.results(constants)]
    incoming = [x if asked else None for x, asked in zip(gradients, asked_for, strict=True)]
    return row.backward(wrt, constants | dict(zip(names, arrays, strict=True)), results, incoming)


def _way_back(argnums: tuple[int, ...], results: Any, arrays: tuple[Any, ...], call: dict[str, Any]) -> Any:
    wrt = tuple(call["names"][i] for i in argnums)
    return lambda gradients: _backward(gradients, results, *arrays, wrt=wrt, **call)


def _refuse(*_: Any) -> Any:
    raise NotImplementedError(NO_SECOND)


defvjp_argnums(_forward, _way_back)
defvjp_argnums(_backward, _refuse)


def _bridge(row: Row) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        given = row.given(args, kwargs)
        row.refuse_others((name for name, x in given.items() if isbox(x)), given)
        arrays = {name: x for name, x in given.items() if isbox(x)}
        if not arrays:
            return row.function(**given)
        constants = {name: x for name, x in given.items() if name not in arrays}
        results = _forward(*arrays.values(), row=row, names=tuple(arrays), constants=constants)
        return row.asked_for(given, [results[i] for i in range(len(results))])

    return row.dressed(function, __name__, "arrays of autograd.numpy")


__all__ = [row.name for row in TABLE]
globals().update({row.name: _bridge(row) for row in TABLE})
