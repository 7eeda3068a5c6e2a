"""page-index-cache: selecting from pages equals selecting from the whole text, however it is split, and along a tree."""

from __future__ import annotations

import pytest
import torch
from harness.graphs import VOCAB, after, apply, check_golden, evaluate, renamed
from harness.indexers import BATCH, PAGE, PAGES_PER_ROW, SIZES, captured, indexers, paged, state_of, static, written
from harness.latents import concatenated, latent_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from autospec.ir.match import argument, calls
from autospec.ir.slots import slots
from autospec.ir.text import graph_text
from autospec.kernels.append_index_keys import append_index_keys
from autospec.kernels.append_latent import append_latent
from autospec.kernels.compact_kv import compact_kv
from autospec.kernels.dsa_indexer_logits import dsa_indexer_logits
from autospec.kernels.dsa_topk import dsa_topk
from autospec.kernels.paged_mla import paged_mla
from autospec.kernels.paged_sparse_mla import paged_sparse_mla
from autospec.passes.fold_noops import FoldNoops
from autospec.passes.mask_tree import MaskTree
from autospec.passes.offset_draft_layers import OffsetDraftLayers
from autospec.passes.page_index_cache import PageIndexCache
from autospec.passes.page_kv_cache import PageKvCache
from autospec.passes.page_latent_cache import PageLatentCache
from autospec.passes.specialize_shapes import SpecializeShapes
from autospec.passes.widen_decode import FeedPrompt


def test_text() -> None:
    check_golden("page_index_cache", graph_text(after(static(3, True), PageIndexCache(**SIZES))))


def in_float8(q_len: int, *which: bool) -> fx.GraphModule:
    return after(static(q_len, *which), PageIndexCache(**SIZES, quantization="fp8"), PageLatentCache(**SIZES))


def test_text_in_float8() -> None:
    """What concerns index keys; the rest is that of the text above."""
    graph = after(static(3, True), PageIndexCache(**SIZES, quantization="fp8"))
    lines = [line for line in renamed(graph_text(graph)).splitlines(keepends=True) if "index_" in line]
    check_golden("page_index_cache.float8", "".join(lines))


def test_float8_keys_take_scales_along() -> None:
    """Shared selections, a draft's place, a tree's level and a second run."""
    graph = in_float8(3, True, False, True)
    assert apply(graph, PageIndexCache(**SIZES, quantization="fp8"))[0].count == 0
    kept = {slot.name: (slot.shape, slot.dtype) for slot in slots(graph) if slot.name.startswith("index_")}
    rows = SIZES["num_pages"], PAGE
    assert kept == {**{f"index_pages.{n}": ((*rows, 6), torch.float8_e4m3fn) for n in (0, 1)},
                    **{f"index_scale_pages.{n}": (rows, torch.float32) for n in (0, 1)}}  # fmt: skip
    moved = after(graph, OffsetDraftLayers(layer_idx_offset=7))
    assert {slot.name for slot in slots(moved) if slot.name.startswith("index_")} == {
        f"index_{kind}.{n}" for kind in ("pages", "scale_pages") for n in (7, 8)
    }
    level = after(graph, MaskTree(batch_size=BATCH, num_nodes=3, is_mask_given=True))
    for node in calls(level, (append_index_keys, append_latent, dsa_indexer_logits)):
        assert node.args[-1].name == "append_lens"


def test_again_finds_nothing() -> None:
    assert apply(paged(3), PageIndexCache(**SIZES), PageLatentCache(**SIZES), PageKvCache(**SIZES))[0].count == 0
    assert len(list(calls(paged(3), paged_sparse_mla))) == 2
    assert not list(calls(paged(3), paged_mla))


def test_what_was_not_recognised_is_not_paged() -> None:
    graph, _ = latent_graph(concatenated, indexers=indexers(written, True))
    before = after(graph, SpecializeShapes(batch_size=BATCH, q_len=3), FoldNoops())
    with pytest.raises(AssertionError, match="selects by scores of unknown origin"):
        after(before, PageIndexCache(**SIZES))
    with pytest.raises(AssertionError, match="attends to selected keys, which only latents are paged for"):
        after(before, PageKvCache(**SIZES))
    with pytest.raises(AssertionError, match="selects positions, not slots: run page-index-cache first"):
        after(static(3, True), PageLatentCache(**SIZES))


def test_a_shared_selection_has_one_cache_and_is_made_once() -> None:
    graph = paged(3, True, False, True)
    pages = {slot.name: slot.shape for slot in slots(graph) if "index_pages" in slot.name}
    assert pages == {f"index_pages.{number}": (SIZES["num_pages"], PAGE, 6) for number in (0, 1)}
    first, second = calls(graph, dsa_topk)
    assert [argument(node, "indices") for node in calls(graph, paged_sparse_mla)] == [first, first, second]
    assert len(list(calls(graph, append_latent))) == 5
    moved = after(graph, OffsetDraftLayers(layer_idx_offset=7))
    assert {slot.name for slot in slots(moved) if "index_pages" in slot.name} == {"index_pages.7", "index_pages.8"}


def test_a_chunk_of_the_prompt_knows_its_length() -> None:
    graph = after(paged(5), FeedPrompt(batch_size=BATCH, q_len=5, token_room=32, max_position=32))
    for node in calls(graph, (dsa_indexer_logits, dsa_topk)):
        assert argument(node, "q_lens").meta["role"] == "q_lens"


def whole_text(length: int, generator: torch.Generator, *which: bool) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(0, VOCAB, (BATCH, length), generator=generator)
    positions = torch.arange(length).expand(BATCH, -1).contiguous()
    graph, weights = captured(*which)
    return ids, positions, evaluate(graph, {"input_ids": ids, "position_ids": positions, **weights})[0]


@settings(max_examples=20)
@given(
    splits=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 1000), behind=st.integers(0, 3),
    which=st.sampled_from([(True, True), (True, False)]),
)  # fmt: skip
def test_any_split_equals_the_whole(splits: list[int], seed: int, behind: int, which: tuple[bool, ...]) -> None:
    """Index keys that a wider call wrote past the end do no harm."""
    generator = torch.Generator().manual_seed(seed)
    if sum(splits) > PAGE * PAGES_PER_ROW - 9:
        splits = [9]
    ids, positions, whole = whole_text(sum(splits), generator, *which)
    state = state_of(paged(1, *which), generator)
    start = 0
    for split in splits:
        part = slice(start, start + split)
        values = {"input_ids": ids[:, part], "position_ids": positions[:, part], **captured(*which)[1], **state}
        got = evaluate(paged(split, *which), values)[0]
        torch.testing.assert_close(got, whole[:, part], rtol=0, atol=3e-6)
        rejected = min(behind, split - 1)
        state["kv_lens"].add_(split - rejected)
        start += split - rejected


def branches(skip: tuple[str, ...] = ()) -> Tensor:
    """Largest error along the accepted one of two branches, and of the token after it; `skip`: pages not compacted."""
    weights = captured(True, True)[1]
    generator = torch.Generator().manual_seed(4)
    ids, positions, whole = whole_text(9, generator, True, True)
    tree = after(paged(5), MaskTree(batch_size=BATCH, num_nodes=5, is_mask_given=True))
    state = state_of(paged(1), generator)
    evaluate(paged(5), {"input_ids": ids[:, :5], "position_ids": positions[:, :5], **weights, **state})
    state["kv_lens"].fill_(5)
    wrong = (ids[:, 6:8] + 1) % VOCAB
    nodes = torch.cat([ids[:, 5:6], wrong[:, :1], ids[:, 6:7], wrong[:, 1:], ids[:, 7:8]], 1)  # 0 -> 1 -> 3, 0 -> 2 -> 4
    mask = torch.tensor([0b1, 0b11, 0b101, 0b1011, 0b10101], dtype=torch.int32)[None, :, None].expand(BATCH, -1, -1).contiguous()
    depth = torch.tensor([5, 6, 6, 7, 7]).expand(BATCH, -1).contiguous()
    lens = {"append_lens": state["kv_lens"].clone(), "tree_mask": mask}
    got = evaluate(tree, {"input_ids": nodes, "position_ids": depth, **lens, **weights, **state})[0]
    path = torch.tensor([[0, 2, 4]], dtype=torch.int32).expand(BATCH, -1).contiguous()
    pages = [value for name, value in state.items() if "pages." in name and not name.startswith(skip or ("-",))]
    compact_kv(pages, state["page_table"], state["kv_lens"], path, torch.full((BATCH,), 2, dtype=torch.int32))
    state["kv_lens"].fill_(8)
    last = evaluate(paged(1), {"input_ids": ids[:, 8:], "position_ids": positions[:, 8:], **weights, **state})[0]
    return (torch.cat([got[:, [0, 2, 4]], last], 1) - whole[:, 5:9]).abs().amax((0, 2))


def test_a_path_through_a_tree_equals_its_chain() -> None:
    """Two siblings with a child each; the second branch is accepted, compacted, and decoded on."""
    assert float(branches().max()) < 3e-6


def test_stale_index_keys_are_noticed() -> None:
    """Planted: compaction moves latents only."""
    errors = branches(("index_pages",))
    assert float(errors[:3].max()) < 3e-6
    assert float(errors[3]) > 1e-3
