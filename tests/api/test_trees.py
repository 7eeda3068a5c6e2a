"""The rules of draft trees and of the options that ask for them; every refusal says what to do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from harness.models import model
from hypothesis import given
from hypothesis import strategies as st

import autospec
from autospec.config import AutoConfig, DraftTargetConfig, Eagle3Config, MedusaConfig, MTPConfig, NGramConfig, tree_of
from autospec.errors import AutospecError, OptionError
from autospec.trees import MAX_NODES, DraftTree, chain, dynamic_tree, static_tree

Refused = Callable[..., AutospecError]
RANKING = [DraftTargetConfig, Eagle3Config, MedusaConfig, MTPConfig]


def test_a_node_keeps_its_own_rank() -> None:
    """[0, 1, 1] without [0, 1, 0]: the second-best child, and the best one is ranked but no node."""
    tree = static_tree([[0], [0, 1], [0, 1, 1]])
    assert tree.choices == ((0,), (0, 1), (0, 1, 1))
    assert [tree.children_at(level) for level in range(3)] == [1, 2, 2]
    assert tree.parents() == [-1, 0, 1, 2]
    assert not tree.is_chain, "a path of second-best children is no chain"


def test_a_static_tree_of_one_level() -> None:
    tree = static_tree([[2], [0]])
    assert (tree.max_draft_len, tree.max_total_draft_tokens, tree.num_nodes, tree.draft_rows) == (1, 2, 3, 0)
    assert (tree.parents(), tree.children_at(0), tree.inner(0)) == ([-1, 0, 0], 3, ())
    assert static_tree([[0]]) == chain(1)


def test_choices_are_deduplicated_and_sorted_by_length_and_rank() -> None:
    tree = static_tree([[1, 0], [10], [1], [0, 2], [1], (0,), [0, 0], [1, 0]])
    assert tree.choices == ((0,), (1,), (10,), (0, 0), (0, 2), (1, 0))
    assert tree.parents() == [-1, 0, 0, 0, 1, 1, 2]
    assert tree.level(1) == ((0, 0), (0, 2), (1, 0))
    assert tree.inner(0) == ((0,), (1,))
    assert tree.draft_rows == tree.rows_at(0) == 2, "leaves are never run"


def test_the_longest_line_of_best_children_is_a_chain() -> None:
    assert static_tree([[0, 0, 0], [0], [0, 0]]) == chain(3)


@given(paths=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=8), shuffle=st.randoms())
def test_a_static_tree_is_its_set_of_paths(paths: list[list[int]], shuffle: Any) -> None:
    """Whatever the order: node i + 1 is choice i, and hangs from the choice without its last rank."""
    closed = [path[:stop] for path in paths for stop in range(1, len(path) + 1)]
    tree = static_tree(closed)
    shuffle.shuffle(closed)
    assert static_tree(closed) == tree
    if not tree.is_chain:
        named = [(), *tree.choices]
        assert set(named[1:]) == {tuple(path) for path in closed}
        assert [named[parent] for parent in tree.parents()[1:]] == [path[:-1] for path in named[1:]]
        assert all(parent < node for node, parent in enumerate(tree.parents()))
        assert sum(len(tree.level(level)) for level in range(tree.max_draft_len)) == tree.max_total_draft_tokens


@pytest.mark.parametrize("levels", [1, 2, 8])
def test_a_top_k_of_one_is_a_chain(levels: int) -> None:
    assert dynamic_tree(1, levels) == chain(levels)


@given(top_k=st.integers(1, 12), levels=st.integers(1, 8))
def test_as_many_nodes_as_tensorrt_llm_unless_the_history_is_smaller(top_k: int, levels: int) -> None:
    history = top_k + top_k**2 * (levels - 1)
    tree = dynamic_tree(top_k, levels)
    assert tree.max_total_draft_tokens == min(top_k * levels, history)
    assert (tree.max_draft_len, tree.num_nodes) == (levels, tree.max_total_draft_tokens + 1)
    assert tree.is_chain or tree.draft_rows == top_k * (levels - 1)


def test_the_bounds_of_a_dynamic_tree(refused: Refused) -> None:
    """D <= M <= K + K^2 (D - 1), so more than K D is allowed."""
    for top_k, levels in product((2, 3), (1, 2, 4)):
        history = top_k + top_k**2 * (levels - 1)
        for total in (levels, history):
            assert dynamic_tree(top_k, levels, total).max_total_draft_tokens == total
        for total in (levels - 1, history + 1):
            refused(OptionError, lambda k=top_k, d=levels, m=total: dynamic_tree(k, d, m))


def test_root_and_drafts_are_at_most_1024(refused: Refused) -> None:
    assert dynamic_tree(40, 4, MAX_NODES - 1).num_nodes == MAX_NODES == 1024
    assert static_tree([[rank] for rank in range(MAX_NODES - 1)]).num_nodes == MAX_NODES
    for call in (lambda: dynamic_tree(40, 4, MAX_NODES), lambda: static_tree([[rank] for rank in range(MAX_NODES)]),
                 lambda: dynamic_tree(200, 8)):  # fmt: skip
        assert "use at most 1023 draft nodes" in str(refused(OptionError, call))


CHAINS: list[Callable[[int], Any]] = [
    *(lambda length, cls=cls: cls("draft", length) for cls in RANKING), NGramConfig, lambda length: AutoConfig((0, length)),
]  # fmt: skip


@pytest.mark.parametrize("make", CHAINS)
def test_a_chain_is_no_longer_than_a_tree_may_be(refused: Refused, make: Callable[[int], Any]) -> None:
    assert tree_of(make(MAX_NODES - 1)).num_nodes == MAX_NODES
    assert "use at most 1023 draft nodes" in str(refused(OptionError, lambda: make(MAX_NODES)))


# name -> (eagle_choices, the rule, what to do)
STATIC: dict[str, tuple[Any, str, str]] = {
    "empty": ([], "must be a list of paths, and not empty", "for example [[0], [1], [0, 0]]"),
    "text": ("[[0]]", "must be a list of paths, and not empty", "for example"),
    "number": (3, "must be a list of paths, and not empty", "for example"),
    "flat": ([0, 1], "must be a list of child ranks, got 0", "0 for the draft's best child"),
    "empty path": ([[0], []], "must be a list of child ranks, got []", "0 for the draft's best child"),
    "negative": ([[0], [-1]], "got [-1]", "0 for the draft's best child"),
    "fraction": ([[0.0]], "got [0.0]", "0 for the draft's best child"),
    "boolean": ([[True]], "got [True]", "0 for the draft's best child"),
    "words": (["00"], "got '00'", "0 for the draft's best child"),
    "orphan": ([[0], [1, 0]], "has [1, 0], but not its parent [1]", "every proper prefix of a path must be a path"),
    "grandchild": ([[0], [0, 1, 0]], "has [0, 1, 0], but not its parent [0, 1]", "every proper prefix"),
}
# name -> (arguments of dynamic_tree, the rule, what to do)
DYNAMIC: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "no top-k": ((0, 4), "dynamic_tree_max_topk must be a positive integer, got 0", "of at least 1, or leave it out"),
    "half a top-k": ((2.5, 4), "dynamic_tree_max_topk must be a positive integer, got 2.5", "of at least 1"),
    "boolean": ((True, 4), "dynamic_tree_max_topk must be a positive integer, got True", "of at least 1"),
    "no levels": ((4, 0), "max_draft_len must be a positive integer, got 0", "of at least 1"),
    "no nodes": ((4, 4, 0), "max_total_draft_tokens must be a positive integer, got 0", "of at least 1"),
    "too few": ((4, 5, 4), "between 5 and 68 nodes, not 4", "max_draft_len <= max_total_draft_tokens <= K + K^2"),
    "too many": ((2, 3, 11), "between 3 and 10 nodes, not 11", "max_draft_len <= max_total_draft_tokens <= K + K^2"),
    "a fatter chain": ((1, 4, 5), "between 4 and 4 nodes, not 5", "max_draft_len <= max_total_draft_tokens"),
}


@pytest.mark.parametrize("case", STATIC)
def test_bad_static_trees(refused: Refused, case: str) -> None:
    choices, rule, todo = STATIC[case]
    error = refused(OptionError, lambda: static_tree(choices))
    assert rule in error.rule
    assert todo in str(error.help)


@pytest.mark.parametrize("case", DYNAMIC)
def test_bad_dynamic_trees(refused: Refused, case: str) -> None:
    arguments, rule, todo = DYNAMIC[case]
    error = refused(OptionError, lambda: dynamic_tree(*arguments))
    assert rule in error.rule
    assert todo in str(error.help)


# options -> the tree they ask for
ASKED: list[tuple[dict[str, Any], DraftTree]] = [
    ({"max_draft_len": 3}, chain(3)),
    ({"max_draft_len": 5, "dynamic_tree_max_topk": 3}, dynamic_tree(3, 5, 15)),
    ({"max_draft_len": 5, "use_dynamic_tree": True}, dynamic_tree(10, 5, 50)),
    ({"max_draft_len": 8, "use_dynamic_tree": True, "max_total_draft_tokens": 59}, dynamic_tree(10, 8, 59)),
    ({"max_draft_len": 5, "dynamic_tree_max_topk": 1}, chain(5)),
    ({"eagle_choices": [[0], [1], [1, 0]]}, static_tree([[0], [1], [1, 0]])),
    ({"eagle_choices": [[0], [1], [1, 0]], "max_draft_len": 2}, static_tree([[0], [1], [1, 0]])),
]


@pytest.mark.parametrize("cls", RANKING)
@pytest.mark.parametrize(("options", "tree"), ASKED)
def test_options_ask_for_a_tree(cls: Any, options: dict[str, Any], tree: DraftTree) -> None:
    speculation = cls("draft", **options)
    assert tree_of(speculation) == speculation.tree == tree
    assert speculation.max_draft_len == tree.max_draft_len


def test_the_default_is_a_chain() -> None:
    assert [cls("draft").tree for cls in RANKING] == [chain(4), chain(7), chain(4), chain(3)]


# name -> (options, the rule, what to do)
OPTIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "static and dynamic": (
        {"eagle_choices": [[0]], "use_dynamic_tree": True}, "a tree is static or dynamic, not both", "leave out eagle_choices"),
    "static and top-k": (
        {"eagle_choices": [[0]], "dynamic_tree_max_topk": 2}, "a tree is static or dynamic, not both", "leave out"),
    "static and nodes": (
        {"eagle_choices": [[0]], "max_total_draft_tokens": 1}, "a tree is static or dynamic, not both", "leave out"),
    "other depth": (
        {"eagle_choices": [[0], [0, 1]], "max_draft_len": 3}, "max_draft_len is 3, but the longest path of eagle_choices has 2",
        "leave max_draft_len out"),
    "nodes of a chain": (
        {"max_total_draft_tokens": 9}, "max_total_draft_tokens belongs to a dynamic tree", "set use_dynamic_tree=True"),
    "no levels": ({"max_draft_len": 0}, "max_draft_len must be a positive integer, got 0", "of at least 1"),
    "cold": ({"draft_temperature": 0}, "draft_temperature must be a positive number, got 0", "1.0 ranks by the draft as it is"),
    "negative": ({"draft_temperature": -1.0}, "must be a positive number, got -1.0", "1.0 ranks"),
    "endless": ({"draft_temperature": float("inf")}, "must be a positive number, got inf", "1.0 ranks"),
    "undefined": ({"draft_temperature": float("nan")}, "must be a positive number, got nan", "1.0 ranks"),
    "boolean": ({"draft_temperature": True}, "must be a positive number, got True", "1.0 ranks"),
    "in words": ({"draft_temperature": "1"}, "must be a positive number, got '1'", "1.0 ranks"),
    "misspelt top-k": ({"dynamic_tree_topk": 3}, "no option 'dynamic_tree_topk'", "did you mean 'dynamic_tree_max_topk'?"),
    "misspelt choices": ({"eagle_choice": [[0]]}, "no option 'eagle_choice'", "did you mean 'eagle_choices'?"),
    "misspelt nodes": ({"max_total_draft_token": 3}, "no option 'max_total_draft_token'", "did you mean 'max_total_draft_tokens'?"),
    "another format": ({"draft_quantization": "int3"}, "must be 'fp8' or None, got 'int3'", "the target is never quantised"),
    "the tree itself": ({"tree": chain(3)}, "no option 'tree'", "known: draft_quantization, draft_temperature, dynamic_tree"),
}  # fmt: skip


@pytest.mark.parametrize("cls", RANKING)
@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options(refused: Refused, cls: Any, case: str) -> None:
    options, rule, todo = OPTIONS[case]
    error = refused(OptionError, lambda: cls("draft", **options))
    assert rule in error.rule
    assert cls.__name__ in str(error) or "tree" in str(error.where)
    assert todo in str(error.help)


@pytest.mark.parametrize("cls", [DraftTargetConfig, Eagle3Config, MedusaConfig])
def test_a_drafter_needs_a_draft(refused: Refused, cls: Any) -> None:
    """MTP modules come with the target."""
    assert "needs a draft" in refused(OptionError, lambda: cls(None)).rule


def test_more_children_than_the_draft_has_tokens(refused: Refused) -> None:
    """The tiny draft knows 64 tokens."""
    for options in ({"dynamic_tree_max_topk": 65, "max_draft_len": 2}, {"eagle_choices": [[0], [64]]}):
        speculation = DraftTargetConfig(model("small"), **options)
        call = lambda chosen=speculation: autospec.optimize(model("target"), chosen, compile="eager")  # noqa: E731
        error = refused(OptionError, call)
        assert "65 children of a node are asked for, the draft knows 64 tokens" in error.rule
