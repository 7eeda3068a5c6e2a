"""Follow the target's own choices through a draft: the one acceptance rule, for chains and trees, greedy and sampled.

At a node, step to the child that carries the node's target token; stop where no child does. The token chosen there is
the bonus token. If two children carry it, the lower index is followed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autospec.kernels.launch import can_wait, gdc_launch_dependents, gdc_wait, jit, no_gpu, power_of_2, tl, wrap_triton
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure


@kernel_op()
def accept_tree(
    target_tokens: Tensor, draft_tokens: Tensor, tree_parents: Tensor, max_draft_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """target_tokens, draft_tokens [B, N] int64; tree_parents [B, N] int32.

    -> accept_length [B] int32 (root and bonus excluded), accept_path [B, max_draft_len + 1] int32 (node indices, root
    first, -1 padded), bonus_token [B] int64.
    """
    batch, q_len = draft_tokens.shape
    node = torch.arange(q_len, device=draft_tokens.device)[None, :]
    current = torch.zeros(batch, 1, dtype=torch.int64, device=draft_tokens.device)
    alive = torch.ones(batch, 1, dtype=torch.bool, device=draft_tokens.device)
    path = [current]
    length = torch.zeros(batch, 1, dtype=torch.int64, device=draft_tokens.device)
    for _ in range(max_draft_len):
        wanted = target_tokens.gather(1, current)
        matches = (tree_parents == current) & (draft_tokens == wanted) & (node > current) & alive
        child = torch.where(matches, node, q_len).amin(1, keepdim=True)
        alive = child < q_len
        current = torch.where(alive, child, current)
        length = length + alive
        path.append(torch.where(alive, child, -1))
    return length[:, 0].to(torch.int32), torch.cat(path, 1).to(torch.int32), target_tokens.gather(1, current)[:, 0]


# B requests (i_b), N nodes (o_n). One program follows one request; the nodes stay in registers.
@jit
def follow_target(
    p_target, p_draft, p_parents, p_length, p_path, p_bonus, q_len, MAX_DRAFT_LEN: tl.constexpr, BLOCK_N: tl.constexpr,
    WAITS: tl.constexpr,
):
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_b = tl.program_id(0)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < q_len
    b_draft = tl.load(p_draft + i_b * q_len + o_n, mask=m_n, other=0)
    b_parents = tl.load(p_parents + i_b * q_len + o_n, mask=m_n, other=-1)
    p_path += i_b * (MAX_DRAFT_LEN + 1)
    current = i_b * 0
    length = i_b * 0
    is_alive = current == 0
    wanted = tl.load(p_target + i_b * q_len)
    tl.store(p_path, current)
    for i_step in range(MAX_DRAFT_LEN):
        m_child = m_n & (b_parents == current) & (b_draft == wanted) & (o_n > current) & is_alive
        child = tl.min(tl.where(m_child, o_n, BLOCK_N), 0)
        is_alive = child < BLOCK_N
        current = tl.where(is_alive, child, current)
        length += is_alive.to(tl.int32)
        wanted = tl.load(p_target + i_b * q_len + current)
        tl.store(p_path + i_step + 1, tl.where(is_alive, child, -1))
    tl.store(p_length + i_b, length)
    tl.store(p_bonus + i_b, wanted)


@accept_tree.implementation("triton", why_not=no_gpu, waits=True)
def accept_tree_triton(
    target_tokens: Tensor, draft_tokens: Tensor, tree_parents: Tensor, max_draft_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch instead of about six small kernels per level."""
    batch, q_len = draft_tokens.shape
    accept_length = tree_parents.new_empty(batch, dtype=torch.int32)
    accept_path = tree_parents.new_empty(batch, max_draft_len + 1, dtype=torch.int32)
    bonus_token = target_tokens.new_empty(batch)
    wrap_triton(follow_target, waits=True)[(batch,)](
        target_tokens.contiguous(), draft_tokens.contiguous(), tree_parents.contiguous(),
        accept_length, accept_path, bonus_token, q_len,
        MAX_DRAFT_LEN=max_draft_len, BLOCK_N=power_of_2(q_len), WAITS=can_wait(target_tokens), num_warps=1 if q_len <= 64 else 4,
    )
    return accept_length, accept_path, bonus_token


def bench(device: torch.device) -> Iterator[Measurement]:
    """Random trees over two tokens, so that paths are accepted."""
    for batch, q_len, depth in ((1, 64, 8), (64, 8, 7)):
        below = torch.arange(1, q_len, device=device)
        parents = (torch.rand(batch, q_len - 1, device=device) * below).int()
        tree_parents = torch.nn.functional.pad(parents, (1, 0), value=-1)
        draft, target = (torch.randint(0, 2, (batch, q_len), device=device) for _ in range(2))
        args = target, draft, tree_parents, depth

        def mine(args=args) -> tuple[Tensor, ...]:
            return accept_tree_triton(*args)

        def reference(args=args) -> tuple[Tensor, ...]:
            return accept_tree.reference(*args)

        yield measure("accept_tree", f"{batch} x {q_len}, depth {depth}", mine, reference, batch * q_len * 20)
