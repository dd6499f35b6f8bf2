"""Arrays by name, from a mapping, a safetensors file or several with an index, each read only when needed.

PyTorch's linear layers store (out, in) and multiply by the transpose; here weights are (in, out), on the right of x.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn._checks import as_array

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# The most names that an error lists.
_MOST_NAMES = 6


def listed(names: Iterable[str]) -> str:
    """Some of the names, for an error."""
    names = list(names)
    rest = len(names) - _MOST_NAMES
    return ", ".join(map(repr, names[:_MOST_NAMES])) + (f" and {rest} more" if rest > 0 else "")


def array_of(x: Any, name: str) -> NDArray[Any]:
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


class Tensors:
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
        found = "found none of them" if len(lost) == len(wanted) else f"did not find {listed(lost)}"
        near = difflib.get_close_matches(lost[0], self.names, _MOST_NAMES, 0.0)
        there = f"among {len(self.names)} names, the closest being {listed(near)}" if near else "since there is no name"
        return ValueError(f"looked for {listed(wanted)} and {found} {there}{where}")

    def array(self, name: str) -> NDArray[Any]:
        return array_of(self._read(name), name)

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
                    where = f". The first one is there with prefix= {listed(others)}"
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
                f"there is {listed(others)} beside the weights of plain attention: the results would be wrong without"
            )


# What a folder of a model holds, of several files or of one.
INDEX, ONE = "model.safetensors.index.json", "model.safetensors"


@contextmanager
def opened(state: Any) -> Iterator[Tensors]:
    """Arrays by name, from a mapping or from files, which stay open meanwhile: the path of a safetensors file, of the
    index of several, or of a folder with either."""
    if isinstance(state, Mapping):
        yield Tensors(state, state.__getitem__)
        return
    if not isinstance(state, (str, os.PathLike)):
        raise TypeError(
            f"state must be a mapping from names to arrays or the path of a .safetensors file, of the .index.json of "
            f"several, or of their folder, not a {type(state).__name__}"
        )
    path = os.fspath(state)
    if os.path.isdir(path):
        there = [name for name in (INDEX, ONE) if os.path.isfile(os.path.join(path, name))]
        if not there:
            raise FileNotFoundError(f"state={path!r} is a folder without {INDEX} or {ONE}")
        path = os.path.join(path, there[0])
    with ExitStack() as stack:
        if path.endswith(".json"):
            yield _sharded(path, stack)
        else:
            file = stack.enter_context(_file(path))
            yield Tensors(file.keys(), lambda name: _tensor(file, name, path))


def _file(path: str) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"to read {path} the package safetensors is needed: pip install safetensors") from error
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"state={path!r} is not a .safetensors file: {error}") from error


def _tensor(file: Any, name: str, path: str) -> Any:
    if file.get_slice(name).get_dtype() == "BF16":
        try:
            importlib.import_module("ml_dtypes")  # registers bfloat16 with NumPy
        except ImportError as error:
            raise ImportError(f"{name} in {path} is bfloat16: pip install ml_dtypes") from error
    return file.get_tensor(name)


def _sharded(path: str, stack: ExitStack) -> Tensors:
    """The arrays of all files that an index names; a file is opened for the first of its arrays."""
    try:
        with open(path, encoding="utf-8") as text:
            index = json.load(text)
    except ValueError as error:
        raise ValueError(f"state={path!r} is no index of .safetensors files: {error}") from error
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(
            f"state={path!r} is no index of .safetensors files: it must have a 'weight_map', from names of arrays to "
            f"names of files"
        )
    files: dict[str, Any] = {}

    def read(name: str) -> Any:
        where = os.path.join(os.path.dirname(path), names[name])
        if where not in files:
            files[where] = stack.enter_context(_file(where))
        if name not in files[where].keys():
            raise ValueError(f"{path} says that {name} is in {names[name]}, which has no such array")
        return _tensor(files[where], name, where)

    return Tensors(names, read)


def check_text(**names: Any) -> None:
    """Check arguments that names are made of."""
    for name, x in names.items():
        if not isinstance(x, str):
            raise TypeError(f"{name} must be a string, not {x!r}")
