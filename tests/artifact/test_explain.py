"""explain: the kernels by layer, and a page that is whole, escaped and searchable in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.artifacts import tiny_optimized

import autospec
from autospec import debug
from autospec.debug import PassText
from autospec.report import kernel_table, ranges
from autospec.report_charts import COLOURS, bars, colours, depth_lines, spreads, stacked, tree_picture
from autospec.report_html import page
from autospec.trees import chain, dynamic_tree, static_tree

BENCH: dict[str, Any] = {"runs": [
    {"name": "plain", "tokens_per_second": 100.0, "acceptance": {"per_depth": []}, "step_seconds": None},
    {"name": "<b>eagle</b>", "tokens_per_second": 250.0, "speed_up": 2.5, "acceptance": {"per_depth": [0.9, 0.5]},
     "step_seconds_percentiles": {"50": 0.004, "90": 0.005, "99": 0.02}, "first_token_seconds": {"50": 0.1, "90": 0.1, "99": 0.1},
     "step_seconds": {"step": 0.004, "verify": 0.002, "draft": 0.0015, "glue": 0.0005}},
]}  # fmt: skip


@pytest.fixture(scope="module")
def explained(written: Callable[[str], Path]) -> str:
    saved = autospec.load(written("ngram"), compile="eager")
    texts = [*saved.artifact.texts(), PassText("graph", "stage", "planted", "%a = <i>\n", "%a = <script>alert(1)</script>\n")]
    return page(saved.target, saved.draft, saved.program, texts, BENCH)


def test_kernels_are_told_by_layer(written: Callable[[str], Path]) -> None:
    lines = kernel_table(autospec.load(written("ngram"), compile="eager").program)
    (attention,) = [line.split() for line in lines if "step_4" in line and "paged_attention" in line]
    assert attention[2] in ("cpu", "reference")
    assert attention[-2:] == ["layers", "0-1"]
    assert [ranges(numbers) for numbers in ([], [3], [0, 1, 2], [0, 2, 3, 7])] == ["", "3", "0-2", "0, 2-3, 7"]


def test_the_page_is_whole_and_escaped(explained: str) -> None:
    assert not re.search(r"""(?:src|href)=["']?(?:https?:|//)|@import|url\(""", explained), "nothing is fetched"
    assert explained.count("<script>") == 1, "text of graphs and names of runs is not markup"
    assert "&lt;script&gt;alert(1)" in explained
    assert "&lt;b&gt;eagle" in explained
    for section in ("program", "pipeline", "tree", "charts", "kernels", "table", "diffs"):
        assert f'<section id="{section}">' in explained
    diffs = dict(re.findall(r"<details id=\"d\d+\"><summary>([\w-]+) .*?<pre>(.*?)</pre>", explained))
    assert "+%append_kv" in diffs["page-kv-cache"]
    assert 'class="d">-%a = &lt;i&gt;' in diffs["planted"]
    assert "left alone" in explained, "refusals are shown"
    assert "250 tokens/s, 2.50x plain" in explained
    assert "4.00 / 5.00 / 20.00 ms" in explained
    kernels = explained.partition('<section id="kernels">')[2].partition("</section>")[0]
    assert re.search(r"paged_attention</td>.*?triton: the tensors are on cpu|triton is not installed", kernels), "with the refusals"


def test_without_texts_and_without_a_bench(written: Callable[[str], Path]) -> None:
    saved = autospec.load(written("ngram"), compile="eager")
    shown = page(saved.target, saved.draft, saved.program, [])
    assert '<section id="table">' in shown
    assert '<section id="diffs">' not in shown
    assert '<section id="charts">' not in shown


def test_passes_of_a_build_are_kept_while_asked_for() -> None:
    fast = tiny_optimized("plain")
    with debug.keeping() as texts:
        assert fast.program is not None
    names = [text.name for text in texts]
    assert "widen-decode" in names
    assert all(text.before != text.after for text in texts)
    tiny_optimized("plain")._session(1, 20, sampling=True)
    assert len(texts) == len(names), "nothing is kept afterwards"


def test_pictures_of_trees() -> None:
    static, told = tree_picture(static_tree([[0], [2], [0, 0], [2, 1]]))
    assert (static.count("<circle"), static.count("<path")) == (5, 4)
    assert ">3</text>" in static, "the rank of [2]"
    assert "rank" in told
    grown, told = tree_picture(dynamic_tree(3, 4, 9))
    assert (grown.count("<circle"), grown.count("<path")) == (13, 3 + 27)
    assert "the 9 best nodes" in told
    assert tree_picture(chain(2))[0].count("<circle") == 3
    assert tree_picture(chain(0)) == ("", "")


def test_charts_show_every_run() -> None:
    speed = bars([("a", 50.0), ("b", 200.0)], "tokens/s")
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', speed)]
    assert widths[1] == pytest.approx(4 * widths[0])
    assert "200 tokens/s" in speed
    shades = colours(["first", "a"])
    assert depth_lines([("a", [1.0, 0.5])], shades).count(f'fill="{COLOURS[1]}"/>') == 3, "the colour of its bar: two dots, a key"
    drawn = spreads([("first", {"50": 0.001, "99": 0.002}), ("a", {"50": 0.002, "99": 0.004})], shades)
    assert "2.00 / 4.00 ms" in drawn
    at = sorted(float(x) - 8 for x in re.findall(r'cx="([\d.]+)"', drawn))
    assert at == pytest.approx([at[3] / 4, at[3] / 2, at[3] / 2, at[3]]), "lengths are from zero, on one scale"
    assert "4.00 ms" in stacked([("a", {"verify": 0.002, "draft": 0.002, "glue": 0.0})], ("verify", "draft", "glue"))
    assert bars([], "x") == depth_lines([], {}) == spreads([], {}) == ""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_searches_in_a_browser(explained: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(explained)
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
        f"file://{tmp_path / 'page.html'}#q=append_kv",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr[-500:]
    found = re.search(r"<output[^>]*>(\d+) lines, (\d+) passes, (\d+) rows</output>", ran.stdout)
    assert found is not None, "the script ran"
    expected = len(re.findall(r"<i class=\"[adh]?\">[^<]*append_kv", explained))
    assert int(found[1]) == expected > 3
    shown = re.findall(r'<tr><td class="m">\w+</td><td class="m">(\w+)', ran.stdout)
    assert set(shown) == {"append_kv"}, "other kernels are hidden"
    hidden = re.findall(r'<details id="d\d+" class="none">\s*<summary>([\w-]+)', ran.stdout)
    assert "planted" in hidden
    opened = re.findall(r'<details id="d\d+"[^>]* open="[^"]*"><summary>([\w-]+)|<details id="d\d+" open="">', ran.stdout)
    assert opened


def test_the_verb_writes_the_page(written: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from autospec.cli import main

    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    file = tmp_path / "page.html"
    options = ["explain", str(written("ngram")), "--compile", "eager", "--html", str(file), "--bench", str(tmp_path / "bench.json")]
    assert main(options) == 0
    assert "page-kv-cache" in capsys.readouterr().out
    assert "100 tokens/s" in file.read_text()
    for broken, message in (("--html", "there is no folder for --html"), ("--bench", "needs what `autospec bench --json` wrote")):
        assert main([*options, broken, str(tmp_path / "none" / "x")]) == 2
        assert message in capsys.readouterr().err
    run = BENCH["runs"][0]
    for wrong in ([], {}, {"runs": [{}]}, {"runs": [{**run, "tokens_per_second": None}]}, {"runs": [{**run, "name": 3}]}):
        (tmp_path / "bench.json").write_text(json.dumps(wrong))
        assert main(options) == 2, wrong
        assert "needs what `autospec bench --json` wrote" in capsys.readouterr().err
    assert main(["explain", "x", "--bench", str(tmp_path / "bench.json")]) == 2
    assert "--bench is drawn on the page of --html" in capsys.readouterr().err
