"""What a user asks for: the speculation configurations.

Field names are TensorRT-LLM's where it has one, so that a configuration can be carried over.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from autospec.errors import OptionError, unknown_option
from autospec.trees import DraftTree, chain, dynamic_tree, static_tree

T = TypeVar("T")


def _checked(cls: type[T]) -> type[T]:
    """Turn a misspelt or surplus option into an OptionError that suggests the right one."""
    plain_init: Any = cls.__init__
    names = [one.name for one in dataclasses.fields(cls) if one.init]  # type: ignore[arg-type]
    missing_default = dataclasses.MISSING
    required = [one.name for one in dataclasses.fields(cls) if one.init and one.default is missing_default]  # type: ignore[arg-type]
    in_order = [one.name for one in dataclasses.fields(cls) if one.init and not one.kw_only]  # type: ignore[arg-type]

    def __init__(self: Any, *args: Any, **options: Any) -> None:
        for name in options:
            if name not in names:
                raise unknown_option(cls.__name__, name, names)
        if len(args) > len(in_order):
            raise OptionError(f"{cls.__name__} takes at most {len(in_order)} options without a name, got {len(args)}",
                              at=repr(args[len(in_order)]), where=cls.__name__,
                              help=f"they are {', '.join(in_order)}")  # fmt: skip
        doubled = [name for name in in_order[: len(args)] if name in options]
        missing = [name for name in required[len(args) :] if name not in options]
        for name, what in [*((name, "given twice") for name in doubled), *((name, "missing") for name in missing)]:
            raise OptionError(f"{name} is {what}", at=name, where=cls.__name__, help=f"give {name} once")
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
        tree_of(self)  # which refuses one that is too long


@dataclass(frozen=True)
class _Ranking:
    """The options of every drafter that ranks tokens. Without any of them the draft is a chain.

    Args:
        speculative_model: where the draft's weights are.
        max_draft_len: longest accepted path, so the levels of a tree; None: the default, or a static tree's depth.
        eagle_choices: a static tree as a list of paths of child ranks, such as [[0], [1], [0, 0]].
        use_dynamic_tree: grow a tree by score; implied by dynamic_tree_max_topk.
        dynamic_tree_max_topk: children per node and frontier of a dynamic tree (K); None: 10.
        max_total_draft_tokens: nodes of a dynamic tree that are verified (M); None: K * max_draft_len.
        draft_temperature: divides the draft's logits before they are ranked (tau).
        draft_quantization: "fp8" lets the draft read its weights in 8 bits, for less to read and a little less acceptance.
    """

    speculative_model: Any
    max_draft_len: int | None = None
    eagle_choices: Sequence[Sequence[int]] | None = field(default=None, kw_only=True)
    use_dynamic_tree: bool | None = field(default=None, kw_only=True)
    dynamic_tree_max_topk: int | None = field(default=None, kw_only=True)
    max_total_draft_tokens: int | None = field(default=None, kw_only=True)
    draft_temperature: float = field(default=1.0, kw_only=True)
    draft_quantization: str | None = field(default=None, kw_only=True)
    tree: DraftTree = field(init=False, repr=False, compare=False)

    default_draft_len = 4
    is_in_the_checkpoint = False  # without a speculative_model, the target's own checkpoint has the draft

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.speculative_model is None and not self.is_in_the_checkpoint:
            raise OptionError(f"{name} needs a draft", at="speculative_model=None", where=name,
                              help="pass what is loaded already, or a path to it")  # fmt: skip
        if self.max_draft_len is not None:
            _positive(self, "max_draft_len", self.max_draft_len)
        tau = self.draft_temperature
        if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 < tau < float("inf"):
            raise OptionError(f"draft_temperature must be a positive number, got {tau!r}",
                              at=f"draft_temperature={tau!r}", where=name, help="1.0 ranks by the draft as it is")  # fmt: skip
        if self.draft_quantization not in (None, "fp8"):
            raise OptionError(f"draft_quantization must be 'fp8' or None, got {self.draft_quantization!r:.40}",
                              at="draft_quantization", where=name, help="the target is never quantised")  # fmt: skip
        tree = self._tree(name)
        object.__setattr__(self, "tree", tree)
        object.__setattr__(self, "max_draft_len", tree.max_draft_len)

    def _tree(self, name: str) -> DraftTree:
        if self.use_dynamic_tree is not None and not isinstance(self.use_dynamic_tree, bool):
            raise OptionError(f"use_dynamic_tree must be True or False, got {self.use_dynamic_tree!r}",
                              at=f"use_dynamic_tree={self.use_dynamic_tree!r:.40}", where=name, help="or leave it out")  # fmt: skip
        if self.use_dynamic_tree is False and self.dynamic_tree_max_topk is not None:
            raise OptionError("dynamic_tree_max_topk belongs to a dynamic tree", at="use_dynamic_tree=False", where=name,
                              help="leave out use_dynamic_tree, or dynamic_tree_max_topk")  # fmt: skip
        is_dynamic = self.use_dynamic_tree or self.dynamic_tree_max_topk is not None
        if self.eagle_choices is not None:
            if is_dynamic or self.max_total_draft_tokens is not None:
                raise OptionError("a tree is static or dynamic, not both", at="eagle_choices", where=name,
                                  help="leave out eagle_choices, or the options of the dynamic tree")  # fmt: skip
            tree = static_tree(self.eagle_choices)
            if self.max_draft_len not in (None, tree.max_draft_len):
                raise OptionError(
                    f"max_draft_len is {self.max_draft_len}, but the longest path of eagle_choices has {tree.max_draft_len}",
                    at=f"max_draft_len={self.max_draft_len}", where=name, help="leave max_draft_len out",
                )  # fmt: skip
            return tree
        length = self.default_draft_len if self.max_draft_len is None else self.max_draft_len
        if is_dynamic:
            top_k = 10 if self.dynamic_tree_max_topk is None else self.dynamic_tree_max_topk
            return dynamic_tree(top_k, length, self.max_total_draft_tokens)
        if self.max_total_draft_tokens is not None:
            raise OptionError("max_total_draft_tokens belongs to a dynamic tree", at="max_total_draft_tokens", where=name,
                              help="set use_dynamic_tree=True, or use max_draft_len alone for a chain")  # fmt: skip
        return chain(length)


@_checked
@dataclass(frozen=True)
class DraftTargetConfig(_Ranking):
    """Draft with a smaller model of the same vocabulary, merged into the target's program.

    Args:
        speculative_model: a loaded Hugging Face causal LM, or a path or hub id.
        max_draft_len ... draft_temperature: chain, static or dynamic tree; a chain of 4 unless said otherwise.
        num_draft_layers: decoder layers of the draft that run; None reads it from the draft's configuration.
            A smaller number truncates the draft.
    """

    num_draft_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_draft_layers is not None:
            _positive(self, "num_draft_layers", self.num_draft_layers)


@_checked
@dataclass(frozen=True)
class Eagle3Config(_Ranking):
    """Draft with an EAGLE-3 head, spliced into the target's program.

    Args:
        speculative_model: a folder or hub id of a head (SafeAILab, SpecForge or speculators layout), or a loaded
            autospec.heads.eagle3.Eagle3Head.
        max_draft_len ... draft_temperature: chain, static or dynamic tree; a chain of 7 unless said otherwise.
    """

    default_draft_len = 7


@_checked
@dataclass(frozen=True)
class MedusaConfig(_Ranking):
    """Draft with Medusa heads: head i guesses the token at depth i + 1.

    Args:
        speculative_model: a folder or hub id of Medusa heads, or a loaded autospec.heads.medusa.MedusaHeads.
        max_draft_len ... draft_temperature: chain, static or dynamic tree, no deeper than there are heads; a chain of
            4 unless said otherwise.
    """


@_checked
@dataclass(frozen=True)
class MTPConfig(_Ranking):
    """Draft with the multi-token-prediction modules that come with a checkpoint (DeepSeek-V3, GLM, Qwen3-Next, MiMo).

    Args:
        speculative_model: a folder or hub id of a checkpoint with such modules, or a loaded autospec.heads.mtp.MTPHead;
            None: the checkpoint that the target was loaded from.
        max_draft_len ... draft_temperature: chain, static or dynamic tree; a chain of 3 unless said otherwise. There
            may be more levels than modules.
        use_mtp_vanilla: module i guesses level i, the first one again beyond the last; False: the first module guesses
            all levels. They differ where a checkpoint has several modules.
    """

    speculative_model: Any = None
    use_mtp_vanilla: bool = field(default=True, kw_only=True)

    default_draft_len = 3
    is_in_the_checkpoint = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.use_mtp_vanilla, bool):
            raise OptionError(f"use_mtp_vanilla must be True or False, got {self.use_mtp_vanilla!r}", where="MTPConfig",
                              at=f"use_mtp_vanilla={self.use_mtp_vanilla!r:.40}", help="or leave it out")  # fmt: skip


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
        tree_of(self)


Ranking = DraftTargetConfig | Eagle3Config | MedusaConfig | MTPConfig
Speculation = NGramConfig | DraftTargetConfig | Eagle3Config | MedusaConfig | MTPConfig | AutoConfig | None


def tree_of(speculation: Speculation) -> DraftTree:
    """The widest draft of a configuration."""
    if isinstance(speculation, _Ranking):
        return speculation.tree
    if isinstance(speculation, AutoConfig):
        return chain(max(speculation.draft_lens))
    return chain(0 if speculation is None else speculation.max_draft_len)


def parse_speculation(value: object) -> Speculation:
    """`"auto"`, `"ngram"`, `None` or a configuration, as given to `autospec.optimize`."""
    if value is None or isinstance(value, (NGramConfig, DraftTargetConfig, Eagle3Config, MedusaConfig, MTPConfig, AutoConfig)):
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
