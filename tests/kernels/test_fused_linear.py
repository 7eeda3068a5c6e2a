"""A linear layer with its neighbours against float64."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.kernels import fused_linear as module
from autospec.kernels.fused_linear import MOST_NORMED, fused_linear, fused_linear_normed, why_not_triton

FILE = "autospec.kernels.fused_linear"


def make(
    rows: int, outputs: int, inputs: int, *, activation: str = "", is_normed: bool = False, has_bias: bool = False,
    has_residual: bool = False, is_prepared: bool = False, is_scaled: bool = False,
    dtype: torch.dtype = torch.bfloat16, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Arguments by name; the weight has as many rows as it takes for `outputs` results."""
    generator = torch.Generator().manual_seed(seed)
    height = outputs * (2 if activation else 1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = random(height, inputs) / inputs**0.5
    scales = None
    if is_scaled:
        scales = weight.abs().amax(-1) / 448
        weight = (weight / scales[:, None]).to(torch.float8_e4m3fn)
    return {
        "x": (random(1, rows, inputs) * 3).to(dtype),
        "weight": weight if is_scaled else weight.to(dtype),
        "bias": random(height).to(dtype) if has_bias else None,
        "scales": scales,
        "norm_weight": (random(inputs) + 1).to(dtype) if is_normed else None,
        "squares": random(1, rows, inputs // 32).square() * 32 if is_prepared else None,
        "residual": random(1, rows, outputs).to(dtype) if has_residual else None,
        "eps": 1e-5,
        "activation": activation,
    }


def check(out: Tensor, args: dict[str, Any]) -> None:
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in args.items()}
    x, eps = wide["x"], wide["eps"]
    if wide["norm_weight"] is not None:
        x = wide["norm_weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if wide["squares"] is not None:
        x = x * torch.rsqrt(wide["squares"].sum(-1, keepdim=True) / x.shape[-1] + eps)
    weight = wide["weight"] if wide["scales"] is None else wide["weight"] * wide["scales"][:, None]
    y = torch.nn.functional.linear(x, weight, wide["bias"])
    if wide["activation"]:
        gate, up = y.chunk(2, -1)
        act = torch.nn.functional.silu(gate) if wide["activation"] == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
        y = act * up
    y = y if wide["residual"] is None else y + wide["residual"]
    assert out.shape == y.shape
    assert out.dtype == args["x"].dtype
    # At most four roundings to the dtype on the way (norm, layer, activation, result), each half a step.
    assert float((out.double() - y).norm() / y.norm()) < 4 * torch.finfo(out.dtype).eps / 2


CASES = st.fixed_dictionaries({
    "rows": st.integers(1, 40), "outputs": st.sampled_from([32, 64, 96]), "inputs": st.sampled_from([64, 192, 256]),
    "activation": st.sampled_from(["", "silu", "gelu_tanh"]), "is_normed": st.booleans(), "is_prepared": st.booleans(),
    "has_bias": st.booleans(), "has_residual": st.booleans(), "seed": st.integers(0, 2**31),
})  # fmt: skip


@pytest.mark.parametrize("activation", ["", "silu"])
def test_the_reference_of_a_scaled_weight_equals_float64(activation):
    args = make(5, 64, 128, activation=activation, is_scaled=True, has_bias=True)
    check(fused_linear(**args), args)


@settings(max_examples=12)
@given(case=CASES)
def test_triton_equals_float64(interpreted, case):
    """The interpreter has no products in bfloat16 and takes no float8; the GPU tests have both."""
    args = make(**{**case, "is_normed": case["is_normed"] and not case["is_prepared"]}, dtype=torch.float16)
    check(fused_linear(**args), args)
    check(interpreted(FILE, "fused_linear_triton", **args), args)


@settings(max_examples=8)
@given(case=CASES)
def test_the_next_norm_is_prepared(interpreted, case):
    args = make(**{**case, "is_normed": case["is_normed"] and not case["is_prepared"]}, dtype=torch.float16)
    next_norm = torch.linspace(-1, 2, case["outputs"]).half()
    for op in (fused_linear_normed, lambda **args: interpreted(FILE, "fused_linear_normed_triton", **args)):
        y, scaled, squares = op(**args, next_norm=next_norm)
        check(y, args)
        assert torch.equal(scaled, y * next_norm)
        torch.testing.assert_close(squares, y.float().square().unflatten(-1, (-1, 32)).sum(-1))


@pytest.mark.parametrize("splits", [2, 4])
def test_splits_of_the_inputs_are_added_up(interpreted, splits):
    args = make(5, 96, 512, has_bias=True, has_residual=True, is_prepared=True, dtype=torch.float16)
    next_norm = torch.linspace(-1, 2, 96).half()
    tile = module.Tile(32, 64, 2, 4, splits=splits)
    y, scaled, squares = interpreted(FILE, "stream", **args, next_norm=next_norm, tile=tile)
    check(y, args)
    assert torch.equal(scaled, y * next_norm)
    torch.testing.assert_close(squares, y.float().square().unflatten(-1, (-1, 32)).sum(-1))


def test_a_row_does_not_depend_on_the_others(interpreted):
    args = make(16, 64, 128, activation="silu", is_normed=True, has_residual=True, dtype=torch.float16)
    together = interpreted(FILE, "fused_linear_triton", **args)
    for rows in (1, 5):
        few = args | {name: args[name][:, :rows] for name in ("x", "residual")}
        assert torch.equal(interpreted(FILE, "fused_linear_triton", **few), together[:, :rows])


@pytest.mark.parametrize(
    "planted",
    [
        lambda a: a | {"weight": a["weight"].roll(1, 0)}, lambda a: a | {"weight": a["weight"].roll(64, 0)},
        lambda a: a | {"residual": None}, lambda a: a | {"bias": None}, lambda a: a | {"norm_weight": None},
        lambda a: a | {"norm_weight": a["norm_weight"].roll(1)}, lambda a: a | {"activation": "gelu_tanh"},
        lambda a: a | {"scales": a["scales"].roll(1)}, lambda a: a | {"eps": 1.0},
    ],
)  # fmt: skip
def test_a_wrong_result_is_caught(planted):
    args = make(5, 64, 128, activation="silu", is_normed=True, has_bias=True, has_residual=True, is_scaled=True)
    with pytest.raises(AssertionError):
        check(fused_linear(**planted(args)), args)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 64, 100])
@pytest.mark.parametrize("options", [
    {"is_normed": True}, {"activation": "silu", "is_normed": True}, {"has_residual": True, "has_bias": True},
    {"activation": "gelu_tanh", "is_scaled": True}, {"activation": "silu", "is_prepared": True}, {},
])  # fmt: skip
@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (512, 14336), (96, 192)])
def test_triton_on_the_gpu(cuda, rows, options, outputs, inputs):
    args = {
        name: value.to(cuda) if isinstance(value, Tensor) else value
        for name, value in make(rows, outputs, inputs, **options, seed=rows).items()
    }
    if is_too_wide := rows > MOST_NORMED and args["norm_weight"] is not None:
        assert why_not_triton(args) is not None
    for ops in (torch.ops.autospec_triton, torch.ops.autospec_direct):
        check(ops.fused_linear(**args), args)
        if not is_too_wide:
            next_norm = torch.linspace(-1, 2, outputs, device=cuda).bfloat16()
            y, scaled, squares = ops.fused_linear_normed(**args, next_norm=next_norm)
            check(y, args)
            assert torch.equal(scaled, y * next_norm)
            torch.testing.assert_close(squares, y.float().square().unflatten(-1, (-1, 32)).sum(-1))


@pytest.mark.parametrize(
    ("dtype", "shift", "mask", "bias"), [(torch.bfloat16, 4, 0x07F0, 2.0**120), (torch.float16, 1, 0x3F80, 2.0**8)]
)
def test_a_byte_of_float8_is_the_same_number_in_a_wider_type(dtype, shift, mask, bias):
    """The arithmetic of `widen`, on every byte but the two NaNs; and the constants are those in its code."""
    assert f"shift={shift}" in (source := inspect.getsource(module))
    assert f"{mask:04x}{mask:04x}" in source
    byte = torch.arange(256, dtype=torch.uint8)
    high = byte.to(torch.int32) << 8
    wide = (((high >> shift) & mask) | (high & 0x8000)).to(torch.uint16).view(dtype)
    exact = byte.view(torch.float8_e4m3fn).double()
    assert torch.equal((wide.double() * bias)[~exact.isnan()], exact[~exact.isnan()])
