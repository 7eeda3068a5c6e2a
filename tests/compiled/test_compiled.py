"""The few tests that pay for Inductor: one compiled program, held against eager and against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

import autospec
from autospec.errors import LoweringError
from autospec.ir.build import Builder
from autospec.ir.slots import Slot, slots
from autospec.kernels.registry import find
from autospec.lower import compile_with_inductor, refuse_page_copies

pytestmark = [pytest.mark.compiled, pytest.mark.xdist_group("compiled")]


def tiny(layers: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=256, initializer_range=0.3, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def compiled() -> tuple[Any, Any]:
    """A target and its compiled program with the target itself, one layer short, as draft."""
    model = tiny(layers=2, seed=0)
    fast = autospec.optimize(model, autospec.DraftTargetConfig(model, max_draft_len=2), max_length=128)
    return model, fast


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(3))


def test_compiled_tokens_equal_transformers(compiled: tuple[Any, Any], prompts: torch.Tensor) -> None:
    model, fast = compiled
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0
    expected = model.generate(prompts, attention_mask=mask, max_new_tokens=48, do_sample=False, pad_token_id=0)
    got = fast.generate(prompts, mask, max_new_tokens=48, do_sample=False, pad_token_id=0)
    assert torch.equal(got, expected)
    assert fast.metrics.mean_acceptance_length == pytest.approx(3.0), "a draft equal to the target is accepted whole"


def test_a_second_call_compiles_nothing(compiled: tuple[Any, Any], prompts: torch.Tensor) -> None:
    _, fast = compiled
    fast.generate(prompts, max_new_tokens=8, do_sample=False)
    program = fast.program
    fast.generate(prompts[:, :5], max_new_tokens=30, do_sample=False)
    assert fast.program is program


def test_no_canonical_op_is_left_to_call(compiled: tuple[Any, Any]) -> None:
    _, fast = compiled
    for graph in fast.program.graphs.values():
        assert graph.module is not None
        assert not [node for node in graph.module.graph.nodes if find(node.target) is not None], graph.name


def test_attention_on_a_cpu_reads_pages_in_place(compiled: tuple[Any, Any]) -> None:
    """Every graph calls the C++ kernel, and nothing gathers or copies a page buffer (lowering would have refused that)."""
    _, fast = compiled
    for graph in fast.program.graphs.values():
        assert graph.module is not None
        names = [str(node.target) for node in graph.module.graph.nodes if node.op == "call_function"]
        assert names.count("autospec_cpu.paged_attention.default") >= 2, graph.name
        pages = {slot.shape for slot in graph.slots if slot.name.startswith("k_pages")}
        shapes = {tuple(node.meta["val"].shape) for node in graph.module.graph.nodes
                  if node.op == "call_function" and "index_select" in str(node.target)}  # fmt: skip
        assert not shapes & pages


def page_graph(*, reads_old: bool) -> fx.GraphModule:
    """Write one row of a page buffer; a planted bug also needs its old contents afterwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    module.graph.output(())
    module.meta.update(fake_mode=FakeTensorMode(), device=torch.device("cpu"))
    builder = Builder(module)
    pages = builder.slot(Slot("state", "k_pages.0", (5, 4, 2, 8)))
    row = builder.slot(Slot("input", "row", (1, 2, 8)))
    index = builder.slot(Slot("input", "index", (1,), torch.int64))
    old = builder.call(torch.ops.aten.mul.Tensor, pages, 2.0) if reads_old else None
    written = builder.call(torch.ops.aten.index_put_.default, pages, [index, index], row)
    total = builder.call(torch.ops.aten.sum.default, written)
    module.graph.output_node().args = (tuple(filter(None, (total, old))),)
    module.recompile()
    return module


def test_lowering_refuses_a_page_sized_copy() -> None:
    compile_with_inductor(page_graph(reads_old=False))
    with pytest.raises(LoweringError, match="copies a whole page buffer") as caught:
        compile_with_inductor(page_graph(reads_old=True))
    assert "k_pages.0" in str(caught.value)


def test_page_copies_are_found_in_generated_code() -> None:
    state = [Slot("state", "v_pages.3", (5, 4, 2, 8))]
    # An activation may well have as many elements: batch 1, 20 rows, 16 wide.
    refuse_page_copies(["buf0 = empty_strided_cpu((1, 20, 16), (320, 16, 1), torch.float32)"], state)
    # Nor is one of two dimensions taken for a copy of scales.
    scales = [*state, Slot("state", "index_scale_pages.0", (17, 64))]
    refuse_page_copies(["buf0 = empty_strided_cpu((17, 64), (64, 1), torch.float32)"], scales)
    copies = (
        "buf0 = empty_strided_cpu((5, 4, 2, 8), (64, 16, 8, 1), torch.float32)",
        "static constexpr int64_t int_array_7[] = {5L, 4L, 2L, 8L};\n"
        "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, int_array_7, int_array_8, 6, 0, 0, &buf0_handle));",
    )
    for source in copies:
        with pytest.raises(LoweringError, match=r"v_pages\.3"):
            refuse_page_copies([source], state)


def test_arguments_are_declared_in_order(compiled: tuple[Any, Any]) -> None:
    _, fast = compiled
    for graph in fast.program.graphs.values():
        assert graph.module is not None
        assert graph.slots == slots(graph.module)


def test_what_inductor_logs_of_an_op_is_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its arguments it holds the graph up to there, an op as often as it is used: that never ends (torch 2.11)."""
    from torch._inductor.exc import OperatorIssue

    class Graph:
        def __str__(self) -> str:
            raise AssertionError("all of it is written down")

    def logs(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(OperatorIssue.operator_str("autospec_direct.accept_tree", [Graph()], {}))

    monkeypatch.setattr(torch._inductor, "standalone_compile", logs)
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    module.meta["device"] = torch.device("cpu")
    with pytest.raises(LoweringError, match=r"RuntimeError: autospec_direct\.accept_tree"):
        compile_with_inductor(module)
