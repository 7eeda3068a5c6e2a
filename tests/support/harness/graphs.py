"""Graphs small enough to read: a one-head language model exported by hand, and graphs written node by node."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autospec.assemble import copy_graph
from autospec.capture_slots import with_slots
from autospec.decompose import functional
from autospec.ir.build import Builder, declare
from autospec.ir.passes import Pass, PassRecord
from autospec.ir.runner import run_pass
from autospec.ir.slots import Slot, slot_of, slots
from autospec.kernels.attention import attention
from autospec.passes.tag_roles import TagRoles

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
ACCEPT = "AUTOSPEC_ACCEPT"
VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 16, 8, 2, 1, 4


class _Layer(torch.nn.Module):
    def __init__(self, window: int) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.k_proj = torch.nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = torch.nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = torch.nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            part(x).view(batch, length, -1, HEAD_DIM).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attention(q, k, v, None, 0.5, self.window, 0, 0.0)
        return x + self.o_proj(out.reshape(batch, length, -1))


class _Model(torch.nn.Module):
    def __init__(self, num_layers: int, window: int, is_tied: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.places = torch.nn.Embedding(256, WIDTH)
        self.layers = torch.nn.ModuleList([_Layer(window) for _ in range(num_layers)])
        self.lm_head = torch.nn.Linear(WIDTH, VOCAB, bias=False)
        if is_tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor]:
        x = self.embed(input_ids) + self.places(position_ids)
        for layer in self.layers:
            x = layer(x)
        return (self.lm_head(x),)


class _Head(torch.nn.Module):
    """A draft head of one layer; it recycles what its lm_head reads."""

    def __init__(self, num_taps: int, draft_vocab: int) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(num_taps * WIDTH, WIDTH, bias=False)
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.places = torch.nn.Embedding(256, WIDTH)
        self.layer = _Layer(0)
        self.lm_head = torch.nn.Linear(WIDTH, draft_vocab, bias=False)

    def forward(self, input_ids: Tensor, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.layer(hidden + self.embed(input_ids) + self.places(position_ids))
        return self.lm_head(hidden), hidden


class _FirstPass(torch.nn.Module):
    """A head on the target's features."""

    def __init__(self, head: _Head) -> None:
        super().__init__()
        self.model = head

    def forward(self, input_ids: Tensor, taps: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(input_ids, self.model.fc(taps), position_ids)


def captured_graph(
    module: torch.nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """A module as capture leaves it: symbolic in the first two dimensions, with slots and roles; and its weights."""
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(
        module.eval().requires_grad_(False), tuple(inputs.values()), dynamic_shapes=tuple(dims for _ in inputs), strict=False
    )
    graph, weights = with_slots(functional(exported), "tiny", tuple(inputs))
    run_pass(graph, TagRoles())
    return graph, weights


_IDS = torch.zeros(2, 5, dtype=torch.int64)


def tiny_graph(num_layers: int = 1, window: int = 0, is_tied: bool = False) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The language model as capture leaves it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = _Model(num_layers, window, is_tied)
    return captured_graph(model, {"input_ids": _IDS, "position_ids": _IDS.clone()})


@dataclass(frozen=True)
class TinyHead:
    """A draft head: the module, its first pass and the following ones as capture leaves them, its weights."""

    module: _Head
    first: fx.GraphModule
    following: fx.GraphModule
    weights: dict[str, Tensor]


def tiny_head(num_taps: int, draft_vocab: int) -> TinyHead:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        head = _Head(num_taps, draft_vocab)
    taps, hidden = torch.zeros(2, 5, num_taps * WIDTH), torch.zeros(2, 5, WIDTH)
    first, weights = captured_graph(_FirstPass(head), {"input_ids": _IDS, "taps": taps, "position_ids": _IDS.clone()})
    following, more = captured_graph(head, {"input_ids": _IDS, "hidden": hidden, "position_ids": _IDS.clone()})
    return TinyHead(head, first, following, weights | more)


def sketch(slots_: list[Slot], write: Callable[..., Any], device: str = "cpu") -> fx.GraphModule:
    """A static graph over these slots; `write(builder, *placeholders)` emits its nodes and returns the outputs."""
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    module.meta.update(device=torch.device(device), fake_mode=FakeTensorMode(allow_non_fake_inputs=True))
    output = module.graph.output(())
    placeholders = [declare(module, slot) for slot in slots_]
    results = write(Builder(module, output, "sketch"), *placeholders)
    output.args = (tuple(results) if isinstance(results, (list, tuple)) else (results,),)
    module.recompile()
    return module


def apply(module: fx.GraphModule, *passes: Pass) -> list[PassRecord]:
    """Run passes as the compiler does."""
    return [run_pass(module, one) for one in passes]


def after(module: fx.GraphModule, *passes: Pass) -> fx.GraphModule:
    """A copy of the graph with these passes applied."""
    duplicate = copy_graph(module)
    duplicate.meta.update(module.meta)
    apply(duplicate, *passes)
    return duplicate


def evaluate(module: fx.GraphModule, values: Mapping[str, Tensor]) -> Any:
    """Run a graph; state in `values` is written in place."""
    arguments = [values[slot_of(node).name] for node in module.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        return fx.Interpreter(module).run(*arguments)


def new_state(module: fx.GraphModule) -> dict[str, Tensor]:
    """Fresh state of a graph."""
    return {
        slot.name: torch.full(slot.shape, slot.fill, dtype=slot.dtype) for slot in slots(module) if slot.kind == "state"
    }


def renamed(text: str) -> str:
    """Graph text with calls numbered in order of appearance: names of exported nodes differ between torch versions."""
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name, target in re.findall(r"^%(\w+) = (?:\w+\.)?(\w+)[\w.]*\(", text, re.MULTILINE):
        number = counts[target] = counts.get(target, -1) + 1
        names[name] = f"{target}_{number}" if number else target
    return re.sub(r"%(\w+)", lambda found: f"%{names.get(found[1], found[1])}", text)


def check_golden(name: str, text: str) -> None:
    """Compare with tests/golden/<name>.txt; AUTOSPEC_ACCEPT=1 writes it instead."""
    text = renamed(text)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get(ACCEPT):
        path.write_text(text)
    assert path.exists(), f"{path.name} does not exist yet: look at the text, then accept it with {ACCEPT}=1\n{text}"
    assert text == path.read_text(), f"the text differs from {path.name}; if that is right, accept it with {ACCEPT}=1"
