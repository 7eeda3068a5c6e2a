"""Feed a graph from the state: `next_n` draft tokens per request in a step, a chunk of the prompt in prefill.

    %input_ids, %position_ids   ->   %ids = %draft_tokens[:, :next_n]
                                     %pos = autospec.node_positions(%kv_lens, next_n, max_position)

    (prefill)                   ->   %ids, %q_lens = autospec.prompt_chunk(%tokens, %kv_lens, %prompt_lens, q_len)
                                     %pos as above; every op that reads pages by length is told %q_lens

Legal: positions are kv_lens + depth by definition; the graph computes rows independently of each other apart from
attention, whose mask follows from kv_lens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import aten, calls
from autospec.ir.passes import Notes, Pass
from autospec.ir.roles import tag
from autospec.ir.slots import find_slot
from autospec.kernels.commit import prompt_chunk
from autospec.kernels.dsa_indexer_logits import dsa_indexer_logits
from autospec.kernels.dsa_topk import dsa_topk
from autospec.kernels.paged_attention import paged_attention
from autospec.kernels.paged_mla import paged_mla
from autospec.kernels.tree_tables import node_positions


def _first_compute_node(module: fx.GraphModule) -> fx.Node:
    return next(node for node in module.graph.nodes if node.op != "placeholder")


def _bind(module: fx.GraphModule, name: str, value: fx.Node) -> int:
    """Replace an input by a computed value; its placeholder goes."""
    node = find_slot(module, name)
    if node is None:
        return 0
    node.replace_all_uses_with(value)
    module.graph.erase_node(node)
    return 1


@dataclass(frozen=True, kw_only=True)
class WidenDecode(Pass):
    """Let decode take next_n tokens per request instead of one."""

    name = "widen-decode"
    batch_size: int
    next_n: int
    max_nodes: int  # width of the draft state, that of the widest step
    max_position: int

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if not any(_no_inputs_left(module)):
            return 0
        builder = Builder(module, _first_compute_node(module))
        wide = (self.batch_size, self.max_nodes)
        tokens = builder.state("draft_tokens", wide, torch.int64)
        kv_lens = builder.state("kv_lens", (self.batch_size,), torch.int32)
        if self.next_n < self.max_nodes:
            tokens = builder.call(aten.slice.Tensor, tokens, 1, 0, self.next_n)
        tag(tokens, "draft_tokens")
        positions = builder.call(node_positions, kv_lens, self.next_n, self.max_position)
        return _bind(module, "input_ids", tokens) + _bind(module, "position_ids", positions)

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        return _no_inputs_left(module)


@dataclass(frozen=True, kw_only=True)
class FeedPrompt(Pass):
    """Let prefill take the next chunk of every prompt from the token history."""

    name = "feed-prompt"
    batch_size: int
    q_len: int
    token_room: int
    max_position: int

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if not any(_no_inputs_left(module)):
            return 0
        builder = Builder(module, _first_compute_node(module))
        tokens = builder.state("tokens", (self.batch_size, self.token_room), torch.int64)
        kv_lens = builder.state("kv_lens", (self.batch_size,), torch.int32)
        prompt_lens = builder.state("prompt_lens", (self.batch_size,), torch.int32)
        chunk, q_lens = builder.calls(prompt_chunk, tokens, kv_lens, prompt_lens, self.q_len)
        tag(chunk, "draft_tokens")
        tag(q_lens, "q_lens")
        positions = builder.call(node_positions, kv_lens, self.q_len, self.max_position)
        for node in calls(module, (paged_attention, paged_mla, dsa_indexer_logits, dsa_topk)):
            node.update_kwarg("q_lens", q_lens)
        return _bind(module, "input_ids", chunk) + _bind(module, "position_ids", positions)

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        return _no_inputs_left(module)


def _no_inputs_left(module: fx.GraphModule) -> Iterator[str]:
    for name in ("input_ids", "position_ids"):
        if find_slot(module, name) is not None:
            yield f"{name} is still an input"
