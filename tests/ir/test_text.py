"""Graph text: one line a node."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import graphs
from harness.graphs import check_golden, renamed, sketch, tiny_graph
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten
from autospec.ir.slots import Slot
from autospec.ir.text import argument_text, graph_text, type_text


def test_types() -> None:
    assert type_text(torch.zeros(2, 3, dtype=torch.bfloat16)) == "bf16[2, 3]"
    assert type_text((torch.zeros(1, dtype=torch.bool), [torch.zeros((), dtype=torch.int32)])) == "(b8[1], (i32[]))"
    assert type_text(3) == "int"
    assert type_text(torch.zeros(1, dtype=torch.complex64)) == "torch.complex64[1]"


def test_arguments() -> None:
    assert argument_text([1, [2.5, None], "same", 1e-6]) == "[1, [2.5, None], same, 1e-06]"


def test_a_graph_as_text() -> None:
    def write(builder: Builder, x: fx.Node, w: fx.Node, spare: fx.Node, count: fx.Node) -> fx.Node:
        values, _ = builder.calls(aten.topk.default, builder.call(aten.linear.default, x, w), 2, largest=False)
        return builder.call(aten.add.Tensor, values, count, alpha=0.25)

    slots = [
        Slot("input", "x", (2, 4), torch.float16), Slot("weight", "layers.0.w", (6, 4), torch.float16),
        Slot("weight", "spare", (6,)), Slot("state", "count", (2,), torch.int64),
    ]  # fmt: skip
    module = sketch(slots, write)
    check_golden("graph_text", graph_text(module, weights=True))
    assert "weight" not in graph_text(module)


def test_a_golden_is_accepted_deliberately(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(graphs, "GOLDEN", tmp_path)
    monkeypatch.delenv(graphs.ACCEPT, raising=False)
    with pytest.raises(AssertionError, match="does not exist yet"):
        check_golden("new", "%x = input\n")
    monkeypatch.setenv(graphs.ACCEPT, "1")
    check_golden("new", "%x = input\n")
    monkeypatch.delenv(graphs.ACCEPT)
    check_golden("new", "%x = input\n")
    with pytest.raises(AssertionError, match=r"the text differs from new\.txt"):
        check_golden("new", "%y = input\n")


def test_unused_weights_are_never_shown() -> None:
    module = sketch(
        [Slot("input", "x", (2,)), Slot("weight", "w", (2,))], lambda builder, x, w: builder.call(aten.neg.default, x)
    )
    assert "%w" not in graph_text(module, weights=True)


def test_golden_names_do_not_depend_on_the_version() -> None:
    text = "%x = input : f32[2]\n%add_68 = aten.add.Tensor(%x, 1)\n%add_7 = aten.add.Tensor(%add_68, %k_pages_0)\n"
    assert renamed(text).splitlines()[1:] == [
        "%add = aten.add.Tensor(%x, 1)",
        "%add_1 = aten.add.Tensor(%add, %k_pages_0)",
    ]


def test_the_text_of_a_captured_graph_is_the_same_every_time() -> None:
    assert graph_text(tiny_graph()[0]) == graph_text(tiny_graph()[0])
