"""The law of training-time test: step i of the unrolled head is level i of a draft, at every position."""

from __future__ import annotations

import pytest
import torch
from harness.training import VOCAB, drafted, random_head
from torch import Tensor

from autospec.training.eagle3 import Eagle3Loss
from autospec.training.features import Target
from autospec.training.unrolled import UnrolledAttention

STEPS = 5
OVER_ANCESTORS = UnrolledAttention.over_ancestors


def largest_difference(target: Target, num_layers: int = 1) -> float:
    """Between unrolled logits and those of eager drafts that are fed the same tokens, over all rows and steps."""
    head = random_head(target, draft_vocab_size=40, num_layers=num_layers)
    loss = Eagle3Loss(target, head, steps=STEPS)
    tokens = torch.randint(VOCAB, (2, 14), generator=torch.Generator().manual_seed(3))
    taps = target(tokens).taps
    with torch.no_grad():
        unrolled = loss.unrolled(tokens, taps)
    worst = 0.0
    for start in range(tokens.shape[1] - STEPS):
        levels = drafted(head, tokens, taps, start, lambda i, _, t=start: tokens[:, t + 1 + i], STEPS)
        for i, level in enumerate(levels):
            worst = max(worst, float((unrolled[i][:, start] - level).abs().max()))
    return worst


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_step_of_the_unrolled_head_is_a_level_of_a_draft(target: Target, num_layers: int) -> None:
    assert largest_difference(target, num_layers) < 2e-4


def all_rows_of_later_steps(q: Tensor, past: list[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """Planted: later steps are seen causally, so a draft sees the rows of other drafts."""
    k, v = (torch.cat(parts, dim=2) for parts in zip(*past, strict=True))
    rows = torch.arange(q.shape[2])
    hidden = (rows[None, :] > rows[:, None]).repeat(1, len(past))
    return (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def one_row_less(q: Tensor, past: list[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """Planted: the last committed row is not seen."""
    k, v = past[0]
    rows = torch.arange(q.shape[2])
    committed = (q @ k.transpose(-1, -2) * scale).masked_fill(rows[None, :] >= rows[:, None], float("-inf"))
    own = [(q * k).sum(-1, keepdim=True) * scale for k, _ in past[1:]]
    weights = torch.cat([committed, *own], dim=-1).softmax(-1)
    later = sum(weights[..., len(rows) + i, None] * v for i, (_, v) in enumerate(past[1:]))
    return weights[..., : len(rows)] @ v + later


def only_the_newest_row(q: Tensor, past: list[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """Planted: ancestors between the committed rows and the row itself are forgotten."""
    return OVER_ANCESTORS(q, [past[0], past[-1]], scale)


@pytest.mark.parametrize("planted", [all_rows_of_later_steps, one_row_less, only_the_newest_row], ids=lambda f: f.__name__)
def test_the_law_sees_planted_bugs(target: Target, planted: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnrolledAttention, "over_ancestors", staticmethod(planted))
    assert largest_difference(target) > 1e-2


def test_the_law_sees_a_rotary_position_that_stands_still(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    head_of = random_head

    def still(*args: object, **options: object) -> object:
        head = head_of(*args, **options)  # type: ignore[arg-type]
        forward = head.forward
        monkeypatch.setattr(head, "forward", lambda ids, hidden, positions: forward(ids, hidden, positions - positions[:, :1]))
        return head

    monkeypatch.setattr(f"{__name__}.random_head", still)
    assert largest_difference(target) > 1e-2


def test_steps_weigh_less_and_less_and_sum_to_one(target: Target) -> None:
    loss = Eagle3Loss(target, random_head(target), steps=7, decay=0.8)
    assert sum(loss.weights) == pytest.approx(1.0)
    assert loss.weights[3] / loss.weights[2] == pytest.approx(0.8)
