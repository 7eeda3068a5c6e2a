"""Find the attention of models that do not use transformers' attention interface."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from autospec.ir.passes import Notes, Pass


@dataclass(frozen=True, kw_only=True)
class RecognizeAttention(Pass):
    """Attention written out in aten ops becomes one canonical op."""

    name = "recognize-attention"
    max_positions: int

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        return 0
