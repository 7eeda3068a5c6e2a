"""C++ for the kernel files: compiled when it is first asked for, by the compiler that Inductor uses, and cached on disk.

A file in kernels/cpu registers the CPU kernels of ops in the namespace `autospec_cpu` (torch's stable ABI), whose
schemas are in Python. Inductor's C++ wrapper then calls them through the dispatcher, without Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "cpu"


_paths: dict[str, Path] = {}  # libraries of this process, by the name of their file in kernels/cpu


def libraries() -> dict[str, Path]:
    """The libraries that this process has compiled or adopted."""
    return dict(_paths)


def adopt(name: str, path: Path) -> None:
    """Load a library that was compiled elsewhere, unless this process has its own."""
    if name not in _paths:
        torch.ops.load_library(str(path))
        _paths[name] = path


@cache
def why_not_built(name: str) -> str | None:
    """Compile and load kernels/cpu/<name>.cpp, once per process; why that failed, in a sentence, or None."""
    if name in _paths:
        return None
    from torch._inductor.codecache import CppCodeCache

    try:
        library = CppCodeCache.load("".join((SOURCES / file).read_text() for file in ("rows.h", f"{name}.cpp")))
        _paths[name] = Path(library._name)
    except Exception as error:  # no compiler, a broken one, a cache that cannot be written: the reference runs
        return f"{name}.cpp does not compile here: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None


def not_on_cpu(args: Mapping[str, Any]) -> str | None:
    """Which device an argument is on, if it is not the CPU."""
    for value in args.values():
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return f"the tensors are on {value.device}, not on a CPU"
    return None
