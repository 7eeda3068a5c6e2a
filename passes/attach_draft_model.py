"""Splice a smaller model into the target's graph as its drafter.

    return [%emitted]   ->   %rows = autospec.tokens_at(%tokens, %kv_lens - 1, 2)        catch-up: two rows
                             %d1 = choose(draft(%rows)[:, 1])
                             %d2 = choose(draft(%d1)) ...                                 one row each
                             autospec.store_draft(..., [root, %d1, %d2, ...])

    (prefill, before the commit)   draft(%chunk) fills the draft's cache with the same, unshifted tokens

Legal: a draft never changes what is emitted; its KV layers and weights have names of their own (offset-draft-layers).
At a step's boundary the draft's cache holds kv_lens + 1 rows: it has run the root. After a step at most its last two
rows are missing (both after a full accept), so two rows are always run again; writing a row twice is harmless.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from autospec.ir.build import Builder, splice
from autospec.ir.match import aten
from autospec.ir.passes import Notes, Pass
from autospec.ir.roles import the
from autospec.ir.slots import find_slot, slots
from autospec.kernels.commit import chain_draft, tokens_at
from autospec.kernels.tree_tables import node_positions
from autospec.state import Chooser, StateShape, history, store

CATCH_UP = 2


@dataclass(frozen=True, kw_only=True)
class AttachDraftModel(Pass):
    """Run the draft model max_draft_len times at the end of the graph."""

    name = "attach-draft-model"
    sizes: StateShape
    draft_len: int
    max_position: int
    catch_up: fx.GraphModule = field(repr=False, compare=False)  # the draft at [B, 2]
    expand: fx.GraphModule = field(repr=False, compare=False)  # the draft at [B, 1]
    prefill: fx.GraphModule | None = field(default=None, repr=False, compare=False)  # the draft at [B, prefill_len]

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        ours = {slot.name for slot in slots(module)}
        for slot in slots(self.expand):
            own = slot.kind == "weight" or slot.name.startswith(("k_pages", "v_pages"))
            if own and slot.name in ours:
                yield f"{slot.name} belongs to target and draft: run offset-draft-layers on the draft"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if self.prefill is not None:
            self._fill_cache(module)
        builder = Builder(module, owner="draft")
        chooser = Chooser(builder, self.sizes)
        tokens, kv_lens, limits = history(module)
        before = builder.call(aten.clamp.default, builder.call(aten.sub.Tensor, kv_lens, 1), 0)
        rows = builder.call(tokens_at, tokens, before, CATCH_UP)
        logits = self._draft(builder, self.catch_up, rows, before, CATCH_UP)
        last = builder.call(aten.slice.Tensor, logits, 1, CATCH_UP - 1, CATCH_UP)
        drafts = builder.call(aten.new_empty.default, tokens, [self.sizes.batch_size, 0])
        for level in range(self.draft_len):
            ids, parents = builder.calls(chain_draft, tokens, kv_lens, limits, drafts)
            chosen = chooser.choose(last, ids, parents, kv_lens, first_node=level)
            drafts = builder.call(aten.cat.default, [drafts, chosen], 1)
            if level + 1 < self.draft_len:
                slot = builder.call(aten.add.Tensor, kv_lens, level + 1)
                last = self._draft(builder, self.expand, chosen, slot, 1)
        ids, parents = builder.calls(chain_draft, tokens, kv_lens, limits, drafts)
        store(builder, self.sizes.batch_size, self.sizes.max_draft_len + 1, ids, parents)
        notes.say(f"{self.draft_len} passes: one of {CATCH_UP} rows, {self.draft_len - 1} of one")
        return 1

    def _draft(self, builder: Builder, part: fx.GraphModule, ids: fx.Node, kv_lens: fx.Node, q_len: int) -> fx.Node:
        positions = builder.call(node_positions, kv_lens, q_len, self.max_position)
        return splice(builder, part, {"input_ids": ids, "position_ids": positions, "kv_lens": kv_lens})[0]

    def _fill_cache(self, module: fx.GraphModule) -> None:
        """Before the commit moves kv_lens: the prompt's rows of the draft's cache."""
        assert self.prefill is not None
        chunk, commit = the(module, "draft_tokens"), the(module, "commit")
        kv_lens = find_slot(module, "kv_lens")
        assert kv_lens is not None
        self._draft(Builder(module, commit, "draft"), self.prefill, chunk, kv_lens, chunk.meta["val"].shape[1])
