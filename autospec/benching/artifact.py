"""autospec bench DIR: the speed of an exported artifact on this machine."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autospec.arguments import Parser
from autospec.artifact.manifest import is_artifact
from autospec.benching.steps import clocked
from autospec.errors import CapacityError, OptionError
from autospec.loaded import load
from autospec.model_zoo.bundled import demo_prompts
from autospec.runtime.text import load_tokenizer

WHERE = "autospec bench DIR"
PERCENTILES = (50, 90, 99)


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Whether what is to be measured is an artifact."""
    return any(is_artifact(word) for word in arguments[:1])


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="autospec bench", description=__doc__.split("\n", 1)[0],
        epilog="example:\n  autospec bench exported --new-tokens 64 --json artifact.json",
    )  # fmt: skip
    made.add_argument("model", help="a folder that `autospec export` wrote")
    made.add_argument("--compile", default=None, choices=("aot", "inductor", "eager"), help="as in autospec generate")
    made.add_argument("--fallback", action="store_true", help="use the portable graphs where the packages do not fit")
    made.add_argument("--prompts", type=Path, default=None, metavar="FILE",
                      help="one prompt a line; .jsonl: strings or lists of token ids (default: the bundled ones)")  # fmt: skip
    made.add_argument("--new-tokens", type=int, default=64, help="tokens per prompt (default 64)")
    made.add_argument("--repeats", type=int, default=3, help="timed runs of each prompt; the median counts (default 3)")
    made.add_argument("--json", type=Path, default=None, metavar="FILE", help="write all numbers; explain --bench draws them")
    return made


def run(arguments: Sequence[str]) -> int:
    """Measure, print, save."""
    asked = parser().parse_args(arguments)
    for name in ("new_tokens", "repeats"):
        if getattr(asked, name) < 1:
            raise OptionError(f"--{name.replace('_', '-')} must be at least 1", at=f"--{name.replace('_', '-')}", where=WHERE,
                              help="leave it out")  # fmt: skip
    start = time.perf_counter()
    fast = load(asked.model, compile=asked.compile, fallback=asked.fallback)
    room = max(program.shape.max_length for program in fast.artifact.programs) - asked.new_tokens
    prompts = [prompt for prompt in _prompts(asked) if len(prompt) <= room]
    if not prompts:
        raise CapacityError(f"no prompt fits {room + asked.new_tokens} tokens with {asked.new_tokens} new ones", at="--new-tokens",
                            where=WHERE, help="lower --new-tokens, or export with a larger --max-length")  # fmt: skip
    options: dict[str, Any] = {"max_new_tokens": asked.new_tokens, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    fast.generate([prompts[0]], **{**options, "max_new_tokens": 1})
    told = {"load_to_first_token_seconds": time.perf_counter() - start, **_measured(fast, prompts, options, asked.repeats)}
    print(f"{asked.model}, {fast.compile}, {len(prompts)} prompts of {asked.new_tokens} new tokens, batch 1\n"
          f"{told['tokens_per_second']:.0f} tokens/s, mean acceptance length {told['acceptance']['mean_acceptance_length']:.2f}\n"
          f"first token after {_spread(told['first_token_seconds'])}; a step takes {_spread(told['step_seconds_percentiles'])}\n"
          f"loading to the first token took {told['load_to_first_token_seconds']:.2f} s")  # fmt: skip
    if asked.json is not None:
        asked.json.write_text(json.dumps({"model": asked.model, "runs": [told]}, indent=1) + "\n")
    return 0


def _measured(fast: Any, prompts: Sequence[list[int]], options: dict[str, Any], repeats: int) -> dict[str, Any]:
    seconds, first, steps = [], [], []
    reached: list[int] = []
    rows = 0
    for prompt in prompts:
        fast.generate([prompt], **options)  # not timed: caches of a new prompt
        times = []
        for _ in range(repeats):
            fast.generate([prompt], **options)
            times.append(fast.metrics.seconds)
            first.append(fast.metrics.first_token_seconds)
        seconds.append(statistics.median(times))
        with clocked(fast.session) as clock:
            fast.generate([prompt], **options)
        steps += clock
        rows += fast.metrics.row_steps
        reached = [a + b for a, b in zip(reached or [0] * len(fast.metrics.reached), fast.metrics.reached, strict=True)]
    rates = [count / max(1, rows) for count in reached]
    return {
        "name": f"artifact, {fast.compile}",
        "tokens_per_second": len(prompts) * options["max_new_tokens"] / sum(seconds),
        "acceptance": {"steps": rows, "mean_acceptance_length": 1 + sum(rates), "per_depth": rates},
        "first_token_seconds": percentiles(first), "step_seconds_percentiles": percentiles(steps), "step_seconds": None,
    }  # fmt: skip


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """The smallest sample that so many percent do not exceed."""
    ordered = sorted(samples)
    return {str(share): ordered[max(0, -(-len(ordered) * share // 100) - 1)] for share in PERCENTILES} if ordered else {}


def _spread(found: dict[str, float]) -> str:
    return ", ".join(f"{value * 1e3:.2f} ms (p{share})" for share, value in found.items()) or "nothing"


def _prompts(asked: argparse.Namespace) -> list[list[int]]:
    try:
        lines = [one["text"] for one in demo_prompts()] if asked.prompts is None else asked.prompts.read_text().splitlines()
        values = [json.loads(line) if asked.prompts is not None and asked.prompts.suffix == ".jsonl" else line
                  for line in lines if line.strip()]  # fmt: skip
    except (OSError, ValueError) as error:
        raise OptionError(
            f"the prompts cannot be read: {str(error)[:120]}", at=f"--prompts {asked.prompts}", where=WHERE,
            help="name a text file, or .jsonl with a string or a list of token ids on every line",
        ) from error  # fmt: skip
    tokenizer = load_tokenizer(asked.model) if any(isinstance(value, str) for value in values) else None
    found = []
    for value in values:
        is_ids = isinstance(value, list) and bool(value) and all(isinstance(token, int) for token in value)
        if not is_ids and not (isinstance(value, str) and tokenizer is not None):
            raise OptionError("a prompt is neither text nor token ids", at=repr(value)[:60], where=WHERE,
                              help="write a string or a list of token ids on every line")  # fmt: skip
        found.append(value if is_ids else tokenizer.encode(value))  # type: ignore[union-attr]
    return found
