"""Index scores of N new tokens per request over the pages of index keys (DeepSeek sparse attention): what dsa_topk ranks.

Hi index heads: index_q [B, N, Hi, Di], index_weights [B, N, Hi] float32; index_pages [num_pages, P, Di], one key per
token for all heads; page_table [B, max_pages] int32; kv_lens [B] int32, rows committed before this call; the keys of the
N new tokens were appended at slots kv_lens ... kv_lens + N - 1, by append_latent: a key is made of a rotated and an
unrotated part, as a latent row is; or, in float8 with index_scales [num_pages, P] float32, by append_index_keys. Any N runs as it
is: a node's scores do not depend on which nodes stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.append_index_keys import KEYS, dequantize_keys, quantize_keys
from autospec.kernels.dsa_topk import dsa_topk, shared_slots
from autospec.kernels.launch import (
    can_wait,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    no_float8,
    no_gpu,
    not_a_float,
    power_of_2,
    rows_of,
    tl,
    wrap_triton,
)
from autospec.kernels.page_blocks import block_pages, load_rows, row_numbers
from autospec.kernels.page_samples import sample_places
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, deviation, time_graph


@kernel_op()
def dsa_indexer_logits(
    index_q: Tensor, index_weights: Tensor, index_pages: Tensor, page_table: Tensor, kv_lens: Tensor,
    q_lens: Tensor | None = None, scale: float = 1.0, index_topk: int = 0, index_scales: Tensor | None = None,
) -> Tensor:
    """index_q [B, N, Hi, Di] -> [B, N, max_pages * P] float32: sum over heads of weight * relu(scale * q . k).

    All of it in float32, as transformers computes it. No causality here: dsa_topk applies it before it selects.
    Unspecified: slots from kv_lens + N on; nodes past q_lens [B] int32 (None: all are valid); requests whose every slot
    is selected anyway, kv_lens + N <= index_topk (0: none is). scale: 1 / sqrt(Di). index_scales: pages are float8_e4m3fn, and
    a row stands for row * its scale; queries stay as they are.
    """
    batch, head_dim, rows = index_q.shape[0], index_q.shape[3], page_table.reshape(-1)
    if index_scales is None:
        keys = index_pages.index_select(0, rows).float()
    else:
        bits = index_pages.view(torch.uint8).index_select(0, rows)
        keys = dequantize_keys(bits.view(KEYS), index_scales.index_select(0, rows))
    keys = keys.reshape(batch, 1, -1, head_dim)
    scores = torch.matmul(index_q.float(), keys.transpose(-1, -2)) * scale
    return torch.matmul(index_weights.float().unsqueeze(-2), torch.relu(scores)).squeeze(-2)


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """Pages are addressed by row number; a tile holds all heads of a node and whole keys."""
    index_q, index_pages, index_scales = args["index_q"], args["index_pages"], args["index_scales"]
    if index_scales is None and index_q.dtype != index_pages.dtype:
        return f"queries are {index_q.dtype}, pages {index_pages.dtype}"
    if index_scales is not None and index_pages.dtype != KEYS:
        return f"scaled keys are float8_e4m3fn, not {index_pages.dtype}"
    if (reason := not_a_float(index_q.dtype)) is not None:
        return reason
    if index_q.shape[2] > 64 or index_q.shape[3] > 128:
        return f"{index_q.shape[2]} index heads of {index_q.shape[3]} do not fit a tile of 64 x 128"
    if not index_pages.is_contiguous() or not (index_scales is None or index_scales.is_contiguous()):
        return "the pages are not contiguous"
    return no_gpu(args) or (None if index_scales is None else no_float8(index_q.device))


@dataclass(frozen=True)
class Tile:
    """How the work is cut: slots of a block, nodes that read it from the same program (more would leave a short context few
    programs); warps."""

    slots: int
    nodes: int
    warps: int


TILES = {2: Tile(128, 8, 4), 4: Tile(64, 8, 4)}  # by the bytes of an element; a guess


# B requests (i_b), groups of NODES nodes (i_g), H index heads (o_h), blocks of T slots (i_t, o_t), D elements (o_d).


@jit
def score_slots(
    p_q, p_weights, p_pages, p_scales, p_table, p_lens, p_q_lens, p_out, stride_qb, stride_qn, stride_qh, stride_wb, stride_wn,
    stride_tb, q_len, max_pages, index_topk, scale,
    H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, IS_WIDE: tl.constexpr, NODES: tl.constexpr, T: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, WAITS: tl.constexpr,
):
    """Scores of one block of slots for a group of nodes: its keys are read once."""
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_t, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    scale = tl.cast(scale, tl.float32)
    capacity = max_pages * PAGE
    length = tl.load(p_lens + i_b) + q_len
    last = q_len
    if p_q_lens is not None:
        last = tl.minimum(tl.load(p_q_lens + i_b), q_len)
    last = tl.minimum(last, (i_g + 1) * NODES)
    # A request whose every slot is selected, or a block behind its length, has nothing to score.
    last = tl.where((length > index_topk) & (i_t * T < length), last, 0)
    o_t, o_h, o_d = i_t * T + tl.arange(0, T), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    m_t = o_t < tl.minimum(length, capacity)
    m_h = o_h < H
    m_q = m_h[:, None] & (o_d < D)[None, :]
    if i_g * NODES < last:
        pages = block_pages(p_table + i_b * stride_tb, i_t, capacity, T, PAGE)
        b_row = row_numbers(pages, i_t, T, PAGE, IS_WIDE)
        b_k = load_rows(p_pages, b_row, m_t, o_d, D, D).to(p_q.dtype.element_ty)
        b_scale = scale
        if p_scales is not None:
            b_scale = (tl.load(p_scales + b_row, mask=m_t, other=0.0) * scale)[None, :]
        for i_n in range(i_g * NODES, last):
            p_rows = p_q + i_b * stride_qb + i_n * stride_qn + (o_h * stride_qh)[:, None] + o_d[None, :]
            b_q = tl.load(p_rows, mask=m_q, other=0.0)
            b_weight = tl.load(p_weights + i_b * stride_wb + i_n * stride_wn + o_h, mask=m_h, other=0.0).to(tl.float32)
            b_s = tl.maximum(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * b_scale, 0.0)
            b_out = tl.sum(b_s * b_weight[:, None], 0)
            tl.store(p_out + (i_b * q_len + i_n) * capacity + o_t, b_out, mask=m_t)


def score_pages(
    index_q: Tensor, index_weights: Tensor, index_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None,
    scale: float, index_topk: int, index_scales: Tensor | None, tile: Tile,
) -> Tensor:
    """Launch with a given tile."""
    q, weights = rows_of(index_q), rows_of(index_weights)
    batch, q_len, heads, head_dim = q.shape
    max_pages, page_size = page_table.shape[1], index_pages.shape[1]
    out = q.new_empty(batch, q_len, max_pages * page_size, dtype=torch.float32)
    grid = (max_pages * page_size + tile.slots - 1) // tile.slots, (q_len + tile.nodes - 1) // tile.nodes, batch
    wrap_triton(score_slots, waits=True)[grid](
        q, weights, index_pages, index_scales, page_table, kv_lens, q_lens, out, q.stride(0), q.stride(1), q.stride(2),
        weights.stride(0), weights.stride(1), page_table.stride(0), q_len, max_pages, index_topk, scale,
        H=heads, D=head_dim, PAGE=page_size, IS_WIDE=index_pages.numel() >= 2**31, NODES=tile.nodes, T=tile.slots,
        BLOCK_H=max(power_of_2(heads), 16), BLOCK_D=max(power_of_2(head_dim), 16), WAITS=can_wait(q), num_warps=tile.warps,
    )
    return out


@dsa_indexer_logits.implementation("triton", why_not=why_not_triton, waits=True)
def dsa_indexer_logits_triton(
    index_q: Tensor, index_weights: Tensor, index_pages: Tensor, page_table: Tensor, kv_lens: Tensor,
    q_lens: Tensor | None = None, scale: float = 1.0, index_topk: int = 0, index_scales: Tensor | None = None,
) -> Tensor:
    """One program per block of slots and group of nodes; heads are summed in registers and never written. Float8 keys are
    widened, exactly, to what the queries are."""
    tile = TILES[index_q.element_size()]
    return score_pages(index_q, index_weights, index_pages, page_table, kv_lens, q_lens, scale, index_topk, index_scales, tile)


@dsa_indexer_logits.expander
def expand(args: Mapping[str, Any]) -> dict[str, Any]:
    """B * N requests of one token: token j of a request sees kv_lens + j rows before itself, which is all that it may select."""
    q_len = args["index_q"].shape[1]
    rows = args["kv_lens"][:, None] + torch.arange(q_len, device=args["kv_lens"].device, dtype=torch.int32)
    tokens = {name: args[name].flatten(0, 1).unsqueeze(1) for name in ("index_q", "index_weights")}
    return {**args, **tokens, "page_table": args["page_table"].repeat_interleave(q_len, 0), "kv_lens": rows.flatten()}


@dsa_indexer_logits.sampler
def sample(args: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Random rows, pages in a random order, and texts that fill them, so that every score is specified."""
    floats = {
        name: torch.empty(args[name].shape, device=generator.device).normal_(generator=generator)
        for name in ("index_q", "index_weights", "index_pages")
    }
    if args["index_scales"] is not None:
        floats["index_pages"], floats["index_scales"] = quantize_keys(floats["index_pages"])
    floats = {name: tensor.to(args[name].dtype) for name, tensor in floats.items()}
    places = sample_places({**args, "tree_mask": None}, args["index_q"].shape[1], args["index_pages"], generator)
    capacity = args["page_table"].shape[1] * args["index_pages"].shape[1]
    places["kv_lens"] = torch.full_like(places["kv_lens"], capacity - args["index_q"].shape[1])
    return {**args, **floats, **places, "index_topk": 0}


def random_case(
    device: torch.device, batch: int, q_len: int, context: int
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Any, ...]]:
    """DeepSeek-V3.2's sizes: 64 heads of 128, page 64, bfloat16 -> (index_q, index_weights, index_pages), the other arguments."""
    max_pages = (context + q_len + 63) // 64
    index_q = torch.randn(batch, q_len, 64, 128, device=device, dtype=torch.bfloat16)
    index_weights = torch.randn(batch, q_len, 64, device=device) / 8
    index_pages = torch.randn(1 + batch * max_pages, 64, 128, device=device, dtype=torch.bfloat16)
    page_table = (1 + torch.randperm(batch * max_pages, device=device)).reshape(batch, max_pages).int()
    kv_lens = torch.full((batch,), context, device=device, dtype=torch.int32)
    return (index_q, index_weights, index_pages), (page_table, kv_lens, None, 128**-0.5, 2048)


def bench(device: torch.device) -> Iterator[Measurement]:
    """64 heads of 128, bfloat16, page 64, and the same keys in float8, with the share of the selection that they leave as it was;
    exact is the reference in float64, in the slots that hold rows."""
    for context in (4096, 32768, 131072):
        for q_len in (1, 2, 4):
            floats, rest = random_case(device, 1, q_len, context)
            yield _measured(floats, rest, None, context)
            index_pages, index_scales = quantize_keys(floats[2])
            yield _measured((*floats[:2], index_pages), rest, index_scales, context, same_selection(floats, rest))


def same_selection(floats: tuple[Tensor, Tensor, Tensor], rest: tuple[Any, ...]) -> Tensor:
    """Arguments with keys as they are -> the share of each node's selection that float8 keys select too, [B, N]."""
    index_pages, index_scales = quantize_keys(floats[2])
    plain = dsa_indexer_logits(*floats, *rest)
    coarse = dsa_indexer_logits(*floats[:2], index_pages, *rest, index_scales)
    mine, theirs = (dsa_topk(logits, rest[1], rest[4]) for logits in (coarse, plain))
    return shared_slots(mine, theirs)


def _measured(
    floats: tuple[Tensor, Tensor, Tensor], rest: tuple[Any, ...], index_scales: Tensor | None, context: int,
    same: Tensor | None = None,
) -> Measurement:  # fmt: skip
    """One line of a single request."""
    index_q, index_weights, index_pages = floats
    q_len = index_q.shape[1]
    held, table = slice(0, context + q_len), rest[0][0].long()

    def mine() -> Tensor:
        return dsa_indexer_logits_triton(*floats, *rest, index_scales)

    def reference() -> Tensor:
        return dsa_indexer_logits.reference(*floats, *rest, index_scales)

    keys = index_pages.float()[table] if index_scales is None else dequantize_keys(index_pages, index_scales)[table]
    scores = torch.relu(index_q[0].double() @ keys.double().flatten(0, 1)[held].T * rest[3])
    exact = (index_weights[0].double()[:, None] @ scores).squeeze(1)
    error = deviation(mine()[0][:, held], exact)
    row = 128 * index_pages.element_size() + (0 if index_scales is None else 4)
    moved = (context + q_len) * (row + q_len * 4) + index_q.nbytes + index_weights.nbytes
    told = "" if same is None else f", float8 keys (same selection: mean {100 * same.mean():.1f}%, worst {100 * same.min():.1f}%)"
    times = time_graph(mine), time_graph(reference)
    return Measurement("dsa_indexer_logits", f"1 x {q_len}, {context}{told}", *times, moved, error)
