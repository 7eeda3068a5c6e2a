"""The final tree, against a selection over Python lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from autospec.kernels.build_dynamic_tree import build_dynamic_tree
from autospec.kernels.grow_frontier import grow_frontier
from autospec.kernels.tree_tables import ancestors

FILE = "autospec.kernels.build_dynamic_tree"
NOTHING = float("-inf")


def select(scores: list[float], parents: list[int], most: int) -> list[tuple[int, int]]:
    """(candidate, parent's node) of every node after the root; (-1, -1) where it is absent."""
    scores = [NOTHING if score != score else score for score in scores]
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:most]
    node = {candidate: number for number, candidate in enumerate(sorted(best), 1) if scores[candidate] > NOTHING}
    tree = []
    for candidate in sorted(best):
        parent = parents[candidate]
        is_absent = candidate not in node or (parent >= 0 and (parent >= candidate or parent not in node))
        tree.append((-1, -1) if is_absent else (candidate, node[parent] if parent >= 0 else 0))
    return tree + [(-1, -1)] * (most - len(tree))


def check_tree(root, tokens, scores, parents, most, draft_tokens, tree_parents) -> None:
    assert draft_tokens.shape == tree_parents.shape == (tokens.shape[0], most + 1)
    assert draft_tokens.dtype == torch.int64
    assert tree_parents.dtype == torch.int32
    for b in range(tokens.shape[0]):
        tree = select(scores[b].tolist(), parents[b].tolist(), most)
        assert tree_parents[b].tolist() == [-1] + [parent for _, parent in tree], f"request {b}"
        expected = [int(root[b] if candidate < 0 else tokens[b, candidate]) for candidate, _ in tree]
        assert draft_tokens[b].tolist() == [int(root[b]), *expected], f"request {b}"


def grown(seed: int, top: int, levels: int, log_probs: list[float], batch: int = 2) -> tuple[Tensor, ...]:
    """root_token, tokens, scores, parents of a history grown from conditionals drawn from `log_probs`."""
    g = torch.Generator().manual_seed(seed)
    values = torch.tensor(log_probs)
    scores, ids = torch.zeros(batch, 1), torch.full((batch, 1), -1, dtype=torch.int32)
    mask, lens = torch.zeros(batch, 0, 1, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
    pieces = []
    for level in range(levels):
        shape = batch, scores.shape[1], top
        children = torch.randint(0, 99, shape, generator=g)
        conditionals = values[torch.randint(0, len(values), shape, generator=g)]
        *piece, _, scores, ids, _, mask = grow_frontier.reference(
            children, conditionals, scores, ids, mask, lens, lens + 50, level, top
        )
        pieces.append(piece)
    return torch.randint(0, 99, (batch,), generator=g), *(torch.cat(x, 1) for x in zip(*pieces, strict=True))


def anything(seed: int, size: int, batch: int = 2) -> tuple[Tensor, ...]:
    """A history that no growth leaves: parents out of range, above their children, not selected; NaN and ties."""
    g = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, -1.0, -2.0, NOTHING, float("nan")])
    return (
        torch.randint(0, 99, (batch,), generator=g), torch.randint(0, 99, (batch, size), generator=g),
        values[torch.randint(0, 6, (batch, size), generator=g)],
        torch.randint(-1, size + 2, (batch, size), generator=g).int(),
    )


TIES = [0.0, -0.5, -0.5, -1.0, 0.25, NOTHING, float("nan")]


@settings(max_examples=60, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), top=st.integers(1, 5), levels=st.integers(1, 4), most=st.integers(1, 60))
def test_reference_equals_a_selection(seed, top, levels, most):
    history = grown(seed, top, levels, TIES)
    check_tree(*history, most, *build_dynamic_tree(*history, most))
    broken = anything(seed, history[1].shape[1])
    check_tree(*broken, most, *build_dynamic_tree(*broken, most))


@settings(max_examples=40, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 140), most=st.integers(1, 80), is_grown=st.booleans())
def test_triton_equals_a_selection(interpreted, seed, size, most, is_grown):
    history = grown(seed, 1 + size % 6, 1 + size % 4, TIES) if is_grown else anything(seed, size)
    check_tree(*history, most, *interpreted(FILE, "build_dynamic_tree_triton", *history, most))


@settings(max_examples=60, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), top=st.integers(1, 5), levels=st.integers(1, 5), most=st.integers(1, 60))
def test_the_best_are_closed_under_ancestors(seed, top, levels, most):
    """Ties, NaN and filler upstream: every possible candidate that is selected is a node, and sees the root."""
    root, tokens, scores, parents = grown(seed, top, levels, TIES)
    tree_parents = build_dynamic_tree(root, tokens, scores, parents, most)[1]
    possible = (scores > NOTHING).sum(1).clamp(max=most)
    assert torch.equal((tree_parents[:, 1:] >= 0).sum(1), possible)
    assert torch.equal(ancestors(tree_parents)[:, :, 0].sum(1), possible + 1)


def test_a_chain_is_a_tree_of_top_k_1(interpreted):
    history = grown(0, 1, 5, [-1.0, -2.0])
    for draft_tokens, tree_parents in both(interpreted, *history, 5):
        assert tree_parents.tolist() == [[-1, 0, 1, 2, 3, 4]] * 2
        assert torch.equal(draft_tokens[:, 1:], history[1])


def both(interpreted, *args):
    return build_dynamic_tree(*args), interpreted(FILE, "build_dynamic_tree_triton", *args)


def test_the_whole_history_and_more(interpreted):
    history = grown(1, 3, 3, TIES)
    for most in (21, 22, 40):
        for result in both(interpreted, *history, most):
            check_tree(*history, most, *result)


@pytest.mark.parametrize("value", [NOTHING, float("nan")])
def test_a_hopeless_history_leaves_the_root_alone(interpreted, value):
    history = grown(2, 3, 2, [value])
    for draft_tokens, tree_parents in both(interpreted, *history, 6):
        assert tree_parents.tolist() == [[-1] * 7] * 2
        assert torch.equal(draft_tokens, history[0][:, None].expand(-1, 7))


def test_eagles_sizes(interpreted):
    """H = 710 and M = 60; and 1023 of 3104, which is more than a thread per candidate."""
    for top, levels, most in ((10, 8, 60), (32, 4, 1023)):
        history = grown(3, top, levels, [-0.1, -0.5, -2.0, -2.5])
        for result in both(interpreted, *history, most):
            check_tree(*history, most, *result)


def nudged(scores: Tensor) -> Tensor:
    return scores + 1e-4 * torch.arange(scores.shape[1])


PLANTED = {
    "ties to the higher index": lambda root, tokens, scores, parents: (root, tokens, nudged(scores), parents),
    "the parent's neighbour": lambda root, tokens, scores, parents: (root, tokens, scores, parents + (parents >= 0).int()),
    "filler becomes nodes": lambda root, tokens, scores, parents: (root, tokens, scores.clamp(min=-1e3), parents),
    "the token of another": lambda root, tokens, scores, parents: (root, tokens.roll(1, 1), scores, parents),
    "NaN is the best": lambda root, tokens, scores, parents: (root, tokens, scores.nan_to_num(nan=0.0, neginf=0.0), parents),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug):
    history = grown(4, 4, 3, TIES)
    caught = 0
    for most in (20, 36):  # 36 is all
        check_tree(*history, most, *build_dynamic_tree(*history, most))
        try:
            check_tree(*history, most, *build_dynamic_tree(*PLANTED[bug](*history), most))
        except AssertionError:
            caught += 1
    assert caught > 0


def test_best_first_instead_of_history_order_is_caught():
    history = grown(5, 4, 3, TIES)
    draft_tokens, tree_parents = build_dynamic_tree(*history, 20)
    with pytest.raises(AssertionError):
        check_tree(*history, 20, draft_tokens, tree_parents.roll(1, 1))


def test_opcheck_and_trace():
    history = grown(6, 3, 2, TIES)
    opcheck(build_dynamic_tree.op, (*history, 7))
    traced = make_fx(lambda *args: build_dynamic_tree.reference(*args, 7))(*history)
    assert not list(traced.graph.find_nodes(op="get_attr"))


@pytest.mark.cuda
@pytest.mark.parametrize(("top", "levels", "most"), [(10, 8, 60), (1, 5, 5), (32, 4, 1023), (3, 3, 40)])
def test_triton_on_the_gpu(cuda, top, levels, most):
    for history in (grown(7, top, levels, TIES, 64), anything(8, top + top * top * (levels - 1), 64)):
        on_gpu = [x.to(cuda) for x in history]
        result = torch.ops.autospec_triton.build_dynamic_tree(*on_gpu, most)
        check_tree(*history, most, *(x.cpu() for x in result))
        opcheck(torch.ops.autospec_triton.build_dynamic_tree.default, (*on_gpu, most))
