"""Draft head -> captured graphs; the head reads the target's hidden states, so the target is captured first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from autospec import debug, pipeline
from autospec.capture_checks import EXAMPLE_SHAPE
from autospec.capture_interfaces import layers_through_interfaces
from autospec.capture_slots import with_slots
from autospec.capture_trace import traced_plainly
from autospec.decompose import functional
from autospec.errors import CaptureError, OptionError
from autospec.heads.eagle3 import Eagle3Head
from autospec.heads.medusa import MedusaHeads
from autospec.heads.mtp import MTPHead
from autospec.ir.caches import bytes_per_token, index_keys, kept_rows, spared_in_float8
from autospec.ir.match import calls, operand
from autospec.ir.roles import the
from autospec.ir.runner import run_stages
from autospec.ir.sizes import constants_of
from autospec.ir.slots import Slot, find_slot
from autospec.kernels.select_keys import select_keys
from autospec.legality import check_selections
from autospec.passes.tap_hidden_states import layer_outputs, missing_taps
from autospec.program import CapturedHead, CapturedModel, ModelFacts


class _Called(nn.Module):
    """A function of a head as a module, so that it can be exported."""

    def __init__(self, head: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = head, function

    def forward(self, *inputs: Tensor) -> Any:
        with traced_plainly():
            return self.function(*inputs)


def capture_head(head: Any, target: CapturedModel) -> CapturedHead:
    """Export a head's passes with symbolic batch and length.

    Raises:
        CaptureError: the target's graph does not show the hidden states that the head reads.
        OptionError: the head belongs to another target.
    """
    if isinstance(head, Eagle3Head):
        captured = _capture_eagle3(head, target)
    elif isinstance(head, MedusaHeads):
        captured = _capture_medusa(head, target)
    elif isinstance(head, MTPHead):
        captured = _capture_mtp(head, target)
    else:
        raise OptionError(f"{type(head).__name__} is no draft head", at="speculative_model", where="autospec.optimize",
                          help="give a folder, an Eagle3Head, MedusaHeads or an MTPHead")  # fmt: skip
    for reason in missing_taps(target.graph, captured.tap_after):
        raise CaptureError(reason, at=f"tap_after={captured.tap_after}", where=target.facts.name,
                           help="a draft head needs hidden states that this model's graph does not show")  # fmt: skip
    _check_fits(captured, target)
    return captured


def _check_fits(head: CapturedHead, target: CapturedModel) -> None:
    """The head reads hidden states as wide as the target's, and guesses tokens that the target has."""
    outputs, taps = layer_outputs(target.graph), find_slot(head.first, "taps")
    tapped = [outputs[layer] for layer in head.tap_after] or [operand(the(target.graph, "lm_head"))]
    assert taps is not None, "a head reads taps"
    ours, theirs = int(taps.meta["val"].shape[-1]), sum(int(node.meta["val"].shape[-1]) for node in tapped)
    known = head.facts.vocab_size if head.d2t is None else int((torch.arange(len(head.d2t)) + head.d2t.cpu()).max()) + 1
    if ours != theirs:
        reason = f"the head reads {ours} hidden values per token, the target's layers leave {theirs}"
    elif known > target.facts.vocab_size:
        reason = f"the head guesses among {known} tokens, the target knows {target.facts.vocab_size}"
    else:
        return
    raise OptionError(reason, at="speculative_model", where="autospec.optimize",
                      help="use a head that was trained for this target")  # fmt: skip


def _capture_eagle3(head: Eagle3Head, target: CapturedModel) -> CapturedHead:
    spec = head.spec
    ids = torch.zeros(EXAMPLE_SHAPE, dtype=torch.int64)
    positions = torch.arange(EXAMPLE_SHAPE[1]).expand(EXAMPLE_SHAPE).contiguous()
    taps = torch.zeros(*EXAMPLE_SHAPE, len(spec.tap_after) * spec.target_hidden_size)
    hidden = torch.zeros(*EXAMPLE_SHAPE, spec.layer.hidden_size)

    def first(input_ids: Tensor, taps: Tensor, position_ids: Tensor) -> Any:
        return head(input_ids, head.fuse(taps), position_ids)

    order = "input_ids", "taps", "position_ids"
    graphs = [
        _export(head, first, order, (ids, taps, positions), target),
        _export(head, head.forward, ("input_ids", "hidden", "position_ids"), (ids, hidden, positions), target),
    ]
    weights = _weights(graphs)
    d2t = head.d2t
    facts = _facts(head, graphs[0], target, spec.draft_vocab_size)
    return CapturedHead(graphs[0], graphs[1], weights, facts, spec.tap_after, d2t)


def _capture_medusa(head: MedusaHeads, target: CapturedModel) -> CapturedHead:
    graph = _export(head, head.forward, ("taps",), (torch.zeros(*EXAMPLE_SHAPE, head.hidden_size),), target)
    facts = _facts(head, graph, target, head.vocab_size)
    return CapturedHead(graph, None, _weights([graph]), facts, max_draft_len=head.num_heads)


def _capture_mtp(head: MTPHead, target: CapturedModel) -> CapturedHead:
    ids = torch.zeros(EXAMPLE_SHAPE, dtype=torch.int64)
    positions = torch.arange(EXAMPLE_SHAPE[1]).expand(EXAMPLE_SHAPE).contiguous()
    hidden = torch.zeros(*EXAMPLE_SHAPE, head.hidden_size)

    def export(depth: int, source: str) -> fx.GraphModule:
        run = functools.partial(head.forward, depth)
        return _export(head, run, ("input_ids", source, "position_ids"), (ids, hidden, positions), target)

    with layers_through_interfaces(head.target):
        first, following = export(0, "taps"), export(0, "hidden")
        deeper = tuple(export(depth, "hidden") for depth in range(1, len(head.depths)))
    if head.shares_selection:
        _share_selection(first, following)
    every = [_facts(head, graph, target, target.facts.vocab_size) for graph in (first, *deeper)]
    facts = replace(
        every[0], num_kv_layers=sum(one.num_kv_layers for one in every),
        bytes_per_token=sum(one.bytes_per_token for one in every), num_indexers=sum(one.num_indexers for one in every),
        spared_in_float8=sum(one.spared_in_float8 for one in every),
    )  # fmt: skip
    return CapturedHead(first, following, _weights([first, following, *deeper]), facts, deeper=deeper)


def _share_selection(first: fx.GraphModule, following: fx.GraphModule) -> None:
    """Let the first pass return which keys it selects, and the following ones take such a choice for their own."""
    made, chosen = (list(calls(graph, select_keys)) for graph in (first, following))
    assert len(made) == len(chosen) == 1, "a module that shares its selection has one indexer"
    output = first.graph.output_node()
    output.args = ((*output.args[0], made[0]),)  # type: ignore[misc]
    with following.graph.inserting_before(next(iter(following.graph.nodes))):
        taken = following.graph.placeholder("indices")
    taken.meta.update(slot=Slot("input", "indices", (), torch.int32), val=chosen[0].meta["val"], module="")
    chosen[0].replace_all_uses_with(taken)
    following.graph.eliminate_dead_code()
    for graph in (first, following):
        graph.graph.lint()
        graph.recompile()


def _export(
    head: nn.Module, function: Callable[..., Any], names: Sequence[str], inputs: tuple[Tensor, ...], target: CapturedModel
) -> fx.GraphModule:
    """One pass of the head as a symbolic graph with roles."""
    weight = next(head.parameters())
    if weight.device != target.facts.device or weight.dtype != target.facts.dtype:
        raise OptionError(
            f"the head is {weight.dtype} on {weight.device}, the target {target.facts.dtype} on {target.facts.device}",
            at="speculative_model", where="autospec.optimize", help="convert it with head.to(...)",
        )  # fmt: skip
    given = tuple(x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype) for x in inputs)
    auto = torch.export.Dim.AUTO
    dims = tuple({0: auto, 1: auto} for _ in given)
    name = type(head).__name__
    with torch.no_grad():
        exported = torch.export.export(_Called(head, function).eval(), given, dynamic_shapes=(dims,), strict=False)
        graph, weights = with_slots(functional(exported), name, names)
    graph.meta["weights"] = weights
    records = run_stages(graph, pipeline.understand_head(), graph_name="draft.capture", debug=debug.options())
    check_selections(name, graph, [refusal for record in records for refusal in record.refusals])
    return graph


def _weights(graphs: Sequence[fx.GraphModule]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for graph in graphs:
        found |= graph.meta.pop("weights") | constants_of(graph)
    return found


def _facts(head: nn.Module, graph: fx.GraphModule, target: CapturedModel, vocab_size: int) -> ModelFacts:
    return ModelFacts(
        name=type(head).__name__, vocab_size=vocab_size, max_positions=target.facts.max_positions,
        dtype=target.facts.dtype, device=target.facts.device, num_kv_layers=len(kept_rows(graph)),
        bytes_per_token=bytes_per_token(graph), num_indexers=len(index_keys(graph)), spared_in_float8=spared_in_float8(graph),
    )  # fmt: skip
