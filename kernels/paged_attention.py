"""Attention of N new tokens per request over its pages: prefill, decode, chain and tree verification in one op.

q [B, N, Hq, D]; k_pages [num_pages, P, Hkv, D]; v_pages [num_pages, P, Hkv, Dv]; page_table [B, max_pages] int32;
kv_lens [B] int32, rows committed before this call; the N new rows were appended at slots kv_lens ... kv_lens + N - 1.
Without `tree_mask` node j is at position kv_lens + j and sees everything up to itself (a chain).
With it, node j is at position kv_lens + depth, depth = popcount of its mask row - 1, and sees the committed rows
and its ancestors. Windows and chunks are measured in positions, never in slots. A mask of more than N nodes is that of
a tree whose first nodes earlier calls appended: q holds its last N nodes, node j of the whole tree is at slot kv_lens + j.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.attention import alibi_bias, attend
from autospec.kernels.launch import (
    can_wait,
    fit_stages,
    gdc_launch_dependents,
    gdc_wait,
    has_warpgroup_products,
    jit,
    multiprocessors,
    no_gpu,
    not_a_float,
    power_of_2,
    rows_of,
    tl,
    wrap_triton,
)
from autospec.kernels.native import not_on_cpu, why_not_built
from autospec.kernels.page_blocks import block_pages, depth_of, linked_nodes, load_rows, row_numbers
from autospec.kernels.page_samples import random_tree, sample_places
from autospec.kernels.registry import kernel_op
from autospec.kernels.splits import combine, split_buffers, store_share
from autospec.kernels.timing import Measurement, measure
from autospec.kernels.tree_tables import tree_tables
from autospec.kernels.visible_slots import slot_positions, visible_slots


@kernel_op()
def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None = None,
    tree_mask: Tensor | None = None, sinks: Tensor | None = None, scale: float = 1.0, window: int = 0, chunk: int = 0,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None,
) -> Tensor:
    """q [B, N, Hq, D] -> [B, N, Hq, Dv] in q's dtype.

    q_lens [B] int32: valid rows per request, the rest is padding whose result is unspecified (None: all are valid);
    tree_mask [B, T, >= ceil(T/32)] int32, T >= N: q holds the last N of T nodes; sinks [Hq]; window, chunk, softcap 0 for none;
    alibi_slopes [Hq]: each head adds its slope times (key position - query position) to its scores.
    """
    batch, q_len = q.shape[:2]
    max_pages, page_size = page_table.shape[1], k_pages.shape[1]
    num_slots = max_pages * page_size
    pages = page_table.reshape(-1)
    k = k_pages.index_select(0, pages).reshape(batch, num_slots, *k_pages.shape[2:])
    v = v_pages.index_select(0, pages).reshape(batch, num_slots, *v_pages.shape[2:])
    visible = visible_slots(kv_lens, q_len, num_slots, window, chunk, tree_mask)
    bias = None
    if alibi_slopes is not None:
        query, position, _ = slot_positions(kv_lens, q_len, num_slots, tree_mask)
        bias = alibi_bias(alibi_slopes, query, position)
    return attend(q, k, v, visible, sinks, scale, softcap, bias, q_lens)


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """Pages are addressed by row number, a tile holds the whole head, and scores are scaled behind their maximum."""
    q, k_pages, v_pages = args["q"], args["k_pages"], args["v_pages"]
    if not q.dtype == k_pages.dtype == v_pages.dtype:
        return f"queries are {q.dtype}, pages {k_pages.dtype} and {v_pages.dtype}"
    if (reason := not_a_float(q.dtype)) is not None:
        return reason
    if max(q.shape[3], v_pages.shape[3]) > 512:
        return f"head dims {q.shape[3]} and {v_pages.shape[3]} do not fit a tile of 512"
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        return "the pages are not contiguous"
    if args["scale"] <= 0:
        return f"scale {args['scale']} is not positive"
    return no_gpu(args)


@dataclass(frozen=True)
class Tile:
    """How the work is cut: rows (node, head) and slots of a tile, splits of the slots; warps and pipeline stages."""

    rows: int
    slots: int
    splits: int
    warps: int
    stages: int
    is_prefetching: bool = True  # read the next block's page numbers before this block's rows


def choose_tile(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor) -> Tile:
    """A tile and as many splits as fill the GPU, from shapes alone: lengths stay on the device.

    The sizes are the best of sweeps on an H100 80GB SXM, 32/8 heads of 128, bfloat16, page 16 and 64, triton 3.6,
    2026-11-21 (BENCHMARKS.md). On Hopper tensor cores take 64 rows and read K and V where they lie: even one node's four
    rows are faster in a tile of 64 than of 16 (64 x 1 at 2048: 183 us, not 197; 16 x 8: 50.5, not 56.6; 1 x 1 at 8192: 12.0,
    not 14.2), but for the fewest in splits of a few blocks (1 x 4 at 768: 5.2, not 5.5). 128 rows pay only where a page number
    serves a whole block. A program that has a multiprocessor for itself keeps four blocks in flight (4 x 64 at 776: 15.8 us, not
    19.6), two of them share it with three each; two pay where several tiles read the same long splits (1 x 64 at 16384, page
    16: 48.1 us, not 60.4).
    """
    batch, q_len, q_heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    capacity = page_table.shape[1] * page_size
    all_rows = q_len * q_heads // kv_heads

    def programs(rows: int) -> int:
        return batch * kv_heads * ((all_rows + rows - 1) // rows)

    def splits(rows: int, slots: int) -> int:
        count = 1
        while count < 64 and count * 2 * slots <= capacity:
            shares = all_rows > rows and capacity // (count * 2) >= 2048
            if programs(rows) * count * 2 > multiprocessors(q) * (2 if shares else 1):
                break
            count *= 2
        return count

    row_bytes = power_of_2(max(head_dim, v_pages.shape[3])) * q.element_size()
    rows = max(power_of_2(all_rows), 16)
    if row_bytes > 256:  # sized to fit 227 KB of shared memory, not tuned
        rows = min(rows, 64 if row_bytes <= 512 else 32 if row_bytes <= 1024 else 16)
        slots = 32 if row_bytes <= 1024 else 16
        return Tile(rows, slots, splits(rows, slots), 4, 2 if row_bytes <= 1024 else 1)
    if rows >= 128 and page_size % 64 == 0 and capacity // splits(128, 64) >= 1024:
        return Tile(128, 64, splits(128, 64), 8, 3)
    rows = 64 if has_warpgroup_products(q) else min(rows, 64)
    count = splits(rows, 64)
    is_alone = programs(rows) * count <= multiprocessors(q)
    if is_alone and all_rows <= rows and capacity // count < 256:  # a few blocks each: rather more, smaller ones
        return Tile(16, 64, count, 4, 3) if all_rows <= 16 else Tile(rows, 32, count, 4, 4)
    return Tile(rows, 64, count, 4, 4 if is_alone else 3)


# B requests (i_b), N nodes, H K/V heads (i_h), G query heads for each. A tile holds M rows (o_m): row r is node r // G
# and head i_h G + r % G, so that K and V are read once for all of them; T slots (o_t); S splits of the slots (i_s).


@jit
def fold_in(b_q, b_k, b_v, m_visible, b_bias, b_top, b_sum, b_acc, scale, SOFTCAP: tl.constexpr):
    """One step of the online softmax in powers of two; b_top is finite, so that a row that sees nothing stays 0."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    factor = 1.4426950408889634  # log2(e)
    if SOFTCAP > 0.0:
        b_s = SOFTCAP * (1.0 - 2.0 / (tl.exp(b_s * (2.0 * scale / SOFTCAP)) + 1.0))
    elif b_bias is not None:
        b_s *= scale
    else:
        factor *= scale  # positive, so the highest score stays the highest
    if b_bias is not None:
        b_s += b_bias
    if m_visible is not None:
        b_s = tl.where(m_visible, b_s, -float("inf"))
    b_new = tl.maximum(b_top, tl.max(b_s, 1) * factor)
    b_p = tl.exp2(b_s * factor - b_new[:, None])
    b_keep = tl.exp2(b_top - b_new)
    b_sum = b_sum * b_keep + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_keep[:, None], input_precision="ieee")
    return b_new, b_sum, b_acc


@jit
def attend_split(
    p_q, p_k, p_v, p_table, p_lens, p_q_lens, p_mask, p_sinks, p_slopes, p_out, p_lse,
    stride_qb, stride_qn, stride_qh, stride_tb, q_len, earlier, max_pages, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, WORDS: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, SPLITS: tl.constexpr, IS_WIDE: tl.constexpr,
    M: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PREFETCH: tl.constexpr,
    WAITS: tl.constexpr,
):
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_m, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    scale = tl.cast(scale, tl.float32)
    kv_len = tl.load(p_lens + i_b)
    valid = q_len
    if p_q_lens is not None:
        valid = tl.minimum(tl.load(p_q_lens + i_b), q_len)
    p_table += i_b * stride_tb
    p_k += i_h * D
    p_v += i_h * DV
    o_m = i_m * M + tl.arange(0, M)
    o_node, o_head = o_m // G, i_h * G + o_m % G
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_m = o_node < valid
    p_rows = p_q + i_b * stride_qb + (o_node * stride_qn + o_head * stride_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_rows, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)

    # Positions of the rows, and the slots that any of them can see: low ... end - 1.
    first_node = i_m * M // G
    b_depth = o_node
    o_tree = o_node + earlier  # the rows' nodes in the whole tree; earlier is 0 without one
    if p_mask is not None:
        p_mask += i_b * (q_len + earlier) * WORDS
        if WINDOW > 0 or CHUNK > 0 or p_slopes is not None:
            b_depth = depth_of(p_mask, o_tree, m_m, WORDS)
    b_position = kv_len + b_depth
    end = tl.minimum(kv_len + earlier + tl.minimum((i_m * M + M - 1) // G + 1, valid), max_pages * PAGE)
    end = tl.where(first_node < valid, end, 0)
    low = 0
    if WINDOW > 0 or CHUNK > 0:
        low = kv_len * 0
        lowest = tl.min(tl.where(m_m, b_position, 2147483647), 0)
        if WINDOW > 0:
            low = tl.maximum(low, lowest - WINDOW + 1)
        if CHUNK > 0:
            low = tl.maximum(low, lowest // CHUNK * CHUNK)
        low = tl.minimum(low, end)  # no row is there: its lowest position is no position

    # Blocks up to full - 1 are seen by every row, the others need the mask. The splits take turns: so where a split
    # begins depends on no length, and its first pages are known at once.
    common = kv_len if p_mask is not None else kv_len + first_node
    full, blocks = tl.minimum(common, end) // T, tl.cdiv(end, T)
    i_first = low // T + i_s
    i_masked = i_first + tl.cdiv(tl.maximum(full - i_first, 0), SPLITS) * SPLITS
    capacity = max_pages * PAGE

    b_top = tl.full((M,), -1.0e30, tl.float32)
    b_sum = tl.zeros((M,), tl.float32)
    b_acc = tl.zeros((M, BLOCK_DV), tl.float32)
    if p_sinks is not None and i_s == 0:
        b_top = tl.maximum(tl.load(p_sinks + o_head).to(tl.float32) * 1.4426950408889634, -1.0e30)
        b_sum += 1.0

    if p_slopes is not None:
        b_slope = tl.load(p_slopes + o_head).to(tl.float32)

    if PREFETCH:
        page_0, page_1, page_2, page_3 = block_pages(p_table, i_first, capacity, T, PAGE)
    for i_t in range(i_first, full, SPLITS):
        if PREFETCH:
            b_row = row_numbers((page_0, page_1, page_2, page_3), i_t, T, PAGE, IS_WIDE)
            page_0, page_1, page_2, page_3 = block_pages(p_table, i_t + SPLITS, capacity, T, PAGE)
        else:
            b_row = row_numbers(block_pages(p_table, i_t, capacity, T, PAGE), i_t, T, PAGE, IS_WIDE)
        b_k = load_rows(p_k, b_row, None, o_d, H * D, D)
        b_v = load_rows(p_v, b_row, None, o_dv, H * DV, DV)
        m_visible = None
        b_bias = None
        o_t = i_t * T + tl.arange(0, T)
        if WINDOW > 0:
            m_visible = o_t[None, :] > b_position[:, None] - WINDOW
            if CHUNK > 0:
                m_visible &= o_t[None, :] // CHUNK == b_position[:, None] // CHUNK
        elif CHUNK > 0:
            m_visible = o_t[None, :] // CHUNK == b_position[:, None] // CHUNK
        if p_slopes is not None:
            b_bias = b_slope[:, None] * (o_t[None, :] - b_position[:, None])
        b_top, b_sum, b_acc = fold_in(b_q, b_k, b_v, m_visible, b_bias, b_top, b_sum, b_acc, scale, SOFTCAP)

    # Not pipelined: it is short, and its buffers would lie beside those of the loop above.
    for i_t in tl.range(i_masked, blocks, SPLITS, num_stages=1):
        o_t = i_t * T + tl.arange(0, T)
        m_t = o_t < end
        if PREFETCH:
            b_row = row_numbers((page_0, page_1, page_2, page_3), i_t, T, PAGE, IS_WIDE)
            page_0, page_1, page_2, page_3 = block_pages(p_table, i_t + SPLITS, capacity, T, PAGE)
        else:
            b_row = row_numbers(block_pages(p_table, i_t, capacity, T, PAGE), i_t, T, PAGE, IS_WIDE)
        b_slot_position = o_t
        b_bias = None
        if p_mask is not None:
            m_visible = linked_nodes(p_mask, i_t, kv_len, o_tree, m_m, WORDS, T) | (o_t < kv_len)[None, :]
            if WINDOW > 0 or CHUNK > 0 or p_slopes is not None:
                m_node = m_t & (o_t >= kv_len)
                b_slot_position = tl.where(m_node, kv_len + depth_of(p_mask, o_t - kv_len, m_node, WORDS), o_t)
        else:
            m_visible = o_t[None, :] <= b_position[:, None]
        m_visible &= m_t[None, :]
        if WINDOW > 0:
            m_visible &= b_slot_position[None, :] > b_position[:, None] - WINDOW
        if CHUNK > 0:
            m_visible &= b_slot_position[None, :] // CHUNK == b_position[:, None] // CHUNK
        if p_slopes is not None:
            b_bias = b_slope[:, None] * (b_slot_position[None, :] - b_position[:, None])
        b_k = load_rows(p_k, b_row, m_t, o_d, H * D, D)
        b_v = load_rows(p_v, b_row, m_t, o_dv, H * DV, DV)
        b_top, b_sum, b_acc = fold_in(b_q, b_k, b_v, m_visible, b_bias, b_top, b_sum, b_acc, scale, SOFTCAP)

    b_sum = tl.where(m_m, b_sum, 0.0)
    o_row = (i_b * q_len + o_node) * (H * G) + o_head
    store_share(p_out, p_lse, o_row, i_s, o_node < q_len, b_top, b_sum, b_acc, o_dv, DV, SPLITS)


def attend_pages(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None,
    tree_mask: Tensor | None, sinks: Tensor | None, scale: float, window: int, chunk: int, softcap: float,
    alibi_slopes: Tensor | None, tile: Tile,
) -> Tensor:
    """Launch with a given tile; rows past q_lens become 0."""
    q = rows_of(q)
    batch, q_len, q_heads, head_dim = q.shape
    kv_heads, v_dim = v_pages.shape[2:]
    group = q_heads // kv_heads
    out = q.new_empty(batch, q_len, q_heads, v_dim)
    part, lse = split_buffers(out, tile.splits)
    block_d, block_dv, bytes_of_one = max(power_of_2(head_dim), 16), max(power_of_2(v_dim), 16), q.element_size()
    wrap_triton(attend_split, waits=True)[((q_len * group + tile.rows - 1) // tile.rows * tile.splits, kv_heads, batch)](
        q, k_pages, v_pages, page_table, kv_lens, q_lens, None if tree_mask is None else tree_mask.contiguous(), sinks,
        alibi_slopes, part, lse, q.stride(0), q.stride(1), q.stride(2), page_table.stride(0),
        q_len, 0 if tree_mask is None else tree_mask.shape[1] - q_len, page_table.shape[1], scale,
        H=kv_heads, G=group, D=head_dim, DV=v_dim, PAGE=k_pages.shape[1],
        WORDS=1 if tree_mask is None else tree_mask.shape[2],
        WINDOW=window, CHUNK=chunk, SOFTCAP=softcap, SPLITS=tile.splits,
        IS_WIDE=max(k_pages.numel(), v_pages.numel()) >= 2**31,
        M=tile.rows, T=tile.slots, BLOCK_D=block_d, BLOCK_DV=block_dv,
        PREFETCH=tile.is_prefetching, WAITS=can_wait(q), num_warps=tile.warps,
        num_stages=fit_stages(q, tile.stages, tile.slots * (block_d + block_dv) * bytes_of_one, tile.rows * block_d * bytes_of_one),
    )
    combine(part, lse, out, tile.splits, columns=512, warps=1)
    return out


@paged_attention.implementation("triton", why_not=why_not_triton, waits=True)
def paged_attention_triton(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None = None,
    tree_mask: Tensor | None = None, sinks: Tensor | None = None, scale: float = 1.0, window: int = 0, chunk: int = 0,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Flash attention over the pages, split over the slots where the batch is small, then combined."""
    tile = choose_tile(q, k_pages, v_pages, page_table)
    return attend_pages(
        q, k_pages, v_pages, page_table, kv_lens, q_lens, tree_mask, sinks, scale, window, chunk, softcap,
        alibi_slopes, tile,
    )


def why_not_cpu(args: Mapping[str, Any]) -> str | None:
    """Rows are read where they lie, as vectors: one dtype, dense in the last dimension."""
    q, k_pages, v_pages = args["q"], args["k_pages"], args["v_pages"]
    if (elsewhere := not_on_cpu(args)) is not None:
        return elsewhere
    if not q.dtype == k_pages.dtype == v_pages.dtype:
        return f"queries are {q.dtype}, pages {k_pages.dtype} and {v_pages.dtype}"
    if (reason := not_a_float(q.dtype)) is not None:
        return reason
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.stride(-1) != 1:
            return f"{name} has stride {pages.stride(-1)} in its last dimension"
    return why_not_built("paged_attention")


paged_attention.native(why_not=why_not_cpu)


@paged_attention.sampler
def sample(args: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Random rows, pages in a random order, trees, and lengths about the middle of what the pages hold."""
    floats = {
        name: torch.empty(args[name].shape, dtype=args[name].dtype, device=generator.device).normal_(generator=generator)
        for name in ("q", "k_pages", "v_pages", "sinks", "alibi_slopes") if args[name] is not None
    }
    return {**args, **floats, **sample_places(args, args["q"].shape[1], args["k_pages"], generator)}


def bench_cases(device: torch.device) -> Iterator[tuple[str, int, Tensor, tuple[Any, ...]]]:
    """(case, bytes that must move, exact result, arguments): 32 query and 8 K/V heads of 128, bfloat16, random trees."""
    shapes = ((1, 1, 2048), (1, 8, 2048), (1, 64, 2048), (1, 64, 16384), (16, 16, 2048), (16, 64, 2048), (64, 8, 2048))
    generator = torch.Generator(device).manual_seed(0)
    for page_size, (batch, q_len, context) in product((16, 64), shapes):
        max_pages = (context + q_len + page_size - 1) // page_size
        shape = 1 + batch * max_pages, page_size, 8, 128
        k_pages, v_pages = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        page_table = (1 + torch.randperm(batch * max_pages, device=device)).reshape(batch, max_pages).int()
        q = torch.randn(batch, q_len, 32, 128, device=device, dtype=torch.bfloat16)
        kv_lens = torch.full((batch,), context, device=device, dtype=torch.int32)
        tree_mask = tree_tables(random_tree(batch, q_len, generator))[0]
        rest = page_table, kv_lens, None, tree_mask, None, 128**-0.5
        exact = paged_attention.reference(q.double(), k_pages.double(), v_pages.double(), *rest)
        moved = 2 * batch * (context + q_len) * 8 * 128 * 2 + 2 * q.nbytes
        yield f"{batch} x {q_len}, {context}, page {page_size}", moved, exact, (q, k_pages, v_pages, *rest)


def bench(device: torch.device) -> Iterator[Measurement]:
    """Triton against the reference; the error is from the reference in float64."""
    for case, moved, exact, arguments in bench_cases(device):

        def mine(arguments=arguments) -> Tensor:
            return paged_attention_triton(*arguments)

        def reference(arguments=arguments) -> Tensor:
            return paged_attention.reference(*arguments)

        yield measure("paged_attention", case, mine, reference, moved, exact)
