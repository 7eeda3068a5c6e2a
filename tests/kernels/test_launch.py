"""What kernels are launched with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime import compile_tasks

from autospec import lower
from autospec.kernels.launch import fit_stages, settle_compiler


@pytest.fixture
def untouched(monkeypatch, tmp_path):
    """Nobody has said yet where Triton's cache or its assembler are."""
    for name in ("TRITON_CACHE_DIR", "TRITON_PTXAS_PATH"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever is set in between
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compile_tasks._set_triton_ptxas_path.cache_clear()
    yield tmp_path
    compile_tasks._set_triton_ptxas_path.cache_clear()


def test_triton_compiles_as_inductor_lets_it(untouched):
    """Whatever comes first in a process: keys in Triton's cache hold the assembler's version."""
    settle_compiler(torch.device("cuda", 1))
    assert os.environ["TRITON_CACHE_DIR"] == str(untouched / "triton" / "1")
    shipped = [path for path in Path(torch.__file__).parent.glob("**/bin/ptxas") if os.access(path, os.X_OK)]
    assert (os.environ.get("TRITON_PTXAS_PATH") in map(str, shipped)) == bool(shipped)


def test_what_the_user_has_set_stays(untouched, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "mine, too")
    settle_compiler(torch.device("cuda"))
    assert (os.environ["TRITON_CACHE_DIR"], os.environ["TRITON_PTXAS_PATH"]) == ("mine", "mine, too")


def test_nothing_is_said_without_a_gpu(untouched):
    settle_compiler(torch.device("cpu"))
    assert not {"TRITON_CACHE_DIR", "TRITON_PTXAS_PATH"} & set(os.environ)


def test_a_program_is_built_with_it(monkeypatch):
    """Before kernels are chosen, which may measure them."""
    events: list[object] = []
    monkeypatch.setattr(lower, "settle_compiler", events.append)
    monkeypatch.setattr(lower, "run_stages", lambda *args, **kwargs: events.append("stages") or [])
    monkeypatch.setattr(lower, "lower", lambda module, name, how: lower.Graph(name, [], None, module))
    module = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    module.meta["device"] = torch.device("cpu")
    shape = type("Shape", (), {"is_exact": False})
    lower.lower_program(lower.Unlowered(shape, None, {"step": module}, {}, []), "eager")
    assert events == [torch.device("cpu"), "stages"]


@pytest.mark.parametrize(("stage_bytes", "stages"), [(10_000, 6), (50_000, 4), (120_000, 1), (500_000, 1)])
def test_a_pipeline_fits_into_shared_memory(stage_bytes, stages):
    assert fit_stages(torch.empty(1), 6, stage_bytes) == stages
