"""Runs one program over a batch of requests: fill the state, prefill, step until every row is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from autospec.errors import CapacityError
from autospec.program import SCRATCH_PAGES, Program
from autospec.runtime.metrics import Metrics
from autospec.runtime.policy import DraftLengthPolicy
from autospec.runtime.replay import as_cuda_graph
from autospec.runtime.request import Request

Emit = Callable[[int, list[int]], None]  # number of the request in the call, its new tokens

WARM_UPS = 3


class Session:
    """State of one program, reused from call to call."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.state = program.new_state()
        bound = {name: program.bind(name, self.state) for name in program.graphs}
        if program.facts.device.type == "cuda" and all(graph.is_compiled for graph in program.graphs.values()):
            # Fresh state is at rest: every row is finished and owns no page.
            pool = torch.cuda.graph_pool_handle()
            bound = {name: as_cuda_graph(run, program.facts.device, pool) for name, run in bound.items()}
        self.prefill = bound["prefill"]
        self.steps = {length: bound[f"step_{length}"] for length in program.draft_lens()}
        self._seconds: dict[int, float] | None = None

    def run(
        self, requests: Sequence[Request], eos_ids: Sequence[int], metrics: Metrics, emit: Emit | None = None
    ) -> None:
        """Generate all requests, at most `batch_size` of them; tokens go to request.output and to `emit`."""
        policy = DraftLengthPolicy(self.step_seconds()) if len(self.steps) > 1 else None
        start = time.perf_counter()  # after the warm-up that measures the steps, once per program
        self._load(requests, eos_ids)
        ends = frozenset(eos_ids)
        for _ in range(self._chunks(requests)):
            self._deliver(self.prefill(), requests, ends, emit)
            if metrics.first_token_seconds == 0.0 and any(request.output for request in requests):
                metrics.first_token_seconds = time.perf_counter() - start
        counts = self.state["accept_counts"].tolist()
        only = next(iter(self.steps))
        while not all(request.is_done for request in requests):
            draft_len = policy.next_draft_len() if policy else only
            self._deliver(self.steps[draft_len](), requests, ends, emit)
            now = self.state["accept_counts"].tolist()
            deltas = [after - before for after, before in zip(now, counts, strict=True)]
            counts = now
            assert deltas[0] > 0, "every row is finished on the device but not on the host: they disagree about a stop"
            metrics.count(draft_len, deltas)
            if policy:
                policy.observe(draft_len, deltas)
        if "rank_counts" in self.state:
            metrics.count_ranks(self.state["rank_counts"].tolist())
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

    def _chunks(self, requests: Sequence[Request]) -> int:
        longest = max(len(request.prompt) for request in requests)
        return -(-longest // self.program.shape.prefill_len)

    def _load(self, requests: Sequence[Request], eos_ids: Sequence[int]) -> None:
        """Write every request into its row; unused rows are finished and own no page."""
        shape, state = self.program.shape, self.state
        rows = self._rows(requests)
        eos = state["eos_ids"]
        if len(eos_ids) > eos.shape[0]:
            raise CapacityError(f"{len(eos_ids)} eos ids were given, at most {eos.shape[0]} are supported",
                                at="eos_ids", where="Session.run", help="keep those the model emits")  # fmt: skip
        # Build on the host, then copy once per tensor: state keeps its addresses.
        tokens = torch.zeros(shape.batch_size, shape.token_room, dtype=torch.int64)
        pages = torch.zeros(shape.batch_size, shape.pages_per_row, dtype=torch.int32)
        columns: dict[str, list[float]] = {name: [] for name in _ROW_STATE}
        for row, request in enumerate(rows):
            values = _row_values(request)
            for name in _ROW_STATE:
                columns[name].append(values[name])
            if request is not None:
                tokens[row, : len(request.prompt)] = torch.tensor(request.prompt)
                first = SCRATCH_PAGES + row * shape.pages_per_row
                pages[row] = torch.arange(first, first + shape.pages_per_row, dtype=torch.int32)
        state["tokens"].copy_(tokens)
        state["page_table"].copy_(pages)
        for name, values_of_rows in columns.items():
            if name in state:
                state[name].copy_(torch.tensor(values_of_rows, dtype=state[name].dtype))
        eos.copy_(torch.tensor([*eos_ids] + [-1] * (eos.shape[0] - len(eos_ids))))
        for name in ("kv_lens", "accept_counts", "draft_tokens"):
            state[name].zero_()
        state["tree_parents"].fill_(-1)
        if "rank_counts" in state:
            state["rank_counts"].zero_()
        if "seen" in state:
            width = state["seen"].shape[1]
            seen = [_seen(request, width) for request in requests]
            idle = [torch.zeros(width, dtype=torch.bool)] * (shape.batch_size - len(requests))
            state["seen"].copy_(torch.stack(seen + idle))

    def _rows(self, requests: Sequence[Request]) -> list[Request | None]:
        shape = self.program.shape
        if len(requests) > shape.batch_size:
            raise CapacityError(f"{len(requests)} requests do not fit a program built for {shape.batch_size} rows",
                                at="requests", where="Session.run", help="run them in waves")  # fmt: skip
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
        return [*requests] + [None] * (shape.batch_size - len(requests))

    def _deliver(self, emitted: object, requests: Sequence[Request], ends: frozenset[int], emit: Emit | None) -> None:
        """Hand the tokens of one graph call to their requests; a request that stops early is finished on the device."""
        assert isinstance(emitted, (tuple, list))
        for row, tokens in enumerate(emitted[0].tolist()[: len(requests)]):
            request = requests[row]
            taken = list(_take(request, tokens, ends))
            if taken and emit is not None:
                emit(row, taken)
            if taken and request.is_done and request.should_stop is not None:
                self._cut(row, request)

    def _cut(self, row: int, request: Request) -> None:
        """End a row at its last token: the device does not know stop strings, and keeps nothing past them."""
        state, ids = self.state, request.prompt + request.output
        state["finished"][row] = True
        state["kv_lens"][row] = len(ids) - 1
        state["tokens"][row, len(ids) :] = 0
        if "seen" in state:
            state["seen"][row] = _seen(request, state["seen"].shape[1])


def _take(request: Request, tokens: list[int], ends: frozenset[int]) -> Iterator[int]:
    for token in tokens:
        if token < 0 or request.is_done:
            return
        request.take(token, ends)
        yield token


def _seen(request: Request, vocab_size: int) -> Tensor:
    """The history that processors look at: bool [V]."""
    seen = torch.zeros(vocab_size, dtype=torch.bool)
    seen[request.prompt + request.output] = True
    return seen


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
