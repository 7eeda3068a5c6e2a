"""Experts: rows sorted by the expert they are routed to, each multiplied with the weight of its own.

rows [S, I] sorted by group; weight [E, I, O]; ends [E] int32 or int64, where each group's rows end -> [S, O].
Captured from transformers' fallback of the same meaning, so that a saved graph does not need that library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.native import not_on_cpu
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure


@kernel_op(fake=lambda rows, weight, ends: rows.new_empty(rows.shape[0], weight.shape[2]))
def grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [S, I], weight [E, I, O], ends [E] -> [S, O]; rows behind the last end are zero. Static, so every group
    multiplies all rows."""
    place = torch.arange(rows.shape[0], device=rows.device)
    out = rows.new_zeros(rows.shape[0], weight.shape[2])
    start = torch.zeros_like(ends[0])
    for group in range(weight.shape[0]):
        mine = (place >= start) & (place < ends[group])
        out = torch.where(mine[:, None], torch.mm(rows, weight[group]), out)
        start = ends[group]
    return out


def why_not_loop(args: Mapping[str, Any]) -> str | None:
    """The loop asks the host where groups end, which a CUDA graph cannot."""
    return not_on_cpu(args)


@grouped_mm.implementation("cpu", why_not=why_not_loop)
def grouped_mm_loop(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """One product per group that has rows."""
    out = rows.new_zeros(rows.shape[0], weight.shape[2])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(rows[start:end], weight[group], out=out[start:end])
            start = end
    return out


def bench(device: torch.device) -> Iterator[Measurement]:
    """Two of eight experts per token."""
    for count in (2, 16, 128):
        weight = torch.randn(8, 256, 512, device=device)
        rows = torch.randn(count, 256, device=device)
        ends = torch.randint(0, count + 1, (8,), device=device).sort().values.int()
        ends[-1] = count

        def mine(rows=rows, weight=weight, ends=ends) -> Tensor:
            return grouped_mm.op(rows, weight, ends)

        def reference(rows=rows, weight=weight, ends=ends) -> Tensor:
            return grouped_mm.reference(rows, weight, ends)

        yield measure("grouped_mm", f"{count} rows, 8 groups", mine, reference, 4 * (weight.numel() + rows.numel() * 3))
