"""DraftLengthPolicy: the draft length of the next step, from measured times and counted acceptance."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from autospec.runtime.policy import LAG, MARGIN, DraftLengthPolicy

# A step that verifies 8 drafts costs 40% more than a plain one.
SECONDS = {0: 1.0, 2: 1.1, 4: 1.2, 8: 1.4}


def _counts(draft_len: int, accepted: list[int], longest: int = 8) -> list[int]:
    """What the device counts: live rows, then rows that agreed with d drafts, one depth past the step's own."""
    depths = [sum(a >= d for a in accepted) for d in range(1, longest + 1)]
    seen = [count if d <= draft_len + 1 else 0 for d, count in enumerate(depths, 1)]
    return [len(accepted), *seen]


def _play(policy: DraftLengthPolicy, accepted: list[list[int]]) -> list[int]:
    chosen = []
    for rows in accepted:
        draft_len = policy.next_draft_len()
        chosen.append(draft_len)
        policy.observe(draft_len, _counts(draft_len, rows))
    return chosen


def test_perfect_drafts_get_the_longest_step() -> None:
    assert _play(DraftLengthPolicy(SECONDS), [[8, 8]] * 40)[-20:] == [8] * 20


def test_useless_drafts_get_plain_steps() -> None:
    assert _play(DraftLengthPolicy(SECONDS), [[0, 0]] * 40)[-20:] == [0] * 20


def test_drafts_that_become_good_are_noticed_from_a_plain_step() -> None:
    """A plain step compares its token with the first draft token, so it sees when drafts begin to fit."""
    chosen = _play(DraftLengthPolicy(SECONDS), [[0]] * 30 + [[8]] * 60)
    assert chosen[29] == 0
    assert chosen[-1] == 8


def test_moderate_drafts_get_a_moderate_step() -> None:
    chosen = _play(DraftLengthPolicy({0: 1.0, 2: 1.1, 4: 1.5, 8: 3.0}), [[2]] * 60)
    assert chosen[-20:] == [2] * 20


def test_a_step_that_costs_nothing_more_is_taken() -> None:
    assert DraftLengthPolicy(dict.fromkeys(SECONDS, 1.0)).next_draft_len() == 8


def test_counts_are_used_at_a_fixed_lag() -> None:
    policy = DraftLengthPolicy(SECONDS)
    before = policy.rates()
    for _ in range(LAG):
        policy.observe(4, _counts(4, [0]))
        assert policy.rates() == before
    policy.observe(4, _counts(4, [0]))
    assert policy.rates() < before


def test_a_small_gain_does_not_change_the_step() -> None:
    policy = DraftLengthPolicy({0: 1.0, 1: 1.0})
    policy.current, policy.trials = 0, [100.0]
    policy.hits = [100.0 * (MARGIN - 1.01)]
    assert policy.next_draft_len() == 0
    policy.hits = [100.0 * (MARGIN - 0.99)]
    assert policy.next_draft_len() == 1


def test_a_step_without_live_rows_teaches_nothing() -> None:
    policy = DraftLengthPolicy(SECONDS)
    before = policy.rates()
    for _ in range(5):
        policy.observe(8, [0] * 9)
    assert policy.rates() == before


@given(
    st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=3), max_size=60), st.permutations([1.0, 1.3, 1.1, 2.0])
)
def test_any_history(accepted: list[list[int]], seconds: list[float]) -> None:
    """Reproducible, always one of the lengths, estimates between 0 and 1 that never rise with depth."""
    times = dict(zip(SECONDS, seconds, strict=True))
    policy = DraftLengthPolicy(times)
    chosen = _play(policy, accepted)
    assert chosen == _play(DraftLengthPolicy(times), accepted)
    assert set(chosen) <= set(SECONDS)
    rates = policy.rates()
    assert rates == sorted(rates, reverse=True)
    assert all(0 <= rate <= 1 for rate in rates)


def test_noisy_drafts_settle_near_the_best_length() -> None:
    """Drafts right with probability 0.8 each: the expected tokens per second decide, within one length."""
    generator = random.Random(5)

    def row() -> int:
        return next((d for d in range(8) if generator.random() > 0.8), 8)

    chosen = _play(DraftLengthPolicy(SECONDS), [[row(), row(), row()] for _ in range(200)])
    assert min(chosen[20:]) >= 4
