"""multiply-outer: matrix products with nothing to sum become products of elements, the same to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness.graphs import after, apply, check_golden, evaluate, sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, calls
from autospec.ir.roles import tag, with_role
from autospec.ir.slots import Slot
from autospec.ir.text import graph_text
from autospec.passes import multiply_outer
from autospec.passes.multiply_outer import MultiplyOuter

PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)


def rotary(device: str = "cpu", dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """Angles as transformers' rotary embeddings compute them, and a layer that sums over 3."""

    def write(b: Builder, positions: fx.Node, inv_freq: fx.Node, weight: fx.Node) -> fx.Node:
        column = b.call(
            aten.expand.default,
            b.call(aten.unsqueeze.default, b.call(aten.unsqueeze.default, inv_freq, 0), 2),
            [2, -1, 1],
        )
        row = b.call(aten._to_copy.default, b.call(aten.unsqueeze.default, positions, 1), dtype=dtype)
        angles = b.call(aten.matmul.default, column, row)
        tag(angles, "layer_output")
        return b.call(aten.cos.default, b.call(aten.matmul.default, weight, b.call(aten.transpose.int, angles, 1, 2)))

    slots = [
        Slot("input", "positions", (2, 3), torch.int64),
        Slot("weight", "inv_freq", (4,), dtype),
        Slot("weight", "weight", (5, 3), dtype),
    ]
    return sketch(slots, write, device)


def test_text() -> None:
    check_golden("multiply_outer", graph_text(after(rotary(), MultiplyOuter())))


def test_again_finds_nothing() -> None:
    one = MultiplyOuter()
    assert [record.count for record in apply(rotary(), one, one)] == [1, 0]


def test_a_role_survives() -> None:
    assert [node.target for node in with_role(after(rotary(), MultiplyOuter()), "layer_output")] == [aten.mul.Tensor]


def product(op: Any, left: tuple[int, ...], right: tuple[int, ...], dtype: torch.dtype, is_turned: bool = False) -> fx.GraphModule:
    """One product; turned: the left operand's first and second last dimension are swapped in memory."""

    def write(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
        return b.call(op, b.call(aten.transpose.int, x, 0, -2) if is_turned else x, y)

    stored = (left[-2], *left[1:-2], left[0], left[-1]) if is_turned and len(left) > 2 else left
    return sketch([Slot("input", "x", stored, dtype), Slot("input", "y", right, dtype)], write)


def check(module: fx.GraphModule, seed: int, scale: float = 1.0) -> fx.GraphModule:
    """The graph after the pass: the same numbers, in the same order in memory."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        node.name: torch.randn(node.meta["val"].shape, generator=generator, dtype=torch.float64)
        .mul(scale)
        .to(node.meta["val"].dtype)
        for node in module.graph.find_nodes(op="placeholder")
    }
    changed = after(module, MultiplyOuter())
    (mine,), (theirs,) = evaluate(changed, values), evaluate(module, values)
    assert torch.equal(mine, theirs)
    assert mine.stride() == theirs.stride()
    return changed


@settings(max_examples=40)
@given(
    op=st.sampled_from(PRODUCTS), batch=st.integers(1, 3), rows=st.integers(1, 5), columns=st.integers(1, 5),
    inner=st.sampled_from([1, 1, 2]), dtype=st.sampled_from([torch.float32, torch.float64]), is_turned=st.booleans(),
    is_spread=st.booleans(), seed=st.integers(0, 999), scale=st.sampled_from([1.0, 3e4, 1e-20]),
)  # fmt: skip
def test_meaning(
    op: Any, batch: int, rows: int, columns: int, inner: int, dtype: torch.dtype, is_turned: bool, is_spread: bool, seed: int,
    scale: float,
) -> None:  # fmt: skip
    left, right = (batch, rows, inner), (batch, inner, columns)
    if op is aten.mm.default:
        left, right = left[1:], right[1:]
    elif op is aten.matmul.default and is_spread:
        right = right[1:]
    changed = check(product(op, left, right, dtype, is_turned and len(left) > 2), seed, scale)
    is_plain = not is_turned or len(left) == 2
    if is_plain:  # turned ones may lie in another order
        assert any(calls(changed, PRODUCTS)) == (inner != 1)


def test_a_product_that_sums_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the pass takes every product."""
    monkeypatch.setattr(multiply_outer, "_is_outer", lambda node: True)
    with pytest.raises(AssertionError):
        check(product(aten.mm.default, (2, 2), (2, 2), torch.float32), 0)


def test_a_product_that_is_added_is_left_alone() -> None:
    """A GPU would round product and sum once, together."""
    given = [Slot("input", "x", (3, 1), torch.float32), Slot("input", "y", (1, 4), torch.float32)]
    module = sketch(given, lambda b, x, y: b.call(aten.add.Tensor, b.call(aten.mm.default, x, y), 1.0))
    (record,) = apply(module, MultiplyOuter())
    assert record.count == 0
    assert "added to something" in record.refusals[0].reason


def test_another_order_in_memory_is_refused() -> None:
    module = product(aten.bmm.default, (3, 4, 1), (3, 1, 1), torch.float32, is_turned=True)
    (record,) = apply(module, MultiplyOuter())
    assert record.count == 0
    assert "another order" in record.refusals[0].reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_left_alone(dtype: torch.dtype) -> None:
    """As graph ops both are the same to the bit; it is fusing that would leave a rounding out."""
    (record,) = apply(rotary(dtype=dtype), MultiplyOuter())
    assert record.count == 0
    assert "rounded before it is read" in record.refusals[0].reason
    x, y = torch.randn(7, 5, 1).to(dtype), torch.randn(7, 1, 6).to(dtype)
    assert torch.equal(x @ y, x * y)


def _old(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


def _named(value: bool) -> None:
    torch.set_float32_matmul_precision("high" if value else "highest")


def _new(value: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if value else "none"


def _everywhere(value: bool) -> None:
    torch.backends.fp32_precision = "tf32" if value else "none"


@pytest.fixture
def allowed(request: pytest.FixtureRequest) -> Iterator[None]:
    request.param(True)
    yield
    request.param(False)
    for backend in (torch.backends.cuda, torch.backends.mkldnn):  # the old names leave "ieee", which an outer setting spares
        backend.matmul.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest", "other tests would run on with it"


@pytest.mark.parametrize("allowed", [_old, _named, _new, _everywhere], indirect=True)
def test_rounded_operands_are_refused(allowed: None) -> None:
    (record,) = apply(rotary("cuda"), MultiplyOuter())
    assert record.count == 0
    assert "tf32" in record.refusals[0].reason
    assert apply(rotary("cuda", torch.float64), MultiplyOuter())[0].count == 1


@pytest.mark.parametrize(("allowed", "count"), [(_old, 1), (_named, 0)], indirect=["allowed"])
def test_a_cpu_has_its_own_setting(allowed: None, count: int) -> None:
    assert apply(rotary(), MultiplyOuter())[0].count == count
