"""A packaged artifact: the same tokens without Inductor, and much sooner than by compiling again."""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import tiny
from torch._inductor.cpp_builder import get_cpp_compiler

import autospec
from autospec import aot
from autospec.benching import startup
from autospec.errors import ArtifactError
from autospec.runtime.artifact import Artifact

pytestmark = [pytest.mark.compiled, pytest.mark.xdist_group("compiled")]
PROMPT = [[5, 9, 2, 44, 5, 9, 2, 44, 5]]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def packaged(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aot") / "made"
    return autospec.export(model, folder, autospec.NGramConfig(2), max_length=64, sampling=False, compile="aot")


def test_a_package_starts_sooner_than_a_compiler(
    model: Any, packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `autospec bench DIR --start-up` measures, both in one run."""
    model.save_pretrained(tmp_path / "model")
    # Compiled with one thread, run with two: what every thread may do and what one must do alone differ.
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    loaded = startup.loading(str(packaged), PROMPT[0], new_tokens=24)
    scratch = startup.optimising(Artifact(packaged), str(tmp_path / "model"), PROMPT[0], new_tokens=24)
    print(f"optimising {scratch.seconds:.1f} s, loading {loaded.seconds:.2f} s to the first token")
    assert (loaded.compile, scratch.compile) == ("aot", "inductor")
    assert loaded.tokens == scratch.tokens
    assert len(loaded.tokens) == len(PROMPT[0]) + 24
    assert not loaded.compilers
    assert scratch.compilers, "the list is about something"
    assert loaded.seconds < scratch.seconds / 3


def test_what_a_package_calls_is_explained(packaged: Path) -> None:
    lines = autospec.load(packaged).explain().splitlines()
    assert any(line.startswith("step_2.aot") and "select-kernels" in line for line in lines)
    assert any("paged_attention: cpu x 1" in line for line in lines)
    kernels = lines[lines.index("kernels") :]
    assert any(line.split()[:3] == ["step_2", "paged_attention", "cpu"] for line in kernels)


def test_every_compiler_has_a_script_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor tells clang by its name; exports at the same time may have different compilers."""
    (tmp_path / "a 'folder'").mkdir()
    monkeypatch.setattr(aot, "cache_dir", lambda: tmp_path / "cache")
    made = {}
    for name in ("g++", "clang++-18"):
        compiler = tmp_path / "a 'folder'" / name
        compiler.write_text(f'#!/bin/sh\necho "{name}: $*"\n')
        compiler.chmod(0o755)
        monkeypatch.setattr(aot, "get_cpp_compiler", lambda compiler=compiler: str(compiler))
        made[name] = aot._compiler_of_packages()
        assert aot._compiler_of_packages() == made[name]
    assert [script.name for script in made.values()] == ["g++", "clang++"]
    for name, script in made.items():
        ran = subprocess.run([script, "-c", "x.cpp"], capture_output=True, text=True, check=True)
        assert ran.stdout == f"{name}: -I{aot.HEADERS} -c x.cpp\n"


DEVICES = ["cuda:0", "cpu", "cuda", "mps:12", "xpu:3", "cuda:", "cuda:x", "cuda:1x", "tpu:0", "", ":0", "cuda:0:1", "xcuda", " cpu"]
READ_DEVICES = r'''
#include <regex>
#include <iostream>
int main(int count, char** words) {
  std::regex re("(cpu|cuda|xpu|mps)(:([0-9]+))?");
  for (int i = 1; i < count; ++i) {
    std::smatch found;
    const std::string word(words[i]);
    const bool matched = std::regex_match(word, found, re);
    std::cout << matched;
    for (int group = 1; matched && group < 4; ++group) std::cout << "|" << (found[group].matched ? found[group].str() : "none");
    std::cout << std::endl;
  }
  std::regex other("(cpu|cuda)");
}
'''


def test_devices_are_read_as_by_the_pattern(tmp_path: Path) -> None:
    """The header that packages have in the place of the library's: the same groups, and no other pattern."""
    (tmp_path / "read.cpp").write_text(READ_DEVICES)
    subprocess.run([get_cpp_compiler(), f"-I{aot.HEADERS}", tmp_path / "read.cpp", "-o", tmp_path / "read"], check=True)
    ran = subprocess.run([tmp_path / "read", *DEVICES], capture_output=True, text=True, check=False)
    matches = [re.fullmatch("(cpu|cuda|xpu|mps)(:([0-9]+))?", word) for word in DEVICES]
    told = ["0" if one is None else "|".join(["1", *(group or "none" for group in one.groups())]) for one in matches]
    assert ran.stdout.splitlines() == told
    assert ran.returncode != 0
    assert "does not know the pattern (cpu|cuda)" in ran.stderr


def test_packages_hold_no_regular_expressions(packaged: Path) -> None:
    """Loading them crashed in std::regex where another compiler had made torch."""
    for path in (packaged / "aot").rglob("*.pt2"):
        with zipfile.ZipFile(path) as archive:
            libraries = [archive.read(name) for name in archive.namelist() if name.endswith(".so")]
        assert libraries
        assert not any(b"regex_traits" in library for library in libraries), path


def test_another_machine_falls_back_if_it_may(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autospec.artifact import machine

    here = machine.machine(torch.device("cpu"))
    monkeypatch.setattr(machine, "machine", lambda device: {**here, "torch": "2.12.0"})
    with pytest.raises(ArtifactError, match="compiled for torch") as caught:
        autospec.load(packaged)
    assert "fallback=True (--fallback)" in str(caught.value)
    with pytest.warns(UserWarning, match="portable graphs"):
        assert autospec.load(packaged, fallback=True).compile == "inductor"
    saved = autospec.load(packaged, compile="eager")
    monkeypatch.undo()
    expected = autospec.load(packaged).generate(PROMPT, max_new_tokens=24, do_sample=False)
    assert torch.equal(saved.generate(PROMPT, max_new_tokens=24, do_sample=False), expected)
