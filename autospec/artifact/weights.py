"""Weights in one safetensors file, written tensor by tensor, so that no more than one is in memory.

Weights that share their storage are written once; the others are names for it. A weight whose value nobody has (a model
on `meta`) is described, and read from a checkpoint when the artifact is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autospec.artifact.values import dtype_name, dtype_of
from autospec.errors import ArtifactError, CheckpointError
from autospec.ir.slots import Slot

FILE = "weights.safetensors"
_TAGS = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES = {tag: dtype for dtype, tag in _TAGS.items()}
_LARGEST_HEADER = 100_000_000  # bytes, as the safetensors package has it
_ALIGN = 64  # bytes; where tensors begin, if their sizes keep it


@dataclass
class Layout:
    """Which tensors a file holds.

    Args:
        stored: by name, in the order of the file; a tensor on `meta` stands for one that is read while writing.
        aliases: other names of stored tensors.
        missing: shape and dtype of tensors that nobody has, by name.
    """

    stored: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    missing: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)


def layout_of(weights: Mapping[str, Tensor], has: Callable[[str], bool] = lambda name: False) -> Layout:
    """Each storage once.

    Args:
        has: whether a tensor on `meta` can be read from elsewhere under this name.
    """
    layout, by_storage = Layout(), dict[tuple[Any, ...], str]()
    # Of several names, the one that a checkpoint knows comes first.
    for name, tensor in sorted(weights.items(), key=lambda item: (item[1].is_meta and not has(item[0]), item[0])):
        place = id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()
        key = (place, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in by_storage:
            layout.aliases[name] = by_storage[key]
            continue
        by_storage[key] = name
        if tensor.is_meta and not has(name):
            layout.missing[name] = (tuple(tensor.shape), tensor.dtype)
        else:
            layout.stored[name] = tensor
    return layout


def write_weights(path: Path, layout: Layout, read: Callable[[str], Tensor] | None = None) -> None:
    """Stream tensors to a safetensors file; those on `meta` come from `read(name)`."""
    header: dict[str, Any] = {}
    start = 0
    for name, tensor in layout.stored.items():
        size = tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _TAGS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, tensor in layout.stored.items():
            if tensor.is_meta:
                assert read is not None, f"{name} is on meta, and nothing to read it from was given"
                tensor = read(name)
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


class StoredWeights(Mapping[str, Tensor]):
    """The weights of an artifact, read when asked for; the file is mapped, not copied.

    Args:
        path: the safetensors file.
        aliases: other names of its tensors.
        missing: shape and dtype of weights that a checkpoint must give, by name.
        checkpoint: a folder of safetensors files that has them.
    """

    def __init__(
        self, path: Path, aliases: Mapping[str, str], missing: Mapping[str, Any], checkpoint: str | Path | None,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._device, self._aliases = device, dict(aliases)
        self._file = open_safetensors(path)
        self._stored = read_header(path)
        self._missing = {name: (tuple(shape), dtype_of(dtype)) for name, (shape, dtype, _) in missing.items()}
        names = {name: tuple(map(str, known)) for name, (_, _, known) in missing.items()}
        self._checkpoint = None if checkpoint is None else Checkpoint(checkpoint, names)
        if self._missing and self._checkpoint is None:
            name = next(iter(self._missing))
            raise CheckpointError(f"the artifact holds graphs only: {len(self._missing)} weights are named, not stored",
                                  at=name, where=str(path.parent), help="give the checkpoint's folder: weights=...")  # fmt: skip

    def facts(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a weight, read from nowhere but the header."""
        stored = self._aliases.get(name, name)
        known = self._missing.get(stored) or self._stored.get(stored)
        if known is None:
            raise CheckpointError("a weight is missing", at=stored, where=FILE, help="export the model again")
        return known

    def check(self, slot: Slot) -> None:
        """Raise ArtifactError where a graph declares a weight that is not what is stored: packages do not look."""
        facts = [self.facts(name) for name in slot.parts or (slot.name,)]
        if slot.form:  # made of it when it is loaded
            return
        shapes = [shape for shape, _ in facts]
        whole = shapes[0] if len(shapes) == 1 else (sum(shape[0] if shape else 0 for shape in shapes), *shapes[0][1:])
        if whole != slot.shape or len({shape[1:] for shape in shapes}) > 1 or {dtype for _, dtype in facts} != {slot.dtype}:
            found = ", ".join(f"{dtype_name(dtype)} {list(shape)}" for shape, dtype in facts)
            raise ArtifactError(f"the graphs take {dtype_name(slot.dtype)} {list(slot.shape)}, the weights hold {found}",
                                at=slot.name, where=FILE, help="export the model again")  # fmt: skip

    def __getitem__(self, name: str) -> Tensor:
        stored = self._aliases.get(name, name)
        if stored in self._missing:
            assert self._checkpoint is not None
            tensor, (shape, dtype) = self._checkpoint.read(stored), self._missing[stored]
            if tuple(tensor.shape) != shape:
                raise CheckpointError(f"a weight has shape {tuple(tensor.shape)}, the graphs expect {shape}", at=stored,
                                      where=str(self._checkpoint.folder), help="give the model that was exported")  # fmt: skip
            return tensor.to(self._device, dtype)
        if stored not in self._stored:
            raise CheckpointError("a weight is missing", at=stored, where=FILE, help="export the model again")
        return self._file.get_tensor(stored).to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter([*sorted(self._stored), *self._aliases, *self._missing])

    def __len__(self) -> int:
        return len(self._stored) + len(self._aliases) + len(self._missing)


class Checkpoint:
    """The safetensors files of a Hugging Face folder, by tensor name.

    Args:
        names: other names that the checkpoint may use for a weight.
    """

    def __init__(self, folder: str | Path, names: Mapping[str, Sequence[str]] | None = None) -> None:
        self.folder, self._names = Path(folder), dict(names or {})
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError("the folder holds no safetensors", at=str(folder), where="weights",
                                  help="name a folder written by save_pretrained")  # fmt: skip
        self._files = [open_safetensors(path) for path in paths]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - no mapping

    def has(self, name: str) -> bool:
        return self._key(name) is not None

    def read(self, name: str) -> Tensor:
        key = self._key(name)
        if key is None:
            raise CheckpointError("the checkpoint has no such weight", at=name, where=str(self.folder),
                                  help="some families store their weights in other pieces: export the loaded model")  # fmt: skip
        tensor: Tensor = self._where[key].get_tensor(key)
        return tensor

    def _key(self, name: str) -> str | None:
        """Base models are stored with and without their prefix."""
        known = (name, *self._names.get(name, ()))
        return next((key for one in known for key in (one, one.removeprefix("model.")) if key in self._where), None)


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a safetensors file.

    Raises:
        CheckpointError: the header is too large, names a tensor twice, or is none.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _LARGEST_HEADER:
                raise ValueError(f"a header of {size} bytes")
            told = json.loads(file.read(size), object_pairs_hook=_once)
        return {
            name: (tuple(map(int, one["shape"])), _DTYPES[one["dtype"]]) for name, one in told.items() if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the weights' header cannot be read: {str(error)[:120]}", at=path.name, where=str(path.parent),
                              help="a truncated or corrupt file must be written again") from None  # fmt: skip


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless it says something twice: readers differ in which of the two they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names '{next(name for name in names if names.count(name) > 1)[:60]}' twice")
    return found


def open_safetensors(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the weights cannot be read: {str(error)[:120]}", at=path.name, where=str(path.parent),
                              help="a truncated or corrupt file must be written again") from None  # fmt: skip


def missing_as_json(layout: Layout, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Shape, dtype and a checkpoint's names of each weight that is not stored."""
    return {
        name: [list(shape), dtype_name(dtype), list(names.get(name, ()))] for name, (shape, dtype) in layout.missing.items()
    }


def needed(slots: Iterable[Any]) -> set[str]:
    """Names of the weights that slots are made of."""
    return {part for slot in slots if slot.kind == "weight" for part in slot.parts or (slot.name,)}
