"""How often a draft head says what its target says, teacher-forced: a check of a checkpoint before anything is compiled.

    step 0   row t: the target's features at t, token t + 1          -> compared with the target's choice after t + 1
    step u   row t: its own output of step u - 1, token t + 1 + u    -> compared with the target's choice after t + 1 + u

A row of step u sees the features of rows up to t and its own earlier steps: what drafting a chain from t sees, if every
draft token is the true one. The same is done with every tap one layer lower and higher, because checkpoints disagree on
what a layer's number means, and a wrong tap costs acceptance without ever making an output wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autospec.errors import OptionError
from autospec.heads.eagle3 import Eagle3Head
from autospec.heads.medusa import MedusaHeads
from autospec.model_zoo.draft_heads import COUNTS_INPUTS, COUNTS_OUTPUTS

STANDARD_ERRORS = 3.0  # by which shifted taps must be better before they are called right; a choice, not a measurement


@dataclass(frozen=True)
class Agreement:
    """Shares of positions where the target's choice is among the head's best, per unroll step (Medusa: per head)."""

    tap_after: tuple[int, ...]
    top_1: tuple[float, ...]
    top_k: tuple[float, ...]


@dataclass(frozen=True)
class AgreementReport:
    """Args:
        asked: with the taps of the head.
        shifted: with all taps one layer lower or higher, where there are such layers.
        positions: positions that were compared at step 0.
        k: how many of the head's best tokens top_k counts.
        convention: how the checkpoint's ids were read.
    """

    asked: Agreement
    shifted: tuple[Agreement, ...]
    positions: int
    k: int
    convention: str = ""

    @property
    def better(self) -> Agreement | None:
        """Shifted taps that agree more than chance explains."""
        ours = self.asked.top_1[0]
        best = max(self.shifted, key=lambda one: one.top_1[0], default=self.asked)
        spread = sum(rate * (1 - rate) for rate in (ours, best.top_1[0])) / self.positions
        return best if best.top_1[0] - ours > STANDARD_ERRORS * max(spread, 1 / self.positions**2) ** 0.5 else None

    @property
    def verdict(self) -> str:
        """One sentence: the taps are the best of their neighbours, or which ones are better and what that suggests."""
        ours, better = self.asked, self.better
        if not ours.tap_after:
            return f"{len(ours.top_1)} heads agree {', '.join(f'{rate:.0%}' for rate in ours.top_1)}"
        if better is None:
            return f"taps {ours.tap_after} agree {ours.top_1[0]:.0%}, and no neighbouring ones agree more"
        higher = better.tap_after[0] > ours.tap_after[0]
        guess = "the head was probably trained on other layers"
        if self.convention == COUNTS_INPUTS.counts and higher:
            guess = "the checkpoint probably counts outputs"
        elif self.convention == COUNTS_OUTPUTS.counts and not higher:
            guess = "the checkpoint probably counts inputs"
        return f"taps {ours.tap_after} agree {ours.top_1[0]:.0%}, taps {better.tap_after} {better.top_1[0]:.0%}: {guess}"

    def __str__(self) -> str:
        def row(one: Agreement) -> str:
            rates = "  ".join(f"{a:.1%}/{b:.1%}" for a, b in zip(one.top_1, one.top_k, strict=True))
            return f"  {one.tap_after or 'heads'}: {rates}"

        head = f"top-1/top-{self.k} agreement per step, {self.positions} positions"
        return "\n".join([head, *(row(one) for one in (self.asked, *self.shifted)), self.verdict])


@torch.no_grad()
def teacher_forced_agreement(
    target: nn.Module, head: Eagle3Head | MedusaHeads, input_ids: Tensor, top_k: int = 10, *, num_steps: int = 3
) -> AgreementReport:
    """Compare a head with its target on a text.

    Args:
        target: a Hugging Face causal LM in eval mode.
        input_ids: [1, S] int64, best a text that the target wrote itself.
        num_steps: passes of the head; Medusa has as many as heads.
    """
    steps = head.num_heads if isinstance(head, MedusaHeads) else num_steps
    vocabulary = head.vocab_size if isinstance(head, MedusaHeads) else head.spec.draft_vocab_size
    for name, value, most in (("top_k", top_k, vocabulary), ("num_steps", steps, input_ids.shape[1] - 2)):
        if not 1 <= value <= most:
            raise OptionError(f"{name} is {value}, and must be from 1 to {most}", at=f"{name}={value}",
                              where="teacher_forced_agreement", help="give a longer text or a smaller number")  # fmt: skip
    states, read_by_lm_head, logits = _run(target, input_ids)
    chosen = logits[0].argmax(-1)  # [S]: the target's choice after position t
    positions = input_ids.shape[1] - 1
    if isinstance(head, MedusaHeads):
        weight = next(head.parameters())
        rows = head(read_by_lm_head[0].unsqueeze(1).to(weight.device, weight.dtype))[:-1]  # [S - 1, num_heads, V]
        ranked = (rows[:, step].topk(top_k).indices for step in range(steps))
        return AgreementReport(_compare((), ranked, chosen), (), positions, top_k)
    taps = head.spec.tap_after
    shifts = [tuple(tap + by for tap in taps) for by in (-1, 1)]
    inside = [one for one in shifts if min(one) >= 0 and max(one) < len(states)]
    asked, *shifted = (_compare(one, _unroll(head, states, one, input_ids, top_k, steps), chosen) for one in (taps, *inside))
    convention = head.report.tap_convention if head.report else ""
    return AgreementReport(asked, tuple(shifted), positions, top_k, convention)


def _compare(tap_after: tuple[int, ...], ranked: Iterator[Tensor], chosen: Tensor) -> Agreement:
    """ranked: per step, target ids [S - 1, top_k] of the rows' best tokens, best first."""
    firsts, anys = [], []
    for step, best in enumerate(ranked):
        wanted = chosen[1 + step :, None].to(best.device)
        hits = best[: len(wanted)] == wanted
        firsts.append(float(hits[:, 0].float().mean()))
        anys.append(float(hits.any(-1).float().mean()))
    return Agreement(tap_after, tuple(firsts), tuple(anys))


class _Chains:
    """Attention in which every row is a chain of its own on top of the committed rows up to it."""

    def __init__(self) -> None:
        self.steps: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [B, Hq, S, D], k, v [B, Hkv, S, D] of one step -> [B, S, Hq, D]."""
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        steps = self.steps.setdefault(layer, [])
        steps.append((k, v))
        (features, values), own = steps[0], steps[1:]
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ features.transpose(-1, -2)).float().masked_fill(later, float("-inf"))
        mine = [(q * key).sum(-1, keepdim=True).float() for key, _ in own]
        shares = torch.softmax(torch.cat([scores, *mine], dim=-1) * scale, dim=-1).to(q.dtype)
        out = shares[..., : q.shape[2]] @ values
        for index, (_, value) in enumerate(own):
            out = out + shares[..., q.shape[2] + index, None] * value
        return out.transpose(1, 2)


def _unroll(
    head: Eagle3Head, states: list[Tensor], tap_after: tuple[int, ...], input_ids: Tensor, top_k: int, num_steps: int
) -> Iterator[Tensor]:
    """Target ids [S - 1, top_k] of the best tokens of every row, step by step."""
    weight = head.fc.weight
    ids, rows = input_ids.to(weight.device), input_ids.shape[1] - 1
    taps = torch.cat([states[tap][:, :rows].to(weight.device, weight.dtype) for tap in tap_after], dim=-1)
    hidden, positions = head.fuse(taps), torch.arange(rows, device=weight.device)[None]
    tokens_of, before, head.attend = head.vocabulary(), head.attend, _Chains().attend
    try:
        for step in range(num_steps):
            fed = nn.functional.pad(ids[:, 1 + step :], (0, step))  # rows at the end have no token; nothing compares them
            logits, hidden = head(fed, hidden, positions + step)
            yield tokens_of[logits[0].topk(top_k).indices]
    finally:
        head.attend = before


def _run(target: Any, input_ids: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Outputs of all decoder layers, what lm_head reads, and logits, all [1, S, ...]."""
    config = target.config.get_text_config() if hasattr(target.config, "get_text_config") else target.config
    depth = int(config.num_hidden_layers)
    seen: dict[str, Tensor] = {}
    lists = [part for part in target.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    reader = target.get_output_embeddings()
    if not lists or reader is None:
        raise OptionError(f"the target's {depth} layers stand in no list, or it has no lm_head", at=type(target).__name__,
                          where="teacher_forced_agreement", help="give a decoder-only causal LM of transformers")  # fmt: skip
    # hidden_states ends with the normed state, so the last layer's own output is caught as it leaves it.
    hooks = [
        lists[0][-1].register_forward_hook(
            lambda _, __, out: seen.__setitem__("last", out[0] if isinstance(out, tuple) else out)
        ),
        reader.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("read", inputs[0])),
    ]
    try:
        out = target(input_ids=input_ids.to(next(target.parameters()).device), output_hidden_states=True, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if out.hidden_states is None or len(out.hidden_states) != depth + 1:
        raise OptionError(f"the target returns no hidden state per layer of its {depth}", at=type(target).__name__,
                          where="teacher_forced_agreement", help="its taps cannot be checked this way")  # fmt: skip
    return [*out.hidden_states[1:-1], seen["last"]], seen["read"], out.logits
