"""A grid as a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autospec.benching.contenders import TRANSFORMERS, spread
from autospec.benching.grid import PLAIN, Cell, Result
from autospec.benching.grid_picture import draw
from autospec.benching.selection import Selection

DIFFERS = "some tokens differ; in bfloat16 and float16 a near-tie can flip when a shape changes"


def report(
    cells: Sequence[Cell], title: Mapping[str, Any], json_file: Path | None, picture: Path | None,
    selection: Selection | None = None,
) -> int:  # fmt: skip
    """Print and save; 0 if all tokens that must be the same are."""
    print("\n" + table(cells))
    if selection is not None:
        print("\n" + selection.text())
    if json_file is not None:
        told = {} if selection is None else {"selection": dataclasses.asdict(selection)}
        json_file.write_text(json.dumps({**title, "runs": as_json(cells), **told}, indent=1) + "\n")
    if picture is not None:
        draw(cells, ", ".join(str(title[name]) for name in ("model", "dtype", "device", "torch", "compile")), picture)
        print(f"\npicture: {picture}")
    is_identical = all(one.equals is not False for cell in cells for one in cell.results)
    if not is_identical:
        told_apart = [f"{cell.name}: {one.differences}" for cell in cells for one in cell.results if one.differences]
        print("\n" + "\n".join([*told_apart, DIFFERS]))
    return 0 if is_identical else 1


def table(cells: Sequence[Cell]) -> str:
    """One block a cell, one line a contender."""
    width = max(len(one.name) for cell in cells for one in cell.results) + 1
    lines: list[str] = []
    for cell in cells:
        speeds = {f"vs {name.split()[0]}": cell.speed(name) for name in (TRANSFORMERS, PLAIN)}
        columns = [name for name, speed in speeds.items() if speed is not None]
        lines += [
            "", cell.name,
            f"{'':<{width}} {'tokens/s':>9}" + "".join(f" {name:>15}" for name in columns)
            + f" {'identical':>10} {'accepted':>9}   {'step ms p50, p90, p99':<26} {'first token ms p50, p90, p99':<28}",
        ]  # fmt: skip
        for one in cell.results:
            ratios = "".join(f" {one.tokens_per_second / (speeds[name] or 1):>14.2f}x" for name in columns)
            same = {True: "yes", False: "NO", None: ""}[one.equals] if one.asked_length is None else "synthetic"
            length = "" if one.length is None else f"{one.length:.2f}"
            lines.append(
                f"{one.name:<{width}} {one.tokens_per_second:>9.1f}{ratios} {same:>10} {length:>9}   "
                f"{spread(one.step):<26} {spread(one.first_token):<28}".rstrip()
            )
    return "\n".join(lines[1:])


def as_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One run a contender and cell; seconds, shares, tokens per second."""
    return [
        {
            "name": one.name if len(cells) == 1 else f"{one.name}, {cell.name}",
            "batch_size": cell.batch, "prompt_length": cell.prompt_len,
            "tokens_per_second": one.tokens_per_second,
            "speed_up": _ratio(one, cell, PLAIN), "speed_up_over_transformers": _ratio(one, cell, TRANSFORMERS),
            "is_identical": one.equals, "differences": one.differences, "synthetic_acceptance_length": one.asked_length,
            "acceptance": {"mean_acceptance_length": one.length, "per_depth": one.per_depth},
            "step_seconds_percentiles": one.step, "first_token_seconds": one.first_token, "step_seconds": None,
        }
        for cell in cells for one in cell.results
    ]  # fmt: skip


def _ratio(one: Result, cell: Cell, name: str) -> float | None:
    speed = cell.speed(name)
    return None if speed is None else one.tokens_per_second / speed
