"""The objective of Medusa heads: head i, reading what lm_head reads at row t, guesses token t + 2 + i.

    row t of the target    lm_head -> token t + 1 (the bonus)    head 0 -> token t + 2    head 1 -> token t + 3 ...
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from autospec.heads.medusa import MedusaHeads
from autospec.training.features import Features, Target
from autospec.training.loop import Batch, Loss, weights_of_steps


def new_heads(target: Target, num_heads: int, num_layers: int = 1, share_lm_head: bool = False) -> MedusaHeads:
    """float32 heads that begin as the target's own lm_head, after residual blocks that add nothing.

    Args:
        share_lm_head: only the blocks are trained and saved; every head reads the target's lm_head.
    """
    weight = target.lm_head.weight.detach()
    vocab, hidden = weight.shape
    heads = MedusaHeads(hidden, vocab, num_heads, num_layers, lm_head=weight if share_lm_head else None).to(target.device)
    with torch.no_grad():
        for head in heads.lm_heads if heads.own_lm_heads else ():
            head.weight.copy_(weight)  # type: ignore[operator]
        for block in heads.blocks.modules():
            if isinstance(block, nn.Linear):
                nn.init.zeros_(block.weight)
                nn.init.zeros_(block.bias)
    return heads


class MedusaLoss(Loss):
    """Cross-entropy of every head, to the target's distribution there (soft) or to the text (hard).

    Args:
        decay: head i weighs decay ** i.
        soft: learn the target's distribution, else the text's next tokens.
    """

    def __init__(self, target: Target, heads: MedusaHeads, *, decay: float = 0.8, soft: bool = True) -> None:
        super().__init__()
        self.target, self.head, self.heads = target, heads, heads
        self.steps, self.soft = heads.num_heads, soft
        self.weights = weights_of_steps(self.steps, decay)

    def features(self, batch: Batch) -> Features:
        return self.target(batch.tokens)

    def count(self, batch: Batch) -> Tensor:
        return batch.weights[:, 1 : batch.tokens.shape[1] - self.steps].sum()

    def forward(self, tokens: Tensor, weights: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        """-> the loss summed over the counted positions, [3, heads]: summed losses, agreements and right prefixes."""
        goals = features.logits.float()
        best = goals.argmax(-1)
        goals = goals.softmax(-1)
        rows = tokens.shape[1] - 1 - self.steps
        hidden = features.hidden[:, :rows].float()

        def steps() -> Iterator[tuple[Tensor, Tensor]]:
            for i, (block, lm_head) in enumerate(zip(self.heads.blocks, self.heads.lm_heads, strict=True)):
                guess = lm_head(block(hidden).to(lm_head.weight.dtype)).float()
                if self.soft:
                    loss = -(goals[:, 1 + i : 1 + i + rows] * guess.log_softmax(-1)).sum(-1)
                else:
                    text = tokens[:, 2 + i : 2 + i + rows, None]
                    loss = -guess.log_softmax(-1).gather(-1, text)[..., 0]
                yield loss, guess.argmax(-1)

        return self.summed(steps(), best, weights)
