"""Make every token of a step a request of its own, for kernels that take few tokens per request (expand_dsa_decode).

page_table [B, max_pages] int32, kv_lens [B] int32, rows committed before this call. Token j of request b is row b * q_len + j
of the buffers: the pages of b, and the kv_lens[b] + j rows that stand before it; request-major, so that a view of
[B, q_len, ...] is one row per token. Buffers may have more rows, which are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.launch import jit, no_gpu, tl, wrap_triton
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure


@kernel_op(mutates=("expanded_table", "expanded_lens"))
def expand_requests(
    page_table: Tensor, kv_lens: Tensor, q_len: int, expanded_table: Tensor, expanded_lens: Tensor
) -> None:
    """Write the first B * q_len rows of expanded_table [R, max_pages] int32 and expanded_lens [R] int32."""
    rows = kv_lens.shape[0] * q_len
    expanded_table[:rows].copy_(page_table.repeat_interleave(q_len, 0))
    expanded_lens[:rows].copy_((kv_lens[:, None] + torch.arange(q_len, device=kv_lens.device)).flatten())


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """Rows of the tables are copied as runs of elements."""
    for name in ("page_table", "expanded_table"):
        if args[name].stride(1) != 1:
            return f"{name} has stride {args[name].stride(1)} in its last dimension"
    return no_gpu(args)


# Row i_r is token i_n of request i_b; T pages (o_t) of a block.
@jit
def write_rows(
    p_table, p_lens, p_rows, p_row_lens, stride_tb, stride_rb, q_len, max_pages, T: tl.constexpr,
):
    i_r, i_t = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_n = i_r // q_len, i_r % q_len
    o_t = i_t * T + tl.arange(0, T)
    b_page = tl.load(p_table + i_b * stride_tb + o_t, mask=o_t < max_pages)
    tl.store(p_rows + i_r * stride_rb + o_t, b_page, mask=o_t < max_pages)
    if i_t == 0:
        tl.store(p_row_lens + i_r, tl.load(p_lens + i_b) + i_n.to(tl.int32))


@expand_requests.implementation("triton", why_not=why_not_triton)
def expand_requests_triton(
    page_table: Tensor, kv_lens: Tensor, q_len: int, expanded_table: Tensor, expanded_lens: Tensor
) -> None:
    """One launch a step, however many layers read the rows."""
    batch, max_pages = page_table.shape
    wrap_triton(write_rows)[(batch * q_len, (max_pages + 255) // 256)](
        page_table, kv_lens, expanded_table, expanded_lens, page_table.stride(0), expanded_table.stride(0), q_len, max_pages,
        T=256,
    )


def bench(device: torch.device) -> Iterator[Measurement]:
    """16 requests of 4 tokens, contexts of 128k in pages of 64."""
    page_table = torch.randint(0, 1 << 20, (16, 2048), device=device, dtype=torch.int32)
    kv_lens = torch.randint(0, 131072, (16,), device=device, dtype=torch.int32)
    buffers = torch.zeros(64, 2048, device=device, dtype=torch.int32), torch.zeros(64, device=device, dtype=torch.int32)
    others = tuple(torch.zeros_like(buffer) for buffer in buffers)

    def mine() -> Tensor:
        expand_requests_triton(page_table, kv_lens, 4, *buffers)
        return buffers[0]

    def reference() -> Tensor:
        expand_requests.reference(page_table, kv_lens, 4, *others)
        return others[0]

    yield measure("expand_requests", "16 x 4, 2048 pages", mine, reference, 5 * page_table.nbytes)
