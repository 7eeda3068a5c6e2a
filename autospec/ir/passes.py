"""What a pass is, and what it reports.

A pass is a frozen value whose fields are its options. It rewrites the graph in place and returns how many places it
changed; what it left alone it explains with `notes.refuse`. Everything else is the runner's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from autospec.ir.text import node_text


@dataclass(frozen=True)
class Refusal:
    """A place that a pass looked at and left alone."""

    line: str
    module: str
    reason: str


@dataclass
class Notes:
    """What one run of a pass has to say."""

    refusals: list[Refusal] = field(default_factory=list)
    details: list[str] = field(default_factory=list)

    def refuse(self, node: fx.Node, reason: str) -> None:
        self.refusals.append(Refusal(node_text(node), node.meta.get("module", ""), reason))

    def say(self, detail: str) -> None:
        self.details.append(detail)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One rewrite. Subclasses set `name`, declare options as fields and implement `run`."""

    name: ClassVar[str] = ""
    is_optional: ClassVar[bool] = False  # only speed is lost without it, so the user may leave it out

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        """Rewrite the graph and return the number of places changed."""
        raise AssertionError(f"{type(self).__name__} does not implement run")

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        """Sentences about what the graph lacks for this pass to be legal; none: satisfied."""
        return ()

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        """Sentences about what is wrong after the pass; none: satisfied."""
        return ()


@dataclass(frozen=True)
class Stage:
    """A named run of passes."""

    name: str
    passes: Sequence[Pass]


@dataclass(frozen=True)
class PassRecord:
    """What a pass did, for explain()."""

    graph: str
    stage: str
    name: str
    count: int
    refusals: tuple[Refusal, ...]
    details: tuple[str, ...]
    nodes_before: int
    nodes_after: int
    seconds: float
