"""explain --html: one page that needs nothing else, with the pipeline, every pass's diff, the draft tree and the charts."""

from __future__ import annotations

import difflib
import string
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from autospec.debug import PassText
from autospec.ir.passes import PassRecord
from autospec.program import Described, Program
from autospec.report import KernelRow, kernel_rows, memory_bytes
from autospec.report_charts import bars, colours, depth_lines, spreads, stacked, tree_picture

_ORDER = ("capture", "understand", "specialise", "cache", "widen", "speculate", "optimise", "select")
_NUMBERS = ("calls", "hits", "nodes", "ms")
_TEMPLATE = Path(__file__).with_name("report_page.html")


def page(
    target: Described, draft: Described | None, program: Program, texts: Sequence[PassText], bench: Mapping[str, Any] | None = None
) -> str:
    """The page as text.

    Args:
        texts: what passes changed, in order; their diffs are shown.
        bench: what `autospec bench --json` wrote.
    """
    facts, shape = target.facts, program.shape
    records = [*target.records, *(draft.records if draft else ()), *program.records]
    dtype = str(facts.dtype).removeprefix("torch.")
    subtitle = (
        f"{facts.num_kv_layers} KV layers, vocabulary {facts.vocab_size}, {facts.max_positions} positions, "
        f"{dtype} on {facts.device}" + (f"; draft {draft.facts.name}" if draft else "")
    )
    sections = {
        "program": ("Program", _cards(program)),
        "pipeline": ("Pipeline", _flow(records, texts)),
        "tree": ("Draft", _figure(*tree_picture(shape.tree))),
        "charts": ("Measured", charts(bench)),
        "kernels": ("Kernels", _kernels(kernel_rows(program))),
        "table": ("Every pass", _table(records)),
        "diffs": ("What changed", _diffs(texts)),
    }
    sections = {key: value for key, value in sections.items() if value[1]}
    body = "\n".join(f'<section id="{key}"><h2>{title}</h2>{text}</section>' for key, (title, text) in sections.items())
    links = "".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in sections.items())
    return string.Template(_TEMPLATE.read_text()).substitute(
        title=escape(f"{facts.name}, compiled by autospec"), subtitle=escape(subtitle), links=links, body=body
    )


def _cards(program: Program) -> str:
    shape, sizes = program.shape, memory_bytes(program)
    facts = {
        "rows": shape.batch_size, "tokens per row": shape.max_length, "draft": str(shape.tree),
        "decoding": "sampling" if shape.sampling else "greedy",
        "graphs": ", ".join(program.graphs), "pages": f"{shape.num_pages} of {shape.page_size}",
        "weights": _size(sizes["weights"]), "K/V pages": _size(sizes["pages"]), "other state": _size(sizes["state"]),
    }  # fmt: skip
    return '<div class="cards">' + "".join(
        f'<div class="card"><b>{escape(str(value))}</b><span>{name}</span></div>' for name, value in facts.items()
    ) + "</div>"  # fmt: skip


def _size(count: int) -> str:
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next(((unit, name) for unit, name in units if count >= unit), (1, "bytes"))
    return f"{count / unit:.3g} {name}"


def _flow(records: Iterable[PassRecord], texts: Sequence[PassText]) -> str:
    """Stages in the order in which a graph of the target meets them, passes with their hits over all graphs."""
    stages: dict[str, dict[str, int]] = {stage: {} for stage in _ORDER}
    for record in records:
        passes = stages.setdefault(record.stage, {})
        passes[record.name] = passes.get(record.name, 0) + record.count
    first = {text.name: number for number, text in reversed(list(enumerate(texts)))}

    def one(name: str, hits: int) -> str:
        target = f' href="#d{first[name]}"' if name in first else ""
        return f'<a class="pass{"" if hits else " idle"}"{target}>{escape(name)} · {hits}</a>'

    return '<p>Stages and passes; the number counts changed places in all graphs.</p><div class="flow">' + "".join(
        f'<div class="stage"><h3>{escape(stage)}</h3>{"".join(one(*item) for item in passes.items())}</div>'
        for stage, passes in stages.items() if passes
    ) + "</div>"  # fmt: skip


def _table(records: Iterable[PassRecord]) -> str:
    rows = []
    for record in records:
        told = "".join(f'<div class="told">{escape(detail)}</div>' for detail in record.details)
        told += "".join(
            f'<div class="why">left alone{escape(f" ({one.module})" if one.module else "")}: {escape(one.reason)}</div>'
            for one in record.refusals
        )
        rows.append(
            f'<tr><td class="m">{escape(record.graph)}</td><td>{escape(record.stage)}</td><td class="m">{escape(record.name)}</td>'
            f'<td class="n">{record.count}</td><td class="n">{record.nodes_before} → {record.nodes_after}</td>'
            f'<td class="n">{record.seconds * 1e3:.1f}</td><td class="i">{told}</td></tr>'
        )
    return _with_head(("graph", "stage", "pass", "hits", "nodes", "ms", "notes and refusals"), "".join(rows))


def _with_head(names: Sequence[str], rows: str) -> str:
    """A table that scrolls by itself; heads of numbers stand on the right, over them."""
    head = "".join(f'<th class="n">{name}</th>' if name in _NUMBERS else f"<th>{name}</th>" for name in names)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _kernels(rows: Sequence[KernelRow]) -> str:
    """What runs each op, where, and who would not."""
    if not rows:
        return ""
    cells = "".join(
        f'<tr><td class="m">{escape(row.graph)}</td><td class="m">{escape(row.op)}</td><td class="m">{escape(row.backend)}</td>'
        f'<td class="n">{row.count}</td><td>{escape(row.layers)}</td><td class="i">'
        + "".join(f'<div class="why">{escape(reason)}</div>' for reason in row.refusals) + "</td></tr>"
        for row in rows
    )  # fmt: skip
    return _with_head(("graph", "op", "runs on", "calls", "layers", "who would not, and why"), cells)


def _diffs(texts: Sequence[PassText]) -> str:
    if not texts:
        return ""
    shown = []
    for number, text in enumerate(texts):
        lines = list(difflib.unified_diff(text.before.splitlines(), text.after.splitlines(), lineterm="", n=2))[2:]
        kinds = {"+": "a", "-": "d", "@": "h"}
        added, removed = (sum(line[:1] == sign for line in lines) for sign in "+-")
        body = "".join(f'<i class="{kinds.get(line[:1], "")}">{escape(line)}</i>' for line in lines)
        shown.append(
            f'<details id="d{number}"><summary>{escape(text.name)} <em>{escape(text.graph)}, {escape(text.stage)}</em> '
            f'<span class="add">+{added}</span> <span class="del">-{removed}</span></summary><pre>{body}</pre></details>'
        )
    return "<p>The graph's text before and after each pass that changed it. Press / to search.</p>" + "".join(shown)


def charts(bench: Mapping[str, Any] | None) -> str:
    """Pictures of what a bench measured.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is not what a bench wrote.
    """
    if bench is None:
        return ""
    runs = bench["runs"]
    shades = colours([run["name"] for run in runs])
    ratios = [f"{run['speed_up']:.2f}x plain" if run.get("speed_up") else "" for run in runs]
    speed = bars([(run["name"], run["tokens_per_second"]) for run in runs], "tokens/s", ratios)
    drafted = [(run["name"], run["acceptance"]["per_depth"]) for run in runs if run["acceptance"]["per_depth"]]
    depth = depth_lines(drafted, shades)
    figures = [_figure(speed, "New tokens per second, prefill included."),
               _figure(depth, "Share of steps whose first drafts, up to this depth, were all accepted.")]  # fmt: skip
    for key, caption in (("step_seconds_percentiles", "A step"), ("first_token_seconds", "Time to the first token")):
        found = [(run["name"], run[key]) for run in runs if run.get(key)]
        figures.append(_figure(spreads(found, shades), f"{caption}: median (large dot), 90th and 99th percentile."))
    parts = [(run["name"], run["step_seconds"]) for run in runs if run.get("step_seconds")]
    if parts:
        figures.append(_figure(stacked(parts, ("verify", "draft", "glue")), "Milliseconds of one step by its parts."))
    return f'<div class="charts">{"".join(figure for figure in figures if figure)}</div>'


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>" if picture else ""
