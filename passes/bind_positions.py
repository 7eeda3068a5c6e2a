"""Positions that a model counts itself, 0 to length - 1, become the positions that decoding hands it.

    %a = aten.arange(%s)                         %p = aten.add(%position_ids, 2)
    %b = aten.add(%a, 2)                   ->
    %e = aten.embedding(%w, %b)                  %e = aten.embedding(%w, %p)

Legal: the replaced tensor is an integer made of sizes alone whose values at several sizes are c + 0, 1, ... along the
length; position_ids are 0, 1, ... wherever the model counts itself. What it is used for keeps its shape or gains the
batch dimension. That nothing else counts positions is what the split-invariance probe of capture holds.
Gives up on: positions that meet other tensors in a shape that a batch of positions does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autospec.ir.match import aten, is_call
from autospec.ir.passes import Notes, Pass
from autospec.ir.sizes import Evaluator, is_tensor, meeting_data, value_inputs
from autospec.ir.slots import find_slot

_SIZES = ((2, 5), (3, 17))  # batch and length at which values are compared


@dataclass(frozen=True, kw_only=True)
class BindPositions(Pass):
    """Replace counted positions by position_ids."""

    name = "bind-positions"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        position_ids = find_slot(module, "position_ids")
        input_ids = find_slot(module, "input_ids")
        if position_ids is None or input_ids is None:
            return 0
        count = 0
        for node, offset in list(_counted(module)):
            positions = position_ids if position_ids.users else input_ids  # export gave unused ones sizes of their own
            lifted = _lift(node, positions.meta["val"])
            if isinstance(lifted, str):
                notes.refuse(node, lifted)
                continue
            position_ids.meta["val"] = positions.meta["val"]
            _replace(module, node, position_ids, offset, lifted)
            count += 1
        return count


def _counted(module: fx.GraphModule) -> Iterator[tuple[fx.Node, int]]:
    """Integer nodes [S], [1, S] or [B, S] that count positions from an offset and meet tokens or parameters."""
    evaluators = [Evaluator(module, batch, length) for batch, length in _SIZES]
    waiting = meeting_data(module)
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        offset = _offset(node, evaluators)
        if offset is not None:
            yield node, offset
            continue
        for source in value_inputs(node):
            if source not in seen and is_tensor(source):
                seen.add(source)
                waiting.append(source)


def _offset(node: fx.Node, evaluators: list[Evaluator]) -> int | None:
    """c if the node's value is c + 0, 1, ... along its last dimension at every size."""
    value = node.meta["val"]
    if value.dtype not in (torch.int64, torch.int32) or value.dim() not in (1, 2):
        return None
    offsets = set()
    for evaluator in evaluators:
        batch, length = evaluator.batch, evaluator.length
        if evaluator.shape(node) not in ((length,), (1, length), (batch, length)):
            return None
        found = evaluator.value(node)
        offsets.add(int(found.flatten()[0]))
        if not bool((found - found.flatten()[0] == torch.arange(length, device=found.device)).all()):
            return None
    return offsets.pop() if len(offsets) == 1 else None


def _lift(node: fx.Node, positions: torch.Tensor) -> dict[fx.Node, Any] | str:
    """New metadata of every node behind `node` once that is [B, S], up to where shapes are what they were."""
    lifted: dict[fx.Node, Any] = {node: positions.to(node.meta["val"].dtype)}
    for user in _behind(node):
        if user.op == "output":
            if any(source in lifted for source in user.all_input_nodes):
                return "the output would change its shape"
            continue
        if not any(source in lifted for source in user.all_input_nodes):
            continue
        if _adds_batch(user, lifted):
            lifted[user] = lifted[user.args[0]]  # type: ignore[index]
            continue
        if _indexes_tokens(user, lifted):
            return "they index the tokens of this call"
        args, kwargs = fx.map_arg((_arguments(user, lifted), user.kwargs), lambda n: lifted.get(n, n.meta["val"]))
        try:
            with torch.no_grad():
                value = user.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            return f"%{user.name} does not take a batch of positions ({type(error).__name__})"
        if not isinstance(value, torch.Tensor) or str(tuple(value.shape)) != str(tuple(user.meta["val"].shape)):
            lifted[user] = value
    return lifted


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    following = node.next
    while following.op != "root":
        yield following
        following = following.next


def _indexes_tokens(node: fx.Node, lifted: dict[fx.Node, Any]) -> bool:
    """A gather with positions from a tensor that has a row per token, not from a table."""
    if not is_call(node, (aten.embedding, aten.index_select, aten.gather, aten.index, aten.take_along_dim)):
        return False
    table = node.args[0]
    return isinstance(table, fx.Node) and table not in lifted and any(
        isinstance(size, torch.SymInt) for size in table.meta["val"].shape
    )


def _adds_batch(node: fx.Node, lifted: dict[fx.Node, Any]) -> bool:
    """unsqueeze(x, 0) of something that has its batch dimension now."""
    source = node.args[0] if node.args else None
    if not is_call(node, aten.unsqueeze) or not isinstance(source, fx.Node) or source not in lifted:
        return False
    before, now = source.meta["val"], lifted[source]
    dims = before.dim()
    return node.args[1] in (0, -dims - 1) and isinstance(now, torch.Tensor) and now.dim() == dims + 1


def _arguments(node: fx.Node, lifted: dict[fx.Node, Any]) -> tuple[Any, ...]:
    """Arguments for an operand that has a batch dimension in front now.

    Dimensions counted from the front move by one; a view that put a 1 in front leaves room for the batch there.
    """
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and isinstance(lifted.get(source), torch.Tensor) and len(node.args) > 1:
        before, now = source.meta["val"], lifted[source]
        gained = now.dim() - before.dim() if isinstance(now, torch.Tensor) else 0
        dim = node.args[1]
        if is_call(node, (aten.unsqueeze, aten.slice)) and gained == 1 and isinstance(dim, int) and dim >= 0:
            return (source, dim + 1, *node.args[2:])
        if is_call(node, (aten.view, aten.reshape, aten._unsafe_view)):
            sizes: list[Any] = list(dim)  # type: ignore[arg-type]
            if sizes and sizes[0] == 1 and -1 not in sizes:
                return source, [-1, *sizes[1:]]
    return node.args


def _replace(
    module: fx.GraphModule, node: fx.Node, position_ids: fx.Node, offset: int, lifted: dict[fx.Node, Any]
) -> None:
    found = position_ids
    if offset:
        with module.graph.inserting_after(node):
            found = module.graph.call_function(aten.add.Tensor, (position_ids, offset))
        found.meta.update(val=position_ids.meta["val"] + offset, module=node.meta.get("module", ""))
    if node.meta["val"].dtype != found.meta["val"].dtype:
        with module.graph.inserting_after(found if offset else node):
            cast = module.graph.call_function(aten._to_copy.default, (found,), {"dtype": node.meta["val"].dtype})
        cast.meta.update(val=lifted[node], module=node.meta.get("module", ""))
        found = cast
    for user in [behind for behind in lifted if _adds_batch(behind, lifted)]:  # before metadata is rewritten
        user.replace_all_uses_with(user.args[0])  # type: ignore[arg-type]
        module.graph.erase_node(user)
        del lifted[user]
    rewritten = {behind: _arguments(behind, lifted) for behind in lifted if behind is not node}
    for behind, arguments in rewritten.items():
        behind.args = arguments
        behind.meta["val"] = lifted[behind]
    node.replace_all_uses_with(found)
    module.graph.erase_node(node)
