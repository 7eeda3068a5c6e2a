"""Text for people: what the compiler did and why not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autospec.ir.passes import PassRecord
from autospec.ir.slots import is_pages
from autospec.program import Described, Program

_CHOSEN = re.compile(r"(\w+): (\w+) x (\d+)")  # a line that select-kernels says


def explain_text(target: Described, draft: Described | None, program: Program) -> str:
    """The stage table, the refusals with their reasons, the kernels and the memory plan."""
    facts, shape = target.facts, program.shape
    lines = [
        f"{facts.name}: {facts.num_kv_layers} KV layers, vocabulary {facts.vocab_size}, {facts.max_positions} positions, "
        f"{str(facts.dtype).removeprefix('torch.')} on {facts.device}",
    ]
    if draft is not None:
        lines.append(f"draft {draft.facts.name}: {draft.facts.num_kv_layers} KV layers behind the target's")
    lines += [
        f"program for {shape.batch_size} rows of {shape.max_length} tokens, {shape.num_pages} pages of {shape.page_size}, "
        f"{_drafts(program)}, {'sampling' if shape.sampling else 'greedy'}",
        "",
        *pass_table([*target.records, *(draft.records if draft else ()), *program.records]),
        "",
        *kernel_table(program),
        "",
        *memory_plan(program),
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class KernelRow:
    """What runs one op in one graph.

    Args:
        count: calls.
        layers: where the op belongs to layers, as `0-3, 7`.
        refusals: `backend: reason` of implementations that did not take some of the calls.
    """

    graph: str
    op: str
    backend: str
    count: int
    layers: str = ""
    refusals: tuple[str, ...] = ()


def kernel_table(program: Program) -> list[str]:
    """What runs each canonical op, by graph and layer, with the refusals; a reason of many is told once."""
    rows = kernel_rows(program)
    reasons = [reason for row in rows for reason in row.refusals]
    shared = [reason for reason in dict.fromkeys(reasons) if reasons.count(reason) > 3]
    lines = ["kernels"]
    for row in rows:
        where = f"layers {row.layers}" if row.layers else ""
        lines.append(f"  {row.graph:<14} {row.op:<20} {row.backend:<12} x {row.count:<4} {where}".rstrip())
        lines += [f"{'':<38} without {reason}" for reason in row.refusals if reason not in shared]
    return lines + [f"  {reasons.count(reason)} of these without {reason}" for reason in shared]


def kernel_rows(program: Program) -> list[KernelRow]:
    """What runs each canonical op, by graph; where Inductor fused a reference, its op is gone."""
    rows = []
    refusals = _kernel_refusals(program.records)
    for graph in program.graphs.values():
        if graph.module is None:
            rows += _packaged(graph.name, program.records, refusals)
            continue
        found: dict[tuple[str, str], list[int | None]] = {}
        for node in graph.module.graph.nodes:
            space = getattr(node.target, "namespace", "")
            if node.op == "call_function" and space.startswith("autospec"):
                backend = space.partition("_")[2] or "reference"
                found.setdefault((node.target._opname, backend), []).append(node.meta.get("layer"))
        for (op, backend), layers in sorted(found.items()):
            known = sorted({layer for layer in layers if layer is not None})
            reasons = refusals.get((graph.name, op), ())
            rows.append(KernelRow(graph.name, op, backend, len(layers), ranges(known), tuple(reasons)))
    return rows


def _packaged(graph: str, records: Iterable[PassRecord], refusals: Mapping[tuple[str, str], list[str]]) -> list[KernelRow]:
    """What a package calls, as select-kernels noted when it was compiled: `op: backend x count`; layers are not told."""
    details = [line for one in records if (one.graph, one.name) == (f"{graph}.aot", "select-kernels") for line in one.details]
    found = sorted(match.groups() for match in map(_CHOSEN.fullmatch, details) if match)
    return [
        KernelRow(graph, op, backend, int(count), refusals=tuple(refusals.get((f"{graph}.aot", op), ())))
        for op, backend, count in found
    ]


def _kernel_refusals(records: Iterable[PassRecord]) -> dict[tuple[str, str], list[str]]:
    """`backend: reason` by graph and op, from what select-kernels noted: `op: backend: reason`."""
    found: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for refusal in record.refusals if record.name == "select-kernels" else ():
            op, _, reason = refusal.reason.partition(": ")
            found.setdefault((record.graph, op), []).append(reason)
    return found


def ranges(numbers: list[int]) -> str:
    """`0-3, 7` of ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _drafts(program: Program) -> str:
    """What a step verifies."""
    if program.shape.tree.is_chain:
        return f"draft lengths {', '.join(map(str, program.draft_lens()))}"
    return str(program.shape.tree)


def pass_table(records: Iterable[PassRecord]) -> list[str]:
    """One line a pass, what it said and what it refused below it."""
    lines = [f"{'graph':<16} {'stage':<11} {'pass':<22} {'hits':>5} {'nodes':>11} {'ms':>7}"]
    for record in records:
        nodes = f"{record.nodes_before}>{record.nodes_after}"
        lines.append(
            f"{record.graph:<16} {record.stage:<11} {record.name:<22} {record.count:>5} {nodes:>11} {record.seconds * 1e3:>7.1f}"
        )
        lines += [f"{'':<28} {detail}" for detail in record.details]
        for refusal in record.refusals:
            place = f" ({refusal.module})" if refusal.module else ""
            lines.append(f"{'':<28} left alone{place}: {refusal.reason}")
    return lines


def memory_bytes(program: Program) -> dict[str, int]:
    """Bytes of "weights", "pages" and other "state"."""
    total = {"weights": sum(tensor.numel() * tensor.dtype.itemsize for tensor in program.weights.values()), "pages": 0, "state": 0}
    for slot in program.state_slots().values():
        total["pages" if is_pages(slot) else "state"] += math.prod(slot.shape) * slot.dtype.itemsize
    return total


def memory_plan(program: Program) -> list[str]:
    """Weights, pages and the rest of the state, in a line."""
    sizes = memory_bytes(program)
    kept = [slot for slot in program.state_slots().values() if slot.name.startswith(("index_pages.", "index_scale_pages."))]
    size, form = sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in kept), program.shape.index_quantization
    index_keys = f" (of these {'float8 ' if form else ''}index keys {size / 1e6:.2f} MB)" if kept else ""
    return [f"memory: weights {sizes['weights'] / 1e6:.1f} MB, pages {sizes['pages'] / 1e6:.1f} MB{index_keys}, "
            f"other state {sizes['state'] / 1e6:.2f} MB"]  # fmt: skip


def list_passes() -> list[str]:
    """Every pass of the pipeline with its first line of documentation, and with options as `autospec run` takes them."""
    from autospec import pipeline
    from autospec.pass_list import option_text

    lines = []
    for one in pipeline.pass_types():
        lines.append(f"{one.name:<22} {(one.__doc__ or '').strip().splitlines()[0]}")
        if "{" in (text := option_text(one)):
            lines.append(f"{'':<22} {text}")
    return lines
