"""The bundled model with latent attention, experts and an MTP module: the tokens are transformers', and drafts are accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autospec
from autospec.loading import load_model
from autospec.model_zoo.bundled import demo_prompts, resolve
from autospec.training.features import Target
from autospec.training.loop import Batch, acceptance
from autospec.training.mtp import MTPLoss, begin_from, new_mtp

NAME = "bundled:mla"


@pytest.fixture(scope="module")
def target() -> Any:
    return load_model(NAME, "model").float()


@pytest.fixture(scope="module")
def text(target: Any) -> Tensor:
    """[1, S] a prompt of 60 tokens, and what transformers says to it."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(resolve(NAME))
    ids = tokenizer(demo_prompts()[0]["text"], return_tensors="pt").input_ids[:, :60]
    found: Tensor = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
    return found


def test_its_tokens_are_transformers_and_its_module_is_accepted(target: Any, text: Tensor) -> None:
    fast = autospec.optimize(target, autospec.MTPConfig(max_draft_len=3), compile="eager")
    assert torch.equal(fast.generate(text[:, :60], max_new_tokens=48, do_sample=False), text)
    assert fast.metrics.mean_acceptance_length > 1.8  # measured 1.96
    assert fast.program.facts.bytes_per_token == 4 * (32 + 16) * 4


@torch.no_grad()
def chain(loss: MTPLoss, text: Tensor) -> float:
    """Acceptance length of a chain of 3 at teacher forcing, on what the target said itself."""
    weights = torch.zeros(text.shape)
    weights[:, 60:-1] = 1.0
    batch = Batch(text, weights)
    _, measured = loss(text, weights, loss.features(batch))
    return acceptance(measured[2] / loss.count(batch))


def test_a_module_that_reads_its_inputs_in_the_wrong_order_is_seen(target: Any, text: Tensor) -> None:
    frozen = Target(target)
    head = new_mtp(frozen)
    begin_from(head, resolve(NAME))
    loss = MTPLoss(frozen, head, steps=3)
    assert chain(loss, text) > 1.7  # measured 1.89
    module: Any = head.depths[0]
    module.proj.weight.data = module.proj.weight.data.roll(module.proj.in_features // 2, dims=1)
    assert chain(loss, text) < 1.2  # measured 1.00
    frozen.close()
