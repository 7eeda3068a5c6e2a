"""Ten families decode as transformers does: greedy with every drafter, and sampled the same whoever drafts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from autospec.api import Limits, OptimizedModel
from autospec.assemble import capture_model
from autospec.config import DraftTargetConfig, NGramConfig
from autospec.program import CapturedModel
from autospec.tiny_models import lively_model, tiny_model
from autospec.zoo import reference_tokens

# All kinds of layers appear: windows, chunks, layers without rotary positions, dense and sparse ones.
FAMILIES = {
    "llama": 2, "qwen3": 2, "gemma2": 2, "gemma3_text": 2, "mixtral": 2, "phi3": 2, "gpt2": 2, "gpt_oss": 2, "llama4_text": 4,
    "deepseek_v3": 2,
}  # fmt: skip
PROMPT_LENS, NEW_TOKENS = (19, 12, 5), 64


@functools.cache
def target(family: str) -> tuple[Any, list[list[int]], CapturedModel]:
    model, prompts, distinct = lively_model(family, PROMPT_LENS, NEW_TOKENS, num_hidden_layers=FAMILIES[family])
    assert distinct >= 8, "the greedy text collapsed, so comparing it says little"
    return model, prompts, capture_model(model)


@functools.cache
def small_draft() -> CapturedModel:
    return capture_model(tiny_model("llama", seed=1, num_hidden_layers=1), "draft")


def optimized(family: str, drafter: str) -> OptimizedModel:
    _, _, captured = target(family)
    if drafter == "plain":
        return OptimizedModel(captured, None, None, "eager", Limits(None, None, None), {})
    if drafter == "ngram":
        return OptimizedModel(captured, None, NGramConfig(max_draft_len=4), "eager", Limits(None, None, None), {})
    draft = small_draft() if drafter == "small" else captured
    speculation = DraftTargetConfig(draft, max_draft_len=3)
    return OptimizedModel(captured, draft, speculation, "eager", Limits(None, None, None), {})


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers(family):
    model, prompts, _ = target(family)
    expected, _ = reference_tokens(model, prompts, NEW_TOKENS)
    for drafter in ("plain", "ngram", "small"):
        got = optimized(family, drafter).generate(prompts, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        assert torch.equal(got[:, max(PROMPT_LENS) :], expected), drafter


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_text_does_not_depend_on_the_drafter(family, seed):
    _, prompts, _ = target(family)
    print(f"seed {seed}")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 0.8, "seed": seed, "pad_token_id": 0}
    texts = {}
    for drafter in ("plain", "ngram", "self"):
        fast = optimized(family, drafter)
        texts[drafter] = fast.generate(prompts, **options)
    assert torch.equal(texts["plain"], texts["ngram"])
    assert torch.equal(texts["plain"], texts["self"])
    assert fast.metrics.mean_acceptance_length > 3.5, "a draft equal to the target is accepted but at the end"
    other = optimized(family, "plain").generate(prompts, **{**options, "seed": seed + 1})
    assert not torch.equal(other, texts["plain"]), "another seed gives another text"
