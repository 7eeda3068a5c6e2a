"""Let latent attention read its latents from pages, and work in latent space.

    %o = autospec.latent_attention(%q_nope, %q_rope, %latent, %k_rope, %w_uk, %w_uv, scale)
        ->   autospec.append_latent(%latent, %k_rope, %latent_pages, ...)
             %q_latent = aten.bmm(%q_nope by head, %w_uk)
             %c = autospec.paged_mla(%q_latent, %q_rope, %latent_pages, ...)
             %o = aten.bmm(%c by head, %w_uv^T)

A page row is kv_lora_rank + qk_rope_head_dim wide, whatever the number of heads. Calls that read the very same %latent
and %k_rope share one page buffer and append once.
Legal: as for page-kv-cache; and q . (w_uk c) = (q w_uk) . c, and a sum of w_uv c weighted by probabilities is w_uv times
the weighted sum of c.
Not done: prefill keeps to latent space too. Expanding K and V there would save arithmetic from about 170 tokens per call
on (DeepSeek-V3's sizes), but every chunk behind the first would expand all committed rows again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import argument, aten, calls, operand
from autospec.ir.passes import Notes, Pass
from autospec.ir.slots import Slot
from autospec.kernels.append_latent import append_latent
from autospec.kernels.latent_attention import latent_attention
from autospec.kernels.paged_mla import paged_mla


@dataclass(frozen=True, kw_only=True)
class PageLatentCache(Pass):
    """Latent attention becomes append_latent and paged_mla between two projections."""

    name = "page-latent-cache"
    page_size: int
    num_pages: int
    pages_per_row: int
    is_length_given: bool = False  # kv_lens is an input of the graph (a spliced draft) instead of state

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        if "fake_mode" not in module.meta:
            yield "shapes must be static"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        found = list(calls(module, latent_attention))
        shared: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        for node in found:
            q_nope, q_rope, latent, k_rope, w_uk, w_uv = (operand(node, index) for index in range(6))
            batch = latent.meta["val"].shape[0]
            builder = Builder(module, node, node.meta.get("module", ""))
            page_table = builder.state("page_table", (batch, self.pages_per_row), torch.int32)
            kv_lens = builder.slot(Slot("input" if self.is_length_given else "state", "kv_lens", (batch,), torch.int32))
            if (latent, k_rope) not in shared:
                width = latent.meta["val"].shape[2] + k_rope.meta["val"].shape[2]
                size = (self.num_pages, self.page_size, width)
                pages = builder.state(f"latent_pages.{len(shared)}", size, latent.meta["val"].dtype)
                builder.call(append_latent, latent, k_rope, pages, page_table, kv_lens)
                shared[latent, k_rope] = pages
            q_latent = _by_head(builder, builder.call(aten.permute.default, q_nope, [1, 0, 2, 3]), w_uk)
            q_rope = builder.call(aten.transpose.int, q_rope, 1, 2)
            mixed = builder.call(
                paged_mla, q_latent, q_rope, shared[latent, k_rope], page_table, kv_lens, scale=argument(node, "scale")
            )
            mixed.meta.update({key: node.meta[key] for key in ("role", "layer") if key in node.meta})
            w_uv = builder.call(aten.transpose.int, w_uv, 1, 2)
            out = _by_head(builder, builder.call(aten.permute.default, mixed, [2, 0, 1, 3]), w_uv)
            out = builder.call(aten.clone.default, out, memory_format=torch.contiguous_format)
            node.replace_all_uses_with(out)
            module.graph.erase_node(node)
        if len(found) > len(shared):
            notes.say(f"{len(found) - len(shared)} attention calls share the latent of another")
        return len(found)

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        for node in calls(module, latent_attention):
            yield f"%{node.name} still attends without a cache"


def _by_head(builder: Builder, rows: fx.Node, weight: fx.Node) -> fx.Node:
    """rows [H, B, N, K] times weight [H, K, M] -> [B, N, H, M]; every weight is read once for all requests."""
    heads, batch, q_len, width = rows.meta["val"].shape
    flat = builder.call(aten.reshape.default, rows, [heads, batch * q_len, width])
    product = builder.call(aten.bmm.default, flat, weight)
    product = builder.call(aten.view.default, product, [heads, batch, q_len, weight.meta["val"].shape[2]])
    return builder.call(aten.permute.default, product, [1, 2, 0, 3])
