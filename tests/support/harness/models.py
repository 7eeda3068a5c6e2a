"""Tiny Hugging Face models, each made and captured once per process, and an oracle that knows nothing of autospec."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from autospec.assemble import capture_model
from autospec.capture_head import capture_head
from autospec.heads.eagle3 import Eagle3Head, Eagle3Spec
from autospec.heads.medusa import MedusaHeads
from autospec.heads.mtp import MTPHead, MTPModule, selects_keys
from autospec.kernels.noise import gumbel
from autospec.model_zoo.mtp_heads import DEEPSEEK
from autospec.runtime.request import SamplingParams

GREEDY = SamplingParams()
VOCAB = 64
POSITIONS = 256

# Weights far larger than usual: attention is then sharp, and a wrong row of the cache changes tokens at once.
_COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip

_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "head_dim": 4, "kv_lora_rank": 12, "q_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
# torch.topk promises no order among equals: of few index heads all scores of a key may be 0, and those of padding are.
_SPARSE: dict[str, Any] = {"index_n_heads": 32, "index_head_dim": 8, "index_topk": 6, "pad_token_id": None}

_MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "target": ("llama", 0, {}),
    "small": ("llama", 1, {"num_hidden_layers": 1}),
    "window": ("mistral", 2, {"sliding_window": 7}),
    "chunk": ("llama4_text", 3, {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48,
                                 "num_hidden_layers": 4}),
    "latent": ("deepseek_v3", 4, _LATENT),
    "sparse": ("deepseek_v32", 5, {**_LATENT, **_SPARSE}),
    "shared": ("glm_moe_dsa", 6, {**_LATENT, **_SPARSE, "num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"],
                                  "mlp_layer_types": ["dense", "sparse", "dense"]}),
    "sinks": ("hy_v4", 7, {**_LATENT, **_SPARSE, "indexer_types": ["full", "shared"], "learnable_sink_init": 1.0}),
}
TAPS = (0, 0, 1)  # the tiny target has two layers
MODULES = {"mtp": ("target", 1), "mtp3": ("target", 3), "mtp-latent": ("latent", 2),
           "mtp-sparse": ("sparse", 1), "mtp3-sparse": ("sparse", 3), "mtp-share": ("sparse", 1)}  # the target and how many


def tiny(family: str, seed: int = 0, **config: Any) -> Any:
    """A random causal LM in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**_COMMON, **config}))
    return model.eval()


@functools.cache
def model(name: str) -> Any:
    """The shared module of this name; tests must leave it as it is."""
    family, seed, config = _MODELS[name]
    return tiny(family, seed, **config)


@functools.cache
def head(name: str) -> Any:
    """A random draft head of the tiny target: "eagle" has two layers and a vocabulary of its own, "medusa" eight heads,
    "mtp" one module, "mtp3" three, "mtp-latent" two of the target with latents."""
    target = model("target")
    with torch.random.fork_rng():
        torch.manual_seed(11)
        if name in MODULES:
            made = _mtp(model(MODULES[name][0]), MODULES[name][1])
            made.shares_selection = name == "mtp-share"
            return made
        if name == "medusa":
            return MedusaHeads(_COMMON["hidden_size"], VOCAB, 8).eval()
        config = LlamaConfig(**{**_COMMON, "num_hidden_layers": 2})
        spec = Eagle3Spec(layer=config, draft_vocab_size=48, tap_after=TAPS, target_hidden_size=config.hidden_size)
        made = Eagle3Head(spec, target.get_input_embeddings().weight)
        for parameter in made.own_state().values():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
        # Every fourth id of the target is unknown to the draft.
        made.d2t = torch.tensor([i for i in range(VOCAB) if i % 4]) - torch.arange(48)
    return made.eval()


def _mtp(target: Any, count: int) -> MTPHead:
    decoder = target.get_decoder()
    blocks = [type(decoder.layers[-1])(decoder.config, 1) for _ in range(count)]
    modules = [MTPModule(_COMMON["hidden_size"], decoder.norm, block, None, None).to_empty(device="cpu") for block in blocks]
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    for buffer in (buffer for module in modules for buffer in module.buffers()):
        buffer.zero_()  # the bias of a router
    return MTPHead(DEEPSEEK, target, modules).eval().requires_grad_(False)


@functools.cache
def captured(name: str) -> Any:
    """The shared capture of a model or head. "near" is the target with disturbed weights: a draft that is right at times."""
    if name in ("eagle", "medusa", *MODULES):
        return capture_head(head(name), captured(MODULES[name][0] if name in MODULES else "target"))
    if name == "near":
        generator = torch.Generator().manual_seed(7)
        exact = captured("target")
        noisy = {
            key: weight + 0.15 * weight.std() * torch.randn(weight.shape, generator=generator)
            for key, weight in exact.weights.items()
        }
        return dataclasses.replace(exact, weights=noisy)
    return capture_model(model(name), name)


def logits(name: str, ids: list[int]) -> Tensor:
    """The model's logits after the last of these tokens, [V] float32, without any cache."""
    with torch.no_grad():
        return model(name)(torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def processors(sampling: SamplingParams) -> LogitsProcessorList:
    """Transformers' own processors in its own order."""
    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        found.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            found.append(MinPLogitsWarper(sampling.min_p))
    return found


@functools.lru_cache(maxsize=4096)
def next_token(name: str, ids: tuple[int, ...], sampling: SamplingParams, row_key: int) -> int:
    """What the target chooses after `ids`: argmax of the processed logits, plus the noise of that index."""
    scores = processors(sampling)(torch.tensor([ids]), logits(name, list(ids))[None])
    if sampling.temperature > 0:
        scores = scores + gumbel(torch.tensor([row_key]), torch.tensor([[len(ids)]]), scores.shape[-1])[:, 0]
    return int(scores.argmax())


def oracle(
    name: str, prompt: list[int], count: int, sampling: SamplingParams = GREEDY, row_key: int = 0,
    eos_ids: tuple[int, ...] = (),
) -> list[int]:  # fmt: skip
    """Up to `count` tokens, one forward of the Hugging Face module over the whole sequence per token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(name, tuple(ids), sampling, row_key))
        if ids[-1] in eos_ids:
            break
    return ids[len(prompt) :]


def hf_cache(name: str, ids: list[int]) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """K and V of every layer for these tokens as transformers computes them, [S, Hkv, D] each; latent and rope, [S, 1, *].

    And the keys of every indexer, [S, Di] each.
    """
    config = model(name).config
    with torch.no_grad():
        cache = DynamicCache(config=config) if hasattr(config, "index_topk") else DynamicCache()
        layers = model(name)(torch.tensor([ids]), past_key_values=cache).past_key_values.layers
    index_keys = [layer.indexer_keys[0] for layer in layers if getattr(layer, "is_indexer_initialized", False)]
    return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in layers], index_keys


def eagle_rows(ids: list[int], path: tuple[int, ...] = ()) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The EAGLE-3 head re-fed with everything: committed tokens on the target's features, then drafts on its own output.

    ids: the committed tokens and the root. -> draft logits after the last row over the target's vocabulary (-inf where
    the draft does not know a token), and K and V of its layers, [rows, Hkv, D] each.
    """
    eagle, target = head("eagle"), model("target")
    with torch.no_grad():
        states = target(torch.tensor([ids[:-1]]), output_hidden_states=True, use_cache=False).hidden_states
        outputs = [*states[1:-1], _last_layer(target, ids[:-1])]  # the last of hidden_states has passed the final norm
        hidden = eagle.fuse(torch.cat([outputs[layer] for layer in TAPS], -1))
        rows: list[tuple[Tensor, Tensor]] = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            rows.append((k[0].transpose(0, 1), v[0].transpose(0, 1)))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            return out.transpose(1, 2)

        plain, eagle.attend = eagle.attend, attend
        try:
            for count in range(len(path) + 1):
                tokens = torch.tensor([[*ids[1:], *path[:count]]])
                rows.clear()
                logits, recycled = eagle(tokens, hidden, torch.arange(tokens.shape[1])[None])
                hidden = torch.cat([hidden, recycled[:, -1:]], 1)
        finally:
            eagle.attend = plain
    known = torch.full((VOCAB,), float("-inf"))
    known[eagle.vocabulary()] = logits[0, -1]
    return known, rows


def mtp_rows(name: str, ids: list[int], path: tuple[int, ...] = ()) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """MTP modules re-fed with everything: row t pairs the target's hidden state t, or what was recycled, with token t + 1.

    Module d runs all rows for depth d, in turn. ids, path -> as for `eagle_rows`; K and V are those of the committed rows.
    """
    made, target = head(name), model(MODULES[name][0])
    with torch.no_grad():
        hidden = target.model(torch.tensor([ids[:-1]]), use_cache=False).last_hidden_state
        positions = torch.arange(len(ids) - 1)[None]
        rows = [_kept(made, depth, torch.tensor([ids[1:]]), hidden, positions) for depth in range(len(made.depths))]
        for count in range(len(path) + 1):
            tokens = torch.tensor([[*ids[1:], *path[:count]]])
            if made.shares_selection:
                _select_once(made.depths[0].block.self_attn.indexer, len(ids) - 1)
            logits, recycled = made(count % len(made.depths), tokens, hidden, torch.arange(tokens.shape[1])[None])
            hidden = torch.cat([hidden, recycled[:, -1:]], 1)
    return logits[0, -1], rows


def _select_once(indexer: Any, committed: int) -> None:
    """Rows behind the committed ones select what the last of those does, themselves, and the rows between."""
    plain = type(indexer).forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        chosen = plain(indexer, *args, **kwargs)
        rows = torch.arange(chosen.shape[1])
        chosen = chosen[:, rows.clamp(max=committed - 1)]
        path = rows[committed:].expand(1, len(rows), -1).to(chosen.dtype)
        return torch.cat([chosen, torch.where(path <= rows[:, None], path, chosen[..., :1])], -1)  # a key twice is one key

    indexer.forward = forward


def _kept(made: MTPHead, depth: int, ids: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of a module's rows, [rows, Hkv, D], or latent and rope, as its attention hands them to transformers' cache."""
    block: Any = made.depths[depth].block
    cache = DynamicCache(config=made.target.config) if selects_keys(block) else DynamicCache()
    hook = block.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "past_key_values": cache}), with_kwargs=True
    )
    made(depth, ids, hidden, positions)
    hook.remove()
    layer: Any = next(layer for layer in cache.layers if layer.is_initialized)
    return layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)


def _last_layer(target: Any, ids: list[int]) -> Tensor:
    """The output of the last decoder layer, before the final norm: [1, S, H]."""
    seen: list[Tensor] = []
    hook = target.model.norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    target(torch.tensor([ids]), use_cache=False)
    hook.remove()
    return seen[0]
