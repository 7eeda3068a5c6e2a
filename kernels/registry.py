"""The registry of canonical ops: a reference is the schema, the fake kernel and the CPU implementation.

    @kernel_op(mutates=("k_pages", "v_pages"))
    def append_kv(k: Tensor, ...) -> None: ...          # defines torch.ops.autospec.append_kv

    @append_kv.implementation("triton", why_not=needs_cuda)
    def append_kv_triton(k: Tensor, ...) -> None: ...   # defines torch.ops.autospec_triton.append_kv

An op's file holds its reference, its support checks, its implementations and its bench, in that order.
`why_not` receives the op's arguments by name (FakeTensors and scalars) and states a fact, or returns None.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autospec.debug import names
from autospec.kernels.fakes import once_for_a_kind
from autospec.kernels.launch import launching_directly

Support = Callable[[Mapping[str, Any]], str | None]
Sample = Callable[[Mapping[str, Any], torch.Generator], dict[str, Any]]
Expansion = Callable[[Mapping[str, Any]], dict[str, Any]]

if not __name__.startswith("autospec."):
    raise ImportError(
        f"this file is autospec.kernels.registry, but was imported as {__name__}: always import kernels through "
        "'autospec.kernels' (a second copy would register every op twice)"
    )


@dataclass(frozen=True)
class Implementation:
    """One way to run an op: the backend's name, when it cannot, and the op that replaces the canonical one.

    Args:
        next_n: numbers of tokens per request that it takes, where it does not take any number.
    """

    backend: str
    why_not: Support
    op: Any  # torch._ops.OpOverload
    function: Callable[..., Any]
    next_n: frozenset[int] | None = None

    def refusal(self, arguments: Mapping[str, Any], disabled: frozenset[str]) -> str | None:
        """Why it does not run these arguments where these backends are switched off; None: it does."""
        if any(names(word, self.backend) for word in disabled):
            return "switched off by AUTOSPEC_DISABLE_KERNELS"
        return self.why_not(arguments)


@dataclass
class KernelOp:
    """A canonical op: its reference, its torch operator and its implementations in order of preference."""

    name: str
    reference: Callable[..., Any]
    mutates: tuple[str, ...]
    op: Any  # torch._ops.OpOverload
    signature: inspect.Signature
    implementations: list[Implementation] = field(default_factory=list)
    sample: Sample | None = None  # what to measure implementations with; None: the first that can is taken
    expand: Expansion | None = None  # the same work as requests of one token each

    @property
    def every_form(self) -> list[Any]:
        """The operators that a call may have become: canonical, an implementation, one launched from Python."""
        ops = [self.op, *(one.op for one in self.implementations)]
        return ops + [DIRECT[op] for op in ops if op in DIRECT]

    def sampler(self, sample: Sample) -> Sample:
        """Declare realistic inputs to measure with: from the arguments by name (FakeTensors and scalars) to the same with
        new real tensors on the generator's device."""
        self.sample = sample
        return sample

    def expander(self, expand: Expansion) -> Expansion:
        """Declare how a call of several tokens per request becomes one of a token each: from arguments by name to such."""
        self.expand = expand
        return expand

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.op(*args, **kwargs)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, defaults filled in."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def implementation(
        self, backend: str, *, why_not: Support, waits: bool = False, next_n: frozenset[int] | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a faster implementation with the reference's signature.

        Args:
            next_n: the numbers of tokens per request (the second dimension of the first argument) that it takes; None: any.
            waits: its Triton kernels wait inside for the kernel before them (`wrap_triton`): where Python may launch
                them, torch.ops.autospec_direct.<name> does.
        """

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            define = torch.library.triton_op if backend in TRACED else torch.library.custom_op
            definition: Any = define(f"autospec_{backend}::{self.name}", function, mutates_args=self.mutates)
            if backend not in TRACED:
                definition.register_fake(once_for_a_kind(self.reference))
            op = getattr(getattr(torch.ops, f"autospec_{backend}"), self.name).default
            support = why_not if next_n is None else of_widths(next_n, why_not)
            self.implementations.append(Implementation(backend, support, op, function, next_n))
            if waits:
                DIRECT[op] = self._direct(function)
            return function

        return register

    def _direct(self, function: Callable[..., Any]) -> Any:
        """The same implementation as an op that Inductor does not look into."""

        def launch(*args: Any, **kwargs: Any) -> Any:
            with launching_directly():
                return function(*args, **kwargs)

        schema = str(self.op._schema).removeprefix(f"autospec::{self.name}")
        name = f"autospec_direct::{self.name}"
        definition: Any = torch.library.custom_op(name, launch, mutates_args=self.mutates, schema=schema)
        definition.register_fake(once_for_a_kind(self.reference))
        op = getattr(torch.ops.autospec_direct, self.name).default
        LAUNCHES[op] = launch
        return op

    def native(self, *, why_not: Support) -> None:
        """Register an implementation in C++, whose library `why_not` loads: torch.ops.autospec_cpu.<name>.

        Until then, and where it cannot be loaded, the op runs the reference.
        """
        name, schema = f"autospec_cpu::{self.name}", str(self.op._schema).removeprefix("autospec::")
        _native.define(schema)
        _native.impl(self.name, self.reference, "CompositeExplicitAutograd")
        torch.library.register_fake(name, once_for_a_kind(self.reference), lib=_native)
        op = getattr(torch.ops.autospec_cpu, self.name).default
        self.implementations.append(Implementation("cpu", why_not, op, self.reference))


def of_widths(next_n: frozenset[int], why_not: Support) -> Support:
    """The same support check for calls of so many tokens per request only."""

    def support(arguments: Mapping[str, Any]) -> str | None:
        width = next(iter(arguments.values())).shape[1]
        if width not in next_n:
            return f"it takes {' or '.join(map(str, sorted(next_n)))} tokens per request, not {width}"
        return why_not(arguments)

    return support


TRACED = ("triton", "flashinfer_xqa", "flashinfer_trtllm")  # Inductor sees what they do; other backends' ops are opaque
_native = torch.library.Library("autospec_cpu", "DEF")
REGISTRY: dict[str, KernelOp] = {}
DIRECT: dict[Any, Any] = {}  # op of a Triton implementation -> the op that launches it from Python
LAUNCHES: dict[Any, Callable[..., Any]] = {}  # such an op -> its function


def kernel_op(
    *, mutates: tuple[str, ...] = (), fake: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], KernelOp]:
    """Define `autospec::<name>` from its reference.

    Args:
        mutates: names of the tensors that the op writes.
        fake: shapes and dtypes of the results, where running the reference on FakeTensors would guard on them.
    """

    def register(reference: Callable[..., Any]) -> KernelOp:
        name = reference.__name__
        definition = torch.library.custom_op(f"autospec::{name}", reference, mutates_args=mutates)
        definition.register_fake(fake or once_for_a_kind(reference))
        op = getattr(torch.ops.autospec, name).default
        kernel = KernelOp(name, reference, mutates, op, inspect.signature(reference))
        REGISTRY[name] = kernel
        return kernel

    return register


def load_all() -> dict[str, KernelOp]:
    """Import every kernel file and return the registry."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem != "registry":
            importlib.import_module(f"autospec.kernels.{path.stem}")
    return REGISTRY


def find(op: object) -> KernelOp | None:
    """The canonical op behind a graph node's target, if it is one."""
    if getattr(op, "namespace", None) != "autospec":
        return None
    return REGISTRY.get(getattr(op, "_opname", ""))
