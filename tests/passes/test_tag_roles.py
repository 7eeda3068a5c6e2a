"""tag-roles: layers, attention and the head are written down, and nothing is rewritten."""

from __future__ import annotations

from harness.graphs import apply, sketch, tiny_graph
from harness.models import captured
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten
from autospec.ir.roles import the, with_role
from autospec.ir.slots import Slot
from autospec.ir.text import graph_text
from autospec.passes.tag_roles import TagRoles


def test_roles_of_a_tiny_model() -> None:
    module, _ = tiny_graph(num_layers=2)
    assert [node.meta["layer"] for node in with_role(module, "attention")] == [0, 1]
    head = the(module, "lm_head")
    assert head.args[1].name == "lm_head_weight"
    outputs = with_role(module, "layer_output")
    assert outputs[0].meta["layer"] == 0
    assert head.args[0] is outputs[1], "without a final norm the lm_head reads what the last layer leaves"


def test_roles_of_a_real_model() -> None:
    module = captured("target").graph
    layers = [node.meta["layer"] for node in with_role(module, "attention")]
    assert layers == [0, 1]
    assert [node.meta["layer"] for node in with_role(module, "layer_output")] == [0, 1]


def test_nothing_is_rewritten_and_twice_is_once() -> None:
    module, _ = tiny_graph(num_layers=2)
    before = graph_text(module, weights=True)
    roles = [node.meta.get("role") for node in module.graph.nodes]
    assert apply(module, TagRoles())[0].count == 0
    assert graph_text(module, weights=True) == before
    assert [node.meta.get("role") for node in module.graph.nodes] == roles


def _ends_with(*ops: tuple[object, ...]) -> fx.GraphModule:
    def write(builder: Builder, x: fx.Node, w: fx.Node) -> fx.Node:
        value = builder.call(aten.linear.default, x, w)
        for op, *rest in ops:
            value = builder.call(op, value, *rest)
        return value

    return sketch([Slot("input", "x", (1, 2, 4)), Slot("weight", "w", (6, 4))], write)


def test_softcaps_and_casts_behind_the_head_are_looked_through() -> None:
    module = _ends_with(
        (aten.div.Tensor, 30.0), (aten.tanh.default,), (aten.mul.Tensor, 30.0), (aten._to_copy.default,)
    )
    apply(module, TagRoles())
    assert the(module, "lm_head").target is aten.linear.default


def test_a_head_behind_something_else_is_refused_with_a_reason() -> None:
    record = apply(_ends_with((aten.softmax.int, -1)), TagRoles())[0]
    assert [refusal.reason for refusal in record.refusals] == [
        "the logits do not come straight from a linear layer, so they are computed for every row"
    ]
    assert "aten.softmax" in record.refusals[0].line
