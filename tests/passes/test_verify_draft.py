"""verify-draft and commit-prompt: the logits of the graph below become emitted tokens, by the reference ops."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from harness.graphs import VOCAB, after, apply, check_golden, evaluate, new_state, sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, calls
from autospec.ir.roles import tag
from autospec.ir.slots import Slot
from autospec.ir.text import graph_text
from autospec.kernels.accept_tree import accept_tree
from autospec.kernels.choose_tokens import choose_greedy, choose_tokens, mark_seen
from autospec.kernels.commit import commit_prompt, commit_step, count_ranks
from autospec.kernels.compact_kv import compact_kv
from autospec.kernels.registry import KernelOp
from autospec.passes.gather_logits import GatherLogits
from autospec.passes.mask_tree import MaskTree
from autospec.passes.verify_draft import CommitPrompt, VerifyDraft
from autospec.passes.widen_decode import FeedPrompt, WidenDecode
from autospec.state import RANKS, StateShape
from autospec.trees import dynamic_tree

BATCH, DRAFTS = 2, 2
PAGE, PAGES_PER_ROW = 4, 8
FORKED = StateShape(
    batch_size=BATCH, token_room=PAGE * PAGES_PER_ROW, vocab_size=VOCAB, tree=dynamic_tree(3, 3, 6), sampling=False
)
VERIFY_TREE = VerifyDraft(sizes=FORKED, draft_len=3)


def _step_graph() -> fx.GraphModule:
    """A step before its verification: logits arrive as they are."""

    def write(builder: Builder, logits: fx.Node, draft_tokens: fx.Node) -> fx.Node:
        tag(draft_tokens, "draft_tokens")
        return logits

    wide = Slot("state", "draft_tokens", (BATCH, DRAFTS + 1), torch.int64)
    return sketch([Slot("input", "logits", (BATCH, DRAFTS + 1, VOCAB)), wide], write)


def _prompt_graph() -> fx.GraphModule:
    def write(builder: Builder, logits: fx.Node, q_lens: fx.Node) -> fx.Node:
        tag(q_lens, "q_lens")
        return logits

    return sketch([Slot("input", "logits", (BATCH, 1, VOCAB)), Slot("input", "q_lens", (BATCH,), torch.int32)], write)


def test_text(tiny: Any, sizes: StateShape) -> None:
    widen = WidenDecode(batch_size=BATCH, next_n=DRAFTS + 1, max_nodes=DRAFTS + 1, max_position=256)
    step = after(tiny.paged(DRAFTS + 1), widen, VerifyDraft(sizes=sizes, draft_len=DRAFTS))
    check_golden("verify_draft", graph_text(step))
    sampled = dataclasses.replace(sizes, sampling=True)
    check_golden("verify_draft.sampled", graph_text(after(_step_graph(), VerifyDraft(sizes=sampled, draft_len=DRAFTS))))
    feed = FeedPrompt(batch_size=BATCH, q_len=3, token_room=sizes.token_room, max_position=256)
    check_golden("commit_prompt", graph_text(after(tiny.paged(3), feed, GatherLogits(), CommitPrompt(sizes=sizes))))
    nodes = FORKED.tree.num_nodes
    widen = WidenDecode(batch_size=BATCH, next_n=nodes, max_nodes=nodes, max_position=256)
    tree = after(tiny.paged(nodes), widen, MaskTree(batch_size=BATCH, num_nodes=nodes), VERIFY_TREE)
    check_golden("verify_draft.tree", graph_text(tree))


def test_again_finds_nothing(sizes: StateShape) -> None:
    step, prompt = VerifyDraft(sizes=sizes, draft_len=DRAFTS), CommitPrompt(sizes=sizes)
    assert [record.count for record in apply(_step_graph(), step, step)] == [1, 0]
    assert [record.count for record in apply(_prompt_graph(), prompt, prompt)] == [1, 0]


def _fill(state: dict[str, Tensor], generator: torch.Generator, kv_lens: list[int], prompt_lens: list[int]) -> None:
    state["tokens"].copy_(torch.randint(0, VOCAB, state["tokens"].shape, generator=generator))
    state["kv_lens"].copy_(torch.tensor(kv_lens))
    state["prompt_lens"].copy_(torch.tensor(prompt_lens))
    state["limits"].copy_(state["kv_lens"] + 4)
    state["finished"].zero_()
    state["eos_ids"][0] = 3
    if "temperature" in state:
        state["temperature"].fill_(0.9)
        state["row_keys"].copy_(torch.tensor([11, -5]))
        state["repetition_penalty"].fill_(1.2)
        state["seen"].copy_(torch.rand(state["seen"].shape, generator=generator) < 0.3)


def _choose(state: dict[str, Tensor], logits: Tensor, ids: Tensor, parents: Tensor, kv_lens: Tensor) -> Tensor:
    if "temperature" not in state:
        return choose_greedy(logits)
    names = ("row_keys", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seen")
    return choose_tokens(logits, ids, parents, kv_lens, *[state[name] for name in names])


@settings(max_examples=20)
@given(sampling=st.booleans(), present=st.integers(0, DRAFTS), seed=st.integers(0, 1000))
def test_meaning_of_a_step(sizes: StateShape, sampling: bool, present: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = dataclasses.replace(sizes, sampling=sampling)
    module = after(_step_graph(), VerifyDraft(sizes=shape, draft_len=DRAFTS))
    state = new_state(module)
    _fill(state, generator, [5, 9], [4, 9])
    logits = torch.randn(BATCH, DRAFTS + 1, VOCAB, generator=generator)
    likely = logits.argmax(-1)
    state["draft_tokens"].copy_(torch.cat([likely[:, :1], likely[:, :-1]], 1))
    parents = [i - 1 if i <= present else -1 for i in range(DRAFTS + 1)]
    state["tree_parents"].copy_(torch.tensor(parents))
    other = {name: tensor.clone() for name, tensor in state.items()}
    ids, tree = other["draft_tokens"], other["tree_parents"]
    chosen = _choose(other, logits, ids, tree, other["kv_lens"])
    accepted = accept_tree(chosen, ids, tree, DRAFTS)
    names = ("tokens", "kv_lens", "finished", "accept_counts", "prompt_lens", "limits", "eos_ids")
    expected = commit_step(*[other[name] for name in names], ids, tree, *accepted)
    if sampling:
        mark_seen(other["seen"], expected)
    got = evaluate(module, {"logits": logits, **state})[0]
    assert torch.equal(got, expected)
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name


@settings(max_examples=20)
@given(
    sampling=st.booleans(), rest=st.lists(st.integers(0, 5), min_size=BATCH, max_size=BATCH), seed=st.integers(0, 100)
)
def test_meaning_of_a_prompt_chunk(sizes: StateShape, sampling: bool, rest: list[int], seed: int) -> None:
    """A first token appears exactly where the prompt ends in this chunk of 3."""
    generator = torch.Generator().manual_seed(seed)
    shape = dataclasses.replace(sizes, sampling=sampling)
    module = after(_prompt_graph(), CommitPrompt(sizes=shape))
    state = new_state(module)
    _fill(state, generator, [6, 3], [6 + rest[0], 3 + rest[1]])
    other = {name: tensor.clone() for name, tensor in state.items()}
    logits = torch.randn(BATCH, 1, VOCAB, generator=generator)
    q_lens = (other["prompt_lens"] - other["kv_lens"]).clamp(0, 3)
    root = (other["prompt_lens"] - 1).long()
    ids = other["tokens"].gather(1, root[:, None])
    chosen = _choose(other, logits, ids, torch.full((BATCH, 1), -1, dtype=torch.int32), root.to(torch.int32))
    got = evaluate(module, {"logits": logits, "q_lens": q_lens, **state})[0]
    for row in range(BATCH):
        ends = 0 < rest[row] <= 3
        assert got[row, 0] == (chosen[row, 0] if ends else -1)
        assert int(state["kv_lens"][row]) == int(other["kv_lens"][row]) + min(rest[row], 3)
        if ends:
            assert state["tokens"][row, int(other["prompt_lens"][row])] == chosen[row, 0]


def test_what_is_emitted_is_returned(sizes: StateShape) -> None:
    module = after(_step_graph(), VerifyDraft(sizes=sizes, draft_len=DRAFTS))
    assert module.graph.output_node().args[0][0] is next(calls(module, commit_step))
    module = after(_prompt_graph(), CommitPrompt(sizes=sizes))
    assert module.graph.output_node().args[0][0] is next(calls(module, commit_prompt))


def _tree_graph() -> fx.GraphModule:
    """A step on a tree before its verification, with one buffer of pages whose rows can be told apart."""

    def write(builder: Builder, logits: fx.Node, draft_tokens: fx.Node, pages: fx.Node, table: fx.Node) -> list[fx.Node]:
        tag(draft_tokens, "draft_tokens")
        return [logits, builder.call(aten.neg.default, logits)]

    nodes = FORKED.tree.num_nodes
    return sketch(
        [
            Slot("input", "logits", (BATCH, nodes, VOCAB)), Slot("state", "draft_tokens", (BATCH, nodes), torch.int64),
            Slot("state", "k_pages.0", (1 + BATCH * PAGES_PER_ROW, PAGE, 1, 1)),
            Slot("state", "page_table", (BATCH, PAGES_PER_ROW), torch.int32),
        ],
        write,
    )  # fmt: skip


def _slots(state: dict[str, Tensor], row: int) -> list[float]:
    """What stands in the cache of a row, slot by slot."""
    return state["k_pages.0"][state["page_table"][row].long()].flatten().tolist()


def _walk(wanted: list[int], ids: list[int], parents: list[int]) -> list[int]:
    """The nodes that are accepted, the root first: from node to the first child that carries what is wanted there."""
    path = [0]
    while len(path) <= FORKED.tree.max_draft_len:
        children = [n for n, parent in enumerate(parents) if parent == path[-1] and ids[n] == wanted[path[-1]]]
        if not children:
            break
        path.append(children[0])
    return path


def _parents() -> st.SearchStrategy[list[int]]:
    return st.tuples(st.just(-1), *[st.integers(-1, node - 1) for node in range(1, FORKED.tree.num_nodes)]).map(list)


def _check_tree(module: fx.GraphModule, trees: tuple[list[int], list[int]], seed: int) -> None:
    """The accepted path and the bonus token are emitted, its rows move to the front, its ranks are counted."""
    generator = torch.Generator().manual_seed(seed)
    state = new_state(module)
    _fill(state, generator, [5, 9], [5, 9])
    state["limits"].fill_(30)
    state["eos_ids"].fill_(-1)
    state["page_table"].copy_(torch.randperm(BATCH * PAGES_PER_ROW, generator=generator).reshape(BATCH, -1) + 1)
    state["k_pages.0"].copy_(torch.arange(state["k_pages.0"].numel()).reshape(state["k_pages.0"].shape))
    state["draft_tokens"].copy_(torch.randint(0, 3, state["draft_tokens"].shape, generator=generator))
    state["tree_parents"].copy_(torch.tensor(trees))
    logits = torch.randn(BATCH, FORKED.tree.num_nodes, VOCAB, generator=generator)
    logits[..., :3] += 4  # a small alphabet: long paths are accepted, and siblings may carry the same token
    before = [_slots(state, row) for row in range(BATCH)]
    emitted, untouched = evaluate(module, {"logits": logits, **state})
    assert torch.equal(untouched, -logits)
    for row, (parents, start) in enumerate(zip(trees, (5, 9), strict=True)):
        wanted, ids = logits[row].argmax(-1).tolist(), state["draft_tokens"][row].tolist()
        path = _walk(wanted, ids, parents)
        tokens = [*[ids[node] for node in path[1:]], wanted[path[-1]]]
        assert [token for token in emitted[row].tolist() if token >= 0] == tokens
        assert state["tokens"][row, start + 1 : start + 1 + len(tokens)].tolist() == tokens
        assert int(state["kv_lens"][row]) == start + len(path)
        kept = [before[row][start + node] for node in path]
        assert _slots(state, row)[: start + len(path)] == [*before[row][:start], *kept]
        ranks = [0] * RANKS
        for node in path[1:]:
            ranks[parents[:node].count(parents[node])] += 1
        assert state["rank_counts"][row].tolist() == [sum(parent >= 0 for parent in parents), *ranks]


@settings(max_examples=40)
@given(trees=st.tuples(_parents(), _parents()), seed=st.integers(0, 1000))
def test_meaning_of_a_step_on_a_tree(trees: tuple[list[int], list[int]], seed: int) -> None:
    _check_tree(after(_tree_graph(), VERIFY_TREE), trees, seed)


@pytest.mark.parametrize("op", [compact_kv, count_ranks], ids=lambda op: op.name)
def test_a_tree_that_is_verified_as_a_chain_is_seen(op: KernelOp) -> None:
    """Nothing is moved, or nothing is counted."""
    module = after(_tree_graph(), VERIFY_TREE)
    module.graph.erase_node(next(calls(module, op)))
    module.recompile()
    with pytest.raises(AssertionError):
        _check_tree(module, ([-1, 0, 0, 0, 2, 3, 3], [-1, 0, 0, 0, 2, 3, 3]), 3)


def test_a_tree_again_finds_nothing() -> None:
    assert [record.count for record in apply(_tree_graph(), VERIFY_TREE, VERIFY_TREE)] == [1, 0]


def test_only_a_tree_moves_rows(sizes: StateShape) -> None:
    assert not any(calls(after(_step_graph(), VerifyDraft(sizes=sizes, draft_len=DRAFTS)), compact_kv))
    assert len(list(calls(after(_tree_graph(), VERIFY_TREE), compact_kv))) == 1


def test_a_step_without_draft_tokens_is_a_broken_invariant(sizes: StateShape) -> None:
    with pytest.raises(AssertionError, match="0 nodes of role draft_tokens"):
        apply(after(_prompt_graph()), VerifyDraft(sizes=sizes, draft_len=DRAFTS))
