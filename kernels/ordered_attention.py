"""paged_attention whose sums go over the slots in one order, whichever node reads them and however many rows are committed.

Arguments as in paged_attention, without a tree mask. Blocks of slots begin at multiples of a fixed size and are dealt out to
splits in turn, so that a token's result is the same to the bit as the fourth node of a step or as the first of a later one, in
steps of equal width. Kernels that cut the sequence by its length, or sum committed rows and nodes apart, are not offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from autospec.kernels import paged_attention as paged
from autospec.kernels.registry import kernel_op


@kernel_op()
def ordered_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None = None,
    sinks: Tensor | None = None, scale: float = 1.0, window: int = 0, chunk: int = 0, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """q [B, N, Hq, D] -> [B, N, Hq, Dv], as paged_attention without a tree mask."""
    return paged.paged_attention.reference(
        q, k_pages, v_pages, page_table, kv_lens, q_lens, None, sinks, scale, window, chunk, softcap, alibi_slopes
    )


def why_not_triton(args: Mapping[str, Any]) -> str | None:
    """What paged_attention's kernel asks for."""
    return paged.why_not_triton(args)


@ordered_attention.implementation("triton", why_not=why_not_triton, waits=True)
def ordered_attention_triton(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None = None,
    sinks: Tensor | None = None, scale: float = 1.0, window: int = 0, chunk: int = 0, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """The kernel of paged_attention; its tile follows from shapes alone."""
    return paged.paged_attention_triton(
        q, k_pages, v_pages, page_table, kv_lens, q_lens, None, sinks, scale, window, chunk, softcap, alibi_slopes
    )
