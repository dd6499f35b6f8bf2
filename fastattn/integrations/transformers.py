"""Attention of Hugging Face's Transformers on the CPU: models run as they are, under another name of attention.

    from transformers import AutoModel
    from fastattn.integrations.transformers import register

    register()
    model = AutoModel.from_pretrained("answerdotai/ModernBERT-base", attn_implementation="fastattn")

or `model.set_attn_implementation("fastattn")` for one that is loaded. Queries, keys and values are read where they lie,
and the output is written as the next layer wants it: nothing is copied.

Masks stay bounds. Transformers asks for a mask once for each kind of layer, and says what it means: causal, a window on
one side or both, chunks, padding. Such a mask is a tensor without memory here, which gives its layers these rules: keys
out of sight are not read, and no array of queries times keys is built. Whoever else computes with it gets the numbers.
Masks of any other meaning, and all that are made under `torch.compile` and `torch.export`, are those of `sdpa`.

Soft caps (Gemma 2), sinks (gpt-oss) and biases of positions (T5) are part of the same call, and so are the weights of
`output_attentions=True`, a keyword of a model's call. Dropout is refused. Gradients are those of
`fastattn.integrations.torch`.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import TYPE_CHECKING, Any, cast

try:
    import torch
    import transformers
    from transformers import masking_utils
except ImportError as error:
    raise ImportError(
        'fastattn.integrations.transformers needs Transformers and PyTorch: pip install "fastattn[transformers]"'
    ) from error

from fastattn.integrations.torch import _is_eager, attention

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["register"]

# What Transformers itself looks for in a name.
_TAKEN = ("flash", "sdpa", "flex", "eager", "paged", "|", "/", ":")


def register(name: str = "fastattn") -> None:
    """
    Make fastattn an attention implementation of Transformers.

    Parameters
    ----------
    name : str, default 'fastattn'
        What `attn_implementation` is to be. A second call with the same name changes nothing.

    Raises
    ------
    ValueError
        If the name is another implementation's, or contains what Transformers takes for one ('flash', 'sdpa', 'flex',
        'eager', 'paged') or for a repository.

    Notes
    -----
    The attention function and the function that makes its masks are registered, both for the whole process. Models
    that do not ask for the name are as before.

    References
    ----------
    Transformers' documentation of `AttentionInterface` and `AttentionMaskInterface`.

    Examples
    --------
    >>> from transformers import BertConfig, BertModel
    >>> from fastattn.integrations.transformers import register
    >>> register()
    >>> config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    >>> model = BertModel(config).eval()
    >>> model.set_attn_implementation("fastattn")
    """
    if not isinstance(name, str) or not name or any(part in name for part in _TAKEN):
        raise ValueError(f"name must be a string without {', '.join(map(repr, _TAKEN))}, not {name!r}")
    for interface, function in (
        (transformers.AttentionInterface, _attend),
        (transformers.AttentionMaskInterface, _make_mask),
    ):
        if interface().get(name, function) is not function:
            raise ValueError(f"name={name!r} is another attention implementation of Transformers")
    transformers.AttentionInterface.register(name, _attend)
    transformers.AttentionMaskInterface.register(name, _make_mask)


# -- masks ----------------------------------------------------------------------------------------------------


class _Bounds(torch.Tensor):
    """A mask (batch, 1, queries, keys) without memory: its rules, and how the bools are made if somebody asks."""

    rules: dict[str, Any]
    make: Callable[[], torch.Tensor]
    made: torch.Tensor | None

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], rules: dict[str, Any], make: Callable[[], torch.Tensor]) -> _Bounds:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device="cpu")
        self.rules, self.make, self.made = rules, make, None
        return cast(_Bounds, self)

    def dense(self) -> torch.Tensor:
        if self.made is None:
            self.made = self.make()
        return self.made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given, _ = torch.utils._pytree.tree_flatten((args, kwargs or {}))
        # What writes, or returns what may be written to, shares the bools with us from now on.
        if function._schema.is_mutable or any(x.alias_info is not None for x in function._schema.returns):
            for x in given:
                if isinstance(x, _Bounds):
                    x.rules = {"mask": x.dense()}
        args, kwargs = torch.utils._pytree.tree_map_only(_Bounds, _Bounds.dense, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def share_memory_(self) -> torch.Tensor:  # which would look for memory
        return self.dense().share_memory_()

    def __repr__(self, **_: Any) -> str:
        rules = ", ".join(f"{name}={x!r}" for name, x in self.rules.items())
        return f"<mask of shape {tuple(self.shape)} by fastattn: {rules or 'all keys'}>"


def _chunk_rules(held: dict[str, Any]) -> dict[str, Any] | None:
    # Chunks that begin behind the padding of each sequence are no bound.
    return None if held["left_padding"].any() else {"chunk_size": held["chunk_size"], "left_chunks": 0}


def _rules_of_all(held: dict[str, Any]) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    for function in held["mask_functions"]:
        rules = _rules_of(function)
        if rules is None or found.keys() & rules.keys():
            return None
        found |= rules
    return found


# The functions of indices of which Transformers makes its masks, by their names there: what a factory is called with to
# get one of them (None: it is one itself), and from what it holds to rules. A name that is gone is a mask of bools.
_MEANINGS: dict[str, tuple[tuple[Any, ...] | None, Callable[[dict[str, Any]], dict[str, Any] | None]]] = {
    "causal_mask_function": (None, lambda held: {"is_causal": True}),
    "bidirectional_mask_function": (None, lambda held: {}),
    "sliding_window_overlay": ((1,), lambda held: {"left": held["sliding_window"] - 1}),
    "sliding_window_bidirectional_overlay": (
        (1,),
        lambda held: {"left": held["sliding_window"], "right": held["sliding_window"]},
    ),
    "chunked_overlay": ((1, None), _chunk_rules),
    "and_masks": ((), _rules_of_all),
}


def _codes() -> dict[Any, Callable[[dict[str, Any]], dict[str, Any] | None]]:
    """All functions of one factory have the same code."""
    codes = {}
    for name, (arguments, read) in _MEANINGS.items():
        function = getattr(masking_utils, name, None)
        if function is not None:
            function = function if arguments is None else function(*arguments)
            codes[function.__code__] = read
    return codes


_CODES = _codes()


def _rules_of(function: Callable[..., Any]) -> dict[str, Any] | None:
    """is_causal, left, right, chunk_size and left_chunks of a function of indices; None if it means anything else."""
    code = getattr(function, "__code__", None)
    read = _CODES.get(code)
    if code is None or read is None:
        return None
    cells = function.__closure__ or ()
    return read({name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)})


def _bounds(
    mask_function: Callable[..., Any], q_length: int, kv_length: int, q_offset: int, kv_offset: int
) -> dict[str, Any] | None:
    """The rules of `attention` for a function of indices, or None."""
    rules = _rules_of(mask_function)
    if rules is None:
        return None
    left, right = rules.pop("left", None), rules.pop("right", None)
    last = q_offset + q_length - 1
    if left is not None and left >= last - kv_offset:
        left = None  # no key lies further back
    if right is not None and right >= kv_offset + kv_length - 1 - q_offset:
        right = None
    if left is not None or right is not None:
        rules["window_size"] = left, right
    chunk = rules.get("chunk_size")
    if chunk is not None:
        if last < chunk and rules.get("is_causal"):
            del rules["chunk_size"], rules["left_chunks"]
        elif kv_offset % chunk:
            return None  # the first chunk is not whole
    if rules:
        rules["query_offset"] = q_offset - kv_offset
    return rules


def _padding(attention_mask: torch.Tensor, kv_length: int, kv_offset: int) -> dict[str, Any]:
    """The rule of a mask (batch, keys) of what is no padding; fewer keys than kv_length: the others are not there."""
    seen = attention_mask[:, kv_offset : kv_offset + kv_length]
    columns = seen.shape[1]
    lengths = seen.sum(1)
    if columns == kv_length and bool((lengths == columns).all()):
        return {}
    # Tokens come first, padding last: bounds.
    if torch.equal(seen, torch.arange(columns) < lengths[:, None]):
        return {"key_lengths": int(lengths[0]) if bool((lengths == lengths[0]).all()) else lengths[:, None].numpy()}
    if columns < kv_length:
        seen = torch.nn.functional.pad(seen, (0, kv_length - columns))
    return {"mask": seen[:, None, None]}


@functools.cache
def _computes_itself(config_module: str) -> bool:
    """Whether the code of a model asks for a mask, but for no attention function, by what Transformers itself looks
    for. Such a model (Bloom, MPNet) adds its mask to scores: bools there would be wrong without a word."""
    module = sys.modules.get(config_module.replace(".configuration_", ".modeling_"))
    try:
        source = inspect.getsource(module) if module is not None else ""
    except (OSError, TypeError):
        return False
    has_attention = re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE)
    return has_attention is not None and "ALL_ATTENTION_FUNCTIONS" not in source


def _make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function of Transformers."""
    tensors = [x for x in (attention_mask, q_offset) if isinstance(x, torch.Tensor)]
    is_plain = _is_eager() and all(type(x) is torch.Tensor and x.device.type == "cpu" for x in tensors)
    config = kwargs.get("config")
    if is_plain and config is not None and _computes_itself(type(config).__module__):
        raise ValueError(
            f"attn_implementation: the model of {type(config).__name__} takes no attention by name but computes its "
            'own, with masks of its own; load it with attn_implementation="eager"'
        )
    if is_plain:
        q_offset = int(q_offset)  # of a cache that counts on in its tensor
    given = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
        **kwargs,
    }
    rules = _bounds(mask_function, q_length, kv_length, int(q_offset), kv_offset) if is_plain else None
    if rules is None:
        return cast("torch.Tensor | None", masking_utils.sdpa_mask(**given))
    if attention_mask is not None:
        rules |= _padding(attention_mask, kv_length, kv_offset)
    if not rules and allow_is_bidirectional_skip:
        return None
    without = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}

    def make() -> torch.Tensor:
        return cast(torch.Tensor, masking_utils.sdpa_mask(**given | without))

    return _Bounds((batch_size, 1, q_length, kv_length), rules, make)


# What fastattn calls its arguments, where a message begins with them, and what Transformers does; masks and biases are
# both attention_mask.
_NAMES = re.compile(r"^(mask|bias|scale|sinks)\b")
_THEIRS = {"scale": "scaling", "sinks": "s_aux"}

# -- attention ------------------------------------------------------------------------------------------------


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of Transformers. others: what other implementations want to know, such as the window,
    which the mask has; where a model has none of it in its mask or arguments, sdpa ignores it too."""
    if dropout > 0:
        raise ValueError(
            f"dropout must be 0: fastattn drops no weights, and was asked for dropout={dropout!r}; call model.eval() "
            "or set the dropout of attention to 0 in the model's configuration"
        )
    if others.get("sinks") is not None:
        raise ValueError("sinks: one for each query is not possible; those of each head are s_aux")
    rules: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    if type(attention_mask) is _Bounds:
        _fits(attention_mask, query, key)
        rules.update(attention_mask.rules)
    elif attention_mask is not None:
        if attention_mask.dtype is torch.bool:
            rules["mask"] = attention_mask
        else:
            rules["bias"] = attention_mask
    elif query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        rules["is_causal"], rules["query_offset"] = True, 0
    if position_bias is not None:
        rules["bias"] = position_bias if rules.get("bias") is None else rules["bias"] + position_bias
    if query.shape[1] != key.shape[1]:
        rules["enable_gqa"] = True
    if output_attentions or (_is_eager() and _are_collected()):
        rules["return_weights"] = True
    rules = {name: x for name, x in rules.items() if x is not None}
    try:
        results = attention(query, key, value, out_layout="bshd", **rules)
    except (ValueError, TypeError) as error:  # which calls them by fastattn's names
        theirs = "position_bias" if attention_mask is None else "attention_mask"
        raise type(error)(_NAMES.sub(lambda found: _THEIRS.get(found[0], theirs), str(error))) from None
    out, weights = results if isinstance(results, tuple) else (results, None)
    return out.transpose(1, 2), None if weights is None else weights.to(query.dtype)


def _are_collected() -> bool:
    """Whether a model was asked for its weights that does not hand the question on to its layers (GPT-2, BART)."""
    collected = _COLLECTOR.get() if _COLLECTOR is not None else None
    return collected is not None and any("attentions" in name for name in collected)


try:
    from transformers.utils.output_capturing import _active_collector as _COLLECTOR
except ImportError:
    _COLLECTOR = None


def _fits(mask: _Bounds, query: torch.Tensor, key: torch.Tensor) -> None:
    if mask.shape[2] != query.shape[2] or mask.shape[3] != key.shape[2]:
        raise ValueError(
            f"attention_mask is for {mask.shape[2]} queries and {mask.shape[3]} keys, not for {query.shape[2]} and "
            f"{key.shape[2]}"
        )
