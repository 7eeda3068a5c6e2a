"""pad-linears: a linear layer gets more rows where that was measured to be faster; fake tensors stand in for the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from harness.graphs import after, apply, check_golden, evaluate, sketch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, calls
from autospec.ir.roles import tag, the
from autospec.ir.slots import Slot, slots
from autospec.ir.text import graph_text
from autospec.kernels import choice
from autospec.kernels.choice import Times
from autospec.kernels.ordered_attention import ordered_attention
from autospec.kernels.timing import deviation
from autospec.passes import pad_linears
from autospec.passes.pad_linears import FORMS, LINEAR, PadLinears
from autospec.pipeline import left_out

FASTER, BARELY_FASTER = ({"as_it_is": 2.0, "padded": padded} for padded in (1.0, 1.95))


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Tiles of 4 rows; layers of 5 outputs are faster padded. What was asked for: rows, outputs, whether there is a bias."""
    found: list[tuple[Any, ...]] = []

    def measured(arguments: Mapping[str, Any]) -> Times:
        assert set(arguments) == {"x", "weight", "bias", "more"}
        rows, outputs = arguments["x"].shape[0], arguments["weight"].shape[0]
        assert arguments["more"] == -rows % 4
        found.append((rows, outputs, arguments["bias"] is not None))
        return Times(FASTER if outputs == 5 else BARELY_FASTER)

    monkeypatch.setattr(pad_linears, "TILE", 4)
    monkeypatch.setattr(pad_linears, "SMALLEST", 18)
    monkeypatch.setattr(pad_linears, "measured", measured)
    return found


def _layers(batch: int, q_len: int, device: str) -> fx.GraphModule:
    """A layer with a bias, one that is no faster, a small one, and an lm_head; roles and modules are set."""

    def write(builder: Builder, x: fx.Node, *weights: fx.Node) -> fx.Node:
        first, bias, other, small, head = weights
        value = builder.call(aten.linear.default, x, first, bias)
        value = builder.call(aten.linear.default, value, other)
        value = builder.call(aten.linear.default, value, small)
        logits = builder.call(aten.linear.default, value, head)
        tag(logits, "lm_head")
        return logits

    return sketch(
        [
            Slot("input", "x", (batch, q_len, 4)), Slot("weight", "first", (5, 4)), Slot("weight", "bias", (5,)),
            Slot("weight", "other", (6, 5)), Slot("weight", "small", (2, 6)), Slot("weight", "head", (5, 2)),
        ],
        write, device,
    )  # fmt: skip


def test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pad_linears, "SMALLEST", 10)
    check_golden("pad_linears", graph_text(after(_layers(2, 3, "cuda"), PadLinears()), weights=True))


@given(batch=st.integers(1, 4), q_len=st.integers(1, 5))
def test_meaning(batch: int, q_len: int) -> None:
    module = _layers(batch, q_len, "cuda")
    values = {slot.name: torch.randn(slot.shape) for slot in slots(module)}
    changed, [record] = after(module, PadLinears()), apply(_layers(batch, q_len, "cuda"), PadLinears())
    rows = batch * q_len
    assert record.count == int(rows > 4 and rows % 4 > 0)
    assert {node.meta["val"].shape[0] for node in calls(changed, aten.constant_pad_nd)} <= {8, 12, 16, 20}
    assert deviation(evaluate(changed, values)[0], evaluate(module, values)[0]) < 1e-6


def test_few_rows_and_whole_tiles_are_not_asked_about(asked: list[tuple[Any, ...]]) -> None:
    for batch, q_len in ((1, 4), (3, 1), (4, 2)):
        assert apply(_layers(batch, q_len, "cuda"), PadLinears())[0].count == 0
    assert asked == []


def test_a_small_weight_is_not_asked_about(asked: list[tuple[Any, ...]]) -> None:
    apply(_layers(2, 3, "cuda"), PadLinears())
    assert asked == [(6, 5, True), (6, 6, False)]


def test_again_finds_nothing() -> None:
    one = PadLinears()
    assert [record.count for record in apply(_layers(2, 3, "cuda"), one, one)] == [1, 0]


def test_the_times_are_told_once() -> None:
    def write(builder: Builder, x: fx.Node, first: fx.Node) -> fx.Node:
        return builder.call(aten.add.Tensor, *(builder.call(aten.linear.default, x, first) for _ in range(2)))

    twice = sketch([Slot("input", "x", (5, 4)), Slot("weight", "first", (5, 4))], write, "cuda")
    [record] = apply(twice, PadLinears())
    assert record.count == 2
    assert record.details == ("padding pays: as_it_is 2.0 us, padded 1.0 us; x [5, 4], weight [5, 4], more 3",)
    assert record.refusals == ()


def test_why_a_layer_stays_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    [record] = apply(_layers(2, 3, "cuda"), PadLinears())
    assert [one.reason for one in record.refusals] == [
        "padding does not pay: as_it_is 2.0 us, padded 1.9 us; x [6, 5], weight [6, 5], more 2"
    ]
    monkeypatch.setattr(pad_linears, "measured", lambda arguments: Times({"as_it_is": 1.0}, {"padded": "it fails: no"}))
    [record] = apply(_layers(2, 3, "cuda"), PadLinears())
    assert "padding does not pay: as_it_is 1.0 us; padded: it fails: no; x [6, 4]" in record.refusals[0].reason


@pytest.mark.parametrize(
    "times",
    [
        Times({}, unmeasured="no memory"), Times({"padded": 1.0}), Times({"as_it_is": 1.0}, {"padded": "it fails"}),
        Times(BARELY_FASTER),
    ],
)
def test_what_is_not_known_to_be_faster_stays(monkeypatch: pytest.MonkeyPatch, times: Times) -> None:
    monkeypatch.setattr(pad_linears, "measured", lambda arguments: times)
    assert apply(_layers(2, 3, "cuda"), PadLinears())[0].count == 0


def test_roles_and_modules_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pad_linears, "SMALLEST", 10)
    module = after(_layers(2, 3, "cuda"), PadLinears())
    assert the(module, "lm_head").meta["val"].shape == (2, 3, 5)
    assert the(module, "lm_head").meta["val"].device.type == "cuda"
    assert {node.meta["module"] for node in calls(module, aten.constant_pad_nd)} == {"sketch"}


def test_a_cpu_is_left_alone(asked: list[tuple[Any, ...]]) -> None:
    assert apply(_layers(2, 3, "cpu"), PadLinears())[0].count == 0
    assert asked == []


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert pad_linears.measured({"x": torch.ones(129, 2), "weight": torch.ones(3, 2), "bias": None, "more": 127}).unmeasured


@pytest.mark.parametrize("has_bias", [False, True])
def test_both_forms_are_run_and_compared(monkeypatch: pytest.MonkeyPatch, has_bias: bool) -> None:
    """As on a GPU: random inputs of these shapes, the forms' results side by side, a key of their own in the file."""
    seen: list[Tensor] = []
    rows: list[int] = []
    linear = torch.nn.functional.linear

    def timed(run: Any) -> float:
        seen.append(run())
        return float(len(seen))

    def watched(x: Tensor, *others: Any) -> Tensor:
        rows.append(x.shape[0])
        return linear(x, *others)

    monkeypatch.undo()
    monkeypatch.setattr(choice, "time_graph", timed)
    monkeypatch.setattr(choice, "free_memory", lambda device: 1 << 30)
    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    x, weight, bias = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((130, 6), (5, 6), (5,)))
    arguments = {"x": x, "weight": weight, "bias": bias if has_bias else None, "more": 126}
    before = torch.get_rng_state()
    times = choice.measure_all(LINEAR, FORMS, arguments)
    assert times == Times({"as_it_is": 1.0, "padded": 2.0})
    assert torch.equal(torch.get_rng_state(), before)
    assert rows == [130, 130, 256, 256]
    assert [(one.shape, one.dtype) for one in seen] == [((130, 5), torch.bfloat16)] * 2
    assert deviation(*seen) < 0.02
    assert seen[0].float().std() > 1
    text = choice.spec_text(LINEAR, arguments)
    assert text.startswith("linear(x=bfloat16[130, 6], weight=bfloat16[5, 6]")
    assert text.endswith("more=126)"), "another number of rows has another time"


def test_a_bias_by_name_is_kept(asked: list[tuple[Any, ...]]) -> None:
    def write(builder: Builder, x: fx.Node, first: fx.Node, bias: fx.Node) -> fx.Node:
        return builder.call(aten.linear.default, x, first, bias=bias)

    module = sketch([Slot("input", "x", (5, 4)), Slot("weight", "first", (5, 4)), Slot("weight", "bias", (5,))], write, "cuda")
    values = {slot.name: torch.randn(slot.shape) for slot in slots(module)}
    assert deviation(evaluate(after(module, PadLinears()), values)[0], evaluate(module, values)[0]) < 1e-6
    assert asked == [(5, 5, True)]


def test_an_exact_graph_is_left_alone(asked: list[tuple[Any, ...]]) -> None:
    """Two builds of it may measure differently, or one of them not at all."""

    def write(builder: Builder, x: fx.Node, first: fx.Node, *others: fx.Node) -> fx.Node:
        pages, table, lens = others
        q = builder.call(aten.linear.default, x, first)
        out = builder.call(ordered_attention, builder.call(aten.reshape.default, q, [6, 1, 1, 5]), pages, pages, table, lens)
        return builder.call(aten.reshape.default, out, [6, 5])

    module = sketch(
        [
            Slot("input", "x", (6, 4)), Slot("weight", "first", (5, 4)), Slot("state", "pages", (3, 2, 1, 5)),
            Slot("state", "page_table", (6, 2), torch.int32), Slot("state", "kv_lens", (6,), torch.int32),
        ],
        write, "cpu",
    )  # fmt: skip
    module.meta["device"] = torch.device("cuda")
    [record] = apply(module, PadLinears())
    assert record.count == 0
    assert asked == []
    assert "no sum may depend on what was measured" in record.refusals[0].reason


def test_it_can_be_left_out() -> None:
    assert left_out("-pad-linears") == {"pad-linears"}
