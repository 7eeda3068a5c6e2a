"""widen-decode and feed-prompt: the graph reads tokens and positions from the state, and means the same."""

from __future__ import annotations

from typing import Any

import torch
from harness.graphs import VOCAB, after, apply, check_golden, evaluate, new_state
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.ir.match import calls
from autospec.ir.roles import the
from autospec.ir.text import graph_text
from autospec.kernels.paged_attention import paged_attention
from autospec.passes.widen_decode import FeedPrompt, WidenDecode

BATCH, NEXT_N, NODES, ROOM, LAST = 2, 2, 4, 32, 20
WIDEN = WidenDecode(batch_size=BATCH, next_n=NEXT_N, max_nodes=NODES, max_position=LAST)
FEED = FeedPrompt(batch_size=BATCH, q_len=3, token_room=ROOM, max_position=LAST)


def test_text(tiny: Any) -> None:
    check_golden("widen_decode", graph_text(after(tiny.paged(NEXT_N), WIDEN)))
    check_golden("feed_prompt", graph_text(after(tiny.paged(3), FEED)))


def test_again_finds_nothing(tiny: Any) -> None:
    assert apply(after(tiny.paged(NEXT_N), WIDEN), WIDEN)[0].count == 0
    assert apply(after(tiny.paged(3), FEED), FEED)[0].count == 0


def _filled(module: Any, seed: int, kv_lens: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = new_state(module)
    for name, tensor in state.items():
        if "pages." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    state["page_table"].copy_(torch.arange(1, 17).reshape(BATCH, 8))
    state["kv_lens"].copy_(torch.tensor(kv_lens))
    return state


@settings(max_examples=10)
@given(kv_lens=st.lists(st.integers(0, LAST + 3), min_size=BATCH, max_size=BATCH), seed=st.integers(0, 100))
def test_a_step_reads_the_draft(tiny: Any, kv_lens: list[int], seed: int) -> None:
    paged = tiny.paged(NEXT_N)
    widened = after(paged, WIDEN)
    state = _filled(widened, seed, kv_lens)
    state["draft_tokens"].copy_(torch.randint(0, VOCAB, (BATCH, NODES), generator=torch.Generator().manual_seed(seed)))
    other = {name: tensor.clone() for name, tensor in state.items()}
    positions = (state["kv_lens"][:, None].long() + torch.arange(NEXT_N)).clamp(max=LAST - 1)
    given_inputs = {"input_ids": other["draft_tokens"][:, :NEXT_N], "position_ids": positions}
    expected = evaluate(paged, {**given_inputs, **other, **tiny.weights})[0]
    assert torch.equal(evaluate(widened, {**state, **tiny.weights})[0], expected)
    assert torch.equal(state["k_pages.0"], other["k_pages.0"])
    assert the(widened, "draft_tokens").meta["val"].shape == (BATCH, NEXT_N)


@settings(max_examples=10)
@given(lens=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=BATCH, max_size=BATCH))
def test_prefill_reads_the_next_chunk(tiny: Any, lens: list[tuple[int, int]]) -> None:
    """Tokens past the end of a prompt are padding; the valid rows mean what they meant before."""
    kv_lens, ahead = [a for a, _ in lens], [b for _, b in lens]
    paged = tiny.paged(3)
    fed = after(paged, FEED)
    state = _filled(fed, 3, kv_lens)
    state["tokens"].copy_(torch.randint(0, VOCAB, (BATCH, ROOM), generator=torch.Generator().manual_seed(9)))
    state["prompt_lens"].copy_(torch.tensor(kv_lens) + torch.tensor(ahead))
    other = {name: tensor.clone() for name, tensor in state.items()}
    slot = torch.tensor(kv_lens)[:, None] + torch.arange(3)
    inputs = {"input_ids": state["tokens"].gather(1, slot), "position_ids": slot.clamp(max=LAST - 1)}
    expected = evaluate(paged, {**inputs, **other, **tiny.weights})[0]
    got = evaluate(fed, {**state, **tiny.weights})[0]
    for row, count in enumerate(ahead):
        assert torch.equal(got[row, : min(count, 3)], expected[row, : min(count, 3)])
    attention = next(calls(fed, paged_attention))
    assert attention.kwargs["q_lens"] is the(fed, "q_lens")
