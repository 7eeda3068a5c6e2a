"""Where steps must be equal to the bit, attention sums in an order that does not depend on where a token stands.

    %o = autospec.paged_attention(...)   ->   %o = autospec.ordered_attention(...)

Legal: the same attention; only kernels that sum in another order are no longer offered. With steps of one width for every
drafter, all other ops compute each row alike wherever it stands.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from autospec.ir.build import Builder, substitute
from autospec.ir.match import argument, calls
from autospec.ir.passes import Notes, Pass
from autospec.kernels.ordered_attention import ordered_attention
from autospec.kernels.paged_attention import paged_attention


@dataclass(frozen=True, kw_only=True)
class FixOrder(Pass):
    """Replace paged_attention by ordered_attention."""

    name = "fix-order"

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        for node in calls(module, paged_attention):
            if argument(node, "tree_mask") is not None:
                yield f"%{node.name} has a tree mask, and slots of a tree are in another order once they are committed"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        found = list(calls(module, paged_attention))
        for node in found:
            options = paged_attention.bind(node.args, node.kwargs)
            del options["tree_mask"]
            builder = Builder(module, node, node.meta.get("module", ""))
            ordered = builder.call(ordered_attention, **{name: value for name, value in options.items() if value is not None})
            substitute(node, ordered)
        return len(found)
