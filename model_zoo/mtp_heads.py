"""Facts about how families write the MTP modules (multi-token prediction) that come with their checkpoints.

from_pretrained drops these tensors. In names, {k} is the module's number and {layer} is num_hidden_layers + k.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MTPLayout:
    """One way of naming MTP modules.

    Args:
        name: what reports call it.
        families: who writes so, by model type; a file is recognised by its tensors, not by this.
        embed_norm, hidden_norm, proj, norm: of the token's embedding, of the hidden state, of both together, of the output.
        block: the decoder layer; its own names are those of the target's layers.
        root: what the names of a module, or of all of them, begin with.
        embed_tokens, lm_head: copies of the target's that a file may repeat; None: it never does.
        is_embedding_first: the order in which proj reads the two.
        recycles_normed: the next pass reads the output behind the final norm, not before it.
        counted_by: keys of config.json that say how many modules there are.
    """

    name: str
    families: tuple[str, ...]
    embed_norm: str
    hidden_norm: str
    proj: str
    norm: str
    block: str
    root: str
    embed_tokens: str | None = None
    lm_head: str | None = None
    is_embedding_first: bool = True
    recycles_normed: bool = True
    counted_by: tuple[str, ...] = ("num_nextn_predict_layers",)


# GLM-4.5: engines differ in what is recycled; transformers and SGLang take it behind the norm.
# vLLM zeroes the embedding of row 0 here and for MiMo; the model's authors and transformers do not.
DEEPSEEK = MTPLayout(
    name="deepseek", families=("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
    embed_norm="model.layers.{layer}.enorm", hidden_norm="model.layers.{layer}.hnorm",
    proj="model.layers.{layer}.eh_proj", norm="model.layers.{layer}.shared_head.norm",
    block="model.layers.{layer}", root="model.layers.{layer}.",
    embed_tokens="model.layers.{layer}.embed_tokens", lm_head="model.layers.{layer}.shared_head.head",
)  # fmt: skip
# What is not in a layer is shared by all modules.
QWEN = MTPLayout(
    name="qwen", families=("qwen3_next", "qwen3_5", "qwen3_5_moe"),
    embed_norm="mtp.pre_fc_norm_embedding", hidden_norm="mtp.pre_fc_norm_hidden", proj="mtp.fc", norm="mtp.norm",
    block="mtp.layers.{k}", root="mtp.", embed_tokens="mtp.embed_tokens", lm_head="mtp.lm_head",
    counted_by=("num_nextn_predict_layers", "mtp_num_hidden_layers"),
)  # fmt: skip
MIMO = MTPLayout(
    name="mimo", families=("mimo",),
    embed_norm="model.mtp_layers.{k}.token_layernorm", hidden_norm="model.mtp_layers.{k}.hidden_layernorm",
    proj="model.mtp_layers.{k}.input_proj", norm="model.mtp_layers.{k}.final_layernorm",
    block="model.mtp_layers.{k}", root="model.mtp_layers.{k}.", is_embedding_first=False,
)  # fmt: skip
MTP_LAYOUTS = (DEEPSEEK, QWEN, MIMO)


def layout_of(model_type: str) -> MTPLayout:
    """How modules that are trained for a model are written: as its family does, else as DeepSeek-V3 does."""
    family = model_type.removesuffix("_text")
    return next((layout for layout in MTP_LAYOUTS if family in layout.families), DEEPSEEK)
