"""What a bench says of tokens that are not plain decoding's: where they part, and whether a near-tie explains it."""

from __future__ import annotations

import pytest
import torch
from harness.models import model

from autospec.benching.differences import compare

PROMPTS = [[5, 9, 13], [33, 7, 7, 20]]


def greedy(prompt: list[int], count: int) -> tuple[list[int], list[torch.Tensor]]:
    """Tokens one by one, and the logits that each was taken from."""
    text, found = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            found.append(model("target")(input_ids=torch.tensor([text])).logits[0, -1])
            text.append(int(found[-1].argmax()))
    return text[len(prompt) :], found


def test_a_fork_is_where_tokens_part_and_says_how_close_they_were() -> None:
    (one, logits), (two, _) = (greedy(prompt, 6) for prompt in PROMPTS)
    second = int(logits[2].topk(2).indices[1])
    found = compare("drafting", [[*one[:2], second, 1, 1, 1], two], [one, two], PROMPTS, model("target"))
    assert found is not None
    assert (found.outputs, found.tokens, found.agreeing) == (2, 12, 8)
    (fork,) = found.forks
    assert (fork.prompt, fork.position) == (0, 2)
    assert fork.gap == pytest.approx(float(logits[2][one[2]] - logits[2][second]), abs=1e-5)
    assert fork.gap > 0
    larger = logits[2][[one[2], second]].abs().max()
    assert fork.resolution == float(torch.nextafter(larger, torch.tensor(torch.inf)) - larger)
    assert "1 of 2 outputs differ from plain decoding's; 8 of 12 tokens come before" in found.text()
    assert "prompt 0, token 2" in found.text()


def test_an_end_or_a_drawn_token_is_not_explained() -> None:
    short = compare("drafting", [[4, 5]], [[4, 5, 6]], PROMPTS[:1], model("target"))
    drawn = compare("drafting", [[4, 7, 6]], [[4, 5, 6]], PROMPTS[:1], None)
    assert short is not None
    assert drawn is not None
    assert [(one.agreeing, one.forks[0].position, one.forks[0].gap) for one in (short, drawn)] == [(2, 2, None), (1, 1, None)]


def test_equal_outputs_have_no_differences() -> None:
    assert compare("drafting", [[4, 5]], [[4, 5]], PROMPTS[:1], None) is None
