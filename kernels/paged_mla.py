"""Attention of N new tokens per request in latent space over its pages (MLA): decode, chain and tree verification.

H heads of absorbed queries: q_latent [B, N, H, kv_lora_rank] (q_nope projected by w_uk) and q_rope
[B, N, H, qk_rope_head_dim]; latent_pages [num_pages, P, kv_lora_rank + qk_rope_head_dim], rows written by append_latent:
a row is the key of every head, its first kv_lora_rank elements are the value of every head. The result is still in latent
space; the caller projects it by w_uv. page_table [B, max_pages] int32; kv_lens [B] int32, rows committed before this call;
chains, trees and q_lens as in paged_attention. Windows and chunks do not exist here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autospec.kernels.attention import attend
from autospec.kernels.paged_attention import visible_slots
from autospec.kernels.registry import kernel_op


@kernel_op()
def paged_mla(
    q_latent: Tensor, q_rope: Tensor, latent_pages: Tensor, page_table: Tensor, kv_lens: Tensor,
    q_lens: Tensor | None = None, tree_mask: Tensor | None = None, scale: float = 1.0,
) -> Tensor:
    """q_latent [B, N, H, kv_lora_rank], q_rope [B, N, H, qk_rope_head_dim] -> [B, N, H, kv_lora_rank] in q_latent's dtype.

    q_lens [B] int32: valid rows per request, the rest is padding whose result is unspecified (None: all are valid);
    tree_mask [B, T, >= ceil(T/32)] int32, T >= N: q holds the last N of T nodes;
    scale: 1 / (q_scaling sqrt(qk_nope_head_dim + qk_rope_head_dim)), of the head dims before absorption.
    """
    batch, q_len, _, kv_lora_rank = q_latent.shape
    num_slots = page_table.shape[1] * latent_pages.shape[1]
    rows = latent_pages.index_select(0, page_table.reshape(-1)).reshape(batch, num_slots, 1, -1)
    visible = visible_slots(kv_lens, q_len, num_slots, 0, 0, tree_mask)
    return attend(torch.cat([q_latent, q_rope], -1), rows, rows[..., :kv_lora_rank], visible, None, scale, 0.0)
