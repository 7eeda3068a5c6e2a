"""One row of work: a prompt, its limits and how its tokens are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from autospec.errors import OptionError

# Beyond these float32 overflows, or becomes 0: every positive score would be infinite, and the lowest such id win.
_TEMPERATURES = (1e-30, 1e30)
_PENALTIES = (1e-3, 1e3)


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen; the defaults are greedy.

    Args:
        temperature: 0 takes the argmax; above 0 samples by the Gumbel-max trick.
        top_k: 0 keeps the whole vocabulary. top_p: 1 does. min_p: 0 does.
        repetition_penalty: 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        rules = (
            ("temperature", self.temperature == 0 or _TEMPERATURES[0] <= self.temperature <= _TEMPERATURES[1],
             f"must be 0 or between {_TEMPERATURES[0]:g} and {_TEMPERATURES[1]:g}"),
            ("top_k", self.top_k >= 0, "must be 0 or a positive integer"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "must be between 0 and 1"),
            ("repetition_penalty", _PENALTIES[0] <= self.repetition_penalty <= _PENALTIES[1],
             f"must be between {_PENALTIES[0]:g} and {_PENALTIES[1]:g}"),
        )
        for name, holds, text in rules:
            if not holds:
                value = getattr(self, name)
                raise OptionError(f"{name} {text}, got {value}", at=f"{name}={value}", where="generate",
                                  help=f"leave {name} out to keep its default")  # fmt: skip

    @property
    def needs_scores(self) -> bool:
        """Whether anything but the plain argmax is wanted."""
        return self.temperature > 0 or self.repetition_penalty != 1.0


@dataclass
class Request:
    """One sequence to generate.

    Args:
        prompt: token ids without padding, at least one.
        max_new_tokens: tokens to emit at most.
        sampling: how tokens are chosen.
        row_key: 64-bit key of the request's noise.
        should_stop: called with all ids so far after each token; True ends the request with that token.
    """

    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    row_key: int = 0
    should_stop: Callable[[list[int]], bool] | None = None
    output: list[int] = field(default_factory=list)
    is_done: bool = False

    def take(self, token: int, eos_ids: frozenset[int]) -> bool:
        """Append an emitted token; returns whether the request ends with it."""
        self.output.append(token)
        stopped = self.should_stop is not None and self.should_stop(self.prompt + self.output)
        self.is_done = stopped or token in eos_ids or len(self.output) >= self.max_new_tokens
        return self.is_done
