"""narrow-linears: on a GPU, linear layers become the op that a kernel can take; fake tensors stand in for the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from harness.graphs import after, apply, check_golden, evaluate, sketch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, calls
from autospec.ir.roles import tag, the
from autospec.ir.slots import Slot, slots
from autospec.ir.text import graph_text
from autospec.kernels.registry import Implementation
from autospec.kernels.skinny_linear import skinny_linear
from autospec.passes.narrow_linears import NarrowLinears


@pytest.fixture(autouse=True)
def planted() -> Iterator[None]:
    """One implementation, for layers of at most five outputs, whatever the machine has."""

    def why_not(args: Mapping[str, Any]) -> str | None:
        assert set(args) == {"x", "weight", "bias"}
        assert args["x"].device.type == "cuda"
        return None if args["weight"].shape[0] <= 5 else "too wide"

    saved = list(skinny_linear.implementations)
    skinny_linear.implementations[:] = [Implementation("planted", why_not, skinny_linear.op, skinny_linear.reference)]
    yield
    skinny_linear.implementations[:] = saved


def _layers(device: str) -> fx.GraphModule:
    """A layer with a bias, one that is too wide, and an lm_head; roles and modules are set."""

    def write(builder: Builder, x: fx.Node, small: fx.Node, bias: fx.Node, wide: fx.Node, head: fx.Node) -> fx.Node:
        value = builder.call(aten.linear.default, x, small, bias)
        value = builder.call(aten.linear.default, value, wide)
        logits = builder.call(aten.linear.default, value, head)
        tag(logits, "lm_head")
        return logits

    return sketch(
        [
            Slot("input", "x", (2, 3, 4)), Slot("weight", "small", (5, 4)), Slot("weight", "bias", (5,)),
            Slot("weight", "wide", (6, 5)), Slot("weight", "head", (3, 6)),
        ],
        write, device,
    )  # fmt: skip


def test_text() -> None:
    check_golden("narrow_linears", graph_text(after(_layers("cuda"), NarrowLinears()), weights=True))


def test_meaning() -> None:
    module = _layers("cuda")
    values = {slot.name: torch.randn(slot.shape) for slot in slots(module)}
    narrowed = after(module, NarrowLinears())
    assert torch.equal(evaluate(narrowed, values)[0], evaluate(module, values)[0])


def test_again_finds_nothing() -> None:
    one = NarrowLinears()
    assert [record.count for record in apply(_layers("cuda"), one, one)] == [2, 0]


def test_roles_and_modules_survive() -> None:
    module = after(_layers("cuda"), NarrowLinears())
    assert the(module, "lm_head").target is skinny_linear.op
    assert {node.meta["module"] for node in calls(module, skinny_linear)} == {"sketch"}
    assert the(module, "lm_head").meta["val"].device.type == "cuda"


def test_a_cpu_is_left_alone() -> None:
    assert apply(_layers("cpu"), NarrowLinears())[0].count == 0


def test_without_an_implementation_nothing_is_replaced() -> None:
    skinny_linear.implementations.clear()
    assert apply(_layers("cuda"), NarrowLinears())[0].count == 0
