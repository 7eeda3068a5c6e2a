"""select-kernels: the first implementation that can is taken, and every refusal is written down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness.graphs import after, apply, check_golden, evaluate
from torch import Tensor, fx

from autospec.errors import OptionError
from autospec.ir.text import graph_text
from autospec.kernels.attention import attention
from autospec.kernels.choice import Times
from autospec.kernels.registry import Implementation
from autospec.passes import select_kernels
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
    assert [refusal.reason for refusal in record.refusals] == ["attention: slow: it is Tuesday"]
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
    assert [refusal.reason for refusal in record.refusals] == ["attention: fast: switched off by AUTOSPEC_DISABLE_KERNELS"]
    assert record.details == ("attention: reference x 1",)


def test_a_package_takes_what_it_can_hold(tiny: Any, backends: list[Implementation]) -> None:
    backends += [_twin("fast", None), _twin("triton", None)]
    record = apply(tiny.static(3), SelectKernels(is_packaged=True))[0]
    assert [refusal.reason for refusal in record.refusals] == ["attention: fast: Python calls it, and a package has none"]
    assert record.details == ("attention: triton x 1",)


def test_on_a_cpu_every_gpu_kernel_says_why_not(tiny: Any) -> None:
    record = apply(tiny.paged(3), SelectKernels(disabled=frozenset({"cpu", "flashinfer"})))[0]
    assert record.count == 0
    reasons = {refusal.reason.partition(": ")[2] for refusal in record.refusals}  # behind the op's name
    off = "switched off by AUTOSPEC_DISABLE_KERNELS"
    off_too = {f"{backend}: {off}" for backend in ("cpu", "flashinfer_xqa", "flashinfer_trtllm", "flashinfer_fa2")}
    assert reasons in (
        {"triton: the tensors are on cpu, not on a CUDA device", *off_too}, {"triton: triton is not installed", *off_too},
    )  # fmt: skip


def test_on_a_cpu_attention_is_the_one_in_cpp(tiny: Any) -> None:
    record = apply(tiny.paged(3), SelectKernels())[0]
    assert record.count >= 1
    assert any(line.startswith("paged_attention: cpu x ") for line in record.details)


def _forced(word: str) -> SelectKernels:
    return SelectKernels(forced=(("attention", word),))


def test_the_forced_backend_is_taken(tiny: Any, backends: list[Implementation]) -> None:
    backends += [_twin("fast", None), _twin("slow_one", "it is Tuesday"), _twin("slow_two", None)]
    for word in ("slow_two", "slow"):
        record = apply(tiny.static(3), _forced(word))[0]
        assert record.details == ("attention: slow_two x 1",)
    assert [refusal.reason for refusal in record.refusals] == ["attention: slow_one: it is Tuesday"]
    record = apply(tiny.static(3), _forced("slow_one"))[0]
    assert record.details == ("attention: fast x 1",), "where it cannot, the others remain, and the refusal is written down"
    assert [refusal.reason for refusal in record.refusals] == ["attention: slow_one: it is Tuesday"]
    record = apply(tiny.static(3), _forced("reference"))[0]
    assert (record.count, record.details) == (0, ("attention: reference x 1",))


def test_forcing_what_there_is_not(tiny: Any, backends: list[Implementation]) -> None:
    backends.append(_twin("fast", None))
    with pytest.raises(OptionError) as error:
        apply(tiny.static(3), _forced("triton"))
    assert str(error.value).splitlines() == [
        "attention has no implementation in triton", "  at    attention=triton", "  in    AUTOSPEC_KERNELS",
        "  help  it has fast, reference",
    ]  # fmt: skip
    with pytest.raises(OptionError, match="did you mean 'attention'"):
        apply(tiny.static(3), SelectKernels(forced=(("atention", "fast"),)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """A GPU on which backends take what a test says; others fail."""
    speeds: dict[str, float] = {}

    def times_of(kernel: Any, candidates: Any, arguments: Any) -> Times:
        able = [one.backend for one in candidates]
        return Times({name: speeds[name] for name in able if name in speeds},
                     {name: "it fails: no nvcc" for name in able if name not in speeds})

    monkeypatch.setattr(select_kernels, "can_measure", lambda arguments: True)
    monkeypatch.setattr(select_kernels, "times_of", times_of)
    attention.sampler(lambda args, generator: dict(args))
    yield speeds
    attention.sample = None


def test_the_fastest_is_taken_and_times_are_shown(
    tiny: Any, backends: list[Implementation], clock: dict[str, float]
) -> None:
    backends += [_twin("slow_one", None), _twin("fast", None), _twin("slow_two", None)]
    clock.update(slow_one=17.1, fast=7.84)
    record = apply(tiny.static(3), SelectKernels())[0]
    chosen, times = record.details
    assert chosen == "attention: fast x 1"
    assert times.startswith("attention: slow_one 17.1 us, fast 7.8 us; q [2, ")
    assert [refusal.reason for refusal in record.refusals] == ["attention: slow_two: it fails: no nvcc"]
    assert apply(tiny.static(3), _forced("slow_one"))[0].details == ("attention: slow_one x 1",), "forced: nothing is measured"
    record = apply(tiny.static(3), SelectKernels(disabled=frozenset({"fast", "slow_two"})))[0]
    assert record.details == ("attention: slow_one x 1",), "one candidate: nothing is measured"


def test_without_inputs_to_measure_the_first_is_taken(
    tiny: Any, backends: list[Implementation], clock: dict[str, float]
) -> None:
    backends += [_twin("slow_one", None), _twin("fast", None)]
    clock.update(slow_one=17.1, fast=7.84)
    attention.sample = None
    assert apply(tiny.static(3), SelectKernels())[0].details == ("attention: slow_one x 1",)
