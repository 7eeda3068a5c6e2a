"""autospec run: passes as text, mistakes with suggestions, a pass of one's own, dumps."""

from __future__ import annotations

from pathlib import Path

import pytest

from autospec.cli import main
from autospec.errors import OptionError
from autospec.pass_list import option_text, parse_passes
from autospec.passes.fold_noops import FoldNoops
from autospec.passes.page_kv_cache import PageKvCache
from autospec.passes.specialize_shapes import SpecializeShapes

OWN = '''
from dataclasses import dataclass
from autospec.ir.passes import Pass

@dataclass(frozen=True, kw_only=True)
class CountNodes(Pass):
    """Say how many nodes there are."""
    name = "count-nodes"
    word: str = "nodes"

    def run(self, module, notes):
        notes.say(f"{len(module.graph.nodes)} {self.word}")
        return 0
'''


def test_a_list_of_passes_is_read() -> None:
    text = " specialize-shapes{batch_size=1, q_len=4},fold-noops , "
    text += "page-kv-cache{page_size=4,num_pages=9,pages_per_row=8,is_length_given=True}"
    assert parse_passes(text) == [
        SpecializeShapes(batch_size=1, q_len=4), FoldNoops(),
        PageKvCache(page_size=4, num_pages=9, pages_per_row=8, is_length_given=True),
    ]  # fmt: skip
    assert option_text(SpecializeShapes) == "specialize-shapes{batch_size=int, q_len=int}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold-noop", "did you mean 'fold-noops'?"),
        ("specialize-shapes{batch=1}", "did you mean 'batch_size'?"),
        ("specialize-shapes", "specialize-shapes needs batch_size, q_len"),
        ("specialize-shapes{batch_size=x, q_len=2}", "batch_size must be an integer, got 'x'"),
        ("specialize-shapes{batch_size}", "an option is name=value"),
        ("fold-noops; fold-noops", "a list of passes is"),
        ("  ", "no pass was named"),
    ],
)
def test_mistakes_in_it(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_passes(text)
    assert message in str(caught.value)
    assert [line[:7].strip() for line in str(caught.value).splitlines()[1:]] == ["at", "in", "help"]


def test_a_pass_of_ones_own_runs_on_the_bundled_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(OWN)
    text = "specialize-shapes{batch_size=1, q_len=4}, count-nodes{word=things}, fold-noops"
    options = ["--load", str(tmp_path / "own.py"), "--dump", str(tmp_path / "dumps"), "--print"]
    assert main(["run", text, "bundled:draft", *options]) == 0
    shown = capsys.readouterr().out
    assert " things" in shown
    assert "autospec.attention" in shown, "the graph itself"
    assert [path.name for path in sorted((tmp_path / "dumps" / "run").iterdir())][:2] == [
        "00_specialize-shapes.after.txt", "00_specialize-shapes.before.txt",
    ]  # fmt: skip
    assert main(["run", "page-kv-cache{page_size=4,num_pages=9,pages_per_row=8}", "bundled:draft"]) == 2
    assert "a pass broke a promise: page-kv-cache requires" in capsys.readouterr().err
    assert main(["run", "specialize-shapes{batch_size=-1, q_len=4}", "bundled:draft", *options[:2]]) == 2
    told = capsys.readouterr().err
    assert "autospec: RuntimeError while specialize-shapes ran: Trying to create tensor with negative dimension -1" in told
    assert "Traceback" in told, "for whoever wrote one of the passes"


def test_every_verb_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("demo", "export", "generate", "explain", "passes", "run", "bench", "check-draft", "zoo"):
        with pytest.raises(SystemExit) as stopped:
            main([verb, "--help"])
        assert stopped.value.code == 0
        assert f"\n  autospec {verb}" in capsys.readouterr().out, verb
