"""A reference that stands for an op on FakeTensors runs once for arguments of a kind, and says the same afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from autospec.kernels.fakes import once_for_a_kind

Asked = list[tuple[Any, ...]]


def counted(reference: Callable[..., Any]) -> tuple[Callable[..., Any], Asked]:
    """It as a fake implementation, and the arguments that it was really run with."""
    asked: Asked = []

    def run(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        return reference(*args, **kwargs)

    return once_for_a_kind(run), asked


def rotate(x: Tensor, *, scale: float = 1.0, keeps: bool = False) -> tuple[Tensor, Tensor | None]:
    """Two results: one laid out in its own way, and one that may be missing."""
    return (x * scale).transpose(0, 1), x.sum(0).to(torch.int64) if keeps else None


def described(results: Any) -> list[Any]:
    return [one if one is None else (one.size(), one.stride(), one.dtype, one.device) for one in results]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 3)), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    is_transposed=st.booleans(), options=st.sampled_from([{}, {"scale": 2}, {"scale": 2.0}, {"keeps": True}]),
)  # fmt: skip
def test_results_are_the_references(
    sizes: tuple[int, int], dtype: torch.dtype, is_transposed: bool, options: dict[str, Any]
) -> None:
    """In whichever FakeTensorMode it is asked."""
    for _ in range(2):
        with FakeTensorMode() as mode:
            x = torch.empty(sizes, dtype=dtype)
            x = x.t() if is_transposed else x
            results, expected = SHARED(x, **options), rotate(x, **options)
        assert described(results) == described(expected)
        assert all(isinstance(one, FakeTensor) and one.fake_mode is mode for one in results if one is not None)


SHARED, _ = counted(rotate)  # what one example left is known in the next


def test_it_runs_once_for_arguments_of_a_kind() -> None:
    fake, asked = counted(rotate)
    with FakeTensorMode():
        first, second = fake(torch.empty(2, 3))[0], fake(torch.empty(2, 3))[0]
        assert len(asked) == 1
        assert first is not second
        for other in (torch.empty(3, 2), torch.empty(3, 2).t(), torch.empty(2, 3, dtype=torch.float64), torch.empty(4, 3)[1:3]):
            fake(other)
        fake(torch.empty(2, 3), keeps=True)
    assert len(asked) == 6


def test_nothing_is_a_result_too() -> None:
    fake, asked = counted(lambda x, y: None)
    with FakeTensorMode():
        assert [fake(torch.empty(2), None), fake(torch.empty(2), None)] == [None, None]
    assert len(asked) == 1


@pytest.mark.parametrize("reference", [
    lambda x: x, lambda x: x.view(-1), lambda x: [x + 1] * 2, lambda x: (x + 1).chunk(2), lambda x: (x + 1)[1:],
    lambda x: (x + 1, x.numel()), lambda x: (x + 1).requires_grad_(),
])  # fmt: skip
def test_what_is_no_new_tensor_is_asked_for_again(reference: Callable[..., Any]) -> None:
    """An argument or a view of it, one tensor twice, two parts or the end of one, a number, what asks for a gradient."""
    fake, asked = counted(reference)
    with FakeTensorMode():
        for _ in range(2):
            fake(torch.empty(2))
    assert len(asked) == 2


def test_symbolic_sizes_mean_something_else_elsewhere() -> None:
    """Even where the result has none: what was a 5 is called as what is a 7."""
    fake, asked = counted(lambda x: torch.empty(int(x.size(0))))
    for rows in (5, 7):
        mode = FakeTensorMode(shape_env=ShapeEnv())
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
        x = mode.from_tensor(torch.empty(rows, 3), symbolic_context=context)
        with mode:
            assert isinstance(x.size(0), torch.SymInt)
            assert fake(x).size() == (rows,)
    assert len(asked) == 2


def test_real_tensors_are_not_remembered() -> None:
    fake, asked = counted(rotate)
    for _ in range(2):
        fake(torch.ones(2, 3))
    assert len(asked) == 2
