"""Experts: each row meets its own group's weight, empty groups and rows of no group included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.kernels.grouped_mm import grouped_mm, grouped_mm_loop, why_not_loop


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5), left=st.integers(0, 2))
def test_every_row_meets_its_own_weight(seed: int, sizes: list[int], left: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor(sizes).cumsum(0).int()
    rows = torch.randn(sum(sizes) + left, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(len(sizes), 5, 3, generator=generator, dtype=torch.float64).transpose(1, 2)
    group = [index for index, size in enumerate(sizes) for _ in range(size)]
    expected = torch.zeros(len(rows), 5, dtype=torch.float64)
    for number, index in enumerate(group):
        expected[number] = rows[number] @ weight[index]
    for run in (grouped_mm.reference, grouped_mm_loop):
        torch.testing.assert_close(run(rows, weight, ends), expected, rtol=1e-12, atol=1e-12)


def test_the_loop_is_for_cpus() -> None:
    assert why_not_loop({"rows": torch.zeros(2, 3)}) is None
    assert "not on a CPU" in str(why_not_loop({"rows": torch.zeros(2, 3, device="meta")}))


def test_capture_leaves_no_op_of_transformers() -> None:
    """A saved graph is read where transformers is not installed."""
    from harness.models import tiny

    from autospec.capture import export_model

    moe = pytest.importorskip("transformers.integrations.moe")
    assert hasattr(moe, "_grouped_mm_fallback"), "the op that this one stands for has another name now"
    graph = export_model(tiny("mixtral", num_local_experts=4, hidden_act="relu2")).graph  # an activation that `experts` lacks
    spaces = {getattr(node.target, "namespace", "") for node in graph.graph.nodes}
    assert "transformers" not in spaces
    assert any(node.target is grouped_mm.op for node in graph.graph.nodes)
