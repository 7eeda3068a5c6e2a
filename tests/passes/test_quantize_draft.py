"""quantize-draft: the draft's layers read float8 weights, the target's stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from harness.graphs import after, apply, check_golden, evaluate, sketch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, calls
from autospec.ir.slots import Slot, slots
from autospec.ir.text import graph_text
from autospec.kernels.fused_linear import MOST_SCALED, fused_linear, quantize_rows
from autospec.passes.quantize_draft import QuantizeDraft
from autospec.program import materialise

QUANTIZE = QuantizeDraft(prefix="draft.")


def layers(rows: int = 3) -> fx.GraphModule:
    """A layer of the target, two of the draft that share a weight, and one over a concatenated weight."""

    def write(b: Builder, x: Any, own: Any, weight: Any, bias: Any, joined: Any) -> Any:
        x = b.call(aten.linear.default, x, own)
        x = b.call(aten.linear.default, b.call(aten.linear.default, x, weight, bias), weight)
        return b.call(aten.linear.default, x, joined)

    return sketch(
        [
            Slot("input", "x", (1, rows, 4)), Slot("weight", "lm_head", (4, 4)), Slot("weight", "draft.up", (4, 4)),
            Slot("weight", "draft.bias", (4,)), Slot("weight", "draft.q+draft.k", (6, 4), parts=("draft.q", "draft.k")),
        ],
        write,
    )  # fmt: skip


def test_text() -> None:
    check_golden("quantize_draft", graph_text(after(layers(), QUANTIZE), weights=True))


def test_meaning() -> None:
    """The quantised graph computes what the graph does with the numbers that float8 stands for."""
    module = layers()
    captured = {name: torch.randn(n, 4) for name, n in (("lm_head", 4), ("draft.up", 4), ("draft.q", 3), ("draft.k", 3))}
    captured["draft.bias"] = torch.randn(4)
    rounded = dict(captured)
    for name in ("draft.up", "draft.q", "draft.k"):
        weight, scales = quantize_rows(captured[name])
        rounded[name] = weight.float() * scales[:, None]
        error = (rounded[name] - captured[name]).abs()
        assert (error <= captured[name].abs() / 16 + scales[:, None] * 2**-10).all(), "half a step of three mantissa bits"
        assert error.any()
    x = torch.randn(1, 3, 4)
    results = []
    for graph, known in ((after(module, QUANTIZE), captured), (module, rounded)):
        values = {slot.name: x if slot.kind == "input" else materialise(slot, known) for slot in slots(graph)}
        results.append(evaluate(graph, values)[0])
    torch.testing.assert_close(*results)
    whole = {slot.name: x if slot.kind == "input" else materialise(slot, captured) for slot in slots(module)}
    assert not torch.allclose(results[0], evaluate(module, whole)[0]), "nothing was rounded"


def test_the_target_keeps_its_weights() -> None:
    module = after(layers(), QUANTIZE)
    assert [node.args[1].name for node in calls(module, aten.linear)] == ["lm_head"]  # type: ignore[union-attr]
    assert len(list(calls(module, fused_linear))) == 3


def test_many_rows_are_left_alone() -> None:
    record = apply(layers(MOST_SCALED + 1), QUANTIZE)[0]
    assert record.count == 0
    assert {refusal.reason.split(",")[0] for refusal in record.refusals} == {f"{MOST_SCALED + 1} rows are more than {MOST_SCALED}"}


def test_again_finds_nothing() -> None:
    assert [record.count for record in apply(layers(), QUANTIZE, QUANTIZE)] == [3, 0]
