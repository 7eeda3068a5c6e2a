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

import autospec
from autospec.ir.build import Builder
from autospec.ir.match import aten, calls, returned
from autospec.ir.slots import Slot
from autospec.ir.text import graph_text
from autospec.kernels.commit import last_rows
from autospec.passes import skip_unread_rows
from autospec.passes.skip_unread_rows import SkipUnreadRows
from autospec.tiny_models import tiny_model

B, N, H = 2, 4, 4  # as many rows as features, which a shape then does not tell apart
DOUBLE = torch.float64  # products of one row and of four round alike to 1e-12
SLOTS = [
    Slot("input", "x", (B, N, H), DOUBLE), Slot("input", "r", (B, N, H), DOUBLE), Slot("input", "q_lens", (B,), torch.int32),
    Slot("weight", "w", (H, H), DOUBLE), Slot("weight", "g", (H,), DOUBLE), Slot("weight", "one_row", (1, H), DOUBLE),
    Slot("input", "places", (1, N, H), DOUBLE), Slot("input", "flat", (B, N), DOUBLE), Slot("weight", "half", (H // 2,), DOUBLE),
    Slot("state", "kept", (B, N, H), DOUBLE), Slot("state", "count", (B,), torch.int32),
]  # fmt: skip


def values(seed: int, q_lens: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {slot.name: torch.randn(slot.shape, generator=generator, dtype=DOUBLE) for slot in SLOTS if slot.dtype is DOUBLE}
    return made | {"q_lens": torch.tensor(q_lens, dtype=torch.int32), "count": torch.ones(B, dtype=torch.int32)}


def compare(module: fx.GraphModule, seed: int = 0, q_lens: list[int] | None = None) -> int:
    """How many ops moved; every result stays what it was, and the metadata say what the nodes give."""
    narrow = after(module)
    (record,) = apply(narrow, SkipUnreadRows())
    mine, theirs = (evaluate(one, values(seed, q_lens or [3, 4])) for one in (narrow, module))
    for got, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for got, node in zip(mine, narrow.graph.output_node().args[0], strict=True):  # type: ignore[arg-type]
        assert (got.shape, got.dtype) == (node.meta["val"].shape, node.meta["val"].dtype)
    assert apply(narrow, SkipUnreadRows())[0].count == 0
    return record.count


class Named(dict):
    """The placeholders of a sketch by name."""

    __getattr__ = dict.__getitem__


def drawn(write: Callable[[Builder, Any], Any]) -> fx.GraphModule:
    return sketch(SLOTS, lambda b, *nodes: write(b, Named(zip([slot.name for slot in SLOTS], nodes, strict=True))))


def _layer(b: Builder, n: Any) -> list[fx.Node]:
    """What a decoder does behind its attention: residual, norm, gated layer, residual; two choices of its last row."""
    h = b.call(aten.add.Tensor, n.r, b.call(aten.linear.default, n.x, n.w))
    squares = b.call(aten.mean.dim, b.call(aten.pow.Tensor_Scalar, h, 2), [-1], True)
    normed = b.call(aten.mul.Tensor, n.g, b.call(aten.mul.Tensor, h, b.call(aten.rsqrt.default, squares)))
    up = b.call(aten.mul.Tensor, b.call(aten.silu.default, b.call(aten.linear.default, normed, n.w)), normed)
    out = b.call(aten.add.Tensor, h, up)
    return [b.call(aten.linear.default, b.call(last_rows, out, n.q_lens), n.w), b.call(last_rows, out, n.q_lens)]


def test_text() -> None:
    check_golden("skip_unread_rows", graph_text(after(drawn(_layer), SkipUnreadRows())))


@settings(max_examples=15, deadline=None, print_blob=True)
@given(seed=st.integers(0, 1000), q_lens=st.lists(st.integers(0, N), min_size=B, max_size=B))
def test_a_decoder_layer_runs_on_one_row(seed: int, q_lens: list[int]) -> None:
    module = drawn(_layer)
    assert compare(module, seed, q_lens) == 11
    narrow = after(module, SkipUnreadRows())
    for node in narrow.graph.nodes:
        if node.op == "call_function":
            assert node.meta["val"].shape[:2] == (B, 1), f"%{node.name} still has all rows"


Op = Callable[[Builder, fx.Node, Any], Any]
ALIKE: dict[str, Op] = {
    "tanh": lambda b, x, n: b.call(aten.tanh.default, x),
    "added to the residual": lambda b, x, n: b.call(aten.add.Tensor, x, n.r),
    "twice the residual taken away": lambda b, x, n: b.call(aten.sub.Tensor, x, n.r, alpha=2),
    "added to itself": lambda b, x, n: b.call(aten.add.Tensor, x, x),
    "scaled": lambda b, x, n: b.call(aten.mul.Tensor, x, n.g),
    "scaled by a computed row": lambda b, x, n: b.call(aten.mul.Tensor, x, b.call(aten.add.Tensor, n.one_row, 1.0)),
    "chosen by a computed row": lambda b, x, n: b.call(aten.where.self, b.call(aten.gt.Scalar, n.one_row, 0), x, n.r),
    "linear": lambda b, x, n: b.call(aten.linear.default, x, n.w),
    "linear with a bias": lambda b, x, n: b.call(aten.linear.default, x, n.w, n.g),
    "linear with a computed weight": lambda b, x, n: b.call(aten.linear.default, x, b.call(aten.neg.default, n.w)),
    "rms_norm": lambda b, x, n: b.call(aten.rms_norm.default, x, [H], n.g),
    "layer_norm with a computed weight": lambda b, x, n: b.call(
        aten.layer_norm.default, x, [H], b.call(aten.add.Tensor, n.g, 1.0), n.g),
    "less its mean": lambda b, x, n: b.call(aten.sub.Tensor, x, b.call(aten.mean.dim, x, [2], True)),
    "divided by its sum": lambda b, x, n: b.call(
        aten.div.Tensor, x, b.call(aten.add.Tensor, b.call(aten.sum.dim_IntList, b.call(aten.abs.default, x), [2], True), 1.0)),
    "rounded": lambda b, x, n: b.call(
        aten._to_copy.default, b.call(aten._to_copy.default, x, dtype=torch.int64), dtype=DOUBLE),
    "heads and back": lambda b, x, n: b.call(
        aten.reshape.default, b.call(aten.mul.Tensor, b.call(aten.view.default, x, [B, N, 2, -1]), n.half), [B, N, H]),
    "type of another": lambda b, x, n: b.call(aten.type_as.default, x, n.r),
    "less its second half": lambda b, x, n: b.call(aten.sub.Tensor, x, b.call(
        aten.sum.dim_IntList, b.call(aten.select.int, b.call(aten.view.default, x, [B, N, 2, 2]), 2, 1), [2], True)),
    "gated by its half": lambda b, x, n: b.call(
        aten.mul.Tensor, x, b.call(aten.slice.Tensor, b.call(aten.slice.Tensor, x, 2, 1, 2), -1, 0, 1)),
}  # fmt: skip
# Ops that mix rows, or whose rows are not the requests' alone: the choice stays behind them.
MIXING: dict[str, Op] = {
    "sum over rows": lambda b, x, n: b.call(aten.cumsum.default, x, 1),
    "softmax over rows": lambda b, x, n: b.call(aten.softmax.int, x, 1),
    "reversed rows": lambda b, x, n: b.call(aten.flip.default, x, [1]),
    "mean over requests": lambda b, x, n: b.call(aten.expand.default, b.call(aten.mean.dim, x, [0], True), [B, N, H]),
    "later rows": lambda b, x, n: b.call(aten.slice.Tensor, b.call(aten.cat.default, [x, x], 1), 1, 2, 2 + N),
    "rows of heads": lambda b, x, n: b.call(
        aten.view.default, b.call(aten.reshape.default, b.call(aten.transpose.int, x, 0, 1), [N * B, H]), [B, N, H]),
    "rows and features exchanged": lambda b, x, n: b.call(aten.transpose.int, x, 1, 2),
    "positions without requests": lambda b, x, n: b.call(aten.add.Tensor, x, n.places),
    "positions without a dimension of requests": lambda b, x, n: b.call(aten.add.Tensor, x, n.w),
    "norm over rows": lambda b, x, n: b.call(aten.layer_norm.default, x, [N, H]),
    "a bias of rows": lambda b, x, n: b.call(aten.linear.default, x, n.w, n.one_row),
    "a part of several results": lambda b, x, n: b.calls(aten.split.Tensor, b.call(aten.cat.default, [x, x], 2), H, 2)[1],
    "written in place": lambda b, x, n: b.call(aten.tanh_.default, b.call(aten.flip.default, x, [1])),
}  # fmt: skip

MEANS: dict[str, Op] = {
    "mean over rows": lambda b, x, n: b.call(aten.mean.dim, b.call(aten.view.default, x, [B, N, 2, 2]), [1]),
    "mean over rows of as many parts": lambda b, x, n: b.call(
        aten.mean.dim, b.call(aten.view.default, b.call(aten.cat.default, [x, x], 2), [B, N, N, 2]), [1]),
    "mean over rows, from behind": lambda b, x, n: b.call(aten.mean.dim, b.call(aten.view.default, x, [B, N, 2, 2]), [-3]),
}  # fmt: skip


def chosen(*ops: Op) -> fx.GraphModule:
    def write(b: Builder, n: Any) -> list[fx.Node]:
        x = n.x
        for op in ops:
            x = op(b, x, n)
        return [b.call(last_rows, x, n.q_lens)]

    return drawn(write)


@settings(max_examples=60, deadline=None, print_blob=True)
@given(
    names=st.lists(st.sampled_from([*ALIKE, *MIXING]), min_size=1, max_size=5), seed=st.integers(0, 1000),
    q_lens=st.lists(st.integers(0, N), min_size=B, max_size=B),
)  # fmt: skip
def test_any_row_of_ops_means_the_same(names: list[str], seed: int, q_lens: list[int]) -> None:
    moved = compare(chosen(*[(ALIKE | MIXING)[name] for name in names]), seed, q_lens)
    assert (moved > 0) == (names[-1] in ALIKE)


@pytest.mark.parametrize("name", ALIKE)
def test_what_treats_rows_alike_moves(name: str) -> None:
    module = chosen(ALIKE[name])
    assert compare(module)
    narrow = after(module, SkipUnreadRows())
    assert returned(narrow).target is not last_rows.op
    calls_left = [node for node in narrow.graph.nodes if node.op == "call_function"]
    assert not [node.name for node in calls_left if node.meta["val"].shape[:2] == (B, N)], "these still have all rows"


@pytest.mark.parametrize("name", [*MIXING, *MEANS])
def test_what_mixes_rows_stays(name: str) -> None:
    module = chosen((MIXING | MEANS)[name])
    text = graph_text(module)
    assert apply(module, SkipUnreadRows())[0].count == 0
    assert graph_text(module) == text


def test_rows_without_features() -> None:
    """[B, N]: numbers of rows move; a linear layer over N of them does not."""
    kept = drawn(lambda b, n: [b.call(last_rows, b.call(aten.linear.default, n.flat, n.w), n.q_lens)])
    assert apply(kept, SkipUnreadRows())[0].count == 0
    assert compare(drawn(lambda b, n: [b.call(last_rows, b.call(aten.mean.dim, n.x, [2]), n.q_lens)])) == 1
    assert compare(drawn(lambda b, n: [b.call(last_rows, b.call(aten.neg.default, n.flat), n.q_lens)])) == 1


def test_positions_where_all_sizes_agree() -> None:
    """[N, H] looks like [B, N] then, but is aligned with rows and features."""

    def write(b: Builder, x: fx.Node, places: fx.Node, q_lens: fx.Node) -> list[fx.Node]:
        return [b.call(last_rows, b.call(aten.add.Tensor, x, places), q_lens)]

    slots = [Slot("input", "x", (4, 4, 4)), Slot("weight", "places", (4, 4)), Slot("input", "q_lens", (4,), torch.int32)]
    assert apply(sketch(slots, write), SkipUnreadRows())[0].count == 0


def test_one_row_is_left_alone() -> None:
    def write(b: Builder, n: Any) -> list[fx.Node]:
        return [b.call(last_rows, b.call(aten.linear.default, b.call(aten.slice.Tensor, n.x, 1, 0, 1), n.w), n.q_lens)]

    assert apply(drawn(write), SkipUnreadRows())[0].count == 0


def test_what_was_noted_about_an_op_stays() -> None:
    module = chosen(ALIKE["tanh"])
    (op,) = calls(module, aten.tanh.default)
    op.meta.update(module="layers.3.mlp", layer=3)
    (record,) = apply(module, SkipUnreadRows())
    (op,) = calls(module, aten.tanh.default)
    assert (op.meta["module"], op.meta["layer"]) == ("layers.3.mlp", 3)
    assert record.details == (f"1 ops on 1 row instead of {N}",)


def test_rows_that_something_else_reads_are_computed() -> None:
    """A head's taps, the next module's inputs."""

    def write(b: Builder, n: Any) -> list[fx.Node]:
        tapped = b.call(aten.add.Tensor, n.x, n.r)
        return [b.call(last_rows, b.call(aten.tanh.default, tapped), n.q_lens), tapped]

    assert compare(drawn(write)) == 1


def test_two_numbers_of_valid_rows_do_not_meet() -> None:
    """Rows that two choices read are no choice's own."""

    def write(b: Builder, n: Any) -> list[fx.Node]:
        other = b.call(aten.sub.Tensor, n.q_lens, 1)
        shared = b.call(aten.tanh.default, n.x)
        return [b.call(last_rows, b.call(aten.neg.default, shared), count) for count in (n.q_lens, other)]

    assert compare(drawn(write)) == 2  # each its negation


def test_a_number_that_comes_later_is_waited_for() -> None:
    """An op stays where it is in the graph, so it cannot read what is computed behind it."""

    def write(b: Builder, n: Any) -> list[fx.Node]:
        early = b.call(aten.tanh.default, n.x)
        count = b.call(aten.add.Tensor, n.q_lens, 0)
        return [b.call(last_rows, b.call(aten.neg.default, early), count)]

    module = drawn(write)
    assert compare(module) == 1
    (choice,) = calls(after(module, SkipUnreadRows()), last_rows)
    assert choice.args[0].target is aten.tanh.default  # type: ignore[union-attr]


def test_state_is_read_where_it_was() -> None:
    """Written between the op and the choice, it would be chosen from too early, or too late for the second reader."""

    def write(b: Builder, n: Any) -> list[fx.Node]:
        before = b.call(aten.tanh.default, n.kept)
        b.call(aten.copy_.default, n.kept, n.r)
        return [b.call(last_rows, one, n.q_lens) for one in (before, b.call(aten.neg.default, n.kept))]

    assert compare(drawn(write)) == 0


def test_a_number_of_valid_rows_in_the_state_is_read_where_it_was() -> None:
    def write(b: Builder, n: Any) -> list[fx.Node]:
        out = b.call(aten.tanh.default, n.x)
        b.call(aten.copy_.default, n.count, n.q_lens)
        return [b.call(last_rows, out, n.count)]

    assert compare(drawn(write)) == 0


@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 1, 64)])
def test_a_model_with_a_computed_scale(shape: tuple[int, ...]) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__()
            self.layer, self.scale = layer, torch.nn.Parameter(torch.randn(shape) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * (1 + self.scale)

    torch.manual_seed(0)
    model = tiny_model("llama", num_hidden_layers=2, hidden_size=64)
    for layer in model.model.layers:
        layer.mlp.down_proj = Scaled(layer.mlp.down_proj)
    model.eval().requires_grad_(False)
    moved, texts = [], []
    for passes in (None, ["-skip-unread-rows"]):
        fast = autospec.optimize(model, None, compile="eager", passes=passes)
        texts.append(fast.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=6, do_sample=False).tolist())
        records = fast.program.records
        moved.append(sum(record.count for record in records if record.name == "skip-unread-rows" and record.graph == "prefill"))
    assert texts[0] == texts[1]
    assert moved[0] >= 15, "o, norm, the gated layer, two residuals and the last norm"
    assert moved[1] == 0


def test_planted_bugs_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = skip_unread_rows._RULES
    for op, name in ((aten.cumsum.default, "sum over rows"), (aten.flip.default, "reversed rows")):
        monkeypatch.setattr(skip_unread_rows, "_RULES", {**rules, op: skip_unread_rows._first})
        with pytest.raises(AssertionError, match="not close"):
            compare(chosen(MIXING[name]))
    monkeypatch.setattr(skip_unread_rows, "_RULES", rules)
    monkeypatch.setattr(skip_unread_rows, "_is_state", lambda node: False)
    with pytest.raises(AssertionError):
        test_state_is_read_where_it_was()
