"""Multi-token-prediction modules (DeepSeek-V3's report, section 2.2): decoder layers that guess the tokens after the next.

    x = proj(cat(embed_norm(embed(token)), hidden_norm(hidden)))       the order is the family's
    y = norm(block(x));   logits = lm_head(y)
    y, or what the norm reads, is recycled as the next hidden

Row t pairs the hidden state of token t with token t + 1. The first pass reads what the target's lm_head reads. A block
is one more layer of the target's own class, so it attends and routes as that does.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from autospec.heads.report import HeadReport
from autospec.masks import MaskSpec
from autospec.model_zoo.mtp_heads import MTPLayout


class MTPModule(nn.Module):
    """One module; its parameters are on `meta` until a file fills them.

    Args:
        norm: the target's final norm, of whose class and size the module's own three are.
        block: a decoder layer of the target's class.
        embedding, lm_head: of its own; None: the target's.
    """

    def __init__(
        self, hidden_size: int, norm: nn.Module, block: nn.Module, embedding: nn.Module | None, lm_head: nn.Module | None
    ) -> None:
        super().__init__()
        self.embed_norm, self.hidden_norm, self.norm = (copy.deepcopy(norm).to("meta") for _ in range(3))
        self.proj = nn.Linear(2 * hidden_size, hidden_size, bias=False, device="meta")
        self.block = block
        self.embed_tokens, self.lm_head = embedding, lm_head


class MTPHead(nn.Module):
    """MTP modules and what the target lends them.

    Args:
        layout: how the family puts a module together.
        target: the model whose embedding, lm_head and rotary embedding they use.
        modules: in the order of their depth.
    """

    def __init__(self, layout: MTPLayout, target: Any, modules: list[MTPModule]) -> None:
        super().__init__()
        self.layout = layout
        self._target = (target,)  # a tuple, so that its layers are no part of the head
        self.embed_tokens = target.get_input_embeddings()
        self.lm_head = target.get_output_embeddings()
        self.rotary_emb = target.get_decoder().rotary_emb
        by_layer = isinstance(getattr(self.rotary_emb, "rope_type", None), dict)
        self._rotary_kind = ("full_attention",) if by_layer else ()  # where it differs by kind of layer
        self.depths = nn.ModuleList(modules)
        # One module whose later passes select what its first one did, rather than each for itself.
        asked = getattr(target.get_decoder().config, "index_share_for_mtp_iteration", False)
        self.shares_selection = bool(asked) and len(modules) == 1 and selects_keys(modules[0].block)
        self.report: HeadReport | None = None  # where it was loaded from

    @property
    def target(self) -> Any:
        """The model that the modules are for."""
        return self._target[0]

    @property
    def hidden_size(self) -> int:
        """Of the hidden states that come in and are recycled."""
        module: Any = self.depths[0]
        return int(module.proj.out_features)

    def first(self, count: int) -> MTPHead:
        """The same head with the first modules only."""
        if count >= len(self.depths):
            return self
        fewer = MTPHead(self.layout, self.target, list(self.depths[:count]))  # type: ignore[arg-type]
        fewer.report = self.report
        return fewer.eval()

    def forward(self, depth: int, input_ids: Tensor, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """One pass of a module: input_ids, position_ids [B, S] int64, hidden [B, S, H] -> logits [B, S, V], recycled [B, S, H]."""
        normed, recycled = self.run(depth, input_ids, hidden, position_ids)
        return self.logits(depth, normed), recycled

    def run(self, depth: int, input_ids: Tensor, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The pass without its logits: what lm_head reads, and what is recycled, both [B, S, H]."""
        module: Any = self.depths[depth]
        embeds = (module.embed_tokens or self.embed_tokens)(input_ids).to(hidden.dtype)
        parts = [module.embed_norm(embeds), module.hidden_norm(hidden)]
        x = module.proj(torch.cat(parts if self.layout.is_embedding_first else parts[::-1], dim=-1))
        rotary = self.rotary_emb(x, position_ids, *self._rotary_kind)
        more = {"attention_mask": _causal_mask(x, module.block.self_attn.config)} if selects_keys(module.block) else {}
        out = module.block(x, position_embeddings=rotary, position_ids=position_ids, **more)
        out = out[0] if isinstance(out, tuple) else out
        normed = module.norm(out)
        return normed, normed if self.layout.recycles_normed else out

    def logits(self, depth: int, normed: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, V]."""
        module: Any = self.depths[depth]
        lm_head = module.lm_head or self.lm_head
        return lm_head(normed.to(lm_head.weight.dtype))

    def own_state(self) -> dict[str, Tensor]:
        """What the file has to give: everything but what the target lends."""
        return {f"depths.{name}": value for name, value in self.depths.state_dict(keep_vars=True).items()}


def selects_keys(layer: Any) -> bool:
    """Whether a decoder layer has an indexer of its own (DeepSeek sparse attention), which asks for a mask."""
    return getattr(getattr(layer, "self_attn", None), "indexer", None) is not None


def _causal_mask(x: Tensor, config: Any) -> Any:
    """A causal mask for x [B, S, H]: added to scores, [1, 1, S, S]; symbolic while the layer is captured."""
    if config._attn_implementation == "autospec":
        return MaskSpec()
    hidden = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device)
    return hidden.triu(1)[None, None]
