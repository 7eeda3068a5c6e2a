"""The keys that each token attends to, chosen by an indexer (DeepSeek sparse attention), before any cache exists.

Hi index heads: index_q [B, S, Hi, Di], index_weights [B, S, Hi]; index_k [B, S, Di], one key per token for all heads.
A token chooses among itself and the tokens before it; ties and short rows are those of dsa_topk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autospec.kernels.dsa_topk import dsa_topk
from autospec.kernels.registry import kernel_op


def index_scores(index_q: Tensor, index_weights: Tensor, index_k: Tensor, scale: float) -> Tensor:
    """[B, S, S] float32: sum over heads of weight * relu(scale * q . k); no causality."""
    scores = torch.matmul(index_q.float(), index_k.float().unsqueeze(1).transpose(-1, -2)) * scale
    return torch.matmul(index_weights.float().unsqueeze(-2), torch.relu(scores)).squeeze(-2)


def own_score(index_q: Tensor, index_weights: Tensor, index_k: Tensor, scale: float) -> Tensor:
    """[B, S, 1] float32: every token's score of its own key; stands for a selection where tokens must not mix."""
    scores = torch.relu((index_q.float() * index_k.float().unsqueeze(2)).sum(-1) * scale)
    return (index_weights.float() * scores).sum(-1, keepdim=True)


def _fake_scores(scores: Tensor, index_topk: int) -> Tensor:
    return scores.new_empty(scores.shape[0], scores.shape[1], index_topk, dtype=torch.int32)


@kernel_op(fake=_fake_scores)
def top_keys(scores: Tensor, index_topk: int) -> Tensor:
    """scores [B, S, S] float32, as a model computes them -> the best of each causal row, [B, S, index_topk] int32, then -1."""
    lens = torch.zeros(scores.shape[0], dtype=torch.int32, device=scores.device)
    best = dsa_topk.reference(scores.float(), lens, index_topk)
    return torch.nn.functional.pad(best, (0, index_topk - best.shape[-1]), value=-1)


def _fake_keys(index_q: Tensor, index_weights: Tensor, index_k: Tensor, index_topk: int, scale: float = 1.0) -> Tensor:
    return _fake_scores(index_q, index_topk)


@kernel_op(fake=_fake_keys)
def select_keys(index_q: Tensor, index_weights: Tensor, index_k: Tensor, index_topk: int, scale: float = 1.0) -> Tensor:
    """The index_topk keys of the highest index score per token, [B, S, index_topk] int32, then -1. scale: 1 / sqrt(Di)."""
    return top_keys.reference(index_scores(index_q, index_weights, index_k, scale), index_topk)
