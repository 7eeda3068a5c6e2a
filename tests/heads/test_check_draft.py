"""The verb: a head of the bundled target's sizes, its report, and what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from autospec import check_draft
from autospec.errors import OptionError
from autospec.heads.checkpoint import save_head
from autospec.heads.medusa import MedusaHeads
from autospec.model_zoo.bundled import resolve


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
