"""Splice Medusa heads into the target's graph as its drafter.

    return [%emitted, %taps]   ->   %h = %taps[last accepted node] : [B, 1, H]
                                    %l = heads(%h) : [B, num_heads, V]                    one row of logits per depth
                                    autospec.store_draft(...)                             the same candidates for all nodes
                                    return [%emitted]

Legal: a draft never changes what is emitted. The heads keep no state, so there is nothing to catch up with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from autospec.drafting import Frontier, Grower, committed_features, nothing_committed
from autospec.ir.build import Builder, splice
from autospec.ir.match import aten, calls, returned
from autospec.ir.passes import Notes, Pass
from autospec.kernels.commit import last_rows, store_draft
from autospec.state import StateShape


@dataclass(frozen=True, kw_only=True)
class AttachMedusaHeads(Pass):
    """Run the heads once, on what the lm_head read at the last accepted node."""

    name = "attach-medusa-heads"
    sizes: StateShape
    heads: fx.GraphModule = field(repr=False, compare=False)  # taps [B, 1, H] -> logits [B, num_heads, V]
    draft_temperature: float = 1.0

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        return nothing_committed(module)

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if any(calls(module, store_draft)):
            return 0
        builder = Builder(module, owner="draft")
        known = committed_features(builder)
        hidden = builder.call(last_rows, known.taps, known.count)
        all_logits = splice(builder, self.heads, {"taps": hidden})[0]

        def of_depth(index: int) -> fx.Node:
            return builder.call(aten.slice.Tensor, all_logits, 1, index, index + 1)

        def level(nodes: Frontier) -> fx.Node:
            return of_depth(nodes.level + 1)

        Grower(builder, self.sizes, self.draft_temperature, is_new=known.is_new).grow(of_depth(0), level)
        module.graph.output_node().args = ((returned(module),),)
        notes.say(f"{self.sizes.tree}: one pass of {all_logits.meta['val'].shape[1]} heads")
        return 1
