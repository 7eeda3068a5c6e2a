"""`autospec train`: a draft head for a causal LM, from the user's own text to a checkpoint that other engines read.

    text -> rows -> the target's share of them -> draft vocabulary -> a head near the target -> the loop
        -> config.json and weights, training.json, training.png
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from autospec.errors import OptionError
from autospec.heads.checkpoint import save_head
from autospec.heads.mtp_write import save_mtp
from autospec.loading import check_causal_lm, load_model, tokenizer_of
from autospec.model_zoo.bundled import resolve
from autospec.training.data import join, make_rows, read_documents, split, token_counts, write_rows
from autospec.training.eagle3 import Eagle3Loss, Eagle3Shape, choose_draft_vocabulary, new_head
from autospec.training.features import Target, default_taps
from autospec.training.loop import History, Loss, Rows, Sampler, Schedule, Trainer
from autospec.training.medusa import MedusaLoss, new_heads
from autospec.training.mtp import MTPLoss, begin_from, new_mtp
from autospec.training.report import write_report


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What `autospec train` is asked for; the command line's options have these names.

    Args:
        data: text files and .jsonl files.
        out: folder that is written.
        length: tokens per row.
        held_out: share of the documents.
        self_generated: share of the training rows that the target writes.
        tap_after: 0-based layers whose output EAGLE-3 reads; None: by the model's depth.
        draft_vocab_size: None: 32000, or the target's vocabulary if that is smaller.
        unrolled_steps, decay: of the training-time test of EAGLE-3 and MTP; decay is also that of Medusa's heads.
        hard: Medusa learns the text's tokens, not the target's distribution.
        num_modules: of MTP; module i guesses draft token i, the first one again beyond the last.
        start_from: a checkpoint whose MTP modules are trained further.
    """

    model: str
    data: Sequence[str]
    out: str
    length: int = 1024
    held_out: float = 0.05
    self_generated: float = 0.0
    epochs: float = 2.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int | None = None
    clip: float = 0.5
    decay: float = 0.8
    precision: str = "auto"
    eval_every: int | None = None
    save_every: int | None = None
    seed: int = 0
    device: str | None = None
    resume: bool = False
    # EAGLE-3
    tap_after: tuple[int, ...] | None = None
    draft_vocab_size: int | None = None
    intermediate_size: int | None = None
    unrolled_steps: int = 7
    # Medusa
    num_heads: int = 4
    num_layers: int = 1
    share_lm_head: bool = False
    hard: bool = False
    # MTP
    num_modules: int = 1
    start_from: str | None = None


def train(kind: str, asked: TrainingOptions) -> dict[str, Any]:
    """Train a head of the kind "eagle3", "medusa" or "mtp", write its folder, and return what training.json says."""
    _check(asked)
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(resolve(asked.model), "model")
    check_causal_lm(model)
    model = model.to(device).requires_grad_(False)
    rows, held_out = _rows(kind, asked, model)
    torch.manual_seed(asked.seed)
    loss = {"eagle3": _eagle3, "medusa": _medusa, "mtp": _mtp}[kind](asked, model, rows)
    trainer = _trainer(asked, loss, rows, held_out)
    if asked.resume:
        trainer.resume()
    history = trainer.fit(kind)
    loss.target.close()
    return _finish(kind, asked, loss, history, len(rows), len(held_out))


def _check(asked: TrainingOptions) -> None:
    least = max(asked.unrolled_steps, asked.num_heads) + 2
    for wrong, name, value, rule in (
        (asked.length <= least, "--length", asked.length, f"must be greater than {least}"),
        (not 0 <= asked.self_generated <= 1, "--self-generated", asked.self_generated, "is a share from 0 to 1"),
        (asked.epochs <= 0, "--epochs", asked.epochs, "must be positive"),
        (asked.unrolled_steps < 1, "--unrolled-steps", asked.unrolled_steps, "must be at least 1"),
        (asked.num_heads < 1, "--num-heads", asked.num_heads, "must be at least 1"),
        (asked.num_modules < 1, "--num-modules", asked.num_modules, "must be at least 1"),
        (asked.num_layers < 1, "--num-layers", asked.num_layers, "must be at least 1"),
        (not 0 < asked.decay <= 1, "--decay", asked.decay, "must be above 0 and at most 1"),
        (asked.batch_size < 1, "--batch-size", asked.batch_size, "must be at least 1"),
        (asked.precision not in ("auto", "bf16", "float32"), "--precision", asked.precision, "is auto, bf16 or float32"),
    ):
        if wrong:
            raise OptionError(f"{name} {rule}, got {value}", at=name, where="autospec train",
                              help="see autospec train eagle3 --help")  # fmt: skip
    if asked.device and asked.device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise OptionError("there is no CUDA device", at="--device", where="autospec train", help="leave --device out")


def _rows(kind: str, asked: TrainingOptions, model: Any) -> tuple[Rows, Rows]:
    """Rows to train on, the target's own among them, and held-out rows."""
    tokenizer = tokenizer_of(asked.model, "autospec train")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and asked.length > limit:
        raise OptionError(f"--length must be at most the {limit} positions of the model, got {asked.length}", at="--length",
                          where="autospec train", help=f"use --length {limit}")  # fmt: skip
    documents, apart = split(read_documents(asked.data, tokenizer), asked.held_out, asked.seed)
    is_chat = any(str(path).endswith(".jsonl") for path in asked.data) and bool(tokenizer.chat_template)
    eos = None if is_chat else tokenizer.eos_token_id
    least = 2 + (asked.num_heads if kind == "medusa" else asked.unrolled_steps)
    rows, held_out = (make_rows(part, asked.length, least, eos) for part in (documents, apart))
    if not len(rows):
        raise OptionError(f"the data has no row of at least {least} tokens to train on", at="--data", where="autospec train",
                          help="give more text, or lower --held-out")  # fmt: skip
    count = round(asked.self_generated * len(rows))
    if count:
        own = write_rows(model, rows, count, asked.seed, asked.batch_size)
        kept = torch.randperm(len(rows), generator=torch.Generator().manual_seed(asked.seed))[: len(rows) - count]
        rows = join(Rows(rows.tokens[kept], rows.weights[kept]), own)
    return rows, held_out


def _eagle3(asked: TrainingOptions, model: Any, rows: Rows) -> Eagle3Loss:
    config = model.config.get_text_config(decoder=True)
    target = Target(model, asked.tap_after or default_taps(config.num_hidden_layers))
    size = asked.draft_vocab_size or min(32000, config.vocab_size)
    if not 0 < size <= config.vocab_size:
        raise OptionError(f"--draft-vocab-size must be between 1 and the target's {config.vocab_size}, got {size}",
                          at="--draft-vocab-size", where="autospec train eagle3", help="leave it out")  # fmt: skip
    d2t = None
    if size < config.vocab_size:
        d2t, _ = choose_draft_vocabulary(token_counts(rows, config.vocab_size), size)
    shape = Eagle3Shape(draft_vocab_size=size, intermediate_size=asked.intermediate_size)
    return Eagle3Loss(target, new_head(target, shape, d2t), steps=asked.unrolled_steps, decay=asked.decay)


def _medusa(asked: TrainingOptions, model: Any, rows: Rows) -> MedusaLoss:
    target = Target(model)
    heads = new_heads(target, asked.num_heads, asked.num_layers, share_lm_head=asked.share_lm_head)
    return MedusaLoss(target, heads, decay=asked.decay, soft=not asked.hard)


def _mtp(asked: TrainingOptions, model: Any, rows: Rows) -> MTPLoss:
    if asked.num_modules > asked.unrolled_steps:
        raise OptionError(f"{asked.num_modules} modules are not reached in {asked.unrolled_steps} draft tokens",
                          at="--num-modules", where="autospec train mtp",
                          help=f"use --unrolled-steps {asked.num_modules} or more")  # fmt: skip
    target = Target(model)
    head = new_mtp(target, asked.num_modules)
    if asked.start_from is not None:
        begin_from(head, resolve(asked.start_from))
    return MTPLoss(target, head, steps=asked.unrolled_steps, decay=asked.decay)


def _trainer(asked: TrainingOptions, loss: Loss, rows: Rows, held_out: Rows) -> Trainer:
    batch_size = min(asked.batch_size, len(rows))
    steps = asked.steps or max(1, round(asked.epochs * len(rows) / batch_size))
    precision = asked.precision
    if precision == "auto":
        precision = "bf16" if loss.target.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    schedule = Schedule(
        steps=steps, learning_rate=asked.learning_rate, warmup=min(100, steps // 10) if asked.warmup is None else asked.warmup,
        clip=asked.clip, accumulate=asked.accumulate, precision=precision,
        eval_every=max(1, steps // 10) if asked.eval_every is None else asked.eval_every,
        save_every=max(1, steps // 10) if asked.save_every is None else asked.save_every,
    )  # fmt: skip
    settings = {key: value for key, value in asdict(asked).items() if key not in ("resume", "out", "device", "save_every")}
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    sampler = Sampler([(rows, batch_size)], asked.seed)
    return Trainer(loss, loss.head, sampler, schedule, held_out=held_out, folder=Path(asked.out), settings=settings)


def _finish(kind: str, asked: TrainingOptions, loss: Loss, history: History, rows: int, held_out: int) -> dict[str, Any]:
    """Save the head in the target's dtype, and the report beside it."""
    out = Path(asked.out)
    head: Any = loss.head
    if kind == "mtp":
        save_mtp(head, out)
    else:
        head = copy.deepcopy(head).to(loss.target.embed_tokens.dtype)
        is_common = kind == "eagle3" and len(head.spec.tap_after) == 3 and len(head.layers) == 1
        save_head(head, out, None if kind == "medusa" else "specforge" if is_common else "speculators")
    measured = history.held_out or history.train
    record = {
        "title": f"{kind} head of {Path(asked.model).name}",
        "kind": kind, "model": asked.model, "options": asdict(asked), "rows": rows, "held_out_rows": held_out,
        "parameters": sum(value.numel() for value in {id(value): value for value in head.own_state().values()}.values()),
        "loss": measured[-1][1], "agreement": measured[-1][2], "acceptance_length": measured[-1][3],
        "measured_on": "held-out rows" if history.held_out else "training rows", "history": asdict(history),
    }  # fmt: skip
    write_report(record, out)
    return record
