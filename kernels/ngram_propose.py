"""Propose the continuation of the longest suffix that occurred before (prompt lookup; Saxena, 2023).

The suffix of prompt and emitted tokens, root included, with a length in [2, max_matching_ngram_size] is looked up among
the occurrences that end before the last token; the tokens after the most recent one (or the earliest) are the draft,
and where they run into the end the draft goes on with itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autospec.kernels.launch import jit, no_gpu, power_of_2, rows_of, tl, wrap_triton
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure


@kernel_op()
def ngram_propose(
    tokens: Tensor, kv_lens: Tensor, limits: Tensor, max_draft_len: int, max_matching_ngram_size: int,
    is_use_oldest: bool,
) -> tuple[Tensor, Tensor]:
    """tokens [B, T] int64, of which 0 ... kv_lens are known (the last one is the root); kv_lens, limits [B] int32.

    -> draft_tokens [B, L+1] int64, tree_parents [B, L+1] int32: a chain from the root; all drafts are absent where
    nothing matched, and those at or past `limits` always.
    """
    batch, width = tokens.shape
    slot = torch.arange(width, device=tokens.device)[None, :]
    last = kv_lens.long()[:, None]
    length = torch.zeros(batch, width, dtype=torch.int64, device=tokens.device)
    unbroken = slot < last
    for i in range(max_matching_ngram_size):
        # Does the token i places before `slot` equal the token i places before the last one?
        shifted = torch.nn.functional.pad(tokens, (i, 0))[:, :width]
        wanted = tokens.gather(1, (last - i).clamp(min=0))
        unbroken = unbroken & (slot >= i) & (last >= i) & (shifted == wanted)
        length = length + unbroken
    # One number orders the occurrences: first the length of the match, then the place.
    place = width - 1 - slot if is_use_oldest else slot
    best = (length * width + place).argmax(1, keepdim=True)
    found = length.gather(1, best) >= 2
    step = torch.arange(max_draft_len, device=tokens.device)[None, :]
    period = (last - best).clamp(min=1)
    drafts = tokens.gather(1, (best + 1 + step % period).clamp(max=width - 1))
    draft_tokens = torch.cat([tokens.gather(1, last), drafts], 1)
    present = found & (last + 1 + step < limits.long()[:, None])
    parents = torch.where(present, step, -1)
    root = torch.full((batch, 1), -1, dtype=torch.int64, device=tokens.device)
    return draft_tokens, torch.cat([root, parents], 1).to(torch.int32)


# B requests (i_b), T known tokens (o_t, a block of places where an occurrence may end), L draft tokens (o_l). A program
# scans one request; as in the reference, one number orders the occurrences: length of the match * width + place.
@jit
def find_suffix(
    p_tokens, p_lens, p_limits, p_draft, p_parents, width, stride_tb,
    MAX_DRAFT_LEN: tl.constexpr, NGRAM: tl.constexpr, IS_OLDEST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    p_tokens += i_b * stride_tb
    last, limit = tl.load(p_lens + i_b), tl.load(p_limits + i_b)
    b_best = tl.full((BLOCK_T,), 0, tl.int64) + (width - 1)
    for i_t in range(0, last, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m_run = o_t < last
        b_length = tl.zeros((BLOCK_T,), tl.int64)
        for i in tl.static_range(NGRAM):
            wanted = tl.load(p_tokens + tl.maximum(last - i, 0))
            m_run &= o_t >= i  # so last > i as well
            m_run &= (tl.load(p_tokens + o_t - i, mask=m_run, other=-1) == wanted)
            b_length += m_run.to(tl.int64)
        b_place = width - 1 - o_t if IS_OLDEST else o_t
        b_best = tl.maximum(b_best, tl.where(b_length > 0, b_length * width + b_place, 0))
    best = tl.max(b_best, 0)
    length, place = best // width, best % width
    slot = width - 1 - place if IS_OLDEST else place
    o_l = tl.arange(0, BLOCK_L)
    m_l = o_l < MAX_DRAFT_LEN
    period = tl.maximum(last - slot, 1)
    b_source = tl.minimum(slot + 1 + o_l % period, width - 1)
    b_draft = tl.load(p_tokens + b_source, mask=m_l, other=0)
    m_present = (length >= 2) & (last + 1 + o_l < limit)
    p_draft += i_b * (MAX_DRAFT_LEN + 1)
    p_parents += i_b * (MAX_DRAFT_LEN + 1)
    tl.store(p_draft, tl.load(p_tokens + last))
    tl.store(p_parents, -1)
    tl.store(p_draft + 1 + o_l, b_draft, mask=m_l)
    tl.store(p_parents + 1 + o_l, tl.where(m_present, o_l, -1), mask=m_l)


@ngram_propose.implementation("triton", why_not=no_gpu)
def ngram_propose_triton(
    tokens: Tensor, kv_lens: Tensor, limits: Tensor, max_draft_len: int, max_matching_ngram_size: int,
    is_use_oldest: bool,
) -> tuple[Tensor, Tensor]:
    """One program per request; it reads the known tokens and no more."""
    tokens = rows_of(tokens)
    batch, width = tokens.shape
    draft_tokens = tokens.new_empty(batch, max_draft_len + 1)
    tree_parents = tokens.new_empty(batch, max_draft_len + 1, dtype=torch.int32)
    wrap_triton(find_suffix)[(batch,)](
        tokens, kv_lens, limits, draft_tokens, tree_parents, width, tokens.stride(0),
        MAX_DRAFT_LEN=max_draft_len, NGRAM=max_matching_ngram_size, IS_OLDEST=is_use_oldest,
        BLOCK_T=min(power_of_2(width), 1024), BLOCK_L=power_of_2(max_draft_len),
    )
    return draft_tokens, tree_parents


def bench(device: torch.device) -> Iterator[Measurement]:
    """Texts over 50 tokens, so that suffixes occur before."""
    for batch, length in ((1, 2048), (1, 16384), (64, 2048)):
        tokens = torch.randint(0, 50, (batch, length + 64), device=device)
        kv_lens = torch.full((batch,), length, device=device, dtype=torch.int32)
        args = tokens, kv_lens, kv_lens + 100, 8, 4, False

        def mine(args=args) -> tuple[Tensor, ...]:
            return ngram_propose_triton(*args)

        def reference(args=args) -> tuple[Tensor, ...]:
            return ngram_propose.reference(*args)

        yield measure("ngram_propose", f"{batch} x {length} tokens", mine, reference, batch * length * 8)
