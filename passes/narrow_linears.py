"""On a GPU, let linear layers of a few rows be a canonical op, so that a kernel can be chosen for them.

    %y = aten.linear(%x, %w)   ->   %y = autospec.skinny_linear(%x, %w, None)

Legal: the same product; sums may round in another order, as in any matrix product.
Gives up on: what the kernel has no use for (select-kernels would put aten.linear back), other devices.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from autospec.ir.build import Builder, device_of, substitute, value_of
from autospec.ir.match import aten, calls
from autospec.ir.passes import Notes, Pass
from autospec.kernels.skinny_linear import skinny_linear


@dataclass(frozen=True, kw_only=True)
class NarrowLinears(Pass):
    """Replace aten.linear where one of our kernels is faster."""

    name = "narrow-linears"
    is_optional = True

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if device_of(module).type != "cuda":
            return 0
        count = 0
        for node in calls(module, aten.linear):
            arguments = skinny_linear.bind(value_of(node.args), {})
            if any(implementation.why_not(arguments) is None for implementation in skinny_linear.implementations):
                builder = Builder(module, node, node.meta.get("module", ""))
                replacement = builder.call(skinny_linear, *node.args)
                substitute(node, replacement)
                count += 1
        return count
