"""Keys and values of all heads from the latent rows that a call attends to, in pages of their own (MLA with many query tokens).

latent_pages [num_pages, P, R + E], page_table [B, max_pages] int32 and kv_lens [B] int32 as in paged_mla, the N new rows
appended; w_uk [H, D, R] and w_uv [H, Dv, R] project a row to a head's key and value. What comes out lies request by request,
page by page in order, and so says its own page table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.launch import (
    can_wait,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    no_gpu,
    not_a_float,
    power_of_2,
    tl,
    wrap_triton,
)
from autospec.kernels.page_blocks import block_pages, load_rows, row_numbers
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, deviation, time_graph


@kernel_op()
def expand_latent(
    latent_pages: Tensor, page_table: Tensor, kv_lens: Tensor, w_uk: Tensor, w_uv: Tensor, q_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> k_pages [B max_pages, P, H, D + E], v_pages [B max_pages, P, H, Dv], their page_table [B, max_pages] int32.

    Slots from kv_lens + q_len on: unspecified, but finite in the page of the last one before them.
    """
    kv_lora_rank = w_uk.shape[2]
    rows = latent_pages.index_select(0, page_table.reshape(-1))
    latent = rows[..., :kv_lora_rank]
    k_rope = rows[..., None, kv_lora_rank:].expand(-1, -1, w_uk.shape[0], -1)
    k, v = (torch.matmul(latent, one.flatten(0, 1).t()).unflatten(2, one.shape[:2]) for one in (w_uk, w_uv))
    return torch.cat([k, k_rope], -1), v.contiguous(), in_order(page_table)


def in_order(page_table: Tensor) -> Tensor:
    """A page table of the same shape whose pages lie one after the other."""
    return torch.arange(page_table.numel(), dtype=torch.int32, device=page_table.device).reshape(page_table.shape)


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """Pages are addressed by row number; a tile holds a head's whole key and value."""
    pages, w_uk, w_uv = args["latent_pages"], args["w_uk"], args["w_uv"]
    if not pages.dtype == w_uk.dtype == w_uv.dtype:
        return f"pages are {pages.dtype}, weights {w_uk.dtype} and {w_uv.dtype}"
    if (reason := not_a_float(pages.dtype)) is not None:
        return reason
    if max(w_uk.shape[1], w_uv.shape[1]) > 256:
        return f"keys of {w_uk.shape[1]} and values of {w_uv.shape[1]} do not fit a tile of 256"
    if not pages.is_contiguous():
        return "the pages are not contiguous"
    if w_uk.stride()[1:] != (w_uk.shape[2], 1) or w_uv.stride()[1:] != (w_uv.shape[2], 1):
        return "a head's weights are no dense matrix"
    return no_gpu(args)


# B requests (i_b), H heads (i_h), blocks of T slots (i_t, o_t); R elements of a latent, K at a time (o_r), E of its rope
# part (o_e); D and DV elements of a head's key and value (o_d, o_v).


@jit
def expand_rows(
    p_pages, p_table, p_lens, p_uk, p_uv, p_k, p_v, stride_tb, stride_kh, stride_vh, q_len, max_pages,
    H: tl.constexpr, R: tl.constexpr, E: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    IS_WIDE: tl.constexpr, T: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr, WAITS: tl.constexpr,
):
    """One block of slots for one head. Heads are the innermost of the grid, so that they share a block in the cache."""
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_h, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    capacity = max_pages * PAGE
    length = tl.minimum(tl.load(p_lens + i_b) + q_len, capacity)
    end = tl.minimum((length + PAGE - 1) // PAGE * PAGE, capacity)  # whole pages are written, zeros behind the length
    if i_t * T < end:
        o_t, o_r, o_e = i_t * T + tl.arange(0, T), tl.arange(0, K), tl.arange(0, BLOCK_E)
        o_d, o_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        m_t = o_t < length
        pages = block_pages(p_table + i_b * stride_tb, i_t, capacity, T, PAGE)
        b_row = row_numbers(pages, i_t, T, PAGE, IS_WIDE)
        b_k = tl.zeros((T, BLOCK_D), tl.float32)
        b_v = tl.zeros((T, BLOCK_V), tl.float32)
        for i_r in range(0, R, K):
            m_r = (i_r + o_r < R)[None, :]
            b_c = tl.load(p_pages + (b_row * (R + E))[:, None] + (i_r + o_r)[None, :], mask=m_t[:, None] & m_r, other=0.0)
            p_rows = p_uk + i_h * stride_kh + o_d[:, None] * R + (i_r + o_r)[None, :]
            b_k = tl.dot(b_c, tl.trans(tl.load(p_rows, mask=(o_d < D)[:, None] & m_r, other=0.0)), b_k, input_precision="ieee")
            p_rows = p_uv + i_h * stride_vh + o_v[:, None] * R + (i_r + o_r)[None, :]
            b_v = tl.dot(b_c, tl.trans(tl.load(p_rows, mask=(o_v < DV)[:, None] & m_r, other=0.0)), b_v, input_precision="ieee")
        b_e = load_rows(p_pages + R, b_row, m_t, o_e, R + E, E)
        m_t = (o_t < end)[:, None]
        o_out = ((i_b * capacity + o_t) * H + i_h)[:, None]
        tl.store(p_k + o_out * (D + E) + o_d[None, :], b_k.to(p_k.dtype.element_ty), mask=m_t & (o_d < D)[None, :])
        tl.store(p_k + o_out * (D + E) + D + o_e[None, :], b_e, mask=m_t & (o_e < E)[None, :])
        tl.store(p_v + o_out * DV + o_v[None, :], b_v.to(p_v.dtype.element_ty), mask=m_t & (o_v < DV)[None, :])


@expand_latent.implementation("triton", why_not=why_not_triton, waits=True)
def expand_latent_triton(
    latent_pages: Tensor, page_table: Tensor, kv_lens: Tensor, w_uk: Tensor, w_uv: Tensor, q_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks behind a request's length cost a launch only."""
    batch, max_pages = page_table.shape
    page_size, width = latent_pages.shape[1:]
    heads, dim, kv_lora_rank = w_uk.shape
    rope, v_dim = width - kv_lora_rank, w_uv.shape[1]
    k_pages = latent_pages.new_empty(batch * max_pages, page_size, heads, dim + rope)
    v_pages = latent_pages.new_empty(batch * max_pages, page_size, heads, v_dim)
    is_half = latent_pages.element_size() == 2
    block_d, block_v = (max(power_of_2(one), 16) for one in (dim, v_dim))
    # Sized, not tuned: two float32 accumulators take 128 registers of each of 256 threads.
    slots, depth = (128 if block_d + block_v <= 256 else 64) if is_half else 32, 64 if is_half else 32
    wrap_triton(expand_rows, waits=True)[(heads, (max_pages * page_size + slots - 1) // slots, batch)](
        latent_pages, page_table, kv_lens, w_uk, w_uv, k_pages, v_pages, page_table.stride(0), w_uk.stride(0), w_uv.stride(0),
        q_len, max_pages, H=heads, R=kv_lora_rank, E=rope, D=dim, DV=v_dim, PAGE=page_size,
        IS_WIDE=latent_pages.numel() >= 2**31, T=slots, K=depth, BLOCK_D=block_d, BLOCK_V=block_v,
        BLOCK_E=max(power_of_2(rope), 16), WAITS=can_wait(latent_pages), num_warps=8, num_stages=3,
    )
    return k_pages, v_pages, in_order(page_table)


def bench(device: torch.device) -> Iterator[Measurement]:
    """128 heads of 128 + 64 and 128 from latents of 512, bfloat16, page 64; exact is the reference in float64."""
    for batch, context in ((1, 512), (1, 4096), (4, 1024)):
        max_pages = context // 64
        pages = torch.randn(1 + batch * max_pages, 64, 576, device=device, dtype=torch.bfloat16)
        weight = torch.randn(128, 256, 512, device=device, dtype=torch.bfloat16) / 512**0.5
        table = (1 + torch.randperm(batch * max_pages, device=device)).reshape(batch, max_pages).int()
        lens = torch.full((batch,), context - 512, device=device, dtype=torch.int32)

        def mine(pages=pages, table=table, lens=lens, weight=weight) -> tuple[Tensor, ...]:
            return expand_latent_triton(pages, table, lens, weight[:, :128], weight[:, 128:], 512)

        def reference(pages=pages, table=table, lens=lens, weight=weight) -> tuple[Tensor, ...]:
            return expand_latent.reference(pages, table, lens, weight[:, :128], weight[:, 128:], 512)

        wide = weight.double()
        exact = expand_latent.reference(pages.double(), table, lens, wide[:, :128], wide[:, 128:], 512)
        moved = batch * context * (576 + 128 * 320) * 2 + weight.nbytes
        error = deviation(mine(), exact)
        times = time_graph(mine), time_graph(reference)
        yield Measurement("expand_latent", f"{batch} x {context} rows, 128 heads", *times, moved, error)
