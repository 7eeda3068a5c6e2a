"""bind-positions: a model that counts its own positions reads position_ids instead, wherever they start."""

from __future__ import annotations

import re

import pytest
import torch
from harness.graphs import check_golden
from torch import nn

from autospec.capture_slots import with_slots
from autospec.decompose import functional
from autospec.ir.runner import run_pass
from autospec.ir.text import graph_text
from autospec.legality import run_captured
from autospec.passes.bind_positions import BindPositions

VOCAB, WIDTH, ROWS = 16, 8, 64


class Toy(nn.Module):
    def __init__(self, places) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.table = nn.Embedding(ROWS, WIDTH)
        self.register_buffer("numbers", torch.arange(ROWS)[None])
        self.places = places

    def forward(self, input_ids, position_ids):
        return (self.embed(input_ids) + self.places(self, input_ids),)


def vector(toy, ids):
    return toy.table(torch.arange(ids.shape[1]))


def with_offset(toy, ids):
    return toy.table(torch.arange(ids.shape[1]).unsqueeze(0) + 2)


def whole_batch(toy, ids):
    return toy.table(torch.arange(ids.shape[1]).expand(ids.shape[0], -1) + 1)


def from_a_start(toy, ids):
    return toy.table(torch.arange(3, 3 + ids.shape[1], dtype=torch.int32))


def sliced_buffer(toy, ids):
    return toy.table(toy.numbers[:, : ids.shape[1]])


def summed_ones(toy, ids):
    return toy.table(torch.ones_like(ids).cumsum(1) - 1)


def waves(toy, ids):
    angles = torch.arange(ids.shape[1])[:, None] * torch.linspace(0.1, 1.0, WIDTH)
    return angles.cos()[None]


def steps_seen_from_afar(toy, ids):
    place = torch.arange(ids.shape[1])
    return torch.log1p(torch.floor((place + 1.0) / 20)).view(1, ids.shape[1], 1)


OFFSETS = {
    vector: 0, with_offset: 2, whole_batch: 1, from_a_start: 3, sliced_buffer: 0, summed_ones: 0, waves: 0,
    steps_seen_from_afar: 0,
}  # fmt: skip


def export(places):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        toy = Toy(places).eval().requires_grad_(False)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(toy, (ids, ids.clone()), dynamic_shapes=(dims, dims), strict=False)
    return toy, *with_slots(functional(exported), "toy")


@pytest.mark.parametrize("places", OFFSETS, ids=lambda places: places.__name__)
def test_meaning(places):
    toy, module, weights = export(places)
    assert run_pass(module, BindPositions()).count == 1
    ids = torch.randint(0, VOCAB, (3, 40))
    positions = torch.arange(40).expand(3, -1)
    (whole,) = toy(ids, positions)
    for start, end in ((0, 40), (0, 7), (7, 8), (21, 40)):
        part = slice(start, end)
        got = run_captured(module, weights, ids[:, part].contiguous(), positions[:, part].contiguous())
        assert torch.equal(got, whole[:, part])
    # Rows at different positions: what a step of a ragged batch is.
    ragged = torch.tensor([[5], [0], [33]])
    got = run_captured(module, weights, ids[:, :1].contiguous(), ragged)
    for row, position in enumerate(ragged.flatten().tolist()):
        moved = torch.cat([ids[row : row + 1, :1].expand(1, position), ids[row : row + 1, :1]], dim=1)
        assert torch.equal(got[row : row + 1], toy(moved, moved)[0][:, -1:])


@pytest.mark.parametrize("places", OFFSETS, ids=lambda places: places.__name__)
def test_again_finds_nothing(places):
    _, module, _ = export(places)
    run_pass(module, BindPositions())
    assert run_pass(module, BindPositions()).count == 0


def test_text():
    _, module, _ = export(with_offset)
    run_pass(module, BindPositions())
    names = iter("BSCT")
    symbols: dict[str, str] = {}
    text = re.sub(r"\bs\d+\b", lambda found: symbols.get(found[0]) or symbols.setdefault(found[0], next(names)), graph_text(module))
    check_golden("bind_positions", text)


def gathers_tokens(toy, ids):
    return toy.embed(ids).index_select(1, torch.arange(ids.shape[1]))


def test_positions_that_index_the_tokens_of_a_call_stay():
    _, module, _ = export(gathers_tokens)
    record = run_pass(module, BindPositions())
    assert record.count == 0
    assert "index the tokens of this call" in record.refusals[0].reason


def test_token_types_and_masks_are_no_positions():
    _, module, _ = export(lambda toy, ids: toy.table(torch.zeros_like(ids)))
    assert run_pass(module, BindPositions()).count == 0
