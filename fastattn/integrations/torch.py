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

Two functions stay in one graph: they are an operator of PyTorch, `fastattn::attention`, wherever PyTorch compiles,
exports, traces or transforms, and a plain call of fastattn otherwise. `scaled_dot_product_attention` has the
conventions of PyTorch's, so that it can stand in its place; `attention` has those of `fastattn.dot_product_attention`,
and all its rules.
"""

from __future__ import annotations

import copy
import functools
import re
from typing import TYPE_CHECKING, Any, cast

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError('fastattn.integrations.torch needs PyTorch: pip install "fastattn[torch]"') from error

import fastattn
from fastattn.integrations._table import NO_SECOND, TABLE, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    def __getattr__(name: str) -> Callable[..., Any]: ...


_NO_TENSORS = frozenset((bool, int, float, str, tuple, list, type(None), np.ndarray))  # isinstance takes longer


@functools.cache
def _bfloat16() -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError("bfloat16 tensors need ml_dtypes: pip install ml_dtypes") from error
    return np.dtype(ml_dtypes.bfloat16)


def _refuse(name: str, x: torch.Tensor) -> None:
    """For tensors that fastattn cannot read."""
    if x.device.type != "cpu":
        raise ValueError(f"{name} is on the device {x.device}; it must be on the CPU, as {name}.cpu() is")
    if x.layout is not torch.strided:
        raise ValueError(f"{name} has the layout {x.layout}; it must be dense, as {name}.to_dense() is")


def _array(name: str, x: Any) -> Any:
    """The memory of a tensor as an array; anything else as it is."""
    if type(x) in _NO_TENSORS or not isinstance(x, torch.Tensor):
        return x
    if x.requires_grad:
        x = x.detach()
    try:
        if x.dtype is torch.bfloat16:  # which NumPy itself does not have
            return x.view(torch.int16).numpy().view(_bfloat16())
        return x.numpy()
    except (TypeError, RuntimeError):
        _refuse(name, x)
        raise


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
        row.refuse_others(wanted, given)
        constants = {name: x for name, x in given.items() if name not in tensors}
        return row.asked_for(given, _Attention.apply(row, constants, tuple(tensors), *tensors.values()))

    return row.dressed(function, __name__, "PyTorch tensors on the CPU")


# -- one operator ---------------------------------------------------------------------------------------------

_ROW = next(row for row in TABLE if row.name == "dot_product_attention")

# The arguments of the operator, flat: in this order, by these names, of these types of PyTorch's schemas.
_TENSORS = (
    *("mask", "block_mask", "bias", "relative_bias", "alibi_slopes", "sinks", "key_scale", "value_scale", "key_center"),
    *("key_lengths", "query_lengths", "query_offset"),
)
_NUMBERS = {
    "is_causal": "bool",
    "window_size": "SymInt[]?",
    "chunk_size": "SymInt?",
    "left_chunks": "SymInt?",
    "block_size": "SymInt[]?",
    "scale": "float?",
    "softcap": "float?",
    "activation": "str",
    "enable_gqa": "bool",
    "return_weights": "str",  # "", "all" or "band"
    "return_lse": "bool",
    "out_layout": "str",
    "num_threads": "SymInt?",
}
_NAMES = ("query", "key", "value", *_TENSORS, *_NUMBERS)
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_RULES = frozenset(_NAMES[3:]) - {"out_layout"}
_LAYOUTS = ("bhsd", "bshd")


def _is_eager() -> bool:
    """Whether operations are carried out one by one, with nobody who watches or transforms them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _out_shape(query: Any, key: Any, value: Any, enable_gqa: bool) -> tuple[Any, ...]:
    """Of the output, from shapes; of shapes that fastattn refuses, anything or a ValueError."""
    batch = [query[:-2], key[:-2], value[:-2]]
    if enable_gqa and len(query) > 2:
        batch[1:] = [(*x[:-1], 1) if x else x for x in batch[1:]]  # query heads are a multiple of theirs
    if batch[0] != batch[1] or batch[0] != batch[2]:
        try:
            batch[0] = torch.broadcast_shapes(*batch)
        except RuntimeError:
            shapes = ", ".join(f"{name} {tuple(x)}" for name, x in (("query", query), ("key", key), ("value", value)))
            raise ValueError(f"the batch axes of {shapes} do not broadcast; grouped heads need enable_gqa") from None
    return (*batch[0], query[-2], value[-1])


def _out_dtype(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_scale: Any) -> torch.dtype:
    if key_scale is not None:  # int8 keys and values
        return query.dtype
    dtypes = [x.dtype if x.is_floating_point() else torch.float64 for x in (query, key, value)]
    return torch.promote_types(torch.promote_types(*dtypes[:2]), dtypes[2])


# Up to this many numbers are copied where the output is wanted in another order than that of its shape: that takes a
# microsecond, and checks of an array given as out= three.
_FEW = 4096


def _heads_behind(query: Any, key: Any, value: Any, **rules: Any) -> Any:
    """fastattn's function with an output whose memory is (..., L, H, E)."""
    shape = query.shape
    # With one row, or one head, that is the memory of any layout.
    if len(shape) < 3 or shape[-2] == 1:
        return _ROW.function(query, key, value, **rules)
    if query.size <= _FEW and value.shape[-1] <= shape[-1] and key.ndim <= len(shape):
        results = _ROW.function(query, key, value, **rules)
        out = results[0] if isinstance(results, tuple) else results
        out = out.swapaxes(-2, -3).copy().swapaxes(-2, -3)
        return (out, *results[1:]) if isinstance(results, tuple) else out
    *batch, heads, rows, channels = _out_shape(shape, key.shape, value.shape, rules.get("enable_gqa", False))
    dtype = query.dtype
    if rules.get("key_scale") is None and not (key.dtype == dtype == value.dtype and dtype.kind in "fV"):
        try:
            dtype = np.result_type(*(np.float64 if x.dtype.kind in "biu" else x.dtype for x in (query, key, value)))
        except TypeError:
            return _ROW.function(query, key, value, **rules)  # which says what is wrong
    out = np.empty((*batch, rows, heads, channels), dtype).swapaxes(-2, -3)
    return _ROW.function(query, key, value, **rules, out=out)


_ROWS = {"bhsd": _ROW, "bshd": copy.copy(_ROW)}
_ROWS["bshd"].function = _heads_behind


def _attend(query: Any, key: Any, value: Any, layout: str, rules: dict[str, Any]) -> Any:
    """What fastattn returns for these rules, as tensors."""
    if not _is_eager() or not (type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN):
        return _through_operator(query, key, value, layout, rules)
    if rules.get("num_threads") is None:
        # A process that told PyTorch to use one thread means it.
        rules["num_threads"] = min(fastattn.get_num_threads(), torch.get_num_threads())
    # A tensor gives its array only if no gradient is wanted and NumPy can read it: that spares most calls all checks.
    read = _read_bfloat16 if query.dtype is torch.bfloat16 else torch.Tensor.numpy
    arrays = rules
    try:
        q, k, v = read(query), read(key), read(value)
        for name, x in rules.items():
            if type(x) not in _NO_TENSORS and isinstance(x, torch.Tensor):
                if type(x) not in _PLAIN:
                    raise TypeError
                arrays = {**arrays, name: x.numpy()}
    except (TypeError, RuntimeError):
        return _attend_carefully(query, key, value, layout, rules)
    results = _ROWS[layout].function(q, k, v, **arrays)
    return tuple(map(_tensor, results)) if isinstance(results, tuple) else _tensor(results)


def _read_bfloat16(x: torch.Tensor) -> NDArray[Any]:
    return x.view(torch.int16).numpy().view(_bfloat16())


def _attend_carefully(query: Any, key: Any, value: Any, layout: str, rules: dict[str, Any]) -> Any:
    tensors = {"query": query, "key": key, "value": value}
    tensors |= {name: x for name, x in rules.items() if isinstance(x, torch.Tensor)}
    for x in tensors.values():
        if type(x) not in _PLAIN or query.is_meta:
            return _through_operator(query, key, value, layout, rules)
    row = _ROWS[layout]
    wanted = [name for name, x in tensors.items() if x.requires_grad] if torch.is_grad_enabled() else []
    if wanted:
        _ROW.refuse_others(wanted, rules)
        constants = {name: x for name, x in rules.items() if name not in tensors}
        return row.asked_for(rules, _Attention.apply(row, constants, tuple(tensors), *tensors.values()))
    results = row.function(**rules | {name: _array(name, x) for name, x in tensors.items()})
    return tuple(map(_tensor, results)) if isinstance(results, tuple) else _tensor(results)


def _through_operator(query: Any, key: Any, value: Any, layout: str, rules: dict[str, Any]) -> Any:
    given = {"query": query, "key": key, "value": value, **rules}
    for name in "query", "key", "value":
        if not isinstance(given[name], torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(given[name]).__name__}")
    tensors = ("query", "key", "value", *(name for name in _TENSORS if given.get(name) is not None))
    flat = {name: given[name] for name in given if given[name] is not None}
    for name in tensors:
        if isinstance(flat[name], (int, torch.SymInt)):
            flat[name] = torch.full((), flat[name], dtype=torch.int64, device=query.device)
        elif not isinstance(flat[name], torch.Tensor):
            flat[name] = torch.as_tensor(flat[name], device=query.device)
        if not (flat[name].is_meta and query.is_meta):
            _refuse(name, flat[name])
    wanted = [name for name in tensors if flat[name].requires_grad] if torch.is_grad_enabled() else []
    if wanted:
        _ROW.refuse_others(wanted, flat)
    weights, lse = flat.get("return_weights", False), flat.get("return_lse", False)
    flat["return_weights"] = "all" if weights is True else weights or ""
    flat.setdefault("activation", "softmax")
    # The way back can use it, and it costs nothing.
    flat["return_lse"] = lse or (bool(wanted) and flat["activation"] == "softmax")
    for name, at_least in ("window_size", -1), ("block_size", 1):
        pair = flat.get(name)
        if pair is not None:
            pair = (pair, pair) if isinstance(pair, (int, torch.SymInt)) else pair
            flat[name] = [at_least if x is None else x for x in pair]
    for name in "scale", "softcap":
        if name in flat:
            flat[name] = float(flat[name])
    for name in "is_causal", "enable_gqa":
        flat.setdefault(name, False)
    arguments = (*(flat.get(name) for name in _NAMES[:-2]), layout, flat.get("num_threads"))
    operator = _Operator.apply if wanted and _is_transformed() else torch.ops.fastattn.attention
    out, shares, sums = operator(*arguments)
    results = [out]
    if weights:
        results.append(shares)
    if lse:
        results.append(sums)
    return tuple(results) if len(results) > 1 else out


_LIBRARY = torch.library.Library("fastattn", "FRAGMENT")
_TAKES = ", ".join(
    [f"Tensor {name}" for name in _NAMES[:3]]
    + [f"Tensor? {name}" for name in _TENSORS]
    + [f"{kind} {name}" for name, kind in _NUMBERS.items()]
)
_LIBRARY.define(f"attention({_TAKES}) -> (Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    f"attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, str[] wrt, {_TAKES}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _named(flat: Sequence[Any]) -> tuple[dict[str, Any], str]:
    """The arguments of fastattn's function from those of the operator, and the layout of the output."""
    given = {name: x for name, x in zip(_NAMES, flat, strict=True) if x is not None}
    for name in "window_size", "block_size":
        if name in given:
            given[name] = tuple(given[name])
    given["return_weights"] = {"": False, "all": True, "band": "band"}[given["return_weights"]]
    return given, given.pop("out_layout")


@torch.library.impl(_LIBRARY, "attention", "CPU")
def _forward(*flat: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    given, layout = _named(flat)
    given.setdefault("num_threads", min(fastattn.get_num_threads(), torch.get_num_threads()))
    results = _ROWS[layout].function(**{name: _array(name, x) for name, x in given.items()})
    found = iter(map(_tensor, results if isinstance(results, tuple) else (results,)))
    out = next(found)
    if layout == "bshd" and out.ndim > 2:  # where sizes of 1 left a choice, strides are those of the fake kernel
        out = out.transpose(-2, -3).reshape(*out.shape[:-3], out.shape[-2], out.shape[-3], -1).transpose(-2, -3)
    weights = next(found) if given["return_weights"] else torch.empty(0)
    lse = next(found) if given["return_lse"] else torch.empty(0)
    return out, weights, lse


@torch.library.register_fake("fastattn::attention", lib=_LIBRARY)
def _fake_forward(*flat: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    given, layout = _named(flat)
    query, key, value = given["query"], given["key"], given["value"]
    shape = _out_shape(query.shape, key.shape, value.shape, given["enable_gqa"])
    dtype = _out_dtype(query, key, value, given.get("key_scale"))
    if layout == "bshd" and len(shape) > 2:
        *batch, heads, rows, channels = shape
        out = query.new_empty((*batch, rows, heads, channels), dtype=dtype).transpose(-2, -3)
    else:
        out = query.new_empty(shape, dtype=dtype)
    real = torch.float64 if dtype is torch.float64 else torch.float32
    weights = lse = query.new_empty(0, dtype=torch.float32)
    if given["return_weights"]:
        columns = key.shape[-2]
        if given["return_weights"] == "band":
            left, right = given["window_size"]
            columns = left + (0 if given["is_causal"] else right) + 1
        weights = query.new_empty((*shape[:-1], columns), dtype=real)
    if given["return_lse"]:
        lse = query.new_empty(shape[:-1], dtype=real)
    return out, weights, lse if given["return_lse"] else query.new_empty(0, dtype=torch.float32)


@torch.library.impl(_LIBRARY, "attention_backward", "CPU")
def _backward(grad_out: Any, grad_lse: Any, out: Any, lse: Any, wrt: Sequence[str], *flat: Any) -> list[torch.Tensor]:
    given, _ = _named(flat)
    given = {name: _array(name, x) for name, x in given.items()}
    given.setdefault("num_threads", min(fastattn.get_num_threads(), torch.get_num_threads()))
    given["return_weights"] = False
    results = [_array("out", out), _array("lse", lse)] if _ROW.has_lse(given) else [_array("out", out)]
    gradients = [_array("grad_out", grad_out), _array("grad_lse", grad_lse)][: len(results)]
    return list(map(_tensor, _ROW.backward(wrt, given, results, gradients)))


@torch.library.register_fake("fastattn::attention_backward", lib=_LIBRARY)
def _fake_backward(*all_of_them: Any) -> list[torch.Tensor]:
    *_, wrt = all_of_them[:5]
    given, _ = _named(all_of_them[5:])
    return [given[name].new_empty(given[name].shape) for name in wrt]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.constants = [None if isinstance(x, torch.Tensor) else x for x in inputs]
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
    ctx.save_for_backward(output[0], output[2], *(inputs[i] for i in ctx.places))


def _way_back(ctx: Any, grad_out: Any, _: Any, grad_lse: Any) -> Any:
    out, lse, *tensors = ctx.saved_tensors
    flat = list(ctx.constants)
    for i, x in zip(ctx.places, tensors, strict=True):
        flat[i] = x
    places = [i for i in ctx.places if ctx.needs_input_grad[i]]
    gradients: list[Any] = [None] * len(flat)
    if grad_out is not None or grad_lse is not None:
        wrt = [_NAMES[i] for i in places]
        operator = _OperatorBackward.apply if _is_transformed() else torch.ops.fastattn.attention_backward
        for i, x in zip(places, operator(grad_out, grad_lse, out, lse, wrt, *flat), strict=True):
            gradients[i] = x
    return tuple(gradients)


def _refuse_second(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError(NO_SECOND)


def _is_transformed() -> bool:
    """Whether this is inside of torch.func's transforms, which differentiate classes of their kind, no operators."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


class _Operator(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(_keep)
    backward = staticmethod(_way_back)

    @staticmethod
    def forward(*flat: Any) -> Any:
        return torch.ops.fastattn.attention(*flat)


class _OperatorBackward(torch.autograd.Function):
    generate_vmap_rule = True
    backward = staticmethod(_refuse_second)

    @staticmethod
    def forward(*flat: Any) -> Any:
        return tuple(torch.ops.fastattn.attention_backward(*flat))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


torch.library.register_autograd("fastattn::attention", _way_back, setup_context=_keep, lib=_LIBRARY)
torch.library.register_autograd("fastattn::attention_backward", _refuse_second, lib=_LIBRARY)


def _one_by_one(operator: Any) -> Callable[..., Any]:
    """The rule of `vmap`: a call for each element, since batch axes mean something where heads are grouped."""

    def rule(info: Any, in_dims: Any, *flat: Any) -> Any:
        calls = []
        for i in range(info.batch_size):
            element = [
                x.select(axis, i) if isinstance(x, torch.Tensor) and axis is not None else x
                for x, axis in zip(flat, in_dims, strict=True)
            ]
            calls.append(operator(*element))
        results = [torch.stack(each) for each in zip(*calls, strict=True)]
        return results, [0] * len(results)

    return rule


for _name in "attention", "attention_backward":
    torch.library.register_vmap(f"fastattn::{_name}", _one_by_one(getattr(torch.ops.fastattn, _name)), lib=_LIBRARY)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, out_layout: str | None = None, **rules: Any
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """
    `fastattn.dot_product_attention` for tensors, in one graph under `torch.compile`.

    Parameters
    ----------
    query : Tensor, shape (..., L, D)
    key : Tensor, shape (..., S, D)
    value : Tensor, shape (..., S, E)
        float32, float64, float16 or bfloat16 (with int8 keys and values as there), on the CPU, of any strides. They
        are read where they lie.
    out_layout : {'bhsd', 'bshd'}, default 'bhsd'
        How the output lies in memory. 'bhsd': as its shape says, (B, H, L, E). 'bshd': with the heads behind the
        tokens, so that ``out.transpose(1, 2)`` is contiguous, as the next layer of a model wants it.
    **rules
        Every keyword of `fastattn.dot_product_attention` but `out`, with its meaning and default: `is_causal`,
        `window_size`, `key_lengths`, `mask`, `bias`, `softcap`, `sinks`, `enable_gqa`, `return_lse` and the others.
        Arrays may be tensors. `num_threads` is by default the smaller one of what fastattn and
        `torch.get_num_threads` allow.

    Returns
    -------
    out, weights, lse : Tensor
        As there: a new tensor, or a tuple.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above, a tensor is on another device than the CPU or not strided; the message names it.

    Notes
    -----
    Gradients: of query, key, value, `bias`, `relative_bias`, `alibi_slopes` and `sinks`. Second ones are an error. No
    argument is copied. Numbers have the bits of fastattn's own call.

    Examples
    --------
    >>> import torch
    >>> from fastattn.integrations.torch import attention
    >>> x = torch.randn(2, 8, 100, 64)
    >>> out = attention(x, x, x, window_size=(16, 0), key_lengths=torch.tensor([[100], [60]]), out_layout="bshd")
    >>> out.shape, out.transpose(1, 2).is_contiguous()
    (torch.Size([2, 8, 100, 64]), True)
    """
    layout = "bhsd" if out_layout is None else out_layout
    if layout not in _LAYOUTS:
        raise ValueError(f"out_layout must be 'bhsd' or 'bshd', not {out_layout!r}")
    for name in rules:
        if name not in _RULES:
            raise TypeError(f"attention() got an unexpected keyword argument {name!r}")
    return _attend(query, key, value, layout, rules)


_FLOATS = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """As PyTorch's own does under torch.autocast."""
    lower = x.is_floating_point() and x.dtype is not torch.float64
    return x.to(torch.get_autocast_dtype("cpu")) if lower else x


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """
    `torch.nn.functional.scaled_dot_product_attention` on the CPU, by fastattn.

    Parameters
    ----------
    query : Tensor, shape (..., L, D)
    key : Tensor, shape (..., S, D)
    value : Tensor, shape (..., S, E)
        Of one dtype: float32, float64, float16 or bfloat16; on the CPU, of any strides. They are read where they lie,
        but for those that `torch.autocast` converts.
    attn_mask : Tensor, broadcasts to (..., L, S), optional
        Of bools: **True means attend**. Of floats: added to the scores.
    dropout_p : float, default 0
        Only 0.
    is_causal : bool, default False
        Query i sees the keys up to the i-th, also where there are more keys than queries. Beside `attn_mask`, which
        PyTorch refuses, both count.
    scale : float, optional
        Factor of the scores; default ``1 / sqrt(D)``.
    enable_gqa : bool, default False
        Query may have g times the heads (axis -3) of key and value; query head h reads key head h // g.

    Returns
    -------
    out : Tensor, shape (..., L, E)
        A new tensor. It lies in memory as PyTorch's own: with the heads behind the tokens, if `query` does.

    Raises
    ------
    ValueError, TypeError
        If an argument is not as above; the message names it.

    Notes
    -----
    A row that sees no key is 0. Gradients: of query, key, value and a float `attn_mask`; second ones are an error.

    References
    ----------
    PyTorch's documentation of `torch.nn.functional.scaled_dot_product_attention`.

    Examples
    --------
    In a model that calls PyTorch's function:

    >>> import torch
    >>> from fastattn.integrations.torch import scaled_dot_product_attention
    >>> theirs = torch.nn.functional.scaled_dot_product_attention
    >>> torch.nn.functional.scaled_dot_product_attention = scaled_dot_product_attention
    >>> layer = torch.nn.functional.scaled_dot_product_attention
    >>> layer(*torch.randn(3, 1, 8, 100, 64), is_causal=True).shape
    torch.Size([1, 8, 100, 64])
    >>> torch.nn.functional.scaled_dot_product_attention = theirs
    """
    if dropout_p:
        raise ValueError(f"dropout_p must be 0: fastattn drops no weights, but it was given {dropout_p!r}")
    if torch.is_autocast_enabled("cpu"):
        query, key, value = _autocast(query), _autocast(key), _autocast(value)
    if attn_mask is not None and not isinstance(attn_mask, torch.Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor, not {type(attn_mask).__name__}")
    dtype = query.dtype
    if key.dtype is not dtype or value.dtype is not dtype or dtype not in _FLOATS:
        names = ", ".join(f"{name} {x.dtype}" for name, x in (("query", query), ("key", key), ("value", value)))
        raise TypeError(
            f"query, key and value must be of one dtype, float32, float64, float16 or bfloat16, not {names}"
        )
    rules: dict[str, Any] = {}
    if is_causal:
        rules["is_causal"] = True
        rules["query_offset"] = 0
    if attn_mask is not None:
        rules["mask" if attn_mask.dtype is torch.bool else "bias"] = attn_mask
    if scale is not None:
        rules["scale"] = scale
    if enable_gqa:
        rules["enable_gqa"] = True
    layout = "bhsd" if query.ndim != 4 or query.is_contiguous() or query.stride(1) >= query.stride(2) else "bshd"
    if attn_mask is None:
        return cast(torch.Tensor, _attend(query, key, value, layout, rules))
    try:
        return cast(torch.Tensor, _attend(query, key, value, layout, rules))
    except (ValueError, TypeError) as error:  # which calls it by fastattn's name
        raise type(error)(re.sub(r"^(mask|bias)\b", "attn_mask", str(error))) from None


__all__ = ["attention", "scaled_dot_product_attention", *(row.name for row in TABLE)]
globals().update({row.name: _bridge(row) for row in TABLE})
