"""Runs passes and does their chores: counts, requires/ensures, dead code, lint, code, time, dumps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from torch import fx

from autospec.debug import DebugOptions, PassText
from autospec.ir.invariants import broken_invariants
from autospec.ir.passes import Notes, Pass, PassRecord, Stage
from autospec.ir.text import graph_text

LEFT_OUT = "left out by passes="


def run_stages(
    module: fx.GraphModule, stages: Iterable[Stage], *, graph_name: str, debug: DebugOptions,
    left_out: frozenset[str] = frozenset(), first: int = 0,
) -> list[PassRecord]:  # fmt: skip
    """Run every pass of every stage on one graph, in order; those left out leave a record that says so.

    The module's code is written after the last pass, so that inside one, and where one fails, only the graph is current.

    Args:
        first: how many passes ran on this graph before, which numbers the dumps.
    """
    records: list[PassRecord] = []
    text = graph_text(module, weights=True)
    for stage in stages:
        for one in stage.passes:
            if one.name in left_out:
                size = len(module.graph.nodes)
                records.append(PassRecord(graph_name, stage.name, one.name, 0, (), (LEFT_OUT,), size, size, 0.0))
            else:
                record, text = _run(module, one, stage.name, graph_name, first + len(records), debug, text)
                records.append(record)
    # Code after every pass, and texts before and after each, took a chain of 32 layers 1.8 s more (and its passes 2.2).
    if any(record.count for record in records):
        module.recompile()
    return records


def run_pass(
    module: fx.GraphModule, one: Pass, stage: str = "", graph_name: str = "graph", number: int = 0,
    debug: DebugOptions = DebugOptions(),  # noqa: B008 - a frozen value
) -> PassRecord:  # fmt: skip
    """Run one pass and hold it to its promises; a broken promise is an AssertionError that names the pass."""
    record, _ = _run(module, one, stage, graph_name, number, debug, graph_text(module, weights=True))
    if record.count:
        module.recompile()
    return record


def _run(
    module: fx.GraphModule, one: Pass, stage: str, graph_name: str, number: int, debug: DebugOptions, before: str
) -> tuple[PassRecord, str]:
    """One pass over a graph with this text; what it did, and the text after it. The module's code is left as it was."""
    _hold(one, "requires", one.requires(module))
    nodes_before = len(module.graph.nodes)
    notes = Notes()
    start = time.perf_counter()
    try:
        count = one.run(module, notes)
    except Exception as error:
        error.add_note(f"while {one.name} ran")
        raise
    seconds = time.perf_counter() - start
    if count:
        module.graph.eliminate_dead_code()
        module.graph.lint()
    after = graph_text(module, weights=True)
    changed = before != after
    assert changed == (count > 0), (
        f"{one.name} says it changed {count} places, but the graph text {'changed' if changed else 'stayed the same'}"
    )
    _hold(one, "ensures", one.ensures(module))
    if changed or debug.verify:
        _hold(one, "invariants", broken_invariants(module))
    if changed and debug.kept is not None:
        debug.kept.append(PassText(graph_name, stage, one.name, before, after))
    if debug.dump:
        folder = debug.directory / graph_name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}_{one.name}.before.txt").write_text(before)
        (folder / f"{number:02d}_{one.name}.after.txt").write_text(after)
    record = PassRecord(
        graph_name, stage, one.name, count, tuple(notes.refusals), tuple(notes.details), nodes_before,
        len(module.graph.nodes), seconds,
    )  # fmt: skip
    return record, after


def _hold(one: Pass, what: str, sentences: Iterable[str]) -> None:
    found: Sequence[str] = list(sentences)
    assert not found, f"{one.name} {what}: " + "; ".join(found)
