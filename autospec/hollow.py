"""Models on `meta`: parameters without values, so that a graph of a 70B shape needs no memory of that size.

While such a model is captured, every parameter is a CPU tensor of its shape whose elements are one and the same zero.
Export looks at shapes only. The runs before it, which record masks, compute with zeros: what depends on a parameter is
zero, what depends on sizes and positions is right. Numbers therefore prove nothing here, and the checks that compare
logits are left out, which the report says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autospec.errors import CaptureError

_ZEROS: dict[int, Tensor] = {}  # storages of hollow tensors by address; kept, so that no other tensor gets the address
_NAMES: dict[int, tuple[str, ...]] = {}  # what a checkpoint may call them: tied parameters have several names


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor stands for one without values."""
    return tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() in _ZEROS


def is_model_hollow(model: Any) -> bool:
    """Whether a model being captured has no weights."""
    return any(is_hollow(parameter.data) for parameter in model.parameters())


def hollow(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of this shape in the memory of one element."""
    zero = torch.zeros((), dtype=dtype)
    _ZEROS[zero.untyped_storage().data_ptr()] = zero
    return zero.expand(shape)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters on `meta`, never written to, and buffers with their values."""
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        register(module, name, parameter)

    fill = {name: one for name, one in vars(torch.nn.init).items() if name.endswith("_") and callable(one) and name[0] != "_"}
    try:
        torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
        for name in fill:
            setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
        for name, one in fill.items():
            setattr(torch.nn.init, name, one)


@contextlib.contextmanager
def filled(model: Any) -> Iterator[None]:
    """Let a model on `meta` be captured; on exit it is as it was. Other models are left alone.

    Raises:
        CaptureError: a buffer has no value, and its module cannot be made again from its configuration.
    """
    on_meta = [(module, name, tensor, is_buffer) for module, name, tensor, is_buffer in _tensors(model) if tensor.is_meta]
    known: dict[int, Tensor] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for module, name, tensor, is_buffer in on_meta:
        if is_buffer:
            module._buffers[name] = _buffer(module, name)
        else:
            if id(tensor) not in known:  # tied parameters stay tied
                made = hollow(tensor.shape, tensor.dtype)
                _NAMES[made.untyped_storage().data_ptr()] = tuple(names[id(tensor)])
                known[id(tensor)] = torch.nn.Parameter(made, requires_grad=False)
            module._parameters[name] = known[id(tensor)]
    try:
        yield
    finally:
        for module, name, tensor, is_buffer in on_meta:
            (module._buffers if is_buffer else module._parameters)[name] = tensor


def _tensors(model: Any) -> Iterator[tuple[Any, str, Tensor, bool]]:
    for module in model.modules():
        yield from ((module, name, one, False) for name, one in module._parameters.items() if one is not None)
        yield from ((module, name, one, True) for name, one in module._buffers.items() if one is not None)


def _buffer(module: Any, name: str) -> Tensor:
    """A buffer that no checkpoint has, such as rotary frequencies: its module is made again, on the CPU."""
    try:
        with torch.device("cpu"):
            found: Tensor = type(module)(config=module.config)._buffers[name]
    except Exception as error:
        raise CaptureError(
            f"a buffer of the model on meta has no value: {type(error).__name__}: {str(error)[:80]}", at=name,
            where=type(module).__name__, help="load the model instead of making it on meta",
        ) from error  # fmt: skip
    return found


def without_numbers(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Where a hollow model is run eagerly: nothing is multiplied with its parameters."""
    return _Zeros() if is_model_hollow(model) else contextlib.nullcontext()


class _Zeros(TorchDispatchMode):
    """Results that depend on a hollow tensor are zero, and are not computed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        hollow_ones = [is_hollow(tensor) for tensor in tensors]
        if not any(hollow_ones) or getattr(func, "is_view", False):
            return func(*args, **kwargs)

        def on_meta(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
            return torch.device("meta") if isinstance(leaf, torch.device) else leaf

        def zeros(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return hollow(leaf.shape, leaf.dtype) if all(hollow_ones) else torch.zeros(leaf.shape, dtype=leaf.dtype)

        return pytree.tree_map(zeros, func(*pytree.tree_map(on_meta, args), **pytree.tree_map(on_meta, kwargs)))


def names_of(tensor: Tensor) -> tuple[str, ...]:
    """What a checkpoint may call a hollow parameter; () for others."""
    return _NAMES.get(tensor.untyped_storage().data_ptr(), ()) if is_hollow(tensor) else ()


def on_meta(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hollow tensors as tensors on `meta`, those of one storage as one tensor."""
    made: dict[Any, Tensor] = {}
    found = {}
    for name, tensor in weights.items():
        if is_hollow(tensor):
            key = (tensor.untyped_storage().data_ptr(), tensor.shape)
            tensor = made.setdefault(key, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        found[name] = tensor
    return found
