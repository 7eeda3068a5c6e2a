"""What an op makes of FakeTensors: what its result follows from, and references that run once for arguments of a kind.

A custom op's fake implementation is its reference, of up to dozens of aten ops. Inductor calls it five times for every call in a
graph, which took 18 of the 50 s in which the prefill and the step of 32 layers became code (AMD EPYC, torch 2.11,
2026-11-22).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

_PLAIN = (int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))  # and bool, an int


def once_for_a_kind(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A fake implementation that runs the reference once for arguments of a kind and then makes its results of their metadata.

    With symbolic sizes, whose meaning depends on where they come from, and whatever else is not plain, the reference runs.
    """
    known: dict[Any, Any] = {}

    @functools.wraps(reference)
    def fake(*args: Any, **kwargs: Any) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        key = kind_of(reference, args, kwargs) if all(map(_is_sized, given)) else None
        if key in known:
            return pytree.tree_map(_made, known[key])
        result = reference(*args, **kwargs)
        made = [leaf for leaf in pytree.tree_leaves(result) if leaf is not None]
        if key is not None and _are_new(made, given):
            known[key] = pytree.tree_map(_metadata, result)
        return result

    return fake


@dataclass(frozen=True)
class _Metadata:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _metadata(leaf: Tensor | None) -> _Metadata | None:
    return None if leaf is None else _Metadata(tuple(leaf.size()), leaf.stride(), leaf.dtype, leaf.device)


def _made(of: _Metadata | None) -> Tensor | None:
    return None if of is None else torch.empty_strided(of.size, of.stride, dtype=of.dtype, device=of.device)


def _are_new(made: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether results can be made again from their metadata: each has a storage of its own, and starts where it does."""
    if not all(is_plain(leaf) and _is_sized(leaf) and leaf.storage_offset() == 0 and not leaf.requires_grad for leaf in made):
        return False
    theirs = {leaf.untyped_storage()._cdata for leaf in given if isinstance(leaf, Tensor)}
    return len(theirs | {leaf.untyped_storage()._cdata for leaf in made}) == len(theirs) + len(made)


def _is_sized(leaf: Any) -> bool:
    """Whether nothing about it is symbolic."""
    if isinstance(leaf, Tensor):
        return all(type(size) is int for size in (*leaf.size(), *leaf.stride(), leaf.storage_offset()))
    return not isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool))


def kind_of(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the metadata of a result follows from, hashable; None: this is not known of one of the arguments."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    found: list[Any] = [op, spec, torch.get_default_dtype(), torch.get_default_device()]
    for leaf in leaves:
        if is_plain(leaf):
            sizes = map(_size, (*leaf.size(), *leaf.stride(), leaf.storage_offset()))
            found.append((leaf.dtype, leaf.device, leaf.requires_grad, leaf.dim(), *sizes))
        elif isinstance(leaf, torch.SymInt):
            found.append((torch.SymInt, _size(leaf)))
        elif isinstance(leaf, _PLAIN):
            found.append((type(leaf), repr(leaf)))
        else:
            return None
    return tuple(found)


def _size(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def is_plain(value: Any) -> bool:
    """A strided fake tensor of which nothing but its metadata is known."""
    if not isinstance(value, FakeTensor) or value.constant is not None:
        return False
    return value.layout == torch.strided and not (value.is_conj() or value.is_neg())
