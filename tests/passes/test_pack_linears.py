"""pack-linears: same outputs from packed weights, one packed copy of each, and a reason for what is left alone."""

from __future__ import annotations

from typing import Any

import torch
from harness.graphs import after, apply, evaluate, sketch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, calls
from autospec.ir.slots import Slot, slots
from autospec.kernels.packed_linear import linear
from autospec.passes.pack_linears import PackLinears
from autospec.program import materialise

X = Slot("input", "x", (2, 3, 8))


def test_meaning(tiny: Any) -> None:
    module = tiny.static(3)
    ids = torch.arange(6).reshape(2, 3)
    packed = after(module, PackLinears())
    assert not list(calls(packed, aten.linear))
    assert len(list(calls(packed, linear))) == len(list(calls(module, aten.linear)))
    stored = {slot.name: materialise(slot, tiny.weights) for slot in slots(packed) if slot.kind == "weight"}
    got = evaluate(packed, {"input_ids": ids, "position_ids": ids, **stored})[0]
    expected = evaluate(module, {"input_ids": ids, "position_ids": ids, **tiny.weights})[0]
    torch.testing.assert_close(got, expected)
    assert apply(packed, PackLinears())[0].count == 0


def test_a_weight_that_two_layers_read_is_packed_once() -> None:
    def write(builder: Builder, x: fx.Node, w: fx.Node) -> list[fx.Node]:
        return [builder.call(aten.linear.default, x, w), builder.call(aten.linear.default, x, w)]

    packed = after(sketch([X, Slot("weight", "w", (5, 8))], write), PackLinears())
    assert [slot.name for slot in slots(packed) if slot.kind == "weight"] == ["w@panels"]


def test_what_is_left_alone() -> None:
    def write(builder: Builder, x: fx.Node, w: fx.Node) -> list[fx.Node]:
        return [builder.call(aten.linear.default, x, builder.call(aten.mul.Tensor, w, 2.0))]

    record = apply(sketch([X, Slot("weight", "w", (5, 8))], write), PackLinears())[0]
    assert [refusal.reason for refusal in record.refusals] == ["the weight is computed, not stored"]
    double = [Slot("input", "x", (2, 8), torch.float64), Slot("weight", "w", (5, 8), torch.float64)]
    module = sketch(double, lambda builder, x, w: [builder.call(aten.linear.default, x, w)])
    assert [refusal.reason for refusal in apply(module, PackLinears())[0].refusals] == [
        "only float32 was written, this weight is torch.float64"
    ]
