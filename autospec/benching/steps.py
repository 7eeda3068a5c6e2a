"""How long a step takes, and which part of it is spent where.

A part is timed by leaving the others out. `verify_only` builds the step without its drafter: the target over the same
nodes with the same mask, choosing, accepting, committing. So

    draft = whole step - verify-only step      (catching up, growing the tree, storing it)
    glue  = wall time of a real run that passes outside of its steps, by step      (the host: reading tokens, stopping)

Whole and verify-only steps are timed on one live row whose cache is filled to the middle of a typical output; its small
state is put back before every call, so each call does the same work. Steps take turns and medians are taken, so that a
slow moment of the machine hits all of them alike. A difference within the machine's noise can come out negative.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from autospec import debug, pipeline
from autospec.assemble import copy_graph
from autospec.ir.runner import run_stages
from autospec.ir.sizes import constants_of
from autospec.lower import lower, manner
from autospec.program import SCRATCH_PAGES, CapturedModel, Program, Shape, materialise
from autospec.runtime.replay import as_cuda_graph
from autospec.runtime.session import Session
from autospec.trees import DraftTree

WARM_UPS = 3
SAMPLES = 15


def verify_only(
    target: CapturedModel, shape: Shape, draft_len: int, compile: str, weights: dict[str, Tensor] | None = None,
    left_out: frozenset[str] = frozenset(),
) -> Program:  # fmt: skip
    """The step of this shape without a drafter, as a program of one graph.

    Args:
        weights: of a program of the same target, by slot name; shared where the names agree.
        left_out: names of optional passes that do not run.
    """
    module, name = copy_graph(target.graph), f"step_{draft_len}"
    stages = pipeline.step(shape, target.facts, None, None, draft_len)
    run_stages(module, stages, graph_name=name, debug=debug.options(), left_out=left_out)
    known = dict(target.weights) | constants_of(module)
    graph = lower(module, name, manner(shape, compile))
    shared = weights or {}
    bound = {
        slot.name: shared[slot.name] if slot.name in shared else materialise(slot, known)
        for slot in graph.slots if slot.kind == "weight"
    }  # fmt: skip
    return Program(shape, target.facts, {name: graph}, bound)


def only_step(program: Program, draft_len: int, compile: str | None = None) -> Program:
    """One step of a program; `compile` lowers it, where the program is an eager one."""
    name = f"step_{draft_len}"
    graph = program.graphs[name]
    if compile is not None and compile != "eager":
        assert not graph.is_compiled, "only an eager step can be lowered once more"
        assert graph.module is not None, "a graph that was just built has a module"
        graph = lower(graph.module, name, compile)
    return Program(program.shape, program.facts, {name: graph}, program.weights)


@dataclass
class Frozen:
    """A step on a state that is put back before every call."""

    step: Callable[[], object]
    state: dict[str, Tensor]
    kept: dict[str, Tensor]

    @staticmethod
    def of(program: Program, tokens: Sequence[int]) -> Frozen:
        """The program's only step, on one row that has committed all of these tokens but the last."""
        return Frozen.of_rows(program, [tokens])

    @staticmethod
    def of_rows(program: Program, rows: Sequence[Sequence[int]]) -> Frozen:
        """The same on several rows."""
        (name,) = program.graphs
        state = program.new_state()
        step = program.bind(name, state)
        if program.facts.device.type == "cuda" and program.graphs[name].is_compiled:
            step = as_cuda_graph(step, program.facts.device, torch.cuda.graph_pool_handle())
        for row, tokens in enumerate(rows):
            _place(state, program.shape, row, tokens)
        kept = {name: value.clone() for name, value in state.items() if "_pages." not in name}
        return Frozen(step, state, kept)

    def seconds(self) -> float:
        """One call, without putting the state back."""
        for name, value in self.kept.items():
            self.state[name].copy_(value)
        _wait(self.state["tokens"].device)
        start = time.perf_counter()
        self.step()
        _wait(self.state["tokens"].device)
        return time.perf_counter() - start

    def streamed(self, calls: int) -> list[float]:
        """Seconds of each of so many calls in a row, on a state that is put back first and then moves on.

        On a GPU all of them are queued at once and events stand between them: the host's share is left out.
        """
        for name, value in self.kept.items():
            self.state[name].copy_(value)
        if self.state["tokens"].device.type != "cuda":
            marks = [time.perf_counter()]
            for _ in range(calls):
                self.step()
                marks.append(time.perf_counter())
            return [after - before for before, after in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        events[0].record()
        for event in events[1:]:
            self.step()
            event.record()
        events[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(events)]


@contextmanager
def clocked(session: Session) -> Iterator[list[float]]:
    """The seconds of every step that the session runs inside the block, with the device idle around each."""
    times: list[float] = []
    original, device = session.steps, session.program.facts.device

    def clock(run: Callable[[], object]) -> Callable[[], object]:
        def step() -> object:
            start = time.perf_counter()
            result = run()
            _wait(device)
            times.append(time.perf_counter() - start)
            return result

        return step

    session.steps = {length: clock(run) for length, run in original.items()}
    try:
        yield times
    finally:
        session.steps = original


def step_seconds(programs: Sequence[Program], tokens: Sequence[int], samples: int = SAMPLES) -> list[float]:
    """Median time of the only step of each program, all of them in turn."""
    frozen = [Frozen.of(program, tokens) for program in programs]
    times: list[list[float]] = [[] for _ in frozen]
    for _ in tqdm(range(WARM_UPS + samples), desc="timing steps", leave=False):
        for one, samples_of in zip(frozen, times, strict=True):
            one.seconds()  # the others have taken the caches since its last call
            samples_of.append(one.seconds())
    return [statistics.median(one[WARM_UPS:]) for one in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _place(state: dict[str, Tensor], shape: Shape, row: int, tokens: Sequence[int]) -> None:
    """A row has committed `tokens` but the last, which is the root of a whole draft that will hardly be accepted."""
    count, tree = len(tokens), shape.tree
    state["tokens"][row, :count] = torch.tensor(tokens)
    first = SCRATCH_PAGES + row * shape.pages_per_row
    pages = torch.arange(first, first + shape.pages_per_row, dtype=torch.int32)
    state["page_table"][row] = pages.to(state["page_table"].device)
    for name, value in {"kv_lens": count - 1, "prompt_lens": 1, "limits": shape.max_length, "finished": False}.items():
        state[name][row] = value
    drafts = [tokens[-1]] + [tokens[index % count] for index in range(tree.num_nodes - 1)]
    state["draft_tokens"][row] = torch.tensor(drafts)
    state["tree_parents"][row] = torch.tensor(links(tree), dtype=torch.int32)


def links(tree: DraftTree) -> list[int]:
    """tree_parents of a draft of this shape in which no node is absent."""
    if tree.choices:
        return tree.parents()
    if tree.is_chain:
        return list(range(-1, tree.num_nodes - 1))
    return [-1] + [(node - 1) // tree.dynamic_tree_max_topk for node in range(1, tree.num_nodes)]
