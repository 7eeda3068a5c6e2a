"""Target tokens that a draft meets with a given acceptance: for benchmarks of weights that mean nothing.

Per request and step one uniform number is drawn, of Philox by (row key, root's slot); the drawn length is how many of the
falling rates P_1 >= P_2 >= ... lie above it, so that P(length >= d) = P_d. At nodes above that depth the target chooses
the token of the first child, everywhere else one that no child carries: the accepted path is the chain of first children,
cut at the drawn length. Where that chain is shorter than what was drawn (an absent node, a shallow tree) it bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autospec.kernels.launch import can_wait, gdc_launch_dependents, gdc_wait, jit, no_gpu, power_of_2, tl, wrap_triton
from autospec.kernels.noise import philox
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure
from autospec.kernels.tree_tables import ancestors

STREAM = 1  # third word of the counter; the noise of sampling has 0 there


def drawn_lengths(kv_lens: Tensor, row_keys: Tensor, rates: Tensor) -> Tensor:
    """kv_lens [B] int32, row_keys [B] int64, rates [D] float32 -> the length to accept, [B] int64."""
    index = kv_lens.long()
    zero = torch.zeros_like(index)
    u = (philox(row_keys, index, zero, zero + STREAM, zero)[0].float() + 0.5) * 2.0**-32
    return (u[:, None] < rates).sum(1)


@kernel_op()
def synthesize_tokens(
    target_tokens: Tensor, draft_tokens: Tensor, tree_parents: Tensor, kv_lens: Tensor, row_keys: Tensor, rates: Tensor,
    vocab_size: int,
) -> Tensor:
    """target_tokens, draft_tokens [B, N] int64; tree_parents [B, N] int32; kv_lens [B] int32, the root's slot; row_keys
    [B] int64; rates [D] float32, falling -> tokens to put in the place of target_tokens, [B, N] int64.

    A token that no child carries is the target's own, or the next id that is free.
    """
    batch, q_len = draft_tokens.shape
    node = torch.arange(q_len, device=draft_tokens.device)
    is_child = (tree_parents[:, None, :] == node[:, None]) & (node > node[:, None])  # [B, N, child]
    first = torch.where(is_child, node, q_len).amin(2)
    # How far above the target's token every child's stands; the free one is the lowest distance that none has.
    distance = (draft_tokens[:, None, :] - target_tokens[:, :, None]) % vocab_size
    taken = torch.zeros(batch, q_len, q_len + 1, dtype=torch.int32, device=draft_tokens.device)
    taken = taken.scatter_add(2, distance.clamp(max=q_len), is_child.to(torch.int32))
    free = torch.where(taken[..., :q_len] > 0, q_len, node).amin(2)
    refused = (target_tokens + free) % vocab_size
    depth = ancestors(tree_parents).sum(-1) - 1
    follows = (depth < drawn_lengths(kv_lens, row_keys, rates)[:, None]) & (first < q_len)
    return torch.where(follows, draft_tokens.gather(1, first.clamp(max=q_len - 1)), refused)


BLOCK_I = 16  # nodes per program; a guess, the whole launch is microseconds


# B requests (i_b), blocks of nodes (o_i) against all nodes as their children (o_j).
@jit
def synthesize(
    p_target, p_draft, p_parents, p_kv_lens, p_keys, p_rates, p_out, q_len, vocab_size, STREAM: tl.constexpr,
    DEPTHS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_i, i_b = tl.program_id(0), tl.program_id(1)
    o_i, o_j = i_i * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_N)
    m_i, m_j = o_i < q_len, o_j < q_len
    p_parents += i_b * q_len
    p_draft += i_b * q_len
    zero = (o_i * 0).to(tl.uint32)
    r, _, _, _ = tl.philox(tl.load(p_keys + i_b), zero + tl.load(p_kv_lens + i_b).to(tl.uint32), zero, zero + STREAM, zero)
    b_u = (r.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    b_length = o_i * 0
    for i_d in range(DEPTHS):
        b_length += (b_u < tl.load(p_rates + i_d)).to(tl.int32)
    b_node, b_depth, b_root = tl.where(m_i, o_i, 0), o_i * 0, o_i == 0
    while tl.max(b_node, 0) > 0:
        b_parent = tl.load(p_parents + b_node, mask=b_node > 0, other=-1)
        b_node = tl.where(b_parent < b_node, b_parent, -1)
        b_depth += (b_node >= 0).to(tl.int32)
        b_root |= b_node == 0
    b_depth = tl.where(b_root, b_depth, 0)
    b_parents = tl.load(p_parents + o_j, mask=m_j, other=-1)
    b_draft = tl.load(p_draft + o_j, mask=m_j, other=-1)
    m_child = (b_parents[None, :] == o_i[:, None]) & (o_j[None, :] > o_i[:, None])
    b_first = tl.min(tl.where(m_child, o_j[None, :], BLOCK_N), 1)
    b_token = tl.load(p_target + i_b * q_len + o_i, mask=m_i, other=0)
    b_taken = tl.max((m_child & (b_draft[None, :] == b_token[:, None])).to(tl.int32), 1)
    while tl.max(b_taken, 0) > 0:
        b_token = tl.where(b_taken > 0, (b_token + 1) % vocab_size, b_token)
        b_taken = tl.max((m_child & (b_draft[None, :] == b_token[:, None])).to(tl.int32), 1)
    m_follows = (b_depth < b_length) & (b_first < BLOCK_N)
    b_child = tl.load(p_draft + b_first, mask=m_follows, other=0)
    tl.store(p_out + i_b * q_len + o_i, tl.where(m_follows, b_child, b_token), mask=m_i)


@synthesize_tokens.implementation("triton", why_not=no_gpu, waits=True)
def synthesize_tokens_triton(
    target_tokens: Tensor, draft_tokens: Tensor, tree_parents: Tensor, kv_lens: Tensor, row_keys: Tensor, rates: Tensor,
    vocab_size: int,
) -> Tensor:
    """One launch; a bench must not pay for what a real step does not do."""
    batch, q_len = draft_tokens.shape
    tokens = torch.empty_like(target_tokens, memory_format=torch.contiguous_format)
    wrap_triton(synthesize, waits=True)[((q_len + BLOCK_I - 1) // BLOCK_I, batch)](
        target_tokens.contiguous(), draft_tokens.contiguous(), tree_parents.contiguous(), kv_lens, row_keys, rates, tokens,
        q_len, vocab_size, STREAM=STREAM, DEPTHS=rates.shape[0], BLOCK_I=BLOCK_I, BLOCK_N=power_of_2(q_len),
        WAITS=can_wait(target_tokens),
    )  # fmt: skip
    return tokens


def bench(device: torch.device) -> Iterator[Measurement]:
    """A chain of 7 and random trees of 60."""
    for batch, q_len in ((1, 8), (1, 61), (64, 8)):
        below = torch.arange(1, q_len, device=device)
        parents = below - 1 if q_len == 8 else torch.rand(batch, q_len - 1, device=device) * below
        tree_parents = torch.nn.functional.pad(parents.int().expand(batch, -1), (1, 0), value=-1)
        draft, target = (torch.randint(0, 128256, (batch, q_len), device=device) for _ in range(2))
        keys = torch.arange(batch, device=device)
        args = target, draft, tree_parents, keys.int() + 500, keys, 0.8 ** torch.arange(1.0, 8.0, device=device), 128256

        def mine(args=args) -> Tensor:
            return synthesize_tokens_triton(*args)

        def reference(args=args) -> Tensor:
            return synthesize_tokens.reference(*args)

        yield measure("synthesize_tokens", f"{batch} x {q_len}", mine, reference, batch * q_len * 28)
