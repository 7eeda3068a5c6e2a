"""How a kernel file's `bench` measures: CUDA graphs, medians, fresh random inputs, a check beside every time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch


@dataclass(frozen=True)
class Measurement:
    """One line of the table. `error` is the largest deviation from the reference, relative to its largest value."""

    op: str
    case: str
    microseconds: float
    reference_microseconds: float | None  # the reference, eager, in a CUDA graph as well
    bytes_moved: int  # the least that must be read and written
    error: float


def time_graph(function: Callable[[], Any], calls: int = 20, replays: int = 15) -> float:
    """Median microseconds of one call inside a CUDA graph of `calls` calls; the inputs stay in L2 if they fit."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    times = []
    for i in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end) * 1000 / calls)
    return median(times)


def deviation(mine: Any, exact: Any) -> float:
    """Largest difference relative to the largest exact value, over all tensors of a result; NaN counts as infinite."""
    if isinstance(mine, (list, tuple)):
        return max((deviation(a, b) for a, b in zip(mine, exact, strict=True)), default=0.0)
    difference = (mine.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30)
    return float(difference.nan_to_num(nan=float("inf")))


def measure(
    op: str, case: str, mine: Callable[[], Any], reference: Callable[[], Any], bytes_moved: int, exact: Any = None
) -> Measurement:
    """Check the first result of `mine` against `exact` (the reference's where None is given), then time both."""
    error = deviation(mine(), reference() if exact is None else exact)
    return Measurement(op, case, time_graph(mine), time_graph(reference), bytes_moved, error)
