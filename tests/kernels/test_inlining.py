"""References that are inlined for Inductor compute what their ops compute, though layers share a trace."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autospec.kernels.fused_linear import fused_linear
from autospec.lower import inline_references

SIZES = {"x": (5, 64), "y": (5, 64), "z": (7, 64), "w": (64, 64), "v": (64, 64)}
CALLS: dict[str, tuple[tuple[str, str, str | None], dict[str, object]]] = {
    "x + x w": (("x", "w", "x"), {}), "y + x w": (("x", "w", "y"), {}), "x + y v": (("y", "v", "x"), {}),
    "z + z v": (("z", "v", "z"), {}),
    "gated": (("x", "w", None), {"activation": "silu"}), "gelu": (("y", "v", None), {"activation": "gelu_tanh"}),
}  # fmt: skip


def toy(names: tuple[str, ...]) -> fx.GraphModule:
    """Calls of one op on the same few inputs."""
    graph, mode = fx.Graph(), FakeTensorMode()
    inputs = {name: graph.placeholder(name) for name in SIZES}
    with mode:
        for name, node in inputs.items():
            node.meta["val"] = torch.empty(SIZES[name])
        made = []
        for name in names:
            (x, weight, residual), options = CALLS[name]
            given = {"residual": inputs[residual], **options} if residual else options
            made.append(graph.call_function(fused_linear.op, (inputs[x], inputs[weight]), given))
            made[-1].meta["val"] = fused_linear.op(*(one.meta["val"] for one in made[-1].args), **{
                key: value.meta["val"] if isinstance(value, fx.Node) else value for key, value in given.items()
            })  # fmt: skip
    graph.output(tuple(made))
    module = fx.GraphModule(torch.nn.Module(), graph)
    module.meta.update(fake_mode=mode, device=torch.device("cpu"))
    return module


@pytest.mark.parametrize("names", list(itertools.permutations(CALLS, 2)), ids=" then ".join)
def test_calls_that_share_a_trace_and_calls_that_must_not(names: tuple[str, ...]) -> None:
    """A tensor that is passed twice, other shapes, other options, in either order."""
    module, generator = toy((*names, names[0])), torch.Generator().manual_seed(1)
    inputs: list[Tensor] = [torch.randn(size, generator=generator) for size in SIZES.values()]
    expected = module(*inputs)
    assert inline_references(module) == 3
    assert not module.graph.find_nodes(op="call_function", target=fused_linear.op)
    for mine, theirs in zip(module(*inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
