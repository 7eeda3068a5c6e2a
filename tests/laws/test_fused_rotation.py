"""Drafters whose passes rotate, write and read in fused ops, as on a GPU, are the drafters they were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from harness import tree_laws
from harness.programs import Plant, Workshop
from torch import Tensor

from autospec.ir.match import calls
from autospec.kernels.append_kv import append_kv


@pytest.fixture(autouse=True)
def on_a_gpu() -> Iterator[None]:
    with mock.patch("autospec.passes.fuse_rope.device_of", return_value=torch.device("cuda")):
        yield


@pytest.fixture(scope="module")
def fused() -> Workshop:
    """Its programs are built in the tests, so fused."""
    return Workshop()


@pytest.mark.parametrize("drafter", ["eagle dynamic", "mtp dynamic", "small static"])
def test_every_pass_is_fused_and_guesses_the_same(fused: Workshop, drafter: str) -> None:
    (step,) = [graph.module for name, graph in fused.session(drafter).program.graphs.items() if name.startswith("step")]
    assert not list(calls(step, append_kv))
    tree_laws.draft_caches_stay_fresh(fused, drafter)
    if not drafter.startswith("small"):
        tree_laws.drafts_what_re_feeding_would(fused, drafter)


def _angles_of_the_first_row(op: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> Tensor:
    return op(q, k, v, cos[:, :1].expand_as(cos), sin[:, :1].expand_as(sin), *rest)


def _a_slot_too_far(op: Any, *args: Tensor) -> Tensor:
    return op(*args[:-1], args[-1] + 1)


@pytest.mark.parametrize(
    ("bug", "law"),
    [
        (_angles_of_the_first_row, tree_laws.draft_caches_stay_fresh), (_a_slot_too_far, tree_laws.draft_caches_stay_fresh),
        (_a_slot_too_far, tree_laws.drafts_what_re_feeding_would),
    ],
)  # fmt: skip
def test_a_drafter_that_rotates_or_writes_wrongly_is_caught(bug: Any, law: Any) -> None:
    with pytest.raises(AssertionError):
        law(Workshop(Plant(bug.__name__, "append_rotated", bug, owner="draft")), "eagle dynamic")
