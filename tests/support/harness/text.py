"""A tokenizer of 64 tokens whose text is easy to follow."""

from __future__ import annotations

import functools
import string
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@functools.cache
def char_tokenizer() -> Any:
    """Letters, digits, and 28 tokens of two or three letters, so that a stop string may cross tokens in many ways."""
    pieces = [*string.ascii_lowercase, *string.digits]
    pieces += [a + b for a, b in zip("abcdefghijklmnopqr", "bcdeabfghijklmaaab", strict=True)]
    pieces += [a * 3 for a in "abcdefghij"]
    assert len(set(pieces)) == len(pieces) == 64
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="a")
