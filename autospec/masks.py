"""Attention masks as facts: transformers' mask functions are evaluated, not parsed.

A mask function answers "does position q see position k?". We ask it about whole rows, from the first to the model's
last position, and accept it only if every answer is that of a causal mask, a sliding window or a chunk. Attention that
is written out adds a bias to its scores instead; `spec_of_scores` reads the same facts from that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autospec.errors import CaptureError
from autospec.symbolic_masks import CausalRows, Symbolic, computes_with_mask

_MAX_PROBED = 1 << 20  # positions; a window longer than this is probed as causal up to here
_FIRST_ROWS = 96  # rows that are all compared, keys ahead of the query included; a guess that covers tiny prefixes
HIDDEN = -9999.0  # a bias at or below it hides a key: exp of it is 0 in every dtype, whatever the score


@dataclass(frozen=True)
class MaskSpec(Symbolic):
    """Causal attention, optionally limited to a window or a chunk of positions (0: unlimited)."""

    window: int = 0
    chunk: int = 0

    def __getitem__(self, index: Any) -> CausalRows:
        """The mask [B, 1, S, S] of one head, which an indexer selects by."""
        if self != MaskSpec() or index not in ((slice(None), 0), (slice(None), 0, slice(None), slice(None))):
            raise computes_with_mask("[...]")
        return CausalRows()

    def row(self, query: int, length: int) -> Tensor:
        """bool [length]: what position `query` sees."""
        return self._sees(torch.tensor(query), torch.arange(length))

    def matrix(self, length: int) -> Tensor:
        """bool [length, length]: what every position sees."""
        position = torch.arange(length)
        return self._sees(position[:, None], position[None, :])

    def _sees(self, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if self.window:
            seen &= key > query - self.window
        if self.chunk:
            seen &= key // self.chunk == query // self.chunk
        return seen


@dataclass(frozen=True)
class UnknownMask(Symbolic):
    """A mask that decoding by pages cannot express: an error where it is used, and many models build unused ones."""

    reason: str

    def error(self, where: object) -> CaptureError:
        return CaptureError(
            f"the attention mask is neither causal, windowed nor chunked: {self.reason}", at="attention_mask", where=where,
            help="encoders, prefix masks and masks made of data cannot be decoded step by step",
        )  # fmt: skip


RowFunction = Callable[[int, int], Tensor]


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
    queries = {last - 1, last, edge - 1, edge, edge + 1, 2 * edge - 1, 2 * edge, 2 * edge + 1, *range(_FIRST_ROWS)}
    queries |= set(torch.randint(0, last + 1, (16,), generator=generator).tolist())
    for query in sorted(q for q in queries if 0 <= q <= last):
        length = min(max(query + 4, _FIRST_ROWS + 4), last + 1)
        if not torch.equal(row(query, length), spec.row(query, length)):
            return f"position {query} does not see what a causal, windowed or chunked mask shows it"
    return spec


def mask_row(mask_function: Callable[..., Any]) -> RowFunction:
    """Adapt one of transformers' mask functions (batch, head, q, k) -> bool."""

    def row(query: int, length: int) -> Tensor:
        zero = torch.zeros(1, dtype=torch.long)
        answer = mask_function(zero, zero, torch.full((1,), query), torch.arange(length))
        return torch.as_tensor(answer).reshape(-1).expand(length).bool()

    return row


@dataclass(frozen=True)
class ScoreSpec:
    """What attention does to its scores: scale, softcap (0: none), mask, and an ALiBi slope per head (or none)."""

    scale: float
    softcap: float
    mask: MaskSpec
    slopes: tuple[float, ...] = ()


def spec_of_scores(
    factor: Tensor, bias: Tensor, inner: float = 1.0, is_capped: bool = False, like: Sequence[ScoreSpec] = ()
) -> ScoreSpec | str:
    """The ScoreSpec of softmax(factor * f(inner * q k^T) + bias), f being tanh or nothing, or why there is none.

    Args:
        factor, bias: [B, H, S, S] float64; a key is hidden where the bias is at most HIDDEN.
        like: specs found at other lengths, which this one must agree with.
    """
    length = bias.shape[-1]
    seen = bias[0, 0] > HIDDEN
    mask = like[0].mask if like else spec_of_rows(lambda query, stop: seen[query, :stop], length)
    if isinstance(mask, str):
        return mask
    shown = mask.matrix(length)
    scale = float(factor[0, 0, 0, 0])
    slopes = []
    for row in range(bias.shape[0]):
        for head in range(bias.shape[1]):
            values = bias[row, head]
            if not torch.equal(values > HIDDEN, shown):
                return "the mask is not the same for every head, row and position"
            if bool(((factor[row, head] != scale) & shown).any()):
                return "the scores are not scaled alike at every position"
            slope = _slope(values, shown)
            if isinstance(slope, str):
                return slope
            slopes.append(slope)
    if slopes[: bias.shape[1]] * bias.shape[0] != slopes:
        return "the bias of the scores is not the same for every row of the batch"
    if is_capped:
        scale, softcap = inner * scale, scale
    else:
        scale, softcap = scale * inner, 0.0
    found = ScoreSpec(scale, softcap, mask, tuple(slopes[: bias.shape[1]]) if any(slopes) else ())
    for other in like:
        differ = [abs(a - b) > 1e-6 * abs(b) + 1e-12 for a, b in zip(found.slopes, other.slopes, strict=False)]
        if (found.scale, found.softcap, len(found.slopes)) != (other.scale, other.softcap, len(other.slopes)) or any(differ):
            return "the scores are scaled or biased differently at different lengths"
    return found


def _slope(bias: Tensor, shown: Tensor) -> float | str:
    """The slope of a bias that is linear in the key's position up to a constant per query (softmax removes it)."""
    visible = torch.where(shown, bias, 0.0)
    largest = float(visible.abs().max())
    if largest == 0.0:
        return 0.0
    last = bias.shape[0] - 1
    first = int(shown[last].to(torch.int8).argmax())
    slope = float(bias[last, last] - bias[last, first]) / max(last - first, 1)
    position = torch.arange(last + 1, dtype=torch.float64)
    expected = slope * (position[None, :] - position[:, None]) + bias.diagonal()[:, None]
    error = torch.where(shown, (bias - expected).abs(), 0.0).max()
    if float(error) > 1e-6 * largest + 1e-12:
        return "a bias is added to the scores that is not linear in the distance"
    return slope
