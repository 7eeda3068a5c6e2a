"""Which slots of a request a new token may see, as references of attention and of selections need it: in chains and in trees.

kv_lens [B] int32, rows committed before this call; the N new rows are at slots kv_lens ... kv_lens + N - 1, and a tree_mask says
which of them each sees (`autospec.kernels.paged_attention`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from autospec.kernels.attention import see


def unpack_tree_mask(tree_mask: Tensor) -> Tensor:
    """tree_mask [B, T, >= ceil(T/32)] int32 -> bool [B, T, T]: node j is visible from node i."""
    node = torch.arange(tree_mask.shape[1], device=tree_mask.device)
    words = tree_mask.index_select(2, node // 32)
    return ((words >> (node % 32).to(torch.int32)) & 1).bool()


def slot_positions(
    kv_lens: Tensor, q_len: int, num_slots: int, tree_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Positions of the nodes [B, N], of what the slots hold [B, num_slots], and which slots a tree links, or None."""
    committed = kv_lens.long()[:, None]
    slot = torch.arange(num_slots, device=kv_lens.device)[None, :]
    if tree_mask is None:
        return committed + torch.arange(q_len, device=kv_lens.device)[None, :], slot, None
    among_nodes = unpack_tree_mask(tree_mask)
    count = tree_mask.shape[1]
    depth = among_nodes.sum(-1) - 1
    node = slot - committed  # which node a slot holds; negative: committed
    is_node = (node >= 0) & (node < count)
    node = node.clamp(0, count - 1)
    position = torch.where(is_node, committed + depth.gather(1, node), slot)
    linked = among_nodes[:, count - q_len :].gather(2, node[:, None, :].expand(-1, q_len, -1))
    allowed = torch.where(is_node[:, None, :], linked, slot[:, None, :] < committed[:, :, None])
    return committed + depth[:, count - q_len :], position, allowed


def visible_slots(
    kv_lens: Tensor, q_len: int, num_slots: int, window: int, chunk: int, tree_mask: Tensor | None
) -> Tensor:
    """Which of a request's slots each of its nodes sees: bool [B, N, num_slots]."""
    query, position, allowed = slot_positions(kv_lens, q_len, num_slots, tree_mask)
    visible = see(query[:, :, None], position[:, None, :], window, chunk)
    return visible if allowed is None else allowed & visible
