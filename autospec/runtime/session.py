"""Runs one program over a call's requests: fill the state, read prompts, step, and refill rows until all are done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from autospec.errors import CapacityError
from autospec.program import SCRATCH_PAGES, Program
from autospec.runtime.metrics import Metrics
from autospec.runtime.outbox import Outbox
from autospec.runtime.policy import LAG, DraftLengthPolicy
from autospec.runtime.replay import as_cuda_graph
from autospec.runtime.request import Request
from autospec.runtime.schedule import Launch, Schedule

Emit = Callable[[int, list[int]], None]  # number of the request in the call, its new tokens

WARM_UPS = 3


class Session:
    """State of one program, reused from call to call.

    Args:
        lag: launches that are under way while the host reads older ones; None: one on a GPU, none on a CPU.
    """

    def __init__(self, program: Program, lag: int | None = None) -> None:
        self.program = program
        is_cuda = program.facts.device.type == "cuda"
        self.lag = int(is_cuda) if lag is None else lag
        assert 0 <= self.lag <= LAG, f"the policy uses counts {LAG} steps late, results {self.lag} launches late are too late"
        self.state = program.new_state()
        bound = {name: program.bind(name, self.state) for name in program.graphs}
        if is_cuda and all(graph.is_compiled for graph in program.graphs.values()):
            # Fresh state is at rest: every row is finished and owns no page.
            pool = torch.cuda.graph_pool_handle()
            bound = {name: as_cuda_graph(run, program.facts.device, pool) for name, run in bound.items()}
        self.prefill = bound["prefill"]
        self.steps = {length: bound[f"step_{length}"] for length in program.draft_lens()}
        self.occupants: list[Request | None] = [None] * program.shape.batch_size  # whose state each row holds
        self._seconds: dict[int, float] | None = None

    def run(
        self, requests: Sequence[Request], eos_ids: Sequence[int], metrics: Metrics, emit: Emit | None = None
    ) -> None:
        """Generate all requests, as many at once as there are rows; tokens go to request.output and to `emit`."""
        self._check(requests, eos_ids)
        policy = DraftLengthPolicy(self.step_seconds(), LAG - self.lag) if len(self.steps) > 1 else None
        only = next(iter(self.steps))
        start = time.perf_counter()  # after the warm-up that measures the steps, once per program
        schedule = Schedule(requests, self.program.shape.batch_size, self.program.shape.prefill_len)
        outbox: Outbox[Launch] = Outbox(self.program.facts.device, self.lag)
        delivery = _Delivery(self, schedule, frozenset(eos_ids), metrics, policy, emit, start)
        self._begin(eos_ids)
        admitted: Mapping[int, Request | None] = dict.fromkeys(range(len(self.occupants))) | schedule.admit()
        while True:
            if admitted:
                self._load(admitted)
            wanted = schedule.wanted
            if wanted is None and not outbox and not schedule.waiting:
                break
            if wanted == "chunk":
                outbox.send(schedule.launch_chunk(), [_emitted(self.prefill()), *delivery.counters])
            elif wanted == "step":
                draft_len = policy.next_draft_len() if policy else only
                outbox.send(schedule.launch_step(draft_len), [_emitted(self.steps[draft_len]()), *delivery.counters])
            for launch, results in outbox.receive(keep=self.lag if wanted else 0):
                delivery.deliver(launch, results)
            admitted = schedule.admit()
        metrics.seconds += time.perf_counter() - start
        metrics.prompt_tokens += sum(len(request.prompt) for request in requests)
        metrics.new_tokens += sum(len(request.output) for request in requests)

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
        for name in _COUNTERS:
            if name in self.state:
                self.state[name].zero_()

    def _load(self, rows: Mapping[int, Request | None]) -> None:
        """Write requests into their rows, and nothing else; a row of None is finished and owns no page."""
        shape, state = self.program.shape, self.state
        # Build on the host, then copy once per tensor: state keeps its addresses.
        new: dict[str, Tensor] = {
            "tokens": torch.zeros(len(rows), shape.token_room, dtype=torch.int64),
            "page_table": torch.zeros(len(rows), shape.pages_per_row, dtype=torch.int32),
            "kv_lens": torch.zeros(len(rows)),
            "draft_tokens": torch.zeros(len(rows), shape.tree.num_nodes),
            "tree_parents": torch.full((len(rows), shape.tree.num_nodes), -1),
        }
        for place, (row, request) in enumerate(rows.items()):
            self.occupants[row] = request
            if request is not None:
                new["tokens"][place, : len(request.prompt)] = torch.tensor(request.prompt)
                first = SCRATCH_PAGES + row * shape.pages_per_row
                new["page_table"][place] = torch.arange(first, first + shape.pages_per_row, dtype=torch.int32)
        values = [_row_values(request) for request in rows.values()]
        for name in _ROW_STATE:
            if name in state:
                new[name] = torch.tensor([value[name] for value in values], dtype=state[name].dtype)
        if "seen" in state:
            new["seen"] = torch.stack([_seen(request, state["seen"].shape[1]) for request in rows.values()])
        index = torch.tensor([*rows], device=state["tokens"].device)
        for name, tensor in new.items():
            state[name].index_copy_(0, index, tensor.to(state[name]))

    def _cut(self, row: int, request: Request) -> None:
        """End a row at its last token: the device does not know stop strings, and keeps nothing past them."""
        state, ids = self.state, request.prompt + request.output
        state["finished"][row] = True
        state["kv_lens"][row] = len(ids) - 1
        state["tokens"][row, len(ids) :] = 0
        if "seen" in state:
            state["seen"][row] = _seen(request, state["seen"].shape[1])


class _Delivery:
    """Hands the results of launches to their requests and counts them."""

    def __init__(
        self, session: Session, schedule: Schedule, ends: frozenset[int], metrics: Metrics,
        policy: DraftLengthPolicy | None, emit: Emit | None, start: float,
    ) -> None:  # fmt: skip
        self.session, self.schedule, self.ends, self.metrics = session, schedule, ends, metrics
        self.policy, self.emit, self.start = policy, emit, start
        self.counters = [session.state[name] for name in _COUNTERS if name in session.state]
        self.before = [torch.zeros_like(counter, device="cpu").tolist() for counter in self.counters]

    def deliver(self, launch: Launch, results: Sequence[Tensor]) -> None:
        """The results of one launch, on the host: its tokens, and the counters after it.

        A row whose request ended in an earlier launch was launched once too often: it is neither counted nor read.
        """
        emitted, *now = [result.tolist() for result in results]
        rows = [seat.row for seat in launch.seats if not seat.request.is_done]
        deltas = [_growth(after, before, rows) for after, before in zip(now, self.before, strict=True)]
        self.before = now
        for seat in launch.seats:
            seat.promised -= 1
            request = seat.request
            if request.is_done:
                continue
            taken = list(_take(request, emitted[seat.row], self.ends))
            assert taken, f"row {seat.row} is finished on the device but not on the host: they disagree about a stop"
            if self.emit is not None:
                self.emit(seat.number, taken)
            if request.is_done and request.should_stop is not None and self.schedule.owns_row(seat):
                self.session._cut(seat.row, request)
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


def _emitted(results: object) -> Tensor:
    """What a graph emitted: the first of its results."""
    assert isinstance(results, (tuple, list)), "a graph returns a tuple"
    return results[0]


def _growth(after: list[list[int]], before: list[list[int]], rows: Sequence[int]) -> list[int]:
    """By how much the counters of these rows have grown together."""
    return [sum(after[row][i] - before[row][i] for row in rows) for i in range(len(after[0]))]


def _take(request: Request, tokens: list[int], ends: frozenset[int]) -> Iterator[int]:
    for token in tokens:
        if token < 0 or request.is_done:
            return
        request.take(token, ends)
        yield token


def _seen(request: Request | None, vocab_size: int) -> Tensor:
    """The history that processors look at: bool [V]."""
    seen = torch.zeros(vocab_size, dtype=torch.bool)
    if request is not None:
        seen[request.prompt + request.output] = True
    return seen


_COUNTERS = "accept_counts", "rank_counts"  # [B, ...], never reset within a call; the second one only of trees
_ROW_STATE = (
    "prompt_lens", "limits", "finished", "row_keys", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
)  # fmt: skip


def _row_values(request: Request | None) -> dict[str, float]:
    if request is None:
        idle: dict[str, float] = dict.fromkeys(_ROW_STATE, 0)
        return idle | {"finished": True, "top_p": 1.0, "repetition_penalty": 1.0}
    sampling = request.sampling
    return {
        "prompt_lens": len(request.prompt), "limits": len(request.prompt) + request.max_new_tokens, "finished": False,
        "row_keys": request.row_key, "temperature": sampling.temperature, "top_k": sampling.top_k,
        "top_p": sampling.top_p, "min_p": sampling.min_p, "repetition_penalty": sampling.repetition_penalty,
    }  # fmt: skip
