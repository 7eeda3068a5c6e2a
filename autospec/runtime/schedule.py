"""Who sits in which row of a batch, who waits, and which graph runs next. Host bookkeeping; it never sees a tensor.

A row whose request ended takes the next waiting one while the others go on (continuous batching). Prompts are read in
chunks. Where nobody decodes yet, the chunks come back to back, of all rows at once; rows that decode already take turns
with them: a chunk, a step, a chunk. Then a graph of a single row reads the prompts, if there is one: running the whole
batch for the sake of a row costs the whole batch. Results are delivered some launches late, so a request counts what was
launched for it as well.
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
        is_alone: its prompt is read by the graph of a single row.
        fed: prompt tokens that were launched.
        promised: launches not delivered yet that emit for it, at least a token each unless it ends before.
    """

    row: int
    number: int
    request: Request
    is_alone: bool = False
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
        rows: of the batch that the graph's rows were, in its order; None: all of them.
    """

    draft_len: int | None
    seats: tuple[Seat, ...]
    rows: tuple[int, ...] | None = None

    def place(self, seat: Seat) -> int:
        """The row of the results that is this seat's."""
        return seat.row if self.rows is None else self.rows.index(seat.row)


class Schedule:
    """Seats for requests, first come, first served.

    Args:
        requests: of one call.
        batch_size: rows. chunk: prompt tokens per row of one prefill call.
        has_reader: whether there is a graph that reads the prompt of a single row.
    """

    def __init__(self, requests: Sequence[Request], batch_size: int, chunk: int, has_reader: bool = False) -> None:
        self.waiting = deque(enumerate(requests))
        self.seats: list[Seat | None] = [None] * batch_size
        self.chunk, self.has_reader = chunk, has_reader
        self.rows: tuple[int, ...] | None = None  # that steps are narrowed to; nobody is seated any more
        self._takes_turns = False
        self._last_was_chunk = False

    def admit(self) -> list[Seat]:
        """Seat waiting requests in the rows that nobody needs any more."""
        admitted: list[Seat] = []
        for row, seat in enumerate(self.seats):
            if not self.waiting:
                break
            if seat is None or not (seat.is_reading or seat.is_decoding):
                admitted.append(Seat(row, *self.waiting.popleft()))
                self.seats[row] = admitted[-1]
        if admitted:
            self._takes_turns = any(seat.is_decoding for seat in self._seated())
            for seat in admitted:
                seat.is_alone = self.has_reader and self._takes_turns
        return admitted

    @property
    def wanted(self) -> Literal["chunk", "lone chunk", "step"] | None:
        """What to launch next; None: nothing, as far as the host knows."""
        decodes = any(seat.is_decoding for seat in self._seated())
        reading = [seat for seat in self._seated() if seat.is_reading]
        if reading and not (decodes and self._takes_turns and self._last_was_chunk):
            return "lone chunk" if all(seat.is_alone for seat in reading) else "chunk"
        return "step" if decodes else None

    @property
    def lone_reader(self) -> Seat:
        """Whose prompt a lone chunk reads: who came first, so that a prompt is read to its end before the next."""
        return min((seat for seat in self._seated() if seat.is_reading and seat.is_alone), key=lambda seat: seat.number)

    def launch_chunk(self) -> Launch:
        """A prompt chunk of all rows was launched: those whose prompt ends in it emit."""
        return self._read([seat for seat in self._seated() if seat.is_reading and not seat.is_alone], None)

    def launch_lone_chunk(self) -> Launch:
        """A prompt chunk of the lone reader was launched."""
        return self._read([self.lone_reader], (self.lone_reader.row,))

    def _read(self, seats: list[Seat], rows: tuple[int, ...] | None) -> Launch:
        for seat in seats:
            seat.fed = min(seat.fed + self.chunk, len(seat.request.prompt))
        return self._launched(Launch(None, tuple(seat for seat in seats if not seat.is_reading), rows))

    def _seated(self) -> list[Seat]:
        return [seat for seat in self.seats if seat is not None]

    def launch_step(self, draft_len: int) -> Launch:
        """A step was launched: everybody who decodes emits."""
        return self._launched(Launch(draft_len, tuple(seat for seat in self._seated() if seat.is_decoding), self.rows))

    @property
    def last_rows(self) -> list[int] | None:
        """Who decodes, once nobody waits or reads; None before."""
        if self.waiting or any(seat.is_reading for seat in self._seated()):
            return None
        return [seat.row for seat in self._seated() if seat.is_decoding]

    def _launched(self, launch: Launch) -> Launch:
        for seat in launch.seats:
            seat.promised += 1
        self._last_was_chunk = launch.draft_len is None
        return launch

    def owns_row(self, seat: Seat) -> bool:
        """Whether nobody else was seated in the row since."""
        return self.seats[seat.row] is seat
