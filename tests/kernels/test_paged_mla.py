"""Attention in latent space against attention over expanded keys and values, and its Triton kernels against both."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.kernels.append_latent import append_latent
from autospec.kernels.latent_attention import latent_attention
from autospec.kernels.paged_attention import paged_attention
from autospec.kernels.paged_mla import (
    Tile,
    attend_latent_pages,
    choose_tile,
    paged_mla,
    random_case,
    why_not_cpu,
    why_not_triton,
)
from autospec.kernels.tree_tables import tree_tables

FILE, APPEND = "autospec.kernels.paged_mla", "autospec.kernels.append_latent"
WHOLE, SPLIT = Tile(16, 16, 1, 4, 2), Tile(32, 16, 4, 4, 2)
PAGE = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of the op; parents of its tree (None: a chain)."""

    q_latent: Tensor
    q_rope: Tensor
    latent_pages: Tensor
    page_table: Tensor
    kv_lens: Tensor
    q_lens: Tensor | None = None
    parents: Tensor | None = None
    scale: float = 0.3
    sinks: Tensor | None = None

    def arguments(self) -> list:
        tree_mask = None if self.parents is None else tree_tables(self.parents)[0]
        return [self.q_latent, self.q_rope, self.latent_pages, self.page_table, self.kv_lens, self.q_lens, tree_mask,
                self.scale, self.sinks]  # fmt: skip


def make_case(seed, parents, *, heads=3, rank=12, rope=4, max_len=40, **options) -> Case:
    """Ragged lengths, pages in a random order; parents is tree_parents [B, N], or (B, N) for chains."""
    g = torch.Generator().manual_seed(seed)
    batch, q_len = parents.shape if isinstance(parents, Tensor) else parents
    max_pages = (max_len + q_len + PAGE - 1) // PAGE + 1
    return Case(
        q_latent=torch.randn(batch, q_len, heads, rank, generator=g), q_rope=torch.randn(batch, q_len, heads, rope, generator=g),
        latent_pages=torch.randn(1 + batch * max_pages, PAGE, rank + rope, generator=g),
        page_table=(1 + torch.randperm(batch * max_pages, generator=g)).reshape(batch, max_pages).int(),
        kv_lens=torch.randint(0, max_len + 1, (batch,), generator=g).int(),
        parents=parents if isinstance(parents, Tensor) else None, **options,
    )


def exact(case: Case) -> Tensor:
    """Ordinary paged attention in float64: one K/V head whose values are the first elements of its keys."""
    q = torch.cat([case.q_latent, case.q_rope], -1).double()
    pages = case.latent_pages.double()[:, :, None]
    rest = case.arguments()[3:7]
    return paged_attention.reference(q, pages, pages[..., : case.q_latent.shape[3]], *rest, case.sinks, case.scale)


def check(case: Case, out: Tensor, tolerance: float = 4e-6) -> None:
    expected = exact(case)
    valid = torch.ones(expected.shape[:2], dtype=torch.bool)
    if case.q_lens is not None:
        valid = torch.arange(expected.shape[1])[None] < case.q_lens[:, None]
    assert out.shape == expected.shape
    torch.testing.assert_close(out.double()[valid], expected[valid], rtol=tolerance, atol=tolerance)


sizes = st.fixed_dictionaries({
    "heads": st.sampled_from([1, 3, 8, 20]), "rank": st.sampled_from([12, 16, 24, 32]), "rope": st.sampled_from([4, 8, 16]),
})  # fmt: skip


@settings(max_examples=16, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 40), is_tree=st.booleans(), has_sinks=st.booleans(), sizes=sizes,
       tile=st.sampled_from([WHOLE, SPLIT, None]))
def test_equals_attention_over_one_head(random_parents, interpreted, seed, q_len, is_tree, has_sinks, sizes, tile):
    parents = random_parents(torch.Generator().manual_seed(seed), 2, q_len) if is_tree else (2, q_len)
    case = make_case(seed, parents, **sizes, sinks=torch.randn(sizes["heads"]) * 2 if has_sinks else None)
    check(case, paged_mla(*case.arguments()))
    check(case, on_cpu(*case.arguments()))
    if tile is None:
        check(case, interpreted(FILE, "paged_mla_triton", *case.arguments()))
    else:
        check(case, interpreted(FILE, "attend_latent_pages", *case.arguments(), tile))


def on_cpu(*arguments):
    """The C++ implementation; it must have been compiled."""
    assert why_not_cpu(paged_mla.bind(arguments, {})) is None
    return torch.ops.autospec_cpu.paged_mla(*arguments)


def all_of(interpreted, case):
    """The reference, C++ for the CPU, and Triton with and without splits."""
    yield paged_mla(*case.arguments())
    yield on_cpu(*case.arguments())
    for tile in (WHOLE, SPLIT):
        yield interpreted(FILE, "attend_latent_pages", *case.arguments(), tile)


@pytest.mark.parametrize("write", ["reference", "triton"])
def test_absorbed_equals_expanded(interpreted, write):
    """Appended rows and absorbed queries give what latent_attention gives for the whole sequence, in two calls."""
    g = torch.Generator().manual_seed(3)
    heads, nope, rope, rank, v_width, length = 3, 5, 4, 12, 6, 11
    q_nope, q_rope = (torch.randn(2, heads, length, d, generator=g) for d in (nope, rope))
    fused = torch.randn(2, length, rank + rope + 1, generator=g)  # rows are not contiguous
    latent, k_rope = fused[..., :rank], fused[..., rank:-1]
    w_uk, w_uv = (torch.randn(heads, d, rank, generator=g) for d in (nope, v_width))
    whole = latent_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, 0.2)
    pages = torch.full((9, PAGE, rank + rope), float("nan"))
    pages[1:] = 0.0
    table = torch.tensor([[4, 2, 7, 5], [1, 8, 3, 6]], dtype=torch.int32)
    append = append_latent if write == "reference" else lambda *args: interpreted(APPEND, "append_latent_triton", *args)
    for part in (slice(0, 7), slice(7, 11)):
        kv_lens = torch.full((2,), part.start, dtype=torch.int32)
        append(latent[:, part], k_rope[:, part], pages, table, kv_lens)
        q = torch.einsum("bhnd,hdr->bnhr", q_nope[:, :, part], w_uk)
        mixed = paged_mla(q, q_rope[:, :, part].transpose(1, 2), pages, table, kv_lens, scale=0.2)
        out = torch.einsum("bnhr,hvr->bnhv", mixed, w_uv)
        torch.testing.assert_close(out, whole[:, part], rtol=2e-5, atol=2e-5)
    rows = pages[table.long()].flatten(1, 2)
    assert torch.equal(rows[:, :length], fused[..., :-1])
    assert not rows[:, length:].any(), "a slot that nobody named was written"


@pytest.mark.parametrize("write", ["reference", "triton"])
def test_slots_past_the_table_land_on_the_scratch_page(interpreted, write):
    append = append_latent if write == "reference" else lambda *args: interpreted(APPEND, "append_latent_triton", *args)
    pages = torch.zeros(3, PAGE, 6)
    append(torch.ones(1, 3, 4), torch.ones(1, 3, 2), pages, torch.tensor([[2, 1]]).int(), torch.tensor([7]).int())
    assert pages[0].any()
    assert pages[1:].sum() == 6  # slot 7 only


@pytest.mark.parametrize(("q_len", "kv_len"), [(33, 0), (65, 9), (40, 24)])
def test_masks_of_more_than_one_word(random_parents, interpreted, q_len, kv_len):
    parents = random_parents(torch.Generator().manual_seed(q_len), 1, q_len)
    parents[0, 25:] = torch.arange(24, q_len - 1)
    case = replace(make_case(1, parents), kv_lens=torch.tensor([kv_len]).int())
    for out in all_of(interpreted, case):
        check(case, out)


def test_the_last_nodes_of_a_tree_equal_its_last_rows(random_parents, interpreted):
    whole = make_case(5, random_parents(torch.Generator().manual_seed(5), 2, 21))
    late = [whole.q_latent[:, 13:], whole.q_rope[:, 13:], *whole.arguments()[2:]]
    outs = [paged_mla(*late), on_cpu(*late), *(interpreted(FILE, "attend_latent_pages", *late, tile) for tile in (WHOLE, SPLIT))]
    for out, rows in zip(all_of(interpreted, whole), outs, strict=True):
        torch.testing.assert_close(rows, out[:, 13:], rtol=4e-6, atol=4e-6)


def test_padding_is_invisible(interpreted):
    """Rows past q_lens and slots past the length change nothing, whatever they hold: NaN."""
    case = make_case(8, (3, 9), q_lens=torch.tensor([9, 4, 0]).int())
    poisoned = replace(case, latent_pages=case.latent_pages.clone(), q_latent=case.q_latent.clone())
    for b in range(3):
        for slot in range(int(case.kv_lens[b] + case.q_lens[b]), case.page_table.shape[1] * PAGE):
            poisoned.latent_pages[case.page_table[b, slot // PAGE], slot % PAGE] = float("nan")
        poisoned.q_latent[b, int(case.q_lens[b]) :] = float("nan")
    poisoned.latent_pages[0] = float("nan")
    check(case, on_cpu(*poisoned.arguments()))
    check(case, paged_mla(*poisoned.arguments()))
    for tile in (WHOLE, SPLIT):
        check(case, interpreted(FILE, "attend_latent_pages", *poisoned.arguments(), tile))


SINKS = torch.tensor([-1.0, 0.5, 2.0])
PLANTED = {
    "sinks are ignored": None,
    "sinks of other heads": SINKS.roll(1),
    "a sink in every one of four splits": SINKS + math.log(4.0),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_of_sinks_are_caught(random_parents, interpreted, bug):
    case = make_case(10, random_parents(torch.Generator().manual_seed(10), 2, 5), sinks=SINKS)
    for right, wrong in zip(all_of(interpreted, case), all_of(interpreted, replace(case, sinks=PLANTED[bug])), strict=True):
        check(case, right)
        with pytest.raises(AssertionError):
            check(case, wrong)


def test_a_sink_far_above_or_below_all_scores_takes_everything_or_nothing(interpreted):
    case = make_case(11, (2, 4), sinks=torch.tensor([1e4, -1e4, -float("inf")]))
    plain = exact(replace(case, sinks=None))
    for out in all_of(interpreted, case):
        assert not out[:, :, 0].any()
        torch.testing.assert_close(out[:, :, 1:].double(), plain[:, :, 1:], rtol=4e-6, atol=4e-6)


def test_half_precision_rounds_probabilities_and_results_only(interpreted):
    case = make_case(9, (2, 6), heads=4, rank=16, sinks=torch.linspace(-1, 2, 4))
    half = Case(**{name: value.half() if isinstance(value, Tensor) and value.is_floating_point() else value
                   for name, value in vars(case).items()})  # fmt: skip
    check(half, interpreted(FILE, "attend_latent_pages", *half.arguments(), SPLIT), 2.0**-9)


def test_why_not_triton():
    arguments = paged_mla.bind(make_case(1, (1, 2)).arguments(), {})
    assert "cpu" in why_not_triton(arguments)
    assert "float64" in why_not_triton({name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
                                        for name, value in arguments.items()})  # fmt: skip
    assert "bfloat16" in why_not_triton({**arguments, "q_rope": arguments["q_rope"].bfloat16()})
    assert "1024" in why_not_triton({**arguments, "q_latent": torch.zeros(1, 1, 2, 1024)})
    assert "contiguous" in why_not_triton({**arguments, "latent_pages": arguments["latent_pages"][:, ::2]})


def test_the_tile_follows_from_shapes():
    pages, table = torch.zeros(9, 64, 576).bfloat16(), torch.zeros(1, 64, dtype=torch.int32)
    tile = choose_tile(torch.zeros(1, 1, 128, 512).bfloat16(), pages, table)
    assert (tile.rows, tile.slots, tile.warps) == (64, 64, 8)
    assert tile.splits == 2  # four multiprocessors where there is no GPU
    assert choose_tile(torch.zeros(4, 4, 128, 512).bfloat16(), pages, table).splits == 1
    assert choose_tile(torch.zeros(1, 1, 128, 512), pages.float(), table).rows == 16


@pytest.mark.cuda
@pytest.mark.parametrize(("batch", "q_len", "is_tree"), [(1, 1, False), (3, 4, False), (2, 32, True), (1, 70, True)])
def test_on_a_gpu(cuda, batch, q_len, is_tree):
    floats, rest = random_case(cuda, batch, q_len, 700, is_tree)
    sinks = torch.linspace(-2, 2, 128, device=cuda) if q_len > 1 else None
    expected = paged_mla.reference(*(one.double() for one in floats), *rest, sinks)
    for splits in (0, 1, 8):
        tile = Tile(64, 64, splits, 8, 2) if splits else choose_tile(floats[0], floats[2], rest[0])
        out = attend_latent_pages(*floats, *rest, sinks, tile)
        assert float((out.double() - expected).abs().max() / expected.abs().max()) < 2.0**-7
