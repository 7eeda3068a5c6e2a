"""recognize-mla: latent attention spelt in many ways becomes one op of the same meaning; the rest stays, with reasons."""

from __future__ import annotations

import pytest
import torch
from harness.graphs import VOCAB, captured_graph, check_golden, evaluate
from harness.latents import Dims, LatentLayer, broadcast, concatenated, latent_graph, symbol_text, two_projections, written
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.ir.caches import bytes_per_token, kept_rows
from autospec.ir.match import argument, calls, operand
from autospec.ir.runner import run_pass
from autospec.kernels.attention import attention
from autospec.kernels.latent_attention import latent_attention
from autospec.legality import run_captured
from autospec.passes.recognize_mla import RecognizeMla

SPELLINGS = [concatenated, written, broadcast, two_projections]


def check_meaning(spell, dims, options=None):
    module, weights = latent_graph(spell, dims, options, num_layers=2)
    inputs = [torch.randint(0, VOCAB, shape) for shape in ((1, 1), (1, 4), (3, 7))]
    places = [torch.arange(ids.shape[1]).expand_as(ids) for ids in inputs]
    before = [run_captured(module, weights, *pair) for pair in zip(inputs, places, strict=True)]
    record = run_pass(module, RecognizeMla())
    assert (record.count, record.refusals) == (2, ())
    assert not list(calls(module, attention))
    for node in calls(module, latent_attention):
        assert argument(node, "scale") == 0.4
        latent, k_rope, w_uk, w_uv = (operand(node, i).meta["val"].shape for i in range(2, 6))
        assert (latent[2], k_rope[2]) == (dims.kv_lora_rank, dims.qk_rope_head_dim)
        assert tuple(w_uk) == (dims.num_heads, dims.qk_nope_head_dim, dims.kv_lora_rank)
        assert tuple(w_uv) == (dims.num_heads, dims.v_head_dim, dims.kv_lora_rank)
    for ids, place, expected in zip(inputs, places, before, strict=True):
        torch.testing.assert_close(run_captured(module, weights, ids, place), expected, rtol=0, atol=2e-6)
    assert run_pass(module, RecognizeMla()).count == 0


@pytest.mark.parametrize("spell", SPELLINGS, ids=lambda spell: spell.__name__)
def test_meaning(spell):
    check_meaning(spell, Dims())


def test_sinks_stay_sinks():
    check_meaning(concatenated, Dims(), {"sinks": torch.tensor([-1.0, 0.5, 2.0])})


@settings(max_examples=8)
@given(
    spell=st.sampled_from(SPELLINGS), heads=st.integers(2, 5), rank=st.integers(1, 6), nope=st.integers(1, 6),
    rope=st.sampled_from([2, 4]), v_width=st.integers(1, 6),
)  # fmt: skip
def test_meaning_for_any_sizes(spell, heads, rank, nope, rope, v_width):
    if rank + rope >= heads * (nope + rope + v_width):
        rank = 1
    check_meaning(spell, Dims(12, heads, rank, nope, rope, v_width))


def test_text():
    module, _ = latent_graph(written)
    run_pass(module, RecognizeMla())
    check_golden("recognize_mla", symbol_text(module))


def biased(layer, q, latent, k_rope):
    kv_b_proj, layer.kv_b_proj = layer.kv_b_proj, layer.biased
    parts = concatenated(layer, q, latent, k_rope)
    layer.kv_b_proj = kv_b_proj
    return parts


def values_read_twice(layer, q, latent, k_rope):
    q, k, v = concatenated(layer, q, latent, k_rope)
    return q + v.mean(-1, keepdim=True), k, v


def heads_interleaved(layer, q, latent, k_rope):
    """Element j of all heads, then element j + 1: the rows of a head are not one block."""
    q, k, v = concatenated(layer, q, latent, k_rope)
    nope = layer.dims.qk_nope_head_dim
    mixed = k[..., :nope].transpose(1, 2).flatten(2).unflatten(2, (nope, -1)).permute(0, 3, 1, 2)
    return q, torch.cat([mixed, k[..., nope:]], -1), v


def other_tokens_rows(layer, q, latent, k_rope):
    q, k, v = concatenated(layer, q, latent, k_rope)
    return q, k, torch.cat([v[:, :, :1], v[:, :, :-1]], 2)


def keys_shared_by_pairs(layer, q, latent, k_rope):
    q, k, v = concatenated(layer, q, latent, k_rope)
    return q.repeat_interleave(2, 1), k, v


def flat_latent(layer, q, latent, k_rope):
    rows = layer.kv_b_proj(latent.reshape(-1, latent.shape[-1])).view(*latent.shape[:2], -1)
    kv_b_proj, layer.kv_b_proj = layer.kv_b_proj, torch.nn.Identity()
    parts = concatenated(layer, q, rows, k_rope)
    layer.kv_b_proj = kv_b_proj
    return parts


REFUSED = [
    (concatenated, {"window": 3}, Dims(), "but it has a window of 3"),
    (concatenated, {"chunk": 4}, Dims(), "but it has chunks of 4"),
    (concatenated, {"softcap": 5.0}, Dims(), r"but it has a softcap of 5\.0"),
    (keys_shared_by_pairs, {}, Dims(), "6 query heads share 3 heads of keys made of a latent"),
    (biased, {}, Dims(), "the projection of its latent has a bias"),
    (values_read_twice, {}, Dims(), r"%mean\S* reads what is projected from its latent, too"),
    (heads_interleaved, {}, Dims(), "not grouped by head"),
    (other_tokens_rows, {}, Dims(), "not grouped by head"),
    (flat_latent, {}, Dims(), r"its latent has the shape \[s\d+\*s\d+, 8\], which is not a row per token"),
    (concatenated, {}, Dims(64, 2, 40, 4, 2, 4), "a latent row of 42 is no narrower than keys and values of 20"),
]


@pytest.mark.parametrize(("spell", "options", "dims", "reason"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_refusals_have_reasons(spell, options, dims, reason):
    module, _ = latent_graph(spell, dims, options)
    record = run_pass(module, RecognizeMla())
    assert record.count == 0
    assert len(record.refusals) == 1
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(record.refusals[0].reason)


def keys_of_their_own(layer, q, latent, k_rope):
    """Rotated per head: no part is shared, so it is ordinary attention."""
    q, k, v = concatenated(layer, q, latent, k_rope)
    return q, k * 2.0, v


def test_ordinary_attention_is_nobodys_business():
    module, _ = latent_graph(keys_of_their_own)
    record = run_pass(module, RecognizeMla())
    assert (record.count, record.refusals) == (0, ())


class Head(torch.nn.Module):
    """A draft head of one latent layer over the target's features."""

    def __init__(self):
        super().__init__()
        self.layer = LatentLayer(Dims(), written, {})

    def forward(self, input_ids, hidden, position_ids):
        return (self.layer(hidden + input_ids[..., None], position_ids),)


def test_a_draft_head_keeps_latents_too():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    module, weights = captured_graph(Head(), {"input_ids": ids, "hidden": torch.zeros(2, 5, 16), "position_ids": ids.clone()})
    inputs = {"input_ids": ids + 1, "hidden": torch.randn(2, 5, 16), "position_ids": torch.arange(5).expand(2, -1)}
    before = evaluate(module, {**inputs, **weights})[0]
    assert (len(kept_rows(module)), bytes_per_token(module)) == (1, 3 * (6 + 5) * 4)
    assert run_pass(module, RecognizeMla()).count == 1
    assert (len(kept_rows(module)), bytes_per_token(module)) == (1, (8 + 2) * 4)
    torch.testing.assert_close(evaluate(module, {**inputs, **weights})[0], before, rtol=0, atol=2e-6)
