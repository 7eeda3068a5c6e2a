"""fuse-rope: rotation and append become one op. The graphs are a CPU's, and the pass is told that it is a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from harness.graphs import after, apply, check_golden, evaluate, sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, calls
from autospec.ir.slots import Slot, slots
from autospec.ir.text import graph_text
from autospec.kernels.append_kv import append_kv
from autospec.kernels.append_rotated import append_rotated
from autospec.kernels.paged_attention import paged_attention
from autospec.passes import fuse_rope
from autospec.passes.fuse_rope import FuseRope

BATCH, ROWS, HEADS, KV_HEADS, DIM, PAGE = 2, 3, 4, 2, 4, 4


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autospec.passes.fuse_rope.device_of", lambda module: torch.device("cuda"))


def rotate(b: Builder, x: fx.Node, cos: fx.Node, sin: fx.Node, *, middle: int = DIM // 2, sign: Any = aten.neg.default) -> fx.Node:
    """transformers' apply_rotary_pos_emb on x [B, H, N, D]."""
    cos, sin = (b.call(aten.unsqueeze.default, angle, 1) for angle in (cos, sin))
    first = b.call(aten.slice.Tensor, x, 3, 0, middle)
    second = b.call(sign, b.call(aten.slice.Tensor, x, 3, middle, 2**63 - 1))
    turned = b.call(aten.mul.Tensor, b.call(aten.cat.default, [second, first], -1), sin)
    return b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, cos), turned)


def layer(write: Callable[..., Any]) -> fx.GraphModule:
    """A graph over projected heads, angles and a paged cache; `write` rotates, appends and attends."""
    return sketch(
        [
            Slot("input", "q", (BATCH, HEADS, ROWS, DIM)), Slot("input", "k", (BATCH, KV_HEADS, ROWS, DIM)),
            Slot("input", "v", (BATCH, ROWS, KV_HEADS, DIM)), Slot("input", "cos", (BATCH, ROWS, DIM)),
            Slot("input", "sin", (BATCH, ROWS, DIM)), Slot("state", "k_pages", (5, PAGE, KV_HEADS, DIM)),
            Slot("state", "v_pages", (5, PAGE, KV_HEADS, DIM)), Slot("state", "page_table", (BATCH, 2), torch.int32),
            Slot("state", "kv_lens", (BATCH,), torch.int32),
        ],
        write,
    )  # fmt: skip


def llama(b: Builder, q: Any, k: Any, v: Any, cos: Any, sin: Any, *pages: Any, **options: Any) -> fx.Node:
    q, k = rotate(b, q, cos, sin), rotate(b, k, cos, sin, **options)
    b.call(append_kv, b.call(aten.transpose.int, k, 1, 2), v, *pages)
    return b.call(paged_attention, b.call(aten.transpose.int, q, 1, 2), *pages, scale=0.5)


def test_text() -> None:
    check_golden("fuse_rope", graph_text(after(layer(llama), FuseRope())))


def values_of(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {slot.name: torch.randn(slot.shape, generator=generator) for slot in slots(module) if slot.dtype.is_floating_point}
    return values | {"page_table": torch.tensor([[1, 2], [4, 3]]).int(), "kv_lens": torch.tensor([1, 5]).int()}


def same(write: Callable[..., Any]) -> fx.GraphModule:
    """The graph after the pass: it returns the same bits and leaves the same pages."""
    module = layer(write)
    fused = after(module, FuseRope())
    results = []
    for graph in (fused, module):
        values = {name: value.clone() for name, value in values_of(module).items()}
        results.append((*evaluate(graph, values), values["k_pages"], values["v_pages"]))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))
    return fused


def test_meaning() -> None:
    fused = same(llama)
    assert len(list(calls(fused, append_rotated))) == 1
    assert not list(calls(fused, append_kv))


def drafter(reads: Sequence[int]) -> Callable[..., Any]:
    """Passes of one layer, each a slot behind the one before and over the same pages, with as many reads of what they left."""

    def write(b: Builder, q: Any, k: Any, v: Any, cos: Any, sin: Any, *pages: Any) -> list[fx.Node]:
        read = []
        for level, count in enumerate(reads):
            scaled = (b.call(aten.mul.Tensor, x, level + 1) for x in (q, k))
            queries, keys = (b.call(aten.transpose.int, rotate(b, x, cos, sin), 1, 2) for x in scaled)
            *table, kv_lens = pages
            b.call(append_kv, keys, v, *table, b.call(aten.add.Tensor, kv_lens, level))
            read += [b.call(paged_attention, queries, *pages, scale=0.5 + extra) for extra in range(count)]
        return read or [q]

    return write


def test_text_of_a_drafter() -> None:
    check_golden("fuse_rope.drafter", graph_text(after(layer(drafter([1, 1])), FuseRope())))


def check_a_drafter(reads: Sequence[int]) -> None:
    """Every pass whose rows one attention reads is fused, and nothing else; bits and pages stay."""
    fused = same(drafter(reads))
    assert len(list(calls(fused, append_rotated))) == list(reads).count(1)
    assert len(list(calls(fused, append_kv))) == len(reads) - list(reads).count(1)


@settings(max_examples=25)
@given(reads=st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_every_pass_of_a_drafter_is_fused_by_itself(reads: list[int]) -> None:
    with mock.patch("autospec.passes.fuse_rope.device_of", return_value=torch.device("cuda")):
        check_a_drafter(reads)


def test_a_write_paired_with_a_later_read_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a level takes the queries of the last one."""
    right = fuse_rope._readers
    monkeypatch.setattr(fuse_rope, "_readers", lambda module, append: right(module, list(calls(module, append_kv))[-1]))
    with pytest.raises(AssertionError):
        check_a_drafter([1, 1])


def _other_angles(b: Builder, q: Any, k: Any, v: Any, cos: Any, sin: Any, *pages: Any) -> Any:
    q, k = rotate(b, q, sin, cos), rotate(b, k, cos, sin)
    b.call(append_kv, b.call(aten.transpose.int, k, 1, 2), v, *pages)
    return b.call(paged_attention, b.call(aten.transpose.int, q, 1, 2), *pages, scale=0.5)


def _uneven(b: Builder, *args: Any) -> Any:
    return llama(b, *args, middle=1)


def _mirrored(b: Builder, *args: Any) -> Any:
    return llama(b, *args, sign=aten.abs.default)


def _weighed(b: Builder, q: Any, k: Any, v: Any, cos: Any, sin: Any, *pages: Any) -> Any:
    q, k = rotate(b, q, cos, sin), rotate(b, k, cos, sin)
    k.kwargs = {"alpha": 2}
    b.call(append_kv, b.call(aten.transpose.int, k, 1, 2), v, *pages)
    return b.call(paged_attention, b.call(aten.transpose.int, q, 1, 2), *pages, scale=0.5)


def _bare_keys(b: Builder, q: Any, k: Any, v: Any, cos: Any, sin: Any, *pages: Any) -> Any:
    b.call(append_kv, b.call(aten.transpose.int, k, 1, 2), v, *pages)
    return b.call(paged_attention, b.call(aten.transpose.int, rotate(b, q, cos, sin), 1, 2), *pages, scale=0.5)


def _two_readers(b: Builder, q: Any, k: Any, v: Any, cos: Any, sin: Any, *pages: Any) -> Any:
    q, k = rotate(b, q, cos, sin), rotate(b, k, cos, sin)
    b.call(append_kv, b.call(aten.transpose.int, k, 1, 2), v, *pages)
    heads = b.call(aten.transpose.int, q, 1, 2)
    first = b.call(paged_attention, heads, *pages, scale=0.5)
    return b.call(aten.add.Tensor, first, b.call(paged_attention, heads, *pages, scale=0.25))


def _read_elsewhere(b: Builder, q: Any, k: Any, v: Any, cos: Any, sin: Any, *pages: Any) -> Any:
    q, k = rotate(b, q, cos, sin), rotate(b, k, cos, sin)
    b.call(append_kv, b.call(aten.transpose.int, k, 1, 2), v, *pages)
    out = b.call(paged_attention, b.call(aten.transpose.int, q, 1, 2), *pages, scale=0.5)
    return b.call(aten.add.Tensor, out, b.call(aten.transpose.int, q, 1, 2))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (_other_angles, "different angles"), (_uneven, "halves"), (_mirrored, "expected aten.neg"),
        (_weighed, "alpha is 2"),
        (_bare_keys, "the keys are not rotated"), (_two_readers, "2 readers"), (drafter([0]), "0 readers"),
        (_read_elsewhere, "something else reads"),
    ],
)  # fmt: skip
def test_other_graphs_are_left_alone(write: Any, reason: str) -> None:
    assert not list(calls(same(write), append_rotated)), "the pass took what it does not know"
    record = apply(layer(write), FuseRope())[0]
    assert record.count == 0
    assert reason in record.refusals[0].reason


def test_an_odd_number_of_dimensions_has_no_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "DIM", 5)
    (refusal,) = apply(layer(lambda b, *args: llama(b, *args, middle=2)), FuseRope())[0].refusals
    assert "halves" in refusal.reason


def test_again_finds_nothing() -> None:
    one = FuseRope()
    assert [record.count for record in apply(layer(llama), one, one)] == [1, 0]


def test_a_cpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert apply(layer(llama), FuseRope())[0].count == 0
