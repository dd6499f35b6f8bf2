"""The conformer example: its attention is Transformer-XL's, and however sound is split its rows are those of all frames
at once."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from problems import bits

import fastattn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / "streaming_conformer.py"


@pytest.fixture(scope="module")
def conformer():
    """The module examples/streaming_conformer.py, which is not in a package."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("streaming_conformer", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))


def options_of(conformer, text):
    return conformer.parse_arguments(text.split())


def test_attention_is_that_of_transformer_xl(conformer):
    """From its formula, in float64: each pair of frames by itself, with the weights before they were multiplied."""
    options = options_of(conformer, "--left 6 --right 2 --blocks 1")
    block = conformer.Block(np.random.default_rng(3), options, fastattn)
    x = np.random.default_rng(4).standard_normal((30, conformer.CHANNELS)).astype(np.float32)
    layer, heads = block.attention, conformer.HEADS
    exact = {name: np.float64(array) for name, array in layer.parameters().items()}
    query, key, value = (
        (np.float64(x) @ exact[f"w_{name}"]).reshape(30, heads, -1) for name in ("query", "key", "value")
    )
    b_query, v = (np.float64(b).reshape(heads, -1) for b in (block.b_query, block.of_positions))
    u = exact["b_query"].reshape(heads, -1) - b_query
    query, out = query + b_query, np.zeros((30, heads, value.shape[-1]))
    for i in range(30):
        seen = np.arange(max(0, i - 6), min(30, i + 3))
        for h in range(heads):
            scores = key[seen, h] @ (query[i, h] + u[h])
            scores += np.float64(block.embeddings[seen - i + 6, h]) @ (query[i, h] + v[h])
            weights = np.exp(scores / math.sqrt(query.shape[-1]))
            out[i, h] = weights @ value[seen, h] / weights.sum()
    expected = out.reshape(30, -1) @ exact["w_out"]
    found = layer(x, window_size=(6, 2), relative_bias=block.positions(x))
    # Scores are a few units, sums have 144 terms: some tens of eps.
    np.testing.assert_allclose(found, expected, rtol=0, atol=100 * np.finfo(np.float32).eps * np.abs(expected).max())


@pytest.mark.parametrize("right", [0, 1, 4])
def test_convolution(conformer, right):
    rng = np.random.default_rng(right)
    kernel, x = (rng.standard_normal((n, conformer.CHANNELS)).astype(np.float32) for n in (5, 40))
    whole = conformer.convolution(x, kernel, right)
    for channel in range(0, conformer.CHANNELS, 29):
        full = np.convolve(np.float64(x[:, channel]), np.float64(kernel[::-1, channel]))  # entry t ends at frame t
        np.testing.assert_allclose(whole[:, channel], full[right : right + 40], rtol=0, atol=1e-5)
    for size in (1, 3, 40):
        stream = conformer.ConvolutionStream(kernel, right)
        rows = [stream.push(x[at : at + size], at + size >= 40) for at in range(0, 40, size)]
        assert bits(np.concatenate(rows)) == bits(whole)
        assert len(stream.kept) <= 4 + right


@pytest.mark.parametrize("frame", [10, 40])
@pytest.mark.parametrize("milliseconds", [3, 40, 333])
@pytest.mark.parametrize("look", [(1, 0), (0, 0), (2, 3)], ids=str)
def test_bits_however_sound_is_split(conformer, frame, milliseconds, look):
    options = options_of(
        conformer,
        f"--frame {frame} --push {milliseconds} --seconds 1.5 --blocks 2 --left 9 --right {look[0]} --kernel 5 "
        f"--kernel-right {look[1]}",
    )
    source, model = conformer_source(conformer), conformer.Conformer(options, fastattn)
    stream = conformer.ConformerStream(model, fastattn)
    assert stream.latency == 2 * sum(look)
    rows, report = conformer.listen(source, options, stream)
    assert report.latency == stream.latency
    assert report.taken_in == len(rows) == report.given_out + stream.latency
    verdict, same = conformer.compare_offline(source, options, model, rows)
    assert same and f"equal bits in all {rows.size:,} numbers" in verdict
    assert np.isfinite(rows).all() and 0.5 < rows.std() < 2


def conformer_source(conformer):
    return sys.modules["streaming_speech"].Babble(1)


def test_a_difference_is_seen(conformer):
    options = options_of(conformer, "--seconds 3 --blocks 4")
    source, model = conformer_source(conformer), conformer.Conformer(options, fastattn)
    rows, _ = conformer.listen(source, options, conformer.ConformerStream(model, fastattn))
    assert conformer.compare_offline(source, options, model, rows)[1]
    rows[5, 7] += 0.001
    verdict, same = conformer.compare_offline(source, options, model, rows)
    assert not same and "1 numbers of" in verdict and "by up to 0.001" in verdict
    assert not conformer.compare_offline(source, options, model, rows[1:])[1]


@pytest.mark.parametrize("rows", [0, 1, 8, 9, 30])
def test_products_of_any_number_of_rows(conformer, rows):
    rng = np.random.default_rng(rows)
    x, linear = rng.standard_normal((40, 24), dtype=np.float32), fastattn.Linear(rng.standard_normal((24, 9)))
    assert bits(conformer.product(x[:rows], linear)) == bits(linear(x)[:rows])


def test_memory_does_not_grow(conformer):
    options = options_of(conformer, "--blocks 2 --left 9 --right 2 --kernel 5 --kernel-right 1")
    stream, held = conformer.ConformerStream(conformer.Conformer(options, fastattn), fastattn), []
    frames = np.random.default_rng(0).standard_normal((5, 320)).astype(np.float32)
    for _ in range(300):
        stream.push(frames)
        held.append(stream.nbytes())
    assert max(held[100:]) == max(held[:100])


def run_script(*arguments, without=None, cwd=None, path=None):
    """Run the script in a separate process; `without` hides a package from it."""
    command = [sys.executable, str(SCRIPT), *arguments]
    if without:
        hide = f"import runpy, sys; sys.modules[{without!r}] = None; sys.argv = sys.argv[1:]; "
        hide += f"sys.path.insert(0, {str(EXAMPLES)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-P", "-c", hide, *command[1:]]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    if path is not None:
        environment["PATH"] = str(path)
    return subprocess.run(command, check=False, capture_output=True, encoding="utf-8", env=environment, cwd=cwd)


def test_the_script(tmp_path):
    run = run_script("--seconds", "2", "--blocks", "2", "--kernel-right", "2", cwd=tmp_path, path=tmp_path)
    assert run.returncode == 0, run.stderr + run.stdout
    for words in (
        "babble of synthetic syllables",
        r"A conformer of 2 blocks, 144 channels and 4 heads: [\d,]+ weights",
        "heard    2 s, 49 frames of 40 ms, pushes of 40 ms",
        r"latency  2 blocks x \(1 \+ 2\) frames of look-ahead x 40 ms = 240 ms: rows came 6 frames late at most",
        r"then [\d.]+ ms of computing a push \(median; [\d.]+ for 99 in 100, [\d.]+ at worst\)",
        r"memory   [\d.]+ MiB held",
        "offline  all 49 frames at once",
    ):
        assert re.search(words, run.stdout), words
    assert not list(tmp_path.iterdir())


def test_one_push(tmp_path):
    run = run_script("--seconds", "1", "--blocks", "1", "--push", "5000", cwd=tmp_path, path=tmp_path)
    assert run.returncode == 0, run.stderr + run.stdout
    assert "heard    1 s, 24 frames" in run.stdout


def test_unusable_input_is_explained(tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    for arguments, status, words in [
        (["--frame", "20"], 2, "invalid choice: 20"),
        (["--seconds", "0"], 2, "at least 1"),
        (["--kernel", "3", "--kernel-right", "3"], 2, "--kernel-right must be less than --kernel, 3, not 3"),
        (["--right", "-1"], 2, "at least 0"),
        (["nowhere.wav"], 1, "nowhere.wav cannot be read"),
        (["text.wav"], 1, "text.wav cannot be read as a WAV file"),
    ]:
        run = run_script(*arguments, cwd=tmp_path)
        assert run.returncode == status, run.stderr
        assert words in run.stderr
        assert "Traceback" not in run.stderr


def test_missing_package_is_explained(tmp_path):
    run = run_script("--seconds", "1", without="fastattn", cwd=tmp_path)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "the package fastattn is not installed" in run.stderr
    assert "pip install ." in run.stderr
