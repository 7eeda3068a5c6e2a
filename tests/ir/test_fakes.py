"""What is known of an op's result is what the op itself would say, for every kind of argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.graphs import sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from autospec.ir.fakes import fake_mode, run_on_fakes
from autospec.ir.match import aten
from autospec.ir.slots import Slot


def _module() -> fx.GraphModule:
    return sketch([Slot("input", "x", (2, 3))], lambda builder, x: x)


def _fake(module: fx.GraphModule, *size: int, dtype: torch.dtype = torch.float32) -> Any:
    with fake_mode(module):
        return torch.empty(size, dtype=dtype)


def _metadata(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.device


@settings(max_examples=30)
@given(
    rows=st.integers(1, 3), start=st.integers(0, 3), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    is_transposed=st.booleans(), number=st.sampled_from([1, 1.0, True]),
)  # fmt: skip
def test_results_are_the_ops_own(rows: int, start: int, dtype: torch.dtype, is_transposed: bool, number: Any) -> None:
    module = _SHARED
    x, weight = _fake(module, rows, 4, 4, dtype=dtype), _fake(module, 6, 4, dtype=dtype)
    x = x.transpose(1, 2) if is_transposed else x
    for op, args in (
        (aten.linear.default, (x, weight)), (aten.slice.Tensor, (x, 1, start, 4)), (aten.transpose.int, (x, 0, 1)),
        (aten.topk.default, (x, 2)), (aten.mul.Tensor, (x, number)), (aten.neg.default, (x,)),
        (aten.full_like.default, (x, number)), (aten._to_copy.default, (x,)),
        (aten.add.Tensor, (_fake(module, rows, dtype=torch.int64), number)),
    ):  # fmt: skip
        with fake_mode(module):
            expected = torch.utils._pytree.tree_leaves(op(*args))
        for _ in range(2):
            found = torch.utils._pytree.tree_leaves(run_on_fakes(module, op, args, {}))
            assert [_metadata(one) for one in found] == [_metadata(one) for one in expected], op
            assert all(isinstance(one, FakeTensor) and one.fake_mode is fake_mode(module) for one in found)


_SHARED = _module()  # what one example left is known in the next


def test_an_op_runs_once_for_arguments_alike_and_no_two_results_are_one_tensor() -> None:
    module, asked = _module(), []

    def op(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        return aten.neg.default(*args)

    first, second = (run_on_fakes(module, op, (_fake(module, 2, 3),), {}) for _ in range(2))
    assert len(asked) == 1
    assert first is not second
    run_on_fakes(module, op, (_fake(module, 3, 2),), {})
    run_on_fakes(module, op, (_fake(module, 3, 2).t(),), {})
    run_on_fakes(module, op, (_fake(module, 2, 3, dtype=torch.float16),), {})
    assert len(asked) == 4


def test_the_default_dtype_is_a_part_of_the_kind() -> None:
    module = _module()
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            assert run_on_fakes(module, aten.zeros.default, ([4],), {"device": "cpu"}).dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("given", [aten.contiguous.default, aten.detach.default, aten.relu_.default])
def test_an_op_that_returns_its_argument_does_so_again(given: Any) -> None:
    module = _module()
    for _ in range(2):
        x = _fake(module, 2, 3)
        with fake_mode(module):
            is_same = given(x) is x
        assert (run_on_fakes(module, given, (x,), {}) is x) == is_same


def test_numbers_and_real_tensors_are_not_remembered() -> None:
    module, asked = _module(), []

    def op(x: Any) -> Any:
        asked.append(x)
        return len(asked)

    assert [run_on_fakes(module, op, (_fake(module, 2),), {}) for _ in range(2)] == [1, 2]
    assert [run_on_fakes(module, op, (torch.zeros(2),), {}) for _ in range(2)] == [3, 4]
