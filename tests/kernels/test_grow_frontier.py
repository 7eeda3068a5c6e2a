"""One level of a dynamic tree, against Python lists."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from autospec.kernels.grow_frontier import grow_frontier

FILE = "autospec.kernels.grow_frontier"
NOTHING = float("-inf")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of the op, in its order."""

    child_tokens: Tensor
    child_log_probs: Tensor
    parent_scores: Tensor
    parent_history: Tensor
    grown_mask: Tensor
    kv_lens: Tensor
    limits: Tensor
    level: int
    count: int

    def arguments(self) -> list:
        return list(vars(self).values())


def make_case(seed: int, rows: int, top: int, level: int, count: int | None = None, batch: int = 3) -> Case:
    """Scores with many ties, NaN and -inf; one request has no room."""
    g = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, -0.5, -0.5, -1.0, 0.25, NOTHING, float("nan")])
    count = min(count or top, rows * top)
    words = (count * (level + 2) + 31) // 32
    grown = max(rows, level * count) if level else 0
    kv_lens = torch.randint(0, 50, (batch,), generator=g).int()
    return Case(
        child_tokens=torch.randint(0, 999, (batch, rows, top), generator=g),
        child_log_probs=values[torch.randint(0, 8, (batch, rows, top), generator=g)],
        parent_scores=torch.cat([values[:5], values[6:]])[torch.randint(0, 7, (batch, rows), generator=g)],
        parent_history=torch.randint(-1, 500, (batch, rows), generator=g).int(),
        grown_mask=torch.randint(-(2**31), 2**31, (batch, grown, words), generator=g).int(),
        kv_lens=kv_lens, limits=kv_lens + level + torch.arange(batch).int() + 1, level=level, count=count,
    )


def bits(words: list[int]) -> set[int]:
    return {32 * i + j for i, word in enumerate(words) for j in range(32) if word >> j & 1}


def check_level(case: Case, result: tuple[Tensor, ...]) -> None:
    """Every output is what the sentence in ALGORITHMS says, computed with Python floats (exact: multiples of 1/4)."""
    long, short, single = torch.int64, torch.int32, torch.float32
    assert [x.dtype for x in result] == [long, single, short, long, single, short, short, short]
    batch, rows, top = case.child_tokens.shape
    first = 0 if case.level == 0 else top + (case.level - 1) * top**2
    for b in range(batch):
        tokens, scores, parents, *frontier = (x[b].tolist() for x in result)
        expected = []
        for row in range(rows):
            for j in range(top):
                log_prob, parent = case.child_log_probs[b, row, j].item(), case.parent_scores[b, row].item()
                log_prob = NOTHING if log_prob != log_prob else min(log_prob, 0.0)
                parent = NOTHING if parent != parent else parent
                has_room = case.kv_lens[b] + case.level + 1 < case.limits[b]
                expected.append(parent + log_prob if has_room else NOTHING)
        assert tokens == case.child_tokens[b].flatten().tolist(), f"request {b}"
        assert scores == expected, f"request {b}"
        assert parents == [case.parent_history[b, c // top] for c in range(rows * top)], f"request {b}"
        best = sorted(range(rows * top), key=lambda c: (-expected[c], c))[: case.count]
        assert frontier[0] == [tokens[c] for c in best], f"request {b}"
        assert frontier[1] == [expected[c] for c in best], f"request {b}"
        assert frontier[2] == [first + c for c in best], f"request {b}"
        assert frontier[3] == [c // top for c in best], f"request {b}"
        earlier = case.grown_mask[b].tolist()
        assert frontier[4][: len(earlier)] == earlier, f"request {b}"
        assert len(frontier[4]) == len(earlier) + case.count
        for rank, c in enumerate(best):
            inherited = bits(earlier[len(earlier) - rows + c // top]) if earlier else set()
            seen = bits(frontier[4][len(earlier) + rank])
            assert seen == inherited | {case.level * case.count + rank}, f"request {b}, rank {rank}"


SIZES = {"rows": st.integers(1, 7), "top": st.integers(1, 7), "level": st.integers(0, 9), "count": st.integers(1, 12)}


@settings(max_examples=60, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), **SIZES)
def test_reference_equals_lists(seed, rows, top, level, count):
    case = make_case(seed, rows, top, level, count)
    check_level(case, grow_frontier(*case.arguments()))


@settings(max_examples=40, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), **SIZES)
def test_triton_equals_lists(interpreted, seed, rows, top, level, count):
    case = make_case(seed, rows, top, level, count)
    check_level(case, interpreted(FILE, "grow_frontier_triton", *case.arguments()))


def both(interpreted, case):
    return grow_frontier(*case.arguments()), interpreted(FILE, "grow_frontier_triton", *case.arguments())


def test_eagles_sizes(interpreted):
    for case in (make_case(0, 10, 10, 6), make_case(1, 32, 32, 2), make_case(2, 1, 10, 0)):
        for result in both(interpreted, case):
            check_level(case, result)


def test_the_last_level_has_no_bit_left(interpreted):
    """Nodes of the last level are never run: the words hold K (D - 1) bits, and theirs lie past the end."""
    case = make_case(3, 4, 4, 8)
    case = replace(case, grown_mask=case.grown_mask[:, :, :1])
    for result in both(interpreted, case):
        inherited = case.grown_mask[:, -4:].gather(1, result[6].long()[:, :, None])
        assert torch.equal(result[7], torch.cat([case.grown_mask, inherited], 1))


def test_a_mask_of_no_words(interpreted):
    """D = 1: no node is ever run."""
    case = make_case(4, 1, 5, 0)
    for result in both(interpreted, replace(case, grown_mask=case.grown_mask[:, :, :0])):
        assert result[7].shape == (3, 5, 0)


def test_descendants_of_filler_are_filler(interpreted):
    case = replace(make_case(5, 3, 3, 1), parent_scores=torch.full((3, 3), NOTHING))
    for result in both(interpreted, case):
        assert bool((result[1] == NOTHING).all())
        assert result[5].tolist() == [[3, 4, 5]] * 3


def test_the_results_are_not_views_of_the_arguments():
    case = make_case(6, 1, 4, 0)
    result = grow_frontier(*case.arguments())
    result[0].fill_(-7)
    assert bool((case.child_tokens >= 0).all())


def nudged(log_probs: Tensor) -> Tensor:
    return log_probs.clamp(max=0.0) + 1e-3 * torch.arange(log_probs[0].numel()).reshape(log_probs.shape[1:])


PLANTED = {
    "wrong parent": lambda c: replace(c, parent_history=c.parent_history.roll(1, 1)),
    "mask without the parent's words": lambda c: replace(c, grown_mask=torch.zeros_like(c.grown_mask)),
    "words of rows of another level": lambda c: replace(c, grown_mask=c.grown_mask.roll(4, 1)),
    "own bit of another level": lambda c: replace(c, level=c.level + 1, limits=c.limits + 1),
    "scores are not accumulated": lambda c: replace(c, parent_scores=torch.zeros_like(c.parent_scores)),
    "one node past the limit": lambda c: replace(c, limits=c.limits + 1),
    "NaN counts as certain": lambda c: replace(c, child_log_probs=c.child_log_probs.nan_to_num(nan=0.0, neginf=NOTHING)),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug):
    case = make_case(7, 4, 4, 2)
    check_level(case, grow_frontier(*case.arguments()))
    *result, mask = grow_frontier(*PLANTED[bug](case).arguments())
    grown = case.grown_mask.shape[1]
    with pytest.raises(AssertionError):  # the copied rows are right: a bug in new rows alone is found
        check_level(case, (*result, torch.cat([case.grown_mask, mask[:, grown:]], 1)))


def test_earlier_rows_forgotten_are_caught():
    case = make_case(7, 4, 4, 2)
    *result, mask = grow_frontier(*case.arguments())
    mask[:, 0] = 0
    with pytest.raises(AssertionError):
        check_level(case, (*result, mask))


def test_ties_to_the_higher_index_are_caught():
    case = make_case(8, 4, 4, 2)
    right = grow_frontier(*case.arguments())
    wrong = grow_frontier(*replace(case, child_log_probs=nudged(case.child_log_probs)).arguments())
    with pytest.raises(AssertionError):
        check_level(case, (*right[:3], right[0].gather(1, wrong[5].long() - 20), right[4], *wrong[5:]))


def test_opcheck_and_trace():
    arguments = make_case(9, 3, 4, 1).arguments()
    opcheck(grow_frontier.op, tuple(arguments))
    traced = make_fx(lambda *args: grow_frontier.reference(*args, *arguments[7:]))(*arguments[:7])
    assert not list(traced.graph.find_nodes(op="get_attr"))


@pytest.mark.cuda
@pytest.mark.parametrize(("rows", "top", "level"), [(1, 10, 0), (10, 10, 1), (10, 10, 7), (32, 32, 3), (1, 1, 0), (3, 5, 2)])
def test_triton_on_the_gpu(cuda, rows, top, level):
    case = make_case(10, rows, top, level, batch=64)
    on_gpu = [x.to(cuda) if isinstance(x, Tensor) else x for x in case.arguments()]
    result = torch.ops.autospec_triton.grow_frontier(*on_gpu)
    check_level(case, tuple(x.cpu() for x in result))
    opcheck(torch.ops.autospec_triton.grow_frontier.default, tuple(on_gpu))
