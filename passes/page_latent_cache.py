"""Let latent attention read its latents from pages, and work in latent space.

    %o = autospec.latent_attention(%q_nope, %q_rope, %latent, %k_rope, %w_uk, %w_uv, scale)
        ->   autospec.append_latent(%latent, %k_rope, %latent_pages, ...)
             %q_latent = aten.bmm(%q_nope by head, %w_uk)
             %c = autospec.paged_mla(%q_latent, %q_rope, %latent_pages, ...)
             %o = aten.bmm(%c by head, %w_uv^T)

    (a prompt, many tokens)
        ->   autospec.append_latent(...)
             %k_pages, %v_pages, %table = autospec.expand_latent(%latent_pages, ..., %w_uk, %w_uv)
             %o = autospec.paged_attention(cat(%q_nope, %q_rope), %k_pages, %v_pages, %table, ...)

    (keys selected by an indexer)
        ->   the first form, with autospec.paged_sparse_mla(..., %indices)

A page row is kv_lora_rank + qk_rope_head_dim wide, whatever the number of heads. Calls that read the very same %latent
and %k_rope share one page buffer and append once.
Legal: as for page-kv-cache; and q . (w_uk c) = (q w_uk) . c, and a sum of w_uv c weighted by probabilities is w_uv times
the weighted sum of c. What is expanded is thrown away after its layer: pages hold latents only.
The second form where a prompt is read and it multiplies less: per head, expanding a slot costs R (D + Dv), and a query token
that attends to it then costs 2 R - D - Dv less; R, D and Dv are kv_lora_rank, qk_nope_head_dim and v_head_dim (DeepSeek-V3:
from 171 tokens on). Not where the expanded rows of all requests, every page counted, would take more than 2 GiB (a guess).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import argument, aten, calls, operand
from autospec.ir.paging import PagingPass
from autospec.ir.passes import Notes
from autospec.kernels.append_latent import append_latent
from autospec.kernels.expand_latent import expand_latent
from autospec.kernels.latent_attention import latent_attention
from autospec.kernels.paged_attention import paged_attention
from autospec.kernels.paged_mla import paged_mla
from autospec.kernels.paged_sparse_mla import paged_sparse_mla
from autospec.kernels.select_keys import select_keys

MOST_EXPANDED = 2 << 30  # bytes of one layer's keys and values


@dataclass(frozen=True, kw_only=True)
class PageLatentCache(PagingPass):
    """Latent attention becomes append_latent, and paged_mla between two projections or attention over what it expands."""

    name = "page-latent-cache"
    reads_prompt: bool = False  # keys and values may be expanded

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        yield from super().requires(module)
        for node in calls(module, select_keys):
            yield f"%{node.name} selects positions, not slots: run page-index-cache first"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        found = list(calls(module, latent_attention))
        shared: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        forms: Counter[str] = Counter()
        for node in found:
            latent, k_rope = operand(node, 2), operand(node, 3)
            batch = latent.meta["val"].shape[0]
            builder = Builder(module, node, node.meta.get("module", ""))
            page_table, kv_lens = self.addresses(builder, batch)
            if (latent, k_rope) not in shared:
                width = latent.meta["val"].shape[2] + k_rope.meta["val"].shape[2]
                pages = self.pages(builder, f"latent_pages.{len(shared)}", (width,), latent.meta["val"].dtype)
                builder.call(append_latent, latent, k_rope, pages, page_table, kv_lens)
                shared[latent, k_rope] = pages
            pages = shared[latent, k_rope]
            why_not = self.why_not_expanded(node)
            attend = _absorbed if why_not else _expanded
            out = attend(builder, node, pages, page_table, kv_lens)
            if self.reads_prompt:
                forms[f"attends in latent space: {why_not}" if why_not else "expands keys and values first"] += 1
            node.replace_all_uses_with(out)
            module.graph.erase_node(node)
        for form, times in forms.items():
            notes.say(f"{form} x {times}")
        if len(found) > len(shared):
            notes.say(f"{len(found) - len(shared)} attention calls share the latent of another")
        return len(found)

    def why_not_expanded(self, node: fx.Node) -> str | None:
        """Why a call attends to latents as they are."""
        if not self.reads_prompt:
            return "a step verifies few tokens"
        if argument(node, "indices") is not None:
            return "every token selects keys of its own"
        q_nope, w_uk, w_uv = (operand(node, index).meta["val"] for index in (0, 4, 5))
        batch, heads, q_len, _ = q_nope.shape
        rank, own = w_uk.shape[2], w_uk.shape[1] + w_uv.shape[1]
        if q_len * (2 * rank - own) <= rank * own:
            return f"{q_len} tokens a call are too few to expand for"
        width = own + operand(node, 1).meta["val"].shape[3]
        size = batch * self.pages_per_row * self.page_size * heads * width * q_nope.element_size()
        return f"expanded rows would take {size / 2**30:.1f} GiB" if size > MOST_EXPANDED else None

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        for node in calls(module, latent_attention):
            yield f"%{node.name} still attends without a cache"


def _absorbed(builder: Builder, node: fx.Node, pages: fx.Node, page_table: fx.Node, kv_lens: fx.Node) -> fx.Node:
    """Attention in latent space between two projections."""
    q_nope, q_rope, _, _, w_uk, w_uv = (operand(node, index) for index in range(6))
    q_latent = _by_head(builder, builder.call(aten.permute.default, q_nope, [1, 0, 2, 3]), w_uk)
    q_rope = builder.call(aten.transpose.int, q_rope, 1, 2)
    indices, options = argument(node, "indices"), {name: argument(node, name) for name in ("scale", "sinks")}
    if indices is None:
        mixed = builder.call(paged_mla, q_latent, q_rope, pages, page_table, kv_lens, **options)
    else:
        mixed = builder.call(paged_sparse_mla, q_latent, q_rope, pages, page_table, indices, **options)
    _keep_place(mixed, node)
    w_uv = builder.call(aten.transpose.int, w_uv, 1, 2)
    out = _by_head(builder, builder.call(aten.permute.default, mixed, [2, 0, 1, 3]), w_uv)
    return builder.call(aten.clone.default, out, memory_format=torch.contiguous_format)


def _expanded(builder: Builder, node: fx.Node, pages: fx.Node, page_table: fx.Node, kv_lens: fx.Node) -> fx.Node:
    """Ordinary attention over keys and values that are expanded for this call, in pages that lie in order."""
    q_nope, q_rope, _, _, w_uk, w_uv = (operand(node, index) for index in range(6))
    expanded = builder.calls(expand_latent, pages, page_table, kv_lens, w_uk, w_uv, q_nope.meta["val"].shape[2])
    q = builder.call(aten.transpose.int, builder.call(aten.cat.default, [q_nope, q_rope], -1), 1, 2)
    out = builder.call(
        paged_attention, q, *expanded, kv_lens, sinks=argument(node, "sinks"), scale=argument(node, "scale")
    )
    _keep_place(out, node)
    return out


def _keep_place(new: fx.Node, old: fx.Node) -> None:
    new.meta.update({key: old.meta[key] for key in ("role", "layer") if key in old.meta})


def _by_head(builder: Builder, rows: fx.Node, weight: fx.Node) -> fx.Node:
    """rows [H, B, N, K] times weight [H, K, M] -> [B, N, H, M]; every weight is read once for all requests."""
    heads, batch, q_len, width = rows.meta["val"].shape
    flat = builder.call(aten.reshape.default, rows, [heads, batch * q_len, width])
    product = builder.call(aten.bmm.default, flat, weight)
    product = builder.call(aten.view.default, product, [heads, batch, q_len, weight.meta["val"].shape[2]])
    return builder.call(aten.permute.default, product, [1, 2, 0, 3])
