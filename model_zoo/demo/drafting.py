"""Drafting with a head in plain PyTorch: the yardstick that says how long its drafts are accepted.

Greedy decoding emits the target's own text whatever the draft, so the text is generated first, and what is drafted at
each of its positions follows from the text before it alone: the rows of the head's cache that are committed there were
all made from the target's features. So one pass makes the committed rows of all positions, the drafts of all positions
grow together, and a request is then walked step by step, from one position to the one that its draft reaches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from autospec.heads.eagle3 import Eagle3Head
from autospec.heads.medusa import MedusaHeads


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The shape of a draft: a dynamic tree, or with width 1 a chain."""

    width: int  # K = dynamic_tree_max_topk
    levels: int  # D = max_draft_len
    nodes: int  # M = max_total_draft_tokens, the root not counted


CHAIN = Tree(width=1, levels=8, nodes=8)
TREE = Tree(width=10, levels=8, nodes=59)


class CommittedThenTree:
    """The head's attention: first all committed rows at once, then level after level of every position's draft.

    Args:
        starts: [P] the last committed row of each position.
    """

    def __init__(self, starts: Tensor) -> None:
        self.starts = starts
        self.committed: dict[int, tuple[Tensor, Tensor]] = {}
        self.tree: dict[int, tuple[Tensor, Tensor]] = {}
        self.sees: Tensor | None = None  # [B, P, K, slots] of the level that runs; None: the committed rows run

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [B, Hq, S, D], k, v [B, Hkv, S, D] -> [B, S, Hq, D], where S is all rows, or P * K."""
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        if self.sees is None:
            self.committed[layer] = (k, v)
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
        k, v = (x.unflatten(2, (len(self.starts), -1)) for x in (k, v))
        if layer in self.tree:
            k, v = (torch.cat(pair, dim=3) for pair in zip(self.tree[layer], (k, v), strict=True))
        self.tree[layer] = (k, v)
        q = q.unflatten(2, (len(self.starts), -1))  # [B, H, P, K, D]
        first_k, first_v = self.committed[layer]
        slots = torch.arange(first_k.shape[2], device=q.device)
        rows = torch.einsum("bhpkd,bhsd->bhpks", q, first_k) * scale
        rows = rows.masked_fill((slots > self.starts[:, None])[None, None, :, None], float("-inf"))
        own = (torch.einsum("bhpkd,bhpmd->bhpkm", q, k) * scale).masked_fill(~self.sees[:, None], float("-inf"))
        weights = torch.cat([rows, own], dim=-1).softmax(-1)
        out = torch.einsum("bhpks,bhsd->bhpkd", weights[..., : len(slots)], first_v)
        out = out + torch.einsum("bhpkm,bhpmd->bhpkd", weights[..., len(slots) :], v)
        return out.flatten(2, 3).transpose(1, 2)


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of the last dimension, ties to the lower index."""
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], order[..., :count]


def proposals(head: Eagle3Head, logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """logits [..., Vd] -> log-probabilities, target ids [..., width] of each node's best children."""
    logs = logits.float().log_softmax(-1).clamp(max=0.0).nan_to_num(nan=float("-inf"))
    values, order = logs.topk(width, dim=-1)
    by_index = order.argsort(dim=-1)  # topk promises no order among equals
    values, order = values.gather(-1, by_index), order.gather(-1, by_index)
    values, place = best(values, width)
    return values, head.vocabulary()[order.gather(-1, place)]


@torch.no_grad()
def accepted_lengths(head: Eagle3Head, tokens: Tensor, taps: Tensor, starts: Tensor, tree: Tree) -> Tensor:
    """How many draft tokens the target accepts at each position.

    Args:
        tokens: [B, S] the target's text; token starts + 1 is the root of a draft.
        taps: [B, S, num_taps * H] the target's features of it.
        starts: [P] rows; all rows up to starts are committed.

    Returns:
        [B, P] accepted draft tokens, 0 to tree.levels.
    """
    B, P, K = len(tokens), len(starts), tree.width
    attend = CommittedThenTree(starts)
    usual, head.attend = head.attend, attend
    rows = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    logits, out = head(tokens[:, 1:], head.fuse(taps[:, :-1]), rows[None])
    hidden = out[:, starts, None].expand(B, P, K, -1)
    scores, found = proposals(head, logits[:, starts], K)  # the frontier: [B, P, K]
    matches = found == tokens[:, starts + 2][..., None]
    history = [(scores, matches.long())]  # (score, depth up to which the path is the target's, or 0)
    sees = torch.eye(K, dtype=torch.bool, device=tokens.device).expand(B, P, K, K)
    for level in range(1, tree.levels):
        attend.sees = sees
        position = (starts + level)[None, :, None].expand(B, P, K).flatten(1)
        logits, out = head(found.flatten(1), hidden.flatten(1, 2), position)
        logs, children = proposals(head, logits.unflatten(1, (P, K)), K)  # [B, P, K, K]
        all_scores = (scores[..., None] + logs).flatten(2)
        right = matches[..., None] & (children == tokens[:, starts + 2 + level][..., None, None])
        history.append((all_scores, right.flatten(2) * (level + 1)))
        scores, chosen = best(all_scores, K)
        parent = chosen // K
        found, matches = children.flatten(2).gather(-1, chosen), right.flatten(2).gather(-1, chosen)
        hidden = out.unflatten(1, (P, K)).gather(2, parent[..., None].expand(B, P, K, out.shape[-1]))
        seen = sees.gather(2, parent[..., None].expand(B, P, K, sees.shape[-1]))
        sees = torch.cat([seen, torch.eye(K, dtype=torch.bool, device=tokens.device).expand(B, P, K, K)], dim=-1)
    head.attend = usual
    all_scores, reached = (torch.cat(parts, dim=-1) for parts in zip(*history, strict=True))
    _, kept = best(all_scores, tree.nodes)
    return reached.gather(-1, kept).amax(-1)


@torch.no_grad()
def medusa_accepted_lengths(heads: MedusaHeads, tokens: Tensor, hidden: Tensor, starts: Tensor) -> Tensor:
    """As `accepted_lengths`, for the chain of the heads' best tokens; hidden [B, S, H] is what lm_head reads."""
    right = torch.ones(len(tokens), len(starts), dtype=torch.bool, device=tokens.device)
    lengths = torch.zeros_like(right, dtype=torch.long)
    for i, (block, lm_head) in enumerate(zip(heads.blocks, heads.lm_heads, strict=True)):
        guess = lm_head(block(hidden[:, starts]).to(lm_head.weight.dtype)).argmax(-1)
        right = right & (guess == tokens[:, starts + 2 + i])
        lengths = lengths + right
    return lengths


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What requests did: verify steps taken, and how many of them accepted at least 1, 2, ... draft tokens."""

    steps: int
    reached: list[int]

    @property
    def acceptance_length(self) -> float:
        """Tokens per step, the bonus included."""
        return 1 + sum(self.reached) / max(1, self.steps)

    def report(self) -> dict[str, float | int | list[float]]:
        """The walk as numbers: mean acceptance length, and acceptance per depth."""
        rates = [round(count / max(1, self.steps), 3) for count in self.reached]
        return {"steps": self.steps, "acceptance_length": round(self.acceptance_length, 3), "per_depth": rates}


def walk(lengths: Tensor, stops: Tensor, levels: int) -> Walk:
    """lengths [B, P] accepted at each position, stops [B]: a step that begins there or later does not count."""
    steps, reached = 0, [0] * levels
    for row, stop in zip(lengths.tolist(), stops.tolist(), strict=True):
        place = 0
        while place < min(stop, len(row)):
            for depth in range(row[place]):
                reached[depth] += 1
            steps += 1
            place += row[place] + 1
    return Walk(steps=steps, reached=reached)
