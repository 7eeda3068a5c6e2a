"""The output is the target's own, whatever the draft."""

from __future__ import annotations

import pytest
from harness import laws
from harness.laws import GREEDY, WARM
from harness.models import VOCAB
from harness.programs import Workshop
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.runtime.request import SamplingParams

BOTH = pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])

# Temperatures and filters, each alone and together.
SETTINGS = [
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=0.8, top_k=5),
    SamplingParams(temperature=1.5, top_p=0.7),
    SamplingParams(temperature=1.5, min_p=0.2),
    SamplingParams(temperature=0.8, repetition_penalty=1.5),
    SamplingParams(temperature=0.0, repetition_penalty=1.3),
    SamplingParams(temperature=1.5, top_k=12, top_p=0.8, min_p=0.05, repetition_penalty=1.2),
]


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        draw(st.sampled_from([0.0, 0.3, 0.8, 1.5])), draw(st.sampled_from([0, 1, 7, VOCAB + 9])),
        draw(st.sampled_from([1.0, 0.9, 0.5])), draw(st.sampled_from([0.0, 0.1])),
        draw(st.sampled_from([1.0, 1.3, 0.8])),
    )  # fmt: skip


# Id 0 pads: its embedding is zero, so that after nothing else all logits are equal, and which half of them transformers'
# top-p keeps is up to a sort that is not stable.
PROMPTS = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40).filter(any), min_size=1, max_size=4)
COUNTS = st.lists(st.integers(0, 4), min_size=1, max_size=6)


@BOTH
def test_lossless_for_any_draft(workshop: Workshop, sampling: SamplingParams) -> None:
    laws.lossless_for_any_draft(workshop, sampling=sampling)


@settings(max_examples=15)
@given(prompts=PROMPTS, accepts=COUNTS, presents=COUNTS, sampling=samplings(), new_tokens=st.integers(1, 40))
def test_lossless_for_any_prompts_drafts_and_filters(
    workshop: Workshop, prompts: list[list[int]], accepts: list[int], presents: list[int], sampling: SamplingParams,
    new_tokens: int,
) -> None:  # fmt: skip
    laws.lossless_for_any_draft(workshop, accepts, presents, sampling, "target", new_tokens, prompts)


@BOTH
def test_lossless_with_a_sliding_window(workshop: Workshop, sampling: SamplingParams) -> None:
    laws.lossless_for_any_draft(workshop, sampling=sampling, target="window")


@BOTH
def test_drafters_do_not_matter(workshop: Workshop, sampling: SamplingParams) -> None:
    laws.drafters_do_not_matter(workshop, sampling)


@pytest.mark.parametrize("sampling", [GREEDY, *SETTINGS], ids=str)
def test_a_twin_is_accepted_completely(workshop: Workshop, sampling: SamplingParams) -> None:
    laws.twin_is_accepted_completely(workshop, sampling)


@BOTH
def test_acceptance_per_depth_is_exact(workshop: Workshop, sampling: SamplingParams) -> None:
    laws.accepts_exactly_what_is_right(workshop, sampling=sampling)


@settings(max_examples=10)
@given(accepts=COUNTS, presents=COUNTS)
def test_acceptance_per_depth_is_exact_for_any_drafter(
    workshop: Workshop, accepts: list[int], presents: list[int]
) -> None:
    laws.accepts_exactly_what_is_right(workshop, accepts, presents)


@BOTH
def test_wide_equals_narrow(workshop: Workshop, sampling: SamplingParams) -> None:
    laws.wide_equals_narrow(workshop, sampling)
