"""offset-draft-layers: names change, nothing that computes does."""

from __future__ import annotations

from typing import Any

import torch
from harness.graphs import VOCAB, after, apply, check_golden, evaluate, new_state
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.ir.slots import slots
from autospec.ir.text import graph_text
from autospec.passes.offset_draft_layers import WEIGHT_PREFIX, OffsetDraftLayers


def test_text(tiny: Any) -> None:
    check_golden(
        "offset_draft_layers", graph_text(after(tiny.paged(2), OffsetDraftLayers(layer_idx_offset=7)), weights=True)
    )


def test_names(tiny: Any) -> None:
    renamed = {slot.name for slot in slots(after(tiny.paged(2), OffsetDraftLayers(layer_idx_offset=7)))}
    assert {"k_pages.7", "v_pages.7", "kv_lens", "page_table", "draft.lm_head.weight"} <= renamed
    assert not renamed & {"k_pages.0", "lm_head.weight"}


def test_again_finds_nothing(tiny: Any) -> None:
    one = OffsetDraftLayers(layer_idx_offset=7)
    assert [record.count for record in apply(after(tiny.paged(2)), one, one)] == [9, 0]


@settings(max_examples=10)
@given(offset=st.integers(0, 99), seed=st.integers(0, 1000))
def test_meaning(tiny: Any, offset: int, seed: int) -> None:
    module = tiny.paged(2)
    one = OffsetDraftLayers(layer_idx_offset=offset)
    ids = torch.randint(0, VOCAB, (2, 2), generator=torch.Generator().manual_seed(seed))
    values = {"input_ids": ids, "position_ids": ids, **tiny.weights, **new_state(module)}
    moved = {
        (one.renamed(slot) if slot.kind != "input" else slot.name): values[slot.name].clone() for slot in slots(module)
    }
    got = evaluate(after(module, one), moved)[0]
    assert torch.equal(got, evaluate(module, values)[0])
    assert torch.equal(moved[f"k_pages.{offset}"], values["k_pages.0"])
    assert WEIGHT_PREFIX == "draft."
