"""`autospec bench --shape NAME`: how fast an architecture decodes, with random weights and synthetic acceptance.

One target and a head of each kind that is asked for are made on the device and captured once; every drafter and batch size
is a program over the same weights. What is reported of each:

    decode   new tokens over wall time from the first token to the last, over whole calls of generate (median of rounds)
    at asked the same, had every round accepted what was asked for: times asked over measured acceptance length
    whole    the same with prefill, over the wall time of the call
    step     median and 90th percentile of a step replayed in a row, rows in the middle of their output
    verify   the same of a step that verifies a whole draft and drafts nothing, with --verify
    host     mean wall time of a step in generate, less the median step; nothing with narrower buckets
    bound    what a step must read (`autospec.benching.roofline`) over the read bandwidth measured in the same run

Tokens mean nothing and no row ends early: there is no eos. Acceptance is drawn from a profile
(`autospec.passes.synthesize_acceptance`); the mean that was measured stands beside the one that was asked for, since a
dynamic tree's chain of first children may be shorter than what is drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch._inductor.utils import fresh_cache

from autospec.api import Limits, OptimizedModel
from autospec.arguments import Parser, check_at_least, check_files, sizes
from autospec.assemble import Draft, capture_model
from autospec.benching import profile
from autospec.benching.random_model import DRAFT_TOP1, random_model
from autospec.benching.roofline import read_bandwidth, step_bytes
from autospec.benching.shape_drafters import DEFAULT_DRAFTERS, HEADS, WHERE, Drafter, parse_drafter, rates_of
from autospec.benching.shape_report import Row, as_json, table
from autospec.benching.steps import Frozen, only_step, verify_only
from autospec.capture_head import capture_head
from autospec.config import Speculation, tree_of
from autospec.errors import OptionError, unknown_option
from autospec.exactness import exact_nodes
from autospec.kernels.launch import triton
from autospec.loading import check_head, checked_device
from autospec.model_zoo.shapes import SHAPES
from autospec.passes.offset_draft_layers import WEIGHT_PREFIX
from autospec.pipeline import pass_types
from autospec.program import CapturedModel, Program
from autospec.threads import limit_threads

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STEPS = {"cuda": 64, "cpu": 12}  # replayed steps of each row of the table
STREAM = 16  # of them in a row, before the state is put back


@dataclass(frozen=True)
class Loaded:
    """What all rows of the table share.

    Args:
        heads: by kind, as modules and as captured.
        weights: tensors of the programs so far by slot name, the trees' own constants left out: of the target under "none",
            of a kind of head under its name.
        seconds: of making and capturing, by phase.
    """

    target: CapturedModel
    heads: dict[str, tuple[Any, Draft]]
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def head(self, drafter: Drafter) -> Draft | None:
        """The captured head of a drafter; None: plain decoding."""
        return self.heads[drafter.head][1] if drafter.options is not None else None


def parser() -> argparse.ArgumentParser:
    """The options of `autospec bench --shape`."""
    made = Parser(
        prog=WHERE, description=__doc__.split("\n", 1)[0],
        epilog="example:\n  autospec bench --shape llama-3.1-8b --speculation none eagle3:7@3.91 eagle3-tree:7,10,60@3.84 "
               "\\\n    --batch 1,16,64 --json shape.json",
    )  # fmt: skip
    made.add_argument("--shape", required=True, metavar="NAME", help=f"one of {', '.join(SHAPES)}")
    made.add_argument("--speculation", nargs="+", default=DEFAULT_DRAFTERS, metavar="DRAFTER",
                      help="none, eagle3:LENGTH (a chain), eagle3-tree:LEVELS,TOPK,NODES (a dynamic tree), mtp:LENGTH, "
                           "mtp-tree:LEVELS,TOPK,NODES (an MTP module), -fp8 before the colon (a head in float8); @X behind it is "
                           f"its --acceptance (default {' '.join(DEFAULT_DRAFTERS)})")  # fmt: skip
    made.add_argument("--acceptance", default="3.91", metavar="X",
                      help="mean acceptance length, bonus token included (a geometric profile), or falling rates by depth "
                           "with commas (default 3.91)")  # fmt: skip
    made.add_argument("--batch", type=sizes, default=(1,), metavar="B,B,...", help="prompts at once (default 1)")
    made.add_argument("--prompt", type=int, default=512, help="tokens of each prompt (default 512)")
    made.add_argument("--new-tokens", type=int, default=512, help="tokens to decode of each (default 512)")
    made.add_argument("--buckets", type=sizes, default=(), metavar="B,B,...",
                      help="rows of narrower programs that go on at the end of a batch (default none)")  # fmt: skip
    made.add_argument("--without", default=(), metavar="PASS,...",
                      type=lambda names: [one.strip() for one in names.split(",") if one.strip()],
                      help="passes that shall not run, such as pad-linears; `autospec passes` lists them")  # fmt: skip
    made.add_argument("--verify", action="store_true", help="also time steps that verify and do not draft: one more to compile")
    made.add_argument("--exact", action="store_true", help="with exact=True: what bits that do not depend on the draft cost")
    made.add_argument("--rounds", type=int, default=5, help="timed calls; the median counts (default 5)")
    made.add_argument("--dtype", default=None, choices=DTYPES, help="of the weights (default bf16; fp32 on a CPU)")
    made.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    made.add_argument("--compile", default="inductor", choices=("inductor", "eager"))
    made.add_argument("--cold", action="store_true", help="start every row with empty compile caches on disk")
    made.add_argument("--seed", type=int, default=0, help="of weights, prompts and acceptance (default 0)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, after every row")
    return made


def run(arguments: Sequence[str]) -> int:
    """Measure, print, save."""
    asked = parser().parse_args(arguments)
    asked.device = torch.device(checked_device(asked.device, WHERE))
    asked.dtype = asked.dtype or ("bf16" if asked.device.type == "cuda" else "fp32")
    drafters = [parse_drafter(word) for word in asked.speculation]
    profiles = [rates_of(one, asked.acceptance) for one in drafters]
    _check(asked)
    limit_threads()
    bandwidth = read_bandwidth(asked.device)
    loaded = load(asked, dict.fromkeys(one.head for one in drafters if one.options is not None))
    title = _title(asked, bandwidth, loaded)
    print("\n".join(f"{name:<12} {value}" for name, value in title.items()), flush=True)
    rows: list[Row] = []
    for drafter, rates in zip(drafters, profiles, strict=True):
        for batch in asked.batch:
            rows.append(measure(asked, loaded, drafter, rates, batch, bandwidth))
            print(f"{drafter.asked}, batch {batch}: {statistics.median(rows[-1].decode):.1f} tok/s, "
                  f"step {1000 * rows[-1].step:.3f} ms, start-up {rows[-1].start_up['first_token']:.1f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
            if asked.json:
                asked.json.write_text(json.dumps(as_json(title, loaded.seconds, rows), indent=1) + "\n")
    print("\n" + table(rows))
    return 0


def load(asked: argparse.Namespace, kinds: Iterable[str]) -> Loaded:
    """The target and a head of each kind, with what making and capturing them took."""
    shape, dtype, seconds = SHAPES[asked.shape], DTYPES[asked.dtype], {}
    start = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        if asked.device.type == "cuda":
            torch.cuda.synchronize(asked.device)
        seconds[name] = time.perf_counter() - start
        start = time.perf_counter()

    model = random_model(shape, asked.device, dtype, asked.seed)
    modules = {kind: HEADS[kind][0](shape, model, asked.device, dtype, asked.seed + 1) for kind in kinds}
    lap("make weights")
    target = capture_model(model)
    lap("capture target")
    heads: dict[str, tuple[Any, Draft]] = {}
    for kind, module in modules.items():
        heads[kind] = module, capture_head(module, target)
        lap(f"capture {kind}")
    return Loaded(target, heads, seconds=seconds)


def measure(
    asked: argparse.Namespace, loaded: Loaded, drafter: Drafter, rates: tuple[float, ...], batch: int, bandwidth: float
) -> Row:
    """Build one program, let it generate, replay its step; nothing but the weights stays behind."""
    speculation: Speculation = None
    if drafter.options is not None:
        speculation = HEADS[drafter.head][1](loaded.heads[drafter.head][0], **drafter.options)
        check_head(speculation, loaded.head(drafter))  # type: ignore[arg-type]
    tree = tree_of(speculation)
    known = loaded.weights.setdefault("none", {}) | loaded.weights.setdefault(drafter.head, {})
    fast = OptimizedModel(
        loaded.target, loaded.head(drafter), speculation, asked.compile,
        Limits(batch, asked.prompt + asked.new_tokens, None, exact_nodes(asked.exact, speculation), asked.buckets), {},
        left_out=frozenset(asked.without), _weights=known, _acceptance=rates,
    )  # fmt: skip
    with fresh_cache() if asked.cold else contextlib.nullcontext():
        start_up = _start(fast, _prompts(asked, loaded, batch, 0), loaded, drafter)
    program = fast.program
    for name, value in _shared(program, loaded, drafter).items():
        loaded.weights[drafter.head if name.startswith(WEIGHT_PREFIX) else "none"][name] = value
    decode, whole, waits, lengths, depths = [], [], [], [], []
    for number in range(asked.rounds):
        prompts = _prompts(asked, loaded, batch, number)
        begin = time.perf_counter()
        fast.generate(prompts, max_new_tokens=asked.new_tokens, do_sample=False, seed=asked.seed + number)
        seconds, found = time.perf_counter() - begin, fast.metrics
        decoding = found.seconds - found.first_token_seconds
        whole.append(found.new_tokens / seconds)
        decode.append((found.new_tokens - batch) / decoding)
        waits.append(decoding / sum(found.steps.values()))
        lengths.append(found.mean_acceptance_length)
        depths.append(found.acceptance_per_depth)
    del fast
    _free(asked.device)  # the caches of generate, before those of the replayed step
    times, grown = _replay(asked, program, batch)
    step, verify = statistics.median(times), None
    read = step_bytes(
        loaded.target, loaded.head(drafter), tree, batch, asked.prompt + asked.new_tokens // 2,
        is_quantized=drafter.options is not None and "draft_quantization" in drafter.options,
        length=profile.mean_length(rates),
    )  # fmt: skip
    built = program.shape
    del program
    _free(asked.device)
    if asked.verify and drafter.options is not None:
        alone = verify_only(
            loaded.target, built, tree.max_draft_len, asked.compile, loaded.weights["none"], frozenset(asked.without)
        )  # fmt: skip
        verify = statistics.median(_replay(asked, alone, batch)[0])
        del alone
        _free(asked.device)
    return Row(
        drafter.asked, str(tree), batch, profile.mean_length(rates) if rates else None,
        statistics.mean(lengths) if rates else None, [statistics.mean(one) for one in zip(*depths, strict=True)],
        decode, whole, step, statistics.quantiles(times, n=10)[-1], verify,
        None if any(rows < batch for rows in asked.buckets) else statistics.median(waits) - step,
        *grown, read, read.total / bandwidth, start_up,
    )  # fmt: skip


def _start(fast: OptimizedModel, prompts: Tensor, loaded: Loaded, drafter: Drafter) -> dict[str, float]:
    """Seconds from weights on the device to the first token, by phase."""
    start = time.perf_counter()
    fast.generate(prompts, max_new_tokens=1, do_sample=False)
    whole, program = time.perf_counter() - start, fast.program
    phases = {
        "passes": sum(record.seconds for record in program.records),
        "compile": sum(graph.seconds_to_compile for graph in program.graphs.values()),
        "prefill": fast.metrics.first_token_seconds,
    }
    # What is left: fusing weights, allocating state, warm-up and capture of CUDA graphs.
    phases["weights_and_graphs"] = whole - sum(phases.values())
    captured = ["capture target"] if fast.draft is None else ["capture target", f"capture {drafter.head}"]
    phases["capture"] = sum(loaded.seconds[name] for name in captured)
    return phases | {"first_token": sum(phases.values())}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _shared(program: Program, loaded: Loaded, drafter: Drafter) -> dict[str, Tensor]:
    """The weights of a program that other trees may use; a tree's own constants are called the same in every program."""
    head = loaded.head(drafter)
    known = {*loaded.target.weights, *(WEIGHT_PREFIX + name for name in (head.weights if head is not None else {}))}
    return {
        slot.name: program.weights[slot.name] for graph in program.graphs.values() for slot in graph.slots
        if slot.kind == "weight" and (slot.parts or slot.form or slot.name in known)
    }  # fmt: skip


def _replay(asked: argparse.Namespace, program: Program, batch: int) -> tuple[list[float], tuple[float, float]]:
    """Seconds of many steps in a row, all rows in the middle of their output, over random K/V; and how deep drafts grow."""
    (draft_len,) = program.draft_lens()
    count = asked.prompt + asked.new_tokens // 2
    generator = torch.Generator().manual_seed(asked.seed)
    rows = torch.randint(0, program.facts.vocab_size, (batch, count), generator=generator).tolist()
    frozen = Frozen.of_rows(only_step(program, draft_len), rows)
    for name, value in frozen.state.items():
        if "_pages." in name and value.is_floating_point():
            value.normal_()  # zeros would draw less power
    room = program.shape.max_length - count - draft_len - 1  # the last draft is as long as the first
    calls = max(1, min(STREAM, room // (draft_len + 1)))
    times: list[float] = []
    drafts: list[tuple[int, int]] = []
    frozen.streamed(calls)
    while len(times) < STEPS[asked.device.type]:
        if "row_keys" in frozen.kept:
            frozen.kept["row_keys"].copy_(torch.randint(2**62, (len(frozen.kept["row_keys"]),), generator=generator))
        times += frozen.streamed(calls)
        drafts += [_depths(parents) for parents in frozen.state["tree_parents"].tolist()]
    deepest, first_children = zip(*drafts, strict=True)
    return times, (statistics.mean(deepest), statistics.mean(first_children))


def _depths(parents: Sequence[int]) -> tuple[int, int]:
    """Levels of a draft, and nodes of its chain of first children, the root left out."""
    depth, first = {0: 0}, [0]
    for node, parent in enumerate(parents):
        if node and parent in depth:
            depth[node] = depth[parent] + 1
            if parent == first[-1]:
                first.append(node)
    return max(depth.values()), len(first) - 1


def _prompts(asked: argparse.Namespace, loaded: Loaded, batch: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(asked.seed + number)
    return torch.randint(0, loaded.target.facts.vocab_size, (batch, asked.prompt), generator=generator)


def _title(asked: argparse.Namespace, bandwidth: float, loaded: Loaded) -> dict[str, Any]:
    """What the figures are worth nothing without."""
    device = asked.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {
        "shape": asked.shape, "dtype": asked.dtype, "device": where,
        "compile": f"{asked.compile}, {'cold caches' if asked.cold else 'caches as they were found'}",
        **({"passes": f"all but {', '.join(sorted(asked.without))}"} if asked.without else {}),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
                    f"triton {triton.__version__ if triton else 'none'}",
        "date": time.strftime("%Y-%m-%d"), "seeds": f"weights {asked.seed}, head {asked.seed + 1}, prompts and acceptance "
                                                    f"{asked.seed} to {asked.seed + asked.rounds - 1}",
        "run": f"prompt {asked.prompt}, {asked.new_tokens} new tokens, {asked.rounds} rounds, greedy, no eos",
        "draft": f"its best token has probability {DRAFT_TOP1} on average",
        "bandwidth": f"{bandwidth / 1e12:.3f} TB/s", "load": ", ".join(f"{k} {v:.1f} s" for k, v in loaded.seconds.items()),
    }  # fmt: skip


def _check(asked: argparse.Namespace) -> None:
    """Refuse what could only fail after minutes of compiling."""
    if asked.shape not in SHAPES:
        raise unknown_option(WHERE, asked.shape, SHAPES, what="shape")
    check_at_least(asked, {"prompt": 1, "new_tokens": 4, "rounds": 1}, WHERE)
    check_files({"--json": asked.json}, WHERE)
    optional = [one.name for one in pass_types() if one.is_optional]
    for name in asked.without:
        if name not in optional:
            raise unknown_option(f"{WHERE} --without", name, optional, what="optional pass")
    if asked.prompt + asked.new_tokens > SHAPES[asked.shape].max_positions:
        raise OptionError(f"{asked.prompt} prompt tokens and {asked.new_tokens} new ones are more than the shape's "
                          f"{SHAPES[asked.shape].max_positions} positions", at="--prompt", where=WHERE,
                          help="lower --prompt or --new-tokens")  # fmt: skip
