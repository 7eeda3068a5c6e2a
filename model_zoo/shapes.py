"""Architectures by their sizes alone, for `autospec bench --shape`: weights are made up, so only speed means anything.

The draft head of a shape is EAGLE-3's, one decoder layer of the target's sizes that reads three of its layers, or an MTP
module: one more layer of the target's own kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ArchitectureShape:
    """A decoder's sizes.

    Args:
        model_type: of the configuration class in transformers.
        hidden ... vocab: hidden_size, intermediate_size, num_hidden_layers, attention and K/V heads, head_dim, vocab_size.
        rope: rope_parameters of the configuration.
        eps: rms_norm_eps.
        max_positions: max_position_embeddings.
        tied: lm_head is the embedding.
        draft_vocab: rows of the draft head's lm_head.
        tap_after: 0-based layers whose output an EAGLE-3 head reads.
        config: what else the configuration says: of latent attention, of experts.
    """

    model_type: str = "llama"
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope: Mapping[str, object] = field(default_factory=dict)
    eps: float = 1e-5
    max_positions: int = 131072
    tied: bool = False
    draft_vocab: int = 32000
    tap_after: tuple[int, ...]
    config: Mapping[str, object] = field(default_factory=dict)


def _llama3(factor: float) -> Mapping[str, object]:
    return {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip


_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
         "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip


def _deepseek_v3(experts: int) -> Mapping[str, object]:
    """Everything of DeepSeek-V3 but the number of experts (256) and of dense layers at the front (3)."""
    return {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "moe_intermediate_size": 2048, "n_routed_experts": experts, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 1}  # fmt: skip


_QWEN3 = {"rope_type": "default", "rope_theta": 1000000.0}

SHAPES = {
    "llama-3.1-8b": ArchitectureShape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128,
                                      vocab=128256, rope=_llama3(8.0), tap_after=(1, 15, 28)),
    "llama-3.2-1b": ArchitectureShape(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, head_dim=64,
                                      vocab=128256, rope=_llama3(32.0), tied=True, tap_after=(1, 7, 12)),
    "qwen3-8b": ArchitectureShape(model_type="qwen3", hidden=4096, intermediate=12288, layers=36, heads=32, kv_heads=8,
                                  head_dim=128, vocab=151936, rope=_QWEN3, eps=1e-6, max_positions=40960,
                                  tap_after=(1, 17, 32)),
    # 57 GB in bf16 with one MTP module: 1.4 GB for each of the 32 experts of 15 layers and of the module.
    "deepseek-v3-16": ArchitectureShape(model_type="deepseek_v3", hidden=7168, intermediate=18432, layers=16, heads=128,
                                        kv_heads=128, head_dim=64, vocab=129280, rope=_YARN, eps=1e-6, max_positions=163840,
                                        tap_after=(1, 7, 12), config=_deepseek_v3(32)),
    "tiny-deepseek-v3": ArchitectureShape(
        model_type="deepseek_v3", hidden=32, intermediate=48, layers=3, heads=4, kv_heads=4, head_dim=8, vocab=512, rope=_YARN,
        eps=1e-6, max_positions=163840, draft_vocab=128, tap_after=(0, 1, 2),
        config={**_deepseek_v3(16), "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                "v_head_dim": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 4},
    ),
    "tiny-llama": ArchitectureShape(hidden=32, intermediate=48, layers=3, heads=4, kv_heads=2, head_dim=8,
                                    vocab=512, rope=_llama3(8.0), draft_vocab=128, tap_after=(0, 1, 2)),
}  # fmt: skip
