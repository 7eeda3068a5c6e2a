"""Evaluating the part of a captured graph that depends on sizes and positions only: masks and position biases.

Such a node has no token and no parameter among its ancestors. It is run concretely for a batch and a length, with
position_ids = 0 ... length-1, which is what decoding means by positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from autospec.ir.match import aten, is_call
from autospec.ir.slots import slot_of

_HUGE = 1 << 31  # "to the end" in slices
# Ops that read nothing but the shape of their first operand.
_SHAPE_ONLY = (
    aten.ones_like, aten.zeros_like, aten.full_like, aten.empty_like, aten.new_ones, aten.new_zeros, aten.new_full,
    aten.new_empty,
)  # fmt: skip


def constants_of(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Buffers and lifted constants of a captured graph by slot name; passes may add weights of their own."""
    found: dict[str, torch.Tensor] = module.meta.setdefault("constants", {})
    return found


def ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """The node and everything it is computed from; sizes count as leaves."""
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        yield current
        for source in value_inputs(current):
            if source not in seen:
                seen.add(source)
                waiting.append(source)


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The operands whose values a node depends on, not only their shape; sizes depend on nothing."""
    if isinstance(node.meta.get("val"), torch.SymInt):
        return []
    skipped = node.args[0] if is_call(node, _SHAPE_ONLY) else None
    return [source for source in node.all_input_nodes if source is not skipped]


def why_not_sizes_only(module: fx.GraphModule, value: Any) -> str | None:
    """None if a value depends on sizes, positions and buffers only, else a sentence."""
    if not isinstance(value, fx.Node):
        return None
    for node in ancestors(value):
        if node.op != "placeholder":
            continue
        slot = slot_of(node)
        if slot.kind == "input" and slot.name != "position_ids":
            return f"it depends on {slot.name}"
        if slot.kind == "weight" and slot.name not in constants_of(module):
            return f"it depends on the parameter {slot.name}"
    return None


def sizes_only_nodes(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose values follow from sizes and buffers alone: no token, position or parameter among their ancestors."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            plain = slot_of(node).name in constants_of(module)
        else:
            plain = node.op == "call_function" and all(source in found for source in value_inputs(node))
        if plain:
            found.add(node)
    return found


def meeting_data(module: fx.GraphModule) -> list[fx.Node]:
    """Tensors made of sizes alone that something else reads."""
    plain = sizes_only_nodes(module)
    met: dict[fx.Node, None] = {}
    for node in module.graph.nodes:
        if node not in plain:
            met.update(dict.fromkeys(source for source in value_inputs(node) if source in plain and is_tensor(source)))
    return list(met)


def is_tensor(node: fx.Node) -> bool:
    """A computed tensor, not a placeholder and not a size."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)


def largest_constant(module: fx.GraphModule, values: list[Any]) -> int:
    """The largest integer that the computation of these values mentions: no threshold in a mask can lie beyond it."""
    largest = 0
    for value in values:
        for node in ancestors(value) if isinstance(value, fx.Node) else ():
            if node.op == "placeholder" and slot_of(node).kind == "weight":
                tensor = constants_of(module)[slot_of(node).name]
                sizes = [*tensor.shape]
                if not tensor.is_floating_point() and tensor.dtype != torch.bool and 0 < tensor.numel() <= 64:
                    sizes += [int(tensor.abs().max())]
                largest = max([largest, *sizes])
            elif node.op == "call_function":
                leaves = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
                numbers = [abs(leaf) for leaf in leaves if isinstance(leaf, int) and abs(leaf) < _HUGE]
                largest = max([largest, *numbers])
    return largest


class Evaluator:
    """Concrete values of size-only nodes at one batch and length."""

    def __init__(self, module: fx.GraphModule, batch: int, length: int) -> None:
        self.module, self.batch, self.length = module, batch, length
        self.values: dict[fx.Node, Any] = {}
        self.symbols: dict[Any, int] = {}
        for node in module.graph.find_nodes(op="placeholder"):
            if slot_of(node).kind == "input":
                for size, number in zip(node.meta["val"].shape, (batch, length), strict=False):  # features follow them
                    self.symbols[size.node.expr] = number

    def value(self, argument: Any) -> Any:
        """A number, tensor or nested argument with every node replaced by its concrete value."""
        return fx.map_arg(argument, self._node)

    def size(self, value: Any) -> int:
        """A symbolic size as a number."""
        return int(value.node.expr.subs(self.symbols)) if isinstance(value, torch.SymInt) else int(value)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The concrete shape of any tensor of the graph."""
        return tuple(self.size(size) for size in node.meta["val"].shape)

    def _node(self, node: fx.Node) -> Any:
        if node not in self.values:
            # Ancestors first, in graph order, so that deep graphs do not recurse.
            needed = set(ancestors(node))
            for current in self.module.graph.nodes:
                if current in needed and current not in self.values:
                    self.values[current] = self._compute(current)
        return self.values[node]

    def _compute(self, node: fx.Node) -> Any:
        known = node.meta.get("val")
        if isinstance(known, torch.SymInt):
            return self.size(known)
        if node.op == "placeholder":
            slot = slot_of(node)
            assert slot.name != "input_ids", "tokens have no concrete value: ask why_not_sizes_only first"
            if slot.kind == "input":
                return torch.arange(self.length, device=node.meta["val"].device).expand(self.batch, -1).contiguous()
            return constants_of(self.module)[slot.name]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n] if n in self.values else self._empty(n))
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _empty(self, node: fx.Node) -> torch.Tensor:
        """Stands for an operand that is read for its shape alone."""
        value = node.meta["val"]
        return torch.empty(self.shape(node), dtype=value.dtype, device=value.device)
