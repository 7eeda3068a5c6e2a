"""Attention of N new tokens per request over its pages: prefill, decode, chain and tree verification in one op.

q [B, N, Hq, D]; k_pages [num_pages, P, Hkv, D]; v_pages [num_pages, P, Hkv, Dv]; page_table [B, max_pages] int32;
kv_lens [B] int32, rows committed before this call; the N new rows were appended at slots kv_lens ... kv_lens + N - 1.
Without `tree_mask` node j is at position kv_lens + j and sees everything up to itself (a chain).
With it, node j is at position kv_lens + depth, depth = popcount of its mask row - 1, and sees the committed rows
and its ancestors. Windows and chunks are measured in positions, never in slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autospec.kernels.attention import attend, see
from autospec.kernels.registry import kernel_op


def unpack_tree_mask(tree_mask: Tensor, q_len: int) -> Tensor:
    """tree_mask [B, N, ceil(N/32)] int32 -> bool [B, N, N]: node j is visible from node i."""
    node = torch.arange(q_len, device=tree_mask.device)
    words = tree_mask.index_select(2, node // 32)
    return ((words >> (node % 32).to(torch.int32)) & 1).bool()


def visible_slots(
    kv_lens: Tensor, q_len: int, num_slots: int, window: int, chunk: int, tree_mask: Tensor | None
) -> Tensor:
    """Which of a request's slots each of its nodes sees: bool [B, N, num_slots]."""
    committed = kv_lens.long()[:, None]
    slot = torch.arange(num_slots, device=kv_lens.device)[None, :]
    if tree_mask is None:
        query = committed + torch.arange(q_len, device=kv_lens.device)[None, :]
        return see(query[:, :, None], slot[:, None, :], window, chunk)
    among_nodes = unpack_tree_mask(tree_mask, q_len)
    depth = among_nodes.sum(-1) - 1
    query = committed + depth
    node = slot - committed  # which node a slot holds; negative: committed
    is_node = (node >= 0) & (node < q_len)
    node = node.clamp(0, q_len - 1)
    position = torch.where(is_node, committed + depth.gather(1, node), slot)
    linked = among_nodes.gather(2, node[:, None, :].expand(-1, q_len, -1))
    allowed = torch.where(is_node[:, None, :], linked, slot[:, None, :] < committed[:, :, None])
    return allowed & see(query[:, :, None], position[:, None, :], window, chunk)


@kernel_op()
def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None = None,
    tree_mask: Tensor | None = None, sinks: Tensor | None = None, scale: float = 1.0, window: int = 0, chunk: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """q [B, N, Hq, D] -> [B, N, Hq, Dv] in q's dtype.

    q_lens [B] int32: valid rows per request, the rest is padding whose result is unspecified (None: all are valid);
    tree_mask [B, N, ceil(N/32)] int32; sinks [Hq]; window, chunk, softcap 0 for none.
    """
    batch, q_len = q.shape[:2]
    max_pages, page_size = page_table.shape[1], k_pages.shape[1]
    num_slots = max_pages * page_size
    pages = page_table.reshape(-1)
    k = k_pages.index_select(0, pages).reshape(batch, num_slots, *k_pages.shape[2:])
    v = v_pages.index_select(0, pages).reshape(batch, num_slots, *v_pages.shape[2:])
    visible = visible_slots(kv_lens, q_len, num_slots, window, chunk, tree_mask)
    return attend(q, k, v, visible, sinks, scale, softcap)
