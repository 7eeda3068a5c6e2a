"""Optimized tiny models, one per process, and transformers as the judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.models import captured, model
from harness.programs import DRAFTERS

from autospec.api import Limits, OptimizedModel
from autospec.errors import AutospecError

Make = Callable[..., OptimizedModel]


@pytest.fixture(scope="session")
def optimized() -> Make:
    """optimized(drafter, max_batch_size=..., defaults=...): what optimize() returns, without capturing again."""
    made: dict[Any, OptimizedModel] = {}

    def make(
        drafter: str = "ngram", *, max_batch_size: int | None = None, max_length: int | None = None,
        page_size: int | None = None, defaults: dict[str, Any] | None = None,
    ) -> OptimizedModel:  # fmt: skip
        speculation, draft = DRAFTERS[drafter]
        key = (drafter, max_batch_size, max_length, page_size, str(defaults))
        if key not in made:
            made[key] = OptimizedModel(
                captured("target"), captured(draft) if draft else None, speculation, "eager",
                Limits(max_batch_size, max_length, page_size),
                {"pad_token_id": 0} if defaults is None else defaults,
            )  # fmt: skip
        return made[key]

    return make


@pytest.fixture(scope="session")
def judge() -> Any:
    """The Hugging Face module that `optimized` was captured from."""
    return model("target")


@pytest.fixture(scope="session")
def refused() -> Callable[..., AutospecError]:
    """refused(kind, call): the error that the call raises; it has all four lines."""

    def check(kind: type[AutospecError], call: Callable[[], Any]) -> AutospecError:
        with pytest.raises(kind) as caught:
            call()
        lines = str(caught.value).splitlines()
        labels = [line[:7].strip() for line in lines[1:]]
        assert labels == ["at", "in", "help"], f"not four lines:\n{caught.value}"
        return caught.value

    return check


@pytest.fixture
def prompts() -> list[list[int]]:
    """Ragged prompts, none with the padding id 0."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(1, 64, (length,), generator=generator).tolist() for length in (7, 19, 3)]


def pad(rows: list[list[int]], side: str, pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [B, S]."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        part = slice(width - len(tokens), width) if side == "left" else slice(0, len(tokens))
        ids[row, part], mask[row, part] = torch.tensor(tokens), 1
    return ids, mask


@pytest.fixture(scope="session")
def padded() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return pad
