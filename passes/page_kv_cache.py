"""Let attention read its keys and values from pages instead of from this call's tokens.

    %o = autospec.attention(%q, %k, %v, ...)   ->   %qt, %kt, %vt = transpose(%q), transpose(%k), transpose(%v)
                                                    autospec.append_kv(%kt, %vt, %k_pages, %v_pages, ...)
                                                    %o = autospec.paged_attention(%qt, %k_pages, %v_pages, ...)

Legal: attention is causal in positions, and a token's K and V depend on earlier tokens only through attention (the
split-invariance probe of capture), so rows written by earlier calls are the rows that a longer call would compute.
Calls that read the very same %k and %v share one pair of page buffers and append once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import argument, aten, calls, operand
from autospec.ir.paging import PagingPass
from autospec.ir.passes import Notes
from autospec.ir.slots import slots
from autospec.kernels.append_kv import append_kv
from autospec.kernels.attention import attention
from autospec.kernels.paged_attention import paged_attention


@dataclass(frozen=True, kw_only=True)
class PageKvCache(PagingPass):
    """Attention over k and v becomes append_kv and paged_attention."""

    name = "page-kv-cache"

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        yield from super().requires(module)
        for node in calls(module, attention):
            if argument(node, "indices") is not None:
                yield f"%{node.name} attends to selected keys, which only latents are paged for"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        found = list(calls(module, attention))
        shared: dict[tuple[fx.Node, fx.Node], tuple[fx.Node, fx.Node]] = {}
        first = sum(slot.name.startswith("latent_pages.") for slot in slots(module))  # layers with latents are numbered before
        for node in found:
            q, k, v = (operand(node, index) for index in range(3))
            batch = q.meta["val"].shape[0]
            builder = Builder(module, node, node.meta.get("module", ""))
            page_table, kv_lens = self.addresses(builder, batch)
            if (k, v) not in shared:
                index = first + len(shared)
                pages = []
                for letter, source in (("k", k), ("v", v)):
                    value = source.meta["val"]
                    pages.append(self.pages(builder, f"{letter}_pages.{index}", (value.shape[1], value.shape[3]), value.dtype))
                rows = [builder.call(aten.transpose.int, source, 1, 2) for source in (k, v)]
                builder.call(append_kv, *rows, *pages, page_table, kv_lens)
                shared[k, v] = (pages[0], pages[1])
            queries = builder.call(aten.transpose.int, q, 1, 2)
            names = ("sinks", "scale", "window", "chunk", "softcap", "alibi_slopes")
            options = {name: argument(node, name) for name in names}
            paged = builder.call(paged_attention, queries, *shared[k, v], page_table, kv_lens, **options)
            paged.meta.update({key: node.meta[key] for key in ("role", "layer") if key in node.meta})
            node.replace_all_uses_with(paged)
            module.graph.erase_node(node)
        if len(found) > len(shared):
            notes.say(f"{len(found) - len(shared)} attention calls share the K/V of another")
        return len(found)

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        for node in calls(module, attention):
            yield f"%{node.name} still attends without a cache"
