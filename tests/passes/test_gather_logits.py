"""gather-logits: one row of logits per request, before the head where that is legal, behind it where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.graphs import after, apply, check_golden, evaluate, sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten
from autospec.ir.roles import tag, the
from autospec.ir.slots import Slot, slot_of
from autospec.ir.text import graph_text
from autospec.passes.gather_logits import GatherLogits
from autospec.passes.tag_roles import TagRoles


def _head(kind: str) -> fx.GraphModule:
    """hidden -> head -> softcap; "mixed" has a softmax over rows behind the head, so no head is found."""

    def write(builder: Builder, hidden: fx.Node, weight: fx.Node, q_lens: fx.Node) -> fx.Node:
        tag(q_lens, "q_lens")
        logits = builder.call(aten.linear.default, hidden, weight)
        if kind == "mixed":
            return builder.call(aten.softmax.int, logits, 1)
        capped = builder.call(aten.tanh.default, builder.call(aten.div.Tensor, logits, 3.0))
        return builder.call(aten.mul.Tensor, capped, 3.0)

    slots = [
        Slot("input", "hidden", (2, 4, 3)),
        Slot("weight", "w", (5, 3)),
        Slot("input", "q_lens", (2,), torch.int32),
    ]
    module = sketch(slots, write)
    apply(module, TagRoles())
    return module


def test_text() -> None:
    check_golden("gather_logits", graph_text(after(_head("plain"), GatherLogits())))
    check_golden("gather_logits.no_head", graph_text(after(_head("mixed"), GatherLogits())))


@settings(max_examples=15)
@given(
    kind=st.sampled_from(["plain", "mixed"]), q_lens=st.lists(st.integers(0, 4), min_size=2, max_size=2),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_meaning(kind: str, q_lens: list[int], seed: int) -> None:
    module = _head(kind)
    generator = torch.Generator().manual_seed(seed)
    values = {
        "hidden": torch.randn(2, 4, 3, generator=generator), "w": torch.randn(5, 3, generator=generator),
        "q_lens": torch.tensor(q_lens, dtype=torch.int32),
    }  # fmt: skip
    every = evaluate(module, values)[0]
    got = evaluate(after(module, GatherLogits()), values)[0]
    assert got.shape == (2, 1, 5)
    for row, count in enumerate(q_lens):
        torch.testing.assert_close(got[row, 0], every[row, max(count - 1, 0)], rtol=0, atol=1e-6)


def test_the_metadata_behind_the_head_has_one_row() -> None:
    module = after(_head("plain"), GatherLogits())
    assert module.graph.output_node().args[0][0].meta["val"].shape == (2, 1, 5)


def test_a_missing_head_is_refused_with_a_reason_and_again_finds_nothing() -> None:
    for kind, reasons in (("plain", []), ("mixed", ["no lm_head was found, so the logits of every row are computed"])):
        module = _head(kind)
        first, second = apply(module, GatherLogits(), GatherLogits())
        assert [refusal.reason for refusal in first.refusals] == reasons
        assert (first.count, second.count) == (1, 0)


def test_the_tiny_model(tiny: Any) -> None:
    from autospec.passes.widen_decode import FeedPrompt

    module = after(tiny.paged(3), FeedPrompt(batch_size=2, q_len=3, token_room=32, max_position=20), GatherLogits())
    assert module.graph.output_node().args[0][0].meta["val"].shape == (2, 1, 16)


def _spliced_part() -> fx.GraphModule:
    """A drafter's pass before it is spliced: logits, and hidden states of every row beside them."""

    def write(builder: Builder, hidden: fx.Node, weight: fx.Node) -> list[fx.Node]:
        return [builder.call(aten.linear.default, hidden, weight), builder.call(aten.neg.default, hidden)]

    module = sketch([Slot("input", "hidden", (2, 4, 3)), Slot("weight", "w", (5, 3))], write)
    apply(module, TagRoles())
    return module


def test_text_where_the_number_of_valid_rows_is_given() -> None:
    check_golden("gather_logits.given", graph_text(after(_spliced_part(), GatherLogits(given_for=2))))


def test_the_number_of_valid_rows_is_an_input_and_hidden_states_keep_every_row() -> None:
    module, one = _spliced_part(), GatherLogits(given_for=2)
    gathered = after(module, one)
    assert slot_of(the(gathered, "q_lens")) == Slot("input", "q_lens", (2,), torch.int32)
    values = {"hidden": torch.randn(2, 4, 3), "w": torch.randn(5, 3), "q_lens": torch.tensor([1, 3], dtype=torch.int32)}
    logits, hidden = evaluate(gathered, values)
    every, same = evaluate(module, values)
    assert torch.equal(hidden, same)
    for row, last in enumerate((0, 2)):
        torch.testing.assert_close(logits[row, 0], every[row, last], rtol=0, atol=1e-6)
    assert apply(gathered, one)[0].count == 0


def test_without_given_for_the_number_of_valid_rows_must_be_known() -> None:
    with pytest.raises(AssertionError, match="0 nodes of role q_lens"):
        apply(_spliced_part(), GatherLogits())
