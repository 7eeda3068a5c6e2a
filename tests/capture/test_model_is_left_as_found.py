"""Capture borrows a model: whatever happens, it is afterwards what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autospec.assemble import capture_model
from autospec.capture import export_model
from autospec.errors import CaptureError
from autospec.tiny_models import tiny_model


def snapshot(model: Any) -> dict[str, Any]:
    """All that capture could disturb: tensors and their identity, flags, configurations, module attributes."""
    configs = {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}
    return {
        "tensors": {name: (id(t), t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "grads": {name: t.requires_grad for name, t in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attention": {name: config._attn_implementation for name, config in configs.items()},
        "experts": {name: getattr(config, "_experts_implementation", None) for name, config in configs.items()},
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "forwards": {name: module.forward.__qualname__ for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "rope": {name: getattr(module, "rope_type", None) for name, module in model.named_modules()},
    }


def check_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, (identity, value) in before.pop("tensors").items():
        now, now_value = after["tensors"][name]
        assert identity == now, f"{name} is another tensor"
        assert torch.equal(value, now_value), f"{name} has changed"
    after.pop("tensors")
    assert before == after


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {}),
        ("gemma3_text", {}),
        ("mixtral", {}),
        ("gpt2", {}),
        ("bloom", {}),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    ],
)
def test_after_capture(model_type, config):
    model = tiny_model(model_type, **config)
    ids = torch.randint(2, 100, (2, 9))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        before = snapshot(model)
        capture_model(model)
        check_same(before, snapshot(model))
        assert torch.equal(model(input_ids=ids).logits, logits)


@pytest.mark.parametrize("model_type", ["doge", "dbrx", "xlnet"])
def test_after_a_refusal(model_type):
    model = tiny_model(model_type)
    before = snapshot(model)
    with pytest.raises(CaptureError):
        capture_model(model)
    check_same(before, snapshot(model))


def test_after_a_crash():
    model = tiny_model("llama", num_hidden_layers=1)
    before = snapshot(model)
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: 1 / 0
    with pytest.raises(CaptureError, match="ZeroDivisionError"):
        export_model(model)
    model.lm_head.forward = plain
    del model.lm_head.forward
    check_same(before, snapshot(model))


def test_implementations_that_the_user_chose_survive():
    model = tiny_model("mixtral", num_hidden_layers=1)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("batched_mm")
    capture_model(model)
    assert model.config._attn_implementation == "eager"
    assert model.config._experts_implementation == "batched_mm"


def test_weights_are_shared_and_buffers_are_not():
    """A rotary embedding writes to its buffers when it sees a long text; the captured graph must not notice."""
    model = tiny_model("llama", num_hidden_layers=1)
    captured = capture_model(model)
    weight = captured.weights["model.layers.0.mlp.down_proj.weight"]
    assert weight.data_ptr() == model.model.layers[0].mlp.down_proj.weight.data_ptr()
    (frequencies,) = [name for name in captured.weights if name.endswith("inv_freq")]
    assert captured.weights[frequencies].data_ptr() != model.model.rotary_emb.inv_freq.data_ptr()
