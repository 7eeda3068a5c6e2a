"""The best ids of a row in two launches: a summary of every part of it, then the best of the best parts.

Device functions that autospec.kernels.rank_children puts together, with scores of its own, and the sizes that both launches
share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autospec.kernels.filters import ordered
from autospec.kernels.launch import jit, power_of_2, tl

# The best of five pairs, up to 1.7 times faster than the worst (64 x 10 rows, V = 128256). H100 80GB SXM, 2026-11-21.
GROUP = 128  # ids whose best score and sum of exponentials the first launch leaves to the second
BLOCK_V = 1024  # ids per program of the first launch
PART = 64  # ids whose best score it leaves as well; the best of 32, 64 and 128

# A row (request i_b, row i_n) of draft ids (o_v) is read once, for the best score (b_top) and the sum of exponentials
# (b_sum) of every group of ids (o_g) and the best score of every part of a group (o_p). Only the `count` parts of the best
# scores can hold the `count` best ids: a second launch reads these again. Nothing of size [B, R, V] is written, and the
# rows of a level share their noise.
#
# Keys (b_key) are numbers with the order of the scores, above 0, which stands for none. GPUs have an instruction for the
# maximum of 32 bits over a warp. A bfloat16 leaves 16 of them to the position (NARROW): one maximum finds both.


@jit
def summarize(b_ranked, factor, GROUPS: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr):
    """The best score of every part and group; of a group the sum of exp(factor (score - best)), to which NaN sticks."""
    b_part = tl.reshape(b_ranked, (GROUPS * (GROUP // PART), PART))
    b_part = tl.max(tl.where(b_part == b_part, b_part, -float("inf")), 1)
    b_ranked = tl.reshape(b_ranked, (GROUPS, GROUP))
    b_top = tl.max(tl.where(b_ranked == b_ranked, b_ranked, -float("inf")), 1)
    b_exp = tl.exp(factor * (b_ranked - b_top[:, None]))
    return b_part, b_top, tl.sum(tl.where(b_ranked == -float("inf"), 0.0, b_exp), 1)


@jit
def store_summary(
    p_part, p_top, p_sum, b_part, b_top, b_sum, i_v, i_r, parts, groups, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
    PART: tl.constexpr,
):
    o_p = i_v * (BLOCK_V // PART) + tl.arange(0, BLOCK_V // PART)
    o_g = i_v * (BLOCK_V // GROUP) + tl.arange(0, BLOCK_V // GROUP)
    tl.store(p_part + i_r * parts + o_p, b_part, mask=o_p < parts)
    tl.store(p_top + i_r * groups + o_g, b_top, mask=o_g < groups)
    tl.store(p_sum + i_r * groups + o_g, b_sum, mask=o_g < groups)


@jit
def keys_of(b_score, o, NARROW: tl.constexpr):
    """The keys of scores at positions o; NARROW: of bfloat16's numbers, at positions below 65536."""
    b_key = ordered(tl.where(b_score == b_score, b_score, -float("inf")))
    if NARROW:
        b_key = ((b_key.to(tl.int32, bitcast=True) & -65536) | (65535 - o)).to(tl.uint32, bitcast=True)
    return b_key


@jit
def scores_of(b_key, NARROW: tl.constexpr):
    """`keys_of`, undone."""
    b_bits = b_key.to(tl.int32, bitcast=True)
    if NARROW:
        b_bits = tl.where(b_bits < 0, b_bits & -65536, b_bits | 65535)
    return (b_bits ^ tl.where(b_bits < 0, -2147483648, -1)).to(tl.float32, bitcast=True)


@jit
def halves(b, SIZE: tl.constexpr):
    """The first and the second half of a block."""
    return tl.split(tl.trans(tl.reshape(b, (2, SIZE // 2))))


@jit
def better_first(b_key, b_place, b_other, b_other_place):
    """Keys and places of two blocks: of each pair the higher key, of equal ones the lower place, and then the other one."""
    m_swap = (b_other > b_key) | ((b_other == b_key) & (b_other_place < b_place))
    b_low, b_low_place = tl.where(m_swap, b_key, b_other), tl.where(m_swap, b_place, b_other_place)
    return tl.where(m_swap, b_other, b_key), tl.where(m_swap, b_other_place, b_place), b_low, b_low_place


@jit
def take_best(b_key, o, count, SIZE: tl.constexpr, BLOCK_K: tl.constexpr, NARROW: tl.constexpr):
    """The `count` highest keys in their order, ties to the lowest of the places o, and their places; 0: none left.

    A round takes the maximum. Four quarters of the block, sorted against each other once, are four keys in a row: only the
    first of each row takes part in a round, and where it wins, the row moves up.
    """
    b_low, b_high = halves(b_key, SIZE)
    b_0, b_1 = halves(b_low, SIZE // 2)
    b_2, b_3 = halves(b_high, SIZE // 2)
    o_low, o_high = halves(o, SIZE)
    o_0, o_1 = halves(o_low, SIZE // 2)
    o_2, o_3 = halves(o_high, SIZE // 2)
    for _ in tl.static_range(2):
        b_0, o_0, b_1, o_1 = better_first(b_0, o_0, b_1, o_1)
        b_2, o_2, b_3, o_3 = better_first(b_2, o_2, b_3, o_3)
        b_1, o_1, b_2, o_2 = better_first(b_1, o_1, b_2, o_2)
    o_k = tl.arange(0, BLOCK_K)
    b_best = tl.zeros((BLOCK_K,), tl.uint32)
    b_place = tl.zeros((BLOCK_K,), tl.int32)
    for i_k in range(count):
        key = tl.max(b_0, 0)
        if NARROW:
            place = 65535 - (key.to(tl.int32, bitcast=True) & 65535)
            m_won = b_0 == key
        else:
            place = tl.min(tl.where(b_0 == key, o_0, 2147483647), 0)
            m_won = o_0 == place
            o_0, o_1, o_2 = tl.where(m_won, o_1, o_0), tl.where(m_won, o_2, o_1), tl.where(m_won, o_3, o_2)
        b_0, b_1, b_2 = tl.where(m_won, b_1, b_0), tl.where(m_won, b_2, b_1), tl.where(m_won, b_3, b_2)
        b_3 = tl.where(m_won, 0, b_3)
        b_best = tl.where(o_k == i_k, key, b_best)
        b_place = tl.where(o_k == i_k, place, b_place)
    return b_best, b_place


@jit
def total_of(b_top, b_sum, top, factor, BLOCK_G: tl.constexpr):
    """A row's sum of exp(factor (score - top)), from its groups'.

    The order of the sum is written out, as four warps add: one, two or four leave the same bits.
    """
    b_sum = b_sum * tl.where(b_top == -float("inf"), 1.0, tl.exp(factor * (b_top - top)))
    if BLOCK_G > 128:
        b_sum = tl.sum(tl.reshape(b_sum, (BLOCK_G // 128, 128)), 0)
    if BLOCK_G >= 128:
        b_sum = tl.sum(tl.reshape(b_sum, (4, 32)), 1)
        b_sum = tl.sum(tl.reshape(b_sum, (2, 2)), 0)
    return tl.sum(b_sum, 0)


@jit
def best_parts(
    p_part, p_top, p_sum, parts, groups, factor, count, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr, NARROW: tl.constexpr,
):
    """A row's parts with the best scores (`parts` where there are no more), its best score, log of its sum of exp."""
    o_g, o_p = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
    b_part = tl.load(p_part + o_p, mask=o_p < parts, other=-float("inf"))
    b_top = tl.load(p_top + o_g, mask=o_g < groups, other=-float("inf"))
    b_sum = tl.load(p_sum + o_g, mask=o_g < groups, other=0.0)
    b_key = tl.where(o_p < parts, keys_of(b_part, o_p, NARROW), 0)
    b_best, b_place = take_best(b_key, o_p, count, BLOCK_P, BLOCK_K, NARROW)
    top = tl.max(b_top, 0)
    return tl.where(b_best > 0, b_place, parts), top, tl.log(total_of(b_top, b_sum, top, factor, BLOCK_G))


@jit
def store_best(b_ranked, o_v, vocab_size, factor, top, log_total, p_d2t, p_tokens, p_log_probs, count, SIZE: tl.constexpr,
               HAS_MAP: tl.constexpr, BLOCK_K: tl.constexpr, NARROW: tl.constexpr):  # fmt: skip
    """The `count` best ids of a row, ties to the lowest, with their log-probabilities."""
    b_key = tl.where(o_v < vocab_size, keys_of(b_ranked, o_v, NARROW), 0)
    b_best, b_token = take_best(b_key, o_v, count, SIZE, BLOCK_K, NARROW)
    o_k, b_token = tl.arange(0, BLOCK_K), b_token.to(tl.int64)
    if HAS_MAP:
        b_token += tl.load(p_d2t + b_token, mask=o_k < count, other=0)
    b_log_prob = factor * (scores_of(b_best, NARROW) - top) - log_total
    b_log_prob = tl.where(b_log_prob == b_log_prob, tl.where(b_log_prob > 0.0, 0.0, b_log_prob), -float("inf"))
    tl.store(p_tokens + o_k, b_token, mask=o_k < count)
    tl.store(p_log_probs + o_k, b_log_prob, mask=o_k < count)


def block_sizes(vocab_size: int, count: int, noise: int) -> dict[str, int]:
    """Sizes of the second launch.

    Args:
        noise: numbers drawn for each id that is read again; a thread holds about 32.
    """
    block_k, block_p = power_of_2(count), max(4, power_of_2((vocab_size + PART - 1) // PART))
    # Within a warp a maximum takes no barrier, which pays from the second round on (1 warp or 4, us: 6.0, 6.7; one round 6.4, 4.2).
    keys = max(block_p, block_k * PART)
    warps = max(keys // (1024 if count > 1 else 128), block_k * PART * noise // 1024)
    return {
        "BLOCK_K": block_k, "BLOCK_P": block_p, "BLOCK_G": power_of_2((vocab_size + GROUP - 1) // GROUP), "PART": PART,
        "num_warps": min(16, max(1, warps)),
    }


def new_summary(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the best score of every part, for that of every group, and for every group's sum."""
    rows, vocab_size = logits.shape[0] * logits.shape[1], logits.shape[2]
    parts, groups = ((vocab_size + size - 1) // size for size in (PART, GROUP))
    part, top, total = (logits.new_empty(rows, n, dtype=torch.float32) for n in (parts, groups, groups))
    return part, top, total
