"""On a CPU, let linear layers read weights in panels, in the order in which the kernel walks over them.

    %y = aten.linear(%x, %w)   ->   %y = autospec_cpu.panel_linear(%x, %w_packed, None)

Legal: the packed weight holds the same numbers; the sum over inputs may round in another order, as any matrix product
may. The packed copy is made once and shared by all graphs of a model.
Gives up on: computed weights, other devices and dtypes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import fx

from autospec.ir.build import Builder, declare, substitute
from autospec.ir.match import aten, calls, operand
from autospec.ir.passes import Notes, Pass
from autospec.ir.slots import Slot, slot_of
from autospec.kernels.packed_linear import linear, why_not


@dataclass(frozen=True, kw_only=True)
class PackLinears(Pass):
    """Replace aten.linear by the packed one where the CPU profits."""

    name = "pack-linears"
    is_optional = True

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        count = 0
        for node in calls(module, aten.linear):
            weight = operand(node, 1)
            is_stored = weight.op == "placeholder" and slot_of(weight).kind == "weight"
            reason = why_not(weight.meta["val"]) if is_stored else "the weight is computed, not stored"
            if reason is not None:
                notes.refuse(node, reason)
                continue
            packed = declare(module, packed_slot(slot_of(weight)), weight.meta["val"])
            builder = Builder(module, node, node.meta.get("module", ""))
            bias = node.args[2] if len(node.args) > 2 else None
            replacement = builder.call(linear, node.args[0], packed, bias)
            substitute(node, replacement)
            if not weight.users:
                module.graph.erase_node(weight)
            count += 1
        return count


def packed_slot(slot: Slot) -> Slot:
    """The slot of a weight's packed copy."""
    return dataclasses.replace(slot, name=f"{slot.name}@panels", parts=slot.parts or (slot.name,), form="panels")
