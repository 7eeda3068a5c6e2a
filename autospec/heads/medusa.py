"""Medusa heads (Cai et al., 2024): head i guesses the token at depth i + 1 from the hidden state that lm_head reads.

    x = x + silu(linear(x))   (num_layers times);   logits = lm_head_i(x)

No cache and nothing to catch up: every node of a level has the same candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autospec.heads.report import HeadReport


class MedusaBlock(nn.Module):
    """A residual block whose linear layer keeps the width."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.silu(self.linear(x))


class MedusaHeads(nn.Module):
    """Args:
        num_heads: depths that are guessed, so the longest draft.
        num_layers: residual blocks per head.
        lm_head: the target's lm_head weight [V, H], shared by all heads and never saved (None: each has its own).
    """

    def __init__(
        self, hidden_size: int, vocab_size: int, num_heads: int, num_layers: int = 1, lm_head: Tensor | None = None
    ) -> None:
        super().__init__()
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.num_heads, self.num_layers = num_heads, num_layers
        self.blocks = nn.ModuleList(
            nn.Sequential(*(MedusaBlock(hidden_size) for _ in range(num_layers))) for _ in range(num_heads)
        )
        self.lm_heads = nn.ModuleList(nn.Linear(hidden_size, vocab_size, bias=False) for _ in range(num_heads))
        self.own_lm_heads = lm_head is None
        if lm_head is not None:
            for head in self.lm_heads:
                head.weight = nn.Parameter(lm_head, requires_grad=False)
        self.report: HeadReport | None = None  # where it was loaded from

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, 1, H], what lm_head reads at the last accepted node -> logits [B, num_heads, V]."""
        pairs = zip(self.blocks, self.lm_heads, strict=True)
        return torch.cat([head(block(hidden)) for block, head in pairs], dim=1)

    def own_state(self) -> dict[str, Tensor]:
        """The heads' parameters: everything but what the target lends."""
        named = self.named_parameters(remove_duplicate=False)
        return {name: value for name, value in named if self.own_lm_heads or not name.startswith("lm_heads.")}
