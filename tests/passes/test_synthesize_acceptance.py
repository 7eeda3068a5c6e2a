"""Text, meaning, nothing left: a step whose drafts are accepted by a profile."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from harness.graphs import VOCAB, after, apply, check_golden, evaluate, new_state, sketch
from torch import fx

from autospec.errors import OptionError
from autospec.ir.build import Builder
from autospec.ir.match import argument, calls, operand
from autospec.ir.roles import tag
from autospec.ir.sizes import constants_of
from autospec.ir.slots import Slot
from autospec.ir.text import graph_text
from autospec.kernels.accept_tree import accept_tree
from autospec.kernels.choose_tokens import choose_greedy, choose_tokens
from autospec.kernels.synthesize_tokens import drawn_lengths, synthesize_tokens
from autospec.passes.synthesize_acceptance import RATES, SynthesizeAcceptance
from autospec.passes.verify_draft import VerifyDraft
from autospec.pipeline import left_out
from autospec.state import StateShape
from autospec.trees import chain, dynamic_tree

BATCH = 2
PROFILE = (0.9, 0.5, 0.5)
CHAIN = StateShape(batch_size=BATCH, token_room=64, vocab_size=VOCAB, tree=chain(3), sampling=False)
TREE = dataclasses.replace(CHAIN, tree=dynamic_tree(2, 3, 6))


def step(sizes: StateShape) -> fx.GraphModule:
    """A step behind its verification."""
    nodes = sizes.tree.num_nodes

    def write(builder: Builder, logits: fx.Node, draft_tokens: fx.Node, table: fx.Node) -> fx.Node:
        tag(draft_tokens, "draft_tokens")
        return logits

    slots = [Slot("input", "logits", (BATCH, nodes, VOCAB)), Slot("state", "draft_tokens", (BATCH, nodes), torch.int64),
             Slot("state", "page_table", (BATCH, 16), torch.int32)]  # fmt: skip
    return after(sketch(slots, write), VerifyDraft(sizes=sizes, draft_len=3))


def synthesize(sizes: StateShape) -> SynthesizeAcceptance:
    return SynthesizeAcceptance(sizes=sizes, rates=PROFILE)


def test_text() -> None:
    check_golden("synthesize_acceptance", graph_text(after(step(CHAIN), synthesize(CHAIN))))


@pytest.mark.parametrize("sizes", [CHAIN, TREE], ids=["chain", "tree"])
def test_again_finds_nothing(sizes: StateShape) -> None:
    assert [record.count for record in apply(step(sizes), synthesize(sizes), synthesize(sizes))] == [1, 0]


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("sizes", [CHAIN, TREE], ids=["chain", "tree"])
def test_only_what_is_accepted_changes(sizes: StateShape, sampling: bool) -> None:
    sizes = dataclasses.replace(sizes, sampling=sampling)
    module = after(step(sizes), synthesize(sizes))
    (accept,) = calls(module, accept_tree)
    synthetic = argument(accept, "target_tokens")
    assert list(calls(module, synthesize_tokens)) == [synthetic]
    assert list(calls(module, choose_tokens if sampling else choose_greedy)) == [operand(synthetic)]
    assert list(operand(synthetic).users) == [synthetic]


def emitted_lengths(module: fx.GraphModule, calls_made: int = 30) -> tuple[list[int], list[int]]:
    """What every row of every step accepted, and what was drawn for it."""
    state = new_state(module)
    profile = constants_of(module)[RATES]
    found, drawn = [], []
    for call in range(calls_made):
        state["finished"].zero_()
        state["limits"].fill_(60)
        state["prompt_lens"].fill_(1)
        state["kv_lens"].copy_(torch.tensor([call + 1, 7]))
        state["row_keys"].copy_(torch.tensor([3, call]))
        nodes = state["draft_tokens"].shape[1]
        state["draft_tokens"].copy_(torch.randint(0, VOCAB, (BATCH, nodes)))
        state["tree_parents"].copy_(torch.tensor([-1, 0, 1, 2] if nodes == 4 else [-1, 0, 0, 1, 1, 3, 3]))
        drawn += drawn_lengths(state["kv_lens"], state["row_keys"], profile).tolist()
        given = {"logits": torch.randn(BATCH, nodes, VOCAB), **state, RATES: profile}
        emitted = evaluate(module, given)[0]
        found += ((emitted >= 0).sum(1) - 1).tolist()
    return found, drawn


@pytest.mark.parametrize("sizes", [CHAIN, TREE], ids=["chain", "tree"])
def test_meaning(sizes: StateShape) -> None:
    found, drawn = emitted_lengths(after(step(sizes), synthesize(sizes)))
    assert found == drawn
    assert set(drawn) == {0, 1, 3}


def test_a_step_that_takes_the_targets_tokens_is_seen() -> None:
    module = after(step(CHAIN), synthesize(CHAIN))
    (accept,) = calls(module, accept_tree)
    accept.update_arg(0, operand(argument(accept, "target_tokens")))
    module.recompile()
    found, drawn = emitted_lengths(module)
    assert found != drawn


def test_it_follows_the_verification() -> None:
    def write(builder: Builder, logits: fx.Node) -> fx.Node:
        return logits

    bare = sketch([Slot("input", "logits", (BATCH, 4, VOCAB))], write)
    with pytest.raises(AssertionError, match="run verify-draft first"):
        apply(bare, synthesize(CHAIN))


def test_no_option_asks_for_it() -> None:
    for asked in ("synthesize-acceptance", "-synthesize-acceptance"):
        with pytest.raises(OptionError):
            left_out(asked)
