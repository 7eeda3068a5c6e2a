"""Attention as captured: stateless and causal over one sequence, before any cache exists.

q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] -> [B, S, Hq, Dv]. Hq is a multiple of Hkv.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autospec.kernels.registry import kernel_op


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sinks: Tensor | None, scale: float, softcap: float,
    bias: Tensor | None = None, q_lens: Tensor | None = None,
) -> Tensor:
    """Grouped-query attention with an explicit mask; the arithmetic shared by every attention reference.

    q [B, N, Hq, D]; k [B, T, Hkv, D]; v [B, T, Hkv, Dv]; visible bool, broadcastable to [B, N, T];
    sinks [Hq], one extra logit per head that takes probability and gives nothing; bias float32, broadcastable to
    [B, Hq, N, T], added to the scores behind scale and softcap. -> [B, N, Hq, Dv].
    q_lens [B]: queries past it are padding, whose result is unspecified. What lies in rows that no other query sees, NaN
    included, changes nothing: a page holds what the request before left there.
    """
    batch, q_len, q_heads, _ = q.shape
    looking = visible if q_lens is None else visible & (torch.arange(q_len, device=q.device) < q_lens[:, None])[..., None]
    seen = looking.any(1)[:, :, None, None]
    k, v = torch.where(seen, k, 0.0), torch.where(seen, v, 0.0)
    kv_heads, v_dim = k.shape[2], v.shape[3]
    group = q_heads // kv_heads
    # Queries that share a K/V head become rows of one matrix: K and V are read once and never repeated.
    rows = q.reshape(batch, q_len, kv_heads, group, -1).transpose(1, 2).reshape(batch, kv_heads, q_len * group, -1)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    mask = visible[:, None, :, None, :].expand(-1, -1, -1, group, -1).reshape(visible.shape[0], 1, q_len * group, -1)
    if bias is not None:
        shape = (batch, kv_heads, group, q_len, k.shape[1])
        bias = bias.expand(batch, q_heads, q_len, -1).reshape(shape).transpose(2, 3)
        bias = bias.reshape(batch, kv_heads, q_len * group, -1)
        if softcap == 0.0 and sinks is None:
            mask = torch.where(mask, bias, float("-inf")).to(q.dtype)
    if softcap == 0.0 and sinks is None:
        out = torch.nn.functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    else:
        scores = torch.matmul(rows, keys.transpose(-1, -2)).float() * scale
        if softcap != 0.0:
            scores = torch.tanh(scores / softcap) * softcap
        if bias is not None:
            scores = scores + bias
        scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            extra = sinks.float().reshape(1, kv_heads, 1, group).expand(batch, -1, q_len, -1)
            extra = extra.reshape(batch, kv_heads, -1, 1)
            scores = torch.cat([scores, extra], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : k.shape[1]]
        out = torch.matmul(weights.to(values.dtype), values)
    out = out.reshape(batch, kv_heads, q_len, group, v_dim).permute(0, 2, 1, 3, 4)
    return out.reshape(batch, q_len, q_heads, v_dim).contiguous()


def _fake(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, scale: float = 1.0, window: int = 0, chunk: int = 0,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, indices: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@kernel_op(fake=_fake)
def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, scale: float = 1.0, window: int = 0, chunk: int = 0,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, indices: Tensor | None = None,
) -> Tensor:
    """Causal attention; `window` > 0 sees the last `window` positions, `chunk` > 0 only its own chunk, self included.

    q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], sinks [Hq] -> [B, S, Hq, Dv], dtype of q.
    alibi_slopes [Hq] float32: each head adds its slope times (key position - query position) to its scores.
    indices [B, S, K] int32: each token sees only these positions of those (-1: none); None: it sees all of them.
    """
    slots = torch.arange(q.shape[2], device=q.device)
    visible = see(slots[:, None], slots[None, :], window, chunk)[None]
    if indices is not None:
        visible = visible & chosen(indices, q.shape[2])
    bias = None if alibi_slopes is None else alibi_bias(alibi_slopes, slots[None, :], slots[None, :])
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible, sinks, scale, softcap, bias)


def chosen(indices: Tensor, length: int) -> Tensor:
    """indices [B, S, K] int32, -1 for none -> bool [B, S, length], true at these positions."""
    marks = torch.zeros(*indices.shape[:2], length + 1, dtype=torch.bool, device=indices.device)
    return marks.scatter(2, torch.where(indices < 0, length, indices).long(), True)[..., :length]


def alibi_bias(slopes: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """slopes [Hq], query positions [B, N], key positions [B, T] -> bias [B, Hq, N, T] float32."""
    distance = (key[:, None, :] - query[:, :, None]).float()
    return slopes.float()[None, :, None, None] * distance[:, None]


def see(query: Tensor, key: Tensor, window: int, chunk: int) -> Tensor:
    """Which key positions a query position sees; broadcasts. The only place where window and chunk are interpreted."""
    visible = key <= query
    if window > 0:
        visible = visible & (key > query - window)
    if chunk > 0:
        visible = visible & (key // chunk == query // chunk)
    return visible
