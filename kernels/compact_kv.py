"""Move the rows of an accepted branching path to the front: slot kv_lens + i receives row kv_lens + accept_path[i].

All layers in one op; every read comes before every write. A chain never needs it: its path is 0, 1, 2, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.append_kv import slot_pages
from autospec.kernels.launch import can_wait, gdc_launch_dependents, gdc_wait, jit, no_gpu, power_of_2, tl, wrap_triton
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure


@kernel_op(mutates=("pages",))
def compact_kv(
    pages: list[Tensor], page_table: Tensor, kv_lens: Tensor, accept_path: Tensor, accept_length: Tensor
) -> None:
    """pages: K and V buffers [num_pages, P, Hkv, D] or latents [num_pages, P, R] of all layers; kv_lens [B] int32 before the step;
    accept_path [B, L+1] int32 (-1 padded), accept_length [B] int32. Mutates the pages."""
    steps = accept_path.shape[1]
    index = torch.arange(steps, device=kv_lens.device)[None, :]
    kept = index <= accept_length[:, None]
    source = torch.where(kept, accept_path.long(), index)
    for buffer in pages:
        page_size = buffer.shape[1]
        to_page, to_offset = slot_pages(kv_lens, steps, page_table, page_size)
        slots = kv_lens.long()[:, None] + source
        logical = slots // page_size
        inside = logical < page_table.shape[1]
        from_page = page_table.long().gather(1, logical.clamp(max=page_table.shape[1] - 1))
        rows = buffer[torch.where(inside, from_page, 0), slots % page_size]
        # Rows past the path are written back where they came from; page 0 is scratch.
        buffer.index_put_((to_page, to_offset), rows)


BUFFERS_PER_LAUNCH = 16  # pointers in the kernel's signature; a table of addresses would hide the writes from Inductor


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """A row of a page is moved as one run of elements."""
    if not all(buffer.is_contiguous() for buffer in args["pages"]):
        return "a page buffer is not contiguous"
    return no_gpu(args)


@jit
def one_of_four(p_0, p_1, p_2, p_3, i):
    p = p_0
    if p_1 is not None and i == 1:
        p = p_1
    if p_2 is not None and i == 2:
        p = p_2
    if p_3 is not None and i == 3:
        p = p_3
    return p


# B requests (i_b), S = L + 1 steps of the path (o_s), C = H D elements of a row (o_c), up to 16 buffers (i_p). A program
# owns a block of columns of one request: nobody else touches them, so reading all steps before the barrier is enough.
@jit
def move_rows(
    p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, p_8, p_9, p_10, p_11, p_12, p_13, p_14, p_15, p_table, p_lens, p_path, p_length,
    stride_tb, max_pages, columns,
    STEPS: tl.constexpr, PAGE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_c, i_b, i_p = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p_pages = one_of_four(p_0, p_1, p_2, p_3, i_p)
    if p_4 is not None and i_p // 4 == 1:
        p_pages = one_of_four(p_4, p_5, p_6, p_7, i_p - 4)
    if p_8 is not None and i_p // 4 == 2:
        p_pages = one_of_four(p_8, p_9, p_10, p_11, i_p - 8)
    if p_12 is not None and i_p // 4 == 3:
        p_pages = one_of_four(p_12, p_13, p_14, p_15, i_p - 12)
    o_s, o_c = tl.arange(0, BLOCK_S), i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    kv_len, length = tl.load(p_lens + i_b), tl.load(p_length + i_b)
    b_path = tl.load(p_path + i_b * STEPS + o_s, mask=o_s < STEPS, other=-1)
    m_moved = (o_s < STEPS) & (o_s <= length) & (b_path != o_s)
    m_rows = m_moved[:, None] & (o_c < columns)[None, :]
    p_table += i_b * stride_tb
    b_from, b_to = kv_len + b_path, kv_len + o_s
    b_from_page = tl.load(p_table + b_from // PAGE, mask=m_moved & (b_from // PAGE < max_pages), other=0).to(tl.int64)
    b_to_page = tl.load(p_table + b_to // PAGE, mask=m_moved & (b_to // PAGE < max_pages), other=0).to(tl.int64)
    o_from = (b_from_page * PAGE + b_from % PAGE) * columns
    o_to = (b_to_page * PAGE + b_to % PAGE) * columns
    b_rows = tl.load(p_pages + o_from[:, None] + o_c[None, :], mask=m_rows)
    tl.debug_barrier()  # every read of these columns comes before every write
    tl.store(p_pages + o_to[:, None] + o_c[None, :], b_rows, mask=m_rows)


def launches(pages: list[Tensor]) -> list[list[Tensor]]:
    """Consecutive buffers of one shape and dtype, at most BUFFERS_PER_LAUNCH together."""
    groups: list[list[Tensor]] = []
    for buffer in pages:
        alike = bool(groups) and groups[-1][0].shape[1:] == buffer.shape[1:] and groups[-1][0].dtype == buffer.dtype
        if alike and len(groups[-1]) < BUFFERS_PER_LAUNCH:
            groups[-1].append(buffer)
        else:
            groups.append([buffer])
    return groups


@compact_kv.implementation("triton", why_not=why_not_triton, waits=True)
def compact_kv_triton(
    pages: list[Tensor], page_table: Tensor, kv_lens: Tensor, accept_path: Tensor, accept_length: Tensor
) -> None:
    """One launch for every BUFFERS_PER_LAUNCH buffers, which may start early: eight for the 64 of 32 layers, one after the
    other, took 13 us, and 18 within a step (H100, 2026-11-21)."""
    batch, steps = accept_path.shape
    accept_path = accept_path.contiguous()
    for group in launches(pages):
        page_size, columns = group[0].shape[1], group[0].shape[2:].numel()
        block_s = power_of_2(steps)
        block_c = min(power_of_2(columns), max(4096 // block_s, 64))
        wrap_triton(move_rows, waits=True)[((columns + block_c - 1) // block_c, batch, len(group))](
            *group, *[None] * (BUFFERS_PER_LAUNCH - len(group)), page_table, kv_lens, accept_path, accept_length,
            page_table.stride(0), page_table.shape[1], columns,
            STEPS=steps, PAGE=page_size, BLOCK_S=block_s, BLOCK_C=block_c, WAITS=can_wait(kv_lens),
        )


def bench(device: torch.device) -> Iterator[Measurement]:
    """32 layers of 8 heads of 128; a path of 8 that skips every other node."""
    for batch in (1, 16):
        pages = [torch.randn(1 + batch * 4, 64, 8, 128, device=device, dtype=torch.bfloat16) for _ in range(64)]
        copies = [buffer.clone() for buffer in pages]
        page_table = (1 + torch.randperm(batch * 4, device=device)).reshape(batch, 4).int()
        kv_lens = torch.randint(0, 192, (batch,), device=device, dtype=torch.int32)
        path = torch.arange(0, 18, 2, device=device, dtype=torch.int32).expand(batch, -1).contiguous()
        args = page_table, kv_lens, path, torch.full((batch,), 8, device=device, dtype=torch.int32)

        def mine(pages=copies, args=args) -> list[Tensor]:
            compact_kv_triton(pages, *args)
            return pages

        def reference(pages=pages, args=args) -> list[Tensor]:
            compact_kv.reference(pages, *args)
            return pages

        moved = batch * 8 * 64 * 2 * 2048
        yield measure("compact_kv", f"{batch} requests, 32 layers, path of 8", mine, reference, moved)
