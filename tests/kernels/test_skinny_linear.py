"""A linear layer of few rows against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.kernels.skinny_linear import skinny_linear

FILE = "autospec.kernels.skinny_linear"


def make(rows: int, outputs: int, inputs: int, has_bias: bool, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, inputs, generator=generator) for n in (rows, outputs))
    return x[None], weight, torch.randn(outputs, generator=generator) if has_bias else None


def check(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = torch.nn.functional.linear(x.double().abs(), weight.double().abs())
    assert out.shape == exact.shape
    # Rounding of one addition, times the square root of how many there are, eightfold.
    assert ((out.double() - exact).abs() <= 8 * 2.0**-24 * x.shape[-1] ** 0.5 * (1 + size)).all()


@settings(max_examples=15)
@given(rows=st.integers(2, 64), outputs=st.integers(1, 70), inputs=st.integers(1, 150), has_bias=st.booleans(),
       seed=st.integers(0, 2**31))
def test_triton_equals_float64(interpreted, rows, outputs, inputs, has_bias, seed):
    x, weight, bias = make(rows, outputs, inputs, has_bias, seed)
    check(skinny_linear(x, weight, bias), x, weight, bias)
    check(interpreted(FILE, "skinny_linear_triton", x, weight, bias), x, weight, bias)


def test_a_wrong_product_is_caught():
    x, weight, bias = make(5, 33, 70, True, 1)
    for planted in (weight.roll(1, 0), weight.roll(1, 1), torch.nn.functional.pad(weight[:, :-1], (0, 1))):
        with pytest.raises(AssertionError):
            check(skinny_linear(x, planted, bias), x, weight, bias)
    with pytest.raises(AssertionError):
        check(skinny_linear(x, weight, None), x, weight, bias)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [2, 7, 16, 33, 64])
@pytest.mark.parametrize(("outputs", "inputs"), [(384, 256), (4096, 256), (256, 704), (1000, 77)])
def test_triton_on_the_gpu(cuda, rows, outputs, inputs):
    x, weight, bias = (value.to(cuda) if value is not None else None for value in make(rows, outputs, inputs, True, rows))
    check(torch.ops.autospec_triton.skinny_linear(x, weight, bias), x, weight, bias)
