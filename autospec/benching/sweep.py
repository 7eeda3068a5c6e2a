"""Which draft is worth its time on this machine: a chain or a tree, and how large.

Acceptance. An eager program drafts at *every* position of the outputs: before each step the host marks all nodes of its
draft absent, so it emits one token and drafts again. A draft is a function of the committed tokens only, so a run with
any smaller budget can be replayed from these drafts exactly. A chain of L holds every shorter chain. A dynamic tree of
D levels is the M best of the first K + K^2 (D - 1) candidates, so one recording for a K, with the score of every
candidate, holds every D and M: the rank of the candidates on the true path decides where a run would have stopped.

Time. Verify-only steps are timed for chains and, with their mask, for trees of N nodes; whole steps of two depths for
every K give the draft's cost, first pass + (D - 1) levels. Other sizes lie on the lines between what was timed.
Then tokens/s = mean acceptance length / (verify + draft + glue). Acceptance is that outside of repetition loops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from autospec.api import OptimizedModel
from autospec.assemble import build_program
from autospec.benching.steps import only_step, step_seconds, verify_only
from autospec.config import DraftTargetConfig, Eagle3Config, MedusaConfig, NGramConfig, Speculation
from autospec.ir.match import calls
from autospec.kernels.build_dynamic_tree import build_dynamic_tree
from autospec.model_zoo.demo.evaluate import loop_start
from autospec.program import Program, Shape
from autospec.trees import DraftTree, chain, dynamic_tree

SWEPT = (NGramConfig, DraftTargetConfig, Eagle3Config, MedusaConfig)
LEVELS = 8  # deepest draft that is tried; published heads are run with 3 to 8
PROBES = {True: (1, 7), False: (2, 5)}  # levels of the whole steps that are timed, for a chain and for trees


@dataclass(frozen=True)
class Proposals:
    """The drafts at every position of one output.

    Args:
        text: the output.
        children: [P, L] int64, the candidate on the true path at each depth, by its place in the history; -1 from
            where no candidate was right.
        scores: [P, H] float64 of all candidates; None: a chain, whose candidate at depth d is number d.
    """

    text: list[int]
    children: np.ndarray
    scores: np.ndarray | None

    def accept_lengths(self, tree: DraftTree) -> np.ndarray:
        """How many draft tokens a step from each position accepts, [P]."""
        children = self.children[:, : tree.max_draft_len]
        hit = children >= 0
        if self.scores is not None:
            top_k = tree.dynamic_tree_max_topk
            size = top_k + top_k**2 * (tree.max_draft_len - 1)
            order = np.argsort(-self.scores[:, :size], axis=1, kind="stable")
            rank = np.empty_like(order)
            np.put_along_axis(rank, order, np.arange(size)[None, :], axis=1)
            hit &= np.take_along_axis(rank, children.clip(min=0), axis=1) < tree.max_total_draft_tokens
        return np.cumprod(hit, axis=1).sum(axis=1)


def mean_length(proposals: Sequence[Proposals], tree: DraftTree, *, with_loops: bool = False) -> float:
    """Mean acceptance length of runs with this draft; 1 without steps."""
    steps = tokens = 0
    for one in proposals:
        lengths = one.accept_lengths(tree)
        stop = len(one.text) if with_loops else loop_start(one.text)
        position = 0
        while position + 1 < stop:
            steps += 1
            tokens += int(lengths[position]) + 1
            position += int(lengths[position]) + 1
    return tokens / steps if steps else 1.0


def propose(fast: OptimizedModel, speculation: Speculation, prompts: Sequence[Sequence[int]], options: Any) -> list[Proposals]:
    """The drafts of this configuration at every position of the outputs."""
    eager = OptimizedModel(fast.target, fast.draft, speculation, "eager", fast.limits, fast.generation_defaults)
    eager.generate([list(prompts[0])], **{**options, "max_new_tokens": 1})  # builds the session
    session = eager.session
    for graph in session.program.graphs.values():
        assert graph.module is not None
        _return_history(graph.module)
    drafts: dict[int, tuple[np.ndarray, ...]] = {}
    tree = session.program.shape.tree
    blanked = [_blanking(run, session.state, drafts, tree.is_chain) for run in (session.prefill, *session.steps.values())]
    session.prefill, session.steps = blanked[0], dict(zip(session.steps, blanked[1:], strict=True))
    found = []
    for prompt in tqdm(prompts, desc="drafting at every position", leave=False):
        drafts.clear()
        output = eager.generate([list(prompt)], **options)[0, len(prompt) :].tolist()
        assert eager.session is session, "all prompts fit one session"
        found.append(_followed(output, len(prompt), drafts, tree))
    return found


def _return_history(module: Any) -> None:
    """Let a graph return the candidates that its dynamic tree was chosen from, beside what it emitted."""
    for node in calls(module, build_dynamic_tree.every_form):
        output = module.graph.output_node()
        output.args = ((*output.args[0], *node.args[1:4]),)
        module.recompile()


def _blanking(
    run: Callable[[], Any], state: Any, drafts: dict[int, tuple[np.ndarray, ...]], is_chain: bool
) -> Callable[[], Any]:
    """`run`, then keep the draft it left for row 0 by the slot of its root, and make its nodes absent."""

    def blanked() -> Any:
        result = run()
        slot = int(state["kv_lens"][0])
        if slot >= int(state["prompt_lens"][0]) and slot not in drafts:
            if is_chain:
                tokens, present = (state[name][0, 1:].cpu().numpy() for name in ("draft_tokens", "tree_parents"))
                scores, parents = np.where(present >= 0, 0.0, -np.inf), np.arange(-1, len(tokens) - 1)
            else:
                tokens, scores, parents = (value[0].cpu().numpy() for value in result[-3:])
            drafts[slot] = tokens.copy(), scores.astype(np.float64), parents.copy()
        state["tree_parents"].fill_(-1)
        return result

    return blanked


def _followed(text: list[int], start: int, drafts: dict[int, tuple[np.ndarray, ...]], tree: DraftTree) -> Proposals:
    """Follow the true continuation through the draft at each position of the text."""
    levels = tree.max_draft_len
    children = np.full((len(text), levels), -1, dtype=np.int64)
    width = len(next(iter(drafts.values()))[1])
    scores = np.full((len(text), width), -np.inf)
    for position in range(len(text)):
        if start + position not in drafts:
            continue  # the last token is never a root
        tokens, score, parents = drafts[start + position]
        scores[position] = np.where(np.isnan(score), -np.inf, score)
        current = -1
        for depth, token in enumerate(text[position + 1 : position + 1 + levels]):
            right = np.flatnonzero((parents == current) & (tokens == token) & (scores[position] > -np.inf))
            if not len(right):
                break
            current = children[position, depth] = right[0]
    return Proposals(text, children, None if tree.is_chain else scores)


@dataclass(frozen=True)
class Budget:
    """A draft, and what it promises: lengths with and without loops, seconds of its parts."""

    tree: DraftTree
    mean_length: float
    mean_length_with_loops: float
    verify: float
    draft: float
    glue: float

    @property
    def tokens_per_second(self) -> float:
        return self.mean_length / (self.verify + self.draft + self.glue)

    @property
    def options(self) -> str:
        """The options of the command line that ask for it."""
        text = f"--max-draft-len {self.tree.max_draft_len}"
        if self.tree.dynamic_tree_max_topk:
            text += f" --dynamic-tree-max-topk {self.tree.dynamic_tree_max_topk}"
            text += f" --max-total-draft-tokens {self.tree.max_total_draft_tokens}"
        return text


@dataclass
class Times:
    """Measured seconds.

    Args:
        verify: by (is a chain, N).
        draft: by K (1: a chain), the cost of the first pass and of every further level.
    """

    verify: dict[tuple[bool, int], float] = field(default_factory=dict)
    draft: dict[int, tuple[float, float]] = field(default_factory=dict)

    def verify_at(self, nodes: int, is_chain: bool) -> float:
        """On the lines between the sizes that were timed."""
        known = sorted((n, seconds) for (kind, n), seconds in self.verify.items() if kind == is_chain)
        return float(np.interp(nodes, [n for n, _ in known], [seconds for _, seconds in known]))

    @property
    def is_disturbed(self) -> bool:
        """A step took a tenth longer than one of more nodes, so something else ran beside them."""
        return any(
            mine > 1.1 * more
            for (kind, nodes), mine in self.verify.items() for (other, wider), more in self.verify.items()
            if kind == other and nodes < wider
        )  # fmt: skip

    def draft_at(self, tree: DraftTree) -> float:
        first, level = self.draft[tree.dynamic_tree_max_topk or 1]
        return first + level * (tree.max_draft_len - 1)


@dataclass(frozen=True)
class Row:
    """The best drafts that verify at most (a chain) or exactly (a tree) this many nodes."""

    nodes: int
    chain: Budget | None
    tree: Budget | None


@dataclass(frozen=True)
class Sweep:
    """What was measured and what follows from it.

    Args:
        asked: the --speculation that names the drafter.
        times: of steps.
        plain: decoding without drafts.
        rows: by N.
    """

    asked: str
    times: Times
    plain: Budget
    rows: list[Row]

    @property
    def best_chain(self) -> Budget | None:
        return _best(row.chain for row in self.rows)

    @property
    def best_tree(self) -> Budget | None:
        return _best(row.tree for row in self.rows)

    @property
    def best(self) -> Budget:
        return _best([self.plain, self.best_chain, self.best_tree]) or self.plain


def _best(budgets: Any) -> Budget | None:
    return max((one for one in budgets if one is not None), key=lambda one: one.tokens_per_second, default=None)


def sweep(
    asked: str, fast: OptimizedModel, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], options: Any,
    *, nodes: Sequence[int], topks: Sequence[int], glue: float,
) -> Sweep:  # fmt: skip
    """Measure one drafter.

    Args:
        asked: the --speculation that names the drafter.
        fast: a model with this drafter; its own tree does not matter.
        outputs: what the prompts are completed with.
        options: of generate.
        nodes, topks: the N and K to try.
        glue: seconds of the host per step.
    """
    speculation = fast.speculation
    assert isinstance(speculation, SWEPT), "other drafters choose their own budget"
    heads = getattr(fast.draft, "max_draft_len", None)
    levels = min(LEVELS, heads or LEVELS)
    widths = [] if isinstance(speculation, NGramConfig) else list(topks)
    texts = [[*prompt, *output[: len(output) // 2]] for prompt, output in zip(prompts, outputs, strict=True)]
    text = max(texts, key=len)
    times = measure(fast, nodes, widths, levels, text)
    chains = propose(fast, with_tree(speculation, chain(levels)), prompts, options)
    plain = Budget(chain(0), 1.0, 1.0, times.verify_at(1, True), 0.0, glue)

    def budget(proposals: list[Proposals], tree: DraftTree) -> Budget:
        return Budget(
            tree, mean_length(proposals, tree), mean_length(proposals, tree, with_loops=True),
            times.verify_at(tree.num_nodes, tree.is_chain), times.draft_at(tree), glue,
        )  # fmt: skip

    lines = [budget(chains, chain(length)) for length in range(1, levels + 1)]
    trees: list[Budget] = []
    for width in widths:
        deepest = with_tree(speculation, dynamic_tree(width, levels, levels))
        proposals = propose(fast, deepest, prompts, options)
        trees += [budget(proposals, tree) for tree in tree_grid(width, levels, nodes)]
    rows = [
        Row(n, _best(one for one in lines if one.tree.num_nodes <= n), _best(one for one in trees if one.tree.num_nodes == n))
        for n in nodes if n > 1
    ]  # fmt: skip
    return Sweep(asked, times, plain, rows)


def tree_grid(width: int, levels: int, nodes: Sequence[int]) -> list[DraftTree]:
    """The dynamic trees of this top-k that have one of these sizes."""
    return [
        dynamic_tree(width, depth, n - 1)
        for n in nodes for depth in range(1, levels + 1)
        if depth <= n - 1 <= width + width**2 * (depth - 1)
    ]  # fmt: skip


def with_tree(speculation: Any, tree: DraftTree) -> Any:
    """The same drafter with another draft."""
    if isinstance(speculation, NGramConfig):
        return dataclasses.replace(speculation, max_draft_len=tree.max_draft_len)
    top_k = tree.dynamic_tree_max_topk or None
    return dataclasses.replace(
        speculation, max_draft_len=tree.max_draft_len, eagle_choices=None, use_dynamic_tree=None,
        dynamic_tree_max_topk=top_k, max_total_draft_tokens=tree.max_total_draft_tokens if top_k else None,
    )  # fmt: skip


def probe(width: int, depth: int) -> DraftTree:
    """The smallest draft of this depth whose size is a power of two, so that its verify step is timed as well."""
    if width == 1:
        return chain(depth)
    total = 1
    while total < depth:
        total = 2 * total + 1
    return dynamic_tree(width, depth, total)


def measure(fast: OptimizedModel, nodes: Sequence[int], topks: Sequence[int], levels: int, text: Sequence[int]) -> Times:
    """Time verify-only steps of every N, and whole steps that tell what drafting costs."""
    base, target = fast.session.program, fast.target
    weights = {name: value for name, value in base.weights.items() if not name.startswith("draft")}
    probes = [probe(width, min(depth, levels)) for width in (1, *topks) for depth in PROBES[width == 1]]
    probes = list(dict.fromkeys(probes))
    verified = {(True, n) for n in nodes} | {(False, n) for n in nodes if n > 2 and topks}
    verified |= {(one.is_chain, one.num_nodes) for one in probes} | {(True, 1)}

    def shape_of(tree: DraftTree) -> Shape:
        return dataclasses.replace(base.shape, tree=tree)

    programs: list[Program] = []
    for is_chain, n in tqdm(sorted(verified), desc="verify-only steps", leave=False):
        tree = chain(n - 1) if is_chain else dynamic_tree(8, min(4, n - 1), n - 1)
        programs.append(verify_only(target, shape_of(tree), tree.max_draft_len, fast.compile, weights))
    for tree in tqdm(probes, desc="whole steps", leave=False):
        speculation = with_tree(fast.speculation, tree)
        eager = build_program(target, fast.draft, speculation, shape_of(tree), "eager", dict(weights))
        programs.append(only_step(eager, tree.max_draft_len, fast.compile))
    seconds = step_seconds(programs, text)
    times = Times(verify=dict(zip(sorted(verified), seconds, strict=False)))
    whole = dict(zip(probes, seconds[len(verified) :], strict=True))
    for width in (1, *topks):
        points = {
            one.max_draft_len: whole[one] - times.verify[one.is_chain, one.num_nodes]
            for one in probes if (one.dynamic_tree_max_topk or 1) == width
        }  # fmt: skip
        (low, first), (high, last) = min(points.items()), max(points.items())
        level = max(0.0, (last - first) / (high - low)) if high > low else 0.0
        times.draft[width] = max(0.0, first - level * (low - 1)), level
    return times
