"""Attention of N new tokens per request in latent space over its pages (MLA): decode, chain and tree verification.

H heads of absorbed queries: q_latent [B, N, H, kv_lora_rank] (q_nope projected by w_uk) and q_rope
[B, N, H, qk_rope_head_dim]; latent_pages [num_pages, P, kv_lora_rank + qk_rope_head_dim], rows written by append_latent:
a row is the key of every head, its first kv_lora_rank elements are the value of every head. The result is still in latent
space; the caller projects it by w_uv. page_table [B, max_pages] int32; kv_lens [B] int32, rows committed before this call;
chains, trees, q_lens and sinks [H] as in paged_attention. Windows and chunks do not exist here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.attention import attend
from autospec.kernels.launch import (
    can_wait,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    multiprocessors,
    no_gpu,
    not_a_float,
    power_of_2,
    rows_of,
    tl,
    wrap_triton,
)
from autospec.kernels.native import not_on_cpu
from autospec.kernels.page_blocks import block_pages, linked_nodes, load_rows, row_numbers
from autospec.kernels.page_samples import sample_places
from autospec.kernels.paged_attention import why_not_cpu as why_not_paged_attention
from autospec.kernels.registry import kernel_op
from autospec.kernels.splits import combine, split_buffers, store_share
from autospec.kernels.timing import Measurement, measure
from autospec.kernels.tree_tables import tree_tables
from autospec.kernels.visible_slots import visible_slots


@kernel_op()
def paged_mla(
    q_latent: Tensor, q_rope: Tensor, latent_pages: Tensor, page_table: Tensor, kv_lens: Tensor,
    q_lens: Tensor | None = None, tree_mask: Tensor | None = None, scale: float = 1.0, sinks: Tensor | None = None,
) -> Tensor:
    """q_latent [B, N, H, kv_lora_rank], q_rope [B, N, H, qk_rope_head_dim] -> [B, N, H, kv_lora_rank] in q_latent's dtype.

    q_lens [B] int32: valid rows per request, the rest is padding whose result is unspecified (None: all are valid);
    tree_mask [B, T, >= ceil(T/32)] int32, T >= N: q holds the last N of T nodes;
    scale: 1 / (q_scaling sqrt(qk_nope_head_dim + qk_rope_head_dim)), of the head dims before absorption.
    """
    batch, q_len, _, kv_lora_rank = q_latent.shape
    num_slots = page_table.shape[1] * latent_pages.shape[1]
    rows = latent_pages.index_select(0, page_table.reshape(-1)).reshape(batch, num_slots, 1, -1)
    visible = visible_slots(kv_lens, q_len, num_slots, 0, 0, tree_mask)
    q = torch.cat([q_latent, q_rope], -1)
    return attend(q, rows, rows[..., :kv_lora_rank], visible, sinks, scale, 0.0, None, q_lens)


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """Pages are addressed by row number, a tile holds whole latent rows, and scores are scaled behind their maximum."""
    q_latent, q_rope, latent_pages = args["q_latent"], args["q_rope"], args["latent_pages"]
    if not q_latent.dtype == q_rope.dtype == latent_pages.dtype:
        return f"queries are {q_latent.dtype} and {q_rope.dtype}, pages {latent_pages.dtype}"
    if (reason := not_a_float(q_latent.dtype)) is not None:
        return reason
    if q_latent.shape[3] > 512 or q_rope.shape[3] > 128:
        return f"a latent of {q_latent.shape[3]} and a rope part of {q_rope.shape[3]} do not fit a tile of 512 + 128"
    if not latent_pages.is_contiguous():
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


# Rows of all requests (node, head) from which a tile serves -> the tile; its splits are the most that it may have.
# Latent rows of up to 1024 bytes, and wider ones. The best at most shapes of a sweep of 363 tiles of the version before, and
# sized: a 64 x 512 float32 accumulator takes 128 registers of each of 256 threads; queries, two stages of 64 bfloat16 rows of
# 576 and the probabilities take 224 of 227 KB of shared memory (triton 3.6: nothing is spilled).
TILES = {0: Tile(64, 64, 64, 8, 2)}
WIDE_TILES = {0: Tile(16, 16, 64, 4, 2)}


def pick_tile(tiles: Mapping[int, Tile], all_rows: int, rows: int, capacity: int, processors: int) -> Tile:
    """The tile of a table for `all_rows` rows of all requests, `rows` of them of each unit of `capacity` slots that tiles
    share nothing with. Splits fill the GPU as far as each keeps two blocks: what it writes for the combination (2 KB per
    row) soon outweighs what it reads.
    """
    tile = tiles[max(least for least in tiles if least <= all_rows)]
    height = min(max(power_of_2(rows), 16), tile.rows)
    programs, splits = all_rows // rows * ((rows + height - 1) // height), 1
    while splits < tile.splits and programs * splits * 2 <= processors and splits * 4 * tile.slots <= capacity:
        splits *= 2
    return replace(tile, rows=height, splits=splits, warps=tile.warps if height == tile.rows else 4)


def choose_tile(q_latent: Tensor, latent_pages: Tensor, page_table: Tensor) -> Tile:
    """A tile and as many splits as fill the GPU, from shapes alone: lengths stay on the device."""
    batch, q_len, heads, kv_lora_rank = q_latent.shape
    tiles = TILES if power_of_2(kv_lora_rank) * q_latent.element_size() <= 1024 else WIDE_TILES
    capacity = page_table.shape[1] * latent_pages.shape[1]
    return pick_tile(tiles, batch * q_len * heads, q_len * heads, capacity, multiprocessors(q_latent))


# B requests (i_b), N nodes, H heads that share every slot. A tile holds M rows (o_m): row r is node r // H and head r % H,
# so that a latent row is read once for all of them; T slots (o_t); S splits of the slots (i_s); R elements of a latent
# (o_r), which is key and value at once, and E elements of its rope part (o_e), which is key only.


@jit
def score_latents(b_q, b_qe, b_c, b_e, is_never):
    """Scores [M, T] of queries b_q, b_qe and rows b_c, b_e.

    Where a product flows into another, Triton gives every group of four warps all of its columns, as flash attention with
    128 rows wants it; with 64 rows both groups then compute the same. What flows through a branch it does not follow, so
    that the groups share the columns (44 instead of 72 wgmma, triton 3.9 for sm_90). The caller's mask is such a branch.
    """
    b_s = tl.dot(b_qe, tl.trans(b_e), input_precision="ieee")
    if is_never:
        b_s = b_s * 0.0
    return tl.dot(b_q, tl.trans(b_c), b_s, input_precision="ieee")


@jit
def fold_scores(b_s, b_c, b_top, b_sum, b_acc, factor):
    """One step of the online softmax in powers of two; b_top is finite, so that a row that sees nothing stays 0. The sum's
    columns [M, T] are added up once at the end: between warps that takes a barrier."""
    b_new = tl.maximum(b_top, tl.max(b_s, 1) * factor)  # the factor is positive: the highest score stays the highest
    b_p = tl.exp2(b_s * factor - b_new[:, None])
    b_keep = tl.exp2(b_top - b_new)
    b_sum = b_sum * b_keep[:, None] + b_p
    b_acc = tl.dot(b_p.to(b_c.dtype), b_c, b_acc * b_keep[:, None], input_precision="ieee")
    return b_new, b_sum, b_acc


@jit
def start_at_sinks(p_sinks, o_head, m_m, b_sum):
    """b_top and b_sum of rows that saw their head's sink, for one of the splits: its weight is 1 and it gives nothing."""
    b_top = tl.load(p_sinks + o_head, mask=m_m, other=0.0).to(tl.float32) * 1.4426950408889634  # log2(e)
    b_sum += tl.where(tl.arange(0, b_sum.shape[1]) == 0, 1.0, 0.0)[None, :]
    return tl.maximum(b_top, -1.0e30), b_sum


@jit
def attend_latents(
    p_q, p_qe, p_pages, p_table, p_lens, p_q_lens, p_mask, p_sinks, p_out, p_lse,
    stride_qb, stride_qn, stride_qh, stride_eb, stride_en, stride_eh, stride_tb, q_len, earlier, max_pages, scale,
    H: tl.constexpr, R: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, WORDS: tl.constexpr, SPLITS: tl.constexpr,
    IS_WIDE: tl.constexpr, M: tl.constexpr, T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    WAITS: tl.constexpr,
):
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_b = tl.program_id(1).to(tl.int64)
    i_m, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    factor = tl.cast(scale, tl.float32) * 1.4426950408889634  # log2(e)
    kv_len = tl.load(p_lens + i_b)
    valid = q_len
    if p_q_lens is not None:
        valid = tl.minimum(tl.load(p_q_lens + i_b), q_len)
    p_table += i_b * stride_tb
    o_m = i_m * M + tl.arange(0, M)
    o_node, o_head = o_m // H, o_m % H
    o_r, o_e = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)
    m_m = o_node < valid
    p_rows = p_q + i_b * stride_qb + (o_node * stride_qn + o_head * stride_qh)[:, None] + o_r[None, :]
    b_q = tl.load(p_rows, mask=m_m[:, None] & (o_r < R)[None, :], other=0.0)
    p_rows = p_qe + i_b * stride_eb + (o_node * stride_en + o_head * stride_eh)[:, None] + o_e[None, :]
    b_qe = tl.load(p_rows, mask=m_m[:, None] & (o_e < E)[None, :], other=0.0)

    # The slots that any row can see end before `end`; blocks up to full - 1 are seen by every row. The splits take turns:
    # so where a split begins depends on no length, and its first pages are known at once.
    first_node = i_m * M // H
    o_tree = o_node + earlier  # the rows' nodes in the whole tree; earlier is 0 without one
    if p_mask is not None:
        p_mask += i_b * (q_len + earlier) * WORDS
    end = tl.minimum(kv_len + earlier + tl.minimum((i_m * M + M - 1) // H + 1, valid), max_pages * PAGE)
    end = tl.where(first_node < valid, end, 0)
    common = kv_len if p_mask is not None else kv_len + first_node
    full, blocks = tl.minimum(common, end) // T, tl.cdiv(end, T)
    capacity = max_pages * PAGE

    b_top = tl.full((M,), -1.0e30, tl.float32)
    b_sum = tl.zeros((M, T), tl.float32)
    b_acc = tl.zeros((M, BLOCK_R), tl.float32)
    if p_sinks is not None and i_s == 0:
        b_top, b_sum = start_at_sinks(p_sinks, o_head, m_m, b_sum)
    page_0, page_1, page_2, page_3 = block_pages(p_table, i_s, capacity, T, PAGE)
    for i_t in range(i_s, blocks, SPLITS):
        o_t = i_t * T + tl.arange(0, T)
        b_row = row_numbers((page_0, page_1, page_2, page_3), i_t, T, PAGE, IS_WIDE)
        page_0, page_1, page_2, page_3 = block_pages(p_table, i_t + SPLITS, capacity, T, PAGE)
        b_c = load_rows(p_pages, b_row, o_t < end, o_r, R + E, R)
        b_e = load_rows(p_pages + R, b_row, o_t < end, o_e, R + E, E)
        b_s = score_latents(b_q, b_qe, b_c, b_e, kv_len < 0)
        if i_t >= full:
            if p_mask is not None:
                m_visible = linked_nodes(p_mask, i_t, kv_len, o_tree, m_m, WORDS, T) | (o_t < kv_len)[None, :]
            else:
                m_visible = o_t[None, :] <= (kv_len + o_node)[:, None]
            b_s = tl.where(m_visible & (o_t < end)[None, :], b_s, -float("inf"))
        b_top, b_sum, b_acc = fold_scores(b_s, b_c, b_top, b_sum, b_acc, factor)

    b_sum = tl.where(m_m, tl.sum(b_sum, 1), 0.0)
    o_row = (i_b * q_len + o_node) * H + o_head
    store_share(p_out, p_lse, o_row, i_s, o_node < q_len, b_top, b_sum, b_acc, o_r, R, SPLITS)


def attend_latent_pages(
    q_latent: Tensor, q_rope: Tensor, latent_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None,
    tree_mask: Tensor | None, scale: float, sinks: Tensor | None, tile: Tile,
) -> Tensor:
    """Launch with a given tile; rows past q_lens become 0."""
    q, qe = rows_of(q_latent), rows_of(q_rope)
    batch, q_len, heads, kv_lora_rank = q.shape
    out = q.new_empty(q.shape)
    part, lse = split_buffers(out, tile.splits)
    wrap_triton(attend_latents, waits=True)[((q_len * heads + tile.rows - 1) // tile.rows * tile.splits, batch)](
        q, qe, latent_pages, page_table, kv_lens, q_lens, None if tree_mask is None else tree_mask.contiguous(), sinks,
        part, lse, q.stride(0), q.stride(1), q.stride(2), qe.stride(0), qe.stride(1), qe.stride(2), page_table.stride(0),
        q_len, 0 if tree_mask is None else tree_mask.shape[1] - q_len, page_table.shape[1], scale,
        H=heads, R=kv_lora_rank, E=qe.shape[3], PAGE=latent_pages.shape[1],
        WORDS=1 if tree_mask is None else tree_mask.shape[2], SPLITS=tile.splits,
        IS_WIDE=latent_pages.numel() >= 2**31, M=tile.rows, T=tile.slots,
        BLOCK_R=max(power_of_2(kv_lora_rank), 16), BLOCK_E=max(power_of_2(qe.shape[3]), 16),
        WAITS=can_wait(q), num_warps=tile.warps, num_stages=tile.stages,
    )
    combine(part, lse, out, tile.splits, columns=128, warps=4 if tile.splits >= 16 else 1)
    return out


@paged_mla.implementation("triton", why_not=why_not_triton, waits=True)
def paged_mla_triton(
    q_latent: Tensor, q_rope: Tensor, latent_pages: Tensor, page_table: Tensor, kv_lens: Tensor,
    q_lens: Tensor | None = None, tree_mask: Tensor | None = None, scale: float = 1.0, sinks: Tensor | None = None,
) -> Tensor:
    """Flash attention over the latent pages: a block is read once and serves as keys and values of all heads."""
    tile = choose_tile(q_latent, latent_pages, page_table)
    return attend_latent_pages(q_latent, q_rope, latent_pages, page_table, kv_lens, q_lens, tree_mask, scale, sinks, tile)


def as_attention(args: Mapping[str, Any]) -> dict[str, Any]:
    """The same call as one of paged_attention: one K/V head, whose values are the first part of its keys."""
    pages = args["latent_pages"].unsqueeze(2)
    return {
        "q": torch.cat([args["q_latent"], args["q_rope"]], -1), "k_pages": pages,
        "v_pages": pages[..., : args["q_latent"].shape[3]],
        **{name: args[name] for name in ("page_table", "kv_lens", "q_lens", "tree_mask", "sinks", "scale")},
    }  # fmt: skip


def why_not_cpu(args: Mapping[str, Any]) -> str | None:
    """The C++ of paged_attention reads rows where they lie, at any stride."""
    return not_on_cpu(args) or why_not_paged_attention(as_attention(args))


@paged_mla.implementation("cpu", why_not=why_not_cpu)
def paged_mla_cpu(
    q_latent: Tensor, q_rope: Tensor, latent_pages: Tensor, page_table: Tensor, kv_lens: Tensor,
    q_lens: Tensor | None = None, tree_mask: Tensor | None = None, scale: float = 1.0, sinks: Tensor | None = None,
) -> Tensor:
    """Paged attention in C++ over one K/V head."""
    args = paged_mla.bind((q_latent, q_rope, latent_pages, page_table, kv_lens, q_lens, tree_mask, scale, sinks), {})
    out: Tensor = torch.ops.autospec_cpu.paged_attention(**as_attention(args))
    return out


@paged_mla.sampler
def sample(args: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """As paged_attention's."""
    floats = {
        name: torch.empty(args[name].shape, dtype=args[name].dtype, device=generator.device).normal_(generator=generator)
        for name in ("q_latent", "q_rope", "latent_pages", "sinks") if args[name] is not None
    }
    return {**args, **floats, **sample_places(args, args["q_latent"].shape[1], args["latent_pages"], generator)}


def random_case(
    device: torch.device, batch: int, q_len: int, context: int, is_tree: bool
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """DeepSeek-V3's sizes: 128 heads, 512 + 64, page 64, bfloat16 -> (q_latent, q_rope, latent_pages), the other arguments."""
    max_pages = (context + q_len + 63) // 64
    sizes = (batch, q_len, 128, 512), (batch, q_len, 128, 64), (1 + batch * max_pages, 64, 576)
    floats = tuple(torch.randn(size, device=device, dtype=torch.bfloat16) for size in sizes)
    page_table = (1 + torch.randperm(batch * max_pages, device=device)).reshape(batch, max_pages).int()
    kv_lens = torch.full((batch,), context, device=device, dtype=torch.int32)
    tree_mask = None
    if is_tree:
        below = torch.arange(1, q_len, device=device)
        parents = (torch.rand(batch, q_len - 1, device=device) * below).int()
        tree_mask = tree_tables(torch.nn.functional.pad(parents, (1, 0), value=-1))[0]
    return floats, (page_table, kv_lens, None, tree_mask, 192**-0.5)


def bench_cases(device: torch.device) -> Iterator[tuple[str, int, tuple[Any, ...]]]:
    """(case, bytes that must move, arguments): 128 heads of 512 + 64, bfloat16, page 64; chains, and a random tree of 32."""
    shapes = [(batch, q_len, False) for batch in (1, 16) for q_len in (1, 4)] + [(1, 32, False), (1, 32, True)]
    for context in (2048, 4096, 16384):
        for batch, q_len, is_tree in shapes:
            floats, rest = random_case(device, batch, q_len, context, is_tree)
            case = f"{batch} x {q_len}{' tree' if is_tree else ''}, {context}"
            moved = batch * (context + q_len) * 576 * 2 + 2 * floats[0].nbytes + floats[1].nbytes
            yield case, moved, (*floats, *rest)


def exact_result(arguments: tuple[Any, ...]) -> Tensor:
    """The reference in float64."""
    return paged_mla.reference(*(one.double() for one in arguments[:3]), *arguments[3:])


def bench(device: torch.device) -> Iterator[Measurement]:
    """Triton against the reference; exact is the reference in float64."""
    for case, moved, arguments in bench_cases(device):

        def mine(arguments=arguments) -> Tensor:
            return paged_mla_triton(*arguments)

        def reference(arguments=arguments) -> Tensor:
            return paged_mla.reference(*arguments)

        yield measure("paged_mla", case, mine, reference, moved, exact_result(arguments))
