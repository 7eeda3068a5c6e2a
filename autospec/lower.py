"""Graphs -> a program for this machine: implementations chosen, then eager, or Inductor with every reference inlined."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from tqdm import tqdm

from autospec import debug, pipeline
from autospec.early_start import refuse_unsafe_starts, starting_early
from autospec.errors import LoweringError, OptionError
from autospec.ir.build import Builder, module_of, value_of
from autospec.ir.fakes import fake_mode
from autospec.ir.passes import PassRecord
from autospec.ir.runner import run_stages
from autospec.ir.slots import Slot, is_pages, slots
from autospec.kernels.ahead import compile_ahead, compiling_ahead
from autospec.kernels.launch import settle_compiler
from autospec.kernels.registry import DIRECT, LAUNCHES, KernelOp, find
from autospec.program import Graph, ModelFacts, Program, Shape, materialise


@dataclass
class Unlowered:
    """The graphs of a program as they are on every machine: no implementation is chosen yet.

    Args:
        graphs: by name, "prefill" and one "step_<draft length>" each.
        weights: what their slots are made of, by name; captured tensors, never copies.
        records: what every pass did.
    """

    shape: Shape
    facts: ModelFacts
    graphs: dict[str, fx.GraphModule]
    weights: dict[str, Tensor]
    records: list[PassRecord]


def lower_program(
    unlowered: Unlowered, compile: str, weights: dict[str, Tensor] | None = None, progress: bool = False,
    left_out: frozenset[str] = frozenset(),
) -> Program:  # fmt: skip
    """Choose implementations for this machine, lower the graphs and make the weights that they read.

    Args:
        weights: tensors of earlier programs by slot name; new ones are added.
        left_out: names of optional passes that do not run.
    """
    for module in unlowered.graphs.values():
        settle_compiler(module.meta["device"])
    records, graphs = list(unlowered.records), {}
    bound = {} if weights is None else weights
    for name, module in tqdm(
        unlowered.graphs.items(), desc=f"building ({compile})", disable=not progress, leave=False
    ):
        ran = sum(record.graph == name for record in records)
        records += run_stages(
            module, [pipeline.select()], graph_name=name, debug=debug.options(), left_out=left_out, first=ran
        )
        graphs[name] = lower(module, name, manner(unlowered.shape, compile))
    for graph in graphs.values():
        for slot in graph.slots:
            if slot.kind == "weight" and slot.name not in bound:
                bound[slot.name] = materialise(slot, unlowered.weights)
    return Program(unlowered.shape, unlowered.facts, graphs, bound, records)


def manner(shape: Shape, compile: str) -> str:
    """How graphs of a program are lowered: what is asked for, but Inductor would round an exact one's steps in several ways."""
    return "replayed" if shape.is_exact and compile == "inductor" else compile


def lower(module: fx.GraphModule, name: str, how: str) -> Graph:
    """Make a program's graph callable over its slots, in order.

    Args:
        how: "inductor"; "eager" runs op by op; so does "replayed", which on a GPU becomes one CUDA graph: what Inductor fuses
            with what, and so where it rounds and in which order it sums, differs between a graph that drafts and one that does
            not (three layers in bfloat16 on an H100 had other bits, op by op the same).
    """
    declared = slots(module)
    if how == "eager":
        return Graph(name, declared, module, module)
    if how not in ("inductor", "replayed"):
        raise OptionError(f"compile must be 'inductor' or 'eager', got {how!r}", at=f"compile={how!r}")
    start = time.perf_counter()
    with compiling_ahead(module.meta["device"]):
        if how == "replayed":
            launch_directly(module)
            return Graph(name, declared, module, module, is_compiled=True)
        inline_references(module)
        launch_directly(module)
        call = compile_with_inductor(module)
    return Graph(name, declared, call, module, time.perf_counter() - start, is_compiled=True)


def launch_directly(module: fx.GraphModule) -> None:
    """Let our kernels that wait inside for the one before them be launched by Triton: Inductor launches ours in their turn.

    Python runs them once, while a CUDA graph is captured. Inside `compiling_ahead` they start to compile now.
    """
    started: set[Any] = set()
    for node in module.graph.nodes:
        if node.target not in DIRECT:
            continue
        node.target = DIRECT[node.target]
        args, kwargs = value_of((node.args, node.kwargs))
        leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs))
        if (call := (node.target, spec, *map(_alike, leaves))) not in started:
            started.add(call)
            with fake_mode(module):
                compile_ahead(LAUNCHES[node.target], args, kwargs)
    module.recompile()


def inline_references(module: fx.GraphModule) -> int:
    """Replace canonical ops that run their reference by the reference's aten ops, so that Inductor fuses them."""
    count = 0
    traced: dict[Any, fx.Graph] = {}  # layers call an op with the same shapes, and tracing one takes about 6 ms
    for node in list(module.graph.nodes):
        kernel = find(node.target) if node.op == "call_function" else None
        if kernel is not None:
            _inline(module, node, kernel, traced)
            count += 1
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return count


def _alike(value: Any) -> Any:
    """What a reference's trace depends on of an argument."""
    return (value.dtype, value.shape, value.stride(), value.device) if isinstance(value, Tensor) else repr(value)


def _inline(module: fx.GraphModule, node: fx.Node, kernel: KernelOp, traced: dict[Any, fx.Graph]) -> None:
    bound = kernel.bind(node.args, node.kwargs)
    leaves, spec = torch.utils._pytree.tree_flatten(tuple(bound.values()))
    flat_values = value_of(leaves)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
    # A tensor that is passed twice is one input of its trace, which is not that of two tensors.
    first = [next(i for i, other in enumerate(flat_values) if other is value) for value in flat_values]
    known = kernel.name, spec, *first, *map(_alike, flat_values)

    def over_tensors(*given: torch.Tensor) -> Any:
        filled = list(flat_values)
        for index, tensor in zip(tensors, given, strict=True):
            filled[index] = tensor
        return kernel.reference(*torch.utils._pytree.tree_unflatten(filled, spec))

    if known not in traced:
        with fake_mode(module), torch.no_grad():
            traced[known] = make_fx(over_tensors)(*[flat_values[i] for i in tensors]).graph
    builder = Builder(module, node, node.meta.get("module", ""))
    mapped: dict[fx.Node, Any] = {}
    sources = iter([leaves[i] for i in tensors])
    results: Any = None
    for inner in traced[known].nodes:
        if inner.op == "placeholder":
            mapped[inner] = next(sources)
        elif inner.op == "output":
            results = fx.map_arg(inner.args[0], lambda n: mapped[n])
        else:
            assert inner.op == "call_function", f"the reference of {kernel.name} makes a constant: use arange, full, where"
            args, kwargs = fx.map_arg((inner.args, inner.kwargs), lambda n: mapped[n])
            mapped[inner] = builder.call(inner.target, *args, **kwargs)
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    elif results is not None:
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
    module.graph.erase_node(node)


_COMPILING = threading.RLock()  # what is patched below is patched for all threads


def compile_with_inductor(module: fx.GraphModule) -> Any:
    """Compile with static shapes; weights and state are arguments, so no weight is copied."""
    import torch._inductor
    from torch._inductor.exc import OperatorIssue
    from torch._inductor.graph import GraphLowering

    examples = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    plain = module_of(module.graph)
    sources: list[str] = []
    device = module.meta["device"]
    # Packed weights are opaque tensors without strides, so the arguments' sizes are not asserted at run time.
    options: dict[str, Any] = {"reorder_for_locality": False, "size_asserts": False}
    # A C++ wrapper saves the interpreter's time between kernels: the demo's step with a draft model takes 3.6 ms
    # instead of 4.2 on two cores of an EPYC (2026-11-21), for 15 s more of g++.
    options["cpp_wrapper"] = device.type == "cpu"
    # Its entry is compiled beside the kernels, at a lower level: the demo's EAGLE-3 step compiles in 16 to 18 s instead of 21 on
    # two cores, and decodes as fast: 51, 57, 49 ms for 22 steps, where together took 52, 63, 49 (medians of 12; 2026-11-21).
    options["cpp_wrapper_build_separate"] = True
    # A thread barrier costs more than a small loop saves: the demo's plain step takes 1.4 ms instead of 1.8 (same machine).
    options["cpp.min_chunk_size"] = 8192
    # Independent kernels in one launch: 357 in a step of a tree of 64 nodes instead of 380, 33 us of 8550 (H100, 2026-11-21).
    # torch 2.11 may so compute up to 8 weights that follow from inputs alone before their turn and keep them: scaled layers of
    # which no kernel takes the float8 weight (16 of 2048 x 2048: 68 MB instead of 12; torch 2.13: 12).
    options["combo_kernels"] = device.type == "cuda"
    try:
        with (
            _COMPILING,
            torch.no_grad(),
            starting_early(device) as early,
            torch._inductor.config.patch(options | early),
            mock.patch.object(GraphLowering, "save_output_code", sources.append),
            # What Inductor logs of an op that it meets for the first time holds all ops before it, each as often as it is used.
            mock.patch.object(OperatorIssue, "operator_str", staticmethod(lambda target, args, kwargs: str(target))),
        ):
            compiled = torch._inductor.standalone_compile(plain, examples, dynamic_shapes="from_example_inputs")
    except Exception as error:
        raise LoweringError(
            f"Inductor failed: {type(error).__name__}: {str(error)[:300]}", help="try compile='eager', and report this"
        ) from error
    assert sources, "Inductor showed no generated code, so page-sized copies cannot be ruled out"
    refuse_unsafe_starts(sources)
    refuse_page_copies(sources, [slot for slot in slots(module) if slot.kind == "state"])
    return compiled


_PYTHON_ALLOCATION = re.compile(r"empty_strided_\w+\(\(([\d, ]+)\)")
_CPP_SIZES = re.compile(r"(int_array_\d+)\[\] = \{([\dL, ]+)\}")
_CPP_ALLOCATION = re.compile(r"aoti_torch_empty_strided\w*\(\d+, (int_array_\d+)")


def allocated_sizes(source: str) -> Iterator[tuple[int, ...]]:
    """Shapes of the buffers that generated code allocates, in Inductor's Python and C++ wrappers."""
    arrays = dict(_CPP_SIZES.findall(source))
    found = [*_PYTHON_ALLOCATION.findall(source), *(arrays.get(name, "") for name in _CPP_ALLOCATION.findall(source))]
    for sizes in found:
        yield tuple(int(size.strip().rstrip("L")) for size in sizes.split(",") if size.strip())


def refuse_page_copies(sources: Iterable[str], state: Iterable[Slot]) -> None:
    """Raise LoweringError if generated code allocates a buffer with the very shape of a page buffer.

    Pages are written in place; Inductor clones a buffer silently when it cannot prove that this is safe, which would
    cost a copy of the whole cache per layer and step. Pages of numbers (the scales of float8 index keys) are small, and
    many an activation has two dimensions: they are left out.
    """
    pages = {slot.shape: slot for slot in state if is_pages(slot) and len(slot.shape) > 2}
    for source in sources:
        for sizes in allocated_sizes(source):
            if sizes in pages:
                raise LoweringError(
                    f"the compiled graph copies a whole page buffer of {math.prod(sizes)} elements",
                    at=f"empty_strided({sizes})", where=pages[sizes].name,
                    help="compile='eager' runs the graph as it is; a pass must write each buffer in one style",
                )  # fmt: skip
