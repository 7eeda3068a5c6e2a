"""What a run leaves: training.json, and a picture of its curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_report(record: Mapping[str, Any], folder: Path) -> None:
    """training.json and training.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    draw_curves(record["history"], folder / "training.png", str(record.get("title", "")))


def draw_curves(history: Mapping[str, Any], path: Path, title: str) -> None:
    """The loss, and the agreement of every step, against optimizer steps; held-out text where there is some."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for name, colour, marker in (("train", "#2b6cb0", ""), ("held_out", "#dd6b20", "o")):
            if history[name]:
                steps, losses = [point[0] for point in history[name]], [point[1] for point in history[name]]
                label = {"train": "training text", "held_out": "held-out text"}[name]
                left.plot(steps, losses, color=colour, lw=2, marker=marker, ms=4, label=label)
        left.set(xlabel="optimizer steps", ylabel="loss (nats per token)", title=title)
        left.legend(frameon=False)
        name = "held_out" if history["held_out"] else "train"
        depths = len(history[name][-1][2])
        for depth in range(depths):
            shares = [100 * point[2][depth] for point in history[name]]
            shade = plt.get_cmap("viridis")(0.9 * depth / max(1, depths - 1))
            right.plot([point[0] for point in history[name]], shares, color=shade, lw=1.8, label=f"draft token {depth + 1}")
        right.legend(frameon=False, fontsize=8)
        where = {"train": "training", "held_out": "held-out"}[name]
        right.set(xlabel="optimizer steps", ylabel=f"{where} tokens (%)", ylim=(0, None))
        right.set_title("the draft's best token is the target's", fontsize=10)
        for axes in (left, right):
            axes.grid(alpha=0.2)
        figure.savefig(path, dpi=130)
        plt.close(figure)
