"""Write the latent rows of this call's tokens into their pages (MLA).

latent [B, N, kv_lora_rank], k_rope [B, N, qk_rope_head_dim]; latent_pages [num_pages, P, kv_lora_rank + qk_rope_head_dim],
the latent first; page_table [B, max_pages] int32; kv_lens [B] int32. Node j of a request goes to slot kv_lens + j.
Physical page 0 is scratch: a slot without a page, or past the table, lands there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.append_kv import slot_pages
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


@kernel_op(mutates=("latent_pages",))
def append_latent(latent: Tensor, k_rope: Tensor, latent_pages: Tensor, page_table: Tensor, kv_lens: Tensor) -> None:
    """Write latent [B, N, kv_lora_rank] and k_rope [B, N, qk_rope_head_dim] to slots kv_lens + j; mutates the pages."""
    pages, offsets = slot_pages(kv_lens, latent.shape[1], page_table, latent_pages.shape[1])
    latent_pages.index_put_((pages, offsets), torch.cat([latent, k_rope], -1).to(latent_pages.dtype))


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """Pages are addressed by stride, their rows must be dense."""
    if args["latent_pages"].stride(-1) != 1:
        return f"latent_pages has stride {args['latent_pages'].stride(-1)} in its last dimension"
    return no_gpu(args)


# B requests (i_b), N nodes (i_n), R and E elements of latent and rope (o_r, o_e). One program moves a node's row.
@jit
def append_latent_rows(
    p_latent, p_rope, p_pages, p_table, p_lens, stride_lb, stride_ln, stride_eb, stride_en, stride_pp, stride_ps,
    stride_tb, max_pages,
    R: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    WAITS: tl.constexpr,
):
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_n, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r, o_e = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)
    slot = tl.load(p_lens + i_b) + i_n
    logical, offset = slot // PAGE, slot % PAGE
    page = tl.load(p_table + i_b * stride_tb + logical, mask=logical < max_pages, other=0).to(tl.int64)
    b_latent = tl.load(p_latent + i_b * stride_lb + i_n * stride_ln + o_r, mask=o_r < R)
    b_rope = tl.load(p_rope + i_b * stride_eb + i_n * stride_en + o_e, mask=o_e < E)
    p_row = p_pages + page * stride_pp + offset * stride_ps
    tl.store(p_row + o_r, b_latent.to(p_pages.dtype.element_ty), mask=o_r < R)
    tl.store(p_row + R + o_e, b_rope.to(p_pages.dtype.element_ty), mask=o_e < E)


@append_latent.implementation("triton", why_not=why_not_triton, waits=True)
def append_latent_triton(
    latent: Tensor, k_rope: Tensor, latent_pages: Tensor, page_table: Tensor, kv_lens: Tensor
) -> None:
    """One launch, one program per node."""
    latent, k_rope = rows_of(latent), rows_of(k_rope)
    batch, q_len, kv_lora_rank = latent.shape
    rope_dim = k_rope.shape[2]
    wrap_triton(append_latent_rows, waits=True)[(q_len, batch)](
        latent, k_rope, latent_pages, page_table, kv_lens, latent.stride(0), latent.stride(1), k_rope.stride(0),
        k_rope.stride(1), latent_pages.stride(0), latent_pages.stride(1), page_table.stride(0), page_table.shape[1],
        R=kv_lora_rank, E=rope_dim, PAGE=latent_pages.shape[1],
        BLOCK_R=power_of_2(kv_lora_rank), BLOCK_E=power_of_2(rope_dim), WAITS=can_wait(latent),
    )


def bench(device: torch.device) -> Iterator[Measurement]:
    """One layer of DeepSeek-V3: 512 + 64."""
    for batch, q_len in ((1, 1), (1, 32), (16, 4)):
        latent, k_rope = (torch.randn(batch, q_len, d, device=device, dtype=torch.bfloat16) for d in (512, 64))
        latent_pages = torch.randn(1 + batch * 8, 64, 576, device=device, dtype=torch.bfloat16)
        page_table = (1 + torch.randperm(batch * 8, device=device)).reshape(batch, 8).int()
        kv_lens = torch.randint(0, 512 - q_len, (batch,), device=device, dtype=torch.int32)
        copy = latent_pages.clone()

        def mine(latent=latent, k_rope=k_rope, pages=copy, rest=(page_table, kv_lens)) -> Tensor:
            append_latent_triton(latent, k_rope, pages, *rest)
            return pages

        def reference(latent=latent, k_rope=k_rope, pages=latent_pages, rest=(page_table, kv_lens)) -> Tensor:
            append_latent.reference(latent, k_rope, pages, *rest)
            return pages

        yield measure("append_latent", f"{batch} x {q_len}", mine, reference, 2 * (latent.nbytes + k_rope.nbytes))
