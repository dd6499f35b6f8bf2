"""Attention for JAX arrays, with gradients, under `jit`, `grad` and `vmap`.

    import jax
    from fastattn.integrations.jax import dot_product_attention

    query, key, value = jax.random.normal(jax.random.key(0), (3, 8, 512, 64))
    loss = lambda query: (dot_product_attention(query, key, value, is_causal=True) ** 2).mean()
    gradient = jax.jit(jax.grad(loss))(query)

The functions are those of fastattn, with its conventions, but without `return_weights` and `return_state`. JAX calls
them back from its programs (`jax.pure_callback`), which has a price at each call, so that short sequences are slower
than JAX itself. Arguments are read where JAX puts them for a callback; JAX copies results.

`fastattn.integrations.jax.nn` has `dot_product_attention` with the arguments of `jax.nn`, to take its place.

Arrays are traced, and lists where the function takes an array; all else is static. Under `vmap` there is one call of
fastattn with more batch axes if what is mapped has batch axes there, else (matrices of a projection, packed lengths)
one call for each element. Without `jax_enable_x64` what fastattn returns in float64 becomes float32. An argument that
fastattn refuses shows when the program runs: JAX's error quotes fastattn's. Second derivatives are an error, and so are
programs and arrays of other platforms than the CPU.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

try:
    import jax
except ImportError as error:
    raise ImportError('fastattn.integrations.jax needs JAX: pip install "fastattn[jax]"') from error
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from fastattn.integrations._table import NO_SECOND, PROMOTING, RETURNED, TABLE, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    def __getattr__(name: str) -> Callable[..., Any]: ...


def _refuse_platform(platform: str) -> None:
    raise NotImplementedError(
        f"fastattn computes on the CPU, not on the platform {platform}: place its arrays with "
        'jax.device_put(x, jax.devices("cpu")[0]), or compile under jax.default_device(jax.devices("cpu")[0])'
    )


def _on_cpu() -> Primitive:
    """The identity, which programs for other platforms do not have."""

    def impl(x: Any) -> Any:
        for device in x.devices() if hasattr(x, "devices") else ():  # NumPy's, under another name, has none
            if device.platform != "cpu":
                _refuse_platform(device.platform)
        return x

    def refuse(context: Any, x: Any) -> Any:
        _refuse_platform(", ".join(context.module_context.platforms))

    primitive = Primitive("fastattn_on_cpu")
    primitive.def_impl(impl)
    primitive.def_abstract_eval(lambda x: x)
    batching.primitive_batchers[primitive] = lambda args, axes: (primitive.bind(*args), axes[0])
    mlir.register_lowering(primitive, refuse)
    mlir.register_lowering(primitive, lambda context, x: [x], platform="cpu")
    return primitive


_ON_CPU = _on_cpu()


def _result_shapes(row: Row, constants: Mapping[str, Any], arrays: Mapping[str, Any]) -> list[jax.ShapeDtypeStruct]:
    """Of what `Row.forward` returns."""
    found = row.result_shapes(*(arrays[name].shape for name in ("query", "key", "value")))
    dtypes = [np.dtype(arrays[name].dtype) for name in PROMOTING if name in arrays]
    dtype = np.result_type(*(np.float64 if dtype.kind in "biu" else dtype for dtype in dtypes))
    real = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    held = jax.dtypes.canonicalize_dtype  # float32 for float64, unless that is enabled
    kinds = {"out": held(dtype), "lse": held(real)}
    return [jax.ShapeDtypeStruct(found[name], kinds[name]) for name in row.results(constants)]


@dataclasses.dataclass(frozen=True)
class _Host:
    """What JAX calls back. NumPy only: calls of JAX can hang there. Equal ones are compiled once.

    The arrays may have more axes in front than their ranks, those that `vmap` maps, of size 1 where an array is not
    mapped. Those in `spread` get all of them, because the results have their batch axes or are their gradients.
    """

    function: Callable[[tuple[str, ...], dict[str, Any]], Sequence[NDArray[Any]]]
    wrt: tuple[str, ...]
    row: Row
    ranks: tuple[tuple[str, int], ...]
    spread: frozenset[str]
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    def __call__(self, given: Mapping[str, Any]) -> Sequence[NDArray[Any]]:
        ranks, batched = dict(self.ranks), self.row.batched
        arrays = {name: np.asarray(x) for name, x in given.items()}
        mapped = {name: x.shape[: x.ndim - ranks[name]] for name, x in arrays.items()}
        axes = np.broadcast_shapes(*mapped.values())
        for name in self.spread:
            arrays[name] = np.broadcast_to(arrays[name], axes + arrays[name].shape[len(axes) :])
            mapped[name] = axes
        if all(name in batched or set(mapped[name]) <= {1} for name in arrays):
            num_batch = max(ranks[name] - batched.get(name, 0) for name in ("query", "key", "value"))
            for name, x in arrays.items():
                # Mapped axes are the first of the batch axes, so the others must all be there.
                front = (*mapped[name], *(1,) * (num_batch - ranks[name] + batched[name])) if name in batched else ()
                arrays[name] = x.reshape(front + x.shape[len(axes) :]) if axes else x
            results = self.function(self.wrt, arrays)
            shapes = [(axes + s.shape, s.dtype) for s in self.shapes]
            return [np.asarray(x, dtype).reshape(shape) for x, (shape, dtype) in zip(results, shapes, strict=True)]
        every = {name: np.broadcast_to(x, axes + x.shape[len(axes) :]) for name, x in arrays.items()}
        into = [np.empty(axes + s.shape, s.dtype) for s in self.shapes]
        for index in np.ndindex(axes):
            results = self.function(self.wrt, {name: x[index] for name, x in every.items()})
            for target, result in zip(into, results, strict=True):
                target[index] = result
        return into

    def call(self, arrays: dict[str, Any]) -> tuple[jax.Array, ...]:
        arrays = arrays | {"query": _ON_CPU.bind(arrays["query"])}
        return tuple(jax.pure_callback(self, list(self.shapes), arrays, vmap_method="expand_dims"))


def _ranks(arrays: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    return tuple((name, x.ndim) for name, x in arrays.items())


def _differentiable(row: Row, constants: dict[str, Any]) -> Callable[[dict[str, Any]], tuple[jax.Array, ...]]:
    """The function of the traced arguments, as JAX differentiates it."""
    names = row.results(constants)
    grad_names = [f"grad_{name}" for name in names]

    def forward_on_host(wrt: tuple[str, ...], arrays: dict[str, Any]) -> Any:
        return row.forward(constants | arrays)

    def backward_on_host(wrt: tuple[str, ...], arrays: dict[str, Any]) -> Any:
        results, gradients = ([arrays.pop(name, None) for name in group] for group in (names, grad_names))
        return row.backward(wrt, constants | arrays, results, gradients)

    @jax.custom_vjp
    def attend(given: dict[str, Any]) -> tuple[jax.Array, ...]:
        shapes = tuple(_result_shapes(row, constants, given))
        return _Host(forward_on_host, (), row, _ranks(given), frozenset({"query"}), shapes).call(given)

    def forward(given: dict[str, Any]) -> Any:
        wrt = [name for name, x in given.items() if x.perturbed]
        row.refuse_others(wrt, constants | given)
        values = {name: x.value for name, x in given.items()}
        results = attend(values)
        return results, (values, results, dict.fromkeys(wrt))  # the keys of a dict are static

    def backward(kept: Any, gradients: Sequence[Any]) -> Any:
        given, results, wrt = kept
        arrays = given | dict(zip(names, results, strict=True))
        arrays |= {name: x for name, x in zip(grad_names, gradients, strict=True) if not isinstance(x, SymbolicZero)}
        found = way_back(tuple(wrt), arrays)
        return (dict.fromkeys(given) | dict(zip(wrt, found, strict=True)),)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def way_back(wrt: tuple[str, ...], arrays: dict[str, Any]) -> tuple[jax.Array, ...]:
        spread = frozenset({"query", *wrt, *names, *grad_names} & arrays.keys())
        shapes = tuple(jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in wrt)
        return _Host(backward_on_host, wrt, row, _ranks(arrays), spread, shapes).call(arrays)

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(NO_SECOND)

    attend.defvjp(forward, backward, symbolic_zeros=True)
    way_back.defvjp(refuse, refuse)
    return attend


@functools.lru_cache(maxsize=256)
def _remembered(row: Row, constants: tuple[tuple[str, type, Any], ...]) -> Callable[..., tuple[jax.Array, ...]]:
    """So that a call outside `jit` is compiled once."""
    return _differentiable(row, {name: x for name, _, x in constants})


# JAX must know shapes before a call; those of weights and states depend on more than shapes.
WITHOUT = tuple(f"return_{name}" for name in RETURNED if name != "lse")


def _call(row: Row, given: Mapping[str, Any]) -> Any:
    traced = {*row.differentiable, *row.batched}
    arrays = {
        name: jnp.asarray(x)
        for name, x in given.items()
        if isinstance(x, (jax.Array, np.ndarray)) or (name in traced and not isinstance(x, (int, type(None))))
    }
    constants = {name: x for name, x in given.items() if name not in arrays}
    try:
        attend = _remembered(row, tuple((name, type(x), x) for name, x in constants.items()))
    except TypeError:  # a constant that cannot be a key, such as a list
        attend = _differentiable(row, constants)
    return row.asked_for(constants, attend(arrays))


def _bridge(row: Row) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return _call(row, row.given(args, kwargs, without=WITHOUT))

    return row.dressed(function, __name__, "JAX arrays", without=WITHOUT)


__all__ = [row.name for row in TABLE]
globals().update({row.name: _bridge(row) for row in TABLE})

from fastattn.integrations.jax import nn  # noqa: E402, F401
