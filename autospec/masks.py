"""Attention masks as facts: transformers' mask functions are evaluated, not parsed.

A mask function answers "does position q see position k?". We ask it about whole rows, from the first to the model's
last position, and accept it only if every answer is that of a causal mask, a sliding window or a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from autospec.errors import CaptureError

_MAX_PROBED = 1 << 20  # positions; a window longer than this is probed as causal up to here


@dataclass(frozen=True)
class MaskSpec:
    """Causal attention, optionally limited to a window or a chunk of positions (0: unlimited)."""

    window: int = 0
    chunk: int = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CaptureError(
            f"the model computes with its attention mask (.{name}), which autospec keeps symbolic",
            help="attention whose mask is data cannot be captured yet",
        )

    def row(self, query: int, length: int) -> torch.Tensor:
        """bool [length]: what position `query` sees."""
        key = torch.arange(length)
        seen = key <= query
        if self.window:
            seen &= key > query - self.window
        if self.chunk:
            seen &= key // self.chunk == query // self.chunk
        return seen


RowFunction = Callable[[int, int], torch.Tensor]


def spec_of_rows(row: RowFunction, max_positions: int) -> MaskSpec | str:
    """The MaskSpec that a row function computes, or a sentence about why it is none.

    Args:
        row: (query, length) -> bool [length], which of the positions 0 ... length-1 the query sees.
        max_positions: one past the last position that is ever asked.
    """
    last = min(max_positions, _MAX_PROBED) - 1
    seen = row(last, last + 1)
    if not bool(seen[last]):
        return "a position does not see itself"
    first = int(seen.to(torch.int8).argmax())
    spec = MaskSpec()
    if first > 0:
        before = row(last - 1, last)
        first_before = int(before.to(torch.int8).argmax())
        if first_before == first - 1:
            spec = MaskSpec(window=last - first + 1)
        else:
            chunk_end = row(first - 1, first)
            start = int(chunk_end.to(torch.int8).argmax())
            spec = MaskSpec(chunk=first - start)
    edge = spec.window or spec.chunk
    generator = torch.Generator().manual_seed(0)
    queries = {0, 1, 2, 3, 5, 8, 17, 63, 64, last - 1, last, edge - 1, edge, edge + 1, 2 * edge - 1, 2 * edge}
    queries |= set(torch.randint(0, last + 1, (16,), generator=generator).tolist())
    for query in sorted(q for q in queries if 0 <= q <= last):
        length = min(query + 4, last + 1)
        if not torch.equal(row(query, length), spec.row(query, length)):
            return f"position {query} does not see what a causal, windowed or chunked mask shows it"
    return spec


def mask_row(mask_function: Callable[..., Any]) -> RowFunction:
    """Adapt one of transformers' mask functions (batch, head, q, k) -> bool."""

    def row(query: int, length: int) -> torch.Tensor:
        zero = torch.zeros(1, dtype=torch.long)
        answer = mask_function(zero, zero, torch.full((1,), query), torch.arange(length))
        return torch.as_tensor(answer).reshape(-1).expand(length).bool()

    return row
