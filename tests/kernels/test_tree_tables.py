"""Masks and depths, against a walk over Python lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.kernels.tree_tables import ancestors, node_positions, tree_tables

FILE = "autospec.kernels.tree_tables"


def path_to_root(parents: list[int], node: int) -> list[int]:
    """Nodes from `node` up to the root; only the node itself if it is absent."""
    path = [node]
    while path[-1] > 0:
        parent = parents[path[-1]]
        if not 0 <= parent < path[-1]:
            return [node]
        path.append(parent)
    return path


def check_tables(parents: torch.Tensor, mask: torch.Tensor, depth: torch.Tensor) -> None:
    """Every bit of every word and every depth is what the walk says."""
    batch, q_len = parents.shape
    assert mask.shape == (batch, q_len, (q_len + 31) // 32)
    assert mask.dtype == depth.dtype == torch.int32
    for b in range(batch):
        for i in range(q_len):
            path = path_to_root(parents[b].tolist(), i)
            words = [word & 0xFFFFFFFF for word in mask[b, i].tolist()]
            seen = [j for j in range(32 * len(words)) if words[j // 32] >> (j % 32) & 1]
            assert seen == sorted(path), f"row {b}, node {i}"
            assert depth[b, i] == len(path) - 1, f"row {b}, node {i}"


@settings(max_examples=30, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 70), absent=st.sampled_from([0.0, 0.1, 0.6]))
def test_reference_equals_a_walk(random_parents, seed, q_len, absent):
    parents = random_parents(torch.Generator().manual_seed(seed), 2, q_len, absent)
    check_tables(parents, *tree_tables(parents))


@pytest.mark.parametrize("q_len", [1, 2, 31, 32, 33, 64, 65, 130])
def test_triton_equals_a_walk_at_word_boundaries(random_parents, interpreted, q_len):
    parents = random_parents(torch.Generator().manual_seed(q_len), 3, q_len)
    check_tables(parents, *interpreted(FILE, "tree_tables_triton", parents))


def test_a_long_chain_uses_the_sign_bit(interpreted):
    parents = torch.arange(-1, 63, dtype=torch.int32)[None]
    for mask, depth in (tree_tables(parents), interpreted(FILE, "tree_tables_triton", parents)):
        check_tables(parents, mask, depth)
        assert mask[0, 31, 0] == -1


def test_descendants_of_an_absent_node_see_only_themselves(interpreted):
    parents = torch.tensor([[-1, 0, -1, 2, 3, 1]], dtype=torch.int32)
    for mask, depth in (tree_tables(parents), interpreted(FILE, "tree_tables_triton", parents)):
        assert mask[0, :, 0].tolist() == [1, 3, 4, 8, 16, 0b100011]
        assert depth[0].tolist() == [0, 1, 0, 0, 0, 2]


@pytest.mark.parametrize("parents", [[-1, 1, 0], [-1, 2, 0], [-1, 0, 7]])
def test_a_parent_that_is_not_below_its_child_ends_the_walk(interpreted, parents):
    """The walk of other engines looped or read out of bounds here; such a node is absent."""
    tree_parents = torch.tensor([parents], dtype=torch.int32)
    for mask, depth in (tree_tables(tree_parents), interpreted(FILE, "tree_tables_triton", tree_parents)):
        check_tables(tree_parents, mask, depth)


def test_siblings_share_a_position():
    parents = torch.tensor([[-1, 0, 0, 1, 1]], dtype=torch.int32)
    positions = node_positions(torch.tensor([7], dtype=torch.int32), 5, 100, tree_tables(parents)[1])
    assert positions.tolist() == [[7, 8, 8, 9, 9]]


def test_positions_stay_below_the_limit():
    assert node_positions(torch.tensor([6], dtype=torch.int32), 4, 8).tolist() == [[6, 7, 7, 7]]


@pytest.mark.parametrize("bug", ["siblings see each other", "the grandparent is skipped", "depth counts the node"])
def test_planted_bugs_are_caught(bug):
    parents = torch.tensor([[-1, 0, 0, 1, 3]], dtype=torch.int32)
    mask, depth = tree_tables(parents)
    if bug == "siblings see each other":
        mask[0, 1] |= 0b100
    elif bug == "the grandparent is skipped":
        mask[0, 4] &= ~0b10
    else:
        depth += 1
    with pytest.raises(AssertionError):
        check_tables(parents, mask, depth)


def test_ancestors_is_what_the_mask_packs(random_parents):
    parents = random_parents(torch.Generator().manual_seed(3), 2, 40)
    assert torch.equal(ancestors(parents).sum(-1) - 1, tree_tables(parents)[1].long())


@pytest.mark.cuda
def test_triton_on_the_gpu(random_parents, cuda):
    parents = random_parents(torch.Generator().manual_seed(4), 5, 300)
    mask, depth = torch.ops.autospec_triton.tree_tables(parents.to(cuda))
    check_tables(parents, mask.cpu(), depth.cpu())
