"""Stop strings: the token that completes one, wherever token borders lie; checked against transformers."""

from __future__ import annotations

import pytest
import torch
from harness.text import char_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StopStringCriteria

from autospec.errors import OptionError
from autospec.runtime.stopping import StopStrings

TOKENIZER = char_tokenizer()
# Tokens a, b, c and those that hold several of them: many ways to spell one string.
FEW = [index for piece, index in TOKENIZER.get_vocab().items() if set(piece) <= set("abc")]


@settings(max_examples=200)
@given(
    ids=st.lists(st.sampled_from(FEW), min_size=1, max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_as_transformers_decides(ids: list[int], stops: list[str]) -> None:
    try:
        expected = bool(StopStringCriteria(TOKENIZER, stops)(torch.tensor([ids]), None)[0])
    except ValueError:
        return
    assert StopStrings(TOKENIZER, stops)(ids) == expected


def test_overlapping_occurrences() -> None:
    stop = StopStrings(TOKENIZER, "aa")
    a = TOKENIZER.get_vocab()["a"]
    assert [stop([a] * count) for count in (1, 2, 3, 4)] == [False, True, True, True]


def test_only_the_last_token_counts() -> None:
    """A stop string in the prompt does not stop what comes after it."""
    vocab = TOKENIZER.get_vocab()
    stop = StopStrings(TOKENIZER, ["ab"])
    assert stop([vocab["ab"]])
    assert not stop([vocab["ab"], vocab["c"]])
    assert not stop([vocab["ab"]] * 50 + [vocab["c"]])


class _Bytes:
    """Tokens are bytes of UTF-8; an unfinished character decodes to a replacement character."""

    def decode(self, ids: list[int], **options: object) -> str:
        return bytes(ids).decode(errors="replace")


def test_a_character_completed_by_the_last_token() -> None:
    stop = StopStrings(_Bytes(), "é!")
    ids = list("aé!b".encode())
    assert [stop(ids[: end + 1]) for end in range(len(ids))] == [False, False, False, True, False]
    assert StopStrings(_Bytes(), "é")(list("aé".encode()))


def test_long_histories_cost_a_window() -> None:
    stop = StopStrings(TOKENIZER, "abc")
    assert stop.window < 16
    assert stop([0] * 10_000 + [0, 1, 2])


@pytest.mark.parametrize("strings", [[], "", ["a", ""], [3]])
def test_no_strings(strings: object) -> None:
    with pytest.raises(OptionError, match="non-empty strings"):
        StopStrings(TOKENIZER, strings)  # type: ignore[arg-type]
