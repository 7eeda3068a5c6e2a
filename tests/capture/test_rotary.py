"""Rotary embeddings that change with the longest position: decoded as transformers does up to the change, then refused."""

from __future__ import annotations

import pytest
import torch

from autospec.api import Limits, OptimizedModel
from autospec.assemble import capture_model
from autospec.config import NGramConfig
from autospec.errors import CapacityError
from autospec.tiny_models import tiny_model
from autospec.zoo import reference_tokens

CHANGE = 32
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": CHANGE,
}  # fmt: skip
CASES = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": CHANGE}),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, "max_position_embeddings": CHANGE},
    ),
}
UNCHANGING = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": CHANGE},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": CHANGE,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip
PROMPTS = [[5, 9, 2, 44, 31, 7, 5, 9, 2], [100, 3, 27]]


def tokens(model, new_tokens):
    fast = OptimizedModel(capture_model(model), None, NGramConfig(3), "eager", Limits(None, None, None), {})
    return fast, fast.generate(PROMPTS, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)[:, len(PROMPTS[0]) :]


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("is_used_before", [False, True])
def test_up_to_the_change(kind, is_used_before):
    model_type, config = CASES[kind]
    model = tiny_model(model_type, num_hidden_layers=2, **config)
    if is_used_before:
        model.generate(torch.arange(2, CHANGE + 6)[None], max_new_tokens=3)
    new_tokens = CHANGE - len(PROMPTS[0])
    expected, _ = reference_tokens(model, PROMPTS, new_tokens)
    fast, got = tokens(model, new_tokens)
    assert torch.equal(got, expected)
    assert fast.target.facts.max_positions == CHANGE
    details = [detail for record in fast.target.records for detail in record.details]
    assert kind == "dynamic" or any("rotary frequencies change" in detail for detail in details)
    model.generate(torch.arange(2, CHANGE + 6)[None], max_new_tokens=3)  # writes the long frequencies to the model
    again = fast.generate(PROMPTS, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    assert torch.equal(again[:, len(PROMPTS[0]) :], expected)


@pytest.mark.parametrize("kind", CASES)
def test_past_the_change(kind):
    model_type, config = CASES[kind]
    model = tiny_model(model_type, num_hidden_layers=2, **config)
    with pytest.raises(CapacityError, match=f"the model has {CHANGE} positions"):
        tokens(model, CHANGE - len(PROMPTS[0]) + 1)


@pytest.mark.parametrize("kind", UNCHANGING)
def test_embeddings_that_do_not_change(kind):
    model = tiny_model("llama", num_hidden_layers=2, rope_parameters=UNCHANGING[kind])
    expected, _ = reference_tokens(model, PROMPTS, 2 * CHANGE)
    assert torch.equal(tokens(model, 2 * CHANGE)[1], expected)
