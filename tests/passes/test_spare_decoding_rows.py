"""spare-decoding-rows: rows that read no prompt keep their pages; the others mean what they meant before."""

from __future__ import annotations

from typing import Any

import torch
from harness.graphs import VOCAB, after, apply, check_golden, evaluate, new_state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from autospec.ir.match import calls
from autospec.ir.text import graph_text
from autospec.kernels.append_kv import append_kv
from autospec.kernels.paged_attention import paged_attention
from autospec.passes.spare_decoding_rows import SpareDecodingRows
from autospec.passes.widen_decode import FeedPrompt

SPARE = SpareDecodingRows()
CHUNK, ROOM = 3, 32


def _fed(tiny: Any) -> fx.GraphModule:
    return after(tiny.paged(CHUNK), FeedPrompt(batch_size=2, q_len=CHUNK, token_room=ROOM, max_position=256))


def test_text(tiny: Any) -> None:
    check_golden("spare_decoding_rows", graph_text(after(_fed(tiny), SPARE)))


def test_again_finds_nothing(tiny: Any) -> None:
    module = _fed(tiny)
    users = sum(1 for op in (append_kv, paged_attention) for _ in calls(module, op))
    assert [record.count for record in apply(module, SPARE, SPARE)] == [users, 0]


@settings(max_examples=12)
@given(lens=st.lists(st.tuples(st.integers(0, 12), st.integers(-3, 6)), min_size=2, max_size=2), seed=st.integers(0, 99))
def test_meaning(tiny: Any, lens: list[tuple[int, int]], seed: int) -> None:
    """A row with prompt left computes and writes as before; one without leaves its pages alone."""
    fed = _fed(tiny)
    spared = after(fed, SPARE)
    generator = torch.Generator().manual_seed(seed)
    state = new_state(fed)
    for name, tensor in state.items():
        if "pages." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    state["page_table"].copy_(torch.arange(1, 17).reshape(2, 8))
    state["tokens"].copy_(torch.randint(0, VOCAB, (2, ROOM), generator=generator))
    state["kv_lens"].copy_(torch.tensor([known for known, _ in lens]))
    state["prompt_lens"].copy_(torch.tensor([known + ahead for known, ahead in lens]))
    before = {name: tensor.clone() for name, tensor in state.items()}
    other = {name: tensor.clone() for name, tensor in state.items()}
    expected = evaluate(fed, {**other, **tiny.weights})[0]
    got = evaluate(spared, {**state, **tiny.weights})[0]
    for row, (_, ahead) in enumerate(lens):
        pages = before["page_table"][row].long()
        wanted = other if ahead > 0 else before
        assert torch.equal(state["k_pages.0"][pages], wanted["k_pages.0"][pages])
        assert torch.equal(state["v_pages.0"][pages], wanted["v_pages.0"][pages])
        if ahead > 0:
            assert torch.equal(got[row], expected[row])
    assert torch.equal(state["page_table"], before["page_table"])
