"""Train the draft heads of the demo target: EAGLE-3 and Medusa.

    python -m model_zoo.demo.train_heads             (a GPU, about 8 minutes; writes beside this file)
    python -m model_zoo.demo.train_heads --smoke     (a CPU, about a minute; writes to a temporary folder)

    collect source -> the target continues cuts of it -> EAGLE-3 -> Medusa -> draft on held-out packages
        -> heads.json, heads.png, README.md

The heads learn the target's distributions, mostly on text that the target wrote itself, which is where they draft. A
checkpoint is judged by real drafting on cuts of held-out text other than those of the report.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM

from autospec.heads.checkpoint import load_head, save_head
from autospec.training.eagle3 import Eagle3Loss, Eagle3Shape, choose_draft_vocabulary, new_head
from autospec.training.features import Target, default_taps
from autospec.training.loop import History, Rows, Sampler, Schedule, Trainer
from autospec.training.medusa import MedusaLoss, new_heads

from .card import render_card
from .corpus import collect
from .drafting import CHAIN, TREE
from .evaluate import LOOP, HeldOut, generate
from .recipe import HEADS_SMOKE, HeadsRecipe
from .tokenizer import encode
from .train import environment, load, random_windows

TARGET = Path(__file__).parent / "target"


def loop_starts(tokens: Tensor) -> Tensor:
    """[N, S] -> [N]: where a piece of LOOP tokens, seen before in the row, begins again (S if none does)."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1, 2**62, (LOOP,), generator=generator).to(tokens.device) | 1
    pieces = tokens.long().unfold(1, LOOP, 1)
    starts = []
    for part in pieces.split(2048):
        names = (part * part * factors + part * factors.roll(1)).sum(-1)  # wraps: a hash
        earlier = (names[:, :, None] == names[:, None, :]).tril(-1).any(-1)
        none = torch.ones_like(earlier[:, :1])
        first = torch.cat([earlier, none], dim=1).int().argmax(-1)
        starts.append(torch.where(first == names.shape[1], tokens.shape[1], first))
    return torch.cat(starts)


def batch_prompts(recipe: HeadsRecipe) -> list[int]:
    """Tokens of the cut that opens each batch of written rows."""
    lengths = recipe.written_prompts
    return [lengths[i % len(lengths)] for i in range(math.ceil(recipe.written_rows / recipe.generate_batch))]


@torch.no_grad()
def write_rows(recipe: HeadsRecipe, target: LlamaForCausalLM, stream: Tensor) -> Tensor:
    """Rows that begin with a cut of training text and go on as the target likes, greedily or sampled."""
    found, prompts = [], batch_prompts(recipe)
    sampled = round(recipe.sampled_share * len(prompts))
    for i, length in enumerate(tqdm(prompts, desc="target writes", mininterval=5)):
        cuts = random_windows(stream, recipe.generate_batch, length)
        options = {"do_sample": True, "top_k": 0} if i < sampled else {}
        rows = generate(target, cuts, recipe.written_length - length, **options)
        found.append(functional.pad(rows, (0, recipe.written_length - rows.shape[1]), value=1).short())
    return torch.cat(found)


def written_weights(recipe: HeadsRecipe, rows: Tensor) -> Tensor:
    """How much each position counts: fully where the target wrote something new, not after an end of text."""
    weights = []
    for part, length in zip(rows.split(recipe.generate_batch), batch_prompts(recipe), strict=True):
        place = torch.arange(part.shape[1], device=part.device)[None]
        ends = (part[:, length:] == 0).int()
        end = length + torch.where(ends.any(-1), ends.argmax(-1), recipe.written_length)
        new = (place >= length - 1) & (place < length + loop_starts(part[:, length:])[:, None])
        weights.append(torch.where(new, 1.0, recipe.prompt_weight) * (place < end[:, None]))
    return torch.cat(weights).half()


def make_data(recipe: HeadsRecipe, target: LlamaForCausalLM, device: str) -> dict[str, Any]:
    """Rows of text, written rows, the held-out stream, and the corpus in numbers."""
    corpus = collect(recipe.max_files)
    tokenizer: Any = AutoTokenizer.from_pretrained(TARGET)
    stream = encode(tokenizer, [source.text for source in corpus.train], "training text").to(device)
    held_out = encode(tokenizer, [source.text for source in corpus.held_out], "held-out text")
    facts = corpus.describe()
    facts["train"]["tokens"], facts["held_out"]["tokens"] = len(stream), len(held_out)
    text = random_windows(stream, recipe.text_rows, recipe.text_length)
    written = write_rows(recipe, target, stream)
    return {"text": text.short().cpu(), "written": written.cpu(), "held_out": held_out.short(), "facts": facts}


def keep_data(data: dict[str, Any], folder: Path, parts: int = 3) -> None:
    """Save the rows, the larger tensors in pieces."""
    folder.mkdir(parents=True)
    for i, part in enumerate(data["written"].chunk(parts)):
        torch.save(part.clone(), folder / f"written{i}.pt")
    torch.save(data["text"], folder / "text.pt")
    torch.save({"held_out": data["held_out"], "facts": data["facts"]}, folder / "rest.pt")


def kept_data(folder: Path) -> dict[str, Any]:
    """What `keep_data` saved."""
    written = [torch.load(path, weights_only=True) for path in sorted(folder.glob("written*.pt"))]
    rest: dict[str, Any] = torch.load(folder / "rest.pt", weights_only=True)
    return rest | {"written": torch.cat(written), "text": torch.load(folder / "text.pt", weights_only=True)}


def sampler_of(recipe: HeadsRecipe, data: dict[str, Any], device: str) -> Sampler:
    """Batches of both kinds of rows, on the device."""
    text = Rows(data["text"].to(device), torch.ones_like(data["text"], dtype=torch.half, device=device))
    own = data["written"].to(device)
    written = Rows(own, written_weights(recipe, own))
    return Sampler([(text, recipe.text_batch), (written, recipe.written_batch)], recipe.seed)


def schedule_of(recipe: HeadsRecipe, steps: int, device: str) -> Schedule:
    """Both heads are trained alike."""
    return Schedule(
        steps=steps, learning_rate=recipe.learning_rate, warmup=min(100, steps // 4), clip=0.5,
        eval_every=recipe.eval_every, precision="bf16" if device == "cuda" else "float32", graphs=device == "cuda",
    )  # fmt: skip


def bf16(head: Any) -> Any:
    """A bf16 copy, as it is saved."""
    return copy.deepcopy(head).bfloat16()


def train_eagle3(
    recipe: HeadsRecipe, model: LlamaForCausalLM, data: dict[str, Any], held_out: HeldOut, out: Path, minutes: float | None
) -> dict[str, Any]:
    """Train, save and describe the EAGLE-3 head."""
    device = model.device.type
    target = Target(model, default_taps(model.config.num_hidden_layers))
    written = data["written"].long().flatten()
    counts = torch.bincount(written, minlength=model.config.vocab_size)
    counts += torch.bincount(data["text"].long().flatten(), minlength=model.config.vocab_size)
    d2t, _ = choose_draft_vocabulary(counts, recipe.draft_vocab_size)
    shape = Eagle3Shape(
        draft_vocab_size=recipe.draft_vocab_size, intermediate_size=recipe.intermediate_size, num_kv_heads=recipe.num_kv_heads
    )
    torch.manual_seed(recipe.seed)
    head = new_head(target, shape, d2t)
    loss = Eagle3Loss(target, head, steps=recipe.unrolled_steps, decay=recipe.decay)
    if device == "cuda":
        loss.compile(dynamic=False)
    trainer = Trainer(
        loss, head, sampler_of(recipe, data, device), schedule_of(recipe, recipe.steps, device),
        score=lambda: held_out.eagle3(head, CHAIN).acceptance_length, minutes=minutes,
    )  # fmt: skip
    history = trainer.fit("eagle3")
    target.close()
    save_head(bf16(head), out / "eagle3")
    ids = head.vocabulary().cpu()
    return describe(head, history) | {"draft_vocabulary_covers": round(float(counts[ids].sum() / counts.sum()), 4)}


def train_medusa(
    recipe: HeadsRecipe, model: LlamaForCausalLM, data: dict[str, Any], held_out: HeldOut, out: Path, minutes: float | None
) -> dict[str, Any]:
    """Train, save and describe the Medusa heads."""
    device = model.device.type
    target = Target(model)
    heads = new_heads(target, recipe.medusa_heads, recipe.medusa_layers, share_lm_head=True)
    trainer = Trainer(
        MedusaLoss(target, heads, decay=recipe.decay), heads, sampler_of(recipe, data, device),
        schedule_of(recipe, recipe.medusa_steps, device), score=lambda: held_out.medusa(heads).acceptance_length,
        minutes=minutes,
    )  # fmt: skip
    history = trainer.fit("medusa")
    target.close()
    save_head(bf16(heads), out / "medusa")
    return describe(heads, history)


def describe(head: Any, history: History) -> dict[str, Any]:
    """Curves and costs."""
    return {"parameters": sum(p.numel() for p in head.own_state().values()), **asdict(history)}


def evaluate_saved(recipe: HeadsRecipe, out: Path, held_out: HeldOut, names: tuple[str, ...]) -> dict[str, Any]:
    """Draft with the saved heads in float32."""
    model = held_out.target
    results: dict[str, Any] = {"requests": len(held_out.tokens), "prompt_tokens": recipe.eval_prompt_tokens}
    for name in names:
        head: Any = load_head(
            out / name, target_hidden_size=model.config.hidden_size, target_vocab_size=model.config.vocab_size,
            target_layers=model.config.num_hidden_layers, embed_tokens=model.model.embed_tokens.weight,
            lm_head=model.lm_head.weight, dtype=torch.float32, device=model.device,
        )  # fmt: skip
        for loops in ("outside_loops", "all"):
            if name == "eagle3":
                results[f"eagle3_chain_{loops}"] = held_out.eagle3(head, CHAIN, loops).report()
                results[f"eagle3_tree_{loops}"] = held_out.eagle3(head, TREE, loops).report()
            else:
                results[f"medusa_chain_{loops}"] = held_out.medusa(head, loops).report()
    return results


def train(recipe: HeadsRecipe, out: Path, device: str, options: argparse.Namespace) -> None:
    """All phases; afterwards `out` holds the heads' folders, the curves and the card."""
    start = time.perf_counter()
    torch.manual_seed(recipe.seed)
    print(f"seed {recipe.seed}, device {device}, writing to {out}")
    model = load(TARGET, device, torch.bfloat16 if device == "cuda" else torch.float32)
    if options.data and options.data.is_dir():
        data = kept_data(options.data)
    else:
        data = make_data(recipe, model, device)
        if options.data:
            keep_data(data, options.data)
    stream = data["held_out"].long()
    print(f"{len(data['text']):,} rows of text, {len(data['written']):,} written, {time.perf_counter() - start:.0f} s")
    exact = load(TARGET, device, torch.float32)
    chosen_on, reported = (
        HeldOut.of(exact, stream, count, recipe.eval_prompt_tokens, recipe.eval_new_tokens, shift)
        for count, shift in ((recipe.eval_prompts // 2, 0.5), (recipe.eval_prompts, 0.0))
    )
    record: dict[str, Any] = {"recipe": asdict(recipe), "environment": environment(device), "data": data["facts"]}
    for name, fit, minutes in (
        ("eagle3", train_eagle3, options.eagle3_minutes),
        ("medusa", train_medusa, options.medusa_minutes),
    ):
        if name in options.heads:
            record[name] = fit(recipe, model, data, chosen_on, out, minutes)
            print(f"{name} after {time.perf_counter() - start:.0f} s", flush=True)
    record["evaluation"] = evaluate_saved(recipe, out, reported, tuple(options.heads))
    record["seconds"] = round(time.perf_counter() - start, 1)
    (out / "heads.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["evaluation"], indent=1))
    if (out / "training.json").is_file():
        render_card(out)
    print(f"done in {record['seconds']:.0f} s")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the demo target's draft heads.")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, about a minute on a CPU")
    parser.add_argument("--out", type=Path, help="folder to write (default: this one; with --smoke a temporary one)")
    parser.add_argument("--data", type=Path, help="folder that keeps the rows, for another run on them")
    parser.add_argument("--heads", nargs="+", default=["eagle3", "medusa"], choices=("eagle3", "medusa"))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="values in place of the recipe's")
    parser.add_argument("--eagle3-minutes", type=float, help="as many steps as fit, instead of the recipe's")
    parser.add_argument("--medusa-minutes", type=float, help="likewise")
    options = parser.parse_args(argv)

    recipe = HEADS_SMOKE if options.smoke else HeadsRecipe()
    recipe = replace(recipe, **{name: json.loads(value) for name, value in (item.split("=", 1) for item in options.set)})
    device = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    if options.smoke:
        torch.set_num_threads(1)
    out = options.out or (Path(tempfile.mkdtemp(prefix="heads-")) if options.smoke else Path(__file__).parent)
    out.mkdir(parents=True, exist_ok=True)
    train(recipe, out, device, options)


if __name__ == "__main__":
    main()
