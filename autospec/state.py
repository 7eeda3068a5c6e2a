"""The state that graphs share, and the pieces of a step that several passes emit: choosing a token, storing a draft.

All state is preallocated; after a step it is a function of the emitted tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.slots import find_slot
from autospec.kernels.choose_tokens import choose_greedy, choose_tokens, mark_seen
from autospec.kernels.commit import store_draft
from autospec.trees import DraftTree

RANKS = 16  # siblings that are counted apart; a guess: dynamic trees use 10, published static ones up to 10
MAX_EOS = 8  # eos ids a request may have; a guess that covers every generation config we saw (at most 4)


@dataclass(frozen=True, kw_only=True)
class StateShape:
    """Sizes of the state that choosing and committing touch."""

    batch_size: int
    token_room: int
    vocab_size: int
    tree: DraftTree
    sampling: bool


class Chooser:
    """Emits the choice of a token, greedy or sampled, with the state it reads. Drafters choose with it too."""

    def __init__(self, builder: Builder, sizes: StateShape) -> None:
        self.builder, self.sizes = builder, sizes

    def row_state(self, name: str, dtype: torch.dtype, fill: float = 0) -> fx.Node:
        return self.builder.state(name, (self.sizes.batch_size,), dtype, fill)

    def seen(self) -> fx.Node:
        return self.builder.state("seen", (self.sizes.batch_size, self.sizes.vocab_size), torch.bool)

    def choose(
        self, logits: fx.Node, draft_tokens: fx.Node, tree_parents: fx.Node, kv_lens: fx.Node, first_node: int = 0
    ) -> fx.Node:
        """The token after each row of logits [B, R, V], whose first row is node `first_node`: [B, R]."""
        if not self.sizes.sampling:
            return self.builder.call(choose_greedy, logits)
        return self.builder.call(
            choose_tokens, logits, draft_tokens, tree_parents, kv_lens, *self.processing(), first_node
        )

    def processing(self) -> tuple[fx.Node, ...]:
        """Row keys, temperature, top-k, top-p, min-p, repetition penalty, and the history that it looks at."""
        return (
            self.row_state("row_keys", torch.int64), self.row_state("temperature", torch.float32, 1.0),
            self.row_state("top_k", torch.int32), self.row_state("top_p", torch.float32, 1.0),
            self.row_state("min_p", torch.float32), self.row_state("repetition_penalty", torch.float32, 1.0),
            self.seen(),
        )  # fmt: skip

    def remember(self, emitted: fx.Node) -> None:
        """Add emitted tokens to the history that processors look at."""
        if self.sizes.sampling:
            self.builder.call(mark_seen, self.seen(), emitted)

    def commit_state(self) -> tuple[fx.Node, ...]:
        """tokens, kv_lens, finished; prompt_lens, limits, eos_ids."""
        sizes = self.sizes
        return (
            self.builder.state("tokens", (sizes.batch_size, sizes.token_room), torch.int64),
            self.row_state("kv_lens", torch.int32),
            self.row_state("finished", torch.bool, 1),
            self.row_state("prompt_lens", torch.int32),
            self.row_state("limits", torch.int32),
            self.builder.state("eos_ids", (MAX_EOS,), torch.int64, -1),
        )


def store(
    builder: Builder, batch_size: int, max_nodes: int, ids: fx.Node, parents: fx.Node, is_new: fx.Node | None = None
) -> None:
    """Make (ids, parents) [B, N] the draft of the next step, of the rows that is_new [B] names."""
    draft_tokens = builder.state("draft_tokens", (batch_size, max_nodes), torch.int64)
    tree_parents = builder.state("tree_parents", (batch_size, max_nodes), torch.int32, fill=-1)
    builder.call(store_draft, draft_tokens, tree_parents, ids, parents, is_new)


def history(module: fx.GraphModule) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The placeholders of tokens, kv_lens and limits."""
    found = tuple(find_slot(module, name) for name in ("tokens", "kv_lens", "limits"))
    assert all(found), "a draft is proposed from the committed history: run verify-draft or commit-prompt first"
    return found  # type: ignore[return-value]
