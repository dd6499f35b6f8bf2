"""Constructors from the weights of PyTorch, Hugging Face's models and Keras; dicts and files. test_transformers.py has
the models themselves."""

import json
import subprocess
import sys

import numpy as np
import pytest
from problems import bits, sixteen_bits

import fastattn
from fastattn import reference

# The error of a fresh interpreter without a package.
WITHOUT = """
import sys
sys.modules[{package!r}] = None
import fastattn
try:
    fastattn.MultiHeadAttention.from_linear({path!r}, "q", "k", "v", num_heads=2)
except ImportError as error:
    print(error)
"""


def normal(rng, *shape, dtype=np.float32):
    return (rng.standard_normal(shape) / 4).astype(dtype)


def linear_layers(rng, names, d_model=12, biases=True, dtype=np.float32):
    """The state dict of nn.Linear layers: {name: (out, in)}."""
    state = {}
    for name, out in names.items():
        state[f"{name}.weight"] = normal(rng, out, d_model, dtype=dtype)
        if biases:
            state[f"{name}.bias"] = normal(rng, out, dtype=dtype)
    return state


def expected(x, layers, num_heads, num_kv_heads=None, context=None, **arguments):
    """The reference with linear layers (weight, bias) as PyTorch applies them, x @ weight.T + bias."""
    names = ("query", "key", "value", "out")
    given = {f"w_{name}": np.asarray(w, np.float64).T for name, (w, _) in zip(names, layers, strict=False)}
    given |= {f"b_{name}": b for name, (_, b) in zip(names, layers, strict=False)}
    own = {name: arguments.pop(name) for name in list(arguments) if name.startswith("rotary") or "norm" in name}
    layer = reference.MultiHeadAttention(**given, num_heads=num_heads, num_kv_heads=num_kv_heads, **own)
    return layer(x, context, **arguments)


def agree(got, want):
    """Layers are tested elsewhere: here a weight in the wrong place would change everything."""
    np.testing.assert_allclose(got.astype(float), want, rtol=0, atol=1e-5 * np.abs(want).max())


def pairs(state, *names):
    return [(state[f"{name}.weight"], state.get(f"{name}.bias")) for name in names]


@pytest.fixture
def x(rng):
    return normal(rng, 2, 7, 12) * 4


@pytest.fixture
def saved(tmp_path):
    """A function that writes arrays to a safetensors file, and returns its path."""
    save_file = pytest.importorskip("safetensors.numpy").save_file

    def save(state):
        save_file({name: np.ascontiguousarray(w) for name, w in state.items()}, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return save


# ------------------------------------------------------------------------------------------------ PyTorch


def torch_state(rng, biases=True, prefix="", kdim=None):
    state = linear_layers(rng, {"out_proj": 12}, biases=biases)
    if kdim is None:
        state["in_proj_weight"] = normal(rng, 36, 12)
    else:
        state |= {f"{name}_proj_weight": normal(rng, 12, dim) for name, dim in (("q", 12), ("k", kdim), ("v", kdim))}
    if biases:
        state["in_proj_bias"] = normal(rng, 36)
    return {prefix + name: w for name, w in state.items()}


@pytest.mark.parametrize("prefix", ["", "layers.3.self_attn."])
@pytest.mark.parametrize("biases", [True, False])
def test_torch_names(rng, x, biases, prefix):
    state = torch_state(rng, biases, prefix)
    matrices = np.split(state[f"{prefix}in_proj_weight"], 3)
    vectors = np.split(state[f"{prefix}in_proj_bias"], 3) if biases else 3 * [None]
    layers = [*zip(matrices, vectors, strict=True), *pairs(state, f"{prefix}out_proj")]
    layer = fastattn.MultiHeadAttention.from_torch(state, num_heads=3, prefix=prefix)
    agree(layer(x), expected(x, layers, 3))
    assert layer.dtype == np.float32


def test_torch_context(rng, x):
    """With kdim and vdim the three weights are separate."""
    state, context = torch_state(rng, kdim=5), normal(rng, 2, 9, 5)
    vectors = np.split(state["in_proj_bias"], 3)
    layers = [(state[f"{c}_proj_weight"], b) for c, b in zip("qkv", vectors, strict=True)]
    layer = fastattn.MultiHeadAttention.from_torch(state, num_heads=3)
    agree(layer(x, context), expected(x, [*layers, *pairs(state, "out_proj")], 3, context=context))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kdim", [None, 5])
def test_torch_modules(rng, x, kdim, bias):
    torch = pytest.importorskip("torch")
    module = torch.nn.MultiheadAttention(12, 3, bias=bias, kdim=kdim, vdim=kdim, batch_first=True).eval()
    context = normal(rng, 2, 9, kdim or 12)
    query, key = torch.from_numpy(x), torch.from_numpy(context)
    with torch.inference_mode():
        theirs = module(query, key, key)[0].numpy()
    layer = fastattn.MultiHeadAttention.from_torch(module.state_dict(), num_heads=3)
    agree(layer(x, context), theirs)
    # Parameters, which require gradients, work as well as what state_dict() returns.
    same = fastattn.MultiHeadAttention.from_torch(dict(module.named_parameters()), num_heads=3)
    assert bits(same(x, context)) == bits(layer(x, context))


def test_torch_bfloat16():
    torch = pytest.importorskip("torch")
    module = torch.nn.MultiheadAttention(12, 3).bfloat16()
    with pytest.raises(TypeError, match=r"out_proj.weight|in_proj_weight.* torch.bfloat16.*\.float\(\)"):
        fastattn.MultiHeadAttention.from_torch(module.state_dict(), num_heads=3)
    fastattn.MultiHeadAttention.from_torch(module.half().state_dict(), num_heads=3)


def test_torch_errors(rng):
    def refuse(message, state, **arguments):
        with pytest.raises(ValueError, match=message):
            fastattn.MultiHeadAttention.from_torch(state, num_heads=3, **arguments)

    refuse("bias_k.*add_bias_kv", torch_state(rng) | {"bias_k": normal(rng, 1, 1, 12)})
    refuse("kdim=5 and vdim=4 differ", torch_state(rng, kdim=5) | {"v_proj_weight": normal(rng, 12, 4)})
    refuse(
        "looked for 'in_proj_weight', 'out_proj.weight' and found none of them among 4 names.*prefix= 'encoder.0.'",
        torch_state(rng, prefix="encoder.0."),
    )
    refuse("looked for 'a.in_proj_weight'", torch_state(rng), prefix="a.")
    refuse("did not find 'v_proj_weight'", {n: w for n, w in torch_state(rng, kdim=5).items() if n[0] != "v"})
    refuse(r"in_proj_weight has shape \(30, 12\)", torch_state(rng) | {"in_proj_weight": normal(rng, 30, 12)})
    refuse(r"in_proj_bias has shape \(30,\)", torch_state(rng) | {"in_proj_bias": normal(rng, 30)})
    refuse(r"out_proj.weight has shape \(12,\)", torch_state(rng) | {"out_proj.weight": normal(rng, 12)})
    refuse("found none of them since there is no name", {})


# ----------------------------------------------------------------------------------------- linear layers


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("out", [None, "o"])
@pytest.mark.parametrize("rotary", [{"rotary_base": 100.0}, {"rotary_frequencies": ([1.0, 0.3], 1.2)}], ids=str)
def test_linear(rng, x, rotary, out, biases):
    """4 query heads of 6, 2 heads of keys and of values of 5; with or without a last layer."""
    state = linear_layers(rng, {"a.q": 24, "a.k": 12, "a.v": 10}, 12, biases)
    state |= linear_layers(rng, {"a.o": 7}, 20, biases)
    rotary = rotary | {"rotary_interleaved": True, "rotary_dim": 4}
    layer = fastattn.MultiHeadAttention.from_linear(
        state, "q", "k", "v", out, num_heads=4, num_kv_heads=2, prefix="a.", **rotary
    )
    layers = pairs(state, "a.q", "a.k", "a.v", *([] if out is None else ["a.o"]))
    agree(layer(x), expected(x, layers, 4, 2, **rotary))


def test_linear_errors(rng):
    state = linear_layers(rng, {"q_lin": 12, "k_lin": 12, "v_lin": 12})
    with pytest.raises(
        ValueError,
        match=r"looked for 'q_lin.weight', 'k_lin.weight', 'value.weight' and did not find 'value.weight' among 6",
    ):
        fastattn.MultiHeadAttention.from_linear(state, "q_lin", "k_lin", "value", num_heads=3)


# -------------------------------------------------------------------------------------------------- BERT

BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")


def bert_state(rng, prefix="", layers=3, dtype=np.float32):
    state = {f"{prefix}embeddings.word_embeddings.weight": normal(rng, 5, 12)}
    for i in range(layers):
        at = f"{prefix}encoder.layer.{i}."
        state |= linear_layers(rng, {at + name: 12 for name in BERT}, dtype=dtype)
        state |= linear_layers(rng, {f"{at}intermediate.dense": 48}, dtype=dtype)
        state |= {f"{at}attention.output.LayerNorm.{name}": normal(rng, 12) for name in ("weight", "bias")}
    return state


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(("prefix", "given"), [("", {}), ("bert.", {}), ("bert.", {"prefix": "bert."})])
def test_bert(rng, x, prefix, given, layer):
    state = bert_state(rng, prefix)
    ours = fastattn.MultiHeadAttention.from_bert(state, layer, num_heads=4, **given)
    agree(ours(x), expected(x, pairs(state, *(f"{prefix}encoder.layer.{layer}.{name}" for name in BERT)), 4))


def test_bert_errors(rng):
    def refuse(message, state, layer=0, error=ValueError, **arguments):
        with pytest.raises(error, match=message):
            fastattn.MultiHeadAttention.from_bert(state, layer, num_heads=4, **arguments)

    state = bert_state(rng)
    refuse(
        r"looked for 'encoder.layer.7.attention.self.query.weight', .* found none of them among 37 names, the closest "
        r"being 'encoder.layer.\d.attention.self.query.weight'",
        state,
        7,
    )
    refuse("looked for 'bert.encoder", state, prefix="bert.")
    two = bert_state(rng, "text.") | bert_state(rng, "image.")
    refuse("prefix= 'text.', 'image.'", two)
    refuse("'encoder.layer.0.attention.self.distance_embedding.weight'", state | {
        "encoder.layer.0.attention.self.distance_embedding.weight": normal(rng, 5, 3)
    })  # fmt: skip
    del state["encoder.layer.0.attention.output.dense.weight"]
    refuse("did not find 'encoder.layer.0.attention.output.dense.weight'", state)
    refuse("layer must be an integer", state, "0", TypeError)
    refuse("layer must be an integer of at least 0, not -1", state, -1)
    refuse("state must be a mapping .* not a list", [], error=TypeError)


# ------------------------------------------------------------------------------------- packed, and GPT-2


def packed(rng, layout, kv_heads=2, d_model=12):
    """4 heads of 6 channels: one matrix (in, out) and one bias, and the pairs (weight, bias) of its parts."""
    sizes = {"q": 24, "k": 6 * kv_heads, "v": 6 * kv_heads}
    w, b = (
        {n: normal(rng, d_model, size) for n, size in sizes.items()},
        {n: normal(rng, size) for n, size in sizes.items()},
    )
    if layout == "qkv":
        both = [np.concatenate([a[n] for n in sizes], axis=-1) for a in (w, b)]
    else:
        group = 24 // kv_heads
        both = [
            np.concatenate(
                [part for g in range(kv_heads) for part in (
                    a["q"][..., g * group : (g + 1) * group], *(a[n][..., 6 * g : 6 * g + 6] for n in "kv")
                )], axis=-1)
            for a in (w, b)
        ]  # fmt: skip
    return *both, [(w[n].T, b[n]) for n in sizes]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("layout", ["qkv", "interleaved"])
def test_packed(rng, x, layout, kv_heads, transposed):
    w, b, layers = packed(rng, layout, kv_heads)
    w_out, b_out = normal(rng, 24, 7), normal(rng, 7)
    turned = (lambda a: a.T) if transposed else lambda a: a
    given = {"num_heads": 4, "num_kv_heads": kv_heads, "layout": layout, "transposed": transposed}
    make = fastattn.MultiHeadAttention.from_packed
    agree(make(turned(w), b, turned(w_out), b_out, **given)(x), expected(x, [*layers, (w_out.T, b_out)], 4, kv_heads))
    bare = make(turned(w), **given, rotary_base=50.0, is_causal=True)
    assert bare.b_query is bare.w_out is None
    layers = [(a, None) for a, _ in layers]
    agree(bare(x), expected(x, layers, 4, kv_heads, rotary_base=50.0, is_causal=True))


def test_packed_errors(rng):
    def refuse(message, w=None, *others, error=ValueError, **arguments):
        with pytest.raises(error, match=message):
            fastattn.MultiHeadAttention.from_packed(
                normal(rng, 12, 36) if w is None else w, *others, **{"num_heads": 4} | arguments
            )

    refuse("layout must be 'qkv' or 'interleaved', not 'kqv'", layout="kqv")
    refuse("layout must be 'qkv'", layout=3, error=TypeError)
    refuse("transposed must be True or False, not 1", transposed=1, error=TypeError)
    refuse(r"w_qkv has shape \(3, 12, 12\); it must be \(d_model, columns\)", normal(rng, 3, 12, 12))
    refuse("w_qkv has 37 columns, which 12 heads, 4 of query and 4 each", normal(rng, 12, 37))
    refuse("w_qkv has 7 columns.*Its other axis fits: transposed=True", normal(rng, 36, 7))
    refuse("w_qkv has 7 rows.*Its other axis fits: transposed=False", normal(rng, 7, 36), transposed=True)
    refuse(r"b_qkv has shape \(12,\); it must be \(36,\)", None, np.ones(12))
    refuse("num_heads=4 is not a whole multiple of num_kv_heads=3", num_kv_heads=3)
    refuse(r"w_out has shape \(7, 12\)", None, None, np.ones((7, 12)))
    refuse("unexpected keyword argument 'window'", window=3, error=TypeError)
    refuse("num_heads must be an integer", num_heads="4", error=TypeError)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_gpt2(rng, x, prefix, scale):
    w, b, layers = packed(rng, "qkv", 4)
    at = f"{prefix}h.1.attn."
    state = {f"{at}c_attn.weight": w, f"{at}c_attn.bias": b, f"{at}c_proj.weight": normal(rng, 24, 12)}
    # What old files have beside the weights.
    state |= {f"{at}bias": np.ones((1, 1, 9, 9), bool), f"{at}masked_bias": np.float32(-1e4)}
    layer = fastattn.MultiHeadAttention.from_gpt2(state, 1, num_heads=4, scale=scale)
    want = expected(x, [*layers, (state[f"{at}c_proj.weight"].T, None)], 4, is_causal=True, scale=scale)
    agree(layer(x), want)
    with pytest.raises(ValueError, match=f"there is '{at}q_attn.weight' beside"):
        fastattn.MultiHeadAttention.from_gpt2(state | {f"{at}q_attn.weight": w}, 1, num_heads=4)
    with pytest.raises(ValueError, match=f"{at}c_attn.weight has 72 columns, which 15 heads"):
        fastattn.MultiHeadAttention.from_gpt2(state, 1, num_heads=5)
    with pytest.raises(ValueError, match=r"looked for 'h.0.attn.c_attn.weight'"):
        fastattn.MultiHeadAttention.from_gpt2(state, 0, num_heads=4)


# -------------------------------------------------------------------------- DistilBERT, ViT, Whisper, T5


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    ("name", "at", "parts"),
    [
        ("distilbert", "transformer.layer.1.attention", ("q_lin", "k_lin", "v_lin", "out_lin")),
        (
            "vit",
            "encoder.layer.1.attention",
            ("attention.query", "attention.key", "attention.value", "output.dense"),
        ),
        ("vit", "encoder.layer.1.attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("vit", "layers.1.attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ],
)
def test_encoders(rng, x, name, at, parts, prefix):
    names = [f"{prefix}{at}.{part}" for part in parts]
    state = linear_layers(rng, dict.fromkeys(names, 12))
    load = getattr(fastattn.MultiHeadAttention, f"from_{name}")
    agree(load(state, 1, num_heads=4)(x), expected(x, pairs(state, *names), 4))
    agree(load(state, 1, num_heads=4, prefix=prefix)(x), expected(x, pairs(state, *names), 4))
    with pytest.raises(ValueError, match=r"looked for .*found none of them among 8 names"):
        load(state, 0, num_heads=4)
    with pytest.raises(ValueError, match="relative_position_bias_table' beside the weights of plain attention"):
        load(state | {f"{prefix}{at}.relative_position_bias_table": x}, 1, num_heads=4)
    with pytest.raises(TypeError, match="prefix must be a string"):
        load(state, 1, num_heads=4, prefix=3)


WHISPER = {"encoder": "encoder.layers.0.self_attn.", "decoder": "decoder.layers.0.self_attn.",
           "cross": "decoder.layers.0.encoder_attn."}  # fmt: skip


@pytest.mark.parametrize("prefix", ["model.", "", "speech.model."])
@pytest.mark.parametrize("part", WHISPER)
def test_whisper(rng, x, part, prefix):
    names = [f"{name}_proj" for name in ("q", "k", "v", "out")]
    state = linear_layers(rng, {prefix + at + name: 12 for at in WHISPER.values() for name in names})
    for at in WHISPER.values():
        del state[f"{prefix}{at}k_proj.bias"]
    layer = fastattn.MultiHeadAttention.from_whisper(state, 0, num_heads=4, part=part)
    layers = pairs(state, *(prefix + WHISPER[part] + name for name in names))
    context = normal(rng, 2, 9, 12) if part == "cross" else None
    agree(layer(x, context), expected(x, layers, 4, context=context, is_causal=part == "decoder"))
    for wrong, error in (("both", ValueError), (None, TypeError)):
        with pytest.raises(error, match="part must be 'encoder', 'decoder', 'cross', not"):
            fastattn.MultiHeadAttention.from_whisper(state, 0, num_heads=4, part=wrong)


T5 = {"encoder": "encoder.block.{}.layer.0.SelfAttention.", "decoder": "decoder.block.{}.layer.0.SelfAttention.",
      "cross": "decoder.block.{}.layer.1.EncDecAttention."}  # fmt: skip
TABLE = "relative_attention_bias.weight"


def t5_state(rng, prefix="", own=False):
    """Tables in block 0, or in every block; an old file has one for cross-attention too."""
    state = linear_layers(
        rng, {prefix + at.format(i) + name: 12 for at in T5.values() for i in range(2) for name in "qkvo"}, biases=False
    )
    for i in range(2 if own else 1):
        state |= {prefix + T5[part].format(i) + TABLE: normal(rng, 8, 4) * 8 for part in T5}
    return state


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("part", T5)
def test_t5(rng, x, part, prefix, number, own):
    """Unscaled, and with a bias for each distance."""
    state, at = t5_state(rng, prefix, own), prefix + T5[part].format(number)
    load = fastattn.MultiHeadAttention.from_t5
    layers = pairs(state, *(at + name for name in "qkvo"))
    if part == "cross":
        context = normal(rng, 2, 9, 12)
        layer = load(state, number, num_heads=4, part=part)
        agree(layer(x, context), expected(x, layers, 4, context=context, scale=1.0))
        assert layer.relative_bias is None
        return
    table = state[(at if own else prefix + T5[part].format(0)) + TABLE]
    buckets = reference.relative_position_buckets(7, 7, num_buckets=8, max_distance=6, bidirectional=part == "encoder")
    want = expected(x, layers, 4, scale=1.0, bias=np.moveaxis(table[buckets], -1, 0), is_causal=part == "decoder")
    for length in (7, 30):
        layer = load(state, number, num_heads=4, max_length=length, max_distance=6, part=part)
        agree(layer(x), want)
        assert layer.relative_bias.shape == (4, 1, 2 * length - 1 if part == "encoder" else length)
        assert layer.scale == 1.0
    if part == "decoder":
        layer, cache = (
            load(state, number, num_heads=4, max_length=7, max_distance=6, part=part),
            fastattn.KVCache(2, 4, 9, 3),
        )
        steps = [layer(x[:, i:j], cache=cache) for i, j in ((0, 4), (4, 5), (5, 7))]
        agree(np.concatenate(steps, axis=1), want)
        with pytest.raises(ValueError, match=r"there are 8 keys.*max_length=7"):
            layer(x[:, :1], cache=cache)
        assert cache.lengths.max() == 7


def test_t5_knows_its_length(rng, x):
    """Keys further away than the biases reach would be hidden."""
    layer = fastattn.MultiHeadAttention.from_t5(t5_state(rng), 0, num_heads=4, max_length=6)
    with pytest.raises(ValueError, match=r"there are 7 keys; this layer holds the relative biases of .* max_length=6"):
        layer(x)
    with pytest.raises(ValueError, match="max_length=6"):
        layer.vjp(x)
    layer(x[:, :6])
    layer(x, relative_bias=None, window_size=2)


def test_t5_errors(rng):
    def refuse(message, state=None, error=ValueError, **arguments):
        with pytest.raises(error, match=message):
            fastattn.MultiHeadAttention.from_t5(
                t5_state(rng) if state is None else state, 1, **{"num_heads": 4, "max_length": 9} | arguments
            )

    refuse("max_length is needed", max_length=None)
    for length in (0, 1 << 50):
        refuse(f"max_length must be an integer of at least 1, below .*, not {length}", max_length=length)
    refuse("max_distance must be", max_distance=1)
    refuse(r"SelfAttention.relative_attention_bias.weight has shape \(8, 4\); it must be \(buckets, 3\)", num_heads=3)
    state = t5_state(rng)
    for part, rows in (("encoder", 3), ("decoder", 1)):
        refuse(rf"has shape \({rows}, 4\).*at least {rows + 1} buckets", state | {
            T5[part].format(0) + TABLE: normal(rng, rows, 4)
        }, part=part)  # fmt: skip
    del state[T5["encoder"].format(0) + TABLE]
    refuse(f"did not find|looked for 'encoder.block.0.layer.0.SelfAttention.{TABLE}'", state)
    refuse("part must be 'encoder', 'decoder', 'cross', not 'self'", part="self")
    refuse("beside the weights of plain attention", t5_state(rng) | {T5["encoder"].format(1) + "wi.weight": np.ones(3)})


# ------------------------------------------------------------------------------------------------- LLaMA

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama_state(rng, prefix="model.", biases=False, dtype=np.float32):
    sizes = dict(zip(LLAMA, (24, 12, 12, 12), strict=True))
    state = {f"{prefix}embed_tokens.weight": normal(rng, 5, 12)}
    for i in range(2):
        at = f"{prefix}layers.{i}.self_attn."
        state |= linear_layers(rng, {at + name: n for name, n in sizes.items()}, biases=biases, dtype=dtype)
        state[f"{at}o_proj.weight"] = normal(rng, 12, 24, dtype=dtype)
        state[f"{at}rotary_emb.inv_freq"] = normal(rng, 3)
    return state


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("prefix", ["model.", "", "language_model.model."])
@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_llama(rng, x, num_kv_heads, prefix, biases):
    """Grouped heads, whose number follows from k_proj, and rotary positions that pair the halves of a head."""
    state = llama_state(rng, prefix, biases)
    ours = fastattn.MultiHeadAttention.from_llama(state, 1, num_heads=4, num_kv_heads=num_kv_heads, rotary_base=500.0)
    layers = pairs(state, *(f"{prefix}layers.1.self_attn.{name}" for name in LLAMA))
    agree(ours(x, is_causal=True), expected(x, layers, 4, 2, is_causal=True, rotary_base=500.0))
    assert (ours.num_kv_heads, ours.head_dim, ours.rotary_interleaved) == (2, 6, False)


def test_rows_in_the_order_of_gguf(rng, x):
    """Its converter puts the two channels of a pair side by side, in query and key."""
    state = llama_state(rng)
    arrays = {name: state[f"model.layers.0.self_attn.{name}.weight"] for name in LLAMA}
    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        arrays[name] = arrays[name].reshape(heads, 2, 3, 12).swapaxes(1, 2).reshape(heads * 6, 12)
    layer = fastattn.MultiHeadAttention.from_linear(
        {f"{name}.weight": w for name, w in arrays.items()}, *LLAMA, num_heads=4, num_kv_heads=2, rotary_base=500.0,
        rotary_interleaved=True, is_causal=True,
    )  # fmt: skip
    layers = pairs(state, *(f"model.layers.0.self_attn.{name}" for name in LLAMA))
    layers = [(w, None) for w, _ in layers]
    agree(layer(x), expected(x, layers, 4, 2, is_causal=True, rotary_base=500.0))


ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 500.0,
    },
    "yarn": {"type": "yarn", "factor": 4.0, "rope_theta": 500.0, "beta_fast": 4.0},
    "longrope of equal factors": {
        "rope_type": "longrope",
        "short_factor": [1.0, 2.0, 4.0],
        "long_factor": [1.0, 2.0, 4.0],
        "original_max_position_embeddings": 16,
    },
    "part of a head": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.7},
}


@pytest.mark.parametrize("rope", ROPE)
def test_llama_of_a_longer_context(rng, x, rope):
    """The frequencies and the factor that rotary_frequencies returns for the same dict."""
    state = llama_state(rng)
    given = {"num_heads": 4, "rotary_base": 900.0}
    ours = fastattn.MultiHeadAttention.from_llama(state, 1, **given, rope_parameters=ROPE[rope], max_positions=64)
    frequencies = reference.rotary_frequencies(6, base=900.0, scaling=ROPE[rope], max_positions=64)
    rotary = {"rotary_frequencies": frequencies, "rotary_dim": 4 if "part" in rope else 6}
    layers = pairs(state, *(f"model.layers.1.self_attn.{name}" for name in LLAMA))
    agree(ours(x, is_causal=True), expected(x, layers, 4, 2, is_causal=True, **rotary))
    plain = fastattn.MultiHeadAttention.from_llama(state, 1, **given)
    assert np.abs(plain(x, is_causal=True) - ours(x, is_causal=True)).max() > 1e-3
    cache = fastattn.KVCache(2, 2, 7, 6)
    steps = [ours(x[:, at], cache=cache, is_causal=True) for at in (slice(0, 4), slice(4, 6), slice(6, 7))]
    agree(np.concatenate(steps, axis=1), expected(x, layers, 4, 2, is_causal=True, **rotary))


def test_rope_theta_in_the_dict_wins(rng, x):
    state = llama_state(rng)

    def layer(**arguments):
        return fastattn.MultiHeadAttention.from_llama(state, 0, num_heads=np.int64(4), **arguments)

    right = layer(rotary_base=300.0)
    assert bits(layer(rotary_base=300.0, rope_parameters={})(x)) == bits(right(x))
    for rope in ({"rope_theta": 300.0}, {"rope_type": "default", "rope_theta": 300}):
        for base in ({}, {"rotary_base": 7.0}):
            ours = layer(rope_parameters=rope, **base)
            assert bits(ours(x)) == bits(right(x))
            assert ours.rotary_base == 300.0
    scaled = layer(rope_parameters={"rope_type": "linear", "factor": 1.0, "rope_theta": 300.0})
    assert bits(scaled(x)) == bits(right(x))


def test_rope_parameters_that_a_layer_cannot_follow_are_refused(rng):
    state = llama_state(rng)
    many = {"short_factor": [1.0, 2.0, 4.0], "long_factor": [1.0, 2.0, 5.0], "factor": 4.0}
    for rope, message in (
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_parameters has rope_type 'dynamic', whose frequencies change"),
        ({"type": "longrope"} | many, "rope_type 'longrope', whose frequencies change.*rotary_frequencies="),
        ({"rope_type": "mystery"}, "rope_parameters has rope_type 'mystery'; known are"),
        ({"rope_type": "llama3", "factor": 2.0}, "rope_parameters of rope_type 'llama3' lacks 'low_freq_factor'"),
        ({"mrope_section": [1, 1, 1]}, "rope_parameters has the key 'mrope_section'"),
        ({"full_attention": {"rope_theta": 1e6}}, "rope_parameters holds a dict for each kind of layer"),
        ({"rope_theta": -1.0}, r"rope_parameters\['rope_theta'\] must be a positive"),
    ):
        with pytest.raises(ValueError, match=message):
            fastattn.MultiHeadAttention.from_llama(state, 0, num_heads=4, rope_parameters=rope, max_positions=128)
    with pytest.raises(TypeError, match="rope_parameters must be the dict"):
        fastattn.MultiHeadAttention.from_llama(state, 0, num_heads=4, rope_parameters="yarn")
    with pytest.raises(ValueError, match=r"lacks 'original_max_position_embeddings'.*max_positions"):
        fastattn.MultiHeadAttention.from_llama(
            state, 0, num_heads=4, rope_parameters={"rope_type": "yarn", "factor": 2.0}
        )


def test_llama_errors(rng):
    def refuse(message, state, layer=0, **arguments):
        with pytest.raises(ValueError, match=message):
            fastattn.MultiHeadAttention.from_llama(state, layer, **{"num_heads": 4} | arguments)

    state = llama_state(rng)
    refuse("looked for 'model.layers.2.self_attn.q_proj.weight'", state, 2)
    norm = "model.layers.0.self_attn.q_norm.weight"
    refuse(f"there is '{norm}', a norm of heads: from_qwen and from_gemma", state | {norm: normal(rng, 6)})
    for other in ("q_proj.weight_scale", "q_proj.lora_A.weight"):
        refuse(
            f"there is 'model.layers.0.self_attn.{other}'",
            state | {f"model.layers.0.self_attn.{other}": normal(rng, 6)},
        )
    refuse("w_query has 24 columns, which num_heads=5", state, num_heads=5)
    refuse("num_heads must be an integer of at least 1", state, num_heads=0)
    refuse("w_key has 12 columns; it must have 24, num_kv_heads=4", state, num_kv_heads=4)


# ------------------------------------------------------------- windows and sinks; norms of Qwen and Gemma


def with_norms(rng, state, dtype=np.float32):
    norms = {
        f"model.layers.{i}.self_attn.{c}_norm.weight": normal(rng, 6, dtype=dtype) * 4 for i in range(2) for c in "qk"
    }
    return state | norms


@pytest.mark.parametrize("window", [None, 1, 3])
def test_windows_and_sinks(rng, x, window):
    state = llama_state(rng) | {"model.layers.1.self_attn.sinks": normal(rng, 4) * 4}
    layers = pairs(state, *(f"model.layers.1.self_attn.{name}" for name in LLAMA))
    sinks = state["model.layers.1.self_attn.sinks"]
    rules = {"is_causal": True, "sinks": sinks, "window_size": None if window is None else (window - 1, 0)}
    want = expected(x, layers, 4, 2, rotary_base=900.0, **rules)
    for load in ("from_llama", "from_qwen", "from_gemma"):
        layer = getattr(fastattn.MultiHeadAttention, load)(
            state, 1, num_heads=4, rotary_base=900.0, sliding_window=window
        )
        agree(layer(x), want)
    with pytest.raises(ValueError, match="sliding_window must be an integer of at least 1, or None, not 0"):
        fastattn.MultiHeadAttention.from_llama(state, 1, num_heads=4, sliding_window=0)


@pytest.mark.parametrize("dtype", [np.float32, *sixteen_bits()])
@pytest.mark.parametrize("rope", [None, *ROPE])
@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_norms_of_heads(rng, x, family, rope, dtype):
    """Gemma's files have w where 1 + w multiplies."""
    state = with_norms(rng, llama_state(rng, dtype=dtype), dtype)
    given = {"num_heads": 4, "rotary_base": 900.0, "norm_eps": 1e-2, "max_positions": 64}
    own, rules = {"norm_eps": 1e-2}, {"is_causal": True}
    if family == "gemma":
        given |= {"query_pre_attn_scalar": 5, "attn_logit_softcapping": 3.0}
        rules |= {"scale": 5**-0.5, "softcap": 3.0}
    if rope is None:
        own["rotary_base"] = 900.0
    else:
        given["rope_parameters"] = ROPE[rope]
        own["rotary_frequencies"] = reference.rotary_frequencies(6, base=900.0, scaling=ROPE[rope], max_positions=64)
        own["rotary_dim"] = 4 if "part" in rope else 6
    for c in "qk":
        own[f"{c}_norm"] = state[f"model.layers.1.self_attn.{c}_norm.weight"].astype(float) + (family == "gemma")
    layer = getattr(fastattn.MultiHeadAttention, f"from_{family}")(state, 1, **given)
    layers = pairs(state, *(f"model.layers.1.self_attn.{name}" for name in LLAMA))
    agree(layer(x), expected(x, layers, 4, 2, **own, **rules))
    assert layer.dtype == dtype


def test_qwen_and_gemma_errors(rng):
    def refuse(message, state=None, error=ValueError, family="qwen", **arguments):
        with pytest.raises(error, match=message):
            getattr(fastattn.MultiHeadAttention, f"from_{family}")(
                with_norms(rng, llama_state(rng)) if state is None else state,
                0,
                **{"num_heads": 4, "rotary_base": 1e4} | arguments,
            )

    for family in ("qwen", "gemma"):
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
        for rope in (None, yarn):
            refuse("rotary_base is needed, the rope_theta", family=family, rotary_base=None, rope_parameters=rope)
        refuse("rope_parameters must be the dict", None, TypeError, family, rope_parameters="yarn")
        refuse(
            "'dynamic', whose frequencies change", family=family, rope_parameters={"rope_type": "dynamic", "factor": 2}
        )
        each = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}
        refuse("a dict for each kind of layer", family=family, rope_parameters=each)
        state = llama_state(rng) | {"model.layers.0.layer_scalar": np.ones(1)}
        refuse("layer_scalar'.*Gemma 4.*no place", state, family=family)
    wide = with_norms(rng, llama_state(rng))
    wide["model.layers.0.self_attn.q_norm.weight"] = np.ones(3)
    refuse("twice num_heads=4 times the 3 channels of q_norm: half of them are gates", wide)
    wide["model.layers.0.self_attn.q_norm.weight"] = np.ones(24)
    refuse(r"q_norm has shape \(24,\); it must be \(6,\)", wide)
    refuse("query_pre_attn_scalar must be a positive", family="gemma", query_pre_attn_scalar=0)
    refuse("attn_logit_softcapping must be a positive", family="gemma", attn_logit_softcapping=-1.0)
    refuse("norm_eps must be a positive", norm_eps=-1.0)
    refuse(
        "v_norm.weight' beside",
        with_norms(rng, llama_state(rng)) | {"model.layers.0.self_attn.v_norm.weight": np.ones(6)},
    )


def test_configurations(rng, x):
    """The file of a model, whole; what is given beside it takes precedence."""
    state = with_norms(rng, llama_state(rng))
    make = fastattn.MultiHeadAttention
    config = {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 0.1,
              "rope_theta": 900.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "sliding_window": 3,
              "use_sliding_window": True, "max_window_layers": 1, "vocab_size": 5}  # fmt: skip
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 900.0}
    for layer, window in ((0, None), (1, 3)):
        want = make.from_qwen(state, layer, num_heads=4, rope_parameters=rope, norm_eps=0.1, sliding_window=window)
        assert bits(make.from_qwen(state, layer, num_heads=4, config=config)(x)) == bits(want(x))
    want = make.from_qwen(state, 0, num_heads=4, rope_parameters=rope, norm_eps=0.5, sliding_window=2)
    got = make.from_qwen(state, 0, num_heads=4, config=config, norm_eps=0.5, sliding_window=2)
    assert bits(got(x)) == bits(want(x))
    listed = config | {"layer_types": ["sliding_attention", "full_attention"]}
    assert make.from_qwen(state, 0, num_heads=4, config=listed).window_size == (2, None)
    assert make.from_qwen(state, 1, num_heads=4, config=listed).window_size is None


def test_configuration_errors(rng):
    state = with_norms(rng, llama_state(rng))
    gemma = {"model_type": "gemma3_text", "num_attention_heads": 4}

    def refuse(message, config, error=ValueError, family="gemma"):
        with pytest.raises(error, match=message):
            getattr(fastattn.MultiHeadAttention, f"from_{family}")(state, 0, num_heads=4, config=config)

    refuse("config must be the dict of a model's config.json, not a str", "config.json", TypeError)
    refuse("config has model_type None; from_gemma follows gemma, gemma2, gemma3_text", {})
    for kind in ("gemma4_text", "gemma3n", ["gemma"], "llama"):
        refuse("config has model_type .*; from_gemma follows", {"model_type": kind})
    refuse("config has model_type 'qwen3_next'; from_qwen follows", {"model_type": "qwen3_next"}, family="qwen")
    refuse("config has model_type 'cohere'; from_llama follows", {"model_type": "cohere"}, family="llama")
    refuse("config has num_attention_heads=8, and num_heads=4 is given", gemma | {"num_attention_heads": 8})
    refuse("use_bidirectional_attention", gemma | {"use_bidirectional_attention": True})
    refuse("'chunked_attention' as layer_types", gemma | {"layer_types": ["chunked_attention"]})
    refuse(r"config has no layer_types\[0\]", gemma | {"layer_types": []})
    refuse(r"config has no layer_types\[0\]", gemma | {"layer_types": 5})
    refuse("layer 0 has a window, and has no sliding_window", gemma | {"sliding_window": None})
    refuse("sliding_window must be an integer", gemma | {"sliding_window": "wide"}, TypeError)
    refuse("sliding_window_pattern", gemma | {"sliding_window_pattern": 0})
    refuse(r"no rope_parameters\['sliding_attention'\]", gemma | {"rope_parameters": {"full_attention": {}}})
    refuse("rope_parameters must be the dict", gemma | {"rope_parameters": 3}, TypeError)
    refuse("rope_parameters has the key 'mrope_section'", gemma | {"rope_parameters": {"mrope_section": [1, 1, 1]}})
    refuse("query_pre_attn_scalar must be a positive", gemma | {"query_pre_attn_scalar": -1})
    refuse("norm_eps must be a positive", gemma | {"rms_norm_eps": 0.0})


# ------------------------------------------------------------------------------------------------- Keras

KERAS = ("query", "key", "value", "attention_output")


def keras_weights(rng, kv_heads=3, biases=True):
    """d_model 12, 3 heads of 4 (keys) and 5 (values), 8 out: kernels, each followed by its bias."""
    shapes = [(12, 3, 4), (12, kv_heads, 4), (12, kv_heads, 5), (3, 5, 8)]
    kernels = [normal(rng, *shape) for shape in shapes]
    vectors = [normal(rng, *shape[1:]) for shape in shapes[:3]] + [normal(rng, 8)]
    return [w for both in zip(kernels, vectors, strict=True) for w in both] if biases else kernels


def keras_attention(x, weights, biases):
    """As in Keras: einsum with kernels that have an axis for the heads."""
    kernels = weights[::2] if biases else weights
    vectors = weights[1::2] if biases else 4 * [0]
    query, key, value = (
        np.einsum("blc,chd->blhd", x.astype(float), w) + b for w, b in zip(kernels[:3], vectors[:3], strict=True)
    )
    key, value = (np.repeat(a, 3 // a.shape[2], axis=2) for a in (key, value))
    scores = np.einsum("bshd,blhd->bhls", key, query) / 2
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = scores / scores.sum(axis=-1, keepdims=True)
    return np.einsum("blhe,hen->bln", np.einsum("bhls,bshe->blhe", weights, value), kernels[3]) + vectors[3]


@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("biases", [True, False])
def test_keras(rng, x, biases, kv_heads):
    weights = keras_weights(rng, kv_heads, biases)
    layer = fastattn.MultiHeadAttention.from_keras(weights)
    agree(layer(x), keras_attention(x, weights, biases))
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.value_dim) == (3, kv_heads, 4, 5)

    kinds = ("kernel", "bias") if biases else ("kernel",)
    names = [f"{part}/{kind}" for part in KERAS for kind in kinds]
    for prefix, end in (("", ""), ("encoder/multi_head_attention/", ""), ("multi_head_attention/", ":0")):
        named = {prefix + name + end: w for name, w in zip(names, weights, strict=True)}
        same = fastattn.MultiHeadAttention.from_keras(named | {"norm/gamma": weights[0]})
        assert bits(same(x)) == bits(layer(x))


def test_keras_errors(rng):
    def refuse(message, weights, **arguments):
        with pytest.raises(ValueError, match=message):
            fastattn.MultiHeadAttention.from_keras(weights, **arguments)

    weights = keras_weights(rng)
    refuse(r"weights has 7 arrays, of shapes \(12, 3, 4\), \(3, 4\).*query, key, value", weights[:7])
    refuse(r"the kernel of query has shape \(12, 12\); it must be \(d_model, num_heads, head_dim\)", [
        w.reshape(12, -1) if w.shape[0] == 12 else w for w in weights
    ])  # fmt: skip
    refuse(r"the bias of key has shape \(12,\); it must be \(3, 4\)", [*weights[:3], weights[3].ravel(), *weights[4:]])
    refuse(
        "kernel of key has 3 heads and that of value 1", [*weights[:4], weights[4][:, :1], weights[5][:1], *weights[6:]]
    )
    refuse("looked for 'query/kernel', .* did not find", {"query/kernel": weights[0]})
    refuse("looked for 'a/query/kernel'", {"query/kernel": weights[0]}, prefix="a/")
    refuse("b_value|must have the kernels", [])


# -------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("as_text", [True, False])
def test_files(rng, x, saved, as_text):
    state = llama_state(rng)
    path = saved(state)
    arguments = {"num_heads": 4, "rotary_base": 100.0}
    layer = fastattn.MultiHeadAttention.from_llama(str(path) if as_text else path, 1, **arguments)
    assert bits(layer(x)) == bits(fastattn.MultiHeadAttention.from_llama(state, 1, **arguments)(x))
    path = saved(bert_state(rng, "bert."))
    fastattn.MultiHeadAttention.from_bert(path, 2, num_heads=4)
    with pytest.raises(ValueError, match=r"looked for 'encoder.layer.3.*among 37 names"):
        fastattn.MultiHeadAttention.from_bert(path, 3, num_heads=4)


@pytest.mark.parametrize("dtype", sixteen_bits())
def test_files_in_sixteen_bits(rng, x, saved, dtype):
    state = llama_state(rng, dtype=dtype)
    layer = fastattn.MultiHeadAttention.from_llama(saved(state), 0, num_heads=4)
    assert layer.dtype == dtype
    assert layer(x).dtype == np.float32
    assert layer(x.astype(dtype)).dtype == dtype
    layers = pairs(state, *(f"model.layers.0.self_attn.{name}" for name in LLAMA))
    agree(layer(x), expected(x, layers, 4, 2, is_causal=True, rotary_base=10000.0))


def test_only_what_is_needed_is_read(rng, saved):
    """Reading a layer takes the memory of that layer."""
    import tracemalloc

    state = llama_state(rng) | {"other": np.zeros(4_000_000, np.float32)}
    path = saved(state)
    fastattn.MultiHeadAttention.from_llama(path, 0, num_heads=4)
    tracemalloc.start()
    fastattn.MultiHeadAttention.from_llama(path, 0, num_heads=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.fixture
def shards(rng, tmp_path):
    """A folder with a model in three files and their index, and the same as a dict."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    state = with_norms(rng, llama_state(rng))
    names, index = sorted(state), {}
    for i in range(3):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        save_file({name: np.ascontiguousarray(state[name]) for name in names[i::3]}, tmp_path / file)
        index |= dict.fromkeys(names[i::3], file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tmp_path, state


def test_several_files(shards, x):
    folder, state = shards
    arguments = {"num_heads": 4, "rotary_base": 100.0}
    want = bits(fastattn.MultiHeadAttention.from_qwen(state, 1, **arguments)(x))
    for path in (folder, str(folder), folder / "model.safetensors.index.json"):
        assert bits(fastattn.MultiHeadAttention.from_qwen(path, 1, **arguments)(x)) == want
    with pytest.raises(ValueError, match=r"looked for 'model.layers.2.*among 15 names"):
        fastattn.MultiHeadAttention.from_qwen(folder, 2, **arguments)


def test_a_folder_with_one_file(rng, x, saved):
    state = llama_state(rng)
    path = saved(state)
    layer = fastattn.MultiHeadAttention.from_llama(path.parent, 1, num_heads=4)
    assert bits(layer(x)) == bits(fastattn.MultiHeadAttention.from_llama(state, 1, num_heads=4)(x))


def test_only_the_files_that_are_needed_are_opened(shards):
    folder, _ = shards
    needed = {f"model.layers.0.self_attn.{c}_proj.weight" for c in "qkvo"}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {n: f if n in needed else "nowhere.safetensors" for n, f in index["weight_map"].items()}
    (folder / "some.index.json").write_text(json.dumps(index))
    names = [f"{c}_proj" for c in "qkvo"]
    path, at = folder / "some.index.json", "model.layers.0.self_attn."
    fastattn.MultiHeadAttention.from_linear(path, *names, num_heads=4, num_kv_heads=2, prefix=at)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        fastattn.MultiHeadAttention.from_qwen(path, 0, num_heads=4, rotary_base=1e4)


def test_bad_indices(shards):
    folder, _ = shards
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def refuse(message, text, error=ValueError):
        index.write_text(text)
        with pytest.raises(error, match=message):
            fastattn.MultiHeadAttention.from_qwen(folder, 1, num_heads=4, rotary_base=1.0)

    refuse("model.safetensors.index.json' is no index of .safetensors files: Expecting", "no JSON")
    refuse("must have a 'weight_map'", "[]")
    refuse("must have a 'weight_map'", '{"weight_map": {"a": 3}}')
    files = good["weight_map"]
    name = "model.layers.1.self_attn.k_proj.weight"
    other = next(file for file in files.values() if file != files[name])
    refuse(
        f"says that {name} is in {other}, which has no such array", json.dumps({"weight_map": files | {name: other}})
    )
    (folder / "broken.safetensors").write_bytes(bytes(100))
    refuse("broken.safetensors' is not a .safetensors file", json.dumps(
        {"weight_map": files | {name: "broken.safetensors"}}
    ))  # fmt: skip
    index.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"is a folder without model\.safetensors\.index\.json or model\.safetensors"
    ):
        fastattn.MultiHeadAttention.from_qwen(folder, 1, num_heads=4, rotary_base=1.0)


def test_bad_files(rng, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "pytorch_model.bin"
    with pytest.raises(FileNotFoundError):
        fastattn.MultiHeadAttention.from_llama(path, 0, num_heads=4)
    path.write_bytes(b"PK" + bytes(200))
    with pytest.raises(ValueError, match=r"pytorch_model.bin' is not a .safetensors file"):
        fastattn.MultiHeadAttention.from_llama(path, 0, num_heads=4)


@pytest.mark.parametrize(
    ("package", "message"), [("safetensors", "pip install safetensors"), ("ml_dtypes", "pip install ml_dtypes")]
)
def test_packages_that_are_missing(rng, saved, package, message):
    pytest.importorskip("ml_dtypes")
    path = saved(linear_layers(rng, {"q": 12, "k": 12, "v": 12}, dtype=sixteen_bits()[-1]))
    code = WITHOUT.format(package=package, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert message in done.stdout


def test_torch_is_not_imported(rng):
    code = "import sys, fastattn; assert not {'torch', 'safetensors', 'ml_dtypes'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
