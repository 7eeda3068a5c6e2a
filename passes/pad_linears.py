"""On a GPU, give a linear layer more rows where its product is slower without them.

    %y = aten.linear(%x, %w)   ->   %p = aten.constant_pad_nd(aten.reshape(%x, [rows, I]), [0, 0, 0, more])
                                    %y = aten.reshape(aten.slice(aten.linear(%p, %w), 0, 0, rows), [..., O])

Legal: a row of a product depends on no other row, and the added ones are read by no one; sums may round in another order.
Both forms are measured, the padded one with its copy (kernels/choice.py), and rows are added where that pays. cuBLAS 13 goes
by tables in which some numbers of rows fare badly. Llama-3.1-8B's gate and up, H100 80GB SXM, torch 2.11, 2026-11-22, us:
    rows     384   400   416   432   440   448   456   480   512
    cuBLAS   130   200   154   151   204   295   156   166   156
Not touched: few rows, where reading the weight is what costs, multiples of 128, small weights, and graphs whose attention sums
in one order (`exact=True`): what they compute must not depend on a measurement.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autospec.ir.build import Builder, device_of, substitute, value_of
from autospec.ir.match import argument, aten, calls
from autospec.ir.passes import Notes, Pass
from autospec.kernels.choice import Times, can_measure, shapes_text, times_of
from autospec.kernels.ordered_attention import ordered_attention
from autospec.kernels.registry import Implementation, KernelOp

TILE = 128  # multiples of it were among the fast ones: 43 numbers of rows from 136 to 1024, five weights
SMALLEST = 1_000_000  # numbers of a weight that is worth a measurement: a guess
PAYS = 0.95  # of the time as it is: what is measured varies by a few percent


def as_it_is(x: Tensor, weight: Tensor, bias: Tensor | None = None, more: int = 0) -> Tensor:
    """x [R, I], weight [O, I], bias [O] -> [R, O]."""
    return torch.nn.functional.linear(x, weight, bias)


def padded(x: Tensor, weight: Tensor, bias: Tensor | None = None, more: int = 0) -> Tensor:
    """The same by way of `more` rows of zeros."""
    return as_it_is(torch.nn.functional.pad(x, (0, 0, 0, more)), weight, bias)[: x.shape[0]]


def _sample(arguments: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
    def like(given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        return torch.randn(given.shape, generator=generator, device=generator.device, dtype=given.dtype)

    return {name: like(given) for name, given in arguments.items()}


FORMS = [Implementation(one.__name__, lambda args: None, one, one) for one in (as_it_is, padded)]
LINEAR = KernelOp("linear", as_it_is, (), as_it_is, inspect.signature(as_it_is), FORMS, _sample)


@dataclass(frozen=True, kw_only=True)
class PadLinears(Pass):
    """Pad the rows of linear layers to a multiple of 128 where that is faster."""

    name = "pad-linears"
    is_optional = True

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if device_of(module).type != "cuda":
            return 0
        count = 0
        told: set[str] = set()
        for node in calls(module, aten.linear):
            x, weight, bias = (value_of(argument(node, name)) for name in ("input", "weight", "bias"))
            if weight.numel() < SMALLEST:
                continue
            rows = x.numel() // x.shape[-1]
            if rows <= TILE or rows % TILE == 0:
                continue
            if any(calls(module, ordered_attention)):
                notes.refuse(node, "attention sums in one order here, and no sum may depend on what was measured")
                break
            arguments = {"x": x.reshape(rows, x.shape[-1]), "weight": weight, "bias": bias, "more": -rows % TILE}
            times = measured(arguments)
            is_padded = pays(times)
            line = "; ".join([str(times), *(f"{form}: {why}" for form, why in times.failures.items()), shapes_text(arguments)])
            if line not in told:
                told.add(line)
                notes.say(f"padding pays: {line}") if is_padded else notes.refuse(node, f"padding does not pay: {line}")
            if is_padded:
                _pad(module, node, rows, arguments["more"])
                count += 1
        return count


def measured(arguments: Mapping[str, Any]) -> Times:
    """Microseconds of both forms."""
    if not can_measure(arguments):
        return Times({}, unmeasured="no such GPU is here")
    return times_of(LINEAR, FORMS, arguments)


def pays(times: Times) -> bool:
    """Whether the padded form is known to be faster."""
    known = times.microseconds
    return len(known) == len(FORMS) and known["padded"] < PAYS * known["as_it_is"]


def _pad(module: fx.GraphModule, node: fx.Node, rows: int, more: int) -> None:
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    builder = Builder(module, node, node.meta.get("module", ""))
    flat = builder.call(aten.reshape.default, x, [rows, x.meta["val"].shape[-1]])
    wider = builder.call(aten.constant_pad_nd.default, flat, [0, 0, 0, more])
    whole = builder.call(aten.linear.default, wider, weight, *([] if bias is None else [bias]))
    kept = builder.call(aten.slice.Tensor, whole, 0, 0, rows)
    substitute(node, builder.call(aten.reshape.default, kept, list(node.meta["val"].shape)))
