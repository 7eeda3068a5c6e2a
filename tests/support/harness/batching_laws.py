"""The laws of continuous batching, as functions of a workshop: each returns in silence or raises AssertionError."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autospec.program import SCRATCH_PAGES
from autospec.runtime.metrics import Metrics
from autospec.runtime.request import Request, SamplingParams
from autospec.runtime.session import Session
from harness.laws import WARM, at_rest, cache_is_fresh, same_tokens
from harness.models import GREEDY, oracle
from harness.programs import BATCH, L, Workshop, prompts_of, requests_of, run

# More requests than rows: one of a single token, long and short prompts, long and short outputs.
LENGTHS, COUNTS = (3, 33, 9, 17, 50, 1, 12, 20, 5, 40), (9, 24, 1, 30, 12, 33, 2, 17, 26, 8)


def queue(sampling: SamplingParams, order: Sequence[int]) -> tuple[list[Request], list[list[int]]]:
    """The requests in an order, and what each one emits when it is alone."""
    prompts = prompts_of(21, LENGTHS)
    expected = [
        oracle("target", prompt, count, sampling, 1000 + i) for i, (prompt, count) in enumerate(zip(prompts, COUNTS, strict=True))
    ]
    requests = requests_of(prompts, COUNTS, sampling)
    return [requests[i] for i in order], [expected[i] for i in order]


def queue_is_lossless(
    workshop: Workshop, drafter: str = "twin", sampling: SamplingParams = GREEDY, lag: int = 0,
    order: Sequence[int] = range(len(LENGTHS)), is_stopped: bool = False, has_reader: bool = True,
    buckets: tuple[int, ...] = (),
) -> tuple[Metrics, list[Request]]:  # fmt: skip
    """More requests than rows: each emits what it emits alone, and leaves its row as if it had been alone.

    has_reader: prompts of refilled rows are read by a graph of one row. is_stopped: an eos ends some, a stop that only
    the host sees others, one of these at the very last token. buckets: programs that go on with the last rows.
    """
    requests, expected = queue(sampling, order)
    eos_ids: list[int] = []
    if is_stopped:
        eos_ids = [expected[list(order).index(3)][11]]
        expected = [tokens[: tokens.index(eos_ids[0]) + 1] if eos_ids[0] in tokens else tokens for tokens in expected]
        for place, request in enumerate(requests):
            if place % 3 != 1:
                length = len(expected[place]) if place % 2 else 1 + len(expected[place]) // 2
                ids = request.prompt + expected[place][:length]
                request.should_stop = lambda seen, ids=ids: seen == ids
                expected[place] = expected[place][:length]
    session = workshop.session(drafter, sampling=sampling.needs_scores, has_reader=has_reader, buckets=buckets)
    metrics = run(session, requests, eos_ids, lag=lag)
    same_tokens(requests, expected)
    assert metrics.new_tokens == sum(map(len, expected))
    last = [request for request in session.occupants if request is not None]
    assert len(last) == BATCH
    at_rest(session, last)
    for row, request in enumerate(last):
        cache_is_fresh(session, row, request.prompt + request.output, draft=_draft_of(drafter))
    return metrics, requests


def _draft_of(drafter: str) -> str | None:
    name = drafter.split()[0]
    return {"twin": "target", "small": "small"}.get(name)


def twin_is_accepted_in_every_row(
    workshop: Workshop, lag: int = 0, has_reader: bool = True, buckets: tuple[int, ...] = ()
) -> None:
    """A draft equal to the target stays so in rows that were refilled, and in those that went on meanwhile."""
    metrics, _ = queue_is_lossless(workshop, "twin", lag=lag, has_reader=has_reader, buckets=buckets)
    reached, steps = [0] * L, 0
    for count in COUNTS:
        left = count - 1  # prefill emits one
        while left > 0:
            reached = [total + (depth < min(L, left)) for depth, total in enumerate(reached)]
            left -= min(L + 1, left)
            steps += 1
    assert metrics.row_steps == steps, f"{metrics.row_steps} row steps were counted, expected {steps}"
    assert metrics.reached == reached, f"accepted per depth {metrics.reached}, expected {reached}"


def of_rows(session: Session, rows: Sequence[int]) -> dict[str, Tensor]:
    """All that belongs to some rows: their state, and every slot of the pages that loading gives them."""
    shape, found = session.program.shape, {}
    for name, tensor in session.state.items():
        if "_pages." in name:
            first = [SCRATCH_PAGES + row * shape.pages_per_row for row in rows]
            found[name] = torch.cat([tensor[page : page + shape.pages_per_row] for page in first])
        elif name != "eos_ids":
            found[name] = tensor[list(rows)].clone()
    return found


def same_state(mine: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    for name, tensor in mine.items():
        assert torch.equal(tensor, wanted[name]), f"{what}: {name}"


def _decode_some(session: Session, sampling: SamplingParams) -> None:
    """Rows 0, 1 and 3 are decoding, two steps after their prompts; row 2 has ended."""
    requests = requests_of(prompts_of(22, (5, 30, 11, 17)), [40, 40, 1, 40], sampling)
    session._begin([])
    session._load(dict(enumerate(requests)))
    for _ in range(2):
        session.prefill()
    for _ in range(2):
        next(reversed(session.steps.values()))()


def loading_touches_one_row(workshop: Workshop, drafter: str = "small dynamic", sampling: SamplingParams = WARM) -> None:
    """A row's state after loading does not depend on what it was; the other rows keep every bit."""
    session = workshop.session(drafter, sampling=sampling.needs_scores)
    request = requests_of(prompts_of(23, (20,)), 30, sampling, [77])[0]
    _decode_some(session, sampling)
    others = of_rows(session, [0, 1, 3])
    session._load({2: request})
    same_state(of_rows(session, [0, 1, 3]), others, "loading row 2 changed other rows")
    used = of_rows(session, [2])
    for name, tensor in session.state.items():
        if "_pages." not in name:
            tensor.fill_(1)
    session._load({2: request})
    for name, tensor in of_rows(session, [2]).items():
        if not name.endswith("_counts"):  # they go on counting
            assert torch.equal(tensor, used[name]), f"row 2 keeps {name} of the request before"


def prefill_spares_decoding_rows(
    workshop: Workshop, drafter: str = "small dynamic", sampling: SamplingParams = GREEDY
) -> None:
    """A prompt is read into one row: tokens, draft, lengths, counters and caches of the others keep every bit."""
    session = workshop.session(drafter, sampling=sampling.needs_scores)
    _decode_some(session, sampling)
    before = of_rows(session, [0, 1, 3])
    session._load({2: requests_of(prompts_of(24, (40,)), 20, sampling, [78])[0]})
    for _ in range(3):
        session.prefill()
        same_state(of_rows(session, [0, 1, 3]), before, "a prefill of row 2 changed other rows")
    assert int(session.state["kv_lens"][2]) == 40, "the prompt was read"


def stopped_queue(workshop: Workshop) -> None:
    """Ends of every kind, read a launch late."""
    queue_is_lossless(workshop, "twin", lag=1, is_stopped=True)


def warm_queue(workshop: Workshop) -> None:
    """With processors that look at the history of the row."""
    queue_is_lossless(workshop, "ngram", WARM, has_reader=False)


def crowded_queue(workshop: Workshop) -> None:
    """Without a reader the batch's own prefill reads, rows that decode beside it."""
    queue_is_lossless(workshop, "twin", has_reader=False)


def crowded_twin(workshop: Workshop) -> None:
    """The same, by its acceptance."""
    twin_is_accepted_in_every_row(workshop, has_reader=False)
