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
from autospec.lower import lower
from autospec.program import SCRATCH_PAGES, CapturedModel, Program, Shape, materialise
from autospec.runtime.replay import as_cuda_graph
from autospec.runtime.session import Session
from autospec.trees import DraftTree

WARM_UPS = 3
SAMPLES = 15


def verify_only(
    target: CapturedModel, shape: Shape, draft_len: int, compile: str, weights: dict[str, Tensor] | None = None
) -> Program:
    """The step of this shape without a drafter, as a program of one graph.

    Args:
        weights: of a program of the same target, by slot name; shared where the names agree.
    """
    module, name = copy_graph(target.graph), f"step_{draft_len}"
    run_stages(module, pipeline.step(shape, target.facts, None, None, draft_len), graph_name=name, debug=debug.options())
    known = dict(target.weights) | constants_of(module)
    graph = lower(module, name, compile)
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
        (name,) = program.graphs
        state = program.new_state()
        step = program.bind(name, state)
        if program.facts.device.type == "cuda" and program.graphs[name].is_compiled:
            step = as_cuda_graph(step, program.facts.device, torch.cuda.graph_pool_handle())
        _place(state, program.shape, tokens)
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


def _place(state: dict[str, Tensor], shape: Shape, tokens: Sequence[int]) -> None:
    """Row 0 has committed `tokens` but the last, which is the root of a whole draft that will hardly be accepted."""
    count, tree = len(tokens), shape.tree
    state["tokens"][0, :count] = torch.tensor(tokens)
    pages = torch.arange(SCRATCH_PAGES, SCRATCH_PAGES + shape.pages_per_row, dtype=torch.int32)
    state["page_table"][0] = pages.to(state["page_table"].device)
    for name, value in {"kv_lens": count - 1, "prompt_lens": 1, "limits": shape.max_length, "finished": False}.items():
        state[name][0] = value
    drafts = [tokens[-1]] + [tokens[index % count] for index in range(tree.num_nodes - 1)]
    state["draft_tokens"][0] = torch.tensor(drafts)
    state["tree_parents"][0] = torch.tensor(links(tree), dtype=torch.int32)


def links(tree: DraftTree) -> list[int]:
    """tree_parents of a draft of this shape in which no node is absent."""
    if tree.choices:
        return tree.parents()
    if tree.is_chain:
        return list(range(-1, tree.num_nodes - 1))
    return [-1] + [(node - 1) // tree.dynamic_tree_max_topk for node in range(1, tree.num_nodes)]
