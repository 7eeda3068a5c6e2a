"""Session: what it refuses, and that it may be used again and again."""

from __future__ import annotations

import pytest
import torch
from harness.models import oracle
from harness.programs import LENGTH, Workshop, prompts_of, requests_of, run

from autospec.errors import CapacityError
from autospec.program import SCRATCH_PAGES
from autospec.runtime.metrics import Metrics


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    return Workshop()


def test_what_does_not_fit_is_refused_before_anything_is_written(workshop: Workshop) -> None:
    session = workshop.session("ngram")
    prompts = prompts_of(2, (5, 8))
    run(session, requests_of(prompts, 9))
    before = {name: tensor.clone() for name, tensor in session.state.items()}
    cases = {
        "the prompt of request 1 is empty": (requests_of([[1], []], 3), ()),
        f"request 0 needs {LENGTH + 1} tokens (5 of prompt": (requests_of(prompts[:1], LENGTH - 4), ()),
        "9 eos ids were given, at most 8 are supported": (requests_of(prompts, 3), range(9)),
    }
    for message, (requests, eos_ids) in cases.items():
        with pytest.raises(CapacityError) as caught:
            session.run(requests, list(eos_ids), Metrics())
        assert message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 4
        assert all(torch.equal(tensor, before[name]) for name, tensor in session.state.items())
        assert not any(request.output for request in requests)


@pytest.mark.parametrize("drafter", ["ngram", "twin", "auto"])
def test_a_session_forgets_the_call_before(workshop: Workshop, drafter: str) -> None:
    session = workshop.session(drafter)
    for seed, lengths, count in ((1, (40, 3, 9, 20), 40), (2, (2,), 30), (3, (17, 30), 5), (1, (40, 3, 9, 20), 40)):
        requests = requests_of(prompts_of(seed, lengths), count)
        run(session, requests)
        for request in requests:
            assert request.output == oracle("target", request.prompt, count)


def test_state_keeps_its_addresses(workshop: Workshop) -> None:
    """A recorded graph would go on writing to the old ones."""
    session = workshop.session("ngram")
    addresses = {name: tensor.data_ptr() for name, tensor in session.state.items()}
    run(session, requests_of(prompts_of(2, (5, 8)), 9), [3])
    assert addresses == {name: tensor.data_ptr() for name, tensor in session.state.items()}


def test_rows_own_their_pages(workshop: Workshop) -> None:
    session = workshop.session("ngram")
    run(session, requests_of(prompts_of(2, (5, 8, 3)), 9))
    table = session.state["page_table"]
    live = table[:3].flatten().tolist()
    assert len(set(live)) == len(live)
    assert min(live) >= SCRATCH_PAGES
    assert not table[3].any(), "an idle row writes to the scratch page"


def test_step_times_are_measured_once_and_disturb_nobody(workshop: Workshop) -> None:
    session = workshop.session("auto")
    seconds = session.step_seconds()
    assert set(seconds) == {0, 2, 4}
    assert all(0 < time < 1 for time in seconds.values())
    requests = requests_of(prompts_of(2, (5, 8)), 20)
    run(session, requests)
    assert session.step_seconds() is seconds


def test_the_same_call_takes_the_same_steps(workshop: Workshop) -> None:
    """The policy sees counts and measured times, never the clock."""
    session = workshop.session("auto")
    session.step_seconds()
    session._seconds = {0: 1.0, 2: 1.1, 4: 1.2}
    first, second = (run(session, requests_of(prompts_of(2, (5, 8)), 60)) for _ in range(2))
    assert first.steps == second.steps
    assert first.reached == second.reached
    assert len(first.steps) > 1, "the length did change on the way"
