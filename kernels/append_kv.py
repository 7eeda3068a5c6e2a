"""Write the K and V rows of this call's tokens into their pages.

k [B, N, Hkv, D], v [B, N, Hkv, Dv]; k_pages [num_pages, P, Hkv, D], v_pages [num_pages, P, Hkv, Dv];
page_table [B, max_pages] int32; kv_lens [B] int32. Node j of a request goes to slot kv_lens + j.
Physical page 0 is scratch: a slot without a page, or past the table, lands there.
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
    power_of_2,
    rows_of,
    tl,
    wrap_triton,
)
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure


def slot_pages(kv_lens: Tensor, q_len: int, page_table: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """kv_lens [B] -> physical page and offset in it, both [B, N] int64, of slots kv_lens ... kv_lens + N - 1."""
    slots = kv_lens.long()[:, None] + torch.arange(q_len, device=kv_lens.device)[None, :]
    logical = slots // page_size
    inside = logical < page_table.shape[1]
    pages = page_table.long().gather(1, logical.clamp(max=page_table.shape[1] - 1))
    return torch.where(inside, pages, 0), slots % page_size


@kernel_op(mutates=("k_pages", "v_pages"))
def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor) -> None:
    """Write k [B, N, Hkv, D] and v [B, N, Hkv, Dv] to slots kv_lens + j; mutates both page buffers."""
    pages, offsets = slot_pages(kv_lens, k.shape[1], page_table, k_pages.shape[1])
    k_pages.index_put_((pages, offsets), k.to(k_pages.dtype))
    v_pages.index_put_((pages, offsets), v.to(v_pages.dtype))


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """Pages are addressed by stride, their rows must be dense."""
    for name in ("k_pages", "v_pages"):
        if args[name].stride(-1) != 1:
            return f"{name} has stride {args[name].stride(-1)} in its last dimension"
    return no_gpu(args)


# B requests (i_b), N nodes (i_n), H K/V heads (o_h), D and Dv elements (o_d, o_dv). One program moves a node's K and V.
@jit
def append_rows(
    p_k, p_v, p_k_pages, p_v_pages, p_table, p_lens,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_kp, stride_ks, stride_kph, stride_vp, stride_vs, stride_vph, stride_tb, max_pages,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WAITS: tl.constexpr,
):
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_n, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_h, o_d, o_dv = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    slot = tl.load(p_lens + i_b) + i_n
    logical, offset = slot // PAGE, slot % PAGE
    page = tl.load(p_table + i_b * stride_tb + logical, mask=logical < max_pages, other=0).to(tl.int64)
    m_k, m_v = (o_h < H) & (o_d < D), (o_h < H) & (o_dv < DV)
    b_k = tl.load(p_k + i_b * stride_kb + i_n * stride_kn + o_h * stride_kh + o_d, mask=m_k)
    b_v = tl.load(p_v + i_b * stride_vb + i_n * stride_vn + o_h * stride_vh + o_dv, mask=m_v)
    p_k_row = p_k_pages + page * stride_kp + offset * stride_ks
    p_v_row = p_v_pages + page * stride_vp + offset * stride_vs
    tl.store(p_k_row + o_h * stride_kph + o_d, b_k.to(p_k_pages.dtype.element_ty), mask=m_k)
    tl.store(p_v_row + o_h * stride_vph + o_dv, b_v.to(p_v_pages.dtype.element_ty), mask=m_v)


@append_kv.implementation("triton", why_not=why_not_triton, waits=True)
def append_kv_triton(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor
) -> None:
    """K and V in one launch, one program per node."""
    k, v = rows_of(k), rows_of(v)
    batch, q_len, heads, head_dim = k.shape
    v_dim = v.shape[3]
    wrap_triton(append_rows, waits=True)[(q_len, batch)](
        k, v, k_pages, v_pages, page_table, kv_lens,
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        k_pages.stride(0), k_pages.stride(1), k_pages.stride(2),
        v_pages.stride(0), v_pages.stride(1), v_pages.stride(2), page_table.stride(0), page_table.shape[1],
        H=heads, D=head_dim, DV=v_dim, PAGE=k_pages.shape[1],
        BLOCK_H=power_of_2(heads), BLOCK_D=power_of_2(head_dim), BLOCK_DV=power_of_2(v_dim), WAITS=can_wait(k),
    )


def bench(device: torch.device) -> Iterator[Measurement]:
    """One layer of 8 heads of 128."""
    for batch, q_len in ((1, 1), (1, 64), (64, 8)):
        k, v = (torch.randn(batch, q_len, 8, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
        shape = 1 + batch * 8, 64, 8, 128
        k_pages, v_pages = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        page_table = (1 + torch.randperm(batch * 8, device=device)).reshape(batch, 8).int()
        kv_lens = torch.randint(0, 512 - q_len, (batch,), device=device, dtype=torch.int32)
        pages = [k_pages.clone(), v_pages.clone()]

        def mine(k=k, v=v, pages=pages, page_table=page_table, kv_lens=kv_lens) -> list[Tensor]:
            append_kv_triton(k, v, *pages, page_table, kv_lens)
            return pages

        def reference(k=k, v=v, pages=(k_pages, v_pages), page_table=page_table, kv_lens=kv_lens) -> list[Tensor]:
            append_kv.reference(k, v, *pages, page_table, kv_lens)
            return list(pages)

        yield measure("append_kv", f"{batch} x {q_len}", mine, reference, 4 * k.nbytes)
