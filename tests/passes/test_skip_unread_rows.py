"""skip-unread-rows: what only a choice of one row reads is computed for that row, and is the same there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.graphs import after, apply, check_golden, evaluate, sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, calls, returned
from autospec.ir.slots import Slot
from autospec.ir.text import graph_text
from autospec.kernels.commit import last_rows
from autospec.passes import skip_unread_rows
from autospec.passes.skip_unread_rows import SkipUnreadRows

B, N, H = 2, 4, 6
SLOTS = [
    Slot("input", "x", (B, N, H)), Slot("input", "r", (B, N, H)), Slot("input", "q_lens", (B,), torch.int32),
    Slot("weight", "w", (H, H)), Slot("weight", "g", (H,)), Slot("input", "p", (1, N, H)),
]  # fmt: skip


def values(seed: int, q_lens: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {slot.name: torch.randn(slot.shape, generator=generator) for slot in SLOTS if slot.name != "q_lens"}
    return made | {"q_lens": torch.tensor(q_lens, dtype=torch.int32)}


def _layer(builder: Builder, x: fx.Node, r: fx.Node, q_lens: fx.Node, w: fx.Node, g: fx.Node, *_: fx.Node) -> list[fx.Node]:
    """What a decoder does behind its attention: residual, norm, gated layer, residual; two choices of its last row."""
    h = builder.call(aten.add.Tensor, r, builder.call(aten.linear.default, x, w))
    squares = builder.call(aten.mean.dim, builder.call(aten.pow.Tensor_Scalar, h, 2), [-1], True)
    normed = builder.call(aten.mul.Tensor, h, builder.call(aten.rsqrt.default, squares))
    normed = builder.call(aten.mul.Tensor, g, normed)
    up = builder.call(aten.mul.Tensor, builder.call(aten.silu.default, builder.call(aten.linear.default, normed, w)), normed)
    out = builder.call(aten.add.Tensor, h, up)
    again = builder.call(last_rows, out, q_lens)
    return [builder.call(aten.linear.default, builder.call(last_rows, out, q_lens), w), again]


def test_text() -> None:
    check_golden("skip_unread_rows", graph_text(after(sketch(SLOTS, _layer), SkipUnreadRows())))


def compare(module: fx.GraphModule, seed: int, q_lens: list[int]) -> int:
    """How many ops moved; every result stays what it was."""
    narrow = after(module, SkipUnreadRows())
    given_ = values(seed, q_lens)
    for mine, theirs in zip(evaluate(narrow, given_), evaluate(module, given_), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    for node in narrow.graph.nodes:  # the metadata are those of the results
        if isinstance(node.meta.get("val"), Tensor) and node.target is aten.linear.default:
            assert node.meta["val"].shape[:2] == (B, 1)
    (again,) = apply(narrow, SkipUnreadRows())
    assert again.count == 0
    return sum(node.meta["val"].shape[:2] == (B, 1) for node in narrow.graph.nodes if node.op == "call_function")


@settings(max_examples=15, deadline=None, print_blob=True)
@given(seed=st.integers(0, 1000), q_lens=st.lists(st.integers(0, N), min_size=B, max_size=B))
def test_a_decoder_layer_runs_on_one_row(seed: int, q_lens: list[int]) -> None:
    assert compare(sketch(SLOTS, _layer), seed, q_lens) == 14  # 11 ops, the lm_head, and two choices in front of them


Op = Callable[..., Any]
UNARY: dict[str, Op] = {
    "tanh": lambda b, x, *_: b.call(aten.tanh.default, x),
    "added to the residual": lambda b, x, r, *_: b.call(aten.add.Tensor, x, r),
    "added to itself": lambda b, x, *_: b.call(aten.add.Tensor, x, x),
    "scaled": lambda b, x, r, q, w, g, *_: b.call(aten.mul.Tensor, x, g),
    "linear": lambda b, x, r, q, w, *_: b.call(aten.linear.default, x, w),
    "rms_norm": lambda b, x, r, q, w, g, *_: b.call(aten.rms_norm.default, x, [H], g),
    "layer_norm": lambda b, x, r, q, w, g, *_: b.call(aten.layer_norm.default, x, [H], g),
    "softmax": lambda b, x, *_: b.call(aten.softmax.int, x, -1),
    "divided by its sum": lambda b, x, *_: b.call(
        aten.div.Tensor, x, b.call(aten.add.Tensor, b.call(aten.sum.dim_IntList, b.call(aten.abs.default, x), [2], True), 1.0)),
    "halves swapped": lambda b, x, *_: b.call(
        aten.cat.default, [b.call(aten.slice.Tensor, x, 2, 3, H), b.call(aten.slice.Tensor, x, -1, 0, 3)], -1),
    "another dtype": lambda b, x, *_: b.call(
        aten._to_copy.default, b.call(aten._to_copy.default, x, dtype=torch.float64), dtype=torch.float32),
    "heads and back": lambda b, x, *_: b.call(
        aten.view.default, b.call(aten.neg.default, b.call(aten.view.default, x, [B, N, 2, -1])), [B, N, H]),
}  # fmt: skip
# Ops that mix rows, or whose rows are not the requests' alone: the choice stays behind them.
MIXING: dict[str, Op] = {
    "sum over rows": lambda b, x, *_: b.call(aten.cumsum.default, x, 1),
    "softmax over rows": lambda b, x, *_: b.call(aten.softmax.int, x, 1),
    "reversed rows": lambda b, x, *_: b.call(aten.flip.default, x, [1]),
    "mean over rows": lambda b, x, *_: b.call(aten.expand.default, b.call(aten.mean.dim, x, [1], True), [B, N, H]),
    "rows of heads": lambda b, x, *_: b.call(
        aten.reshape.default, b.call(aten.transpose.int, b.call(aten.view.default, x, [B, N, 2, 3]), 1, 2), [B, N, H]),
    "positions without requests": lambda b, x, r, q, w, g, p, *_: b.call(aten.add.Tensor, x, p),
    "norm over rows": lambda b, x, *_: b.call(aten.layer_norm.default, x, [N, H]),
    "joined rows": lambda b, x, r, *_: b.call(
        aten.cat.default, [b.call(aten.slice.Tensor, x, 1, 0, 1), b.call(aten.slice.Tensor, r, 1, 0, N - 1)], 1),
}  # fmt: skip


def chosen(ops: list[Op]) -> fx.GraphModule:
    def write(builder: Builder, x: fx.Node, r: fx.Node, q_lens: fx.Node, *others: fx.Node) -> list[fx.Node]:
        for op in ops:
            x = op(builder, x, r, q_lens, *others)
        return [builder.call(last_rows, x, q_lens)]

    return sketch(SLOTS, write)


@settings(max_examples=60, deadline=None, print_blob=True)
@given(
    names=st.lists(st.sampled_from([*UNARY, *MIXING]), min_size=1, max_size=5), seed=st.integers(0, 1000),
    q_lens=st.lists(st.integers(0, N), min_size=B, max_size=B),
)  # fmt: skip
def test_any_row_of_ops_means_the_same(names: list[str], seed: int, q_lens: list[int]) -> None:
    module = chosen([(UNARY | MIXING)[name] for name in names])
    narrow = after(module, SkipUnreadRows())
    given_ = values(seed, q_lens)
    torch.testing.assert_close(evaluate(narrow, given_), evaluate(module, given_), rtol=1e-5, atol=1e-6)
    moved = next((i for i, name in enumerate(reversed(names)) if name in MIXING), len(names))
    assert (apply(module, SkipUnreadRows())[0].count > 0) == (moved > 0)


@pytest.mark.parametrize("name", UNARY)
def test_what_treats_rows_alike_moves(name: str) -> None:
    module = chosen([UNARY[name]])
    assert apply(module, SkipUnreadRows())[0].count
    assert returned(module).target is not last_rows.op


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_rows_stays(name: str) -> None:
    module = chosen([MIXING[name]])
    text = graph_text(module)
    assert apply(module, SkipUnreadRows())[0].count == 0
    assert graph_text(module) == text


def test_rows_that_something_else_reads_are_computed() -> None:
    """A head's taps, the next module's inputs."""

    def write(builder: Builder, x: fx.Node, r: fx.Node, q_lens: fx.Node, *_: fx.Node) -> list[fx.Node]:
        tapped = builder.call(aten.add.Tensor, x, r)
        return [builder.call(last_rows, builder.call(aten.tanh.default, tapped), q_lens), tapped]

    module = sketch(SLOTS, write)
    assert apply(module, SkipUnreadRows())[0].count == 1
    assert returned(module, 1).meta["val"].shape == (B, N, H)


def test_two_numbers_of_valid_rows_do_not_meet() -> None:
    """Rows that two choices read are no choice's own."""

    def write(builder: Builder, x: fx.Node, r: fx.Node, q_lens: fx.Node, *_: fx.Node) -> list[fx.Node]:
        other = builder.call(aten.add.Tensor, q_lens, 1)
        shared = builder.call(aten.tanh.default, x)
        return [builder.call(last_rows, builder.call(aten.neg.default, shared), count) for count in (q_lens, other)]

    module = sketch(SLOTS, write)
    before = values(0, [1, 2])
    expected = evaluate(module, before)
    (record,) = apply(module, SkipUnreadRows())
    assert record.count == 2  # each its negation
    for mine, theirs in zip(evaluate(module, before), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_a_number_that_comes_later_is_waited_for() -> None:
    """An op stays where it is in the graph, so it cannot read what is computed behind it."""

    def write(builder: Builder, x: fx.Node, r: fx.Node, q_lens: fx.Node, *_: fx.Node) -> list[fx.Node]:
        early = builder.call(aten.tanh.default, x)
        count = builder.call(aten.add.Tensor, q_lens, 0)
        return [builder.call(last_rows, builder.call(aten.neg.default, early), count)]

    module = sketch(SLOTS, write)
    assert apply(module, SkipUnreadRows())[0].count == 1
    module.graph.lint()
    (choice,) = calls(module, last_rows)
    assert choice.args[0].target is aten.tanh.default  # type: ignore[union-attr]


def test_planted_bug_an_op_that_mixes_rows_is_taken_for_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {**skip_unread_rows._RULES, aten.cumsum.default: lambda node, value: [node.args[0]]}
    monkeypatch.setattr(skip_unread_rows, "_RULES", rules)
    with pytest.raises(AssertionError, match="not close"):
        compare(chosen([MIXING["sum over rows"]]), 0, [4, 4])
