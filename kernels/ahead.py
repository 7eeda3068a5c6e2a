"""Kernels compiled in threads before their first launch, while Inductor compiles the graph around them on one core.

Triton compiles a kernel when it is first launched, a third to half a second each, one after the other: 13 s of the cold start
of a chain of 7 (H100, 2026-11-21). It lets go of the interpreter meanwhile: eight variants of one kernel take 3.9 s in a row
and 1.1 s in four threads (AMD EPYC, triton 3.6).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from autospec.kernels.launch import preparing_launches, triton

MOST_THREADS = 8


@contextmanager
def compiling_ahead(device: torch.device) -> Iterator[None]:
    """What `compile_ahead` starts inside has ended when the block ends."""
    if triton is None or device.type != "cuda":
        yield
        return
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with torch.cuda.device(device), ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        yield


def compile_ahead(launch: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Start to compile the kernels that a call will launch; nothing is launched.

    Args:
        launch: an op's function that launches directly.
        args: its arguments, with FakeTensors.

    A kernel that cannot be compiled is left to its launch, whose error says where it happened.
    """
    with preparing_launches(), contextlib.suppress(Exception):
        launch(*args, **kwargs)
