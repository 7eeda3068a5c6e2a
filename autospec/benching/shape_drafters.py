"""The drafters that `autospec bench --shape` takes, as text: `none`, `eagle3:7@3.91`, `eagle3-tree:7,10,60@3.84`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autospec.benching import profile
from autospec.benching.random_model import random_head, random_mtp
from autospec.config import Eagle3Config, MTPConfig
from autospec.errors import OptionError, unknown_option

WHERE = "autospec bench --shape"
DEFAULT_DRAFTERS = ("none", "eagle3:7@3.91", "eagle3-fp8:7@3.91", "eagle3-tree:7,10,60@3.84")
HEADS: dict[str, tuple[Any, Any]] = {"eagle3": (random_head, Eagle3Config), "mtp": (random_mtp, MTPConfig)}
_TREE = ("max_draft_len", "dynamic_tree_max_topk", "max_total_draft_tokens")
FORMS = {"none": (), "eagle3": _TREE[:1], "eagle3-tree": _TREE, "mtp": _TREE[:1], "mtp-tree": _TREE}


@dataclass(frozen=True)
class Drafter:
    """One --speculation.

    Args:
        asked: as written.
        options: of its configuration; None: plain decoding.
        acceptance: behind the @; None: --acceptance.
    """

    asked: str
    options: dict[str, Any] | None
    acceptance: profile.Asked | None = None

    @property
    def head(self) -> str:
        """The kind of head that it needs, or "none"."""
        return self.asked.partition(":")[0].partition("-")[0]


def parse_drafter(word: str) -> Drafter:
    """`none`, `eagle3:7`, `eagle3-tree:7,10,60`, `mtp:3`, with `-fp8` for a quantised head, with or without `@3.91`."""
    name, _, acceptance = word.partition("@")
    asked, _, sizes = name.partition(":")
    kind = asked.removesuffix("-fp8")
    if kind not in FORMS:
        raise unknown_option("--speculation", kind, FORMS, what="drafter")
    try:
        numbers = [int(number) for number in sizes.split(",")] if sizes else []
    except ValueError:
        numbers = []
    if len(numbers) != len(FORMS[kind]):
        raise OptionError(f"{kind} takes {len(FORMS[kind])} numbers, got '{sizes}'", at=f"--speculation {word}", where=WHERE,
                          help="for example none, eagle3:7, eagle3-fp8:7, eagle3-tree:7,10,60 or mtp:3")  # fmt: skip
    options: dict[str, Any] | None = dict(zip(FORMS[kind], numbers, strict=True)) if numbers else None
    if asked != kind:
        if options is None:
            raise unknown_option("--speculation", asked, FORMS, what="drafter")
        options["draft_quantization"] = "fp8"
    return Drafter(name, options, profile.parse(acceptance) if acceptance else None)


def rates_of(drafter: Drafter, otherwise: str) -> tuple[float, ...]:
    """Acceptance by depth, as the drafter or else --acceptance says; (): plain decoding."""
    if drafter.options is None:
        return ()
    wanted = profile.parse(otherwise) if drafter.acceptance is None else drafter.acceptance
    return profile.rates(wanted, drafter.options["max_draft_len"])
