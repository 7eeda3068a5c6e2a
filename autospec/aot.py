"""Packages of an artifact: its graphs compiled by AOTInductor for the kind of machine that exports them.

Weights and state are inputs of a package, as they are of every graph. On CUDA a package calls no Python: Triton kernels
are compiled in, and what would stay behind as an op written in Python is a LoweringError. On a CPU it calls our C++
kernels, which travel with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shlex
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.runtime.cache_dir_utils import cache_dir

from autospec import debug, pipeline
from autospec.artifact.machine import machine
from autospec.artifact.values import to_json
from autospec.errors import LoweringError
from autospec.ir.archive import as_exported, placed
from autospec.ir.build import device_of
from autospec.ir.passes import Stage
from autospec.ir.runner import run_stages
from autospec.ir.slots import slots
from autospec.ir.text import node_text
from autospec.kernels.native import libraries
from autospec.lower import Unlowered, inline_references, refuse_page_copies
from autospec.passes.select_kernels import SelectKernels

HEADERS = Path(__file__).parent / "aot_include"


def package(folder: Path, place: str, unlowered: Unlowered) -> dict[str, Any]:
    """Compile the graphs of one shape into folder/place; describe them for the manifest.

    The graphs are changed, and what the select stage chose joins their records.
    """
    if unlowered.shape.is_exact:
        raise LoweringError(
            "a package is compiled by Inductor, whose fusions round differently in steps that draft", where="autospec.export",
            help="export an exact model without compile='aot': its graphs run op by op",
        )  # fmt: skip
    (folder / place).mkdir(parents=True)
    known, graphs = {}, []
    for name, module in unlowered.graphs.items():
        unlowered.records += run_stages(module, [_select(module)], graph_name=f"{name}.aot", debug=debug.options())
        inline_references(module)
        declared = slots(module)
        known.update({slot.name: to_json(slot) for slot in declared})
        file = f"{place}/{name}.pt2"
        compile_package(module, folder / file)
        graphs.append({"name": name, "file": file, "slots": [slot.name for slot in declared]})
    return {"slots": known, "graphs": graphs}


def describe(folder: Path, device: torch.device) -> dict[str, Any]:
    """For whom the packages were compiled, and the libraries that they call, which are copied beside them."""
    copied = {}
    for name, path in libraries().items() if device.type == "cpu" else ():
        file = f"aot/{name}.so"
        shutil.copyfile(path, folder / file)
        copied[name] = file
    return {"machine": machine(device), "libraries": copied}


def compile_package(module: fx.GraphModule, path: Path) -> None:
    """Compile one graph with static shapes."""
    device = device_of(module)
    if device.type == "cuda":
        refuse_python(module)
    plain = placed(module, device)
    for node in plain.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    examples = tuple(node.meta["val"] for node in module.graph.find_nodes(op="placeholder"))
    # As in lower.compile_with_inductor; threads are those of the machine that runs, not of the one that compiles. A process of
    # one thread would compile parallel regions whose serial parts every thread of a later process runs: torch 2.13 leaves out
    # their `omp single`, and rows were finished a token early.
    options: dict[str, Any] = {
        "reorder_for_locality": False, "size_asserts": False, "cpp.min_chunk_size": 8192, "cpp.dynamic_threads": True,
        "cpp.threads": max(2, torch.get_num_threads()),
    }  # fmt: skip
    try:
        if sys.platform == "linux":
            options["cpp.cxx"] = (None, str(_compiler_of_packages()))
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                as_exported(plain, examples), package_path=str(path), inductor_configs=options
            )
    except Exception as error:
        raise LoweringError(
            f"AOTInductor failed: {type(error).__name__}: {str(error)[:300]}", at=path.name, where="autospec.export",
            help="export without compile='aot', and report this",
        ) from error  # fmt: skip
    with zipfile.ZipFile(path) as archive:
        sources = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp")]
    assert sources, "AOTInductor showed no generated code, so page-sized copies cannot be ruled out"
    refuse_page_copies(sources, [slot for slot in slots(module) if slot.kind == "state"])


def _compiler_of_packages() -> Path:
    """The C++ compiler with `aot_include` before its own headers; Inductor has no option for that."""
    compiler = get_cpp_compiler()
    text = f'#!/bin/sh\nexec {shlex.quote(compiler)} -I{shlex.quote(str(HEADERS))} "$@"\n'
    # Inductor knows compilers by their names, and keeps precompiled headers by their paths. Another compiler, and another header,
    # have another script.
    key = hashlib.sha256(text.encode() + (HEADERS / "regex").read_bytes()).hexdigest()[:16]
    name = "clang++" if "clang" in Path(compiler).name else "g++"
    script = Path(cache_dir()) / "autospec" / key / name
    if not script.exists():
        script.parent.mkdir(parents=True, exist_ok=True)
        fresh = script.with_suffix(f".{os.getpid()}")  # renamed, so that no other process runs half a script
        fresh.write_text(text)
        fresh.chmod(0o755)
        fresh.replace(script)
    return script


def refuse_python(module: fx.GraphModule) -> None:
    """Raise LoweringError if a graph would call back into Python."""
    for node in module.graph.nodes:
        space = getattr(node.target, "namespace", "aten")
        if space.startswith("autospec") and space != "autospec_triton":
            raise LoweringError(
                "the package would call an op that is written in Python", at=node_text(node), where=node.meta.get("module", ""),
                help="leave its backend out with AUTOSPEC_DISABLE_KERNELS, or export without compile='aot'",
            )  # fmt: skip


def _select(module: fx.GraphModule) -> Stage:
    """The select stage, of backends that a package can hold."""
    stage = pipeline.select()
    if device_of(module).type != "cuda":
        return stage
    return Stage(
        stage.name, [dataclasses.replace(one, is_packaged=True) if isinstance(one, SelectKernels) else one for one in stage.passes]
    )
