"""optimize(): what it records, leaves out and prints; the automatic draft length end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.models import model

import autospec
from autospec.api import OptimizedModel

PLAIN = {"do_sample": False, "pad_token_id": 0}


def _hits(fast: OptimizedModel, name: str) -> set[int]:
    return {record.count for record in fast.program.records if record.name == name}


def test_passes_leaves_optional_passes_out() -> None:
    target = model("target")
    fast = autospec.optimize(target, "ngram", compile="eager", passes=["-fuse-linears", "-fold-noops"])
    assert _hits(fast, "fuse-linears") == _hits(fast, "fold-noops") == {0}
    assert not any("+" in name for name in fast.program.weights)
    assert fast.explain().count("left out by passes=") == 4  # two passes in prefill and in the step
    expected = target.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=20, **PLAIN)
    assert torch.equal(fast.generate([[3, 4, 5]], max_new_tokens=20, **PLAIN), expected)


def test_without_it_all_passes_run(optimized: Any) -> None:
    fast = optimized("ngram")
    assert _hits(fast, "fuse-linears") == {4}
    assert "left out" not in fast.explain()


def test_explain_names_every_pass_and_kernel(optimized: Any) -> None:
    text = optimized("small").explain()
    for word in ("LlamaForCausalLM: 2 KV layers", "draft LlamaForCausalLM: 1 KV layers behind the target's", "prefill",
                 "step_4", "page-kv-cache", "attach-draft-model", "paged_attention: cpu",
                 "memory: weights"):  # fmt: skip
        assert word in text, word


def test_the_table_is_printed_on_request(
    optimized: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOSPEC_DEBUG", "table")
    known = optimized("plain")
    fresh = OptimizedModel(known.target, None, None, "eager", known.limits, {})
    fresh.generate([[1, 2]], max_new_tokens=2)
    assert "page-kv-cache" in capsys.readouterr().out


def test_auto_uses_long_steps_where_drafts_are_right_and_plain_ones_where_not(optimized: Any) -> None:
    """Forced into a loop by a large reward for repetition, n-grams are always right; random text defeats them."""
    fast = optimized("auto")
    prompt = [[1, 2, 3, 1, 2, 3, 1, 2, 3]]
    for options, favourite in (({"repetition_penalty": 0.05}, 4), ({"repetition_penalty": 5.0}, 0)):
        fast.generate(prompt, max_new_tokens=1, **PLAIN, **options)
        fast.session._seconds = {0: 1.0, 2: 1.1, 4: 1.2}
        outs = [fast.generate(prompt, max_new_tokens=100, **PLAIN, **options) for _ in range(2)]
        assert torch.equal(*outs)
        steps = fast.metrics.steps
        assert max(steps, key=steps.__getitem__) == favourite, steps
        plain = optimized("plain").generate(prompt, max_new_tokens=100, **PLAIN, **options)
        assert torch.equal(outs[0], plain)


def test_the_model_is_left_as_it_was_found() -> None:
    target = model("small")
    before = (target.config.to_dict(), target.config._attn_implementation, dict(target.state_dict()))
    weights = {name: tensor.data_ptr() for name, tensor in target.state_dict().items()}
    autospec.optimize(target, None, compile="eager")
    assert target.config.to_dict() == before[0]
    assert target.config._attn_implementation == before[1]
    assert {name: tensor.data_ptr() for name, tensor in target.state_dict().items()} == weights


def test_a_truncated_draft(optimized: Any) -> None:
    """num_draft_layers=1 of a draft with two: it drafts with one KV layer, and the tokens stay."""
    target = model("target")
    draft = autospec.DraftTargetConfig(target, max_draft_len=3, num_draft_layers=1)
    fast = autospec.optimize(target, draft, compile="eager")
    assert fast.draft is not None
    assert fast.draft.facts.num_kv_layers == 1
    assert target.config.num_hidden_layers == 2
    out = fast.generate([[3, 4, 5]], max_new_tokens=30, **PLAIN)
    assert torch.equal(out, optimized("plain").generate([[3, 4, 5]], max_new_tokens=30, **PLAIN))
