"""Kernels that Inductor writes and that start early wait first."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from harness import hopper
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensorMode

from autospec import lower
from autospec.early_start import WAIT, refuse_unsafe_starts, starting_early, wait_first
from autospec.errors import LoweringError
from autospec.ir.slots import Slot

KERNEL = """
import triton
import triton.language as tl

@triton.jit
def _triton_helper_fn0(arg0_0, arg1_0):
    tmp0 = arg0_0 + arg1_0
    return tmp0

@triton_heuristics.pointwise(
    size_hints={'x': 4096},
    triton_meta={'signature': {'in_ptr0': '*bf16'}, 'launch_pdl': True, 'constants': {}},
)
@triton.jit
def triton_poi_fused_add_0(in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    xoffset = tl.program_id(0) * XBLOCK
    tmp0 = tl.load(in_ptr0 + (x0), xmask)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    tl.store(out_ptr0 + (x0), tmp0, xmask)
"""


def generated(kernel: str) -> str:
    return f"before\ntriton_poi_fused_add_0 = async_compile.triton('triton_poi_fused_add_0', '''{kernel}''', device_str='cuda')\n"


def test_the_wait_comes_before_anything_else():
    waiting = wait_first(KERNEL)
    assert f"XBLOCK : tl.constexpr):\n    {WAIT}\n    xoffset" in waiting
    assert "arg1_0):\n    tmp0" in waiting, "its helper functions do not wait"
    assert waiting.replace(f"    {WAIT}\n", "", 1) == KERNEL


def test_a_kernel_that_takes_its_turn_need_not_wait():
    refuse_unsafe_starts([generated(KERNEL.replace("'launch_pdl': True", "'launch_pdl': False"))])


@pytest.mark.parametrize(("ours", "theirs"), [
    ("'''", '"""'), ("'''", "r'''"), ("('triton_", "(\n'triton_"), ("'launch_pdl': True", '"launch_pdl": True'),
    ("'launch_pdl': True", "'launch_pdl': 1"), ("'launch_pdl': True", "launch_pdl=True"),
])  # fmt: skip
def test_what_another_version_may_write_is_refused(ours, theirs):
    """Known or not known in this form: nothing that starts early passes without its wait."""
    refuse_unsafe_starts([source := generated(wait_first(KERNEL))])
    assert ours in source
    with pytest.raises(LoweringError, match="starts"):
        refuse_unsafe_starts([generated(KERNEL).replace(ours, theirs)])


def test_passes_of_the_user_run_and_are_in_the_keys():
    class Theirs(CustomGraphPass):
        def __call__(self, graph):
            ran.append(graph)

        def uuid(self):
            return "theirs"

    ran, graph = [], fx.Graph()
    for before, uuid in ((Theirs(), "theirs"), (ran.append, None)):
        with torch._inductor.config.patch(post_grad_custom_post_pass=before), starting_early(torch.device("cuda")) as options:
            mine = options["post_grad_custom_post_pass"]
        mine(graph)
        assert (mine.uuid() and mine.uuid()[-1]) == uuid
    assert ran == [graph, graph]


def test_a_kernel_that_reads_before_it_waits_is_refused():
    refuse_unsafe_starts([generated(wait_first(KERNEL))])
    with pytest.raises(LoweringError, match="starts before the one in front of it ends") as refusal:
        refuse_unsafe_starts([generated(wait_first(KERNEL)), generated(KERNEL)])
    assert "triton_poi_fused_add_0" in str(refusal.value)


def test_nothing_changes_on_a_cpu():
    from torch._inductor.codegen.triton import TritonKernel

    before = TritonKernel.codegen_kernel
    with starting_early(torch.device("cpu")) as options:
        assert (options, TritonKernel.codegen_kernel) == ({}, before)


def test_inductor_is_as_it_was_afterwards():
    """And its keys tell graphs with these kernels from others."""
    from torch._inductor.codegen.triton import TritonKernel
    from torch._inductor.codegen.triton_combo_kernel import ComboKernel

    before = TritonKernel.codegen_kernel, ComboKernel.codegen_kernel
    with starting_early(torch.device("cuda")) as options:
        assert before[0] is not TritonKernel.codegen_kernel
        assert before[1] is not ComboKernel.codegen_kernel
    assert (TritonKernel.codegen_kernel, ComboKernel.codegen_kernel) == before
    assert options["triton.enable_pdl"] is True
    assert options["post_grad_custom_post_pass"].uuid()


def graph_on(device: torch.device) -> fx.GraphModule:
    """Sums and highest values of one matrix, which may share a launch, a running sum, and a fill, which reads nothing."""
    graph, mode = fx.Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    with mode:
        x.meta.update(val=torch.empty(300, 500, device=device), slot=Slot("input", "x", (300, 500)))
    rows = graph.call_function(torch.ops.aten.sum.dim_IntList, (x, [1]))
    columns = graph.call_function(torch.ops.aten.amax.default, (x, [0]))
    running = graph.call_function(torch.ops.aten.cumsum.default, (columns, 0))
    fill = graph.call_function(torch.ops.aten.full.default, ([777], 3.0), {"device": device})
    graph.output((rows, columns, running, fill))
    module = fx.GraphModule(torch.nn.Module(), graph)
    module.meta.update(fake_mode=mode, device=device)
    return module


def test_what_inductor_writes_for_hopper(monkeypatch):
    """Its own generator: every kernel starts early and waits first, and independent ones share a launch."""
    hopper.pretend(monkeypatch)
    source = hopper.written(graph_on(hopper.DEVICE), lower.compile_with_inductor)
    refuse_unsafe_starts([source])
    kernels = set(re.findall(r"async_compile\.triton\('(\w+)'", source))
    assert len(kernels) == 4
    assert source.count("'launch_pdl': True") == source.count(f"):\n    {WAIT}\n") >= len(kernels)
    assert "SequentialComboKernelGrid" in source


def test_what_inductor_would_write_itself_is_refused(monkeypatch):
    """A fill reads nothing, so it would not wait, and end before what it was launched behind."""
    hopper.pretend(monkeypatch)
    monkeypatch.setattr(lower, "starting_early", lambda device: contextlib.nullcontext({"triton.enable_pdl": True}))
    source = hopper.written(graph_on(hopper.DEVICE), lower.compile_with_inductor)
    with pytest.raises(LoweringError, match="does not wait first") as refusal:
        refuse_unsafe_starts([source])
    assert "triton_" in str(refusal.value)


@pytest.mark.cuda
def test_what_inductor_writes_on_a_gpu(cuda, monkeypatch):
    """The same kernels compute what the graph does."""
    seen: list[str] = []
    check = lower.refuse_unsafe_starts
    monkeypatch.setattr(lower, "refuse_unsafe_starts", lambda sources: (seen.extend(sources), check(sources))[1])
    module = graph_on(cuda)
    run = lower.compile_with_inductor(module)
    value = torch.randn(300, 500, device=cuda)
    for mine, theirs in zip(run(value), module(value), strict=True):
        torch.testing.assert_close(mine, theirs)
    early = len(re.findall("'launch_pdl': True", "".join(seen)))
    assert "".join(seen).count(f"):\n    {WAIT}\n") == early
    assert (early > 1) == (torch.cuda.get_device_capability() >= (9, 0))
