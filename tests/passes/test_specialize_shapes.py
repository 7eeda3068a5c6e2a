"""specialize-shapes: the static graph computes what the symbolic one does at that size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.graphs import VOCAB, after, apply, check_golden, evaluate
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.ir.text import graph_text
from autospec.passes.specialize_shapes import SpecializeShapes


def test_text(tiny: Any) -> None:
    check_golden("specialize_shapes", graph_text(after(tiny.captured, SpecializeShapes(batch_size=2, q_len=3))))


@settings(max_examples=15)
@given(batch=st.integers(1, 5), q_len=st.integers(1, 9), seed=st.integers(0, 1000))
def test_meaning(tiny: Any, batch: int, q_len: int, seed: int) -> None:
    static = after(tiny.captured, SpecializeShapes(batch_size=batch, q_len=q_len))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (batch, q_len), generator=generator)
    values = {
        "input_ids": ids,
        "position_ids": torch.randint(0, 200, (batch, q_len), generator=generator),
        **tiny.weights,
    }
    assert torch.equal(evaluate(static, values)[0], evaluate(tiny.captured, values)[0])


def test_again_is_refused(tiny: Any) -> None:
    static = tiny.static(3)
    with pytest.raises(AssertionError, match="specialize-shapes requires: the graph is specialised already"):
        apply(static, SpecializeShapes(batch_size=2, q_len=3))


def test_the_captured_graph_is_left_alone(tiny: Any) -> None:
    before = graph_text(tiny.captured, weights=True)
    tiny.static(4)
    assert graph_text(tiny.captured, weights=True) == before
    assert "fake_mode" not in tiny.captured.meta
