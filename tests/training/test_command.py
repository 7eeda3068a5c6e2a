"""`autospec train`, from text files to a folder that load_head reads, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness.training import tiny_model, tiny_tokenizer

from autospec.cli import main
from autospec.heads.checkpoint import load_head
from autospec.heads.eagle3 import Eagle3Head
from autospec.heads.medusa import MedusaHeads
from autospec.heads.mtp_files import load_mtp

VOCAB = 260
TEXT = "def add(a, b):\n    return a + b\n\n" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(vocab_size=VOCAB).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (path / "text.txt").write_text(TEXT)
    lines = [json.dumps({"text": f"line {i} of the text, and some more of it"}) for i in range(20)]
    (path / "lines.jsonl").write_text("\n".join(lines))
    return path


def train(kind: str, folder: Path, out: Path, *more: str) -> int:
    data = [str(folder / "text.txt"), str(folder / "lines.jsonl")]
    options = ["--length", "32", "--batch-size", "4", "--device", "cpu", "--held-out", "0.1", *more]
    return main(["train", kind, str(folder), "--data", *data, "--out", str(out), *options])


def load(folder: Path, out: Path) -> Eagle3Head | MedusaHeads:
    model = tiny_model(vocab_size=VOCAB)
    return load_head(
        out, target_hidden_size=32, target_vocab_size=VOCAB, target_layers=4, embed_tokens=model.get_input_embeddings().weight,
        lm_head=model.lm_head.weight, dtype=torch.float32, device="cpu",
    )  # fmt: skip


def test_an_eagle3_head_is_trained_and_loads(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--steps", "6", "--draft-vocab-size", "80", "--self-generated", "0.3", "--learning-rate", "0.01")
    assert train("eagle3", folder, tmp_path, *more) == 0
    assert "held-out rows: loss" in capsys.readouterr().out
    head = load(folder, tmp_path)
    assert isinstance(head, Eagle3Head)
    assert head.spec.tap_after == (0, 1, 3)
    assert head.d2t is not None
    assert len(head.d2t) == 80
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["options"]["draft_vocab_size"] == 80
    assert len(record["agreement"]) == 7
    assert record["history"]["train"][-1][1] < record["history"]["train"][0][1]
    assert (tmp_path / "training.png").stat().st_size > 5000


@pytest.mark.parametrize("more", [(), ("--share-lm-head", "--hard", "--num-layers", "2")], ids=["own", "shared"])
def test_medusa_heads_are_trained_and_load(folder: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    assert train("medusa", folder, tmp_path, "--steps", "3", "--num-heads", "2", *more) == 0
    heads = load(folder, tmp_path)
    assert isinstance(heads, MedusaHeads)
    assert heads.num_heads == 2
    assert heads.own_lm_heads is not bool(more)


def test_taps_of_another_number_are_saved_for_those_who_read_them(folder: Path, tmp_path: Path) -> None:
    assert train("eagle3", folder, tmp_path, "--steps", "1", "--tap-after", "1", "2") == 0
    head = load(folder, tmp_path)
    assert isinstance(head, Eagle3Head)
    assert head.spec.tap_after == (1, 2)
    assert head.d2t is None  # all of a small vocabulary


def test_mtp_modules_are_trained_and_load(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--steps", "6", "--num-modules", "2", "--unrolled-steps", "4", "--learning-rate", "0.01", "--save-every", "3")
    assert train("mtp", folder, tmp_path, *asked) == 0
    assert "held-out rows: loss" in capsys.readouterr().out
    assert len(load_mtp(tmp_path, tiny_model(vocab_size=VOCAB), 8).depths) == 2
    record = json.loads((tmp_path / "training.json").read_text())
    assert len(record["agreement"]) == 4
    assert record["history"]["train"][-1][1] < record["history"]["train"][0][1]
    before = (tmp_path / "model.safetensors").read_bytes()
    assert train("mtp", folder, tmp_path, *asked, "--resume") == 0
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert train("mtp", folder, tmp_path, "--num-modules", "4") == 2
    assert "4 modules are not reached in 3 draft tokens" in capsys.readouterr().err


def test_a_run_is_continued(folder: Path, tmp_path: Path) -> None:
    assert train("medusa", folder, tmp_path, "--steps", "4", "--save-every", "2") == 0
    before = (tmp_path / "medusa_lm_head.safetensors").read_bytes()
    assert train("medusa", folder, tmp_path, "--steps", "4", "--save-every", "2", "--resume") == 0
    assert (tmp_path / "medusa_lm_head.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--length", "5"], "--length must be greater than 9"),
        (["--length", "512"], "at most the 256 positions"),
        (["--self-generated", "1.5"], "--self-generated is a share"),
        (["--draft-vocab-size", "1000"], "between 1 and the target's 260"),
        (["--tap-after", "0", "9"], "distinct layers from 0 to 3"),
        (["--epochs", "0"], "--epochs must be positive"),
        (["--learning-rate", "0"], "learning_rate must be positive"),
        (["--precision", "fp8"], "--precision is auto"),
        (["--held-out", "1"], "held-out share"),
        (["--resume"], "nothing to resume"),
        (["--unrolled-steps", "0"], "--unrolled-steps must be at least 1"),
    ],
)
def test_mistakes_are_four_lines(
    folder: Path, tmp_path: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("eagle3", folder, tmp_path, *more) == 2
    said = capsys.readouterr().err
    said = said[said.index("autospec: ") :]
    assert says in said
    assert "\n  at    " in said
    assert "\n  help  " in said


def test_a_missing_model_or_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "eagle3", str(tmp_path / "none"), "--data", "x", "--out", str(tmp_path)]) == 2
    assert "no such folder" in capsys.readouterr().err
    tiny_model(vocab_size=VOCAB).save_pretrained(tmp_path / "bare")
    assert main(["train", "medusa", str(tmp_path / "bare"), "--data", "x", "--out", str(tmp_path)]) == 2
    assert "tokenizer cannot be loaded" in capsys.readouterr().err
