"""Find the indexer that selects each token's keys (DeepSeek sparse attention).

    %s = mul(matmul(float(%q), float(%k)^T), scale)           [B, S, Hi, S], relu of it
    %s = squeeze(matmul(unsqueeze(%w), relu(%s)))       ->   %i = autospec.select_keys(%q, %w, %k, index_topk, scale)
    %i = autospec.top_keys(%s, index_topk)

Legal: the new op's reference is that arithmetic. Elements are followed one by one through views and casts to float32
(autospec.ir.origins) at two sizes: every score must be that of its own token's queries and weights and of the key's own
token, so that keys can be kept in pages. What normed or rotated queries and keys before does not matter. Layers that
reuse an earlier layer's selection read the same node.
Gives up on: scores that are put together in another way, and anything rounded below float32 on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autospec.ir.match import argument, aten, calls, is_call, operand
from autospec.ir.origins import Origins, is_widened, moved_from
from autospec.ir.passes import Notes, Pass
from autospec.ir.sizes import Evaluator
from autospec.kernels.select_keys import select_keys, top_keys

_SIZES = ((2, 3), (3, 5))  # batch and length at which elements are followed


@dataclass(frozen=True)
class Indexer:
    """Where the parts of an indexer stand: q [B, S, Hi, Di], weights [B, S, Hi], k [B, S, Di]."""

    q: fx.Node
    weights: fx.Node
    k: fx.Node
    scale: float


@dataclass(frozen=True, kw_only=True)
class RecognizeDsa(Pass):
    """The best keys of index scores become one op over queries, weights and keys."""

    name = "recognize-dsa"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        count = 0
        for node in calls(module, top_keys):
            found = _indexer(module, node)
            if isinstance(found, str):
                notes.refuse(node, found)
                continue
            given = (found.q, found.weights, found.k, argument(node, "index_topk"), found.scale)
            with module.graph.inserting_before(node):
                made = module.graph.call_function(select_keys.op, given)
            with torch.no_grad():
                made.meta["val"] = select_keys(*fx.map_arg(given, lambda n: n.meta["val"]))
            made.meta["module"] = node.meta.get("module", "")
            node.replace_all_uses_with(made)
            module.graph.erase_node(node)
            count += 1
        module.graph.eliminate_dead_code()
        shared = sum(len(node.users) - 1 for node in calls(module, select_keys))
        if shared:
            notes.say(f"{shared} attention calls share the selection of another")
        return count


def _indexer(module: fx.GraphModule, node: fx.Node) -> Indexer | str:
    """The parts of an indexer, or why there is none."""
    at = [Origins(Evaluator(module, *sizes), widens=True) for sizes in _SIZES]
    scores = operand(node)
    outer = next((one for one in moved_from(scores, widens=True) if is_call(one, aten.matmul)), None)
    if outer is None or not _is_moved(scores, outer, at):
        return "its scores are not a product of head weights and head scores"
    heads: Any = outer.args[1]
    if not is_call(heads, aten.relu):
        return "the scores of its heads do not pass a relu"
    inner, scale = operand(heads), 1.0
    if is_call(inner, aten.mul) and isinstance(factor := inner.args[1], (int, float)):
        inner, scale = operand(inner), float(factor)
    if not is_call(inner, aten.matmul):
        return "the scores of its heads are not a scaled product of queries and keys"
    for one in (inner, outer):
        if (dtype := one.meta["val"].dtype) != torch.float32:
            return f"%{one.name} is computed in {dtype}"
    weights, q = _rows(operand(outer), 3, at), _rows(operand(inner), 4, at)
    k = _rows(operand(inner, 1), 3, at, is_crossed=True)
    for part, what in ((weights, "head weights"), (q, "queries"), (k, "keys")):
        if part is None:
            return f"its {what} are not one row per token"
    return Indexer(q, weights, k, scale)  # type: ignore[arg-type]


def _rows(node: fx.Node, dims: int, at: list[Origins], is_crossed: bool = False) -> fx.Node | None:
    """The tensor [B, S, ...] of so many dimensions that a node is, before it was widened."""
    for candidate in reversed(moved_from(node, widens=True)):
        value = candidate.meta["val"]
        if not isinstance(value, Tensor) or value.dim() != dims or any(map(is_widened, moved_from(candidate, widens=True))):
            continue
        is_by_token = all(o.evaluator.shape(candidate)[:2] == (o.evaluator.batch, o.evaluator.length) for o in at)
        if is_by_token and _is_moved(node, candidate, at, is_crossed):
            return candidate
    return None


def _is_moved(node: fx.Node, source: fx.Node, at: list[Origins], is_crossed: bool = False) -> bool:
    """Are a node's elements those of another in the same order, or (keys) with the last two dimensions crossed?"""
    for origins in at:
        which, number = origins.of(node, [source])
        expected = origins.numbers(source)
        expected = expected.transpose(-1, -2) if is_crossed else expected
        if not (bool((which == 0).all()) and torch.equal(number.flatten(), expected.flatten())):
            return False
    return True
