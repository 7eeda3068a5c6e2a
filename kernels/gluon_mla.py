"""Latent attention for Hopper in Gluon, a further backend of paged_mla: the tensor cores multiply during the softmax.

The Triton kernel of paged_mla issues scores, softmax and values of a block one after the other. Here warps are specialized:
a group of four copies (producer) and two multiply (consumers), in ping-pong: one multiplies during the other's softmax.
The 64 rows (node, head) of a program leave registers for one accumulator, of which each consumer holds half of the columns;
blocks take turns between the consumers. FlashMLA calls this schedule "seesaw" (github.com/deepseek-ai/FlashMLA,
docs/20250422-new-kernel-deep-dive.md); the idea is theirs.

Queries and two blocks of 64 slots take 218 of 227 KB of shared memory; buffers are filled and read in halves. Rows, splits
and masks are those of paged_mla. Inductor cannot generate a Gluon kernel again: the op is opaque to it.

Batch x nodes behind 4096 rows, 128 heads of 512 + 64 in bfloat16, H100 80GB SXM, triton 3.6, 2026-11-21, us:
                                                        1 x 4 chain   16 x 4 chain   1 x 32 chain   1 x 32 tree
    Triton                                                     34.3          248.7          134.5         134.4
    FlashInfer, FA3 (chains only)                              24.5          158.3           81.5             -
    eight warps in step: scores of a block issued
    before the values of the one before it                     26.4          169.9          102.4         102.9
    eight warps in step: after them                            26.6          161.4          101.4         102.9
    seesaw                                                     25.3          136.4           86.9          87.7
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.gluon import (
    async_copy,
    barrier,
    copy_async,
    fence_async_shared,
    gl,
    gluon_jit,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
    why_no_gluon,
)
from autospec.kernels.launch import gdc_launch_dependents, gdc_wait, launching_directly, multiprocessors, no_gpu, rows_of
from autospec.kernels.paged_mla import Tile, bench_cases, exact_result, paged_mla, paged_mla_triton, pick_tile
from autospec.kernels.splits import combine, split_buffers
from autospec.kernels.timing import Measurement, measure

ROWS, SLOTS = 64, 64  # of a tile: the fewest rows that a warp group multiplies; probabilities take a rope part's place
TILES = {0: Tile(ROWS, SLOTS, splits=64, warps=4, stages=2)}  # warps of a group, blocks in shared memory
REGISTERS = 224  # of a thread that multiplies: 128 hold the accumulator, 32 scores; 56 are left to each that copies
ANY_NUMBER = ("stride_tb", "q_len", "earlier", "max_pages")  # nothing is gained by compiling again for 1 or multiples of 16


def capability(device: torch.device) -> tuple[int, int] | None:
    """Major and minor number of a GPU's architecture; None where there is no GPU."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def why_not_gluon(args: Mapping[str, Any]) -> str | None:
    """Instructions of Hopper, 16 bytes a copy, rope parts as large as probabilities, and halves of whole swizzles."""
    q_latent, q_rope, pages = args["q_latent"], args["q_rope"], args["latent_pages"]
    if (reason := no_gpu(args) or why_no_gluon()) is not None:
        return reason
    if args["sinks"] is not None:
        return "sinks are not handed to it"
    if (found := capability(q_latent.device)) is None:
        return "there is no GPU here to compile for"
    if found != (9, 0):
        return f"its instructions are those of SM90, this is SM{found[0]}{found[1]}"
    if not q_latent.dtype == q_rope.dtype == pages.dtype:
        return f"queries are {q_latent.dtype} and {q_rope.dtype}, pages {pages.dtype}"
    if q_latent.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {q_latent.dtype} is not float16 or bfloat16"
    if q_latent.shape[3] not in (128, 256, 512) or q_rope.shape[3] != 64:
        return f"a latent of {q_latent.shape[3]} and a rope part of {q_rope.shape[3]} are not 128, 256 or 512 and 64"
    if not pages.is_contiguous():
        return "the pages are not contiguous"
    if pages.storage_offset() % 8:
        return f"the pages begin {pages.storage_offset()} elements into their storage, no multiple of 8"
    if args["scale"] <= 0:
        return f"scale {args['scale']} is not positive"
    return None


def choose_splits(q_latent: Tensor, latent_pages: Tensor, page_table: Tensor) -> int:
    """As many splits as fill the GPU while each keeps two blocks, from shapes alone: lengths stay on the device."""
    batch, q_len, heads, _ = q_latent.shape
    capacity = page_table.shape[1] * latent_pages.shape[1]
    return pick_tile(TILES, batch * q_len * heads, q_len * heads, capacity, multiprocessors(q_latent)).splits


# As in paged_mla: B requests (i_b), N nodes, H heads that share every slot. A tile holds M rows (o_m): row r is node r // H
# and head r % H; T slots (o_t); S splits of the slots (i_s); R elements of a latent, HALF of them at a time, and E of its
# rope part. A function needs its layouts spelt out: COPY spreads a tile over threads for copying 16 bytes each, SCORES and
# VALUES are the layouts of products.
#
# A split's blocks are counted by i; block i lies in buffer i % 2 and belongs to consumer i % 2 (GROUP), which computes its
# scores and their softmax. Both consumers multiply its values, columns GROUP * HALF ... of them, so the owner leaves in
# shared memory what the other one needs. Shared by all:
#     s_q, s_qe        queries, [1, M, R] and [1, M, E]
#     s_c, s_e         latents and rope parts of two blocks, [2, T, R] and [2, T, E]; once the scores are there, the rope part
#                      gives its place to the block's probabilities [M, T]
#     s_keep, s_top    what the block leaves of earlier results, and the highest score so far (times factor), [2, M]
#     s_total          every consumer's sum and the highest score that it is behind, [4, M]
# and mbarriers [2, 1], by buffer; a buffer's c-th use completes the c-th phase of each:
#     full_l, full_r   left half; right half and rope part are copied (the first: queries too)
#     ready            probabilities, s_keep and s_top are written
#     empty_l, empty_r the left or right half and the probabilities are read, by consumer 0 or 1
# done, by consumer: its part of s_total is written. Functions take these in tuples: queries, pair (of buffers), softmax (s_keep,
# s_top, ready), full_barriers, empty_barriers, and sight, which says what a row sees.


@gluon_jit
def page_numbers(p_table, i_t, capacity, T: gl.constexpr, PAGE: gl.constexpr, COPY: gl.constexpr):
    """Physical pages of the slots of block i_t, [T]."""
    o_t = i_t * T + gl.arange(0, T, layout=gl.SliceLayout(1, COPY))
    return gl.load(p_table + o_t // PAGE, mask=o_t < capacity, other=0)


@gluon_jit
def rows_of_block(p_pages, b_page, i_t, T: gl.constexpr, PAGE: gl.constexpr, WIDTH: gl.constexpr, IS_WIDE: gl.constexpr,
                  COPY: gl.constexpr):  # fmt: skip
    """Where the rows of the slots of block i_t begin, [T]."""
    o_t = i_t * T + gl.arange(0, T, layout=gl.SliceLayout(1, COPY))
    if IS_WIDE:
        b_page = b_page.to(gl.int64)
    return p_pages + (b_page * PAGE + o_t % PAGE) * WIDTH


@gluon_jit
def copy_columns(s_to, p_rows, m_row, FIRST: gl.constexpr, COUNT: gl.constexpr, COPY: gl.constexpr):
    """Start to copy COUNT columns of rows into shared memory; where m_row is false it becomes 0 and nothing is read."""
    o_c = FIRST + gl.arange(0, COUNT, layout=gl.SliceLayout(0, COPY))
    copy_async(s_to, p_rows[:, None] + o_c[None, :], mask=m_row[:, None])


@gluon_jit
def unknown_zero(i):
    """0 for any block. The compiler does not know it, and computes addresses from it where they are used: some seventy
    constants for the tensor cores, kept through the loop, would not fit into registers."""
    return i >> 30


@gluon_jit
def linked_nodes(p_mask, i_t, kv_len, o_tree, m_m, WORDS: gl.constexpr, T: gl.constexpr, COLUMNS: gl.constexpr):
    """As in paged_attention: which slots of block i_t hold an ancestor or the row's own node, [M, T]."""
    o_node = i_t * T - kv_len + gl.arange(0, T, layout=COLUMNS)
    o_word = o_node >> 5
    i_first = (i_t * T - kv_len) >> 5
    m_word = m_m & (i_first >= 0) & (i_first < WORDS)
    b_word = gl.load(p_mask + o_tree * WORDS + i_first, mask=m_word, other=0)[:, None]
    for i in gl.static_range(1, (T + 30) // 32 + 1):
        m_word = m_m & (i_first >= -i) & (i_first < WORDS - i)
        b_more = gl.load(p_mask + o_tree * WORDS + i_first + i, mask=m_word, other=0)
        b_word = gl.where((o_word == i_first + i)[None, :], b_more[:, None], b_word)
    return ((b_word >> (o_node & 31)[None, :]) & 1) != 0


@gluon_jit
def hide_unseen(b_s, p_mask, i_t, kv_len, end, earlier, o_node, m_m, WORDS: gl.constexpr, SCORES: gl.constexpr):
    """Scores [M, T] of block i_t, minus infinity where a row does not see a slot."""
    T: gl.constexpr = b_s.shape[1]
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    o_t = i_t * T + gl.arange(0, T, layout=COLUMNS)
    if p_mask is not None:
        m_visible = linked_nodes(p_mask, i_t, kv_len, o_node + earlier, m_m, WORDS, T, COLUMNS) | (o_t < kv_len)[None, :]
    else:
        m_visible = o_t[None, :] <= (kv_len + o_node)[:, None]
    return gl.where(m_visible & (o_t < end)[None, :], b_s, -float("inf"))


@gluon_jit
def copy_blocks(
    p_q, p_qe, p_pages, p_table, stride_qn, stride_qh, stride_en, stride_eh, i_m, i_s, valid, end, blocks, capacity, queries, pair,
    full_barriers, empty_barriers,
    H: gl.constexpr, R: gl.constexpr, E: gl.constexpr, PAGE: gl.constexpr, SPLITS: gl.constexpr, IS_WIDE: gl.constexpr,
    M: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """The producer: queries, then every half of a block as soon as its buffer is empty."""
    HALF: gl.constexpr = R // 2
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    s_q, s_qe = queries
    s_c, s_e = pair
    full_l, full_r = full_barriers
    empty_l, empty_r = empty_barriers
    b_page = page_numbers(p_table, i_s, capacity, T, PAGE, COPY)
    o_l = i_m * M + gl.arange(0, M, layout=gl.SliceLayout(1, COPY))
    copy_columns(s_q.index(0), p_q + (o_l // H * stride_qn + o_l % H * stride_qh), o_l // H < valid, 0, R, COPY)
    copy_columns(s_qe.index(0), p_qe + (o_l // H * stride_en + o_l % H * stride_eh), o_l // H < valid, 0, E, COPY)
    o_t = gl.arange(0, T, layout=gl.SliceLayout(1, COPY))
    for i in range(blocks):
        i_t = i_s + i * SPLITS
        i_c, unused = i % 2, (i // 2 % 2) ^ 1  # of a new barrier the phase before the first counts as complete
        p_rows = rows_of_block(p_pages, b_page, i_t, T, PAGE, R + E, IS_WIDE, COPY)
        m_row = i_t * T + o_t < end
        b_page = page_numbers(p_table, i_t + SPLITS, capacity, T, PAGE, COPY)
        mbarrier.wait(empty_l.index(i_c), unused)
        copy_columns(s_c.index(i_c).slice(0, HALF, dim=1), p_rows, m_row, 0, HALF, COPY)
        async_copy.mbarrier_arrive(full_l.index(i_c), increment_count=False)
        mbarrier.wait(empty_r.index(i_c), unused)
        copy_columns(s_c.index(i_c).slice(HALF, HALF, dim=1), p_rows, m_row, HALF, HALF, COPY)
        copy_columns(s_e.index(i_c), p_rows, m_row, R, E, COPY)
        async_copy.mbarrier_arrive(full_r.index(i_c), increment_count=False)


@gluon_jit
def arrive(s_barrier):
    """All warps of the group have come this far."""
    barrier()
    mbarrier.arrive(s_barrier, count=1)


@gluon_jit
def issue_scores(queries, pair, full_barriers, i, GROUP: gl.constexpr, HALF: gl.constexpr, M: gl.constexpr, T: gl.constexpr,
                 SCORES: gl.constexpr):  # fmt: skip
    """Issue three products: scores [M, T] of the consumer's own block i, whose halves arrive."""
    s_q, s_qe = queries
    s_c, s_e = pair
    full_l, full_r = full_barriers
    zero, phase = unknown_zero(i), i // 2 % 2
    b_s = gl.zeros((M, T), gl.float32, layout=SCORES)
    s_q, s_k = s_q.index(zero), s_c.index(GROUP + zero).permute((1, 0))
    mbarrier.wait(full_l.index(GROUP), phase)
    fence_async_shared()
    b_s = warpgroup_mma(s_q.slice(0, HALF, dim=1), s_k.slice(0, HALF), b_s, use_acc=False, is_async=True)
    mbarrier.wait(full_r.index(GROUP), phase)
    fence_async_shared()
    b_s = warpgroup_mma(s_q.slice(HALF, HALF, dim=1), s_k.slice(HALF, HALF), b_s, is_async=True)
    return warpgroup_mma(s_qe.index(zero), s_e.index(GROUP).permute((1, 0)), b_s, is_async=True)


@gluon_jit
def issue_values(pair, b_acc, BUFFER: gl.constexpr, GROUP: gl.constexpr, HALF: gl.constexpr):
    """Issue one product: the consumer's columns of probabilities times latents, whose block may be the other's."""
    s_c, s_e = pair
    return warpgroup_mma(s_e.index(BUFFER), s_c.index(BUFFER).slice(GROUP * HALF, HALF, dim=1), b_acc, is_async=True)


@gluon_jit
def publish(b_s, b_before, b_top, b_sum, s_p, s_keep, s_top, s_ready, factor):
    """Softmax of a block's scores behind b_before, the highest so far; b_top, b_sum are the consumer's own after its last
    block. The highest is finite at first, so that a row that sees nothing stays 0. Leaves what the other consumer needs."""
    b_new = gl.maximum(b_before, gl.max(b_s, 1) * factor)  # the factor is positive: the highest score stays the highest
    b_p = gl.exp2(b_s * factor - b_new[:, None])
    b_keep = gl.exp2(b_before - b_new)
    b_sum = b_sum * gl.exp2(b_top - b_new) + gl.sum(b_p, 1)
    barrier()  # the whole group has read the rope part
    s_p.store(b_p.to(s_p.dtype))
    s_keep.store(b_keep)
    s_top.store(b_new)
    fence_async_shared()
    arrive(s_ready)
    return b_keep, b_new, b_sum


@gluon_jit
def finish_block(
    b_s, b_before, b_top, b_sum, b_acc, i, i_s, sight, pair, softmax, s_empty, o_node, m_m,
    GROUP: gl.constexpr, HALF: gl.constexpr, WORDS: gl.constexpr, SPLITS: gl.constexpr, SCORES: gl.constexpr,
    VALUES: gl.constexpr,
):  # fmt: skip
    """Wait for the scores of the consumer's own block i, publish its softmax, multiply its values."""
    p_mask, kv_len, end, full, earlier, factor = sight
    s_keep, s_top, s_ready = softmax
    s_p = pair[1].index(GROUP)  # in the place of the rope part
    b_s = warpgroup_mma_wait(0, [b_s])
    i_t = i_s + i * SPLITS
    if i_t >= full:
        b_s = hide_unseen(b_s, p_mask, i_t, kv_len, end, earlier, o_node, m_m, WORDS, SCORES)
    b_keep, b_top, b_sum = publish(
        b_s, b_before, b_top, b_sum, s_p, s_keep.index(GROUP), s_top.index(GROUP), s_ready.index(GROUP), factor
    )
    b_acc *= gl.convert_layout(b_keep, gl.SliceLayout(1, VALUES))[:, None]
    b_acc = warpgroup_mma_wait(0, [issue_values(pair, b_acc, GROUP, GROUP, HALF)])
    arrive(s_empty.index(GROUP))
    return b_top, b_sum, b_acc


@gluon_jit
def multiply_blocks(
    sight, queries, pair, softmax, full_barriers, s_empty, s_total, s_done, p_out, p_lse, row, i_m, i_s, valid, blocks, q_len,
    GROUP: gl.constexpr, H: gl.constexpr, R: gl.constexpr, WORDS: gl.constexpr, SPLITS: gl.constexpr, M: gl.constexpr,
    T: gl.constexpr,
):  # fmt: skip
    """A consumer: scores of blocks GROUP, GROUP + 2, ..., and its half of the columns of every block."""
    HALF: gl.constexpr = R // 2
    OTHER: gl.constexpr = 1 - GROUP
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    O_M: gl.constexpr = gl.SliceLayout(1, SCORES)
    O_V: gl.constexpr = gl.SliceLayout(1, VALUES)
    s_keep, s_top, s_ready = softmax
    o_m = i_m * M + gl.arange(0, M, layout=O_M)
    o_node = o_m // H
    m_m = o_node < valid
    b_top = gl.full((M,), -1.0e30, gl.float32, layout=O_M)
    b_sum = gl.zeros((M,), gl.float32, layout=O_M)
    b_acc = gl.zeros((M, HALF), gl.float32, layout=VALUES)
    if GROUP == 0:
        b_s = issue_scores(queries, pair, full_barriers, 0, GROUP, HALF, M, T, SCORES)
        b_top, b_sum, b_acc = finish_block(
            b_s, b_top, b_top, b_sum, b_acc, 0, i_s, sight, pair, softmax, s_empty, o_node, m_m, GROUP, HALF, WORDS, SPLITS,
            SCORES, VALUES,
        )  # fmt: skip
    for i in range(2 - GROUP, blocks, 2):
        # Block i - 1 is the other's. Its probabilities are multiplied first, so that its buffer is empty again soon.
        mbarrier.wait(s_ready.index(OTHER), (i - 1) // 2 % 2)
        fence_async_shared()
        b_before = s_top.index(OTHER).load(O_M)
        b_acc *= s_keep.index(OTHER).load(O_V)[:, None]
        b_acc = issue_values(pair, b_acc, OTHER, GROUP, HALF)
        b_s = issue_scores(queries, pair, full_barriers, i, GROUP, HALF, M, T, SCORES)
        b_acc = warpgroup_mma_wait(3, [b_acc])
        arrive(s_empty.index(OTHER))
        b_top, b_sum, b_acc = finish_block(
            b_s, b_before, b_top, b_sum, b_acc, i, i_s, sight, pair, softmax, s_empty, o_node, m_m, GROUP, HALF, WORDS, SPLITS,
            SCORES, VALUES,
        )  # fmt: skip
    if (blocks - 1) % 2 == OTHER:
        mbarrier.wait(s_ready.index(OTHER), (blocks - 1) // 2 % 2)
        fence_async_shared()
        b_acc *= s_keep.index(OTHER).load(O_V)[:, None]
        b_acc = warpgroup_mma_wait(0, [issue_values(pair, b_acc, OTHER, GROUP, HALF)])

    # Both consumers' sums, each behind the highest score of the consumer's last block; b_acc is behind that of the last of all.
    s_total.index(2 * GROUP).store(b_sum)
    s_total.index(2 * GROUP + 1).store(b_top)
    arrive(s_done.index(GROUP))
    mbarrier.wait(s_done.index(OTHER), 0)
    b_other = s_total.index(2 * OTHER + 1).load(O_M)
    b_last = gl.maximum(b_top, b_other)
    b_total = b_sum * gl.exp2(b_top - b_last) + s_total.index(2 * OTHER).load(O_M) * gl.exp2(b_other - b_last)
    b_total = gl.where(m_m, b_total, 0.0)
    b_share = gl.where(b_total == 0.0, 0.0, 1.0 / b_total)
    o_row = row + o_m  # of node r // H and head r % H
    m_row = o_node < q_len
    if SPLITS > 1:
        o_row = o_row * SPLITS + i_s
        if GROUP == 0:
            gl.store(p_lse + o_row, gl.where(b_total == 0.0, -float("inf"), b_last + gl.log2(b_total)), mask=m_row)
        m_row &= b_total != 0.0
    b_acc *= gl.convert_layout(b_share, O_V)[:, None]
    p_rows = p_out + gl.convert_layout(o_row, O_V)[:, None] * R
    o_r = GROUP * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, VALUES))
    gl.store(p_rows + o_r[None, :], b_acc.to(p_out.dtype.element_ty), mask=gl.convert_layout(m_row, O_V)[:, None])


@gluon_jit(do_not_specialize=ANY_NUMBER)
def attend_seesaw(
    p_q, p_qe, p_pages, p_table, p_lens, p_q_lens, p_mask, p_out, p_lse,
    stride_qb, stride_qn, stride_qh, stride_eb, stride_en, stride_eh, stride_tb, q_len, earlier, max_pages, scale,
    H: gl.constexpr, R: gl.constexpr, E: gl.constexpr, PAGE: gl.constexpr, WORDS: gl.constexpr, SPLITS: gl.constexpr,
    IS_WIDE: gl.constexpr, M: gl.constexpr, T: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = p_q.dtype.element_ty
    gdc_launch_dependents()
    gdc_wait()
    i_b = gl.program_id(1).to(gl.int64)
    i_m, i_s = gl.program_id(0) // SPLITS, gl.program_id(0) % SPLITS
    capacity = max_pages * PAGE
    kv_len = gl.load(p_lens + i_b)
    valid = q_len
    if p_q_lens is not None:
        valid = gl.minimum(gl.load(p_q_lens + i_b), q_len)

    # As in paged_mla: slots end before `end`, blocks up to full - 1 are seen by every row, and splits take turns. The groups
    # need a block to meet at: a split without any has one that no row sees and of which nothing is read.
    first_node = i_m * M // H
    common = kv_len + first_node
    if p_mask is not None:
        p_mask += i_b * (q_len + earlier) * WORDS
        common = kv_len
    end = gl.minimum(kv_len + earlier + gl.minimum((i_m * M + M - 1) // H + 1, valid), capacity)
    end = gl.where(first_node < valid, end, 0)
    full = gl.minimum(common, end) // T
    blocks = gl.maximum(((end + T - 1) // T - i_s + SPLITS - 1) // SPLITS, 1)

    s_q = gl.allocate_shared_memory(dtype, [1, M, R], SHARED)
    s_qe = gl.allocate_shared_memory(dtype, [1, M, E], SHARED)
    s_c = gl.allocate_shared_memory(dtype, [2, T, R], SHARED)
    s_e = gl.allocate_shared_memory(dtype, [2, T, E], SHARED)
    s_keep = gl.allocate_shared_memory(gl.float32, [2, M], FLAT)
    s_top = gl.allocate_shared_memory(gl.float32, [2, M], FLAT)
    s_total = gl.allocate_shared_memory(gl.float32, [4, M], FLAT)
    full_l = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full_r = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty_l = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty_r = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full_l.index(i), count=128)  # every thread of the producer, when what it copied is there
        mbarrier.init(full_r.index(i), count=128)
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty_l.index(i), count=1)
        mbarrier.init(empty_r.index(i), count=1)
        mbarrier.init(done.index(i), count=1)
    sight = (p_mask, kv_len, end, full, earlier, scale * 1.4426950408889634)  # log2(e)
    queries, pair, softmax = (s_q, s_qe), (s_c, s_e), (s_keep, s_top, ready)
    row = i_b * q_len * H
    gl.warp_specialize(
        [
            (copy_blocks, (
                p_q + i_b * stride_qb, p_qe + i_b * stride_eb, p_pages, p_table + i_b * stride_tb, stride_qn, stride_qh,
                stride_en, stride_eh, i_m, i_s, valid, end, blocks, capacity, queries, pair, (full_l, full_r),
                (empty_l, empty_r), H, R, E, PAGE, SPLITS, IS_WIDE, M, T)),
            (multiply_blocks, (
                sight, queries, pair, softmax, (full_l, full_r), empty_l, s_total, done, p_out, p_lse, row, i_m, i_s, valid, blocks,
                q_len, 0, H, R, WORDS, SPLITS, M, T)),
            (multiply_blocks, (
                sight, queries, pair, softmax, (full_l, full_r), empty_r, s_total, done, p_out, p_lse, row, i_m, i_s, valid, blocks,
                q_len, 1, H, R, WORDS, SPLITS, M, T)),
        ],
        [4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
    )  # fmt: skip


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Launched by Triton itself, and maybe while the kernel before it still runs: it waits inside."""
    kernel[grid](*args, **kwargs, launch_pdl=True)


def copyable(q: Tensor) -> Tensor:
    """Rows of queries that can be copied by 16 bytes: the compiler must see it from strides and the address."""
    q = rows_of(q)
    is_aligned = q.data_ptr() % 16 == 0 and not any(stride % 16 for stride in q.stride()[:3])
    return q if is_aligned else q.clone(memory_format=torch.contiguous_format)


def attend_latent_pages(
    q_latent: Tensor, q_rope: Tensor, latent_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None,
    tree_mask: Tensor | None, scale: float, splits: int,
) -> Tensor:
    """Launch with a given number of splits; rows past q_lens become 0."""
    q, qe, table = copyable(q_latent), copyable(q_rope), rows_of(page_table)
    batch, q_len, heads, kv_lora_rank = q.shape
    out = q_latent.new_empty(q.shape)
    part, lse = split_buffers(out, splits)
    with launching_directly():
        launch(
            attend_seesaw, ((q_len * heads + ROWS - 1) // ROWS * splits, batch),
            q, qe, latent_pages, table, kv_lens, q_lens, None if tree_mask is None else tree_mask.contiguous(), part, lse,
            q.stride(0), q.stride(1), q.stride(2), qe.stride(0), qe.stride(1), qe.stride(2), table.stride(0),
            q_len, 0 if tree_mask is None else tree_mask.shape[1] - q_len, table.shape[1], scale,
            H=heads, R=kv_lora_rank, E=qe.shape[3], PAGE=latent_pages.shape[1],
            WORDS=1 if tree_mask is None else tree_mask.shape[2], SPLITS=splits, IS_WIDE=latent_pages.numel() >= 2**31,
            M=ROWS, T=SLOTS, CONSUMER_REGISTERS=REGISTERS, num_warps=4,
        )  # fmt: skip
        combine(part, lse, out, splits, columns=128, warps=4 if splits >= 16 else 1)
    return out


@paged_mla.implementation("gluon", why_not=why_not_gluon)
def paged_mla_gluon(
    q_latent: Tensor, q_rope: Tensor, latent_pages: Tensor, page_table: Tensor, kv_lens: Tensor,
    q_lens: Tensor | None = None, tree_mask: Tensor | None = None, scale: float = 1.0, sinks: Tensor | None = None,
) -> Tensor:
    """Flash attention over the latent pages with its products in flight during the softmax."""
    splits = choose_splits(q_latent, latent_pages, page_table)
    return attend_latent_pages(q_latent, q_rope, latent_pages, page_table, kv_lens, q_lens, tree_mask, scale, splits)


def bench(device: torch.device) -> Iterator[Measurement]:
    """As paged_mla's, where it can run; the column of the reference is ours in Triton."""
    for case, moved, arguments in bench_cases(device):
        if why_not_gluon(paged_mla.bind(arguments, {})) is not None:
            continue
        mine, ours = partial(paged_mla_gluon, *arguments), partial(paged_mla_triton, *arguments)
        yield measure("paged_mla, Gluon", case, mine, ours, moved, exact_result(arguments))
