"""Packages say for which machine they are, and another one says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autospec.aot import refuse_python
from autospec.artifact.machine import machine, why_not_here
from autospec.errors import LoweringError
from autospec.ir.build import Builder
from autospec.ir.slots import Slot
from autospec.kernels.registry import load_all

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"torch": "2.0.0"}, "compiled for torch 2.0.0, here is"),
        ({"device": "cuda", "gpu": "sm_90"}, "the packages are for cuda, not for cpu"),
        ({"cpu": "riscv64"}, "the processor riscv64"),
        ({"platform": "Plan 9"}, "the system Plan 9"),
        ({"instructions": ["avx9", "avx99"]}, "instructions that this processor lacks: avx9, avx99"),
        ({"instructions": []}, None),
    ],
)
def test_why_not_here(change: dict[str, Any], reason: str | None) -> None:
    got = why_not_here({**machine(CPU), **change}, CPU)
    assert (got is None) if reason is None else reason in str(got)


def test_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda")
    built = machine(device)
    assert why_not_here(built, device) is None
    assert why_not_here({**built, "gpu": "sm_80"}, device) == "the packages were compiled for the GPU sm_80, here is sm_90"


def test_a_package_for_cuda_has_no_python_in_it() -> None:
    """Planted: a canonical op that no implementation took."""
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    module.graph.output(())
    module.meta.update(fake_mode=FakeTensorMode(), device=CPU)
    builder = Builder(module)
    parents = builder.slot(Slot("state", "tree_parents", (1, 4), torch.int32))
    builder.call(torch.ops.aten.add.Tensor, parents, 1)
    refuse_python(module)
    builder.call(load_all()["tree_tables"], parents)
    with pytest.raises(LoweringError, match="written in Python"):
        refuse_python(module)
