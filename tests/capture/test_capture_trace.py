"""traced_plainly: what nobody reads is not recorded, and what changes the grad mode still is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from autospec.capture_trace import traced_plainly

_SET = torch._C._set_grad_enabled


def _traced(is_grad: bool, mode_inside: bool) -> list[Any]:
    """Targets of the calls in a trace of a forward that sets the grad mode to what `mode_inside` says."""

    def forward(x: Tensor) -> Tensor:
        with traced_plainly(), torch.set_grad_enabled(mode_inside):
            y = x.sin()
        return y.cos()

    with torch.set_grad_enabled(is_grad):
        graph = make_fx(forward, tracing_mode="symbolic", pre_dispatch=True)(torch.zeros(3)).graph
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_a_grad_mode_that_is_set_already_is_not_noted() -> None:
    aten = torch.ops.aten
    assert _traced(is_grad=False, mode_inside=False) == [aten.sin.default, aten.cos.default]
    assert _traced(is_grad=True, mode_inside=True) == [aten.sin.default, aten.cos.default]


def test_a_change_of_the_grad_mode_is_noted() -> None:
    assert _traced(is_grad=False, mode_inside=True).count(_SET) == 2
    assert _traced(is_grad=True, mode_inside=False).count(_SET) == 2


class _Negates(torch.nn.Module):
    def __init__(self, is_plain: bool) -> None:
        super().__init__()
        self.is_plain = is_plain

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_plain:
            return -x
        with traced_plainly():
            return -x


def test_exported_nodes_have_no_stack_traces() -> None:
    for is_plain in (True, False):
        graph = torch.export.export(_Negates(is_plain), (torch.zeros(3),), strict=False).graph
        traces = [node.meta.get("stack_trace") for node in graph.nodes if node.op == "call_function"]
        assert [trace is None for trace in traces] == [is_plain]


def test_outside_of_a_trace_nothing_happens() -> None:
    with traced_plainly(), torch.enable_grad():
        assert (torch.zeros(3, requires_grad=True) * 2).requires_grad
