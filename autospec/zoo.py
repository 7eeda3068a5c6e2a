"""`autospec zoo`: every causal-LM type that transformers knows, decoded three ways and compared with its own text.

A tiny random model of each type generates greedily for a ragged batch, plainly, with n-gram drafts and with an external
draft. A type is *identical* (all tokens equal) or *refused* (with the reason); *wrong* is a defect that must not exist,
*failed* (an exception that is no refusal, a crash, a hang) one that must be fixed. Types whose tiny model transformers
itself cannot build or run here are *not built*.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from autospec.arguments import Parser, check_files
from autospec.errors import AutospecError, OptionError, unknown_option

DRAFTERS = ("plain", "ngram", "draft")
OUTCOMES = ("identical", "refused", "wrong", "failed", "not built")
NEW_TOKENS = 28
PROMPT_LENS = (21, 13, 6)
TIME_LIMIT = 600  # seconds for one type; the slowest takes about a minute on an idle core


@dataclass(frozen=True)
class Row:
    """What became of one type.

    Args:
        model_type: key of transformers' CONFIG_MAPPING.
        outcome: one of OUTCOMES.
        reason: the refusal's first line, or what went wrong.
        model: the class that was built.
        drafters: whether each drafter's tokens were those of transformers; empty unless it came to that.
        acceptance: mean acceptance length of each drafter.
        distinct: distinct tokens in the poorest greedy text, which says how much the comparison is worth.
        note: anything else worth knowing.
        seconds: wall time.
    """

    model_type: str
    outcome: str
    reason: str = ""
    model: str = ""
    drafters: dict[str, bool] = field(default_factory=dict)
    acceptance: dict[str, float] = field(default_factory=dict)
    distinct: int = 0
    note: str = ""
    seconds: float = 0.0


def causal_lm_types() -> list[str]:
    """Every type that AutoModelForCausalLM accepts."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def check_type(model_type: str, drafters: Sequence[str] = DRAFTERS, seed: int = 0) -> Row:
    """Build, capture and decode one type in this process; the drafter "self" is the model itself."""
    from autospec.tiny_models import lively_model

    start = time.perf_counter()
    row = Row(model_type, "not built")
    try:
        model, prompts, distinct = lively_model(model_type, PROMPT_LENS, NEW_TOKENS, seed)
    except Exception as error:
        return dataclasses.replace(row, reason=_first_line(error), seconds=time.perf_counter() - start)
    row = dataclasses.replace(row, model=type(model).__name__, distinct=distinct)
    try:
        row = _decode(model, prompts, drafters, row)
    except AutospecError as refusal:
        row = dataclasses.replace(row, outcome="refused", reason=refusal.rule)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{_first_line(error)} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
        row = dataclasses.replace(row, outcome="failed", reason=reason)
    return dataclasses.replace(row, seconds=time.perf_counter() - start)


def _decode(model: Any, prompts: list[list[int]], drafters: Sequence[str], row: Row) -> Row:
    import torch

    from autospec.api import Limits, OptimizedModel
    from autospec.assemble import capture_model
    from autospec.config import DraftTargetConfig, NGramConfig, Speculation
    from autospec.loading import check_causal_lm
    from autospec.program import CapturedModel
    from autospec.tiny_models import tiny_model

    check_causal_lm(model)
    target = capture_model(model)
    expected, note = reference_tokens(model, prompts, NEW_TOKENS)
    told = [detail for record in target.records if record.name == "limit-positions" for detail in record.details]
    note = "; ".join([*told, *([note] if note else [])])
    same: dict[str, bool] = {}
    acceptance: dict[str, float] = {}
    for drafter in drafters:
        draft: CapturedModel | None = None
        speculation: Speculation = None
        if drafter == "ngram":
            speculation = NGramConfig(max_draft_len=4)
        elif drafter == "draft":
            small = tiny_model("llama", seed=1, vocab_size=target.facts.vocab_size, num_hidden_layers=1)
            draft, speculation = capture_model(small, "draft"), DraftTargetConfig(small, max_draft_len=3)
        elif drafter == "self":
            draft, speculation = target, DraftTargetConfig(model, max_draft_len=3)
        fast = OptimizedModel(target, draft, speculation, "eager", Limits(None, None, None), {})
        got = fast.generate(prompts, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        same[drafter] = torch.equal(got[:, max(PROMPT_LENS) :], expected)
        acceptance[drafter] = round(fast.metrics.mean_acceptance_length, 2)
    outcome = "identical" if all(same.values()) else "wrong"
    wrong = [name for name, is_same in same.items() if not is_same]
    reason = "tokens differ from transformers' with " + ", ".join(wrong) if wrong else ""
    return dataclasses.replace(row, outcome=outcome, reason=reason, drafters=same, acceptance=acceptance, note=note)


def reference_tokens(model: Any, prompts: list[list[int]], new_tokens: int) -> tuple[Any, str]:
    """Greedy tokens [rows, new_tokens] of transformers, and a note where a padded batch differs from single rows."""
    import torch

    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    single = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    expected = torch.tensor(single)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    try:
        padded = model.generate(ids, attention_mask=mask, **options)[:, width:]
    except Exception as error:
        return expected, f"transformers cannot generate a padded batch ({_first_line(error)}), compared row by row"
    is_same = torch.equal(padded, expected)
    return expected, "" if is_same else "transformers' padded batch differs from its single rows, compared row by row"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


# ---- a pool: one fresh process per type, forked from a server that has imported everything


def _worker(model_type: str, seed: int, connection: Any) -> None:
    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    for stream in (1, 2):  # torch prints whole graphs where an export fails, and warns on both
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    torch.set_num_threads(1)
    connection.send(check_type(model_type, seed=seed))
    connection.close()


def run_zoo(
    types: Sequence[str] | None = None,
    jobs: int = 2,
    progress: bool = False,
    time_limit: float = TIME_LIMIT,
    seed: int = 0,
) -> list[Row]:
    """Check types, each in a process of its own, `jobs` at a time; rows come in the order of `types`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "autospec.api", "autospec.tiny_models"])
    wanted = list(types) if types is not None else causal_lm_types()
    rows: dict[str, Row] = {}
    waiting = list(reversed(wanted))
    running: dict[Any, tuple[str, Any, float]] = {}  # by connection
    bar = tqdm(total=len(wanted), desc="zoo", disable=not progress)
    while waiting or running:
        while waiting and len(running) < jobs:
            model_type = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(model_type, seed, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (model_type, process, time.perf_counter())
        ready = multiprocessing.connection.wait(list(running), timeout=1.0)
        for connection, (model_type, process, start) in list(running.items()):
            seconds = time.perf_counter() - start
            if connection in ready:
                rows[model_type] = _receive(connection, process, model_type, seconds)
            elif seconds > time_limit:
                process.kill()
                rows[model_type] = Row(model_type, "failed", f"no answer within {time_limit:.0f} s", seconds=seconds)
            else:
                continue
            process.join()
            connection.close()
            del running[connection]
            bar.update()
            if progress and rows[model_type].outcome != "identical":
                bar.write(_line(rows[model_type]), file=sys.stderr)
            bar.set_postfix(Counter(row.outcome for row in rows.values()))
    bar.close()
    return [rows[model_type] for model_type in wanted]


def _receive(connection: Any, process: Any, model_type: str, seconds: float) -> Row:
    try:
        return connection.recv()
    except EOFError:
        process.join()
        return Row(model_type, "failed", f"the process ended with exit code {process.exitcode}", seconds=seconds)


# ---- output


def text_table(rows: Sequence[Row]) -> str:
    """One line a type, and the totals."""
    return "\n".join([*map(_line, rows), "", totals(rows)])


def _line(row: Row) -> str:
    return f"{row.model_type:<26} {row.outcome:<9} {row.seconds:5.1f} s  {_detail(row)}"


def _detail(row: Row) -> str:
    told = row.reason or ", ".join(row.drafters)
    return told + (f" [{row.note}]" if row.note else "")


def totals(rows: Sequence[Row]) -> str:
    """`130 identical, 59 refused, 0 wrong, 0 failed, 0 not built of 189 types`."""
    counts = Counter(row.outcome for row in rows)
    return ", ".join(f"{counts[name]} {name}" for name in OUTCOMES) + f" of {len(rows)} types"


def markdown(rows: Sequence[Row]) -> str:
    """The supported-models table, grouped by outcome, with versions and date."""
    import torch
    import transformers

    lines = [
        "# Which models work",
        "",
        f"Written by `autospec zoo --markdown` on {datetime.date.today()} with transformers {transformers.__version__} "
        f"and torch {torch.__version__}.",
        "Every causal-LM type of transformers as a tiny random float32 model: greedy tokens of a ragged batch, plain,",
        "with n-gram drafts and with an external draft model, against transformers' own generate.",
        "",
        f"**{totals(rows)}.**",
        "",
        "## Identical with all three drafters",
        "",
        ", ".join(f"`{row.model_type}`" for row in rows if row.outcome == "identical"),
    ]
    for outcome in OUTCOMES[1:]:
        group = [row for row in rows if row.outcome == outcome]
        if group:
            lines += ["", f"## {outcome.capitalize()}", "", "| type | why |", "|---|---|"]
            lines += [f"| `{row.model_type}` | {_detail(row).replace('|', '/')} |" for row in group]
    noted = [row for row in rows if row.outcome == "identical" and row.note]
    if noted:
        lines += ["", "## Notes", "", "| type | note |", "|---|---|"]
        lines += [f"| `{row.model_type}` | {row.note.replace('|', '/')} |" for row in noted]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = Parser(
        prog="autospec zoo", description=__doc__.splitlines()[0] if __doc__ else None,
        epilog="example:\n  autospec zoo --types llama,gemma2",
    )  # fmt: skip
    options.add_argument("--types", help="comma-separated model types; all causal-LM types by default")
    options.add_argument("--jobs", type=int, default=2, help="types at once")
    options.add_argument("--json", metavar="FILE", help="write the rows there as well")
    options.add_argument("--markdown", action="store_true", help="print the table of the documentation instead")
    options.add_argument("--seed", type=int, default=0, help="another seed makes other models and prompts")
    options.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds for one type")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; 1 if a type is wrong or failed."""
    given = parser().parse_args(argv)
    known = causal_lm_types()
    types = [name.strip() for name in given.types.split(",") if name.strip()] if given.types is not None else known
    for name in types:
        if name not in known:
            raise unknown_option("autospec zoo", name, known, what="model type")
    if given.jobs < 1:
        raise OptionError(
            f"--jobs must be at least 1, got {given.jobs}", at=f"--jobs {given.jobs}", where="autospec zoo",
            help="types at once, one of them or more",
        )
    check_files({"--json": given.json}, "autospec zoo")
    rows = run_zoo(types, given.jobs, progress=True, time_limit=given.time_limit, seed=given.seed)
    if given.json:
        with open(given.json, "w") as file:
            json.dump([dataclasses.asdict(row) for row in rows], file, indent=1)
    print(markdown(rows) if given.markdown else text_table(rows))
    return int(any(row.outcome in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
