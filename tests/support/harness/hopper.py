"""Inductor writes its kernels for an H100 on a machine without a GPU; nothing is compiled or run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx

DEVICE = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100", type="cuda", index=0, major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_multiprocessor=228 << 10, shared_memory_per_block_optin=227 << 10, total_memory=80 << 30,
    L2_cache_size=50 << 20,
)  # fmt: skip


class _WrittenError(Exception):
    """The code is there: stop."""


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Inductor's code generator believe in the GPU until the test ends."""
    import triton
    from torch._dynamo.device_interface import get_interface_for_device
    from torch._inductor import scheduler
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.fx_passes import joint_graph, post_grad
    from triton.backends.compiler import GPUTarget

    if torch.cuda.is_available():
        pytest.skip("Inductor remembers the properties of a device, and here is one")

    scheduler.has_triton()  # remembers what this machine has, whichever test came first, and not what is pretended below
    monkeypatch.setattr(scheduler, "has_triton", lambda: True)

    def properties(*args: Any) -> Any:
        return PROPERTIES

    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_active_torch_device=lambda: DEVICE,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )  # fmt: skip
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    interface = get_interface_for_device("cuda")
    for owner, name, value in (
        (torch.cuda, "get_device_capability", lambda *args: (9, 0)), (torch.cuda, "get_device_properties", properties),
        (torch.cuda, "current_device", lambda: 0), (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "synchronize", lambda *args: None), (interface, "get_device_properties", properties),
        (interface.Worker, "get_device_properties", properties), (interface, "current_device", lambda: 0),
        (interface, "get_compute_capability", lambda *args: 90), (interface, "is_available", lambda: True),
        (interface, "exchange_device", lambda index: 0), (interface, "maybe_exchange_device", lambda index: 0),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, staticmethod(value) if isinstance(owner, type) else value)
    # Both would compute on the device: patterns by tracing examples, choices of tiles by running them.
    for module in (joint_graph, post_grad):
        monkeypatch.setattr(module, "lazy_init", lambda *args, **kwargs: None)
    monkeypatch.setattr(PythonWrapperCodegen, "generate_and_run_autotune_block", lambda self: None)


def written(module: fx.GraphModule, compile: Callable[[fx.GraphModule], Any]) -> str:
    """The code that Inductor writes for a graph whose inputs are on `DEVICE`, after `pretend`."""
    from torch._inductor.codecache import PyCodeCache

    sources: list[str] = []

    def stop(source: str, *args: Any, **kwargs: Any) -> Any:
        sources.append(source)
        raise _WrittenError

    options = {"force_disable_caches": True, "pattern_matcher": False, "joint_graph_constant_folding": False}
    with mock.patch.object(PyCodeCache, "write", stop), torch._inductor.config.patch(options):
        try:
            compile(module)
        except Exception:
            if not sources:
                raise
    return sources[0]
