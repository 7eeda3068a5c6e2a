"""The laws of speculative decoding as functions of a workshop: each returns in silence or raises AssertionError.

Tests call them with random arguments on sound programs; tests/laws/test_planted_bugs.py calls the same functions on
programs with a deliberate bug and expects them to raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autospec.runtime.request import Request, SamplingParams
from autospec.runtime.session import Session
from harness.models import GREEDY, hf_cache, oracle
from harness.programs import L, MixedDraft, Workshop, prompts_of, requests_of, run

CLOSE = 2e-5  # float32, entries of order 1 to 10; measured 4.3e-6 at most
WARM = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2)
PROMPTS = ((3, 17, 9, 33), 1)  # lengths and seed: ragged, one longer than two chunks of prefill


def _prompts() -> list[list[int]]:
    return prompts_of(PROMPTS[1], PROMPTS[0])


def _oracles(
    prompts: Sequence[list[int]], counts: Any, sampling: SamplingParams, target: str = "target"
) -> list[list[int]]:
    many = [counts] * len(prompts) if isinstance(counts, int) else counts
    return [
        oracle(target, prompt, count, sampling, 1000 + row)
        for row, (prompt, count) in enumerate(zip(prompts, many, strict=True))
    ]


def same_tokens(requests: Sequence[Request], expected: Sequence[list[int]]) -> None:
    for row, (request, wanted) in enumerate(zip(requests, expected, strict=True)):
        assert request.output == wanted, f"row {row}: {request.output} instead of {wanted}"


def at_rest(session: Session, requests: Sequence[Request]) -> None:
    """The state after a call is that of the emitted tokens: history, lengths, end marks, and nothing past the stop."""
    for row, request in enumerate(requests):
        ids = request.prompt + request.output
        state = session.state
        assert bool(state["finished"][row]), f"row {row} is not marked as finished"
        assert int(state["kv_lens"][row]) == len(ids) - 1, (
            f"row {row}: kv_lens {int(state['kv_lens'][row])}, {len(ids)} tokens"
        )
        assert state["tokens"][row, : len(ids)].tolist() == ids, f"row {row}: the history is not what was emitted"
        assert not state["tokens"][row, len(ids) :].any(), f"row {row}: the history goes on after the stop"
        if "seen" in state:
            seen = set(state["seen"][row].nonzero()[:, 0].tolist())
            assert seen == set(ids), f"row {row}: the processors' history is not what was emitted"


def cache_is_fresh(
    session: Session, row: int, ids: list[int], target: str = "target", draft: str | None = None
) -> None:
    """Committed K/V and index keys of target (and draft) equal what transformers computes for these tokens in one go.

    ids: prompt and output; the last one is the root, which only the draft's cache holds.
    """
    pairs, index_keys = hf_cache(target, ids)
    layers = [(pair, len(ids) - 1) for pair in pairs]
    keys = [(layer, key, len(ids) - 1) for layer, key in enumerate(index_keys)]
    if draft is not None:
        pairs, index_keys = hf_cache(draft, ids)
        keys += [(layer, key, len(ids)) for layer, key in enumerate(index_keys, start=len(layers))]
        layers += [(pair, len(ids)) for pair in pairs]
    for layer, key, length in keys:
        error = float((session.committed_index_keys(row, layer, length) - key[:length]).abs().max()) if length else 0.0
        assert error < CLOSE, f"index keys {layer}, row {row} are off by {error:.1e}"
    for layer, (pair, length) in enumerate(layers):
        got = committed(session, row, layer, length, pair)
        for letter, mine, wanted in zip("KV", got, pair, strict=True) if got else ():
            error = float((mine - wanted[:length]).abs().max()) if length else 0.0
            assert error < CLOSE, f"{letter} of layer {layer}, row {row} is off by {error:.1e}"


def committed(
    session: Session, row: int, layer: int, length: int, like: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """What a layer keeps, in the parts of `like` [S, H, *] each; None: transformers (5.17) kept the keys of all heads."""
    if f"latent_pages.{layer}" not in session.state:
        return session.committed_kv(row, layer, length)
    if like[0].shape[1] > 1:
        return None
    latent, k_rope = session.committed_latent(row, layer, length).split([one.shape[-1] for one in like], -1)
    return latent[:, None], k_rope[:, None]


def lossless_for_any_draft(
    workshop: Workshop, accepts: Sequence[int] = (0, 4, 1, 2, 4, 3), presents: Sequence[int] = (4, 4, 3, 4, 0, 2, 4),
    sampling: SamplingParams = GREEDY, target: str = "target", new_tokens: int = 30,
    prompts: Sequence[list[int]] | None = None, draft_len: int = L,
) -> None:  # fmt: skip
    """Drafts mixed from the true continuation and noise, absent nodes, rows without a draft: tokens as the oracle's."""
    prompts = prompts if prompts is not None else _prompts()
    expected = _oracles(prompts, new_tokens, sampling, target)
    draft = MixedDraft(
        [p + e for p, e in zip(prompts, expected, strict=True)],
        accept=lambda row, step: accepts[(step + 2 * row) % len(accepts)],
        present=lambda row, step: presents[(step + 3 * row) % len(presents)],
    )
    drafter = "ngram" if draft_len else "plain"
    session = workshop.session(drafter, target=target, sampling=sampling.needs_scores, draft_len=draft_len)
    requests = requests_of(prompts, new_tokens, sampling)
    run(session, requests, script=draft)
    same_tokens(requests, expected)
    at_rest(session, requests)
    for row, request in enumerate(requests):
        cache_is_fresh(session, row, request.prompt + request.output, target)


def accepts_exactly_what_is_right(
    workshop: Workshop, accepts: Sequence[int] = (0, 4, 1, 2, 4, 3), presents: Sequence[int] = (4, 4, 3, 4, 0, 2, 4),
    sampling: SamplingParams = GREEDY, new_tokens: int = 30,
) -> None:  # fmt: skip
    """Acceptance per depth of a drafter whose right tokens are known, exactly."""
    prompts = _prompts()
    expected = _oracles(prompts, new_tokens, sampling)
    # One token more, so that the future knows the draft nodes that stand on the limit.
    futures = [p + e for p, e in zip(prompts, _oracles(prompts, new_tokens + L, sampling), strict=True)]
    draft = MixedDraft(
        futures,
        accept=lambda row, step: accepts[(step + 2 * row) % len(accepts)],
        present=lambda row, step: presents[(step + 3 * row) % len(presents)],
    )
    live: list[list[bool]] = []
    session = workshop.session("ngram", sampling=sampling.needs_scores)
    requests = requests_of(prompts, new_tokens, sampling)

    def script(state: dict[str, Tensor]) -> None:
        live.append((~state["finished"]).tolist())
        draft(state)

    metrics = run(session, requests, script=script)
    same_tokens(requests, expected)
    counted = [
        right
        for flags, rights in zip(live, draft.log, strict=True)
        for flag, right in zip(flags, rights, strict=False)
        if flag
    ]
    reached = [sum(right > depth for right in counted) for depth in range(L)]
    assert metrics.row_steps == len(counted), f"{metrics.row_steps} row steps were counted, there were {len(counted)}"
    assert metrics.reached == reached, f"accepted per depth {metrics.reached}, expected {reached}"


def twin_is_accepted_completely(workshop: Workshop, sampling: SamplingParams = GREEDY, new_tokens: int = 24) -> None:
    """A draft equal to the target: every present draft token is accepted, whatever the temperature and the filters."""
    prompts = _prompts()
    session = workshop.session("twin", sampling=sampling.needs_scores)
    requests = requests_of(prompts, new_tokens, sampling)
    metrics = run(session, requests)
    reached, steps = [0] * L, 0
    left = new_tokens - 1  # prefill emits one
    while left > 0:
        accepted = min(L, left)  # nodes at or past the limit are absent
        reached = [count + (depth < accepted) * len(prompts) for depth, count in enumerate(reached)]
        left -= min(L + 1, left)
        steps += 1
    assert metrics.reached == reached, f"accepted per depth {metrics.reached}, expected {reached}"
    assert sum(metrics.steps.values()) == steps
    same_tokens(requests, _oracles(prompts, new_tokens, sampling))


def draft_cache_survives_every_accept_count(
    workshop: Workshop, accept: int, sampling: SamplingParams = GREEDY, new_tokens: int = 30, drafter: str = "twin"
) -> None:
    """The drafter's tokens up to depth `accept`, noise behind: both caches stay those of a fresh run."""
    prompts = _prompts()
    expected = _oracles(prompts, new_tokens + L, sampling)
    futures = [p + e for p, e in zip(prompts, expected, strict=True)]
    name = "target" if drafter == "twin" else drafter
    draft = MixedDraft(futures, accept=lambda row, step: accept, keep=True)
    session = workshop.session(drafter, sampling=sampling.needs_scores)
    requests = requests_of(prompts, new_tokens, sampling)
    boundaries = 0

    def watch(state: dict[str, Tensor]) -> None:
        nonlocal boundaries
        boundaries += 1
        if boundaries in (1, 2, 5):
            for row in range(len(prompts)):
                length = int(state["kv_lens"][row])
                cache_is_fresh(session, row, futures[row][: length + 1], draft=name)

    run(session, requests, script=draft if drafter == "twin" else None, watch=watch)
    same_tokens(requests, [e[:new_tokens] for e in expected])
    for row, request in enumerate(requests):
        cache_is_fresh(session, row, request.prompt + request.output, draft=name)


def wide_equals_narrow(workshop: Workshop, sampling: SamplingParams = GREEDY, new_tokens: int = 21) -> None:
    """N tokens in one call are N calls of one token: same tokens, same committed rows."""
    prompts = _prompts()
    expected = _oracles(prompts, new_tokens + 8, sampling)
    futures = [p + e for p, e in zip(prompts, expected, strict=True)]
    rows: list[list[tuple[Tensor, Tensor]]] = []
    for width in (0, 1, 3, 8):
        session = workshop.session("ngram" if width else "plain", sampling=sampling.needs_scores, draft_len=width or L)
        requests = requests_of(prompts, new_tokens, sampling)
        run(session, requests, script=MixedDraft(futures, accept=lambda row, step: 8))
        same_tokens(requests, [e[:new_tokens] for e in expected])
        rows.append([session.committed_kv(row, 1, len(p) + new_tokens - 1) for row, p in enumerate(prompts)])
    for other in rows[1:]:
        for mine, first in zip(other, rows[0], strict=True):
            torch.testing.assert_close(mine, first, rtol=0, atol=CLOSE)


def padding_is_invisible(workshop: Workshop, sampling: SamplingParams = GREEDY, new_tokens: int = 16) -> None:
    """A row alone, in a bucket with idle rows, and among others in any order: the same tokens."""
    prompts = _prompts()
    expected = _oracles(prompts, new_tokens, sampling)
    for rows, batch in (([0], 1), ([0, 3], 4), ([3, 1, 0, 2], 4), ([2, 3, 1], 4)):
        session = workshop.session("ngram", sampling=sampling.needs_scores, batch=batch)
        requests = requests_of([prompts[row] for row in rows], new_tokens, sampling, [1000 + row for row in rows])
        run(session, requests)
        same_tokens(requests, [expected[row] for row in rows])
        for slot, request in enumerate(requests):
            cache_is_fresh(session, slot, request.prompt + request.output)


def pages_are_a_permutation(
    workshop: Workshop, seed: int = 3, sampling: SamplingParams = GREEDY, new_tokens: int = 24
) -> None:
    """Physical pages may lie anywhere: same tokens, same committed rows. The session is used again afterwards."""
    prompts = _prompts()
    expected = _oracles(prompts, new_tokens + L, sampling)
    session = workshop.session("twin", sampling=sampling.needs_scores)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(session.program.shape.num_pages - 1, generator=generator).to(torch.int32) + 1
    load = session._load

    def load_and_shuffle(*args: Any) -> None:
        load(*args)
        table = session.state["page_table"]
        table.copy_(torch.where(table > 0, order[(table - 1).clamp(min=0).long()], 0))

    session._load = load_and_shuffle  # type: ignore[method-assign]
    try:
        requests = requests_of(prompts, new_tokens, sampling)
        run(session, requests)
    finally:
        del session._load  # type: ignore[method-assign]
    same_tokens(requests, [e[:new_tokens] for e in expected])
    for row, request in enumerate(requests):
        cache_is_fresh(session, row, request.prompt + request.output, draft="target")


def drafters_do_not_matter(
    workshop: Workshop, sampling: SamplingParams = WARM, new_tokens: int = 24, seed: int = 1,
    drafters: Sequence[str] = ("plain", "ngram", "auto", "small", "near", "twin"),
) -> None:  # fmt: skip
    """Same seed, other drafter: the same tokens, those of the oracle."""
    prompts = prompts_of(seed, PROMPTS[0])
    expected = _oracles(prompts, new_tokens, sampling)
    for drafter in drafters:
        session = workshop.session(drafter, sampling=sampling.needs_scores)
        requests = requests_of(prompts, new_tokens, sampling)
        run(session, requests)
        same_tokens(requests, expected)
        at_rest(session, requests)


def stops_inside_an_accepted_run(
    workshop: Workshop, place: int = 7, sampling: SamplingParams = GREEDY, drafter: str = "twin"
) -> None:
    """Every draft accepted, an eos (one of several) ends a row in the middle of a run; others go on."""
    prompts = _prompts()
    new_tokens = 26
    full = _oracles(prompts, new_tokens, sampling)
    eos_ids = (full[0][place], full[2][place + 3])
    expected = [_until(tokens, eos_ids) for tokens in full]
    session = workshop.session(drafter, sampling=sampling.needs_scores)
    requests = requests_of(prompts, new_tokens, sampling)
    run(session, requests, eos_ids, watch=_finished_rows_rest())
    same_tokens(requests, expected)
    at_rest(session, requests)
    draft = {"twin": "target", "small": "small"}.get(drafter)
    for row, request in enumerate(requests):
        cache_is_fresh(session, row, request.prompt + request.output, draft=draft)


def host_stops_inside_an_accepted_run(workshop: Workshop, place: int = 7, sampling: SamplingParams = GREEDY) -> None:
    """A stop that only the host sees (a stop string): the row ends with that token, nothing behind it stays."""
    prompts, new_tokens = _prompts(), 26
    expected = _oracles(prompts, new_tokens, sampling)
    session = workshop.session("twin", sampling=sampling.needs_scores)
    requests = requests_of(prompts, new_tokens, sampling)
    for row, length in ((0, place), (2, place + 4), (3, 1)):
        ids = prompts[row] + expected[row][:length]
        requests[row].should_stop = lambda seen, ids=ids: seen == ids
        expected[row] = expected[row][:length]
    run(session, requests, watch=None)
    same_tokens(requests, expected)
    at_rest(session, requests)
    for row, request in enumerate(requests):
        cache_is_fresh(session, row, request.prompt + request.output, draft="target")


def _finished_rows_rest() -> Callable[[dict[str, Tensor]], None]:
    """Watches that a row which has finished does not move any more."""
    frozen: dict[int, tuple[int, list[int]]] = {}

    def watch(state: dict[str, Tensor]) -> None:
        for row in state["finished"].nonzero()[:, 0].tolist():
            now = (int(state["kv_lens"][row]), state["tokens"][row].tolist())
            assert frozen.setdefault(row, now) == now, f"row {row} moved after it had finished"

    return watch


def _until(tokens: list[int], eos_ids: Sequence[int]) -> list[int]:
    ends = [index for index, token in enumerate(tokens) if token in eos_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def limits_cut_a_run(
    workshop: Workshop, counts: Sequence[int] = (1, 2, 9, 23), sampling: SamplingParams = GREEDY
) -> None:
    """max_new_tokens cuts an accepted run; a row that ended neither advances nor disturbs the others."""
    prompts = _prompts()
    expected = _oracles(prompts, list(counts), sampling)
    session = workshop.session("twin", sampling=sampling.needs_scores)
    requests = requests_of(prompts, list(counts), sampling)
    run(session, requests, watch=_finished_rows_rest())
    same_tokens(requests, expected)
    at_rest(session, requests)
    for row, request in enumerate(requests):
        cache_is_fresh(session, row, request.prompt + request.output, draft="target")


def state_follows_from_tokens(workshop: Workshop, sampling: SamplingParams = WARM, new_tokens: int = 24) -> None:
    """Whatever was accepted on the way, equal tokens mean equal history, lengths, and the same next n-gram draft."""
    prompts = _prompts()
    expected = _oracles(prompts, new_tokens + L, sampling)
    futures = [p + e for p, e in zip(prompts, expected, strict=True)]
    session = workshop.session("ngram", sampling=sampling.needs_scores)
    drafts: list[dict[tuple[int, int], Any]] = []
    for accepts in ((0,), (4, 1, 3), (2, 4)):
        seen_at: dict[tuple[int, int], Any] = {}

        def watch(state: dict[str, Tensor], seen_at: dict[tuple[int, int], Any] = seen_at) -> None:
            for row in range(len(prompts)):
                names = ("draft_tokens", "tree_parents", "tokens", "finished") + (("seen",) if "seen" in state else ())
                seen_at[row, int(state["kv_lens"][row])] = {name: state[name][row].tolist() for name in names}

        requests = requests_of(prompts, new_tokens, sampling)
        script = MixedDraft(futures, accept=lambda row, step, accepts=accepts: accepts[(step + row) % len(accepts)])
        run(session, requests, script=script, watch=watch)
        same_tokens(requests, [e[:new_tokens] for e in expected])
        drafts.append(seen_at)
    plain, *others = drafts
    for other in others:
        for place, state in other.items():
            assert state == plain[place], f"row and kv_lens {place}: the state depends on what was accepted before"


def never_overflows(workshop: Workshop, sampling: SamplingParams = GREEDY) -> None:
    """A row that fills its cache to the last slot writes into nobody's pages."""
    session = workshop.session("twin", sampling=sampling.needs_scores)
    length = session.program.shape.max_length
    prompts = [*_prompts()[:3], prompts_of(5, (60,))[0]]
    counts = [20, 20, 20, length - 60]
    expected = _oracles(prompts, counts, sampling)
    requests = requests_of(prompts, counts, sampling)
    run(session, requests)
    same_tokens(requests, expected)
    for row, request in enumerate(requests):
        cache_is_fresh(session, row, request.prompt + request.output, draft="target")


def draft_rows(workshop: Workshop) -> None:
    """The draft's cache after none, some and all drafts were accepted."""
    for accept in (0, 2, L):
        draft_cache_survives_every_accept_count(workshop, accept)


def warm_twin(workshop: Workshop) -> None:
    """The twin at a temperature and under every filter."""
    twin_is_accepted_completely(workshop, WARM)


def warm_lossless(workshop: Workshop) -> None:
    """Any draft, with processors that look at the history."""
    lossless_for_any_draft(
        workshop, accepts=(4, 3), presents=(4,), sampling=SamplingParams(0.8, repetition_penalty=1.8)
    )


def window_lossless(workshop: Workshop) -> None:
    """Any draft on a model with a sliding window."""
    lossless_for_any_draft(workshop, target="window")


def twice_at_rest(workshop: Workshop) -> None:
    """A second call finds nothing of the first one: long rows first, short ones after."""
    limits_cut_a_run(workshop, (30, 30, 30, 30))
    limits_cut_a_run(workshop, (3, 2, 5, 4))
