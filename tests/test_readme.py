"""The README's Python blocks run as they stand, with compile="eager" to be quick."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import autospec
from autospec import pipeline
from autospec.ir.build import Builder
from autospec.ir.runner import run_pass
from autospec.ir.slots import Slot

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_first_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from autospec import api

    eager = functools.partial(api.optimize, compile="eager")
    monkeypatch.setattr(autospec, "optimize", eager, raising=False)
    monkeypatch.chdir(ROOT)
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "mean acceptance length" in printed
    assert "page-kv-cache" in printed


def test_every_draft_tree_of_the_readme_decodes_identically(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configurations that it shows, one after the other, on the bundled model."""
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(ROOT)
    model = AutoModelForCausalLM.from_pretrained("model_zoo/demo/target", dtype="float32").eval()
    head, *shown = [line for line in BLOCKS[1].splitlines() if line]
    names: dict[str, Any] = {"autospec": autospec}
    exec(head, names)
    prompt = torch.arange(300, 312)[None]
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    assert len(shown) == 3
    for line in shown:
        fast = autospec.optimize(model, eval(line, names), compile="eager", max_length=64)
        assert torch.equal(fast.generate(prompt, max_new_tokens=12, do_sample=False), expected), line


def test_the_exported_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[2], "README.md", "exec"), names)
    assert names["output"].shape == (1, 35)


def test_the_table_names_every_pass() -> None:
    table = (ROOT / "README.md").read_text().partition("## The pipeline")[2].partition("\n\n[")[0]
    for one in pipeline.pass_types():
        assert re.search(rf"\b{one.name}\b", table), f"{one.name} is missing"


def test_the_worked_pass_does_what_it_says() -> None:
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(BLOCKS[3], "README.md", "exec"), names)
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    module.graph.output(())
    module.meta.update(fake_mode=FakeTensorMode(), device=torch.device("cpu"))
    builder = Builder(module)
    x = builder.slot(Slot("input", "x", (3,)))
    neg = torch.ops.aten.neg.default
    twice = builder.call(neg, builder.call(neg, x))
    module.graph.output_node().args = ((builder.call(neg, twice),),)
    module.recompile()
    record = run_pass(module, names["FoldDoubleNegation"]())
    assert record.count >= 1
    assert {refusal.reason for refusal in record.refusals} == {"its operand is not a negation"}
    value = torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(module(value)[0], -value)
    assert run_pass(module, names["FoldDoubleNegation"]()).count == 0
