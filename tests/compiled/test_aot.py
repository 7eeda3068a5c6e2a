"""A packaged artifact: the same tokens without Inductor, and much sooner than by compiling again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import tiny
from torch._inductor.utils import fresh_cache

import autospec
from autospec.errors import ArtifactError

pytestmark = [pytest.mark.compiled, pytest.mark.xdist_group("compiled")]
PROMPT = [[5, 9, 2, 44, 5, 9, 2, 44, 5]]
SCRIPT = """
import json, sys, time
import torch, autospec
start = time.perf_counter()
fast = autospec.load(sys.argv[1])
fast.generate(json.loads(sys.argv[2]), max_new_tokens=1, do_sample=False)
seconds = time.perf_counter() - start
tokens = fast.generate(json.loads(sys.argv[2]), max_new_tokens=24, do_sample=False).tolist()
banned = ("transformers", "autospec.pipeline", "autospec.passes", "autospec.lower", "autospec.capture", "torch._inductor.graph")
print(json.dumps([tokens, seconds, fast.compile, [name for name in sys.modules if name.startswith(banned)]]))
"""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def packaged(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aot") / "made"
    return autospec.export(model, folder, autospec.NGramConfig(2), max_length=64, sampling=False, compile="aot")


def test_a_package_starts_sooner_than_a_compiler(model: Any, packaged: Path) -> None:
    start = time.perf_counter()
    with fresh_cache():
        fast = autospec.optimize(model, autospec.NGramConfig(2), max_length=64)
        fast.generate(PROMPT, max_new_tokens=1, do_sample=False)
    from_scratch = time.perf_counter() - start
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(packaged), json.dumps(PROMPT)]
    # Compiled with one thread, run with two: what every thread may do and what one must do alone differ.
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    tokens, loading, how, compilers = json.loads(ran.stdout.splitlines()[-1])
    print(f"optimising {from_scratch:.1f} s, loading {loading:.2f} s to the first token")
    assert how == "aot"
    assert tokens == fast.generate(PROMPT, max_new_tokens=24, do_sample=False).tolist()
    assert not compilers
    assert loading < from_scratch / 3


def test_what_a_package_calls_is_explained(packaged: Path) -> None:
    lines = autospec.load(packaged).explain().splitlines()
    assert any(line.startswith("step_2.aot") and "select-kernels" in line for line in lines)
    assert any("paged_attention: cpu x 1" in line for line in lines)


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
