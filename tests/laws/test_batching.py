"""Continuous batching: a request does not notice which row it got, who sat there, who sits beside it, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from harness import batching_laws as laws
from harness.laws import GREEDY, WARM, at_rest, same_tokens
from harness.models import oracle
from harness.programs import L, Plant, Workshop, prompts_of, requests_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.program import Program
from autospec.runtime import session
from autospec.runtime.companions import Narrow, Reader
from autospec.runtime.outbox import Outbox
from autospec.runtime.request import SamplingParams
from autospec.runtime.rows import row_state
from autospec.runtime.schedule import Launch, Schedule
from autospec.runtime.session import Session

PAIRS = [
    ("auto", WARM), ("small", GREEDY), ("small static", WARM), ("small dynamic", GREEDY), ("eagle", GREEDY),
    ("eagle dynamic", WARM), ("medusa static", GREEDY),
]  # fmt: skip


@pytest.mark.parametrize(("drafter", "sampling"), PAIRS, ids=[drafter for drafter, _ in PAIRS])
def test_a_queue_is_lossless(workshop: Workshop, drafter: str, sampling: SamplingParams) -> None:
    laws.queue_is_lossless(workshop, drafter, sampling, lag=1)
    laws.prefill_spares_decoding_rows(workshop, drafter, sampling)
    laws.loading_touches_one_row(workshop, drafter, sampling)


@settings(max_examples=8)
@given(
    order=st.permutations(range(len(laws.LENGTHS))), lag=st.integers(0, 2), is_stopped=st.booleans(), warm=st.booleans(),
    has_reader=st.booleans(), buckets=st.sampled_from([(), (1, 2), (3,)]),
)  # fmt: skip
def test_in_any_order(
    workshop: Workshop, order: list[int], lag: int, is_stopped: bool, warm: bool, has_reader: bool, buckets: tuple[int, ...]
) -> None:
    laws.queue_is_lossless(workshop, "ngram", WARM if warm else GREEDY, lag, order, is_stopped, has_reader, buckets)


@pytest.mark.parametrize(("lag", "has_reader"), [(0, True), (1, True), (1, False)])
def test_a_twin_is_accepted_in_every_row(workshop: Workshop, lag: int, has_reader: bool) -> None:
    laws.twin_is_accepted_in_every_row(workshop, lag, has_reader)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Rows of the narrower programs that went on, and the batch's rows they took."""
    found: list[tuple[int, list[int]]] = []
    take = Narrow.take

    def told(narrow: Narrow, rows: list[int]) -> None:
        found.append((narrow.program.shape.batch_size, list(rows)))
        take(narrow, rows)

    monkeypatch.setattr(Narrow, "take", told)
    return found


NARROWED = [pair for pair in PAIRS if pair[0] in ("auto", "small dynamic", "eagle", "medusa static")]


@pytest.mark.parametrize(("drafter", "sampling"), NARROWED, ids=[drafter for drafter, _ in NARROWED])
def test_the_last_rows_go_on_in_a_narrower_program(
    workshop: Workshop, drafter: str, sampling: SamplingParams, taken: list[tuple[int, list[int]]]
) -> None:
    for lag, is_stopped in ((0, False), (1, True)):
        laws.queue_is_lossless(workshop, drafter, sampling, lag, is_stopped=is_stopped, buckets=(1, 2))
    assert taken
    assert all(size == min(each for each in (1, 2) if len(rows) <= each) for size, rows in taken)


def test_a_twin_is_accepted_there_as_well(workshop: Workshop, taken: list[tuple[int, list[int]]]) -> None:
    laws.twin_is_accepted_in_every_row(workshop, 1, True, (1, 2))
    assert taken


def test_going_on_waits_for_nothing(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch before is under way when a narrower program takes over: a GPU has work meanwhile."""
    boxes, under_way, take = [], [], Narrow.take

    def made(device: torch.device, lag: int) -> Outbox[Launch]:
        boxes.append(Outbox[Launch](device, lag))
        return boxes[-1]

    def told(narrow: Narrow, rows: list[int]) -> None:
        under_way.append(len(boxes[-1]))
        take(narrow, rows)

    monkeypatch.setattr(session, "Outbox", made)
    monkeypatch.setattr(Narrow, "take", told)
    for is_stopped in (False, True):
        laws.queue_is_lossless(workshop, "ngram", GREEDY, 1, is_stopped=is_stopped, buckets=(1, 2))
    assert under_way
    assert set(under_way) == {1}


def test_rows_that_are_not_taken_are_idle(workshop: Workshop) -> None:
    busy = workshop.session("eagle dynamic", batch=3, sampling=True, buckets=(2,))
    run(busy, requests_of(prompts_of(1, (5, 7, 9, 6)), (4, 9, 14, 20), WARM))
    narrow = busy._narrow[2]
    for tensor in narrow.row_state.values():
        tensor.fill_(True if tensor.dtype == torch.bool else 3)
    narrow.take([1])
    fresh = narrow.program.new_state()
    for name, tensor in narrow.row_state.items():
        assert torch.equal(tensor[1:], fresh[name][1:]), name
        assert torch.equal(tensor[0], busy.state[name][1]), name


def test_an_idle_row_is_as_in_fresh_state(workshop: Workshop) -> None:
    busy = workshop.session("eagle dynamic", batch=3, sampling=True, buckets=(2,))
    fresh = busy.program.new_state()
    for name, expected in row_state({1: None}, busy.program.shape, fresh).items():
        assert torch.equal(fresh[name][1:2], expected.to(fresh[name])), name


@pytest.mark.parametrize("drafter", ["plain", "twin"])
def test_a_row_is_cut_that_was_not_taken(workshop: Workshop, drafter: str) -> None:
    """Its last launches are under way when a narrower program takes the others over, and the host stops it in one of them."""
    prompts, counts = prompts_of(7, (5, 6, 7, 8, 9)), (1, 12, 30, 31, 32)
    expected = [oracle("target", prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    for stop in range(1, 13):
        requests = requests_of(prompts, counts)
        last = prompts[1] + expected[1][:stop]
        requests[1].should_stop = last.__eq__
        busy = workshop.session(drafter, batch=4, buckets=(3,))
        run(busy, requests, lag=2)
        same_tokens(requests, [one[:stop] if row == 1 else one for row, one in enumerate(expected)])
        at_rest(busy, [one for one in busy.occupants if one is not None])


def test_a_build_that_failed_is_asked_for_again(workshop: Workshop) -> None:
    busy, asked = workshop.session("plain", batch=2, draft_len=1, buckets=(1,)), []
    build = busy._build_narrow[1]

    def failing() -> Program:
        asked.append("once")
        if len(asked) == 1:
            raise MemoryError
        return build()

    busy._build_narrow[1] = failing
    requests = (prompts_of(3, (5, 6, 7)), (2, 9, 20))
    with pytest.raises(MemoryError):
        run(busy, requests_of(*requests))
    run(busy, requests_of(*requests))
    assert set(busy._narrow) == {1}
    assert not busy._build_narrow


FORGOTTEN = [*(("take", name) for name in ("kv_lens", "draft_tokens", "tokens", "page_table", "accept_counts")),
             ("give_back", "kv_lens"), ("give_back", "tokens")]  # fmt: skip


@pytest.mark.parametrize(("way", "name"), FORGOTTEN)
def test_a_narrower_program_that_forgets_some_state_is_caught(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, way: str, name: str
) -> None:
    move = getattr(Narrow, way)

    def bug(narrow: Narrow, *rows: list[int]) -> None:
        before = narrow.batch_state[name].clone()
        move(narrow, *rows)
        if way == "take":
            narrow.row_state[name].zero_()
        else:
            narrow.batch_state[name].copy_(before)

    monkeypatch.setattr(Narrow, way, bug)
    with pytest.raises(AssertionError):
        laws.twin_is_accepted_in_every_row(workshop, 1, True, (1, 2))


@pytest.mark.parametrize("is_stopped", [False, True])
@pytest.mark.parametrize("drafter", ["twin", "small dynamic"])
def test_late_reading_counts_the_same(workshop: Workshop, drafter: str, is_stopped: bool) -> None:
    """Surplus launches of rows that ended are neither delivered nor counted, wherever they fall."""
    counted = []
    for lag in (0, 1):
        metrics, _ = laws.queue_is_lossless(workshop, drafter, lag=lag, is_stopped=is_stopped)
        counted.append((metrics.row_steps, metrics.reached, metrics.nodes_verified, metrics.rank_counts))
    assert counted[0] == counted[1]


def test_late_reading_takes_the_same_steps(workshop: Workshop) -> None:
    """Without a queue every launch is the same, the lengths that the policy chooses too."""
    session = workshop.session("auto")
    session.step_seconds()
    session._seconds = {0: 1.0, 2: 1.1, L: 1.2}
    seen = []
    for lag in (0, 1, 2):
        requests = requests_of(prompts_of(2, (5, 8, 30)), [60, 33, 50])
        ids = requests[2].prompt + laws.oracle("target", requests[2].prompt, 9)
        requests[2].should_stop = lambda all_ids, ids=ids: all_ids == ids
        metrics = run(session, requests, lag=lag)
        seen.append((metrics.steps, metrics.reached, metrics.row_steps, [request.output for request in requests]))
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0][0]) > 1, "the length did change on the way"


def _pages_not_hidden(op: Any, page_table: Tensor, q_lens: Tensor) -> Tensor:
    return page_table.clone()


def _drafts_for_all(op: Any, draft_tokens: Tensor, tree_parents: Tensor, ids: Tensor, parents: Tensor, *is_new: Any) -> Any:
    op(draft_tokens, tree_parents, ids, parents)


def _chunk_of_all(op: Any, tokens: Tensor, kv_lens: Tensor, prompt_lens: Tensor, q_len: int) -> Any:
    """Rows whose prompt was read some steps ago read on, one token each."""
    chunk, q_lens = op(tokens, kv_lens, prompt_lens, q_len)
    return chunk, q_lens + ((kv_lens > prompt_lens) & (q_lens == 0)).int()


@pytest.mark.parametrize(
    ("plant", "law"),
    [
        (Plant("prefill writes into all rows", "prompt_pages", _pages_not_hidden), laws.prefill_spares_decoding_rows),
        (Plant("prefill drafts for all rows", "store_draft", _drafts_for_all, ("prefill",)), laws.prefill_spares_decoding_rows),
        (Plant("prefill advances all rows", "prompt_chunk", _chunk_of_all), laws.prefill_spares_decoding_rows),
        (Plant("prefill advances all rows", "prompt_chunk", _chunk_of_all), laws.crowded_queue),
    ],
    ids=["pages", "drafts", "lengths", "tokens"],
)  # fmt: skip
def test_a_planted_bug_is_caught(plant: Plant, law: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError):
        law(Workshop(plant))


def _keeps(*names: str) -> Callable[[Session], None]:
    """Loading leaves some of the row's state as it was."""

    def prepare(session: Session) -> None:
        load = session._load

        def bug(rows: Mapping[int, Any]) -> None:
            before = {name: session.state[name].clone() for name in names}
            load(rows)
            for name, tensor in before.items():
                session.state[name].copy_(tensor)

        session._load = bug  # type: ignore[method-assign]

    return prepare


def _clears_all(session: Session) -> None:
    """Loading one row drops the drafts of all."""
    load = session._load

    def bug(rows: Mapping[int, Any]) -> None:
        load(rows)
        session.state["tree_parents"].fill_(-1)

    session._load = bug  # type: ignore[method-assign]


def _cuts_late(session: Session) -> None:
    """What the surplus step committed stays."""
    session._cut = lambda row, request: session.state["finished"][row].fill_(True)  # type: ignore[method-assign]


def _batch_keeps_the_pages(session: Session) -> None:
    """A row that ended goes on writing into the pages that a reader fills."""
    load = session._load

    def bug(rows: Mapping[int, Any]) -> None:
        before = session.state["page_table"].clone()
        load(rows)
        for row, request in rows.items():
            if request is None:
                session.state["page_table"][row] = before[row]

    session._load = bug  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("prepare", "law"),
    [
        (_keeps("tree_parents", "draft_tokens"), laws.loading_touches_one_row),
        (_keeps("row_keys"), laws.loading_touches_one_row),
        (_keeps("seen"), laws.loading_touches_one_row),
        (_keeps("seen"), laws.warm_queue),
        (_clears_all, laws.loading_touches_one_row),
        (_clears_all, laws.crowded_twin),
        (_cuts_late, laws.stopped_queue),
        (_batch_keeps_the_pages, laws.twin_is_accepted_in_every_row),
    ],
    ids=["stale tree", "stale keys", "stale history", "stale history, by its tokens", "drafts of all dropped",
         "drafts of all dropped, by acceptance", "late cut", "pages in two hands"],
)  # fmt: skip
def test_a_planted_bug_of_the_session_is_caught(prepare: Callable[[Session], None], law: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError):
        law(Workshop(prepare=prepare))


@pytest.mark.parametrize("name", ["kv_lens", "draft_tokens", "row_keys", "page_table"])
def test_a_row_that_moves_in_without_some_state_is_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    move = Reader.move_to

    def bug(reader: Reader, row: int) -> None:
        before = reader.batch_state[name][row].clone()
        move(reader, row)
        reader.batch_state[name][row].copy_(before)

    monkeypatch.setattr(Reader, "move_to", bug)
    with pytest.raises(AssertionError):
        laws.queue_is_lossless(Workshop(), "ngram", laws.WARM)


def test_a_cut_of_a_row_that_was_given_away_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop that comes with the very last token is seen when somebody else sits there already."""
    monkeypatch.setattr(Schedule, "owns_row", lambda self, seat: True)
    with pytest.raises(AssertionError):
        laws.queue_is_lossless(Workshop(), "plain", lag=1, is_stopped=True, has_reader=False)


def test_without_a_plant_nothing_is_caught(workshop: Workshop) -> None:
    for law in (laws.prefill_spares_decoding_rows, laws.queue_is_lossless, laws.loading_touches_one_row, laws.warm_queue,
                laws.twin_is_accepted_in_every_row, laws.stopped_queue, laws.crowded_queue, laws.crowded_twin):  # fmt: skip
        law(workshop)
    laws.queue_is_lossless(workshop, "plain", lag=1, is_stopped=True, has_reader=False)


def test_the_outbox_keeps_what_state_held() -> None:
    """A result is what it was when its launch was sent, though state moves on; the oldest is read first."""
    state, outbox = torch.zeros(2), Outbox[int](torch.device("cpu"), lag=2)
    read = []
    for number in range(5):
        state.fill_(number)
        outbox.send(number, [state])
        read += [(what, results[0].tolist()) for what, results in outbox.receive(keep=2)]
    assert [what for what, _ in read] == [0, 1, 2]
    read += [(what, results[0].tolist()) for what, results in outbox.receive(keep=0)]
    assert read == [(number, [number, number]) for number in range(5)]
