"""A linear layer of few rows in full float32, which is what verifying a draft in float32 needs.

x [..., I], weight [O, I], bias [O] or None -> [..., O]. cuBLAS has no good kernel for 2 to 64 rows without tensor cores:
on an H100 it takes 29.6 us for 7 rows of a 1408 x 256 weight, 2.9 us for one row (torch 2.11, cuBLAS 13, 2026-11-21).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.launch import jit, no_gpu, power_of_2, tl, wrap_triton
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure

FEWEST, MOST = 2, 64  # rows; one row is a matrix-vector product, which cuBLAS does well


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
    if not weight.is_contiguous():
        return "the weight is not contiguous"
    return no_gpu(args)


# R rows (o_r), O outputs (i_o, o_o), I inputs (o_i). A program owns a block of outputs for all rows and reads its weights
# once; the sum runs over I in order, whatever the number of rows is.
@jit
def multiply_rows(
    p_x, p_w, p_b, p_out, rows, outputs, inputs,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):
    i_o = tl.program_id(0)
    o_r, o_o, o_i = tl.arange(0, BLOCK_R), i_o * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I)
    m_r, m_o = o_r < rows, o_o < outputs
    p_x += o_r[:, None] * inputs + o_i[None, :]
    p_w += o_o[None, :].to(tl.int64) * inputs + o_i[:, None]
    b_acc = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for i in range(0, inputs, BLOCK_I):
        m_i = i + o_i < inputs
        b_x = tl.load(p_x + i, mask=m_r[:, None] & m_i[None, :], other=0.0)
        b_w = tl.load(p_w + i, mask=m_i[:, None] & m_o[None, :], other=0.0)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")
    if p_b is not None:
        b_acc += tl.load(p_b + o_o, mask=m_o, other=0.0)[None, :]
    tl.store(p_out + o_r[:, None] * outputs + o_o[None, :], b_acc, mask=m_r[:, None] & m_o[None, :])


@skinny_linear.implementation("triton", why_not=why_not_triton)
def skinny_linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One launch; the tile is a sweep's best on an H100, see bench."""
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    out = x.new_empty(*x.shape[:-1], outputs)
    block_r = max(power_of_2(rows), 16)
    block_o = 16 if outputs < 4096 or block_r > 32 else 32
    wrap_triton(multiply_rows)[((outputs + block_o - 1) // block_o,)](
        x.contiguous(), weight, bias, out, rows, outputs, inputs,
        BLOCK_R=block_r, BLOCK_O=block_o, BLOCK_I=64, num_warps=4 if block_r > 16 else 2, num_stages=4,
    )
    return out


def bench(device: torch.device) -> Iterator[Measurement]:
    """The linear layers of the demo model; exact is float64."""
    for rows in (2, 7, 10, 60):
        for outputs, inputs in ((384, 256), (256, 256), (1408, 256), (256, 704), (4096, 256)):
            x, weight = (torch.randn(n, inputs, device=device) for n in (rows, outputs))
            exact = torch.nn.functional.linear(x.double(), weight.double())

            def mine(x=x, weight=weight) -> Tensor:
                return skinny_linear_triton(x, weight)

            def reference(x=x, weight=weight) -> Tensor:
                return skinny_linear.reference(x, weight)

            moved = 4 * (weight.numel() + x.numel() + rows * outputs)
            yield measure("skinny_linear", f"{rows} rows of {outputs} x {inputs}", mine, reference, moved, exact)
