"""Synthetic acceptance: the accepted path is the chain of first children, cut where the profile says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.kernels.accept_tree import accept_tree
from autospec.kernels.synthesize_tokens import drawn_lengths, synthesize_tokens

FILE = "autospec.kernels.synthesize_tokens"
VOCAB = 97


def case(random_parents, seed, batch, q_len, tokens=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    parents = random_parents(generator, batch, q_len)
    draft, target = (torch.randint(0, tokens, (batch, q_len), generator=generator) for _ in range(2))
    kv_lens = torch.randint(0, 2**17, (batch,), generator=generator, dtype=torch.int32)
    keys = torch.randint(-(2**62), 2**62, (batch,), generator=generator)
    rates = torch.rand(5, generator=generator).sort(descending=True).values
    return target, draft, parents, kv_lens, keys, rates, VOCAB


def first_children(parents: list[int]) -> list[int]:
    """The root, its first child, the first child of that, ..."""
    path = [0]
    while True:
        children = [j for j in range(path[-1] + 1, len(parents)) if parents[j] == path[-1]]
        if not children:
            return path
        path.append(children[0])


def check(tokens, target, draft, parents, kv_lens, keys, rates, vocab) -> None:
    assert tokens.dtype == torch.int64
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < vocab
    lengths, paths, _ = accept_tree(tokens, draft, parents, len(rates))
    drawn = drawn_lengths(kv_lens, keys, rates)
    for b in range(draft.shape[0]):
        chain = first_children(parents[b].tolist())
        expected = chain[: int(drawn[b]) + 1]
        assert int(lengths[b]) == len(expected) - 1, f"row {b}"
        # Where two siblings carry one token, the first of them is the first child as well.
        assert paths[b].tolist() == expected + [-1] * (len(rates) + 1 - len(expected)), f"row {b}"


@settings(max_examples=40, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 40), tokens=st.sampled_from([2, VOCAB]))
def test_reference_accepts_first_children_up_to_what_is_drawn(random_parents, seed, q_len, tokens):
    args = case(random_parents, seed, 4, q_len, tokens)
    check(synthesize_tokens(*args), *args)


@settings(max_examples=20, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 70), tokens=st.sampled_from([2, VOCAB]))
def test_triton_equals_the_reference(random_parents, interpreted, seed, q_len, tokens):
    args = case(random_parents, seed, 3, q_len, tokens)
    assert torch.equal(interpreted(FILE, "synthesize_tokens_triton", *args), synthesize_tokens(*args))


def test_the_law_of_the_lengths():
    """Every rate within four standard deviations, over 64 rows and 200 slots; rows and slots draw for themselves."""
    rates = torch.tensor([0.9, 0.7, 0.7, 0.2, 0.0])
    kv_lens = torch.arange(200, dtype=torch.int32).repeat(64)
    keys = torch.arange(64).repeat_interleave(200)
    drawn = drawn_lengths(kv_lens, keys, rates)
    for depth, rate in enumerate(rates.tolist(), start=1):
        share, sigma = (drawn >= depth).double().mean().item(), (rate * (1 - rate) / len(drawn)) ** 0.5
        assert abs(share - rate) <= 4 * sigma, f"depth {depth}"
    table = drawn.reshape(64, 200)
    assert len({tuple(row) for row in table.tolist()}) == 64
    assert (table[:, 1:] != table[:, :-1]).float().mean() > 0.4


@pytest.mark.parametrize("bug", ["siblings mixed up", "target kept", "one deeper"])
def test_planted_bugs_are_caught(random_parents, bug):
    args = case(random_parents, 3, 8, 20, 2)
    target, draft, _, kv_lens, keys, rates, vocab = args
    # Every node of a chain has a sibling behind it.
    parents = ((torch.arange(20, dtype=torch.int32) + 1) // 2 * 2 - 3).clamp(min=0).expand(8, -1).clone()
    parents[:, 0] = -1
    args = (target, draft, parents, kv_lens, keys, rates, vocab)
    if bug == "siblings mixed up":
        tokens = synthesize_tokens(target, draft, parents.roll(1, 1), kv_lens, keys, rates, vocab)
    elif bug == "target kept":
        tokens = target
    else:
        tokens = synthesize_tokens(target, draft, parents, kv_lens, keys, torch.cat([torch.ones(1), rates]), vocab)
    with pytest.raises(AssertionError):
        check(tokens, *args)


@pytest.mark.cuda
def test_triton_on_the_gpu(random_parents, cuda):
    args = case(random_parents, 1, 64, 61)
    moved = [x.to(cuda) if isinstance(x, torch.Tensor) else x for x in args]
    assert torch.equal(torch.ops.autospec_triton.synthesize_tokens(*moved).cpu(), synthesize_tokens(*args))
