"""The example for keys in files: parts give the same as the whole, with the rules that it supports; the script runs.

The script needs tqdm (the `examples` extra). If it is not installed these tests are skipped, with the reason.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastattn

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "larger_than_memory.py"

needs_tqdm = pytest.mark.skipif(importlib.util.find_spec("tqdm") is None, reason="the examples need tqdm")


@pytest.fixture(scope="module")
def example():
    """The module examples/larger_than_memory.py, which is not in a package."""
    spec = importlib.util.spec_from_file_location("larger_than_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problem(rng, dtype=np.float32):
    shapes = (2, 3, 5, 16), (2, 3, 103, 16), (2, 3, 103, 8)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


RULES = {
    "all": {},
    "causal": {"is_causal": True},
    "lengths": {"key_lengths": np.array([[103], [40]])},
    "a length of 0": {"key_lengths": np.array([[0], [11]])},
    "causal, lengths": {"is_causal": True, "key_lengths": np.array([[99], [3]])},
    "one length": {"key_lengths": 60},
    "window": {"window_size": (30, 2)},
    "scale, softcap": {"scale": 0.7, "softcap": 5.0, "num_threads": 1},
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("part", [1, 10, 64, 103, 1000])
def test_parts_give_the_whole(example, rng, rules, part):
    query, key, value = problem(rng, np.float64)
    out = example.attend_in_parts(query, key, value, part, **rules)
    whole = fastattn.dot_product_attention(query, key, value, **rules)
    assert out.dtype == whole.dtype
    np.testing.assert_allclose(out, whole, rtol=1e-12, atol=1e-13)


def test_float32_and_grouped_heads(example, rng):
    query, key, value = problem(rng)
    query = np.concatenate([query, query[::-1]], axis=1)
    out = example.attend_in_parts(query, key, value, 25, enable_gqa=True)
    assert out.dtype == np.float32
    whole = fastattn.dot_product_attention(query, key, value, enable_gqa=True)
    np.testing.assert_allclose(out, whole, rtol=0, atol=2e-6)


def test_progress_counts_every_key(example, rng):
    seen = []
    example.attend_in_parts(*problem(rng), 25, progress=seen.append)
    assert seen == [25, 25, 25, 25, 3]


def test_memory_maps(example, rng, tmp_path):
    seen = []
    key, value = (example.make_file(tmp_path / name, 20000, rng, seen.append) for name in "kv")
    assert key.shape == (example.HEADS, 20000, example.HEAD_DIM)
    assert sum(seen) == 2 * key.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert not np.array_equal(key, value)
    query = rng.standard_normal((example.HEADS, 3, example.HEAD_DIM), np.float32)
    out = example.attend_in_parts(query, key, value, 4099, is_causal=True)
    whole = fastattn.dot_product_attention(query, np.array(key), np.array(value), is_causal=True)
    np.testing.assert_allclose(out, whole, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------- the script


def run_script(*arguments, without=None, cwd=None):
    """Run larger_than_memory.py in a separate process; `without` hides a package from it."""
    command = [sys.executable, str(SCRIPT), *arguments]
    if without:
        hide = f"import runpy, sys; sys.modules[{without!r}] = None; sys.argv = sys.argv[1:]; "
        hide += "runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-P", "-c", hide, *command[1:]]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, check=False, capture_output=True, encoding="utf-8", env=environment, cwd=cwd)


@needs_tqdm
@pytest.mark.parametrize("arguments", [[], ["--causal", "--queries", "1000", "--part", "999"]])
def test_script_runs(tmp_path, arguments):
    run = run_script("--size", "5 MB", "--folder", str(tmp_path), "--threads", "1", *arguments)
    assert run.returncode == 0, run.stderr + run.stdout
    assert "1,220 keys" in run.stdout
    for title in ("First", "Second"):
        assert re.search(rf"{title} pass: [\d.]+ s, [\d.]+ GB/s in parts of [\d,]+ keys", run.stdout)
        assert re.search(rf"{title} pass: 100%.*5\.00M/5\.00M", run.stderr)  # the progress bar
    error = re.search(r"against all the keys in one call: largest difference (\S+)", run.stdout)
    assert float(error[1]) < 1e-6
    assert not list(tmp_path.iterdir())


@needs_tqdm
def test_files_that_do_not_fit_are_refused(tmp_path):
    run = run_script("--size", "1000000TB", "--folder", str(tmp_path))
    assert run.returncode == 1
    assert re.search(r"error: files of [\d,.]+ GB do not fit: [\d,.]+ GB are free", run.stderr)
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("package", [pytest.param("fastattn", marks=needs_tqdm), "tqdm"])
def test_missing_package_is_explained(package):
    run = run_script("--size", "1MB", without=package)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert f"package {package} is not installed" in run.stderr
    assert 'pip install ".[examples]"' in run.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "big"], "a size as 200MB or 20GB, not 'big'"),
        (["--queries", "0"], "at least 1, not 0"),
        (["--part", "0"], "at least 1, not 0"),
        (["--folder", "nowhere"], "no folder 'nowhere'"),
    ],
)
def test_unusable_options_are_explained(example, capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        example.parse_arguments(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_sizes(example):
    for text, size in [("7", 7), ("1.5kB", 1500), ("200MB", 2 * 10**8), ("20 GB", 2 * 10**10), ("1t", 10**12)]:
        assert example.parse_arguments(["--size", text]).size == size
