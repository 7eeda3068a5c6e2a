"""The command line: verbs with options of their own get them, and mistakes are told in four lines."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from autospec import bench, check_draft, cli, zoo
from autospec.benching import artifact, shape
from autospec.cli import main
from autospec.errors import AutospecError


@pytest.mark.parametrize("verb", ["zoo", "bench", "check-draft"])
def test_verbs_with_their_own_options_get_them(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"autospec {verb}" in capsys.readouterr().out


def test_all_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n    {verb}" in shown for verb in ("demo", "generate", "train", "bench", "check-draft", "zoo"))


def commands(text: str) -> list[list[str]]:
    """The words of every `autospec ...` that stands on a line of its own, behind the name."""
    lines = re.findall(r"^ +autospec +(.+?)(?: +#.*)?$", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def parser_for(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    verb, *rest = words
    if verb == "bench":
        kind = shape if "--shape" in rest else artifact if rest[0] == "exported" else bench
        return kind.parser(), rest
    own = {"check-draft": check_draft.parser, "zoo": zoo.parser}
    return (own[verb](), rest) if verb in own else (cli._parser(), words)


def test_what_the_readme_and_every_help_show_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    shown = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    verbs = ("demo", "generate", "export", "explain", "passes", "run", "bench", "bench --shape x", "check-draft", "zoo",
             "train eagle3", "train medusa", "train", "")  # fmt: skip
    for verb in verbs:
        with pytest.raises(SystemExit):
            main([*verb.split(), "--help"])
        told = capsys.readouterr().out.partition("example:\n")[2]
        assert commands(told), f"autospec {verb} --help shows no example"
        shown += told
    found = commands(shown)
    assert len(found) > 25
    for words in found:
        parser, rest = parser_for(words)
        parser.parse_args(rest)
    with pytest.raises(AutospecError):
        parser_for(["bench", "m", "--batch-size", "1"])[0].parse_args(["m", "--batch-size", "1"])


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"set -o pipefail; {sys.executable} -m autospec.cli passes | true"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ran.returncode in (0, 141), "0: it was faster than its reader"
    assert ran.stderr == ""


@pytest.mark.parametrize(
    ("words", "message", "help"),
    [
        ([], "the following arguments are required: COMMAND", "autospec --help shows an example"),
        (["generat", "x"], "COMMAND must be one of demo, generate,", "did you mean 'generate'?"),
        (["generate", "m"], "the following arguments are required: --prompt", "autospec generate --help shows an example"),
        (["generate", "m", "--prompt", "x", "--max-new-tokns=4"], "has no option '--max-new-tokns'", "mean '--max-new-tokens'?"),
        (["generate", "m", "--prompt", "x", "--max-new-tokens", "many"], "--max-new-tokens: invalid int value: 'many'", "example"),
        (["generate", "m", "--prompt", "def", "add"], "takes no further word, got 'add'", "in quotes"),
        (["explain", "m", "--compile", "eagr"], "--compile must be one of inductor, eager, aot", "did you mean 'eager'?"),
        (["train"], "the following arguments are required: HEAD", "an example"),
        (["train", "eagle3", "m", "--data", "x", "--out", "y", "--stps", "3"], "train eagle3 has no option '--stps'", "'--steps'?"),
        (["bench", "--batch-sizes", "0", "m"], "'0' is no list of positive numbers", "an example"),
        (["zoo", "--types", "lama"], "autospec zoo has no model type 'lama'", "did you mean 'llama'?"),
        (["run", "fold-nops", "m"], "autospec run has no pass 'fold-nops'", "did you mean 'fold-noops'?"),
        (["run", "fold-noops{x=1}", "m"], "fold-noops has no option 'x'", "it takes no option"),
        (["demo", "--repeats", "0"], "--repeats must be at least 1", "leave it out"),
        (["demo", "--device", "abacus"], "there is no device 'abacus'", "cpu always works"),
        (["demo", "--picture", "."], "--picture names a folder", "name a file in it"),
        (["zoo", "--types", "llama", "--json", "none/x.json"], "there is no folder for --json", "make the folder first"),
        (["generate", "m", "--prompt", "x", "--temperature", "nan"], "--temperature must be a number", "decodes greedily"),
        (["check-draft", "m"], "the following arguments are required: head", "an example"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_that_no_verb_takes(words: list[str], message: str, help: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["at", "in", "help"]
    assert help in lines[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speculation", "eagle3:bundled:eagle3", "--eagle-choices", "[[0]"], "--eagle-choices is no JSON"),
        (["--speculation", "eagle3:"], "--speculation eagle3 needs the draft's folder"),
        (["--eagle-choices", "[[0]]"], "--eagle-choices needs a drafter that takes it"),
    ],
)
def test_mistakes_are_told_in_four_lines(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "bundled:target", "--compile", "eager", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-4]
    assert [line.split()[0] for line in lines[-3:]] == ["at", "in", "help"]
