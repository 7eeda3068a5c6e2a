"""Replaying a graph of a program as one CUDA graph: one launch instead of hundreds.

A program's graphs read and write preallocated state at fixed addresses and never ask the host anything, so capturing
them changes nothing but the launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UPS = 3  # Triton compiles and cuBLAS allocates on the first calls; neither may happen while capturing


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
