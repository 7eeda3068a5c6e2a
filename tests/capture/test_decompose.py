"""From the training graph to functional ops: renamed in place where that is enough, traced again where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.decompose import functional
from autospec.ir.match import aten


class _Module(torch.nn.Module):
    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.write = write
        self.layer = torch.nn.Linear(8, 8).bfloat16().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.layer(x))


def exported(write: Callable[[Tensor], Tensor]) -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    return torch.export.export(_Module(write), (torch.randn(2, 3, 8).bfloat16(),), dynamic_shapes=(dims,), strict=False)


def is_traced_again(monkeypatch: pytest.MonkeyPatch, write: Callable[[Tensor], Tensor]) -> bool:
    """Convert, compare the results on another shape, and say whether the whole graph was traced."""
    asked = []
    whole = torch.export.ExportedProgram.run_decompositions

    def run_decompositions(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(self)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", run_decompositions)
    program = functional(exported(write))
    monkeypatch.undo()
    returned = [getattr(node, "name", None) for node in program.graph.output_node().args[0]]
    assert [spec.arg.name for spec in program.graph_signature.output_specs] == returned
    x = torch.randn(3, 5, 8).bfloat16()
    assert torch.equal(program.module()(x), exported(write).module()(x))
    for node in program.graph.nodes:
        assert node.target not in (aten.to.dtype, aten.to.device, aten.reshape.default)
        assert not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)
    return bool(asked)


def written(x: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
    """Something reads x, then it is written to."""
    other = read(x)
    x.mul_(3)
    return x + other


def filled(x: Tensor, *parts: Callable[[Tensor], Tensor]) -> Tensor:
    """Views are taken, then written to, the last one first."""
    made = x.new_zeros(x.shape)
    views = [part(made) for part in parts]
    for number, (view, part) in reversed([*enumerate(zip(views, parts, strict=True))]):
        view.copy_(part(x) * (number + 2))
    return made + 1


def itself(x: Tensor) -> Tensor:
    """A part is written from another one."""
    x[..., :4] = x[..., 4:]
    return x + 1


RENAMED = {
    "norm": lambda x: (x.to(torch.float32) * x.float().pow(2).mean(-1, keepdim=True).rsqrt()).to(torch.bfloat16),
    "a cast at the end": lambda x: (x + 1).to(torch.float32), "no cast at the end": lambda x: x.to(torch.bfloat16),
    "a cast to what it is": lambda x: x.to(torch.bfloat16) + 1,
    "heads": lambda x: x.view(*x.shape[:2], 2, 4).sin().reshape(*x.shape[:2], -1),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().view(x.shape[0], -1) + x.sin().contiguous().view(x.shape[0], -1).cos(),
    "a transposed weight": lambda x: x @ x[0, :1].expand(8, 8).T,
    "kept whole": lambda x: torch.concat([x.square(), x.min(x.sin()), torch.where(x > 0, x, 0.0)], -1),
    "a product": lambda x: torch.matmul(x, x.transpose(1, 2)),
    "sizes": lambda x: x * x.shape[1], "parts": lambda x: x.chunk(2, -1)[1] * 2, "uneven parts": lambda x: x.chunk(3, -1)[2] * 2,
    "another's dtype": lambda x: (x.float() * 3).type_as(x), "no dropout": lambda x: torch.dropout(x, 0.5, False) + 1,
    "flat": lambda x: x.view(*x.shape[:2], 2, 4).flatten(-2) + x.sin()[:, :, None].flatten(1, 2),
    "all flat": lambda x: x.flatten() + 1,
    "flat, as a result": lambda x: x.view(*x.shape[:2], 2, 4).flatten(2, 3),
    "a reshape that copies": lambda x: x.transpose(1, 2).reshape(x.shape[0], -1),
    "a flatten that copies": lambda x: x.transpose(1, 2).flatten(1),
    "part by part": lambda x: filled(x, lambda y: y[..., :3], lambda y: y[..., 3:]),
    "part by part, one over the other": lambda x: filled(x, lambda y: y[..., 2:7], lambda y: y[..., :5]),
    "in place": lambda x: x.clone().add_(1), "in place, read before and after": lambda x: written(x.sin(), torch.cos),
}
TRACED = {
    "a part, seen through a view": lambda x: filled(x, lambda y: y[..., :3], lambda y: y[..., 3:].view(-1, *y.shape[1:-1], 5)),
    "a part of a part": lambda x: filled(x, lambda y: y[..., 2:7], lambda y: y[:, 1:, :5]),
    "a part from another part": lambda x: itself(x.sin()), "a part of an operand": lambda x: itself(x),
    "in place, seen through a view": lambda x: written(x.sin(), lambda y: y[:1]),
    "in place, by another dtype": lambda x: x.sin().mul_(torch.full((8,), 1.37)).cos(),
    "in place, a comparison": lambda x: x.sin().gt_(0).mul(3).cumsum(-1),
    "in place, a power": lambda x: x.sin().pow_(2), "parts of nothing": lambda x: torch.cat([*x[..., :0].chunk(2, -1), x], -1),
    "in place, by another dtype and its sizes": lambda x: x.sin().addcmul_(x.cos().double(), x.exp().double()),
    "in place, twice": lambda x: x.clone().add_(1).mul_(3), "parts that are missing": lambda x: x.chunk(5, -1)[3],
    "in place, in another order of memory": lambda x: x.transpose(1, 2).cos().cumsum_(1).sin().transpose(1, 2).flatten(1),
    "in place, in another shape": lambda x: x.transpose(0, 1).add_(1), "dropout": lambda x: torch.dropout(x, 0.0, True),
    "contiguous in another format": lambda x: x[:, None].repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last),
    "a forced copy": lambda x: x.to(torch.bfloat16, copy=True),
    "another device's copy": lambda x: x.to("cpu", torch.float32, copy=True),
    "a layout": lambda x: x[:, :, None].to(torch.float32, memory_format=torch.channels_last),
}  # fmt: skip


@pytest.mark.parametrize("name", RENAMED)
def test_what_is_renamed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert not is_traced_again(monkeypatch, RENAMED[name])


@pytest.mark.parametrize("name", TRACED)
def test_what_is_traced_again(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert is_traced_again(monkeypatch, TRACED[name])


STEPS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.float(), lambda x: x.to(torch.bfloat16), lambda x: x.reshape(x.shape[0], -1, x.shape[-1]),
    lambda x: x.transpose(0, 1).reshape(x.shape[0], x.shape[1], -1), torch.sin, lambda x: x * 2, lambda x: x.clone().mul_(3),
    lambda x: written(x.cos(), torch.sin), lambda x: written(x.cos(), lambda y: y[:1]),
]  # fmt: skip


@settings(max_examples=15)
@given(steps=st.lists(st.sampled_from(STEPS), max_size=4))
def test_any_chain_keeps_its_meaning(steps: list[Callable[[Tensor], Tensor]]) -> None:
    def write(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    x = torch.randn(3, 5, 8).bfloat16()
    assert torch.equal(functional(exported(write)).module()(x), exported(write).module()(x))


def test_a_write_that_is_taken_for_plain_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autospec.decompose._is_plain", lambda node: True)
    with pytest.raises(AssertionError):
        is_traced_again(monkeypatch, TRACED["in place, seen through a view"])
