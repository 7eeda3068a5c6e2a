"""Splice a smaller model into the target's graph as its drafter.

    return [%emitted]   ->   %rows = autospec.tokens_at(%tokens, %kv_lens - 1, 2)        catch-up, the last row: the root
                             %l0 = draft(%rows)[:, -1];  %c0 = rank(%l0)                 the root's children
                             %l1 = draft(%c0) ...                                        one pass per level
                             autospec.store_draft(...)                                   chain, static or dynamic tree

    (prefill, before the commit)   draft(%chunk) fills the draft's cache with the same, unshifted tokens

Legal: a draft never changes what is emitted; its KV layers and weights have names of their own (offset-draft-layers).
At a step's boundary the draft's cache holds kv_lens + 1 rows: it has run the root. After a chain at most its last two
rows are missing (both after a full accept), after a tree as many as were accepted, since a tree's rows do not stand
where the path's belong. So that many are always run again; writing a row twice is harmless.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx

from autospec.drafting import Frontier, Grower
from autospec.ir.build import Builder, splice
from autospec.ir.match import aten, calls
from autospec.ir.passes import Notes, Pass
from autospec.ir.roles import the
from autospec.ir.slots import find_slot, is_pages, slots
from autospec.kernels.commit import store_draft, tokens_at
from autospec.kernels.tree_tables import node_positions
from autospec.state import StateShape, history


@dataclass(frozen=True, kw_only=True)
class AttachDraftModel(Pass):
    """Run the draft model once per level of the draft at the end of the graph."""

    name = "attach-draft-model"
    sizes: StateShape
    max_position: int
    catch_up: fx.GraphModule = field(repr=False, compare=False)  # the draft at [B, C], logits of the last valid row
    expand: Mapping[int, fx.GraphModule] = field(repr=False, compare=False)  # the draft at [B, R], by R
    prefill: fx.GraphModule | None = field(default=None, repr=False, compare=False)  # the draft at [B, prefill_len]
    draft_temperature: float = 1.0

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        ours = {slot.name for slot in slots(module)}
        for slot in slots(self.catch_up):
            if (slot.kind == "weight" or is_pages(slot)) and slot.name in ours:
                yield f"{slot.name} belongs to target and draft: run offset-draft-layers on the draft"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if any(calls(module, store_draft)):
            return 0
        if self.prefill is not None:
            self._fill_cache(module)
        builder = Builder(module, owner="draft")
        tokens, kv_lens, _ = history(module)
        rows = self.catch_up_rows
        start = builder.call(aten.clamp.default, builder.call(aten.sub.Tensor, kv_lens, rows - 1), 0)
        missing = builder.call(tokens_at, tokens, start, rows)
        valid = builder.call(aten.add.Tensor, builder.call(aten.sub.Tensor, kv_lens, start), 1)
        positions = builder.call(node_positions, start, rows, self.max_position)
        inputs = {"input_ids": missing, "position_ids": positions, "kv_lens": start, "q_lens": valid}
        logits = splice(builder, self.catch_up, inputs)[0]
        committed = builder.call(aten.add.Tensor, kv_lens, 1)

        def level(nodes: Frontier) -> fx.Node:
            inputs = nodes.inputs(builder, committed, self.max_position)
            return splice(builder, self.expand[nodes.count], inputs)[0]

        is_new = None
        if self.prefill is not None:  # rows that decode already keep their draft
            is_new = builder.call(aten.gt.Scalar, the(module, "q_lens"), 0)
        Grower(builder, self.sizes, self.draft_temperature, is_new=is_new).grow(logits, level)
        notes.say(f"{self.sizes.tree}: a pass of {rows} rows, then {self.sizes.tree.max_draft_len - 1} by level")
        return 1

    @property
    def catch_up_rows(self) -> int:
        value = find_slot(self.catch_up, "input_ids")
        assert value is not None, "a draft reads input_ids"
        return int(value.meta["val"].shape[1])

    def _fill_cache(self, module: fx.GraphModule) -> None:
        """Before the commit moves kv_lens: the prompt's rows of the draft's cache."""
        assert self.prefill is not None
        chunk, commit = the(module, "draft_tokens"), the(module, "commit")
        kv_lens = find_slot(module, "kv_lens")
        assert kv_lens is not None
        builder = Builder(module, commit, "draft")
        positions = builder.call(node_positions, kv_lens, chunk.meta["val"].shape[1], self.max_position)
        splice(builder, self.prefill, {"input_ids": chunk, "position_ids": positions, "kv_lens": kv_lens})
