"""What a step must read, and how fast this device reads: no step is faster than the one over the other.

Counted are the weights of every pass, once a pass however many rows it has, and the K/V rows of every request, once a
pass however many nodes it has. Of an embedding only rows are read, which is nothing. Activations stay in caches.
Of experts those are counted that a pass is expected to need: a token takes k of E, every choice as likely as another and
each token for itself, so that T tokens need E (1 - (1 - k/E)^T) of them. Routers prefer some, and neighbours agree: then
it is fewer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, fx

from autospec.assemble import Draft
from autospec.ir.match import aten, is_call, operand
from autospec.ir.slots import slot_of
from autospec.kernels.experts import experts
from autospec.program import CapturedHead, CapturedModel
from autospec.trees import DraftTree

BUFFER = {"cuda": 2 << 30, "cpu": 256 << 20}  # bytes, far more than any cache holds


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one step reads at least.

    Args:
        target: the target's weights, once.
        draft: the draft's weights, all passes.
        kv: K/V rows of target and draft, all passes.
        experts: of target and draft, all passes; none of them is in `target` and `draft`.
    """

    target: int
    draft: int
    kv: int
    experts: int = 0

    @property
    def total(self) -> int:
        return self.target + self.draft + self.kv + self.experts


def step_bytes(
    target: CapturedModel, draft: Draft | None, tree: DraftTree, batch: int, context: int, *, is_quantized: bool = False,
    length: float = 1.0,
) -> StepBytes:
    """Of a step with `context` committed tokens in each of `batch` rows; a quantised draft reads a byte for each weight.

    Args:
        length: mean acceptance length: tokens that the draft catches up on.
    """
    own, routed = weight_bytes(target.graph, target.weights, batch * tree.num_nodes)
    kv = target.facts.bytes_per_token
    if draft is None or tree.max_draft_len == 0:
        return StepBytes(own, 0, kv * batch * context, routed)
    levels = tree.max_draft_len - 1  # the first level follows from the pass that catches up
    first, following = (draft.first, draft.following) if isinstance(draft, CapturedHead) else (draft.graph, draft.graph)
    weights, experts_read = weight_bytes(first, draft.weights, batch * length)
    routed += experts_read
    if following is not None:  # Medusa heads run once
        for level in range(levels):
            more, experts_read = weight_bytes(following, draft.weights, batch * rows_at(tree, level))
            weights, routed = weights + more, routed + experts_read
        kv += (1 + levels) * draft.facts.bytes_per_token
    if is_quantized:
        weights //= draft.facts.dtype.itemsize
    return StepBytes(own, weights, kv * batch * context, routed)


def rows_at(tree: DraftTree, level: int) -> int:
    """Nodes of a level that the draft runs."""
    return 1 if tree.is_chain else len(tree.inner(level)) if tree.choices else int(tree.dynamic_tree_max_topk)


def weight_bytes(graph: fx.GraphModule, weights: Mapping[str, Tensor], tokens: float = 1.0) -> tuple[int, int]:
    """Bytes of the weights that one pass of a captured graph over so many tokens reads: those read in whole, and experts."""
    whole, routed = 0, 0.0
    for node in graph.graph.find_nodes(op="placeholder"):
        if slot_of(node).kind != "weight" or all(is_call(user, aten.embedding.default) for user in node.users):
            continue
        size, choosers = weights[slot_of(node).name].nbytes, [user for user in node.users if is_call(user, experts)]
        if choosers:
            routed += size * expected_share(node.meta["val"].shape[0], operand(choosers[0], 1).meta["val"].shape[-1], tokens)
        else:
            whole += size
    return whole, int(routed)


def expected_share(count: int, chosen: int, tokens: float) -> float:
    """The share of `count` experts that so many tokens need, each of which takes `chosen`."""
    return 1.0 - (1.0 - chosen / count) ** tokens


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of the faster of two readers of a large buffer, medians of 10: a sum, and a copy (which writes, too)."""
    data = torch.ones(BUFFER[device.type] // 4, device=device)
    other = torch.empty_like(data)
    seconds = [median(_seconds(run, device) for _ in range(10)) for run in (data.sum, lambda: other.copy_(data))]
    return max(data.nbytes / seconds[0], 2 * data.nbytes / seconds[1])


def _seconds(run: object, device: torch.device) -> float:
    assert callable(run), "something is timed"
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end.record()
    end.synchronize()
    return start_event.elapsed_time(end) / 1000
