"""Remove what computes nothing: full slices, copies to the same dtype, reshapes to the same shape, dropout.

    %s = aten.slice(%x, 0, 0, 9223372036854775807)   ->   uses of %s read %x
    %c = aten._to_copy(%x : f32, dtype=f32)          ->   uses of %c read %x

Legal: the result equals the operand, element by element; nothing in a captured graph writes to a tensor that aliases
another (export is functional; only state is mutated, by ops that say so).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from autospec.ir.match import aten, calls
from autospec.ir.passes import Notes, Pass

_CANDIDATES = (
    aten.slice.Tensor, aten._to_copy, aten.to.dtype, aten.view, aten.reshape, aten.expand, aten.contiguous, aten.clone,
    aten.dropout, aten.alias, aten.detach,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FoldNoops(Pass):
    """Remove nodes whose result is their operand."""

    name = "fold-noops"
    is_optional = True

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        count = 0
        for node in calls(module, _CANDIDATES):
            source = node.args[0]
            if isinstance(source, fx.Node) and _is_same(source.meta["val"], node.meta["val"]):
                role = node.meta.get("role")
                if role is not None and "role" not in source.meta:
                    source.meta["role"] = role
                node.replace_all_uses_with(source)
                module.graph.erase_node(node)
                count += 1
        return count


def _is_same(before: torch.Tensor, after: torch.Tensor) -> bool:
    return (
        before.dtype == after.dtype
        and before.device == after.device
        and before.shape == after.shape
        and before.stride() == after.stride()
    )
