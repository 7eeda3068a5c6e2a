"""Attention whose keys and values are projected from one latent per token, before any cache exists (MLA).

q_nope [B, H, S, qk_nope_head_dim], q_rope [B, H, S, qk_rope_head_dim]; latent [B, S, kv_lora_rank] (normed) and k_rope
[B, S, qk_rope_head_dim] (rotated), both shared by all heads; w_uk [H, qk_nope_head_dim, kv_lora_rank] and
w_uv [H, v_head_dim, kv_lora_rank] project the latent to a head's keys and values; sinks [H] as in attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autospec.kernels.attention import attention
from autospec.kernels.registry import kernel_op


def expand_latent(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, S, D], k [B, H, S, D] and v [B, H, S, v_head_dim] of the same attention, D = nope and rope together."""
    k_nope, v = (torch.matmul(latent[:, None], weight.transpose(1, 2)) for weight in (w_uk, w_uv))
    shared = k_rope[:, None].expand(-1, w_uk.shape[0], -1, -1)
    return torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, shared], -1), v


def _fake(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float = 1.0,
    indices: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:
    return q_nope.new_empty(q_nope.shape[0], q_nope.shape[2], q_nope.shape[1], w_uv.shape[1])


@kernel_op(fake=_fake)
def latent_attention(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float = 1.0,
    indices: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention with keys cat(w_uk latent, k_rope) and values w_uv latent -> [B, S, H, v_head_dim].

    scale: 1 / (q_scaling sqrt(qk_nope_head_dim + qk_rope_head_dim)) in the checkpoints' terms; indices as in attention.
    """
    expanded = expand_latent(q_nope, q_rope, latent, k_rope, w_uk, w_uv)
    return attention.reference(*expanded, sinks, scale, indices=indices)
