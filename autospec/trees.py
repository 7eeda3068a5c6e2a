"""The shape of a draft: a chain, a static tree given by ranks, or a dynamic tree grown by score.

A chain is the tree of one child per node; it is verified on the causal path, without a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autospec.errors import OptionError

MAX_NODES = 1024  # nodes of a draft, the root included: what the kernels that hold a tree in registers are tested for

Path = tuple[int, ...]


@dataclass(frozen=True)
class DraftTree:
    """Made by `chain`, `static_tree` and `dynamic_tree`, which check the rules.

    Args:
        max_draft_len: levels, so the longest accepted path (D).
        max_total_draft_tokens: draft nodes that are verified, the root excluded (M).
        dynamic_tree_max_topk: children per node and frontier of a dynamic tree (K); 0 for the others.
        choices: the paths of child ranks of a static tree, by length and then rank; empty for the others.
    """

    max_draft_len: int
    max_total_draft_tokens: int
    dynamic_tree_max_topk: int = 0
    choices: tuple[Path, ...] = ()

    @property
    def is_chain(self) -> bool:
        return not self.choices and not self.dynamic_tree_max_topk

    @property
    def num_nodes(self) -> int:
        """Nodes of a verify step: root and drafts (N)."""
        return self.max_total_draft_tokens + 1

    @property
    def draft_rows(self) -> int:
        """Rows that growing the draft appends to the drafter's own cache, behind what is committed."""
        return sum(self.rows_at(level) for level in range(self.max_draft_len - 1))

    def level(self, index: int) -> tuple[Path, ...]:
        """Static: the choices of a level, in node order."""
        return tuple(path for path in self.choices if len(path) == index + 1)

    def inner(self, index: int) -> tuple[Path, ...]:
        """Static: the choices of a level that have children."""
        parents = {path[:-1] for path in self.choices}
        return tuple(path for path in self.level(index) if path in parents)

    def rows_at(self, level: int) -> int:
        """Nodes of a level that the drafter runs to rank their children."""
        if self.choices:
            return len(self.inner(level))
        return self.dynamic_tree_max_topk or 1

    def children_at(self, level: int) -> int:
        """How many children are ranked for every node that reaches this level."""
        if self.choices:
            return 1 + max(path[-1] for path in self.level(level))
        return self.dynamic_tree_max_topk or 1

    def parents(self) -> list[int]:
        """Static: tree_parents of all nodes, the root first."""
        number = {path: index + 1 for index, path in enumerate(self.choices)} | {(): 0}
        return [-1] + [number[path[:-1]] for path in self.choices]

    def __str__(self) -> str:
        if self.is_chain:
            return f"chain of {self.max_draft_len}"
        if self.choices:
            return f"static tree of {self.max_total_draft_tokens} nodes, {self.max_draft_len} levels"
        return (f"dynamic tree of {self.max_total_draft_tokens} nodes, {self.max_draft_len} levels, "
                f"top {self.dynamic_tree_max_topk}")  # fmt: skip


def chain(max_draft_len: int) -> DraftTree:
    """A draft without branches."""
    _few_enough(max_draft_len, "max_draft_len")
    return DraftTree(max_draft_len, max_draft_len)


def static_tree(eagle_choices: Sequence[Sequence[int]]) -> DraftTree:
    """A tree of fixed shape: every path of child ranks in `eagle_choices` is a node.

    Raises:
        OptionError: the list is empty, a rank is no rank, or a path's prefix is missing.
    """
    place = {"at": f"eagle_choices={eagle_choices!r:.80}", "where": "static tree"}
    if isinstance(eagle_choices, str) or not isinstance(eagle_choices, Sequence) or not eagle_choices:
        raise OptionError("eagle_choices must be a list of paths, and not empty", **place,
                          help="for example [[0], [1], [0, 0]]")  # fmt: skip
    for path in eagle_choices:
        are_ranks = isinstance(path, Sequence) and not isinstance(path, str) and len(path) > 0
        if not are_ranks or any(isinstance(rank, bool) or not isinstance(rank, int) or rank < 0 for rank in path):
            raise OptionError(f"a path of eagle_choices must be a list of child ranks, got {path!r:.40}", **place,
                              help="a rank is 0 for the draft's best child, 1 for the second, ...")  # fmt: skip
    known = sorted({tuple(path) for path in eagle_choices}, key=lambda path: (len(path), path))
    for path in known:
        if len(path) > 1 and path[:-1] not in known:
            raise OptionError(f"eagle_choices has {list(path)}, but not its parent {list(path[:-1])}", **place,
                              help="every proper prefix of a path must be a path")  # fmt: skip
    _few_enough(len(known), "eagle_choices")
    depth = len(known[-1])
    if len(known) == depth and not any(any(path) for path in known):
        return chain(depth)
    return DraftTree(depth, len(known), choices=tuple(known))


def dynamic_tree(
    dynamic_tree_max_topk: int, max_draft_len: int, max_total_draft_tokens: int | None = None
) -> DraftTree:
    """A tree of the `max_total_draft_tokens` best of all nodes that `max_draft_len` levels of top-k growth propose.

    None: dynamic_tree_max_topk * max_draft_len, as TensorRT-LLM does. A top-k of 1 is a chain.
    """
    top_k, levels = dynamic_tree_max_topk, max_draft_len
    for name, value in (("dynamic_tree_max_topk", top_k), ("max_draft_len", levels)):
        _at_least_one(name, value)
    history = top_k + top_k**2 * (levels - 1)
    total = min(top_k * levels, history) if max_total_draft_tokens is None else max_total_draft_tokens
    _at_least_one("max_total_draft_tokens", total)
    if not levels <= total <= history:
        raise OptionError(
            f"a tree of {levels} levels and top-k {top_k} has between {levels} and {history} nodes, not {total}",
            at=f"max_total_draft_tokens={total}", where="dynamic tree",
            help="max_draft_len <= max_total_draft_tokens <= K + K^2 (max_draft_len - 1)",
        )  # fmt: skip
    _few_enough(total, "max_total_draft_tokens")
    return chain(levels) if top_k == 1 else DraftTree(levels, total, dynamic_tree_max_topk=top_k)


def _at_least_one(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name} must be a positive integer, got {value!r}", at=f"{name}={value!r}",
                          where="dynamic tree", help=f"give a {name} of at least 1, or leave it out")  # fmt: skip


def _few_enough(total: int, name: str) -> None:
    if total + 1 > MAX_NODES:
        raise OptionError(f"a draft of {total} nodes and its root is more than {MAX_NODES}", at=name, where="draft tree",
                          help=f"use at most {MAX_NODES - 1} draft nodes")  # fmt: skip
