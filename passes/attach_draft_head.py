"""Splice a head that reads the target's hidden states (EAGLE-3, MTP) into its graph as its drafter.

    return [%emitted, %taps]   ->   %t = %taps[path of the accepted nodes]               catch-up: row t pairs the
                                    %l0, %h0 = head(%tokens[n + 1 ...], fuse(%t))         target's feature t with token t + 1
                                    %c0 = rank(%l0);  %l1, %h1 = head(%c0, %h0) ...       one pass per level
                                    autospec.store_draft(...)
                                    return [%emitted]

    (one selection of keys)         %l1, %h1 = head(%c0, %h0, autospec.share_selection(last row of the catch-up's, path))

    (prefill)                       the same behind every chunk: its last row takes the next chunk's first token

    (several MTP modules)           every module runs the catch-up's rows, the later ones for their K/V alone;
                                    %l1, %h1 = module_1(%c0, %h0);  %l2, %h2 = module_2([%c0, %c1], [%h0, %h1])

Legal: a draft never changes what is emitted; the head's KV layers and weights have names of their own. At a step's
boundary its cache holds kv_lens rows. Rows of draft nodes are dropped by length and run again from the target's own
features; rows past the accepted ones write garbage above the length, which nothing sees. A module that guesses one level
has not seen the draft's earlier levels: it runs all rows grown so far, each on the hidden state that it hung from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from autospec.drafting import Frontier, Grower, committed_features, nothing_committed
from autospec.ir.build import Builder, splice
from autospec.ir.match import aten, calls, returned
from autospec.ir.passes import Notes, Pass
from autospec.ir.roles import with_role
from autospec.ir.slots import Slot
from autospec.kernels.commit import gather_rows, last_rows, store_draft, tokens_at
from autospec.kernels.share_selection import share_selection
from autospec.kernels.tree_tables import node_positions
from autospec.state import StateShape, history


@dataclass(frozen=True, kw_only=True)
class AttachDraftHead(Pass):
    """Run a head on the target's features at the accepted tokens, then once per level of the draft."""

    name = "attach-draft-head"
    sizes: StateShape
    max_position: int
    catch_up: fx.GraphModule = field(repr=False, compare=False)  # input_ids, taps [B, C] -> last row's logits, hidden
    expand: Mapping[int, fx.GraphModule] = field(repr=False, compare=False)  # input_ids, hidden [B, R], by R
    fill: tuple[fx.GraphModule, ...] = field(default=(), repr=False, compare=False)  # input_ids, hidden; K/V is kept
    regrow: tuple[fx.GraphModule, ...] = field(default=(), repr=False, compare=False)  # by level, on all rows so far
    d2t: Slot | None = None
    draft_temperature: float = 1.0

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        return nothing_committed(module)

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if any(calls(module, store_draft)):
            return 0
        builder = Builder(module, owner="draft")
        tokens, kv_lens, _ = history(module)
        known = committed_features(builder)
        rows = known.taps.meta["val"].shape[1]
        following = builder.call(tokens_at, tokens, builder.call(aten.add.Tensor, known.start, 1), rows)
        inputs = {
            "input_ids": following, "taps": known.taps, "kv_lens": known.start, "q_lens": known.count,
            "position_ids": builder.call(node_positions, known.start, rows, self.max_position),
        }  # fmt: skip
        logits, recycled, *selected = splice(builder, self.catch_up, inputs)
        chosen = [builder.call(last_rows, one, known.count) for one in selected]
        for part in self.fill:
            splice(builder, part, {**inputs, "hidden": known.taps})
        hidden = builder.call(last_rows, recycled, known.count)
        grown: list[tuple[fx.Node, fx.Node]] = []  # tokens and hidden states of every level so far

        def level(nodes: Frontier) -> fx.Node:
            nonlocal hidden
            if self.fill:
                grown.append((nodes.tokens, builder.call(gather_rows, hidden, nodes.parents)))
                logits, hidden = self._regrown(builder, kv_lens, nodes, grown)
            else:
                logits, hidden = self._level(builder, kv_lens, nodes, hidden, chosen)
            return logits

        d2t = None if self.d2t is None else builder.slot(self.d2t)
        Grower(builder, self.sizes, self.draft_temperature, d2t, known.is_new).grow(logits, level)
        module.graph.output_node().args = ((returned(module),),)
        notes.say(f"{self.sizes.tree}: a pass of {rows} rows, then {self.sizes.tree.max_draft_len - 1} by level")
        return 1

    def _level(
        self, builder: Builder, kv_lens: fx.Node, nodes: Frontier, above: fx.Node, chosen: Sequence[fx.Node]
    ) -> list[fx.Node]:
        """Logits and hidden states of one level's nodes, each reading its parent's hidden state.

        chosen: what the catch-up's last row selected, if the level is to attend to the same keys.
        """
        inputs = nodes.inputs(builder, kv_lens, self.max_position)
        inputs["hidden"] = builder.call(gather_rows, above, nodes.parents)
        if chosen:
            inputs["indices"] = builder.call(share_selection, chosen[0], kv_lens, nodes.first, nodes.count, nodes.tree_mask)
        return splice(builder, self.expand[nodes.count], inputs)

    def _regrown(
        self, builder: Builder, kv_lens: fx.Node, nodes: Frontier, grown: Sequence[tuple[fx.Node, fx.Node]]
    ) -> list[fx.Node]:
        """The same for a module that runs this level first: all rows grown so far, of which the last ones are returned."""
        call, last = builder.call, nodes.first + nodes.count
        tokens, hidden = (call(aten.cat.default, [pair[index] for pair in grown], 1) for index in (0, 1))
        inputs = {"input_ids": tokens, "hidden": hidden, "kv_lens": kv_lens}
        if nodes.tree_mask is None:
            inputs["position_ids"] = call(node_positions, kv_lens, last, self.max_position)
        else:
            depth = [call(aten.full_like.default, pair[0], level) for level, pair in enumerate(grown)]
            depths = call(aten.cat.default, depth, 1)
            inputs["position_ids"] = call(node_positions, kv_lens, last, self.max_position, depths)
            inputs |= {"append_lens": kv_lens, "tree_mask": nodes.tree_mask}
        found = splice(builder, self.regrow[nodes.level], inputs)
        return [call(aten.slice.Tensor, one, 1, nodes.first, last) for one in found]

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        if with_role(module, "taps") and len(module.graph.output_node().args[0]) > 1:  # type: ignore[arg-type]
            yield "the taps are still returned"
