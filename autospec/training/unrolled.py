"""The training-time test: a head is unrolled on its own output, seeing exactly what drafting will show it.

    step 0   row t: feature t and token t + 1, over the keys of step 0 up to row t      -> guesses token t + 2
    step i   row t: its own output of step i - 1 and token t + 1 + i, rotary t + i,
             over the keys of step 0 up to row t, then its own keys of steps 1 ... i    -> guesses token t + 2 + i

Row t of step i is level i of a draft that starts after feature t: rows of the cache that were committed, then its own
ancestors. The other rows of a later step belong to other drafts and are not seen.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from autospec.training.features import Features, Target
from autospec.training.loop import Batch, Loss, weights_of_steps


class UnrolledAttention:
    """The head's attention while it is unrolled; the first call of a layer is step 0."""

    def __init__(self) -> None:
        self.seen: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, layer: Hashable, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [B, Hq, S, D], k, v [B, Hkv, S, D] -> [B, S, Hq, D]."""
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        past = self.seen.setdefault(layer, [])
        past.append((k, v))
        if len(past) == 1:
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            out = self.over_ancestors(q, past, scale)
        return out.transpose(1, 2)

    @staticmethod
    def over_ancestors(q: Tensor, past: list[tuple[Tensor, Tensor]], scale: float) -> Tensor:
        """Softmax over the keys of step 0 up to the own row, and the own row's keys of each later step."""
        (first_k, first_v), later = past[0], past[1:]
        rows = torch.arange(q.shape[2], device=q.device)
        own_k, own_v = (torch.stack(parts, dim=3) for parts in zip(*later, strict=True))  # [B, H, S, steps, D]
        q = q * scale
        committed = (q @ first_k.transpose(-1, -2)).masked_fill_(rows[None, :] > rows[:, None], float("-inf"))
        own = (q[:, :, :, None] * own_k).sum(-1).to(committed.dtype)
        own = functional.pad(own, (0, -own.shape[-1] % 8), value=float("-inf"))  # matrix products like round strides
        weights = torch.cat([committed, own], dim=-1).softmax(-1, dtype=torch.float32).to(first_v.dtype)
        out = weights[..., : len(rows)] @ first_v
        return out + (weights[..., len(rows) : len(rows) + len(later), None] * own_v).sum(3)


class UnrolledLoss(Loss):
    """Soft cross-entropy of every unrolled step to the target's softmax, restricted to the draft vocabulary.

    The softmax is taken before the restriction: a position counts by how much of the target's mass the draft
    vocabulary can say.

    Args:
        steps: unrolled steps.
        decay: step i weighs decay ** i.
    """

    def __init__(self, target: Target, head: nn.Module, *, steps: int, decay: float) -> None:
        super().__init__()
        self.target, self.head, self.steps = target, head, steps
        self.weights = weights_of_steps(steps, decay)

    def vocabulary(self) -> Tensor | None:
        """[draft_vocab] target ids of the draft's tokens; None: it has the target's vocabulary."""
        return None

    def guesses(self, tokens: Tensor, features: Features) -> list[Tensor]:
        """tokens [B, S] -> [B, S - steps, draft_vocab] of logits per step."""
        raise AssertionError("every head is unrolled in its own way")

    def features(self, batch: Batch) -> Features:
        return self.target(batch.tokens)

    def count(self, batch: Batch) -> Tensor:
        return batch.weights[:, 1 : 1 + batch.tokens.shape[1] - self.steps].sum()

    def forward(self, tokens: Tensor, weights: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        """-> the loss summed over the counted positions, [3, steps]: summed losses, agreements and right prefixes."""
        logits = features.logits.float()
        best = logits.argmax(-1)
        ids = self.vocabulary()
        goals = ((logits if ids is None else logits[..., ids]) - logits.logsumexp(-1, keepdim=True)).exp()
        rows = tokens.shape[1] - self.steps

        def steps() -> Iterator[tuple[Tensor, Tensor]]:
            for i, guess in enumerate(self.guesses(tokens, features)):
                loss = -(goals[:, 1 + i : 1 + i + rows] * guess.float().log_softmax(-1)).sum(-1)
                yield loss, guess.argmax(-1) if ids is None else ids[guess.argmax(-1)]

        return self.summed(steps(), best, weights)
