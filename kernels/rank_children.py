"""The K best children of every row by the draft, with their conditional log-probabilities.

Greedy: by z = logits / draft temperature. Sampled: by l / draft temperature + G at T > 0, l the logits that
autospec.kernels.choose_tokens processes for the target and G the noise of the same row key, index and target token id,
so that a draft equal to the target ranks the target's own choice first at every temperature and under every filter.
log_probs = log_softmax(z), z = T (l / draft temperature + G) when sampled: what the sampled tree's scores are made of.
They are clamped to <= 0 and NaN becomes -inf: a token that cannot be chosen is filler.

A draft id i stands for the target's token i + d2t[i]: noise, history and results speak of target ids, the filters run
over the draft's vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autospec.kernels.best_of_row import (
    BLOCK_V,
    GROUP,
    PART,
    best_parts,
    block_sizes,
    new_summary,
    store_best,
    store_summary,
    summarize,
)
from autospec.kernels.filters import filter_scores, find_cutoffs, ordered, warm_scores
from autospec.kernels.launch import (
    can_wait,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    multiprocessors,
    no_gpu,
    power_of_2,
    rows_of,
    tl,
    wrap_triton,
)
from autospec.kernels.noise import block_gumbel, gumbel
from autospec.kernels.registry import kernel_op
from autospec.kernels.timing import Measurement, deviation, measure, time_graph


def mapped_ids(draft_vocab: int, d2t: Tensor | None, device: torch.device) -> Tensor:
    """[Vd] int64: the target's id of every draft id."""
    ids = torch.arange(draft_vocab, device=device)
    return ids if d2t is None else ids + d2t


def best_children(ranked: Tensor, z: Tensor, count: int, d2t: Tensor | None) -> tuple[Tensor, Tensor]:
    """The `count` best of ranked [B, R, Vd] as target ids and their log_softmax(z): [B, R, count] each.

    torch.topk promises no order of ties, so it sorts unique int64 keys: the float's order above, the id's below.
    """
    vocab_size = ranked.shape[-1]
    ids = torch.arange(vocab_size, device=ranked.device)
    ranked = torch.where(ranked.isnan(), float("-inf"), torch.where(ranked == 0.0, 0.0, ranked))
    if count == 1:
        best = ranked.argmax(-1, keepdim=True)  # which does promise the lowest id
    else:
        bits = ranked.view(torch.int32)
        above = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
        keys = torch.topk((above << 32) + (vocab_size - 1 - ids), count, dim=-1)[0]
        best = vocab_size - 1 - (keys & 0xFFFFFFFF)
    log_probs = z.gather(2, best) - z.logsumexp(-1, keepdim=True)
    log_probs = torch.where(log_probs.isnan(), float("-inf"), log_probs).clamp(max=0.0)
    return mapped_ids(vocab_size, d2t, ranked.device)[best], log_probs


@kernel_op()
def rank_greedy(
    logits: Tensor, count: int, draft_temperature: float = 1.0, d2t: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits [B, R, Vd], d2t [Vd] int64 offsets -> tokens [B, R, count] int64 (target ids), log_probs float32."""
    z = logits.float() / draft_temperature
    return best_children(z, z, count, d2t)


@kernel_op()
def rank_sampled(
    logits: Tensor, index: Tensor, row_keys: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    repetition_penalty: Tensor, seen: Tensor, path_tokens: Tensor, count: int, draft_temperature: float = 1.0,
    d2t: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """logits [B, R, Vd]; index [B] int64: of the token being chosen, the same for all rows of a level; row_keys [B]
    int64; temperature, top_p, min_p, repetition_penalty [B] float32; top_k [B] int32; seen bool [B, V]: the request's
    history; path_tokens [B, R, A] int64: a row's own token and its drafted ancestors (-1: none); d2t [Vd] int64.

    -> tokens [B, R, count] int64 (target ids), log_probs [B, R, count] float32.
    """
    batch, rows, draft_vocab = logits.shape
    targets = mapped_ids(draft_vocab, d2t, logits.device)
    on_path = torch.zeros(batch, rows, seen.shape[1], dtype=torch.int32, device=logits.device)
    on_path = on_path.scatter_add(2, path_tokens.clamp(min=0), (path_tokens >= 0).to(torch.int32))
    repeated = (seen[:, None, :] | (on_path > 0))[..., targets]
    scores, factor = logits.float(), repetition_penalty[:, None, None]
    scores = torch.where(repeated, torch.where(scores < 0, scores * factor, scores / factor), scores)
    is_greedy = (temperature == 0.0)[:, None, None]
    divisor = torch.where(is_greedy, 1.0, temperature[:, None, None])
    warmed = filter_scores(scores / divisor, top_k, top_p, min_p)
    noise = gumbel(row_keys, index[:, None], seen.shape[1])[..., targets]
    ranked = torch.where(is_greedy, scores / draft_temperature, warmed / draft_temperature + noise)
    return best_children(ranked, ranked * divisor, count, d2t)


@jit
def greedy_scores(p_logits, o_v, stride_lb, stride_lr, i_r, vocab_size, draft_temperature, ROWS: tl.constexpr,
                  DIVIDES: tl.constexpr):  # fmt: skip
    """What ranks ids o_v of a row."""
    p_logits += (i_r // ROWS).to(tl.int64) * stride_lb + (i_r % ROWS) * stride_lr
    b_z = tl.load(p_logits + o_v, mask=o_v < vocab_size, other=-float("inf")).to(tl.float32)
    return tl.div_rn(b_z, tl.cast(draft_temperature, tl.float32)) if DIVIDES else b_z


@jit
def summarize_greedy(
    p_logits, p_part, p_top, p_sum, stride_lb, stride_lr, vocab_size, parts, groups, draft_temperature,
    ROWS: tl.constexpr, DIVIDES: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    WAITS: tl.constexpr,
):
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_v, i_r = tl.program_id(0), tl.program_id(1)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    b_z = greedy_scores(p_logits, o_v, stride_lb, stride_lr, i_r, vocab_size, draft_temperature, ROWS, DIVIDES)
    b_part, b_top, b_sum = summarize(b_z, 1.0, BLOCK_V // GROUP, GROUP, PART)
    store_summary(p_part, p_top, p_sum, b_part, b_top, b_sum, i_v, i_r, parts, groups, BLOCK_V, GROUP, PART)


@jit
def pick_greedy(
    p_logits, p_part, p_top, p_sum, p_d2t, p_tokens, p_log_probs, stride_lb, stride_lr, vocab_size, parts, groups,
    draft_temperature, count, ROWS: tl.constexpr, HAS_MAP: tl.constexpr, DIVIDES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, PART: tl.constexpr, NARROW: tl.constexpr,
    WAITS: tl.constexpr,
):
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()
    i_r = tl.program_id(0)
    b_parts, top, log_total = best_parts(
        p_part + i_r * parts, p_top + i_r * groups, p_sum + i_r * groups, parts, groups, 1.0,
        count, BLOCK_K, BLOCK_P, BLOCK_G, NARROW,
    )
    o_v = b_parts[:, None] * PART + tl.arange(0, PART)[None, :]  # a part is read 16 bytes at a time
    b_z = greedy_scores(p_logits, o_v, stride_lb, stride_lr, i_r, vocab_size, draft_temperature, ROWS, DIVIDES)
    b_z, o_v = tl.reshape(b_z, (BLOCK_K * PART,)), tl.reshape(o_v, (BLOCK_K * PART,))
    store_best(
        b_z, o_v, vocab_size, 1.0, top, log_total, p_d2t, p_tokens + i_r * count, p_log_probs + i_r * count,
        count, BLOCK_K * PART, HAS_MAP, BLOCK_K, NARROW,
    )


@jit
def lay_out_paths(
    p_path, p_seen, p_d2t, p_penalty, p_nodes, p_parents, p_seen_draft, rows, length, nodes, vocab_size, draft_vocab,
    HAS_MAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """The paths as a tree of draft ids, which is how choose_tokens reads a history: row r's step a is node 1 + a R + r.

    Node 0 stands for the root, whose token is in `seen`. With a map, `seen` and paths are turned into draft ids (none:
    the -1 that is there), for rows with a penalty only.
    """
    i_v, i_b = tl.program_id(0), tl.program_id(1)
    p_nodes += i_b * nodes
    p_path += i_b * rows * length
    if i_v == 0:
        o_n = tl.arange(0, BLOCK_N)
        o_step, o_row = (o_n - 1) // rows, (o_n - 1) % rows
        m_n = o_n < nodes
        tl.store(p_parents + i_b * nodes + o_n, tl.where(o_n == 0, -1, tl.maximum(o_n - rows, 0)), mask=m_n)
        if not HAS_MAP:
            b_token = tl.load(p_path + o_row * length + o_step, mask=m_n & (o_n > 0) & (o_step < length), other=-1)
            tl.store(p_nodes + o_n, b_token, mask=m_n)
    if HAS_MAP:
        if tl.load(p_penalty + i_b) != 1.0:
            o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
            m_v = o_v < draft_vocab
            b_id = o_v + tl.load(p_d2t + o_v, mask=m_v, other=0)
            b_seen = tl.load(p_seen + i_b.to(tl.int64) * vocab_size + b_id, mask=m_v, other=0)
            tl.store(p_seen_draft + i_b.to(tl.int64) * draft_vocab + o_v, b_seen, mask=m_v)
            for i_n in range(rows * length):
                token = tl.load(p_path + (i_n % rows) * length + i_n // rows)
                found = tl.max(tl.where(m_v & (b_id == token), o_v, -1), 0)
                if found >= 0:
                    tl.store(p_nodes + 1 + i_n, found.to(tl.int64))


@jit
def noise_of(row_key, index, o_group, p_d2t, vocab_size, HAS_MAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """Noise of the draft ids 4 g ... 4 g + 3 for every g of o_group [BLOCK_V / 4]: float32 [BLOCK_V]."""
    if HAS_MAP:
        # Target ids are scattered: every id makes a call of its own and takes one of its four numbers.
        o_v = tl.reshape(o_group[:, None] * 4 + tl.arange(0, 4)[None, :], (BLOCK_V,))
        b_id = o_v + tl.load(p_d2t + o_v, mask=o_v < vocab_size, other=0).to(tl.int32)
        b_four = block_gumbel(row_key, index, b_id // 4 - tl.arange(0, BLOCK_V), BLOCK_V)
        m_own = (b_id % 4)[:, None] == tl.arange(0, 4)[None, :]
        b_noise = tl.sum(tl.where(m_own, tl.reshape(b_four, (BLOCK_V, 4)), 0.0), 1)
    else:
        b_noise = block_gumbel(row_key, index, o_group - tl.arange(0, BLOCK_V // 4), BLOCK_V // 4)
    return b_noise


@jit
def ranked_scores(
    p_logits, p_seen, p_nodes, p_parents, p_best, p_floor, p_first, o_v, vocab_size, i_n, depth, penalty, divisor, min_p,
    draft_temperature, b_noise,
):
    """What ranks ids o_v of a row: processed, filtered, divided, with the noise added. NaN stays."""
    b_score = warm_scores(p_logits, p_seen, p_nodes, p_parents, o_v, vocab_size, i_n, depth, penalty, divisor)
    best = tl.load(p_best)
    if best > -float("inf"):  # no filter is on otherwise
        floor, first = tl.load(p_floor).to(tl.uint32, bitcast=True), tl.load(p_first)
        b_key = ordered(b_score)
        m_kept = (b_key > floor) | ((b_key == floor) & (o_v >= first))
        m_kept &= tl.exp(b_score - best) >= min_p
        b_score = tl.where(m_kept | (b_score != b_score), b_score, -float("inf"))
    return tl.div_rn(b_score, draft_temperature) + b_noise


@jit
def summarize_sampled(
    p_logits, p_nodes, p_parents, p_index, p_keys, p_temperature, p_min_p, p_penalty, p_seen, p_d2t,
    p_best, p_floor, p_first, p_part, p_top, p_sum, stride_lb, stride_lr, vocab_size, parts, groups, nodes, depth,
    draft_temperature, ROWS: tl.constexpr, ROWS_EACH: tl.constexpr, HAS_MAP: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, PART: tl.constexpr,
):
    i_v, i_part, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    draft_temperature = tl.cast(draft_temperature, tl.float32)
    temperature, penalty, min_p = tl.load(p_temperature + i_b), tl.load(p_penalty + i_b), tl.load(p_min_p + i_b)
    divisor = tl.where(temperature == 0.0, 1.0, temperature)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    p_logits += i_b.to(tl.int64) * stride_lb
    p_seen += i_b.to(tl.int64) * vocab_size
    p_nodes += i_b * nodes
    p_parents += i_b * nodes
    b_noise = tl.zeros((BLOCK_V,), tl.float32)
    if temperature != 0.0:
        o_group = i_v * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)
        b_noise = noise_of(tl.load(p_keys + i_b), tl.load(p_index + i_b), o_group, p_d2t, vocab_size, HAS_MAP, BLOCK_V)
    for i_n in range(i_part * ROWS_EACH, tl.minimum((i_part + 1) * ROWS_EACH, ROWS)):
        i_r = i_b * ROWS + i_n
        b_ranked = ranked_scores(
            p_logits + i_n * stride_lr, p_seen, p_nodes, p_parents, p_best + i_r, p_floor + i_r, p_first + i_r,
            o_v, vocab_size, nodes - ROWS + i_n, depth, penalty, divisor, min_p, draft_temperature, b_noise,
        )
        b_part, b_top, b_sum = summarize(b_ranked, divisor, BLOCK_V // GROUP, GROUP, PART)
        store_summary(p_part, p_top, p_sum, b_part, b_top, b_sum, i_v, i_r, parts, groups, BLOCK_V, GROUP, PART)


@jit
def pick_sampled(
    p_logits, p_nodes, p_parents, p_index, p_keys, p_temperature, p_min_p, p_penalty, p_seen, p_d2t,
    p_best, p_floor, p_first, p_part, p_top, p_sum, p_tokens, p_log_probs,
    stride_lb, stride_lr, vocab_size, parts, groups, nodes, depth, draft_temperature, count,
    ROWS: tl.constexpr, HAS_MAP: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, PART: tl.constexpr,
):
    i_r = tl.program_id(0)
    i_b, i_n = i_r // ROWS, i_r % ROWS
    draft_temperature = tl.cast(draft_temperature, tl.float32)
    temperature, penalty, min_p = tl.load(p_temperature + i_b), tl.load(p_penalty + i_b), tl.load(p_min_p + i_b)
    divisor = tl.where(temperature == 0.0, 1.0, temperature)
    b_parts, top, log_total = best_parts(
        p_part + i_r * parts, p_top + i_r * groups, p_sum + i_r * groups, parts, groups, divisor,
        count, BLOCK_K, BLOCK_P, BLOCK_G, False,
    )
    o_v = tl.reshape(b_parts[:, None] * PART + tl.arange(0, PART)[None, :], (BLOCK_K * PART,))
    b_noise = tl.zeros((BLOCK_K * PART,), tl.float32)
    if temperature != 0.0:
        o_four = b_parts[:, None] * (PART // 4) + tl.arange(0, PART // 4)[None, :]
        b_noise = noise_of(
            tl.load(p_keys + i_b), tl.load(p_index + i_b), tl.reshape(o_four, (BLOCK_K * PART // 4,)), p_d2t,
            vocab_size, HAS_MAP, BLOCK_K * PART,
        )
    b_ranked = ranked_scores(
        p_logits + i_b.to(tl.int64) * stride_lb + i_n * stride_lr, p_seen + i_b.to(tl.int64) * vocab_size,
        p_nodes + i_b * nodes, p_parents + i_b * nodes, p_best + i_r, p_floor + i_r, p_first + i_r,
        o_v, vocab_size, nodes - ROWS + i_n, depth, penalty, divisor, min_p, draft_temperature, b_noise,
    )
    store_best(
        b_ranked, o_v, vocab_size, divisor, top, log_total, p_d2t,
        p_tokens + i_r * count, p_log_probs + i_r * count, count, BLOCK_K * PART, HAS_MAP, BLOCK_K, False,
    )


@rank_greedy.implementation("triton", why_not=no_gpu, waits=True)
def rank_greedy_triton(
    logits: Tensor, count: int, draft_temperature: float = 1.0, d2t: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Two launches: a summary of every group of ids, then the best of the best parts.

    The 10 best of 32000 ids in bfloat16, us, and with keys of 64 bits one round after the other: 10 rows 6.0 (13.4; before
    places of equal keys were compared), 640 rows 29.6 (47.8); of 128256 ids, 10 rows: 10.8 (14.1). H100 80GB SXM, triton 3.6,
    2026-11-21.
    """
    logits = rows_of(logits)
    batch, rows, vocab_size = logits.shape
    assert count <= vocab_size, f"{count} children out of a vocabulary of {vocab_size}"
    part, top, total = new_summary(logits)
    tokens = logits.new_empty(batch, rows, count, dtype=torch.int64)
    log_probs = logits.new_empty(batch, rows, count, dtype=torch.float32)
    shape = logits.stride(0), logits.stride(1), vocab_size, part.shape[1], top.shape[1], draft_temperature
    divides, waits = draft_temperature != 1.0, can_wait(logits)
    wrap_triton(summarize_greedy, waits=True)[((vocab_size + BLOCK_V - 1) // BLOCK_V, batch * rows)](
        logits, part, top, total, *shape,
        ROWS=rows, DIVIDES=divides, BLOCK_V=BLOCK_V, GROUP=GROUP, PART=PART, WAITS=waits,
    )
    wrap_triton(pick_greedy, waits=True)[(batch * rows,)](
        logits, part, top, total, d2t, tokens, log_probs, *shape, count,
        ROWS=rows, HAS_MAP=d2t is not None, DIVIDES=divides, WAITS=waits,
        NARROW=logits.dtype == torch.bfloat16 and not divides and vocab_size <= 65536,
        **block_sizes(vocab_size, count, 0),
    )
    return tokens, log_probs


@rank_sampled.implementation("triton", why_not=no_gpu)
def rank_sampled_triton(
    logits: Tensor, index: Tensor, row_keys: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    repetition_penalty: Tensor, seen: Tensor, path_tokens: Tensor, count: int, draft_temperature: float = 1.0,
    d2t: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The paths laid out, cut-offs in four launches (at once where no filter is on), then as greedy, noise fused in.

    The 10 best of 128256 ids, 10 rows: 34 us without filters, 161 with top-k 50 and top-p 0.9, 184 with a penalty as well; 640
    rows without filters took 270 before the search was split into launches. H100 80GB SXM, triton 3.6, 2026-11-21.
    """
    logits = rows_of(logits)
    batch, rows, vocab_size = logits.shape
    assert count <= vocab_size, f"{count} children out of a vocabulary of {vocab_size}"
    has_map, depth = d2t is not None, max(path_tokens.shape[2], 1)
    nodes = 1 + depth * rows
    paths = torch.full((batch, nodes), -1, dtype=torch.int64, device=logits.device)
    parents = logits.new_empty(batch, nodes, dtype=torch.int32)
    history = seen.new_empty(batch, vocab_size) if has_map else seen[:, :vocab_size].contiguous()
    wrap_triton(lay_out_paths)[((vocab_size + BLOCK_V - 1) // BLOCK_V if has_map else 1, batch)](
        path_tokens.contiguous(), seen.contiguous(), d2t, repetition_penalty, paths, parents, history,
        rows, path_tokens.shape[2], nodes, seen.shape[1], vocab_size,
        HAS_MAP=has_map, BLOCK_N=power_of_2(nodes), BLOCK_V=BLOCK_V,
    )
    part, top, total = new_summary(logits)
    best, floor, first, _ = find_cutoffs(
        logits, paths, parents, temperature, top_k, top_p, min_p, repetition_penalty, history, nodes - rows
    )
    tokens = logits.new_empty(batch, rows, count, dtype=torch.int64)
    log_probs = logits.new_empty(batch, rows, count, dtype=torch.float32)
    blocks = (vocab_size + BLOCK_V - 1) // BLOCK_V
    # Rows that share a program share their noise; but every multiprocessor shall have work.
    each = min(rows, max(1, batch * rows * blocks // (8 * multiprocessors(logits))))
    shape = logits.stride(0), logits.stride(1), vocab_size, part.shape[1], top.shape[1], nodes, depth, draft_temperature
    wrap_triton(summarize_sampled)[(blocks, (rows + each - 1) // each, batch)](
        logits, paths, parents, index, row_keys, temperature, min_p, repetition_penalty, history, d2t,
        best, floor, first, part, top, total, *shape,
        ROWS=rows, ROWS_EACH=each, HAS_MAP=has_map, BLOCK_V=BLOCK_V, GROUP=GROUP, PART=PART,
    )
    wrap_triton(pick_sampled)[(batch * rows,)](
        logits, paths, parents, index, row_keys, temperature, min_p, repetition_penalty, history, d2t,
        best, floor, first, part, top, total, tokens, log_probs, *shape, count,
        ROWS=rows, HAS_MAP=has_map, **block_sizes(vocab_size, count, 4 if has_map else 1),
    )
    return tokens, log_probs


def bench(device: torch.device) -> Iterator[Measurement]:
    """The ten best of 128256 ids and of 32000 mapped ones, bfloat16; the reference holds [B, R, V] many times over."""
    vocab_size = 128256
    for batch, rows, draft_vocab in ((1, 1, vocab_size), (1, 10, vocab_size), (64, 10, vocab_size), (64, 10, 32000)):
        logits = torch.randn(batch, rows, draft_vocab, device=device) * 3 + torch.rand(draft_vocab, device=device)
        logits, case = logits.bfloat16(), f"{batch} x {rows}, V = {draft_vocab}"
        ids = torch.randperm(vocab_size, device=device)[:draft_vocab].sort()[0]
        d2t = ids - torch.arange(draft_vocab, device=device) if draft_vocab < vocab_size else None

        def greedy(logits=logits, d2t=d2t) -> Tensor:
            return rank_greedy_triton(logits, 10, 1.0, d2t)[1]

        def greedy_reference(logits=logits, d2t=d2t) -> Tensor:
            return rank_greedy.reference(logits, 10, 1.0, d2t)[1]

        yield measure("rank_greedy", case, greedy, greedy_reference, logits.nbytes)
        one = torch.ones(batch, device=device)
        for name, top_k, top_p, penalty in (("sampled", 0, 1.0, 1.0), ("top-k, top-p, penalty", 50, 0.9, 1.1)):
            if batch * rows > 64 and name != "sampled":
                continue  # the reference sorts 82 million scores, so it is not timed either
            args = (
                logits, one.long() * 500, torch.arange(batch, device=device), 0.8 * one, one.int() * top_k, one * top_p,
                0 * one, penalty * one, torch.zeros(batch, vocab_size, device=device, dtype=torch.bool),
                torch.randint(0, vocab_size, (batch, rows, 4), device=device), 10, 1.0, d2t,
            )

            def sampled(args=args) -> Tensor:
                return rank_sampled_triton(*args)[1]

            def sampled_reference(args=args) -> Tensor:
                return rank_sampled.reference(*args)[1]

            name = f"{case}, {name}"
            if batch * rows <= 64:
                yield measure("rank_sampled", name, sampled, sampled_reference, logits.nbytes)
            else:
                error = deviation(sampled(), sampled_reference())
                yield Measurement("rank_sampled", name, time_graph(sampled), None, logits.nbytes, error)
