"""Experts of transformers become the canonical op where it means the same; the others say why not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from autospec.capture_experts import experts_forward, is_loop, loops_as_ops, why_not_canonical


def made(kind, model_type, **config):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = CONFIG_MAPPING[model_type](hidden_size=8, intermediate_size=8, num_local_experts=5, **config)
        config._experts_implementation_internal = "eager"
        module = kind(config).requires_grad_(False)
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu", "relu"])
def test_the_op_is_the_module(activation):
    module = made(MixtralExperts, "mixtral", hidden_act=activation)
    assert why_not_canonical(module) is None
    x, weights = torch.randn(7, 8), torch.rand(7, 2)
    index = torch.rand(7, 5).topk(2).indices
    torch.testing.assert_close(experts_forward(module, x, index, weights), module(x, index, weights))


def test_another_routing_is_not_the_module():
    module = made(MixtralExperts, "mixtral")
    x, weights = torch.randn(7, 8), torch.rand(7, 2)
    index = torch.rand(7, 5).topk(2).indices
    for planted in ((index.flip(-1), weights), (index, weights.flip(-1)), ((index + 1) % 5, weights)):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(experts_forward(module, x, *planted), module(x, index, weights))


def test_other_layouts_say_why_not():
    assert why_not_canonical(made(GptOssExperts, "gpt_oss")) == "has_bias is True"
    assert "ReLUSquared" in str(why_not_canonical(made(MixtralExperts, "mixtral", hidden_act="relu2")))
    module = made(MixtralExperts, "mixtral")
    module._is_expert_parallel = True
    assert why_not_canonical(module) == "is_expert_parallel is True"
    gated = type("Gated", (MixtralExperts,), {"_apply_gate": lambda self, x: x})
    assert why_not_canonical(made(gated, "mixtral")) == "it has a gate of its own"


def test_what_the_op_cannot_do_is_exported_as_before():
    module = made(MixtralExperts, "mixtral", hidden_act="relu2")
    x, weights = torch.randn(4, 8), torch.rand(4, 2)
    index = torch.rand(4, 5).topk(2).indices
    torch.testing.assert_close(experts_forward(module, x, index, weights), module(x, index, weights))


def longcat(zero_experts):
    """LongCat's experts, a Python loop outside of the interface, and 7 tokens for 3 of them each."""
    modeling = pytest.importorskip("transformers.models.longcat_flash.modeling_longcat_flash")
    sizes = {"hidden_size": 8, "expert_ffn_hidden_size": 6, "n_routed_experts": 4, "zero_expert_num": zero_experts}
    config = CONFIG_MAPPING["longcat_flash"](**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = modeling.LongcatFlashExperts(config).requires_grad_(False)
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module, (torch.randn(7, 8), torch.rand(7, 4 + zero_experts).topk(3).indices, torch.rand(7, 3))


@pytest.mark.parametrize("zero_experts", [0, 3])
def test_a_loop_over_experts_becomes_the_op_for_a_while(zero_experts):
    module, inputs = longcat(zero_experts)
    model = nn.Sequential(module)
    expected = module(*inputs)
    assert is_loop(module)
    with loops_as_ops(model):
        torch.testing.assert_close(module(*inputs), expected)
        exported = torch.export.export(module, inputs, strict=False)  # the loop cannot be: its indices are data
    assert "autospec.experts" in str(exported.graph)
    assert "forward" not in vars(module)


def test_other_modules_are_left_alone():
    """A layout that the op lacks, a bias, a signature of its own, and modules that the interface serves."""
    assert not is_loop(made(MixtralExperts, "mixtral"))
    for spoil in (
        lambda one: one.register_parameter("bias", nn.Parameter(torch.zeros(3))),
        lambda one: setattr(one, "gate_up_proj", nn.Parameter(one.gate_up_proj.transpose(1, 2).contiguous())),
        lambda one: setattr(one, "act_fn", nn.Tanh()),
        lambda one: setattr(one, "identity_expert", nn.Dropout()),
        lambda one: setattr(one, "forward", lambda hidden_states, top_k_index: hidden_states),
    ):
        module, _ = longcat(3)
        spoil(module)
        assert not is_loop(module)
