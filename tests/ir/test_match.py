"""Patterns: what matches is bound, what does not says why."""

from __future__ import annotations

import pytest
import torch
from harness.graphs import sketch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import Op, argument, aten, calls, is_call, operand, returned
from autospec.ir.slots import Slot
from autospec.kernels.attention import attention


def _silu_gate() -> fx.GraphModule:
    def write(builder: Builder, gate: fx.Node, up: fx.Node) -> fx.Node:
        dropped = builder.call(aten.dropout.default, builder.call(aten.silu.default, gate), 0.0, False)
        return builder.call(aten.mul.Tensor, dropped, up)

    return sketch([Slot("input", "gate", (2, 3)), Slot("input", "up", (2, 3))], write)


def test_a_pattern_binds_what_it_finds() -> None:
    found: dict[str, fx.Node] = {}
    pattern = Op(aten.mul.Tensor, (Op(aten.silu, ("gate",), bind="silu", skip=aten.dropout), "up"), bind="product")
    assert pattern.match(returned(_silu_gate()), found) is None
    assert {name: node.name for name, node in found.items()} == {
        "gate": "gate", "up": "up", "silu": "silu", "product": "mul",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (Op(aten.add.Tensor), "expected aten.add.Tensor, found aten.mul.Tensor"),
        (Op(aten.mul.Tensor, (Op((aten.gelu.default, aten.relu.default), skip=aten.dropout),)),
         "expected aten.gelu or aten.relu, found aten.silu"),
        (Op(aten.mul.Tensor, (Op(aten.silu),)), "expected aten.silu or aten.silu.out, found aten.dropout"),
        (Op(aten.mul.Tensor, (None, Op(aten.silu.default))), "expected aten.silu, found up"),
        (Op(aten.mul.Tensor, (Op(aten.silu.default, ("x",), skip=aten.dropout), "x")),
         "x stands for two different values"),
        (Op(aten.mul.Tensor, where=lambda node: "the product is too wide"), "the product is too wide"),
    ],
    ids=["other op", "several ops", "not skipped", "not an op", "two values", "condition"],
)  # fmt: skip
def test_a_mismatch_says_why(pattern: Op, reason: str) -> None:
    mismatch = pattern.match(returned(_silu_gate()), {})
    assert mismatch is not None
    assert mismatch.reason == reason


def test_calls_may_change_the_graph_while_iterating() -> None:
    module = _silu_gate()
    for node in calls(module, (aten.dropout, aten.silu.default)):
        node.replace_all_uses_with(operand(node))
        module.graph.erase_node(node)
    assert [node.name for node in module.graph.nodes] == ["gate", "up", "mul", "output"]


def test_is_call_takes_packets_overloads_and_kernels() -> None:
    module = _silu_gate()
    product = returned(module)
    assert is_call(product, aten.mul)
    assert is_call(product, aten.mul.Tensor)
    assert not is_call(product, aten.mul.Scalar)
    assert not is_call(product, attention)
    assert not is_call(3, aten.mul)


def test_arguments_by_name_have_the_schemas_default() -> None:
    def write(builder: Builder, q: fx.Node) -> fx.Node:
        return builder.call(attention, q, q, q, scale=0.5)

    node = returned(sketch([Slot("input", "q", (1, 2, 3, 4))], write))
    assert argument(node, "k").name == "q"
    assert (argument(node, "scale"), argument(node, "window"), argument(node, "sinks")) == (0.5, 0, None)
    with pytest.raises(AssertionError, match=r"autospec\.attention has no argument called wimdow"):
        argument(node, "wimdow")


def test_operand_and_returned_insist_on_nodes() -> None:
    def write(builder: Builder, x: fx.Node) -> fx.Node:
        return builder.call(aten.add.Tensor, x, 1)

    module = sketch([Slot("input", "x", (2,))], write)
    with pytest.raises(AssertionError, match="argument 1 of %add is 1, expected a node"):
        operand(returned(module), 1)
    module.graph.output_node().args = ((torch.float32,),)
    with pytest.raises(AssertionError, match="expected a node"):
        returned(module)
