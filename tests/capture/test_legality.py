"""Capture refuses every model that decoding step by step would get wrong, and says why; what it accepts is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autospec.assemble import capture_model
from autospec.capture_checks import token_local
from autospec.errors import CaptureError
from autospec.legality import run_captured
from autospec.passes.bind_positions import BindPositions
from autospec.tiny_models import tiny_model


def llama(**config: Any) -> Any:
    return tiny_model("llama", num_hidden_layers=2, **config)


class Planted(nn.Module):
    """Stands for a layer's MLP and does something illegal beside it."""

    def __init__(self, mlp: nn.Module, width: int = 64) -> None:
        super().__init__()
        self.mlp = mlp
        with torch.random.fork_rng():
            torch.manual_seed(9)
            self.weight = nn.Parameter(torch.randn(width, 4) * 0.5)
            self.table = nn.Parameter(torch.randn(512, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.change(x))

    def change(self, x: Tensor) -> Tensor:
        raise AssertionError(f"{type(self).__name__} plants nothing")


class Convolution(Planted):
    def change(self, x):
        padded = nn.functional.pad(x.transpose(1, 2), (3, 0))
        return nn.functional.conv1d(padded, self.weight[:, None, :], groups=x.shape[2]).transpose(1, 2)


class RecurrentState(Planted):
    def change(self, x):
        return x + 0.3 * x.cumsum(1)


class BatchStatistics(Planted):
    def change(self, x):
        return x - x.mean((0, 1), keepdim=True)


class DynamicScale(Planted):
    """8-bit activations with one scale per tensor."""

    def change(self, x):
        scale = x.abs().max() / 7
        return (x / scale).round() * scale


class ExpertCapacity(Planted):
    """An expert takes the first tokens that ask for it, half of all; the rest goes without."""

    def change(self, x):
        chosen = nn.functional.one_hot((x @ self.weight).argmax(-1), 4)
        rank = (chosen.cumsum(1) * chosen).sum(-1)
        return torch.where((rank <= x.shape[1] // 4)[..., None], x * 2, x)


class LengthInside(Planted):
    def change(self, x):
        return x * (1 + x.shape[1] / 8)


class RelativePlace(Planted):
    """Positions as fractions of the length."""

    def change(self, x):
        place = torch.arange(x.shape[1]) / x.shape[1]
        return x + place[None, :, None]


class PlaceFromTheEnd(Planted):
    def change(self, x):
        return x + self.table[torch.arange(x.shape[1]).flip(0)]


class LooksAhead(Planted):
    def change(self, x):
        return x + torch.roll(x, -1, 1)


PLANTED = {
    Convolution: "a change of token 0 reaches other tokens past attention",
    RecurrentState: "a change of token 0 reaches other tokens past attention",
    BatchStatistics: "a change of token 0 reaches other tokens past attention",
    DynamicScale: "differ from the same tokens in the whole|reaches other tokens",
    ExpertCapacity: "differ from the same tokens in the whole|reaches other tokens",
    LengthInside: "computes with the number of tokens",
    RelativePlace: "computes with the number of tokens",
    PlaceFromTheEnd: "the captured graph differs from the model|differ from the same tokens in the whole",
    LooksAhead: "reaches other tokens past attention",
}


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.__name__)
def test_what_mixes_or_counts_tokens_is_refused(planted):
    model = llama()
    model.model.layers[1].mlp = planted(model.model.layers[1].mlp).eval()
    with pytest.raises(CaptureError, match=PLANTED[planted]) as refusal:
        capture_model(model)
    assert refusal.value.help
    assert refusal.value.where


class CountsPositions(Planted):
    """Learned positions by an arange of its own: legal once it reads position_ids."""

    def change(self, x):
        return x + self.table[torch.arange(x.shape[1])]


@pytest.fixture
def no_cache_of_its_own(monkeypatch):
    """Toys that count positions have no idea of a cache, so their own cached decoding is wrong."""
    monkeypatch.setattr("autospec.legality.check_cached", lambda model: None)


def test_a_model_whose_own_cache_is_wrong_is_refused():
    model = llama()
    model.model.layers[1].mlp = CountsPositions(model.model.layers[1].mlp).eval()
    with pytest.raises(CaptureError, match="transformers' cached decoding differs from its uncached forward"):
        capture_model(model)


def test_counted_positions_become_position_ids(no_cache_of_its_own):
    model = llama()
    model.model.layers[1].mlp = CountsPositions(model.model.layers[1].mlp).eval()
    captured = capture_model(model)
    (record,) = [record for record in captured.records if record.name == "bind-positions"]
    assert record.count == 1


def with_forward(model: Any, forward: Any) -> Any:
    """The model with another forward (of its inner model), as a subclass so that its signature is seen."""
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return model


def test_a_mask_made_of_tokens_is_refused():
    """Token 77 hides; no example of capture need contain it."""

    def forward(self, input_ids, position_ids=None, use_cache=None, **options):
        return super(type(self), self).forward(
            input_ids, attention_mask=(input_ids != 77).long(), position_ids=position_ids, use_cache=use_cache
        )

    with pytest.raises(CaptureError, match="mask"):
        capture_model(with_forward(llama(), forward))


def test_a_constant_padding_mask_is_no_mask(no_cache_of_its_own):
    def forward(self, input_ids, position_ids=None, use_cache=None, **options):
        return super(type(self), self).forward(
            input_ids, attention_mask=torch.ones_like(input_ids), position_ids=position_ids, use_cache=use_cache
        )

    assert capture_model(with_forward(llama(), forward)).facts.num_kv_layers == 2


def test_bidirectional_attention_is_refused():
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.config.is_causal = False
    with pytest.raises(CaptureError, match="mask"):
        capture_model(model)


def test_another_number_of_attention_calls_under_export_is_refused():
    model = llama()
    plain = model.model.layers[1].forward

    def forward(hidden, **options):
        if torch.compiler.is_compiling():
            return hidden
        return plain(hidden, **options)

    model.model.layers[1].forward = forward
    with pytest.raises(CaptureError, match="calls attention 2 times, but its graph has 1"):
        capture_model(model)


def test_a_graph_that_differs_from_the_model_is_refused():
    model = llama()
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: head(x) * (2 if torch.compiler.is_compiling() else 1)
    with pytest.raises(CaptureError, match="the captured graph differs from the model at batch 3, length 7"):
        capture_model(model)


def test_an_unknown_argument_of_attention_is_refused():
    model = llama()
    attend = model.model.layers[0].self_attn
    plain = attend.forward
    attend.forward = lambda *args, **options: plain(*args, **options, block_indices=torch.zeros(1))
    with pytest.raises(CaptureError, match="'block_indices', which autospec does not know"):
        capture_model(model)


def test_a_fixed_length_is_refused():
    model = llama()
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x.reshape(-1, 11, 64))
    with pytest.raises(CaptureError, match=r"constant 11|does not run at batch 3, length 7|cannot be exported"):
        capture_model(model)


def test_data_dependent_shapes_are_refused():
    model = llama()
    mlp = model.model.layers[0].mlp

    class Gathers(nn.Module):
        def forward(self, x):
            busy = (x.sum(-1) > 0).nonzero()
            return mlp(x) + busy.sum() * 0.0

    model.model.layers[0].mlp = Gathers()
    with pytest.raises(CaptureError, match=r"depend on its data|cannot be exported"):
        capture_model(model)


def test_a_branch_that_is_an_op_is_refused():
    model = llama()
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: torch.cond(x.shape[1] > 4, lambda y: y * 2.0, lambda y: y * 3.0, (plain(x),))
    with pytest.raises(CaptureError, match=r"the model calls torch\.cond"):
        capture_model(model)


def test_a_boolean_index_is_refused():
    """Export keeps it as a tensor of unknown size, which no step has room for (xmod)."""
    model = llama()
    mlp = model.model.layers[0].mlp

    class Selects(nn.Module):
        def forward(self, x):
            chosen = x.sum(-1) > 0
            return mlp(x).index_put((chosen,), mlp(x[chosen]))

    model.model.layers[0].mlp = Selects()
    with pytest.raises(CaptureError, match=r"the size of a tensor depends on the data in another"):
        capture_model(model)


def test_a_model_that_writes_to_its_buffers_is_refused():
    model = llama()
    mlp = model.model.layers[0].mlp
    mlp.register_buffer("seen", torch.zeros(()))
    plain = mlp.forward

    def forward(x):
        mlp.seen.add_(1.0)
        return plain(x)

    mlp.forward = forward
    with pytest.raises(CaptureError, match="writes to its own buffer"):
        capture_model(model)


@pytest.mark.parametrize("model_type", ["jamba", "qwen3_next", "lfm2", "doge", "xlnet", "dbrx"])
def test_real_families_that_cannot_be_decoded_by_pages(model_type):
    with pytest.raises(CaptureError) as refusal:
        capture_model(tiny_model(model_type))
    lines = str(refusal.value).splitlines()
    assert len(lines) >= 3, "a refusal says what, where and what to do"
    assert any(line.startswith("  help") for line in lines)


class ThresholdFarAway(Planted):
    """A step in the positions that no short probe reaches, counted by the model itself."""

    def change(self, x):
        place = torch.arange(x.shape[1])
        return x * (1 + torch.log1p(torch.floor(place / 1000.0)))[:, None].expand(*x.shape[:2], 1)


def test_a_far_threshold_reads_position_ids(no_cache_of_its_own):
    """Llama 4 scales queries so; captured as an arange, it was wrong past the first step only."""
    model = llama(max_position_embeddings=4096)
    model.model.layers[1].mlp = ThresholdFarAway(model.model.layers[1].mlp).eval()
    captured = capture_model(model)
    ids = torch.randint(2, 100, (1, 8))
    far = torch.arange(1996, 2004)[None]
    weights = dict(captured.weights)
    got = run_captured(captured.graph, weights, ids, far, token_local)
    near = run_captured(captured.graph, weights, ids, far - 1000, token_local)
    assert not torch.allclose(got[:, :4], got.new_zeros(())), "the probe runs"
    assert not torch.allclose(got, near)


def test_a_far_threshold_that_cannot_be_bound_is_refused(monkeypatch):
    monkeypatch.setattr(BindPositions, "run", lambda self, module, notes: 0)
    model = llama(max_position_embeddings=4096)
    model.model.layers[1].mlp = ThresholdFarAway(model.model.layers[1].mlp).eval()
    with pytest.raises(CaptureError, match="counts positions itself"):
        capture_model(model)


def test_a_branch_on_the_length_limits_the_positions():
    model = llama()
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: head(x * 2 if x.shape[1] > 100 else x)
    captured = capture_model(model)
    assert captured.facts.max_positions == 100
    assert any("another path for a longer text" in detail for record in captured.records for detail in record.details)


OF_ROWS = {
    "many tokens in all": (lambda x: x * 2 if x.numel() > 64 * 40 else x, r"only while 64\*batch\*length <= 2560"),
    "many rows": (lambda x: x * 2 if x.shape[0] > 3 else x, "only while batch <= 3"),
    "a remainder": (lambda x: x if x.shape[1] % 16 else x * 2, r"only while Ne\(Mod\(length, 16\), 0\)"),
    "one token of one row": (lambda x: x * 2 if x.numel() == 64 else x, "cached decoding differs"),
    "a row's number": (lambda x: x * torch.arange(1, x.shape[0] + 1)[:, None, None], "decoded alone differ"),
}


@pytest.mark.parametrize("name", OF_ROWS)
def test_what_depends_on_the_rows_that_are_read_at_once_is_refused(name):
    change, rule = OF_ROWS[name]
    model = llama()
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: head(change(x))
    with pytest.raises(CaptureError, match=rule):
        capture_model(model)


def test_a_table_of_positions_limits_them():
    """A configuration may promise more positions than the table has rows."""
    model = tiny_model("opt", num_hidden_layers=1)
    model.config.max_position_embeddings = 1000
    assert capture_model(model).facts.max_positions == 256


def test_a_cache_that_forgets_limits_the_positions():
    """The cache has a window that the masks do not have: transformers' cached and uncached texts differ past it."""
    captured = capture_model(tiny_model("moshi", num_hidden_layers=2, sliding_window=40))
    assert captured.facts.max_positions == 40
    assert any("own cache forgets" in detail for record in captured.records for detail in record.details)
