"""`autospec check-draft MODEL HEAD`: what a head's files say, and how often the head agrees with its target.

The target continues a prompt greedily, and the head is compared with it on that text: see `autospec.heads.agreement`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from autospec.arguments import Parser
from autospec.errors import OptionError
from autospec.heads.agreement import teacher_forced_agreement
from autospec.loading import check_causal_lm, load_draft_head, load_model, tokenizer_of
from autospec.model_zoo.bundled import resolve

PROMPT = "The history of computing began long before the first electronic machine was switched on."


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    made = Parser(
        prog="autospec check-draft", description=__doc__.split("\n", 1)[0],
        epilog="example:\n  autospec check-draft bundled:target bundled:eagle3",
    )  # fmt: skip
    made.add_argument("model", help="path or hub id of the target")
    made.add_argument("head", help="path or hub id of an EAGLE-3 or Medusa head")
    made.add_argument("--prompt", default=PROMPT, help="text that the target continues")
    made.add_argument("--text", type=Path, help="a file to compare on instead, best written by the target itself")
    made.add_argument("--max-new-tokens", type=int, default=256, help="length of the continuation (default 256)")
    made.add_argument("--top-k", type=int, default=10, help="how many of the head's best tokens count (default 10)")
    made.add_argument("--steps", type=int, default=3, help="passes of an EAGLE-3 head (default 3)")
    return made


def run(arguments: Sequence[str]) -> int:
    """Print the report; 1 if other taps agree better than the checkpoint's."""
    asked = parser().parse_args(arguments)
    target = load_model(resolve(asked.model), "model")
    check_causal_lm(target)
    head = load_draft_head(resolve(asked.head), target)
    if head.report is not None:
        print(head.report)
    report = teacher_forced_agreement(target, head, _text(asked, target), asked.top_k, num_steps=asked.steps)
    print(report)
    return int(report.better is not None)


def _text(asked: argparse.Namespace, target: Any) -> torch.Tensor:
    """Token ids [1, S]: a file's, or the target's own continuation of the prompt."""
    tokenizer = tokenizer_of(asked.model, "autospec check-draft")
    if asked.text is not None:
        try:
            text = asked.text.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"the text cannot be read: {error}", at=f"--text {asked.text}", where="autospec check-draft",
                              help="name a text file") from error  # fmt: skip
        return tokenizer(text, return_tensors="pt")["input_ids"].to(target.device)
    inputs = tokenizer(asked.prompt, return_tensors="pt").to(target.device)
    return target.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
                           max_new_tokens=asked.max_new_tokens)  # fmt: skip
