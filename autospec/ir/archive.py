"""Graphs in torch.export's own format, without weights, and read back without running anything that the file says.

A canonical graph writes to its state, so it is stored as an ExportedProgram of the training dialect, which allows that:
one input per slot, nothing lifted, no example inputs. Such an archive holds JSON only. torch.export.load would unpickle
what others put into one (example inputs, constants, weights) and evaluate symbolic sizes and guards as Python, so the
archive is inspected first, and everything that ours do not need is refused.

Stored graphs say "cpu" where they make a tensor; reading puts them on the device that is asked for.
"""

from __future__ import annotations

import copy
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from autospec.errors import ArtifactError
from autospec.ir.build import module_of, value_of
from autospec.ir.fakes import fake_mode
from autospec.ir.slots import Slot, slot_of
from autospec.kernels.registry import load_all

_MODEL = "models/model.json"
_EMPTY_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_EMPTY_FILES = ("data/sample_inputs/model.pt",)
_MARKS = ("archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id", "version")
_LARGEST = 1 << 30  # bytes of one graph; those of 100 layers have 10 MB

# Ops of a portable graph. Nothing else is looked up, so a file cannot name a function of its choice.
_OPS = re.compile(r"torch\.ops\.(?:aten|prims|autospec)\.[A-Za-z_]\w*\.[A-Za-z_]\w*|_operator\.getitem")
_READS_FILES = {"torch.ops.aten.from_file.default", "torch.ops.aten.from_file.out"}
# Arguments that are data. Expressions and objects are not among them: torch evaluates the first and unpickles the second.
_DATA = {
    "as_none", "as_tensor", "as_tensors", "as_optional_tensor", "as_optional_tensors", "as_int", "as_ints", "as_float",
    "as_floats", "as_bool", "as_bools", "as_string", "as_strings", "as_scalar_type", "as_memory_format", "as_layout",
    "as_device",
}  # fmt: skip
_METADATA = {"custom", "nn_module_stack"}
_TREES = {None, "builtins.tuple", "builtins.dict", "builtins.list"}
_KEPT = ("module", "layer")  # metadata of ours that survives, as torch's "custom" metadata


def write_graph(module: fx.GraphModule, path: Path) -> None:
    """Write a specialised graph; its slots are not stored, the reader is told them."""
    on_cpu = placed(module, torch.device("cpu"))
    for node in on_cpu.graph.nodes:
        kept = {key: node.meta[key] for key in _KEPT if node.meta.get(key) not in (None, "")}
        value = node.meta.get("val")
        node.meta = {"val": value} if node.op != "output" else {}
        if kept and node.op == "call_function":
            node.meta["custom"] = kept
    torch.export.save(as_exported(on_cpu), path)


def as_exported(module: fx.GraphModule, examples: tuple[Any, ...] | None = None) -> torch.export.ExportedProgram:
    """A graph with static shapes as torch.export would give it: every placeholder a user's input.

    Args:
        examples: what AOTInductor is given to look at, one tensor a placeholder.
    """
    from torch._export.verifier import TrainingIRVerifier
    from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
    from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument

    placeholders = module.graph.find_nodes(op="placeholder")
    results: Any = module.graph.output_node().args[0]
    inputs = [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in placeholders]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    call = ModuleCallSignature(
        inputs=[one.arg for one in inputs], outputs=[one.arg for one in outputs],
        in_spec=pytree.tree_structure((tuple(0 for _ in inputs), {})), out_spec=pytree.tree_structure(tuple(0 for _ in outputs)),
    )  # fmt: skip
    return torch.export.ExportedProgram(
        torch.nn.Module(), module.graph, ExportGraphSignature(inputs, outputs), {}, {}, [ModuleCallEntry("", call)],
        example_inputs=None if examples is None else (examples, {}), constants={}, verifiers=[TrainingIRVerifier],
    )  # fmt: skip


def read_graph(path: Path, declared: Sequence[Slot], device: torch.device) -> fx.GraphModule:
    """A stored graph over these slots, on a device, with fresh metadata.

    Raises:
        ArtifactError: the archive holds anything but a graph, or another one.
    """
    check_data(path)
    load_all()  # the file names ops of every kernel file
    try:
        graph = torch.export.load(path).graph
    except Exception as error:  # another torch's format, or one that nobody wrote
        raise ArtifactError(f"torch {torch.__version__} cannot read the graph: {str(error)[:120]}", at=path.name,
                            where=str(path.parent), help="export the model with this torch") from error  # fmt: skip
    placeholders = graph.find_nodes(op="placeholder")
    if len(placeholders) != len(declared):
        raise ArtifactError(f"the graph has {len(placeholders)} inputs, the manifest names {len(declared)}", at=path.name,
                            where=str(path.parent), help="export the model again")  # fmt: skip
    for value, slot in zip([node.meta["val"] for node in placeholders], declared, strict=True):
        if (tuple(value.shape), value.dtype) != (slot.shape, slot.dtype):
            raise ArtifactError(f"the graph's input is not {slot.name}", at=path.name, where=str(path.parent),
                                help="export the model again")  # fmt: skip
    for node in graph.nodes:
        custom = node.meta.get("custom") or {}
        node.meta = {"module": "", **{key: custom[key] for key in _KEPT if key in custom}}
    for node, slot in zip(placeholders, declared, strict=True):
        node.meta["slot"] = slot
    return placed(module_of(graph), device)


def placed(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy of a specialised graph on a device; weights and state are contiguous where it moves."""
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, mapped))
    stays = module.meta.get("device") == device
    mode = fake_mode(module) if stays else FakeTensorMode(allow_non_fake_inputs=True)
    for old, new in mapped.items():
        new.meta = copy.copy(old.meta)
        if stays:
            continue
        if new.op == "placeholder":
            slot = slot_of(new)
            with mode:
                new.meta["val"] = torch.empty(slot.shape, dtype=slot.dtype, device=device)
            continue
        new.args, new.kwargs = (_on(device, part) for part in (new.args, new.kwargs))
        with mode, torch.no_grad():
            new.meta["val"] = new.target(*value_of(new.args), **value_of(new.kwargs))  # type: ignore[operator]
    duplicate = module_of(graph)
    duplicate.meta = {"device": device, "fake_mode": mode}
    return duplicate


def _on(device: torch.device, arguments: Any) -> Any:
    """Arguments with every device replaced."""
    return fx.node.map_aggregate(arguments, lambda value: device if isinstance(value, torch.device) else value)


def check_data(path: Path) -> None:
    """Raise ArtifactError if an archive holds more than a graph."""
    for reason in why_not_data(path):
        raise ArtifactError(reason, at=path.name, where=str(path.parent),
                            help="only archives that `autospec export` wrote are read")  # fmt: skip


def why_not_data(path: Path) -> Iterator[str]:
    """Sentences about what an archive holds beside a plain graph; none: reading it runs nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield from _why_not_entries(archive)
            content = json.loads(_entry(archive, _MODEL))
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError, OSError) as error:
        yield f"this is no graph archive: {type(error).__name__}: {str(error)[:80]}"
        return
    yield from _why_not_program(content)


def _why_not_entries(archive: zipfile.ZipFile) -> Iterator[str]:
    allowed = {_MODEL, *_EMPTY_CONFIGS, *_EMPTY_FILES, *_MARKS}
    names = [entry.filename.partition("/")[2] for entry in archive.infolist()]
    if len({entry.filename.partition("/")[0] for entry in archive.infolist()}) != 1 or len(set(names)) != len(names):
        yield "the archive has more than one folder, or a file twice"
    for entry, name in zip(archive.infolist(), names, strict=True):
        if name not in allowed:
            yield f"the archive holds '{name[:60]}', which no graph needs"
        elif entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _LARGEST:
            yield f"'{name}' is compressed, or too large"
        elif name in _EMPTY_FILES and entry.file_size:
            yield f"the archive holds pickled code: '{name}' is not empty"
    for name in _EMPTY_CONFIGS:
        if json.loads(_entry(archive, name)) != {"config": {}}:
            yield f"the archive holds weights or constants of its own: '{name}'"


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    root = archive.namelist()[0].partition("/")[0]
    return archive.read(f"{root}/{name}")


def _why_not_program(content: Any) -> Iterator[str]:
    """What in an ExportedProgram's JSON is more than static data."""
    for key in ("guards_code", "range_constraints"):
        if content.get(key):
            yield f"the graph has {key}, which would be evaluated"
    inner = content["graph_module"]
    for key in ("sym_int_values", "sym_bool_values", "sym_float_values", "custom_obj_values"):
        if inner["graph"].get(key):
            yield f"the graph has {key}"
    for node in inner["graph"]["nodes"]:
        if not _OPS.fullmatch(node["target"]) or node["target"] in _READS_FILES:
            yield f"the graph calls {node['target'][:80]}, which is no op of a portable graph"
        if not set(node.get("metadata") or {}) <= _METADATA:
            yield f"{node['target']} carries metadata that would be looked up"
    for call in inner["module_call_graph"]:
        for spec in (call["signature"]["in_spec"], call["signature"]["out_spec"]):
            if not set(_tree_types(json.loads(spec))) <= _TREES:
                yield "the graph's arguments are of unknown classes"
    for kind in sorted({kind for kind in _argument_kinds(content) if kind not in _DATA}):
        yield f"the graph has an argument of kind {kind}, which is more than data"


def _argument_kinds(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key.startswith("as_"):
                yield key
            if key == "expr_str":
                yield key
            yield from _argument_kinds(item)
    elif isinstance(value, list):
        for item in value:
            yield from _argument_kinds(item)


def _tree_types(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        if "type" in value:
            yield value["type"]
        for item in value.values():
            yield from _tree_types(item)
    elif isinstance(value, list):
        for item in value:
            yield from _tree_types(item)
