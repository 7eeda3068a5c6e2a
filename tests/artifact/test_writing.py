"""A folder appears when it is complete, and what stood there is never lost by a failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness.artifacts import tiny_optimized
from safetensors.torch import load_file

from autospec import exporter
from autospec.artifact import manifest
from autospec.artifact.manifest import NAME, being_written, read_manifest, write_manifest
from autospec.artifact.weights import layout_of, needed, write_weights
from autospec.errors import ArtifactError, CapacityError, OptionError
from autospec.ir.slots import Slot


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]) -> None:
    def interrupted(*args: object) -> None:
        raise stop

    monkeypatch.setattr(exporter, "write_weights", interrupted)
    with pytest.raises(stop):
        tiny_optimized("plain").save(tmp_path / "made", sampling=False)
    assert list(tmp_path.iterdir()) == []


def test_an_old_artifact_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with being_written(folder) as partial:
        (partial / "a.txt").write_text("old")
        write_manifest(partial, {})

    def fail() -> None:
        with being_written(folder, overwrite=True) as partial:
            (partial / "a.txt").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (folder / "a.txt").read_text() == "old"
    with being_written(folder, overwrite=True) as partial:
        (partial / "b.txt").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["b.txt"]


def test_what_cannot_take_its_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between the two renames, and while the old one is deleted."""
    folder = tmp_path / "made"
    with being_written(folder) as partial:
        (partial / "a.txt").write_text("old")
        write_manifest(partial, {})
    rename = Path.rename

    def stop(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise KeyboardInterrupt
        return rename(path, target)

    def replace() -> None:
        with being_written(folder, overwrite=True) as partial:
            (partial / "b.txt").write_text("new")
            write_manifest(partial, {})

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            replace()
    assert read_manifest(folder)["files"].keys() == {"a.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["made"]

    def interrupted(path: Path, ignore_errors: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(manifest.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            replace()
    assert read_manifest(folder)["files"].keys() == {"b.txt"}, "the new one is complete"


def test_what_stands_there_is_not_overwritten(tmp_path: Path, refused: Callable[..., ArtifactError]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    with being_written(folder) as partial:
        (partial / "fills an empty folder.txt").write_text("")
    for overwrite in (False, True):
        text = str(refused(ArtifactError, lambda overwrite=overwrite: being_written(folder, overwrite=overwrite).__enter__()))
        assert "something that is no artifact is there already" in text
    write_manifest(folder, {})
    assert "an artifact is there already" in str(refused(ArtifactError, lambda: being_written(folder).__enter__()))


def test_a_manifest_describes_every_file(tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "x.json").write_text("{}")
    write_manifest(tmp_path, {"autospec": "0"})
    content = read_manifest(tmp_path)
    assert content["files"].keys() == {"graphs/x.json"}
    assert json.loads((tmp_path / NAME).read_text())["autospec"] == "0"


def test_equal_storage_is_written_once_and_read_back(tmp_path: Path) -> None:
    table = torch.randn(6, 4)
    weights = {
        "embed": table, "head": table, "rows": table[:3], "turned": table.t(), "half": torch.randn(3).bfloat16(),
        "flags": torch.tensor([True, False]), "none": torch.empty(0, 2), "one": torch.tensor(3),
    }  # fmt: skip
    layout = layout_of(weights)
    assert layout.aliases == {"head": "embed"}
    write_weights(tmp_path / "w.safetensors", layout)
    read = load_file(tmp_path / "w.safetensors")
    assert read.keys() == weights.keys() - {"head"}
    for name, tensor in read.items():
        assert torch.equal(tensor, weights[name]), name
        assert tensor.dtype == weights[name].dtype


def test_weights_on_meta_are_named_or_streamed(tmp_path: Path) -> None:
    weights = {"a": torch.zeros(2, 3, device="meta"), "b": torch.ones(2), "c": torch.zeros(4, device="meta")}
    layout = layout_of(weights, has=lambda name: name == "a")
    assert (sorted(layout.stored), layout.missing) == (["a", "b"], {"c": ((4,), torch.float32)})
    write_weights(tmp_path / "w.safetensors", layout, lambda name: torch.full((2, 3), 7.0))
    assert load_file(tmp_path / "w.safetensors")["a"].tolist() == [[7.0] * 3] * 2


def test_only_what_fused_weights_are_made_of_is_needed() -> None:
    slots = [Slot("weight", "q+k", (4, 2), parts=("q", "k")), Slot("weight", "o", (2, 2)), Slot("state", "kv_lens", (1,))]
    assert needed(slots) == {"q", "k", "o"}


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"batch_sizes": ()}, OptionError, "batch_sizes must be positive integers"),
        ({"max_length": 0}, OptionError, "max_length must be positive integers, got 0"),
        ({"batch_sizes": (1, 0)}, OptionError, "batch_sizes must be positive integers, got 0"),
        ({"max_length": 257}, CapacityError, "the model has 256 positions"),
        ({"max_length": "9"}, OptionError, "max_length must be positive integers"),
    ],
)
def test_bad_arguments_of_save(
    options: dict[str, object], kind: type[ArtifactError], message: str, refused: Callable[..., ArtifactError], tmp_path: Path
) -> None:
    assert message in str(refused(kind, lambda: tiny_optimized("plain").save(tmp_path / "x", **options)))  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()
