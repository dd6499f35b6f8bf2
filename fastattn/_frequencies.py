"""Frequencies of rotary encoding from the dict of a model's configuration, for rotary_frequencies and layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn._checks import integer, real

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Result = tuple[NDArray[np.float64], float]

# Older names of rope types.
_ALSO = {"su": "longrope"}

# The keys that a dict may have; each rope type ignores those it does not use. "finetuned" does not affect the
# frequencies.
_KEYS = frozenset(
    "rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings attention_factor "
    "low_freq_factor high_freq_factor beta_fast beta_slow mscale mscale_all_dim truncate short_factor long_factor "
    "finetuned".split()
)


def _whole(x: Any, name: str, least: int) -> int:
    return integer(x, name, f"an integer of at least {least}", least)


def _real(x: Any, name: str, *, positive: bool = True) -> float:
    return real(x, name, "a positive finite number" if positive else "a finite number", positive)


class _Scaling:
    """The dict, and its name in errors."""

    def __init__(self, scaling: Any, name: str, max_positions: int | None) -> None:
        if scaling is None:
            scaling = {}
        if not isinstance(scaling, Mapping):
            raise TypeError(
                f"{name} must be the dict that model files call rope_scaling or rope_parameters, or None, not a "
                f"{type(scaling).__name__}"
            )
        self.given = {key: x for key, x in scaling.items() if x is not None}
        self.name = name
        self.max_positions = max_positions
        nested = [key for key, x in self.given.items() if isinstance(x, Mapping)]
        if nested:
            raise ValueError(
                f"{name} holds a dict for each kind of layer, {', '.join(map(repr, nested))}: give the one of this "
                f"layer"
            )
        unknown = [key for key in self.given if key not in _KEYS]
        if unknown:
            raise ValueError(
                f"{name} has the key {unknown[0]!r}, which is not known here: without what it asks for, the numbers "
                f"would be wrong. Known are {', '.join(sorted(_KEYS - {'finetuned'}))}"
            )
        kind = self.given.get("rope_type", self.given.get("type"))
        if kind is None:
            others = self.given.keys() - {"rope_theta", "partial_rotary_factor"}
            if others:
                raise ValueError(f"{name} has {', '.join(map(repr, sorted(others)))} and no 'rope_type'")
            kind = "default"
        kind = _ALSO.get(kind, kind) if isinstance(kind, str) else kind
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"{name} has rope_type {kind!r}; known are {', '.join(_KINDS)}")
        self.kind = kind

    def need(self, *keys: str) -> None:
        lost = [key for key in keys if key not in self.given]
        if lost:
            raise ValueError(f"{self.name} of rope_type {self.kind!r} lacks {' and '.join(map(repr, lost))}")

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        if default is None:
            self.need(key)
        return _real(self.given.get(key, default), f"{self.name}[{key!r}]", positive=positive)

    def original(self) -> float:
        """The length of the context in pretraining."""
        key = "original_max_position_embeddings"
        if key not in self.given:
            if self.max_positions is None:
                raise ValueError(
                    f"{self.name} of rope_type {self.kind!r} lacks {key!r}: some files have it beside the dict; else "
                    f"max_positions, the model's max_position_embeddings, is needed"
                )
            return float(self.max_positions)
        if self.number(key) <= 1:
            raise ValueError(f"{self.name}[{key!r}] must be greater than 1, not {self.given[key]}")
        return self.number(key)

    def factor(self) -> float:
        """How many times longer the context is, computed from the lengths if not given."""
        if "factor" not in self.given and "original_max_position_embeddings" in self.given and self.max_positions:
            return self.max_positions / self.original()
        if "factor" not in self.given:
            raise ValueError(
                f"{self.name} of rope_type {self.kind!r} lacks 'factor', or both 'original_max_position_embeddings' "
                f"(which some files have beside the dict) and max_positions, the model's max_position_embeddings"
            )
        return self.number("factor")

    def numbers(self, key: str, count: int) -> NDArray[np.float64]:
        self.need(key)
        many = self.given[key]
        if isinstance(many, str) or not hasattr(many, "__len__"):
            raise TypeError(f"{self.name}[{key!r}] must be a list of {count} numbers, not {many!r}")
        if len(many) != count:
            raise ValueError(f"{self.name}[{key!r}] has {len(many)} numbers; it must have {count}, one for each pair")
        return np.array([_real(x, f"{self.name}[{key!r}][{i}]") for i, x in enumerate(many)])


def _plain(base: float, dim: int) -> NDArray[np.float64]:
    if base == math.inf:
        raise OverflowError
    return np.array([base ** (-2 * i / dim) for i in range(dim // 2)], np.float64)


def _default(_: _Scaling, base: float, dim: int, __: int | None) -> Result:
    return _plain(base, dim), 1.0


def _linear(scaling: _Scaling, base: float, dim: int, _: int | None) -> Result:
    return _plain(base, dim) / scaling.number("factor"), 1.0


def _dynamic(scaling: _Scaling, base: float, dim: int, length: int | None) -> Result:
    factor, original = scaling.number("factor"), scaling.original()
    if length is None:
        raise ValueError(f"length is needed for {scaling.name} of rope_type 'dynamic': the frequencies depend on it")
    if dim < 4:
        raise ValueError(f"rope_type 'dynamic' needs at least 4 channels that turn, not {dim}")
    growth = 1 + factor * (max(length, original) / original - 1)
    return _plain(base * growth ** (dim / (dim - 2)), dim), 1.0


def _llama3(scaling: _Scaling, base: float, dim: int, _: int | None) -> Result:
    scaling.need("factor", "low_freq_factor", "high_freq_factor")
    factor = scaling.number("factor")
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise ValueError(f"{scaling.name} must have a 'high_freq_factor' above 'low_freq_factor', not {high} and {low}")
    speeds = _plain(base, dim)
    # Full turns within the original length: a pair with up to `low` is slow, one with `high` or more is fast.
    turns = scaling.original() * speeds / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return speeds * (share + (1 - share) / factor), 1.0


def _yarn(scaling: _Scaling, base: float, dim: int, _: int | None) -> Result:
    factor, original = scaling.factor(), scaling.original()
    if base <= 1:
        raise ValueError(f"rope_type 'yarn' needs a base above 1, not {base:g}")
    fast, slow = scaling.number("beta_fast", 32.0), scaling.number("beta_slow", 1.0)
    if fast < slow:
        raise ValueError(
            f"{scaling.name} must have a 'beta_fast' that is at least 'beta_slow', not {fast:g} and {slow:g}"
        )
    truncate = scaling.given.get("truncate", True)
    if not isinstance(truncate, bool):
        raise TypeError(f"{scaling.name}['truncate'] must be True or False, not {truncate!r}")
    # The (fractional) index of the pair that makes n full turns within the original length.
    first, last = (dim * math.log(original / (2 * math.pi * n)) / (2 * math.log(base)) for n in (fast, slow))
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    speeds = _plain(base, dim)
    share = np.clip((np.arange(dim // 2) - first) / (last - first), 0, 1)
    frequencies = speeds * (1 - share + share / factor)
    if "attention_factor" in scaling.given:
        return frequencies, scaling.number("attention_factor")

    def sharpening(scale: float) -> float:
        return 1 + 0.1 * scale * math.log(factor) if factor > 1 else 1.0

    numerator = scaling.number("mscale", 0.0, positive=False)
    denominator = scaling.number("mscale_all_dim", 0.0, positive=False)
    if numerator and denominator:
        return frequencies, sharpening(numerator) / sharpening(denominator)
    return frequencies, sharpening(1)


def _longrope(scaling: _Scaling, base: float, dim: int, length: int | None) -> Result:
    scaling.need("short_factor", "long_factor")
    short, long = (scaling.numbers(key, dim // 2) for key in ("short_factor", "long_factor"))
    original = scaling.original()
    frequencies = _plain(base, dim) / (long if length is not None and length > original else short)
    if "attention_factor" in scaling.given:
        return frequencies, scaling.number("attention_factor")
    factor = scaling.factor()
    return frequencies, math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


_KINDS: dict[str, Callable[[_Scaling, float, int, int | None], Result]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def kind_of(scaling: Any, name: str) -> str:
    """The rope_type of a dict; name: its name in errors."""
    return _Scaling(scaling, name, None).kind


def scaled_frequencies(dim: Any, base: Any, scaling: Any, name: str, length: Any, max_positions: Any) -> Result:
    """What `rotary_frequencies` returns; name: the name of the dict in errors."""
    channels = _whole(dim, "dim", 0)
    length = None if length is None else _whole(length, "length", 0)
    max_positions = None if max_positions is None else _whole(max_positions, "max_positions", 2)
    base = _real(base, "base")
    given = _Scaling(scaling, name, max_positions)
    base = given.number("rope_theta", base)
    share = given.number("partial_rotary_factor", 1.0)
    if share > 1:
        raise ValueError(f"{name}['partial_rotary_factor'] must be at most 1, not {share:g}")
    turning = int(channels * share)
    if turning % 2:
        if share < 1:
            raise ValueError(
                f"{name}['partial_rotary_factor']={share:g} means that {turning} of dim={channels} channels turn: it "
                f"must be an even number"
            )
        raise ValueError(f"dim must be even, not {channels}")
    try:
        with np.errstate(all="ignore"):  # the result is checked below
            frequencies, attention_factor = _KINDS[given.kind](given, base, turning, length)
    except OverflowError:
        frequencies, attention_factor = np.array([math.inf]), 1.0
    if not np.isfinite(frequencies).all():
        raise ValueError(f"base={base:g} and {name} give frequencies beyond the range of float64")
    return frequencies, attention_factor
