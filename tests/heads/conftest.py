"""Raw draft-head checkpoints, written by the names and conventions of their makers and by none of our code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB, DRAFT_VOCAB, TARGET_HIDDEN, LAYERS = 96, 40, 32, 9
HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 4, 2, 8, 48


@dataclass
class Raw:
    """A checkpoint as it lies on disk, and the target it was made for."""

    layout: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    embed_tokens: Tensor
    lm_head: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, weights: str = "model.safetensors") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        if weights.endswith(".safetensors"):
            save_file({name: value.contiguous() for name, value in self.tensors.items()}, folder / weights)
        else:
            torch.save(self.tensors, folder / weights)
        return folder

    @property
    def target(self) -> dict[str, Any]:
        """Arguments of load_head."""
        return {
            "target_hidden_size": self.embed_tokens.shape[1], "target_vocab_size": VOCAB, "target_layers": LAYERS,
            "embed_tokens": self.embed_tokens, "lm_head": self.lm_head, "dtype": torch.float32, "device": "cpu",
        }  # fmt: skip


def make_raw(layout: str = "specforge", seed: int = 0, **options: Any) -> Raw:
    """A random EAGLE-3 checkpoint; options: hidden, ids, layers, qwen3, bias, rope_scaling, pruned, deeper_norm, flags."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    def norm(size: int) -> Tensor:
        return 1 + 0.4 * torch.randn(size, generator=generator)

    hidden = options.get("hidden", TARGET_HIDDEN)
    ids = options.get("ids")
    taps = len(ids) if ids else 3
    flags = {name: options.get(name, False) for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")}
    tensors = {"fc.weight": weight(hidden, taps * TARGET_HIDDEN), "norm.weight": norm(hidden)}
    for index in range(options.get("layers", 1)):
        at = f"layers.{index}." if index or layout == "speculators" else "midlayer."
        width = hidden if index else 2 * hidden
        tensors |= {
            f"{at}self_attn.q_proj.weight": weight(HEADS * HEAD_DIM, width),
            f"{at}self_attn.k_proj.weight": weight(KV_HEADS * HEAD_DIM, width),
            f"{at}self_attn.v_proj.weight": weight(KV_HEADS * HEAD_DIM, width),
            f"{at}self_attn.o_proj.weight": weight(hidden, HEADS * HEAD_DIM),
            f"{at}mlp.gate_proj.weight": weight(INTERMEDIATE, hidden),
            f"{at}mlp.up_proj.weight": weight(INTERMEDIATE, hidden),
            f"{at}mlp.down_proj.weight": weight(hidden, INTERMEDIATE),
            f"{at}post_attention_layernorm.weight": norm(hidden),
        }
        names = ("hidden_norm", "input_layernorm") if index == 0 else (options.get("deeper_norm", "input_layernorm"),)
        tensors |= {f"{at}{name}.weight": norm(hidden) for name in names}
        if options.get("qwen3"):
            tensors |= {f"{at}self_attn.{name}.weight": norm(HEAD_DIM) for name in ("q_norm", "k_norm")}
        if options.get("bias"):
            tensors |= {name.replace("weight", "bias"): torch.randn(len(tensors[name]), generator=generator)
                        for name in list(tensors) if name.startswith(f"{at}self_attn.") and "_proj" in name}  # fmt: skip
    if flags["norm_before_fc"]:
        tensors["input_norm.weight"] = norm(taps * TARGET_HIDDEN)
    if flags["fc_norm"]:
        tensors |= {f"fc_norm.{index}.weight": norm(TARGET_HIDDEN) for index in range(taps)}
    pruned = options.get("pruned", True)
    draft_vocab = DRAFT_VOCAB if pruned else VOCAB
    tensors["lm_head.weight"] = weight(draft_vocab, hidden) * 3
    if pruned:
        chosen = torch.randperm(VOCAB, generator=generator)[:draft_vocab].sort()[0]
        tensors["d2t"] = chosen - torch.arange(draft_vocab)
        tensors["t2d"] = torch.isin(torch.arange(VOCAB), chosen)
    if hidden != TARGET_HIDDEN or options.get("own_embeddings"):
        tensors["embed_tokens.weight"] = torch.randn(VOCAB, hidden, generator=generator)
    sizes = {
        "hidden_size": hidden, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS, "head_dim": HEAD_DIM,
        "num_key_value_heads": KV_HEADS, "num_hidden_layers": options.get("layers", 1), "vocab_size": VOCAB,
        "rms_norm_eps": 1e-3, "hidden_act": "silu", "rope_theta": 500.0, "max_position_embeddings": 64,
        "rope_scaling": options.get("rope_scaling"), "attention_bias": bool(options.get("bias")),
        "model_type": "qwen3" if options.get("qwen3") else "llama",
    }  # fmt: skip
    config: dict[str, Any] = {"draft_vocab_size": draft_vocab, "torch_dtype": "float32"}
    if hidden != TARGET_HIDDEN:
        config["target_hidden_size"] = TARGET_HIDDEN
    if layout == "speculators":
        config |= {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", **flags,
                   "transformer_layer_config": sizes, "eagle_aux_hidden_state_layer_ids": ids,
                   "speculators_config": {"algorithm": "eagle3"}}  # fmt: skip
    else:
        kind = "LlamaForCausalLMEagle3" if layout == "specforge" else "LlamaForCausalLM"
        config |= {"architectures": [kind], **sizes, **{name: True for name, on in flags.items() if on}}
        if ids:
            config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": ids}
    target = torch.Generator().manual_seed(seed + 1000)
    embed_tokens = torch.randn(VOCAB, TARGET_HIDDEN, generator=target)
    lm_head = torch.randn(VOCAB, TARGET_HIDDEN, generator=target)
    return Raw(layout, config, tensors, embed_tokens, lm_head, {**options, **flags})


@pytest.fixture
def raw() -> Callable[..., Raw]:
    return make_raw
