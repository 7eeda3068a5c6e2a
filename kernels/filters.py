"""What top-k, top-p and min-p leave of a row of scores, without sorting it.

`filter_scores` is the meaning, in transformers' order and with its tie rule. On a GPU a row's filters come down to three
numbers: the best score, the lowest one kept and, of the ids that tie with that one, the first kept (`find_cutoffs`).

Probabilities are whole numbers here, exp(score - best) in units of 2^-40: their sums do not depend on the order, so a row
keeps the same ids whatever the step's other rows and however many programs share it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autospec.kernels.launch import constant, jit, multiprocessors, power_of_2, tl, wrap_triton


def filter_scores(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """scores [B, N, V] float32, after temperature; top_k [B] int (0: off), top_p [B] (1: off), min_p [B] (0: off)."""
    vocab_size = scores.shape[-1]
    ascending, order = torch.sort(scores, dim=-1, stable=True)
    kept = torch.where(top_k > 0, top_k, vocab_size).clamp(1, vocab_size).long()[:, None, None]
    kth_best = ascending.gather(2, (vocab_size - kept).expand(-1, scores.shape[1], 1))
    # Ties with the k-th best stay, as in transformers.
    below_k = ascending < kth_best
    ascending = ascending.masked_fill(below_k, float("-inf"))
    below_p = torch.softmax(ascending, dim=-1).cumsum(-1) <= 1.0 - top_p[:, None, None]
    is_best = torch.arange(vocab_size, device=scores.device) == vocab_size - 1
    below_p = below_p & ~is_best & (top_p < 1.0)[:, None, None]
    ascending = ascending.masked_fill(below_p, float("-inf"))
    probabilities = torch.softmax(ascending, dim=-1)
    below_min = probabilities < min_p[:, None, None] * probabilities[..., -1:]
    removed = (below_k | below_p | below_min) & ~is_best
    return scores.masked_fill(torch.zeros_like(removed).scatter(2, order, removed), float("-inf"))


@jit
def node_depth(p_parents, i_n):
    """Edges from a node to the root, 0 for an absent node; p_parents points at the request's row."""
    node, depth = i_n, i_n * 0
    while node > 0:
        parent = tl.load(p_parents + node)
        node = tl.where(parent < node, parent, -1)
        depth += 1
    return tl.where(node == 0, depth, 0)


@jit
def warm_scores(p_logits, p_seen, p_draft, p_parents, o_v, vocab_size, i_n, depth, penalty, temperature):
    """Logits of ids o_v after repetition penalty and temperature, float32; -inf past the vocabulary."""
    m_v = o_v < vocab_size
    b_score = tl.load(p_logits + o_v, mask=m_v, other=-float("inf")).to(tl.float32)
    if penalty != 1.0:
        m_repeated = tl.load(p_seen + o_v, mask=m_v, other=0) != 0
        node = i_n
        for _ in range(depth + 1):
            m_repeated = m_repeated | (o_v == tl.load(p_draft + node))
            node = tl.load(p_parents + node)
        b_score = tl.where(m_repeated, tl.where(b_score < 0, b_score * penalty, tl.div_rn(b_score, penalty)), b_score)
    return tl.div_rn(b_score, temperature)


@jit
def ordered(b_score):
    """Scores as uint32 with the same order; both zeros are one number."""
    bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


BLOCK_V = 2048  # ids at a time
NUM_BINS = 512
BINS = constant(NUM_BINS)  # 64 to a doubling of (best - score) + 4: from 1/16 wide at the best score to 1/4 wide 20 below it
BIN_BITS = constant(17)  # the bits of a float32 below those that number a bin
FIRST_BIN = constant(0x40800000)  # 4.0
LISTED = 4096  # candidates that a row's list holds, a guess: a search over more reads the whole row, 1 ms and more
UNIT = constant(float(2**40))  # of probability mass; V of the smallest are 1e-7 of the best score's

# Rows (i_r: request i_b, node i_n) are shared by programs that take some blocks of ids (o_v) each. Four launches, each
# returning at once where a row has no filter:
#   tops_of_blocks   the best score of every block
#   count_bins       how many scores are how far below the best, in bins. That brackets the k-th best score and the edge
#                    of the nucleus: each is in one of a few bins
#   list_candidates  the ids in these bins, and the exact mass of all others that count
#   search           the two edges, bit by bit, among the candidates: in no order, since only counts and sums are taken


@jit
def score_bins(b_score, best):
    """The bin of each score, 0 for the best: never falling as scores fall; what is 1020 below the best shares the last."""
    b_bits = ((best - b_score) + 4.0).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum((b_bits - FIRST_BIN) >> BIN_BITS, 0), BINS - 1)


@jit
def masses(b_score, best):
    """exp(score - best), rounded down to a multiple of 2^-40, in these units: int64."""
    return (tl.exp(b_score - best) * UNIT).to(tl.int64)


@jit
def cuts_row(i_b, p_temperature, p_top_k, p_top_p, p_min_p, vocab_size):
    """Whether a request filters at all, and whether it has a top-k that drops something."""
    top_k = tl.load(p_top_k + i_b)
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    filters = has_top_k | (tl.load(p_top_p + i_b) < 1.0) | (tl.load(p_min_p + i_b) > 0.0)
    return filters & (tl.load(p_temperature + i_b) != 0.0), has_top_k


@jit
def best_of_row(p_tops, i_r, blocks, BLOCK_G: tl.constexpr):
    """The best score of a row, from those of its blocks."""
    o_g = tl.arange(0, BLOCK_G)
    return tl.max(tl.load(p_tops + i_r * blocks + o_g, mask=o_g < blocks, other=-float("inf")), 0)


@jit
def bracket(p_counts, i_r, has_top_k, top_k, top_p):
    """Where the edges are, from the counts of the bins alone.

    -> (bin of the k-th best score or BINS, its rank among the candidates, the first and the last bin that may hold the
    lowest score that top-p keeps). Candidates are the scores in these bins.
    """
    o_bin = tl.arange(0, BINS)
    b_count = tl.load(p_counts + i_r * BINS + o_bin)
    k_bin = tl.full((), BINS, tl.int32)
    rank = tl.full((), 0, tl.int32)
    if has_top_k:
        k_bin = tl.sum((tl.cumsum(b_count, 0) < top_k).to(tl.int32), 0)
        rank = top_k - tl.sum(tl.where(o_bin < k_bin, b_count, 0), 0)
    first = tl.full((), BINS, tl.int32)
    last = tl.full((), -1, tl.int32)
    if top_p < 1.0:
        # Of the k-th score's bin, `rank` are kept and perhaps ties. A mass lies between those of its bin's two ends.
        b_near = ((o_bin << BIN_BITS) + FIRST_BIN).to(tl.float32, bitcast=True) - 4.0
        b_far = (((o_bin + 1) << BIN_BITS) + FIRST_BIN).to(tl.float32, bitcast=True) - 4.0
        b_most = tl.where(o_bin <= k_bin, b_count, 0).to(tl.float32) * tl.exp(-b_near) * 1.001
        b_kept = tl.where(o_bin == k_bin, rank, tl.where(o_bin < k_bin, b_count, 0)).to(tl.float32)
        b_least = tl.where(o_bin == BINS - 1, 0.0, b_kept * tl.exp(-b_far) * 0.999)
        b_most_to, b_least_to = tl.cumsum(b_most, 0), tl.cumsum(b_least, 0)
        most, least = tl.sum(b_most, 0), tl.sum(b_least, 0)
        slack = 0.0001 * most  # of sums in float32, and of masses rounded down
        dropped = tl.minimum(tl.maximum(1.0 - top_p, 0.0), 1.0)
        # What is below the edge's bin may be dropped, and what is above it falls short of what must stay.
        m_open = least - b_least_to <= dropped * most + slack
        m_open &= most - (b_most_to - b_most) >= dropped * least - slack
        m_open &= b_most_to >= (1.0 - dropped) * least - slack
        m_open &= b_least_to - b_least <= (1.0 - dropped) * most + slack
        first = tl.min(tl.where(m_open, o_bin, BINS), 0)
        last = tl.max(tl.where(m_open, o_bin, -1), 0)
        rank += tl.sum(tl.where((o_bin >= first) & (o_bin <= last) & (o_bin < k_bin), b_count, 0), 0)
    return k_bin, rank, first, last


@jit
def tops_of_blocks(
    p_logits, p_draft, p_parents, p_temperature, p_top_k, p_top_p, p_min_p, p_penalty, p_seen,
    p_tops, p_counts, p_sums, p_size,
    stride_lb, stride_lr, vocab_size, q_len, first_node, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """The best score of each block of ids (NaN: -inf); counts and sums start at 0."""
    i_v, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_n = i_r // ROWS, (first_node + i_r % ROWS).to(tl.int32)
    filters, _ = cuts_row(i_b, p_temperature, p_top_k, p_top_p, p_min_p, vocab_size)
    if filters:
        p_parents += i_b * q_len
        b_score = warm_scores(
            p_logits + i_b * stride_lb + (i_r % ROWS) * stride_lr, p_seen + i_b * vocab_size, p_draft + i_b * q_len,
            p_parents, i_v * BLOCK_V + tl.arange(0, BLOCK_V), vocab_size, i_n, node_depth(p_parents, i_n),
            tl.load(p_penalty + i_b), tl.load(p_temperature + i_b),
        )
        tl.store(p_tops + i_r * tl.num_programs(0) + i_v, tl.max(tl.where(b_score == b_score, b_score, -float("inf")), 0))
        if i_v == 0:
            tl.store(p_counts + i_r * BINS + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))
            tl.store(p_sums + i_r * 2 + tl.arange(0, 2), tl.zeros((2,), tl.int64))
            tl.store(p_size + i_r, 0)


@jit
def count_bins(
    p_logits, p_draft, p_parents, p_temperature, p_top_k, p_top_p, p_min_p, p_penalty, p_seen, p_tops, p_counts,
    stride_lb, stride_lr, vocab_size, q_len, first_node, blocks, per_program,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_G: tl.constexpr,
):
    """How many of a row's scores are in each bin."""
    i_p, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_n = i_r // ROWS, (first_node + i_r % ROWS).to(tl.int32)
    filters, has_top_k = cuts_row(i_b, p_temperature, p_top_k, p_top_p, p_min_p, vocab_size)
    if filters & (has_top_k | (tl.load(p_top_p + i_b) < 1.0)):
        p_logits += i_b * stride_lb + (i_r % ROWS) * stride_lr
        p_parents += i_b * q_len
        depth = node_depth(p_parents, i_n)
        temperature, penalty = tl.load(p_temperature + i_b), tl.load(p_penalty + i_b)
        best = best_of_row(p_tops, i_r, blocks, BLOCK_G)
        o_bin = tl.arange(0, BINS)
        b_count = tl.zeros((BINS,), tl.int32)
        for i_v in range(i_p * per_program, tl.minimum((i_p + 1) * per_program, blocks)):
            o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
            b_score = warm_scores(
                p_logits, p_seen + i_b * vocab_size, p_draft + i_b * q_len, p_parents, o_v, vocab_size, i_n, depth,
                penalty, temperature,
            )
            b_count += tl.histogram(score_bins(b_score, best), BINS, mask=o_v < vocab_size)
        tl.atomic_add(p_counts + i_r * BINS + o_bin, b_count, mask=b_count > 0, sem="relaxed")


@jit
def list_candidates(
    p_logits, p_draft, p_parents, p_temperature, p_top_k, p_top_p, p_min_p, p_penalty, p_seen,
    p_tops, p_counts, p_sums, p_size, p_keys, p_ids,
    stride_lb, stride_lr, vocab_size, q_len, first_node, blocks, per_program,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_G: tl.constexpr, LISTED: tl.constexpr,
):
    """List the candidates of a row in any order, and sum the masses above all of them and between the two edges.

    -inf is no candidate: where it is the k-th best score, every score stays.
    """
    i_p, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_n = i_r // ROWS, (first_node + i_r % ROWS).to(tl.int32)
    filters, has_top_k = cuts_row(i_b, p_temperature, p_top_k, p_top_p, p_min_p, vocab_size)
    top_p = tl.load(p_top_p + i_b)
    if filters & (has_top_k | (top_p < 1.0)):
        p_logits += i_b * stride_lb + (i_r % ROWS) * stride_lr
        p_parents += i_b * q_len
        depth = node_depth(p_parents, i_n)
        temperature, penalty = tl.load(p_temperature + i_b), tl.load(p_penalty + i_b)
        best = best_of_row(p_tops, i_r, blocks, BLOCK_G)
        k_bin, _rank, first, last = bracket(p_counts, i_r, has_top_k, tl.load(p_top_k + i_b), top_p)
        b_above = tl.zeros((BLOCK_V,), tl.int64)
        b_between = tl.zeros((BLOCK_V,), tl.int64)
        for i_v in range(i_p * per_program, tl.minimum((i_p + 1) * per_program, blocks)):
            if score_bins(tl.load(p_tops + i_r * blocks + i_v), best) <= k_bin:
                o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
                b_score = warm_scores(
                    p_logits, p_seen + i_b * vocab_size, p_draft + i_b * q_len, p_parents, o_v, vocab_size, i_n, depth,
                    penalty, temperature,
                )
                b_bin, b_mass = score_bins(b_score, best), masses(b_score, best)
                m_score = b_score > -float("inf")
                b_above += tl.where(m_score & (b_bin < first), b_mass, 0)
                b_between += tl.where(m_score & (b_bin > last) & (b_bin < k_bin), b_mass, 0)
                b_listed = (m_score & ((b_bin == k_bin) | ((b_bin >= first) & (b_bin <= last)))).to(tl.int32)
                size = tl.sum(b_listed, 0)
                if size > 0:
                    o_c = tl.atomic_add(p_size + i_r, size, sem="relaxed") + tl.cumsum(b_listed, 0) - 1
                    m_c = (b_listed > 0) & (o_c < LISTED)
                    tl.store(p_keys + i_r * LISTED + o_c, ordered(b_score).to(tl.int32, bitcast=True), mask=m_c)
                    tl.store(p_ids + i_r * LISTED + o_c, o_v, mask=m_c)
        tl.atomic_add(p_sums + i_r * 2, tl.sum(b_above, 0), sem="relaxed")
        tl.atomic_add(p_sums + i_r * 2 + 1, tl.sum(b_between, 0), sem="relaxed")


@jit
def candidates(
    p_keys, p_ids, p_logits, p_seen, p_draft, p_parents, vocab_size, i_n, depth, penalty, temperature, best, i_c, size,
    is_row, BLOCK_C: tl.constexpr,
):
    """Scores as `ordered`, their masses, ids, and which there are: from the list, or from the row itself."""
    o_c = i_c + tl.arange(0, BLOCK_C)
    m_c = o_c < size
    if is_row:
        b_id = o_c
        b_score = warm_scores(p_logits, p_seen, p_draft, p_parents, o_c, vocab_size, i_n, depth, penalty, temperature)
        b_key = ordered(b_score)
    else:
        b_id = tl.load(p_ids + o_c, mask=m_c, other=0)
        b_bits = tl.load(p_keys + o_c, mask=m_c, other=0)
        b_key = b_bits.to(tl.uint32, bitcast=True)
        b_score = (b_bits ^ tl.where(b_bits < 0, -2147483648, -1)).to(tl.float32, bitcast=True)  # `ordered`, undone
    return b_key, tl.where(m_c, masses(b_score, best), 0), b_id, m_c


@jit
def highest_key(
    p_keys, p_ids, p_logits, p_seen, p_draft, p_parents, vocab_size, i_n, depth, penalty, temperature, best, size, is_row,
    kth, goal, COUNTS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """The highest number with at least `goal` candidates (COUNTS) or mass from it up, and from kth: two bits at a time."""
    found = tl.full((), 0, tl.uint32)
    unit = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        b_1 = tl.zeros((BLOCK_C,), tl.int64)
        b_2 = tl.zeros((BLOCK_C,), tl.int64)
        b_3 = tl.zeros((BLOCK_C,), tl.int64)
        for i_c in range(0, size, BLOCK_C):
            b_key, b_mass, _id, m_c = candidates(
                p_keys, p_ids, p_logits, p_seen, p_draft, p_parents, vocab_size, i_n, depth, penalty, temperature, best,
                i_c, size, is_row, BLOCK_C,
            )
            b_each = m_c.to(tl.int64) if COUNTS else b_mass
            b_each = tl.where(b_key >= kth, b_each, 0)
            b_1 += tl.where(b_key >= found + unit, b_each, 0)
            b_2 += tl.where(b_key >= found + 2 * unit, b_each, 0)
            b_3 += tl.where(b_key >= found + 3 * unit, b_each, 0)
        digit = (tl.sum(b_1, 0) >= goal).to(tl.uint32) + (tl.sum(b_2, 0) >= goal).to(tl.uint32)
        found += (digit + (tl.sum(b_3, 0) >= goal).to(tl.uint32)) * unit
        unit = unit >> 2
    return found


@jit
def id_after_ties(
    p_keys, p_ids, p_logits, p_seen, p_draft, p_parents, vocab_size, i_n, depth, penalty, temperature, best, size, is_row,
    floor, dropped, BLOCK_C: tl.constexpr,
):
    """The id after the `dropped` lowest of those that tie at `floor`, bit by bit."""
    found = tl.full((), 0, tl.int32)
    unit = tl.full((), 1 << 25, tl.int32)
    while (dropped > 0) & (unit > 0):
        b_before = tl.zeros((BLOCK_C,), tl.int32)
        for i_c in range(0, size, BLOCK_C):
            b_key, _mass, b_id, m_c = candidates(
                p_keys, p_ids, p_logits, p_seen, p_draft, p_parents, vocab_size, i_n, depth, penalty, temperature, best,
                i_c, size, is_row, BLOCK_C,
            )
            b_before += (m_c & (b_key == floor) & (b_id < found + unit)).to(tl.int32)
        found = tl.where(tl.sum(b_before, 0) < dropped, found + unit, found)
        unit = unit >> 1
    return tl.where(dropped > 0, found + 1, 0)


@jit
def find_nucleus(
    p_keys, p_ids, p_logits, p_seen, p_draft, p_parents, vocab_size, i_n, depth, penalty, temperature, best, size, is_row,
    kth, top_p, above, between, BLOCK_C: tl.constexpr,
):
    """The lowest score that top-p keeps of those from kth up, and the first id that it keeps of its ties.

    No more than (1 - top_p) of the mass goes: all below the lowest score kept, and of its ties the lowest ids.
    """
    b_mass_all = tl.zeros((BLOCK_C,), tl.int64)
    for i_c in range(0, size, BLOCK_C):
        b_key, b_mass, _id, _m = candidates(
            p_keys, p_ids, p_logits, p_seen, p_draft, p_parents, vocab_size, i_n, depth, penalty, temperature, best,
            i_c, size, is_row, BLOCK_C,
        )
        b_mass_all += tl.where(b_key >= kth, b_mass, 0)
    total = above + between + tl.sum(b_mass_all, 0)
    bound = ((1.0 - top_p).to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    goal = tl.maximum(total - bound, 1)  # one best score stays whatever top_p says
    floor = highest_key(
        p_keys, p_ids, p_logits, p_seen, p_draft, p_parents, vocab_size, i_n, depth, penalty, temperature, best, size,
        is_row, kth, goal - above, False, BLOCK_C,
    )
    b_ties = tl.zeros((BLOCK_C,), tl.int64)
    b_tie_mass = tl.zeros((BLOCK_C,), tl.int64)
    b_mass_all = tl.zeros((BLOCK_C,), tl.int64)
    for i_c in range(0, size, BLOCK_C):
        b_key, b_mass, _id, m_c = candidates(
            p_keys, p_ids, p_logits, p_seen, p_draft, p_parents, vocab_size, i_n, depth, penalty, temperature, best,
            i_c, size, is_row, BLOCK_C,
        )
        m_tie = m_c & (b_key == floor)
        b_ties += m_tie.to(tl.int64)
        b_tie_mass = tl.maximum(b_tie_mass, tl.where(m_tie, b_mass, 0))
        b_mass_all += tl.where(b_key >= floor, b_mass, 0)
    below = total - above - tl.sum(b_mass_all, 0)
    dropped = tl.minimum((bound - below) // tl.maximum(tl.max(b_tie_mass, 0), 1), tl.sum(b_ties, 0) - 1)
    first = id_after_ties(
        p_keys, p_ids, p_logits, p_seen, p_draft, p_parents, vocab_size, i_n, depth, penalty, temperature, best, size,
        is_row, floor, dropped, BLOCK_C,
    )
    return floor, first


@jit
def search(
    p_logits, p_draft, p_parents, p_temperature, p_top_k, p_top_p, p_min_p, p_penalty, p_seen,
    p_tops, p_counts, p_sums, p_size, p_keys, p_ids, p_best, p_floor, p_first,
    stride_lb, stride_lr, vocab_size, q_len, first_node, blocks,
    ROWS: tl.constexpr, BLOCK_G: tl.constexpr, LISTED: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """A row's best score (-inf: no filter is on), the lowest one kept (as `ordered`) and the first of its ties kept."""
    i_r = tl.program_id(0).to(tl.int64)
    i_b, i_n = i_r // ROWS, (first_node + i_r % ROWS).to(tl.int32)
    best = tl.full((), -float("inf"), tl.float32)
    floor = tl.full((), 0, tl.uint32)
    first = tl.full((), 0, tl.int32)
    filters, has_top_k = cuts_row(i_b, p_temperature, p_top_k, p_top_p, p_min_p, vocab_size)
    if filters:
        best = best_of_row(p_tops, i_r, blocks, BLOCK_G)
        top_k, top_p = tl.load(p_top_k + i_b), tl.load(p_top_p + i_b)
        if (best > -float("inf")) & (has_top_k | (top_p < 1.0)):
            p_logits += i_b * stride_lb + (i_r % ROWS) * stride_lr
            p_seen += i_b * vocab_size
            p_draft += i_b * q_len
            p_parents += i_b * q_len
            p_keys += i_r * LISTED
            p_ids += i_r * LISTED
            depth = node_depth(p_parents, i_n)
            temperature, penalty = tl.load(p_temperature + i_b), tl.load(p_penalty + i_b)
            size = tl.load(p_size + i_r)
            is_row = size > LISTED
            _k_bin, rank, _first, _last = bracket(p_counts, i_r, has_top_k, top_k, top_p)
            rank = tl.where(is_row, top_k, rank).to(tl.int64)
            size = tl.where(is_row, vocab_size, size)
            if has_top_k:
                floor = highest_key(
                    p_keys, p_ids, p_logits, p_seen, p_draft, p_parents, vocab_size, i_n, depth, penalty, temperature,
                    best, size, is_row, floor, rank, True, BLOCK_C,
                )
            if top_p < 1.0:
                above = tl.where(is_row, 0, tl.load(p_sums + i_r * 2))
                between = tl.where(is_row, 0, tl.load(p_sums + i_r * 2 + 1))
                floor, first = find_nucleus(
                    p_keys, p_ids, p_logits, p_seen, p_draft, p_parents, vocab_size, i_n, depth, penalty, temperature,
                    best, size, is_row, floor, top_p, above, between, BLOCK_C,
                )
    tl.store(p_best + i_r, best)
    tl.store(p_floor + i_r, floor.to(tl.int32, bitcast=True))
    tl.store(p_first + i_r, first)


def find_cutoffs(
    logits: Tensor, draft_tokens: Tensor, tree_parents: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor,
    min_p: Tensor, repetition_penalty: Tensor, seen: Tensor, first_node: int, listed: int = LISTED,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the search: arguments as choose_tokens has them, contiguous but for the logits, whose rows are dense.

    -> best [B R] float32 (-inf: no filter is on), floor [B R] int32 (the lowest score kept, as `ordered`), first [B R]
    int32 (of its ties, the first id kept), tops [B R, blocks] float32 (the best score of each BLOCK_V ids; only where a
    filter is on).
    """
    batch, rows, vocab_size = logits.shape
    blocks = (vocab_size + BLOCK_V - 1) // BLOCK_V
    tops = logits.new_empty(batch * rows, blocks, dtype=torch.float32)
    counts = logits.new_empty(batch * rows, NUM_BINS, dtype=torch.int32)
    sums = logits.new_empty(batch * rows, 2, dtype=torch.int64)
    size, floor, first = (logits.new_empty(batch * rows, dtype=torch.int32) for _ in range(3))
    keys, ids = (logits.new_empty(batch * rows, listed, dtype=torch.int32) for _ in range(2))
    best = logits.new_empty(batch * rows, dtype=torch.float32)
    row = logits, draft_tokens, tree_parents, temperature, top_k, top_p, min_p, repetition_penalty, seen
    shape = logits.stride(0), logits.stride(1), vocab_size, draft_tokens.shape[1], first_node
    # Enough programs for every multiprocessor; more would only read the row's counts once more each.
    each = max(1, batch * rows * blocks // (8 * multiprocessors(logits)))
    grid, block_g = ((blocks + each - 1) // each, batch * rows), power_of_2(blocks)
    wrap_triton(tops_of_blocks)[(blocks, batch * rows)](
        *row, tops, counts, sums, size, *shape, ROWS=rows, BLOCK_V=BLOCK_V
    )
    wrap_triton(count_bins)[grid](
        *row, tops, counts, *shape, blocks, each, ROWS=rows, BLOCK_V=BLOCK_V, BLOCK_G=block_g
    )
    wrap_triton(list_candidates)[grid](
        *row, tops, counts, sums, size, keys, ids, *shape, blocks, each,
        ROWS=rows, BLOCK_V=BLOCK_V, BLOCK_G=block_g, LISTED=listed, num_warps=8,
    )
    wrap_triton(search)[(batch * rows,)](
        *row, tops, counts, sums, size, keys, ids, best, floor, first, *shape, blocks,
        ROWS=rows, BLOCK_G=block_g, LISTED=listed, BLOCK_C=LISTED, num_warps=16,
    )
    return best, floor, first, tops
