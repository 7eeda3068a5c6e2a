"""Replaying a graph of a program as one CUDA graph: one launch instead of hundreds.

A program's graphs read and write preallocated state at fixed addresses and never ask the host anything, so capturing
them changes nothing but the launches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from autospec.program import Program

WARM_UPS = 3  # Triton compiles and cuBLAS allocates on the first calls; neither may happen while capturing


def bind_graphs(program: Program, state: Mapping[str, Tensor]) -> dict[str, Callable[[], object]]:
    """Every graph of a program over this state, as a replay where it can be one.

    Rows must be at rest, as in fresh state: finished, and without a page.
    """
    bound = {name: program.bind(name, state) for name in program.graphs}
    device = program.facts.device
    if device.type == "cuda" and all(graph.is_compiled for graph in program.graphs.values()):
        pool = torch.cuda.graph_pool_handle()
        bound = {name: as_cuda_graph(run, device, pool) for name, run in bound.items()}
    return bound


def as_cuda_graph(run: Callable[[], object], device: torch.device, pool: Any) -> Callable[[], object]:
    """`run` as a replay; it is called a few times to warm up, so state must be at rest.

    Args:
        pool: memory that the graphs of a session share (torch.cuda.graph_pool_handle()).
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()

    def replay() -> object:
        graph.replay()
        return result

    return replay
