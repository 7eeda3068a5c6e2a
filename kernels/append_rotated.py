"""Rotary embedding of queries and keys, and the K and V rows into their pages, in one go.

q [B, N, Hq, D], k [B, N, Hkv, D], v [B, N, Hkv, Dv]; cos, sin [B, N, D] in their dtype; pages, page table and lengths as in
append_kv. Dimension d is rotated with d + D / 2, as transformers' rotate_half does. The kernel rounds once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.append_kv import append_kv
from autospec.kernels.append_kv import why_not_triton as why_not_pages
from autospec.kernels.launch import (
    can_wait,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    power_of_2,
    rows_of,
    tl,
    wrap_triton,
)
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, N, H, D], cos, sin [B, N, D] -> [B, N, H, D]."""
    first, second = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat([-second, first], -1) * sin[:, :, None]


@kernel_op(mutates=("k_pages", "v_pages"))
def append_rotated(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor,
    kv_lens: Tensor,
) -> Tensor:
    """q [B, N, Hq, D] -> rotated q [B, N, Hq, D]; mutates both page buffers: rotated k and v go to slots kv_lens + j."""
    append_kv.reference(rotate(k, cos, sin), v, k_pages, v_pages, page_table, kv_lens)
    return rotate(q, cos, sin)


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """One dtype, whole groups of heads."""
    q, k, cos = args["q"], args["k"], args["cos"]
    if not q.dtype == k.dtype == cos.dtype == args["sin"].dtype:
        return f"queries are {q.dtype}, keys {k.dtype}, cos {cos.dtype}"
    if q.shape[2] % k.shape[2] or q.shape[3] % 2:
        return f"{q.shape[2]} query heads of {q.shape[3]} for {k.shape[2]} K/V heads"
    return why_not_pages(args)


# A program (i_n, i_h, i_b) takes a node, a K/V head and its G query heads (o_g). It rotates halves: o_d < D / 2.
@jit
def rotate_half(p_row, p_cos, p_sin, p_to, m_row, o_d, m_d, HALF: tl.constexpr):
    """Rotate rows [G] whose first elements are at p_row [G, 1]; write them to p_to [G, 1]."""
    dtype = p_row.dtype.element_ty
    to = p_to.dtype.element_ty
    m = m_row & m_d
    b_1 = tl.load(p_row + o_d, mask=m, other=0.0).to(tl.float32)
    b_2 = tl.load(p_row + HALF + o_d, mask=m, other=0.0).to(tl.float32)
    b_cos_1, b_cos_2 = tl.load(p_cos + o_d, mask=m_d).to(tl.float32), tl.load(p_cos + HALF + o_d, mask=m_d).to(tl.float32)
    b_sin_1, b_sin_2 = tl.load(p_sin + o_d, mask=m_d).to(tl.float32), tl.load(p_sin + HALF + o_d, mask=m_d).to(tl.float32)
    tl.store(p_to + o_d, (b_1 * b_cos_1 - b_2 * b_sin_1).to(dtype).to(to), mask=m)
    tl.store(p_to + HALF + o_d, (b_2 * b_cos_2 + b_1 * b_sin_2).to(dtype).to(to), mask=m)


@jit
def append_rotated_rows(
    p_q, p_k, p_v, p_cos, p_sin, p_out, p_k_pages, p_v_pages, p_table, p_lens,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_cb, stride_cn, stride_sb, stride_sn,
    stride_kp, stride_ks, stride_kph, stride_vp, stride_vs, stride_vph, stride_tb, q_len, max_pages,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_n, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_g, o_d = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_D)[None, :]
    o_one, o_dv = tl.arange(0, 1)[:, None], tl.arange(0, BLOCK_DV)
    m_d, m_g, m_one = o_d < D // 2, o_g < G, o_one < 1
    p_cos += i_b * stride_cb + i_n * stride_cn
    p_sin += i_b * stride_sb + i_n * stride_sn
    slot = tl.load(p_lens + i_b) + i_n
    logical, offset = slot // PAGE, slot % PAGE
    page = tl.load(p_table + i_b * stride_tb + logical, mask=logical < max_pages, other=0).to(tl.int64)
    o_head = i_h * G + o_g
    p_from = p_q + i_b * stride_qb + i_n * stride_qn + o_head * stride_qh
    p_to = p_out + ((i_b * q_len + i_n) * (H * G) + o_head) * D
    rotate_half(p_from, p_cos, p_sin, p_to, m_g, o_d, m_d, D // 2)
    p_from = p_k + i_b * stride_kb + i_n * stride_kn + i_h * stride_kh + o_one
    p_to = p_k_pages + page * stride_kp + offset * stride_ks + i_h * stride_kph + o_one
    rotate_half(p_from, p_cos, p_sin, p_to, m_one, o_d, m_d, D // 2)
    b_v = tl.load(p_v + i_b * stride_vb + i_n * stride_vn + i_h * stride_vh + o_dv, mask=o_dv < DV)
    p_to = p_v_pages + page * stride_vp + offset * stride_vs + i_h * stride_vph + o_dv
    tl.store(p_to, b_v.to(p_v_pages.dtype.element_ty), mask=o_dv < DV)


@append_rotated.implementation("triton", why_not=why_not_triton, waits=True)
def append_rotated_triton(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor,
    kv_lens: Tensor,
) -> Tensor:
    """One launch, a program for each node and K/V head."""
    q, k, v, cos, sin = (rows_of(value) for value in (q, k, v, cos, sin))
    batch, q_len, q_heads, head_dim = q.shape
    heads, v_dim = v.shape[2:]
    out = q.new_empty(batch, q_len, q_heads, head_dim)
    wrap_triton(append_rotated_rows, waits=True)[(q_len, heads, batch)](
        q, k, v, cos, sin, out, k_pages, v_pages, page_table, kv_lens,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        v.stride(0), v.stride(1), v.stride(2), cos.stride(0), cos.stride(1), sin.stride(0), sin.stride(1),
        k_pages.stride(0), k_pages.stride(1), k_pages.stride(2),
        v_pages.stride(0), v_pages.stride(1), v_pages.stride(2), page_table.stride(0), q_len, page_table.shape[1],
        H=heads, G=q_heads // heads, D=head_dim, DV=v_dim, PAGE=k_pages.shape[1],
        BLOCK_G=power_of_2(q_heads // heads), BLOCK_D=power_of_2(head_dim // 2), BLOCK_DV=power_of_2(v_dim),
        WAITS=can_wait(q), num_warps=1,
    )  # fmt: skip
    return out


def bench(device: torch.device) -> Iterator[Measurement]:
    """One layer of 32 and 8 heads of 128, bfloat16."""
    for batch, q_len in ((1, 1), (1, 64), (64, 8)):
        q, k, v = (torch.randn(batch, q_len, n, 128, device=device, dtype=torch.bfloat16) for n in (32, 8, 8))
        cos, sin = (torch.randn(batch, q_len, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
        shape = 1 + batch * 8, 64, 8, 128
        pages = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2)]
        page_table = (1 + torch.randperm(batch * 8, device=device)).reshape(batch, 8).int()
        kv_lens = torch.randint(0, 512 - q_len, (batch,), device=device, dtype=torch.int32)
        copies = [value.clone() for value in pages]

        def mine(q=q, k=k, v=v, cos=cos, sin=sin, pages=pages, rest=(page_table, kv_lens)) -> list[Tensor]:
            return [append_rotated_triton(q, k, v, cos, sin, *pages, *rest), *pages]

        def reference(q=q, k=k, v=v, cos=cos, sin=sin, pages=copies, rest=(page_table, kv_lens)) -> list[Tensor]:
            return [append_rotated.reference(q, k, v, cos, sin, *pages, *rest), *pages]

        yield measure("append_rotated", f"{batch} x {q_len}", mine, reference, 2 * (q.nbytes + k.nbytes + v.nbytes))
