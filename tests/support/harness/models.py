"""Tiny Hugging Face models, each made and captured once per process, and an oracle that knows nothing of autospec."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from autospec.assemble import capture_model
from autospec.kernels.noise import gumbel
from autospec.program import CapturedModel
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

_MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "target": ("llama", 0, {}),
    "small": ("llama", 1, {"num_hidden_layers": 1}),
    "window": ("mistral", 2, {"sliding_window": 7}),
}


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
def captured(name: str) -> CapturedModel:
    """The shared capture of a model. "near" is the target with disturbed weights: a draft that is right at times."""
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


def hf_cache(name: str, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """K and V of every layer for these tokens as transformers computes them: [S, Hkv, D] each."""
    with torch.no_grad():
        cache = model(name)(torch.tensor([ids]), past_key_values=DynamicCache()).past_key_values
    return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]
