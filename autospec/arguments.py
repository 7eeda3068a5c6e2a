"""Command lines whose mistakes are told as ours are: four lines, status 2, and the nearest right name."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from autospec.errors import OptionError, unknown_option

_CHOICE = re.compile(r"invalid choice: '(?P<given>.*?)' \(choose from (?P<known>.*)\)")
_ARGUMENT = re.compile(r"argument (?P<name>\S+): (?P<rule>.*)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; what it would print and exit with is an OptionError."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse does, but a word that nobody takes is told by the verb that was given it."""
        asked, rest = self.parse_known_args(args, namespace)
        if rest:
            verb = self._innermost(args or ())
            if rest[0].startswith("-"):
                raise unknown_option(verb.prog, rest[0].partition("=")[0], verb._option_string_actions)
            raise OptionError(f"{verb.prog} takes no further word, got '{rest[0]}'", at=" ".join(rest)[:80], where=verb.prog,
                              help=f"put it in quotes if it belongs to the word before it, or see {verb.prog} --help")  # fmt: skip
        return asked

    def error(self, message: str) -> NoReturn:
        found = _ARGUMENT.fullmatch(message)
        at, rule = (found["name"], found["rule"]) if found else (self.prog, message)
        help = f"{self.prog} --help shows an example"
        if choice := _CHOICE.fullmatch(rule):
            known = re.findall(r"[\w.-]+", choice["known"])
            close = difflib.get_close_matches(choice["given"], known, n=1)
            rule = f"{at} must be one of {', '.join(known)}, got '{choice['given']}'"
            help = f"did you mean '{close[0]}'?" if close else help
        elif found:
            rule = f"{at}: {rule}"
        raise OptionError(rule, at=at, where=self.prog, help=help)

    def _innermost(self, words: Sequence[str]) -> argparse.ArgumentParser:
        """The parser of the verb that the words name."""
        verb: argparse.ArgumentParser = self
        for word in words:
            choices = next((one.choices for one in verb._actions if isinstance(one, argparse._SubParsersAction)), {})
            verb = choices.get(word, verb)
        return verb


def sizes(text: str) -> tuple[int, ...]:
    """Positive numbers with commas, in the order given, each once: a `type` of add_argument."""
    try:
        found = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of positive numbers such as 1,4,16")
    return found


def check_at_least(asked: argparse.Namespace, least: Mapping[str, int], where: str) -> None:
    """Raise OptionError for an option below its least value."""
    for name, value in least.items():
        if getattr(asked, name) < value:
            option = "--" + name.replace("_", "-")
            raise OptionError(f"{option} must be at least {value}, got {getattr(asked, name)}", at=option, where=where,
                              help="leave it out for the default")  # fmt: skip


def check_temperature(temperature: float, where: str) -> None:
    """Raise OptionError for what is neither 0 nor above it; NaN is neither."""
    if not temperature >= 0:
        what = "not be negative" if temperature < 0 else "be a number"
        raise OptionError(f"--temperature must {what}, got {temperature}", at="--temperature", where=where,
                          help="0 decodes greedily")  # fmt: skip


def check_files(files: Mapping[str, str | Path | None], where: str) -> None:
    """Raise OptionError for a file, by option, that could not be written in the end."""
    for option, file in files.items():
        if file is None:
            continue
        path, at = Path(file).resolve(), f"{option} {file}"
        if not path.parent.is_dir():
            raise OptionError(f"there is no folder for {option}", at=at, where=where, help="make the folder first")
        if path.is_dir():
            raise OptionError(f"{option} names a folder", at=at, where=where, help="name a file in it")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise OptionError(f"{option} cannot be written", at=at, where=where, help="name a file in a folder of yours")
