"""Rows that nothing reads are not computed: a choice of one row per request moves up to where rows meet.

    %y = aten.linear(%x, %w)                     %x1 = autospec.last_rows(%x, %q_lens)
    %z = aten.add.Tensor(%r, %y)           ->    %r1 = autospec.last_rows(%r, %q_lens)
    %l = autospec.last_rows(%z, %q_lens)         %y1 = aten.linear(%x1, %w);  %l = aten.add.Tensor(%r1, %y1)

In most decoders all that follows the last attention is then computed for one row: in a prompt's chunk, and where a draft head or
an external draft runs committed tokens.

Legal: every op that moves computes a row of its result from the same row of its inputs and writes nothing, and all that read it
move as well.
Gives up on: attention, experts and every other op that `_rows_of` does not know, such as those of several results and products
of all requests' rows in one dimension; the choice stays behind them. State is not read earlier than before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autospec.ir.build import Builder, inherit
from autospec.ir.match import aten, calls, operand
from autospec.ir.passes import Notes, Pass
from autospec.ir.slots import slot_of
from autospec.kernels.commit import last_rows

Rows = Sequence[fx.Node] | None  # inputs whose same rows a result's row is computed from; None: from other rows, too


@dataclass(frozen=True, kw_only=True)
class SkipUnreadRows(Pass):
    """Choose the last valid row before what treats rows alike, not behind it."""

    name = "skip-unread-rows"
    is_optional = True

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        choices: dict[fx.Node, list[fx.Node]] = {}  # by the number of valid rows
        for node in calls(module, last_rows):
            choices.setdefault(operand(node, 1), []).append(node)
        return sum(_skip(module, count, chosen, notes) for count, chosen in choices.items() if not _is_state(count))


def _skip(module: fx.GraphModule, count: fx.Node, chosen: Sequence[fx.Node], notes: Notes) -> int:
    """Move the choices of the last of `count` valid rows; -> ops that compute fewer rows."""
    moving = _moving(module, count, set(chosen))
    narrow: dict[fx.Node, fx.Node] = {}
    for node, rows in moving.items():
        builder = Builder(module, node, node.meta.get("module", ""))
        for one in rows:
            if one not in narrow:
                narrow[one] = builder.call(last_rows, one, count)
        given = {one: narrow[one] if one in rows else one for one in node.all_input_nodes}
        args, kwargs = fx.map_arg((_arguments(node), node.kwargs), given.__getitem__)
        narrow[node] = builder.call(node.target, *args, **kwargs)
        inherit(narrow[node], node)
    for node in chosen:
        if operand(node) in moving:
            node.replace_all_uses_with(narrow[operand(node)])
            module.graph.erase_node(node)
    for node in reversed(moving):
        module.graph.erase_node(node)
    if moving:
        notes.say(f"{len(moving)} ops on 1 row instead of {next(iter(moving)).meta['val'].shape[1]}")
    return len(moving)


def _moving(module: fx.GraphModule, count: fx.Node, chosen: set[fx.Node]) -> dict[fx.Node, Sequence[fx.Node]]:
    """Nodes behind `count` of which only a choice is read, in graph order, with the inputs that have the same rows."""
    moving: dict[fx.Node, Sequence[fx.Node]] = {}
    for node in reversed(module.graph.nodes):
        if node is count:
            break
        # Who reads a node as a parameter needs all of it.
        if node.users and all(user in chosen or node in moving.get(user, ()) for user in node.users):
            rows = _rows_of(node)
            if rows is not None and not any(map(_is_state, rows)):
                moving[node] = rows
    return dict(reversed(moving.items()))


def _is_state(node: fx.Node) -> bool:
    return node.op == "placeholder" and slot_of(node).kind == "state"


def _rows_of(node: fx.Node) -> Rows:
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] < 2:
        return None
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return None if node.target._schema.is_mutable else _aligned(node, value)  # type: ignore[union-attr]
    rule = _RULES.get(node.target)
    return rule(node, value) if rule is not None else None


def _aligned(node: fx.Node, value: Tensor) -> Rows:
    """Every input that has the result's rows; the others are the same for all rows."""
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


def _first(node: fx.Node, value: Tensor) -> Rows:
    """The first input, if it has the same rows; all that follows are parameters."""
    given = operand(node).meta["val"]
    return [operand(node)] if given.dim() > 2 and given.shape[:2] == value.shape[:2] else None


def _linear(node: fx.Node, value: Tensor) -> Rows:
    is_bias_plain = len(node.args) < 3 or node.args[2] is None or operand(node, 2).meta["val"].dim() == 1
    return _first(node, value) if is_bias_plain else None


def _behind_rows(node: fx.Node, value: Tensor) -> Rows:
    """Reductions and parts along dimensions behind the rows."""
    dims = node.args[1] if len(node.args) > 1 else None
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    rank = operand(node).meta["val"].dim()
    is_behind = bool(dims) and all(isinstance(dim, int) and dim % rank > 1 for dim in dims)
    return _first(node, value) if is_behind else None


def _normalized(node: fx.Node, value: Tensor) -> Rows:
    return _first(node, value) if len(node.args[1]) < value.dim() - 1 else None  # type: ignore[arg-type]


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """Those of a call on one row: the sizes of a view are among them."""
    if node.target in _VIEWS:
        return (node.args[0], [node.meta["val"].shape[0], 1, *node.meta["val"].shape[2:]])
    return node.args


_VIEWS = (aten.view.default, aten.reshape.default)
_PARTS = (aten.mean.dim, aten.sum.dim_IntList, aten.slice.Tensor, aten.select.int)
_RULES: dict[Any, Callable[[fx.Node, Tensor], Rows]] = {
    aten.linear.default: _linear,
    aten.type_as.default: _aligned,
    **dict.fromkeys((aten._to_copy.default, *_VIEWS), _first),
    **dict.fromkeys(_PARTS, _behind_rows),
    **dict.fromkeys((aten.rms_norm.default, aten.layer_norm.default), _normalized),
}
