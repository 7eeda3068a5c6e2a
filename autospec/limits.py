"""What a program is specialised for: what the user fixed, and what a request needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autospec.config import Speculation, tree_of
from autospec.errors import CapacityError, OptionError
from autospec.program import ModelFacts, Shape
from autospec.trees import chain

SMALLEST_BUCKET = 128  # tokens; a program for fewer would be rebuilt for the next prompt
_SAVED_LENGTH = 512  # tokens per row of an artifact unless said otherwise; a guess: caches cost memory from the start


@dataclass(frozen=True)
class Limits:
    """What the user fixed; None grows as needed."""

    max_batch_size: int | None
    max_length: int | None
    page_size: int | None
    exact: int = 0  # nodes of every step, where steps must be equal to the bit; 0: as many as pay
    batch_buckets: tuple[int, ...] = ()  # rows of programs that go on when no more are left
    index_quantization: str | None = None  # of the keys of indexers


def shape_for(
    facts: ModelFacts, limits: Limits, speculation: Speculation, batch: int, longest: int, sampling: bool
) -> Shape:
    """What a program is specialised for, to hold requests of `longest` tokens."""
    on_cpu = facts.device.type == "cpu"
    length = limits.max_length
    if length is None:
        length = min(max(SMALLEST_BUCKET, next_power_of_two(longest)), facts.max_positions)
        length = max(length, longest)
    elif longest > length:
        raise CapacityError(
            f"a request needs {longest} tokens, the cache was limited to {length} per row",
            at=f"max_length={length}", where="autospec.optimize",
            help="lower max_new_tokens, or optimize with a larger max_length",
        )  # fmt: skip
    if limits.max_batch_size is not None:
        batch = min(batch, limits.max_batch_size)
    # A CPU reads every page of the table, so small pages waste less; on an H100 64 is up to 6% faster than 16.
    page_size = limits.page_size or (32 if on_cpu else 64)
    prefill_len = min(64 if on_cpu else 512, length)
    tree = chain(limits.exact - 1) if limits.exact else tree_of(speculation)
    return Shape(
        batch, length, page_size, prefill_len, tree, sampling, is_exact=limits.exact > 0,
        index_quantization=limits.index_quantization,
    )  # fmt: skip


def saved_shapes(
    facts: ModelFacts, limits: Limits, speculation: Speculation, batch_sizes: Sequence[int], max_length: int | None,
    sampling: bool | None,
) -> tuple[Shape, ...]:  # fmt: skip
    """The shapes of an artifact: one per batch size, greedy and sampling unless one of them is asked for."""
    fits = min(_SAVED_LENGTH, facts.max_positions) if limits.max_length is None else limits.max_length
    length = fits if max_length is None else max_length
    sizes = list(dict.fromkeys(batch_sizes))
    for name, value in (("max_length", length), *(("batch_sizes", size) for size in sizes or [0])):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be positive integers, got {value!r}", at=f"{name}={value!r}",
                              where="autospec.export", help="for example batch_sizes=(1, 4), max_length=1024")  # fmt: skip
    if length > facts.max_positions:
        raise CapacityError(
            f"max_length is {length}, but the model has {facts.max_positions} positions",
            at=f"max_length={length}", where=facts.name, help="choose a smaller max_length",
        )  # fmt: skip
    fixed = Limits(None, length, limits.page_size, limits.exact, index_quantization=limits.index_quantization)
    kinds = (False, True) if sampling is None else (sampling,)
    return tuple(dict.fromkeys(shape_for(facts, fixed, speculation, size, length, kind) for size in sizes for kind in kinds))


def check_index_form(asked: object) -> None:
    """Raise OptionError for an unknown form of index keys, before a model is captured."""
    if asked not in (None, "fp8"):
        at = f"index_quantization={asked!r:.40}"
        raise OptionError(f"index_quantization must be 'fp8' or None, got {asked!r:.40}", at=at, where="autospec.optimize",
                          help="None keeps the keys that select keys as they are")  # fmt: skip


def check_index_quantization(asked: str | None, target: ModelFacts, draft: ModelFacts | None) -> None:
    """Raise OptionError where nothing has keys to quantise."""
    if asked and not target.num_indexers and not (draft is not None and draft.num_indexers):
        raise OptionError("index_quantization is of models that select their keys, and this one attends to all",
                          at=f"index_quantization={asked!r:.40}", where=target.name, help="leave it out")  # fmt: skip


def next_power_of_two(value: int) -> int:
    """The lowest power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()
