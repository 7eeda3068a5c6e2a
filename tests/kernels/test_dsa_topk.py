"""The selection against a sort of every row's visible slots: ties, short rows, padding rows, any length, trees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.kernels.dsa_topk import choose_splits, dsa_topk, dsa_topk_triton, why_not_triton
from autospec.kernels.tree_tables import tree_tables

FILE = "autospec.kernels.dsa_topk"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of the op; parents of its tree (None: a chain), whose last nodes are the rows."""

    logits: Tensor
    kv_lens: Tensor
    index_topk: int
    q_lens: Tensor | None = None
    parents: Tensor | None = None

    def arguments(self) -> list:
        tree_mask = None if self.parents is None else tree_tables(self.parents)[0]
        return [self.logits, self.kv_lens, self.index_topk, self.q_lens, tree_mask]


def visible(case: Case, b: int, n: int) -> list[int]:
    """The slots that a row sees, ascending."""
    q_len, num_slots = case.logits.shape[1:]
    kv_len = int(case.kv_lens[b])
    if case.q_lens is not None and n >= case.q_lens[b]:
        return []
    if case.parents is None:
        nodes = list(range(n + 1))
    else:
        nodes = [case.parents.shape[1] - q_len + n]
        while (parent := int(case.parents[b, nodes[0]])) >= 0:
            nodes = [parent, *nodes]
        nodes = nodes if nodes[0] == 0 else nodes[-1:]  # an absent node sees itself
    slots = [*range(kv_len), *(kv_len + node for node in nodes)]
    return [slot for slot in slots if slot < num_slots]


def expected(case: Case) -> Tensor:
    batch, q_len, num_slots = case.logits.shape
    width = min(case.index_topk, num_slots)
    rows = []
    for b in range(batch):
        for n in range(q_len):
            slots = visible(case, b, n)
            if len(slots) > case.index_topk:
                best = sorted(slots, key=lambda slot: (-float(case.logits[b, n, slot]), slot))
                slots = sorted(best[: case.index_topk])
            rows.append(slots + [-1] * (width - len(slots)))
    return torch.tensor(rows, dtype=torch.int32).reshape(batch, q_len, width)


def poisoned(case: Case) -> Case:
    """NaN where nothing may look: invisible slots, and all of a request whose slots are kept anyway."""
    logits = case.logits.clone()
    batch, q_len, _ = logits.shape
    earlier = 0 if case.parents is None else case.parents.shape[1] - q_len
    for b in range(batch):
        for n in range(q_len):
            hidden = torch.ones(logits.shape[2], dtype=torch.bool)
            if int(case.kv_lens[b]) + earlier + q_len > case.index_topk:
                hidden[visible(case, b, n)] = False
            logits[b, n, hidden] = float("nan")
    return replace(case, logits=logits)


def make_case(g, parents, *, late=0, num_slots=70, index_topk=9, kinds=0, **options) -> Case:
    """parents is tree_parents [B, T], or (B, N) for chains; late: earlier nodes of the tree; kinds: different scores."""
    batch, count = parents.shape if isinstance(parents, Tensor) else parents
    late = min(late, count - 1) if isinstance(parents, Tensor) else 0
    logits = torch.randn(batch, count - late, num_slots, generator=g)
    if kinds:
        values = torch.tensor([0.0, -0.0, 1.5, -2.0, 1e-40, -1e30])[:kinds]
        logits = values[torch.randint(0, kinds, logits.shape, generator=g)]
    kv_lens = torch.randint(0, num_slots + 4, (batch,), generator=g).int()
    return Case(logits=logits, kv_lens=kv_lens, index_topk=index_topk,
                parents=parents if isinstance(parents, Tensor) else None, **options)


cases = st.fixed_dictionaries({
    "num_slots": st.integers(1, 90), "index_topk": st.one_of(st.integers(1, 12), st.integers(1, 100)),
    "kinds": st.integers(0, 6), "late": st.sampled_from([0, 0, 3]),
})  # fmt: skip


def drawn(random_parents, seed, q_len, is_tree, has_padding, options) -> Case:
    g = torch.Generator().manual_seed(seed)
    case = make_case(g, random_parents(g, 2, q_len) if is_tree else (2, q_len), **options)
    if has_padding:
        case = replace(case, q_lens=torch.randint(0, q_len + 1, (2,), generator=g).int())
    return poisoned(case)


@settings(max_examples=60, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 40), is_tree=st.booleans(), has_padding=st.booleans(), options=cases)
def test_reference_equals_a_sort(random_parents, seed, q_len, is_tree, has_padding, options):
    case = drawn(random_parents, seed, q_len, is_tree, has_padding, options)
    assert torch.equal(dsa_topk(*case.arguments()), expected(case))


@settings(max_examples=9, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.sampled_from([1, 2, 3]), is_tree=st.booleans(), has_padding=st.booleans(),
       options=cases, splits=st.sampled_from([1, 2, 4]))
def test_triton_equals_a_sort(random_parents, interpreted, seed, q_len, is_tree, has_padding, options, splits):
    case = drawn(random_parents, seed, q_len, is_tree, has_padding, options)
    assert torch.equal(interpreted(FILE, "select_slots", *case.arguments(), splits, 16), expected(case))
    assert torch.equal(interpreted(FILE, "select_rows", *case.arguments()), expected(case))


def both(interpreted, case):
    yield dsa_topk(*case.arguments())
    yield interpreted(FILE, "dsa_topk_triton", *case.arguments())
    yield interpreted(FILE, "select_slots", *case.arguments(), 2, 16)


def test_nodes_of_a_tree_past_its_first_mask_word(random_parents, interpreted):
    g = torch.Generator().manual_seed(5)
    case = make_case(g, random_parents(g, 1, 40), late=38, num_slots=90, index_topk=11)
    for kv_len in (0, 50, 80):
        case = replace(case, kv_lens=torch.tensor([kv_len]).int())
        for out in both(interpreted, poisoned(case)):
            assert torch.equal(out, expected(case))


def test_ties_go_to_the_lowest_slots(interpreted):
    """All equal, both zeros among them."""
    logits = torch.zeros(1, 2, 64)
    logits[..., ::3] = -0.0
    logits[0, 0, 60] = 1.0
    case = Case(logits=logits, kv_lens=torch.tensor([61]).int(), index_topk=4)
    for out in both(interpreted, case):
        assert out.tolist() == [[[0, 1, 2, 60], [0, 1, 2, 3]]]


def test_wide_equals_narrow_and_a_chain_is_a_tree(interpreted):
    chain = make_case(torch.Generator().manual_seed(7), (2, 3), num_slots=80)
    chain = replace(chain, kv_lens=torch.tensor([3, 66]).int())
    tree = replace(chain, parents=torch.arange(-1, 2, dtype=torch.int32).expand(2, -1))
    for out, as_tree in zip(both(interpreted, chain), both(interpreted, tree), strict=True):
        assert torch.equal(out, as_tree)
        for n in range(3):
            narrow = replace(chain, logits=chain.logits[:, n : n + 1], kv_lens=chain.kv_lens + n)
            assert torch.equal(out[:, n : n + 1], dsa_topk(*narrow.arguments()))


PLANTED = {
    "kv_lens counted after the append": lambda c: replace(c, kv_lens=c.kv_lens + c.logits.shape[1]),
    "a row does not see itself": lambda c: replace(c, kv_lens=c.kv_lens - 1),
    "siblings visible": lambda c: replace(c, parents=None),
    "one too few": lambda c: replace(c, index_topk=c.index_topk - 1),
    "rows shifted by one": lambda c: replace(c, logits=c.logits.roll(1, 1)),
    "the lowest scores": lambda c: replace(c, logits=-c.logits),
    "padding selects": lambda c: replace(c, q_lens=None),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug):
    parents = torch.tensor([[-1, 0, 0, 1, 3]], dtype=torch.int32)
    logits = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(8))
    logits[..., 40:] += 3.0  # new rows score well, as they do in models
    case = Case(logits=logits, kv_lens=torch.tensor([40]).int(), index_topk=7, q_lens=torch.tensor([4]).int(), parents=parents)
    assert torch.equal(dsa_topk(*case.arguments()), expected(case))
    assert not torch.equal(dsa_topk(*PLANTED[bug](case).arguments()), expected(case))


def test_splits_follow_from_shapes():
    assert choose_splits(torch.zeros(1, 1, 2048)) == 1
    assert choose_splits(torch.zeros(1, 1, 65536)) == 4  # four multiprocessors where there is no GPU
    assert choose_splits(torch.zeros(2, 2, 65536)) == 1


def test_why_not_triton():
    case = Case(logits=torch.zeros(1, 1, 8), kv_lens=torch.tensor([3]).int(), index_topk=2)
    assert "cpu" in why_not_triton(dsa_topk.bind(case.arguments(), {}))
    assert "bfloat16" in why_not_triton(dsa_topk.bind(replace(case, logits=case.logits.bfloat16()).arguments(), {}))


@pytest.mark.cuda
@pytest.mark.parametrize("q_len", [1, 4, 300])
@pytest.mark.parametrize("num_slots", [4160, 8256, 40960])
def test_on_a_gpu(cuda, q_len, num_slots):
    logits = torch.randn(2, q_len, num_slots, device=cuda).mul(8).round()  # ties
    for lens in ([100, 2040], [2047, 2100], [num_slots - 960, num_slots - 1]):
        kv_lens = torch.tensor(lens, device=cuda, dtype=torch.int32)
        assert torch.equal(dsa_topk_triton(logits, kv_lens, 2048), dsa_topk.reference(logits, kv_lens, 2048))
