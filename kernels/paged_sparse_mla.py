"""Attention in latent space over the slots that dsa_topk selected (DeepSeek sparse attention): paged_mla on a choice of rows.

q_latent [B, N, H, kv_lora_rank], q_rope [B, N, H, qk_rope_head_dim] and latent_pages as in paged_mla; page_table
[B, max_pages] int32; indices [B, N, K] int32, slots of the request, each at most once, in any order, -1 where there is none.
What a node may see is decided by whoever selected: this op knows no lengths and no tree. sinks [H] as in paged_attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.attention import attend
from autospec.kernels.dsa_indexer_logits import dsa_indexer_logits_triton
from autospec.kernels.dsa_indexer_logits import random_case as random_index_case
from autospec.kernels.dsa_topk import dsa_topk_triton
from autospec.kernels.launch import (
    can_wait,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    multiprocessors,
    power_of_2,
    rows_of,
    tl,
    wrap_triton,
)
from autospec.kernels.page_blocks import load_rows
from autospec.kernels.paged_mla import (
    Tile,
    fold_scores,
    paged_mla_triton,
    pick_tile,
    random_case,
    score_latents,
    start_at_sinks,
)
from autospec.kernels.paged_mla import why_not_triton as why_not_triton_mla
from autospec.kernels.registry import kernel_op
from autospec.kernels.splits import combine, split_buffers, store_share
from autospec.kernels.timing import Measurement, measure


@kernel_op()
def paged_sparse_mla(
    q_latent: Tensor, q_rope: Tensor, latent_pages: Tensor, page_table: Tensor, indices: Tensor, scale: float = 1.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """q_latent [B, N, H, kv_lora_rank], q_rope [B, N, H, rope] -> [B, N, H, kv_lora_rank] in q_latent's dtype.

    indices [B, N, K] int32: the slots to attend to, -1 for none; a row without any becomes 0. scale as in paged_mla.
    """
    batch, q_len, heads, kv_lora_rank = q_latent.shape
    page_size = latent_pages.shape[1]
    slots = indices.clamp(min=0).long()
    pages = page_table.long().gather(1, (slots // page_size).flatten(1)).reshape(slots.shape)
    rows = latent_pages[pages, slots % page_size].reshape(batch * q_len, -1, 1, latent_pages.shape[2])
    q = torch.cat([q_latent, q_rope], -1).reshape(batch * q_len, 1, heads, -1)
    is_there = (indices >= 0).reshape(batch * q_len, 1, -1)
    out = attend(q, rows, rows[..., :kv_lora_rank], is_there, sinks, scale, 0.0)
    return torch.where(is_there.any(-1)[:, :, None, None], out, 0.0).reshape(q_latent.shape)


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """The tiles are those of paged_mla."""
    return why_not_triton_mla(args)


# As paged_mla's: rows of all requests from which a tile serves. Not tuned, only sized: blocks of 32 slots fit twice with room
# to spare; 64 take 225 of 227 KB of shared memory (compiled for sm_90 by triton 3.9; neither spills).
TILES = {0: Tile(64, 32, 64, 8, 2)}
WIDE_TILES = {0: Tile(16, 16, 64, 4, 2)}


def choose_tile(q_latent: Tensor, indices: Tensor) -> Tile:
    """A tile and as many splits as fill the GPU, from shapes alone; every node has slots of its own."""
    batch, q_len, heads, kv_lora_rank = q_latent.shape
    tiles = TILES if power_of_2(kv_lora_rank) * q_latent.element_size() <= 1024 else WIDE_TILES
    return pick_tile(tiles, batch * q_len * heads, heads, indices.shape[2], multiprocessors(q_latent))


# B requests (i_b), N nodes (i_n), H heads. Every node has slots of its own, so a tile holds M heads of one node (o_m) and T
# of its K selected slots (o_t); S splits of the selected (i_s); R and E elements of a latent row, as in paged_mla.


@jit
def attend_selected(
    p_q, p_qe, p_pages, p_table, p_indices, p_sinks, p_out, p_lse, stride_qb, stride_qn, stride_qh, stride_eb,
    stride_en, stride_eh, stride_tb, stride_ib, stride_in, q_len, scale,
    H: tl.constexpr, R: tl.constexpr, E: tl.constexpr, K: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    IS_WIDE: tl.constexpr, M: tl.constexpr, T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    WAITS: tl.constexpr,
):
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_n, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_m, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    factor = tl.cast(scale, tl.float32) * 1.4426950408889634  # log2(e)
    o_m = i_m * M + tl.arange(0, M)
    o_r, o_e = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)
    m_m = o_m < H
    p_rows = p_q + i_b * stride_qb + i_n * stride_qn + (o_m * stride_qh)[:, None] + o_r[None, :]
    b_q = tl.load(p_rows, mask=m_m[:, None] & (o_r < R)[None, :], other=0.0)
    p_rows = p_qe + i_b * stride_eb + i_n * stride_en + (o_m * stride_eh)[:, None] + o_e[None, :]
    b_qe = tl.load(p_rows, mask=m_m[:, None] & (o_e < E)[None, :], other=0.0)
    p_indices += i_b * stride_ib + i_n * stride_in
    p_table += i_b * stride_tb

    b_top = tl.full((M,), -1.0e30, tl.float32)
    b_sum = tl.zeros((M, T), tl.float32)
    b_acc = tl.zeros((M, BLOCK_R), tl.float32)
    if p_sinks is not None and i_s == 0:
        b_top, b_sum = start_at_sinks(p_sinks, o_m, m_m, b_sum)
    for i_t in range(i_s * T, K, SPLITS * T):  # the splits take turns: what is selected stands in front
        o_t = i_t + tl.arange(0, T)
        b_slot = tl.load(p_indices + o_t, mask=o_t < K, other=-1)
        m_t, lowest = b_slot >= 0, tl.min(b_slot, 0)
        b_row = tl.load(p_table + b_slot // PAGE, mask=m_t, other=0)
        if IS_WIDE:
            b_row = b_row.to(tl.int64)
        b_row = b_row * PAGE + b_slot % PAGE
        b_c = load_rows(p_pages, b_row, m_t, o_r, R + E, R)
        b_e = load_rows(p_pages + R, b_row, m_t, o_e, R + E, E)
        b_s = score_latents(b_q, b_qe, b_c, b_e, lowest < -1)
        if lowest < 0:
            b_s = tl.where(m_t[None, :], b_s, -float("inf"))
        b_top, b_sum, b_acc = fold_scores(b_s, b_c, b_top, b_sum, b_acc, factor)

    o_row = (i_b * q_len + i_n) * H + o_m
    store_share(p_out, p_lse, o_row, i_s, m_m, b_top, tl.sum(b_sum, 1), b_acc, o_r, R, SPLITS)


def attend_indices(
    q_latent: Tensor, q_rope: Tensor, latent_pages: Tensor, page_table: Tensor, indices: Tensor, scale: float,
    sinks: Tensor | None, tile: Tile,
) -> Tensor:
    """Launch with a given tile."""
    q, qe, indices = rows_of(q_latent), rows_of(q_rope), rows_of(indices)
    batch, q_len, heads, kv_lora_rank = q.shape
    out = q.new_empty(q.shape)
    part, lse = split_buffers(out, tile.splits)
    wrap_triton(attend_selected, waits=True)[((heads + tile.rows - 1) // tile.rows * tile.splits, q_len, batch)](
        q, qe, latent_pages, page_table, indices, sinks, part, lse, q.stride(0), q.stride(1), q.stride(2),
        qe.stride(0), qe.stride(1), qe.stride(2), page_table.stride(0), indices.stride(0), indices.stride(1), q_len, scale,
        H=heads, R=kv_lora_rank, E=qe.shape[3], K=indices.shape[2], PAGE=latent_pages.shape[1], SPLITS=tile.splits,
        IS_WIDE=latent_pages.numel() >= 2**31, M=tile.rows, T=tile.slots,
        BLOCK_R=max(power_of_2(kv_lora_rank), 16), BLOCK_E=max(power_of_2(qe.shape[3]), 16),
        WAITS=can_wait(q), num_warps=tile.warps, num_stages=tile.stages,
    )
    combine(part, lse, out, tile.splits, columns=128, warps=4 if tile.splits >= 16 else 1)
    return out


@paged_sparse_mla.implementation("triton", why_not=why_not_triton, waits=True)
def paged_sparse_mla_triton(
    q_latent: Tensor, q_rope: Tensor, latent_pages: Tensor, page_table: Tensor, indices: Tensor, scale: float = 1.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Flash attention over gathered latent rows: each serves as key and value of all heads of a tile."""
    tile = choose_tile(q_latent, indices)
    return attend_indices(q_latent, q_rope, latent_pages, page_table, indices, scale, sinks, tile)


def bench(device: torch.device) -> Iterator[Measurement]:
    """128 heads of 512 + 64, bfloat16, page 64, 2048 random slots a node; exact is the reference in float64."""
    for context in (4096, 32768, 131072):
        for q_len in (1, 2, 4):
            floats, (page_table, *_, scale) = random_case(device, 1, q_len, context, False)
            indices = torch.rand(1, q_len, context, device=device).topk(2048).indices.sort(-1).values.int()
            rest = page_table, indices, scale
            exact = paged_sparse_mla.reference(*(one.double() for one in floats), *rest)

            def mine(floats=floats, rest=rest) -> Tensor:
                return paged_sparse_mla_triton(*floats, *rest)

            def reference(floats=floats, rest=rest) -> Tensor:
                return paged_sparse_mla.reference(*floats, *rest)

            moved = q_len * 2048 * 576 * 2 + 2 * floats[0].nbytes + floats[1].nbytes
            yield measure("paged_sparse_mla", f"1 x {q_len} of {context}", mine, reference, moved, exact)
    yield from bench_layer(device)


def bench_layer(device: torch.device) -> Iterator[Measurement]:
    """What a layer does, index scores, selection and attention, with 64 index heads of 128 and index_topk 2048; the column of
    the reference is dense paged_mla over the same rows. Scores are random, so what is selected lies scattered; its rows are
    counted once for every node, but never more than there are. Exact attends in float64 to what was selected.
    """
    for batch, context, q_len in product((1, 16), (4096, 16000, 32768, 131072), (1, 2, 4)):
        floats, dense = random_case(device, batch, q_len, context, False)
        page_table, kv_lens, *_, scale = dense
        index_floats, index_rest = random_index_case(device, batch, q_len, context)
        logits_of = partial(dsa_indexer_logits_triton, *index_floats, page_table, *index_rest[1:])

        def mine(floats=floats, logits_of=logits_of, page_table=page_table, kv_lens=kv_lens, scale=scale) -> Tensor:
            return paged_sparse_mla_triton(*floats, page_table, dsa_topk_triton(logits_of(), kv_lens, 2048), scale)

        def in_full(floats=floats, dense=dense) -> Tensor:
            return paged_mla_triton(*floats, *dense)

        indices = dsa_topk_triton(logits_of(), kv_lens, 2048)
        exact = paged_sparse_mla.reference(*(one.double() for one in floats), page_table, indices, scale)
        rows = min(q_len * 2048, context + q_len)
        moved = batch * (rows * 576 * 2 + (context + q_len) * 128 * 2)
        moved += 2 * floats[0].nbytes + floats[1].nbytes + index_floats[0].nbytes + index_floats[1].nbytes
        yield measure("DSA, one layer", f"{batch} x {q_len}, {context}", mine, in_full, moved, exact)
