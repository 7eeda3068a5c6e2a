"""The draft's linear layers read their weights in float8, a scale for every output.

    %y = aten.linear(%x, %draft.w, %b)   ->   %y = autospec.fused_linear(%x, %draft.w@fp8, %b, %draft.w@fp8_scales)

Legal: the target chooses every token and the draft only guesses, so this costs acceptance and never a token. Half the bytes
are read where bytes are the cost.
Gives up on: weights of the target, which a draft may share; weights that are computed; more rows than the kernel takes, such as
a prompt's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import fx

from autospec.ir.build import Builder, declare, substitute
from autospec.ir.match import aten, calls, operand
from autospec.ir.passes import Notes, Pass
from autospec.ir.slots import Form, Slot, slot_of
from autospec.kernels.fused_linear import MOST_SCALED, fused_linear


@dataclass(frozen=True, kw_only=True)
class QuantizeDraft(Pass):
    """Replace the weights of linear layers whose names begin with `prefix`."""

    name = "quantize-draft"
    prefix: str

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        count = 0
        for node in calls(module, aten.linear):
            weight = operand(node, 1)
            if weight.op != "placeholder":
                continue
            slot = slot_of(weight)
            if not all(name.startswith(self.prefix) for name in slot.parts or (slot.name,)):
                continue
            rows = node.meta["val"].numel() // node.meta["val"].shape[-1]
            reason = _why_not(slot, rows)
            if reason is not None:
                notes.refuse(node, reason)
                continue
            quantized, scales = (declare(module, _slot(slot, form)) for form in ("fp8", "fp8_scales"))
            builder = Builder(module, node, node.meta.get("module", ""))
            bias = node.args[2] if len(node.args) > 2 else None
            new = builder.call(fused_linear, node.args[0], quantized, bias, scales)
            substitute(node, new)
            if not weight.users:
                module.graph.erase_node(weight)
            count += 1
        return count


def _why_not(slot: Slot, rows: int) -> str | None:
    if slot.kind != "weight":
        return "the weight is computed, not stored"
    if rows > MOST_SCALED:
        return f"{rows} rows are more than {MOST_SCALED}, where reading the weight is not what costs"
    return None


def _slot(slot: Slot, form: Form) -> Slot:
    """The slot of a weight in another form."""
    shape, dtype = (slot.shape, torch.float8_e4m3fn) if form == "fp8" else (slot.shape[:1], torch.float32)
    parts = slot.parts or (slot.name,)
    return dataclasses.replace(slot, name=f"{slot.name}@{form}", shape=shape, dtype=dtype, parts=parts, form=form)
