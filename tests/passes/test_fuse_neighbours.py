"""fuse-neighbours: on a GPU, linear layers take in norms, gates and residuals; fake tensors stand in for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from harness.graphs import after, apply, check_golden, evaluate, sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, calls
from autospec.ir.slots import Slot, slots
from autospec.ir.text import graph_text
from autospec.kernels.fused_linear import fused_linear, fused_linear_normed
from autospec.kernels.registry import Implementation
from autospec.passes.fuse_neighbours import FuseNeighbours

BF16, ROWS, WIDTH, INNER = torch.bfloat16, 3, 32, 32


@pytest.fixture(autouse=True)
def planted() -> Iterator[None]:
    """One implementation that takes everything, whatever the machine has."""
    with forbidding(set()):
        yield


@contextmanager
def forbidding(names: set[str]) -> Iterator[None]:
    """One implementation that takes everything but these arguments."""

    def why_not(args: Mapping[str, Any]) -> str | None:
        return next((f"no {name}" for name in sorted(names) if args.get(name) is not None and args[name] != ""), None)

    saved = [(op, list(op.implementations)) for op in (fused_linear, fused_linear_normed)]
    for op, _ in saved:
        op.implementations[:] = [Implementation("planted", why_not, op.op, op.reference)]
    yield
    for op, implementations in saved:
        op.implementations[:] = implementations


def norm(builder: Builder, h: fx.Node, weight: fx.Node, *, axis: int = -1, power: int = 2) -> fx.Node:
    wide = builder.call(aten._to_copy.default, h, dtype=torch.float32)
    mean = builder.call(aten.mean.dim, builder.call(aten.pow.Tensor_Scalar, wide, power), [axis], True)
    rms = builder.call(aten.rsqrt.default, builder.call(aten.add.Tensor, mean, 1e-5))
    scaled = builder.call(aten._to_copy.default, builder.call(aten.mul.Tensor, wide, rms), dtype=BF16)
    return builder.call(aten.mul.Tensor, weight, scaled)


def gate(builder: Builder, y: fx.Node, act: Any = aten.silu.default, *, swapped: bool = False, **options: Any) -> fx.Node:
    first = builder.call(aten.slice.Tensor, y, -1, 0, INNER)
    second = builder.call(aten.slice.Tensor, y, -1, INNER, 2 * INNER)
    first, second = (second, first) if swapped else (first, second)
    return builder.call(aten.mul.Tensor, builder.call(act, first, **options), second)


def block(write: Callable[..., Any], device: str = "cuda") -> fx.GraphModule:
    """A graph over h and the weights of an MLP."""
    return sketch(
        [
            Slot("input", "h", (1, ROWS, WIDTH), BF16), Slot("weight", "norm", (WIDTH,), BF16),
            Slot("weight", "gate_up", (2 * INNER, WIDTH), BF16), Slot("weight", "down", (WIDTH, INNER), BF16),
            Slot("weight", "bias", (WIDTH,), BF16),
        ],
        write, device,
    )  # fmt: skip


def mlp(builder: Builder, h: fx.Node, weight: fx.Node, gate_up: fx.Node, down: fx.Node, bias: fx.Node) -> fx.Node:
    y = builder.call(aten.linear.default, norm(builder, h, weight), gate_up)
    out = builder.call(aten.linear.default, gate(builder, y), down, bias)
    return builder.call(aten.add.Tensor, h, out)


def two_mlps(builder: Builder, h: fx.Node, *weights: fx.Node) -> fx.Node:
    return mlp(builder, mlp(builder, h, *weights), *weights)


def test_text() -> None:
    check_golden("fuse_neighbours", graph_text(after(block(mlp), FuseNeighbours()), weights=True))


def test_text_where_a_layer_prepares_the_next_norm() -> None:
    check_golden("fuse_neighbours.prepared", graph_text(after(block(two_mlps), FuseNeighbours()), weights=True))


def same(write: Callable[..., Any], seed: int = 0) -> fx.GraphModule:
    """The graph after the pass, which computes the same bits."""
    module = block(write)
    generator = torch.Generator().manual_seed(seed)
    values = {slot.name: torch.randn(slot.shape, generator=generator).to(slot.dtype) for slot in slots(module)}
    fused = after(module, FuseNeighbours())
    assert torch.equal(evaluate(fused, values)[0], evaluate(module, values)[0])
    return fused


def test_meaning() -> None:
    for seed in range(5):
        assert len(list(calls(same(mlp, seed), fused_linear))) == 2


def test_meaning_where_a_layer_prepares_the_next_norm() -> None:
    """Not the same bits: x * norm_weight is rounded before the division by the rms instead of after it."""
    module = block(two_mlps)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        values = {slot.name: torch.randn(slot.shape, generator=generator).to(slot.dtype) for slot in slots(module)}
        out, exact = (evaluate(m, values)[0].double() for m in (after(module, FuseNeighbours()), module))
        assert float((out - exact).norm() / exact.norm()) < 4 * torch.finfo(BF16).eps


def test_a_norm_that_cannot_be_prepared_is_taken_in_by_its_layer() -> None:
    with forbidding({"squares"}):
        module = same(two_mlps)
    assert not list(calls(module, fused_linear_normed))
    assert options_of(module) == {"activation", "residual", "norm_weight", "eps"}


def options_of(module: fx.GraphModule) -> set[str]:
    return {name for node in calls(module, fused_linear) for name in node.kwargs}


# What surrounds a layer, and which neighbours may then be taken in.
def _norm_read_twice(b: Builder, h: Any, w: Any, gate_up: Any, down: Any, bias: Any) -> Any:
    n = norm(b, h, w)
    y = b.call(aten.slice.Tensor, b.call(aten.linear.default, n, gate_up), -1, 0, WIDTH)
    return b.call(aten.add.Tensor, y, n)


def _mean_over_columns(b: Builder, h: Any, w: Any, gate_up: Any, down: Any, bias: Any) -> Any:
    return b.call(aten.linear.default, norm(b, h, w, axis=1), gate_up)


def _fourth_powers(b: Builder, h: Any, w: Any, gate_up: Any, down: Any, bias: Any) -> Any:
    return b.call(aten.linear.default, norm(b, h, w, power=4), gate_up)


def _up_before_gate(b: Builder, h: Any, w: Any, gate_up: Any, down: Any, bias: Any) -> Any:
    return gate(b, b.call(aten.linear.default, h, gate_up), swapped=True)


def _exact_gelu(b: Builder, h: Any, w: Any, gate_up: Any, down: Any, bias: Any) -> Any:
    return gate(b, b.call(aten.linear.default, h, gate_up), aten.gelu.default)


def _tanh_gelu(b: Builder, h: Any, w: Any, gate_up: Any, down: Any, bias: Any) -> Any:
    return gate(b, b.call(aten.linear.default, h, gate_up), aten.gelu.default, approximate="tanh")


def _sum_read_before(b: Builder, h: Any, w: Any, gate_up: Any, down: Any, bias: Any) -> Any:
    y = b.call(aten.linear.default, b.call(aten.slice.Tensor, h, -1, 0, INNER), down)
    return b.call(aten.mul.Tensor, b.call(aten.add.Tensor, h, y), y)


def _scaled_sum(b: Builder, h: Any, w: Any, gate_up: Any, down: Any, bias: Any) -> Any:
    y = b.call(aten.linear.default, b.call(aten.slice.Tensor, h, -1, 0, INNER), down)
    return b.call(aten.add.Tensor, h, y, alpha=2)


def _doubled(b: Builder, h: Any, w: Any, gate_up: Any, down: Any, bias: Any) -> Any:
    y = b.call(aten.linear.default, b.call(aten.slice.Tensor, h, -1, 0, INNER), down)
    return b.call(aten.add.Tensor, y, y)


def _broadcast_bias(b: Builder, h: Any, w: Any, gate_up: Any, down: Any, bias: Any) -> Any:
    y = b.call(aten.linear.default, b.call(aten.slice.Tensor, h, -1, 0, INNER), down)
    return b.call(aten.add.Tensor, y, bias)


def _computed_norm(b: Builder, h: Any, w: Any, gate_up: Any, down: Any, bias: Any) -> Any:
    h = b.call(aten.linear.default, h, down)
    return b.call(aten.linear.default, norm(b, h, b.call(aten.add.Tensor, w, 1.0)), down)


def _scalar_norm(b: Builder, h: Any, w: Any, gate_up: Any, down: Any, bias: Any) -> Any:
    return b.call(aten.linear.default, norm(b, h, b.call(aten.slice.Tensor, w, 0, 0, 1)), down)


def _slices_without_end(b: Builder, h: Any, w: Any, gate_up: Any, down: Any, bias: Any) -> Any:
    y = b.call(aten.linear.default, h, gate_up)
    first, second = b.call(aten.slice.Tensor, y, -1, 0, INNER), b.call(aten.slice.Tensor, y, -1, INNER)
    return b.call(aten.mul.Tensor, b.call(aten.silu.default, first), second)


def test_the_residual_may_be_what_is_normed() -> None:
    """h + W norm(h): the layer before is replaced, and what was found around this one refers to it."""

    def write(b: Builder, h: Any, w: Any, gate_up: Any, down: Any, bias: Any) -> Any:
        h = b.call(aten.linear.default, h, down)
        return b.call(aten.add.Tensor, h, b.call(aten.linear.default, norm(b, h, w), down))

    module = after(block(write), FuseNeighbours())
    assert len(list(calls(module, fused_linear_normed))) == 1
    assert options_of(module) == {"residual", "squares", "eps"}


@pytest.mark.parametrize(
    ("write", "taken"),
    [
        (_computed_norm, set()), (_scalar_norm, set()), (_slices_without_end, {"activation"}),
        (_norm_read_twice, set()), (_mean_over_columns, set()), (_fourth_powers, set()), (_up_before_gate, set()),
        (_exact_gelu, set()), (_tanh_gelu, {"activation"}), (_sum_read_before, set()), (_scaled_sum, set()),
        (_doubled, set()), (_broadcast_bias, set()),
    ],
)  # fmt: skip
def test_what_is_not_a_neighbour_stays(write: Any, taken: set[str]) -> None:
    assert options_of(same(write)) == taken


@settings(max_examples=10)
@given(forbidden=st.sets(st.sampled_from(["activation", "residual", "norm_weight"])))
def test_a_neighbour_that_no_kernel_takes_stays(forbidden: set[str]) -> None:
    with forbidding(forbidden):
        assert options_of(same(mlp)) - {"eps"} == {"activation", "residual", "norm_weight"} - forbidden


def test_again_finds_nothing() -> None:
    one = FuseNeighbours()
    assert [record.count for record in apply(block(mlp), one, one)] == [2, 0]


def test_modules_survive() -> None:
    module = after(block(mlp), FuseNeighbours())
    assert {node.meta["module"] for node in calls(module, fused_linear)} == {"sketch"}


def test_a_cpu_is_left_alone() -> None:
    assert apply(block(mlp, "cpu"), FuseNeighbours())[0].count == 0


def test_without_an_implementation_nothing_is_replaced() -> None:
    with forbidding({"weight"}):
        record = apply(block(mlp), FuseNeighbours())[0]
    assert record.count == 0
    assert [refusal.reason for refusal in record.refusals] == ["no weight", "no weight"]
