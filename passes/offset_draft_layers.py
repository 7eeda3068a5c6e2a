"""Move a draft's KV layers behind the target's, and its weights into a name space of their own.

    state k_pages.0   ->   state k_pages.32        (layer_idx_offset = 32)
    weight lm_head.weight   ->   weight draft.lm_head.weight

Legal: slots are names; nothing that computes is touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from autospec.ir.passes import Notes, Pass
from autospec.ir.slots import Slot, assign_slot, is_pages, slot_of

WEIGHT_PREFIX = "draft."


@dataclass(frozen=True, kw_only=True)
class OffsetDraftLayers(Pass):
    """Rename the draft's KV layers and weights so that they can live beside the target's."""

    name = "offset-draft-layers"
    layer_idx_offset: int

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if not list(self.ensures(module)):
            return 0
        count = 0
        for node in module.graph.find_nodes(op="placeholder"):
            slot = slot_of(node)
            renamed = self.renamed(slot)
            if renamed != slot.name:
                assign_slot(node, dataclasses.replace(slot, name=renamed))
                count += 1
        return count

    def renamed(self, slot: Slot) -> str:
        if slot.kind == "weight":
            return WEIGHT_PREFIX + slot.name
        if is_pages(slot):
            stem, _, index = slot.name.partition(".")
            return f"{stem}.{int(index) + self.layer_idx_offset}"
        return slot.name

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        for node in module.graph.find_nodes(op="placeholder"):
            slot = slot_of(node)
            if slot.kind == "weight" and not slot.name.startswith(WEIGHT_PREFIX):
                yield f"weight {slot.name} could be taken for one of the target's"
