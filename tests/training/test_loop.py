"""The loop: a continued run is the uninterrupted one, pieces of a batch are the batch, and the best head is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.training import VOCAB, random_head, tiny_model

from autospec.errors import CheckpointError, OptionError
from autospec.training.eagle3 import Eagle3Loss
from autospec.training.features import Target
from autospec.training.loop import CHECKPOINT, Loss, Rows, Sampler, Schedule, Trainer
from autospec.training.medusa import MedusaLoss, new_heads
from autospec.training.mtp import MTPLoss, new_mtp

STEPS = 12


def some_rows(count: int = 11, length: int = 20, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (count, length), generator=generator)
    weights = torch.rand(count, length, generator=generator)
    return Rows(tokens, weights)


def new_trainer(folder: Path | None = None, kind: str = "eagle3", accumulate: int = 1, **options: Any) -> Trainer:
    target = Target(tiny_model(), (0, 1, 3) if kind == "eagle3" else ())
    loss: Loss
    if kind == "eagle3":
        loss = Eagle3Loss(target, random_head(target, draft_vocab_size=40), steps=3)
    elif kind == "mtp":
        torch.manual_seed(0)
        loss = MTPLoss(target, new_mtp(target, 2), steps=3)
    else:
        loss = MedusaLoss(target, new_heads(target, 2))
    schedule = Schedule(steps=STEPS, learning_rate=1e-3, warmup=3, eval_every=4, save_every=4, accumulate=accumulate)
    sampler = Sampler([(some_rows(), 4)], seed=5)
    return Trainer(loss, loss.head, sampler, schedule, held_out=some_rows(4, seed=9), folder=folder, **options)


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    moments = {f"{i}.{key}": value for i, entry in trainer.optimizer.state_dict()["state"].items() for key, value in entry.items()}
    return {name: p.detach().clone() for name, p in trainer.parameters.items()} | moments


@pytest.mark.parametrize("kind", ["eagle3", "medusa", "mtp"])
def test_a_continued_run_is_the_uninterrupted_one(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = new_trainer(kind=kind)
    whole.fit()
    broken = new_trainer(tmp_path, kind)
    optimize = broken.optimize

    def stop_at_ten() -> torch.Tensor:
        if broken.step == 10:
            raise KeyboardInterrupt
        return optimize()

    monkeypatch.setattr(broken, "optimize", stop_at_ten)
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    again = new_trainer(tmp_path, kind)
    again.resume()
    assert again.step == 8
    again.fit()
    assert state(whole).keys() == state(again).keys()
    assert all(torch.equal(value, state(again)[name]) for name, value in state(whole).items())
    assert (whole.history.train, whole.history.held_out) == (again.history.train, again.history.held_out)


def test_the_law_sees_an_order_that_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = new_trainer(tmp_path)
    whole.fit()
    again = new_trainer(tmp_path)
    again.resume()
    sample = again.sampler.__call__
    again.step = 8
    monkeypatch.setattr(again, "sampler", lambda step, *rest: sample(step - 8, *rest))
    again.sampler.sources = new_trainer().sampler.sources  # type: ignore[attr-defined]
    again.fit()
    assert not all(torch.equal(value, state(again)[name]) for name, value in state(whole).items())


def test_pieces_of_a_batch_are_the_batch() -> None:
    whole, pieces = new_trainer(), new_trainer(accumulate=4)
    whole.optimize()
    pieces.optimize()
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(parameter, pieces.parameters[name], rtol=1e-3, atol=2e-5)


@pytest.mark.cuda
def test_a_recorded_step_is_the_step() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    found = []
    for graphs in (False, True):
        target = Target(tiny_model().cuda(), (0, 1, 3))
        loss = Eagle3Loss(target, random_head(target, draft_vocab_size=40), steps=3)
        schedule = Schedule(steps=6, learning_rate=1e-3, graphs=graphs)
        sampler = Sampler([(some_rows(), 4), (some_rows(length=12), 3)], seed=5)
        trainer = Trainer(loss, loss.head, sampler, schedule)
        trainer.fit()
        found.append(state(trainer))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=1e-4)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    rows = some_rows()
    device = torch.device("cpu")
    first, second = Sampler([(rows, 4), (rows, 2)], 1), Sampler([(rows, 4), (rows, 2)], 1)
    for step in (7, 0, 3):
        assert [b.tokens.tolist() for b in first(step, device)] == [b.tokens.tolist() for b in second(step, device)]
    seen = [tuple(row) for step in range(2) for row in first(step, device)[0].tokens.tolist()]
    assert len(set(seen)) == 8  # an epoch repeats nothing
    assert first(0, device)[0].tokens.tolist() != first(2, device)[0].tokens.tolist()  # nor is the next one the same


def test_the_best_head_is_kept() -> None:
    scores = iter([1.0, 3.0, 2.0])
    seen = []
    trainer = new_trainer(score=lambda: seen.append(state(trainer)) or next(scores))  # type: ignore[func-returns-value]
    trainer.fit()
    assert trainer.history.best_step == 8
    assert all(torch.equal(p, seen[1][name]) for name, p in trainer.parameters.items())


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    schedule = Schedule(steps=100, warmup=10)
    rates = [schedule.rate(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    new_trainer(tmp_path).fit()
    with pytest.raises(CheckpointError, match="another accumulate: 1, not 2"):
        new_trainer(tmp_path, accumulate=2).resume()
    (tmp_path / CHECKPOINT).write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="cannot be read"):
        new_trainer(tmp_path).resume()
    with pytest.raises(CheckpointError, match="nothing to resume"):
        new_trainer(tmp_path / "elsewhere").resume()


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"learning_rate": 0.0}, {"clip": -1.0}, {"warmup": -1}, {"precision": "fp8"}, {"accumulate": 0}]
)
def test_a_schedule_is_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Schedule(**{"steps": 10, **wrong})
