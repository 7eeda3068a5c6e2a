"""Each law is able to fail: a program with a deliberate bug is caught by the law that is there for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import laws
from harness.programs import Plant, Workshop
from torch import Tensor

from autospec.runtime.session import Session

Law = Callable[..., None]


def _shifted(index: int, by: int) -> Callable[..., Any]:
    """The op with one positional argument moved by a number."""

    def bug(op: Any, *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        given[index] = given[index] + by
        return op(*given, **kwargs)

    return bug


def _not_rolled_back(op: Any, tokens: Tensor, kv_lens: Tensor, finished: Tensor, *args: Any) -> Any:
    draft_tokens = args[4]
    emitted = op(tokens, kv_lens, finished, *args)
    live = (emitted[:, 0] >= 0) & ~finished
    kv_lens.add_(torch.where(live, draft_tokens.shape[1] - (emitted >= 0).sum(1), 0).to(kv_lens.dtype))
    return emitted


def _kv_lens_too_long(op: Any, tokens: Tensor, kv_lens: Tensor, *args: Any) -> Any:
    emitted = op(tokens, kv_lens, *args)
    kv_lens.add_((emitted[:, 0] >= 0).to(kv_lens.dtype))
    return emitted


def _parents_ignored(op: Any, target: Tensor, draft: Tensor, parents: Tensor, most: int) -> Any:
    """A node is accepted where its token is chosen anywhere: after node 0 comes node 2 if node 1 does not fit."""
    length, path, bonus = op(target, draft, parents, most)
    skips = (length == 0) & (draft[:, 2] == target[:, 0])
    path = path.clone()
    path[:, 1] = torch.where(skips, 2, path[:, 1])
    return torch.where(skips, 1, length), path, torch.where(skips, target[:, 2], bonus)


def _wrong_parent(op: Any, target: Tensor, draft: Tensor, parents: Tensor, most: int) -> Any:
    return op(target, draft, torch.where(parents >= 0, (parents - 1).clamp(min=0), parents), most)


def _bonus_of_the_row_before(op: Any, target: Tensor, draft: Tensor, parents: Tensor, most: int) -> Any:
    length, path, _ = op(target, draft, parents, most)
    node = path.long().gather(1, (length.long() - 1).clamp(min=0)[:, None])
    return length, path, target.gather(1, node)[:, 0]


def _accepts_one_more(op: Any, target: Tensor, draft: Tensor, parents: Tensor, most: int) -> Any:
    length, path, bonus = op(target, draft, parents, most)
    more = (length + 1).clamp(max=most)
    path = torch.where(torch.arange(most + 1) == more[:, None], more[:, None], path)
    return more, path, bonus


def _no_eos(op: Any, *args: Any) -> Any:
    return op(*args[:6], torch.full_like(args[6], -1), *args[7:])


def _finished_rows_go_on(op: Any, tokens: Tensor, kv_lens: Tensor, finished: Tensor, *args: Any) -> Any:
    running = torch.zeros_like(finished)
    emitted = op(tokens, kv_lens, running, *args)
    finished.logical_or_(running)
    return emitted


def _limit_ignored(op: Any, *args: Any) -> Any:
    return op(*args[:5], args[5] + 3, *args[6:])


def _history_forgotten(op: Any, logits: Tensor, draft: Tensor, parents: Tensor, *args: Any) -> Any:
    return op(logits, draft, torch.full_like(parents, -1), *args)


def _stale_tokens(op: Any, draft_tokens: Tensor, tree_parents: Tensor, ids: Tensor, parents: Tensor, *rest: Any) -> Any:
    stale = draft_tokens[:, 1:].clone()
    op(draft_tokens, tree_parents, ids, parents, *rest)
    draft_tokens[:, 1:] = stale


def _stale_parents(op: Any, draft_tokens: Tensor, tree_parents: Tensor, ids: Tensor, parents: Tensor, *rest: Any) -> Any:
    stale = tree_parents.clone()
    op(draft_tokens, tree_parents, ids, parents, *rest)
    tree_parents.copy_(torch.maximum(stale, tree_parents))


def _stale_root(op: Any, draft_tokens: Tensor, tree_parents: Tensor, ids: Tensor, parents: Tensor, *rest: Any) -> Any:
    root = draft_tokens[:, 0].clone()
    op(draft_tokens, tree_parents, ids, parents, *rest)
    draft_tokens[:, 0] = torch.where(root > 0, root, draft_tokens[:, 0])


def _all_at_one_position(op: Any, kv_lens: Tensor, q_len: int, most: int, depth: Tensor | None = None) -> Any:
    return op(kv_lens, 1, most).expand(-1, q_len)


def _window_plus_one(op: Any, *args: Any, **kwargs: Any) -> Any:
    return op(*args, **{**kwargs, "window": kwargs["window"] + 1})


def _seen_keeps_nothing(op: Any, seen: Tensor, emitted: Tensor) -> None:
    op(seen, emitted[:, :1])


def _whole_chunk_valid(op: Any, hidden: Tensor, q_lens: Tensor) -> Any:
    return op(hidden, torch.full_like(q_lens, hidden.shape[1]))


def _two_tokens_of(op: Any, tokens: Tensor, starts: Tensor, count: int) -> Any:
    """The catch-up runs only the root: after a full accept the draft's cache lacks a row."""
    rows = op(tokens, starts, count)
    return rows[:, -1:].expand(-1, count) if count > 1 else rows


def _counts_ahead(op: Any, *args: Any) -> Any:
    emitted = op(*args)
    args[3][:, 1:] += (emitted[:, :1] >= 0)
    return emitted


def _stop_written_too_late(op: Any, tokens: Tensor, kv_lens: Tensor, *args: Any) -> Any:
    """All accepted tokens enter the history, those after the stop too."""
    run = args[-5].clone()
    before, length = kv_lens.clone(), args[-3]
    emitted = op(tokens, kv_lens, *args)
    for row in range(tokens.shape[0]):
        for j in range(int(length[row])):
            if emitted[row, 0] >= 0:
                tokens[row, int(before[row]) + 1 + j] = run[row, 1 + j]
    return emitted


# Which plant, and which laws must see it.
PLANTS: list[tuple[Plant, list[Law]]] = [
    (Plant("cache not rolled back", "commit_step", _not_rolled_back), [laws.lossless_for_any_draft]),
    (Plant("kv_lens off by one", "commit_step", _kv_lens_too_long), [laws.limits_cut_a_run]),
    (Plant("kv_lens off by one after the prompt", "commit_prompt", _kv_lens_too_long), [laws.lossless_for_any_draft]),
    (Plant("rows written one slot late", "append_kv", _shifted(5, 1), ("step",)), [laws.wide_equals_narrow]),
    (Plant("rows read one slot short", "paged_attention", _shifted(4, -1), ("step",)), [laws.lossless_for_any_draft]),
    (Plant("wrong parent", "accept_tree", _wrong_parent), [laws.accepts_exactly_what_is_right]),
    (Plant("parents ignored", "accept_tree", _parents_ignored), [laws.lossless_for_any_draft]),
    (Plant("bonus from the wrong row", "accept_tree", _bonus_of_the_row_before), [laws.lossless_for_any_draft]),
    (Plant("one draft too many accepted", "accept_tree", _accepts_one_more), [laws.lossless_for_any_draft]),
    (Plant("stale draft tokens", "store_draft", _stale_tokens), [laws.twin_is_accepted_completely]),
    (Plant("stale tree", "store_draft", _stale_parents), [laws.state_follows_from_tokens]),
    (Plant("stale root", "store_draft", _stale_root), [laws.lossless_for_any_draft]),
    (Plant("positions without depth", "node_positions", _all_at_one_position), [laws.lossless_for_any_draft]),
    (Plant("draft at the target's positions", "node_positions", _shifted(0, -1), owner="draft"), [laws.draft_rows]),
    (Plant("draft cache off by one", "append_kv", _shifted(5, 1), ("step",), "draft"), [laws.draft_rows]),
    (Plant("catch-up of one row", "tokens_at", _two_tokens_of), [laws.draft_rows]),
    (Plant("catch-up one token late", "tokens_at", _shifted(1, 1), owner="draft"), [laws.draft_rows]),
    (Plant("noise index off by one", "choose_tokens", _shifted(3, 1), ("step",)), [laws.drafters_do_not_matter]),
    (Plant("draft's noise off by one", "rank_sampled", _shifted(1, 1), (), "draft"), [laws.warm_twin]),
    (Plant("history without ancestors", "choose_tokens", _history_forgotten, ("step",)), [laws.warm_lossless]),
    (Plant("history without accepted tokens", "mark_seen", _seen_keeps_nothing), [laws.warm_lossless]),
    (Plant("eos inside a run overlooked", "commit_step", _no_eos), [laws.stops_inside_an_accepted_run]),
    (Plant("tokens behind the stop kept", "commit_step", _stop_written_too_late), [laws.stops_inside_an_accepted_run]),
    (Plant("limit overlooked", "commit_step", _limit_ignored), [laws.limits_cut_a_run]),
    (Plant("finished rows advance", "commit_step", _finished_rows_go_on), [laws.stops_inside_an_accepted_run]),
    (Plant("window off by one", "paged_attention", _window_plus_one), [laws.window_lossless]),
    (Plant("padding taken for the last token", "last_rows", _whole_chunk_valid), [laws.padding_is_invisible]),
    (Plant("acceptance counted ahead", "commit_step", _counts_ahead), [laws.accepts_exactly_what_is_right]),
]  # fmt: skip


@pytest.mark.parametrize(("plant", "caught_by"), PLANTS, ids=[plant.name for plant, _ in PLANTS])
def test_a_planted_bug_is_caught(plant: Plant, caught_by: list[Law]) -> None:
    for law in caught_by:
        with pytest.raises(AssertionError):
            law(Workshop(plant))


def _pages_of_others(session: Session) -> None:
    """Idle and short rows share the pages of row 0."""
    load = session._load

    def bug(*args: Any) -> None:
        load(*args)
        session.state["page_table"][1:] = session.state["page_table"][:1]

    session._load = bug  # type: ignore[method-assign]


def _one_page_too_few(session: Session) -> None:
    """The last page of a row is the first one of the next."""
    load = session._load

    def bug(*args: Any) -> None:
        load(*args)
        table = session.state["page_table"]
        table[:, -3:] = table.roll(-1, 0)[:, :3]

    session._load = bug  # type: ignore[method-assign]


def _state_left_over(session: Session) -> None:
    """The history of the last call is still there."""
    load = session._load

    def bug(*args: Any) -> None:
        before = session.state["tokens"].clone()
        load(*args)
        session.state["tokens"].copy_(torch.where(session.state["tokens"] == 0, before, session.state["tokens"]))

    session._load = bug  # type: ignore[method-assign]


def _host_stop_forgotten(session: Session) -> None:
    """The device goes on where the host has stopped."""
    session._cut = lambda row, request: None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("prepare", "law"),
    [
        (_host_stop_forgotten, laws.host_stops_inside_an_accepted_run),
        (_pages_of_others, laws.padding_is_invisible),
        (_one_page_too_few, laws.never_overflows),
        (_state_left_over, laws.twice_at_rest),
    ],
    ids=["host stop forgotten", "pages shared between rows", "too few pages", "state left over"],
)
def test_a_planted_bug_of_the_session_is_caught(prepare: Callable[[Session], None], law: Law) -> None:
    with pytest.raises(AssertionError):
        law(Workshop(prepare=prepare))


def test_without_a_plant_nothing_is_caught(workshop: Workshop) -> None:
    """The same calls on sound programs pass, so that a plant is what the laws see."""
    for law in {law for _, caught_by in PLANTS for law in caught_by} | {laws.never_overflows, laws.twice_at_rest}:
        law(workshop)
