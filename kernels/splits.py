"""Attention cut over its keys: every split leaves its share and the logarithm of its weight, a second launch joins them."""

from __future__ import annotations

import torch
from torch import Tensor

from autospec.kernels.launch import can_wait, gdc_launch_dependents, gdc_wait, jit, power_of_2, tl, wrap_triton


def split_buffers(out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where the splits of out [..., Dv] write: shares [..., S, Dv] and log weights [..., S] in float32; one split: `out`."""
    if splits == 1:
        return out, out
    part = out.new_empty(*out.shape[:-1], splits, out.shape[-1], dtype=torch.float32)
    return part, part.new_empty(part.shape[:-1])


@jit
def store_share(p_out, p_lse, o_row, i_s, m_row, b_top, b_sum, b_acc, o_dv, DV: tl.constexpr, SPLITS: tl.constexpr):
    """Write rows of split i_s, b_acc over b_sum; where a row saw nothing its weight is none, and alone its result is 0."""
    b_out = b_acc * tl.where(b_sum == 0.0, 0.0, 1.0 / b_sum)[:, None]
    if SPLITS > 1:
        b_lse = tl.where(b_sum == 0.0, -float("inf"), b_top + tl.log2(b_sum))
        tl.store(p_lse + o_row * SPLITS + i_s, b_lse, mask=m_row)
        o_row = o_row * SPLITS + i_s
        m_row &= b_sum != 0.0
    p_rows = p_out + o_row[:, None] * DV + o_dv[None, :]
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_dv < DV)[None, :])


@jit
def combine_splits(
    p_part, p_lse, p_out, DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK_DV: tl.constexpr, WAITS: tl.constexpr
):
    """Weigh the splits of some columns (o_dv) of one row (i_r) by their share of the softmax; a row that saw nothing becomes 0."""
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_r = tl.program_id(0).to(tl.int64)
    o_s, o_dv = tl.arange(0, SPLITS), tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    b_lse = tl.load(p_lse + i_r * SPLITS + o_s)
    m_s = b_lse > -float("inf")
    p_rows = p_part + (i_r * SPLITS + o_s)[:, None] * DV + o_dv[None, :]
    b_part = tl.load(p_rows, mask=m_s[:, None] & (o_dv < DV)[None, :], other=0.0)
    b_weight = tl.where(m_s, tl.exp2(b_lse - tl.maximum(tl.max(b_lse, 0), -1.0e30)), 0.0)
    total = tl.sum(b_weight, 0)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out + i_r * DV + o_dv, b_out.to(p_out.dtype.element_ty), mask=o_dv < DV)


def combine(part: Tensor, lse: Tensor, out: Tensor, splits: int, columns: int, warps: int) -> None:
    """Join the shares into out [..., Dv], `columns` of a row in a program; nothing to do for one split."""
    if splits > 1:
        width = out.shape[-1]
        block = max(min(power_of_2(width), columns), 16)
        wrap_triton(combine_splits, waits=True)[(out.numel() // width, (width + block - 1) // block)](
            part, lse, out, DV=width, SPLITS=splits, BLOCK_DV=block, WAITS=can_wait(out), num_warps=warps
        )
