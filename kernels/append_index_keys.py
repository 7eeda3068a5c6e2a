"""Write the index keys of this call's tokens into their pages, in 8 bits with a scale each (DeepSeek sparse attention).

index_k [B, N, Di]; index_pages [num_pages, P, Di] float8_e4m3fn (or uint8: its bits), index_scales [num_pages, P] float32;
page_table [B, max_pages] int32; kv_lens [B] int32. Node j of a request goes to slot kv_lens + j. Physical page 0 is scratch, as
for append_kv.

A key stands for key * scale. A scale is the lowest power of two that leaves no element beyond the largest float8, 448: the
checkpoints' own kernels keep such scales (ue8m0) in float32, and with them nothing but the rounding to float8 rounds, so
every implementation writes the same bits. They also turn queries and keys by a Hadamard matrix first, which changes no
product; it is left out here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.append_kv import slot_pages
from autospec.kernels.launch import (
    can_wait,
    constant,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    no_gpu,
    power_of_2,
    rows_of,
    tl,
    wrap_triton,
)
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure

KEYS = torch.float8_e4m3fn
LARGEST = 448.0  # of float8_e4m3fn
SMALLEST = 1e-30  # a row of zeros has a scale, too, and its inverse is a number


def quantize_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    """k [..., Di] -> float8_e4m3fn [..., Di] and scales [...] float32, powers of two. What is not finite becomes NaN, and its row's
    scale 1; what is finite beside it goes as far as float8 does."""
    wide = k.float()
    top = wide.abs().amax(-1)
    top = top.masked_fill(~top.isfinite(), LARGEST).clamp(min=SMALLEST)
    scales = (((top * (1 / LARGEST)).view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)  # the next power of two
    keys = (wide / scales.unsqueeze(-1)).clamp(-LARGEST, LARGEST).masked_fill(~wide.isfinite(), float("nan"))
    return keys.to(KEYS), scales


def dequantize_keys(keys: Tensor, scales: Tensor) -> Tensor:
    """The rows, [..., Di] float32, that float8 keys [..., Di] and scales [...] stand for."""
    return keys.float() * scales.unsqueeze(-1)


@kernel_op(mutates=("index_pages", "index_scales"))
def append_index_keys(
    index_k: Tensor, index_pages: Tensor, index_scales: Tensor, page_table: Tensor, kv_lens: Tensor
) -> None:
    """Write index_k [B, N, Di] to slots kv_lens + j, each row quantised by itself; mutates pages and scales."""
    pages, offsets = slot_pages(kv_lens, index_k.shape[1], page_table, index_pages.shape[1])
    keys, scales = quantize_keys(index_k)
    index_pages.index_put_((pages, offsets), keys.view(index_pages.dtype))
    index_scales.index_put_((pages, offsets), scales)


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """Rows of pages stand one behind the other."""
    if args["index_pages"].dtype not in (KEYS, torch.uint8):
        return f"the pages are {args['index_pages'].dtype}, not float8_e4m3fn"
    for name in ("index_pages", "index_scales"):
        if not args[name].is_contiguous():
            return f"{name} is not contiguous"
    return no_gpu(args)


# B requests (i_b), N nodes (i_n), D elements (o_d). One program quantises and writes a node's row.
_INVERSE, _FLOOR, _FULL = constant(1 / LARGEST), constant(SMALLEST), constant(LARGEST)


@jit
def float8_bits(b_x):
    """float32 of at most 448 -> the nearest float8_e4m3fn, ties to even, as uint8: sign, 4 bits of exponent (bias 7), 3 behind it.
    Written out, for every GPU and the interpreter alike; NaN has all bits set."""
    b_bits = tl.abs(b_x).to(tl.int32, bitcast=True)
    b_normal = ((b_bits + 0x7FFFF + ((b_bits >> 20) & 1)) >> 20) - (120 << 3)
    b_small = (tl.abs(b_x) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF  # whole units of 2^-9, the smallest float8
    b_code = tl.where(tl.abs(b_x) < 0.015625, b_small, b_normal) | ((b_x.to(tl.int32, bitcast=True) >> 24) & 128)
    return tl.where(b_x == b_x, b_code, 127).to(tl.uint8)


@jit
def append_key_rows(
    p_k, p_pages, p_scales, p_table, p_lens, stride_kb, stride_kn, stride_tb, max_pages,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr, WAITS: tl.constexpr,
):
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_n, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    slot = tl.load(p_lens + i_b) + i_n
    logical, offset = slot // PAGE, slot % PAGE
    page = tl.load(p_table + i_b * stride_tb + logical, mask=logical < max_pages, other=0).to(tl.int64)
    b_k = tl.load(p_k + i_b * stride_kb + i_n * stride_kn + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_size = tl.abs(b_k)
    m_finite = b_size < float("inf")
    top = tl.max(tl.where(m_finite, b_size, float("inf")), 0)
    top = tl.maximum(tl.where(top < float("inf"), top, _FULL), _FLOOR)
    power = ((top * _INVERSE).to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    inverse = ((254 << 23) - power).to(tl.float32, bitcast=True)
    b_scaled = tl.minimum(tl.maximum(b_k * inverse, -_FULL), _FULL)
    b_key = float8_bits(tl.where(m_finite, b_scaled, float("nan")))
    p_row = page * PAGE + offset
    tl.store(p_pages + p_row * D + o_d, b_key.to(p_pages.dtype.element_ty, bitcast=True), mask=o_d < D)
    tl.store(p_scales + p_row, power.to(tl.float32, bitcast=True))


@append_index_keys.implementation("triton", why_not=why_not_triton, waits=True)
def append_index_keys_triton(
    index_k: Tensor, index_pages: Tensor, index_scales: Tensor, page_table: Tensor, kv_lens: Tensor
) -> None:
    """One launch, one program per node."""
    k = rows_of(index_k)
    batch, q_len, head_dim = k.shape
    wrap_triton(append_key_rows, waits=True)[(q_len, batch)](
        k, index_pages, index_scales, page_table, kv_lens, k.stride(0), k.stride(1), page_table.stride(0), page_table.shape[1],
        D=head_dim, PAGE=index_pages.shape[1], BLOCK_D=power_of_2(head_dim), WAITS=can_wait(k), num_warps=1,
    )


def bench(device: torch.device) -> Iterator[Measurement]:
    """One layer of DeepSeek-V3.2: 128 elements. Both write the same bits, so a deviation is 0 or a defect."""
    for batch, q_len in ((1, 1), (1, 32), (16, 4)):
        k = torch.randn(batch, q_len, 128, device=device, dtype=torch.bfloat16)
        index_pages, index_scales = quantize_keys(torch.randn(1 + batch * 8, 64, 128, device=device))
        page_table = (1 + torch.randperm(batch * 8, device=device)).reshape(batch, 8).int()
        kv_lens = torch.randint(0, 512 - q_len, (batch,), device=device, dtype=torch.int32)
        copies = [index_pages.clone(), index_scales.clone()]

        def mine(k=k, copies=copies, rest=(page_table, kv_lens)) -> list[Tensor]:
            append_index_keys_triton(k, *copies, *rest)
            return copies

        def reference(k=k, pages=(index_pages, index_scales), rest=(page_table, kv_lens)) -> list[Tensor]:
            append_index_keys.reference(k, *pages, *rest)
            return list(pages)

        moved = k.nbytes + batch * q_len * (128 + 4)
        yield measure("append_index_keys", f"{batch} x {q_len}", mine, reference, moved)
