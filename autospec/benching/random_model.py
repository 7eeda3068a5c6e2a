"""Models and draft heads with random weights, made where they are used: no file, no second copy, seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from autospec.heads.eagle3 import Eagle3Head, Eagle3Spec
from autospec.heads.mtp import MTPHead, MTPModule
from autospec.model_zoo.mtp_heads import DEEPSEEK
from autospec.model_zoo.shapes import ArchitectureShape

STD = 0.02  # what transformers initialises Llama and Qwen with
# Mean probability of the draft's best token. A guess: where a trained head is right about 0.75 of the time (the geometric
# profile of 3.91 tokens from a chain of 7), its best token has somewhat less, and a tree spends nodes on its rivals.
DRAFT_TOP1 = 0.6


def random_model(shape: ArchitectureShape, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """A causal LM of this shape on the device: weights N(0, 0.02), norms 1."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(_config(shape), dtype=dtype)
    return model.eval().requires_grad_(False)


def random_head(
    shape: ArchitectureShape, model: Any, device: torch.device, dtype: torch.dtype, seed: int, top1: float = DRAFT_TOP1
) -> Eagle3Head:
    """An EAGLE-3 head for a `random_model`: weights N(0, 0.02), its lm_head scaled so that its logits are peaked.

    The final norm makes hidden states of mean square 1, so that logits are N(0, H std^2) whatever the input, and the
    scale decides how probable the best token is: see `peaked`.
    """
    layer = _layer_config(shape)
    spec = Eagle3Spec(layer=layer, draft_vocab_size=shape.draft_vocab, tap_after=shape.tap_after,
                      target_hidden_size=shape.hidden)  # fmt: skip
    with torch.device("meta"):
        head = Eagle3Head(spec, model.get_input_embeddings().weight)
    head.rotary_emb = LlamaRotaryEmbedding(layer).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, like in head.own_state().items():
        weight = torch.ones(like.shape, device=device, dtype=dtype)
        if like.dim() > 1:
            std = peaked(shape.draft_vocab, top1) / shape.hidden**0.5 if name == "lm_head.weight" else STD
            weight.normal_(0.0, std, generator=generator)
        weights[name] = weight
    head.load_state_dict(weights, strict=False, assign=True)
    # The draft vocabulary is spread evenly over the target's.
    ids = torch.arange(shape.draft_vocab, device=device)
    head.d2t = ids * (shape.vocab // shape.draft_vocab) - ids
    return head.eval().requires_grad_(False)


def random_mtp(shape: ArchitectureShape, model: Any, device: torch.device, dtype: torch.dtype, seed: int) -> MTPHead:
    """One MTP module for a `random_model`, like its last layer: weights N(0, 0.02), norms 1, the rest as that layer has it."""
    decoder = model.get_decoder()
    last = decoder.layers[-1]
    with torch.device("meta"):
        block = type(last)(decoder.config, len(decoder.layers) - 1)
        head = MTPHead(DEEPSEEK, model, [MTPModule(shape.hidden, decoder.norm, block, None, None)])
    torch.manual_seed(seed)
    of_layer = {f"depths.0.block.{name}": value for name, value in last.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for name, like in head.own_state().items():
        if like.dim() > 1:
            weights[name] = torch.empty(like.shape, device=device, dtype=dtype).normal_(0.0, STD)
        else:
            weights[name] = of_layer[name].clone() if name in of_layer else torch.ones(like.shape, device=device, dtype=dtype)
    head.load_state_dict(weights, strict=False, assign=True)
    return head.eval().requires_grad_(False)


def peaked(vocab_size: int, top1: float, rows: int = 256) -> float:
    """The standard deviation at which the best of so many normal logits has probability `top1` on average.

    By bisection over one sample of rows, the same in every call.
    """
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))
    low, high = 0.0, 100.0
    for _ in range(20):
        middle = (low + high) / 2
        mean = (logits.amax(1) * middle - (logits * middle).logsumexp(1)).exp().mean()
        low, high = (middle, high) if mean < top1 else (low, middle)
    return high


def _config(shape: ArchitectureShape) -> Any:
    return AutoConfig.for_model(
        shape.model_type, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocab, rope_parameters=dict(shape.rope), rms_norm_eps=shape.eps,
        max_position_embeddings=shape.max_positions, tie_word_embeddings=shape.tied, initializer_range=STD,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, **shape.config,
    )  # fmt: skip


def _layer_config(shape: ArchitectureShape) -> LlamaConfig:
    """One decoder layer of the target's sizes, rotated the same way."""
    return LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=1,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocab, rope_parameters=dict(shape.rope), rms_norm_eps=shape.eps,
        max_position_embeddings=shape.max_positions,
    )  # fmt: skip
