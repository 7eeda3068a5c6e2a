"""Where a kernel of index logits does not take a step's width, or takes it slowly, every token becomes a request.

    %s = autospec.dsa_indexer_logits(%q, %w, %pages, %page_table, %kv_lens, ...)     q [B, N, Hi, Di]
        ->   autospec.expand_requests(%page_table, %kv_lens, N, %expanded_table, %expanded_lens)
             %s = autospec.dsa_indexer_logits(view(%q, [B N, 1, ...]), view(%w), %pages, %expanded_table, %expanded_lens, ...)
             %s = view(%s, [B, N, num_slots])

Paged kernels of index logits take sets of widths natively, which their implementations declare ({1, 2} or {1, 2, 4}); ours
take any. Where both routes can run, both are measured on a GPU (kernels/choice.py) and the faster one is taken; elsewhere
the native one, or the one that AUTOSPEC_KERNELS=dsa_indexer_logits=expanded (or native) names.
Legal: a token's scores do not depend on its neighbours, and dsa_topk reads no score past its token's own slot, in a chain
or a tree. Tables and lengths are written anew by every step, and behind whatever moves the lengths, into buffers for the
widest step.
Not touched: prompts, whose padding the expanded form would not know, and steps of one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autospec.ir.build import Builder, value_of
from autospec.ir.fakes import fake_mode
from autospec.ir.match import argument, aten, calls, operand
from autospec.ir.passes import Notes, Pass
from autospec.ir.slots import find_slot
from autospec.kernels.choice import can_measure, times_of
from autospec.kernels.dsa_indexer_logits import dsa_indexer_logits, expand
from autospec.kernels.expand_requests import expand_requests
from autospec.kernels.registry import find


@dataclass(frozen=True)
class Route:
    """What one way of calling costs: microseconds where known, and why it cannot be taken."""

    why_not: str | None
    microseconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class ExpandDsaDecode(Pass):
    """Index logits of several tokens per request become those of requests of one token each, where that pays."""

    name = "expand-dsa-decode"
    is_optional = True
    disabled: frozenset[str] = frozenset()
    route: str = ""  # native, expanded, or "": as measured

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        widest = _widest_step(module)
        found = (node for node in calls(module, dsa_indexer_logits) if 1 < _width(node) <= widest)
        todo = [node for node in found if argument(node, "q_lens") is None]
        written: dict[tuple[Any, ...], tuple[fx.Node, fx.Node]] = {}
        count = 0
        for node in todo:
            expands, reason = self._decide(module, node)
            if not expands:
                notes.refuse(node, reason)
                continue
            notes.say(f"{_width(node)} tokens per request: {reason}")
            _rewrite(module, node, written)
            count += 1
        return count

    def _decide(self, module: fx.GraphModule, node: fx.Node) -> tuple[bool, str]:
        """Whether to expand, and why, or why not."""
        if self.route:
            return self.route == "expanded", f"AUTOSPEC_KERNELS asks for the {self.route} form"
        arguments = dsa_indexer_logits.bind(value_of(node.args), value_of(node.kwargs))
        with fake_mode(module), torch.no_grad():
            flat = expand(arguments)
        native, expanded = (self._ask(given) for given in (arguments, flat))
        if native.why_not is not None and expanded.why_not is None:
            return True, native.why_not
        if native.microseconds is None or expanded.microseconds is None:
            return False, expanded.why_not or "the native form runs, and nothing was measured"
        told = f"native {native.microseconds:.1f} us, expanded {expanded.microseconds:.1f} us"
        return expanded.microseconds < native.microseconds, told

    def _ask(self, arguments: Mapping[str, Any]) -> Route:
        """The fastest implementation that can run these arguments."""
        able, reasons = [], []
        for one in dsa_indexer_logits.implementations:
            reason = one.refusal(arguments, self.disabled)
            if reason is None:
                able.append(one)
            else:
                reasons.append(f"{one.backend}: {reason}")
        if not able:
            return Route("; ".join(reasons) or "no implementation runs here")
        if not can_measure(arguments):
            return Route(None)
        times = times_of(dsa_indexer_logits, able, arguments)
        return Route(None, min(times.microseconds.values(), default=None))

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        for node in calls(module, expand_requests):
            if operand(node, 1).meta["val"].shape[0] * argument(node, "q_len") > operand(node, 4).meta["val"].shape[0]:
                yield f"%{node.name} writes past its buffers"


def _widest_step(module: fx.GraphModule) -> int:
    """Nodes of the widest step of the program; what has more tokens reads a prompt."""
    draft = find_slot(module, "draft_tokens")
    return int(draft.meta["val"].shape[1]) if draft is not None else 0


def _width(node: fx.Node) -> int:
    return int(operand(node).meta["val"].shape[1])


def _rewrite(module: fx.GraphModule, node: fx.Node, written: dict[tuple[Any, ...], tuple[fx.Node, fx.Node]]) -> None:
    q, weights, pages, page_table, kv_lens = (operand(node, index) for index in range(5))
    batch, q_len = q.meta["val"].shape[:2]
    builder = Builder(module, node, node.meta.get("module", ""))
    place = (page_table, kv_lens, q_len, _times_written(node, kv_lens), _times_written(node, page_table))
    if place not in written:
        written[place] = _expanded_rows(builder, page_table, kv_lens, q_len, len(written))
    table, lens = written[place]
    tokens = [
        builder.call(aten.reshape.default, one, [batch * q_len, 1, *one.meta["val"].shape[2:]]) for one in (q, weights)
    ]
    options = {name: argument(node, name) for name in ("scale", "index_topk", "index_scales")}
    scores = builder.call(dsa_indexer_logits, *tokens, pages, table, lens, **options)
    made = builder.call(aten.view.default, scores, [batch, q_len, scores.meta["val"].shape[2]])
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


def _times_written(node: fx.Node, state: fx.Node) -> int:
    """How many ops in front of a node write a tensor: lengths move when a step commits, and a draft goes on behind that."""
    count = 0
    for user in state.users:
        kernel = find(user.target)
        given = kernel.bind(user.args, user.kwargs) if kernel is not None and kernel.mutates else {}
        count += any(given[name] is state for name in (kernel.mutates if kernel is not None else ())) and user < node
    return count


def _expanded_rows(
    builder: Builder, page_table: fx.Node, kv_lens: fx.Node, q_len: int, number: int
) -> tuple[fx.Node, fx.Node]:
    """Tables and lengths of one token each, in buffers that hold the widest step's."""
    batch, max_pages = page_table.meta["val"].shape
    most = batch * _widest_step(builder.module)
    table = builder.state(f"expanded_table.{number}", (most, max_pages), torch.int32)
    lens = builder.state(f"expanded_lens.{number}", (most,), torch.int32)
    builder.call(expand_requests, page_table, kv_lens, q_len, table, lens)
    if batch * q_len == most:
        return table, lens
    used = [builder.call(aten.slice.Tensor, one, 0, 0, batch * q_len) for one in (table, lens)]
    return used[0], used[1]
