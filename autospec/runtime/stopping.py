"""Stop strings: end a request with the token that completes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autospec.errors import OptionError


class StopStrings:
    """Callable over all token ids so far: did the last token complete a stop string?

    Args:
        tokenizer: anything with decode(ids) -> str.
        strings: the stop strings, none empty.
    """

    def __init__(self, tokenizer: Any, strings: str | Sequence[str]) -> None:
        self.strings: list[Any] = list(strings) if isinstance(strings, (list, tuple)) else [strings]
        if not hasattr(tokenizer, "decode"):
            raise OptionError(
                "stop_strings needs the tokenizer to read the output", at=f"stop_strings={self.strings!r}",
                where="generate", help="pass tokenizer=... as in transformers",
            )  # fmt: skip
        if not self.strings or not all(isinstance(s, str) and s for s in self.strings):
            raise OptionError("stop_strings must be non-empty strings", at=f"stop_strings={strings!r}",
                              where="generate", help="pass one string or a list of them")  # fmt: skip
        self.tokenizer = tokenizer
        # A token adds at least one byte of text, special tokens and incomplete characters aside.
        self.window = max(len(s.encode()) for s in self.strings) + 8

    def __call__(self, ids: list[int]) -> bool:
        tail = ids[-self.window :]
        now, before = self._text(tail), self._text(tail[:-1])
        # Where the last token's text begins; a character that it completed was a replacement character before.
        known = min(len(now), len(before))
        start = next((i for i in range(known) if now[i] != before[i]), known)
        return any(now.find(s, max(0, start - len(s) + 1)) >= 0 for s in self.strings)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
