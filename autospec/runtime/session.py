"""Runs one program over a call's requests: fill the state, read prompts, step, and refill rows until all are done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from autospec.errors import CapacityError
from autospec.kernels.append_index_keys import dequantize_keys
from autospec.program import Program
from autospec.runtime.companions import READ_ALONE_FROM, Narrow, Reader
from autospec.runtime.delivery import COUNTERS, Delivery, Emit, counters
from autospec.runtime.metrics import Metrics
from autospec.runtime.outbox import Outbox
from autospec.runtime.policy import LAG, DraftLengthPolicy
from autospec.runtime.replay import bind_graphs
from autospec.runtime.request import Request
from autospec.runtime.rows import row_state, seen, write_rows
from autospec.runtime.schedule import Launch, Schedule

WARM_UPS = 3


class Session:
    """State of one program, reused from call to call.

    Args:
        build_reader: builds the program that reads prompts of single rows, when there are more requests than rows for the
            first time; None: the batch's own prefill reads them.
        build_narrow: by rows, builds the program that goes on when no more are left, before the first run of more requests.
    """

    def __init__(
        self, program: Program, build_reader: Callable[[], Program] | None = None,
        build_narrow: Mapping[int, Callable[[], Program]] | None = None,
    ) -> None:  # fmt: skip
        self.program = program
        # Launches that are under way while the host reads older ones; a CPU would only wait for itself.
        self.lag = int(program.facts.device.type == "cuda")
        self.state = program.new_state()
        bound = bind_graphs(program, self.state)
        self._build_reader = build_reader
        self.prefill = bound["prefill"]
        self.steps = {length: bound[f"step_{length}"] for length in program.draft_lens()}
        self.occupants: list[Request | None] = [None] * program.shape.batch_size  # whose state each row holds
        self._reader: Reader | None = None
        self._build_narrow, self._narrow = dict(build_narrow or {}), dict[int, Narrow]()
        self._running: Session | Narrow = self  # whose steps are launched
        self._seconds: dict[int, float] | None = None

    def run(
        self, requests: Sequence[Request], eos_ids: Sequence[int], metrics: Metrics, emit: Emit | None = None
    ) -> None:
        """Generate all requests, as many at once as there are rows; tokens go to request.output and to `emit`."""
        self._check(requests, eos_ids)
        assert 0 <= self.lag <= LAG, f"the policy uses counts {LAG} steps late, results {self.lag} launches late are too late"
        policy = DraftLengthPolicy(self.step_seconds(), LAG - self.lag) if len(self.steps) > 1 else None
        only = next(iter(self.steps))
        shape, reader = self.program.shape, self._reader_for(len(requests))
        self._build_narrower(len(requests))
        self._running = self
        start = time.perf_counter()  # after what is done once per program: building a reader, measuring the steps
        schedule = Schedule(requests, shape.batch_size, shape.prefill_len, reader is not None)
        outbox: Outbox[Launch] = Outbox(self.program.facts.device, self.lag)
        delivery = Delivery(self.state, self._cut, schedule, frozenset(eos_ids), metrics, policy, emit, start)
        self._begin(eos_ids)
        self._load(dict.fromkeys(range(shape.batch_size)))
        while True:
            if admitted := schedule.admit():
                # While a reader writes into a row's pages, the batch must not: the row stays idle.
                self._load({seat.row: None if seat.is_alone else seat.request for seat in admitted})
            wanted = schedule.wanted
            if wanted is None and not outbox and not schedule.waiting:
                break
            if (narrower := self._narrower(schedule)) is not None:
                self._go_on(narrower, schedule)
            if wanted == "chunk":
                outbox.send(schedule.launch_chunk(), [_emitted(self.prefill())])
            elif wanted == "lone chunk":
                assert reader is not None, "nobody reads alone without a reader"
                outbox.send(*self._read_alone(schedule, reader))
            elif wanted == "step":
                draft_len = policy.next_draft_len() if policy else only
                emitted = _emitted(self._running.steps[draft_len]())
                outbox.send(schedule.launch_step(draft_len), [emitted, *counters(self._running.state)])
            for launch, results in outbox.receive(keep=self.lag if wanted else 0):
                delivery.deliver(launch, results)
        if isinstance(self._running, Narrow):
            self._running.give_back()
        metrics.seconds += time.perf_counter() - start
        metrics.prompt_tokens += sum(len(request.prompt) for request in requests)
        metrics.new_tokens += sum(len(request.output) for request in requests)

    def _narrower(self, schedule: Schedule) -> Narrow | None:
        """The program with the fewest rows that still hold all that are left, if that is fewer than now."""
        left = schedule.last_rows if self._narrow else None
        fitting = [rows for rows in self._narrow if left and len(left) <= rows < self._running.program.shape.batch_size]
        return self._narrow[min(fitting)] if fitting else None

    def _go_on(self, narrower: Narrow, schedule: Schedule) -> None:
        """Leave the rest to a narrower program. Launches may be under way: each knows whose rows its results are."""
        if isinstance(self._running, Narrow):
            self._running.give_back()
        rows = schedule.last_rows
        assert rows, "only a row that decodes makes the host look for a narrower program"
        narrower.take(rows)
        schedule.rows, self._running = tuple(rows), narrower

    def _build_narrower(self, requests: int) -> None:
        for rows in [rows for rows in self._build_narrow if rows < requests]:
            self._narrow[rows] = Narrow(self._build_narrow[rows](), self.program, self.state)
            del self._build_narrow[rows]  # not before: a build that fails may be asked for again

    def _read_alone(self, schedule: Schedule, reader: Reader) -> tuple[Launch, list[Tensor]]:
        """A chunk of one row's prompt; when it has ended, the row joins the batch."""
        seat = schedule.lone_reader
        if seat.fed == 0:
            write_rows(reader.row_state, [0], row_state({seat.row: seat.request}, self.program.shape, reader.row_state))
        emitted = _emitted(reader.prefill())
        launch = schedule.launch_lone_chunk()
        if not seat.is_reading:
            reader.move_to(seat.row)
            self.occupants[seat.row] = seat.request
        return launch, [emitted]

    def _reader_for(self, requests: int) -> Reader | None:
        """The reader, if rows will be refilled and there are enough of them; built when it is first needed."""
        rows = self.program.shape.batch_size
        if self._reader is None and self._build_reader is not None and requests > rows >= READ_ALONE_FROM:
            self._reader = Reader(self._build_reader(), self.program, self.state)
        return self._reader

    def step_seconds(self) -> dict[int, float]:
        """Median time of a step by draft length, measured once on idle rows."""
        if self._seconds is None:
            self.state["finished"].fill_(True)
            self._seconds = {length: self._time(step) for length, step in self.steps.items()}
        return self._seconds

    def committed_kv(self, row: int, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """K and V rows 0 ... length-1 of a request in a KV layer: [length, Hkv, D] and [length, Hkv, Dv]."""
        keys, values = (self._committed(f"{letter}_pages.{layer}", row, length) for letter in "kv")
        return keys, values

    def committed_latent(self, row: int, layer: int, length: int) -> Tensor:
        """Rows 0 ... length-1 of a request in a latent layer: [length, kv_lora_rank + qk_rope_head_dim]."""
        return self._committed(f"latent_pages.{layer}", row, length)

    def committed_index_keys(self, row: int, layer: int, length: int) -> Tensor:
        """Rows 0 ... length-1 of a request in the cache of an indexer: [length, index_head_dim]; of float8 keys, what they
        stand for."""
        keys = self._committed(f"index_pages.{layer}", row, length)
        if (scales := f"index_scale_pages.{layer}") not in self.state:
            return keys
        return dequantize_keys(keys, self._committed(scales, row, length))

    def _committed(self, name: str, row: int, length: int) -> Tensor:
        size = self.program.shape.page_size
        slots = torch.arange(length, device=self.state["page_table"].device)
        pages = self.state["page_table"][row].long()[slots // size]
        return self.state[name][pages, slots % size]

    def _time(self, step: Callable[[], object]) -> float:
        samples = []
        for _ in range(WARM_UPS + 5):
            start = time.perf_counter()
            step()
            if self.program.facts.device.type == "cuda":
                torch.cuda.synchronize(self.program.facts.device)
            samples.append(time.perf_counter() - start)
        return sorted(samples[WARM_UPS:])[2]

    def _check(self, requests: Sequence[Request], eos_ids: Sequence[int]) -> None:
        """Refuse what does not fit, before anything is written."""
        shape, most = self.program.shape, self.state["eos_ids"].shape[0]
        if len(eos_ids) > most:
            raise CapacityError(f"{len(eos_ids)} eos ids were given, at most {most} are supported",
                                at="eos_ids", where="Session.run", help="keep those the model emits")  # fmt: skip
        for number, request in enumerate(requests):
            if not request.prompt:
                raise CapacityError(f"the prompt of request {number} is empty", at=f"requests[{number}]",
                                    where="Session.run", help="give at least one token, such as bos")  # fmt: skip
            needed = len(request.prompt) + request.max_new_tokens
            if needed > shape.max_length:
                raise CapacityError(
                    f"request {number} needs {needed} tokens ({len(request.prompt)} of prompt and "
                    f"{request.max_new_tokens} new), the cache holds {shape.max_length} per row",
                    at=f"requests[{number}]", where="Session.run",
                    help="lower max_new_tokens, or optimize with a larger max_length",
                )

    def _begin(self, eos_ids: Sequence[int]) -> None:
        """What all rows of a call share."""
        eos = self.state["eos_ids"]
        eos.copy_(torch.tensor([*eos_ids] + [-1] * (eos.shape[0] - len(eos_ids))))
        for name in COUNTERS:
            if name in self.state:
                self.state[name].zero_()

    def _load(self, rows: Mapping[int, Request | None]) -> None:
        """Write requests into their rows, and nothing else; a row of None is finished and owns no page."""
        for row, request in rows.items():
            self.occupants[row] = request
        write_rows(self.state, [*rows], row_state(rows, self.program.shape, self.state))

    def _cut(self, row: int, request: Request) -> None:
        """End a row at its last token: the device does not know stop strings, and keeps nothing past them."""
        state, place, ids = self.state, row, request.prompt + request.output
        # A row that a narrower program did not take had its last launch before: its state is in the batch.
        if isinstance(self._running, Narrow) and row in self._running.rows:
            state, place = self._running.state, self._running.rows.index(row)
        state["finished"][place] = True
        state["kv_lens"][place] = len(ids) - 1
        state["tokens"][place, len(ids) :] = 0
        if "seen" in state:
            state["seen"][place] = seen(request, state["seen"].shape[1])


def _emitted(results: object) -> Tensor:
    """What a graph emitted: the first of its results."""
    assert isinstance(results, (tuple, list)), "a graph returns a tuple"
    return results[0]
