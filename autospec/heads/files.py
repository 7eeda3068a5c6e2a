"""Reading and writing the files of a draft head: a folder, one weight file in it, or a hub id."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from autospec.errors import CheckpointError
from autospec.model_zoo.draft_heads import EAGLE3_LAYOUTS, MEDUSA

WEIGHTS = tuple(dict.fromkeys(name for layout in (*EAGLE3_LAYOUTS.values(), MEDUSA) for name in layout.weights))
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class HeadFiles:
    """A config.json and the tensors beside it, by the names in the file."""

    where: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read_head(source: str | Path) -> HeadFiles:
    """Read a head from a folder, a weight file or a hub id."""
    path = _local(source)
    folder, files = (path.parent, [path]) if path.is_file() else (path, _weight_files(path))
    config = read_json(folder / "config.json", "name a folder with config.json and the head's weights")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_tensors(file)
    return HeadFiles(str(source), config, tensors)


def tensor_names(source: str | Path) -> tuple[Path, dict[str, Path]]:
    """A checkpoint's folder, and every tensor's name in it with the file that holds it; no tensor is read."""
    path = _local(source)
    folder, files = (path.parent, [path]) if path.is_file() else (path, _weight_files(path))
    found: dict[str, Path] = {}
    for file in files:
        if file.suffix != ".safetensors":
            raise CheckpointError("only safetensors are read piece by piece", at=str(file), where="draft head",
                                  help="save the model again with save_pretrained")  # fmt: skip
        with _opened(file) as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return folder, found


def read_named(files: Mapping[str, Path]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint, from the files that hold them."""
    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(files.values()):
        with _opened(file) as opened:
            found |= {name: opened.get_tensor(name) for name, holder in files.items() if holder == file}
    return found


def check_tensors(
    where: str, layout: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], spell: Mapping[str, str]
) -> None:
    """Every tensor has a place and its shape, or one error lists all that do not; `spell` gives the file's names."""
    missing = [spell[name] for name in wanted if name not in found]
    extra = [spell.get(name, name) for name in found if name not in wanted]
    misshapen = [
        f"{spell[name]} {list(found[name].shape)} instead of {list(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    faults = [f"{what} {_some(names)}" for what, names in
              (("it lacks", missing), ("it has the unknown", extra), ("misshapen are", misshapen)) if names]  # fmt: skip
    if faults:
        raise CheckpointError(
            f"the tensors do not fit: {'; '.join(faults)}", at=where, where=f"draft head, {layout} layout",
            help="compare config.json with the weights, and the target with the one that the head was trained for",
        )  # fmt: skip


def _some(names: Iterable[str], most: int = 12) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def write_head(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: str) -> None:
    """Write config.json and one safetensors file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # A clone each: safetensors refuses tensors that share storage, and a lent lm_head may be tied to embeddings.
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(plain, folder / weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_json(path: Path, help: str) -> dict[str, Any]:
    """A JSON object, or an error that says what stands in its place."""
    if not path.is_file():
        raise CheckpointError(f"there is no {path.name}", at=str(path), where="draft head", help=help)
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} is no JSON: {_first_line(error)}", at=str(path), where="draft head",
                              help="download it again") from error  # fmt: skip
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} holds a {type(found).__name__}, not an object", at=str(path),
                              where="draft head", help=help)  # fmt: skip
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _local(source: str | Path) -> Path:
    """An existing file or folder; a hub id is downloaded, as transformers does."""
    path = Path(source).expanduser()
    if str(source) and path.exists():
        return path
    text = str(source)
    if isinstance(source, Path) or not text or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise CheckpointError("there is no such draft head", at=repr(text), where="draft head",
                              help="name a folder with config.json and weights, or a hub id such as 'name/head'")  # fmt: skip
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(text, allow_patterns=["config.json", *INDEXES, *WEIGHTS, "*.safetensors"]))
    except Exception as error:
        raise CheckpointError(
            f"the hub id cannot be fetched: {type(error).__name__}: {_first_line(error)}", at=repr(text),
            where="draft head", help="check the id, the network and HF_TOKEN, or name a folder that has it",
        ) from error  # fmt: skip


def _weight_files(folder: Path) -> list[Path]:
    """The first weight file that a layout knows, or all shards of an index."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
    for name in INDEXES:
        if (folder / name).is_file():
            weight_map = read_json(folder / name, "download it again").get("weight_map")
            shards = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
            lost = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
            if not shards or lost:
                raise CheckpointError(f"the index names no files, or files that are not there: {', '.join(lost)}",
                                      at=str(folder / name), where="draft head", help="download all shards")  # fmt: skip
            return [folder / shard for shard in shards]
    raise CheckpointError(f"the folder has no weights: none of {', '.join(WEIGHTS)}", at=str(folder), where="draft head",
                          help="name the folder, or the weight file itself")  # fmt: skip


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What cannot be read inside becomes an error that names the file."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"the file cannot be read: {type(error).__name__}: {_first_line(error)}", at=str(path), where="draft head",
            help="a truncated or corrupt file must be downloaded again; a pickle may hold nothing but tensors",
        ) from error  # fmt: skip


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, of which nothing is read yet."""
    with _readable(path), safe_open(path, framework="pt") as file:
        yield file


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a pickle, which only the safe unpickler opens."""
    if path.suffix == ".safetensors":
        with _opened(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with _readable(path):
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError("the file holds something else than named tensors", at=str(path), where="draft head",
                              help="save the head's state_dict by itself")  # fmt: skip
    return {str(name): value for name, value in found.items()}
