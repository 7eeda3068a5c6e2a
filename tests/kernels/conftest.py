"""What the kernel tests share: a process in which Triton is interpreted, and random drafts.

TRITON_INTERPRET must be set before triton is imported, and must not be set for the tests that compile or that run on a
GPU. So the interpreter gets a process of its own, one per test worker; tensors travel through a pipe.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.wire import dump
from torch import Tensor

HERE = Path(__file__).parent


def tensors(value: Any) -> list[Tensor]:
    """The tensors in an argument: itself, or those of a list."""
    return value if isinstance(value, list) else [value] if isinstance(value, Tensor) else []


class Interpreter:
    """The child process; calling it calls a function there. Arguments that the kernel writes come back written."""

    def __init__(self) -> None:
        folders = [str(HERE.parents[1]), str(HERE.parent / "support"), os.environ.get("PYTHONPATH")]
        path = os.pathsep.join(filter(None, folders))
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "interpreter.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
        )

    def __call__(self, place: str, name: str, *args: Any, **kwargs: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        dump((place, name, args, kwargs), self.process.stdin)
        error, result, written_args, written_kwargs = pickle.load(self.process.stdout)
        if error is not None:
            raise RuntimeError(f"in the interpreter:\n{error}")
        for mine, theirs in zip([*args, *kwargs.values()], [*written_args, *written_kwargs.values()], strict=True):
            for tensor, written in zip(tensors(mine), tensors(theirs), strict=True):
                tensor.copy_(written)
        return result

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreter]:
    """interpreted(file or module, function, *args): the call's result, with Triton interpreted."""
    pytest.importorskip("triton")
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


def _random_parents(generator: torch.Generator, batch: int, q_len: int, absent: float = 0.1) -> Tensor:
    rows = []
    for _ in range(batch):
        row = [-1]
        for i in range(1, q_len):
            is_absent = torch.rand((), generator=generator) < absent
            row.append(-1 if is_absent else int(torch.randint(0, i, (), generator=generator)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int32)


@pytest.fixture(scope="session")
def random_parents() -> Callable[..., Tensor]:
    """random_parents(generator, batch, q_len, absent=0.1): tree_parents int32, some nodes absent."""
    return _random_parents
