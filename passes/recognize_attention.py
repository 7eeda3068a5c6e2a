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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autospec.ir.match import argument, aten, calls, is_call
from autospec.ir.passes import Notes, Pass
from autospec.ir.scores import SKIPPED, VIEWS, Step, run_steps, score_step
from autospec.ir.sizes import Evaluator, constants_of, largest_constant, why_not_sizes_only
from autospec.ir.slots import Slot, assign_slot, slot_of
from autospec.ir.text import target_text
from autospec.kernels.attention import attention
from autospec.masks import ScoreSpec, spec_of_scores

_SDPA = aten.scaled_dot_product_attention
_SOFTMAX = (aten.softmax.int, aten._softmax)
_LONGEST = 8192  # the largest mask that is computed has this many rows; a guess that keeps it below a gigabyte


@dataclass(frozen=True)
class Operand:
    """A tensor [B, H, S, D], or one that is it after its last two dimensions are swapped."""

    node: fx.Node
    is_swapped: bool = False

    @property
    def shape(self) -> tuple[Any, ...]:
        shape = tuple(self.node.meta["val"].shape)
        return (*shape[:2], shape[3], shape[2]) if self.is_swapped else shape


@dataclass(frozen=True)
class Site:
    """One attention: its operands, the steps from q k^T to softmax, and the node that it replaces."""

    q: Operand
    k: Operand
    v: Operand
    steps: tuple[Step, ...]
    out: fx.Node


@dataclass(frozen=True, kw_only=True)
class RecognizeAttention(Pass):
    """Attention written out in aten ops becomes one canonical op."""

    name = "recognize-attention"
    max_positions: int

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        count = 0
        fixed: list[fx.Node] = []
        specs: dict[tuple[Any, ...], ScoreSpec | str] = {}
        for anchor in calls(module, (_SDPA, *_SOFTMAX)):
            sizes = anchor.meta["val"].shape
            if not isinstance(sizes[-2 if is_call(anchor, _SDPA) else -1], torch.SymInt):
                fixed += [anchor] if len(sizes) == 4 and sizes[-1] == sizes[-2] else []
                continue  # a softmax over experts or features, most likely
            site = _sdpa(module, anchor) if is_call(anchor, _SDPA) else _written_out(module, anchor)
            spec: ScoreSpec | str = site if isinstance(site, str) else ""
            if isinstance(site, Site):
                key = (site.steps, site.q.shape[1])
                if key not in specs:
                    specs[key] = self._spec(module, *key)
                spec = specs[key]
                if isinstance(spec, ScoreSpec):
                    _rewrite(module, site, spec)
                    count += 1
                    continue
            notes.refuse(anchor, str(spec))
        if fixed and next(calls(module, attention), None) is None:
            notes.refuse(fixed[0], f"export turned its length into the constant {fixed[0].meta['val'].shape[-1]}")
        if count:
            _drop_unused_weights(module)
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


def _sdpa(module: fx.GraphModule, node: fx.Node) -> Site | str:
    q, k, v = (Operand(value) for value in node.args[:3])  # type: ignore[arg-type]
    if argument(node, "dropout_p"):
        return "attention has dropout"
    scale = argument(node, "scale")
    steps = [Step("mul", (float(scale if scale is not None else q.shape[-1] ** -0.5),))]
    mask = argument(node, "attn_mask")
    if mask is not None:
        reason = why_not_sizes_only(module, mask)
        if reason is not None:
            return f"its mask cannot be computed from sizes alone: {reason}"
        steps.append(Step("mask" if mask.meta["val"].dtype == torch.bool else "add", (mask,)))
    if argument(node, "is_causal"):
        steps.append(Step("causal"))
    return _checked(Site(q, k, v, tuple(steps), node))


def _written_out(module: fx.GraphModule, softmax: fx.Node) -> Site | str:
    if softmax.args[1] not in (-1, softmax.meta["val"].dim() - 1):
        return f"softmax is taken over dimension {softmax.args[1]}, not over the keys"
    node: Any = softmax.args[0]
    steps: list[Step] = []
    while not is_call(node, (aten.matmul, aten.bmm)):
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return "softmax does not read a product of queries and keys"
        found = score_step(module, node)
        if isinstance(found, str):
            return found
        step, following = found
        steps += [step] if step is not None else []
        if is_call(node, aten.baddbmm):
            break
        node = following
    q, kt = node.args[1:3] if is_call(node, aten.baddbmm) else node.args[:2]
    out = _product_with_values(softmax)
    if isinstance(out, str):
        return out
    operands = _operand(q), _operand(kt, is_swapped=True), _operand(out.args[1])
    for operand in operands:
        if isinstance(operand, str):
            return operand
    return _checked(Site(*operands, tuple(reversed(steps)), out))  # type: ignore[arg-type]


def _product_with_values(softmax: fx.Node) -> fx.Node | str:
    """The matmul of the probabilities with v."""
    node = softmax
    while True:
        if len(node.users) != 1:
            return "the attention probabilities are read more than once"
        user = next(iter(node.users))
        if is_call(user, (aten.matmul, aten.bmm)) and user.args[0] is node:
            return user
        if not is_call(user, (*SKIPPED, *VIEWS)):
            return f"{target_text(user)} stands between softmax and the product with the values"
        node = user


def _operand(node: Any, is_swapped: bool = False) -> Operand | str:
    """Look through the views that flatten [B, H, S, D] for bmm, and through a swap of the last two dimensions."""
    while isinstance(node, fx.Node):
        dims = node.meta["val"].dim()
        if (is_swapped or dims == 3) and _swaps_last(node):
            node, is_swapped = node.args[0], not is_swapped
        elif dims == 4:
            return Operand(node, is_swapped)
        elif is_call(node, SKIPPED) or _flattens(node):
            node = node.args[0]
        else:
            return f"{target_text(node)} makes an operand that is not [batch, heads, length, dim]"
    return "an operand is not a tensor"


def _swaps_last(node: fx.Node) -> bool:
    dims = node.meta["val"].dim()
    return is_call(node, aten.transpose.int) and {int(d) % dims for d in node.args[1:3]} == {dims - 2, dims - 1}  # type: ignore[arg-type]


def _flattens(node: fx.Node) -> bool:
    """A view of [B, H, S, D] as [B * H, S, D]."""
    return is_call(node, VIEWS) and len(_text(node.args[0])) == 4 and _text(node.args[0])[2:] == _text(node)[1:]


def _text(node: Any) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _checked(site: Site) -> Site | str:
    q, k, v = site.q.shape, site.k.shape, site.v.shape
    if not len(q) == len(k) == len(v) == 4:
        return "an operand is not [batch, heads, length, dim]"
    if not str(q[2]) == str(k[2]) == str(v[2]):
        return f"{q[2]} queries attend to {k[2]} keys: it is not self-attention"
    if k[1] != v[1] or q[1] % k[1]:
        return f"{q[1]} query heads do not group over {k[1]} key and {v[1]} value heads"
    return site


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


def new_weights(module: fx.GraphModule) -> Iterable[str]:
    """Names of the weights that this pass made."""
    return [name for name in constants_of(module) if name.startswith("alibi_slopes.")]
