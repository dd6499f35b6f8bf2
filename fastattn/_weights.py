"""Reads weights as PyTorch, Hugging Face and Keras store them, from arrays by name, for MultiHeadAttention.

Each function returns keyword arguments of MultiHeadAttention. PyTorch's linear layers store (out, in) and multiply by
the transpose; here weights are (in, out), on the right of x.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn._checks import as_array, integer, real
from fastattn._frequencies import kind_of, scaled_frequencies

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# The most names that an error lists.
_MOST_NAMES = 6


def _listed(names: Iterable[str]) -> str:
    """Some of the names, for an error."""
    names = list(names)
    rest = len(names) - _MOST_NAMES
    return ", ".join(map(repr, names[:_MOST_NAMES])) + (f" and {rest} more" if rest > 0 else "")


def _as_array(x: Any, name: str) -> NDArray[Any]:
    """x, which may be a torch tensor, as a NumPy array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        try:
            return np.asarray(x.numpy())
        except TypeError as error:
            raise TypeError(
                f"{name} is a tensor of dtype {x.dtype}, which NumPy does not have: pass its .float()"
            ) from error
    return as_array(x, name)


class _Tensors:
    """Arrays by name, each read only when needed."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Any]) -> None:
        self.names = [name for name in names if isinstance(name, str)]
        self._known = set(self.names)
        self._read = read

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def missing(self, wanted: Sequence[str], where: str = "") -> ValueError:
        """The error for missing names: what was looked for, and what there is, the closest names first."""
        lost = [name for name in wanted if name not in self]
        found = "found none of them" if len(lost) == len(wanted) else f"did not find {_listed(lost)}"
        near = difflib.get_close_matches(lost[0], self.names, _MOST_NAMES, 0.0)
        there = (
            f"among {len(self.names)} names, the closest being {_listed(near)}" if near else "since there is no name"
        )
        return ValueError(f"looked for {_listed(wanted)} and {found} {there}{where}")

    def array(self, name: str) -> NDArray[Any]:
        return _as_array(self._read(name), name)

    def linear(self, name: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """The weight of a linear layer, (in, out), and its bias if there is one."""
        w = self.array(f"{name}.weight")
        if w.ndim != 2:
            raise ValueError(f"{name}.weight has shape {w.shape}; a linear layer's is (out, in)")
        return w.T, self.array(f"{name}.bias") if f"{name}.bias" in self else None

    def linears(self, **names: str | None) -> dict[str, Any]:
        """Weights and biases of linear layers for the arguments w_query, b_query, ..."""
        arguments: dict[str, Any] = {}
        for which, name in names.items():
            if name is not None:
                arguments[f"w_{which}"], arguments[f"b_{which}"] = self.linear(name)
        return arguments

    def need(self, wanted: Sequence[str]) -> None:
        if not all(name in self for name in wanted):
            raise self.missing(wanted)

    def resolve(self, prefix: str, default: str, wanted: Sequence[str]) -> str:
        """
        The prefix of the wanted names: `prefix` or, if that is the default, the only other one possible.

        All of them must be there.
        """
        if not all(prefix + name in self for name in wanted):
            others = self.prefixes(wanted[0])
            if prefix != default or len(others) != 1 or others[0] == prefix:
                where = ""
                if others and others != [prefix]:
                    where = f". The first one is there with prefix= {_listed(others)}"
                raise self.missing([prefix + name for name in wanted], where)
            prefix = others[0]
            self.need([prefix + name for name in wanted])
        return prefix

    def prefixes(self, name: str) -> list[str]:
        """What precedes this name wherever it ends another, after a dot or slash."""
        return [
            other[: -len(name)] for other in self.names if other == name or other.endswith((f".{name}", f"/{name}"))
        ]

    def refuse_others(self, prefix: str, known: Iterable[str]) -> None:
        """Raise an error if there are weights under this prefix that the layer would ignore."""
        known = {prefix + name for name in known}
        others = [name for name in self.names if name.startswith(prefix) and name not in known]
        if others:
            raise ValueError(
                f"there is {_listed(others)} beside the weights of plain attention: the results would be wrong without"
            )


@contextmanager
def _opened(state: Any) -> Iterator[_Tensors]:
    """Arrays by name, from a mapping or from the path of a safetensors file, which stays open meanwhile."""
    if isinstance(state, Mapping):
        yield _Tensors(state, state.__getitem__)
        return
    if not isinstance(state, (str, os.PathLike)):
        raise TypeError(
            f"state must be a mapping from names to arrays or the path of a .safetensors file, not a "
            f"{type(state).__name__}"
        )
    path = os.fspath(state)
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"to read {path} the package safetensors is needed: pip install safetensors") from error
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"state={path!r} is not a .safetensors file: {error}") from error

    def read(name: str) -> Any:
        if file.get_slice(name).get_dtype() == "BF16":
            try:
                importlib.import_module("ml_dtypes")  # registers bfloat16 with NumPy
            except ImportError as error:
                raise ImportError(f"{name} in {path} is bfloat16: pip install ml_dtypes") from error
        return file.get_tensor(name)

    with file:
        yield _Tensors(file.keys(), read)


def _check_text(**names: Any) -> None:
    """Check arguments that names are made of."""
    for name, x in names.items():
        if not isinstance(x, str):
            raise TypeError(f"{name} must be a string, not {x!r}")


def _layer_number(layer: Any) -> int:
    return integer(layer, "layer", "an integer of at least 0", 0)


def from_torch(state: Any, prefix: str) -> dict[str, Any]:
    _check_text(prefix=prefix)
    with _opened(state) as tensors:
        for name in ("bias_k", "bias_v"):
            if prefix + name in tensors:
                raise ValueError(
                    f"there is {prefix + name!r}: a module with add_bias_kv=True has one more key and value, which are "
                    f"learned and come from no token. MultiHeadAttention has no place for them"
                )
        parts = "q_proj_weight", "k_proj_weight", "v_proj_weight"
        if prefix + parts[0] in tensors:
            tensors.need([prefix + name for name in (*parts, "out_proj.weight")])
            matrices = [tensors.array(prefix + name) for name in parts]
            if matrices[1].ndim == matrices[2].ndim == 2 and matrices[1].shape[1] != matrices[2].shape[1]:
                raise ValueError(
                    f"kdim={matrices[1].shape[1]} and vdim={matrices[2].shape[1]} differ; here keys and values are "
                    f"projected from one context"
                )
        else:
            wanted = [prefix + name for name in ("in_proj_weight", "out_proj.weight")]
            if not all(name in tensors for name in wanted):
                others = [x for x in tensors.prefixes("in_proj_weight") + tensors.prefixes(parts[0]) if x != prefix]
                where = f". The first one is there with prefix= {_listed(others)}" if others else ""
                raise tensors.missing(wanted, where)
            whole = tensors.array(wanted[0])
            if whole.ndim != 2 or len(whole) != 3 * whole.shape[1]:
                raise ValueError(f"{wanted[0]} has shape {whole.shape}; it must be (3 * embed_dim, embed_dim)")
            matrices = np.split(whole, 3)
        arguments = {f"w_{which}": w.T for which, w in zip(("query", "key", "value"), matrices, strict=True)}
        if f"{prefix}in_proj_bias" in tensors:
            name = f"{prefix}in_proj_bias"
            b = tensors.array(name)
            if b.shape != (3 * len(matrices[0]),):
                raise ValueError(f"{name} has shape {b.shape}; it must be (3 * embed_dim,), {3 * len(matrices[0])}")
            arguments.update(zip(("b_query", "b_key", "b_value"), np.split(b, 3), strict=True))
        return arguments | tensors.linears(out=f"{prefix}out_proj")


def from_linear(state: Any, query: str, key: str, value: str, out: str | None, prefix: str) -> dict[str, Any]:
    _check_text(query=query, key=key, value=value, prefix=prefix)
    names = {which: prefix + name for which, name in (("query", query), ("key", key), ("value", value))}
    if out is not None:
        _check_text(out=out)
        names["out"] = prefix + out
    with _opened(state) as tensors:
        tensors.need([f"{name}.weight" for name in names.values()])
        return tensors.linears(**names)


def from_bert(state: Any, layer: int, prefix: str) -> dict[str, Any]:
    _check_text(prefix=prefix)
    at = f"encoder.layer.{_layer_number(layer)}.attention."
    names = {"query": "self.query", "key": "self.key", "value": "self.value", "out": "output.dense"}
    with _opened(state) as tensors:
        at = tensors.resolve(prefix, "", [f"{at}{name}.weight" for name in names.values()]) + at
        known = [f"{name}.{kind}" for name in names.values() for kind in ("weight", "bias")]
        # The norm after it is another layer; old files call its arrays gamma and beta.
        known += [f"output.LayerNorm.{name}" for name in ("weight", "bias", "gamma", "beta")]
        tensors.refuse_others(at, known)
        return tensors.linears(**{which: at + name for which, name in names.items()})


def _rotary(head_dim: int, rotary_base: Any, rope_parameters: Any, max_positions: Any) -> dict[str, Any]:
    """The rotary arguments of a layer with this configuration."""
    real(rotary_base, "rotary_base", "a positive finite number", True)

    def at(length: int | None) -> tuple[NDArray[np.float64], float]:
        return scaled_frequencies(head_dim, rotary_base, rope_parameters, "rope_parameters", length, max_positions)

    kind = kind_of(rope_parameters, "rope_parameters")
    if kind == "dynamic" or not np.array_equal(at(1)[0], at(1 << 53)[0]):
        raise ValueError(
            f"rope_parameters has rope_type {kind!r}, whose frequencies change with the length of the sequence; a "
            f"layer has the same for all. For sequences of one length: fastattn.rotary_frequencies(head_dim, "
            f"scaling=..., length=..., max_positions=...), which from_linear takes as rotary_frequencies="
        )
    frequencies, attention_factor = at(None)
    rotary: dict[str, Any] = {"rotary_dim": 2 * len(frequencies)}
    if kind == "default":
        return rotary | {"rotary_base": rope_parameters.get("rope_theta") or rotary_base}
    return rotary | {"rotary_frequencies": (frequencies, attention_factor)}


def from_llama(
    state: Any,
    layer: int,
    num_heads: int,
    num_kv_heads: Any,
    prefix: str,
    rotary_base: Any,
    rope_parameters: Any,
    max_positions: Any,
) -> dict[str, Any]:
    _check_text(prefix=prefix)
    at = f"layers.{_layer_number(layer)}.self_attn."
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    with _opened(state) as tensors:
        at = tensors.resolve(prefix, "model.", [f"{at}{name}.weight" for name in names.values()]) + at
        known = [f"{name}.{kind}" for name in names.values() for kind in ("weight", "bias")]
        # The table rotary_emb.inv_freq follows from the base.
        tensors.refuse_others(at, [*known, "rotary_emb.inv_freq"])
        arguments = tensors.linears(**{which: at + name for which, name in names.items()})
    columns, kv_columns = arguments["w_query"].shape[1], arguments["w_key"].shape[1]
    arguments |= {"num_kv_heads": num_kv_heads, "rotary_base": rotary_base}
    heads = integer(num_heads, "num_heads", "an integer of at least 1", 1)
    if columns % heads:
        return arguments  # the layer refuses these
    head_dim = columns // heads
    if num_kv_heads is None:
        # As many heads as the columns make.
        num_kv_heads = kv_columns // head_dim if head_dim and kv_columns % head_dim == 0 else None
        arguments["num_kv_heads"] = num_kv_heads or None
    if rope_parameters is not None:
        del arguments["rotary_base"]
        arguments |= _rotary(head_dim, rotary_base, rope_parameters, max_positions)
    return arguments


def from_keras(weights: Any, prefix: str) -> dict[str, Any]:
    _check_text(prefix=prefix)
    parts = {"query": "query", "key": "key", "value": "value", "out": "attention_output"}
    kernels: dict[str, NDArray[Any]] = {}
    biases: dict[str, NDArray[Any]] = {}
    if isinstance(weights, Mapping):
        # Keras 2 appends ":0" to every name.
        names = {name.removesuffix(":0"): name for name in weights if isinstance(name, str)}
        tensors = _Tensors(names, lambda name: weights[names[name]])
        prefix = tensors.resolve(prefix, "", [f"{part}/kernel" for part in parts.values()])
        for which, part in parts.items():
            kernels[which] = tensors.array(f"{prefix}{part}/kernel")
            if f"{prefix}{part}/bias" in tensors:
                biases[which] = tensors.array(f"{prefix}{part}/bias")
    else:
        try:
            several = list(weights)
        except TypeError as error:
            raise TypeError(f"weights must be a sequence of arrays or a mapping to arrays: {error}") from error
        arrays = [_as_array(x, f"weights[{i}]") for i, x in enumerate(several)]
        if len(arrays) == 4:
            kernels = dict(zip(parts, arrays, strict=True))
        elif len(arrays) == 8:
            kernels = dict(zip(parts, arrays[::2], strict=True))
            biases = dict(zip(parts, arrays[1::2], strict=True))
        else:
            raise ValueError(
                f"weights has {len(arrays)} arrays, of shapes {', '.join(str(x.shape) for x in arrays)}; it must have "
                f"the kernels of query, key, value and attention_output, or each of them and its bias"
            )
    for which, kernel in kernels.items():
        if kernel.ndim != 3:
            want = "(num_heads, value_dim, d_out)" if which == "out" else "(d_model, num_heads, head_dim)"
            raise ValueError(f"the kernel of {parts[which]} has shape {kernel.shape}; it must be {want}")
    for which, bias in biases.items():
        shape = kernels[which].shape[2 if which == "out" else 1 :]
        if bias.shape != shape:
            raise ValueError(f"the bias of {parts[which]} has shape {bias.shape}; it must be {shape}")
    if kernels["key"].shape[1] != kernels["value"].shape[1]:
        raise ValueError(
            f"the kernel of key has {kernels['key'].shape[1]} heads and that of value {kernels['value'].shape[1]}: "
            f"they must be equal"
        )
    arguments: dict[str, Any] = {f"b_{which}": bias.ravel() for which, bias in biases.items()}
    for which, kernel in kernels.items():
        a, b, c = kernel.shape
        arguments[f"w_{which}"] = kernel.reshape((a * b, c) if which == "out" else (a, b * c))
    return arguments | {"num_heads": kernels["query"].shape[1], "num_kv_heads": kernels["key"].shape[1]}
