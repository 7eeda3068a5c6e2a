"""After a step the state is a function of the emitted tokens, wherever a row stops and whatever lies beside it."""

from __future__ import annotations

import pytest
from harness import laws
from harness.laws import GREEDY, WARM
from harness.programs import L, Workshop
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.runtime.request import SamplingParams

BOTH = pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])


@pytest.mark.parametrize("accept", range(L + 1))
@BOTH
def test_caches_survive_every_accept_count(workshop: Workshop, accept: int, sampling: SamplingParams) -> None:
    laws.draft_cache_survives_every_accept_count(workshop, accept, sampling)


@pytest.mark.parametrize("drafter", ["small"])
@BOTH
def test_caches_of_an_honest_draft_are_fresh(workshop: Workshop, drafter: str, sampling: SamplingParams) -> None:
    laws.draft_cache_survives_every_accept_count(workshop, 0, sampling, drafter=drafter)


@BOTH
def test_state_follows_from_tokens(workshop: Workshop, sampling: SamplingParams) -> None:
    laws.state_follows_from_tokens(workshop, sampling)


@pytest.mark.parametrize("drafter", ["twin", "ngram", "plain", "small"])
@pytest.mark.parametrize("place", range(5, 10))
def test_eos_ends_a_row_inside_a_run(workshop: Workshop, drafter: str, place: int) -> None:
    laws.stops_inside_an_accepted_run(workshop, place, drafter=drafter)


def test_eos_ends_a_sampled_row_inside_a_run(workshop: Workshop) -> None:
    laws.stops_inside_an_accepted_run(workshop, sampling=WARM)


@pytest.mark.parametrize("place", [1, 2, 4, 6, 7, 9])
@BOTH
def test_a_stop_string_ends_a_row_inside_a_run(workshop: Workshop, place: int, sampling: SamplingParams) -> None:
    laws.host_stops_inside_an_accepted_run(workshop, place, sampling)


@settings(max_examples=8)
@given(counts=st.lists(st.integers(1, 30), min_size=4, max_size=4))
def test_limits_cut_a_run(workshop: Workshop, counts: list[int]) -> None:
    laws.limits_cut_a_run(workshop, counts)


@BOTH
def test_padding_is_invisible(workshop: Workshop, sampling: SamplingParams) -> None:
    laws.padding_is_invisible(workshop, sampling)


@settings(max_examples=4)
@given(seed=st.integers(0, 2**31))
def test_pages_are_a_permutation(workshop: Workshop, seed: int) -> None:
    laws.pages_are_a_permutation(workshop, seed)


def test_a_full_row_writes_into_nobody(workshop: Workshop) -> None:
    laws.never_overflows(workshop)
