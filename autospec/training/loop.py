"""The loop both objectives share: AdamW, warm-up and cosine, clipping, accumulation, and continuing where it stopped.

What a step sees is a function of (seed, step) alone, so a run that is continued from a checkpoint is the run that was
never interrupted, bit for bit on a device that adds in a fixed order.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from autospec.errors import CheckpointError, OptionError
from autospec.training.features import Features, Target

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Rows:
    """Texts of one length.

    Args:
        tokens: [N, S], any integer type.
        weights: [N, S]: how much the distribution after each token counts; 0 on padding.
    """

    tokens: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """tokens [B, S] int64, weights [B, S] float32, on the device."""

    tokens: Tensor
    weights: Tensor


class Loss(nn.Module):
    """An objective for `head`. `forward` gets what `features` computed without gradients."""

    target: Target
    head: nn.Module
    steps: int
    weights: list[float]

    def features(self, batch: Batch) -> Features:
        """What the target says about the batch."""
        raise AssertionError("every objective has features of its own")

    def count(self, batch: Batch) -> Tensor:
        """The weight of the positions that the loss sums over."""
        raise AssertionError("every objective counts its positions")

    def summed(self, steps: Iterable[tuple[Tensor, Tensor]], best: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` returns: the loss, each step by its weight; [3, steps] of losses, agreements and right prefixes.

        Args:
            steps: losses and chosen tokens [B, R] of step i, at positions 1 + i ... i + R.
            best: the target's own choices [B, S].
            weights: how much a position counts [B, S]; a prefix counts as its first position does.
        """
        losses, agreements, prefixes = [], [], []
        counted = weights
        for i, (loss, choice) in enumerate(steps):
            here = slice(1 + i, 1 + i + loss.shape[1])
            agrees = (choice == best[:, here]).float()
            losses.append((loss * weights[:, here]).sum())
            agreements.append((agrees * weights[:, here]).sum())
            counted = (counted if i else weights[:, here]) * agrees
            prefixes.append(counted.sum())
        total = torch.stack([weight * loss for weight, loss in zip(self.weights, losses, strict=True)]).sum()
        return total, torch.stack([torch.stack(losses).detach(), torch.stack(agreements), torch.stack(prefixes)])


def weights_of_steps(steps: int, decay: float) -> list[float]:
    """Step i weighs decay ** i; all of them together 1."""
    return [decay**i / sum(decay**j for j in range(steps)) for i in range(steps)]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One training run.

    Args:
        steps: optimizer steps.
        learning_rate: the peak, after a linear warm-up and before a cosine to zero.
        warmup: steps of it.
        clip: largest norm of the gradient.
        accumulate: pieces that a batch is run in.
        eval_every, save_every: steps between evaluations and between checkpoints; 0: at the end only, never.
        precision: bf16 or float32 arithmetic; weights and optimizer state are float32 in both.
        graphs: record a step as CUDA graphs, for heads so small that launching their kernels takes longer than they do.
    """

    steps: int
    learning_rate: float = 1e-4
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 0.5
    accumulate: int = 1
    eval_every: int = 0
    save_every: int = 0
    precision: str = "float32"
    graphs: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate"):
            _refuse(getattr(self, name) < 1, name, getattr(self, name), "must be at least 1")
        for name in ("learning_rate", "clip"):
            _refuse(not getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("warmup", "eval_every", "save_every", "weight_decay"):
            _refuse(getattr(self, name) < 0, name, getattr(self, name), "must not be negative")
        _refuse(self.precision not in ("bf16", "float32"), "precision", self.precision, "is bf16 or float32")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, as a share of the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - self.warmup) / max(1, steps - self.warmup))


def _refuse(wrong: bool, name: str, value: object, rule: str) -> None:
    if wrong:
        raise OptionError(f"{name} {rule}, got {value}", at=f"{name}={value}", where="autospec train",
                          help="see autospec train eagle3 --help")  # fmt: skip


@dataclass(kw_only=True)
class History:
    """What a run measured. A point is (step, loss, agreement per unrolled step, mean acceptance length of a chain)."""

    train: list[tuple[int, float, list[float], float]] = field(default_factory=list)
    held_out: list[tuple[int, float, list[float], float]] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0


class Sampler:
    """Batches of several sources: batch `step` is a function of the seed and the step.

    Args:
        sources: rows, and how many of them a batch takes; every source goes round in orders of its own.
    """

    def __init__(self, sources: Sequence[tuple[Rows, int]], seed: int) -> None:
        self.sources, self.seed = list(sources), seed
        self._orders: dict[tuple[int, int], Tensor] = {}
        for rows, size in self.sources:
            _refuse(not 0 < size <= len(rows), "batch_size", size, f"must be between 1 and the {len(rows)} rows there are")

    def _order(self, source: int, epoch: int) -> Tensor:
        key = (source, epoch)
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != source}
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + source) * 1_000_003 + epoch)
            self._orders[key] = torch.randperm(len(self.sources[source][0]), generator=generator)
        return self._orders[key]

    def __call__(self, step: int, device: torch.device, pieces: int = 1) -> list[Batch]:
        """The batches of a step, each source's cut into `pieces`."""
        batches = []
        for source, (rows, size) in enumerate(self.sources):
            per_epoch = len(rows) // size
            epoch, place = divmod(step, per_epoch)
            chosen = self._order(source, epoch)[place * size : (place + 1) * size]
            batches += [take(rows, part, device) for part in chosen.chunk(pieces)]
        return batches


def take(rows: Rows, index: Tensor, device: torch.device) -> Batch:
    """Some rows as a batch, without the padding that none of them needs."""
    index = index.to(rows.tokens.device)
    weights = rows.weights[index].float()
    return Batch(rows.tokens[index].to(device).long(), weights.to(device))


class Recorded:
    """The gradient of one batch's loss as a CUDA graph; batches must have one shape.

    Args:
        run: the loss of a batch, as (value, measured).
        parameters: what to derive by.
    """

    def __init__(self, run: Callable[[Batch], tuple[Tensor, Tensor]], parameters: Sequence[Tensor], batch: Batch) -> None:
        self.run, self.parameters = run, parameters
        self.batch = Batch(batch.tokens.clone(), batch.weights.clone())
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self._once()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.measured, self.gradients = self._once()

    def _once(self) -> tuple[Tensor, list[Tensor]]:
        value, measured = self.run(self.batch)
        return measured, list(torch.autograd.grad(value, self.parameters))

    def __call__(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """-> measured and the gradients; the next call overwrites them."""
        self.batch.tokens.copy_(batch.tokens)
        self.batch.weights.copy_(batch.weights)
        self.graph.replay()
        return self.measured, self.gradients


def acceptance(cumulative: Tensor) -> float:
    """Mean acceptance length of a chain from the share of its prefixes that are right, bonus included."""
    return 1.0 + float(cumulative.sum())


class Trainer:
    """Fits `loss.head` on batches of `sampler`.

    Args:
        held_out: rows to evaluate on.
        folder: where checkpoints go; None: nowhere.
        score: judges the head; the best one is kept. None: the acceptance of a chain on `held_out` judges.
        minutes: with it the number of steps is chosen so that the run takes about that long.
        settings: what must be equal for a checkpoint to be continued.
    """

    def __init__(
        self,
        loss: Loss,
        module: nn.Module,
        sampler: Sampler,
        schedule: Schedule,
        *,
        held_out: Rows | None = None,
        folder: Path | None = None,
        score: Callable[[], float] | None = None,
        minutes: float | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.loss, self.module, self.sampler, self.schedule = loss, module, sampler, schedule
        self.held_out, self.folder, self.score, self.minutes = held_out, folder, score, minutes
        self.settings = {**asdict(schedule), **(settings or {}), "seed": sampler.seed}
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        matrices = [p for p in self.parameters.values() if p.dim() >= 2]
        vectors = [p for p in self.parameters.values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=schedule.learning_rate, betas=(0.9, 0.95), fused=self.device.type == "cuda"
        )
        self.history = History()
        self.recent = torch.zeros((), device=self.device)  # what was measured since the last point of the curve
        self.recorded: dict[tuple[int, ...], Recorded] = {}
        self.step, self.steps = 0, max(41, schedule.steps) if minutes else schedule.steps
        self.best: dict[str, Tensor] = {}

    def autocast(self) -> Any:
        """bf16 where asked for."""
        if self.schedule.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=not self.schedule.graphs)

    def fit(self, title: str = "train") -> History:
        """All steps that are left."""
        start = time.perf_counter() - self.history.seconds
        mark = 0.0
        bar = tqdm(initial=self.step, total=self.steps, desc=title, mininterval=1.0)
        while self.step < self.steps:
            self.recent = self.recent + self.optimize()
            self.step += 1
            bar.update()
            if self.minutes and self.step in (10, 40):
                mark = self._pace(mark, start, bar)
            if self.step % max(1, self.schedule.eval_every // 5) == 0 or self.step == self.steps:
                self.history.train.append(self._point(self.recent))
                self.recent = torch.zeros((), device=self.device)
                bar.set_postfix_str(_line(self.history.train[-1]))
            if self._due(self.schedule.eval_every) or self.step == self.steps:
                self.evaluate()
            self.history.seconds = round(time.perf_counter() - start, 1)
            if self.folder and self.schedule.save_every and self._due(self.schedule.save_every):
                self.save()
        bar.close()
        if self.best:
            self._load(self.best)
        return self.history

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _pace(self, mark: float, start: float, bar: Any) -> float:
        """Steps 10 to 40 say how long a step takes; the first ones compile."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.step == 40:
            assert self.minutes is not None, "only runs with a time limit are paced"
            self.steps = max(41, 40 + int((self.minutes * 60 - (now - start)) / ((now - mark) / 30)))
            bar.total = self.steps
        return now

    def optimize(self) -> Tensor:
        """One optimizer step -> [4, steps]: weight, summed losses, agreements and prefixes."""
        batches = self.sampler(self.step, self.device, self.schedule.accumulate)
        total = torch.stack([self.loss.count(batch) for batch in batches]).sum().clamp_min(1.0)
        measured = torch.zeros((), device=self.device)
        for batch in batches:
            measured = measured + self._backward(batch, total)
            self.history.tokens += batch.tokens.numel()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.schedule.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate * self.schedule.rate(self.step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.cat([total.expand(1, measured.shape[1]), measured])

    def _backward(self, batch: Batch, total: Tensor) -> Tensor:
        """Add the batch's share to the gradients -> [3, steps] of what it measured."""
        if not self.schedule.graphs:
            value, measured = self._run(batch)
            (value / total).backward()
            return measured
        shape, parameters = tuple(batch.tokens.shape), list(self.parameters.values())
        if shape not in self.recorded:
            self.recorded[shape] = Recorded(self._run, parameters, batch)
        measured, gradients = self.recorded[shape](batch)
        for parameter, part in zip(parameters, torch._foreach_div(gradients, total), strict=True):
            parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)
        return measured.clone()

    def _run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        features = self.loss.features(batch)
        with self.autocast():
            value: tuple[Tensor, Tensor] = self.loss(batch.tokens, batch.weights, features)
        return value

    def _point(self, sums: Tensor) -> tuple[int, float, list[float], float]:
        total, losses, agreements, prefixes = sums.cpu()
        loss = float((losses / total * torch.tensor(self.loss.weights)).sum())
        agreed = [round(x, 4) for x in (agreements / total).tolist()]
        return self.step, round(loss, 4), agreed, round(acceptance(prefixes / total), 3)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Measure on the held-out rows, and remember the head if it is the best so far."""
        value = None
        if self.held_out is not None and len(self.held_out):
            self.history.held_out.append(self._point(self.measure(self.held_out)))
            value = self.history.held_out[-1][3]
        if self.score is not None:
            value = self.score()
        if value is None:
            return
        self.history.scores.append((self.step, round(value, 3)))
        if value >= max(score for _, score in self.history.scores):
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
            self.history.best_step = self.step

    @torch.no_grad()
    def measure(self, rows: Rows) -> Tensor:
        """[4, steps]: weight, summed losses, agreements and prefixes of all rows."""
        size = max(batch for _, batch in self.sampler.sources)
        sums = torch.zeros((), device=self.device)
        for index in torch.arange(len(rows)).split(size):
            batch = take(rows, index, self.device)
            _, measured = self._run(batch)
            sums = sums + torch.cat([self.loss.count(batch).expand(1, measured.shape[1]), measured])
        return sums

    def _load(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])

    def save(self) -> None:
        """Write the checkpoint; an interrupted write leaves the one before."""
        assert self.folder is not None, "a run that saves has a folder"
        state = {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(), "step": self.step, "steps": self.steps, "best": self.best,
            "history": asdict(self.history), "recent": self.recent, "settings": self.settings,
        }  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.folder / f"{CHECKPOINT}.new")
        os.replace(self.folder / f"{CHECKPOINT}.new", self.folder / CHECKPOINT)

    def resume(self) -> None:
        """Continue from the folder's checkpoint."""
        path = (self.folder or Path()) / CHECKPOINT
        if not path.is_file():
            raise CheckpointError("there is nothing to resume", at=str(path), where="autospec train",
                                  help="leave --resume out to begin anew")  # fmt: skip
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            theirs = state["settings"]
        except Exception as error:
            raise CheckpointError(f"the checkpoint cannot be read: {type(error).__name__}", at=str(path),
                                  where="autospec train", help="remove it and begin anew") from error  # fmt: skip
        changed = sorted(key for key in self.settings.keys() | theirs.keys() if self.settings.get(key) != theirs.get(key))
        if changed:
            key = changed[0]
            raise CheckpointError(f"the checkpoint was made with another {key}: {theirs.get(key)}, not {self.settings.get(key)}",
                                  at=str(path), where="autospec train",
                                  help="resume with the options of the first run, or begin anew")  # fmt: skip
        self._load(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.steps, self.best = state["step"], state["steps"], state["best"]
        self.history, self.recent = History(**state["history"]), state["recent"]


def _line(point: tuple[int, float, list[float], float]) -> str:
    _, loss, agreed, length = point
    return f"loss {loss:.3f}, agreement {' '.join(f'{100 * a:.0f}' for a in agreed)} %, chain {length:.2f}"
