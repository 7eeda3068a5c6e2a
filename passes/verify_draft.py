"""Let the target choose, accept what the draft guessed, and commit it to the state.

    return [%logits]   ->   %target = autospec.choose_tokens(%logits, %draft_tokens, ...)    (choose_greedy when greedy)
                            %n, %path, %bonus = autospec.accept_tree(%target, %draft_tokens, %tree_parents, L)
                            autospec.compact_kv([%k_pages.0, ...], ..., %path, %n)              (a tree)
                            %emitted = autospec.commit_step(%tokens, %kv_lens, ..., %n, %path, %bonus)
                            return [%emitted]

    (prefill)          ->   %target = autospec.choose_*(%logits); %emitted = autospec.commit_prompt(...)

Legal: every emitted token is the target's own choice after the tokens before it; drafts only decide how many of
these choices one step computes. A chain's accepted rows are already in place; a tree's are moved to the front.
What the graph returns beside the logits, it goes on returning.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, others, returned
from autospec.ir.passes import Notes, Pass
from autospec.ir.roles import tag, the, with_role
from autospec.ir.slots import find_slot, is_pages, slot_of
from autospec.kernels.accept_tree import accept_tree
from autospec.kernels.commit import commit_prompt, commit_step, count_ranks, tokens_at
from autospec.kernels.compact_kv import compact_kv
from autospec.state import RANKS, Chooser, StateShape


@dataclass(frozen=True, kw_only=True)
class VerifyDraft(Pass):
    """Choose, accept and commit at the end of a step."""

    name = "verify-draft"
    sizes: StateShape
    draft_len: int

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if with_role(module, "commit"):
            return 0
        output = module.graph.output_node()
        logits = returned(module)
        builder = Builder(module, output)
        chooser = Chooser(builder, self.sizes)
        tree = self.sizes.tree
        wide = (self.sizes.batch_size, tree.num_nodes)
        all_tokens = builder.state("draft_tokens", wide, torch.int64)
        all_parents = builder.state("tree_parents", wide, torch.int32, fill=-1)
        draft_tokens = the(module, "draft_tokens")
        tree_parents = all_parents
        if tree.is_chain:  # whose first nodes are a chain, too
            tree_parents = builder.call(aten.slice.Tensor, all_parents, 1, 0, self.draft_len + 1)
        tokens, kv_lens, finished, prompt_lens, limits, eos_ids = chooser.commit_state()
        target = chooser.choose(logits, draft_tokens, tree_parents, kv_lens)
        length, path, bonus = builder.calls(accept_tree, target, draft_tokens, tree_parents, self.draft_len)
        tag(path, "accept_path")
        if not tree.is_chain:
            pages = [node for node in module.graph.find_nodes(op="placeholder") if is_pages(slot_of(node))]
            pages.sort(key=lambda node: slot_of(node).shape[2:])  # rows of one width move together
            page_table = find_slot(module, "page_table")
            builder.call(compact_kv, pages, page_table, kv_lens, path, length)
            ranks = builder.state("rank_counts", (self.sizes.batch_size, RANKS + 1), torch.int64)
            builder.call(count_ranks, ranks, kv_lens, prompt_lens, finished, tree_parents, path)
        counts = builder.state("accept_counts", (self.sizes.batch_size, tree.max_draft_len + 1), torch.int64)
        emitted = builder.call(
            commit_step, tokens, kv_lens, finished, counts, prompt_lens, limits, eos_ids, all_tokens, all_parents,
            length, path, bonus,
        )  # fmt: skip
        tag(emitted, "commit")
        chooser.remember(emitted)
        output.args = ((emitted, *others(module)),)
        return 1

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        return _emits(module)


@dataclass(frozen=True, kw_only=True)
class CommitPrompt(Pass):
    """Choose the first token where a prompt ends, and commit the chunk."""

    name = "commit-prompt"
    sizes: StateShape

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if with_role(module, "commit"):
            return 0
        output = module.graph.output_node()
        logits = returned(module)
        builder = Builder(module, output)
        chooser = Chooser(builder, self.sizes)
        q_lens = the(module, "q_lens")
        tokens, kv_lens, finished, prompt_lens, limits, eos_ids = chooser.commit_state()
        # The last prompt token plays the root: it stands at slot prompt_lens - 1 and chooses token prompt_lens.
        root_slot = builder.call(aten.sub.Tensor, prompt_lens, 1)
        root = builder.call(tokens_at, tokens, root_slot, 1)
        no_parent = builder.call(aten.full_like.default, root, -1, dtype=torch.int32)
        target = chooser.choose(logits, root, no_parent, root_slot)
        emitted = builder.call(
            commit_prompt, tokens, kv_lens, finished, prompt_lens, limits, eos_ids, q_lens, target
        )
        tag(emitted, "commit")
        chooser.remember(emitted)
        output.args = ((emitted, *others(module)),)
        return 1

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        return _emits(module)


def _emits(module: fx.GraphModule) -> Iterable[str]:
    if returned(module).meta.get("role") != "commit":
        yield "the graph does not return what it commits"
