"""Each canonical op becomes one implementation, and every refusal is written down.

    %o = autospec.paged_attention(...)   ->   %o = autospec_triton.paged_attention(...)

Legal: implementations have the reference's signature and meaning (tests hold them to it). The first implementation
that does not refuse is taken; where all do, the op stays and its reference runs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx

from autospec.ir.build import value_of
from autospec.ir.passes import Notes, Pass
from autospec.kernels.registry import find


@dataclass(frozen=True, kw_only=True)
class SelectKernels(Pass):
    """Choose an implementation for every canonical op."""

    name = "select-kernels"
    is_optional = True
    disabled: frozenset[str] = frozenset()

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        count = 0
        chosen: Counter[str] = Counter()
        refused: set[tuple[str, str, str]] = set()
        for node in list(module.graph.nodes):
            kernel = find(node.target) if node.op == "call_function" else None
            if kernel is None:
                continue
            arguments = kernel.bind(value_of(node.args), value_of(node.kwargs))
            backend = "reference"
            for implementation in kernel.implementations:
                off = implementation.backend in self.disabled
                reason = "switched off by AUTOSPEC_DISABLE_KERNELS" if off else implementation.why_not(arguments)
                if reason is None:
                    node.target = implementation.op
                    backend = implementation.backend
                    count += 1
                    break
                if (kernel.name, implementation.backend, reason) not in refused:
                    refused.add((kernel.name, implementation.backend, reason))
                    notes.refuse(node, f"{implementation.backend}: {reason}")
            chosen[f"{kernel.name}: {backend}"] += 1
        for line, times in chosen.items():
            notes.say(f"{line} x {times}")
        return count
