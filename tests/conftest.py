"""What all tests share: one seed that is printed, one thread, and tiny models that are captured once per process."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))  # `harness`: what tests of several folders import

SEED = "AUTOSPEC_TEST_SEED"
hypothesis.settings.register_profile(
    "autospec",
    deadline=None,
    print_blob=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("autospec")


def pytest_configure(config: pytest.Config) -> None:
    """Draw the seed once, before workers start: they inherit the environment."""
    os.environ.setdefault(SEED, str(random.SystemRandom().randrange(2**31)))
    # A model of this size gains nothing from threads, and two workers that take all cores each lose everything.
    torch.set_num_threads(1)


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {SEED}={os.environ[SEED]}"


@pytest.fixture(autouse=True)
def seed() -> int:
    """The run's seed, with torch and random set to it before every test."""
    value = int(os.environ[SEED])
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The GPU; tests that ask for it carry the mark `cuda`."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")
