"""Attention over selected latent rows against dense attention in float64 under a mask, and the three DSA ops in a row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.kernels.dsa_indexer_logits import dsa_indexer_logits
from autospec.kernels.dsa_topk import dsa_topk
from autospec.kernels.paged_mla import Tile, paged_mla, random_case
from autospec.kernels.paged_sparse_mla import attend_indices, choose_tile, paged_sparse_mla, why_not_triton
from autospec.kernels.tree_tables import tree_tables

FILE = "autospec.kernels.paged_sparse_mla"
WHOLE, SPLIT = Tile(16, 16, 1, 4, 2), Tile(32, 16, 4, 4, 2)
PAGE, NUM_SLOTS = 4, 48


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of the op."""

    q_latent: Tensor
    q_rope: Tensor
    latent_pages: Tensor
    page_table: Tensor
    indices: Tensor
    scale: float = 0.3
    sinks: Tensor | None = None

    def arguments(self) -> list:
        return list(vars(self).values())


def make_case(seed, batch=2, q_len=3, *, heads=3, rank=12, rope=4, width=20, has_sinks=False) -> Case:
    """Random slots, some -1 anywhere among them; what nobody selected is NaN."""
    g = torch.Generator().manual_seed(seed)
    max_pages = NUM_SLOTS // PAGE
    indices = torch.rand(batch, q_len, NUM_SLOTS, generator=g).argsort(-1)[..., :width].int()
    counts = torch.randint(0, width + 1, (batch, q_len, 1), generator=g)
    indices[torch.rand(indices.shape, generator=g).argsort(-1) >= counts] = -1
    case = Case(
        q_latent=torch.randn(batch, q_len, heads, rank, generator=g), q_rope=torch.randn(batch, q_len, heads, rope, generator=g),
        latent_pages=torch.randn(1 + batch * max_pages, PAGE, rank + rope, generator=g),
        page_table=(1 + torch.randperm(batch * max_pages, generator=g)).reshape(batch, max_pages).int(), indices=indices,
        sinks=torch.randn(heads, generator=g) * 2 if has_sinks else None,
    )
    case.latent_pages[0] = float("nan")
    return case


def exact(case: Case) -> Tensor:
    """A softmax over all slots of the request in float64, the others masked."""
    rows = case.latent_pages[case.page_table.long()].flatten(1, 2).double()
    chosen = torch.zeros(*case.indices.shape[:2], NUM_SLOTS + 1, dtype=torch.bool)
    chosen.scatter_(2, torch.where(case.indices < 0, NUM_SLOTS, case.indices).long(), True)
    q = torch.cat([case.q_latent, case.q_rope], -1).double()
    scores = torch.einsum("bnhd,btd->bnht", q, rows) * case.scale
    scores = scores.masked_fill(~chosen[:, :, None, :NUM_SLOTS], float("-inf"))
    if case.sinks is not None:
        scores = torch.cat([scores, case.sinks.double()[:, None].expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., :NUM_SLOTS]
    return torch.einsum("bnht,btr->bnhr", weights, rows[..., : case.q_latent.shape[3]])


def check(case: Case, out: Tensor, tolerance: float = 4e-6) -> None:
    torch.testing.assert_close(out.double(), exact(case), rtol=tolerance, atol=tolerance)


sizes = st.fixed_dictionaries({
    "heads": st.sampled_from([1, 3, 8, 40]), "rank": st.sampled_from([12, 16, 32]), "rope": st.sampled_from([4, 8]),
    "width": st.integers(1, NUM_SLOTS), "has_sinks": st.booleans(),
})  # fmt: skip


@settings(max_examples=12, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 7), sizes=sizes, tile=st.sampled_from([WHOLE, SPLIT, None]))
def test_equals_masked_attention(interpreted, seed, q_len, sizes, tile):
    case = make_case(seed, 2, q_len, **sizes)
    check(case, paged_sparse_mla(*case.arguments()))
    if tile is None:
        check(case, interpreted(FILE, "paged_sparse_mla_triton", *case.arguments()))
    else:
        check(case, interpreted(FILE, "attend_indices", *case.arguments(), tile))


def all_of(interpreted, case):
    yield paged_sparse_mla(*case.arguments())
    for tile in (WHOLE, SPLIT):
        yield interpreted(FILE, "attend_indices", *case.arguments(), tile)


def test_rows_that_nobody_selected_are_not_read(interpreted):
    case = make_case(3)
    poisoned = replace(case, latent_pages=torch.full_like(case.latent_pages, float("nan")))
    for b in range(2):
        for slot in set(case.indices[b].flatten().tolist()) - {-1}:
            place = case.page_table[b, slot // PAGE], slot % PAGE
            poisoned.latent_pages[place] = case.latent_pages[place]
    for n in range(3):  # one node at a time: what its neighbours selected is its own business
        alone = replace(case, q_latent=case.q_latent[:, n : n + 1], q_rope=case.q_rope[:, n : n + 1],
                        indices=case.indices[:, n : n + 1])
        for tile in (WHOLE, SPLIT):
            part = replace(poisoned, q_latent=alone.q_latent, q_rope=alone.q_rope, indices=alone.indices)
            check(alone, interpreted(FILE, "attend_indices", *part.arguments(), tile))


@pytest.mark.parametrize("has_sinks", [False, True])
def test_a_row_without_slots_becomes_zero(interpreted, has_sinks):
    case = make_case(4, has_sinks=has_sinks)
    case.indices[0, 1] = -1
    for out in all_of(interpreted, case):
        assert not out[0, 1].any()
        check(case, out)


@pytest.mark.parametrize("is_tree", [False, True])
@pytest.mark.parametrize("index_topk", [6, 64])
def test_the_three_ops_in_a_row(random_parents, interpreted, is_tree, index_topk):
    """index_topk above the length: dense latent attention. Below: attention over the best, of those that a node sees."""
    g = torch.Generator().manual_seed(9)
    case = make_case(9, 2, 5)
    pages, table, kv_lens = case.latent_pages, case.page_table, torch.tensor([2, 40]).int()
    tree_mask = tree_tables(random_parents(g, 2, 5))[0] if is_tree else None
    index_q, weights = torch.randn(2, 5, 3, 8, generator=g), torch.randn(2, 5, 3, generator=g)
    index_pages = torch.randn(pages.shape[0], PAGE, 8, generator=g)
    logits = dsa_indexer_logits(index_q, weights, index_pages, table, kv_lens, None, 0.35, index_topk)
    case = replace(case, indices=dsa_topk(logits, kv_lens, index_topk, None, tree_mask))
    rope = case.q_rope
    if index_topk == 64:
        dense = paged_mla(case.q_latent, rope, pages.nan_to_num(), table, kv_lens, None, tree_mask, case.scale)
        for out in all_of(interpreted, case):
            torch.testing.assert_close(out, dense, rtol=4e-6, atol=4e-6)
    else:
        assert int((case.indices[1] >= 0).sum()) == 5 * index_topk
        for out in all_of(interpreted, case):
            check(case, out)


PLANTED = {
    "one slot later": lambda c: replace(c, indices=torch.where(c.indices < 0, -1, (c.indices + 1) % NUM_SLOTS)),
    "empty slots read slot 0": lambda c: replace(c, indices=c.indices.clamp(min=0)),
    "slots of another node": lambda c: replace(c, indices=c.indices.roll(1, 1)),
    "pages of another request": lambda c: replace(c, page_table=c.page_table.flip(0)),
    "rope forgotten": lambda c: replace(c, q_rope=torch.zeros_like(c.q_rope)),
    "sinks forgotten": lambda c: replace(c, sinks=None),
    "sinks of other heads": lambda c: replace(c, sinks=c.sinks.roll(1)),
    "a sink in every one of four splits": lambda c: replace(c, sinks=c.sinks + math.log(4.0)),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(interpreted, bug):
    case = make_case(5, has_sinks=True)
    for right, wrong in zip(all_of(interpreted, case), all_of(interpreted, PLANTED[bug](case)), strict=True):
        check(case, right)
        with pytest.raises(AssertionError):
            check(case, wrong)


def test_half_precision_rounds_probabilities_and_results_only(interpreted):
    case = make_case(6, heads=4, rank=16, has_sinks=True)
    half = Case(**{name: value.half() if isinstance(value, Tensor) and value.is_floating_point() else value
                   for name, value in vars(case).items()})  # fmt: skip
    check(half, interpreted(FILE, "attend_indices", *half.arguments(), SPLIT), 2.0**-9)


def test_why_not_triton():
    arguments = paged_sparse_mla.bind(make_case(1).arguments(), {})
    assert "cpu" in why_not_triton(arguments)
    assert "bfloat16" in why_not_triton({**arguments, "q_rope": arguments["q_rope"].bfloat16()})


def test_the_tile_follows_from_shapes():
    indices = torch.zeros(1, 1, 2048, dtype=torch.int32)
    tile = choose_tile(torch.zeros(1, 1, 128, 512).bfloat16(), indices)
    assert (tile.rows, tile.slots, tile.splits, tile.warps) == (64, 32, 2, 8)  # four multiprocessors where there is no GPU
    assert choose_tile(torch.zeros(4, 4, 128, 512).bfloat16(), indices.expand(4, 4, -1)).splits == 1


@pytest.mark.cuda
@pytest.mark.parametrize("q_len", [1, 4])
def test_on_a_gpu(cuda, q_len):
    floats, (page_table, *_, scale) = random_case(cuda, 2, q_len, 700, False)
    indices = torch.rand(2, q_len, 700, device=cuda).topk(300).indices.int()
    indices[1, :, 90:] = -1
    sinks = torch.linspace(-2, 2, 128, device=cuda) if q_len > 1 else None
    expected = paged_sparse_mla.reference(*(one.double() for one in floats), page_table, indices, scale, sinks)
    for splits in (0, 1, 8):
        tile = Tile(64, 64, splits, 8, 2) if splits else choose_tile(floats[0], indices)
        out = attend_indices(*floats, page_table, indices, scale, sinks, tile)
        assert float((out.double() - expected).abs().max() / expected.abs().max()) < 2.0**-7
