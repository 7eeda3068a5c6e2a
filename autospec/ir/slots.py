"""What a graph's placeholders stand for: weights, state and inputs, each declared once.

Every placeholder node carries `meta["slot"]`. A program is a set of graphs whose slots of equal name are one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

Kind = Literal["weight", "state", "input"]
Form = Literal["", "panels", "fp8", "fp8_scales"]


@dataclass(frozen=True)
class Slot:
    """One placeholder.

    Args:
        kind: a weight is read only and shared; state is preallocated and mutated by the graph; an input is passed.
        name: unique within a program.
        shape, dtype: of the tensor; empty for a captured graph's symbolic inputs.
        fill: initial value of state.
        parts: names of the weights that this weight concatenates along dimension 0 (none: a captured weight).
        form: how the weight is stored: "", "panels" (a CPU kernel's layout), "fp8" or "fp8_scales" (`quantize_rows`).
    """

    kind: Kind
    name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    fill: float = 0
    parts: tuple[str, ...] = ()
    form: Form = ""


def slot_of(node: fx.Node) -> Slot:
    """The slot of a placeholder node."""
    slot = node.meta.get("slot")
    assert isinstance(slot, Slot), f"placeholder {node.name} has no slot: every input of a graph must be declared"
    return slot


def slots(module: fx.GraphModule) -> tuple[Slot, ...]:
    """All slots in argument order."""
    return tuple(slot_of(node) for node in module.graph.find_nodes(op="placeholder"))


def find_slot(module: fx.GraphModule, name: str) -> fx.Node | None:
    """The placeholder whose slot has this name, or None."""
    for node in module.graph.find_nodes(op="placeholder"):
        if slot_of(node).name == name:
            return node
    return None


def placeholder_name(slot_name: str) -> str:
    """A slot's name as a Python identifier."""
    return "".join(c if c.isalnum() else "_" for c in slot_name)


_PAGES = ("k_pages.", "v_pages.", "latent_pages.", "index_pages.", "index_scale_pages.")


def is_pages(slot: Slot) -> bool:
    """Whether the slot is a buffer of K, V or latent pages, or of index keys or their scales."""
    return slot.kind == "state" and slot.name.startswith(_PAGES)


def assign_slot(node: fx.Node, slot: Slot) -> None:
    """Give a placeholder its slot and a name after it, unique within the graph."""
    node.meta["slot"] = slot
    node._rename(placeholder_name(slot.name))
    node.target = node.name
