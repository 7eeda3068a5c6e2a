"""A linear layer of few rows that takes in its neighbours: the RMSNorm before it, the gated activation and the residual after.

x [..., I], weight [O, I] (gated: [2 O, I], gate rows first), bias [O or 2 O], scales [O or 2 O], norm_weight [I],
squares [..., I / 32], residual [..., O] -> [..., O]. With so few rows a layer costs the time of reading its weights, and every
small kernel between two layers leaves the memory idle.

The Triton kernel streams the weights once for all rows, accumulates in float32 and rounds where the unfused ops round, but
for the norm: x * norm_weight is rounded once and the row's 1 / rms multiplies the sum. Norming in the loop costs time
(4 to 6 us of a Llama-3.1-8B layer's 170, and all of what is gained from 17 rows on), so the layer before does it
(`fused_linear_normed`): it knows the next norm's weight and leaves x * norm_weight and sums of squares behind.
A row's result does not depend on the other rows, nor on how many there are up to the next tile (16, 32, 64, 128).

One Llama-3.1-8B layer of 8 rows with attention over 700 tokens, H100 80GB SXM, triton 3.6, 2026-11-21, us (the weights' bytes
take 145 at 3.0 TB/s):
    norms in the loop, kernels one after the other       173.7
    the next kernel launched at the start of each        184.8   (its programs take the place of late ones of this)
    the next kernel launched when a program is done      172.0
    norms by the layer before; gate and up: 8 warps      167.6
    the next kernel launched 512 inputs before the end,
    128 inputs of its weights fetched while it waits     165.2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.launch import (
    can_wait,
    constant,
    fetch_line,
    fit_stages,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    no_gpu,
    power_of_2,
    tl,
    wrap_triton,
)
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure

MOST = 128  # rows; past them arithmetic counts, and cuBLAS is faster
MOST_SCALED = 64  # rows of a float8 layer: more were not timed
MOST_NORMED = 16  # rows normed in the loop, by every program (qkv, 64 rows: 30.5 us; cuBLAS without the norm 20.9)
PART = 32  # outputs whose squares are summed
ACTIVATIONS = ("silu", "gelu_tanh")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [O, I] -> float8_e4m3fn [O, I] and scales [O] float32; a row's largest value becomes the largest float8."""
    scales = (weight.float().abs().amax(-1) / torch.finfo(torch.float8_e4m3fn).max).clamp(min=1e-30)
    return (weight.float() / scales[:, None]).to(torch.float8_e4m3fn), scales


@kernel_op()
def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None,
    norm_weight: Tensor | None = None, squares: Tensor | None = None, residual: Tensor | None = None, eps: float = 0.0,
    activation: str = "",
) -> Tensor:
    """x [..., I], weight [O, I] -> [..., O]: residual + act(gate) * up, or residual + y, of y = norm(x) @ (weight * scales).T + b.

    scales float32: weight is float8_e4m3fn and row o stands for weight[o] * scales[o]. norm_weight: x is normed; squares
    float32: x is the product with the norm's weight already, and its row had this sum of squares; neither: x as it is.
    activation "": not gated.
    """
    if norm_weight is not None:
        wide = x.float()
        x = norm_weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    if squares is not None:
        x = (x.float() * torch.rsqrt(squares.sum(-1, keepdim=True) / x.shape[-1] + eps)).to(x.dtype)
    if scales is not None:
        weight = (weight.float() * scales[:, None]).to(x.dtype)
    y = torch.nn.functional.linear(x, weight, bias)
    if activation:
        gate, up = y.chunk(2, -1)
        gate = torch.nn.functional.silu(gate) if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
        y = gate * up
    return y if residual is None else residual + y


@kernel_op()
def fused_linear_normed(
    x: Tensor, weight: Tensor, next_norm: Tensor, bias: Tensor | None = None, scales: Tensor | None = None,
    norm_weight: Tensor | None = None, squares: Tensor | None = None, residual: Tensor | None = None, eps: float = 0.0,
    activation: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., I] -> fused_linear's y [..., O], y * next_norm [O], and sums of 32 squares of y, [..., O / 32] float32."""
    y = fused_linear.reference(x, weight, bias, scales, norm_weight, squares, residual, eps, activation)
    return y, y * next_norm, y.float().pow(2).unflatten(-1, (-1, PART)).sum(-1)


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """Tensor cores, whole tiles, few rows."""
    x, weight = args["x"], args["weight"]
    rows, inputs = x.numel() // x.shape[-1], x.shape[-1]
    outputs = weight.shape[0] // (2 if args["activation"] else 1)
    if (elsewhere := no_gpu(args)) is not None:
        return elsewhere
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"inputs are {x.dtype}, not bfloat16 or float16"
    if args["scales"] is None and weight.dtype != x.dtype:
        return f"inputs are {x.dtype}, the weight is {weight.dtype}"
    if args["scales"] is not None and weight.dtype != torch.float8_e4m3fn:
        return f"a scaled weight is float8_e4m3fn, not {weight.dtype}"
    most = MOST if args["scales"] is None else MOST_SCALED
    if rows > most:
        return f"{rows} rows are more than {most}"
    if inputs % 64 or outputs % 32:
        return f"a weight of {weight.shape[0]} x {inputs} is not made of tiles of 32 x 64"
    if args["activation"] not in ("", *ACTIVATIONS):
        return f"activation {args['activation']!r} is not one of {', '.join(ACTIVATIONS)}"
    if x.dtype == torch.float16 and not all(args.get(name) is None for name in ("norm_weight", "squares", "next_norm")):
        return "x times the norm's weight, before its division, may leave float16's range"
    if args["norm_weight"] is not None and rows > MOST_NORMED:
        return f"{rows} rows are more than {MOST_NORMED} to norm in every program"
    if not weight.is_contiguous():
        return "the weight is not contiguous"
    for name, size in (("norm_weight", inputs), ("next_norm", outputs)):
        vector = args.get(name)
        if vector is not None and (vector.shape != (size,) or not vector.is_contiguous()):
            return f"{name} is {list(vector.shape)}, not {size} numbers in a row"
    return None


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Args:
        outputs: of a program. inputs: of a step of its loop. stages: steps in flight. warps: of a program.
        ahead: inputs of the weight that are fetched before the wait for the kernel before.
        early: inputs before the end where the next kernel may start.
        splits: programs that share the inputs of an output, added up by a second launch.
    """

    outputs: int
    inputs: int
    stages: int
    warps: int
    ahead: int = 128
    early: int = 512
    splits: int = 1


def choose_tile(rows: int, outputs: int, inputs: int, is_gated: bool, is_scaled: bool, can_split: bool) -> Tile:
    """The best of sweeps on an H100 80GB SXM, Llama-3.1-8B, triton 3.6, 2026-11-21: 20 to 30 tiles per layer.

    can_split: neither gated nor normed in the loop. A float8 head's layers, us, with inputs shared by 4 programs or not:
        8 rows:  qkv 26.5 (30.0), o 12.1 (14.2), down 30.3 (42.7); gate and up 50.0, lm_head 52.5; bytes 16.8, 5.6, 19.6; 39.1, 43.7
        64 rows:     31.4 (42.8),   15.3 (22.7),      36.3 (73.5);             71.9,         69.7
    From 17 to 63 rows they take the tile of 64, which was not timed there. In bfloat16 the target's layers, and cuBLAS:
        64 rows:  qkv 21.1 (20.9), o 15.0 (14.9), gate and up 85.5 (87.2), down 45.7 (47.2), lm_head 366 (392)
        128 rows:     22.0 (21.6),   18.1 (15.3),             90.4 (89.5),      51.0 (52.8),         388 (395)
    where cuBLAS has yet to activate, to add and to norm.
    """
    fills = 64 * 132  # outputs of which programs of 64 keep every multiprocessor busy
    splits, half = 1, 64 if outputs % 64 == 0 else 32
    if is_scaled:
        splits = 4 if can_split and outputs < fills else 1
        across, (wide, stages, warps) = half, (256, 3, 4) if splits > 1 and rows <= 16 else (128, 3, 4)
    elif rows <= 64:
        across = half if outputs >= 64 * 64 else 32
        wide, stages, warps = (128, 4, 8) if is_gated else (256, 4, 4) if rows <= 16 else (128, 6, 4)
    elif is_gated:
        across, wide, stages, warps = half, 64, 3, 8
    elif can_split and inputs >= 8192 and outputs < fills:
        across, wide, stages, warps, splits = half, 128, 4, 8, 2
    elif outputs % 128 == 0 and outputs >= 2 * fills:
        across, wide, stages, warps = 128, 64, 6, 8
    else:
        across, wide, stages, warps = half, 64, 8, 4
    while inputs % (splits * 64):
        splits //= 2
    while inputs // splits % wide:
        wide //= 2
    return Tile(across, wide, stages, 4 if across == 32 else warps, splits=splits)


# float8_e4m3fn is sign, 4 bits of exponent (bias 7), 3 of mantissa. Put where a wider type has them, a byte is the same number
# but for the bias, a power of two that the scales take up: 8 instructions for four bytes. Inductor cannot see through assembly
# (`can_wait`), so where it launches the same is written without.
_WIDEN = """{{
    .reg .b32 t, s;
    prmt.b32 t, $2, 0, 0x1404;  shr.u32 s, t, {shift};  and.b32 s, s, {mask};  lop3.b32 $0, t, 0x80008000, s, 0xea;
    prmt.b32 t, $2, 0, 0x3424;  shr.u32 s, t, {shift};  and.b32 s, s, {mask};  lop3.b32 $1, t, 0x80008000, s, 0xea;
}}"""
_TO_BF16 = constant(_WIDEN.format(shift=4, mask="0x07f007f0"))
_TO_FP16 = constant(_WIDEN.format(shift=1, mask="0x3f803f80"))
_BIAS_BF16, _BIAS_FP16 = constant(2.0**120), constant(2.0**8)


@jit
def widen(b_byte, dtype: tl.constexpr, IN_ASSEMBLY: tl.constexpr):
    """Bytes of float8_e4m3fn, none of them NaN, as numbers of a wider type that are 2^120 (bfloat16) or 2^8 times too small."""
    if not IN_ASSEMBLY:
        b_word = b_byte.to(tl.uint16) << 8
        if dtype == tl.bfloat16:
            return ((b_word & 0x8000) | ((b_word >> 4) & 0x07F0)).to(tl.bfloat16, bitcast=True)
        else:
            return ((b_word & 0x8000) | ((b_word >> 1) & 0x3F80)).to(tl.float16, bitcast=True)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(_TO_BF16, "=r,=r,r", [b_byte], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(_TO_FP16, "=r,=r,r", [b_byte], dtype=tl.float16, is_pure=True, pack=4)


# A program computes O outputs (o_o) of all R rows (o_r, padded), I inputs (o_i) at a time.
@jit
def activate(b_gate, ACTIVATION: tl.constexpr):
    """In float32."""
    if ACTIVATION == "silu":
        return b_gate / (1.0 + tl.exp(-b_gate))
    else:  # 0.5 (1 + tanh z) = sigmoid(2 z)
        z = 0.7978845608028654 * (b_gate + 0.044715 * b_gate * b_gate * b_gate)
        return b_gate / (1.0 + tl.exp(-2.0 * z))


@jit
def store_tile(
    b_acc, b_up, b_square, p_b, p_s, p_n, p_sq, p_res, p_next, p_out, p_scaled, p_squares, o_o, o_r, m_r, outputs,
    inputs: tl.constexpr, eps, dtype: tl.constexpr, ACTIVATION: tl.constexpr, R: tl.constexpr, O: tl.constexpr,
    PART: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """What follows the sums over all inputs: scales, bias, activation, residual, and what the next layer's norm needs."""
    GATED: tl.constexpr = ACTIVATION != ""
    if p_sq is not None:
        o_p = tl.arange(0, BLOCK_P)[:, None]
        p_sq += o_r[None, :] * (inputs // PART) + o_p
        b_square = tl.sum(tl.load(p_sq, mask=m_r & (o_p < inputs // PART), other=0.0), 0)
    if p_n is not None or p_sq is not None:
        b_scale = tl.rsqrt(b_square / inputs + eps)[None, :]
        b_acc *= b_scale
        b_up *= b_scale
    if p_s is not None:
        bias: tl.constexpr = _BIAS_BF16 if dtype == tl.bfloat16 else _BIAS_FP16
        b_acc *= tl.load(p_s + o_o)[:, None] * bias
        if GATED:
            b_up *= tl.load(p_s + outputs + o_o)[:, None] * bias
    if p_b is not None:
        b_acc += tl.load(p_b + o_o).to(tl.float32)[:, None]
        if GATED:
            b_up += tl.load(p_b + outputs + o_o).to(tl.float32)[:, None]
    b_acc = b_acc.to(dtype).to(tl.float32)
    if GATED:
        b_acc = activate(b_acc, ACTIVATION).to(dtype).to(tl.float32) * b_up.to(dtype).to(tl.float32)
    o_out = o_r[None, :] * outputs + o_o[:, None]
    if p_res is not None:
        b_acc = b_acc.to(dtype).to(tl.float32) + tl.load(p_res + o_out, mask=m_r, other=0.0).to(tl.float32)
    b_out = b_acc.to(dtype)
    tl.store(p_out + o_out, b_out, mask=m_r)
    if p_next is not None:
        b_wide = b_out.to(tl.float32)
        b_scaled = b_wide * tl.load(p_next + o_o).to(tl.float32)[:, None]
        tl.store(p_scaled + o_out, b_scaled.to(dtype), mask=m_r)
        o_p = tl.program_id(0) * (O // PART) + tl.arange(0, O // PART)
        b_parts = tl.sum(tl.reshape(b_wide * b_wide, (O // PART, PART, R)), 1)
        tl.store(p_squares + o_r[None, :] * (outputs // PART) + o_p[:, None], b_parts, mask=m_r)


@jit(do_not_specialize=("rows",))
def stream_weight(
    p_x, p_w, p_b, p_s, p_n, p_sq, p_res, p_next, p_out, p_scaled, p_squares, p_part, rows, outputs, inputs: tl.constexpr, eps,
    ACTIVATION: tl.constexpr, R: tl.constexpr, O: tl.constexpr, I: tl.constexpr, PART: tl.constexpr, BLOCK_P: tl.constexpr,
    SPLITS: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = ACTIVATION != ""
    LENGTH: tl.constexpr = inputs // SPLITS
    o_o = tl.program_id(0) * O + tl.arange(0, O)
    o_r, o_i = tl.arange(0, R), tl.program_id(1) * LENGTH + tl.arange(0, I)
    up = outputs.to(tl.int64) * inputs  # from a gate's row to that of its up
    p_w += o_o[:, None].to(tl.int64) * inputs
    if WAITS:
        if AHEAD > 0:  # weights are nobody's result: bring the first ones into L2 while the kernel before still runs
            p_line = p_w + (tl.program_id(1) * LENGTH + tl.arange(0, AHEAD // 64) * 64)[None, :]
            fetch_line(p_line)
            if GATED:
                fetch_line(p_line + up)
        gdc_wait()
    p_w += o_i[None, :]
    p_x += o_r[None, :] * inputs + o_i[:, None]
    m_r = (o_r < rows)[None, :]
    dtype = p_x.dtype.element_ty
    b_acc, b_up, b_square = tl.zeros((O, R), tl.float32), tl.zeros((O, R), tl.float32), tl.zeros((R,), tl.float32)
    for i in range(0, LENGTH, I):
        if WAITS:
            if i == LENGTH - EARLY:
                gdc_launch_dependents()
        b_w = tl.load(p_w + i)
        if GATED:
            b_w_up = tl.load(p_w + i + up)
        b_x = tl.load(p_x + i, mask=m_r, other=0.0)
        if p_n is not None:
            b_wide = b_x.to(tl.float32)
            b_square += tl.sum(b_wide * b_wide, 0)
            b_x = (b_wide * tl.load(p_n + i + o_i).to(tl.float32)[:, None]).to(dtype)
        if p_s is not None:
            b_w = widen(b_w, dtype, WAITS)
            if GATED:
                b_w_up = widen(b_w_up, dtype, WAITS)
        b_acc = tl.dot(b_w, b_x, b_acc)
        if GATED:
            b_up = tl.dot(b_w_up, b_x, b_up)
    if SPLITS == 1:
        store_tile(
            b_acc, b_up, b_square, p_b, p_s, p_n, p_sq, p_res, p_next, p_out, p_scaled, p_squares, o_o, o_r, m_r, outputs, inputs,
            eps, dtype, ACTIVATION, R, O, PART, BLOCK_P,
        )
    else:
        tl.store(p_part + (tl.program_id(1) * R + o_r[None, :]) * outputs + o_o[:, None], b_acc)


@jit(do_not_specialize=("rows",))
def add_splits(
    p_b, p_s, p_sq, p_res, p_next, p_out, p_scaled, p_squares, p_part, rows, outputs, inputs: tl.constexpr, eps,
    R: tl.constexpr, O: tl.constexpr, PART: tl.constexpr, BLOCK_P: tl.constexpr, SPLITS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """The sums of a few outputs over every split of the inputs, in order, and what follows."""
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    o_o, o_r = tl.program_id(0) * O + tl.arange(0, O), tl.arange(0, R)
    p_part += o_r[None, :] * outputs + o_o[:, None]
    b_acc = tl.load(p_part)
    for i_s in tl.static_range(1, SPLITS):
        b_acc += tl.load(p_part + i_s * R * outputs)
    store_tile(
        b_acc, b_acc, tl.zeros((R,), tl.float32), p_b, p_s, None, p_sq, p_res, p_next, p_out, p_scaled, p_squares, o_o, o_r,
        (o_r < rows)[None, :], outputs, inputs, eps, p_out.dtype.element_ty, "", R, O, PART, BLOCK_P,
    )


def stream(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, norm_weight: Tensor | None,
    squares: Tensor | None, residual: Tensor | None, next_norm: Tensor | None, eps: float, activation: str,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch; with a given tile, of several splits only where the layer is neither gated nor normed in the loop."""
    inputs = x.shape[-1]
    rows, outputs = x.numel() // inputs, weight.shape[0] // (2 if activation else 1)
    can_split = not activation and norm_weight is None
    tile = tile or choose_tile(rows, outputs, inputs, bool(activation), scales is not None, can_split)
    out, padded = x.new_empty(*x.shape[:-1], outputs), max(16, power_of_2(rows))
    stage_bytes = tile.inputs * (tile.outputs * (2 if activation else 1) * weight.element_size() + padded * x.element_size())
    scaled = sums = part = None
    if next_norm is not None:
        scaled, sums = x.new_empty(*x.shape[:-1], outputs), x.new_empty(*x.shape[:-1], outputs // PART, dtype=torch.float32)
    if tile.splits > 1:
        part = x.new_empty(tile.splits, padded, outputs, dtype=torch.float32)
    stored = weight if scales is None else weight.view(torch.uint8)
    residual = None if residual is None else residual.contiguous()
    behind = residual, next_norm, out, scaled, sums, part, rows, outputs, inputs, eps
    sizes = {"R": padded, "PART": PART, "BLOCK_P": power_of_2(inputs // PART), "SPLITS": tile.splits, "WAITS": can_wait(x)}
    wrap_triton(stream_weight, waits=True)[(outputs // tile.outputs, tile.splits)](
        x.contiguous(), stored, bias, scales, norm_weight, squares, *behind, ACTIVATION=activation, O=tile.outputs,
        I=tile.inputs, AHEAD=min(tile.ahead, inputs // tile.splits), EARLY=tile.early, num_warps=tile.warps,
        num_stages=fit_stages(x, tile.stages, stage_bytes), **sizes,
    )  # fmt: skip
    if tile.splits > 1:
        wrap_triton(add_splits, waits=True)[(outputs // PART,)](bias, scales, squares, *behind, O=PART, num_warps=4, **sizes)
    return out, scaled, sums


@fused_linear.implementation("triton", why_not=why_not_triton, waits=True)
def fused_linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None,
    norm_weight: Tensor | None = None, squares: Tensor | None = None, residual: Tensor | None = None, eps: float = 0.0,
    activation: str = "",
) -> Tensor:
    """One launch that reads the weights once."""
    return stream(x, weight, bias, scales, norm_weight, squares, residual, None, eps, activation)[0]


@fused_linear_normed.implementation("triton", why_not=why_not_triton, waits=True)
def fused_linear_normed_triton(
    x: Tensor, weight: Tensor, next_norm: Tensor, bias: Tensor | None = None, scales: Tensor | None = None,
    norm_weight: Tensor | None = None, squares: Tensor | None = None, residual: Tensor | None = None, eps: float = 0.0,
    activation: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """The same launch, which leaves two more results."""
    y, scaled, sums = stream(x, weight, bias, scales, norm_weight, squares, residual, next_norm, eps, activation)
    assert scaled is not None, "there is a next norm"
    assert sums is not None, "there is a next norm"
    return y, scaled, sums


def bench(device: torch.device) -> Iterator[Measurement]:
    """The layers of Llama-3.1-8B; weights beyond L2, since a step reads each once; exact is float64."""
    layers = (("qkv", 6144, 4096, ""), ("o", 4096, 4096, ""), ("gate, up", 14336, 4096, "silu"), ("down", 4096, 14336, ""))
    for rows, (name, outputs, inputs, activation) in product((1, 8, 64, 128), layers):
        height = outputs * (2 if activation else 1)
        count = 1 + 300_000_000 // (2 * height * inputs)
        x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
        weights = [torch.randn(height, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5 for _ in range(count)]
        wide = torch.nn.functional.linear(x.double(), weights[0].double())
        if activation:
            wide = torch.nn.functional.silu(wide[:, :outputs]) * wide[:, outputs:]
        turns = [cycle(weights), cycle(weights)]

        def mine(x=x, turn=turns[0], activation=activation) -> Tensor:
            return fused_linear_triton(x, next(turn), activation=activation)

        def reference(x=x, turn=turns[1], activation=activation) -> Tensor:
            return fused_linear.reference(x, next(turn), activation=activation)

        moved = 2 * (height * inputs + rows * (inputs + outputs))
        yield measure("fused_linear", f"{rows} rows, {name}", mine, reference, moved, wide)
