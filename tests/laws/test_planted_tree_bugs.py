"""Each law of trees is able to fail: the bugs that tree drafting had elsewhere, planted, must be caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import tree_laws
from harness.programs import Plant, Workshop
from torch import Tensor

Law = Callable[[Workshop], Any]


def _siblings_visible(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Every node sees node 1, whoever hangs from it."""
    if kwargs.get("tree_mask") is not None:
        kwargs["tree_mask"] = kwargs["tree_mask"] | torch.tensor([2, *[0] * (kwargs["tree_mask"].shape[2] - 1)]).int()
    return op(*args, **kwargs)


def _causal_tree(op: Any, *args: Any, **kwargs: Any) -> Any:
    return op(*args, **{**kwargs, "tree_mask": None})


def _slots_for_positions(op: Any, *args: Any, **kwargs: Any) -> Any:
    """A window that counts slots: deep nodes lose rows that they should see."""
    tree_mask = kwargs.get("tree_mask")
    if tree_mask is not None and kwargs["window"]:
        kwargs["window"] = max(1, kwargs["window"] - 2)
    return op(*args, **kwargs)


def _chunk_ignored(op: Any, *args: Any, **kwargs: Any) -> Any:
    return op(*args, **{**kwargs, "chunk": 0})


def _depth_is_number(op: Any, kv_lens: Tensor, q_len: int, most: int, depth: Tensor | None = None) -> Any:
    return op(kv_lens, q_len, most)


def _not_moved(op: Any, *args: Any) -> None:
    return None


def _moved_as_a_chain(op: Any, pages: Any, table: Tensor, lens: Tensor, path: Tensor, length: Tensor) -> None:
    op(pages, table, lens, torch.where(path > 0, path.clamp(max=path.shape[1] - 1), path), length)


def _one_row_short(op: Any, pages: Any, table: Tensor, lens: Tensor, path: Tensor, length: Tensor) -> None:
    op(pages, table, lens, path, (length - 1).clamp(min=0))


def _first_child_only(op: Any, target: Tensor, draft: Tensor, parents: Tensor, most: int) -> Any:
    """Siblings after the first are never looked at."""
    node = torch.arange(parents.shape[1])
    elder = ((parents[:, :, None] == parents[:, None, :]) & (node[None, :] < node[:, None])[None]).any(2)
    return op(target, draft, torch.where(elder, -1, parents), most)


def _frontier_of_the_wrong_parent(op: Any, *args: Any) -> Any:
    *rest, parents, mask = op(*args)
    return (*rest, torch.zeros_like(parents), mask)


def _old_mask_rows_forgotten(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Rows of earlier levels see only themselves, as if they were new each time."""
    tree_mask = kwargs.get("tree_mask")
    if tree_mask is not None and tree_mask.shape[1] > args[0].shape[1]:
        grown = tree_mask.clone()
        grown[:, -args[0].shape[1] :] &= ~tree_mask[:, :1]
        kwargs["tree_mask"] = grown
    return op(*args, **kwargs)


def _taps_not_gathered(op: Any, rows: Tensor, index: Tensor) -> Any:
    """The accepted path is taken for nodes 0, 1, 2, ..."""
    return op(rows, torch.arange(index.shape[1])[None].expand_as(index).clamp(max=rows.shape[1] - 1))


def _token_not_shifted(op: Any, tokens: Tensor, starts: Tensor, count: int) -> Any:
    return op(tokens, starts - 1, count) if count > 1 else op(tokens, starts, count)


def _history_scores_summed_wrong(op: Any, root: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, most: int) -> Any:
    return op(root, tokens, scores.flip(1), parents, most)


def _without_noise(op: Any, logits: Tensor, index: Tensor, *args: Any) -> Any:
    return op(logits, index + 1, *args)


def _d2t_ignored(op: Any, *args: Any) -> Any:
    return op(*args[:-1], None)


WIDE: list[tuple[Plant, Law]] = [
    (Plant("siblings see each other", "paged_attention", _siblings_visible, ("step",)), tree_laws.lossless_for_any_tree),
    (Plant("tree verified as a chain", "paged_attention", _causal_tree, ("step",)), tree_laws.lossless_for_any_tree),
    (Plant("window in slots", "paged_attention", _slots_for_positions, ("step",)), tree_laws.window_inside_a_tree),
    (Plant("chunk ignored in a tree", "paged_attention", _chunk_ignored, ("step",)), tree_laws.chunk_inside_a_tree),
    (Plant("siblings do not share a position", "node_positions", _depth_is_number, ("step",)),
     tree_laws.lossless_for_any_tree),
    (Plant("accepted path not compacted", "compact_kv", _not_moved), tree_laws.lossless_for_any_tree),
    (Plant("wrong rows compacted", "compact_kv", _moved_as_a_chain), tree_laws.lossless_for_any_tree),
    (Plant("last accepted row not compacted", "compact_kv", _one_row_short), tree_laws.lossless_for_any_tree),
    (Plant("only first children are followed", "accept_tree", _first_child_only), tree_laws.lossless_for_any_tree),
]  # fmt: skip
DRAFTS: list[tuple[Plant, Law]] = [
    (Plant("hidden state of the wrong parent", "grow_frontier", _frontier_of_the_wrong_parent),
     tree_laws.drafts_what_re_feeding_would),
    (Plant("old rows of the mask forgotten", "paged_attention", _old_mask_rows_forgotten, (), "draft"),
     tree_laws.drafts_what_re_feeding_would),
    (Plant("taps by number, not by path", "gather_rows", _taps_not_gathered, ("step",), "draft"),
     tree_laws.eagle_caches_stay_fresh),
    (Plant("head's tokens not shifted", "tokens_at", _token_not_shifted, (), "draft"), tree_laws.eagle_caches_stay_fresh),
    (Plant("final tree of other scores", "build_dynamic_tree", _history_scores_summed_wrong),
     tree_laws.drafts_what_re_feeding_would),
    (Plant("draft ids taken for the target's", "rank_greedy", _d2t_ignored), tree_laws.drafts_what_re_feeding_would),
    (Plant("draft's noise off by one", "rank_sampled", _without_noise), tree_laws.warm_drafts),
]  # fmt: skip
PLANTS = WIDE + DRAFTS


@pytest.mark.parametrize(("plant", "law"), PLANTS, ids=[plant.name for plant, _ in PLANTS])
def test_a_planted_bug_is_caught(plant: Plant, law: Law) -> None:
    with pytest.raises(AssertionError):
        law(Workshop(plant))


def test_without_a_plant_nothing_is_caught(workshop: Workshop) -> None:
    for law in dict.fromkeys(law for _, law in PLANTS):
        law(workshop)
