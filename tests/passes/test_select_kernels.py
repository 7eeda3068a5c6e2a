"""select-kernels: the first implementation that can is taken, and every refusal is written down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness.graphs import after, apply, check_golden, evaluate
from torch import Tensor, fx

from autospec.ir.text import graph_text
from autospec.kernels.attention import attention
from autospec.kernels.registry import Implementation
from autospec.passes.select_kernels import SelectKernels


@pytest.fixture
def backends() -> Iterator[list[Implementation]]:
    """Implementations of `attention`; what a test adds goes away again."""
    saved = list(attention.implementations)
    attention.implementations.clear()
    yield attention.implementations
    attention.implementations[:] = saved


def _twin(backend: str, reason: str | None) -> Implementation:
    """A backend whose implementation is the reference under another name."""
    if not hasattr(getattr(torch.ops, f"autospec_{backend}"), "attention"):
        definition = torch.library.custom_op(f"autospec_{backend}::attention", attention.reference, mutates_args=())
        definition.register_fake(attention.reference)
    op = getattr(torch.ops, f"autospec_{backend}").attention.default
    return Implementation(backend, lambda args: reason, op, attention.reference)


def test_text(tiny: Any, backends: list[Implementation]) -> None:
    backends.append(_twin("fast", None))
    check_golden("select_kernels", graph_text(after(tiny.static(3), SelectKernels())))


def test_the_first_that_can_is_taken(tiny: Any, backends: list[Implementation]) -> None:
    backends += [_twin("slow", "it is Tuesday"), _twin("fast", None)]
    module = tiny.static(3)
    record = apply(module, SelectKernels())[0]
    assert record.count == 1
    assert [refusal.reason for refusal in record.refusals] == ["slow: it is Tuesday"]
    assert record.details == ("attention: fast x 1",)
    assert apply(module, SelectKernels())[0].count == 0


def test_meaning(tiny: Any, backends: list[Implementation]) -> None:
    backends.append(_twin("fast", None))
    module = tiny.static(3)
    ids = torch.arange(6).reshape(2, 3)
    values: dict[str, Tensor] = {"input_ids": ids, "position_ids": ids, **tiny.weights}
    chosen: fx.GraphModule = after(module, SelectKernels())
    assert torch.equal(evaluate(chosen, values)[0], evaluate(module, values)[0])


def test_a_backend_can_be_switched_off(tiny: Any, backends: list[Implementation]) -> None:
    backends.append(_twin("fast", None))
    record = apply(tiny.static(3), SelectKernels(disabled=frozenset({"fast"})))[0]
    assert record.count == 0
    assert [refusal.reason for refusal in record.refusals] == ["fast: switched off by AUTOSPEC_DISABLE_KERNELS"]
    assert record.details == ("attention: reference x 1",)


def test_on_a_cpu_every_triton_kernel_says_why_not(tiny: Any) -> None:
    record = apply(tiny.paged(3), SelectKernels(disabled=frozenset({"cpu"})))[0]
    assert record.count == 0
    reasons = {refusal.reason for refusal in record.refusals}
    off = "cpu: switched off by AUTOSPEC_DISABLE_KERNELS"
    assert reasons in (
        {"triton: the tensors are on cpu, not on a CUDA device", off}, {"triton: triton is not installed", off},
    )  # fmt: skip


def test_on_a_cpu_attention_is_the_one_in_cpp(tiny: Any) -> None:
    record = apply(tiny.paged(3), SelectKernels())[0]
    assert record.count >= 1
    assert any(line.startswith("paged_attention: cpu x ") for line in record.details)
