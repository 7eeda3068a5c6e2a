"""Run a half-precision model in float32 where it stands: the second opinion of the checks that compare logits.

Where a model chooses by score, one rounding can move a token from one of two nearly equal experts to the other, and its
logits anywhere. In float32 such ties are a thousand times rarer, and what is then still different is a defect.

No copy of the model is made. Weights stay as they are; every op is given float32 for the half-precision tensors it reads,
so one weight at a time exists twice (of experts: one expert's).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autospec.kernels.grouped_mm import grouped_mm
from autospec.kernels.registry import find

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
_CHOOSES = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.argmax.default, aten.max.dim, aten.kthvalue.default)
_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")  # of three-dimensional weights: what experts call
_READS = (aten.embedding.default, aten.index_select.default, aten.index.Tensor, aten.gather.default)  # never the whole table


class InFloat32(TorchDispatchMode):
    """Inside, half-precision results are float32, whatever dtype the code asks for.

    Attributes:
        chooses: whether an op that chooses by score ran.
        widens: whether an op was given half-precision numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.chooses = self.widens = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        self.widens |= any(isinstance(leaf, Tensor) and leaf.dtype in HALF for leaf in leaves)
        kernel = find(func)
        if kernel is not None and not kernel.mutates:
            with self:
                return kernel.reference(*args, **kwargs)
        if func._schema.name in _GROUPED:
            with self:
                return grouped_mm.reference(args[0], args[1], kwargs["offs"] if "offs" in kwargs else args[2])
        if func in _CHOOSES and args[0].is_floating_point():
            self.chooses = True
        if func.is_view:
            return func(*args, **kwargs)
        if func in _READS:
            return pytree.tree_map(_in_float32, func(*args, **kwargs))
        written = {id(tensor) for tensor in _written(func, args, kwargs)}
        args, kwargs = pytree.tree_map(lambda leaf: leaf if id(leaf) in written else _in_float32(leaf), (args, kwargs))
        return func(*args, **kwargs)


def _in_float32(leaf: Any) -> Any:
    """A half-precision tensor in float32, the dtype float32 for a half-precision one, anything else itself."""
    if isinstance(leaf, Tensor):
        return leaf.float() if leaf.dtype in HALF else leaf
    return torch.float32 if leaf in HALF else leaf


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an op writes to: these must be the tensors themselves."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    named = [given.get(one.name) for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    return pytree.tree_leaves(named)
