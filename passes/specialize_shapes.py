"""Give the symbolic graph one batch size and one length.

    %s = aten.sym_size.int(%input_ids, 1)
    %v = aten.view(%x, [%b, %s, -1, 64])     ->   %v = aten.view(%x, [2, 4, -1, 64]) : f32[2, 4, 8, 64]

Legal: sizes are folded by running every node once on FakeTensors of the wanted shape; no operator is changed or
traced again, so names, modules and roles survive. All metadata lives in one fresh FakeTensorMode afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autospec.ir.build import device_of
from autospec.ir.fakes import run_on_fakes
from autospec.ir.passes import Notes, Pass
from autospec.ir.slots import slot_of


@dataclass(frozen=True, kw_only=True)
class SpecializeShapes(Pass):
    """Fold batch size and tokens per request into the graph."""

    name = "specialize-shapes"
    batch_size: int
    q_len: int

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        if "fake_mode" in module.meta:
            yield "the graph is specialised already"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        module.meta["fake_mode"] = mode
        constants: dict[fx.Node, Any] = {}
        for node in list(module.graph.nodes):
            if node.op == "placeholder":
                node.meta["val"] = self._input(node, mode, module)
                continue
            node.args = fx.map_arg(node.args, lambda n: constants.get(n, n))
            node.kwargs = fx.map_arg(node.kwargs, lambda n: constants.get(n, n))
            if node.op == "output":
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            value = run_on_fakes(module, node.target, args, kwargs)
            if isinstance(value, (int, float, bool)):
                constants[node] = value
            else:
                node.meta["val"] = value
        for node in reversed(list(constants)):
            module.graph.erase_node(node)
        return len(constants) + 1

    def _input(self, node: fx.Node, mode: FakeTensorMode, module: fx.GraphModule) -> torch.Tensor:
        slot, captured = slot_of(node), node.meta["val"]
        with mode:
            if slot.kind == "input":
                size = self.batch_size, self.q_len, *captured.shape[2:]
                return torch.empty(size, dtype=captured.dtype, device=device_of(module))
            return torch.empty_strided(slot.shape, captured.stride(), dtype=slot.dtype, device=device_of(module))

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        for node in module.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
                yield f"%{node.name} still has a symbolic shape"
