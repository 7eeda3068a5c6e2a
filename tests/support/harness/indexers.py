"""Small indexers whose scores are put together in any of several ways."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from autospec.kernels.select_keys import top_keys

Scores = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, S, Hi, Di], weights [B, S, Hi], k [B, S, Di] -> [B, S, S]


class Indexer(nn.Module):
    """x [B, S, H], positions [B, S] -> the index_topk best keys of each token, [B, S, index_topk] int32."""

    def __init__(self, scores: Scores, index_topk: int = 3, num_heads: int = 5, width: int = 6, hidden_size: int = 16) -> None:
        super().__init__()
        self.scores, self.index_topk, self.num_heads = scores, index_topk, num_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.weights_proj = nn.Linear(hidden_size, num_heads, bias=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        turned = (positions[..., None] * 0.3).cos()
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1)) * turned[..., None]
        k = self.k_proj(x).unsqueeze(2)
        k = torch.cat([k[..., :2] * turned[..., None], k[..., 2:]], -1).squeeze(2)
        return top_keys(self.scores(q, self.weights_proj(x) * 0.5, k), self.index_topk)


def indexers(scores: Scores, *which: bool) -> Callable[[], list[nn.Module | None]]:
    """One per layer, made when called: an indexer of its own, or none (the selection before it is shared)."""
    return functools.partial(lambda: [Indexer(scores) if own else None for own in which])


def written(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
    """As transformers does it."""
    scores = torch.relu(torch.matmul(q.float(), k.transpose(-1, -2).float().unsqueeze(1)) * 0.4)
    return torch.matmul(weights.float().unsqueeze(-2), scores).squeeze(-2)


def unscaled(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
    """Other views, no scale, 16-bit operands that are widened before they meet."""
    keys = k.to(torch.bfloat16)[:, :, None].permute(0, 2, 3, 1).float()
    scores = torch.relu(torch.matmul(q.to(torch.bfloat16).float(), keys))
    return torch.matmul(weights[:, :, None], scores)[:, :, 0]
