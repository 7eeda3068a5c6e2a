"""Matrix products that sum nothing become products of elements, which Inductor fuses with what reads them.

    %f = aten.matmul(%inv_freq : [1, D/2, 1], %place : [1, 1, N])   ->   %f = aten.mul(%inv_freq, %place)
    %c = aten.cos(%f)

Rotary embeddings compute their angles so in every pass of a draft, and a matrix product is a kernel of its own, with another one
in front that makes its operand: a step of a tiny EAGLE-3 tree of four levels has 64 launches instead of 74 (torch 2.11's
Inductor, CPU, 2026-11-21).

Legal: each element is one product, rounded once; 0 + x * y and x * y differ in the sign of a zero at most.
Gives up on: float32 where the machine may round the operands of matrix products (TF32); halves, whose result is rounded before
it is read, and a fused one's is not; results that are added to something, with which a GPU would round them once together;
results that would lie in memory in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from autospec.ir.build import Builder, device_of, substitute
from autospec.ir.match import aten, calls, is_call, operand
from autospec.ir.passes import Notes, Pass

_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)


@dataclass(frozen=True, kw_only=True)
class MultiplyOuter(Pass):
    """Replace outer products written as matrix products."""

    name = "multiply-outer"
    is_optional = True

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        count = 0
        for node in calls(module, _PRODUCTS):
            if not _is_outer(node):
                continue
            reason = _why_not(node, device_of(module)) or _multiply(module, node)
            if reason is None:
                count += 1
            else:
                notes.refuse(node, reason)
        return count


def _is_outer(node: fx.Node) -> bool:
    """[.., M, 1] times [.., 1, N]"""
    x, y = (operand(node, index).meta["val"] for index in (0, 1))
    return x.dim() > 1 and y.dim() > 1 and x.shape[-1] == 1


def _why_not(node: fx.Node, device: torch.device) -> str | None:
    """Why one product per element would be another number; None if it is the same."""
    dtype = node.meta["val"].dtype
    if any(is_call(user, (aten.add, aten.sub)) for user in node.users):
        return "the product is added to something, and rounded before"
    if dtype not in (torch.float32, torch.float64):
        return f"a product in {dtype} is rounded before it is read, and a fused one is not"
    # Of several settings, old and new, this one is what torch's libraries are told; "none" is the default, which rounds nothing.
    backend = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    precision = backend.matmul.fp32_precision
    if dtype == torch.float32 and precision not in ("none", "ieee"):
        return f"float32 matrix products may round their operands here ({precision})"
    return None


def _multiply(module: fx.GraphModule, node: fx.Node) -> str | None:
    """Rewrite one product, or say why not."""
    product = Builder(module, node, node.meta.get("module", "")).call(aten.mul.Tensor, *node.args)
    if product.meta["val"].stride() != node.meta["val"].stride():
        module.graph.erase_node(product)
        return "the product would lie in memory in another order"
    substitute(node, product)
    return None
