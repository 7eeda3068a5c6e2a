"""Medusa checkpoints compute what Medusa says, and come back as they were saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autospec.errors import CheckpointError
from autospec.heads.checkpoint import load_head, save_head
from autospec.heads.medusa import MedusaHeads

HIDDEN, VOCAB = 16, 40
LM_HEAD = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(4))


def raw(num_heads: int = 3, num_layers: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for head in range(num_heads):
        for block in range(num_layers):
            tensors[f"{head}.{block}.linear.weight"] = torch.randn(HIDDEN, HIDDEN, generator=generator) / 4
            tensors[f"{head}.{block}.linear.bias"] = torch.randn(HIDDEN, generator=generator)
        tensors[f"{head}.{num_layers}.weight"] = torch.randn(VOCAB, HIDDEN, generator=generator)
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], weights: str = "medusa_lm_head.pt", **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"medusa_num_heads": 3, "medusa_num_layers": 2, **config}))
    if weights.endswith(".pt"):
        torch.save(tensors, folder / weights)
    else:
        save_file(tensors, folder / weights)
    return folder


def load(folder: Path) -> MedusaHeads:
    heads = load_head(folder, target_hidden_size=HIDDEN, target_vocab_size=VOCAB, target_layers=2, embed_tokens=LM_HEAD,
                      lm_head=LM_HEAD, dtype=torch.float32, device="cpu")  # fmt: skip
    assert isinstance(heads, MedusaHeads)
    return heads


def agree(tensors: dict[str, Tensor], heads: MedusaHeads, num_layers: int = 2) -> bool:
    hidden = torch.randn(2, 1, HIDDEN, generator=torch.Generator().manual_seed(6))
    wanted = []
    for head in range(heads.num_heads):
        x = hidden[:, 0]
        for block in range(num_layers):
            y = x @ tensors[f"{head}.{block}.linear.weight"].T + tensors[f"{head}.{block}.linear.bias"]
            x = x + y / (1 + torch.exp(-y))
        wanted.append(x @ tensors[f"{head}.{num_layers}.weight"].T)
    with torch.no_grad():
        return torch.allclose(heads(hidden), torch.stack(wanted, dim=1), atol=1e-4)


@pytest.mark.parametrize("weights", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
@pytest.mark.parametrize("prefix", ["", "medusa_head."])
def test_a_file_guesses_what_medusa_guesses(weights: str, prefix: str, tmp_path: Path) -> None:
    tensors = raw()
    heads = load(write(tmp_path / "raw", {prefix + name: value for name, value in tensors.items()}, weights))
    assert agree(tensors, heads)
    save_head(heads, tmp_path / "ours")
    again = load_file(tmp_path / "ours" / "medusa_lm_head.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert agree(tensors, load(tmp_path / "ours"))


def test_a_weight_file_may_be_named_itself(tmp_path: Path) -> None:
    tensors = raw()
    assert agree(tensors, load(write(tmp_path, tensors) / "medusa_lm_head.pt"))


def test_heads_in_another_order_are_seen(tmp_path: Path) -> None:
    tensors = raw()
    heads = load(write(tmp_path, tensors))
    heads.blocks[0], heads.blocks[1] = heads.blocks[1], heads.blocks[0]
    assert not agree(tensors, heads)


def test_the_file_counts_its_heads(tmp_path: Path) -> None:
    """Configurations on the hub say 2 heads where the file has 5."""
    heads = load(write(tmp_path, raw(5), medusa_num_heads=2))
    assert heads.num_heads == 5
    assert heads.report is not None
    assert "2 heads" in heads.report.notes[0]


def test_version_2_files_use_the_targets_lm_head(tmp_path: Path) -> None:
    tensors = {name: value for name, value in raw().items() if "linear" in name}
    heads = load(write(tmp_path / "raw", tensors))
    assert agree({**tensors, **{f"{index}.2.weight": LM_HEAD for index in range(3)}}, heads)
    assert heads.report is not None
    assert heads.report.shared == ("0.2.weight", "1.2.weight", "2.2.weight")
    assert len({head.weight.data_ptr() for head in heads.lm_heads}) == 1
    assert not any(name.startswith("lm_heads") for name in heads.own_state())
    save_head(heads, tmp_path / "ours")
    assert load_file(tmp_path / "ours" / "medusa_lm_head.safetensors").keys() == tensors.keys()
    load(tmp_path / "ours")


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    tensors = raw()
    del tensors["1.0.linear.bias"]
    tensors["0.2.weight"] = torch.zeros(VOCAB + 1, HIDDEN)
    tensors["stray"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path, tensors))
    for word in ("lacks 1.0.linear.bias", "unknown stray", "0.2.weight [41, 16] instead of [40, 16]", "medusa layout"):
        assert word in str(caught.value)
    with pytest.raises(CheckpointError, match="says 4 heads of 2 blocks, the file has 3 of 2"):
        load(write(tmp_path / "more", raw(3), medusa_num_heads=4))
    with pytest.raises(CheckpointError, match="3 heads of 3 blocks"):
        load(write(tmp_path / "deeper", raw(3), medusa_num_layers=3))
    with pytest.raises(CheckpointError, match=r"linear\.weight, which Medusa heads have"):
        load(write(tmp_path / "none", {"x": torch.zeros(1)}))
