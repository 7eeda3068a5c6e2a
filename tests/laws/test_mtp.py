"""MTP modules as drafters: nothing is lost at any accept count, and their drafts and caches are those of a fresh run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import programs, tree_laws
from harness.laws import GREEDY, WARM, at_rest, same_tokens
from harness.models import captured
from harness.programs import MixedDraft, Plant, Workshop, requests_of, run
from harness.tree_laws import PROMPTS
from torch import Tensor

from autospec.runtime.request import SamplingParams

HOT = SamplingParams(temperature=1.0)
BOTH = pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@BOTH
def test_every_accept_count_is_lossless(workshop: Workshop, length: int, sampling: SamplingParams) -> None:
    """One, two, three and seven tokens of three modules, right up to every depth in turn."""
    accepts_every_count(workshop, f"mtp3 {length}", length, sampling)


def accepts_every_count(
    workshop: Workshop, drafter: str = "mtp3 3", length: int = 3, sampling: SamplingParams = GREEDY, new_tokens: int = 40,
    target: str = "target",
) -> None:  # fmt: skip
    futures = tree_laws.futures_of(target, new_tokens, sampling)
    session = workshop.session(drafter, target=target, sampling=sampling.needs_scores)
    draft = MixedDraft(futures, accept=lambda row, step: (step + row) % (length + 1))
    requests = requests_of(PROMPTS, new_tokens, sampling)
    boundaries = 0

    def watch(state: dict[str, Tensor]) -> None:
        nonlocal boundaries
        boundaries += 1
        if boundaries in (1, 4):
            for row, future in enumerate(futures):
                tree_laws.drafter_is_fresh(session, row, future[: int(state["kv_lens"][row]) + 1], drafter, target)

    run(session, requests, script=draft, watch=watch)
    assert {count for counts in draft.log for count in counts} == set(range(length + 1))
    same_tokens(requests, [future[len(p) : len(p) + new_tokens] for future, p in zip(futures, PROMPTS, strict=True)])
    at_rest(session, requests)
    for row, request in enumerate(requests):
        tree_laws.drafter_is_fresh(session, row, request.prompt + request.output, drafter, target)


@pytest.mark.parametrize("drafter", ["mtp dynamic", "mtp3 static", "mtp3 dynamic"])
def test_caches_stay_fresh_in_trees(workshop: Workshop, drafter: str) -> None:
    """The tokens are checked, too: paths accepted anywhere in the tree are those of the target."""
    tree_laws.draft_caches_stay_fresh(workshop, drafter)


def test_latents_and_experts(workshop: Workshop) -> None:
    """Modules of DeepSeek-V3, whose attention keeps latents: tokens, and the pages of target and modules."""
    tree_laws.lossless_for_any_tree(workshop, target="latent", drafter="mtp-latent static", new_tokens=8)
    tree_laws.draft_caches_stay_fresh(workshop, "mtp-latent static", target="latent")


@pytest.mark.xdist_group("sparse")
def test_modules_that_select_their_keys(workshop: Workshop) -> None:
    """Modules of DeepSeek-V3.2 have indexers of their own, whose keys lie behind the target's."""
    accepts_every_count(workshop, "mtp-sparse 7", 7, target="sparse")
    tree_laws.drafts_what_re_feeding_would(workshop, "mtp-sparse 7", target="sparse")


@pytest.mark.xdist_group("sparse")
def test_trees_of_modules_that_select_their_keys(workshop: Workshop) -> None:
    tree_laws.draft_caches_stay_fresh(workshop, "mtp-sparse static", target="sparse")
    tree_laws.drafts_what_re_feeding_would(workshop, "mtp3-sparse dynamic", target="sparse")


@pytest.mark.xdist_group("sparse")
def test_one_selection_for_all_passes_of_a_draft(workshop: Workshop) -> None:
    """index_share_for_mtp_iteration: later passes attend to what the first one selected, and to their own path."""
    for drafter in ("mtp-share 7", "mtp-share dynamic"):
        tree_laws.drafts_what_re_feeding_would(workshop, drafter, target="sparse")


def _path_left_out(op: Any, indices: Tensor, kv_lens: Tensor, first: int, q_len: int, tree_mask: Any = None) -> Tensor:
    return torch.nn.functional.pad(indices.expand(-1, q_len, -1), (0, first + q_len), value=-1)


@pytest.mark.xdist_group("sparse")
def test_a_node_that_does_not_see_its_path_is_caught() -> None:
    with pytest.raises(AssertionError):
        tree_laws.drafts_what_re_feeding_would(
            Workshop(Plant("path left out", "share_selection", _path_left_out)), "mtp-share 7", target="sparse"
        )


@pytest.mark.parametrize(
    ("drafter", "sampling"),
    [("mtp", HOT), ("mtp dynamic", GREEDY), ("mtp3 static", HOT), ("mtp3 dynamic", GREEDY), ("mtp3 7", GREEDY)],
    ids=["one module", "one module dynamic", "static", "dynamic", "recycled"],
)
def test_drafts_are_what_re_feeding_would_draft(workshop: Workshop, drafter: str, sampling: SamplingParams) -> None:
    tree_laws.drafts_what_re_feeding_would(workshop, drafter, sampling)


def _not_shifted(op: Any, tokens: Tensor, starts: Tensor, count: int) -> Any:
    return op(tokens, starts - 1 if count > 1 else starts, count)


def _path_ignored(op: Any, rows: Tensor, index: Tensor) -> Any:
    """The accepted path is taken for nodes 0, 1, 2, ..."""
    return op(rows, torch.arange(index.shape[1])[None].expand_as(index).clamp(max=rows.shape[1] - 1))


def _one_late(op: Any, *args: Any) -> Any:
    return op(*args[:5], args[5] + 1)


def _at_one_position(op: Any, kv_lens: Tensor, q_len: int, most: int, depth: Tensor | None = None) -> Any:
    return op(kv_lens, q_len, most, depth).clamp(max=kv_lens.long()[:, None])


def _draft(workshop: Workshop) -> None:
    tree_laws.drafts_what_re_feeding_would(workshop, "mtp3 7")


def _cache(workshop: Workshop) -> None:
    accepts_every_count(workshop)


def _tree_cache(workshop: Workshop) -> None:
    tree_laws.draft_caches_stay_fresh(workshop, "mtp3 static")


PLANTS: list[tuple[Plant, Callable[[Workshop], None]]] = [
    (Plant("tokens not shifted", "tokens_at", _not_shifted, (), "draft"), _cache),
    (Plant("taps by number, not by path", "gather_rows", _path_ignored, ("step",), "draft"), _tree_cache),
    (Plant("rows of the catch-up one slot late", "append_kv", _one_late, ("step",), "draft"), _cache),
    (Plant("all levels at one position", "node_positions", _at_one_position, ("step",), "draft"), _draft),
]


@pytest.mark.parametrize(("plant", "law"), PLANTS, ids=[plant.name for plant, _ in PLANTS])
def test_a_planted_bug_is_caught(plant: Plant, law: Callable[[Workshop], None]) -> None:
    with pytest.raises(AssertionError):
        law(Workshop(plant))


@pytest.mark.parametrize(("wrong", "law"), [
    (lambda made: {"deeper": made.deeper[::-1]}, _draft), (lambda made: {"deeper": made.deeper[:1]}, _draft),
    (lambda made: {"deeper": made.deeper[::-1]}, _cache),
], ids=["modules in another turn", "a module left out", "caches in another order"])  # fmt: skip
def test_wrong_modules_are_caught(monkeypatch: pytest.MonkeyPatch, wrong: Any, law: Callable[[Workshop], None]) -> None:
    made = captured("mtp3")
    bad = dataclasses.replace(made, **wrong(made))
    monkeypatch.setattr(programs, "captured", lambda name: bad if name == "mtp3" else captured(name))
    with pytest.raises(AssertionError):
        law(Workshop())
