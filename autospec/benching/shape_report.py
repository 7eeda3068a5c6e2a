"""What `autospec bench --shape` measured, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autospec.benching.roofline import StepBytes


@dataclass(frozen=True)
class Row:
    """One drafter at one batch size; seconds, bytes, tokens per second.

    Args:
        asked_length, length: mean acceptance length, as asked for and as measured; None: plain decoding.
        per_depth: measured acceptance by depth.
        decode, whole: tokens/s of every round.
        step, step_p90: of replayed steps; verify: of steps that draft nothing; None: not asked for.
        host: what generate takes longer, per step; None with narrower buckets.
        deepest, first_children: levels of the drafts that replayed steps left behind, and nodes of their chains of first
            children, which bound acceptance; means.
        bound: of a step.
        start_up: by phase; "first_token" is their sum, from weights on the device to the first token.
    """

    speculation: str
    tree: str
    batch: int
    asked_length: float | None
    length: float | None
    per_depth: list[float]
    decode: list[float]
    whole: list[float]
    step: float
    step_p90: float
    verify: float | None
    host: float | None
    deepest: float
    first_children: float
    bytes: StepBytes
    bound: float
    start_up: dict[str, float]

    @property
    def fraction(self) -> float:
        return self.bound / self.step

    @property
    def at_asked(self) -> float:
        """Decode tokens/s at the acceptance length that was asked for; a few hundred steps miss it by some percent."""
        rate = statistics.median(self.decode)
        return rate if self.length is None or self.asked_length is None else rate * self.asked_length / self.length


def table(rows: Sequence[Row]) -> str:
    """Markdown; milliseconds, GB, seconds."""
    lines = [
        "| speculation | batch | decode tok/s | at asked | whole tok/s | accepted (asked) | step ms, p90 | verify ms | host ms "
        "| GB a step | bound ms | reached | start-up s: capture + passes + compile + graphs + prefill |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        accepted = "" if row.length is None else f"{row.length:.2f} ({row.asked_length:.2f})"
        verify, host = ("" if one is None else f"{1000 * one:.3f}" for one in (row.verify, row.host))
        phases = " + ".join(
            f"{row.start_up[name]:.1f}" for name in ("capture", "passes", "compile", "weights_and_graphs", "prefill")
        )
        lines.append(
            f"| {row.speculation} | {row.batch} | **{statistics.median(row.decode):.1f}** | {row.at_asked:.1f} "
            f"| {statistics.median(row.whole):.1f} "
            f"| {accepted} | {1000 * row.step:.3f}, {1000 * row.step_p90:.3f} | {verify} | {host} "
            f"| {_gigabytes(row.bytes)} | {1000 * row.bound:.3f} | {100 * row.fraction:.0f}% "
            f"| {row.start_up['first_token']:.1f} = {phases} |"
        )
    return "\n".join(lines)


def _gigabytes(read: StepBytes) -> str:
    """All that a step reads, and how much of it experts are."""
    return f"{read.total / 1e9:.2f}" + (f", experts {read.experts / 1e9:.2f}" if read.experts else "")


def as_json(title: dict[str, Any], load_seconds: dict[str, float], rows: Sequence[Row]) -> dict[str, Any]:
    """Everything, seconds and bytes throughout."""
    found = [
        dataclasses.asdict(row) | {"bytes_total": row.bytes.total, "fraction": row.fraction, "decode_at_asked": row.at_asked}
        for row in rows
    ]  # fmt: skip
    return {"title": title, "load_seconds": load_seconds, "rows": found}
