"""Pictures of the explain page, as SVG text: a draft tree, bars, lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from autospec.trees import DraftTree

COLOURS = ("#1f6feb", "#1a7f4b", "#b7791f", "#8957e5", "#b3362b", "#2b8a9e")
_WIDTH = 560
_LARGEST = 160  # nodes of a level that are drawn; a static tree may have more


def tree_picture(tree: DraftTree) -> tuple[str, str]:
    """A picture of what a step verifies, and a sentence about it; ("", "") where nothing is drafted."""
    if tree.max_draft_len == 0:
        return "", ""
    if tree.is_chain:
        levels = [1] * (tree.max_draft_len + 1)
        return _graph(levels, _one_to_one(levels)), f"{tree}: the root and one draft token after another."
    if tree.choices:
        number = {path: place for depth in range(tree.max_draft_len) for place, path in enumerate(tree.level(depth))} | {(): 0}
        levels = [1, *(len(tree.level(depth)) for depth in range(tree.max_draft_len))]
        edges = [(len(path) - 1, number[path[:-1]], number[path]) for path in tree.choices]
        labels = {(len(path), number[path]): str(path[-1] + 1) for path in tree.choices}
        return _graph(levels, edges, labels), f"{tree}: a node's number is its rank among its siblings."
    width = tree.dynamic_tree_max_topk
    levels = [1, *[width] * tree.max_draft_len]
    edges = [(0, 0, child) for child in range(width)]
    edges += [(level, a, b) for level in range(1, tree.max_draft_len) for a in range(width) for b in range(width)]
    return _graph(levels, edges, faint=True), (
        f"{tree}: every level keeps the {width} best children of the {width} nodes above it, whoever their parents are; "
        f"the {tree.max_total_draft_tokens} best nodes of all levels are verified."
    )


def _one_to_one(levels: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(level, 0, 0) for level in range(len(levels) - 1)]


def _graph(
    levels: Sequence[int], edges: Sequence[tuple[int, int, int]], labels: Mapping[tuple[int, int], str] | None = None,
    faint: bool = False,
) -> str:  # fmt: skip
    """Levels from left to right; an edge is (level, place in it, place in the next one)."""
    most = min(max(levels), _LARGEST)
    step, gap = 92, max(13, min(30, 420 // most))
    height, width = most * gap + 40, (len(levels) - 1) * step + 80
    radius = min(9, gap / 2 - 1)

    def at(level: int, place: int) -> tuple[float, float]:
        return 40 + level * step, height / 2 - 8 + (place - (levels[level] - 1) / 2) * gap

    parts = []
    for level, above, below in edges:
        (x, y), (u, v) = at(level, above), at(level + 1, below)
        middle = (x + u) / 2
        parts.append(f'<path d="M{x:.0f} {y:.1f}C{middle:.0f} {y:.1f} {middle:.0f} {v:.1f} {u:.0f} {v:.1f}" fill="none" '
                     f'class="edge" stroke-width="1.3" opacity="{0.35 if faint else 0.9}"/>')  # fmt: skip
    for level, count in enumerate(levels):
        for place in range(count):
            x, y = at(level, place)
            colour = 'class="root"' if level == 0 else f'fill="{COLOURS[0]}"'
            parts.append(f'<circle cx="{x:.0f}" cy="{y:.1f}" r="{radius:.1f}" {colour}/>')
            label = (labels or {}).get((level, place))
            if label and radius >= 6:
                style = "fill:#fff;font-size:10px"
                parts.append(f'<text x="{x:.0f}" y="{y + 4:.1f}" text-anchor="middle" style="{style}">{label}</text>')
        name = "root" if level == 0 else f"depth {level}"
        parts.append(f'<text class="soft" x="{at(level, 0)[0]:.0f}" y="{height - 4:.0f}" text-anchor="middle">{name}</text>')
    style = f"max-width:{width}px"
    return f'<svg viewBox="0 0 {width} {height:.0f}" style="{style}" role="img" aria-label="draft tree">{"".join(parts)}</svg>'


def colours(names: Sequence[str]) -> dict[str, str]:
    """The colour of each name, the same in every chart."""
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(dict.fromkeys(names))}


def bars(values: Sequence[tuple[str, float]], unit: str, notes: Sequence[str] = ()) -> str:
    """One bar a name, from zero, with a note behind each value."""
    most, shades = max((value for _, value in values), default=0) or 1, colours([name for name, _ in values])
    parts = []
    for row, (name, value) in enumerate(values):
        y, length = 8 + row * 40, value / most * (_WIDTH - 170)
        note = f", {notes[row]}" if notes and notes[row] else ""
        parts.append(f'<text x="0" y="{y + 10}">{escape(name)}</text>'
                     f'<rect x="0" y="{y + 15}" width="{length:.1f}" height="14" rx="3" fill="{shades[name]}"/>'
                     f'<text class="soft" x="{length + 8:.1f}" y="{y + 27}">{value:.0f} {escape(unit + note)}</text>')  # fmt: skip
    return _svg("".join(parts), 16 + len(values) * 40, "speed") if values else ""


def spreads(values: Sequence[tuple[str, Mapping[str, float]]], shades: Mapping[str, str]) -> str:
    """Seconds at the 50th, 90th and 99th percentile, one line a name, in milliseconds from zero."""
    most = max((max(found.values()) for _, found in values), default=0) or 1
    parts = []
    for row, (name, found) in enumerate(values):
        y, at = 8 + row * 40, [8 + seconds / most * (_WIDTH - 230) for seconds in found.values()]
        told = " / ".join(f"{1000 * seconds:.2f}" for seconds in found.values())
        level, line = f'y1="{y + 22}" y2="{y + 22}"', f'stroke="{shades[name]}" stroke-width="3"'
        parts.append(f'<text x="0" y="{y + 10}">{escape(name)}</text>'
                     f'<line x1="0" x2="{_WIDTH - 222}" {level} class="rule"/>'
                     f'<line x1="{at[0]:.1f}" x2="{at[-1]:.1f}" {level} {line}/>'
                     f'<text class="soft" x="{_WIDTH - 212}" y="{y + 26}">{told} ms</text>')  # fmt: skip
        parts += [f'<circle cx="{x:.1f}" cy="{y + 22}" r="{6 if x == at[0] else 4}" fill="{shades[name]}"/>' for x in reversed(at)]
    return _svg("".join(parts), 16 + len(values) * 40, "percentiles") if values else ""


def depth_lines(values: Sequence[tuple[str, Sequence[float]]], shades: Mapping[str, str]) -> str:
    """Shares by depth, one line a name."""
    if not values:
        return ""
    deepest, left, top, bottom = max(len(rates) for _, rates in values), 40, 10, 190
    step = (_WIDTH - left - 20) / max(1, deepest - 1)
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - share * (bottom - top)
        parts.append(f'<line x1="{left}" x2="{_WIDTH}" y1="{y}" y2="{y}" class="rule"/>'
                     f'<text class="soft" x="{left - 6}" y="{y + 4}" text-anchor="end">{share:g}</text>')  # fmt: skip
    for depth in range(deepest):
        parts.append(f'<text class="soft" x="{left + depth * step:.0f}" y="{bottom + 18}" text-anchor="middle">{depth + 1}</text>')
    for row, (name, rates) in enumerate(values):
        colour = shades[name]
        points = [(left + depth * step, bottom - rate * (bottom - top)) for depth, rate in enumerate(rates)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points]
        parts.append(f'<rect x="{left}" y="{bottom + 30 + row * 20}" width="12" height="12" rx="3" fill="{colour}"/>'
                     f'<text x="{left + 18}" y="{bottom + 41 + row * 20}">{escape(name)}</text>')  # fmt: skip
    return _svg("".join(parts), bottom + 36 + len(values) * 20, "acceptance per depth")


def stacked(values: Sequence[tuple[str, Mapping[str, float]]], names: Sequence[str]) -> str:
    """Seconds by part, one bar a name, in milliseconds."""
    most = max(sum(parts[name] for name in names) for _, parts in values) or 1
    drawn = []
    for row, (title, parts) in enumerate(values):
        y, x = 8 + row * 40, 0.0
        drawn.append(f'<text x="0" y="{y + 10}">{escape(title)}</text>')
        for index, name in enumerate(names):
            length = max(0.0, parts[name]) / most * (_WIDTH - 120)
            drawn.append(f'<rect x="{x:.1f}" y="{y + 15}" width="{length:.1f}" height="14" fill="{COLOURS[index]}"/>')
            x += length
        total = sum(parts[name] for name in names) * 1e3
        drawn.append(f'<text class="soft" x="{x + 8:.1f}" y="{y + 27}">{total:.2f} ms</text>')
    bottom = 20 + len(values) * 40
    for index, name in enumerate(names):
        drawn.append(f'<rect x="{index * 90}" y="{bottom}" width="12" height="12" rx="3" fill="{COLOURS[index]}"/>'
                     f'<text x="{index * 90 + 18}" y="{bottom + 11}">{escape(name)}</text>')  # fmt: skip
    return _svg("".join(drawn), bottom + 20, "time of a step")


def _svg(content: str, height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{content}</svg>'
