"""Prompt lookup, against a search through Python lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.kernels.ngram_propose import ngram_propose

FILE = "autospec.kernels.ngram_propose"


def lookup(known: list[int], count: int, longest: int, is_oldest: bool) -> list[int]:
    """The draft after the longest known suffix that occurred before; [] where none did."""
    for size in range(min(longest, len(known) - 1), 1, -1):
        suffix = known[-size:]
        ends = [i for i in range(size - 1, len(known) - 1) if known[i - size + 1 : i + 1] == suffix]
        if ends:
            text, end = list(known), ends[0] if is_oldest else ends[-1]
            for i in range(count):
                text.append(text[end + 1 + i])
            return text[len(known) :]
    return []


def check_proposal(tokens, kv_lens, limits, count, longest, is_oldest, draft_tokens, tree_parents) -> None:
    assert draft_tokens.dtype == torch.int64
    assert tree_parents.dtype == torch.int32
    for b in range(tokens.shape[0]):
        known = tokens[b, : int(kv_lens[b]) + 1].tolist()
        expected = lookup(known, count, longest, is_oldest)
        room = max(0, min(len(expected), int(limits[b]) - len(known)))
        assert draft_tokens[b, 0] == known[-1]
        assert tree_parents[b].tolist() == [-1, *range(room), *[-1] * (count - room)], f"row {b}"
        assert draft_tokens[b, 1 : room + 1].tolist() == expected[:room], f"row {b}"
        assert ((draft_tokens[b] >= 0) & (draft_tokens[b] < 100)).all(), "an absent node carries a valid token id"


def make_case(seed, width=40, alphabet=3):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, alphabet, (4, width), generator=g)
    kv_lens = torch.randint(0, width - 1, (4,), generator=g).int()
    return tokens, kv_lens, kv_lens + torch.randint(0, 9, (4,), generator=g).int()


@settings(max_examples=50, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 6), longest=st.integers(2, 5), is_oldest=st.booleans())
def test_reference_equals_a_search(seed, count, longest, is_oldest):
    case = (*make_case(seed), count, longest, is_oldest)
    check_proposal(*case, *ngram_propose(*case))


@settings(max_examples=25, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 6), longest=st.integers(2, 5), is_oldest=st.booleans())
def test_triton_equals_a_search(interpreted, seed, count, longest, is_oldest):
    case = (*make_case(seed), count, longest, is_oldest)
    check_proposal(*case, *interpreted(FILE, "ngram_propose_triton", *case))


def test_more_tokens_than_a_block(interpreted):
    case = (*make_case(1, width=2500, alphabet=30), 5, 4, False)
    check_proposal(*case, *interpreted(FILE, "ngram_propose_triton", *case))


@pytest.mark.parametrize("is_oldest", [False, True])
def test_newest_and_oldest_occurrence(interpreted, is_oldest):
    tokens = torch.tensor([[1, 2, 7, 1, 2, 8, 1, 2, 0, 0]])
    case = tokens, torch.tensor([7]).int(), torch.tensor([99]).int(), 2, 3, is_oldest
    for draft, parents in (ngram_propose(*case), interpreted(FILE, "ngram_propose_triton", *case)):
        assert draft.tolist() == [[2, 7, 1] if is_oldest else [2, 8, 1]]
        assert parents.tolist() == [[-1, 0, 1]]


def test_a_draft_continues_with_itself(interpreted):
    case = torch.tensor([[4, 5, 4, 5, 9, 9, 9, 9]]), torch.tensor([3]).int(), torch.tensor([99]).int(), 4, 2, False
    for draft, _ in (ngram_propose(*case), interpreted(FILE, "ngram_propose_triton", *case)):
        assert draft.tolist() == [[5, 4, 5, 4, 5]]


def test_tokens_past_the_known_ones_are_not_looked_at(interpreted):
    """A row that stopped inside an accepted run leaves stale tokens behind: they must match nothing."""
    tokens, kv_lens, limits = make_case(2)
    garbage = torch.where(torch.arange(tokens.shape[1])[None] > kv_lens[:, None], 50, tokens)
    for call in (ngram_propose, lambda *args: interpreted(FILE, "ngram_propose_triton", *args)):
        one, other = (call(t, kv_lens, limits, 4, 3, False) for t in (tokens, garbage))
        assert torch.equal(one[1], other[1])
        assert torch.equal(torch.where(one[1] >= 0, one[0], 0), torch.where(other[1] >= 0, other[0], 0))


@pytest.mark.parametrize("bug", ["a match of one token", "the root is not part of the suffix", "limits ignored"])
def test_planted_bugs_are_caught(bug):
    tokens = torch.tensor([[1, 2, 3, 9, 1, 2, 7, 3]])
    kv_lens, limits = torch.tensor([7]).int(), torch.tensor([99]).int()
    if bug == "a match of one token":
        result = torch.tensor([[3, 9, 1]]), torch.tensor([[-1, 0, 1]]).int()
    elif bug == "the root is not part of the suffix":
        kv_lens = torch.tensor([5]).int()
        result = ngram_propose(tokens, kv_lens - 1, limits, 2, 3, False)
    else:
        tokens, kv_lens, limits = torch.tensor([[1, 2, 3, 1, 2]]), torch.tensor([4]).int(), torch.tensor([6]).int()
        result = ngram_propose(tokens, kv_lens, limits + 9, 2, 3, False)
    with pytest.raises(AssertionError):
        check_proposal(tokens, kv_lens, limits, 2, 3, False, *result)


@pytest.mark.cuda
def test_triton_on_the_gpu(cuda):
    tokens, kv_lens, limits = make_case(3, width=5000, alphabet=20)
    for is_oldest in (False, True):
        on_gpu = (x.to(cuda) for x in (tokens, kv_lens, limits))
        result = torch.ops.autospec_triton.ngram_propose(*on_gpu, 7, 4, is_oldest)
        check_proposal(tokens, kv_lens, limits, 7, 4, is_oldest, *(x.cpu() for x in result))
