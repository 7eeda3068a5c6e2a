"""Artifacts on a GPU: portable graphs and packages give the tokens of the exporting process; another device is told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness.artifacts import FAMILIES, KINDS, OPTIONS, PROMPTS, demo, family, same_elsewhere
from harness.models import tiny

import autospec
from autospec.api import OptimizedModel
from autospec.errors import ArtifactError

pytestmark = [pytest.mark.cuda, pytest.mark.compiled]


def test_portable_graphs_in_a_fresh_process(cuda: torch.device, tmp_path: Path) -> None:
    """The bundled model with three drafters, and four families."""
    device = cuda.type
    models = [*(demo(kind, device) for kind in KINDS), *(family(name, device) for name in FAMILIES)]
    same_elsewhere(tmp_path, models, max_length=64)


def drafted(device: str) -> OptimizedModel:
    """A tiny model that is its own draft model, with a dynamic tree."""
    model = tiny("llama", seed=3).to(device)
    speculation = autospec.DraftTargetConfig(model, dynamic_tree_max_topk=2, max_draft_len=2, max_total_draft_tokens=4)
    return autospec.optimize(model, speculation, max_length=64, compile="eager")


@pytest.mark.parametrize("kind", ["draft", "eagle3"])
def test_packages_in_a_fresh_process(cuda: torch.device, kind: str, tmp_path: Path) -> None:
    """Steps of packages, prompts and sampling included; then the same artifact where its packages cannot run."""
    fast = drafted(cuda.type) if kind == "draft" else demo("eagle3", cuda.type)
    same_elsewhere(tmp_path, [fast], "aot", batch_sizes=(3,), compile="aot")
    with pytest.raises(ArtifactError, match="the packages are for cuda, not for cpu"):
        autospec.load(tmp_path / "0", device="cpu")
    saved = autospec.load(tmp_path / "0", device="cpu", compile="eager")
    options = {"max_new_tokens": 12, "pad_token_id": 0, **OPTIONS[0]}
    assert torch.equal(saved.generate(PROMPTS, **options), fast.generate(PROMPTS, **options).cpu())
