"""autospec: a graph compiler for lossless speculative decoding of any Hugging Face causal LM.

    fast = autospec.optimize(model, autospec.NGramConfig(max_draft_len=8))
    out = fast.generate(input_ids, max_new_tokens=256)      # the tokens that model.generate would give
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "optimize": "api", "OptimizedModel": "api", "export": "api", "load": "loaded", "LoadedModel": "loaded",
    "NGramConfig": "config", "DraftTargetConfig": "config", "AutoConfig": "config",
    "Eagle3Config": "config", "MedusaConfig": "config", "MTPConfig": "config",
    "AutospecError": "errors", "CaptureError": "errors", "OptionError": "errors", "CapacityError": "errors",
    "CheckpointError": "errors", "LoweringError": "errors", "ArtifactError": "errors",
}  # fmt: skip

if TYPE_CHECKING:
    from autospec.api import OptimizedModel, export, optimize
    from autospec.config import AutoConfig, DraftTargetConfig, Eagle3Config, MedusaConfig, MTPConfig, NGramConfig
    from autospec.errors import (
        ArtifactError,
        AutospecError,
        CapacityError,
        CaptureError,
        CheckpointError,
        LoweringError,
        OptionError,
    )
    from autospec.loaded import LoadedModel, load

__all__ = [
    "ArtifactError", "AutoConfig", "AutospecError", "CapacityError", "CaptureError", "CheckpointError", "DraftTargetConfig",
    "Eagle3Config", "LoadedModel", "LoweringError", "MTPConfig", "MedusaConfig", "NGramConfig", "OptimizedModel", "OptionError",
    "export", "load", "optimize",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import lazily: `import autospec` alone loads no torch."""
    if name in _HOME:
        return getattr(importlib.import_module(f"autospec.{_HOME[name]}"), name)
    raise AttributeError(f"module 'autospec' has no attribute '{name}'")
