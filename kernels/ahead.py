"""Kernels compiled in threads before their first launch, while Inductor compiles the graph around them on one core.

Triton compiles a kernel when it is first launched, a third to half a second each, one after the other: 13 s of the cold start
of a chain of 7 (H100, 2026-11-21). It lets go of the interpreter meanwhile: eight variants of one kernel take 3.9 s in a row
and 1.1 s in four threads (AMD EPYC, triton 3.6, 2026-11-22).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.config

from autospec import debug
from autospec.kernels.launch import preparing_launches, triton

MOST_THREADS = 8  # a guess: Inductor's own workers want cores as well


@contextmanager
def compiling_ahead(device: torch.device) -> Iterator[None]:
    """What `compile_ahead` starts inside has ended when the block ends.

    Nothing starts where somebody compiles asynchronously already, or where Inductor forks: a child would inherit locks that
    threads hold.
    """
    forks = torch._inductor.config.worker_start_method == "fork"
    if triton is None or device.type != "cuda" or forks or is_compiling_ahead():
        yield
        return
    from triton.runtime._async_compile import active_mode

    threads = min(MOST_THREADS, os.cpu_count() or 1)
    try:
        with torch.cuda.device(device), ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        active_mode.set(None)  # Triton 3.6 leaves it when it is interrupted, and then nothing compiles any more


def compile_ahead(launch: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Start to compile the kernels that a call will launch, inside `compiling_ahead`; nothing is launched.

    Args:
        launch: an op's function that launches directly.
        args: its arguments, with FakeTensors.

    A kernel that cannot be compiled is left to its launch, whose error says where it happened.
    """
    if not is_compiling_ahead():
        return
    try:
        with preparing_launches():
            launch(*args, **kwargs)
    except Exception as error:
        if debug.options().table:
            print(f"not compiled ahead: {type(error).__name__}: {error}", file=sys.stderr)


def is_compiling_ahead() -> bool:
    """Whether kernels compile in threads now, ours or the user's."""
    if triton is None:
        return False
    from triton.runtime._async_compile import active_mode

    return active_mode.get() is not None
