"""The cut-offs of a row against the reference in float64: only masses a millionth from the edge may fall either way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.kernels.filters import LISTED, filter_scores

FILE = "autospec.kernels.filters"
INF = float("inf")


def scores_of(kind: str, seed: int, vocab_size: int) -> Tensor:
    """Two rows of one request: float32 [1, 2, vocab_size]."""
    scores = torch.randn(1, 2, vocab_size, generator=torch.Generator().manual_seed(seed))
    return {
        "usual": scores * 4,
        "flat": scores * 0.1,
        "far apart": scores * 400,
        "many ties": (scores * 2).round() / 2,
        "one value": torch.full_like(scores, -3.0),
        "masked": torch.where(scores > 1.5, scores, -INF),
        "masked by a number": torch.where(scores > 1.5, scores, -1e9),
    }[kind]


def cutoffs(interpreted, scores: Tensor, top_k: int, top_p: float, listed: int = LISTED) -> list[Tensor]:
    """best, floor, first of every row, at temperature 1 without a penalty."""
    one, rows = torch.ones(scores.shape[0]), scores.shape[1]
    none = torch.zeros(scores.shape[0], rows, dtype=torch.int64)
    result = interpreted(
        FILE, "find_cutoffs", scores, none, none.int() - 1, one, one.int() * top_k, one * top_p, 0 * one, one,
        torch.zeros(scores.shape[0], scores.shape[2], dtype=torch.bool), 0, listed,
    )
    return [x.view(scores.shape[0], rows) for x in result[:3]]


def kept_ids(scores: Tensor, floor: Tensor, first: Tensor) -> Tensor:
    """What the three numbers keep: bool, like scores."""
    bits = torch.where(scores == 0.0, 0.0, scores).view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() + 2**31
    lowest = (floor.long() & 0xFFFFFFFF)[..., None]
    return (keys > lowest) | ((keys == lowest) & (torch.arange(scores.shape[2]) >= first[..., None]))


def check_kept(scores: Tensor, top_k: int, top_p: float, kept: Tensor) -> None:
    """At least what the reference keeps of a little less mass, at most what it keeps of a little more."""
    off = 0.0 if top_p == 1.0 else 1e-6
    k, zero = torch.tensor([top_k]), torch.zeros(1, dtype=torch.float64)
    p = torch.tensor([top_p]).double()
    least, most = (filter_scores(scores.double(), k, p + by, zero) > -INF for by in (-off, off))
    is_finite = scores > -INF  # what is -inf is out whoever keeps it
    assert not (least & ~kept).any(), f"{int((least & ~kept).sum())} ids are missing"
    assert not (kept & is_finite & ~most).any(), f"{int((kept & is_finite & ~most).sum())} ids too many"


KINDS = ["usual", "flat", "far apart", "many ties", "one value", "masked", "masked by a number"]


@settings(max_examples=12, deadline=None, print_blob=True)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1), vocab_size=st.sampled_from([3, 900, 5000]),
       top_k=st.sampled_from([0, 1, 40, 700]), top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.07, 0.0]))
@example(kind="one value", seed=0, vocab_size=5000, top_k=40, top_p=0.9)
@example(kind="masked", seed=1, vocab_size=900, top_k=700, top_p=0.9)
@example(kind="far apart", seed=2, vocab_size=5000, top_k=700, top_p=0.999)
def test_cutoffs_equal_the_reference(interpreted, kind, seed, vocab_size, top_k, top_p):
    scores = scores_of(kind, seed, vocab_size)
    best, floor, first = cutoffs(interpreted, scores, top_k, top_p)
    is_filtered = top_p < 1.0 or 0 < top_k < vocab_size
    assert torch.equal(best, scores.amax(-1) if is_filtered else torch.full_like(best, -INF))
    check_kept(scores, top_k, top_p, kept_ids(scores, floor, first))


@pytest.mark.parametrize("kind", ["usual", "many ties"])
def test_a_list_that_overflows_changes_nothing(interpreted, kind):
    """The search over the row itself finds the same three numbers; so does a row alone, and among others."""
    scores = scores_of(kind, 3, 5000)
    together = cutoffs(interpreted, scores, 300, 0.9)
    alone = cutoffs(interpreted, scores[:, 1:], 300, 0.9)
    crowd = cutoffs(interpreted, scores.flip(1).repeat(11, 1, 1), 300, 0.9)  # more blocks of ids to a program
    for one, other, single, many in zip(together, cutoffs(interpreted, scores, 300, 0.9, 1), alone, crowd, strict=True):
        assert torch.equal(one, other)
        assert one[0, 1] == single[0, 0]
        assert torch.equal(many, one.flip(1).expand(11, -1))


def shifted(scores: Tensor, floor: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The next score up."""
    return floor + 1, first


def all_ties(scores: Tensor, floor: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Every tie stays."""
    return floor, torch.zeros_like(first)


@pytest.mark.parametrize(("bug", "kind"), [(shifted, "usual"), (all_ties, "many ties")])
def test_planted_bugs_are_caught(interpreted, bug, kind):
    scores = scores_of(kind, 4, 900)
    _, floor, first = cutoffs(interpreted, scores, 0, 0.9)
    check_kept(scores, 0, 0.9, kept_ids(scores, floor, first))
    with pytest.raises(AssertionError, match="ids"):
        check_kept(scores, 0, 0.9, kept_ids(scores, *bug(scores, floor, first)))
