"""The keywords of attention, as Python sees them: for functions that pass them on, and for signatures in help()."""

from __future__ import annotations

import textwrap
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from numpy.typing import ArrayLike, NDArray

_Function = TypeVar("_Function", bound="Callable[..., Any]")


class _SharedRules(TypedDict, total=False):
    chunk_size: int | None
    left_chunks: int | None
    relative_bias: ArrayLike | None
    alibi_slopes: ArrayLike | None
    scale: float | None
    softcap: float | None
    sinks: ArrayLike | None
    activation: str
    num_threads: int | None


class StreamingLayerRules(_SharedRules, total=False):
    """Of StreamingMultiHeadAttention, whose layer knows whether heads are grouped."""


class StreamRules(_SharedRules, total=False):
    """Of StreamingAttention; the others follow from the stream."""

    enable_gqa: bool


class _QueryRules(_SharedRules, total=False):
    is_causal: bool
    window_size: int | tuple[int | None, int | None] | None
    query_offset: ArrayLike | None
    key_lengths: ArrayLike | None
    query_lengths: ArrayLike | None
    mask: ArrayLike | None
    block_mask: ArrayLike | None
    block_size: int | tuple[int, int]
    bias: ArrayLike | None


class LayerRules(_QueryRules, total=False):
    """Of layers, which know whether heads are grouped."""

    return_weights: bool | str
    return_lse: bool
    out: NDArray[Any] | None


class Rules(LayerRules, total=False):
    """Of `dot_product_attention`."""

    enable_gqa: bool


class LayerGradientRules(_QueryRules, total=False):
    """Of layers on the way back."""


class GradientRules(_QueryRules, total=False):
    """Of gradients, which return nothing else."""

    enable_gqa: bool


class TruncatedGradientRules(TypedDict, total=False):
    """Of those of `truncated_attention`."""

    is_causal: bool
    query_offset: ArrayLike | None
    key_lengths: ArrayLike | None
    query_lengths: ArrayLike | None
    mask: ArrayLike | None
    block_mask: ArrayLike | None
    block_size: int | tuple[int, int]
    bias: ArrayLike | None
    relative_bias: ArrayLike | None
    alibi_slopes: ArrayLike | None
    scale: float | None
    softcap: float | None
    sinks: ArrayLike | None
    activation: str
    enable_gqa: bool
    num_threads: int | None


class VarlenGradientRules(TypedDict, total=False):
    """Of those of `varlen_attention`."""

    is_causal: bool
    window_size: int | tuple[int | None, int | None] | None
    alibi_slopes: ArrayLike | None
    scale: float | None
    softcap: float | None
    sinks: ArrayLike | None
    activation: str
    enable_gqa: bool
    num_threads: int | None


class LayerOptions(TypedDict, total=False):
    """What a `MultiHeadAttention` may have beside its projections."""

    rotary_base: float | None
    rotary_frequencies: tuple[ArrayLike, float] | None
    rotary_interleaved: bool
    rotary_dim: int | None
    q_norm: ArrayLike | None
    k_norm: ArrayLike | None
    norm_eps: float
    is_causal: bool
    window_size: int | tuple[int | None, int | None] | None
    relative_bias: ArrayLike | None
    alibi_slopes: ArrayLike | None
    scale: float | None
    softcap: float | None
    sinks: ArrayLike | None


# The rules that a layer may hold.
HELD_RULES = "is_causal", "window_size", "relative_bias", "alibi_slopes", "scale", "softcap", "sinks"


class _Held:
    """The default of these rules in a call: what the layer holds. None or False in a call means none."""

    def __repr__(self) -> str:
        return "<held>"


HELD = _Held()


class _Readable(Signature):
    """A signature wrapped for reading; the types of arguments are in the docstring."""

    def __str__(self) -> str:
        return "\n".join(textwrap.wrap(super().__str__(), 100, subsequent_indent="    ", break_on_hyphens=False))


def readable(function: _Function, added: list[Parameter] | None = None) -> _Function:
    """Gives the function a signature without annotations (type checkers still see them); added: replace its
    ``**rules``."""
    parameters = [p for p in signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [p.replace(annotation=Parameter.empty) for p in (*parameters, *(added or ()))]
    vars(function)["__signature__"] = _Readable(parameters)
    return function


def takes(kind: type, like: Callable[..., Any], held: Collection[str] = ()) -> Callable[[_Function], _Function]:
    """For a function with ``**rules: Unpack[kind]``: help() and inspect.signature show these keywords, as in `like`;
    held: those whose default is what a layer holds."""

    def decorated(function: _Function) -> _Function:
        own = signature(function).parameters
        names = [name for name in kind.__annotations__ if name not in own]
        added = [p for p in signature(like).parameters.values() if p.name in names]
        return readable(function, [p.replace(default=HELD) if p.name in held else p for p in added])

    return decorated


def refuse_others(rules: Mapping[str, Any], kind: type, name: str) -> None:
    """Raises what Python itself would for keywords that a function does not have."""
    if not rules.keys() <= kind.__annotations__.keys():
        other = next(key for key in rules if key not in kind.__annotations__)
        raise TypeError(f"{name}() got an unexpected keyword argument {other!r}")
