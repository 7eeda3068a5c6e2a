"""Compacting an accepted path: every slot of every request is compared, those nobody names too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.kernels.compact_kv import compact_kv

FILE = "autospec.kernels.compact_kv"
PAGE, HEADS = 4, 3


def paged(generator, batch, max_pages, *dims):
    """Page buffers of the given head dims and a page table that is a permutation; physical page 0 is scratch."""
    table = (1 + torch.randperm(batch * max_pages, generator=generator)).reshape(batch, max_pages).int()
    return [torch.randn(1 + batch * max_pages, PAGE, HEADS, d, generator=generator) for d in dims], table


def rows(pages, table):
    """What each request sees: [B, slots, ...]."""
    return pages[table.long()].flatten(1, 2)


def check_compact(before, after, table, kv_lens, path, length) -> None:
    """Slot kv_lens + i holds the old row kv_lens + path[i], every other slot what it held before."""
    old = rows(before, table)
    expected = old.clone()
    for b in range(old.shape[0]):
        for i in range(int(length[b]) + 1):
            expected[b, kv_lens[b] + i] = old[b, kv_lens[b] + path[b, i]]
    assert torch.equal(rows(after, table), expected)


def random_paths(generator, batch, limit, q_len):
    """Accepted paths of increasing node numbers, of every length from 0 to limit."""
    length = torch.randint(0, limit + 1, (batch,), generator=generator)
    path = torch.full((batch, limit + 1), -1)
    for b in range(batch):
        nodes = 1 + torch.randperm(q_len - 1, generator=generator)[: int(length[b])].sort().values
        path[b, : int(length[b]) + 1] = torch.cat([torch.zeros(1, dtype=torch.int64), nodes])
    return path.int(), length.int()


@settings(max_examples=12, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), limit=st.integers(1, 6), buffers=st.integers(1, 39))
def test_compact_moves_the_path_and_nothing_else(interpreted, seed, limit, buffers):
    generator = torch.Generator().manual_seed(seed)
    # Layers may differ in head dim, as layers with different K and V do.
    pages, table = paged(generator, 3, 6, *(5 if i % 19 == 18 else 8 for i in range(buffers)))
    kv_lens = torch.randint(0, 6 * PAGE - 10, (3,), generator=generator).int()
    path, length = random_paths(generator, 3, limit, 10)
    for move in (compact_kv, lambda *args: interpreted(FILE, "compact_kv_triton", *args)):
        moved = [buffer.clone() for buffer in pages]
        move(moved, table, kv_lens, path, length)
        for before, after in zip(pages, moved, strict=True):
            check_compact(before, after, table, kv_lens, path, length)


@pytest.mark.parametrize("length", range(4))
def test_every_accept_count(interpreted, length):
    (pages,), table = paged(torch.Generator().manual_seed(2), 1, 4, 4)
    path = torch.tensor([[0, 2, 3, 5][: length + 1] + [-1] * (3 - length)]).int()
    case = table, torch.tensor([3]).int(), path, torch.tensor([length]).int()
    for move in (compact_kv, lambda *args: interpreted(FILE, "compact_kv_triton", *args)):
        moved = pages.clone()
        move([moved], *case)
        check_compact(pages, moved, *case)


def test_float8_keys_move_with_their_scales(interpreted):
    """Rows [Di] of float8, and one number each."""
    g = torch.Generator().manual_seed(4)
    pages = [torch.randn(9, PAGE, 6, generator=g).to(torch.float8_e4m3fn), torch.randn(9, PAGE, generator=g)]
    table = (1 + torch.randperm(8, generator=g)).reshape(2, 4).int()
    case = table, torch.tensor([3, 6]).int(), torch.tensor([[0, 2, 5], [0, 1, -1]]).int(), torch.tensor([2, 1]).int()
    for move in (compact_kv, lambda *args: interpreted(FILE, "compact_kv_triton", *args)):
        moved = [one.clone() for one in pages]
        move(moved, *case)
        for before, after in zip(pages, moved, strict=True):
            bits = [one.view(torch.uint8) if one.dtype == torch.float8_e4m3fn else one for one in (before, after)]
            check_compact(*bits, *case)


def test_compacting_a_chain_changes_nothing(interpreted):
    (pages,), table = paged(torch.Generator().manual_seed(3), 2, 4, 4)
    path = torch.tensor([[0, 1, 2, 3], [0, 1, -1, -1]]).int()
    case = table, torch.tensor([1, 6]).int(), path, torch.tensor([3, 1]).int()
    for move in (compact_kv, lambda *args: interpreted(FILE, "compact_kv_triton", *args)):
        moved = pages.clone()
        move([moved], *case)
        assert torch.equal(moved[1:], pages[1:])


@pytest.mark.parametrize("bug", ["reads after writes", "one row too few", "path of another request"])
def test_planted_bugs_are_caught(bug):
    (pages,), table = paged(torch.Generator().manual_seed(4), 2, 4, 4)
    kv_lens, length = torch.tensor([3, 5]).int(), torch.tensor([2, 2]).int()
    path = torch.tensor([[0, 2, 3], [0, 1, 4]]).int()
    moved = pages.clone()
    if bug == "reads after writes":
        for b in range(2):
            for i in (2, 1, 0):  # slot 2 is overwritten before it is read
                source, target = int(kv_lens[b] + path[b, i]), int(kv_lens[b]) + i
                row = moved[table[b, source // PAGE], source % PAGE].clone()
                moved[table[b, target // PAGE], target % PAGE] = row
    elif bug == "one row too few":
        compact_kv([moved], table, kv_lens, path, length - 1)
    else:
        compact_kv([moved], table, kv_lens, path.flip(0), length)
    with pytest.raises(AssertionError):
        check_compact(pages, moved, table, kv_lens, path, length)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_on_the_gpu(cuda, dtype):
    generator = torch.Generator().manual_seed(6)
    pages, table = paged(generator, 64, 20, *[128] * 19)
    pages = [buffer.to(dtype) for buffer in pages]
    kv_lens = torch.randint(0, 20, (64,), generator=generator).int()
    path, length = random_paths(generator, 64, 8, 60)
    on_gpu = [buffer.to(cuda) for buffer in pages]
    torch.ops.autospec_triton.compact_kv(on_gpu, *(x.to(cuda) for x in (table, kv_lens, path, length)))
    for before, after in zip(pages, on_gpu, strict=True):
        check_compact(before, after.cpu(), table, kv_lens, path, length)
