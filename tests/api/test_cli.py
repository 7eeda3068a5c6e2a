"""The command line: verbs with options of their own get them, and mistakes are told in four lines."""

from __future__ import annotations

import pytest

from autospec.cli import main


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
