"""mask-tree: every node of a tree computes what the captured graph computes on the path to it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from harness.graphs import VOCAB, after, apply, check_golden, evaluate, new_state, tiny_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from autospec.ir.match import calls
from autospec.ir.passes import Pass
from autospec.ir.text import graph_text
from autospec.kernels.tree_tables import node_positions
from autospec.passes.fold_noops import FoldNoops
from autospec.passes.mask_tree import MaskTree
from autospec.passes.page_kv_cache import PageKvCache
from autospec.passes.specialize_shapes import SpecializeShapes
from autospec.passes.widen_decode import WidenDecode

BATCH, NODES, COMMITTED, WINDOW = 2, 7, 6, 5
WIDEN = WidenDecode(batch_size=BATCH, next_n=NODES, max_nodes=NODES, max_position=256)
TREE = MaskTree(batch_size=BATCH, num_nodes=NODES)
ROWS, LEVELS = 3, 3  # of a drafter
LEVEL = MaskTree(batch_size=BATCH, num_nodes=ROWS, is_mask_given=True)

Parents = list[int]


def test_text(tiny: Any) -> None:
    widen = WidenDecode(batch_size=BATCH, next_n=5, max_nodes=5, max_position=256)
    check_golden("mask_tree", graph_text(after(tiny.paged(5), widen, MaskTree(batch_size=BATCH, num_nodes=5))))
    check_golden("mask_tree.level", graph_text(after(tiny.paged(ROWS, is_length_given=True), LEVEL)))


def test_again_finds_nothing(tiny: Any) -> None:
    assert [record.count for record in apply(after(tiny.paged(NODES), WIDEN), TREE, TREE)] == [1, 0]
    assert [record.count for record in apply(tiny.paged(ROWS, is_length_given=True), LEVEL, LEVEL)] == [1, 0]


def test_positions_come_first(tiny: Any) -> None:
    """Positions that are bound later would be a chain's."""
    with pytest.raises(AssertionError, match="position_ids is still an input: run widen-decode first"):
        apply(tiny.paged(NODES), TREE)


@functools.cache
def _model(window: int) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    return tiny_graph(num_layers=2, window=window)  # what a node wrongly sees in layer 0 spreads in layer 1


@functools.cache
def _graph(window: int, q_len: int, is_length_given: bool, *passes: Pass) -> fx.GraphModule:
    paging = PageKvCache(page_size=4, num_pages=17, pages_per_row=8, is_length_given=is_length_given)
    return after(_model(window)[0], SpecializeShapes(batch_size=BATCH, q_len=q_len), FoldNoops(), paging, *passes)


def _filled(window: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Committed tokens [BATCH, COMMITTED] and a state that holds their rows, and garbage behind them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (BATCH, COMMITTED), generator=generator)
    prefill = _graph(window, COMMITTED, False)
    state = new_state(prefill)
    for name, tensor in state.items():
        if "pages." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    state["page_table"].copy_(torch.randperm(16, generator=generator).reshape(BATCH, 8) + 1)
    positions = torch.arange(COMMITTED).expand(BATCH, -1)
    evaluate(prefill, {"input_ids": tokens, "position_ids": positions, **_model(window)[1], **state})
    state["kv_lens"].fill_(COMMITTED)
    return tokens, state


def _check_node(window: int, before: Tensor, path: list[int], logits: Tensor) -> None:
    """The logits of a node are those of the captured graph after the committed tokens and its path."""
    ids = torch.tensor([[*before.tolist(), *path]])
    captured, weights = _model(window)
    values = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None], **weights}
    torch.testing.assert_close(logits, evaluate(captured, values)[0][0, -1], rtol=0, atol=2e-6)


def _path(parents: Parents, node: int) -> list[int] | None:
    """The nodes from the root to this one; None: it is absent."""
    if node == 0:
        return [0]
    above = _path(parents, parents[node]) if parents[node] >= 0 else None
    return None if above is None else [*above, node]


def _check_step(module: fx.GraphModule, window: int, trees: Sequence[Parents], seed: int) -> None:
    tokens, state = _filled(window, seed)
    state |= {name: tensor for name, tensor in new_state(module).items() if name not in state}
    drafts = torch.randint(0, VOCAB, (BATCH, NODES), generator=torch.Generator().manual_seed(seed + 1))
    state["draft_tokens"].copy_(drafts)
    if "tree_parents" in state:
        state["tree_parents"].copy_(torch.tensor(trees))
    logits = evaluate(module, {**_model(window)[1], **state})[0]
    for row, parents in enumerate(trees):
        for node in range(NODES):
            path = _path(parents, node)
            if path is not None:
                _check_node(window, tokens[row], drafts[row, path].tolist(), logits[row, node])


def _random_tree() -> st.SearchStrategy[Parents]:
    """Parents of NODES nodes; -1 is an absent node, and what hangs from it is absent, too."""
    return st.tuples(st.just(-1), *[st.integers(-1, node - 1) for node in range(1, NODES)]).map(list)


@settings(max_examples=25)
@given(trees=st.tuples(_random_tree(), _random_tree()), window=st.sampled_from([0, WINDOW]), seed=st.integers(0, 999))
def test_every_node_of_a_step_is_its_path(trees: tuple[Parents, Parents], window: int, seed: int) -> None:
    _check_step(_graph(window, NODES, False, WIDEN, TREE), window, trees, seed)


BRANCHES = [[-1, 0, 0, 1, 1, 2, 3]] * BATCH


def test_a_causal_mask_is_seen() -> None:
    with pytest.raises(AssertionError, match="not close"):
        _check_step(_graph(0, NODES, False, WIDEN), 0, BRANCHES, 3)


def test_positions_that_count_nodes_are_seen() -> None:
    module = after(_graph(0, NODES, False, WIDEN, TREE))
    for node in calls(module, node_positions):
        node.args = node.args[:3]
    module.recompile()
    with pytest.raises(AssertionError, match="not close"):
        _check_step(module, 0, BRANCHES, 3)


def _check_levels(module: fx.GraphModule, window: int, parents: list[list[int]], seed: int, lag: int = 0) -> None:
    """Grow level by level: row r of a level hangs from row parents[level - 1][r] of the level above."""
    before, state = _filled(window, seed)
    drafts = torch.randint(0, VOCAB, (LEVELS, BATCH, ROWS), generator=torch.Generator().manual_seed(seed + 1))
    paths: list[list[int]] = [[] for _ in range(ROWS)]  # row numbers, a level each
    words: list[list[int]] = []
    for level in range(LEVELS):
        if level:
            paths = [paths[parent] for parent in parents[level - 1]]
        paths = [[*path, row] for row, path in enumerate(paths)]
        words.append([sum(1 << (depth * ROWS + row) for depth, row in enumerate(path)) for path in paths])
        mask = torch.tensor(words, dtype=torch.int32).reshape(1, -1, 1).expand(BATCH, -1, -1)
        values = {
            "input_ids": drafts[level], "position_ids": torch.full((BATCH, ROWS), COMMITTED + level), "tree_mask": mask,
            "append_lens": torch.full((BATCH,), COMMITTED + level * (ROWS - lag), dtype=torch.int32),
        }  # fmt: skip
        logits = evaluate(module, {**_model(window)[1], **state, **values})[0]
        for row in range(BATCH):
            for index, path in enumerate(paths):
                ids = [int(drafts[depth, row, above]) for depth, above in enumerate(path)]
                _check_node(window, before[row], ids, logits[row, index])


LINKS = st.lists(st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS), min_size=LEVELS - 1, max_size=LEVELS - 1)


@settings(max_examples=15)
@given(parents=LINKS, window=st.sampled_from([0, WINDOW]), seed=st.integers(0, 999))
def test_every_node_of_a_drafters_level_is_its_path(parents: list[list[int]], window: int, seed: int) -> None:
    _check_levels(_graph(window, ROWS, True, LEVEL), window, parents, seed)


def test_a_level_over_the_rows_of_the_one_above_is_seen() -> None:
    with pytest.raises(AssertionError, match="not close"):
        _check_levels(_graph(0, ROWS, True, LEVEL), 0, [[0, 0, 1], [2, 1, 0]], 3, lag=1)
