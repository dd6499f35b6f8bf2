"""The training example: tags are right, gradients are right, it learns what it claims, and the script runs with clear
messages.

The script needs tqdm (the `examples` extra), the picture matplotlib. Tests for what is not installed are skipped, with
the reason.
"""

import ast
import importlib.util
import io
import os
import re
import subprocess
import sys
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
import pytest

import fastattn

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_transformer.py"
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None

needs_tqdm = pytest.mark.skipif(importlib.util.find_spec("tqdm") is None, reason="the examples need tqdm")

SOURCE = '''
def search(self, words, *others, most=3):
    """Find words."""
    global found
    import os.path as path, sys
    best = [word for word in words if len(word) > most]
    for i, other in enumerate(others):
        best += other.find(word, key=self.key)  # a comment
    try:
        found = path.join(best)
    except OSError as error:
        print(error, sys.argv, file=found)
    return best
'''
EXPECTED = """
    search function/self parameter/words parameter/others parameter/most parameter/found outside/
    os outside/path attribute/path local/sys local/best local/word local/word local/
    words parameter/len outside/word local/most parameter/i local/
    other local/enumerate outside/others parameter/best local/other local/find attribute/word local/key keyword/
    self parameter/key attribute/found outside/path local/join attribute/best local/OSError outside/error local/
    print outside/error local/sys local/argv attribute/file keyword/found outside/best local
"""


@pytest.fixture(scope="module")
def example():
    """The module examples/train_transformer.py, which is not in a package."""
    spec = importlib.util.spec_from_file_location("train_transformer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def functions(example):
    """Functions to learn from and to judge by."""
    return example.read_functions(Path(sysconfig.get_path("stdlib")))


# -------------------------------------------------------------------------------------- functions and tags


def read(example, source):
    """The codes and tags of a source's only function, and its tokens."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    first = next(i for i, token in enumerate(tokens) if token.string == "def")
    node = ast.parse(source).body[0]
    tokens = [token for token in tokens[first:] if token.start < (node.end_lineno, node.end_col_offset)]
    return example.read_function(node, tokens), tokens


def test_tags(example):
    (codes, tags), tokens = read(example, SOURCE)
    tokens = [token for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    assert len(codes) == len(tags) == len(tokens)
    names = [(token.string, example.TAGS[tag]) for token, tag in zip(tokens, tags, strict=True) if tag >= 0]
    expected = [tuple(pair.split()) for pair in " ".join(EXPECTED.split()).split("/")]
    assert names == expected
    for token, code in zip(tokens, codes, strict=True):
        if token.string in example.CODES:
            assert code == example.CODES[token.string]
        assert (code >= example.NUM_WORDS) == (token.string.isidentifier() and token.string not in example.CODES)
    spellings = {code: token.string for code, token in zip(codes, tokens, strict=True) if code >= example.NUM_WORDS}
    assert len(spellings) == len(set(spellings.values()))
    assert example.WORDS[codes[list(tags).index(-1, 5)] - 1] == ","


def test_other_functions_are_left_out(example):
    for line in ("return lambda: x", "def inner(): pass", "class A: pass"):
        assert read(example, f"def f(x):\n    y = x + x * x\n    {line}\n")[0] is None
    assert read(example, "def f(x): return x\n")[0] is None
    assert read(example, "def f(x):\n    return " + " + ".join(["x"] * 200) + "\n")[0] is None


def test_the_standard_library(example, functions):
    for part in functions:
        assert len(part) > 200
        for codes, tags in part:
            assert example.SHORTEST <= len(codes) == len(tags) <= example.LONGEST
            assert 0 <= codes.min() and codes.max() < example.NUM_CODES
            np.testing.assert_array_equal(tags >= 0, codes >= example.NUM_WORDS)
    # Files are kept from training as a whole.
    learned = {codes.tobytes() for codes, _ in functions[0]}
    assert np.mean([codes.tobytes() in learned for codes, _ in functions[1] if len(codes) > 60]) < 0.02


def test_padding_and_numbers(example, functions):
    some = functions[0][:5]
    (codes, tags, lengths), (others, same, _) = (example.pad(some, np.random.default_rng(seed)) for seed in (0, 1))
    assert codes.shape == tags.shape == (5, lengths.max())
    np.testing.assert_array_equal(tags, same)
    names = codes >= example.NUM_WORDS
    np.testing.assert_array_equal(names, others >= example.NUM_WORDS)
    np.testing.assert_array_equal(codes[~names], others[~names])
    assert (codes != others)[names].mean() > 0.8
    for row, other, (own, _) in zip(codes, others, some, strict=True):
        assert not row[len(own) :].any()
        for drawn in (row, other):  # one number a name
            assert len(set(zip(own, drawn, strict=False))) == len(set(own)) == len(set(drawn[: len(own)]))


# ----------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("window", [None, 2])
def test_gradients_match_finite_differences(example, functions, window):
    """Along random directions, which involve every entry of a parameter."""
    rng = np.random.default_rng(3)
    model = example.Tagger(fastattn.MultiHeadAttention, rng, window, np.float64, width=16, heads=2, hidden=12)
    for parameter in model.parameters.values():
        parameter += 0.1 * rng.standard_normal(parameter.shape)
    batch = example.pad(functions[0][:4], rng)
    _, gradients = model.loss_and_gradients(*batch)
    assert gradients.keys() == model.parameters.keys()
    for name, parameter in model.parameters.items():
        start, step, losses = parameter.copy(), 1e-6, []
        assert gradients[name].shape == start.shape
        assert gradients[name].dtype == np.float64
        direction = rng.standard_normal(start.shape)
        for sign in (1, -1):
            parameter[...] = start + sign * step * direction
            losses.append(model.loss_and_gradients(*batch)[0])
        parameter[...] = start
        # max(x, 0) has a corner; a step across it of one of the hidden units is allowed for.
        expected = (losses[0] - losses[1]) / (2 * step)
        assert abs((gradients[name] * direction).sum() - expected) <= 1e-5 * max(1, np.linalg.norm(direction)), name


def test_padding_and_company_change_no_tag(example, functions):
    model = example.Tagger(fastattn.MultiHeadAttention, np.random.default_rng(4))
    codes, _, lengths = example.pad(functions[0][:6], np.random.default_rng(0))
    together = model.forward(codes, lengths)[0]
    for row, length, logits in zip(codes, lengths, together, strict=True):
        alone = model.forward(row[None, :length], np.array([length]))[0][0]
        np.testing.assert_allclose(logits[:length], alone, rtol=0, atol=1e-4)


def test_training_is_reproducible(example, functions):
    runs = []
    for _ in range(2):
        model = example.Tagger(fastattn.MultiHeadAttention, np.random.default_rng(6))
        runs.append(list(example.train(model, functions[0], np.random.default_rng(6), steps=5, batch=8)))
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-5)


def test_the_whole_function_beats_a_window(example, functions):
    """Less than half of the script's training; the margin is wide."""
    right, steps = [], 400
    for window in (None, example.WINDOW):
        model = example.Tagger(fastattn.MultiHeadAttention, np.random.default_rng(0), window_size=window)
        losses = list(example.train(model, functions[0], np.random.default_rng(0), steps=steps, batch=32))
        assert np.mean(losses[-20:]) < 0.6 * losses[0]
        right.append(example.judge(model, functions[1][:400], np.random.default_rng(0), 32)["all names"])
    assert right[0] > right[1] + 0.04
    assert right[0] > 0.85


# ---------------------------------------------------------------------------------------------- the script


def run_script(*arguments, without=None, cwd=None):
    """Run train_transformer.py in a separate process; `without` hides a package from it."""
    command = [sys.executable, str(SCRIPT), *arguments]
    if without:
        hide = f"import runpy, sys; sys.modules[{without!r}] = None; sys.argv = sys.argv[1:]; "
        hide += "runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-P", "-c", hide, *command[1:]]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, check=False, capture_output=True, encoding="utf-8", env=environment, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a few of the standard library's files, and one that is no Python."""
    path = tmp_path_factory.mktemp("sources")
    for name in ("argparse", "ast", "calendar", "configparser", "shutil", "tarfile", "textwrap", "zipfile"):
        source = Path(sysconfig.get_path("stdlib")) / f"{name}.py"
        if source.exists():
            (path / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    (path / "broken.py").write_text("def (", encoding="utf-8")
    return path


@needs_tqdm
@pytest.mark.parametrize("without", [None, "matplotlib"])
def test_script(tmp_path, folder, without):
    run = run_script("--steps", "12", "--batch", "4", "--folder", str(folder), without=without, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert re.search(r"\d+ functions to learn from, \d+ of other files", run.stdout)
    assert len(re.findall(r"^    all names .*%.*%$", run.stdout, re.MULTILINE)) == 1
    assert run.stderr.count("12/12") >= 2  # the progress bars
    assert "loss=" in run.stderr
    pictures = list(tmp_path.iterdir())
    if without or not HAS_MATPLOTLIB:
        assert not pictures
        assert "pip install matplotlib" in run.stdout
    else:
        assert "Drawn in train_transformer.png" in run.stdout
        assert [path.name for path in pictures] == ["train_transformer.png"]
        assert pictures[0].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("package", [pytest.param("fastattn", marks=needs_tqdm), "tqdm"])
def test_missing_package_is_explained(package):
    run = run_script(without=package)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert f"package {package} is not installed" in run.stderr
    assert 'pip install ".[examples]"' in run.stderr


@needs_tqdm
def test_a_folder_without_functions_is_explained(tmp_path):
    run = run_script("--folder", str(tmp_path))
    assert run.returncode == 1
    assert "too few functions" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "at least 1, not 0"),
        (["--batch", "-1"], "at least 1, not -1"),
        (["--output", "picture.txt"], "must end in .png"),
        (["--output", "nowhere/picture.png"], "no folder 'nowhere'"),
        (["--folder", "nowhere"], "no folder 'nowhere'"),
    ],
)
def test_unusable_input_is_explained(tmp_path, arguments, words):
    run = run_script(*arguments, cwd=tmp_path)
    assert run.returncode == 2
    assert words in run.stderr
    assert "Traceback" not in run.stderr
