"""Write down once what nodes are for, so that no later pass reads names.

    %logits = aten.linear(%h, %w)   ->   same graph; the linear behind which only row-local ops stand is the "lm_head",
                                         attention calls are "attention"; every node of decoder layer i carries
                                         layer = i, and the last one whose value leaves it is its "layer_output"

Legal: nothing is rewritten. Layers are the children of the module that holds the attention calls, in call order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from autospec.ir.match import aten, calls, is_call, operand, returned
from autospec.ir.passes import Notes, Pass
from autospec.ir.roles import tag
from autospec.ir.slots import slot_of
from autospec.kernels.attention import attention
from autospec.kernels.latent_attention import latent_attention

# What may stand between the lm_head and the output without mixing rows: softcaps, scales, casts.
ROW_LOCAL = (
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor, aten.sub.Tensor, aten.tanh,
    aten._to_copy, aten.clone, aten.neg,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TagRoles(Pass):
    """Tag attention calls, layers, the lm_head and the logits."""

    name = "tag-roles"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        attention_calls = list(calls(module, (attention, latent_attention)))
        for node in attention_calls:
            tag(node, "attention")
        _tag_layers(module, attention_calls, notes)
        head = returned(module)
        while _is_row_local(head):
            head = operand(head)
        if is_call(head, aten.linear):
            tag(head, "lm_head")
            notes.say(f"{len(attention_calls)} attention calls")
        else:
            reason = "the logits do not come straight from a linear layer, so they are computed for every row"
            notes.refuse(head, reason)
        return 0

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        for node in calls(module, (attention, latent_attention)):
            if node.meta.get("role") != "attention":
                yield f"%{node.name} is an attention call without its role"


def _is_row_local(node: fx.Node) -> bool:
    """One row in, the same row out: no other operand but numbers and weights."""
    others = [value for value in (*node.args[1:], *node.kwargs.values()) if isinstance(value, fx.Node)]
    return (
        is_call(node, ROW_LOCAL)
        and isinstance(node.args[0], fx.Node)
        and all(other.op == "placeholder" and slot_of(other).kind == "weight" for other in others)
    )


def _tag_layers(module: fx.GraphModule, attention_calls: list[fx.Node], notes: Notes) -> None:
    paths = [node.meta.get("module", "").split(".") for node in attention_calls]
    if len(paths) < 2 or len({tuple(path) for path in paths}) < 2:
        return
    depth = next((i for i in range(min(map(len, paths))) if len({path[i] for path in paths}) > 1), None)
    if depth is None:
        return
    order = {name: index for index, name in enumerate(dict.fromkeys(path[depth] for path in paths))}
    prefix = paths[0][:depth]
    last: dict[int, fx.Node] = {}
    for node in module.graph.nodes:
        path = node.meta.get("module", "").split(".")
        if path[:depth] == prefix and len(path) > depth and path[depth] in order:
            node.meta["layer"] = order[path[depth]]
            if any(user.meta.get("module", "").split(".")[: depth + 1] != path[: depth + 1] for user in node.users):
                last[node.meta["layer"]] = node
    for node in last.values():
        if "role" not in node.meta:
            tag(node, "layer_output")
    notes.say(f"{len(order)} layers under {'.'.join(prefix) or 'the model'}")
