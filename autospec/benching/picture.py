"""The picture of a bench: tokens/s, and every draft with its acceptance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from autospec.benching.contenders import TRANSFORMERS
from autospec.benching.record import Key, NodeRate
from autospec.benching.results import Bench, Run
from autospec.benching.sweep import Sweep
from autospec.benching.text import latencies
from autospec.trees import DraftTree

BARS = ["#8d99ae", "#457b9d", "#2a9d8f", "#e76f51", "#9c6644", "#6d597a"]
GREY, INK = "#c9ced6", "#22333b"


def draw(bench: Bench, file: Path) -> None:
    """Bars in the first panel, then one panel for each drafter, then one for each sweep."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    drafted = [run for run in bench.runs if not run.is_plain and run.nodes]
    count = 2 + len(drafted) + len(bench.sweeps)
    columns = min(count, 2 if count in (2, 4) else 3)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.6 * columns, 4.2 * rows), layout="constrained", squeeze=False)
    places = list(axes.flat)
    _bars(places[0], bench)
    _latencies(places[1], bench)
    shades = ScalarMappable(Normalize(0, 1), "YlGnBu")
    for axis, run in zip(places[2:], drafted, strict=False):
        _draft(axis, run, shades)
    for axis, one in zip(places[2 + len(drafted) :], bench.sweeps, strict=False):
        _sweep(axis, one)
    for axis in places[count:]:
        axis.set_axis_off()
    if drafted:
        bar = figure.colorbar(shades, ax=places[2 : 2 + len(drafted)], shrink=0.6, aspect=30, pad=0.01)
        bar.set_label("accepted, of the nodes verified there", fontsize=9)
        bar.outline.set_visible(False)
    facts = bench.title
    figure.suptitle(", ".join(str(facts[name]) for name in ("model", "dtype", "device", "torch")), fontsize=11)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _bars(axis: Any, bench: Bench) -> None:
    runs, facts = bench.runs, bench.title
    named = [(run.name, run.tokens_per_second) for run in runs]
    if bench.reference_speed is not None:
        named.insert(0, (TRANSFORMERS, bench.reference_speed))
    speeds = [speed for _, speed in named]
    bars = axis.barh(range(len(named)), speeds, color=list(_colours(bench).values()), height=0.5)
    labels = [f"{speed:,.0f}  ({speed / runs[0].tokens_per_second:.2f}x)" for speed in speeds]
    axis.bar_label(bars, labels, padding=4, fontsize=9)
    for place, (name, _) in enumerate(named):
        axis.text(0, place - 0.36, name, fontsize=8.5, color=INK, va="center")
    axis.set_xlim(0, max(speeds) * 1.35)
    axis.set_ylim(len(named) - 0.5, -0.75)
    axis.set_yticks([])
    axis.set_xlabel(f"tokens per second, {'identical tokens' if bench.is_identical else 'TOKENS DIFFER'}; x of plain decoding")
    axis.set_title(f"{facts['prompts']}, {facts['new_tokens']}\n{facts['decoding']}, {facts['compile']}", fontsize=9.5, color=INK)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _colours(bench: Bench) -> dict[str, str]:
    """One colour for everyone who decodes; those who are compared with keep theirs whoever else takes part."""
    fixed = {TRANSFORMERS: GREY} if bench.reference is not None else {}
    return fixed | {run.name: BARS[0] if run.is_plain else BARS[1 + i % (len(BARS) - 1)] for i, run in enumerate(bench.runs, -1)}


def _latencies(axis: Any, bench: Bench) -> None:
    """A step and the first token: a line from the median to the 99th percentile, marks at 50, 90 and 99."""
    told, colours = latencies(bench), _colours(bench)
    for place, (name, step, first) in enumerate(told):
        for offset, found, marker in ((-0.02, step, "o"), (0.24, first, "s")):
            times = [1000 * seconds for seconds in found.values()]
            if not times:
                continue
            axis.plot([times[0], times[-1]], [place + offset] * 2, color=colours[name], linewidth=2, zorder=1)
            axis.scatter(times, [place + offset] * len(times), s=(52, 26, 26), marker=marker, color=colours[name], edgecolor=INK,
                         linewidth=0.6, zorder=2)  # fmt: skip
            axis.annotate(f"{times[0]:.1f}", (times[0], place + offset), textcoords="offset points", xytext=(-6, 0), ha="right",
                          va="center", fontsize=7.5, color=INK)  # fmt: skip
        axis.text(0.01, place - 0.3, name, fontsize=8.5, color=INK, va="center", transform=axis.get_yaxis_transform())
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(low / 1.6, high * 1.1)
    axis.set_ylim(len(told) - 0.4, -0.6)
    axis.set_yticks([])
    axis.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, place: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.set_xlabel("milliseconds (log); round: a step, square: the first token; 50, 90, 99%")
    axis.set_title("latency", fontsize=9.5, color=INK)
    axis.grid(axis="x", alpha=0.25, which="both")
    axis.spines[["top", "right", "left"]].set_visible(False)


def _draft(axis: Any, run: Run, shades: Any) -> None:
    counted, outside = run.acceptance, run.acceptance_outside_loops
    length = outside.mean_length if outside.steps else counted.mean_length
    axis.set_title(f"{run.name}\n{length:.2f} tokens per step outside of loops" if outside.steps else
                   f"{run.name}\n{length:.2f} tokens per step, all inside loops", fontsize=9.5, color=INK)  # fmt: skip
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axis.tick_params(length=0)
    if run.tree.dynamic_tree_max_topk:
        _grid(axis, run.nodes, shades)
    else:
        _tree(axis, run.nodes, run.tree, shades)


def _tree(axis: Any, rates: dict[Key, NodeRate], tree: DraftTree, shades: Any) -> None:
    """Nodes by depth and order; colour is acceptance, area and edges are how often the accepted path comes by."""
    paths: list[Key] = list(tree.choices) or [(0,) * depth for depth in range(1, tree.max_draft_len + 1)]
    height = _layout([(), *paths])
    small = len(paths) > 24
    for path in paths:
        rate = rates.get(path, NodeRate(0.0, 0.0))
        parent, depth = path[:-1], len(path)
        axis.plot([depth - 1, depth], [height[parent], height[path]], color=GREY if not rate.accepted else INK, zorder=1,
                  linewidth=0.6 + 4 * rate.accepted, solid_capstyle="round", alpha=0.35 + 0.4 * rate.accepted)  # fmt: skip
        axis.scatter(depth, height[path], s=(25 if small else 60) + (420 if small else 900) * rate.accepted, zorder=2,
                     color=shades.to_rgba(rate.rate), edgecolor=INK, linewidth=0.7)  # fmt: skip
        if not small or rate.accepted >= 0.1:
            axis.annotate(f"{100 * rate.rate:.0f}%", (depth, height[path]), textcoords="offset points", zorder=3,
                          xytext=(0, -_below(rate, small)), ha="center", va="top", fontsize=7, color=INK)  # fmt: skip
    axis.scatter(0, height[()], s=60, marker="s", color=INK, zorder=2)
    axis.set_xlim(-0.35, tree.max_draft_len + 0.5)
    low, high = min(height.values()), max(height.values())
    margin = 0.16 * (high - low) + 0.6
    axis.set_ylim(high + margin, low - margin)
    axis.set_xticks(range(tree.max_draft_len + 1), ["root", *range(1, tree.max_draft_len + 1)])
    axis.set_xlabel("depth in the draft")
    axis.set_yticks([])


def _below(rate: NodeRate, small: bool) -> float:
    """Points from a node's centre to below its rim."""
    return math.sqrt(((25 if small else 60) + (420 if small else 900) * rate.accepted) / math.pi) + 2


def _layout(paths: list[Key]) -> dict[Key, float]:
    """Leaves one below the other, every parent on the line of its first child."""
    height: dict[Key, float] = {}
    known, lines = set(paths), 0.0

    def place(path: Key) -> None:
        nonlocal lines
        children = sorted(one for one in known if one[:-1] == path and len(one) == len(path) + 1)
        if not children:
            height[path] = lines
            lines += 1
            return
        for child in children:
            place(child)
        height[path] = height[children[0]]

    place(())
    return height


def _grid(axis: Any, rates: dict[Key, NodeRate], shades: Any) -> None:
    """By depth and sibling rank; colour is acceptance of a node, area how many are verified there in a step."""
    most = max(rate.offered for rate in rates.values())
    for (depth, rank), rate in rates.items():
        axis.scatter(depth, rank, s=40 + 900 * rate.offered / most, color=shades.to_rgba(rate.rate), edgecolor=INK,
                     linewidth=0.7, zorder=2)  # fmt: skip
        radius = math.sqrt((40 + 900 * rate.offered / most) / math.pi)
        axis.annotate(f"{100 * rate.rate:.0f}% of {rate.offered:.1f}", (depth, rank), textcoords="offset points",
                      xytext=(0, -radius - 2), ha="center", va="top", fontsize=7, color=INK)  # fmt: skip
    depths, ranks = (sorted({place[i] for place in rates}) for i in (0, 1))
    axis.set_xlim(0.4, depths[-1] + 0.6)
    axis.set_ylim(ranks[-1] + 0.75, -0.6)
    axis.set_xticks(depths)
    axis.set_yticks(ranks, [f"child {rank + 1}" for rank in ranks])
    axis.set_xlabel("depth in the draft; area: nodes verified per step")
    axis.grid(alpha=0.2, zorder=0)


def _sweep(axis: Any, swept: Sweep) -> None:
    """Predicted tokens/s by the nodes that a step verifies."""
    axis.axhline(swept.plain.tokens_per_second, color=BARS[0], linewidth=1.2)
    axis.text(0.99, swept.plain.tokens_per_second, "plain", fontsize=8, color=BARS[0], va="bottom", ha="right",
              transform=axis.get_yaxis_transform())  # fmt: skip
    for kind, colour in (("chain", BARS[1]), ("tree", BARS[3])):
        points = [(row.nodes, getattr(row, kind)) for row in swept.rows if getattr(row, kind) is not None]
        if not points:
            continue
        axis.plot([n for n, _ in points], [one.tokens_per_second for _, one in points], marker="o", color=colour,
                  label="best chain of at most N" if kind == "chain" else "best tree of N")  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xticks([row.nodes for row in swept.rows], [str(row.nodes) for row in swept.rows])
    axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    axis.set_title(f"{swept.asked}: predicted\nbest: {swept.best.tree}", fontsize=9.5, color=INK)
    axis.set_xlabel("nodes verified per step (N)")
    axis.set_ylabel("tokens per second")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)
