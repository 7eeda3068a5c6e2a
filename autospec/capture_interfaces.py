"""transformers' interfaces while a model is captured: where its attention, its masks and its experts arrive.

Attention becomes one canonical op per call, a mask a MaskSpec value. What the model calls is written down in a Recorder, so
that the eager run and the export can be compared.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autospec import capture_experts
from autospec.capture_checks import token_local
from autospec.capture_facts import max_positions_of
from autospec.capture_rotary import rotary_within
from autospec.errors import CaptureError
from autospec.kernels.attention import attention
from autospec.masks import MaskSpec, UnknownMask, mask_row, spec_of_rows

INTERFACE = "autospec"

# Keywords that an attention function receives and that do not change its result here: the mask already carries the
# window, positions are applied to q and k before the call, and the rest only asks for extra outputs.
_HARMLESS = {
    "sliding_window", "position_ids", "position_embeddings", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "cache_position", "is_causal", "deterministic", "logits_to_keep", "layer_idx",
    "hidden_states", "token_type_ids", "inputs_embeds", "labels", "target_dtype", "past_key_values", "head_mask",
}  # fmt: skip


@dataclass
class Recorder:
    """Mask specs in the order in which the model asked for masks, and the number of attention calls."""

    max_positions: int
    specs: list[MaskSpec | UnknownMask] = field(default_factory=list)
    attention_calls: int = 0
    masks_asked: int = 0
    replaying: bool = False
    is_token_local: bool = False
    padding_masks: list[Tensor] = field(default_factory=list)  # seen under export


_recorder: Recorder | None = None


@contextlib.contextmanager
def recorded_in(recorder: Recorder) -> Iterator[Recorder]:
    """What a model calls inside is written down in, or replayed from, `recorder`."""
    global _recorder
    _recorder = recorder
    try:
        yield recorder
    finally:
        _recorder = None


def padding_masks() -> list[Tensor]:
    """Those that the model has made so far under export; none outside of it."""
    return [] if _recorder is None else _recorder.padding_masks


@contextlib.contextmanager
def through_interfaces(model: Any, experts: str = capture_experts.INTERFACE) -> Iterator[bool]:
    """Route attention, masks and experts of `model` through autospec; yields whether attention goes there.

    On exit every configuration is as it was.
    """
    _register()
    attributes = ("_attn_implementation_internal", "_experts_implementation_internal")
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    saved = [(config, name, getattr(config, name, None)) for config in configs.values() for name in attributes]
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        routed = bool(model._can_set_attn_implementation())
        if routed:
            model.set_attn_implementation(INTERFACE)
        if model._can_set_experts_implementation():
            model.set_experts_implementation(experts)
        with capture_experts.loops_as_ops(model):
            yield routed
    finally:
        for config, name, value in saved:
            if hasattr(config, name):
                setattr(config, name, value)
        logger.setLevel(level)


@contextlib.contextmanager
def layers_through_interfaces(model: Any) -> Iterator[None]:
    """Route layers of this model's classes that are exported by themselves; their attention is causal.

    Raises:
        CaptureError: the model does not support the attention interface.
    """
    with through_interfaces(model) as routed, rotary_within(model) as switch:
        if not routed:
            raise CaptureError("the model's layers do not call attention through transformers' interface", at="draft head",
                               where=type(model).__name__, help="draft with something else than MTP modules")  # fmt: skip
        with recorded_in(Recorder(switch or max_positions_of(model))):
            yield


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(INTERFACE, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(INTERFACE, _mask)
    capture_experts.register()


def _mask(*args: Any, mask_function: Any = None, attention_mask: Tensor | None = None, **kwargs: Any) -> MaskSpec | UnknownMask:
    """The mask function of the interface: evaluated in the recording run, replayed under export."""
    assert _recorder is not None, "the autospec mask interface was called outside capture"
    if _recorder.replaying:
        if _recorder.masks_asked >= len(_recorder.specs):
            raise CaptureError("the model asks for more masks under export than in an eager run", where="the attention mask",
                               help="its Python code takes another path under export than in an eager run")  # fmt: skip
        spec = _recorder.specs[_recorder.masks_asked]
        _recorder.masks_asked += 1
        if attention_mask is not None:
            _recorder.padding_masks.append(attention_mask)
        return spec
    found: MaskSpec | str
    if attention_mask is not None and not bool(attention_mask.all()):
        found = "it is made of data"
    else:
        try:
            found = spec_of_rows(mask_row(mask_function), _recorder.max_positions)
        except Exception as error:
            found = f"it cannot be evaluated ({type(error).__name__}: {error})"
    _recorder.specs.append(UnknownMask(found) if isinstance(found, str) else found)
    return _recorder.specs[-1]


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None, s_aux: Tensor | None = None,
    sinks: Tensor | None = None, indices: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function of the interface: one canonical op per call; fails on what it does not know."""
    assert _recorder is not None, "the autospec attention interface was called outside capture"
    where = type(module).__name__
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _HARMLESS)
    if unknown:
        raise CaptureError(f"attention was called with '{unknown[0]}', which autospec does not know", where=where)
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is None and is_causal:
        attention_mask = MaskSpec()
    if isinstance(attention_mask, UnknownMask):
        raise attention_mask.error(where)
    if not isinstance(attention_mask, MaskSpec):
        what = "no mask and is not causal" if attention_mask is None else "a mask made of data"
        raise CaptureError(f"attention has {what}", where=where, help="only causal, windowed and chunked masks are known")
    if dropout:
        raise CaptureError("attention has dropout: the model is in training mode", where=where, help="call model.eval()")
    _recorder.attention_calls += 1
    extra = s_aux if s_aux is not None else sinks
    if query.shape[1] % key.shape[1]:
        raise CaptureError(f"{query.shape[1]} query heads do not group over {key.shape[1]} K/V heads", where=where)
    if _recorder.is_token_local:
        return token_local(query, key, value), None
    out = attention(
        query, key, value, None if extra is None else extra.reshape(-1),
        float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        attention_mask.window, attention_mask.chunk, float(softcap or 0.0), None, indices,
    )  # fmt: skip
    return out, None
