"""attach-medusa-heads: the candidates of a depth are one head's, on what the lm_head read at the last accepted node."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from harness.graphs import VOCAB, WIDTH, after, apply, captured_graph, check_golden
from harness.splices import (
    BATCH,
    TARGET,
    Spliced,
    features,
    sizes_of,
    specialised,
    target_prefill,
    target_step,
)
from harness.tree_laws import Path
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from autospec.heads.medusa import MedusaHeads
from autospec.ir.match import calls, operand
from autospec.ir.roles import the
from autospec.ir.text import graph_text
from autospec.kernels.commit import last_rows
from autospec.passes.attach_medusa_heads import AttachMedusaHeads
from autospec.passes.fold_noops import FoldNoops
from autospec.passes.offset_draft_layers import WEIGHT_PREFIX, OffsetDraftLayers
from autospec.passes.specialize_shapes import SpecializeShapes
from autospec.passes.tap_hidden_states import TapHiddenStates
from autospec.trees import DraftTree, chain, dynamic_tree, static_tree

DEPTHS = 3
TREES = {
    "chain": chain(DEPTHS),
    "static": static_tree([[0], [1], [3], [0, 0], [0, 2], [3, 0], [3, 0, 1]]),
    "dynamic": dynamic_tree(3, DEPTHS, 8),
}


@functools.cache
def _heads() -> tuple[MedusaHeads, fx.GraphModule, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        heads = MedusaHeads(WIDTH, VOCAB, DEPTHS)
    graph, weights = captured_graph(heads, {"taps": torch.zeros(2, 5, WIDTH)})
    module = after(graph, SpecializeShapes(batch_size=BATCH, q_len=1), FoldNoops(), OffsetDraftLayers(layer_idx_offset=0))
    return heads, module, {WEIGHT_PREFIX + name: tensor for name, tensor in weights.items()}


def _attach(tree: DraftTree) -> AttachMedusaHeads:
    return AttachMedusaHeads(sizes=sizes_of(tree), heads=_heads()[1])


def _step(tree: DraftTree) -> fx.GraphModule:
    return target_step(sizes_of(tree), TapHiddenStates())


def test_text() -> None:
    forked, line = static_tree([[0], [1], [1, 0]]), chain(1)
    check_golden("attach_medusa_heads", graph_text(after(_step(forked), _attach(forked))))
    prefill = target_prefill(sizes_of(line), TapHiddenStates())
    check_golden("attach_medusa_heads.prefill", graph_text(after(prefill, _attach(line))))


@pytest.mark.parametrize("kind", TREES)
def test_again_finds_nothing(kind: str) -> None:
    one = _attach(TREES[kind])
    first, second = apply(_step(TREES[kind]), one, one)
    assert (first.count, second.count) == (1, 0)
    assert first.details == (f"{TREES[kind]}: one pass of 3 heads",)


def test_a_graph_that_commits_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="run verify-draft or commit-prompt first"):
        apply(specialised(TARGET, 3, TapHiddenStates()), _attach(chain(2)))


def _scores(ids: list[int], path: Path) -> Tensor:
    """Of the head for this depth, whatever the path."""
    return _heads()[0](features(ids[:-1])[1][-1][:, -1:])[0, len(path)]


@functools.cache
def _spliced(kind: str) -> Spliced:
    tree = TREES[kind]
    prefill = after(target_prefill(sizes_of(tree), TapHiddenStates()), _attach(tree))
    return Spliced(tree, prefill, after(_step(tree), _attach(tree)), _heads()[2], _scores)


LENGTHS = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=18)
@given(kind=st.sampled_from(sorted(TREES)), seed=st.integers(0, 999), lengths=LENGTHS, steps=st.integers(0, 4))
def test_the_draft_is_what_the_heads_guess(kind: str, seed: int, lengths: tuple[int, int], steps: int) -> None:
    _spliced(kind).check(seed, lengths, steps)


def test_the_hidden_state_of_the_root_is_seen() -> None:
    """A step that reads the root instead of the last accepted node."""
    step = after(_spliced("dynamic").step)
    hidden = [*calls(step, last_rows)][-1]
    assert operand(operand(hidden)) is the(step, "taps")
    hidden.target = lambda rows, count: last_rows(rows, torch.ones_like(count))
    step.recompile()
    assert replace(_spliced("dynamic"), step=step).fails()


def test_the_next_head_is_seen() -> None:
    sound = _spliced("chain")
    assert replace(sound, scores=lambda ids, path: _scores(ids, (*path, 0)[: DEPTHS - 1])).fails()
