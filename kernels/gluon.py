"""Triton's Gluon dialect for kernel files that place data and order instructions themselves: optional at import.

A kernel is written `@gluon_jit` and launched `kernel[grid](...)` inside a custom op, which Inductor does not look into.
Names that changed between triton 3.6 and 3.9 have one name here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autospec.kernels.launch import triton

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        fence_async_shared,
        mbarrier,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
    copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
except (ImportError, AttributeError):  # Gluon is experimental: names come and go
    gluon = gl = async_copy = fence_async_shared = mbarrier = warpgroup_mma = warpgroup_mma_wait = barrier = copy_async = None


def gluon_jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """gluon.jit where this triton has it; otherwise the function stays as it is and nobody calls it."""
    if function is None:
        return lambda inner: gluon_jit(inner, **options)
    return function if gluon is None else gluon.jit(function, **options)


def why_no_gluon() -> str | None:
    """Why no kernel in Gluon can be compiled here."""
    if triton is None:
        return "triton is not installed"
    return f"triton {triton.__version__} has no Gluon for Hopper" if gluon is None else None
