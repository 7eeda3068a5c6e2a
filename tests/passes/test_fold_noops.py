"""fold-noops: what computes nothing goes, everything else stays."""

from __future__ import annotations

from typing import Any

import torch
from harness.graphs import after, apply, check_golden, evaluate, sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten
from autospec.ir.roles import tag, with_role
from autospec.ir.slots import Slot
from autospec.ir.text import graph_text
from autospec.passes.fold_noops import FoldNoops

X = Slot("input", "x", (2, 6), torch.float32)

# name -> (op, arguments after x, does it compute nothing?)
CASES: dict[str, tuple[Any, tuple[Any, ...], bool]] = {
    "full slice": (aten.slice.Tensor, (1, 0, 2**63 - 1), True),
    "half slice": (aten.slice.Tensor, (1, 0, 3), False),
    "same view": (aten.view.default, ([2, 6],), True),
    "other shape": (aten.reshape.default, ([6, 2],), False),
    "same expand": (aten.expand.default, ([2, 6],), True),
    "same dtype": (aten.to.dtype, (torch.float32,), True),
    "other dtype": (aten.to.dtype, (torch.float64,), False),
    "clone": (aten.clone.default, (), True),
    "dropout of eval": (aten.dropout.default, (0.5, False), True),
    "alias": (aten.alias.default, (), True),
    "negation": (aten.neg.default, (), False),
}


def _chain(names: list[str]) -> fx.GraphModule:
    def write(builder: Builder, x: fx.Node) -> fx.Node:
        value = x
        for name in names:
            op, rest, _ = CASES[name]
            if name in ("same view", "other shape"):
                rest = ([2, -1],) if name == "same view" else ([-1, 2],)
            if name == "same expand":
                rest = ([-1, -1],)
            value = builder.call(op, value, *rest)
        return builder.call(aten.add.Tensor, value, 1)

    return sketch([X], write)


def test_text() -> None:
    module = _chain(list(CASES))
    check_golden("fold_noops", graph_text(after(module, FoldNoops())))


@settings(max_examples=25)
@given(names=st.lists(st.sampled_from(sorted(CASES)), max_size=6), seed=st.integers(0, 1000))
def test_meaning(names: list[str], seed: int) -> None:
    module = _chain(names)
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))
    folded = after(module, FoldNoops())
    assert torch.equal(evaluate(folded, {"x": x})[0], evaluate(module, {"x": x})[0])
    assert apply(folded, FoldNoops())[0].count == 0


def test_only_noops_are_counted() -> None:
    for name, (_, _, is_noop) in CASES.items():
        assert apply(_chain([name]), FoldNoops())[0].count == int(is_noop), name


def test_a_transposed_copy_stays() -> None:
    """clone of a transposed tensor changes strides, which a later view may need."""

    def write(builder: Builder, x: fx.Node) -> fx.Node:
        turned = builder.call(aten.transpose.int, x, 0, 1)
        dense = builder.call(aten.clone.default, turned, memory_format=torch.contiguous_format)
        return builder.call(aten.view.default, dense, [12])

    assert apply(sketch([X], write), FoldNoops())[0].count == 0


def test_a_role_survives() -> None:
    module = _chain(["negation", "clone"])
    clone = next(node for node in module.graph.nodes if node.target is aten.clone.default)
    tag(clone, "layer_output")
    apply(module, FoldNoops())
    assert [node.target for node in with_role(module, "layer_output")] == [aten.neg.default]
