"""Random page tables, lengths and trees: where an op over pages is timed, and where its kernels are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.tree_tables import tree_tables


def sample_places(args: Mapping[str, Any], q_len: int, pages: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Page table, lengths, valid rows and tree masks for a sample of an op over `pages`."""
    device, (batch, max_pages) = generator.device, args["page_table"].shape
    middle = max_pages * pages.shape[1] // 2
    spread = torch.randint(-(middle // 8), middle // 8 + 1, (batch,), generator=generator, device=device)
    order = torch.randperm(max(pages.shape[0] - 1, 1), generator=generator, device=device)
    slots = torch.arange(batch * max_pages, device=device) % order.shape[0]
    made: dict[str, Any] = {
        "page_table": (1 + order[slots]).clamp(max=pages.shape[0] - 1).reshape(batch, max_pages).int(),
        "kv_lens": (middle + spread - q_len).clamp(min=0).int(),
    }
    if args["q_lens"] is not None:
        made["q_lens"] = torch.full((batch,), q_len, dtype=torch.int32, device=device)
    if args["tree_mask"] is not None:
        count, words = args["tree_mask"].shape[1:]
        mask = tree_tables.reference(random_tree(batch, count, generator))[0]
        made["tree_mask"] = torch.nn.functional.pad(mask, (0, words - mask.shape[2]))
    return made


def random_tree(batch: int, count: int, generator: torch.Generator) -> Tensor:
    """tree_parents [B, N] int32: each node's parent is any node before it."""
    device = generator.device
    share = torch.rand(batch, count - 1, generator=generator, device=device)
    parents = (share * torch.arange(1, count, device=device)).int()
    return torch.nn.functional.pad(parents, (1, 0), value=-1)
