"""Compute the logits of the last valid row of each request only, in prefill and in a drafter's catch-up.

    %l = aten.linear(%h, %w)   ->   %last = autospec.last_rows(%h, %q_lens)
                                    %l = aten.linear(%last, %w) : f32[B, 1, V]

Legal: the lm_head and what follows it (casts, scales, softcaps) treat every row alike.
Gives up on: logits that do not come straight from a linear layer; the row is then taken from the finished logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.fakes import fake_mode
from autospec.ir.match import calls, operand, others, returned
from autospec.ir.passes import Notes, Pass
from autospec.ir.roles import tag, the, with_role
from autospec.ir.slots import Slot
from autospec.kernels.commit import last_rows


@dataclass(frozen=True, kw_only=True)
class GatherLogits(Pass):
    """Keep one row of logits per request."""

    name = "gather-logits"
    given_for: int = 0  # batch size; how many rows are valid is then an input of the graph (a spliced draft)

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if any(calls(module, last_rows)):
            return 0
        output = module.graph.output_node()
        if self.given_for:
            tag(Builder(module).slot(Slot("input", "q_lens", (self.given_for,), torch.int32)), "q_lens")
        q_lens = the(module, "q_lens")
        heads = with_role(module, "lm_head")
        if not heads:
            builder = Builder(module, output)
            logits = returned(module)
            notes.refuse(logits, "no lm_head was found, so the logits of every row are computed")
            output.args = ((builder.call(last_rows, logits, q_lens), *others(module)),)
            return 1
        head = heads[0]
        head.update_arg(0, Builder(module, head, head.meta.get("module", "")).call(last_rows, operand(head), q_lens))
        behind = False
        for node in module.graph.nodes:
            behind = behind or node is head
            if behind and node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                with fake_mode(module), torch.no_grad():
                    node.meta["val"] = node.target(*args, **kwargs)
        return 1
