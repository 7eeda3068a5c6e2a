"""The laws of draft trees, as functions of a workshop: each returns in silence or raises AssertionError."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from autospec.kernels.noise import gumbel
from autospec.runtime.metrics import Metrics
from autospec.runtime.request import SamplingParams
from autospec.runtime.session import Session
from autospec.trees import DraftTree
from harness.laws import CLOSE, at_rest, cache_is_fresh, committed, same_tokens
from harness.models import GREEDY, MODULES, VOCAB, eagle_rows, logits, mtp_rows, oracle
from harness.programs import TreeDraft, Workshop, prompts_of, requests_of, run

PROMPTS = prompts_of(1, (3, 17, 9, 33))
Path = tuple[int, ...]


def futures_of(target: str, new_tokens: int, sampling: SamplingParams) -> list[list[int]]:
    """Prompts with their true continuations, long enough for drafts that stand past the end."""
    return [
        prompt + oracle(target, prompt, new_tokens + 12, sampling, 1000 + row) for row, prompt in enumerate(PROMPTS)
    ]


def lossless_for_any_tree(
    workshop: Workshop, seed: int = 0, sampling: SamplingParams = GREEDY, target: str = "target", drafter: str = "wide",
    truth: float = 0.5, depth: int = 2, is_shuffled: bool = False, new_tokens: int = 24,
) -> Metrics:  # fmt: skip
    """Random trees: tokens as the oracle's, exactly the right nodes accepted, caches as after a fresh prefill."""
    futures = futures_of(target, new_tokens, sampling)
    session = workshop.session(drafter, target=target, sampling=sampling.needs_scores)
    draft = TreeDraft(futures, seed, session.program.shape.tree.max_draft_len, truth, depth, is_shuffled)
    requests = requests_of(PROMPTS, new_tokens, sampling)
    live: list[list[bool]] = []

    def script(state: dict[str, Tensor]) -> None:
        live.append((~state["finished"]).tolist())
        draft(state)

    metrics = run(session, requests, script=script)
    same_tokens(requests, [future[len(p) : len(p) + new_tokens] for future, p in zip(futures, PROMPTS, strict=True)])
    at_rest(session, requests)
    for row, request in enumerate(requests):
        cache_is_fresh(session, row, request.prompt + request.output, target)
    counted = [
        right
        for flags, rights in zip(live, draft.log, strict=True)
        for flag, right in zip(flags, rights, strict=False)
        if flag
    ]
    reached = [sum(right > depth for right in counted) for depth in range(len(metrics.reached))]
    assert metrics.reached == reached, f"accepted per depth {metrics.reached}, expected {reached}"
    return metrics


def siblings_in_any_order(workshop: Workshop, seed: int = 3) -> None:
    """Renumbering the nodes of every tree changes neither tokens nor acceptance."""
    plain, shuffled = (lossless_for_any_tree(workshop, seed, is_shuffled=value) for value in (False, True))
    assert plain.reached == shuffled.reached


def window_inside_a_tree(workshop: Workshop) -> None:
    """A sliding window of 7 ends among the nodes of deep trees."""
    lossless_for_any_tree(workshop, 5, target="window", truth=0.8, depth=4)


def chunk_inside_a_tree(workshop: Workshop) -> None:
    """A chunk boundary every 8 positions falls among the nodes of deep trees."""
    lossless_for_any_tree(workshop, 6, target="chunk", truth=0.8, depth=4)


WARM = SamplingParams(temperature=1.0, top_k=30, top_p=0.95, repetition_penalty=1.3)


def warm_lossless_for_any_tree(workshop: Workshop) -> None:
    """With processors that look at the ancestors of a node."""
    lossless_for_any_tree(workshop, 7, WARM, truth=0.8)


def draft_caches_stay_fresh(
    workshop: Workshop, drafter: str = "small dynamic", seed: int = 8, target: str = "target"
) -> None:
    """Paths accepted anywhere in the tree leave the drafter's cache as a fresh run of the emitted tokens would."""
    new_tokens = 20
    futures = futures_of(target, new_tokens, GREEDY)
    session = workshop.session(drafter, target=target)
    draft = TreeDraft(futures, seed, session.program.shape.tree.max_draft_len, truth=0.7)
    requests = requests_of(PROMPTS, new_tokens)
    boundaries = 0

    def watch(state: dict[str, Tensor]) -> None:
        nonlocal boundaries
        boundaries += 1
        if boundaries in (1, 2, 4):
            for row, future in enumerate(futures):
                drafter_is_fresh(session, row, future[: int(state["kv_lens"][row]) + 1], drafter, target)

    run(session, requests, script=draft, watch=watch)
    for row, request in enumerate(requests):
        drafter_is_fresh(session, row, request.prompt + request.output, drafter, target)


def drafter_is_fresh(session: Session, row: int, ids: list[int], drafter: str, target: str) -> None:
    name = drafter.split()[0]
    if name != "eagle" and name not in MODULES:
        cache_is_fresh(session, row, ids, target, name)
        return
    cache_is_fresh(session, row, ids, target)
    for layer, pair in enumerate(_refed(name, ids)[1], start=session.program.facts.num_kv_layers):
        got = committed(session, row, layer, len(ids) - 1, pair)
        for letter, mine, wanted in zip("KV", got, pair, strict=True) if got else ():
            error = float((mine - wanted).abs().max())
            assert error < CLOSE, f"{letter} of the head's layer {layer}, row {row} is off by {error:.1e}"


def eagle_caches_stay_fresh(workshop: Workshop) -> None:
    """The same for a head, whose rows are made of the target's features."""
    draft_caches_stay_fresh(workshop, "eagle dynamic")


def drafts_what_re_feeding_would(
    workshop: Workshop, drafter: str = "eagle dynamic", sampling: SamplingParams = GREEDY, new_tokens: int = 16,
    target: str = "target",
) -> None:  # fmt: skip
    """The nodes of every draft are those that the growth of ALGORITHMS.md finds when each path is run from scratch."""
    session = workshop.session(drafter, target=target, sampling=sampling.needs_scores)
    futures = futures_of(target, new_tokens, sampling)
    requests = requests_of(PROMPTS, new_tokens, sampling)
    boundaries = 0

    def watch(state: dict[str, Tensor]) -> None:
        nonlocal boundaries
        boundaries += 1
        if boundaries not in (1, 2, 5):
            return
        for row, future in enumerate(futures):
            if not bool(state["finished"][row]):
                _check_draft(session, row, future[: int(state["kv_lens"][row]) + 1], drafter, sampling)

    session_draft = run(session, requests, watch=watch)
    assert session_draft.row_steps > 0


def _refed(name: str, ids: list[int], path: Path = ()) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    return eagle_rows(ids, path) if name == "eagle" else mtp_rows(name, ids, path)


def _check_draft(session: Session, row: int, ids: list[int], drafter: str, sampling: SamplingParams) -> None:
    name = drafter.split()[0]

    def scores(path: Path) -> Tensor:
        found = _refed(name, ids, path)[0] if name == "eagle" or name in MODULES else logits(name, [*ids, *path])
        if sampling.temperature == 0:
            return found
        noise = gumbel(torch.tensor([1000 + row]), torch.tensor([[len(ids) + len(path)]]), VOCAB)[0, 0]
        return sampling.temperature * (found / sampling.temperature + noise)

    tree = session.program.shape.tree
    deepest = int(session.state["limits"][row]) - len(ids)  # nodes at the limit are absent, and never compete
    expected = {path for path in grown(scores, tree, deepest) if len(path) <= deepest}
    assert int(session.state["draft_tokens"][row, 0]) == ids[-1], "node 0 is not the root"
    got = drafted(session.state, row)
    assert got == expected, f"row {row} drafts {sorted(got)}, re-feeding {sorted(expected)}"


def drafted(state: Mapping[str, Tensor], row: int) -> set[Path]:
    """The draft of a row: the tokens on the way to every node that is present, the root's left out."""
    parents, tokens = (state[name][row].tolist() for name in ("tree_parents", "draft_tokens"))
    found: dict[int, Path] = {0: ()}
    for node in range(1, len(parents)):
        if parents[node] >= 0:
            assert parents[node] in found, f"node {node} hangs from {parents[node]}, which is absent"
            found[node] = (*found[parents[node]], tokens[node])
    return set(found.values()) - {()}


def grown(scores: Callable[[Path], Tensor], tree: DraftTree, deepest: int) -> list[Path]:
    """The paths of a draft, grown one node at a time from nothing but the scores after a path."""
    best: dict[Path, list[tuple[float, int]]] = {}

    def children(path: Path, count: int) -> Sequence[tuple[float, int]]:
        if path not in best:
            conditional = scores(path).log_softmax(-1)
            order = sorted(range(len(conditional)), key=lambda token: (-float(conditional[token]), token))
            best[path] = [(min(float(conditional[token]), 0.0), token) for token in order]
        return best[path][:count]

    if tree.is_chain:
        path: Path = ()
        for _ in range(tree.max_draft_len):
            path = (*path, children(path, 1)[0][1])
        return [path[: depth + 1] for depth in range(len(path))]
    if tree.choices:
        named: dict[Path, Path] = {(): ()}
        for ranks in tree.choices:
            above = named[ranks[:-1]]
            named[ranks] = (*above, children(above, ranks[-1] + 1)[ranks[-1]][1])
        return [path for path in named.values() if path]
    count = tree.dynamic_tree_max_topk
    history: list[tuple[float, Path]] = []
    frontier: list[tuple[float, Path]] = [(0.0, ())]
    for _ in range(min(tree.max_draft_len, deepest)):
        level = [(score + gain, (*path, token)) for score, path in frontier for gain, token in children(path, count)]
        history += level
        frontier = sorted(level, key=lambda item: -item[0])[:count]
    return [path for _, path in sorted(history, key=lambda item: -item[0])[: tree.max_total_draft_tokens]]


def warm_drafts(workshop: Workshop) -> None:
    """At a temperature the children are ranked with the noise of the token that they stand for."""
    drafts_what_re_feeding_would(workshop, "eagle dynamic", SamplingParams(temperature=1.0))
