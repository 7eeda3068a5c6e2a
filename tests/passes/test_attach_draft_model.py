"""attach-draft-model: the draft's chain is what the draft model says of the committed tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from harness.graphs import VOCAB, after, apply, check_golden, evaluate, new_state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from autospec.ir.slots import slots
from autospec.ir.text import graph_text
from autospec.passes.attach_draft_model import AttachDraftModel
from autospec.passes.gather_logits import GatherLogits
from autospec.passes.offset_draft_layers import WEIGHT_PREFIX, OffsetDraftLayers
from autospec.passes.verify_draft import CommitPrompt, VerifyDraft
from autospec.passes.widen_decode import FeedPrompt, WidenDecode
from autospec.state import StateShape

DRAFTS, CHUNK = 2, 3
OFFSET = OffsetDraftLayers(layer_idx_offset=1)


def _part(tiny: Any, q_len: int) -> fx.GraphModule:
    return after(tiny.paged(q_len, is_length_given=True), OFFSET)


def _attach(tiny: Any, sizes: StateShape, is_prefill: bool = False) -> AttachDraftModel:
    return AttachDraftModel(
        sizes=sizes, max_position=256, catch_up=after(_part(tiny, 2), GatherLogits(given_for=2)),
        expand={1: _part(tiny, 1)}, prefill=_part(tiny, CHUNK) if is_prefill else None,
    )  # fmt: skip


def _step(tiny: Any, sizes: StateShape) -> fx.GraphModule:
    widen = WidenDecode(batch_size=2, next_n=DRAFTS + 1, max_nodes=DRAFTS + 1, max_position=256)
    return after(tiny.paged(DRAFTS + 1), widen, VerifyDraft(sizes=sizes, draft_len=DRAFTS))


def _prefill(tiny: Any, sizes: StateShape) -> fx.GraphModule:
    feed = FeedPrompt(batch_size=2, q_len=CHUNK, token_room=sizes.token_room, max_position=256)
    return after(tiny.paged(CHUNK), feed, GatherLogits(), CommitPrompt(sizes=sizes))


def test_text(tiny: Any, sizes: StateShape) -> None:
    check_golden("attach_draft_model", graph_text(after(_step(tiny, sizes), _attach(tiny, sizes))))
    prefill = after(_prefill(tiny, sizes), _attach(tiny, sizes, is_prefill=True))
    check_golden("attach_draft_model.prefill", graph_text(prefill))


def test_it_says_how_many_passes_run(tiny: Any, sizes: StateShape) -> None:
    record = apply(_step(tiny, sizes), _attach(tiny, sizes))[0]
    assert record.details == ("chain of 2: a pass of 2 rows, then 1 by level",)


def test_a_draft_without_offset_is_refused(tiny: Any, sizes: StateShape) -> None:
    plain = replace(_attach(tiny, sizes), catch_up=tiny.paged(2, is_length_given=True))
    with pytest.raises(AssertionError, match=r"k_pages\.0 belongs to target and draft: run offset-draft-layers"):
        apply(_step(tiny, sizes), plain)


def test_again_is_refused(tiny: Any, sizes: StateShape) -> None:
    one = _attach(tiny, sizes)
    with pytest.raises(AssertionError, match="belongs to target and draft"):
        apply(_step(tiny, sizes), one, one)


@pytest.fixture(scope="module")
def graphs(tiny: Any, sizes: StateShape) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Prefill and step with the draft attached."""
    prefill = after(_prefill(tiny, sizes), _attach(tiny, sizes, is_prefill=True))
    return prefill, after(_step(tiny, sizes), _attach(tiny, sizes))


def _greedy(weights: dict[str, Tensor], captured: fx.GraphModule, ids: list[int]) -> int:
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
    return int(evaluate(captured, {**inputs, **weights})[0][0, -1].argmax())


@settings(max_examples=8)
@given(seed=st.integers(0, 999), lengths=st.lists(st.integers(1, 9), min_size=2, max_size=2), steps=st.integers(0, 4))
def test_the_chain_is_the_drafts_own(
    tiny: Any, graphs: tuple[fx.GraphModule, fx.GraphModule], seed: int, lengths: list[int], steps: int
) -> None:
    """Prefill in chunks, then steps: draft nodes are the draft's greedy continuation of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    draft_weights = {name: torch.randn(w.shape, generator=generator) for name, w in tiny.weights.items()}
    prefill, step = graphs
    state = {**new_state(prefill), **new_state(step)}
    state["finished"].zero_()
    state["tokens"].copy_(torch.randint(0, VOCAB, state["tokens"].shape, generator=generator))
    state["prompt_lens"].copy_(torch.tensor(lengths))
    state["limits"].fill_(30)
    state["page_table"].copy_(torch.arange(1, 17).reshape(2, 8))
    weights = {**tiny.weights, **{WEIGHT_PREFIX + name: tensor for name, tensor in draft_weights.items()}}
    assert {slot.name for slot in slots(step) if slot.kind == "weight"} == set(weights)
    for graph in [prefill] * 3 + [step] * steps:
        evaluate(graph, {**weights, **state})
    for row in range(2):
        ids = state["tokens"][row, : int(state["kv_lens"][row]) + 1].tolist()
        for node in range(DRAFTS):
            ids.append(_greedy(draft_weights, tiny.captured, ids))
            assert int(state["draft_tokens"][row, 1 + node]) == ids[-1]
            assert int(state["tree_parents"][row, 1 + node]) == node
