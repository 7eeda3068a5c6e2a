"""An artifact gives the tokens of the process that wrote it, in one without transformers and without the compiler's front."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.artifacts import FAMILIES, KINDS, OPTIONS, PROMPTS, demo, family, same_elsewhere, tiny_optimized
from harness.models import captured

import autospec
from autospec.api import Limits, OptimizedModel
from autospec.artifact.weights import FILE
from autospec.config import NGramConfig
from autospec.errors import ArtifactError, CapacityError, OptionError
from autospec.loaded import LoadedModel
from autospec.runtime.artifact import StoredProgram


@pytest.mark.parametrize("drafter", ["auto", "medusa static"])
def test_every_kind_of_drafter_comes_back(drafter: str, written: Callable[[str], Path]) -> None:
    saved = autospec.load(written(drafter), compile="eager")
    fast = tiny_optimized(drafter)
    for options in OPTIONS:
        expected = fast.generate(PROMPTS, max_new_tokens=24, **options)
        assert torch.equal(saved.generate(PROMPTS, max_new_tokens=24, **options), expected), options
        if drafter != "auto":  # whose draft lengths follow measured times
            assert saved.metrics.mean_acceptance_length == fast.metrics.mean_acceptance_length, "the drafts are the same, too"


@pytest.mark.xdist_group("sparse")
def test_index_keys_stay_in_float8(tmp_path: Path) -> None:
    """The state's layout says so, and the tokens, which are not those of keys as they are, come back."""
    def optimized(form: str | None) -> OptimizedModel:
        limits = Limits(1, 64, None, index_quantization=form)
        return OptimizedModel(captured("sparse"), None, NGramConfig(max_draft_len=3), "eager", limits, {"pad_token_id": 0})

    exact, coarse = (optimized(form).generate(PROMPTS[:1], max_new_tokens=24, do_sample=False) for form in (None, "fp8"))
    assert not torch.equal(exact, coarse)
    folder = optimized("fp8").save(tmp_path / "exported", sampling=False)
    (program,) = json.loads((folder / "manifest.json").read_text())["programs"]
    assert program["shape"]["index_quantization"] == "fp8"
    kept = {name: slot["dtype"] for name, slot in program["slots"].items() if name.startswith("index_")}
    assert kept == {"index_pages.0": "float8_e4m3fn", "index_pages.1": "float8_e4m3fn",
                    "index_scale_pages.0": "float32", "index_scale_pages.1": "float32"}  # fmt: skip
    loaded = autospec.load(folder, compile="eager")
    assert torch.equal(loaded.generate(PROMPTS[:1], max_new_tokens=24, do_sample=False), coarse)
    told = loaded.explain()
    assert "index keys in float8: 12 bytes a token with the scale instead of 32" in told
    assert "of these float8 index keys" in told


@pytest.mark.xdist_group("demo artifacts")
def test_a_fresh_process_needs_no_transformers(tmp_path: Path) -> None:
    """The bundled model with three drafters, and four families; all in one process."""
    same_elsewhere(tmp_path, [*map(demo, KINDS), *map(family, FAMILIES)], max_length=64)


def test_weights_are_stored_once(written: Callable[[str], Path]) -> None:
    """A draft that is the target itself adds names, not tensors; fused copies are not stored."""
    from safetensors import safe_open

    folder = written("twin")
    aliases = json.loads((folder / "manifest.json").read_text())["weights"]["aliases"]
    assert len(aliases) >= 18, "all weights of two layers, embedding and norms"
    with safe_open(folder / FILE, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert not set(stored) & set(aliases)
    assert set(aliases.values()) <= set(stored)
    weights = captured("target").weights.values()
    assert sum(tensor.numel() for tensor in stored.values()) == sum(tensor.numel() for tensor in weights)
    saved = autospec.load(folder, compile="eager")
    alias, name = next(iter(aliases.items()))
    assert torch.equal(saved.artifact.weights[alias], stored[name])


def test_loaded_weights_are_shared_by_the_graphs(written: Callable[[str], Path]) -> None:
    saved = autospec.load(written("ngram"), compile="eager")
    saved.generate(PROMPTS[:1], max_new_tokens=4, do_sample=False)
    saved.generate(PROMPTS[:1], max_new_tokens=4, do_sample=True, seed=1)
    greedy, sampling = (session.program for session in saved._sessions.values())
    shared = set(greedy.weights) & set(sampling.weights)
    assert len(shared) >= 10
    assert all(greedy.weights[name] is sampling.weights[name] for name in shared)


def test_requests_run_in_the_smallest_shape_that_takes_them(written: Callable[[str], Path], refused: Any) -> None:
    saved = autospec.load(written("ngram"), compile="eager")
    shapes = [program.shape for program in saved.artifact.programs]
    assert [saved._shape(2, 20, sampling).sampling for sampling in (False, True)] == [False, True]
    wider = [dataclasses.replace(shape, batch_size=4, max_length=length) for shape in shapes for length in (128, 64)]
    saved.artifact.programs = tuple(StoredProgram(shape, ()) for shape in [*wider, *shapes])
    assert [saved._shape(rows, 20, False).batch_size for rows in (1, 2, 3, 9)] == [2, 2, 4, 4]
    assert [saved._shape(4, longest, False).max_length for longest in (20, 64, 65, 128)] == [64, 64, 128, 128]
    text = str(refused(CapacityError, lambda: saved._shape(1, 129, False)))
    assert "needs 129 tokens, the artifact was exported for 128" in text
    saved.artifact.programs = tuple(program for program in saved.artifact.programs if not program.shape.sampling)
    assert "and samples" in str(refused(CapacityError, lambda: saved._shape(1, 20, True)))


def test_mistakes_of_loading_are_told_in_four_lines(written: Callable[[str], Path], refused: Any, tmp_path: Path) -> None:
    folder = written("ngram")
    assert "compile must be one of" in str(refused(OptionError, lambda: autospec.load(folder, compile="jit")))
    assert "there is no device called 'gpu'" in str(refused(OptionError, lambda: autospec.load(folder, device="gpu")))
    assert "there is no such folder" in str(refused(ArtifactError, lambda: autospec.load(tmp_path / "none")))
    assert "has no manifest.json" in str(refused(ArtifactError, lambda: autospec.load(tmp_path)))


def test_a_loaded_model_is_not_saved_again(written: Callable[[str], Path], tmp_path: Path, refused: Any) -> None:
    saved = autospec.load(written("ngram"), compile="eager")
    assert "copy the artifact's folder" in str(refused(OptionError, lambda: saved.save(tmp_path / "again")))


def test_a_loaded_model_explains_itself(written: Callable[[str], Path]) -> None:
    saved = autospec.load(written("ngram"), compile="eager")
    assert isinstance(saved, LoadedModel)
    assert "select-kernels" in saved.explain()
    assert "page-kv-cache" in saved.explain(), "what the exporting machine did is part of it"
