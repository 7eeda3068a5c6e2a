"""Masks are classified from what they show: windows and chunks are found, anything else is refused with a reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.errors import CaptureError
from autospec.masks import HIDDEN, MaskSpec, UnknownMask, mask_row, spec_of_rows, spec_of_scores

LENGTH = 300
EDGES = st.integers(1, 280)


def row_of(spec: MaskSpec):
    return lambda query, length: spec.row(query, length)


@given(window=EDGES)
def test_windows_are_found(window):
    assert spec_of_rows(row_of(MaskSpec(window=window)), LENGTH) == MaskSpec(window=window)


@given(chunk=EDGES)
def test_chunks_are_found(chunk):
    """A chunk that the last position just opened looks like a window of 1, so the row before decides."""
    found = spec_of_rows(row_of(MaskSpec(chunk=chunk)), LENGTH)
    assert isinstance(found, MaskSpec)
    for query in range(LENGTH):
        assert torch.equal(found.row(query, LENGTH), MaskSpec(chunk=chunk).row(query, LENGTH))


def test_causal_masks_have_no_edge():
    assert spec_of_rows(row_of(MaskSpec()), LENGTH) == MaskSpec()
    assert spec_of_rows(row_of(MaskSpec(window=LENGTH + 5)), LENGTH) == MaskSpec()


@pytest.mark.parametrize("max_positions", [1, 2, 3])
def test_a_model_of_few_positions(max_positions):
    assert spec_of_rows(row_of(MaskSpec()), max_positions) == MaskSpec()


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), flips=st.integers(1, 5), window=st.sampled_from([0, 0, 7, 40]))
def test_a_mask_with_a_wrong_answer_among_the_first_rows_is_refused(seed, flips, window):
    generator = torch.Generator().manual_seed(seed)
    matrix = MaskSpec(window=window).matrix(90)
    for _ in range(flips):
        query, key = torch.randint(0, 90, (2,), generator=generator).tolist()
        matrix[query, key] = ~matrix[query, key]
    if torch.equal(matrix, MaskSpec(window=window).matrix(90)):
        return
    assert isinstance(spec_of_rows(lambda query, length: matrix[query, :length], 90), str)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), density=st.floats(0.05, 0.95))
def test_garbage_is_refused(seed, density):
    matrix = torch.rand(64, 64, generator=torch.Generator().manual_seed(seed)) < density
    assert isinstance(spec_of_rows(lambda query, length: matrix[query, :length], 64), str)


@pytest.mark.parametrize(
    ("name", "shows"),
    [
        ("bidirectional", lambda query, key: torch.ones_like(key, dtype=torch.bool)),
        ("prefix", lambda query, key: (key <= query) | ((key < 5) & (query < 5))),
        ("strictly before", lambda query, key: key < query),
        ("first tokens stay", lambda query, key: (key <= query) & ((key > query - 16) | (key < 4))),
        ("every other", lambda query, key: (key <= query) & ((query - key) % 2 == 0)),
        ("window of the future", lambda query, key: (key - query).abs() < 4),
        ("two windows", lambda query, key: (key <= query) & (key > query - torch.where(query > 50, 9, 20))),
    ],
)
def test_other_masks_are_refused(name, shows):
    found = spec_of_rows(lambda query, length: shows(torch.tensor(query), torch.arange(length)), LENGTH)
    assert isinstance(found, str), f"{name} was taken for {found}"


def test_transformers_own_masks():
    from transformers import masking_utils as hf

    assert spec_of_rows(mask_row(hf.causal_mask_function), LENGTH) == MaskSpec()
    assert spec_of_rows(mask_row(hf.sliding_window_causal_mask_function(17)), LENGTH) == MaskSpec(window=17)
    no_padding = torch.zeros(1, dtype=torch.long)
    assert spec_of_rows(mask_row(hf.chunked_causal_mask_function(16, no_padding)), LENGTH) == MaskSpec(chunk=16)
    assert isinstance(spec_of_rows(mask_row(hf.bidirectional_mask_function), LENGTH), str)


SCORES = st.fixed_dictionaries(
    {"scale": st.sampled_from([1.0, 0.25, 0.7]), "window": st.sampled_from([0, 0, 5]), "slope": st.sampled_from([0.0, 0.5, 0.1])}
)


def scores(length, scale, window, slope, heads=2):
    position = torch.arange(length, dtype=torch.float64)
    bias = slope * torch.arange(1, heads + 1, dtype=torch.float64)[:, None, None] * position
    shown = MaskSpec(window=window).matrix(length)
    bias = torch.where(shown, bias.expand(heads, length, length), torch.finfo(torch.float32).min)
    return torch.full((1, heads, length, length), scale, dtype=torch.float64), bias[None]


@given(wanted=SCORES)
def test_scores_tell_scale_mask_and_slopes(wanted):
    found = spec_of_scores(*scores(40, **wanted))
    assert not isinstance(found, str), found
    assert (found.scale, found.softcap, found.mask) == (wanted["scale"], 0.0, MaskSpec(window=wanted["window"]))
    slopes = [wanted["slope"], 2 * wanted["slope"]] if wanted["slope"] else []
    assert found.slopes == pytest.approx(slopes)


@given(wanted=SCORES, seed=st.integers(0, 10**6), what=st.sampled_from(["scale", "hide", "show", "bias"]))
def test_one_wrong_score_is_refused(wanted, seed, what):
    factor, bias = (tensor.clone() for tensor in scores(40, **wanted))
    generator = torch.Generator().manual_seed(seed)
    head, query = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((0, 2), (6, 40)))
    key = query - int(torch.randint(1, 4, (), generator=generator))
    if what == "scale":
        factor[0, head, query, key] *= 1.01
    elif what == "hide":
        bias[0, head, query, key] = float("-inf")
    elif what == "show":
        bias[0, head, key, query] = 0.0
    else:
        bias[0, head, query, key] += 0.01
    assert isinstance(spec_of_scores(factor, bias), str)


def test_a_weak_mask_is_a_bias():
    """-100 does not hide a key for certain."""
    factor, bias = scores(20, 1.0, 0, 0.0)
    assert isinstance(spec_of_scores(factor, bias.clamp(min=-100.0)), str)
    assert not isinstance(spec_of_scores(factor, bias.clamp(min=HIDDEN - 1)), str)


@pytest.mark.parametrize("compute", [lambda m: m + 1, lambda m: m[:, 0], lambda m: m.shape, lambda m: ~m, lambda m: 2 * m])
@pytest.mark.parametrize("mask", [MaskSpec(window=3), UnknownMask("it is made of data")])
def test_computing_with_a_symbolic_mask_is_a_refusal(compute, mask):
    with pytest.raises(CaptureError, match="keeps symbolic"):
        compute(mask)


def hidden_scores(mask, scores):
    return scores.masked_fill(~mask[:, 0, :, :], float("-inf"))


def test_an_indexer_may_ask_a_causal_mask_for_the_best_keys():
    scores = torch.randn(2, 6, 6)
    best = hidden_scores(MaskSpec(), scores)
    chosen = best.topk(min(4, best.shape[-1]), dim=-1).indices
    wanted = scores.masked_fill(~MaskSpec().matrix(6), float("-inf")).topk(4, dim=-1).indices
    for row in range(2):
        for token in range(6):
            kept = min(4, token + 1)
            assert set(chosen[row, token, :kept].tolist()) == set(wanted[row, token, :kept].tolist())
            assert chosen[row, token, kept:].tolist() == [-1] * (4 - kept)


@pytest.mark.parametrize(
    "compute",
    [
        lambda mask, scores: scores.masked_fill(mask[:, 0], float("-inf")),
        lambda mask, scores: scores.masked_fill(~mask[:, 0], -1e9),
        lambda mask, scores: scores[:, None].masked_fill(~mask[:, 0], float("-inf")),
        lambda mask, scores: torch.where(mask[:, 0], scores, 0.0),
        lambda mask, scores: scores * mask[:, 0],
        lambda mask, scores: mask[:, 0].float(),
        lambda mask, scores: mask[:, :1],
        lambda mask, scores: hidden_scores(mask, scores).softmax(-1),
        lambda mask, scores: hidden_scores(mask, scores) * 2,
        lambda mask, scores: hidden_scores(mask, scores).topk(2, dim=1),
        lambda mask, scores: hidden_scores(mask, scores).topk(2, dim=-1, largest=False),
        lambda mask, scores: hidden_scores(MaskSpec(chunk=3), scores),
    ],
)
def test_nothing_else_may_be_asked(compute):
    with pytest.raises(CaptureError, match="keeps symbolic"):
        compute(MaskSpec(), torch.randn(2, 6, 6))
