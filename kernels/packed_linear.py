"""Linear layers over weights in panels, for CPUs: C++ in kernels/cpu/linear.cpp.

x [..., I], packed: a weight [O, I] in the kernel's own layout (an opaque tensor of `pack`), bias [O] or None -> [..., O].
A row's result depends neither on the other rows nor on the number of threads: wide equals narrow to the bit.

Measured on one core of an AMD EPYC (AVX-512), torch 2.13, float32, all linear layers of a 7M-parameter model (27 MB),
2026-11-21, in ms:
    rows             1      2      5      7      16     64
    aten.linear      2.8    4.2    4.4    5.1    5.9    12.6
    oneDNN, packed   1.6    1.9    1.8    2.4    3.3    9.3
    panels           0.7    0.7    1.0    1.2    2.6    9.3
oneDNN spends 13 us of each call on making a primitive; here a call costs about 2 us, most of it in the dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autospec.kernels.native import why_not_built

_library = torch.library.Library("autospec_cpu", "FRAGMENT")
_library.define("panel_linear(Tensor x, Tensor packed, Tensor? bias) -> Tensor")
_library.define("pack_linear(Tensor weight) -> Tensor")


def _fake(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


torch.library.register_fake("autospec_cpu::panel_linear", _fake, lib=_library)

linear: Any = torch.ops.autospec_cpu.panel_linear.default


def pack(weight: Tensor) -> Tensor:
    """weight [O, I] float32 on a CPU -> the same numbers in panels, as an opaque tensor of the same shape."""
    reason = why_not_built("linear")
    assert reason is None, reason
    return torch.ops.autospec_cpu.pack_linear(weight)


def why_not(weight: Tensor) -> str | None:
    """Why a weight [O, I] is better left as it is, or None."""
    if weight.device.type != "cpu":
        return "packed linear layers are for CPUs"
    if weight.dtype != torch.float32:
        return f"only float32 was written, this weight is {weight.dtype}"
    if weight.dim() != 2:
        return f"the weight has {weight.dim()} dimensions"
    return why_not_built("linear")
