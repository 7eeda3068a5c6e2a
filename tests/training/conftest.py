"""A tiny target with three taps."""

from __future__ import annotations

import pytest
from harness.training import tiny_model
from transformers import LlamaForCausalLM

from autospec.training.features import Target


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture
def target(model: LlamaForCausalLM) -> Target:
    return Target(model, (0, 1, 3))
