"""A layer of experts: every token is sent to k of them and their results are summed, weighted.

x [T, H]; top_k_index [T, k] int64; top_k_weights [T, k]; gate_up [E, 2 I, H], the gate's rows first; down [E, H, I].
An index outside 0 ... E - 1 routes to no expert: absent draft nodes and padding cost nothing and change nothing.
Tokens that share an expert share one read of its weights, so that verifying N tokens reads each needed expert once.
A token's result is summed over its own k in their order, whoever else is in the batch: no atomics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from autospec.kernels.launch import (
    can_wait,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    no_gpu,
    not_a_float,
    power_of_2,
    rows_of,
    tl,
    wrap_triton,
)
from autospec.kernels.native import not_on_cpu
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu, "gelu": gelu, "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh"), "relu": torch.relu,
}  # fmt: skip


def _fake(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor, activation: str = "silu"
) -> Tensor:
    return x.new_empty(x.shape)


def _mix(results: Tensor, top_k_index: Tensor, top_k_weights: Tensor, num_experts: int) -> Tensor:
    """results [T, k, H], weights [T, k] -> [T, H]: the weighted sum over those that exist, in float32."""
    exists = (top_k_index >= 0) & (top_k_index < num_experts)
    weighted = results.float() * top_k_weights.float()[..., None]
    return torch.where(exists[..., None], weighted, 0.0).sum(1).to(results.dtype)


@kernel_op(fake=_fake)
def experts(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor, activation: str = "silu"
) -> Tensor:
    """x [T, H] -> [T, H]: sum over k of weight * down[e] (activation(gate[e] x) * (up[e] x)), e the token's k-th expert.

    activation: "silu", "gelu", "gelu_pytorch_tanh" or "relu".
    """
    exists = (top_k_index >= 0) & (top_k_index < gate_up.shape[0])
    safe = torch.where(exists, top_k_index, 0)
    results = []
    for chosen in safe.unbind(1):
        gate, up = torch.bmm(gate_up.index_select(0, chosen), x[:, :, None])[..., 0].chunk(2, -1)
        hidden = ACTIVATIONS[activation](gate) * up
        results.append(torch.bmm(down.index_select(0, chosen), hidden[:, :, None])[..., 0])
    return _mix(torch.stack(results, 1), top_k_index, top_k_weights, gate_up.shape[0])


def why_not_cpu(args: Mapping[str, Any]) -> str | None:
    """Tokens are sorted on the host, which a CPU need not wait for."""
    return not_on_cpu(args)


@experts.implementation("cpu", why_not=why_not_cpu)
def experts_cpu(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor, activation: str = "silu"
) -> Tensor:
    """One matrix product per expert that has tokens."""
    (tokens, top_k), num_experts = top_k_index.shape, gate_up.shape[0]
    routed = top_k_index.reshape(-1)
    routed = torch.where((routed >= 0) & (routed < num_experts), routed, num_experts)
    order = torch.argsort(routed, stable=True)
    results = x.new_zeros(tokens * top_k, x.shape[1])
    start = 0
    for expert, count in enumerate(torch.bincount(routed, minlength=num_experts + 1)[:num_experts].tolist()):
        if count:
            pairs = order[start : start + count]
            gate, up = linear(x[pairs // top_k], gate_up[expert]).chunk(2, -1)
            results[pairs] = linear(ACTIVATIONS[activation](gate) * up, down[expert])
        start += count
    return _mix(results.reshape(tokens, top_k, -1), top_k_index, top_k_weights, num_experts)


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """Weights are addressed as dense matrices; tiles are bounded by one block of experts."""
    x, gate_up, down = args["x"], args["gate_up"], args["down"]
    if not x.dtype == gate_up.dtype == down.dtype:
        return f"tokens are {x.dtype}, weights {gate_up.dtype} and {down.dtype}"
    if (reason := not_a_float(x.dtype)) is not None:
        return reason
    if not (gate_up.is_contiguous() and down.is_contiguous()):
        return "the experts' weights are not contiguous"
    if gate_up.shape[0] > 1024:
        return f"{gate_up.shape[0]} experts do not fit a block of 1024"
    if args["activation"] not in ("silu", "gelu_pytorch_tanh", "relu"):
        return f"activation {args['activation']} has no kernel"
    return no_gpu(args)


@dataclass(frozen=True)
class Tile:
    """How a product is cut: rows (token, expert), columns and depth of a tile; warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def choose_tile(x: Tensor, top_k_index: Tensor, num_experts: int) -> Tile:
    """Rows for the mean number of tokens per expert, if they spread evenly. Sized, not tuned."""
    pairs = top_k_index.shape[0] * top_k_index.shape[1]
    depth = 128 // x.element_size()
    if pairs <= 16 * num_experts:
        return Tile(16, 64, 2 * depth, 4, 4)
    return Tile(64, 128, depth, 4, 3) if pairs <= 128 * num_experts else Tile(128, 128, depth, 8, 3)


# S = T k pairs of a token and one of its experts, numbered token by token; N experts (o_x); a tile holds M pairs of one
# expert (o_m), C columns (o_c) and K elements of depth (o_k). `order` holds the pairs sorted by expert, those of no expert
# last; `plan` [3, most tiles]: a tile's expert (-1: none), its first place in `order` and the place behind its last.


@jit
def expert_of(p_index, o_j, pairs, experts_count):
    """A pair's expert; experts_count where there is none, or no pair."""
    b_expert = tl.load(p_index + o_j, mask=o_j < pairs, other=-1).to(tl.int32)
    return tl.where((b_expert >= 0) & (b_expert < experts_count), b_expert, experts_count)


@jit
def sort_pairs(
    p_index, p_order, p_plan, pairs, experts_count, most_tiles,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WAITS: tl.constexpr,
):
    """The first program cuts every expert's pairs into tiles of M. The others find the place of S pairs each in the order by
    counting those before them: stable, and no one waits for another."""
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    if tl.program_id(0) == 0:
        o_x = tl.arange(0, N)
        b_count = tl.zeros((N,), tl.int32)
        for i_block in range(0, pairs, BLOCK):
            b_expert = expert_of(p_index, i_block + tl.arange(0, BLOCK), pairs, experts_count)
            b_count += tl.sum((b_expert[None, :] == o_x[:, None]).to(tl.int32), 1)
        b_count = tl.where(o_x < experts_count, b_count, 0)
        b_tiles = (b_count + M - 1) // M
        b_end = tl.cumsum(b_count, 0)
        b_end_tile = tl.cumsum(b_tiles, 0)
        for i_block in range(0, most_tiles, 16):
            o_tile = i_block + tl.arange(0, 16)
            b_number = o_tile[:, None] - (b_end_tile - b_tiles)[None, :]  # of a tile among those of an expert
            m_own = (b_number >= 0) & (b_number < b_tiles[None, :])
            b_first = tl.where(m_own, (b_end - b_count)[None, :] + b_number * M, 0)
            m_tile = o_tile < most_tiles
            tl.store(p_plan + o_tile, tl.sum(tl.where(m_own, o_x[None, :] + 1, 0), 1) - 1, mask=m_tile)
            tl.store(p_plan + most_tiles + o_tile, tl.sum(b_first, 1), mask=m_tile)
            tl.store(p_plan + 2 * most_tiles + o_tile, tl.sum(tl.where(m_own, b_end[None, :], 0), 1), mask=m_tile)
    else:
        o_s = (tl.program_id(0) - 1) * S + tl.arange(0, S)
        b_expert = expert_of(p_index, o_s, pairs, experts_count)
        b_place = tl.zeros((S,), tl.int32)
        for i_block in range(0, pairs, BLOCK):
            o_j = i_block + tl.arange(0, BLOCK)
            b_other = expert_of(p_index, o_j, pairs, experts_count)
            m_tie = (b_other[None, :] == b_expert[:, None]) & (o_j[None, :] < o_s[:, None])
            m_before = ((b_other[None, :] < b_expert[:, None]) | m_tie) & (o_j < pairs)[None, :]
            b_place += tl.sum(m_before.to(tl.int32), 1)
        tl.store(p_order + b_place, o_s, mask=o_s < pairs)


@jit
def multiply_experts(
    p_x, p_weight, p_order, p_plan, p_out, stride_x, most_tiles, columns, depth, top_k,
    ACTIVATION: tl.constexpr, M: tl.constexpr, C: tl.constexpr, K: tl.constexpr, IS_EVEN: tl.constexpr,
    WAITS: tl.constexpr,
):
    """Rows of out [S, columns] at their pair's number: weight[e] times x of the pair's token (or the pair's own row where
    top_k is 1); with an activation, weight has 2 `columns` rows and out is activation(gate) * up."""
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_t, i_c = tl.program_id(0), tl.program_id(1)
    i_expert = tl.load(p_plan + i_t).to(tl.int64)
    if i_expert >= 0:
        o_place = tl.load(p_plan + most_tiles + i_t) + tl.arange(0, M)
        m_m = o_place < tl.load(p_plan + 2 * most_tiles + i_t)
        o_pair = tl.load(p_order + o_place, mask=m_m, other=0).to(tl.int64)
        o_c, o_k = i_c * C + tl.arange(0, C), tl.arange(0, K)
        m_c = o_c < columns
        p_rows = p_x + (o_pair // top_k * stride_x)[:, None] + o_k[None, :]
        if ACTIVATION is None:
            p_weight += i_expert * columns * depth
        else:
            p_weight += i_expert * 2 * columns * depth
        p_columns = p_weight + (o_c.to(tl.int64) * depth)[:, None] + o_k[None, :]
        b_acc = tl.zeros((M, C), tl.float32)
        b_up = tl.zeros((M, C), tl.float32)
        for i_k in range(0, depth, K):
            if IS_EVEN:
                b_x = tl.load(p_rows + i_k, mask=m_m[:, None], other=0.0)
                m_w = m_c[:, None]
            else:
                b_x = tl.load(p_rows + i_k, mask=m_m[:, None] & (i_k + o_k < depth)[None, :], other=0.0)
                m_w = m_c[:, None] & (i_k + o_k < depth)[None, :]
            b_w = tl.load(p_columns + i_k, mask=m_w, other=0.0)
            b_acc = tl.dot(b_x, tl.trans(b_w), b_acc, input_precision="ieee")
            if ACTIVATION is not None:
                b_w = tl.load(p_columns + tl.cast(columns, tl.int64) * depth + i_k, mask=m_w, other=0.0)
                b_up = tl.dot(b_x, tl.trans(b_w), b_up, input_precision="ieee")
        if ACTIVATION is not None:
            # Rounded as the matrices' results are where they are not fused.
            b_gate = b_acc.to(p_out.dtype.element_ty).to(tl.float32)
            if ACTIVATION == "silu":
                b_gate = b_gate / (1.0 + tl.exp(-b_gate))
            elif ACTIVATION == "relu":
                b_gate = tl.maximum(b_gate, 0.0)
            else:
                b_inner = 0.7978845608028654 * (b_gate + 0.044715 * b_gate * b_gate * b_gate)  # sqrt(2 / pi)
                b_gate = b_gate * (1.0 - 1.0 / (tl.exp(2.0 * b_inner) + 1.0))
            b_acc = b_gate * b_up.to(p_out.dtype.element_ty).to(tl.float32)
        p_rows = p_out + (o_pair * columns)[:, None] + o_c[None, :]
        tl.store(p_rows, b_acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])


@jit
def mix_results(
    p_results, p_index, p_weights, p_out, columns, experts_count, stride_wt,
    TOP_K: tl.constexpr, C: tl.constexpr, WAITS: tl.constexpr,
):
    """C columns of one token: its results in their order, weighted; those of no expert were never written."""
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_t = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * C + tl.arange(0, C)
    b_sum = tl.zeros((C,), tl.float32)
    for i_k in tl.static_range(TOP_K):
        expert = tl.load(p_index + i_t * TOP_K + i_k)
        m_c = tl.where((expert >= 0) & (expert < experts_count), o_c, columns) < columns
        b_result = tl.load(p_results + (i_t * TOP_K + i_k) * columns + o_c, mask=m_c, other=0.0)
        b_sum += b_result.to(tl.float32) * tl.load(p_weights + i_t * stride_wt + i_k).to(tl.float32)
    tl.store(p_out + i_t * columns + o_c, b_sum.to(p_out.dtype.element_ty), mask=o_c < columns)


def run_experts(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor, activation: str, tile: Tile
) -> Tensor:
    """Launch with a given tile. The grids are as large as the worst routing needs; programs without a tile end at once."""
    x, top_k_index, top_k_weights = rows_of(x), top_k_index.contiguous(), rows_of(top_k_weights)
    (tokens, top_k), num_experts = top_k_index.shape, gate_up.shape[0]
    width, inner = x.shape[1], down.shape[2]
    pairs = tokens * top_k
    most_tiles = min(pairs, num_experts + pairs // tile.rows)
    order = top_k_index.new_empty(pairs, dtype=torch.int32)
    plan = top_k_index.new_empty(3, most_tiles, dtype=torch.int32)
    hidden, results = x.new_empty(pairs, inner), x.new_empty(pairs, width)
    out = x.new_empty(tokens, width)
    waits = can_wait(x)
    wrap_triton(sort_pairs, waits=True)[(1 + (pairs + 15) // 16,)](
        top_k_index, order, plan, pairs, num_experts, most_tiles, S=16, M=tile.rows, N=max(power_of_2(num_experts), 16),
        BLOCK=min(max(power_of_2(pairs), 16), 64), WAITS=waits,
    )
    for source, stride, weight, made, columns, depth, share, name in (
        (x, x.stride(0), gate_up, hidden, inner, width, top_k, activation),
        (hidden, inner, down, results, width, inner, 1, None),
    ):
        wrap_triton(multiply_experts, waits=True)[(most_tiles, (columns + tile.columns - 1) // tile.columns)](
            source, weight, order, plan, made, stride, most_tiles, columns, depth, share, ACTIVATION=name, M=tile.rows,
            C=tile.columns, K=tile.depth, IS_EVEN=depth % tile.depth == 0, WAITS=waits,
            num_warps=tile.warps, num_stages=tile.stages,
        )
    span = min(max(power_of_2(width), 16), 1024)
    wrap_triton(mix_results, waits=True)[(tokens, (width + span - 1) // span)](
        results, top_k_index, top_k_weights, out, width, num_experts, top_k_weights.stride(0), TOP_K=top_k, C=span,
        WAITS=waits,
    )
    return out


@experts.implementation("triton", why_not=why_not_triton, waits=True)
def experts_triton(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor, activation: str = "silu"
) -> Tensor:
    """Sort, two grouped products and a sum, without asking the host."""
    tile = choose_tile(x, top_k_index, gate_up.shape[0])
    return run_experts(x, top_k_index, top_k_weights, gate_up, down, activation, tile)


def bench(device: torch.device) -> Iterator[Measurement]:
    """DeepSeek-V3's experts, 32 of them: 7168 -> 2048 -> 7168, 8 per token, bfloat16; exact is the reference in float64."""
    gate_up = torch.randn(32, 4096, 7168, device=device, dtype=torch.bfloat16) * 7168**-0.5
    down = torch.randn(32, 7168, 2048, device=device, dtype=torch.bfloat16) * 2048**-0.5
    for tokens in (1, 4, 16, 64, 512):
        x = torch.randn(tokens, 7168, device=device, dtype=torch.bfloat16)
        top_k_weights, top_k_index = torch.rand(tokens, 32, device=device).topk(8)
        args = x, top_k_index, top_k_weights, gate_up, down
        first = slice(0, min(tokens, 4))
        few = experts_cpu(x[first].double(), top_k_index[first], top_k_weights[first].double(), gate_up.double(), down.double())

        def mine(args=args) -> Tensor:
            return experts_triton(*args)

        def reference(args=args) -> Tensor:
            return experts.reference(*(one[:4] for one in args[:3]), *args[3:])

        error = float((mine()[first].double() - few).abs().max() / few.abs().max())
        moved = len(top_k_index.unique()) * 3 * 7168 * 2048 * 2 + 2 * x.nbytes
        timed = measure("experts", f"{tokens} tokens, 8 of 32 (reference: at most 4 tokens)", mine, reference, moved, mine())
        yield Measurement(timed.op, timed.case, timed.microseconds, timed.reference_microseconds, moved, error)
