"""Triton for the kernel files: optional at import, traced on a GPU, interpreted on a CPU.

A kernel is written `@jit` and launched `wrap_triton(kernel)[grid](...)`. On a GPU that is torch.library.wrap_triton, so
Inductor and AOTInductor see the kernel inside its triton_op. With TRITON_INTERPRET=1 in the environment before triton
is imported, kernels are interpreted and launched as they are: tests do that in a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton = tl = gdc_launch_dependents = gdc_wait = None

_is_direct: ContextVar[bool] = ContextVar("is_direct", default=False)
_prepares: ContextVar[bool] = ContextVar("prepares", default=False)


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """triton.jit where triton is installed; otherwise the function stays as it is and nobody calls it."""
    if function is None:
        return lambda inner: jit(inner, **options)
    return function if triton is None else triton.jit(function, **options)


def constant(value: Any) -> Any:
    """A module-level constant that kernels may read."""
    return value if triton is None else tl.constexpr(value)


@contextmanager
def _set(flag: ContextVar[bool]) -> Iterator[None]:
    token = flag.set(True)
    try:
        yield
    finally:
        flag.reset(token)


def launching_directly() -> AbstractContextManager[None]:
    """Kernels are launched by Triton itself, not shown to Inductor: only so can one of ours start before the one before it ends."""
    return _set(_is_direct)


def preparing_launches() -> AbstractContextManager[None]:
    """Kernels that are launched directly are compiled for their arguments, which may be fake, and not launched."""
    return _set(_prepares)


def settle_compiler(device: torch.device) -> None:
    """Let Triton compile in every process as Inductor lets it: with torch's assembler where torch has one, into Inductor's cache.

    Inductor says so in the process in which it first compiles a kernel itself, and not in one that finds its cache full. The
    assembler's version is part of Triton's keys: a second process compiled again whatever is launched directly (8 s of the
    start of an EAGLE-3 chain with a float8 head; H100, 2026-11-21). What the user has set stays.
    """
    if device.type == "cuda":
        from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
        from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path

        _set_triton_ptxas_path()
        os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index or 0))


class _Direct:
    """A kernel that is launched by Triton itself."""

    def __init__(self, kernel: Any, waits: bool) -> None:
        self.kernel, self.waits = kernel, waits

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            # Never early without the wait inside, which older GPUs lack.
            early = {"launch_pdl": True} if self.waits and kwargs["WAITS"] else {}
            if _prepares.get():
                named = {name: _unallocated(value) for name, value in kwargs.items()}
                return self.kernel.warmup(*map(_unallocated, args), grid=grid, **named, **early)
            return self.kernel[grid](*args, **kwargs, **early)

        return launch


def _unallocated(argument: Any) -> Any:
    """What Triton compiles for in place of a tensor: its dtype, at an address that is a multiple of 16 as almost all are."""
    return triton.MockTensor(argument.dtype) if isinstance(argument, Tensor) else argument


def wrap_triton(kernel: Any, waits: bool = False) -> Any:
    """The object to index with a grid: torch.library.wrap_triton, or the kernel itself under the interpreter.

    Args:
        waits: the kernel has a constexpr WAITS (`can_wait`) and calls gdc_wait before it reads or writes what another
            kernel may. Where kernels are launched directly it then starts while the kernel before it still runs.
    """
    if not isinstance(kernel, triton.runtime.JITFunction):
        return kernel
    if _is_direct.get():
        return _Direct(kernel, waits)
    return torch.library.wrap_triton(kernel)


def can_wait(tensor: Tensor) -> bool:
    """Whether kernels may start before their turn and wait inside: launched by Triton itself, on a Hopper GPU or newer.

    Where Inductor launches ours there is nothing to wait for, and it could not see what a kernel with inline assembly writes: it
    would take every argument for written and copy it, pages included.
    """
    return _is_direct.get() and tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def has_warpgroup_products(tensor: Tensor) -> bool:
    """Whether tensor cores take tiles of 64 rows from shared memory: Hopper's and Blackwell's, not those of desktops."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] in (9, 10)


@jit
def fetch_line(p):
    """Bring the cache line of every address into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


def power_of_2(n: int) -> int:
    """The lowest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension dense, which is all that the kernels ask of a stride."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; 4 for the interpreter, so that small tests split as well."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4


def fit_stages(tensor: Tensor, stages: int, stage_bytes: int, other_bytes: int = 0) -> int:
    """At most `stages` of a pipeline, as many as the shared memory of a program holds on the tensor's GPU; at least one."""
    whole = torch.cuda.get_device_properties(tensor.device).shared_memory_per_multiprocessor if tensor.is_cuda else 228 << 10
    return max(1, min(stages, (whole - 1024 - other_bytes) // stage_bytes))  # CUDA keeps 1 KB for itself


def no_gpu(args: Mapping[str, Any]) -> str | None:
    """Why no Triton kernel can take these arguments at all."""
    if triton is None:
        return "triton is not installed"
    for value in args.values():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor) and tensor.device.type != "cuda":
                return f"the tensors are on {tensor.device}, not on a CUDA device"
    return None


def not_a_float(dtype: torch.dtype) -> str | None:
    """Why kernels for half precision and float32 cannot read a tensor of this dtype."""
    if dtype in (torch.float16, torch.bfloat16, torch.float32):
        return None
    return f"dtype {dtype} is not float16, bfloat16 or float32"


def no_float8(device: torch.device) -> str | None:
    """Why a GPU's own conversions from and to float8 cannot be used."""
    if not torch.cuda.is_available():
        return "no GPU is there to ask for float8"
    major, minor = torch.cuda.get_device_capability(device)
    return None if (major, minor) >= (8, 9) else f"compute capability {major}.{minor} has no float8, 8.9 has"
