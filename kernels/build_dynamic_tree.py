"""The tree that the target verifies: the root and the M best candidates of the whole history, in history order.

So parents precede their children and siblings stay in order. Candidates at -inf (NaN too) are filler: absent nodes. A
candidate never beats its parent and ties go to the lower index, so the M best are closed under ancestors; where a
history breaks that, a candidate whose parent was not selected is absent, and with it its descendants.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autospec.kernels.filters import ordered
from autospec.kernels.launch import jit, no_gpu, power_of_2, tl, wrap_triton
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure


@kernel_op()
def build_dynamic_tree(
    root_token: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, max_total_draft_tokens: int
) -> tuple[Tensor, Tensor]:
    """root_token [B] int64; the history: tokens [B, H] int64, scores [B, H] float32, parents [B, H] int32 (-1: root).

    -> draft_tokens [B, M + 1] int64, tree_parents [B, M + 1] int32. Absent nodes carry the root's token.
    """
    size = tokens.shape[1]
    count = min(max_total_draft_tokens, size)
    scores = torch.where(scores.isnan(), float("-inf"), scores)
    best = torch.sort(scores, dim=1, descending=True, stable=True)[1][:, :count]
    chosen = torch.sort(best, dim=1)[0]
    possible = scores.gather(1, chosen) > float("-inf")
    node = torch.arange(1, count + 1, device=tokens.device).expand_as(chosen)
    node_of = torch.zeros_like(tokens).scatter(1, chosen, torch.where(possible, node, 0))
    parent = parents.gather(1, chosen).long()
    parent_node = node_of.gather(1, parent.clamp(0, size - 1))
    is_selected = (parent < chosen) & (parent_node > 0)
    present = possible & ((parent < 0) | is_selected)
    ids = torch.where(present, tokens.gather(1, chosen), root_token[:, None])
    links = torch.where(present, torch.where(parent < 0, 0, parent_node), -1)
    missing = max_total_draft_tokens - count
    root = root_token[:, None]
    tree_parents = torch.nn.functional.pad(links, (1, missing), value=-1).to(torch.int32)
    return torch.cat([root, ids, root.expand(-1, missing)], 1), tree_parents


# B requests (i_b), H candidates (o_h), N = M + 1 nodes (o_n). One program holds a whole history in registers: the M-th
# best score is built bit by bit, ties at it go to the lower candidates, and sums from the left number the nodes.
@jit
def select_best(
    p_root, p_tokens, p_scores, p_parents, p_draft, p_links, size, nodes,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):
    i_b = tl.program_id(0)
    o_h, o_n = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    m_h = o_h < size
    count = tl.minimum(nodes - 1, size)
    root = tl.load(p_root + i_b)
    b_score = tl.load(p_scores + i_b * size + o_h, mask=m_h, other=-float("inf"))
    b_parent = tl.load(p_parents + i_b * size + o_h, mask=m_h, other=-1)
    b_token = tl.load(p_tokens + i_b * size + o_h, mask=m_h, other=0)
    b_score = tl.where(b_score == b_score, b_score, -float("inf"))
    b_key = tl.where(m_h, ordered(b_score), 0)  # -inf is above 0
    cut = tl.full((), 0, tl.uint32)
    unit = tl.full((), -2147483648, tl.int32).to(tl.uint32, bitcast=True)
    for _ in range(32):
        is_below = tl.sum((b_key >= cut + unit).to(tl.int32), 0) >= count
        cut += tl.where(is_below, unit, 0)
        unit = unit >> 1
    b_tie = (b_key == cut).to(tl.int32)
    above = tl.sum((b_key > cut).to(tl.int32), 0)
    m_chosen = (b_key > cut) | ((b_tie > 0) & (tl.cumsum(b_tie, 0) <= count - above))
    b_node = tl.cumsum(m_chosen.to(tl.int32), 0)
    m_possible = m_chosen & (b_score > -float("inf"))
    b_parent_node = tl.gather(tl.where(m_possible, b_node, 0), tl.minimum(tl.maximum(b_parent, 0), BLOCK_H - 1), 0)
    m_present = m_possible & ((b_parent < 0) | ((b_parent < o_h) & (b_parent_node > 0)))
    b_link = tl.where(m_present, tl.where(b_parent < 0, 0, b_parent_node), -1)
    tl.store(p_draft + i_b * nodes + b_node, tl.where(m_present, b_token, root), mask=m_chosen)
    tl.store(p_links + i_b * nodes + b_node, b_link, mask=m_chosen)
    m_rest = (o_n == 0) | ((o_n > count) & (o_n < nodes))  # the root, and nodes that no candidate is left for
    tl.store(p_draft + i_b * nodes + o_n, o_n * 0 + root, mask=m_rest)
    tl.store(p_links + i_b * nodes + o_n, o_n * 0 - 1, mask=m_rest)


@build_dynamic_tree.implementation("triton", why_not=no_gpu)
def build_dynamic_tree_triton(
    root_token: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, max_total_draft_tokens: int
) -> tuple[Tensor, Tensor]:
    """One launch: 60 of 710 candidates for 64 requests in 8 us. H100 80GB SXM, triton 3.6, 2026-11-21."""
    batch, size = tokens.shape
    nodes = max_total_draft_tokens + 1
    draft_tokens = tokens.new_empty(batch, nodes)
    tree_parents = parents.new_empty(batch, nodes)
    block = power_of_2(size)
    wrap_triton(select_best)[(batch,)](
        root_token, tokens.contiguous(), scores.contiguous(), parents.contiguous(), draft_tokens, tree_parents,
        size, nodes, BLOCK_H=block, BLOCK_N=power_of_2(nodes), num_warps=4 if block <= 1024 else 8 if block <= 4096 else 16,
    )
    return draft_tokens, tree_parents


def bench(device: torch.device) -> Iterator[Measurement]:
    """Histories of true trees, top-k 10 and 8 levels (H = 710) and the largest of top-k 32 and 4 levels."""
    from autospec.kernels.grow_frontier import grow_frontier

    for batch, top, levels, most in ((1, 10, 8, 60), (64, 10, 8, 60), (8, 32, 4, 1023)):
        scores, ids = torch.zeros(batch, 1, device=device), torch.full((batch, 1), -1, device=device).int()
        mask, lens = torch.zeros(batch, 1, 4, device=device).int(), torch.zeros(batch, device=device).int()
        pieces = []
        for level in range(levels):
            shape = batch, scores.shape[1], top
            tokens, log_probs = torch.randint(0, 128256, shape, device=device), -3 * torch.rand(shape, device=device)
            *piece, _, scores, ids, _, mask = grow_frontier.reference(
                tokens, log_probs, scores, ids, mask, lens, lens + 99, level, top
            )
            pieces.append(piece)
        history = tuple(torch.cat(x, 1) for x in zip(*pieces, strict=True))
        size = history[0].shape[1]
        args = torch.randint(0, 128256, (batch,), device=device), *history, most

        def mine(args=args) -> tuple[Tensor, ...]:
            return build_dynamic_tree_triton(*args)

        def reference(args=args) -> tuple[Tensor, ...]:
            return build_dynamic_tree.reference(*args)

        yield measure(
            "build_dynamic_tree", f"{batch} x {most} of {size}", mine, reference, batch * (size * 16 + most * 12)
        )
