"""Triton for the kernel files: optional at import, traced on a GPU, interpreted on a CPU.

A kernel is written `@jit` and launched `wrap_triton(kernel)[grid](...)`. On a GPU that is torch.library.wrap_triton, so
Inductor and AOTInductor see the kernel inside its triton_op. With TRITON_INTERPRET=1 in the environment before triton
is imported, kernels are interpreted and launched as they are: tests do that in a process of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit where triton is installed; otherwise the function stays as it is and nobody calls it."""
    return function if triton is None else triton.jit(function)


def wrap_triton(kernel: Any) -> Any:
    """The object to index with a grid: torch.library.wrap_triton, or the kernel itself under the interpreter."""
    return torch.library.wrap_triton(kernel) if isinstance(kernel, triton.runtime.JITFunction) else kernel


def power_of_2(n: int) -> int:
    """The lowest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension dense, which is all that the kernels ask of a stride."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; 4 for the interpreter, so that small tests split as well."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4


def no_gpu(args: Mapping[str, Any]) -> str | None:
    """Why no Triton kernel can take these arguments at all."""
    if triton is None:
        return "triton is not installed"
    for value in args.values():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor) and tensor.device.type != "cuda":
                return f"the tensors are on {tensor.device}, not on a CUDA device"
    return None
