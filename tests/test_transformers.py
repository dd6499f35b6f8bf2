"""The layers of from_gpt2, from_t5, ... against Hugging Face's own models, small ones with random weights.

A model runs whole; what goes into each of its attention modules and what comes out is written down. Needs torch and
transformers, which `.ci/run` installs; test_weights.py checks the same loaders against the reference.
"""

import json

import numpy as np
import pytest
from problems import bits, sixteen_bits

import fastattn

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
From = fastattn.MultiHeadAttention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_weights(model):
    """Larger than a fresh model's, whose attention is nearly uniform; norms and tables too."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.4 if p.ndim > 1 else 0.3) + (0 if p.ndim > 1 else 0.5))
    return model.eval()


def seen(model, module, **inputs):
    """What goes into an attention module (and its context), and what comes out, as arrays."""
    found = []

    def hook(_, args, kwargs, outputs):
        x = args[0] if args else kwargs["hidden_states"]
        context = kwargs.get("key_value_states", kwargs.get("encoder_hidden_states"))
        if context is None and len(args) > 1 and torch.is_tensor(args[1]) and args[1].ndim == 3:
            context = args[1]
        found.append((x, context, outputs[0]))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    with torch.inference_mode():
        model(**inputs)
    handle.remove()
    assert len(found) == 1
    return [None if a is None else a.float().numpy() for a in found[0]]


def agree(layer, x, context, theirs, **arguments):
    ours = layer(x, context, **arguments)
    assert np.abs(ours - theirs).max() <= 2e-5 * max(np.abs(theirs).max(), 1), np.abs(ours - theirs).max()


def saved(model, tmp_path, **how):
    pytest.importorskip("safetensors")
    model.save_pretrained(tmp_path, **how)
    return tmp_path


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


TOKENS = {"input_ids": torch.randint(3, 40, (2, 29), generator=torch.Generator().manual_seed(1))}


# ------------------------------------------------------------------------------------------------ encoders


@pytest.mark.parametrize("layer", [0, 1])
def test_distilbert(tmp_path, layer):
    config = transformers.DistilBertConfig(dim=24, n_layers=2, n_heads=4, hidden_dim=16, vocab_size=40)
    model = random_weights(transformers.DistilBertForMaskedLM(config))
    found = seen(model, model.distilbert.transformer.layer[layer].attention, **TOKENS)
    for state in (model.state_dict(), saved(model, tmp_path)):
        agree(From.from_distilbert(state, layer, num_heads=4), *found)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "DeiT"])
def test_vit(tmp_path, kind):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=16, patch_size=4)
    model = random_weights(getattr(transformers, f"{kind}Model")(config))
    [module] = [m for name, m in model.named_modules() if name.endswith("1.attention")]
    found = seen(model, module, pixel_values=torch.randn(2, 3, 16, 16))
    for state in (model.state_dict(), saved(model, tmp_path)):
        agree(From.from_vit(state, 1, num_heads=4), *found)


def test_bert(tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    model = random_weights(transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=40)))
    x, _, _ = seen(model, model.encoder.layer[1].attention.self, **TOKENS)
    layer = From.from_bert(saved(model, tmp_path), 1, num_heads=4)
    with torch.inference_mode():
        attention = model.encoder.layer[1].attention
        theirs = attention.output.dense(attention.self(torch.from_numpy(x))[0]).numpy()
    agree(layer, x, None, theirs)


# ------------------------------------------------------------------------------------------------ decoders


@pytest.mark.parametrize("inverse", [False, True])
def test_gpt2(tmp_path, inverse):
    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=4, vocab_size=40, scale_attn_by_inverse_layer_idx=inverse
    )
    model = random_weights(transformers.GPT2LMHeadModel(config))
    found = seen(model, model.transformer.h[1].attn, **TOKENS)
    scale = {"scale": 6**-0.5 / 2} if inverse else {}
    for state in (model.state_dict(), saved(model, tmp_path)):
        agree(From.from_gpt2(state, 1, num_heads=4, **scale), *found)


SIZES = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "intermediate_size": 16, "vocab_size": 40, "pad_token_id": 0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


def rotary_model(kind, **config):
    config = getattr(transformers, f"{kind}Config")(**SIZES | config, attn_implementation="eager")
    name = kind.removesuffix("Text") + "ForCausalLM"
    return config, random_weights(getattr(transformers, name)(config))


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 500.0}, YARN, LINEAR], ids=str)
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama"])
def test_qwen_and_llama(tmp_path, kind, rope):
    config, model = rotary_model(kind, rope_parameters=rope, max_position_embeddings=64, rms_norm_eps=1e-3)
    found = seen(model, model.model.layers[2].self_attn, **TOKENS)
    given = {"num_heads": 4, "rope_parameters": rope, "max_positions": 64}
    for state in (model.state_dict(), saved(model, tmp_path)):
        if kind == "Llama":
            layer = From.from_llama(state, 2, **given)
        else:
            layer = From.from_qwen(state, 2, **given, norm_eps=config.rms_norm_eps)
        agree(layer, *found)
        assert (layer.q_norm is not None) == (kind == "Qwen3")
    same = getattr(From, "from_llama" if kind == "Llama" else "from_qwen")(
        tmp_path, 2, num_heads=4, config=config_of(tmp_path)
    )
    assert bits(same(found[0])) == bits(layer(found[0]))


@pytest.mark.parametrize("kind", ["Qwen2", "Mistral"])
def test_sliding_windows(kind):
    more = {"use_sliding_window": True, "max_window_layers": 1} if kind == "Qwen2" else {}
    _, model = rotary_model(kind, sliding_window=5, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}, **more)
    found = seen(model, model.model.layers[2].self_attn, **TOKENS)
    load = From.from_qwen if kind == "Qwen2" else From.from_llama
    agree(load(model.state_dict(), 2, num_heads=4, rotary_base=1e4, sliding_window=5), *found)


@pytest.mark.parametrize("layer", [0, 1])
def test_gpt_oss(layer):
    config, model = rotary_model("GptOss", sliding_window=6, num_local_experts=2, num_experts_per_tok=1)
    found = seen(model, model.model.layers[layer].self_attn, **TOKENS)
    loaded = From.from_llama(
        model.state_dict(), layer, num_heads=4, rope_parameters=config.rope_parameters,
        max_positions=config.max_position_embeddings,
        sliding_window=6 if config.layer_types[layer] == "sliding_attention" else None,
    )  # fmt: skip
    agree(loaded, *found)
    assert loaded.sinks.shape == (4,)


def test_gemma(tmp_path):
    config, model = rotary_model("Gemma", rope_parameters={"rope_theta": 300.0, "rope_type": "default"})
    found = seen(model, model.model.layers[1].self_attn, **TOKENS)
    agree(From.from_gemma(saved(model, tmp_path), 1, num_heads=4, rope_parameters=config.rope_parameters), *found)


@pytest.mark.parametrize("layer", [0, 1])
def test_gemma2(layer):
    config, model = rotary_model("Gemma2", query_pre_attn_scalar=5, sliding_window=6, attn_logit_softcapping=2.0)
    found = seen(model, model.model.layers[layer].self_attn, **TOKENS)
    loaded = From.from_gemma(
        model.state_dict(), layer, num_heads=4, query_pre_attn_scalar=5, attn_logit_softcapping=2.0,
        rope_parameters=config.rope_parameters,
        sliding_window=6 if config.layer_types[layer] == "sliding_attention" else None,
    )  # fmt: skip
    agree(loaded, *found)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemma3(tmp_path, layer, dtype):
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, "full_attention": LINEAR}
    types = ["sliding_attention", "full_attention"] * 2
    config = {"query_pre_attn_scalar": 5, "sliding_window": 6, "layer_types": types, "rms_norm_eps": 1e-3}
    _, model = rotary_model("Gemma3Text", rope_parameters=rope, **config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype))
    found = seen(model, model.model.layers[layer].self_attn, **TOKENS)
    if dtype == torch.float32:
        state = model.state_dict()
    elif len(sixteen_bits()) < 2:
        pytest.skip("needs ml_dtypes")
    else:
        state = saved(model.to(dtype), tmp_path)
    loaded = From.from_gemma(
        state, layer, num_heads=4, query_pre_attn_scalar=5, rope_parameters=rope[types[layer]], norm_eps=1e-3,
        sliding_window=6 if layer == 0 else None,
    )  # fmt: skip
    agree(loaded, *found)


KINDS = {
    "Llama": ("from_llama", {"rope_parameters": YARN, "max_position_embeddings": 64}),
    "Mistral": ("from_llama", {"sliding_window": 5}),
    "Mixtral": ("from_llama", {"num_local_experts": 2, "sliding_window": None}),
    "GptOss": ("from_llama", {"sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "Qwen2": ("from_qwen", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "Qwen3": ("from_qwen", {"rope_parameters": LINEAR, "rms_norm_eps": 1e-3}),
    "Gemma": ("from_gemma", {"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}}),
    "Gemma2": ("from_gemma", {"query_pre_attn_scalar": 5, "sliding_window": 6, "attn_logit_softcapping": 2.0}),
    "Gemma3Text": ("from_gemma", {"query_pre_attn_scalar": 5, "sliding_window": 6, "rms_norm_eps": 1e-3}),
}


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_configurations(tmp_path, kind, layer):
    """Everything that the model's own file says, and nothing else."""
    load, more = KINDS[kind]
    _, model = rotary_model(kind, **more)
    found = seen(model, model.model.layers[layer].self_attn, **TOKENS)
    folder = saved(model, tmp_path)
    agree(getattr(From, load)(folder, layer, num_heads=4, config=config_of(folder)), *found)


OLDER = {
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "rope_theta": 300.0},
    "Gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 5, "rope_theta": 300.0},
    "Gemma3Text": {
        "sliding_window": 6, "query_pre_attn_scalar": 5, "sliding_window_pattern": 2, "rope_theta": 900.0,
        "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "GptOss": {"sliding_window": 6, "rope_theta": 300.0, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Mistral": {"sliding_window": 5, "rope_theta": 300.0},
    "Llama": {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("kind", OLDER)
def test_older_configurations(kind, layer):
    """Files from before rope_parameters and layer_types, as the library itself still reads them."""
    made, model = rotary_model(kind, **OLDER[kind])
    found = seen(model, model.model.layers[layer].self_attn, **TOKENS)
    config = SIZES | OLDER[kind] | {"model_type": made.model_type, "rms_norm_eps": made.rms_norm_eps}
    load = KINDS[kind][0]
    agree(getattr(From, load)(model.state_dict(), layer, num_heads=4, config=config), *found)
    # As a part of a model that also sees.
    whole = {"model_type": "other", "text_config": config}
    agree(getattr(From, load)(model.state_dict(), layer, num_heads=4, config=whole), *found)


def test_defaults_of_configurations():
    """What files may leave out is what the library's own classes have."""
    from fastattn import _configuration

    for loader, kinds in _configuration._KINDS.items():
        for kind, defaults in kinds.items():
            theirs = transformers.AutoConfig.for_model(kind)
            assert theirs.model_type == kind, loader
            for name, value in defaults.items():
                rope = theirs.rope_parameters
                if kind == "gemma3_text" and name.startswith("rope"):
                    part = "full_attention" if name == "rope_theta" else "sliding_attention"
                    assert rope[part]["rope_theta"] == value
                elif name == "rope_theta":
                    assert rope["rope_theta"] == value
                elif name == "rope_scaling":
                    assert {key: rope[key] for key in value} == value
                else:
                    assert getattr(theirs, name) == value, (kind, name)
            if "rope_theta" not in defaults:
                assert theirs.rope_parameters["rope_theta"] in (1e4, 1e6), kind


def test_models_that_a_layer_cannot_follow():
    """They are refused by name, not loaded wrongly."""
    config = transformers.Gemma4TextConfig(**SIZES, hidden_size_per_layer_input=0)
    model = transformers.Gemma4ForCausalLM(config)
    with pytest.raises(ValueError, match=r"layer_scalar.*Gemma 4"):
        From.from_gemma(model.state_dict(), 0, num_heads=4, rotary_base=1e4)
    config = transformers.Qwen3NextConfig(**SIZES, layer_types=["full_attention"] * 4)
    model = transformers.Qwen3NextForCausalLM(config)
    with pytest.raises(ValueError, match="half of them are gates"):
        From.from_qwen(model.state_dict(), 0, num_heads=4, rotary_base=1e4)
    config = transformers.Olmo2Config(**SIZES)
    model = transformers.Olmo2ForCausalLM(config)
    with pytest.raises(ValueError, match=r"q_norm has shape \(32,\)|q_norm has shape \(24,\)"):
        From.from_qwen(model.state_dict(), 0, num_heads=4, rotary_base=1e4)
    with pytest.raises(ValueError, match="q_norm"):
        From.from_llama(model.state_dict(), 0, num_heads=4)


# --------------------------------------------------------------------------- encoders and decoders together


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5"])
def test_t5(tmp_path, kind, layer):
    config = getattr(transformers, f"{kind}Config")(
        d_model=24, d_kv=6, num_layers=2, num_heads=4, d_ff=16, vocab_size=40, relative_attention_num_buckets=8,
        relative_attention_max_distance=20, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = random_weights(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
    inputs = TOKENS | {"decoder_input_ids": TOKENS["input_ids"][:, :23]}
    decoder = model.decoder.block[layer].layer
    modules = {
        "encoder": model.encoder.block[layer].layer[0].SelfAttention,
        "decoder": decoder[0].SelfAttention,
        "cross": decoder[1].EncDecAttention,
    }
    for state in (model.state_dict(), saved(model, tmp_path)):
        for part, module in modules.items():
            found = seen(model, module, **inputs)
            assert (found[1] is not None) == (part == "cross")
            for length in (29, 100):
                loaded = From.from_t5(state, layer, num_heads=4, max_length=length, max_distance=20, part=part)
                agree(loaded, *found)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (16, 37), (64, 800)])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_buckets_of_t5(buckets, distance, part):
    """Of every distance up to 4000: the same as its own function gives."""
    from transformers.models.t5.modeling_t5 import T5Attention

    at = f"{part}.block.0.layer.0.SelfAttention."
    state = {f"{at}{name}.weight": np.eye(2) for name in "qkvo"}
    state[f"{at}relative_attention_bias.weight"] = np.arange(2 * buckets).reshape(buckets, 2).astype(np.float32)
    layer = From.from_t5(state, 0, num_heads=2, max_length=4001, max_distance=distance, part=part)
    distances = torch.arange(-4000, 4001 if part == "encoder" else 1)
    theirs = T5Attention._relative_position_bucket(distances, part == "encoder", buckets, distance).numpy()
    np.testing.assert_array_equal(layer.relative_bias[:, 0], np.stack([2 * theirs, 2 * theirs + 1]))


@pytest.mark.parametrize("kind", ["Whisper", "Bart"])
def test_whisper(tmp_path, kind):
    config = getattr(transformers, f"{kind}Config")(
        d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=8, decoder_ffn_dim=8, vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, **({"num_mel_bins": 8, "max_source_positions": 20} if kind == "Whisper" else {}),
    )  # fmt: skip
    model = random_weights(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
    inputs = {"decoder_input_ids": TOKENS["input_ids"]}
    inputs |= {"input_features": torch.randn(2, 8, 40)} if kind == "Whisper" else TOKENS
    decoder = model.model.decoder.layers[1]
    modules = {"encoder": model.model.encoder.layers[1].self_attn, "decoder": decoder.self_attn}
    modules["cross"] = decoder.encoder_attn
    for state in (model.state_dict(), saved(model, tmp_path)):
        for part, module in modules.items():
            found = seen(model, module, **inputs)
            assert (found[1] is not None) == (part == "cross")
            layer = From.from_whisper(state, 1, num_heads=4, part=part)
            agree(layer, *found)
            assert layer.is_causal == (part == "decoder")


# ------------------------------------------------------------------------------------------------- shards


def test_shards(tmp_path):
    """A model that its own library has split into several files."""
    _, model = rotary_model("Qwen3", rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    folder = saved(model, tmp_path, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    found = seen(model, model.model.layers[3].self_attn, **TOKENS)
    for path in (folder, str(folder), folder / "model.safetensors.index.json"):
        agree(From.from_qwen(path, 3, num_heads=4, rotary_base=500.0), *found)


# ------------------------------------------------------------------------------------------ packed weights


@pytest.mark.parametrize("kind", ["GPTNeoX", "Bloom", "Falcon", "Phi3"])
def test_packed(kind):
    if kind == "GPTNeoX":
        config = transformers.GPTNeoXConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8, vocab_size=40,
            rotary_pct=0.5, use_parallel_residual=False,
        )  # fmt: skip
        model = random_weights(transformers.GPTNeoXForCausalLM(config))
        at, options = "gpt_neox.layers.0.attention.", {"rotary_base": 1e4, "rotary_dim": 4, "layout": "interleaved"}
        module = model.gpt_neox.layers[0].attention
    elif kind == "Bloom":
        config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=40)
        model = random_weights(transformers.BloomForCausalLM(config))
        at, module = "transformer.h.0.self_attention.", model.transformer.h[0].self_attention
        options = {"alibi_slopes": fastattn.alibi_slopes(4), "layout": "interleaved"}
    elif kind == "Falcon":
        config = transformers.FalconConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_kv_heads=2, vocab_size=40,
            new_decoder_architecture=True, bias=True,
        )  # fmt: skip
        model = random_weights(transformers.FalconForCausalLM(config))
        at, module = "transformer.h.0.self_attention.", model.transformer.h[0].self_attention
        options = {"rotary_base": 1e4, "num_kv_heads": 2, "layout": "interleaved"}
    else:
        _, model = rotary_model("Phi3", rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
        at, module = "model.layers.0.self_attn.", model.model.layers[0].self_attn
        options = {"rotary_base": 1e4, "num_kv_heads": 2}
    x, second, theirs = seen(model, module, **TOKENS)
    if kind == "Bloom":  # which adds the residual there
        theirs = theirs - second
    state = model.state_dict()
    names = [name.rpartition(".")[0] for name in state if name.startswith(at) and name.endswith(".weight")]
    [qkv] = [name for name in names if name.endswith(("qkv_proj", "query_key_value"))]
    [out] = {*names} - {qkv}
    layer = From.from_packed(
        state[f"{qkv}.weight"], state.get(f"{qkv}.bias"), state[f"{out}.weight"], state.get(f"{out}.bias"),
        num_heads=4, transposed=True, is_causal=True, **options,
    )  # fmt: skip
    agree(layer, x, None, theirs)
