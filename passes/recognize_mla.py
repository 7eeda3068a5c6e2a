"""Find attention whose keys and values are projected from one latent per token (multi-head latent attention).

    %kv = aten.linear(%latent, %w)                    [B, S, H (nope + v)]
    %k = cat(per-head rows of %kv, %k_rope for every head)   ->   %w_uk, %w_uv = per-head rows of %w
    %v = the other rows of %kv                                    %o = autospec.latent_attention(%q[nope], %q[rope],
    %o = autospec.attention(%q, %k, %v, scale)                             %latent, %k_rope, %w_uk, %w_uv, scale)

Legal: the new op's reference is that same projection, concatenation and attention. Elements are followed one by one
through views, splits and copies (autospec.ir.origins) at two sizes: every element of K and V must be a row of the
projection of its own token, or an element of the part that all heads share. How the model spells the movement, and what
normed or rotated the latent and the shared part before, does not matter. Keys that an indexer selects stay selected,
and sinks stay sinks.
Gives up on: windows, chunks, softcaps and position biases, projections with a bias or whose result something else
reads, rows that are not grouped by head, heads that share keys, and a latent that is no narrower than keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autospec.ir.match import argument, aten, calls, is_call, operand
from autospec.ir.origins import Origins, moved_from
from autospec.ir.passes import Notes, Pass
from autospec.ir.sizes import Evaluator
from autospec.kernels.attention import attention
from autospec.kernels.latent_attention import latent_attention

_OPTIONS = (("window", "a window of {}"), ("chunk", "chunks of {}"), ("softcap", "a softcap of {}"),
            ("alibi_slopes", "ALiBi slopes"))  # fmt: skip
_SIZES = ((2, 3), (3, 5))  # batch and length at which elements are followed


@dataclass(frozen=True)
class Projection:
    """Rows of a linear layer that are a head's: head h takes rows h * step + start ... + width - 1."""

    linear: fx.Node
    step: int
    start: int
    width: int


@dataclass(frozen=True)
class Site:
    """Latent attention: where its parts stand in the graph."""

    latent: fx.Node
    k_rope: fx.Node
    keys: Projection
    values: Projection


@dataclass(frozen=True, kw_only=True)
class RecognizeMla(Pass):
    """Attention over keys and values made of one latent becomes latent attention."""

    name = "recognize-mla"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        count = 0
        for node in calls(module, attention):
            found = _site(module, node)
            if found is None and argument(node, "indices") is not None:
                found = "its keys are selected by an indexer, but they are not made of a latent"
            if isinstance(found, str):
                notes.refuse(node, found)
            elif found is not None:
                _rewrite(module, node, found)
                count += 1
        return count


def _site(module: fx.GraphModule, node: fx.Node) -> Site | str | None:
    """The parts of latent attention; a reason where only something small is missing; None: ordinary attention."""
    q, k, v = (operand(node, index) for index in range(3))
    heads, width, v_width = k.meta["val"].shape[1], k.meta["val"].shape[3], v.meta["val"].shape[3]
    values = _made_by(v)
    latents = {operand(linear) for linear in values}
    projections = [linear for linear in _made_by(k) if operand(linear) in latents]
    if len(values) != 1 or len(projections) != 1 or heads < 2:
        return None
    origins = [Origins(Evaluator(module, *sizes)) for sizes in _SIZES]
    nope = _own_width(k, projections[0], origins[0])
    k_rope = next((n for n in reversed(moved_from(k)) if _is_shared(k, n, nope, origins)), None)
    if k_rope is None:
        return None
    latent = operand(projections[0])
    if q.meta["val"].shape[1] != heads or v.meta["val"].shape[1] != heads:
        return f"{q.meta['val'].shape[1]} query heads share {heads} heads of keys made of a latent"
    for name, what in _OPTIONS:
        if argument(node, name):
            return f"its keys are made of a latent, but it has {what.format(argument(node, name))}"
    linears = projections[0], values[0]
    if any(len(linear.args) > 2 and linear.args[2] is not None for linear in linears):
        return "the projection of its latent has a bias"
    keys = _projection(k, linears[0], slice(0, nope), origins)
    rows = _projection(v, linears[1], slice(0, v_width), origins)
    if keys is None or rows is None:
        return "the rows that project its latent are not grouped by head"
    kept, expanded = latent.meta["val"].shape[-1] + width - nope, heads * (width + v_width)
    if kept >= expanded:
        return f"a latent row of {kept} is no narrower than keys and values of {expanded}"
    for one, what in ((latent, "latent"), (k_rope, "shared part of its keys")):
        if _rows_of(one) is None:
            return f"its {what} has the shape {list(one.meta['val'].shape)}, which is not a row per token"
    if (reader := _other_reader(k, v, linears)) is not None:
        return f"%{reader.name} reads what is projected from its latent, too"
    return Site(latent, k_rope, keys, rows)


def _made_by(node: fx.Node) -> list[fx.Node]:
    """The linear layers whose elements end up in a node."""
    return [one for one in moved_from(node) if is_call(one, aten.linear)]


def _own_width(k: fx.Node, linear: fx.Node, origins: Origins) -> int:
    """How many of a key's first elements are projected."""
    which, _ = origins.of(k, [linear])
    return int((which == 0).flatten(0, 2).all(0).long().cumprod(0).sum())


def _is_shared(k: fx.Node, candidate: fx.Node, nope: int, at: list[Origins]) -> bool:
    """Are a key's elements from `nope` on those of the candidate's row of the same token, in every head?"""
    width = k.meta["val"].shape[3] - nope
    if not width or not isinstance(candidate.meta["val"], Tensor):
        return False
    for origins in at:
        batch, heads, length, _ = origins.evaluator.shape(k)
        if torch.Size(origins.evaluator.shape(candidate)).numel() != batch * length * width:
            return False
        which, number = origins.of(k, [candidate])
        row = torch.arange(batch * length * width).reshape(batch, 1, length, width).expand(-1, heads, -1, -1)
        if not (bool((which[..., nope:] == 0).all()) and torch.equal(number[..., nope:], row)):
            return False
    return True


def _projection(node: fx.Node, linear: fx.Node, part: slice, at: list[Origins]) -> Projection | None:
    """Which rows of the layer a head's elements are, if every token takes its own and all heads take alike."""
    found: set[Projection] = set()
    for origins in at:
        which, number = origins.of(node, [linear])
        which, number = which[..., part], number[..., part]
        batch, heads, length, width = number.shape
        rows = linear.meta["val"].shape[-1]
        token = torch.arange(batch * length).reshape(batch, 1, length, 1)
        row = (number - token * rows)[0, :, 0]
        step, start = int(row[1, 0] - row[0, 0]), int(row[0, 0])
        expected = start + step * torch.arange(heads)[:, None] + torch.arange(width)
        fits = rows == heads * step and start >= 0 and start + width <= step
        if not (fits and bool((which == 0).all()) and torch.equal(number, (expected[:, None] + token * rows))):
            return None
        found.add(Projection(linear, step, start, width))
    return found.pop() if len(found) == 1 else None


def _rows_of(node: fx.Node) -> int | None:
    """The dimension of size 1 that stands between batch, length and width; 0: there is none; None: another shape."""
    shape = node.meta["val"].shape
    lengths = [axis for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)]
    if len(shape) == 3 and lengths == [0, 1]:
        return 0
    if len(shape) == 4 and lengths in ([0, 1], [0, 2]):
        axis = 3 - lengths[1]
        return axis if shape[axis] == 1 else None
    return None


def _other_reader(k: fx.Node, v: fx.Node, linears: tuple[fx.Node, ...]) -> fx.Node | None:
    """Whoever reads the projected keys and values beside attention."""
    inside = {k, v, *moved_from(k), *moved_from(v)}
    behind = set(linears)
    for node in k.graph.nodes:  # in order, so that sources come first
        if node in inside and node not in behind and behind & set(node.all_input_nodes):
            behind.add(node)
    for node in behind:
        for user in node.users:
            if user not in inside and not is_call(user, (attention, latent_attention)):
                return user
    return None


def _rewrite(module: fx.GraphModule, node: fx.Node, site: Site) -> None:
    def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with module.graph.inserting_before(node):
            made = module.graph.call_function(target, args, kwargs)
        given = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with torch.no_grad():
            made.meta["val"] = target(*given[0], **given[1])
        made.meta["module"] = node.meta.get("module", "")
        return made

    def rows(source: fx.Node) -> fx.Node:
        axis = _rows_of(source)
        return emit(aten.squeeze.dim, source, axis) if axis else source

    def weight(part: Projection) -> fx.Node:
        whole = operand(part.linear, 1)
        by_head = emit(aten.view.default, whole, [-1, part.step, whole.meta["val"].shape[1]])
        return emit(aten.slice.Tensor, by_head, 1, part.start, part.start + part.width)

    nope = site.keys.width
    q = operand(node)
    q_parts = _halves(q, nope) or [
        emit(aten.slice.Tensor, q, 3, first, last) for first, last in ((0, nope), (nope, q.meta["val"].shape[3]))
    ]
    options = {name: argument(node, name) for name in ("indices", "sinks") if argument(node, name) is not None}
    made = emit(
        latent_attention.op, *q_parts, rows(site.latent), rows(site.k_rope), weight(site.keys), weight(site.values),
        scale=argument(node, "scale"), **options,
    )  # fmt: skip
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


def _halves(q: fx.Node, nope: int) -> list[fx.Node] | None:
    """The two parts of queries that were concatenated where they are to be cut."""
    if not is_call(q, aten.cat) or len(q.args) < 2 or q.args[1] not in (-1, 3):
        return None
    parts: Any = q.args[0]
    return list(parts) if len(parts) == 2 and parts[0].meta["val"].shape[3] == nope else None
