"""Who sits in which row of a batch, who waits, and which graph runs next. Host bookkeeping; it never sees a tensor.

A row whose request ended takes the next waiting one while the others go on (continuous batching). Prompts are read in
chunks. Where nobody decodes yet, the chunks come back to back; rows that decode already take turns with them: a chunk,
a step, a chunk. Results are delivered some launches late, so a request counts what was launched for it as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from autospec.runtime.request import Request


@dataclass(eq=False)
class Seat:
    """A request in its row.

    Args:
        row: of the batch; number: of the request in the call.
        fed: prompt tokens that were launched.
        promised: launches not delivered yet that emit for it, at least a token each unless it ends before.
    """

    row: int
    number: int
    request: Request
    fed: int = 0
    promised: int = 0

    @property
    def is_reading(self) -> bool:
        """Whether prompt tokens are left to launch."""
        return self.fed < len(self.request.prompt)

    @property
    def is_decoding(self) -> bool:
        """Whether a step may still emit for it, as far as the host knows."""
        left = self.request.max_new_tokens - len(self.request.output) - self.promised
        return not self.is_reading and not self.request.is_done and left > 0


@dataclass(frozen=True)
class Launch:
    """One call of a graph.

    Args:
        draft_len: of a step; None: a prompt chunk.
        seats: who emits in it, unless the request ends in a launch before that was not delivered yet.
    """

    draft_len: int | None
    seats: tuple[Seat, ...]


class Schedule:
    """Seats for requests, first come, first served.

    Args:
        requests: of one call.
        batch_size: rows. chunk: prompt tokens per row of one prefill call.
    """

    def __init__(self, requests: Sequence[Request], batch_size: int, chunk: int) -> None:
        self.waiting = deque(enumerate(requests))
        self.seats: list[Seat | None] = [None] * batch_size
        self.chunk = chunk
        self._takes_turns = False
        self._last_was_chunk = False

    def admit(self) -> dict[int, Request]:
        """Seat waiting requests in the rows that nobody needs any more; those rows and their requests."""
        admitted: dict[int, Request] = {}
        for row, seat in enumerate(self.seats):
            if not self.waiting:
                break
            if seat is None or not (seat.is_reading or seat.is_decoding):
                number, request = self.waiting.popleft()
                self.seats[row] = Seat(row, number, request)
                admitted[row] = request
        if admitted:
            self._takes_turns = any(seat.is_decoding for seat in self.seats if seat is not None)
        return admitted

    @property
    def wanted(self) -> Literal["chunk", "step"] | None:
        """What to launch next; None: nothing, as far as the host knows."""
        seats = [seat for seat in self.seats if seat is not None]
        decodes = any(seat.is_decoding for seat in seats)
        if any(seat.is_reading for seat in seats) and not (decodes and self._takes_turns and self._last_was_chunk):
            return "chunk"
        return "step" if decodes else None

    def launch_chunk(self) -> Launch:
        """A prompt chunk was launched: those whose prompt ends in it emit."""
        emitting: list[Seat] = []
        for seat in self.seats:
            if seat is not None and seat.is_reading:
                seat.fed = min(seat.fed + self.chunk, len(seat.request.prompt))
                if not seat.is_reading:
                    emitting.append(seat)
        return self._launched(Launch(None, tuple(emitting)))

    def launch_step(self, draft_len: int) -> Launch:
        """A step was launched: everybody who decodes emits."""
        return self._launched(Launch(draft_len, tuple(seat for seat in self.seats if seat is not None and seat.is_decoding)))

    def _launched(self, launch: Launch) -> Launch:
        for seat in launch.seats:
            seat.promised += 1
        self._last_was_chunk = launch.draft_len is None
        return launch

    def owns_row(self, seat: Seat) -> bool:
        """Whether nobody else was seated in the row since."""
        return self.seats[seat.row] is seat
