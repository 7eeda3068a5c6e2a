"""What every step drafted and emitted, seen from the host; nothing here runs while anything is timed.

A loop flatters every drafter, so acceptance is also counted outside of loops: a step counts there if the first token
it emits stands before the output begins to repeat itself (`loop_start`, the rule the bundled models are judged by).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from autospec.model_zoo.demo.evaluate import loop_start
from autospec.runtime.session import Session
from autospec.trees import DraftTree

Key = tuple[int, ...]  # a static tree's path of ranks, or (depth, rank)


@dataclass(frozen=True)
class Step:
    """One step of one row.

    Args:
        tokens, parents: the nodes that were verified, the root first; absent ones have parent -1.
        emitted: the tokens that the step added to the output.
        first: index in the output of the first of them.
        draft_len: longest path that the step could accept.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    emitted: tuple[int, ...]
    first: int
    draft_len: int

    @cached_property
    def path(self) -> tuple[int, ...]:
        """The accepted nodes, the root left out."""
        found: list[int] = []
        current = 0
        for token in self.emitted:
            nodes = range(current + 1, len(self.tokens))
            child = next((i for i in nodes if self.parents[i] == current and self.tokens[i] == token), None)
            if child is None:
                break
            found.append(child)
            current = child
        return tuple(found)

    @cached_property
    def depth(self) -> dict[int, int]:
        """Depth of every present node, the root's is 0."""
        depth = {0: 0}
        for node, parent in enumerate(self.parents):
            if node and parent in depth:
                depth[node] = depth[parent] + 1
        return depth

    def rank(self, node: int) -> int:
        """How many siblings stand before the node."""
        return self.parents[:node].count(self.parents[node])


@contextmanager
def recorded(session: Session) -> Iterator[list[Step]]:
    """The steps of row 0 that the session runs inside the block."""
    steps: list[Step] = []
    original = session.steps
    session.steps = {length: _recording(session, length, run, steps) for length, run in original.items()}
    try:
        yield steps
    finally:
        session.steps = original


def _recording(session: Session, draft_len: int, run: Callable[[], object], steps: list[Step]) -> Callable[[], object]:
    state, tree = session.state, session.program.shape.tree
    nodes = draft_len + 1 if tree.is_chain else tree.num_nodes

    def step() -> object:
        tokens, parents = (tuple(state[name][0, :nodes].tolist()) for name in ("draft_tokens", "tree_parents"))
        first = int(state["kv_lens"][0]) + 1 - int(state["prompt_lens"][0])
        result = run()
        assert isinstance(result, (tuple, list)), "a step returns what it emitted first"
        emitted = tuple(token for token in result[0][0].tolist() if token >= 0)
        if emitted:  # a row that has ended may be launched once more
            steps.append(Step(tokens, parents, emitted, first, draft_len))
        return result

    return step


@dataclass
class Acceptance:
    """Counts over steps that verified a draft.

    Args:
        steps: how many.
        reached: reached[d], those that accepted at least d + 1 draft tokens.
        ranks: accepted nodes by their rank among siblings.
        nodes: draft nodes verified, absent ones left out.
    """

    steps: int = 0
    reached: list[int] = field(default_factory=list)
    ranks: Counter[int] = field(default_factory=Counter)
    nodes: int = 0

    def add(self, step: Step) -> None:
        if step.draft_len == 0:
            return
        self.steps += 1
        self.nodes += len(step.depth) - 1
        self.reached += [0] * (step.draft_len - len(self.reached))
        for depth, node in enumerate(step.path):
            self.reached[depth] += 1
            self.ranks[step.rank(node)] += 1

    @property
    def per_depth(self) -> list[float]:
        return [count / self.steps for count in self.reached] if self.steps else []

    @property
    def per_rank(self) -> list[float]:
        """Share of the accepted nodes that were the first, second, ... among their siblings."""
        total = self.ranks.total()
        return [self.ranks[rank] / total for rank in range(max(self.ranks, default=-1) + 1)] if total else []

    @property
    def mean_length(self) -> float:
        return 1.0 + sum(self.per_depth)

    @property
    def nodes_per_step(self) -> float:
        return self.nodes / self.steps if self.steps else 0.0


def acceptance(steps: Iterable[Step]) -> Acceptance:
    """The counts of these steps."""
    counted = Acceptance()
    for step in steps:
        counted.add(step)
    return counted


def outside_loops(steps: Sequence[Step], output: Sequence[int]) -> list[Step]:
    """The steps of one output that began before it repeated itself."""
    stop = loop_start(list(output))
    return [step for step in steps if step.first < stop]


@dataclass(frozen=True)
class NodeRate:
    """How a place in the tree fared.

    Args:
        offered: nodes verified there per step.
        accepted: share of steps whose accepted path went through it.
    """

    offered: float
    accepted: float

    @property
    def rate(self) -> float:
        """Acceptance of a node that was verified there."""
        return self.accepted / self.offered if self.offered else 0.0


def node_rates(steps: Sequence[Step], tree: DraftTree) -> dict[Key, NodeRate]:
    """By node for chains and static trees (its path of ranks), by (depth, rank) for dynamic trees."""
    offered: Counter[Key] = Counter()
    accepted: Counter[Key] = Counter()
    for step in steps:
        for node, depth in step.depth.items():
            if node:
                offered[_place(step, node, depth, tree)] += 1
        for depth, node in enumerate(step.path, start=1):
            accepted[_place(step, node, depth, tree)] += 1
    count = max(1, len(steps))
    return {place: NodeRate(offered[place] / count, accepted[place] / count) for place in sorted(offered)}


def _place(step: Step, node: int, depth: int, tree: DraftTree) -> Key:
    if tree.is_chain:
        return (0,) * depth
    return tree.choices[node - 1] if tree.choices else (depth, step.rank(node))
