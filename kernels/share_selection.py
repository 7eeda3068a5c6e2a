"""The keys that a draft's nodes attend to where they reuse one selection: what the last committed row selected, and their path.

indices [B, 1, K] int32, slots that dsa_topk selected for the row at slot kv_lens - 1, then -1; kv_lens [B] int32, rows
committed. The N = q_len rows are the last of T = first + q_len nodes, which stand at slots kv_lens ... kv_lens + T - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autospec.kernels.registry import kernel_op


@kernel_op()
def share_selection(
    indices: Tensor, kv_lens: Tensor, first: int, q_len: int, tree_mask: Tensor | None = None
) -> Tensor:
    """indices [B, 1, K] -> [B, q_len, K + T] int32: the same K, then the slots of a node's ancestors and its own, or -1.

    tree_mask [B, T, >= ceil(T/32)] int32; None: a chain.
    """
    batch, nodes = kv_lens.shape[0], torch.arange(first + q_len, device=kv_lens.device, dtype=torch.int32)
    if tree_mask is None:
        seen = (nodes[None, :] <= nodes[first:, None]).expand(batch, -1, -1)
    else:
        words = tree_mask[:, -q_len:].gather(2, (nodes // 32).long().expand(batch, q_len, -1))
        seen = ((words >> (nodes % 32)) & 1) > 0
    path = torch.where(seen, kv_lens[:, None, None] + nodes, -1)
    return torch.cat([indices.expand(-1, q_len, -1), path], 2).to(torch.int32)
