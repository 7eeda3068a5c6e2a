"""Errors a user can cause, all of one shape: the rule that broke, the line, the module, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutospecError(ValueError):
    """A user-visible refusal.

    Args:
        rule: the rule that was broken and what was found instead, one sentence.
        at: the graph line, option or file where it was found.
        where: the module path, or whatever owns `at`.
        help: what the user can do about it.
    """

    def __init__(self, rule: str, *, at: object = None, where: object = None, help: str | None = None) -> None:
        self.rule, self.at, self.where, self.help = rule, at, where, help
        lines = [rule]
        for label, value in (("at", at), ("in", where), ("help", help)):
            if value is not None:
                lines.append(f"  {label:<5} {value}")
        super().__init__("\n".join(lines))


class CaptureError(AutospecError):
    """The model cannot be captured, or decoding it step by step would not be lossless."""


class OptionError(AutospecError):
    """An option is unknown, unsupported or out of range."""


class CapacityError(AutospecError):
    """A request needs more rows, positions or cache pages than there are."""


class CheckpointError(AutospecError):
    """A checkpoint is missing, truncated or does not fit the model."""


class ArtifactError(AutospecError):
    """An exported artifact is incomplete, altered, or made for another machine."""


class LoweringError(AutospecError):
    """A lowered graph would copy a page buffer or break another promise of the program."""


def unknown_option(kind: str, name: str, known: Iterable[str], *, help: str | None = None, what: str = "option") -> OptionError:
    """The error for an option (or another `what`) nobody knows, with the nearest right name."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}" if known else f"it takes no {what}"
    return OptionError(f"{kind} has no {what} '{name}'", at=name, where=kind, help=help or hint)
