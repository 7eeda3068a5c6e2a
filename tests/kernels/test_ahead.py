"""Kernels are compiled before their first launch, for just what that launch asks for."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autospec import lower
from autospec.kernels import fused_linear, splits
from autospec.kernels.ahead import compile_ahead, compiling_ahead, is_compiling_ahead
from autospec.kernels.registry import DIRECT, LAUNCHES, load_all

triton = pytest.importorskip("triton")

load_all()
NORMED = DIRECT[torch.ops.autospec_triton.fused_linear_normed.default]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[str]:
    """Triton believes that an H100 is there, and nothing was compiled yet; what it is asked to compile, by kernel."""
    if not isinstance(fused_linear.stream_weight, triton.runtime.JITFunction):
        pytest.skip("kernels are interpreted in this process")
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: GPUTarget("cuda", 90, 32)
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    found: list[str] = []
    original = triton.runtime.JITFunction._do_compile

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self.__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(triton.runtime.JITFunction, "_do_compile", record)
    for kernel in (fused_linear.stream_weight, fused_linear.add_splits):
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    for module in (fused_linear, splits):
        monkeypatch.setattr(module, "can_wait", lambda tensor: True, raising=False)
    return found


def layer(rows: int = 8, inputs: int = 4096) -> tuple[Tensor, ...]:
    """A projection whose result is normed next."""
    return torch.zeros(1, rows, inputs).bfloat16(), torch.zeros(4096, inputs).bfloat16(), torch.zeros(4096).bfloat16()


def faked(tensors: tuple[Tensor, ...]) -> tuple[FakeTensorMode, list[Tensor]]:
    mode = FakeTensorMode()
    return mode, [mode.from_tensor(tensor) for tensor in tensors]


def launch(monkeypatch: pytest.MonkeyPatch, tensors: tuple[Tensor, ...]) -> None:
    """A launch on real tensors, up to where a GPU is needed."""
    run = triton.runtime.JITFunction.run

    def only_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs | {"warmup": True})

    with monkeypatch.context() as patched:
        patched.setattr(triton.runtime.JITFunction, "run", only_compile)
        LAUNCHES[NORMED](*tensors, eps=1e-5)


def test_a_launch_finds_its_kernels(monkeypatch, compiled):
    mode, fakes = faked(layer())
    with compiling_ahead(torch.device("cuda", 0)):
        with mode:
            compile_ahead(LAUNCHES[NORMED], fakes, {"eps": 1e-5})
        ahead = list(compiled)
    assert "stream_weight" in ahead
    launch(monkeypatch, layer())
    assert compiled == ahead
    launch(monkeypatch, layer(rows=64))
    assert len(compiled) > len(ahead), "other rows are another kernel, and the count sees it"


def test_what_cannot_be_compiled_is_left_to_its_launch(monkeypatch, compiled):
    """Neither asking for it nor waiting for it fails; the launch does."""
    mode, fakes = faked(layer())

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(triton.compiler, "compile", fails)
    with compiling_ahead(torch.device("cuda", 0)), mode:
        compile_ahead(LAUNCHES[NORMED], fakes, {"eps": 1e-5})
        compile_ahead(fails, fakes, {})
    with pytest.raises(RuntimeError, match="no such instruction"):
        launch(monkeypatch, layer())


def test_an_interrupt_leaves_nothing_behind(monkeypatch, compiled):
    """Triton 3.6 would stay in its mode and compile nothing any more."""
    from triton.runtime import _async_compile

    def interrupted(futures: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(_async_compile, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt), compiling_ahead(torch.device("cuda", 0)):
        assert is_compiling_ahead()
    assert not is_compiling_ahead()


@pytest.mark.parametrize("start", ["fork", "subprocess"])
def test_threads_do_not_start_where_inductor_forks(compiled, start):
    with torch._inductor.config.patch(worker_start_method=start), compiling_ahead(torch.device("cuda", 0)):
        assert is_compiling_ahead() == (start != "fork")


def test_who_compiles_in_threads_already_goes_on(compiled):
    with ThreadPoolExecutor(1) as pool, triton.AsyncCompileMode(pool), compiling_ahead(torch.device("cuda", 0)):
        assert is_compiling_ahead()


def test_nothing_happens_where_there_is_no_gpu():
    with compiling_ahead(torch.device("cpu")):
        pass


def test_layers_alike_are_compiled_once(monkeypatch):
    """And every call of a graph that can be launched directly is."""
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(lower, "compile_ahead", lambda launch, args, kwargs: asked.append(tuple(args[0].shape)))
    graph, mode = fx.Graph(), FakeTensorMode()
    made = []
    for rows in (8, 8, 64, 8):
        given = [graph.placeholder(f"in_{len(made)}_{index}") for index in range(3)]
        for node, tensor in zip(given, layer(rows), strict=True):
            node.meta["val"] = mode.from_tensor(tensor)
        made.append(graph.call_function(torch.ops.autospec_triton.fused_linear_normed.default, tuple(given), {"eps": 1e-5}))
    graph.output(tuple(made))
    module = fx.GraphModule(torch.nn.Module(), graph)
    module.meta.update(fake_mode=mode, device=torch.device("cuda"))
    lower.launch_directly(module)
    assert asked == [(1, 8, 4096), (1, 64, 4096)]
    assert {node.target for node in made} == {NORMED}
