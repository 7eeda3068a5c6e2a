"""Errors are four lines, options suggest the right name, and the debugging variable is parsed in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from autospec import debug
from autospec.errors import AutospecError, CapacityError, CaptureError, OptionError, unknown_option


def test_four_lines() -> None:
    error = CaptureError(
        "page-kv-cache needs every attention op to know its positions, found an internal arange",
        at="%arange_3 = aten.arange(%sym_size_1)", where="model.decoder.embed_positions",
        help="this model computes positions from the length",
    )  # fmt: skip
    assert str(error).splitlines() == [
        "page-kv-cache needs every attention op to know its positions, found an internal arange",
        "  at    %arange_3 = aten.arange(%sym_size_1)",
        "  in    model.decoder.embed_positions",
        "  help  this model computes positions from the length",
    ]
    assert (error.rule[:4], error.at, error.where) == ("page", "%arange_3 = aten.arange(%sym_size_1)", error.where)


def test_they_are_value_errors_of_ours() -> None:
    for kind in (CaptureError, OptionError, CapacityError):
        assert issubclass(kind, AutospecError)
        assert issubclass(kind, ValueError)


def test_an_unknown_option_suggests_the_right_one() -> None:
    error = unknown_option("generate", "max_new_token", ["max_new_tokens", "max_length", "seed"])
    assert str(error).splitlines() == [
        "generate has no option 'max_new_token'", "  at    max_new_token", "  in    generate",
        "  help  did you mean 'max_new_tokens'?",
    ]  # fmt: skip
    assert "known: max_length, seed" in str(unknown_option("generate", "zzz", ["seed", "max_length"]))


def test_the_debugging_variable() -> None:
    assert debug.parse("") == debug.DebugOptions()
    assert debug.parse("dump, verify,table,dir=/tmp/x") == debug.DebugOptions(True, True, True, Path("/tmp/x"))
    with pytest.raises(OptionError, match="did you mean 'verify'"):
        debug.parse("dump,verfy")


def test_the_environment_is_read_when_a_program_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOSPEC_DEBUG", "dump")
    assert debug.options().dump
    monkeypatch.setenv("AUTOSPEC_DISABLE_KERNELS", "flashinfer, triton,")
    assert debug.disabled_kernels() == {"flashinfer", "triton"}
    monkeypatch.setenv("AUTOSPEC_KERNELS", "paged_attention=triton, append_kv = reference,")
    assert debug.forced_kernels() == (("paged_attention", "triton"), ("append_kv", "reference"))
    monkeypatch.delenv("AUTOSPEC_KERNELS")
    assert debug.forced_kernels() == ()


@pytest.mark.parametrize(("text", "lines"), [
    ("paged_attention", ["AUTOSPEC_KERNELS names a backend for an op, got 'paged_attention'", "  at    paged_attention",
                         "  in    AUTOSPEC_KERNELS", "  help  write op=backend, such as paged_attention=triton"]),
    ("paged_attention=tritn", ["AUTOSPEC_KERNELS has no option 'tritn'", "  at    tritn", "  in    AUTOSPEC_KERNELS",
                               "  help  did you mean 'triton'?"]),
    ("a=triton,a=cpu", ["AUTOSPEC_KERNELS names two backends for a", "  at    a=cpu", "  in    AUTOSPEC_KERNELS",
                        "  help  leave one of them out"]),
])  # fmt: skip
def test_a_mistake_in_the_forced_kernels(monkeypatch: pytest.MonkeyPatch, text: str, lines: list[str]) -> None:
    monkeypatch.setenv("AUTOSPEC_KERNELS", text)
    with pytest.raises(OptionError) as error:
        debug.forced_kernels()
    assert str(error.value).splitlines() == lines


def test_a_word_means_every_backend_that_it_begins() -> None:
    assert debug.names("flashinfer", "flashinfer_xqa")
    assert not debug.names("flash", "flashinfer_xqa")
    assert not debug.names("flashinfer_xqa", "flashinfer_fa2")
    assert not debug.names("", "triton")
