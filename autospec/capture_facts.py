"""What a Hugging Face model says of itself: its configuration, and the arguments of its forward."""

from __future__ import annotations

import inspect
from typing import Any

MOST_POSITIONS = 1 << 20
_LIMITS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length",
    "max_target_positions",
)  # fmt: skip


def text_config(model: Any) -> Any:
    """The configuration of the language model inside a (possibly composite) model."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def max_positions_of(model: Any) -> int:
    """Positions that the model was built for; models that name no limit get 2^20."""
    config = text_config(model)
    for name in _LIMITS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return MOST_POSITIONS


def special_tokens(model: Any) -> list[int]:
    """Padding, first and last token, where the configuration names them."""
    config = text_config(model)
    named = [getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    tokens = [token[0] if isinstance(token, (list, tuple)) and token else token for token in named]
    return [token for token in tokens if isinstance(token, int) and 0 <= token < int(config.vocab_size)]


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward takes an argument of this name; generate then passes position_ids, too."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
