"""By batch size and prompt length: tokens/s, percentiles of a step and of the first token, of everyone who decodes.

Prompts of a given length are cut from the prompts' own text, each starting where its own prompt starts. Every row gets all
its new tokens: no eos ends it. Calls take turns (`autospec.benching.contenders`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from autospec.benching.contenders import TRANSFORMERS, Batch, Contender, Timed, in_turn, percentiles
from autospec.benching.differences import compare
from autospec.errors import CapacityError
from autospec.limits import next_power_of_two

WITHOUT_END = {"eos_token_id": -1, "pad_token_id": 0}
PLAIN = "plain"


@dataclass(frozen=True)
class Result:
    """One contender in one cell.

    Args:
        timed: by batch of prompts.
        asked_length: mean acceptance length of a synthetic profile; None: the target decides.
        differences: where its tokens are not those of the first who must emit the same, in a line and one for each output that
            can be explained; "": nowhere; None: nobody says what they should be.
    """

    name: str
    timed: list[Timed]
    asked_length: float | None = None
    differences: str | None = None

    @property
    def equals(self) -> bool | None:
        """Whether its tokens are the right ones, if anybody says which are."""
        return None if self.differences is None else not self.differences

    @property
    def outputs(self) -> list[list[int]]:
        """By prompt, as the batches hold them."""
        return [row for one in self.timed for row in one.outputs]

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.outputs)) / sum(one.seconds for one in self.timed)

    @property
    def step(self) -> dict[str, float]:
        """Seconds of a step, by percentile."""
        return percentiles([seconds for one in self.timed for seconds in one.steps])

    @property
    def first_token(self) -> dict[str, float]:
        """Seconds to the first token, by percentile."""
        return percentiles([seconds for one in self.timed for seconds in one.first_tokens])

    @property
    def per_depth(self) -> list[float]:
        """Acceptance by depth; [] where nothing was drafted."""
        counted = [one.metrics for one in self.timed if one.metrics is not None]
        rows = sum(one.row_steps for one in counted)
        depths = itertools.zip_longest(*(one.reached for one in counted), fillvalue=0)
        return [sum(depth) / rows for depth in depths] if rows else []

    @property
    def length(self) -> float | None:
        return 1 + sum(self.per_depth) if self.per_depth else None


@dataclass(frozen=True)
class Cell:
    """One batch size and prompt length; `prompt_len` None: the prompts as they are."""

    batch: int
    prompt_len: int | None
    results: list[Result]

    @property
    def name(self) -> str:
        return f"batch {self.batch}, " + (f"prompts of {self.prompt_len} tokens" if self.prompt_len else "prompts as given")

    def speed(self, name: str) -> float | None:
        """Tokens/s of the contender of this name, if it took part."""
        return next((one.tokens_per_second for one in self.results if one.name == name), None)


def measure(
    contenders: Sequence[Contender], prompts: Batch, cells: Sequence[tuple[int, int | None]], options: Mapping[str, Any],
    repeats: int, synthetic: Mapping[str, float] | None = None, is_quantized: bool = False, module: Any = None,
) -> list[Cell]:  # fmt: skip
    """Every contender in every cell.

    Args:
        cells: batch sizes and prompt lengths.
        synthetic: asked acceptance lengths of contenders whose tokens mean nothing, by name.
        is_quantized: index keys are, so that the tokens of transformers may be others.
        module: the model, to explain where greedy tokens differ; None where they were drawn.
    """
    told, found = synthetic or {}, []

    def means_something(name: str) -> bool:
        """Whether the tokens must be those of the others: sampled tokens of transformers come from another stream."""
        return name not in told and not ((options["do_sample"] or is_quantized) and name == TRANSFORMERS)

    for batch, length in tqdm(cells, desc="cells", leave=False):
        batches = batches_of(prompts, batch, length)
        asked = {**options, **WITHOUT_END}
        # Longer prompts than the first ones may need a program of their own, which is not what is timed.
        by_room = {next_power_of_two(max(map(len, rows)) + asked["max_new_tokens"]): rows for rows in batches}
        for one, rows in tqdm([*itertools.product(contenders, by_room.values())], desc="compiling", leave=False):
            one.sample(rows, asked)
        timed = in_turn(contenders, tqdm(batches, desc="decoding", leave=False), asked, repeats)
        results = [Result(one.name, by_batch, told.get(one.name)) for one, by_batch in zip(contenders, timed, strict=True)]
        alike = [one for one in results if means_something(one.name)]
        rows = [row for one in batches for row in one]
        found.append(Cell(batch, length, [
            _compared(one, alike[0], rows, module) if one in alike and len(alike) > 1 else one for one in results
        ]))  # fmt: skip
    return found


def _compared(one: Result, first: Result, prompts: Batch, module: Any) -> Result:
    """A contender's tokens against those of the first who must emit the same."""
    found = compare(one.name, one.outputs, first.outputs, prompts, module)
    return replace(one, differences="" if found is None else found.text(f"{first.name}'s"))


def batches_of(prompts: Batch, batch: int, length: int | None) -> list[list[list[int]]]:
    """All prompts in batches of this size, of this length; the last one is filled from the start."""
    rows = [list(one) for one in prompts]
    if length is not None:
        text = [token for one in rows for token in one]
        starts = itertools.accumulate((len(one) for one in rows), initial=0)
        rows = [list(itertools.islice(itertools.cycle(text), start, start + length)) for start in list(starts)[:-1]]
    count = -(-len(rows) // batch)
    endless = itertools.cycle(rows)
    return [list(itertools.islice(endless, batch)) for _ in range(count)]


def check_room(prompts: Batch, cells: Sequence[tuple[int, int | None]], new_tokens: int, room: int, where: str) -> None:
    """Raise CapacityError where a prompt and its new tokens do not fit in a row."""
    longest = max(length or max(map(len, prompts)) for _, length in cells)
    if longest + new_tokens > room:
        raise CapacityError(f"prompts of {longest} tokens with {new_tokens} new ones do not fit, a row holds {room}",
                            at=f"--new-tokens {new_tokens}", where=where,
                            help="lower --new-tokens or --prompt-lengths, or export with a larger --max-length")  # fmt: skip
