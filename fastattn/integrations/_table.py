"""The functions that other frameworks can differentiate: the table over which each of the bridges loops.

Every function of a query, keys and values that has a sister `_vjp` is a row of TABLE. What it takes, what it returns
and which of its arguments have gradients follow from its signature, once their names are in the lists below. All is
NumPy here: each framework is known to its own module alone.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np

import fastattn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

# Arguments with gradients, in whatever function. All others are constants: rules, lengths, scale, softcap.
DIFFERENTIABLE = {
    *("query", "key", "value", "bias", "relative_bias", "alibi_slopes", "sinks"),
    *("w_score", "w_query", "w_key", "b_hidden", "b_query", "b_key"),
    *("log_decay", "beta", "state", "edge_bias", "edge_key", "edge_value"),
}

# Arguments and results whose first axes are the batch axes of the call, and how many other axes they have.
BATCHED = {
    **dict.fromkeys(("query", "key", "value", "bias", "relative_bias", "mask", "block_mask", "out", "grad_out"), 2),
    **dict.fromkeys(("log_decay", "state", "edge_key", "edge_value"), 2),
    **dict.fromkeys(("lse", "grad_lse", "beta", "edge_bias"), 1),
    **dict.fromkeys(("alibi_slopes", "sinks", "key_lengths", "query_lengths", "query_offset"), 0),
}

BATCHED_IN: dict[str, dict[str, int]] = {
    "graph_attention": {**BATCHED, "w_score": 1},  # elsewhere it has no batch axes
    "neighborhood_attention": {},  # how many axes are none of the batch depends on the call
}

# Arguments that decide the dtype of the output together.
PROMOTING = ("query", "key", "value", "w_score", "w_query", "w_key", "edge_key", "edge_value")

# Results besides the output, in order, for which a call has an argument `return_...`.
RETURNED = ("weights", "lse", "state")

# Of keys and values of 8 bits, through which no gradient comes.
EIGHT_BITS = ("key_scale", "value_scale", "key_center")

NO_SECOND = "attention of fastattn has first derivatives only: its gradients cannot be differentiated again"


class Row:
    """A function `f` and its gradients, `f_vjp`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.batched = BATCHED_IN.get(name, BATCHED)
        self.function: Callable[..., Any] = getattr(fastattn, name)
        own = inspect.signature(self.function)
        # Results are new arrays of the framework.
        mine = [p for p in own.parameters.values() if p.name not in ("out", "state_out")]
        self.signature = own.replace(parameters=mine)
        parameters = self.signature.parameters
        self.names = frozenset(parameters)  # not the keys of a dict, which torch.compile cannot compare
        self.positional = [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
        self.required = {name for name, p in parameters.items() if p.default is p.empty}
        self.differentiable = tuple(name for name in parameters if name in DIFFERENTIABLE)

    def shown(self, without: Iterable[str]) -> list[inspect.Parameter]:
        return [p for p in self.signature.parameters.values() if p.name not in without]

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
        """The arguments of a call by name."""
        given = dict(zip(self.positional, args, strict=False))
        both = given.keys() | kwargs.keys()
        fits = len(both) == len(args) + len(kwargs) and self.required <= both <= self.names
        if not fits or not kwargs.keys().isdisjoint(without):
            try:
                self.signature.replace(parameters=self.shown(without)).bind(*args, **kwargs)
            except TypeError as error:  # which says what is wrong, but takes longer than a small call
                raise TypeError(f"{self.name}(): {error}") from None
        return given | kwargs

    def refuse_others(self, names: Iterable[str], given: Mapping[str, Any]) -> None:
        """For arguments of which gradients are wanted, and all of a call."""
        for name in names:
            if any(given.get(other) is not None for other in EIGHT_BITS):
                raise ValueError(f"{self.name} over keys and values of 8 bits has no gradients, and {name} wants one")
            if name not in self.differentiable:
                choice = ", ".join(self.differentiable)
                raise ValueError(f"{name} of {self.name} is a constant; those that can have a gradient are {choice}")

    def has_lse(self, given: Mapping[str, Any]) -> bool:
        """Whether the way back can use what the forward call returned."""
        return "return_lse" in self.names and given.get("activation", "softmax") == "softmax"

    def results(self, given: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of what `forward` returns: what is asked for, and lse if the way back can use it."""
        asked = {name: given.get(f"return_{name}") for name in RETURNED}
        asked["lse"] = asked["lse"] or self.has_lse(given)
        return "out", *(name for name in RETURNED if asked[name])

    def result_shapes(
        self, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Of the output and of lse, from the shapes of these arguments."""
        if min(map(len, (query, key, value))) < 2:
            raise ValueError(f"query, key and value must have two axes or more, not the shapes {query}, {key}, {value}")
        ndim = max(map(len, (query, key, value)))
        sizes = zip(*((1,) * (ndim - len(shape)) + shape for shape in (query, key, value)), strict=True)
        # Sizes are equal or 1; where heads are grouped query has more than the others. The call refuses any others.
        batch = [0 if 0 in axis else max(axis) for axis in sizes][:-2]
        return {"out": (*batch, query[-2], value[-1]), "lse": (*batch, query[-2])}

    def forward(self, given: Mapping[str, Any]) -> tuple[NDArray[Any], ...]:
        """The results of the function, in this order."""
        results = self.function(**{**given, **({"return_lse": True} if self.has_lse(given) else {})})
        return results if isinstance(results, tuple) else (results,)

    def asked_for(self, given: Mapping[str, Any], results: Sequence[Any]) -> Any:
        """Of these results those that the caller wants, as the function itself returns them."""
        named = zip(self.results(given), results, strict=True)
        wanted = [x for name, x in named if name == "out" or given.get(f"return_{name}")]
        return tuple(wanted) if len(wanted) > 1 else wanted[0]

    def backward(
        self, wrt: Iterable[str], given: Mapping[str, Any], results: Sequence[Any], gradients: Sequence[Any]
    ) -> tuple[NDArray[Any], ...]:
        """The gradients of the arguments `wrt`, from those of the results of `forward`, in which None is zero."""
        names = self.results(given)
        had, incoming = (dict(zip(names, arrays, strict=True)) for arrays in (results, gradients))
        grad_out = incoming["out"]
        more: dict[str, Any] = {}
        if grad_out is None:
            grad_out = np.broadcast_to(had["out"].dtype.type(0), had["out"].shape)
        if "lse" in names:
            more.update(output=had["out"], lse=had["lse"], grad_lse=incoming["lse"])
        if "state" in names:
            more.update(grad_state=incoming["state"])
        given = {name: x for name, x in given.items() if not name.startswith("return_")}
        return getattr(fastattn, f"{self.name}_vjp")(grad_out, **given, **more, wrt=tuple(wrt))

    def dressed(self, function: Callable[..., Any], module: str, about: str, without: Iterable[str] = ()) -> Any:
        """The function of a bridge with the name, the signature and the documentation of this row."""
        names = ", ".join(f"`{name}`" for name in self.differentiable)
        vars(function)["__signature__"] = self.signature.replace(parameters=self.shown(without))
        function.__name__ = function.__qualname__ = self.name
        function.__module__ = module
        function.__doc__ = (
            f"`fastattn.{self.name}`, whose docstring says what the arguments mean, for {about}.\n\n"
            f"Gradients: of {names}.\n"
        )
        return function


TABLE = tuple(
    Row(name)
    for name in fastattn.__all__
    if f"{name}_vjp" in fastattn.__all__ and "query" in inspect.signature(getattr(fastattn, name)).parameters
)
