"""Inductor's kernels start while the kernel before them still runs, and wait inside before they touch memory (Hopper and newer).

Inductor can write such launches (`triton.enable_pdl`), but lets a kernel read, before it waits, what the kernel just before
it does not write. That is what an older one wrote, which has ended if the one in between waited for it; one that loads
nothing, such as a fill, does not wait. So here every kernel waits before anything else, as kernels launched by Triton do
(`autospec.kernels.launch.wrap_triton`): whoever ends has waited, hence all before it have ended.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from autospec.errors import LoweringError

WAIT = "tl.extra.cuda.gdc_wait()"
_STARTS_EARLY = re.compile(r"'launch_pdl': True")
_FIRST_STATEMENT = re.compile(r"^def (\w+)\([^)]*\):\n(.*)$", re.MULTILINE)
_GENERATED = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.DOTALL)


class _InKeys(CustomGraphPass):
    """Changes nothing: its uuid makes graphs that Inductor cached for others, without these waits, other graphs."""

    def __call__(self, graph: fx.Graph) -> None:
        pass

    def uuid(self) -> str:
        return "autospec: every kernel waits first"


@contextmanager
def starting_early(device: torch.device) -> Iterator[dict[str, Any]]:
    """Inside, Inductor's code generator writes such kernels.

    Yields:
        Inductor's options for it: none on a device that is no Nvidia GPU. Older GPUs ignore them.
    """
    if device.type != "cuda" or torch.version.hip:
        yield {}
        return
    from torch._inductor.codegen.triton import TritonKernel
    from torch._inductor.codegen.triton_combo_kernel import ComboKernel

    with (
        mock.patch.object(TritonKernel, "codegen_kernel", _waiting(TritonKernel.codegen_kernel)),
        mock.patch.object(ComboKernel, "codegen_kernel", _waiting(ComboKernel.codegen_kernel)),
    ):
        yield {"triton.enable_pdl": True, "post_grad_custom_post_pass": _InKeys()}


def _waiting(generate: Callable[..., str]) -> Callable[..., str]:
    def codegen_kernel(self: Any, name: str | None = None) -> str:
        return wait_first(generate(self, name))

    return codegen_kernel


def wait_first(source: str) -> str:
    """A kernel's source with a wait as its first statement, if it may start early. Its helper functions stand before it."""
    if not _STARTS_EARLY.search(source):
        return source
    start = source.rindex("\n@triton.jit")
    begin = source.index("):\n", start) + len("):\n")
    return f"{source[:begin]}    {WAIT}\n{source[begin:]}"


def refuse_unsafe_starts(sources: Iterable[str]) -> None:
    """Raise LoweringError if a generated kernel starts early and does not wait first: it could read what is not yet written."""
    for source in sources:
        for name, kernel in _GENERATED.findall(source):
            statements = dict(_FIRST_STATEMENT.findall(kernel))
            if _STARTS_EARLY.search(kernel) and statements.get(name, "").strip() != WAIT:
                raise LoweringError(
                    "a kernel that Inductor wrote starts before the one in front of it ends, and does not wait first", at=name,
                    help="compile='eager' runs the graph as it is; please report the version of torch",
                )  # fmt: skip
