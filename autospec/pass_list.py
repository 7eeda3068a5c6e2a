"""Passes as text, for people who write one: `specialize-shapes{batch_size=1, q_len=4}, fold-noops`."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from autospec import pipeline
from autospec.errors import OptionError, unknown_option
from autospec.ir.passes import Pass

_ITEM = re.compile(r"\s*([A-Za-z][\w-]*)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")
_OPTION = re.compile(r"\s*(\w+)\s*=\s*((?:\([^()]*\)|\[[^\[\]]*\]|'[^']*'|\"[^\"]*\"|[^,])+?)\s*(?:,|$)")
_PLAIN = (int, float, bool, str, tuple, list)


def parse_passes(text: str, more: Mapping[str, type[Pass]] | None = None) -> list[Pass]:
    """The passes that a text lists, in order.

    Args:
        more: passes by name that the pipeline does not have.

    Raises:
        OptionError: a name or an option is wrong.
    """
    known = {one.name: one for one in pipeline.pass_types()} | dict(more or {})
    found, place = [], 0
    while place < len(text.rstrip()):
        item = _ITEM.match(text, place)
        if item is None:
            raise OptionError(
                "a list of passes is name{option=value, ...}, name, ...", at=text[place : place + 60], where="autospec run",
                help="for example 'specialize-shapes{batch_size=1, q_len=4}, fold-noops'",
            )  # fmt: skip
        name, place = item[1], item.end()
        if name not in known:
            raise unknown_option("autospec run", name, known, what="pass")
        found.append(_made(known[name], dict(_options(name, item[2] or ""))))
    if not found:
        raise OptionError("no pass was named", at=repr(text), where="autospec run", help="`autospec passes` lists them")
    return found


def _options(name: str, text: str) -> Iterator[tuple[str, Any]]:
    place = 0
    while place < len(text.rstrip()):
        option = _OPTION.match(text, place)
        if option is None:
            raise OptionError("an option is name=value", at=text[place:].strip()[:60], where=name, help="for example q_len=4")
        place = option.end()
        try:
            yield option[1], ast.literal_eval(option[2])
        except (ValueError, SyntaxError):
            yield option[1], option[2]  # a bare word


def _made(kind: type[Pass], options: dict[str, Any]) -> Pass:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in options.items():
        if name not in fields:
            raise unknown_option(kind.name, name, fields)
        if fields[name].type in ("int", int) and (isinstance(value, bool) or not isinstance(value, int)):
            raise OptionError(f"{name} must be an integer, got {value!r}", at=f"{name}={value!r}", where=kind.name,
                              help=option_text(kind))  # fmt: skip
    missing = [name for name, field in fields.items() if _is_required(field) and name not in options]
    if missing:
        raise OptionError(f"{kind.name} needs {', '.join(missing)}", at=kind.name, where="autospec run", help=option_text(kind))
    return kind(**options)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def option_text(kind: type[Pass]) -> str:
    """`specialize-shapes{batch_size=int, q_len=int}`: what can be written, defaults where there are some."""
    shown = []
    for field in dataclasses.fields(kind):
        value = field.type if _is_required(field) else repr(field.default)
        shown.append(f"{field.name}={value}")
    return kind.name + (f"{{{', '.join(shown)}}}" if shown else "")


def passes_in(path: str | Path) -> dict[str, type[Pass]]:
    """The passes of a Python file of the user's, which is run."""
    file = Path(path)
    if not file.is_file():
        raise OptionError("there is no such file", at=str(path), where="autospec run --load", help="name a Python file")
    spec = importlib.util.spec_from_file_location(f"autospec_user_{file.stem}", file)
    assert spec is not None, f"{file} is no Python file"
    assert spec.loader is not None, f"{file} cannot be loaded"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    found = [one for _, one in inspect.getmembers(module, inspect.isclass) if issubclass(one, Pass) and one.name]
    if not found:
        raise OptionError("the file has no pass with a name", at=str(path), where="autospec run --load",
                          help="a pass is a frozen dataclass that derives from autospec.ir.passes.Pass")  # fmt: skip
    return {one.name: one for one in found}
