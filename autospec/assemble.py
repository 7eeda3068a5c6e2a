"""Model -> captured graph -> program: runs the pipeline and gathers weights, graphs and records."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from autospec import debug, pipeline
from autospec.capture import export_model
from autospec.config import Speculation
from autospec.hollow import is_model_hollow
from autospec.ir.build import module_of
from autospec.ir.caches import bytes_per_token, index_keys, kept_rows, spared_in_float8
from autospec.ir.passes import PassRecord
from autospec.ir.runner import run_stages
from autospec.ir.sizes import constants_of
from autospec.ir.slots import Slot, slots
from autospec.legality import check_captured, kept_by_cache, rows_of_tables
from autospec.lower import Unlowered, lower_program
from autospec.passes.offset_draft_layers import WEIGHT_PREFIX
from autospec.pipeline import DraftParts
from autospec.program import CapturedHead, CapturedModel, ModelFacts, Program, Shape

Draft = CapturedModel | CapturedHead
D2T = WEIGHT_PREFIX + "d2t"


def capture_model(model: Any, name: str = "target") -> CapturedModel:
    """Export a Hugging Face causal LM, recognise its attention, and check that decoding it step by step is legal."""
    exported = export_model(model)
    records = run_stages(
        exported.graph, pipeline.understand(exported.max_positions), graph_name=f"{name}.capture", debug=debug.options()
    )
    limits = [*exported.limits]
    if (kept := kept_by_cache(model, exported.graph)) is not None:
        limits.append((kept, "transformers' own cache forgets keys that the masks show past them"))
    if (rows := rows_of_tables(exported.graph)) is not None:
        limits.append((rows, "the model's table of positions ends there"))
    limit, why = min(limits, key=lambda pair: pair[0])
    if why:
        told = f"limited to {limit} positions: {why}"
        records.append(PassRecord(f"{name}.capture", "capture", "limit-positions", 0, (), (told,), 0, 0, 0.0))
    if is_model_hollow(model):
        told = "the model is on meta: its graph was not compared with it, nor probed"
        records.append(PassRecord(f"{name}.capture", "capture", "check-numbers", 0, (), (told,), 0, 0, 0.0))
    weights = exported.weights | constants_of(exported.graph)
    used = {slot.name for slot in slots(exported.graph)}
    weights = {name: tensor for name, tensor in weights.items() if name in used}
    refused = [refusal for record in records for refusal in record.refusals if record.name == "recognize-attention"]
    sparse = [refusal for record in records for refusal in record.refusals if record.name in ("recognize-mla", "recognize-dsa")]
    check_captured(model, exported.graph, weights, refused, sparse)
    return CapturedModel(exported.graph, weights, _facts(model, exported.graph, limit), tuple(records))


def _facts(model: Any, graph: fx.GraphModule, max_positions: int) -> ModelFacts:
    logits = graph.graph.output_node().args[0][0].meta["val"]  # type: ignore[index, union-attr]
    weight = next(model.parameters())
    return ModelFacts(
        name=type(model).__name__, vocab_size=int(logits.shape[-1]), max_positions=max_positions, dtype=weight.dtype,
        device=weight.device, num_kv_layers=len(kept_rows(graph)), bytes_per_token=bytes_per_token(graph),
        num_indexers=len(index_keys(graph)), spared_in_float8=spared_in_float8(graph),
    )  # fmt: skip


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph, never of weights; metadata dictionaries are the copy's own."""
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, mapped)
    graph.output(output)
    for old, new in mapped.items():
        new.meta = copy.copy(old.meta)
    duplicate = module_of(graph)
    duplicate.meta = {"device": module.meta["device"]}
    return duplicate


def build_graphs(
    target: CapturedModel, draft: Draft | None, speculation: Speculation, shape: Shape,
    left_out: frozenset[str] = frozenset(), acceptance: tuple[float, ...] = (),
) -> Unlowered:  # fmt: skip
    """Run the pipeline for prefill and every step, or what of it the shape has, up to where the machine matters."""
    records: list[PassRecord] = []
    options = debug.options()

    def run(source: fx.GraphModule, stages: Any, name: str) -> fx.GraphModule:
        module = copy_graph(source)
        records.extend(run_stages(module, stages, graph_name=name, debug=options, left_out=left_out))
        return module

    parts = None if draft is None else _draft_parts(draft, target, shape, run)
    plans = {} if shape.part == "steps" else {"prefill": pipeline.prefill(shape, target.facts, speculation, parts)}
    for draft_len in pipeline.draft_lens(speculation, shape) if shape.part != "prefill" else ():
        plans[f"step_{draft_len}"] = pipeline.step(shape, target.facts, speculation, parts, draft_len, acceptance)
    graphs: dict[str, fx.GraphModule] = {}
    known = dict(target.weights)
    for name, stages in plans.items():
        graphs[name] = run(target.graph, pipeline.portable(stages), name)
        known |= constants_of(graphs[name])
    if draft is not None:
        known |= {WEIGHT_PREFIX + name: tensor for name, tensor in draft.weights.items()}
    if isinstance(draft, CapturedHead) and draft.d2t is not None:
        known[D2T] = draft.d2t
    return Unlowered(shape, target.facts, graphs, known, records)


def build_program(
    target: CapturedModel, draft: Draft | None, speculation: Speculation, shape: Shape, compile: str,
    weights: dict[str, Tensor] | None = None, progress: bool = False, left_out: frozenset[str] = frozenset(),
    acceptance: tuple[float, ...] = (),
) -> Program:  # fmt: skip
    """Run the pipeline for prefill and every step, lower the graphs and collect what they need.

    Args:
        weights: tensors of earlier programs by slot name; shared so that fused weights exist once.
        left_out: names of optional passes that do not run.
        acceptance: synthetic rates by depth, of a bench; (): none.
    """
    graphs = build_graphs(target, draft, speculation, shape, left_out, acceptance)
    return lower_program(graphs, compile, weights, progress, left_out)


def _draft_parts(
    draft: Draft, target: CapturedModel, shape: Shape, run: Callable[[fx.GraphModule, Any, str], fx.GraphModule]
) -> DraftParts:
    """The drafter's graphs for the places where they are spliced in."""
    offset = target.facts.num_kv_layers

    def levels(source: fx.GraphModule) -> dict[int, fx.GraphModule]:
        return {
            rows: run(source, pipeline.draft_level(shape, rows, offset), f"draft_{rows}") for rows in pipeline.levels(shape)
        }

    if isinstance(draft, CapturedModel):
        return DraftParts(
            draft.facts,
            run(draft.graph, pipeline.draft_catch_up(shape, offset), "draft_catch_up"),
            levels(draft.graph),
            run(draft.graph, pipeline.draft_prefill(shape, offset), "draft_prefill"),
        )
    if draft.following is None:
        heads = run(draft.first, pipeline.medusa_heads(shape), "medusa_heads")
        return DraftParts(draft.facts, heads, {}, heads, is_head=True)
    rows, tree = shape.tree.max_draft_len + 1, shape.tree
    modules = (draft.following, *draft.deeper)
    offsets = [offset + index * draft.facts.num_kv_layers // len(modules) for index in range(len(modules))]
    deeper = list(zip(draft.deeper, offsets[1:], strict=True))
    regrow = []
    for level in range(tree.max_draft_len - 1 if deeper else 0):
        number, grown = (level + 1) % len(modules), sum(tree.rows_at(below) for below in range(level + 1))
        plan = pipeline.draft_level(shape, grown, offsets[number])
        regrow.append(run(modules[number], plan, f"draft_level_{level}"))
    return DraftParts(
        draft.facts,
        run(draft.first, pipeline.head_catch_up(shape, rows, offset), "draft_catch_up"),
        {} if deeper else levels(draft.following),
        run(draft.first, pipeline.head_catch_up(shape, shape.prefill_len, offset), "draft_prefill"),
        is_head=True,
        tap_after=draft.tap_after,
        fill=tuple(run(one, pipeline.head_fill(shape, rows, at), "draft_fill") for one, at in deeper),
        fill_prefill=tuple(run(one, pipeline.head_fill(shape, shape.prefill_len, at), "draft_fill") for one, at in deeper),
        regrow=tuple(regrow),
        d2t=None if draft.d2t is None else Slot("weight", D2T, tuple(draft.d2t.shape), torch.int64),
    )


def num_nodes(program: Program) -> int:
    """Graph nodes of all entry points, for the report."""
    return sum(len(g.module.graph.nodes) for g in program.graphs.values() if g.module is not None)
