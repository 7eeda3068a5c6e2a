"""A tiny random model of any causal-LM type, from its configuration class alone: for the zoo and for tests.

Sizes follow from attribute names; what the names do not tell stands in `model_zoo/families.py`. Weights are spread so
that greedy text does not collapse into a loop, near-ties are rare and positions matter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch

from autospec.model_zoo.families import FAMILIES, Family

VOCAB_SIZE = 128
MAX_POSITIONS = 256
NUM_LAYERS = 4
WINDOW = 8  # smaller than every test length, so that windows and chunks bite

# Configuration attributes by what they measure; only attributes that a class has are set.
_SIZES: dict[int, str] = {
    VOCAB_SIZE: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
    MAX_POSITIONS: (
        "max_position_embeddings n_positions n_ctx max_seq_len seq_length max_sequence_length max_target_positions"
    ),
    64: (
        "hidden_size d_model n_embd dim_model_base hidden_dim emb_dim embed_dim d_embed embedding_size "
        "backbone_hidden_size"
    ),
    96: (
        "intermediate_size ffn_dim n_inner d_ff dim_ff dff d_inner ffn_hidden_size encoder_ffn_dim "
        "decoder_ffn_dim intermediate_size_mlp shared_intermediate_size mlp_dim dense_intermediate_size"
    ),
    32: (
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "shared_experts_intermediate_size kv_lora_rank moe_shared_expert_intermediate_size "
        "index_n_heads"  # of few, all scores of a key may be 0, and transformers promises no order among equals
    ),
    24: "q_lora_rank hidden_size_per_layer_input",
    16: (
        "head_dim qk_nope_head_dim kv_channels d_kv index_head_dim dim_head global_head_dim swa_head_dim "
        "linear_key_head_dim linear_value_head_dim laurel_rank mamba_d_state state_size o_lora_rank "
        "mamba_dt_rank mamba_d_head mamba_head_dim ssm_state_size v_head_dim swa_v_head_dim"
    ),
    8: (
        "qk_rope_head_dim sliding_window attention_chunk_size window_size sliding_window_size "
        "keep_window_size local_attention_window_len floor_scale rotary_dim num_experts num_local_experts "
        "n_routed_experts moe_num_experts local_attention mamba_num_heads mamba_n_heads"
    ),
    4: (
        "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads "
        "attention_heads index_topk swa_num_attention_heads linear_num_value_heads "
        "zero_expert_num n_mamba_heads"
    ),
    2: (
        "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk num_experts_per_token moe_k "
        "num_global_key_value_heads swa_num_key_value_heads n_group linear_num_key_heads kv_n_heads moe_top_k "
        "num_kv_shared_layers top_k_experts num_expert_group max_window_layers"
    ),
    1: "topk_group first_k_dense_replace num_shared_experts n_shared_experts mamba_n_groups n_groups",
}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks")
_RULES = {name: size for size, names in _SIZES.items() for name in names.split()} | dict.fromkeys(_DEPTHS, NUM_LAYERS)
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
# Sizes that a class only uses when they are not 0; the rules do not switch features on.
_KEEP_ZERO = {
    "num_kv_shared_layers",
    "first_k_dense_replace",
    "num_shared_experts",
    "n_shared_experts",
    "hidden_size_per_layer_input",
}
# Sizes that some classes leave open although their models need them.
_FILL_NONE = {"head_dim", "num_experts_per_tok"}
_VALUES = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "use_cache": True, "is_decoder": True,
    "add_cross_attention": False, "is_encoder_decoder": False, "tie_word_embeddings": False,
    "use_sliding_window": True,
}  # fmt: skip


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A small configuration of a type, every kind of layer included."""
    from transformers import CONFIG_MAPPING

    family = FAMILIES.get(model_type, Family(model_type=model_type))
    config_class = CONFIG_MAPPING[model_type]
    given = {**family.config, **overrides}
    return _shrink(config_class, given, family.unset)


def _shrink(config_class: Any, given: Mapping[str, Any], unset: tuple[str, ...]) -> Any:
    """An instance of a configuration class with small sizes; sub-configurations are shrunk alike."""
    from transformers import PretrainedConfig

    try:
        default = config_class()
    except Exception:  # some defaults do not pass their own validation
        default = config_class(**given)
    chosen: dict[str, Any] = {}
    for name, value in vars(default).items():
        mapping = given.get(name)
        if isinstance(value, PretrainedConfig):
            chosen[name] = _shrink(type(value), mapping if isinstance(mapping, Mapping) else {}, unset)
        elif name in given or name in unset:
            continue
        elif name in _VALUES:
            chosen[name] = _VALUES[name]
        elif (
            name in _RULES
            and _is_size(name, value)
            and not (name == "head_dim" and "qk_rope_head_dim" in vars(default))
        ):
            chosen[name] = _RULES[name]
    heads, kv_heads = (
        _first(vars(default), names) for names in (_HEADS, ("num_key_value_heads", "num_kv_heads"))
    )
    if heads == kv_heads:  # plain multi-head attention stays plain
        chosen |= {name: 4 for name in ("num_key_value_heads", "num_kv_heads") if name in chosen}
    chosen |= {name: value for name, value in given.items() if not isinstance(chosen.get(name), PretrainedConfig)}
    small = config_class(**chosen)
    lost = _lost_kinds(default, small)
    return config_class(**{**chosen, **lost}) if lost else small


def _is_size(name: str, value: Any) -> bool:
    if value is None:
        return name in _FILL_NONE
    return isinstance(value, int) and not isinstance(value, bool) and not (value == 0 and name in _KEEP_ZERO)


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _lost_kinds(default: Any, small: Any) -> dict[str, list[Any]]:
    """Per-layer lists that no longer show every kind of layer that the default has, with all kinds in turn."""
    found = {}
    for name, value in vars(default).items():
        now = vars(small).get(name)
        if (
            isinstance(value, list)
            and isinstance(now, list)
            and value
            and isinstance(value[0], str)
            and name.endswith("_types")
        ):
            kinds = list(dict.fromkeys(value))
            if not set(kinds) <= set(now) and len(kinds) <= NUM_LAYERS:
                found[name] = [kinds[i % len(kinds)] for i in range(len(now))]
    return found


def tiny_model(model_type: str, seed: int = 0, gain: float = 1.5, embedding: float = 1.0, **overrides: Any) -> Any:
    """A random model of a type on the CPU, float32, in eval mode."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        _untie(model)
        spread_weights(model, gain, embedding)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model.eval()


def _untie(model: Any) -> None:
    """A head tied to the embedding repeats the token it reads; some classes tie whatever their configuration says."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and embedding is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())


@torch.no_grad()
def spread_weights(model: torch.nn.Module, gain: float = 1.5, embedding: float = 1.0) -> None:
    """Random weights whose layers neither fade nor explode: matrices by fan-in, vectors near their initial value."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() < 2:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif id(parameter) in embeddings:
            parameter.copy_(torch.randn_like(parameter) * embedding)
        else:
            parameter.copy_(torch.randn_like(parameter) * gain / math.sqrt(parameter.shape[-1]))


# Tried in turn until the greedy text is lively: (gain of the matrices, standard deviation of embeddings).
_SPREADS = ((1.5, 1.0), (0.7, 1.0), (1.0, 3.0), (3.0, 0.3), (4.0, 1.0))
_LIVELY = 8  # distinct tokens among those generated for every prompt


def lively_model(
    model_type: str, prompt_lens: tuple[int, ...], new_tokens: int, seed: int = 0, **overrides: Any
) -> tuple[Any, list[list[int]], int]:
    """A tiny model whose greedy texts do not collapse, prompts for it, and the distinct tokens of its poorest text."""
    best: tuple[Any, list[list[int]], int] | None = None
    for number, (gain, embedding) in enumerate(_SPREADS, start=seed * len(_SPREADS)):
        model = tiny_model(model_type, seed=number, gain=gain, embedding=embedding, **overrides)
        prompts = random_prompts(model, prompt_lens, number)
        distinct = new_tokens
        for prompt in prompts:
            text = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)[0, len(prompt) :]
            distinct = min(distinct, len(set(text.tolist())))
        if best is None or distinct > best[2]:
            best = (model, prompts, distinct)
        if distinct >= _LIVELY:
            break
    assert best is not None
    return best


def random_prompts(model: Any, lens: tuple[int, ...], seed: int) -> list[list[int]]:
    """Prompts whose second half repeats some of the first, so that n-gram drafts are proposed."""
    config = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for length in lens:
        ids = torch.randint(2, int(config.vocab_size), (length,), generator=generator)
        repeated = ids[length // 2 : length // 2 + 3]
        repeated.copy_(ids[: len(repeated)].clone())
        prompts.append(ids.tolist())
    return prompts
