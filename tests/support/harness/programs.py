"""Sessions over tiny programs, optionally with a planted bug, and scripted drafts."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from autospec.assemble import build_program
from autospec.config import (
    AutoConfig,
    DraftTargetConfig,
    Eagle3Config,
    MedusaConfig,
    MTPConfig,
    NGramConfig,
    Speculation,
    tree_of,
)
from autospec.program import Program, Shape
from autospec.runtime.metrics import Metrics
from autospec.runtime.request import Request, SamplingParams
from autospec.runtime.session import Session
from harness.models import GREEDY, captured

L = 4  # draft tokens of the widest step
BATCH, LENGTH, PAGE, CHUNK = 4, 96, 8, 16

# name -> configuration and the captured draft
CHOICES = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [2, 1], [0, 0, 0], [0, 1, 0], [2, 1, 0], [0, 0, 0, 1]]
_GROWN: dict[str, Any] = {"max_draft_len": L, "dynamic_tree_max_topk": 3, "max_total_draft_tokens": 14}

DRAFTERS: dict[str, tuple[Speculation, str | None]] = {
    "plain": (None, None),
    "ngram": (NGramConfig(max_draft_len=L, max_matching_ngram_size=3), None),
    "auto": (AutoConfig((0, 2, L)), None),
    "small": (DraftTargetConfig("small", L), "small"),
    "near": (DraftTargetConfig("near", L), "near"),
    "twin": (DraftTargetConfig("target", L), "target"),
    "small static": (DraftTargetConfig("small", eagle_choices=CHOICES), "small"),
    "small dynamic": (DraftTargetConfig("small", **_GROWN), "small"),
    "near dynamic": (DraftTargetConfig("near", **_GROWN), "near"),
    "latent twin": (DraftTargetConfig("latent", L), "latent"),
    "latent twin static": (DraftTargetConfig("latent", eagle_choices=CHOICES), "latent"),
    "sparse twin": (DraftTargetConfig("sparse", L), "sparse"),
    "sparse twin static": (DraftTargetConfig("sparse", eagle_choices=CHOICES), "sparse"),
    "twin static": (DraftTargetConfig("target", eagle_choices=CHOICES), "target"),
    "eagle": (Eagle3Config("eagle", L), "eagle"),
    "eagle static": (Eagle3Config("eagle", eagle_choices=CHOICES), "eagle"),
    "eagle dynamic": (Eagle3Config("eagle", **_GROWN), "eagle"),
    "medusa": (MedusaConfig("medusa", L), "medusa"),
    "medusa static": (MedusaConfig("medusa", eagle_choices=CHOICES), "medusa"),
    "medusa dynamic": (MedusaConfig("medusa", **_GROWN), "medusa"),
    "mtp": (MTPConfig("mtp", L), "mtp"),
    "mtp dynamic": (MTPConfig("mtp", **_GROWN), "mtp"),
    "mtp3": (MTPConfig("mtp3", L), "mtp3"),
    "mtp-latent static": (MTPConfig("mtp-latent", eagle_choices=CHOICES), "mtp-latent"),
    "mtp-sparse 7": (MTPConfig("mtp-sparse", 7), "mtp-sparse"),
    "mtp-share 7": (MTPConfig("mtp-share", 7), "mtp-share"),
    "mtp-share dynamic": (MTPConfig("mtp-share", **_GROWN), "mtp-share"),
    "mtp-sparse static": (MTPConfig("mtp-sparse", eagle_choices=CHOICES), "mtp-sparse"),
    "mtp3-sparse dynamic": (MTPConfig("mtp3-sparse", **_GROWN), "mtp3-sparse"),
    "mtp3 static": (MTPConfig("mtp3", eagle_choices=CHOICES), "mtp3"),
    "mtp3 dynamic": (MTPConfig("mtp3", **_GROWN), "mtp3"),
    **{f"mtp3 {length}": (MTPConfig("mtp3", length), "mtp3") for length in (1, 2, 3, 7)},
    "wide": (MedusaConfig("medusa", 8, dynamic_tree_max_topk=8, max_total_draft_tokens=63), "medusa"),
}


@dataclass(frozen=True)
class Plant:
    """A deliberate bug: `op` is replaced by `bug(op, graph name, *args)` in every graph of a program.

    Args:
        only: names of the graphs that get it; () for all.
        owner: only nodes whose module metadata starts with it ("draft" for an external draft's).
    """

    name: str
    op: str
    bug: Callable[..., Any]
    only: tuple[str, ...] = ()
    owner: str | None = None

    def apply(self, program: Program) -> int:
        count = 0
        for graph in program.graphs.values():
            if self.only and not graph.name.startswith(self.only):
                continue
            assert graph.module is not None
            for node in graph.module.graph.nodes:
                if not _is(node, self.op) or (
                    self.owner is not None and not str(node.meta.get("module")).startswith(self.owner)
                ):
                    continue
                node.target = _named(functools.partial(self.bug, node.target), self.op)
                count += 1
            graph.module.recompile()
        if not count:  # no AssertionError, which would look like a caught bug
            raise LookupError(f"{self.name} found no {self.op} to break in {sorted(program.graphs)}")
        return count


def _is(node: fx.Node, op: str) -> bool:
    return node.op == "call_function" and getattr(node.target, "_opname", "") == op


def _named(function: Any, name: str) -> Any:
    """fx wants a callable with a name and a module."""
    function.__name__, function.__module__ = f"planted_{name}", __name__
    return function


@dataclass
class Workshop:
    """Builds sessions and keeps them; with a plant, every program carries the bug."""

    plant: Plant | None = None
    prepare: Callable[[Session], None] | None = None  # a bug or a disturbance of the session itself
    _sessions: dict[tuple[Any, ...], Session] = field(default_factory=dict)

    def session(
        self, drafter: str = "plain", *, target: str = "target", sampling: bool = False, batch: int = BATCH,
        draft_len: int = L, page: int = PAGE, chunk: int = CHUNK, has_reader: bool = False, buckets: tuple[int, ...] = (),
        index_quantization: str | None = None,
    ) -> Session:  # fmt: skip
        key = (drafter, target, sampling, batch, draft_len, page, chunk, has_reader, buckets, index_quantization)
        if key not in self._sessions:
            speculation, draft = DRAFTERS[drafter]
            if drafter == "ngram" and draft_len != L:
                speculation = NGramConfig(max_draft_len=draft_len, max_matching_ngram_size=3)
            shape = Shape(
                batch, LENGTH, page, chunk, tree_of(speculation), sampling, index_quantization=index_quantization
            )
            build = functools.partial(
                self._build, captured(target), captured(draft) if draft else None, speculation
            )
            narrow = {rows: functools.partial(build, shape.narrow(rows)) for rows in buckets}
            self._sessions[key] = Session(build(shape), (lambda: build(shape.reader())) if has_reader else None, narrow)
            if self.prepare is not None:
                self.prepare(self._sessions[key])
        return self._sessions[key]

    def _build(self, target: Any, draft: Any, speculation: Speculation, shape: Shape) -> Program:
        program = build_program(target, draft, speculation, shape, "eager")
        if self.plant is not None and not shape.cache_rows:
            self.plant.apply(program)
        return program


Script = Callable[[dict[str, Tensor]], None]  # writes the next draft into the state


def run(
    session: Session, requests: Sequence[Request], eos_ids: Sequence[int] = (), *, script: Script | None = None,
    watch: Callable[[dict[str, Tensor]], None] | None = None, lag: int = 0,
) -> Metrics:  # fmt: skip
    """Session.run; `script` rewrites the draft before every step, `watch` sees the state after it; `lag` as on a GPU."""
    metrics = Metrics()
    plain = dict(session.steps)

    def scripted(step: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            if script is not None:
                script(session.state)
            emitted = step()
            if watch is not None:
                watch(session.state)
            return emitted

        return call

    session.step_seconds()
    session.steps = {length: scripted(step) for length, step in plain.items()}
    usual, session.lag = session.lag, lag
    try:
        session.run(requests, eos_ids, metrics)
    finally:
        session.steps, session.lag = plain, usual
    return metrics


@dataclass
class MixedDraft:
    """A drafter that knows the future: `accept(row, step)` true tokens, then noise; absent from `present` on.

    Args:
        futures: the full true sequence of each row, prompt included.
        accept: how many drafts to get right.
        present: how many nodes are present; None: all.
    """

    futures: Sequence[Sequence[int]]
    accept: Callable[[int, int], int]
    present: Callable[[int, int], int] | None = None
    vocab: int = 64
    keep: bool = False  # leave the drafter's own tokens where they are right, and only spoil what follows
    step: int = 0
    log: list[list[int]] = field(default_factory=list)  # per step, per row: how many drafts must be accepted

    def __call__(self, state: dict[str, Tensor]) -> None:
        width = state["draft_tokens"].shape[1] - 1
        expected = []
        for row, future in enumerate(self.futures):
            root = int(state["kv_lens"][row])
            right = min(self.accept(row, self.step), width)
            shown = width if self.present is None else min(self.present(row, self.step), width)
            limit = int(state["limits"][row])
            for j in range(width):
                slot = root + 1 + j
                known = future[slot] if slot < len(future) else 0
                if j >= right:
                    state["draft_tokens"][row, 1 + j] = self._noise(future, root, right, j, known)
                elif not self.keep:
                    state["draft_tokens"][row, 1 + j] = known
                state["tree_parents"][row, 1 + j] = j if j < shown and slot < limit else -1
            expected.append(min(right, shown, max(0, limit - root - 1)))
        self.step += 1
        self.log.append(expected)

    def _noise(self, future: Sequence[int], root: int, right: int, j: int, known: int) -> int:
        """A wrong token; every other one behind the first wrong node is the token that was wanted there."""
        rejected = root + 1 + right
        if j > right and (self.step + j) % 2 and rejected < len(future):
            return future[rejected]
        return (known + 1 + (self.step + j) % (self.vocab - 1)) % self.vocab


@dataclass
class TreeDraft:
    """A drafter of random trees that knows the future: true tokens mixed with noise, absent nodes among them.

    Args:
        futures: the full true sequence of each row, prompt included.
        truth: share of children of a true node that carry the true token.
        depth: nodes hang deeper for larger values; 0 is uniform over the earlier nodes.
        is_shuffled: the same trees with their nodes renumbered; parents still come first.
        log: per step, per row: how many drafts must be accepted.
    """

    futures: Sequence[Sequence[int]]
    seed: int
    max_draft_len: int
    truth: float = 0.5
    depth: int = 2
    is_shuffled: bool = False
    vocab: int = 64
    step: int = 0
    log: list[list[int]] = field(default_factory=list)

    def __call__(self, state: dict[str, Tensor]) -> None:
        expected = []
        for row, future in enumerate(self.futures):
            rng = random.Random(f"{self.seed} {self.step} {row}")
            root, limit = int(state["kv_lens"][row]), int(state["limits"][row])
            nodes = self._tree(rng, state["draft_tokens"].shape[1], future, root, limit)
            if self.is_shuffled:
                nodes = _renumbered(nodes, rng)
            for index, (parent, token) in enumerate(nodes[1:], start=1):
                state["draft_tokens"][row, index] = token
                state["tree_parents"][row, index] = parent
            expected.append(self._accepted(nodes, future, root))
        self.step += 1
        self.log.append(expected)

    def _tree(self, rng: random.Random, count: int, future: Sequence[int], root: int, limit: int) -> list[tuple[int, int]]:
        """(parent, token) of every node; siblings are distinct, so that their order means nothing."""
        nodes, depths, right = [(-1, future[root] if root < len(future) else 0)], [0], [True]
        has_draft = rng.random() > 0.1
        for index in range(1, count):
            parent = max(rng.randrange(index) for _ in range(1 + self.depth))
            depth = depths[parent] + 1
            slot = root + depth
            wanted = future[slot] if slot < len(future) else 0
            taken = {token for other, token in nodes if other == parent}
            is_right = right[parent] and wanted not in taken and rng.random() < self.truth
            free = [token for token in range(self.vocab) if token not in taken and token != wanted]
            present = has_draft and slot < limit and rng.random() > 0.05
            nodes.append((parent if present else -1, wanted if is_right else rng.choice(free)))
            depths.append(depth)
            right.append(is_right and present)
        return nodes

    def _accepted(self, nodes: list[tuple[int, int]], future: Sequence[int], root: int) -> int:
        node, length = 0, 0
        while length < self.max_draft_len:
            wanted = future[root + length + 1] if root + length + 1 < len(future) else None
            node = next((i for i, (parent, token) in enumerate(nodes) if i and parent == node and token == wanted), 0)
            if not node:
                break
            length += 1
        return length


def _renumbered(nodes: list[tuple[int, int]], rng: random.Random) -> list[tuple[int, int]]:
    """The same tree in another order of nodes; parents still come before children."""
    placed = [0]
    waiting = list(range(1, len(nodes)))
    while waiting:
        ready = [node for node in waiting if nodes[node][0] in (-1, *placed)]
        placed.append(rng.choice(ready))
        waiting.remove(placed[-1])
    place = {node: index for index, node in enumerate(placed)} | {-1: -1}
    return [(place[nodes[node][0]], nodes[node][1]) for node in placed]


def requests_of(
    prompts: Sequence[Sequence[int]], counts: int | Sequence[int], sampling: SamplingParams = GREEDY,
    keys: Sequence[int] | None = None,
) -> list[Request]:  # fmt: skip
    """One request per prompt; row keys are 1000 + row unless given."""
    many = [counts] * len(prompts) if isinstance(counts, int) else counts
    keys = keys or [1000 + row for row in range(len(prompts))]
    return [Request(list(prompt), count, sampling, key) for prompt, count, key in zip(prompts, many, keys, strict=True)]


def prompts_of(seed: int, lengths: Sequence[int], vocab: int = 64) -> list[list[int]]:
    """Random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]
