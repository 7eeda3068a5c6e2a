"""`autospec demo`: the bundled code model with transformers' generate, plain, with n-grams, a draft model and a head."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from autospec.api import optimize
from autospec.arguments import check_at_least, check_files
from autospec.config import DraftTargetConfig, Eagle3Config, NGramConfig
from autospec.loading import checked_device
from autospec.model_zoo.bundled import demo_prompts, resolve
from autospec.threads import available_cores

# Draft lengths and trees that were fastest with the bundled models, on two cores of an AMD EPYC and on an H100: see
# BENCHMARKS.md. The static tree holds the nodes that were accepted most
# often of 53 on two held-out prompts that the demo does not show by default.
NGRAM_DRAFT_LEN = 6
MODEL_DRAFT_LEN = 4
HEAD_DRAFT_LEN = 6
STATIC_TREE = [
    [0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0, 0],
]  # fmt: skip
CPU_TREE: dict[str, Any] = {"max_draft_len": 5, "dynamic_tree_max_topk": 3, "max_total_draft_tokens": 11}
GPU_TREE: dict[str, Any] = {"max_draft_len": 8, "dynamic_tree_max_topk": 10, "max_total_draft_tokens": 59}


@dataclass
class Result:
    """One way to decode, over all prompts."""

    name: str
    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    outputs: list[Tensor] = field(default_factory=list)
    row_steps: int = 0
    reached: list[int] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance(self) -> list[float]:
        return [count / self.row_steps for count in self.reached] if self.row_steps else []

    def add(self, metrics: Any) -> None:
        """Pool the acceptance counts of one prompt."""
        self.row_steps += metrics.row_steps
        self.reached += [0] * (len(metrics.reached) - len(self.reached))
        for depth, count in enumerate(metrics.reached):
            self.reached[depth] += count


def run_demo(
    *, new_tokens: int = 128, num_prompts: int = 6, repeats: int = 3, compile: str = "inductor",
    device: str | None = None, picture: str | None = "demo.png",
) -> int:  # fmt: skip
    """Decode the bundled prompts with every drafter, print the table, save the picture; 0 if all tokens are identical."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = argparse.Namespace(new_tokens=new_tokens, prompts=num_prompts, repeats=repeats)
    check_at_least(given, dict.fromkeys(("new_tokens", "prompts", "repeats"), 1), "autospec demo")
    check_files({"--picture": picture or None}, "autospec demo")
    place = checked_device(device, "autospec demo")
    cores = available_cores()
    torch.set_num_threads(cores)
    load: Any = AutoModelForCausalLM.from_pretrained
    target = load(resolve("bundled:target"), dtype=torch.float32).to(place).eval()
    draft = load(resolve("bundled:draft"), dtype=torch.float32).to(place).eval()
    head, tree = resolve("bundled:eagle3"), GPU_TREE if place.startswith("cuda") else CPU_TREE
    tokenizer = AutoTokenizer.from_pretrained(resolve("bundled:target"))
    prompts = [tokenizer(p["text"], return_tensors="pt").input_ids.to(place) for p in demo_prompts()[:num_prompts]]
    where = torch.cuda.get_device_name() if place == "cuda" else f"{cores} CPU core{'s' if cores > 1 else ''}"
    print(f"{sum(p.numel() for p in target.parameters()) / 1e6:.1f}M-parameter code model, float32, batch 1, {where}, "
          f"torch {torch.__version__}, {len(prompts)} held-out prompts, {new_tokens} new tokens each")  # fmt: skip
    specs = (
        ("autospec plain", None),
        (f"autospec n-gram, {NGRAM_DRAFT_LEN}", NGramConfig(max_draft_len=NGRAM_DRAFT_LEN)),
        (f"autospec draft model, {MODEL_DRAFT_LEN}", DraftTargetConfig(draft, max_draft_len=MODEL_DRAFT_LEN)),
        (f"autospec EAGLE-3, chain of {HEAD_DRAFT_LEN}", Eagle3Config(head, max_draft_len=HEAD_DRAFT_LEN)),
        (f"autospec EAGLE-3, static {len(STATIC_TREE)}", Eagle3Config(head, eagle_choices=STATIC_TREE)),
        (f"autospec EAGLE-3, dynamic {tree['max_total_draft_tokens']}", Eagle3Config(head, **tree)),
    )
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    runs: list[tuple[Result, Callable[[Tensor], Tensor], Any]] = []
    length = -(-(max(ids.shape[1] for ids in prompts) + new_tokens) // 32) * 32
    baseline = Result("transformers generate")
    runs.append((baseline, lambda ids: target.generate(ids, attention_mask=torch.ones_like(ids), **options), None))
    for name, speculation in tqdm(specs, desc="compiling", leave=False):
        start = time.perf_counter()
        fast = optimize(target, speculation, compile=compile, max_length=length, max_batch_size=1)
        fast.generate(prompts[0], **options)
        result = Result(name, compile_seconds=time.perf_counter() - start)
        runs.append((result, lambda ids, fast=fast: fast.generate(ids, **options), fast))  # type: ignore[misc]
    _measure(runs, prompts, repeats)
    print(_table([result for result, _, _ in runs]))
    print(f"\n{demo_prompts()[0]['file']}, completed:\n")
    print(_indent(str(tokenizer.decode(baseline.outputs[0][0], skip_special_tokens=True))))
    if picture:
        draw([result for result, _, _ in runs], picture, f"bundled code model, {where}")
        print(f"\npicture: {picture}")
    return 0 if all(_is_identical(result, baseline) for result, _, _ in runs) else 1


def _measure(runs: list[tuple[Result, Callable[[Tensor], Tensor], Any]], prompts: list[Tensor], repeats: int) -> None:
    """Time every run on every prompt in turn, so that a slow moment of the machine hits all of them alike."""
    for number, ids in enumerate(tqdm(prompts, desc="decoding", leave=False)):
        samples: list[list[float]] = [[] for _ in runs]
        for repeat in range(repeats + (number == 0)):
            for (result, decode, fast), times in zip(runs, samples, strict=True):
                start = time.perf_counter()
                output = decode(ids)
                if output.is_cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
                if repeat == 0:
                    result.outputs.append(output.cpu())
                    result.tokens += output.shape[1] - ids.shape[1]
                    if fast is not None:
                        result.add(fast.metrics)
        for (result, _, _), times in zip(runs, samples, strict=True):
            # The first prompt's first round warms up and is not counted.
            result.seconds += statistics.median(times[1:] if number == 0 else times)


def _is_identical(result: Result, baseline: Result) -> bool:
    return all(torch.equal(a, b) for a, b in zip(result.outputs, baseline.outputs, strict=True))


def _table(results: list[Result]) -> str:
    baseline = results[0]
    lines = [
        f"{'':<28} {'tokens/s':>9} {'speed-up':>9} {'mean acc. length':>17} {'compile s':>10} {'identical':>10}"
        "  acceptance per depth"
    ]
    for result in results:
        is_plain = not result.row_steps
        length = "" if is_plain else f"{1 + sum(result.acceptance):.2f}"
        depths = " ".join(f"{rate:.2f}" for rate in result.acceptance)
        compiled = f"{result.compile_seconds:.0f}" if result.compile_seconds else ""
        identical = "yes" if _is_identical(result, baseline) else "NO"
        lines.append(
            f"{result.name:<28} {result.tokens_per_second:>9.1f} {result.tokens_per_second / baseline.tokens_per_second:>8.2f}x "
            f"{length:>17} {compiled:>10} {identical:>10}  {depths}"
        )
    return "\n".join(lines)


def draw(results: list[Result], path: str, title: str) -> None:
    """Two panels: tokens per second, and acceptance per depth of every drafter."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ["#8d99ae", "#457b9d", "#2a9d8f", "#e76f51", "#e9c46a", "#6d597a", "#b56576"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.6 + 0.45 * len(results)), width_ratios=(3, 2), layout="constrained")
    names = [result.name for result in results]
    speeds = [result.tokens_per_second for result in results]
    bars = left.barh(names, speeds, color=colours[: len(results)], height=0.62)
    labels = [
        f"{speed:,.0f} tokens/s  ({speed / speeds[0]:.1f}x)"
        + (f", {1 + sum(result.acceptance):.2f} a step" if result.acceptance else "")
        for speed, result in zip(speeds, results, strict=True)
    ]
    left.bar_label(bars, labels, padding=5, fontsize=9)
    left.set_xlim(0, max(speeds) * 1.75)
    left.invert_yaxis()
    left.set_xlabel("tokens per second, identical tokens")
    left.spines[["top", "right"]].set_visible(False)
    for result, colour in zip(results, colours, strict=False):
        if result.acceptance:
            right.plot(range(1, len(result.acceptance) + 1), result.acceptance, marker="o", color=colour)
    right.set_ylim(0, 1)
    right.set_xlabel("depth in the draft")
    right.set_ylabel("accepted (colours as on the left)")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.grid(alpha=0.25)
    right.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
