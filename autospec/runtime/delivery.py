"""Hands the results of launches to their requests, and counts what they accepted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from autospec.runtime.metrics import Metrics
from autospec.runtime.policy import DraftLengthPolicy
from autospec.runtime.request import Request
from autospec.runtime.schedule import Launch, Schedule

Emit = Callable[[int, list[int]], None]  # number of the request in the call, its new tokens
Cut = Callable[[int, Request], None]  # ends a row at its request's last token

COUNTERS = "accept_counts", "rank_counts"  # [B, ...], never reset within a call; the second one only of trees


class Delivery:
    """Hands the results of launches to their requests and counts them."""

    def __init__(
        self, state: Mapping[str, Tensor], cut: Cut, schedule: Schedule, ends: frozenset[int], metrics: Metrics,
        policy: DraftLengthPolicy | None, emit: Emit | None, start: float,
    ) -> None:  # fmt: skip
        self.cut, self.schedule, self.ends, self.metrics = cut, schedule, ends, metrics
        self.policy, self.emit, self.start = policy, emit, start
        self.before = [torch.zeros_like(counter, device="cpu").tolist() for counter in counters(state)]

    def deliver(self, launch: Launch, results: Sequence[Tensor]) -> None:
        """The results of one launch, on the host: its tokens, and after a step the counters of its rows.

        A row whose request ended in an earlier launch was launched once too often: it is neither counted nor read.
        """
        emitted, *now = [result.tolist() for result in results]
        rows = [seat.row for seat in launch.seats if not seat.request.is_done]
        deltas = []
        for after, before in zip(now, self.before, strict=False):
            new = dict(zip(range(len(after)) if launch.rows is None else launch.rows, after, strict=False))
            deltas.append([sum(new[row][i] - before[row][i] for row in rows) for i in range(len(before[0]))])
            for row, values in new.items():
                before[row] = values
        for seat in launch.seats:
            seat.promised -= 1
            request = seat.request
            if request.is_done:
                continue
            taken = list(_take(request, emitted[launch.place(seat)], self.ends))
            assert taken, f"row {seat.row} is finished on the device but not on the host: they disagree about a stop"
            if self.emit is not None:
                self.emit(seat.number, taken)
            if request.is_done and request.should_stop is not None and self.schedule.owns_row(seat):
                self.cut(seat.row, request)
        if rows and self.metrics.first_token_seconds == 0.0:
            self.metrics.first_token_seconds = time.perf_counter() - self.start
        if rows and launch.draft_len is not None:
            self._count(launch.draft_len, deltas)

    def _count(self, draft_len: int, deltas: list[list[int]]) -> None:
        self.metrics.count(draft_len, deltas[0])
        for ranks in deltas[1:]:
            self.metrics.count_ranks(ranks)
        if self.policy is not None:
            self.policy.observe(draft_len, deltas[0])


def counters(state: Mapping[str, Tensor]) -> list[Tensor]:
    """What counts acceptance in a state, [rows, ...] each."""
    return [state[name] for name in COUNTERS if name in state]


def _take(request: Request, tokens: list[int], ends: frozenset[int]) -> Iterator[int]:
    for token in tokens:
        if token < 0 or request.is_done:
            return
        request.take(token, ends)
        yield token
