"""The EAGLE-3 head that is trained: its shape, its draft vocabulary, how it begins, and what it is unrolled on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from autospec.heads.eagle3 import Eagle3Head, Eagle3Layer, Eagle3Spec
from autospec.training.features import Features, Target
from autospec.training.unrolled import UnrolledAttention, UnrolledLoss


@dataclass(frozen=True, kw_only=True)
class Eagle3Shape:
    """What of the head's shape the target does not decide.

    Args:
        draft_vocab_size: rows of lm_head.
        intermediate_size: of the MLP; None: the target's.
        num_heads, num_kv_heads: of the attention; None: the target's.
    """

    draft_vocab_size: int
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    num_layers: int = 1


def choose_draft_vocabulary(counts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """counts [V] of how often each token occurs -> d2t [size] int64 offsets, t2d [V] bool: the commonest, in id order."""
    order = counts.sort(descending=True, stable=True).indices
    ids = order[:size].sort().values
    t2d = torch.zeros(len(counts), dtype=torch.bool)
    t2d[ids.cpu()] = True
    return ids.cpu() - torch.arange(size), t2d


def layer_config(target: Target, shape: Eagle3Shape) -> LlamaConfig:
    """The decoder layer's configuration: Llama's, with the target's sizes and rotary parameters."""
    config = target.config
    hidden = config.hidden_size
    their_heads = getattr(config, "num_attention_heads", None) or max(1, hidden // 64)  # of a model without attention
    heads = shape.num_heads or their_heads
    theirs = getattr(config, "head_dim", None)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if "rope_theta" not in rope:  # no rotary positions, or several kinds of them: the head has plain ones of its own
        rope = {"rope_type": "default", "rope_theta": 10000.0}
    rope.pop("partial_rotary_factor", None)
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=shape.intermediate_size or getattr(config, "intermediate_size", None) or 4 * hidden,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=shape.num_kv_heads or getattr(config, "num_key_value_heads", None) or heads,
        head_dim=theirs if theirs and heads == their_heads else hidden // heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=getattr(config, "max_position_embeddings", None) or 2048,
        rms_norm_eps=getattr(config, "rms_norm_eps", None) or 1e-6,
        rope_parameters=rope,
        hidden_act="silu",
        tie_word_embeddings=False,
    )


def new_head(target: Target, shape: Eagle3Shape, d2t: Tensor | None) -> Eagle3Head:
    """A float32 head that starts close to the target.

    lm_head is the target's rows of the draft vocabulary and norm its final norm; the projections back into the
    residual stream are zero, so that the head begins as fc followed by the target's own head.
    """
    spec = Eagle3Spec(
        layer=layer_config(target, shape),
        draft_vocab_size=shape.draft_vocab_size,
        tap_after=target.tap_after,
        target_hidden_size=target.config.hidden_size,
    )
    head = Eagle3Head(spec, target.embed_tokens.detach()).to(target.device)
    head.d2t = None if d2t is None else d2t.to(target.device)
    hidden = spec.layer.hidden_size
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        head.fc.weight[:, -hidden:] += torch.eye(hidden, device=target.device)
        weight = target.lm_head.weight
        if weight.shape[-1] == hidden:
            head.lm_head.weight.copy_(weight[head.vocabulary().to(weight.device)])
        norm = final_norm(target.model, hidden)
        if norm is not None:
            head.norm.weight.copy_(norm)
        for layer in head.layers:
            assert isinstance(layer, Eagle3Layer), "the head's layers are its own"
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return head


def final_norm(model: Any, hidden: int) -> Tensor | None:
    """The weight of the target's final norm, where it looks like a root-mean-square one around 1."""
    base = getattr(model, model.base_model_prefix, model)
    weight: Tensor | None = getattr(getattr(base, "norm", None), "weight", None)
    if weight is None or weight.shape != (hidden,) or float(weight.mean()) <= 0.1:
        return None
    return weight.detach().float()


class Eagle3Loss(UnrolledLoss):
    """Every step of a head that is unrolled, against the target's softmax restricted to the draft vocabulary."""

    def __init__(self, target: Target, head: Eagle3Head, *, steps: int = 7, decay: float = 0.8) -> None:
        super().__init__(target, head, steps=steps, decay=decay)
        self.eagle3 = head
        self.attention = head.attend = UnrolledAttention()

    def vocabulary(self) -> Tensor:
        return self.eagle3.vocabulary()

    def guesses(self, tokens: Tensor, features: Features) -> list[Tensor]:
        return self.unrolled(tokens, features.taps)

    def unrolled(self, tokens: Tensor, taps: Tensor) -> list[Tensor]:
        """tokens [B, S], taps [B, S, num_taps * H] -> [B, S - steps, draft_vocab] of logits per step."""
        self.attention.seen.clear()
        rows = tokens.shape[1] - self.steps
        positions = torch.arange(rows, device=tokens.device)[None]
        hidden = self.eagle3.fuse(taps[:, :rows].to(self.eagle3.fc.weight.dtype))
        logits = []
        for i in range(self.steps):
            guess, hidden = self.head(tokens[:, 1 + i : 1 + i + rows], hidden, positions + i)
            logits.append(guess)
        self.attention.seen.clear()
        return logits
