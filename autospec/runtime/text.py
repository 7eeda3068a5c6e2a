"""Text of an artifact: its tokenizer through the `tokenizers` package alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autospec.artifact.manifest import TOKENIZER
from autospec.errors import ArtifactError


class Tokenizer:
    """What generating text needs of a tokenizer: encode and decode, as transformers' fast tokenizers do them."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as FromFile

        try:
            self._inner = FromFile.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise ArtifactError(f"the tokenizer cannot be read: {str(error)[:120]}", at=path.name, where=str(path.parent),
                                help="export the model again") from None  # fmt: skip

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens included where the tokenizer adds them."""
        ids: list[int] = self._inner.encode(text).ids
        return ids

    def decode(self, ids: Any, skip_special_tokens: bool = False, **ignored: Any) -> str:
        """The text of token ids, a list or a tensor."""
        listed: Sequence[int] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        text: str = self._inner.decode(listed, skip_special_tokens=skip_special_tokens)
        return text


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of an artifact.

    Raises:
        ArtifactError: the model was exported without one.
    """
    path = Path(directory) / TOKENIZER / "tokenizer.json"
    if not path.is_file():
        raise ArtifactError("the artifact has no tokenizer", at=f"{TOKENIZER}/{path.name}", where=str(directory),
                            help="the model came without one: give token ids to autospec.load(...).generate")  # fmt: skip
    return Tokenizer(path)
