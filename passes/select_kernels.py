"""Each canonical op becomes one implementation, and every refusal is written down.

    %o = autospec.paged_attention(...)   ->   %o = autospec_triton.paged_attention(...)

Legal: implementations have the reference's signature and meaning (tests hold them to it). Of those that do not refuse,
the one that AUTOSPEC_KERNELS names is taken; else, on a GPU, the fastest as measured for these shapes, if the op says
what to measure with; else the first. Where all refuse, the op stays and its reference runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

import autospec.kernels.flashinfer
import autospec.kernels.flashinfer_mla
import autospec.kernels.gluon_mla  # noqa: F401 - registers its implementations
from autospec.debug import ROUTES, names
from autospec.errors import OptionError, unknown_option
from autospec.ir.build import value_of
from autospec.ir.passes import Notes, Pass
from autospec.kernels.choice import can_measure, shapes_text, times_of
from autospec.kernels.registry import Implementation, KernelOp, find, load_all

PACKAGED = frozenset({"triton", "cpu"})  # the ops of all other backends are Python functions, of which a package has none


@dataclass(frozen=True)
class Choice:
    """What an op becomes (None: its reference runs), why backends were left, and what was measured."""

    implementation: Implementation | None
    reasons: Mapping[str, str]
    measured: str | None = None


@dataclass(frozen=True, kw_only=True)
class SelectKernels(Pass):
    """Choose an implementation for every canonical op; of those that a package can hold, if it is for one."""

    name = "select-kernels"
    is_optional = True
    disabled: frozenset[str] = frozenset()
    forced: tuple[tuple[str, str], ...] = ()
    is_packaged: bool = False

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        self.check_forced()
        chosen: Counter[str] = Counter()
        measured: dict[str, None] = {}
        refused: set[tuple[str, str, str]] = set()
        for node in list(module.graph.nodes):
            kernel = find(node.target) if node.op == "call_function" else None
            if kernel is None:
                continue
            choice = self.choose(kernel, kernel.bind(value_of(node.args), value_of(node.kwargs)))
            for backend, reason in choice.reasons.items():
                if (kernel.name, backend, reason) not in refused:
                    refused.add((kernel.name, backend, reason))
                    notes.refuse(node, f"{kernel.name}: {backend}: {reason}")
            if choice.measured is not None:
                measured[f"{kernel.name}: {choice.measured}"] = None
            if choice.implementation is not None:
                node.target = choice.implementation.op
            chosen[f"{kernel.name}: {choice.implementation.backend if choice.implementation else 'reference'}"] += 1
        for line, times in chosen.items():
            notes.say(f"{line} x {times}")
        for line in measured:
            notes.say(line)
        return sum(times for line, times in chosen.items() if not line.endswith(": reference"))

    def choose(self, kernel: KernelOp, arguments: Mapping[str, Any]) -> Choice:
        """Ask the implementations in order, the forced ones first, until one is certain; measure where several can."""
        word = dict(self.forced).get(kernel.name, "")
        if word == "reference":
            return Choice(None, {})
        is_measured = kernel.sample is not None and can_measure(arguments)
        reasons: dict[str, str] = {}
        able: list[Implementation] = []
        for one in sorted(kernel.implementations, key=lambda one: not names(word, one.backend)):
            if able and (not is_measured or names(word, able[0].backend) != names(word, one.backend)):
                break
            reason = one.refusal(arguments, self.disabled)
            if self.is_packaged and one.backend not in PACKAGED:
                reason = "Python calls it, and a package has none"
            if reason is None:
                able.append(one)
            else:
                reasons[one.backend] = reason
        if len(able) < 2:
            return Choice(able[0] if able else None, reasons)
        times = times_of(kernel, able, arguments)
        return Choice(times.best(able), reasons | dict(times.failures), f"{times}; {shapes_text(arguments)}")

    def check_forced(self) -> None:
        """Every op and backend of AUTOSPEC_KERNELS exists; that a backend refuses some arguments is no mistake."""
        known = load_all() if self.forced else {}
        for op, word in self.forced:
            if op not in known:
                raise unknown_option("AUTOSPEC_KERNELS", op, known)
            if word in ROUTES and known[op].expand is not None:  # expand-dsa-decode has taken it
                continue
            backends = [one.backend for one in known[op].implementations]
            if word != "reference" and not any(names(word, backend) for backend in backends):
                raise OptionError(
                    f"{op} has no implementation in {word}", at=f"{op}={word}", where="AUTOSPEC_KERNELS",
                    help=f"it has {', '.join([*backends, 'reference'])}",
                )  # fmt: skip
