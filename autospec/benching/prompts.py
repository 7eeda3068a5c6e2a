"""The prompts of a bench: those of a file, or the bundled ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autospec.errors import OptionError
from autospec.model_zoo.bundled import demo_prompts


def read_prompts(file: Path | None, tokenizer: Callable[[], Any], where: str) -> list[list[int]]:
    """Token ids of every prompt.

    Args:
        file: one prompt a line; .jsonl: strings, lists of token ids, or objects with text, prompt or input_ids. None: the
            bundled ones.
        tokenizer: makes what has encode(text) -> ids; called where there is any text.
        where: the verb, for errors.
    """
    prompts: list[Any] = [one["text"] for one in demo_prompts()]
    if file is not None:
        try:
            lines = [line for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"the prompts cannot be read: {error}", at=f"--prompts {file}", where=where,
                              help="name a text file") from error  # fmt: skip
        prompts = [_prompt(line, f"{file}:{i}", where) for i, line in enumerate(lines, 1)] if file.suffix == ".jsonl" else lines
        if not prompts:
            raise OptionError("there are no prompts", at=f"--prompts {file}", where=where, help="write one on every line")
    if all(isinstance(one, list) for one in prompts):
        return prompts
    made = tokenizer()
    return [one if isinstance(one, list) else list(made.encode(one)) for one in prompts]


def _prompt(line: str, place: str, where: str) -> Any:
    """Text or token ids from one line of JSON."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        value = None
    if isinstance(value, dict):
        value = next((value[name] for name in ("text", "prompt", "input_ids") if name in value), None)
    is_ids = isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    if not value or not (isinstance(value, str) or is_ids):
        raise OptionError("a line of the prompts is neither text nor token ids", at=place, where=where,
                          help='write {"text": "..."} or {"input_ids": [1, 2]} on every line')  # fmt: skip
    return value
