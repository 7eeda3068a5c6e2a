"""Values of a program as JSON and back; what does not fit is an ArtifactError."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from autospec.errors import ArtifactError
from autospec.ir.passes import PassRecord, Refusal
from autospec.ir.slots import Slot
from autospec.program import ModelFacts, Shape
from autospec.trees import DraftTree

T = TypeVar("T")

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16,
                  torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
}  # fmt: skip
# Fields that are neither numbers nor texts, by their class.
_INNER: dict[Any, dict[str, Any]] = {Shape: {"tree": DraftTree}, PassRecord: {"refusals": Refusal}}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: object) -> torch.dtype:
    """torch.float32 of `float32`."""
    if not isinstance(name, str) or name not in _DTYPES:
        raise ArtifactError(f"the manifest names a dtype that nobody knows: {name!r:.40}", at="dtype", where="manifest.json",
                            help="export the model again")  # fmt: skip
    return _DTYPES[name]


def to_json(value: Any) -> Any:
    """Dataclasses as objects, tuples as lists, dtypes and devices by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: to_json(getattr(value, one.name)) for one in dataclasses.fields(value) if one.init}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def from_json(kind: type[T], value: Any) -> T:
    """A dataclass of this module's kinds; every field must be there and nothing else."""
    names = {one.name for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(value, dict) or set(value) != names:
        given = set(value) if isinstance(value, dict) else set()
        named = [("lacks", names - given), ("has a strange", given - names)]
        told = " and ".join(f"{what} {', '.join(sorted(which))}" for what, which in named if which)
        raise ArtifactError(f"the manifest's {kind.__name__} {told:.120}", at=repr(value)[:80], where="manifest.json",
                            help="if another version of autospec wrote it, export the model again")  # fmt: skip
    fields = {name: _field(kind, name, item) for name, item in value.items()}
    return kind(**fields)


def _field(kind: Any, name: str, value: Any) -> Any:
    if name == "dtype":
        return dtype_of(value)
    if name == "device":
        return torch.device(value)
    inner = _INNER.get(kind, {}).get(name)
    if inner is not None:
        return tuple(from_json(inner, item) for item in value) if isinstance(value, list) else from_json(inner, value)
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def facts_of(value: Any) -> ModelFacts:
    return from_json(ModelFacts, value)


def shape_from(value: Any) -> Shape:
    """A program's shape whose numbers are numbers of something."""
    shape = from_json(Shape, value)
    for name in ("batch_size", "max_length", "page_size", "prefill_len"):
        size = getattr(shape, name)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ArtifactError(f"the manifest describes a program of {name} {size!r:.40}", at=name, where="manifest.json",
                                help="export the model again")  # fmt: skip
    return shape


def slot_from(value: Any) -> Slot:
    """A slot whose shape can be allocated."""
    slot = from_json(Slot, value)
    sizes = slot.shape if isinstance(slot.shape, tuple) else (-1,)
    if slot.kind not in ("weight", "state") or any(not isinstance(size, int) or size < 0 for size in sizes):
        raise ArtifactError("the manifest describes a slot wrongly", at=str(slot)[:80], where="manifest.json",
                            help="export the model again")  # fmt: skip
    return slot
