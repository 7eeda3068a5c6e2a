"""`autospec bench MODEL`: transformers' generate, plain decoding and drafters; where a step's time goes, which tree pays.

All complete the same prompts, one at a time, in turn; the median of the repeats counts. tokens/s is new tokens over the
wall time of generate, prefill included. Then, untimed, each drafter runs once more and the host looks at every step:
acceptance, outside of repetition loops too and by node, comes from there (`autospec.benching.record`). A step's time is
split by leaving parts of it out (`autospec.benching.steps`), and `--sweep-tree` looks for the best budget
(`autospec.benching.sweep`). The exit status is 1 if any token differs.

With `--batch-sizes`, `--prompt-lengths` or `--acceptance` the same contenders are measured by batch size and prompt length
instead (`autospec.benching.grid`).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from autospec.api import Limits, OptimizedModel, optimize
from autospec.arguments import Parser, check_at_least, check_files, check_temperature, sizes
from autospec.benching import artifact, grid, grid_report, profile, selection, shape
from autospec.benching.contenders import TRANSFORMERS, Contender, Ours, Timed, Transformers, in_turn
from autospec.benching.differences import compare
from autospec.benching.picture import draw
from autospec.benching.prompts import read_prompts
from autospec.benching.record import recorded
from autospec.benching.results import Bench, Parts, Run
from autospec.benching.steps import only_step, step_seconds, verify_only
from autospec.benching.sweep import SWEPT, Sweep, sweep
from autospec.benching.text import as_json, sweep_table, table
from autospec.config import DraftTargetConfig, MTPConfig, Ranking, Speculation, parse_speculation, tree_of
from autospec.drafter_arguments import model_arguments, speculation_of
from autospec.errors import OptionError
from autospec.loading import check_head, checked_device, load_model, tokenizer_of
from autospec.model_zoo.bundled import resolve
from autospec.threads import available_cores, limit_threads

WHERE = "autospec bench"
DEMO = "bundled:target"
DEMO_DRAFTERS = ("ngram", "draft:bundled:draft", "eagle3:bundled:eagle3")
DEMOS = {DEMO: DEMO_DRAFTERS, "bundled:mla": ("ngram", "mtp")}  # bundled models with a tokenizer, for the bundled prompts
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTION = "--speculation"


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    made = Parser(
        prog=WHERE, description=__doc__.split("\n", 1)[0],
        epilog="autospec bench --shape NAME times an architecture with random weights instead: see its own --help.\n"
               "autospec bench DIR measures an exported artifact.\n\n"
               "Several drafters: repeat --speculation; options of the draft behind one belong to it, those before the\n"
               "first to all.\n\nexample:\n  autospec bench bundled:target --speculation ngram --max-draft-len 6 "
               "\\\n    --speculation eagle3:bundled:eagle3 --dynamic-tree-max-topk 4 --max-total-draft-tokens 15\n"
               "  autospec bench bundled:target --batch-sizes 1,4 --prompt-lengths 32,128 --json grid.json --picture grid.png",
    )  # fmt: skip
    model_arguments(made)
    made.add_argument("--prompts", type=Path, metavar="FILE",
                      help="one prompt a line; .jsonl: strings, lists of token ids, or objects with text, prompt or "
                           "input_ids (default for bundled models: their own)")  # fmt: skip
    made.add_argument("--batch-sizes", type=sizes, default=None, metavar="B,B,...", help="measure by rows at once, such as 1,4")
    made.add_argument("--prompt-lengths", type=sizes, default=None, metavar="S,S,...",
                      help="measure by prompt length in tokens, cut from the prompts' text, such as 32,128")  # fmt: skip
    made.add_argument("--acceptance", default=None, metavar="X",
                      help="synthetic: drafts are accepted by this profile, a mean acceptance length such as 3.5 or falling "
                           "rates such as 0.8,0.5, whatever the target says; for speed only, the tokens mean nothing")  # fmt: skip
    made.add_argument("--without-transformers", action="store_true", help="leave transformers' generate out")
    made.add_argument("--new-tokens", type=int, default=128, help="tokens per prompt (default 128)")
    made.add_argument("--repeats", type=int, default=3, help="timed runs of each prompt; the median counts (default 3)")
    made.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    made.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    made.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    made.add_argument("--sweep-tree", action="store_true", help="find the chain length or tree that pays on this machine")
    made.add_argument("--sweep-nodes", type=sizes, default=(1, 2, 4, 8, 16, 32, 64), metavar="N,N,...",
                      help="nodes of the verify steps that are timed (default 1,2,4,8,16,32,64)")  # fmt: skip
    made.add_argument("--sweep-topk", type=sizes, default=(2, 4, 8), metavar="K,K,...",
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
    asked.acceptance = None if asked.acceptance is None else profile.parse(asked.acceptance)
    _check(asked, drafters)
    asked.device = checked_device(asked.device, WHERE)
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    if asked.batch_sizes or asked.prompt_lengths or asked.acceptance is not None:
        return _by_cell(asked, drafters)
    bench = measure(asked, drafters)
    print("\n" + table(bench))
    for one in bench.sweeps:
        print("\n" + sweep_table(one, asked.model))
    if bench.selection is not None:
        print("\n" + bench.selection.text())
    if asked.json:
        asked.json.write_text(json.dumps(as_json(bench), indent=1) + "\n")
    if asked.picture:
        draw(bench, asked.picture)
        print(f"\npicture: {asked.picture}")
    if not bench.is_identical:
        print("\n" + "\n".join([*(one.text() for one in bench.differences), grid_report.DIFFERS]))
    return 0 if bench.is_identical else 1


def speculations(arguments: Sequence[str]) -> list[tuple[str, Speculation]]:
    """Every --speculation with its configuration; plain decoding, which is measured anyway, is left out."""
    made = parser()
    model = made.parse_args(arguments).model
    starts = [i for i, word in enumerate(arguments) if word == OPTION or word.startswith(OPTION + "=")]
    common = list(arguments[: starts[0]] if starts else arguments)
    groups = [list(arguments[a:b]) for a, b in itertools.pairwise([*starts, len(arguments)])]
    if not starts:
        groups = [[OPTION, name] for name in DEMOS.get(model, ("ngram",))]
    found: list[tuple[str, Speculation]] = []
    for group in groups:
        # The model may stand among the common options or behind a drafter; here a second one is of no interest.
        asked = made.parse_known_args([model, *(word for word in common if word != model), *group])[0]
        if asked.speculation != "none":
            found.append((asked.speculation, parse_speculation(speculation_of(asked))))
    return found


def measure(asked: argparse.Namespace, drafters: Sequence[tuple[str, Speculation]]) -> Bench:
    """Everything that was asked for."""
    prompts, options = prompts_for(asked.model, asked.prompts), _options(asked)
    module = _load(asked)
    title = _title(asked, module, len(prompts), (1,))
    print(", ".join(str(value) for value in title.values()))
    runs = build(module, asked.compile, prompts, options, drafters, asked.index_quantization)
    baseline = None if asked.without_transformers else Transformers(module)
    reference = time_runs(runs, prompts, options, asked.repeats, baseline)
    for one in tqdm(runs[1:], desc="recording steps", leave=False):
        for prompt in prompts:
            with recorded(one.fast.session) as steps:
                one.fast.generate([prompt], **options)
            one.steps.append(steps)
    runs[0].steps = [[] for _ in prompts]
    split_steps(runs, prompts)
    sweeps = _sweeps(asked, runs, prompts, options) if asked.sweep_tree else []
    selected = _selection(asked, runs[0].fast, prompts, options, module)
    bench = Bench(title, runs, sweeps, reference, must_equal=asked.temperature == 0 and selected is None, selection=selected)
    explaining = module if asked.temperature == 0 else None
    outputs = {run.name: run.outputs for run in runs[1:]}
    if reference is not None and bench.must_equal:
        outputs[TRANSFORMERS] = [one.outputs[0] for one in reference]
    found = [compare(name, one, runs[0].outputs, prompts, explaining) for name, one in outputs.items()]
    return replace(bench, differences=[one for one in found if one is not None])


def _options(asked: argparse.Namespace) -> dict[str, Any]:
    """What generate is asked for."""
    options: dict[str, Any] = {"max_new_tokens": asked.new_tokens, "do_sample": False}
    if asked.temperature > 0:
        options |= {"do_sample": True, "temperature": asked.temperature, "top_k": 0, "top_p": 1.0, "seed": asked.seed}
    return options


def _by_cell(asked: argparse.Namespace, drafters: Sequence[tuple[str, Speculation]]) -> int:
    """Measure by batch size and prompt length, print, save; 0 if all tokens that mean something are the same."""
    rates = [() if asked.acceptance is None else profile.rates(asked.acceptance, tree_of(one).max_draft_len) for _, one in drafters]
    prompts, options = prompts_for(asked.model, asked.prompts), _options(asked)
    module = _load(asked)
    cells = [(batch, length) for length in asked.prompt_lengths or (None,) for batch in asked.batch_sizes or (1,)]
    limits = Limits(None, None, None, index_quantization=asked.index_quantization)
    models = captured(module, asked.compile, drafters, limits, rates)
    grid.check_room(prompts, cells, asked.new_tokens, models[0].fast.target.facts.max_positions, WHERE)
    title = _title(asked, module, len(prompts), asked.batch_sizes or (1,))
    print(", ".join(str(value) for value in title.values()))
    contenders: list[Contender] = [] if asked.without_transformers else [Transformers(module)]
    contenders += [Ours(run.name, run.fast) for run in models]
    synthetic = {run.name: profile.mean_length(one) for run, one in zip(models[1:], rates, strict=True) if one}
    found = grid.measure(
        contenders, prompts, cells, options, asked.repeats, synthetic, asked.index_quantization is not None,
        module if asked.temperature == 0 else None,
    )  # fmt: skip
    selected = _selection(asked, models[0].fast, prompts, options, module)
    return grid_report.report(found, title, asked.json, asked.picture, selected)


def _selection(
    asked: argparse.Namespace, plain: OptimizedModel, prompts: Sequence[list[int]], options: Any, module: Any
) -> selection.Selection | None:
    """What quantised index keys change; None: there are none."""
    if asked.index_quantization is None:
        return None
    limits = replace(plain.limits, index_quantization=None)
    exact = OptimizedModel(plain.target, None, None, asked.compile, limits, plain.generation_defaults)
    return selection.measure(plain, exact, prompts, options, module if asked.temperature == 0 else None)


def build(
    module: Any, compile: str, prompts: Sequence[list[int]], options: Any, drafters: Sequence[tuple[str, Speculation]],
    index_quantization: str | None = None,
) -> list[Run]:  # fmt: skip
    """Plain decoding and the drafters on one captured target, compiled."""
    longest = max(map(len, prompts)) + options["max_new_tokens"]
    limits = Limits(1, -(-longest // 32) * 32, None, index_quantization=index_quantization)
    runs = captured(module, compile, drafters, limits)
    for run in tqdm(runs, desc="compiling", leave=False):
        run.fast._weights.update(runs[0].fast.program.weights)  # fused ones are made once
        run.fast.generate([prompts[0]], **options)
    return runs


def captured(
    module: Any, compile: str, drafters: Sequence[tuple[str, Speculation]], limits: Limits,
    rates: Sequence[tuple[float, ...]] | None = None,
) -> list[Run]:  # fmt: skip
    """Plain decoding and the drafters on one captured target, nothing compiled yet; a draft that several use is captured once.

    Args:
        rates: synthetic acceptance of each drafter by depth; none: the target decides.
    """
    plain = optimize(module, None, compile=compile, index_quantization=limits.index_quantization)
    plain.limits = replace(limits, max_length=limits.max_length and min(limits.max_length, plain.target.facts.max_positions))
    runs, drafts = [Run(grid.PLAIN, "", plain)], {}
    for (asked, speculation), accepted in zip(drafters, rates or [()] * len(drafters), strict=True):
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
                              _acceptance=accepted)  # fmt: skip
        name = f"{asked}, {'up to ' if asked == 'auto' else ''}{tree_of(speculation)}"
        name += f", synthetic {profile.mean_length(accepted):.2f}" if accepted else ""
        runs.append(Run(name, asked, fast))
    return runs


def time_runs(
    runs: Sequence[Run], prompts: Sequence[list[int]], options: Any, repeats: int, baseline: Transformers | None = None
) -> list[Timed] | None:
    """Every run on every prompt in turn, so that a slow moment of the machine hits all of them alike; and the baseline's times."""
    others: list[Contender] = [] if baseline is None else [baseline]
    for one in others:
        one.sample([prompts[0]], options)
    contenders = [*others, *(Ours(run.name, run.fast) for run in runs)]
    found = in_turn(contenders, tqdm([[prompt] for prompt in prompts], desc="decoding", leave=False), options, repeats)
    for run, timed in zip(runs, found[len(others) :], strict=True):
        run.outputs += [one.outputs[0] for one in timed]
        run.metrics += [one.metrics for one in timed if one.metrics is not None]
        run.seconds += [one.seconds for one in timed]
        run.glue_seconds += [one.glue for one in timed]
        run.first_tokens += [seconds for one in timed for seconds in one.first_tokens]
        run.step_times += [seconds for one in timed for seconds in one.steps]
    return found[0] if others else None


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
            found[one.asked] = sweep(one.asked, one.fast, prompts, plain.outputs, options, nodes=sorted(asked.sweep_nodes),
                                     topks=sorted(asked.sweep_topk), glue=glue)  # fmt: skip
    return list(found.values())


def prompts_for(model: str, file: Path | None) -> list[list[int]]:
    """Token ids of every prompt of a file, or of the bundled ones."""
    if file is None and model not in DEMOS:
        raise OptionError("bench needs prompts", at="--prompts", where=WHERE,
                          help="name a file with one prompt a line; only bundled models have prompts of their own")  # fmt: skip
    return read_prompts(file, lambda: tokenizer_of(model, WHERE), WHERE)


def _load(asked: argparse.Namespace) -> Any:
    """The target on its device, in its dtype."""
    limit_threads()
    dtype = asked.dtype or ("float32" if asked.model in DEMOS else None)
    module = load_model(resolve(asked.model), "model")
    return module.to(device=asked.device, dtype=DTYPES[dtype] if dtype else None)


def _title(asked: argparse.Namespace, module: Any, prompts: int, batches: Sequence[int]) -> dict[str, str | int | float]:
    """What the figures are worth nothing without."""
    weight, cores = next(module.parameters()), torch.get_num_threads()
    where = torch.cuda.get_device_name(weight.device) if weight.is_cuda else f"{cores} CPU thread{'s' * (cores > 1)}"
    how = f"temperature {asked.temperature}, seed {asked.seed}" if asked.temperature > 0 else "greedy"
    return {
        "model": asked.model, "dtype": str(weight.dtype).removeprefix("torch."), "device": where,
        "torch": f"torch {torch.__version__}", "compile": asked.compile, "decoding": f"{how}, batch {', '.join(map(str, batches))}",
        "prompts": f"{prompts} prompt{'s' * (prompts > 1)}", "new_tokens": f"{asked.new_tokens} new tokens each",
        **({"index_keys": "index keys in float8"} if asked.index_quantization else {}),
    }  # fmt: skip


def _check(asked: argparse.Namespace, drafters: Sequence[tuple[str, Speculation]]) -> None:
    """Refuse what could only fail after minutes of compiling."""
    check_at_least(asked, {"new_tokens": 2, "repeats": 1}, WHERE)
    check_files({"--json": asked.json, "--picture": asked.picture}, WHERE)
    check_temperature(asked.temperature, WHERE)
    if asked.sweep_tree and not any(isinstance(speculation, SWEPT) for _, speculation in drafters):
        raise OptionError("--sweep-tree needs a drafter whose budget can be chosen", at="--sweep-tree", where=WHERE,
                          help="add --speculation ngram, draft:MODEL, eagle3:HEAD or medusa:HEAD")  # fmt: skip
    is_grid = asked.batch_sizes or asked.prompt_lengths or asked.acceptance is not None
    if asked.sweep_tree and is_grid:
        raise OptionError("--sweep-tree predicts from prompts as they are, one at a time", at="--sweep-tree", where=WHERE,
                          help="leave out --batch-sizes, --prompt-lengths and --acceptance")  # fmt: skip
    if asked.acceptance is not None and not drafters:
        raise OptionError("--acceptance is of drafts, and plain decoding has none", at="--acceptance", where=WHERE,
                          help="name a drafter, such as --speculation ngram --max-draft-len 6")  # fmt: skip
    if asked.acceptance is not None and any(name == "auto" for name, _ in drafters):
        raise OptionError("--acceptance needs drafts of one length, and auto chooses its own", at="--acceptance", where=WHERE,
                          help="name a drafter, such as --speculation ngram --max-draft-len 6")  # fmt: skip
