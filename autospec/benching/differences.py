"""Where tokens differ from those of plain decoding, how many came before, and whether it was a near-tie that tipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fork:
    """The first difference of one output.

    Args:
        prompt: whose output, from 0.
        position: in the output, from 0.
        gap: what the model's logits at this place, from one forward pass over the text so far, say for plain decoding's token
            against the other; None: tokens were drawn, or one output ended.
        resolution: the distance of two neighbouring numbers of the model's dtype near those logits.
    """

    prompt: int
    position: int
    gap: float | None = None
    resolution: float | None = None


@dataclass(frozen=True)
class Differences:
    """One way of decoding against plain decoding.

    Args:
        name: of the way.
        tokens: of plain decoding, over all outputs.
        agreeing: of these, before each output's first difference.
        forks: the outputs that differ.
    """

    name: str
    outputs: int
    tokens: int
    agreeing: int
    forks: list[Fork]

    def text(self, whose: str = "plain decoding's") -> str:
        """One line, and one a fork that can be explained."""
        lines = [f"{self.name}: {len(self.forks)} of {self.outputs} outputs differ from {whose}; {self.agreeing} of "
                 f"{self.tokens} tokens come before"]  # fmt: skip
        for one in self.forks:
            if one.gap is not None:
                lines.append(f"  prompt {one.prompt}, token {one.position}: the two tokens' logits are {one.gap:.3g} apart in one"
                             f" forward pass, where the dtype resolves {one.resolution:.2g}")  # fmt: skip
        return "\n".join(lines)


def compare(
    name: str, outputs: Sequence[Sequence[int]], plain: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], module: Any
) -> Differences | None:
    """What differs, or None where nothing does.

    Args:
        outputs, plain: tokens by prompt.
        module: the model, to explain greedy decoding's forks; None where tokens were drawn.
    """
    forks, agreeing = [], 0
    for number, (mine, theirs) in enumerate(zip(outputs, plain, strict=True)):
        if list(mine) == list(theirs):
            agreeing += len(theirs)
            continue
        shared = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
        agreeing += shared
        if module is None or shared >= min(len(mine), len(theirs)):
            forks.append(Fork(number, shared))
        else:
            logits = _logits(module, [*prompts[number], *theirs[:shared]])
            pair = logits[[theirs[shared], mine[shared]]]
            resolution = torch.finfo(logits.dtype).eps * 2.0 ** float(torch.floor(torch.log2(pair.abs().max().float())))
            forks.append(Fork(number, shared, float(pair[0].float() - pair[1].float()), resolution))
    return Differences(name, len(plain), sum(map(len, plain)), agreeing, forks) if forks else None


def _logits(module: Any, tokens: Sequence[int]) -> Tensor:
    """Logits after the last token, in the model's dtype."""
    device = next(module.parameters()).device
    with torch.no_grad():
        return module(input_ids=torch.tensor([list(tokens)], device=device)).logits[0, -1]
