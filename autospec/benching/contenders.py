"""Who decodes in a bench, all asked in the same way: transformers' generate, a program of ours, an artifact.

Contenders take turns on every batch of prompts, so that a slow moment of the machine hits all of them alike.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from autospec.api import OptimizedModel
from autospec.benching.steps import clocked
from autospec.runtime.metrics import Metrics

TRANSFORMERS = "transformers generate"
PERCENTILES = (50, 90, 99)
Batch = Sequence[list[int]]  # prompts


@dataclass
class Sample:
    """One call of generate.

    Args:
        outputs: new tokens by row.
        seconds: wall time of the call; first_token: until the first token of any row.
        metrics: what the device counted; None for others than ours.
        steps: seconds of each step after the first token, where they were clocked.
    """

    outputs: list[list[int]]
    seconds: float
    first_token: float
    metrics: Metrics | None = None
    steps: list[float] = field(default_factory=list)


@dataclass
class Timed:
    """One contender on one batch: outputs and metrics of the first call, the median time, every first token, every step.

    Args:
        glue: seconds of a call after the first token that no step accounts for.
    """

    outputs: list[list[int]]
    seconds: float
    first_tokens: list[float]
    steps: list[float]
    metrics: Metrics | None
    glue: float


class Contender(Protocol):
    """Who decodes."""

    name: str

    def sample(self, prompts: Batch, options: Mapping[str, Any], *, clock: bool = False) -> Sample:
        """Decode one batch; `clock` looks at every step, which costs a little."""
        ...


@dataclass
class Ours:
    """A program of ours, built here or loaded from an artifact."""

    name: str
    fast: OptimizedModel

    def sample(self, prompts: Batch, options: Mapping[str, Any], *, clock: bool = False) -> Sample:
        if not clock:
            return self._sample(prompts, options)
        with clocked(self.fast.session) as times:
            found = self._sample(prompts, options)
        found.steps = times
        return found

    def _sample(self, prompts: Batch, options: Mapping[str, Any]) -> Sample:
        start = time.perf_counter()
        output = self.fast.generate(list(prompts), **options)
        seconds, found = time.perf_counter() - start, self.fast.metrics
        around = seconds - found.seconds  # reading the call and writing its result; nearly all of it before the first token
        return Sample(output[:, max(map(len, prompts)) :].tolist(), seconds, found.first_token_seconds + around, found)


class Transformers:
    """transformers' generate of the same module, with its default cache and compiler (none)."""

    name = TRANSFORMERS

    def __init__(self, module: Any) -> None:
        self.module = module

    def sample(self, prompts: Batch, options: Mapping[str, Any], *, clock: bool = False) -> Sample:
        from transformers import StoppingCriteriaList

        device = self.module.device
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device)
        marks: list[float] = []

        def mark(ids: Tensor, scores: object, **more: object) -> Tensor:
            _wait(device)
            marks.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=device)  # nothing stops here

        given = {"pad_token_id": 0, **options}
        if (seed := given.pop("seed", None)) is not None:
            torch.manual_seed(seed)
        with torch.no_grad(), _quiet():
            start = time.perf_counter()
            output = self.module.generate(ids, attention_mask=mask, stopping_criteria=StoppingCriteriaList([mark]), **given)
            _wait(device)
            end = time.perf_counter()
        steps = [after - before for before, after in itertools.pairwise(marks)]
        return Sample(output[:, width:].tolist(), end - start, marks[0] - start, steps=steps if clock else [])


def in_turn(
    contenders: Sequence[Contender], batches: Iterable[Batch], options: Mapping[str, Any], repeats: int
) -> list[list[Timed]]:
    """Every contender on every batch, by contender; each has run before."""
    found: list[list[Timed]] = [[] for _ in contenders]
    for batch in batches:
        samples: list[list[Sample]] = [[] for _ in contenders]
        for _ in range(repeats):
            for one, taken in zip(contenders, samples, strict=True):
                taken.append(one.sample(batch, options))
        for one, taken, timed in zip(contenders, samples, found, strict=True):
            seen = one.sample(batch, options, clock=True)
            timed.append(Timed(
                taken[0].outputs, statistics.median(sample.seconds for sample in taken), [sample.first_token for sample in taken],
                seen.steps, taken[0].metrics, seen.seconds - seen.first_token - sum(seen.steps),
            ))  # fmt: skip
    return found


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """The smallest sample that so many percent do not exceed; {} of none."""
    ordered = sorted(samples)
    return {str(share): ordered[max(0, -(-len(ordered) * share // 100) - 1)] for share in PERCENTILES} if ordered else {}


def spread(found: Mapping[str, float]) -> str:
    """Percentiles in milliseconds."""
    return "  ".join(f"{1000 * seconds:>6.2f}" for seconds in found.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remark that an eos id of -1, which no token has, is unusual."""
    log = logging.getLogger("transformers.generation.utils")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
