"""recognize-dsa: an indexer spelt in several ways becomes one op of the same meaning; the rest stays, with reasons."""

from __future__ import annotations

import pytest
import torch
from harness.graphs import VOCAB, check_golden
from harness.indexers import Indexer, indexers, unscaled, written
from harness.latents import concatenated, latent_graph, symbol_text

from autospec.errors import CaptureError
from autospec.ir.caches import bytes_per_token, index_keys, kept_rows
from autospec.ir.match import argument, calls, operand
from autospec.ir.runner import run_pass
from autospec.kernels.latent_attention import latent_attention
from autospec.kernels.select_keys import select_keys, top_keys
from autospec.legality import check_selections, run_captured
from autospec.passes.recognize_dsa import RecognizeDsa
from autospec.passes.recognize_mla import RecognizeMla


def selecting(scores, *which):
    return latent_graph(concatenated, num_layers=len(which), indexers=indexers(scores, *which))


@pytest.mark.parametrize(("scores", "scale"), [(written, 0.4), (unscaled, 1.0)])
def test_meaning(scores, scale):
    module, weights = selecting(scores, True, True)
    inputs = [torch.randint(0, VOCAB, shape) for shape in ((1, 1), (1, 4), (3, 9))]
    places = [torch.arange(ids.shape[1]).expand_as(ids) for ids in inputs]
    before = [run_captured(module, weights, *pair) for pair in zip(inputs, places, strict=True)]
    assert run_pass(module, RecognizeMla()).count == 2
    record = run_pass(module, RecognizeDsa())
    assert (record.count, record.refusals) == (2, ())
    check_selections("toy", module, ())
    for node in calls(module, select_keys):
        q, head_weights, k = (operand(node, index).meta["val"] for index in range(3))
        assert (q.shape[2:], head_weights.shape[2:], k.shape[2:]) == ((5, 6), (5,), (6,))
        assert (argument(node, "scale"), argument(node, "index_topk")) == (scale, 3)
    for ids, place, expected in zip(inputs, places, before, strict=True):
        torch.testing.assert_close(run_captured(module, weights, ids, place), expected, rtol=0, atol=2e-6)
    assert run_pass(module, RecognizeDsa()).count == 0


def test_text():
    module, _ = selecting(written, True)
    run_pass(module, RecognizeMla())
    run_pass(module, RecognizeDsa())
    check_golden("recognize_dsa", symbol_text(module))


def test_a_layer_that_shares_a_selection_keeps_no_keys():
    module, _ = selecting(written, True, False)
    run_pass(module, RecognizeMla())
    record = run_pass(module, RecognizeDsa())
    assert (record.count, record.details) == (1, ("1 attention calls share the selection of another",))
    (select,) = calls(module, select_keys)
    assert [argument(node, "indices") for node in calls(module, latent_attention)] == [select, select]
    assert (len(kept_rows(module)), len(index_keys(module))) == (2, 1)
    assert bytes_per_token(module) == 2 * (8 + 2) * 4 + 6 * 4


def no_relu(q, weights, k):
    scores = torch.matmul(q, k.transpose(-1, -2).unsqueeze(1)) * 0.4
    return torch.matmul(weights.unsqueeze(-2), scores).squeeze(-2)


def best_head(q, weights, k):
    return torch.relu(torch.matmul(q, k.transpose(-1, -2).unsqueeze(1))).amax(2)


def biased(q, weights, k):
    return torch.matmul(weights.unsqueeze(-2), torch.relu(torch.matmul(q, k.transpose(-1, -2).unsqueeze(1)) + 1.0)).squeeze(-2)


def rounded(q, weights, k):
    scores = torch.relu(torch.matmul(q.bfloat16(), k.transpose(-1, -2).bfloat16().unsqueeze(1)))
    return torch.matmul(weights.bfloat16().unsqueeze(-2), scores).squeeze(-2)


def rounded_between(q, weights, k):
    return written(q, weights, k).bfloat16().float()


def other_tokens_keys(q, weights, k):
    return written(q, weights, torch.cat([k[:, 1:], k[:, :1]], 1))


def flipped_queries(q, weights, k):
    return written(torch.cat([q[..., 1:], q[..., :1]], -1).transpose(2, 3).reshape(q.shape), weights, k)


def other_tokens_scores(q, weights, k):
    scores = written(q, weights, k)
    return torch.cat([scores[:, :1], scores[:, :-1]], 1)


REFUSED = {
    no_relu: "do not pass a relu", best_head: "not a product of head weights and head scores",
    biased: "not a scaled product of queries and keys", rounded: r"%matmul is computed in torch\.bfloat16",
    rounded_between: "not a product of head weights and head scores", other_tokens_scores: "not a product of head weights",
}  # fmt: skip


@pytest.mark.parametrize("scores", REFUSED, ids=lambda scores: scores.__name__)
def test_refusals_have_reasons(scores):
    module, _ = selecting(scores, True)
    run_pass(module, RecognizeMla())
    record = run_pass(module, RecognizeDsa())
    assert (record.count, len(record.refusals)) == (0, 1)
    assert len(list(calls(module, top_keys))) == 1
    with pytest.raises(CaptureError, match=REFUSED[scores]):
        check_selections("toy", module, record.refusals)


@pytest.mark.parametrize("scores", [other_tokens_keys, flipped_queries], ids=lambda scores: scores.__name__)
def test_what_is_moved_is_taken_as_it_stands(scores):
    """Rows that movement made are rows like any other: whether tokens mix in them is what capture probes."""
    module, weights = selecting(scores, True)
    ids = torch.randint(0, VOCAB, (2, 7))
    places = torch.arange(7).expand_as(ids)
    before = run_captured(module, weights, ids, places)
    run_pass(module, RecognizeMla())
    assert run_pass(module, RecognizeDsa()).count == 1
    torch.testing.assert_close(run_captured(module, weights, ids, places), before, rtol=0, atol=2e-6)


def test_selected_keys_that_are_no_latents_are_refused():
    """A window is no latent attention; that its keys are selected makes it a refusal instead of ordinary attention."""
    module, _ = latent_graph(concatenated, options={"window": 3}, indexers=indexers(written, True))
    refusals = [*run_pass(module, RecognizeMla()).refusals, *run_pass(module, RecognizeDsa()).refusals]
    with pytest.raises(CaptureError, match=r"attention to selected keys was not recognised: .* has a window of 3"):
        check_selections("toy", module, refusals)


def test_the_reference_hides_later_keys():
    indexer = Indexer(written)
    x, positions = torch.randn(2, 8, 16), torch.arange(8).expand(2, -1)
    chosen = indexer(x, positions)
    for length in range(1, 8):
        part = indexer(x[:, :length], positions[:, :length])
        assert torch.equal(part, chosen[:, :length])
        assert bool((part[:, -1] < length).all())
        assert int((part[0, -1] >= 0).sum()) == min(length, 3)
