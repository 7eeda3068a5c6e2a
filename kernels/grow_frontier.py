"""One level of a dynamic tree: the children of the frontier's rows enter the history, the best become the next frontier.

A child's score is its parent's plus its conditional log-probability: float32, clamped to <= 0, NaN turned into -inf
before it is added, ties to the lower candidate. So no child beats its parent, and the best of the whole history are
closed under ancestors. Candidates at -inf are filler: they keep their places, and the tree has no node for them.
A row of the frontier sees, beside the committed slots, its ancestors' rows and itself: its parent's words OR its own
bit. The frontier's rows go behind those of earlier levels, which are copied: the drafter attends with all of them, and to
concatenate them was a launch of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autospec.kernels.filters import ordered
from autospec.kernels.launch import can_wait, gdc_launch_dependents, gdc_wait, jit, no_gpu, power_of_2, tl, wrap_triton
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure


def first_candidate(level: int, children: int) -> int:
    """The history's id of a level's first candidate: K at level 0, then K^2 a level."""
    return 0 if level == 0 else children + (level - 1) * children * children


@kernel_op()
def grow_frontier(
    child_tokens: Tensor, child_log_probs: Tensor, parent_scores: Tensor, parent_history: Tensor, grown_mask: Tensor,
    kv_lens: Tensor, limits: Tensor, level: int, count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Score the K children of each of R rows and pick the next frontier: the `count` best, in descending score.

    child_tokens [B, R, K] int64, child_log_probs [B, R, K] float32; of the rows: parent_scores [B, R] float32,
    parent_history [B, R] int32 (their ids in the history, -1: the root); grown_mask [B, G, W] int32 of all rows grown so
    far, of which they are the last (the root is none: G = 0); kv_lens, limits [B] int32: a child whose slot
    kv_lens + level + 1 is not below the limit is absent. Bit level * count + rank is a frontier node's own.
    -> the history's new piece, candidate r K + j: tokens [B, R K] int64, scores [B, R K] float32, parents [B, R K]
    int32; the frontier: tokens [B, count] int64, scores [B, count] float32, ids in the history [B, count] int32, its
    parents' rows [B, count] int32; the mask of all rows and the frontier's [B, G + count, W] int32.
    """
    rows, children = child_tokens.shape[1:]
    grown, words = grown_mask.shape[1:]
    device = child_tokens.device
    log_probs = torch.where(child_log_probs.isnan(), float("-inf"), child_log_probs).clamp(max=0.0)
    parent_scores = torch.where(parent_scores.isnan(), float("-inf"), parent_scores)
    has_room = kv_lens + (level + 1) < limits
    scores = torch.where(has_room[:, None, None], parent_scores[:, :, None] + log_probs, float("-inf")).flatten(1)
    tokens = child_tokens.flatten(1).clone()
    parents = parent_history[:, :, None].expand(-1, -1, children).flatten(1).clone()
    best_scores, best = torch.sort(scores, dim=1, descending=True, stable=True)
    best, best_scores = best[:, :count], best_scores[:, :count].clone()
    from_row = best // children
    own = level * count + torch.arange(count, device=device)
    bit = torch.ones_like(own) << (own % 32)
    bit = torch.where(bit >= 2**31, bit - 2**32, bit)  # bit 31 is int32's sign
    own_words = torch.where(own[:, None] // 32 == torch.arange(words, device=device), bit[:, None], 0).to(torch.int32)
    if grown:
        own_words = own_words | grown_mask[:, grown - rows :].gather(1, from_row[:, :, None].expand(-1, -1, words))
    else:
        own_words = own_words.expand(child_tokens.shape[0], -1, -1)
    return (
        tokens, scores, parents, tokens.gather(1, best), best_scores,
        (best + first_candidate(level, children)).to(torch.int32), from_row.to(torch.int32),
        torch.cat([grown_mask, own_words], 1),
    )


BLOCK_C = 8  # candidates per program; the best of 8, 16 and 32 of 1 to 8 warps
BLOCK_E = 128
BLOCK_G = 16  # at least, so that most levels of a tree share a compilation
WARPS = 1

# B requests (i_b), C = R K candidates (o_c, compared with all the others o_e), W words of a mask row (o_w), G rows grown
# before (o_g over their words). A candidate counts those that beat it; where that is its rank in the frontier it writes the
# frontier's row itself: nothing is sorted.
@jit
def candidate_scores(b_log_prob, b_parent, has_room):
    """Scores of candidates, -inf where there is none."""
    b_log_prob = tl.where(b_log_prob == b_log_prob, tl.where(b_log_prob > 0.0, 0.0, b_log_prob), -float("inf"))
    b_parent = tl.where(b_parent == b_parent, b_parent, -float("inf"))
    return tl.where(has_room, b_parent + b_log_prob, -float("inf"))


@jit
def count_better(p_log_probs, p_scores, o_c, b_key, i_e, candidates, has_room, CHILDREN: tl.constexpr, BLOCK_E: tl.constexpr):
    """How many of the candidates from i_e on beat each of o_c."""
    o_e = i_e + tl.arange(0, BLOCK_E)
    m_e = o_e < candidates
    b_log_prob = tl.load(p_log_probs + o_e, mask=m_e, other=-float("inf"))
    b_parent = tl.load(p_scores + o_e // CHILDREN, mask=m_e, other=-float("inf"))
    b_other = tl.where(m_e, ordered(candidate_scores(b_log_prob, b_parent, has_room)), 0)  # -inf is above 0
    m_beats = (b_other[:, None] > b_key[None, :]) | (
        (b_other[:, None] == b_key[None, :]) & (o_e[:, None] < o_c[None, :])
    )
    return tl.sum(m_beats.to(tl.int32), 0)  # a thread keeps to one candidate


@jit
def rank_candidates(
    p_child_tokens, p_log_probs, p_parent_scores, p_history, p_grown_mask, p_lens, p_limits,
    p_tokens, p_scores, p_parents, p_best_tokens, p_best_scores, p_best_ids, p_best_rows, p_mask,
    count, level, first_id, grown, ROWS: tl.constexpr, CHILDREN: tl.constexpr, WORDS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr, WAITS: tl.constexpr,
):
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_c, i_b = tl.program_id(0), tl.program_id(1)
    candidates = ROWS * CHILDREN
    o_c, o_w = i_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_W)
    m_c, m_w = o_c < candidates, o_w < WORDS
    o_row = o_c // CHILDREN
    p_log_probs += i_b * candidates
    p_parent_scores += i_b * ROWS
    p_grown_mask += i_b * grown * WORDS
    p_mask += i_b * (grown + count) * WORDS
    # All that a candidate has is asked for at once: one trip to memory and not four.
    kv_len, limit = tl.load(p_lens + i_b), tl.load(p_limits + i_b)
    b_log_prob = tl.load(p_log_probs + o_c, mask=m_c, other=-float("inf"))
    b_parent = tl.load(p_parent_scores + o_row, mask=m_c, other=-float("inf"))
    b_token = tl.load(p_child_tokens + i_b * candidates + o_c, mask=m_c, other=0)
    b_history = tl.load(p_history + i_b * ROWS + o_row, mask=m_c, other=-1)
    o_words = (grown - ROWS + o_row)[:, None] * WORDS + o_w[None, :]
    m_words = m_c[:, None] & m_w[None, :] & (o_words >= 0)  # the root has none
    b_words = tl.load(p_grown_mask + o_words, mask=m_words, other=0)
    o_g = i_c * BLOCK_G + tl.arange(0, BLOCK_G)
    b_old_words = tl.load(p_grown_mask + o_g, mask=o_g < grown * WORDS, other=0)
    has_room = kv_len + level + 1 < limit
    b_score = candidate_scores(b_log_prob, b_parent, has_room)
    b_key = ordered(b_score)
    b_rank = count_better(p_log_probs, p_parent_scores, o_c, b_key, 0, candidates, has_room, CHILDREN, BLOCK_E)
    if BLOCK_E < ROWS * CHILDREN:
        for i_e in range(BLOCK_E, candidates, BLOCK_E):
            b_rank += count_better(p_log_probs, p_parent_scores, o_c, b_key, i_e, candidates, has_room, CHILDREN, BLOCK_E)
    tl.store(p_tokens + i_b * candidates + o_c, b_token, mask=m_c)
    tl.store(p_scores + i_b * candidates + o_c, b_score, mask=m_c)
    tl.store(p_parents + i_b * candidates + o_c, b_history, mask=m_c)
    tl.store(p_mask + o_g, b_old_words, mask=o_g < grown * WORDS)
    m_best = m_c & (b_rank < count)
    o_best = i_b * count + b_rank
    tl.store(p_best_tokens + o_best, b_token, mask=m_best)
    tl.store(p_best_scores + o_best, b_score, mask=m_best)
    tl.store(p_best_ids + o_best, first_id + o_c, mask=m_best)
    tl.store(p_best_rows + o_best, o_row, mask=m_best)
    o_bit = level * count + b_rank
    b_own = tl.where((o_bit // 32)[:, None] == o_w[None, :], (1 << (o_bit & 31))[:, None], 0)
    o_new = (grown + b_rank)[:, None] * WORDS + o_w[None, :]
    tl.store(p_mask + o_new, b_words | b_own, mask=m_best[:, None] & m_w[None, :])


@grow_frontier.implementation("triton", why_not=no_gpu, waits=True)
def grow_frontier_triton(
    child_tokens: Tensor, child_log_probs: Tensor, parent_scores: Tensor, parent_history: Tensor, grown_mask: Tensor,
    kv_lens: Tensor, limits: Tensor, level: int, count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One launch.

    10 rows of 10 children, 1 and 64 requests: 1.8 and 2.5 us; with four trips to memory, not one, 3.9 and 5.0 (H100 80GB
    SXM, triton 3.6, 2026-11-21; before it copied the words of earlier rows, of which there are at most 210 here).
    """
    batch, rows, children = child_tokens.shape
    candidates, (grown, words) = rows * children, grown_mask.shape[1:]
    assert count <= candidates, f"a frontier of {count} out of {candidates} candidates"
    assert not grown or grown >= rows, f"{rows} parents among {grown} rows"
    tokens = child_tokens.new_empty(batch, candidates)
    scores = parent_scores.new_empty(batch, candidates)
    parents = parent_history.new_empty(batch, candidates)
    best_tokens, best_scores = child_tokens.new_empty(batch, count), parent_scores.new_empty(batch, count)
    best_ids, best_rows = (parent_history.new_empty(batch, count) for _ in range(2))
    mask = grown_mask.new_empty(batch, grown + count, words)
    block = min(power_of_2(candidates), BLOCK_C)
    programs = (candidates + block - 1) // block
    wrap_triton(rank_candidates, waits=True)[(programs, batch)](
        child_tokens.contiguous(), child_log_probs.contiguous(), parent_scores.contiguous(),
        parent_history.contiguous(), grown_mask.contiguous(), kv_lens, limits,
        tokens, scores, parents, best_tokens, best_scores, best_ids, best_rows, mask,
        count, level, first_candidate(level, children), grown, ROWS=rows, CHILDREN=children, WORDS=words,
        BLOCK_C=block, BLOCK_E=min(power_of_2(candidates), BLOCK_E),
        BLOCK_G=max(BLOCK_G, power_of_2((grown * words + programs - 1) // programs)), BLOCK_W=power_of_2(words),
        WAITS=can_wait(child_tokens), num_warps=WARPS,
    )
    return tokens, scores, parents, best_tokens, best_scores, best_ids, best_rows, mask


def bench(device: torch.device) -> Iterator[Measurement]:
    """A level in the middle of a tree of top-k 10 and 8 levels."""
    for batch, top in ((1, 10), (64, 10), (8, 32)):
        words = (top * 7 + 31) // 32
        long, short = torch.int64, torch.int32
        args = (
            torch.randint(0, 128256, (batch, top, top), device=device, dtype=long),
            -5 * torch.rand(batch, top, top, device=device), -9 * torch.rand(batch, top, device=device),
            torch.arange(top, device=device, dtype=short).expand(batch, -1).contiguous(),
            torch.ones(batch, 3 * top, words, device=device, dtype=short),
            torch.full((batch,), 100, device=device, dtype=short), torch.full((batch,), 900, device=device, dtype=short),
            3, top,
        )

        def mine(args=args) -> tuple[Tensor, ...]:
            return grow_frontier_triton(*args)

        def reference(args=args) -> tuple[Tensor, ...]:
            return grow_frontier.reference(*args)

        moved = batch * top * (top * 28 + words * 32 + 32)
        yield measure("grow_frontier", f"{batch} x {top} rows of {top}", mine, reference, moved)
