"""Rows that nothing reads are not computed: a choice of one row per request moves up to where rows meet.

    %y = aten.linear(%x, %w)                     %x1 = autospec.last_rows(%x, %q_lens)
    %z = aten.add.Tensor(%r, %y)           ->    %r1 = autospec.last_rows(%r, %q_lens)
    %l = autospec.last_rows(%z, %q_lens)         %y1 = aten.linear(%x1, %w);  %l = aten.add.Tensor(%r1, %y1)

What follows the last attention of a prompt's chunk, or of a head's pass over committed tokens, is then computed for one row.

Legal: every op that moves computes a row of its result from the same row of its inputs, and all that read it move as well.
Gives up on: attention, experts, latents and every other op that `_row_inputs` does not know; the choice stays behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autospec.ir.build import Builder, inherit
from autospec.ir.match import aten, calls, operand, overloads
from autospec.ir.passes import Notes, Pass
from autospec.kernels.commit import last_rows

Inputs = Sequence[fx.Node] | None  # whose same rows a result's row is computed from; None: from other rows, too


@dataclass(frozen=True, kw_only=True)
class SkipUnreadRows(Pass):
    """Choose the last valid row before what treats rows alike, not behind it."""

    name = "skip-unread-rows"
    is_optional = True

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        choices: dict[fx.Node, list[fx.Node]] = {}  # by the number of valid rows
        for node in calls(module, last_rows):
            choices.setdefault(operand(node, 1), []).append(node)
        return sum(_skip(module, count, chosen, notes) for count, chosen in choices.items())


def _skip(module: fx.GraphModule, count: fx.Node, chosen: Sequence[fx.Node], notes: Notes) -> int:
    """Move the choices of the last of `count` valid rows; -> ops that compute fewer rows."""
    place = {node: i for i, node in enumerate(module.graph.nodes)}
    moving = _moving(module, set(chosen), place[count], place)
    narrow: dict[fx.Node, fx.Node] = {}

    def narrowed(node: fx.Node, builder: Builder) -> fx.Node:
        if node not in narrow:
            narrow[node] = builder.call(last_rows, node, count)
        return narrow[node]

    for node, inputs in moving.items():
        builder = Builder(module, node, node.meta.get("module", ""))
        given = {one: narrowed(one, builder) if one in inputs else one for one in node.all_input_nodes}
        args, kwargs = fx.map_arg((_sized(node), node.kwargs), given.__getitem__)
        narrow[node] = builder.call(node.target, *args, **kwargs)
        inherit(narrow[node], node)
    for node in chosen:
        if operand(node) in moving:
            node.replace_all_uses_with(narrow[operand(node)])
            module.graph.erase_node(node)
    for node in reversed(moving):
        module.graph.erase_node(node)
    if moving:
        rows = next(iter(moving)).meta["val"].shape[1]
        notes.say(f"{len(moving)} ops on 1 row instead of {rows}")
    return len(moving)


def _moving(
    module: fx.GraphModule, chosen: set[fx.Node], first: int, place: Mapping[fx.Node, int]
) -> dict[fx.Node, Sequence[fx.Node]]:
    """Nodes behind `first` of which only a choice is read, in graph order, with the inputs that have the same rows."""
    moving: dict[fx.Node, Sequence[fx.Node]] = {}
    for node in reversed(module.graph.nodes):
        if place[node] <= first or not node.users or not all(user in chosen or user in moving for user in node.users):
            continue
        inputs = _row_inputs(node)
        if inputs is not None:
            moving[node] = inputs
    return dict(reversed(moving.items()))


def _row_inputs(node: fx.Node) -> Inputs:
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] < 2:
        return None
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _aligned(node, value)
    rule = _RULES.get(node.target)
    return rule(node, value) if rule is not None else None


def _aligned(node: fx.Node, value: Tensor) -> Inputs:
    """Every input that has the result's rows; others are the same for all rows."""
    found = []
    for one in node.all_input_nodes:
        given = one.meta["val"]
        if not isinstance(given, Tensor):
            return None
        rows_at = 1 - value.dim() + given.dim()  # shapes are aligned at their ends
        if rows_at < 0 or given.shape[rows_at] == 1:
            continue
        if rows_at == 0 or given.shape[:2] != value.shape[:2]:
            return None  # rows without requests
        found.append(one)
    return found or None


def _first_has_rows(node: fx.Node, value: Tensor) -> Inputs:
    """One input with rows, the first; all that follows are parameters."""
    given = operand(node)
    others = [one for one in node.all_input_nodes if one is not given]
    same = given.meta["val"].dim() > 2 and given.meta["val"].shape[:2] == value.shape[:2]
    return [given] if same and all(one.op == "placeholder" for one in others) else None


def _behind_rows(node: fx.Node, value: Tensor) -> Inputs:
    """Reductions, softmax and parts along dimensions behind the rows."""
    given = operand(node)
    arguments = {spec.name: argument for spec, argument in zip(node.target._schema.arguments, node.args, strict=False)}  # type: ignore[union-attr]
    dims = arguments.get("dim", 0)
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    is_behind = bool(dims) and all(isinstance(dim, int) and dim % given.meta["val"].dim() > 1 for dim in dims)
    return _first_has_rows(node, value) if is_behind else None


def _normalized(node: fx.Node, value: Tensor) -> Inputs:
    return _first_has_rows(node, value) if len(node.args[1]) < value.dim() - 1 else None  # type: ignore[arg-type]


def _joined(node: fx.Node, value: Tensor) -> Inputs:
    """Concatenation behind the rows."""
    dim = node.args[1] if len(node.args) > 1 else 0
    return list(node.all_input_nodes) if dim % value.dim() > 1 else None  # type: ignore[operator]


def _sized(node: fx.Node) -> tuple[Any, ...]:
    """The arguments for one row: of a view, whose sizes are among them."""
    if node.target in overloads(_VIEWS):
        return (node.args[0], [node.meta["val"].shape[0], 1, *node.meta["val"].shape[2:]])
    return node.args


_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_RULES: dict[Any, Callable[[fx.Node, Tensor], Inputs]] = {
    **dict.fromkeys(overloads((aten.linear.default, aten._to_copy.default, aten.clone.default, *_VIEWS)), _first_has_rows),
    **dict.fromkeys(
        overloads((
            aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten._softmax.default,
            aten.softmax.int, aten.slice.Tensor, aten.select.int,
        )), _behind_rows,
    ),
    **dict.fromkeys(overloads((aten.rms_norm.default, aten.layer_norm.default)), _normalized),
    aten.cat.default: _joined,
}  # fmt: skip
