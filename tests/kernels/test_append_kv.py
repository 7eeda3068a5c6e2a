"""Appending rows: every slot of every request is compared, those nobody names too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.kernels.append_kv import append_kv

FILE = "autospec.kernels.append_kv"
PAGE, HEADS = 4, 3


def paged(generator, batch, max_pages, *dims):
    """Page buffers of the given head dims and a page table that is a permutation; physical page 0 is scratch."""
    table = (1 + torch.randperm(batch * max_pages, generator=generator)).reshape(batch, max_pages).int()
    return [torch.randn(1 + batch * max_pages, PAGE, HEADS, d, generator=generator) for d in dims], table


def rows(pages, table):
    """What each request sees: [B, slots, ...]."""
    return pages[table.long()].flatten(1, 2)


def check_append(before, after, new, table, kv_lens) -> None:
    """Slot kv_lens + j holds row j, every other slot what it held before."""
    expected = rows(before, table).clone()
    for b in range(new.shape[0]):
        for j in range(new.shape[1]):
            if kv_lens[b] + j < expected.shape[1]:
                expected[b, kv_lens[b] + j] = new[b, j]
    assert torch.equal(rows(after, table), expected)


@settings(max_examples=25, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 9))
def test_append_writes_its_slots_and_no_others(interpreted, seed, q_len):
    generator = torch.Generator().manual_seed(seed)
    (k_pages, v_pages), table = paged(generator, 3, 6, 6, 5)
    kv_lens = torch.randint(0, 6 * PAGE + 1 - q_len, (3,), generator=generator).int()
    # A slice of a fused projection: rows are not contiguous.
    fused = torch.randn(3, q_len, HEADS, 11, generator=generator)
    k, v = fused[..., :6], fused[..., 6:]
    for write in (append_kv, lambda *args: interpreted(FILE, "append_kv_triton", *args)):
        new_k, new_v = k_pages.clone(), v_pages.clone()
        write(k, v, new_k, new_v, table, kv_lens)
        check_append(k_pages, new_k, k, table, kv_lens)
        check_append(v_pages, new_v, v, table, kv_lens)


def test_slots_past_the_table_land_on_the_scratch_page(interpreted):
    (k_pages, v_pages), table = paged(torch.Generator().manual_seed(0), 2, 2, 4, 4)
    kv_lens = torch.tensor([2 * PAGE - 1, 2 * PAGE + 5]).int()
    k = torch.randn(2, 3, HEADS, 4)
    for write in (append_kv, lambda *args: interpreted(FILE, "append_kv_triton", *args)):
        new_k, new_v = k_pages.clone(), v_pages.clone()
        write(k, k, new_k, new_v, table, kv_lens)
        check_append(k_pages, new_k, k, table, kv_lens)


def test_more_than_256_requests(interpreted):
    (k_pages, v_pages), table = paged(torch.Generator().manual_seed(1), 300, 1, 2, 2)
    k, kv_lens = torch.randn(300, 1, HEADS, 2), torch.randint(0, PAGE, (300,)).int()
    for write in (append_kv, lambda *args: interpreted(FILE, "append_kv_triton", *args)):
        new_k, new_v = k_pages.clone(), v_pages.clone()
        write(k, k, new_k, new_v, table, kv_lens)
        check_append(k_pages, new_k, k, table, kv_lens)


def test_a_planted_append_off_by_one_is_caught():
    (pages, other), table = paged(torch.Generator().manual_seed(5), 2, 4, 4, 4)
    k, kv_lens, before = torch.randn(2, 3, HEADS, 4), torch.tensor([0, 5]).int(), pages.clone()
    append_kv(k, k, pages, other, table, kv_lens + 1)
    with pytest.raises(AssertionError):
        check_append(before, pages, k, table, kv_lens)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_on_the_gpu(cuda, dtype):
    generator = torch.Generator().manual_seed(6)
    pages, table = paged(generator, 64, 20, 128, 80)
    pages = [buffer.to(dtype) for buffer in pages]
    kv_lens = torch.randint(0, 8, (64,), generator=generator).int()
    k, v = (torch.randn(64, 60, HEADS, d, generator=generator).to(dtype) for d in (128, 80))
    on_gpu = [buffer.to(cuda) for buffer in pages]
    torch.ops.autospec_triton.append_kv(k.to(cuda), v.to(cuda), *on_gpu, table.to(cuda), kv_lens.to(cuda))
    check_append(pages[0], on_gpu[0].cpu(), k, table, kv_lens)
    check_append(pages[1], on_gpu[1].cpu(), v, table, kv_lens)
