"""Train the demo of latent attention: a 0.5M-parameter DeepSeek-V3 (MLA, experts) that writes Python, and its MTP module.

    python -m model_zoo.demo.train_mla               (two CPU cores, about half an hour; writes mla/ beside this file)
    python -m model_zoo.demo.train_mla --smoke       (about a minute; writes to a temporary folder)

    the standard library's source -> tokenizer -> target on next tokens -> `autospec train mtp` -> one checkpoint of both

Experts are balanced as DeepSeek-V3's are, without a loss of their own: after each step the bias that only chooses experts
rises for those that had too few tokens and falls for the others.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from autospec.bench import run as bench
from autospec.model_zoo.bundled import demo_prompts
from autospec.training.train import TrainingOptions
from autospec.training.train import train as train_head

from .corpus import Source, collect, summary
from .evaluate import text_loss_and_agreement, windows
from .recipe import Schedule
from .tokenizer import encode, save_tokenizer, train_tokenizer
from .train import environment, fit, random_windows, token_losses

SCHEDULE = Schedule(steps=2400, batch_size=8, learning_rate=4e-3, warmup=100, eval_every=400)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what comes out, besides the interpreter's version."""

    seed: int = 0
    threads: int = 2
    vocab_size: int = 1024
    context: int = 512
    max_files: int | None = None
    schedule: Schedule = SCHEDULE
    balance_rate: float = 1e-3  # by which an expert's bias moves in a step
    # The MTP module, by `autospec train mtp`
    every_file: int = 4  # of the training files, one in so many
    length: int = 192
    unrolled_steps: int = 3
    self_generated: float = 0.3
    module_steps: int = 700
    module_batch: int = 32
    module_rate: float = 8e-3
    # Evaluation: greedy completions of the bundled prompts
    draft_len: int = 3
    new_tokens: int = 128


SMOKE = Recipe(
    max_files=60, context=320, schedule=Schedule(steps=20, batch_size=4, learning_rate=3e-3, warmup=5, eval_every=20),
    length=64, self_generated=0.1, module_steps=10, module_batch=4, new_tokens=16,
)  # fmt: skip


class Balance:
    """Keeps the experts of every layer equally busy by the bias of its gate."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate, self.counts = rate, {}  # type: tuple[float, dict[nn.Module, Tensor]]
        self.layers = [part for part in model.modules() if hasattr(part, "experts") and hasattr(part, "gate")]
        for layer in self.layers:
            layer.experts.register_forward_pre_hook(self._counter(layer.gate))  # type: ignore[union-attr]

    def _counter(self, gate: Any) -> Any:
        def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.counts[gate] = torch.bincount(inputs[1].flatten(), minlength=len(gate.e_score_correction_bias)).float()

        return count

    @torch.no_grad()
    def move(self) -> None:
        """A step towards equal shares, by what was counted last."""
        for gate, counts in self.counts.items():
            gate.e_score_correction_bias += self.rate * (counts.mean() - counts).sign()  # type: ignore[operator]

    def shares(self) -> list[list[float]]:
        """By layer, the share of the tokens that each expert had last."""
        return [[round(float(x), 3) for x in counts / counts.sum()] for counts in self.counts.values()]


def new_model(recipe: Recipe) -> DeepseekV3ForCausalLM:
    """One dense layer and three of eight experts and a shared one; the cache keeps 32 + 16 values per token and layer."""
    config = DeepseekV3Config(
        vocab_size=recipe.vocab_size, hidden_size=128, intermediate_size=128, moe_intermediate_size=16, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
        v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
        routed_scaling_factor=1.0, norm_topk_prob=True, first_k_dense_replace=1, max_position_embeddings=recipe.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=1, use_cache=False,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def sources(recipe: Recipe) -> tuple[list[Source], list[Source]]:
    """Files of the standard library to train on, and held-out packages of it (and python-dateutil, for its name)."""
    corpus = collect(recipe.max_files)
    return [[one for one in part if one.package.startswith("python")] for part in (corpus.train, corpus.held_out)]  # type: ignore[return-value]


def train_target(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Next-token training on random windows; writes an ordinary bf16 folder."""
    train, held_out = sources(recipe)
    tokenizer = train_tokenizer((source.text for source in train), recipe.vocab_size)
    save_tokenizer(tokenizer, out, recipe.context)
    stream = encode(tokenizer, [source.text for source in train], "training text")
    rows = windows(encode(tokenizer, [source.text for source in held_out], "held-out text"), recipe.context + 1)[:100]
    model = new_model(recipe).train()
    balance, length = Balance(model, recipe.balance_rate), recipe.context + 1

    def batches() -> Iterator[Tensor]:
        while True:
            yield random_windows(stream, recipe.schedule.batch_size, length)

    def loss(batch: Tensor) -> tuple[Tensor, Tensor]:
        balance.move()
        value = token_losses(model(batch[:, :-1]).logits, batch[:, 1:]).mean()
        return value, value

    def measure() -> tuple[float, None]:
        return text_loss_and_agreement(model, rows)[0], None

    history = fit("target", model, recipe.schedule, batches(), loss, measure)
    model.config.use_cache = True
    model.generation_config = transformers.GenerationConfig(do_sample=False, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    model.bfloat16().save_pretrained(out)
    return {"data": {"train": summary(train), "held_out": summary(held_out), "tokens": len(stream)},
            "experts": balance.shares(), **asdict(history)}  # fmt: skip


def train_module(recipe: Recipe, out: Path) -> dict[str, Any]:
    """`autospec train mtp`; the module then joins the target's file, as DeepSeek-V3's stands in its checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        text, head = Path(folder) / "text.jsonl", Path(folder) / "head"
        train, _ = sources(recipe)
        text.write_text("".join(json.dumps({"text": source.text}) + "\n" for source in train[:: recipe.every_file]))
        options = TrainingOptions(
            model=str(out), data=[str(text)], out=str(head), length=recipe.length, self_generated=recipe.self_generated,
            steps=recipe.module_steps, batch_size=recipe.module_batch, learning_rate=recipe.module_rate, held_out=0.03,
            unrolled_steps=recipe.unrolled_steps, save_every=0, seed=recipe.seed, device="cpu",
        )  # fmt: skip
        record = train_head("mtp", options)
        weights = load_file(out / "model.safetensors") | load_file(head / "model.safetensors")
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((out / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    kept = ("parameters", "rows", "held_out_rows", "loss", "agreement", "acceptance_length", "history")
    return {key: record[key] for key in kept} | {"seconds": record["history"]["seconds"]}


def measure_drafts(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Acceptance on the bundled prompts by `autospec bench`, which compares the tokens with plain decoding's."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, found = Path(folder) / "prompts.jsonl", Path(folder) / "bench.json"
        prompts.write_text("".join(json.dumps({"text": prompt["text"]}) + "\n" for prompt in demo_prompts()))
        options = {"prompts": prompts, "compile": "eager", "dtype": "float32", "new-tokens": recipe.new_tokens, "repeats": 1,
                   "speculation": "mtp", "max-draft-len": recipe.draft_len, "json": found}  # fmt: skip
        status = bench([str(out), *(word for name, value in options.items() for word in (f"--{name}", str(value)))])
        run = json.loads(found.read_text())["runs"][-1]
    assert status == 0, "drafting changed the tokens"
    return {name: run[name] for name in ("acceptance", "acceptance_outside_loops")}


CARD = """# A tiny DeepSeek-V3 that writes Python, and its MTP module

{millions:.2f}M parameters and {module_millions:.2f}M in the module, bf16, one file: `bundled:mla`. Four layers of width
128 with latent attention (4 heads; the cache keeps 32 + 16 values per token and layer), the first dense, the others
with 8 experts, 2 per token, and a shared one. It is here so that MLA, experts and MTP run end to end on any machine: it
has the shape of Python, no understanding, and greedily it soon repeats itself.

    autospec bench bundled:mla --speculation mtp

| greedy, bundled prompts, chain of {draft_len} | tokens per step | accepted at depth 1, 2, ... (%) | steps |
| --- | ---: | --- | ---: |
| before the text repeats itself | {outside} |
| all steps | {all_steps} |

**Target**: next tokens of {packages}, as installed: {tokens:,} tokens of a vocabulary of {vocab_size}, {seen:.1f}M seen.
Cross-entropy {held_out:.2f} nats per token on {held_out_packages}, {training:.2f} on training text. Experts are balanced
by the bias of the gate: the busiest of any layer got {busiest:.0f} % of a batch, where 12.5 would be even.

**Module**: `autospec train mtp`, {module_steps} steps of {module_batch} rows of {length} tokens, {written:.0f} % of them
written by the target, unrolled {unrolled_steps} deep. Level by level it agrees with the target on {agreement} % of
held-out training files.

Trained in {minutes:.0f} and {module_minutes:.0f} minutes on one or two threads of a busy CPU with torch {torch} and
transformers {transformers}; `python -m model_zoo.demo.train_mla` makes both anew. Apache-2.0.
"""


def card_text(record: dict[str, Any]) -> str:
    """README.md of the folder; every number in it is a measured one."""
    target, module, evaluation, recipe = (record[name] for name in ("target", "module", "evaluation", "recipe"))
    data = target["data"]

    def row(counted: dict[str, Any]) -> str:
        rates = " ".join(f"{100 * rate:.0f}" for rate in counted["per_depth"])
        return f"{counted['mean_acceptance_length']:.2f} | {rates} | {counted['steps']}"

    return CARD.format(
        **recipe, **record["environment"], millions=target["parameters"] / 1e6, module_millions=module["parameters"] / 1e6,
        outside=row(evaluation["acceptance_outside_loops"]), all_steps=row(evaluation["acceptance"]),
        packages=", ".join(f"{name} {one['version']} ({one['licence']})" for name, one in data["train"]["packages"].items()),
        held_out_packages=", ".join(data["held_out"]["packages"]), tokens=data["tokens"], seen=target["tokens"] / 1e6,
        held_out=target["held_out"][-1][1], training=target["train"][-1][1], written=100 * recipe["self_generated"],
        busiest=100 * max(max(shares) for shares in target["experts"]),
        agreement=", ".join(f"{100 * share:.0f}" for share in module["agreement"]),
        minutes=target["seconds"] / 60, module_minutes=module["seconds"] / 60,
    )  # fmt: skip


def train(recipe: Recipe, out: Path) -> None:
    """Both phases; afterwards `out` is a folder for `autospec.optimize(out, MTPConfig())`."""
    start = time.perf_counter()
    torch.manual_seed(recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"recipe": asdict(recipe), "environment": environment("cpu"), "target": train_target(recipe, out)}
    record |= {"module": train_module(recipe, out), "evaluation": measure_drafts(recipe, out)}
    record["seconds"] = round(time.perf_counter() - start, 1)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "README.md").write_text(card_text(record))
    print(json.dumps(record["evaluation"], indent=2))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the demo with latent attention and its MTP module.")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, about a minute")
    parser.add_argument("--out", type=Path, help="folder to write (default: mla/ beside this file; with --smoke a temporary one)")
    options = parser.parse_args(argv)
    recipe = SMOKE if options.smoke else Recipe()
    torch.set_num_threads(1 if options.smoke else recipe.threads)
    beside = Path(tempfile.mkdtemp(prefix="mla-")) if options.smoke else Path(__file__).parent / "mla"
    train(recipe, options.out or beside)


if __name__ == "__main__":
    main()
