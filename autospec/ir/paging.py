"""What passes have in common that give an op of the captured graph a cache in pages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.passes import Pass
from autospec.ir.slots import Slot


@dataclass(frozen=True, kw_only=True)
class PagingPass(Pass):
    """A pass whose page buffers are addressed by the one page table of a program.

    Args:
        page_size: rows of a page. num_pages: of a buffer. pages_per_row: of a request's line in the table.
        is_length_given: kv_lens is an input of the graph (a spliced draft) instead of state.
    """

    page_size: int
    num_pages: int
    pages_per_row: int
    is_length_given: bool = False

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        if "fake_mode" not in module.meta:
            yield "shapes must be static"

    def addresses(self, builder: Builder, batch: int) -> tuple[fx.Node, fx.Node]:
        """The page table [B, pages_per_row] and the committed rows of each request [B], both int32."""
        page_table = builder.state("page_table", (batch, self.pages_per_row), torch.int32)
        return page_table, builder.slot(Slot("input" if self.is_length_given else "state", "kv_lens", (batch,), torch.int32))

    def pages(self, builder: Builder, name: str, row: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        """A page buffer [num_pages, page_size, *row]."""
        return builder.state(name, (self.num_pages, self.page_size, *row), dtype)
