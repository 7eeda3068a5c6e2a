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
import torch._inductor.config
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from autospec.errors import LoweringError

WAIT = "tl.extra.cuda.gdc_wait()"
_STARTS_EARLY = re.compile(r"""launch_pdl['"]?\s*[:=](?!\s*False)""")
_FIRST_STATEMENT = re.compile(r"^def (\w+)\([^)]*\):\n(.*)$", re.MULTILINE)
_GENERATED = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.DOTALL)


class _InKeys(CustomGraphPass):
    """Changes nothing: its uuid makes graphs that Inductor cached for others, without these waits, other graphs.

    Args:
        before: the user's own passes, which it runs; without a uuid of theirs nothing is cached, as Inductor has it.
    """

    def __init__(self, before: Any) -> None:
        self.before = list(before) if isinstance(before, (list, tuple)) else [] if before is None else [before]

    def __call__(self, graph: fx.Graph) -> None:
        for one in self.before:
            one(graph)

    def uuid(self) -> Any:
        theirs = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.before]
        return None if None in theirs else (get_hash_for_files((__file__,)), *theirs)


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
        before = torch._inductor.config.post_grad_custom_post_pass
        yield {"triton.enable_pdl": True, "post_grad_custom_post_pass": _InKeys(before)}


def _waiting(generate: Callable[..., str]) -> Callable[..., str]:
    from torch._inductor.codegen.triton import TritonKernel

    def codegen_kernel(self: Any, name: str | None = None) -> str:
        source = generate(self, name)
        return wait_first(source) if TritonKernel._enable_pdl_codegen() else source

    return codegen_kernel


def wait_first(source: str) -> str:
    """A kernel's source with a wait as its first statement. Its helper functions stand before it."""
    start = source.rindex("\n@triton.jit")
    begin = source.index("):\n", start) + len("):\n")
    return f"{source[:begin]}    {WAIT}\n{source[begin:]}"


def refuse_unsafe_starts(sources: Iterable[str]) -> None:
    """Raise LoweringError if a generated kernel starts early and does not wait first: it could read what is not yet written.

    So does a kernel that starts early and is written as no known version of Inductor writes one.
    """

    def checked(found: re.Match[str]) -> str:
        name, kernel = found.groups()
        if _STARTS_EARLY.search(kernel) and dict(_FIRST_STATEMENT.findall(kernel)).get(name, "").strip() != WAIT:
            raise _unsafe("starts before the one in front of it ends, and does not wait first", name)
        return ""

    for source in sources:
        if found := _STARTS_EARLY.search(rest := _GENERATED.sub(checked, source)):
            line = rest[: found.start()].count("\n")
            raise _unsafe("starts early in a form that is not known", rest.splitlines()[line].strip()[:80])


def _unsafe(what: str, where: str) -> LoweringError:
    return LoweringError(f"a kernel that Inductor wrote {what}", at=where,
                         help="compile='eager' runs the graph as it is; please report the version of torch")  # fmt: skip
