"""Facts about model families that no rule can guess: what a tiny model of a type needs beyond the generic sizes.

One record per type; a type without one is built by the rules of `autospec.tiny_models` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """A transformers model type.

    Args:
        model_type: key of transformers' CONFIG_MAPPING.
        config: configuration values of a tiny model; a nested mapping is a sub-configuration.
        unset: names that the generic rules must leave at their default.
        why: what the values are for.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    why: str = ""


FAMILIES: dict[str, Family] = {}


def _add(model_type: str, why: str, /, unset: tuple[str, ...] = (), **config: Any) -> None:
    FAMILIES[model_type] = Family(model_type=model_type, config=config, unset=unset, why=why)


_add("dots1", "the expert counts have no default", n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1)
_add("blenderbot", "num_hidden_layers, which the encoder sets, sizes the cache", decoder_layers=2, encoder_layers=2)
_add("gemma3n_text", "sizes are lists", intermediate_size=96, activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0])
_add("mamba2", "expand * hidden_size = num_heads * head_dim", num_heads=8)
_add(
    "reformer",
    "axial positions multiply to the training length",
    axial_pos_embds_dim=[32, 32],
    axial_pos_shape=[16, 16],
)
_add("bamba", "attention layers are listed by index", attn_layer_indices=[1, 3])
_add("granitemoehybrid", "the default has no attention layer", layer_types=["linear_attention", "full_attention"] * 2)
_add("jamba", "no attention among the first layers", attn_layer_period=2, attn_layer_offset=1)
_add("zamba", "no attention among the first layers", attn_layer_period=2, attn_layer_offset=1)
_add("gpt_neo", "kinds of layers are given with a count", attention_types=[[["global", "local"], 2]])
_add("falcon_h1", "mamba_d_ssm = mamba_n_heads * mamba_d_head", mamba_d_ssm=128)
_add("lfm2", "the default has no convolution", layer_types=["conv", "full_attention"] * 2)
_add("lfm2_moe", "layer_types has no default", layer_types=["conv", "full_attention", "conv", "full_attention"])
_add("nemotron", "num_key_value_heads has no default", num_key_value_heads=2)
_add("dbrx", "the attention's sub-configuration leaves open what its model needs",
     attn_config={"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0})  # fmt: skip
_add("longcat_flash", "the rotary embedding is sized by head_dim", head_dim=8)
_add("cohere_compass_text", "rotary parameters are given per kind of layer",
     layer_types=["sliding_attention", "full_attention"] * 2,
     rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
                      "full_attention": None})  # fmt: skip
_add("xlstm", "the state's sizes follow from hidden_size and num_heads by factors", num_heads=4, qk_dim_factor=1.0)
_SPARSE_INDEXER: dict[str, Any] = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 64, "split_ngram_parts": 2, "ple_embed_dim": 64, "hc_lowrank": 16,
}  # fmt: skip
_add("qwen4_exp_text", "the indexer's sizes have no default", **_SPARSE_INDEXER)
_add("qwen4_exp", "the indexer's sizes have no default", text_config=_SPARSE_INDEXER)
_add("gemma4_unified_assistant", "its own layers share the target's K/V", text_config={"num_kv_shared_layers": 0})
_add("dots3_note_text", "sizes of sliding layers are given apart", swa_num_attention_heads=4, swa_num_key_value_heads=4,
     swa_q_lora_rank=24, swa_kv_lora_rank=32, swa_qk_nope_head_dim=16, swa_qk_rope_head_dim=8, swa_v_head_dim=16,
     swa_head_dim=24, sliding_window=8)  # fmt: skip
_add("xmod", "an adapter per language", default_language="en_XX")
_add("zaya", "only one expert per token is implemented", num_experts_per_tok=1)
_add(
    "gemma4_assistant",
    "the default fails its own validation",
    text_config={"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
)
_add("moshi", "its cache forgets past sliding_window what its mask shows; decoded within it", sliding_window=64)
_add(
    "ministral3",
    "queries are scaled by steps of the original length",
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.1,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
    },
)
_add("zamba2", "kinds of layers have no shorter default", layer_types=["mamba", "hybrid"] * 2)
