"""attach-draft-head: the draft is what the head guesses, re-fed with the target's features of all committed tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from harness.graphs import VOCAB, after, apply, check_golden, tiny_head
from harness.splices import (
    BATCH,
    CHUNK,
    LAYERS,
    POSITIONS,
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

from autospec.ir.match import calls, operand
from autospec.ir.slots import Slot
from autospec.ir.text import graph_text
from autospec.kernels.commit import gather_rows, tokens_at
from autospec.passes.attach_draft_head import AttachDraftHead
from autospec.passes.gather_logits import GatherLogits
from autospec.passes.mask_tree import MaskTree
from autospec.passes.offset_draft_layers import WEIGHT_PREFIX, OffsetDraftLayers
from autospec.passes.tap_hidden_states import TapHiddenStates
from autospec.trees import DraftTree, chain, dynamic_tree, static_tree

TAPS = (0, 1)
D2T = torch.tensor([token for token in range(VOCAB) if token % 4]) - torch.arange(12)  # every fourth token is unknown
HEAD = tiny_head(len(TAPS), len(D2T))
OFFSET = OffsetDraftLayers(layer_idx_offset=LAYERS)
TREES = {
    "chain": chain(3),
    "static": static_tree([[0], [1], [3], [0, 0], [0, 2], [3, 0], [3, 0, 1]]),
    "dynamic": dynamic_tree(3, 3, 8),
}


def _attach(tree: DraftTree, rows: int) -> AttachDraftHead:
    def level(count: int) -> fx.GraphModule:
        masked = [] if tree.is_chain else [MaskTree(batch_size=BATCH, num_nodes=count, is_mask_given=True)]
        return specialised(HEAD.following, count, *masked, OFFSET, is_length_given=True)

    return AttachDraftHead(
        sizes=sizes_of(tree), max_position=POSITIONS,
        catch_up=specialised(HEAD.first, rows, OFFSET, GatherLogits(given_for=BATCH), is_length_given=True),
        expand={count: level(count) for count in {tree.rows_at(index) for index in range(tree.max_draft_len - 1)}},
        d2t=Slot("weight", "draft.d2t", tuple(D2T.shape), torch.int64),
    )  # fmt: skip


def _with_modules(tree: DraftTree, rows: int) -> AttachDraftHead:
    """As if the head were two modules: the second, here of the same weights, guesses the second level."""
    behind = OffsetDraftLayers(layer_idx_offset=LAYERS + 1)

    def level(index: int) -> fx.GraphModule:
        count = sum(tree.rows_at(below) for below in range(index + 1))
        masked = [] if tree.is_chain else [MaskTree(batch_size=BATCH, num_nodes=count, is_mask_given=True)]
        return specialised(HEAD.following, count, *masked, (OFFSET, behind)[(index + 1) % 2], is_length_given=True)

    return replace(
        _attach(tree, rows), expand={}, fill=(specialised(HEAD.first, rows, behind, is_length_given=True),),
        regrow=tuple(level(index) for index in range(tree.max_draft_len - 1)),
    )  # fmt: skip


@functools.cache
def _step(tree: DraftTree) -> fx.GraphModule:
    return target_step(sizes_of(tree), TapHiddenStates(tap_after=TAPS))


@functools.cache
def _prefill(tree: DraftTree) -> fx.GraphModule:
    return target_prefill(sizes_of(tree), TapHiddenStates(tap_after=TAPS))


def test_text() -> None:
    two_levels, one = dynamic_tree(2, 2, 4), chain(1)
    check_golden("attach_draft_head", graph_text(after(_step(two_levels), _attach(two_levels, 3))))
    check_golden("attach_draft_head.prefill", graph_text(after(_prefill(one), _attach(one, CHUNK))))


def test_text_of_several_modules() -> None:
    """The second module keeps K/V of the catch-up's rows, and of all that has grown where it guesses."""
    three = chain(3)
    text = graph_text(after(_step(three), _with_modules(three, 4)))
    check_golden("attach_draft_head.modules", text)


@pytest.mark.parametrize("kind", TREES)
def test_again_finds_nothing(kind: str) -> None:
    tree = TREES[kind]
    one = _attach(tree, tree.max_draft_len + 1)
    first, second = apply(after(_step(tree)), one, one)
    assert (first.count, second.count) == (1, 0)
    assert first.details == (f"{tree}: a pass of {tree.max_draft_len + 1} rows, then 2 by level",)


def test_a_graph_that_commits_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="run verify-draft or commit-prompt first"):
        apply(specialised(TARGET, 3, TapHiddenStates(tap_after=TAPS)), _attach(chain(2), 3))


def _scores(ids: list[int], path: Path) -> Tensor:
    """The head's logits after a path: features of all committed tokens, then its own output, without any cache."""
    hidden = HEAD.module.fc(torch.cat([features(ids[:-1])[1][layer] for layer in TAPS], -1))
    for count in range(len(path) + 1):
        tokens = torch.tensor([[*ids[1:], *path[:count]]])
        logits, recycled = HEAD.module(tokens, hidden, torch.arange(tokens.shape[1])[None])
        hidden = torch.cat([hidden, recycled[:, -1:]], 1)
    known = torch.full((VOCAB,), float("-inf"))
    known[torch.arange(len(D2T)) + D2T] = logits[0, -1]
    return known


@functools.cache
def _spliced(kind: str) -> Spliced:
    tree = TREES[kind]
    weights = {WEIGHT_PREFIX + name: tensor for name, tensor in HEAD.weights.items()} | {"draft.d2t": D2T}
    prefill, step = after(_prefill(tree), _attach(tree, CHUNK)), after(_step(tree), _attach(tree, tree.max_draft_len + 1))
    return Spliced(tree, prefill, step, weights, _scores)


LENGTHS = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=18)
@given(kind=st.sampled_from(sorted(TREES)), seed=st.integers(0, 999), lengths=LENGTHS, steps=st.integers(0, 4))
def test_the_draft_is_what_re_feeding_gives(kind: str, seed: int, lengths: tuple[int, int], steps: int) -> None:
    _spliced(kind).check(seed, lengths, steps)


def _unshifted(step: fx.GraphModule) -> None:
    """The catch-up reads token t beside feature t."""
    following = next(calls(step, tokens_at))
    following.update_arg(1, operand(operand(following, 1)))


def _rows_in_node_order(step: fx.GraphModule) -> None:
    """Features of nodes that were not accepted."""
    taps = next(calls(step, gather_rows))
    taps.target = lambda rows, index: gather_rows(rows, torch.arange(index.shape[1]).expand_as(index))


def _eldest_parent(step: fx.GraphModule) -> None:
    """Every node reads the hidden state of the first node of the level above."""
    for node in [*calls(step, gather_rows)][1:]:
        node.target = lambda rows, index: gather_rows(rows, torch.zeros_like(index))


PLANTS = [("chain", _unshifted), ("static", _unshifted), ("dynamic", _rows_in_node_order), ("dynamic", _eldest_parent)]


@pytest.mark.parametrize(("kind", "plant"), PLANTS, ids=[f"{kind}{plant.__name__}" for kind, plant in PLANTS])
def test_a_planted_bug_is_seen(kind: str, plant: Callable[[fx.GraphModule], None]) -> None:
    step = after(_spliced(kind).step)
    plant(step)
    step.recompile()
    assert replace(_spliced(kind), step=step).fails()
