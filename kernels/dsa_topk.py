"""The index_topk best slots that each new token may see (DeepSeek sparse attention): what paged_sparse_mla reads.

logits [B, N, num_slots] float32, index scores of dsa_indexer_logits; kv_lens [B] int32, rows committed before this call.
Causality comes before the selection: node j of a chain sees slots up to kv_lens + j, a node of a tree the committed rows,
its ancestors and itself. A row that sees no more than index_topk slots takes them all, whatever its logits hold.
Among equal scores the lowest slots win, both zeros being equal (torch.topk, and so transformers, promises no order among
them). Slots come in ascending order, which nothing depends on: attention needs the set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.filters import ordered
from autospec.kernels.launch import (
    can_wait,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    multiprocessors,
    no_gpu,
    power_of_2,
    rows_of,
    tl,
    wrap_triton,
)
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure
from autospec.kernels.visible_slots import visible_slots


@kernel_op()
def dsa_topk(
    logits: Tensor, kv_lens: Tensor, index_topk: int, q_lens: Tensor | None = None, tree_mask: Tensor | None = None
) -> Tensor:
    """logits [B, N, num_slots] float32 -> slots [B, N, min(index_topk, num_slots)] int32, ascending, then -1.

    q_lens [B] int32: valid rows per request, the rest is padding that selects nothing (None: all are valid);
    tree_mask [B, T, >= ceil(T/32)] int32, T >= N: logits are those of the last N of T nodes, and kv_lens counts the rows
    before the first of the T. Logits of visible slots are finite where a row sees more than index_topk.
    """
    q_len, num_slots = logits.shape[1:]
    visible = visible_slots(kv_lens, q_len, num_slots, 0, 0, tree_mask)
    if q_lens is not None:
        is_valid = torch.arange(q_len, device=q_lens.device)[None] < q_lens[:, None]
        visible = visible & is_valid[:, :, None]
    # What was not computed may hold anything; only what is invisible may be -inf.
    scores = logits.nan_to_num().masked_fill(~visible, float("-inf"))
    best = scores.sort(dim=-1, descending=True, stable=True).indices
    best = best[..., : min(index_topk, num_slots)]
    slots = torch.where(visible.gather(2, best), best, num_slots).sort(-1).values
    return torch.where(slots < num_slots, slots, -1).to(torch.int32)


def shared_slots(mine: Tensor, theirs: Tensor) -> Tensor:
    """Of the slots that each row of one selection holds, the share that another one's row holds too; [..., K] int32 -> [...]."""
    both = torch.cat([mine, theirs], -1).sort(-1).values  # a row names a slot once
    twice = (both[..., 1:] == both[..., :-1]) & (both[..., 1:] >= 0)
    return twice.sum(-1) / (theirs >= 0).sum(-1).clamp(min=1)


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """Scores are ranked by their bits."""
    if args["logits"].dtype != torch.float32:
        return f"logits are {args['logits'].dtype}, not float32"
    return no_gpu(args)


BLOCK_S = 2048  # slots at a time; a split holds at least one block
# Slots that one program keeps in registers: 12.9 us for 4096 on an H100, 17.4 for 8192 and 28.4 for 16000 (64 rows: 0.6 more);
# five launches take 23.6, 28.5 and 28.7 for one row, and 51.8 for 64 of 16000 (2026-11-21).
MOST_WHOLE = 16384  # and less than 32768, whose ties `running_counts` could not hold

# A row (i_r) is node i_n of request i_b; S splits (i_s) of its slots, each a run of blocks (o_s). The lowest score kept
# is found as `ordered`, eight bits a launch, the highest first: a split counts those of its scores that may still be it
# by their next digit, p_counts [4, rows, S, 256]. These counts also say how many slots each split keeps, so that the last
# launch writes them where they belong.


@jit
def load_keys(p_logits, p_mask, o_s, last, scored, kv_len, earlier, i_n, WORDS: tl.constexpr):
    """Scores of slots o_s as `ordered`, and which of them the row sees; from `scored` on none is read, all are equal."""
    m_s = o_s < last
    if p_mask is not None:
        o_node = o_s - kv_len
        m_node = m_s & (o_node >= 0)
        b_word = tl.load(p_mask + (i_n + earlier) * WORDS + (o_node >> 5), mask=m_node, other=0)
        m_s = m_s & ((o_node < 0) | (((b_word >> (o_node & 31)) & 1) != 0))
    b_score = tl.load(p_logits + o_s, mask=m_s & (o_s < scored), other=0.0)
    return ordered(b_score), m_s


@jit
def split_counts(p_counts, stage, i_r, rows, SPLITS: tl.constexpr):
    """How many scores of each split (rows) have each digit (columns)."""
    o_s, o_bin = tl.arange(0, SPLITS), tl.arange(0, 256)
    return tl.load(p_counts + ((stage * rows + i_r) * SPLITS + o_s[:, None]) * 256 + o_bin[None, :])


@jit
def pick_digit(b_count, rank):
    """The digit of the score of this rank from the top, and how many have a higher one; b_count [256]."""
    b_from_top = tl.sum(b_count, 0) - tl.cumsum(b_count, 0) + b_count
    digit = tl.sum((b_from_top >= rank).to(tl.int32), 0) - 1
    return digit, tl.sum(tl.where(tl.arange(0, 256) > digit, b_count, 0), 0)


@jit
def slots_of_block(BLOCK_S: tl.constexpr):
    """Slots of a block [BLOCK_S / 16, 16]: few threads hold a row of it, so that counting on along it takes few steps."""
    return tl.arange(0, BLOCK_S // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]


@jit
def running_counts(b_higher, b_tie):
    """How many are set up to and with each slot of a block, of both at once: counts of a block fit 16 bits."""
    b_both = b_higher + b_tie * 65536
    b_rows = tl.sum(b_both, 1)
    b_both = tl.cumsum(b_both, 1) + (tl.cumsum(b_rows, 0) - b_rows)[:, None]
    return b_both & 65535, b_both >> 16


@jit
def count_set(m_set):
    return tl.sum(m_set.to(tl.int32))  # over the block as it lies: axis by axis took 1 to 4 us more of select_row's time


@jit
def row_of_split(
    p_lens, p_q_lens, i_b, i_n, q_len, earlier, num_slots, index_topk, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr
):
    """(committed rows, end of the slots that the row may see, slots per split, end of the slots with scores: 0 where the
    request keeps all of its slots)."""
    kv_len = tl.load(p_lens + i_b)
    end = tl.minimum(kv_len + earlier + i_n + 1, num_slots)
    if p_q_lens is not None:
        end = tl.where(i_n < tl.load(p_q_lens + i_b), end, 0)
    per_split = tl.cdiv(tl.cdiv(end, SPLITS), BLOCK_S) * BLOCK_S
    return kv_len, end, per_split, tl.where(kv_len + earlier + q_len <= index_topk, 0, end)


@jit
def count_digits(
    p_logits, p_lens, p_q_lens, p_mask, p_counts, stride_lb, stride_ln, q_len, earlier, num_slots, index_topk, rows,
    STAGE: tl.constexpr, WORDS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, WAITS: tl.constexpr,
):
    """Count the digits of one split's scores that agree with the kept one in all higher digits."""
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_r, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_n = i_r // q_len, (i_r % q_len).to(tl.int32)
    kv_len, end, per_split, scored = row_of_split(
        p_lens, p_q_lens, i_b, i_n, q_len, earlier, num_slots, index_topk, SPLITS, BLOCK_S
    )
    kept = tl.full((), 0, tl.uint32)  # the digits found so far
    rank = index_topk
    for stage in tl.static_range(STAGE):
        b_count = tl.sum(split_counts(p_counts, stage, i_r, rows, SPLITS), 0)
        if stage == 0:
            rank = tl.minimum(rank, tl.sum(b_count, 0))
        digit, higher = pick_digit(b_count, rank)
        kept = kept * 256 + digit.to(tl.uint32)
        rank -= higher
    p_logits += i_b * stride_lb + i_n * stride_ln
    if p_mask is not None:
        p_mask += i_b * (q_len + earlier) * WORDS
    first = i_s * per_split
    last = tl.minimum(first + per_split, end)
    b_count = tl.zeros((256,), tl.int32)
    for i_k in range(first, last, BLOCK_S):
        o_s = i_k + tl.arange(0, BLOCK_S)
        b_key, m_s = load_keys(p_logits, p_mask, o_s, last, scored, kv_len, earlier, i_n, WORDS)
        b_digit = b_key >> (24 - 8 * STAGE)
        if STAGE > 0:
            m_s = m_s & ((b_digit >> 8) == kept)
        b_count += tl.histogram((b_digit & 255).to(tl.int32), 256, mask=m_s)
    tl.store(p_counts + ((STAGE * rows + i_r) * SPLITS + i_s) * 256 + tl.arange(0, 256), b_count)


@jit
def write_best(
    p_logits, p_lens, p_q_lens, p_mask, p_counts, p_out, stride_lb, stride_ln, q_len, earlier, num_slots, index_topk,
    rows, width, WORDS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, WAITS: tl.constexpr,
):
    """Write the kept slots of one split behind those of the splits before it, and the last split -1 behind all."""
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_r, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_n = i_r // q_len, (i_r % q_len).to(tl.int32)
    kv_len, end, per_split, scored = row_of_split(
        p_lens, p_q_lens, i_b, i_n, q_len, earlier, num_slots, index_topk, SPLITS, BLOCK_S
    )
    o_split, o_bin = tl.arange(0, SPLITS), tl.arange(0, 256)
    kept = tl.full((), 0, tl.uint32)
    total, rank = index_topk, index_topk
    b_higher, b_equal = tl.zeros((SPLITS,), tl.int32), tl.zeros((SPLITS,), tl.int32)
    for stage in tl.static_range(4):
        b_splits = split_counts(p_counts, stage, i_r, rows, SPLITS)
        b_count = tl.sum(b_splits, 0)
        if stage == 0:
            total = tl.minimum(index_topk, tl.sum(b_count, 0))
            rank = total
        digit, higher = pick_digit(b_count, rank)
        b_higher += tl.sum(tl.where((o_bin > digit)[None, :], b_splits, 0), 1)
        b_equal = tl.sum(tl.where((o_bin == digit)[None, :], b_splits, 0), 1)
        kept = kept * 256 + digit.to(tl.uint32)
        rank -= higher
    # `rank` scores equal to the lowest kept one are kept: those of the lowest slots.
    ties = tl.sum(tl.where(o_split < i_s, b_equal, 0), 0)
    written = tl.sum(tl.where(o_split < i_s, b_higher, 0), 0) + tl.minimum(ties, rank)

    p_out += i_r * width
    p_logits += i_b * stride_lb + i_n * stride_ln
    if p_mask is not None:
        p_mask += i_b * (q_len + earlier) * WORDS
    first = i_s * per_split
    last = tl.minimum(first + per_split, end)
    for i_k in range(first, last, BLOCK_S):
        o_s = i_k + slots_of_block(BLOCK_S)
        b_key, m_s = load_keys(p_logits, p_mask, o_s, last, scored, kv_len, earlier, i_n, WORDS)
        m_higher, m_tie = m_s & (b_key > kept), m_s & (b_key == kept)
        b_higher_before, b_ties_before = running_counts(m_higher.to(tl.int32), m_tie.to(tl.int32))
        left = tl.maximum(rank - ties, 0)  # ties that are still kept
        m_kept = m_higher | (m_tie & (b_ties_before <= left))
        tl.store(p_out + written + b_higher_before + tl.minimum(b_ties_before, left) - 1, o_s, mask=m_kept)
        ties += count_set(m_tie)
        written += count_set(m_kept)
    if i_s == SPLITS - 1:
        for i_k in range(total, width, BLOCK_S):
            o_k = i_k + tl.arange(0, BLOCK_S)
            tl.store(p_out + o_k, tl.full((BLOCK_S,), -1, tl.int32), mask=o_k < width)


@jit
def select_row(
    p_logits, p_lens, p_q_lens, p_mask, p_out, stride_lb, stride_ln, q_len, earlier, num_slots, index_topk, width,
    WORDS: tl.constexpr, BLOCK_S: tl.constexpr, WAITS: tl.constexpr,
):
    """The same for a whole row in one program, which holds all of its scores: the lowest score kept is found bit by bit, by
    counting the scores that are no lower."""
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_r = tl.program_id(0).to(tl.int64)
    i_b, i_n = i_r // q_len, (i_r % q_len).to(tl.int32)
    kv_len, end, _, scored = row_of_split(p_lens, p_q_lens, i_b, i_n, q_len, earlier, num_slots, index_topk, 1, BLOCK_S)
    p_out += i_r * width
    p_logits += i_b * stride_lb + i_n * stride_ln
    if p_mask is not None:
        p_mask += i_b * (q_len + earlier) * WORDS
    o_s = slots_of_block(BLOCK_S)
    b_key, m_s = load_keys(p_logits, p_mask, o_s, end, scored, kv_len, earlier, i_n, WORDS)
    total = tl.minimum(index_topk, count_set(m_s))
    b_key = tl.where(m_s, b_key, 0)  # finite scores have higher keys
    kept = tl.full((), 0, tl.uint32)
    for i_bit in range(32):
        higher_bit = kept | (tl.full((), 1 << 31, tl.uint32) >> i_bit)
        if count_set(b_key >= higher_bit) >= total:
            kept = higher_bit
    m_higher, m_tie = b_key > kept, m_s & (b_key == kept)
    b_higher_before, b_ties_before = running_counts(m_higher.to(tl.int32), m_tie.to(tl.int32))
    rank = total - count_set(m_higher)
    m_kept = m_higher | (m_tie & (b_ties_before <= rank))
    tl.store(p_out + b_higher_before + tl.minimum(b_ties_before, rank) - 1, o_s, mask=m_kept)
    for i_k in range(total, width, BLOCK_S):
        o_k = i_k + o_s
        tl.store(p_out + o_k, tl.full(o_k.shape, -1, tl.int32), mask=o_k < width)


def choose_splits(logits: Tensor) -> int:
    """Splits that keep a block each and fill the GPU about once, from shapes alone; at most 32: each reads all counts."""
    rows, num_slots = logits.shape[0] * logits.shape[1], logits.shape[2]
    splits = 1
    while splits < 32 and splits * BLOCK_S < num_slots and rows * splits * 2 <= multiprocessors(logits):
        splits *= 2
    return splits


def select_slots(
    logits: Tensor, kv_lens: Tensor, index_topk: int, q_lens: Tensor | None, tree_mask: Tensor | None, splits: int,
    block: int,
) -> Tensor:
    """Launch with given splits and slots per block."""
    logits = rows_of(logits)
    batch, q_len, num_slots = logits.shape
    rows, width = batch * q_len, min(index_topk, num_slots)
    out = logits.new_empty(batch, q_len, width, dtype=torch.int32)
    counts = logits.new_empty(4, rows, splits, 256, dtype=torch.int32)
    mask = None if tree_mask is None else tree_mask.contiguous()
    earlier, words = (0, 1) if mask is None else (mask.shape[1] - q_len, mask.shape[2])
    lengths = logits.stride(0), logits.stride(1), q_len, earlier, num_slots, index_topk, rows
    options = {"WORDS": words, "SPLITS": splits, "BLOCK_S": block, "WAITS": can_wait(logits)}
    warps = max(1, min(block // 256, 8))
    for stage in range(4):
        wrap_triton(count_digits, waits=True)[(rows, splits)](
            logits, kv_lens, q_lens, mask, counts, *lengths, STAGE=stage, num_warps=warps, **options
        )
    wrap_triton(write_best, waits=True)[(rows, splits)](
        logits, kv_lens, q_lens, mask, counts, out, *lengths, width, num_warps=warps, **options
    )
    return out


def select_rows(
    logits: Tensor, kv_lens: Tensor, index_topk: int, q_lens: Tensor | None, tree_mask: Tensor | None
) -> Tensor:
    """One launch, a program for each row."""
    logits = rows_of(logits)
    batch, q_len, num_slots = logits.shape
    out = logits.new_empty(batch, q_len, min(index_topk, num_slots), dtype=torch.int32)
    mask = None if tree_mask is None else tree_mask.contiguous()
    earlier, words = (0, 1) if mask is None else (mask.shape[1] - q_len, mask.shape[2])
    block = max(power_of_2(num_slots), 16)
    wrap_triton(select_row, waits=True)[(batch * q_len,)](
        logits, kv_lens, q_lens, mask, out, logits.stride(0), logits.stride(1), q_len, earlier, num_slots, index_topk,
        out.shape[2], WORDS=words, BLOCK_S=block, WAITS=can_wait(logits), num_warps=max(1, min(block // 1024, 32)),
    )
    return out


@dsa_topk.implementation("triton", why_not=why_not_triton, waits=True)
def dsa_topk_triton(
    logits: Tensor, kv_lens: Tensor, index_topk: int, q_lens: Tensor | None = None, tree_mask: Tensor | None = None
) -> Tensor:
    """A radix search over all splits of a row at once, then one pass that writes; nothing is sorted. Short rows in one launch."""
    if logits.shape[2] <= MOST_WHOLE:
        return select_rows(logits, kv_lens, index_topk, q_lens, tree_mask)
    return select_slots(logits, kv_lens, index_topk, q_lens, tree_mask, choose_splits(logits), BLOCK_S)


def bench(device: torch.device) -> Iterator[Measurement]:
    """index_topk 2048 of random scores; equal to the reference slot by slot, so a deviation is 0 or a defect."""
    for context in (4096, 32768, 131072):
        for q_len in (1, 2, 4):
            logits = torch.randn(1, q_len, (context + q_len + 63) // 64 * 64, device=device)
            kv_lens = torch.full((1,), context, device=device, dtype=torch.int32)

            def mine(logits=logits, kv_lens=kv_lens) -> Tensor:
                return dsa_topk_triton(logits, kv_lens, 2048)

            def reference(logits=logits, kv_lens=kv_lens) -> Tensor:
                return dsa_topk.reference(logits, kv_lens, 2048)

            moved = q_len * (context + 2048) * 4
            yield measure("dsa_topk", f"1 x {q_len}, {context}", mine, reference, moved)
