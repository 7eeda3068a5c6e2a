"""`autospec check-draft MODEL HEAD`: what a head's files say, and how often the head agrees with its target.

The target continues a prompt greedily, and the head is compared with it on that text: see `autospec.heads.agreement`. Of MTP
modules it is checked on which side of the final norm their hidden state is recycled: wrong, only later levels suffer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autospec.arguments import Parser
from autospec.config import MTPConfig
from autospec.errors import OptionError
from autospec.heads.agreement import STANDARD_ERRORS, teacher_forced_agreement
from autospec.heads.mtp_files import has_mtp
from autospec.loading import check_causal_lm, load_draft_head, load_model, load_mtp_modules, tokenizer_of
from autospec.model_zoo.bundled import resolve
from autospec.training.features import Target
from autospec.training.mtp import MTPLoss, begin_from, new_mtp

PROMPT = "The history of computing began long before the first electronic machine was switched on."


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    made = Parser(
        prog="autospec check-draft", description=__doc__.split("\n", 1)[0],
        epilog="example:\n  autospec check-draft bundled:target bundled:eagle3",
    )  # fmt: skip
    made.add_argument("model", help="path or hub id of the target")
    made.add_argument("head", help="path or hub id of an EAGLE-3 or Medusa head, or of MTP modules; mtp: the model's own")
    made.add_argument("--prompt", default=PROMPT, help="text that the target continues")
    made.add_argument("--text", type=Path, help="a file to compare on instead, best written by the target itself")
    made.add_argument("--max-new-tokens", type=int, default=256, help="length of the continuation (default 256)")
    made.add_argument("--top-k", type=int, default=10, help="how many of the head's best tokens count (default 10)")
    made.add_argument("--steps", type=int, default=3, help="passes of an EAGLE-3 head or MTP modules (default 3)")
    return made


def run(arguments: Sequence[str]) -> int:
    """Print the report; 1 if other taps, or the other side of the norm, agree better than the checkpoint's."""
    asked = parser().parse_args(arguments)
    target = load_model(resolve(asked.model), "model")
    check_causal_lm(target)
    if has_mtp(resolve(asked.head), target):
        return _check_modules(asked, target)
    head = load_draft_head(resolve(asked.head), target)
    if head.report is not None:
        print(head.report)
    report = teacher_forced_agreement(target, head, _text(asked, target), asked.top_k, num_steps=asked.steps)
    print(report)
    return int(report.better is not None)


def _check_modules(asked: argparse.Namespace, target: Any) -> int:
    """Agreement per level of MTP modules, as their family recycles and the other way."""
    source = None if asked.head == "mtp" else resolve(asked.head)
    theirs = load_mtp_modules(MTPConfig(source, max_draft_len=asked.steps), target)
    print(theirs.report)
    text = _text(asked, target)
    frozen = Target(target)
    head = new_mtp(frozen, len(theirs.depths), theirs.layout)
    begin_from(head, theirs)
    loss, is_normed = MTPLoss(frozen, head, steps=asked.steps), theirs.layout.recycles_normed
    features, weights = frozen(text), torch.ones(text.shape, device=text.device)
    positions = text.shape[1] - asked.steps
    found = []
    for normed in (is_normed, not is_normed):
        head.layout = replace(theirs.layout, recycles_normed=normed)
        with torch.no_grad():
            _, measured = loss(text, weights, features)
        found.append((measured[1] / positions).tolist())
        side = ("behind" if normed else "before") + " the norm" + (", as the layout says" if normed == is_normed else "")
        print(f"  recycled {side}: " + "  ".join(f"{rate:.1%}" for rate in found[-1]))
    frozen.close()
    ours, other = (rates[-1] for rates in found)
    spread = sum(max(rate * (1 - rate), 1 / positions) for rate in (ours, other)) / positions
    is_worse = other - ours > STANDARD_ERRORS * spread**0.5
    side = "before" if is_normed else "behind"
    print(f"the modules were probably trained on hidden states {side} the norm" if is_worse else
          f"top-1 agreement per level, {positions} positions; the other side of the norm does not agree more")  # fmt: skip
    return int(is_worse)


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
