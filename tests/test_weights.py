"""Constructors from the weights of PyTorch, Hugging Face's BERT and LLaMA, Keras; dicts and files."""

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
    rotary = {name: arguments.pop(name) for name in list(arguments) if name.startswith("rotary")}
    layer = reference.MultiHeadAttention(**given, num_heads=num_heads, num_kv_heads=num_kv_heads, **rotary)
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
    for other in ("q_norm.weight", "q_proj.weight_scale", "q_proj.lora_A.weight"):
        refuse(
            f"there is 'model.layers.0.self_attn.{other}'",
            state | {f"model.layers.0.self_attn.{other}": normal(rng, 6)},
        )
    refuse("w_query has 24 columns, which num_heads=5", state, num_heads=5)
    refuse("num_heads must be an integer of at least 1", state, num_heads=0)
    refuse("w_key has 12 columns; it must have 24, num_kv_heads=4", state, num_kv_heads=4)


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
    agree(layer(x), expected(x, layers, 4, 2, rotary_base=10000.0))


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
