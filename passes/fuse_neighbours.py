"""On a GPU, linear layers of few rows take in their neighbours: the RMSNorm before, the gated activation and the residual after.

    %n = <RMSNorm>(%h, %norm)
    %y = aten.linear(%n, %gate+up)
    %a = aten.mul(aten.silu(%y[: O]), %y[O :])    ->   %a = autospec.fused_linear(%h, %gate+up, norm_weight=%norm, "silu")
    %d = aten.linear(%a, %down)                        %s = autospec.fused_linear(%a, %down, residual=%h)
    %s = aten.add(%h, %d)

Where the layer before is such an op, too, it prepares the norm: it returns its result times the norm's weight and sums of
squares as well (fused_linear_normed), and the layer behind only divides.

Legal: the op's reference is the ops it replaces; a neighbour is taken in only where nobody else reads what lies between.
Gives up on: what no kernel takes (too many rows, float32, odd widths); neighbours written in another way stay outside.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autospec.ir.build import Builder, device_of, inherit, substitute, value_of
from autospec.ir.match import Op, argument, aten, calls, is_call
from autospec.ir.passes import Notes, Pass
from autospec.kernels.fused_linear import fused_linear, fused_linear_normed

_ACTIVATIONS = {aten.silu.default: "silu", aten.gelu.default: "gelu_tanh"}


@dataclass
class _Place:
    """A linear layer and what was found around it."""

    linear: fx.Node
    result: fx.Node  # what the op's result stands for
    x: fx.Node
    options: dict[str, Any] = field(default_factory=dict)
    between: list[fx.Node] = field(default_factory=list)  # further ops that it replaces, last ones first

    def why_not(self) -> str | None:
        """Why no kernel takes the op as it stands; None if one does."""
        _, weight, *bias = self.linear.args
        values = fused_linear.bind(value_of((self.x, weight, *bias)), value_of(self.options))
        reasons = [one.why_not(values) for one in fused_linear.implementations]
        return None if None in reasons else "; ".join(reason for reason in reasons if reason)


@dataclass(frozen=True, kw_only=True)
class FuseNeighbours(Pass):
    """Replace a linear layer and its neighbours by one op, where a kernel takes it."""

    name = "fuse-neighbours"
    is_optional = True

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if device_of(module).type != "cuda":
            return 0
        count = 0
        for node in calls(module, (aten.linear, fused_linear)):
            x = node.args[0]
            assert isinstance(x, fx.Node), "a linear layer's input is a node"
            if node.kwargs:
                continue  # it has taken in its neighbours
            place = _Place(node, node, x)
            if (reason := place.why_not()) is not None:
                place = _gated(place)  # a gate's rows are two weights: only together they may be whole tiles
                if (reason := place.why_not()) is not None:
                    notes.refuse(node, reason)
                    continue
            for extend in (_gated, _added_to):
                wider = extend(place)
                place = wider if wider.why_not() is None else place
            norm = _norm_before(place)
            if norm is not None:
                place = _prepared(module, place, norm) or _normed(place, norm) or place
            if place.options or is_call(node, aten.linear):
                _replace(module, place)
                count += 1
        return count


def _replace(module: fx.GraphModule, place: _Place) -> None:
    builder = Builder(module, place.result, place.linear.meta.get("module", ""))
    new = builder.call(fused_linear, place.x, *place.linear.args[1:], **place.options)
    inherit(new, place.linear)
    place.result.replace_all_uses_with(new)
    for node in (*place.between, place.linear):
        module.graph.erase_node(node)
    _erase_unused(module, place.linear.args[0], keep=place.x)


def _erase_unused(module: fx.GraphModule, node: Any, keep: fx.Node) -> None:
    """A norm that was taken in, backwards."""
    if isinstance(node, fx.Node) and node is not keep and node.op == "call_function" and not node.users:
        sources = list(node.all_input_nodes)
        module.graph.erase_node(node)
        for source in sources:
            if not source._erased:
                _erase_unused(module, source, keep)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _gated(place: _Place) -> _Place:
    """act(y[: O]) * y[O :]"""
    node, width = place.linear, place.linear.meta["val"].shape[-1]
    halves = list(node.users)
    if place.options or len(halves) != 2 or width % 2 or not all(is_call(half, aten.slice.Tensor) for half in halves):
        return place
    halves.sort(key=lambda half: int(argument(half, "start") or 0))
    last = node.meta["val"].dim() - 1
    for half, (start, end) in zip(halves, ((0, width // 2), (width // 2, width)), strict=True):
        dim, low, high, step = (argument(half, name) for name in ("dim", "start", "end", "step"))
        if dim not in (-1, last) or (low or 0) != start or min(width if high is None else high, width) != end or step != 1:
            return place
    act = _only_user(halves[0])
    if act is None or act.target not in _ACTIVATIONS or _only_user(halves[1]) is not _only_user(act):
        return place
    if act.target is aten.gelu.default and argument(act, "approximate") != "tanh":
        return place
    product = _only_user(act)
    if not is_call(product, aten.mul.Tensor):
        return place
    assert product is not None
    options = {"activation": _ACTIVATIONS[act.target]}
    return _Place(node, product, place.x, options, [product, act, *halves])


def _added_to(place: _Place) -> _Place:
    """residual + y"""
    total = _only_user(place.result)
    if not is_call(total, aten.add.Tensor) or total is None or total.kwargs or len(total.args) != 2:
        return place
    residual = total.args[0] if total.args[1] is place.result else total.args[1]
    if not isinstance(residual, fx.Node) or residual is place.result:
        return place
    mine, other = place.result.meta["val"], residual.meta["val"]
    if mine.shape != other.shape or mine.dtype != other.dtype:
        return place
    return _Place(place.linear, total, place.x, place.options | {"residual": residual}, [total, *place.between])


@dataclass(frozen=True)
class _Norm:
    """norm * (h * rsqrt(mean(h^2) + eps)), computed in float32 and rounded to h's dtype before the product."""

    h: fx.Node
    weight: fx.Node
    eps: float


_WIDE = Op(aten._to_copy, ["h"], where=lambda node: None if node.meta["val"].dtype == torch.float32 else "not float32")
_MEAN = Op(aten.mean.dim, [Op(aten.pow.Tensor_Scalar, [_WIDE], where=lambda node: None if node.args[1] == 2 else "no square")],
           bind="mean")  # fmt: skip
_SCALED = Op(aten._to_copy, [Op(aten.mul.Tensor, [_WIDE, Op(aten.rsqrt, [Op(aten.add.Tensor, [_MEAN], bind="plus")])])])


def _norm_before(place: _Place) -> _Norm | None:
    """The RMSNorm whose result only this layer reads."""
    if _only_user(place.x) is not place.linear or not is_call(place.x, aten.mul.Tensor):
        return None
    for weight, normed in (place.x.args[:2], place.x.args[1::-1]):
        found: dict[str, Any] = {}
        if _SCALED.match(normed, found) is not None or not isinstance(weight, fx.Node) or not isinstance(normed, fx.Node):
            continue
        h, eps, mean = found["h"], found["plus"].args[1], found["mean"]
        is_over_the_row = mean.args[1] in ([-1], [mean.meta["val"].dim() - 1]) and mean.args[2:] == (True,)
        is_plain = normed.meta["val"].dtype == h.meta["val"].dtype == weight.meta["val"].dtype
        # A computed weight may not be there yet where the layer before would need it, a short one would be broadcast.
        is_stored = weight.op == "placeholder" and weight.meta["val"].shape == h.meta["val"].shape[-1:]
        if is_over_the_row and is_plain and is_stored and isinstance(eps, float):
            return _Norm(h, weight, eps)
    return None


def _normed(place: _Place, norm: _Norm) -> _Place | None:
    """The layer norms its input itself."""
    options = place.options | {"norm_weight": norm.weight, "eps": norm.eps}
    wider = _Place(place.linear, place.result, norm.h, options, place.between)
    return wider if wider.why_not() is None else None


def _prepared(module: fx.GraphModule, place: _Place, norm: _Norm) -> _Place | None:
    """The layer before leaves its result times the norm's weight, and sums of squares."""
    before = norm.h
    if not is_call(before, fused_linear):
        return None
    values = fused_linear_normed.bind((), value_of({**_by_name(before), "next_norm": norm.weight}))
    if all(one.why_not(values) is not None for one in fused_linear_normed.implementations):
        return None
    builder = Builder(module, before, before.meta.get("module", ""))
    whole, scaled, squares = builder.calls(fused_linear_normed, **_by_name(before), next_norm=norm.weight)
    options = {name: whole if value is before else value for name, value in place.options.items()}
    wider = _Place(place.linear, place.result, scaled, options | {"squares": squares, "eps": norm.eps}, place.between)
    if wider.why_not() is not None:
        for node in (whole, scaled, squares, whole.args[0]):
            module.graph.erase_node(node)  # type: ignore[arg-type]
        return None
    substitute(before, whole)
    return wider


def _by_name(call: fx.Node) -> dict[str, Any]:
    return {name: value for name, value in fused_linear.bind(call.args, call.kwargs).items() if value is not None}
