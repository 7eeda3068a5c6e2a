"""The one debugging variable: AUTOSPEC_DEBUG=dump,verify,table[,dir=PATH]; and two that choose kernels.

dump    write NN_pass.{before,after}.txt for every pass
verify  run the invariants after every pass, not only after those that changed something
table   print the stage table when a program was built, and which kernels could not be compiled ahead
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autospec.errors import OptionError, unknown_option

# What AUTOSPEC_DISABLE_KERNELS and AUTOSPEC_KERNELS may name; a word means every backend that it begins.
BACKENDS = ("triton", "gluon", "flashinfer", "flashinfer_xqa", "flashinfer_trtllm", "flashinfer_fa3", "flashinfer_fa2", "cpu")
ROUTES = ("native", "expanded")  # of AUTOSPEC_KERNELS, for ops that can take a step as requests of one token


@dataclass(frozen=True)
class PassText:
    """A graph's text before and after one pass."""

    graph: str
    stage: str
    name: str
    before: str
    after: str


@dataclass(frozen=True)
class DebugOptions:
    dump: bool = False
    verify: bool = False
    table: bool = False
    directory: Path = Path("autospec-dump")
    kept: list[PassText] | None = None  # where the runner puts the texts of passes that changed something


def parse(text: str) -> DebugOptions:
    """Parse the variable's value; a word nobody knows is an error."""
    flags: set[str] = set()
    directory = Path("autospec-dump")
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word.startswith("dir="):
            directory = Path(word.removeprefix("dir="))
        elif word in ("dump", "verify", "table"):
            flags.add(word)
        else:
            raise unknown_option("AUTOSPEC_DEBUG", word, ["dump", "verify", "table", "dir=PATH"])
    return DebugOptions("dump" in flags, "verify" in flags, "table" in flags, directory)


_kept: list[PassText] | None = None


@contextlib.contextmanager
def keeping() -> Iterator[list[PassText]]:
    """Programs that are built inside leave the texts of their passes in the list."""
    global _kept
    outer, _kept = _kept, []
    try:
        yield _kept
    finally:
        _kept = outer


def options() -> DebugOptions:
    """The options in force, read from the environment at each build of a program."""
    return dataclasses.replace(parse(os.environ.get("AUTOSPEC_DEBUG", "")), kept=_kept)


def disabled_kernels() -> frozenset[str]:
    """Backends switched off by AUTOSPEC_DISABLE_KERNELS (a comma-separated list such as `flashinfer,triton`)."""
    words = filter(None, (word.strip() for word in os.environ.get("AUTOSPEC_DISABLE_KERNELS", "").split(",")))
    disabled = frozenset(words)
    for word in sorted(disabled - set(BACKENDS)):
        raise unknown_option("AUTOSPEC_DISABLE_KERNELS", word, BACKENDS)
    return disabled


def forced_kernels() -> tuple[tuple[str, str], ...]:
    """(op, backend) pairs of AUTOSPEC_KERNELS (such as `paged_attention=triton`); the backend may be `reference`, or a route."""
    pairs: dict[str, str] = {}
    for word in filter(None, (word.strip() for word in os.environ.get("AUTOSPEC_KERNELS", "").split(","))):
        op, equals, backend = (part.strip() for part in word.partition("="))
        if not (op and equals and backend):
            raise OptionError(
                f"AUTOSPEC_KERNELS names a backend for an op, got {word!r}", at=word, where="AUTOSPEC_KERNELS",
                help="write op=backend, such as paged_attention=triton",
            )  # fmt: skip
        if backend not in (*BACKENDS, "reference", *ROUTES):
            raise unknown_option("AUTOSPEC_KERNELS", backend, [*BACKENDS, "reference", *ROUTES])
        if pairs.setdefault(op, backend) != backend:
            raise OptionError(
                f"AUTOSPEC_KERNELS names two backends for {op}", at=word, where="AUTOSPEC_KERNELS", help="leave one of them out"
            )
    return tuple(pairs.items())


def names(word: str, backend: str) -> bool:
    """Whether a word of these variables means a backend: `flashinfer` means flashinfer_xqa too."""
    return backend == word or backend.startswith(f"{word}_")
