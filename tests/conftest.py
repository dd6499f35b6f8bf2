"""What all tests share: a seeded generator, and how long hypothesis may look for trouble."""

import os

import hypothesis
import numpy as np
import pytest

# Derandomised: the same examples on every run. HYPOTHESIS_PROFILE=explore looks for new ones.
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
