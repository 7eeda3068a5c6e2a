"""Shared by the tests of passes: the tiny graph, specialised, paged and fed from the state."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from harness.graphs import VOCAB, after, tiny_graph
from torch import Tensor, fx

from autospec.passes.fold_noops import FoldNoops
from autospec.passes.page_kv_cache import PageKvCache
from autospec.passes.specialize_shapes import SpecializeShapes
from autospec.state import StateShape
from autospec.trees import chain

BATCH, PAGE, PAGES_PER_ROW = 2, 4, 8


@dataclass(frozen=True)
class Tiny:
    """The tiny model: its captured graph, its weights, and copies on which the first passes have run."""

    captured: fx.GraphModule
    weights: dict[str, Tensor]

    def static(self, q_len: int, batch: int = BATCH) -> fx.GraphModule:
        return after(self.captured, SpecializeShapes(batch_size=batch, q_len=q_len), FoldNoops())

    def paged(self, q_len: int, batch: int = BATCH, is_length_given: bool = False) -> fx.GraphModule:
        return after(self.static(q_len, batch), paging(batch, is_length_given))


def paging(batch: int = BATCH, is_length_given: bool = False) -> PageKvCache:
    return PageKvCache(
        page_size=PAGE,
        num_pages=1 + batch * PAGES_PER_ROW,
        pages_per_row=PAGES_PER_ROW,
        is_length_given=is_length_given,
    )


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny(*tiny_graph())


@pytest.fixture(scope="session")
def sizes() -> StateShape:
    """Greedy state for the tiny model, two drafts wide."""
    return StateShape(
        batch_size=BATCH, token_room=PAGE * PAGES_PER_ROW, vocab_size=VOCAB, tree=chain(2), sampling=False
    )
