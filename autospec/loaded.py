"""autospec.load: an exported artifact as a model that generates, without transformers and without the model's code."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autospec.api import Limits, OptimizedModel
from autospec.errors import ArtifactError, CapacityError, OptionError
from autospec.ir.archive import check_data, read_graph
from autospec.ir.passes import PassRecord
from autospec.program import ModelFacts, Program, Shape
from autospec.runtime.artifact import Artifact
from autospec.threads import limit_threads

HOW = ("aot", "inductor", "eager")


@dataclass(frozen=True)
class SavedModel:
    """What an artifact says of a model: no graph that could be specialised again."""

    facts: ModelFacts
    records: tuple[PassRecord, ...] = ()


@dataclass
class LoadedModel(OptimizedModel):
    """A model that generates from an artifact; it has the shapes that were exported and no others."""

    artifact: Artifact = field(kw_only=True, repr=False)

    def save(self, directory: str | Path, **options: Any) -> Path:
        """Refused: an artifact is copied as a folder."""
        raise OptionError("a loaded model cannot be exported again", at=str(directory), where=str(self.artifact.folder),
                          help="copy the artifact's folder, or export the model itself")  # fmt: skip

    def _shape(self, rows: int, longest: int, sampling: bool) -> Shape:
        """The smallest exported shape that takes the request; what samples can be greedy, too."""
        shapes = [program.shape for program in self.artifact.programs]
        fitting = [shape for shape in shapes if shape.max_length >= longest and (shape.sampling or not sampling)]
        if not fitting:
            most = max((shape.max_length for shape in shapes if shape.sampling or not sampling), default=0)
            raise CapacityError(
                f"a request needs {longest} tokens{' and samples' if sampling else ''}, the artifact was exported for {most}",
                at=f"{longest} tokens in one row", where=str(self.artifact.folder),
                help="lower max_new_tokens, or export with a larger --max-length and with sampling",
            )  # fmt: skip
        wide = [shape for shape in fitting if shape.batch_size >= rows]
        if wide:
            return min(wide, key=lambda shape: (shape.batch_size, shape.max_length, shape.sampling))
        return max(fitting, key=lambda shape: (shape.batch_size, -shape.max_length, not shape.sampling))

    def _reader(self, shape: Shape) -> None:
        """An artifact holds no reader: rows are refilled by the batch's own prefill."""

    def _build(self, shape: Shape) -> Program:
        if self.compile == "aot":
            return self.artifact.packaged(shape, self._weights, self.artifact.records(shape))
        from autospec.lower import Unlowered, lower_program

        stored = self.artifact.program(shape)
        graphs = {graph.name: read_graph(graph.path, graph.slots, self.artifact.device) for graph in stored.graphs}
        records = [record for record in self.artifact.records(shape) if record.stage != "select"]
        weights: Any = self.artifact.weights  # a mapping that reads them when asked for
        unlowered = Unlowered(shape, self.artifact.facts_here(), graphs, weights, records)
        return lower_program(unlowered, self.compile, self._weights, self.show_progress, self.left_out)


def load(
    directory: str | Path, *, compile: str | None = None, device: str | torch.device | None = None,
    weights: str | Path | None = None, fallback: bool = False,
) -> LoadedModel:  # fmt: skip
    """Open an artifact that `autospec.export` wrote; its `generate` emits the tokens of the model that was exported.

    Every file is checked against the manifest before any is read, and nothing is unpickled.

    Args:
        directory: the artifact's folder.
        compile: "aot" runs the packages that were compiled for this kind of machine, "inductor" or "eager" the portable
            graphs; None: "aot" where the artifact has packages, else "inductor". Packages are machine code: load those
            of people you trust.
        fallback: where the packages are for another machine, use the portable graphs instead of refusing.
        device: where to run; None: the kind of device it was exported on.
        weights: the checkpoint's folder, for an artifact of graphs only.

    Raises:
        ArtifactError: a file is missing or altered, or the artifact is for another machine.
    """
    if compile is not None and compile not in HOW:
        raise OptionError(f"compile must be one of {', '.join(HOW)}, got {compile!r}", at=f"compile={compile!r}",
                          where="autospec.load", help="leave it out for the best that the artifact has")  # fmt: skip
    limit_threads()
    artifact = Artifact(directory, _device(device), weights)
    compile = _how(artifact, compile, fallback)
    if artifact.device.type == "cuda" and not torch.cuda.is_available():
        raise ArtifactError(f"the artifact runs on {artifact.device}, and there is no CUDA device here", at=str(artifact.device),
                            where=str(directory), help="say device='cpu' to run its portable graphs there")  # fmt: skip
    for graph in {graph.path: graph for program in artifact.programs for graph in program.graphs}.values():
        check_data(graph.path)  # all of them before any is read
    shapes = [program.shape for program in artifact.programs]
    limits = Limits(max(shape.batch_size for shape in shapes), max(shape.max_length for shape in shapes), None)
    draft = None if artifact.draft_facts is None else SavedModel(artifact.draft_facts)
    target = SavedModel(artifact.facts_here(), tuple(artifact.records()))
    arguments: dict[str, Any] = {"target": target, "draft": draft, "speculation": None}
    return LoadedModel(
        **arguments, compile=compile, limits=limits, generation_defaults=artifact.defaults,
        left_out=artifact.left_out, sources=artifact.sources, artifact=artifact,
    )  # fmt: skip


def _how(artifact: Artifact, asked: str | None, fallback: bool) -> str:
    """Packages, Inductor or eager; raises ArtifactError where packages are wanted that cannot run here."""
    if asked not in (None, "aot"):
        return str(asked)
    if asked is None and artifact.aot is None:
        return "inductor"
    reason = artifact.why_not_packaged()
    if reason is None:
        return "aot"
    if fallback:
        warnings.warn(f"{reason}; its portable graphs are compiled instead", stacklevel=3)
        return "inductor"
    help = "export on such a machine, or use the portable graphs: fallback=True (--fallback)"
    if artifact.aot is None:
        help = "leave compile out, or export it with compile='aot' (--compile aot)"
    raise ArtifactError(reason, at="compile='aot'", where=str(artifact.folder), help=help)


def _device(asked: str | torch.device | None) -> torch.device | None:
    try:
        return None if asked is None else torch.device(asked)
    except RuntimeError:
        raise OptionError(f"there is no device called {asked!r}", at=f"device={asked!r}", where="autospec.load",
                          help="for example device='cpu' or device='cuda'") from None  # fmt: skip
