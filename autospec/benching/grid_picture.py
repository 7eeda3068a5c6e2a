"""The picture of a bench by batch size and prompt length: tokens/s, a step, the first token; one row a prompt length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autospec.benching.contenders import TRANSFORMERS
from autospec.benching.grid import PLAIN, Cell
from autospec.benching.picture import BARS, INK

# Those who are compared with keep their colours whoever else takes part.
FIXED = {TRANSFORMERS: "#c9ced6", PLAIN: BARS[0]}


def draw(cells: Sequence[Cell], title: str, file: Path) -> None:
    """Grouped bars from zero, one group a batch size; whiskers reach from the median to the 99th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = list(dict.fromkeys(cell.prompt_len for cell in cells))
    names = [one.name for one in cells[0].results]
    others = iter(BARS[1:] * len(names))
    colours = {name: FIXED.get(name) or next(others) for name in names}
    figure, axes = plt.subplots(len(lengths), 3, figsize=(15, 1.3 + 3.4 * len(lengths)), layout="constrained", squeeze=False)
    for row, length in zip(axes, lengths, strict=True):
        here = [cell for cell in cells if cell.prompt_len == length]
        told = f"prompts of {length} tokens" if length else "prompts as given"
        _bars(row[0], here, colours, lambda one: (one.tokens_per_second, None), f"tokens per second, {told}", ",.0f")
        _bars(row[1], here, colours, lambda one: _spread(one.step), f"ms per step, {told}", ".1f")
        _bars(row[2], here, colours, lambda one: _spread(one.first_token), f"ms to the first token, {told}", ".1f")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, colours, loc="outside lower center", ncols=min(3, len(names)), frameon=False, fontsize=9)
    figure.suptitle(f"{title}\nbars are medians, whiskers reach the 99th percentile", fontsize=11, color=INK)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _spread(found: dict[str, float]) -> tuple[float, float | None]:
    """Median and 99th percentile in milliseconds."""
    return (1000 * found["50"], 1000 * found["99"]) if found else (0.0, None)


def _bars(axis: Any, cells: Sequence[Cell], colours: dict[str, str], value: Any, label: str, digits: str) -> None:
    width = 0.84 / len(colours)
    highest = 0.0
    for group, cell in enumerate(cells):
        for place, one in enumerate(cell.results):
            height, top = value(one)
            x = group + (place - (len(colours) - 1) / 2) * width
            error = None if top is None else [[0.0], [top - height]]
            axis.bar(x, height, width * 0.92, color=colours[one.name], yerr=error, capsize=2, ecolor=INK,
                     error_kw={"linewidth": 0.9})  # fmt: skip
            highest = max(highest, height, top or 0.0)
            axis.annotate(format(height, digits), (x, 0), textcoords="offset points", xytext=(0, 3), ha="center", va="bottom",
                          fontsize=8, rotation=90 * (len(cells) * len(colours) > 8), color=_on(colours[one.name]))  # fmt: skip
    axis.set_ylim(0, highest * 1.06 or 1)
    axis.set_xticks(range(len(cells)), [f"batch {cell.batch}" for cell in cells])
    axis.tick_params(axis="x", length=0)
    axis.set_title(label, fontsize=10, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.2)
    axis.set_axisbelow(True)


def _on(colour: str) -> str:
    """What can be read on a bar of this colour."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return INK if 0.3 * red + 0.6 * green + 0.1 * blue > 150 else "white"
