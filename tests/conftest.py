"""What all tests share: a seeded generator, hypothesis profiles, and a report of the kernels that were tested."""

import os
import re

import hypothesis
import numpy as np
import pytest

import fastattn
from fastattn import _runtime

# Derandomised: the same examples on every run. HYPOTHESIS_PROFILE=explore searches for new ones.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    max_examples=150,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
    "explore", parent=hypothesis.settings.get_profile("fixed"), derandomize=False, max_examples=5000
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture
def rng():
    """A generator with the same seed in every test."""
    return np.random.default_rng(20240607)


def built_instruction_sets():
    """The instruction sets in this build, whether this CPU can run them or not."""
    with open(_runtime.__file__, "rb") as file:
        return sorted({name.decode() for name in re.findall(rb"kernels_(?:f32|bf16)_(\w+)\0", file.read())})


def describe_instruction_sets(selected, runnable, built, forced):
    """Lines that say which kernels the tests ran on, and which they did not."""
    lines = [f"{selected}: tested, {'forced by FASTATTN_ISA' if forced else 'the best that this CPU can run'}"]
    for name in sorted({*runnable, *built} - {selected}):
        if name in runnable:
            lines.append(f"{name}: NOT tested but for a few tests that force it; FASTATTN_ISA={name} runs all on it")
        else:
            lines.append(f"{name}: NOT tested, this CPU cannot run it; the build has it")
    return lines


def pytest_terminal_summary(terminalreporter):
    """A green result says nothing about kernels that did not run: this does."""
    info = fastattn.cpu_info()
    forced = bool(os.environ.get("FASTATTN_ISA"))
    terminalreporter.section("instruction sets")
    for line in describe_instruction_sets(info["selected"], info["runnable"], built_instruction_sets(), forced):
        terminalreporter.line(line)
