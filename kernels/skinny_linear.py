"""A small linear layer of few rows in full float32, which is what verifying a draft of a small model needs.

x [..., I], weight [O, I], bias [O] or None -> [..., O]. For some of these shapes cuBLAS takes a kernel for large matrices.
Microseconds in a CUDA graph on an H100 80GB SXM, torch 2.11, CUDA 13, triton 3.6, 2026-11-21:
    weight        384 x 256   768 x 512   256 x 704   256 x 1024   1408 x 256   4096 x 256
     7 rows cuBLAS   31.9        4.3        31.6        31.6          3.4          4.6
            ours      2.6        3.3         3.6         4.0          3.2          5.8
    60 rows cuBLAS    6.1        7.7         7.8         8.0          8.1          9.1
            ours      4.7       11.6         5.8         6.9         12.4         30.7
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.launch import jit, no_gpu, tl, wrap_triton
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure

FEWEST, MOST = 2, 64  # rows; one row is a matrix-vector product, which cuBLAS does well
LARGEST, MOST_PRODUCTS = 400_000, 16_000_000  # of a weight, and of rows times weight: past them the table above turns


@kernel_op()
def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] -> [..., O]."""
    return torch.nn.functional.linear(x, weight, bias)


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """Measured for float32 only: with tensor cores cuBLAS is at the speed of memory."""
    x, weight = args["x"], args["weight"]
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"only float32 is slow in cuBLAS, not {weight.dtype}"
    rows = x.numel() // x.shape[-1]
    if not FEWEST <= rows <= MOST:
        return f"{rows} rows are not {FEWEST} to {MOST}"
    if weight.numel() > LARGEST or rows * weight.numel() > MOST_PRODUCTS:
        return f"{rows} rows of a {weight.shape[0]} x {weight.shape[1]} weight are work enough for cuBLAS"
    if not weight.is_contiguous():
        return "the weight is not contiguous"
    return no_gpu(args)


# R rows (i_r, o_r), O outputs (i_o, o_o), I inputs (o_i). A thread keeps its inputs' share of every product of a tile and
# adds them up across threads once, at the end: tl.dot in full float32 costs 0.9 us for every 64 inputs on an H100.
@jit
def multiply_rows(
    p_x, p_w, p_b, p_out, rows, outputs, inputs,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):
    i_o, i_r = tl.program_id(0), tl.program_id(1)
    o_r, o_o, o_i = i_r * BLOCK_R + tl.arange(0, BLOCK_R), i_o * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I)
    m_r, m_o = o_r < rows, o_o < outputs
    p_x += o_r[:, None] * inputs + o_i[None, :]
    p_w += o_o[:, None].to(tl.int64) * inputs + o_i[None, :]
    b_acc = tl.zeros((BLOCK_R, BLOCK_O, BLOCK_I), tl.float32)
    for i in range(0, inputs, BLOCK_I):
        m_i = i + o_i < inputs
        b_x = tl.load(p_x + i, mask=m_r[:, None] & m_i[None, :], other=0.0)
        b_w = tl.load(p_w + i, mask=m_o[:, None] & m_i[None, :], other=0.0)
        b_acc += b_x[:, None, :] * b_w[None, :, :]
    b_out = tl.sum(b_acc, 2)
    if p_b is not None:
        b_out += tl.load(p_b + o_o, mask=m_o, other=0.0)[None, :]
    tl.store(p_out + o_r[:, None] * outputs + o_o[None, :], b_out, mask=m_r[:, None] & m_o[None, :])


@skinny_linear.implementation("triton", why_not=why_not_triton)
def skinny_linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One launch; the tile is the best of a sweep of 24 on the H100 above."""
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    out = x.new_empty(*x.shape[:-1], outputs)
    block_r, block_o = 8 if rows <= 16 else 16, 4
    wrap_triton(multiply_rows)[((outputs + block_o - 1) // block_o, (rows + block_r - 1) // block_r)](
        x.contiguous(), weight, bias, out, rows, outputs, inputs,
        BLOCK_R=block_r, BLOCK_O=block_o, BLOCK_I=256 if rows <= 8 else 128, num_warps=2,
    )
    return out


def bench(device: torch.device) -> Iterator[Measurement]:
    """The linear layers of the demo model; exact is float64."""
    for rows in (2, 7, 10, 60):
        for outputs, inputs in ((384, 256), (768, 512), (256, 704), (256, 1024), (1408, 256), (4096, 256)):
            x, weight = (torch.randn(n, inputs, device=device) for n in (rows, outputs))
            exact = torch.nn.functional.linear(x.double(), weight.double())

            def mine(x=x, weight=weight) -> Tensor:
                return skinny_linear_triton(x, weight)

            def reference(x=x, weight=weight) -> Tensor:
                return skinny_linear.reference(x, weight)

            moved = 4 * (weight.numel() + x.numel() + rows * outputs)
            yield measure("skinny_linear", f"{rows} rows of {outputs} x {inputs}", mine, reference, moved, exact)
