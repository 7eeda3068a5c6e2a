"""The prompts that generate was given: token ids in many forms, checked, and put before their outputs again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autospec.errors import CapacityError, OptionError
from autospec.program import ModelFacts
from autospec.runtime.options import GenerateOptions
from autospec.runtime.request import Request


def read_prompts(input_ids: Any, attention_mask: Any, pad_id: int) -> tuple[Tensor, list[list[int]]]:
    """The padded ids [B, S] as given, and each row's real tokens."""
    if isinstance(input_ids, Mapping):
        if "input_ids" not in input_ids:
            raise OptionError("the mapping holds no input_ids", at=f"keys {', '.join(map(str, input_ids))}"[:80],
                              where="generate", help="pass what the tokenizer returned")  # fmt: skip
        attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
        input_ids = input_ids["input_ids"]
    if isinstance(input_ids, str) or (isinstance(input_ids, (list, tuple)) and any(isinstance(x, str) for x in input_ids)):
        raise OptionError("generate takes token ids, not text", at=f"input_ids={input_ids!r:.40}", where="generate",
                          help="tokenize the text first: tokenizer(text, return_tensors='pt').input_ids")  # fmt: skip
    rows = _rows_of(input_ids) if attention_mask is None else None
    if rows is not None:
        width = max(len(row) for row in rows)
        padded = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], dtype=torch.int64)
        return padded.reshape(len(rows), width), rows
    ids = _as_tensor(input_ids, "input_ids")
    if ids.dim() == 1:
        ids = ids[None]
    if ids.numel() == 0:
        raise CapacityError("the prompt is empty", at=f"input_ids of shape {tuple(ids.shape)}", where="generate",
                            help="give at least one token, for example the bos token")  # fmt: skip
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise OptionError(f"input_ids must be integers [batch, length], got {ids.dtype} of shape {tuple(ids.shape)}",
                          at="input_ids", where="generate", help="pass token ids, one row per prompt")  # fmt: skip
    ids = ids.long()
    if attention_mask is None:
        return ids, ids.tolist()
    given = _as_tensor(attention_mask, "attention_mask")
    if not bool(((given == 0) | (given == 1)).all()):
        raise OptionError("attention_mask must hold 0 for padding and 1 for tokens", at="attention_mask", where="generate",
                          help="an additive mask cannot be given here")  # fmt: skip
    mask = given.bool().to(ids.device)
    mask = mask[None] if mask.dim() == 1 else mask
    if mask.shape != ids.shape:
        raise OptionError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}",
                          at="attention_mask", where="generate", help="give one entry per token")  # fmt: skip
    # A prompt is one run of ones: it starts at most once.
    starts = torch.nn.functional.pad(mask.int(), (1, 0)).diff(dim=1).clamp(min=0).sum(1)
    if bool((starts > 1).any()):
        raise OptionError(f"attention_mask has holes inside the prompt of row {int(starts.argmax())}",
                          at="attention_mask", where="generate", help="pad on the left or the right only")  # fmt: skip
    return ids, [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]


def check_prompt(number: int, prompt: list[int], count: int, facts: ModelFacts) -> None:
    if not prompt:
        raise CapacityError(f"the prompt of row {number} is empty", at="input_ids", where="generate",
                            help="give at least one token, for example the bos token")  # fmt: skip
    if len(prompt) + count > facts.max_positions:
        raise CapacityError(
            f"row {number} asks for {len(prompt)} prompt tokens and {count} new ones, "
            f"but the model has {facts.max_positions} positions",
            at=f"prompt of {len(prompt)} tokens, max_new_tokens={count}", where=facts.name,
            help="shorten the prompt or lower max_new_tokens",
        )  # fmt: skip
    wrong = [token for token in prompt if not 0 <= token < facts.vocab_size]
    if wrong:
        raise OptionError(f"token id {wrong[0]} is outside the vocabulary of {facts.vocab_size}",
                          at=f"row {number}", where="generate",
                          help="mask padding with attention_mask; was another tokenizer used?")  # fmt: skip


def with_outputs(ids: Tensor, requests: list[Request], asked: GenerateOptions) -> Tensor:
    """Prompts as they were given, outputs behind them, padded on the right."""
    width = max(len(request.output) for request in requests)
    rows = [request.output + [asked.pad_id] * (width - len(request.output)) for request in requests]
    prompts = ids.repeat_interleave(asked.num_return_sequences, dim=0)
    return torch.cat([prompts, torch.tensor(rows, dtype=ids.dtype, device=ids.device)], dim=1)


def _rows_of(input_ids: Any) -> list[list[int]] | None:
    """A list of prompts, each a list or a tensor of ids; None if input_ids is something else."""
    if not isinstance(input_ids, (list, tuple)) or not input_ids:
        return None
    if not all(isinstance(row, (list, tuple)) or (isinstance(row, Tensor) and row.dim() > 0) for row in input_ids):
        return None
    rows = [row.reshape(-1).tolist() if isinstance(row, Tensor) else list(row) for row in input_ids]
    for number, row in enumerate(rows):
        wrong = [token for token in row if isinstance(token, (bool, float, str)) or not hasattr(token, "__index__")]
        if wrong:
            raise OptionError(f"the prompt of row {number} holds {wrong[0]!r:.40}, which is no token id",
                              at=f"input_ids[{number}]", where="generate", help="tokenize the text first")  # fmt: skip
        huge = [token for token in row if abs(int(token)) >= 2**31]
        if huge:
            raise OptionError(f"token id {huge[0]} is no token id", at=f"input_ids[{number}]", where="generate",
                              help="was another tokenizer used?")  # fmt: skip
    return [[int(token) for token in row] for row in rows]


def _as_tensor(value: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{name} is no rectangular array of integers: {str(error).splitlines()[0]}"[:200], at=name,
                          where="generate", help="pass a tensor or a list of prompts") from None  # fmt: skip
