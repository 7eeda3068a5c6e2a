"""From torch.export's training graph to the functional one that the passes read.

`ExportedProgram.run_decompositions` traces the whole model again with symbolic shapes: 34 of the 50 s that capturing 32
Llama layers took on a CPU (2026-11-21). Most models (133 of the 140 types in ZOO.md) need no more than these renamings, which
are done in place here; a graph with anything else that writes, or that is made of smaller ops which that tracing would not
keep, is traced again as before. Capturing 32 layers of random weights, on a busy 4-core CPU, 2026-11-21: phi3 31 -> 11 s,
mixtral 41 -> 12, glm 43 -> 13, gemma3 46 -> 11; 16 of DeepSeek-V3: 29 -> 8.

    %c = aten.to.dtype(%x : f32, bf16)      ->  %c = aten._to_copy(%x, dtype=bf16)      type_as likewise
    %c = aten.to.dtype(%x : f32, f32)       ->  %x                                      dropout(%x, p, False) likewise
    %v = aten.reshape(%x, [..])             ->  %v = aten.view(%x, [..])                where %x has the strides for it
    %v = aten.flatten(%x : [B, S, 2, 3], 2) ->  %v = aten.view(%x, [B, S, 6])           likewise
    %v = aten.reshape(%x, [..])             ->  %c = aten.clone(%x); %v = aten._unsafe_view(%c, [..])   where it has not
    %c = aten.contiguous(%x)                ->  %x, or %c = aten.clone(%x)
    %t = aten.numpy_T(%x : [2, 3])          ->  %t = aten.permute(%x, [1, 0])
    %p = aten.chunk(%x : [B, S, 6], 2, -1)  ->  %p = aten.split(%x, 3, -1)
    %y = aten.div_(%x, %z); use(%x, %y)     ->  %y = aten.div(%x, %z); use(%y, %y)      where nobody else has %x's memory
    %s = aten.slice(%x, 3, 0, 8); aten.copy_(%s, %z); use(%x)
      -> %c = aten.copy(%s, %z); %y = aten.slice_scatter(%x, %c, 3, 0, 8); use(%y)      likewise
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._export.utils import _is_preservable_cia_op

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default)
_RENAMED = {
    *_CASTS, aten.reshape.default, aten.flatten.using_ints, aten.dropout.default, aten.chunk.default, aten.contiguous.default,
    aten.numpy_T.default,
}  # fmt: skip
# Made of smaller ops, but kept as they are, and never a view.
_KEPT = {
    aten.linear.default, aten.matmul.default, aten.sym_size.int, aten.softmax.int, aten.layer_norm.default,
    aten.repeat_interleave.self_int,
}  # fmt: skip
_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def functional(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program in functional aten ops; its module's code stays that of before."""
    graph = exported.graph
    graph.eliminate_dead_code()
    if not all(_is_plain(node) for node in graph.nodes):
        return exported.run_decompositions({})
    for node in list(graph.nodes):
        if _is_written_part(node):  # taken before an earlier write, it is of what that write left
            next(iter(node.users)).prepend(node)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _RENAMED:
            _rename(graph, node)
        elif _is_op(node) and _schema(node).is_mutable:
            _write_anew(node)
    return exported


def _is_plain(node: fx.Node) -> bool:
    """Whether a node stays as it is (of ops made of smaller ones, those that torch's own tracing keeps), or can be renamed."""
    if not _is_op(node):
        return node.op != "get_attr" and node.op != "call_module" and _is_python(node)
    if node.target in _RENAMED:
        return _rename_of(node) is not None
    if _schema(node).is_mutable:
        return _can_write_anew(node)
    return node.target in _KEPT or not _is_composite(node) or _is_preservable_cia_op(node.target)  # type: ignore[arg-type]


def _is_op(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _schema(node: fx.Node) -> Any:
    return node.target._schema  # type: ignore[union-attr]


def _is_composite(node: fx.Node) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), "CompositeImplicitAutograd")  # type: ignore[union-attr]


def _is_python(node: fx.Node) -> bool:
    """Arithmetic on sizes and reading one of several results; higher-order ops are not."""
    return node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator)


def _rename_of(node: fx.Node) -> _Call | None:
    """The functional op for a node; `aten.alias` stands for the operand itself. None: it takes more than a new name."""
    if node.target in _CASTS:
        return _cast_of(node)
    arguments: tuple[Any, ...] = node.args
    source = arguments[0]
    if node.target is aten.dropout.default:
        return None if arguments[2] else (aten.alias.default, (source,), {})
    if node.target is aten.chunk.default:
        return _split_of(node)
    if node.target is aten.contiguous.default:
        return _contiguous_of(node)
    if node.target is aten.numpy_T.default:
        return aten.permute.default, (source, [*reversed(range(source.meta["val"].dim()))]), {}
    if node.target is aten.flatten.using_ints:
        sizes = [-1 if axis is None else source.meta["val"].shape[axis] for axis in _flat_axes(node)]
    else:
        sizes = arguments[1]
    given = [size.meta["val"] if isinstance(size, fx.Node) else size for size in sizes]
    try:
        with _on_fakes(source):
            aten.view.default(source.meta["val"], given)
    except (RuntimeError, ValueError):
        return aten._unsafe_view.default, (source, sizes), {}
    return aten.view.default, (source, sizes), {}


@contextlib.contextmanager
def _on_fakes(node: fx.Node) -> Iterator[None]:
    """Try an op on fake tensors; whatever it asks of their symbolic sizes, these stay as they were exported."""
    fake_mode = node.meta["val"].fake_mode
    with fake_mode, fake_mode.shape_env.suppress_guards():
        yield


def _cast_of(node: fx.Node) -> _Call | None:
    """A cast as a copy in another dtype or on another device."""
    source, *rest = node.args
    given, value = source.meta["val"], node.meta["val"]  # type: ignore[union-attr]
    asked = 0 if node.target is aten.to.dtype_layout else 2 if node.target is aten.to.device else 1
    options = dict(node.kwargs)
    is_strided = options.pop("layout", torch.strided) in (None, torch.strided)
    named = options.keys() <= {"dtype", "device"} if node.target is aten.to.dtype_layout else not options
    if any(rest[asked:]) or not is_strided or not named:  # a copy, or another memory format, was asked for
        return None
    if value.dtype == given.dtype and value.device == given.device:
        return aten.alias.default, (source,), {}
    wanted = {"dtype": value.dtype} | ({"device": value.device} if value.device != given.device else {})
    return aten._to_copy.default, (source,), wanted


def _split_of(node: fx.Node) -> _Call | None:
    """chunk by the size of a part; where there are fewer parts than asked for, or sizes are symbolic or 0, it is torch's to say."""
    source, count, *axis = node.args
    at = axis[0] if axis else 0
    parts = [part.shape[at] for part in node.meta["val"]]
    is_plain = len(parts) == count and all(isinstance(size, int) and size for size in parts)
    return (aten.split.Tensor, (source, parts[0], at), {}) if is_plain else None


def _contiguous_of(node: fx.Node) -> _Call | None:
    """The operand itself, or a copy; None: another memory format was asked for."""
    source: Any = node.args[0]
    if node.kwargs or len(node.args) > 1:
        return None
    with _on_fakes(source):
        is_contiguous = source.meta["val"].is_contiguous()
    options = {"memory_format": torch.contiguous_format}
    return (aten.alias.default, (source,), {}) if is_contiguous else (aten.clone.default, (source,), options)


def _flat_axes(node: fx.Node) -> list[int | None]:
    """The operand's axis behind each of a flatten's results; None: the flattened one."""
    dims = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    start, end = (axis % max(dims, 1) for axis in (*node.args[1:], *(0, -1)[len(node.args) - 1 :]))
    return [*range(start), None, *range(end + 1, dims)]


def _rename(graph: fx.Graph, node: fx.Node) -> None:
    found = _rename_of(node)
    assert found is not None, f"%{node.name} was found to be renamable"
    target, args, kwargs = found
    if target is aten.alias.default and all(user.op != "output" for user in node.users):
        node.replace_all_uses_with(args[0])
        graph.erase_node(node)
        return
    if node.target is aten.flatten.using_ints:
        args = args[0], [-1 if axis is None else _size_node(graph, node, axis) for axis in _flat_axes(node)]
    if target is aten._unsafe_view.default:
        args = _clone_of(graph, node, args[0]), args[1]
    node.target, node.args, node.kwargs = target, args, kwargs  # the name stays: the program's signature refers to outputs


def _size_node(graph: fx.Graph, node: fx.Node, axis: int) -> Any:
    """A size of a node's operand: a number, or a node if it is symbolic."""
    source = node.args[0]
    size = source.meta["val"].shape[axis]  # type: ignore[union-attr]
    if isinstance(size, int):
        return size
    with graph.inserting_before(node):
        made = graph.call_function(aten.sym_size.int, (source, axis))
    made.meta = {**node.meta, "val": size}
    return made


def _clone_of(graph: fx.Graph, node: fx.Node, source: fx.Node) -> fx.Node:
    """A contiguous copy of an operand before a node."""
    options: dict[str, Any] = {"memory_format": torch.contiguous_format}
    with graph.inserting_before(node), _on_fakes(source):
        made = graph.call_function(aten.clone.default, (source,), options)
        made.meta = {**node.meta, "val": aten.clone.default(source.meta["val"], **options)}
    return made


def _can_write_anew(node: fx.Node) -> bool:
    """Whether what a node writes to is one op's new result, or a part of it, and no other view shows that result, so that
    nobody else sees the write."""
    target = node.args[0]
    if not isinstance(target, fx.Node) or _functional_of(node) is None or not _keeps_kind(node):
        return False
    whole = target
    if _is_written_part(target):
        whole = target.args[0]  # type: ignore[assignment]
    maker = whole.args[0] if whole.target is operator.getitem else whole
    makes_new = isinstance(maker, fx.Node) and _is_op(maker) and not _may_share(maker)
    return makes_new and not any(_may_share(user) for user in whole.users if user is not node and not _is_written_part(user))


def _is_written_part(node: fx.Node) -> bool:
    """Whether a node is a slice of a tensor that is made to be written to, once."""
    if node.target is not aten.slice.Tensor or not isinstance(node.args[0], fx.Node) or len(node.users) != 1:
        return False
    (writer,) = node.users
    return writer.target is aten.copy_.default and writer.args[0] is node and writer.args[1] is not node and not writer.users


def _keeps_kind(node: fx.Node) -> bool:
    """Whether the new tensor has the dtype, shape and strides of what is written to: bf16 times float32 is float32, x > 0 is
    bool, and a cumsum or a masked_fill of a transposed tensor is contiguous, which later views would not expect."""
    before = node.args[0].meta["val"]  # type: ignore[union-attr]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: one.meta["val"])
    try:
        with _on_fakes(node):
            after = _functional_of(node)(*args, **kwargs)
            is_kept = isinstance(after, Tensor) and before.dtype == after.dtype and before.shape == after.shape
            return is_kept and bool(before.stride() == after.stride())
    except (RuntimeError, ValueError, TypeError):
        return False


def _functional_of(node: fx.Node) -> Any:
    """The op that leaves a new tensor where this one, `name_`, writes to its first operand alone; None: there is none."""
    schema = _schema(node)
    namespace, name = schema.name.split("::")
    written = [one.name for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    if namespace != "aten" or not name.endswith("_") or written != ["self"] or len(schema.returns) != 1:
        return None
    found = getattr(getattr(aten, name[:-1], None), schema.overload_name or "default", None)
    kinds = [(one.name, one.type.kind()) for one in schema.arguments]
    # pow.Scalar is a number to the power of a tensor, and pow_.Scalar a tensor to the power of a number.
    is_same = found is not None and kinds == [(one.name, one.type.kind()) for one in found._schema.arguments]
    return found if is_same else None


def _may_share(node: fx.Node) -> bool:
    """Whether a node's result may have the memory of an operand."""
    if not _is_op(node):
        return not isinstance(node.meta.get("val"), torch.SymInt)
    if _is_composite(node) and node.target not in _KEPT:
        return True
    return any(one.alias_info is not None for one in _schema(node).returns)


def _write_anew(node: fx.Node) -> None:
    """Let a write leave a new tensor, which everybody after it reads."""
    target: Any = node.args[0]
    made, is_part = node, _is_written_part(target)
    node.target = _functional_of(node)
    if is_part:
        whole, *where = target.args
        with node.graph.inserting_after(node):
            made = node.graph.call_function(aten.slice_scatter.default, (whole, node, *where))
        made.meta, target = {**node.meta, "val": whole.meta["val"]}, whole
    target.replace_all_uses_with(made, delete_user_cb=lambda user: made < user)
