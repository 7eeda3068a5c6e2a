"""Checkpoints with MTP modules as their families write them, and what the modules compute, in plain PyTorch.

A model with more layers than the target is saved; its last layers become the blocks of the modules, so that transformers
itself has read every block's weights. What is around a block is written out here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.models import tiny

LAYERS = 2
_MLA = {
    "num_key_value_heads": 4, "head_dim": 4, "kv_lora_rank": 12, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Writing:
    """How a family writes a module; {n} is the number of the block as a layer of the target, {k} the module's.

    Args:
        family, config: of the tiny target.
        names: enorm, hnorm, projection and final norm.
        block: prefix of the decoder layer.
        hidden_first: the projection reads the hidden state first.
        unit: what is added to the weight of a norm.
    """

    family: str
    config: Callable[[int], dict[str, Any]]
    names: tuple[str, str, str, str]
    block: str
    hidden_first: bool = False
    unit: float = 0.0


_DEEPSEEK = tuple(f"model.layers.{{n}}.{name}" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm"))
_QWEN = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm")
_MIMO = tuple(f"model.mtp_layers.{{k}}.{name}" for name in ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"))
WRITINGS = {
    "deepseek_v3": Writing("deepseek_v3", lambda layers: _MLA, _DEEPSEEK, "model.layers.{n}"),
    "glm_moe_dsa": Writing("glm_moe_dsa", lambda layers: {
        **_MLA, "index_n_heads": 32, "index_head_dim": 8, "index_topk": 4, "pad_token_id": None,
        "indexer_types": ["full", "shared", *["full"] * (layers - LAYERS)], "mlp_layer_types": ["sparse"] * layers,
    }, _DEEPSEEK, "model.layers.{n}"),
    "glm4_moe": Writing("glm4_moe", lambda layers: {**_EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1}, _DEEPSEEK,
                        "model.layers.{n}"),
    "qwen3_next": Writing("qwen3_next", lambda layers: {
        **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16, "layer_types": ["full_attention"] * layers,
    }, _QWEN, "mtp.layers.{k}", unit=1.0),
    "mimo": Writing("qwen2", lambda layers: {}, _MIMO, "model.mtp_layers.{k}", hidden_first=True),
}  # fmt: skip


class Made:
    """A checkpoint on disk, and its modules by hand."""

    def __init__(self, kind: str, folder: Path, modules: int = 1, seed: int = 5) -> None:
        self.folder, self.writing, self.modules = folder, WRITINGS[kind], modules
        total = LAYERS + modules
        config = self.writing.config(total)
        self.whole = tiny(self.writing.family, seed, **{**config, "num_hidden_layers": total})
        self.whole.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        moved = {self._as_written(name): value for name, value in tensors.items()}
        generator = torch.Generator().manual_seed(seed)
        width = self.whole.config.hidden_size
        self.own: dict[str, Tensor] = {}
        for k in range(modules):
            for part, shape in zip(self.writing.names, ((width,), (width,), (width, 2 * width), (width,)), strict=True):
                draw = torch.randn(*shape, generator=generator)
                value = draw * 2 / width**0.5 if len(shape) == 2 else 1 - self.writing.unit + 0.4 * draw
                self.own.setdefault(f"{self._spelt(part, k)}.weight", value)
        self.tensors = moved | self.own
        written = json.loads((folder / "config.json").read_text())
        written["num_hidden_layers"] = LAYERS
        for name in ("layer_types", "mlp_layer_types", "indexer_types"):
            if written.get(name):
                written[name] = written[name][:LAYERS]
        (folder / "config.json").write_text(json.dumps(written))
        self.write()

    def write(self) -> None:
        save_file(self.tensors, self.folder / "model.safetensors", metadata={"format": "pt"})

    def _spelt(self, name: str, k: int) -> str:
        return name.format(k=k, n=LAYERS + k)

    def _as_written(self, name: str) -> str:
        for k in range(self.modules):
            ours = f"model.layers.{LAYERS + k}."
            if name.startswith(ours):
                return f"{self._spelt(self.writing.block, k)}.{name.removeprefix(ours)}"
        return name

    @torch.no_grad()
    def run(self, k: int, ids: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Module k: token ids and hidden states [B, S, (H)] -> logits and its output behind the final norm."""
        decoder = self.whole.model
        enorm, hnorm, proj, norm = (self.own[f"{self._spelt(name, k)}.weight"] for name in self.writing.names)
        parts = [self._normed(decoder.embed_tokens.weight[ids], enorm), self._normed(hidden, hnorm)]
        x = torch.cat(parts[::-1] if self.writing.hidden_first else parts, -1) @ proj.T
        hidden_keys = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
        mask = {"attention_mask": hidden_keys} if hasattr(decoder.config, "index_topk") else {}
        out = decoder.layers[LAYERS + k](x, position_embeddings=decoder.rotary_emb(x, positions), **mask)
        y = self._normed(out[0] if isinstance(out, tuple) else out, norm)
        return y @ self.whole.lm_head.weight.T, y

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        scaled = x / (x.pow(2).mean(-1, keepdim=True) + self.whole.config.rms_norm_eps).sqrt()
        return scaled * (weight + self.writing.unit)
