"""Linear layers that read the same input become one: q, k and v; gate and up.

    %q = aten.linear(%x, %wq)             %y = aten.linear(%x, %wq+wk+wv)
    %k = aten.linear(%x, %wk)      ->     %q, %k, %v = slices of %y
    %v = aten.linear(%x, %wv)

Legal: rows of a weight matrix are independent outputs. The parts' weights are concatenated once and their originals
leave the program; a model that runs several times in a graph reads the same concatenated weight each time.
Gives up on: weights that something else reads too, different dtypes, some with a bias and some without.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from autospec.ir.build import Builder, declare
from autospec.ir.match import aten, calls
from autospec.ir.passes import Notes, Pass
from autospec.ir.slots import Slot, slot_of


def _slot(node: object) -> Slot | None:
    return slot_of(node) if isinstance(node, fx.Node) and node.op == "placeholder" else None


def _weights(group: list[fx.Node]) -> list[object]:
    return [node.args[1:] for node in group]


def _why_not(group: list[fx.Node], groups: dict[fx.Node, list[fx.Node]]) -> str | None:
    if len({len(node.args) for node in group}) > 1:
        return "some of the layers have a bias and some do not"
    for node in group:
        for weight in node.args[1:]:
            slot = _slot(weight)
            if slot is None or slot.kind != "weight":
                return "a weight is computed, not stored"
            others = [groups.get(user, []) for user in weight.users if user is not node]  # type: ignore[union-attr]
            if any(other is group or _weights(other) != _weights(group) for other in others):
                return f"{slot.name} is read by something else too"
    if len({_slot(node.args[1]).dtype for node in group}) > 1:  # type: ignore[union-attr]
        return "the weights have different dtypes"
    return None


@dataclass(frozen=True, kw_only=True)
class FuseLinears(Pass):
    """Concatenate linear layers of one input."""

    name = "fuse-linears"
    is_optional = True

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        by_input: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in calls(module, aten.linear):
            if isinstance(node.args[0], fx.Node):
                by_input[node.args[0]].append(node)
        group_of = {node: group for group in by_input.values() for node in group}
        groups = [group for group in by_input.values() if len(group) > 1]
        reasons = [_why_not(group, group_of) for group in groups]
        for group, reason in zip(groups, reasons, strict=True):
            if reason is not None:
                notes.refuse(group[0], reason)
            else:
                _fuse(module, group)
        return reasons.count(None)

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        return ()


def _fuse(module: fx.GraphModule, group: list[fx.Node]) -> None:
    first = group[0]
    joined = []
    for position in range(1, len(first.args)):
        parts = [_slot(node.args[position]) for node in group]
        known = [part for part in parts if part is not None]
        rows = sum(part.shape[0] for part in known)
        slot = Slot("weight", "+".join(part.name for part in known), (rows, *known[0].shape[1:]), known[0].dtype,
                    parts=tuple(part.name for part in known))  # fmt: skip
        joined.append(declare(module, slot))
    builder = Builder(module, first, first.meta.get("module", ""))
    whole = builder.call(aten.linear.default, first.args[0], *joined)
    whole.meta.update({key: first.meta[key] for key in ("layer",) if key in first.meta})
    start = 0
    for node in group:
        width = node.meta["val"].shape[-1]
        part = builder.call(aten.slice.Tensor, whole, -1, start, start + width)
        part.meta.update({key: value for key, value in node.meta.items() if key not in ("val",)})
        start += width
        node.replace_all_uses_with(part)
    for node in group:
        unused = [weight for weight in node.args[1:] if isinstance(weight, fx.Node)]
        module.graph.erase_node(node)
        for weight in unused:
            if not weight.users:
                module.graph.erase_node(weight)
