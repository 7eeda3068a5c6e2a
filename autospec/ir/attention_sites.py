"""Where a graph attends: SDPA calls, and softmax between a product of queries and keys and one with values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autospec.ir.match import argument, aten, calls, is_call
from autospec.ir.scores import SKIPPED, VIEWS, Step, score_step
from autospec.ir.sizes import why_not_sizes_only
from autospec.ir.text import target_text

_SDPA = aten.scaled_dot_product_attention
_SOFTMAX = (aten.softmax.int, aten._softmax)


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


def attention_sites(module: fx.GraphModule) -> Iterator[tuple[fx.Node, Site | str]]:
    """Every SDPA or softmax over the length with its site, or with the reason why it is none."""
    for anchor in calls(module, (_SDPA, *_SOFTMAX)):
        if isinstance(_keys(anchor), torch.SymInt):  # else a softmax over experts or features
            yield anchor, _sdpa(module, anchor) if is_call(anchor, _SDPA) else _written_out(module, anchor)


def attention_of_constant_length(module: fx.GraphModule) -> fx.Node | None:
    """What may have been attention before export turned its length into a constant."""
    for anchor in calls(module, (_SDPA, *_SOFTMAX)):
        sizes = anchor.meta["val"].shape
        if not isinstance(_keys(anchor), torch.SymInt) and len(sizes) == 4 and sizes[-1] == sizes[-2]:
            return anchor
    return None


def _keys(anchor: fx.Node) -> Any:
    return anchor.meta["val"].shape[-2 if is_call(anchor, _SDPA) else -1]


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
