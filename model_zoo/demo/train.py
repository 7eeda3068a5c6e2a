"""Train the demo model: a 7M-parameter Llama that writes Python, and a 0.9M draft model for it.

    python -m model_zoo.demo.train                (a GPU, about 15 minutes; writes beside this file)
    python -m model_zoo.demo.train --smoke        (a CPU, about a minute; writes to a temporary folder)

    collect source -> train the tokenizer -> target on next tokens -> target writes text -> draft imitates the target
        -> evaluate the saved folders -> prompts.json, training.json, loss.png, README.md

The draft is judged by how often its greedy token is the target's, so it learns the target's distribution rather than
the text, and partly on text the target wrote itself, which is where it will be used.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm, trange
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from .card import render_card
from .corpus import collect
from .evaluate import evaluate, generate, text_loss_and_agreement, windows
from .prompts import cut_prompts
from .recipe import SMOKE, Recipe, Schedule, Shape
from .tokenizer import encode, save_tokenizer, train_tokenizer


@dataclass(kw_only=True)
class History:
    """What one training run measured: its curves, and what it cost."""

    parameters: int
    tokens: int = 0
    seconds: float = 0.0  # the first step, which compiles, and the evaluations included
    train: list[tuple[int, float]] = field(default_factory=list)  # (tokens seen, cross-entropy on training text)
    held_out: list[tuple[int, float, float | None]] = field(default_factory=list)  # (tokens seen, loss, agreement)


def causal_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of full rows without a cache. Under a name of its own it gets no mask tensor, so it stays flash."""
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("demo_causal", causal_attention)


def new_model(recipe: Recipe, shape: Shape, device: str) -> LlamaForCausalLM:
    """A freshly initialised Llama of the given shape."""
    config = LlamaConfig(
        **asdict(shape),
        vocab_size=recipe.vocab_size,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("demo_causal")
    return model.to(device)  # type: ignore[arg-type]


def load(folder: Path, device: str, dtype: torch.dtype, attention: str = "sdpa") -> LlamaForCausalLM:
    """The model as a user gets it from the folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval()  # type: ignore[arg-type]


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write an ordinary bf16 model folder that decodes greedily."""
    model.config.use_cache = True
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, bos_token_id=0, eos_token_id=0, pad_token_id=1
    )
    model.bfloat16().save_pretrained(folder)


def autocast(device: str) -> Any:
    """bf16 arithmetic on a GPU, float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def random_windows(stream: Tensor, count: int, length: int) -> Tensor:
    """[count, length] int64: slices of the token stream at random places."""
    starts = torch.randint(len(stream) - length, (count, 1), device=stream.device)
    return stream[starts + torch.arange(length, device=stream.device)].long()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, S] cross-entropy of each token."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def fit(
    title: str,
    model: LlamaForCausalLM,
    schedule: Schedule,
    batches: Iterator[Tensor],
    loss: Callable[[Tensor], tuple[Tensor, Tensor]],
    held_out: Callable[[], tuple[float, float | None]],
) -> History:
    """Minimise the first of `loss`'s two values; the second, the text's cross-entropy, is the curve."""
    device = next(model.parameters()).device.type
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=schedule.learning_rate,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )

    def rate(step: int) -> float:
        if step < schedule.warmup:
            return (step + 1) / schedule.warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - schedule.warmup) / (schedule.steps - schedule.warmup))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    compiled = torch.compile(loss) if device == "cuda" else loss
    history = History(parameters=sum(p.numel() for p in model.parameters()))
    recent: list[Tensor] = []
    start = time.perf_counter()
    for step in (bar := trange(1, schedule.steps + 1, desc=title, mininterval=10)):
        batch = next(batches)
        with autocast(device):
            total, text = compiled(batch)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(text.detach())
        history.tokens += batch[:, 1:].numel()
        if step % max(1, schedule.eval_every // 5) == 0:
            history.train.append((history.tokens, round(torch.stack(recent).mean().item(), 4)))
            recent.clear()
        if step % schedule.eval_every == 0 or step == schedule.steps:
            model.eval()
            value, agreement = held_out()
            model.train()
            history.held_out.append((history.tokens, round(value, 4), agreement and round(agreement, 4)))
            bar.set_postfix(train=history.train[-1][1], held_out=value, agreement=agreement)
    history.seconds = round(time.perf_counter() - start, 1)
    return history


def train_target(recipe: Recipe, device: str, stream: Tensor, held_out: Tensor, folder: Path) -> History:
    """Next-token training on random windows of the corpus."""
    model = new_model(recipe, recipe.target, device)
    length = recipe.context + 1

    def batches() -> Iterator[Tensor]:
        while True:
            yield random_windows(stream, recipe.target_schedule.batch_size, length)

    def loss(batch: Tensor) -> tuple[Tensor, Tensor]:
        value = token_losses(model(batch[:, :-1]).logits, batch[:, 1:]).mean()
        return value, value

    def measure() -> tuple[float, None]:
        with autocast(device):
            return text_loss_and_agreement(model, held_out)[0], None

    history = fit("target", model, recipe.target_schedule, batches(), loss, measure)
    save(model, folder)
    return history


@torch.no_grad()
def write_text(recipe: Recipe, target: LlamaForCausalLM, stream: Tensor) -> Tensor:
    """A token stream: pieces of training text, each continued by the target, every other batch greedily."""
    rows = []
    for i in tqdm(range(0, recipe.written_rows, recipe.written_batch), desc="target writes"):
        prompt = random_windows(stream, recipe.written_batch, recipe.written_prompt)
        sampled = i // recipe.written_batch % 2 == 1
        options = {"do_sample": True, "top_k": 0} if sampled else {}
        rows.append(generate(target, prompt, recipe.written_tokens, min_new_tokens=recipe.written_tokens, **options))
    return torch.cat(rows).flatten().int()


def train_draft(
    recipe: Recipe, device: str, stream: Tensor, held_out: Tensor, target_folder: Path, folder: Path
) -> History:
    """Distillation: KL to the target's distribution, and a little cross-entropy on the text."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    written = write_text(recipe, load(target_folder, device, dtype), stream)
    teacher = load(target_folder, device, dtype, attention="demo_causal").requires_grad_(False)
    model = new_model(recipe, recipe.draft, device)
    length, batch_size = recipe.context + 1, recipe.draft_schedule.batch_size
    from_text = batch_size - round(recipe.written_share * batch_size)

    def batches() -> Iterator[Tensor]:
        while True:
            own_text = random_windows(written, batch_size - from_text, length)
            yield torch.cat([random_windows(stream, from_text, length), own_text])

    def loss(batch: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            goal = teacher(batch[:, :-1], use_cache=False).logits.float().log_softmax(-1)
        logits = model(batch[:, :-1]).logits.float()
        divergence = (goal.exp() * (goal - logits.log_softmax(-1))).sum(-1).mean()
        text = token_losses(logits[:from_text], batch[:from_text, 1:]).mean()
        return recipe.text_weight * text + (1 - recipe.text_weight) * divergence, text

    def measure() -> tuple[float, float | None]:
        with autocast(device):
            return text_loss_and_agreement(model, held_out, teacher)

    history = fit("draft", model, recipe.draft_schedule, batches(), loss, measure)
    save(model, folder)
    return history


def train(recipe: Recipe, out: Path, device: str) -> None:
    """All phases; afterwards `out` holds the two model folders, the curves, the prompts and the card."""
    start = time.perf_counter()
    torch.manual_seed(recipe.seed)
    print(f"seed {recipe.seed}, device {device}, writing to {out}")
    record: dict[str, Any] = {"recipe": asdict(recipe), "environment": environment(device)}

    def note(**facts: Any) -> None:
        record.update(facts, seconds=round(time.perf_counter() - start, 1))
        (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")

    corpus = collect(recipe.max_files)
    print(f"{len(corpus.train)} files to train on, {len(corpus.held_out)} held out")
    tokenizer = train_tokenizer((source.text for source in corpus.train[::4]), recipe.vocab_size)
    save_tokenizer(tokenizer, out / "target", recipe.context)
    stream = encode(tokenizer, [source.text for source in corpus.train], "training text").to(device)
    held_out_stream = encode(tokenizer, [source.text for source in corpus.held_out], "held-out text").to(device)
    held_out = windows(held_out_stream, recipe.context + 1)
    data = corpus.describe()
    data["train"]["tokens"], data["held_out"]["tokens"] = len(stream), len(held_out_stream)
    note(data=data)
    print(f"{len(stream):,} training tokens after {record['seconds']:.0f} s")

    note(target=asdict(train_target(recipe, device, stream, held_out, out / "target")))
    note(draft=asdict(train_draft(recipe, device, stream, held_out, out / "target", out / "draft")))

    target, draft = (load(out / name, device, torch.float32) for name in ("target", "draft"))
    results = evaluate(target, draft, held_out_stream, recipe.eval_prompts, recipe.context)
    prompts, results["completions"] = cut_prompts(corpus.held_out, tokenizer, target, recipe.context // 12)
    (out / "prompts.json").write_text(json.dumps(prompts, indent=2, ensure_ascii=False) + "\n")
    bytes_per_token = data["held_out"]["bytes"] / len(held_out_stream)
    results["held_out_bits_per_byte"] = round(results["target_loss"] / math.log(2) / bytes_per_token, 4)
    note(evaluation=results)
    render_card(out)
    print(json.dumps(results, indent=2))
    print(f"done in {record['seconds']:.0f} s")


def environment(device: str) -> dict[str, str]:
    """The versions and the device that the numbers belong to."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the demo target and its draft model.")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, about a minute on a CPU")
    parser.add_argument("--out", type=Path, help="folder to write (default: this one; with --smoke a temporary one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target-steps", type=int, help="instead of the recipe's")
    parser.add_argument("--draft-steps", type=int, help="instead of the recipe's")
    options = parser.parse_args(argv)

    recipe = replace(SMOKE if options.smoke else Recipe(), seed=options.seed)
    if options.target_steps:
        recipe = replace(recipe, target_schedule=replace(recipe.target_schedule, steps=options.target_steps))
    if options.draft_steps:
        recipe = replace(recipe, draft_schedule=replace(recipe.draft_schedule, steps=options.draft_steps))
    device = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    if device == "cpu" and not options.smoke:
        parser.error("no GPU here; --smoke runs on a CPU")
    if options.smoke:
        torch.set_num_threads(1)  # at these sizes threads only wait for each other, for minutes on a busy machine
    out = options.out or (Path(tempfile.mkdtemp(prefix="demo-")) if options.smoke else Path(__file__).parent)
    out.mkdir(parents=True, exist_ok=True)
    train(recipe, out, device)


if __name__ == "__main__":
    main()
