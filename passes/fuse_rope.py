"""On a GPU, the rotary embedding of queries and keys joins the write of their K and V rows.

    %k = <rotate>(%k0, %cos, %sin)                        %q = autospec.append_rotated(%q0, %k0, %v, %cos, %sin,
    autospec.append_kv(%k, %v, %k_pages, ...)       ->                                 %k_pages, ...)
    %o = autospec.paged_attention(<rotate>(%q0, ...), ...)   %o = autospec.paged_attention(%q, ...)

    (a drafter writes and reads the same pages in its catch-up and in every level)       every write with the read behind it

Legal: the op's reference is the ops it replaces, and it stands where append_kv stood: behind all earlier writes to the pages
and reads of them, before all later ones. Queries only have to be there by then.
Gives up on: keys or queries that are rotated in another way (interleaved, a part of them, in float32), rows that several
layers read before the pages are written again, or none, rotated values that something else reads too.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from torch import fx

from autospec.ir.build import Builder, device_of
from autospec.ir.match import Op, argument, aten, calls, is_call
from autospec.ir.passes import Notes, Pass
from autospec.kernels.append_kv import append_kv
from autospec.kernels.append_rotated import append_rotated
from autospec.kernels.ordered_attention import ordered_attention
from autospec.kernels.paged_attention import paged_attention

_ATTENTION = (paged_attention, ordered_attention)
_WRITERS = (append_kv, append_rotated)


@dataclass(frozen=True, kw_only=True)
class FuseRope(Pass):
    """Replace the rotation of queries and keys and append_kv by one op."""

    name = "fuse-rope"
    is_optional = True

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if device_of(module).type != "cuda":
            return 0
        count = 0
        for node in calls(module, append_kv):
            reason = _fuse(module, node)
            if reason is None:
                count += 1
            else:
                notes.refuse(node, reason)
        return count


def _readers(module: fx.GraphModule, append: fx.Node) -> list[fx.Node]:
    """Attention over the pages that an append writes, up to the next write to them."""
    touching = [
        node for node in calls(module, (*_ATTENTION, *_WRITERS))
        if argument(node, "k_pages") is argument(append, "k_pages") and append < node
    ]  # fmt: skip
    return list(itertools.takewhile(lambda node: is_call(node, _ATTENTION), touching))


def _fuse(module: fx.GraphModule, append: fx.Node) -> str | None:
    """Rewrite one layer, or say why not."""
    key, value, k_pages, v_pages, *rest = append.args
    readers = _readers(module, append)
    if len(readers) != 1:
        return f"{len(readers)} readers until the pages are written again"
    query = argument(readers[0], "q")
    found: list[dict[str, Any]] = []
    for name, rotated in (("keys", key), ("queries", query)):
        one: dict[str, Any] = {}
        if (reason := _match(rotated, one)) is not None:
            return f"the {name} are not rotated, or in another way: {reason}"
        found.append(one)
    keys, queries = found
    if keys["cos"] is not queries["cos"] or keys["sin"] is not queries["sin"]:
        return "queries and keys are rotated by different angles"
    if append < queries["x"]:
        return "the queries are computed after the keys were written"
    builder = Builder(module, append, append.meta.get("module", ""))
    q, k = (builder.call(aten.transpose.int, one["x"], 1, 2) for one in (queries, keys))
    new = builder.call(append_rotated, q, k, value, keys["cos"], keys["sin"], k_pages, v_pages, *rest)
    new.meta.update({name: meta for name, meta in append.meta.items() if name != "val"})
    query.replace_all_uses_with(new)
    module.graph.erase_node(append)
    return None


def _is_last(node: fx.Node) -> str | None:
    return None if node.args[1] in (-1, 3) and len(node.args) == 4 else "not a slice of the head dimension"


def _is_of_heads(node: fx.Node) -> str | None:
    return None if node.args[1:] in ((1, 2), (2, 1)) else "not the dimensions of heads and tokens"


def _is_at_heads(node: fx.Node) -> str | None:
    return None if node.args[1] == 1 and node.meta["val"].dim() == 4 else "not unsqueezed for the heads"


_COS, _SIN = (Op(aten.unsqueeze, [name], where=_is_at_heads) for name in ("cos", "sin"))
_SUM = Op(aten.add.Tensor, [Op(aten.mul.Tensor, ["x", _COS]), Op(aten.mul.Tensor, [Op(aten.cat, bind="halves"), _SIN])], bind="sum")
_ROTATED = Op(aten.transpose.int, [_SUM], where=_is_of_heads)
_FIRST = Op(aten.slice.Tensor, ["x"], bind="first", where=_is_last)
_SECOND = Op(aten.neg, [Op(aten.slice.Tensor, ["x"], bind="second", where=_is_last)])


def _match(rotated: Any, found: dict[str, Any]) -> str | None:
    """transpose(x * cos + cat([-x[D/2 :], x[: D/2]]) * sin) fills `found`; or why this is something else."""
    if (mismatch := _ROTATED.match(rotated, found)) is not None:
        return mismatch.reason
    halves, dim = found["halves"].args[0], found["halves"].args[1:]
    if len(halves) != 2 or dim not in ((-1,), (3,)):
        return "not two halves"
    for pattern, half in ((_SECOND, halves[0]), (_FIRST, halves[1])):
        if (mismatch := pattern.match(half, found)) is not None:
            return mismatch.reason
    x, cos, sin = (found[name].meta["val"] for name in ("x", "cos", "sin"))
    width = x.shape[-1]
    if width % 2:
        return f"{width} dimensions have no halves"
    if [*found["first"].args[2:]] != [0, width // 2] or found["second"].args[2] != width // 2 or found["second"].args[3] < width:
        return "the halves are not halves"
    if cos.shape[-1] != width or sin.shape != cos.shape or not x.dtype == cos.dtype == sin.dtype:
        return f"cos is {list(cos.shape)} in {cos.dtype}"
    if cos.shape[:2] != (x.shape[0], x.shape[2]):
        return "requests share their angles"
    if len(rotated.users) > 1 or len(found["sum"].users) > 1:
        return "something else reads the rotated values"
    return None
