"""Acceptance profiles: P_1 >= P_2 >= ..., the share of steps that accept at least so many drafts.

The mean acceptance length is 1 + P_1 + P_2 + ..., the bonus token included. Where only a length is asked for, the profile
is geometric, P_d = a^d: every draft is as likely to be right as the one before it.
"""

from __future__ import annotations

import itertools

from autospec.errors import OptionError

Asked = float | tuple[float, ...]  # a mean acceptance length, or the rates themselves


def parse(text: str) -> Asked:
    """`3.91`, a length, or `0.8,0.6,0.4`, rates; a single number below 1 is a rate.

    Raises:
        OptionError: it is neither.
    """
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise _refusal(text, "no number and no list of numbers") from None
    if len(numbers) == 1 and numbers[0] >= 1:
        return numbers[0]
    if not all(0 <= rate <= 1 for rate in numbers):
        raise _refusal(text, "holds a rate that is not between 0 and 1")
    if any(below > above for above, below in itertools.pairwise(numbers)):
        raise _refusal(text, "rises: who accepts three drafts accepts two")
    return numbers


def rates(asked: Asked, levels: int) -> tuple[float, ...]:
    """The rates of a draft of so many levels.

    Raises:
        OptionError: the draft is too short for them.
    """
    if isinstance(asked, tuple):
        if len(asked) > levels:
            raise _refusal(asked, f"has {len(asked)} rates for a draft of {levels} levels")
        return asked + (0.0,) * (levels - len(asked))
    if asked > 1 + levels:
        raise _refusal(asked, f"is more than a draft of {levels} levels can give, at most {1 + levels}")
    low, high = 0.0, 1.0
    for _ in range(60):  # halves the interval down to a float's precision
        middle = (low + high) / 2
        low, high = (middle, high) if mean_length(_geometric(middle, levels)) < asked else (low, middle)
    return _geometric(high, levels)


def mean_length(profile: tuple[float, ...]) -> float:
    """Tokens per step, the bonus token included."""
    return 1.0 + sum(profile)


def _geometric(a: float, levels: int) -> tuple[float, ...]:
    return tuple(a**depth for depth in range(1, levels + 1))


def _refusal(asked: object, reason: str) -> OptionError:
    return OptionError(f"the acceptance {reason}", at=f"--acceptance {asked}", where="autospec bench",
                       help="write a mean acceptance length such as 3.91, or falling rates such as 0.8,0.6,0.4")  # fmt: skip
