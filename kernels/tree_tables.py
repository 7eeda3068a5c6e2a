"""Masks, depths and positions of a draft, derived from `tree_parents` and from nothing else.

tree_parents [B, N] int32: parents[0] == -1, a parent's index is below its children's; a later node whose parent is
-1 is absent, and so are its descendants: it sees only itself and has depth 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autospec.kernels.launch import can_wait, gdc_launch_dependents, gdc_wait, jit, no_gpu, power_of_2, tl, wrap_triton
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure


def ancestors(tree_parents: Tensor) -> Tensor:
    """tree_parents [B, N] -> bool [B, N, N]: node j is an ancestor of node i or i itself (absent: itself)."""
    batch, q_len = tree_parents.shape
    node = torch.arange(q_len, device=tree_parents.device)
    parents = tree_parents.long()
    # Jumps of 1, 2, 4, ... nodes: the root and absent nodes jump to themselves, so that a walk ends there.
    jump = torch.where((parents >= 0) & (parents < node[None, :]), parents, node[None, :])
    own = (node[:, None] == node[None, :])[None].expand(batch, -1, -1)
    seen = own
    for _ in range((q_len - 1).bit_length()):
        seen = seen | seen.gather(1, jump[:, :, None].expand(-1, -1, q_len))
        jump = jump.gather(1, jump)
    return torch.where(seen[:, :, :1], seen, own)  # who does not reach the root is absent


@kernel_op()
def tree_tables(tree_parents: Tensor) -> tuple[Tensor, Tensor]:
    """tree_parents [B, N] int32 -> tree_mask [B, N, ceil(N/32)] int32 (bit j of word j//32), depth [B, N] int32."""
    batch, q_len = tree_parents.shape
    visible = ancestors(tree_parents)
    words = (q_len + 31) // 32
    bits = torch.nn.functional.pad(visible.long(), (0, words * 32 - q_len)).reshape(batch, q_len, words, 32)
    packed = (bits << torch.arange(32, device=tree_parents.device)).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed)  # bit 31 is int32's sign
    return packed.to(torch.int32), (visible.sum(-1) - 1).to(torch.int32)


@kernel_op()
def present_nodes(tree_parents: Tensor, finished: Tensor) -> Tensor:
    """tree_parents [B, N] int32, finished [B] bool -> [B, N] bool: nodes that hang from the root of a live request."""
    return ancestors(tree_parents)[:, :, 0] & ~finished[:, None]


@kernel_op()
def present_rows(q_lens: Tensor, q_len: int) -> Tensor:
    """q_lens [B] int32 -> [B, q_len] bool: the valid rows of every request."""
    return torch.arange(q_len, device=q_lens.device)[None, :] < q_lens[:, None]


# B requests (i_b), N nodes (o_n), W words of a mask row (o_w). Every node of a block walks to the root at once: as many
# dependent loads as the tree is deep, where the reference makes N steps.
@jit
def walk_to_root(
    p_parents, p_mask, p_depth, q_len, WORDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, WAITS: tl.constexpr
):
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_n, i_b = tl.program_id(0), tl.program_id(1)
    o_n, o_w = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_W)
    m_n = o_n < q_len
    p_parents += i_b * q_len
    b_self = tl.where((o_n // 32)[:, None] == o_w[None, :], (1 << (o_n % 32))[:, None], 0)
    b_words, b_depth, b_root = b_self, o_n * 0, o_n == 0
    b_node = tl.where(m_n, o_n, 0)
    while tl.max(b_node, 0) > 0:
        b_parent = tl.load(p_parents + b_node, mask=b_node > 0, other=-1)
        b_node = tl.where(b_parent < b_node, b_parent, -1)
        m_step = b_node >= 0
        b_bit = tl.where((b_node // 32)[:, None] == o_w[None, :], (1 << (b_node & 31))[:, None], 0)
        b_words |= tl.where(m_step[:, None], b_bit, 0)
        b_depth += m_step.to(tl.int32)
        b_root |= b_node == 0
    b_words = tl.where(b_root[:, None], b_words, b_self)
    p_row = p_mask + (i_b * q_len + o_n)[:, None] * WORDS + o_w[None, :]
    tl.store(p_row, b_words, mask=m_n[:, None] & (o_w < WORDS)[None, :])
    tl.store(p_depth + i_b * q_len + o_n, tl.where(b_root, b_depth, 0), mask=m_n)


@tree_tables.implementation("triton", why_not=no_gpu, waits=True)
def tree_tables_triton(tree_parents: Tensor) -> tuple[Tensor, Tensor]:
    """One launch for all nodes."""
    batch, q_len = tree_parents.shape
    words = (q_len + 31) // 32
    tree_mask = tree_parents.new_empty(batch, q_len, words, dtype=torch.int32)
    depth = tree_parents.new_empty(batch, q_len, dtype=torch.int32)
    block_n = min(power_of_2(q_len), 64)
    wrap_triton(walk_to_root, waits=True)[((q_len + block_n - 1) // block_n, batch)](
        tree_parents.contiguous(), tree_mask, depth, q_len, WORDS=words, BLOCK_N=block_n, BLOCK_W=power_of_2(words),
        WAITS=can_wait(tree_parents),
    )
    return tree_mask, depth


@kernel_op()
def node_positions(kv_lens: Tensor, q_len: int, max_position: int, depth: Tensor | None = None) -> Tensor:
    """kv_lens [B] int32, depth [B, N] int32 (None: a chain) -> positions [B, N] int64, clamped below max_position."""
    if depth is None:
        offset = torch.arange(q_len, device=kv_lens.device)[None, :]
    else:
        offset = depth.long()
    return (kv_lens.long()[:, None] + offset).clamp(0, max_position - 1)


def bench(device: torch.device) -> Iterator[Measurement]:
    """Random trees; the reference makes one step per node."""
    for batch, q_len in ((1, 64), (64, 8), (16, 64)):
        below = torch.arange(1, q_len, device=device)
        parents = (torch.rand(batch, q_len - 1, device=device) * below).int()
        tree_parents = torch.nn.functional.pad(parents, (1, 0), value=-1)

        def mine(tree_parents=tree_parents) -> tuple[Tensor, ...]:
            return tree_tables_triton(tree_parents)

        def reference(tree_parents=tree_parents) -> tuple[Tensor, ...]:
            return tree_tables.reference(tree_parents)

        moved = batch * q_len * (8 + (q_len + 31) // 32 * 4)
        yield measure("tree_tables", f"{batch} x {q_len}", mine, reference, moved)
