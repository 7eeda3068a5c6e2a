"""The runner holds a pass to its promises and does its chores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.graphs import sketch
from torch import fx

from autospec.debug import DebugOptions
from autospec.ir.build import Builder
from autospec.ir.match import aten, calls
from autospec.ir.passes import Notes, Pass, Stage
from autospec.ir.runner import run_pass, run_stages
from autospec.ir.slots import Slot
from autospec.ir.text import graph_text


def _graph() -> fx.GraphModule:
    def write(builder: Builder, x: fx.Node) -> fx.Node:
        return builder.call(aten.add.Tensor, builder.call(aten.neg.default, x), 1)

    return sketch([Slot("input", "x", (2,))], write)


@dataclass(frozen=True, kw_only=True)
class DropNeg(Pass):
    """A pass that behaves, unless an option makes it misbehave."""

    name = "drop-neg"
    claims: int | None = None
    is_idle: bool = False
    needs: tuple[str, ...] = ()
    promises: tuple[str, ...] = ()
    breaks: str = ""

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        return self.needs

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        return self.promises

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        found = [] if self.is_idle else list(calls(module, aten.neg))
        for node in found:
            source = node.args[0]
            notes.refuse(source, "stays where it is")
            notes.say("one less")
            node.replace_all_uses_with(source)
        add = next(calls(module, aten.add))
        if self.breaks == "metadata":
            del add.meta["val"]
        if self.breaks == "slot":
            del module.graph.find_nodes(op="placeholder")[0].meta["slot"]
        if self.breaks == "module call":
            with module.graph.inserting_before(add):
                add.update_arg(1, module.graph.get_attr("nothing"))
        return len(found) if self.claims is None else self.claims


def test_a_pass_that_behaves_leaves_a_record() -> None:
    module = _graph()
    record = run_pass(module, DropNeg(), "stage", "step_4")
    assert (record.graph, record.stage, record.name, record.count) == ("step_4", "stage", "drop-neg", 1)
    assert (record.nodes_before, record.nodes_after) == (4, 3)
    assert record.details == ("one less",)
    assert [(r.line, r.reason) for r in record.refusals] == [("%x = input : f32[2]", "stays where it is")]
    assert 0 < record.seconds < 10
    assert not list(calls(module, aten.neg)), "dead code is removed by the runner"
    assert "neg" not in module.code, "the runner recompiles"


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (DropNeg(claims=0), r"drop-neg says it changed 0 places, but the graph text changed"),
        (DropNeg(claims=3, is_idle=True), r"drop-neg says it changed 3 places, but the graph text stayed the same"),
        (DropNeg(needs=("shapes must be static", "and small")), r"drop-neg requires: shapes must be static; and small"),
        (DropNeg(promises=("an add is left",)), r"drop-neg ensures: an add is left"),
        (DropNeg(breaks="metadata"), r"drop-neg invariants: %add has no metadata"),
        (DropNeg(breaks="slot"), r"drop-neg invariants: placeholder %x has no slot"),
    ],
    ids=lambda value: None if isinstance(value, DropNeg) else value[:40],
)
def test_a_broken_promise_names_the_pass(one: DropNeg, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_pass(_graph(), one)


def test_requirements_are_checked_before_anything_changes() -> None:
    module = _graph()
    before = graph_text(module)
    with pytest.raises(AssertionError):
        run_pass(module, DropNeg(needs=("no",)))
    assert graph_text(module) == before


def test_invariants_are_checked_on_idle_passes_when_asked() -> None:
    broken = DropNeg(is_idle=True, claims=0, breaks="slot")
    assert "no slot" not in graph_text(_graph())
    with pytest.raises(AssertionError, match="has no slot"):
        run_pass(_graph(), broken, debug=DebugOptions(verify=True))


def test_stages_run_in_order_and_dump(tmp_path: Path) -> None:
    debug = DebugOptions(dump=True, directory=tmp_path)
    stages = [Stage("one", [DropNeg()]), Stage("two", [DropNeg(), DropNeg(is_idle=True)])]
    records = run_stages(_graph(), stages, graph_name="prefill", debug=debug)
    assert [(record.stage, record.count) for record in records] == [("one", 1), ("two", 0), ("two", 0)]
    files = sorted(path.name for path in (tmp_path / "prefill").iterdir())
    assert files == [f"0{i}_drop-neg.{when}.txt" for i in range(3) for when in ("after", "before")]
    before = (tmp_path / "prefill" / "00_drop-neg.before.txt").read_text()
    after = (tmp_path / "prefill" / "00_drop-neg.after.txt").read_text()
    assert ("aten.neg" in before, "aten.neg" in after) == (True, False)
    assert before == graph_text(_graph(), weights=True)


def test_a_pass_is_a_frozen_value() -> None:
    with pytest.raises(AttributeError):
        DropNeg().claims = 3  # type: ignore[misc]
    assert DropNeg(claims=2) == DropNeg(claims=2)
    with pytest.raises(AssertionError, match="Pass does not implement run"):
        Pass().run(_graph(), Notes())
