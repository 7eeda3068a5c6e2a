"""The verb: a head of the bundled target's sizes, its report, and what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from autospec import check_draft
from autospec.errors import OptionError
from autospec.heads.checkpoint import save_head
from autospec.heads.medusa import MedusaHeads
from autospec.model_zoo.bundled import resolve
from autospec.training.features import Features
from autospec.training.mtp import MTPLoss


@pytest.fixture
def head(tmp_path: Path) -> str:
    config = AutoConfig.from_pretrained(resolve("bundled:target"))
    save_head(MedusaHeads(config.hidden_size, config.vocab_size, 2), tmp_path / "head")
    return str(tmp_path / "head")


def test_a_report_is_printed(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    assert check_draft.run(["bundled:target", head, "--max-new-tokens", "16", "--top-k", "3"]) == 0
    out = capsys.readouterr().out
    assert "medusa layout" in out
    assert "top-1/top-3 agreement" in out
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n")
    assert check_draft.run(["bundled:target", head, "--text", str(tmp_path / "text.txt")]) == 0


def test_a_text_that_is_not_there(head: str) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        check_draft.run(["bundled:target", head, "--text", "no-such-file.txt"])


def test_mtp_modules_are_compared_on_both_sides_of_the_norm(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bundled:mla", "mtp", "--prompt", "def add(a, b):", "--max-new-tokens", "64", "--steps", "3"]
    assert check_draft.run(words) == 0
    out = capsys.readouterr().out
    assert "deepseek layout" in out
    assert "as the layout says" in out


@pytest.mark.parametrize("other", [0.9, 0.55])
def test_modules_that_agree_more_on_the_other_side_are_told(
    other: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planted: at level 3 half of the guesses agree as the layout says, and `other` of them before the norm."""

    def planted(self: MTPLoss, tokens: Tensor, weights: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        last = 0.5 if self.mtp.layout.recycles_normed else other
        agreed = torch.tensor([0.6, 0.6, last]) * (tokens.shape[1] - 3)
        return agreed.sum(), torch.stack([agreed] * 3)

    monkeypatch.setattr(MTPLoss, "forward", planted)
    status = check_draft.run(["bundled:mla", "mtp", "--prompt", "def add(a, b):", "--max-new-tokens", "64"])
    assert status == (other == 0.9)
    assert ("probably trained on hidden states before the norm" in capsys.readouterr().out) == (other == 0.9)
