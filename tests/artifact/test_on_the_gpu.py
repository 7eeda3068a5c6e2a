"""Artifacts on a GPU: portable graphs and packages give the tokens of the exporting process; another device is told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import tiny

import autospec
from autospec.errors import ArtifactError

pytestmark = [pytest.mark.cuda, pytest.mark.compiled]
PROMPTS = [[5, 9, 2, 44, 5, 9, 2], [17, 3, 17, 3, 17]]
OPTIONS: tuple[dict[str, Any], ...] = (
    {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0},
    {"do_sample": True, "temperature": 0.9, "top_k": 0, "seed": 7, "max_new_tokens": 24, "pad_token_id": 0},
)


@pytest.fixture(scope="module")
def exported(cuda: torch.device, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """An artifact with packages, and the tokens of the process that wrote it."""
    model = tiny("llama", seed=3).to(cuda)
    speculation = autospec.DraftTargetConfig(model, dynamic_tree_max_topk=2, max_draft_len=2, max_total_draft_tokens=4)
    fast = autospec.optimize(model, speculation, max_length=64)
    expected = [fast.generate(PROMPTS, **options) for options in OPTIONS]
    folder = tmp_path_factory.mktemp("gpu") / "made"
    return fast.save(folder, batch_sizes=(2,), sampling=True, compile="aot"), expected


@pytest.mark.parametrize("how", ["aot", "inductor", "eager"])
def test_tokens_are_the_same(exported: tuple[Path, list[torch.Tensor]], how: str) -> None:
    folder, expected = exported
    saved = autospec.load(folder, compile=how)
    for options, tokens in zip(OPTIONS, expected, strict=True):
        assert torch.equal(saved.generate(PROMPTS, **options), tokens), options


def test_the_packages_stay_on_the_gpu(exported: tuple[Path, list[torch.Tensor]]) -> None:
    folder, expected = exported
    with pytest.raises(ArtifactError, match="the packages are for cuda, not for cpu"):
        autospec.load(folder, device="cpu")
    saved = autospec.load(folder, device="cpu", compile="eager")
    assert torch.equal(saved.generate(PROMPTS, **OPTIONS[0]), expected[0])
