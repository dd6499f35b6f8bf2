"""Attention for PyTorch tensors on the CPU, with gradients.

    import torch
    from fastattn.integrations.torch import dot_product_attention

    query, key, value = (torch.randn(2, 8, 512, 64, requires_grad=True) for _ in range(3))
    dot_product_attention(query, key, value, is_causal=True).square().mean().backward()  # query.grad, ...

The functions are those of fastattn, with its conventions (a boolean mask is True where a query attends, a causal mask
lines up the last query with the last key). Nothing is copied: tensors are read where they lie, whatever their strides,
and results are tensors over the arrays that fastattn returns. Arguments that are no tensors are passed on as they are.

Gradients are computed for what requires one, be it a bias, a slope, a sink or a matrix, and `lse` may be part of the
loss. Second derivatives are an error. `torch.compile` breaks its graph at a call, and compiles the rest. bfloat16 needs
the package ml_dtypes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError('fastattn.integrations.torch needs PyTorch: pip install "fastattn[torch]"') from error

from fastattn.integrations._table import NO_SECOND, TABLE, Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    def __getattr__(name: str) -> Callable[..., Any]: ...


def _bfloat16() -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError("bfloat16 tensors need ml_dtypes: pip install ml_dtypes") from error
    return np.dtype(ml_dtypes.bfloat16)


def _array(name: str, x: Any) -> Any:
    """The memory of a tensor as an array; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    if x.device.type != "cpu":
        raise ValueError(f"{name} is on the device {x.device}; it must be on the CPU, as {name}.cpu() is")
    if x.layout is not torch.strided:
        raise ValueError(f"{name} has the layout {x.layout}; it must be dense, as {name}.to_dense() is")
    x = x.detach()
    if x.dtype is torch.bfloat16:  # which NumPy itself does not have
        return x.view(torch.int16).numpy().view(_bfloat16())
    return x.numpy()


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    if array.dtype.kind == "V":  # bfloat16
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class _Attention(torch.autograd.Function):
    """A call whose tensors come last, one for each of `names`."""

    @staticmethod
    def forward(row: Row, constants: dict[str, Any], names: tuple[str, ...], *tensors: Any) -> Any:
        arrays = {name: _array(name, x) for name, x in zip(names, tensors, strict=True)}
        return tuple(map(_tensor, row.forward(constants | arrays)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.row, ctx.constants, ctx.names, *tensors = inputs
        ctx.results = ctx.row.results(ctx.constants)
        if "weights" in ctx.results:
            ctx.mark_non_differentiable(output[ctx.results.index("weights")])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)  # and PyTorch refuses the way back if they were written to

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        needed = ctx.needs_input_grad[3:]
        found = iter(())
        if any(x is not None for x in gradients):
            wrt = tuple(name for name, is_needed in zip(ctx.names, needed, strict=True) if is_needed)
            found = iter(_Backward.apply(ctx.row, ctx.constants, ctx.names, wrt, *ctx.saved_tensors, *gradients))
        return None, None, None, *(next(found, None) if is_needed else None for is_needed in needed)


class _Backward(torch.autograd.Function):
    """The way back; a function of its own, so that it is known where somebody would differentiate it."""

    @staticmethod
    def forward(
        row: Row, constants: dict[str, Any], names: tuple[str, ...], wrt: tuple[str, ...], *tensors: Any
    ) -> Any:
        results = row.results(constants)
        named = [*names, *results, *(f"grad_{name}" for name in results)]
        arrays = [_array(name, x) for name, x in zip(named, tensors, strict=True)]
        given = constants | dict(zip(names, arrays, strict=False))
        arrays = arrays[len(names) :]
        return tuple(map(_tensor, row.backward(wrt, given, arrays[: len(results)], arrays[len(results) :])))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(NO_SECOND)


def _bridge(row: Row) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        given = row.given(args, kwargs)
        tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        wanted = [name for name, x in tensors.items() if x.requires_grad] if torch.is_grad_enabled() else []
        if not wanted:
            results = row.function(**{name: _array(name, x) for name, x in given.items()})
            return tuple(map(_tensor, results)) if isinstance(results, tuple) else _tensor(results)
        row.refuse_others(wanted)
        constants = {name: x for name, x in given.items() if name not in tensors}
        return row.asked_for(given, _Attention.apply(row, constants, tuple(tensors), *tensors.values()))

    return row.dressed(function, __name__, "PyTorch tensors on the CPU")


__all__ = [row.name for row in TABLE]
globals().update({row.name: _bridge(row) for row in TABLE})
