"""Linear layers over panels against float64; a row is the same to the bit whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from autospec.kernels.packed_linear import linear, pack, why_not

sizes = st.sampled_from([1, 7, 16, 32, 33, 64, 100])


def drawn(seed, rows, inputs, outputs, has_bias):
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, inputs, generator=g), torch.randn(outputs, inputs, generator=g)
    return x, weight, torch.randn(outputs, generator=g) if has_bias else None


def check_linear(x, weight, bias, out):
    """A chain of I multiply-adds is off by at most I half steps of the sum of magnitudes."""
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = torch.nn.functional.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    assert out.shape == exact.shape
    assert ((out.double() - exact).abs() <= 2.0**-24 * (x.shape[-1] + 2) * size).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 20), inputs=st.one_of(sizes, st.just(2500)), outputs=sizes,
       has_bias=st.booleans())
def test_equals_float64(seed, rows, inputs, outputs, has_bias):
    x, weight, bias = drawn(seed, rows, inputs, outputs, has_bias)
    check_linear(x, weight, bias, linear(x, pack(weight), bias))


@pytest.mark.parametrize("inputs", [100, 3000])
def test_wide_equals_narrow_to_the_bit(inputs):
    x, weight, bias = drawn(0, 21, inputs, 300, True)
    packed = pack(weight)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        wide = linear(x, packed, bias)
        torch.set_num_threads(1)
        assert torch.equal(wide, linear(x, packed, bias))
        for i in range(21):
            assert torch.equal(wide[i : i + 1], linear(x[i : i + 1], packed, bias))
    finally:
        torch.set_num_threads(before)


def test_leading_dimensions_and_strides():
    x, weight, _ = drawn(1, 12, 40, 50, False)
    expected = linear(x, pack(weight), None).reshape(3, 4, 50)
    assert torch.equal(linear(x.reshape(3, 4, 40), pack(weight.t().contiguous().t()), None), expected)
    assert torch.equal(linear(x.reshape(3, 4, 40).transpose(0, 1), pack(weight), None), expected.transpose(0, 1))


@pytest.mark.parametrize("bug", ["another bias", "two outputs swapped", "the last input is missing"])
def test_planted_bugs_are_caught(bug):
    x, weight, bias = drawn(2, 5, 33, 40, True)
    wrong, add = weight.clone(), bias
    if bug == "another bias":
        add = bias + 1e-3
    elif bug == "two outputs swapped":
        wrong[[0, 39]] = weight[[39, 0]]
    else:
        wrong[:, -1] = 0
    check_linear(x, weight, bias, linear(x, pack(weight), bias))
    with pytest.raises(AssertionError):
        check_linear(x, weight, bias, linear(x, pack(wrong), add))


def test_opcheck():
    x, weight, bias = drawn(3, 6, 20, 24, True)
    for add in (bias, None):
        opcheck(linear, (x.reshape(2, 3, 20), pack(weight), add), test_utils=("test_schema", "test_faketensor"))


def test_why_not():
    assert why_not(torch.zeros(4, 5)) is None
    assert "float64" in str(why_not(torch.zeros(4, 5, dtype=torch.float64)))
    assert "3 dimensions" in str(why_not(torch.zeros(4, 5, 6)))
    assert "CPU" in str(why_not(torch.zeros(4, 5, device="meta")))
