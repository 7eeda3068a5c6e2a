"""Models to export: the bundled one with its drafters, and tiny ones of several families."""

from __future__ import annotations

import functools
from typing import Any

from autospec.api import Limits, OptimizedModel
from autospec.assemble import capture_model
from autospec.capture_head import capture_head
from autospec.config import DraftTargetConfig, Eagle3Config, NGramConfig
from autospec.loading import load_draft_head, load_model
from autospec.model_zoo.bundled import resolve
from autospec.program import CapturedModel
from harness.models import captured, tiny
from harness.programs import DRAFTERS

KINDS: dict[str, Any] = {
    "ngram": NGramConfig(max_draft_len=4),
    "draft": DraftTargetConfig(resolve("bundled:draft"), max_draft_len=2),
    "eagle3": Eagle3Config(resolve("bundled:eagle3"), max_draft_len=3, dynamic_tree_max_topk=2, max_total_draft_tokens=6),
}


@functools.cache
def demo(kind: str) -> OptimizedModel:
    """The bundled model with a drafter, running eagerly; it is captured once."""
    module, target = _demo_target()
    speculation, draft = KINDS[kind], None
    if kind == "draft":
        draft = capture_model(load_model(speculation.speculative_model, "speculative_model", like=module), "draft")
    if kind == "eagle3":
        draft = capture_head(load_draft_head(speculation.speculative_model, module), target)
    sources = {"target": resolve("bundled:target"), "draft": kind}
    return OptimizedModel(target, draft, speculation, "eager", Limits(None, 64, None), {}, sources=sources)


@functools.cache
def _demo_target() -> tuple[Any, CapturedModel]:
    module = load_model("bundled:target", "model").float()  # stored as bfloat16, where near ties could flip
    return module, capture_model(module)


@functools.cache
def family(name: str) -> OptimizedModel:
    """A tiny random model of a family with n-gram drafts."""
    captured = capture_model(tiny(name, seed=4))
    return OptimizedModel(captured, None, NGramConfig(max_draft_len=3), "eager", Limits(None, 64, None), {})


def tiny_optimized(drafter: str) -> OptimizedModel:
    """What optimize() returns for the tiny target, without capturing it again."""
    speculation, draft = DRAFTERS[drafter]
    model = captured(draft) if draft else None
    return OptimizedModel(captured("target"), model, speculation, "eager", Limits(None, 96, 8), {"pad_token_id": 0})
