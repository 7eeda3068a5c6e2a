"""What a bench found, in one place for the table, the JSON file and the picture."""

from __future__ import annotations

from dataclasses import dataclass, field

from autospec.api import OptimizedModel
from autospec.benching.contenders import Timed
from autospec.benching.differences import Differences
from autospec.benching.record import Acceptance, Key, NodeRate, Step, acceptance, node_rates, outside_loops
from autospec.benching.selection import Selection
from autospec.benching.sweep import Sweep
from autospec.config import tree_of
from autospec.runtime.metrics import Metrics
from autospec.trees import DraftTree


@dataclass(frozen=True)
class Parts:
    """Mean seconds of the parts of a step, see `autospec.benching.steps`."""

    verify: float
    draft: float
    glue: float

    @property
    def step(self) -> float:
        return self.verify + self.draft + self.glue


@dataclass
class Run:
    """Plain decoding or one drafter.

    Args:
        name: for people.
        asked: the --speculation that asks for it; "": plain.
        outputs: new tokens by prompt.
        seconds: of each prompt, the median.
        glue_seconds: of each prompt, what passed outside of its steps after the first token.
        metrics: what the device counted, by prompt.
        steps: what the host saw, by prompt, in a run that was not timed.
        first_tokens: seconds to the first token of every call; step_times: of every step of a call per prompt.
    """

    name: str
    asked: str
    fast: OptimizedModel
    outputs: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    glue_seconds: list[float] = field(default_factory=list)
    metrics: list[Metrics] = field(default_factory=list)
    steps: list[list[Step]] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    parts: Parts | None = None

    @property
    def tree(self) -> DraftTree:
        return tree_of(self.fast.speculation)

    @property
    def is_plain(self) -> bool:
        return self.fast.speculation is None

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.outputs)) / sum(self.seconds)

    @property
    def launches(self) -> dict[int, int]:
        """Steps by draft length, over all prompts."""
        found: dict[int, int] = {}
        for one in self.metrics:
            for length, count in one.steps.items():
                found[length] = found.get(length, 0) + count
        return found

    @property
    def all_steps(self) -> list[Step]:
        return [step for steps in self.steps for step in steps]

    @property
    def steps_outside_loops(self) -> list[Step]:
        pairs = zip(self.steps, self.outputs, strict=True)
        return [step for steps, output in pairs for step in outside_loops(steps, output)]

    @property
    def acceptance(self) -> Acceptance:
        return acceptance(self.all_steps)

    @property
    def acceptance_outside_loops(self) -> Acceptance:
        return acceptance(self.steps_outside_loops)

    @property
    def nodes(self) -> dict[Key, NodeRate]:
        """Outside of loops, unless nothing is."""
        counted = [step for step in self.steps_outside_loops or self.all_steps if step.draft_len]
        return node_rates(counted, self.tree)

    def equals(self, other: Run) -> bool:
        return self.outputs == other.outputs


@dataclass(frozen=True)
class Bench:
    """Everything.

    Args:
        title: model, dtype, device and versions.
        runs: plain first.
        sweeps: of --sweep-tree.
        reference: transformers' generate by prompt, if it was measured.
        must_equal: whether its tokens must be those of plain decoding: sampled ones come from another stream, and quantised
            index keys may change them.
        differences: of whatever should have plain decoding's tokens and has others.
        selection: what quantised index keys changed; None: keys are as they are.
    """

    title: dict[str, str | int | float]
    runs: list[Run]
    sweeps: list[Sweep]
    reference: list[Timed] | None = None
    must_equal: bool = True
    differences: list[Differences] = field(default_factory=list)
    selection: Selection | None = None

    @property
    def is_identical(self) -> bool:
        return all(run.equals(self.runs[0]) for run in self.runs) and self.reference_equals is not False

    @property
    def reference_equals(self) -> bool | None:
        """Whether transformers' tokens are those of plain decoding; None: it was not measured, or need not be."""
        if self.reference is None or not self.must_equal:
            return None
        return [one.outputs[0] for one in self.reference] == self.runs[0].outputs

    @property
    def reference_speed(self) -> float | None:
        """Tokens per second of transformers' generate."""
        if self.reference is None:
            return None
        return sum(len(one.outputs[0]) for one in self.reference) / sum(one.seconds for one in self.reference)
