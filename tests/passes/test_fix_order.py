"""fix-order: attention becomes attention whose sums have one order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.graphs import after, apply, check_golden, evaluate, sketch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import calls
from autospec.ir.slots import Slot, slots
from autospec.ir.text import graph_text
from autospec.kernels.ordered_attention import ordered_attention
from autospec.kernels.paged_attention import paged_attention
from autospec.passes.fix_order import FixOrder


def layer(*, is_tree: bool = False) -> fx.GraphModule:
    """Windowed attention of two nodes, told how many are valid."""

    def write(b: Builder, q: Any, k: Any, v: Any, table: Any, lens: Any, valid: Any, mask: Any) -> Any:
        return b.call(paged_attention, q, k, v, table, lens, valid, tree_mask=mask if is_tree else None, scale=0.5, window=3)

    return sketch(
        [
            Slot("input", "q", (1, 2, 4, 4)), Slot("state", "k_pages", (3, 4, 2, 4)), Slot("state", "v_pages", (3, 4, 2, 4)),
            Slot("state", "page_table", (1, 2), torch.int32), Slot("state", "kv_lens", (1,), torch.int32),
            Slot("input", "q_lens", (1,), torch.int32), Slot("input", "tree_mask", (1, 2, 1), torch.int32),
        ],
        write,
    )  # fmt: skip


def test_text() -> None:
    check_golden("fix_order", graph_text(after(layer(), FixOrder())))


def test_meaning() -> None:
    module = layer()
    values = {slot.name: torch.randn(slot.shape) for slot in slots(module) if slot.dtype.is_floating_point}
    values |= {"page_table": torch.tensor([[2, 1]]).int(), "kv_lens": torch.tensor([4]).int(),
               "q_lens": torch.tensor([2]).int(), "tree_mask": torch.zeros(1, 2, 1).int()}  # fmt: skip
    assert torch.equal(evaluate(after(module, FixOrder()), values)[0], evaluate(module, values)[0])


def test_nothing_is_left_behind_and_again_finds_nothing() -> None:
    module = layer()
    assert [record.count for record in apply(module, FixOrder(), FixOrder())] == [1, 0]
    assert not list(calls(module, paged_attention))
    assert len(list(calls(module, ordered_attention))) == 1


def test_a_tree_is_no_case_for_it() -> None:
    with pytest.raises(Exception, match="has a tree mask"):
        apply(layer(is_tree=True), FixOrder())
