"""The weights of attention as PyTorch, Hugging Face's models and Keras store them, for MultiHeadAttention.

Each function returns keyword arguments of MultiHeadAttention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn._checks import floating, integer, real
from fastattn._frequencies import kind_of, scaled_frequencies
from fastattn._state import Tensors, array_of, check_text, listed, opened
from fastattn.positions import relative_position_buckets

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

KINDS = "weight", "bias"


def _layer_number(layer: Any) -> int:
    return integer(layer, "layer", "an integer of at least 0", 0)


def from_torch(state: Any, prefix: str) -> dict[str, Any]:
    check_text(prefix=prefix)
    with opened(state) as tensors:
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
                where = f". The first one is there with prefix= {listed(others)}" if others else ""
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
    check_text(query=query, key=key, value=value, prefix=prefix)
    names = {which: prefix + name for which, name in (("query", query), ("key", key), ("value", value))}
    if out is not None:
        check_text(out=out)
        names["out"] = prefix + out
    with opened(state) as tensors:
        tensors.need([f"{name}.weight" for name in names.values()])
        return tensors.linears(**names)


def _named(tensors: Tensors, at: str, names: Mapping[str, str], also: Iterable[str] = ()) -> dict[str, Any]:
    """The linear layers of these names, behind `at`, where there must be no other weights than `also`."""
    tensors.refuse_others(at, [*(f"{name}.{kind}" for name in names.values() for kind in KINDS), *also])
    return tensors.linears(**{which: at + name for which, name in names.items()})


def _weights_of(at: str, names: Mapping[str, str]) -> list[str]:
    return [f"{at}{name}.weight" for name in names.values()]


def from_bert(state: Any, layer: int, prefix: str) -> dict[str, Any]:
    check_text(prefix=prefix)
    at = f"encoder.layer.{_layer_number(layer)}.attention."
    names = {"query": "self.query", "key": "self.key", "value": "self.value", "out": "output.dense"}
    # The norm after it is another layer; old files call its arrays gamma and beta.
    norm = [f"output.LayerNorm.{name}" for name in ("weight", "bias", "gamma", "beta")]
    with opened(state) as tensors:
        return _named(tensors, tensors.resolve(prefix, "", _weights_of(at, names)) + at, names, norm)


def from_distilbert(state: Any, layer: int, prefix: str) -> dict[str, Any]:
    check_text(prefix=prefix)
    at = f"transformer.layer.{_layer_number(layer)}.attention."
    names = {"query": "q_lin", "key": "k_lin", "value": "v_lin", "out": "out_lin"}
    with opened(state) as tensors:
        return _named(tensors, tensors.resolve(prefix, "", _weights_of(at, names)) + at, names)


def from_vit(state: Any, layer: int, prefix: str) -> dict[str, Any]:
    check_text(prefix=prefix)
    number = _layer_number(layer)
    of_files = {
        "query": "attention.query",
        "key": "attention.key",
        "value": "attention.value",
        "out": "output.dense",
    }
    of_modules = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    ways = [
        (f"encoder.layer.{number}.attention.", of_files),
        (f"layers.{number}.attention.", of_modules),
        (f"encoder.layer.{number}.attention.", of_modules),
    ]
    with opened(state) as tensors:
        there = [way for way in ways if tensors.prefixes(_weights_of(*way)[0])]
        at, names = (there or ways)[0]
        return _named(tensors, tensors.resolve(prefix, "", _weights_of(at, names)) + at, names)


def from_packed(
    w_qkv: Any,
    b_qkv: Any,
    num_heads: Any,
    num_kv_heads: Any,
    layout: Any,
    transposed: Any,
    names: tuple[str, str] = ("w_qkv", "b_qkv"),
) -> dict[str, Any]:
    heads = integer(num_heads, "num_heads", "an integer of at least 1", 1)
    shared = heads if num_kv_heads is None else integer(num_kv_heads, "num_kv_heads", "an integer of at least 1", 1)
    if not isinstance(layout, str) or layout not in ("qkv", "interleaved"):
        error = ValueError if isinstance(layout, str) else TypeError
        raise error(f"layout must be 'qkv' or 'interleaved', not {layout!r}")
    if not isinstance(transposed, (bool, np.bool_)):
        raise TypeError(f"transposed must be True or False, not {transposed!r}")
    if heads % shared:
        raise ValueError(f"num_heads={heads} is not a whole multiple of num_kv_heads={shared}")
    w = array_of(w_qkv, names[0])
    if w.ndim != 2:
        raise ValueError(
            f"{names[0]} has shape {w.shape}; it must be {'(columns, d_model)' if transposed else '(d_model, columns)'}"
        )
    w = w.T if transposed else w
    rows, columns = w.shape
    parts = heads + 2 * shared
    if columns % parts:
        text = (
            f"{names[0]} has {columns} {'rows' if transposed else 'columns'}, which {parts} heads, {heads} of query "
            f"and {shared} each of key and value, do not divide"
        )
        if rows % parts == 0:
            text += f". Its other axis fits: transposed={not transposed}?"
        raise ValueError(text)
    arguments = dict(zip(("w_query", "w_key", "w_value"), _unpacked(w, heads, shared, layout), strict=True))
    if b_qkv is not None:
        b = array_of(b_qkv, names[1])
        if b.shape != (columns,):
            raise ValueError(f"{names[1]} has shape {b.shape}; it must be ({columns},), as {names[0]} has {columns}")
        arguments |= zip(("b_query", "b_key", "b_value"), _unpacked(b, heads, shared, layout), strict=True)
    return arguments | {"num_heads": heads, "num_kv_heads": shared}


def _unpacked(a: NDArray[Any], heads: int, shared: int, layout: str) -> list[NDArray[Any]]:
    """The columns of query, key and value."""
    channels = a.shape[-1] // (heads + 2 * shared)
    if layout == "qkv":
        return np.split(a, [heads * channels, (heads + shared) * channels], axis=-1)
    group = heads // shared
    by_head = a.reshape(*a.shape[:-1], shared, group + 2, channels)
    parts = by_head[..., :group, :], by_head[..., group : group + 1, :], by_head[..., group + 1 :, :]
    return [part.reshape(*a.shape[:-1], shared * part.shape[-2] * channels) for part in parts]


def from_gpt2(state: Any, layer: int, num_heads: Any, prefix: str) -> dict[str, Any]:
    check_text(prefix=prefix)
    at = f"h.{_layer_number(layer)}.attn."
    names = {"qkv": "c_attn", "out": "c_proj"}
    with opened(state) as tensors:
        at = tensors.resolve(prefix, "", _weights_of(at, names)) + at
        # Old files have the causal mask and what hidden scores became.
        known = [f"{name}.{kind}" for name in names.values() for kind in KINDS]
        tensors.refuse_others(at, [*known, "bias", "masked_bias"])
        arrays = [
            tensors.array(f"{at}{name}.{kind}") if f"{at}{name}.{kind}" in tensors else None
            for name in names.values()
            for kind in KINDS
        ]
    both = f"{at}c_attn.weight", f"{at}c_attn.bias"
    arguments = from_packed(arrays[0], arrays[1], num_heads, None, "qkv", False, both)
    return arguments | {"w_out": arrays[2], "b_out": arrays[3], "is_causal": True}


def _part(part: Any, parts: Mapping[str, str]) -> str:
    """What the argument `part` stands for."""
    if not isinstance(part, str) or part not in parts:
        error = ValueError if isinstance(part, str) else TypeError
        raise error(f"part must be {', '.join(map(repr, parts))}, not {part!r}")
    return parts[part]


def from_whisper(state: Any, layer: int, part: str, prefix: str) -> dict[str, Any]:
    check_text(prefix=prefix)
    number = _layer_number(layer)
    at = _part(
        part,
        {
            "encoder": f"encoder.layers.{number}.self_attn.",
            "decoder": f"decoder.layers.{number}.self_attn.",
            "cross": f"decoder.layers.{number}.encoder_attn.",
        },
    )
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    with opened(state) as tensors:
        arguments = _named(tensors, tensors.resolve(prefix, "model.", _weights_of(at, names)) + at, names)
    return arguments | {"is_causal": part == "decoder"}


def from_t5(
    state: Any, layer: int, num_heads: Any, max_length: Any, max_distance: Any, part: str, prefix: str
) -> dict[str, Any]:
    check_text(prefix=prefix)
    number = _layer_number(layer)
    at = _part(
        part,
        {
            "encoder": f"encoder.block.{number}.layer.0.SelfAttention.",
            "decoder": f"decoder.block.{number}.layer.0.SelfAttention.",
            "cross": f"decoder.block.{number}.layer.1.EncDecAttention.",
        },
    )
    heads = integer(num_heads, "num_heads", "an integer of at least 1", 1)
    if part != "cross":
        if max_length is None:
            raise ValueError(
                "max_length is needed, the most tokens of a sequence: the layer holds a bias for each distance between "
                "them"
            )
        max_length = integer(max_length, "max_length", "an integer of at least 1, below 2**40", 1, (1 << 40) - 1)
    names, table = {"query": "q", "key": "k", "value": "v", "out": "o"}, "relative_attention_bias.weight"
    with opened(state) as tensors:
        prefix = tensors.resolve(prefix, "", _weights_of(at, names))
        # Old files have a table for cross-attention too, which nothing uses.
        arguments = _named(tensors, prefix + at, names, [table]) | {"scale": 1.0}
        if part == "cross":
            return arguments
        # All blocks share the table of the first; in UMT5 each has its own.
        own = prefix + at + table
        name = own if own in tensors else f"{prefix}{part}.block.0.layer.0.SelfAttention.{table}"
        tensors.need([name])
        biases = tensors.array(name)
    least = 4 if part == "encoder" else 2
    if biases.ndim != 2 or biases.shape[1] != heads or len(biases) < least:
        raise ValueError(
            f"{name} has shape {biases.shape}; it must be (buckets, {heads}), as num_heads={heads}, with at least "
            f"{least} buckets"
        )
    sides = max_length - 1, max_length - 1 if part == "encoder" else 0
    buckets = relative_position_buckets(
        1,
        sum(sides) + 1,
        num_buckets=len(biases),
        max_distance=max_distance,
        bidirectional=part == "encoder",
        query_offset=sides[0],
    )
    arguments |= {"relative_bias": biases.T[:, buckets], "window_size": sides}
    return arguments | {"is_causal": part == "decoder"}


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


def _decoder(
    state: Any,
    layer: int,
    num_heads: int,
    num_kv_heads: Any,
    prefix: str,
    rotary_base: Any,
    rope_parameters: Any,
    max_positions: Any,
    sliding_window: Any,
    norms: bool,
) -> dict[str, Any]:
    """A layer with LLaMA's names; norms: it may have q_norm and k_norm, which are returned as they are."""
    check_text(prefix=prefix)
    block = f"layers.{_layer_number(layer)}."
    at = f"{block}self_attn."
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    of_norms = ("q_norm", "k_norm") if norms else ()
    # The table rotary_emb.inv_freq follows from the base.
    also = ["rotary_emb.inv_freq", "sinks", *(f"{name}.weight" for name in of_norms)]
    with opened(state) as tensors:
        prefix = tensors.resolve(prefix, "model.", _weights_of(at, names))
        at = prefix + at
        for name in ("layer_scalar", "per_layer_input_gate.weight"):
            if f"{prefix}{block}{name}" in tensors:
                raise ValueError(
                    f"there is {prefix + block + name!r}: in such a model (Gemma 3n, Gemma 4) values are normed too, "
                    f"and some layers use the keys and values of others. MultiHeadAttention has no place for that"
                )
        if not norms and f"{at}q_norm.weight" in tensors:
            raise ValueError(
                f"there is {f'{at}q_norm.weight'!r}, a norm of heads: from_qwen and from_gemma read it, and differ in "
                f"what its numbers mean"
            )
        arguments = _named(tensors, at, names, also)
        if f"{at}sinks" in tensors:
            arguments["sinks"] = tensors.array(f"{at}sinks")
        for name in of_norms:
            if f"{at}{name}.weight" in tensors:
                arguments[name] = tensors.array(f"{at}{name}.weight")
    columns, kv_columns = arguments["w_query"].shape[1], arguments["w_key"].shape[1]
    arguments |= {"num_kv_heads": num_kv_heads, "rotary_base": rotary_base, "is_causal": True}
    if sliding_window is not None:
        width = integer(sliding_window, "sliding_window", "an integer of at least 1, or None", 1)
        arguments["window_size"] = width - 1, None
    heads = integer(num_heads, "num_heads", "an integer of at least 1", 1)
    if columns % heads:
        return arguments  # the layer refuses these
    head_dim = columns // heads
    if "q_norm" in arguments and arguments["q_norm"].shape == (head_dim // 2,):
        raise ValueError(
            f"{at}q_proj.weight has {columns} rows, twice num_heads={heads} times the {head_dim // 2} channels of "
            f"q_norm: half of them are gates (as in Qwen3-Next), for which MultiHeadAttention has no place"
        )
    if num_kv_heads is None:
        # As many heads as the columns make.
        num_kv_heads = kv_columns // head_dim if head_dim and kv_columns % head_dim == 0 else None
        arguments["num_kv_heads"] = num_kv_heads or None
    if rope_parameters is not None:
        del arguments["rotary_base"]
        arguments |= _rotary(head_dim, rotary_base, rope_parameters, max_positions)
    return arguments


def from_llama(
    state: Any,
    layer: int,
    num_heads: int,
    num_kv_heads: Any,
    prefix: str,
    rotary_base: Any,
    rope_parameters: Any,
    max_positions: Any,
    sliding_window: Any,
) -> dict[str, Any]:
    rotary = rotary_base, rope_parameters, max_positions
    return _decoder(state, layer, num_heads, num_kv_heads, prefix, *rotary, sliding_window, norms=False)


def _with_base(rotary_base: Any, rope_parameters: Any) -> Any:
    """The base, which may be in the dict alone."""
    kind_of(rope_parameters, "rope_parameters")  # an error where it is no such dict
    if rotary_base is None and rope_parameters is not None:
        rotary_base = rope_parameters.get("rope_theta")
    if rotary_base is None:
        raise ValueError(
            "rotary_base is needed, the rope_theta of the model's config.json, or rope_parameters that have it: models "
            "of one family differ in it"
        )
    return rotary_base


def from_qwen(
    state: Any,
    layer: int,
    num_heads: int,
    num_kv_heads: Any,
    prefix: str,
    rotary_base: Any,
    rope_parameters: Any,
    max_positions: Any,
    sliding_window: Any,
) -> dict[str, Any]:
    base = _with_base(rotary_base, rope_parameters)
    rotary = base, rope_parameters, max_positions
    return _decoder(state, layer, num_heads, num_kv_heads, prefix, *rotary, sliding_window, norms=True)


def from_gemma(
    state: Any,
    layer: int,
    num_heads: int,
    num_kv_heads: Any,
    prefix: str,
    rotary_base: Any,
    rope_parameters: Any,
    max_positions: Any,
    sliding_window: Any,
    query_pre_attn_scalar: Any,
    attn_logit_softcapping: Any,
) -> dict[str, Any]:
    base = _with_base(rotary_base, rope_parameters)
    rotary = base, rope_parameters, max_positions
    arguments = _decoder(state, layer, num_heads, num_kv_heads, prefix, *rotary, sliding_window, norms=True)
    for name in ("q_norm", "k_norm"):
        if name in arguments:
            # In files 1 is missing; in 16 bits the sum would be rounded.
            arguments[name] = 1 + floating(arguments[name], name).astype(np.float64)
    if query_pre_attn_scalar is not None:
        scalar = real(query_pre_attn_scalar, "query_pre_attn_scalar", "a positive finite number or None", True)
        arguments["scale"] = scalar**-0.5
    if attn_logit_softcapping is not None:
        allowed = "a positive finite number or None"
        arguments["softcap"] = real(attn_logit_softcapping, "attn_logit_softcapping", allowed, True)
    return arguments


def from_keras(weights: Any, prefix: str) -> dict[str, Any]:
    check_text(prefix=prefix)
    parts = {"query": "query", "key": "key", "value": "value", "out": "attention_output"}
    kernels: dict[str, NDArray[Any]] = {}
    biases: dict[str, NDArray[Any]] = {}
    if isinstance(weights, Mapping):
        # Keras 2 appends ":0" to every name.
        names = {name.removesuffix(":0"): name for name in weights if isinstance(name, str)}
        tensors = Tensors(names, lambda name: weights[names[name]])
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
        arrays = [array_of(x, f"weights[{i}]") for i, x in enumerate(several)]
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
