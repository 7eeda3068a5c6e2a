"""Programs -> a directory that runs anywhere: graphs before kernel selection, weights once, a manifest over all of it.

    DIR/manifest.json               what is here, for which shapes, the state's layout, a SHA-256 per file
    DIR/graphs/1x512-greedy/*.pt2   prefill and steps, in torch.export's format
    DIR/weights.safetensors         what all graphs share
    DIR/aot/...                     compiled for one kind of machine, if that was asked for
    DIR/tokenizer/, DIR/explain.json

(The module is not called export: autospec.export is the function.)
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import autospec
from autospec import debug
from autospec.aot import describe, package
from autospec.artifact.manifest import EXPLAIN, TEXTS, TOKENIZER, being_written, write_manifest
from autospec.artifact.values import to_json
from autospec.artifact.weights import FILE, Checkpoint, Layout, layout_of, missing_as_json, needed, write_weights
from autospec.assemble import Draft, build_graphs
from autospec.config import Speculation
from autospec.debug import PassText
from autospec.errors import OptionError
from autospec.hollow import names_of, on_meta
from autospec.ir.archive import write_graph
from autospec.ir.slots import Slot, slots
from autospec.lower import Unlowered
from autospec.program import CapturedModel, Shape


@dataclass
class Exported:
    """What is exported.

    Args:
        sources, defaults: as in autospec.frontend.Captured.
        left_out: optional passes that do not run.
    """

    target: CapturedModel
    draft: Draft | None
    speculation: Speculation
    shapes: tuple[Shape, ...]
    sources: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()


def export_to(
    directory: str | Path, what: Exported, *, compile: str | None = None, overwrite: bool = False, progress: bool = False,
    checkpoint: str | Path | None = None,
) -> Path:  # fmt: skip
    """Write an artifact; an interrupted export leaves nothing behind.

    Args:
        compile: "aot" also compiles the graphs for this machine; None writes the portable graphs only.
        overwrite: replace an artifact that stands there.
        checkpoint: a folder whose safetensors have the weights of a target on `meta`.
    """
    if compile not in (None, "aot"):
        raise OptionError(f"compile must be 'aot' or None, got {compile!r}", at=f"compile={compile!r}", where="autospec.export",
                          help="the portable graphs are always written")  # fmt: skip
    texts: list[PassText] = []
    with being_written(directory, overwrite=overwrite) as folder:
        weights: dict[str, Tensor] = {}
        programs, records = [], []
        for shape in tqdm(what.shapes, desc="exporting", disable=not progress, leave=False):
            with debug.keeping() as kept:
                unlowered = build_graphs(what.target, what.draft, what.speculation, shape, what.left_out)
            texts = kept if shape == what.shapes[0] else texts
            described = _write_program(folder, unlowered)
            _merge(weights, unlowered)
            if compile == "aot":
                described["aot"] = package(folder, f"aot/{label(shape)}", unlowered)
            records.append(to_json(unlowered.records))
            programs.append(described)
        names = {name: names_of(tensor) for name, tensor in weights.items()}
        source = None if checkpoint is None else Checkpoint(checkpoint, names)
        layout = layout_of(on_meta(weights), has=source.has if source else lambda name: False)
        write_weights(folder / FILE, layout, source.read if source else None)
        _write_explain(folder, what, records)
        _write_texts(folder / TEXTS, texts)
        packaged = describe(folder, what.target.facts.device) if compile == "aot" else None
        _write_tokenizer(folder / TOKENIZER, what.sources.get("target", ""))
        write_manifest(folder, {**_manifest(what, programs, layout, names), "aot": packaged})
    return Path(directory)


def _manifest(
    what: Exported, programs: list[dict[str, Any]], layout: Layout, names: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    described: dict[str, Any] = {"target": what.target, "draft": what.draft}
    models = {
        role: {"source": what.sources.get(role, ""), "facts": to_json(model.facts)}
        for role, model in described.items() if model is not None
    }  # fmt: skip
    chosen = what.speculation
    options = to_json(chosen) if chosen is not None else {}
    if "speculative_model" in options:
        options["speculative_model"] = what.sources.get("draft", "")
    return {
        "autospec": autospec.__version__,
        "torch": str(torch.__version__),
        "models": models,
        "speculation": {"kind": type(chosen).__name__ if chosen is not None else None, "options": options},
        "generation_defaults": to_json({key: value for key, value in what.defaults.items() if value is not None}),
        "left_out": sorted(what.left_out),
        "weights": {"file": FILE, "aliases": layout.aliases, "missing": missing_as_json(layout, names)},
        "programs": programs,
    }


def label(shape: Shape) -> str:
    """A shape as the name of a folder: rows, tokens per row, greedy or sampling."""
    return f"{shape.batch_size}x{shape.max_length}-{'sampling' if shape.sampling else 'greedy'}"


def _write_program(folder: Path, unlowered: Unlowered) -> dict[str, Any]:
    place = f"graphs/{label(unlowered.shape)}"
    (folder / place).mkdir(parents=True)
    known: dict[str, Slot] = {}
    graphs = []
    for name, module in unlowered.graphs.items():
        declared = slots(module)
        for slot in declared:
            assert known.setdefault(slot.name, slot) == slot, f"graphs disagree about {slot.name}"
        write_graph(module, folder / place / f"{name}.pt2")
        graphs.append({"name": name, "file": f"{place}/{name}.pt2", "slots": [slot.name for slot in declared]})
    return {"shape": to_json(unlowered.shape), "slots": {name: to_json(slot) for name, slot in known.items()}, "graphs": graphs}


def _merge(weights: dict[str, Tensor], unlowered: Unlowered) -> None:
    """Add what a program's slots are made of; two programs that disagree about a name are a broken invariant."""
    for name in needed(slot for module in unlowered.graphs.values() for slot in slots(module)):
        tensor = unlowered.weights[name]
        known = weights.setdefault(name, tensor)
        same = known is tensor or torch.equal(known, tensor)
        assert same, f"two shapes have different constants called {name}"


def _write_explain(folder: Path, what: Exported, programs: Iterable[Any]) -> None:
    content = {
        "captured": to_json([*what.target.records, *(what.draft.records if what.draft is not None else ())]),
        "programs": list(programs),
    }
    (folder / EXPLAIN).write_text(json.dumps(content))


def _write_texts(path: Path, texts: Iterable[PassText]) -> None:
    """What the passes did to the first shape's graphs; a text that is one pass's after and the next one's before is kept once."""
    unique: dict[str, int] = {}
    listed = [
        [one.graph, one.stage, one.name, unique.setdefault(one.before, len(unique)), unique.setdefault(one.after, len(unique))]
        for one in texts
    ]
    path.write_bytes(gzip.compress(json.dumps({"passes": listed, "texts": list(unique)}).encode(), mtime=0))


def _write_tokenizer(folder: Path, source: str) -> None:
    """The tokenizer in the format of the `tokenizers` package, if the model comes with one."""
    if not Path(source).is_dir() and "/" not in source:  # a class's name, where nobody knows more
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception:  # a model without one, or of a kind that needs Python code: text is then the caller's business
        return
    if getattr(tokenizer, "is_fast", False):
        tokenizer.save_pretrained(folder)
