"""Experts as captured: one canonical op per layer where transformers' ExpertsInterface says all that it needs.

A few modules loop over their experts outside of the interface, by indices that only the data knows. Where such a module has
the op's layout, the op takes the loop's place while the model is captured; capture compares the whole with an eager run.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

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

    act_fn = getattr(module, "act_fn", None)
    return next((name for name in ACTIVATIONS if type(act_fn) is type(ACT2FN[name])), None)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function of the interface: hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
    from transformers.integrations import moe

    if why_not_canonical(module) is not None:
        return moe.grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    activation = activation_of(module)
    return experts(hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj, activation)


def is_loop(module: Any) -> bool:
    """Experts outside of the interface whose weights lie as the op's do.

    Experts past those that project back are called zero experts: they return what they are given.
    """
    if not isinstance(module, nn.Module) or hasattr(module, "has_gate"):
        return False
    weights = dict(module.named_parameters(recurse=False))
    gate_up, down = weights.get("gate_up_proj"), weights.get("down_proj")
    if len(weights) != 2 or gate_up is None or down is None or gate_up.dim() != 3 or down.dim() != 3:
        return False
    if gate_up.shape[1:] != (2 * down.shape[2], down.shape[1]) or activation_of(module) is None:
        return False
    if [*inspect.signature(module.forward).parameters] != ["hidden_states", "top_k_index", "top_k_weights"]:
        return False
    has_zero_experts = any(isinstance(child, nn.Identity) for child in module.children())
    return gate_up.shape[0] == down.shape[0] or (has_zero_experts and gate_up.shape[0] > down.shape[0])


def loop_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the loop computes: hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
    count = module.down_proj.shape[0]
    gate_up = module.gate_up_proj[:count]
    out = experts(hidden_states, top_k_index, top_k_weights, gate_up, module.down_proj, activation_of(module))
    if module.gate_up_proj.shape[0] == count:
        return out
    unchanged = (top_k_weights * (top_k_index >= count)).sum(-1, keepdim=True)
    return out + (hidden_states * unchanged).to(hidden_states.dtype)


@contextlib.contextmanager
def loops_as_ops(model: nn.Module) -> Iterator[None]:
    """Let the op take the place of loops over experts; on exit every module is as it was."""
    found = [module for module in model.modules() if is_loop(module)]
    for module in found:
        module.forward = functools.partial(loop_forward, module)
    try:
        yield
    finally:
        for module in found:
            del module.forward


def register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(INTERFACE, experts_forward)
