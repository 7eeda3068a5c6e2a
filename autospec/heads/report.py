"""What loading a draft head found and assumed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HeadReport:
    """Args:
        source: what was loaded.
        layout: the name of the layout that was recognised.
        tap_convention: how the file counts the layers it reads, in words; empty for heads without taps.
        tap_after: 0-based target layers whose output is read.
        shared: tensors that are the target's own.
        notes: what the file left open or contradicts itself on, and what was assumed.
    """

    source: str
    layout: str
    tap_convention: str = ""
    tap_after: tuple[int, ...] = ()
    shared: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.layout} layout"]
        if self.tap_after:
            lines.append(f"taps after layers {self.tap_after} ({self.tap_convention})")
        if self.shared:
            lines.append(f"shared with the target: {', '.join(self.shared)}")
        return "\n  ".join([*lines, *self.notes])
