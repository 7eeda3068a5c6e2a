"""`autospec bench MODEL`: drafters against plain decoding, where a step's time goes, and which tree pays.

Plain decoding and every drafter complete the same prompts, one at a time, in turn; the median of the repeats counts.
tokens/s is new tokens over the wall time of generate, prefill included. Then, untimed, each drafter runs once more and
the host looks at every step: acceptance, outside of repetition loops too and by node, comes from there
(`autospec.benching.record`). A step's time is split by leaving parts of it out (`autospec.benching.steps`), and
`--sweep-tree` looks for the best budget (`autospec.benching.sweep`). The exit status is 1 if any token differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from autospec.api import Limits, OptimizedModel, optimize
from autospec.benching import artifact, shape
from autospec.benching.picture import draw
from autospec.benching.record import recorded
from autospec.benching.results import Bench, Parts, Run
from autospec.benching.steps import clocked, only_step, step_seconds, verify_only
from autospec.benching.sweep import SWEPT, Sweep, sweep
from autospec.benching.text import as_json, sweep_table, table
from autospec.cli import model_arguments, speculation_of
from autospec.config import DraftTargetConfig, MTPConfig, Ranking, Speculation, parse_speculation, tree_of
from autospec.errors import CheckpointError, OptionError
from autospec.loading import check_head, load_model
from autospec.model_zoo.bundled import demo_prompts, resolve
from autospec.threads import available_cores, limit_threads

WHERE = "autospec bench"
DEMO = "bundled:target"
DEMO_DRAFTERS = ("ngram", "draft:bundled:draft", "eagle3:bundled:eagle3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTION = "--speculation"


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    made = argparse.ArgumentParser(
        prog=WHERE, description=__doc__.split("\n", 1)[0], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="autospec bench --shape NAME times an architecture with random weights instead: see its own --help.\n"
               "autospec bench DIR measures an exported artifact.\n\n"
               "Several drafters: repeat --speculation; options of the draft behind one belong to it, those before the\n"
               "first to all.\n\nexample:\n  autospec bench bundled:target --speculation ngram --max-draft-len 6 "
               "\\\n    --speculation eagle3:bundled:eagle3 --dynamic-tree-max-topk 4 --max-total-draft-tokens 15",
    )  # fmt: skip
    model_arguments(made)
    made.add_argument("--prompts", type=Path, metavar="FILE",
                      help="one prompt a line; .jsonl: strings, lists of token ids, or objects with text, prompt or "
                           "input_ids (default for bundled:target: its own)")  # fmt: skip
    made.add_argument("--new-tokens", type=int, default=128, help="tokens per prompt (default 128)")
    made.add_argument("--repeats", type=int, default=3, help="timed runs of each prompt; the median counts (default 3)")
    made.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    made.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    made.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    made.add_argument("--dtype", default=None, choices=DTYPES,
                      help="of the weights (default: the checkpoint's; float32 for bundled:target)")  # fmt: skip
    made.add_argument("--sweep-tree", action="store_true", help="find the chain length or tree that pays on this machine")
    made.add_argument("--sweep-nodes", type=_sizes, default=(1, 2, 4, 8, 16, 32, 64), metavar="N,N,...",
                      help="nodes of the verify steps that are timed (default 1,2,4,8,16,32,64)")  # fmt: skip
    made.add_argument("--sweep-topk", type=_sizes, default=(2, 4, 8), metavar="K,K,...",
                      help="children per node of the trees that are tried (default 2,4,8)")  # fmt: skip
    made.add_argument("--picture", type=Path, metavar="FILE", help="draw tokens/s and the drafts with their acceptance")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    return made


def run(arguments: Sequence[str]) -> int:
    """Measure, print, save; 0 if all tokens are those of plain decoding."""
    if any(word.partition("=")[0] == "--shape" for word in arguments):
        return shape.run(arguments)
    if artifact.is_asked_for(arguments):
        return artifact.run(arguments)
    asked = parser().parse_args(arguments)
    drafters = speculations(arguments)
    _check(asked, drafters)
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    bench = measure(asked, drafters)
    print("\n" + table(bench))
    for one in bench.sweeps:
        print("\n" + sweep_table(one, asked.model))
    if asked.json:
        asked.json.write_text(json.dumps(as_json(bench), indent=1) + "\n")
    if asked.picture:
        draw(bench, asked.picture)
        print(f"\npicture: {asked.picture}")
    if not bench.is_identical:
        print("\nsome tokens differ from plain decoding; in bfloat16 and float16 a near-tie can flip when a shape changes")
    return 0 if bench.is_identical else 1


def speculations(arguments: Sequence[str]) -> list[tuple[str, Speculation]]:
    """Every --speculation with its configuration; plain decoding, which is measured anyway, is left out."""
    made = parser()
    model = made.parse_args(arguments).model
    starts = [i for i, word in enumerate(arguments) if word == OPTION or word.startswith(OPTION + "=")]
    common = list(arguments[: starts[0]] if starts else arguments)
    groups = [list(arguments[a:b]) for a, b in itertools.pairwise([*starts, len(arguments)])]
    if not starts:
        groups = [[OPTION, name] for name in (DEMO_DRAFTERS if model == DEMO else ("ngram",))]
    found: list[tuple[str, Speculation]] = []
    for group in groups:
        # The model may stand among the common options or behind a drafter; here a second one is of no interest.
        asked = made.parse_known_args([model, *(word for word in common if word != model), *group])[0]
        if asked.speculation != "none":
            found.append((asked.speculation, parse_speculation(speculation_of(asked))))
    return found


def measure(asked: argparse.Namespace, drafters: Sequence[tuple[str, Speculation]]) -> Bench:
    """Everything that was asked for."""
    module = _load(asked)
    prompts = read_prompts(asked.model, asked.prompts)
    options: dict[str, Any] = {"max_new_tokens": asked.new_tokens, "do_sample": False}
    if asked.temperature > 0:
        options |= {"do_sample": True, "temperature": asked.temperature, "top_k": 0, "top_p": 1.0, "seed": asked.seed}
    title = _title(asked, module, len(prompts))
    print(", ".join(str(value) for value in title.values()))
    runs = build(module, asked.compile, prompts, options, drafters)
    time_runs(runs, prompts, options, asked.repeats)
    for one in tqdm(runs[1:], desc="recording steps", leave=False):
        for prompt in prompts:
            with recorded(one.fast.session) as steps:
                one.fast.generate([prompt], **options)
            one.steps.append(steps)
    runs[0].steps = [[] for _ in prompts]
    split_steps(runs, prompts)
    return Bench(title, runs, _sweeps(asked, runs, prompts, options) if asked.sweep_tree else [])


def build(
    module: Any, compile: str, prompts: Sequence[list[int]], options: Any, drafters: Sequence[tuple[str, Speculation]]
) -> list[Run]:
    """Plain decoding and the drafters on one captured target; a draft that several use is captured once."""
    plain = optimize(module, None, compile=compile, max_batch_size=1)
    longest = max(map(len, prompts)) + options["max_new_tokens"]
    plain.limits = Limits(1, min(-(-longest // 32) * 32, plain.target.facts.max_positions), None)
    plain.generate([prompts[0]], **options)
    runs, drafts = [Run("plain", "", plain)], {}
    for asked, speculation in tqdm(drafters, desc="compiling", leave=False):
        draft = None
        if isinstance(speculation, Ranking):
            modules = speculation.max_draft_len if isinstance(speculation, MTPConfig) else None  # as many are loaded
            key = type(speculation), str(speculation.speculative_model), modules
            if key not in drafts:
                drafts[key] = optimize(module, speculation, compile=compile).draft
            draft = drafts[key]
            if not isinstance(speculation, DraftTargetConfig):
                check_head(speculation, draft)  # type: ignore[arg-type]
        fast = OptimizedModel(plain.target, draft, speculation, compile, plain.limits, plain.generation_defaults,
                              _weights=dict(plain.program.weights))  # fmt: skip
        fast.generate([prompts[0]], **options)
        name = f"{asked}, {'up to ' if asked == 'auto' else ''}{tree_of(speculation)}"
        runs.append(Run(name, asked, fast))
    return runs


def time_runs(runs: Sequence[Run], prompts: Sequence[list[int]], options: Any, repeats: int) -> None:
    """Every run on every prompt in turn, so that a slow moment of the machine hits all of them alike."""
    for prompt in tqdm(prompts, desc="decoding", leave=False):
        samples: list[list[float]] = [[] for _ in runs]
        for repeat in range(repeats):
            for one, times in zip(runs, samples, strict=True):
                output = one.fast.generate([prompt], **options)[0, len(prompt) :].tolist()
                times.append(one.fast.metrics.seconds)
                if repeat == 0:
                    one.outputs.append(output)
                    one.metrics.append(one.fast.metrics)
        for one, times in zip(runs, samples, strict=True):
            one.seconds.append(statistics.median(times))
            one.glue_seconds.append(_glue(one.fast, prompt, options))


def _glue(fast: OptimizedModel, prompt: list[int], options: Any) -> float:
    """Seconds of one run after the first token that no step accounts for."""
    with clocked(fast.session) as times:
        fast.generate([prompt], **options)
    return fast.metrics.seconds - fast.metrics.first_token_seconds - sum(times)


def split_steps(runs: Sequence[Run], prompts: Sequence[list[int]]) -> None:
    """Verify, draft and glue of every run; a program of several steps counts each as often as it ran."""
    outputs = runs[0].outputs
    tokens = max((prompt + out[: len(out) // 2] for prompt, out in zip(prompts, outputs, strict=True)), key=len)
    programs, owners = [], []
    for one in tqdm(runs, desc="verify-only steps", leave=False):
        program = one.fast.session.program
        for length in one.launches:
            whole = only_step(program, length)
            bare = whole if one.is_plain else verify_only(
                one.fast.target, program.shape, length, one.fast.compile, program.weights
            )  # fmt: skip
            programs += [whole, bare]
            owners.append((one, length))
    seconds = step_seconds(programs, tokens)
    for one in runs:
        count = sum(one.launches.values())
        if not count:
            continue  # one new token: prefill alone
        pairs = [(seconds[2 * i : 2 * i + 2], one.launches[n]) for i, (owner, n) in enumerate(owners) if owner is one]
        whole_mean, verify = (sum(pair[k] * times for pair, times in pairs) / count for k in (0, 1))
        verify = whole_mean if one.is_plain else verify
        one.parts = Parts(verify, whole_mean - verify, sum(one.glue_seconds) / count)


def _sweeps(asked: argparse.Namespace, runs: Sequence[Run], prompts: Sequence[list[int]], options: Any) -> list[Sweep]:
    """One sweep for each drafter, however many trees of it were asked for."""
    plain, found = runs[0], {}
    glue = plain.parts.glue if plain.parts else 0.0
    for one in runs[1:]:
        if one.asked not in found and isinstance(one.fast.speculation, SWEPT):
            found[one.asked] = sweep(one.asked, one.fast, prompts, plain.outputs, options, nodes=asked.sweep_nodes,
                                     topks=asked.sweep_topk, glue=glue)  # fmt: skip
    return list(found.values())


def read_prompts(model: str, file: Path | None) -> list[list[int]]:
    """Token ids of every prompt of a file, or of the bundled ones."""
    if file is None and model != DEMO:
        raise OptionError("bench needs prompts", at="--prompts", where=WHERE,
                          help="name a file with one prompt a line; only bundled:target has prompts of its own")  # fmt: skip
    prompts: list[Any] = [one["text"] for one in demo_prompts()]
    if file is not None:
        try:
            lines = [line for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"the prompts cannot be read: {error}", at=f"--prompts {file}", where=WHERE,
                              help="name a text file") from error  # fmt: skip
        prompts = [_prompt(line, f"{file}:{i}") for i, line in enumerate(lines, 1)] if file.suffix == ".jsonl" else lines
        if not prompts:
            raise OptionError("there are no prompts", at=f"--prompts {file}", where=WHERE, help="write one on every line")
    if all(isinstance(one, list) for one in prompts):
        return prompts
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(model))
    except (OSError, ValueError) as error:
        raise CheckpointError("the model's tokenizer cannot be loaded", at=model, where=WHERE,
                              help="text needs one; .jsonl prompts may hold token ids instead") from error  # fmt: skip
    return [one if isinstance(one, list) else list(tokenizer(one)["input_ids"]) for one in prompts]


def _prompt(line: str, place: str) -> Any:
    """Text or token ids from one line of JSON."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        value = None
    if isinstance(value, dict):
        value = next((value[name] for name in ("text", "prompt", "input_ids") if name in value), None)
    is_ids = isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    if not value or not (isinstance(value, str) or is_ids):
        raise OptionError("a line of the prompts is neither text nor token ids", at=place, where=WHERE,
                          help='write {"text": "..."} or {"input_ids": [1, 2]} on every line')  # fmt: skip
    return value


def _load(asked: argparse.Namespace) -> Any:
    """The target on its device, in its dtype."""
    limit_threads()
    dtype = asked.dtype or ("float32" if asked.model == DEMO else None)
    module = load_model(resolve(asked.model), "model")
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return module.to(device=device, dtype=DTYPES[dtype] if dtype else None)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"the model cannot be moved to '{device}': {str(error).splitlines()[0]:.120}",
                          at=f"--device {device}", where=WHERE, help="cpu always works") from error  # fmt: skip


def _title(asked: argparse.Namespace, module: Any, prompts: int) -> dict[str, str | int | float]:
    """What the figures are worth nothing without."""
    weight, cores = next(module.parameters()), torch.get_num_threads()
    where = torch.cuda.get_device_name(weight.device) if weight.is_cuda else f"{cores} CPU thread{'s' * (cores > 1)}"
    how = f"temperature {asked.temperature}, seed {asked.seed}" if asked.temperature > 0 else "greedy"
    return {
        "model": asked.model, "dtype": str(weight.dtype).removeprefix("torch."), "device": where,
        "torch": f"torch {torch.__version__}", "compile": asked.compile, "decoding": f"{how}, batch 1",
        "prompts": f"{prompts} prompt{'s' * (prompts > 1)}", "new_tokens": f"{asked.new_tokens} new tokens each",
    }  # fmt: skip


def _check(asked: argparse.Namespace, drafters: Sequence[tuple[str, Speculation]]) -> None:
    """Refuse what could only fail after minutes of compiling."""
    for name, least in (("new_tokens", 2), ("repeats", 1)):
        if getattr(asked, name) < least:
            option = "--" + name.replace("_", "-")
            raise OptionError(f"{option} must be at least {least}, got {getattr(asked, name)}", at=option, where=WHERE,
                              help="leave it out for the default")  # fmt: skip
    if asked.temperature < 0:
        raise OptionError(f"--temperature must not be negative, got {asked.temperature}", at="--temperature",
                          where=WHERE, help="0 decodes greedily")  # fmt: skip
    if asked.sweep_tree and not any(isinstance(speculation, SWEPT) for _, speculation in drafters):
        raise OptionError("--sweep-tree needs a drafter whose budget can be chosen", at="--sweep-tree", where=WHERE,
                          help="add --speculation ngram, draft:MODEL, eagle3:HEAD or medusa:HEAD")  # fmt: skip
    for option, file in (("--json", asked.json), ("--picture", asked.picture)):
        if file is not None and not file.resolve().parent.is_dir():
            raise OptionError(f"there is no folder for {option}", at=f"{option} {file}", where=WHERE,
                              help="make the folder first")  # fmt: skip


def _sizes(text: str) -> tuple[int, ...]:
    """Positive numbers with commas, ascending."""
    try:
        sizes = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of positive numbers such as 1,2,4")
    return sizes
