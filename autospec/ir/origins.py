"""Which element of which tensor every element of a node is, where only data movement stands between them.

Views, splits, concatenations, copies and broadcasts are followed back to the tensors that something computed. The
movement is run on element numbers at a concrete batch and length, so how a model spells it does not matter.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autospec.ir.match import aten, is_call
from autospec.ir.sizes import Evaluator

_MOVES = (
    aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.transpose, aten.permute, aten.t,
    aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.slice, aten.select, aten.narrow, aten.cat, aten.stack,
    aten.expand, aten.repeat, aten.unsqueeze, aten.squeeze, aten.slice_scatter, aten.copy, aten.clone, aten.contiguous,
    aten.alias, aten.detach,
)  # fmt: skip
_UNWRITTEN = (aten.new_empty, aten.empty, aten.empty_like)  # their elements are no one's until they are written


def is_move(node: Any) -> bool:
    """Does the node only rearrange its operands' elements?"""
    return isinstance(node, fx.Node) and (is_call(node, (*_MOVES, *_UNWRITTEN)) or node.target is operator.getitem)


def is_widened(node: Any) -> bool:
    """Is the node a cast of 16-bit numbers to float32, which changes none of them?"""
    if not is_call(node, aten._to_copy) or node.meta["val"].dtype != torch.float32:
        return False
    return node.args[0].meta["val"].dtype in (torch.bfloat16, torch.float16)


def moved_from(node: fx.Node, widens: bool = False) -> list[fx.Node]:
    """The nodes behind movement (`widens`: and behind widening casts): those that move and where it starts, in graph order."""
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        if is_call(current, _UNWRITTEN) or not (is_move(current) or (widens and is_widened(current))):
            continue
        for source in current.all_input_nodes:
            if source not in seen and not isinstance(source.meta["val"], torch.SymInt):
                seen.add(source)
                waiting.append(source)
    return [one for one in node.graph.nodes if one in seen]


class Origins:
    """Element numbers at one batch and length.

    Args:
        evaluator: knows the sizes.
        widens: casts of 16-bit numbers to float32 are looked through, too.
    """

    def __init__(self, evaluator: Evaluator, widens: bool = False) -> None:
        self.evaluator, self.widens = evaluator, widens

    def numbers(self, node: fx.Node) -> Tensor:
        """0, 1, 2, ... in the shape of a node."""
        shape = self.evaluator.shape(node)
        return torch.arange(torch.Size(shape).numel()).reshape(shape)

    def of(self, node: fx.Node, sources: Sequence[fx.Node]) -> tuple[Tensor, Tensor]:
        """For every element of `node`: the index of its source (-1: none of them) and its number in it, both int64."""
        which, number = (self._run(node, sources, is_number) for is_number in (False, True))
        return which, number

    def _run(self, node: fx.Node, sources: Sequence[fx.Node], is_number: bool) -> Tensor:
        values: dict[fx.Node, Any] = {}
        for index, source in enumerate(sources):
            numbers = self.numbers(source)
            values[source] = numbers if is_number else torch.full_like(numbers, index)
        for current in moved_from(node, self.widens):
            if current not in values:
                values[current] = self._move(current, values)
        found: Tensor = values[node]
        return found

    def _move(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if self.widens and is_widened(node):
            return values[node.args[0]]  # type: ignore[index]
        if is_call(node, _UNWRITTEN) or not is_move(node):
            known = node.meta["val"]
            if isinstance(known, Tensor):
                return torch.full(self.evaluator.shape(node), -1)
            return [torch.full([self.evaluator.size(size) for size in one.shape], -1) for one in known]

        def concrete(operand: fx.Node) -> Any:
            size = operand.meta["val"]
            return self.evaluator.size(size) if isinstance(size, torch.SymInt) else values[operand]

        args, kwargs = fx.map_arg((node.args, node.kwargs), concrete)
        return node.target(*args, **kwargs)  # type: ignore[operator]
