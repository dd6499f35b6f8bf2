"""The alignment example: its gradients are right, it learns what it claims, and the script runs with clear messages.

The script needs tqdm (the `examples` extra), the picture matplotlib. Tests for what is not installed are skipped, with
the reason.
"""

import importlib.util
import os
import random
import re
import subprocess
import sys
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pytest

import fastattn

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "alignment.py"
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None

needs_tqdm = pytest.mark.skipif(importlib.util.find_spec("tqdm") is None, reason="the examples need tqdm")

ATTENTION = fastattn.additive_attention, fastattn.additive_attention_vjp

# From one character to more than twenty.
SOURCES = ["7", "3 May 1979", "05/03/79", "the 20th of July, 1969"]
TARGETS = ["2007-07-07", "1979-05-03", "1979-05-03", "1969-07-20"]


@pytest.fixture(scope="module")
def alignment():
    """The module examples/alignment.py, which is not in a package."""
    spec = importlib.util.spec_from_file_location("alignment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(alignment):
    """A model after a quarter of the script's training, and the losses on the way."""
    model = alignment.Aligner(*ATTENTION, np.random.default_rng(0))
    return model, list(alignment.train(model, random.Random(0), steps=400, batch=48))


# ----------------------------------------------------------------------------------------------- the dates


# What strptime may read, with a four-digit year (Y) or a two-digit one (y).
DATE_FORMS = "%d %B %{0}/%d %b %{0}/%B %d %{0}/%b %d %{0}/%d-%B-%{0}/%d-%b-%{0}/%d.%m.%{0}/%Y-%m-%d".split("/")
DATE_FORMS.append("%m/%d/%{0}")


def read_date(text):
    """Parse a spelled date independently, with strptime; its two-digit years are those of POSIX too."""
    words = re.sub(r"(?<=\d)(st|nd|rd|th)", "", text)
    words = re.sub(r"(?<=[a-z])\.", "", words)
    words = re.sub(r"\b(the|of|\w+day|Mon|Tue|Wed|Thu|Fri|Sat|Sun)\b|,", " ", words)
    words = re.sub(r"(?<=\.) ", "", " ".join(words.split()))
    for form in DATE_FORMS:
        for year in "Yy":
            try:
                return datetime.strptime(words, form.format(year)).date()
            except ValueError:
                pass
    raise AssertionError(f"cannot read {text!r}, {words!r}")


def test_spellings_mean_their_dates(alignment):
    sources, targets = alignment.random_dates(600, random.Random(1))
    for source, target in zip(sources, targets, strict=True):
        assert read_date(source).isoformat() == target, source
        assert len(source) <= alignment.MAX_CHARACTERS
        assert set(source.lower()) <= set(alignment.SOURCE_CODES)
        weekday = re.search(r"(Mon|Tues?|Wed|Thu|Fri|Sat|Sun)[a-z]*", source)
        assert not weekday or date.fromisoformat(target).strftime("%A").startswith(weekday[0])
    assert len(set(sources)) > 590


def test_held_out_days_are_in_no_training_set(alignment):
    for held_out in (False, True):
        _, targets = alignment.random_dates(500, random.Random(2), held_out=held_out)
        assert {date.fromisoformat(target).toordinal() % 10 == 0 for target in targets} == {held_out}


# ----------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    "name", ["w_query", "w_key", "b_hidden", "w_score", "w_value", "w_mix", "b_mix", "w_out", "b_out"]
)
def test_gradients_match_finite_differences(alignment, name):
    """Along random directions, which involve every entry of a parameter."""
    rng = np.random.default_rng(3)
    model = alignment.Aligner(*ATTENTION, rng, np.float64, hidden=7, features=5, mixed=6)
    for parameter in model.parameters.values():
        parameter += 0.1 * rng.standard_normal(parameter.shape)  # biases away from zero
    _, gradients = model.loss_and_gradients(SOURCES, TARGETS)
    assert gradients.keys() == model.parameters.keys()
    parameter = model.parameters[name]
    start = parameter.copy()
    assert gradients[name].shape == start.shape
    assert gradients[name].dtype == np.float64
    step = 1e-5
    for _ in range(4):
        direction = rng.standard_normal(start.shape)
        losses = []
        for sign in (1, -1):
            parameter[...] = start + sign * step * direction
            losses.append(model.loss_and_gradients(SOURCES, TARGETS)[0])
        # The error from the third derivative is of the order of step**2, that from rounding eps / step.
        expected = (losses[0] - losses[1]) / (2 * step)
        assert abs((gradients[name] * direction).sum() - expected) <= 1e-8 * max(1, np.linalg.norm(direction))


def test_weights_are_shares_of_what_is_there(alignment):
    model = alignment.Aligner(*ATTENTION, np.random.default_rng(4))
    written, weights = model.translate(SOURCES)
    longest = max(map(len, SOURCES))
    assert [len(text) for text in written] == [10] * len(SOURCES)
    assert weights.shape == (len(SOURCES), 10, longest)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=0, atol=1e-6)
    for source, rows in zip(SOURCES, weights, strict=True):
        assert (rows[:, : len(source)] > 0).all()
        assert (rows[:, len(source) :] == 0).all()


def test_company_changes_no_translation(alignment, trained):
    model, _ = trained
    together, weights = model.translate(SOURCES)
    for source, written, rows in zip(SOURCES, together, weights, strict=True):
        alone, own_rows = model.translate([source])
        assert alone == [written]
        np.testing.assert_allclose(own_rows[0], rows[:, : len(source)], rtol=0, atol=1e-5)


def test_a_few_steps_lower_the_loss(alignment):
    model = alignment.Aligner(*ATTENTION, np.random.default_rng(5))
    losses = list(alignment.train(model, random.Random(5), steps=30, batch=16))
    assert len(losses) == 30
    assert losses[0] > 2  # about log(11): untrained
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


def test_training_is_reproducible(alignment):
    runs = []
    for _ in range(2):
        model = alignment.Aligner(*ATTENTION, np.random.default_rng(6))
        runs.append(list(alignment.train(model, random.Random(6), steps=5, batch=8)))
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-6)


def test_held_out_dates_are_translated(alignment, trained):
    """A quarter of the training reached more than 99 % on the machines tried; the rest is margin."""
    model, losses = trained
    assert np.mean(losses[-20:]) < 0.05
    sources, targets = alignment.random_dates(500, random.Random(7), held_out=True)
    written, _ = model.translate(sources)
    assert np.mean([a == b for a, b in zip(written, targets, strict=True)]) >= 0.97


def test_years_look_at_years_and_months_at_months(alignment, trained):
    """The heat map means something: most of the attention falls where a person would look."""
    model, _ = trained
    days = [date(1600 + 7 * n, 1 + n % 12, 1 + 3 * n % 28) for n in range(40)]
    texts = [f"{day.day} {alignment.MONTHS[day.month - 1]} {day.year}" for day in days]
    written, weights = model.translate(texts)
    assert np.mean([a == day.isoformat() for a, day in zip(written, days, strict=True)]) >= 0.9
    year, month = [], []
    for text, rows in zip(texts, weights, strict=True):
        start, end = text.index(" "), text.rindex(" ")
        year.append(rows[:4, end + 1 : len(text)].sum(-1).mean())
        month.append(rows[5:7, start : end + 1].sum(-1).mean())
    assert np.mean(year) >= 0.8
    assert np.mean(month) >= 0.7


def test_unknown_characters_are_spaces(alignment):
    model = alignment.Aligner(*ATTENTION, np.random.default_rng(8))
    for a, b in zip(model.keys(["3\u00a0MAY 日"]), model.keys(["3 may  "]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_description_names_what_was_looked_at(alignment):
    weights = np.zeros((10, 3))
    weights[:, 1] = 1
    weights[9] = [0.25, 0.05, 0.7]
    lines = alignment.describe("abc", "1979-05-03", weights).splitlines()
    assert lines[0] == "abc -> 1979-05-03"
    assert lines[3].split(maxsplit=1) == ["1", "@    'b' 100%"]
    assert lines[-1].endswith("'c' 70%, 'a' 25%")
    assert alignment.describe("abc", "1979-02-30", weights).startswith("abc -> 1979-02-30  (which is no date)")


# ---------------------------------------------------------------------------------------------- the script


def run_script(*arguments, without=None, cwd=None):
    """Run alignment.py in a separate process; `without` hides a package from it."""
    command = [sys.executable, str(SCRIPT), *arguments]
    if without:
        hide = f"import runpy, sys; sys.modules[{without!r}] = None; sys.argv = sys.argv[1:]; "
        hide += "runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-P", "-c", hide, *command[1:]]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, check=False, capture_output=True, encoding="utf-8", env=environment, cwd=cwd)


SHORT = ("--steps", "40", "--batch", "8", "--held-out", "20")


@needs_tqdm
def test_script_translates_and_shows(tmp_path):
    run = run_script("Thursday, 3 May 1979", "05/03/79", *SHORT, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Thursday, 3 May 1979 -> " in run.stdout
    assert "05/03/79 -> " in run.stdout
    assert re.search(r"Of 20 dates kept from it, it writes [\d.]+% right", run.stdout)
    assert len(re.findall(r"^    [\d-] ", run.stdout, re.M)) == 20  # a row for each character written
    assert "40/40" in run.stderr  # the progress bar
    assert "loss=" in run.stderr


@needs_tqdm
@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
@pytest.mark.parametrize("texts", [["1/2/79"], []], ids=["one text", "default texts"])
def test_script_draws(tmp_path, texts):
    path = tmp_path / "drawn.png"
    run = run_script(*texts, "--output", str(path), *SHORT, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert f"Drawn in {path}" in run.stdout
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(header[at : at + 4], "big") for at in (16, 20))
    assert 500 < width < 3000
    assert 500 < height < 3000


@needs_tqdm
def test_script_needs_no_matplotlib(tmp_path):
    run = run_script("3 May 1979", *SHORT, without="matplotlib", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "3 May 1979 -> " in run.stdout
    assert "pip install matplotlib" in run.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", [pytest.param("fastattn", marks=needs_tqdm), "tqdm"])
def test_missing_package_is_explained(package):
    run = run_script("3 May 1979", without=package)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert f"package {package} is not installed" in run.stderr
    assert 'pip install ".[examples]"' in run.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["  "], "1 to 48 characters, not 0"),
        (["3 May 1979" * 5], "1 to 48 characters, not 50"),
        (["x", "--steps", "0"], "at least 1, not 0"),
        (["x", "--output", "picture.txt"], "must end in .png"),
        (["x", "--output", "nowhere/picture.png"], "no folder 'nowhere'"),
    ],
)
def test_unusable_input_is_explained(tmp_path, arguments, words):
    run = run_script(*arguments, cwd=tmp_path)
    assert run.returncode == 2
    assert words in run.stderr
    assert "Traceback" not in run.stderr
