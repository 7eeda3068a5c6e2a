"""What a user asks for: the speculation configurations.

Field names are TensorRT-LLM's where it has one, so that a configuration can be carried over.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, TypeVar

from autospec.errors import OptionError, unknown_option

T = TypeVar("T")


def _checked(cls: type[T]) -> type[T]:
    """Turn a misspelt or surplus option into an OptionError that suggests the right one."""
    plain_init: Any = cls.__init__
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    def __init__(self: Any, *args: Any, **options: Any) -> None:
        for name in options:
            if name not in names:
                raise unknown_option(cls.__name__, name, names)
        if len(args) > len(names):
            raise OptionError(f"{cls.__name__} takes at most {len(names)} options, got {len(args)}",
                              at=repr(args[len(names)]), where=cls.__name__,
                              help=f"they are {', '.join(names)}")  # fmt: skip
        plain_init(self, *args, **options)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


def _ngram_size(owner: object, value: object) -> None:
    _positive(owner, "max_matching_ngram_size", value)
    if value == 1:
        raise OptionError(
            "max_matching_ngram_size must be at least 2: one token alone predicts too little",
            at="max_matching_ngram_size=1", where=type(owner).__name__, help="use 2 or more",
        )  # fmt: skip


def _positive(owner: object, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(
            f"{name} must be a positive integer, got {value!r}",
            at=f"{name}={value!r}",
            where=type(owner).__name__,
            help=f"give a {name} of at least 1, or leave it out",
        )


@_checked
@dataclass(frozen=True)
class NGramConfig:
    """Draft by looking up the longest suffix of prompt and output that occurred before.

    Args:
        max_draft_len: draft tokens per step (L).
        max_matching_ngram_size: longest suffix that is looked up; the shortest is 2.
        is_use_oldest: continue the earliest occurrence instead of the most recent one.
    """

    max_draft_len: int = 8
    max_matching_ngram_size: int = 4
    is_use_oldest: bool = False

    def __post_init__(self) -> None:
        _positive(self, "max_draft_len", self.max_draft_len)
        _ngram_size(self, self.max_matching_ngram_size)


@_checked
@dataclass(frozen=True)
class DraftTargetConfig:
    """Draft with a smaller model of the same vocabulary, merged into the target's program.

    Args:
        speculative_model: a loaded Hugging Face causal LM, or a path or hub id.
        max_draft_len: draft tokens per step (L).
        num_draft_layers: decoder layers of the draft that run; None reads it from the draft's configuration.
            A smaller number truncates the draft.
    """

    speculative_model: Any
    max_draft_len: int = 4
    num_draft_layers: int | None = None

    def __post_init__(self) -> None:
        if self.speculative_model is None:
            raise OptionError(
                "DraftTargetConfig needs a draft model",
                at="speculative_model=None",
                where="DraftTargetConfig",
                help="pass a loaded Hugging Face causal LM, or a path to one",
            )
        _positive(self, "max_draft_len", self.max_draft_len)
        if self.num_draft_layers is not None:
            _positive(self, "num_draft_layers", self.num_draft_layers)


@_checked
@dataclass(frozen=True)
class AutoConfig:
    """What `speculation="auto"` stands for: n-gram drafts whose length follows the measured acceptance.

    Args:
        draft_lens: the draft lengths that have a step of their own; 0 is plain decoding.
        max_matching_ngram_size: as in NGramConfig.
    """

    draft_lens: tuple[int, ...] = (0, 2, 4, 8)
    max_matching_ngram_size: int = 4

    def __post_init__(self) -> None:
        _ngram_size(self, self.max_matching_ngram_size)
        lens = self.draft_lens
        are_lengths = isinstance(lens, tuple) and all(isinstance(n, int) and n >= 0 for n in lens)
        if not are_lengths or 0 not in lens or list(lens) != sorted(set(lens)):
            raise OptionError(
                "draft_lens must be a tuple of integers, distinct, ascending, not negative, with 0 among them",
                at=f"draft_lens={lens!r}",
                where="AutoConfig",
                help="for example draft_lens=(0, 2, 4, 8)",
            )


Speculation = NGramConfig | DraftTargetConfig | AutoConfig | None


def parse_speculation(value: object) -> Speculation:
    """`"auto"`, `"ngram"`, `None` or a configuration, as given to `autospec.optimize`."""
    if value is None or isinstance(value, (NGramConfig, DraftTargetConfig, AutoConfig)):
        return value
    named = {"auto": AutoConfig, "ngram": NGramConfig}
    if isinstance(value, str):
        if value in named:
            return named[value]()
        close = difflib.get_close_matches(value, named, n=1)
        raise OptionError(
            f"there is no speculation called '{value}'", at=f"speculation={value!r}", where="autospec.optimize",
            help=f"did you mean '{close[0]}'?" if close else "known: 'auto', 'ngram', None, or a configuration",
        )  # fmt: skip
    raise OptionError(
        f"speculation must be 'auto', 'ngram', None or a configuration, got {type(value).__name__}",
        at=f"speculation={value!r:.80}",
        where="autospec.optimize",
        help="for example speculation=autospec.NGramConfig(max_draft_len=4)",
    )
