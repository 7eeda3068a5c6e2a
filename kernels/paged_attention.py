"""Attention of N new tokens per request over its pages: prefill, decode, chain and tree verification in one op.

q [B, N, Hq, D]; k_pages [num_pages, P, Hkv, D]; v_pages [num_pages, P, Hkv, Dv]; page_table [B, max_pages] int32;
kv_lens [B] int32, rows committed before this call; the N new rows were appended at slots kv_lens ... kv_lens + N - 1.
Without `tree_mask` node j is at position kv_lens + j and sees everything up to itself (a chain).
With it, node j is at position kv_lens + depth, depth = popcount of its mask row - 1, and sees the committed rows
and its ancestors. Windows and chunks are measured in positions, never in slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.attention import alibi_bias, attend, see
from autospec.kernels.launch import jit, multiprocessors, no_gpu, power_of_2, rows_of, tl, wrap_triton
from autospec.kernels.registry import kernel_op


def unpack_tree_mask(tree_mask: Tensor, q_len: int) -> Tensor:
    """tree_mask [B, N, ceil(N/32)] int32 -> bool [B, N, N]: node j is visible from node i."""
    node = torch.arange(q_len, device=tree_mask.device)
    words = tree_mask.index_select(2, node // 32)
    return ((words >> (node % 32).to(torch.int32)) & 1).bool()


def slot_positions(
    kv_lens: Tensor, q_len: int, num_slots: int, tree_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Positions of the nodes [B, N] and of what the slots hold [B, num_slots], and which slots a tree links, or None."""
    committed = kv_lens.long()[:, None]
    slot = torch.arange(num_slots, device=kv_lens.device)[None, :]
    if tree_mask is None:
        return committed + torch.arange(q_len, device=kv_lens.device)[None, :], slot, None
    among_nodes = unpack_tree_mask(tree_mask, q_len)
    depth = among_nodes.sum(-1) - 1
    node = slot - committed  # which node a slot holds; negative: committed
    is_node = (node >= 0) & (node < q_len)
    node = node.clamp(0, q_len - 1)
    position = torch.where(is_node, committed + depth.gather(1, node), slot)
    linked = among_nodes.gather(2, node[:, None, :].expand(-1, q_len, -1))
    allowed = torch.where(is_node[:, None, :], linked, slot[:, None, :] < committed[:, :, None])
    return committed + depth, position, allowed


def visible_slots(
    kv_lens: Tensor, q_len: int, num_slots: int, window: int, chunk: int, tree_mask: Tensor | None
) -> Tensor:
    """Which of a request's slots each of its nodes sees: bool [B, N, num_slots]."""
    query, position, allowed = slot_positions(kv_lens, q_len, num_slots, tree_mask)
    visible = see(query[:, :, None], position[:, None, :], window, chunk)
    return visible if allowed is None else allowed & visible


@kernel_op()
def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None = None,
    tree_mask: Tensor | None = None, sinks: Tensor | None = None, scale: float = 1.0, window: int = 0, chunk: int = 0,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None,
) -> Tensor:
    """q [B, N, Hq, D] -> [B, N, Hq, Dv] in q's dtype.

    q_lens [B] int32: valid rows per request, the rest is padding whose result is unspecified (None: all are valid);
    tree_mask [B, N, ceil(N/32)] int32; sinks [Hq]; window, chunk, softcap 0 for none;
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
    return attend(q, k, v, visible, sinks, scale, softcap, bias)


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """Rows are addressed by stride; a tile holds the whole head."""
    q, k_pages, v_pages = args["q"], args["k_pages"], args["v_pages"]
    if not q.dtype == k_pages.dtype == v_pages.dtype:
        return f"queries are {q.dtype}, pages {k_pages.dtype} and {v_pages.dtype}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {q.dtype} is not float16, bfloat16 or float32"
    if max(q.shape[3], v_pages.shape[3]) > 512:
        return f"head dims {q.shape[3]} and {v_pages.shape[3]} do not fit a tile of 512"
    if k_pages.stride(3) != 1 or v_pages.stride(3) != 1:
        return "the rows of the pages are not dense"
    return no_gpu(args) or (None if args["alibi_slopes"] is None else "ALiBi slopes are not supported")


@dataclass(frozen=True)
class Tile:
    """How the work is cut: rows (node, head) and slots of a tile, splits of the slots; warps and pipeline stages."""

    rows: int
    slots: int
    splits: int
    warps: int
    stages: int


def choose_tile(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor) -> Tile:
    """Enough programs to fill the GPU, from shapes alone: lengths stay on the device."""
    batch, q_len, q_heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    rows = min(max(power_of_2(q_len * q_heads // kv_heads), 16), 128)
    is_wide = power_of_2(max(head_dim, v_pages.shape[3])) * q.element_size() > 256
    programs = batch * kv_heads * ((q_len * q_heads // kv_heads + rows - 1) // rows)
    capacity = page_table.shape[1] * k_pages.shape[1]
    splits = 1
    while splits < 64 and programs * splits * 2 <= 2 * multiprocessors(q) and splits * 2 * 128 <= capacity:
        splits *= 2
    if is_wide:
        return Tile(min(rows, 64), 32, splits, 4, 2)
    return Tile(rows, 64, splits, 8 if rows == 128 else 4, 3)


# B requests (i_b), N nodes, H K/V heads (i_h), G query heads for each. A tile holds M rows (o_m): row r is node r // G
# and head i_h G + r % G, so that K and V are read once for all of them; T slots (o_t); S splits of the slots (i_s).


@jit
def bits_set(b_word):
    """Bits set in each int32."""
    b = b_word.to(tl.uint32, bitcast=True)
    b = b - ((b >> 1) & 0x55555555)
    b = (b & 0x33333333) + ((b >> 2) & 0x33333333)
    b = (b + (b >> 4)) & 0x0F0F0F0F
    b = b + (b >> 8)
    return ((b + (b >> 16)) & 0x3F).to(tl.int32)


@jit
def depth_of(p_mask, o_node, m_node, WORDS: tl.constexpr):
    """Depth of nodes: bits set in their mask rows, less one; p_mask points at the request."""
    b_depth = o_node * 0 - 1
    for i_w in range(WORDS):
        b_depth += bits_set(tl.load(p_mask + o_node * WORDS + i_w, mask=m_node, other=0))
    return b_depth


@jit
def load_rows(p_pages, b_page, o_offset, m_t, o_d, stride_p, stride_s, D: tl.constexpr, IS_FULL: tl.constexpr):
    """Rows of T slots: [T, BLOCK_D]; masked past D, and past m_t unless IS_FULL."""
    p_rows = p_pages + (b_page.to(tl.int64) * stride_p + o_offset * stride_s)[:, None] + o_d[None, :]
    if IS_FULL:
        if o_d.shape[0] == D:
            return tl.load(p_rows)
        else:
            return tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(p_rows, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)


@jit
def fold_in(b_q, b_k, b_v, m_visible, b_top, b_sum, b_acc, scale, SOFTCAP: tl.constexpr):
    """One step of the online softmax in powers of two; b_top is finite, so that a row that sees nothing stays 0."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    if SOFTCAP > 0.0:
        b_s = SOFTCAP * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp(2.0 * b_s / SOFTCAP) + 1.0))
    if m_visible is not None:
        b_s = tl.where(m_visible, b_s, -float("inf"))
    b_new = tl.maximum(b_top, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_keep = tl.exp2(b_top - b_new)
    b_sum = b_sum * b_keep + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_keep[:, None], input_precision="ieee")
    return b_new, b_sum, b_acc


@jit
def attend_split(
    p_q, p_k, p_v, p_table, p_lens, p_q_lens, p_mask, p_sinks, p_out, p_lse,
    stride_qb, stride_qn, stride_qh, stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh, stride_tb,
    q_len, max_pages, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, WORDS: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, SPLITS: tl.constexpr,
    M: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles = tl.num_programs(0) // SPLITS
    i_m, i_s = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    scale = tl.cast(scale, tl.float32)
    if SOFTCAP == 0.0:
        scale *= 1.4426950408889634  # log2(e)
    kv_len = tl.load(p_lens + i_b)
    valid = q_len
    if p_q_lens is not None:
        valid = tl.minimum(tl.load(p_q_lens + i_b), q_len)
    p_table += i_b * stride_tb
    p_k += i_h * stride_kh
    p_v += i_h * stride_vh
    o_m = i_m * M + tl.arange(0, M)
    o_node, o_head = o_m // G, i_h * G + o_m % G
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_m = o_node < valid
    p_rows = p_q + i_b * stride_qb + (o_node * stride_qn + o_head * stride_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_rows, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)

    # Positions of the rows, and the slots that any of them can see: low ... end - 1.
    b_depth = o_node
    if p_mask is not None:
        p_mask += i_b * q_len * WORDS
        if WINDOW > 0 or CHUNK > 0:
            b_depth = depth_of(p_mask, o_node, m_m, WORDS)
    b_position = kv_len + b_depth
    low = kv_len * 0
    if WINDOW > 0 or CHUNK > 0:
        lowest = tl.min(tl.where(m_m, b_position, 2147483647), 0)
        if WINDOW > 0:
            low = tl.maximum(low, lowest - WINDOW + 1)
        if CHUNK > 0:
            low = tl.maximum(low, lowest // CHUNK * CHUNK)
    last_node = tl.minimum((i_m * M + M - 1) // G + 1, valid)
    end = tl.minimum(kv_len + last_node, max_pages * PAGE)
    end = tl.where(i_m * M // G < valid, end, 0)
    first = tl.minimum(low, end) // T
    blocks = tl.cdiv(end, T)
    share = tl.cdiv(blocks - first, SPLITS)
    first += i_s * share
    blocks = tl.minimum(first + share, blocks)
    committed = tl.minimum(tl.minimum(kv_len, end) // T, blocks)

    b_top = tl.full((M,), -1.0e30, tl.float32)
    b_sum = tl.zeros((M,), tl.float32)
    b_acc = tl.zeros((M, BLOCK_DV), tl.float32)
    if p_sinks is not None and i_s == 0:
        b_top = tl.maximum(tl.load(p_sinks + o_head).to(tl.float32) * 1.4426950408889634, -1.0e30)
        b_sum += 1.0

    for i_t in range(first, committed):
        o_t = i_t * T + tl.arange(0, T)
        b_page = tl.load(p_table + o_t // PAGE)
        b_k = load_rows(p_k, b_page, o_t % PAGE, None, o_d, stride_kp, stride_ks, D, True)
        b_v = load_rows(p_v, b_page, o_t % PAGE, None, o_dv, stride_vp, stride_vs, DV, True)
        m_visible = None
        if WINDOW > 0:
            m_visible = o_t[None, :] > b_position[:, None] - WINDOW
            if CHUNK > 0:
                m_visible &= o_t[None, :] // CHUNK == b_position[:, None] // CHUNK
        elif CHUNK > 0:
            m_visible = o_t[None, :] // CHUNK == b_position[:, None] // CHUNK
        b_top, b_sum, b_acc = fold_in(b_q, b_k, b_v, m_visible, b_top, b_sum, b_acc, scale, SOFTCAP)

    for i_t in range(tl.maximum(first, committed), blocks):
        o_t = i_t * T + tl.arange(0, T)
        m_t = o_t < end
        b_page = tl.load(p_table + o_t // PAGE, mask=m_t, other=0)
        b_k = load_rows(p_k, b_page, o_t % PAGE, m_t, o_d, stride_kp, stride_ks, D, False)
        b_v = load_rows(p_v, b_page, o_t % PAGE, m_t, o_dv, stride_vp, stride_vs, DV, False)
        o_slot_node = o_t - kv_len
        b_slot_position = o_t
        if p_mask is not None:
            m_node = m_t & (o_slot_node >= 0)
            p_words = p_mask + o_node[:, None] * WORDS + (o_slot_node // 32)[None, :]
            b_word = tl.load(p_words, mask=m_m[:, None] & m_node[None, :], other=0)
            m_linked = ((b_word >> (o_slot_node & 31)[None, :]) & 1) != 0
            m_visible = m_linked | (o_slot_node < 0)[None, :]
            if WINDOW > 0 or CHUNK > 0:
                b_slot_position = tl.where(m_node, kv_len + depth_of(p_mask, o_slot_node, m_node, WORDS), o_t)
        else:
            m_visible = o_slot_node[None, :] <= o_node[:, None]
        m_visible &= m_t[None, :] & m_m[:, None]
        if WINDOW > 0:
            m_visible &= b_slot_position[None, :] > b_position[:, None] - WINDOW
        if CHUNK > 0:
            m_visible &= b_slot_position[None, :] // CHUNK == b_position[:, None] // CHUNK
        b_top, b_sum, b_acc = fold_in(b_q, b_k, b_v, m_visible, b_top, b_sum, b_acc, scale, SOFTCAP)

    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    o_row = (i_b * q_len + o_node) * (H * G) + o_head
    m_m = o_node < q_len
    if SPLITS > 1:
        b_lse = tl.where(b_sum == 0.0, -float("inf"), b_top + tl.log2(b_sum))
        tl.store(p_lse + o_row * SPLITS + i_s, b_lse, mask=m_m)
        o_row = o_row * SPLITS + i_s
        m_m &= b_sum != 0.0
    p_rows = p_out + o_row[:, None] * DV + o_dv[None, :]
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_m[:, None] & (o_dv < DV)[None, :])


@jit
def combine_splits(p_part, p_lse, p_out, DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Weigh the splits of one row (i_r) by their share of the softmax; a row that saw nothing becomes 0."""
    i_r = tl.program_id(0).to(tl.int64)
    o_s, o_dv = tl.arange(0, SPLITS), tl.arange(0, BLOCK_DV)
    b_lse = tl.load(p_lse + i_r * SPLITS + o_s)
    m_s = b_lse > -float("inf")
    p_rows = p_part + (i_r * SPLITS + o_s)[:, None] * DV + o_dv[None, :]
    b_part = tl.load(p_rows, mask=m_s[:, None] & (o_dv < DV)[None, :], other=0.0)
    b_weight = tl.where(m_s, tl.exp2(b_lse - tl.maximum(tl.max(b_lse, 0), -1.0e30)), 0.0)
    total = tl.sum(b_weight, 0)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out + i_r * DV + o_dv, b_out.to(p_out.dtype.element_ty), mask=o_dv < DV)


def attend_pages(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None,
    tree_mask: Tensor | None, sinks: Tensor | None, scale: float, window: int, chunk: int, softcap: float, tile: Tile,
) -> Tensor:
    """Launch with a given tile; rows past q_lens become 0."""
    q = rows_of(q)
    batch, q_len, q_heads, head_dim = q.shape
    kv_heads, v_dim = v_pages.shape[2:]
    group = q_heads // kv_heads
    out = q.new_empty(batch, q_len, q_heads, v_dim)
    if tile.splits == 1:
        part = lse = out
    else:
        part = q.new_empty(batch, q_len, q_heads, tile.splits, v_dim, dtype=torch.float32)
        lse = q.new_empty(batch, q_len, q_heads, tile.splits, dtype=torch.float32)
    block_dv = max(power_of_2(v_dim), 16)
    wrap_triton(attend_split)[((q_len * group + tile.rows - 1) // tile.rows * tile.splits, kv_heads, batch)](
        q, k_pages, v_pages, page_table, kv_lens, q_lens, None if tree_mask is None else tree_mask.contiguous(), sinks,
        part, lse, q.stride(0), q.stride(1), q.stride(2), k_pages.stride(0), k_pages.stride(1), k_pages.stride(2),
        v_pages.stride(0), v_pages.stride(1), v_pages.stride(2), page_table.stride(0),
        q_len, page_table.shape[1], scale,
        H=kv_heads, G=group, D=head_dim, DV=v_dim, PAGE=k_pages.shape[1], WORDS=(q_len + 31) // 32,
        WINDOW=window, CHUNK=chunk, SOFTCAP=softcap, SPLITS=tile.splits,
        M=tile.rows, T=tile.slots, BLOCK_D=max(power_of_2(head_dim), 16), BLOCK_DV=block_dv,
        num_warps=tile.warps, num_stages=tile.stages,
    )
    if tile.splits > 1:
        wrap_triton(combine_splits)[(batch * q_len * q_heads,)](
            part, lse, out, DV=v_dim, SPLITS=tile.splits, BLOCK_DV=block_dv, num_warps=2
        )
    return out


@paged_attention.implementation("triton", why_not=why_not_triton)
def paged_attention_triton(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None = None,
    tree_mask: Tensor | None = None, sinks: Tensor | None = None, scale: float = 1.0, window: int = 0, chunk: int = 0,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Flash attention over the pages, split over the slots where the batch is small, then combined."""
    tile = choose_tile(q, k_pages, v_pages, page_table)
    return attend_pages(
        q, k_pages, v_pages, page_table, kv_lens, q_lens, tree_mask, sinks, scale, window, chunk, softcap, tile
    )
