"""Counter-based Gumbel noise: Philox4x32-10 keyed by the row, counted by (index of the chosen token, token id // 4).

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). The noise depends on nothing else, in particular
not on the batch slot, the drafter or the number of draft tokens: that makes sampling drafter-invariant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autospec.kernels.launch import jit, tl

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * x for x in [0, 2^32), without leaving int64's positive range."""
    high, low = constant >> 16, constant & 0xFFFF
    upper, lower = x * high, x * low
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _MASK


def philox(
    key: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """key int64 (64 bits), counter words int64 in [0, 2^32) -> four int64 words in [0, 2^32); everything broadcasts."""
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(rounds):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def gumbel(row_keys: Tensor, index: Tensor, vocab_size: int) -> Tensor:
    """row_keys [B] int64, index [B, N] int64 (of the token being chosen) -> float32 noise [B, N, V].

    G = -log(-log1p(-u)), u = (r + 0.5) 2^-32; u is kept below 1 - 2^-24 because float32 would round it to 1, which
    only touches the lowest noise values.
    """
    words = (vocab_size + 3) // 4
    group = torch.arange(words, device=row_keys.device)
    c0, c1 = torch.broadcast_tensors(index[:, :, None], group[None, None, :])
    zero = torch.zeros_like(c0)
    r = torch.stack(philox(row_keys[:, None, None], c0, c1, zero, zero), dim=-1)
    u = (r.reshape(*index.shape, words * 4)[..., :vocab_size].float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u.clamp(max=1.0 - 2.0**-24)))


def row_key(seed: int, prompt_number: int, sequence_number: int) -> int:
    """A row's 64-bit key as a signed int: SplitMix64 over (seed, number of the prompt, number of the sequence)."""
    state = 0
    for word in (seed, prompt_number, sequence_number):
        state = (state ^ (word & (2**64 - 1))) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state - 2**64 if state >= 2**63 else state


# The same noise inside a kernel: 4 ids share a Philox call, so a block of ids starts at a multiple of 4.
@jit
def block_gumbel(row_key, index, i_group, GROUPS: tl.constexpr):
    """Noise of ids 4 i_group ... 4 (i_group + GROUPS) - 1 for one row: float32 [4 GROUPS]."""
    o_group = (i_group + tl.arange(0, GROUPS)).to(tl.uint32)
    zero = o_group * 0
    r0, r1, r2, r3 = tl.philox(row_key, zero + index.to(tl.uint32), o_group, zero, zero)
    r = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (4 * GROUPS,))
    u = tl.minimum((r.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    # log1p(-u) by Kahan's identity, since log(1 - u) loses the small u; w - 1 is exact.
    w = 1.0 - u
    log1p = tl.where(w == 1.0, -u, tl.div_rn(tl.log(w) * -u, tl.where(w == 1.0, 1.0, w - 1.0)))
    return -tl.log(-log1p)
