"""Find the attention of models that do not use transformers' attention interface.

    %s = aten.matmul(%q, %kT)
    %a = aten.add(aten.mul(%s, scale), %mask)    ->   %o = autospec.attention(%q, %k, %v, scale=, window=, chunk=, ...)
    %p = aten.softmax(%a, -1)                         %t = aten.transpose(%o, 1, 2)
    %o = aten.matmul(%p, %v)

    %o = aten.scaled_dot_product_attention(%q, %k, %v, %mask)   ->   the same

Legal: what stands between q k^T and softmax is a * (q k^T) + b with a and b made of sizes and positions alone. Both
are computed at several lengths, one beyond every constant that their computation mentions, and must be exactly those
of a causal, windowed or chunked mask, one scale, and at most an ALiBi bias (a slope per head times the distance).
Gives up on: masks or biases made of tokens or parameters, dropout, and anything else on the way to softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autospec.ir.attention_sites import Site, attention_of_constant_length, attention_sites
from autospec.ir.match import aten, calls
from autospec.ir.passes import Notes, Pass
from autospec.ir.scores import Step, run_steps
from autospec.ir.sizes import Evaluator, constants_of, largest_constant
from autospec.ir.slots import Slot, assign_slot, slot_of
from autospec.kernels.attention import attention
from autospec.masks import ScoreSpec, spec_of_scores

_LONGEST = 8192  # the largest mask that is computed has this many rows; a guess that keeps it below a gigabyte


@dataclass(frozen=True, kw_only=True)
class RecognizeAttention(Pass):
    """Attention written out in aten ops becomes one canonical op."""

    name = "recognize-attention"
    max_positions: int

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        specs: dict[tuple[Any, ...], ScoreSpec | str] = {}
        count = 0
        for anchor, site in list(attention_sites(module)):
            if isinstance(site, str):
                notes.refuse(anchor, site)
                continue
            key = (site.steps, site.q.shape[1])
            if key not in specs:
                specs[key] = self._spec(module, *key)
            spec = specs[key]
            if isinstance(spec, str):
                notes.refuse(anchor, spec)
                continue
            _rewrite(module, site, spec)
            count += 1
        if count:
            _drop_unused_weights(module)
        if next(calls(module, attention), None) is None and (fixed := attention_of_constant_length(module)):
            notes.refuse(fixed, f"export turned its length into the constant {fixed.meta['val'].shape[-1]}")
        return count

    def _spec(self, module: fx.GraphModule, steps: tuple[Step, ...], heads: int) -> ScoreSpec | str:
        """What the steps do, from the longest length that can make a difference, confirmed at short ones."""
        operands = [operand for step in steps for operand in step.operands]
        longest = min(self.max_positions, max(64, 2 * largest_constant(module, operands) + 8))
        if longest > _LONGEST:
            return f"its mask can differ up to position {longest}, more than the {_LONGEST} that are compared"
        found: list[ScoreSpec] = []
        for batch, length in ((1, longest), (2, 3), (2, 17)):
            scores = run_steps(steps, Evaluator(module, batch, length), heads)
            if isinstance(scores, str):
                return scores
            spec = spec_of_scores(scores.factor, scores.bias, scores.inner, scores.is_capped, like=found)
            if isinstance(spec, str):
                return spec
            found.append(spec)
        return found[0]


def _rewrite(module: fx.GraphModule, site: Site, spec: ScoreSpec) -> None:
    def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with module.graph.inserting_before(site.out):
            node = module.graph.call_function(target, args, kwargs)
        given = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with torch.no_grad():
            node.meta["val"] = target(*given[0], **given[1])
        node.meta["module"] = site.out.meta.get("module", "")
        return node

    swap = aten.transpose.int
    q, k, v = (emit(swap, o.node, 2, 3) if o.is_swapped else o.node for o in (site.q, site.k, site.v))
    options: dict[str, Any] = {"scale": spec.scale, "window": spec.mask.window, "chunk": spec.mask.chunk}
    options |= {"softcap": spec.softcap} if spec.softcap else {}
    options |= {"alibi_slopes": _slopes(module, spec.slopes)} if spec.slopes else {}
    found = emit(swap, emit(attention.op, q, k, v, **options), 1, 2)
    if site.out.meta["val"].dim() == 3:
        found = emit(aten.flatten.using_ints, found, 0, 1)
    site.out.replace_all_uses_with(found)
    module.graph.erase_node(site.out)


def _slopes(module: fx.GraphModule, slopes: tuple[float, ...]) -> fx.Node:
    """A new weight with the slopes of the heads; equal ones are shared."""
    values = torch.tensor(slopes, dtype=torch.float32, device=module.meta["device"])
    placeholders = module.graph.find_nodes(op="placeholder")
    known = [n for n in placeholders if slot_of(n).name.startswith("alibi_slopes.")]
    for node in known:
        if torch.equal(constants_of(module)[slot_of(node).name], values):
            return node
    slot = Slot("weight", f"alibi_slopes.{len(known)}", tuple(values.shape), values.dtype)
    with module.graph.inserting_after(placeholders[-1]):
        node = module.graph.placeholder("alibi_slopes")
    node.meta.update(val=placeholders[0].meta["val"].fake_mode.from_tensor(values), module="")
    assign_slot(node, slot)
    constants_of(module)[slot.name] = values
    return node


def _drop_unused_weights(module: fx.GraphModule) -> None:
    """Mask buffers leave the graph with the masks."""
    module.graph.eliminate_dead_code()
    for node in module.graph.find_nodes(op="placeholder"):
        if not node.users and slot_of(node).kind == "weight":
            module.graph.erase_node(node)
