"""Let an indexer read its keys from pages, and select slots.

    %i = autospec.select_keys(%q, %w, %k, index_topk, scale)
        ->   autospec.append_latent(%k[:half], %k[half:], %index_pages, ...)
             %s = autospec.dsa_indexer_logits(%q, %w, %index_pages, ..., scale=scale, index_topk=index_topk)
             %i = autospec.dsa_topk(%s, %kv_lens, index_topk)

    (quantization="fp8")
        ->   autospec.append_index_keys(%k, %index_pages, %index_scale_pages, ...)
             %s = autospec.dsa_indexer_logits(..., index_scales=%index_scale_pages)

A page row is one index key, which all heads share; selections by the very same %k share one page buffer. Pages of index
keys are addressed by the page table of the latents.
Legal: as for page-kv-cache; a slot of a request is a position of its text, and a row that sees no more than index_topk
slots takes all of them: nobody on the host asks whether a text is short. In float8 a key is another one, and so may the
selection be, and the text: nobody gets that without asking. Drafts stay free: every row is quantised once, by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import argument, aten, calls, operand
from autospec.ir.paging import PagingPass
from autospec.ir.passes import Notes
from autospec.kernels.append_index_keys import KEYS, append_index_keys
from autospec.kernels.append_latent import append_latent
from autospec.kernels.dsa_indexer_logits import dsa_indexer_logits
from autospec.kernels.dsa_topk import dsa_topk
from autospec.kernels.select_keys import select_keys, top_keys


@dataclass(frozen=True, kw_only=True)
class PageIndexCache(PagingPass):
    """Selections become append_latent of index keys, dsa_indexer_logits and dsa_topk."""

    name = "page-index-cache"
    quantization: str | None = None  # "fp8": keys in float8, with a scale each

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        yield from super().requires(module)
        for node in calls(module, top_keys):
            yield f"%{node.name} selects by scores of unknown origin"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        found = list(calls(module, select_keys))
        shared: dict[fx.Node, tuple[fx.Node, dict[str, fx.Node]]] = {}
        for node in found:
            q, weights, k = (operand(node, index) for index in range(3))
            batch = k.meta["val"].shape[0]
            index_topk, scale = argument(node, "index_topk"), argument(node, "scale")
            builder = Builder(module, node, node.meta.get("module", ""))
            page_table, kv_lens = self.addresses(builder, batch)
            if k not in shared:
                shared[k] = self._append(builder, k, len(shared), page_table, kv_lens)
            pages, scaled = shared[k]
            scores = builder.call(
                dsa_indexer_logits, q, weights, pages, page_table, kv_lens, scale=scale, index_topk=index_topk, **scaled
            )
            slots = builder.call(dsa_topk, scores, kv_lens, index_topk)
            node.replace_all_uses_with(slots)
            module.graph.erase_node(node)
        if self.quantization and shared:
            value = next(iter(shared)).meta["val"]
            width, size = value.shape[2], value.shape[2] * value.dtype.itemsize
            notes.say(f"index keys in float8: {width + 4} bytes a token with the scale instead of {size}; tokens may change")
        return len(found)

    def _append(
        self, builder: Builder, k: fx.Node, number: int, page_table: fx.Node, kv_lens: fx.Node
    ) -> tuple[fx.Node, dict[str, fx.Node]]:
        """Keep the keys: their pages, and how the scales are passed on."""
        width, dtype = k.meta["val"].shape[2], k.meta["val"].dtype
        if self.quantization:
            pages = self.pages(builder, f"index_pages.{number}", (width,), KEYS)
            scales = self.pages(builder, f"index_scale_pages.{number}", (), torch.float32)
            builder.call(append_index_keys, k, pages, scales, page_table, kv_lens)
            return pages, {"index_scales": scales}
        pages = self.pages(builder, f"index_pages.{number}", (width,), dtype)
        parts = [builder.call(aten.slice.Tensor, k, 2, *ends) for ends in ((0, width // 2), (width // 2, width))]
        builder.call(append_latent, *parts, pages, page_table, kv_lens)
        return pages, {}

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        for node in calls(module, select_keys):
            yield f"%{node.name} still selects without a cache"
