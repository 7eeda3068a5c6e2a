"""Builder, declared state and splicing."""

from __future__ import annotations

import pytest
import torch
from harness.graphs import evaluate, sketch
from torch import fx

from autospec.ir.build import Builder, declare, splice
from autospec.ir.fakes import fake_mode
from autospec.ir.invariants import broken_invariants
from autospec.ir.match import aten, returned
from autospec.ir.roles import tag, the, with_role
from autospec.ir.slots import Slot, assign_slot, find_slot, placeholder_name, slot_of, slots

X = Slot("input", "x", (2, 3))


def _plain() -> fx.GraphModule:
    return sketch([X], lambda builder, x: builder.call(aten.neg.default, x))


def test_new_nodes_carry_their_value_and_owner() -> None:
    module = _plain()
    node = Builder(module, owner="model.layers.3").call(aten.sum.dim_IntList, returned(module), [1])
    assert node.meta["val"].shape == (2,)
    assert node.meta["val"].fake_mode is fake_mode(module)
    assert node.meta["module"] == "model.layers.3"
    assert node.name == "sum_1"


def test_an_op_with_several_results_becomes_one_node_each() -> None:
    module = _plain()
    values, indices = Builder(module).calls(aten.topk.default, returned(module), 2)
    assert (values.meta["val"].shape, indices.meta["val"].dtype) == ((2, 2), torch.int64)


def test_nodes_appear_before_the_anchor() -> None:
    module = _plain()
    negation = returned(module)
    Builder(module, negation).call(aten.relu.default, find_slot(module, "x"))
    assert [node.name for node in module.graph.nodes] == ["x", "relu", "neg", "output"]
    module.graph.erase_node(next(node for node in module.graph.nodes if node.name == "relu"))


def test_an_erased_anchor_is_a_broken_invariant() -> None:
    module = _plain()
    negation = returned(module)
    builder = Builder(module, negation)
    negation.replace_all_uses_with(negation.args[0])
    module.graph.erase_node(negation)
    with pytest.raises(AssertionError, match="the builder's anchor %neg was erased"):
        builder.call(aten.relu.default, find_slot(module, "x"))


def test_an_unspecialised_graph_has_no_fake_mode() -> None:
    with pytest.raises(AssertionError, match="run specialize-shapes first"):
        fake_mode(fx.GraphModule(torch.nn.Module(), fx.Graph()))


def test_state_is_declared_once() -> None:
    module = _plain()
    builder = Builder(module)
    first = builder.state("kv_lens", (2,), torch.int32)
    assert builder.state("kv_lens", (2,), torch.int32) is first
    assert [slot.name for slot in slots(module)] == ["x", "kv_lens"]
    with pytest.raises(AssertionError, match="slot kv_lens was declared as"):
        builder.state("kv_lens", (3,), torch.int32)


def test_slots_have_names_that_python_can_read() -> None:
    module = _plain()
    node = declare(module, Slot("weight", "layers.0.w+layers.1.w", (2, 2)))
    assert node.name == "layers_0_w_layers_1_w"
    assert placeholder_name("k_pages.12") == "k_pages_12"
    assign_slot(node, Slot("weight", "draft.w", (2, 2)))
    assert (node.name, node.target, slot_of(node).name) == ("draft_w", "draft_w", "draft.w")


def _part() -> fx.GraphModule:
    """Two results, one of several outputs of an op, with a weight and a state of its own."""

    def write(builder: Builder, ids: fx.Node, w: fx.Node, count: fx.Node) -> list[fx.Node]:
        values, _ = builder.calls(aten.topk.default, builder.call(aten.mul.Tensor, ids, w), 2)
        tag(values, "layer_output")
        return [values, builder.call(aten.add.Tensor, count, 1)]

    return sketch([Slot("input", "ids", (2, 3)), Slot("weight", "w", (3,)), Slot("state", "count", (1,))], write)


def test_splicing_copies_a_graph_and_leaves_it_alone() -> None:
    module, part = _plain(), _part()
    nodes = len(part.graph.nodes)
    results = [splice(Builder(module), part, {"ids": returned(module)}) for _ in range(2)]
    module.graph.output_node().args = ((*results[0], *results[1]),)
    module.recompile()
    assert [slot.name for slot in slots(module)] == ["x", "w", "count"], "weights and state are shared by name"
    assert len(part.graph.nodes) == nodes
    assert not list(broken_invariants(module))
    assert len(with_role(module, "layer_output")) == 2, "roles travel"
    values = {"x": torch.randn(2, 3), "w": torch.randn(3), "count": torch.ones(1)}
    first, count, second, _ = evaluate(module, values)
    expected = evaluate(part, {"ids": -values["x"], "w": values["w"], "count": values["count"]})
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[0])
    assert torch.equal(count, expected[1])


def test_splicing_gives_metadata_of_the_new_graph() -> None:
    module = sketch([Slot("input", "x", (5, 3))], lambda builder, x: builder.call(aten.neg.default, x))
    top, _ = splice(Builder(module), _part(), {"ids": returned(module)})
    assert top.meta["val"].shape == (5, 2)
    assert top.meta["val"].fake_mode is fake_mode(module)


def test_the_one_node_of_a_role() -> None:
    module = _plain()
    with pytest.raises(
        AssertionError, match="the graph has 0 nodes of role lm_head, expected one: run tag-roles first"
    ):
        the(module, "lm_head")
    tag(returned(module), "lm_head")
    assert the(module, "lm_head") is returned(module)


def test_invariants_are_sentences() -> None:
    module = _plain()
    twin = declare(module, Slot("input", "y", (2, 3)))
    twin.meta["slot"] = X
    with module.graph.inserting_before(module.graph.output_node()):
        module.graph.call_method("relu", (twin,))
    assert list(broken_invariants(module)) == [
        "slot x is declared twice", "%relu is a call_method: only function calls belong in a graph",
    ]  # fmt: skip
