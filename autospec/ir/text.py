"""Graph text: one line a node, with dtype and shape. Goldens, dumps and errors all use it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autospec.ir.slots import Slot

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b8",
}  # fmt: skip


def type_text(value: Any) -> str:
    """`f32[2, 4]` of a tensor, a tuple of them, or the Python type of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(type_text(item) for item in value)})"
    return type(value).__name__


def target_text(node: fx.Node) -> str:
    """`aten.linear`, `autospec.append_kv`, `operator.getitem`: the default overload's name is left out."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    name = getattr(target, "__name__", str(target))
    return f"operator.{name}" if getattr(target, "__module__", "") == "_operator" else name


def argument_text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(argument_text(item) for item in value)}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def node_text(node: fx.Node) -> str:
    """One node as one line."""
    value = node.meta.get("val")
    kind = f" : {type_text(value)}" if value is not None else ""
    if node.op == "placeholder":
        slot = node.meta.get("slot")
        return f"%{node.name} = {slot.kind if isinstance(slot, Slot) else 'input'}{kind}"
    if node.op == "output":
        return f"return {argument_text(node.args[0])}"
    given = [argument_text(arg) for arg in node.args]
    given += [f"{name}={argument_text(arg)}" for name, arg in node.kwargs.items() if arg is not None]
    return f"%{node.name} = {target_text(node)}({', '.join(given)}){kind}"


def graph_text(module: fx.GraphModule, *, weights: bool = False) -> str:
    """The whole graph; weights are left out unless asked for, unused ones always."""
    lines = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            slot = node.meta.get("slot")
            is_weight = isinstance(slot, Slot) and slot.kind == "weight"
            if is_weight and not (weights and node.users):
                continue
        lines.append(node_text(node))
    return "\n".join(lines) + "\n"
