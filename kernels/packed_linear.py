"""Linear layers over oneDNN's blocked weights, for CPUs.

x [..., I], packed: a weight [O, I] in oneDNN's own layout (an opaque tensor of `pack`), bias [O] or None -> [..., O].

Measured on one core of an AMD EPYC, torch 2.13, float32, all linear layers of a 7M-parameter model (28 MB), 2026-11-21:
    rows          1      2      5      9      16     64
    aten.linear   2.5    3.4    3.9    5.0    5.4    11.8   ms
    packed        1.4    1.5    1.6    2.1    2.8    8.7    ms
so that verifying a few draft tokens costs little more than decoding one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Low-level registration: a Python custom_op costs about 10 us a call in checks that 33 layers per step would pay.
_library = torch.library.Library("autospec_onednn", "DEF")
_library.define("linear(Tensor x, Tensor packed, Tensor? bias) -> Tensor")

# oneDNN chooses a layout for an expected number of rows. One row selects the unblocked layout, which is slow for
# several; every other hint we tried (2, 5, 9, 64) gave the same speed for 1 to 64 rows, on the machine above.
_EXPECTED_ROWS = 8


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _fake(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


_library.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("autospec_onednn::linear", _fake, lib=_library)

linear: Any = torch.ops.autospec_onednn.linear.default


def pack(weight: Tensor) -> Tensor:
    """weight [O, I] float32 or bfloat16 on a CPU -> the same weight in oneDNN's layout, as an opaque tensor."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)


# Below this many multiplications oneDNN's fixed cost per call (13 us, against 3 us of aten.linear) outweighs its speed.
_FEWEST_PRODUCTS = 50_000


def lower_to_onednn() -> None:
    """Teach Inductor to call oneDNN directly instead of through Python: 5 us less per layer."""
    from torch._inductor import mkldnn_ir
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import lowerings, register_lowering

    if linear in lowerings:
        return

    @register_lowering(linear, type_promotion_kind=None)
    def _(x: Any, packed: Any, bias: Any) -> Any:
        return TensorBox.create(mkldnn_ir.LinearUnary.create(x, packed, bias, "none", [], ""))


def why_not(weight: Tensor, rows: int) -> str | None:
    """Why a weight [O, I] that multiplies this many rows is better left as it is, or None."""
    if weight.device.type != "cpu":
        return "packed linear layers are for CPUs"
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    if weight.dtype != torch.float32:
        return f"only float32 was measured, this weight is {weight.dtype}"
    if weight.dim() != 2:
        return f"the weight has {weight.dim()} dimensions"
    if rows * weight.numel() < _FEWEST_PRODUCTS:
        return f"{rows} rows of a {weight.shape[0]} x {weight.shape[1]} weight are too little work"
    return None
