"""What the heads learn: the loss of every step falls, and the draft vocabulary and the start are as they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness.training import VOCAB, random_head, tiny_model
from torch.nn import functional

from autospec.errors import OptionError
from autospec.heads.checkpoint import load_head, save_head
from autospec.tiny_models import tiny_model as tiny_model_of
from autospec.training.eagle3 import Eagle3Loss, Eagle3Shape, choose_draft_vocabulary, new_head
from autospec.training.features import Target, default_taps
from autospec.training.loop import Batch, Loss, Rows, Sampler, Schedule, Trainer
from autospec.training.medusa import MedusaLoss, new_heads


def corpus(target: Target) -> Rows:
    """Text the target likes: its own."""
    torch.manual_seed(1)
    tokens = torch.randint(3, VOCAB, (12, 8))
    with torch.no_grad():
        for _ in range(20):
            tokens = torch.cat([tokens, target.model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return Rows(tokens, torch.ones_like(tokens))


@pytest.mark.parametrize("kind", ["eagle3", "medusa soft", "medusa hard", "medusa shared"])
def test_the_loss_of_every_step_falls(kind: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(6)  # it is sure of what it says
    target = Target(model, (0, 1, 3) if kind == "eagle3" else ())
    loss: Loss
    if kind == "eagle3":
        counts = torch.arange(VOCAB)
        head = new_head(target, Eagle3Shape(draft_vocab_size=48), choose_draft_vocabulary(counts, 48)[0])
        loss = Eagle3Loss(target, head, steps=4)
    else:
        loss = MedusaLoss(target, new_heads(target, 3, share_lm_head="shared" in kind), soft="hard" not in kind)
    rows = corpus(target)
    schedule = Schedule(steps=60, learning_rate=1e-2, warmup=3)
    trainer = Trainer(loss, loss.head, Sampler([(rows, 12)], 0), schedule)
    before, history = trainer.measure(rows), trainer.fit()
    after = trainer.measure(rows)
    assert (after[1] < 0.8 * before[1]).all(), (before, after)  # summed losses, one per step
    assert (after[2] > before[2]).all()  # agreements
    assert history.train[-1][3] > 1.5  # a chain of drafts is accepted now and then


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text", "qwen2_moe", "deepseek_v3", "mamba"])
def test_any_causal_lm_can_be_a_target(model_type: str, tmp_path: Path) -> None:
    model = tiny_model_of(model_type).eval()
    target = Target(model, default_taps(model.config.num_hidden_layers))
    size = model.config.vocab_size
    rows = Rows(torch.randint(3, size, (4, 20), generator=torch.Generator().manual_seed(0)), torch.ones(4, 20))
    head = new_head(target, Eagle3Shape(draft_vocab_size=48), choose_draft_vocabulary(torch.arange(size), 48)[0])
    loss = Eagle3Loss(target, head, steps=3)
    history = Trainer(loss, head, Sampler([(rows, 4)], 0), Schedule(steps=6, learning_rate=3e-3)).fit()
    assert history.train[-1][1] < history.train[0][1]
    save_head(head, tmp_path)
    loaded = load_head(
        tmp_path, target_hidden_size=model.config.hidden_size, target_vocab_size=size, target_layers=model.config.num_hidden_layers,
        embed_tokens=target.embed_tokens, lm_head=target.lm_head.weight, dtype=torch.float32, device="cpu",
    )  # fmt: skip
    taps = target(rows.tokens).taps
    again = Eagle3Loss(target, loaded, steps=3).unrolled(rows.tokens, taps)  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(loss.unrolled(rows.tokens, taps), again, strict=True))


def test_goals_are_the_target_where_drafting_will_ask_it(target: Target) -> None:
    """A head that says what the target says at the right place has no loss beyond the entropy."""
    tokens = torch.randint(VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    features = target(tokens)
    loss = Eagle3Loss(target, random_head(target), steps=3)
    rows = 12 - 3
    true = [features.logits[:, 1 + i : 1 + i + rows] for i in range(3)]
    loss.unrolled = lambda *_: true  # type: ignore[method-assign]
    _, measured = loss(tokens, torch.ones(1, 12), features)
    entropies = [-(x.softmax(-1) * x.log_softmax(-1)).sum() for x in true]
    torch.testing.assert_close(measured[0], torch.stack(entropies))
    assert measured[1].tolist() == measured[2].tolist() == [rows] * 3


def test_medusa_head_i_learns_the_token_after_next_and_i(target: Target) -> None:
    tokens = torch.randint(VOCAB, (1, 10), generator=torch.Generator().manual_seed(0))
    heads = new_heads(target, 2)
    features = target(tokens)
    _, soft = MedusaLoss(target, heads)(tokens, torch.ones(1, 10), features)
    _, hard = MedusaLoss(target, heads, soft=False)(tokens, torch.ones(1, 10), features)
    for i in range(2):  # new heads say what lm_head says
        said = features.logits[:, :7].log_softmax(-1)
        goal = features.logits[:, 1 + i : 8 + i].softmax(-1)
        torch.testing.assert_close(soft[0, i], -(goal * said).sum())
        torch.testing.assert_close(hard[0, i], functional.nll_loss(said[0], tokens[0, 2 + i : 9 + i], reduction="sum"))


def test_weights_choose_what_counts(target: Target) -> None:
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    loss = Eagle3Loss(target, random_head(target), steps=3)
    weights = torch.zeros(2, 12)
    weights[0, 4] = 1.0  # what follows token 4: row 3 of step 0, row 2 of step 1, row 1 of step 2
    value, measured = loss(tokens, weights, target(tokens))
    whole = [x.detach() for x in loss.unrolled(tokens, target(tokens).taps)]
    goal = target(tokens).logits[0, 4].softmax(-1)
    expected = [-(goal * whole[i][0, 3 - i].log_softmax(-1)).sum() for i in range(3)]
    torch.testing.assert_close(measured[0], torch.stack(expected))
    assert float(loss.count(Batch(tokens, weights))) == 1.0
    assert float(value.detach()) == pytest.approx(sum(w * float(x) for w, x in zip(loss.weights, expected, strict=True)), rel=1e-4)


def test_the_draft_vocabulary_is_the_commonest_tokens_in_id_order() -> None:
    counts = torch.tensor([5, 0, 9, 9, 1, 7])
    d2t, t2d = choose_draft_vocabulary(counts, 3)
    assert (torch.arange(3) + d2t).tolist() == [2, 3, 5]
    assert t2d.tolist() == [False, False, True, True, False, True]
    d2t, _ = choose_draft_vocabulary(torch.tensor([1, 1, 1, 1]), 2)
    assert (torch.arange(2) + d2t).tolist() == [0, 1]  # ties go to the lower id


def test_a_new_head_is_near_the_target(target: Target) -> None:
    d2t, _ = choose_draft_vocabulary(torch.arange(VOCAB), 40)
    head = new_head(target, Eagle3Shape(draft_vocab_size=40), d2t)
    ids = torch.arange(40) + d2t
    assert torch.equal(head.lm_head.weight, target.lm_head.weight[ids])
    assert torch.equal(head.norm.weight, target.model.model.norm.weight)
    assert not head.layers[0].self_attn.o_proj.weight.any()  # type: ignore[union-attr]
    assert head.embed_tokens.weight.data_ptr() == target.embed_tokens.data_ptr()
    assert "embed_tokens.weight" not in head.own_state()


def test_taps_are_outputs_of_layers(target: Target) -> None:
    tokens = torch.randint(VOCAB, (1, 6))
    features = target(tokens)
    states = target.model(tokens, output_hidden_states=True).hidden_states
    low, middle, last = features.taps.chunk(3, dim=-1)
    torch.testing.assert_close(low, states[1])
    torch.testing.assert_close(middle, states[2])
    assert not torch.allclose(last, states[4])  # which has passed the final norm
    torch.testing.assert_close(target.model.model.norm(last), states[4])
    torch.testing.assert_close(features.hidden, states[4])


def test_default_taps() -> None:
    assert default_taps(32) == (1, 15, 28)
    assert default_taps(8) == (1, 3, 4)
    assert default_taps(6) == (0, 2, 5)
    assert default_taps(2) == (0, 1)


@pytest.mark.parametrize("taps", [(0, 4), (2, 1), (1, 1), (-1, 2)])
def test_taps_are_checked(taps: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="distinct layers from 0 to 3"):
        Target(tiny_model(), taps)


def test_a_closed_target_is_the_model_as_it_was() -> None:
    model = tiny_model()
    target = Target(model, (0, 1, 3))
    target.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
