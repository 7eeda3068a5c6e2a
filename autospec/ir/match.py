"""Finding places in a graph, and saying why a place does not match."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autospec.ir.text import target_text

aten = torch.ops.aten


def overloads(target: Any) -> AbstractSet[Any]:
    """All overloads of a packet, or the one overload, or those of each in a sequence."""
    if isinstance(target, (tuple, list, set, frozenset)):
        return {overload for item in target for overload in overloads(item)}
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _overloads_of(target)
    return {target if isinstance(target, torch._ops.OpOverload) else target.op}


@functools.cache
def _overloads_of(packet: torch._ops.OpOverloadPacket) -> frozenset[Any]:
    return frozenset(getattr(packet, name) for name in packet.overloads())


def is_call(node: Any, target: Any) -> bool:
    """Is this node a call of the op (an OpOverload, packet, KernelOp, or several of them)?"""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in overloads(target)


def calls(module: fx.GraphModule, target: Any) -> Iterator[fx.Node]:
    """All calls of an op, in graph order; the graph may change while iterating."""
    wanted = overloads(target)
    return iter([node for node in module.graph.nodes if node.op == "call_function" and node.target in wanted])


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an op by its schema name, with the schema's default."""
    schema = node.target._schema  # type: ignore[union-attr]
    for index, spec in enumerate(schema.arguments):
        if spec.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[index] if index < len(node.args) else spec.default_value
    raise AssertionError(f"{target_text(node)} has no argument called {name}")


def operand(node: fx.Node, index: int = 0) -> fx.Node:
    """A positional argument that is a node."""
    value = node.args[index]
    assert isinstance(value, fx.Node), f"argument {index} of %{node.name} is {value!r}, expected a node"
    return value


def returned(module: fx.GraphModule, index: int = 0) -> fx.Node:
    """One of the nodes that the graph returns."""
    values = module.graph.output_node().args[0]
    assert isinstance(values, (tuple, list)), "a graph returns a tuple"
    value = values[index]
    assert isinstance(value, fx.Node), f"the graph returns {value!r}, expected a node"
    return value


def others(module: fx.GraphModule) -> list[Any]:
    """What the graph returns beside its first value."""
    return list(module.graph.output_node().args[0])[1:]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Mismatch:
    """Why a pattern does not hold at a node."""

    node: Any
    reason: str


@dataclass(frozen=True)
class Op:
    """A pattern: a call of one of `targets` whose leading tensor arguments match `inputs` (None: anything)."""

    targets: Any
    inputs: Sequence[Op | Any | None] = ()
    bind: str = ""
    where: Callable[[fx.Node], str | None] | None = None
    skip: Any = ()  # ops that are looked through, such as dropout or a copy

    def match(self, node: Any, found: dict[str, fx.Node]) -> Mismatch | None:
        """None and filled `found`, or the reason for the first difference."""
        while self.skip and is_call(node, self.skip):
            node = node.args[0]
        if not is_call(node, self.targets):
            seen = target_text(node) if isinstance(node, fx.Node) else repr(node)
            wanted = " or ".join(sorted(str(op).removesuffix(".default") for op in overloads(self.targets)))
            return Mismatch(node, f"expected {wanted}, found {seen}")
        if node.kwargs.get("alpha", 1) != 1:
            return Mismatch(node, f"alpha is {node.kwargs['alpha']}, not 1")
        if self.where is not None and (reason := self.where(node)) is not None:
            return Mismatch(node, reason)
        for pattern, value in zip(self.inputs, node.args, strict=False):
            if isinstance(pattern, Op):
                mismatch = pattern.match(value, found)
                if mismatch is not None:
                    return mismatch
            elif isinstance(pattern, str):
                if found.setdefault(pattern, value) is not value:
                    return Mismatch(value, f"{pattern} stands for two different values")
        if self.bind:
            found[self.bind] = node
        return None
