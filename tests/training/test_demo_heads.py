"""The bundled heads draft well for the bundled target, and what breaks them is seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from autospec.heads.checkpoint import load_head
from autospec.model_zoo.bundled import demo_prompts, resolve
from autospec.model_zoo.demo.drafting import CHAIN, TREE
from autospec.model_zoo.demo.evaluate import HeldOut


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve("bundled:target"))
    target = AutoModelForCausalLM.from_pretrained(resolve("bundled:target"), dtype=torch.float32).eval()
    stream = torch.tensor([token for prompt in demo_prompts() for token in tokenizer(prompt["text"])["input_ids"]])
    return HeldOut.of(target, stream, requests=6, prompt_tokens=48, new_tokens=40)


def load(held_out: HeldOut, name: str) -> Any:
    target = held_out.target
    return load_head(
        resolve(name), target_hidden_size=256, target_vocab_size=4096, target_layers=8, lm_head=target.lm_head.weight,
        embed_tokens=target.model.embed_tokens.weight, dtype=torch.float32, device="cpu",
    )  # fmt: skip


def test_the_eagle3_head_drafts_chains_and_trees(held_out: HeldOut) -> None:
    head = load(held_out, "bundled:eagle3")
    chain, tree = held_out.eagle3(head, CHAIN), held_out.eagle3(head, TREE)
    assert chain.acceptance_length > 2.8
    assert tree.acceptance_length > max(3.8, chain.acceptance_length)
    assert chain.reached == sorted(chain.reached, reverse=True)


def shifted(taps: Tensor) -> Tensor:
    """Taps of the token before: what a catch-up that is off by one feeds."""
    return torch.cat([taps[:, :1], taps[:, :-1]], dim=1)


def swapped(taps: Tensor) -> Tensor:
    """The layers in the wrong order."""
    return torch.cat(taps.chunk(3, dim=-1)[::-1], dim=-1)


@pytest.mark.parametrize("planted", [shifted, swapped], ids=lambda f: f.__name__)
def test_wrong_features_cost_acceptance(held_out: HeldOut, planted: Any) -> None:
    head = load(held_out, "bundled:eagle3")
    right = held_out.eagle3(head, CHAIN).acceptance_length
    wrong = replace(held_out, taps=planted(held_out.taps)).eagle3(head, CHAIN).acceptance_length
    assert wrong < 0.8 * right


def test_the_medusa_heads_draft(held_out: HeldOut) -> None:
    assert held_out.medusa(load(held_out, "bundled:medusa")).acceptance_length > 1.1
