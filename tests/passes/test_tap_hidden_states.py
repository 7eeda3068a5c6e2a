"""tap-hidden-states: the graph also returns layer outputs, those of the model cut off behind the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.graphs import VOCAB, WIDTH, after, apply, check_golden, evaluate, tiny_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from autospec.ir.match import aten, operand, returned
from autospec.ir.roles import the, with_role
from autospec.ir.text import graph_text
from autospec.passes.fold_noops import FoldNoops
from autospec.passes.gather_logits import GatherLogits
from autospec.passes.specialize_shapes import SpecializeShapes
from autospec.passes.tag_roles import TagRoles
from autospec.passes.tap_hidden_states import TapHiddenStates, missing_taps

LAYERS = 3
STATIC = (SpecializeShapes(batch_size=2, q_len=4), FoldNoops())
CAPTURED, WEIGHTS = tiny_graph(num_layers=LAYERS)
SHALLOW = {depth: tiny_graph(num_layers=depth)[0] for depth in range(1, LAYERS)} | {LAYERS: CAPTURED}


def test_text(tiny: Any) -> None:
    check_golden("tap_hidden_states", graph_text(after(CAPTURED, *STATIC, TapHiddenStates(tap_after=(0, 2)))))
    check_golden("tap_hidden_states.final", graph_text(after(tiny.static(4), TapHiddenStates())))


def _values(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCAB, (2, 4), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "position_ids": torch.arange(4).expand(2, -1), **WEIGHTS}


def _check(module: fx.GraphModule, tap_after: tuple[int, ...], seed: int) -> None:
    """A tap, read by the lm_head, gives the logits of the model that ends behind its layer."""
    values = _values(seed)
    logits, taps = evaluate(module, values)
    assert torch.equal(logits, evaluate(CAPTURED, values)[0])
    for layer, tap in zip(tap_after, taps.split(WIDTH, dim=-1), strict=True):
        expected = evaluate(SHALLOW[layer + 1], values)[0]
        torch.testing.assert_close(tap @ WEIGHTS["lm_head.weight"].T, expected, rtol=0, atol=1e-6)


@settings(max_examples=15)
@given(tap_after=st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 999))
def test_meaning(tap_after: tuple[int, ...], seed: int) -> None:
    one = TapHiddenStates(tap_after=tap_after)
    module = after(CAPTURED, *STATIC, one)
    _check(module, tap_after, seed)
    assert apply(module, one)[0].count == 0


def test_taps_in_another_order_are_seen() -> None:
    with pytest.raises(AssertionError, match="not close"):
        _check(after(CAPTURED, *STATIC, TapHiddenStates(tap_after=(2, 0))), (0, 2), 3)


def test_without_layers_it_is_what_the_lm_head_reads() -> None:
    _check(after(CAPTURED, *STATIC, TapHiddenStates()), (LAYERS - 1,), 3)


def test_a_folded_copy_before_the_lm_head_does_not_hide_it() -> None:
    """As in models without a final norm, which take the rows whose logits are wanted from the last layer's output."""
    module = after(CAPTURED, STATIC[0])
    head = the(module, "lm_head")
    with module.graph.inserting_before(head):
        copy = module.graph.call_function(aten.slice.Tensor, (operand(head), 1, 0, 2**63 - 1))
    copy.meta.update(val=operand(head).meta["val"], module="")
    head.update_arg(0, copy)
    _check(after(module, TagRoles(), STATIC[1], TapHiddenStates()), (LAYERS - 1,), 3)


def test_every_row_is_tapped_although_one_row_of_logits_is_computed() -> None:
    module = after(CAPTURED, *STATIC, TapHiddenStates(), GatherLogits(given_for=2))
    assert [returned(module, index).meta["val"].shape for index in range(2)] == [(2, 1, VOCAB), (2, 4, WIDTH)]
    assert returned(module, 1) is with_role(module, "taps")[0]


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(AssertionError, match="the output of layer 3 was not found, the graph shows layers 0 to 2"):
        after(CAPTURED, *STATIC, TapHiddenStates(tap_after=(0, 3)))
    one_layer = tiny_graph(num_layers=1)[0]
    assert list(missing_taps(one_layer, (0,))) == ["the output of layer 0 was not found, the graph shows no layers at all"]


def test_a_graph_without_a_head_cannot_be_tapped_before_it() -> None:
    module = after(CAPTURED)
    the(module, "lm_head").meta.pop("role")
    assert list(missing_taps(module, (0, 1, 2))) == []
    assert list(missing_taps(module, ())) == [
        "the logits do not come straight from a linear layer, so what it reads is not known"
    ]
