"""Reading and writing the files of a draft head: a folder, one weight file in it, or a hub id."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a pickle, which only the safe unpickler opens."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"the file cannot be read: {type(error).__name__}: {_first_line(error)}", at=str(path), where="draft head",
            help="a truncated or corrupt file must be downloaded again; a pickle may hold nothing but tensors",
        ) from error  # fmt: skip
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError("the file holds something else than named tensors", at=str(path), where="draft head",
                              help="save the head's state_dict by itself")  # fmt: skip
    return {str(name): value for name, value in found.items()}
