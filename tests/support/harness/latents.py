"""A small language model with latent attention whose keys and values are put together in any of several ways."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from autospec.ir.text import graph_text
from autospec.kernels.attention import attention
from harness.graphs import VOCAB, captured_graph

PLACES = 256


@dataclass(frozen=True)
class Dims:
    """Sizes of the toy, by their field names."""

    hidden_size: int = 16
    num_heads: int = 3
    kv_lora_rank: int = 8
    qk_nope_head_dim: int = 4
    qk_rope_head_dim: int = 2
    v_head_dim: int = 5


Parts = tuple[Tensor, Tensor, Tensor]  # q, k [B, H, S, nope + rope], v [B, H, S, v]
Spelling = Callable[["LatentLayer", Tensor, Tensor, Tensor], Parts]


class LatentLayer(nn.Module):
    """`spell(layer, q, latent, k_rope)` makes q, k and v of q [B, H, S, D], latent [B, S, R] and k_rope [B, S, E]."""

    def __init__(self, dims: Dims, spell: Spelling, options: dict[str, Any]) -> None:
        super().__init__()
        self.dims, self.spell, self.options = dims, spell, options
        heads, nope, v_width = dims.num_heads, dims.qk_nope_head_dim, dims.v_head_dim
        self.q_proj = nn.Linear(dims.hidden_size, heads * (nope + dims.qk_rope_head_dim), bias=False)
        self.kv_a_proj = nn.Linear(dims.hidden_size, dims.kv_lora_rank + dims.qk_rope_head_dim, bias=False)
        self.kv_b_proj = nn.Linear(dims.kv_lora_rank, heads * (nope + v_width), bias=False)
        self.biased = nn.Linear(dims.kv_lora_rank, heads * (nope + v_width))
        self.k_proj = nn.Linear(dims.kv_lora_rank, heads * nope, bias=False)
        self.v_proj = nn.Linear(dims.kv_lora_rank, heads * v_width, bias=False)
        self.o_proj = nn.Linear(heads * v_width, dims.hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Tensor, indices: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        dims = self.dims
        q = self.q_proj(x).view(batch, length, dims.num_heads, -1).transpose(1, 2)
        latent, k_rope = self.kv_a_proj(x).split([dims.kv_lora_rank, dims.qk_rope_head_dim], -1)
        latent = latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + 1e-5)
        angle = positions[..., None] * 0.3
        k_rope = torch.cat([k_rope[..., ::2] * angle.cos(), k_rope[..., 1::2] * angle.sin()], -1)
        q_nope, q_rope = q.split([dims.qk_nope_head_dim, dims.qk_rope_head_dim], -1)
        q = torch.cat([q_nope, q_rope * angle[:, None].cos()], -1)
        q, k, v = self.spell(self, q, latent, k_rope)
        out = attention(q, k, v, **{"scale": 0.4, "indices": indices, **self.options})
        if out.shape[2] > dims.num_heads:
            out = out[:, :, : dims.num_heads]
        return x + self.o_proj(out.reshape(batch, length, -1))


class LatentModel(nn.Module):
    """Embed, one or more latent layers, read out; a layer without an indexer reuses the selection of the one before."""

    def __init__(
        self, spell: Spelling, dims: Dims, options: dict[str, Any], num_layers: int, indexers: list[nn.Module | None]
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dims.hidden_size)
        self.places = nn.Embedding(PLACES, dims.hidden_size)
        self.layers = nn.ModuleList([LatentLayer(dims, spell, options) for _ in range(num_layers)])
        self.lm_head = nn.Linear(dims.hidden_size, VOCAB, bias=False)
        self.indexers = nn.ModuleList(indexers)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor]:
        x = self.embed(input_ids) + self.places(position_ids)
        indices = None
        for number, layer in enumerate(self.layers):
            indexer = self.indexers[number] if number < len(self.indexers) else None
            indices = indexer(x, position_ids) if indexer is not None else indices
            x = layer(x, position_ids, indices)
        return (self.lm_head(x),)


def latent_graph(
    spell: Spelling, dims: Dims = Dims(), options: dict[str, Any] | None = None, num_layers: int = 1,
    indexers: Callable[[], list[nn.Module | None]] = list,
) -> tuple[fx.GraphModule, dict[str, Tensor]]:  # fmt: skip
    """The toy as capture leaves it, before recognize-mla."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = LatentModel(spell, dims, options or {}, num_layers, indexers())
    ids = torch.zeros(2, 5, dtype=torch.int64)
    return captured_graph(model, {"input_ids": ids, "position_ids": ids.clone()})


def symbol_text(module: fx.GraphModule) -> str:
    """Graph text with symbolic sizes numbered by appearance: their names differ between torch versions."""
    names = iter("BSCTUVWXYZ")
    symbols: dict[str, str] = {}
    return re.sub(r"\bs\d+\b", lambda found: symbols.get(found[0]) or symbols.setdefault(found[0], next(names)), graph_text(module))


def _kv(layer: LatentLayer, rows: Tensor) -> list[Tensor]:
    dims = layer.dims
    rows = rows.view(rows.shape[0], -1, dims.num_heads, dims.qk_nope_head_dim + dims.v_head_dim).transpose(1, 2)
    return list(rows.split([dims.qk_nope_head_dim, dims.v_head_dim], -1))


def _join(k_nope: Tensor, k_rope: Tensor) -> Tensor:
    return torch.cat([k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1, -1)], -1)


def concatenated(layer: LatentLayer, q: Tensor, latent: Tensor, k_rope: Tensor) -> Parts:
    k_nope, v = _kv(layer, layer.kv_b_proj(latent))
    return q, _join(k_nope, k_rope), v


def written(layer: LatentLayer, q: Tensor, latent: Tensor, k_rope: Tensor) -> Parts:
    """As transformers does it: an empty tensor is filled in place; the latent has a head dimension of one."""
    batch, length, width = latent.shape
    k_nope, v = _kv(layer, layer.kv_b_proj(latent.view(batch, 1, length, width)))
    k_rope = k_rope.view(batch, 1, length, -1).expand(-1, k_nope.shape[1], -1, -1)
    k = k_nope.new_empty(*k_nope.shape[:-1], k_nope.shape[-1] + k_rope.shape[-1])
    k[..., : k_nope.shape[-1]].copy_(k_nope)
    k[..., k_nope.shape[-1] :].copy_(k_rope)
    return q, k, v


def broadcast(layer: LatentLayer, q: Tensor, latent: Tensor, k_rope: Tensor) -> Parts:
    """No expand: the copy broadcasts. The queries are not concatenated where they could be cut."""
    k_nope, v = _kv(layer, layer.kv_b_proj(latent))
    k = k_nope.new_empty(*k_nope.shape[:-1], k_nope.shape[-1] + k_rope.shape[-1])
    k[..., : k_nope.shape[-1]] = k_nope
    k[..., k_nope.shape[-1] :] = k_rope.unsqueeze(2).transpose(1, 2)
    return q * 1.0, k, v


def two_projections(layer: LatentLayer, q: Tensor, latent: Tensor, k_rope: Tensor) -> Parts:
    batch, length, _ = latent.shape
    k_nope, v = (
        part(latent).view(batch, length, layer.dims.num_heads, -1).permute(0, 2, 1, 3) for part in (layer.k_proj, layer.v_proj)
    )
    return q, _join(k_nope, k_rope), v
