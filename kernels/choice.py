"""Which of the implementations that can run an op is the fastest here: measured once per shape, remembered in a file.

A measurement belongs to a GPU, the versions of torch, triton and flashinfer, an op and its arguments' shapes and scalars.
Inputs are random (the op's `sample`) and stay in L2 if they fit, as in our tables. An implementation that fails, or whose
result is not the first one's, is out, with the reason. Nothing is measured for tensors on a CPU, and nothing that is
measured touches a program's tensors or its random numbers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from autospec.kernels.registry import DIRECT, Implementation, KernelOp
from autospec.kernels.timing import deviation, time_graph

OFF_BY = {torch.bfloat16: 0.05, torch.float16: 0.02}  # of the largest value; a guess: a wrong mask is off by 0.3 and more
OFF_BY_FLOAT32 = 0.005


@dataclass(frozen=True)
class Times:
    """Microseconds of every implementation that ran, why the others did not, or why nothing was measured at all."""

    microseconds: Mapping[str, float]
    failures: Mapping[str, str] = field(default_factory=dict)
    unmeasured: str | None = None

    def best(self, candidates: Sequence[Implementation]) -> Implementation | None:
        """The fastest; the first candidate that did not fail where nothing is known; None if all of them did."""
        known = [one for one in candidates if one.backend in self.microseconds]
        if known:
            return min(known, key=lambda one: self.microseconds[one.backend])
        return next((one for one in candidates if one.backend not in self.failures), None)

    def __str__(self) -> str:
        if self.unmeasured is not None:
            return f"not measured: {self.unmeasured}"
        return ", ".join(f"{backend} {time:.1f} us" for backend, time in self.microseconds.items())


def can_measure(arguments: Mapping[str, Any]) -> bool:
    """Whether the arguments stand for tensors on a GPU that is really there."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    return torch.cuda.is_available() and bool(tensors) and all(tensor.device.type == "cuda" for tensor in tensors)


def times_of(kernel: KernelOp, candidates: Sequence[Implementation], arguments: Mapping[str, Any]) -> Times:
    """From this process's memory, from the file, or measured now."""
    place, key = environment(device_of(arguments)), spec_text(kernel, arguments)
    wanted = [one.backend for one in candidates]
    known = _seen.get((place, key))
    if known is None or not set(wanted) <= {*known.microseconds, *known.failures}:
        stored = read_file().get(place, {}).get(key, {})
        known = Times(stored) if set(wanted) <= set(stored) else measure_all(kernel, candidates, arguments)
        if known.unmeasured is not None:
            return known  # memory may be there next time
        _seen[place, key] = known
        if known.microseconds != stored:
            kept = {backend: time for backend, time in stored.items() if backend not in known.failures}
            write_file(place, key, kept | dict(known.microseconds))
    return Times({name: time for name, time in known.microseconds.items() if name in wanted}, known.failures)


_seen: dict[tuple[str, str], Times] = {}


def device_of(arguments: Mapping[str, Any]) -> torch.device:
    """Where the first tensor is."""
    return next(value.device for value in arguments.values() if isinstance(value, Tensor))


@cache
def environment(device: torch.device) -> str:
    """The GPU and the versions that a time is worth nothing without."""
    versions = []
    for package in ("torch", "triton", "flashinfer-python"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    versions.append(f"kernels {sources_digest()}")
    return ", ".join([torch.cuda.get_device_name(device), *versions])


@cache
def sources_digest() -> str:
    """Names the kernels' source code: another tile has another time."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def spec_text(kernel: KernelOp, arguments: Mapping[str, Any]) -> str:
    """An op's arguments as the file spells them: dtypes and shapes of tensors, values of scalars."""
    return f"{kernel.name}({', '.join(f'{name}={_spell(value)}' for name, value in arguments.items() if value is not None)})"


def shapes_text(arguments: Mapping[str, Any]) -> str:
    """The same for people: shapes, and whole numbers that are not 0."""
    shown = {name: list(value.shape) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value and isinstance(value, (list, int)))


def _spell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_spell, value))}]"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


def measure_all(kernel: KernelOp, candidates: Sequence[Implementation], arguments: Mapping[str, Any]) -> Times:
    """Run every candidate on the same random inputs, compare its result with the first one's, and time it."""
    assert kernel.sample is not None, f"{kernel.name} declares no inputs to measure with"
    device = device_of(arguments)
    needed = 2 * sum(value.numel() * value.element_size() for value in arguments.values() if isinstance(value, Tensor))
    if needed > (free := free_memory(device)):
        return Times({}, unmeasured=f"it would take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    times: dict[str, float] = {}
    failures: dict[str, str] = {}
    first: Any = None
    try:
        with unset_fake_temporarily(), torch.no_grad():
            inputs = kernel.sample(arguments, torch.Generator(device).manual_seed(0))
            for one in candidates:
                run = DIRECT.get(one.op, one.op)  # what a compiled graph runs
                try:
                    result = run(**inputs)
                    first = result if first is None else first
                    if (off := deviation(result, first)) > allowed_deviation(result):
                        failures[one.backend] = f"its result is off by {off:.2g} of the largest value"
                        continue
                    times[one.backend] = time_graph(lambda run=run: run(**inputs))  # type: ignore[misc]
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # a compiler that is missing, a launch that is refused: the others remain
                    failures[one.backend] = f"it fails: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    except torch.OutOfMemoryError:
        return Times({}, unmeasured="the GPU's memory is full")
    return Times(times, failures)


def allowed_deviation(result: Any) -> float:
    """How far two right results lie apart at most."""
    tensor = result[0] if isinstance(result, (list, tuple)) else result
    return OFF_BY.get(tensor.dtype, OFF_BY_FLOAT32)


def free_memory(device: torch.device) -> int:
    """Bytes that tensors could still take."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def times_file() -> Path:
    """The file of all measurements, in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autospec" / "kernel_times.json"


def read_file() -> dict[str, dict[str, dict[str, float]]]:
    """{environment: {op and arguments: {backend: microseconds}}}; a broken file is an empty one, and said so."""
    path = times_file()
    try:
        content = json.loads(path.read_text())
        for times in content.values():
            for row in times.values():
                if not all(isinstance(time, (int, float)) and math.isfinite(time) for time in row.values()):
                    raise ValueError("a time is not a finite number")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        warnings.warn(f"kernel times in {path} cannot be read, they are measured again: {error}", stacklevel=2)
        return {}
    return content


def write_file(place: str, key: str, times: Mapping[str, float]) -> None:
    """Add one measurement; the file is replaced at once, so that a reader sees all of it or nothing."""
    path, content = times_file(), read_file()
    content.setdefault(place, {})[key] = dict(times)
    text = json.dumps(content, indent=1, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            (Path(folder) / path.name).write_text(text)
            os.replace(Path(folder) / path.name, path)
    except OSError as error:
        warnings.warn(f"kernel times cannot be stored in {path}, they are measured every time: {error}", stacklevel=2)
