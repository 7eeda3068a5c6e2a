"""Medusa heads (Cai et al., 2024): head i guesses the token at depth i + 1 from the hidden state that lm_head reads.

    x = x + silu(linear(x))   (num_layers times);   logits = lm_head_i(x)

No cache and nothing to catch up: every node of a level has the same candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


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
    """

    def __init__(self, hidden_size: int, vocab_size: int, num_heads: int, num_layers: int = 1) -> None:
        super().__init__()
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.num_heads, self.num_layers = num_heads, num_layers
        self.blocks = nn.ModuleList(
            nn.Sequential(*(MedusaBlock(hidden_size) for _ in range(num_layers))) for _ in range(num_heads)
        )
        self.lm_heads = nn.ModuleList(nn.Linear(hidden_size, vocab_size, bias=False) for _ in range(num_heads))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, 1, H], what lm_head reads at the last accepted node -> logits [B, num_heads, V]."""
        pairs = zip(self.blocks, self.lm_heads, strict=True)
        return torch.cat([head(block(hidden)) for block, head in pairs], dim=1)
