"""Exported program -> plain graph whose placeholders say what they are, without what only an export needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autospec.errors import CaptureError
from autospec.hollow import is_hollow
from autospec.ir.build import module_of
from autospec.ir.match import argument, aten, is_call
from autospec.ir.sizes import constants_of, why_not_sizes_only
from autospec.ir.slots import Slot, assign_slot
from autospec.ir.text import node_text
from autospec.kernels.grouped_mm import grouped_mm

# Ops whose results have sizes or Python values that only the data tells.
_DATA_DEPENDENT = (aten._local_scalar_dense, aten.item, aten.nonzero, aten.masked_select, aten.unique_consecutive)

# Ops of transformers and the canonical ones of the same arguments and meaning.
_SAME_AS = {"transformers::grouped_mm_fallback": grouped_mm}


def with_slots(
    exported: torch.export.ExportedProgram, name: str, inputs: Sequence[str] = ("input_ids", "position_ids")
) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """A plain GraphModule whose placeholders carry slots; equal storage becomes one weight, unused ones go.

    Args:
        inputs: names of the user's inputs, in order; each is [batch, length, ...].
    """
    signature = exported.graph_signature
    if signature.buffers_to_mutate:
        changed = next(iter(signature.buffers_to_mutate.values()))
        raise CaptureError(f"the model writes to its own buffer {changed} while it runs", where=name)
    fixed = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    named = {**signature.inputs_to_parameters, **fixed}
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"the model calls torch.{node.target}, whose branches or blocks are graphs of their own",
                               where=name, help="only models whose forward is one graph of ops can be captured")  # fmt: skip
    module = module_of(exported.graph)
    weights: dict[str, Tensor] = {}
    by_storage: dict[tuple[Any, ...], fx.Node] = {}
    user_inputs = iter(inputs)
    for node in list(module.graph.nodes):
        node.meta["module"] = _module_path(node)
        if node.op != "placeholder":
            continue
        full_name = named.get(node.name)
        if full_name is None:
            slot_name = next(user_inputs)
            node.meta["slot"] = Slot("input", slot_name, (), node.meta["val"].dtype)
            for axis, size in enumerate(node.meta["val"].shape[:2]):
                if not isinstance(size, torch.SymInt):
                    what = "batch" if axis == 0 else "length"
                    raise CaptureError(
                        f"export turned the {what} of {slot_name} into the constant {size}",
                        where=name,
                        help="the model's code fixes this dimension, so it cannot be decoded at other sizes",
                    )
            continue
        if not node.users:
            module.graph.erase_node(node)
            continue
        tensor = exported.state_dict.get(full_name)
        if tensor is None:
            tensor = exported.constants[full_name]
        tensor = tensor.detach()
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if key in by_storage and tensor.numel() > 0:
            node.replace_all_uses_with(by_storage[key])
            module.graph.erase_node(node)
            continue
        by_storage[key] = node
        short = full_name.removeprefix("model.")
        if node.name in fixed:
            # Models write to their buffers (rotary frequencies); parameters are shared with the model, buffers are not.
            tensor = constants_of(module)[short] = tensor.clone()
        weights[short] = tensor
        assign_slot(node, Slot("weight", short, tuple(tensor.shape), tensor.dtype))
        if is_hollow(tensor):
            with node.meta["val"].fake_mode:
                node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype)
    _drop_checks(module)
    _own_ops(module)
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        if is_call(node, _DATA_DEPENDENT):
            raise CaptureError(
                "the shapes inside the model depend on its data, so it has no static graph", at=node_text(node),
                where=f"{name} {node.meta['module']}".strip(),
                help="experts that split tokens by counting them are the usual reason; transformers' experts interface helps",
            )  # fmt: skip
    module.meta["device"] = next(iter(weights.values())).device
    module.graph.lint()
    module.recompile()
    return module, weights


def drop_padding_masks(module: fx.GraphModule, name: str) -> None:
    """Masks that were exported beside the logits must say nothing that the data tells; then they go."""
    output = module.graph.output_node()
    returned: Any = output.args[0]
    logits, *padding_masks = returned
    for mask in padding_masks:
        reason = why_not_sizes_only(module, mask)
        if reason is not None:
            raise CaptureError(f"the model makes its own attention mask: {reason}", at=node_text(mask), where=name,
                               help="a mask that depends on tokens cannot be decoded step by step")  # fmt: skip
    output.args = ((logits,),)
    module.graph.eliminate_dead_code()
    module.recompile()


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.removeprefix("model").removeprefix(".")


def _own_ops(module: fx.GraphModule) -> None:
    """Replace ops that transformers registers by our own: a saved graph is read where that library is not imported."""
    for node in module.graph.nodes:
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        if node.op == "call_function" and name in _SAME_AS:
            kernel = _SAME_AS[name]
            given = tuple(argument(node, one.name) for one in node.target._schema.arguments)
            node.target, node.args, node.kwargs = kernel.op, given, {}


def _drop_checks(module: fx.GraphModule) -> None:
    """Assertions about metadata and symbolic sizes: shapes become static, so they say nothing any more."""
    checks = {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_function" and node.target in checks and not node.users:
            module.graph.erase_node(node)
