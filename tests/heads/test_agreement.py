"""Teacher-forced agreement: right taps agree, shifted ones do not, and every step sees what a chain would see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from autospec.errors import OptionError
from autospec.heads import agreement
from autospec.heads.agreement import teacher_forced_agreement
from autospec.heads.checkpoint import load_head
from autospec.heads.eagle3 import Eagle3Head, Eagle3Spec
from autospec.heads.medusa import MedusaHeads
from autospec.heads.report import HeadReport

VOCAB, HIDDEN, LAYERS, LENGTH = 96, 32, 9, 50


@pytest.fixture(scope="module")
def target() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def seen(target: Any, text: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Outputs of all layers, lm_head's input and the target's choices, each caught where it arises."""
    outputs: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(out)) for layer in target.model.layers]
    hooks.append(target.model.norm.register_forward_hook(lambda _, __, out: outputs.append(out)))
    logits = target(input_ids=text).logits
    for hook in hooks:
        hook.remove()
    return outputs[:-1], outputs[-1], logits[0].argmax(-1)


@torch.no_grad()
def knowing_head(target: Any, text: Tensor, tap_after: tuple[int, ...]) -> Eagle3Head:
    """A head that knows this text by heart, from these taps: fc is solved for it, and its layer adds nothing."""
    states, _, chosen = seen(target, text)
    layer = LlamaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    tokens = chosen[1:].unique()
    spec = Eagle3Spec(layer=layer, draft_vocab_size=len(tokens), tap_after=tap_after, target_hidden_size=HIDDEN)
    head = Eagle3Head(spec, target.model.embed_tokens.weight.detach()).eval()
    head.d2t = tokens - torch.arange(len(tokens))
    block: Any = head.layers[0]
    block.self_attn.o_proj.weight.zero_()
    block.mlp.down_proj.weight.zero_()
    rows = torch.randn(len(tokens), HIDDEN, generator=torch.Generator().manual_seed(2))  # others guess right by chance more often
    head.lm_head.weight.copy_(nn.functional.normalize(rows, dim=-1))
    taps = torch.cat([states[tap][0, :-1] for tap in tap_after], dim=-1).double()
    wanted = head.lm_head.weight[torch.searchsorted(tokens, chosen[1:])].double()
    head.fc.weight.copy_((torch.linalg.pinv(taps) @ wanted).T)
    return head


def test_the_states_are_the_layers_outputs(target: Any, text: Tensor) -> None:
    """The last one, too, which transformers returns only after the final norm."""
    states, read, logits = agreement._run(target, text)
    outputs, final, chosen = seen(target, text)
    assert len(states) == len(outputs) == LAYERS
    assert all(torch.equal(a, b) for a, b in zip(states, outputs, strict=True))
    assert torch.equal(read, final)
    assert torch.equal(logits[0].argmax(-1), chosen)


@pytest.mark.parametrize("tap_after", [(1, 3, 5), (0, 4, 8)])
def test_right_taps_agree_and_are_left_alone(tap_after: tuple[int, ...], target: Any, text: Tensor) -> None:
    report = teacher_forced_agreement(target, knowing_head(target, text, tap_after), text, top_k=5)
    assert report.positions == LENGTH - 1
    assert report.asked.top_1[0] == report.asked.top_k[0] == 1.0
    assert report.better is None
    assert "no neighbouring ones agree more" in report.verdict
    inside = [shift for shift in (-1, 1) if min(tap_after) + shift >= 0 and max(tap_after) + shift < LAYERS]
    assert len(report.shifted) == len(inside)
    assert all(one.top_1[0] < 0.7 for one in report.shifted)


@pytest.mark.parametrize(
    ("step", "convention", "guess"),
    [
        (-1, "ids count layer inputs", "the checkpoint probably counts outputs"),
        (1, "ids count layer outputs", "the checkpoint probably counts inputs"),
        (1, "no ids in the file: outputs of layers 1, L/2-1 and L-4", "trained on other layers"),
        (-1, "ids count layer outputs", "trained on other layers"),
        (1, "", "trained on other layers"),
    ],
)
def test_taps_off_by_one_are_named(step: int, convention: str, guess: str, target: Any, text: Tensor) -> None:
    right = (2, 4, 6)
    head = knowing_head(target, text, right)
    asked = tuple(tap + step for tap in right)
    head.spec = dataclasses.replace(head.spec, tap_after=asked)
    head.report = HeadReport(source="", layout="", tap_convention=convention, tap_after=asked)
    report = teacher_forced_agreement(target, head, text)
    assert report.better is not None
    assert report.better.tap_after == right
    assert report.better.top_1[0] == 1.0
    assert f"taps {right} 100%: " in report.verdict
    assert guess in report.verdict
    assert report.verdict in str(report)


def test_a_head_that_knows_nothing_is_not_told_to_shift(target: Any, text: Tensor) -> None:
    head = knowing_head(target, text, (2, 4, 6))
    with torch.no_grad():
        head.fc.weight.normal_()
    assert teacher_forced_agreement(target, head, text).better is None


def test_every_step_sees_what_a_chain_sees(target: Any, text: Tensor, raw: Callable[..., Any], tmp_path: Path) -> None:
    """Against drafting from every position by itself: all rows up to it, then its own outputs with the true tokens."""
    written = raw("speculators", layers=2, norm_output=True, ids=[2, 4, 6])
    options = {**written.target, "embed_tokens": target.model.embed_tokens.weight.detach()}
    head: Any = load_head(written.write(tmp_path), **options)
    steps, top_k = 4, 3
    states = seen(target, text)[0]
    ranked = list(agreement._unroll(head, states, (1, 3, 5), text, top_k, steps))
    features = head.fuse(torch.cat([states[tap] for tap in (1, 3, 5)], dim=-1))
    compared = 0
    with torch.no_grad():
        for t in range(0, LENGTH - 1 - steps, 7):
            hidden = features[:, : t + 1]
            for step in range(steps):
                rows = t + 1 + step
                logits, recycled = head(text[:, 1 : 1 + rows], hidden, torch.arange(rows)[None])
                best = head.vocabulary()[logits[0, -1].topk(top_k).indices]
                assert torch.equal(ranked[step][t], best), (t, step)
                hidden = torch.cat([hidden, recycled[:, -1:]], dim=1)
                compared += 1
    assert compared == 7 * steps
    assert head.attend.__name__ == "attend_canonically"


def test_shares_count_top_1_and_top_k() -> None:
    chosen = torch.tensor([9, 1, 2, 3, 4])
    ranked = iter([torch.tensor([[1, 7], [7, 2], [7, 8], [4, 0]]), torch.tensor([[2, 7], [3, 7], [9, 4], [0, 0]])])
    found = agreement._compare((1,), ranked, chosen)
    assert found.top_1 == (0.5, pytest.approx(2 / 3))
    assert found.top_k == (0.75, 1.0)


def test_medusa_heads_are_compared_one_token_further_each(target: Any) -> None:
    text = torch.randint(VOCAB, (1, 20), generator=torch.Generator().manual_seed(2))
    _, read, chosen = seen(target, text)
    heads = MedusaHeads(HIDDEN, VOCAB, 2).eval()
    with torch.no_grad():
        for index in range(2):
            block: Any = heads.blocks[index]
            nn.init.zeros_(block[0].linear.weight)
            nn.init.zeros_(block[0].linear.bias)
            rows = read[0, : 19 - index].double()
            wanted = nn.functional.one_hot(chosen[1 + index :], VOCAB).double()
            heads.lm_heads[index].weight.copy_((torch.linalg.pinv(rows) @ wanted).T)
    report = teacher_forced_agreement(target, heads, text, top_k=4)
    assert report.asked.top_1 == (1.0, 1.0)
    assert report.shifted == ()
    assert report.verdict == "2 heads agree 100%, 100%"
    heads.lm_heads[0], heads.lm_heads[1] = heads.lm_heads[1], heads.lm_heads[0]
    assert max(teacher_forced_agreement(target, heads, text).asked.top_1) < 0.7


def test_numbers_out_of_range(target: Any, text: Tensor) -> None:
    head = knowing_head(target, text, (1, 3, 5))
    with pytest.raises(OptionError, match="top_k is 0"):
        teacher_forced_agreement(target, head, text, top_k=0)
    with pytest.raises(OptionError, match="num_steps is 60"):
        teacher_forced_agreement(target, head, text, num_steps=60)
