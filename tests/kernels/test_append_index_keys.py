"""Index keys in float8: how far a row is from what it was, that rows keep to themselves, and where they are written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.kernels.append_index_keys import (
    KEYS,
    append_index_keys,
    append_index_keys_triton,
    dequantize_keys,
    quantize_keys,
    why_not_triton,
)

FILE = "autospec.kernels.append_index_keys"
PAGE, LARGEST = 4, 448.0

lengths = st.floats(-38, 37).map(lambda power: 10.0**power)


@settings(max_examples=60, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), size=lengths, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_row_is_rounded_as_float8_rounds(seed, size, dtype):
    """Half a unit of 3 bits behind the leading one, or of the smallest float8; the scale is the lowest power of two that fits."""
    g = torch.Generator().manual_seed(seed)
    k = (torch.randn(5, 7, generator=g) * torch.rand(5, 1, generator=g) * size).to(dtype)
    keys, scales = quantize_keys(k)
    assert (keys.dtype, scales.dtype) == (KEYS, torch.float32)
    assert torch.equal(scales, torch.exp2(scales.log2().round()))
    top = k.double().abs().amax(-1)
    assert (top <= LARGEST * scales.double() * (1 + 1e-6)).all()
    assert (top >= LARGEST / 2 * scales.double() * (1 - 1e-6))[top > 1e-29].all()
    error = (keys.double() * scales.double()[:, None] - k.double()).abs()
    assert (error <= torch.maximum(k.double().abs() / 16, scales.double()[:, None] * 2.0**-10) * (1 + 1e-6)).all()
    if size > 1e-20:  # so that no product is below what float32 holds
        assert torch.equal(dequantize_keys(keys, scales).double(), keys.double() * scales.double()[:, None])


def test_what_float8_holds_comes_back_as_it_was():
    held = torch.arange(256, dtype=torch.uint8).view(KEYS).float()
    held = held[held.isfinite()]
    for power in (-60, -3, 0, 40):
        assert torch.equal(dequantize_keys(*quantize_keys(held * 2.0**power)), held * 2.0**power)


def test_rows_of_zeros_and_of_what_is_no_number():
    """Neither harms the rows beside it."""
    g = torch.Generator().manual_seed(3)
    k = torch.randn(2, 5, 8, generator=g)
    plain = dequantize_keys(*quantize_keys(k))
    k[0, 1] = 0
    k[0, 3, 2], k[1, 0, 5], k[1, 4, 0] = float("nan"), float("inf"), -float("inf")
    keys, scales = quantize_keys(k)
    assert scales.isfinite().all()
    assert (scales > 0).all()
    back = dequantize_keys(keys, scales)
    assert (back[0, 1] == 0).all()
    assert back.isnan().nonzero().tolist() == [[0, 3, 2], [1, 0, 5], [1, 4, 0]]
    clean = k.isfinite().all(-1) & (k != 0).any(-1)
    assert torch.equal(back[clean], plain[clean])


def buffers(g: torch.Generator, batch: int, max_pages: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pages and scales that hold something, and a page table that is a permutation; physical page 0 is scratch."""
    table = (1 + torch.randperm(batch * max_pages, generator=g)).reshape(batch, max_pages).int()
    return *quantize_keys(torch.randn(1 + batch * max_pages, PAGE, dim, generator=g)), table


def rows(pages: Tensor, table: Tensor) -> Tensor:
    """What each request sees: [B, slots, ...]."""
    return pages[table.long()].flatten(1, 2)


def check_append(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], k: Tensor, table: Tensor, kv_lens: Tensor) -> None:
    """Slot kv_lens + j holds row j quantised, to the bit; every other slot what it held before."""
    bits, scales = (rows(one, table).clone() for one in (before[0].view(torch.uint8), before[1]))
    for b in range(k.shape[0]):
        for j in range(k.shape[1]):
            if (slot := int(kv_lens[b]) + j) < bits.shape[1]:
                key, scales[b, slot] = quantize_keys(k[b, j])
                bits[b, slot] = key.view(torch.uint8)
    assert torch.equal(rows(after[1], table), scales)
    assert torch.equal(rows(after[0].view(torch.uint8), table), bits)


Write = Callable[..., None]


def appended(write: Write, before: tuple[Tensor, Tensor], *rest: Tensor) -> tuple[Tensor, Tensor]:
    pages, scales = (one.clone() for one in before)
    write(rest[0], pages, scales, *rest[1:])
    return pages, scales


@settings(max_examples=8, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 9), dim=st.sampled_from([4, 12, 16]),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))  # fmt: skip
def test_append_writes_its_slots_and_no_others(interpreted, seed, q_len, dim, dtype):
    """Past the table, too: those land on the scratch page."""
    g = torch.Generator().manual_seed(seed)
    pages, scales, table = buffers(g, 3, 6, dim)
    kv_lens = torch.randint(0, 6 * PAGE + 3, (3,), generator=g).int()
    wider = torch.randn(3, q_len, dim + 3, generator=g) * torch.rand(3, q_len, 1, generator=g)
    k = wider.to(dtype)[..., :dim]
    k[0, 0] = 0
    for write in (append_index_keys, lambda *args: interpreted(FILE, "append_index_keys_triton", *args)):
        check_append((pages, scales), appended(write, (pages, scales), k, table, kv_lens), k, table, kv_lens)


def test_triton_treats_what_is_no_number_as_the_reference_does(interpreted):
    pages, scales, table = buffers(torch.Generator().manual_seed(1), 1, 2, 8)
    k = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(2))
    k[0, 0, 2], k[0, 1, 5], k[0, 1, :2] = float("nan"), float("inf"), torch.tensor([-7e4, 3e38])
    rest = k, table, torch.tensor([1]).int()
    theirs = appended(append_index_keys, (pages, scales), *rest)
    mine = appended(lambda *args: interpreted(FILE, "append_index_keys_triton", *args), (pages, scales), *rest)
    assert torch.equal(mine[1], theirs[1])
    stored = [rows(pages, table).float()[0, 1:4].nan_to_num(-7) for pages, _ in (mine, theirs)]
    assert torch.equal(*stored)
    assert (stored[0] == -7).nonzero().tolist() == [[0, 2], [1, 5]]


def test_triton_rounds_ties_to_even(interpreted):
    """Every float8, and every number half-way between two of them, of both signs and zeros."""
    held = torch.arange(127, dtype=torch.uint8).view(KEYS).float()
    k = torch.cat([held, (held[1:] + held[:-1]) / 2])
    k = torch.cat([k, -k])[None, None]
    pages, scales, table = buffers(torch.Generator().manual_seed(1), 1, 1, k.shape[2])
    rest = k, table, torch.tensor([2]).int()
    after = appended(lambda *args: interpreted(FILE, "append_index_keys_triton", *args), (pages, scales), *rest)
    check_append((pages, scales), after, *rest)


PLANTED: dict[str, Write] = {
    "one slot late": lambda k, pages, scales, table, lens: append_index_keys(k, pages, scales, table, lens + 1),
    "one scale for all rows": lambda k, pages, scales, table, lens: append_index_keys.reference(
        k / k.abs().amax(-1, keepdim=True), pages, scales, table, lens),
    "scales of another row": lambda k, pages, scales, table, lens: (
        append_index_keys(k, pages, scales.clone(), table, lens), append_index_keys(k.flip(1), pages.clone(), scales, table, lens)
    )[0],
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug):
    pages, scales, table = buffers(torch.Generator().manual_seed(5), 2, 4, 8)
    k, kv_lens = torch.randn(2, 3, 8) * torch.tensor([0.1, 1, 30])[:, None], torch.tensor([0, 5]).int()
    check_append((pages, scales), appended(append_index_keys, (pages, scales), k, table, kv_lens), k, table, kv_lens)
    with pytest.raises(AssertionError):
        check_append((pages, scales), appended(PLANTED[bug], (pages, scales), k, table, kv_lens), k, table, kv_lens)


def test_why_not_triton():
    pages, scales, table = buffers(torch.Generator().manual_seed(5), 2, 4, 8)
    given = append_index_keys.bind((torch.randn(2, 3, 8), pages, scales, table, torch.zeros(2).int()), {})
    assert "cpu" in why_not_triton(given)
    assert "bfloat16" in why_not_triton({**given, "index_pages": pages.bfloat16()})
    assert "index_scales is not contiguous" in why_not_triton({**given, "index_scales": scales.T})


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_triton_on_the_gpu(cuda, dtype):
    """The same bits as the reference on a CPU."""
    g = torch.Generator().manual_seed(6)
    pages, scales, table = buffers(g, 64, 20, 128)
    kv_lens = torch.randint(0, 8, (64,), generator=g).int()
    k = (torch.randn(64, 60, 128, generator=g) * torch.rand(64, 60, 1, generator=g) * 5).to(dtype)
    k[3, 7] = 0
    on_gpu = appended(append_index_keys_triton, (pages.to(cuda), scales.to(cuda)), *(one.to(cuda) for one in (k, table, kv_lens)))
    check_append((pages, scales), (on_gpu[0].cpu(), on_gpu[1].cpu()), k, table, kv_lens)
