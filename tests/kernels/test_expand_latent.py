"""Keys and values expanded from latent pages: the Triton kernel against the reference, and attention over them against MLA."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.kernels.expand_latent import expand_latent, why_not_triton
from autospec.kernels.paged_attention import paged_attention
from autospec.kernels.paged_mla import paged_mla

FILE = "autospec.kernels.expand_latent"


def make_case(seed: int, *, heads: int = 3, rank: int = 12, rope: int = 4, dims: tuple[int, int] = (5, 6), page: int = 4,
              max_pages: int = 6, q_len: int = 7) -> list:  # fmt: skip
    """Ragged lengths, pages in a random order, weights that are cut out of one matrix."""
    g = torch.Generator().manual_seed(seed)
    nope, v_width = dims
    weight = torch.randn(heads, nope + v_width + 1, rank, generator=g)
    return [
        torch.randn(1 + 2 * max_pages, page, rank + rope, generator=g),
        (1 + torch.randperm(2 * max_pages, generator=g)).reshape(2, max_pages).int(),
        torch.randint(0, max(page * max_pages - q_len, 0) + 1, (2,), generator=g).int(),
        weight[:, :nope], weight[:, nope:-1], q_len,
    ]  # fmt: skip


def check(arguments: list, made: tuple[Tensor, ...], tolerance: float = 4e-6) -> None:
    """All rows that are attended to, and nothing but finite numbers in their pages."""
    pages, table, kv_lens, _, _, q_len = arguments
    expected = expand_latent(*(one.double() if one.is_floating_point() else one for one in arguments[:5]), q_len)
    assert torch.equal(made[2], expected[2])
    assert made[2].flatten().tolist() == list(range(table.numel()))
    page, capacity = pages.shape[1], table.shape[1] * pages.shape[1]
    for b in range(2):
        length = min(int(kv_lens[b]) + q_len, capacity)
        for one, exact in zip(made[:2], expected[:2], strict=True):
            rows, wanted = (x.unflatten(0, table.shape)[b].flatten(0, 1) for x in (one, exact))
            torch.testing.assert_close(rows[:length].double(), wanted[:length], rtol=tolerance, atol=tolerance)
            assert rows[: (length + page - 1) // page * page].isfinite().all()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), heads=st.sampled_from([1, 3]), rank=st.sampled_from([12, 40]), rope=st.sampled_from([4, 6]),
       dims=st.sampled_from([(5, 6), (16, 16), (24, 3)]), page=st.sampled_from([3, 4, 16, 64]), q_len=st.integers(1, 40))
def test_triton_equals_the_reference(interpreted, seed, heads, rank, rope, dims, page, q_len):
    arguments = make_case(seed, heads=heads, rank=rank, rope=rope, dims=dims, page=page, max_pages=3, q_len=q_len)
    check(arguments, interpreted(FILE, "expand_latent_triton", *arguments))


def test_padding_is_invisible_and_a_finished_row_stays_inside(interpreted):
    """NaN in slots past the length and on the scratch page; one request has run past its table."""
    arguments = make_case(3, q_len=5)
    arguments[2] = torch.tensor([22, 6]).int()
    poisoned = [arguments[0].clone(), *arguments[1:]]
    poisoned[0][0] = float("nan")
    for slot in range(11, 24):
        poisoned[0][arguments[1][1, slot // 4], slot % 4] = float("nan")
    check(arguments, interpreted(FILE, "expand_latent_triton", *poisoned))


def test_attention_over_it_is_latent_attention():
    """Chains and a mask of 7 nodes: cat(q_nope, q_rope) over expanded rows, q_nope w_uk over latents and w_uv behind."""
    arguments = make_case(4)
    pages, table, kv_lens, w_uk, w_uv, q_len = arguments
    g = torch.Generator().manual_seed(5)
    q_nope, q_rope = torch.randn(2, q_len, 3, 5, generator=g), torch.randn(2, q_len, 3, 4, generator=g)
    words = [0b1, 0b11, 0b101, 0b1011, 0b10101, 0b100101, 0b1001011]
    mask = torch.tensor(words, dtype=torch.int32).reshape(1, -1, 1).expand(2, -1, -1).contiguous()
    for tree_mask in (None, mask):
        mixed = paged_mla(torch.einsum("bnhd,hdr->bnhr", q_nope, w_uk), q_rope, pages, table, kv_lens, None, tree_mask, 0.3)
        expected = torch.einsum("bnhr,hvr->bnhv", mixed, w_uv)
        q = torch.cat([q_nope, q_rope], -1)
        out = paged_attention(q, *expand_latent(*arguments), kv_lens, None, tree_mask, None, 0.3)
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


def test_why_not_triton():
    arguments = expand_latent.bind(make_case(1), {})
    assert "cpu" in why_not_triton(arguments)
    assert "bfloat16" in why_not_triton({**arguments, "w_uk": arguments["w_uk"].bfloat16()})
    assert "float64" in why_not_triton({name: value.double() if isinstance(value, Tensor) else value
                                        for name, value in arguments.items()})  # fmt: skip
    assert "keys of 300" in why_not_triton({**arguments, "w_uk": torch.zeros(3, 300, 12)})
    assert "dense matrix" in why_not_triton({**arguments, "w_uv": arguments["w_uv"][..., ::2]})
    assert "contiguous" in why_not_triton({**arguments, "latent_pages": arguments["latent_pages"][:, ::2]})


@pytest.mark.cuda
@pytest.mark.parametrize("q_len", [200, 512])
def test_on_a_gpu(cuda, q_len):
    arguments = make_case(6, heads=16, rank=512, rope=64, dims=(128, 128), page=64, max_pages=12, q_len=q_len)
    half = [one.to(cuda, torch.bfloat16) if one.is_floating_point() else one.to(cuda) for one in arguments[:5]] + [q_len]
    exact = [one.cpu() if isinstance(one, Tensor) else one for one in half]
    made = torch.ops.autospec_triton.expand_latent(*half)
    largest = 512**0.5 * 4  # of sums of 512 products of normal numbers
    check(exact, [one.cpu() for one in made], 2.0**-8 * largest)
