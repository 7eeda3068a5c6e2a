"""capture_head: heads that do not fit are refused; what a head taps is what the target's layers leave."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness.graphs import after, evaluate
from harness.models import TAPS, VOCAB, captured, head
from torch import Tensor, nn
from transformers import LlamaConfig

from autospec import debug, pipeline
from autospec.assemble import copy_graph
from autospec.capture import export_model
from autospec.capture_head import capture_head
from autospec.errors import AutospecError, CaptureError, OptionError
from autospec.heads.eagle3 import Eagle3Head
from autospec.heads.medusa import MedusaHeads
from autospec.ir.roles import with_role
from autospec.ir.runner import run_stages
from autospec.ir.sizes import constants_of
from autospec.passes.fold_noops import FoldNoops
from autospec.passes.specialize_shapes import SpecializeShapes
from autospec.passes.tap_hidden_states import TapHiddenStates
from autospec.program import CapturedModel
from autospec.tiny_models import tiny_model

FAMILIES = {
    "llama": 2, "qwen3": 2, "gemma2": 2, "gemma3_text": 2, "mixtral": 2, "phi3": 2, "gpt2": 2, "gpt_oss": 2, "llama4_text": 4,
    "deepseek_v3": 2, "bart": 2,
}  # fmt: skip  # bart has no final norm: its lm_head reads what the last layer leaves
BATCH, LENGTH = 2, 13


def _eagle(**changes: Any) -> Eagle3Head:
    """A head of one layer for the tiny target, its specification changed."""
    spec = head("eagle").spec
    layer = LlamaConfig(**{**spec.layer.to_dict(), "num_hidden_layers": 1})
    return Eagle3Head(replace(spec, layer=layer, **changes), torch.zeros(VOCAB, layer.hidden_size)).eval()


def _without(role: Any) -> CapturedModel:
    """The tiny target as if a role had not been found."""
    target = captured("target")
    graph = copy_graph(target.graph)
    for node in with_role(graph, role):
        del node.meta["role"]
    return replace(target, graph=graph)


def _outside() -> Eagle3Head:
    made = _eagle()
    made.d2t = torch.full((48,), VOCAB - 47)  # the last id is that of the vocabulary's end
    return made


# name -> (kind, head, target, the rule, what to do)
CASES: dict[str, tuple[type[AutospecError], Callable[[], Any], Callable[[], CapturedModel], str, str]] = {
    "dtype": (
        OptionError, lambda: _eagle().to(torch.bfloat16), lambda: captured("target"),
        "the head is torch.bfloat16 on cpu, the target torch.float32 on cpu", "convert it with head.to(...)"),
    "device": (
        OptionError, lambda: MedusaHeads(32, VOCAB, 2).to("meta"), lambda: captured("target"),
        "the head is torch.float32 on meta, the target torch.float32 on cpu", "convert it with head.to(...)"),
    "no head": (
        OptionError, lambda: nn.Linear(2, 2), lambda: captured("target"),
        "Linear is no draft head", "give a folder, an Eagle3Head, MedusaHeads or an MTPHead"),
    "a model": (
        OptionError, lambda: tiny_model("llama", num_hidden_layers=1), lambda: captured("target"),
        "LlamaForCausalLM is no draft head", "give a folder"),
    "beyond the last layer": (
        CaptureError, lambda: _eagle(tap_after=(0, 1, 2)), lambda: captured("target"),
        "the output of layer 2 was not found, the graph shows layers 0 to 1", "needs hidden states"),
    "no layers": (
        CaptureError, _eagle, lambda: _without("layer_output"),
        "the output of layer 0 was not found, the graph shows no layers at all", "needs hidden states"),
    "no lm_head": (
        CaptureError, lambda: MedusaHeads(32, VOCAB, 2), lambda: _without("lm_head"),
        "the logits do not come straight from a linear layer", "needs hidden states"),
    "other heads": (
        OptionError, lambda: MedusaHeads(24, VOCAB, 2), lambda: captured("target"),
        "the head reads 24 hidden values per token, the target's layers leave 32", "trained for this target"),
    "another target": (
        OptionError, lambda: _eagle(target_hidden_size=64), lambda: captured("target"),
        "the head reads 192 hidden values per token, the target's layers leave 96", "trained for this target"),
    "a larger vocabulary": (
        OptionError, lambda: MedusaHeads(32, VOCAB + 1, 2), lambda: captured("target"),
        "the head guesses among 65 tokens, the target knows 64", "trained for this target"),
    "d2t": (OptionError, _outside, lambda: captured("target"),
            "the head guesses among 65 tokens, the target knows 64", "trained for this target"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused(case: str) -> None:
    kind, make, target, rule, todo = CASES[case]
    made = make()
    with pytest.raises(kind) as caught:
        capture_head(made, target())
    lines = str(caught.value).splitlines()
    assert [line[:7].strip() for line in lines[1:]] == ["at", "in", "help"], f"not four lines:\n{caught.value}"
    assert rule in caught.value.rule
    assert todo in str(caught.value.help)


@pytest.mark.parametrize("name", ["eagle", "medusa"])
def test_captured_passes_compute_what_the_head_computes(name: str) -> None:
    """At another batch and length than those of the export."""
    made, found = head(name), captured(name)
    assert (found.tap_after, found.max_draft_len) == ((TAPS, None) if name == "eagle" else ((), 8))
    ids, positions = torch.randint(0, VOCAB, (3, 7)), torch.arange(7).expand(3, -1)
    taps, hidden = torch.randn(3, 7, 32 * max(len(found.tap_after), 1)), torch.randn(3, 7, 32)
    values = {"input_ids": ids, "position_ids": positions, "taps": taps, "hidden": hidden, **found.weights}
    with torch.no_grad():
        expected = [made(ids, made.fuse(taps), positions), made(ids, hidden, positions)] if name == "eagle" else [(made(taps),)]
    for graph, wanted in zip((found.first, found.following), expected, strict=False):
        for mine, theirs in zip(evaluate(graph, values), wanted, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["eagle", "medusa"])
def test_a_head_of_ours_is_traced_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in ops that capture keeps or renames: traced again, a head of one layer took 3.8 s instead of 1.7."""
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", pytest.fail)
    capture_head(head(name), captured("target"))


@functools.cache
def _family(family: str) -> tuple[Any, Any, dict[str, Tensor]]:
    """A tiny model, its graph with roles, and its weights; the checks of capture are tested elsewhere."""
    model = tiny_model(family, num_hidden_layers=FAMILIES[family], **({"decoder_layers": 2} if family == "bart" else {}))
    exported = export_model(model)
    run_stages(exported.graph, pipeline.understand(exported.max_positions), graph_name="capture", debug=debug.options())
    return model, exported.graph, exported.weights | constants_of(exported.graph)


def _states(model: Any, layers: int, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """What the decoder layers of the Hugging Face model return, and what its output embeddings read."""
    found: dict[int, Tensor] = {}
    decoder = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)

    def remember(index: int, value: Any) -> None:
        found[index] = value[0] if isinstance(value, tuple) else value

    hooks = [
        layer.register_forward_hook(lambda module, given, out, index=index: remember(index, out))
        for index, layer in enumerate(decoder)
    ]
    hooks.append(model.get_output_embeddings().register_forward_pre_hook(lambda module, given: remember(-1, given)))
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [found[index] for index in range(layers)], found[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_the_layer_outputs_of_transformers(family: str) -> None:
    model, graph, weights = _family(family)
    layers = FAMILIES[family]
    ids = torch.randint(2, 120, (BATCH, LENGTH))
    outputs, read = _states(model, layers, ids)
    values = {"input_ids": ids, "position_ids": torch.arange(LENGTH).expand(BATCH, -1), **weights}
    static = SpecializeShapes(batch_size=BATCH, q_len=LENGTH), FoldNoops()
    for tap_after, expected in ((tuple(range(layers)), torch.cat(outputs, -1)), ((), read)):
        taps = evaluate(after(graph, *static, TapHiddenStates(tap_after=tap_after)), values)[1]
        assert float((taps - expected).abs().max() / expected.abs().max()) < 1e-5, tap_after
    assert not torch.equal(outputs[0], outputs[1]), "layers that do nothing would hide a wrong tap"
