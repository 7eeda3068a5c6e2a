"""A model on `meta` is exported without its weights; they are copied from its checkpoint, or read from it later."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import tiny

import autospec
from autospec.errors import CaptureError, CheckpointError, OptionError
from autospec.hollow import filled, hollow, is_hollow, parameters_on_meta, without_numbers

PROMPT = [[5, 9, 2, 44, 5, 9, 2]]
OPTIONS: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder and the tokens of its model; gemma ties its embeddings and has two kinds of rotary frequencies."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    made = tiny(request.param, seed=9)
    made.save_pretrained(folder)
    fast = autospec.optimize(made, autospec.NGramConfig(2), compile="eager", max_length=64)
    return folder, fast.generate(PROMPT, **OPTIONS)


def test_weights_are_copied_or_named(checkpoint: tuple[Path, Any], tmp_path: Path, refused: Callable[..., Any]) -> None:
    folder, expected = checkpoint
    options: dict[str, Any] = {"max_length": 64, "sampling": False}
    whole = autospec.export(folder, tmp_path / "whole", autospec.NGramConfig(2), meta=True, **options)
    shutil.copytree(folder, tmp_path / "moved")
    saved = autospec.load(whole, compile="eager")
    assert torch.equal(saved.generate(PROMPT, **OPTIONS), expected)
    assert "was not compared" in saved.explain(), "what was left unchecked is said"

    from autospec.loading import model_on_meta

    graphs = autospec.export(model_on_meta(folder), tmp_path / "graphs", autospec.NGramConfig(2), **options)
    text = str(refused(CheckpointError, lambda: autospec.load(graphs, compile="eager")))
    assert "the artifact holds graphs only" in text
    later = autospec.load(graphs, compile="eager", weights=tmp_path / "moved")
    assert torch.equal(later.generate(PROMPT, **OPTIONS), expected)
    assert (graphs / "weights.safetensors").stat().st_size < 4096, "frequencies and tables, no parameters"


def test_a_checkpoint_of_another_model(checkpoint: tuple[Path, Any], tmp_path: Path, refused: Callable[..., Any]) -> None:
    from autospec.loading import model_on_meta

    folder, _ = checkpoint
    graphs = autospec.export(model_on_meta(folder), tmp_path / "graphs", None, max_length=64, sampling=False)
    tiny("llama", hidden_size=16, head_dim=4, num_hidden_layers=1).save_pretrained(tmp_path / "other")
    saved = autospec.load(graphs, compile="eager", weights=tmp_path / "other")
    text = str(refused(CheckpointError, lambda: saved.generate(PROMPT, **OPTIONS)))
    assert "the graphs expect" in text or "has no such weight" in text


def test_meta_needs_a_folder(refused: Callable[..., Any], tmp_path: Path) -> None:
    text = str(refused(OptionError, lambda: autospec.export(tmp_path, tmp_path / "x", meta=True)))
    assert "meta=True takes a folder" in text


def test_a_model_is_left_on_meta_and_its_ties_hold() -> None:
    with parameters_on_meta():
        model = tiny("gemma3_text")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu", "what is made later is real again"
    with filled(model):
        assert all(is_hollow(parameter.data) for parameter in model.parameters())
        assert model.get_input_embeddings().weight is model.lm_head.weight
        assert all(not buffer.is_meta for buffer in model.buffers())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_buffer_without_value_is_refused() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(3, device="meta"))

    with pytest.raises(CaptureError, match="a buffer of the model on meta has no value"), filled(Odd()):
        pass


def test_what_depends_on_a_hollow_tensor_is_zero_and_nothing_else() -> None:
    weight = hollow(torch.Size((1 << 20, 1 << 14)), torch.float32)  # 64 GB, if it were one
    layer = torch.nn.Linear(2, 2, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    with without_numbers(layer):
        out = torch.nn.functional.linear(torch.ones(2, 1 << 14), weight.to(torch.float32))
        kept = torch.arange(4) + 1
    assert out.shape == (2, 1 << 20)
    assert not out.any()
    assert kept.tolist() == [1, 2, 3, 4]
