"""The one debugging variable: AUTOSPEC_DEBUG=dump,verify,table[,dir=PATH].

dump    write NN_pass.{before,after}.txt for every pass
verify  run the invariants after every pass, not only after those that changed something
table   print the stage table when a program was built
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from autospec.errors import unknown_option

BACKENDS = ("triton", "flashinfer", "cpu")  # what AUTOSPEC_DISABLE_KERNELS may name


@dataclass(frozen=True)
class DebugOptions:
    dump: bool = False
    verify: bool = False
    table: bool = False
    directory: Path = Path("autospec-dump")


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


def options() -> DebugOptions:
    """The options in force, read from the environment at each build of a program."""
    return parse(os.environ.get("AUTOSPEC_DEBUG", ""))


def disabled_kernels() -> frozenset[str]:
    """Backends switched off by AUTOSPEC_DISABLE_KERNELS (a comma-separated list such as `flashinfer,triton`)."""
    words = filter(None, (word.strip() for word in os.environ.get("AUTOSPEC_DISABLE_KERNELS", "").split(",")))
    disabled = frozenset(words)
    for word in sorted(disabled - set(BACKENDS)):
        raise unknown_option("AUTOSPEC_DISABLE_KERNELS", word, BACKENDS)
    return disabled
