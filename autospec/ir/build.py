"""Growing a graph: emit ops with their metadata, declare state, splice one graph into another."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from autospec.ir.fakes import fake_mode, run_on_fakes
from autospec.ir.slots import Slot, find_slot, placeholder_name, slot_of


def module_of(graph: fx.Graph) -> fx.GraphModule:
    """A graph as a module without anything of its own, whose code is written when somebody runs or reads it.

    Each pass of torch's and of ours over a graph asks for new code, which nobody runs: a start of 32 layers with full
    compile caches spent 4.6 of 29.7 s on it (H100's host, 2026-11-21).
    """
    return _LazyGraphModule(torch.nn.Module(), graph)


def device_of(module: fx.GraphModule) -> torch.device:
    """The device that the graph's tensors live on."""
    return module.meta["device"]


def value_of(argument: Any) -> Any:
    """Nodes replaced by their metadata, in nested arguments."""
    return fx.map_arg(argument, lambda node: node.meta["val"])


class Builder:
    """Emits nodes before an anchor and keeps their `val` and `module` metadata right.

    Args:
        module: the graph that grows.
        before: the node in front of which nodes appear; None: the output node.
        owner: module path recorded on new nodes.
    """

    def __init__(self, module: fx.GraphModule, before: fx.Node | None = None, owner: str = "") -> None:
        self.module, self.graph = module, module.graph
        self.before = before if before is not None else self.graph.output_node()
        self.owner = owner

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Emit one op; `target` is an OpOverload, operator.getitem or a KernelOp."""
        assert not self.before._erased, f"the builder's anchor %{self.before.name} was erased: erase it last"
        op = target.op if hasattr(target, "reference") else target
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node("call_function", op, args, kwargs, name=getattr(op, "_opname", "getitem"))
        node.meta["val"] = run_on_fakes(self.module, op, value_of(args), value_of(kwargs))
        node.meta["module"] = self.owner
        return node

    def calls(self, target: Any, *args: Any, **kwargs: Any) -> list[fx.Node]:
        """Emit one op with several results, as one node each."""
        node = self.call(target, *args, **kwargs)
        return [self.call(operator.getitem, node, index) for index in range(len(node.meta["val"]))]

    def slot(self, slot: Slot) -> fx.Node:
        """The placeholder of this slot, declared now if the graph does not have it."""
        return declare(self.module, slot)

    def state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, fill: float = 0) -> fx.Node:
        """Shorthand for a state slot."""
        return self.slot(Slot("state", name, shape, dtype, fill))


def declare(module: fx.GraphModule, slot: Slot, value: torch.Tensor | None = None) -> fx.Node:
    """The placeholder of a slot; declaring it twice with different shapes is a broken invariant."""
    existing = find_slot(module, slot.name)
    if existing is not None:
        known = slot_of(existing)
        assert known == slot, f"slot {slot.name} was declared as {known} and again as {slot}"
        return existing
    placeholders = module.graph.find_nodes(op="placeholder")
    if placeholders:
        place = module.graph.inserting_after(placeholders[-1])
    else:
        place = module.graph.inserting_before(next(iter(module.graph.nodes)))
    with place:
        node = module.graph.placeholder(placeholder_name(slot.name))
    if value is None:
        with fake_mode(module):
            value = torch.empty(slot.shape, dtype=slot.dtype, device=device_of(module))
    node.meta.update(slot=slot, val=value, module="")
    return node


def inherit(new: fx.Node, node: fx.Node) -> None:
    """Note about `new` what was noted about `node`, all but its value."""
    new.meta.update({key: value for key, value in node.meta.items() if key != "val"})


def substitute(node: fx.Node, new: fx.Node) -> None:
    """Let `new` stand for `node`, which is erased: to those who read it, and with what was noted about it."""
    inherit(new, node)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def splice(builder: Builder, part: fx.GraphModule, inputs: Mapping[str, fx.Node]) -> list[fx.Node]:
    """Copy `part` in front of the builder's anchor and return the nodes that stand for its outputs.

    Slots of kind "input" are bound by `inputs`; weights and state are shared by name; module paths are prefixed with the
    builder's owner. `part` stays as it is.
    """
    mapped: dict[fx.Node, fx.Node] = {}
    for node in part.graph.find_nodes(op="placeholder"):
        slot = slot_of(node)
        mapped[node] = inputs[slot.name] if slot.kind == "input" else builder.slot(slot)
    for node in part.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return list(fx.map_arg(node.args[0], lambda n: mapped[n]))
        args = fx.map_arg(node.args, lambda n: mapped[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: mapped[n])
        copy = builder.call(node.target, *args, **kwargs)
        inherit(copy, node)
        copy.meta["module"] = ".".join(filter(None, (builder.owner, node.meta.get("module", ""))))
        mapped[node] = copy
    raise AssertionError("a graph to splice has no output node")
