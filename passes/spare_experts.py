"""Send rows that hold no token to no expert, so that an expert's weights are read for real tokens only.

    %o = autospec.experts(%x, %top_k_index, ...)   ->   %there = autospec.present_nodes(%tree_parents, %finished)
                                                        %index = aten.masked_fill(%top_k_index, not %there, -1)
                                                        %o = autospec.experts(%x, %index, ...)

    (prefill, a drafter's catch-up)                     %there = arange(N) < %q_lens

Legal: the results of absent draft nodes, of rows past q_lens and of finished requests are read by no one.
Gives up on: experts whose rows are not the [B, N] tokens of the call, in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, calls, operand
from autospec.ir.passes import Notes, Pass
from autospec.ir.roles import with_role
from autospec.kernels.experts import experts
from autospec.kernels.tree_tables import present_nodes, present_rows


@dataclass(frozen=True, kw_only=True)
class SpareExperts(Pass):
    """Absent nodes and padding are routed to no expert."""

    name = "spare-experts"
    is_optional = True
    batch_size: int
    q_len: int
    max_nodes: int

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if any(calls(module, (present_nodes, present_rows))):
            return 0
        count = 0
        missing: fx.Node | None = None
        for node in calls(module, experts):
            index = operand(node, 1)
            rows, _ = index.meta["val"].shape
            if rows != self.batch_size * self.q_len:
                notes.refuse(node, f"it has {rows} rows for {self.batch_size} requests of {self.q_len} tokens")
                continue
            missing = missing or self._missing(module)
            builder = Builder(module, node, node.meta.get("module", ""))
            node.update_arg(1, builder.call(aten.masked_fill.Scalar, index, missing, -1))
            count += 1
        return count

    def _missing(self, module: fx.GraphModule) -> fx.Node:
        """[B N, 1] bool: rows that hold no token; computed once, at the beginning."""
        given = with_role(module, "q_lens")
        first = next(node for node in module.graph.nodes if node.op != "placeholder")
        if given:
            last = given[0] if given[0].op == "call_function" else None
            builder = Builder(module, first if last is None else last.next)
            there = builder.call(present_rows, given[0], self.q_len)
        else:
            builder = Builder(module, first)
            parents = builder.state("tree_parents", (self.batch_size, self.max_nodes), torch.int32, fill=-1)
            if self.q_len < self.max_nodes:
                parents = builder.call(aten.slice.Tensor, parents, 1, 0, self.q_len)
            finished = builder.state("finished", (self.batch_size,), torch.bool, 1)
            there = builder.call(present_nodes, parents, finished)
        flat = builder.call(aten.reshape.default, there, [self.batch_size * self.q_len, 1])
        return builder.call(aten.logical_not.default, flat)
