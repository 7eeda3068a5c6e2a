"""Let the tokens of a call be the nodes of a tree instead of a chain.

    %o = autospec.paged_attention(%q, ..., %kv_lens)   ->   %mask, %depth = autospec.tree_tables(%tree_parents)
                                                            %o = autospec.paged_attention(..., tree_mask=%mask)
    %pos = autospec.node_positions(%kv_lens, N, max)   ->   %pos = autospec.node_positions(%kv_lens, N, max, %depth)

    (a drafter's graph)                                ->   input %tree_mask; autospec.append_kv(..., %append_lens)

Legal: a node's result depends on other tokens through attention only, and the op shows it the committed rows and its
ancestors; where attention reads selected slots, dsa_topk selects among these. A drafter appends level after level, so its
rows stand further back than what its tree hangs from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import argument, calls
from autospec.ir.passes import Notes, Pass
from autospec.ir.roles import tag
from autospec.ir.slots import Slot, find_slot
from autospec.kernels.append_index_keys import append_index_keys
from autospec.kernels.append_kv import append_kv
from autospec.kernels.append_latent import append_latent
from autospec.kernels.dsa_indexer_logits import dsa_indexer_logits
from autospec.kernels.dsa_topk import dsa_topk
from autospec.kernels.paged_attention import paged_attention
from autospec.kernels.paged_mla import paged_mla
from autospec.kernels.tree_tables import node_positions, tree_tables

_MASKED = (paged_attention, paged_mla, dsa_topk)  # ops that decide what a node sees
# Ops that follow the rows of this call: append, or score up to them.
_PLACED = (append_kv, append_latent, append_index_keys, dsa_indexer_logits)


@dataclass(frozen=True, kw_only=True)
class MaskTree(Pass):
    """Attention follows tree_parents."""

    name = "mask-tree"
    batch_size: int
    num_nodes: int
    is_mask_given: bool = False  # the mask is an input of the graph (a drafter's level) instead of made from the state

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        if not self.is_mask_given and find_slot(module, "position_ids") is not None:
            yield "position_ids is still an input: run widen-decode first"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        todo = [node for node in calls(module, _MASKED) if argument(node, "tree_mask") is None]
        if self.is_mask_given:
            return self._take_mask(module, todo)
        if todo:
            self._make_mask(module, todo)
        return len(todo)

    def _make_mask(self, module: fx.GraphModule, todo: list[fx.Node]) -> None:
        builder = Builder(module, next(node for node in module.graph.nodes if node.op != "placeholder"))
        parents = builder.state("tree_parents", (self.batch_size, self.num_nodes), torch.int32, fill=-1)
        mask, depth = builder.calls(tree_tables, parents)
        tag(mask, "tree_mask")
        for node in todo:
            node.update_kwarg("tree_mask", mask)
        for node in calls(module, node_positions):
            node.args = (*node.args[:3], depth)

    def _take_mask(self, module: fx.GraphModule, todo: list[fx.Node]) -> int:
        placed = [node for node in calls(module, _PLACED) if node.args[-1] is find_slot(module, "kv_lens")]  # it comes last
        if not todo and not placed:
            return 0
        builder = Builder(module, (todo or placed)[0])
        if todo:  # a level that is told which slots to read needs no mask
            words = (self.num_nodes + 31) // 32
            mask = builder.slot(Slot("input", "tree_mask", (self.batch_size, self.num_nodes, words), torch.int32))
            for node in todo:
                node.update_kwarg("tree_mask", mask)
        lens = builder.slot(Slot("input", "append_lens", (self.batch_size,), torch.int32))
        for node in placed:
            node.update_arg(len(node.args) - 1, lens)
        return len(todo) or len(placed)

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        for node in calls(module, _MASKED):
            if argument(node, "tree_mask") is None:
                yield f"%{node.name} takes its tokens for a chain"
