"""Rotary embeddings whose frequencies change with the longest position: captured as they are for short texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from autospec.capture_facts import MOST_POSITIONS


@contextlib.contextmanager
def rotary_within(model: Any) -> Iterator[int | None]:
    """Keep rotary embeddings that change with the longest position (longrope, dynamic) as they are for short texts.

    Yields how many positions that holds for; None: for all. On exit every module is as it was.
    """
    limit: int | None = None
    saved: list[tuple[Any, Any, dict[str, Tensor]]] = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer: dict[str, Any] = kinds if isinstance(kinds, dict) else {"": kinds}
        switching = [layer for layer, kind in by_layer.items() if kind == "longrope" or "dynamic" in str(kind)]
        if not switching:
            continue
        buffers = dict(module.named_buffers(recurse=False))
        saved.append((module, kinds, buffers))
        for layer in switching:
            limit = min(limit or MOST_POSITIONS, _switches_at(module, layer, by_layer[layer]))
            prefix = f"{layer}_" if layer else ""
            original = getattr(module, f"{prefix}original_inv_freq")
            setattr(module, f"{prefix}inv_freq", original.clone())
        frozen = {layer: "default" if layer in switching else kind for layer, kind in by_layer.items()}
        module.rope_type = frozen if isinstance(kinds, dict) else "default"
    try:
        yield limit
    finally:
        for module, kinds, buffers in saved:
            module.rope_type = kinds
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


def _switches_at(module: Any, layer: str, kind: str) -> int:
    """The number of positions after which a rotary embedding changes its frequencies."""
    if kind == "longrope":
        parameters = module.config.rope_parameters
        return int((parameters[layer] if layer else parameters)["original_max_position_embeddings"])
    return int(module.original_max_seq_len)
