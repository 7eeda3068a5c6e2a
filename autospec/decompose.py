"""From torch.export's training graph to the functional one that the passes read.

`ExportedProgram.run_decompositions` traces the whole model again with symbolic shapes: 34 of the 50 s that capturing 32
Llama layers took on a CPU (2026-11-21). Llama and its likes need no more than these renamings, which are done in place here; a
graph with anything else that writes or that is made of smaller ops is traced again as before.

    %c = aten.to.dtype(%x : f32, bf16)  ->  %c = aten._to_copy(%x, dtype=bf16)
    %c = aten.to.dtype(%x : f32, f32)   ->  %x
    %v = aten.reshape(%x, [..])         ->  %v = aten.view(%x, [..])       where %x has the strides for it
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_RENAMED = {aten.to.dtype, aten.to.device, aten.reshape.default}
# Made of smaller ops, but kept as they are: torch keeps them, too, and the passes read them so.
_KEPT = {aten.linear.default, aten.matmul.default, aten.sym_size.int}


def functional(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program in functional aten ops."""
    graph = exported.graph
    graph.eliminate_dead_code()
    if not all(_is_plain(node) for node in graph.nodes):
        return exported.run_decompositions({})
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _RENAMED:
            _rename(graph, node)
    exported.graph_module.recompile()
    return exported


def _is_plain(node: fx.Node) -> bool:
    """Whether a node stays as it is, or can be renamed."""
    if node.op in ("placeholder", "output") or not isinstance(node.target, torch._ops.OpOverload):
        return node.op != "get_attr" and node.op != "call_module" and _is_python(node)
    if node.target in _RENAMED:
        return _rename_of(node) is not None
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), "CompositeImplicitAutograd")
    return node.target in _KEPT or not (is_composite or node.target._schema.is_mutable)


def _is_python(node: fx.Node) -> bool:
    """Arithmetic on sizes and reading one of several results; higher-order ops are not."""
    return node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator)


def _rename_of(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """The functional op for a node; `aten.alias` stands for the operand itself. None: it takes more than a new name."""
    arguments: tuple[Any, ...] = node.args
    source, value = arguments[0], node.meta["val"]
    given = source.meta["val"]
    if node.target is aten.reshape.default:
        sizes = [size.meta["val"] if isinstance(size, fx.Node) else size for size in arguments[1]]
        try:
            with value.fake_mode:
                aten.view.default(given, sizes)
        except (RuntimeError, ValueError):
            return None
        return aten.view.default, arguments, {}
    is_to_dtype = node.target is aten.to.dtype
    options = {"dtype": arguments[1]} if is_to_dtype else {"dtype": arguments[2], "device": arguments[1]}
    if any(arguments[2 if is_to_dtype else 3 :]) or node.kwargs:  # a copy, or another memory format, was asked for
        return None
    if value.dtype == given.dtype and value.device == given.device:
        return aten.alias.default, (source,), {}
    return aten._to_copy.default, (source,), options


def _rename(graph: fx.Graph, node: fx.Node) -> None:
    found = _rename_of(node)
    assert found is not None, f"%{node.name} was found to be renamable"
    target, args, kwargs = found
    if target is aten.alias.default and all(user.op != "output" for user in node.users):
        node.replace_all_uses_with(args[0])
        graph.erase_node(node)
        return
    node.target, node.args, node.kwargs = target, args, kwargs  # the name stays: the program's signature refers to outputs
