"""Sampled tokens follow the distribution that transformers' warpers define."""

from __future__ import annotations

import pytest
import torch
from harness.models import VOCAB, logits, processors
from harness.programs import Workshop, prompts_of, requests_of, run

from autospec.kernels.noise import row_key
from autospec.runtime.request import SamplingParams

PROMPT = prompts_of(21, (9,))[0]
DRAWS, ROWS = 4096, 128

CASES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=2.5),
    SamplingParams(temperature=2.0, top_k=6),
    SamplingParams(temperature=2.0, top_p=0.8),
    SamplingParams(temperature=3.0, min_p=0.1),
    SamplingParams(temperature=2.0, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
]


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    return Workshop()


def _chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """The statistic over bins with at least 5 expected draws, the rest pooled; and its degrees of freedom."""
    large = expected >= 5
    bins = [(counts[large], expected[large])]
    if bool((~large).any()) and float(expected[~large].sum()) > 0:
        bins.append((counts[~large].sum()[None], expected[~large].sum()[None]))
    observed, wanted = (torch.cat(parts) for parts in zip(*bins, strict=True))
    return float(((observed - wanted) ** 2 / wanted).sum()), len(observed) - 1


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_the_first_token(workshop: Workshop, sampling: SamplingParams) -> None:
    """One prompt under many seeds; fixed seeds, so the outcome is always the same."""
    session = workshop.session("plain", sampling=True, batch=ROWS)
    counts = torch.zeros(VOCAB)
    for start in range(0, DRAWS, ROWS):
        requests = requests_of([PROMPT] * ROWS, 1, sampling, [row_key(start + row, 0, 0) for row in range(ROWS)])
        run(session, requests)
        for request in requests:
            counts[request.output[0]] += 1
    scores = processors(sampling)(torch.tensor([PROMPT]), logits("target", PROMPT)[None])[0]
    expected = torch.softmax(scores, -1) * DRAWS
    assert not counts[expected == 0].any(), "a filtered token was drawn"
    statistic, freedom = _chi_square(counts, expected)
    # Five standard deviations of the chi-square distribution: sound samplers fail once in millions of choices of seeds.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5, f"chi-square {statistic:.1f} with {freedom} degrees"


def test_the_statistic_can_fail() -> None:
    """Draws at temperature 2 held against temperature 1.5."""
    expected = torch.softmax(logits("target", PROMPT) / 1.5, -1) * DRAWS
    wrong = torch.softmax(logits("target", PROMPT) / 2.0, -1) * DRAWS
    statistic, freedom = _chi_square(wrong.round(), expected)
    assert statistic > freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_rows_copies_and_places_have_noise_of_their_own(workshop: Workshop) -> None:
    keys = {row_key(seed, number, copy) for seed in range(6) for number in range(6) for copy in range(6)}
    assert len(keys) == 6**3
    assert all(-(2**63) <= key < 2**63 for key in keys)
    session = workshop.session("plain", sampling=True)
    requests = requests_of([PROMPT] * 4, 20, SamplingParams(temperature=3.0), [row_key(0, row, 0) for row in range(4)])
    run(session, requests)
    assert len({tuple(request.output) for request in requests}) == 4


def test_the_second_token_given_the_first(workshop: Workshop) -> None:
    """Noise of one place tells nothing about the next: the second token follows its own distribution."""
    session = workshop.session("ngram", sampling=True, batch=ROWS)
    sampling = SamplingParams(temperature=0.7, top_k=2)
    pairs: dict[int, torch.Tensor] = {}
    for start in range(0, DRAWS, ROWS):
        requests = requests_of([PROMPT] * ROWS, 2, sampling, [row_key(start + row, 0, 0) for row in range(ROWS)])
        run(session, requests)
        for request in requests:
            pairs.setdefault(request.output[0], torch.zeros(VOCAB))[request.output[1]] += 1
    assert len(pairs) == 2
    for first, counts in pairs.items():
        ids = [*PROMPT, first]
        expected = torch.softmax(processors(sampling)(torch.tensor([ids]), logits("target", ids)[None])[0], -1)
        statistic, freedom = _chi_square(counts, expected * counts.sum())
        assert statistic < freedom + 5 * (2 * max(freedom, 1)) ** 0.5 + 5
