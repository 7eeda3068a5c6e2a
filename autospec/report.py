"""Text for people: what the compiler did and why not."""

from __future__ import annotations

from collections.abc import Iterable

from autospec.ir.passes import PassRecord
from autospec.ir.slots import is_pages
from autospec.program import CapturedHead, CapturedModel, Program


def explain_text(target: CapturedModel, draft: CapturedModel | CapturedHead | None, program: Program) -> str:
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
        *memory_plan(target, draft, program),
    ]
    return "\n".join(lines)


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


def memory_plan(target: CapturedModel, draft: CapturedModel | CapturedHead | None, program: Program) -> list[str]:
    """Bytes of weights, pages and the rest of the state."""
    weights = sum(tensor.numel() * tensor.dtype.itemsize for tensor in program.weights.values())
    total = {True: 0, False: 0}
    for slot in program.state_slots().values():
        count = slot.dtype.itemsize
        for size in slot.shape:
            count *= size
        total[is_pages(slot)] += count
    return [f"memory: weights {weights / 1e6:.1f} MB, pages {total[True] / 1e6:.1f} MB, other state {total[False] / 1e6:.2f} MB"]


def list_passes() -> list[str]:
    """Every pass of the pipeline with its first line of documentation and its options."""
    import dataclasses

    from autospec import pipeline

    lines = []
    for one in pipeline.pass_types():
        options = ", ".join(field.name for field in dataclasses.fields(one))
        lines.append(f"{one.name:<22} {(one.__doc__ or '').strip().splitlines()[0]}")
        if options:
            lines.append(f"{'':<22} options: {options}")
    return lines
