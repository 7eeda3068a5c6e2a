"""A draft in float8 is another draft: the tokens stay the target's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.models import head, model

import autospec

TREE = {"max_draft_len": 3, "dynamic_tree_max_topk": 2, "max_total_draft_tokens": 5}


@pytest.mark.parametrize("sampled", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "seed": 3}])
@pytest.mark.parametrize(
    "make", [lambda **o: autospec.Eagle3Config(head("eagle"), **o), lambda **o: autospec.DraftTargetConfig(model("small"), **o)]
)
def test_tokens_stay(make: Any, sampled: dict[str, Any]) -> None:
    target = model("target")
    prompts = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 20, "pad_token_id": 0, **sampled}
    plain = autospec.optimize(target, None, compile="eager").generate(prompts, **options)
    fast = autospec.optimize(target, make(draft_quantization="fp8", **TREE), compile="eager")
    assert torch.equal(fast.generate(prompts, **options), plain)
    counts = {record.graph: record.count for record in fast.program.records if record.name == "quantize-draft"}
    step = next(name for name in counts if name.startswith("step"))
    assert counts[step] > 0, "nothing was quantised"
    layers = [node for node in fast.program.graphs[step].module.graph.nodes if "fused_linear" in str(node.target)]  # type: ignore[union-attr]
    assert len(layers) == counts[step]


def test_a_target_in_float8_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law above is about drafts: with the target's weights rounded as well, the tokens change."""
    monkeypatch.setattr("autospec.pipeline.WEIGHT_PREFIX", "")
    with pytest.raises(AssertionError):
        test_tokens_stay(lambda **o: autospec.Eagle3Config(head("eagle"), **o), {"do_sample": False})
