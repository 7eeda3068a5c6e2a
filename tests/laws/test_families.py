"""Ten families decode as transformers does: greedy with every drafter, and sampled the same whoever drafts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from autospec.api import Limits, OptimizedModel
from autospec.assemble import capture_model
from autospec.capture_head import capture_head
from autospec.config import DraftTargetConfig, Eagle3Config, NGramConfig
from autospec.heads.eagle3 import Eagle3Head, Eagle3Spec
from autospec.program import CapturedModel
from autospec.tiny_models import lively_model, tiny_model
from autospec.zoo import reference_tokens

# All kinds of layers appear: windows, chunks, layers without rotary positions, dense and sparse ones.
FAMILIES = {
    "llama": 2, "qwen3": 2, "gemma2": 2, "gemma3_text": 2, "mixtral": 2, "phi3": 2, "gpt2": 2, "gpt_oss": 2, "llama4_text": 4,
    "deepseek_v3": 2,
}  # fmt: skip
PROMPT_LENS, NEW_TOKENS = (19, 12, 5), 64
CHOICES = [[0], [1], [3], [0, 0], [0, 2], [1, 0], [0, 0, 0]]
GROWN: dict[str, Any] = {"dynamic_tree_max_topk": 2, "max_total_draft_tokens": 5}


@functools.cache
def target(family: str) -> tuple[Any, list[list[int]], CapturedModel]:
    model, prompts, distinct = lively_model(family, PROMPT_LENS, NEW_TOKENS, num_hidden_layers=FAMILIES[family])
    assert distinct >= 8, "the greedy text collapsed, so comparing it says little"
    return model, prompts, capture_model(model)


@functools.cache
def small_draft() -> CapturedModel:
    return capture_model(tiny_model("llama", seed=1, num_hidden_layers=1), "draft")


def random_head(family: str) -> Eagle3Head:
    """An EAGLE-3 head of random weights over the target's embedding; it taps the first layer twice and the last."""
    model, _, _ = target(family)
    embedding, layers = model.get_input_embeddings().weight, FAMILIES[family]
    width = embedding.shape[1]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=embedding.shape[0], max_position_embeddings=256,
    )  # fmt: skip
    spec = Eagle3Spec(layer=config, draft_vocab_size=96, tap_after=(0, 0, layers - 1), target_hidden_size=width)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Eagle3Head(spec, embedding.detach()).eval()


def optimized(family: str, drafter: str) -> OptimizedModel:
    _, _, captured = target(family)
    if drafter == "plain":
        return OptimizedModel(captured, None, None, "eager", Limits(None, None, None), {})
    if drafter == "ngram":
        return OptimizedModel(captured, None, NGramConfig(max_draft_len=4), "eager", Limits(None, None, None), {})
    if drafter == "eagle static":
        made = random_head(family)
        return OptimizedModel(
            captured, capture_head(made, captured), Eagle3Config(made, eagle_choices=CHOICES), "eager", Limits(None, None, None), {}
        )
    draft = captured if drafter == "self static" else small_draft()
    tree = {"small dynamic": GROWN, "self static": {"eagle_choices": CHOICES}}.get(drafter, {})
    speculation = DraftTargetConfig(draft, max_draft_len=3, **tree)
    return OptimizedModel(captured, draft, speculation, "eager", Limits(None, None, None), {})


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers(family):
    model, prompts, _ = target(family)
    expected, _ = reference_tokens(model, prompts, NEW_TOKENS)
    for drafter in ("plain", "ngram", "small", "small dynamic", "eagle static"):
        got = optimized(family, drafter).generate(prompts, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        assert torch.equal(got[:, max(PROMPT_LENS) :], expected), drafter


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_text_does_not_depend_on_the_drafter(family, seed):
    _, prompts, _ = target(family)
    print(f"seed {seed}")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 0.8, "seed": seed, "pad_token_id": 0}
    texts = {}
    for drafter in ("plain", "ngram", "self static"):
        fast = optimized(family, drafter)
        texts[drafter] = fast.generate(prompts, **options)
    assert torch.equal(texts["plain"], texts["ngram"])
    assert torch.equal(texts["plain"], texts["self static"])
    assert fast.metrics.mean_acceptance_length > 3.5, "the first branch of a draft equal to the target is accepted but at the end"
    other = optimized(family, "plain").generate(prompts, **{**options, "seed": seed + 1})
    assert not torch.equal(other, texts["plain"]), "another seed gives another text"
