"""Draft trees lose nothing, leave nothing behind, and are the trees that their drafters mean."""

from __future__ import annotations

import pytest
from harness import tree_laws
from harness.laws import GREEDY, same_tokens
from harness.models import captured, oracle
from harness.programs import CHUNK, LENGTH, PAGE, Workshop, requests_of, run
from harness.tree_laws import PROMPTS, WARM
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.assemble import build_program
from autospec.config import Eagle3Config
from autospec.program import Shape
from autospec.runtime.request import SamplingParams
from autospec.runtime.session import Session
from autospec.trees import DraftTree

HOT = SamplingParams(temperature=1.0)
TREES = ["small static", "small dynamic", "eagle", "eagle static", "eagle dynamic"]


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**31), truth=st.sampled_from([0.2, 0.5, 0.9]), depth=st.integers(0, 5), shuffled=st.booleans(),
    warm=st.booleans(), target=st.sampled_from(["target", "target", "window", "chunk"]),
)  # fmt: skip
def test_lossless_for_any_tree(
    workshop: Workshop, seed: int, truth: float, depth: int, shuffled: bool, warm: bool, target: str
) -> None:
    tree_laws.lossless_for_any_tree(
        workshop, seed, WARM if warm else GREEDY, target, truth=truth, depth=depth, is_shuffled=shuffled
    )


def test_siblings_in_any_order(workshop: Workshop) -> None:
    tree_laws.siblings_in_any_order(workshop)


def test_a_window_or_a_chunk_ends_inside_a_tree(workshop: Workshop) -> None:
    tree_laws.window_inside_a_tree(workshop)
    tree_laws.chunk_inside_a_tree(workshop)


@pytest.mark.parametrize("drafter", ["small static", "small dynamic", "eagle", "eagle static", "eagle dynamic"])
@pytest.mark.parametrize("seed", [8, 9])
def test_draft_caches_stay_fresh(workshop: Workshop, drafter: str, seed: int) -> None:
    if drafter == "eagle":  # a chain takes no branching script
        tree_laws.draft_caches_stay_fresh(workshop, "eagle static", seed + 2)
    else:
        tree_laws.draft_caches_stay_fresh(workshop, drafter, seed)


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafter", TREES)
def test_drafts_are_what_re_feeding_would_draft(workshop: Workshop, drafter: str, sampling: SamplingParams) -> None:
    tree_laws.drafts_what_re_feeding_would(workshop, drafter, sampling)


@pytest.mark.parametrize("sampling", [GREEDY, HOT, WARM], ids=["greedy", "hot", "filtered"])
def test_every_drafter_emits_the_same_tokens(workshop: Workshop, sampling: SamplingParams) -> None:
    expected = [oracle("target", prompt, 24, sampling, 1000 + row) for row, prompt in enumerate(PROMPTS)]
    for drafter in (*TREES, "near dynamic", "medusa", "medusa static", "medusa dynamic"):
        requests = requests_of(PROMPTS, 24, sampling)
        run(workshop.session(drafter, sampling=sampling.needs_scores), requests)
        same_tokens(requests, expected)


@pytest.mark.parametrize("sampling", [GREEDY, HOT, WARM], ids=["greedy", "hot", "filtered"])
def test_a_twin_is_accepted_completely_along_the_first_branch(workshop: Workshop, sampling: SamplingParams) -> None:
    """The target's own choice is the best child at every temperature and under every filter."""
    requests = requests_of(PROMPTS, 24, sampling)
    session = workshop.session("twin static", sampling=sampling.needs_scores)
    metrics = run(session, requests)
    # 23 tokens after prefill's, up to 4 a step: levels 1 to 3 of the first branch exist, level 4 is of rank 1 only.
    assert metrics.acceptance_per_depth[:2] == [1.0, 1.0]
    assert metrics.rank_counts[0] == sum(metrics.reached)


def test_a_chain_equals_its_tree() -> None:
    """The same chain on the causal path and as a masked tree: tokens, acceptance and the draft itself."""
    links = DraftTree(4, 4, choices=((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)))
    chain, tree = Eagle3Config("eagle", 4), Eagle3Config("eagle", 4)
    object.__setattr__(tree, "tree", links)
    results = []
    for speculation in (chain, tree):
        shape = Shape(4, LENGTH, PAGE, CHUNK, speculation.tree, False)
        session = Session(build_program(captured("target"), captured("eagle"), speculation, shape, "eager"))
        requests = requests_of(PROMPTS, 24)
        drafts: list[list[list[int]]] = []

        def watch(state: dict[str, Tensor], drafts: list[list[list[int]]] = drafts) -> None:
            drafts += [state["draft_tokens"].tolist(), state["tree_parents"].tolist()]

        metrics = run(session, requests, watch=watch)
        results.append(([request.output for request in requests], metrics.reached, drafts))
    assert results[0] == results[1]
