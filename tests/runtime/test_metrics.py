"""Metrics: what is counted, and what the numbers mean."""

from __future__ import annotations

import pytest
from harness.models import oracle
from harness.programs import L, MixedDraft, Workshop, prompts_of, requests_of, run

from autospec.runtime.metrics import Metrics


def test_acceptance_is_counted_per_depth_and_with_the_bonus() -> None:
    metrics = Metrics()
    metrics.count(2, [4, 3, 1, 9])  # a depth past the step's own is the policy's business
    metrics.count(2, [2, 2, 2])
    assert (metrics.row_steps, metrics.reached) == (6, [5, 3])
    assert metrics.acceptance_per_depth == [5 / 6, 3 / 6]
    assert metrics.mean_acceptance_length == pytest.approx(1 + 8 / 6)


def test_plain_steps_are_counted_but_accept_nothing() -> None:
    metrics = Metrics()
    metrics.count(0, [3, 1])
    assert (metrics.steps, metrics.row_steps, metrics.reached) == ({0: 1}, 0, [])
    assert metrics.mean_acceptance_length == 1.0
    assert metrics.tokens_per_second == 0.0


def test_steps_of_different_length_are_counted_together() -> None:
    metrics = Metrics()
    metrics.count(1, [1, 1])
    metrics.count(3, [1, 1, 1, 0])
    assert (metrics.steps, metrics.reached) == ({1: 1, 3: 1}, [2, 1, 0])


def test_the_text() -> None:
    metrics = Metrics(prompt_tokens=9, new_tokens=20, seconds=0.5, first_token_seconds=0.125)
    metrics.count(2, [2, 2, 1])
    assert str(metrics).splitlines() == [
        "20 tokens in 0.50 s: 40.0 tokens/s, first token after 125 ms",
        "mean acceptance length 2.50, acceptance per depth 1.00 0.50",
        "steps: 1 of draft length 2",
    ]
    assert "steps: none" in str(Metrics())


def test_the_numbers_of_a_run() -> None:
    """Two rows, always two drafts right: prefill emits one token, each step three."""
    prompts = prompts_of(4, (5, 8))
    futures = [prompt + oracle("target", prompt, 40) for prompt in prompts]
    requests = requests_of(prompts, [7, 13])
    metrics = run(Workshop().session("ngram"), requests, script=MixedDraft(futures, accept=lambda row, step: 2))
    assert (metrics.prompt_tokens, metrics.new_tokens) == (13, 20)
    assert metrics.steps == {L: 4}
    assert metrics.row_steps == 2 + 4
    assert metrics.acceptance_per_depth == [1.0, 1.0, 0.0, 0.0]
    assert metrics.mean_acceptance_length == 3.0
    assert 0 < metrics.first_token_seconds < metrics.seconds
