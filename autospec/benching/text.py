"""A bench as tables for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from autospec.benching.contenders import TRANSFORMERS, percentiles, spread
from autospec.benching.record import Acceptance
from autospec.benching.results import Bench, Run
from autospec.benching.sweep import Budget, Sweep


def table(bench: Bench) -> str:
    """One line a run, then acceptance by depth and rank."""
    plain, width = bench.runs[0], max(len(name) for name in (TRANSFORMERS, *(run.name for run in bench.runs))) + 1
    baseline = bench.reference_speed
    lines = [
        f"{'':<{width}} {'tokens/s':>9} {'speed-up':>8} {'identical':>9} {'accepted':>9} {'no loops':>9} {'nodes':>6}"
        f" {'step ms':>8} {'verify':>8} {'draft':>8} {'glue':>8}"
    ]
    if baseline is not None:
        same = {True: "yes", False: "NO", None: ""}[bench.reference_equals]
        lines.append(f"{TRANSFORMERS:<{width}} {baseline:>9.1f} {baseline / plain.tokens_per_second:>7.2f}x {same:>9}")
    for run in bench.runs:
        counted, outside = run.acceptance, run.acceptance_outside_loops
        lengths = f"{counted.mean_length:>9.2f} {_length(outside):>9} {counted.nodes_per_step:>6.1f}"
        parts = run.parts
        times = [parts.step, parts.verify, parts.draft, parts.glue] if parts else []
        lines.append(
            f"{run.name:<{width}} {run.tokens_per_second:>9.1f} {run.tokens_per_second / plain.tokens_per_second:>7.2f}x"
            f" {'yes' if run.equals(plain) else 'NO':>9} {lengths if counted.steps else ' ' * 26}"
            + "".join(f" {1000 * seconds:>8.3f}" for seconds in times)
        )
    lines += ["", "speed-up: over plain decoding; accepted: mean acceptance length, bonus token included; no loops: of the steps"]
    lines += ["before the output repeats itself; nodes: draft nodes verified per step; verify, draft, glue add up to a step.", ""]
    lines += [*_latencies(bench, width), ""]
    if any(_is_disturbed(run) for run in bench.runs):
        lines += ["the machine was busy while steps were timed: they took longer than the runs they are part of", ""]
    return "\n".join(lines + [line for run in bench.runs[1:] for line in _rates(run)])


def _latencies(bench: Bench, width: int) -> list[str]:
    """Percentiles of a step and of the first token, one line a run."""
    lines = [f"{'':<{width}} {'step ms p50, p90, p99':<26} {'first token ms p50, p90, p99'}"]
    for name, step, first in latencies(bench):
        lines.append(f"{name:<{width}} {spread(step):<26} {spread(first)}")
    return lines


def latencies(bench: Bench) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    """Seconds of a step and to the first token by percentile, of everyone who decoded."""
    found = [(run.name, percentiles(run.step_times), percentiles(run.first_tokens)) for run in bench.runs]
    if bench.reference is not None:
        steps = [seconds for one in bench.reference for seconds in one.steps]
        first = [seconds for one in bench.reference for seconds in one.first_tokens]
        found.insert(0, (TRANSFORMERS, percentiles(steps), percentiles(first)))
    return found


def _is_disturbed(run: Run) -> bool:
    """All steps together took half as long again as the whole run, so the machine changed in between."""
    return run.parts is not None and sum(run.launches.values()) * run.parts.step > 1.5 * sum(run.seconds)


def _length(counted: Acceptance) -> str:
    return f"{counted.mean_length:.2f}" if counted.steps else "none"


def _rates(run: Run) -> list[str]:
    """Acceptance by depth and by rank; ranks of trees only."""
    outside = run.acceptance_outside_loops
    lines = [run.name, f"  per depth               {_numbers(run.acceptance.per_depth)}"]
    lines.append(f"  per depth, no loops     {_numbers(outside.per_depth)}  ({outside.steps} of {run.acceptance.steps} steps)")
    if not run.tree.is_chain:
        lines.append(f"  by sibling rank         {_numbers(run.acceptance.per_rank)}  (shares of the accepted nodes)")
    return lines


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values) or "none"


def sweep_table(swept: Sweep, model: str) -> str:
    """Times of steps, the best chain and tree at every size, and what follows."""
    times, lines = swept.times, [f"sweep of {swept.asked}: predicted from acceptance outside of loops and from step times"]
    for width, (first, level) in times.draft.items():
        kind = "chain" if width == 1 else f"top {width}"
        lines.append(f"  drafting, {kind:<6} first level {1000 * first:.3f} ms, each further level {1000 * level:.3f} ms")
    lines.append(f"  glue {1000 * swept.plain.glue:.3f} ms a step")
    head = f"{'best chain of at most N':<27} {'acc.':>5} {'tokens/s':>9}   {'best tree of N':<22} {'acc.':>5} {'tokens/s':>9}"
    lines += ["", f"{'N':>4} {'verify ms: chain':>17} {'tree':>8}   {head}  wins"]
    lines.append(f"{1:>4} {1000 * times.verify_at(1, True):>17.3f} {'':>8}   {_cells(swept.plain, 27)}")
    for row in swept.rows:
        tree_time = f"{1000 * times.verify_at(row.nodes, False):.3f}" if row.tree else ""
        winner = "" if not (row.chain and row.tree) else _winner(row.chain, row.tree)
        lines.append(
            f"{row.nodes:>4} {1000 * times.verify_at(row.nodes, True):>17.3f} {tree_time:>8}   {_cells(row.chain, 27)}"
            f"   {_cells(row.tree, 22)}  {winner}".rstrip()
        )
    if times.is_disturbed:
        lines += ["", "the machine was busy while steps were timed: some took longer than steps of more nodes"]
    return "\n".join([*lines, "", *_verdict(swept, model)])


def _cells(budget: Budget | None, width: int) -> str:
    if budget is None:
        return f"{'':<{width}} {'':>5} {'':>9}"
    return f"{_short(budget):<{width}} {budget.mean_length:>5.2f} {budget.tokens_per_second:>9.1f}"


def _short(budget: Budget) -> str:
    tree = budget.tree
    if not tree.max_draft_len:
        return "plain"
    if tree.is_chain:
        return f"L={tree.max_draft_len}"
    return f"K={tree.dynamic_tree_max_topk} D={tree.max_draft_len} M={tree.max_total_draft_tokens}"


def _winner(chain: Budget, tree: Budget) -> str:
    return "tree" if tree.tokens_per_second > chain.tokens_per_second else "chain"


def _verdict(swept: Sweep, model: str) -> list[str]:
    line, best = swept.best_chain, swept.best
    lines = []
    if line and swept.best_tree:
        better = [r.nodes for r in swept.rows if r.tree and r.tree.tokens_per_second > line.tokens_per_second]
        fair = [r.nodes for r in swept.rows if r.tree and r.chain and _winner(r.chain, r.tree) == "tree"]
        lines.append(
            f"a tree beats the best chain of any length ({_short(line)}) at N = {_listed(better)}" if better
            else f"no tree beats the best chain ({_short(line)}) in wall clock on this machine"
        )  # fmt: skip
        if fair != better:
            lines.append(f"a tree beats the best chain that verifies no more nodes at N = {_listed(fair)}")
    if not best.tree.max_draft_len:
        return [*lines, "best: plain decoding; no draft of this drafter pays here"]
    gain = best.tokens_per_second / swept.plain.tokens_per_second
    lines.append(f"best: {best.tree}, {best.tokens_per_second:.1f} tokens/s, {gain:.2f}x plain. Measure it with")
    return [*lines, f"  autospec bench {model} --speculation {swept.asked} {best.options}"]


def _listed(sizes: list[int]) -> str:
    """Sizes as in a sentence."""
    return ", ".join(map(str, sizes))


def as_json(bench: Bench) -> dict[str, Any]:
    """Everything that was measured, in seconds and shares."""
    plain = bench.runs[0]
    return {
        **bench.title,
        "runs": [*_reference_json(bench, plain), *(_run_json(run, plain, bench.reference_speed) for run in bench.runs)],
        "sweeps": [_sweep_json(one) for one in bench.sweeps],
        "differences": [dataclasses.asdict(one) for one in bench.differences],
        "selection": None if bench.selection is None else dataclasses.asdict(bench.selection),
    }


def _reference_json(bench: Bench, plain: Run) -> list[dict[str, Any]]:
    """transformers' generate as a run, if it was measured."""
    if bench.reference_speed is None:
        return []
    _, steps, first = latencies(bench)[0]
    return [{
        "name": TRANSFORMERS, "speculation": None, "tree": None, "tokens_per_second": bench.reference_speed,
        "speed_up": bench.reference_speed / plain.tokens_per_second, "is_identical": bench.reference_equals,
        "seconds": [one.seconds for one in bench.reference or ()], "acceptance": {"mean_acceptance_length": None, "per_depth": []},
        "step_seconds": None, "step_seconds_percentiles": steps, "first_token_seconds": first,
    }]  # fmt: skip


def _run_json(run: Run, plain: Run, baseline: float | None) -> dict[str, Any]:
    parts = run.parts
    return {
        "name": run.name,
        "speculation": run.asked or None,
        "tree": str(run.tree) if run.tree.max_draft_len else None,
        "tokens_per_second": run.tokens_per_second,
        "speed_up": run.tokens_per_second / plain.tokens_per_second,
        "speed_up_over_transformers": None if baseline is None else run.tokens_per_second / baseline,
        "is_identical": run.equals(plain),
        "seconds": run.seconds,
        "steps": {str(length): count for length, count in run.launches.items()},
        "acceptance": _acceptance_json(run.acceptance),
        "acceptance_outside_loops": _acceptance_json(run.acceptance_outside_loops),
        "nodes": [
            {"place": list(place), "offered_per_step": rate.offered, "accepted_per_step": rate.accepted}
            for place, rate in run.nodes.items()
        ],
        "step_seconds": None if parts is None else {
            "step": parts.step, "verify": parts.verify, "draft": parts.draft, "glue": parts.glue,
        },
        "step_seconds_percentiles": percentiles(run.step_times), "first_token_seconds": percentiles(run.first_tokens),
    }  # fmt: skip


def _acceptance_json(counted: Acceptance) -> dict[str, Any]:
    return {
        "steps": counted.steps, "mean_acceptance_length": counted.mean_length, "per_depth": counted.per_depth,
        "per_rank": counted.per_rank, "nodes_per_step": counted.nodes_per_step,
    }  # fmt: skip


def _sweep_json(swept: Sweep) -> dict[str, Any]:
    def budget(one: Budget | None) -> dict[str, Any] | None:
        return None if one is None else {
            "tree": str(one.tree), "options": one.options, "mean_acceptance_length": one.mean_length,
            "mean_acceptance_length_with_loops": one.mean_length_with_loops, "verify_seconds": one.verify,
            "draft_seconds": one.draft, "glue_seconds": one.glue, "tokens_per_second": one.tokens_per_second,
        }  # fmt: skip

    return {
        "speculation": swept.asked,
        "verify_seconds": [
            {"nodes": n, "is_chain": is_chain, "seconds": seconds} for (is_chain, n), seconds in swept.times.verify.items()
        ],
        "draft_seconds": [
            {"top_k": width, "first_level": first, "each_further_level": level}
            for width, (first, level) in swept.times.draft.items()
        ],
        "plain": budget(swept.plain),
        "rows": [{"nodes": row.nodes, "chain": budget(row.chain), "tree": budget(row.tree)} for row in swept.rows],
        "best": budget(swept.best),
    }

