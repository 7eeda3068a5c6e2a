"""Rotating queries and keys on the way to the pages: the op against the rotation in float64 and append_kv."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.kernels.append_kv import append_kv
from autospec.kernels.append_rotated import append_rotated, rotate

FILE = "autospec.kernels.append_rotated"


def make(
    batch: int, q_len: int, heads: int, group: int, head_dim: int, v_dim: int, page: int, seed: int,
    dtype: torch.dtype = torch.float16,
) -> dict[str, Tensor]:  # fmt: skip
    """Arguments by name; lengths may run past the table, into the scratch page."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    max_pages = 3
    return {
        "q": random(batch, heads * group, q_len, head_dim).transpose(1, 2),
        "k": random(batch, q_len, heads, head_dim), "v": random(batch, q_len, heads, v_dim),
        "cos": random(batch, q_len, head_dim), "sin": random(batch, q_len, head_dim),
        "k_pages": random(1 + batch * max_pages, page, heads, head_dim),
        "v_pages": random(1 + batch * max_pages, page, heads, v_dim),
        "page_table": (1 + torch.randperm(batch * max_pages, generator=generator)).reshape(batch, max_pages).int(),
        "kv_lens": torch.randint(0, max_pages * page + 1, (batch,), generator=generator).int(),
    }  # fmt: skip


def rounding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What three roundings to the dtype can add up to: two products and their sum."""
    wide = [value.double().abs() for value in (x, cos, sin)]
    turned = wide[0].roll(x.shape[-1] // 2, -1)
    return torch.finfo(x.dtype).eps * 1.01 * (wide[0] * wide[1][:, :, None] + turned * wide[2][:, :, None])


def check(op: Any, args: dict[str, Tensor]) -> None:
    """Rotated values within their rounding, every other row of the pages to the bit; the scratch page may hold anything."""
    q, k, v, cos, sin, k_pages, v_pages, page_table, kv_lens = (value.clone() for value in args.values())
    angles = cos.double(), sin.double()
    exact, wide_pages, slack = rotate(k.double(), *angles), k_pages.double(), torch.zeros_like(k_pages, dtype=torch.float64)
    append_kv.reference(exact, v, wide_pages, v_pages, page_table, kv_lens)
    append_kv.reference(rounding(k, cos, sin), v, slack, v_pages.clone(), page_table, kv_lens)
    out = op(*args.values())
    assert out.dtype == q.dtype
    assert ((out.double() - rotate(q.double(), *angles)).abs() <= rounding(q, cos, sin)).all()
    assert ((args["k_pages"].double() - wide_pages)[1:].abs() <= slack[1:]).all()
    assert torch.equal(args["v_pages"][1:], v_pages[1:])


@settings(max_examples=12)
@given(
    batch=st.integers(1, 3), q_len=st.integers(1, 5), heads=st.integers(1, 3), group=st.integers(1, 3),
    head_dim=st.sampled_from([4, 6, 16]), v_dim=st.sampled_from([4, 10]), page=st.sampled_from([3, 8]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_triton_equals_the_reference(interpreted, **case):
    check(append_rotated, make(**case))
    check(lambda *args: interpreted(FILE, "append_rotated_triton", *args), make(**case))


@pytest.mark.parametrize("name", ["cos", "sin", "kv_lens", "page_table", "v"])
def test_a_wrong_result_is_caught(name):
    def planted(*args: Tensor) -> Tensor:
        values = dict(zip(make(1, 2, 1, 1, 4, 4, 8, 0), args, strict=True))
        values[name] = values[name].roll(1, -1) if name != "kv_lens" else values[name] ^ 1
        return append_rotated(*values.values())

    with pytest.raises(AssertionError):
        check(planted, make(1, 2, 1, 1, 4, 4, 8, 1))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("batch", "q_len"), [(1, 1), (1, 64), (16, 8)])
def test_triton_on_the_gpu(cuda, dtype, batch, q_len):
    for op in (torch.ops.autospec_triton.append_rotated, torch.ops.autospec_direct.append_rotated):
        args = make(batch, q_len, 8, 4, 128, 128, 64, seed=q_len, dtype=dtype)
        check(op, {name: value.to(cuda) for name, value in args.items()})
