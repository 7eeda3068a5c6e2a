"""Let the graph return the hidden states that a draft head reads, beside the logits.

    return [%logits]   ->   %taps = aten.cat([%layer_1, %layer_15, %layer_28], -1)
                            return [%logits, %taps]

Legal: nothing that computes is touched. Layers are those of tag-roles: a tap is the output of a 0-based layer; without
layers it is what the lm_head reads.
Gives up on: nothing; a model whose layers could not be told apart is refused before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, operand, returned
from autospec.ir.passes import Notes, Pass
from autospec.ir.roles import tag, the, with_role


@dataclass(frozen=True, kw_only=True)
class TapHiddenStates(Pass):
    """Return the outputs of some layers."""

    name = "tap-hidden-states"
    tap_after: tuple[int, ...] = ()  # 0-based layers; (): what the lm_head reads

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        yield from missing_taps(module, self.tap_after)

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if with_role(module, "taps"):
            return 0
        output = module.graph.output_node()
        builder = Builder(module, output)
        if self.tap_after:
            outputs = layer_outputs(module)
            taps = builder.call(aten.cat.default, [outputs[layer] for layer in self.tap_after], -1)
        else:
            taps = builder.call(aten.alias.default, operand(the(module, "lm_head")))
        tag(taps, "taps")
        output.args = ((returned(module), taps),)
        return 1


def layer_outputs(module: fx.GraphModule) -> dict[int, fx.Node]:
    """The output of every decoder layer that tag-roles told apart."""
    return {node.meta["layer"]: node for node in with_role(module, "layer_output")}


def missing_taps(module: fx.GraphModule, tap_after: tuple[int, ...]) -> Iterable[str]:
    """Why a graph cannot be tapped there; none: it can."""
    outputs = layer_outputs(module)
    for layer in tap_after:
        if layer not in outputs:
            known = f"layers 0 to {max(outputs)}" if outputs else "no layers at all"
            yield f"the output of layer {layer} was not found, the graph shows {known}"
    if not tap_after and not with_role(module, "lm_head"):
        yield "the logits do not come straight from a linear layer, so what it reads is not known"
