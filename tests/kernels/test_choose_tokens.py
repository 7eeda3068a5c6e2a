"""Choosing tokens, against transformers' own processors run row by row on the history of each node."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.kernels.choose_tokens import choose_greedy, choose_tokens, mark_seen
from autospec.kernels.noise import gumbel

FILE = "autospec.kernels.choose_tokens"


ROOT = torch.tensor([[-1]], dtype=torch.int32)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of the op, in its order."""

    logits: Tensor
    draft_tokens: Tensor
    tree_parents: Tensor
    kv_lens: Tensor
    row_keys: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    seen: Tensor
    first_node: int = 0

    def arguments(self) -> list:
        return list(vars(self).values())


def make_case(seed, parents, vocab_size, options, *, first_node=0, rows=None) -> Case:
    """options: one tuple (temperature, top_k, top_p, min_p, penalty) per request."""
    g = torch.Generator().manual_seed(seed)
    batch, q_len = parents.shape
    temperature, top_k, top_p, min_p, penalty = map(torch.tensor, zip(*options, strict=True))
    return Case(
        logits=torch.randn(batch, rows or q_len - first_node, vocab_size, generator=g) * 4,
        draft_tokens=torch.randint(0, vocab_size, (batch, q_len), generator=g), tree_parents=parents,
        kv_lens=torch.randint(0, 1000, (batch,), generator=g).int(),
        row_keys=torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g),
        temperature=temperature.float(), top_k=top_k.int(), top_p=top_p.float(), min_p=min_p.float(),
        repetition_penalty=penalty.float(), seen=torch.rand(batch, vocab_size, generator=g) < 0.2,
        first_node=first_node,
    )


def path_of(parents: list[int], node: int) -> list[int]:
    """The node and its ancestors; only itself if it is absent."""
    path = [node]
    while path[-1] > 0 and parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path if path[-1] == 0 else [node]


def naive_scores(case: Case, b: int, row: int) -> Tensor:
    """What the choice maximises, from transformers' processors and the noise of the right index."""
    from transformers.generation import logits_process

    path = path_of(case.tree_parents[b].tolist(), case.first_node + row)
    history = case.seen[b].nonzero()[:, 0].tolist() + case.draft_tokens[b, path].tolist()
    scores, ids = case.logits[b, row][None].float(), torch.tensor([history])
    if case.repetition_penalty[b] != 1:
        scores = logits_process.RepetitionPenaltyLogitsProcessor(case.repetition_penalty[b].item())(ids, scores)
    if case.temperature[b] == 0:
        return scores[0]
    scores = scores / case.temperature[b]
    if 0 < case.top_k[b] < scores.shape[1]:
        scores = logits_process.TopKLogitsWarper(int(case.top_k[b]))(ids, scores)
    if case.top_p[b] < 1:
        scores = logits_process.TopPLogitsWarper(case.top_p[b].item())(ids, scores)
    if case.min_p[b] > 0:
        scores = logits_process.MinPLogitsWarper(case.min_p[b].item())(ids, scores)
    index = int(case.kv_lens[b]) + len(path)  # kv_len + depth + 1
    return scores[0] + gumbel(case.row_keys[b : b + 1], torch.tensor([[index]]), scores.shape[1])[0, 0]


def check_choice(case: Case, chosen: Tensor) -> None:
    """The chosen token has the best score; float32 noise may only decide between scores 1e-5 apart."""
    assert chosen.dtype == torch.int64
    assert chosen.shape == case.logits.shape[:2]
    for b in range(chosen.shape[0]):
        for row in range(chosen.shape[1]):
            scores = naive_scores(case, b, row)
            token, best = int(chosen[b, row]), int(scores.argmax())
            assert token == best or scores[best] - scores[token] < 1e-5, (
                f"request {b}, row {row}: chose {token} ({scores[token]}) where {best} has {scores[best]}"
            )


request = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 1.7]), st.sampled_from([0, 0, 1, 5, 40, 100000]),
    st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1]), st.sampled_from([0.0, 0.0, 0.05, 0.5]),
    st.sampled_from([1.0, 1.0, 1.3, 0.8]),
)


@settings(max_examples=40, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 12), vocab_size=st.sampled_from([1, 7, 500]),
       options=st.lists(request, min_size=3, max_size=3))
def test_reference_equals_transformers(random_parents, seed, q_len, vocab_size, options):
    parents = random_parents(torch.Generator().manual_seed(seed), 3, q_len)
    case = make_case(seed, parents, vocab_size, options, first_node=q_len // 3)
    check_choice(case, choose_tokens(*case.arguments()))


@settings(max_examples=8, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 3), vocab_size=st.sampled_from([1, 7, 500, 5000]),
       options=st.lists(request, min_size=3, max_size=3))
def test_triton_equals_transformers(random_parents, interpreted, seed, q_len, vocab_size, options):
    parents = random_parents(torch.Generator().manual_seed(seed), 3, q_len)
    case = make_case(seed, parents, vocab_size, options, first_node=q_len // 3)
    check_choice(case, interpreted(FILE, "choose_tokens_triton", *case.arguments()))


def both(interpreted, case):
    return choose_tokens(*case.arguments()), interpreted(FILE, "choose_tokens_triton", *case.arguments())


@pytest.mark.parametrize(("options", "expected"), [
    ((1.0, 2, 1.0, 0.0, 1.0), [0, 2, 5]),  # ties with the k-th best stay
    ((1.0, 0, 0.7, 0.0, 1.0), [0, 2, 5, 9]),  # of the ties at the edge of the mass the lowest ids go
    ((1.0, 4, 0.45, 0.0, 1.0), [2, 5]),  # the mass is what top-k left
    ((1.0, 0, 0.0, 0.0, 1.0), [5]),
    ((0.5, 0, 1.0, 0.9, 1.0), [0, 2, 5]),
])
def test_filters_and_ties(interpreted, options, expected):
    """Scores with many ties, sampled until every kept token has come up."""
    logits = torch.tensor([2.0, 1.0, 2.0, 0.0, 1.0, 2.0, 0.0, -1.0, float("-inf"), 1.0]).expand(300, 1, -1)
    case = replace(make_case(0, ROOT.expand(300, -1), 10, [options] * 300), logits=logits)
    chosen = choose_tokens(*case.arguments())
    assert chosen.unique().tolist() == expected
    few = [x[:12].contiguous() if isinstance(x, Tensor) else x for x in case.arguments()]
    assert torch.equal(interpreted(FILE, "choose_tokens_triton", *few), chosen[:12])


def test_minus_infinity_never_wins_and_ties_go_to_the_lowest_id(interpreted):
    case = make_case(1, ROOT, 5000, [(0.0, 0, 1.0, 0.0, 1.0)])
    logits = torch.full((1, 1, 5000), float("-inf"))
    logits[0, 0, [4999, 2047, 2048]] = 3.0
    for token in both(interpreted, replace(case, logits=logits)):
        assert token.item() == 2047
    logits[0, 0, [2047, 2048]] = float("-inf")
    for token in both(interpreted, replace(case, logits=logits, temperature=torch.tensor([1e4]))):
        assert token.item() == 4999
    for token in (choose_greedy(logits), interpreted(FILE, "choose_greedy_triton", logits)):
        assert token.item() == 4999


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_hopeless_row_still_gets_a_valid_id(interpreted, value):
    """A token id out of range is a device assert in the next embedding, which kills the context of every request."""
    case = replace(make_case(2, ROOT, 3000, [(0.7, 5, 0.9, 0.1, 1.1)]), logits=torch.full((1, 1, 3000), value))
    for token in (*both(interpreted, case), interpreted(FILE, "choose_greedy_triton", case.logits)):
        assert 0 <= token.item() < 3000


def test_history_of_a_node_is_its_ancestors_and_itself(interpreted):
    """Penalties reach tokens on the node's own path, not those of its siblings."""
    parents = torch.tensor([[-1, 0, 0, 1, -1]], dtype=torch.int32)
    case = make_case(3, parents, 10, [(0.0, 0, 1.0, 0.0, 1e6)])
    case = replace(case, draft_tokens=torch.tensor([[0, 1, 2, 3, 4]]), seen=torch.zeros(1, 10, dtype=torch.bool))
    logits = torch.zeros(1, 5, 10)
    logits[..., :5] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    for tokens in both(interpreted, replace(case, logits=logits)):
        assert tokens.tolist() == [[1, 2, 1, 2, 0]]


def test_drafter_invariance(interpreted):
    """The same logits at the same index give the same token, be the node in a chain, in a tree or alone."""
    options = [(1.2, 0, 0.9, 0.01, 1.2)]
    alone = make_case(4, ROOT, 500, options)
    chain = torch.arange(-1, 3, dtype=torch.int32)[None]
    tree = torch.tensor([[-1, 0, 0, 0, 2, 2, 4]], dtype=torch.int32)
    for parents, node in ((chain, 2), (tree, 4), (tree, 5)):
        wide = make_case(5, parents, 500, options)
        path = path_of(parents[0].tolist(), node)
        logits = wide.logits.clone()
        logits[0, node] = alone.logits[0, 0]
        wide = replace(wide, logits=logits, kv_lens=alone.kv_lens - (len(path) - 1), row_keys=alone.row_keys)
        seen = wide.seen.clone()
        seen[0, wide.draft_tokens[0, path]] = True
        single = replace(alone, seen=seen, draft_tokens=wide.draft_tokens[:, node : node + 1])
        for one, other in zip(both(interpreted, single), both(interpreted, wide), strict=True):
            assert one[0, 0] == other[0, node]


def test_padded_logits_rows_are_read_by_stride(interpreted):
    case = make_case(6, torch.tensor([[-1, 0, 1]], dtype=torch.int32), 700, [(0.9, 0, 1.0, 0.0, 1.0)])
    padded = torch.full((1, 3, 800), 99.0)
    padded[..., :700] = case.logits
    case = replace(case, logits=padded[..., :700])
    for tokens in both(interpreted, case):
        check_choice(case, tokens)


@settings(max_examples=15, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), vocab_size=st.sampled_from([1, 9, 2048, 2049, 6000]),
       step=st.sampled_from([0.0, 0.5]))
def test_greedy_equals_argmax(interpreted, seed, vocab_size, step):
    logits = torch.randn(2, 3, vocab_size, generator=torch.Generator().manual_seed(seed))
    if step:
        logits = (logits / step).round() * step  # many ties
    for dtype in (torch.float32, torch.float16):
        values = logits.to(dtype)
        first = (values == values.amax(-1, keepdim=True)).float().argmax(-1)
        assert torch.equal(choose_greedy(values), first)
        assert torch.equal(interpreted(FILE, "choose_greedy_triton", values), first)


def test_mark_seen():
    seen = torch.zeros(2, 6, dtype=torch.bool)
    seen[0, 5] = True
    mark_seen(seen, torch.tensor([[3, -1, 3], [-1, -1, -1]]))
    assert seen.tolist() == [[False, False, False, True, False, True], [False] * 6]


PLANTED = {
    "noise of the next index": lambda c: replace(c, kv_lens=c.kv_lens + 1),
    "noise of another row": lambda c: replace(c, row_keys=c.row_keys.flip(0)),
    "siblings in the history": lambda c: replace(c, tree_parents=torch.arange(-1, 5, dtype=torch.int32).expand(2, -1)),
    "history without ancestors": lambda c: replace(c, draft_tokens=torch.zeros_like(c.draft_tokens)),
    "no temperature": lambda c: replace(c, temperature=torch.ones(2)),
    "top-k off": lambda c: replace(c, top_k=torch.zeros(2).int()),
    "top-p off": lambda c: replace(c, top_p=torch.ones(2)),
    "rows shifted by one": lambda c: replace(c, first_node=1),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug):
    """Sixty vocabularies of logits, so that each bug changes some choice."""
    parents = torch.tensor([[-1, 0, 0, 0, 1, 1]], dtype=torch.int32).expand(2, -1)
    caught = 0
    for seed in range(12):
        case = make_case(seed, parents, 40, [(1.4, 12, 0.8, 0.0, 3.0)] * 2, rows=5)
        check_choice(case, choose_tokens(*case.arguments()))
        try:
            check_choice(case, choose_tokens(*PLANTED[bug](case).arguments()))
        except AssertionError:
            caught += 1
    assert caught > 0


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [(0.0, 0, 1.0, 0.0, 1.2), (0.8, 0, 1.0, 0.0, 1.0), (1.0, 50, 0.9, 0.05, 1.1)])
def test_triton_on_the_gpu(random_parents, cuda, dtype, options):
    parents = random_parents(torch.Generator().manual_seed(7), 3, 20)
    case = make_case(8, parents, 128256, [options] * 3, rows=4, first_node=5)
    case = replace(case, logits=case.logits.to(dtype))
    on_gpu = [x.to(cuda) if isinstance(x, Tensor) else x for x in case.arguments()]
    check_choice(case, torch.ops.autospec_triton.choose_tokens(*on_gpu).cpu())
    greedy = torch.ops.autospec_triton.choose_greedy(on_gpu[0])
    assert torch.equal(greedy.cpu(), choose_greedy(case.logits))
