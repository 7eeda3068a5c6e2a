"""Acceptance, against a recursive walk down the tree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.kernels.accept_tree import accept_tree

FILE = "autospec.kernels.accept_tree"


def follow(target: list[int], draft: list[int], parents: list[int], limit: int, node: int = 0) -> list[int]:
    """The accepted path from `node` down."""
    children = [j for j in range(node + 1, len(draft)) if parents[j] == node and draft[j] == target[node]]
    if not children or limit == 0:
        return [node]
    return [node, *follow(target, draft, parents, limit - 1, children[0])]


def check_acceptance(target, draft, parents, limit, accept_length, accept_path, bonus_token) -> None:
    assert accept_length.dtype == accept_path.dtype == torch.int32
    assert bonus_token.dtype == torch.int64
    for b in range(draft.shape[0]):
        path = follow(target[b].tolist(), draft[b].tolist(), parents[b].tolist(), limit)
        assert accept_length[b] == len(path) - 1, f"row {b}"
        assert accept_path[b].tolist() == path + [-1] * (limit + 1 - len(path)), f"row {b}"
        assert bonus_token[b] == target[b, path[-1]], f"row {b}"


def tree_with_true_continuations(random_parents, generator, batch, q_len):
    """Random trees over three tokens, so that paths of every length are accepted."""
    parents = random_parents(generator, batch, q_len)
    draft, target = (torch.randint(0, 3, (batch, q_len), generator=generator) for _ in range(2))
    return target, draft, parents


@settings(max_examples=50, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 40), limit=st.integers(0, 9))
def test_reference_equals_a_recursive_walk(random_parents, seed, q_len, limit):
    case = tree_with_true_continuations(random_parents, torch.Generator().manual_seed(seed), 3, q_len)
    check_acceptance(*case, limit, *accept_tree(*case, limit))


@settings(max_examples=25, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 70), limit=st.integers(0, 9))
def test_triton_equals_a_recursive_walk(random_parents, interpreted, seed, q_len, limit):
    case = tree_with_true_continuations(random_parents, torch.Generator().manual_seed(seed), 3, q_len)
    check_acceptance(*case, limit, *interpreted(FILE, "accept_tree_triton", *case, limit))


def both(interpreted, *args):
    return accept_tree(*args), interpreted(FILE, "accept_tree_triton", *args)


@pytest.mark.parametrize("depth", range(1, 7))
def test_every_accept_count_from_0_to_depth(interpreted, depth):
    """One row per count: a chain that the target leaves after `count` tokens, and a decoy sibling at every level."""
    counts = range(depth + 1)
    draft = torch.tensor([[9] + [x for level in range(depth) for x in (level, 100 + level)]] * len(counts))
    row = [-1]
    for level in range(depth):
        row += [max(2 * level - 1, 0)] * 2
    parents = torch.tensor([row] * len(counts), dtype=torch.int32)
    target = torch.full_like(draft, 77)
    for count in counts:
        for level in range(count):
            target[count, max(2 * level - 1, 0)] = level
    for result in both(interpreted, target, draft, parents, depth):
        assert result[0].tolist() == list(counts)
        assert result[2].tolist() == [77] * len(counts)
        check_acceptance(target, draft, parents, depth, *result)


def test_a_row_without_a_draft_emits_exactly_the_bonus_token(interpreted):
    draft, target = torch.tensor([[5, 6, 7]]), torch.tensor([[6, 7, 8]])
    parents = torch.tensor([[-1, -1, 1]], dtype=torch.int32)
    for length, path, bonus in both(interpreted, target, draft, parents, 2):
        assert (length.item(), path.tolist(), bonus.item()) == (0, [[0, -1, -1]], 6)


def test_two_children_with_one_token_follow_the_lower_index(interpreted):
    draft, target = torch.tensor([[1, 2, 2, 3, 3]]), torch.tensor([[2, 3, 3, 8, 9]])
    parents = torch.tensor([[-1, 0, 0, 2, 1]], dtype=torch.int32)
    for length, path, bonus in both(interpreted, target, draft, parents, 3):
        assert (length.item(), path.tolist(), bonus.item()) == (2, [[0, 1, 4, -1]], 9)


def test_order_of_distinct_siblings_is_irrelevant(interpreted):
    target, draft = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[1, 3, 4, 6]])
    parents = torch.tensor([[-1, 0, 0, 2]], dtype=torch.int32)
    other_parents = torch.tensor([[-1, 0, 0, 1]], dtype=torch.int32)
    swapped = torch.tensor([[4, 6, 5, 7]]), torch.tensor([[1, 4, 3, 6]]), other_parents
    for one, other in zip(both(interpreted, target, draft, parents, 2), both(interpreted, *swapped, 2), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[2], other[2])


def test_more_than_256_requests(interpreted, random_parents):
    case = tree_with_true_continuations(random_parents, torch.Generator().manual_seed(0), 300, 4)
    for result in both(interpreted, *case, 2):
        check_acceptance(*case, 2, *result)


@pytest.mark.parametrize("bug", ["wrong parent", "token of the child", "highest index"])
def test_planted_bugs_are_caught(bug):
    draft, target = torch.tensor([[1, 2, 2, 3, 3]]), torch.tensor([[2, 3, 3, 8, 9]])
    parents = torch.tensor([[-1, 0, 0, 2, 1]], dtype=torch.int32)
    if bug == "wrong parent":
        result = accept_tree(target, draft, torch.tensor([[-1, 0, 0, 1, 2]], dtype=torch.int32), 3)
    elif bug == "token of the child":
        result = accept_tree(draft, draft, parents, 3)
    else:
        result = (torch.tensor([2]).int(), torch.tensor([[0, 2, 3, -1]]).int(), torch.tensor([8]))
    with pytest.raises(AssertionError):
        check_acceptance(target, draft, parents, 3, *result)


@pytest.mark.cuda
def test_triton_on_the_gpu(random_parents, cuda):
    case = tree_with_true_continuations(random_parents, torch.Generator().manual_seed(1), 64, 64)
    result = torch.ops.autospec_triton.accept_tree(*(x.to(cuda) for x in case), 8)
    check_acceptance(*case, 8, *(x.cpu() for x in result))
