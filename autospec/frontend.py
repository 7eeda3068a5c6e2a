"""What a user names -> captured graphs: loads target and draft, checks that they fit, captures them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autospec.assemble import Draft, capture_model
from autospec.capture_head import capture_head
from autospec.config import DraftTargetConfig, Eagle3Config, MedusaConfig, MTPConfig, Speculation
from autospec.errors import CapacityError
from autospec.hollow import filled
from autospec.loading import (
    check_causal_lm,
    check_children,
    check_draft,
    check_head,
    draft_layers,
    load_draft_head,
    load_model,
    load_mtp_modules,
)
from autospec.program import CapturedModel


@dataclass(frozen=True)
class Captured:
    """Target and draft as graphs.

    Args:
        defaults: the target's generation config.
        sources: where "target" and "draft" came from: a folder or hub id, or a class name if that is not known.
    """

    target: CapturedModel
    draft: Draft | None
    defaults: Mapping[str, Any]
    sources: Mapping[str, str]


def capture_all(model: Any, speculation: Speculation, max_length: int | None = None) -> Captured:
    """Capture a target and the draft of a configuration; `max_length` must fit the target."""
    module = load_model(model, "model")
    check_causal_lm(module)
    with filled(module):
        return _capture(module, speculation, max_length)


def _capture(module: Any, speculation: Speculation, max_length: int | None) -> Captured:
    target = capture_model(module)
    if max_length is not None and max_length > target.facts.max_positions:
        raise CapacityError(
            f"max_length is {max_length}, but the model has {target.facts.max_positions} positions",
            at=f"max_length={max_length}", where=target.facts.name, help="choose a smaller max_length",
        )  # fmt: skip
    draft: Draft | None = None
    sources = {"target": _source(module)}
    if isinstance(speculation, (Eagle3Config, MedusaConfig)):
        head = load_draft_head(speculation.speculative_model, module)
        draft = capture_head(head, target)
        check_head(speculation, draft)
        sources["draft"] = _source(head, speculation.speculative_model)
    if isinstance(speculation, MTPConfig):
        modules = load_mtp_modules(speculation, module)
        draft = capture_head(modules, target)
        check_head(speculation, draft)
        sources["draft"] = modules.report.source if modules.report else _source(modules)
    if isinstance(speculation, DraftTargetConfig):
        draft_module = load_model(speculation.speculative_model, "speculative_model", like=module)
        check_draft(module, draft_module)
        check_children(speculation, target.facts.vocab_size)
        with draft_layers(draft_module, speculation.num_draft_layers):
            draft = capture_model(draft_module, "draft")
        sources["draft"] = _source(draft_module)
    config = getattr(module, "generation_config", None)
    return Captured(target, draft, config.to_dict() if config is not None else {}, sources)


def _source(module: Any, named: Any = None) -> str:
    """The folder or hub id of a loaded module."""
    path = named if isinstance(named, str) else getattr(getattr(module, "config", None), "_name_or_path", "")
    return str(path) or type(module).__name__
