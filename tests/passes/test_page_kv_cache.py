"""page-kv-cache: any split into prefill and decode equals stateless attention over the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.graphs import VOCAB, after, apply, check_golden, evaluate, new_state, tiny_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from autospec.ir.match import calls
from autospec.ir.slots import find_slot, slots
from autospec.ir.text import graph_text
from autospec.kernels.append_kv import append_kv
from autospec.kernels.attention import attention
from autospec.kernels.paged_attention import paged_attention
from autospec.passes.fold_noops import FoldNoops
from autospec.passes.page_kv_cache import PageKvCache
from autospec.passes.specialize_shapes import SpecializeShapes

BATCH, PAGE, PAGES_PER_ROW = 2, 4, 8
PAGING = PageKvCache(page_size=PAGE, num_pages=1 + BATCH * PAGES_PER_ROW, pages_per_row=PAGES_PER_ROW)


def test_text(tiny: Any) -> None:
    check_golden("page_kv_cache", graph_text(tiny.paged(3)))


def test_again_finds_nothing(tiny: Any) -> None:
    assert apply(tiny.paged(3), PAGING)[0].count == 0


def test_symbolic_shapes_are_refused(tiny: Any) -> None:
    with pytest.raises(AssertionError, match="page-kv-cache requires: shapes must be static"):
        after(tiny.captured, PAGING)


def test_the_length_of_a_spliced_draft_is_an_input(tiny: Any) -> None:
    given_length = find_slot(tiny.paged(3, is_length_given=True), "kv_lens")
    own_length = find_slot(tiny.paged(3), "kv_lens")
    assert given_length is not None
    assert own_length is not None
    assert (given_length.meta["slot"].kind, own_length.meta["slot"].kind) == ("input", "state")


_WINDOWS = {window: tiny_graph(num_layers=2, window=window) for window in (0, 5)}
_PAGED: dict[tuple[int, int], fx.GraphModule] = {}


def _paged(window: int, q_len: int) -> fx.GraphModule:
    if (window, q_len) not in _PAGED:
        _PAGED[window, q_len] = after(
            _WINDOWS[window][0], SpecializeShapes(batch_size=BATCH, q_len=q_len), FoldNoops(), PAGING
        )
    return _PAGED[window, q_len]


@settings(max_examples=30)
@given(
    splits=st.lists(st.integers(1, 9), min_size=1, max_size=6), window=st.sampled_from([0, 5]),
    seed=st.integers(0, 1000), behind=st.lists(st.integers(0, 3), min_size=BATCH, max_size=BATCH),
)  # fmt: skip
def test_any_split_equals_the_whole(splits: list[int], window: int, seed: int, behind: list[int]) -> None:
    """Rows are of different length, pages lie anywhere, and what a wider call wrote past the end does no harm."""
    captured, weights = _WINDOWS[window]
    generator = torch.Generator().manual_seed(seed)
    length = sum(splits)
    if length > PAGE * PAGES_PER_ROW - 9:
        splits, length = [9], 9
    ids = torch.randint(0, VOCAB, (BATCH, length), generator=generator)
    positions = torch.arange(length).expand(BATCH, -1).contiguous()
    whole = evaluate(captured, {"input_ids": ids, "position_ids": positions, **weights})[0]
    state = new_state(_paged(window, 1))
    order = torch.randperm(BATCH * PAGES_PER_ROW, generator=generator).to(torch.int32) + 1
    state["page_table"].copy_(order.reshape(BATCH, PAGES_PER_ROW))
    for name, tensor in state.items():
        if "pages." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))  # what earlier requests left
    start = 0
    for split in splits:
        # The last `behind` tokens of a call are not committed: the next call writes over them.
        part = slice(start, start + split)
        values = {"input_ids": ids[:, part], "position_ids": positions[:, part], **weights, **state}
        got = evaluate(_paged(window, split), values)[0]
        torch.testing.assert_close(got, whole[:, part], rtol=0, atol=2e-6)
        state["kv_lens"].add_(split)
        rejected = min(min(behind), split - 1)
        state["kv_lens"].sub_(rejected)
        start += split - rejected


def test_calls_that_share_keys_and_values_share_pages() -> None:
    module, _ = tiny_graph(num_layers=2)
    first, second = calls(module, attention)
    second.args = (second.args[0], *first.args[1:3], *second.args[3:])
    module.graph.eliminate_dead_code()
    module.recompile()
    static = after(module, SpecializeShapes(batch_size=BATCH, q_len=3), FoldNoops())
    record = apply(static, PAGING)[0]
    assert record.count == 2
    assert record.details == ("1 attention calls share the K/V of another",)
    assert len(list(calls(static, append_kv))) == 1
    assert len(list(calls(static, paged_attention))) == 2
    assert {slot.name for slot in slots(static) if "pages." in slot.name} == {"k_pages.0", "v_pages.0"}


def test_a_padded_batch_does_not_touch_a_live_row(tiny: Any) -> None:
    """A row without pages writes to the scratch page only."""
    module = tiny.paged(3)
    state: dict[str, Tensor] = new_state(module)
    state["page_table"][0] = torch.arange(1, 1 + PAGES_PER_ROW)
    ids = torch.ones(BATCH, 3, dtype=torch.int64)
    evaluate(module, {"input_ids": ids, "position_ids": ids, **tiny.weights, **state})
    written = state["k_pages.0"].abs().sum((1, 2, 3)).nonzero()[:, 0].tolist()
    assert written == [0, 1]
