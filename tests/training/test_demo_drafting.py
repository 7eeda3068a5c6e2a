"""The demo's yardstick: drafts of all positions at once are the drafts of each, and a dynamic tree is ALGORITHMS'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from harness.training import drafted, feed, random_head
from torch import Tensor

from autospec.heads.eagle3 import Eagle3Head
from autospec.model_zoo.demo.drafting import Tree, accepted_lengths, walk
from autospec.model_zoo.demo.evaluate import LOOP, loop_start
from autospec.model_zoo.demo.recipe import HEADS_SMOKE
from autospec.model_zoo.demo.train_heads import loop_starts, written_weights
from autospec.training.features import Target


def greedy_text(target: Target, rows: int = 3, prompt: int = 4, new: int = 26) -> Tensor:
    tokens = torch.randint(3, 64, (rows, prompt), generator=torch.Generator().manual_seed(1))
    for _ in range(new):
        tokens = torch.cat([tokens, target.model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def learned_head(target: Target, tokens: Tensor) -> Eagle3Head:
    """A head that is right often enough for drafts to be accepted, and often wrong: fitted to the text for a moment."""
    from autospec.training.eagle3 import Eagle3Loss
    from autospec.training.loop import Batch

    head = random_head(target, draft_vocab_size=56)
    loss = Eagle3Loss(target, head, steps=4)
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=3e-3)
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.float))
    for _ in range(25):
        value, _ = loss(batch.tokens, batch.weights, loss.features(batch))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return head


@torch.no_grad()
def tree_by_hand(head: Eagle3Head, tokens: Tensor, taps: Tensor, start: int, tree: Tree) -> int:
    """One request's dynamic tree, node by node, each path re-fed over a cache of its own; then walked."""
    fused = head.fuse(taps)
    ids = head.vocabulary()

    def run(path: list[int]) -> Tensor:
        caches: dict[int, Any] = {}
        for row in range(start + 1):
            logits, out = feed(head, tokens[:, row + 1 : row + 2], fused[:, row : row + 1], torch.tensor([[row]]), caches)
        for level, token in enumerate(path, 1):
            logits, out = feed(head, torch.tensor([[token]]), out, torch.tensor([[start + level]]), caches)
        return logits[0, -1].log_softmax(-1)

    def children(path: list[int], score: float) -> list[tuple[float, list[int]]]:
        values, order = run(path).sort(descending=True, stable=True)
        return [(score + float(values[j]), [*path, int(ids[order[j]])]) for j in range(tree.width)]

    frontier = children([], 0.0)
    history = list(frontier)
    for _ in range(1, tree.levels):
        grown = [child for score, path in frontier for child in children(path, score)]
        history += grown
        frontier = sorted(grown, key=lambda node: -node[0])[: tree.width]
    kept = [path for _, path in sorted(history, key=lambda node: -node[0])[: tree.nodes]]
    text = tokens[0].tolist()
    return max((len(path) for path in kept if path == text[start + 2 : start + 2 + len(path)]), default=0)


def test_a_chain_of_all_positions_is_the_chain_of_each(target: Target) -> None:
    tokens = greedy_text(target)
    head = learned_head(target, tokens)
    taps = target(tokens).taps
    starts = torch.arange(3, 3 + 18)
    found = accepted_lengths(head, tokens, taps, starts, Tree(width=1, levels=5, nodes=5))
    ids = head.vocabulary()
    for place, start in enumerate(starts.tolist()):
        levels = drafted(head, tokens, taps, start, lambda _, logits: ids[logits.argmax(-1)], 5)
        right = torch.stack([ids[x.argmax(-1)] == tokens[:, start + 2 + i] for i, x in enumerate(levels)], dim=-1)
        assert found[:, place].tolist() == right.int().cumprod(-1).sum(-1).tolist()
    assert 0.3 < float(found.float().mean()) < 4.9  # drafts are accepted, and rejected


@pytest.mark.parametrize(("width", "nodes"), [(2, 6), (3, 9), (3, 12)])
def test_a_dynamic_tree_of_all_positions_is_the_tree_of_each(target: Target, width: int, nodes: int) -> None:
    tokens = greedy_text(target, rows=1)
    head = learned_head(target, tokens)
    taps = target(tokens).taps
    starts = torch.arange(3, 3 + 12)
    tree = Tree(width=width, levels=4, nodes=nodes)
    found = accepted_lengths(head, tokens, taps, starts, tree)[0].tolist()
    assert found == [tree_by_hand(head, tokens, taps, start, tree) for start in starts.tolist()]
    assert len(set(found)) > 2


def test_rows_know_where_they_begin_to_repeat_themselves() -> None:
    torch.manual_seed(0)
    rows = torch.randint(0, 3000, (40, 70))
    for i in range(30):  # a piece that recurs, overlapping itself where the distance is short
        distance, start = 1 + i, 20 + i % 7
        for place in range(start, start + LOOP + i % 5):
            rows[i, place] = rows[i, place - distance]
    starts = loop_starts(rows.short())
    assert starts.tolist() == [loop_start(row) for row in rows.tolist()]
    assert 10 < int((starts < 70).sum()) <= 30


def test_written_rows_count_where_the_target_wrote_something_new() -> None:
    recipe = replace(HEADS_SMOKE, written_rows=2, generate_batch=2, written_prompts=(4,), written_length=44)
    row = torch.arange(100, 144)
    ended = row.clone()
    ended[9] = 0
    looping = row.clone()
    looping[20:40] = row[4:24]
    weights = written_weights(recipe, torch.stack([ended, looping]))
    little = recipe.prompt_weight
    assert weights[0].tolist() == [little] * 3 + [1.0] * 6 + [0.0] * 35
    assert weights[1].tolist() == [little] * 3 + [1.0] * 17 + [little] * 24


def test_a_walk_counts_steps_and_depths() -> None:
    lengths = torch.tensor([[2, 0, 0, 1, 9, 0]])
    found = walk(lengths, torch.tensor([5]), 3)  # from 0 to 3 to 5, where it stops
    assert (found.steps, found.reached) == (2, [2, 1, 0])
    assert found.acceptance_length == pytest.approx(2.5)
