"""Seed the next step's draft at the end of a graph: nothing, or n-grams of the history.

    return [%emitted]   ->   %ids, %parents = autospec.ngram_propose(%tokens, %kv_lens, %limits, ...)
                             autospec.store_draft(%draft_tokens, %tree_parents, %ids, %parents)
                             return [%emitted]

Legal: a draft never changes what is emitted. The history already holds what this step committed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, calls
from autospec.ir.passes import Notes, Pass
from autospec.kernels.commit import chain_draft, store_draft
from autospec.kernels.ngram_propose import ngram_propose
from autospec.state import history, store


@dataclass(frozen=True, kw_only=True)
class ProposeNothing(Pass):
    """Plain decoding: the next draft is the root alone."""

    name = "propose-nothing"
    batch_size: int
    max_nodes: int

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if any(calls(module, store_draft)):
            return 0
        builder = Builder(module)
        tokens, kv_lens, limits = history(module)
        none = builder.call(aten.new_empty.default, tokens, [self.batch_size, 0])
        ids, parents = builder.calls(chain_draft, tokens, kv_lens, limits, none)
        store(builder, self.batch_size, self.max_nodes, ids, parents)
        return 1


@dataclass(frozen=True, kw_only=True)
class ProposeNgram(Pass):
    """Draft with the tokens that followed the same n-gram before."""

    name = "propose-ngram"
    batch_size: int
    max_nodes: int
    max_draft_len: int
    max_matching_ngram_size: int
    is_use_oldest: bool = False

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if any(calls(module, store_draft)):
            return 0
        builder = Builder(module)
        tokens, kv_lens, limits = history(module)
        ids, parents = builder.calls(
            ngram_propose, tokens, kv_lens, limits, self.max_draft_len, self.max_matching_ngram_size, self.is_use_oldest
        )
        store(builder, self.batch_size, self.max_nodes, ids, parents)
        return 1
