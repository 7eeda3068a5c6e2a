"""The target's own choice after every node of a draft: the one place where a token is picked.

T = 0: argmax of the logits. T > 0: argmax(l / T + G), l the processed logits and G the noise of autospec.kernels.noise
(the Gumbel-max trick), so that sampling is a deterministic function of (row key, index, logits).
Processors run in transformers' order: repetition penalty, temperature, top-k, top-p, min-p. They are exact at every
node: a node's history is the request's tokens, its ancestors and itself. A drafter picks its chain with the same op on
its own logits, so a draft model equal to the target agrees with it at every temperature and under every filter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autospec.kernels.filters import BLOCK_V, filter_scores, find_cutoffs, node_depth, ordered, warm_scores
from autospec.kernels.launch import can_wait, gdc_launch_dependents, gdc_wait, jit, no_gpu, power_of_2, rows_of, tl, wrap_triton
from autospec.kernels.noise import block_gumbel, gumbel
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, measure
from autospec.kernels.tree_tables import ancestors


def penalize_repetition(
    logits: Tensor, penalty: Tensor, seen: Tensor, draft_tokens: Tensor, related: Tensor
) -> Tensor:
    """Divide positive and multiply negative logits of tokens in a node's history by the row's penalty.

    logits [B, R, V]; penalty [B]; seen bool [B, V]; draft_tokens [B, N]; related bool [B, R, N]: ancestors and self.
    """
    batch, rows, vocab_size = logits.shape
    on_path = torch.zeros(batch, rows, vocab_size, dtype=torch.int32, device=logits.device)
    on_path = on_path.scatter_add(2, draft_tokens[:, None, :].expand(-1, rows, -1), related.to(torch.int32))
    repeated = seen[:, None, :] | (on_path > 0)
    factor = penalty[:, None, None]
    return torch.where(repeated, torch.where(logits < 0, logits * factor, logits / factor), logits)


@kernel_op()
def choose_tokens(
    logits: Tensor, draft_tokens: Tensor, tree_parents: Tensor, kv_lens: Tensor, row_keys: Tensor, temperature: Tensor,
    top_k: Tensor, top_p: Tensor, min_p: Tensor, repetition_penalty: Tensor, seen: Tensor, first_node: int = 0,
) -> Tensor:
    """Choose the token after each of R consecutive nodes, `first_node` being the first: [B, R] int64.

    logits [B, R, V]; draft_tokens [B, N] int64 and tree_parents [B, N] int32, the whole draft; kv_lens [B] int32, the
    root's slot; row_keys [B] int64; temperature, top_p, min_p, repetition_penalty [B] float32; top_k [B] int32;
    seen bool [B, V]: tokens of the request's history, root included.
    """
    rows = logits.shape[1]
    related = ancestors(tree_parents)[:, first_node : first_node + rows]
    depth = related.sum(-1) - 1
    scores = penalize_repetition(logits.float(), repetition_penalty, seen, draft_tokens, related)
    is_greedy = (temperature == 0.0)[:, None, None]
    divisor = torch.where(temperature == 0.0, 1.0, temperature)[:, None, None]
    warmed = filter_scores(scores / divisor, top_k, top_p, min_p)
    index = kv_lens.long()[:, None] + depth + 1
    noisy = warmed + gumbel(row_keys, index, logits.shape[-1])
    return torch.where(is_greedy, scores, noisy).argmax(-1)


@kernel_op()
def choose_greedy(logits: Tensor) -> Tensor:
    """logits [B, R, V] -> [B, R] int64: choose_tokens at temperature 0 without processors; ties to the lowest id."""
    return logits.float().argmax(-1)


@kernel_op(mutates=("seen",))
def mark_seen(seen: Tensor, emitted: Tensor) -> None:
    """Add emitted [B, E] int64 (-1: none) to the history seen bool [B, V]."""
    batch, vocab_size = seen.shape
    hits = torch.zeros(batch, vocab_size, dtype=torch.int32, device=seen.device)
    hits = hits.scatter_add(1, emitted.clamp(min=0), (emitted >= 0).to(torch.int32))
    seen.copy_(seen | (hits > 0))


# A program serves one row (i_r: request i_b, node i_n) and a block of token ids (o_v). The noise, penalty, temperature
# and filters are recomputed from the logits where they are needed: nothing of size [B, R, V] is ever written.


@jit
def pick_in_blocks(
    p_logits, p_draft, p_parents, p_lens, p_keys, p_temperature, p_min_p, p_penalty, p_seen, p_best, p_floor, p_first,
    p_tops, p_value, p_id, stride_lb, stride_lr, vocab_size, q_len, first_node, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """The best of each block of ids: scores, filters and noise fused; greedy rows skip the last two.

    A block of which the filters keep nothing is not even read.
    """
    i_v, i_r = tl.program_id(0), tl.program_id(1)
    i_b, i_n = i_r // ROWS, first_node + i_r % ROWS
    temperature, penalty = tl.load(p_temperature + i_b), tl.load(p_penalty + i_b)
    p_logits += i_b.to(tl.int64) * stride_lb + (i_r % ROWS) * stride_lr
    p_seen += i_b.to(tl.int64) * vocab_size
    p_draft += i_b * q_len
    p_parents += i_b * q_len
    o_out = i_r * tl.num_programs(0) + i_v
    best, floor = tl.load(p_best + i_r), tl.load(p_floor + i_r).to(tl.uint32, bitcast=True)
    is_filtered = best > -float("inf")
    value = tl.full((), -float("inf"), tl.float32)
    token = i_v * BLOCK_V
    if (not is_filtered) | (ordered(tl.load(p_tops + o_out)) >= floor):
        depth = node_depth(p_parents, i_n)
        o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
        divisor = tl.where(temperature == 0.0, 1.0, temperature)
        b_score = warm_scores(p_logits, p_seen, p_draft, p_parents, o_v, vocab_size, i_n, depth, penalty, divisor)
        if temperature != 0.0:
            if is_filtered:
                b_key = ordered(b_score)
                m_kept = (b_key > floor) | ((b_key == floor) & (o_v >= tl.load(p_first + i_r)))
                m_kept &= tl.exp(b_score - best) >= tl.load(p_min_p + i_b)
                b_score = tl.where(m_kept, b_score, -float("inf"))
            index = tl.load(p_lens + i_b) + depth + 1
            b_noise = block_gumbel(tl.load(p_keys + i_b), index, i_v * (BLOCK_V // 4), BLOCK_V // 4)
            b_score += b_noise
        value = tl.max(b_score, 0)
        token = tl.min(tl.where(b_score == value, o_v, 2147483647), 0)
    tl.store(p_value + o_out, value)
    tl.store(p_id + o_out, token)


@jit
def best_in_blocks(
    p_logits, p_value, p_id, stride_lb, stride_lr, vocab_size, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, WAITS: tl.constexpr
):
    """The best of each block of ids, without processors."""
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_v, i_r = tl.program_id(0), tl.program_id(1)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    p_logits += (i_r // ROWS).to(tl.int64) * stride_lb + (i_r % ROWS) * stride_lr
    b_score = tl.load(p_logits + o_v, mask=o_v < vocab_size, other=-float("inf")).to(tl.float32)
    value = tl.max(b_score, 0)
    o_out = i_r * tl.num_programs(0) + i_v
    tl.store(p_value + o_out, value)
    tl.store(p_id + o_out, tl.min(tl.where(b_score == value, o_v, 2147483647), 0))


@jit
def best_of_blocks(p_value, p_id, p_token, blocks, vocab_size, BLOCK: tl.constexpr, WAITS: tl.constexpr):
    """The lowest id among the best of all blocks; a row of NaN still gives a valid id."""
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_r, o_block = tl.program_id(0), tl.arange(0, BLOCK)
    m_block = o_block < blocks
    b_value = tl.load(p_value + i_r * blocks + o_block, mask=m_block, other=-float("inf"))
    b_id = tl.load(p_id + i_r * blocks + o_block, mask=m_block, other=2147483647)
    token = tl.min(tl.where(b_value == tl.max(b_value, 0), b_id, 2147483647), 0)
    tl.store(p_token + i_r, tl.minimum(token, vocab_size - 1).to(tl.int64))


def block_partials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the best value and id of every block of every row."""
    rows, blocks = logits.shape[0] * logits.shape[1], (logits.shape[2] + BLOCK_V - 1) // BLOCK_V
    return logits.new_empty(rows, blocks, dtype=torch.float32), logits.new_empty(rows, blocks, dtype=torch.int32)


def reduce_blocks(value: Tensor, token: Tensor, logits: Tensor) -> Tensor:
    """Block winners -> [B, R] int64."""
    chosen = logits.new_empty(logits.shape[:2], dtype=torch.int64)
    blocks = value.shape[1]
    wrap_triton(best_of_blocks, waits=True)[(value.shape[0],)](
        value, token, chosen, blocks, logits.shape[2], BLOCK=power_of_2(blocks), WAITS=can_wait(logits), num_warps=1
    )
    return chosen


@choose_tokens.implementation("triton", why_not=no_gpu)
def choose_tokens_triton(
    logits: Tensor, draft_tokens: Tensor, tree_parents: Tensor, kv_lens: Tensor, row_keys: Tensor, temperature: Tensor,
    top_k: Tensor, top_p: Tensor, min_p: Tensor, repetition_penalty: Tensor, seen: Tensor, first_node: int = 0,
) -> Tensor:
    """Cut-offs in four launches (at once where no filter is on), best per block with the noise fused in, best of all.

    Without filters 64 rows of 128256 logits take 55 us and one 13; with top-k 50 and top-p 0.9 244 and 111 (BENCHMARKS.md).
    H100 80GB SXM, triton 3.6, 2026-11-21.
    """
    logits = rows_of(logits)
    batch, rows, vocab_size = logits.shape
    q_len = draft_tokens.shape[1]
    draft_tokens, tree_parents, seen = draft_tokens.contiguous(), tree_parents.contiguous(), seen.contiguous()
    best, floor, first, tops = find_cutoffs(
        logits, draft_tokens, tree_parents, temperature, top_k, top_p, min_p, repetition_penalty, seen, first_node
    )
    value, token = block_partials(logits)
    wrap_triton(pick_in_blocks)[(value.shape[1], batch * rows)](
        logits, draft_tokens, tree_parents, kv_lens, row_keys, temperature, min_p, repetition_penalty, seen,
        best, floor, first, tops, value, token,
        logits.stride(0), logits.stride(1), vocab_size, q_len, first_node, ROWS=rows, BLOCK_V=BLOCK_V,
    )
    return reduce_blocks(value, token, logits)


@choose_greedy.implementation("triton", why_not=no_gpu, waits=True)
def choose_greedy_triton(logits: Tensor) -> Tensor:
    """A two-stage argmax: a row of 128k logits keeps 63 programs busy instead of one."""
    logits = rows_of(logits)
    value, token = block_partials(logits)
    wrap_triton(best_in_blocks, waits=True)[(value.shape[1], value.shape[0])](
        logits, value, token, logits.stride(0), logits.stride(1), logits.shape[2], ROWS=logits.shape[1], BLOCK_V=BLOCK_V,
        WAITS=can_wait(logits),
    )
    return reduce_blocks(value, token, logits)


def bench(device: torch.device) -> Iterator[Measurement]:
    """A vocabulary of 128256, bfloat16 logits; greedy, sampled, and sampled with top-k 50 and top-p 0.9."""
    for batch, rows in ((1, 1), (1, 64), (64, 8)):
        logits = torch.randn(batch, rows, 128256, device=device, dtype=torch.bfloat16) * 3
        case, size = f"{batch} x {rows}, V = 128256", logits.nbytes

        def greedy(logits=logits) -> Tensor:
            return choose_greedy_triton(logits)

        def greedy_reference(logits=logits) -> Tensor:
            return choose_greedy.reference(logits)

        yield measure("choose_greedy", case, greedy, greedy_reference, size)
        below = torch.arange(1, rows, device=device)
        parents = torch.nn.functional.pad((torch.rand(batch, rows - 1, device=device) * below).int(), (1, 0), value=-1)
        one = torch.ones(batch, device=device)
        for name, top_k, top_p in (("sampled", 0, 1.0), ("top-k, top-p", 50, 0.9)):
            if batch * rows > 64:
                continue  # the reference's intermediate tensors take gigabytes
            args = (
                logits, torch.randint(0, 128256, (batch, rows), device=device), parents, one.int() * 500,
                torch.arange(batch, device=device), 0.8 * one, one.int() * top_k, one * top_p, 0 * one, one,
                torch.zeros(batch, 128256, device=device, dtype=torch.bool),
            )

            def sampled(args=args) -> Tensor:
                return choose_tokens_triton(*args)

            def sampled_reference(args=args) -> Tensor:
                return choose_tokens.reference(*args)

            yield measure("choose_tokens", f"{case}, {name}", sampled, sampled_reference, size)
