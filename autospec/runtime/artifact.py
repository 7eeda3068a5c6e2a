"""An exported artifact, opened: its shapes, its slots and its weights. Nothing here needs the compiler."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autospec.artifact.machine import why_not_here
from autospec.artifact.manifest import EXPLAIN, TEXTS, read_manifest, refuse
from autospec.artifact.values import facts_of, from_json, shape_from, slot_from
from autospec.artifact.weights import StoredWeights
from autospec.debug import PassText
from autospec.errors import AutospecError
from autospec.kernels.native import adopt
from autospec.kernels.registry import load_all
from autospec.program import Graph, ModelFacts, PassRecord, Program, Shape, materialise

_LARGEST_TEXTS = 1 << 30  # bytes, unpacked


@dataclass(frozen=True)
class StoredGraph:
    """One entry point: its archive, and the slots of its inputs in order."""

    name: str
    path: Path
    slots: tuple[Any, ...]


@dataclass(frozen=True)
class StoredProgram:
    """The graphs that were exported for one shape, and the packages that were compiled from them, if any."""

    shape: Shape
    graphs: tuple[StoredGraph, ...]
    packages: tuple[StoredGraph, ...] = ()


class Artifact:
    """A directory that `export` wrote; opening it checks every file and deserialises none.

    Args:
        directory: the folder.
        device: where the weights go; None: where they were exported from.
        weights: a checkpoint's folder, for an artifact of graphs only.
    """

    def __init__(self, directory: str | Path, device: torch.device | None = None, weights: str | Path | None = None) -> None:
        self.folder = Path(directory)
        self.manifest = read_manifest(self.folder)
        with self._described():
            models = self.manifest["models"]
            self.facts = facts_of(models["target"]["facts"])
            self.draft_facts = facts_of(models["draft"]["facts"]) if "draft" in models else None
            self.sources: Mapping[str, str] = {role: str(model["source"]) for role, model in models.items()}
            self.speculation: Mapping[str, Any] = self.manifest["speculation"]
            self.defaults: Mapping[str, Any] = self.manifest["generation_defaults"]
            self.left_out = frozenset(map(str, self.manifest["left_out"]))
            self.programs = tuple(self._programs())
            if not self.programs:
                raise ValueError("it lists no programs")
            stored = self.manifest["weights"]
            self.device = device or self.facts.device
            self.aot: Mapping[str, Any] | None = self.manifest["aot"]
            self.weights = StoredWeights(
                self.file(stored["file"]), stored["aliases"], stored["missing"], weights, self.device
            )  # fmt: skip
        for program in self.programs:
            for graph in (*program.graphs, *program.packages):
                for slot in graph.slots:
                    if slot.kind == "weight":
                        self.weights.check(slot)

    def why_not_packaged(self) -> str | None:
        """Why the packages cannot run on this machine, or None."""
        if self.aot is None or not all(program.packages for program in self.programs):
            return "the artifact was exported without packages"
        with self._described():
            return why_not_here(self.aot["machine"], self.device)

    def packaged(self, shape: Shape, bound: dict[str, Tensor], records: list[PassRecord]) -> Program:
        """The packages of one shape as a program; `bound` has the weights of earlier ones and takes the new ones."""
        assert self.aot is not None, "an artifact without packages has no packaged program"
        load_all()  # the packages call ops by name
        for name, file in self.aot["libraries"].items():
            adopt(name, self.file(file))
        graphs = {}
        for stored in self.program(shape).packages:
            graphs[stored.name] = Graph(stored.name, stored.slots, load_package(stored.path, self.device), is_compiled=True)
            for slot in stored.slots:
                if slot.kind == "weight" and slot.name not in bound:
                    bound[slot.name] = materialise(slot, self.weights)
        return Program(shape, self.facts_here(), graphs, bound, records)

    def facts_here(self) -> ModelFacts:
        """The target's facts, on the device that was asked for."""
        return _moved(self.facts, self.device)

    def program(self, shape: Shape) -> StoredProgram:
        return next(program for program in self.programs if program.shape == shape)

    def records(self, shape: Shape | None = None) -> list[PassRecord]:
        """What the passes did on the exporting machine: while capturing, or for one shape."""
        if not self.has(EXPLAIN):
            return []
        with self._described():
            told = json.loads(self.file(EXPLAIN).read_bytes())
            if shape is None:
                return [from_json(PassRecord, record) for record in told["captured"]]
            number = [program.shape for program in self.programs].index(shape)
            return [from_json(PassRecord, record) for record in told["programs"][number]]

    def texts(self) -> list[PassText]:
        """What the passes changed in the first shape's graphs."""
        if not self.has(TEXTS):
            return []
        with self._described():
            with gzip.open(self.file(TEXTS)) as file:
                told = json.loads(file.read(_LARGEST_TEXTS))
            return [
                PassText(str(graph), str(stage), str(name), str(told["texts"][before]), str(told["texts"][after]))
                for graph, stage, name, before, after in told["passes"]
            ]

    def file(self, name: str) -> Path:
        """A listed file; what the manifest does not list was not checked and is never opened."""
        if name not in self.manifest["files"]:
            raise refuse("the manifest refers to a file that it does not list", repr(name)[:80], self.folder)
        return self.folder / name

    def has(self, name: str) -> bool:
        return name in self.manifest["files"]

    def _programs(self) -> Iterator[StoredProgram]:
        for one in self.manifest["programs"]:
            packages = self._graphs(one["aot"]) if one.get("aot") else ()
            yield StoredProgram(shape_from(one["shape"]), self._graphs(one), packages)

    def _graphs(self, described: Any) -> tuple[StoredGraph, ...]:
        known = {name: slot_from(slot) for name, slot in described["slots"].items()}
        return tuple(
            StoredGraph(graph["name"], self.file(graph["file"]), tuple(known[name] for name in graph["slots"]))
            for graph in described["graphs"]
        )

    def _described(self) -> _Described:
        return _Described(self.folder)


class _Described:
    """Inside, a manifest that lacks or misspells something is a refusal, not a KeyError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        wrong = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError)
        if isinstance(error, wrong) and not isinstance(error, AutospecError):
            raise refuse(f"the manifest does not describe a program: {type(error).__name__}: {str(error)[:80]}",
                         "manifest.json", self.folder) from error  # fmt: skip


def load_package(path: Path, device: torch.device) -> Callable[..., object]:
    """A compiled graph as a function of its slots. It is machine code: the manifest was checked, its author was not."""
    index = -1 if device.index is None else device.index
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, index)

    def call(*arguments: Tensor) -> object:
        return loader.boxed_run(list(arguments))

    return call


def _moved(facts: ModelFacts, device: torch.device) -> ModelFacts:
    return dataclasses.replace(facts, device=device)
