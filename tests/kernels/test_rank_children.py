"""The best children: greedy against Python lists, sampled against transformers' processors and the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from autospec.kernels.choose_tokens import choose_greedy, choose_tokens
from autospec.kernels.noise import gumbel
from autospec.kernels.rank_children import PART, rank_greedy, rank_sampled

FILE = "autospec.kernels.rank_children"
NOTHING = float("-inf")


def random_map(generator: torch.Generator, draft_vocab: int, vocab_size: int) -> Tensor:
    """Offsets of an injective map, in no order."""
    return torch.randperm(vocab_size, generator=generator)[:draft_vocab] - torch.arange(draft_vocab)


def log_softmax(z: list[float]) -> list[float]:
    """In float64; nothing is possible in a row with NaN or without a finite score."""
    top = max(z)
    if any(x != x for x in z) or math.isinf(top):
        return [NOTHING] * len(z)
    total = top + math.log(sum(math.exp(x - top) for x in z))
    return [min(x - total, 0.0) for x in z]


def check_greedy(logits, count, draft_temperature, d2t, tokens, log_probs) -> None:
    """Tokens exactly, log-probabilities to 1e-5."""
    assert tokens.dtype == torch.int64
    assert log_probs.dtype == torch.float32
    assert tokens.shape == log_probs.shape == (*logits.shape[:2], count)
    scores = (logits.float() / draft_temperature).flatten(0, 1).tolist()
    for row, z in enumerate(scores):
        comparable = [NOTHING if x != x else x for x in z]
        best = sorted(range(len(z)), key=lambda i: (-comparable[i], i))[:count]
        targets = [i if d2t is None else i + int(d2t[i]) for i in best]
        assert tokens.flatten(0, 1)[row].tolist() == targets, f"row {row}"
        exact = log_softmax(z)
        for mine, i in zip(log_probs.flatten(0, 1)[row].tolist(), best, strict=True):
            assert mine <= 0.0
            assert mine == exact[i] or abs(mine - exact[i]) < 1e-5 * (1 + abs(exact[i])), f"row {row}"


def greedy_case(seed: int, vocab_size: int, step: float, dtype: torch.dtype, is_mapped: bool):
    """Logits in steps, so that there are ties; a row of -inf, a row with NaN, a row with few possible tokens."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 3, vocab_size, generator=g) * 3
    logits = (logits / step).round() * step
    logits[0, 1] = NOTHING
    logits[1, 1, int(torch.randint(0, vocab_size, (), generator=g))] = float("nan")
    logits[2, 1, torch.rand(vocab_size, generator=g) < 0.9] = NOTHING
    d2t = random_map(g, vocab_size, 2 * vocab_size) if is_mapped else None
    return logits.to(dtype), d2t


GREEDY = {
    "seed": st.integers(0, 2**32 - 1), "vocab_size": st.sampled_from([1, 7, 256, 700, 2500]),
    "step": st.sampled_from([1.0, 0.25]), "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    "count": st.integers(1, 12), "draft_temperature": st.sampled_from([1.0, 0.5, 1.3]), "is_mapped": st.booleans(),
}


@settings(max_examples=40, deadline=None, print_blob=True)
@given(**GREEDY)
def test_greedy_equals_lists(seed, vocab_size, step, dtype, count, draft_temperature, is_mapped):
    logits, d2t = greedy_case(seed, vocab_size, step, dtype, is_mapped)
    args = logits, min(count, vocab_size), draft_temperature, d2t
    check_greedy(*args, *rank_greedy(*args))


@settings(max_examples=25, deadline=None, print_blob=True)
@given(**GREEDY)
def test_triton_greedy_equals_lists(interpreted, seed, vocab_size, step, dtype, count, draft_temperature, is_mapped):
    logits, d2t = greedy_case(seed, vocab_size, step, dtype, is_mapped)
    args = logits, min(count, vocab_size), draft_temperature, d2t
    check_greedy(*args, *interpreted(FILE, "rank_greedy_triton", *args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [
    range(256, 266), range(502, 512), [0, 255, 256, 511, 512, 1023, 1024, 2047, 2048, 2999],
    range(0, 16 * PART, PART), [5, 1029, 2053, 3077, 3078],
])  # fmt: skip
def test_the_best_may_lie_anywhere(interpreted, ids, dtype):
    """In one group of ids, at its two ends, across the edges of groups, at one place of every part or quarter; equal, rising."""
    for rise in (0.0, 0.25):
        logits = torch.zeros(1, 1, 4096)
        logits[0, 0, list(ids)] = 5.0 + rise * torch.arange(len(ids))
        for tokens, _ in both_greedy(interpreted, logits.to(dtype), len(ids)):
            assert tokens[0, 0].tolist() == sorted(ids, reverse=rise > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_of_several_parts_go_to_the_lowest_id(interpreted, dtype):
    """Parts are read in the order of their best scores, here the last one first; what ties lies further down."""
    logits = torch.zeros(1, 1, 4096)
    tops = torch.arange(5) * PART
    logits[0, 0, tops] = 10.0 + torch.arange(5)
    logits[0, 0, tops + 3] = 5.0
    for tokens, _ in both_greedy(interpreted, logits.to(dtype), 10):
        assert tokens[0, 0].tolist() == [*tops.flip(0).tolist(), *(tops + 3).tolist()]


def test_the_sum_over_many_groups(interpreted):
    logits, _ = greedy_case(12, 20000, 0.25, torch.bfloat16, False)
    for result in both_greedy(interpreted, logits[2:], 10):
        check_greedy(logits[2:], 10, 1.0, None, *result)


@pytest.mark.parametrize("count", [1, 10])
def test_bfloat16_beside_its_position_ranks_like_float32(interpreted, count):
    """The same bits: infinities, NaN, zeros of both signs and a row without a positive number among them."""
    logits, d2t = greedy_case(11, 2500, 0.25, torch.bfloat16, True)
    logits[0, 2, 7] = float("inf")
    logits[1, 2] = torch.where(logits[1, 2] > 0, 0.0, -0.0)
    logits[2, 2] = -logits[2, 2].abs() - 1e-30
    narrow, wide = (interpreted(FILE, "rank_greedy_triton", x, count, 1.0, d2t) for x in (logits, logits.float()))
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[0], rank_greedy(logits, count, 1.0, d2t)[0])
    assert torch.equal(narrow[1].view(torch.int32), wide[1].view(torch.int32))


def both_greedy(interpreted, *args):
    return rank_greedy(*args), interpreted(FILE, "rank_greedy_triton", *args)


def test_padded_logits_rows_are_read_by_stride(interpreted):
    padded = torch.randn(2, 3, 800, generator=torch.Generator().manual_seed(0))
    padded[..., 700:] = 99.0
    for result in both_greedy(interpreted, padded[..., :700], 5):
        check_greedy(padded[..., :700], 5, 1.0, None, *result)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of the sampled op, in its order."""

    logits: Tensor
    index: Tensor
    row_keys: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    seen: Tensor
    path_tokens: Tensor
    count: int
    draft_temperature: float = 1.0
    d2t: Tensor | None = None

    def arguments(self) -> list:
        return list(vars(self).values())


def make_case(seed, rows, length, vocab_size, options, *, count=6, draft_temperature=1.0, is_mapped=False) -> Case:
    """options: one tuple (temperature, top_k, top_p, min_p, penalty) per request."""
    g = torch.Generator().manual_seed(seed)
    batch, target_vocab = len(options), vocab_size * (3 if is_mapped else 1)
    temperature, top_k, top_p, min_p, penalty = map(torch.tensor, zip(*options, strict=True))
    return Case(
        logits=torch.randn(batch, rows, vocab_size, generator=g) * 4,
        index=torch.randint(1, 1000, (batch,), generator=g),
        row_keys=torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g),
        temperature=temperature.float(), top_k=top_k.int(), top_p=top_p.float(), min_p=min_p.float(),
        repetition_penalty=penalty.float(), seen=torch.rand(batch, target_vocab, generator=g) < 0.2,
        path_tokens=torch.randint(-1, target_vocab, (batch, rows, length), generator=g),
        count=min(count, vocab_size), draft_temperature=draft_temperature,
        d2t=random_map(g, vocab_size, target_vocab) if is_mapped else None,
    )


def naive_scores(case: Case, b: int, row: int) -> tuple[Tensor, Tensor]:
    """What ranks the draft ids of a row, and z: from transformers' processors and the noise of the target ids."""
    from transformers.generation import logits_process

    scores = case.logits[b, row][None].float()
    targets = torch.arange(scores.shape[1]) + (0 if case.d2t is None else case.d2t)
    history = set(case.seen[b].nonzero()[:, 0].tolist()) | set(case.path_tokens[b, row].tolist())
    ids = torch.tensor([[i for i, target in enumerate(targets.tolist()) if target in history]], dtype=torch.int64)
    temperature, divisor = case.temperature[b], case.draft_temperature
    if case.repetition_penalty[b] != 1 and ids.numel():
        scores = logits_process.RepetitionPenaltyLogitsProcessor(case.repetition_penalty[b].item())(ids, scores)
    if temperature == 0:
        return scores[0] / divisor, scores[0] / divisor
    scores = scores / temperature
    if 0 < case.top_k[b] < scores.shape[1]:
        scores = logits_process.TopKLogitsWarper(int(case.top_k[b]))(ids, scores)
    if case.top_p[b] < 1:
        scores = logits_process.TopPLogitsWarper(case.top_p[b].item())(ids, scores)
    if case.min_p[b] > 0:
        scores = logits_process.MinPLogitsWarper(case.min_p[b].item())(ids, scores)
    noise = gumbel(case.row_keys[b : b + 1], case.index[b : b + 1, None], case.seen.shape[1])[0, 0, targets]
    ranked = scores[0] / divisor + noise
    return ranked, ranked * temperature


def check_children(case: Case, tokens: Tensor, log_probs: Tensor) -> None:
    """The best in their order; float32 noise may only swap scores 1e-5 apart."""
    assert tokens.dtype == torch.int64
    assert log_probs.dtype == torch.float32
    assert tokens.shape == log_probs.shape == (*case.logits.shape[:2], case.count)
    offsets = torch.zeros(case.logits.shape[-1], dtype=torch.int64) if case.d2t is None else case.d2t
    draft_id = {int(target): i for i, target in enumerate(torch.arange(len(offsets)) + offsets)}
    for b in range(tokens.shape[0]):
        for row in range(tokens.shape[1]):
            ranked, z = naive_scores(case, b, row)
            exact = z.double().log_softmax(0)
            chosen = [draft_id[token] for token in tokens[b, row].tolist()]
            assert len(set(chosen)) == case.count
            best = ranked.sort(descending=True, stable=True)
            for j, i in enumerate(chosen):
                place = f"request {b}, row {row}, child {j}: {i} ({ranked[i]}), not {best[1][j]} ({best[0][j]})"
                assert i == best[1][j] or abs(ranked[i] - best[0][j]) < 1e-5 or ranked[i] == best[0][j], place
                mine, expected = float(log_probs[b, row, j]), float(exact[i])
                assert mine <= 0.0
                assert mine == expected or abs(mine - expected) < 1e-4, f"{place}: {mine}, not {expected}"


def check_like_reference(case: Case, tokens: Tensor, log_probs: Tensor) -> None:
    """For 16-bit logits: of equal scores at the edge of the nucleus transformers drops any, and we the lowest ids."""
    expected, exact = rank_sampled(*case.arguments())
    assert torch.allclose(log_probs, exact, rtol=0, atol=1e-4)
    assert int(((tokens != expected) & (exact > NOTHING)).sum()) <= 2, "two neighbours may be swapped by rounding"


request = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 1.7]), st.sampled_from([0, 0, 1, 5, 40, 100000]),
    st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1]), st.sampled_from([0.0, 0.0, 0.05, 0.5]),
    st.sampled_from([1.0, 1.0, 1.3, 0.8]),
)
SAMPLED = {
    "seed": st.integers(0, 2**32 - 1), "rows": st.integers(1, 4), "length": st.integers(0, 3),
    "vocab_size": st.sampled_from([1, 7, 300, 600]), "options": st.lists(request, min_size=2, max_size=2),
    "draft_temperature": st.sampled_from([1.0, 1.0, 0.7]), "is_mapped": st.booleans(),
}


@settings(max_examples=40, deadline=None, print_blob=True)
@given(**SAMPLED)
def test_sampled_equals_transformers(seed, rows, length, vocab_size, options, draft_temperature, is_mapped):
    case = make_case(
        seed, rows, length, vocab_size, options, draft_temperature=draft_temperature, is_mapped=is_mapped
    )
    check_children(case, *rank_sampled(*case.arguments()))


@settings(max_examples=20, deadline=None, print_blob=True)
@given(**SAMPLED)
def test_triton_sampled_equals_transformers(
    interpreted, seed, rows, length, vocab_size, options, draft_temperature, is_mapped
):
    case = make_case(
        seed, rows, length, vocab_size, options, draft_temperature=draft_temperature, is_mapped=is_mapped
    )
    check_children(case, *interpreted(FILE, "rank_sampled_triton", *case.arguments()))


def both(interpreted, case):
    return rank_sampled(*case.arguments()), interpreted(FILE, "rank_sampled_triton", *case.arguments())


@pytest.mark.parametrize("options", [
    (0.0, 0, 1.0, 0.0, 1.0), (0.0, 0, 1.0, 0.0, 1.4), (0.7, 0, 1.0, 0.0, 1.0), (1.3, 20, 0.8, 0.02, 1.3),
])
def test_a_draft_equal_to_the_target_ranks_the_targets_choice_first(interpreted, options):
    """The nodes 3, 4 and 5 of a tree, whose grandparent is the root: the same logits, history and index."""
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2]] * 2, dtype=torch.int32)
    for seed in range(4):
        case = make_case(seed, 3, 2, 500, [options] * 2)
        draft = torch.randint(0, 500, (2, 6), generator=torch.Generator().manual_seed(seed))
        case = replace(case, path_tokens=draft[:, [[1, 3], [1, 4], [2, 5]]])
        target = choose_tokens(
            case.logits, draft, parents, (case.index - 3).int(), case.row_keys, case.temperature, case.top_k,
            case.top_p, case.min_p, case.repetition_penalty, case.seen, 3,
        )
        for tokens, _ in both(interpreted, case):
            assert torch.equal(tokens[..., 0], target)
    assert torch.equal(rank_greedy(case.logits, 3)[0][..., 0], choose_greedy(case.logits))


def test_few_possible_tokens(interpreted):
    """top-k 2 leaves two of six children; the rest are filler with valid ids."""
    case = make_case(1, 2, 1, 300, [(0.9, 2, 1.0, 0.0, 1.0)], is_mapped=True)
    for tokens, log_probs in both(interpreted, case):
        assert (log_probs > NOTHING).sum(-1).tolist() == [[2, 2]]
        check_children(case, tokens, log_probs)


@pytest.mark.parametrize("value", [float("nan"), NOTHING, float("inf")])
@pytest.mark.parametrize("options", [(0.0, 0, 1.0, 0.0, 1.0), (0.7, 0, 1.0, 0.0, 1.1), (0.7, 5, 0.9, 0.1, 1.0)])
def test_a_hopeless_row_still_gets_valid_ids(interpreted, value, options):
    """An id out of range is a device assert in the next embedding, which kills the context of every request."""
    case = make_case(2, 2, 1, 3000, [options])
    for tokens, log_probs in both(interpreted, replace(case, logits=torch.full_like(case.logits, value))):
        assert bool(((tokens >= 0) & (tokens < 3000)).all())
        assert bool((log_probs == NOTHING).all())


def test_a_token_that_is_nan_spoils_its_row_only(interpreted):
    for options in ((0.7, 0, 1.0, 0.0, 1.0), (0.7, 50, 0.9, 0.0, 1.0)):
        case = make_case(3, 2, 1, 700, [options])
        logits = case.logits.clone()
        logits[0, 0, 300] = float("nan")
        for _, log_probs in both(interpreted, replace(case, logits=logits)):
            assert bool((log_probs[0, 0] == NOTHING).all())
            assert bool((log_probs[0, 1, 0] > NOTHING).all())


def test_a_wider_draft_of_an_unmapped_vocabulary(interpreted):
    """The target's logits may be padded further than the draft's: ids are equal where both have them."""
    case = make_case(4, 2, 2, 400, [(0.8, 0, 1.0, 0.0, 1.3)])
    seen = torch.cat([case.seen, torch.ones(1, 56, dtype=torch.bool)], 1)
    for mine, other in zip(both(interpreted, replace(case, seen=seen)), both(interpreted, case), strict=True):
        assert torch.equal(mine[0], other[0])


PLANTED = {
    "noise of the next index": lambda c: replace(c, index=c.index + 1),
    "noise of another row": lambda c: replace(c, row_keys=c.row_keys.flip(0)),
    "noise of draft ids": lambda c: replace(c, d2t=None),
    "siblings in the history": lambda c: replace(c, path_tokens=c.path_tokens.flip(1)),
    "history without the path": lambda c: replace(c, path_tokens=torch.full_like(c.path_tokens, -1)),
    "no temperature": lambda c: replace(c, temperature=torch.ones(2)),
    "no draft temperature": lambda c: replace(c, draft_temperature=1.0),
    "top-k off": lambda c: replace(c, top_k=torch.zeros(2).int()),
    "top-p off": lambda c: replace(c, top_p=torch.ones(2)),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug):
    caught = 0
    for seed in range(6):
        case = make_case(seed, 3, 4, 40, [(1.4, 12, 0.8, 0.0, 3.0)] * 2, draft_temperature=0.8, is_mapped=True)
        check_children(case, *rank_sampled(*case.arguments()))
        try:
            check_children(case, *rank_sampled(*PLANTED[bug](case).arguments()))
        except (AssertionError, KeyError):
            caught += 1
    assert caught > 0


@pytest.mark.parametrize("bug", ["ties to the highest id", "ids of the draft", "log-probabilities of another row"])
def test_planted_greedy_bugs_are_caught(bug):
    logits, d2t = greedy_case(5, 60, 1.0, torch.float32, True)
    tokens, log_probs = rank_greedy(logits, 8, 1.0, d2t)
    check_greedy(logits, 8, 1.0, d2t, tokens, log_probs)
    if bug == "ties to the highest id":
        tokens = rank_greedy(logits + 1e-4 * torch.arange(60), 8, 1.0, d2t)[0]
    elif bug == "ids of the draft":
        tokens = rank_greedy(logits, 8)[0]
    else:
        log_probs = log_probs.roll(1, 1)
    with pytest.raises(AssertionError):
        check_greedy(logits, 8, 1.0, d2t, tokens, log_probs)


@pytest.mark.parametrize("is_mapped", [False, True])
def test_opcheck_and_trace(is_mapped):
    case = make_case(6, 3, 2, 50, [(0.0, 0, 1.0, 0.0, 1.0), (0.8, 9, 0.9, 0.1, 1.3)], is_mapped=is_mapped)
    opcheck(rank_sampled.op, tuple(case.arguments()))
    opcheck(rank_greedy.op, (case.logits, 4, 0.9, case.d2t))
    arguments = case.arguments()
    traced = make_fx(lambda *args: rank_sampled.reference(*args, *arguments[10:12], case.d2t))(*arguments[:10])
    names = {str(node.target) for node in traced.graph.find_nodes(op="get_attr")}
    assert len(names) == (1 if is_mapped else 0)  # d2t, which the lambda closes over
    traced = make_fx(lambda logits: rank_greedy.reference(logits, 4))(case.logits)
    assert not list(traced.graph.find_nodes(op="get_attr"))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_greedy_on_the_gpu(cuda, dtype, is_mapped):
    logits, d2t = greedy_case(9, 32000, 0.25, dtype, is_mapped)
    for count, draft_temperature in ((1, 1.0), (10, 1.3), (32, 1.0)):
        args = logits, count, draft_temperature, d2t
        on_gpu = [x.to(cuda) if isinstance(x, Tensor) else x for x in args]
        check_greedy(*args, *(x.cpu() for x in torch.ops.autospec_triton.rank_greedy(*on_gpu)))
    opcheck(torch.ops.autospec_triton.rank_greedy.default, tuple(on_gpu))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [(0.0, 0, 1.0, 0.0, 1.2), (0.8, 0, 1.0, 0.0, 1.0), (1.0, 50, 0.9, 0.05, 1.1)])
@pytest.mark.parametrize(("vocab_size", "is_mapped"), [(128256, False), (32000, True)])
def test_sampled_on_the_gpu(cuda, dtype, options, vocab_size, is_mapped):
    case = make_case(10, 3, 4, vocab_size, [options] * 2, count=10, is_mapped=is_mapped)
    case = replace(case, logits=case.logits.to(dtype))
    on_gpu = [x.to(cuda) if isinstance(x, Tensor) else x for x in case.arguments()]
    check_like_reference(case, *(x.cpu() for x in torch.ops.autospec_triton.rank_sampled(*on_gpu)))
    first = torch.ops.autospec_triton.choose_tokens(
        on_gpu[0], torch.zeros(2, 3, dtype=torch.int64, device=cuda),
        torch.full((2, 3), -1, dtype=torch.int32, device=cuda), on_gpu[1].int() - 1, *on_gpu[2:7],
        torch.ones(2, device=cuda), on_gpu[8][:, :vocab_size],
    )
    unpenalized = [*on_gpu[:7], torch.ones(2, device=cuda), *on_gpu[8:12], None]
    assert torch.equal(torch.ops.autospec_triton.rank_sampled(*unpenalized)[0][..., 0], first)
