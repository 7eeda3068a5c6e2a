"""propose-nothing and propose-ngram: the next draft is in the state, every word of it."""

from __future__ import annotations

import torch
from harness.graphs import after, apply, check_golden, evaluate, new_state, sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten
from autospec.ir.slots import Slot
from autospec.ir.text import graph_text
from autospec.kernels.ngram_propose import ngram_propose
from autospec.passes.propose_draft import ProposeNgram, ProposeNothing

BATCH, ROOM, NODES = 2, 24, 5
NOTHING = ProposeNothing(batch_size=BATCH, max_nodes=NODES)
NGRAM = ProposeNgram(batch_size=BATCH, max_nodes=NODES, max_draft_len=3, max_matching_ngram_size=3)


def _committed() -> fx.GraphModule:
    """The end of a step: a history, lengths and limits."""

    def write(builder: Builder, tokens: fx.Node, kv_lens: fx.Node, limits: fx.Node) -> fx.Node:
        return builder.call(aten.clone.default, tokens)

    row = {"shape": (BATCH,), "dtype": torch.int32}
    slots = [
        Slot("state", "tokens", (BATCH, ROOM), torch.int64), Slot("state", "kv_lens", **row),
        Slot("state", "limits", **row),
    ]  # fmt: skip
    return sketch(slots, write)


def test_text() -> None:
    check_golden("propose_nothing", graph_text(after(_committed(), NOTHING)))
    check_golden("propose_ngram", graph_text(after(_committed(), NGRAM)))


def test_again_finds_nothing() -> None:
    for one in (NOTHING, NGRAM):
        assert [record.count for record in apply(_committed(), one, one)] == [1, 0]


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), length=st.integers(0, 18), ahead=st.integers(0, 5), old=st.booleans())
def test_meaning(seed: int, length: int, ahead: int, old: bool) -> None:
    """The graph's result stays, and stale words of the last draft go."""
    one = ProposeNgram(batch_size=BATCH, max_nodes=NODES, max_draft_len=3, max_matching_ngram_size=3, is_use_oldest=old)
    for choice in (one, NOTHING):
        module = after(_committed(), choice)
        state = new_state(module)
        state["tokens"].copy_(torch.randint(0, 3, (BATCH, ROOM), generator=torch.Generator().manual_seed(seed)))
        state["kv_lens"].fill_(length)
        state["limits"].fill_(length + 1 + ahead)
        state["draft_tokens"].fill_(77)
        state["tree_parents"].fill_(2)
        history = state["tokens"].clone()
        got = evaluate(module, state)[0]
        assert torch.equal(got, history)
        ids, parents = ngram_propose(history, state["kv_lens"], state["limits"], 3, 3, old)
        width = 4 if choice is one else 1
        assert torch.equal(state["draft_tokens"][:, :width], ids[:, :width])
        assert torch.equal(state["tree_parents"][:, :width], parents[:, :width])
        assert bool((state["tree_parents"][:, width:] == -1).all())
        assert not bool((state["draft_tokens"] == 77).any())
