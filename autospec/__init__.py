"""autospec: a graph compiler for lossless speculative decoding of any Hugging Face causal LM.

    fast = autospec.optimize(model, autospec.NGramConfig(max_draft_len=8))
    out = fast.generate(input_ids, max_new_tokens=256)      # the tokens that model.generate would give
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "optimize": "api", "OptimizedModel": "api",
    "NGramConfig": "config", "DraftTargetConfig": "config", "AutoConfig": "config",
    "Eagle3Config": "config", "MedusaConfig": "config",
    "AutospecError": "errors", "CaptureError": "errors", "OptionError": "errors", "CapacityError": "errors",
    "CheckpointError": "errors", "LoweringError": "errors",
}  # fmt: skip

if TYPE_CHECKING:
    from autospec.api import OptimizedModel, optimize
    from autospec.config import AutoConfig, DraftTargetConfig, Eagle3Config, MedusaConfig, NGramConfig
    from autospec.errors import (
        AutospecError,
        CapacityError,
        CaptureError,
        CheckpointError,
        LoweringError,
        OptionError,
    )

__all__ = [
    "AutoConfig", "AutospecError", "CapacityError", "CaptureError", "CheckpointError", "DraftTargetConfig",
    "Eagle3Config", "LoweringError", "MedusaConfig", "NGramConfig", "OptimizedModel", "OptionError", "optimize",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import lazily: `import autospec` alone loads no torch."""
    if name in _HOME:
        return getattr(importlib.import_module(f"autospec.{_HOME[name]}"), name)
    raise AttributeError(f"module 'autospec' has no attribute '{name}'")
