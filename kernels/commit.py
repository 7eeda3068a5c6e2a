"""The bookkeeping of a step on the device: read the next inputs from the state, commit what was accepted.

State invariants at every boundary: tokens[b, : kv_lens[b] + 1] are the request's real tokens; the target's cache holds
kv_lens rows; tokens[b, kv_lens] is the root of the next draft. `tokens` has room for the widest step past every limit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autospec.kernels.registry import kernel_op


@kernel_op()
def prompt_chunk(tokens: Tensor, kv_lens: Tensor, prompt_lens: Tensor, q_len: int) -> tuple[Tensor, Tensor]:
    """The next `q_len` prompt tokens of each request: chunk [B, q_len] int64 and q_lens [B] int32, how many are real.

    tokens [B, T] int64; kv_lens, prompt_lens [B] int32. Requests whose prompt is in the cache have q_lens 0.
    """
    slot = kv_lens.long()[:, None] + torch.arange(q_len, device=tokens.device)[None, :]
    chunk = tokens.gather(1, slot.clamp(max=tokens.shape[1] - 1))
    return chunk, (prompt_lens - kv_lens).clamp(0, q_len)


@kernel_op()
def prompt_pages(page_table: Tensor, q_lens: Tensor) -> Tensor:
    """The page table of a prefill call, [B, max_pages] int32: rows that read no prompt (q_lens [B] int32 is 0) own no page.

    What the call computes for them goes to the scratch page, so their caches stay as they are, bit for bit.
    """
    return torch.where(q_lens[:, None] > 0, page_table, 0)


@kernel_op()
def last_rows(hidden: Tensor, q_lens: Tensor) -> Tensor:
    """hidden [B, N, ...], q_lens [B] -> [B, 1, ...]: the last valid row of each request (row 0 where there is none)."""
    row = (q_lens.long() - 1).clamp(min=0)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), row].unsqueeze(1)


@kernel_op()
def gather_rows(hidden: Tensor, nodes: Tensor) -> Tensor:
    """hidden [B, N, ...], nodes [B, R] int (negative: row 0) -> [B, R, ...]: the named rows of each request."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device)[:, None], nodes.long().clamp(min=0)]


@kernel_op()
def tokens_at(tokens: Tensor, starts: Tensor, count: int) -> Tensor:
    """tokens [B, T] int64, starts [B] -> [B, count] int64: `count` tokens in a row from `starts` on, clamped to T."""
    slot = starts.long()[:, None] + torch.arange(count, device=tokens.device)[None, :]
    return tokens.gather(1, slot.clamp(0, tokens.shape[1] - 1))


def _written(tokens: Tensor, starts: Tensor, run: Tensor, count: Tensor) -> Tensor:
    """tokens [B, T] with the first count[b] words of run [B, R] from starts[b] on.

    Every word is chosen, none is scattered: Inductor leaves a scatter of int64 to a kernel of its own between two copies.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)[None, :] - starts.long()[:, None]
    word = run.gather(1, place.clamp(0, run.shape[1] - 1))
    return torch.where((place >= 0) & (place < count[:, None]), word, tokens)


@kernel_op(mutates=("tokens", "kv_lens", "finished"))
def commit_prompt(
    tokens: Tensor, kv_lens: Tensor, finished: Tensor, prompt_lens: Tensor, limits: Tensor, eos_ids: Tensor,
    q_lens: Tensor, target_tokens: Tensor,
) -> Tensor:
    """After a prefill chunk: advance kv_lens by q_lens; where the prompt ended, write the first chosen token.

    tokens [B, T] int64, kv_lens int32, finished bool, prompt_lens, limits, q_lens int32 [B]; eos_ids [E] int64;
    target_tokens [B, 1] int64. -> emitted [B, 1] int64, -1 where the prompt goes on. Mutates tokens, kv_lens, finished.
    """
    ended = (kv_lens + q_lens == prompt_lens) & (q_lens > 0)
    emitted = torch.where(ended[:, None], target_tokens, -1)
    tokens.copy_(_written(tokens, prompt_lens, target_tokens, ended.long()))
    is_eos = (target_tokens == eos_ids[None, :]).any(1)
    finished.copy_(finished | (ended & (is_eos | (prompt_lens + 1 >= limits))))
    kv_lens.copy_(kv_lens + q_lens)
    return emitted


@kernel_op(mutates=("tokens", "kv_lens", "finished", "accept_counts"))
def commit_step(
    tokens: Tensor, kv_lens: Tensor, finished: Tensor, accept_counts: Tensor, prompt_lens: Tensor, limits: Tensor,
    eos_ids: Tensor, draft_tokens: Tensor, tree_parents: Tensor, accept_length: Tensor, accept_path: Tensor,
    bonus_token: Tensor,
) -> Tensor:
    """Emit accepted path and bonus token of every live request, cut at the first eos and at its limit.

    tokens [B, T] int64; kv_lens [B] int32; finished [B] bool; accept_counts [B, >= L+1] int64: steps in which the row
    was live, then those that accepted at least d tokens (counted before the cut); prompt_lens, limits [B] int32: length
    at which a request ends; eos_ids [E] int64; draft_tokens int64, tree_parents int32 [B, >= N], the widest step's;
    accept_length [B], accept_path [B, L+1] int32; bonus_token [B]. -> emitted [B, L+1] int64, -1 padded.
    Where the draft is a chain longer than this step verified, its next token is compared with the bonus token and
    counted at depth L + 1. Mutates tokens, kv_lens, finished, accept_counts.
    """
    steps = accept_path.shape[1]
    index = torch.arange(steps, device=tokens.device)[None, :]
    live = ~finished & (kv_lens >= prompt_lens)
    following = torch.nn.functional.pad(accept_path[:, 1:].long(), (0, 1), value=-1)
    accepted = draft_tokens.gather(1, following.clamp(min=0))
    run = torch.where(index == accept_length[:, None], bonus_token[:, None], accepted)
    offered = index <= accept_length[:, None]
    is_eos = (run[:, :, None] == eos_ids[None, None, :]).any(2) & offered
    first_eos = torch.where(is_eos, index, steps).amin(1)
    count = torch.minimum(accept_length.long() + 1, first_eos + 1)
    count = torch.minimum(count, limits.long() - kv_lens.long() - 1).clamp(min=0)
    count = torch.where(live, count, 0)
    valid = index < count[:, None]
    tokens.copy_(_written(tokens, kv_lens + 1, run, count))
    reached = torch.cat([live[:, None], (accept_length[:, None] >= index[:, 1:]) & live[:, None]], 1)
    if steps < accept_counts.shape[1]:
        is_next = (tree_parents[:, steps] == steps - 1) & (draft_tokens[:, steps] == bonus_token)
        reached = torch.cat([reached, (is_next & live & (accept_length == steps - 1))[:, None]], 1)
    accept_counts.copy_(accept_counts + torch.nn.functional.pad(reached, (0, accept_counts.shape[1] - reached.shape[1])))
    ended = (first_eos < count) | (kv_lens.long() + 1 + count >= limits.long())
    finished.copy_(finished | (live & ended))
    kv_lens.copy_(kv_lens + count.to(kv_lens.dtype))
    return torch.where(valid, run, -1)


@kernel_op(mutates=("draft_tokens", "tree_parents"))
def store_draft(
    draft_tokens: Tensor, tree_parents: Tensor, new_tokens: Tensor, new_parents: Tensor, is_new: Tensor | None = None
) -> None:
    """Make new_tokens, new_parents [B, N] the draft of the next step: draft_tokens int64, tree_parents int32 [B, >= N].

    Every word is rewritten; nodes past N become absent. is_new [B] bool: rows that get the draft (None: all)."""
    room = draft_tokens.shape[1] - new_tokens.shape[1]
    ids = torch.nn.functional.pad(new_tokens, (0, room))
    parents = torch.nn.functional.pad(new_parents, (0, room), value=-1)
    if is_new is not None:
        ids = torch.where(is_new[:, None], ids, draft_tokens)
        parents = torch.where(is_new[:, None], parents, tree_parents)
    draft_tokens.copy_(ids)
    tree_parents.copy_(parents)


@kernel_op()
def chain_draft(tokens: Tensor, kv_lens: Tensor, limits: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """The chain root -> drafts[:, 0] -> drafts[:, 1] ...: draft_tokens [B, L+1] int64, tree_parents [B, L+1] int32.

    tokens [B, T], the root at kv_lens [B] int32; drafts [B, L] int64. Nodes at or past limits [B] int32 are absent.
    """
    batch, count = drafts.shape
    step = torch.arange(count, device=tokens.device)[None, :]
    last = kv_lens.long()[:, None]
    parents = torch.where(last + 1 + step < limits.long()[:, None], step, -1)
    root = torch.full((batch, 1), -1, dtype=torch.int64, device=tokens.device)
    return torch.cat([tokens.gather(1, last), drafts], 1), torch.cat([root, parents], 1).to(torch.int32)


@kernel_op()
def static_draft(
    tokens: Tensor, kv_lens: Tensor, limits: Tensor, drafts: Tensor, log_probs: Tensor, node_parents: Tensor,
    node_depth: Tensor,
) -> tuple[Tensor, Tensor]:
    """The root and the nodes of a static tree: draft_tokens [B, M+1] int64, tree_parents [B, M+1] int32.

    tokens [B, T], the root at kv_lens [B] int32; drafts [B, M] int64, log_probs [B, M] float32 of nodes 1 ... M;
    node_parents, node_depth [M+1] int32, of all nodes. Nodes at or past limits [B] int32, and those that the
    draft cannot take (-inf), are absent.
    """
    root = tokens.gather(1, kv_lens.long()[:, None])
    possible = torch.nn.functional.pad(log_probs > float("-inf"), (1, 0), value=True)
    present = (kv_lens[:, None] + node_depth[None, :] < limits[:, None]) & possible
    return torch.cat([root, drafts], 1), torch.where(present, node_parents[None, :], -1)


@kernel_op(mutates=("rank_counts",))
def count_ranks(
    rank_counts: Tensor, kv_lens: Tensor, prompt_lens: Tensor, finished: Tensor, tree_parents: Tensor, accept_path: Tensor
) -> None:
    """Before a commit: count the draft nodes that live rows verified, and the accepted ones by rank among siblings.

    rank_counts [B, R+1] int64: nodes verified, then accepted nodes of rank 0, 1, ... (the last takes all beyond);
    kv_lens, prompt_lens [B] int32, finished [B] bool; tree_parents [B, N], accept_path [B, L+1] int32. Mutates rank_counts.
    """
    live = ~finished & (kv_lens >= prompt_lens)
    node = torch.arange(tree_parents.shape[1], device=tree_parents.device)
    is_sibling = (tree_parents[:, :, None] == tree_parents[:, None, :]) & (node[None, :] < node[:, None])[None]
    rank = is_sibling.sum(2).clamp(max=rank_counts.shape[1] - 2)
    accepted = accept_path[:, 1:]
    rank = torch.where((accepted > 0) & live[:, None], rank.gather(1, accepted.long().clamp(min=0)), -1)
    buckets = torch.arange(rank_counts.shape[1] - 1, device=rank.device)
    by_rank = (rank[:, :, None] == buckets).sum(1)
    verified = ((tree_parents >= 0) & live[:, None]).sum(1, keepdim=True)
    rank_counts.copy_(rank_counts + torch.cat([verified, by_rank], 1))
