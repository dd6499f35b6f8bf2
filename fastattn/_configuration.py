"""What the config.json of a decoder says of the attention in one layer, as arguments of its loader.

Files name more than attention needs, and leave out what is the default of their model; what is unknown here, and
changes attention, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastattn._checks import integer

# The model types that a loader follows, and what their files may leave out.
_KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "from_llama": {
        "llama": {},
        "mistral": {"sliding_window": 4096},
        "mixtral": {},
        "qwen2": {},
        "gpt_oss": {
            "sliding_window": 128,
            "rope_theta": 150000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
    },
    "from_qwen": {"qwen2": {}, "qwen2_moe": {}, "qwen3": {}, "qwen3_moe": {}},
    "from_gemma": {
        "gemma": {},
        "gemma2": {"query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0},
        "gemma3_text": {
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
    },
}
_SLIDES, _FULL = "sliding_attention", "full_attention"


def merged(loader: str, config: Any, layer: Any, num_heads: int, **given: Any) -> dict[str, Any]:
    """The arguments of a loader: those that are given, and what the configuration says instead of None."""
    if config is None:
        return given
    said = _of_layer(loader, config, integer(layer, "layer", "an integer of at least 0", 0), num_heads)
    return {name: said.get(name) if x is None else x for name, x in given.items()}


def _of_layer(loader: str, config: Any, layer: int, num_heads: int) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be the dict of a model's config.json, not a {type(config).__name__}")
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {"model_type": config.get("model_type"), **text}
    kind = config.get("model_type")
    kind = {"gemma3": "gemma3_text"}.get(kind, kind) if isinstance(kind, str) else kind
    known = _KINDS[loader]
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"config has model_type {kind!r}; {loader} follows {', '.join(known)}")
    config = {**known[kind], **config}
    heads = config.get("num_attention_heads", num_heads)
    if heads != num_heads:
        raise ValueError(f"config has num_attention_heads={heads!r}, and num_heads={num_heads} is given")
    if config.get("use_bidirectional_attention"):
        raise ValueError(
            "config has use_bidirectional_attention, whose windows have two sides: load without config, and give "
            "is_causal=False and window_size in each call"
        )
    type_of_layer = _type_of(config, kind, layer)
    slides = type_of_layer == _SLIDES
    if slides and config.get("sliding_window") is None:
        raise ValueError(f"config says that layer {layer} has a window, and has no sliding_window")
    said = {
        "num_kv_heads": config.get("num_key_value_heads"),
        "norm_eps": config.get("rms_norm_eps"),
        "max_positions": config.get("max_position_embeddings"),
        "sliding_window": config["sliding_window"] if slides else None,
        "rope_parameters": _rope(config, kind, type_of_layer),
    }
    if kind in ("gemma2", "gemma3_text"):
        said |= {name: config.get(name) for name in ("query_pre_attn_scalar", "attn_logit_softcapping")}
    return said


def _type_of(config: Mapping[str, Any], kind: str, layer: int) -> str:
    """Whether a layer slides; older files say it for all layers together."""
    types = config.get("layer_types")
    if types is not None:
        if not isinstance(types, (list, tuple)) or layer >= len(types):
            raise ValueError(f"config has no layer_types[{layer}]")
        if types[layer] not in (_SLIDES, _FULL):
            raise ValueError(f"config has {types[layer]!r} as layer_types[{layer}]; known are {_SLIDES} and {_FULL}")
        return str(types[layer])
    window = config.get("sliding_window")
    if kind in ("mistral", "mixtral"):
        slides = window is not None
    elif kind.startswith("qwen"):
        slides = bool(config.get("use_sliding_window")) and window is not None
        slides = slides and layer >= config.get("max_window_layers", 28)
    elif kind in ("gemma2", "gpt_oss"):
        slides = layer % 2 == 0
    elif kind == "gemma3_text":
        pattern = config.get("sliding_window_pattern", 6)
        slides = (layer + 1) % integer(pattern, "config['sliding_window_pattern']", "an integer of at least 1", 1) != 0
    else:
        slides = False
    return _SLIDES if slides else _FULL


def _rope(config: Mapping[str, Any], kind: str, type_of_layer: str) -> Any:
    """The dict for rotary encoding of this layer."""
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and any(isinstance(x, Mapping) for x in rope.values()):
        if not isinstance(rope.get(type_of_layer), Mapping):
            raise ValueError(f"config has no rope_parameters[{type_of_layer!r}]")
        rope = rope[type_of_layer]
    if rope is None:
        # Older files: beside each other, and for layers of Gemma 3 with a window a base alone.
        local = kind == "gemma3_text" and type_of_layer == _SLIDES
        rope = None if local else config.get("rope_scaling")
    else:
        local = False
    if rope is not None and not isinstance(rope, Mapping):
        return rope  # which is refused where it is read
    rope = dict(rope or {})
    theta = config.get("rope_local_base_freq" if local else "rope_theta", 10000.0)
    rope.setdefault("rope_theta", theta)
    if config.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    original = "original_max_position_embeddings"
    if config.get(original) is not None and ("rope_type" in rope or "type" in rope):
        rope.setdefault(original, config[original])
    return rope
