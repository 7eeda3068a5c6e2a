"""page-latent-cache: any split into prefill and decode equals stateless attention; a row is a latent and a rope part."""

from __future__ import annotations

import functools

import pytest
import torch
from harness.graphs import VOCAB, after, apply, check_golden, evaluate, new_state
from harness.latents import Dims, latent_graph, written
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from autospec.ir.match import calls
from autospec.ir.slots import slots
from autospec.ir.text import graph_text
from autospec.kernels.append_latent import append_latent
from autospec.kernels.attention import attention
from autospec.kernels.compact_kv import compact_kv
from autospec.kernels.expand_latent import expand_latent
from autospec.kernels.latent_attention import latent_attention
from autospec.kernels.paged_mla import paged_mla
from autospec.passes.fold_noops import FoldNoops
from autospec.passes.mask_tree import MaskTree
from autospec.passes.offset_draft_layers import OffsetDraftLayers
from autospec.passes.page_kv_cache import PageKvCache
from autospec.passes.page_latent_cache import PageLatentCache
from autospec.passes.recognize_mla import RecognizeMla
from autospec.passes.specialize_shapes import SpecializeShapes

BATCH, PAGE, PAGES_PER_ROW = 2, 4, 8
SIZES = {"page_size": PAGE, "num_pages": 1 + BATCH * PAGES_PER_ROW, "pages_per_row": PAGES_PER_ROW}
PAGING = PageLatentCache(**SIZES)
OF_A_PROMPT = PageLatentCache(**SIZES, reads_prompt=True)


@functools.cache
def captured(num_layers: int = 2, has_sinks: bool = False) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    options = {"sinks": torch.tensor([-1.0, 0.5, 2.0])} if has_sinks else None
    graph, weights = latent_graph(written, options=options, num_layers=num_layers)
    apply(graph, RecognizeMla())
    return graph, weights


@functools.cache
def paged(
    q_len: int, num_layers: int = 2, paging: PageLatentCache = OF_A_PROMPT, has_sinks: bool = False
) -> fx.GraphModule:
    static = SpecializeShapes(batch_size=BATCH, q_len=q_len)
    return after(captured(num_layers, has_sinks)[0], static, FoldNoops(), paging)


def test_text() -> None:
    check_golden("page_latent_cache", graph_text(paged(3, 1)))


def test_text_of_many_tokens() -> None:
    check_golden("page_latent_cache_expanded", graph_text(paged(11, 1)))


@pytest.mark.parametrize("q_len", [3, 11])
def test_again_finds_nothing(q_len: int) -> None:
    assert apply(paged(q_len), PAGING, PageKvCache(**SIZES))[0].count == 0
    assert not [slot for slot in slots(paged(q_len)) if slot.name.startswith(("k_pages", "v_pages"))]


def multiplications(q_len: int, slots: int, is_expanded: bool) -> int:
    """Of one head of the toy whose `q_len` query tokens attend to `slots` rows each, the projections included."""
    dims = Dims()
    rank, rope, nope, v_width = dims.kv_lora_rank, dims.qk_rope_head_dim, dims.qk_nope_head_dim, dims.v_head_dim
    if is_expanded:
        return slots * rank * (nope + v_width) + q_len * slots * (nope + rope + v_width)
    return q_len * rank * (nope + v_width) + q_len * slots * (2 * rank + rope)


def test_the_form_that_multiplies_less_is_taken() -> None:
    """With many rows committed; the toy's sizes cross over between 10 and 11 tokens."""
    many = 10**6
    for q_len in (1, 9, 10, 11, 12, 40):
        static = after(captured(1)[0], SpecializeShapes(batch_size=BATCH, q_len=q_len), FoldNoops())
        (record,) = apply(static, OF_A_PROMPT)
        is_expanded = any(calls(static, expand_latent))
        assert is_expanded != any(calls(static, paged_mla))
        assert is_expanded == (multiplications(q_len, many, True) < multiplications(q_len, many, False))
        few = f"attends in latent space: {q_len} tokens a call are too few to expand for"
        assert record.details == (f"{'expands keys and values first' if is_expanded else few} x 1",)


def test_a_step_attends_to_latents() -> None:
    assert not any(calls(paged(40, 1, PAGING), expand_latent))


def test_what_would_take_too_much_memory_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autospec.passes.page_latent_cache.MOST_EXPANDED", BATCH * 32 * 3 * 11 * 4 - 1)
    static = after(captured(1)[0], SpecializeShapes(batch_size=BATCH, q_len=20), FoldNoops())
    (record,) = apply(static, OF_A_PROMPT)
    assert record.details == ("attends in latent space: expanded rows would take 0.0 GiB x 1",)
    assert not any(calls(static, expand_latent))


def test_symbolic_shapes_are_refused() -> None:
    with pytest.raises(AssertionError, match="page-latent-cache requires: shapes must be static"):
        after(captured()[0], PAGING)


def test_a_row_is_latent_and_rope_whatever_the_heads() -> None:
    pages = {slot.name: slot for slot in slots(paged(3)) if "pages." in slot.name}
    dims = Dims()
    width = dims.kv_lora_rank + dims.qk_rope_head_dim
    assert {name: slot.shape for name, slot in pages.items()} == {
        f"latent_pages.{layer}": (SIZES["num_pages"], PAGE, width) for layer in (0, 1)
    }
    moved = after(paged(3), OffsetDraftLayers(layer_idx_offset=5))
    assert {slot.name for slot in slots(moved) if "pages." in slot.name} == {"latent_pages.5", "latent_pages.6"}


def state_of(module: fx.GraphModule, generator: torch.Generator) -> dict[str, Tensor]:
    """Pages lie anywhere and hold what earlier requests left."""
    state = new_state(module)
    order = torch.randperm(BATCH * PAGES_PER_ROW, generator=generator).to(torch.int32) + 1
    state["page_table"].copy_(order.reshape(BATCH, PAGES_PER_ROW))
    for name, tensor in state.items():
        if "pages." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return state


@settings(max_examples=20)
@given(
    splits=st.lists(st.integers(1, 13), min_size=1, max_size=6), seed=st.integers(0, 1000), behind=st.integers(0, 3),
    has_sinks=st.booleans(),
)
def test_any_split_equals_the_whole(splits: list[int], seed: int, behind: int, has_sinks: bool) -> None:
    """What a wider call wrote past the end does no harm; 11 tokens and more are attended to expanded."""
    graph, weights = captured(2, has_sinks)
    generator = torch.Generator().manual_seed(seed)
    if sum(splits) > PAGE * PAGES_PER_ROW - 9:
        splits = [13, 6]
    length = sum(splits)
    ids = torch.randint(0, VOCAB, (BATCH, length), generator=generator)
    positions = torch.arange(length).expand(BATCH, -1).contiguous()
    whole = evaluate(graph, {"input_ids": ids, "position_ids": positions, **weights})[0]
    state = state_of(paged(1), generator)
    start = 0
    for split in splits:
        part = slice(start, start + split)
        values = {"input_ids": ids[:, part], "position_ids": positions[:, part], **weights, **state}
        got = evaluate(paged(split, has_sinks=has_sinks), values)[0]
        torch.testing.assert_close(got, whole[:, part], rtol=0, atol=3e-6)
        rejected = min(behind, split - 1)
        state["kv_lens"].add_(split - rejected)
        start += split - rejected


def test_a_path_through_a_tree_equals_its_chain() -> None:
    """Two siblings with a child each; the second branch is accepted, compacted, and decoded on."""
    graph, weights = captured()
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, VOCAB, (BATCH, 7), generator=generator)
    positions = torch.arange(7).expand(BATCH, -1).contiguous()
    whole = evaluate(graph, {"input_ids": ids, "position_ids": positions, **weights})[0]
    tree = after(paged(5), MaskTree(batch_size=BATCH, num_nodes=5, is_mask_given=True))
    state = state_of(paged(1), generator)
    start = {"input_ids": ids[:, :3], "position_ids": positions[:, :3], **weights, **state}
    evaluate(paged(3), start)
    state["kv_lens"].fill_(3)
    wrong = (ids[:, 4:6] + 1) % VOCAB
    nodes = torch.cat([ids[:, 3:4], wrong[:, :1], ids[:, 4:5], wrong[:, 1:], ids[:, 5:6]], 1)  # 0 -> 1 -> 3, 0 -> 2 -> 4
    mask = torch.tensor([0b1, 0b11, 0b101, 0b1011, 0b10101], dtype=torch.int32)[None, :, None].expand(BATCH, -1, -1).contiguous()
    depth = torch.tensor([3, 4, 4, 5, 5]).expand(BATCH, -1).contiguous()
    lens = {"append_lens": state["kv_lens"].clone(), "tree_mask": mask}
    got = evaluate(tree, {"input_ids": nodes, "position_ids": depth, **lens, **weights, **state})[0]
    torch.testing.assert_close(got[:, [0, 2, 4]], whole[:, 3:6], rtol=0, atol=3e-6)
    path = torch.tensor([[0, 2, 4]], dtype=torch.int32).expand(BATCH, -1).contiguous()
    pages = [state[f"latent_pages.{layer}"] for layer in (0, 1)]
    compact_kv(pages, state["page_table"], state["kv_lens"], path, torch.full((BATCH,), 2, dtype=torch.int32))
    state["kv_lens"].fill_(6)
    last = evaluate(paged(1), {"input_ids": ids[:, 6:], "position_ids": positions[:, 6:], **weights, **state})[0]
    torch.testing.assert_close(last, whole[:, 6:], rtol=0, atol=3e-6)


def test_calls_that_share_a_latent_share_pages() -> None:
    graph, _ = latent_graph(written, num_layers=2)
    apply(graph, RecognizeMla())
    first, second = calls(graph, latent_attention)
    second.args = (*second.args[:2], *first.args[2:4], *second.args[4:])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    static = after(graph, SpecializeShapes(batch_size=BATCH, q_len=3), FoldNoops())
    record = apply(static, PAGING)[0]
    assert (record.count, record.details) == (2, ("1 attention calls share the latent of another",))
    assert (len(list(calls(static, append_latent))), len(list(calls(static, paged_mla)))) == (1, 2)
    assert {slot.name for slot in slots(static) if "pages." in slot.name} == {"latent_pages.0"}


def test_layers_that_keep_keys_and_values_are_numbered_behind() -> None:
    graph, _ = latent_graph(written, num_layers=2)
    first, _ = calls(graph, attention)
    first.kwargs = {**first.kwargs, "window": 3}
    assert apply(graph, RecognizeMla())[0].count == 1
    static = after(graph, SpecializeShapes(batch_size=BATCH, q_len=3), FoldNoops(), PAGING, PageKvCache(**SIZES))
    assert {slot.name for slot in slots(static) if "pages." in slot.name} == {"latent_pages.0", "k_pages.1", "v_pages.1"}
