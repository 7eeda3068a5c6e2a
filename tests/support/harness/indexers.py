"""Small indexers whose scores are put together in any of several ways, and models of latent layers that they select for."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from autospec.kernels.select_keys import top_keys
from autospec.passes.fold_noops import FoldNoops
from autospec.passes.page_index_cache import PageIndexCache
from autospec.passes.page_latent_cache import PageLatentCache
from autospec.passes.recognize_dsa import RecognizeDsa
from autospec.passes.recognize_mla import RecognizeMla
from autospec.passes.specialize_shapes import SpecializeShapes
from harness.graphs import after, apply, new_state
from harness.latents import concatenated, latent_graph

Scores = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, S, Hi, Di], weights [B, S, Hi], k [B, S, Di] -> [B, S, S]


class Indexer(nn.Module):
    """x [B, S, H], positions [B, S] -> the index_topk best keys of each token, [B, S, index_topk] int32."""

    def __init__(self, scores: Scores, index_topk: int = 3, num_heads: int = 5, width: int = 6, hidden_size: int = 16) -> None:
        super().__init__()
        self.scores, self.index_topk, self.num_heads = scores, index_topk, num_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.weights_proj = nn.Linear(hidden_size, num_heads, bias=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        turned = (positions[..., None] * 0.3).cos()
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1)) * turned[..., None]
        k = self.k_proj(x).unsqueeze(2)
        k = torch.cat([k[..., :2] * turned[..., None], k[..., 2:]], -1).squeeze(2)
        return top_keys(self.scores(q, self.weights_proj(x) * 0.5, k), self.index_topk)


def indexers(scores: Scores, *which: bool) -> Callable[[], list[nn.Module | None]]:
    """One per layer, made when called: an indexer of its own, or none (the selection before it is shared)."""
    return functools.partial(lambda: [Indexer(scores) if own else None for own in which])


def written(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
    """As transformers does it."""
    scores = torch.relu(torch.matmul(q.float(), k.transpose(-1, -2).float().unsqueeze(1)) * 0.4)
    return torch.matmul(weights.float().unsqueeze(-2), scores).squeeze(-2)


def unscaled(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
    """Other views, no scale, 16-bit operands that are widened before they meet."""
    keys = k.to(torch.bfloat16)[:, :, None].permute(0, 2, 3, 1).float()
    scores = torch.relu(torch.matmul(q.to(torch.bfloat16).float(), keys))
    return torch.matmul(weights[:, :, None], scores)[:, :, 0]


BATCH, PAGE, PAGES_PER_ROW = 2, 4, 8
SIZES = {"page_size": PAGE, "num_pages": 1 + BATCH * PAGES_PER_ROW, "pages_per_row": PAGES_PER_ROW}


@functools.cache
def captured(*which: bool) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """A model with so many layers, indexers of their own or shared, as capture leaves it."""
    graph, weights = latent_graph(concatenated, num_layers=len(which), indexers=indexers(written, *which))
    apply(graph, RecognizeMla(), RecognizeDsa())
    return graph, weights


@functools.cache
def static(q_len: int, *which: bool) -> fx.GraphModule:
    return after(captured(*which)[0], SpecializeShapes(batch_size=BATCH, q_len=q_len), FoldNoops())


@functools.cache
def paged(q_len: int, *which: bool) -> fx.GraphModule:
    return after(static(q_len, *(which or (True, True))), PageIndexCache(**SIZES), PageLatentCache(**SIZES))


def state_of(module: fx.GraphModule, generator: torch.Generator) -> dict[str, Tensor]:
    """Pages lie anywhere and hold what earlier requests left."""
    state = new_state(module)
    order = torch.randperm(BATCH * PAGES_PER_ROW, generator=generator).to(torch.int32) + 1
    state["page_table"].copy_(order.reshape(BATCH, PAGES_PER_ROW))
    for name, tensor in state.items():
        if "pages." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 3)
    return state
