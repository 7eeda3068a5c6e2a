"""The training-time test of EAGLE-3: the head is unrolled on its own output, seeing exactly what drafting will show it.

    step 0   row t: feature t and token t + 1, over the keys of step 0 up to row t      -> guesses token t + 2
    step i   row t: its own output of step i - 1 and token t + 1 + i, rotary t + i,
             over the keys of step 0 up to row t, then its own keys of steps 1 ... i    -> guesses token t + 2 + i

Row t of step i is level i of a draft that starts after feature t: rows of the cache that were committed, then its own
ancestors. The other rows of a later step belong to other drafts and are not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig

from autospec.heads.eagle3 import Eagle3Head, Eagle3Layer, Eagle3Spec
from autospec.training.features import Features, Target
from autospec.training.loop import Batch, Loss


class UnrolledAttention:
    """The head's attention while it is unrolled; the first call of a layer is step 0."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [B, Hq, S, D], k, v [B, Hkv, S, D] -> [B, S, Hq, D]."""
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        past = self.seen.setdefault(layer, [])
        past.append((k, v))
        if len(past) == 1:
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            out = self.over_ancestors(q, past, scale)
        return out.transpose(1, 2)

    @staticmethod
    def over_ancestors(q: Tensor, past: list[tuple[Tensor, Tensor]], scale: float) -> Tensor:
        """Softmax over the keys of step 0 up to the own row, and the own row's keys of each later step."""
        (first_k, first_v), later = past[0], past[1:]
        rows = torch.arange(q.shape[2], device=q.device)
        own_k, own_v = (torch.stack(parts, dim=3) for parts in zip(*later, strict=True))  # [B, H, S, steps, D]
        q = q * scale
        committed = (q @ first_k.transpose(-1, -2)).masked_fill_(rows[None, :] > rows[:, None], float("-inf"))
        own = (q[:, :, :, None] * own_k).sum(-1).to(committed.dtype)
        own = functional.pad(own, (0, -own.shape[-1] % 8), value=float("-inf"))  # matrix products like round strides
        weights = torch.cat([committed, own], dim=-1).softmax(-1, dtype=torch.float32).to(first_v.dtype)
        out = weights[..., : len(rows)] @ first_v
        return out + (weights[..., len(rows) : len(rows) + len(later), None] * own_v).sum(3)


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


class Eagle3Loss(Loss):
    """Soft cross-entropy of every unrolled step to the target's softmax, restricted to the draft vocabulary.

    The softmax is taken before the restriction: a position counts by how much of the target's mass the draft
    vocabulary can say.

    Args:
        steps: unrolled steps.
        decay: step i weighs decay ** i.
    """

    def __init__(self, target: Target, head: Eagle3Head, *, steps: int = 7, decay: float = 0.8) -> None:
        super().__init__()
        self.target, self.head, self.eagle3 = target, head, head
        self.steps = steps
        self.weights = [decay**i / sum(decay**j for j in range(steps)) for i in range(steps)]
        self.attention = head.attend = UnrolledAttention()

    def features(self, batch: Batch) -> Features:
        return self.target(batch.tokens)

    def count(self, batch: Batch) -> Tensor:
        return batch.weights[:, 1 : 1 + batch.tokens.shape[1] - self.steps].sum()

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

    def forward(self, tokens: Tensor, weights: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        """-> the loss summed over the counted positions, [3, steps]: summed losses, agreements and right prefixes."""
        logits = features.logits.float()
        best = logits.argmax(-1)
        ids = self.eagle3.vocabulary()
        goals = (logits[..., ids] - logits.logsumexp(-1, keepdim=True)).exp()
        rows = tokens.shape[1] - self.steps
        counted = weights[:, 1 : 1 + rows]
        losses, agreements, prefixes = [], [], []
        for i, guess in enumerate(self.unrolled(tokens, features.taps)):
            here = slice(1 + i, 1 + i + rows)
            loss = -(goals[:, here] * guess.float().log_softmax(-1)).sum(-1)
            agrees = (ids[guess.argmax(-1)] == best[:, here]).float()
            losses.append((loss * weights[:, here]).sum())
            agreements.append((agrees * weights[:, here]).sum())
            counted = counted * agrees
            prefixes.append(counted.sum())
        total = torch.stack([weight * loss for weight, loss in zip(self.weights, losses, strict=True)]).sum()
        return total, torch.stack([torch.stack(losses).detach(), torch.stack(agreements), torch.stack(prefixes)])
