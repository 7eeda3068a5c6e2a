"""What torch.export does at every node of a graph and nobody reads here, or that it did before: left undone while it traces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autospec.ir.fakes import Known, run_once


class _SameGradMode(TorchFunctionMode):
    """Setting the grad mode to what it is does nothing; export would note it down and split the whole graph around it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch._C._set_grad_enabled and args == (torch.is_grad_enabled(),):
            return None
        return function(*args, **(kwargs or {}))


class _OncePerKind(TorchDispatchMode):
    """An op that writes to nothing runs on fake tensors once for arguments alike."""

    supports_higher_order_operators = True  # they are not ops, and pass

    def __init__(self) -> None:
        super().__init__()
        self.known: Known = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_known = op is torch.ops.prim.device.default  # every other call asks for one
        if is_known or not isinstance(op, torch._ops.OpOverload) or torch.is_grad_enabled() or op._schema.is_mutable:
            return op(*args, **kwargs)
        return run_once(self.known, op, args, kwargs, lambda: op(*args, **kwargs))


@contextlib.contextmanager
def traced_plainly() -> Iterator[None]:
    """Around the forward of what is exported: no stack trace at any node, no note of a no_grad within a no_grad, no op
    again on fake tensors alike.

    Outside of a trace it does nothing.
    """
    mode = get_proxy_mode()
    if mode is None:
        yield
        return
    mode.tracer.record_stack_traces = False  # symbolised and formatted for each node
    with _SameGradMode(), _OncePerKind():
        yield
