"""Training of MTP modules: layers of the target's own kind, unrolled as `attach-draft-head` runs them.

    level i   module i % n, over rows 1 ... S as they were committed (feature t with token t + 1), then over the rows of
              this draft: token t + 1 + j on the output of level j - 1, for j = 1 ... i        -> guesses token t + 2 + i

With one module a row is run once, since what it reads does not change. A further module has not seen the draft's earlier
levels and runs their rows first, for their keys.

A module begins as a copy of the target's last layer with full attention before the target's final norm, reading the
hidden state as it is; the token's half of the projection begins small.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from autospec.errors import CheckpointError
from autospec.heads.mtp import MTPHead, MTPModule
from autospec.heads.mtp_files import decoder_of, full_attention_layer, load_mtp
from autospec.model_zoo.mtp_heads import MTPLayout, layout_of
from autospec.training.features import Features, Target
from autospec.training.unrolled import UnrolledAttention, UnrolledLoss

INTERFACE = "autospec_unrolled"
PARTS = ("embed_norm", "hidden_norm", "proj", "norm")
# Keywords of the attention interface that say nothing about which keys are seen, or how.
SILENT = {
    "position_ids", "position_embeddings", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "cache_position", "is_causal", "logits_to_keep", "layer_idx", "past_key_values", "dropout",
}  # fmt: skip


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, scaling: float | None = None, **more: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface; the layer's keys of earlier steps are in `module.unrolled`."""
    given = sorted(name for name, value in more.items() if value is not None and name not in SILENT)
    if given or attention_mask is not None:
        raise _refusal(f"attention with {given[0] if given else 'a mask of its own'} cannot be unrolled", type(module).__name__)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return module.unrolled(id(module), query, key, value, scale).contiguous(), None


def _refusal(rule: str, where: str) -> CheckpointError:
    return CheckpointError(rule, at="the target's layer", where=where, help="train another head: eagle3 or medusa")


def new_mtp(target: Target, num_modules: int = 1, layout: MTPLayout | None = None) -> MTPHead:
    """float32 modules, ready to be unrolled.

    Args:
        layout: how they are put together and written; None: as the target's family does.

    Raises:
        CheckpointError: no layer of the target can be run by itself.
    """
    model, where = target.model, type(target.model).__name__
    layout = layout or layout_of(target.config.model_type)
    decoder = decoder_of(model)
    layer = decoder.layers[full_attention_layer(decoder, where)]
    if not (hasattr(model, "_can_set_attn_implementation") and model._can_set_attn_implementation()):
        raise _refusal("the target's layers do not call attention through transformers' interface", where)
    if odd := next((name for name, value in layer.named_parameters() if value.dtype.itemsize < 2), None):
        raise _refusal(f"the target is quantized: {odd}", where)
    head = MTPHead(layout, model, [_new_module(target, layer, decoder.norm) for _ in range(num_modules)])
    for module in head.depths[1:]:
        for part in PARTS:  # what the naming has once, all modules share
            if "{" not in getattr(layout, part):
                setattr(module, part, getattr(head.depths[0], part))
    with torch.no_grad():
        hidden = head.hidden_size
        for module in {id(m.proj): m for m in head.depths}.values():
            weight: Tensor = module.proj.weight  # type: ignore[assignment, union-attr]
            nn.init.normal_(weight, std=0.02)
            half = weight[:, hidden:] if layout.is_embedding_first else weight[:, :hidden]
            half += torch.eye(hidden, device=weight.device)
    _try(head, target)
    return head


def begin_from(head: MTPHead, source: str | MTPHead) -> None:
    """Take over the modules of a checkpoint, or of a loaded head, to go on training them.

    Raises:
        CheckpointError: it has fewer modules, writes them another way, or they have embeddings of their own.
    """
    theirs = source if isinstance(source, MTPHead) else load_mtp(source, head.target, len(head.depths))
    own, found = head.own_state(), theirs.own_state()
    if theirs.layout != head.layout or own.keys() != found.keys():
        odd = sorted(own.keys() ^ found.keys())
        raise CheckpointError(f"its modules are not like those that would be trained: {odd[0] if odd else theirs.layout.name}",
                              at=f"{len(theirs.depths)} modules for {len(head.depths)}", where=str(theirs.report or "MTP modules"),
                              help="lower --num-modules, or leave --start-from out")  # fmt: skip
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(found[name])


def _new_module(target: Target, layer: nn.Module, norm: nn.Module) -> MTPModule:
    """A module whose block is a copy of the layer, with an attention of its own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(INTERFACE, _attend)
    block = copy.deepcopy(layer)
    for part in block.modules():
        config: Any = getattr(part, "config", None)
        if config is not None:
            config._attn_implementation_internal = INTERFACE
            config._experts_implementation_internal = "eager"  # a product per expert, which autocast knows
    module = MTPModule(target.config.hidden_size, norm, block, None, None)
    module.norm = copy.deepcopy(norm)
    for name in ("embed_norm", "hidden_norm"):
        setattr(module, name, _neutral(norm, target.config.hidden_size))
    module.proj = nn.Linear(module.proj.in_features, module.proj.out_features, bias=False)
    return module.to(target.device).float().requires_grad_(True)


def _neutral(norm: nn.Module, size: int) -> nn.Module:
    """A norm of the class that does nothing but norm: families count its weight from 0 or from 1."""
    made = copy.deepcopy(norm)
    try:
        made.load_state_dict(type(norm)(size).state_dict())
    except (TypeError, RuntimeError) as error:
        raise _refusal(f"its norm cannot be made anew: {error}", type(norm).__name__) from error
    return made


def _try(head: MTPHead, target: Target) -> None:
    """One pass over two tokens, so that what cannot be trained is refused before any data is read."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=target.device)
    hidden = torch.zeros(1, 2, head.hidden_size, device=target.device)
    attention = UnrolledAttention()
    unroll(head, attention)
    try:
        with torch.no_grad():
            head.run(0, ids, hidden, torch.arange(2, device=target.device)[None])
    except CheckpointError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _refusal(f"the layer cannot be run by itself: {type(error).__name__}: {reason:.160}",
                       type(target.model).__name__) from error  # fmt: skip
    if [len(passes) for passes in attention.seen.values()] != [1]:
        raise _refusal("the layer does not attend once through transformers' interface", type(target.model).__name__)


def unroll(head: MTPHead, attention: UnrolledAttention) -> None:
    """Let every block of the head attend through `attention`."""
    for part in head.depths.modules():
        if hasattr(part, "config"):
            part.unrolled = attention  # type: ignore[assignment]


class MTPLoss(UnrolledLoss):
    """Every level of a draft by MTP modules, against the target's softmax."""

    def __init__(self, target: Target, head: MTPHead, *, steps: int = 3, decay: float = 0.8) -> None:
        super().__init__(target, head, steps=steps, decay=decay)
        self.mtp, self.attention = head, UnrolledAttention()
        unroll(head, self.attention)

    def guesses(self, tokens: Tensor, features: Features) -> list[Tensor]:
        return self.unrolled(tokens, features.hidden)

    def unrolled(self, tokens: Tensor, hidden: Tensor) -> list[Tensor]:
        """tokens [B, S], hidden [B, S, H] that lm_head reads -> [B, S - steps, V] of logits per level."""
        self.attention.seen.clear()
        rows, count = tokens.shape[1] - self.steps, len(self.mtp.depths)
        positions = torch.arange(rows, device=tokens.device)[None]
        above = [hidden[:, :rows].float()]  # by level: what its rows hang from
        done = [0] * count
        logits = []
        for level in range(self.steps):
            module = level % count
            for step in range(done[module], level + 1):
                normed, out = self.mtp.run(module, tokens[:, 1 + step : 1 + step + rows], above[step], positions + step)
            done[module] = level + 1
            above.append(out)
            logits.append(self.mtp.logits(module, normed))
        self.attention.seen.clear()
        return logits
