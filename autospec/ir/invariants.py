"""What is true of every graph between two passes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from autospec.ir.slots import Slot


def broken_invariants(module: fx.GraphModule) -> Iterator[str]:
    """Sentences about broken invariants; none: the graph is sound."""
    names: set[str] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            slot = node.meta.get("slot")
            if not isinstance(slot, Slot):
                yield f"placeholder %{node.name} has no slot"
            elif slot.name in names:
                yield f"slot {slot.name} is declared twice"
            else:
                names.add(slot.name)
        elif node.op == "call_function":
            if "val" not in node.meta:
                yield f"%{node.name} has no metadata"
        elif node.op != "output":
            yield f"%{node.name} is a {node.op}: only function calls belong in a graph"
