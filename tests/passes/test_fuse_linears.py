"""fuse-linears: same outputs from one matrix product, and a reason for every group that is left alone."""

from __future__ import annotations

from typing import Any

import torch
from harness.graphs import after, apply, check_golden, evaluate, sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, calls
from autospec.ir.slots import Slot, slots
from autospec.ir.text import graph_text
from autospec.passes.fuse_linears import FuseLinears
from autospec.program import materialise

X = Slot("input", "x", (2, 3, 4))


def _layers(widths: list[int], has_bias: bool = False, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    weights = [Slot("weight", f"w{i}", (width, 4), dtype) for i, width in enumerate(widths)]
    biases = [Slot("weight", f"b{i}", (width,), dtype) for i, width in enumerate(widths)] if has_bias else []

    def write(builder: Builder, x: fx.Node, *stored: fx.Node) -> list[fx.Node]:
        count = len(widths)
        groups = [stored[i::count] for i in range(count)]
        return [builder.call(aten.linear.default, x, *group) for group in groups]

    return sketch([Slot("input", "x", (2, 3, 4), dtype), *weights, *biases], write)


def _values(module: fx.GraphModule, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {slot.name: torch.randn(slot.shape, generator=generator, dtype=slot.dtype) for slot in slots(module)}


def test_text(tiny: Any) -> None:
    check_golden("fuse_linears", graph_text(after(tiny.static(3), FuseLinears()), weights=True))


@settings(max_examples=20)
@given(widths=st.lists(st.integers(1, 9), min_size=2, max_size=5), has_bias=st.booleans(), seed=st.integers(0, 1000))
def test_meaning(widths: list[int], has_bias: bool, seed: int) -> None:
    module = _layers(widths, has_bias, torch.float64)
    values = _values(module, seed)
    fused = after(module, FuseLinears())
    stored = {slot.name: materialise(slot, values) for slot in slots(fused) if slot.kind == "weight"}
    got = evaluate(fused, {"x": values["x"], **stored})
    for mine, expected in zip(got, evaluate(module, values), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)
    assert len(list(calls(fused, aten.linear))) == 1
    assert apply(fused, FuseLinears())[0].count == 0


def test_a_model_that_runs_twice_reads_one_weight() -> None:
    def write(builder: Builder, x: fx.Node, *stored: fx.Node) -> list[fx.Node]:
        again = builder.call(aten.mul.Tensor, x, 2.0)
        return [builder.call(aten.linear.default, source, w) for source in (x, again) for w in stored]

    module = sketch([X, Slot("weight", "w0", (5, 4)), Slot("weight", "w1", (6, 4))], write)
    values = _values(module)
    fused = after(module, FuseLinears())
    assert [slot.name for slot in slots(fused) if slot.kind == "weight"] == ["w0+w1"]
    assert len(list(calls(fused, aten.linear))) == 2
    got = evaluate(fused, {"x": values["x"], "w0+w1": torch.cat([values["w0"], values["w1"]])})
    for mine, expected in zip(got, evaluate(module, values), strict=True):
        torch.testing.assert_close(mine, expected)


def _reasons(write: Any, *more: Slot) -> list[str]:
    module = sketch([X, Slot("weight", "w0", (5, 4)), Slot("weight", "w1", (6, 4)), *more], write)
    before = graph_text(module, weights=True)
    record = apply(module, FuseLinears())[0]
    assert record.count == 0
    assert graph_text(module, weights=True) == before
    return [refusal.reason for refusal in record.refusals]


def test_some_with_a_bias() -> None:
    def write(builder: Builder, x: fx.Node, w0: fx.Node, w1: fx.Node, b: fx.Node) -> list[fx.Node]:
        return [builder.call(aten.linear.default, x, w0, b), builder.call(aten.linear.default, x, w1)]

    assert _reasons(write, Slot("weight", "b", (5,))) == ["some of the layers have a bias and some do not"]


def test_a_weight_that_something_else_reads() -> None:
    def write(builder: Builder, x: fx.Node, w0: fx.Node, w1: fx.Node) -> list[fx.Node]:
        both = [builder.call(aten.linear.default, x, w) for w in (w0, w1)]
        return [*both, builder.call(aten.sum.default, w0)]

    assert _reasons(write) == ["w0 is read by something else too"]


def test_one_weight_for_two_layers() -> None:
    def write(builder: Builder, x: fx.Node, w0: fx.Node, w1: fx.Node) -> list[fx.Node]:
        return [builder.call(aten.linear.default, x, w0), builder.call(aten.linear.default, x, w0)]

    assert _reasons(write) == ["w0 is read by something else too"]


def test_a_computed_weight() -> None:
    def write(builder: Builder, x: fx.Node, w0: fx.Node, w1: fx.Node) -> list[fx.Node]:
        scaled = builder.call(aten.mul.Tensor, w0, 2.0)
        return [builder.call(aten.linear.default, x, scaled), builder.call(aten.linear.default, x, w1)]

    assert _reasons(write) == ["a weight is computed, not stored"]


def test_different_inputs_are_no_group() -> None:
    def write(builder: Builder, x: fx.Node, w0: fx.Node, w1: fx.Node) -> list[fx.Node]:
        other = builder.call(aten.neg.default, x)
        return [builder.call(aten.linear.default, x, w0), builder.call(aten.linear.default, other, w1)]

    assert _reasons(write) == []


def test_the_parts_leave_the_program() -> None:
    fused = after(_layers([2, 3], has_bias=True), FuseLinears())
    assert {slot.name: slot.parts for slot in slots(fused) if slot.kind == "weight"} == {
        "w0+w1": ("w0", "w1"), "b0+b1": ("b0", "b1"),
    }  # fmt: skip
