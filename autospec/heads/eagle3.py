"""The EAGLE-3 draft head (Li et al., 2025): a decoder layer that reads the target's hidden states at three depths.

    g   = fc(cat(taps))                              target features, [B, S, num_taps * H_target] -> [B, S, H]
    x   = cat(input_layernorm(embed(token)), hidden_norm(g))
    h   = g + attention(x);  out = h + mlp(post_attention_layernorm(h))
    logits = lm_head(norm(out)) over the draft vocabulary;  out is recycled as the next g

Row t pairs feature t with token t + 1. `fuse` runs on target features only; recycled hidden states skip it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from autospec.heads.report import HeadReport
from autospec.kernels.attention import attention

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class Eagle3Spec:
    """What a checkpoint says beyond its decoder layer.

    Args:
        layer: the decoder layer's configuration; vocab_size is the target's.
        draft_vocab_size: rows of lm_head.
        tap_after: 0-based target layers whose output is read.
        target_hidden_size: width of a tap, and of the embeddings unless the head has its own.
        norm_before_residual: the residual is the normed g.
        norm_before_fc: an RMSNorm over the concatenated taps.
        fc_norm: an RMSNorm of every tap of its own.
        norm_output: what is recycled has passed the final norm.
        qk_norm: an RMSNorm over every head of the queries and keys (decoder layers of Qwen3's kind).
        fc_bias: fc has a bias.
        own_embeddings: the head has embeddings of width H; else the target's are used.
        own_lm_head: the head has an lm_head; else the target's is used, and the vocabularies are one.
    """

    layer: LlamaConfig
    draft_vocab_size: int
    tap_after: tuple[int, ...]
    target_hidden_size: int
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    qk_norm: bool = False
    fc_bias: bool = False
    own_embeddings: bool = False
    own_lm_head: bool = True


def attend_canonically(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [B, Hq, S, D], k, v [B, Hkv, S, D] -> [B, S, Hq, D]: the canonical op, which the compiler pages."""
    return attention(q, k, v, None, scale)


class Eagle3Attention(nn.Module):
    """Grouped-query attention; the first layer reads 2H, the others H."""

    def __init__(self, config: LlamaConfig, index: int, qk_norm: bool = False) -> None:
        super().__init__()
        kv_heads = config.num_key_value_heads
        assert config.head_dim, "LlamaConfig fills it in"
        assert kv_heads, "LlamaConfig fills it in"
        self.index, self.head_dim = index, config.head_dim
        width = config.hidden_size * (2 if index == 0 else 1)
        bias = bool(config.attention_bias)
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=bias)
        self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else None
        self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (
            projection(x).view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        out = attend(self.index, q, k, v, self.head_dim**-0.5)
        return self.o_proj(out.flatten(2))


class Eagle3Layer(nn.Module):
    """One decoder layer of the head; the first one reads the embeddings, too."""

    def __init__(self, config: LlamaConfig, index: int, norm_before_residual: bool, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        self.self_attn = Eagle3Attention(config, index, qk_norm)
        self.mlp = LlamaMLP(config)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        if index == 0:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embeds: Tensor | None, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual and embeds is not None else hidden
        x = normed if embeds is None else torch.cat([self.input_layernorm(embeds), normed], dim=-1)
        hidden = residual + self.self_attn(x, cos, sin, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Head(nn.Module):
    """Args:
        spec: the shape and variant of the head.
        embed_tokens: the target's embedding weight [V, H_target]; shared, never saved (None: the head has its own).
        lm_head: the target's lm_head weight [V, H], likewise; only for a head without its own.
    """

    def __init__(self, spec: Eagle3Spec, embed_tokens: Tensor | None = None, lm_head: Tensor | None = None) -> None:
        super().__init__()
        config = spec.layer
        assert spec.own_embeddings == (embed_tokens is None), "a head has its own embeddings or is given the target's"
        assert spec.own_lm_head == (lm_head is None), "a head has its own lm_head or is given the target's"
        self.spec = spec
        self.attend: Attend = attend_canonically
        lent = embed_tokens is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=embed_tokens, _freeze=lent)
        taps = len(spec.tap_after)
        wide = taps * spec.target_hidden_size
        self.norm_before_fc = LlamaRMSNorm(wide, config.rms_norm_eps) if spec.norm_before_fc else None
        norms = [LlamaRMSNorm(spec.target_hidden_size, config.rms_norm_eps) for _ in range(taps if spec.fc_norm else 0)]
        self.fc_norm = nn.ModuleList(norms)
        self.fc = nn.Linear(wide, config.hidden_size, bias=spec.fc_bias)
        self.layers = nn.ModuleList(
            Eagle3Layer(config, index, spec.norm_before_residual, spec.qk_norm) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, spec.draft_vocab_size, bias=False)
        if lm_head is not None:
            self.lm_head.weight = nn.Parameter(lm_head, requires_grad=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.d2t: Tensor | None
        self.register_buffer("d2t", None)  # [draft_vocab] int64 offsets; None: the vocabularies are one
        self.report: HeadReport | None = None  # where it was loaded from

    def fuse(self, taps: Tensor) -> Tensor:
        """taps [B, S, num_taps * H_target], in layer order -> g [B, S, H]."""
        if self.norm_before_fc is not None:
            taps = self.norm_before_fc(taps)
        if len(self.fc_norm):
            pieces = taps.chunk(len(self.fc_norm), dim=-1)
            taps = torch.cat([norm(piece) for norm, piece in zip(self.fc_norm, pieces, strict=True)], dim=-1)
        return self.fc(taps)

    def forward(self, input_ids: Tensor, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids, position_ids [B, S] int64, hidden [B, S, H] -> logits [B, S, draft_vocab], recycled [B, S, H]."""
        cos, sin = self.rotary_emb(hidden, position_ids)
        embeds: Tensor | None = self.embed_tokens(input_ids).to(hidden.dtype)
        for layer in self.layers:
            hidden = layer(embeds, hidden, cos, sin, self.attend)
            embeds = None
        normed = self.norm(hidden)
        return self.lm_head(normed), normed if self.spec.norm_output else hidden

    def vocabulary(self) -> Tensor:
        """Target ids of the draft vocabulary, [draft_vocab] int64."""
        ids = torch.arange(self.spec.draft_vocab_size, device=self.lm_head.weight.device)
        return ids if self.d2t is None else ids + self.d2t

    def own_state(self) -> dict[str, Any]:
        """The head's parameters: everything but what the target lends."""
        lent = set() if self.spec.own_embeddings else {"embed_tokens.weight"}
        lent |= set() if self.spec.own_lm_head else {"lm_head.weight"}
        return {name: value for name, value in self.named_parameters(remove_duplicate=False) if name not in lent}
