"""From q k^T to softmax, as data: the steps that a model takes, and what they do to a score at concrete sizes.

Every step is affine in the score with coefficients made of sizes and positions alone, except a softcap (a tanh).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autospec.ir.match import aten, is_call, overloads
from autospec.ir.sizes import Evaluator, why_not_sizes_only
from autospec.ir.text import target_text
from autospec.masks import HIDDEN

SKIPPED = (aten.clone, aten._to_copy, aten.dropout, aten.alias, aten.contiguous, aten.detach, aten.to.dtype)
VIEWS = (aten.view, aten._unsafe_view, aten.reshape)
_BINARY = {aten.add: "add", aten.sub: "sub", aten.mul: "mul", aten.div: "div"}
_NAMES = {overload: name for packet, name in _BINARY.items() for overload in overloads(packet)}
_FLOORS = (aten.maximum, aten.max.other, aten.clamp, aten.clamp_min)


@dataclass(frozen=True)
class Step:
    """One operation on the scores; operands are nodes or numbers.

    kinds: mul, div, add, sub (operand); mask (bool operand, False hides); causal; where (condition, fill, whether the
    score stands in the first branch); tanh; view (shapes before and after, symbolic); product (bias, beta, alpha).
    """

    kind: str
    operands: tuple[Any, ...] = ()


def score_step(module: fx.GraphModule, node: fx.Node) -> tuple[Step | None, Any] | str:
    """What a node does to the scores and the scores it reads, or why that cannot be said."""
    if is_call(node, SKIPPED):
        return None, node.args[0]
    if node.target in _NAMES:
        return _binary(module, node)
    if is_call(node, aten.baddbmm):
        reason = why_not_sizes_only(module, node.args[0])
        if reason is not None:
            return f"the bias of its scores cannot be computed from sizes alone: {reason}"
        return Step("product", (node.args[0], node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1))), None
    if is_call(node, aten.tanh):
        return Step("tanh"), node.args[0]
    if is_call(node, VIEWS):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return Step("view", (_Shape(source), _Shape(node))), source
    if is_call(node, (aten.where, aten.masked_fill)):
        return _where(module, node)
    if is_call(node, _FLOORS):
        scores, floor = node.args[0], node.args[1]
        if len(node.args) == 2 and isinstance(floor, (int, float)) and floor <= HIDDEN:
            return None, scores
        if isinstance(floor, fx.Node) and why_not_sizes_only(module, floor) is None and floor.meta["val"].dim() == 0:
            value = Evaluator(module, 1, 2).value(floor)
            if float(value) <= HIDDEN:
                return None, scores
        return "scores are clamped at a value that is not a mask's"
    return f"{target_text(node)} stands between q k^T and softmax"


class _Shape:
    """A node's symbolic shape; equal if the sizes are."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.text = str(tuple(node.meta["val"].shape))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shape) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


def _binary(module: fx.GraphModule, node: fx.Node) -> tuple[Step, Any] | str:
    kind = _NAMES[node.target]
    left, right = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
        return f"{target_text(node)} with options stands between q k^T and softmax"
    reason = why_not_sizes_only(module, right)
    if reason is None:
        return Step(kind, (right,)), left
    if kind in ("add", "mul") and why_not_sizes_only(module, left) is None:
        return Step(kind, (left,)), right
    what = "bias or mask" if kind in ("add", "sub") else "factor"
    return f"the {what} of its scores cannot be computed from sizes alone: {reason}"


def _where(module: fx.GraphModule, node: fx.Node) -> tuple[Step, Any] | str:
    if is_call(node, aten.masked_fill):
        scores, condition, fill = node.args[:3]
        is_first = False  # True hides
    else:
        condition, first, second = node.args[:3]
        is_first = why_not_sizes_only(module, first) is not None
        scores, fill = (first, second) if is_first else (second, first)
    for operand in (condition, fill):
        reason = why_not_sizes_only(module, operand)
        if reason is not None:
            return f"the mask of its scores cannot be computed from sizes alone: {reason}"
    return Step("where", (condition, fill, is_first)), scores


@dataclass
class Scores:
    """softmax reads factor * f(inner * q k^T) + bias, with f(x) = tanh(x) if is_capped, else x (and inner 1)."""

    factor: Tensor
    bias: Tensor
    inner: float = 1.0
    is_capped: bool = False


def run_steps(steps: tuple[Step, ...], evaluator: Evaluator, heads: int) -> Scores | str:
    """The steps at concrete sizes; factor and bias are [B, H, S, S]."""
    zero = torch.zeros((), dtype=torch.float64)
    scores = Scores(zero + 1, zero)
    for step in steps:
        values = tuple(value if isinstance(value, (_Shape, bool)) else evaluator.value(value) for value in step.operands)
        reason = _apply(scores, step.kind, values, evaluator)
        if reason is not None:
            return reason
    full = (evaluator.batch, heads, evaluator.length, evaluator.length)
    try:
        for name in ("factor", "bias"):
            value = getattr(scores, name)
            if value.dim() == 3 and value.shape[0] == evaluator.batch * heads:
                value = value.unflatten(0, full[:2])
            setattr(scores, name, value.broadcast_to(full))
    except RuntimeError:
        return f"its mask has the shape {tuple(scores.bias.shape)}, which is not [batch, heads, length, length]"
    return scores


def _apply(scores: Scores, kind: str, values: tuple[Any, ...], evaluator: Evaluator) -> str | None:
    numbers = [v.double() if isinstance(v, Tensor) and v.dtype != torch.bool else v for v in values]
    if kind == "mul":
        scores.factor, scores.bias = scores.factor * numbers[0], scores.bias * numbers[0]
    elif kind == "div":
        scores.factor, scores.bias = scores.factor / numbers[0], scores.bias / numbers[0]
    elif kind in ("add", "sub"):
        scores.bias = scores.bias + (numbers[0] if kind == "add" else -numbers[0])
    elif kind in ("mask", "causal"):
        shape = (evaluator.length, evaluator.length)
        shown = values[0] if kind == "mask" else torch.ones(shape, dtype=torch.bool).tril()
        scores.bias = torch.where(shown, scores.bias, float("-inf"))
    elif kind == "where":
        condition, fill, is_first = numbers
        shown = condition if is_first else ~condition
        scores.bias = torch.where(shown, scores.bias, torch.as_tensor(fill, dtype=torch.float64))
        scores.factor = torch.where(shown, scores.factor, torch.zeros_like(scores.factor))
    elif kind == "tanh":
        if scores.is_capped or scores.factor.dim() or scores.bias.dim() or float(scores.bias) != 0.0:
            return "a tanh stands behind the mask"
        scores.inner, scores.is_capped = float(scores.factor), True
        scores.factor, scores.bias = torch.ones_like(scores.factor), torch.zeros_like(scores.bias)
    elif kind == "view":
        before, after = (evaluator.shape(shape.node) for shape in values)
        for name in ("factor", "bias"):
            value = getattr(scores, name)
            if value.dim():
                setattr(scores, name, value.broadcast_to(before).reshape(after))
    else:
        assert kind == "product", f"unknown step {kind}"
        bias, beta, alpha = numbers
        scores.factor, scores.bias = scores.factor * alpha, scores.bias + bias * beta
    return None
