"""benchmarks/variants.py: it runs at a tiny size and draws, and its forms compute what their names say."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import fresh_process
import numpy as np
import pytest

pytest.importorskip("threadpoolctl", reason="the script limits NumPy's threads by threadpoolctl")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPT = BENCHMARKS / "variants.py"


@pytest.fixture(scope="module")
def variants():
    """The module benchmarks/variants.py, which is not in a package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("variants", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=fresh_process.environment())


def table(text, first):
    """{first cell: other cells} of the table that begins with this cell."""
    part = next(part for part in text.split("\n\n") if part.startswith(f"| {first} |"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.strip().splitlines()]
    return {row[0]: row[1:] for row in rows[2:]}


def test_it_measures_and_draws(tmp_path, variants):
    picture, tables = tmp_path / "variants.png", tmp_path / "tables.md"
    drawing = ["--plot", picture] if importlib.util.find_spec("matplotlib") else []
    done = run("--lengths", 128, 64, "--rounds", 1, "--markdown", tables, *drawing)
    assert done.returncode == 0, done.stderr
    text = tables.read_text(encoding="utf-8")
    assert text in done.stdout
    if drawing:
        assert picture.read_bytes().startswith(b"\x89PNG")

    assert [list(table(text, name)) for name in ("milliseconds", "MiB besides the result")] == 2 * [
        list(variants.FORMS)
    ]
    for cells in table(text, "milliseconds").values():
        assert all(float(cell) > 0 for cell in cells[:2])
        assert not cells[2] or cells[2] in ("from 64 on", "from 128 on", "at none of these lengths")
    if sys.platform.startswith("linux"):
        assert all(float(cell) < 16 for cells in table(text, "MiB besides the result").values() for cell in cells)
    errors = table(text, "error")
    assert errors["window of 256"] == ["0.00"] * 6  # it sees all of so few
    assert all(0 <= float(cell) < 20 for cells in errors.values() for cell in cells)


def test_a_length_that_pools_unevenly_is_refused():
    done = run("--lengths", 64, 66)
    assert done.returncode == 2
    assert "multiples of 4, not [64, 66]" in done.stderr


@pytest.mark.parametrize("kind", ["nearby", "kind", "everywhere"])
def test_forms_that_are_exact_where_they_see_all(variants, kind):
    rng = np.random.default_rng(0)
    x = variants.make_input(kind, 128, rng)
    value = rng.standard_normal(x.shape, dtype=np.float32)
    weights = np.exp(x.astype(float) @ x.swapaxes(-1, -2) / 8)
    expected = weights / weights.sum(axis=-1, keepdims=True) @ value
    for name, form in variants.FORMS.items():
        if name.startswith(("full", "its formula", "window", "BigBird", "Reformer")):
            np.testing.assert_allclose(form(128, rng)(x, value), expected, atol=2e-5, err_msg=name)


def test_more_features_bring_performer_nearer(variants, monkeypatch):
    rng = np.random.default_rng(0)
    x, value = (
        variants.make_input("everywhere", 512, rng),
        rng.standard_normal((variants.HEADS, 512, 64), dtype=np.float32),
    )
    full = variants.full(512, rng)(x, value)
    errors = []
    for features in (64, 4096):
        monkeypatch.setattr(variants, "FEATURES", features)
        errors.append(np.linalg.norm(variants.performer(512, rng)(x, value) - full))
    assert errors[1] < 0.6 * errors[0]


def test_wins_are_counted_from_the_length_on_which_all_longer_ones_win(variants):
    times = {64: (1, 0.5), 128: (2, 2.1), 256: (4, 3.9), 512: (8, 6), 1024: (16, 8)}
    results = {
        (name, n): (pair[i], 0, {}) for n, pair in times.items() for i, name in enumerate((variants.FULL, "form"))
    }
    assert variants.wins_from(results, "form") == 512
    assert variants.wins_from({key: (1, 0, {}) for key in results}, "form") is None
