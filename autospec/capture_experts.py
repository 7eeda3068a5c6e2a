"""Experts as captured: one canonical op per layer where transformers' ExpertsInterface says all that it needs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from autospec.kernels.experts import ACTIVATIONS, experts

INTERFACE = "autospec"
# Layouts of the interface's decorator that the op has; others are exported as grouped matrix products.
_LAYOUT = {
    "has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}  # fmt: skip


def why_not_canonical(module: Any) -> str | None:
    """What the canonical op lacks for a module of experts, or None."""
    from transformers.integrations import moe

    for name, wanted in _LAYOUT.items():
        if getattr(module, name, wanted) != wanted:
            return f"{name.removeprefix('_')} is {not wanted}"
    if type(module)._apply_gate is not moe._default_apply_gate:
        return "it has a gate of its own"
    if activation_of(module) is None:
        return f"activation {type(module.act_fn).__name__} is not one of {', '.join(ACTIVATIONS)}"
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    if not all(isinstance(weight, Tensor) and weight.dim() == 3 for weight in weights):
        return "its weights are not one tensor for all experts"
    return None


def activation_of(module: Any) -> str | None:
    """The op's name of the activation; None: it has none."""
    from transformers.activations import ACT2FN

    return next((name for name in ACTIVATIONS if type(module.act_fn) is type(ACT2FN[name])), None)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function of the interface: hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
    from transformers.integrations import moe

    if why_not_canonical(module) is not None:
        return moe.grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    activation = activation_of(module)
    return experts(hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj, activation)


def register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(INTERFACE, experts_forward)
